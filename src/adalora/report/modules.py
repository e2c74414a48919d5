"""Where a module sits: which stack, which layer, which type. Read from its dotted name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_WRAPPERS = ("base_model.", "model.", "module.", "transformer.")
OUTSIDE = "other"

_QUERY = {"query", "q_proj", "q", "q_lin", "wq", "to_q", "query_proj"}
_KEY = {"key", "k_proj", "k", "k_lin", "wk", "to_k", "key_proj"}
_VALUE = {"value", "v_proj", "v", "v_lin", "wv", "to_v", "value_proj"}
_OUTPUT = {"o_proj", "out_proj", "out_lin", "o", "to_out", "attention.output.dense", "attn.c_proj"}
_FUSED = {"c_attn", "query_key_value", "qkv", "qkv_proj", "Wqkv", "in_proj"}
_FEED_FORWARD = {
    "intermediate.dense", "output.dense", "fc1", "fc2", "lin1", "lin2", "linear1", "linear2", "c_fc",
    "mlp.c_proj", "up_proj", "down_proj", "gate_proj", "gate_up_proj", "wi", "wi_0", "wi_1", "wo",
    "w1", "w2", "w3", "dense_h_to_4h", "dense_4h_to_h",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Place of one module in the model.

    Attributes:
        name: Full dotted name.
        stack: What precedes the layer number, e.g. `encoder`; empty where the model has one stack only.
        layer: Number of the layer, or None outside the layers.
        type: Shortest name that tells this module type from the others, `*` for further numbers (experts).
    """

    name: str
    stack: str
    layer: int | None
    type: str

    @property
    def row(self) -> str:
        """Label of the module's row in a layer × type table."""
        if self.layer is None:
            return self.stack or OUTSIDE
        return f"{self.stack} {self.layer}".strip()


def place_modules(names: Sequence[str]) -> list[Place]:
    """Split module names into stack, layer and type, with the shortest unambiguous labels.

    Args:
        names: Dotted module names, as in `start.modules`.

    Returns:
        One place per name, in the same order.
    """
    split = [_split(name) for name in names]
    types = _shortest_suffixes([s[2] for s in split])
    stacks = _stack_labels([s[0] for s in split if s[1] is not None])
    return [
        Place(name, stacks.get(stack, "") if layer is not None else "", layer, types[kind])
        for name, (stack, layer, kind) in zip(names, split)
    ]


def family(type_label: str) -> str:
    """Name a person would use for a module type: `query`, `feed-forward`, …; else the label itself."""
    tail = type_label.rsplit(".", 1)[-1]
    for names, word in (
        (_QUERY, "query"),
        (_KEY, "key"),
        (_VALUE, "value"),
        (_OUTPUT, "attention output"),
        (_FUSED, "fused query/key/value"),
        (_FEED_FORWARD, "feed-forward"),
    ):
        if type_label in names or tail in names:
            return word
    return type_label


def _split(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None or at == len(parts) - 1:
        return "", None, re.sub(r"\.\d+$", "", _unwrapped(name))
    kind = ".".join("*" if part.isdigit() else part for part in parts[at + 1 :])
    return ".".join(parts[:at]), int(parts[at]), kind


def _unwrapped(name: str) -> str:
    while True:
        shorter = next((name[len(w) :] for w in _WRAPPERS if name.startswith(w)), name)
        if shorter == name:
            return name
        name = shorter


def _shortest_suffixes(kinds: Sequence[str]) -> dict[str, str]:
    """For each distinct dotted name its shortest ending that no other one shares."""
    distinct = list(dict.fromkeys(kinds))
    labels = {}
    for kind in distinct:
        parts = kind.split(".")
        for length in range(1, len(parts) + 1):
            ending = parts[-length:]
            if ending == ["dense"] and length < len(parts):  # says nothing on its own
                continue
            if sum(other.split(".")[-length:] == ending for other in distinct) == 1 or length == len(parts):
                labels[kind] = ".".join(ending)
                break
    return labels


def _stack_labels(stacks: Sequence[str]) -> dict[str, str]:
    """For each stack the part of its dotted name that tells it from the others; nothing if it is alone."""
    distinct = list(dict.fromkeys(stacks))
    if len(distinct) <= 1:
        return dict.fromkeys(distinct, "")
    shared = Counter(part for stack in distinct for part in set(stack.split(".")))
    labels = {}
    for stack in distinct:
        own = [part for part in stack.split(".") if shared[part] < len(distinct)]
        labels[stack] = ".".join(own) or stack
    return labels
