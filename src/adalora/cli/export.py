"""`adalora export`, `verify` and `inspect`."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from adalora.cli.printing import echo_json, show_table

if TYPE_CHECKING:
    from adalora.export import ExportReport, Inspection, StackResult

Base = Annotated[str | None, typer.Option("--base", help="Base model: folder, or name on the hub.")]
Alpha = Annotated[
    float | None, typer.Option("--alpha", help="ADAPTER is a loralib state dict trained with this alpha.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in OUT.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; as in ADAPTER by default.")]
Multiple = Annotated[int | None, typer.Option("--rank-multiple", help="Pad ranks to a multiple of this.")]
Format = Annotated[str, typer.Option("--format", help="portable, ragged, gguf-ragged, merged, mlx or peft-adalora.")]
Energy = Annotated[float | None, typer.Option("--energy", help="Keep this share of the energy.")]
Budget = Annotated[float | None, typer.Option("--budget", help="Keep this share (up to 1), or number, of parameters.")]
Curve = Annotated[
    str | None, typer.Option("--curve", help="curve.json of adalora curve: cut in its order, not by energy.")
]
Clean = Annotated[bool, typer.Option("--clean/--no-clean", help="Re-orthonormalise the triplets exactly.")]
Mlx = Annotated[bool, typer.Option("--mlx/--no-mlx", help="Portable: MLX-LM's files in OUT/mlx.")]
Scores = Annotated[str | None, typer.Option("--scores", help="JSON of numbers, or history.jsonl, for the card.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(name="export")(export)
    app.command(name="verify")(verify)
    app.command(name="inspect")(inspect)


def export(
    adapter: Annotated[str, typer.Argument(help="Folder of a LoRA or AdaLoRA adapter.")],
    out: Annotated[str, typer.Argument(help="Folder to make.")],
    format: Format = "portable",
    base: Base = None,
    dtype: Dtype = None,
    rank_multiple: Multiple = None,
    energy: Energy = None,
    budget: Budget = None,
    curve: Curve = None,
    clean: Clean = True,
    mlx: Mlx = True,
    scores: Scores = None,
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
        echo_json(asdict(report))
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
        echo_json({"stacks": [asdict(r) for r in results], "forward": check})
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
    show_table("ΔW that each stack computes", ["stack", "version read", "result", "why"], rows)


def inspect(
    adapter: Annotated[str, typer.Argument(help="Folder of any LoRA or AdaLoRA adapter.")],
    alpha: Alpha = None,
    as_json: Json = False,
) -> None:
    """Show modules, ranks, energies, sizes, and the budget that keeps 90, 95, 99 % of the energy."""
    from adalora.export import inspect_adapter

    report = inspect_adapter(adapter, alpha=alpha)
    if as_json:
        echo_json(asdict(report))
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
    show_table(f"{report.origin} adapter on {report.base_model or 'an unnamed base'}", columns, rows)
    typer.echo(
        f"{report.parameters:,} LoRA parameters in {len(report.modules)} modules, "
        f"{report.extra_parameters:,} others; {report.bytes / 1e6:.2f} MB as {report.dtype}"
    )
    for share, parameters in report.budgets.items():
        part = parameters / max(report.parameters, 1)
        typer.echo(f"{100 * share:.0f} % of the energy: {parameters:,} parameters, --budget {part:.3f}")
