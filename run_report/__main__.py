"""Writes report.html of one run, or a page that compares several.

python -m run_report runs/train/exp
python -m run_report runs/train/exp runs/train/exp2 --output comparison.html
"""

from __future__ import annotations

import sys
from pathlib import Path

from run_report.write import write_comparison, write_report
from utils.command import CommandParser, exit_code
from utils.log import LOGGER


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = CommandParser("python -m run_report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the run, comparison.html here)")
    parser.add_argument("--no-pictures", action="store_true", help="numbers and charts only: no network is run")
    options = parser.parse_args(arguments)

    def write() -> None:
        if len(options.runs) == 1:
            file = write_report(options.runs[0], options.output, pictures=not options.no_pictures)
        else:
            file = write_comparison(options.runs, options.output or Path("comparison.html"))
        LOGGER.info(f"{file} ({file.stat().st_size / 1e6:.2f} MB)")

    return exit_code("run_report", write)


if __name__ == "__main__":
    sys.exit(main())
