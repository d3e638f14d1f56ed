"""Exports a small checkpoint in every format, for the tests of what was written."""

import export

SIDE = 32
ENDINGS = (".onnx", "_openvino_model", ".torchscript")


def run_export(path, *flags):
    assert export.main(["--weights", str(path), "--imgsz", str(SIDE), *map(str, flags)]) == 0


def files_of(path):
    return [path.with_name(path.stem + ending) for ending in ENDINGS]
