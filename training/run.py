"""What both phases of a run share: options, device, data, run folder."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from torch import Tensor, nn

from models.yolo import DetectionModel
from quant.config import QuantConfig
from quant.norms import reestimate_norms, shift_norms
from quant.training import calibration_batches
from training.options import frozen_layers
from utils import distributed
from utils.dataset import collate, create_dataloader
from utils.dataset_yaml import DatasetSpec
from utils.devices import select_device
from utils.errors import UserError
from utils.hyp import phase_hyp
from utils.loss import DetectionLoss, scale_loss_gains
from utils.paths import increment_path, write_text_at_once
from utils.progress import progress
from utils.wandb_log import WandbLog
from val import Evaluation, OutputOptions, evaluate


def check_processes(options: argparse.Namespace) -> None:
    """Raises UserError where the processes of a job cannot share the batch, or cannot have ``--sync-bn``."""
    processes = distributed.world_size()
    if options.batch_size % processes:
        below, above = (options.batch_size // processes + more for more in (0, 1))
        raise UserError(
            f"--batch-size {options.batch_size} is the number of images over all {processes} processes and must be a "
            f"multiple of it: take {' or '.join(str(n * processes) for n in (below, above) if n)}"
        )
    if processes > 1 and getattr(options, "sync_bn", False) and select_device(options.device).type != "cuda":
        raise UserError("--sync-bn: PyTorch synchronises batch norms on GPUs only; leave it out on a CPU")


# Of a calibrated network, which two networks are run on: their difference is steadier than either one's statistics.
SHIFT_IMAGES = 128
OWN_FILES = ("last.pt", "best.pt", "float_last.pt", "float_best.pt")


def new_run_folder(options: argparse.Namespace) -> Path:
    """Makes the folder of a new run; an existing one that ``--exist-ok`` takes loses the checkpoints that the run will
    write itself, but not those that it starts from.

    Raises:
        UserError: it cannot be made or written to, or a resumed run would miss what it started from.
    """
    place = Path(options.project) / options.name
    try:
        folder = increment_path(place, options.exist_ok, make=True)
        (folder / "weights").mkdir(exist_ok=True)
        _remove_stale(options, folder / "weights")
    except OSError as error:
        raise UserError(
            f"{error.filename or place}: the run's folder cannot be made ({error.strerror or error}). Choose a place "
            "that can be written to with --project and --name"
        ) from None
    return folder


def _remove_stale(options: argparse.Namespace, folder: Path) -> None:
    needed = {Path(file).resolve(): flag for flag in ("weights", "teacher") if (file := getattr(options, flag))}
    quantized = bool(options.quant or options.recipe)
    kept = {file: flag for file in (folder / name for name in OWN_FILES) if (flag := needed.get(file.resolve()))}
    for file, flag in kept.items():
        if quantized and (options.needs_float or not file.name.startswith("float_")):
            raise UserError(
                f"--{flag} {file}: the run would write over it, and could not be resumed. Choose another --name, or "
                "move the file"
            )
    for name in OWN_FILES:
        if folder / name not in kept:
            (folder / name).unlink(missing_ok=True)


class Run:
    """What both phases of a run share: options, device, data loaders, run folder."""

    def __init__(self, options: argparse.Namespace, spec: DatasetSpec, hyp: dict, save_dir: Path) -> None:
        self.options, self.spec, self.hyp, self.save_dir = options, spec, hyp, save_dir
        self.device = select_device(options.device)
        self.weights_dir = save_dir / "weights"
        if distributed.is_main():
            self.weights_dir.mkdir(parents=True, exist_ok=True)
            for unfinished in self.weights_dir.glob(".*.tmp"):  # of a run that was killed while it saved
                unfinished.unlink()
        self.names = {0: "item"} if options.single_cls and spec.nc != 1 else dict(spec.names)
        self.config: QuantConfig | None = None
        self.wandb: WandbLog | None = None
        # On 2 cores one loader process beside two compute threads beats two loaders; upstream's 8 are far too many.
        workers = min(options.workers, max((os.cpu_count() or 2) // 2, 1))
        shared = {"workers": workers, "single_class": options.single_cls, "seed": options.seed}
        shared |= {"num_classes": spec.nc}
        cache = {"cache": options.cache if options.cache != "val" else None}  # of the training images
        val_cache = {"cache": options.cache if options.cache != "val" else "ram"}
        # P6 models need multiples of 64; images padded to 64 serve P5 models as well only at a cost, so ask the model.
        self.stride = options.stride
        processes = distributed.world_size()
        batch_size = options.batch_size // processes
        shared |= {"rank": distributed.rank(), "world_size": processes}
        with distributed.local_main_first():
            self.train_loader, self.train_set = create_dataloader(
                spec.train, options.imgsz, batch_size, self.stride, hyp=hyp, augment=True, rect=options.rect,
                shuffle=not options.rect, prefix="train", quad=options.quad, **cache, **shared,
            )  # fmt: skip
            self.val_loader, self.val_set = create_dataloader(
                spec.val, options.imgsz, batch_size * 2, self.stride, rect=True, pad=0.5, prefix="val", even=False,
                **val_cache, **shared,
            )  # fmt: skip
        self.plain_set = copy.copy(self.train_set)  # the training images as validation sees them, for calibration
        self.plain_set.augment = self.plain_set.mosaic = self.plain_set.rect = False
        self.plain_set.batch_shapes = self.plain_set.batch_index = None  # square, so that images of all shapes stack

    def phase_hyp(self, quantized: bool) -> dict:
        """The hyperparameters of the float or the quantized phase under their plain names."""
        return phase_hyp(self.hyp, True, self.config.fewest_bits) if quantized else phase_hyp(self.hyp, False)

    def write_settings(self) -> None:
        """Writes opt.yaml, hyp.yaml and, with quantization, quant.yaml. Raises UserError where that is not possible."""
        if not distributed.is_main():
            return
        contents = {"opt": vars(self.options), "hyp": self.hyp}
        if self.config is not None:
            contents["quant"] = self.config.to_dict()
        for name, content in contents.items():
            file = self.save_dir / f"{name}.yaml"
            try:
                write_text_at_once(file, yaml.safe_dump(content, sort_keys=False))
            except OSError as error:
                raise UserError(f"{file} could not be written ({error.strerror or error})") from None

    def calibration_batches(self) -> list[Tensor]:
        """The images that set first ranges."""
        return calibration_batches(self.plain_set, self.config.calibration.images, self.device)

    def training_batches(self, images: int, epoch: int) -> Iterator[Tensor]:
        """Evenly spaced training images as ``epoch`` sees them, in batches (B, 3, S, S), 0 to 1.

        Rectangular batches have shapes of their own, so with ``--rect`` the images are padded to squares instead.
        """
        dataset = self.plain_set if self.options.rect else self.train_set
        count = min(images, len(dataset))
        chosen = [round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)]
        batches = -(-count // self.options.batch_size)
        for first in range(batches):  # of equal size: one image alone may have too few values for a deviation
            batch = collate([dataset[epoch, index] for index in chosen[first::batches]])[0]
            yield batch.to(self.device).float() / 255

    @property
    def frozen_prefixes(self) -> tuple[str, ...]:
        """What the names of modules in the layers of ``--freeze`` start with."""
        return tuple(f"model.{index}." for index in frozen_layers(self.options))

    def reestimate_norms(self, model: nn.Module, epoch: int) -> None:
        """Batch-norm statistics of ``model`` from training images as ``epoch`` sees them, if the recipe says so; frozen
        layers keep theirs."""
        if self.config.batch_norm.reestimate:
            reestimate_norms(model, self._norm_batches(epoch), self.frozen_prefixes)

    def shift_norms(self, model: nn.Module, float_model: nn.Module, epoch: int) -> None:
        """The same for a network that was only calibrated: its statistics move by what quantization changes."""
        if self.config.batch_norm.reestimate:
            shift_norms(model, float_model, self._norm_batches(epoch, SHIFT_IMAGES), self.frozen_prefixes)

    def _norm_batches(self, epoch: int, limit: int | None = None) -> Iterable[Tensor]:
        images = min(self.config.batch_norm.reestimate, limit or len(self.train_set))
        batches = -(-min(images, len(self.train_set)) // self.options.batch_size)
        return progress(self.training_batches(images, epoch), "batch norms", batches)

    @property
    def validates_first(self) -> bool:
        """Whether a quantized run measures its float and its calibrated network: ``--noval`` leaves the end only."""
        return not self.options.noval or self.options.epochs == 0

    def make_loss(self, model: DetectionModel) -> DetectionLoss:
        """The detection loss for ``model`` with this run's gains."""
        detect = model.detect
        gains = scale_loss_gains(self.hyp, detect.nl, detect.nc, self.options.imgsz)
        loss = DetectionLoss(detect.anchors, detect.stride, detect.nc, gains, self.options.label_smoothing)
        return loss.to(self.device)

    def evaluate(self, model: nn.Module, loss: DetectionLoss | None = None, plots: bool = False) -> Evaluation:
        """Validates ``model`` on the validation split."""
        output = OutputOptions(folder=self.save_dir, plots=plots and not self.options.noplots)
        return evaluate(
            model, self.val_loader, names=self.names, device=self.device, loss=loss, output=output,
            single_class=self.options.single_cls, report=False, sharded=True,
        )  # fmt: skip


@dataclass
class Phase:
    """One of the two phases; ``prefix`` goes in front of its file names."""

    name: str
    epochs: int
    prefix: str

    @property
    def quantized(self) -> bool:
        return self.name == "quantized"
