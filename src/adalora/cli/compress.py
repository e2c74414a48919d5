"""`adalora compress`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from adalora.cli.export import Alpha, Base, Dtype, Json, Multiple, Overwrite
from adalora.cli.printing import echo_json, show_table

if TYPE_CHECKING:
    from adalora.export import CompressionReport


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="compress")(compress)


def compress(
    adapter: Annotated[str, typer.Argument(help="Folder of any LoRA or AdaLoRA adapter.")],
    out: Annotated[str, typer.Argument(help="Folder to make.")],
    budget: Annotated[
        float, typer.Option("--budget", help="Share of parameters to keep (up to 1), or a number.")
    ] = 0.5,
    format: Annotated[str, typer.Option("--format", help="Layout to write, as in export.")] = "ragged",
    data: Annotated[
        str | None,
        typer.Option("--data", help="JSONL or CSV: rank triplets by what the loss on it depends on."),
    ] = None,
    base: Base = None,
    text_column: Annotated[str, typer.Option("--text-column", help="Column with the text.")] = "text",
    label_column: Annotated[str, typer.Option("--label-column", help="Column with the class, if any.")] = "label",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows a batch.")] = 8,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Tokens a row at most.")] = 128,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rows used at most.")] = 512,
    dtype: Dtype = None,
    rank_multiple: Multiple = None,
    alpha: Alpha = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Re-allocate an adapter's rank across its matrices to a share of its parameters."""
    from adalora.export import compress_adapter
    from adalora.export.exporting import check_request, load_source

    options: dict[str, Any] = {"dtype": dtype, "rank_multiple": rank_multiple}
    check_request(out, format=format, overwrite=overwrite)
    source = load_source(adapter, alpha=alpha)
    if data is not None:
        options |= _measured(source, data, base, text_column, label_column, batch_size, max_length, limit)
    report = compress_adapter(source, out, budget=budget, format=format, base=base, overwrite=overwrite, **options)
    if as_json:
        echo_json(_compression(report))
    else:
        _show_compression(report)


def _measured(
    source: Any,
    data: str,
    base: str | None,
    text: str,
    label: str,
    batch_size: int,
    max_length: int,
    limit: int,
) -> dict[str, Any]:
    """Batches, loss, score and model for the data-driven compression."""
    import torch
    from transformers import AutoTokenizer

    from adalora.errors import AdapterFileError
    from adalora.export.data import measure_file
    from adalora.export.merged import load_model

    name = base or source.base_model
    if name is None:
        raise AdapterFileError("--data needs the base model: add --base MODEL")
    model = load_model(name, source, dtype=torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{name!r} has no tokenizer, which --data needs") from error
    found = measure_file(
        data,
        model,
        tokenizer,
        text=text,
        label=label,
        batch_size=batch_size,
        max_length=max_length,
        limit=limit,
    )
    return {
        "batches": found.batches,
        "loss": found.loss,
        "score": found.score,
        "score_name": found.score_name,
        "model": model,
    }


def _compression(report: CompressionReport) -> dict[str, Any]:
    return {
        "criterion": report.criterion,
        "parameters_before": report.truncation.parameters_before,
        "parameters_after": report.truncation.parameters_after,
        "error": report.truncation.error,
        "kept_energy": report.truncation.kept_energy,
        "modules": {
            name: {
                "rank_before": rank,
                "rank": report.export.ranks[name],
                "error": report.truncation.errors[name],
            }
            for name, rank in report.ranks_before.items()
        },
        "score": {"name": report.score_name, "before": report.score_before, "after": report.score_after},
        "folder": report.export.folder,
        "notes": report.export.notes,
    }


def _show_compression(report: CompressionReport) -> None:
    rows = [
        [name, f"{rank} -> {report.export.ranks[name]}", f"{100 * report.truncation.errors[name]:.1f} %"]
        for name, rank in report.ranks_before.items()
    ]
    show_table(f"rank by {report.criterion}", ["module", "rank", "error of ΔW"], rows)
    cut = report.truncation
    typer.echo(
        f"{report.export.folder}: {cut.parameters_before:,} -> {cut.parameters_after:,} LoRA parameters, "
        f"energy kept {100 * cut.kept_energy:.2f} %, error of ΔW {100 * cut.error:.1f} %"
    )
    if report.score_before is not None and report.score_after is not None:
        typer.echo(f"{report.score_name}: {report.score_before:.4f} -> {report.score_after:.4f}")
    for note in report.export.notes:
        typer.secho(f"note: {note}", fg="yellow")
