"""What the GPU's benchmark measures and publishes, tried on the CPU: a page that holds what the file says."""

import json
from dataclasses import replace

import pytest
import torch
import typer
from benchmarks.models import METHODS, MINILM

from benchmarks import cuda, overhead

NARROW = replace(MINILM, layers=1, hidden=24, intermediate=48, batch=2, length=8)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def measured():
    torch.set_num_threads(1)  # before the fixture that does it for every test
    return {
        **cuda.measure(torch.device("cpu"), shapes=(NARROW,), steps=26, turn=1),
        "machine": {**overhead._machine(), "gpu": "none", "commit": ""},
    }


def test_every_phase_of_every_method_is_measured(measured):
    own = measured["shapes"]["MiniLM"]
    for precision in cuda.PRECISIONS:
        for phase in ("warmup", "decrease", "final", "run"):
            assert own[precision][phase].keys() == set(METHODS)
            assert own[precision][phase]["lora"]["median"] == 1
            assert own[precision][phase]["ours"]["ms"] > 0
    assert own["controller_ms"].keys() >= {"warmup", "hand-over", "decrease", "removal", "final"}


def test_publishing_fills_the_page_and_can_be_done_again(measured, tmp_path):
    measured["shapes"]["MiniLM"]["fp32"]["peak_bytes"]["ours"] = {"warmup": 5e6, "decrease": 4e6, "final": 3e6}
    (tmp_path / "cuda.json").write_text(json.dumps(measured))
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"# Above\n\n{cuda.START}\n\nNothing yet.\n\n{cuda.END}\n\nBelow\n")
    for _ in range(2):
        cuda.publish(tmp_path, results, page)
    text = page.read_text()
    assert text.startswith("# Above\n")
    assert text.endswith(f"{cuda.END}\n\nBelow\n")
    assert "Nothing yet" not in text
    assert text.count("| adalora, fp32 |") == 1
    assert "5 MB, 4 MB, 3 MB" in text
    median = measured["shapes"]["MiniLM"]["fp32"]["final"]["ours"]["median"]
    assert f"{median:.2f} (" in text
    assert json.loads(results.read_text())["machine"]["commit"]


def test_the_page_of_the_repository_has_the_place():
    text = cuda.PAGE.read_text(encoding="utf-8")
    assert text.index(cuda.START) < text.index(cuda.END)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(typer.BadParameter, match="no CUDA device here"):
        overhead.main(out=tmp_path, device="cuda")
