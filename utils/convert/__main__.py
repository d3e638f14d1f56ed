"""Converts labels between YOLO, PASCAL VOC and COCO.

Usage:
    python -m utils.convert voc2yolo  VOCdevkit/VOC2007 --output ../datasets/voc07 --sets train val
    python -m utils.convert coco2yolo annotations/instances_val.json --images val --output ../datasets/mine
    python -m utils.convert yolo2voc  --data mine.yaml --split val --output VOCdevkit/mine
    python -m utils.convert yolo2coco --data mine.yaml --split val --output instances_val.json
"""

import argparse
import json
import sys
from pathlib import Path

from utils.coco import COCO_CATEGORY_IDS
from utils.command import CommandParser, exit_code
from utils.convert.coco import coco_to_yolo, read_annotations, yolo_to_coco
from utils.convert.files import TRANSFERS, write_dataset_yaml, write_lines
from utils.convert.voc import CORNERS, class_names, image_sets, voc_to_yolo, yolo_to_voc
from utils.dataset_yaml import DatasetSpec, load_dataset_yaml, prepare_dataset
from utils.errors import UserError
from utils.labels import list_images
from utils.log import LOGGER


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandParser(prog="python -m utils.convert", description="Convert labels between formats.")
    commands = parser.add_subparsers(dest="command", required=True)

    voc = commands.add_parser("voc2yolo", help="a folder with JPEGImages, Annotations and ImageSets to YOLO")
    voc.add_argument("source", type=Path, help="the folder, such as VOCdevkit/VOC2007")
    voc.add_argument("--sets", nargs="+", help="image sets; default: train, val and test, as far as there are any")
    voc.add_argument("--train-difficult", action="store_true", help="train on difficult objects like on all others")

    coco = commands.add_parser("coco2yolo", help="a COCO instances file to YOLO")
    coco.add_argument("annotations", type=Path, help="the JSON file")
    coco.add_argument("--images", type=Path, required=True, help="the folder that its file names are relative to")
    coco.add_argument("--set", default=None, help="name of the set; default: the end of the JSON's name")
    coco.add_argument("--segments", action="store_true", help="write outlines instead of boxes")

    to_voc = commands.add_parser("yolo2voc", help="a split of a data set YAML to VOC's folders")
    to_coco = commands.add_parser("yolo2coco", help="a split of a data set YAML to a COCO instances file")
    to_coco.add_argument("--coco-numbers", action="store_true", help="number 80 classes as COCO does, from 1 to 90")
    for command in (to_voc, to_coco):
        command.add_argument("--data", required=True, help="data set YAML")
        command.add_argument("--split", default="val", choices=("train", "val", "test"))
    for command in (voc, coco, to_voc, to_coco):
        command.add_argument("--output", type=Path, required=True, help="where to write")
    for command in (voc, coco):
        command.add_argument("--names", default=None, help="data set YAML that gives the classes and their order")
    for command in (voc, coco, to_voc):
        command.add_argument("--transfer", default="copy", choices=TRANSFERS, help="how images get there (copy)")
    for command in (voc, to_voc):
        command.add_argument(
            "--corners", default="pixels", choices=CORNERS, help="pixels from 1, as VOC; or edges from 0, as labelImg"
        )
    return parser.parse_args(arguments)


def voc_command(options: argparse.Namespace) -> None:
    """voc2yolo: every set into one YOLO data set with a YAML."""
    sets = options.sets or image_sets(options.source)
    if not sets:
        raise UserError(
            f"{options.source}: has no ImageSets/Main/*.txt. Is it the folder with JPEGImages and Annotations?"
        )
    names = names_of(options.names) or class_names([options.source])
    for name in sets:
        counts = voc_to_yolo(
            options.source, name, options.output, name, names, corners=options.corners,
            train_difficult=options.train_difficult, transfer=options.transfer,
        )  # fmt: skip
        LOGGER.info(f"{name}: {counts}")
    splits = {key: [f"images/{name}" for name in sets if name.startswith(key)] for key in ("train", "val", "test")}
    splits["other"] = [f"images/{name}" for name in sets]
    report(write_dataset_yaml(options.output, splits, names, evaluation="voc"))


def coco_command(options: argparse.Namespace) -> None:
    """coco2yolo: one set, and a YAML of all sets that the output has by now."""
    annotations = read_annotations(options.annotations, options.segments)
    names = names_of(options.names) or list(annotations.categories.values())
    name = options.set or options.annotations.stem.rpartition("_")[2]
    counts = coco_to_yolo(
        annotations, options.images, options.output, name, names, segments=options.segments, transfer=options.transfer
    )
    LOGGER.info(f"{name}: {counts}")
    lists = sorted(file.name for file in options.output.glob("*.txt"))
    splits = {key: [item for item in lists if item.startswith(key)] for key in ("train", "val", "test")}
    report(write_dataset_yaml(options.output, splits | {"other": lists}, names))


def names_of(data: str | None) -> list[str]:
    """The class names of a data set YAML in order; none without one."""
    if data is None:
        return []
    names = load_dataset_yaml(data).names
    return [names[index] for index in range(len(names))]


def report(file: Path) -> None:
    LOGGER.info(f"Train with: python train.py --data {file}")


def split_of(options: argparse.Namespace) -> tuple[DatasetSpec, list[str]]:
    """The data set and the images of the chosen split."""
    spec = prepare_dataset(load_dataset_yaml(options.data))
    return spec, list_images(spec.split(options.split))


def yolo_voc_command(options: argparse.Namespace) -> None:
    """yolo2voc."""
    spec, images = split_of(options)
    counts = yolo_to_voc(
        images, spec.names, options.output, options.split, corners=options.corners, transfer=options.transfer
    )
    LOGGER.info(f"{options.output}: {counts}")


def yolo_coco_command(options: argparse.Namespace) -> None:
    """yolo2coco."""
    spec, images = split_of(options)
    if options.coco_numbers and spec.nc != len(COCO_CATEGORY_IDS):
        raise UserError(f"--coco-numbers: {spec.yaml_file} has {spec.nc} classes, COCO {len(COCO_CATEGORY_IDS)}.")
    content, counts = yolo_to_coco(images, spec.names, COCO_CATEGORY_IDS if options.coco_numbers else None)
    write_lines(options.output, [json.dumps(content, ensure_ascii=False)])
    LOGGER.info(f"{options.output}: {counts}")


COMMANDS = {
    "voc2yolo": voc_command,
    "coco2yolo": coco_command,
    "yolo2voc": yolo_voc_command,
    "yolo2coco": yolo_coco_command,
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_arguments(arguments)
    return exit_code("convert", lambda: COMMANDS[options.command](options))


if __name__ == "__main__":
    sys.exit(main())
