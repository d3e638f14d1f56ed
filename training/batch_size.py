"""``--batch-size -1`` for a run: what a training step of it takes."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable

import torch

from models.yolo import DetectionModel
from quant.calibrate import calibrate
from quant.config import AutoBits, QuantConfig
from quant.prepare import prepare
from training.options import DEFAULTS
from utils.autobatch import auto_batch_size
from utils.devices import select_device, training_type
from utils.log import LOGGER


def choose_batch_size(options: argparse.Namespace, model: DetectionModel, config: QuantConfig | None) -> int:
    """The largest batch whose training step fits into the GPU; on other devices the default, with a message.

    Raises:
        UserError: not even one image fits.
    """
    device = select_device(options.device)
    if device.type != "cuda":
        size = DEFAULTS["batch_size"]
        LOGGER.warning(f"--batch-size -1 measures the memory of a CUDA GPU; on {device} it is {size}")
        return size
    return auto_batch_size(memory_step(model, config, options, device), device, 4 if options.quad else 1)


def memory_step(
    model: DetectionModel, config: QuantConfig | None, options: argparse.Namespace, device: torch.device
) -> Callable[[int], None]:
    """A training step, quantized if the run will be, on a copy of ``model``: a function of the number of images."""
    model = copy.deepcopy(model)
    size, dtype = options.imgsz, training_type(options.precision, device)
    if config is not None:
        prepare(model, dataclasses.replace(config, auto_bits=AutoBits()))
        calibrate(model, [torch.rand(2, 3, size, size)])
    model.train().to(device).to(memory_format=torch.channels_last)

    def step(batch_size: int) -> None:
        images = torch.rand(batch_size, 3, size, size, device=device)
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            maps = model(images)
        sum(level.float().square().mean() for level in maps).backward()
        model.zero_grad(set_to_none=True)

    return step
