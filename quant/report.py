"""What a quantized network weighs: bits, bytes and quantization error per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from quant.layers import QuantConv2d

FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerReport:
    """One convolution. ``sqnr`` is the signal to quantization noise ratio of its weights in decibels."""

    name: str
    weight_bits: int
    activation_bits: int | None
    parameters: int
    bytes: float
    clipped: float
    sqnr: float


@torch.no_grad()
def layer_reports(model: nn.Module) -> list[LayerReport]:
    """A report for every quantized convolution, in the network's order."""
    reports = []
    for name, conv in model.named_modules():
        if not isinstance(conv, QuantConv2d):
            continue
        quantizer = conv.weight_quantizer
        weight, quantized = conv.weight.float(), quantizer(conv.weight)
        noise = (weight - quantized).square().sum().clamp_min(1e-30)
        sqnr = 10 * torch.log10(weight.square().sum().clamp_min(1e-30) / noise)
        limit = quantizer.current_step().reshape(-1, 1, 1, 1) * quantizer.grid.qmax
        reports.append(
            LayerReport(
                name=name,
                weight_bits=quantizer.bits,
                activation_bits=_input_bits(model, name),
                parameters=weight.numel(),
                # Packed codes, one float32 scale and one float32 bias per output channel.
                bytes=weight.numel() * quantizer.bits / 8 + conv.out_channels * 8,
                clipped=float((weight.abs() > limit).float().mean()),
                sqnr=float(sqnr),
            )
        )
    return reports


def _input_bits(model: nn.Module, name: str) -> int | None:
    """Bits of the input quantizer of convolution ``name``: its own, or that in the slot of a block around it."""
    while name:
        quantizer = getattr(model.get_submodule(name), "input_quantizer", None)
        if quantizer is not None:
            return quantizer.bits
        name = name.rpartition(".")[0]
    return None


def float_bytes(model: nn.Module) -> int:
    """Size of the float32 network with its batch norms folded: weights, and one bias per output channel."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return sum(conv.weight.numel() + conv.out_channels for conv in convolutions) * FLOAT_BITS // 8


def quantized_bytes(model: nn.Module) -> int:
    """Size of the folded network with packed weight codes, scales and biases."""
    return round(sum(report.bytes for report in layer_reports(model)))


def format_report(reports: list[LayerReport], worst: int | None = None) -> str:
    """A table as text, the noisiest layers first; ``worst`` limits the rows."""
    rows = sorted(reports, key=lambda report: report.sqnr)[:worst]
    lines = [f"{'layer':<36}{'bits':>6}{'parameters':>12}{'bytes':>10}{'clipped':>9}{'SQNR dB':>9}"]
    for r in rows:
        bits = f"w{r.weight_bits}" + (f"a{r.activation_bits}" if r.activation_bits else "")
        lines.append(f"{r.name:<36}{bits:>6}{r.parameters:>12,}{r.bytes:>10,.0f}{r.clipped:>9.2%}{r.sqnr:>9.1f}")
    return "\n".join(lines)
