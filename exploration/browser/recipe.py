"""Description of an image of the browser page, and the command of generate.py that makes the same image."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from exploration.pose import Pose
from exploration.style_groups import format_ranges

Source = int | str  # a seed, or the name of saved styles
OUTDIR = "out"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that all images of a request share: snapshot, truncation, noise, class or label, if any, and pose.

    A morph leads to the pose.
    """

    network: str
    psi: float = 1.0
    noise_mode: str = "const"
    class_index: int | None = None
    label: tuple[float, ...] = ()
    pose: Pose = field(default_factory=Pose)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An edit by `strength` standard deviations along a direction; `name` is sefa, pca or a file.

    `layers` selects the styles that sefa and pca analyse and edit; a file has its own.
    """

    name: str
    layers: str
    index: int
    strength: float

    @property
    def direction(self) -> str:
        """Value of --direction."""
        layers = "" if self.layers == "all" else f"{self.layers}:"
        return f"{self.name}:{layers}{self.index}"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An image: a source, mixed with the `styles` of the seed `other`, then edited."""

    settings: Settings
    source: Source
    other: int | None = None
    styles: tuple[int, ...] = ()
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Morph:
    """A path between two sources in `frames` steps, and back in a loop; `interpolation` as in generate.py video."""

    settings: Settings
    ends: tuple[Source, Source]
    frames: int
    interpolation: str = "w"
    loop: bool = True


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """Writer of commands. `options` are those with which the page was started, such as --ema."""

    program: str = "python generate.py"
    options: tuple[str, ...] = ()
    projected_w: Path | None = None

    def image(self, network: str, recipe: Recipe) -> str:
        """Return the command for an image."""
        if recipe.other is not None:
            return self.mixtures(network, [recipe.source], [recipe.other], recipe)
        return self._line("", network, recipe.settings, self._sources("--seeds", [recipe.source]), _edits(recipe.edits))

    def mixtures(self, network: str, rows: Sequence[Source], cols: Sequence[int], recipe: Recipe) -> str:
        """Return the command for the mixtures of rows and columns with the styles and edits of a recipe."""
        given = [*self._sources("--rows", rows), f"--cols={join(cols)}", f"--styles={format_ranges(recipe.styles)}"]
        return self._line("mix", network, recipe.settings, given, _edits(recipe.edits))

    def attention(self, network: str, recipe: Recipe, x: int, y: int) -> str:
        """Return the command for attention maps, or "" for a mixed or edited image, for which there is none."""
        if recipe.other is not None or recipe.edits:
            return ""
        given = [*self._sources("--seeds", [recipe.source]), f"--query={x},{y}"]
        return self._line("attention", network, recipe.settings, given)

    def morph(self, network: str, morph: Morph, fps: int) -> str:
        """Return the command for a video, or "" if an end is a saved style: `video` uses all styles of a file."""
        if any(isinstance(end, str) for end in morph.ends):
            return ""
        first, last = morph.ends
        given = [f"--seeds={first},{last}", f"--interpolation={morph.interpolation}", f"--frames={morph.frames}"]
        given += [f"--fps={fps}", *([] if morph.loop else ["--loop=0"])]
        return self._line("video", network, morph.settings, given, output=f"--output={OUTDIR}/morph.mp4")

    def _sources(self, flag: str, sources: Sequence[Source]) -> list[str]:
        seeds = [source for source in sources if isinstance(source, int)]
        given = [f"--projected-w={self.projected_w}"] if len(seeds) < len(sources) else []
        return given + ([f"{flag}={join(seeds)}"] if seeds else [])

    def _line(
        self, command: str, network: str, settings: Settings, *parts: Sequence[str], output: str = f"--outdir={OUTDIR}"
    ) -> str:
        words = [f"--network={network}", *self.options, *_settings(settings)]
        words += [word for part in parts for word in part]
        return " ".join([self.program, *([command] if command else []), shlex.join([*words, output])])


def _settings(settings: Settings) -> list[str]:
    """Return the options of settings that differ from the defaults."""
    options = [f"--trunc={settings.psi:.12g}"] if settings.psi != 1 else []
    options += [f"--class={settings.class_index}"] if settings.class_index is not None else []
    options += [f"--label={','.join(f'{x:.12g}' for x in settings.label)}"] if settings.label else []
    options += [f"--noise-mode={settings.noise_mode}"] if settings.noise_mode != "const" else []
    return [*options, *settings.pose.flags]


def _edits(edits: Sequence[Edit]) -> list[str]:
    return [word for edit in edits for word in (f"--direction={edit.direction}", f"--strength={edit.strength:.12g}")]


def join(numbers: Sequence[int]) -> str:
    """Format numbers as ranges if they ascend, e.g. 0-3,7, and otherwise one by one."""
    return format_ranges(numbers) if all(a < b for a, b in pairwise(numbers)) else ",".join(map(str, numbers))
