"""Configuration as nested frozen dataclasses: overrides by dotted path, JSON output, strict JSON input.

A field that can hold one of several dataclasses (e.g. the families of generators) lists them in its metadata:

    generator: GeneratorConfig = setting(help="Generator.", default_factory=StyleformerConfig, families=GENERATORS)

The JSON object of such a field also holds the name: {"family": "styleformer", "widths": [256, 64, 16], ...}. The path
generator.family overrides the family: `convert_from` of the named class converts the previous configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
import re
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

T = TypeVar("T")
FLOAT32_MAX = 3.4028234663852886e38
OPTIONS_FILE = "training_options.json"  # the configuration of a run, in its folder


class UserError(ValueError):
    """Invalid user input; the message contains its name, its value and the remedy."""


class WriteError(UserError):
    """A file could not be written; existing files are intact."""


def show(value: object) -> str:
    """Return the repr of a value for a message, at most 200 characters; the name of its type if repr fails."""
    try:
        return f"{value!r:.200}"
    except (ValueError, RecursionError):  # more than 4300 digits; nested too deeply
        return f"({type(value).__name__})"


class ConfigError(UserError):
    """Invalid value of a configuration field.

    `field` is the dotted path, possibly without leading parts; `problem` states the problem and the remedy.
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(f"{field}={show(value)}: {problem}")
        self.field = field
        self.value = value
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return ConfigError, (self.field, self.value, self.problem)  # makes the error picklable


class TextValue(ABC):
    """Base class of field values that are written as text, on the command line and in JSON."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self:
        """Parse text. Raises ValueError with a noun phrase for the expected text."""

    @abstractmethod
    def __str__(self) -> str:
        """Return the text that `parse` converts to this value."""

    @property
    @abstractmethod
    def numbers(self) -> tuple[float, ...]:
        """Numbers to which the bounds of a field apply."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Allowed values of a config field. For a tuple, the bounds apply to each item. Strings have no numeric bounds."""

    at_least: float | None = None
    above: float | None = None  # exclusive lower bound
    at_most: float | None = None
    below: float | None = None  # exclusive upper bound
    choices: tuple[Any, ...] | None = None
    length: int | None = None  # length of a tuple
    optional: bool = True  # whether None is allowed
    note: str = ""  # appended to the message: a remedy, or the meaning of a boundary value

    def problem(self, value: object) -> str | None:
        """Return an error message if a value is not allowed, else None."""
        if value is None and self.optional:
            return None
        problem = self._problem(value)
        return f"{problem}; {self.note}" if problem and self.note else problem

    def _problem(self, value: object) -> str | None:
        items = value.numbers if isinstance(value, TextValue) else value if isinstance(value, (tuple, list)) else None
        if self.length is not None and (items is None or len(items) != self.length):
            return f"must be {self.length} numbers"
        for item in (value,) if items is None else items:
            if self.choices is not None and item not in self.choices:
                hint = did_you_mean(item, self.choices) if isinstance(item, str) else ""
                return f"choose one of {self}{hint}" if items is None else f"{show(item)} is not one of {self}{hint}"
            if isinstance(item, numbers.Real) and not self._is_allowed(item):
                each = "" if items is None else "each value " if isinstance(value, TextValue) else "each "
                return f"{each}must {'lie in' if '..' in str(self) else 'be'} {self}"
        return "cannot be None" if value is None else None

    def _is_allowed(self, value: Any) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Return the choices or the range as text: `a, b`, `at least 1`, `0..1`; "" without bounds."""
        if self.choices is not None:
            return ", ".join(map(str, self.choices))
        ends = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        words = {word: f"{end:,}" for word, end in ends.items() if end is not None}
        if len(words) == 2:
            excluded = [words[word] for word in ("above", "below") if word in words]
            return ", ".join(["..".join(words.values()), *(f"{end} excluded" for end in excluded)])
        return "positive" if self.above == 0 else "".join(f"{word} {end}" for word, end in words.items())


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    default_factory: Any = dataclasses.MISSING,
    families: Mapping[str, type] | None = None,
    parse: Callable[[str], Any] | None = None,
    auto: bool = False,
    **bounds: Any,
) -> Any:
    """Declare a configuration field with its default, its description for the documentation, and its Bounds.

    `parse` converts command-line text to a value if the type alone is not sufficient; it raises ValueError. `families`
    maps names to the dataclasses that the field can hold. On the command line, `none` denotes None; if
    `auto` is set, the word is `auto`, and the value is chosen from the data and the machine.
    """
    metadata = {"help": help, "bounds": Bounds(**bounds), "auto": auto}
    metadata |= {"families": families} if families else {}
    metadata |= {"parse": parse} if parse else {}
    given = {"default": default} if default_factory is dataclasses.MISSING else {"default_factory": default_factory}
    return dataclasses.field(**given, metadata=metadata)


def check_bounds(config: Any) -> None:
    """Raise ConfigError for the first field of a configuration that violates its bounds."""
    for name, bounds in bounds_of(type(config)).items():
        value = getattr(config, name)
        if problem := bounds.problem(value):
            raise ConfigError(name, value, problem)


def bounds_of(config_class: Any) -> Mapping[str, Bounds]:
    """Return the Bounds of each field of a config class: the declared bounds plus those implied by its type.

    The type determines the choices of a Literal, the length of a tuple, and whether None is allowed.
    """
    return _bounds_of(config_class)


@functools.cache
def _bounds_of(config_class: Any) -> Mapping[str, Bounds]:
    declared = {field.name: field.metadata.get("bounds", Bounds()) for field in dataclasses.fields(config_class)}
    return {name: _with_type(bounds, hints(config_class)[name]) for name, bounds in declared.items()}


def _with_type(bounds: Bounds, hint: Any) -> Bounds:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if is_union else (hint,)
    bounds = dataclasses.replace(bounds, optional=types.NoneType in members)
    kinds = [member for member in members if member is not types.NoneType]
    origin, args = typing.get_origin(kinds[0]), typing.get_args(kinds[0])
    if len(kinds) == 1 and origin is typing.Literal:
        return dataclasses.replace(bounds, choices=args)
    if origin is tuple and Ellipsis not in args:
        return dataclasses.replace(bounds, length=len(args))
    return bounds


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) for text such as 8 or 8x12. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,18})(?:x(\d{1,18}))?", text, re.ASCII)  # 18 digits fit into 64 bits
    if not match:
        raise ValueError(f"{text!r} is not a size such as 8 or 8x12 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def override(config: T, values: Mapping[str, Any]) -> T:
    """Return `config` with the fields at the given dotted paths replaced, e.g. {"loss.r1_gamma": 10}.

    All fields of one dataclass are replaced at once, so that only the final values are validated; a new family is
    applied first. Raises ConfigError for a path that does not exist and for values that the dataclass rejects.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        name, _, rest = path.partition(".")
        if name not in fields:
            raise ConfigError(path, value, f"{type(config).__name__} has no such field; it has {', '.join(fields)}")
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    for name, inner in nested.items():
        with path_prefix(name):
            inner_config = getattr(config, name)
            if families := fields[name].metadata.get("families"):
                inner_config = _choose_family(inner_config, inner, families)
                inner.pop("family", None)
            own[name] = override(inner_config, inner)
    return dataclasses.replace(config, **own)  # type: ignore[type-var]


def hints(config_class: Any) -> dict[str, Any]:
    """Return the types of the fields of a config class by name."""
    return _hints(config_class)


@functools.cache
def _hints(config_class: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(config_class)


def is_config(value: object) -> bool:
    """Return whether the value of a field is a configuration with fields of its own."""
    return dataclasses.is_dataclass(value) and not isinstance(value, TextValue)


def to_json(config: Any) -> dict[str, Any]:
    """Return nested plain dicts, lists, numbers and strings; tuples become lists."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if is_config(value):
            families = field.metadata.get("families")
            head = {"family": family_of(value, families)} if families else {}
            result[field.name] = head | to_json(value)
        else:
            result[field.name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    """Return the JSON form of a field's value."""
    if isinstance(value, TextValue):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def from_json(config_class: type[T], data: Mapping[str, Any]) -> T:
    """Inverse of `to_json`. Raises ConfigError for an unknown or missing key and for a wrong type."""
    if not isinstance(data, Mapping):
        raise ConfigError(config_class.__name__, data, "expected a JSON object")
    types_of = hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    for key, value in data.items():
        if key not in fields:
            raise ConfigError(key, value, f"unknown key; {config_class.__name__} has {', '.join(fields)}")
    for name in fields:
        if name not in data:
            raise ConfigError(name, None, f"missing from the JSON of {config_class.__name__}")
    values = {name: _read_field(field, types_of[name], data[name]) for name, field in fields.items()}
    return config_class(**values)


@contextmanager
def path_prefix(name: str) -> Iterator[None]:
    """Prepend `name` to the field path of a ConfigError raised in the block."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}.{error.field}", error.value, error.problem) from None


def field_names(config: Any) -> tuple[str, ...]:
    """Return the names of the fields of a config or a config class, in order."""
    return tuple(field.name for field in dataclasses.fields(config))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return one line 'path: old -> new' for each differing leaf of two JSON objects."""
    lines = []
    for key in sorted(set(old) | set(new)):
        left, right = old.get(key), new.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: {left!r} -> {right!r}")
    return lines


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known word closest to a text; "" if none is close."""
    near = difflib.get_close_matches(text, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def family_of(config: Any, families: Mapping[str, type]) -> str:
    """Return the name of a configuration's family."""
    return next(name for name, family in families.items() if family is type(config))


def _choose_family(config: Any, values: Mapping[str, Any], families: Mapping[str, Any]) -> Any:
    """Return `config`, converted if `values` selects another family. Raises ConfigError for unknown fields."""
    name = values.get("family", family_of(config, families))
    check_family(name, families)
    for path, value in values.items():
        check_setting(name, path.partition(".")[0], value, families)
    return config if families[name] is type(config) else families[name].convert_from(config)


def check_setting(family: str, name: str, value: object, families: Mapping[str, Any]) -> None:
    """Raise ConfigError for a field that does not exist in a family."""
    own = field_names(families[family])
    if name == "family" or name in own:
        return
    others = [other for other, config_class in families.items() if name in field_names(config_class)]
    known = f"; supported by {', '.join(others)}" if others else did_you_mean(name, own) or f"; it has {', '.join(own)}"
    raise ConfigError(name, value, f"is not a setting of the family {family}{known}")


def check_family(name: Any, families: Mapping[str, Any]) -> None:
    """Raise ConfigError for an unknown family."""
    if not isinstance(name, str) or name not in families:
        raise ConfigError("family", name, f"unknown family; choose one of {', '.join(families)}")


def _read_field(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    families = field.metadata.get("families")
    if families:
        if not isinstance(value, Mapping):
            raise ConfigError(field.name, value, "expected a JSON object")
        data = dict(value)
        family = data.pop("family", None)
        with path_prefix(field.name):
            check_family(family, families)
        hint, value = families[family], data
    if dataclasses.is_dataclass(hint):
        with path_prefix(field.name):
            return from_json(typing.cast(type, hint), value)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, str) and (kind := _text_type(hint)):
        try:
            return kind.parse(value)
        except ValueError as error:
            raise ConfigError(field.name, value, f"expected {error}") from None
    if not _matches(hint, value):
        is_out_of_range = any(_is_number(kind, value) for kind in (hint, *typing.get_args(hint)))
        bound = "; numbers must be finite and fit into 64 bits" if is_out_of_range else ""
        raise ConfigError(field.name, value, f"expected {getattr(hint, '__name__', hint)}{bound}")
    return float(value) if hint is float else value


def _text_type(hint: Any) -> type[TextValue] | None:
    """Return the TextValue among the members of a type hint, or None."""
    members = typing.get_args(hint) or (hint,)
    return next((kind for kind in members if isinstance(kind, type) and issubclass(kind, TextValue)), None)


def accepts_text_value(config_class: Any, name: str) -> bool:
    """Return whether a field accepts a TextValue, such as a schedule."""
    return _text_type(hints(config_class)[name]) is not None


def _matches(hint: Any, value: Any) -> bool:
    """Return whether a value read from JSON, with lists converted to tuples, matches a type hint."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(arg, value) for arg in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(_matches(args[0], item) for item in value)
        return len(args) == len(value) and all(map(_matches, args, value))
    if hint is float:
        return _is_number(float, value) and bool(abs(value) <= FLOAT32_MAX)
    if hint is int:
        return _is_number(int, value) and bool(abs(value) < 2**63)
    return isinstance(value, type(None) if hint is None else hint)


def _is_number(kind: Any, value: Any) -> bool:
    """Return whether `kind` is int or float and `value` is of that type, at any magnitude; integers count as floats."""
    return kind in (int, float) and isinstance(value, (int, kind)) and not isinstance(value, bool)
