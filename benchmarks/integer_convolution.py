"""Forward pass of single convolutions: float32, bfloat16, and integer codes with float32 results.

    python benchmarks/integer_convolution.py

The integer form multiplies uint8 codes with int8 weights by oneDNN, through an operator that PyTorch keeps for its own
use and whose arguments change between versions; where it is missing the script says so. Its results are compared with
the float convolution of the same codes: sums stay under 2**24, so both are exact.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from common import machine, write_section  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import conv2d  # noqa: E402

# Batch, input channels, side, output channels, kernel: layers of yolov5n at 320 pixels.
SHAPES = ((16, 32, 80, 32, 3), (16, 64, 40, 64, 3), (16, 128, 20, 128, 3), (16, 64, 40, 64, 1), (16, 128, 40, 64, 1))


def milliseconds(action: Callable[[], object], rounds: int) -> float:
    """Lower quartile of the time of ``action``."""
    action(), action()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.quantiles(seconds, n=4)[0] * 1e3


def integer_convolution(codes: Tensor, weight: Tensor, padding: int) -> tuple[Callable, Callable]:
    """Functions that pack the weights, and that convolve codes with what was packed."""
    scale, zero = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    geometry = [1, 1], [padding, padding], [1, 1], 1

    def pack() -> Tensor:
        return torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, *geometry, list(codes.shape))

    packed = pack()

    def convolve() -> Tensor:
        return torch.ops.onednn.qconv2d_pointwise(
            codes, 1.0, 0, packed, scale, zero, None, *geometry, 1.0, 0, torch.float32, "none", [], "none"
        )

    return pack, convolve


def measure(shape: tuple[int, ...], rounds: int) -> list[str]:
    """One row of the table."""
    batch, inputs, side, outputs, kernel = shape
    codes = torch.randint(0, 16, (batch, inputs, side, side), dtype=torch.uint8).to(memory_format=torch.channels_last)
    weight = torch.randint(-7, 8, (outputs, inputs, kernel, kernel), dtype=torch.int8)
    x, w = (tensor.float().contiguous(memory_format=torch.channels_last) for tensor in (codes, weight))
    short_x, short_w = x.bfloat16(), w.bfloat16()
    pack, convolve = integer_convolution(codes, weight, kernel // 2)
    equal = torch.equal(convolve(), conv2d(x, w, padding=kernel // 2))
    times = [
        milliseconds(action, rounds)
        for action in (
            lambda: conv2d(x, w, padding=kernel // 2),
            lambda: conv2d(short_x, short_w, padding=kernel // 2),
            convolve,
            pack,
        )
    ]
    return ["x".join(map(str, shape)), *(f"{value / times[0]:.2f}" for value in times), "yes" if equal else "no"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    lines = ["## Integer convolutions in the forward pass", "", "`python benchmarks/integer_convolution.py`", ""]
    lines += [f"{date.today().isoformat()}, {machine()}. Time over that of float32.", ""]
    heads = [
        "batch x inputs x side x outputs x kernel",
        "float32",
        "bfloat16",
        "integer",
        "packing the weights",
        "equal",
    ]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    try:
        lines += ["| " + " | ".join(measure(shape, options.rounds)) + " |" for shape in SHAPES]
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        raise SystemExit(f"This PyTorch or this CPU has no such operator: {str(error).splitlines()[0]}") from None
    print("\n".join(lines))
    write_section("integer_convolution", lines)


if __name__ == "__main__":
    main()
