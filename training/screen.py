"""What a run says on the screen: what it is about in ten lines, then one line an epoch, both for 80 columns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from models.yolo import DetectionModel, count_gflops
from quant.config import QuantConfig
from training.run import Run
from utils import distributed
from utils.memory import most_used_memory
from val import Evaluation

HEADINGS = ("epoch", "box", "obj", "cls", "mAP50", "mAP", "img/s", "memory", "left")
WIDTHS = (9, 8, 8, 8, 8, 8, 7, 9, 8)
BEST = "best"  # behind an epoch whose network is kept as best.pt
NORMALISED = "norm"  # behind one whose fusion still normalises, so that its network is no candidate


class EpochLines:
    """One line an epoch of a phase. Speed is that of training alone, memory the most that was taken so far.

    Args:
        epochs: of the phase.
        first_epoch: the one that this process begins with, from 0.
    """

    def __init__(self, epochs: int, first_epoch: int, device: torch.device) -> None:
        self.epochs, self.first_epoch, self.device = epochs, first_epoch, device
        self.started = time.perf_counter()

    def heading(self) -> str:
        """The names of the columns."""
        return "".join(f"{name:>{width}}" for name, width in zip(HEADINGS, WIDTHS, strict=True))

    def line(self, epoch: int, losses: Sequence[float], result: Evaluation | None, speed: float, mark: str = "") -> str:
        """The line of an epoch that has just ended.

        Args:
            epoch: from 0; one behind the last is GABFusion's fine-tuning.
            losses: box, objectness, class.
            result: of the validation, where there was one.
            speed: images a second.
            mark: ``BEST``, ``NORMALISED`` or nothing.
        """
        accuracy = ("-", "-") if result is None else (f"{result.map50:.4f}", f"{result.map:.4f}")
        taken = most_used_memory(self.device)
        memory = "-" if taken is None else f"{taken / 1e9:.2f} GB" if taken >= 1e9 else f"{taken / 1e6:.0f} MB"
        number = f"{epoch + 1}/{self.epochs}" if epoch < self.epochs else "finetune"
        cells = (
            number,
            *(f"{loss:.4f}" if loss < 100 else f"{loss:.4g}" for loss in losses),
            *accuracy,
            f"{speed:.0f}",
            memory,
            self._left(epoch),
        )
        text = "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
        return f"{text}  {mark}".rstrip()

    def _left(self, epoch: int) -> str:
        done, remaining = epoch + 1 - self.first_epoch, max(self.epochs - epoch - 1, 0)
        return duration((time.perf_counter() - self.started) / done * remaining)


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours in front of them: 0:07, 12:30, 26:10:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def start_lines(run: Run, model: DetectionModel) -> str:
    """What will be trained, on what, from what, with which quantization."""
    options, config = run.options, run.config
    processes = f" in {distributed.world_size()} processes" if distributed.is_active() else ""
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' if count > 1 else ''}" if run.device.type == "cpu" else ""
    rows = [
        ("network", f"{_name(model)}: {sum(p.numel() for p in model.parameters()):,} parameters, "
                    f"{count_gflops(model, options.imgsz):.2f} GFLOPs at {options.imgsz}x{options.imgsz}"),
        ("weights", _origin(run)),
        ("data", f"{options.data}: {len(run.train_set)} training, {len(run.val_set)} validation images, "
                 f"{len(run.names)} class{'es' if len(run.names) > 1 else ''}"),
        ("batches", f"{options.batch_size} images of {options.imgsz} pixels on {run.device}{processes}{threads}"),
    ]  # fmt: skip
    if config is None:
        rows.append(("float", f"{counted_epochs(options.epochs)}, {_rate(run, False)}"))
    else:
        if options.needs_float:
            rows.append(("float", f"{counted_epochs(options.float_epochs)}, {_rate(run, False)}"))
        trained = f"{counted_epochs(options.epochs)}, {_rate(run, True)}" if options.epochs else "calibrated only"
        rows.append(("quantized", trained))
        rows += _quantization(config, options.teacher)
    rows.append(("run", str(run.save_dir)))
    return "\n".join(f"{name:<10}{text}" for name, text in rows)


def _name(model: DetectionModel) -> str:
    return Path(model.yaml_file).stem


def _origin(run: Run) -> str:
    options = run.options
    if not options.weights:
        return "none: from scratch"
    if getattr(options, "starts_quantized", False):
        return f"{options.weights} (the ones behind its codes)"
    follows = run.config is not None and not options.needs_float
    return f"{options.weights}" + (" (no float phase needed)" if follows else "")


def counted_epochs(count: int) -> str:
    """``count`` with its noun."""
    return f"{count} epoch{'s' if count != 1 else ''}"


def _rate(run: Run, quantized: bool) -> str:
    name = run.options.quant_optimizer if quantized else run.options.optimizer
    return f"{name}, learning rate {run.phase_hyp(quantized)['lr0']:g}"


def _quantization(config: QuantConfig, teacher: str) -> list[tuple[str, str]]:
    """The rows about bits, fusion and distillation; quant.yaml has the rest."""
    text = f"{config.method} {config.bits_label()}, first layer {config.first_layer_bits}, Detect {config.detect_bits} "
    text += f"bit, {config.resolved_scheme()} inputs"
    text += ", own bits by layer" if config.layers else ""
    text += ", for TensorRT" if config.target == "tensorrt" else ""
    rows = [("bits", text)]
    fusion = config.gabfusion
    if fusion.enabled:
        rows.append(("fusion", f"GABFusion at the {fusion.scope}, {fusion.balance} branch weights, end: {fusion.fold}"))
    if config.needs_teacher:
        terms = [f"ADA ({config.resolved_divergence()})"] if config.ada.enabled else []
        terms += [name.replace("_", " ") for name in config.distillation.weights]
        rows.append(("teacher", f"{teacher or 'the float network'}: {', '.join(terms)}"))
    return rows
