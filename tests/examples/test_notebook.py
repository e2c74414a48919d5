"""The example notebook runs from its first cell to its last, and shows what its text says."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "where-the-rank-went.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute(), folder


# Of Jupyter's own code.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def outputs_of(notebook, source):
    (cell,) = [c for c in notebook.cells if c.cell_type == "code" and c.source.endswith(source)]
    return cell.outputs


def test_the_rank_sits_where_the_text_says(executed):
    notebook, _ = executed
    (output,) = outputs_of(notebook, "\ncontroller.ranks")
    ranks = eval(output["data"]["text/plain"])
    assert sum(ranks.values()) == 12
    assert ranks["layers.1"] + ranks["layers.4"] > 6


@pytest.mark.parametrize("call", ["ranks", "ranks_over_time", "budget", "loss", "singular_values"])
def test_every_picture_is_shown(executed, call):
    outputs = outputs_of(executed[0], f"controller.plot_{call}()")
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_no_cell_warns_and_files_are_written(executed):
    notebook, folder = executed
    streams = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if o.get("name") == "stderr"]
    assert [o.text for o in streams if "AdaLoraWarning" in o.text] == []
    assert (folder / "report.html").stat().st_size > 100_000
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_it_is_committed_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
