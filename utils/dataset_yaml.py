"""The data set YAML: where the images of each split are and what the classes are called."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data import GENERATORS
from utils.errors import UserError
from utils.paths import ROOT

DATASETS_VARIABLE = "YOLOv5_DATASETS_DIR"
KNOWN_KEYS = frozenset({"path", "train", "val", "test", "names", "nc", "download", "generate", "defaults"})


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
        download: where the data set can be had, or ''; only ever shown.
    """

    train: list[str]
    val: list[str]
    test: list[str]
    names: dict[int, str]
    path: Path
    yaml_file: Path
    defaults: dict[str, Any] = field(default_factory=dict)
    generate: str = ""
    download: str = ""

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

    def check(self) -> None:
        """Raises UserError where a folder or list file of train or val is missing."""
        missing = [path for path in self.train + self.val if not os.path.exists(path)]
        if missing:
            hint = f" It can be downloaded as the YAML says: {self.download.strip()}" if self.download else ""
            raise UserError(
                f"{self.yaml_file}: {', '.join(missing)} not found. Put the images there, or correct 'path' "
                f"(now {self.path}), 'train' or 'val'.{hint}"
            )


def find_dataset_yaml(name: str | Path) -> Path:
    """The YAML file that a --data argument means: as given, below the project's root, or in its ``data`` folder."""
    given = Path(name).expanduser()
    for candidate in (given, ROOT / given, ROOT / "data" / given):
        if candidate.is_file():
            return candidate.resolve()
    raise UserError(f"{name}: no such data set YAML, neither here nor in {ROOT / 'data'}.")


def load_dataset_yaml(path: str | Path) -> DatasetSpec:
    """Reads a data set YAML.

    A relative ``path`` is looked for beside the YAML, in the working directory, below the project's root and below
    ``$YOLOv5_DATASETS_DIR``; ``.`` is the YAML's own folder. A generated data set's is below the project's root.

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
    if not isinstance(defaults, Mapping):
        raise UserError(f"{file}: 'defaults' must be a mapping of option to value.")
    spec = DatasetSpec(
        **{split: _resolve_split(content.get(split), split, root, file) for split in ("train", "val", "test")},
        names=_read_names(content, file),
        path=root,
        yaml_file=file,
        defaults=dict(defaults),
        generate=str(content.get("generate") or ""),
        download=str(content.get("download") or ""),
    )
    if not spec.generate:
        spec.check()
    return spec


def prepare_dataset(spec: DatasetSpec) -> DatasetSpec:
    """Draws a data set whose YAML has ``generate: NAME`` unless it is there already, and checks that the files exist.

    Raises:
        UserError: no generator of this name, or train or val images missing.
    """
    if spec.generate:
        if spec.generate not in GENERATORS:
            known = ", ".join(sorted(GENERATORS))
            raise UserError(f"{spec.yaml_file}: generate: {spec.generate} is not known. Known are: {known}.")
        GENERATORS[spec.generate](spec.path)
    spec.check()
    return spec


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig", errors="replace"))
    except yaml.YAMLError as error:
        raise UserError(f"{file}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: is not a mapping with the keys train, val and names.")
    return content


def _resolve_root(path: str, file: Path, generated: bool) -> Path:
    given = Path(str(path)).expanduser()
    if given.is_absolute():
        return given
    if generated:
        return ROOT / given
    if str(path) == ".":
        return file.parent
    places = [file.parent / given, Path.cwd() / given, ROOT / given]
    if os.environ.get(DATASETS_VARIABLE):
        # Upstream's YAMLs say ../datasets/NAME; the variable stands for that datasets folder.
        inside = [part for part in given.parts if part not in ("..", "datasets")]
        places.insert(0, Path(os.environ[DATASETS_VARIABLE]).joinpath(*inside))
    return Path(os.path.abspath(next((place for place in places if place.exists()), places[-1])))


def _resolve_split(value: Any, key: str, root: Path, file: Path) -> list[str]:
    values = value if isinstance(value, list) else [value] if value else []
    if not all(isinstance(item, str) for item in values):
        raise UserError(f"{file}: '{key}' must be a folder, a .txt list, or a list of those.")
    return [os.path.abspath(root / item) for item in values]


def _read_names(content: Mapping[str, Any], file: Path) -> dict[int, str]:
    names = content["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or set(names) != set(range(len(names))):
        raise UserError(f"{file}: 'names' must be a list, or a mapping that numbers the classes 0, 1, 2 ...")
    if "nc" in content and content["nc"] != len(names):
        raise UserError(f"{file}: 'nc' is {content['nc']} but there are {len(names)} names. Remove 'nc' or correct it.")
    return {index: str(names[index]) for index in range(len(names))}
