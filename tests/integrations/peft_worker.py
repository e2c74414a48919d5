"""What users of PEFT's AdaLoRA run into with several processes, for either kind; fails where it fails.

Usage: python peft_worker.py FOLDER CASE-KIND …
"""

import torch
import torch.distributed as dist
from launching import gathered, serve
from net_runs import Net
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import adalora
from helpers.tiny_bert import Tokens, bert

STEPS = 20


def adaptive(base, targets, kind, **more):
    """The model and what has to be called after every step."""
    torch.manual_seed(1)
    common = {"lora_alpha": 12, "target_modules": targets, **more}
    if kind == "ours":
        model = get_peft_model(base, LoraConfig(r=6, **common))
        adalora.attach(model, target_rank=2, total_steps=STEPS, allocation_interval=1, compact=False)
        return model, lambda step: None
    config = AdaLoraConfig(init_r=6, target_r=2, total_step=STEPS, tinit=2, tfinal=8, deltaT=1, **common)
    model = get_peft_model(base, config)
    return model, model.base_model.update_and_allocate


def kept(model, kind):
    """Which triplets are live, 1 or 0, of every module: not their number alone, which may agree by chance."""
    if kind == "ours":
        return [h.mask.int().tolist() for h in adalora.controllers(model)["default"].handles]
    return [(p != 0).int().flatten().tolist() for name, p in model.named_parameters() if ".lora_E." in name]


def train(model, called, after, *, backward, loss):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        torch.manual_seed(1000 * dist.get_rank() + step)
        backward(step, lambda: loss(called).backward())
        optimizer.step()
        after(step)
        optimizer.zero_grad()


def at_once(step, run):
    run()


def regression(called):
    return (called(torch.randn(8, 8)) - torch.randn(8, 4)).square().mean()


def sharded(kind):
    model, after = adaptive(Net(), ["first", "second", "third"], kind)
    fully_shard(model)
    train(model, model, after, backward=at_once, loss=regression)
    return {}


def no_sync(kind):
    model, after = adaptive(Net(), ["first", "second", "third"], kind)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)

    def backward(step, run):
        if step % 2:
            with wrapped.no_sync():
                run()
        else:
            run()

    seen = []

    def after_all(step):
        after(step)
        seen.append(kept(model, kind))

    train(model, wrapped, after_all, backward=backward, loss=regression)
    return {"kept": gathered(seen)}  # of every step: at the last one alone they may agree by chance


def reentrant(kind):
    base = bert()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    base.enable_input_require_grads()
    model, after = adaptive(base, ["query", "value"], kind, task_type="SEQ_CLS")
    wrapped = DistributedDataParallel(model)
    inputs = Tokens(8).inputs

    def loss(called):
        return called(input_ids=inputs, labels=(inputs[:, 0] > 50).long()).loss

    model.train()
    train(model, wrapped, after, backward=at_once, loss=loss)
    return {"kept": gathered(kept(model, kind))}


CASES = {"sharded": sharded, "no_sync": no_sync, "reentrant": reentrant}


def run(case, folder):
    name, _, kind = case.partition("-")
    return CASES[name](kind)


if __name__ == "__main__":
    serve(run)
