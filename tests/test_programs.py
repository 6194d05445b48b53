"""Detector programs (--detector): archives that would execute code are refused; valid archives are read."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from metric_helpers import SmallDetector, export_program, script_program
from torch import Tensor, nn

from dnnlib.config import UserError
from metrics import programs
from metrics.detectors import load_program, read_detectors

CPU = torch.device("cpu")
IMAGES = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
CODE = "__import__('os').mkdir('pwned')"
Parts = dict[str, bytes]
Change = Callable[[Parts], None]


class Exploit:
    """An object that creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_program(tmp_path_factory.mktemp("program") / "small.pt2", SmallDetector(), IMAGES)


@pytest.fixture
def changed(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], Path]:
    """Write a modified copy of the program into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(change: Change, compression: int = zipfile.ZIP_STORED) -> Path:
        with zipfile.ZipFile(program) as archive:
            parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        change(parts)
        with zipfile.ZipFile(tmp_path / "bad.pt2", "w", compression) as archive:
            for name, content in parts.items():
                archive.writestr(name.removeprefix("^") if name.startswith("^") else f"bad/{name}", content)
        return tmp_path / "bad.pt2"

    return write


def with_part(name: str, content: bytes) -> Change:
    return lambda parts: parts.update({name: content})


def with_graph(change: Callable[[Any], object]) -> Change:
    """Apply a change to the graph."""

    def apply(parts: Parts) -> None:
        document = json.loads(parts["models/model.json"])
        change(document)
        parts["models/model.json"] = json.dumps(document).encode()

    return apply


def with_value(key: str, value: Any) -> Change:
    """Set all occurrences of a key in the graph to a value."""

    def apply(item: Any) -> None:
        for one in item.values() if isinstance(item, dict) else item if isinstance(item, list) else ():
            apply(one)
        if isinstance(item, dict) and key in item:
            item[key] = value

    return with_graph(apply)


def with_renamed(old: str, new: str) -> Change:
    """Replace a name everywhere in the graph."""

    def apply(parts: Parts) -> None:
        text = parts["models/model.json"].decode()
        parts["models/model.json"] = text.replace(json.dumps(old), json.dumps(new)).encode()

    return apply


def with_call(target: str, text: str = "mkdir pwned") -> Change:
    """Add a call of another function, with a string argument, at the start of the graph."""
    argument = {"name": "self", "arg": {"as_string": text}, "kind": 1}
    node = {"target": target, "inputs": [argument], "outputs": [], "metadata": {}, "name": "x"}
    node["is_hop_single_tensor_return"] = None  # type: ignore[assignment]
    return with_graph(lambda document: document["graph_module"]["graph"]["nodes"].insert(0, node))


def with_payload(folder: str, name: str, content: bytes, *, use_pickle: bool = True) -> Change:
    """Add a pickle file and its description as a tensor."""
    path = f"data/{folder}/model_{folder}_config.json"

    def apply(parts: Parts) -> None:
        document = json.loads(parts[path])
        document["config"]["more"] = {
            "path_name": name,
            "is_param": False,
            "use_pickle": use_pickle,
            "tensor_meta": None,
        }
        parts[path] = json.dumps(document).encode()
        parts[f"data/{folder}/{name}"] = content

    return apply


def older_format(parts: Parts) -> None:
    """Add an archive of the older format, which torch tries if the newer format fails."""
    document = json.loads(parts.pop("models/model.json"))
    document["guards_code"] = [f"{CODE} is None"]
    parts["^version"] = b"8.20"
    parts["^serialized_exported_program.json"] = json.dumps(document).encode()
    for name in ("state_dict", "constants", "example_inputs"):
        parts[f"^serialized_{name}.pt"] = saved((Exploit(),))


def tree(document: Any, spec: dict[str, Any]) -> None:
    document["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, spec])


FACTORY = json.dumps({"default_factory_module": "os", "default_factory_name": "getcwd", "dict_context": "[]"})
PICKLE = saved((Exploit(),))
ATTACKS: dict[str, tuple[Change, str]] = {
    "sample inputs": (
        with_part("data/sample_inputs/model.pt", PICKLE),
        "sample_inputs/model.pt holds more than",
    ),
    "sample inputs, old pickle": (
        with_part("data/sample_inputs/model.pt", pickle.dumps(Exploit())),
        "holds more than tensors",
    ),
    "weights in one file": (
        with_part("data/weights/model.pt", PICKLE),
        "data/weights/model.pt holds more",
    ),
    "constants in one file": (
        with_part("data/constants/model.pt", PICKLE),
        "data/constants/model.pt holds more",
    ),
    "a pickled weight": (with_payload("weights", "weight_9", PICKLE), "data/weights/weight_9 holds more"),
    "a pickled constant": (with_payload("constants", "tensor_9", PICKLE), "data/constants/tensor_9 holds more"),
    "an opaque object": (
        with_payload("constants", "opaque_obj_0", pickle.dumps(Exploit())),
        "is not part of a program",
    ),
    "a script object": (
        with_payload("constants", "custom_obj_0", PICKLE),
        "custom_obj_0 is not part of a program",
    ),
    "a path outside its folder": (with_payload("weights", "../extra/x", PICKLE), "is not part of a program"),
    "a weight without a pickle": (
        with_payload("weights", "x", b"", use_pickle=False),
        "data/weights/x is not part",
    ),
    "a compiled library": (
        with_part("data/aotinductor/model/model.so", b"\x7fELF"),
        "is not part of a program",
    ),
    "C++ source": (with_part("data/aotinductor/model/wrapper.cpp", b"int x;"), "is not part of a program"),
    "another model": (with_part("models/other.json", b"{}"), "models/other.json is not part"),
    "an executorch program": (with_part("data/executorch/x.pte", b""), "is not part of a program"),
    "an expression": (with_value("expr_str", CODE), "which is not an expression of sizes"),
    "an expression with a string": (
        with_value("expr_str", f"Max('{CODE[:-1]}')"),
        "which is not an expression of sizes",
    ),
    "an endless expression": (
        with_value("expr_str", "Pow(Integer(9), Pow(Integer(9), Integer(9)))"),
        "not an expression",
    ),
    "a power of powers": (with_value("expr_str", "Pow(Pow(Pow(9, 8), 8), 8)"), "which is not an expression of sizes"),
    "attributes": (with_value("expr_str", "s0.__class__.__mro__"), "which is not an expression of sizes"),
    "a lambda": (with_value("expr_str", "(lambda: 1)()"), "which is not an expression of sizes"),
    "a condition": (with_value("guards_code", [f"{CODE} is None"]), "which is not an expression of sizes"),
    "a condition with a method": (with_value("guards_code", ["L['images'].tofile('x')"]), "not an expression of sizes"),
    "os.system": (with_call("torch.os.system"), "'torch.os.system', which is not a permitted operator"),
    "torch.load": (with_call("torch.load", "x.pt"), "'torch.load', which is not a permitted operator"),
    "operator.attrgetter": (
        with_call("_operator.attrgetter"),
        "'_operator.attrgetter', which is not a permitted operator",
    ),
    "an operator that writes": (with_call("torch.ops.aten.save.default", "pwned"), "which is not a permitted operator"),
    "an operator that maps a file": (
        with_call("torch.ops.aten.from_file.default", "pwned"),
        "which is not a permitted operator",
    ),
    "an operator of another library": (
        with_call("torch.ops.evil.run.default"),
        "'torch.ops.evil.run.default', which is not a permitted operator",
    ),
    "an attribute, not an operator": (
        with_call("torch.ops.aten.__init__.__globals__"),
        "which is not a permitted operator",
    ),
    "an extension": (with_call("#ext:run"), "'#ext:run', which is not a permitted operator"),
    "a script object's method": (
        with_call("torch.ops.higher_order.call_torchbind"),
        "which is not a permitted operator",
    ),
    "a Triton kernel": (
        with_call("torch.ops.higher_order.triton_kernel_wrapper_functional"),
        "which is not a permitted operator",
    ),
    "a name": (with_renamed("images", f"images={CODE}"), "which is not a valid name"),
    "a name in quotes": (with_renamed("p_mix", f'p"); {CODE} #'), "which is not a valid name"),
    "a class": (with_graph(lambda d: d.update(class_fqn="os.system")), "an object of a custom class"),
    "a factory": (
        with_graph(lambda d: tree(d, {"type": "collections.defaultdict", "context": FACTORY, "children_spec": []})),
        "'collections.defaultdict', not tuples",
    ),
    "a name among the inputs": (
        with_graph(lambda d: tree(d, {"type": "builtins.dict", "context": json.dumps([CODE]), "children_spec": []})),
        "which is not a valid name",
    ),
    "an archive of the older format": (older_format, "holds no program|cannot be loaded: not a torch.export archive"),
    "invalid JSON": (with_part("models/model.json", b"{"), "models/model.json holds Expecting"),
    "deeply nested JSON": (with_part("models/model.json", b"[" * 100_000), "nested too deep"),
}


@pytest.mark.parametrize("kind", ATTACKS)
def test_programs_that_would_execute_code_are_refused(
    kind: str, changed: Callable[[Change], Path], tmp_path: Path
) -> None:
    change, message = ATTACKS[kind]
    path = changed(change)
    with pytest.raises(UserError, match=message) as caught:
        load_program(path, CPU)(IMAGES)
    assert str(caught.value).startswith(f"--detector={path}: ")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.pt2"]


def test_only_names_that_torch_resolves_are_restricted(changed: Callable[..., Path]) -> None:
    """Stack traces and extra files are allowed; a size named `metadata` is still checked."""
    free = with_value("metadata", {"stack_trace": f"line 1\n{CODE}", "torch_fn": "a';b"})
    extra = with_part("extra/notes.txt", pickle.dumps(Exploit(), 0))
    features, logits = load_program(changed(lambda parts: (free(parts), extra(parts))), CPU)(IMAGES)
    assert (tuple(features.shape), logits is not None) == ((2, 6), True)
    assert not Path("pwned").exists()
    hidden = with_graph(lambda d: d["graph_module"]["graph"]["sym_int_values"].update(metadata={"expr_str": CODE}))
    with pytest.raises(UserError, match="not an expression of sizes"):
        programs.check(changed(hidden))


def test_compressed_archives_are_refused(changed: Callable[..., Path]) -> None:
    bomb = with_part("extra/zeros", bytes(1 << 20))
    with pytest.raises(UserError, match="is compressed or has overlapping parts"):
        programs.check(changed(bomb, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("kind", ["sample inputs", "weights in one file", "a pickled weight", "a pickled constant"])
def test_torch_executes_no_code_even_without_the_check(
    kind: str, changed: Callable[[Change], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment variable that disables weights_only is unset for the call and restored afterwards."""
    monkeypatch.setenv(programs.FORCE_NO_WEIGHTS_ONLY, "1")
    monkeypatch.setattr(programs, "check", lambda path: None)
    with suppress(pickle.UnpicklingError):  # torch may skip entries it cannot read
        programs.load(changed(ATTACKS[kind][0]))
    assert not Path("pwned").exists()
    assert os.environ[programs.FORCE_NO_WEIGHTS_ONLY] == "1"
    assert programs.FORCE_WEIGHTS_ONLY not in os.environ


class Larger(nn.Module):
    """A module with operators, constants and symbolic sizes of every kind used by detectors."""

    def __init__(self, *, has_attention: bool) -> None:
        super().__init__()
        layers = (nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.GELU(approximate="tanh"))
        self.layers = nn.Sequential(*layers)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True) if has_attention else None
        self.mean = nn.Parameter(torch.full((3, 1, 1), 0.5), requires_grad=False)
        self.constant = torch.tensor([2.0, 3.0])

    def forward(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            x = nn.functional.interpolate((images.float() / 255 - self.mean), scale_factor=2, mode="bilinear")
            tokens = self.layers(x).flatten(2).transpose(1, 2)
        mixed = tokens if self.attention is None else self.attention(tokens, tokens, tokens)[0]
        features = torch.einsum("bnc,bnc->bc", mixed, tokens) * self.constant[0]
        return [torch.cat([features, features.roll(1, 1)], dim=1), nn.functional.softmax(features, dim=1)]


@pytest.mark.parametrize("has_attention", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_valid_programs_are_read(tmp_path: Path, has_attention: bool) -> None:
    """Programs with symbolic sizes and conditions on sizes return the same values as the module."""
    torch.manual_seed(0)
    module = Larger(has_attention=has_attention).eval()
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(module, (IMAGES,), dynamic_shapes={"images": {0: auto, 2: auto, 3: auto}})
    torch.export.save(exported, tmp_path / "larger.pt2", extra_files={"notes.txt": "x"})
    images = torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8)
    features, logits = load_program(tmp_path / "larger.pt2", CPU)(images)
    expected = module(images)
    torch.testing.assert_close(features, expected[0])
    torch.testing.assert_close(logits, expected[1])


def test_the_kind_of_a_program_is_reported_once(
    program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = script_program(tmp_path / "small.pt", SmallDetector())
    for path in (program, script):
        first = load_program(path, CPU)(IMAGES)[0]
        assert torch.equal(first, load_program(path, CPU)(IMAGES)[0])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"--detector={path}: is a program that runs on this machine; use only programs that you trust"
        for path in (program, script)
    ]


def test_a_pipe_is_refused_as_a_detector(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UserError, match=r"pipe\.pt: cannot be read \(not a regular file\)"):
        read_detectors((str(tmp_path / "pipe.pt"),))
