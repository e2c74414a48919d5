"""`adalora export`, `verify`, `inspect` and `compress`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from adalora.export import CompressionReport, ExportReport, Inspection, StackResult

Base = Annotated[str | None, typer.Option("--base", help="Base model: folder, or name on the hub.")]
Alpha = Annotated[
    float | None, typer.Option("--alpha", help="ADAPTER is a loralib state dict trained with this alpha.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in OUT.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; as in ADAPTER by default.")]
Multiple = Annotated[int | None, typer.Option("--rank-multiple", help="Pad ranks to a multiple of this.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(name="export")(export)
    app.command(name="verify")(verify)
    app.command(name="inspect")(inspect)
    app.command(name="compress")(compress)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _echo_json(value: Any) -> None:
    typer.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False))


def _table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", highlight=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def export(
    adapter: Annotated[str, typer.Argument(help="Folder of a LoRA or AdaLoRA adapter.")],
    out: Annotated[str, typer.Argument(help="Folder to make.")],
    format: Annotated[
        str, typer.Option("--format", help="portable, ragged, gguf-ragged, merged, mlx or peft-adalora.")
    ] = "portable",
    base: Base = None,
    dtype: Dtype = None,
    rank_multiple: Multiple = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Keep this share of the energy.")] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="Keep this share (up to 1), or number, of parameters.")
    ] = None,
    curve: Annotated[
        str | None, typer.Option("--curve", help="curve.json of adalora curve: cut in its order, not by energy.")
    ] = None,
    clean: Annotated[bool, typer.Option("--clean/--no-clean", help="Re-orthonormalise the triplets exactly.")] = True,
    mlx: Annotated[bool, typer.Option("--mlx/--no-mlx", help="Portable: MLX-LM's files in OUT/mlx.")] = True,
    scores: Annotated[
        str | None, typer.Option("--scores", help="JSON of numbers, or history.jsonl, for the card.")
    ] = None,
    alpha: Alpha = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write an adapter so that other stacks compute exactly the same."""
    from adalora.export import export_adapter
    from adalora.export.card import read_scores
    from adalora.export.ordered import read_order

    report = export_adapter(
        adapter,
        out,
        format=format,
        base=base,
        dtype=dtype,
        rank_multiple=rank_multiple,
        energy=energy,
        budget=budget,
        order=read_order(curve) if curve else None,
        reorthonormalise=clean,
        mlx=mlx,
        scores=read_scores(scores) if scores else None,
        alpha=alpha,
        overwrite=overwrite,
    )
    if as_json:
        _echo_json(asdict(report))
    else:
        _show_export(report)


def _show_export(report: ExportReport) -> None:
    ranks = list(report.ranks.values())
    typer.echo(f"{report.folder}: {report.format}, {report.bytes / 1e6:.2f} MB")
    typer.echo(
        f"{sum(ranks)} triplets in {sum(r > 0 for r in ranks)} of {len(ranks)} modules; "
        f"{report.parameters_before:,} -> {report.parameters_after:,} LoRA parameters"
    )
    if not math.isnan(report.error):
        typer.echo(f"error ‖ΔW written − ΔW‖ / ‖ΔW‖ = {report.error:.1e}, energy kept {100 * report.kept_energy:.2f} %")
    for note in report.notes:
        typer.secho(f"note: {note}", fg="yellow")


def verify(
    adapter: Annotated[str, typer.Argument(help="Folder of a LoRA or AdaLoRA adapter.")],
    base: Base = None,
    forward: Annotated[
        bool,
        typer.Option("--forward/--no-forward", help="With --base: also run the base model with the adapter."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Say what each serving stack computes with an adapter: exact, wrong by how much, or refused and why."""
    from adalora.export import check_forward, verify_adapter

    results = verify_adapter(adapter, base=base)
    check = dict(check_forward(adapter, base)) if base and forward else None
    if as_json:
        _echo_json({"stacks": [asdict(r) for r in results], "forward": check})
        return
    _show_stacks(results)
    if check:
        typer.echo(
            f"PEFT against merged weights on the base model: outputs differ by {check['difference']:.1e} "
            f"(the adapter changes them by {check['change']:.1e})"
        )


def _show_stacks(results: list[StackResult]) -> None:
    colours = {"exact": "green", "wrong": "red", "refused": "yellow", "not served": "bright_black"}
    rows = []
    for r in results:
        status = f"[{colours[r.status]}]{r.status}[/]"
        if r.status == "wrong":
            status += f" by {100 * r.error:.0f} %" if math.isfinite(r.error) else ""
        rows.append([r.stack, r.version, status, r.reason.replace("[", "\\[")])
    _table("ΔW that each stack computes", ["stack", "version read", "result", "why"], rows)


def inspect(
    adapter: Annotated[str, typer.Argument(help="Folder of any LoRA or AdaLoRA adapter.")],
    alpha: Alpha = None,
    as_json: Json = False,
) -> None:
    """Show modules, ranks, energies, sizes, and the budget that keeps 90, 95, 99 % of the energy."""
    from adalora.export import inspect_adapter

    report = inspect_adapter(adapter, alpha=alpha)
    if as_json:
        _echo_json(asdict(report))
    else:
        _show_inspection(report)


def _show_inspection(report: Inspection) -> None:
    rows = [
        [
            m.name,
            f"{m.d_out}×{m.d_in}",
            str(m.rank),
            f"{m.effective_rank:.1f}",
            f"{m.norm:.3g}",
            " ".join(f"{100 * e:.0f}" for e in m.energy[:8]) + (" …" if len(m.energy) > 8 else ""),
        ]
        for m in report.modules
    ]
    columns = ["module", "shape", "rank", "effective", "‖ΔW‖", "energy of triplets, %"]
    _table(f"{report.origin} adapter on {report.base_model or 'an unnamed base'}", columns, rows)
    typer.echo(
        f"{report.parameters:,} LoRA parameters in {len(report.modules)} modules, "
        f"{report.extra_parameters:,} others; {report.bytes / 1e6:.2f} MB as {report.dtype}"
    )
    for share, parameters in report.budgets.items():
        part = parameters / max(report.parameters, 1)
        typer.echo(f"{100 * share:.0f} % of the energy: {parameters:,} parameters, --budget {part:.3f}")


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
        _echo_json(_compression(report))
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
    _table(f"rank by {report.criterion}", ["module", "rank", "error of ΔW"], rows)
    cut = report.truncation
    typer.echo(
        f"{report.export.folder}: {cut.parameters_before:,} -> {cut.parameters_after:,} LoRA parameters, "
        f"energy kept {100 * cut.kept_energy:.2f} %, error of ΔW {100 * cut.error:.1f} %"
    )
    if report.score_before is not None and report.score_after is not None:
        typer.echo(f"{report.score_name}: {report.score_before:.4f} -> {report.score_after:.4f}")
    for note in report.export.notes:
        typer.secho(f"note: {note}", fg="yellow")
