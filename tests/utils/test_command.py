"""Mistyped flags: one line, what was meant, exit code 2."""

import errno
import os

import pytest

import detect
import export
import train
import val
from utils.command import exit_code

PARSERS = {
    "train": train.parse_arguments,
    "val": val.parse_options,
    "detect": detect.parse_options,
    "export": export.parse_options,
}


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", ["--quants", "lsq"], "unknown flag --quants, did you mean --quant?"),
        (
            "train",
            ["--epoch-s=3", "--bitz", "4"],
            "unknown flag --epoch-s, did you mean --epochs?; unknown flag --bitz",
        ),
        ("val", ["--save-jsn"], "did you mean --save-json?"),
        ("detect", ["--zzzzzz"], "unknown flag --zzzzzz."),
        ("export", ["--keras"], "--keras is not here: TensorFlow files are made from the ONNX file (onnx2tf)"),
        ("export", ["--batch-size", "two"], "--batch-size: 'two' is no whole number"),
    ],
)
def test_mistakes_are_one_line(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        PARSERS[command](arguments)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and message in printed
    assert len(printed.splitlines()) == 1 and printed.rstrip().endswith("--help")


def test_flags_that_are_elsewhere_are_not_here_too():
    for flag in export.REPLACED:
        with pytest.raises(SystemExit):
            export.parse_options([flag])


def write(place: str) -> None:
    with open(place, "w") as stream:
        stream.write("a result")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the disk that is always full is Linux'")
def test_a_full_disk_is_one_line_and_other_mistakes_keep_their_traceback(capsys, tmp_path):
    assert exit_code("val.py", lambda: write("/dev/full")) == 1
    said = capsys.readouterr().out.strip().splitlines()
    assert said == [
        "val.py: a result could not be written (No space left on device): make room there, or choose another place"
    ]
    with pytest.raises(OSError) as error:
        exit_code("val.py", lambda: write(str(tmp_path / "not" / "there")))
    assert error.value.errno == errno.ENOENT
