"""The Hugging Face Trainer, and TRL and others built on it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from adalora.config import AdaLoraConfig
from adalora.controller import RankController
from adalora.errors import AdaLoraWarning, CheckpointError, TrainingError
from adalora.integrations.interrupt import Interrupt
from adalora.integrations.loggers import LoggerBridge
from adalora.lora.processes.engines import refuse_arguments
from adalora.lora.state.checkpoint import DESCRIPTION, latest_checkpoint, read_state, write_state
from adalora.registry import attach, controllers
from adalora.report.history import History
from adalora.report.thresholds import DiagnosticThresholds


class AdaLoraCallback(TrainerCallback, ExportableState):
    """Makes the trainer's LoRA model adaptive: `Trainer(..., callbacks=[adalora.AdaLoraCallback(target_rank=8)])`.

    Attaches before the optimizer exists and takes the number of steps from the trainer. Every checkpoint gets the exact
    training state beside the plain adapter; `trainer.train(resume_from_checkpoint=…)` goes on from it bit for bit.
    Ctrl-C ends the step, writes a checkpoint and says how to go on; a second one stops at once. The trainer's
    `report_to` loggers get budget, live triplets, phase and orthogonality with every loss, and the ranks as a picture.

    Args:
        config: Settings; or give them as keywords, e.g. `target_rank=8`.
        adapter: Adapter to make adaptive; the active one by default.
        history: A `History` or a path for a JSON-lines file; in memory only by default.
        resume_hint: What the user is told after Ctrl-C, with `{checkpoint}` for the folder.
        thresholds: When a diagnostic of the run speaks up.
        pruned: A file for what is pruned, as `adalora.attach` writes it; none by default.
        **fields: Fields of `AdaLoraConfig`, instead of `config`.
    """

    def __init__(
        self,
        config: AdaLoraConfig | None = None,
        *,
        adapter: str | None = None,
        history: History | str | os.PathLike[str] | None = None,
        resume_hint: str = "trainer.train(resume_from_checkpoint={checkpoint!r})",
        thresholds: DiagnosticThresholds | None = None,
        pruned: str | os.PathLike[str] | None = None,
        **fields: Any,
    ) -> None:
        self.config = AdaLoraConfig.given(config, fields)
        self.adapter = adapter
        self.history = history if isinstance(history, History) else History(history)
        self.resume_hint = resume_hint
        self.save_hint = "save_steps"  # what writes checkpoints
        self._interrupt = Interrupt()
        self._args: TrainingArguments | None = None
        self._trainer_state: TrainerState | None = None
        self.thresholds = thresholds
        self.pruned = pruned
        self.controller: RankController | None = None
        self._bridge = LoggerBridge(None, [])

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attach to the model before the trainer makes the optimizer."""
        refuse_arguments(args)
        controller = self._attach(kwargs["model"])
        if kwargs.get("optimizer") is not None:
            controller.owns(kwargs["optimizer"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the number of optimizer steps from the trainer, or go on from the checkpoint that it has loaded."""
        refuse_arguments(args)
        controller = self.controller or self._attach(kwargs["model"])
        self._bridge = LoggerBridge.beside(self, controller)
        self._args, self._trainer_state = args, state
        if state.global_step > 0 and controller.step != state.global_step:
            self._resume(controller, args, state, kwargs.get("optimizer"))
        elif controller.step == 0 and not controller.finished:  # a later `train()` goes on at the ranks found before
            controller.set_total_steps(state.max_steps)
        if args.world_size == 1:  # the processes of a group would stop at different steps
            self._interrupt.listen()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop where training has diverged; after Ctrl-C, ask for a checkpoint."""
        if self.controller is not None and not self.controller.weights_are_finite():
            self._interrupt.close()
            raise TrainingError(self._diverged(args, state))
        if self._interrupt.requested:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the checkpoint whole where the trainer has not asked for our state before; end after Ctrl-C."""
        folder = _output(args) / f"checkpoint-{state.global_step}"
        if self.controller is not None and folder.is_dir():
            sealed = (folder / DESCRIPTION).is_file()
            if self.controller.is_sharded or (args.should_save and not sealed):
                content = self.controller.state_dict()  # by every process: a sharded model is gathered
                if args.should_save:
                    write_state(folder, content)
        if self._interrupt.requested:
            self._interrupt.close()
            hint = self.resume_hint.format(checkpoint=str(folder))
            print(f"\nstopped after step {state.global_step}; to go on: {hint}", flush=True)
            raise KeyboardInterrupt

    def state(self) -> dict[str, Any]:
        """Called by the trainer while it saves: after weights, optimizer and random numbers, before old ones go.

        So a process killed at any moment leaves a whole checkpoint, even with `save_total_limit=1`.
        """
        if self._args is not None and self._trainer_state is not None and self.controller is not None:
            folder = _output(self._args) / f"checkpoint-{self._trainer_state.global_step}"
            if folder.is_dir() and not self.controller.is_sharded:
                write_state(folder, self.controller.state_dict())
        return {"args": {"adapter": self.adapter, **self.config.to_dict()}, "attributes": {}}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the trainer's loss, learning rate and metrics into the history."""
        logs = kwargs.get("logs") or {}
        if self.controller is None or state.global_step == 0:
            return
        if "loss" in logs:
            self._bridge.scalars(logs)
            self._bridge.picture(state)
            self.controller.log(loss=logs["loss"], learning_rate=logs.get("learning_rate"))
        evaluated = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
        if evaluated:
            self.history.add("metric", step=state.global_step - 1, split="dev", values=evaluated)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the adapter at its target, or as it was in the best checkpoint where the trainer has loaded that."""
        self._interrupt.close()
        if self.controller is None:
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and (Path(best) / DESCRIPTION).is_file():
            self._settle_on_best(self.controller, best)
        self.controller.finalize(cut=best is None)
        self._bridge.picture(state)

    def _settle_on_best(self, controller: RankController, best: str) -> None:
        content = read_state(best, rest=False)
        controller.adopt_masks(content, checkpoint=best)
        if controller.live > controller.target_budget and controller.schedule.shape != "constant":
            warnings.warn(
                f"the best checkpoint, {best}, is from before the budget had reached its target: the adapter has "
                f"{controller.live} triplets, not {controller.target_budget}. For the best one at the target, evaluate "
                f"from step {controller.schedule.decrease_end + 1} on (eval_delay)",
                AdaLoraWarning,
                stacklevel=2,
            )

    def _resume(self, controller: RankController, args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
        """The trainer has loaded weights and optimizer of a checkpoint: load the rest."""
        guess = args.resume_from_checkpoint or str(_output(args) / f"checkpoint-{state.global_step}")
        folder = controller.loaded_from or guess
        if controller.is_sharded and not Path(folder).is_dir():
            raise CheckpointError(
                f"{folder}: no such folder, and under FSDP the trainer does not say which one it has loaded. Say it in "
                "its arguments too: TrainingArguments(…, resume_from_checkpoint=…)"
            )
        content = read_state(folder)
        if content["step"] != state.global_step:
            raise CheckpointError(
                f"{folder}: its adapter is of step {content['step']}, the trainer goes on at {state.global_step}; "
                "resume from one checkpoint"
            )
        if controller.loaded_from is None and not controller.has_weights_of(content):
            raise CheckpointError(
                f"the trainer goes on at step {state.global_step}, but not with the adapter of {folder}. Give "
                "AdaLoraCallback to the trainer when it is made: Trainer(…, callbacks=[callback])"
            )
        controller.expect_total_steps(state.max_steps, content)
        controller.load_state_dict(content, optimizer=getattr(optimizer, "optimizer", optimizer))

    def _diverged(self, args: TrainingArguments, state: TrainerState) -> str:
        last = latest_checkpoint(_output(args))
        go_on = (
            f"the last good checkpoint is {last}" if last else f"no checkpoint was written before ({self.save_hint})"
        )
        return (
            f"the adapter's weights are NaN or infinite after step {state.global_step}: the loss has diverged; "
            f"{go_on}. Lower learning_rate (now {args.learning_rate:g}) or max_grad_norm (now {args.max_grad_norm:g}), "
            "or train in bf16 instead of fp16, and start again"
        )

    def _attach(self, model: nn.Module) -> RankController:
        name = self.adapter or getattr(model, "active_adapter", "default")
        present = controllers(model).get(name) if isinstance(name, str) else None
        self.controller = present or attach(
            model,
            self.config,
            adapter=self.adapter,
            history=self.history,
            thresholds=self.thresholds,
            pruned=self.pruned,
        )
        self.history = self.controller.history
        return self.controller


def _output(args: TrainingArguments) -> Path:
    return Path(args.output_dir or "trainer_output")
