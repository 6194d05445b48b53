"""Read pickled modules of other projects as plain data, without importing, calling or compiling anything.

A pickle is a program for a small stack machine. It is dangerous because it may import and call any function.
`read_pickle` implements its own stack machine, which accepts only the opcodes and globals that a pickled module needs.
Each global maps to plain data, never to the function or class of that name:

    torch_utils.persistence._reconstruct_persistent_obj   -> PickledModule: a class name and attributes;
                                                             the embedded Python source is dropped unread
    torch.nn.DataParallel, DistributedDataParallel        -> PickledModule with the wrapped network as child `module`
    torch._utils._rebuild_tensor_v2, _rebuild_parameter   -> a tensor
    torch.storage._load_from_bytes                        -> the storage of a tensor, from a nested stream read by the
                                                             same machine
    EasyDict of any module, collections.OrderedDict       -> a dict
    builtins.set, numpy's dtype and scalar                -> a set, a number

Any other global, and any call with unexpected arguments, becomes `Unreadable`, a placeholder that holds the reason. A
file therefore opens even if its author added other objects; code that needs an unreadable value rejects the file.

`read_torch_file` reads tensors and plain values written by torch.save with the same machine and rejects anything else.

The cost of a file is bounded by its size: elements of a tensor never overlap, the tensors have at most as many elements
as the file has bytes, and nothing is decompressed.
"""

from __future__ import annotations

import mmap
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dnnlib.config import UserError
from dnnlib.util import describe_error, open_regular

MAX_BYTES = 8 * 2**30  # size of a file
MAX_INSTRUCTIONS = 500_000  # opcodes in all streams of a small file; published networks need less than a tenth
BYTES_PER_INSTRUCTION = 4  # a large file may have one opcode per 4 bytes
MAX_ARGUMENTS = 16  # arguments of a call
MAX_INDEX_BYTES = 64 * 2**20  # size of data.pkl in a zip file
MAX_NESTING = 100  # open marks, i.e. containers under construction
MAX_STACK = 100_000  # values on the stack
MAX_KEY = 2**32  # absolute value of an integer key; integers equal modulo 2^61 - 1 collide in a dict: O(n^2) inserts
MAX_DIMS = 8  # dimensions of a tensor
MAX_ENTRIES = 20_000  # modules, parameters and buffers of a network
MAX_NAME = 100  # characters in the name of a module, parameter or buffer
MAX_PATH = 200  # characters in a dotted name
MAX_WRAPPERS = 3  # nested DataParallel wrappers
MAX_DEPTH = 50  # nested containers in a torch.save file
WRAPPERS = ("DataParallel", "DistributedDataParallel")

_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # magic number of torch's legacy format (before zip files)
_PICKLED_MAGIC = pickle.dumps(_TORCH_MAGIC, 2)[2:]  # without the PROTO opcode
_TORCH_PROTOCOL = 1001

PROGRAMS = {"/constants.pkl": "a TorchScript module", "/models/model.json": "a program of torch.export"}  # by member

STORAGES: Mapping[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
SCALARS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")


class LimitError(UserError):
    """A file exceeds a limit derived from its size."""


@dataclass(frozen=True, eq=False)
class Unreadable:
    """Placeholder for an object that is not read, with the reason."""

    reason: str


@dataclass(frozen=True)
class PickledModule:
    """A pickled module: the name of its class, and its attributes."""

    class_name: str
    state: dict[str, Any]

    def unwrapped(self) -> PickledModule:
        """Return the network inside DataParallel wrappers. Raises UserError for a wrapper without a network."""
        module = self
        for _ in range(MAX_WRAPPERS):
            if module.class_name not in WRAPPERS:
                return module
            inner = module.children("_modules").get("module")
            if not isinstance(inner, PickledModule):
                raise UserError(f"a {module.class_name} without a network")
            module = inner
        raise UserError(f"a network in more than {MAX_WRAPPERS} wrappers")

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of this module and its submodules by dotted name. Raises UserError."""
        found: dict[str, Tensor] = {}
        queue, visited = [("", self)], 0
        while queue:
            prefix, module = queue.pop()
            visited += 1 + sum(len(module.children(kind)) for kind in ("_parameters", "_buffers", "_modules"))
            if visited > MAX_ENTRIES or len(prefix) > MAX_PATH:
                raise UserError("it has more modules, parameters and buffers than any network")
            for kind in ("_parameters", "_buffers"):
                for name, value in module.children(kind).items():
                    if value is not None and not isinstance(value, Tensor):
                        raise UserError(f"{prefix}{name} is not a tensor{why(value)}")
                    if value is not None:
                        found[prefix + name] = value
            for name, child in module.children("_modules").items():
                if child is not None and not isinstance(child, PickledModule):
                    raise UserError(f"{prefix}{name} is not a module{why(child)}")
                if child is not None:
                    queue.append((f"{prefix}{name}.", child))
        return found

    def children(self, kind: str) -> dict[str, Any]:
        """Return the dict '_parameters', '_buffers' or '_modules'. Raises UserError if it is missing or malformed."""
        value = self.state.get(kind)
        if not isinstance(value, dict) or not all(type(name) is str and len(name) <= MAX_NAME for name in value):
            raise UserError(f"a module of class {self.class_name} has no {kind}")
        return value


def why(value: Any) -> str:
    """Return ": REASON" for an unreadable value, to append to a message; "" for other values."""
    return f": {value.reason}" if isinstance(value, Unreadable) else ""


@dataclass(frozen=True)
class _Name:
    """A global named in the file, and its replacement function."""

    name: str
    call: Callable[..., Any]


@dataclass
class _NumpyType:
    """numpy.dtype(code)."""

    code: str


@dataclass(frozen=True)
class _Storage:
    """The elements of one or several tensors, as a 1-D tensor."""

    numbers: Tensor


@dataclass
class _Budget:
    """Remaining opcodes, bytes and tensor elements that reading a file may use."""

    num_bytes: int
    instructions: int = field(init=False)
    storage_bytes: int = field(init=False)
    encoded_bytes: int = field(init=False)
    numbers: int = field(init=False)

    def __post_init__(self) -> None:
        self.instructions = max(MAX_INSTRUCTIONS, self.num_bytes // BYTES_PER_INSTRUCTION)
        self.storage_bytes = self.encoded_bytes = self.numbers = self.num_bytes

    def spend(self, kind: str, amount: int) -> None:
        left = getattr(self, kind) - amount
        if left < 0:
            raise LimitError(f"claims more {kind.replace('_', ' ')} than a file of {self.num_bytes} bytes can need")
        setattr(self, kind, left)


def is_pickle(path: Path) -> bool:
    """Return whether a file starts like a pickle of protocol 2 to 5 and is not in torch's legacy format."""
    start = _start(path)
    return len(start) >= 2 and start[0] == 0x80 and 2 <= start[1] <= 5 and not _is_old_torch_file(path)


def _is_old_torch_file(path: Path) -> bool:
    return _PICKLED_MAGIC in _start(path)


def _start(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(32)


def read_pickle(path: Path) -> Any:
    """Return the unpickled content of a file. Raises UserError, with path and reason, if the file cannot be read."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{path}: {size} bytes exceed the size of any snapshot")
    try:
        if not size:
            raise UserError("empty")
        # Memory-mapped, because file.read(n) would allocate n bytes for any n that the file claims.
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
            budget = _Budget(size)
            content = _Machine(stream, _Names(budget), budget).run()
            if stream.tell() != size:
                raise UserError("data after its end")
    except UserError as error:
        raise UserError(f"{path}: {error}; no code in it was run") from None
    return content


def read_torch_file(path: Path) -> Any:
    """Return the dicts, lists, tuples, tensors and plain values in a torch.save file, on the CPU.

    Raises UserError, without the path, for other values, for a container or tensor that occurs more than once, and for
    compressed or overlapping members. Errors of zipfile and of the file system pass through.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        size = file.seek(0, 2)
        members = _stored_members(archive, size)
        index = next((name for name in members if name.endswith("/data.pkl")), None)
        if index is None:
            raise UserError("damaged (a zip file without data.pkl)")
        if members[index].file_size > MAX_INDEX_BYTES:
            raise UserError(f"its data.pkl exceeds the limit of {MAX_INDEX_BYTES} bytes")
        folder = index.removesuffix("data.pkl")
        if f"{folder}byteorder" in members and _read_member(file, members[f"{folder}byteorder"]).tobytes() != b"little":
            raise UserError("its tensors are not little-endian")
        budget = _Budget(size)
        storages: dict[str, _Storage] = {}

        def load(key: Any) -> _Storage:
            name, dtype, count = _storage_key(key)
            if name not in storages:
                storages[name] = _to_storage(_read_member(file, members[f"{folder}data/{name}"]), dtype, count)
            if len(storages[name].numbers) != count or storages[name].numbers.dtype != dtype:
                raise UserError("two tensors disagree about the dtype or size of their shared storage")
            return storages[name]

        content = _Machine(
            BytesIO(_read_member(file, members[index]).tobytes()), _TorchNames(budget), budget, load
        ).run()
    _check_plain(content, set(), 0)
    return content


def _stored_members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name. Raises UserError for compressed, duplicate or overlapping members."""
    infos = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in infos):
        raise UserError("its members are compressed, which torch.save never does; not unpacked")
    members = {info.filename: info for info in infos}
    if len(members) != len(infos) or sum(info.file_size for info in infos) > size:
        raise UserError("damaged (its members overlap)")
    return members


def _read_member(file: BinaryIO, info: zipfile.ZipInfo) -> np.ndarray:
    """Return the bytes of a stored member, which follow its local header, name and extra field, uint8 [bytes].

    Raises UserError. The memory is not cleared before it is filled, unlike that of a bytearray.
    """
    file.seek(info.header_offset)
    header = file.read(30)
    file.seek(sum(int.from_bytes(header[place : place + 2], "little") for place in (26, 28)), os.SEEK_CUR)
    content = np.empty(info.file_size, np.uint8)
    if not header.startswith(b"PK\3\4") or file.readinto(content) != len(content):  # type: ignore[attr-defined]
        raise UserError(f"damaged or incomplete ({_shorten(info.filename)} is not at its offset)")
    return content


def _check_plain(value: Any, seen: set[int], depth: int) -> None:
    """Raise UserError unless a value is a tree of containers, tensors and plain values.

    A shared container would be visited once per reference: with n nested containers, up to 2^n visits.
    """
    if type(value) in (bool, float, str, type(None)):
        return
    if type(value) is int:
        if not -(2**63) <= value < 2**64:
            raise UserError("contains an integer of more than 64 bits")
        return
    if type(value) not in (dict, list, tuple, Tensor):
        raise UserError(f"contains more than tensors and plain values; not loaded{why(value)}")
    if type(value) is not Tensor and not value:  # all empty tuples are one object
        return
    if id(value) in seen:
        raise UserError("contains a container or tensor more than once, unlike any file of this project")
    if depth > MAX_DEPTH:
        raise UserError("its containers are nested too deeply")
    seen.add(id(value))
    if type(value) is not Tensor:
        for item in (*value.keys(), *value.values()) if type(value) is dict else value:
            _check_plain(item, seen, depth + 1)


def describe_torch_file(path: Path) -> str | None:
    """Describe a torch.save file of another program; return None for other files and for corrupt files.

    No code in the file is run, and its tensors are not read.
    """
    try:
        if not zipfile.is_zipfile(path):
            return _describe(_read_old_torch_file(path)) if _is_old_torch_file(path) else None
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for name, what in PROGRAMS.items():
                if any(entry.endswith(name) for entry in names):
                    return what
            index = next((name for name in names if name.endswith("/data.pkl")), None)
            if index is None or archive.getinfo(index).file_size > MAX_INDEX_BYTES:
                return None
            if archive.getinfo(index).compress_type != zipfile.ZIP_STORED:  # torch.save does not compress
                return None
            data = archive.read(index)
        return _describe(_read_outline(BytesIO(data), _Budget(len(data))))
    except Exception:  # zipfile raises many types of errors for corrupt files
        return None


def _read_old_torch_file(path: Path) -> Any:
    """Return the content of a file in torch's legacy format: the stream after magic, protocol and system info."""
    budget = _Budget(path.stat().st_size)
    with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
        return [_read_outline(stream, budget) for _ in range(4)][3]


def _read_outline(stream: mmap.mmap | BytesIO, budget: _Budget) -> Any:
    """Return the value of one stream, with every tensor storage replaced by `Unreadable`."""
    return _Machine(stream, _Names(budget), budget, lambda _: Unreadable("the elements are stored elsewhere")).run()


def _describe(content: Any) -> str | None:
    if isinstance(content, Unreadable):
        return f"a pickled object ({content.reason})"
    if isinstance(content, PickledModule):
        return f"a pickled object (of class {content.class_name})"
    if not isinstance(content, dict) or "format" in content:
        return None
    generator = content.get("g_ema")
    if isinstance(generator, dict) and any(name in generator for name in ("style.1.weight", "conv1.conv.weight")):
        return "a checkpoint of another StyleGAN2 code base (its g_ema has layers named style.1)"
    inner = content.get("state_dict", content)
    if isinstance(inner, dict) and inner and all(isinstance(value, Unreadable) for value in inner.values()):
        return "a bare state_dict, without the arguments of the network"
    keys = ", ".join(_shorten(key)[:20] if isinstance(key, str) else "a non-text key" for key in [*content][:6])
    return f"a torch.save file that holds {keys}" if content else None


class _Machine:
    """Stack machine that runs one stream. `names` resolves globals; `load`, if given, resolves persistent ids."""

    def __init__(
        self,
        stream: mmap.mmap | BytesIO,
        names: Callable[[str, str], Any],
        budget: _Budget,
        load: Callable[[Any], Any] | None = None,
    ) -> None:
        self.stream, self.names, self.budget, self.load = stream, names, budget, load
        self.stack: list[Any] = []
        self.marks: list[int] = []  # positions of the open marks on the stack
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Return the value of the stream. Raises UserError for a malformed or unsupported stream."""
        while (opcode := self._next()).name != "STOP":
            argument = None if opcode.arg is None else self._read_argument(opcode)
            self.budget.spend("instructions", 1)
            _STEPS[opcode.name](self, argument)
            if len(self.stack) > MAX_STACK or len(self.marks) > MAX_NESTING:
                raise UserError("its containers are nested too deeply")
        if len(self.stack) != 1 or self.marks:
            raise UserError("damaged (it does not end with one value)")
        return self.stack[0]

    def _next(self) -> Any:
        """Return the next opcode. Raises UserError for an unsupported opcode before its argument is read."""
        code = self.stream.read(1)
        opcode = _OPCODES.get(code.decode("latin-1"))
        if opcode is None:
            raise UserError("damaged (an unknown opcode)" if code else "truncated")
        if opcode.name not in _STEPS and opcode.name != "STOP":
            raise UserError(f"unsupported opcode {opcode.name}, which no snapshot needs")
        return opcode

    def _read_argument(self, opcode: Any) -> Any:
        try:
            if opcode.name == "GLOBAL":  # read verbatim, because pickletools would decode backslash escapes
                return " ".join(self.stream.readline().decode().removesuffix("\n") for _ in range(2))
            return opcode.arg.reader(self.stream)
        except (ValueError, OverflowError) as error:
            raise UserError(f"damaged or truncated ({describe_error(error)})") from None

    def _pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise UserError("damaged (a value is missing)")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise UserError("damaged (a mark is missing)")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _top(self, kind: type, what: str) -> Any:
        value = self._pop()
        if type(value) is not kind:
            raise UserError(f"damaged (a {kind.__name__} is missing for {what})")
        self.stack.append(value)
        return value

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def check_protocol(self, version: int) -> None:
        if not 2 <= version <= 5:
            raise UserError(f"its pickle protocol is {version}, expected 2 to 5")

    def mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def append(self, _: None) -> None:
        value = self._pop()
        if not self._is_unreadable():
            self._top(list, "its items").append(value)

    def extend(self, _: None) -> None:
        values = self._pop_to_mark()
        if not self._is_unreadable():
            self._top(list, "its items").extend(values)

    def add_items(self, _: None) -> None:
        values = self._pop_to_mark()
        self._top(set, "its items").update(map(_key, values))

    def set_item(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        if not self._is_unreadable():
            self._top(dict, "its items")[_key(key)] = value

    def set_items(self, _: None) -> None:
        values = self._pop_to_mark()
        if len(values) % 2:
            raise UserError("damaged (a key without a value)")
        if not self._is_unreadable():
            self._top(dict, "its items").update(zip(map(_key, values[::2]), values[1::2], strict=True))

    def _is_unreadable(self) -> bool:
        """Return whether the top of the stack is `Unreadable`; its items are then dropped."""
        value = self._pop()
        self.stack.append(value)
        return isinstance(value, Unreadable)

    def pop(self, _: None) -> None:
        self._pop()

    def pop_to_mark(self, _: None) -> None:
        self._pop_to_mark()

    def make_frozen_set(self, _: None) -> None:
        self.stack.append(set(map(_key, self._pop_to_mark())))

    def make_tuple(self, _: None) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def make_short_tuple(self, length: int) -> None:
        self.stack.append(tuple([self._pop() for _ in range(length)][::-1]))

    def memoize(self, _: None) -> None:
        self.put(len(self.memo))

    def put(self, index: int) -> None:
        value = self._pop()
        self.memo[index] = value
        self.stack.append(value)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise UserError("damaged (a reference to a missing value)")
        self.stack.append(self.memo[index])

    def push_name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._push_name(module, name)

    def push_stack_global(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        self._push_name(module, name)

    def _push_name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise UserError("a global with a name that is not text")
        if len(module) + len(name) > MAX_PATH:
            self.stack.append(Unreadable("a global with a longer name than any in a snapshot"))
            return
        self.stack.append(self.names(module, name))

    def call(self, _: None) -> None:
        """Replace a global and its arguments on the stack by the result of the call."""
        arguments, function = self._pop(), self._pop()
        if isinstance(function, Unreadable):
            self.stack.append(function)
            return
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise UserError("a call of an object other than a named function")
        try:
            if len(arguments) > MAX_ARGUMENTS:
                raise UserError(f"{len(arguments)} arguments")
            self.stack.append(function.call(*arguments))
        except LimitError:
            raise
        except (UserError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
            reason = str(error) if isinstance(error, UserError) else describe_error(error)
            self.stack.append(Unreadable(f"{function.name} with arguments that no snapshot has ({reason[:200]})"))

    def call_with_keywords(self, _: None) -> None:
        """Drop the keyword arguments and call. Raises UserError if the result is readable; no snapshot needs it."""
        self._pop()
        self.call(_)
        if not isinstance(self.stack[-1], Unreadable):
            raise UserError("an object created with keyword arguments")

    def set_state(self, _: None) -> None:
        """Apply BUILD to a wrapper module or a NumPy dtype, whose state holds the byte order.

        The attributes of a dict, as in a state_dict, are dropped.
        """
        state, value = self._pop(), self._pop()
        if isinstance(value, PickledModule) and value.class_name in WRAPPERS and isinstance(state, dict):
            value.state.update(state)
        elif isinstance(value, _NumpyType) and isinstance(state, tuple) and len(state) == 8:
            if not isinstance(state[1], str) or state[1] not in "<|":
                value.code = ""  # another byte order
        elif type(value) is dict and isinstance(state, (dict, tuple)):
            pass
        elif not isinstance(value, Unreadable):
            value = Unreadable("a BUILD opcode for an object without a state")
        self.stack.append(value)

    def load_persistent(self, _: None) -> None:
        key = self._pop()
        if self.load is None:
            raise UserError("a reference to data outside the file (a persistent id)")
        self.stack.append(self.load(key))


_Step = Callable[[_Machine, Any], None]
# All supported opcodes except STOP.
_STEPS: Mapping[str, _Step] = {
    "PROTO": _Machine.check_protocol,
    "FRAME": lambda machine, length: None,  # for buffering only
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _Machine.push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"), _Machine.push),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_to_mark,
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "ADDITEMS": _Machine.add_items,
    "FROZENSET": _Machine.make_frozen_set,
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.make_short_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_short_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_short_tuple(3),
    "TUPLE": _Machine.make_tuple,
    "MEMOIZE": _Machine.memoize,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.push_name,
    "STACK_GLOBAL": _Machine.push_stack_global,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_with_keywords,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.load_persistent,
}


def _key(key: Any) -> str | int | Unreadable:
    """Return a str or a small int unchanged, and `Unreadable` for any other key."""
    if type(key) not in (str, int):
        return Unreadable(f"a key of type {type(key).__name__}, expected text or a whole number")
    if type(key) is int and abs(key) > MAX_KEY:
        return Unreadable("a key that is larger than any in a snapshot")
    return key


def _shorten(text: str) -> str:
    return repr(text[:80])[1:-1]


class _Names:
    """Resolver of the globals in a file, within a budget."""

    def __init__(self, budget: _Budget) -> None:
        self.budget = budget
        self.calls: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): self.make_dict,
            ("builtins", "set"): self.make_set,
            ("builtins", "frozenset"): self.make_set,
            ("__builtin__", "set"): self.make_set,  # protocol 2
            ("__builtin__", "frozenset"): self.make_set,
            ("__builtin__", "bytes"): lambda: b"",
            ("_codecs", "encode"): self.encode,  # protocol 2 stores bytes this way
            ("numpy", "dtype"): _make_numpy_type,
            ("numpy.core.multiarray", "scalar"): _make_scalar,
            ("numpy._core.multiarray", "scalar"): _make_scalar,
            ("torch._utils", "_rebuild_parameter"): _make_parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): _make_parameter,
            ("torch._utils", "_rebuild_tensor"): self.rebuild_tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self.rebuild_tensor,
            ("torch._tensor", "_rebuild_from_type_v2"): self.rebuild_subclass,
            ("torch.storage", "_load_from_bytes"): self.load_storage,
            ("torch.nn.parallel.data_parallel", WRAPPERS[0]): lambda: PickledModule(WRAPPERS[0], {}),
            ("torch.nn.parallel.distributed", WRAPPERS[1]): lambda: PickledModule(WRAPPERS[1], {}),
        }
        # Accepted from any module, because projects keep copies in different places.
        self.by_name: dict[str, Callable[..., Any]] = {
            "EasyDict": self.make_dict,
            "_reconstruct_persistent_obj": _make_module,
        }

    def __call__(self, module: str, name: str) -> _Name | Unreadable:
        call = self.calls.get((module, name)) or self.by_name.get(name)
        full = _shorten(f"{module}.{name}")
        if call:
            return _Name(full, call)
        if module.startswith("dnnlib.tflib"):
            return Unreadable("a TensorFlow pickle: convert it to the PyTorch format of StyleGAN2-ADA first")
        return Unreadable(f"it refers to {full}, which no snapshot needs")

    def load_storage(self, data: bytes) -> _Storage:
        return _read_storage(data, self.budget)

    def rebuild_tensor(self, storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        return _view(storage, offset, size, stride, self.budget)

    def rebuild_subclass(self, function: _Name, _: Any, arguments: tuple[Any, ...], __: Any) -> Tensor:
        is_ours = isinstance(function, _Name) and function.call == self.rebuild_tensor
        if not is_ours or not isinstance(arguments, tuple) or len(arguments) > MAX_ARGUMENTS:
            raise UserError("a tensor subclass with an unknown rebuild function")
        return self.rebuild_tensor(*arguments)

    def make_dict(self, pairs: Any = ()) -> dict[Any, Any]:
        self.budget.spend("instructions", len(pairs))
        if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
            raise UserError("a dict whose items are not pairs")
        return {_key(key): value for key, value in pairs}

    def make_set(self, items: Any = ()) -> set[Any]:
        if not isinstance(items, (list, tuple)):
            raise UserError("a set whose items are not a list")
        self.budget.spend("instructions", len(items))
        return set(map(_key, items))

    def encode(self, text: str, encoding: str) -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise UserError("bytes that are not encoded from Latin-1 text")
        self.budget.spend("encoded_bytes", len(text))
        return text.encode("latin-1", errors="replace")


class _TorchNames(_Names):
    """Resolver of the globals in a torch.save file, including storage classes."""

    def __call__(self, module: str, name: str) -> Any:
        found = _storage_type(module, name)
        return super().__call__(module, name) if isinstance(found, Unreadable) else found


def _storage_type(module: str, name: str) -> torch.dtype | Unreadable:
    """Return the dtype of a storage class such as torch.FloatStorage."""
    found = STORAGES.get(name) if module in ("torch", "torch.cuda") else None
    return found or Unreadable(f"it refers to {_shorten(f'{module}.{name}')}, which no tensor needs")


def _make_module(meta: dict[str, Any]) -> PickledModule:
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
        raise UserError("a persistent object that is not a module")
    if meta.get("version") != 6:
        raise UserError("a persistent object with a version other than 6")
    name = meta.get("class_name")
    if not isinstance(name, str):
        raise UserError("a persistent object without a class")
    return PickledModule(_shorten(name), meta["state"])


def _make_numpy_type(code: str, *_: Any) -> _NumpyType:
    if not isinstance(code, str) or code not in SCALARS:
        raise UserError("a NumPy dtype that is not numeric")
    return _NumpyType(code)


def _make_scalar(kind: _NumpyType, data: bytes) -> bool | int | float:
    if not isinstance(kind, _NumpyType) or kind.code not in SCALARS or not isinstance(data, bytes):
        raise UserError("a NumPy scalar that is not a number")
    dtype = np.dtype(f"<{kind.code}")
    if len(data) != dtype.itemsize:
        raise UserError("a NumPy scalar whose length does not match its type")
    value: bool | int | float = np.frombuffer(data, dtype)[0].item()
    return value


def _make_parameter(tensor: Tensor, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise UserError("a parameter that is not a tensor")
    return tensor


def _read_storage(data: bytes, budget: _Budget) -> _Storage:
    """Read a storage in torch's legacy format: magic, protocol, system info, storage, keys, elements.

    torch.load allocates the size that the stream claims before it reads. Here the claimed size must match the data.
    """
    if not isinstance(data, bytes):
        raise UserError("a tensor storage that is not a byte string")
    budget.spend("storage_bytes", len(data))
    stream = BytesIO(data)
    found: list[tuple[str, torch.dtype, int]] = []

    def load(key: Any) -> _Storage | None:
        found.append(_storage_key(key))
        return None

    def read(load: Callable[[Any], Any] | None = None) -> Any:
        value = _Machine(stream, _storage_type, budget, load).run()
        if isinstance(value, Unreadable):
            raise UserError(value.reason)
        return value

    magic, protocol, machine = (read() for _ in range(3))
    is_torch = magic == _TORCH_MAGIC and protocol == _TORCH_PROTOCOL
    if not is_torch or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise UserError("a tensor that is not in torch's format")
    stored, keys = read(load), read()
    if stored is not None or len(found) != 1 or not isinstance(keys, list) or keys != [found[0][0]]:
        raise UserError("a storage stream with unexpected content")
    _, dtype, count = found[0]
    start = stream.tell()
    if int.from_bytes(data[start : start + 8], "little") != count:
        raise UserError(f"a storage of {count} elements whose header states another count")
    return _to_storage(bytearray(memoryview(data)[start + 8 :]), dtype, count)


def _to_storage(data: bytearray | np.ndarray, dtype: torch.dtype, count: int) -> _Storage:
    """Return a storage that shares the memory of `data`. Raises UserError unless its size is `count` elements."""
    if len(data) != count * dtype.itemsize:
        raise UserError(f"a storage of {count} elements of {dtype.itemsize} bytes in {len(data)} bytes")
    return _Storage(torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype))


def _storage_key(key: Any) -> tuple[str, torch.dtype, int]:
    """Return key, dtype and number of elements of a persistent id ('storage', type, key, device, elements, None)."""
    if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] != "storage" or key[5:] not in ((), (None,)):
        raise UserError("a malformed persistent id of a storage")
    _, dtype, name, _, count = key[:5]
    if not isinstance(dtype, torch.dtype) or not isinstance(name, str) or type(count) is not int or count < 0:
        raise UserError("a malformed persistent id of a storage")
    return name, dtype, count


def _view(storage: _Storage, offset: int, size: Any, stride: Any, budget: _Budget) -> Tensor:
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise UserError("a tensor without storage or shape")
    if len(size) != len(stride) or len(size) > MAX_DIMS:
        raise UserError("a tensor with an invalid shape")
    numbers = (offset, *size, *stride)
    if not all(type(n) is int and 0 <= n < 2**40 for n in numbers):
        raise UserError("a tensor with an invalid shape")
    count = 1
    for length in size:
        count *= length
    last = 0  # index of the last element within the dimensions seen so far
    for step, length in sorted(zip(stride, size, strict=True)):
        if count and length > 1 and step <= last:
            raise UserError(f"a tensor of shape {size} whose elements overlap")
        last += (length - 1) * step
    if count and offset + last >= len(storage.numbers):
        raise UserError(f"a tensor of shape {size} that exceeds its storage")
    if count > budget.numbers:
        raise UserError(f"a tensor of shape {size}, with more elements than the file can hold")
    budget.numbers -= count
    return storage.numbers.as_strided(size, stride, offset) if count else storage.numbers.new_empty(size)
