"""`adalora --help` answers at once: nothing heavy is imported before a command needs it."""

import subprocess
import sys
import time

import pytest

import adalora

HEAVY = ("torch", "transformers", "peft", "pandas", "matplotlib")


def loaded_after(code):
    """Which of the heavy packages a fresh process holds after the code."""
    shown = f"{code}\nimport sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True).stdout.split()


def test_importing_the_command_line_imports_nothing_heavy():
    code = "import adalora.cli\nfrom adalora.cli import app, commands\ncommands.register(app)"
    assert loaded_after(code) == []


def test_the_public_names_bring_what_they_need():
    assert "torch" in loaded_after("import adalora\nadalora.attach")


@pytest.mark.parametrize(("option", "answer"), [("--version", "adalora 0."), ("--help", "watch")])
def test_it_answers_at_once(option, answer):
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        started = time.perf_counter()
        command = [sys.executable, "-c", "from adalora.cli import main; main()", option]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - started)
    assert answer in output
    assert min(seconds) < 2


def test_every_public_name_is_there():
    for name in adalora.__all__:
        assert getattr(adalora, name) is not None
    assert set(adalora.__all__) <= set(dir(adalora))
    assert callable(adalora.report)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = adalora.no_such_name
