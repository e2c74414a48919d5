"""Lightning, with automatic and manual optimisation."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from adalora.config import AdaLoraConfig
from adalora.controller import RankController
from adalora.errors import AttachError, CheckpointError
from adalora.lora.processes.engines import refuse_strategy
from adalora.registry import attach, controllers
from adalora.report.history import History


class AdaLoraLightning(Callback):
    """Makes the LoRA model inside a LightningModule adaptive: `Trainer(callbacks=[AdaLoraLightning(target_rank=8)])`.

    The exact training state is part of Lightning's checkpoints, from which `trainer.fit(…, ckpt_path=…)` goes on.

    Args:
        config: Settings; or give them as keywords.
        adapter: Adapter to make adaptive; the active one by default.
        history: A `History` or a path for a JSON-lines file; in memory only by default.
        **fields: Fields of `AdaLoraConfig`, instead of `config`.
    """

    def __init__(
        self,
        config: AdaLoraConfig | None = None,
        *,
        adapter: str | None = None,
        history: History | str | None = None,
        **fields: Any,
    ) -> None:
        self.config = AdaLoraConfig.given(config, fields)
        self.adapter = adapter
        self.history = history if isinstance(history, History) else History(history)
        self.controller: RankController | None = None
        self._saved: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach before Lightning loads weights and makes optimizers."""
        if stage != "fit" or self.controller is not None:
            return
        refuse_strategy(trainer.strategy)
        model = _peft_model(pl_module)
        present = controllers(model)
        name = self.adapter or next(iter(present), None)
        self.controller = (present.get(name) if name else None) or attach(
            model, self.config, adapter=self.adapter, history=self.history
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the number of optimizer steps from Lightning, or go on from its checkpoint."""
        controller = self.controller
        assert controller is not None  # Lightning calls setup first
        if self._saved is not None:
            controller.expect_total_steps(int(trainer.estimated_stepping_batches), self._saved)
            controller.load_state_dict(self._saved)
            self._saved = None
        elif trainer.global_step > 0 and controller.step == 0:
            raise CheckpointError(
                "Lightning's checkpoint has no state of adalora: it is of a run without this callback"
            )
        elif controller.step == 0 and not controller.finished:
            controller.set_total_steps(int(trainer.estimated_stepping_batches))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the adapter at its target."""
        if self.controller is not None:
            self.controller.finalize()

    def state_dict(self) -> dict[str, Any]:
        """Asked for by Lightning for every checkpoint."""
        return self.controller.state_dict() if self.controller is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the training starts, when weights and optimizers are loaded."""
        self._saved = state_dict or None


def _peft_model(module: LightningModule) -> nn.Module:
    found = [m for m in module.modules() if hasattr(m, "peft_config") and hasattr(m, "base_model")]
    if not found:
        raise AttachError(
            f"{type(module).__name__} holds no PEFT model: self.model = peft.get_peft_model(model, peft.LoraConfig(…))"
        )
    return found[0]
