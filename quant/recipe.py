"""A quantization configuration from the flags of train.py, a recipe file and the model YAML."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from pathlib import Path
from typing import Any

from quant.config import BALANCES, DIVERGENCES, AutoBits, QuantConfig, check_bits, expand_block
from quant.registry import QUANTIZERS
from utils.errors import UserError
from utils.yaml_file import read_yaml


def parse_bits(text: str | int) -> tuple[int, int]:
    """Weight and activation bits from ``4`` or ``w4a8``.

    Raises:
        UserError: another form, or bits outside 2..8.
    """
    match = re.fullmatch(r"(\d+)|[wW](\d+)[aA](\d+)", str(text).strip())
    if not match:
        raise UserError(f"--bits {text}: write one number (4), weights and activations (w4a8) or a budget (auto:4.5)")
    weight, activation = (match[1], match[1]) if match[1] else (match[2], match[3])
    for bits in (int(weight), int(activation)):
        check_bits(f"--bits {text}", bits)
    return int(weight), int(activation)


def parse_auto_bits(text: str) -> tuple[AutoBits, int, int]:
    """The budget, and general weight and activation bits, from ``auto:4.5``, ``auto:4a8`` or ``auto:4:bops``.

    Without ``a8`` activations have the budget rounded up.

    Raises:
        UserError: another form, or bits outside 2..8.
    """
    match = re.fullmatch(r"auto:(\d+(?:\.\d+)?)(?:a(\d+))?(?::(\w+))?", text.strip().lower())
    if not match:
        raise UserError(
            f"--bits {text}: write auto and the average weight bits (auto:4.5); with the bits of activations "
            "(auto:4.5a8); with an average over bit operations instead of parameters (auto:4.5:bops)"
        )
    auto = AutoBits(float(match[1]), match[3] or "parameters")
    auto.validate(f"--bits {text}: auto_bits")
    activation = int(match[2]) if match[2] else math.ceil(auto.average)
    check_bits(f"--bits {text}: activations", activation)
    return auto, round(auto.average), activation


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it, mapping by mapping; neither argument is altered."""
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe YAML as a dict; bare names are looked up in ``quant/recipes``.

    Raises:
        UserError: missing or malformed file.
    """
    given = Path(path)
    here = Path(__file__).parent / "recipes"
    for candidate in (given, here / given, here / f"{given}.yaml"):
        if candidate.is_file():
            values = read_yaml(candidate) or {}
            if not isinstance(values, dict):
                raise UserError(f"{candidate}: a recipe is a mapping of keys such as method and weight")
            return values
    names = ", ".join(sorted(p.name for p in here.glob("*.yaml"))) or "none"
    raise UserError(f"--recipe {path}: no such file; recipes that come along: {names}")


def _flag(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuses a word behind a flag that takes one of ``allowed``, or none."""
    if isinstance(value, str) and value not in allowed:
        near = difflib.get_close_matches(value, allowed, 1)
        raise UserError(
            f"{name} {value}: " + (f"did you mean {near[0]}? It" if near else "it") + f" takes {', '.join(allowed)}"
        )


def build_config(
    method: str | None = None,
    bits: str | int | None = None,
    gabfusion: str | bool | None = None,
    ada: str | bool | None = None,
    recipe: str | Path | None = None,
    model_yaml: dict[str, Any] | None = None,
) -> QuantConfig:
    """Merges flags over the recipe over the model YAML's ``gabfusion:`` key over the defaults.

    Args:
        method: ``--quant``.
        bits: ``--bits``.
        gabfusion: ``--gabfusion``: True, a balance mode, or None when the flag was not given.
        ada: ``--ada``: True, a divergence, or None.
        recipe: ``--recipe``.
        model_yaml: the model's YAML as a dict.

    Raises:
        UserError: unknown key or impossible value, naming its origin.
    """
    values = QuantConfig().to_dict()
    if model_yaml and "gabfusion" in model_yaml:
        block = {"gabfusion": expand_block(model_yaml["gabfusion"], "gabfusion")}
        QuantConfig.from_dict(block, "the model YAML")
        values = merge(values, block)
    if recipe:
        changes = read_recipe(recipe)
        QuantConfig.from_dict(changes if method is None else {**changes, "method": method}, str(recipe))
        changes = {key: expand_block(value, key) for key, value in changes.items()}
        values = merge(values, changes)
    flags: dict[str, Any] = {}
    if method is not None:
        _flag("--quant", method, tuple(QUANTIZERS))
        flags["method"] = method
    if bits is not None:
        if values["auto_bits"]["resolved"]:
            raise UserError(
                f"--bits {bits}: {recipe} holds bits that were chosen layer by layer already. Leave --bits out, or "
                "delete the keys layers and auto_bits there"
            )
        auto = AutoBits()
        if str(bits).strip().lower().startswith("auto"):
            auto, weight, activation = parse_auto_bits(str(bits))
        else:
            weight, activation = parse_bits(bits)
        flags |= {"weight": {"bits": weight}, "activation": {"bits": activation}, "auto_bits": dataclasses.asdict(auto)}
    if gabfusion is not None:
        _flag("--gabfusion", gabfusion, BALANCES)
        flags["gabfusion"] = expand_block(gabfusion, "gabfusion")
    if ada is not None:
        _flag("--ada", ada, DIVERGENCES)
        flags["ada"] = expand_block(ada, "ada")
    return QuantConfig.from_dict(merge(values, flags), "the options --quant, --bits, --gabfusion, --ada")
