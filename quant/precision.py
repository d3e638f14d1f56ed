"""Mixed precision: how much each convolution suffers from few bits, and which bits it should have within a budget.

The sensitivity of a convolution is measured, not modelled: it alone is quantized, all else stays float, and the error
is read at the network's output. With y the float network's raw outputs and y_l(b) those with layer l at b bits,

    noise_l(b) = |y_l(b) - y|^2 / |y|^2,    SQNR = -10 log10 noise

Errors that different layers cause are nearly uncorrelated, so their squares add up, and the best bits are

    min sum_l noise_l(b_l)    subject to    sum_l cost_l b_l <= average * sum_l cost_l

a knapsack, solved greedily: from the fewest bits everywhere, the raise that saves most noise per cost comes next (bit
allocation as Shoham and Gersho posed it, IEEE Trans. ASSP 36, 1988; HAWQ, arXiv 1905.03696, takes the sensitivity from
Hessians instead). Chosen by the rise of the task's loss instead of by the noise, the bits of a yolov5n were worse by up
to 1.2 points of mAP50-95: the loss of a few images hardly changes with one layer's bits, or even falls.

    python -m quant.precision --weights runs/train/exp/weights/float_best.pt --data shapes.yaml
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.backend import load_network
from models.yolo import DetectionModel
from quant.calibrate import InputSampler, initialise
from quant.config import BITS, AutoBits, LayerOverride, QuantConfig
from quant.prepare import example_input, placed_bits, trace_convolutions
from quant.quantizer import Quantizer
from quant.recipe import build_config
from quant.registry import QUANTIZERS
from quant.samples import open_samples
from utils.command import CommandParser, exit_code
from utils.devices import limit_threads, select_device
from utils.errors import UserError
from utils.hyp import DEFAULT_FILE, load_hyp
from utils.log import LOGGER
from utils.loss import DetectionLoss, scale_loss_gains
from utils.progress import progress

MEASURED_BITS = (2, 3, 4, 6, 8)  # those between are interpolated: an error falls by 6 dB a bit
PARTS = ("weights", "inputs", "both")
CHOICE_IMAGES = 16
SMALLEST_NOISE = 1e-12  # 120 dB: float rounding


@dataclass(frozen=True)
class Sensitivity:
    """What happens to the network's output when one convolution alone is quantized.

    Attributes:
        name: of the convolution.
        bits: of its weights, its input or both.
        parameters: number of weights.
        macs: multiply-accumulate operations for one image.
        noise: squared error of the raw outputs over their squared magnitude.
        loss: rise of the task's loss per image, or None where it was not asked for.
    """

    name: str
    bits: int
    parameters: int
    macs: int
    noise: float
    loss: float | None = None

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise ratio of the network's output, in decibels."""
        return -10 * math.log10(max(self.noise, SMALLEST_NOISE))


# --- measuring ------------------------------------------------------------------------------------------------------


class _Recorded(nn.Module):
    """Stands in for a layer of a DetectionModel whose output is known."""

    def __init__(self, layer: nn.Module, output: Tensor) -> None:
        super().__init__()
        self.f, self.i, self.output = layer.f, layer.i, output

    def forward(self, *_inputs) -> Tensor:
        return self.output


class _Probe:
    """The float network on one batch, in which convolutions can be quantized one after the other.

    In a DetectionModel, layers in front of the present convolution are replaced by what they returned: that halves the
    time.

    Args:
        model: in eval mode; it is copied.
        images: (B, 3, H, W).
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = copy.deepcopy(model), images
        self.macs: dict[str, int] = {}
        self.layers: list[tuple[nn.Module, Tensor]] = []
        handles = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Conv2d):
                handles.append(module.register_forward_hook(self._count(name)))
        if isinstance(self.model, DetectionModel):
            for layer in self.model.model:
                handles.append(layer.register_forward_hook(lambda m, _, output: self.layers.append((m, output))))
        self.reference = output_tensors(self.model(images))
        for handle in handles:
            handle.remove()
        self.signal = _squares(self.reference)
        self._passed = 0

    def _count(self, name: str):
        def hook(conv: nn.Conv2d, _inputs, output: Tensor) -> None:
            self.macs[name] = self.macs.get(name, 0) + conv.weight.numel() * output[0, 0].numel()  # it may run again

        return hook

    def convolution(self, name: str) -> nn.Conv2d:
        """The convolution; call it in the order in which the network runs them."""
        conv = self.model.get_submodule(name)
        if self.layers:
            index = int(name.split(".")[1])
            while self._passed < index:
                layer, output = self.layers[self._passed]
                self.model.model[self._passed] = _Recorded(layer, output)
                self._passed += 1
        return conv

    def outputs(self, conv: nn.Conv2d, weight: Quantizer | None, input_quantizer: Quantizer | None) -> list[Tensor]:
        """The raw outputs with ``conv`` quantized, which is float again afterwards."""
        kept, handle = conv.weight.data, None
        if weight is not None:
            conv.weight.data = weight(kept)
        if input_quantizer is not None:
            handle = conv.register_forward_pre_hook(lambda _, inputs: (input_quantizer(inputs[0]),))
        try:
            return output_tensors(self.model(self.images))
        finally:
            conv.weight.data = kept
            if handle is not None:
                handle.remove()


def output_tensors(output: object) -> list[Tensor]:
    """The tensors in a network's output; of a Detect head in eval mode its raw maps, not the decoded boxes."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if not isinstance(output, (tuple, list)):
        return []
    if len(output) == 2 and isinstance(output[0], Tensor) and isinstance(output[1], list):
        output = output[1]
    return [tensor for part in output for tensor in output_tensors(part)]


def _squares(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum())


def _input_quantizers(
    model: nn.Module, config: QuantConfig, batches: Sequence[Tensor], names: Sequence[str], bits: Sequence[int]
) -> dict[tuple[str, int], Quantizer]:
    """Initialised quantizers of the inputs of convolutions."""
    samplers = {name: InputSampler(len(batches)) for name in names}
    handles = [model.get_submodule(name).register_forward_pre_hook(samplers[name]) for name in names]
    for images in batches:
        model(images)
    for handle in handles:
        handle.remove()
    method, options = QUANTIZERS[config.method], config.method_options()
    made = {}
    for name in names:
        values = samplers[name].values()
        for b in bits:
            made[name, b] = method.for_activations(b, config.resolved_scheme(), options).to(values.device)
            initialise(made[name, b], values, f"input of {name}")
    return made


def _weight_quantizers(
    model: nn.Module, config: QuantConfig, names: Sequence[str], bits: Sequence[int]
) -> dict[tuple[str, int], Quantizer]:
    method, options = QUANTIZERS[config.method], config.method_options()
    made = {}
    for name in names:
        weight = model.get_submodule(name).weight
        channels = weight.shape[0] if config.weight.granularity == "channel" else None
        for b in bits:
            made[name, b] = method.for_weights(b, channels, options).to(weight.device)
            initialise(made[name, b], weight, f"{name}.weight")
    return made


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    config: QuantConfig,
    batches: Sequence[Tensor],
    bits: Sequence[int] = MEASURED_BITS,
    parts: str = "weights",
    names: Sequence[str] | None = None,
    loss: Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]] | None = None,
    targets: Sequence[Tensor] | None = None,
) -> list[Sensitivity]:
    """Quantizes one convolution after the other and measures the network's output.

    Takes (convolutions x bits / 2) forward passes over ``batches``: 24 s for yolov5n and 32 images of 128 pixels on one
    core.

    Args:
        model: a float network; it is not changed.
        config: method, its options, scheme and granularity.
        batches: images (B, 3, H, W), 0 to 1.
        bits: candidates, 2 to 8.
        parts: ``weights``, ``inputs`` (the image stays as it is) or ``both``.
        names: convolutions; None for all.
        loss: takes raw maps and targets (``utils.loss.DetectionLoss``).
        targets: one tensor a batch, for ``loss``.

    Returns:
        One entry for each convolution, in the order of execution, and bit width.
    """
    model = copy.deepcopy(model).eval()
    readers, possible = trace_convolutions(model, batches[0][:1])
    chosen = [name for name in possible if names is None or name in names]
    behind_image = [name for name in chosen if readers.convolutions[name] != readers.image]
    weights = _weight_quantizers(model, config, chosen, bits) if parts != "inputs" else {}
    inputs = _input_quantizers(model, config, batches, behind_image, bits) if parts != "weights" else {}
    noise = dict.fromkeys(((name, b) for name in chosen for b in bits), 0.0)
    rise, signal = dict(noise), 0.0
    steps = len(noise) * len(batches)
    with progress(label="sensitivity", total=steps) as bar:
        for index, images in enumerate(batches):
            probe = _Probe(model, images)
            signal += probe.signal
            before = float(loss(probe.reference, targets[index])[0]) if loss else 0.0
            for name in chosen:
                conv = probe.convolution(name)
                for b in bits:
                    found = probe.outputs(conv, weights.get((name, b)), inputs.get((name, b)))
                    noise[name, b] += _squares(a - r for a, r in zip(found, probe.reference, strict=True))
                    rise[name, b] += float(loss(found, targets[index])[0]) - before if loss else 0.0
                    bar.update()
    signal, seen = max(signal, SMALLEST_NOISE), sum(len(images) for images in batches)
    sizes = {name: model.get_submodule(name).weight.numel() for name in chosen}
    return [
        Sensitivity(n, b, sizes[n], probe.macs[n], noise[n, b] / signal, rise[n, b] / seen if loss else None)
        for n, b in noise
    ]


# --- choosing -------------------------------------------------------------------------------------------------------


def noise_curve(measured: dict[int, float]) -> dict[int, float]:
    """Noise at every bit width: measured values made non-increasing, geometric means (decibels, linearly) between them.

    Args:
        measured: bits -> noise, with the fewest and the most bits among them.
    """
    known = sorted(measured)
    values, lowest = {}, math.inf
    for b in known:
        lowest = min(lowest, max(measured[b], SMALLEST_NOISE))
        values[b] = lowest
    for low, high in itertools.pairwise(known):
        for b in range(low + 1, high):
            share = (b - low) / (high - low)
            values[b] = values[low] ** (1 - share) * values[high] ** share
    return values


def choose_bits(noise: dict[str, dict[int, float]], costs: dict[str, float], average: float) -> dict[str, int]:
    """Bits of each layer that make the summed noise small within a budget.

    Args:
        noise: layer -> bits -> noise, every layer with the same bits.
        costs: layer -> cost of one bit.
        average: budget, the average of the bits weighted by ``costs``.

    Returns:
        Layer -> bits, whose weighted average is at most ``average``, and short of it by less than any raise that would
        reduce the noise.

    Raises:
        ValueError: the budget lies below the fewest bits.
    """
    candidates = sorted(next(iter(noise.values())))
    if average < candidates[0]:
        raise ValueError(f"an average of {average:g} bits is below the fewest, {candidates[0]}")
    bits = dict.fromkeys(noise, candidates[0])
    # Half a part in a billion more, as sums of floats may miss an average that is met exactly.
    left = (average * (1 + 5e-10) - candidates[0]) * sum(costs[name] for name in noise)
    while True:
        best = None
        for name, curve in noise.items():
            for b in candidates:
                price = costs[name] * (b - bits[name])
                saved = curve[bits[name]] - curve[b]
                if b > bits[name] and price <= left and saved > 0 and (best is None or saved > best[0] * price):
                    best = (saved / price, name, b, price)
        if best is None:
            return bits
        _, name, bits[name], price = best
        left -= price


@dataclass
class Choice:
    """Bits that were chosen.

    Attributes:
        config: the configuration with the bits in ``layers``; nothing remains to be chosen.
        bits: layer -> bits of those that were chosen for.
        average: of the bits, weighted as the budget is.
        noise, uniform_noise: expected at the output, and what the general bits everywhere would give.
    """

    config: QuantConfig
    bits: dict[str, int]
    average: float
    noise: float
    uniform_noise: float

    def describe(self) -> str:
        """A few lines: the average, what is expected of it, and the layers by bits."""
        auto, general = self.config.auto_bits, self.config.weight.bits
        sqnr, uniform = (-10 * math.log10(max(value, SMALLEST_NOISE)) for value in (self.noise, self.uniform_noise))
        lines = [
            f"Weight bits of {len(self.bits)} layers: average {self.average:.3f} of {auto.average:g} by {auto.cost}; "
            f"output SQNR expected with such weights {sqnr:.1f} dB, with {general} bits everywhere {uniform:.1f} dB"
        ]
        for b in BITS:
            layers = [name for name, chosen in self.bits.items() if chosen == b]
            if layers:
                lines.append(f"  {b} bits: {', '.join(layers)}")
        return "\n".join(lines)


def free_layers(model: nn.Module, config: QuantConfig, example: Tensor | None = None) -> dict[str, int]:
    """Layers whose weight bits the general ones decide -> their input bits.

    First and Detect layers and those that ``layers`` gives weight bits to are not among them.
    """
    readers, names = trace_convolutions(model, example_input(model) if example is None else example)
    tried = []
    for bits in BITS[:2]:  # what follows the general bits differs between two of them
        weight = dataclasses.replace(config.weight, bits=bits)
        tried.append(placed_bits(model, dataclasses.replace(config, weight=weight), readers, names))
    return {name: tried[0][name].activation for name in names if tried[0][name].weight != tried[1][name].weight}


def check_auto_bits(model: nn.Module, config: QuantConfig, example: Tensor | None = None) -> dict[str, int]:
    """``free_layers``; raises UserError if bits are to be chosen and there is no layer to choose for."""
    inputs = free_layers(model, config, example)
    if config.auto_bits.pending and not inputs:
        raise UserError("auto_bits: the bits of every convolution are given already; nothing is left to choose")
    return inputs


def resolve_auto_bits(
    model: nn.Module, config: QuantConfig, batches: Sequence[Tensor], measured: Sequence[Sensitivity] | None = None
) -> Choice:
    """Carries out ``config.auto_bits``: chooses weight bits layer by layer.

    Only weights vary. Inputs keep their general bits: several convolutions and a shortcut share one input quantizer,
    and a GABFusion folds only where a single grid reads its Concat.

    Args:
        model: the float network.
        config: with ``auto_bits.average`` set; not changed.
        batches: images (B, 3, H, W), 0 to 1.
        measured: the weights' sensitivity, if it is known already: it serves any budget.

    Raises:
        UserError: no layer to choose for, or weights that are not finite.
    """
    auto = config.auto_bits
    inputs = check_auto_bits(model, config, batches[0][:1])
    if measured is None:
        measured = sensitivity(model, config, batches, names=list(inputs))
    points: dict[str, dict[int, float]] = {}
    costs: dict[str, float] = {}
    for entry in measured:
        if entry.name in inputs:
            points.setdefault(entry.name, {})[entry.bits] = entry.noise
            costs[entry.name] = entry.macs * inputs[entry.name] if auto.cost == "bops" else entry.parameters
    curves = {name: noise_curve(values) for name, values in points.items()}
    bits = choose_bits(curves, costs, auto.average)
    overrides = {re.escape(name): LayerOverride(weight_bits=b) for name, b in bits.items() if b != config.weight.bits}
    layers = dict(config.layers)
    for pattern, override in overrides.items():
        given = layers.pop(pattern, LayerOverride())  # of the input's bits: it must not be lost
        layers[pattern] = dataclasses.replace(given, weight_bits=override.weight_bits)
    return Choice(
        config=dataclasses.replace(config, layers=layers, auto_bits=AutoBits(auto.average, auto.cost, True)),
        bits=bits,
        average=sum(costs[name] * b for name, b in bits.items()) / sum(costs.values()),
        noise=sum(curves[name][b] for name, b in bits.items()),
        uniform_noise=sum(curve[config.weight.bits] for curve in curves.values()),
    )


# --- the command ----------------------------------------------------------------------------------------------------


def format_sensitivity(found: Sequence[Sensitivity]) -> str:
    """A table: a line a layer with the output SQNR (dB) and the rise of the loss at each width, worst layers first."""
    widths = sorted({entry.bits for entry in found})
    by_layer: dict[str, dict[int, Sensitivity]] = {}
    for entry in found:
        by_layer.setdefault(entry.name, {})[entry.bits] = entry
    with_loss = found[0].loss is not None
    lines = [
        f"{'':<34}{'':>12}{'output SQNR in dB at':^{7 * len(widths)}}"
        + (f"{'rise of the loss at':^{10 * len(widths)}}" if with_loss else ""),
        f"{'layer':<34}{'parameters':>12}"
        + "".join(f"{f'{b} bit':>7}" for b in widths)
        + "".join(f"{f'{b} bit':>10}" for b in widths if with_loss),
    ]
    for name, row in sorted(by_layer.items(), key=lambda item: -sum(entry.noise for entry in item[1].values())):
        cells = "".join(f"{row[b].sqnr:>7.1f}" for b in widths)
        if with_loss:
            cells += "".join(f"{row[b].loss:>+10.4f}" for b in widths)
        lines.append(f"{name:<34}{row[widths[0]].parameters:>12,}{cells}")
    return "\n".join(lines)


def write_sensitivity(found: Sequence[Sensitivity], file: str | Path) -> None:
    """Writes a CSV with a line for each layer and bit width."""
    columns = ["name", "bits", "parameters", "macs", "noise", "sqnr", "loss"]
    with Path(file).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows([getattr(entry, column) for column in columns] for entry in found)


def detection_loss(model: DetectionModel, hyp: dict, image_size: int) -> DetectionLoss:
    """The loss that training would use for ``model``."""
    detect = model.detect
    gains = scale_loss_gains(hyp, detect.nl, detect.nc, image_size)
    return DetectionLoss(detect.anchors, detect.stride, detect.nc, gains).to(detect.anchors.device)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandParser(
        prog="python -m quant.precision", description="Measure how much each convolution suffers from few bits."
    )
    parser.add_argument("--weights", required=True, help="float checkpoint, official or ours")
    parser.add_argument("--data", default="shapes.yaml", help="dataset YAML; its training images are used")
    parser.add_argument("--imgsz", "--img", "--img-size", type=int, default=None, help="pixels; default: as trained")
    parser.add_argument("--images", type=int, default=CHOICE_IMAGES, help="how many of them")
    bits = {"type": int, "nargs": "+", "default": list(MEASURED_BITS), "choices": BITS, "metavar": "N"}
    parser.add_argument("--bits", help="that are measured", **bits)
    parser.add_argument("--parts", choices=PARTS, default="weights", help="what is quantized of a convolution")
    parser.add_argument("--quant", default=None, metavar="METHOD", help="default: lsq")
    parser.add_argument("--recipe", default=None, help="quantization YAML")
    parser.add_argument("--hyp", default=None, help="gains of the loss; default: those of the checkpoint")
    parser.add_argument("--csv", default=None, metavar="FILE", help="write the table there")
    parser.add_argument("--device", default="", help="cpu, or the number of a GPU")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[Sensitivity]:
    """Does what the command line asks for."""
    if options.images < 1:
        raise UserError(f"--images {options.images}: must be at least 1")
    limit_threads()
    device = select_device(options.device)
    model, weights = load_network(options.weights)
    if weights.quantization:
        raise UserError(f"--weights {options.weights} is quantized already; give a float checkpoint")
    model = model.to(device).eval()
    saved = weights.checkpoint or {}
    size = options.imgsz or int(weights.trained_with("imgsz") or 640)
    hyp = saved["hyp"] if saved.get("hyp") and not options.hyp else load_hyp(options.hyp or DEFAULT_FILE)
    stride = max(int(model.stride.max()), 32)
    size = -(-size // stride) * stride
    batches = open_samples(options.data, size, options.images, weights.names, stride, device)
    config = build_config(options.quant, recipe=options.recipe)
    found = sensitivity(
        model, config, [images for images, _ in batches], sorted(set(options.bits)), options.parts,
        loss=detection_loss(model, hyp, size), targets=[targets for _, targets in batches],
    )  # fmt: skip
    LOGGER.info(f"{options.parts} of one convolution quantized ({config.method}); {options.images} images, {size} px")
    LOGGER.info(format_sensitivity(found))
    if options.csv:
        write_sensitivity(found, options.csv)
        LOGGER.info(f"Written to {options.csv}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_options(arguments)
    return exit_code("ERROR", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
