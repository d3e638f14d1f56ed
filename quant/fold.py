"""Folding: a quantization-aware network -> an integer network in which nothing of the training apparatus is left.

* Batch norm: y = gamma * (conv - mean) / sigma + beta. The codes keep their value and the step of output channel o
  becomes step_o * |gamma_o| / sigma_o; a negative gamma flips the signs of the channel's codes, which the narrow grid
  allows; gamma = 0 gives zero codes. Half-level and two's-complement grids flip too: their codes may then need a wider
  container than their bits (+8 at 4 bit), or a negative scale (+128 at 8 bit).
* GABFusion: quantizing K * alpha_i * F_i with step d is quantizing F_i with step d / (K * alpha_i). Branch i gets that
  step, all branches share d behind the concatenation. Constant statistics (``fold: finetune``) add a gain, which joins
  the factor, and a shift of whole steps, which joins the zero point. Thresholds t become (t - shift) / factor. Where
  something else than one quantizer reads the fused tensor, and at an Add, see ``_fold_fusions``.
* Output quantizers (``activation.output``): batch norm folds in between; the bias becomes an integer in units of
  input step * weight step, which is what a runtime's integer convolution adds up in. At 4 bit and less this unit is as
  large as an 8-bit output step, so codes are multiplied by a power of two that int8 has room for, and steps divided.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from models.common import Add, Concat, Conv
from quant.gabfusion import GABFusion, join
from quant.layers import QuantConv2d, replace_module
from quant.prepare import check_calibrated, example_input, inside_block, joins_channels
from quant.primitives import Grid, from_codes, to_codes
from quant.quantizer import IntegerForm, Quantizer
from quant.trace import Flow, has_input_slot, norms_behind, trace_flow
from utils.errors import UserError


class ActivationGrid(nn.Module):
    """Quantization with constants: x -> codes -> values.

    ``codes = clip(round(x / step) + zero_point, qmin, qmax)``, or with ``thresholds`` the number of them that are
    <= x; ``values = (codes - output_zero_point) * output_step``. The two steps (and zero points) differ only at the
    branches of a folded GABFusion.

    Attributes:
        step, output_step: (1,) float32. With thresholds, ``step`` only is the unit in which distances are given.
        zero_point, output_zero_point, qmin, qmax: integers; codes lie in 0..255 or, for a signed grid, -128..127.
        thresholds: (qmax,) non-decreasing float32 with ``qmin`` 0, or None.
        bits: bit width of the codes.

    Args:
        form: the quantizer's integer form.
        bits: bit width of the codes.
        factor: the quantizer saw ``factor * x + shift_steps * form.step``, the grid sees x; positive.
        shift_steps: whole steps.
    """

    def __init__(self, form: IntegerForm, bits: int, factor: float | Tensor = 1.0, shift_steps: int = 0) -> None:
        super().__init__()
        self.bits = bits
        if form.thresholds is None:
            # A shifted zero point can leave the container; all codes then move together, which changes nothing.
            offset = max(0, -(form.zero_point + shift_steps)) if form.grid.qmin >= 0 else 0
            self.zero_point, thresholds = form.zero_point + shift_steps + offset, None
        else:
            offset = -form.grid.qmin
            self.zero_point = form.zero_point + offset
            shift = shift_steps * form.step.reshape(()).double()
            thresholds = ((form.thresholds.double() - shift) / factor).float()
        self.output_zero_point = form.zero_point + offset
        self.qmin, self.qmax = form.grid.qmin + offset, form.grid.qmax + offset
        self.register_buffer("step", (form.step / factor).reshape(1).float())
        self.register_buffer("output_step", form.step.reshape(1).clone().float())
        self.register_buffer("thresholds", thresholds)

    @property
    def grid(self) -> Grid:
        """The codes in use."""
        return Grid(self.qmin, self.qmax)

    def codes(self, x: Tensor) -> Tensor:
        """Codes of ``x`` as floats."""
        if self.thresholds is not None:
            return torch.bucketize(x.contiguous(), self.thresholds, right=True).to(x.dtype)
        return to_codes(x, self.step, self.zero_point, self.grid)

    def distance(self, x: Tensor, ours: Tensor, theirs: Tensor) -> Tensor:
        """How far ``x`` would have to move for its codes ``ours`` to become ``theirs``, in steps.

        Args:
            x: values, 1-dimensional.
            ours: ``codes(x)``.
            theirs: other codes inside the grid, all different from ``ours``.
        """
        if self.thresholds is not None:
            boundary = self.thresholds[torch.where(theirs > ours, theirs - 1, theirs).long()]
            return ((x.double() - boundary.double()) / self.step.double()).abs()
        position = (x / self.step).double() + self.zero_point
        # A value that the grid clips lies further outside than any boundary.
        position = position.clamp(self.qmin - 0.5, self.qmax + 0.5)
        boundary = torch.where(theirs > ours, theirs - 0.5, theirs + 0.5).double()
        return (position - boundary).abs()

    def forward(self, x: Tensor) -> Tensor:
        return from_codes(self.codes(x.float()), self.output_step, self.output_zero_point)

    def extra_repr(self) -> str:
        kind = "" if self.thresholds is None else f", {self.thresholds.numel()} thresholds"
        return f"bits={self.bits}, codes={self.qmin}..{self.qmax}, zero_point={self.zero_point}{kind}"


class EqualizedGrid(nn.Module):
    """A grid behind a constant factor for each channel (``quant.equalize``): (B, C, H, W) -> quantized values.

    Attributes:
        inverse_equalizer: (C, 1, 1) float32.
        grid: ``ActivationGrid``.
    """

    def __init__(self, inverse_equalizer: Tensor, grid: ActivationGrid) -> None:
        super().__init__()
        self.register_buffer("inverse_equalizer", inverse_equalizer.detach().clone().float())
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return self.grid(x * self.inverse_equalizer)


class BranchGrids(nn.Module):
    """Quantizes each branch of a Concat with its own step, then concatenates: K tensors -> (B, sum C_i, H, W)."""

    def __init__(self, grids: list[ActivationGrid | EqualizedGrid]) -> None:
        super().__init__()
        self.grids = nn.ModuleList(grids)

    def forward(self, branches: list[Tensor]) -> Tensor:
        return torch.cat([grid(branch) for grid, branch in zip(self.grids, branches, strict=True)], 1)


class ScaledBranches(nn.Module):
    """What is left of GABFusion where no step can hold a factor: constant factors, then the fusion, then ``offset``."""

    def __init__(self, operation: str, factors: list[Tensor], offset: float = 0.0) -> None:
        super().__init__()
        self.operation, self.offset = operation, offset
        self.factors = [float(factor) for factor in factors]

    def forward(self, branches: list[Tensor]) -> Tensor:
        """K tensors (B, C_i, H, W) -> (B, sum C_i, H, W) or (B, C, H, W)."""
        pairs = zip(branches, self.factors, strict=True)
        fused = join([branch if factor == 1 else branch * factor for branch, factor in pairs], self.operation)
        return fused + self.offset if self.offset else fused

    def extra_repr(self) -> str:
        return f"{self.operation}, factors={[round(factor, 4) for factor in self.factors]}"


class IntegerConv2d(nn.Module):
    """A convolution with integer weights: ``weight_codes`` (O, I, h, w) int8 times ``weight_scale`` (O,) float32.

    Attributes:
        bias: (O,) float32 or None. With ``bias_codes`` it is their product with ``bias_scale``.
        bias_codes, bias_scale: (O,) int32 and (O,) float32, or None: the bias in units of the integer convolution.
        multiplier: that convolution has weights ``weight_codes * multiplier`` in steps ``weight_scale / multiplier``.
        input_quantizer: ``ActivationGrid``, or None where the input comes quantized.
        output_quantizer: ``ActivationGrid`` of the result, or None (``activation.output``).
        weight_bits: bit width of the weights: how many levels the training knew.
        container_bits: bits of the smallest two's complement integer that holds all codes.
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
            codes, step = _scale_channels(codes, step, gain)
            bias = shift if bias is None else bias * gain + shift
        self.register_buffer("weight_codes", codes.to(torch.int8))
        self.register_buffer("weight_scale", step.float())
        self.register_buffer("bias", None if bias is None else bias.float())
        self.register_buffer("bias_codes", None)
        self.register_buffer("bias_scale", None)
        self.multiplier = 1
        self.weight_bits = conv.weight_quantizer.bits
        self.container_bits = container_bits(self.weight_codes)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.input_quantizer: nn.Module | None = None
        self.output_quantizer: nn.Module | None = None

    def weight(self) -> Tensor:
        """The weights as floats (O, I, h, w)."""
        return self.weight_codes.float() * self.weight_scale.reshape(-1, 1, 1, 1)

    def round_bias(self, input_step: Tensor, largest_input: int) -> None:
        """Rounds the bias to whole units of the input's step times the weight's step, as int32.

        Args:
            input_step: (1,) float32.
            largest_input: largest code of the input.
        """
        # Processors without VNNI add two products in 16 bits.
        room = min(127, 2**14 // largest_input) // max(int(self.weight_codes.abs().max()), 1)
        self.multiplier = 2 ** (max(room, 1).bit_length() - 1)
        unit = input_step / self.multiplier
        bias = torch.zeros_like(self.weight_scale) if self.bias is None else self.bias
        # Where the unit is so small that the bias leaves int32 (a channel with next to no gain), a larger weight step
        # is taken and the weights are rounded to it: they contribute less than 1e-6 of the bias.
        least = bias.double().abs() / (2**30 * unit.double())
        grown = torch.maximum(self.weight_scale.abs().double(), least).copysign(self.weight_scale).float()
        ratio = (self.weight_scale.double() / grown.double()).reshape(-1, 1, 1, 1)
        self.weight_codes.copy_(torch.round(self.weight_codes.double() * ratio))
        self.weight_scale.copy_(grown)
        self.bias_scale = unit.float() * self.weight_scale
        self.bias_codes = torch.round(bias.double() / self.bias_scale.double()).to(torch.int32)
        self.bias = self.bias_codes.float() * self.bias_scale

    def forward(self, input: Tensor) -> Tensor:  # torch's name: some call with keywords
        x = input if self.input_quantizer is None else self.input_quantizer(input)
        x = nn.functional.conv2d(x, self.weight(), self.bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.output_quantizer is None else self.output_quantizer(x)

    def extra_repr(self) -> str:
        shape = "x".join(str(n) for n in self.weight_codes.shape)
        return f"weights {shape}, {self.weight_bits} bit, stride={self.stride}, groups={self.groups}"


def _scale_channels(codes: Tensor, step: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Multiplies ``codes * step`` by ``gain`` (O,): its magnitude joins the steps, its sign the codes."""
    signs = torch.sign(gain)
    flipped = codes * signs.reshape(-1, 1, 1, 1)
    # The code -128 of a two's complement grid has no opposite in int8: such a channel takes a negative step instead.
    overflowing = flipped.flatten(1).amax(1) > 127
    codes = torch.where(overflowing.reshape(-1, 1, 1, 1), codes, flipped)
    # A dead channel keeps its step: a scale of 0 is no valid one, and its codes are 0 already.
    step = torch.where(gain == 0, step, step * gain.abs())
    return codes, torch.where(overflowing, -step, step)


def container_bits(codes: Tensor) -> int:
    """Bits of the smallest two's complement integer that holds all ``codes``."""
    lowest, highest = int(codes.min()), int(codes.max())
    return max((-lowest - 1).bit_length() if lowest < 0 else 0, highest.bit_length() if highest > 0 else 0) + 1


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
        example: an input for finding out which batch norm follows which convolution; by default a blank one of the
            shape that ``prepare`` was given.

    Raises:
        UserError: not quantized, never calibrated, or in the middle of the GABFusion schedule.
    """
    model = copy.deepcopy(model).eval().float()
    check_foldable(model)
    example = example_input(model) if example is None else example
    names = [name for name, module in model.named_modules() if isinstance(module, QuantConv2d)]
    flow = trace_flow(model, example)
    norms = norms_behind(model, flow)
    _fold_fusions(model, flow)
    grids: dict[int, nn.Module] = {}
    for _, module in list(model.named_modules()):
        if has_input_slot(module) and isinstance(module.input_quantizer, Quantizer):
            module.input_quantizer = _grid(module.input_quantizer, grids)
    for name in names:
        conv = model.get_submodule(name)
        norm = model.get_submodule(norms[name]) if name in norms else None
        folded = IntegerConv2d(conv, norm)
        if isinstance(conv.input_quantizer, Quantizer):
            folded.input_quantizer = _grid(conv.input_quantizer, grids)
        else:
            folded.input_quantizer = conv.input_quantizer  # None, or a grid that took the factor of a fusion
        output_quantizer = getattr(norm, "output_quantizer", None) or conv.output_quantizer
        if output_quantizer is not None:
            folded.output_quantizer = _grid(output_quantizer, grids)
        replace_module(model, conv, folded)
        if norm is not None:
            replace_module(model, norm, nn.Identity())
    _round_biases(model, example)
    return model


def check_foldable(model: nn.Module) -> None:
    """Raises UserError, saying what to do, unless ``model`` can be folded exactly."""
    check_calibrated(model)
    for name, node in model.named_modules():
        if isinstance(node, GABFusion) and not node.is_identity and not _keeps_normalisation(model):
            raise UserError(
                f"{name}: the normalisation still has strength {float(node.strength):.2f}; this checkpoint is from the "
                "middle of the schedule. Take best.pt, or train to the end (in a training loop of your own: "
                "set_strength(model, 0) for the last steps)"
            )


def _keeps_normalisation(model: nn.Module) -> bool:
    return getattr(model, "quantization", {}).get("gabfusion", {}).get("fold") == "keep"


def _grid(quantizer: Quantizer, made: dict[int, nn.Module]) -> nn.Module:
    """The constants of ``quantizer``; readers that shared a quantizer share its constants."""
    if id(quantizer) not in made:
        made[id(quantizer)] = _with_factors(quantizer, ActivationGrid(quantizer.integer(), quantizer.bits))
    return made[id(quantizer)]


def _with_factors(quantizer: Quantizer, grid: ActivationGrid, channels: slice = slice(None)) -> nn.Module:
    """``grid`` behind the factors that ``quantizer`` has for ``channels`` of its input, if it has any."""
    factors = quantizer.inverse_equalizer
    return grid if factors is None else EqualizedGrid(factors[channels], grid)


@torch.no_grad()
def _round_biases(model: nn.Module, example: Tensor) -> None:
    """Gives every folded convolution with an output quantizer an integer bias, in units of what it reads."""
    made_by: dict[int, ActivationGrid] = {}  # identity of a quantized tensor -> its grid
    alive: list[Tensor] = []  # an identity is only unique while its tensor exists
    handles = []

    def note(grid: nn.Module, _inputs: tuple, output: Tensor) -> None:
        alive.append(output)
        made_by[id(output)] = grid.grids[0] if isinstance(grid, BranchGrids) else grid

    def round_bias(conv: nn.Module, inputs: tuple) -> None:
        grid = conv.input_quantizer or made_by.get(id(inputs[0]))
        if grid is not None and conv.bias_codes is None:
            conv.round_bias(grid.output_step, grid.qmax)

    for module in model.modules():
        if isinstance(module, (ActivationGrid, BranchGrids)):
            handles.append(module.register_forward_hook(note))
        elif isinstance(module, IntegerConv2d) and module.output_quantizer is not None:
            handles.append(module.register_forward_pre_hook(round_bias))
    if any(isinstance(module, IntegerConv2d) and module.output_quantizer for module in model.modules()):
        model(example)
    for handle in handles:
        handle.remove()


def _fold_fusions(model: nn.Module, flow: Flow) -> None:
    """Takes GABFusion out of every Concat and Add, and moves the quantizer behind a Concat of the network itself (not
    of a block of ``models.common``) in front.

    Where that cannot be done exactly (``fold: keep``), the module stays.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, (Concat, Add)) or name not in flow.branches:
            continue
        balance = module.balance
        if (balance is None and inside_block(model, name)) or not joins_channels(module):
            continue
        if isinstance(balance, GABFusion) and not balance.is_identity:
            continue
        readers = [model.get_submodule(reader) for reader in flow.readers.get(flow.outputs[name], ())]
        reader = readers[0] if len(readers) == 1 and _reads_once(name, flow) else None
        if isinstance(module, Add):
            if balance is not None:
                _fold_add(model, module, flow, f"{name}.balance", reader)
            continue
        factors, shift = _branch_factors(balance, len(flow.branches[name]))
        if isinstance(reader, Quantizer):
            channels = [flow.channels[branch] for branch in flow.branches[name]]
            module.balance = BranchGrids(_branch_grids(reader, factors, shift, channels))
            _replace_reader(model, reader, None)
        elif type(reader) is nn.BatchNorm2d and reader.affine and balance is not None and shift == 0:
            _scale_norm_input(reader, factors, [flow.channels[branch] for branch in flow.branches[name]])
            module.balance = None
        elif balance is not None:
            module.balance = ScaledBranches("concat", factors, shift * float(balance.snap_step))


def _branch_grids(reader: Quantizer, factors: list[Tensor], shift: int, channels: list[int]) -> list[nn.Module]:
    """One grid a branch, of ``channels`` channels each, in place of the quantizer behind a Concat."""
    form, grids, first = reader.integer(), [], 0
    for factor, count in zip(factors, channels, strict=True):
        grid = ActivationGrid(form, reader.bits, factor, shift)
        grids.append(_with_factors(reader, grid, slice(first, first + count)))
        first += count
    return grids


def _reads_once(name: str, flow: Flow) -> bool:
    """Whether module ``name`` runs once, nothing but its one reader sees its result, and that reads nothing else."""
    result = flow.outputs[name]
    (reader,) = flow.readers[result]
    return len(flow.calls[name]) == 1 and result not in flow.results and set(flow.calls.get(reader, ())) == {result}


def _fold_add(model: nn.Module, module: Add, flow: Flow, node: str, reader: nn.Module | None) -> None:
    """Takes GABFusion out of an Add. A sum's branches share one code grid, so unlike at a Concat no step can hold a
    branch's own factor. It goes, as far as possible, into

    1. the batch norm in front, where only this node reads it and a positive factor passes the activation function;
    2. for one other branch, the step of the quantizer behind, relative to which all factors are taken;
    3. a constant Mul.
    """
    factors, shift = _branch_factors(module.balance, module.balance.branches)
    norms = [_norm_of_branch(model, flow, node, tensor) for tensor in flow.branches[node]]
    step = module.balance.snap_step
    left = [index for index, norm in enumerate(norms) if norm is None]
    common = factors[left[0]] if left and isinstance(reader, Quantizer) else torch.ones(())
    multiply = []
    for factor, norm in zip(factors, norms, strict=True):
        relative = factor / common
        if norm is not None:
            norm.weight.mul_(relative)
            norm.bias.mul_(relative)
        multiply.append(torch.ones(()) if norm is not None else relative)
    offset = 0.0
    if isinstance(reader, Quantizer):
        _replace_reader(
            model, reader, _with_factors(reader, ActivationGrid(reader.integer(), reader.bits, common, shift))
        )
    else:
        offset = shift * float(step)
    needed = offset != 0 or any(float(factor) != 1 for factor in multiply)
    module.balance = ScaledBranches("add", multiply, offset) if needed else None


def _norm_of_branch(model: nn.Module, flow: Flow, node: str, tensor: int) -> nn.BatchNorm2d | None:
    """The batch norm that may take the factor of the branch ``tensor`` of ``node``, or None."""
    reader = node
    while True:
        block = next((n for n in flow.producers.get(tensor, ()) if isinstance(model.get_submodule(n), Conv)), None)
        readers = {name for name in flow.readers[tensor] if block is None or not name.startswith(f"{block}.")}
        if readers != {reader} or flow.branches[node].count(tensor) > 1:
            return None
        if block is not None or tensor not in flow.passed:
            break
        reader, tensor = flow.passed[tensor]
    if block is None:
        return None
    conv = model.get_submodule(block)
    plain = type(conv.bn) is nn.BatchNorm2d and conv.bn.affine and isinstance(conv.conv, QuantConv2d)
    homogeneous = isinstance(conv.act, (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU))
    return conv.bn if plain and homogeneous and conv.conv.output_quantizer is None else None


def _scale_norm_input(norm: nn.BatchNorm2d, factors: list[Tensor], channels: list[int]) -> None:
    """Lets ``norm`` multiply its input's channels by their branch's factor."""
    scale = torch.cat([factor.reshape(1).expand(count) for factor, count in zip(factors, channels, strict=True)])
    norm.weight.mul_(scale)
    norm.running_mean.div_(scale)


def _branch_factors(balance: nn.Module | None, branches: int) -> tuple[list[Tensor], int]:
    if balance is None:
        return [torch.ones(1)] * branches, 0
    factors = balance.factors().detach()
    if not balance.statistics_fixed:
        return list(factors), 0
    gain, shift = balance.constants()
    return list(factors * gain), round(float(shift))


def _replace_reader(model: nn.Module, quantizer: Quantizer, grid: ActivationGrid | None) -> None:
    """Puts ``grid`` where ``quantizer`` reads a tensor."""
    for module in model.modules():
        if getattr(module, "input_quantizer", None) is quantizer:
            module.input_quantizer = grid
