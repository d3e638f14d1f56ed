"""The console commands, one function each: the scripts of the tree under names that collide with nothing."""


def train() -> int:
    """``yolov5-qat-train``: train.py."""
    from train import command_line

    return command_line()


def val() -> int:
    """``yolov5-qat-val``: val.py."""
    from val import main

    return main()


def detect() -> int:
    """``yolov5-qat-detect``: detect.py."""
    from detect import main

    return main()


def export() -> int:
    """``yolov5-qat-export``: export.py."""
    from export import main

    return main()


def report() -> int:
    """``yolov5-qat-report``: python -m run_report."""
    from run_report.__main__ import main

    return main()


def layers() -> int:
    """``yolov5-qat-layers``: python -m quant.report."""
    from quant.report import main

    return main()


def sensitivity() -> int:
    """``yolov5-qat-sensitivity``: python -m quant.precision."""
    from quant.precision import main

    return main()


def convert() -> int:
    """``yolov5-qat-convert``: python -m utils.convert."""
    from utils.convert.__main__ import main

    return main()
