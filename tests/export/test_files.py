import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from adalora.errors import AdapterFileError
from adalora.export.files import check_name, new_folder, read_header, read_json, read_tensors


def write_raw(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_good_file_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    wanted = {"a.weight": torch.randn(3, 2), "b": torch.ones(0, 4, dtype=torch.bfloat16)}
    save_file(wanted, str(file), metadata={"format": "pt"})
    header = read_header(file)
    assert set(header) == {"a.weight", "b", "__metadata__"}
    got = read_tensors(file)
    assert torch.equal(got["a.weight"], wanted["a.weight"])
    assert got["b"].shape == (0, 4)


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"../../etc/x": entry()}, b"\0" * 8, "unsafe name"),
        ({"a/b": entry()}, b"\0" * 8, "unsafe name"),
        ({"a..b": entry()}, b"\0" * 8, "unsafe name"),
        ({"": entry()}, b"\0" * 8, "unsafe name"),
        ({"a\nb": entry()}, b"\0" * 8, "unsafe name"),
        ({"a": entry(offsets=(0, 4))}, b"\0" * 8, "needs 8 bytes"),
        ({"a": entry(offsets=(0, 80), shape=(20,))}, b"\0" * 8, "needs 80 bytes"),
        ({"a": entry(), "b": entry()}, b"\0" * 8, "overlap"),
        ({"a": entry(offsets=(4, 12))}, b"\0" * 12, "hole"),
        ({"a": entry()}, b"\0" * 9, "after the last tensor"),
        ({"a": entry(dtype="PICKLE")}, b"\0" * 8, "dtype 'PICKLE'"),
        ({"a": entry(shape=(-2,))}, b"\0" * 8, "no tensor has"),
        ({"a": entry(shape=(True,), offsets=(0, 4))}, b"\0" * 4, "no tensor has"),
        ({"a": {"dtype": "F32"}}, b"", "malformed"),
        ({"a": 3}, b"", "malformed"),
        ({"__metadata__": {"a": 1}}, b"", "strings"),
        (b"[1]", b"", "JSON object"),
        (b"{not json", b"", "not JSON"),
        (b"\xff\xfe{}", b"", "not JSON"),
        (b'{"a": {}, "a": {}}', b"", "twice"),
        (b"[" * 100_000, b"", "not JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", b"", "not JSON"),
    ],
)
def test_hostile_headers_are_refused_with_one_line(tmp_path, header, data, words):
    file = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(AdapterFileError, match=words) as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(AdapterFileError, match="cut off"):
        read_header(file)
    file.write_bytes(b"abc")
    with pytest.raises(AdapterFileError, match="3 bytes"):
        read_header(file)


@settings(max_examples=60, deadline=None)
@given(raw=st.binary(max_size=200))
def test_random_bytes_never_crash_the_reader(tmp_path_factory, raw):
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    file.write_bytes(raw)
    try:
        read_header(file)
    except AdapterFileError:
        return
    read_tensors(file)  # what passes the check, the library reads


@given(name=st.text(max_size=30))
def test_no_name_that_is_accepted_can_leave_a_folder(name):
    try:
        check_name(name, where="x")
    except AdapterFileError:
        return
    assert name
    assert "/" not in name
    assert "\\" not in name
    assert ".." not in name
    assert not name.startswith(".")


def test_json_must_be_an_object(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("[]")
    with pytest.raises(AdapterFileError, match="object"):
        read_json(file)
    with pytest.raises(AdapterFileError, match="no file"):
        read_json(tmp_path / "none.json")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"

    def write_half():
        with new_folder(out) as work:
            (work / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list((tmp_path / "deep").iterdir()) == []
    with new_folder(out) as work:
        (work / "adapter_config.json").write_text("{}")
    assert [f.name for f in out.iterdir()] == ["adapter_config.json"]
    assert list((tmp_path / "deep").iterdir()) == [out]


def test_what_is_there_is_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(AdapterFileError), new_folder(out, overwrite=overwrite):
            pytest.fail("the folder was given out")
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").unlink()
    with new_folder(out) as work:
        (work / "adapter_config.json").write_text("1")
    with pytest.raises(RuntimeError), new_folder(out, overwrite=True) as work:
        raise RuntimeError
    assert (out / "adapter_config.json").read_text() == "1"
    with new_folder(out, overwrite=True) as work:
        (work / "adapter_config.json").write_text("2")
    assert (out / "adapter_config.json").read_text() == "2"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    link = tmp_path / "link"
    link.symlink_to(out)
    with pytest.raises(AdapterFileError, match="no folder"), new_folder(link, overwrite=True):
        pytest.fail("a link was replaced")
