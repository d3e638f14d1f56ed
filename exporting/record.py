"""What was found out about exported files: beside their checkpoint, for the page about the run."""

import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from models.backend import load_backend
from quant.verify import Verification
from utils.paths import write_text_at_once

FILE = "export.json"  # in the folder of the weights
LONGEST, MOST_RUNS, LEAST_RUNS = 1.0, 20, 3  # seconds and runs of a measurement


@dataclass
class ExportedFile:
    """A file (or folder) that was written, how it compared with the network, and how long it takes.

    Attributes:
        milliseconds: an image on the CPU, with as many threads as PyTorch uses; post-processing is not in it.
    """

    path: Path
    purpose: str
    verification: Verification
    milliseconds: float = 0.0

    @property
    def megabytes(self) -> float:
        files = [file for file in self.path.rglob("*") if file.is_file()] if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files) / 1e6


def milliseconds_per_image(path: Path, size: tuple[int, int]) -> float:
    """The median time of a weights file for one image (height, width) in its runtime on the CPU."""
    backend = load_backend(path)
    backend.warm_up(size, backend.fixed_batch or 1)
    images = torch.rand(backend.fixed_batch or 1, 3, *(backend.fixed_size or size))
    times: list[float] = []
    while len(times) < LEAST_RUNS or (len(times) < MOST_RUNS and sum(times) < LONGEST):
        begin = time.perf_counter()
        backend(images)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3 / len(images)


def write_record(files: Iterable[ExportedFile], size: tuple[int, int], pictures: str) -> None:
    """Adds files of one folder to its record; those of them that are there already are replaced.

    Args:
        size: (height, width) of the images that they were verified and timed on.
        pictures: on how many images of what they were verified.
    """
    files = list(files)
    record = files[0].path.parent / FILE
    known = {entry["file"]: entry for entry in read_record(record.parent)}
    for file in files:
        known[file.path.name] = {
            "file": file.path.name,
            "purpose": file.purpose,
            "bytes": round(file.megabytes * 1e6),
            "height": size[0],
            "width": size[1],
            "verification": f"{file.verification.summary()} ({pictures})",
            "milliseconds": round(file.milliseconds, 3),
            "threads": torch.get_num_threads(),
        }
    write_text_at_once(record, json.dumps(list(known.values()), indent=1) + "\n")


def read_record(folder: Path) -> list[dict]:
    """The record of the exported files in ``folder`` that are still there; nothing where there is none."""
    try:
        entries = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return [entry for entry in entries if (folder / entry["file"]).exists()]
    except (OSError, ValueError, TypeError, KeyError):
        return []
