"""Puts a run's numbers, charts and pictures together into one HTML page that needs no other file and no network."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml

from run_report.charts import Line, line_chart
from run_report.collect import MAP, MAP50, RunFiles
from run_report.pictures import Attention, Comparison

FILES_BEGIN, FILES_END = "<!-- files -->", "<!-- end of files -->"
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


def html_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], sortable: bool = False, totals: Iterable[Sequence[str]] = ()
) -> str:
    """A table of plain texts, all escaped; ``totals`` stay at its end when it is sorted."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body, foot = (
        "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in group)
        for group in (rows, totals)
    )
    kind, foot = ' class="sortable"' if sortable else "", f"<tfoot>{foot}</tfoot>" if foot else ""
    return f"<div class=scroll><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table></div>"


def section(title: str, content: str, note: str = "") -> str:
    """A heading with its content; nothing where there is no content. ``content`` is HTML, the others are text."""
    if not content:
        return ""
    place = "-".join(re.findall(r"[a-z]+", title.lower()))
    return f'<h2 id="{place}">{escape(title)}</h2>' + (f'<p class="soft">{escape(note)}</p>' if note else "") + content


def fill(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """The page; ``parts`` are HTML."""
    template, body = Template(TEMPLATE.read_text(encoding="utf-8")), "\n".join(parts)
    links = " ".join(f'<a href="#{place}">{name}</a>' for place, name in re.findall(r'<h2 id="([^"]+)">([^<]+)', body))
    return template.substitute(title=escape(title), subtitle=escape(subtitle), links=links, body=body)


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
    charts = [line_chart("Accuracy on the validation split", accuracy, "epoch", "AP, 0 to 1", divider, (0.0,))]
    for key, name in (("box", "Box loss"), ("obj", "Objectness loss"), ("cls", "Class loss")):
        lines = [Line("training", points(f"train/{key}_loss")), Line("validation", points(f"val/{key}_loss"), 1, 1)]
        charts.append(line_chart(name, lines, "epoch", "loss", divider))
    distilled = [column for column in (run.rows[0] if run.rows else ()) if column.endswith("_gradient_ratio")]
    lines = [
        Line(column.removeprefix("quant/").removesuffix("_gradient_ratio"), points(column), index, index)
        for index, column in enumerate(distilled)
    ]
    charts.append(line_chart("Distillation: its gradient over the task's", lines, "epoch", "ratio", divider, (0.0,)))
    return section("Training", wrap_charts(charts))


def wrap_charts(charts: Iterable[str]) -> str:
    """A grid of charts; empty ones are left out."""
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def fusion_part(run: RunFiles) -> str:
    """Branch factors and gradient norms of each fusion node over the quantized epochs, all nodes on one scale."""
    charts = []
    for value, title, unit, least in (
        ("factor", "branch factor K alpha", "factor, 1: plain concatenation", (0.9, 1.1)),
        ("gradient", "gradient norm of each branch", "norm", (0.0,)),
    ):
        lines = {
            node: [
                Line(f"branch {i}", _over_epochs(run.rows, f"{node}/{value}{i}"), i, i) for i in range(branches)
            ]
            for node, branches in run.nodes.items()
        }  # fmt: skip
        values = [y for found in lines.values() for line in found for _, y in line.points]
        shown = (*least, *((min(values), max(values)) if values else ()))
        charts += [
            line_chart(f"{node.removesuffix('.balance')}: {title}", found, "quantized epoch", unit, shown=shown)
            for node, found in lines.items()
        ]
    strength = [Line("strength", _over_epochs(run.rows, "quant/strength"))]
    charts.append(
        line_chart("Strength of the normalisation", strength, "quantized epoch", "0 to 1", shown=(0.0, 1.0))
    )  # fmt: skip
    note = (
        "Branch 0 is the first input of the Concat, usually the deep one. Gradients are balanced where the norms of a "
        "node's branches are equal. Only epochs in which the normalisation has ended may become best.pt."
    )
    return section("GABFusion: what each fusion node learned", wrap_charts(charts) if run.nodes else "", note)


def _over_epochs(rows: Sequence[dict[str, float]], column: str) -> list[tuple[float, float]]:
    return [(epoch, row[column]) for epoch, row in enumerate(rows, 1) if column in row]


def layers_part(run: RunFiles) -> str:
    """Every quantized convolution; a click on a heading sorts."""
    rows, sums = [], []
    for layer in run.layers:
        cells = []
        for column, (_, digits) in LAYER_COLUMNS.items():
            text = layer.get(column) or ""
            if digits is not None and text:
                text = f"{float(text) * FACTORS.get(column, 1):.{digits}f}"
            cells.append(text)
        (sums if layer["name"] in ("total", "float") else rows).append(cells)
    note = (
        "Click a heading to sort. Signal-to-noise ratios (SQNR) compare with the float values: low ones lose most. "
        "BOPs are multiply-accumulates times weight bits times input bits, for one image. The last rows are the sums, "
        "quantized and float."
    )
    heads = [head for head, _ in LAYER_COLUMNS.values()]
    table = f'<div class="tall">{html_table(heads, rows, True, sums)}</div>' if rows else ""
    return section("Layers", table, note)


def pictures_part(shown: Sequence[Comparison], totals: dict[str, int]) -> str:
    """Float on the left, quantized on the right."""
    pairs = []
    for item in shown:
        marks = f'<span class="lost">{item.lost} lost</span>, <span class="gained">{item.gained} gained</span>'
        extra = f"boxes on no object: {item.float_extra} float, {item.extra} quantized"
        images = f'<img src="{item.float_picture}" alt="float"> <img src="{item.quantized_picture}" alt="quantized">'
        caption = f"<figcaption>{escape(item.name)}: {marks}; {extra}</figcaption>"
        pairs.append(f'<figure class="pair">{images}{caption}</figure>')
    note = (
        f"Of {totals['objects']} objects in {totals['images']} validation images both networks find {totals['both']}, "
        f"only the float one {totals['lost']} (lost), only the quantized one {totals['gained']} (gained): confidence "
        "from 0.25, overlap from 0.5, right class. "
    )
    if shown:
        note += (
            "Below are the images that differ most, float left, quantized right. Wide boxes: found by this network "
            "alone; thin coloured ones: where the other one alone found something; pale ones: all other detections."
        )
    else:
        note += "On every object the two agree, so no image is shown."
    return section("What quantization changed", f'<div class="pairs">{"".join(pairs)}</div>', note)


def attention_part(found: Sequence[Attention]) -> str:
    """SimAM maps, teacher above student, a layer a column."""
    drawn = ""
    for item in found:
        cells = f'<img class="seen" src="{item.picture}" alt="image">'
        for who, pictures in (("teacher", item.teacher), ("student", item.student)):
            for layer, picture in zip(item.layers, pictures, strict=True):
                text = f"layer {layer}, {who}"
                cells += (
                    f'<figure><img src="{picture}" alt="{text}"><figcaption>{text}</figcaption></figure>'
                )  # fmt: skip
        maps = f'<div class="maps" style="--layers: {len(item.layers)}">{cells}</div>'
        drawn += f'<div><p class="soft">{escape(item.name)}</p>{maps}</div>'
    note = (
        "SimAM energy, mean over channels, of the layers that feed Detect: bright is high. Teacher above, student "
        "below, both of a layer on one scale."
    )
    drawn = f'<div class="pairs">{drawn}</div>' if drawn else ""
    return section("Attention maps of float teacher and quantized student", drawn, note)


def files_part(run: RunFiles) -> str:
    """Exported files with size, verification and speed, and the other weights with their sizes.

    It stands between marks, so that ``export.py`` can put its files into a page that is there.
    """
    exported = [
        (entry["file"], entry["purpose"], f"{entry['bytes'] / 1e6:.2f}", f"{entry['milliseconds']:.1f}",
         f"{entry['width']} x {entry['height']}", str(entry["threads"]), entry["verification"])
        for entry in run.exports
    ]  # fmt: skip
    heads = ("exported file", "what it is", "MB", "ms an image", "pixels", "CPU threads", "compared with the network")
    table = f'<div class="files">{html_table(heads, exported)}</div>' if exported else ""
    names = {entry["file"] for entry in run.exports}
    others = [(name, f"{size / 1e6:.2f}") for name, size in run.files if not names & set(Path(name).parts)]
    table += html_table(("weights", "MB"), others) if others else ""
    note = "Times are of one image in the file's own runtime when it was exported, without suppression of boxes."
    if not exported:
        note = "Nothing has been exported yet: python export.py does, and adds size, verification and speed here."
    return FILES_BEGIN + section("Files", table, note) + FILES_END


# Options that belong to one run's place and course rather than to what it trains.
INTERNAL = {"cfg_given", "float_phase_asked", "needs_float", "stride", "resume", "project", "name", "exist_ok",
            "started_in", "verbose", "evolve"}  # fmt: skip


def command_of(options: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The command that repeats a run: every option that differs from its default."""
    internal = set(INTERNAL)
    # What filled gaps must not become a wish: with weights, a network of its own, or a float phase that was not needed.
    if options.get("weights") and not options.get("cfg_given", True):
        internal.add("cfg")
    if not (options.get("needs_float", True) or options.get("float_phase_asked", True)):
        internal.add("float_epochs")
    if not (options.get("quant") or options.get("recipe")):
        internal |= {"float_epochs", "quant_optimizer"}
    words = ["python", "train.py"]
    for key, value in options.items():
        if key in internal or key not in defaults or value == defaults[key] or value is None or value is False:
            continue
        words.append("--" + key.replace("_", "-") if key in DASHED else f"--{key}")
        if value is not True:
            words += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return shlex.join(words)


DASHED = {"batch_size", "single_cls", "multi_scale", "cos_lr", "label_smoothing", "save_period", "float_epochs",
          "image_weights", "sync_bn", "quant_optimizer"}  # fmt: skip


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
        before = f"{100 * run.accuracy[0][1]:.2f}" if run.gap is not None else ""
        rows.append((str(run.folder), last[0], before, f"{100 * last[1]:.2f}", f"{100 * last[2]:.2f}", gap, size))
    heads = ("run", "network", "float mAP50 %", "mAP50 %", "mAP50-95 %", "gap to float, points of mAP50", "MB")
    parts = [section("Accuracy", html_table(heads, rows, sortable=True))]
    charts = []
    for column, name in ((MAP50, "mAP50"), (MAP, "mAP50-95"), ("val/box_loss", "Validation box loss")):
        lines = [
            Line(str(run.folder), [(n, row[column]) for n, row in enumerate(run.rows, 1) if column in row], i, i)
            for i, run in enumerate(runs)
        ]
        charts.append(line_chart(name, lines, "epoch of the last phase", name))
    parts.append(section("Over the epochs", wrap_charts(charts)))
    return [*parts, section("Settings that differ", _differences(runs))]


def _differences(runs: Sequence[RunFiles]) -> str:
    flat = [_flat({"opt": run.options, "hyp": run.hyp, "quant": run.quantization}) for run in runs]
    skipped = {f"opt.{key}" for key in INTERNAL}
    keys = [key for key in dict.fromkeys(k for values in flat for k in values) if key not in skipped]
    rows = [(key, *(str(values.get(key, "")) for values in flat)) for key in keys]
    rows = [row for row in rows if len({*row[1:]}) > 1]
    return html_table(("key", *(str(run.folder) for run in runs)), rows) if rows else ""


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found
