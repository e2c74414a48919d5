"""The models and methods that are compared: shapes of real models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import adalora

BERT_LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE = 1e-3
WARMUP, FINAL = 0.12, 0.48  # of the steps, in every method's run: our defaults
CPU = torch.device("cpu")
METHODS = ("lora", "peft_adalora", "ours")


@dataclass(frozen=True)
class Shape:
    """Layers and widths of a model, and what it is fed."""

    name: str
    layers: int = 6
    hidden: int = 384
    heads: int = 12
    intermediate: int = 1536
    kv_heads: int | None = None
    vocabulary: int = 1000
    llama: bool = False
    batch: int = 8
    length: int = 64

    @property
    def modules(self) -> int:
        """Adapted Linears."""
        return self.layers * (len(LLAMA_LINEARS) if self.llama else len(BERT_LINEARS))

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.length


MINILM = Shape("MiniLM")
BERT_BASE = Shape("BERT-base", layers=12, hidden=768, intermediate=3072)
# A Llama of 1B in its real shape, for counts on `meta`; and a narrow copy, whose counts are the same.
LLAMA_1B = Shape(
    "Llama-1B",
    layers=16,
    hidden=2048,
    heads=32,
    kv_heads=8,
    intermediate=8192,
    vocabulary=128_256,
    llama=True,
    batch=2,
    length=8,
)
NARROW_LLAMA = {"hidden": 64, "intermediate": 256, "vocabulary": 1000}
LLAMA_1B_NARROW = replace(LLAMA_1B, **NARROW_LLAMA)


def base_model(shape: Shape, *, seed: int = 0) -> torch.nn.Module:
    """A model of this shape."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": max(512, shape.length),
    }
    if shape.llama:
        more = {"num_key_value_heads": shape.kv_heads, "tie_word_embeddings": True, "use_cache": False}
        return LlamaForCausalLM(LlamaConfig(**sizes, **more))
    return BertForSequenceClassification(BertConfig(**sizes))


@lru_cache(maxsize=256)  # no step of a GPU's waits for its words
def batch(shape: Shape, step: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random words, the same for every method."""
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(0, 1000, (shape.batch, shape.length), generator=generator).to(device)
    labels = words if shape.llama else words[:, 0] % 2
    inputs = {"input_ids": words, "labels": labels}
    if device.type == "cpu":  # on a GPU transformers would ask the device whether it is all ones
        inputs["attention_mask"] = torch.ones_like(words)
    elif device.type == "meta" and shape.llama:  # of a mask of this shape transformers asks nothing
        inputs["attention_mask"] = torch.zeros(shape.batch, 1, shape.length, shape.length, device=device)
    return inputs


@dataclass
class Training:
    """One method on one model, a step at a time."""

    method: str
    shape: Shape
    model: Any
    optimizer: torch.optim.Optimizer
    after_step: Callable[[], None]
    controller: Any = None
    device: torch.device = CPU
    autocast: torch.dtype | None = None

    def gradients(self, step: int) -> None:
        """Forward and backward."""
        self.loss(batch(self.shape, step, self.device)).backward()

    def loss(self, inputs: dict[str, Any]) -> Any:
        """Forward alone."""
        if self.autocast is None:
            return self.model(**inputs).loss
        with torch.autocast(self.device.type, dtype=self.autocast):
            return self.model(**inputs).loss

    def step(self, step: int) -> None:
        """A whole training step."""
        self.gradients(step)
        self.optimizer.step()
        self.after_step()
        self.optimizer.zero_grad()

    def skip_to(self, phase: str) -> None:
        """Train on next to nothing until ours is in a phase; others do nothing."""
        small = replace(self, shape=replace(self.shape, batch=1, length=4))
        while self.controller is not None and (
            self.controller.phase != phase
            or (phase == "final" and self.controller.schedule.allocates(self.controller.step))
        ):
            small.step(0)


def let_step(runs: dict[str, Training], name: str) -> None:
    """Keep our hook from looking at the steps of another method, `name`, which would be charged to it."""
    for other, run in runs.items():
        if run.controller is not None:
            run.controller.finished = other != name


def training(
    method: str,
    shape: Shape,
    *,
    rank: int = 8,
    initial: int | None = None,
    steps: int = 1000,
    dropout: float = 0.0,
    device: torch.device = CPU,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> Training:
    """A method ready to train.

    Args:
        method: "lora" (PEFT's, of the target rank), "peft_adalora" or "ours" (both from `initial`).
        shape: The model.
        rank: Target rank.
        initial: Initial rank; by default 1.5 times the target, as in the paper.
        steps: Length of the run: 12 % warm-up, 40 % decrease, 48 % final phase.
        dropout: Of the adapter.
        device: Where the model lies.
        autocast: Type of mixed precision, if any.
        **options: For `adalora.attach`.
    """
    with device:
        base = base_model(shape)
    targets = LLAMA_LINEARS if shape.llama else BERT_LINEARS
    initial = rank + rank // 2 if initial is None else initial
    if method == "peft_adalora":
        interval = options.get("allocation_interval", max(1, steps // 100))
        config: Any = PeftAdaLoraConfig(
            init_r=initial,
            target_r=rank,
            tinit=round(WARMUP * steps),
            tfinal=round(FINAL * steps),
            deltaT=interval,
            total_step=steps,
            lora_alpha=2 * rank,
            lora_dropout=dropout,
            target_modules=targets,
        )
    else:
        config = LoraConfig(
            r=rank if method == "lora" else initial, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=targets
        )
    model = get_peft_model(base, config).train()
    if device.type == "meta" and method == "ours":  # attaching reads the adapter's values
        give_values(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    run = Training(method, shape, model, optimizer, lambda: None, device=device, autocast=autocast)
    if method == "ours":  # its own hook on the optimizer does the rest
        run.controller = adalora.attach(model, target_rank=rank, total_steps=steps, **options)
    elif method == "peft_adalora":
        taken = iter(range(10**9))
        run.after_step = lambda: model.base_model.update_and_allocate(next(taken))
    return run


def give_values(model: torch.nn.Module) -> None:
    """Values for the adapter of a model on `meta`: LoRA's own start, on the CPU."""
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "reset_lora_parameters"):
            module.lora_A.to_empty(device="cpu")
            module.lora_B.to_empty(device="cpu")
            for adapter in module.lora_A:
                module.reset_lora_parameters(adapter, True)
