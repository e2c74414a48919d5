"""PEFT 0.21.2's failures with several processes, as in `tests/test_peft_failures.py`; PEFT's are expected."""

import pytest
from launching import launch

BOTH = pytest.mark.parametrize(
    "kind", ["ours", pytest.param("peft", marks=pytest.mark.xfail(strict=True, reason="PEFT 0.21.2"))]
)


def run(case, folder):
    return launch("peft_worker.py", case, folder)


@BOTH
def test_26_fully_sharded(kind, tmp_path):
    """PEFT: its allocator takes masks of sharded tensors for lists."""
    run(f"sharded-{kind}", tmp_path)


@BOTH
def test_27_ranks_agree_where_some_gradients_do_not(kind, tmp_path):
    """PEFT: after steps under `no_sync` each process keeps triplets of its own choice."""
    first, second = run(f"no_sync-{kind}", tmp_path)["kept"]
    assert first == second


@BOTH
def test_28_ddp_with_reentrant_checkpointing(kind, tmp_path):
    """PEFT: its regulariser uses parameters outside of the checkpoint, a second time."""
    first, second = run(f"reentrant-{kind}", tmp_path)["kept"]
    assert first == second
