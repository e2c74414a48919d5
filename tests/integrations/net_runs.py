"""A small network trained by a loop of one's own: model, adapter, steps."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import adalora

STEPS = 30


class Net(nn.Module):
    """Three layers in a row, with dropout from LoRA."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def lora():
    torch.manual_seed(1)
    config = LoraConfig(r=6, lora_alpha=12, lora_dropout=0.1, target_modules=["first", "second", "third"])
    return get_peft_model(Net(), config)


def attach(model, **settings):
    return adalora.attach(model, **{"target_rank": 1, "total_steps": STEPS, "allocation_interval": 3, **settings})


def one_step(model, optimizer, step, backward=lambda loss: loss.backward()):
    torch.manual_seed(1000 + step)
    x, y = torch.randn(16, 8), torch.randn(16, 4)
    loss = (model(x) - y).square().mean()
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
