"""The budget curve of a real small run, and the export that cuts at a point of it."""

import dataclasses
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizerFast

from adalora import cli
from adalora.errors import AdapterFileError, DataError
from adalora.export import export_adapter, read_adapter
from adalora.export.ordered import cut_by, read_order
from adalora.export.pruned import read_pruned, revive
from adalora.report.history import History
from adalora.tasks.recipe.fields import Recipe
from adalora.tasks.runs.curve import budget_curve, recorded_order, write_curve
from adalora.tasks.runs.runner import run_recipe

WORDS = [f"w{n}" for n in range(12)]


def write_rows(path, count, seed):
    """Texts of five words; the label is whether most of them are even."""
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        words = random.integers(0, len(WORDS), 5)
        label = "odd" if (words % 2).sum() > 2 else "even"
        lines.append(json.dumps({"text": " ".join(WORDS[w] for w in words), "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose task needs the adapter."""
    folder = tmp_path_factory.mktemp("curve")
    torch.manual_seed(0)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "base")
    config = BertConfig(
        vocab_size=17, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "base")
    files = {name: write_rows(folder / f"{name}.jsonl", count, seed) for seed, (name, count) in enumerate(
        {"train": 400, "validation": 100, "test": 150}.items()
    )}  # fmt: skip
    fields = {
        "model": str(folder / "base"),
        "task": "classification",
        "data": {"files": files},
        "lora": {"r": 6, "lora_alpha": 12, "target_modules": "all-linear"},
        "adalora": {"target_rank": 3},
        "training": {"max_steps": 300, "batch_size": 16, "learning_rate": 5e-3},
        "diagnostics": {"min_steps": 1000},
        "output": str(folder / "run"),
    }
    run_recipe(Recipe.parse(fields), console=Console(file=io.StringIO()))
    return folder / "run"


@pytest.fixture(scope="module")
def full(run):
    """With pruned triplets above the budget."""
    return budget_curve(run)


@pytest.fixture(scope="module")
def curve(run, full):
    """Up to the budget."""
    return dataclasses.replace(full, points=tuple(p for p in full.points if p.budget <= 1))


def test_the_whole_adapter_scores_as_the_run_did(run, curve):
    metrics = json.loads((run / "metrics.json").read_text())
    whole = curve.points[-1]
    assert (whole.budget, whole.parameters) == (1.0, metrics["adapter_parameters"])
    assert whole.triplets == metrics["final_rank_total"]
    assert whole.scores["accuracy"] == pytest.approx(metrics["accuracy"])
    assert (curve.split, curve.rows) == ("test", 150)


def test_every_point_keeps_to_its_budget(curve):
    whole = curve.points[-1].parameters
    assert [p.budget for p in curve.points] == pytest.approx([n / 10 for n in range(1, 11)])
    for point in curve.points:
        assert 0.8 * point.budget * whole < point.parameters <= point.budget * whole + 1e-6
    triplets = [p.triplets for p in curve.points]
    assert triplets == sorted(triplets)


def test_a_single_triplet_is_worse_than_the_whole(run):
    single, whole = budget_curve(run, budgets=[0.03, 1]).points
    assert single.triplets == 1
    assert whole.scores["accuracy"] > 0.9
    assert whole.scores["accuracy"] > single.scores["accuracy"] + 0.05


def test_the_order_is_the_runs_own_scores(run, curve):
    assert (curve.order.name, curve.order.of) == ("score", "saved")
    adapter, history = read_adapter(run / "adapter"), History.read(run)
    record = history.last("allocation")
    assert [len(scores) for scores in record["triplet_scores"]] == record["ranks"]
    assert min(min(s) for s in record["triplet_scores"] if s) == pytest.approx(record["threshold"])
    assert set(recorded_order(history, adapter).scores) == set(adapter.factors)
    # What stays is worth more per parameter than what goes; the last place may be filled by a cheaper triplet.
    cut = cut_by(adapter, 0.5, curve.order)
    kept, gone = [], []
    for name, f in adapter.factors.items():
        worth = sorted((float(s) / (f.d_out + f.d_in) for s in curve.order.scores[name]), reverse=True)
        kept += worth[: cut.adapter.ranks[name]]
        gone += worth[cut.adapter.ranks[name] :]
    assert sum(k < max(gone) for k in kept) <= 2


def test_pruned_triplets_come_back_above_the_budget(run, full, tmp_path):
    record, pruned = History.read(run).last("pruned"), read_pruned(run / "pruned.safetensors")
    assert (record["file"], record["parameters"]) == ("pruned.safetensors", pruned.adapter.parameters)
    assert record["triplets"] == sum(pruned.adapter.ranks.values()) == sum(len(s) for s in pruned.scores.values())
    adapter = read_adapter(run / "adapter")
    above = [p for p in full.points if p.budget > 1]
    assert len(above) >= 3
    for point in above:
        assert adapter.parameters < point.parameters <= point.budget * adapter.parameters
        assert point.revived == point.triplets - sum(adapter.ranks.values()) > 0
    # The best of them per parameter come first.
    some = revive(adapter, above[0].budget, pruned)
    worth = {n: sorted((float(v) / (f.d_out + f.d_in) for v in pruned.scores[n]), reverse=True)
             for n, f in pruned.adapter.factors.items()}  # fmt: skip
    back = {n: some.ranks.get(n, 0) - adapter.ranks.get(n, 0) for n in worth}
    gone = max(w for n in worth for w in worth[n][back[n] :])
    assert sum(w < gone for n in worth for w in worth[n][: back[n]]) <= 2
    # What was trained stays as it is.
    for name, f in adapter.factors.items():
        assert torch.equal(some.factors[name].left[:, : f.rank], f.left)
    written = json.loads(write_curve(full, tmp_path)[0].read_text())
    assert [p["revived"] for p in written["points"]] == [p.revived for p in full.points]


def test_all_that_was_pruned_is_the_end(run):
    pruned, adapter = read_pruned(run / "pruned.safetensors"), read_adapter(run / "adapter")
    (point,) = budget_curve(run, budgets=[8, 9]).points
    assert point.parameters == adapter.parameters + pruned.adapter.parameters


def test_without_the_file_there_is_nothing_above(run, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(run, copied)
    (copied / "pruned.safetensors").unlink()
    with pytest.raises(AdapterFileError, match=r"unless training\.keep_pruned is false"):
        budget_curve(copied, budgets=[1.2])
    (copied / "pruned.safetensors").write_bytes(b"nonsense and more of it")
    with pytest.raises(AdapterFileError, match=r"pruned\.safetensors"):
        budget_curve(copied, budgets=[1.2])


def test_scores_of_other_triplets_are_not_used(run, tmp_path, capsys):
    """Where `keep_best` brought back an adapter from before the last allocation, the scores are not its own."""
    history, adapter = History.read(run), read_adapter(run / "adapter")
    last = history.last("allocation")["step"]
    history.add("restored", step=300, of_step=last + 1, checkpoint="checkpoint-9", ranks=[])
    assert recorded_order(history, adapter) is not None
    history.add("restored", step=300, of_step=last, checkpoint="checkpoint-9", ranks=[])
    assert recorded_order(history, adapter) is None
    copied = tmp_path / "copy"
    shutil.copytree(run, copied)
    history.write_to(copied / "history.jsonl")
    with pytest.raises(AdapterFileError, match=r"kept the best checkpoint, checkpoint-9.* other triplets"):
        budget_curve(copied, order="score", budgets=[1.0])
    found = budget_curve(copied, budgets=[1.0])
    assert found.order.name == "energy"
    assert "cut by energy: the run kept the best checkpoint" in found.note


@pytest.mark.parametrize("order", ["energy", "sensitivity"])
def test_other_orders(run, curve, order):
    other = budget_curve(run, order=order, budgets=[0.5, 1.0])
    assert (other.order.name, other.order.of) == (order, "clean")
    assert other.points[-1].scores["accuracy"] == pytest.approx(curve.points[-1].scores["accuracy"])


def test_other_rows(run, tmp_path):
    assert budget_curve(run, split="validation", budgets=[1.0]).rows == 100
    file = write_rows(tmp_path / "new.jsonl", 60, 9)
    found = budget_curve(run, data=file, budgets=[1.0])
    assert (found.split, found.rows) == ("new.jsonl", 60)
    with pytest.raises(DataError, match="split 'dev': this run's data have train, validation, test"):
        budget_curve(run, split="dev")
    with pytest.raises(DataError, match="not both"):
        budget_curve(run, split="test", data=file)


def test_refusals(run, tmp_path):
    with pytest.raises(AdapterFileError, match="holds no finished run"):
        budget_curve(tmp_path)
    with pytest.raises(AdapterFileError, match="allowed are score, sensitivity, energy"):
        budget_curve(run, order="size")
    with pytest.raises(AdapterFileError, match=r"budgets \[-1\]"):
        budget_curve(run, budgets=[-1])
    with pytest.raises(AdapterFileError, match=r"budgets \[\]"):
        budget_curve(run, budgets=[])


def accuracy_of(run, folder):
    """Of an exported adapter in stock PEFT, on the run's test rows."""
    from transformers import AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(run.parent / "base", num_labels=2)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    names = json.loads((run / "adapter" / "labels.json").read_text())
    rows = [json.loads(line) for line in (run.parent / "test.jsonl").read_text().splitlines()]
    with torch.no_grad():
        guess = model(**tokenizer([r["text"] for r in rows], return_tensors="pt", padding=True)).logits.argmax(-1)
    return np.mean([names[str(int(g))] == r["label"] for g, r in zip(guess, rows)])


@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_export_cuts_at_a_point_of_the_curve(run, curve, tmp_path, budget):
    (file, *pictures) = write_curve(curve, tmp_path / "curve")
    assert all(p.stat().st_size > 5000 for p in pictures)
    report = export_adapter(run / "adapter", tmp_path / "out", format="ragged", budget=budget, order=read_order(file))
    (point,) = [p for p in curve.points if p.budget == pytest.approx(budget)]
    assert report.parameters_after == point.parameters
    assert accuracy_of(run, tmp_path / "out") == pytest.approx(point.scores["accuracy"])


def test_an_order_of_another_adapter_is_refused(run, curve, tmp_path):
    found = curve.to_json()
    name = next(iter(found["triplet_scores"]))
    found["triplet_scores"][name].append(1.0)
    (tmp_path / "curve.json").write_text(json.dumps(found))
    with pytest.raises(AdapterFileError, match="of another adapter"):
        export_adapter(run / "adapter", tmp_path / "out", budget=0.5, order=read_order(tmp_path / "curve.json"))
    with pytest.raises(AdapterFileError, match="add --budget"):
        export_adapter(run / "adapter", tmp_path / "out", order=curve.order)
    for text in ("[]", "{}", '{"order": "x", "of": "y", "triplet_scores": {}}', "nonsense"):
        (tmp_path / "curve.json").write_text(text)
        with pytest.raises(AdapterFileError, match=r"no curve\.json"):
            read_order(tmp_path / "curve.json")


def test_the_command(run, tmp_path, monkeypatch, capsys):
    words = ["curve", run, "--budget", "0.5", "--budget", "1", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["adalora", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert "--budget 0.5 --curve" in capsys.readouterr().out
    words = ["export", run / "adapter", tmp_path / "out", "--budget", "0.5", "--curve", tmp_path / "curve.json"]
    monkeypatch.setattr(sys, "argv", ["adalora", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    point = json.loads((tmp_path / "curve.json").read_text())["points"][0]
    assert f"-> {point['parameters']:,} LoRA parameters" in capsys.readouterr().out
