import numpy as np
import pytest

from utils.dataset import DetectionDataset
from utils.images import write_image
from utils.labels import parse_labels
from utils.polygons import has_polygons, polygons_of

TRIANGLE = "2 0.1 0.2 0.5 0.2 0.3 0.8"
TEXT = f"0 0.5 0.5 0.2 0.2\n{TRIANGLE}\n{TRIANGLE}\n1 0.1 0.1 9 0.2 0.3 0.4\n3 0.6 0.6 0.9 0.6 0.9 0.9 0.6 0.9\n"


@pytest.fixture
def image(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    generator = np.random.default_rng(0)
    file = tmp_path / "images" / "a.png"
    write_image(file, generator.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    (tmp_path / "labels" / "a.txt").write_text(TEXT)
    return str(file)


def test_outlines_belong_to_their_labels(image):
    """The file has a box, an outline twice, a line that cannot be used, and another outline."""
    rows, problems = parse_labels(TEXT)
    assert len(rows) == 3 and len(problems) == 2
    box, triangle, square = polygons_of(image, rows)
    assert box is None and has_polygons([image], [rows])
    np.testing.assert_allclose(triangle, [(0.1, 0.2), (0.5, 0.2), (0.3, 0.8)], rtol=1e-6)
    assert square.shape == (4, 2)
    # In another order, as in a part of the labels, and after --single-cls has changed the classes.
    assert [polygon is None for polygon in polygons_of(image, rows[[2, 0]] * (0, 1, 1, 1, 1))] == [False, True]


def test_without_a_label_file_there_are_none(tmp_path):
    rows = np.zeros((2, 5), np.float32)
    assert polygons_of(str(tmp_path / "images" / "none.png"), rows) == [None, None]
    assert not has_polygons([str(tmp_path / "none.png")], [rows])


def test_a_training_set_pastes_objects_or_says_why_not(image, tmp_path, capsys):
    hyp = {"mosaic": 1.0, "copy_paste": 1.0, "translate": 0.0, "scale": 0.0}
    folder = str(tmp_path / "images")
    pasted = [DetectionDataset(folder, 64, hyp=hyp | {"copy_paste": p}, augment=True) for p in (0.0, 1.0)]
    counts = np.zeros(2)
    for epoch in range(60):
        for number, dataset in enumerate(pasted):
            dataset.set_epoch(epoch)
            pixels, targets, *_ = dataset[0]
            assert pixels.shape == (3, 64, 64)
            counts[number] += len(targets)
    assert counts[1] > 1.1 * counts[0]
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    dataset = DetectionDataset(folder, 64, hyp=hyp, augment=True)
    assert dataset.hyp["copy_paste"] == 0 and "needs polygons" in capsys.readouterr().out
