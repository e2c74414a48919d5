import json

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from adalora.errors import AdapterFileError, DataError
from adalora.export import clean, compress_adapter, inspect_adapter, read_adapter
from adalora.export.compression import sensitivities
from adalora.export.data import measure_file, read_rows
from adalora.export.inspection import effective_rank

from .conftest import RAGGED, llama, load_peft, logits, save_lora, save_ragged, tokens


def lm_loss(model, batch):
    return model(batch, labels=batch).loss


def batches(n=4):
    g = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (2, 10), generator=g) for _ in range(n)]


def test_inspection_counts_what_is_there(tmp_path):
    save_ragged(tmp_path / "a")
    report = inspect_adapter(tmp_path / "a")
    live = {n: r for n, r in RAGGED.items() if r}
    assert {m.name: m.rank for m in report.modules} == live
    assert all(m.numerical_rank == m.rank for m in report.modules)
    assert all(1 <= m.effective_rank <= m.rank + 1e-9 for m in report.modules)
    assert all(sum(m.energy) == pytest.approx(1) for m in report.modules)
    assert report.parameters == sum(m.rank * (m.d_out + m.d_in) for m in report.modules)
    assert report.bytes == 4 * report.parameters
    assert list(report.budgets) == [0.90, 0.95, 0.99]
    assert report.budgets[0.90] <= report.budgets[0.95] <= report.budgets[0.99] <= report.parameters
    wanted = {n: torch.linalg.matrix_norm(f.delta()) for n, f in read_adapter(tmp_path / "a").factors.items()}
    assert all(m.norm == pytest.approx(float(wanted[m.name]), rel=1e-5) for m in report.modules)


def test_effective_rank():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    assert effective_rank(torch.zeros(0)) == 0


def test_a_budget_that_inspect_names_keeps_that_energy(tmp_path):
    save_lora(tmp_path / "a", r=6)
    report = inspect_adapter(tmp_path / "a")
    got = compress_adapter(tmp_path / "a", tmp_path / "out", budget=report.budgets[0.95])
    assert got.truncation.kept_energy >= 0.95


@pytest.mark.parametrize("format", ["ragged", "portable"])
def test_compression_by_energy(tmp_path, format):
    save_lora(tmp_path / "a", r=6)
    report = compress_adapter(tmp_path / "a", tmp_path / "out", budget=0.5, format=format)
    assert report.criterion == "energy"
    assert report.score_before is None
    assert read_adapter(tmp_path / "a").parameters / 2 >= report.truncation.parameters_after
    assert report.export.error == pytest.approx(report.truncation.error, rel=1e-4)
    live = load_peft(tmp_path / "out")
    delta = report.truncation.adapter.factors["model.layers.0.mlp.up_proj"].delta()
    layer = live.base_model.model.model.layers[0].mlp.up_proj
    assert torch.allclose(layer.get_delta_weight("default"), delta.float(), atol=1e-5)


def test_sensitivity_is_the_derivative_by_each_singular_value(tmp_path):
    """Against finite differences of the loss with one λ changed at a time."""
    save_lora(tmp_path / "a", r=2, target_modules=["q_proj", "down_proj"])

    def loss(model, batch):  # the one of transformers is float32
        return nn.functional.cross_entropy(model(batch).logits[0, :-1].double(), batch[0, 1:])

    adapter = clean(read_adapter(tmp_path / "a"))
    base, batch = llama(initializer_range=0.3).double(), batches(1)[0]
    trained = [p.requires_grad for p in base.parameters()]
    before = {k: v.clone() for k, v in base.state_dict().items()}
    got = sensitivities(base, adapter, [batch], loss)
    assert set(base.state_dict()) == set(before)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    assert [p.requires_grad for p in base.parameters()] == trained

    def loss_with(name, i, step):
        model = llama(initializer_range=0.3).double()
        modules = dict(model.named_modules())
        with torch.no_grad():
            for n, f in adapter.factors.items():
                values = f.values.clone()
                if n == name:
                    values[i] *= 1 + step
                modules[n].weight += (f.left * values) @ f.right
            return float(loss(model, batch))

    for name, i in (("model.layers.0.self_attn.q_proj", 0), ("model.layers.2.mlp.down_proj", 1)):
        slope = (loss_with(name, i, 1e-3) - loss_with(name, i, -1e-3)) / 2e-3  # λ · ∂loss/∂λ
        assert float(got[name][i]) == pytest.approx(slope**2, rel=2e-2, abs=1e-10)


def test_data_find_the_modules_that_matter(tmp_path):
    """A large ΔW that the loss never sees has the energy; data must not keep it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.used(x) + 0 * self.idle(x).sum()

    model = peft.get_peft_model(Net(), peft.LoraConfig(r=3, lora_alpha=3, target_modules=["used", "idle"]))
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=3.0 if "idle" in name else 0.3)
    model.save_pretrained(tmp_path / "a")
    x = torch.randn(16, 8)

    def loss(net, batch):
        return (net(batch) ** 2).mean()

    by_energy = compress_adapter(tmp_path / "a", tmp_path / "e", budget=0.5)
    by_data = compress_adapter(tmp_path / "a", tmp_path / "d", budget=0.5, batches=[x], loss=loss, model=Net())
    assert by_energy.export.ranks == {"used": 0, "idle": 3}
    assert by_data.criterion == "sensitivity"
    assert by_data.export.ranks == {"used": 3, "idle": 0}
    assert by_data.score_before == pytest.approx(by_data.score_after, rel=1e-4)


def test_scores_before_and_after_are_those_of_the_models(tmp_path, base_folder):
    live = save_ragged(tmp_path / "a", base_folder).eval()
    data = batches()
    report = compress_adapter(tmp_path / "a", tmp_path / "out", budget=0.6, batches=data, loss=lm_loss)
    with torch.no_grad():
        before = sum(float(lm_loss(live, b)) for b in data) / len(data)
        after = sum(float(lm_loss(load_peft(tmp_path / "out"), b)) for b in data) / len(data)
    assert report.score_before == pytest.approx(before, rel=1e-5)
    assert report.score_after == pytest.approx(after, rel=1e-5)


def test_wrong_compressions_are_named_and_write_nothing(tmp_path):
    save_lora(tmp_path / "a")
    with pytest.raises(AdapterFileError, match="data need a loss"):
        compress_adapter(tmp_path / "a", tmp_path / "out", batches=batches())
    with pytest.raises(AdapterFileError, match="add --base"):
        compress_adapter(tmp_path / "a", tmp_path / "out", batches=batches(), loss=lm_loss)
    with pytest.raises(AdapterFileError, match="no batch"):
        compress_adapter(tmp_path / "a", tmp_path / "out", batches=[], loss=lm_loss, model=llama())

    def bad_loss(model, batch):
        return lm_loss(model, batch) * torch.nan

    with pytest.raises(AdapterFileError, match="is nan"):
        compress_adapter(tmp_path / "a", tmp_path / "out", batches=[tokens()], loss=bad_loss, model=llama())
    assert not (tmp_path / "out").exists()


def tokenizer(words=40):
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, words)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def classifier():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3,
        id2label={0: "low", 1: "middle", 2: "high"}, label2id={"low": 0, "middle": 1, "high": 2},
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def rows(n=12):
    return [{"text": " ".join(f"w{(i * k) % 38 + 2}" for k in range(1, 6)), "label": i % 3} for i in range(n)]


def test_files_become_batches(tmp_path):
    names = ["low", "middle", "high"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in rows()))
    (tmp_path / "b.csv").write_text("text,label\n" + "\n".join(f"{r['text']},{names[r['label']]}" for r in rows()))
    model = classifier()
    by_number = measure_file(tmp_path / "a.jsonl", model, tokenizer(), batch_size=5)
    by_name = measure_file(tmp_path / "b.csv", model, tokenizer(), batch_size=5)
    assert [len(b["labels"]) for b in by_number.batches] == [5, 5, 2]
    for a, b in zip(by_number.batches, by_name.batches, strict=True):
        assert torch.equal(a["labels"], b["labels"])
        assert torch.equal(a["input_ids"], b["input_ids"])
    assert by_number.score_name == "accuracy"
    guesses = [
        model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits.argmax(-1) for b in by_number.batches
    ]
    right = sum(int((g == b["labels"]).sum()) for g, b in zip(guesses, by_number.batches))
    assert by_number.score(model) == right / 12
    text = measure_file(tmp_path / "a.jsonl", llama(), tokenizer(), batch_size=4, limit=6)
    assert text.score_name == "loss"
    assert [len(b["labels"]) for b in text.batches] == [4, 2]
    assert text.score(llama()) > 0


def test_wrong_data_are_named(tmp_path):
    with pytest.raises(DataError, match="no data at"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"allowed are \.jsonl and \.csv"):
        read_rows(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_text("sentence,label\nw2,0\n")
    with pytest.raises(DataError, match="no column 'text'; it has sentence, label"):
        read_rows(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="no rows"):
        read_rows(tmp_path / "b.csv")
    (tmp_path / "c.csv").write_text("text\nw2\n")
    with pytest.raises(AdapterFileError, match="--label-column"):
        measure_file(tmp_path / "c.csv", classifier(), tokenizer())
    (tmp_path / "d.csv").write_text("text,label\nw2,7\n")
    with pytest.raises(DataError, match="label 7; the model has 3 classes: low, middle, high"):
        measure_file(tmp_path / "d.csv", classifier(), tokenizer())
    (tmp_path / "e.jsonl").write_text("{bad")
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "e.jsonl")


def test_logits_after_no_compression_stay(tmp_path):
    live = save_lora(tmp_path / "a")
    compress_adapter(tmp_path / "a", tmp_path / "out", budget=1)
    assert torch.allclose(logits(load_peft(tmp_path / "out")), logits(live.eval()), atol=1e-5)
