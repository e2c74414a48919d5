"""Exporting an adapter: read, clean, truncate, write, read back and compare, then publish the folder."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter, difference, norm
from adalora.export.base import Base, find_base, load_config
from adalora.export.card import render_card
from adalora.export.cleanup import Truncation, clean, truncate
from adalora.export.files import CONFIG_NAME, WEIGHTS_NAME, check_output, new_folder, write_json
from adalora.export.formats import LAYOUTS
from adalora.export.gguf import ARCHITECTURES, write_gguf
from adalora.export.importing import read_loralib
from adalora.export.merged import write_merged
from adalora.export.mlx import mlx_refusal, read_mlx, write_mlx
from adalora.export.ordered import TripletOrder, cut_by
from adalora.export.reading import as_dtype, read_adapter

FORMATS = (*LAYOUTS, "merged", "mlx")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        folder: The folder that is there now.
        format: Layout name.
        ranks: Module name -> rank that carries information (padding not counted).
        parameters_before: LoRA parameters of the source.
        parameters_after: LoRA parameters after clean-up and truncation.
        bytes: Size of all files.
        error: ‖ΔW of the files − ΔW of the source‖ / ‖ΔW‖ over all modules, read back from the written files;
            NaN for a merged model, whose files hold no ΔW.
        errors: The same by module.
        kept_energy: Share of Σσ² kept by the truncation.
        notes: What the user should know.
    """

    folder: Path
    format: str
    ranks: Mapping[str, int]
    parameters_before: int
    parameters_after: int
    bytes: int
    error: float
    errors: Mapping[str, float]
    kept_energy: float
    notes: tuple[str, ...]


def load_source(source: str | os.PathLike[str] | Adapter, *, alpha: float | None = None) -> Adapter:
    """An adapter from memory, a PEFT folder, or (with `alpha`) a loralib state dict.

    Raises:
        AdapterFileError: See `read_adapter` and `read_loralib`.
    """
    if isinstance(source, Adapter):
        return source
    if alpha is not None:
        return read_loralib(source, alpha=alpha)
    return read_adapter(source)


def compare(wanted: Adapter, got: Adapter) -> tuple[float, dict[str, float]]:
    """Relative error of one adapter's ΔW against another's, over all modules and by module."""
    errors, squares, total = {}, 0.0, 0.0
    for name, f in wanted.factors.items():
        other = got.factors.get(name)
        size = norm(*f.product())
        miss = difference(f.product(), other.product()) if other is not None else size
        errors[name] = miss / size if size else (0.0 if miss == 0 else math.inf)
        squares, total = squares + miss**2, total + size**2
    for name, f in got.factors.items():
        if name not in wanted.factors:
            squares += norm(*f.product()) ** 2
    return math.sqrt(squares / total) if total else (0.0 if squares == 0 else math.inf), errors


def _without_clean(adapter: Adapter) -> Truncation:
    return Truncation(adapter, 1.0, dict.fromkeys(adapter.factors, 0.0), adapter.parameters, adapter.parameters)


def export_adapter(
    source: str | os.PathLike[str] | Adapter,
    out: str | os.PathLike[str],
    *,
    format: str = "portable",
    base: str | None = None,
    dtype: str | None = None,
    rank_multiple: int | None = None,
    energy: float | None = None,
    budget: float | None = None,
    order: TripletOrder | None = None,
    reorthonormalise: bool = True,
    scores: Mapping[str, float] | None = None,
    alpha: float | None = None,
    mlx: bool = True,
    overwrite: bool = False,
) -> ExportReport:
    """Write an adapter in another layout.

    Args:
        source: PEFT LoRA or AdaLoRA folder, loralib state dict (with `alpha`), or an adapter in memory.
        out: Folder to make. It appears whole or not at all.
        format: `portable`, `ragged`, `gguf-ragged`, `merged`, `mlx` or `peft-adalora`.
        base: Base model folder or hub name; needed for `merged`, and to be sure of the number of layers.
        dtype: `float32`, `bfloat16` or `float16`; that of the source by default.
        rank_multiple: Pad ranks to a multiple of this instead of 16, 32, 64 … (portable) or not at all.
        energy: Keep this share of Σσ².
        budget: Keep this share (up to 1), or this number, of LoRA parameters.
        order: What a budget cuts first, as `read_order("curve.json")` gives it; by energy if None.
        reorthonormalise: Clean triplets by an exact SVD first; always done when truncating.
        scores: Metric -> value, for the model card.
        alpha: lora_alpha of a loralib state dict.
        mlx: With `portable`: also write MLX-LM's files into a folder `mlx` inside, where it can take them.
        overwrite: Replace an earlier export in `out`.

    Returns:
        Ranks, sizes and the error, measured on the written files.

    Raises:
        AdapterFileError: Wrong input, unknown format, missing base, or `out` exists; nothing is written then.
    """
    check_request(out, format=format, overwrite=overwrite)
    if order is not None and (budget is None or energy is not None):
        raise AdapterFileError("an order (--curve) says what a budget cuts first: add --budget, and no --energy")
    adapter = load_source(source, alpha=alpha)
    as_dtype(dtype, adapter.dtype)
    if not reorthonormalise and energy is None and budget is None and format != "peft-adalora":
        cut = _without_clean(adapter)
    elif order is not None and budget is not None:
        cut = cut_by(adapter, budget, order)
    else:
        cut = truncate(adapter, energy=energy, budget=budget)
    return write_export(
        cut, adapter, out, format=format, base=base, dtype=dtype, rank_multiple=rank_multiple,
        scores=scores, mlx=mlx, overwrite=overwrite,
    )  # fmt: skip


def check_request(out: str | os.PathLike[str], *, format: str, overwrite: bool) -> None:
    """Refuse an unknown format or an output that is there, before anything is read or computed.

    Raises:
        AdapterFileError: One of the two.
    """
    if format not in FORMATS:
        raise AdapterFileError(f"unknown format {format!r}; allowed are {', '.join(FORMATS)}")
    check_output(Path(out), overwrite=overwrite)


def write_export(
    cut: Truncation,
    source: Adapter,
    out: str | os.PathLike[str],
    *,
    format: str,
    base: str | None = None,
    dtype: str | None = None,
    rank_multiple: int | None = None,
    scores: Mapping[str, float] | None = None,
    mlx: bool = True,
    overwrite: bool = False,
) -> ExportReport:
    """Write a cut adapter; the error is measured against its source. See `export_adapter`."""
    target, chosen = Path(out), as_dtype(dtype, source.dtype)
    if format == "merged":
        return _export_merged(cut, target, base=base, dtype=dtype, scores=scores, overwrite=overwrite)
    tree = find_base(source, base)
    notes: tuple[str, ...] = ()
    with new_folder(target, overwrite=overwrite) as work:
        if format == "mlx":
            write_mlx(work, cut.adapter, tree, dtype=chosen)
            written = read_mlx(work)
        else:
            layout = LAYOUTS[format](cut.adapter, tree, dtype=chosen, rank_multiple=rank_multiple)
            write_json(work / CONFIG_NAME, layout.config)
            save_file(layout.tensors, str(work / WEIGHTS_NAME), metadata={"format": "pt"})
            written = read_adapter(work)
            notes = layout.notes + _extra_files(work, cut.adapter, tree, format=format, dtype=chosen, mlx=mlx)
        error, errors = compare(source, written)
        stored = sum(f.parameters for f in written.factors.values())
        card = render_card(
            cut.adapter, format=format, name=target.name, stored=stored, rank=written.max_rank,
            error=error, kept_energy=cut.kept_energy, scores=scores,
        )  # fmt: skip
        (work / "README.md").write_text(card, encoding="utf-8")
    return _report(target, format, cut, error, errors, notes)


def _extra_files(
    work: Path, adapter: Adapter, tree: Base, *, format: str, dtype: torch.dtype, mlx: bool
) -> tuple[str, ...]:
    """Files for servers that do not read PEFT's layout: MLX-LM's in portable, a GGUF in gguf-ragged."""
    if format == "portable" and mlx and adapter.max_rank:
        reason = mlx_refusal(adapter)
        if reason:
            return (f"no files for MLX-LM: {reason}",)
        (work / "mlx").mkdir()
        write_mlx(work / "mlx", adapter, tree, dtype=dtype)
    if format == "gguf-ragged" and tree.known:
        known = any(name in ARCHITECTURES for name in tree.config.get("architectures") or ())
        if not known:
            return ("no .gguf written for this architecture; convert the folder with convert_lora_to_gguf.py",)
        try:
            write_gguf(work / "adapter.gguf", adapter, tree.config, dtype=dtype)
        except AdapterFileError as error:
            return (f"no .gguf written: {error}",)
    if format == "gguf-ragged" and not tree.known:
        return ("no .gguf written: give --base, or convert the folder with convert_lora_to_gguf.py",)
    return ()


def _export_merged(
    cut: Truncation,
    target: Path,
    *,
    base: str | None,
    dtype: str | None,
    scores: Mapping[str, float] | None,
    overwrite: bool,
) -> ExportReport:
    adapter = clean(cut.adapter)
    model = base or adapter.base_model
    if model is None:
        raise AdapterFileError("format merged needs the base model: add --base MODEL")
    load_config(model)
    with new_folder(target, overwrite=overwrite) as work:
        write_merged(work, model, adapter, dtype=as_dtype(dtype, torch.float32) if dtype else None)
        card = render_card(
            adapter, format="merged", name=target.name, stored=adapter.parameters, rank=adapter.max_rank,
            error=cut.error, kept_energy=cut.kept_energy, scores=scores,
        )  # fmt: skip
        (work / "README.md").write_text(card, encoding="utf-8")
    return _report(target, "merged", cut, math.nan, cut.errors, ())


def _report(
    folder: Path,
    format: str,
    cut: Truncation,
    error: float,
    errors: Mapping[str, float],
    notes: tuple[str, ...],
) -> ExportReport:
    return ExportReport(
        folder=folder,
        format=format,
        ranks=cut.adapter.ranks,
        parameters_before=cut.parameters_before,
        parameters_after=cut.parameters_after,
        bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        error=error,
        errors=errors,
        kept_energy=cut.kept_energy,
        notes=notes,
    )
