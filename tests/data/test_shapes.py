import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from data.shapes import CLASSES, STAMP_FILE, VERSION, Drawing, draw_image, draw_mask, draw_shapes, visible_boxes
from utils.errors import UserError
from utils.images import read_image
from utils.labels import read_labelled_images

SMALL = Drawing(train_images=6, val_images=3, image_size=96)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "category, area",
    [
        ("ring", math.pi * (1 - 0.55**2)),
        ("triangle", 3 * math.sqrt(3) / 4),
        ("square", 2.0),
        ("star", 10 * 0.42 * math.sin(math.pi / 5) / 2),
    ],
)
def test_masks_have_the_area_of_their_shape(category, area):
    for diameter, squeeze, angle in ((60.0, 1.0, 0.3), (40.0, 0.8, 1.7), (12.0, 0.9, 4.0)):
        mask = draw_mask(category, diameter, squeeze, angle, np.array([0.3, -0.4]))
        expected = area * squeeze * (diameter / 2) ** 2
        # Filled polygons take in their border pixels, an eighth of a pixel all around.
        assert mask.sum() == pytest.approx(expected, rel=0.04 + 1.6 / diameter)
        assert mask[0].max() == mask[-1].max() == mask[:, 0].max() == mask[:, -1].max() == 0
        rows, columns = np.indices(mask.shape)
        if category != "triangle":  # the others are symmetric around their centre, or nearly
            centre = [(grid * mask).sum() / mask.sum() + 0.5 - len(mask) / 2 for grid in (columns, rows)]
            assert centre == pytest.approx([0.3, -0.4], abs=0.2)


def test_visible_boxes_equal_a_search():
    owner = np.random.default_rng(0).integers(-1, 3, (20, 30)).astype(np.int16)
    owner[:4] = owner[:, 25:] = -1
    owner[owner == 1] = -1
    owner[7:9, 11] = 1
    for number, box in enumerate(visible_boxes(owner, 3)):
        places = [(x, y) for y in range(20) for x in range(30) if owner[y, x] == number]
        xs, ys = zip(*places, strict=True)
        assert box.tolist() == [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


def test_images_keep_the_promises_of_their_constants():
    drawing = Drawing()
    counts, sides = [], []
    for seed in range(40):
        image, rows = draw_image(np.random.default_rng(seed), drawing)
        assert image.shape == (drawing.image_size, drawing.image_size, 3)
        assert image.dtype == np.uint8
        assert rows[:, 1:].min() >= 0
        assert rows[:, 1:].max() <= drawing.image_size
        size = rows[:, 3:] - rows[:, 1:3]
        assert size.min() >= drawing.minimum_box
        assert size.max() <= drawing.diameter[1] + 2
        counts.append(len(rows))
        sides.extend(size.max(1))
        for box in rows[:, 1:]:  # something stands out from what lies around it
            left, top, right, bottom = box
            assert image[top:bottom, left:right].std() > 5
    assert drawing.objects[0] <= np.mean(counts) <= drawing.objects[1]
    assert min(sides) < 1.1 * drawing.diameter[0]
    assert max(sides) > 0.9 * drawing.diameter[1]


def test_haze_takes_contrast_and_leaves_the_labels():
    clear, hazy = (replace(SMALL, contrast=(share, share)) for share in (1.0, 0.4))
    for seed in range(5):
        bright, rows = draw_image(np.random.default_rng(seed), clear)
        faint, same_rows = draw_image(np.random.default_rng(seed), hazy)
        np.testing.assert_array_equal(rows, same_rows)
        assert faint.std(axis=(0, 1)) == pytest.approx(0.4 * bright.std(axis=(0, 1)), rel=0.05)


def test_the_same_seed_draws_the_same_files(tmp_path):
    first = draw_shapes(tmp_path / "one" / "shapes", 5, SMALL)
    second = draw_shapes(tmp_path / "two", 5, SMALL)
    third = draw_shapes(tmp_path / "three", 6, SMALL)
    assert contents(first) == contents(second)
    assert contents(first)["images/train/0000.png"] != contents(third)["images/train/0000.png"]
    assert contents(first)["images/train/0000.png"] != contents(first)["images/val/0000.png"]
    assert sorted(os.listdir(tmp_path)) == ["one", "three", "two"]  # no temporary folders stay


def test_the_labels_are_read_back_without_a_complaint(tmp_path):
    folder = draw_shapes(tmp_path / "shapes", drawing=replace(SMALL, train_images=30))
    found = read_labelled_images(folder / "images" / "train", "train")
    assert (len(found.images), found.missing, found.corrupt, found.bad_lines) == (30, 0, 0, 0)
    classes = np.concatenate(found.labels)[:, 0]
    assert np.bincount(classes.astype(int), minlength=len(CLASSES)).min() >= 10
    assert read_image(found.images[0]).shape == (96, 96, 3)
    image, rows = draw_image(np.random.default_rng([0, 0, 0, VERSION]), replace(SMALL, train_images=30))
    np.testing.assert_array_equal(read_image(found.images[0]), image)
    np.testing.assert_allclose(found.labels[0][:, 3:] * 96, rows[:, 3:] - rows[:, 1:3], atol=1e-3)


def test_it_is_drawn_once_and_anew_when_the_constants_change(tmp_path, capsys):
    folder = draw_shapes(tmp_path / "shapes", drawing=SMALL)
    text = capsys.readouterr().out
    assert "6 training and 3 validation images" in text
    assert ", ".join(CLASSES) in text
    before = contents(folder)
    draw_shapes(folder, drawing=SMALL)
    assert capsys.readouterr().out == ""
    assert contents(folder) == before
    draw_shapes(folder, drawing=replace(SMALL, val_images=2, noise=30.0))
    assert len(list((folder / "images" / "val").iterdir())) == 2
    assert json.loads((folder / STAMP_FILE).read_text())["noise"] == 30.0
    assert os.listdir(tmp_path) == ["shapes"]


def test_a_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not drawn by"):
        draw_shapes(tmp_path / "shapes", drawing=SMALL)
    assert contents(tmp_path) == {os.path.join("shapes", "mine.txt"): b"keep"}
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be drawn"):
        draw_shapes(tmp_path / "file" / "shapes", drawing=SMALL)


def test_two_that_draw_at_once_agree(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: draw_shapes(tmp_path / "shapes", drawing=SMALL), range(2)))
    assert results == [tmp_path / "shapes"] * 2
    assert os.listdir(tmp_path) == ["shapes"]
    assert len(list((tmp_path / "shapes" / "images" / "train").iterdir())) == 6
