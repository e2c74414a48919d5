"""Adapters with grouped convolutions: what is written is what the live model computes, in PEFT and in diffusers."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

import adalora
from adalora.errors import AdapterFileError
from adalora.export import export_adapter, inspect_adapter
from adalora.export.adapter import make_factor
from adalora.export.base import guess_base
from adalora.export.cleanup import clean, clean_factor, truncate
from adalora.export.formats import to_tensors
from adalora.export.merged import add_factor
from adalora.export.pruned import read_pruned, revive
from adalora.export.reading import read_adapter
from adalora.export.stacks.verifying import verify_adapter
from helpers.oldest import loads_every_adapter

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")


class Net(nn.Module):
    """Two convolutions with groups, one without, and a head."""

    def __init__(self, groups=2):
        super().__init__()
        self.mix = nn.Conv1d(6, 8, 3, padding=1, groups=groups)
        self.deep = nn.Conv2d(4, 8, (2, 1), groups=4)
        self.plain = nn.Conv1d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.mix(x)).unflatten(1, (4, 2))
        h = torch.tanh(self.deep(h)).flatten(2)
        return self.head(torch.tanh(self.plain(h)).mean(dim=2))


NAMES = ["mix", "deep", "plain", "head"]


def base():
    torch.manual_seed(3)
    return Net()


def data(step):
    return torch.randn(16, 6, 5, generator=torch.Generator().manual_seed(step))


def trained(tmp_path=None, *, steps=40, **given):
    """A model after a run, with finished ranks, and its controller."""
    config = LoraConfig(r=8, lora_alpha=8, target_modules=NAMES)
    model = get_peft_model(base(), config)
    pruned = None if tmp_path is None else tmp_path / "pruned.safetensors"
    given = {"target_rank": 4, "min_rank": {"mix": 2, "deep": 4}, **given}
    controller = adalora.attach(model, total_steps=steps, pruned=pruned, **given)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(steps):
        x = data(step)
        (model(x) - x[:, :3].mean(dim=2) * 3).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    controller.finalize()
    return model, controller


@pytest.fixture(scope="module", params=["lora", "svd"])
def run(request):
    """Of each parametrization one, for what only looks at it."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trained(parametrization=request.param)


@pytest.fixture
def folder(run, tmp_path):
    run[0].save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def loaded(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base(), str(folder))


@pytest.mark.parametrize("format", ["portable", "ragged", "gguf-ragged"])
def test_stock_peft_loads_what_is_exported(run, folder, tmp_path, format):
    model, controller = run
    assert controller.live == controller.target_budget == 2 + 1 + 4 + 4
    x = data(99)
    with torch.no_grad():
        expected = model(x)
        assert float((expected - base()(x)).abs().max()) > 0.1
        torch.testing.assert_close(loaded(folder)(x), expected)
        report = export_adapter(tmp_path / "a", tmp_path / "out", format=format)
        torch.testing.assert_close(loaded(tmp_path / "out")(x), expected, atol=1e-5, rtol=1e-4)
    assert report.error < 1e-6
    ranks = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    groups = {h.name: h.groups for h in controller.handles}
    if format == "portable":
        assert (ranks["r"], ranks["rank_pattern"]) == (16, {})
    else:
        live = {h.name: h.lora_rank(h.rank) for h in controller.handles if h.rank}
        assert {**report.ranks, "head": 3} == {**live, "head": 3}  # which has three outputs, whatever its rank
        assert all(rank % groups[name] == 0 for name, rank in report.ranks.items())


def test_what_an_adapter_spends(run, folder):
    controller = run[1]
    found = {m.name: m for m in inspect_adapter(folder).modules}
    for h in controller.handles:
        if h.rank:
            m = found[h.name]
            assert (m.rank, m.d_out, m.d_in) == (h.lora_rank(h.rank), h.d_out, h.d_in)
            assert m.parameters == sum(p.numel() for p, _ in h.factors.values()) == h.rank * h.parameters_per_triplet
    adapter = read_adapter(folder)
    values = {name: f.values for name, f in clean(adapter).factors.items()}
    for record, h in zip(controller.history.last("finish")["singular_values"], controller.handles):
        squares = sum(v**2 for v in record)
        assert squares == pytest.approx(float(values[h.name].square().sum()) if h.rank else 0.0, rel=1e-4)


@pytest.mark.parametrize("budget", [0.75, 0.4])
def test_a_budget_takes_whole_triplets(folder, tmp_path, budget):
    adapter = read_adapter(folder)
    report = export_adapter(folder, tmp_path / "out", format="ragged", budget=budget)
    assert report.parameters_after <= budget * report.parameters_before
    cut = truncate(adapter, budget=budget)
    again = read_adapter(tmp_path / "out")
    assert {n: r for n, r in cut.adapter.ranks.items() if r} == again.ranks
    assert report.error == pytest.approx(cut.error, rel=1e-3)
    loaded(tmp_path / "out")(data(0))


def test_a_run_with_what_it_pruned(tmp_path):
    """The pruned triplets' file holds them as the adapter's: they come back group by group."""
    model, controller = trained(tmp_path)
    model.save_pretrained(tmp_path / "a")
    adapter, pruned = read_adapter(tmp_path / "a"), read_pruned(tmp_path / "pruned.safetensors")
    assert {name: f.groups for name, f in pruned.adapter.factors.items()}.items() <= {
        "mix": 2, "deep": 4, "plain": 1, "head": 1
    }.items()  # fmt: skip
    more = revive(adapter, 3.0, pruned)
    assert more.parameters > adapter.parameters
    assert sum(f.rank for f in more.factors.values()) == controller.initial_budget
    report = export_adapter(more, tmp_path / "more", format="ragged")
    assert report.error < 1e-6
    loaded(tmp_path / "more")(data(0))


@loads_every_adapter
def test_servers_refuse_and_peft_is_exact(folder):
    results = {r.stack: r.status for r in verify_adapter(folder)}
    assert results["PEFT"] == results["transformers"] == "exact"
    assert results["diffusers"] == "refused"
    assert "wrong" not in results.values()


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*")
def test_diffusers_refuses_as_it_is_said_to(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import PeftAdapterMixin

    class Picture(diffusers.ModelMixin, diffusers.ConfigMixin, PeftAdapterMixin):
        config_name = "config.json"

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, groups=2)

    model = get_peft_model(nn.ModuleDict({"conv": Picture().conv}), LoraConfig(r=4, target_modules=["conv"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Picture().load_lora_adapter(str(tmp_path), prefix="base_model.model", weight_name="adapter_model.safetensors")


def test_merging_is_refused(run):
    layer = run[0].base_model.model.mix
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    with pytest.raises(AdapterFileError, match=r"mix is a convolution with groups=2: .*--format ragged"):
        add_factor(base().mix, make_factor("mix", A, B, 1.0))


def test_ranks_that_no_portable_size_fits(tmp_path):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            nn.Sequential(nn.Conv1d(6, 6, 3, groups=3)), LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
        )
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterFileError, match=r"multiple of 3, here from 3 up: --rank-multiple 3, or --format ragged"):
        export_adapter(tmp_path / "a", tmp_path / "out")
    export_adapter(tmp_path / "a", tmp_path / "out", rank_multiple=4)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 12
    assert export_adapter(tmp_path / "a", tmp_path / "six", format="ragged", rank_multiple=2).error < 1e-6
    assert json.loads((tmp_path / "six" / "adapter_config.json").read_text())["r"] == 6
    site = guess_base(read_adapter(tmp_path / "a")).sites["0"]
    assert (site.kind, site.d_out, site.d_in) == ("conv", 6, 3 * 18)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
def test_cleaning_and_writing_keep_the_update(groups, ins, outs, rank, more):
    torch.manual_seed(groups + 7 * rank)
    A = torch.randn(groups * rank, groups * ins, 2, dtype=torch.float64)
    B = torch.randn(groups * outs, rank, 1, dtype=torch.float64)
    factor = make_factor("m", A, B, 0.7)
    expected = torch.zeros(groups * outs, groups * ins * 2, dtype=torch.float64)
    for o in range(groups * outs):
        for k in range(rank):
            expected[o] += 0.7 * B[o, k, 0] * A[o // outs * rank + k].flatten()
    torch.testing.assert_close(factor.delta(), expected)
    assert (factor.groups, factor.rank, factor.lora_rank) == (groups, rank, groups * rank)
    assert factor.parameters == A.numel() + B.numel()
    cleaned = clean_factor(factor)
    torch.testing.assert_close(cleaned.delta(), expected)
    assert cleaned.rank <= min(rank, outs, groups * ins * 2)
    assert float(cleaned.values.square().sum()) == pytest.approx(float(expected.square().sum()))
    written = to_tensors(cleaned, rank=groups * (cleaned.rank + more), scale=2.0, dtype=torch.float64)
    again = make_factor("m", *(written[f"base_model.model.m.lora_{which}.weight"] for which in "AB"), 2.0)
    assert again.groups == (groups if again.rank else again.groups)
    torch.testing.assert_close(again.delta(), expected)


def test_shapes_that_are_no_groups(tmp_path):
    tensors = {
        "base_model.model.m.lora_A.weight": torch.ones(5, 4, 3),
        "base_model.model.m.lora_B.weight": torch.ones(4, 2, 1),
    }
    save_file(tensors, str(tmp_path / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 5, "lora_alpha": 5, "target_modules": ["m"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match=r"m: lora_A \(5, 4, 3\) .* share neither a rank nor a number of groups"):
        read_adapter(tmp_path)
