"""Safe loading of untrusted exported programs (.pt2): only archives of tensors and a graph are accepted.

A torch.export archive contains a graph, as JSON, and tensors. torch also loads pickled objects, compiled libraries and
objects of custom classes from an archive; it evaluates expressions of the graph as Python and generates Python code
from names in the graph. `check` validates all of these before torch loads them, with the same reader. An accepted
archive is a graph of PyTorch's own operators. Such a program can still exhaust memory and time.
"""

from __future__ import annotations

import ast
import io
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dnnlib.config import UserError
from dnnlib.screen import printable
from dnnlib.util import describe_error, parse_json

if TYPE_CHECKING:  # torch.export imports the compiler, which takes longer than importing this project
    from torch.export.pt2_archive import PT2ArchiveReader

# Permitted parts of an archive. Extra files are text and are not read by `load`.
PARTS = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json"
    r"|data/weights/(weight_\d+|model\.pt|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model\.pt|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|extra/.*"
)
TEXTS = ("models/model.json", "data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
MAX_TEXT = 1 << 28  # bytes

# NAME: names of tensors, modules and arguments, which torch writes into generated code. QUOTED: string literals.
NAME = re.compile(r"[\w.+-]{0,500}", re.ASCII)
QUOTED = re.compile(r"[^'\"\\\r\n]{0,500}")
OPERATOR = re.compile(r"torch\.ops\.(aten|prims)\.(\w+)\.(\w+)", re.ASCII)
FORBIDDEN = ("from_file", "save")  # operators of PyTorch that open files
OTHER_OPERATORS = re.compile(
    r"torch\._?sym_\w+|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond)",
    re.ASCII,
)
TREE_TYPES = (None, "builtins.tuple", "builtins.list", "builtins.dict")
CHECKED = ("target", "as_operator", "expr_str", "guards_code", "in_spec", "out_spec")
NOTE = "note"  # stack traces and other text that torch never executes
REFUSED_KEYS = ("as_custom_obj", "class_fqn", "custom_obj_name")

# Size expressions in sympy notation: Add(Mul(Integer(2), Symbol('s34', positive=True)), Integer(1)). Guards on sizes
# in Python notation: L['images'].size()[0] <= 4096.
NODES: tuple[type[ast.AST], ...] = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.Attribute, ast.Subscript),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.Pow, ast.USub, ast.UAdd, ast.And, ast.Or, ast.Not, ast.cmpop),
)
SYMBOL = re.compile(r"[a-z]{1,4}\d+|L|oo|int_oo|torch|math", re.ASCII)
FUNCTIONS = re.compile(
    r"Symbol|Integer|Rational|Add|Mul|Pow|PowByNatural|Max|Min|Mod|PythonMod|Abs|floor|ceiling|Identity|Where|And|Or|Not"
    r"|Eq|Ne|Equality|Unequality|LessThan|StrictLessThan|GreaterThan|StrictGreaterThan|Piecewise|ExprCondPair"
    r"|FloorDiv|CeilDiv|CleanDiv|IntTrueDiv|FloatTrueDiv|ModularIndexing|FloorToInt|CeilToInt|TruncToInt|ToFloat"
    r"|max|min|abs|int|float|torch\.sym_(max|min|int|float|not)|math\.(floor|ceil|trunc)"
)
METHODS = ("size", "stride", "storage_offset")
POWERS = ("Pow", "PowByNatural")
MAX_EXPRESSION = 20_000

# Environment variables that override the weights_only argument of torch.load, which raises if both are set.
FORCE_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
FORCE_NO_WEIGHTS_ONLY = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
EXPONENT = re.compile(r"(Integer\()?-?[0-8]\)?")


def load(path: Path) -> torch.export.ExportedProgram:
    """Load an exported program. Raises UserError if the file contains more than data and PyTorch's own operators.

    Exceptions that torch raises for corrupt files are propagated.
    """
    from torch.export.pt2_archive._package import load_pt2  # torch.export.load would also try an older format

    check(path)
    with _weights_only():
        return load_pt2(str(path)).exported_programs["model"]


def check(path: Path) -> None:
    """Raise UserError, with the name of the part, if loading an archive would run code."""
    from torch.export.pt2_archive import PT2ArchiveReader

    try:
        reader = PT2ArchiveReader(str(path))
        names = reader.get_file_names()
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
    except (RuntimeError, AssertionError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--detector={path}: cannot be loaded: not a torch.export archive, or written by torch 2.7 or older; "
            f"export it again with a newer torch ({describe_error(error)})"
        ) from None
    if size > path.stat().st_size:
        raise UserError(f"--detector={path}: is compressed or has overlapping parts, unlike the files of torch.export")
    if TEXTS[0] not in names:
        raise UserError(f"--detector={path}: holds no program ({TEXTS[0]})")
    for name in names:
        if not PARTS.fullmatch(name):
            raise _refusal(path, name, "is not part of a program that holds only data and PyTorch's own operators")
    for name in names:
        if name.endswith(".pt"):
            _check_tensors(path, name, reader.read_bytes(name))
    for name in (name for name in TEXTS if name in names):
        document = _read_text(path, name, reader.read_bytes(name))
        if name != TEXTS[0]:
            _check_payloads(path, name, document, reader)


def _refusal(path: Path, part: str, problem: str) -> UserError:
    return UserError(f"--detector={path}: part {printable(part)} {problem}; the file is not loaded")


def _check_tensors(path: Path, part: str, content: bytes) -> None:
    try:
        torch.load(io.BytesIO(content), map_location="meta", weights_only=True)
    except Exception as error:
        problem = f"holds more than tensors and plain values and could run arbitrary code ({_reason(error)})"
        raise _refusal(path, part, problem) from None


def _reason(error: Exception) -> str:
    """Extract the reason from an unpickler error, without torch's advice to run the code anyway."""
    match = re.search(r"GLOBAL ([\w.]+)|WeightsUnpickler error:\s*([^\n]*)", str(error))
    return printable(match[1] or match[2])[:100] if match else describe_error(error)


def _read_text(path: Path, part: str, content: bytes) -> Any:
    """Parse a JSON part. Raises UserError for a string in it that torch could execute."""
    if len(content) > MAX_TEXT:
        raise _refusal(path, part, f"has more than {MAX_TEXT} bytes")
    try:
        document = parse_json(content)
        for kind, text in _strings(document):
            _check_string(kind, text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _refusal(path, part, f"holds {describe_error(error)}") from None
    return document


def _check_payloads(path: Path, part: str, document: Any, reader: PT2ArchiveReader) -> None:
    """Raise UserError unless the tensors listed in a part are raw bytes or load with weights_only=True."""
    try:
        payloads = [(payload["path_name"], payload["use_pickle"]) for payload in document["config"].values()]
    except (KeyError, TypeError, AttributeError):
        raise _refusal(path, part, "does not list tensors") from None
    for name, is_pickled in payloads:
        place = f"{part.rpartition('/')[0]}/{name}"
        if not PARTS.fullmatch(place):
            raise _refusal(path, place, "is an object, not a tensor")
        if is_pickled:
            _check_tensors(path, place, reader.read_bytes(place))


def _strings(value: Any, kind: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, string) for every string value in a document, and ('', key) for every key."""
    if isinstance(value, str):
        yield kind, value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, kind)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield "", key
            if key in REFUSED_KEYS:
                raise ValueError(f"an object of a custom class ({key})")
            is_note = kind == "metadata" and isinstance(item, str) and key not in CHECKED
            yield from _strings(item, NOTE if is_note else key)


def _check_string(kind: str, text: str) -> None:
    """Raise ValueError for a string that torch could execute as more than a permitted name or expression."""
    if kind in ("target", "as_operator"):
        _check_operator(text)
    elif kind in ("expr_str", "guards_code"):
        _check_expression(text)
    elif kind in ("in_spec", "out_spec"):
        _check_tree(parse_json(text))
    elif kind != NOTE and not (QUOTED if kind == "as_string" else NAME).fullmatch(text):
        raise ValueError(f"{text[:60]!r}, which is not a valid name")


def _check_operator(name: str) -> None:
    match = OPERATOR.fullmatch(name)
    if match and match[2] not in FORBIDDEN:
        packet = getattr(getattr(torch.ops, match[1]), match[2], None)
        if isinstance(getattr(packet, match[3], None), torch._ops.OpOverload):
            return
    elif OTHER_OPERATORS.fullmatch(name):
        return
    raise ValueError(f"{name[:100]!r}, which is not a permitted operator")


def _check_expression(text: str) -> None:
    """Raise ValueError unless a string is arithmetic on sizes when evaluated as Python."""
    try:
        nodes = [*ast.walk(ast.parse(text.strip(), mode="eval"))] if len(text) <= MAX_EXPRESSION else []
    except SyntaxError:
        nodes = []
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    called: set[ast.AST] = {node.func for node in calls}
    named: set[ast.AST] = {node.slice for node in nodes if isinstance(node, ast.Subscript)}  # as in L['images']
    named |= {node.args[0] for node in calls if ast.unparse(node.func) == "Symbol" and len(node.args) == 1}
    if not nodes or not all(isinstance(node, NODES) and _is_harmless(node, called, named) for node in nodes):
        raise ValueError(f"{text[:60]!r}, which is not an expression of sizes")


def _is_harmless(node: ast.AST, called: set[ast.AST], named: set[ast.AST]) -> bool:
    """Return whether a node is arithmetic. `called` are function nodes; `named` are nodes that may be a string."""
    match node:
        case ast.Name():
            return (FUNCTIONS if node in called else SYMBOL).fullmatch(node.id) is not None
        case ast.Attribute():
            return node in called and (node.attr in METHODS or FUNCTIONS.fullmatch(ast.unparse(node)) is not None)
        case ast.Constant(value=str(text)):
            return node in named and NAME.fullmatch(text) is not None
        case ast.Constant():
            return isinstance(node.value, (bool, int, float))
        case ast.keyword():
            return isinstance(node.value, ast.Constant) and isinstance(node.value.value, bool)
        case ast.BinOp(left=base, op=ast.Pow(), right=exponent):
            return _is_small_power(base, exponent)
        case ast.Call():
            if ast.unparse(node.func) in POWERS:
                return len(node.args) == 2 and _is_small_power(*node.args)
            return isinstance(node.func, (ast.Name, ast.Attribute))
    return True


def _is_small_power(base: ast.expr, exponent: ast.expr) -> bool:
    """Return whether a power is cheap to evaluate: the exponent is a small number and the base is not a power."""
    text = ast.unparse(base)
    return EXPONENT.fullmatch(ast.unparse(exponent)) is not None and "Pow" not in text and "**" not in text


def _check_tree(value: Any) -> None:
    """Raise ValueError unless a tree of inputs or outputs consists of tuples, lists and dicts."""
    if isinstance(value, dict):
        if value.keys() != {"type", "context", "children_spec"} or value["type"] not in TREE_TYPES:
            raise ValueError(f"inputs or outputs of type {str(value.get('type'))[:60]!r}, not tuples, lists and dicts")
        if value["context"] is not None:
            for _, text in _strings(parse_json(value["context"])):
                _check_string("", text)
        _check_tree(value["children_spec"])
    elif isinstance(value, list):
        for item in value:
            _check_tree(item)
    elif isinstance(value, str):
        raise ValueError(f"{value[:60]!r} instead of a tree of inputs or outputs")


@contextmanager
def _weights_only() -> Iterator[None]:
    """Force weights_only=True in torch.load, even where torch.export passes False or retries with False."""
    saved = {name: os.environ.pop(name) for name in (FORCE_WEIGHTS_ONLY, FORCE_NO_WEIGHTS_ONLY) if name in os.environ}
    os.environ[FORCE_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        del os.environ[FORCE_WEIGHTS_ONLY]
        os.environ.update(saved)
