"""docs/recipe.md says what quant/config.py does: it is up to date, complete, and names every possible value."""

import dataclasses
import importlib
import re
import sys

import pytest
import yaml

from quant import QuantConfig, UserError
from utils.paths import ROOT


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        yield importlib.import_module("recipe")
    finally:
        sys.path.remove(str(ROOT / "docs"))


def leaves(values, prefix=""):
    """Dotted names of everything in a nested mapping that is no mapping with keys of its own."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_the_page_is_true(recipe):
    assert recipe.FILE.read_text(encoding="utf-8") == recipe.text(), "run: python docs/recipe.py"


def test_every_key_stands_there_with_a_meaning(recipe):
    rows = dict(re.findall(r"^\| `([\w.]+)` \| .+ \| .+ \| (.*) \|$", recipe.text(), re.M))
    keys = set(leaves(QuantConfig().to_dict()))
    assert len(keys) > 40 and keys <= rows.keys()
    assert all(rows.values())


def test_every_possible_value_is_named(recipe):
    checked = 0
    for line in recipe.text().splitlines():
        key = re.match(r"\| `([\w.]+)` \| str \|", line)
        if not key or key[1] in ("weights", "clip"):  # options of single methods
            continue
        values = "?"
        for part in reversed(key[1].split(".")):
            values = {part: values}
        with pytest.raises(UserError, match="choose one of") as refused:
            QuantConfig.from_dict(values)
        choices = str(refused.value).partition("choose one of ")[2].split(", ")
        assert all(re.search(rf"\b{re.escape(choice)}(?!\w)", line) for choice in choices), line
        checked += 1
    assert checked >= 10


def test_a_key_without_a_meaning_is_noticed(recipe):
    @dataclasses.dataclass
    class Forgotten:
        """A block.

        Attributes:
            told: as it should be.
        """

        told: int = 1
        untold: int = 2

    with pytest.raises(KeyError, match="untold"):
        recipe.rows(Forgotten)


def test_the_example_is_a_recipe(recipe):
    (example,) = re.findall(r"```yaml\n(.*?)```", recipe.text(), re.S)
    config = QuantConfig.from_dict(yaml.safe_load(example))
    assert config.weight.bits == 3 and config.activation.output == 8 and config.gabfusion.balance == "feedback"
    assert config.layers[r"model\.23\..*"].weight_bits == 6
