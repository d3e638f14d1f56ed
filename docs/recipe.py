"""Writes recipe.md, every key of a recipe, from the classes of quant/config.py: python docs/recipe.py"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from quant.config import LayerOverride, QuantConfig  # noqa: E402
from quant.registry import QUANTIZERS  # noqa: E402
from utils import hyp  # noqa: E402

FILE = Path(__file__).with_name("recipe.md")
HEAD = """# Every key of a recipe

Written by `python docs/recipe.py` from the code; a test keeps it true. A recipe is a YAML file for `train.py --recipe`;
bare names are looked up in `quant/recipes`. Flags win over the recipe, the recipe over a model YAML's `gabfusion:` key,
all of them over the defaults below. An unknown key is refused with the nearest known one. What was merged is written to
`quant.yaml` in the run folder, which is a recipe itself.

What the keys do: [quantization](quantization.md), [GABFusion and ADA](gabfusion.md). Which to choose:
[method and bits](choosing.md).

```yaml
method: lsq
weight: {bits: 3}
activation: {bits: 4, output: 8}
layers:
  'model\\.23\\..*': {weight_bits: 6, activation_bits: 6}
gabfusion: feedback
distillation: {logits: 0.05}
```
"""


def meanings(cls: type) -> dict[str, str]:
    """Name -> text of the ``Attributes:`` section of a class's docstring and of its bases'."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        section = inspect.getdoc(base).partition("Attributes:\n")[2]
        section = re.split(r"\n(?=\S)", section)[0]
        for item in re.finditer(r"^    (\w+): (.*(?:\n {8,}.*)*)", section, re.M):
            found[item[1]] = " ".join(item[2].split())
    return found


def shown(value: object) -> str:
    """A default as YAML has it; None as a dash."""
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


def rows(cls: type, prefix: str = "") -> list[str]:
    """Table rows of a block's keys.

    Raises:
        KeyError: a key without a line in its class's docstring.
    """
    texts, lines = meanings(cls), []
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            continue
        kind = str(field.type if isinstance(field.type, str) else field.type.__name__).replace(" | None", " or none")
        kind = kind.replace("dict[str, LayerOverride]", "mapping").replace("dict[str, Any]", "mapping")
        text = texts[field.name].rstrip(".").replace("|", "\\|").replace("``", "`")
        lines.append(f"| `{prefix}{field.name}` | {kind} | {shown(default)} | {text} |")
    return lines


def table(title: str, lines: list[str]) -> list[str]:
    """A heading and its table."""
    return [f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|", *lines, ""]


def schedule_rows() -> list[str]:
    """The quantized phase's keys of a hyperparameter YAML; their meanings are the comments behind them."""
    source = inspect.getsource(hyp)
    lines = []
    for key, default in hyp.QUANTIZED_DEFAULTS.items():
        comment = re.search(rf'"{key}": [^#\n]*(?:# (.*))?', source)[1] or ""
        lines.append(f"| `{key}` | float | {default:g} | {comment} |")
    return lines


def text() -> str:
    """The page."""
    config = QuantConfig()
    lines = [HEAD, *table("The network", rows(QuantConfig))]
    for field in dataclasses.fields(QuantConfig):
        block = getattr(config, field.name)
        if dataclasses.is_dataclass(block):
            lines += table(f"`{field.name}`", rows(type(block), f"{field.name}."))
    lines += table("`layers`: each regular expression's", rows(LayerOverride))
    for options in dict.fromkeys(method.Options for method in QUANTIZERS.values()):
        names = ", ".join(name for name, method in QUANTIZERS.items() if method.Options is options)
        lines += table(f"`options` of {names}", rows(options))
    lines += table("In the hyperparameter YAML: the quantized phase's schedule", schedule_rows())
    lines.append(
        "Both phases share the other keys of `--hyp`. In the quantized one the learning rate falls step by step."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
