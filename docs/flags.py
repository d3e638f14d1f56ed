"""Writes flags.md, every flag of every command beside YOLOv5's. To be run after a change: python docs/flags.py"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import formats  # noqa: E402

import detect  # noqa: E402
import export  # noqa: E402
import train  # noqa: E402
import val  # noqa: E402
from quant.precision import parse_options as precision_options  # noqa: E402
from quant.report import parse_options as report_options  # noqa: E402
from run_report.__main__ import main as run_report_main  # noqa: E402
from training.options import DEFAULTS  # noqa: E402

FILE = Path(__file__).with_name("flags.md")
OFF = False
# YOLOv5's defaults, by command (August 2026); a flag without a value is OFF.
UPSTREAM: dict[str, dict[str, object]] = {
    "train.py": {
        "--weights": "yolov5s.pt", "--cfg": "", "--data": "coco128.yaml", "--hyp": "hyp.scratch-low.yaml",
        "--epochs": 100, "--batch-size": 16, "--imgsz": 640, "--rect": OFF, "--resume": OFF, "--nosave": OFF,
        "--noval": OFF, "--noautoanchor": OFF, "--noplots": OFF, "--evolve": None, "--evolve_population": "data/hyps",
        "--resume_evolve": None, "--bucket": "", "--cache": None, "--image-weights": OFF, "--device": "",
        "--multi-scale": OFF, "--single-cls": OFF, "--optimizer": "SGD", "--sync-bn": OFF, "--workers": 8,
        "--project": "runs/train", "--name": "exp", "--exist-ok": OFF, "--quad": OFF, "--cos-lr": OFF,
        "--label-smoothing": 0.0, "--patience": 100, "--freeze": [0], "--save-period": -1, "--seed": 0,
        "--local_rank": -1, "--entity": None, "--upload_dataset": OFF, "--bbox_interval": -1,
        "--artifact_alias": "latest",
    },
    "val.py": {
        "--data": "coco128.yaml", "--weights": "yolov5s.pt", "--batch-size": 32, "--imgsz": 640, "--conf-thres": 0.001,
        "--iou-thres": 0.6, "--max-det": 300, "--task": "val", "--device": "", "--workers": 8, "--single-cls": OFF,
        "--augment": OFF, "--verbose": OFF, "--save-txt": OFF, "--save-hybrid": OFF, "--save-conf": OFF,
        "--save-json": OFF, "--project": "runs/val", "--name": "exp", "--exist-ok": OFF, "--half": OFF, "--dnn": OFF,
    },
    "detect.py": {
        "--weights": "yolov5s.pt", "--source": "data/images", "--data": "coco128.yaml", "--imgsz": [640],
        "--conf-thres": 0.25, "--iou-thres": 0.45, "--max-det": 1000, "--device": "", "--view-img": OFF,
        "--save-txt": OFF, "--save-format": 0, "--save-csv": OFF, "--save-conf": OFF, "--save-crop": OFF,
        "--nosave": OFF, "--classes": None, "--agnostic-nms": OFF, "--augment": OFF, "--visualize": OFF,
        "--update": OFF, "--project": "runs/detect", "--name": "exp", "--exist-ok": OFF, "--line-thickness": 3,
        "--hide-labels": OFF, "--hide-conf": OFF, "--half": OFF, "--dnn": OFF, "--vid-stride": 1,
    },
    "export.py": {
        "--data": "coco128.yaml", "--weights": "yolov5s.pt", "--imgsz": [640, 640], "--batch-size": 1,
        "--device": "cpu", "--half": OFF, "--inplace": OFF, "--keras": OFF, "--optimize": OFF, "--int8": OFF,
        "--per-tensor": OFF, "--dynamic": OFF, "--cache": "", "--simplify": OFF, "--mlmodel": OFF, "--opset": 17,
        "--verbose": OFF,
        "--workspace": 4, "--nms": OFF, "--agnostic-nms": OFF, "--topk-per-class": 100, "--topk-all": 100,
        "--iou-thres": 0.45, "--conf-thres": 0.25, "--include": ["torchscript"],
    },
    "benchmarks/formats.py": {
        "--weights": "yolov5s.pt", "--imgsz": 640, "--batch-size": 1, "--data": "coco128.yaml", "--device": "",
        "--half": OFF, "--test": OFF, "--pt-only": OFF, "--hard-fail": None,
    },
}  # fmt: skip
COMMANDS: dict[str, Callable] = {
    "train.py": train.parse_arguments,
    "val.py": val.parse_options,
    "detect.py": detect.parse_options,
    "export.py": export.parse_options,
    "benchmarks/formats.py": formats.parse_options,
}
# Commands that YOLOv5 does not have.
OWN: dict[str, Callable] = {
    "python -m run_report": run_report_main,
    "python -m quant.report": report_options,
    "python -m quant.precision": precision_options,
}
# What holds where a parser's default is None.
UNTOLD = {("train.py", "--project"): "runs/train", ("val.py", "--imgsz"): 640}
NEWEST = "without it the newest best.pt of your own runs is taken: nothing is fetched that was not named"
OWN_DATA = "shapes.yaml is drawn on the spot, so that the first command needs no download"
# (command, flag) -> why a default differs, or what else there is to say.
NOTES = {
    ("train.py", "--weights"): "empty: training starts from scratch, and nothing is fetched that was not named",
    ("train.py", "--data"): OWN_DATA,
    ("train.py", "--cfg"): "takes the place of an empty --weights; weights bring their own network",
    ("train.py", "--evolve_population"): "only --hyp, not all files of data/hyps, each of which is a whole training",
    ("train.py", "--epochs"): "the `defaults:` of a data set's YAML come between flags and this",
    ("train.py", "--cache"): "on disk it is one file beside the labels instead of one per image",
    ("train.py", "--project"): "runs/evolve with --evolve",
    ("val.py", "--weights"): NEWEST,
    ("val.py", "--data"): OWN_DATA,
    ("val.py", "--imgsz"): "640 unless the data set's YAML has another under `defaults:`",
    ("detect.py", "--weights"): NEWEST,
    ("detect.py", "--source"): "YOLOv5's two photos are not here, so the flag must be given until you make that folder",
    ("detect.py", "--data"): "read only for names that a weights file does not hold, which ours and official ones do",
    ("export.py", "--weights"): NEWEST,
    ("export.py", "--data"): "the data that the network was trained on verifies the file",
    ("export.py", "--imgsz"): "the size that the network was trained at",
    ("export.py", "--batch-size"): "images per call of the file",
    ("export.py", "--include"): "the formats that carry integers",
    ("export.py", "--topk-all"): "of an image, over all classes, as many as val.py keeps",
    ("export.py", "--opset"): "the lowest one that holds everything quantized graphs need",
    ("benchmarks/formats.py", "--weights"): NEWEST,
    ("benchmarks/formats.py", "--data"): OWN_DATA,
}


class _Caught(Exception):  # noqa: N818, it is a way out, not an error
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(parse: Callable) -> argparse.ArgumentParser:
    """The parser that a ``parse_options`` builds."""

    def catch(parser: argparse.ArgumentParser, *_arguments) -> None:
        raise _Caught(parser)

    original = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = catch
    try:
        parse([])
    except _Caught as caught:
        return caught.parser
    finally:
        argparse.ArgumentParser.parse_args = original
    raise AssertionError(f"{parse} parses nothing")


def shown(value: object) -> str:
    """A default as people write it."""
    if value is None or value is False or value == "":
        return "-"
    if isinstance(value, list):
        return " ".join(map(str, value))
    text = str(value)
    return str(Path(text).relative_to(ROOT)) if text.startswith(str(ROOT)) else text


def flag_rows(command: str) -> list[tuple[str, str, str, str]]:
    """(flags, our default, YOLOv5's default, remark) of every flag of a command, YOLOv5's missing ones too."""
    upstream, rows, seen = UPSTREAM[command], [], set()
    for action in parser_of(COMMANDS[command])._actions:
        if action.dest == "help":
            continue
        flag = next((name for name in action.option_strings if name in upstream), action.option_strings[0])
        seen.update(action.option_strings)
        default = action.default
        if default is None:
            default = UNTOLD.get((command, flag), DEFAULTS.get(action.dest) if command == "train.py" else None)
        ours = Path(shown(default)).name if flag in ("--data", "--hyp") else shown(default)
        theirs = shown(upstream[flag]) if flag in upstream else "(new)"
        text = (action.help or "").replace("|", "\\|").replace("%%", "%")
        refused = text.startswith("refused: ")
        if refused:
            text = f"**refused**: {text.removeprefix('refused: ')}"
        note = NOTES.get((command, flag), "")
        if flag in upstream and ours != theirs and not refused:
            text = f"{text}. **Differs**: {note}" if text else f"**Differs**: {note}"
        elif note:
            text = f"{text}; {note}" if text else note
        rows.append((" ".join(f"`{name}`" for name in action.option_strings), ours, theirs, text))
    for flag in upstream:
        if flag not in seen:
            reason = export.REPLACED.get(flag, "")
            rows.append((f"`{flag}`", "-", shown(upstream[flag]), f"**refused**: {reason}" if reason else ""))
    return rows


def own_rows(parse: Callable) -> list[tuple[str, str, str]]:
    """(flags or the name of an argument, default, meaning) of a command that is ours alone."""
    actions = [action for action in parser_of(parse)._actions if action.dest != "help"]
    names = [action.option_strings or [action.metavar] for action in actions]
    texts = [(action.help or "").replace("|", "\\|").replace("%%", "%") for action in actions]
    return [
        (" ".join(f"`{flag}`" for flag in flags), shown(action.default), text)
        for flags, action, text in zip(names, actions, texts, strict=True)
    ]


def text() -> str:
    """The page."""
    lines = [
        "# Every flag, beside YOLOv5's", "",
        "Written by `python docs/flags.py` from the parsers; a test keeps it true. Abbreviations such as `--batch` and "
        "`--conf` work everywhere; of `train.py` a few very short ones (`--rec`, `--qua`, `--co`, `--pr`) could mean a "
        "new flag as well and are refused. What is off or empty by default is shown as `-`. "
        "`train.py` takes its defaults from a data set's `defaults:` first, where it has them.", "",
    ]  # fmt: skip
    for command in UPSTREAM:
        lines += [f"## {command}", "", "| flag | default | YOLOv5's | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in flag_rows(command)]
        lines.append("")
    for command, parse in OWN.items():
        lines += [f"## {command}", "", "| flag | default | |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in own_rows(parse)]
        lines.append("")
    lines += ["Those of `utils.convert` are in [data sets](datasets.md#converting).", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
