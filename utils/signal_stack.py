"""The stack on which a thread's signal handlers run stays what it was, whatever a library does."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """``stack_t`` of signal.h."""

    _fields_ = (("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Puts this thread's alternate signal stack back when the block ends; does nothing but on Linux.

    OpenVINO (2026.4) installs one of its own for each model that it compiles, and with the model frees it and installs
    the one before. Of two models the first of which goes first, the second leaves a stack behind that is freed: the
    next signal with a handler (Ctrl-C, or a loader process that ends) is a segmentation fault.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    library, before = ctypes.CDLL(None), _Stack()
    known = library.sigaltstack(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known:
            library.sigaltstack(ctypes.byref(before), None)
