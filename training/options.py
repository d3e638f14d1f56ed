"""The options of train.py: the command line, what values and combinations are refused, and what fills the gaps."""

from __future__ import annotations

import argparse
import importlib.util
import os

from quant.registry import QUANTIZERS
from utils.command import CommandParser
from utils.dataset_yaml import DatasetSpec
from utils.devices import PRECISIONS, select_device, training_type
from utils.errors import UserError
from utils.log import LOGGER
from utils.optim import OPTIMIZERS
from utils.paths import WORK

# What holds where neither a flag nor the data set's `defaults:` says otherwise.
DEFAULTS = {
    "imgsz": 640,
    "epochs": 100,
    "float_epochs": 100,
    "batch_size": 16,
    "cfg": "yolov5s.yaml",
    "hyp": "hyp.scratch-low.yaml",
    "optimizer": "SGD",
    "quant_optimizer": "AdamW",  # docs/results.md: 1 to 2 points of mAP50 over SGD at 3 bits
}
AUTO_BATCH = -1
LARGEST_SEED = 2**32 - 8  # NumPy takes 32 bits; phases and processes add a little
# What is no flag of YOLOv5 either -> where it stands.
REPLACED = dict.fromkeys(
    ("--lr", "--lr0", "--lrf", "--momentum", "--weight-decay", "--warmup-epochs"),
    "hyperparameters stand in a YAML file, copy one of data/hyps and give it with --hyp",
)
# Flags of Weights & Biases: giving one of them asks for it.
WANDB_FLAGS = {"wandb": False, "entity": None, "upload_dataset": False, "bbox_interval": -1, "artifact_alias": "latest"}


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The parser of train.py; abbreviations such as ``--batch`` and ``--img`` work."""
    parser = CommandParser(description=description, replaced=REPLACED)
    _add_data_flags(parser.add_argument_group("data and network").add_argument)
    _add_quantization_flags(parser.add_argument_group("quantization").add_argument)
    _add_training_flags(parser.add_argument_group("training").add_argument)
    _add_output_flags(parser.add_argument_group("what is written").add_argument)
    _add_logger_flags(parser.add_argument_group("Weights & Biases").add_argument)
    return parser


def _add_data_flags(add) -> None:
    add("--weights", default="", help="checkpoint to start from, official or ours; empty: from scratch")
    add("--cfg", default=None, help="model YAML; default: the data set's, else yolov5s.yaml")
    add("--data", default="shapes.yaml", help="data set YAML")
    add("--hyp", default=None, help="hyperparameter YAML, also by its name in data/hyps; default: hyp.scratch-low.yaml")
    add(
        "--imgsz",
        "--img",
        "--img-size",
        type=int,
        default=None,
        help="image size in pixels; default: the data set's, else 640",
    )
    add(
        "--batch-size",
        type=int,
        default=None,
        help="images per batch; -1: as many as the GPU's memory holds; default: 16",
    )
    add("--rect", action="store_true", help="rectangular batches: no mosaic, no shuffling")
    add("--quad", action="store_true", help="four images on one of twice the size, or one enlarged, by chance")
    add("--image-weights", action="store_true", help="draw images by how badly their classes are found")
    add(
        "--cache",
        nargs="?",
        const="ram",
        default=None,
        help="keep decoded images: ram, disk, val (of validation alone)",
    )
    add("--single-cls", action="store_true", help="treat all classes as one")
    add("--workers", type=int, default=8, help="loader processes, at most half of the processors")
    add("--noautoanchor", action="store_true", help="keep the anchors")


def _add_training_flags(add) -> None:
    add(
        "--epochs", type=int, default=None,
        help="with --quant those of the quantized phase (0 calibrates only); default: the data set's, else 100",
    )  # fmt: skip
    add("--resume", nargs="?", const=True, default=False, help="continue the newest run, or that of this last.pt")
    add("--device", default="", help="cpu, 0, mps; 0,1 with torchrun")
    add("--sync-bn", action="store_true", help="batch norms over all processes of a torchrun job")
    add("--local_rank", type=int, default=-1, help="not read: torchrun says it in the environment")
    add("--optimizer", choices=OPTIMIZERS, default=None, help="of float training; default: SGD")
    add("--cos-lr", action="store_true", default=None, help="cosine instead of linear learning rate in float training")
    add("--label-smoothing", type=float, default=0.0, help="share of a class target that goes to the others")
    add("--multi-scale", action="store_true", help="vary the image size by half, batch by batch")
    add("--patience", type=int, default=100, help="epochs without progress before stopping; 0: never stop")
    add("--freeze", nargs="+", type=int, default=[0], help="freeze layers 0..N-1, or the listed ones")
    add("--seed", type=int, default=0, help="of all random numbers")
    add(
        "--evolve", nargs="?", type=int, const=300, default=None, metavar="N",
        help="search hyperparameters in N trainings; default: 300",
    )  # fmt: skip
    add("--evolve_population", default=None, metavar="FOLDER", help="hyperparameter YAMLs that --evolve tries first")
    add("--resume_evolve", default=None, metavar="FILE", help="continue the search of this evolve.csv")
    add(
        "--precision", choices=PRECISIONS, default="auto",
        help="of convolutions in training; auto: float16 on CUDA, float32 elsewhere. Quantizers compute in float32",
    )  # fmt: skip


def _add_output_flags(add) -> None:
    add("--project", default=None, help="folder of runs; default: runs/train")
    add("--name", default="exp", help="name of the run; cfg: that of the model YAML")
    add("--exist-ok", action="store_true", help="write into an existing run folder")
    add("--nosave", action="store_true", help="save only the last checkpoint")
    add("--noval", action="store_true", help="validate after the last epoch only")
    add("--noplots", action="store_true", help="draw no plots")
    add("--verbose", action="store_true", help="say more: the whole quantization, every layer, every epoch's details")
    add("--save-period", type=int, default=-1, help="keep a checkpoint every N epochs")
    add("--bucket", default="", help="refused: copy the run folder with your cloud's own tool")


def _add_logger_flags(add) -> None:
    add("--wandb", action="store_true", help="log to Weights & Biases too (pip install wandb)")
    add("--entity", default=None, help="account or team")
    add("--bbox_interval", type=int, default=-1, help="send pictures of detections every N epochs; -1: at the end")
    add("--upload_dataset", nargs="?", const=True, default=False, help="refused: data sets are not uploaded")
    add("--artifact_alias", default="latest", help="refused: weights are read from files")


def _add_quantization_flags(add) -> None:
    add("--quant", metavar="METHOD", default=None, help=f"quantization-aware training: {', '.join(QUANTIZERS)}")
    add(
        "--bits",
        default=None,
        help="2 to 8; weights and activations apart: w4a8; chosen by layer: auto:4.0; default: 4",
    )
    add("--gabfusion", nargs="?", const=True, default=None, metavar="MODE",
        help="gradient-balanced fusion: learnable (the default), feedback, backward or fixed")  # fmt: skip
    add("--ada", nargs="?", const=True, default=None, metavar="DIVERGENCE",
        help="attention maps learn from the float network's: js or kl; default: what suits the method")  # fmt: skip
    add("--quant-optimizer", choices=OPTIMIZERS, default=None, help="of the quantized phase; default: AdamW")
    add("--teacher", default="", help="float checkpoint of the teacher; default: the float model of this run")
    add(
        "--float-epochs",
        type=int,
        default=None,
        help="epochs of the float phase, where there is one; default: the data set's, else 100",
    )
    add("--recipe", default=None, help="quantization YAML; bare names are looked up in quant/recipes")
    add("--compile", nargs="?", const="on", default="auto", choices=("auto", "on", "off"),
        help="the quantizers' arithmetic as compiled kernels; auto: on a CPU if it has a C++ compiler")  # fmt: skip


def options_of_run(saved: dict) -> argparse.Namespace:
    """The options that a checkpoint holds; those that its version did not have take their defaults."""
    if "quant_optimizer" not in saved:  # both phases had one optimizer
        saved = {**saved, "quant_optimizer": saved.get("optimizer")}
    return argparse.Namespace(**(vars(make_parser().parse_args([])) | saved))


def check_options(options: argparse.Namespace) -> None:
    """Raises UserError for values and combinations that cannot work."""
    _check_phases(options)
    _check_numbers(options)
    _check_refused(options)
    device = select_device(options.device)
    training_type(options.precision, device)
    if device.type == "cuda" and "," in str(options.device) and "LOCAL_RANK" not in os.environ:
        LOGGER.warning(f"--device {options.device}: one process uses {device}; for all start with torchrun")
    if options.cache not in (None, "ram", "disk", "val"):
        raise UserError(f"--cache {options.cache}: ram, disk, or val (the validation images alone, in memory)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        for flag, value in (("image-weights", options.image_weights), ("evolve", options.evolve)):
            if value:
                raise UserError(f"--{flag} works in one process only: start without torchrun")
        if options.batch_size == AUTO_BATCH:
            raise UserError("--batch-size -1 works in one process only: give the number of images over all processes")
    elif options.sync_bn:
        LOGGER.warning("--sync-bn does nothing in one process")


def _check_phases(options: argparse.Namespace) -> None:
    quantized = bool(options.quant or options.recipe)
    for flag in ("bits", "gabfusion", "ada"):
        if getattr(options, flag) not in (None, False) and not quantized:
            raise UserError(f"--{flag} needs --quant: add --quant lsq (or a --recipe)")
    if options.float_epochs is not None and not quantized:
        raise UserError("--float-epochs counts the float phase of a run with --quant; without it use --epochs")
    if options.teacher and not quantized:
        raise UserError("--teacher is whom a quantized network learns from: add --quant lsq (or a --recipe)")
    if options.compile == "on" and not quantized:
        raise UserError("--compile compiles the quantizers' arithmetic: it needs --quant")


def _check_numbers(options: argparse.Namespace) -> None:
    least = {"epochs": 0, "float_epochs": 0, "imgsz": 32, "workers": 0, "evolve": 1, "patience": 0, "seed": 0}
    least["batch_size"] = AUTO_BATCH if options.batch_size == AUTO_BATCH else 1
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {bound}")
    if options.seed >= LARGEST_SEED:
        raise UserError(f"--seed {options.seed}: must be under {LARGEST_SEED}")
    if not 0 <= options.label_smoothing < 1:
        raise UserError(f"--label-smoothing {options.label_smoothing}: a share of the target, from 0 to under 1")
    if options.quad and options.batch_size not in (None, AUTO_BATCH) and options.batch_size % 4:
        raise UserError(f"--quad joins four images: --batch-size {options.batch_size} must be a multiple of 4")
    if min(options.freeze) < 0:
        raise UserError(f"--freeze {min(options.freeze)}: layers are numbered from 0")


def frozen_layers(options: argparse.Namespace) -> list[int]:
    """The layers that ``--freeze`` names: one number is how many of the first, several are the layers themselves."""
    listed = options.freeze
    return list(range(listed[0])) if len(listed) == 1 else list(listed)


def check_frozen(options: argparse.Namespace, layers: int) -> None:
    """Raises UserError where ``--freeze`` names a layer that a network of ``layers`` lacks, or leaves none to train."""
    frozen = set(frozen_layers(options))
    asked = f"--freeze {' '.join(map(str, options.freeze))}"
    if frozen and max(frozen) >= layers:
        raise UserError(f"{asked}: the network has layers 0 to {layers - 1}")
    if len(frozen) == layers:
        raise UserError(f"{asked}: this freezes all {layers} layers, and nothing is left to train")


def _check_refused(options: argparse.Namespace) -> None:
    """Flags of upstream that this project does not have, with what takes their place."""
    if options.bucket:
        raise UserError(
            "--bucket: cloud buckets are not written; copy the run folder: gsutil cp -r runs/train gs://..."
        )
    if options.upload_dataset:
        raise UserError("--upload_dataset: data sets are not uploaded; use 'wandb artifact put' for that")
    if options.artifact_alias != WANDB_FLAGS["artifact_alias"]:
        raise UserError("--artifact_alias: weights are read from files; fetch them with 'wandb artifact get' first")
    if wants_wandb(options) and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "Weights & Biases is not installed (asked for by --wandb, --entity or --bbox_interval): pip install wandb. "
            "results.csv and TensorBoard are written without it"
        )
    if options.image_weights and options.rect:
        raise UserError("--image-weights draws images at random, --rect sorts them: give one of them")
    if (options.evolve_population or options.resume_evolve) and options.evolve is None:
        raise UserError("--evolve_population and --resume_evolve belong to --evolve")
    if options.evolve is not None and options.resume:
        raise UserError("--evolve: a search is continued with --resume_evolve path/to/evolve.csv, not with --resume")


def wants_wandb(options: argparse.Namespace) -> bool:
    """Whether a flag asks for Weights & Biases."""
    return any(getattr(options, name, default) != default for name, default in WANDB_FLAGS.items())


def apply_defaults(options: argparse.Namespace, spec: DatasetSpec) -> None:
    """Fills options that the user left open from the data set's ``defaults:`` and then from ``DEFAULTS``."""
    from_data = {key.replace("-", "_"): value for key, value in spec.defaults.items()}
    quantized = bool(options.quant or options.recipe)
    if not quantized and options.epochs is None and "float_epochs" in from_data:
        options.epochs = from_data["float_epochs"]  # a float run has only the float phase's epochs
    for key, value in (DEFAULTS | from_data).items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    if options.project is None:
        options.project = str(WORK / "runs" / "train")
