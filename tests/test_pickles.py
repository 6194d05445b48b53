"""Hostile pickles: no code is executed, time and memory stay bounded, and each file is refused with one message."""

from __future__ import annotations

import collections
import io
import pickle
import random
import re
import struct
import sys
import time
import tracemalloc
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import Call, Name, dumps

from dnnlib.config import UserError
from torch_utils.pickles import PickledModule, Unreadable, describe_torch_file, is_pickle, read_pickle

LOAD = Name("torch.storage", "_load_from_bytes")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
PERSISTENT = Name("torch_utils.persistence", "_reconstruct_persistent_obj")


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """Return the path of a file that code in the pickle would create."""
    return tmp_path / "sentinel"


def read(tmp_path: Path, data: bytes) -> Any:
    path = tmp_path / "file.pkl"
    path.write_bytes(data)
    return read_pickle(path)


def refused(tmp_path: Path, data: bytes, text: str = ".", seconds: float = 5) -> str:
    """Read a file within tight time and memory limits; return why the file or a part of it is refused."""
    started = time.process_time()
    tracemalloc.start()
    try:
        message = "; ".join(dict.fromkeys(reasons(read(tmp_path, data))))
    except UserError as error:
        message = str(error)
        assert message.startswith(f"{tmp_path / 'file.pkl'}: ")
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert re.search(text, message), message
    assert "\n" not in message
    assert len(message) < 400
    assert peak < 50e6 + 50 * len(data)
    assert time.process_time() - started < seconds
    return message


def reasons(value: Any) -> list[str]:
    """Return the reasons for all unreadable values in the contents of a file."""
    if isinstance(value, Unreadable):
        return [value.reason]
    if isinstance(value, PickledModule):
        return reasons(value.state)
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return [reason for item in items for reason in reasons(item)] if isinstance(items, (list, tuple, set)) else []


def stored(x: torch.Tensor) -> bytes:
    """Return the persistent id that torch pickles for the storage of a tensor."""
    buffer = io.BytesIO()
    torch.save(x.untyped_storage() if False else x.storage(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_equal_those_saved_by_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    x = (torch.randn(4, 3) * 9).to(dtype)
    content = {"plain": x, "view": x.t()[1:], "parameter": torch.nn.Parameter(torch.randn(2)), "empty": x[:0]}
    for protocol in (2, 3, 4, 5):
        found = read(tmp_path, dumps(content, protocol))
        for name, expected in content.items():
            assert torch.equal(found[name], expected.detach()), name
            assert found[name].dtype == expected.dtype
    again = torch.load(io.BytesIO(stored(x)), weights_only=True)
    assert torch.equal(torch.tensor(again.tolist()), torch.tensor(x.flatten().tolist()))


def test_plain_values_equal_those_read_by_pickle(tmp_path: Path) -> None:
    content = {
        "numbers": [0, 1, -1, 255, 65536, -(2**40), 2**70, 1.5, True, None],
        "text": ["", "é" * 300, "x" * 70_000],
        "bytes": [b"", b"x" * 300],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "set": {1, 2, "three"},
        "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
        "nested": {"a": {"b": [{"c": 1}]}},
        7: "a number as key",
    }
    for protocol in (2, 3, 4, 5):
        assert read(tmp_path, dumps(content, protocol)) == pickle.loads(dumps(content, protocol))


CODE: dict[str, Any] = {
    "os.system": Call(Name("os", "system"), ("touch sentinel",)),
    "posix.system": Call(Name("posix", "system"), ("touch sentinel",)),
    "eval": Call(Name("builtins", "eval"), ("open('sentinel', 'w')",)),
    "exec": Call(Name("builtins", "exec"), ("open('sentinel', 'w')",)),
    "getattr chain": Call(Name("builtins", "getattr"), (Name("os", "path"), "os")),
    "subclass": Call(Name("subprocess", "Popen"), (["touch", "sentinel"],)),
    "torch.load": Call(Name("torch", "load"), ("sentinel",)),
    "torch.save": Call(Name("torch", "save"), (1, "sentinel")),
    "dotted": Call(Name("collections", "OrderedDict.fromkeys"), ([1],)),
    "attribute of an allowed module": Call(Name("torch.storage", "os"), ()),
    "import_module": Call(Name("importlib", "import_module"), ("this",)),
    "rebuild hook": Call(Name("torch._utils", "_rebuild_from_type_v2"), (1,)),
    "numpy load": Call(Name("numpy", "load"), ("sentinel",)),
    "function of this project": Call(Name("torch_utils.checkpoint", "write_file"), ("sentinel",)),
    "pickle": Call(Name("pickle", "loads"), (b".",)),
    "codecs": Call(Name("_codecs", "decode"), (b"x", "unicode_escape")),
}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("protocol", [3, 4])
def test_names_outside_the_allowlist_are_refused(
    name: str, protocol: int, tmp_path: Path, sentinel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    message = refused(tmp_path, dumps({"G_ema": CODE[name]}, protocol), "which no snapshot needs")
    assert CODE[name].parts[0].module in message
    assert not sentinel.exists()
    assert "this" not in set(sys.modules) - before


@pytest.mark.parametrize("name", CODE)
def test_code_in_a_nested_stream_is_refused(
    name: str, tmp_path: Path, sentinel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, dumps(Call(LOAD, (dumps(CODE[name], 3),))), "which no (snapshot|tensor) needs")
    buffer = io.BytesIO()
    torch.save(torch.zeros(2), buffer, pickle_protocol=2)
    refused(tmp_path, dumps(Call(LOAD, (buffer.getvalue(),))), "opcode PERSID")  # zip files begin with P
    start = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    refused(tmp_path, dumps(Call(LOAD, (start + dumps(CODE[name], 3),))), "which no (snapshot|tensor) needs")
    assert not sentinel.exists()


def storage_stream(*, claimed: int = 2, count: int | None = None, data: bytes = b"\0" * 8, key: Any = None) -> bytes:
    """Return a handwritten float tensor stream with `claimed` elements in the pickle, `count` before the data."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if obj == "storage!":
                return key or ("storage", torch.FloatStorage, "0", "cpu", claimed, None)
            return None

    buffer = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, "storage!", ["0"]):
        Pickler(buffer, 2).dump(value)
    return buffer.getvalue() + struct.pack("<q", claimed if count is None else count) + data


def tensor(stream: bytes, offset: Any = 0, size: Any = (2,), stride: Any = (1,)) -> Call:
    return Call(REBUILD, (Call(LOAD, (stream,)), offset, size, stride, False, collections.OrderedDict()))


def test_the_handwritten_stream_is_valid(tmp_path: Path) -> None:
    data = struct.pack("<2f", 1.5, 2.5)
    assert read(tmp_path, dumps(tensor(storage_stream(data=data)))).tolist() == [1.5, 2.5]


HOSTILE_TENSORS: dict[str, Any] = {
    "more elements than data": tensor(storage_stream(claimed=2**40)),
    "huge": tensor(storage_stream(claimed=2**62)),
    "count contradicts": tensor(storage_stream(count=3)),
    "too many bytes": tensor(storage_stream(data=b"\0" * 12)),
    "no bytes": tensor(b""),
    "no storage": Call(REBUILD, (5, 0, (2,), (1,), False, ())),
    "too few arguments": Call(REBUILD, ()),
    "negative size": tensor(storage_stream(), size=(-2,)),
    "beyond the storage": tensor(storage_stream(), size=(3,)),
    "offset": tensor(storage_stream(), offset=1),
    "negative offset": tensor(storage_stream(), offset=-1),
    "stride": tensor(storage_stream(), size=(2, 2), stride=(2**39, 1)),
    "negative stride": tensor(storage_stream(), stride=(-1,)),
    "expanded": tensor(storage_stream(), size=(2**39,), stride=(0,)),
    "overflow": tensor(storage_stream(), size=(2**39, 2**39, 2**39), stride=(0, 0, 0)),
    "text": tensor(storage_stream(), size=("2",)),
    "size is a list": tensor(storage_stream(), size=[2]),
    "dimensions": tensor(storage_stream(), size=(1,) * 1000, stride=(0,) * 1000),
    "invalid key": tensor(storage_stream(key=("module", torch.FloatStorage, "0", "cpu", 2, None))),
    "view": tensor(storage_stream(key=("storage", torch.FloatStorage, "0", "cpu", 2, ("1", 0, 2)))),
    "type": tensor(storage_stream(key=("storage", "float", "0", "cpu", 2, None))),
    "number instead of bytes": Call(LOAD, (5,)),
    "parameter": Call(Name("torch._utils", "_rebuild_parameter"), ("x", True, ())),
}


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_hostile_tensors_are_refused(name: str, tmp_path: Path) -> None:
    refused(tmp_path, dumps({"x": HOSTILE_TENSORS[name]}))


BIG_ENDIAN = Call(Name("numpy", "dtype"), ("f8",), (3, ">", None, None, None, -1, -1, 0))
HOSTILE_CALLS: dict[str, Any] = {
    "module without meta": Call(PERSISTENT, (5,)),
    "function": Call(PERSISTENT, ({"type": "func", "version": 6, "state": {}, "class_name": "f"},)),
    "version": Call(PERSISTENT, ({"type": "class", "version": 7, "state": {}, "class_name": "f"},)),
    "no state": Call(PERSISTENT, ({"type": "class", "version": 6, "class_name": "f"},)),
    "other than a named function": Call(PERSISTENT, ({"type": "class", "version": 6, "class_name": 5, "state": {}},)),
    "dict of a number": Call(Name("collections", "OrderedDict"), (5,)),
    "dict of numbers": Call(Name("collections", "OrderedDict"), ([5],)),
    "set of text": Call(Name("builtins", "set"), ("abc",)),
    "set of lists": Call(Name("builtins", "set"), ([[1]],)),
    "object type": Call(Name("numpy", "dtype"), ("O8", False, True)),
    "type list": Call(Name("numpy", "dtype"), ([("a", "O")],)),
    "short scalar": Call(Name("numpy._core.multiarray", "scalar"), (Call(Name("numpy", "dtype"), ("f8",)), b"1234")),
    "scalar without dtype": Call(Name("numpy._core.multiarray", "scalar"), ("f8", b"12345678")),
    "state of a set": Call(Name("builtins", "set"), ([1],), {"__class__": 1}),
    "state of a module": Call(
        PERSISTENT, ({"type": "class", "version": 6, "class_name": "f", "state": {}},), {"__class__": 1}
    ),
    "other byte order": Call(Name("numpy._core.multiarray", "scalar"), (BIG_ENDIAN, b"12345678")),
    "short state": Call(Name("numpy", "dtype"), ("f8",), (3,)),
    "call of a call": Call(Name("builtins", "set"), ([(1, 2)],)),
}


@pytest.mark.parametrize("name", HOSTILE_CALLS)
def test_allowed_names_with_hostile_arguments_are_refused(name: str, tmp_path: Path) -> None:
    refused(tmp_path, dumps({"x": HOSTILE_CALLS[name]}))


PROTO = b"\x80\x04"
BYTES: dict[str, tuple[bytes, str]] = {
    "extension registry 1": (PROTO + b"\x82\x01.", "opcode EXT1"),
    "extension registry 2": (PROTO + b"\x83\x01\x00.", "opcode EXT2"),
    "extension registry 4": (PROTO + b"\x84\x01\x00\x00\x00.", "opcode EXT4"),
    "persistent id": (PROTO + b"K\x01Q.", "persistent id"),
    "persistent id as text": (PROTO + b"Pname\n.", "opcode PERSID"),
    "INST": (PROTO + b"(ios\nsystem\n.", "opcode INST"),
    "OBJ": (PROTO + b"(K\x01o.", "opcode OBJ"),
    "NEWOBJ_EX": (PROTO + b"}}}\x92.", "other than a named function"),
    "out-of-band buffer": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "byte array": (b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b".", "damaged"),
    "long text": (PROTO + b"\x8d" + struct.pack("<Q", 2**60) + b"x.", "damaged"),
    "long bytes": (PROTO + b"\x8e" + struct.pack("<Q", 2**62) + b"x.", "damaged"),
    "long number": (PROTO + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x.", "damaged"),
    "unused memo with a large index": (PROTO + b"K\x01r\xff\xff\xff\x7f0.", "one value"),
    "missing memo": (PROTO + b"j\xff\xff\xff\x7f.", "missing value"),
    "2 GB of bytes": (PROTO + b"B" + struct.pack("<I", 2**31) + b"x.", "damaged"),
    "2 GB of text": (PROTO + b"X" + struct.pack("<I", 2**31) + b"x.", "damaged"),
    "nothing": (PROTO + b".", "one value"),
    "two values": (PROTO + b"K\x01K\x02.", "one value"),
    "open mark": (PROTO + b"K\x01(.", "one value"),
    "no mark": (PROTO + b"t.", "mark"),
    "append to a number": (PROTO + b"K\x01K\x02a.", "list"),
    "item of a list": (PROTO + b"]K\x01K\x02s.", "dict"),
    "append to the value below a mark": (PROTO + b"](K\x01a.", "value is missing"),
    "key without value": (PROTO + b"}(K\x01u.", "key"),
    "call of a number": (PROTO + b"K\x01)R.", "other than a named function"),
    "call without tuple": (PROTO + b"cbuiltins\nset\nK\x01R.", "other than a named function"),
    "name of numbers": (PROTO + b"K\x01K\x02\x93.", "not text"),
    "class as a key": (PROTO + b"}cbuiltins\nset\nK\x01s.", "key of type"),
    "unknown instruction": (PROTO + b"\xff.", "damaged"),
    "protocol 9": (b"\x80\x09K\x01.", "protocol"),
    "trailing data": (PROTO + b"K\x01.x", "data after its end"),
    "empty": (b"", "empty"),
    "STRING with an escape": (PROTO + b"S'\\e'\n.", "opcode STRING"),
    "GET": (PROTO + b"g1\n.", "opcode GET"),
}


@pytest.mark.parametrize("name", BYTES)
def test_hostile_instructions_are_refused(name: str, tmp_path: Path) -> None:
    data, text = BYTES[name]
    refused(tmp_path, data, text)


@pytest.mark.parametrize("count", [1_000, 120_000])
def test_deep_nesting_is_refused(count: int, tmp_path: Path) -> None:
    tuples, lists = PROTO + b")" + b"\x85" * count, PROTO + b"(" * count
    refused(tmp_path, lists + b"l" * count + b".", "nested too deeply|instruction", 20)
    refused(tmp_path, PROTO + b"}" + tuples[2:] + b"K\x01s.", "key of type tuple|more instructions", 20)
    refused(tmp_path, PROTO + b"\x8f(" + tuples[2:] + b"\x90.", "key of type tuple|more instructions", 20)
    refused(tmp_path, PROTO + b"]" * count + b".", "nested too deeply|one value", 20)
    if count < 120_000:
        assert isinstance(read(tmp_path, tuples + b"."), tuple)


def test_too_many_instructions_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, PROTO + b"]" + b"K\x01a" * 260_000 + b".", "more instructions", 20)


def test_reference_bombs_are_refused(tmp_path: Path) -> None:
    stream = storage_stream(claimed=250_000, data=b"\0" * 1_000_000)
    again = PROTO + b"]" + dumps(stream)[2:-1] + b"r\x63\x00\x00\x000".replace(b"0", b"")
    load = b"ctorch.storage\n_load_from_bytes\nj\x63\x00\x00\x00\x85Ra"
    refused(tmp_path, again + b"a" + load * 10_000 + b".", "more storage bytes")

    pairs = dumps([("a", 1)] * 10_000)[2:-1] + b"r\x63\x00\x00\x00"
    build = b"ccollections\nOrderedDict\nj\x63\x00\x00\x00\x85Ra"
    refused(tmp_path, PROTO + b"]" + pairs + b"a" + build * 10_000 + b".", "more instructions")

    view = tensor(storage_stream(claimed=10_000, data=b"\0" * 40_000), size=(10_000,))
    views = [view] * 3  # pickled once, referenced twice
    assert len(read(tmp_path, dumps(views))) == 3
    storage = Call(LOAD, (storage_stream(claimed=10_000, data=b"\0" * 40_000),))
    copies = [Call(REBUILD, (storage, 0, (10_000,), (1,), False, ())) for _ in range(100)]
    refused(tmp_path, dumps(copies), "more elements")


def test_byte_bombs_written_as_text_are_refused(tmp_path: Path) -> None:
    text = dumps("x" * 1_000_000)[2:-1].split(b"\x94")[0] + b"r\x63\x00\x00\x00"
    encode = b"c_codecs\nencode\nj\x63\x00\x00\x00X\x06\x00\x00\x00latin1\x86Ra"
    refused(tmp_path, PROTO + b"]" + text + b"a" + encode * 1000 + b".", "more encoded bytes")


def test_colliding_keys_are_refused(tmp_path: Path) -> None:
    """Python hashes integers modulo 2^61 - 1; n keys with equal hashes need O(n^2) comparisons."""
    keys = [number * (2**61 - 1) for number in range(30_000)]
    items = PROTO + b"}(" + b"".join(dumps(key, 3)[2:-1] + b"N" for key in keys) + b"u."
    refused(tmp_path, items, "a key that is larger")
    refused(tmp_path, dumps({"x": Call(Name("builtins", "set"), (keys,))}), "a key that is larger")
    refused(tmp_path, dumps({"x": Call(Name("collections", "OrderedDict"), ([(key, 0) for key in keys],))}), "larger")
    assert read(tmp_path, dumps({2**32: -(2**32)})) == {2**32: -(2**32)}


def test_other_contents_are_dropped_and_reported(tmp_path: Path) -> None:
    """Objects of other classes may have items, states and arguments; the rest of the file is read."""
    other = Call(Name("their.package", "Thing"), (1,), {"x": 2}, iter([("a", 1)]))
    array = Call(
        Name("numpy._core.multiarray", "_reconstruct"), (Name("numpy", "ndarray"), (0,), b"b"), (1, (2,), b"?")
    )
    content = {
        "other": other,
        "array": array,
        "float key": {0.5: 1},
        "frozen": frozenset([1]),
        "name": Name("os", "path"),
    }
    for protocol in (2, 3, 4, 5):
        found = read(tmp_path, dumps({"a": [1, 2], **content, "z": "last"}, protocol))
        assert (found["a"], found["frozen"], found["z"]) == ([1, 2], {1}, "last")
        for name, text in (("other", "their.package.Thing"), ("array", "_reconstruct"), ("name", "os.path")):
            assert text in found[name].reason
        assert reasons(found["float key"]) == ["a key of type float, expected text or a whole number"]


def test_a_byte_order_applies_to_every_use_of_a_dtype(tmp_path: Path) -> None:
    numbers = [Call(Name("numpy._core.multiarray", "scalar"), (BIG_ENDIAN, bytes(7) + b"@")) for _ in range(2)]
    assert len(reasons(read(tmp_path, dumps(numbers)))) == 2


def test_state_dicts_and_dict_subclasses_are_read(tmp_path: Path) -> None:
    """Both are dicts; the additional state of the object is not needed."""
    layer = torch.nn.Linear(2, 2)
    torch.save(layer.state_dict(), tmp_path / "weights.pth")
    assert describe_torch_file(tmp_path / "weights.pth") == "a bare state_dict, without the arguments of the network"
    checkpoint = {"g_ema": {"style.1.weight": torch.zeros(2, 2), **layer.state_dict()}, "args": Namespace(size=256)}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    assert "another StyleGAN2 code base" in str(describe_torch_file(tmp_path / "checkpoint.pt"))
    theirs = Call(Name("easydict", "EasyDict"), (), {"a": 1}, iter([("a", 1)]))
    assert read(tmp_path, dumps(theirs)) == {"a": 1}


def test_extra_values_of_forks_may_be_large_or_unusual(tmp_path: Path) -> None:
    content = {"a": 1, "integer": 10**700, "expanded": torch.zeros(1).expand(10**7), "z": [0.5] * 600_000}
    found = read(tmp_path, dumps(content))
    assert (found["integer"], len(found["z"])) == (10**700, 600_000)
    assert "whose elements overlap" in found["expanded"].reason


@pytest.mark.parametrize("call", [REBUILD, Name("torch._utils", "_rebuild_parameter"), Name("their", "thing")])
def test_calls_with_many_arguments_are_cheap(call: Name, tmp_path: Path) -> None:
    """A reader that copies a tuple for every reference would be slow."""
    big = dumps(tuple(range(50_000)))[2:-1] + b"r\x63\x00\x00\x000"
    name = f"c{call.module}\n{call.name}\n".encode()
    shape = name + b"(K\x00K\x00j\x63\x00\x00\x00j\x63\x00\x00\x00\x89NtRa"
    direct = name + b"j\x63\x00\x00\x00Ra"
    for instructions in (shape, direct):
        refused(tmp_path, PROTO + big + b"]" + instructions * 20_000 + b".", seconds=3)


def test_long_names_are_cheap(tmp_path: Path) -> None:
    text = dumps("x" * 1_000_000)[2:-1].split(b"\x94")[0] + b"r\x63\x00\x00\x000"
    name = b"j\x63\x00\x00\x00j\x63\x00\x00\x00\x93a"
    refused(tmp_path, PROTO + text + b"]" + name * 50_000 + b".", "longer name than any", seconds=3)


def test_modules_with_long_names_use_little_memory() -> None:
    top = PickledModule("Layer", {"_parameters": {}, "_buffers": {}, "_modules": {}})
    for level in range(90):
        top = PickledModule("Layer", {"_parameters": {}, "_buffers": {}, "_modules": {f"{level:0100}": top}})
    with pytest.raises(UserError, match="buffers than any network"):
        top.tensors()


def test_compressed_archives_are_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", PROTO + b"N" * 30_000_000 + b".")
    started = time.process_time()
    assert describe_torch_file(tmp_path / "bomb.pt") is None
    assert time.process_time() - started < 1


def test_wrappers_and_copies_of_modules_are_read(tmp_path: Path) -> None:
    """DataParallel is pickled as a plain object; other projects have their own copies of persistence and EasyDict."""
    inner = module_with({})
    state = {"_parameters": {}, "_buffers": {}, "_modules": {"module": inner}}
    for module_name, name in (("data_parallel", "DataParallel"), ("distributed", "DistributedDataParallel")):
        wrapped = Call(Name(f"torch.nn.parallel.{module_name}", name), (), state)
        found = read(tmp_path, dumps({"x": wrapped, "again": wrapped}))
        assert found["x"] is found["again"]
        assert found["x"].unwrapped().class_name == "Layer"
    with pytest.raises(UserError, match="without a network"):
        PickledModule("DataParallel", {"_modules": {}}).unwrapped()
    nested = PickledModule("DataParallel", {})
    nested.state["_modules"] = {"module": nested}
    with pytest.raises(UserError, match="wrappers"):
        nested.unwrapped()
    theirs = Call(Name("their.torch_utils.persistence", "_reconstruct_persistent_obj"), inner.parts[1])
    assert read(tmp_path, dumps(theirs)).class_name == "Layer"
    assert read(tmp_path, dumps(Call(Name("their.util", "EasyDict"), (), None, iter([("a", 1)])))) == {"a": 1}


def module_with(modules: dict[str, Any]) -> Call:
    state = {"_parameters": {}, "_buffers": {}, "_modules": modules}
    return Call(PERSISTENT, ({"type": "class", "version": 6, "class_name": "Layer", "state": state},))


def test_cyclic_modules_are_refused(tmp_path: Path) -> None:
    top = module_with({})
    for _ in range(25):
        top = module_with({"a": top, "b": top})
    found = read(tmp_path, dumps(top))
    assert isinstance(found, PickledModule)
    with pytest.raises(UserError, match="buffers than any network"):
        found.tensors()
    looped: dict[str, Any] = {}
    module = PickledModule("Loop", {"_parameters": {}, "_buffers": {}, "_modules": looped})
    looped["again"] = module
    with pytest.raises(UserError, match="buffers than any network"):
        module.tensors()
    for kind, value, text in (("_parameters", 5, "not a tensor"), ("_modules", 5, "not a module")):
        state: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}, kind: {"x": value}}
        with pytest.raises(UserError, match=text):
            PickledModule("Layer", state).tensors()
    with pytest.raises(UserError, match="has no _parameters"):
        PickledModule("Layer", {}).tensors()


def test_truncated_and_corrupt_files_are_refused(tmp_path: Path) -> None:
    data = dumps({"x": torch.nn.Parameter(torch.arange(6.0)), "y": [1, "two", (3.0,)], "z": {1}})
    for length in range(0, len(data), 3):
        refused(tmp_path, data[:length])
    rng = random.Random(0)
    outcomes = collections.Counter[str]()
    for _ in range(1000):
        corrupt = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            corrupt[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read(tmp_path, bytes(corrupt))
            outcomes["read"] += 1  # a bit flip within a number or a string
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 250


def test_pickles_are_recognised(tmp_path: Path) -> None:
    pickles = {b"\x80\x04N.": True, b"": False, b"\x80": False, b"PK\x03\x04": False, b"(lp0\n.": False}
    for data, expected in pickles.items():
        (tmp_path / "f").write_bytes(data)
        assert is_pickle(tmp_path / "f") is expected
