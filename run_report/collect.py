"""Reads what a run left in its folder. Files of older versions, or of a run that was stopped, may be absent."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from exporting.record import read_record
from utils.errors import UserError
from utils.run_log import read_results

SUMMARY = "summary.json"  # the table at the end of a quantized run
MAP50, MAP = "metrics/mAP_0.5", "metrics/mAP_0.5:0.95"


@dataclass
class RunFiles:
    """A run's folder, read.

    Attributes:
        folder: the run's.
        options, hyp, quantization: contents of opt.yaml, hyp.yaml and quant.yaml ({} if absent).
        float_rows, rows: epochs of float_results.csv and results.csv: column -> value.
        layers: rows of layers.csv as text; the last two are the totals, quantized and float.
        accuracy: (name, mAP50, mAP50-95, bytes) from the float network to the final one; bytes 0 where unknown.
        files: (path relative to the folder, bytes) of weights and exported files.
        exports: what ``export.py`` noted about the files it wrote (``exporting.record``).
    """

    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    hyp: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    float_rows: list[dict[str, float]] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)
    layers: list[dict[str, str]] = field(default_factory=list)
    accuracy: list[tuple[str, float, float, int]] = field(default_factory=list)
    files: list[tuple[str, int]] = field(default_factory=list)
    exports: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def gap(self) -> float | None:
        """Points of mAP50 between the last network and the first."""
        return (self.accuracy[-1][1] - self.accuracy[0][1]) * 100 if len(self.accuracy) > 1 else None

    @property
    def float_weights(self) -> Path | None:
        """The float network that this run was quantized from, if its file is still there."""
        given = [self.options.get("teacher"), self.options.get("weights")]
        candidates = [self.folder / "weights" / "float_best.pt", *(Path(file) for file in given if file)]
        return next((file for file in candidates if file.is_file()), None)

    @property
    def best_weights(self) -> Path | None:
        """The run's final network."""
        files = (self.folder / "weights" / name for name in ("best.pt", "last.pt"))
        return next((file for file in files if file.is_file()), None)

    @property
    def nodes(self) -> dict[str, int]:
        """Fusion node -> its number of branches, from the columns of results.csv."""
        found: dict[str, int] = {}
        for column in self.rows[0] if self.rows else ():
            node, _, value = column.rpartition("/factor")
            if node and value.isdigit():
                found[node] = max(found.get(node, 0), int(value) + 1)
        return found


def read_run(folder: str | Path) -> RunFiles:
    """Reads the run in ``folder``.

    Raises:
        UserError: no such folder, or one without opt.yaml and results.csv.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; training writes them to runs/train/")
    if not (folder / "opt.yaml").is_file() and not (folder / "results.csv").is_file():
        raise UserError(f"{folder}: neither opt.yaml nor results.csv is there, so this is no run of train.py")
    run = RunFiles(folder, *(_read_yaml(folder / f"{name}.yaml") for name in ("opt", "hyp", "quant")))
    run.rows = _read_epochs(folder / "results.csv")
    run.float_rows = _read_epochs(folder / "float_results.csv")
    if (folder / "layers.csv").is_file():
        with (folder / "layers.csv").open(newline="", encoding="utf-8") as stream:
            run.layers = list(csv.DictReader(stream))
    run.accuracy = _accuracy(run)
    weights = sorted((folder / "weights").rglob("*")) if (folder / "weights").is_dir() else []
    kept = [path for path in weights if path.is_file() and path.suffix in (".pt", ".onnx", ".bin", ".torchscript")]
    run.files = [(str(path.relative_to(folder)), path.stat().st_size) for path in kept]
    run.exports = read_record(folder / "weights")
    return run


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as YAML: {error}") from None
    return values if isinstance(values, dict) else {}


def _read_epochs(file: Path) -> list[dict[str, float]]:
    if not file.is_file():
        return []
    try:
        return read_results(file)
    except (ValueError, csv.Error, AttributeError) as error:
        raise UserError(
            f"{file}: a row is damaged ({error}); the run's other files are fine, remove that row"
        ) from None


def _accuracy(run: RunFiles) -> list[tuple[str, float, float, int]]:
    """The final table: as it was printed, or for runs without it the best epochs."""
    file = run.folder / SUMMARY
    if file.is_file():
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
            return [(str(r["name"]), float(r["mAP50"]), float(r["mAP"]), int(r["bytes"])) for r in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is damaged ({error!r}); remove it, and the best epochs are shown instead"
            ) from None
    found = []
    for name, rows in (("float, best epoch", run.float_rows), ("best epoch", run.rows)):
        measured = [row for row in rows if MAP50 in row and row.get("quant/deployable", 1)]
        if measured:
            best = max(measured, key=lambda row: 0.1 * row[MAP50] + 0.9 * row.get(MAP, 0.0))
            found.append((name, best[MAP50], best.get(MAP, 0.0), 0))
    return found
