"""SiLU between two grids of codes, by integer operators, exactly: for every one of the 256 codes.

A quantized result c (uint8, value x = step * (c - zero)) goes through SiLU and is quantized again, to

    T(c) = clip(round(x * sigmoid(x) / step_out) + zero_out, low, high)

onnxruntime has no table operator for bytes that is fast, but QLinearSigmoid, which is one, and QLinearMul:

    S(c) = round(sigmoid(step_in * (c - zero)) / step_sigmoid)
    P(c) = round((c - zero) * S(c) * step * step_sigmoid / step_product) + zero_out

With step_in = step and step_product = step_out the sigmoid's rounding to 8 bits makes some of the 256 results differ
from T. The three free numbers are therefore searched for, near these values, until no result differs. Such numbers
exist for most layers of a 4-bit network (51 of 56 in yolov5n); where none are found, the caller computes in float.
"""

from dataclasses import dataclass

import numpy as np

# Candidates at once, and how often. More found none for the layers for which these find none.
_CANDIDATES = 512
_TRIALS = 12
# Distance from a rounding boundary, in codes, that float32 arithmetic in any order cannot bridge.
_MARGIN = 1e-3


@dataclass(frozen=True)
class UniformGrid:
    """codes = clip(round(x / step) + zero_point, low, high), all of them between 0 and 255."""

    step: float
    zero_point: int
    low: int = 0
    high: int = 255

    def codes(self, values: np.ndarray) -> np.ndarray:
        return np.clip(np.round(values / self.step) + self.zero_point, self.low, self.high)


@dataclass(frozen=True)
class IntegerSilu:
    """The three numbers of the file's head."""

    step_in: float
    step_sigmoid: float
    step_product: float


def wanted_codes(given: UniformGrid, taken: UniformGrid) -> np.ndarray:
    """T: the output code (256,) of every input code."""
    x = given.step * (np.arange(256.0) - given.zero_point)
    return taken.codes(x / (1 + np.exp(-x)))


def find_integer_silu(given: UniformGrid, taken: UniformGrid, seed: int = 0) -> IntegerSilu | None:
    """Searches for the numbers with which all 256 results are right, or returns None.

    Args:
        given: the grid of the convolution's result; its codes are 0 to 255.
        taken: the grid that SiLU's result is quantized by.
    """
    wanted = wanted_codes(given, taken)
    generator = np.random.default_rng(seed)
    centred = np.arange(256.0) - given.zero_point
    for _ in range(_TRIALS):
        # Rounded first: these are the float32 numbers that will be stored.
        step_in, step_sigmoid, step_product = (
            values.astype(np.float32).astype(np.float64)[:, None]
            for values in (
                given.step * (1 + 0.02 * generator.normal(size=_CANDIDATES)),
                1 / generator.uniform(150, 254.4, _CANDIDATES),
                taken.step / (1 + 0.01 * generator.normal(size=_CANDIDATES)),
            )
        )
        sigmoids = 1 / (1 + np.exp(-centred * step_in)) / step_sigmoid
        products = centred * np.round(sigmoids) * (np.float32(given.step) * step_sigmoid / step_product)
        found = np.clip(np.round(products) + taken.zero_point, taken.low, taken.high)
        right = (found == wanted).all(1) & (_from_boundary(sigmoids) > _MARGIN) & (_from_boundary(products) > _MARGIN)
        if right.any():
            best = int(np.argmax(right))
            return IntegerSilu(*(float(values[best, 0]) for values in (step_in, step_sigmoid, step_product)))
    return None


def _from_boundary(values: np.ndarray) -> np.ndarray:
    """Smallest distance of each row's values from a number that rounding is undecided about."""
    return np.abs(values - np.floor(values) - 0.5).min(1)
