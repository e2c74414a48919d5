"""PEFT's own initialisations under an adaptive adapter: what composes works, what cannot is refused."""

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights

import adalora
from adalora.errors import AttachError
from helpers.toys import NAMES, Blocks, adamw, batch, train

STEPS = 30


def started(start):
    torch.manual_seed(1)
    settings = {"r": 6, "lora_alpha": 12, "target_modules": NAMES}
    if start != "eva":
        return get_peft_model(Blocks(), LoraConfig(init_lora_weights=start, **settings))
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), **settings)
    model = get_peft_model(Blocks(), config, low_cpu_mem_usage=True)
    rows = [{"x": batch(step)[0]} for step in range(20)]
    initialize_lora_eva_weights(
        model, rows, forward_fn=lambda m, b: m(b["x"]), prepare_model_inputs_fn=None, show_progress_bar=False,
        prepare_layer_inputs_fn=lambda layer_input, model_input, name: layer_input[0].contiguous(),
    )  # fmt: skip
    return model


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "eva"])
def test_starts_that_leave_the_base_alone_are_trained_saved_and_loaded(start, tmp_path):
    model = started(start)
    x, _ = batch(0)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), Blocks()(x), atol=1e-5, rtol=1e-5)
    controller = adalora.attach(model, target_rank=2, total_steps=STEPS)
    losses = train(model, adamw(model), STEPS)
    controller.finalize()
    assert controller.live == 2 * len(controller.handles)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(Blocks(), tmp_path)
    torch.testing.assert_close(loaded(x), model(x), atol=1e-5, rtol=1e-5)


def test_evas_directions_are_kept_at_the_start():
    model = started("eva")
    rows = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name}
    adalora.attach(model, target_rank=2, total_steps=STEPS)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            cosine = torch.nn.functional.cosine_similarity(p, rows[name], dim=1)
            torch.testing.assert_close(cosine, torch.ones_like(cosine))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_starts_that_change_the_base_are_refused_with_what_to_use(start):
    with pytest.raises(AttachError, match=f"init_lora_weights='{start}' changes the base weights.*GradientSketch"):
        adalora.attach(started(start), target_rank=2, total_steps=STEPS)
