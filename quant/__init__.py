"""Quantization-aware training of any torch network: prepare, calibrate, train, fold.

    from quant import QuantConfig, calibrate, fold, prepare, report

    prepare(model, QuantConfig(), example)      puts quantizers in, in place
    calibrate(model, batches)                   first ranges
    ...                                         train as before
    print(report(model, batches))               bits, size, cost and precision, layer by layer
    folded = fold(model)                        the integer network

``docs/python.md`` is the guide. Importing this package alone loads nothing, not even torch: each name below is fetched
from its file when it is first asked for.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.common import Add, Concat
    from quant.calibrate import calibrate
    from quant.config import (
        ActivationConfig,
        CalibrationConfig,
        FusionConfig,
        LayerOverride,
        QuantConfig,
        WeightConfig,
    )
    from quant.fold import fold
    from quant.gabfusion import GABFusion, set_strength, strength_at, update_balance
    from quant.onnx_file import export_onnx
    from quant.prepare import penalty, prepare, quantizers, set_enabled
    from quant.recipe import build_config
    from quant.report import report
    from utils.errors import UserError
    from utils.optim import build_optimizer

_HOMES = {
    "models.common": ("Add", "Concat"),
    "quant.calibrate": ("calibrate",),
    "quant.config": (
        "ActivationConfig",
        "CalibrationConfig",
        "FusionConfig",
        "LayerOverride",
        "QuantConfig",
        "WeightConfig",
    ),
    "quant.fold": ("fold",),
    "quant.gabfusion": ("GABFusion", "set_strength", "strength_at", "update_balance"),
    "quant.onnx_file": ("export_onnx",),
    "quant.prepare": ("penalty", "prepare", "quantizers", "set_enabled"),
    "quant.recipe": ("build_config",),
    "quant.report": ("report",),
    "utils.errors": ("UserError",),
    "utils.optim": ("build_optimizer",),
}

__all__ = [
    "ActivationConfig",
    "Add",
    "CalibrationConfig",
    "Concat",
    "FusionConfig",
    "GABFusion",
    "LayerOverride",
    "QuantConfig",
    "UserError",
    "WeightConfig",
    "build_config",
    "build_optimizer",
    "calibrate",
    "export_onnx",
    "fold",
    "penalty",
    "prepare",
    "quantizers",
    "report",
    "set_enabled",
    "set_strength",
    "strength_at",
    "update_balance",
]


class _Exported:
    """A name of the package that stands for an object in one of its files.

    Some functions are called as the file they are in (``prepare``). Importing ``quant.prepare`` makes Python set the
    package's attribute ``prepare`` to that module; a data descriptor of the package's class takes precedence over it.
    """

    def __init__(self, home: str, name: str) -> None:
        self.home, self.name = home, name

    def __get__(self, package: types.ModuleType | None, _owner: type) -> Any:
        return self if package is None else getattr(importlib.import_module(self.home), self.name)

    def __set__(self, package: types.ModuleType, value: Any) -> None:
        pass  # Python's import system, with the module of that name


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_names = {name: _Exported(home, name) for home, names in _HOMES.items() for name in names}
sys.modules[__name__].__class__ = type("_Package", (types.ModuleType,), _names)
