"""Exports a detector to every format there is and measures each file: size, accuracy, milliseconds per image.

    python benchmarks/formats.py --weights best.pt --data your.yaml
    python benchmarks/formats.py --weights best.pt --data your.yaml --hard-fail 0.29

The flags are those of YOLOv5's benchmarks.py. Files are written into the run folder, not beside the weights. Accuracy
is val.py's on square images, the only shape a file of fixed size takes; milliseconds are those of the forward pass, the
mean over the validation images. Formats that are not written here have a row that says so. With ``--results`` the table
goes to docs/results.md too.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from common import machine, write_section  # noqa: E402

import export  # noqa: E402
import val  # noqa: E402
from utils.command import exit_code  # noqa: E402
from utils.devices import limit_threads  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.log import LOGGER  # noqa: E402
from utils.paths import increment_path  # noqa: E402
from utils.results import newest_weights  # noqa: E402

# YOLOv5's export formats, by the word that --include takes.
FORMATS = (
    "torchscript", "onnx", "openvino", "engine", "coreml", "saved_model", "pb", "tflite", "edgetpu", "tfjs", "paddle",
)  # fmt: skip


@dataclass
class Row:
    """One file, or why there is none."""

    name: str
    file: Path | None = None
    problem: str = ""
    failed: bool = False  # as opposed to: not a format of this project
    megabytes: float = 0.0
    map50: float = 0.0
    map: float = 0.0
    milliseconds: float = 0.0

    def cells(self) -> list[str]:
        """The columns of the table."""
        if self.problem:
            return [self.name, "-", "-", "-", "-", self.problem]
        numbers = [f"{self.megabytes:.2f}", f"{self.map50:.4f}", f"{self.map:.4f}", f"{self.milliseconds:.2f}"]
        return [self.name, *numbers, self.file.name]


HEADER = ["format", "MB", "mAP50", "mAP50-95", "ms per image", "file"]


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; abbreviations such as --batch and --img are allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", default=None, help="checkpoint; the newest best.pt of runs/train")
    add("--imgsz", "--img", "--img-size", type=int, default=640, help="side in pixels")
    add("--batch-size", type=int, default=1, help="images per call")
    add("--data", default="shapes.yaml", help="data set YAML; its val split is measured")
    add("--device", default="", help="cuda device, such as 0, or cpu")
    add("--half", action="store_true", help="16-bit floats, on CUDA only")
    add("--test", action="store_true", help="export only")
    add("--pt-only", action="store_true", help="measure the checkpoint only")
    add("--hard-fail", nargs="?", type=float, const=0.0, default=None, metavar="FLOOR",
        help="exit code 1 if an export fails or a file's mAP50-95 lies under FLOOR")  # fmt: skip
    add("--include", nargs="+", default=list(FORMATS), help="formats; default: all")
    add("--project", default=str(ROOT / "runs" / "benchmarks"), help="results go to project/name")
    add("--name", default="exp", help="name of the run")
    add("--results", action="store_true", help="put the table into docs/results.md")
    return parser.parse_args(arguments)


def export_rows(weights: Path, options: argparse.Namespace) -> list[Row]:
    """The checkpoint and every file that can be made of it, or why not."""
    rows = [Row("PyTorch", weights)]
    for name in [] if options.pt_only else options.include:
        arguments = ["--weights", str(weights), "--imgsz", str(options.imgsz), "--include", name]
        arguments += ["--batch-size", str(options.batch_size), "--data", options.data]
        arguments += ["--half"] if options.half and options.device not in ("", "cpu") else []
        try:
            written = export.run(export.parse_options(arguments))
            rows += [Row(f"{name}{' (storage)' * file.path.stem.endswith('_storage')}", file.path) for file in written]
        except UserError as error:
            text = str(error)
            missing = "not a format this project writes" in text
            rows.append(Row(name, problem="not written here" if missing else text.split("\n")[0], failed=not missing))
            LOGGER.warning(f"{name}: {text}")
    return rows


def measure(row: Row, options: argparse.Namespace, folder: Path) -> None:
    """Fills in the numbers of a file."""
    files = [part for part in row.file.rglob("*") if part.is_file()] if row.file.is_dir() else [row.file]
    row.megabytes = sum(part.stat().st_size for part in files) / 1e6
    if options.test:
        return
    arguments = ["--weights", str(row.file), "--data", options.data, "--imgsz", str(options.imgsz), "--square"]
    arguments += ["--batch-size", str(options.batch_size), "--device", options.device, "--noplots", "--workers", "1"]
    arguments += ["--project", str(folder / "val"), "--name", row.name.replace(" ", "_")]
    arguments += ["--half"] if options.half else []
    try:
        result = val.run(val.parse_options(arguments))
    except UserError as error:
        row.problem, row.failed = str(error).split("\n")[0], True
        LOGGER.warning(f"{row.name}: {error}")
        return
    row.map50, row.map, row.milliseconds = result.map50, result.map, result.speed["inference"]


def markdown(rows: list[Row]) -> list[str]:
    """The table as Markdown lines."""
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    return lines + [f"| {' | '.join(row.cells())} |" for row in rows]


def run(options: argparse.Namespace) -> list[Row]:
    """Exports and measures.

    Raises:
        UserError: wrong weights or data; with --hard-fail a format that failed or lies under the floor.
    """
    given = Path(options.weights) if options.weights else newest_weights()
    if not given.is_file():
        raise UserError(f"--weights {given}: no such file")
    limit_threads()
    folder = increment_path(Path(options.project) / options.name, make=True)
    weights = folder / given.name
    shutil.copyfile(given, weights)
    rows = export_rows(weights, options)
    for row in rows:
        if row.file is not None:
            measure(row, options, folder)
    with (folder / "formats.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([HEADER, *(row.cells() for row in rows)])
    lines = markdown(rows)
    LOGGER.info("\n".join(["", *lines, "", f"Files are in {folder}"]))
    if options.results:
        data = Path(options.data).name
        command = f"python benchmarks/formats.py --weights {given.name} --data {data} --imgsz {options.imgsz}"
        command += f" --batch-size {options.batch_size}"
        title = f"## Formats of {given.stem} on {data}, {options.imgsz} px, batch {options.batch_size}"
        head = [title, "", f"`{command}`", "", f"{date.today().isoformat()}, {machine()}.", ""]
        write_section(f"formats {given.stem} {data} {options.imgsz}", [*head, *lines])
    check(rows, options)
    return rows


def check(rows: list[Row], options: argparse.Namespace) -> None:
    """With --hard-fail: raises UserError naming what failed or lies under the floor."""
    if options.hard_fail is None:
        return
    wrong = [f"{row.name}: {row.problem}" for row in rows if row.failed]
    if not options.test:
        low = [row for row in rows if not row.problem and row.map < options.hard_fail]
        wrong += [f"{row.name}: mAP50-95 {row.map:.4f} is under {options.hard_fail}" for row in low]
    if wrong:
        raise UserError("; ".join(wrong))


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_options(arguments)
    return exit_code("benchmarks/formats.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
