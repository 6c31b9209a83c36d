"""A read of a stranger's file ends, and ends in its content or in one line."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from starling.engine.errors import CheckpointError
from starling.engine.onnx_bytes import external_files
from starling.engine.untrusted_files import FileReader, is_file_name, is_inside

FILES = FileReader(CheckpointError, "get it again")
DEEP = 200_000


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def endless(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


def loop(path: Path) -> None:
    path.symlink_to(path)


def listener(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize("make", [fifo, device, endless, loop, listener, Path.mkdir], ids=lambda make: make.__name__)
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    file = tmp_path / "config.json"
    make(file)
    with pytest.raises(CheckpointError, match=r"config\.json (is no regular file|cannot be read: .*): get it again"):
        FILES.json(file)


def test_a_file_has_a_most_size_and_a_link_its_files(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"x" * 11)
    (tmp_path / "link").symlink_to(file)
    assert FILES.bytes(tmp_path / "link", most=11) == b"x" * 11
    with pytest.raises(CheckpointError, match="a has 11 bytes, more than 10: get it again"):
        FILES.bytes(file, most=10)
    os.truncate(file, 2**40)  # sparse
    with pytest.raises(CheckpointError, match=r"a has 1,099,511,627,776 bytes, more than"):
        FILES.text(file)
    with pytest.raises(FileNotFoundError):
        FILES.bytes(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[]", "is not a JSON object, but a list"),
        (b"[" * DEEP + b"]" * DEEP, "is not JSON: it nests deeper than 100"),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "is not JSON: it nests deeper than 100"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "is not JSON: it nests deeper than 100"),
        (b'{"a": 1%s}' % (b"0" * 5000), "is not JSON"),
        (b'{"a": "\\ud800"}', "half of a UTF-16 pair"),
        (b'{"\\udfff": 1}', "half of a UTF-16 pair"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_bad_json_is_said_in_a_line(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        FILES.json(file)
    assert str(caught.value).startswith(f"{file} {problem.partition('half')[0]}")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_within_the_bounds_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b'{"a":' * 100 + b'"\\ud83d\\ude00"' + b"}" * 100)
    value = FILES.json(file)
    for _ in range(100):
        value = value["a"]
    assert value == "\U0001f600"


@pytest.mark.parametrize("name", ["default", "tool_use", "rag-2.1", "A+b"])
def test_names_of_files(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "../x", "/tmp/x", "a/b", "a\\b", "C:x", "a\0", "a\n", "é", "a b", "a" * 121, 5, None],
)
def test_names_that_may_become_no_files(name: object) -> None:
    assert not is_file_name(name)


@pytest.mark.parametrize("path", ["model.onnx", "additional_chat_templates/code.jinja", "a b.txt", "ü/x"])
def test_paths_that_stay_inside(path: str) -> None:
    assert is_inside(path)


@pytest.mark.parametrize("path", ["", "/a", "a//b", "../a", "a/../b", "a/.", "a/ ", "a\\..\\b", "C:/x", "a\0b", "a\n"])
def test_paths_that_lead_elsewhere(path: str) -> None:
    assert not is_inside(path)


def test_a_folder_may_have_no_way_out_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "link").symlink_to("../config.json")
    (folder / "nothing").symlink_to("absent")
    FILES.check_folder(folder, folder.rglob("*"))
    for end in ("/etc/passwd", "../outside", "/dev/zero", "/proc/self/environ", "/dev"):
        (folder / "bad").symlink_to(end)
        with pytest.raises(CheckpointError, match=r"bad is a link to /.*, outside the folder: put the file itself"):
            FILES.check_folder(folder, folder.rglob("*"))
        (folder / "bad").unlink()
    os.mkfifo(folder / "sub" / "pipe")
    with pytest.raises(CheckpointError, match="pipe is neither a file nor a folder: remove it"):
        FILES.check_folder(folder, folder.rglob("*"))


def test_the_cache_of_a_model_hub_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    FILES.check_folder(snapshot, snapshot.iterdir())
    (snapshot / "secret").symlink_to("../../secret")
    with pytest.raises(CheckpointError, match="outside the folder"):
        FILES.check_folder(snapshot, snapshot.iterdir())


def test_files_of_weights_are_found_wherever_a_graph_has_them() -> None:
    def tensor(location: str) -> TensorProto:
        value = TensorProto(name=location, data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
        for key, text in (("offset", "0"), ("location", location), ("length", "4")):
            value.external_data.add(key=key, value=text)
        return value

    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=tensor("in an attribute"))], "inner", [], [], [tensor("inner")]
    )
    branch = helper.make_node("If", ["a"], ["b"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph([branch], "outer", [], [], [tensor("../outer"), helper.make_tensor("own", 1, [1], [1])])
    model = helper.make_model(graph).SerializeToString()
    assert external_files(model) == {"in an attribute", "inner", "../outer"}
    with pytest.raises(ValueError, match=r"cut off|byte"):
        external_files(model[:-3])
