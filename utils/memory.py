"""How much memory a process can still take, and has taken."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# Of a control group, version 2 and 1: limit, use, and in memory.stat what of the use is given up on demand.
GROUP_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process can still take: of the machine, and of the container or job that it runs in.

    None where the system does not say (it is asked through Linux' files; the arguments are where they lie).
    """
    found = list(_room_in_groups(proc, groups))
    try:
        lines = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    return max(min(found), 0) if found else None


def _room_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """What is left to each control group with a limit that the process is in."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, base = (1, groups / "memory") if controllers else (2, groups)
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            room = _room(group, *GROUP_FILES[version])
            if room is not None:
                yield room
            if group == base:
                break


def _room(group: Path, limit: str, use: str, reclaimable: str) -> int | None:
    try:
        left = int((group / limit).read_text()) - int((group / use).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return left + int(statistics.get(reclaimable, 0))
    except (OSError, ValueError):  # not there, or "max": no limit
        return None


def most_used_memory(device: torch.device) -> int | None:
    """Bytes that this process has taken at most so far: on a GPU as PyTorch counts them, else of the machine's memory.

    Loader processes are not counted. None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
