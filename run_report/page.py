"""Puts a run's numbers, charts and pictures together into one HTML page that needs no other file and no network."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from run_report.charts import Line, line_chart
from run_report.collect import MAP, MAP50, RunFiles
from run_report.pictures import Comparison

TEMPLATE = Path(__file__).with_name("page.html")
# Column of layers.csv -> heading, digits.
LAYER_COLUMNS = {
    "name": ("layer", None),
    "weight_bits": ("weight bits", 0),
    "activation_bits": ("input bits", 0),
    "weight_step": ("weight step", 5),
    "activation_step": ("input step", 5),
    "weight_sqnr": ("weight SQNR dB", 1),
    "input_sqnr": ("input SQNR dB", 1),
    "output_sqnr": ("output SQNR dB", 1),
    "weight_clipped": ("weights clipped %", 2),
    "input_clipped": ("input clipped %", 2),
    "bytes": ("bytes", 0),
    "bops": ("MBOPs", 1),
}
FACTORS = {"weight_clipped": 100, "input_clipped": 100, "bops": 1e-6}


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]], sortable: bool = False) -> str:
    """A table of plain texts, all escaped."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return f"<div class=scroll><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def section(title: str, content: str, note: str = "") -> str:
    """A heading with its content; nothing where there is no content. ``content`` is HTML, the others are text."""
    if not content:
        return ""
    return f"<h2>{escape(title)}</h2>" + (f'<p class="soft">{escape(note)}</p>' if note else "") + content


def fill(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """The page; ``parts`` are HTML."""
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), subtitle=escape(subtitle), body="\n".join(parts))


# --- parts of a page --------------------------------------------------------------------------------------------------


def accuracy_part(run: RunFiles) -> str:
    """The final table and, as cards, what a reader asks first."""
    cards = []
    if run.accuracy:
        _, map50, mean, size = run.accuracy[-1]
        cards += [(f"{100 * map50:.1f}", "mAP50"), (f"{100 * mean:.1f}", "mAP50-95")]
        if run.gap is not None:
            cards.append((f"{run.gap:+.1f}", "points of mAP50 against float"))
        float_size = run.accuracy[0][3]
        if size and float_size:
            cards.append(
                (f"{float_size / size:.1f} x smaller", f"{size / 1e6:.2f} MB instead of {float_size / 1e6:.2f}")
            )
    shown = "".join(f"<div><b>{escape(value)}</b>{escape(text)}</div>" for value, text in cards)
    first = run.accuracy[0][1] if run.accuracy else 0.0
    rows = [
        (name, f"{100 * map50:.2f}", f"{100 * mean:.2f}", f"{100 * (map50 - first):+.1f}" if index else "",
         f"{size / 1e6:.2f}" if size else "")
        for index, (name, map50, mean, size) in enumerate(run.accuracy)
    ]  # fmt: skip
    table = html_table(("network", "mAP50 %", "mAP50-95 %", "gap, points of mAP50", "MB"), rows) if rows else ""
    return f'<div class="cards">{shown}</div>' + section("Accuracy on the validation split", table)


def curves_part(run: RunFiles) -> str:
    """Accuracy and losses over both phases, one behind the other."""
    offset = len(run.float_rows)
    epochs = list(enumerate([*run.float_rows, *run.rows], 1))
    divider = (offset + 0.5, "quantized") if offset and run.rows else None

    def points(column: str) -> list[tuple[float, float]]:
        return [(number, row[column]) for number, row in epochs if column in row]

    accuracy = [Line("mAP50", points(MAP50)), Line("mAP50-95", points(MAP), 1, 1)]
    charts = [line_chart("Accuracy on the validation split", accuracy, "epoch", "AP", divider)]
    for key, name in (("box", "Box loss"), ("obj", "Objectness loss"), ("cls", "Class loss")):
        lines = [Line("training", points(f"train/{key}_loss")), Line("validation", points(f"val/{key}_loss"), 1, 1)]
        charts.append(line_chart(name, lines, "epoch", "loss", divider))
    distilled = [column for column in (run.rows[0] if run.rows else ()) if column.endswith("_gradient_ratio")]
    lines = [
        Line(column.removeprefix("quant/").removesuffix("_gradient_ratio"), points(column), index, index)
        for index, column in enumerate(distilled)
    ]
    charts.append(line_chart("Distillation: its gradient over the task's", lines, "epoch", "ratio", divider))
    return section("Training", wrap_charts(charts))


def wrap_charts(charts: Iterable[str]) -> str:
    """A grid of charts; empty ones are left out."""
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def fusion_part(run: RunFiles) -> str:
    """Branch factors and gradient norms of each fusion node over the quantized epochs."""
    charts = []
    for node, branches in run.nodes.items():
        for value, title, axis in (
            ("factor", "branch factor K alpha", "factor"),
            ("gradient", "gradient norm", "norm"),
        ):
            lines = [
                Line(f"branch {i}", [(epoch, row[f"{node}/{value}{i}"]) for epoch, row in enumerate(run.rows, 1)
                                     if f"{node}/{value}{i}" in row], i, i)
                for i in range(branches)
            ]  # fmt: skip
            charts.append(line_chart(f"{node.removesuffix('.balance')}: {title}", lines, "quantized epoch", axis))
    note = "Branch 0 is the first input of the Concat, usually the deep one. A factor of 1 is plain concatenation."
    return section("GABFusion: what each fusion node learned", wrap_charts(charts), note)


def layers_part(run: RunFiles) -> str:
    """Every quantized convolution; a click on a heading sorts."""
    rows = []
    for layer in run.layers:
        if layer["name"] in ("total", "float"):
            continue
        cells = []
        for column, (_, digits) in LAYER_COLUMNS.items():
            text = layer.get(column) or ""
            if digits is not None and text:
                text = f"{float(text) * FACTORS.get(column, 1):.{digits}f}"
            cells.append(text)
        rows.append(cells)
    note = (
        "Signal-to-noise ratios compare with the float values: low ones lose most. BOPs are multiply-accumulates times "
        "weight bits times input bits, for one image."
    )
    heads = [head for head, _ in LAYER_COLUMNS.values()]
    return section("Layers", html_table(heads, rows, sortable=True) if rows else "", note)


def pictures_part(shown: Sequence[Comparison], totals: dict[str, int]) -> str:
    """Float on the left, quantized on the right."""
    if not shown:
        return ""
    pairs = []
    for item in shown:
        marks = f'<span class="lost">{item.lost} lost</span>, <span class="gained">{item.gained} gained</span>'
        caption = f"{escape(item.name)}: {marks}, {item.extra} quantized boxes on no object"
        images = f'<img src="{item.float_picture}" alt="float"> <img src="{item.quantized_picture}" alt="quantized">'
        pairs.append(f'<figure class="pair">{images}<figcaption>{caption}</figcaption></figure>')
    note = (
        f"Of {totals['objects']} objects in {totals['images']} validation images both networks find {totals['both']}, "
        f"only the float one {totals['lost']} (lost), only the quantized one {totals['gained']} (gained): confidence "
        "from 0.25, overlap from 0.5, right class. Below are the images that differ most, float left, quantized right."
    )
    return section("What quantization changed", f'<div class="pairs">{"".join(pairs)}</div>', note)


def attention_part(rows: Sequence[tuple[str, list[tuple[str, str]]]]) -> str:
    """SimAM maps, teacher beside student."""
    drawn = ""
    for name, pictures in rows:
        figures = "".join(
            f'<figure><img src="{uri}" alt="{escape(text)}"><figcaption>{escape(text)}</figcaption></figure>'
            for text, uri in pictures
        )
        drawn += f'<p class="soft">{escape(name)}</p><div class="maps">{figures}</div>'
    note = (
        "SimAM energy, mean over channels, of the layers that feed Detect; teacher and student of a layer on one scale."
    )
    return section("Attention maps of float teacher and quantized student", drawn, note)


def files_part(run: RunFiles) -> str:
    """Weights and exported files with their sizes."""
    rows = [(name, f"{size / 1e6:.2f}") for name, size in run.files]
    return section("Files", html_table(("file", "MB"), rows) if rows else "")


def command_of(options: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The command that repeats a run: every option that differs from its default."""
    internal = {"cfg_given", "float_phase_asked", "needs_float", "stride", "resume", "project", "name", "exist_ok"}
    words = ["python", "train.py"]
    for key, value in options.items():
        if key in internal or key not in defaults or value == defaults[key] or value is None or value is False:
            continue
        words.append("--" + key.replace("_", "-") if key in DASHED else f"--{key}")
        if value is not True:
            words += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return shlex.join(words)


DASHED = {"batch_size", "single_cls", "multi_scale", "cos_lr", "label_smoothing", "save_period", "float_epochs",
          "image_weights", "sync_bn"}  # fmt: skip


def configuration_part(run: RunFiles, command: str) -> str:
    """The command to repeat the run, and its three YAML files."""
    parts = [f"<pre>{escape(command)}</pre>"]
    for title, values in (("opt.yaml", run.options), ("hyp.yaml", run.hyp), ("quant.yaml", run.quantization)):
        if values:
            text = escape(yaml.safe_dump(values, sort_keys=False).rstrip())
            parts.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    return section("To repeat this run", "".join(parts))


# --- several runs -----------------------------------------------------------------------------------------------------


def comparison_parts(runs: Sequence[RunFiles]) -> list[str]:
    """Runs side by side: final numbers, accuracy over epochs, and the settings in which they differ."""
    rows = []
    for run in runs:
        last = run.accuracy[-1] if run.accuracy else ("", float("nan"), float("nan"), 0)
        gap = f"{run.gap:+.1f}" if run.gap is not None else ""
        size = f"{last[3] / 1e6:.2f}" if last[3] else ""
        rows.append((str(run.folder), last[0], f"{100 * last[1]:.2f}", f"{100 * last[2]:.2f}", gap, size))
    heads = ("run", "network", "mAP50 %", "mAP50-95 %", "gap to float, points", "MB")
    parts = [section("Accuracy", html_table(heads, rows, sortable=True))]
    charts = []
    for column, name in ((MAP50, "mAP50"), (MAP, "mAP50-95"), ("val/box_loss", "Validation box loss")):
        lines = [
            Line(str(run.folder), [(n, row[column]) for n, row in enumerate(run.rows, 1) if column in row], i, i // 7)
            for i, run in enumerate(runs)
        ]
        charts.append(line_chart(name, lines, "epoch of the last phase", name))
    parts.append(section("Over the epochs", wrap_charts(charts)))
    return [*parts, section("Settings that differ", _differences(runs))]


def _differences(runs: Sequence[RunFiles]) -> str:
    flat = [_flat({"opt": run.options, "hyp": run.hyp, "quant": run.quantization}) for run in runs]
    skipped = {"opt.name", "opt.project", "opt.exist_ok", "opt.resume"}
    keys = [key for key in dict.fromkeys(k for values in flat for k in values) if key not in skipped]
    rows = [(key, *(str(values.get(key, "")) for values in flat)) for key in keys]
    rows = [row for row in rows if len({*row[1:]}) > 1]
    return html_table(("key", *(str(run.folder) for run in runs)), rows) if rows else ""


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
