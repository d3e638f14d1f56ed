"""benchmarks/loader.py: the loader's images and labels equal their simplest form; what the tables are made of."""

import importlib
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.dataset import DetectionDataset

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
HYP = {"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0, "translate": 0.1, "scale": 0.5, "fliplr": 0.5, "flipud": 0.3}
COLOURS = {"hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4}
# OpenCV 5 interpolates at the exact position when it warps, releases before at the nearest 32nd of a pixel.
LEVELS = 1 if int(cv2.__version__.split(".")[0]) >= 5 else 9


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("loader"), importlib.import_module("simple_loader")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("mosaic", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cache", [None, "ram"])
def test_images_and_labels_equal_the_simple_form(modules, tiny_dataset, mosaic, cache):
    hyp = HYP | {"mosaic": mosaic}
    data = DetectionDataset(tiny_dataset.parent / "images" / "train", 80, hyp=hyp, augment=True, cache=cache, seed=3)
    boxes = 0
    for epoch in range(6):
        for index in range(len(data)):
            image, labels, _, _ = data[(epoch, index)]
            expected, rows = modules[1].item(data, index, epoch)
            np.testing.assert_allclose(labels, rows, atol=1e-5)
            # The outermost pixels repeat the edge of what is seen, where the warp also sees what lies beyond it.
            difference = (image.int() - expected.int()).abs()[:, 1:-1, 1:-1]
            assert difference.max() <= LEVELS
            assert difference.float().mean() < 0.3
            boxes += len(labels)
    assert boxes > 100


def test_colours_equal_the_simple_form(modules, tiny_dataset):
    data = DetectionDataset(
        tiny_dataset.parent / "images" / "train", 80, hyp=HYP | COLOURS | {"mosaic": 1.0}, augment=True
    )
    for index in range(len(data)):
        difference = (data[index][0].int() - modules[1].item(data, index)[0].int()).abs()[:, 1:-1, 1:-1].float()
        # One level before becomes several where a dark pixel's saturation is raised.
        assert difference.mean() < 0.4 * LEVELS
        assert (difference > 3).float().mean() < 0.02 * LEVELS


def test_a_stage_has_the_time_of_its_functions_without_inner_stages(modules):
    def busy(seconds):
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    class Work:
        @staticmethod
        def outer():
            busy(0.02)
            Work.inner()
            Work.inner()

        @staticmethod
        def inner():
            busy(0.03)

    before = Work.inner
    stages = modules[0].Stages()
    with stages.watch({"a": [(Work, "outer")], "b": [(Work, "inner")]}):
        Work.outer()
    assert 0.02 <= stages.seconds["a"] < 0.06 <= stages.seconds["b"]
    assert Work.inner is before


def test_the_table_of_speed(modules, tiny_dataset):
    hyp = HYP | COLOURS | {"mosaic": 1.0}
    data = DetectionDataset(tiny_dataset.parent / "images" / "train", 80, hyp=hyp, augment=True)
    result = modules[0].compare(data, False, 8)
    assert min(result["speed"]) > 0
    for parts in result["shares"]:
        assert sum(parts.values()) == pytest.approx(1)
        assert all(share > 0 for stage, share in parts.items() if stage != "flip")
    assert 0 < result["difference"][0] < 0.4 * LEVELS
    assert result["difference"][2] < 1e-2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_start_of_a_long_list(modules, tmp_path, capfd):
    file = modules[0].long_list(tmp_path, 300)
    modules[0].start(file)
    out = capfd.readouterr().out
    assert "300 images" in out
    seconds, kept, grown, copied = map(float, out.split()[-4:])
    assert 0 < seconds < 5
    assert 100 * 300 < kept < 600 * 300  # 7 boxes of 20 bytes, a path, 64 bytes of numbers
    assert grown >= 0
    assert copied < 2**20
