import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from utils.drawing import Annotator, class_color, plot_images
from utils.metrics import ap_per_class
from utils.plots import (
    _result_charts,
    _whole_numbers,
    plot_class_curves,
    plot_confusion_matrix,
    plot_labels,
    plot_results,
    plot_study,
)


def read(file):
    image = cv2.imread(str(file))
    assert image is not None and image.std() > 1, file
    return image


def results(classes, seed=0):
    generator = np.random.default_rng(seed)
    number = classes * 40
    confidence = generator.random(number)
    correct = generator.random((number, 10)) < confidence[:, None]
    label = generator.integers(classes, size=number)
    return ap_per_class(correct, confidence, label, generator.integers(classes, size=number))


@pytest.mark.parametrize("classes", [1, 3, 80])
def test_charts_of_any_number_of_classes(tmp_path, classes):
    names = {i: f"class number {i}" for i in range(classes)}
    plot_class_curves(results(classes), names, tmp_path)
    matrix = np.random.default_rng(0).integers(0, 50, (classes + 1, classes + 1))
    plot_confusion_matrix(matrix, list(names.values()), tmp_path / "confusion_matrix.png")
    rows = np.concatenate((np.arange(200)[:, None] % classes, np.random.default_rng(0).random((200, 4))), 1)
    plot_labels(rows, names, tmp_path)
    for file in ("PR_curve.png", "F1_curve.png", "P_curve.png", "R_curve.png", "confusion_matrix.png", "labels.jpg"):
        read(tmp_path / file)


def test_charts_without_any_label(tmp_path):
    empty = ap_per_class(np.zeros((0, 10), bool), np.zeros(0), np.zeros(0), np.zeros(0))
    plot_class_curves(empty, {0: "a"}, tmp_path)
    plot_confusion_matrix(np.zeros((2, 2), int), ["a"], tmp_path / "confusion_matrix.png")
    plot_labels(np.zeros((0, 5)), {0: "a"}, tmp_path)
    read(tmp_path / "PR_curve.png")


@pytest.mark.parametrize("as_float", [False, True])
def test_batch_shows_boxes_where_they_are(tmp_path, as_float):
    images = torch.full((2, 3, 96, 96), 100, dtype=torch.uint8)
    images = images.float() / 255 if as_float else images
    boxes = torch.tensor([[1, 0, 20, 30, 60, 50, 0.9], [1, 1, 5, 40, 15, 60, 0.1]])
    file = tmp_path / "batch.png"
    plot_images(images, boxes, ["one.jpg", "two.jpg"], file, {0: "cat", 1: "dog"})
    picture = read(file)
    assert picture.shape == (96, 192, 3)
    assert np.abs(picture[50, 96 + 40].astype(int) - class_color(0)).max() < 30  # lower edge of the sure box
    assert np.abs(picture[60, 96 + 10].astype(int) - 100).max() < 30  # the unsure one is left out
    assert np.abs(picture[50, 40].astype(int) - 100).max() < 30


def test_large_batches_are_shrunk(tmp_path):
    images = torch.randint(0, 255, (20, 3, 640, 640), dtype=torch.uint8)
    plot_images(images, torch.zeros(0, 6), ["x.jpg"] * 20, tmp_path / "batch.jpg", {})
    assert max(read(tmp_path / "batch.jpg").shape[:2]) <= 1920


def test_captions_stay_inside():
    annotator = Annotator(np.full((60, 80, 3), 200, np.uint8), 2)
    annotator.box((70, -5, 90, 20), "long caption", (0, 0, 255))
    assert (annotator.image[2:12, 2:] != 200).any()


def test_the_first_classes_are_told_apart_by_the_colour_blind():
    """Any two colours differ in lightness or along the axis that red-green blindness leaves (blue to yellow)."""
    for one in range(7):
        for other in range(one):
            blue, green, red = (float(a) - float(b) for a, b in zip(class_color(one), class_color(other), strict=True))
            assert abs(blue) + abs(green + red) / 2 > 40, (one, other)
    assert len({class_color(label) for label in range(80)}) > 70


def test_columns_that_belong_together_share_a_chart():
    names = ["train/box_loss", "val/box_loss", "model.9.balance/factor0", "model.9.balance/factor1", "quant/new"]
    charts = {title: lines for title, _, lines in _result_charts(names)}
    assert charts == {
        "Box loss": {"train/box_loss": "training", "val/box_loss": "validation"},
        "model.9: branch factor": {"model.9.balance/factor0": "branch 0", "model.9.balance/factor1": "branch 1"},
        "quant/new": {"quant/new": "quant/new"},
    }


def test_results_and_study(tmp_path):
    file = tmp_path / "results.csv"
    file.write_text("               epoch,      train/box_loss,    quant/note\n0,0.5,x\n1,0.25,\n2,nan,\n")
    plot_results(file)
    read(tmp_path / "results.png")
    figure = Figure()
    axes = figure.add_subplot()
    axes.set_xlim(-0.5, 0.5)  # of one epoch
    axes.xaxis.set_major_locator(_whole_numbers())
    assert [tick for tick in axes.get_xticks() if -0.5 <= tick <= 0.5] == [0]
    rows = np.array([[256, 0, 0, 0.4, 0.2, 1, 5, 1], [512, 0, 0, 0.5, 0.3, 1, 15, 1]])
    plot_study({"n": rows}, tmp_path / "study.png")
    read(tmp_path / "study.png")
