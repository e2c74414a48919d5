"""What the GPU's benchmark measures and publishes, tried on the CPU: a page that holds what the file says."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import typer

from benchmarks import cuda, overhead
from benchmarks.models import METHODS, MINILM, training

CPU = torch.device("cpu")
NARROW = replace(MINILM, layers=1, hidden=24, intermediate=48, batch=2, length=8)
SIZES = {"shapes": (NARROW,), "steps": 26, "turn": 1}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def snapshots():
    """What the file held after every part."""
    torch.set_num_threads(1)  # before the fixture that does it for every test
    machine = {**overhead._machine(), "gpu": "none", "commit": ""}
    return [copy.deepcopy({**found, "machine": machine}) for found in cuda.measure(CPU, **SIZES)]


@pytest.fixture
def measured(snapshots):
    return copy.deepcopy(snapshots[-1])


def publish(results, folder):
    """The page with these results."""
    (folder / "cuda.json").write_text(json.dumps(results))
    page = folder / "page.md"
    page.write_text(f"# Above\n\n{cuda.START}\n\nNothing yet.\n\n{cuda.END}\n\nBelow\n")
    for _ in range(2):
        cuda.publish(folder, folder / "results.json", page)
    return page.read_text()


def test_every_phase_of_every_method_is_measured(measured):
    own = measured["shapes"]["MiniLM"]
    for precision in cuda.PRECISIONS:
        for phase in ("warmup", "decrease", "final", "run"):
            assert own[precision][phase].keys() == set(METHODS)
            assert own[precision][phase]["lora"]["median"] == 1
            assert own[precision][phase]["ours"]["ms"] > 0
    assert own["controller_ms"].keys() >= {"warmup", "hand-over", "decrease", "removal", "final"}


def test_phases_end_where_the_schedule_s_do():
    schedule = training("ours", NARROW, steps=cuda.STEPS).controller.schedule
    turns = cuda.phase_turns(cuda.STEPS, 1)
    assert turns["warmup"][1] == schedule.warmup_steps
    assert turns["decrease"][1] == schedule.decrease_end


def test_lora_s_and_ours_whole_run_is_there_first(snapshots):
    first = snapshots[0]["shapes"]["MiniLM"]
    assert first["fp32"]["run"].keys() == {"lora", "ours"}
    assert "bf16 autocast" not in first
    assert len(snapshots) == len(cuda.plan(CPU, **SIZES))


def test_a_file_that_stopped_anywhere_can_be_published(snapshots, tmp_path):
    for results in copy.deepcopy(snapshots):
        text = publish(results, tmp_path)
        assert text.count("| adalora, fp32 |") == 1
        assert ("| PEFT AdaLoRA, fp32 |" in text) == ("peft_adalora" in results["shapes"]["MiniLM"]["fp32"]["run"])
        assert ("The controller's part" in text) == ("controller_ms" in results["shapes"]["MiniLM"])


def test_parts_are_added_to_what_is_known_of_runs_of_that_length(snapshots):
    known = copy.deepcopy(snapshots[0])
    (found,) = cuda.measure(CPU, **SIZES, names=["controller"], known=known)
    assert found["shapes"]["MiniLM"]["fp32"] == snapshots[0]["shapes"]["MiniLM"]["fp32"]
    assert "controller_ms" in found["shapes"]["MiniLM"]
    (other,) = cuda.measure(CPU, **{**SIZES, "steps": 25}, names=["controller"], known=known)
    assert "fp32" not in other["shapes"]["MiniLM"]


def test_the_file_is_written_after_every_part(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(cuda, "measure", lambda device, **options: ({"shapes": {}, "part": n} for n in range(3)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    original = overhead._write
    monkeypatch.setattr(overhead, "_write", lambda path, results: (original(path, results), written.append(path)))
    overhead.on_gpu(tmp_path / "new", CPU, steps=10, names=cuda.PART_NAMES)
    assert written == [tmp_path / "new" / "cuda.json"] * 3
    assert json.loads(written[0].read_text())["part"] == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cuda.json"]


def test_publishing_fills_the_page_and_can_be_done_again(measured, tmp_path):
    measured["shapes"]["MiniLM"]["fp32"]["peak_bytes"]["ours"] = {"warmup": 5e6, "decrease": 4e6, "final": 3e6}
    text = publish(measured, tmp_path)
    assert text.startswith("# Above\n")
    assert text.endswith(f"{cuda.END}\n\nBelow\n")
    assert "Nothing yet" not in text
    assert text.count("| adalora, fp32 |") == 1
    assert "5 MB, 4 MB, 3 MB" in text
    median = measured["shapes"]["MiniLM"]["fp32"]["final"]["ours"]["median"]
    assert f"{median:.2f} (" in text
    assert json.loads((tmp_path / "results.json").read_text())["machine"]["commit"]


def test_the_page_of_the_repository_has_the_place():
    text = cuda.PAGE.read_text(encoding="utf-8")
    assert text.index(cuda.START) < text.index(cuda.END)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(typer.BadParameter, match="no CUDA device here"):
        overhead.main(out=tmp_path, device="cuda", steps=cuda.STEPS)


def test_unknown_parts_are_named(tmp_path):
    with pytest.raises(typer.BadParameter, match="no part counts; there are times, memory"):
        overhead.main(["counts"], out=tmp_path, device="cuda", steps=cuda.STEPS)
    with pytest.raises(typer.BadParameter, match="no part times; there are counts"):
        overhead.main(["times"], out=tmp_path)
