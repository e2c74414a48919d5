"""Versions and commands that are written in two places say the same."""

import re
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared():
    """Requirements of the package and of the extra `tasks`."""
    lines = [*project()["dependencies"], *project()["optional-dependencies"]["tasks"]]
    return {found.name.lower(): found for found in map(Requirement, lines)}


def test_environments_are_installed_as_pinned():
    """Tests of optimizers and quantised bases, which the oldest versions run too, skip what is missing."""
    newest = {name.lower(): version for name, version in pins("constraints.txt").items()}
    for line in project()["optional-dependencies"]["environments"]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(newest[requirement.name]), requirement.name
        if find_spec("trl") is not None:  # not beside the oldest versions
            assert requirement.specifier.contains(metadata.version(requirement.name)), requirement.name


def test_the_oldest_versions_are_the_lowest_that_are_allowed():
    oldest = {name.lower(): Version(version) for name, version in pins("constraints-oldest.txt").items()}
    for name, requirement in declared().items():
        (lowest,) = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        assert oldest[name].release[: len(lowest.release)] == lowest.release, name
        assert requirement.specifier.contains(oldest[name])


def test_what_the_tests_run_with_is_allowed():
    newest = {name.lower(): version for name, version in pins("constraints.txt").items()}
    for name, requirement in declared().items():
        assert requirement.specifier.contains(newest.get(name, "999")), name


def test_hooks_have_the_versions_of_the_constraints():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    tools = pins("constraints.txt")
    for repository in yaml.safe_load(text)["repos"]:
        for hook in repository["hooks"]:
            for dependency in hook.get("additional_dependencies", []):
                name, version = dependency.split("==")
                assert tools[name] == version
    assert f"name: mypy {tools['mypy']}" in text


def test_workflows_and_pages_name_targets_that_the_makefile_has():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        (job,) = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
        asked |= set(job["strategy"]["matrix"]["target"])
    for page in ("README.md", "CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md"):
        asked |= set(re.findall(r"`make ([\w-]+)`", (ROOT / page).read_text(encoding="utf-8")))
    assert len(asked) >= 7
    assert asked <= targets


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_issue_forms_are_valid(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(form)
    names = [part["id"] for part in form["body"]]
    assert len(set(names)) == len(names)
    assert all(part["attributes"]["label"] for part in form["body"])


def test_the_page_of_the_benchmarks_names_what_there_is_and_nothing_else():
    folder = ROOT / "benchmarks"
    text = (folder / "README.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`([\w-]+\.(?:py|yaml|jsonl?|png))`", text))
    there = {path.name for path in [*folder.iterdir(), *(folder / "results").iterdir()] if path.is_file()}
    assert told == there - {"README.md", "__init__.py"}


def test_every_folder_of_the_package_has_its_tests():
    """In a folder of its name; one inside a folder may have a file of its name instead."""
    package = ROOT / "src" / "adalora"
    folders = [path.parent.relative_to(package).as_posix() for path in package.glob("*/**/__init__.py")]
    assert "lora/layers" in folders
    beside = [ROOT / "tests" / name for name in sorted(folders)]
    assert [str(t) for t in beside if not [*t.rglob("test_*.py"), *t.parent.glob(f"test_{t.name}.py")]] == []


def test_every_folder_of_tests_is_one_of_the_package_or_on_the_page():
    tests, package = ROOT / "tests", ROOT / "src" / "adalora"
    found = {path.parent.relative_to(tests).as_posix() for path in tests.glob("*/**/*.py")}
    told = set(re.findall(r"`tests/([\w/]+)/`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))
    assert "method" in told
    assert sorted(name for name in found - told if not (package / name / "__init__.py").is_file()) == []
    assert told <= found
    assert [path.name for path in tests.glob("*.py") if not path.name.startswith("test_")] == ["conftest.py"]


def test_every_test_file_that_is_named_somewhere_exists():
    places = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    places += [path for folder in ("tests", "src", "docs", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    named = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in places
        for name in re.findall(r"\btests/[\w/]+\.py\b", path.read_text(encoding="utf-8"))
    }
    assert len(named) >= 5
    assert [(path, name) for path, name in sorted(named) if not (ROOT / name).is_file()] == []
