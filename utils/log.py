"""The project's logger: plain lines on standard output, from the first process only."""

import logging
import os
import sys

LOGGER = logging.getLogger("yolov5_qat")


class _StandardOutput(logging.StreamHandler):
    """A handler that looks ``sys.stdout`` up at each line, so that redirection and pytest's capture see it."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    @property
    def stream(self):
        return sys.stdout

    @stream.setter
    def stream(self, _value) -> None:
        pass


def _set_up() -> None:
    if LOGGER.handlers:
        return
    handler = _StandardOutput()
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.addHandler(handler)
    # Other ranks of a torchrun job speak only when something is wrong.
    LOGGER.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING)
    LOGGER.propagate = False


_set_up()
