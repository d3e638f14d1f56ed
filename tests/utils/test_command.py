"""Mistyped flags: one line, what was meant, exit code 2."""

import errno
import os

import pytest

import detect
import export
import train
import val
from utils.command import CommandParser, exit_code

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


def test_help_fits_a_terminal_and_says_short_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = CommandParser("tool", description="One line.\n\n    tool --size 3      (an example stays as it is)")
    parser.add_argument("--size", "--img", type=int, default=640, help="in pixels")
    parser.add_argument("--share", type=float, default=0.5, help="of all images, from 0 to 1, of those that are there")
    parser.add_argument("--place", default="/a/path/that/is/long/enough/to/be/in/the/way", help="where results go")
    parser.add_argument("--mode", choices=("a", "b"), default="a", help="a or b; default: a")
    parser.add_argument("--plain", action="store_true", help="without more")
    parser.add_argument("--needed", required=True, help="always given")
    parser.add_argument("source", help="a file")
    text = parser.format_help()
    assert text.startswith(
        "usage: tool --needed NEEDED source [flags]\n\nOne line.\n\n    tool --size 3      (an example"
    )
    for line in (
        "--size, --img N",
        "in pixels (640)",
        "--share X",
        "where results go\n",
        "default: a\n",
        "without more\n",
    ):
        assert line in text
    assert "/a/path" not in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("command", PARSERS)
def test_every_flag_says_what_it_is(command, capsys):
    with pytest.raises(SystemExit) as end:
        PARSERS[command](["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.startswith("usage: ") and "[flags]" in shown.splitlines()[0]
    assert "``" not in shown
