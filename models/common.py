"""The layer zoo: every block a YOLOv5 model YAML can name.

Attribute names (``conv``, ``bn``, ``cv1``, ``m`` ...) are the keys of the official state_dicts and therefore fixed.

Quantization slots. Where two convolutions read one tensor, the block has ``input_quantizer``; ``Concat`` and ``Add``
have ``balance``. They are None in a float model: they add no module and no state_dict key until something is put in. A
shortcut reuses the quantized tensor, so that what is added are codes of one grid. Quantizers that belong to a single
convolution live inside the convolution that replaces ``nn.Conv2d``; for that reason no forward reads ``conv.weight``.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

IntOrPair = int | Sequence[int]


def same_padding(kernel_size: IntOrPair, dilation: int = 1) -> int | tuple[int, ...]:
    """Returns the padding (pixels) that keeps the size at stride 1: half of the dilated kernel, rounded down."""
    if isinstance(kernel_size, int):
        return (dilation * (kernel_size - 1) + 1) // 2
    return tuple((dilation * (size - 1) + 1) // 2 for size in kernel_size)


def quantize(quantizer: nn.Module | None, x: Tensor) -> Tensor:
    """Passes ``x`` through the module in a quantization slot, if there is one. Shape in, shape out."""
    return x if quantizer is None else quantizer(x)


def fold_batch_norm(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Folds an evaluation-mode BatchNorm into the convolution in front of it.

    Args:
        weight: convolution weight (out, in / groups, height, width).
        bias: convolution bias (out,), or None.
        norm: the BatchNorm over ``out`` channels.

    Returns:
        Weight and bias of the equivalent convolution, computed in float64 and returned in the weight's type.
    """
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    gain = gamma / torch.sqrt(variance + norm.eps)
    shift = -mean if bias is None else bias.detach().double() - mean
    folded_weight = weight.detach().double() * gain.reshape(-1, 1, 1, 1)
    return folded_weight.to(weight.dtype), (beta + shift * gain).to(weight.dtype)


class Conv(nn.Module):
    """Convolution without bias, BatchNorm, activation: (B, c1, H, W) -> (B, c2, H / s, W / s).

    ``act``: True for the model's default activation (SiLU unless the model YAML names another), a module, or False
    for none.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        k: IntOrPair = 1,
        s: IntOrPair = 1,
        p: IntOrPair | None = None,
        g: int = 1,
        d: int = 1,
        act: bool | nn.Module = True,
    ) -> None:
        super().__init__()
        padding = same_padding(k, d) if p is None else p
        self.conv = nn.Conv2d(c1, c2, k, s, padding, dilation=d, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.has_default_activation = act is True
        if act is True:
            self.act = nn.SiLU()
        else:
            self.act = act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        return self.act(x)

    def fuse(self) -> None:
        """Folds the BatchNorm into the convolution, in place. Does nothing unless the convolution is a plain float one:
        a quantized convolution has its own folding, which also has to carry its steps along.
        """
        if self.bn is None or type(self.conv) is not nn.Conv2d:
            return
        conv = self.conv
        weight, bias = fold_batch_norm(conv.weight, conv.bias, self.bn)
        trains = conv.weight.requires_grad
        conv.weight = nn.Parameter(weight, requires_grad=trains)
        conv.bias = nn.Parameter(bias, requires_grad=trains)
        self.bn = None


def set_default_activation(module: nn.Module, activation: nn.Module) -> None:
    """Gives every ``Conv`` of ``module`` that was built with ``act=True`` its own copy of ``activation``."""
    for layer in module.modules():
        if isinstance(layer, Conv) and layer.has_default_activation:
            layer.act = copy.deepcopy(activation)


class DWConv(Conv):
    """Depth-wise ``Conv``: as many groups as both channel counts allow."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, d: int = 1, act: bool | nn.Module = True) -> None:
        super().__init__(c1, c2, k, s, g=math.gcd(c1, c2), d=d, act=act)


class DWConvTranspose2d(nn.ConvTranspose2d):
    """Depth-wise transposed convolution: ``p1`` is the padding, ``p2`` the output padding (pixels)."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, p1: int = 0, p2: int = 0) -> None:
        super().__init__(c1, c2, k, s, p1, p2, groups=math.gcd(c1, c2))


class Bottleneck(nn.Module):
    """1x1 then 3x3 ``Conv``, with a shortcut where the channel counts agree: (B, c1, H, W) -> (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = Conv(hidden, c2, 3, 1, g=g)
        self.add = shortcut and c1 == c2
        self.input_quantizer = None

    def forward(self, x: Tensor) -> Tensor:
        x = quantize(self.input_quantizer, x)
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class CrossConv(nn.Module):
    """A k x k convolution taken apart into 1 x k and k x 1: (B, c1, H, W) -> (B, c2, H / s, W / s)."""

    def __init__(
        self, c1: int, c2: int, k: int = 3, s: int = 1, g: int = 1, e: float = 1.0, shortcut: bool = False
    ) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, (1, k), (1, s))
        self.cv2 = Conv(hidden, c2, (k, 1), (s, 1), g=g)
        self.add = shortcut and c1 == c2
        self.input_quantizer = None

    def forward(self, x: Tensor) -> Tensor:
        x = quantize(self.input_quantizer, x)
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class BottleneckCSP(nn.Module):
    """Cross-stage-partial block, BatchNorm over both halves (arXiv 1911.11929): (B, c1, H, W) -> (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = nn.Conv2d(c1, hidden, 1, 1, bias=False)
        self.cv3 = nn.Conv2d(hidden, hidden, 1, 1, bias=False)
        self.cv4 = Conv(2 * hidden, c2, 1, 1)
        self.bn = nn.BatchNorm2d(2 * hidden)
        self.act = nn.SiLU()
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, e=1.0) for _ in range(n)))
        self.cat = Concat(1)
        self.input_quantizer = None

    def forward(self, x: Tensor) -> Tensor:
        x = quantize(self.input_quantizer, x)
        halves = self.cat([self.cv3(self.m(self.cv1(x))), self.cv2(x)])
        return self.cv4(self.act(self.bn(halves)))


class C3(nn.Module):
    """Cross-stage-partial block with three 1x1 ``Conv`` and ``n`` bottlenecks: (B, c1, H, W) -> (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = Conv(c1, hidden, 1, 1)
        self.cv3 = Conv(2 * hidden, c2, 1)
        self.m = self._inner(hidden, n, shortcut, g)
        self.cat = Concat(1)
        self.input_quantizer = None

    def _inner(self, hidden: int, n: int, shortcut: bool, g: int) -> nn.Module:
        """Builds what stands between ``cv1`` and the concatenation; subclasses put other blocks there."""
        return nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, e=1.0) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        x = quantize(self.input_quantizer, x)
        return self.cv3(self.cat([self.m(self.cv1(x)), self.cv2(x)]))


class C3x(C3):
    """``C3`` with ``CrossConv`` inside."""

    def _inner(self, hidden: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return nn.Sequential(*(CrossConv(hidden, hidden, 3, 1, g, 1.0, shortcut) for _ in range(n)))


class C3Ghost(C3):
    """``C3`` with ``GhostBottleneck`` inside."""

    def _inner(self, hidden: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return nn.Sequential(*(GhostBottleneck(hidden, hidden) for _ in range(n)))


class TransformerLayer(nn.Module):
    """Self-attention and a linear pair, each with a shortcut and without LayerNorm: (positions, B, c) -> the same."""

    def __init__(self, c: int, num_heads: int) -> None:
        super().__init__()
        self.q = nn.Linear(c, c, bias=False)
        self.k = nn.Linear(c, c, bias=False)
        self.v = nn.Linear(c, c, bias=False)
        self.ma = nn.MultiheadAttention(embed_dim=c, num_heads=num_heads)
        self.fc1 = nn.Linear(c, c, bias=False)
        self.fc2 = nn.Linear(c, c, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ma(self.q(x), self.k(x), self.v(x), need_weights=False)[0] + x
        return self.fc2(self.fc1(x)) + x


class TransformerBlock(nn.Module):
    """Pixels as a sequence with a learned linear embedding, through ``TransformerLayer``s (arXiv 1706.03762):
    (B, c1, H, W) -> (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.conv = Conv(c1, c2) if c1 != c2 else None
        self.linear = nn.Linear(c2, c2)
        self.tr = nn.Sequential(*(TransformerLayer(c2, num_heads) for _ in range(num_layers)))

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.conv is None else self.conv(x)
        pixels = x.flatten(2).permute(2, 0, 1)
        return self.tr(pixels + self.linear(pixels)).permute(1, 2, 0).reshape(x.shape)


class C3TR(C3):
    """``C3`` with a ``TransformerBlock`` of four heads inside."""

    def _inner(self, hidden: int, n: int, shortcut: bool, g: int) -> nn.Module:
        return TransformerBlock(hidden, hidden, 4, n)


class C3SPP(C3):
    """``C3`` with one ``SPP`` inside; ``k`` are the pooling windows."""

    def __init__(
        self,
        c1: int,
        c2: int,
        k: Sequence[int] = (5, 9, 13),
        n: int = 1,
        shortcut: bool = True,
        g: int = 1,
        e: float = 0.5,
    ) -> None:
        super().__init__(c1, c2, 0, shortcut, g, e)
        hidden = int(c2 * e)
        self.m = SPP(hidden, hidden, k)


class GhostConv(nn.Module):
    """Half of the channels by a convolution, half by a cheap 5x5 depth-wise one on them (arXiv 1911.11907)."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: bool | nn.Module = True) -> None:
        super().__init__()
        hidden = c2 // 2
        self.cv1 = Conv(c1, hidden, k, s, None, g, act=act)
        self.cv2 = Conv(hidden, hidden, 5, 1, None, hidden, act=act)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.cv1(x)
        return torch.cat((primary, self.cv2(primary)), 1)


class GhostBottleneck(nn.Module):
    """Two ``GhostConv`` and a shortcut (arXiv 1911.11907): (B, c1, H, W) -> (B, c2, H / s, W / s)."""

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1) -> None:
        super().__init__()
        hidden = c2 // 2
        shrinks = s == 2
        self.conv = nn.Sequential(
            GhostConv(c1, hidden, 1, 1),
            DWConv(hidden, hidden, k, s, act=False) if shrinks else nn.Identity(),
            GhostConv(hidden, c2, 1, 1, act=False),
        )
        self.shortcut = (
            nn.Sequential(DWConv(c1, c1, k, s, act=False), Conv(c1, c2, 1, 1, act=False)) if shrinks else nn.Identity()
        )
        self.input_quantizer = None

    def forward(self, x: Tensor) -> Tensor:
        x = quantize(self.input_quantizer, x)
        return self.conv(x) + self.shortcut(x)


class SPP(nn.Module):
    """Spatial pyramid pooling (arXiv 1406.4729) at stride 1: (B, c1, H, W) -> (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, k: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = Conv(hidden * (len(k) + 1), c2, 1, 1)
        self.m = nn.ModuleList(nn.MaxPool2d(size, 1, size // 2) for size in k)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


class SPPF(nn.Module):
    """``SPP`` with chained pools: windows 5, 9, 13 for the price of three of 5. (B, c1, H, W) -> (B, c2, H, W)."""

    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden, 1, 1)
        self.cv2 = Conv(hidden * 4, c2, 1, 1)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.cv1(x)]
        for _ in range(3):
            levels.append(self.m(levels[-1]))
        return self.cv2(torch.cat(levels, 1))


class Focus(nn.Module):
    """Every 2x2 square of pixels becomes channels, then ``Conv``: (B, c1, H, W) -> (B, c2, H / 2 / s, W / 2 / s)."""

    def __init__(
        self,
        c1: int,
        c2: int,
        k: int = 1,
        s: int = 1,
        p: int | None = None,
        g: int = 1,
        act: bool | nn.Module = True,
    ) -> None:
        super().__init__()
        self.conv = Conv(c1 * 4, c2, k, s, p, g, act=act)

    def forward(self, x: Tensor) -> Tensor:
        # Column by column: top left, bottom left, top right, bottom right. The official weights fix this order.
        corners = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.conv(torch.cat(corners, 1))


class Contract(nn.Module):
    """Moves ``gain`` x ``gain`` squares of pixels into channels: (B, C, H, W) -> (B, C * gain^2, H / gain, W / gain).

    The position inside the square is the slow channel index, unlike ``nn.PixelUnshuffle``.
    """

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows, columns, gain = height // self.gain, width // self.gain, self.gain
        squares = x.reshape(batch, channels, rows, gain, columns, gain).permute(0, 3, 5, 1, 2, 4)
        return squares.reshape(batch, channels * gain * gain, rows, columns)


class Expand(nn.Module):
    """The inverse of ``Contract``: (B, C, H, W) -> (B, C / gain^2, H * gain, W * gain)."""

    def __init__(self, gain: int = 2) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        gain, left = self.gain, channels // self.gain**2
        squares = x.reshape(batch, gain, gain, left, height, width).permute(0, 3, 4, 1, 5, 2)
        return squares.reshape(batch, left, height * gain, width * gain)


class Concat(nn.Module):
    """Joins a list of tensors along ``dimension``.

    ``balance``: None, or a module called with the list that returns the fused tensor in place of ``torch.cat``.
    """

    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        self.d = dimension
        self.balance: Callable[[list[Tensor]], Tensor] | None = None

    def forward(self, x: list[Tensor]) -> Tensor:
        if self.balance is not None:
            return self.balance(x)
        return torch.cat(x, self.d)


class Add(nn.Module):
    """Adds a list of at least two tensors of one shape: K tensors (B, C, H, W) -> (B, C, H, W).

    ``balance``: None, or a module called with the list that returns the fused tensor in place of the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.balance: Callable[[list[Tensor]], Tensor] | None = None

    def forward(self, x: list[Tensor]) -> Tensor:
        if self.balance is not None:
            return self.balance(x)
        total = x[0]
        for branch in x[1:]:
            total = total + branch
        return total
