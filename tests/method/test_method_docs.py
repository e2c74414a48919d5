"""docs/method.md names what exists, and all of it."""

import importlib
import re
from pathlib import Path

import pytest
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import LoraConfig

from adalora import AdaLoraConfig

DOCS = Path(__file__).parents[2] / "docs/method.md"


@pytest.fixture(scope="module")
def text():
    return DOCS.read_text(encoding="utf-8")


def resolve(path):
    """The object behind a dotted name."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


def test_every_code_name_exists(text):
    names = re.findall(r"`(adalora\.[\w.]+)`", text)
    groups = {name for name in names if name in ("adalora.importance", "adalora.schedules")}  # of entry points
    assert len(groups) == 2
    assert len(names) > 10
    for name in set(names) - groups:
        assert resolve(name) is not None


def test_every_option_and_every_choice_is_explained(text):
    for name, field in AdaLoraConfig.model_fields.items():
        assert re.search(rf"`{name}\b", text), name
        for choice in re.findall(r"Literal\[([^\]]*)\]", str(field.annotation)):
            for value in re.findall(r"'(\w+)'", choice):
                if value not in ("rank", "global", "before", "after", "total", "parameters"):
                    assert f'"{value}"' in text, (name, value)


def test_the_table_has_all_of_pefts_fields(text):
    own = set(PeftAdaLoraConfig.__dataclass_fields__) - set(LoraConfig.__dataclass_fields__)
    table = text.split("## From PEFT's AdaLoraConfig")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|$", table, re.MULTILINE))
    assert set(rows) == own | {"rank_pattern"}
    for ours in rows.values():
        if re.fullmatch(r"`\w+`", ours):
            assert ours.strip("`") in AdaLoraConfig.model_fields


def test_files_named_exist(text):
    for path in re.findall(r"`(tests/[\w/.]+)`", text):
        assert (DOCS.parents[1] / path).exists()
    for path in re.findall(r"\]\(([\w-]+\.md)\)", text):
        assert (DOCS.parent / path).exists()


def test_options_written_in_the_text_are_accepted(text):
    """`name=value` pairs, each by itself where it stands alone."""
    for name, value in re.findall(r"`(\w+)=(\"[\w.]+\"|True|False)`", text):
        if name in ("padding", "padding_mode"):  # a convolution's
            continue
        fields = {name: value.strip('"') if value.startswith('"') else value == "True"}
        if fields.get("orthogonality") in ("squared", "released"):
            fields["parametrization"] = "svd"
        if name == "score_gradient":
            fields.update(parametrization="svd", orthogonality="squared")
        AdaLoraConfig(**fields)
