"""What a quantized network costs and where it loses precision, layer by layer.

For one convolution of N weights that makes H x W results per output channel:

    MACs = N H W,    BOPs = MACs * weight bits * input bits    (bit operations; 32 x 32 in float)
    bytes = N * weight bits / 8 + 4 per step + 4 per output channel for the bias
    SQNR = 10 log10(|x|^2 / |x - q(x)|^2)  of its weights, its input, and of what it makes of both

A value is clipped if it lies outside the smallest and largest value that the grid has. Everything is asked of a
quantizer's integer form, so the report serves any method.

    python -m quant.report --weights runs/train/exp/weights/best.pt --data shapes.yaml --csv layers.csv
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quant.gabfusion import GABFusion
from quant.layers import QuantConv2d
from quant.prepare import check_calibrated, example_input
from quant.primitives import per_channel
from quant.quantizer import IntegerForm, Quantizer
from utils.command import CommandParser, exit_code
from utils.errors import UserError
from utils.log import LOGGER
from utils.progress import progress

FLOAT_BITS = 32
SMALLEST_SQUARE = 1e-30
REPORT_IMAGES = 16


@dataclass(frozen=True)
class LayerReport:
    """One quantized convolution. What only a pass over images can tell is None without one.

    Attributes:
        name: of the convolution.
        weight_bits, activation_bits: of its weights and its input.
        weight_grid, activation_grid: codes and scheme, such as ``-7..7`` and ``0..15 affine``.
        weight_step: mean over channels.
        activation_step: distance of two neighbouring output levels of the input's quantizer.
        weight_clipped, input_clipped: share of values outside the grid.
        weight_sqnr, input_sqnr: decibels.
        output_sqnr: decibels, of the convolution's result against that of its float weights and unquantized input.
        parameters: number of weights.
        bytes: packed codes, steps and one float32 bias per output channel (where a batch norm ends up when folded).
        macs: multiply-accumulate operations for one image.
        bops: bit operations for one image.
    """

    name: str
    weight_bits: int
    activation_bits: int | None
    weight_grid: str
    activation_grid: str
    weight_step: float
    activation_step: float | None
    weight_clipped: float
    input_clipped: float | None
    weight_sqnr: float
    input_sqnr: float | None
    output_sqnr: float | None
    parameters: int
    bytes: float
    macs: int | None
    bops: int | None

    @property
    def worst_first(self) -> float:
        """What the table is sorted by: the SQNR of the output, or where that is unknown of the weights."""
        return self.weight_sqnr if self.output_sqnr is None else self.output_sqnr


@dataclass(frozen=True)
class Totals:
    """The whole network against its float form with folded batch norms.

    Attributes:
        parameters: weights of the quantized convolutions.
        weight_bits: their average bits.
        bytes, float_bytes: including what is not quantized.
        macs, bops, float_bops: of the quantized convolutions, for one image; None where no image was seen.
    """

    parameters: int
    weight_bits: float
    bytes: float
    float_bytes: int
    macs: int | None
    bops: int | None
    float_bops: int | None

    @property
    def compression(self) -> float:
        """Float bytes over bytes."""
        return self.float_bytes / max(self.bytes, 1)

    def describe(self) -> str:
        """One or two lines."""
        text = (
            f"{self.parameters:,} weights of {self.weight_bits:.2f} bits on average; {self.bytes / 1e6:.3f} MB, float "
            f"{self.float_bytes / 1e6:.3f} MB: {self.compression:.2f} times smaller"
        )
        if self.bops:
            text += (
                f"\n{self.macs / 1e9:.3f} GMACs; {self.bops / 1e9:.2f} GBOPs, float {self.float_bops / 1e9:.2f} GBOPs: "
                f"{self.float_bops / self.bops:.1f} times fewer"
            )
        return text


# --- measuring ------------------------------------------------------------------------------------------------------


def decibels(signal: float, noise: float) -> float:
    """Ratio of two sums of squares in decibels; 300 at most, for no noise at all."""
    return 10 * math.log10(max(signal, SMALLEST_SQUARE) / max(noise, SMALLEST_SQUARE, signal * SMALLEST_SQUARE))


def grid_limits(form: IntegerForm) -> tuple[Tensor, Tensor]:
    """The inputs (one, or one a channel) below and above which a grid clips.

    They are the smallest and largest value; with thresholds, whose inputs are scaled apart from their values, half a
    neighbouring level outside the outermost thresholds, which for equal widths is the same.
    """
    if form.thresholds is None:
        return form.values(torch.full_like(form.step, form.grid.qmin)), form.values(
            torch.full_like(form.step, form.grid.qmax)
        )
    t = form.thresholds
    return (t[0] - (t[1] - t[0]) / 2).reshape(1), (t[-1] + (t[-1] - t[-2]) / 2).reshape(1)


def describe_grid(quantizer: Quantizer, form: IntegerForm) -> str:
    """Codes and kind of a grid, such as ``0..15 affine`` or ``-15..15 odd``."""
    codes = f"{form.grid.qmin}..{form.grid.qmax}"
    if form.odd:
        return f"{codes} odd"
    if form.thresholds is not None:
        return f"{codes} thresholds"
    return codes if quantizer.channels or quantizer.scheme == "signed" else f"{codes} {quantizer.scheme}"


class _Tally:
    """Sums over everything that was quantized."""

    def __init__(self) -> None:
        self.signal = self.noise = self.clipped = 0.0
        self.values = 0

    def add(self, exact: Tensor, quantized: Tensor) -> None:
        """Adds squares; the tensors have one shape."""
        self.signal += float(exact.float().square().sum(dtype=torch.float64))
        self.noise += float((exact.float() - quantized.float()).square().sum(dtype=torch.float64))
        self.values += exact.numel()

    def add_clipped(self, exact: Tensor, form: IntegerForm) -> None:
        low, high = (per_channel(limit.to(exact.device), exact) for limit in grid_limits(form))
        # A value that lies on the last code but for float rounding is not clipped.
        slack = per_channel(form.step.to(exact.device), exact) * 1e-4
        self.clipped += float(((exact < low - slack) | (exact > high + slack)).sum())

    @property
    def sqnr(self) -> float:
        return decibels(self.signal, self.noise)

    @property
    def clipped_share(self) -> float:
        return self.clipped / max(self.values, 1)


class _Watch:
    """Hooks on a quantized network that tally inputs and outputs of its convolutions while images pass."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[Quantizer, _Tally] = {}
        self.outputs: dict[str, _Tally] = {}
        self.read: dict[str, Quantizer] = {}
        self.operations: dict[str, int] = {}  # multiply-accumulates of all images
        self.images = 0
        self._handles = [model.register_forward_pre_hook(self._on_images)]
        weights = {conv.weight_quantizer for conv in model.modules() if isinstance(conv, QuantConv2d)}
        for name, module in model.named_modules():
            if isinstance(module, Quantizer) and module not in weights:
                self._handles.append(module.register_forward_hook(self._on_quantizer))
            elif isinstance(module, QuantConv2d):
                self._handles.append(module.register_forward_hook(self._on_convolution(name)))

    def _on_images(self, _model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.images += len(inputs[0])

    def macs(self, name: str) -> int | None:
        """Multiply-accumulates of one convolution for one image; None if no image was seen."""
        return self.operations[name] // self.images if name in self.operations else None

    def _on_quantizer(self, quantizer: Quantizer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not quantizer.enabled:
            return
        x = quantizer.equalized(inputs[0].float())
        tally = self.inputs.setdefault(quantizer, _Tally())
        tally.add(x, output)
        tally.add_clipped(x, quantizer.integer())
        # Kept on the tensor, so that it lives exactly as long as somebody may read the quantized one.
        output.before_quantization = x, quantizer

    def _on_convolution(self, name: str):
        def hook(conv: QuantConv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0]
            if conv.input_quantizer is not None:
                quantizer = conv.input_quantizer
                x = quantizer.equalized(x)
            else:
                x, quantizer = getattr(x, "before_quantization", (x, None))
            if quantizer is not None:
                self.read[name] = quantizer
            exact = conv._conv_forward(x.to(conv.weight.dtype), conv.weight, conv.bias)
            self.outputs.setdefault(name, _Tally()).add(exact, output)
            # A convolution may run several times for an image, and many images pass.
            self.operations[name] = self.operations.get(name, 0) + conv.weight.numel() * output[:, 0].numel()

        return hook

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def layer_reports(model: nn.Module, batches: Sequence[Tensor] = (), example: Tensor | None = None) -> list[LayerReport]:
    """A report for every quantized convolution, in the network's order.

    Args:
        model: prepared and calibrated; it is put into eval mode for the time being.
        batches: images (B, 3, H, W), 0 to 1, for the figures of inputs and outputs: one pass, each convolution twice.
        example: a single input, if there are no ``batches``: operations are counted for its size, nothing else.
    """
    was_training = model.training
    model.eval()
    watch = _Watch(model)
    try:
        for images in progress(batches or ([] if example is None else [example]), "layer by layer"):
            model(images)
    finally:
        watch.close()
        model.train(was_training)
    return [
        _report(model, name, conv, watch, bool(batches))
        for name, conv in model.named_modules()
        if isinstance(conv, QuantConv2d)
    ]


def _report(model: nn.Module, name: str, conv: QuantConv2d, watch: _Watch, seen: bool) -> LayerReport:
    weight_form, tally = conv.weight_quantizer.integer(), _Tally()
    weight = conv.weight.detach().float()
    tally.add(weight, conv.weight_quantizer(weight))
    tally.add_clipped(weight, weight_form)
    quantizer = watch.read.get(name) or _input_quantizer(model, name)
    form = quantizer.integer() if quantizer else None
    inputs = watch.inputs.get(quantizer) if seen else None
    outputs = watch.outputs.get(name) if seen else None
    bits, macs = conv.weight_quantizer.bits, watch.macs(name)
    return LayerReport(
        name=name,
        weight_bits=bits,
        activation_bits=quantizer.bits if quantizer else None,
        weight_grid=describe_grid(conv.weight_quantizer, weight_form),
        activation_grid=describe_grid(quantizer, form) if quantizer else "",
        weight_step=float(conv.weight_quantizer.current_step().float().mean()),
        activation_step=float(form.step.mean()) if form else None,
        weight_clipped=tally.clipped_share,
        input_clipped=inputs.clipped_share if inputs else None,
        weight_sqnr=tally.sqnr,
        input_sqnr=inputs.sqnr if inputs else None,
        output_sqnr=outputs.sqnr if outputs else None,
        parameters=weight.numel(),
        bytes=_bytes(conv),
        macs=macs,
        bops=macs * bits * (quantizer.bits if quantizer else FLOAT_BITS) if macs else None,
    )


def _input_quantizer(model: nn.Module, name: str) -> Quantizer | None:
    """The input quantizer of convolution ``name``: its own, or that in the slot of a block around it."""
    while name:
        quantizer = getattr(model.get_submodule(name), "input_quantizer", None)
        if quantizer is not None:
            return quantizer
        name = name.rpartition(".")[0]
    return None


def _bytes(conv: QuantConv2d) -> float:
    steps = conv.weight_quantizer.channels or 1
    return conv.weight.numel() * conv.weight_quantizer.bits / 8 + (steps + conv.out_channels) * FLOAT_BITS / 8


def _unquantized_bytes(model: nn.Module) -> int:
    """Parameters that stay float: of all but convolutions and what folding removes."""
    folded = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, Quantizer, GABFusion)
    others = [module for module in model.modules() if not isinstance(module, folded)]
    return sum(p.numel() for module in others for p in module.parameters(recurse=False)) * FLOAT_BITS // 8


def float_bytes(model: nn.Module) -> int:
    """Size of the float32 network with its batch norms folded: weights, and one bias per output channel."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    folded = sum(conv.weight.numel() + conv.out_channels for conv in convolutions) * FLOAT_BITS // 8
    return folded + _unquantized_bytes(model)


def quantized_bytes(model: nn.Module) -> int:
    """Size of the folded network with packed weight codes, steps and biases."""
    convolutions = [module for module in model.modules() if isinstance(module, QuantConv2d)]
    return round(sum(_bytes(conv) for conv in convolutions)) + _unquantized_bytes(model)


def totals(model: nn.Module, reports: Sequence[LayerReport]) -> Totals:
    """Sums over the layers of ``model``, and its float form."""
    parameters = sum(report.parameters for report in reports)
    counted = bool(reports) and all(report.macs is not None for report in reports)
    macs = sum(report.macs for report in reports) if counted else None
    return Totals(
        parameters=parameters,
        weight_bits=sum(report.parameters * report.weight_bits for report in reports) / max(parameters, 1),
        bytes=quantized_bytes(model),
        float_bytes=float_bytes(model),
        macs=macs,
        bops=sum(report.bops for report in reports) if counted else None,
        float_bops=macs * FLOAT_BITS * FLOAT_BITS if counted else None,
    )


@dataclass(frozen=True)
class Report:
    """All layers of a network and their sums; as text, a table with the noisiest layers first."""

    layers: list[LayerReport]
    totals: Totals

    def __str__(self) -> str:
        return f"{format_report(self.layers)}\n{self.totals.describe()}"


def report(model: nn.Module, batches: Sequence[Tensor] = (), example: Tensor | None = None) -> Report:
    """What every layer of a prepared and calibrated network costs and where precision is lost; ``print`` shows it.

    Args:
        model: any network from ``quant.prepare.prepare``.
        batches: inputs (B, C, H, W) by which inputs and outputs of convolutions are judged; without any, weights are.
        example: if there are no ``batches``, an input of the size that operations are counted for; by default of the
            shape that ``prepare`` was given.

    Raises:
        UserError: not prepared, or never calibrated.
    """
    check_calibrated(model)
    if not batches and example is None:
        example = example_input(model)
    layers = layer_reports(model, batches, example)
    return Report(layers, totals(model, layers))


# --- writing --------------------------------------------------------------------------------------------------------

# Heading, width, and how a value is shown.
_COLUMNS: dict[str, tuple[str, int, str]] = {
    "bits": ("bits", 6, ""),
    "weight_grid": ("weights", 14, ""),
    "activation_grid": ("inputs", 19, ""),
    "weight_step": ("w step", 9, ".2e"),
    "activation_step": ("in step", 9, ".2e"),
    "weight_clipped": ("w clip", 8, ".2%"),
    "input_clipped": ("in clip", 8, ".2%"),
    "weight_sqnr": ("w dB", 6, ".1f"),
    "input_sqnr": ("in dB", 7, ".1f"),
    "output_sqnr": ("out dB", 7, ".1f"),
    "parameters": ("params", 11, ",d"),
    "bytes": ("bytes", 11, ",.0f"),
    "bops": ("MBOPs", 9, ",.1f"),
}


def _cells(report: LayerReport) -> list[str]:
    shown = []
    for name, (_, _, style) in _COLUMNS.items():
        if name == "bits":
            shown.append(f"w{report.weight_bits}" + (f"a{report.activation_bits}" if report.activation_bits else ""))
            continue
        value = getattr(report, name)
        if name == "bops" and value is not None:
            value = value / 1e6
        shown.append("-" if value is None else format(value, style))
    return shown


def format_report(reports: Sequence[LayerReport], worst: int | None = None) -> str:
    """A table as text, the noisiest layers first; ``worst`` limits the rows."""
    rows = sorted(reports, key=lambda report: report.worst_first)[:worst]
    first = max([len(report.name) for report in rows] + [len("layer")]) + 1
    widths = [width for _, width, _ in _COLUMNS.values()]
    lines = [f"{'layer':<{first}}" + "".join(f"{heading:>{width}}" for heading, width, _ in _COLUMNS.values())]
    for report in rows:
        cells = zip(_cells(report), widths, strict=True)
        lines.append(f"{report.name:<{first}}" + "".join(f"{cell:>{width}}" for cell, width in cells))
    return "\n".join(lines)


def write_csv(reports: Sequence[LayerReport], file: str | Path, whole: Totals | None = None) -> None:
    """Writes every figure unrounded, a line a layer in the network's order.

    With ``whole``, two lines follow: ``total``, and ``float`` for the network before quantization.
    """
    names = [field.name for field in dataclasses.fields(LayerReport)]
    with Path(file).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(report) for report in reports)
        if whole is not None:
            shared = {"parameters": whole.parameters, "macs": whole.macs}
            writer.writerow(
                {"name": "total", "weight_bits": whole.weight_bits, "bytes": whole.bytes, "bops": whole.bops} | shared
            )
            sizes = {"weight_bits": FLOAT_BITS, "activation_bits": FLOAT_BITS}
            sizes |= {"bytes": whole.float_bytes, "bops": whole.float_bops}
            writer.writerow({"name": "float"} | sizes | shared)


def write_tensorboard(writer: Any, reports: Sequence[LayerReport], whole: Totals, step: int = 0) -> None:
    """Writes the table as text, and curves over the layers (their position in the network on the x axis).

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
    """
    headings = ["layer", *(heading for heading, _, _ in _COLUMNS.values())]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for report in sorted(reports, key=lambda report: report.worst_first):
        lines.append("| " + " | ".join([report.name, *_cells(report)]) + " |")
    text = whole.describe().replace("\n", "  \n") + "\n\n" + "\n".join(lines)
    writer.add_text("quantization/layers", text, step)
    for name in ("weight_bits", "weight_sqnr", "input_sqnr", "output_sqnr", "weight_clipped", "input_clipped"):
        for position, report in enumerate(reports):
            value = getattr(report, name)
            if value is not None:
                writer.add_scalar(f"layers/{name}", value, position)
    writer.flush()


# --- the command ----------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandParser(
        prog="python -m quant.report",
        description="Show bits, size, cost and precision of a quantized network's layers.",
    )
    parser.add_argument("--weights", required=True, help="quantized checkpoint")
    parser.add_argument("--data", default=None, help="dataset YAML whose training images measure inputs and outputs")
    parser.add_argument("--imgsz", "--img", "--img-size", type=int, default=None, help="pixels; default: as trained")
    parser.add_argument("--images", type=int, default=REPORT_IMAGES, help="how many of them")
    parser.add_argument("--worst", type=int, default=None, metavar="N", help="show the N noisiest layers only")
    parser.add_argument("--csv", default=None, metavar="FILE", help="write all figures there")
    parser.add_argument("--device", default="", help="cpu, or the number of a GPU")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[LayerReport]:
    """Does what the command line asks for."""
    # Only the command needs them: the report itself serves any torch model.
    from models.backend import load_network
    from quant.samples import open_samples
    from utils.devices import limit_threads, select_device

    if options.images < 1:
        raise UserError(f"--images {options.images}: must be at least 1")
    limit_threads()
    device = select_device(options.device)
    model, weights = load_network(options.weights)
    if not weights.quantization:
        raise UserError(f"--weights {options.weights} is not quantized: train it with --quant first")
    model = model.to(device).eval()
    stride = max(int(model.stride.max()), 32)
    size = options.imgsz or int(weights.trained_with("imgsz") or 640)
    size = -(-size // stride) * stride
    batches = []
    if options.data:
        pairs = open_samples(options.data, size, options.images, weights.names, stride, device)
        batches = [images for images, _ in pairs]
    reports = layer_reports(model, batches, torch.zeros(1, model.yaml["ch"], size, size, device=device))
    whole = totals(model, reports)
    LOGGER.info(format_report(reports, options.worst))
    LOGGER.info(f"{whole.describe()} ({size} x {size} pixels)")
    if not batches:
        LOGGER.info("Give --data to see how inputs and outputs fare")
    if options.csv:
        write_csv(reports, options.csv, whole)
        LOGGER.info(f"Written to {options.csv}")
    return reports


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_options(arguments)
    return exit_code("ERROR", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
