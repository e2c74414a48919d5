"""A learning rate of its own for what is trained whole: a new head starts from nothing and bears a higher one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from adalora.errors import RecipeError

# Attribute of modules; PEFT trains a copy of each, which keeps it.
MARK = "adalora_trained_whole"


def mark_whole(model: nn.Module, names: Iterable[str]) -> None:
    """Note which modules are trained whole, before PEFT wraps the model."""
    for name in names:
        setattr(model.get_submodule(name), MARK, True)


def marked_modules(model: nn.Module) -> list[nn.Module]:
    """Those modules, and PEFT's copies of them."""
    return [module for module in model.modules() if getattr(module, MARK, False)]


def whole_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Their parameters that training changes."""
    found = {id(p): p for module in marked_modules(model) for p in module.parameters() if p.requires_grad}
    return list(found.values())


def check_rate(rate: float | None, model: nn.Module) -> float | None:
    """`training.head_learning_rate`, if there is something that it is for.

    Raises:
        RecipeError: Nothing is trained whole.
    """
    if rate is not None and not whole_parameters(model):
        raise RecipeError(
            f"training.head_learning_rate={rate:g}: this model has no new head, and lora.modules_to_save names no "
            "module; leave it out: --set training.head_learning_rate=null"
        )
    return rate


class RecipeTrainer(Trainer):
    """Hugging Face's Trainer, with another peak learning rate for what is trained whole.

    Attributes:
        head_learning_rate: That rate; None for the one that all else has.
    """

    head_learning_rate: float | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The Trainer's, its groups split; the adapter's stay first."""
        known = self.optimizer is not None
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)
        if self.head_learning_rate is not None and not known:
            set_rate(optimizer, whole_parameters(cast(nn.Module, self.model)), self.head_learning_rate)
        return optimizer


def set_rate(optimizer: Optimizer, parameters: list[nn.Parameter], rate: float) -> None:
    """Give some of an optimizer's parameters a learning rate of their own, in groups behind the others."""
    chosen = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in chosen]
        if mine and len(mine) == len(group["params"]):
            group["lr"] = rate
        elif mine:
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            optimizer.add_param_group({**group, "params": mine, "lr": rate})
