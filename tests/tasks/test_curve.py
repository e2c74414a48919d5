"""The budget curve of a real small run, and the export that cuts at a point of it."""

import io
import json
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
from adalora.report.history import History
from adalora.tasks.curve import budget_curve, recorded_order, write_curve
from adalora.tasks.recipe import Recipe
from adalora.tasks.runner import run_recipe

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
def curve(run):
    return budget_curve(run)


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


def test_a_tenth_is_worse_than_the_whole(curve):
    accuracy = [p.scores["accuracy"] for p in curve.points]
    assert accuracy[-1] > 0.8
    assert accuracy[-1] > accuracy[0] + 0.05


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
    with pytest.raises(AdapterFileError, match=r"budgets \[2\]"):
        budget_curve(run, budgets=[2])


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
