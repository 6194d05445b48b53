"""Reader of the TOML file with a question for benchmarks/learning.py."""

from __future__ import annotations

import itertools
import math
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common  # noqa: F401 (adds the project folder to the path)

from dnnlib.config import UserError
from dnnlib.util import read_regular
from reporting.laboratory import Arm, Question

MAX_QUESTION_BYTES = 1 << 20
MAX_SNAPSHOTS = 100  # per run
RESERVED = {
    "--outdir", "--resume", "--override", "--data", "--seed", "--desc", "--kimg", "--tick", "--snap", "--metrics",
    "--detector", "--log", "--device", "--gpus", "--workers", "--dry-run", "-n", "--help",
}  # fmt: skip
RESERVED_FIELDS = re.compile(
    "seed|data.path|run.(desc|total_kimg|tick_kimg|snapshot_ticks|metrics.*|tick_metrics|detectors|log|device|num_gpus|"
    "workers|keep_last|keep_every)"
)


def read_question(path: Path, **settings: Any) -> Question:
    """Read a question; `settings` are the fields that are not in the file. Raises UserError, with the path."""
    try:
        content = tomllib.loads(read_regular(path, MAX_QUESTION_BYTES).decode())
        unknown = set(content) - {"question", "evaluate", "base", "arms"}
        if unknown:
            raise ValueError(f"unknown key {min(unknown)}")
        ages, base = content["evaluate"], content.get("base", "")
        if not isinstance(ages, list) or not isinstance(content["arms"], dict):
            raise ValueError("evaluate is not a list of ages, or arms is not a table")
        arms = dict(_arms(content["arms"]))
        question = Question(question=content["question"], evaluate=tuple(ages), base=base, arms=arms, **settings)
        _check_options("base", base)
        _check_step(question.evaluate)
        for name, arm in arms.items():
            if arm.evaluate:
                _check_step(arm.evaluate, f"arm {name}: ")
        return question
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing; docs/learning.md describes the file") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; docs/learning.md describes the file") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}; docs/learning.md describes the file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _arms(content: dict[str, Any]) -> Iterator[tuple[str, Arm]]:
    """Yield the arms of a question, with the options of the arm that an arm extends."""
    known: dict[str, Arm] = {}
    for name, entry in content.items():
        fields = {**entry} if isinstance(entry, dict) else {"options": entry}
        parent, own, ages = (fields.pop(key, None) for key in ("extends", "options", "evaluate"))
        if parent is not None and parent not in [*known]:
            raise ValueError(f"arm {name}: extends {parent}, which is not an arm above it")
        if not isinstance(own, str):
            raise ValueError(f"arm {name}: {own!r:.100} is neither text with options nor a table with this text")
        if ages is not None and not isinstance(ages, list):
            raise ValueError(f"arm {name}: evaluate is not a list of ages")
        if fields:
            raise ValueError(f"arm {name}: unknown key {min(fields)}")
        _check_options(f"arm {name}", own)
        options = " ".join(filter(None, [known[parent].options if parent else "", own]))
        against = parent or next(iter(known), None)
        known[name] = Arm(options=options, against=against, evaluate=None if ages is None else tuple(ages))
        yield name, known[name]


def _check_step(ages: tuple[int, ...], label: str = "") -> None:
    """Raise ValueError, with the label, if a run with snapshots at these ages has too many of them."""
    step = math.gcd(*ages)
    if ages[-1] > MAX_SNAPSHOTS * step:
        raise ValueError(
            f"{label}evaluate = {[*ages]}: the interval of snapshots is {step} kimg, the greatest common divisor, "
            f"which leads to more than {MAX_SNAPSHOTS} of them; round the ages"
        )


def _check_options(name: str, options: str) -> None:
    """Raise ValueError if options cannot be split into words as in a shell, or set what the laboratory sets."""
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise ValueError(f"{name}: {options!r}: {error}") from None
    for word, following in itertools.pairwise([*words, ""]):
        flag, _, value = word.partition("=")
        flag = flag.replace("_", "-")
        field = (value or following).partition("=")[0] if flag == "--set" else ""
        if flag in RESERVED or RESERVED_FIELDS.fullmatch(field):
            raise ValueError(f"{name}: {field or flag} is set by the laboratory; omit it")
