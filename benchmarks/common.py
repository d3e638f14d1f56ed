"""What the benchmarks share: running the commands, reading what they print, writing tables into docs/results.md."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from utils.log import LOGGER  # noqa: E402


def run_script(script: str, *arguments: str) -> str:
    """Runs one of the project's commands and returns what it printed; its errors end the benchmark."""
    command = [sys.executable, str(ROOT / script), *arguments]
    LOGGER.info("$ " + " ".join(["python", script, *arguments]))
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


# Key -> how val.py prints it behind the table.
LOCALISATION = {
    "mAP75": r"^mAP75 ([\d.]+)",
    "matched": r"([\d.]+)% of labels",
    "IoU": r"mean IoU ([\d.]+)",
    "class": r"class accuracy ([\d.]+)",
}


def read_accuracy(output: str) -> dict[str, float]:
    """The numbers of all classes in what val.py printed; matched is a share of 1."""
    lines = output.splitlines()
    row = next(line for line in lines if line.split()[:1] == ["all"])
    values = dict(zip(("P", "R", "mAP50", "mAP"), map(float, row.split()[-4:]), strict=True))
    after = next(line for line in lines if line.startswith("mAP75"))
    values |= {key: float(re.search(pattern, after)[1]) for key, pattern in LOCALISATION.items()}
    values["matched"] /= 100
    return values


def write_section(marker: str, lines: list[str], file: Path = ROOT / "docs" / "results.md") -> None:
    """Replaces the part of ``file`` between this benchmark's markers, or appends it."""
    begin, end = f"<!-- begin {marker} -->", f"<!-- end {marker} -->"
    text = file.read_text(encoding="utf-8") if file.exists() else "# Results\n"
    section = "\n".join([begin, *lines, end])
    if begin in text:
        head, rest = text.split(begin, 1)
        text = head + section + rest.split(end, 1)[1]
    else:
        text = text.rstrip() + "\n\n" + section + "\n"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")


def machine() -> str:
    """Processor, threads and library versions, as results quote them."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"
