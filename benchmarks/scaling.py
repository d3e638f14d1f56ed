"""How the cost of data, loss and evaluation grows with images, objects, classes and batch size.

    python benchmarks/scaling.py

Synthetic inputs, one process. Times are processor time, so that other work on the machine counts little. The exponent
is the slope of log time over log size, fitted to the three largest sizes: 1 is linear, above 1.1 would be a mistake.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import machine, write_section  # noqa: E402

from utils.allocation import keep_freed_memory  # noqa: E402
from utils.coco import coco_evaluate, detection_rows, ground_truth  # noqa: E402
from utils.dataset import DetectionDataset, collate, rect_batch_shapes  # noqa: E402
from utils.drawing import plot_images  # noqa: E402
from utils.hyp import DEFAULT_FILE, load_hyp  # noqa: E402
from utils.images import write_image  # noqa: E402
from utils.labels import read_labelled_images  # noqa: E402
from utils.log import LOGGER  # noqa: E402
from utils.loss import DetectionLoss, scale_loss_gains  # noqa: E402
from utils.metrics import IOU_THRESHOLDS, ConfusionMatrix, ap_per_class, match_boxes, match_predictions  # noqa: E402
from utils.nms import non_max_suppression  # noqa: E402
from utils.plots import plot_class_curves, plot_confusion_matrix  # noqa: E402

LIMIT = 1.1
CLASSES = (1, 80, 1000)
THRESHOLDS = torch.tensor(IOU_THRESHOLDS)
MEASURED_FOR = 0.2  # seconds that each size is repeated for, at least three times; the fastest counts


@dataclass(frozen=True)
class Study:
    """One row of the table.

    Attributes:
        what: the work.
        axis: what grows.
        sizes: ascending.
        make: a size -> the work to be timed, with its input made beforehand.
    """

    what: str
    axis: str
    sizes: Sequence[int]
    make: Callable[[int], Callable[[], object]]


def generator() -> torch.Generator:
    """The same random numbers every time."""
    return torch.Generator().manual_seed(0)


def random_boxes(count: int, size: float = 640.0) -> torch.Tensor:
    """(count, 4) corners of boxes of 10 to 100 pixels."""
    random = generator()
    corner = torch.rand(count, 2, generator=random) * (size - 100)
    return torch.cat((corner, corner + 10 + torch.rand(count, 2, generator=random) * 90), 1)


# --- data -------------------------------------------------------------------------------------------------------------


class Folder:
    """Image and label files, as many as were asked for at most."""

    def __init__(self, root: Path, largest: int) -> None:
        self.root = root
        for name in ("images", "labels"):
            (root / name).mkdir()
        picture = root / "images" / "0.jpg"
        write_image(picture, np.full((48, 64, 3), 127, np.uint8))
        encoded = picture.read_bytes()
        for number in range(largest):
            (root / "images" / f"{number}.jpg").write_bytes(encoded)
            (root / "labels" / f"{number}.txt").write_text("".join(f"0 0.5 0.{n} 0.2 0.2\n" for n in range(1, 9)))

    def listed(self, images: int) -> str:
        """A list file of the first images."""
        file = self.root / f"first{images}.txt"
        file.write_text("".join(f"./images/{number}.jpg\n" for number in range(images)))
        return str(file)

    def scan(self, images: int, cached: bool) -> Callable[[], object]:
        """Reading images and labels, or the cache of them."""
        file = self.listed(images)

        def work() -> None:
            if not cached:
                for cache in self.root.rglob("*.cache*"):
                    cache.unlink()
            read_labelled_images(file)

        read_labelled_images(file)
        return work

    def batch(self, images: int) -> Callable[[], object]:
        """Reading, fitting and stacking one batch."""
        dataset = DetectionDataset(self.listed(images), 320, images, prefix="val")
        return lambda: collate([dataset[index] for index in range(images)])


def collated(objects: int) -> Callable[[], object]:
    """Stacking 8 images of so many objects each."""
    items = [(torch.zeros(3, 64, 64, dtype=torch.uint8), torch.rand(objects, 6), "", None) for _ in range(8)]
    return lambda: collate(items)


def batch_shapes(images: int) -> Callable[[], object]:
    """The shapes of rectangular batches of 8."""
    ratios, index = np.linspace(0.5, 2, images), np.arange(images) // 8
    return lambda: rect_batch_shapes(ratios, index, 640, 32, 0.5)


# --- loss -------------------------------------------------------------------------------------------------------------


def loss(batch: int = 8, objects: int = 8, classes: int = 80) -> Callable[[], object]:
    """Target assignment and loss of a 320 pixel batch, forward and backward."""
    anchors = torch.tensor([[[1.25, 1.6], [2.0, 3.8], [4.1, 2.9]]] * 3)
    computed = DetectionLoss(anchors, (8, 16, 32), classes, scale_loss_gains(load_hyp(DEFAULT_FILE), 3, classes, 320))
    maps = [torch.zeros(batch, 3, side, side, 5 + classes, requires_grad=True) for side in (40, 20, 10)]
    index = torch.arange(batch).repeat_interleave(objects)[:, None]
    boxes = torch.rand(batch * objects, 4, generator=generator()) * 0.3 + 0.1
    targets = torch.cat((index, index % classes, boxes), 1)
    return lambda: computed(maps, targets)[0].backward()


# --- evaluation -------------------------------------------------------------------------------------------------------


def suppression(batch: int = 1, rows: int = 1000, classes: int = 80, kept: int = 300) -> Callable[[], object]:
    """Suppression of rows of which every class but a few is under the threshold."""
    random = generator()
    boxes = random_boxes(batch * rows)
    boxes = torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), 1)
    scores = torch.rand(batch * rows, 1 + classes, generator=random)
    scores[:, 1:] *= scores[:, 1:] > 1 - min(2.0 / classes, 1.0)
    prediction = torch.cat((boxes, scores), 1).view(batch, rows, 5 + classes)
    return lambda: non_max_suppression(prediction, 0.001, 0.6, multi_label=True, max_detections=kept)


def detections(count: int, classes: int) -> torch.Tensor:
    """(count, 6) sorted by confidence."""
    random = generator()
    confidence = torch.rand(count, 1, generator=random).sort(0, descending=True)[0]
    labels = torch.randint(classes, (count, 1), generator=random).float()
    return torch.cat((random_boxes(count), confidence, labels), 1)


def matching(objects: int = 10, classes: int = 80) -> Callable[[], object]:
    """Matching of 300 detections with labels, and the confusion matrix."""
    found = detections(300, classes)
    labels = torch.cat((torch.arange(objects)[:, None] % classes, random_boxes(objects) + 3), 1).float()
    confusion = ConfusionMatrix(classes)

    def work() -> None:
        match_predictions(found, labels, THRESHOLDS)
        match_boxes(found, labels)
        confusion.add(found, labels)

    return work


def metrics(images: int = 200, classes: int = 80) -> Callable[[], object]:
    """Average precision of 100 detections and 8 labels an image."""
    random = np.random.default_rng(0)
    number = images * 100
    correct = np.sort(random.random((number, 10)) < 0.3, 1)[:, ::-1]
    given = random.random(number), random.integers(0, classes, number), random.integers(0, classes, images * 8)
    return lambda: ap_per_class(correct, *given)


def export(images: int) -> Callable[[], object]:
    """Rows of the JSON file, ground truth from labels, and pycocotools over 80 classes."""
    found, names = detections(100, 80), {index: str(index) for index in range(80)}
    labels = np.concatenate((np.arange(8)[:, None], random_boxes(8).numpy()), 1)

    def work() -> None:
        rows = [row for image in range(images) for row in detection_rows(found, image, None)]
        truth = ground_truth(dict.fromkeys(range(images), (640, 640)), dict.fromkeys(range(images), labels), names)
        with contextlib.redirect_stdout(io.StringIO()):
            coco_evaluate(truth, rows, range(images))

    return work


def charts(classes: int, folder: Path) -> Callable[[], object]:
    """The four curves and the confusion matrix."""
    random = np.random.default_rng(0)
    result = metrics(20, classes)()
    matrix = random.integers(0, 9, (classes + 1, classes + 1))
    names = {index: f"class {index}" for index in range(classes)}

    def work() -> None:
        plot_class_curves(result, names, folder)
        plot_confusion_matrix(matrix, list(names.values()), folder / "matrix.png")

    return work


def pictures(objects: int, folder: Path) -> Callable[[], object]:
    """The picture of a batch of 8 images with so many boxes each."""
    index = torch.arange(8).repeat_interleave(objects)[:, None]
    boxes = torch.cat((index, index % 80, random_boxes(len(index))), 1)
    images = torch.zeros(8, 3, 640, 640, dtype=torch.uint8)
    return lambda: plot_images(images, boxes, ["image"] * 8, folder / "batch.jpg", {})


def studies(files: Folder, folder: Path) -> list[Study]:
    """All rows."""
    images, objects, batches = (250, 500, 1000, 2000), (8, 32, 128, 512), (2, 4, 8, 16)
    many = (10_000, 20_000, 40_000, 80_000)
    return [
        Study("scanning images and labels", "images", images, lambda n: files.scan(n, False)),
        Study("reading the cache of the scan", "images", images, lambda n: files.scan(n, True)),
        Study("shapes of rectangular batches", "images", many, batch_shapes),
        Study("assembling a batch", "batch", (4, 8, 16, 32), files.batch),
        Study("stacking a batch", "objects per image", (100, 1000, 10_000), collated),
        Study("loss and its gradient", "batch", batches, lambda n: loss(batch=n)),
        Study("loss and its gradient", "objects per image", objects, lambda n: loss(objects=n)),
        Study("loss and its gradient", "classes", CLASSES, lambda n: loss(batch=2, classes=n)),
        Study("suppression", "batch", batches, lambda n: suppression(batch=n)),
        Study("suppression", "rows per image", (2000, 4000, 8000, 16_000), lambda n: suppression(rows=n)),
        Study("suppression", "classes", CLASSES, lambda n: suppression(classes=n)),
        Study("matching", "objects per image", objects, matching),
        Study("matching", "classes", CLASSES, lambda n: matching(classes=n)),
        Study("average precision", "images", (500, 1000, 2000, 4000), metrics),
        Study("average precision", "classes", CLASSES, lambda n: metrics(classes=n)),
        Study("COCO's JSON and evaluation", "images", (10, 20, 40, 80), export),
        Study("charts", "classes", (10, 80, 160), lambda n: charts(n, folder)),
        Study("picture of a batch", "objects per image", objects, lambda n: pictures(n, folder)),
    ]


# --- measuring --------------------------------------------------------------------------------------------------------


def fastest(work: Callable[[], object]) -> float:
    """Processor seconds of the fastest of several runs."""
    work()
    seconds: list[float] = []
    while sum(seconds) < MEASURED_FOR or len(seconds) < 3:
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log sizes, over the three largest sizes: fixed costs count least there."""
    return float(np.polyfit(np.log(sizes[-3:]), np.log(seconds[-3:]), 1)[0])


def measure(study: Study) -> list[float]:
    """Seconds of each size."""
    return [fastest(study.make(size)) for size in study.sizes]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    options = parser.parse_args()
    LOGGER.setLevel("ERROR")
    keep_freed_memory()  # as val.py does
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name
        folder = Path(name)
        found = [study for study in studies(Folder(folder, 2000), folder) if options.only in study.what]
        table = []
        for study in found:
            table.append((study, measure(study)))
            print(_row(*table[-1]), flush=True)
    too_steep = [f"{study.what} over {study.axis}" for study, s in table if exponent(study.sizes, s) > LIMIT]
    if not options.only:
        report(table)
    if too_steep:
        raise SystemExit(f"superlinear: {', '.join(too_steep)}")


def _row(study: Study, seconds: list[float]) -> str:
    cells = "; ".join(f"{size:,}: {_duration(value)}" for size, value in zip(study.sizes, seconds, strict=True))
    return f"| {study.what} | {study.axis} | {cells} | {exponent(study.sizes, seconds):.2f} |"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def report(table: list[tuple[Study, list[float]]]) -> None:
    """Prints the table and puts it into docs/results.md."""
    lines = ["## Growth of cost", "", "`python benchmarks/scaling.py`", ""]
    lines += [
        f"{date.today().isoformat()}, {machine()}. Processor time of the fastest of several runs; synthetic inputs.",
        "",
    ]
    lines += ["| work | grows with | time at each size | exponent |", "|---|---|---|---|"]
    lines += [_row(*entry) for entry in table]
    write_section("scaling", lines)


if __name__ == "__main__":
    main()
