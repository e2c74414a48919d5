"""What is asked of the hub, and what is said where it does not answer; no test here asks the real one."""

import datasets
import pytest

from adalora.errors import DataError
from adalora.tasks.data.hub import load_hub

SCRIPT = "Dataset scripts are no longer supported, but found e2e_nlg.py"


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the hub; a function sets its answer, which raises where it gets an error."""
    calls = []

    def answers(answer):
        def load_dataset(name, config=None, **options):
            calls.append((name, config, options))
            return answer(options)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return answers


def test_splits_come_as_they_are(asked):
    calls = asked(lambda options: datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})))
    found = load_hub("someone/rows", "part", streaming=True)
    assert type(found) is dict
    assert found["train"]["text"][:] == ["a"]
    assert calls == [("someone/rows", "part", {"streaming": True})]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_that_is_published_as_a_script_is_read_in_the_hubs_conversion(asked, streaming):
    def answer(options):
        if "revision" not in options:
            raise RuntimeError(SCRIPT)
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["converted"]}))

    calls = asked(answer)
    assert load_hub("e2e_nlg", "one", streaming=streaming)["train"]["text"][:] == ["converted"]
    assert calls == [
        ("e2e_nlg", "one", {"streaming": streaming}),
        ("e2e_nlg", "one", {"streaming": streaming, "revision": "refs/convert/parquet"}),
    ]


def test_a_script_that_the_hub_has_not_converted_is_an_error_with_a_way_on(asked):
    def answer(options):
        if "revision" in options:
            raise FileNotFoundError("no such revision")
        raise RuntimeError(SCRIPT)

    asked(answer)
    with pytest.raises(DataError, match=r"'someone/e2e_nlg' .*no such revision.*folder 'e2e_nlg'.*ADALORA_DATA"):
        load_hub("someone/e2e_nlg")


def test_other_errors_are_not_asked_again(asked):
    def answer(options):
        raise RuntimeError("another trouble\nwith more lines")

    calls = asked(answer)
    with pytest.raises(DataError, match=r"'rows' \(part\) cannot be read from the hub: another trouble\. Without"):
        load_hub("rows", "part")
    assert len(calls) == 1
