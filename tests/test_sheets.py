"""Sheets: the places of tiles, captions, titles and colour scales, the sizes of tiles, and heat maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torch_utils.sheets import (
    arranged,
    caption_of,
    captioned,
    labelled_grid,
    marked,
    overlay,
    sheet,
    tile_of,
    tiles_of,
    titled,
)


def filled(height: int, width: int, value: int = 200) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def ink(pixels: np.ndarray) -> np.ndarray:
    """Return where text is drawn, (H, W), on white and on tiles of 200."""
    return pixels.max(axis=2) < 150


@pytest.mark.parametrize(("height", "width"), [(96, 96), (96, 48), (40, 256)])
def test_columns_are_as_wide_as_their_captions(height: int, width: int) -> None:
    """Captions are centred above their tiles, do not touch, and have the same size, whatever their length."""
    tile = filled(height, width)
    drawn = sheet([[tile] * 3] * 2, ["x", "attention, rollout", "+0.5"])
    short = sheet([[tile] * 3] * 2, ["x", "x", "+0.5"])
    top, cell = drawn.shape[0] - 2 * height - 2, (drawn.shape[1] - 4) // 3
    assert drawn.shape[0] == short.shape[0]
    assert cell >= width
    for column in range(3):
        x = column * (cell + 2)
        (tiles,) = np.nonzero((drawn[top:, x : x + cell] == 200).all(axis=2).any(axis=0))
        assert (tiles[0], len(tiles)) == ((cell - width) // 2, width)
        (dark,) = np.nonzero(ink(drawn[:top, x : x + cell]).any(axis=0))
        assert abs((dark[0] + dark[-1] + 1) / 2 - cell / 2) <= 2
        assert min(dark[0], cell - dark[-1]) >= 2
    heights = [ink(pixels[:top, -width:]).any(axis=1).sum() for pixels in (drawn, short)]
    assert heights[0] == heights[1] >= 9


def test_row_captions_are_left_of_their_rows() -> None:
    drawn = sheet([[filled(96, 96)] * 2, [filled(96, 96)]], ["one", "two"], ["seed 0", "a longer caption"])
    height, width, _ = drawn.shape
    left, top = width - 2 * 96 - 2, height - 2 * 96 - 2
    assert (drawn[top + 98 :, left + 98 :] == 255).all()  # the missing tile
    for row, y in enumerate((top, top + 98)):
        assert (drawn[y : y + 96, left : left + 96] == 200).all()
        dark = np.argwhere(ink(drawn[y : y + 96, :left]))
        assert abs((dark[:, 0].min() + dark[:, 0].max()) / 2 - 48) < 6, row
        assert left - dark[:, 1].max() > 5
        assert dark[:, 1].min() > 3


def test_captions_and_tiles_that_do_not_fit_are_refused() -> None:
    tile = filled(9, 9)
    with pytest.raises(ValueError, match="a row has more tiles than the first"):
        sheet([[tile], [tile] * 2])
    for captions, row_captions, peaks in ((["a", "b"], [], []), ([], ["a", "b"], []), ([], [], [1.0, 2.0])):
        with pytest.raises(ValueError, match="zip"):
            sheet([[tile]], captions, row_captions, peaks=peaks)


def test_color_scales_run_from_0_to_the_peak_of_their_row() -> None:
    rows = [[filled(96, 96)] * 2] * 3
    plain = sheet(rows)
    drawn = sheet(rows, peaks=[None, 0.125, 30.0])
    assert np.array_equal(drawn[:, : plain.shape[1]], plain)
    scales = drawn[:, plain.shape[1] :]
    assert (scales[:98] == 255).all()
    bars = []
    for y in (98, 196):
        scale = scales[y : y + 96]
        is_bar = (scale != 255).any(axis=2).sum(axis=0) > 60
        bar = scale[:, is_bar][:, 0]
        bar = bar[(bar != 255).any(axis=1)]
        assert bar[0].tolist() == [int(0.35 * 128 + 0.65 * 255)] * 3  # the colours of `overlay` on gray
        assert bar[-1].tolist() == [int(0.35 * 128)] * 3
        (middle,) = np.nonzero(ink(scale[:, np.nonzero(is_bar)[0].max() + 1 :]).any(axis=1))
        assert (middle[0] < 20, middle[-1] > 76) == (True, True)  # a number at each end
        bars.append(bar)
    assert np.array_equal(*bars)
    assert not np.array_equal(scales[98:194], scales[196:])  # the numbers differ


def test_color_scales_of_flat_tiles_do_not_overlap() -> None:
    tile = filled(8, 96)
    drawn = sheet([[tile]] * 2, peaks=[0.5, 0.25])[:, 96:]
    (dark,) = np.nonzero(ink(drawn[:, 28:]).any(axis=1))
    assert len(np.flatnonzero(np.diff(dark) > 1)) == 3  # four separate numbers


def test_titles_are_above_images_and_never_cut() -> None:
    image = filled(5, 90, 100)
    drawn = titled(image, "a title that is wider than the image")
    assert drawn.shape[1] > 200
    assert (drawn[-5:, :90] == image).all()
    assert (drawn[-5:, 90:] == 255).all()
    assert (drawn[:-5, -1] == 255).all()
    table = sheet([[filled(96, 96)] * 3], ["a", "b", "c"], ["seed 0"])
    named = sheet([[filled(96, 96)] * 3], ["a", "b", "c"], ["seed 0"], title="Title")
    assert np.array_equal(named[-len(table) :], table)
    starts = [np.nonzero(ink(part).any(axis=0))[0][0] for part in (named[: -len(table)], table[-96:])]
    assert abs(starts[0] - starts[1]) <= 2  # aligned with the row captions


def test_captions_of_a_grid_have_one_width() -> None:
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    drawn = labelled_grid(images, ["0", "1", "seed 4294967295"], 2)
    cell, below = (drawn.shape[1] - 2) // 2, drawn.shape[0] // 2 + 1
    assert 96 < cell < 130
    for y, x in ((0, 0), (0, cell + 2), (below, 0)):
        tile = drawn[y : y + 96, x : x + cell]
        (dark,) = np.nonzero((tile == 0).all(axis=(0, 2)))
        assert (dark[0], len(dark)) == ((cell - 96) // 2, 96)
    assert (drawn[below:, cell + 2 :] == 255).all()
    assert np.array_equal(drawn[below:, :cell], captioned(filled(96, 96, 0), "seed 4294967295", 13))


@pytest.mark.parametrize(
    ("side", "columns", "expected"),
    [
        *((32, 6, 96), (48, 6, 96), (128, 6, 128), (256, 6, 256), (300, 6, 150), (1024, 6, 256)),
        *((1024, 41, 74), (32, 41, 64), (4, 33, 92), (1024, 10_000, 32)),
    ],
)
def test_tiles_are_legible_and_rows_at_most_3072_pixels(side: int, columns: int, expected: int) -> None:
    (tile,) = tiles_of(torch.zeros(1, 1, side, side // 2, dtype=torch.uint8), columns)
    assert tile.shape == (expected, expected // 2, 3)


def test_reduced_tiles_average_pixels() -> None:
    image = np.random.RandomState(0).randint(0, 256, (512, 768, 3)).astype(np.uint8)
    expected = image.reshape(128, 4, 192, 4, 3).mean(axis=(1, 3))
    assert np.abs(tile_of(image, max_side=192) - expected).max() <= 0.5
    assert np.array_equal(tile_of(image, max_side=768), image)


def test_captions_name_seeds() -> None:
    names = ["seed0004", "12", "proj00", "0-4", "seedling", "seed"]
    assert [caption_of(name) for name in names] == ["seed 4", "seed 12", "proj00", "0-4", "seedling", "seed"]


def test_images_are_arranged_at_their_own_size() -> None:
    small, wide = filled(10, 20, 0), filled(5, 90, 100)
    drawn = arranged([[small, small], [wide]])
    assert drawn.shape == (16 + 10 + 16 + 5 + 16, 16 + 90 + 16, 3)
    assert (drawn[16:26, 16:36] == 0).all()
    assert (drawn[16:26, 52:72] == 0).all()
    assert (drawn[42:47, 16:106] == 100).all()
    assert (drawn == 255).sum() == drawn.size - 2 * small.size - wide.size


def test_overlays_show_the_weights() -> None:
    image = filled(4, 4, 100)
    drawn = overlay(image, np.array([[0, 1], [0.5, -1]]))
    assert drawn[0, 0].tolist() == [35, 35, 35]  # the darkened image without an overlay
    assert drawn[1, 3].tolist() == [200, 200, 200]
    assert drawn[3, 0].tolist() == [200, int(35 + 0.65 * 127.5), 35]
    assert drawn[3, 3].tolist() == [35, 35, 35]
    halved = overlay(image, np.array([[0, 1], [0.5, -1]]), peak=2)
    assert np.array_equal(halved[1, 3], drawn[3, 0])  # half of the peak
    colored = overlay(np.tile(np.array([0, 0, 240], np.uint8), (4, 4, 1)), np.array([[0, 1]]))
    assert colored[0, 0].tolist() == [28, 28, 28]  # 0.35 of the mean of the channels


def test_overlays_keep_the_peaks_of_fine_maps() -> None:
    weights = np.zeros((12, 8))
    weights[7, 5], weights[0, 0] = 1.0, 0.5
    drawn = overlay(filled(3, 4, 0), weights)
    expected = np.zeros((3, 4), int)
    expected[1, 2], expected[0, 0] = 165, 165  # red saturates at a third of the peak
    assert np.array_equal(drawn[:, :, 0], expected)
    assert (drawn[1, 2] > 160).all()


@pytest.mark.parametrize(("side", "x", "y"), [(32, 7, 20), (1024, 500, 800)])
def test_marks_frame_the_pixel(side: int, x: int, y: int) -> None:
    tile = tile_of(filled(side, side), max_side=128)
    drawn = marked(tile, x, y, (side, side))
    cyan = np.argwhere((drawn == (0, 255, 255)).all(axis=2))
    (top, left), (bottom, right) = cyan.min(axis=0), cyan.max(axis=0)
    factor = len(tile) / side
    assert top + 2 <= y * factor < bottom - 1
    assert left + 2 <= x * factor < right - 1
    assert bottom - top == right - left == 6
    assert (drawn[top + 2 : bottom - 1, left + 2 : right - 1] == 200).all()
    assert (drawn[top - 1, left - 1 : right + 2] == 0).all()
