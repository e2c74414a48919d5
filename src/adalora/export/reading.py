"""Reading an adapter folder of PEFT (LoRA or AdaLoRA) or a loralib state dict."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adalora.errors import AdapterFileError
from adalora.export.adapter import Adapter, Factor, make_factor
from adalora.export.files import CONFIG_NAME, WEIGHTS_NAME, read_json, read_tensors

PREFIX = "base_model.model."

# Settings of PEFT's LoRA that change what the matrices mean. An export that ignored them would be wrong.
_UNSUPPORTED = {
    "use_dora": "DoRA scales the whole weight, which no low-rank file can hold; merge it in PEFT instead",
    "lora_bias": "a bias beside lora_B; only PEFT knows it",
    "use_qalora": "QALoRA pools the input",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "replicated layers share weights with their originals",
    "alora_invocation_tokens": "activated LoRA depends on the tokens before it",
    "target_parameters": "LoRA on bare parameters (experts); convert it to modules in PEFT first",
    "trainable_token_indices": "trained token rows are no LoRA; merge them in PEFT first",
}
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_FACTOR_KEY = re.compile(
    r"(?P<module>.+)\.(?P<which>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B)"
    r"(?:\.(?P<adapter>[^.]+))??(?:\.weight)?"
)


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter folder of PEFT: plain LoRA, or AdaLoRA of any PEFT version.

    Args:
        path: Folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The adapter; an AdaLoRA one is converted exactly, with its pruned triplets gone.

    Raises:
        AdapterFileError: No adapter, a pickle, a damaged or hostile file, or a feature without a plain form.
    """
    folder = Path(path)
    config = read_json(_config_file(folder))
    kind = str(config.get("peft_type", "")).upper()
    if kind not in ("LORA", "ADALORA"):
        raise AdapterFileError(f"{folder}: peft_type {config.get('peft_type')!r}; allowed are LORA and ADALORA")
    tensors = read_tensors(_weights_file(folder))
    if kind == "ADALORA":
        from adalora.export.importing import adapter_from_adalora

        return adapter_from_adalora(tensors, config)
    return adapter_from_lora(tensors, config)


def _config_file(folder: Path) -> Path:
    if not folder.exists():
        raise AdapterFileError(f"no adapter at {folder}")
    if not (folder / CONFIG_NAME).is_file():
        hint = " (a loralib state dict? give --alpha)" if folder.suffix == ".safetensors" else ""
        raise AdapterFileError(f"{folder} is no adapter: it has no {CONFIG_NAME}{hint}")
    return folder / CONFIG_NAME


def _weights_file(folder: Path) -> Path:
    file = folder / WEIGHTS_NAME
    if file.is_file():
        return file
    for name in ("adapter_model.bin", "adapter_model.pt"):
        if (folder / name).exists():
            raise refuse_pickle(folder / name)
    raise AdapterFileError(f"{folder} is no adapter: it has no {WEIGHTS_NAME}")


def refuse_pickle(file: Path) -> AdapterFileError:
    """The error for a pickle, with the line that converts it."""
    target = file.with_suffix(".safetensors").name
    return AdapterFileError(
        f"{file} is a pickle, which can run code when read. If you trust it, convert it once: python -c "
        f'"import torch, safetensors.torch as s; s.save_file({{k: v.contiguous() for k, v in '
        f"torch.load('{file.name}', weights_only=True).items()}}, '{target}')\""
    )


def split_keys(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort tensors into factors by module and all others.

    Returns:
        Module name (without PEFT's prefix) -> {lora_A, lora_B, lora_E, lora_embedding_A, …}, and the extras
        under their full names.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    extras: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith(".ranknum"):
            modules.setdefault(key.removesuffix(".ranknum").removeprefix(PREFIX), {})["ranknum"] = tensor
            continue
        match = _FACTOR_KEY.fullmatch(key)
        if match is None:
            if ".lora_" in key:
                raise AdapterFileError(f"tensor {key!r} is none of plain LoRA's; its method has no plain form")
            extras[key] = tensor
            continue
        parts = modules.setdefault(match["module"].removeprefix(PREFIX), {})
        if match["which"] in parts:
            raise AdapterFileError(f"{match['module']}: {match['which']} is there twice (two adapters in one file?)")
        parts[match["which"]] = tensor
    return modules, extras


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a LoRA config whose meaning a plain pair of matrices does not have.

    Raises:
        AdapterFileError: One of PEFT's special variants is on, or a number is not one.
    """
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise AdapterFileError(f"{key}={config[key]!r} cannot be exported: {reason}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise AdapterFileError(
            f"init_lora_weights={init!r} changed the base weights; save the adapter again with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL_ADAPTER)"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise AdapterFileError(f"{key} must be an object, got {type(config[key]).__name__}")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value == 0:
        raise AdapterFileError(f"{what} is {value!r}; a finite number other than 0 is wanted")
    return float(value)


def match_pattern(pattern: Mapping[str, Any], name: str) -> Any:
    """The value of the first key that PEFT would match to a module name, or None.

    Raises:
        AdapterFileError: A key is no regular expression, or one that can take for ever.
    """
    for key, value in pattern.items():
        plain = key.removeprefix("^")
        if plain.replace("\\", "") == name:  # PEFT's own escaped form, most keys by far
            return value
        if len(key) > 1000 or re.search(r"\)[*+{]", key):
            raise AdapterFileError(f"pattern key {key[:80]!r} repeats a group; only simple patterns are read")
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error as error:
            raise AdapterFileError(f"pattern key {key[:80]!r} is no regular expression ({error})") from None
    return None


def rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Rank and scale that PEFT gives to a module.

    Args:
        config: `adapter_config.json`.
        name: Module name.

    Returns:
        r by `rank_pattern`, and alpha/r (alpha/√r with rsLoRA) by both patterns.
    """
    rank = match_pattern(config.get("rank_pattern") or {}, name)
    alpha = match_pattern(config.get("alpha_pattern") or {}, name)
    rank = config.get("r", 8) if rank is None else rank
    alpha = config.get("lora_alpha", 8) if alpha is None else alpha
    if type(rank) is not int or rank < 1:
        raise AdapterFileError(f"{name}: rank {rank!r} in {CONFIG_NAME}; a whole number above 0 is wanted")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return rank, _number(alpha, f"{name}: lora_alpha") / divisor


def adapter_from_lora(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Adapter:
    """Build an adapter from the tensors and config of a plain PEFT LoRA.

    Raises:
        AdapterFileError: Matrices are missing, shapes disagree with each other or with the config.
    """
    check_config(config)
    modules, extras = split_keys(tensors)
    if not modules:
        raise AdapterFileError("the adapter holds no lora_A and lora_B")
    factors: dict[str, Factor] = {}
    for name, parts in modules.items():
        A, B, kind = _pair(name, parts)
        rank, scale = rank_and_scale(config, name)
        if A.shape[0] != rank:
            raise AdapterFileError(
                f"{name}: lora_A has rank {A.shape[0]}, {CONFIG_NAME} says {rank}; PEFT cannot load it"
            )
        factors[name] = make_factor(name, A, B, scale, kind=kind)
    return Adapter(factors, dict(config), extras, "lora")


def _pair(name: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
    if "lora_E" in parts or "ranknum" in parts:
        raise AdapterFileError(
            f"{name} has singular values (lora_E) though peft_type is LORA; PEFT would ignore them silently. "
            'Is it an AdaLoRA adapter? Then "peft_type" must be "ADALORA"'
        )
    for names, kind in (
        (("lora_A", "lora_B"), "linear"),
        (("lora_embedding_A", "lora_embedding_B"), "embedding"),
    ):
        present = [n for n in names if n in parts]
        if len(present) == 2 and len(parts) == 2:
            return parts[names[0]], parts[names[1]], kind
        if present:
            raise AdapterFileError(
                f"{name}: {', '.join(sorted(parts))} are there; {names[0]} and {names[1]} are wanted"
            )
    raise AdapterFileError(f"{name}: no lora_A and lora_B")


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A LoRA config with the base model, head and task of another one, and nothing about ranks.

    Args:
        config: Config of any adapter.

    Returns:
        Fields that PEFT, and every server that reads its JSON, understand.
    """
    keep = ("base_model_name_or_path", "revision", "task_type", "modules_to_save", "bias", "auto_mapping")
    kept = {key: config.get(key) for key in keep}
    return {
        **kept,
        "bias": kept["bias"] or "none",
        "peft_type": "LORA",
        "fan_in_fan_out": bool(config.get("fan_in_fan_out", False)),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def as_dtype(name: str | None, fallback: torch.dtype) -> torch.dtype:
    """The dtype of a name such as `bfloat16`; None keeps `fallback`.

    Raises:
        AdapterFileError: Not one of float32, bfloat16, float16.
    """
    if name is None:
        return fallback if fallback in (torch.bfloat16, torch.float16) else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise AdapterFileError(f"dtype {name!r}; allowed are {', '.join(known)}")
    return known[name]
