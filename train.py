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
import sys
from pathlib import Path

import numpy as np
import torch
import yaml

from models.yolo import DetectionModel
from quant.config import AutoBits, QuantConfig, build_config
from quant.precision import check_auto_bits
from quant.prepare import fusion_readers, prepare
from quant.registry import QUANTIZERS
from quant.report import float_bytes, quantized_bytes
from training.phases import best_model, build_float_model, float_phase, load_teacher, quantized_phase, summarise
from training.random_state import seed_everything
from training.run import Phase, Run
from utils.checkpoint import load_checkpoint
from utils.dataset_yaml import DatasetSpec, load_dataset_yaml, prepare_dataset
from utils.devices import PRECISIONS, limit_threads, select_device, training_type
from utils.errors import UserError
from utils.hyp import load_hyp
from utils.log import LOGGER
from utils.paths import ROOT, increment_path
from utils.plots import plot_labels, plot_results

# What holds where neither a flag nor the data set's `defaults:` says otherwise.
DEFAULTS = {
    "imgsz": 640,
    "epochs": 100,
    "float_epochs": 100,
    "batch_size": 16,
    "cfg": "yolov5s.yaml",
    "hyp": "hyp.scratch-low.yaml",
    "optimizer": "SGD",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; abbreviations such as ``--batch`` and ``--img`` work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", default="", help="checkpoint to start from, official or ours; empty: from scratch")
    add("--cfg", default=None, help="model YAML")
    add("--data", default="shapes.yaml", help="data set YAML")
    add("--hyp", default=None, help="hyperparameter YAML; default: hyp.scratch-low.yaml")
    add("--epochs", type=int, default=None, help="epochs (with --quant: of the quantized phase; 0 calibrates only)")
    add("--batch-size", type=int, default=None, help="images per batch")
    add("--imgsz", "--img", "--img-size", type=int, default=None, help="image size in pixels")
    add("--rect", action="store_true", help="rectangular batches: no mosaic, no shuffling")
    add("--resume", nargs="?", const=True, default=False, help="continue the newest run, or that of this last.pt")
    add("--nosave", action="store_true", help="save only the last checkpoint")
    add("--noval", action="store_true", help="validate after the last epoch only")
    add("--noautoanchor", action="store_true", help="keep the anchors")
    add("--noplots", action="store_true", help="draw no plots")
    add("--cache", nargs="?", const="ram", default=None, help="keep images in memory")
    add("--device", default="", help="cpu, 0, mps")
    add("--multi-scale", action="store_true", help="vary the image size by half, batch by batch")
    add("--single-cls", action="store_true", help="treat all classes as one")
    add("--optimizer", choices=("SGD", "Adam", "AdamW"), default=None, help="default: SGD")
    add("--workers", type=int, default=8, help="loader processes, at most one less than there are processors")
    add("--project", default=str(ROOT / "runs" / "train"), help="folder of runs")
    add("--name", default="exp", help="name of the run")
    add("--exist-ok", action="store_true", help="write into an existing run folder")
    add("--cos-lr", action="store_true", default=None, help="cosine instead of linear learning rate")
    add("--label-smoothing", type=float, default=0.0)
    add("--patience", type=int, default=100, help="epochs without progress before stopping; 0: never stop")
    add("--freeze", nargs="+", type=int, default=[0], help="freeze layers 0..N-1, or the listed ones")
    add("--save-period", type=int, default=-1, help="keep a checkpoint every N epochs")
    add("--seed", type=int, default=0)
    add(
        "--precision", choices=PRECISIONS, default="auto",
        help="of convolutions in training; auto: float16 on CUDA, float32 elsewhere. Quantizers compute in float32",
    )  # fmt: skip
    add("--compile", action="store_true", help="compile the quantizers' arithmetic (needs a C++ compiler, or Triton)")
    quant = parser.add_argument_group("quantization")
    add = quant.add_argument
    add("--quant", metavar="METHOD", default=None, help=f"quantization-aware training: {', '.join(QUANTIZERS)}")
    add("--bits", default=None, help="4; weights and activations apart: w4a8; chosen by layer: auto:4.0")
    add("--gabfusion", nargs="?", const=True, default=None, metavar="MODE", help="learnable, feedback or fixed")
    add("--ada", nargs="?", const=True, default=None, metavar="DIVERGENCE", help="attention distillation: js or kl")
    add("--teacher", default="", help="float checkpoint of the teacher; default: the float model of this run")
    add("--float-epochs", type=int, default=None, help="epochs of the float phase")
    add("--recipe", default=None, help="quantization YAML; bare names are looked up in quant/recipes")
    return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Raises UserError for values and combinations that cannot work."""
    for flag in ("bits", "gabfusion", "ada"):
        if getattr(options, flag) not in (None, False) and not (options.quant or options.recipe):
            raise UserError(f"--{flag} needs --quant: add --quant lsq (or a --recipe)")
    if options.float_epochs is not None and not (options.quant or options.recipe):
        raise UserError("--float-epochs counts the float phase of a run with --quant; without it use --epochs")
    if options.teacher and not (options.quant or options.recipe):
        raise UserError("--teacher needs --quant and --ada")
    for flag, least in (("epochs", 0), ("float_epochs", 0), ("batch_size", 1), ("imgsz", 32), ("workers", 0)):
        value = getattr(options, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag.replace('_', '-')} {value}: must be at least {least}")
    training_type(options.precision, select_device(options.device))
    if options.compile and not (options.quant or options.recipe):
        raise UserError("--compile compiles the quantizers' arithmetic: it needs --quant")


def apply_defaults(options: argparse.Namespace, spec: DatasetSpec) -> None:
    """Fills options that the user left open from the data set's ``defaults:`` and then from ``DEFAULTS``."""
    from_data = {key.replace("-", "_"): value for key, value in spec.defaults.items()}
    quantized = bool(options.quant or options.recipe)
    if not quantized and options.epochs is None and "float_epochs" in from_data:
        options.epochs = from_data["float_epochs"]  # a float run has only the float phase's epochs
    for key, value in (DEFAULTS | from_data).items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)


def find_resume(value: str | bool) -> tuple[dict, Path]:
    """The checkpoint to resume from, and its run folder.

    Raises:
        UserError: none found, or its run is finished.
    """
    if isinstance(value, str):
        file = Path(value)
    else:
        files = [*(ROOT / "runs").rglob("weights/last.pt"), *(ROOT / "runs").rglob("weights/float_last.pt")]
        if not files:
            raise UserError(f"--resume: no last.pt under {ROOT / 'runs'}; name the file: --resume path/to/last.pt")
        file = max(files, key=lambda path: path.stat().st_mtime)
    checkpoint = load_checkpoint(file)
    if "options" not in checkpoint or "phase" not in checkpoint:
        raise UserError(f"--resume {file}: this checkpoint is not from a training run")
    quantized_follows = bool(checkpoint["options"].get("quant") or checkpoint["options"].get("recipe"))
    if checkpoint.get("finished") and (checkpoint["phase"] == "quantized" or not quantized_follows):
        raise UserError(f"{file}: this run is finished, there is nothing to resume. To train on, give it as --weights")
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
    hyp = load_hyp(options.hyp) if resume is None else resume["hyp"]
    names = {0: "item"} if options.single_cls and spec.nc != 1 else dict(spec.names)
    limit_threads()
    seed_everything(options.seed + 1)
    if resume is not None and options.needs_float:
        model = DetectionModel(resume["model_yaml"])
        model.names = names
    else:
        model, fits = build_float_model(options, names, hyp.get("anchors"))
        options.needs_float = not fits or options.float_phase_asked
    config = None
    if options.quant or options.recipe:
        if resume is not None:
            saved = yaml.safe_load((save_dir / "quant.yaml").read_text(encoding="utf-8"))
            config = QuantConfig.from_dict(saved, str(save_dir / "quant.yaml"))
        else:
            config = quantization_of(options, model)
    check_phases(options, config)
    if options.teacher:
        load_teacher(options.teacher, names)
    options.stride = max(int(model.stride.max()), 32)
    if options.imgsz % options.stride:
        rounded = -(-options.imgsz // options.stride) * options.stride
        LOGGER.warning(f"--imgsz {options.imgsz} is not a multiple of the stride {options.stride}: {rounded} is used")
        options.imgsz = rounded
    prepare_dataset(spec)
    if save_dir is None:
        save_dir = increment_path(Path(options.project) / options.name, options.exist_ok, make=True)
        for stale in (save_dir / "weights").glob("*.pt"):  # of a run that --exist-ok writes over
            stale.unlink()
    run = Run(options, spec, hyp, save_dir)
    run.config = config
    for name, content in (("opt", vars(options)), ("hyp", hyp), ("quant", config.to_dict() if config else None)):
        if content is not None:
            (save_dir / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return run, model


def quantization_of(options: argparse.Namespace, model: DetectionModel) -> QuantConfig:
    """The merged quantization; what the model cannot carry is refused here, before anything is trained."""
    config = build_config(options.quant, options.bits, options.gabfusion, options.ada, options.recipe, model.yaml)
    if options.teacher and not config.needs_teacher:
        raise UserError("--teacher needs --ada or a recipe with distillation: nothing is learned from a teacher else")
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
    if config is not None and options.needs_float and options.float_epochs == 0:
        raise UserError(
            "--float-epochs 0: there is no float model of these classes yet. Give its checkpoint as --weights, or let "
            "the float phase train one"
        )


def main(options: argparse.Namespace) -> Path:
    """Trains as ``options`` say; returns the run folder."""
    resume, save_dir = None, None
    if options.resume:
        resume, save_dir = find_resume(options.resume)
        options = argparse.Namespace(**resume["options"])
    run, model = prepare_run(options, resume, save_dir)
    LOGGER.info(
        f"{model.info(options.imgsz)} on {run.device}, {torch.get_num_threads()} threads, run in {run.save_dir}"
    )
    if not options.noplots and resume is None:
        plot_labels(np.concatenate(run.train_set.labels), run.names, run.save_dir)
    if run.config is not None:
        LOGGER.info("Quantization:\n" + yaml.safe_dump(run.config.to_dict(), sort_keys=False).rstrip())

    phase = resume["phase"] if resume else None
    if run.config is None:
        float_phase(run, model, resume)
        finish_plots(run)
        LOGGER.info(f"Files are in {run.save_dir}")
        return run.save_dir
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
    float_result = run.evaluate(model)
    LOGGER.info(f"Float: mAP50 {float_result.map50:.4f}  mAP50-95 {float_result.map:.4f}")
    quantized, calibrated = quantized_phase(run, model, teacher, resume if phase == "quantized" else None)
    final = calibrated if options.epochs == 0 else run.evaluate(quantized, plots=True)
    bits = run.config.bits_label()
    size = quantized_bytes(quantized)
    rows = [("float", float_result, float_bytes(model))]
    if calibrated is not None:
        rows.append((f"{bits} calibrated only", calibrated, size))
    if options.epochs > 0:
        rows.append((f"{bits} trained ({run.config.method})", final, size))
    finish_plots(run)
    summarise(run, rows)
    return run.save_dir


def finish_plots(run: Run) -> None:
    """Draws results.png from every results.csv of the run."""
    if run.options.noplots:
        return
    for file in run.save_dir.glob("*results.csv"):
        plot_results(file)


def command_line() -> int:
    """Entry point: user errors become one line and exit code 1."""
    try:
        options = parse_arguments()
        main(options)
    except UserError as error:
        LOGGER.error(f"ERROR: {error}")
        return 1
    except KeyboardInterrupt:
        LOGGER.error("Interrupted. Continue with: python train.py --resume")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
