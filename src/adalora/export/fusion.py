"""Servers that fuse q, k, v or gate, up into one matrix need the sibling matrices in the file."""

from __future__ import annotations

from collections.abc import Mapping

from adalora.export.base import Base, Site, split_layer


def _sibling(name: str, leaf: str) -> str:
    return f"{name.rsplit('.', 1)[0]}.{leaf}"


def fused_siblings(sites: Mapping[str, Site], base: Base) -> tuple[dict[str, Site], list[str]]:
    """The modules to add with zeros so that fused layers load.

    SGLang concatenates q, k and v of a layer: q needs v, and k or v need q (a missing k it fills in itself);
    up needs gate (a missing up it fills in).

    Args:
        sites: The modules that the adapter will have.
        base: For the shapes of modules that are not among them.

    Returns:
        Modules to add, and a note for each kind whose shape is not known.
    """
    found: dict[str, Site] = {}
    unknown: set[str] = set()
    for name in sites:
        leaf = name.rsplit(".", 1)[-1]
        if split_layer(name) is None or leaf not in ("q_proj", "k_proj", "v_proj", "up_proj"):
            continue
        for wanted in {"q_proj": ("v_proj",), "up_proj": ("gate_proj",)}.get(leaf, ("q_proj", "v_proj")):
            other = _sibling(name, wanted)
            if other in sites or other in found:
                continue
            like = _shape(name, leaf, wanted, sites, base)
            if like is not None:
                found[other] = Site("linear", like.d_out, like.d_in)
            elif not base.known:
                unknown.add(f"{leaf} without {wanted}")
    notes = [f"SGLang cannot load {what}; give --base so that zeros can be added" for what in sorted(unknown)]
    return found, notes


def _shape(name: str, leaf: str, wanted: str, sites: Mapping[str, Site], base: Base) -> Site | None:
    """The site of a sibling: from the base model, or from a module that always has the same shape."""
    other = _sibling(name, wanted)
    if other in base.sites:
        return base.sites[other]
    if base.known:  # the model has no such module: its layers are built otherwise, nothing is fused
        return None
    same = {("up_proj", "gate_proj"): "up_proj", ("k_proj", "v_proj"): "k_proj"}.get((leaf, wanted))
    return sites.get(_sibling(name, same)) if same else None
