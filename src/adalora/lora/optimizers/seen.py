"""What a controller needs of the optimizers that train its adapter, be it one or several."""

from __future__ import annotations

import weakref
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer


class Optimizers:
    """The optimizers seen to train an adapter; all are held weakly.

    One of them leads: its steps are the run's. Where P and Q sit in different optimizers the one that steps last in
    each round does, so that the others' updates are made by then.
    """

    def __init__(self) -> None:
        self._seen: list[weakref.ref[Optimizer]] = []

    @property
    def alive(self) -> list[Optimizer]:
        """The optimizers that still exist, the leading one last."""
        return [o for o in (ref() for ref in self._seen) if o is not None]

    @property
    def joined(self) -> Optimizer | None:
        """All of them as one: the optimizer itself, or a view with their groups and states. None if none was seen."""
        alive = self.alive
        if len(alive) <= 1:
            return alive[0] if alive else None
        return cast(Optimizer, _Joined(alive))

    def knows(self, optimizer: Optimizer) -> bool:
        """Whether it was seen before."""
        return any(o is optimizer for o in self.alive)

    def partner(self, optimizer: Optimizer) -> bool:
        """Whether its steps do not count: another one's are the run's."""
        return self.knows(optimizer) and self.alive[-1] is not optimizer

    def counts(self, optimizer: Optimizer) -> bool:
        """Whether this step of an optimizer is a step of the run; takes a new one in.

        A new optimizer that shares no parameter with the others is their partner, stepping after one that has counted
        for this round already; one that does replaces them.
        """
        if self.knows(optimizer):
            return not self.partner(optimizer)
        alive = self.alive
        partner = bool(alive) and not any(_ids(o) & _ids(optimizer) for o in alive)
        self._seen = [*(self._seen if partner else []), weakref.ref(optimizer)]
        return not partner


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


class _Joined:
    """Groups and states of several optimizers, as compaction and the hand-over use them."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.param_groups = [group for o in optimizers for group in o.param_groups]
        self.state = _JoinedState(optimizers)


class _JoinedState:
    def __init__(self, optimizers: list[Optimizer]) -> None:
        self._states = [o.state for o in optimizers]

    def get(self, parameter: nn.Parameter, default: Any = None) -> Any:
        return next((state[parameter] for state in self._states if parameter in state), default)

    def __getitem__(self, parameter: nn.Parameter) -> Any:
        return next(state[parameter] for state in self._states if parameter in state)

    def __setitem__(self, parameter: nn.Parameter, value: Any) -> None:
        next(state for state in self._states if parameter in state)[parameter] = value

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return any(parameter in state for state in self._states)

    def pop(self, parameter: nn.Parameter, default: Any = None) -> Any:
        return next((state.pop(parameter) for state in self._states if parameter in state), default)


def loss_scale(optimizer: Optimizer) -> float:
    """What a GradScaler has multiplied the gradients with, where the optimizer itself divides by it (fused)."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def overflowed(optimizer: Optimizer) -> bool:
    """Whether the optimizer is about to leave this step out, or has: a GradScaler found an infinity."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
