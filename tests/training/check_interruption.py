"""Trainings that are killed or interrupted: their checkpoints stay whole, and they end as if nothing had been."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import train
from training.trainer import Trainer
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes")


@pytest.fixture(scope="module")
def subject():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    try:
        yield importlib.import_module("interruptions")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def common(subject, place):
    return subject.make_place(place)


@pytest.fixture(scope="module")
def both(common, subject, place):
    """The arguments of a run of both phases with a controller and a teacher; it took so long and saved so often."""
    arguments = [*common, "--quant", "lsq", "--gabfusion", "feedback", "--ada", "--float-epochs", "2", "--epochs", "3"]
    return arguments, *subject.count_saves(arguments, place / "lsq")


def test_killed_in_both_phases_and_while_saving(subject, both, place):
    arguments, _, _ = both
    kills = [
        subject.Kill(seconds=0.05, file=place / "killed" / "weights" / "float_epoch0.pt"),
        subject.Kill(stage="half written", number=3),
        subject.Kill(stage="renamed", number=2),
        subject.Kill(stage="all written", number=4),
    ]
    assert subject.train_with_kills(arguments, place / "killed", kills) == 4
    assert subject.differences(place / "lsq", place / "killed") == []
    weights = {file.name for file in (place / "killed" / "weights").iterdir()}
    assert {"last.pt", "best.pt", "float_last.pt", "epoch2.pt"} <= weights
    assert not [name for name in weights if name.endswith(".tmp")]  # what was half written is cleared away


@pytest.mark.parametrize("method", ["pact", "dsq", "n2uq"])
def test_every_quantizer_goes_on_where_it_was(method, subject, both, common, place):
    start = ["--weights", str(place / "lsq" / "weights" / "float_best.pt"), "--quant", method, "--epochs", "2"]
    arguments = [*common, *start, "--gabfusion"]
    subject.count_saves(arguments, place / method)
    kills = [
        subject.Kill(stage="nothing written", number=4)
    ]  # after the start, and best and epoch0 of epoch 0: before last
    assert subject.train_with_kills(arguments, place / f"{method}-killed", kills) == 1
    assert subject.differences(place / method, place / f"{method}-killed") == []


def test_a_difference_is_seen(subject, both, place):
    """The comparison above is no mere formality."""
    file = place / "lsq" / "weights" / "epoch1.pt"
    one, other = load_checkpoint(file), load_checkpoint(file)
    assert subject._same(one, other)
    other["optimizer"]["state"][0]["exp_avg"].view(-1)[0] += 1e-7
    assert not subject._same(one, other)


@pytest.mark.parametrize("number", [5, 6, 7])
def test_killed_around_the_fine_tuning(number, subject, both, common, place, tmp_path):
    """``fold: finetune`` has its own epoch and optimizer behind the last epoch."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"gabfusion": {"fold": "finetune"}, "distillation": False}))
    arguments = [*common, "--weights", str(place / "lsq" / "weights" / "float_best.pt"), "--quant", "lsq"]
    arguments += ["--recipe", str(recipe), "--epochs", "1"]
    whole = place / "finetuned"
    if not whole.exists():
        assert subject.count_saves(arguments, whole)[1] == 8  # start; epoch0, last; best, epoch1, last; best, last
    subject.train_with_kills(arguments, tmp_path / "killed", [subject.Kill(stage="nothing written", number=number)])
    assert subject.differences(whole, tmp_path / "killed") == []


def test_stopped_early_and_killed_before_the_end(subject, both, common, place, tmp_path):
    """No epoch is trained behind the one that patience ended at."""
    start = ["--weights", str(place / "lsq" / "weights" / "float_best.pt"), "--quant", "lsq", "--epochs", "6"]
    arguments = [*common, *start, "--patience", "1"]
    _, saves = subject.count_saves(arguments, tmp_path / "whole")
    subject.train_with_kills(arguments, tmp_path / "k", [subject.Kill(stage="nothing written", number=saves - 1)])
    assert subject.differences(tmp_path / "whole", tmp_path / "k") == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interruption_says_how_to_go_on(sent, common, tmp_path):
    """With loader processes, which must neither stay behind nor report their own end."""
    arguments = [*common, "--epochs", "500", "--project", str(tmp_path), "--name", "run", "--workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
        # What runs in a shell's background ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    last = tmp_path / "run" / "weights" / "last.pt"
    try:
        end = time.monotonic() + 300
        while not (tmp_path / "run" / "weights" / "epoch1.pt").exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(job.pid, sent) if sent == signal.SIGINT else job.send_signal(sent)
        output, _ = job.communicate(timeout=120)
    finally:
        if job.poll() is None:
            job.kill()
    assert job.returncode == 130, output
    assert "Traceback" not in output
    assert f"continue with: python train.py --resume {last}" in output
    assert load_checkpoint(last)["epoch"] >= 0
    with pytest.raises(ProcessLookupError):
        os.killpg(job.pid, 0)  # nobody of the group is left


def test_interrupted_before_anything_was_saved(common, tmp_path, monkeypatch):
    def stop(*_arguments, **_keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "__init__", stop)
    with pytest.raises(KeyboardInterrupt, match="nothing to resume"):
        train.main(train.parse_arguments([*common, "--epochs", "1", "--project", str(tmp_path), "--name", "run"]))


def test_a_cut_table_does_not_keep_a_run_from_resuming(subject, common, place, tmp_path):
    """Killed while it wrote a row of results.csv."""
    arguments = [*common, "--epochs", "2", "--project", str(tmp_path), "--name", "run"]
    kill = subject.Kill(stage="nothing written", number=5)
    assert subject.train_in_child(arguments, kill, tmp_path / "log") == "killed"
    table = tmp_path / "run" / "results.csv"
    table.write_text(table.read_text()[:-250] + "\n        1")
    resume = ["--resume", str(tmp_path / "run" / "weights" / "last.pt")]
    assert subject.train_in_child(resume, subject.Kill(), tmp_path / "log") == "finished"
    assert [row.split(",")[0].strip() for row in table.read_text().splitlines()] == ["epoch", "0", "1"]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match="damaged or not a PyTorch file"):
        train.main(train.parse_arguments(["--resume", str(tmp_path / "last.pt")]))
