"""What is saved is a plain adapter of the live model."""

import copy

import torch
from peft import PeftModel


def assert_saved_equals_live(model, base, inputs, folder):
    """Plain PEFT on a pristine base computes what the live model does."""
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    model.eval()
    with torch.no_grad():
        assert (loaded(**inputs).logits - model(**inputs).logits).abs().max() < 1e-4
