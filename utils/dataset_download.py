"""Fetches a data set that its YAML says where to find: downloads, unpacks and converts it, and moves it into place.

A YAML declares this as data. Nothing in it is ever run: a ``download:`` that is a script, as some YAMLs made for YOLOv5
have, is refused.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from utils.archives import unpack
from utils.convert.coco import coco_to_yolo, read_annotations
from utils.convert.files import safe_name
from utils.convert.voc import CORNERS, voc_to_yolo
from utils.downloads import DIGEST_LENGTHS, download, file_name, parse_checksum
from utils.errors import UserError
from utils.log import LOGGER
from utils.paths import ROOT

ARCHIVE_KEYS = frozenset({"url", "into", *DIGEST_LENGTHS})
CONVERT_KEYS = {"voc": {"format", "source", "sets", "corners"}, "coco": {"format", "source", "sets", "segments"}}


@dataclass(frozen=True)
class Archive:
    """One file to fetch: a zip or tar archive, and the folder below the data set's root that it unpacks to."""

    url: str
    checksum: str = ""
    into: str = ""


@dataclass(frozen=True)
class Conversion:
    """How what was unpacked becomes YOLO's layout; ``sets`` maps a set's name to where its annotations are."""

    format: str
    sets: dict[str, str]
    source: str = ""
    corners: str = "pixels"
    segments: bool = False


@dataclass(frozen=True)
class Plan:
    """All that a YAML declares of where its data comes from."""

    yaml_file: Path
    archives: tuple[Archive, ...]
    conversion: Conversion | None = None
    names: dict[int, str] = field(default_factory=dict)


def read_plan(yaml_file: Path, declared: Any, convert: Any, names: Mapping[int, str]) -> Plan:
    """Checks the ``download`` and ``convert`` keys of a data set YAML.

    ``download`` is a URL, a list of URLs, or a list of mappings with the key ``url`` and, if wanted, ``md5``, ``sha1``
    or ``sha256``, and ``into``.

    Raises:
        UserError: a script instead of addresses; unknown keys or values.
    """
    items = declared if isinstance(declared, list) else [declared]
    if not items:
        raise UserError(f"{yaml_file}: download: is an empty list.")
    archives = tuple(_archive(item, f"{yaml_file}: download", yaml_file) for item in items)
    files = [file_name(archive.url) for archive in archives]
    if len(set(files)) < len(files):
        raise UserError(f"{yaml_file}: download: two addresses end in the same file name.")
    return Plan(yaml_file, archives, _conversion(convert, f"{yaml_file}: convert"), dict(names))


def _archive(item: Any, where: str, yaml_file: Path) -> Archive:
    if isinstance(item, str):
        text = item.strip()
        if not re.fullmatch(r"https?://\S+", text):
            raise UserError(f"{where}: {_refused_script(text, yaml_file)}")
        item = {"url": text}
    if not isinstance(item, dict) or not isinstance(item.get("url"), str) or set(item) - ARCHIVE_KEYS:
        keys = ", ".join(sorted(ARCHIVE_KEYS - {"url"}))
        raise UserError(f"{where}: {item!r} is neither an address nor a mapping with 'url' (and {keys}).")
    file_name(item["url"])
    checksums = [f"{key}:{item[key]}" for key in DIGEST_LENGTHS if key in item]
    for checksum in checksums:
        parse_checksum(checksum, where)
    into = str(item.get("into") or "")
    if into:
        safe_name(into, yaml_file, folders=True)
    return Archive(item["url"], checksums[-1] if checksums else "", into)  # the last is the strongest


def _refused_script(text: str, yaml_file: Path) -> str:
    ours = ROOT / "data" / yaml_file.name
    first = text.splitlines()[0] if text else ""
    refusal = f"is a script ('{first[:60]}' ...), and nothing in a YAML is ever run."
    if ours.is_file() and ours.resolve() != yaml_file.resolve():
        return f"{refusal} Use --data {ours} instead, which declares the same download as data."
    return (
        f"{refusal} Put the addresses of zip or tar files there, as docs/datasets.md shows, or fetch the data yourself."
    )


def _conversion(convert: Any, where: str) -> Conversion | None:
    if convert is None:
        return None
    known = CONVERT_KEYS.get(str(convert.get("format"))) if isinstance(convert, dict) else None
    if known is None or set(convert) - known:
        raise UserError(
            f"{where}: must be a mapping with 'format: voc' or 'format: coco', 'sets', and for voc 'source' and "
            f"'corners', for coco 'source' and 'segments'; it is {convert!r}."
        )
    sets = convert.get("sets")
    if (
        not isinstance(sets, dict)
        or not sets
        or not all(isinstance(item, str) for pair in sets.items() for item in pair)
    ):
        raise UserError(f"{where}: 'sets' must map the name of each set to where its annotations are.")
    for place in (*sets.values(), *filter(None, [convert.get("source")])):
        safe_name(place, Path(where), folders=True)
    for name in sets:
        safe_name(name, Path(where))
    corners, segments = convert.get("corners", "pixels"), convert.get("segments", False)
    if corners not in CORNERS or not isinstance(segments, bool):
        raise UserError(f"{where}: 'corners' is one of {', '.join(CORNERS)}; 'segments' is true or false.")
    return Conversion(convert["format"], dict(sets), convert.get("source") or "", corners, segments)


def fetch_dataset(plan: Plan, root: Path, expected: Sequence[Path]) -> None:
    """Makes the data set's folder ``root``; it appears complete or not at all.

    Archives are kept in a folder beside it until all is done, so that an interrupted call goes on where it was.

    Args:
        expected: the folders and lists below ``root`` that must be there in the end.

    Raises:
        UserError: ``root`` holds something else; a download, an archive or a conversion fails.
    """
    work = root.with_name(f"{root.name}.download")
    try:
        _refuse_occupied(plan, root, expected)
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / ".lock"):  # several processes may start with the same data
            if not all(path.exists() for path in expected):  # another process may have been faster
                _refuse_occupied(plan, root, expected)
                os.replace(_checked(_build(plan, root, work), plan, root, expected), root)
        shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{error.filename or root}: cannot be written ({error.strerror or error}). Correct permissions, or have "
            "data sets elsewhere: $YOLOv5_DATASETS_DIR."
        ) from None
    LOGGER.info(f"The data set is complete: {root}")


def _refuse_occupied(plan: Plan, root: Path, expected: Sequence[Path]) -> None:
    occupied = root.exists() and any(root.iterdir())
    # Asked in this order: a folder that another process has just moved here is complete.
    missing = dict.fromkeys(str(path) for path in expected if not path.exists())
    if occupied and missing:
        raise UserError(
            f"{plan.yaml_file}: {', '.join(missing)} not found, and nothing is downloaded into {root}, "
            "because it holds other files. Move it away, complete it, or correct 'path'."
        )


def _checked(finished: Path, plan: Plan, root: Path, expected: Sequence[Path]) -> Path:
    """``finished``, if it has what the YAML promises."""
    relative = dict.fromkeys(path.relative_to(root) for path in expected if path.is_relative_to(root))
    absent = [path for path in relative if not (finished / path).exists()]
    if absent:
        found = ", ".join(sorted(item.name for item in finished.iterdir())[:10])
        raise UserError(
            f"{plan.yaml_file}: what was downloaded has no {', '.join(map(str, absent))}; it has {found}. Correct the "
            f"YAML; the files are in {finished.parent}."
        )
    return finished


def _build(plan: Plan, root: Path, work: Path) -> Path:
    """Downloads, unpacks and converts in ``work``; returns the finished folder."""
    addresses = "\n  ".join(archive.url for archive in plan.archives)
    LOGGER.info(f"{plan.yaml_file.name} is not at {root}: it is fetched from\n  {addresses}")
    files = [download(archive.url, work / file_name(archive.url), archive.checksum) for archive in plan.archives]
    unpacked, converted = work / "unpacked", work / "converted"
    for stale in (unpacked, converted):  # of a call that was interrupted while it unpacked
        if stale.exists():
            shutil.rmtree(stale)
    for archive, file in zip(plan.archives, files, strict=True):
        LOGGER.info(f"Unpacking {file.name}")
        unpack(file, unpacked / archive.into)
    # An archive holds the data set's folder, or only what is in it.
    inner = unpacked / root.name
    top = inner if inner.is_dir() else unpacked
    if plan.conversion is None:
        return top
    source = (top if (top / plan.conversion.source).is_dir() else unpacked) / plan.conversion.source
    if plan.conversion.format == "voc":
        _convert_voc(plan, source, converted)
        return converted
    _convert_coco(plan, source)
    return source


def _convert_voc(plan: Plan, source: Path, output: Path) -> None:
    names = [plan.names[index] for index in sorted(plan.names)]
    for name, place in plan.conversion.sets.items():
        folder, _, image_set = place.rpartition("/")
        counts = voc_to_yolo(
            source / folder, image_set, output, name, names, corners=plan.conversion.corners, transfer="move"
        )
        LOGGER.info(f"{name}: {counts}")


def _convert_coco(plan: Plan, source: Path) -> None:
    names = [plan.names[index] for index in sorted(plan.names)]
    for name, place in plan.conversion.sets.items():
        annotations = read_annotations(source / place, plan.conversion.segments)
        images = source / "images" / name
        counts = coco_to_yolo(
            annotations, images, source, name, names, segments=plan.conversion.segments, transfer=None
        )
        LOGGER.info(f"{name}: {counts}")
