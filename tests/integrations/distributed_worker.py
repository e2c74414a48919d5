"""What each of two processes runs under DDP, begun by `launching.serve`; rank 0 writes the results.

Usage: python distributed_worker.py FOLDER CASE …
"""

import copy

import lightning.pytorch as lightning
import torch
import torch.distributed as dist
from launching import gathered, serve
from lightning_runs import lightning_module
from net_runs import STEPS, Net, attach, lora
from peft import PeftModel
from plain_adapter import assert_saved_equals_live
from torch.nn.parallel import DistributedDataParallel
from trainer_pairs import distance_to_saved, make_of_pair, still_losses

from adalora.errors import CompactionError
from adalora.integrations.lightning import AdaLoraLightning
from helpers.resuming import adamw
from helpers.tiny_bert import Tokens, bert

MOMENTS = [2, 4, 7, 9, 16, 25]


def checksum(model):
    return [float(p.detach().double().sum()) for n, p in model.named_parameters() if "lora_" in n]


def step(model, optimizer, number):
    """Every rank has data of its own."""
    generator = torch.Generator().manual_seed(1000 * dist.get_rank() + number)
    x, y = torch.randn(8, 8, generator=generator), torch.randn(8, 4, generator=generator)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def raw(folder, *, careless):
    """Plain DDP; careless: gradients of some steps are not averaged, so that scores differ between ranks."""
    model = lora()
    controller = attach(model)
    wrapped = DistributedDataParallel(model)
    optimizer = adamw(model)
    for number in range(STEPS):
        if careless and controller.phase == "decrease" and number % 2:
            with wrapped.no_sync():
                step(wrapped, optimizer, number)
        else:
            step(wrapped, optimizer, number)
        assert len({tuple(r.values()) for r in gathered(controller.ranks)}) == 1, number
    in_memory = sum(h.rank for h in controller.handles)
    same_before = gathered(checksum(model))
    controller.finalize()
    refused = ""
    try:
        step(wrapped, optimizer, 0)
    except CompactionError as error:
        refused = str(error)
    with torch.no_grad():
        wrapped(torch.randn(2, 8))
    again = DistributedDataParallel(model)
    for number in range(3):
        step(again, optimizer, 50 + number)
    return {
        "in_memory": in_memory,
        "initial": controller.initial_budget,
        "after": sum(h.rank for h in controller.handles),
        "target": controller.target_budget,
        "same_before": same_before,
        "same_after": gathered(checksum(model)),
        "ranks": gathered(controller.ranks),
        "refused": refused,
    }


def environment(folder):
    """The hook once per step, the loss that of the saved adapter in stock PEFT, before and after the run's end."""
    model = lora()
    controller = attach(model)
    wrapped = DistributedDataParallel(model)
    optimizer = adamw(model)
    for number in range(STEPS):
        assert controller.step == number
        step(wrapped, optimizer, number)
        if number in (3, 11, STEPS - 1):
            check_saved(model, wrapped, folder / f"adapter{number}")
    controller.finalize()
    check_saved(model, model, folder / "adapter")
    return {"steps": controller.step, "ranks": gathered(controller.ranks), "target": controller.target_budget}


def check_saved(model, called, folder):
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    torch.manual_seed(1)
    stock = PeftModel.from_pretrained(Net(), folder).eval()
    x, y = torch.randn(7, 8), torch.randn(7, 4)
    called.eval()
    with torch.no_grad():
        loss, wanted = ((m(x) - y).square().mean() for m in (called, stock))
        assert abs(float(loss - wanted)) < 1e-6
        assert (called(x) - stock(x)).abs().max() < 1e-5
    called.train()


def resumed(folder):
    """Interrupted before, between and at masks and after the last: bit for bit the run that was left alone."""

    def run(first, saved=None):
        model = lora()
        controller = attach(model)
        if saved is not None:
            controller.load_state_dict(saved["adalora"])
        wrapped, optimizer = DistributedDataParallel(model), adamw(model)
        if saved is not None:
            optimizer.load_state_dict(saved["optimizer"])
        states = {}
        for number in range(first, STEPS):
            if number in MOMENTS and saved is None:
                states[number] = copy.deepcopy(
                    {"adalora": controller.state_dict(), "optimizer": optimizer.state_dict()}
                )
            torch.manual_seed(1000 + number)  # dropout
            step(wrapped, optimizer, number)
        controller.finalize()
        return {name: p.detach().clone() for name, p in model.named_parameters()}, controller.ranks, states

    weights, ranks, states = run(0)
    for moment in MOMENTS:
        if dist.get_rank() == 0:
            torch.save(states[moment], folder / f"at{moment}")
        dist.barrier()
        found, its_ranks, _ = run(moment, torch.load(folder / f"at{moment}", weights_only=True))
        assert its_ranks == ranks, moment
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], value) for name, value in weights.items()), moment
    return {"moments": MOMENTS, "ranks": gathered(ranks)}


def through_trainer(folder):
    """Resumed from the middle; the checkpoint is the live model."""

    def make(name):
        return make_of_pair(folder / name, target_rank=1, ddp_find_unused_parameters=False)

    trainer, controller, watch = make("whole")
    trainer.train()
    difference = distance_to_saved(trainer, folder / "whole" / "checkpoint-16")
    resumed, its_controller, _ = make("resumed")
    dist.barrier()
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-8"))
    return {
        "world": trainer.args.world_size,
        "steps": watch.steps,
        "ranks": gathered(controller.ranks),
        "same": gathered(checksum(trainer.model)),
        "resumed": checksum(resumed.model),
        "resumed_ranks": its_controller.ranks,
        "target": controller.target_budget,
        "live": controller.live,
        "in_memory": sum(h.rank for h in controller.handles),
        "difference": difference,
        "losses": still_losses(folder, ddp_find_unused_parameters=False),
    }


def through_lightning(folder):
    """Its own DDP strategy; resumed in the middle it ends in the same weights."""

    class Save(lightning.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 6:
                trainer.save_checkpoint(folder / "saved.ckpt")

    def fit(path=None):
        lightning.seed_everything(1, verbose=False)
        callback = AdaLoraLightning(target_rank=2, allocation_interval=1, warmup=2, final=6)
        trainer = lightning.Trainer(
            max_steps=16, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, callbacks=[callback, Save()],
        )  # fmt: skip
        module = lightning_module(manual=False)
        trainer.fit(module, torch.utils.data.DataLoader(Tokens(256), batch_size=4), ckpt_path=path)
        return trainer, module, callback.controller

    trainer, module, controller = fit()
    if dist.get_rank() == 0:
        assert_saved_equals_live(module.model, bert(), {"input_ids": Tokens(8).inputs}, folder / "adapter")
    dist.barrier()
    _, resumed, its_controller = fit(folder / "saved.ckpt")
    return {
        "world": trainer.world_size,
        "steps": [trainer.global_step, controller.step],
        "ranks": gathered(controller.ranks),
        "same": gathered(checksum(module)),
        "resumed": checksum(resumed),
        "resumed_ranks": its_controller.ranks,
        "live": controller.live,
        "target": controller.target_budget,
    }


CASES = {
    "raw": lambda folder: raw(folder, careless=False),
    "careless": lambda folder: raw(folder, careless=True),
    "environment": environment,
    "resumed": resumed,
    "trainer": through_trainer,
    "lightning": through_lightning,
}

if __name__ == "__main__":
    serve(lambda case, folder: CASES[case](folder))
