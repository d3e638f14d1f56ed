"""The data set YAML: where the images of each split are and what the classes are called."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import GENERATORS
from utils.dataset_download import fetch_dataset, read_plan
from utils.errors import UserError
from utils.paths import ROOT, WORK
from utils.yaml_file import read_yaml

DATASETS_VARIABLE = "YOLOv5_DATASETS_DIR"
KNOWN_KEYS = frozenset(
    {"path", "train", "val", "test", "names", "nc", "download", "convert", "evaluation", "generate", "defaults"}
)
EVALUATIONS = ("", "voc")


@dataclass
class DatasetSpec:
    """A data set YAML with its paths resolved.

    Attributes:
        train, val, test: lists of absolute folders or list files; ``test`` may be empty.
        names: class index to name, 0 .. nc - 1.
        path: the root folder.
        yaml_file: the YAML that this came from.
        defaults: options of an entry point that hold where the user gave no flag.
        generate: the name of the drawing that makes the data set (``data.GENERATORS``), or ''.
        download, convert: where the data set can be had and what it is converted from, as in the YAML; see
            ``utils.dataset_download``.
        evaluation: 'voc' where PASCAL VOC's own scores belong beside the others, or ''.
    """

    train: list[str]
    val: list[str]
    test: list[str]
    names: dict[int, str]
    path: Path
    yaml_file: Path
    defaults: dict[str, Any] = field(default_factory=dict)
    generate: str = ""
    download: Any = None
    convert: Any = None
    evaluation: str = ""

    @property
    def nc(self) -> int:
        return len(self.names)

    @property
    def is_coco(self) -> bool:
        """Whether the validation images are COCO's val2017, whose annotations number the classes 1 to 90."""
        return any(Path(split).as_posix().endswith("coco/val2017.txt") for split in self.val)

    def split(self, name: str) -> list[str]:
        """The paths of 'train', 'val' or 'test'.

        Raises:
            UserError: the YAML does not have this split.
        """
        paths = getattr(self, name)
        if not paths:
            raise UserError(f"{self.yaml_file}: has no '{name}' images. Add the key, or choose another split.")
        return paths

    @property
    def missing(self) -> list[str]:
        """The folders and list files of train and val that are not there."""
        return [path for path in dict.fromkeys(self.train + self.val) if not os.path.exists(path)]

    def check(self) -> None:
        """Raises UserError where a folder or list file of train or val is missing."""
        if self.missing:
            raise UserError(
                f"{self.yaml_file}: {', '.join(self.missing)} not found. Put the images there, or correct 'path' "
                f"(now {self.path}), 'train' or 'val'."
            )


def find_dataset_yaml(name: str | Path) -> Path:
    """The YAML file that a --data argument means: as given, below the project's root, or in its ``data`` folder."""
    given = Path(name).expanduser()
    for candidate in (given, ROOT / given, ROOT / "data" / given):
        if candidate.is_file():
            return candidate.resolve()
    known = {file.name.lower(): file.name for file in sorted((ROOT / "data").glob("*.yaml"))}
    near = difflib.get_close_matches(given.name.lower(), known, 1, cutoff=0.7)
    advice = f"did you mean {known[near[0]]}?" if near else f"these come along: {', '.join(known.values())}"
    raise UserError(f"{name}: no such data set YAML, neither in {Path.cwd()} nor in {ROOT / 'data'}; {advice}")


def load_dataset_yaml(path: str | Path) -> DatasetSpec:
    """Reads a data set YAML.

    A relative ``path`` is looked for beside the YAML, in the working directory, below the project's root and below
    ``$YOLOv5_DATASETS_DIR``; ``.`` is the YAML's own folder. Without ``path`` that folder is meant too or, where it
    does not hold the images, the working directory or the project's root. A generated data set's ``path`` is below the
    project's root. Where there is ``download``, the images need not be there yet: see ``prepare_dataset``.

    Raises:
        UserError: file or folders missing, keys missing or unknown, ``names`` and ``nc`` that do not fit.
    """
    file = find_dataset_yaml(path)
    content = _read_mapping(file)
    unknown = sorted(set(map(str, content)) - KNOWN_KEYS)
    if unknown and "generate" in content:
        raise UserError(f"{file}: unknown keys {', '.join(unknown)}. Known are {', '.join(sorted(KNOWN_KEYS))}.")
    for key in ("train", "val", "names"):
        if not content.get(key):
            raise UserError(f"{file}: key '{key}' is missing. A data set YAML needs train, val and names.")
    root = _resolve_root(content.get("path") or "", file, bool(content.get("generate")))
    defaults = content.get("defaults") or {}
    if not isinstance(defaults, Mapping) or not all(isinstance(key, str) for key in defaults):
        raise UserError(f"{file}: 'defaults' must be a mapping of option to value.")
    roots = [root] if content.get("path") else [root, Path.cwd(), WORK]
    spec = DatasetSpec(
        **{split: _resolve_split(content.get(split), split, roots, file) for split in ("train", "val", "test")},
        names=_read_names(content, file),
        path=root,
        yaml_file=file,
        defaults=dict(defaults),
        generate=str(content.get("generate") or ""),
        download=content.get("download"),
        convert=content.get("convert"),
        evaluation=str(content.get("evaluation") or ""),
    )
    if spec.evaluation not in EVALUATIONS:
        raise UserError(f"{file}: evaluation: {spec.evaluation} is not known. Known is voc.")
    if not spec.generate and not spec.download:
        spec.check()
    return spec


def prepare_dataset(spec: DatasetSpec, fetch: bool = True) -> DatasetSpec:
    """Draws a data set whose YAML has ``generate: NAME``, fetches one that has ``download`` unless its train and val
    images are there already, and checks that the files exist.

    Args:
        fetch: whether anything may be downloaded.

    Raises:
        UserError: no generator of this name, a download that is a script or that fails, train or val images missing.
    """
    if spec.generate:
        if spec.generate not in GENERATORS:
            known = ", ".join(sorted(GENERATORS))
            raise UserError(f"{spec.yaml_file}: generate: {spec.generate} is not known. Known are: {known}.")
        GENERATORS[spec.generate](spec.path)
    elif spec.download and spec.missing and fetch:
        plan = read_plan(spec.yaml_file, spec.download, spec.convert, spec.names)
        fetch_dataset(plan, spec.path, [Path(path) for path in spec.train + spec.val])
    spec.check()
    return spec


def _read_mapping(file: Path) -> dict[str, Any]:
    content = read_yaml(file, errors="replace")
    if not isinstance(content, dict):
        raise UserError(f"{file}: is not a mapping with the keys train, val and names.")
    return content


def _resolve_root(path: str, file: Path, generated: bool) -> Path:
    if not isinstance(path, str) or "\0" in path:
        raise UserError(f"{file}: 'path' must be a folder, not {path!r}.")
    try:
        given = Path(path).expanduser()
    except RuntimeError as error:  # ~ and a user that does not exist
        raise UserError(f"{file}: path: {path}: {error}.") from None
    if given.is_absolute():
        return given
    if generated:
        return WORK / given
    if str(path) == ".":
        return file.parent
    places = [file.parent / given, Path.cwd() / given, WORK / given]
    if os.environ.get(DATASETS_VARIABLE):
        # Upstream's YAMLs say ../datasets/NAME; the variable stands for that datasets folder.
        inside = [part for part in given.parts if part not in ("..", "datasets")]
        places.insert(0, Path(os.environ[DATASETS_VARIABLE]).joinpath(*inside))
    default = places[0] if os.environ.get(DATASETS_VARIABLE) else places[-1]  # where a download goes
    return Path(os.path.abspath(next((place for place in places if place.exists()), default)))


def _resolve_split(value: Any, key: str, roots: list[Path], file: Path) -> list[str]:
    """Absolute paths of a split: below the first root that holds it, else below the first."""
    values = value if isinstance(value, list) else [value] if value else []
    if not all(isinstance(item, str) and "\0" not in item for item in values):
        raise UserError(f"{file}: '{key}' must be a folder, a .txt list, or a list of those.")
    found = []
    for item in values:
        # Exports of labelling services say ../train/images, meant for a YAML one folder deeper than where they put it.
        places = [os.path.abspath(root / name) for name in (item, item.removeprefix("../")) for root in roots]
        found.append(next((place for place in places if os.path.exists(place)), places[0]))
    return found


def _are_numbered(names: object) -> bool:
    """Whether a mapping has the keys 0, 1, 2 ...; True and 1.0 are equal to 1, but no numbers of classes."""
    return isinstance(names, dict) and set(names) == set(range(len(names))) and all(type(key) is int for key in names)


def _read_names(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    names = content["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not _are_numbered(names):
        raise UserError(f"{file}: 'names' must be a list, or a mapping that numbers the classes 0, 1, 2 ...")
    if "nc" in content and content["nc"] != len(names):
        raise UserError(f"{file}: 'nc' is {content['nc']} but there are {len(names)} names. Remove 'nc' or correct it.")
    return {index: str(names[index]) for index in range(len(names))}
