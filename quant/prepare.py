"""Turns a float network into its quantization-aware form, following the placement policy.

* Every convolution gets a weight quantizer and reads a quantized input.
* One quantizer per (tensor, grid): a block whose convolutions read one tensor quantizes it once, in its slot; readers
  of one tensor in different blocks share a quantizer if their grids agree.
* The image is 8 bit with step 1/255. The first convolution and Detect's output convolutions are 8 bit by default.
* Pools, upsampling and concatenations run on unquantized values in training; as rounding commutes with all of them, the
  exporter can move the quantizers in front.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.common import Concat
from models.yolo import Detect, DetectionModel
from quant.config import QuantConfig
from quant.gabfusion import GABFusion, fusion_nodes
from quant.layers import QuantConv2d
from quant.lsq import FixedGrid
from quant.quantizer import Quantizer
from quant.registry import QUANTIZERS
from quant.trace import trace_readers
from utils.errors import UserError


@dataclass(frozen=True)
class LayerBits:
    """Bits of one convolution's weights and input."""

    weight: int
    activation: int


def layer_bits(model: nn.Module, config: QuantConfig, first: set[str], names: list[str]) -> dict[str, LayerBits]:
    """Bits of each convolution: overrides by regular expression, then first and Detect layers, then the general ones.

    Args:
        model: the network; convolutions inside a ``Detect`` module are its output convolutions.
        config: the policy.
        first: names of the convolutions that read the image.
        names: names of all convolutions.

    Raises:
        UserError: an override that matches no convolution.
    """
    detect = {
        f"{name}.{inner}" if name else inner
        for name, module in model.named_modules()
        if isinstance(module, Detect)
        for inner, part in module.named_modules()
        if isinstance(part, nn.Conv2d)
    }
    bits = {}
    for name in names:
        weight, activation = config.weight.bits, config.activation.bits
        if name in first:
            weight, activation = config.first_layer_bits, 8
        elif name in detect:
            weight = activation = config.detect_bits
        bits[name] = LayerBits(weight, activation)
    for pattern, override in config.layers.items():
        matching = [name for name in names if re.fullmatch(pattern, name)]
        if not matching:
            raise UserError(
                f"layers: {pattern!r} matches no convolution. Names look like {names[0]!r} and {names[-1]!r}; the "
                "expression must match the whole name"
            )
        for name in matching:
            old = bits[name]
            activation = 8 if name in first else override.activation_bits or old.activation
            bits[name] = LayerBits(override.weight_bits or old.weight, activation)
    return bits


def prepare(model: nn.Module, config: QuantConfig, example: Tensor | None = None) -> nn.Module:
    """Puts quantizers, and GABFusion if asked for, into ``model``, in place.

    The quantizers have no ranges yet: ``quant.calibrate`` sets them, or a state_dict.

    Args:
        model: a float network whose batch norms are not folded.
        config: the policy.
        example: input (B, 3, H, W) for finding out who reads what; needed unless ``model`` is a DetectionModel.

    Returns:
        ``model``.

    Raises:
        UserError: already quantized, GABFusion without a Concat, an override that matches nothing.
    """
    if any(isinstance(module, QuantConv2d) for module in model.modules()):
        raise UserError("this model is quantized already; start from a float checkpoint")
    if example is None:
        example = example_input(model)
    readers = trace_readers(model, example)
    names = list(readers.convolutions)
    first = {name for name, tensor in readers.convolutions.items() if tensor == readers.image}
    bits = layer_bits(model, config, first, names)
    inputs = _InputQuantizers(config)
    method, options = QUANTIZERS[config.method], config.method_options()

    in_slot: set[str] = set()
    for block, tensor in readers.slots.items():
        inside = [name for name in names if name.startswith(f"{block}.") and readers.convolutions[name] == tensor]
        grids = {bits[name].activation for name in inside}
        # An empty slot is right where the readers disagree (each then has its own quantizer) or an outer block has
        # quantized the tensor already.
        if len(grids) == 1 and not in_slot.intersection(inside):
            model.get_submodule(block).input_quantizer = inputs.get(tensor, grids.pop(), tensor == readers.image)
            in_slot.update(inside)
    for name in names:
        conv = model.get_submodule(name)
        tensor = readers.convolutions[name]
        quantizer = None if name in in_slot else inputs.get(tensor, bits[name].activation, tensor == readers.image)
        channels = conv.out_channels if config.weight.granularity == "channel" else None
        weight_quantizer = method.for_weights(bits[name].weight, channels, options)
        model.set_submodule(name, QuantConv2d.from_float(conv, weight_quantizer, quantizer))
    if config.gabfusion.enabled:
        insert_fusion(model, config)
    model.to(example.device)
    model.quantization = config.to_dict()
    return model


def example_input(model: nn.Module) -> Tensor:
    """A small blank image that ``model`` accepts, (1, 3, side, side) with sides of twice the largest stride."""
    side = 2 * int(max(model.stride)) if hasattr(model, "stride") else 64
    return torch.zeros(1, 3, side, side, device=next(model.parameters()).device)


class _InputQuantizers:
    """Makes input quantizers, one per (tensor, bits)."""

    def __init__(self, config: QuantConfig) -> None:
        self.method, self.options = QUANTIZERS[config.method], config.method_options()
        self.scheme = config.activation.scheme
        self.made: dict[tuple[int, int], Quantizer] = {}

    def get(self, tensor: int, bits: int, is_image: bool) -> Quantizer:
        if (tensor, bits) not in self.made:
            self.made[tensor, bits] = (
                FixedGrid() if is_image else self.method.for_activations(bits, self.scheme, self.options)
            )
        return self.made[tensor, bits]


def insert_fusion(model: nn.Module, config: QuantConfig) -> None:
    """Puts a GABFusion module into every Concat of the network's top level (the neck; never into SPPF or C3).

    Raises:
        UserError: the model has no Concat.
    """
    layers = model.model if isinstance(model, DetectionModel) else model
    nodes = [layer for layer in layers.children() if isinstance(layer, Concat)]
    if not nodes:
        raise UserError("--gabfusion: this model has no Concat at which branches could be balanced; leave it out")
    fusion = config.gabfusion
    for layer in nodes:
        branches = len(layer.f) if isinstance(getattr(layer, "f", None), (list, tuple)) else 2
        layer.balance = GABFusion(branches, fusion.balance, fusion.paper, fusion.beta, fusion.eta, fusion.epsilon)


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """All quantizers of a prepared model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switches all fake quantization on or off."""
    for quantizer in quantizers(model).values():
        quantizer.enabled = enabled


def reading_quantizers(
    model: nn.Module, outputs: list[str], example: Tensor | None = None
) -> dict[str, list[Quantizer]]:
    """For each named module, the quantizers that read its output directly, lowest bits first, each once."""
    readers = trace_readers(model, example_input(model) if example is None else example, outputs)
    found = {}
    for output in outputs:
        tensor = readers.outputs[output]
        names = [
            name for table in (readers.slots, readers.convolutions) for name, read in table.items() if read == tensor
        ]
        quantizers_of_names = (model.get_submodule(name).input_quantizer for name in names)
        unique = {id(quantizer): quantizer for quantizer in quantizers_of_names if quantizer is not None}
        found[output] = sorted(unique.values(), key=lambda quantizer: quantizer.bits)
    return found


def fusion_readers(model: nn.Module) -> dict[str, Quantizer]:
    """Fusion node name -> the quantizer that reads the fused tensor.

    Raises:
        UserError: several grids, or none, read it, so that its normalisation cannot be folded into steps.
    """
    concats = {node: node.removesuffix(".balance") for node in fusion_nodes(model)}
    reading = reading_quantizers(model, list(concats.values()))
    for node, concat in concats.items():
        if len(reading[concat]) != 1:
            raise UserError(
                f"{node}: {len(reading[concat])} grids read this concatenation; folding it needs exactly one"
            )
    return {node: reading[concat][0] for node, concat in concats.items()}


def model_from_checkpoint(checkpoint: dict, weights: str = "ema") -> DetectionModel:
    """Rebuilds the network, float or quantized, that a checkpoint of this project holds.

    Args:
        checkpoint: as ``utils.checkpoint.load_checkpoint`` returns it.
        weights: ``ema`` (falls back to ``model``) or ``model``.

    Returns:
        The network with its weights, names and stride, in training mode.
    """
    model = DetectionModel(checkpoint["model_yaml"])
    if checkpoint.get("quantization"):
        prepare(model, QuantConfig.from_dict(checkpoint["quantization"], "the checkpoint's quantization"))
    state = checkpoint.get(weights) or checkpoint["model"]
    model.load_state_dict(state)
    model.names = dict(checkpoint["names"])
    return model
