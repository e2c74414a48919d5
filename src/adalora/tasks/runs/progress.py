"""What a person sees while a run trains and when it is done."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from adalora.controller import RankController
from adalora.integrations.trainer import AdaLoraCallback

PLAIN_LINES = 20  # lines a run prints where there is no terminal


class ProgressBar(TrainerCallback):
    """Progress with loss, phase, live triplets against the budget, time left; plain lines without a terminal."""

    def __init__(self, console: Console, adaptive: AdaLoraCallback | None) -> None:
        self.console = console
        self.adaptive = adaptive
        self.loss: float | None = None
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        if not (state.is_world_process_zero and self.console.is_terminal):
            return
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.progress.start()
        self.task = self.progress.add_task("train", total=state.max_steps, state="")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the newest loss."""
        self.loss = (kwargs.get("logs") or {}).get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar, or print a line now and then."""
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step, state=self._state())
        elif state.is_world_process_zero and state.global_step % max(1, state.max_steps // PLAIN_LINES) == 0:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {self._state()}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self.progress is not None:
            self.progress.stop()

    def _state(self) -> str:
        parts = [f"loss {self.loss:.3f}"] if self.loss is not None else []
        controller = self.adaptive.controller if self.adaptive is not None else None
        if controller is not None:
            parts.append(f"{controller.phase}  triplets {controller.live} of budget {controller.budget}")
        return "  ".join(parts)


def show_result(console: Console, metrics: dict[str, Any], files: dict[str, str]) -> None:
    """The table at the end of a run."""
    table = Table(title=f"{metrics['name']}: {metrics['evaluated_on']}", show_header=False, title_justify="left")
    for key, value in metrics["scores"].items():
        table.add_row(key.replace("_", " "), f"{value:.4f}")
    before, after = metrics["trainable_parameters_before"], metrics["trainable_parameters_after"]
    table.add_row("trainable parameters", f"{before:,} → {after:,}")
    table.add_row("adapter parameters", f"{metrics['adapter_parameters']:,}")
    if "ranks" in metrics:
        table.add_row(
            "triplets",
            f"{metrics['initial_rank_total']} → {metrics['final_rank_total']} (target {metrics['target_rank_total']})",
        )
        ordered = sorted(metrics["ranks"].items(), key=lambda item: item[1])
        table.add_section()
        for title, part in (("most rank", ordered[::-1][:5]), ("least rank", ordered[:5])):
            for number, (name, rank) in enumerate(part):
                table.add_row(title if number == 0 else "", f"{rank:3d}  {name}")
    if "published" in metrics:
        _add_published(table, metrics["scores"], metrics["published"])
    table.add_section()
    for what, path in files.items():
        table.add_row(what, path)
    table.add_row("seconds", f"{metrics['seconds']:.0f}")
    console.print(table)


def _add_published(table: Table, scores: dict[str, float], published: dict[str, Any]) -> None:
    """What others reported for this recipe, beside what this run reached."""
    table.add_section()
    for name, value in published["metrics"].items():
        words = f"published {value:.4f}"
        if name in published["lora"]:
            words += f", LoRA {published['lora'][name]:.4f}"
        if name in scores:
            words += f"; this run {scores[name]:.4f} ({scores[name] - value:+.4f})"
        table.add_row(name.replace("_", " "), words)
    table.add_row("", published["source"])


def ranks_of(controller: RankController) -> dict[str, Any]:
    """The rank part of `metrics.json`."""
    return {
        "initial_rank_total": controller.initial_budget,
        "final_rank_total": controller.live,
        "target_rank_total": controller.target_budget,
        "ranks": controller.ranks,
    }
