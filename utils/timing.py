"""Wall-clock time of work on a device."""

import time

import torch


class Stopwatch:
    """Sums the seconds of the ``with`` blocks around it, waiting for the device at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_exception: object) -> None:
        self.total += self._now() - self._start
