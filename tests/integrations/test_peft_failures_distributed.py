"""PEFT 0.21.2's failures with several processes, as in `tests/test_peft_failures.py`; PEFT's are expected."""

import pytest
from launching import launch

from helpers.oldest import shards_on_cpu

BOTH = pytest.mark.parametrize(
    "kind", ["ours", pytest.param("peft", marks=pytest.mark.xfail(strict=True, reason="PEFT 0.21.2"))]
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Ours first: a case that ends in the middle of a step may leave something behind."""
    cases = [f"{case}-{kind}" for kind in ("ours", "peft") for case in ("no_sync", "reentrant", "sharded")]
    return launch("peft_worker.py", cases, tmp_path_factory.mktemp("peft"))


@shards_on_cpu
@BOTH
def test_26_fully_sharded(kind, result):
    """PEFT: its allocator takes masks of sharded tensors for lists."""
    assert result(f"sharded-{kind}") == {}


@BOTH
def test_27_ranks_agree_where_some_gradients_do_not(kind, result):
    """PEFT: after steps under `no_sync` each process keeps triplets of its own choice."""
    first, second = result(f"no_sync-{kind}")["kept"]
    assert len(first) > 10
    assert first == second


@BOTH
def test_28_ddp_with_reentrant_checkpointing(kind, result):
    """PEFT: its regulariser uses parameters outside of the checkpoint, a second time."""
    first, second = result(f"reentrant-{kind}")["kept"]
    assert first == second
