"""The grid files of benchmarks/accuracy.py: which trainings there are, and in which order."""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from quant.recipe import parse_bits
from quant.registry import QUANTIZERS
from utils.errors import UserError
from utils.yaml_file import read_yaml


@dataclass(frozen=True)
class Variant:
    """What a row adds to its method.

    Attributes:
        flags: of train.py.
        recipe: quantization recipe: a mapping, or the name of one in quant/recipes.
        hyp: hyperparameters that differ from the data set's.
        stages: pairs [bits, epochs] that are trained with first, each stage from the one before; they come off the
            row's epochs (progressive bits). The recipe has to learn from the float network.
        against: the variant that its gain is over.
    """

    flags: list[str] = field(default_factory=list)
    recipe: dict[str, Any] | str | None = None
    hyp: dict[str, float] = field(default_factory=dict)
    stages: list[list] = field(default_factory=list)
    against: str = "base"


# Those that every grid has; a grid's `variants` add others.
VARIANTS = {
    "base": Variant(),
    "gabfusion": Variant(["--gabfusion"]),
    "ada": Variant(["--ada"]),
    "both": Variant(["--gabfusion", "--ada"]),
}
FLOAT = "float"  # the method of the reference rows, which have neither bits nor variant


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        data: key of the grid's ``data``.
        method: ``float`` for the reference, else a quantizer.
        bits: ``w4a4``; empty for ``float``.
        variant: key of the grid's ``variants``.
        seed: of the training; the float start is one for all.
    """

    data: str
    method: str
    bits: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        parts = [self.data, self.method, self.bits, self.variant, f"seed{self.seed}"]
        return "_".join(part for part in parts if part)


@dataclass
class DataSettings:
    """What is the same for all rows of one data set.

    Attributes:
        yaml: data set YAML.
        split: split that is reported.
        holdout: share of the training images that is taken from them and reported on in place of ``split``, for tuning
            without looking at the images of the final numbers.
        image_size, batch_size: of training and validation.
        cfg: model YAML of the float start; where there are ``weights``, it may be empty for theirs, and another one
            takes over what fits.
        weights: what the float start is trained from (empty: from scratch); under ``float_epochs: 0`` the start itself.
        hyp: hyperparameter YAML.
        float_epochs, epochs: of the start, and of every row (the float reference too).
        optimizer, cosine: as train.py's flags; the optimizer is that of the float start and the float row.
    """

    yaml: str
    split: str = "val"
    holdout: float = 0.0
    image_size: int = 320
    batch_size: int = 16
    cfg: str = ""
    weights: str = ""
    hyp: str = "hyp.finetune.yaml"
    float_epochs: int = 12
    epochs: int = 4
    optimizer: str = "SGD"
    cosine: bool = False


@dataclass
class Grid:
    """A grid file.

    Attributes:
        title: heading of its section in docs/results.md.
        data: name -> settings.
        variants: name -> what it adds.
        cells: the trainings in their order, each once.
    """

    title: str
    data: dict[str, DataSettings] = field(default_factory=dict)
    variants: dict[str, Variant] = field(default_factory=lambda: dict(VARIANTS))
    cells: list[Cell] = field(default_factory=list)


def read_grid(file: Path) -> Grid:
    """Reads and checks a grid file.

    Raises:
        UserError: no such file, unknown key, method, variant or data set.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such grid file")
    values = read_yaml(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: a grid file maps title, data, variants and runs")
    _known(file, "", values, ("title", "data", "variants", "runs"))
    grid = Grid(str(values.get("title", file.stem)))
    for key, cls, into in (("data", DataSettings, grid.data), ("variants", Variant, grid.variants)):
        blocks = values.get(key) or {}
        if not isinstance(blocks, dict) or not all(isinstance(block, (dict, type(None))) for block in blocks.values()):
            raise UserError(f"{file}: {key}: maps names to settings, see benchmarks/grids/core.yaml")
        for name, settings in blocks.items():
            _known(file, f"{key}.{name}.", settings or {}, [f.name for f in fields(cls)])
            if cls is DataSettings:
                _check_data(f"{file}: data.{name}", settings or {})
            into[str(name)] = cls(**(settings or {}))
    for name, variant in grid.variants.items():
        _check_variant(f"{file}: variants.{name}", variant)
        if variant.against not in grid.variants:
            known = ", ".join(grid.variants)
            raise UserError(f"{file}: variants.{name}.against: {variant.against!r} is no variant; known here: {known}")
    runs = values.get("runs") or []
    if not isinstance(runs, list) or not all(isinstance(block, dict) for block in runs):
        raise UserError(f"{file}: runs: is a list of mappings such as {{method: lsq, bits: w4a4, seed: 0}}")
    for number, block in enumerate(runs, 1):
        grid.cells += _cells(block, grid, f"{file}: runs: entry {number}")
    grid.cells = list(dict.fromkeys(grid.cells))
    for cell in grid.cells:
        stages, epochs = grid.variants[cell.variant or "base"].stages, grid.data[cell.data].epochs
        before = sum(length for _, length in stages)
        if stages and before >= epochs:
            raise UserError(
                f"{file}: variants.{cell.variant}.stages: their {before} epochs leave none of {cell.data}'s {epochs} "
                "for the row's own bits"
            )
    if not grid.cells:
        raise UserError(f"{file}: runs is empty, there is nothing to train")
    return grid


def _check_data(where: str, settings: dict[str, Any]) -> None:
    if not isinstance(settings.get("yaml"), str):
        raise UserError(f"{where}.yaml: names the data set's YAML file; every data set needs it")
    for item in fields(DataSettings):
        if item.name == "yaml" or item.name not in settings:
            continue
        value, kind = settings[item.name], type(item.default)
        number = kind is float and type(value) in (int, float)
        if not number and type(value) is not kind:
            raise UserError(f"{where}.{item.name}: {value!r} is not of the kind of {item.default!r}, its default")
    if not 0 <= settings.get("holdout", 0.0) < 1:
        raise UserError(f"{where}.holdout: {settings['holdout']!r} is not a share of the training images, 0 to 1")


def _check_variant(where: str, variant: Variant) -> None:
    kinds = {"flags": list, "recipe": (dict, str, type(None)), "hyp": dict, "stages": list}
    for key, kind in kinds.items():
        if not isinstance(getattr(variant, key), kind):
            raise UserError(
                f"{where}.{key}: {getattr(variant, key)!r} is not what belongs here, see benchmarks/grid.py"
            )
    for stage in variant.stages:
        pair = isinstance(stage, list) and len(stage) == 2 and isinstance(stage[0], str) and type(stage[1]) is int
        if not pair or stage[1] < 1:
            raise UserError(f"{where}.stages: {stage!r} is no pair of bits and epochs such as [w6a6, 2]")
        try:
            parse_bits(stage[0])
        except UserError as error:
            raise UserError(f"{where}.stages: {error}") from None
    bits = [bits for bits, _ in variant.stages]
    if len(set(bits)) < len(bits):
        raise UserError(f"{where}.stages: {', '.join(bits)}: each stage needs bits of its own")
    alone = isinstance(variant.recipe, dict) and variant.recipe.get("distillation") is False
    fused = isinstance(variant.recipe, dict) and variant.recipe.get("gabfusion")
    if bits and ("--gabfusion" in variant.flags or fused or alone):
        raise UserError(
            f"{where}.stages: each stage starts from the weights behind the last one's codes and learns from the float "
            "network, which neither --gabfusion nor distillation: false allows"
        )


def _known(file: Path, path: str, values: dict, names: tuple | list) -> None:
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"
            raise UserError(f"{file}: unknown key {path}{key!r}; {hint}")


def _cells(block: dict[str, Any], grid: Grid, where: str) -> list[Cell]:
    """The product of a block's lists; the key that is written last varies fastest."""
    names = [f.name for f in fields(Cell)]
    _known(Path(where), "", block, names)
    lists = {key: value if isinstance(value, list) else [value] for key, value in block.items()}
    defaults = {"method": [FLOAT], "data": list(grid.data), "bits": ["w4a4"], "variant": ["base"], "seed": [0]}
    lists |= {key: value for key, value in defaults.items() if key not in lists}
    choices = {"data": list(grid.data), "method": [FLOAT, *QUANTIZERS], "variant": list(grid.variants)}
    for key, allowed in choices.items():
        for value in lists[key]:
            if value not in allowed:
                raise UserError(f"{where}: {key}: {value!r} is not possible; choose one of {', '.join(allowed)}")
    for bits in lists["bits"]:
        if bits != "w{}a{}".format(*parse_bits(bits)):
            raise UserError(f"{where}: bits: {bits!r}: write them as in w4a8, since rows are named by them")
    for seed in lists["seed"]:
        if type(seed) is not int:
            raise UserError(f"{where}: seed: {seed!r} is not a whole number")
    cells = [Cell(**dict(zip(lists, values, strict=True))) for values in itertools.product(*lists.values())]
    return [Cell(c.data, FLOAT, "", "", c.seed) if c.method == FLOAT else c for c in cells]
