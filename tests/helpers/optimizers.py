"""Optimizers that remember something of a parameter, each in its own way."""

from functools import partial

import pytest
import torch
import transformers

OPTIMIZERS = {
    "adamw_single": partial(torch.optim.AdamW, lr=1e-2, foreach=False),
    "adamw_foreach": partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "adamw_fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "adamw_amsgrad": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "sgd_momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "sgd": partial(torch.optim.SGD, lr=1e-2),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "adafactor_of_transformers": partial(
        transformers.Adafactor, lr=1e-2, beta1=0.9, scale_parameter=False, relative_step=False
    ),
}


def of_package(package, name, **settings):
    """An optimizer of a package that may be missing."""

    def make(parameters):
        return getattr(pytest.importorskip(package), name)(parameters, lr=1e-2, **settings)

    return make


OPTIMIZERS |= {
    "lion": of_package("lion_pytorch", "Lion"),
    "schedule_free_adamw": of_package("schedulefree", "AdamWScheduleFree", warmup_steps=3),
    "schedule_free_sgd": of_package("schedulefree", "SGDScheduleFree"),
    "8bit_adamw": of_package("bitsandbytes.optim", "AdamW8bit", min_8bit_size=1),
    "8bit_adamw_small_in_32": of_package("bitsandbytes.optim", "AdamW8bit", min_8bit_size=45),
    "8bit_lion": of_package("bitsandbytes.optim", "Lion8bit", min_8bit_size=1),
}
