"""Augmented training images per second of one core, beside the simplest form of the same work; start-up of long lists.

    python benchmarks/loader.py --images coco-slice/images/train2017

Ours and the simple form (``simple_loader.py``: whole canvas, affine warp, plane after plane) take turns
batch by batch on one thread, and their processor time counts, so their ratio holds on a busy machine too; absolute
numbers do not. Both draw the same random numbers; how far images and labels differ is part of the table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import simple_loader  # noqa: E402
import torch  # noqa: E402
from common import machine, write_section  # noqa: E402

from utils import augment, canvas  # noqa: E402
from utils import dataset as dataset_module  # noqa: E402
from utils.dataset import DetectionDataset, collate  # noqa: E402
from utils.hyp import load_hyp  # noqa: E402
from utils.label_cache import LabelTable, cache_candidates, save_cache  # noqa: E402
from utils.labels import _stamp, label_path, read_labelled_images  # noqa: E402
from utils.packed import PackedRows  # noqa: E402

BATCH = 16
# Stage -> functions whose own time it is, without that of the stages which they call.
OURS = {
    "decode": [(dataset_module, "read_image")],
    "resize": [(dataset_module, "resize_to_long_side")],
    "place tiles, pad": [(canvas.Canvas, "draw"), (augment, "mosaic"), (dataset_module, "letterbox")],
    "scale and move": [(augment, "random_perspective")],
    "hsv": [(augment, "shift_hsv")],
    "flip": [(augment, "flip")],
    "collate": [(sys.modules[__name__], "collate")],
}
SIMPLE = {
    "decode": [(simple_loader, "read_image")],
    "resize": [(simple_loader, "load")],
    "place tiles, pad": [(simple_loader, "mosaic"), (simple_loader, "padded")],
    "scale and move": [(simple_loader, "scale_and_move")],
    "hsv": [(simple_loader, "shift_hsv")],
    "collate": [(sys.modules[__name__], "simple_collate")],
}
REST = "the rest"


class Stages:
    """Wraps functions to sum up the time of each stage without that of stages inside of it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def timed(self, stage: str, function: Callable) -> Callable:
        def wrapper(*arguments, **keywords):
            self._inner.append(0.0)
            started = time.process_time()
            try:
                return function(*arguments, **keywords)
            finally:
                spent = time.process_time() - started
                self.seconds[stage] += spent - self._inner.pop()
                self._inner[-1] += spent

        return wrapper

    @contextmanager
    def watch(self, stages: dict[str, list[tuple[object, str]]]) -> Iterator[None]:
        """Within it the functions are timed."""
        before = [(owner, name, getattr(owner, name)) for places in stages.values() for owner, name in places]
        for stage, places in stages.items():
            for owner, name in places:
                setattr(owner, name, self.timed(stage, getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)


def simple_collate(items: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Items to a batch, the image's position in column 0 of its labels."""
    for position, (_, rows) in enumerate(items):
        rows[:, 0] = position
    return torch.stack([image for image, _ in items]), torch.cat([rows for _, rows in items])


def make_batches(data: DetectionDataset, cached: bool) -> tuple[Callable, Callable]:
    """Functions of a list of indices that make a batch: ours, and the simple form with the same cached images."""
    load = (lambda data, index: data.load_image(index)) if cached else None

    def ours(indices: list[int]) -> tuple:
        return collate([data[index] for index in indices])

    def simple(indices: list[int]) -> tuple:
        read = load or simple_loader.load
        return simple_collate([simple_loader.item(data, index, load=read) for index in indices])

    return ours, simple


def differences(first: tuple, second: tuple) -> tuple[float, int, float]:
    """Mean and largest difference of two batches' images in levels of 255, without the outermost pixels, and of the
    labels in pixels."""
    levels = (first[0].int() - second[0].int()).abs()[..., 1:-1, 1:-1]
    pixels = (first[1] - second[1]).abs()[:, 2:] * first[0].shape[-1]
    assert torch.equal(first[1][:, :2], second[1][:, :2])
    return float(levels.float().mean()), int(levels.max()), float(pixels.max()) if pixels.numel() else 0.0


def compare(data: DetectionDataset, cached: bool, images: int) -> dict:
    """Times of both forms, their stages and differences."""
    ours, simple = make_batches(data, cached)
    batches = [list(range(begin, min(begin + BATCH, images))) for begin in range(0, images, BATCH)]
    seconds, found = [0.0, 0.0], []
    for indices in batches[:1] + batches:  # the first one is made once to warm up
        results = []
        for form, make in enumerate((ours, simple)):
            started = time.process_time()
            results.append(make(indices))
            seconds[form] += time.process_time() - started
        if not found:
            seconds = [0.0, 0.0]
        found.append(differences(*results))
    shares = []
    for stages, make in ((OURS, ours), (SIMPLE, simple)):
        watch, started = Stages(), time.process_time()
        with watch.watch(stages):
            for indices in batches[: max(len(batches) // 3, 1)]:
                # The name is looked up anew, because collate is one of the functions that are watched.
                make(indices)
        total = time.process_time() - started
        parts = {stage: watch.seconds.get(stage, 0.0) / total for stage in OURS}
        shares.append(parts | {REST: 1 - sum(parts.values())})
    means, largest, labels = zip(*found, strict=True)
    return {
        "speed": [images / spent for spent in seconds],
        "shares": shares,
        "difference": (sum(means) / len(means), max(largest), max(labels)),
    }


def speed_report(options: argparse.Namespace) -> None:
    """The tables of speed and of shares."""
    rows, shares = [], []
    for size in options.imgsz:
        for name in options.hyp:
            for cache in options.cache:
                kind = None if cache == "none" else cache
                hyp = load_hyp(ROOT / "data" / "hyps" / name)
                data = DetectionDataset(options.images, size, hyp=hyp, augment=True, cache=kind)
                result = compare(data, kind is not None, min(options.limit or len(data), len(data)))
                title = f"{size} | {name.removeprefix('hyp.').removesuffix('.yaml')} | {cache}"
                ours, simple = result["speed"]
                mean, largest, labels = result["difference"]
                cells = f"{ours:.0f} | {simple:.0f} | {ours / simple:.2f} | {mean:.2f} / {largest} | {labels:.4f}"
                rows.append(f"| {title} | {cells} |")
                for form, parts in zip(("ours", "simple"), result["shares"], strict=True):
                    cells = " | ".join(f"{part:.1%}" for part in parts.values())
                    shares.append(f"| {title} | {form} | {cells} |")
    command = f"python benchmarks/loader.py --images {Path(*options.images.parts[-3:])} --imgsz "
    command += f"{' '.join(map(str, options.imgsz))} --hyp {' '.join(options.hyp)} --cache {' '.join(options.cache)}"
    lines = [
        f"## Data loader: augmented images of one core, {' and '.join(map(str, options.imgsz))} px",
        "",
        f"`{command}`",
        "",
    ]
    lines += [
        f"{date.today().isoformat()}, {machine()}, OpenCV {cv2.__version__}. {len(data)} images, batch {BATCH}.",
        "",
    ]
    lines += ["| px | hyp | cache | images/s, ours | simple form | ratio | levels, mean / largest | labels, px |"]
    lines += ["|" + "---|" * 8, *rows, "", "Shares of the time:", ""]
    lines += [f"| px | hyp | cache | form | {' | '.join([*OURS, REST])} |", "|" + "---|" * (len(OURS) + 5), *shares]
    print("\n".join(lines))
    write_section(f"loader {' '.join(map(str, options.imgsz))}", lines)


# --- start-up
def long_list(folder: Path, images: int) -> Path:
    """A list of so many (empty) image files, with label files and a label cache of 0 to 14 boxes each."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        for part in range(10):
            (folder / kind / str(part)).mkdir(parents=True)
    paths = [f"{folder}/images/{number % 10}/{number:012d}.jpg" for number in range(images)]
    for path in paths:
        for file in (path, label_path(path)):
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY))
    stamps = np.array([(*_stamp(path), *_stamp(label_path(path))) for path in paths], np.int64)
    counts = rng.integers(0, 15, images)
    rows = rng.random((counts.sum(), 5), np.float32)
    rows[:, 0] = 0
    offsets = np.concatenate([[0], np.cumsum(counts)])
    file = folder / "list.txt"
    file.write_text("\n".join(paths))
    table = LabelTable(paths, stamps, np.full((images, 2), (640, 480)), PackedRows(rows, offsets))
    save_cache(cache_candidates(file, folder)[0], table)
    return file


def start(file: Path) -> None:
    """Prints seconds of a start, bytes of arrays kept, growth of the process and what a forked worker copies."""
    before, started = _memory("status", "VmRSS"), time.perf_counter()
    found = read_labelled_images(file, "train")
    seconds, grown = time.perf_counter() - started, _memory("status", "VmRSS") - before
    arrays = (found.labels.rows, found.labels.offsets, found.images.content, found.images.offsets)
    kept = sum(array.nbytes for array in (*arrays, found.sizes, found.stamps))
    sys.stdout.flush()
    child = os.fork()
    if not child:
        copied = _memory("smaps_rollup", "Private_Dirty")
        for index in range(len(found.images)):
            found.images[index], found.labels[index]
        print(seconds, kept, grown, _memory("smaps_rollup", "Private_Dirty") - copied, flush=True)
        os._exit(0)
    os.waitpid(child, 0)


def _memory(file: str, key: str) -> int:
    lines = Path("/proc/self", file).read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:"))) * 1024


def start_report(counts: list[int]) -> None:
    """The table of start-up times, in new processes, the best of three."""
    lines = [
        "## Data loader: start-up of long lists",
        "",
        f"`python benchmarks/loader.py --start {' '.join(map(str, counts))}`",
    ]
    lines += [
        "",
        f"{date.today().isoformat()}, {machine()}. Synthetic list, 0 to 14 boxes an image, label cache present.",
        "",
    ]
    lines += [
        "| images | seconds | bytes per image: arrays | growth of the process | copied by a worker that reads all |"
    ]
    lines += ["|---|---|---|---|---|"]
    for images in counts:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--start-of", str(long_list(Path(folder), images))]
            runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
        seconds, kept, grown, copied = min([float(word) for word in run.split()[-4:]] for run in runs)
        lines.append(
            f"| {images:,} | {seconds:.2f} | {kept / images:.0f} | {grown / images:.0f} | {copied / images:.1f} |"
        )
    print("\n".join(lines))
    write_section("loader start", lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images with labels beside it")
    parser.add_argument("--imgsz", type=int, nargs="+", default=[320, 640])
    parser.add_argument("--hyp", nargs="+", default=["hyp.scratch-low.yaml", "hyp.finetune.yaml"])
    parser.add_argument("--cache", nargs="+", default=["ram", "disk", "none"], choices=["ram", "disk", "none"])
    parser.add_argument("--limit", type=int, default=0, help="at most so many images of the set")
    parser.add_argument("--start", type=int, nargs="*", default=[], help="measure the start of lists of so many images")
    parser.add_argument("--start-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if options.start_of:
        start(options.start_of)
        return
    if options.images:
        options.images = options.images.resolve()
        speed_report(options)
    if options.start:
        start_report(options.start)


if __name__ == "__main__":
    main()
