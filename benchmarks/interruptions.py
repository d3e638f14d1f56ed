"""Kills trainings with SIGKILL again and again, resumes them, and compares their end with that of undisturbed ones.

    python benchmarks/interruptions.py --kills 30

A small network on eight drawn images, both phases, every quantizer. Half of the kills come at a random time, half while
a checkpoint is saved: before anything is written, with half of the file written, with all of it written, renamed. After
each kill every checkpoint must load; at the end every epoch's checkpoint must be that of the undisturbed run, bit for
bit: weights, averages, optimizer, quantizers, balance controller, random states; and so must results.csv.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
import yaml  # noqa: E402
from common import machine, write_section  # noqa: E402

import train  # noqa: E402
import utils.checkpoint  # noqa: E402
from data.shapes import CLASSES, Drawing, draw_shapes  # noqa: E402
from training.faults import newest_checkpoint  # noqa: E402
from utils.checkpoint import load_checkpoint  # noqa: E402
from utils.devices import limit_threads  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.log import LOGGER  # noqa: E402

STAGES = ("nothing written", "half written", "all written", "renamed")
METHODS = ("lsq", "lsq+", "pact", "dsq", "n2uq")
# What names the run or the moment, not its state.
UNCOMPARED = ("date", "options")
NETWORK = {
    "nc": 4,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[5, 6, 8, 14, 15, 11]],
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "SPPF", [8, 5]]],
    "head": [
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 0], 1, "Concat", [1]],
        [-1, 1, "C3", [8]],
        [[5], 1, "Detect", ["nc", "anchors"]],
    ],
}
FLAGS = ["--imgsz", "64", "--batch-size", "4", "--workers", "0", "--noplots", "--noautoanchor", "--device", "cpu"]
FLAGS += ["--save-period", "1", "--multi-scale", "--compile", "off"]


@dataclass(frozen=True)
class Kill:
    """When a training is killed: ``seconds`` after its start, or after ``file`` has appeared;
    or at a ``stage`` of the ``number``-th time that it saves."""

    seconds: float | None = None
    file: Path | None = None
    stage: str = ""
    number: int = 0


def make_place(folder: Path) -> list[str]:
    """Draws the data and writes the network; returns the arguments that use them."""
    draw_shapes(folder / "set", seed=3, drawing=Drawing(train_images=8, val_images=4, image_size=64))
    names = dict(enumerate(CLASSES))
    content = {"path": "set", "train": "images/train", "val": "images/val", "names": names}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    (folder / "network.yaml").write_text(yaml.safe_dump(NETWORK))
    return [*FLAGS, "--data", str(folder / "data.yaml"), "--cfg", str(folder / "network.yaml")]


def train_in_child(arguments: list[str], kill: Kill, log: Path) -> str:
    """Trains in a process of its own; returns ``finished`` or ``killed``.

    The process is forked, so that it starts without importing everything anew.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _train_and_exit(arguments, kill, log)
    if kill.seconds is not None:
        _kill_after(child, kill)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"the training failed:\n{log.read_text()[-3000:]}")
    return "finished"


def _train_and_exit(arguments: list[str], kill: Kill, log: Path) -> None:
    with log.open("a") as stream:
        sys.stdout = sys.stderr = stream
        try:
            if kill.stage:
                _kill_while_saving(kill)
            train.main(train.parse_arguments(arguments))
        except UserError as error:
            # Killed behind its last save: there is nothing left to train.
            code = 0 if "nothing to resume" in str(error) else 1
            print(error, flush=True)
            os._exit(code)
        except BaseException:
            traceback.print_exc()
            stream.flush()
            os._exit(1)
        stream.flush()
    os._exit(0)


def _kill_after(child: int, kill: Kill) -> None:
    end = time.monotonic() + kill.seconds
    while (waits := kill.file is not None and not kill.file.exists()) or time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return  # it was faster
        if waits:
            end = time.monotonic() + kill.seconds
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)


def _kill_while_saving(kill: Kill) -> None:
    """Has this process kill itself at the stage of the save that is meant."""
    calls, save, replace = [0], torch.save, os.replace

    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watched_save(content: object, stream: object) -> None:
        calls[0] += 1
        if calls[0] == kill.number and kill.stage == STAGES[0]:
            end()
        if calls[0] == kill.number and kill.stage == STAGES[1]:
            whole = io.BytesIO()
            save(content, whole)
            stream.write(whole.getvalue()[: whole.tell() // 2])
            stream.flush()
            end()
        save(content, stream)

    def watched_replace(source: object, target: object) -> None:
        due = calls[0] == kill.number and str(target).endswith(".pt")
        if due and kill.stage == STAGES[2]:
            end()
        replace(source, target)
        if due and kill.stage == STAGES[3]:
            end()

    torch.save, os.replace = watched_save, watched_replace


def random_kill(rng: random.Random, seconds: float, saves: int) -> Kill:
    """A moment of a run of this length that saves so many times."""
    if rng.random() < 0.5:
        return Kill(seconds=rng.uniform(0, seconds))
    return Kill(stage=rng.choice(STAGES), number=rng.randint(1, saves))


def check_checkpoints(folder: Path) -> None:
    """Raises UserError unless every checkpoint of a run can be loaded."""
    for file in (folder / "weights").glob("*.pt"):
        load_checkpoint(file)


def train_with_kills(arguments: list[str], folder: Path, kills: list[Kill]) -> int:
    """Trains into ``folder``, killed at each of ``kills`` and resumed after each; returns how many struck."""
    struck = 0
    for kill in [*kills, Kill()]:
        last = newest_checkpoint(folder / "weights")
        start = [*arguments, "--project", str(folder.parent), "--name", folder.name, "--exist-ok"]
        outcome = train_in_child(["--resume", str(last)] if last else start, kill, folder.with_suffix(".log"))
        check_checkpoints(folder)
        if outcome == "finished":
            break
        struck += 1
    return struck


def differences(undisturbed: Path, resumed: Path) -> list[str]:
    """What two run folders do not have in common: entries of checkpoints, files, tables."""
    found = []
    names = {file.name for folder in (undisturbed, resumed) for file in (folder / "weights").glob("*.pt")}
    for name in sorted(names):
        files = [folder / "weights" / name for folder in (undisturbed, resumed)]
        if not all(file.exists() for file in files):
            found.append(f"{name} is missing")
            continue
        one, two = map(load_checkpoint, files)
        found += [f"{name}: {key}" for key in one if key not in UNCOMPARED and not _same(one[key], two.get(key))]
    for name in ("results.csv", "float_results.csv"):
        texts = [file.read_text() if (file := folder / name).exists() else "" for folder in (undisturbed, resumed)]
        if texts[0] != texts[1]:
            found.append(name)
    return found


def _same(one: object, two: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(_same, one, two))
    return one == two


def count_saves(arguments: list[str], folder: Path) -> tuple[float, int]:
    """Trains undisturbed into ``folder``; returns the seconds it took and how often it saved."""
    saves, save = [0], utils.checkpoint.torch.save

    def counted(*given) -> None:
        saves[0] += 1
        save(*given)

    torch.save, started = counted, time.monotonic()
    try:
        train.main(train.parse_arguments([*arguments, "--project", str(folder.parent), "--name", folder.name]))
    finally:
        torch.save = save
    return time.monotonic() - started, saves[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="in all, shared by the methods")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    limit_threads()
    rng, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        common = make_place(place)
        for number, method in enumerate(options.methods):
            arguments = [*common, "--quant", method, "--gabfusion", "feedback", "--ada"]
            arguments += ["--float-epochs", "3", "--epochs", "3"]
            seconds, saves = count_saves(arguments, place / f"{method}-whole")
            wanted = options.kills // len(options.methods) + (number < options.kills % len(options.methods))
            struck = runs = 0
            differing: set[str] = set()
            while struck < wanted:
                runs += 1
                folder = place / f"{method}-{runs}"
                kills = [random_kill(rng, seconds, saves) for _ in range(wanted - struck)]
                struck += train_with_kills(arguments, folder, kills)
                differing |= set(differences(place / f"{method}-whole", folder))
            rows.append(f"| {method} | {struck} | {runs} | {len(differing)} {', '.join(sorted(differing)[:3])} |")
            LOGGER.info(rows[-1])
    command = f"python benchmarks/interruptions.py --kills {options.kills} --seed {options.seed}"
    header = ["| quantizer | kills | runs that ended | checkpoint entries that differ |", "|---|--:|--:|--:|"]
    note = f"{machine()}, {date.today()}: `{command}`"
    write_section("interruptions", ["## Killed and resumed", "", note, "", *header, *rows])


if __name__ == "__main__":
    main()
