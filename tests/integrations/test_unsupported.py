"""What cannot be trained with is refused at once, and the page says so.

More of it in `tests/lora/processes/test_engines.py`.
"""

import types
import warnings

import pytest
from bert_runs import lora, make
from lightning.pytorch import strategies

import adalora
from adalora.errors import ConfigError
from adalora.integrations.lightning import AdaLoraLightning
from adalora.lora.processes.engines import REFUSED_STRATEGIES
from helpers.docs_blocks import ROOT


def test_deepspeed_is_refused_at_once(tmp_path):
    """With the reason and what to do instead."""
    trainer, _ = make(tmp_path)
    trainer.args.deepspeed = "ds.json"
    callback = adalora.AdaLoraCallback(target_rank=2)
    with pytest.raises(adalora.AdaLoraError, match=r"DeepSpeed is not supported: its engine steps .* FSDP2"):
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=lora())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert adalora.controllers(trainer.model)


class DeepSpeedStrategy:
    """Lightning's own cannot be made without DeepSpeed."""


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, strategies.FSDPStrategy, strategies.ModelParallelStrategy])
def test_lightnings_strategies(kind):
    callback = AdaLoraLightning(target_rank=2)
    trainer = types.SimpleNamespace(strategy=kind())
    message = (
        "DeepSpeed is not supported: .*FSDP2"
        if kind is DeepSpeedStrategy
        else rf"Lightning's {kind.__name__} is not supported: .*'ddp'"
    )
    with pytest.raises(ConfigError, match=message):
        callback.setup(trainer, None, "fit")


def test_the_page_lists_what_is_refused():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = page[page.index("## What is not supported") :]
    for name in ("DeepSpeed", "FSDP1", "Megatron-LM", *REFUSED_STRATEGIES):
        assert f"{name}" in table
