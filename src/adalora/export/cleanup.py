"""Exact re-orthonormalisation of triplets, and truncation by energy or budget with its error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter, Factor, norm

# Far below the rounding of float32 (6e-8), far above that of the float64 in which the SVD is computed.
NOISE = 1e-9


def clean_factor(factor: Factor) -> Factor:
    """Orthonormal P and Q, λ in falling order, and only triplets that are not rounding noise.

    Of a convolution with groups each group gets its own singular vectors; λ of the k-th ones together is their norm,
    so that λ² is their energy, and P holds each group's share.
    """
    groups = factor.svd()
    if len(groups) == 1:
        U, S, Vh = groups[0]
    else:
        S_gk = torch.stack([S for _, S, _ in groups])
        S = S_gk.norm(dim=0)
        share_gk = S_gk / S.clamp_min(torch.finfo(S.dtype).tiny)
        U = torch.cat([U * share for (U, _, _), share in zip(groups, share_gk)])
        Vh = torch.cat([Vh for _, _, Vh in groups], dim=1)
    live = torch.gt(S, S[:1] * NOISE)  # [k]; S falls, so S[:1] is the largest or empty
    return replace(factor, left=U[:, live].contiguous(), values=S[live], right=Vh[live].contiguous())


def clean(adapter: Adapter) -> Adapter:
    """Re-orthonormalise every module exactly: ΔW stays, P and Q become orthonormal, λ sorted.

    Args:
        adapter: Any adapter.

    Returns:
        The same ΔW with the smallest rank that holds it; a module whose ΔW is 0 gets rank 0.
    """
    return adapter.replace({name: clean_factor(f) for name, f in adapter.factors.items()})


@dataclass(frozen=True)
class Truncation:
    """What a truncation kept and what it costs.

    Attributes:
        adapter: The smaller adapter.
        kept_energy: Σσ² kept / Σσ² before, of all ΔW together.
        errors: Module name -> ‖ΔW after − ΔW‖ / ‖ΔW‖.
        parameters_before: LoRA parameters before.
        parameters_after: LoRA parameters after.
    """

    adapter: Adapter
    kept_energy: float
    errors: Mapping[str, float]
    parameters_before: int
    parameters_after: int

    @property
    def error(self) -> float:
        """‖ΔW after − ΔW‖ / ‖ΔW‖ over all modules together."""
        return math.sqrt(max(0.0, 1.0 - self.kept_energy))


def _order(factors: Mapping[str, Factor], scores: Mapping[str, Tensor]) -> list[tuple[float, int, str, int]]:
    """(−score per parameter, index of module, name, triplet), best first; ties by the order of the file."""
    ranked = []
    for index, (name, f) in enumerate(factors.items()):
        cost = f.d_out + f.d_in
        ranked += [(-float(s) / cost, index, name, i) for i, s in enumerate(scores[name].tolist())]
    return sorted(ranked, key=lambda row: (row[0], row[1], row[3]))


def energies(adapter: Adapter) -> dict[str, Tensor]:
    """σ² of each triplet of a cleaned adapter, [r] in falling order, by module."""
    return {name: f.values.double() ** 2 for name, f in adapter.factors.items()}


def keep_by_energy(adapter: Adapter, share: float) -> dict[str, list[int]]:
    """The triplets that keep `share` of all energy: best energy per parameter first.

    Args:
        adapter: A cleaned adapter.
        share: In (0, 1].

    Raises:
        AdapterFileError: `share` is out of range.
    """
    if not 0 < share <= 1:
        raise AdapterFileError(f"energy {share}; a share above 0 and up to 1 is wanted")
    scores = energies(adapter)
    total = sum(float(s.sum()) for s in scores.values())
    kept: dict[str, list[int]] = {name: [] for name in adapter.factors}
    held = 0.0
    for _, _, name, i in _order(adapter.factors, scores):
        if total == 0 or held >= share * total * (1 - 1e-12):
            break
        kept[name].append(i)
        held += float(scores[name][i])
    return kept


def keep_by_budget(adapter: Adapter, parameters: int, scores: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The best triplets by score per parameter that fit into a number of parameters.

    Args:
        adapter: A cleaned adapter.
        parameters: The most LoRA parameters to keep.
        scores: [r] for each module, larger is better.
    """
    kept: dict[str, list[int]] = {name: [] for name in adapter.factors}
    left = parameters
    for _, _, name, i in _order(adapter.factors, scores):
        f = adapter.factors[name]
        if f.d_out + f.d_in <= left:
            kept[name].append(i)
            left -= f.d_out + f.d_in
    return kept


def select(adapter: Adapter, kept: Mapping[str, list[int]], *, before: int | None = None) -> Truncation:
    """Keep the named triplets of a cleaned adapter.

    Args:
        adapter: A cleaned adapter.
        kept: Module name -> indices of its triplets.
        before: LoRA parameters to report as the size before; the cleaned adapter's by default.
    """
    factors, errors = {}, {}
    total = held = 0.0
    for name, f in adapter.factors.items():
        index = torch.tensor(sorted(kept.get(name, [])), dtype=torch.long)
        factors[name] = replace(f, left=f.left[:, index], values=f.values[index], right=f.right[index])
        all_energy = float((f.values.double() ** 2).sum())
        kept_energy = float((f.values.double()[index] ** 2).sum())
        errors[name] = math.sqrt(max(0.0, 1 - kept_energy / all_energy)) if all_energy else 0.0
        total, held = total + all_energy, held + kept_energy
    smaller = adapter.replace(factors)
    return Truncation(
        smaller,
        held / total if total else 1.0,
        errors,
        adapter.parameters if before is None else before,
        smaller.parameters,
    )


def budget_parameters(adapter: Adapter, budget: float) -> int:
    """Parameters that a budget means: a share of the adapter's up to 1, else a number of parameters.

    Raises:
        AdapterFileError: Not above 0, or so small that nothing is left.
    """
    if not budget > 0 or not math.isfinite(budget):
        raise AdapterFileError(f"budget {budget}; a share such as 0.5 or a number of parameters is wanted")
    wanted = int(adapter.parameters * budget + 1e-9) if budget <= 1 else int(budget)
    least = min((f.d_out + f.d_in for f in adapter.factors.values()), default=0)
    if wanted < least:
        raise AdapterFileError(f"budget of {wanted} parameters keeps nothing; one triplet costs at least {least}")
    return wanted


def truncate(
    adapter: Adapter,
    *,
    energy: float | None = None,
    budget: float | None = None,
    scores: Mapping[str, Tensor] | None = None,
) -> Truncation:
    """Clean an adapter and cut it by energy or to a budget, across all its matrices.

    Args:
        adapter: Any adapter.
        energy: Share of Σσ² to keep.
        budget: Share of the adapter's LoRA parameters (up to 1), or a number of parameters.
        scores: With a budget: what to rank triplets by, [r] by module of `clean(adapter)`; σ² by default.

    Raises:
        AdapterFileError: A value is out of range, or both are given.
    """
    if energy is not None and budget is not None:
        raise AdapterFileError("give energy or budget, not both")
    cleaned = clean(adapter)
    if energy is not None:
        kept = keep_by_energy(cleaned, energy)
    elif budget is not None:
        wanted = budget_parameters(adapter, budget)
        kept = keep_by_budget(cleaned, wanted, scores or energies(cleaned))
    else:
        kept = {name: list(range(f.rank)) for name, f in cleaned.factors.items()}
    return select(cleaned, kept, before=adapter.parameters)


def module_norms(adapter: Adapter) -> dict[str, float]:
    """‖ΔW‖ of each module, without forming any ΔW."""
    return {name: norm(*f.product()) for name, f in adapter.factors.items()}
