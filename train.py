"""Trains a YOLOv5 detector, in float or quantization-aware.

    python train.py --quant lsq --bits 4 --gabfusion            (draws its own small data set)
    python train.py --weights yolov5s.pt --data VOC.yaml --quant lsq --bits 4 --gabfusion --ada
    python train.py --resume

A run with --quant has two phases. The float phase runs when there is no float model of this task yet; its averaged
weights start the quantized phase and are the teacher. ``--epochs`` counts quantized epochs, ``--float-epochs`` float
ones; without --quant, ``--epochs`` counts float epochs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import torch
import yaml

from models.yolo import DetectionModel
from quant.config import AutoBits, QuantConfig
from quant.precision import check_auto_bits
from quant.prepare import fusion_readers, prepare
from quant.recipe import build_config
from quant.report import float_bytes, quantized_bytes
from run_report.write import write_report
from training.batch_size import choose_batch_size
from training.evolve import evolve
from training.faults import ended_by_signals, explained
from training.options import (
    AUTO_BATCH,
    apply_defaults,
    check_frozen,
    check_options,
    make_parser,
    options_of_run,
    wants_wandb,
)
from training.phases import (
    best_model,
    build_float_model,
    check_start,
    check_teacher,
    float_phase,
    load_teacher,
    quantized_phase,
    quantized_start,
    summarise,
)
from training.random_state import seed_everything
from training.run import Phase, Run, check_processes, new_run_folder
from training.screen import start_lines
from utils import distributed
from utils.allocation import keep_freed_memory
from utils.checkpoint import load_checkpoint
from utils.dataset_yaml import load_dataset_yaml, prepare_dataset
from utils.devices import limit_threads
from utils.errors import UserError
from utils.hyp import load_hyp
from utils.log import LOGGER, set_verbose
from utils.paths import WORK, working_in
from utils.plots import plot_labels, plot_results
from utils.wandb_log import WandbLog


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; abbreviations such as ``--batch`` and ``--img`` work."""
    return make_parser(__doc__).parse_args(arguments)


def find_resume(value: str | bool) -> tuple[dict, Path]:
    """The checkpoint to resume from, and its run folder.

    Raises:
        UserError: none found, or its run is finished.
    """
    if isinstance(value, str):
        file = Path(value)
    else:
        files = [*(WORK / "runs").rglob("weights/last.pt"), *(WORK / "runs").rglob("weights/float_last.pt")]
        if not files:
            raise UserError(f"--resume: no last.pt under {WORK / 'runs'}; name the file: --resume path/to/last.pt")
        file = max(files, key=lambda path: path.stat().st_mtime)
    checkpoint = load_checkpoint(file)
    if not isinstance(checkpoint.get("options"), dict) or checkpoint.get("phase") not in ("float", "quantized"):
        raise UserError(f"--resume {file}: this checkpoint is not from a training run")
    quantized_follows = bool(checkpoint["options"].get("quant") or checkpoint["options"].get("recipe"))
    if checkpoint.get("finished") and (checkpoint["phase"] == "quantized" or not quantized_follows):
        onward = "give it as --weights"
        if checkpoint["phase"] == "quantized":  # from quantized weights ranges would be searched anew
            own = file.with_name("float_best.pt")
            start = own if own.exists() else checkpoint["options"].get("weights") or "its float weights"
            onward = f"start again from its float network with more --epochs: --weights {start}"
        raise UserError(f"{file}: this run is finished, there is nothing to resume. To train on, {onward}")
    return checkpoint, file.resolve().parents[1]


def prepare_run(options: argparse.Namespace, resume: dict | None = None, save_dir: Path | None = None):
    """Checks everything that can be checked, then opens the data and makes the run folder.

    A resumed run takes hyperparameters and quantization from itself, so that files edited since do not change it.

    Returns:
        The run, and the float network to start from.
    """
    if resume is None:
        check_options(options)
    # Noted before defaults fill the gaps, and kept in checkpoints, so that a resumed run decides alike.
    options.cfg_given = getattr(options, "cfg_given", options.cfg is not None)
    options.float_phase_asked = getattr(options, "float_phase_asked", bool(options.float_epochs))
    spec = load_dataset_yaml(options.data)
    apply_defaults(options, spec)
    check_processes(options)
    hyp = load_hyp(options.hyp) if resume is None else resume["hyp"]
    names = {0: "item"} if options.single_cls and spec.nc != 1 else dict(spec.names)
    limit_threads()
    seed_everything(options.seed + 1)
    quantized = bool(options.quant or options.recipe)
    if resume is not None and (options.needs_float or not quantized):
        model = DetectionModel(resume["model_yaml"])
        model.names = names
    else:
        if resume is not None:
            check_start(options)
        model, fits = build_float_model(options, names, hyp.get("anchors"))
        if resume is None:
            check_frozen(options, len(model.model))
            options.needs_float = not fits or options.float_phase_asked
    config = None
    if quantized:
        if resume is not None:
            saved = distributed.from_main(lambda: (save_dir / "quant.yaml").read_text(encoding="utf-8"))
            config = QuantConfig.from_saved(yaml.safe_load(saved), str(save_dir / "quant.yaml"))
        else:
            config = quantization_of(options, model)
    check_phases(options, config)
    if options.teacher:
        check_teacher(options.teacher, load_teacher(options.teacher, names), model, config)
    options.stride = max(int(model.stride.max()), 32)
    if options.imgsz % options.stride:
        rounded = -(-options.imgsz // options.stride) * options.stride
        LOGGER.warning(f"--imgsz {options.imgsz} is not a multiple of the stride {options.stride}: {rounded} is used")
        options.imgsz = rounded
    if options.batch_size == AUTO_BATCH:
        options.batch_size = choose_batch_size(options, model, config)
    with distributed.local_main_first():
        prepare_dataset(spec)
    if options.name == "cfg":
        options.name = Path(options.cfg).stem
    if save_dir is None:
        save_dir = distributed.from_main(lambda: new_run_folder(options))
    run = Run(options, spec, hyp, save_dir)
    run.config = config
    run.write_settings()
    if wants_wandb(options) and distributed.is_main():
        run.wandb = WandbLog(save_dir, {**vars(options), "hyp": hyp}, options.entity, resume is not None)
    return run, model


def quantization_of(options: argparse.Namespace, model: DetectionModel) -> QuantConfig:
    """The merged quantization; what the model cannot carry is refused here, before anything is trained."""
    config = build_config(options.quant, options.bits, options.gabfusion, options.ada, options.recipe, model.yaml)
    from_codes = getattr(options, "starts_quantized", False) and not options.needs_float
    if from_codes and config.needs_teacher and not options.teacher:
        beside = Path(options.weights).with_name("float_best.pt")
        named = f"--teacher {beside}" if beside.exists() else "--teacher FILE, its run's float weights"
        raise UserError(
            f"--weights {options.weights} is quantized already, and the network would learn from a float one: add "
            f"{named}, or switch distillation off in a --recipe (distillation: false)"
        )
    if options.teacher and not config.needs_teacher:
        raise UserError("--teacher: the recipe switches distillation off, so nothing is learned from it; add --ada")
    config.check_layers(model.detect.i)
    prepared = prepare(copy.deepcopy(model), dataclasses.replace(config, auto_bits=AutoBits()))
    if config.gabfusion.enabled and config.gabfusion.fold == "finetune":
        fusion_readers(prepared)
    check_auto_bits(model, config)
    return config


def check_phases(options: argparse.Namespace, config: QuantConfig | None) -> None:
    """Raises UserError where a phase that is needed would have no epochs."""
    if config is None and options.epochs == 0:
        raise UserError("--epochs 0 trains nothing; it calibrates only together with --quant")
    corrected = 0 if config is None else config.batch_norm.correction
    if options.epochs and 0 < options.epochs <= corrected:
        raise UserError(
            f"batch_norm.correction: {corrected} of the {options.epochs} quantized epochs leave none to train in; "
            "give more --epochs"
        )
    if config is not None and options.needs_float and options.float_epochs == 0:
        raise UserError(
            "--float-epochs 0: there is no float model of these classes yet. Give its checkpoint as --weights, or let "
            "the float phase train one"
        )


def main(options: argparse.Namespace) -> Path:
    """Trains as ``options`` say; returns the run folder."""
    keep_freed_memory()
    set_verbose(options.verbose)
    if options.evolve is not None:
        return evolve(options, main)
    resume, save_dir = None, None
    if options.resume:
        asked = options
        resume, save_dir = distributed.from_main(lambda: find_resume(asked.resume))
        options = options_of_run(resume["options"])
        options.device = asked.device or options.device  # another machine may have others
    else:
        options.started_in = os.getcwd()
    with working_in(getattr(options, "started_in", None)):  # which older checkpoints do not know
        run, model = prepare_run(options, resume, save_dir)
        with explained(run):
            train_phases(run, model, resume)
    return run.save_dir


def train_phases(run: Run, model: DetectionModel, resume: dict | None) -> None:
    """The phases that are left, then the charts and the table at the end."""
    options = run.options
    LOGGER.info(f"\n{start_lines(run, model)}")
    if not options.noplots and resume is None and distributed.is_main():
        plot_labels(np.concatenate(run.train_set.labels), run.names, run.save_dir)
    if run.config is not None:
        LOGGER.debug("Quantization:\n" + yaml.safe_dump(run.config.to_dict(), sort_keys=False).rstrip())

    phase = resume["phase"] if resume else None
    if run.config is None:
        float_phase(run, model, resume)
        finish_plots(run)
        write_page(run)
        LOGGER.info(f"Files are in {run.save_dir}")
        return
    if options.needs_float and phase != "quantized":
        unfinished = resume if resume and not resume.get("finished") else None
        if resume and resume.get("finished"):
            model = best_model(run, Phase("float", 0, "float_"))
        else:
            model = float_phase(run, model, unfinished)
    elif options.needs_float:
        model = best_model(run, Phase("float", 0, "float_"))
    model = model.to(run.device)
    teacher = None
    if run.config.needs_teacher:
        teacher = load_teacher(options.teacher, run.names) if options.teacher else copy.deepcopy(model)
        teacher = teacher.to(run.device).eval().fuse().to(memory_format=torch.channels_last)
    start = quantized_start(options, run.device)
    rows = []
    if run.validates_first:
        compared = [("float", model, float_bytes(model))]
        if start is not None:
            bits = QuantConfig.from_saved(start.quantization, options.weights).bits_label()
            compared = [(f"start, {bits}", start, quantized_bytes(start))]
            if teacher is not None:  # what the gap is measured to
                compared.insert(0, ("teacher, float", teacher, float_bytes(teacher)))
        for name, network, size in compared:
            rows.append((name, run.evaluate(network), size))
            accuracy = rows[-1][1]
            LOGGER.info(f"{name.capitalize()}: mAP50 {accuracy.map50:.4f}  mAP50-95 {accuracy.map:.4f}")
    quantized, calibrated = quantized_phase(run, model, teacher, start, resume if phase == "quantized" else None)
    final = calibrated if options.epochs == 0 else run.evaluate(quantized, plots=True)
    bits = run.config.bits_label()
    size = quantized_bytes(quantized)
    if calibrated is not None:
        rows.append((f"{bits} calibrated only", calibrated, size))
    if options.epochs > 0:
        rows.append((f"{bits} trained ({run.config.method})", final, size))
    finish_plots(run)
    summarise(run, rows)
    write_page(run)


def finish_plots(run: Run) -> None:
    """Draws results.png from every results.csv of the run, and ends what is sent to Weights & Biases."""
    if not run.options.noplots and distributed.is_main():
        for file in run.save_dir.glob("*results.csv"):
            plot_results(file)
    if run.wandb is not None:
        run.wandb.finish()


def write_page(run: Run) -> None:
    """report.html of the run; training is over, so whatever goes wrong here is only said."""
    if run.options.noplots or not distributed.is_main():
        return
    try:
        LOGGER.info(f"Report: {write_report(run.save_dir)}")
    except (UserError, OSError) as error:
        LOGGER.warning(f"WARNING: no report.html: {error}")


def command_line() -> int:
    """Entry point: user errors become one line and exit code 1."""
    options = parse_arguments()
    try:
        distributed.start(options.device)
        with ended_by_signals():
            main(options)
    except UserError as error:
        distributed.let_main_report()
        LOGGER.error(f"ERROR: {error}")
        return 1
    except KeyboardInterrupt as interrupt:
        LOGGER.error(f"Interrupted. {interrupt or 'Nothing had been trained'}")
        return 130
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
