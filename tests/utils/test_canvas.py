import numpy as np
import pytest

from utils.canvas import Canvas, Tile
from utils.errors import UserError


def tiles(rng, loaded):
    """Six overlapping random tiles, some of them outside of a canvas of 40 x 30; ``loaded`` notes their use."""
    found = []
    for number in range(6):
        width, height = (int(side) for side in rng.integers(4, 25, 2))
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        load = lambda image=image, number=number: (loaded.append(number), image)[1]  # noqa: E731
        found.append(Tile(load, width, height).at(*(int(place) for place in rng.integers(-15, 38, 2))))
    return found


def whole(canvas, margin):
    """The canvas with a margin of grey, pasted tile by tile, pixel by pixel."""
    image = np.full((canvas.height + 2 * margin, canvas.width + 2 * margin, 3), 114, np.uint8)
    for tile in canvas.tiles:
        pixels = tile.load()
        for y, x in np.ndindex(pixels.shape[:2]):
            if 0 <= tile.left + x < canvas.width and 0 <= tile.top + y < canvas.height:
                image[margin + tile.top + y, margin + tile.left + x] = pixels[y, x]
    return image


def test_any_part_equals_that_part_of_the_whole_canvas():
    rng = np.random.default_rng(0)
    for _ in range(20):
        loaded = []
        canvas = Canvas(tiles(rng, loaded), 40, 30)
        everything = whole(canvas, 20)
        for _ in range(20):
            left, top = (int(place) for place in rng.integers(-20, 30, 2))
            width, height = (int(side) for side in rng.integers(1, 20, 2))
            loaded.clear()
            part = canvas.draw(left, top, width, height)
            np.testing.assert_array_equal(part, everything[top + 20 : top + 20 + height, left + 20 : left + 20 + width])
            for number, tile in enumerate(canvas.tiles):
                across = min(tile.left + tile.width, left + width, 40) - max(tile.left, left, 0)
                down = min(tile.top + tile.height, top + height, 30) - max(tile.top, top, 0)
                assert loaded.count(number) == (across > 0 and down > 0)


def test_a_view_inside_of_one_tile_is_not_copied():
    image = np.zeros((10, 10, 3), np.uint8)
    assert np.shares_memory(Canvas.of(image).draw(2, 3, 4, 5), image)
    assert not np.shares_memory(Canvas.of(image).draw(2, 3, 9, 5), image)
    assert Canvas.of(image[:6]).shape == (6, 10)


def test_an_image_that_has_changed_its_size_is_refused():
    canvas = Canvas([Tile(lambda: np.zeros((10, 12, 3), np.uint8), 12, 11, name="a.jpg")], 20, 20)
    with pytest.raises(UserError, match=r"a.jpg: is 12x10 pixels .* 12x11 were expected"):
        canvas.draw(0, 0, 5, 5)
