"""FSDP2 by Accelerate and by the Trainer in each of two processes; rank 0 writes the results.

Accelerate takes FSDP for GPUs alone, though all that it does then works on a CPU as well: `as_on_gpus` says that there
are some. Usage: python accelerate_worker.py FOLDER CASE …
"""

import contextlib
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from launching import gathered, serve
from net_runs import STEPS
from sharded_worker import attach, check_saved, delta_weights, lora, masks, mine, whole
from torch.distributed.tensor import DTensor
from trainer_pairs import distance_to_saved, make_of_pair, still_losses

import adalora
from adalora.integrations.accelerate import register
from adalora.integrations.fsdp import save_adapter
from helpers.resuming import adamw, told

FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}
MOMENTS = [2, 9, 17]


@contextlib.contextmanager
def as_on_gpus():
    original, environment = AcceleratorState.__init__, dict(os.environ)

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(environment)


def begin(*, efficient, state_dict_type):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Linear"],
        cpu_ram_efficient_loading=efficient, state_dict_type=state_dict_type,
    )  # fmt: skip
    model = lora()
    controller = attach(model)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.is_fsdp2
    model, optimizer = accelerator.prepare(model, adamw(model))
    register(accelerator, controller)
    return accelerator, model, optimizer, controller


def step(model, optimizer, number, *, part, backward):
    generator = torch.Generator().manual_seed(1000 + number)
    x, y = torch.randn(16, 8, generator=generator), torch.randn(16, 4, generator=generator)
    loss = (model(x[part]) - y[part]).square().mean()
    backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def through_accelerate(folder, **plugin):
    """The run of one process, by two; resumed by `load_state` at every kind of moment."""
    accelerator, model, optimizer, controller = begin(**plugin)
    assert all(isinstance(p, DTensor) for h in controller.handles for p, _ in h.factors.values())
    alone = lora()
    single = attach(alone, compact=False)
    its_optimizer = adamw(alone)
    losses, its_losses, agree, steps = [], [], [], []
    for number in range(STEPS):
        if number in MOMENTS:
            accelerator.save_state(folder / f"at_{number}")
        losses.append(sum(gathered(step(model, optimizer, number, part=mine(), backward=accelerator.backward))) / 2)
        its_losses.append(step(alone, its_optimizer, number, part=slice(None), backward=torch.Tensor.backward))
        agree.append([*gathered(masks(controller)), masks(single)])
        steps.append(controller.step)
        if number in (12, STEPS - 1):
            check_saved(model, controller, folder / f"adapter{number}")
    controller.finalize()
    single.finalize()
    saved = check_saved(model, controller, folder / "adapter")
    expected, history = whole(model), told(controller)
    for moment in MOMENTS:
        accelerator.free_memory()
        accelerator, again, optimizer, its_controller = begin(**plugin)
        accelerator.load_state(folder / f"at_{moment}")
        assert its_controller.step == moment
        for number in range(moment, STEPS):
            step(again, optimizer, number, part=mine(), backward=accelerator.backward)
        its_controller.finalize()
        found = whole(again)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), moment
        assert told(its_controller) == history, moment
    return {
        "steps": steps,
        "losses": [losses, its_losses],
        "masks": agree,
        "saved_ranks": saved,
        "ranks": controller.ranks,
        "target": controller.target_budget,
        "latest": adalora.latest_checkpoint(folder),
        "ΔW": [delta_weights(expected, controller).tolist(), delta_weights(alone.state_dict(), single).tolist()],
    }


def trainer_run(folder, resume=None, **more):
    made = make_of_pair(folder, target_rank=2, fsdp=True, fsdp_config=dict(FSDP), **more)
    made[0].train(resume_from_checkpoint=resume)
    return made


def through_trainer(folder):
    trainer, controller, watch = trainer_run(folder / "whole")
    save_adapter(controller, folder / "adapter")
    difference = distance_to_saved(trainer, folder / "adapter")
    of_checkpoint = distance_to_saved(trainer, folder / "whole" / "checkpoint-16")
    weights = whole(trainer.model)
    dist.barrier()
    checkpoint, refused = str(folder / "whole" / "checkpoint-8"), ""
    again, its_controller, _ = trainer_run(folder / "again", checkpoint, resume_from_checkpoint=checkpoint)
    found = whole(again.model)
    try:
        trainer_run(folder / "untold", checkpoint)
    except adalora.AdaLoraError as error:
        refused = str(error)
    return {
        "steps": watch.steps,
        "sharded": all(watch.sharded),
        "ranks": gathered(controller.ranks),
        "resumed_ranks": its_controller.ranks,
        "differing": [key for key, value in weights.items() if not torch.equal(value, found[key])],
        "refused": refused,
        "live": controller.live,
        "target": controller.target_budget,
        "difference": difference,
        "of_checkpoint": of_checkpoint,
        "losses": still_losses(folder, fsdp=True, fsdp_config=dict(FSDP)),
    }


CASES = {
    "accelerate": lambda f: through_accelerate(f, efficient=False, state_dict_type="SHARDED_STATE_DICT"),
    "accelerate_efficient": lambda f: through_accelerate(f, efficient=True, state_dict_type="FULL_STATE_DICT"),
    "trainer": through_trainer,
}


def run(case, folder):
    with as_on_gpus():
        return CASES[case](folder)


if __name__ == "__main__":
    serve(run)
