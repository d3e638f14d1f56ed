"""Other people's fake quantizers in our network's places: same layers, bits and granularity, for timing.

Each peer is a function that makes the module for an activation tensor (one step, affine) or for a convolution's weights
(a step per output channel). What is not installed is left out; ``requirements-peers.txt`` pins the versions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quant.layers import QuantConv2d, replace_module
from quant.prepare import quantizers
from quant.quantizer import Quantizer


class NaiveLSQ(nn.Module):
    """LSQ as published code writes it: whole-tensor operations under autograd, straight-through by ``detach``."""

    def __init__(self, bits: int, channels: int | None) -> None:
        super().__init__()
        self.low, self.high = (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if channels else (0, 2**bits - 1)
        self.step = nn.Parameter(torch.full((channels, 1, 1, 1) if channels else (1,), 0.1))
        self.zero_point = None if channels else nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 / math.sqrt(x.numel() * self.high)
        step = (self.step - self.step * scale).detach() + self.step * scale
        v = x / step
        if self.zero_point is not None:
            shift = (self.zero_point.round() - self.zero_point).detach() + self.zero_point
            v = v + shift
        v = torch.clamp(v, self.low, self.high)
        v = (v.round() - v).detach() + v
        return (v if self.zero_point is None else v - shift) * step


def naive(bits: int, conv: nn.Conv2d | None) -> nn.Module:
    """The public repositories' LSQ."""
    return NaiveLSQ(bits, conv.out_channels if conv is not None else None)


def torch_ao(bits: int, conv: nn.Conv2d | None) -> nn.Module:
    """``torch.ao``'s learnable fake quantizer, which is LSQ with an affine grid."""
    from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    if conv is None:
        return _LearnableFakeQuantize(
            MovingAverageMinMaxObserver, 0, 2**bits - 1, scale=0.1, zero_point=3.0, use_grad_scaling=True,
            dtype=torch.quint8, qscheme=torch.per_tensor_affine,
        )  # fmt: skip
    limit = 2 ** (bits - 1) - 1
    return _LearnableFakeQuantize(
        MovingAveragePerChannelMinMaxObserver, -limit, limit, scale=0.1, zero_point=0.0, channel_len=conv.out_channels,
        use_grad_scaling=True, dtype=torch.qint8, qscheme=torch.per_channel_symmetric,
    )  # fmt: skip


def brevitas(bits: int, conv: nn.Conv2d | None) -> nn.Module:
    """Brevitas: learned range for activations, the largest magnitude for weights."""
    import brevitas.nn
    from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat

    if conv is None:
        return brevitas.nn.QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat, bit_width=bits)
    layer = brevitas.nn.QuantConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, groups=conv.groups, bias=False,
        weight_quant=Int8WeightPerChannelFloat, weight_bit_width=bits,
    )  # fmt: skip
    layer.weight = conv.weight

    class Weights(nn.Module):
        def forward(self, _weight: Tensor) -> Tensor:
            return layer.quant_weight().value

    return Weights()


def torchao(bits: int, conv: nn.Conv2d | None) -> nn.Module:
    """torchao's QAT fake quantizers: ranges from the extremes of every tensor. It has whole bytes and 1 to 7 bits."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    dtype = torch.int8 if bits == 8 else getattr(torch, f"int{bits}")

    class OneRow(nn.Module):
        """An activation tensor as one token, so that it has one step; weights as one row a channel."""

        def __init__(self) -> None:
            super().__init__()
            granularity = "per_token" if conv is None else "per_channel"
            self.quantizer = IntxFakeQuantizer(
                IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=conv is not None)
            )

        def forward(self, x: Tensor) -> Tensor:
            rows = 1 if conv is None else len(x)
            if x.dim() == 4 and not x.is_contiguous():
                flat = x.permute(0, 2, 3, 1)
                return self.quantizer(flat.reshape(rows, -1)).reshape(flat.shape).permute(0, 3, 1, 2)
            return self.quantizer(x.reshape(rows, -1)).reshape(x.shape)

    return OneRow()


PEERS: dict[str, Callable[[int, nn.Conv2d | None], nn.Module]] = {
    "naive LSQ": naive,
    "torch.ao learnable": torch_ao,
    "brevitas": brevitas,
    "torchao": torchao,
}


def version(name: str) -> str | None:
    """The installed version of a peer, or None if it cannot be imported."""
    if name in ("naive LSQ", "torch.ao learnable"):
        return torch.__version__
    try:
        module = __import__(name)
        PEERS[name](4, None)
    except Exception:  # an import that fails for a missing dependency is as good as none
        return None
    return module.__version__


def put_in(model: nn.Module, name: str) -> None:
    """Replaces every learned quantizer of a prepared model by that of a peer, in place (the image's grid stays)."""
    make = PEERS[name]
    of_weights: dict[Quantizer, nn.Conv2d] = {
        module.weight_quantizer: module for module in model.modules() if isinstance(module, QuantConv2d)
    }
    for quantizer in quantizers(model).values():
        if quantizer in of_weights or any(True for _ in quantizer.parameters()):
            replace_module(model, quantizer, make(quantizer.bits, of_weights.get(quantizer)))
