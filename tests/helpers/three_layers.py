"""Three Linear layers with LoRA, and a loop that trains them."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

RANK = 6


def base():
    """Three Linear layers, always the same."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4))


def lora(**settings):
    """A LoRA model on `base()` with scale 2 in every layer."""
    torch.manual_seed(2)
    config = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["0", "2", "4"], **settings}
    return get_peft_model(base(), LoraConfig(**config))


def run(model, optimizer, *, steps, seed):
    """Train on random data; returns the losses."""
    getattr(optimizer, "train", lambda: None)()
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x, y = torch.randn(16, 8, generator=generator), torch.randn(16, 4, generator=generator)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
