"""What is saved, at any moment, is plain LoRA: stock PEFT computes the same without this package."""

import json
import subprocess
import sys

import pytest
import torch
from launching import HANGS
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2ForSequenceClassification

import adalora
from helpers.tiny_bert import bert

# PEFT still asks transformers for a property by its old name.
IGNORED = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
pytestmark = pytest.mark.filterwarnings(IGNORED)

STEPS = 40
INTERVAL = 4
# Warm-up ends after step 4, allocations follow steps 9, 13, 17 and 21, the last with the compaction.
MOMENTS = {
    "warmup": 3,
    "before_first_allocation": 8,
    "between_allocations": 11,
    "at_allocation": 13,
    "last_of_decrease": 20,
    "at_compaction": 21,
    "after_compaction": 25,
    "end": 39,
}

LOADER = """
import json, sys
import torch, transformers
transformers.utils.logging.disable_progress_bar()
from peft import PeftModel
from safetensors.torch import load_file

torch.set_num_threads(1)
inputs = load_file(sys.argv[1] + "/inputs.safetensors")["input_ids"]
differences = {}
for case in json.load(open(sys.argv[1] + "/cases.json")):
    wanted = load_file(case["logits"])["logits"]
    def load():
        base = getattr(transformers, case["model"]).from_pretrained(case["base"])
        return PeftModel.from_pretrained(base, case["adapter"]).eval()
    def difference(model):
        with torch.no_grad():
            return (model(input_ids=inputs).logits - wanted).abs().max().item()
    loaded, from_state = load(), load()
    with torch.no_grad():
        for name, parameter in from_state.named_parameters():
            if "lora_" in name:
                parameter.fill_(1.0)
    spoiled = difference(from_state)
    # A layer whose last triplet is gone keeps PEFT's wrapper in the live model: only base weights have other keys.
    state = {k: v for k, v in load_file(case["state"]).items() if ".lora_" in k or ".modules_to_save." in k}
    assert {k for k in from_state.state_dict() if ".lora_" in k} == {k for k in state if ".lora_" in k}
    assert not from_state.load_state_dict(state, strict=False).unexpected_keys
    with loaded.disable_adapter():
        without = difference(loaded)
    differences[case["name"]] = {
        "loaded": difference(loaded),
        "state_dict": difference(from_state),
        "merged": difference(loaded.merge_and_unload()),
        "spoiled": spoiled,
        "without": without,
    }
assert "adalora" not in sys.modules
print(json.dumps(differences))
"""


def gpt2():
    """A tiny random GPT-2 classifier, whose layers are Conv1D."""
    return GPT2ForSequenceClassification(
        GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=16, num_labels=2, pad_token_id=0)
    )


BERT_LINEAR = r".*encoder.*\.(query|key|value|dense)"
GPT2_LINEAR = r".*\.(c_attn|c_proj|c_fc)"
RUNS = {
    "plain": (bert, {"target_modules": BERT_LINEAR}, {}, list(MOMENTS)),
    "masked": (bert, {"target_modules": BERT_LINEAR}, {"compact": False}, ["at_allocation", "end"]),
    "rslora": (bert, {"target_modules": BERT_LINEAR, "use_rslora": True}, {}, ["between_allocations", "end"]),
    "initial_scale": (bert, {"target_modules": BERT_LINEAR}, {"scale": "initial"}, ["at_allocation", "end"]),
    "alpha_pattern": (
        bert,
        {"target_modules": BERT_LINEAR, "alpha_pattern": {"query": 6}, "rank_pattern": {"key": 4}},
        {},
        ["between_allocations", "end"],
    ),
    "conv1d": (gpt2, {"target_modules": GPT2_LINEAR, "fan_in_fan_out": True}, {}, ["between_allocations", "end"]),
    "embedding": (
        bert,
        {"target_modules": r".*(word_embeddings|query|value)"},
        {"min_rank": 1},
        ["between_allocations", "end"],
    ),
}


def train(name, folder, inputs):
    """Train one run, save it at its moments; returns the cases for the loader and the controller."""
    torch.manual_seed(7)
    make, lora, settings, moments = RUNS[name]
    base = make()
    base.save_pretrained(folder / name / "base")
    model = get_peft_model(base, LoraConfig(r=6, lora_alpha=12, task_type="SEQ_CLS", lora_dropout=0.1, **lora))
    controller = adalora.attach(model, target_rank=2, total_steps=STEPS, allocation_interval=INTERVAL, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = (inputs[:, 0] > 50).long()
    by_step = {MOMENTS[moment]: moment for moment in moments}
    cases = []
    for step in range(STEPS):
        model.train()
        model(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in by_step:
            cases.append(save(model, folder / name, moment=by_step[step], inputs=inputs, kind=type(base).__name__))
    controller.finalize()
    return cases, controller


def save(model, folder, *, moment, inputs, kind):
    """Save adapter, whole state and logits of a live model."""
    adapter = folder / moment
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=inputs).logits
    model.save_pretrained(adapter)
    save_file({"logits": logits}, folder / f"{moment}.logits")
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    save_file(state, folder / f"{moment}.state")
    return {
        "name": f"{folder.name}/{moment}",
        "model": kind,
        "base": str(folder / "base"),
        "adapter": str(adapter),
        "logits": str(folder / f"{moment}.logits"),
        "state": str(folder / f"{moment}.state"),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs trained here, and what a process without this package makes of their files."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.set_num_threads(1)
    inputs = torch.randint(1, 100, (8, 10), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": inputs}, folder / "inputs.safetensors")
    cases, controllers = [], {}
    for name in RUNS:
        of_run, controllers[name] = train(name, folder, inputs)
        cases += of_run
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(folder)], capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), controllers, folder


@pytest.mark.parametrize("case", [f"{name}/{moment}" for name, run in RUNS.items() for moment in run[3]])
def test_stock_peft_computes_the_same(runs, case):
    """Loaded, merged and by state dict; the adapter matters by far more than the tolerance."""
    difference = runs[0][case]
    assert difference["loaded"] <= 1e-5
    assert difference["merged"] <= 1e-5
    assert difference["state_dict"] <= 1e-5
    assert difference["spoiled"] > 1e-3
    assert difference["without"] > 1e-3


@pytest.mark.parametrize("name", list(RUNS))
def test_the_run_allocated_and_reached_its_target(runs, name):
    """The saved files cover models whose ranks really differ."""
    controller = runs[1][name]
    assert controller.live == controller.target_budget
    assert controller.allocations == 4
    assert len(set(controller.ranks.values())) > 1
    in_memory = sum(h.rank for h in controller.handles)
    assert in_memory == (controller.initial_budget if name == "masked" else controller.target_budget)


def test_files_shrink_at_compaction(runs):
    """Before it the file has the initial ranks, after it the final ones."""
    folder = runs[2] / "plain"
    sizes = {m: (folder / m / "adapter_model.safetensors").stat().st_size for m in MOMENTS}
    assert sizes["at_compaction"] < 0.6 * sizes["last_of_decrease"]
    assert sizes["end"] == sizes["at_compaction"]
    config = json.loads((folder / "end" / "adapter_config.json").read_text())
    ranks = runs[1]["plain"].ranks
    assert config["peft_type"] == "LORA"
    assert config["r"] == max(ranks.values())
    assert {key.removeprefix("^").replace("\\", "") for key in config["rank_pattern"]} == {
        name for name, rank in ranks.items() if 0 < rank < config["r"]
    }
