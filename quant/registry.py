"""The quantization methods by name. Another method is one file and one line here."""

from quant.lsq import LSQ
from quant.quantizer import Quantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "lsq": LSQ,
}
