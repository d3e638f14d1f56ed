"""Draws figures/gains.svg, what GABFusion and ADA change in points of mAP50: python docs/gains.py

The numbers are those of docs/accuracy_*.json, which benchmarks/accuracy.py writes beside its tables.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

FOLDER = Path(__file__).parent
SETS = {
    "core": "circuit boards",
    "shapes": "drawn shapes",
    "bifpn": "boards, BiFPN neck",
    "alone": "boards, no other distillation",
}
SAME = {"alone-both": "both", "ada-alone": "ada"}  # of alone.yaml
VARIANTS = {"both": ("GABFusion + ADA", "#0072b2", "o"), "gabfusion": ("GABFusion", "#d55e00", "s"),
            "ada": ("ADA", "#009e73", "^")}  # fmt: skip
METHODS = ("lsq", "n2uq", "pact", "dsq")
PAPER = 3.3  # arXiv 2511.05898: average gain over four methods on PASCAL VOC, points of mAP


def read_gains(folder: Path = FOLDER) -> list[tuple[str, str, dict]]:
    """(label of the line, variant, gain with points, low and high) of all rows with two seeds or more."""
    found = []
    for name, label in SETS.items():
        rows = json.loads((folder / f"accuracy_{name}.json").read_text(encoding="utf-8"))["rows"]
        for bits in ("w4a4", "w3a3"):
            for method in METHODS:
                mine = [row for row in rows if (row["bits"], row["method"]) == (bits, method) and row["gain"]]
                line = f"{label}, {bits[1]} bits, {method.upper()}"
                for row in mine:
                    variant = SAME.get(row["variant"], row["variant"])
                    if variant in VARIANTS and row["seeds"] >= 2:
                        found.append((line, variant, row["gain"]))
    return found


def draw(gains: list[tuple[str, str, dict]], file: Path) -> None:
    """One line for each network, a mark with its 95 % interval for each variant."""
    lines = list(dict.fromkeys(line for line, _variant, _gain in gains))
    figure, axes = pyplot.subplots(figsize=(7.5, 0.27 * len(lines) + 1.2), layout="constrained")
    for offset, (variant, (label, colour, mark)) in zip((0.0, 0.25, -0.25), VARIANTS.items(), strict=True):
        mine = [(lines.index(line) - offset, gain) for line, name, gain in gains if name == variant]
        points = [gain["points"] for _place, gain in mine]
        reach = [[g["points"] - g["low"] for _, g in mine], [g["high"] - g["points"] for _, g in mine]]
        places = [place for place, _gain in mine]
        axes.errorbar(points, places, xerr=reach, fmt=mark, color=colour, label=label, markersize=4, linewidth=1)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(PAPER, color="grey", linestyle="--", linewidth=0.8, label="the paper's average on PASCAL VOC")
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        "points of mAP50 against the same training without; 95 % intervals over images and seeds", fontsize=8
    )
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Draws it."""
    pyplot.rcParams["svg.hashsalt"] = "gains"  # the same file every time
    draw(read_gains(), FOLDER / "figures" / "gains.svg")


if __name__ == "__main__":
    main()
