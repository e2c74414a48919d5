"""The base model of a recipe, with its head and LoRA."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig

from adalora.config import initial_rank
from adalora.errors import RecipeError
from adalora.tasks.kinds.base import Task
from adalora.tasks.recipe.fields import ModelPart, Recipe
from adalora.tasks.recipe.problems import suggest
from adalora.tasks.runs.head import mark_whole

# Heads that PEFT adds to modules_to_save by itself, by its task type.
PEFT_SAVES: dict[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
DEFAULT_LORA = {"r": 12, "target_modules": "all-linear"}  # a recipe with a target rank starts as wide as it needs


def build_processor(recipe: Recipe, task: Task) -> Any:
    """Tokenizer or processor of the base model."""
    part = recipe.model
    loading: dict[str, Any] = {}
    if part.tokenizer is None:
        loading = {key: value for key, value in (("revision", part.revision), ("gguf_file", part.gguf_file)) if value}
    return task.processor(ModelPart(name=part.tokenizer or part.name).resolve(), **loading)


def build_model(recipe: Recipe, task: Task, processor: Any) -> Any:
    """Base model with the task's head, and the recipe's LoRA on it.

    Modules that the checkpoint does not have (a new head) are trained whole and saved with the adapter.
    """
    model, fresh = load_base(recipe, task, processor)
    return get_peft_model(model, lora_config(recipe, task, model, fresh))


def load_base(recipe: Recipe, task: Task, processor: Any) -> tuple[Any, list[str]]:
    """Base model with the task's head, ready for an adapter, and the modules that its checkpoint does not have."""
    part = recipe.model
    model, report = load_checkpoint(part, task, processor)
    if part.gguf_file:
        _forget_gguf(model)
    fresh = fresh_modules(model, {*report["missing_keys"], *_other_heads(model, report["mismatched_keys"])})
    if (answer := task.first_answer()) is not None:
        for bias in _output_biases(model, fresh):
            torch.nn.init.constant_(bias, answer)
    if part.quantization:
        prepare: Any = prepare_model_for_kbit_training
        model = prepare(model, use_gradient_checkpointing=False)  # the Trainer switches that on
    if recipe.training.gradient_checkpointing:
        model.config.use_cache = False
    mark_whole(model, whole_modules(recipe, model, fresh))
    return model, fresh


def load_checkpoint(part: ModelPart, task: Task, processor: Any) -> tuple[Any, dict[str, Any]]:
    """Base model with the task's head, and transformers' report of what the checkpoint lacked.

    Raises:
        RecipeError: The model does not read a field of `model.config`.
    """
    loading, source = loading_arguments(part), part.resolve()
    where = {key: loading[key] for key in ("revision", "gguf_file") if key in loading}
    config = AutoConfig.from_pretrained(source, **where, **task.head(processor))
    undeclared = [name for name in part.config if not hasattr(config, name)]
    for name, value in part.config.items():  # as a keyword of the model, a field that its config lacks is an error
        setattr(config, name, value)
    model, report = task.auto_class.from_pretrained(source, config=config, output_loading_info=True, **loading)
    code = inspect.getsource(sys.modules[type(model).__module__])
    for name in undeclared:
        if not re.search(rf"\b{re.escape(name)}\b", code):
            fields = set(config.to_dict()) - {name}
            raise RecipeError(f"model.config.{name}: {suggest(name, fields, f'fields of {type(config).__name__}')}")
    return model, report


def lora_config(recipe: Recipe, task: Task, model: Any, fresh: list[str]) -> LoraConfig:
    """The recipe's LoraConfig; new modules are trained whole, and LoRA leaves them alone."""
    fields = {**DEFAULT_LORA, **recipe.lora}
    if "r" not in recipe.lora and recipe.adalora is not None and recipe.adalora.target_rank is not None:
        fields["r"] = initial_rank(recipe.adalora.target_rank)
    saved = fields.get("modules_to_save") or fresh
    fields.setdefault("modules_to_save", [n for n in fresh if n not in PEFT_SAVES.get(task.peft_type, ())] or None)
    if "exclude_modules" not in fields:
        inside = tuple(f"{name}." for name in saved)
        hit = [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
            and (name in saved or name.startswith(inside))
            and _is_target(name, fields["target_modules"])
        ]
        if hit and not (task.peft_type == "SEQ_CLS" and set(hit) <= {"classifier", "score"}):  # PEFT leaves those out
            fields["exclude_modules"] = hit
    return LoraConfig(task_type=task.peft_type, **fields)


def loading_arguments(part: ModelPart) -> dict[str, Any]:
    """What `from_pretrained` is told beside the name.

    `dtype: auto` keeps the checkpoint's on a GPU and is float32 on a CPU, where half precision is slow.
    """
    if part.dtype == "auto":
        dtype: Any = "auto" if torch.cuda.is_available() else torch.float32
    else:
        dtype = getattr(torch, part.dtype)
    loading: dict[str, Any] = {"dtype": dtype, "ignore_mismatched_sizes": True}  # `load_base` looks at what they are
    for key, value in (
        ("revision", part.revision),
        ("gguf_file", part.gguf_file),
        ("attn_implementation", part.attention),
    ):
        if value:
            loading[key] = value
    if part.quantization:
        loading["quantization_config"] = quantization(part.quantization)
    return loading


def quantization(kind: str) -> Any:
    """Bitsandbytes settings: 4 bits as NF4 with doubly quantised constants (as QLoRA), or 8 bits.

    Raises:
        RecipeError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"model.quantization={kind!r} needs bitsandbytes: pip install bitsandbytes")
    settings: Any = BitsAndBytesConfig
    if kind == "8bit":
        return settings(load_in_8bit=True)
    compute = torch.bfloat16 if not torch.cuda.is_available() or torch.cuda.is_bf16_supported() else torch.float16
    return settings(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def fresh_modules(model: Any, missing: Any) -> list[str]:
    """Modules whose weights the checkpoint lacks: heads as a whole, inner ones singly."""
    names = set()
    for key in missing:
        parts = key.split(".")
        inner = parts[0] == model.base_model_prefix and len(parts) > 2
        names.add(".".join(parts[:-1]) if inner else parts[0])
    known = dict(model.named_modules())
    return sorted(name for name in names if name in known)


def _other_heads(model: Any, mismatched: Any) -> list[str]:
    """Parameters of a head that the checkpoint has in another size: it answers another question, and is made anew.

    Raises:
        RecipeError: A parameter below the head has another size.
    """
    prefix = model.base_model_prefix
    keys = []
    for key, stored, wanted in mismatched:
        if not hasattr(model, prefix) or key.split(".")[0] == prefix:
            raise RecipeError(
                f"model.config: {key} is {tuple(stored)} in the checkpoint and {tuple(wanted)} in the model; leave out "
                "of model.config what changes sizes"
            )
        keys.append(key)
    return keys


def whole_modules(recipe: Recipe, model: Any, fresh: list[str]) -> list[str]:
    """Full names of modules that are trained whole: new ones, and those of `lora.modules_to_save`."""
    named = tuple(recipe.lora.get("modules_to_save") or ())
    saved = [name for name, _ in model.named_modules() if named and name.endswith(named)]  # as PEFT finds them
    return sorted({*fresh, *saved})


def trainable(model: Any) -> int:
    """Parameters that training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def adapter_parameters(model: Any) -> int:
    """Parameters of the adapter's factors, without a head that is saved beside them."""
    return sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)


def _output_biases(model: Any, fresh: list[str]) -> list[torch.nn.Parameter]:
    """Biases of the layers in new modules whose one output is the answer."""
    layers = (layer for name in fresh for layer in model.get_submodule(name).modules())
    return [
        layer.bias
        for layer in layers
        if isinstance(layer, torch.nn.Linear) and layer.out_features == 1 and layer.bias is not None
    ]


def _is_target(name: str, target: Any) -> bool:
    if target == "all-linear":
        return True
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == leaf or name.endswith(f".{leaf}") for leaf in target or ())


def _forget_gguf(model: Any) -> None:
    """The weights are plain ones after loading; nothing later may take the model for a quantised one."""
    for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
