"""Files of torch.save, read without executing anything: weights of feature extractors, and cached statistics.

A new one is a zip file with a pickle and the values of each storage; an old one is five pickles, then those values. Both refer
to a storage by a persistent id. `torch.load(weights_only=True)` is not used: a deep enough pickle overflows its C stack.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ect.files.foreign import what_it_is
from ect.files.pickled_tensors import (
    ARRAYS,
    NUMBERS,
    STORAGE_TYPES,
    TENSORS,
    TORCH_MAGIC,
    Array,
    StorageId,
    StoredValues,
    member,
    storage_id,
    view,
)
from ect.files.safe_pickle import Budget, Built, Dictionary, Machine, UnsafePickle, describe, show

MAX_BYTES = 4 << 30
MAX_ELEMENTS = 1 << 29
"""All tensors together have at most so many; DINOv2's ViT-L has 304 million. The file's bytes do not bound them: torch.save
keeps what `expand` made as it is."""
_OLD_VERSION = 1001


class _Parameter(Built):
    """A torch.nn.Parameter as torch 0.1 wrote it: its state is (values, gradient, hooks, requires_grad, volatile)."""


_TABLE: dict[str, Callable[..., object] | None] = {
    **TENSORS,
    **NUMBERS,
    **ARRAYS,
    **STORAGE_TYPES,
    "torch.nn.parameter.Parameter": lambda *_: _Parameter(),
    "collections.OrderedDict": lambda: Dictionary(),
}


def read(path: Path) -> Any:
    """Return what torch.save wrote: tensors and numpy arrays, by name or alone, on the CPU.

    Raises UnsafePickle, naming file and culprit, where it is hostile, damaged, or something else.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UnsafePickle(f"larger than {MAX_BYTES} bytes")
        with path.open("rb") as file:
            head = file.read(64)
        value = _zipped(path) if head.startswith(b"PK\x03\x04") else _old(path.read_bytes())
        return {name: _plain(item) for name, item in value.items()} if isinstance(value, dict) else _plain(value)
    except UnsafePickle as error:
        raise UnsafePickle(f"{path}: {error}") from error.__cause__
    except Exception as error:  # whatever a damaged file trips over, callers see one kind of error
        cause = what_it_is(head) or f"truncated, damaged or no file of torch.save ({show(str(error))})"
        raise UnsafePickle(f"{path}: {cause}") from error


def _plain(value: Any) -> Any:
    if type(value) is _Parameter:
        value = value.state[0] if type(value.state) is tuple and value.state else value
        if not isinstance(value, Tensor):
            raise UnsafePickle("a parameter without values")
    if type(value) is Array:
        value = value.values()
        if value is None:
            raise UnsafePickle("an array whose shape and bytes do not agree")
        value = value.copy()  # what was read is immutable
    return value


def _table() -> dict[str, Callable[..., object] | None]:
    """Return the table of one file."""
    room = MAX_ELEMENTS

    def tensor(
        storage: Any, offset: Any, size: Any, stride: Any, _grad: Any = 0, hooks: Any = None, meta: Any = None
    ) -> Tensor:
        nonlocal room
        made = view(storage, offset, size, stride, hooks, meta)
        room -= made.numel()
        if room < 0:
            raise UnsafePickle("tensors of more elements than any known network has")
        return made

    return {**_TABLE, "torch._utils._rebuild_tensor_v2": tensor, "torch._utils._rebuild_tensor": tensor}


def _zipped(path: Path) -> Any:
    storages: dict[StorageId, StoredValues] = {}
    table, room = _table(), path.stat().st_size  # two names may stand for the same bytes
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]

        def storage(pid: Any) -> StoredValues:
            nonlocal room
            found = storage_id(pid)
            if found not in storages:
                room -= found.nbytes
                if room < 0:
                    raise UnsafePickle("storages of more bytes than the file has")
                raw = member(archive, f"{name.removesuffix('data.pkl')}data/{found.key}")
                storages[found] = StoredValues(_values(raw, found))
            return storages[found]

        pickled = member(archive, name)
        return Machine(table, Budget(work=_work(pickled)), storage, kind="weight file").run(io.BytesIO(pickled))


def _old(data: bytes) -> Any:
    file, budget, table = io.BytesIO(data), Budget(work=_work(data)), _table()
    storages: dict[str, tuple[StorageId, StoredValues]] = {}
    room = len(data)

    def storage(pid: Any) -> StoredValues:
        nonlocal room
        found = storage_id(pid)
        if found.key not in storages:
            room -= found.nbytes
            if room < 0:
                raise UnsafePickle("storages of more bytes than the file has")
            storages[found.key] = (
                found,
                StoredValues(torch.zeros(found.nbytes // found.dtype.itemsize, dtype=found.dtype)),
            )
        return storages[found.key][1]

    def value() -> Any:
        return Machine(table, budget, storage, kind="weight file").run(file)

    if (magic := value()) != TORCH_MAGIC or value() != _OLD_VERSION:
        raise UnsafePickle(f"holds {describe(magic)}; torch.save has not written it")
    _system, root, keys = value(), value(), value()
    for key in keys:
        found, stored = storages[key]
        if int.from_bytes(file.read(8), "little") * found.dtype.itemsize != found.nbytes:
            raise UnsafePickle("two different sizes of a storage")
        stored.flat.copy_(_values(file.read(found.nbytes), found))
    if len(keys) != len(storages):
        raise UnsafePickle("storages without values")
    return root


def _work(data: bytes) -> int:
    return 2 * len(data) + (1 << 20)


def _values(raw: bytes, found: StorageId) -> Tensor:
    if len(raw) != found.nbytes:
        raise UnsafePickle(f"a storage of {found.nbytes} bytes, of which {len(raw)} are there")
    return torch.frombuffer(bytearray(raw), dtype=found.dtype) if raw else torch.empty(0, dtype=found.dtype)
