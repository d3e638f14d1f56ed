"""The project's logger: plain lines on standard output, from the first process only.

``LOGGER.debug`` is for what ``--verbose`` adds.
"""

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

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the line; a progress bar that is drawn goes out of its way first."""
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None or not getattr(tqdm, "_instances", None):
            super().emit(record)
            return
        with tqdm.external_write_mode(file=sys.stdout):
            super().emit(record)


def set_verbose(verbose: bool) -> None:
    """Whether the log has details too. Other ranks of a torchrun job speak only when something is wrong."""
    first = int(os.environ.get("RANK", "0")) == 0
    LOGGER.setLevel((logging.DEBUG if verbose else logging.INFO) if first else logging.WARNING)


def _set_up() -> None:
    if LOGGER.handlers:
        return
    handler = _StandardOutput()
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.addHandler(handler)
    set_verbose(False)
    LOGGER.propagate = False


_set_up()
