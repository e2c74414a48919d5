"""Which modules a base model has: needed to fill in what an adapter left out.

From the base model's config where it is given or lies in a local folder (built without memory, no weights are
read), else from the adapter's own names: every layer number it shows times every suffix it shows.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter, Kind

# Names of lists whose layers are all built alike. In a U-Net's down_blocks, for one, they are not.
_STACKS = ("layers", "layer", "h", "block", "blocks")
_LAYER = re.compile(r"(?P<prefix>.*?)\.(?P<layer>\d+)\.(?P<suffix>.+)")


@dataclass(frozen=True)
class Site:
    """A module that an adapter could change.

    Attributes:
        kind: `linear`, `embedding` or `conv`.
        d_out: Rows of ΔW.
        d_in: Columns of ΔW, times the groups of a convolution.
    """

    kind: Kind
    d_out: int
    d_in: int


@dataclass(frozen=True)
class Base:
    """Modules of a base model in its own order.

    Attributes:
        sites: Full module name -> what can be changed there.
        known: From the model itself; False where guessed from the adapter's names.
        config: The model's config as a dict, empty where guessed.
        layers: Number of decoder or encoder layers, 0 where there are none.
    """

    sites: Mapping[str, Site]
    known: bool
    config: Mapping[str, Any]
    layers: int


def split_layer(name: str) -> tuple[str, int, str] | None:
    """`model.layers.3.mlp.up_proj` -> (`model.layers`, 3, `mlp.up_proj`); None without a layer number."""
    match = _LAYER.fullmatch(name)
    return (match["prefix"], int(match["layer"]), match["suffix"]) if match else None


def guess_base(adapter: Adapter) -> Base:
    """The grid of layers × suffixes that the adapter's own names span.

    Args:
        adapter: Any adapter.

    Returns:
        Sites in layer order. A suffix that has rank 0 everywhere, and layers above the last changed one,
        cannot be seen; give the base model to be sure.
    """
    names = list(adapter.factors) + _excluded(adapter)
    layers: dict[str, int] = {}
    shapes: dict[tuple[str, str], set[Site]] = {}
    own = {name: Site(f.kind, f.d_out, f.d_in) for name, f in adapter.factors.items()}
    for name in names:
        place = split_layer(name)
        if place and place[0].rsplit(".", 1)[-1] in _STACKS:
            layers[place[0]] = max(layers.get(place[0], 0), place[1] + 1)
            if name in own:
                shapes.setdefault((place[0], place[2]), set()).add(own[name])
    grid = {
        f"{prefix}.{i}.{suffix}": next(iter(found))
        for prefix, count in layers.items()
        for i in range(count)
        for (owner, suffix), found in shapes.items()
        if owner == prefix and len(found) == 1
    }
    return Base({**grid, **own}, False, {}, max(layers.values(), default=0))


def _excluded(adapter: Adapter) -> list[str]:
    """Full module names in `exclude_modules`: a list, or alternatives of escaped names."""
    value = adapter.config.get("exclude_modules")
    if isinstance(value, str):
        value = value.replace("(", "").replace(")", "").split("|")
    if not isinstance(value, list):
        return []
    plain = [re.sub(r"\\(.)", r"\1", v.strip("^$")) for v in value if isinstance(v, str)]
    return [v for v in plain if split_layer(v) and re.fullmatch(r"[\w.\-]+", v)]


def load_base(model: str, adapter: Adapter) -> Base:
    """Build the base model's module tree without memory and list what an adapter can change in it.

    Args:
        model: Folder, or name on the hub (only its config is read).
        adapter: Its names decide which class of the model fits.

    Raises:
        AdapterFileError: No such model, or the adapter's modules are not in it or have other shapes.
    """
    skeleton, config = empty_model(model, adapter)
    sites = {name: site for name, module in skeleton.named_modules() if (site := _site(module)) is not None}
    missing = [name for name in adapter.factors if name not in sites]
    if missing:
        raise AdapterFileError(f"{model} has no module {missing[0]!r} ({len(missing)} of the adapter's are missing)")
    for name, f in adapter.factors.items():
        site = sites[name]
        if (site.d_out, site.d_in) != (f.d_out, f.d_in):
            raise AdapterFileError(
                f"shape mismatch at {name}: the adapter's ΔW is {f.d_out}×{f.d_in}, "
                f"the weight in {model} is {site.d_out}×{site.d_in}"
            )
    layers = config.get("num_hidden_layers") or (config.get("text_config") or {}).get("num_hidden_layers") or 0
    return Base(sites, True, config, int(layers))


def _site(module: torch.nn.Module) -> Site | None:
    weight = getattr(module, "weight", None)
    if isinstance(module, torch.nn.Embedding):
        return Site("embedding", module.embedding_dim, module.num_embeddings)
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        columns = module.in_channels * math.prod(module.kernel_size)
        return Site("conv", module.out_channels, columns * module.groups)
    if isinstance(module, torch.nn.Linear):
        return Site("linear", module.out_features, module.in_features)
    if type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor):  # GPT-2's transposed linear
        return Site("linear", weight.shape[1], weight.shape[0])
    return None


def _labels(adapter: Adapter) -> int | None:
    """Number of classes of a trained head, from the shape of its last matrix."""
    if adapter.config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = [t for k, t in adapter.extras.items() if k.endswith(".weight") and t.dim() == 2]
    return int(heads[-1].shape[0]) if heads else None


def load_config(model: str, adapter: Adapter | None = None) -> Any:
    """The transformers config of a folder or hub name; code from the hub is never run.

    Args:
        model: Folder or hub name.
        adapter: Its trained head decides the number of labels.

    Raises:
        AdapterFileError: There is none, or it cannot be reached.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:160]
        raise AdapterFileError(f"base model {model!r} cannot be read: {reason}") from error
    labels = _labels(adapter) if adapter is not None else None
    if labels is not None:
        config.num_labels = labels
    return config


def model_classes(config: Any, adapter: Adapter) -> list[type]:
    """Classes of transformers to try, the one that the model's config names first."""
    import transformers

    by_task = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    }
    task = by_task.get(str(adapter.config.get("task_type")))
    mapping = adapter.config.get("auto_mapping") or {}
    names = [mapping.get("base_model_class")] if isinstance(mapping, dict) else []
    names += list(getattr(config, "architectures", None) or [])
    named = [getattr(transformers, n, None) for n in names if isinstance(n, str)]
    named = [c for c in named if getattr(c, "config_class", None) is type(config)]
    found = [task, *named, transformers.AutoModelForCausalLM, transformers.AutoModel]
    return [c for c in found if isinstance(c, type)]


def empty_model(model: str, adapter: Adapter) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The base model on the meta device, of the class that has the adapter's modules, and its config."""
    config = load_config(model, adapter)
    fallback: torch.nn.Module | None = None
    for cls in model_classes(config, adapter):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about settings of the foreign config, not about this use
                made: Any = cls  # Auto classes have from_config, models _from_config
                built = (made.from_config if hasattr(made, "from_config") else made._from_config)(config)
        except (ValueError, TypeError):
            continue
        names = {name for name, _ in built.named_modules()}
        if all(name in names for name in adapter.factors):
            return built, config.to_dict()
        fallback = fallback if fallback is not None else built
    if fallback is None:
        raise AdapterFileError(f"no class of transformers builds {model!r} ({config.model_type})")
    return fallback, config.to_dict()


def find_base(adapter: Adapter, model: str | None) -> Base:
    """The base's modules: of `model`, of the adapter's own base where it is a local folder, else guessed.

    Args:
        adapter: Any adapter.
        model: Folder or hub name, or None.
    """
    if model is not None:
        return load_base(model, adapter)
    local = adapter.base_model
    if local and (Path(local) / "config.json").is_file():
        try:
            return load_base(local, adapter)
        except AdapterFileError:  # a folder of another model under the same path: the user did not name it
            return guess_base(adapter)
    return guess_base(adapter)
