"""`watch`: records as they come, frames that show what the records say, plain lines without a terminal."""

import io
import json
import re
import threading
import time

import pytest
from rich.console import Console

from adalora.errors import HistoryError
from adalora.report.terminal import WatchState, frame, heatmap, plain_line
from adalora.report.watch import Tail, watch
from helpers.synthetic import LLAMA, run


def state_of(history):
    state = WatchState()
    for record in history:
        state.update(record)
    return state


def drawn(renderable, *, width=80, color=None):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=color is not None, color_system=color)
    console.print(renderable)
    return file.getvalue()


def test_tail_waits_for_whole_lines(tmp_path):
    tail, file = Tail(tmp_path), tmp_path / "history.jsonl"
    assert tail.read() == []
    file.write_text('{"event": "step", "step": 0}\n{"event": "st')
    assert [r["step"] for r in tail.read()] == [0]
    assert tail.read() == []
    with file.open("a") as end:
        end.write('ep", "step": 1}\n')
    assert [r["step"] for r in tail.read()] == [1]


def test_tail_notices_a_new_run(tmp_path):
    tail, file = Tail(tmp_path / "history.jsonl"), tmp_path / "history.jsonl"
    file.write_text('{"event": "step", "step": 0}\n' * 3)
    assert len(tail.read()) == 3
    file.write_text('{"event": "step", "step": 7}\n')
    assert [r["step"] for r in tail.read()] == [7]
    assert tail.restarted


@pytest.mark.parametrize("line", ["{nonsense}", "[1]", '{"step": 1}'])
def test_tail_refuses_what_is_no_record(tmp_path, line):
    (tmp_path / "history.jsonl").write_text(line + "\n")
    with pytest.raises(HistoryError, match=r"history\.jsonl: not a"):
        Tail(tmp_path).read()


def test_the_frame_holds_the_numbers_of_the_history():
    history = run(layers=6, stop_at=150)
    text = drawn(frame(state_of(history), width=80))
    last, ranks = history.of("step")[-1], history.of("allocation")[-1]["ranks"]
    assert "150/400" in text
    assert f"budget {last['budget']}, target 288" in text
    assert f"{sum(ranks)}/432" in text
    assert f"dev accuracy {history.last('metric')['values']['accuracy']:.4g}" in text
    for i, kind in enumerate(["query", "key", "value"]):
        row = next(line for line in text.splitlines() if line.startswith(f"{kind} "))
        assert [int(n) for n in row.split()[1:]] == [*ranks[i::6], sum(ranks[i::6])]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    for history in (run(layers=12, stop_at=100), run(layers=100, types=LLAMA, steps=100, stop_at=60)):
        state = state_of(history)
        lines = drawn(heatmap(state, width=width), width=1000).splitlines()
        assert max(len(line.rstrip()) for line in lines) <= width
        assert len(lines) == 1 + state.places["type"].nunique()


def test_blocks_can_be_told_apart_without_colour():
    state = state_of(run(layers=60, steps=100))
    state.ranks = [12] * 180 + [0] * 180
    row = next(line for line in drawn(heatmap(state, width=80)).splitlines() if line.startswith("query "))
    assert re.fullmatch(r"query +(█+) +(\d+)", row.strip())[2] == str(30 * 12)


def test_colours_on_a_terminal():
    text = drawn(frame(state_of(run(layers=6)), width=80), color="truecolor")
    assert "\x1b[30;48;2;253;231;37m" in text  # black on viridis' yellow: full rank


def test_findings_are_shown():
    history = run(layers=2, stop_at=20)
    history.add("diagnostic", step=9, code="slow-start", message="hardly moved", cure="raise it")
    state = state_of(history)
    assert "! slow-start: hardly moved\n  raise it" in drawn(frame(state, width=80))
    assert plain_line(state).endswith("! slow-start")


def test_plain_line_of_every_stage():
    assert plain_line(WatchState()) == "waiting for the run to start"
    assert plain_line(state_of(run(stop_at=0))) == "step 0/400 | starting | budget 432 | live 432"
    history = run(stop_at=60, metrics=False)
    last = history.of("step")[-1]
    line = plain_line(state_of(history))
    assert line.startswith(f"step 60/400 | budget shrinks | budget {last['budget']} | live {last['live']} | loss ")
    assert line.endswith("| 0:00:17 left")
    assert plain_line(state_of(run())).startswith("step 400/400 | finished | budget 288 | live 288 | loss 0.")


def test_watch_follows_a_run_that_grows(tmp_path):
    lines = [json.dumps(r) + "\n" for r in run(layers=2, steps=60)]
    file = tmp_path / "history.jsonl"

    def grow():
        for at in range(0, len(lines), 10):
            time.sleep(0.03)
            with file.open("a") as end:
                end.writelines(lines[at : at + 10])

    thread = threading.Thread(target=grow)
    thread.start()
    output = io.StringIO()
    watch(tmp_path, interval=0.01, console=Console(file=output, width=80))
    thread.join()
    shown = output.getvalue().splitlines()
    assert shown[0] == "waiting for the run to start"
    assert shown[-1].startswith("step 60/60 | finished | budget 96 | live 96")
    steps = [int(re.match(r"step (\d+)", line)[1]) for line in shown[1:]]
    assert steps == sorted(steps)
    assert len(steps) >= 3


def test_watch_on_a_terminal_redraws_in_place(tmp_path):
    run(path=tmp_path / "history.jsonl", layers=2, steps=60)
    output = io.StringIO()
    watch(tmp_path, interval=0.01, console=Console(file=output, width=80, force_terminal=True))
    assert "60/60" in output.getvalue()
    assert "finished" in output.getvalue()


def test_once_needs_a_run(tmp_path):
    with pytest.raises(HistoryError, match="no run at"):
        watch(tmp_path, once=True)
