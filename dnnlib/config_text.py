"""Parsing of command-line text to config values, by the type of the field or by its own parser."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from dnnlib.config import (
    FLOAT32_MAX,
    ConfigError,
    TextValue,
    check_family,
    check_setting,
    did_you_mean,
    family_of,
    hints,
    path_prefix,
)

MAX_DIGITS = 18  # digits of an integer; 18 fit into 64 bits
_BOOLS = {word: True for word in ("true", "1", "yes", "on")} | {word: False for word in ("false", "0", "no", "off")}
_EXAMPLES: Mapping[Any, str] = {int: "256,64,16", float: "3.0,20.0"}

Field = dataclasses.Field[Any]


def parse_texts(config: Any, texts: Mapping[str, str]) -> dict[str, Any]:
    """Parse {path: text} for fields of `config` to {path: value}.

    The family of a part is taken from `texts` if specified there, else from `config`. Raises ConfigError for an unknown
    path, with the closest existing paths, and for text that does not parse as a value of the field.
    """
    return {path: _parse_path(config, path, text, texts) for path, text in texts.items()}


def _parse_path(config: Any, path: str, text: str, texts: Mapping[str, str]) -> Any:
    config_class: Any = type(config)
    *parents, name = path.split(".")
    for depth, parent in enumerate(parents):
        field, prefix = _field(config_class, parent), ".".join(parents[: depth + 1])
        if field is None or not _is_composed(config_class, field):
            raise ConfigError(path, text, f"no such field; {_nearest(config, path)}")
        config_class = hints(config_class)[parent]
        if families := field.metadata.get("families"):
            requested = text if name == "family" else texts.get(f"{prefix}.family")
            family = requested or family_of(getattr(config, parent), families)
            with path_prefix(prefix):
                check_family(family, families)
                check_setting(family, name, text, families)
            if name == "family":
                return text
            config_class = families[family]
    field = _field(config_class, name)
    if field is None or _is_composed(config_class, field):
        raise ConfigError(path, text, f"no such field; {_nearest(config, path)}")
    try:
        return parse_field(config_class, field, text)
    except ValueError as error:
        raise ConfigError(path, text, str(error)) from None


def parse_field(config_class: type, field: Field, text: str) -> Any:
    """Parse text for a field. Raises ValueError that states the expected values."""
    hint, text = hints(config_class)[field.name], text.strip()
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = list(typing.get_args(hint)) if is_union else [hint]
    expected = []
    if type(None) in members:
        members.remove(type(None))
        nothing = "auto" if field.metadata.get("auto") else "none"
        if text.lower() == nothing:
            return None
        expected.append(nothing)
    if parse := field.metadata.get("parse"):
        return parse(text)
    problems = []
    for member in members:
        try:
            return _parse_as(member, text)
        except ValueError as error:
            problems.append(str(error))
    *others, last = [*problems, *expected]
    raise ValueError(f"expected {' or '.join([*filter(None, [', '.join(others)]), last])}")


def _parse_as(hint: Any, text: str) -> Any:
    """Parse text as a value of a type. Raises ValueError with a noun phrase for the expected value."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if text not in args:
            raise ValueError(f"one of {', '.join(args)}{did_you_mean(text, args)}" if len(args) > 1 else args[0])
        return text
    if origin is tuple:
        items = () if text.lower() == "none" else filter(None, map(str.strip, text.split(",")))
        try:
            return tuple(_parse_as(args[0], item) for item in items)
        except ValueError:
            raise ValueError(f"a list such as {_EXAMPLES[args[0]]}") from None
    if hint is bool:
        if text.lower() not in _BOOLS:
            raise ValueError("true or false")
        return _BOOLS[text.lower()]
    if hint is int:
        if not re.fullmatch(rf"[-+]?\d{{1,{MAX_DIGITS}}}", text, re.ASCII):
            raise ValueError("a whole number")
        return int(text)
    if issubclass(hint, TextValue):
        return hint.parse(text)
    return _parse_float(text) if hint is float else text


def _parse_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= FLOAT32_MAX:
        raise ValueError("a number")
    return number


def field_paths(config: Any) -> list[str]:
    """Return the paths of all fields of a configuration, including nested fields of every family."""
    paths = []
    for field in dataclasses.fields(config):
        families = field.metadata.get("families", {})
        parts = list(families.values()) if families else [hints(type(config))[field.name]]
        if _is_composed(type(config), field):
            inner = [f"{field.name}.{f.name}" for part in parts for f in dataclasses.fields(part)]
            paths += [f"{field.name}.family"] * bool(families) + list(dict.fromkeys(inner))
        else:
            paths.append(field.name)
    return paths


def _nearest(config: Any, path: str) -> str:
    """Return a hint with the existing fields closest to an unknown path."""
    paths, name = field_paths(config), path.rpartition(".")[2]
    near = [known for known in paths if known.rpartition(".")[2] == name]
    near = near or [known for known in paths if known.startswith(f"{path}.")]
    near = near or difflib.get_close_matches(path, paths, n=3)
    near = near or [known for known in paths if did_you_mean(name, [known.rpartition(".")[2]])]
    return f"did you mean {', '.join(near)}?" if near else "docs/configuration.md lists all fields"


def _field(config_class: Any, name: str) -> Field | None:
    return next((field for field in dataclasses.fields(config_class) if field.name == name), None)


def _is_composed(config_class: type, field: Field) -> bool:
    """Return whether the values of a field are configurations."""
    return "families" in field.metadata or dataclasses.is_dataclass(hints(config_class)[field.name])
