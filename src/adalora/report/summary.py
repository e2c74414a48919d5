"""What a run did, in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pandas as pd

from adalora.report.frames import metrics_frame, model_name, modules_frame, start_of, steps_frame
from adalora.report.history import History, Record
from adalora.report.modules import family

# Called even when fewer of the final triplets than this share sit elsewhere than an even split puts them.
EVEN_SHARE = 0.1
LOWER_IS_BETTER = ("loss", "error", "perplexity", "mae", "mse", "rmse", "nll", "wer", "cer")


@dataclass(frozen=True)
class Block:
    """Module types in a range of neighbouring layers, and the triplets it has beyond an even split."""

    types: tuple[str, ...]
    rows: tuple[str, ...]
    triplets: float


def summarize(history: History, findings: Sequence[Record] | None = None) -> list[str]:
    """Sentences about one run: size, where the rank went, loss, metrics, parameters, findings.

    Args:
        history: A run, finished or not.
        findings: What the diagnostics say; the history's `diagnostic` records if None.

    Returns:
        Sentences, most important first.
    """
    modules = modules_frame(history)
    sentences = [_size(history, modules), *_movement(modules), _needless(modules)]
    sentences += [
        _parameters(history, modules),
        _loss(history),
        _metrics(history),
        _findings(history.of("diagnostic") if findings is None else findings),
        _state(history),
    ]
    return [s for s in sentences if s]


def strongest_block(modules: pd.DataFrame, *, gain: bool) -> Block | None:
    """The types × layers rectangle that gained (or lost) most triplets against an even split.

    The split would leave every module the same share of its initial rank. A cell counts only for what it
    has beyond half a standard deviation, which keeps the rectangle to what stands out.

    Args:
        modules: `modules_frame` of a run.
        gain: Look for the gain, else for the loss.
    """
    total, first = modules["rank"].sum(), modules["initial_rank"].sum()
    if not total or len(modules) < 2:
        return None
    moved = modules["rank"] - modules["initial_rank"] * (total / first)
    table = modules.assign(moved=moved if gain else -moved)
    grid = table.pivot_table(index="row", columns="type", values="moved", aggfunc="sum", sort=False)
    grid = grid.reindex(index=list(dict.fromkeys(modules["row"])))
    stacks = table.drop_duplicates("row").set_index("row").loc[grid.index, ["stack", "layer"]]
    values = grid.to_numpy()
    margin = 0.5 * float(np.nanstd(values))
    above = np.nan_to_num(values - margin)
    best, best_at = 0.0, None
    kinds = [(stack, pd.isna(layer)) for stack, layer in zip(stacks["stack"], stacks["layer"])]
    for low, high in _ranges(kinds):
        sums = above[low : high + 1].sum(axis=0)
        if sums[sums > 0].sum() > best:
            best, best_at = float(sums[sums > 0].sum()), (low, high, sums > 0)
    if best_at is None:
        return None
    low, high, chosen = best_at
    triplets = float(np.nansum(values[low : high + 1][:, chosen]))
    return Block(tuple(grid.columns[chosen]), tuple(grid.index[low : high + 1]), triplets)


def _ranges(kinds: Sequence[tuple[str, bool]]) -> list[tuple[int, int]]:
    """All ranges of rows within one stack."""
    ranges, at = [], 0
    for _, rows in groupby(kinds):
        length = len(list(rows))
        ranges += [(at + i, at + j) for i in range(length) for j in range(i, length)]
        at += length
    return ranges


def describe(block: Block, *, all_rows: int) -> str:
    """A block in words: `query and key of layers 0-3`."""
    families = list(dict.fromkeys(family(t) for t in block.types))
    words = _listed([f"the {w}" if w == "feed-forward" else w for w in families])
    if len(block.rows) == all_rows and all_rows > 1:
        return f"{words} of all layers"
    first, last = block.rows[0], block.rows[-1]
    if not first[-1:].isdigit():
        return f"{words} outside the layers"
    if first == last:
        return f"{words} of layer {first}"
    stack, _, low = first.rpartition(" ")
    return f"{words} of {stack + ' ' if stack else ''}layers {low}–{last.rpartition(' ')[2]}"


def _size(history: History, modules: pd.DataFrame) -> str:
    name, total = model_name(history), int(modules["rank"].sum())
    first = int(modules["initial_rank"].sum())
    if total == first:
        return f"{len(modules)} modules of {name} hold {_n(total)} triplets, as at the start."
    return (
        f"{len(modules)} modules of {name} went from {_n(first)} to {_n(total)} triplets "
        f"(rank {first / len(modules):.3g} to {total / len(modules):.3g} on average, "
        f"single modules {modules['rank'].min()} to {modules['rank'].max()})."
    )


def _movement(modules: pd.DataFrame) -> list[str]:
    total, first = modules["rank"].sum(), modules["initial_rank"].sum()
    if total == first or not total:
        return []
    excess = (modules["rank"] - modules["initial_rank"] * (total / first)).clip(lower=0).sum()
    if excess < EVEN_SHARE * total:
        return ["The rank stayed nearly even: every module kept about the same share."]
    gained, lost = strongest_block(modules, gain=True), strongest_block(modules, gain=False)
    if gained is None or lost is None:
        return []
    rows = modules["row"].nunique()
    return [
        f"Rank moved from {describe(lost, all_rows=rows)} to {describe(gained, all_rows=rows)}: "
        f"{_n(round(excess))} of {_n(int(total))} triplets ({excess / total:.0%}) "
        "sit elsewhere than an even split puts them."
    ]


def _needless(modules: pd.DataFrame) -> str:
    empty = modules[modules["rank"] == 0]
    if empty.empty:
        return ""
    names = [f"{family(t)} of {'layer ' if r[-1:].isdigit() else ''}{r}" for t, r in zip(empty["type"], empty["row"])]
    some = _listed(names[:4]) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
    need = "module needs" if len(empty) == 1 else "modules need"
    return f"{len(empty)} {need} no rank at all: {some}."


def _parameters(history: History, modules: pd.DataFrame) -> str:
    before, after = int(modules["initial_parameters"].sum()), int(modules["parameters"].sum())
    done = history.last("compaction")
    size = f", {done['bytes_after'] / 2**20:.2f} MiB" if done and done.get("bytes_after") else ""
    if before == after:
        return f"Adapter: {_n(after)} parameters."
    gone = "The pruned triplets are physically gone" if done else "The pruned triplets are masked, not yet removed"
    return f"Adapter: {_n(before)} to {_n(after)} parameters ({after / before - 1:+.0%}){size}. {gone}."


def _loss(history: History) -> str:
    loss = steps_frame(history)["loss"].dropna()
    if len(loss) < 4:
        return ""
    part = max(1, len(loss) // 20)
    first, last = loss.iloc[:part].mean(), loss.iloc[-part:].mean()
    verb = "fell" if last < first else "rose"
    over = f"means of the first and last {part} recorded steps"
    return f"Training loss {verb} from {first:.3g} to {last:.3g} ({over})."


def _metrics(history: History) -> str:
    parts = []
    for (metric, split), rows in metrics_frame(history).groupby(["metric", "split"], sort=False):
        last = rows.iloc[-1]
        where = f" on {split}" if split else ""
        text = f"{metric}{where} {last['value']:.4g} at step {last['step']:,}"
        if len(rows) > 1:
            lower = any(word in str(metric).lower() for word in LOWER_IS_BETTER)
            best = rows.iloc[rows["value"].argmin() if lower else rows["value"].argmax()]
            if best["step"] != last["step"]:
                text += f" ({'lowest' if lower else 'highest'} {best['value']:.4g} at step {best['step']:,})"
        parts.append(text)
    return f"Newest metrics: {'; '.join(parts[:4])}." if parts else ""


def _findings(findings: Sequence[Record]) -> str:
    codes = list(dict.fromkeys(r["code"] for r in findings))
    if not codes:
        return ""
    return f"{len(codes)} {'finding needs' if len(codes) == 1 else 'findings need'} a look: {', '.join(codes)}."


def _state(history: History) -> str:
    if history.last("finish"):
        return ""
    total = start_of(history).get("total_steps")
    done = max((r["step"] for r in history if "step" in r), default=0)
    return f"The run is not finished: its newest record is of step {done:,} of {total:,}." if total else ""


def _listed(words: Sequence[str]) -> str:
    if len(words) <= 1:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _n(value: int | float) -> str:
    return f"{value:,.0f}"
