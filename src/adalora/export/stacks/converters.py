"""What converters and local engines compute with an adapter folder."""

from __future__ import annotations

import json

from adalora.export.reading import rank_and_scale
from adalora.export.stacks.served import Effective, Served, plain_scale, refuse


def llama_cpp(served: Served) -> Effective:
    """llama.cpp after convert_lora_to_gguf.py: global alpha over each tensor's own rank.

    rsLoRA and patterns are ignored; an alpha of 0 means scale 1.
    """
    refuse(served.adalora, "lora_E: 'Unexpected name'")
    refuse(served.convolutions, "no LoRA on convolutions")
    known = ("_layernorm", ".norm", ".base_layer.")
    other = [key for key in served.extras if not any(part in key for part in known)]
    refuse(other, f"{other[0] if other else ''}: 'Not a lora_A or lora_B tensor'")
    return served.scaled(lambda _, rank: served.alpha / rank if served.alpha else 1.0)


def ollama(served: Served) -> Effective:
    """Ollama: llama.cpp's rule; the JSON's alpha is read into an unsigned integer."""
    alpha = served.config.get("lora_alpha")
    refuse(type(alpha) is not int or alpha < 0, f"lora_alpha={alpha!r} is no unsigned integer")
    return llama_cpp(served)


def olive(served: Served) -> Effective:
    """Olive's convert-adapters: global alpha/r (or α/√r) on tensors named lora_B, patterns ignored."""
    refuse(served.adalora, "lora_E: no plain LoRA config")
    refuse(served.convolutions, "matrices only")
    scale = plain_scale(served, served.rank, knows_rslora=True)
    return served.scaled(lambda name, _: 1.0 if name in served.embeddings else scale)


def onnxruntime_genai(served: Served) -> Effective:
    """ONNX Runtime GenAI's model builder: loads with PEFT and multiplies lora_B by PEFT's scaling."""
    refuse(served.adalora or served.config.get("peft_type") != "LORA", "peft_type must be LORA")
    refuse(served.embeddings or served.convolutions, "LoRA on MatMul only")
    return served.scaled(lambda name, _: rank_and_scale(served.config, name)[1])


def diffusers(served: Served) -> Effective:
    """The load_lora_adapter of diffusers: scale 1, or PEFT's where the file's header holds the config."""
    refuse(served.adalora, "lora_E: unexpected keys")
    refuse(served.embeddings, "keys of an embedding are not read")
    text = served.metadata.get("lora_adapter_metadata")
    if text is None:
        grouped = [name for name, groups in served.convolutions.items() if groups > 1]
        refuse(grouped, f"{grouped[:1]} has groups: its rank is read off lora_B, which has r / groups columns")
        return served.scaled(lambda _, __: 1.0)
    config = json.loads(text)
    return served.scaled(lambda name, _: rank_and_scale(config, name)[1])
