"""Writes the pages: of one run, and of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.backend import load_network
from run_report import page
from run_report.collect import RunFiles, read_run
from run_report.pictures import attention_maps, compare, validation_images
from training.options import make_parser
from utils.errors import UserError
from utils.log import LOGGER
from utils.paths import written_at_once

PAGE = "report.html"


def write_report(folder: str | Path, output: Path | None = None, pictures: bool = True) -> Path:
    """Writes ``report.html`` of the run in ``folder``; returns its path.

    Args:
        output: another file.
        pictures: also run both networks on validation images. Where data or float weights are gone, the page says so.

    Raises:
        UserError: not a run's folder, or one of its files is damaged.
    """
    run = read_run(folder)
    defaults = vars(make_parser("").parse_args([]))
    parts = [page.accuracy_part(run)]
    parts += _pictures(run) if pictures else []
    parts += [page.curves_part(run), page.fusion_part(run), page.layers_part(run), page.files_part(run)]
    parts.append(page.configuration_part(run, page.command_of(run.options, defaults)))
    method = run.quantization.get("method", "float")
    bits = (run.quantization.get("weight") or {}).get("bits")
    subtitle = f"{method}{f', {bits}-bit weights' if bits else ''}, data {run.options.get('data', 'unknown')}"
    return _write(output or run.folder / PAGE, page.fill(str(run.folder), subtitle, parts))


def write_files(folder: Path) -> None:
    """Brings the part about exported files in a run's page up to date; no network is run."""
    file = folder / PAGE
    before, begin, rest = file.read_text(encoding="utf-8").partition(page.FILES_BEGIN)
    _, end, after = rest.partition(page.FILES_END)
    if begin and end:  # else of an older version, which python -m run_report writes anew
        _write(file, before + page.files_part(read_run(folder)) + after)


def _pictures(run: RunFiles) -> list[str]:
    """The parts for which networks are run; a sentence where that cannot be done."""
    if not run.quantization or run.best_weights is None:
        return []
    if run.float_weights is None:
        return ['<p class="soft">The float weights of this run are gone, so nothing is compared image by image.</p>']
    try:
        network, _ = load_network(run.best_weights)
        dataset = validation_images(run, max(int(network.stride.max()), 32))
        shown, totals = compare(run, dataset, dict(network.names))
        return [page.pictures_part(shown, totals), page.attention_part(attention_maps(run, dataset))]
    except UserError as error:
        LOGGER.warning(f"WARNING: report without pictures: {error}")
        return ['<p class="soft">Pictures are missing: the data set or the weights could not be read.</p>']


def write_comparison(folders: Sequence[str | Path], output: Path) -> Path:
    """Writes a page with several runs side by side; returns its path.

    Raises:
        UserError: one of them is no run's folder.
    """
    runs = [read_run(folder) for folder in folders]
    subtitle = f"{len(runs)} runs"
    return _write(output, page.fill("Runs side by side", subtitle, page.comparison_parts(runs)))


def _write(file: Path, text: str) -> Path:
    with written_at_once(file) as stream:
        stream.write(text.encode("utf-8"))
    return file
