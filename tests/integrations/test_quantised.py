"""Quantised bases, and optimizers whose moments are quantised."""

import io

import pytest
import torch
from llamas import llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import adalora
from adalora.errors import AdaLoraWarning
from helpers.oldest import needs


@needs("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_bases(tmp_path, bits):
    """A base quantised by bitsandbytes."""
    llama(width=128).save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)

    def base():
        return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, device_map="cpu")

    quantised(base, tmp_path)


@needs("torchao")
@pytest.mark.filterwarnings("ignore")
def test_torchao_base(tmp_path):
    """A base quantised by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # warns of the machine it finds itself on

    def base():
        model = llama()
        quantize_(model.model, Int8WeightOnlyConfig())
        return model

    quantised(base, tmp_path)


def quantised(base, folder):
    """Train on a quantised base, interrupted and not; the saved adapter on another copy of the base is the live one."""
    tokens, moment = torch.randint(4, 64, (4, 10)), 9

    def begin():
        torch.manual_seed(6)
        model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
        return model, adalora.attach(model, target_rank=2, total_steps=16, allocation_interval=1)

    def adamw(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def train(model, controller, optimizer, until):
        losses = []
        while controller.step < until:
            outputs = model(input_ids=tokens, labels=tokens)
            task = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
            assert outputs.loss.item() == pytest.approx(task.item(), abs=1e-5)
            before = controller.step
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert controller.step == before + 1
            losses.append(outputs.loss.item())
        return losses

    model, controller = begin()
    optimizer = adamw(model)
    losses = train(model, controller, optimizer, moment)
    torch.save({"adalora": controller.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state")
    again, its_controller = begin()
    saved = torch.load(folder / "state", weights_only=True)
    its_controller.load_state_dict(saved["adalora"])
    its_optimizer = adamw(again)
    its_optimizer.load_state_dict(saved["optimizer"])
    losses += train(model, controller, optimizer, 16)
    assert train(again, its_controller, its_optimizer, 16) == losses[moment:]
    controller.finalize()
    its_controller.finalize()
    assert losses[-1] < losses[0]
    assert controller.live == sum(h.rank for h in controller.handles) == controller.target_budget
    model.save_pretrained(folder / "adapter")
    loaded = PeftModel.from_pretrained(base(), folder / "adapter")
    others = [dict(loaded.named_modules()), dict(again.named_modules())]
    # By ΔW: on a CPU, bitsandbytes' 4-bit base itself computes otherwise after a backward pass, without any adapter.
    for name, module in model.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            for other in others:
                assert torch.equal(module.get_delta_weight("default"), other[name].get_delta_weight("default"))


@needs("torchao")
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
@pytest.mark.filterwarnings("ignore")
def test_torchaos_optimizers_train_masked(name):
    """Their packed moments cannot be cut: said once; the target is reached, and a resumed run goes on bit for bit."""
    from torchao import optim

    torch.compiler.set_stance("force_eager")  # they compile every step
    try:
        masked_run(getattr(optim, name))
    finally:
        torch.compiler.set_stance("default")


def masked_run(kind, steps=16, moment=11):
    inputs = torch.randn(8, 1024)

    def begin():
        torch.manual_seed(0)  # 8 · 1024 entries: from 4096 on they are quantised
        net = nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 4))
        model = get_peft_model(net, LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"]))
        return model, adalora.attach(model, target_rank=2, total_steps=steps, allocation_interval=1)

    def optimizer_of(model):
        return kind([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def train(model, controller, optimizer, until):
        while controller.step < until:
            (model(inputs) - inputs[:, :4]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, controller = begin()
    optimizer = optimizer_of(model)
    with pytest.warns(AdaLoraWarning, match=rf"stay in memory, masked: {kind.__name__} keeps 'exp_avg'") as said:
        train(model, controller, optimizer, moment)
    assert len([w for w in said if issubclass(w.category, AdaLoraWarning)]) == 1
    assert controller.schedule.decrease_end < moment
    file = io.BytesIO()
    torch.save({"adalora": controller.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(model, controller, optimizer, steps)
    again, its_controller = begin()
    its_controller.load_state_dict(saved["adalora"])
    its_optimizer = optimizer_of(again)
    its_optimizer.load_state_dict(saved["optimizer"])
    train(again, its_controller, its_optimizer, steps)
    assert controller.live == controller.target_budget == 4
    assert [h.rank for h in controller.handles] == [8, 8]
    for h, other in zip(controller.handles, its_controller.handles):
        assert not h.P_or[:, ~h.mask].any()
        assert torch.equal(h.P_or, other.P_or)
        assert torch.equal(h.Q_ri, other.Q_ri)
