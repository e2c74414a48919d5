"""Small models and adapters of every shape that real ones have."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

# PEFT asks transformers for a name that transformers has renamed; neither is ours.
FOREIGN_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(FOREIGN_WARNING))


SUFFIXES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
LAYERS = 3


def llama_config(**changes):
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(**changes)).eval()


def randomise(model, seed=1):
    """Give every LoRA matrix values, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def base_folder(tmp_path):
    folder = tmp_path / "base"
    llama().save_pretrained(folder)
    return folder


def save_lora(folder, model=None, **settings):
    """A PEFT LoRA adapter on the small llama; returns the live model."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": [s.split(".")[-1] for s in SUFFIXES], **settings}
    live = randomise(peft.get_peft_model(model if model is not None else llama(), peft.LoraConfig(**settings)))
    live.save_pretrained(folder)
    return live


# Ranks of a finished adaptive run: uneven, k_proj of layer 1 and most of the last layer without any.
RAGGED = {f"model.layers.{i}.{s}": 1 + (3 * i + j) % 5 for i in range(LAYERS) for j, s in enumerate(SUFFIXES)}
RAGGED["model.layers.1.self_attn.k_proj"] = 0
RAGGED.update({f"model.layers.2.{s}": 0 for s in SUFFIXES if s != "mlp.up_proj"})


def save_ragged(folder, base=None, scale=1.5, **config):
    """What a finished adaptive run saves: own rank and alpha for each module, rank 0 excluded."""
    import re

    live = {n: r for n, r in RAGGED.items() if r}
    top = max(live.values())
    settings = peft.LoraConfig(
        r=top,
        lora_alpha=int(scale * top) if (scale * top).is_integer() else scale * top,
        target_modules=[s.split(".")[-1] for s in SUFFIXES],
        rank_pattern={f"^{re.escape(n)}": r for n, r in live.items() if r != top},
        alpha_pattern={f"^{re.escape(n)}": scale * r for n, r in live.items() if r != top},
        exclude_modules="|".join(re.escape(n) for n, r in RAGGED.items() if not r),
        task_type="CAUSAL_LM",
        **config,
    )
    model = randomise(peft.get_peft_model(llama(), settings))
    if base is not None:
        model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return model


def save_files(folder, config, tensors):
    """An adapter folder from bare parts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, str(folder / "adapter_model.safetensors"))
    return folder


def tokens():
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def load_peft(folder, model=None):
    with warnings.catch_warnings():
        if json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "ADALORA":
            warnings.simplefilter("ignore")  # PEFT's, about every AdaLoRA file
        return _load_peft(folder, model)


def _load_peft(folder, model):
    return peft.PeftModel.from_pretrained(model if model is not None else llama(), str(folder)).eval()
