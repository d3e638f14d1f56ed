"""The quantization methods by name. Another method is one file and one line here."""

from quant.dsq import DSQ
from quant.lsq import LSQ, LSQPlus
from quant.n2uq import N2UQ
from quant.pact import PACT
from quant.quantizer import Quantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "lsq": LSQ,
    "lsq+": LSQPlus,
    "pact": PACT,
    "dsq": DSQ,
    "n2uq": N2UQ,
}
