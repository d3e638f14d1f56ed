"""Turns a float network into its quantization-aware form, following the placement policy.

* Every convolution gets a weight quantizer and reads a quantized input.
* One quantizer per (tensor, grid): a block whose convolutions read one tensor quantizes it once, in its slot; readers
  of one tensor in different blocks share a quantizer if their grids agree.
* The image is 8 bit with step 1/255 (for TensorRT 7 bit with step 1/127: int8 with zero point 0 has no more codes above
  zero); under ``activation.image: learned`` its 8-bit grid is calibrated and trained. The first convolution, Detect's
  output convolutions and those whose result the network returns are 8 bit by default.
* ``activation.output`` adds a quantizer on the result of every convolution, behind its batch norm and in front of the
  activation function; not where the network's own result comes out.
* Pools, upsampling and concatenations run on unquantized values in training; as rounding commutes with all of them, the
  exporter can move the quantizers in front.
* Any other layer with weights (linear, transposed, 1- and 3-dimensional ones, convolutions of a derived class) stays
  float and is named in the log.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.common import Add, Concat
from models.yolo import Detect, DetectionModel
from quant.config import QuantConfig
from quant.equalize import insert_equalizers
from quant.gabfusion import GABFusion, fusion_nodes
from quant.layers import QuantBatchNorm2d, QuantConv2d, replace_module
from quant.lsq import LSQ, FixedGrid
from quant.primitives import activation_grid
from quant.quantizer import Quantizer
from quant.registry import QUANTIZERS
from quant.trace import Flow, Readers, norms_behind, trace_flow, trace_readers
from utils.errors import UserError
from utils.log import LOGGER

IMAGE_BITS = 8


@dataclass(frozen=True)
class LayerBits:
    """Bits of one convolution's weights and input."""

    weight: int
    activation: int


def layer_bits(
    model: nn.Module, config: QuantConfig, first: set[str], names: list[str], last: Collection[str] = ()
) -> dict[str, LayerBits]:
    """Bits of each convolution: overrides by regular expression, then first and last layers, then the general ones.

    Args:
        model: the network; convolutions inside a ``Detect`` module are its output convolutions.
        config: the policy.
        first: names of the convolutions that read the image.
        names: names of all convolutions.
        last: convolutions that get ``detect_bits`` too: those whose result the network returns.

    Raises:
        UserError: an override that matches no convolution.
    """
    last = detect_convolutions(model) | set(last)
    bits = {}
    for name in names:
        weight, activation = config.weight.bits, config.activation.bits
        if name in first:
            weight, activation = config.first_layer_bits, IMAGE_BITS
        elif name in last:
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
            activation = IMAGE_BITS if name in first else override.activation_bits or old.activation
            bits[name] = LayerBits(override.weight_bits or old.weight, activation)
    return bits


def detect_convolutions(model: nn.Module) -> set[str]:
    """Names of the convolutions inside ``Detect`` modules."""
    return {
        f"{name}.{inner}" if name else inner
        for name, module in model.named_modules()
        if isinstance(module, Detect)
        for inner, part in module.named_modules()
        if isinstance(part, nn.Conv2d)
    }


def prepare(model: nn.Module, config: QuantConfig, example: Tensor | None = None) -> nn.Module:
    """Puts quantizers, and GABFusion if asked for, into ``model``, in place.

    The quantizers have no ranges yet: ``quant.calibrate`` sets them, or a state_dict.

    Args:
        model: a float network whose batch norms are not folded.
        config: the policy.
        example: input (B, 3, H, W) for finding out who reads what; needed unless ``model`` is a DetectionModel. Its
            shape is kept in ``model.example_shape``, so that ``fold`` and others can do without.

    Returns:
        ``model``.

    Raises:
        UserError: an impossible configuration, already quantized, nothing to quantize, GABFusion without a Concat, an
            override that matches nothing.
    """
    config.validate("the configuration")
    if any(isinstance(module, QuantConv2d) for module in model.modules()):
        raise UserError("this model is quantized already; start from a float checkpoint")
    if config.auto_bits.pending:
        raise UserError(
            "auto_bits: the bits of the layers are not chosen yet; prepare the model with "
            "quant.precision.resolve_auto_bits(model, config, batches).config"
        )
    if example is None:
        example = example_input(model)
    if not isinstance(example, Tensor):
        raise UserError(f"example is a {type(example).__name__}: only networks that read one tensor can be quantized")
    readers, names = trace_convolutions(model, example)
    if not names or isinstance(model, nn.Conv2d):
        raise UserError(
            "this model runs no nn.Conv2d inside that could be quantized (a single one: wrap it in Sequential)"
        )
    norms = {} if config.activation.output is None else norms_behind(model, trace_flow(model, example))
    _quantize_convolutions(model, config, readers, names)
    if config.equalizes:
        set_enabled(model, False)  # they have no ranges yet
        insert_equalizers(model.to(example.device), example)
        set_enabled(model, True)
    if config.activation.output is not None:
        insert_output_quantizers(model, config.activation.output, readers, norms)
    model.to(example.device)  # the fusion nodes are found by running what has been put in so far
    if config.gabfusion.enabled:
        insert_fusion(model, config, example)
    model.to(example.device)
    model.quantization, model.example_shape = config.to_dict(), tuple(example.shape)
    _log_float_layers(model)
    return model


def quantizable(conv: nn.Conv2d) -> bool:
    """Whether ``conv`` is what ``QuantConv2d`` computes: of no derived class, padded with zeros if at all, and with a
    weight of its own (under weight norm or pruning it is computed from others)."""
    return type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and "weight" in conv._parameters


def _log_float_layers(model: nn.Module) -> None:
    """Names the layers with weights that are not quantized."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    left = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, kinds) and not isinstance(module, QuantConv2d)
    ]
    if left:
        LOGGER.info(f"{len(left)} layers stay float: {', '.join(left[:8])}{', ...' if len(left) > 8 else ''}")


def first_convolutions(readers: Readers) -> set[str]:
    """The convolutions that read the image; where none does (it is normalised first), those that read what the
    convolution that runs first reads."""
    tensors = readers.convolutions.values()
    tensor = readers.image if readers.image in tensors else next(iter(tensors))
    return {name for name, read in readers.convolutions.items() if read == tensor}


def trace_convolutions(model: nn.Module, example: Tensor) -> tuple[Readers, list[str]]:
    """Who reads what (with the outputs of convolutions and norms), and the convolutions to quantize, as they run."""
    traced = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    readers = trace_readers(model, example, traced)
    return readers, [name for name in readers.convolutions if quantizable(model.get_submodule(name))]


def placed_bits(model: nn.Module, config: QuantConfig, readers: Readers, names: list[str]) -> dict[str, LayerBits]:
    """``layer_bits`` with the first and last of the convolutions ``names`` found by ``readers``."""
    last = [name for name in names if readers.outputs[name] in readers.results]
    return layer_bits(model, config, first_convolutions(readers).intersection(names), names, last)


def _quantize_convolutions(model: nn.Module, config: QuantConfig, readers: Readers, names: list[str]) -> None:
    """Replaces the convolutions ``names`` by quantized ones and fills the slots of blocks."""
    images = {readers.convolutions[name] for name in first_convolutions(readers)}
    bits = placed_bits(model, config, readers, names)
    inputs = _InputQuantizers(config, readers.image)
    method, options = QUANTIZERS[config.method], config.method_options()

    in_slot: set[str] = set()
    for block, tensor in readers.slots.items():
        inside = [name for name in names if name.startswith(f"{block}.") and readers.convolutions[name] == tensor]
        grids = {bits[name].activation for name in inside}
        # An empty slot is right where the readers disagree (each then has its own quantizer) or an outer block has
        # quantized the tensor already.
        if len(grids) == 1 and not in_slot.intersection(inside):
            model.get_submodule(block).input_quantizer = inputs.get(tensor, grids.pop(), tensor in images)
            in_slot.update(inside)
    for name in names:
        conv = model.get_submodule(name)
        tensor = readers.convolutions[name]
        quantizer = None if name in in_slot else inputs.get(tensor, bits[name].activation, tensor in images)
        channels = conv.out_channels if config.weight.granularity == "channel" else None
        weight_quantizer = method.for_weights(bits[name].weight, channels, options)
        replace_module(model, conv, QuantConv2d.from_float(conv, weight_quantizer, quantizer))


def example_input(model: nn.Module) -> Tensor:
    """A small blank image that ``model`` accepts: (1, 3, side, side) with sides of twice its stride, or for
    networks other than a DetectionModel the shape that ``prepare`` was given.

    Raises:
        UserError: another network, which has not been prepared.
    """
    if isinstance(model, DetectionModel):
        side = 2 * model.image_stride
        shape = (1, 3, side, side)
    elif hasattr(model, "example_shape"):
        shape = model.example_shape
    else:
        raise UserError(
            f"{type(model).__name__}: what it reads is unknown; pass example=, an input tensor (B, 3, H, W)"
        )
    return torch.zeros(shape, device=next(model.parameters()).device)


class _InputQuantizers:
    """Makes input quantizers, one per (tensor, bits)."""

    def __init__(self, config: QuantConfig, image: int) -> None:
        # The fixed grid holds 0..1, so it serves nothing but the image itself.
        self.fixed = image if config.activation.image == "fixed" else None
        self.method, self.options = QUANTIZERS[config.method], config.method_options()
        self.scheme, self.signed = config.resolved_scheme(), config.target == "tensorrt"
        self.made: dict[tuple[int, int], Quantizer] = {}

    def get(self, tensor: int, bits: int, is_image: bool) -> Quantizer:
        if (tensor, bits) not in self.made:
            self.made[tensor, bits] = (
                self._for_image(tensor) if is_image else self.method.for_activations(bits, self.scheme, self.options)
            )
        return self.made[tensor, bits]

    def _for_image(self, tensor: int) -> Quantizer:
        if tensor == self.fixed:
            return FixedGrid(scheme="signed" if self.signed else "unsigned")
        scheme = "signed" if self.signed else "affine"
        return LSQ(IMAGE_BITS, activation_grid(IMAGE_BITS, scheme), scheme)


def insert_output_quantizers(model: nn.Module, bits: int, readers: Readers, norms: dict[str, str]) -> None:
    """Quantizes what every convolution hands on: the batch norm behind it does, or it does so itself.

    The grid is uniform and affine whatever the method is, because that is what integer convolutions write. Left out are
    Detect's convolutions and those whose result the network returns: boxes and scores stay float.

    Args:
        model: with ``QuantConv2d``, traced before with the outputs of all convolutions.
        bits: of the grid, 2 to 8.
        readers: from ``trace_readers``.
        norms: from ``norms_behind``.
    """
    detect = detect_convolutions(model)
    for name in readers.convolutions:
        norm_name = norms.get(name)
        result = readers.outputs[norm_name or name]
        if name in detect or result in readers.results or not isinstance(model.get_submodule(name), QuantConv2d):
            continue
        quantizer = LSQ(bits, activation_grid(bits, "affine"), "affine")
        quantizer.keep_output = False
        if norm_name is None:
            model.get_submodule(name).output_quantizer = quantizer
        else:
            norm = model.get_submodule(norm_name)
            replace_module(model, norm, QuantBatchNorm2d.from_float(norm, quantizer))


def fusion_points(model: nn.Module, scope: str, flow: Flow) -> dict[str, Concat | Add]:
    """The modules by name at which branches can be balanced.

    Left out are concatenations over another dimension than channels, and those whose branches are pooled copies of one
    tensor (an SPP written as rows of a model YAML): there is nothing to balance. SPPF and SPP themselves use neither.

    Args:
        model: any network.
        scope: ``neck``, only what the network itself fuses; ``all``, the blocks of ``models.common`` (C3) too.
        flow: from ``trace_flow``.
    """
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, (Concat, Add)) or name not in flow.branches or flow.copies_of_one(name):
            continue
        if joins_channels(module) and not (scope == "neck" and inside_block(model, name)):
            found[name] = module
    return found


def joins_channels(module: Concat | Add) -> bool:
    """Whether the branches are channels (or summands): other dimensions have no factor a branch."""
    return isinstance(module, Add) or module.d in (1, -3)


def inside_block(model: nn.Module, name: str) -> bool:
    """Whether the module ``name`` is part of a block of ``models.common`` (C3), not of the network itself."""
    return type(model.get_submodule(name.rpartition(".")[0])).__module__ == Concat.__module__


def insert_fusion(model: nn.Module, config: QuantConfig, example: Tensor) -> None:
    """Puts a GABFusion module into every Concat and Add that ``gabfusion.scope`` covers.

    Raises:
        UserError: the model has none.
    """
    fusion = config.gabfusion
    flow = trace_flow(model, example)
    points = fusion_points(model, fusion.scope, flow)
    if not points:
        raise UserError(
            "--gabfusion: this model has no Concat or Add at which branches could be balanced; leave it out"
            + ("" if fusion.scope == "all" else ", or try gabfusion.scope: all")
        )
    for name, module in points.items():
        if len(flow.calls[name]) > 1:
            raise UserError(
                f"{name}: this {type(module).__name__} runs {len(flow.calls[name])} times, and GABFusion needs one for "
                "each place with factors and statistics of its own; make a module for each"
            )
        module.balance = GABFusion(
            len(flow.branches[name]), fusion.balance, fusion.paper, fusion.beta, fusion.eta, fusion.epsilon,
            "add" if isinstance(module, Add) else "concat",
        )  # fmt: skip


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """All quantizers of a prepared model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def check_calibrated(model: nn.Module) -> None:
    """Raises UserError, saying what to do, unless ``model`` is quantized and its quantizers have ranges."""
    found = quantizers(model)
    if not found:
        raise UserError("this model is not quantized: train it with --quant, or prepare and calibrate it, first")
    missing = [name for name, q in found.items() if not bool(q.initialised) and not isinstance(q, FixedGrid)]
    if missing:
        raise UserError(f"{len(missing)} quantizers have no range yet (first: {missing[0]}): calibrate the model first")
    broken = [name for name, q in found.items() if not all(bool(torch.isfinite(p).all()) for p in q.parameters())]
    if broken:
        raise UserError(f"{broken[0]}: its parameters are not finite, training diverged; lower the learning rate")


def penalty(model: nn.Module) -> Tensor:
    """Sum of the quantizers' own loss terms (PACT's L2), a scalar to add to a loss that is a mean over the batch."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for quantizer in quantizers(model).values():
        term = quantizer.penalty()
        if term is not None:
            total = total + term.reshape(())
    return total


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
    """Fusion node name -> the quantizer that reads the fused tensor, whose step ``fold: finetune`` snaps the shift to.

    Raises:
        UserError: several grids, or none, read it.
    """
    concats = {node: node.removesuffix(".balance") for node in fusion_nodes(model)}
    reading = reading_quantizers(model, list(concats.values()))
    for node, concat in concats.items():
        if len(reading[concat]) != 1:
            raise UserError(
                f"{node}: {len(reading[concat])} grids read this fusion, and gabfusion.fold: finetune needs exactly "
                "one; set fold to anneal"
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
        prepare(model, QuantConfig.from_saved(checkpoint["quantization"], "the checkpoint's quantization"))
    state = checkpoint.get(weights) or checkpoint["model"]
    model.load_state_dict(state)
    model.names = dict(checkpoint["names"])
    return model
