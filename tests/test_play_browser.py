"""The page of generate.py play in Chromium: controls, address, keyboard, layout."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PATIENCE
from exploration_helpers import MOVING, TRANSGAN, build, make_model, make_snapshot, model_of
from play_helpers import answer, page_of, player_of, served

from exploration.browser.player import Player
from exploration.model import Model, label_of
from training.networks.stylegan2 import StyleGAN2Config

READY = 'parts.every(part => part.next() < 0) && $("large").src && writing === null'


def run_in_browser(browser: str, player: Player, script: str, hash: str = "") -> Any:
    """Run a script on the loaded page and return the result; it can wait with `until(predicate)` and `settled()`."""
    probe = """<script>
      const until = async done => { while (!done()) await new Promise(go => setTimeout(go, 20)); };
      const settled = () => until(() => READY);
      const event = key => new KeyboardEvent("keydown", {key, bubbles: true});
      const press = (key, target = document.body) => target.dispatchEvent(event(key));
      (async () => {
        await settled();
        const found = await (async () => { SCRIPT })().catch(String);
        document.body.dataset.found = JSON.stringify(found ?? null);
      })();
    </script></body>"""
    page = player.page().replace("</body>", probe.replace("READY", READY).replace("SCRIPT", script))
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom")
    with pytest.MonkeyPatch.context() as patch, served(player) as port:
        patch.setattr(player, "page", lambda: page)
        command = [browser, *options, f"http://127.0.0.1:{port}/{hash}"]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    found = re.search(r'data-found="([^"]*)"', dom.stdout)
    assert found, dom.stdout[-2000:]
    return json.loads(html.unescape(found[1]))


def test_the_address_restores_the_page(chromium: str) -> None:
    player = player_of(make_model())
    script = """
        const shown = () => [$("caption").textContent, $("large").src, $("direction-2").value, $("trunc").value,
          state.view, location.hash, [...document.querySelectorAll("#styles input:checked")].map(box => box.value)];
        const before = shown();
        location.hash = "";
        await until(() => state.seed === "0");
        await settled();
        const reset = shown();
        location.hash = before[5];
        await until(() => state.seed === "5");
        await settled();
        return [before, reset, shown(), $("problem").textContent];"""
    hash = "#seed=5&trunc=0.7&view=mixing&styles=middle,fine&layers=coarse&edit=2:-1.5"
    before, reset, after, problem = run_in_browser(chromium, player, script, hash)
    (image,) = answer(player, "images?of=5&trunc=0.7&directions=sefa&layers=coarse&edit=2:-1.5")["images"]
    (first,) = answer(player, "images?of=0")["images"]
    assert before == after
    assert before[:5] == ["Seed 5, edited", image, "-1.5", "0.7", "mixing"]
    assert before[6] == ["middle", "fine"]
    assert reset[:6] == ["Seed 0", first, "0", "1", "images", ""]
    assert problem == ""


def test_tiles_sliders_and_keys_change_the_image(chromium: str) -> None:
    script = """
        const seen = [];
        const note = async () => { await settled(); seen.push([state.seed, state.first, state.edit, $("large").src]); };
        $("grid").children[3].click(); await note();
        press("ArrowRight"); await note();
        const slider = $("direction-1"); slider.value = 2.5; slider.oninput(); await note();
        press("0"); await note();
        press("]"); await note();
        press("r"); await note();
        const names = [...document.querySelectorAll("#grid span")].map(span => span.textContent);
        const current = document.querySelectorAll("[aria-current=true]").length;
        return [seen, cellCount, names, current, location.hash, state.seed];"""
    player = player_of(make_model())
    seen, count, names, current, hash, seed = run_in_browser(chromium, player, script)
    edits = "&directions=sefa&edit=1:2.5"
    expected = [answer(player, f"images?of={of}")["images"][0] for of in ("3", "4", f"4{edits}", "4", "4", seed)]
    assert [image for *_, image in seen] == expected
    assert [one[:3] for one in seen[:5]] == [
        ["3", "0", ""],
        ["4", "0", ""],
        ["4", "0", "1:2.5"],
        ["4", "0", ""],
        ["4", str(count), ""],
    ]
    assert names == [str(int(seed) + i) for i in range(count)]
    assert (current, f"seed={seed}" in hash) == (1, True)


def test_the_mixing_table_selects_a_mixture(chromium: str) -> None:
    script = """
        press("2");
        await settled();
        document.querySelectorAll("#styles input")[0].click();
        document.querySelectorAll("#styles input")[2].click();
        $("rows").value = "1,2"; $("rows").onchange();
        await settled();
        const rows = [...document.querySelectorAll("#table tr")].map(row => row.cells.length);
        $("table").rows[2].cells[4].firstChild.click();
        await settled();
        const current = document.querySelector("td [aria-current=true]");
        const found = [$("caption").textContent, $("large").src, current.title];
        document.querySelectorAll("#styles input")[2].click();
        await settled();
        const command = document.querySelector("[data-command=mixtures]").textContent;
        return [rows, found, $("caption").textContent, command, $("problem").textContent];"""
    player = player_of(make_model())
    rows, (caption, image, title), plain, command, problem = run_in_browser(chromium, player, script)
    assert rows == [7, 7, 7]
    assert (caption, title) == ("Seed 2, styles fine of seed 7", "2 with styles of 7")
    assert [image] == answer(player, "images?of=2&other=7&styles=fine")["images"]
    assert plain == "Seed 2"  # without styles, nothing is mixed
    assert "mix --network=n.pkl --rows=1-2 --cols=4-9 --styles=3-4 --outdir=out" in command
    assert problem.startswith("styles=: '' is not a style; choose from 0-4, all, coarse")


def test_a_morph_plays_and_is_exported(chromium: str) -> None:
    script = """
        const saved = [];
        download = (url, name) => saved.push(name);
        press("3");
        await settled();
        const first = $("frame").src, start = $("start").src, end = $("end").src;
        press(" ");
        await until(() => state.frame === "3");
        press(" ");
        const label = $("play").textContent;
        $("time").value = 6; $("time").oninput();
        const frame = $("frame").src;
        await exportVideo("gif");
        $("frames").value = 3; $("frames").onchange();
        await settled();
        $("grid").children[9].click();
        document.querySelector("[data-end=to]").click();
        await settled();
        const later = [films.images.length, $("end").src, $("exporting").textContent];
        return [[first === start, start, end, frame], label, saved, later];"""
    player = player_of(make_model())
    (is_first, start, end, frame), label, saved, later = run_in_browser(chromium, player, script)
    frames = answer(player, "morph?of=0,1&frames=24&start=0&count=25")["images"]
    assert (is_first, start, end, frame) == (True, frames[0], frames[24], frames[6])
    assert (label, saved) == ("Play", ["n-0-1.gif"])
    assert later == [4, answer(player, "morph?of=0,9&frames=3&start=3&count=1")["images"][0], ""]


def test_a_click_shows_the_attention_of_a_pixel(chromium: str) -> None:
    script = """
        const large = $("large"), box = large.getBoundingClientRect();
        large.onclick({clientX: box.left + box.width / 2, clientY: box.top + 1});
        press("ArrowDown", large);
        await settled();
        const maps = [...document.querySelectorAll("#maps img")].map(image => image.src);
        const hash = location.hash;
        $("hide").click();
        await settled();
        return [maps, hash, $("attention").hidden, location.hash];"""
    player = player_of(make_model())
    maps, hash, is_hidden, later = run_in_browser(chromium, player, script)
    assert maps == [one["image"] for one in answer(player, "attention?of=0&x=16&y=1")["maps"]]
    assert (hash, is_hidden, later) == ("#x=16&y=1", True, "")


def test_the_chooser_changes_the_snapshot(chromium: str, shapes_zip: Path, tmp_path: Path) -> None:
    for kimg, family in ((100, "styleformer"), (200, "stylegan2")):
        make_snapshot(tmp_path / f"network-snapshot-{kimg:06d}.pkl", shapes_zip, family)
    script = """
        const texts = () => ["name", "facts", "problem"].map(id => $(id).textContent.split(" ")[0]);
        const shown = () => [...texts(), $("large").src];
        const newest = shown();
        press(",");
        await settled();
        const older = shown();
        press(",");
        return [newest, older, $("older").disabled, $("network").options.length, location.hash];"""
    player = page_of(tmp_path)
    newest, older, is_oldest, count, hash = run_in_browser(chromium, player, script)
    for found, name, family in ((newest, "000200", "stylegan2"), (older, "000100", "styleformer")):
        file = f"network-snapshot-{name}.pkl"
        (image,) = answer(player, f"images?of=0&network={file}")["images"]
        assert found == [file, family, "", image]
    assert (is_oldest, count, hash) == (True, 2, "#network=network-snapshot-000100.pkl")


def test_controls_without_a_use_are_hidden(chromium: str) -> None:
    """TransGAN has one style, no noise and no labels."""
    script = """
        press("2");
        const ids = ["tab-mixing", "classes", "labels", "noises", "snapshots", "layered", "edits"];
        ids.push("rights", "downs", "rotations");
        return [state.view, ids.filter(id => $(id).hidden)];"""
    for hash in ("", "#view=mixing"):
        view, hidden = run_in_browser(chromium, player_of(model_of(TRANSGAN)), script, hash)
        assert view == "images"
    assert hidden == [
        *("tab-mixing", "classes", "labels", "noises", "snapshots", "layered"),
        *("rights", "downs", "rotations"),
    ]


def test_sliders_move_the_image(chromium: str) -> None:
    script = """
        const slide = (id, value) => { $(id).value = value; $(id).oninput(); };
        const seen = [];
        const note = async () => {
          await settled();
          const output = id => document.querySelector(`label[for=${id}] output`).textContent.replace("\\u2212", "-");
          const outputs = ["right", "down", "rotate"].map(output);
          seen.push([$("large").src, location.hash, $("caption").textContent, outputs]);
        };
        slide("right", 0.25); slide("down", -0.1); slide("rotate", 30); await note();
        const command = document.querySelector("[data-command=image]").textContent;
        press("ArrowRight", $("right"));
        $("rotate").ondblclick(); await note();
        for (const id of ["right", "down"]) $(id).ondblclick();
        await note();
        return [seen, command, state.seed, $("rights").hidden, $("rotations").hidden];"""
    player = player_of(model_of(MOVING["stylegan3-r"]))
    seen, command, seed, *hidden = run_in_browser(chromium, player, script)
    queries = ("&right=0.25&down=-0.1&rotate=30", "&right=0.25&down=-0.1", "")
    assert [image for image, *_ in seen] == [answer(player, f"images?of=0{query}")["images"][0] for query in queries]
    assert [found for _, *found in seen] == [
        ["#right=0.25&down=-0.1&rotate=30", "Seed 0, moved", ["+25.0 %", "-10.0 %", "+30°"]],
        ["#right=0.25&down=-0.1", "Seed 0, moved", ["+25.0 %", "-10.0 %", "0°"]],
        ["", "Seed 0", ["0 %", "0 %", "0°"]],
    ]
    assert "--translate=0.25,-0.1 --rotate=30 " in command
    assert (seed, hidden) == ("0", [False, False])
    script = """return [$("large").src, $("rights").hidden, $("rotations").hidden, $("problem").textContent];"""
    player = player_of(model_of(MOVING["styleformer-a"]))
    found = run_in_browser(chromium, player, script, "#right=0.25&rotate=30")
    assert found == [*answer(player, "images?of=0&right=0.25")["images"], False, True, ""]


def test_classes_and_labels_are_chosen(chromium: str) -> None:
    config = StyleGAN2Config(z_dim=16, w_dim=12, c_dim=3, resolutions=4, channel_base=64)
    model = Model(G=build(config), device=torch.device("cpu"), c=label_of(3, 0))
    script = """
        const [box, value] = facts.classes ? [$("class"), "2"] : [$("label"), "0,0,1"];
        box.value = value; box.onchange();
        await settled();
        return [$("large").src, $("classes").hidden, $("labels").hidden, location.hash];"""
    player = player_of(model, num_classes=3)
    (image,) = answer(player, "images?of=0&class=2")["images"]
    assert run_in_browser(chromium, player, script) == [image, False, True, "#class=2"]
    assert run_in_browser(chromium, player_of(model), script) == [image, True, False, "#label=0,0,1"]


def test_problems_are_shown_until_they_are_mended(chromium: str) -> None:
    script = """
        const found = [];
        const fill = async (id, value) => {
          $(id).value = value; $(id).onchange();
          await settled();
          found.push($("problem").textContent);
        };
        await fill("seed", "a cat"); await fill("seed", "1-3"); await fill("seed", "12");
        await fill("first", "x"); await fill("first", "7-9"); await fill("first", "4294967290");
        const names = [...$("grid").children].map(tile => tile.textContent);
        set({x: "99", y: "0"}); await settled();
        found.push($("problem").textContent);
        $("hide").click();
        found.push($("problem").textContent);
        press("3"); await settled();
        await fill("frames", "0"); await fill("frames", ""); set({frames: "1e9"}); await settled();
        found.push($("problem").textContent);
        await fill("frames", "3");
        return [found, names, $("caption").textContent];"""
    found, names, caption = run_in_browser(chromium, player_of(make_model()), script)
    frames = "must be a whole number from 1 to 240"
    assert found == [
        "of=a cat: 'a cat' is neither a seed nor a range such as 0-23",
        "of: choose one image, not 3",
        "",
        "of=x: 'x' is neither a seed nor a range such as 0-23",
        "of: choose one image, not 3",
        "",
        "x=99: must be a whole number from 0 to 31",
        "",
        f"frames=0: {frames}",
        f"frames=: {frames}",
        f"frames=1e9: {frames}",
        "",
    ]
    assert names == [str(2**32 - 6 + i) for i in range(6)]  # up to the last seed
    assert caption == "Seed 12"


def test_answers_of_earlier_settings_are_discarded(chromium: str) -> None:
    """The page is turned twice while images of the first page are on their way."""
    script = """
        const ask = fetch, seen = [];
        window.fetch = async address => {
          const response = await ask(address), tile = $("grid").firstChild;
          if (address.includes("of=100-")) set({first: 900});
          if (address.includes("of=900-")) seen.push(tile.textContent, tile.firstChild.src);
          return response;
        };
        $("grid").children[2].focus();
        set({first: 100});
        await settled();
        const [image, caption] = $("grid").firstChild.children;
        return [...seen, caption.textContent, image.src, document.activeElement.textContent];"""
    player = player_of(make_model())
    before, image, after, later, focused = run_in_browser(chromium, player, script)
    assert (before, [image]) == ("0", answer(player, "images?of=0")["images"])
    assert (after, [later]) == ("900", answer(player, "images?of=900")["images"])
    assert focused == "902"  # the focus stays in its place


def test_the_saved_image_is_that_of_the_settings(chromium: str) -> None:
    script = """
        const saved = [];
        download = (url, name) => saved.push([name, url]);
        press("ArrowRight"); press("s");  // before the next image has arrived
        await until(() => saved.length === 1);
        set({edit: "0:2", other: "9"}); press("s");
        await until(() => saved.length === 2);
        return saved;"""
    player = player_of(make_model())
    saved = run_in_browser(chromium, player, script)
    queries = ("of=1", "of=1&other=9&styles=coarse&directions=sefa&edit=0:2")
    images = [answer(player, f"images?{query}")["images"][0] for query in queries]
    assert saved == [["n-seed0001.png", images[0]], ["n-seed0001-9-edited.png", images[1]]]


def test_keys_work_while_a_slider_is_focused(chromium: str) -> None:
    script = """
        const slider = $("direction-1");
        slider.value = 2.5; slider.oninput();
        press("ArrowRight", slider); press("]", slider);
        const before = [state.seed, state.edit, state.first === String(cellCount)];
        press("0", slider);
        press("3", slider); press(" ", $("time"));
        const isPlaying = timer !== null;
        press("r", $("from"));
        return [before, state.edit, state.view, isPlaying, state.seed];"""
    before, edit, view, is_playing, seed = run_in_browser(chromium, player_of(make_model()), script)
    assert before == ["0", "1:2.5", True]
    assert (edit, view, is_playing, seed) == ("", "morph", True, "0")


@pytest.mark.parametrize("view", ["images", "mixing", "morph"])
def test_the_page_fits_a_phone_and_labels_its_controls(chromium: str, view: str) -> None:
    script = """
        document.documentElement.style.width = "390px";
        onresize();
        await settled();
        const tooWide = [...document.querySelectorAll("body *")].filter(box => {
          const isScrolled = box.closest(".wide > *, code > *");
          return !isScrolled && box.getClientRects().length && box.getBoundingClientRect().right > 391;
        });
        const controls = [...document.querySelectorAll("input, select, button")];
        const texts = one => one.ariaLabel || one.textContent.trim() || one.querySelector("img[alt]");
        const hasName = one => one.labels?.length || texts(one);
        const nameless = controls.filter(one => !hasName(one));
        return [tooWide.map(box => box.outerHTML.slice(0, 200)), nameless.map(one => one.outerHTML)];"""
    hash = f"#view={view}&seed=3&x=5&y=9&edit=0:1.5&right=-0.125&rotate=-100"
    for model in (make_model(), model_of(MOVING["stylegan3-r"])):
        assert run_in_browser(chromium, player_of(model), script, hash) == [[], []]
