"""What `adalora watch` draws: one frame or one line of a run, from its newest records."""

from __future__ import annotations

import datetime
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from adalora.report.frames import RANK_EVENTS
from adalora.report.history import Record
from adalora.report.modules import place_modules
from adalora.report.style import CMAP

PHASE_WORDS = {"warmup": "warm-up", "decrease": "budget shrinks", "final": "final ranks"}
SHADES = " ░▒▓█"  # also told apart where there is no colour
_LOSS_SMOOTHING = 0.1


class WatchState:
    """The newest of everything, in little memory however long the run is."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the run."""
        self.start: Record = {}
        self.step: Record = {}
        self.ranks: list[int] = []
        self.loss: float | None = None
        self.lowest: float | None = None
        self.metrics: dict[str, Any] = {}
        self.findings: list[Record] = []
        self.finished = False
        self.places = pd.DataFrame()

    def update(self, record: Record) -> None:
        """Take one record."""
        event = record["event"]
        if event == "start":
            self.clear()
            self.start = record
            self.ranks = [m["rank"] for m in record["modules"]]
            places = place_modules([m["name"] for m in record["modules"]])
            self.places = pd.DataFrame({"row": [p.row for p in places], "type": [p.type for p in places]})
        if event in ("step", "allocation"):
            self.step = {**self.step, **record}
        if event in RANK_EVENTS and record.get("ranks"):
            self.ranks = record["ranks"]
        if event == "metric":
            self.metrics.update({f"{record.get('split', '')} {k}".strip(): v for k, v in record["values"].items()})
        if event == "diagnostic":
            self.findings.append(record)
        if event == "finish":
            self.finished = True
            self.step = {**self.step, "step": record["step"], "seconds": record.get("seconds")}
        if event == "step" and record.get("loss") is not None:
            new = record["loss"]
            self.loss = new if self.loss is None else self.loss + _LOSS_SMOOTHING * (new - self.loss)
            self.lowest = self.loss if self.lowest is None else min(self.lowest, self.loss)

    @property
    def done(self) -> int:
        """Optimizer steps made."""
        step = self.step.get("step")
        return 0 if step is None else int(step) + (not self.finished)

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the pace so far."""
        since, now = self.start.get("seconds") or 0.0, self.step.get("seconds")
        if self.finished or now is None or not self.done:
            return None
        return float((now - since) / self.done * max(self.start["total_steps"] - self.done, 0))


def plain_line(state: WatchState) -> str:
    """The run in one line, for logs and pipes."""
    if not state.start:
        return "waiting for the run to start"
    parts = [
        f"step {state.done:,}/{state.start['total_steps']:,}",
        "finished" if state.finished else PHASE_WORDS.get(state.step.get("phase", ""), "starting"),
        f"budget {state.step.get('budget', state.start['initial_budget']):,}",
        f"live {sum(state.ranks):,}",
    ]
    if state.loss is not None:
        parts.append(f"loss {state.loss:.4g}")
    parts += [f"{name} {value:.4g}" for name, value in state.metrics.items() if isinstance(value, int | float)]
    if (left := state.seconds_left) is not None:
        parts.append(f"{_clock(left)} left")
    parts += [f"! {f['code']}" for f in state.findings]
    return " | ".join(parts)


def frame(state: WatchState, *, width: int) -> RenderableType:
    """The run as one picture: progress, budget, loss, heatmap in blocks, findings.

    Args:
        state: The newest records.
        width: Columns of the terminal.
    """
    if not state.start:
        return Text("waiting for the run to start …", style="dim")
    parts: list[RenderableType] = [_bars(state), _numbers(state), heatmap(state, width=width)]
    for finding in state.findings:
        parts.append(Text(f"! {finding['code']}: {finding['message']}", style="yellow"))
        if finding.get("cure"):
            parts.append(Text(f"  {finding['cure']}", style="dim"))
    return Group(*parts)


def _bars(state: WatchState) -> Table:
    total, done = state.start["total_steps"], state.done
    live, first = sum(state.ranks), state.start["initial_budget"]
    budget = state.step.get("budget", first)
    phase = "finished" if state.finished else PHASE_WORDS.get(state.step.get("phase", ""), "starting")
    left = state.seconds_left
    table = Table.grid(padding=(0, 1))
    table.add_row("steps", ProgressBar(total=total, completed=done, width=24), f"{done:,}/{total:,}", phase)
    table.add_row(
        "live", ProgressBar(total=first, completed=live, width=24), f"{live:,}/{first:,}",
        f"budget {budget:,}, target {state.start['target_budget']:,}",
    )  # fmt: skip
    if left is not None:
        table.add_row("left", "", _clock(left))
    return table


def _numbers(state: WatchState) -> Text:
    parts = []
    if state.loss is not None:
        parts.append(f"loss {state.loss:.4g} (smoothed; lowest {state.lowest:.4g})")
    parts += [f"{name} {value:.4g}" for name, value in state.metrics.items() if isinstance(value, int | float)]
    return Text("   ".join(parts) or "no loss recorded yet", style="" if parts else "dim")


def heatmap(state: WatchState, *, width: int) -> Table:
    """Ranks as blocks: a line per module type, a column per layer; neighbours share a column if need be."""
    grid = state.places.assign(rank=state.ranks).pivot_table(
        index="type", columns="row", values="rank", aggfunc="sum", sort=False
    )
    grid = grid.reindex(
        index=list(dict.fromkeys(state.places["type"])), columns=list(dict.fromkeys(state.places["row"]))
    )
    label = min(max(len(t) for t in grid.index), max(width // 3, 8))
    room = max(width - label - 8, 8)
    groups = np.array_split(np.arange(grid.shape[1]), min(grid.shape[1], room))
    wide = next((w for w in (3, 2, 1) if w * len(groups) <= room), 1)
    first = [m["rank"] for m in state.start["modules"]]
    top = max(state.places.assign(rank=first).groupby(["type", "row"])["rank"].sum().max(), 1)
    table = Table.grid(padding=(0, 1))
    table.add_row(
        Text("layers", style="dim"),
        Text(_ends(grid.columns, wide * len(groups)), style="dim"),
        Text("Σ", style="dim"),
    )
    for kind, values in zip(grid.index, grid.to_numpy(dtype=float)):
        cells = Text()
        for group in groups:
            present = values[group][np.isfinite(values[group])]
            cells.append_text(_cell(float(present.mean()) if len(present) else None, top, wide))
        name = str(kind) if len(str(kind)) <= label else "…" + str(kind)[1 - label :]
        table.add_row(name, cells, f"{np.nansum(values):,.0f}")
    return table


def _cell(rank: float | None, top: float, wide: int) -> Text:
    if rank is None:
        return Text("·".center(wide), style="dim")
    red, green, blue, _ = (round(255 * c) for c in mpl.colormaps[CMAP](min(rank / top, 1.0)))
    colour = f"rgb({red},{green},{blue})"
    if wide == 3 and rank < 100:
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 120 else "white"
        return Text(f"{rank:.0f}".center(3), style=f"{ink} on {colour}")
    return Text(SHADES[min(int(np.ceil(4 * rank / top)), 4)] * wide, style=colour)


def _ends(columns: pd.Index, wide: int) -> str:
    """First and last layer over the ends of the heatmap."""
    first, last = str(columns[0]), str(columns[-1])
    if len(columns) == 1 or len(first) + len(last) >= wide:
        return first
    return first + last.rjust(wide - len(first))


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
