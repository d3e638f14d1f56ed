"""What both phases of a run share: options, device, data, run folder."""

from __future__ import annotations

import argparse
import copy
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from models.yolo import DetectionModel
from quant.config import QuantConfig
from quant.training import calibration_batches
from utils.dataset import create_dataloader
from utils.dataset_yaml import DatasetSpec
from utils.devices import select_device
from utils.loss import DetectionLoss, scale_loss_gains
from val import Evaluation, OutputOptions, evaluate


class Run:
    """What both phases of a run share: options, device, data loaders, run folder."""

    def __init__(self, options: argparse.Namespace, spec: DatasetSpec, hyp: dict, save_dir: Path) -> None:
        self.options, self.spec, self.hyp, self.save_dir = options, spec, hyp, save_dir
        self.device = select_device(options.device)
        self.weights_dir = save_dir / "weights"
        self.weights_dir.mkdir(parents=True, exist_ok=True)
        self.names = {0: "item"} if options.single_cls and spec.nc != 1 else dict(spec.names)
        self.config: QuantConfig | None = None
        # On 2 cores one loader process beside two compute threads beats two loaders; upstream's 8 are far too many.
        workers = min(options.workers, max((os.cpu_count() or 2) // 2, 1))
        shared = {"workers": workers, "single_class": options.single_cls, "seed": options.seed}
        shared |= {"num_classes": spec.nc, "cache": options.cache}
        # P6 models need multiples of 64; images padded to 64 serve P5 models as well only at a cost, so ask the model.
        self.stride = options.stride
        self.train_loader, self.train_set = create_dataloader(
            spec.train, options.imgsz, options.batch_size, self.stride, hyp=hyp, augment=True, rect=options.rect,
            shuffle=not options.rect, prefix="train", **shared,
        )  # fmt: skip
        self.val_loader, self.val_set = create_dataloader(
            spec.val, options.imgsz, options.batch_size * 2, self.stride, rect=True, pad=0.5, prefix="val", **shared
        )
        self.plain_set = copy.copy(self.train_set)  # the training images as validation sees them, for calibration
        self.plain_set.augment = self.plain_set.mosaic = self.plain_set.rect = False
        self.plain_set.batch_shapes = self.plain_set.batch_index = None  # square, so that images of all shapes stack

    def calibration_batches(self) -> list[Tensor]:
        """The images that set first ranges."""
        return calibration_batches(self.plain_set, self.config.calibration.images, self.device)

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
            single_class=self.options.single_cls, report=False,
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
