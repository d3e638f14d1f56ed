"""Folding: a quantization-aware network -> an integer network in which nothing of the training apparatus is left.

* Batch norm: y = gamma * (conv - mean) / sigma + beta. The codes keep their value and the step of output channel o
  becomes step_o * |gamma_o| / sigma_o; a negative gamma flips the signs of the channel's codes, which the narrow grid
  allows; gamma = 0 gives zero codes.
* GABFusion: quantizing K * alpha_i * F_i with step d is quantizing F_i with step d / (K * alpha_i). Branch i gets that
  step, all branches share d behind the concatenation. Constant statistics (``fold: finetune``) add a gain, which joins
  the factor, and a shift of whole steps, which joins the zero point.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from models.common import Concat
from quant.gabfusion import GABFusion
from quant.layers import QuantConv2d
from quant.prepare import example_input, quantizers, reading_quantizers
from quant.primitives import Grid, from_codes, to_codes
from quant.quantizer import IntegerForm, Quantizer
from quant.trace import has_input_slot, trace_readers
from utils.errors import UserError


class ActivationGrid(nn.Module):
    """Quantization with constants: x -> codes -> values.

    ``codes = clip(round(x / step) + zero_point, qmin, qmax)``; ``values = (codes - output_zero_point) * output_step``.
    The two steps (and zero points) differ only at the branches of a folded GABFusion.

    Attributes:
        step, output_step: (1,) float32.
        zero_point, output_zero_point, qmin, qmax: integers; codes lie in 0..255 or, for a signed grid, -128..127.
        bits: bit width of the codes.
    """

    def __init__(self, form: IntegerForm, bits: int, factor: float | Tensor = 1.0, shift_steps: int = 0) -> None:
        super().__init__()
        # A shifted zero point can leave the container; all codes then move together, which changes nothing.
        offset = max(0, -(form.zero_point + shift_steps)) if form.grid.qmin >= 0 else 0
        self.bits = bits
        self.zero_point = form.zero_point + shift_steps + offset
        self.output_zero_point = form.zero_point + offset
        self.qmin, self.qmax = form.grid.qmin + offset, form.grid.qmax + offset
        self.register_buffer("step", (form.step / factor).reshape(1).float())
        self.register_buffer("output_step", form.step.reshape(1).clone().float())

    @property
    def grid(self) -> Grid:
        """The codes in use."""
        return Grid(self.qmin, self.qmax)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of ``x`` as floats."""
        return to_codes(x, self.step, self.zero_point, self.grid)

    def forward(self, x: Tensor) -> Tensor:
        return from_codes(self.codes(x.float()), self.output_step, self.output_zero_point)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, codes={self.qmin}..{self.qmax}, zero_point={self.zero_point}"


class BranchGrids(nn.Module):
    """Quantizes each branch of a Concat with its own step, then concatenates: K tensors -> (B, sum C_i, H, W)."""

    def __init__(self, grids: list[ActivationGrid]) -> None:
        super().__init__()
        self.grids = nn.ModuleList(grids)

    def forward(self, branches: list[Tensor]) -> Tensor:
        return torch.cat([grid(branch) for grid, branch in zip(self.grids, branches, strict=True)], 1)


class IntegerConv2d(nn.Module):
    """A convolution with integer weights: ``weight_codes`` (O, I, h, w) int8 times ``weight_scale`` (O,) float32.

    Attributes:
        bias: (O,) float32 or None.
        input_quantizer: ``ActivationGrid``, or None where the input comes quantized.
        weight_bits: bit width of the codes.
        stride, padding, dilation, groups: as in nn.Conv2d.
    """

    def __init__(self, conv: QuantConv2d, norm: nn.BatchNorm2d | None) -> None:
        super().__init__()
        form = conv.weight_quantizer.integer()
        step = form.step.double().expand(conv.out_channels).clone()
        codes = form.codes(conv.weight.detach().float()).double()
        bias = None if conv.bias is None else conv.bias.detach().double()
        if norm is not None:
            gain, shift = norm_constants(norm)
            codes = codes * torch.sign(gain).reshape(-1, 1, 1, 1)
            # A dead channel keeps its step: a scale of 0 is no valid one, and its codes are 0 already.
            step = torch.where(gain == 0, step, step * gain.abs())
            bias = shift if bias is None else bias * gain + shift
        self.register_buffer("weight_codes", codes.to(torch.int8))
        self.register_buffer("weight_scale", step.float())
        self.register_buffer("bias", None if bias is None else bias.float())
        self.weight_bits = conv.weight_quantizer.bits
        self.weight_grid = form.grid
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.input_quantizer: nn.Module | None = None

    def weight(self) -> Tensor:
        """The weights as floats (O, I, h, w)."""
        return self.weight_codes.float() * self.weight_scale.reshape(-1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        return nn.functional.conv2d(x, self.weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        shape = "x".join(str(n) for n in self.weight_codes.shape)
        return f"weights {shape}, {self.weight_bits} bit, stride={self.stride}, groups={self.groups}"


def norm_constants(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Gain and shift (C,) in float64 of a batch norm in eval mode: y = x * gain + shift."""
    variance, mean = norm.running_var.double(), norm.running_mean.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    gain = gamma / torch.sqrt(variance + norm.eps)
    return gain, beta - mean * gain


@torch.no_grad()
def fold(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """Returns the folded integer network; ``model`` is not changed.

    Args:
        model: a prepared and calibrated (usually trained) network.
        example: an input for finding out which batch norm follows which convolution; needed unless the model is a
            DetectionModel.

    Raises:
        UserError: not quantized, never calibrated, or in the middle of the GABFusion schedule.
    """
    model = copy.deepcopy(model).eval().float()
    check_foldable(model)
    example = example_input(model) if example is None else example
    names = [name for name, module in model.named_modules() if isinstance(module, QuantConv2d)]
    traced = trace_readers(model, example, names)
    norm_of = {tensor: name for name, tensor in traced.norms.items()}
    _fold_concats(model, example)
    grids: dict[int, nn.Module] = {}
    for _, module in list(model.named_modules()):
        if has_input_slot(module) and isinstance(module.input_quantizer, Quantizer):
            module.input_quantizer = _grid(module.input_quantizer, grids)
    for name in names:
        conv = model.get_submodule(name)
        norm_name = norm_of.get(traced.outputs[name])
        folded = IntegerConv2d(conv, model.get_submodule(norm_name) if norm_name else None)
        if isinstance(conv.input_quantizer, Quantizer):
            folded.input_quantizer = _grid(conv.input_quantizer, grids)
        model.set_submodule(name, folded)
        if norm_name:
            model.set_submodule(norm_name, nn.Identity())
    return model


def check_foldable(model: nn.Module) -> None:
    """Raises UserError, saying what to do, unless ``model`` can be folded exactly."""
    found = quantizers(model)
    if not found:
        raise UserError("this model is not quantized: train it with --quant first")
    missing = [name for name, q in found.items() if not bool(q.initialised) and type(q).__name__ != "FixedGrid"]
    if missing:
        raise UserError(f"{len(missing)} quantizers have no range yet (first: {missing[0]}): calibrate the model first")
    for name, node in model.named_modules():
        if isinstance(node, GABFusion) and not node.is_identity and not _keeps_normalisation(model):
            raise UserError(
                f"{name}: the normalisation still has strength {float(node.strength):.2f}; this checkpoint is from the "
                "middle of the schedule. Take best.pt, or train to the end"
            )


def _keeps_normalisation(model: nn.Module) -> bool:
    return getattr(model, "quantization", {}).get("gabfusion", {}).get("fold") == "keep"


def _grid(quantizer: Quantizer, made: dict[int, nn.Module]) -> nn.Module:
    """The constants of ``quantizer``; readers that shared a quantizer share its constants."""
    if id(quantizer) not in made:
        made[id(quantizer)] = ActivationGrid(quantizer.integer(), quantizer.bits)
    return made[id(quantizer)]


def _fold_concats(model: nn.Module, example: Tensor) -> None:
    """Moves the quantizer behind each Concat of the top level in front of it, with GABFusion's factors in the steps."""
    concats = {f"model.{layer.i}": layer for layer in getattr(model, "model", []) if isinstance(layer, Concat)}
    reading = reading_quantizers(model, list(concats), example)
    for name, concat in concats.items():
        consumers = _consumers(model, concat.i)
        balance = concat.balance
        kept = isinstance(balance, GABFusion) and not balance.is_identity
        if len(reading[name]) != 1 or len(consumers) != 1 or kept:
            if isinstance(balance, GABFusion) and not kept:
                raise UserError(
                    f"{name}: {len(reading[name])} grids read this concatenation; GABFusion needs one to fold"
                )
            continue
        quantizer = reading[name][0]
        factors, shift = _branch_factors(balance, len(concat.f))
        form = quantizer.integer()
        grids = [ActivationGrid(form, quantizer.bits, factor, shift) for factor in factors]
        concat.balance = BranchGrids(grids)
        _remove_reader(consumers[0], quantizer)


def _branch_factors(balance: nn.Module | None, branches: int) -> tuple[list[Tensor], int]:
    if balance is None:
        return [torch.ones(1)] * branches, 0
    factors = balance.factors().detach()
    if not balance.statistics_fixed:
        return list(factors), 0
    gain, shift = balance.constants()
    return list(factors * gain), round(float(shift))


def _consumers(model: nn.Module, index: int) -> list[nn.Module]:
    """Top-level layers that read layer ``index``'s output."""
    found = []
    for layer in model.model:
        sources = layer.f if isinstance(layer.f, (list, tuple)) else [layer.f]
        if index in [source if source >= 0 else layer.i + source for source in sources]:
            found.append(layer)
    return found


def _remove_reader(layer: nn.Module, quantizer: Quantizer) -> None:
    for module in layer.modules():
        if getattr(module, "input_quantizer", None) is quantizer:
            module.input_quantizer = None
