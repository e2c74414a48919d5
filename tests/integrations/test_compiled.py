"""torch.compile: the eager run, without a new graph for a mask; resumed bit for bit."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_adapter import assert_saved_equals_live
from torch import nn

import adalora
from helpers.oldest import compiled_models
from helpers.tiny_bert import Tokens, bert


@compiled_models
@pytest.mark.filterwarnings("ignore")
def test_torch_compile(tmp_path):
    """Masking does not recompile; the model shrinks and goes on; the result is that of the eager model."""
    inputs = Tokens(8).inputs
    labels = (inputs[:, 0] > 50).long()

    def begin(compiled):
        torch.manual_seed(2)
        model = get_peft_model(bert(), LoraConfig(r=6, lora_alpha=12, target_modules=["query", "value", "dense"]))
        controller = adalora.attach(model, target_rank=2, total_steps=20, allocation_interval=1)
        return model, controller, torch.compile(model, backend="aot_eager") if compiled else model

    def adamw(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)

    def train(controller, forward, optimizer, until):
        losses, counts = [], []
        while controller.step < until:
            torch.manual_seed(100 + controller.step)  # dropout
            outputs, before = forward(input_ids=inputs, labels=labels), controller.step
            task = nn.functional.cross_entropy(outputs.logits, labels)
            assert outputs.loss.item() == pytest.approx(task.item(), abs=1e-6)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert controller.step == before + 1
            losses.append(outputs.loss.item())
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return losses, counts

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, controller, forward = begin(compiled=True)
    optimizer = adamw(model)
    first, counts = train(controller, forward, optimizer, 5)
    saved = copy.deepcopy({"adalora": controller.state_dict(), "optimizer": optimizer.state_dict()})
    rest, more = train(controller, forward, optimizer, 20)
    counts += more
    end = controller.schedule.decrease_end
    assert controller.allocations > 3
    assert end > 5
    assert counts[1] == counts[end]  # masks: no new graph
    assert controller.live == sum(h.rank for h in controller.handles) == controller.target_budget

    again, its_controller, its_forward = begin(compiled=True)
    its_controller.load_state_dict(saved["adalora"])
    its_optimizer = adamw(again)
    its_optimizer.load_state_dict(saved["optimizer"])
    assert train(its_controller, its_forward, its_optimizer, 20)[0] == rest
    assert its_controller.ranks == controller.ranks

    plain, its_controller, _ = begin(compiled=False)
    eager, _ = train(its_controller, plain, adamw(plain), 20)
    assert torch.allclose(torch.tensor(first + rest), torch.tensor(eager), atol=1e-3)
    assert_saved_equals_live(model, bert(), {"input_ids": inputs}, tmp_path / "adapter")
