"""The pages, and what stands in their fenced blocks."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
SCRIPTS = {
    "yolov5-qat-train": ["train.py"],
    "yolov5-qat-val": ["val.py"],
    "yolov5-qat-detect": ["detect.py"],
    "yolov5-qat-export": ["export.py"],
    "yolov5-qat-report": ["-m", "run_report"],
    "yolov5-qat-layers": ["-m", "quant.report"],
    "yolov5-qat-sensitivity": ["-m", "quant.precision"],
    "yolov5-qat-convert": ["-m", "utils.convert"],
}


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of a kind (``bash``, ``python``, ``yaml``), without the indentation of a list they stand in."""
    found = re.findall(rf"^( *)```{kind}\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.S | re.M)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


def commands(page: Path, inline: bool = False) -> Iterator[list[str]]:
    """Each command of a page's bash blocks as words: comments and settings in front (``NAME=value``) are taken off.

    With ``inline`` those between single backticks follow, as results.md has them under its tables.
    """
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    spans = re.findall(r"`((?:python|torchrun|yolov5-qat-\w+) [^`]+)`", text) if inline else []
    for block in [*blocks(page, "bash"), *(span.replace("\n", " ") for span in spans)]:
        for line in block.replace("\\\n", " ").splitlines():
            words, command = shlex.split(line, comments=True), []
            for word in [*words, "&&"]:
                if word != "&&":
                    command.append(word)
                    continue
                while command and re.fullmatch(r"[A-Za-z_]\w*=.*", command[0]):
                    command.pop(0)
                if command:
                    yield command
                command = []


def script_of(command: list[str]) -> list[str] | None:
    """``[file, arguments ...]`` or ``[-m, module, arguments ...]`` of a command that runs a script of this project."""
    if command[0] in SCRIPTS:
        return [*SCRIPTS[command[0]], *command[1:]]
    if command[0] != "python" or len(command) < 2:
        return None
    if command[1] == "-m":
        inside = (ROOT / command[2].replace(".", "/")).is_dir() or (
            ROOT / f"{command[2].replace('.', '/')}.py"
        ).exists()
        return command[1:] if inside else None
    return command[1:] if command[1].endswith(".py") else None
