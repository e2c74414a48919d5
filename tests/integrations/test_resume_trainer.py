"""The Trainer resumed from any checkpoint ends bit for bit where it would have ended without the interruption."""

import json
import shutil

import pytest
import torch
from bert_runs import MAX_STEPS, arguments, lora, make
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

import adalora
from adalora.errors import AdaLoraWarning, CheckpointError
from adalora.lora.state.checkpoint import DESCRIPTION, TENSORS
from adalora.tasks.runs.curve import foreign_scores
from helpers.tiny_bert import Tokens, bert

# Warm-up and hand-over end with step 3, allocations follow steps 6, 8, 10, 12 and 13, the last with the compaction.
MOMENTS = {"warmup": 2, "handover": 3, "before_mask": 5, "at_mask": 6, "between": 7, "compacted": 13, "after": 20}


def outcome(trainer, controller):
    """All that training leaves, as one comparable value."""
    names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    state = trainer.model.state_dict()
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in controller.history.records]
    return {
        "weights": {name: state[name].clone() for name in names},
        "moments": {
            name: {k: v.clone() for k, v in trainer.optimizer.state[p].items()}
            for name, p in trainer.model.named_parameters()
            if p in trainer.optimizer.state
        },
        "ranks": controller.ranks,
        "history": history,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def assert_equal(first, second):
    """Bit for bit."""
    assert first["ranks"] == second["ranks"]
    assert first["losses"] == second["losses"]
    assert first["history"] == second["history"]
    for part in ("weights", "moments"):
        assert first[part].keys() == second[part].keys()
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
        for key, moment in first["moments"][name].items():
            assert torch.equal(moment, second["moments"][name][key]), (name, key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run that keeps every checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    trainer, controller = make(folder)
    trainer.train()
    return folder, outcome(trainer, controller)


@pytest.fixture
def checkpoint(whole, tmp_path):
    """A copy of the checkpoint after step 7, to be damaged."""
    return shutil.copytree(whole[0] / "checkpoint-7", tmp_path / "checkpoint-7")


def test_the_uninterrupted_run_prunes_and_compacts(whole):
    ranks = whole[1]["ranks"]
    assert 0 in ranks.values()
    assert sum(ranks.values()) == 2 * len(ranks)
    assert [r["step"] for r in whole[1]["history"] if r["event"] == "allocation"] == [5, 7, 9, 11, 12]
    assert [r["step"] for r in whole[1]["history"] if r["event"] == "compaction"] == [12]


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_resumed_equals_uninterrupted(whole, tmp_path, moment):
    """From a folder of another name too: weights, moments, ranks, losses and history are the same."""
    folder = shutil.copytree(whole[0] / f"checkpoint-{MOMENTS[moment]}", tmp_path / "moved")
    torch.manual_seed(99)
    trainer, controller = make(tmp_path / "out")
    trainer.train(resume_from_checkpoint=str(folder))
    assert_equal(outcome(trainer, controller), whole[1])


def test_a_checkpoint_is_a_plain_adapter_with_our_state_beside_it(whole):
    folder = whole[0] / "checkpoint-13"
    model = PeftModel.from_pretrained(bert(), folder)
    assert sum(m.r["default"] for m in model.modules() if "default" in getattr(m, "r", {})) == 24
    description = json.loads((folder / DESCRIPTION).read_text())["state"]
    assert set(description["versions"]) >= {"torch", "peft", "transformers"}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt"} <= set(description["files"])
    assert not list(folder.glob(".*"))


def test_save_total_limit_and_best_model_at_end(whole, tmp_path):
    """The best checkpoint is loaded with the ranks that it had, and a resumed run chooses the same one."""
    choosing = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "step_distance",
        "greater_is_better": False,
    }

    def favour(step):
        """Evaluation whose best is at one step."""

        def measure(prediction):
            return {"step_distance": abs(trainer.state.global_step - step)}

        return measure

    trainer, controller = make(tmp_path / "late", **choosing)
    trainer.compute_metrics = favour(16)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-16")
    assert sorted(f.name for f in (tmp_path / "late").glob("checkpoint-*")) == ["checkpoint-16"]
    saved = load_file(tmp_path / "late" / "checkpoint-16" / TENSORS)
    for h in controller.handles:
        for factor, (parameter, _) in h.factors.items():
            assert torch.equal(parameter, saved[f"{h.name}.{factor}"])
    assert controller.live == controller.target_budget
    assert controller.history.last("restored")["of_step"] == 16
    assert foreign_scores(controller.history) is None
    again, _ = make(tmp_path / "again", **choosing)
    again.compute_metrics = favour(16)
    trainer, late = again, tmp_path / "late" / "checkpoint-16"
    again.train(resume_from_checkpoint=str(late))
    assert again.state.best_model_checkpoint == str(late)

    trainer, controller = make(tmp_path / "early", **choosing)
    trainer.compute_metrics = favour(8)
    with pytest.warns(AdaLoraWarning, match=r"checkpoint-8, is from before the budget.*eval_delay"):
        trainer.train()
    assert controller.target_budget < controller.live < controller.initial_budget
    restored = controller.history.last("restored")
    assert (restored["of_step"], restored["checkpoint"]) == (8, "checkpoint-8")
    assert "describe other triplets than the adapter has" in foreign_scores(controller.history)
    assert sum(h.rank for h in controller.handles) == controller.live
    trainer.model.save_pretrained(tmp_path / "best")
    x = {"input_ids": Tokens(8).inputs}
    trainer.model.eval()
    for folder in (tmp_path / "best", tmp_path / "early" / "checkpoint-8"):
        loaded = PeftModel.from_pretrained(bert(), folder).eval()
        assert (loaded(**x).logits - trainer.model(**x).logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", [DESCRIPTION, TENSORS, "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_refused_with_the_file_and_the_cure(checkpoint, tmp_path, name, damage):
    file = checkpoint / name
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    trainer, _ = make(tmp_path / "out")
    before = trainer.model.state_dict()
    if damage == "missing" and name.startswith("adapter"):
        # The Trainer looks for it before we are asked.
        error, message = ValueError, "Can't find a valid checkpoint"
    else:
        error, message = CheckpointError, rf"{name}.*adalora.latest_checkpoint"
    with pytest.raises(error, match=message) as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert str(checkpoint) in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in trainer.model.state_dict().items())
    assert adalora.latest_checkpoint(checkpoint.parent) is None


def test_the_trainers_own_last_file_counts_too(checkpoint, tmp_path):
    file = checkpoint / "trainer_state.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(CheckpointError, match=r"trainer_state.json: cut off"):
        make(tmp_path / "out")[0].train(resume_from_checkpoint=str(checkpoint))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"trainer_state.json: missing"):
        make(tmp_path / "out")[0].train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"target_rank": 3}}, r"config differs.*target_rank: 2.0 in the checkpoint, 3.0 here"),
        ({"settings": {"revival": False}}, r"revival: True in the checkpoint, False here"),
        ({"model": ("query|value", 3)}, r"other target modules: \d+ only in the checkpoint \(.*key"),
        ({"model": ("query|key|value|dense", 4)}, r"other weights: 12 of 12 layers differ.*query"),
        ({"max_steps": 30}, r"total_steps: 24 in the checkpoint, 30 here"),
    ],
)
def test_another_run_is_refused_with_the_difference(whole, tmp_path, change, message):
    if "model" in change:
        change = {"model": lora(*change["model"])}
    trainer, _ = make(tmp_path, **change)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-7"))


def test_a_foreign_checkpoint_is_refused_and_says_how_to_go_on(tmp_path):
    """Plain LoRA's has no state; its adapter can be trained on by attaching to it."""
    model = lora()
    plain = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=2, save_steps=2, learning_rate=1e-2),
        train_dataset=Tokens(16),
    )
    plain.train()
    trainer, _ = make(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"checkpoint-2: no adalora_state.json.*PeftModel.from_pretrained"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    loaded = PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-2", is_trainable=True)
    before = loaded.state_dict()
    trainer, controller = make(tmp_path / "on", model=loaded)
    x = {"input_ids": Tokens(8).inputs}
    # to rounding: the attached model adds up in another order
    torch.testing.assert_close(loaded.eval()(**x).logits, model.eval()(**x).logits, rtol=1e-5, atol=1e-6)
    assert before.keys() == loaded.state_dict().keys()
    trainer.train()
    assert controller.live == controller.target_budget


def test_going_on_from_our_own_final_adapter(whole, tmp_path):
    """Ragged ranks, layers without an adapter: `attach` takes it as it is."""
    model = PeftModel.from_pretrained(bert(), whole[0] / "checkpoint-24", is_trainable=True)
    trainer, controller = make(tmp_path, model=model, settings={"target_rank": 1})
    assert controller.initial_budget == sum(whole[1]["ranks"].values())
    trainer.train()
    assert controller.live == controller.target_budget == len(controller.handles)


def test_a_callback_added_late_says_where_it_belongs(whole, tmp_path):
    trainer, _ = make(tmp_path)
    late = Trainer(model=lora(), args=trainer.args, train_dataset=Tokens(40))
    late.add_callback(adalora.AdaLoraCallback(target_rank=2, allocation_interval=2))
    with pytest.raises(CheckpointError, match=r"callbacks=\[callback\]|checkpoint-7: no such folder"):
        late.train(resume_from_checkpoint=str(whole[0] / "checkpoint-7"))


def test_a_name_that_leaves_the_folder_is_refused(checkpoint, tmp_path):
    """Checksums hold, for a stranger can compute them too."""
    from adalora.lora.state.checkpoint import _canonical, _hash, read_state

    (tmp_path / "secret").write_text("x")
    value = json.loads((checkpoint / DESCRIPTION).read_text())
    value["state"]["files"]["../secret"] = {"bytes": 1, "sha256": _hash(b"x")}
    value["sha256"] = _hash(_canonical(value["state"]))
    (checkpoint / DESCRIPTION).write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"'../secret' is no name"):
        read_state(checkpoint)


def test_a_stranger_with_right_checksums_and_wrong_shapes_is_refused(whole, tmp_path):
    """Nothing of the model has changed when the error comes."""
    from adalora.lora.state.checkpoint import read_state

    state = read_state(whole[0] / "checkpoint-7")
    _, controller = make(tmp_path)
    before = {h.name: h.P_parameter.detach().clone() for h in controller.handles}
    name = next(n for n in state["tensors"] if n.endswith(".P"))
    state["tensors"][name] = torch.zeros(3, 1_000)
    with pytest.raises(CheckpointError, match=r"has shape \[3, 1000\]"):
        controller.load_state_dict(state)
    assert all(torch.equal(before[h.name], h.P_parameter) for h in controller.handles)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("the power is gone")


def test_a_run_that_died_goes_on_with_its_history_file(tmp_path):
    """The file in the end has every step once."""
    path = tmp_path / "history.jsonl"
    trainer, _ = make(tmp_path / "out", StopAt(9), settings={"history": path})
    with pytest.raises(RuntimeError, match="power"):
        trainer.train()
    last = adalora.latest_checkpoint(tmp_path / "out")
    assert last.endswith("checkpoint-8")
    trainer, _ = make(tmp_path / "out", settings={"history": path})
    trainer.train(resume_from_checkpoint=last)
    history = adalora.History.read(path)
    assert [r["step"] for r in history.of("step") if "loss" not in r] == list(range(MAX_STEPS))
    assert [r["step"] for r in history.of("allocation")] == [5, 7, 9, 11, 12]


def test_save_file_is_not_fooled_by_a_file_of_another_kind(checkpoint):
    """A safetensors file that is not the one that was written."""
    save_file({"x": torch.zeros(2)}, checkpoint / TENSORS)
    with pytest.raises(CheckpointError, match=TENSORS):
        adalora.lora.state.checkpoint.read_state(checkpoint)
