"""The two phases of a run: float training, then calibration and quantization-aware training."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from models.yolo import DetectionModel
from quant.calibrate import calibrate
from quant.config import QuantConfig
from quant.latent import latent_state
from quant.precision import CHOICE_IMAGES, resolve_auto_bits
from quant.prepare import model_from_checkpoint, prepare
from quant.report import (
    REPORT_IMAGES,
    LayerReport,
    Totals,
    format_report,
    layer_reports,
    totals,
    write_csv,
    write_tensorboard,
)
from quant.samples import thin_out
from training.random_state import seed_everything
from training.run import Phase, Run
from training.screen import BEST, NORMALISED, counted_epochs
from training.trainer import QUANTIZED_EPOCHS, Trainer
from utils import distributed
from utils.anchors import check_anchors
from utils.checkpoint import Weights, load_checkpoint, read_weights, transfer
from utils.downloads import find_weights
from utils.errors import UserError
from utils.log import LOGGER
from utils.paths import write_text_at_once
from val import Evaluation


def build_float_model(
    options: argparse.Namespace, names: dict[int, str], anchors: float | None = None
) -> tuple[DetectionModel, bool]:
    """The float network to start from, and whether its weights already know the data's classes.

    Of quantized weights that a quantized phase starts from these are the ones behind the codes (``quant.latent``).

    ``--cfg`` and the hyperparameters' ``anchors`` replace the anchors of the weights, but for a quantized phase that
    follows without a float one: its network and teacher are as they were trained.

    Raises:
        UserError: missing weights, or quantized ones without a quantized phase.
    """
    if not options.weights:
        model = DetectionModel(options.cfg, nc=len(names), anchors=anchors)
        model.names = names
        return model, False
    weights = read_weights(options.weights)
    options.starts_quantized = bool(weights.quantization)
    if weights.quantization:
        weights = behind_codes(options, weights)
    given_cfg = options.cfg_given
    source = options.cfg if given_cfg else {**weights.model_yaml, "yaml_file": weights.path.name}
    model = DetectionModel(source, nc=len(names), anchors=anchors)
    keep_anchors = given_cfg or anchors is not None
    _, skipped = transfer(model, weights.state_dict, ("anchor",) if keep_anchors else (), options.weights)
    model.names = names
    same_classes = list(weights.names.values()) == list(names.values())
    fits = same_classes and not [name for name in skipped if not name.endswith("anchors")]
    if fits and skipped and (options.quant or options.recipe) and not options.float_phase_asked:
        model.load_state_dict({name: weights.state_dict[name] for name in skipped}, strict=False)
        LOGGER.info(f"Anchors: those of {options.weights} stay, since no float phase follows that could learn others")
    return model, fits


def behind_codes(options: argparse.Namespace, weights: Weights) -> Weights:
    """Quantized ``weights`` as the float ones that they are rounded from."""
    if not (options.quant or options.recipe):
        raise UserError(
            f"--weights {options.weights} is quantized already. Give float weights, --quant to train it on (with other "
            "--bits, perhaps), or continue its run with --resume"
        )
    try:
        state = latent_state(model_from_checkpoint(weights.checkpoint))
    except UserError as error:
        raise UserError(f"--weights {options.weights} is quantized already, and {error}") from None
    return dataclasses.replace(weights, state_dict=state, quantization=None)


def quantized_start(options: argparse.Namespace, device: torch.device) -> DetectionModel | None:
    """The quantized network that the quantized phase starts from, or None where it starts from a float one."""
    if not getattr(options, "starts_quantized", False) or options.needs_float:
        return None
    return model_from_checkpoint(read_weights(options.weights).checkpoint).to(device)


def check_start(options: argparse.Namespace) -> None:
    """Raises UserError where a run that is resumed misses the float weights that it started from."""
    for flag in ("weights", "teacher"):
        file = getattr(options, flag)
        if file and not find_weights(file).is_file():
            raise UserError(
                f"--{flag} {file}, which this run started with, is gone. It is needed to the end, to compare and to "
                f"learn from: put it back at {Path(file).absolute()}"
            )


def load_teacher(file: str, names: dict[int, str]) -> DetectionModel:
    """The float teacher in ``file``, which must know the same classes in the same order."""
    weights: Weights = read_weights(file)
    if weights.quantization:
        raise UserError(f"--teacher {file} is quantized; the teacher must be a float checkpoint")
    if list(weights.names.values()) != list(names.values()):
        raise UserError(
            f"--teacher {file} knows other classes ({', '.join(list(weights.names.values())[:5])} ...) than the data "
            f"({', '.join(list(names.values())[:5])} ...). Train a float model on this data first"
        )
    model = DetectionModel(weights.model_yaml)
    model.load_state_dict(weights.state_dict)
    return model


def check_teacher(file: str, teacher: DetectionModel, model: DetectionModel, config: QuantConfig) -> None:
    """Raises UserError where a teacher's maps cannot be compared with those of ``model``.

    Raw maps (``logits``, ``boxes``) may come from a wider network, feature and attention maps from one of the same
    widths only.
    """
    ada, other = config.ada, config.distillation
    layers = set(ada.layers or model.feature_layers) if ada.enabled else set()
    layers |= set(other.layers or model.feature_layers) if other.weights else set()
    compared = set(layers) if ada.enabled or set(other.weights) - {"logits", "boxes"} else set()
    advice = "Give a teacher that was trained with the same --cfg, or leave --teacher out"
    if max(layers) >= len(teacher.model):
        raise UserError(
            f"--teacher {file} has {len(teacher.model)} layers, and layer {max(layers)} is needed. {advice}"
        )
    side = 2 * max(int(model.stride.max()), 32)
    example, found = torch.zeros(1, model.yaml.get("ch", 3), side, side), []
    for network in (teacher, model):
        was_training = network.training
        with torch.no_grad():
            (_, raw), features = network.eval()(example, features=tuple(sorted(layers)))
        network.train(was_training)
        found.append({f"layer {index}": tuple(features[index].shape[1:]) for index in sorted(compared)})
        found[-1] |= {f"output {level}": tuple(maps.shape[1:]) for level, maps in enumerate(raw)}
    theirs, ours = found
    for name, shape in ours.items():
        if theirs.get(name) != shape:
            raise UserError(
                f"--teacher {file} is of another architecture: its {name} is {theirs.get(name, 'missing')}, the "
                f"network's {shape}. {advice}"
            )
    if len(theirs) > len(ours):
        raise UserError(f"--teacher {file} is of another architecture: it has more outputs. {advice}")


def float_phase(run: Run, model: DetectionModel, resume: dict | None) -> DetectionModel:
    """Trains in float and returns the best averaged network."""
    options = run.options
    quantized_follows = run.config is not None
    phase = Phase("float", options.float_epochs if quantized_follows else options.epochs,
                  "float_" if quantized_follows else "")  # fmt: skip
    if resume is None and not options.noautoanchor:
        train_set = run.train_set
        check_anchors(
            train_set.shapes, train_set.labels, model.detect, options.imgsz, run.hyp["anchor_t"], options.seed
        )
        model.half().float()  # as in files of upstream: anchors and weights start from numbers that fp16 can hold
    LOGGER.info(f"\nFloat phase: {counted_epochs(phase.epochs)}")
    trainer = Trainer(run, phase, model, start=resume)
    trainer.fit()
    return best_model(run, phase)


@dataclass(frozen=True)
class Accuracy:
    """What the table at the end tells of a network; an ``Evaluation`` has it too."""

    map50: float
    map: float


def best_model(run: Run, phase: Phase) -> DetectionModel:
    """The network in the phase's best checkpoint (its last one where validation was switched off)."""
    return model_from_checkpoint(distributed.from_main(lambda: best_checkpoint(run, phase))).to(run.device)


def best_checkpoint(run: Run, phase: Phase) -> dict:
    """The content of the phase's best checkpoint, or of its last one."""
    for name in ("best", "last"):
        file = run.weights_dir / f"{phase.prefix}{name}.pt"
        if file.exists():
            if name == "last" and not (run.options.noval or run.options.nosave):
                LOGGER.warning(f"WARNING: {run.weights_dir} has no {phase.prefix}best.pt; {file.name} takes its place")
            return load_checkpoint(file)
    raise UserError(
        f"{run.weights_dir}: no checkpoint of the {phase.name} phase; was --epochs 0 given for a float run?"
    )


def resolve_bits(run: Run, float_model: DetectionModel, batches: list[Tensor]) -> None:
    """Chooses weight bits layer by layer if that was asked for; from here on they stand in the run's ``layers``.

    quant.yaml is written anew before the phase's first checkpoint, so that no resumed run chooses again.
    """
    started = time.perf_counter()
    choice = resolve_auto_bits(float_model, run.config, thin_out(batches, CHOICE_IMAGES))
    run.config = choice.config
    LOGGER.info(f"{choice.describe()}\nChosen in {time.perf_counter() - started:.0f} s")
    if distributed.is_main():
        write_text_at_once(run.save_dir / "quant.yaml", yaml.safe_dump(run.config.to_dict(), sort_keys=False))


def report_layers(run: Run, model: DetectionModel, batches: list[Tensor]) -> tuple[list[LayerReport], Totals]:
    """Measures the layers of a quantized network and writes layers.csv."""
    reports = layer_reports(model, thin_out(batches, REPORT_IMAGES))
    whole = totals(model, reports)
    if distributed.is_main():
        write_csv(reports, run.save_dir / "layers.csv", whole)
    return reports, whole


def noisiest(reports: list[LayerReport], number: int = 3) -> str:
    """The convolutions whose outputs suffer most, with their signal-to-noise ratios."""
    measured = [report for report in reports if report.output_sqnr is not None]
    worst = sorted(measured, key=lambda report: report.output_sqnr)[:number]
    return ", ".join(f"{report.name.removesuffix('.conv')} {report.output_sqnr:.1f} dB" for report in worst)


def costs(whole: Totals) -> str:
    """Size and operations of the quantized network in one line."""
    smaller = whole.float_bytes / whole.bytes
    text = f"{whole.weight_bits:.2f} bits a weight, {whole.bytes / 1e6:.2f} MB ({smaller:.1f} x smaller)"
    return text + (f", {whole.float_bops / whole.bops:.0f} x fewer bit operations" if whole.bops else "")


def quantized_phase(
    run: Run, float_model: DetectionModel, teacher: nn.Module | None, start: DetectionModel | None, resume: dict | None
) -> tuple[DetectionModel, Accuracy | None]:
    """Calibrates and trains the quantized network.

    Args:
        run: the run.
        float_model: what is quantized.
        teacher: what is learned from.
        start: the quantized network that ``float_model`` has its weights from, if any.
        resume: a checkpoint of this phase.

    Returns:
        The best deployable network, and the accuracy after calibration alone (None if an older checkpoint is resumed).
    """
    phase = Phase("quantized", run.options.epochs, "")
    seed_everything(run.options.seed + 2)  # so that it does not matter whether the float phase ran in this process
    if start is not None and resume is None:  # its statistics are those of the codes, and ranges are set in float
        run.reestimate_norms(float_model, QUANTIZED_EPOCHS)
    model = copy.deepcopy(float_model).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    batches = run.calibration_batches()
    if run.config.auto_bits.pending:
        resolve_bits(run, float_model, batches)
    prepare(model, run.config)
    calibrated, reported = None, None
    if resume is None:
        started = time.perf_counter()
        calibrate(model, batches)
        # Rounding shifts the mean and deviation of every layer. Circuit boards, 4 bit, calibrated only: mAP50 0.40 with
        # the float network's statistics, 0.54 with those of the quantized one from 128 images. Blood cells, 3 bit: 0.39
        # with those, 0.48 with the float network's moved by the difference.
        if start is None:
            run.shift_norms(model, float_model, QUANTIZED_EPOCHS)
        else:
            run.reestimate_norms(model, QUANTIZED_EPOCHS)
        seconds = time.perf_counter() - started
        LOGGER.info(f"\nCalibrated on {sum(map(len, batches))} images in {seconds:.1f} s")
        reported = report_layers(run, model, batches)
        LOGGER.debug(f"{format_report(reported[0])}\n{reported[1].describe()}")
        LOGGER.info(f"{costs(reported[1])}\nNoisiest: {noisiest(reported[0])}")
        if run.validates_first:
            calibrated = run.evaluate(model)
            LOGGER.info(f"Calibrated only: mAP50 {calibrated.map50:.4f}  mAP50-95 {calibrated.map:.4f}")
    trainer = Trainer(run, phase, model, teacher, resume)
    if calibrated is not None:
        trainer.calibrated = [calibrated.map50, calibrated.map]
    before = Accuracy(*trainer.calibrated) if trainer.calibrated else None
    if reported is not None and trainer.log.writer is not None:
        write_tensorboard(trainer.log.writer, *reported)
    if phase.epochs == 0:
        checkpoint = trainer._checkpoint(-1) | {"finished": True}
        for name in ("best", "last"):  # a run without last.pt is not finished
            trainer._save(checkpoint, name)
        return model, before
    LOGGER.info(f"\nQuantized phase: {counted_epochs(phase.epochs)}, {run.config.method} {run.config.bits_label()}")
    fusion = run.config.gabfusion
    faded = fusion.fold != "keep" and fusion.balance != "backward" and fusion.release > 0
    if trainer.quantized.nodes and faded:
        LOGGER.info(f"{NORMALISED}: GABFusion still normalises, the network is not yet one for {BEST}.pt")
    trainer.fit()
    best = best_model(run, phase)
    report_layers(run, best, batches)  # layers.csv tells of the network that is kept
    return best, before


def summarise(run: Run, rows: list[tuple[str, Accuracy | Evaluation, int]]) -> None:
    """Prints the table at the end of a quantized run: name, accuracy, gap to float, size; keeps it as summary.json."""
    reference = rows[0][1]
    kept = [{"name": name, "mAP50": r.map50, "mAP": r.map, "bytes": round(size)} for name, r, size in rows]
    (run.save_dir / "summary.json").write_text(json.dumps({"rows": kept}, indent=1) + "\n", encoding="utf-8")
    LOGGER.info("")
    LOGGER.info(f"{'':<28}{'mAP50':>9}{'mAP50-95':>10}{'gap mAP50':>14}{'size':>11}")
    for name, result, size in rows:
        gap = "" if result is reference else f"{(result.map50 - reference.map50) * 100:+.1f} points"
        LOGGER.info(f"{name:<28}{result.map50:>9.4f}{result.map:>10.4f}{gap:>14}{size / 1e6:>8.2f} MB")
    best = run.weights_dir / "best.pt"
    LOGGER.info(f"\nFiles are in {run.save_dir}")
    data = f"--data {run.options.data} --imgsz {run.options.imgsz}"
    LOGGER.info(f"Export with: python export.py --weights {best} {data} --include onnx")
