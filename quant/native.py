"""Builds and calls ``native.cpp``, the quantizers' arithmetic for a CPU. Imports only torch.

A C++ compiler (``$CXX``, c++, g++ or clang++) makes a shared library of it in a second or two; it is kept in
``$XDG_CACHE_HOME/yolov5-qat`` (``~/.cache`` by default), one for each source, compiler and processor. Threads are those
of torch: the library calls the OpenMP runtime that torch has loaded. A second runtime's threads would spin on the
same cores.

Functions take dense tensors of one layout, float32 or bfloat16, and give what the formulas of the same name in
``quant.kernels`` give, with a step for each row of dimension 0 if there are several. Sums do not depend on the number
of threads. With ``factors`` (C, 1, 1), one for each channel of a four-dimensional tensor, ``x`` times them takes the
place of ``x``, and the gradient of ``x`` is that of the product times them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
CHUNK = 16384  # as in native.cpp
# No fast-math: NaN must stay visible, and codes must fall as those of torch. The two switches allow vector code where C
# would keep track of floating-point exceptions.
FLAGS = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-ffp-contract=off"]
PERIOD = 1024  # factors of channels that lie next to each other are repeated up to here
SLICES = 8  # tables of sums over cells, added up in the same order whatever the number of threads

_library: ctypes.CDLL | None = None


class NativeError(RuntimeError):
    """Why there is no library here."""


def usable(x: Tensor) -> bool:
    """Whether the library is loaded and takes ``x``, which must have memory of its own: tracers' tensors have none."""
    if _library is None or torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return x.dtype in TYPES and x.device.type == "cpu" and x.numel() > 0


def load() -> None:
    """Builds the library if it is not in the cache, and loads it.

    Raises:
        NativeError: no compiler, or it or the library does not work here.
    """
    global _library
    if _library is not None:
        return
    compiler = _compiler()
    runtime = _openmp_runtime()
    flags = FLAGS + (["-fopenmp"] if runtime else [])
    name = f"native-{_key(compiler, flags)}.so"
    try:
        if runtime:
            ctypes.CDLL(runtime, ctypes.RTLD_GLOBAL)  # loaded already; its names become visible to the library
        try:
            _library = _load_from(_cache_folder(), name, compiler, flags)
        except OSError:  # no home, or one that cannot be written to or run from: built for this process alone
            with tempfile.TemporaryDirectory(prefix="yolov5-qat-") as folder:
                _library = _load_from(Path(folder), name, compiler, flags)
    except OSError as error:
        raise NativeError(str(error)) from error


def _load_from(folder: Path, name: str, compiler: str, flags: list[str]) -> ctypes.CDLL:
    """The library in ``folder``, built if it is missing or not the one that was written there."""
    file = folder / name
    if not _is_whole(file):
        _build(compiler, flags, file)
    return ctypes.CDLL(str(file))


def _is_whole(file: Path) -> bool:
    """Whether a library has the hash that was noted when it was built: code that is cut off ends the process."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() == file.with_suffix(".sha256").read_text()
    except OSError:
        return False


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise NativeError("no C++ compiler found (looked for $CXX, c++, g++ and clang++)")


def _openmp_runtime() -> str | None:
    """The OpenMP library that torch has loaded into this process, where Linux can tell it."""
    maps = Path("/proc/self/maps")
    found = (
        re.search(r"\s(/\S*/lib(?:gomp|iomp5|omp)\b\S*)$", maps.read_text(), re.MULTILINE) if maps.exists() else None
    )
    return found[1] if found else None


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yolov5-qat"


def _key(compiler: str, flags: list[str]) -> str:
    """Changes with everything that the library depends on; code for one processor may not run on another."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    parts = [SOURCE.read_text(encoding="utf-8"), " ".join(flags), version, features, platform.machine()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _build(compiler: str, flags: list[str], file: Path) -> None:
    """Compiles to an object and links without the compiler's own OpenMP; the finished file appears at once or never.

    Two processes that build at once write the same code; should compilers differ in it, the later start builds again.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        object_file, library = Path(folder) / "native.o", Path(folder) / "native.so"
        compiling = [flag for flag in flags if flag != "-shared"]
        for command in (
            [compiler, *compiling, "-c", str(SOURCE), "-o", str(object_file)],
            [compiler, "-shared", str(object_file), "-o", str(library)],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                raise NativeError(f"{' '.join(command[:1])}: {lines[0]}")
        digest = Path(folder) / "native.sha256"
        digest.write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        os.replace(digest, file.with_suffix(".sha256"))
        os.replace(library, file)


# --- calls ------------------------------------------------------------------------------------------------------------


def _call(name: str, x: Tensor, *arguments) -> None:
    threads = torch.get_num_threads() if x.numel() > 2 * CHUNK else 1
    getattr(_library, f"{name}_{TYPES[x.dtype]}")(*arguments, ctypes.c_int(threads))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _floats(*values: Tensor | float) -> list[ctypes.c_float]:
    return [ctypes.c_float(value) for value in values]  # a tensor of one value is a number too


def _rows(x: Tensor, step: Tensor | float, factors: Tensor | None) -> tuple[tuple, list]:
    """The tensors behind the arguments rows, columns, factors and steps, and these; float32 steps come first."""
    steps = step if isinstance(step, Tensor) else torch.full((1,), step)
    steps = steps.detach().float().reshape(-1).contiguous()
    rows = steps.numel()
    kept, arguments = _factors(x, factors)
    size = [ctypes.c_int64(rows), ctypes.c_int64(x.numel() // rows)]
    return (steps, kept), [*size, *arguments, _pointer(steps)]


def _factors(x: Tensor, factors: Tensor | None) -> tuple[Tensor | None, list]:
    """The factors as the library takes them, and the arguments values, channels and values a channel in a row."""
    if factors is None:
        return None, [ctypes.c_void_p(None), ctypes.c_int64(1), ctypes.c_int64(1)]
    channels, inner = x.shape[1], x[0, 0].numel() if x.is_contiguous() else 1
    values = factors.detach().reshape(-1).to(x.dtype).float()  # rounded as a product of tensors would do
    if inner == 1:  # a short inner loop would cost more than the product
        values = values.repeat(-(-PERIOD // channels))
    return values, [_pointer(values), ctypes.c_int64(values.numel() if inner == 1 else channels), ctypes.c_int64(inner)]


def staircase(
    x: Tensor, step: Tensor | float, low: Tensor | float, high: Tensor | float, factors: Tensor | None = None
) -> tuple[Tensor]:
    """``step * clip(round(x / step), low, high)``, in x's type."""
    y = torch.empty_like(x)
    if low != low or high != high:  # a limit that is NaN would clip nothing
        step = torch.nan
    _kept, arguments = _rows(x, step, factors)  # the name keeps the memory that the arguments point to
    _call("staircase", x, _pointer(x), _pointer(y), *arguments, *_floats(low, high))
    return (y,)


def _with_sums(
    name: str,
    count: int,
    gradient: Tensor,
    x: Tensor,
    step: Tensor | float,
    *values: Tensor | float,
    factors: Tensor | None,
) -> tuple[Tensor, ...]:
    """A backward function: the gradient of ``x``, and ``count`` sums, (1,) each or one for each step."""
    out = torch.empty_like(x)
    (steps, _kept), arguments = _rows(x, step, factors)
    columns = x.numel() // steps.numel()
    sums = torch.empty(steps.numel(), -(-columns // CHUNK), count, dtype=torch.float64)
    _call(name, x, _pointer(gradient), _pointer(x), _pointer(out), *arguments, *_floats(*values), _pointer(sums))
    return out, *sums.sum(1).float().unbind(1)


def uniform_backward(
    gradient: Tensor,
    x: Tensor,
    step: Tensor | float,
    low: Tensor | float,
    high: Tensor | float,
    factors: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """LSQ's gradients: of x; the sum of dL/ds times s; the sum of the gradient outside."""
    return _with_sums("uniform_backward", 2, gradient, x, step, low, high, factors=factors)


def clipped_backward(
    gradient: Tensor, x: Tensor, low: Tensor, high: Tensor, factors: Tensor | None = None
) -> tuple[Tensor, ...]:
    """PACT's gradients: of x; the sums of the gradient at and above ``high`` and at and below ``low`` (values)."""
    return _with_sums("clipped_backward", 2, gradient, x, 1.0, low, high, factors=factors)


def soft_backward(
    gradient: Tensor,
    x: Tensor,
    step: Tensor | float,
    low: Tensor | float,
    high: Tensor | float,
    k: Tensor | float,
    scale: Tensor,
    factors: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """DSQ's gradients: of x, and the sums that ``quant.dsq`` calls moved, outside, slope and bend."""
    return _with_sums("soft_backward", 4, gradient, x, step, low, high, k, *scale.tolist(), factors=factors)


def cell_values(
    x: Tensor, width: Tensor, offset: Tensor, table: Tensor, factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """N2UQ forward: the values that ``table`` has for the cells of ``x``, and their numbers.

    Args:
        width, offset: of the cells, (1,); the number of a value's cell is ``floor(x / width + offset)`` within 1 and
            the last cell, and 0 for NaN.
        table: (cells + 1,) float32.

    Returns:
        y as ``x``, and the numbers (n,) int16 in memory order.
    """
    y, numbers = torch.empty_like(x), torch.empty(x.numel(), dtype=torch.int16)
    values = _floats(1 / width.item(), offset, len(table) - 1)
    _kept, arguments = _factors(x, factors)  # the name keeps the memory that the arguments point to
    arguments = [_pointer(x), _pointer(y), _pointer(numbers), ctypes.c_int64(x.numel()), *arguments]
    _call("cell_values", x, *arguments, *values, _pointer(table))
    return y, numbers


def cell_backward(
    gradient: Tensor, numbers: Tensor, slopes: Tensor, factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """N2UQ backward: ``gradient`` times the slope of each value's cell, and the sums of ``gradient`` over each cell.

    Args:
        numbers: of the cells, (n,) int16.
        slopes: (cells + 1,) float32.
    """
    out = torch.empty_like(gradient)
    slices = min(SLICES, -(-gradient.numel() // CHUNK))
    sums = torch.zeros(2 * slices, len(slopes))
    count, cells = ctypes.c_int64(gradient.numel()), ctypes.c_int64(len(slopes))
    _kept, arguments = _factors(gradient, factors)
    arguments = [_pointer(gradient), _pointer(numbers), _pointer(out), count, *arguments]
    _call("cell_backward", gradient, *arguments, _pointer(slopes), _pointer(sums), cells, ctypes.c_int(slices))
    return out, sums.sum(0)
