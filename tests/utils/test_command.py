"""Mistyped flags: one line, what was meant, exit code 2."""

import pytest

import detect
import export
import train
import val

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
        ("export", ["--batch-size", "two"], "argument --batch-size: invalid int value: 'two'"),
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
