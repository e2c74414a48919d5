"""The base model with ΔW added to its weights: for engines without LoRA."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter, Factor
from adalora.export.base import load_config, model_classes
from adalora.export.reading import PREFIX

_log = logging.getLogger(__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, progress bars and reports of transformers while it works for us; restored after."""
    from transformers.utils import logging as transformers_logging

    control: Any = transformers_logging
    level, bars = control.get_verbosity(), control.is_progress_bar_enabled()
    control.set_verbosity_error()
    control.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        control.set_verbosity(level)
        if bars:
            control.enable_progress_bar()


def load_model(model: str, adapter: Adapter, *, dtype: torch.dtype | None = None) -> Any:
    """Load the base model's weights, in the class that has the adapter's modules.

    Args:
        model: Folder or hub name.
        adapter: Decides which class of transformers fits.
        dtype: dtype of the weights; as stored by default.

    Raises:
        AdapterFileError: No such model, or no class of it has the adapter's modules.
    """
    config = load_config(model, adapter)
    for cls in model_classes(config, adapter):
        try:
            with quiet():
                made: Any = cls
                loaded = made.from_pretrained(
                    model,
                    config=config,
                    dtype=dtype or "auto",
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,  # the adapter's head may have more outputs than the checkpoint's
                )
        except (OSError, ValueError) as error:
            _log.debug("%s does not load %s: %s", cls.__name__, model, error)
            continue
        names = {name for name, _ in loaded.named_modules()}
        if all(name in names for name in adapter.factors):
            return loaded
    raise AdapterFileError(f"{model!r} has not the adapter's modules (such as {next(iter(adapter.factors))!r})")


def add_factor(module: torch.nn.Module, factor: Factor) -> None:
    """Add ΔW to a module's weight, computed in float32 and rounded once.

    Raises:
        AdapterFileError: The weight is quantised or of another shape.
    """
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise AdapterFileError(f"{factor.name} is quantised; merge into the unquantised base model")
    delta = factor.delta()
    if factor.kind == "embedding" or type(module).__name__ == "Conv1D":
        delta = delta.T
    if delta.numel() != weight.numel() or (factor.kind != "conv" and delta.shape != weight.shape):
        raise AdapterFileError(
            f"shape mismatch at {factor.name}: ΔW {tuple(delta.shape)}, weight {tuple(weight.shape)}"
        )
    with torch.no_grad():
        weight.copy_((weight.to(delta.dtype) + delta.reshape(weight.shape).to(weight.device)).to(weight.dtype))


def untie(model: Any, adapter: Adapter) -> bool:
    """Give the output head its own weight where only one side of a tied pair is changed.

    Returns:
        Whether the pair was tied and now is not.
    """
    if not hasattr(model, "get_output_embeddings"):
        return False
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or words is None or head.weight is not words.weight:
        return False
    changed = [name for name, module in model.named_modules() if module in (head, words) and name in adapter.factors]
    if not changed:
        return False
    head.weight = torch.nn.Parameter(words.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return True


def merge(model: Any, adapter: Adapter) -> Any:
    """Add an adapter to a loaded base model in place: every ΔW, and a trained head where there is one.

    Args:
        model: From `load_model`.
        adapter: Any adapter.

    Raises:
        AdapterFileError: A shape does not fit, or an extra tensor has no place in the model.
    """
    if untie(model, adapter):
        _log.info("the output head gets its own weight")
    # First the weights that the file brings, such as a saved embedding, then the changes to them.
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, tensor in adapter.extras.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        target = parameters.get(name)
        if target is None or target.shape != tensor.shape:
            raise AdapterFileError(f"{name} {tuple(tensor.shape)} of the adapter has no place in the base model")
        with torch.no_grad():
            target.copy_(tensor)
    modules = dict(model.named_modules())
    for name, factor in adapter.factors.items():
        if factor.rank:
            add_factor(modules[name], factor)
    return model


def write_merged(folder: Path, model: str, adapter: Adapter, *, dtype: torch.dtype | None) -> None:
    """Merge and save a whole model, with the tokenizer of its base where there is one."""
    from transformers import AutoTokenizer

    merged = merge(load_model(model, adapter, dtype=dtype), adapter)
    with quiet():
        merged.save_pretrained(folder)
    try:
        AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as error:
        _log.info("no tokenizer copied: %s", error)
