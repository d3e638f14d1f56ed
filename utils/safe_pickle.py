"""Reads pickled PyTorch files without unpickling: a small interpreter that builds descriptions and calls nothing.

Python's unpickler imports what a file names and calls it. This one has no import and no call at all: a class becomes
an inert ``PickledObject`` that holds the attributes found in the file, a tensor becomes a ``PickledTensor`` that knows
where its bytes are, and a name outside a short list is refused. What it cannot describe it refuses, too.
"""

import io
import math
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from utils.errors import UserError

LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
MARK = object()

STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}

_IDENTIFIER = r"[A-Za-z_]\w*"
# Modules whose classes become inert objects. The class name must look like a class: functions such as
# torch.nn.init's or dotted attribute paths never match.
_INERT_MODULES = re.compile(
    rf"(models(\.{_IDENTIFIER})*|utils(\.{_IDENTIFIER})*|torch\.nn(\.(modules|parallel)(\.{_IDENTIFIER})*)?)", re.ASCII
)
_CLASS_NAME = re.compile(r"[A-Z][A-Za-z0-9_]*", re.ASCII)
# Values of training options that may lie beside the model; kept as inert objects, never rebuilt.
_INERT_NAMES = {
    "argparse.Namespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "torch.device",
    "torch.Size",
}


@dataclass(frozen=True)
class Global:
    """A name the file refers to. Nothing is imported for it."""

    name: str


@dataclass(eq=False)
class PickledObject:
    """An instance of the class ``name``, reduced to the arguments and attributes the file holds."""

    name: str
    arguments: tuple = ()
    state: dict = field(default_factory=dict)


@dataclass(eq=False)
class PickledStorage:
    """A block of numbers: their type, the key of the record that holds them, and how many."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(eq=False)
class PickledTensor:
    """A tensor as the file describes it: a window into a storage."""

    storage: PickledStorage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class RefusedError(Exception):
    """The file wants something that only running code could give."""


class _Interpreter:
    """Executes the opcodes of one pickle on descriptions."""

    def __init__(self) -> None:
        self.stack: list = []
        self.memo: dict[int, object] = {}

    def run(self, stream: io.BufferedIOBase | bytes) -> object:
        """Returns the object of the next pickle in ``stream``. Raises RefusedError."""
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _CONSTANTS:
                self.stack.append(argument)
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            else:
                raise RefusedError(f"it uses the pickle instruction {name}")
        raise RefusedError("it ends in the middle")

    def pop_to_mark(self) -> list:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise RefusedError("it is damaged: a mark is missing")

    def top(self, kind: type) -> object:
        if not isinstance(self.stack[-1], kind):
            raise RefusedError(f"it fills a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]

    def set_items(self, items: list) -> None:
        target = self.top(dict)
        target.update(zip(items[0::2], items[1::2], strict=True))

    def name_global(self, module: str, name: str) -> None:
        self.stack.append(Global(checked_global(module, name)))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise RefusedError("it names a class by something that is not text")
        self.name_global(module, name)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise RefusedError("it calls something that is not a name")
        self.stack.append(_rebuilt(function.name, arguments))

    def new_object(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if not isinstance(kind, Global) or not isinstance(arguments, tuple) or not is_inert_class(kind.name):
            raise RefusedError(f"it instantiates {getattr(kind, 'name', 'something that is not a class')}")
        self.stack.append(PickledObject(kind.name, arguments))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, OrderedDict):
            return  # attributes of a state_dict (its _metadata) are not needed
        if not isinstance(target, PickledObject):
            raise RefusedError(f"it sets attributes of a {type(target).__name__}")
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        for part in parts:
            if isinstance(part, dict):
                target.state.update(part)
        # Any other state belongs to an array or a dtype, whose value is not needed.

    def persistent_reference(self) -> None:
        """A storage; or, before PyTorch 1.6, a class together with its source text, which is not looked at."""
        reference = self.stack.pop()
        if not isinstance(reference, tuple) or len(reference) < 2 or not isinstance(reference[1], Global):
            raise RefusedError("it refers to a storage in an unknown way")
        kind, named = reference[0], reference[1]
        if kind == "module" and is_inert_class(named.name):
            self.stack.append(named)
            return
        storage_type = named.name.removeprefix("torch.")
        well_formed = (
            kind == "storage"
            and storage_type in STORAGE_TYPES
            and 5 <= len(reference) <= 6
            and isinstance(reference[2], str)
            and isinstance(reference[4], int)
            and reference[5:] in ((), (None,))  # a window into another storage has not been written since 2017
        )
        if not well_formed:
            raise RefusedError("it refers to a storage in an unknown way")
        self.stack.append(PickledStorage(STORAGE_TYPES[storage_type], reference[2], reference[4]))

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise RefusedError("it is damaged: it recalls what it never stored")
        self.stack.append(self.memo[index])


# Instructions that push the value that stands beside them.
_CONSTANTS = {
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_ACTIONS: dict[str, Callable[[_Interpreter, object], object]] = {
    "PROTO": lambda vm, _: None,
    "FRAME": lambda vm, _: None,
    "MARK": lambda vm, _: vm.stack.append(MARK),
    "POP": lambda vm, _: vm.stack.pop(),
    "POP_MARK": lambda vm, _: vm.pop_to_mark(),
    "DUP": lambda vm, _: vm.stack.append(vm.stack[-1]),
    "NONE": lambda vm, _: vm.stack.append(None),
    "NEWTRUE": lambda vm, _: vm.stack.append(True),
    "NEWFALSE": lambda vm, _: vm.stack.append(False),
    "EMPTY_TUPLE": lambda vm, _: vm.stack.append(()),
    "EMPTY_LIST": lambda vm, _: vm.stack.append([]),
    "EMPTY_DICT": lambda vm, _: vm.stack.append({}),
    "EMPTY_SET": lambda vm, _: vm.stack.append(set()),
    "TUPLE": lambda vm, _: vm.stack.append(tuple(vm.pop_to_mark())),
    "TUPLE1": lambda vm, _: vm.stack.append((vm.stack.pop(),)),
    "TUPLE2": lambda vm, _: vm.stack.append(tuple(reversed((vm.stack.pop(), vm.stack.pop())))),
    "TUPLE3": lambda vm, _: vm.stack.append(tuple(reversed((vm.stack.pop(), vm.stack.pop(), vm.stack.pop())))),
    "LIST": lambda vm, _: vm.stack.append(vm.pop_to_mark()),
    "DICT": lambda vm, _: (items := vm.pop_to_mark(), vm.stack.append({}), vm.set_items(items)),
    "FROZENSET": lambda vm, _: vm.stack.append(frozenset(vm.pop_to_mark())),
    "APPEND": lambda vm, _: (item := vm.stack.pop(), vm.top(list).append(item)),
    "APPENDS": lambda vm, _: (items := vm.pop_to_mark(), vm.top(list).extend(items)),
    "SETITEM": lambda vm, _: (value := vm.stack.pop(), key := vm.stack.pop(), vm.set_items([key, value])),
    "SETITEMS": lambda vm, _: vm.set_items(vm.pop_to_mark()),
    "ADDITEMS": lambda vm, _: (items := vm.pop_to_mark(), vm.top(set).update(items)),
    "PUT": lambda vm, index: vm.memo.__setitem__(index, vm.stack[-1]),
    "BINPUT": lambda vm, index: vm.memo.__setitem__(index, vm.stack[-1]),
    "LONG_BINPUT": lambda vm, index: vm.memo.__setitem__(index, vm.stack[-1]),
    "MEMOIZE": lambda vm, _: vm.memo.__setitem__(len(vm.memo), vm.stack[-1]),
    "GET": lambda vm, index: vm.recall(index),
    "BINGET": lambda vm, index: vm.recall(index),
    "LONG_BINGET": lambda vm, index: vm.recall(index),
    "GLOBAL": lambda vm, text: vm.name_global(*text.split(" ", 1)),
    "STACK_GLOBAL": lambda vm, _: vm.stack_global(),
    "REDUCE": lambda vm, _: vm.reduce(),
    "NEWOBJ": lambda vm, _: vm.new_object(),
    "BUILD": lambda vm, _: vm.build(),
    "BINPERSID": lambda vm, _: vm.persistent_reference(),
}


def is_inert_class(name: str) -> bool:
    """True for names such as ``models.common.Conv`` and ``torch.nn.modules.conv.Conv2d``."""
    module, _, kind = name.rpartition(".")
    return bool(_INERT_MODULES.fullmatch(module) and _CLASS_NAME.fullmatch(kind))


def _is_storage_or_dtype(name: str) -> bool:
    module, _, kind = name.rpartition(".")
    return module == "torch" and (kind in STORAGE_TYPES or kind in DTYPES)


def checked_global(module: str, name: str) -> str:
    """Returns ``module.name`` if a file may refer to it. Raises RefusedError, with the reason in the user's words."""
    full = f"{module}.{name}"
    if module.split(".")[0] == "ultralytics":
        raise RefusedError(
            f"it is a checkpoint of the ultralytics package ({full}): an anchor-free model (YOLOv8 or later, or a "
            "YOLOv5 'u' file such as yolov5nu.pt), or another task"
        )
    if module.startswith("models.") and name in ("SegmentationModel", "Segment", "Proto"):
        raise RefusedError(f"it is a segmentation checkpoint ({full}, a '-seg' file)")
    if module.startswith("models.") and name in ("ClassificationModel", "Classify"):
        raise RefusedError(f"it is a classification checkpoint ({full}, a '-cls' file)")
    # A dot inside the name would be a path of attributes, which is how os.system hides behind torch.nn.
    if "." not in name and (
        full in _REBUILDERS or full in _INERT_NAMES or is_inert_class(full) or _is_storage_or_dtype(full)
    ):
        return full
    raise RefusedError(f"it refers to {full!r}, which no YOLOv5 checkpoint needs and which could run code")


def _rebuilt(name: str, arguments: tuple) -> object:
    """Stands for the call ``name(*arguments)``."""
    if name in _REBUILDERS:
        return _REBUILDERS[name](*arguments)
    if name in _INERT_NAMES:
        return PickledObject(name, arguments)
    raise RefusedError(f"it calls {name}")


def _tensor(storage: object, offset: object, size: object, stride: object, *_) -> PickledTensor:
    well_formed = (
        isinstance(storage, PickledStorage)
        and isinstance(offset, int)
        and all(isinstance(part, tuple) and all(isinstance(item, int) for item in part) for part in (size, stride))
        and len(size) == len(stride)
    )
    if not well_formed:
        raise RefusedError("it describes a tensor in an unknown way")
    return PickledTensor(storage, offset, size, stride)


def _parameter(tensor: object, *_) -> object:
    if not isinstance(tensor, PickledTensor):
        raise RefusedError("it describes a parameter that is not a tensor")
    return tensor


def _latin_bytes(text: object, encoding: object = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise RefusedError(f"it encodes text as {encoding!r}")
    return text.encode("latin-1")


def _ordered_dict(items: object = ()) -> OrderedDict:
    return OrderedDict((key, value) for key, value in items)


def _plain_set(items: object = ()) -> set:
    return set(items)


# Every call a file may ask for, with what is done in its place. All of it is written here.
_REBUILDERS: dict[str, Callable] = {
    "collections.OrderedDict": _ordered_dict,
    "__builtin__.set": _plain_set,
    "builtins.set": _plain_set,
    "_codecs.encode": _latin_bytes,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


class TorchFile:
    """A ``torch.save`` file, of the zip format or of the one before PyTorch 1.6.

    ``root`` is the described object; ``tensors`` reads the numbers of described tensors.

    Raises:
        UserError: the file is absent, damaged, no PyTorch file, or wants something that could run code.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._records: dict[str, bytes] = {}
        self._archive_prefix: str | None = None
        if not self.path.is_file():
            raise UserError(
                f"{self.path} {'is a folder' if self.path.is_dir() else 'does not exist'}. Give the path of a .pt file"
            )
        try:
            self.root = self._read_zip() if zipfile.is_zipfile(self.path) else self._read_legacy()
        except RefusedError as reason:
            raise self.refusal(str(reason)) from None
        except (
            ValueError,
            TypeError,
            IndexError,
            KeyError,
            EOFError,
            RecursionError,
            ArithmeticError,
            MemoryError,
        ) as error:
            raise UserError(f"{self.path} is damaged or not a PyTorch file ({error}). Download it again") from None
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
            raise UserError(f"{self.path} could not be read ({error}). Download it again") from None

    def refusal(self, reason: str) -> UserError:
        """The one line a user sees for a file that is not loaded."""
        return UserError(
            f"{self.path} was not loaded, and nothing in it was run: {reason}. "
            "Use an official YOLOv5 detection .pt or a checkpoint of this project"
        )

    def _read_zip(self) -> object:
        with zipfile.ZipFile(self.path) as archive:
            pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise RefusedError("it is a zip file, but not one that PyTorch wrote")
            self._archive_prefix = pickles[0].removesuffix("data.pkl")
            order = f"{self._archive_prefix}byteorder"
            if order in archive.namelist() and self._stored(archive, order).decode("latin-1") != sys.byteorder:
                raise RefusedError("its numbers have the byte order of another machine")
            return _Interpreter().run(self._stored(archive, pickles[0]))

    @staticmethod
    def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
        """One record. PyTorch never compresses; refusing to decompress leaves no room for a zip bomb."""
        if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise RefusedError("its records are compressed, which PyTorch does not do")
        return archive.read(name)

    def _read_legacy(self) -> object:
        """Magic number, version, system, object, storage keys: five pickles; then count and bytes of each storage."""
        with self.path.open("rb") as stream:
            if _Interpreter().run(stream) != LEGACY_MAGIC_NUMBER:
                raise RefusedError("it is not a file that PyTorch wrote")
            for _ in range(2):
                _Interpreter().run(stream)
            root = _Interpreter().run(stream)
            keys = _Interpreter().run(stream)
            widths = {storage.key: storage.dtype.itemsize for storage in _storages(root)}
            for key in keys:
                size = int.from_bytes(stream.read(8), "little") * widths.get(key, 1)
                if size > self.path.stat().st_size:
                    raise RefusedError("it is damaged: a storage is larger than the file")
                self._records[key] = stream.read(size)
            return root

    def tensors(self, descriptions: dict[str, PickledTensor]) -> dict[str, torch.Tensor]:
        """Returns copies of the described tensors, of the types in the file, on the CPU.

        Raises UserError if a storage is missing or a tensor reaches out of it.
        """
        if self._archive_prefix is None:
            return {name: self._tensor(description, self._records) for name, description in descriptions.items()}
        with zipfile.ZipFile(self.path) as archive:
            present = set(archive.namelist())
            result = {}
            for name, description in descriptions.items():
                key = description.storage.key
                record = f"{self._archive_prefix}data/{key}"
                try:
                    records = {key: self._stored(archive, record)} if record in present else {}
                except (RefusedError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
                    raise UserError(f"{self.path} is damaged ({error}). Download it again") from None
                result[name] = self._tensor(description, records)
            return result

    def _tensor(self, description: PickledTensor, records: dict[str, bytes]) -> torch.Tensor:
        storage, size, stride, offset = description.storage, description.size, description.stride, description.offset
        if storage.key not in records:
            raise UserError(f"{self.path} is damaged: storage {storage.key!r} is missing. Download it again")
        available = len(records[storage.key]) // storage.dtype.itemsize
        lowest = min((offset, *size, *stride))
        values = math.prod(size)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        # The first test bounds the memory, since a stride of 0 could blow one number up to any size.
        if values > available or lowest < 0 or (values and last >= available):
            raise UserError(f"{self.path} is damaged: a tensor reaches out of its storage. Download it again")
        if values == 0:
            return torch.empty(size, dtype=storage.dtype)
        flat = torch.frombuffer(bytearray(records[storage.key]), dtype=storage.dtype, count=available)
        return flat.as_strided(size, stride, offset).clone()


def _storages(root: object) -> list[PickledStorage]:
    """Every storage that ``root`` refers to."""
    found, seen, waiting = [], set(), [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, PickledStorage):
            found.append(item)
        elif isinstance(item, PickledTensor):
            waiting.append(item.storage)
        elif isinstance(item, PickledObject):
            waiting += [item.state, item.arguments]
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += item
    return found
