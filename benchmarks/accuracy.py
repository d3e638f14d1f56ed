"""Measures what low bits cost and what each method and variant wins back: a grid of trainings from one float start.

    python benchmarks/accuracy.py benchmarks/grids/core.yaml --output runs/core --jobs 1
    python benchmarks/accuracy.py --quick                    (a small table: 15 minutes on two cores)

Every row starts from the same float network, sees the same images in the same order, and differs in what the row says.
The float row is trained on for as many epochs, with what suits a float network: SGD where the start was trained with it
(AdamW, which low bits want, costs it points). The last epoch's averaged weights are measured, so nothing is selected on
the split that is reported. A training that is done is not done again, one that was interrupted is resumed; rows may be
added to a grid later, but rows and float starts of other settings than the grid's are refused. Grids that give a data
set the same name and settings may share an --output, and with it the start and rows. Results go to accuracy_GRID.json
there and to docs/results.md, or for a grid of your own to results.md in --output; the JSON is copied beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import asdict
from datetime import date
from io import StringIO
from multiprocessing import active_children, get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from bootstrap import RESAMPLES, Counts, draw_images, interval, mean_over_seeds, resampled_map  # noqa: E402
from common import machine, write_section  # noqa: E402
from grid import FLOAT, VARIANTS, Cell, DataSettings, Grid, Variant, read_grid  # noqa: E402

import train  # noqa: E402
import val  # noqa: E402
from quant.recipe import build_config  # noqa: E402
from utils.checkpoint import load_checkpoint  # noqa: E402
from utils.dataset_yaml import find_dataset_yaml, load_dataset_yaml, prepare_dataset  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.hyp import load_hyp, phase_hyp  # noqa: E402
from utils.labels import list_images  # noqa: E402
from utils.log import LOGGER  # noqa: E402

GRIDS = ROOT / "benchmarks" / "grids"
START = "start"  # suffix of the folder of a data set's float start
FLOAT_SGD = {"lr0": 0.002, "momentum": 0.937}  # of the float row: 94.9 / 59.0 where AdamW at 0.001 gave 93.2 / 55.8
RESULT, SETTINGS, COUNTS, LOG = "result.json", "settings.json", "counts.npz", "log.txt"


# --- one training -----------------------------------------------------------------------------------------------------


def data_yaml(name: str, settings: DataSettings, output: Path) -> str:
    """The data set YAML of ``settings``; with a ``holdout`` one of two lists of training images, made in ``output``."""
    file = find_dataset_yaml(settings.yaml)
    if not settings.holdout:
        return str(file)
    target = output / f"{name}_holdout.yaml"
    if not target.exists():
        output.mkdir(parents=True, exist_ok=True)
        spec = prepare_dataset(load_dataset_yaml(file))
        images = np.array(sorted(list_images(spec.train)))
        np.random.default_rng(0).shuffle(images)
        held = round(len(images) * settings.holdout)
        for part, chosen in (("val", images[:held]), ("train", images[held:])):
            (output / f"{name}_{part}.txt").write_text("\n".join(sorted(chosen)) + "\n", encoding="utf-8")
        lists = {part: f"{name}_{part}.txt" for part in ("train", "val")}
        target.write_text(yaml.safe_dump({"path": ".", **lists, "names": spec.names}), encoding="utf-8")
    return str(target)


def common_arguments(cell: Cell, grid: Grid, output: Path, folder: Path, hyp: str) -> list[str]:
    """Flags of train.py that all trainings on a data set share."""
    settings = grid.data[cell.data]
    arguments = ["--data", data_yaml(cell.data, settings, output), "--imgsz", str(settings.image_size)]
    arguments += ["--batch-size", str(settings.batch_size), "--hyp", hyp, "--optimizer", settings.optimizer]
    arguments += ["--cos-lr"] if settings.cosine else []
    arguments += ["--seed", str(cell.seed), "--noval", "--noplots", "--cache", "--workers", "0", "--patience", "0"]
    return [*arguments, "--project", str(folder.parent), "--name", folder.name, "--exist-ok"]


def train_once(folder: Path, arguments: list[str]) -> Path:
    """One training: begun, resumed, or left alone if it is finished; returns its last checkpoint."""
    last = folder / "weights" / "last.pt"
    if last.exists():
        if load_checkpoint(last).get("finished"):
            return last
        arguments = ["--resume", str(last)]
    train.main(train.parse_arguments(arguments))
    return last


def float_start(name: str, grid: Grid, output: Path) -> Path:
    """The float network that all rows of a data set start from."""
    settings = grid.data[name]
    if not settings.float_epochs:
        return Path(settings.weights).expanduser().resolve()
    folder = output / f"{name}_{START}"
    rows_own = ("split", "epochs")
    note_settings(folder, {"settings": {k: v for k, v in asdict(settings).items() if k not in rows_own}})
    cell = Cell(name, FLOAT, "", "", 0)
    arguments = [*common_arguments(cell, grid, output, folder, settings.hyp), "--epochs", str(settings.float_epochs)]
    if settings.weights:
        arguments += ["--weights", settings.weights]
    if settings.cfg or not settings.weights:
        arguments += ["--cfg", settings.cfg or "yolov5n.yaml"]
    return train_once(folder, arguments)


def write_hyp(cell: Cell, grid: Grid, folder: Path) -> str:
    """The hyperparameters of a row: the variant's over the data set's. The float row has those of the quantized phase
    but for the optimizer's. Returns the file."""
    values = load_hyp(grid.data[cell.data].hyp)
    if cell.method == FLOAT:
        quantized = phase_hyp(values, True)
        same = ("lr0", "lrf", "momentum", "weight_decay", "nominal_batch", "ema_decay", "ema_tau", "lr_tail")
        values |= {key: quantized[key] for key in same} | {"warmup_epochs": 0.0}
        values |= FLOAT_SGD if grid.data[cell.data].optimizer == "SGD" else {}
    else:
        values |= grid.variants[cell.variant].hyp
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "given_hyp.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(folder / "given_hyp.yaml")


def train_cell(cell: Cell, grid: Grid, output: Path) -> Path:
    """The training of one row and seed; returns its last checkpoint."""
    folder = output / cell.name
    start = float_start(cell.data, grid, output)
    hyp, epochs = write_hyp(cell, grid, folder), grid.data[cell.data].epochs
    if cell.method == FLOAT:
        arguments = common_arguments(cell, grid, output, folder, hyp)
        return train_once(folder, [*arguments, "--weights", str(start), "--epochs", str(epochs), "--noautoanchor"])
    variant = grid.variants[cell.variant]
    quantization = quantization_arguments(cell, variant, folder)
    weights = start
    for bits, length in variant.stages:
        stage = folder / bits
        arguments = common_arguments(cell, grid, output, stage, hyp) + quantization
        arguments += ["--weights", str(weights), "--teacher", str(start), "--bits", bits, "--epochs", str(length)]
        weights = train_once(stage, arguments)
    left = epochs - sum(length for _, length in variant.stages)
    arguments = common_arguments(cell, grid, output, folder, hyp) + quantization
    arguments += ["--teacher", str(start)] if variant.stages else []
    return train_once(folder, [*arguments, "--weights", str(weights), "--bits", cell.bits, "--epochs", str(left)])


def quantization_arguments(cell: Cell, variant: Variant, folder: Path) -> list[str]:
    """Flags of train.py for a quantized row, without its bits; a recipe of its own is written to ``folder``."""
    recipe = variant.recipe
    if isinstance(recipe, dict):
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        recipe = str(folder / "recipe.yaml")
    arguments = ["--quant", cell.method, *variant.flags]
    arguments += ["--compile", "on"] if torch.cuda.is_available() else []  # on a CPU it is on by itself
    return arguments + (["--recipe", recipe] if recipe else [])


def measure(weights: Path, data: str, settings: DataSettings, folder: Path) -> dict:
    """Accuracy of ``weights``; what the bootstrap needs is left in ``folder``."""
    split = "val" if settings.holdout else settings.split
    arguments = ["--data", data, "--weights", str(weights), "--task", split]
    arguments += ["--imgsz", str(settings.image_size), "--batch-size", "16", "--workers", "0", "--noplots"]
    result = val.run(val.parse_options([*arguments, "--project", str(folder), "--name", "val", "--exist-ok"]))
    classes = int(max(result.samples.actual.max(initial=0), result.samples.predicted.max(initial=0))) + 1
    Counts.of(result.samples, result.images, classes).save(folder / COUNTS)
    matched = result.matched
    return {
        "mAP50": result.map50,
        "mAP75": result.map75,
        "mAP": result.map,
        "matched": matched.share,
        "IoU": matched.mean_iou,
        "images": result.images,
    }


def run_cell(cell: Cell, grid: Grid, output: Path) -> None:
    """Trains and measures one row and seed unless that has been done."""
    folder = output / cell.name
    if read_result(cell, grid, output) is not None:
        return
    note_settings(folder, conditions(cell, grid))
    begun = any(folder.rglob("last.pt"))
    started = time.perf_counter()
    weights = train_cell(cell, grid, output)
    seconds = time.perf_counter() - started
    settings = grid.data[cell.data]
    values = measure(weights, data_yaml(cell.data, settings, output), settings, folder)
    values |= {"train_seconds": None if begun else round(seconds)}  # of a resumed one only the rest is known
    values |= {"cell": asdict(cell), **conditions(cell, grid), "date": date.today().isoformat(), "machine": machine()}
    values["quantization"] = load_checkpoint(weights)["quantization"]
    write_json(folder / RESULT, values)


def write_json(file: Path, values: dict) -> None:
    """Writes the whole file or none of it."""
    temporary = file.with_name(f"{file.name}.part")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)


def conditions(cell: Cell, grid: Grid) -> dict:
    """What has to be the same for a result to be this grid's."""
    variant = {} if cell.method == FLOAT else asdict(grid.variants[cell.variant])
    variant.pop("against", None)  # what it is compared with says nothing of how it was made
    return {"settings": asdict(grid.data[cell.data]), "variant": variant}


def read_result(cell: Cell, grid: Grid, output: Path) -> dict | None:
    """The finished result of a row and seed, or None.

    Raises:
        UserError: it was made with other settings than the grid's.
    """
    file = output / cell.name / RESULT
    if not file.exists():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    refuse_others(file, result, conditions(cell, grid))
    return result


def note_settings(folder: Path, now: dict[str, dict]) -> None:
    """Writes down what a training is made with before it begins, so that it is not taken up with anything else.

    Raises:
        UserError: it was begun with other settings than ``now``.
    """
    file = folder / SETTINGS
    if file.exists() and any(folder.rglob("last.pt")):
        refuse_others(file, json.loads(file.read_text(encoding="utf-8")), now)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, now)


def refuse_others(file: Path, before: dict[str, dict], now: dict[str, dict]) -> None:
    """Raises a UserError that names the values of ``now`` that differ from those ``before``, which ``file`` holds."""
    for part, values in now.items():
        then = before.get(part, {})  # older files have no variant
        differing = [key for key in then if key in values and then[key] != values[key]]
        if differing:
            told = ", ".join(f"{key} {then[key]!r}, now {values[key]!r}" for key in differing)
            raise UserError(
                f"{file} was made with other settings than the grid's ({told}). Give another --output, or delete "
                f"{file.parent}"
            )


# --- all of them ------------------------------------------------------------------------------------------------------


def run_all(file: Path, grid: Grid, output: Path, jobs: int) -> int:
    """Runs what is missing, ``jobs`` trainings at a time; returns how many failed.

    Each of ``jobs`` processes does one training after the other: starting Python and the device took longer than an
    epoch.
    """
    missing = [cell for cell in grid.cells if read_result(cell, grid, output) is None]
    for cell in missing:  # what cannot be trained is said before the float start has taken its hours
        check_cell(cell, grid)
    for name in {cell.data: None for cell in grid.cells}:  # before the rows, which would all train it
        float_start(name, grid, output)
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // jobs, 1)))
    failed = 0
    with ProcessPoolExecutor(jobs, get_context("spawn"), begin, (os.getpid(),)) as pool:
        running = {pool.submit(run_logged, cell, grid, output): cell for cell in missing}
        try:
            for future in as_completed(running):
                cell = running[future]
                failed += future.exception() is not None
                outcome = f"FAILED, see {output / cell.name / LOG}" if future.exception() else "done"
                LOGGER.info(f"{cell.name}: {outcome}")
        except BaseException:  # Ctrl-C: without this the pool would finish all that is left
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.kill()  # a training goes on from its last epoch
            raise
    return failed


def check_cell(cell: Cell, grid: Grid) -> None:
    """Raises a UserError if a row's flags or its recipe are not possible."""
    if cell.method == FLOAT:
        return
    where, said = f"variant {cell.variant}, {cell.method} {cell.bits}", StringIO()
    with TemporaryDirectory() as folder:
        flags = quantization_arguments(cell, grid.variants[cell.variant], Path(folder))
        try:
            with redirect_stderr(said):
                given = train.parse_arguments([*flags, "--bits", cell.bits])
            build_config(given.quant, given.bits, given.gabfusion, given.ada, given.recipe)
        except SystemExit:
            raise UserError(f"{where}: flags: {said.getvalue().strip().splitlines()[-1]}") from None
        except UserError as error:
            raise UserError(f"{where}: {str(error).replace(f'{folder}{os.sep}', '')}") from None


def begin(parent: int) -> None:
    """What each process does first. It ends with ``parent``: one that was killed left its trainings running."""
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; the parent ends it

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def run_logged(cell: Cell, grid: Grid, output: Path) -> None:
    """``run_cell`` with everything that it prints in its folder's log."""
    (output / cell.name).mkdir(parents=True, exist_ok=True)
    with open(output / cell.name / LOG, "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        try:
            run_cell(cell, grid, output)
        except (Exception, SystemExit) as error:
            if isinstance(error, UserError):
                LOGGER.error(f"ERROR: {error}")
            else:
                traceback.print_exc()
            raise RuntimeError(cell.name) from None  # an error of any kind may not travel between processes


# --- the table --------------------------------------------------------------------------------------------------------


def gather(grid: Grid, output: Path) -> dict[tuple[str, str, str, str], dict]:
    """Row (data, method, bits, variant) -> its seeds' results, and mAP50 and mAP75 of each on every resample.

    ``runs`` are the result files' contents in the order of the seeds, ``resampled`` an array (seeds, resamples, 2).
    """
    rows: dict[tuple[str, str, str, str], dict] = {}
    weights: dict[int, np.ndarray] = {}
    for cell in sorted(grid.cells, key=lambda cell: cell.seed):
        result = read_result(cell, grid, output)
        if result is None:
            continue
        counts = Counts.load(output / cell.name / COUNTS)
        images = len(counts.labels)
        if images not in weights:
            weights[images] = draw_images(images)
        row = rows.setdefault((cell.data, cell.method, cell.bits, cell.variant), {"runs": [], "resampled": []})
        row["runs"].append(result)
        row["resampled"].append(resampled_map(counts, weights[images]))
    for row in rows.values():
        row["resampled"] = np.stack(row["resampled"])
    return rows


def difference(row: dict, reference: dict | None) -> dict[str, float] | None:
    """Mean difference of mAP50 in points over the seeds that both have, and its 95 % interval."""
    if reference is None:
        return None
    seeds = [run["cell"]["seed"] for run in row["runs"]]
    others = [run["cell"]["seed"] for run in reference["runs"]]
    shared = [seed for seed in seeds if seed in others]
    if not shared:
        return None
    ours = row["resampled"][[seeds.index(seed) for seed in shared], :, 0]
    theirs = reference["resampled"][[others.index(seed) for seed in shared], :, 0]
    values = mean_over_seeds(100 * (ours - theirs))
    low, high = interval(values)
    return {"points": float(values[0]), "low": low, "high": high, "seeds": len(shared)}


def summarise(rows: dict[tuple[str, str, str, str], dict], grid: Grid) -> list[dict]:
    """One plain dict a row: means, spread, gap to float, gain over the equal baseline."""
    found = []
    for (data, method, bits, variant), row in rows.items():
        runs = row["runs"]
        entry = {"data": data, "method": method, "bits": bits, "variant": variant, "seeds": len(runs)}
        for key in ("mAP50", "mAP75", "mAP", "matched", "IoU"):
            entry[key] = statistics.fmean(run[key] for run in runs)
        entry["spread"] = statistics.stdev(run["mAP50"] for run in runs) if len(runs) > 1 else None
        times = [run["train_seconds"] for run in runs if run["train_seconds"] is not None]
        entry["minutes"] = statistics.fmean(times) / 60 if times else None
        kept = ("mAP50", "mAP75", "mAP", "matched", "IoU", "train_seconds", "date")
        entry["by_seed"] = {str(run["cell"]["seed"]): {key: run[key] for key in kept} for run in runs}
        entry["gap"] = difference(row, rows.get((data, FLOAT, "", ""))) if method != FLOAT else None
        against = grid.variants[variant].against if variant else ""
        entry["against"] = against
        entry["gain"] = difference(row, rows.get((data, method, bits, against))) if variant != against else None
        found.append(entry)
    return found


def table(entries: list[dict]) -> list[str]:
    """Markdown lines of one data set."""
    heads = ["network", "seeds", "mAP50", "spread", "gap to float", "gain over base", "mAP75", "mAP50-95"]
    heads += ["matched", "mean IoU", "minutes"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    order = {variant: place for place, variant in enumerate(("", *VARIANTS))}  # others behind
    for entry in sorted(entries, key=lambda e: (e["bits"] != "", e["bits"], e["method"], order.get(e["variant"], 99))):
        name = " ".join(part for part in (entry["bits"], entry["method"], entry["variant"]) if part)
        spread = "" if entry["spread"] is None else f"{100 * entry['spread']:.1f}"
        cells = [name, str(entry["seeds"]), f"{100 * entry['mAP50']:.1f}", spread]
        over = f" over {entry['against']}" if entry["gain"] and entry["against"] != "base" else ""
        cells += [describe(entry["gap"]), describe(entry["gain"]) + over]
        cells += [f"{100 * entry[key]:.1f}" for key in ("mAP75", "mAP", "matched")]
        minutes = "" if entry["minutes"] is None else f"{entry['minutes']:.1f}"
        lines.append("| " + " | ".join([*cells, f"{entry['IoU']:.4f}", minutes]) + " |")
    return lines


def describe(value: dict[str, float] | None) -> str:
    """``-1.2 [-2.0, -0.5]``."""
    return "" if value is None else f"{value['points']:+.1f} [{value['low']:+.1f}, {value['high']:+.1f}]"


def part_of(settings: DataSettings) -> str:
    """What is reported on, in words."""
    return f"{settings.holdout:.0%} of the training split held out" if settings.holdout else f"{settings.split} split"


def report(file: Path, grid: Grid, output: Path, document: Path) -> list[dict]:
    """Writes accuracy_GRID.json and the section of the document; returns the entries."""
    entries = summarise(gather(grid, output), grid)
    if not entries:
        raise UserError(f"{output} has no finished training of {file}, so there is nothing to report")
    content = {"grid": file.name, "date": date.today().isoformat(), "machine": machine(), "rows": entries}
    for folder in {output, document.parent}:
        write_json(folder / f"accuracy_{file.stem}.json", content)
    path = file.resolve()
    given = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    lines = [f"## {grid.title}", "", f"`python benchmarks/accuracy.py {given}`", ""]
    dates = sorted({run["date"] for entry in entries for run in entry["by_seed"].values()})
    lines += [
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {content['machine']}. Points of mAP50, mean over seeds; "
        f"spread: standard deviation over seeds. Brackets: 95 % of {RESAMPLES} bootstrap resamples of images and seeds "
        "together, paired between the rows that are compared (of one seed they hold the images alone, of two too "
        "little of the seeds). Last epoch's averaged weights, nothing selected. Minutes of training: with as many "
        "trainings beside it as were run at a time.",
        "",
    ]
    for name in {entry["data"]: None for entry in entries}:
        settings = grid.data[name]
        lines += [
            f"### {name} ({part_of(settings)}, {settings.image_size} px, {settings.float_epochs} float epochs, then "
            f"{settings.epochs} in every row)",
            "",
            *table([entry for entry in entries if entry["data"] == name]),
            "",
        ]
    missing = [cell.name for cell in grid.cells if read_result(cell, grid, output) is None]
    if missing:
        lines += [f"Not yet run: {len(missing)} of {len(grid.cells)} trainings ({', '.join(missing[:4])} ...).", ""]
    write_section(f"accuracy {file.stem}", lines, document)
    return entries


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="?", type=Path, default=GRIDS / "core.yaml")
    parser.add_argument("--quick", action="store_true", help="the grid quick.yaml")
    parser.add_argument("--output", type=Path, default=None, help="folder of the trainings (default: runs/GRID)")
    parser.add_argument(
        "--jobs", type=int, default=1, help="trainings at a time; each gets its share of the processors"
    )
    parser.add_argument("--report", action="store_true", help="train nothing, write the tables of what is there")
    parser.add_argument(
        "--document",
        type=Path,
        default=None,
        help="file that gets the tables (default: docs/results.md for the project's grids, else in --output)",
    )
    parser.add_argument("--only", default="", help="one training by its folder's name")
    options = parser.parse_args(arguments)
    file = GRIDS / "quick.yaml" if options.quick else options.grid
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least one training at a time")
    failed = 0
    try:
        grid = read_grid(file.resolve())
        output = (options.output or ROOT / "runs" / file.stem).resolve()
        output.mkdir(parents=True, exist_ok=True)
        own = file.resolve().parent != GRIDS  # whose name may be that of one of the project's
        document = options.document or (output / "results.md" if own else ROOT / "docs" / "results.md")
        if options.only:
            chosen = [cell for cell in grid.cells if cell.name == options.only]
            if not chosen:
                raise UserError(f"--only {options.only}: {file} has no such training")
            check_cell(chosen[0], grid)
            run_cell(chosen[0], grid, output)
            LOGGER.info(f"{options.only}: done; --report writes the tables")
            return 0
        if not options.report:
            failed = run_all(file.resolve(), grid, output, options.jobs)
        for entry in report(file, grid, output, document.resolve()):
            name = " ".join(part for part in (entry["data"], entry["bits"], entry["method"], entry["variant"]) if part)
            LOGGER.info(f"{name:<32}mAP50 {entry['mAP50']:.4f}  {describe(entry['gap'])}")
    except UserError as error:
        LOGGER.error(f"ERROR: {error}")
        return 1
    except KeyboardInterrupt:
        LOGGER.error("Interrupted. The same command goes on where this one stopped")
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
