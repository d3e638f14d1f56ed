"""A pool of threads after which a process may fork."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PATIENCE = 2.0  # seconds; threads that have nothing left to do end within a millisecond


class ThreadPool(ThreadPoolExecutor):
    """``ThreadPoolExecutor`` whose threads have ended, for the operating system too, when its ``with`` block has.

    Python counts a thread as ended before its libraries have cleaned up behind it (38 % of OpenCV's were still there).
    A data loader that forks at that moment copies a lock that nobody will ever open again: its worker then hung in its
    first image.
    """

    def __init__(self, threads: int) -> None:
        self._ids: list[int] = []
        super().__init__(threads, initializer=lambda: self._ids.append(threading.get_native_id()))

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        tasks, deadline = Path("/proc/self/task"), time.monotonic() + PATIENCE  # on other systems nothing forks
        while any((tasks / str(number)).exists() for number in self._ids) and time.monotonic() < deadline:
            time.sleep(0.0005)
