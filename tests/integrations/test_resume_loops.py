"""Raw loops and Accelerate: interrupted and resumed equals uninterrupted, bit for bit; SIGKILL at any moment."""

import copy
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from launching import HANGS
from net_runs import STEPS, Net, attach, lora, one_step
from peft import LoraConfig, get_peft_model

import adalora
from adalora.errors import CheckpointError
from adalora.integrations.accelerate import register
from adalora.lora.state.checkpoint import DESCRIPTION, TENSORS, is_whole, read_state, write_state
from helpers.resuming import adamw, assert_equal, outcome, resumed

HERE = Path(__file__).parent
# Warm-up ends with step 4, allocations follow from step 7 on, compaction comes with step 16.
MOMENTS = [2, 4, 6, 7, 10, 16, 17, 25]


def begin(**settings):
    model = lora()
    return model, attach(model, **settings)


def train(model, optimizer, steps):
    for step in steps:
        one_step(model, optimizer, step)


def whole_run(**settings):
    model, controller = begin(**settings)
    train(model, adamw(model), range(STEPS))
    controller.finalize()
    return outcome(model, controller)


# The moments differ for averages alone.
SCORED = [(moment, "sensitivity_uncertainty") for moment in MOMENTS]
SCORED += [(moment, importance) for moment in (10, 17) for importance in ("random", "magnitude")]


@pytest.mark.parametrize(("moment", "importance"), SCORED)
@pytest.mark.parametrize("optimizer_first", [False, True])
def test_raw_loop(tmp_path, moment, optimizer_first, importance):
    """Through `torch.save`, whichever of controller and optimizer comes first."""
    found = resumed(
        lambda: begin(importance=importance), train, steps=STEPS, moment=moment, optimizer_first=optimizer_first,
        file=tmp_path / "state",
    )  # fmt: skip
    assert_equal(found, whole_run(importance=importance))


@pytest.mark.parametrize("moment", [10, 17])
def test_a_model_state_dict_brings_its_ranks(moment):
    """`model.load_state_dict` of a whole model into one built anew, and back into an older state."""
    model = lora()
    controller = attach(model)
    optimizer = adamw(model)
    states = {}
    for step in range(STEPS):
        if step in (3, moment):
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            states[step] = weights, copy.deepcopy(optimizer.state_dict()), controller.state_dict()
        one_step(model, optimizer, step)
    wanted = {k: v.clone() for k, v in model.state_dict().items()}
    for weights, _, _ in states.values():
        fresh = lora()
        attach(fresh)
        fresh.load_state_dict(weights)
        x = torch.randn(4, 8)
        model.load_state_dict(weights)
        assert torch.equal(model.eval()(x), fresh.eval()(x))
    model.train()
    weights, moments, state = states[3]  # all layers are back
    controller.load_state_dict(state)
    optimizer.load_state_dict(moments)
    for step in range(3, STEPS):
        one_step(model, optimizer, step)
    assert all(torch.equal(wanted[k], v) for k, v in model.state_dict().items())


def begin_accelerate(how="register", model=None, **settings):
    model = model or lora()
    controller = attach(model, **settings)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, adamw(model))
    if how == "register":
        register(accelerator, controller)
    else:
        accelerator.register_for_checkpointing(controller)
    return accelerator, prepared, optimizer, controller


@pytest.mark.parametrize("how", ["register", "register_for_checkpointing"])
@pytest.mark.parametrize("moment", [4, 10, 17])
def test_accelerate(tmp_path, moment, how):
    """`save_state` and `load_state`, either way of telling Accelerate."""
    wanted = whole_run()
    accelerator, model, optimizer, controller = begin_accelerate(how)
    for step in range(moment):
        one_step(model, optimizer, step, accelerator.backward)
    accelerator.save_state(tmp_path / "state")
    if how == "register":
        assert is_whole(tmp_path / "state")
    accelerator.free_memory()
    del model, optimizer, controller

    accelerator, model, optimizer, controller = begin_accelerate(how)
    accelerator.load_state(tmp_path / "state")
    for step in range(moment, STEPS):
        one_step(model, optimizer, step, accelerator.backward)
    controller.finalize()
    assert_equal(outcome(model, controller), wanted)


@pytest.mark.parametrize(
    "dies_in",
    [
        "accelerate.accelerator.Accelerator.get_state_dict",
        "accelerate.accelerator.save_accelerator_state",
        "accelerate.checkpointing.torch.save",
        "adalora.integrations.accelerate.write_state",
    ],
)
def test_accelerate_killed_while_it_saves(tmp_path, monkeypatch, dies_in):
    """Whatever was written by then, the checkpoint before it is the newest whole one."""
    accelerator, model, optimizer, controller = begin_accelerate()
    for step in range(4):
        one_step(model, optimizer, step, accelerator.backward)
    accelerator.save_state(tmp_path / "checkpoint_0")

    def die(*args, **kwargs):
        raise RuntimeError("the power is gone")

    monkeypatch.setattr(dies_in, die)
    for step in range(4, 8):
        one_step(model, optimizer, step, accelerator.backward)
    with pytest.raises(RuntimeError, match="power"):
        accelerator.save_state(tmp_path / "checkpoint_1")
    assert adalora.latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint_0")
    with pytest.raises(CheckpointError, match=r"checkpoint_1: no adalora_state.json"):
        accelerator.load_state(tmp_path / "checkpoint_1")
    assert controller.step == 8


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", TENSORS, DESCRIPTION])
def test_accelerate_refuses_a_damaged_checkpoint(tmp_path, name, damage):
    """Each file of it, Accelerate's own too; nothing of the model has changed when the error comes."""
    accelerator, model, optimizer, controller = begin_accelerate()
    for step in range(3):
        one_step(model, optimizer, step, accelerator.backward)
    accelerator.save_state(tmp_path / "state")
    one_step(model, optimizer, 3, accelerator.backward)
    before = outcome(model, controller)
    hurt(tmp_path / "state" / name, damage)
    with pytest.raises(CheckpointError, match=rf"{name}.*adalora.latest_checkpoint"):
        accelerator.load_state(tmp_path / "state")
    assert_equal(outcome(model, controller), before)
    assert controller.step == 4


def hurt(file, damage):
    data = bytearray(file.read_bytes())
    file.unlink()
    data[len(data) // 2] ^= 4
    if damage != "missing":
        file.write_bytes(data if damage == "flipped" else data[: len(data) // 2])


def other_base():
    """The same shapes, other weights."""
    model = lora()
    with torch.no_grad():
        model.base_model.model.second.base_layer.weight.mul_(1.5)
    return model


def fewer_targets():
    torch.manual_seed(1)
    return get_peft_model(Net(), LoraConfig(r=6, lora_alpha=12, target_modules=["first", "second"]))


@pytest.mark.parametrize("how", ["raw", "accelerate"])
@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lora, {"target_rank": 2}, r"config differs.*target_rank: 1.0 in the checkpoint, 2.0 here"),
        (lora, {"total_steps": 31}, r"total_steps: 30 in the checkpoint, 31 here"),
        (fewer_targets, {}, r"other target modules: 1 only in the checkpoint \(third\)"),
        (other_base, {}, r"other weights: 1 of 3 layers differ in base, second: "),
    ],
)
def test_another_run_is_refused_with_the_difference(tmp_path, how, make, settings, message):
    accelerator, model, optimizer, controller = begin_accelerate()
    for step in range(8):
        one_step(model, optimizer, step, accelerator.backward)
    if how == "accelerate":
        accelerator.save_state(tmp_path)
    else:
        torch.save(controller.state_dict(), tmp_path / "state")
    accelerator.free_memory()
    accelerator, model, _, controller = begin_accelerate(model=make(), **settings)
    before = outcome(model, controller)
    load = accelerator.load_state if how == "accelerate" else controller.load_state_dict
    source = tmp_path if how == "accelerate" else torch.load(tmp_path / "state", weights_only=True)
    with pytest.raises(CheckpointError, match=message):
        load(source)
    assert_equal(outcome(model, controller), before)


def test_the_state_survives_a_disk(tmp_path):
    model = lora()
    controller = attach(model)
    optimizer = adamw(model)
    for step in range(12):
        one_step(model, optimizer, step)
    state = controller.state_dict()
    write_state(tmp_path, state)
    back = read_state(tmp_path)
    assert back["tensors"].keys() == state["tensors"].keys()
    assert all(torch.equal(back["tensors"][k], v) for k, v in state["tensors"].items())
    assert {k: v for k, v in back.items() if k != "tensors"} == {k: v for k, v in state.items() if k != "tensors"}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adalora_state.json", "adalora_state.safetensors"]


def train_forever(folder):
    """What the killed process runs: resume from the newest whole checkpoint, save after every step."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    model = lora()
    controller = attach(model)
    last = adalora.latest_checkpoint(folder)
    if last is not None:
        controller.load_state_dict(read_state(last))
    optimizer = adamw(model)
    if last is not None:
        optimizer.load_state_dict(torch.load(f"{last}/optimizer.pt", weights_only=True))
    print("begun", controller.step, flush=True)
    for step in range(controller.step, STEPS):
        one_step(model, optimizer, step)
        print("step", step, flush=True)
        path = f"{folder}/checkpoint-{controller.step}"
        os.makedirs(path, exist_ok=True)
        torch.save(optimizer.state_dict(), f"{path}/optimizer.pt")
        write_state(path, controller.state_dict())
    controller.finalize()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, f"{folder}/final.safetensors")
    print("done", flush=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_it_always_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    """Twenty and more SIGKILLs into one run, which ends bit for bit like one that was left alone."""
    server = (
        "import os, sys; sys.path[:0] = sys.argv[2:]; import test_resume_loops as t\n"
        "for line in sys.stdin:\n"  # one process image: each line is one life
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        t.train_forever(sys.argv[1]); os._exit(0)\n"
        "    print('pid', pid, flush=True)\n"
        "    os.waitpid(pid, 0)\n"
        "    print('over', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", server, str(tmp_path), str(HERE), str(HERE.parent)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    chance = random.Random(0)
    kills, begun, steps_at = 0, [], []

    def life(kill):
        nonlocal kills
        process.stdin.write("\n")
        process.stdin.flush()
        pid, finished, left = None, False, chance.randint(1, 3)
        while True:
            line = process.stdout.readline().split()
            assert line, "the process is gone"
            if line[0] == "pid":
                pid = int(line[1])
            elif line[0] == "begun":
                begun.append(int(line[1]))
            elif line[0] == "step":
                left -= 1
                if kill and left == 0:
                    time.sleep(chance.uniform(0, 0.01))  # while it saves, or steps
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
            elif line[0] == "done":
                finished = True
            elif line[0] == "over":
                return finished

    try:
        for _ in range(24):
            life(kill=True)
            newest = max((int(f.name.split("-")[1]) for f in tmp_path.glob("checkpoint-*") if is_whole(f)), default=0)
            if newest >= STEPS - 4:  # too near to the end to be killed again: take some checkpoints away
                for folder in sorted(tmp_path.glob("checkpoint-*")):
                    if int(folder.name.split("-")[1]) > 5:
                        for file in folder.iterdir():
                            file.unlink()
                newest = 5
            steps_at.append(newest)
        assert life(kill=False)
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(HANGS)
    assert kills >= 20
    assert len(set(steps_at)) > 3
    assert begun[1:] == steps_at
    from safetensors.torch import load_file

    final = load_file(tmp_path / "final.safetensors")
    wanted = whole_run()[0]
    assert all(torch.equal(value, final[key]) for key, value in wanted.items())
