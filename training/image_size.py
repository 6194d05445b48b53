"""Image sizes that the networks of a configuration support, and errors with alternatives for other sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dnnlib.config import ConfigError, field_names, override, path_prefix
from training.data_sources.sizes import Size, Sizes, build_command, candidate_sizes, crop_options
from training.networks import GENERATORS
from training.networks.generator import GeneratorConfig, Grid, base_grids

if TYPE_CHECKING:
    from training.config import TrainConfig

MIN_BASE, MAX_BASE = 4, 16  # tokens along a side of a suggested base grid
HANDOVERS = (32, 16, 8)


def fit(config: TrainConfig, height: int, width: int) -> TrainConfig:
    """Fill in the settings of both networks that depend on the image size. Raises ConfigError naming the field."""
    with path_prefix("generator"):
        config = replace(config, generator=config.generator.fit(height, width))
    with path_prefix("discriminator"):
        return replace(config, discriminator=config.discriminator.fit(height, width))


def fitting_sizes(config: TrainConfig, sizes: Sizes) -> Iterator[Size]:
    """Yield each (width, height) that both networks support for images of these sizes, best first."""
    fixed = config.generator.fixed_size
    height, width = base_of(config.generator) or (8, 8)
    candidates = [fixed[::-1]] if fixed else [*candidate_sizes(sizes, (width, height)), *config.generator.other_sizes]
    for size in candidates:
        if _fits(config, size[::-1]):
            yield size


def explain(
    error: ConfigError, config: TrainConfig, presets: Mapping[str, TrainConfig], grid: Grid, *, is_raw: bool
) -> ConfigError:
    """Return the error to raise instead of `error`, which `fit` raised for images of `grid` (height, width).

    If the cause is a setting that differs from the preset, the error is returned unchanged. Otherwise the preset does
    not fit the images: the new error names data.path and lists sizes and options that fit together.
    """
    part, _, name = error.field.partition(".")
    settings, given = getattr(config, part), _settings_of(presets[config.preset], config, part)
    base = {"base": settings.base} if base_of(settings) else {}
    if getattr(settings, name) != getattr(given, name) or _part_fits(replace(given, **base), grid):
        return error

    height, width = grid
    size = next(fitting_sizes(config, Counter([(width, height)])), None)
    remedies = [_rebuild(config.data.path, size, is_raw)] if size else []
    remedies += _other_options(config, presets, grid)
    remedies = remedies[::-1] if is_raw else remedies  # the long command is last
    networks = _describe_networks(part, config, presets)
    remedy = ", or ".join(remedies) or "choose another preset"
    return ConfigError("data.path", config.data.path, f"images of {width}x{height}, {networks}: {remedy}")


def _settings_of(preset: TrainConfig, config: TrainConfig, part: str) -> Any:
    """Return a preset's settings of a network, converted to the family used by `config`."""
    given, family = getattr(preset, part), type(getattr(config, part))
    return given if type(given) is family else family.convert_from(given)


def _describe_networks(part: str, config: TrainConfig, presets: Mapping[str, TrainConfig]) -> str:
    """Return the clause of the error message that names the unsuitable network and the options that select it."""
    generator, preset = config.generator, presets[config.preset]
    options = []
    if type(generator) is not type(preset.generator):
        options.append(f"--gen={_family(generator)}")
    base = base_of(generator)
    if base and base != base_of(_settings_of(preset, config, "generator")):
        options.append(f"--base={show_base(base)}")
    chosen = " with ".join(filter(None, [f"--cfg={config.preset}", " ".join(options)]))
    if part == "discriminator":
        return f"which the discriminator of {chosen} does not support"
    if generator.fixed_size:
        return "and {} is for {}x{}".format(chosen, *generator.fixed_size[::-1])
    reason = f" ({generator.supported_sizes})" if generator.supported_sizes else ""
    return f"which the generator of {chosen} does not support{reason}"


def _rebuild(path: str, size: Size, is_raw: bool) -> str:
    """Return advice on how to build a dataset of this size, with the full command for raw images."""
    if is_raw:
        return f"build a dataset of another size: {build_command(path, *crop_options(size))}"
    return f"rebuild the dataset with --width={size[0]} --height={size[1]}"


def _other_options(config: TrainConfig, presets: Mapping[str, TrainConfig], grid: Grid) -> list[str]:
    """Return advice on options with which a generator of the same family supports this size: at most one item."""
    preset, family = presets[config.preset], _family(config.generator)
    auto = override(presets["auto"], {"generator.family": family})
    if type(config.discriminator) is not type(preset.discriminator):  # keep a discriminator chosen by an option
        auto = replace(auto, discriminator=type(config.discriminator).convert_from(auto.discriminator))
    named = "--cfg=auto" + f" --gen={family}" * (type(auto.generator) is not type(presets["auto"].generator))
    if type(config.generator) is not type(preset.generator):
        named = "--cfg=auto"
    choices: list[tuple[str, TrainConfig, Mapping[str, Any]]] = []
    if config.generator.other_sizes:
        choices.append(("give --gen=stylegan2", config, {"generator.family": "stylegan2"}))
    if "handover" in field_names(config.generator):
        sides = [side for side in HANDOVERS if side < max(grid)]
        choices += [(f"give --set generator.handover={side}", config, {"generator.handover": side}) for side in sides]
    if base := base_of(config.generator):
        given, bases = base_of(_settings_of(preset, config, "generator")), small_bases(grid)
        if base != given:
            choices.append(("omit --base", config, {"generator.base": given}))
            auto = override(auto, {"generator.base": base})
        choices.append((f"give {named}", auto, {}))
        choices += [(f"give --base={show_base(base)}", config, {"generator.base": base}) for base in bases]
        choices += [(f"give {named} --base={show_base(base)}", auto, {"generator.base": base}) for base in bases]
    return [words for words, changed, values in choices if _fits(override(changed, values), grid)][:1]


def base_of(settings: Any) -> Grid | None:
    """Return the base grid from which a generator doubles its resolution; None for other networks."""
    return getattr(settings, "base", None)


def small_bases(grid: Grid) -> list[Grid]:
    """Return the base grids with sides of 4 to 16 tokens that double to images of this size, largest first."""
    return [base for base, _ in base_grids(*grid) if max(base) <= MAX_BASE and min(base) >= MIN_BASE]


def show_base(base: Grid) -> str:
    """Return a base grid in the format of --base: 8 or 8x12."""
    return str(base[0]) if base[0] == base[1] else "{}x{}".format(*base)


def _family(generator: GeneratorConfig) -> str:
    return next(name for name, family in GENERATORS.items() if family is type(generator))


def _fits(config: TrainConfig, grid: Grid) -> bool:
    return _part_fits(config.generator, grid) and _part_fits(config.discriminator, grid)


def _part_fits(settings: Any, grid: Grid) -> bool:
    try:
        settings.fit(*grid)
    except ConfigError:
        return False
    return True
