"""The Hugging Face Trainer, and TRL and others built on it."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adalora.config import AdaLoraConfig
from adalora.controller import RankController
from adalora.errors import ConfigError
from adalora.integrations.loggers import LoggerBridge
from adalora.registry import attach
from adalora.report.history import History
from adalora.report.thresholds import DiagnosticThresholds


class AdaLoraCallback(TrainerCallback):
    """Makes the trainer's LoRA model adaptive: `Trainer(..., callbacks=[adalora.AdaLoraCallback(target_rank=8)])`.

    Attaches before the optimizer exists and takes the number of steps from the trainer. The trainer's `report_to`
    loggers get budget, live triplets, phase and orthogonality with every loss, and the ranks as a picture.

    Args:
        config: Settings; or give them as keywords, e.g. `target_rank=8`.
        adapter: Adapter to make adaptive; the active one by default.
        history: A `History` or a path for a JSON-lines file; in memory only by default.
        thresholds: When a diagnostic of the run speaks up.
        **fields: Fields of `AdaLoraConfig`, instead of `config`.
    """

    def __init__(
        self,
        config: AdaLoraConfig | None = None,
        *,
        adapter: str | None = None,
        history: History | str | os.PathLike[str] | None = None,
        thresholds: DiagnosticThresholds | None = None,
        **fields: Any,
    ) -> None:
        if config is not None and fields:
            raise ConfigError(f"give config or keywords, not both: {', '.join(fields)}")
        self.config = config or AdaLoraConfig(**fields)
        self.adapter = adapter
        self.history = history if isinstance(history, History) else History(history)
        self.thresholds = thresholds
        self.controller: RankController | None = None
        self._bridge = LoggerBridge(None, [])

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attach to the model before the trainer makes the optimizer."""
        self._attach(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the number of optimizer steps from the trainer."""
        controller = self.controller or self._attach(kwargs["model"])
        self._bridge = LoggerBridge.beside(self, controller)
        if controller.step == 0 and not controller.finished:  # a later `train()` goes on at the ranks found before
            controller.set_total_steps(state.max_steps)

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
        """Leave the adapter at its target whatever happened."""
        if self.controller is not None:
            self.controller.finalize()
            self._bridge.picture(state)

    def _attach(self, model: nn.Module) -> RankController:
        self.controller = attach(
            model, self.config, adapter=self.adapter, history=self.history, thresholds=self.thresholds
        )
        return self.controller
