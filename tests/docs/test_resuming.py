"""The commands of docs/resuming.md, run on a small data set on processors."""

import importlib
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import train
from training.trainer import Trainer
from utils.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "resuming.md").read_text(encoding="utf-8"), re.S)
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Where the commands run, and flags that make them small."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        place = tmp_path_factory.mktemp("docs")
        return place, importlib.import_module("interruptions").make_place(place)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def arguments_of(command: list[str], small) -> list[str]:
    """What comes behind ``train.py``, with the paths of ``small``; a new run is as small as its flags say."""
    place, flags = small
    given = command[command.index("train.py") + 1 :]
    given = [str(place / word) if word.startswith("runs") else word for word in given]
    if "--resume" in given:
        return given
    kept = ["--project", str(place / "runs"), "--name", "night", "--exist-ok"]
    return [*given, *flags, *kept, "--epochs", "2"]


def launch(command: list[str], arguments: list[str], processes: int, port: int) -> subprocess.Popen:
    launcher = command[1 : command.index("train.py")]
    for flag, value in {"--nproc_per_node": processes, "--master_addr": "127.0.0.1", "--master_port": port}.items():
        if flag in launcher:
            launcher[launcher.index(flag) + 1] = str(value)
    if "--nnodes" not in launcher:
        launcher += ["--master_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_all_commands_parse():
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        position = command.index("train.py")
        train.parse_arguments(command[position + 1 :])
        if command[0] == "torchrun":
            get_args_parser().parse_args(command[1:])


def test_one_process(small, monkeypatch):
    """Interrupted in its second epoch, and resumed."""
    finish = Trainer._finish_epoch

    def stop(self, epoch, *rest):
        if epoch == 1:
            raise KeyboardInterrupt
        return finish(self, epoch, *rest)

    monkeypatch.setattr(Trainer, "_finish_epoch", stop)
    with pytest.raises(KeyboardInterrupt, match=r"python train.py --resume \S*runs/night/weights/last.pt"):
        train.main(train.parse_arguments(arguments_of(COMMANDS[0], small)))
    monkeypatch.undo()
    train.main(train.parse_arguments(arguments_of(COMMANDS[1], small)))
    assert load_checkpoint(small[0] / "runs" / "night" / "weights" / "last.pt")["finished"]


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's processes are started as on POSIX systems")
def test_several_machines(small):
    """Two of them, here on one, with one process each."""
    port = free_port()
    jobs = [launch(command, arguments_of(command, small), 1, port) for command in COMMANDS[4:]]
    outputs = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert "Files are in" in outputs[0] and "Files are in" not in outputs[1]
