"""What each of two processes runs under FSDP2, begun by `launching.serve`; rank 0 writes the results.

Usage: python sharded_worker.py FOLDER CASE …
"""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launching import gathered, serve
from net_runs import STEPS, Net
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import adalora
from adalora.integrations.fsdp import ControllerState, save_adapter
from helpers.resuming import adamw, told

# In the warm-up, after the hand-over, at and between masks, in the final phase; what λ adds is alike at all of them.
MOMENTS = {"plain": [2, 4, 9, 10, 17], "svd": [9, 17]}


def lora():
    """Rank 5 on two processes: shards of triplets are not alike."""
    torch.manual_seed(1)
    return get_peft_model(Net(), LoraConfig(r=5, lora_alpha=10, target_modules=["first", "second", "third"]))


SETTINGS = {
    "plain": {},
    "svd": {
        "parametrization": "svd", "orthogonality": "squared", "orthogonality_weight": 0.1, "handover": False,
        "initialization": "orthonormal", "score_gradient": "task",
    },
    "reorthonormal": {"reorthonormalize": True},
    "magnitude": {"importance": "magnitude"},
    "hybrid_2x1": {},
    "hybrid_1x2": {},
}  # fmt: skip
MESHES = {"hybrid_2x1": (2, 1), "hybrid_1x2": (1, 2)}  # replicas by shards


def attach(model, **settings):
    return adalora.attach(model, **{"target_rank": 2, "total_steps": STEPS, "allocation_interval": 3, **settings})


def shard(model, mesh=None):
    """Layer by layer, and what is left."""
    net = model.base_model.model
    for layer in (net.first, net.second, net.third):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def step(model, optimizer, number, *, part):
    """Half of a batch under FSDP, which averages gradients; the whole batch where one process trains alone."""
    generator = torch.Generator().manual_seed(1000 + number)
    x, y = torch.randn(16, 8, generator=generator), torch.randn(16, 4, generator=generator)
    loss = (model(x[part]) - y[part]).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def mine():
    rank = dist.get_rank()
    return slice(8 * rank, 8 * rank + 8)


def begin(settings, mesh=None):
    model = lora()
    controller = attach(model, **settings)
    shard(model, mesh)
    return model, controller, adamw(model)


def masks(controller):
    return [h.mask.tolist() for h in controller.handles]


def delta_weights(state, controller):
    """P·Q of every layer, from a whole state."""
    names = {id(module): name for name, module in controller.model.named_modules()}
    parts = [[state[f"{names[id(h.layer)]}.{keys[0]}"] for keys in (h.P_keys, h.Q_keys)] for h in controller.handles]
    return torch.cat([h.scale / h.gain * (P @ Q).flatten() for h, (P, Q) in zip(controller.handles, parts)])


def compare(folder, settings, mesh=None):
    """The same run by two processes on half a batch each, and by one."""
    model, controller, optimizer = begin(settings, mesh)
    assert all(isinstance(p, DTensor) for h in controller.handles for p, _ in h.factors.values())
    alone = lora()
    single = attach(alone, compact=False, **settings)
    its_optimizer = adamw(alone)
    losses, its_losses, agree = [], [], []
    for number in range(STEPS):
        losses.append(sum(gathered(step(model, optimizer, number, part=mine()))) / 2)
        its_losses.append(step(alone, its_optimizer, number, part=slice(None)))
        agree.append([*gathered(masks(controller)), masks(single)])
        if number in (12, STEPS - 1):
            check_saved(model, controller, folder / f"adapter{number}")
    controller.finalize()
    single.finalize()
    ranks = check_saved(model, controller, folder / "adapter")
    return {
        "steps": [controller.step, single.step],
        "losses": [losses, its_losses],
        "masks": agree,
        "saved_ranks": ranks,
        "ranks": controller.ranks,
        "target": controller.target_budget,
        "ΔW": [delta_weights(whole(model), controller).tolist(), delta_weights(alone.state_dict(), single).tolist()],
    }


def whole(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def check_saved(model, controller, folder):
    """Stock PEFT computes from the plain adapter what the live model does; it has no masked triplet."""
    save_adapter(controller, folder)
    torch.manual_seed(1)
    stock = PeftModel.from_pretrained(Net(), folder).eval()
    x = torch.randn(7, 8)
    with torch.no_grad():
        assert (stock(x) - model.eval()(x)).abs().max() < 1e-5
    model.train()
    adapters = {name: m.lora_A["default"].weight for name, m in stock.named_modules() if hasattr(m, "get_delta_weight")}
    ranks = {name.removeprefix("base_model.model."): len(weight) for name, weight in adapters.items()}
    if controller.phase == "final":  # before, pruned triplets grow again between allocations
        assert ranks == {name: rank for name, rank in controller.ranks.items() if rank}
    return ranks


def resumed(folder, name):
    """Through a distributed checkpoint, at every kind of moment: bit for bit the run that was left alone."""
    settings, moments = SETTINGS[name], MOMENTS[name]
    model, controller, optimizer = begin(settings)
    for number in range(STEPS):
        if number in moments:
            dcp.save(states(model, optimizer, controller), checkpoint_id=folder / f"at{number}")
        step(model, optimizer, number, part=mine())
    controller.finalize()
    expected, history = whole(model), told(controller)
    for moment in moments:
        torch.manual_seed(100 + moment)
        again, its_controller, its_optimizer = begin(settings)
        held = states(again, its_optimizer, its_controller)
        dcp.load(held, checkpoint_id=folder / f"at{moment}")
        set_model_state_dict(again, held["model"])
        set_optimizer_state_dict(again, its_optimizer, held["optimizer"])
        assert its_controller.step == moment
        for number in range(moment, STEPS):
            step(again, its_optimizer, number, part=mine())
        its_controller.finalize()
        found = whole(again)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items()), moment
        assert told(its_controller) == history, moment
    alone = lora()
    single = attach(alone, **settings)
    dcp.load({"adalora": ControllerState(single)}, checkpoint_id=folder / "at17")
    for number in range(17, STEPS):  # a process of its own takes over, and may cut
        step(alone, adamw(alone), number, part=slice(None))
    single.finalize()
    assert single.ranks == controller.ranks
    return {
        "moments": moments,
        "ranks": gathered(controller.ranks),
        "in_memory": sum(h.rank for h in controller.handles),
        "in_memory_alone": sum(h.rank for h in single.handles),
    }


def compacted(folder):
    """A smaller adapter that a layer has left, with 2 triplets for 3, goes on sharded: loaded before `fully_shard`."""
    alone = lora()
    single = attach(alone, target_rank=2 / 3)
    its_optimizer = adamw(alone)
    for number in range(20):
        step(alone, its_optimizer, number, part=slice(None))
    model = lora()
    controller = attach(model, target_rank=2 / 3)
    controller.load_state_dict(single.state_dict())
    shard(model)
    optimizer, its_optimizer = adamw(model), adamw(alone)
    for number in range(20, STEPS):
        step(model, optimizer, number, part=mine())
        step(alone, its_optimizer, number, part=slice(None))
    controller.finalize()
    saved = check_saved(model, controller, folder / "adapter")
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        difference = float((model.eval()(x) - alone.eval()(x)).abs().max())
    return {"saved": saved, "ranks": single.ranks, "step": controller.step, "difference": difference}


def states(model, optimizer, controller):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "adalora": ControllerState(controller),
    }


def refusals(folder):
    """Attached too late; compacted before; sharded in another way."""
    said = []
    late = lora()
    shard(late)
    try:
        attach(late)
    except adalora.AdaLoraError as error:
        said.append(str(error))
    alone = lora()
    single = attach(alone)
    its_optimizer = adamw(alone)
    for number in range(20):
        step(alone, its_optimizer, number, part=slice(None))
    model, controller, _ = begin({})
    before = whole(model)
    try:
        controller.load_state_dict(single.state_dict())
    except adalora.AdaLoraError as error:
        said.append(str(error))
    assert all(torch.equal(value, before[key]) for key, value in whole(model).items())
    model = lora()
    attach(model)
    fully_shard(model, shard_placement_fn=lambda p: Shard(1) if len(p) == 5 and p.dim() == 2 else None)
    try:
        step(model, adamw(model), 0, part=mine())
    except adalora.AdaLoraError as error:
        said.append(str(error))
    return {"said": said}


def run(case, folder):
    kind, _, name = case.partition("-")
    if kind in ("refusals", "compacted"):
        return {"refusals": refusals, "compacted": compacted}[kind](folder)
    if kind == "resumed":
        return resumed(folder, name)
    mesh = init_device_mesh("cpu", MESHES[name], mesh_dim_names=("replicas", "shards")) if name in MESHES else None
    return compare(folder, SETTINGS[name], mesh)


if __name__ == "__main__":
    serve(run)
