"""Small random models of every family, with inputs and sensible target modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        build: Makes the base model.
        inputs: Makes one batch.
        lora: What LoraConfig gets beside the rank.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    lora: dict[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})


class Plain(nn.Module):
    """A module that comes from no library."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.mix = nn.GRUCell(16, 16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(1)
        return self.down(torch.tanh(self.up(self.mix(x))))


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 50, (2, 7))}


def images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def noisy() -> dict[str, Any]:
    return {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([3, 7])}


def encoder(kind: str, **more: Any) -> Family:
    """A sequence classifier; PEFT trains its head whole."""
    config = getattr(hf, f"{kind}Config")(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **more
    )
    build = getattr(hf, f"{kind}ForSequenceClassification")
    return Family(lambda: build(config), tokens, {"target_modules": "all-linear", "task_type": "SEQ_CLS"})


def decoder(kind: str, **more: Any) -> Family:
    """A causal language model with grouped queries where the family has them."""
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(hf, f"{kind}Config")(
        **shape, intermediate_size=24, num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more
    )
    lora = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return Family(lambda: getattr(hf, f"{kind}ForCausalLM")(config), tokens, lora)


def mixtral() -> Family:
    """Experts are one fused parameter each, which LoRA layers of one module do not cover: attention is adapted."""
    if hf.__version__.startswith("5.0."):
        pytest.skip("stock PEFT cannot load any adapter of a Mixtral there: WeightRenaming.convert(loading_info=…)")
    family = decoder("Mixtral", num_local_experts=3, num_experts_per_tok=2)
    return Family(family.build, tokens, {"target_modules": ATTENTION, "task_type": "CAUSAL_LM"})


def gpt2() -> Family:
    config = hf.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    lora = {"target_modules": "all-linear", "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    return Family(lambda: hf.GPT2LMHeadModel(config), tokens, lora)


def both() -> dict[str, Any]:
    return {**tokens(), "decoder_input_ids": torch.randint(3, 50, (2, 5))}


def t5() -> Family:
    config = hf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    lora = {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}
    return Family(lambda: hf.T5ForConditionalGeneration(config), both, lora)


SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def bart() -> Family:
    config = hf.BartConfig(**SEQ2SEQ, max_position_embeddings=16)
    lora = {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}
    return Family(lambda: hf.BartForConditionalGeneration(config), both, lora)


def whisper() -> Family:
    config = hf.WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=10, max_target_positions=16)

    def batch() -> dict[str, Any]:
        return {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.randint(3, 50, (2, 5))}

    return Family(lambda: hf.WhisperForConditionalGeneration(config), batch)


VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
}


def vit() -> Family:
    config = hf.ViTConfig(**VISION, num_labels=3)
    early = ["query", "key", "value", "dense"]  # the names up to transformers 5.0
    lora = {"target_modules": [*ATTENTION, "fc1", "fc2", *early], "modules_to_save": ["classifier"]}
    return Family(lambda: hf.ViTForImageClassification(config), images, lora)


def clip() -> Family:
    text = {**VISION, "vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return Family(lambda: hf.CLIPModel(config), lambda: {**tokens(), **images()})


def unet(*targets: str) -> Family:
    diffusers = pytest.importorskip("diffusers")

    def build() -> nn.Module:
        return diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
        )

    return Family(build, noisy, {"target_modules": list(targets)})


def dit() -> Family:
    diffusers = pytest.importorskip("diffusers")

    def build() -> nn.Module:
        return diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=3,
            out_channels=3,
            num_layers=2,
            sample_size=8,
            norm_num_groups=1,
            num_embeds_ada_norm=20,
        )

    def batch() -> dict[str, Any]:
        rows = noisy()
        return {
            "hidden_states": rows["sample"],
            "timestep": rows["timestep"],
            "class_labels": torch.tensor([0, 1]),
        }

    return Family(build, batch, {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]})


def plain() -> Family:
    return Family(Plain, lambda: {"tokens": torch.randint(0, 50, (2, 7))}, {"target_modules": ["embed", "up", "down"]})


FAMILIES: dict[str, Callable[[], Family]] = {
    "BERT": lambda: encoder("Bert"),
    "RoBERTa": lambda: encoder("Roberta", max_position_embeddings=20),
    "DeBERTa-v2": lambda: encoder("DebertaV2"),
    "DeBERTa-v3": lambda: encoder(
        "DebertaV2",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_buckets=8,
        position_biased_input=False,
    ),
    "MPNet": lambda: encoder("MPNet", max_position_embeddings=20),
    "GPT-2": gpt2,
    "Llama": lambda: decoder("Llama"),
    "Qwen3": lambda: decoder("Qwen3", head_dim=8),
    "Gemma": lambda: decoder("Gemma", head_dim=8),
    "Mistral": lambda: decoder("Mistral", head_dim=8),
    "Phi": lambda: decoder("Phi"),
    "Mixtral": mixtral,
    "T5": t5,
    "BART": bart,
    "Whisper": whisper,
    "ViT": vit,
    "CLIP": clip,
    "UNet, attention": lambda: unet("to_q", "to_k", "to_v", "to_out.0"),
    "UNet, convolutions": lambda: unet("conv1", "conv2"),
    "DiT": dit,
    "plain module": plain,
}
