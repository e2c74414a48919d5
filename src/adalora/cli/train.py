"""`adalora train`, `adalora demo`, `adalora recipes`, `adalora init`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

DEMO_RECIPE = "airline-sentiment"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("demo")(demo)
    app.command("train")(train)
    app.command("recipes")(recipes)
    app.command("init")(init)


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a name from `adalora recipes`.")],
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Override a field: --set training.learning_rate=1e-3")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train anew where the folder holds a run.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
) -> None:
    """Train a recipe."""
    from adalora.tasks.recipe.files import load_recipe

    _run(load_recipe(recipe, overrides=change or []), overwrite=overwrite, resume=resume)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/demo"),
    predict: Annotated[str | None, typer.Option("--predict", help="Answer with the trained adapter.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train again where the folder holds a run.")] = False,
) -> None:
    """Fine-tune MiniLM on airline tweets (about four minutes on two cores), or answer with what was trained."""
    from rich.console import Console

    from adalora.tasks.recipe.files import load_recipe

    if predict is not None:
        _answer(out, predict)
        return
    if not overwrite and (metrics := _finished(out)) is not None:
        from adalora.tasks.runs.outputs import written
        from adalora.tasks.runs.progress import show_result

        show_result(Console(), metrics, written(out))
        typer.echo(f"{out} was trained before; to train again: adalora demo --out {out} --overwrite")
        return
    _run(load_recipe(DEMO_RECIPE, overrides=[f"output={json.dumps(str(out))}"]), overwrite=overwrite)
    typer.echo(f'try it: adalora demo --out {out} --predict "my bag is lost again"')


def recipes() -> None:
    """List the recipes that come with the package: train NAME, or NAME:VARIANT."""
    from rich.console import Console
    from rich.table import Column, Table

    from adalora.tasks.recipe.files import catalogue

    entries = catalogue()
    variants: dict[str, list[str]] = {}
    for entry in entries:
        name, _, variant = entry.name.partition(":")
        variants.setdefault(name, []).extend([variant] if variant else [])
    console = Console()
    wide = console.width >= 130
    table = Table(Column("name", no_wrap=True), "variants", "task", *(["model"] if wide else []), "description")
    for entry in entries:
        if entry.name in variants:
            model = [entry.model] if wide else []
            table.add_row(entry.name, "\n".join(variants[entry.name]), entry.task, *model, entry.description)
    console.print(table)
    console.print("adalora train NAME, or NAME:VARIANT", style="dim", highlight=False)


def init(
    out: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Ask a few questions and write a recipe."""
    from rich.prompt import IntPrompt, Prompt

    from adalora.errors import RecipeError
    from adalora.tasks import wizard
    from adalora.tasks.recipe.options import task_names
    from adalora.tasks.runs.outputs import write_text

    if out.exists() and not overwrite:
        raise RecipeError(f"{out} exists; choose another name or add --overwrite")
    task = Prompt.ask("Task", choices=task_names(), default="classification")
    model = Prompt.ask("Base model (hub name or folder)")
    data = Prompt.ask("Data (file, built-in set, or hub name)")
    columns = wizard.file_columns(data) if wizard.is_file(data) else []
    if columns:
        typer.echo(f"columns: {', '.join(columns)}")
    named = {
        role: column or Prompt.ask(f"Column for {role}", choices=columns or None)
        for role, column in wizard.guess_columns(task, columns).items()
    }
    rank = IntPrompt.ask("Average rank at the end", default=8)
    fields = wizard.make_recipe(wizard.Answers(out.stem, task, model, data, named, rank))
    write_text(out, wizard.to_yaml(fields))
    typer.echo(f"wrote {out}; train it: adalora train {out}")


def _run(recipe: Any, *, overwrite: bool, resume: bool = False) -> None:
    from accelerate import PartialState
    from rich.console import Console

    from adalora.tasks.runs.progress import show_result
    from adalora.tasks.runs.runner import run_recipe

    _quiet()
    console = Console()
    result = run_recipe(recipe, overwrite=overwrite, resume=resume, console=console)
    if PartialState().is_main_process:  # a launcher may have started several
        show_result(console, result.metrics, result.files)


def _quiet() -> None:
    """Leave out other libraries' loading bars, reports of the new head, and notes to their own developers."""
    import warnings

    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # its functions have no types
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(peft|transformers|torch)\b")


def _finished(out: Path) -> dict[str, Any] | None:
    file = out / "metrics.json"
    if not file.is_file():
        return None
    metrics: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return metrics


def _answer(out: Path, text: str) -> None:
    from adalora.tasks.runs.prediction import predict

    _quiet()
    for label, probability in predict(out, text).items():
        typer.echo(f"{label:10s} {probability:6.1%}")
