"""Small models and a training loop that the tests of the method share."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Blocks(nn.Module):
    """Two blocks of three layers of unequal size and a head, named as transformers name theirs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(8, 8), "up": nn.Linear(8, 20), "down": nn.Linear(20, 8)})
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.layers:
            x = x + torch.tanh(block["query"](x))
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


NAMES = ["query", "up", "down", "head"]


def lora(*, r=6, alpha=12, targets=NAMES, base=Blocks, **settings):
    """A LoRA model with the same start every time."""
    torch.manual_seed(1)
    return get_peft_model(base(), LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets), **settings))


def adamw(model, **settings):
    """AdamW on what is trainable."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2, **settings})


def batch(step, *, dtype=torch.float32):
    """Inputs and targets of one step, the same in every run."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 8, generator=generator)
    return x.to(dtype), torch.stack([x[:, 0] * x[:, 1], x[:, 2], x[:, 3].abs()], dim=1).to(dtype)


def train(model, optimizer, steps, *, start=0, dtype=torch.float32):
    """Train; returns the losses."""
    losses = []
    for step in range(start, start + steps):
        x, y = batch(step, dtype=dtype)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
