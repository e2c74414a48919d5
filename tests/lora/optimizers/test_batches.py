"""Hand-over and compaction of many layers at once are those of every layer alone, whatever the optimizer."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adalora.core.initialization import balance
from adalora.lora.layers.triplets import find_triplets
from adalora.lora.optimizers.batches import plain_moments, select_together
from adalora.lora.optimizers.state import cut_state, turn_state
from adalora.lora.orthogonality.orthogonal import hand_over
from adalora.lora.ranks.compaction import compact
from helpers.optimizers import OPTIMIZERS


class Net(nn.Module):
    """Layers of several kinds and shapes, several of each; `unused` gets no gradient and so never leaves zero."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.up = nn.ModuleList(nn.Linear(8, 12) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(12, 8) for _ in range(3))
        self.conv = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(2))
        self.narrow = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 12)

    def forward(self, words):
        x = self.words(words)
        for up, down in zip(self.up, self.down):
            x = x + down(torch.tanh(up(x)))
        for conv in self.conv:
            x = x + torch.tanh(conv(x.mT).mT)
        return self.narrow(x)


def trained(optimizer="adamw_single", *, dtype=torch.float32, ranks=None):
    """A model with an adapter and its optimizer after some steps, the same one every time."""
    torch.manual_seed(0)
    targets = r"words|up\.\d|down\.\d|conv\.\d|narrow|unused"
    config = LoraConfig(r=5, lora_alpha=5, target_modules=targets, rank_pattern=ranks or {})
    model = get_peft_model(Net().to(dtype), config, autocast_adapter_dtype=False)
    made = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    getattr(made, "train", lambda: None)()
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        words = torch.randint(0, 9, (4, 6), generator=generator)
        made.zero_grad()
        model(words).square().mean().backward()
        made.step()
    handles = find_triplets(model, "default")
    if optimizer == "lion":  # moves by signs: some products lack rank, and a null space's vectors are anyone's choice
        with torch.no_grad():
            for P_or in (h.P_or for h in handles if h.P_or.any()):
                P_or.add_(torch.randn(P_or.shape, generator=generator).to(P_or), alpha=0.02)
    return model, made, handles


def hand_over_alone(handle, optimizer):
    """One layer, literally."""
    P, Q = handle.P_or.clone(), handle.Q_ri.clone()
    if handle.rank > Q.shape[1] or not P.any() or not (P.isfinite().all() and Q.isfinite().all()):
        return
    new = balance(P, Q, row_norm=handle.row_norm)
    turn_state(optimizer, handle.P_parameter, handle.P_dim, gradient=new.to_Q, weight=new.to_P.T)
    turn_state(optimizer, handle.Q_parameter, handle.Q_dim, gradient=new.to_P.T, weight=new.to_Q)
    handle.P_or.copy_(new.P_or)
    handle.Q_ri.copy_(new.Q_ri)


def tensors(optimizer, handles):
    """Everything that may have changed, by name."""
    found = {}
    for h in handles:
        for factor, (parameter, _) in h.factors.items():
            name = f"{h.name}.{factor}"
            found[name] = parameter.detach()
            if parameter.grad is not None:
                found[f"{name}.grad"] = parameter.grad
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    found[f"{name}.{key}"] = value
    return found


def assert_same(mine, theirs, **tolerance):
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.shape == theirs[name].shape
        assert value.stride() == theirs[name].stride(), name
        torch.testing.assert_close(value, theirs[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("ranks", [{}, {"up.1": 2, "conv.0": 3}])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@torch.no_grad()
def test_hand_over_is_that_of_every_layer_alone(optimizer, ranks):
    with torch.enable_grad():
        (_, made, handles), (_, other, expected) = (trained(optimizer, ranks=ranks) for _ in range(2))
    for each in (handles, expected):
        each[2].P_or[0, 0] = torch.nan  # has diverged
    before = copy.deepcopy(tensors(made, handles))
    for h in expected:
        hand_over_alone(h, other)
    hand_over(handles, made)
    mine = tensors(made, handles)
    if not optimizer.startswith("8bit"):  # a code may be the next one
        assert_same(mine, tensors(other, expected), rtol=1e-4, atol=1e-6, equal_nan=True)
    for name in ("unused.P", f"{handles[2].name}.P"):
        torch.testing.assert_close(mine[name], before[name], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(mine["up.0.P"], before["up.0.P"])
    for h in handles:
        if h.name not in ("unused", handles[2].name):
            gram = h.P_or.T @ h.P_or
            off = gram - gram.diagonal().diag()
            assert float(off.abs().max()) <= 1e-4 * float(gram.max())


@torch.no_grad()
def test_hand_over_where_one_layer_has_no_state_yet():
    """Among layers of one shape, one has been trained by nobody so far."""
    with torch.enable_grad():
        (_, made, handles), (_, other, expected) = (trained() for _ in range(2))
    for each, optimizer in ((handles, made), (expected, other)):
        for parameter, _ in each[1].factors.values():
            del optimizer.state[parameter]
    for h in expected:
        hand_over_alone(h, other)
    hand_over(handles, made)
    assert_same(tensors(made, handles), tensors(other, expected), rtol=1e-4, atol=1e-6)


def test_hand_over_in_half_precision_and_without_an_optimizer():
    (_, _, handles), (_, _, expected) = (trained("sgd", dtype=torch.bfloat16) for _ in range(2))
    before = [h.P_or @ h.Q_ri for h in handles]
    hand_over(handles, None)
    none = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with torch.no_grad():
        for h, e, product in zip(handles, expected, before):
            hand_over_alone(e, none)
            torch.testing.assert_close(h.P_or, e.P_or)
            torch.testing.assert_close(h.Q_ri, e.Q_ri)
            torch.testing.assert_close(h.P_or @ h.Q_ri, product, rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_compaction_is_the_cut_of_every_layer_alone(optimizer):
    _, made, handles = trained(optimizer)
    generator = torch.Generator().manual_seed(4)
    expected = {}
    for h in handles:
        h.mask = torch.rand(h.rank, generator=generator) < 0.6
        h.mask[0], h.mask[1] = True, False
        index = h.mask.nonzero().squeeze(1)
        for factor, (parameter, dim) in h.factors.items():
            name = f"{h.name}.{factor}"
            expected[name] = parameter.detach().index_select(dim, index).contiguous()
            if parameter.grad is not None:
                expected[f"{name}.grad"] = parameter.grad.index_select(dim, index).contiguous()
            for key, value in cut_state(made, parameter, dim, index).items():
                if isinstance(value, torch.Tensor):
                    expected[f"{name}.{key}"] = value
    compact(handles, made)
    found = tensors(made, handles)
    assert_same(found, expected, rtol=0, atol=0)
    storages = [value.untyped_storage().data_ptr() for name, value in found.items() if name[-2:] in (".P", ".Q")]
    assert len(set(storages)) == len(storages)  # no two share memory: they are saved and freed one by one


def test_only_moments_of_the_parameters_own_shape_are_plain():
    for optimizer, plain in {"adamw_single": {"exp_avg", "exp_avg_sq"}, "sgd": set(), "adafactor": None}.items():
        _, made, handles = trained(optimizer)
        found = plain_moments(made, handles[1].P_parameter)
        assert (None if found is None else set(found)) == plain


def test_select_together_is_index_select():
    torch.manual_seed(0)
    given = [torch.randn(4, 6), torch.randn(4, 2), torch.randn(7, 4).T, torch.randn(4, 3, 2).half(), torch.randn(6)]
    dims, kept = [1, 1, 0, 1, 0], [[0, 2, 5], [], [1, 3], [2], [0, 1, 2, 3, 4, 5]]
    for tensor, dim, stays, found in zip(given, dims, kept, select_together(given, dims, kept)):
        assert torch.equal(found, tensor.index_select(dim, torch.tensor(stays, dtype=torch.int64)))
        assert found.is_contiguous()
