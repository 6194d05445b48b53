"""generate.py play: images equal those of the commands it shows; invalid requests are answered with status 400."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exploration_helpers import (
    MOVING,
    TRANSGAN,
    build,
    decode_video,
    example_directions,
    make_model,
    make_snapshot,
    model_of,
    pixels,
    run,
    run_ok,
    save_untrained,
)
from play_helpers import answer, as_pixels, decoded, get, page_of, player_of, request_json, served

from exploration.attention_maps import attention_maps, record
from exploration.browser.networks import MAX_LOADED
from exploration.browser.player import Player
from exploration.browser.query import MAX_SEED
from exploration.browser.rendering import ImageCache
from exploration.browser.server import File
from exploration.directions import NUM_SAMPLES, factorise, sampled_w, save_directions
from exploration.mixing import mix
from exploration.model import Model, label_of, save_styles, seed_latents
from torch_utils.sheets import overlay, tile_of
from training.networks.generator import GeneratorConfig
from training.networks.stylegan2 import StyleGAN2Config

CONDITIONAL: GeneratorConfig = StyleGAN2Config(z_dim=16, w_dim=12, c_dim=3, resolutions=4, channel_base=64)


def shown(player: Player, path: str, **query: Any) -> Any:
    """Return the answer to a request."""
    return answer(player, f"{path}?" + "&".join(f"{name}={value}" for name, value in query.items()))


def test_images_equal_those_of_the_model() -> None:
    model = make_model(truncation_psi=0.7)
    ws = model.styles_of([4, 5, 6, 9])
    styles = model.G.style_groups["coarse"]
    plain, mixed = model.images(ws[:3]), model.images(mix(ws[:3], ws[3:], styles)[:, 0])
    with served(player_of(make_model())) as port:
        found = request_json(port, "images", of="4-6", trunc=0.7)["images"]
        also_mixed = request_json(port, "images", of="4-6", trunc=0.7, other=9, styles="coarse")["images"]
    for uris, images in ((found, plain), (also_mixed, mixed)):
        assert len(uris) == 3
        for uri, img in zip(uris, images, strict=True):
            assert np.array_equal(decoded(uri), as_pixels(img))
    assert not torch.equal(plain, mixed)


def test_edits_move_styles_along_directions() -> None:
    """Two edits of SeFa, and one along a direction of a file, equal w + sum of strength * sigma * direction."""
    model = make_model()
    ws = model.styles_of([3])
    coarse = model.G.style_groups["coarse"]
    sefa = factorise(model, coarse, 3, sampled_w(model, NUM_SAMPLES))
    file = example_directions()
    player = player_of(model, files={"d.npz": file})
    for found, layers, strengths in ((sefa, "coarse", {0: 2.0, 2: -1.5}), (file, "all", {1: 3.0})):
        moved = ws.clone()
        for index, strength in strengths.items():
            moved[:, list(found.styles)] += strength * found.sigmas[index] * found.directions[index]
        edit = ",".join(f"{index}:{strength}" for index, strength in strengths.items())
        name = "sefa" if found is sefa else "d.npz"
        (uri,) = shown(player, "images", of=3, directions=name, layers=layers, edit=edit)["images"]
        assert np.array_equal(decoded(uri), as_pixels(model.images(moved)[0]))


def test_the_cache_keeps_the_latest_images_within_its_size() -> None:
    cache, calls = ImageCache(4 * 10), []

    def make(missing: list[int]) -> torch.Tensor:
        calls.append(len(missing))
        return torch.zeros(len(missing), 10, dtype=torch.uint8)

    for keys in ("aabc", "abc", "bcd", "efg", "a", "abcdef", "f"):
        assert len(cache.get(keys, make)) == len(keys)
    assert calls == [3, 1, 3, 1, 3]  # "efg" drops "abc", "a" drops "d", and "abcdef" is larger than the cache
    assert list(cache.images) == ["c", "d", "e", "f"]
    assert cache.size == 40
    assert {img.untyped_storage().nbytes() for img in cache.images.values()} == {10}


def test_the_images_of_a_request_are_generated_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    player, render = player_of(make_model()), Model.images
    sizes: list[int] = []

    def counted(model: Model, ws: torch.Tensor, *transforms: torch.Tensor) -> torch.Tensor:
        sizes.append(len(ws))
        return render(model, ws, *transforms)

    monkeypatch.setattr(Model, "images", counted)
    for of, trunc in (("0-2", 1), ("0-2", 1), ("1-4", 1), ("1-4", 0.5)):
        shown(player, "images", of=of, trunc=trunc)
    shown(player, "mixtures", rows="0-1", cols="5-6", styles="fine")
    shown(player, "morph", of="0,5", frames=9, start=2, count=4)
    assert sizes == [3, 2, 4, 2, 4, 4]  # the rows 0 and 1 were cached


def test_the_request_selects_the_class_or_label() -> None:
    model = Model(G=build(CONDITIONAL), device=torch.device("cpu"), c=label_of(3, 2))
    expected = model.images(model.map(seed_latents([5], 16)))[0]
    classes, vectors = player_of(model, num_classes=3), player_of(model)
    for player, query in ((classes, {"class": 2}), (vectors, {"label": "0,0,1"}), (vectors, {})):
        assert np.array_equal(decoded(shown(player, "images", of=5, **query)["images"][0]), as_pixels(expected))
    with served(classes) as port:
        for path in ("images?of=5", "images?of=5&class=3", "images?of=5&class=2&label=0,0,1"):
            assert get(port, f"/{path}")[0] == 400
        status, body = get(port, "/attention?of=5&class=1&x=0&y=0")
    assert (status, b"has no self-attention" in body) == (400, True)


def test_attention_maps_equal_those_of_the_command() -> None:
    model, size = make_model(), (32, 32)
    records, _ = record(model, model.styles_of([3]))
    computed = attention_maps(records, 0, torch.tensor([[7, 20]]), size)
    player = player_of(model)
    position, *found = shown(player, "attention", of=3, x=7, y=20)["maps"]
    moved = shown(player, "attention", of=4, x=7, y=20)["maps"]
    sheet = tile_of(decoded(shown(player, "images", of=3)["images"][0]))
    assert [one["title"] for one in found] == [*computed.titles().values()]
    for one, maps in zip(found, computed.maps.values(), strict=True):
        assert np.array_equal(decoded(one["image"]), overlay(sheet, maps.mean(axis=0)[0]))
    assert tuple(decoded(position["image"])[20 * 3 - 2, 7 * 3]) == (0, 255, 255)
    assert moved[1] != found[0]


@pytest.fixture
def with_files(shapes_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder, also the current one, with a snapshot, saved styles and directions."""
    monkeypatch.chdir(tmp_path)
    save_styles(tmp_path / "w.npz", make_model().styles_of([20, 21]))
    save_directions(tmp_path / "d.npz", example_directions())
    return make_snapshot(tmp_path / "my network.pkl", shapes_zip)


def run_shown(command: str) -> None:
    """Run a command of the page."""
    words = shlex.split(command)
    assert words[:2] == ["python", "generate.py"]
    run_ok(words[2], *words[3:])


REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({"of": 7}, "seed0007"),
    "truncated": ({"of": 7, "trunc": 0.35, "noise": "none"}, "seed0007"),
    "edited": ({"of": 7, "directions": "pca", "edit": "1:-1.3,4:2.75"}, "seed0007"),
    "edited by layers": ({"of": 7, "trunc": 0.5, "directions": "sefa", "layers": "fine", "edit": "0:4"}, "seed0007"),
    "edited by file": ({"of": 7, "directions": "d.npz", "edit": "2:-3.1"}, "seed0007"),
    "mixed": ({"of": 3, "other": 9, "styles": "coarse,4"}, "3-9"),
    "mixed and edited": ({"of": 3, "other": 9, "styles": "middle", "directions": "sefa", "edit": "0:5"}, "3-9"),
    "saved": ({"of": "proj01", "noise": "none"}, "proj01"),
    "saved and edited": ({"of": "proj01", "directions": "sefa", "layers": "coarse", "edit": "5:2"}, "proj01"),
    "saved and mixed": ({"of": "proj01", "other": 9, "styles": "fine"}, "proj01-9"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_shown_command_makes_the_same_image(name: str, with_files: Path) -> None:
    player = page_of(with_files, projected_w=Path("w.npz"), directions=(Path("d.npz"),))
    query, file = REQUESTS[name]
    found = shown(player, "images", **query)
    run_shown(found["command"])
    plain = decoded(shown(player, "images", of=query["of"])["images"][0])
    made = pixels(Path("out") / f"{file}.png")
    assert np.abs(made.astype(int) - decoded(found["images"][0])).max() <= 1
    assert (name == "plain") == np.array_equal(plain, made)


MOVED: dict[str, tuple[str, dict[str, Any], str]] = {
    "shifted": ("styleformer-f", {"of": 7, "right": 0.25, "down": -0.125, "noise": "none"}, "seed0007"),
    "rotated": ("stylegan3-r", {"of": 7, "rotate": -35}, "seed0007"),
    "edited": ("stylegan3-r", {"of": 7, "right": -0.3, "rotate": 90, "directions": "pca", "edit": "1:2"}, "seed0007"),
    "mixed": ("styleformer-a", {"of": 3, "other": 9, "styles": "coarse", "down": 0.5, "trunc": 0.5}, "3-9"),
}


@pytest.mark.parametrize("name", MOVED)
def test_the_shown_command_moves_the_image(name: str, shapes_zip: Path, tmp_path: Path) -> None:
    family, query, file = MOVED[name]
    player = page_of(save_untrained(tmp_path / "n.pkl", shapes_zip, MOVING[family]))
    assert (player.facts["shifts"], player.facts["rotates"]) == (True, family == "stylegan3-r")
    still = {key: value for key, value in query.items() if key not in ("right", "down", "rotate")}
    found, before = shown(player, "image", **query), shown(player, "image", **still)
    run_shown(found["command"].replace("--outdir=out", f"--outdir={tmp_path}"))
    made = pixels(tmp_path / f"{file}.png").astype(int)
    assert np.abs(made - decoded(found["images"][0])).max() <= 1
    assert np.abs(made - decoded(before["images"][0])).max() > 1
    assert shown(player, "image", **still)["command"] == before["command"]
    assert "--translate" not in before["command"]


def test_the_shown_commands_move_tables_maps_and_morphs(shapes_zip: Path, tmp_path: Path) -> None:
    player = page_of(save_untrained(tmp_path / "n.pkl", shapes_zip, MOVING["styleformer-a"]))
    out, pose = ("--outdir=out", f"--outdir={tmp_path}"), {"right": 0.2, "down": 0.1}
    found = shown(player, "mixtures", rows="1", cols="5", styles="fine", **pose)
    run_shown(found["command"].replace(*out))
    assert np.array_equal(decoded(found["mixtures"][0][0]), pixels(tmp_path / "1-5.png"))
    found = shown(player, "attention", of=6, x=9, y=4, **pose)
    run_shown(found["command"].replace(*out))
    (image,) = shown(player, "image", of=6, **pose)["images"]
    with np.load(tmp_path / "seed0006-attention.npz") as file:
        maps = [file[name].mean(axis=0)[0] for name in file.files if name.startswith("map_")]
    for weights, one in zip(maps, found["maps"][1:], strict=True):
        difference = decoded(one["image"]).astype(int) - overlay(tile_of(decoded(image)), weights)
        assert np.abs(difference).max() <= 2
    for loop in (0, 1):
        query: dict[str, Any] = {"of": "3,9", "frames": 4, "fps": 10, "loop": loop, **pose}
        found = shown(player, "morph", **query, start=0, count=5)
        gif = shown(player, "video", **query, format="gif")
        run_shown(found["command"].replace("out/morph.mp4", f"{tmp_path}/m.gif"))
        assert gif.content == (tmp_path / "m.gif").read_bytes()
        first, last = (decoded(found["images"][i]).astype(int) for i in (0, 4))
        assert np.abs(first - decoded(shown(player, "image", of=3)["images"][0])).max() <= 1
        assert np.abs(last - decoded(shown(player, "image", of=9, **pose)["images"][0])).max() <= 1


def test_the_command_of_a_conditional_network_has_its_class(shapes_zip: Path, tmp_path: Path) -> None:
    network = make_snapshot(tmp_path / "n.pkl", shapes_zip, "stylegan2", c_dim=3)
    for options, query in (({}, {"class": 2}), ({"label": (0.1, 0.0, 1.0)}, {}), ({}, {"class": 1, "trunc": 0.5})):
        player = page_of(network, **options)
        found = shown(player, "images", of=4, **query)
        assert player.facts["label"] == options.get("label", [])
        assert ("--label=0.1,0,1 " in found["command"]) == ("label" in options)
        run_shown(found["command"].replace("--outdir=out", f"--outdir={tmp_path}"))
        assert np.array_equal(pixels(tmp_path / "seed0004.png"), decoded(found["images"][0]))


def test_the_mixing_table_equals_that_of_its_command(with_files: Path) -> None:
    player = page_of(with_files, projected_w=Path("w.npz"))
    found = shown(player, "mixtures", rows="proj00,proj01,2", cols="8,5", styles="middle", trunc=0.6)
    run_shown(found["command"])
    assert [row["source"] for row in found["rows"]] == ["proj00", "proj01", 2]
    assert [col["source"] for col in found["cols"]] == [8, 5]
    for row, line in zip(found["rows"], found["mixtures"], strict=True):
        for col, uri in zip(found["cols"], line, strict=True):
            assert np.array_equal(decoded(uri), pixels(Path("out") / f"{row['source']}-{col['source']}.png"))
    for one in (*found["rows"], *found["cols"]):
        (alone,) = shown(player, "images", of=one["source"], trunc=0.6)["images"]
        assert one["image"] == alone


@pytest.mark.parametrize("interpolation", ["w", "z", "spline"])
@pytest.mark.parametrize("loop", [0, 1])
def test_a_morph_equals_the_video_of_its_command(interpolation: str, loop: int, with_files: Path) -> None:
    player = page_of(with_files)
    query: dict[str, Any] = {"of": "3,9", "frames": 5, "fps": 10, "interpolation": interpolation, "loop": loop}
    query |= {"trunc": 0.8}
    parts = [shown(player, "morph", **query, start=start, count=3) for start in (0, 3)]
    frames = [decoded(uri) for part in parts for uri in part["images"]]
    run_shown(parts[0]["command"].replace("morph.mp4", "morph.gif"))
    gif = shown(player, "video", **query, format="gif")
    assert isinstance(gif, File)
    assert (gif.content, gif.media_type) == (Path("out/morph.gif").read_bytes(), "image/gif")
    moving, fps = decode_video(Path("out/morph.gif"))
    assert (len(moving), fps) == (10 if loop else 6, 10)
    for frame, image in zip(frames, moving, strict=False):
        assert np.abs(image[::4, ::4].astype(float) - frame).mean() < 8  # a GIF has 256 colours
    ends = [decoded(shown(player, "images", of=seed, trunc=0.8)["images"][0]) for seed in (3, 9)]
    assert np.array_equal(frames[0], ends[0])
    assert np.abs(frames[5].astype(int) - ends[1]).max() <= 1


def test_a_morph_is_exported_as_mp4(with_files: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    player = page_of(with_files, projected_w=Path("w.npz"))
    query = {"of": "3,9", "frames": 4, "fps": 8}
    run_shown(shown(player, "morph", **query, start=0, count=1)["command"])
    assert shown(player, "video", **query, format="mp4").content == Path("out/morph.mp4").read_bytes()
    saved = shown(player, "morph", of="proj00,9", frames=4, start=0, count=5)
    (first,) = shown(player, "images", of="proj00")["images"]
    assert (saved["images"][0], saved["command"]) == (first, "")  # `video` would show all styles of the file


def test_the_attention_command_draws_the_same_maps(with_files: Path) -> None:
    player = page_of(with_files)
    found = shown(player, "attention", of=6, x=9, y=4)
    run_shown(found["command"])
    with np.load("out/seed0006-attention.npz") as file:
        assert file["queries"].tolist() == [[9, 4]]
    edited = shown(player, "attention", of=6, x=9, y=4, directions="sefa", edit="0:3")
    assert edited["command"] == ""
    assert edited["maps"] != found["maps"]


def test_the_snapshots_of_a_run_are_loaded_when_chosen(shapes_zip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    names = [f"network-snapshot-{kimg:06d}.pkl" for kimg in (100, 20, 3, 4)]
    for name in (*names, "network-best-swd.pkl"):
        make_snapshot(folder / name, shapes_zip, z_dim=16 + len(name) % 2)
    player = page_of(folder)
    assert player.networks.names == [*sorted(names), "network-best-swd.pkl"]
    assert player.networks.default == "network-snapshot-000100.pkl"
    before = shown(player, "images", of=1)["images"]
    make_snapshot(folder / "network-snapshot-000200.pkl", shapes_zip)
    player.page()  # finds the new snapshot
    assert player.networks.names == [*sorted(names), "network-snapshot-000200.pkl", "network-best-swd.pkl"]
    assert player.networks.default == "network-snapshot-000100.pkl"
    for name in names:
        assert shown(player, "network", network=name)["path"] == str(folder / name)
        assert f"--network={folder / name}" in shown(player, "images", of=1, network=name)["command"]
        assert len(player.networks.loaded) <= MAX_LOADED
    assert shown(player, "images", of=1)["images"] == before
    (folder / names[1]).write_bytes(b"nonsense")
    with served(page_of(folder)) as port:
        status, body = get(port, f"/network?network={names[1]}")
        assert (status, names[1] in json.loads(body)["error"]) == (400, True)
        assert get(port, "/images?of=0")[0] == 200
        for name in ("../n.pkl", str(folder / names[0]), "network-snapshot-000999.pkl"):
            assert get(port, f"/images?of=0&network={name}")[0] == 400


@pytest.mark.parametrize("channels", [1, 4])
def test_a_single_image_has_the_channels_of_its_file(channels: int, with_files: Path, shapes_zip: Path) -> None:
    player = page_of(make_snapshot(Path("other.pkl"), shapes_zip, img_channels=channels))
    found = shown(player, "image", of=7, trunc=0.5)
    run_shown(found["command"])
    made = pixels(Path("out/seed0007.png"))
    assert made.shape == ((32, 32) if channels == 1 else (32, 32, 4))
    assert np.array_equal(decoded(found["images"][0]), made)
    assert decoded(shown(player, "images", of="7,8")["images"][0]).shape == (32, 32, 3)


def test_the_page_opens_when_its_first_network_is_gone(shapes_zip: Path, tmp_path: Path) -> None:
    names = [f"network-snapshot-00000{kimg}.pkl" for kimg in range(MAX_LOADED + 1)]
    for name in names:
        make_snapshot(tmp_path / name, shapes_zip)
    player = page_of(tmp_path)
    before = player.page()
    for name in names[:-1]:
        shown(player, "network", network=name)
    (tmp_path / names[-1]).unlink()
    with served(player) as port:
        status, page = get(port, "/")
        assert (status, page.decode()) == (200, before)
        status, body = get(port, "/image?of=0")
        assert (status, names[-1] in json.loads(body)["error"]) == (400, True)
        assert get(port, f"/image?of=0&network={names[0]}")[0] == 200


def test_large_images_are_thumbnails_in_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exploration.browser.rendering.MAX_TILE", 16)
    model = make_model()
    player = player_of(model)
    full = decoded(shown(player, "images", of=2)["images"][0])
    small = decoded(shown(player, "images", of="2,3")["images"][0])
    assert (full.shape, small.shape) == ((32, 32, 3), (16, 16, 3))
    assert np.abs(full.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3)) - small).max() <= 1


NONSENSE = {
    "images": "of: is missing",
    "images?of": "malformed query: bad query field",
    "images?of=": "of=: '' is neither a seed nor a range such as 0-23",
    "images?of=-1": "of=-1: '-1' is neither a seed",
    "images?of=1.5": "of=1.5: '1.5' is neither a seed",
    "images?of=%D9%A3": "of=٣: '٣' is neither a seed",
    "images?of=%ff": "malformed query: 'utf-8' codec",
    "images?of=" + "9" * 5000: "99' is neither a seed",
    f"images?of={MAX_SEED + 1}": f"of={MAX_SEED + 1}: must be a whole number from 0 to {MAX_SEED}",
    "images?of=0-64": "of=0-64: has more than 64 images",
    "images?of=0-63,64": "of=0-63,64: has more than 64 images",
    f"images?of=0-{MAX_SEED}": "has more than 64 images",
    "images?of=5-2": "of=5-2: the range 5-2 runs backwards",
    "images?of=proj00": "of=proj00: 'proj00' is neither a seed",
    "images?of=0&of=1": "the query repeats a parameter",
    "images?of=0&trunc=nan": "trunc=nan: must be a number from -2 to 2",
    "images?of=0&trunc=1e9": "trunc=1e9: must be a number",
    "images?of=0&trunc=__import__": "trunc=__import__: must be a number",
    "images?of=0&class=0": "class=0: this network has no classes to choose from",
    "images?of=0&label=1": "label=1: this network has no label vectors to choose from",
    "images?of=0&right=0.1": "right=0.1: this network has no Fourier features at its input",
    "images?of=0&down=0": "down=0: this network has no Fourier features at its input",
    "images?of=0&rotate=9": "rotate=9: this network is not equivariant to rotation",
    "images?of=0&noise=random": "noise=random: choose from const, none",
    "images?of=0&network=x": "network=x: choose from n.pkl",
    "images?of=0&other=1": "other, styles: give both or neither",
    "images?of=0&styles=all": "other, styles: give both or neither",
    "images?of=0&other=1&styles=conv": "styles=conv: 'conv' is not a style; choose from 0-4",
    "images?of=0&other=1&styles=" + "9" * 5000: "99' is not a style",
    "images?of=0&other=1&styles=..%2f..%2fetc": "'../../etc' is not a style",
    "images?of=0&edit=0:1": "directions: is missing",
    "images?of=0&directions=sefa&edit=0": "edit=: must be a number from -20 to 20",
    "images?of=0&directions=sefa&edit=8:1": "edit=8: must be a whole number from 0 to 7",
    "images?of=0&directions=sefa&edit=0:inf": "edit=inf: must be a number",
    "images?of=0&directions=%2fetc%2fpasswd&edit=0:1": "directions=/etc/passwd: choose from sefa, pca",
    "images?of=0&directions=sefa&layers=conv&edit=0:1": "layers=conv: 'conv' is not a style",
    "images?of=0&x=3": "x: unknown parameter",
    "images?" + "&".join(f"a{i}=1" for i in range(50)): "malformed query: Max number of fields exceeded",
    "mixtures?rows=0-8&cols=0-7&styles=all": "rows, cols: 9 x 8 mixtures are more than 64",
    "mixtures?rows=0&cols=proj00&styles=all": "cols=proj00: 'proj00' is neither a seed",
    "image?of=0-1": "of: choose one image, not 2",
    "attention?of=0": "x: is missing",
    "attention?of=0&x=32&y=0": "x=32: must be a whole number from 0 to 31",
    "attention?of=0&x=0&y=-1": "y=-1: must be a whole number",
    "attention?of=0-1&x=0&y=0": "of: attention maps need a single image",
    "morph?of=0&frames=3&start=0&count=1": "of: a morph has two ends, not 1",
    "morph?of=0-1&frames=0&start=0&count=1": "frames=0: must be a whole number from 1 to 240",
    "morph?of=0-1&frames=3&start=4&count=1": "start=4: must be a whole number from 0 to 3",
    "morph?of=0-1&frames=3&start=2&count=3": "count=3: must be a whole number from 1 to 2",
    "video?of=0-1&frames=3&format=exe": "format=exe: choose from mp4, gif",
    "video?of=0-1&frames=3&format=gif&fps=60": "fps=60: must be a whole number from 1 to 50",
    "network": "network: is missing",
}


def test_invalid_requests_are_answered_with_400() -> None:
    player = player_of(make_model())
    with served(player) as port:
        for query, message in NONSENSE.items():
            status, body = get(port, f"/{query}")
            assert status == 400, query
            assert message in json.loads(body)["error"], query
        assert get(port, "http://[", Host="localhost") == (400, b'{"error": "malformed URL"}')
        assert not player.renderer.cache.images
        for path in ("images/", "../images", "favicon.ico", "exploration/play.py", "page.js", "page.css"):
            assert get(port, f"/{path}")[0] == 404
        assert get(port, "/", Host="elsewhere.example:80")[0] == 403
        assert get(port, "/", Host=f"localhost:{port}")[0] == 200


def test_invalid_poses_are_answered_with_400() -> None:
    for family, query, message in (
        ("styleformer-a", "rotate=9", "rotate=9: this network is not equivariant to rotation"),
        ("stylegan3-t", "right=0.6", "right=0.6: must be a number from -0.5 to 0.5"),
        ("stylegan3-r", "down=nan", "down=nan: must be a number from -0.5 to 0.5"),
        ("stylegan3-r", "rotate=181", "rotate=181: must be a number from -180 to 180"),
    ):
        with served(player_of(model_of(MOVING[family]))) as port:
            status, body = get(port, f"/images?of=0&{query}")
        assert (status, json.loads(body)["error"]) == (400, message)


def test_the_page_describes_its_network(with_files: Path) -> None:
    thirds = {"coarse", "middle", "fine"}
    for model, groups, has_attention, methods in (
        (make_model("styleformer-c"), thirds | {"transformer", "conv"}, True, ["sefa", "pca"]),
        (make_model("stylegan2"), thirds, False, ["sefa", "pca"]),
        (model_of(TRANSGAN), set(), True, ["sefa", "pca"]),
    ):
        page = player_of(model).page()
        facts = json.loads(re.search(r"START = (\{.*?\});", page)[1])["facts"]  # type: ignore[index]
        assert facts["attention"] is has_attention
        assert set(facts["groups"]) == groups
        assert [found["name"] for found in facts["directions"]] == methods
        assert facts["parameters"] == sum(x.numel() for x in model.G.parameters())
        assert not re.search(r"(src|href)=.?https?:", page)
        assert "__START__" not in page
        assert "/*" not in page
    facts = (
        page_of(with_files, projected_w=Path("w.npz"), directions=(Path("d.npz"),))
        .networks.open(with_files.name)
        .facts()
    )
    assert (facts["family"], facts["kimg"], facts["noise"]) == ("styleformer", 0, True)
    assert facts["saved"] == ["proj00", "proj01"]
    assert facts["directions"][2] == {"name": "d.npz", "title": "d.npz", "count": 3, "on": "1-2"}


def test_files_that_do_not_fit_get_one_message(with_files: Path, shapes_zip: Path) -> None:
    other = make_snapshot(Path("other.pkl"), shapes_zip, w_dim=8)
    Path("empty").mkdir()
    for arguments, message in [
        ([f"--network={other}", "--projected-w=w.npz"], "w has shape (2, 5, 12), this network needs (n, 5, 8)"),
        ([f"--network={other}", "--directions=d.npz"], "--directions=d.npz: holds directions (3, 12)"),
        ([f"--network={other}", "--directions=none.npz"], "--directions=none.npz: cannot be read"),
        (["--network=empty"], "--network=empty: neither a run (network-snapshot-*.pkl) nor a snapshot"),
        (["--network=none.pkl"], "none.pkl"),
    ]:
        result = run("play", *arguments, "--port=0")
        assert (result.exit_code, message in result.output) == (2, True), result.output
        assert result.output.count("\n") == 1
