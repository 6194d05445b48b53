"""Values of configuration fields on the command line: flags, --set, flags of earlier versions, the help."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import train
from dnnlib.cli import ConfigOption
from dnnlib.config import ConfigError, field_names, hints, is_config, override
from dnnlib.config_text import field_paths, parse_field, parse_texts
from training.config import PRESETS
from training.networks import DISCRIMINATORS, GENERATORS

ROOT = Path(__file__).parent.parent
FLAGS = set(
    re.findall(
        r"\S+",
        """
        outdir data cfg gpus device resume override desc seed dry-run forecast cond subset holdout mirror workers
        kimg tick snap metrics detector log keep-best batch batch-gpu glr dlr loss gamma pl-weight mixing
        ema-kimg freezed aug p target augpipe gen g_dict num_layers base depth minimum_head linformer z-dim
        map-depth disc d-arch cbase mbstd precision fp32 nhwc nobench allow-tf32 graphs compile 
        grad-checkpoint deterministic set version help
        """,
    )
)
OPTIONS = [option for option in train.main.params if isinstance(option, ConfigOption) and option.field]
FAMILIES: dict[str, dict[str, Any]] = {"generator": {**GENERATORS}, "discriminator": {**DISCRIMINATORS}}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(train.main, [str(argument) for argument in arguments])


def planned(data: Path, *arguments: str) -> Any:
    result = run("--outdir=x", f"--data={data}", "--cfg=tiny", "--device=cpu", "-n", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["options"]


def test_the_list_of_flags_is_complete() -> None:
    """New fields are set by --set; no flags are added."""
    options = train.main.get_params(click.Context(train.main))
    assert {next(flag for flag in option.opts if flag.startswith("--"))[2:] for option in options} == FLAGS


def test_presets_are_listed() -> None:
    assert set(train.PRESETS) == set(PRESETS)
    listed = run("--cfg=help")
    assert listed.exit_code == 0
    assert len(listed.output.splitlines()) == len(PRESETS)
    for name, summary in train.PRESETS.items():
        assert f"{name:22}{summary}" in listed.output
        assert len(summary.split()) <= 7
    unknown = run("--cfg=cifer")
    assert (unknown.exit_code, "did you mean cifar?" in unknown.output) == (2, True)


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys, train\n"
        "try: train.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'PIL', 'scipy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    headings = re.findall(r"^(\w+):$", done.stdout, re.MULTILINE)
    assert headings == [*train.OPTIONS]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_the_help_names_the_families_of_a_field(option: ConfigOption) -> None:
    part, _, name = (option.field or "").partition(".")
    if part not in FAMILIES or name == "family":
        return
    families = [family for family, config in FAMILIES[part].items() if name in field_names(config)]
    words = "all families" if len(families) == len(FAMILIES[part]) else ", ".join(families)
    assert f"({words})" in (option.help or "")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_the_help_names_all_choices(option: ConfigOption) -> None:
    """The help text is written by hand, so that --help does not load the configuration."""
    part, _, name = (option.field or "").partition(".")
    choices: tuple[str, ...] = ()
    for config in configs_with(option.field or ""):
        field = next(field for field in dataclasses.fields(config) if field.name == name or field.name == part)
        bounds = field.metadata.get("bounds")
        choices += (bounds.choices or ()) if bounds else ()
    if name == "family":
        choices = tuple(FAMILIES[part])
    for choice in choices:
        assert choice in (option.help or ""), choice


def configs_with(path: str) -> list[Any]:
    """Return the configurations, of all families, that hold a field."""
    part, _, name = path.partition(".")
    if not name:
        return [PRESETS["auto"]]
    families = FAMILIES.get(part, {"": type(getattr(PRESETS["auto"], part))})
    return [config for config in families.values() if name in field_names(config)]


def fields_of_presets() -> Iterator[tuple[type, Any, Any]]:
    """Yield (class, field, value) of all fields in all presets and families."""
    for preset in PRESETS.values():
        for family in GENERATORS:
            for other in DISCRIMINATORS:
                config = override(preset, {"generator.family": family, "discriminator.family": other})
                parts = [config, *(getattr(config, name) for name in field_names(config))]
                for part in filter(dataclasses.is_dataclass, parts):
                    for field in dataclasses.fields(part):
                        value = getattr(part, field.name)
                        if not is_config(value):
                            yield type(part), field, value


def as_text(value: Any, field: Any) -> str:
    """Return a value as text for the command line."""
    if value is None:
        return "auto" if field.metadata.get("auto") else "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_every_preset_value_round_trips_through_text() -> None:
    seen = set()
    for config, field, value in fields_of_presets():
        text = as_text(value, field)
        if field.name in ("base", "img_size") and value is not None:
            text = "x".join(map(str, value))
        assert parse_field(config, field, text) == value, (field.name, text)
        seen.add((config, field.name))
    assert len(seen) > 150


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        ({"generator.family": "transgan", "generator.window": "8"}, {"generator.window": 8}),
        ({"generator.base": "8x12"}, {"generator.base": (8, 12)}),
        ({"generator.base": "8"}, {"generator.base": (8, 8)}),
        ({"generator.widths": "64, 32"}, {"generator.widths": (64, 32)}),
        ({"run.batch_gpu": "auto"}, {"run.batch_gpu": "auto"}),
        ({"run.batch_gpu": "4"}, {"run.batch_gpu": 4}),
        ({"run.metrics": "none"}, {"run.metrics": ()}),
        ({"run.metrics": "auto"}, {"run.metrics": None}),
        ({"run.metrics": "swd,fid5k"}, {"run.metrics": ("swd", "fid5k")}),
        ({"g_optimizer.clip_norm": "none"}, {"g_optimizer.clip_norm": None}),
        ({"precision": "AUTO"}, {"precision": None}),
        ({"augment.mode": "none"}, {"augment.mode": "noaug"}),
        ({"loss.r1_gamma": "1e-2"}, {"loss.r1_gamma": 0.01}),
        ({"data.mirror": "on", "data.use_labels": "0"}, {"data.mirror": True, "data.use_labels": False}),
    ],
)
def test_texts_are_parsed_by_the_type_of_the_field(texts: dict[str, str], values: dict[str, Any]) -> None:
    parsed = parse_texts(PRESETS["auto"], texts)
    assert {path: parsed[path] for path in values} == values


@pytest.mark.parametrize(
    ("path", "text", "problem"),
    [
        ("generator.window", "8", "is not a setting of the family styleformer; supported by transgan"),
        ("generator.widhts", "8", "did you mean widths?"),
        ("generator.family", "transgn", "unknown family"),
        ("loss.r1_gama", "8", "did you mean loss.r1_gamma"),
        ("r1_gamma", "8", "did you mean loss.r1_gamma"),
        ("windw", "8", "did you mean generator.window"),
        ("run", "8", "did you mean run.total_kimg"),
        ("loss.objective.name", "8", "did you mean loss.objective"),
        ("quux", "8", "docs/configuration.md"),
        ("run.total_kimg", "long", "expected a number"),
        ("run.total_kimg", "nan", "expected a number"),
        ("run.total_kimg", "1e39", "expected a number"),
        ("run.num_gpus", "1.5", "expected a whole number"),
        ("seed", "9" * 19, "expected a whole number"),
        ("run.batch_gpu", "some", "expected a whole number, auto or none"),
        ("data.mirror", "maybe", "expected true or false"),
        ("generator.widths", "64,x", "expected a list such as 256,64,16"),
        ("precision", "fp23", "did you mean fp32?"),
        ("loss.r1_gamma", "none", ") or auto"),
        ("g_optimizer.clip_norm", "auto", "expected a number or none"),
    ],
)
def test_invalid_texts_are_refused(path: str, text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_texts(PRESETS["auto"], {path: text})
    assert caught.value.field == path
    assert problem in caught.value.problem


def test_set_reaches_every_field(shapes32_zip: Path) -> None:
    options = planned(shapes32_zip, "--set", "g_optimizer.beta2=0.9", "--set=augment.ada_interval=8", "--set", "seed=3")
    assert options["g_optimizer"]["beta2"] == 0.9
    assert options["augment"]["ada_interval"] == 8
    assert options["seed"] == 3
    options = planned(shapes32_zip, "--set=run.total_kimg=2", "--set=run.total_kimg=3")  # the last value wins
    assert options["run"]["total_kimg"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set=generator.window=8"], "--set generator.window=8: is not a setting of the family styleformer"),
        (["--set=seed"], "--set seed: give a value: --set seed=VALUE"),
        (["--set=run.total_kimg=3", "--kimg=2"], "--set run.total_kimg=3: --kimg sets it too: give one of the two"),
        (["--set=augment.ada_interval=0"], "--set augment.ada_interval=0: must be at least 1"),
        (["--kimg=x"], "--kimg=x: expected a number"),
        (["--loss=logstic"], "relativistic; did you mean logistic?"),
        (["--log=wandbx"], "did you mean wandb?"),
        (["--keep-last=5"], "--keep-last was removed: use --set run.keep_last=5"),
        (["--keep_last", "5"], "--keep_last was removed: use --set run.keep_last=5"),
        (["--ffn"], "--ffn was removed: use --set generator.ffn=true"),
        (["--clip=5"], "use --set g_optimizer.clip_norm=5 --set d_optimizer.clip_norm=5"),
        (["--kims=5"], "--kimg"),
    ],
)
def test_mistakes_are_refused_with_a_hint(shapes32_zip: Path, arguments: list[str], message: str) -> None:
    result = run("--outdir=x", f"--data={shapes32_zip}", "--cfg=tiny", "--device=cpu", "-n", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_removed_flags_name_fields() -> None:
    spelled = {flag for option in train.main.params for flag in option.opts}
    for flag, fields in train.REMOVED.items():
        assert flag not in spelled
        for path in fields.split():
            assert configs_with(path), path
            assert path in field_paths(PRESETS["auto"])


def test_no_page_or_message_names_a_removed_flag() -> None:
    """Exceptions are the texts about the removal; --heads and --window are flags of other programs too."""
    flags = [flag for flag in train.REMOVED if flag not in ("--heads", "--window", "--landmarks")]
    pattern = re.compile(rf"(?<![\w-])({'|'.join(flags)})(?![\w-])")
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.rglob("*.py")]
    skipped = {ROOT / "CHANGELOG.md", ROOT / "train.py", Path(__file__)}
    for file in files:
        if file not in skipped and ".venv" not in file.parts:
            assert not pattern.findall(file.read_text()), file


def test_hints_returns_the_field_types_of_a_class() -> None:
    assert hints(type(PRESETS["auto"]))["seed"] is int
