"""The literal oracle beside a run on a CUDA device: scores, masks and weights of every step.

On the CPU every mode of the method is compared, see `test_oracle_parity.py`; here the ones that take other kernels.
"""

import pytest
import torch
from test_oracle_parity import MODES, Run

NAMES = [
    "float32_lora",
    "float32_svd",
    "bfloat16_lora",
    "bfloat16_svd",
    "compact_lora",
    "compact_at_svd",
    "no_revival_lora",
    "reorthonormalize_svd",
    "bad_gradients_lora",
    "every_kind_of_layer_lora",
    "every_kind_of_layer_svd",
    "paper",
    "released",
]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore::adalora.errors.AdaLoraWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_run_on_cuda_and_the_oracle_agree_at_every_step(name):
    run = Run(MODES[name], "cuda")
    run.go()
    assert run.controller.step == run.oracle.total
    assert run.near_ties <= 0.1 * len(run.decisions)
    assert len(run.masks) > 1
