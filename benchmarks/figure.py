"""The plot of `overhead.py`'s results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes


def draw(results: dict[str, Any], path: Path) -> None:
    """One panel a question; a part that was not measured leaves its panel empty."""
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    panels = (_counts, _times, _modules, _ranks, _tokens, _growth)
    for axis, panel in zip(axes.flat, panels):
        try:
            panel(axis, results)
        except KeyError as missing:
            axis.set_title(f"not measured: {missing.args[0]}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _counts(axis: Axes, results: dict[str, Any]) -> None:
    found = results["counts"]["MiniLM"]
    bars = {
        "PEFT LoRA": found["lora"]["step"]["total"],
        "PEFT AdaLoRA": found["peft_adalora"]["step"]["total"],
        **{f"ours, {kind}": found["ours"][kind]["total"] for kind in ("warmup", "decrease", "mask", "final")},
    }
    axis.barh(list(bars), list(bars.values()), color=["0.6", "0.6", *["tab:blue"] * 4])
    axis.invert_yaxis()
    axis.set_title("Operations of a step, MiniLM shape")


def _times(axis: Axes, results: dict[str, Any]) -> None:
    entries = {phase: results["phases"][phase]["ours"] for phase in ("warmup", "decrease", "final")}
    entries |= {
        "whole\nrun": results["whole_run"]["ours"],
        "BERT-base\nrun": results["bert_base_run"]["run"]["ours"],
        "PEFT\nAdaLoRA": results["whole_run"]["peft_adalora"],
    }
    _errorbars(axis, entries)
    axis.set_title("Step time ÷ PEFT LoRA's, quartiles", fontsize="medium")
    axis.tick_params(axis="x", labelsize="small")


def _errorbars(axis: Axes, entries: dict[str, dict[str, float]]) -> None:
    middle = [entry["median"] for entry in entries.values()]
    below = [entry["median"] - entry["q25"] for entry in entries.values()]
    above = [entry["q75"] - entry["median"] for entry in entries.values()]
    axis.errorbar(list(entries), middle, yerr=[below, above], fmt="o", capsize=4)
    axis.axhline(1.0, color="0.6", linewidth=1)


def _modules(axis: Axes, results: dict[str, Any]) -> None:
    found = results["modules"]
    count = [int(key) for key in found]
    for kind in ("ordinary", "mask"):
        shares = [100 * entry["ms"][kind] / entry["step_ms"] for entry in found.values()]
        axis.plot(count, shares, marker="o", label=f"{kind} step")
    axis.axhline(1.0, color="0.6", linewidth=1)
    axis.set_xscale("log")
    axis.set_xticks(count, [str(n) for n in count], minor=False)
    axis.minorticks_off()
    axis.set(xlabel="modules", title="Controller's share of a step, %, decrease", ylim=(0, None))
    axis.legend()


def _ranks(axis: Axes, results: dict[str, Any]) -> None:
    _errorbars(axis, results["ranks"])
    axis.set(xlabel="target rank", title="Step time ÷ PEFT LoRA's, decrease phase")


def _tokens(axis: Axes, results: dict[str, Any]) -> None:
    _errorbars(axis, results["tokens"])
    axis.set(xlabel="tokens a step", title="Step time ÷ PEFT LoRA's, decrease phase")


def _growth(axis: Axes, results: dict[str, Any]) -> None:
    found = results["counts"]["growth"]
    for kind in ("decrease", "mask", "final"):
        axis.plot(
            [int(key) for key in found], [entry[kind]["allocation"] for entry in found.values()], "o-", label=kind
        )
    axis.set(xlabel="modules", title="Operations of the controller, narrow MiniLM", ylim=(0, None))
    axis.legend()
