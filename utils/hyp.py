"""Hyperparameter YAMLs: YOLOv5's 28 keys, and those of the quantized phase."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.optim import NOMINAL_BATCH
from utils.paths import ROOT
from utils.yaml_file import read_yaml

DEFAULT_FILE = ROOT / "data" / "hyps" / "hyp.scratch-low.yaml"

REFERENCE_BITS = 4  # those that quant_lr0 is for
# The quantized phase starts from a converged network, so it needs neither a warm-up of biases at 0.1 nor lr0 0.01.
QUANTIZED_DEFAULTS: dict[str, float] = {
    "quant_lr0": 0.0005,  # initial learning rate at 4 bits, for AdamW; SGD wants 0.002
    "quant_lr_per_bit": 0.5,  # factor of it for every bit above 4, its inverse for every bit below
    "quant_lrf": 0.01,  # final share of it, along a cosine
    "quant_momentum": 0.9,  # first beta of Adam and AdamW; of SGD
    "quant_weight_decay": 0.0005,  # of convolutions' weights only
    "quant_warmup_epochs": 0.5,  # in which the learning rate rises from 0
    "quant_parameter_lr": 1.0,  # factor for steps and zero points
    "quant_nominal_batch": 16,  # images per optimizer step: short schedules need steps more than large batches
    "quant_ema_decay": 0.998,  # share of the old average that an update keeps, in the end
    "quant_ema_tau": 100.0,  # updates until the average forgets its start
    "quant_correction_lr": 0.002,  # initial learning rate of `batch_norm.correction`
    "quant_finetune_lr": 2e-5,  # Adam, one epoch, after `fold: finetune` (arXiv 2511.05898)
}
# Keys that upstream files lack or rarely have: anchors per level, images per optimizer step (64), and the float phase's
# moving average (upstream's decay 0.9999 * (1 - exp(-updates / 2000)) averages next to nothing in 1,000 steps), and the
# share of the float epochs, at their end, that keep the final learning rate (0).
OPTIONAL = ("anchors", "nominal_batch", "ema_decay", "ema_tau", "lr_tail")

# What training divides by, and what makes an optimizer or an augmentation meaningless.
OVER_ZERO = {"anchors", "momentum", "nominal_batch", "ema_tau"}
OVER_ZERO |= {"quant_momentum", "quant_nominal_batch", "quant_ema_tau", "quant_lr_per_bit"}
UNDER_ONE = {"momentum", "quant_momentum", "warmup_momentum", "scale"}


def load_hyp(path: str | Path) -> dict[str, Any]:
    """Reads a hyperparameter file; bare names are looked up in ``data/hyps``.

    Keys that are absent take the value of ``hyp.scratch-low.yaml`` or of ``QUANTIZED_DEFAULTS``.

    Raises:
        UserError: no such file, not a mapping, an unknown key (with the nearest known one), a value that is no number
            or cannot be that of its key.
    """
    given = Path(path)
    file = next((p for p in (given, ROOT / given, ROOT / "data" / "hyps" / given) if p.is_file()), None)
    if file is None:
        known = ", ".join(sorted(p.name for p in DEFAULT_FILE.parent.glob("*.yaml")))
        raise UserError(f"--hyp {path}: no such file; files in data/hyps: {known}")
    values = _read(file)
    defaults = _read(DEFAULT_FILE) | QUANTIZED_DEFAULTS
    for key, value in values.items():
        if key not in defaults and key not in OPTIONAL:
            near = difflib.get_close_matches(str(key), defaults, 1)
            advice = f"did you mean {near[0]!r}?" if near else f"{DEFAULT_FILE} has them all"
            raise UserError(f"{file}: unknown key {key!r}; {advice}")
        if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
            try:
                values[key] = float(value)
            except ValueError:
                raise UserError(f"{file}: {key}: {value!r} is not a number") from None
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{file}: {key}: {value!r} is not a number")
        _check_range(file, key, values[key])
    if not 0 <= values.get("lr_tail", 0) < 1:
        raise UserError(f"{file}: lr_tail: {values['lr_tail']} is no share of the epochs; it must be from 0 to under 1")
    return defaults | values


def _check_range(file: Path, key: str, value: float) -> None:
    too_low = value <= 0 if key in OVER_ZERO else value < 0
    if too_low or not math.isfinite(value) or (key in UNDER_ONE and value >= 1):
        low = "over 0" if key in OVER_ZERO else "0 or more"
        raise UserError(f"{file}: {key}: {value} must be {low}{' and under 1' if key in UNDER_ONE else ''}")


def _read(file: Path) -> dict[str, Any]:
    values = read_yaml(file)
    if not isinstance(values, dict):
        raise UserError(f"{file}: a hyperparameter file maps keys to numbers")
    return values


def phase_hyp(hyp: dict[str, Any], quantized: bool, bits: int = REFERENCE_BITS) -> dict[str, Any]:
    """The hyperparameters of one phase under their plain names: in the quantized one ``quant_lr0`` becomes ``lr0``.

    Args:
        bits: of the quantized network, the fewer of weights' and activations'. The rougher the network, the further its
            weights have to go, and a rate that takes them there costs a network of more bits accuracy.
    """
    if not quantized:
        return {"nominal_batch": NOMINAL_BATCH, "ema_decay": 0.9999, "ema_tau": 2000.0, "lr_tail": 0.0, **hyp}
    renamed = {key.removeprefix("quant_"): value for key, value in hyp.items() if key.startswith("quant_")}
    renamed["lr0"] *= hyp.get("quant_lr_per_bit", 1.0) ** (bits - REFERENCE_BITS)  # absent from runs of older versions
    return {**hyp, **renamed, "lr_tail": 0.0, "warmup_bias_lr": 0.0, "warmup_momentum": renamed["momentum"]}
