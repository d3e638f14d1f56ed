"""``--evolve``: a genetic search for hyperparameters, one whole training per generation.

Every generation takes one of the five best sets so far, by chance in proportion to fitness, and multiplies some of its
values with random factors. ``evolve.csv`` in the folder of the search holds what was tried, ``hyp_evolve.yaml`` the
best of it, which ``--hyp`` takes. A search that was interrupted goes on with ``--resume_evolve path/to/evolve.csv``.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from training.options import apply_defaults, check_options
from utils.dataset_yaml import load_dataset_yaml
from utils.errors import UserError
from utils.hyp import load_hyp
from utils.log import LOGGER
from utils.metrics import fitness
from utils.paths import WORK, results_folder
from utils.plots import plot_evolution
from utils.run_log import COLUMNS, WIDTH, read_results

METRICS = COLUMNS[3:10]  # precision to the validation losses
PARENTS = 5
MUTATION_PROBABILITY = 0.8
MUTATION_DEVIATION = 0.2
LARGEST_CHANGE = 0.3, 3.0  # factors in one generation


@dataclass(frozen=True)
class Gene:
    """Bounds of a hyperparameter, and how strongly it mutates (0: not at all)."""

    low: float
    high: float
    strength: float = 1.0


# A value that is 0 stays 0, because mutations are factors: what is switched off stays so unless --hyp switches it on.
FLOAT_GENES = {
    "lr0": Gene(1e-5, 1e-1),
    "lrf": Gene(0.01, 1.0),
    "momentum": Gene(0.6, 0.98, 0.3),
    "weight_decay": Gene(0.0, 0.001),
    "warmup_epochs": Gene(0.0, 5.0),
    "warmup_momentum": Gene(0.0, 0.95),
    "warmup_bias_lr": Gene(0.0, 0.2),
}
SHARED_GENES = {
    "box": Gene(0.02, 0.2),
    "cls": Gene(0.2, 4.0),
    "cls_pw": Gene(0.5, 2.0),
    "obj": Gene(0.2, 4.0),
    "obj_pw": Gene(0.5, 2.0),
    "anchor_t": Gene(2.0, 8.0),
    "anchors": Gene(2.0, 10.0, 2.0),
    "fl_gamma": Gene(0.0, 2.0),
    "hsv_h": Gene(0.0, 0.1),
    "hsv_s": Gene(0.0, 0.9),
    "hsv_v": Gene(0.0, 0.9),
    "degrees": Gene(0.0, 45.0),
    "translate": Gene(0.0, 0.9),
    "scale": Gene(0.0, 0.9),
    "shear": Gene(0.0, 10.0),
    "perspective": Gene(0.0, 0.001),
    "flipud": Gene(0.0, 1.0),
    "fliplr": Gene(0.0, 1.0),
    "mosaic": Gene(0.0, 1.0),
    "mixup": Gene(0.0, 1.0),
    "copy_paste": Gene(0.0, 1.0),
}
# The quantized phase starts from a trained network, so its learning rates lie lower.
QUANTIZED_GENES = {
    "quant_lr0": Gene(1e-5, 2e-2),
    "quant_lrf": Gene(0.01, 1.0),
    "quant_momentum": Gene(0.6, 0.98, 0.3),
    "quant_weight_decay": Gene(0.0, 0.001),
    "quant_warmup_epochs": Gene(0.0, 3.0),
    "quant_parameter_lr": Gene(0.05, 10.0),
    "quant_ema_decay": Gene(0.9, 0.9999, 0.05),
    "quant_ema_tau": Gene(10.0, 2000.0),
}


def genes_of(options: argparse.Namespace, hyp: dict[str, float]) -> dict[str, Gene]:
    """What mutates: the hyperparameters of the phases that the run has. Bounds are widened to hold the start."""
    quantized = bool(options.quant or options.recipe)
    float_phase = not quantized or not options.weights or bool(options.float_epochs)
    chosen = (FLOAT_GENES if float_phase else {}) | SHARED_GENES | (QUANTIZED_GENES if quantized else {})
    return {
        key: Gene(min(gene.low, hyp[key]), max(gene.high, hyp[key]), gene.strength)
        for key, gene in chosen.items()
        if key in hyp
    }


def mutate(
    tried: list[dict[str, float]], scores: list[float], genes: dict[str, Gene], rng: np.random.Generator
) -> dict[str, float]:
    """A new set of hyperparameters from one of the best ``PARENTS`` of those that were tried."""
    scores = np.asarray(scores)
    best = np.argsort(-scores, kind="stable")[:PARENTS]
    weights = scores[best] - scores[best].min() + 1e-6
    parent = tried[int(rng.choice(best, p=weights / weights.sum()))]
    strength = np.array([gene.strength for gene in genes.values()])
    movable = np.array([parent[key] != 0 for key in genes])
    if not movable.any():
        raise UserError("--evolve: every hyperparameter that could change is 0, and 0 stays 0; give another --hyp")
    factors = np.ones(len(genes))
    while not (factors != 1)[movable].any():
        chosen = rng.random(len(genes)) < MUTATION_PROBABILITY
        change = rng.standard_normal(len(genes)) * rng.random() * MUTATION_DEVIATION
        factors = np.clip(1 + strength * chosen * change, *LARGEST_CHANGE)
    child = dict(parent)
    for (key, gene), factor in zip(genes.items(), factors, strict=True):
        # Rounded as evolve.csv is written, so that a search that is continued goes the same way.
        child[key] = float(f"{np.clip(parent[key] * factor, gene.low, gene.high):.5g}")
    return child


class History:
    """The generations in an evolve.csv; ``hyps`` and ``scores`` (fitness) have one entry each."""

    def __init__(self, file: Path, keys: list[str]) -> None:
        self.file, self.keys = file, keys
        self.hyps: list[dict[str, float]] = []
        self.scores: list[float] = []
        self.metrics: list[dict[str, float]] = []
        if file.exists():
            self._read()
        else:
            file.write_text(",".join(f"{name:>{WIDTH}}" for name in (*METRICS, *keys)) + "\n", encoding="utf-8")

    def _read(self) -> None:
        with self.file.open(encoding="utf-8") as stream:
            rows = [{key.strip(): value for key, value in row.items() if key} for row in csv.DictReader(stream)]
        for number, row in enumerate(rows, 2):
            try:
                values = {key: float(row[key]) for key in (*METRICS, *self.keys)}
            except (KeyError, ValueError, TypeError):
                if number == len(rows) + 1 and None in row.values():  # a row that was being written when the run ended
                    break
                raise UserError(
                    f"{self.file}:{number}: does not hold the hyperparameters of this search "
                    f"({', '.join(self.keys[:3])} ...). Continue it with the flags that it was begun with"
                ) from None
            self._take({key: values[key] for key in METRICS}, {key: values[key] for key in self.keys})
        self._write()

    def _take(self, metrics: dict[str, float], hyp: dict[str, float]) -> None:
        self.metrics.append(metrics)
        self.hyps.append(hyp)
        self.scores.append(fitness(metrics["metrics/mAP_0.5"], metrics["metrics/mAP_0.5:0.95"]))

    def _write(self) -> None:
        lines = [",".join(f"{name:>{WIDTH}}" for name in (*METRICS, *self.keys))]
        for metrics, hyp in zip(self.metrics, self.hyps, strict=True):
            lines.append(",".join(f"{value:>{WIDTH}.5g}" for value in (*metrics.values(), *hyp.values())))
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(self.file)

    def add(self, metrics: dict[str, float], hyp: dict[str, float]) -> None:
        """Appends a generation, also to the file."""
        self._take({key: metrics.get(key, 0.0) for key in METRICS}, {key: hyp[key] for key in self.keys})
        self._write()

    @property
    def best(self) -> int:
        """The generation (from 0) with the highest fitness."""
        return int(np.argmax(self.scores))


def evolve(options: argparse.Namespace, train: Callable[[argparse.Namespace], Path]) -> Path:
    """Searches ``options.evolve`` generations; returns the folder with evolve.csv, hyp_evolve.yaml and evolve.png.

    Args:
        train: trains by options and returns the run folder; it is given a run of its own for every generation.

    Raises:
        UserError: as in training; what fails later than the first generation counts as a fitness of 0.
    """
    check_options(options)
    first = copy.copy(options)
    apply_defaults(first, load_dataset_yaml(options.data))
    start = load_hyp(first.hyp)
    genes = genes_of(options, start)
    folder = _folder(options)
    history = History(folder / "evolve.csv", list(start))
    population = [start, *_population(options.evolve_population)]
    for generation in range(len(history.hyps), options.evolve):
        if generation < len(population):
            hyp = {key: population[generation].get(key, value) for key, value in start.items()}
        else:
            rng = np.random.default_rng([options.seed, generation])
            hyp = mutate(history.hyps, history.scores, genes, rng)
        LOGGER.info(f"Generation {generation + 1}/{options.evolve}")
        history.add(_generation(options, train, folder, hyp, required=generation == 0), hyp)
        _save_best(history, folder, options)
    if not history.hyps:
        raise UserError(f"{folder}: nothing was tried yet")
    _save_best(history, folder, options)
    plot_evolution(history.hyps, history.scores, list(genes), folder / "evolve.png")
    best = history.metrics[history.best]
    LOGGER.info(
        f"Best of {len(history.hyps)} generations: {history.best + 1}, mAP50 {best['metrics/mAP_0.5']:.4f}  mAP50-95 "
        f"{best['metrics/mAP_0.5:0.95']:.4f}. Train with: python train.py --hyp {folder / 'hyp_evolve.yaml'}"
    )
    return folder


def _folder(options: argparse.Namespace) -> Path:
    if options.resume_evolve:
        file = Path(options.resume_evolve)
        file = file / "evolve.csv" if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"--resume_evolve {file}: no such file; name the evolve.csv of a search, or its folder")
        return file.parent
    project = Path(options.project or WORK / "runs" / "evolve")
    return results_folder(project, options.name, options.exist_ok)


def _population(folder: str | None) -> list[dict[str, float]]:
    if not folder:
        return []
    files = sorted(Path(folder).glob("*.yaml"))
    if not files:
        raise UserError(f"--evolve_population {folder}: no hyperparameter YAMLs there")
    return [load_hyp(file) for file in files]


def _generation(
    options: argparse.Namespace, train: Callable, folder: Path, hyp: dict[str, float], required: bool
) -> dict[str, float]:
    """Trains with ``hyp`` in the folder of the search and returns the last epoch's metrics, none if it failed."""
    file = folder / "generation.yaml"
    file.write_text(yaml.safe_dump(hyp, sort_keys=False), encoding="utf-8")
    own = copy.copy(options)
    own.hyp, own.project, own.name, own.exist_ok = str(file), str(folder), "generation", True
    own.evolve = own.resume_evolve = own.evolve_population = None
    own.noval = own.nosave = own.noplots = True
    try:
        return read_results(train(own) / "results.csv")[-1]
    except UserError as error:
        if required:
            raise
        LOGGER.warning(f"This generation failed and counts as 0: {error}")
        return {}


def _save_best(history: History, folder: Path, options: argparse.Namespace) -> None:
    metrics = history.metrics[history.best]
    lines = [f"# Best of {len(history.hyps)} generations: number {history.best + 1}, data {options.data}"]
    lines += [f"# {name}: {value:.5g}" for name, value in metrics.items()]
    text = "\n".join(lines) + "\n" + yaml.safe_dump(history.hyps[history.best], sort_keys=False)
    (folder / "hyp_evolve.yaml").write_text(text, encoding="utf-8")
