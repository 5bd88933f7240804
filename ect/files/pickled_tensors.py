"""Tensors and numpy numbers in a pickle: what the globals that rebuild them answer, with every size checked.

A tensor pickled by pickle.dump keeps its storage as `torch.storage._load_from_bytes(blob)`, where the blob is a file of
torch.save: a pickle again, which the original function loads without restriction.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ect.files.safe_pickle import Budget, Built, Global, Machine, UnsafePickle, describe, sequence, show

TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # first value of what torch.save wrote before its zip format
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
}
STORAGE_TYPES = {f"torch.{name}": None for name in _DTYPES}  # all that a nested file may mention


@dataclass(eq=False)
class NumpyType(Built):
    """A numpy.dtype: its state is a tuple with the byte order at index 1."""

    code: str

    def dtype(self) -> np.dtype[Any]:
        """Return the type, in the byte order of the file."""
        order = sequence(self.state)[1] if self.state else "="
        if order not in ("<", ">", "|", "="):
            raise UnsafePickle("a numpy type without byte order")
        return np.dtype(order + self.code)


@dataclass(frozen=True, eq=False)
class StoredValues:
    """A storage: tensors are views of it."""

    flat: Tensor  # 1-D


def view(storage: Any, offset: Any, size: Any, stride: Any, hooks: Any = None, meta: Any = None) -> Tensor:
    """Return a tensor on a storage, which it must not leave; by strides of 0 it may have more elements than that."""
    size, stride = sequence(size), sequence(stride)
    if type(storage) is not StoredValues or hooks or meta:
        raise UnsafePickle("a tensor without storage, or with hooks or metadata")
    if len(size) != len(stride) or len(size) > 8:
        raise UnsafePickle(f"a tensor with {len(size)} sizes and {len(stride)} strides")
    if any(type(value) is not int or not 0 <= value < 2**63 for value in (offset, *size, *stride)):
        raise UnsafePickle("a tensor whose offset, sizes or strides are no counts")
    numel = storage.flat.numel()
    if 0 not in size and offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= numel:
        raise UnsafePickle(f"a tensor that reaches outside its storage of {numel} elements")
    if math.prod(size) >= 2**48:
        raise UnsafePickle(f"a tensor of {math.prod(size)} elements on a storage of {numel}")
    return storage.flat.as_strided(size, [step if n > 1 else 1 for n, step in zip(size, stride, strict=True)], offset)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any = 0, hooks: Any = None, meta: Any = None
) -> Tensor:
    tensor = view(storage, offset, size, stride, hooks, meta)
    if tensor.numel() > storage.flat.numel():
        raise UnsafePickle(f"a tensor of {tensor.numel()} elements on a storage of {storage.flat.numel()}")
    return tensor


def _parameter(data: Any, _requires_grad: Any = False, hooks: Any = None) -> Tensor:
    if not isinstance(data, Tensor) or hooks:
        raise UnsafePickle("a parameter without tensor, or with hooks")
    return data


def _numpy_type(code: Any, _align: Any = False, _copy: Any = False) -> NumpyType:
    if type(code) is not str or code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        raise UnsafePickle("a numpy type other than a number")
    return NumpyType(code)


class Array(Built):
    """A numpy.ndarray of numbers: its state is (version, shape, type, Fortran order, bytes)."""

    def values(self) -> np.ndarray | None:
        """Return the array, if there are as many bytes as its shape and type need."""
        match self.state:
            case (int(), tuple(shape), NumpyType() as kind, bool() | 0 | 1 as fortran, bytes() | str() as raw):
                dtype = kind.dtype()
                if all(type(n) is int and n >= 0 for n in shape) and math.prod(shape) * dtype.itemsize == len(raw):
                    raw = raw.encode("latin1", "replace") if isinstance(raw, str) else raw  # Python 2 has bytes as text
                    return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")
        return None


def _numpy_scalar(dtype: Any, raw: Any) -> object:
    if type(dtype) is not NumpyType or type(raw) is not bytes:
        raise UnsafePickle("a numpy scalar without type or bytes")
    (value,) = np.frombuffer(raw, dtype.dtype())
    return value.item()


def _latin1(text: str, encoding: Any) -> bytes:
    if encoding != "latin1":  # protocol 2 has no bytes, only this
        raise UnsafePickle("another encoding than latin1")
    return text.encode("latin1")


TENSORS: dict[str, Callable[..., object] | None] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": lambda size=(): tuple(sequence(size)),
    "torch.device": lambda *args: args,
    "torch.float64": None,
    "torch.float32": None,
    "torch.float16": None,
    "torch.bfloat16": None,
    "torch.int64": None,
    "torch.int32": None,
    "torch.uint8": None,
    "torch.bool": None,
}
NUMBERS: dict[str, Callable[..., object] | None] = {
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_scalar,  # numpy 1
    "numpy._core.multiarray.scalar": _numpy_scalar,  # numpy 2
    "_codecs.encode": _latin1,
}
ARRAYS: dict[str, Callable[..., object] | None] = {
    "numpy.core.multiarray._reconstruct": lambda subtype, shape, dtype: Array(),  # numpy 1
    "numpy._core.multiarray._reconstruct": lambda subtype, shape, dtype: Array(),  # numpy 2
    "numpy.ndarray": None,
    "numpy.dtype": _numpy_type,
    "_codecs.encode": _latin1,
}


# --- the nested file that holds a storage ----------------------------------------------------------------------------


@dataclass(frozen=True)
class StorageId:
    """A storage as a file of torch.save refers to it; its values lie elsewhere in the file."""

    dtype: torch.dtype
    key: str
    nbytes: int


def load_storage(blob: Any, budget: Budget) -> StoredValues:
    """Return the storage in a file of torch.save: the old form is five pickles and raw data, the new one a zip file."""
    if type(blob) is not bytes:
        raise UnsafePickle(f"a storage given as {describe(blob)}")

    def value(file: io.BytesIO) -> Any:
        return Machine(STORAGE_TYPES, budget, storage_id).run(file)

    file = io.BytesIO(blob)
    if blob.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(file) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            storage = value(io.BytesIO(member(archive, name)))
            if type(storage) is not StorageId:
                raise UnsafePickle(f"a nested file with {describe(storage)} instead of a storage")
            raw = member(archive, f"{name.removesuffix('.pkl')}/{storage.key}")
    else:
        if [value(file), value(file)] != [TORCH_MAGIC, 1001]:
            raise UnsafePickle("a nested file that torch.save has not written")
        _system, storage, _keys = value(file), value(file), value(file)
        if type(storage) is not StorageId:
            raise UnsafePickle(f"a nested file with {describe(storage)} instead of a storage")
        if int.from_bytes(file.read(8), "little") * storage.dtype.itemsize != storage.nbytes:
            raise UnsafePickle("a nested file with two different sizes of its storage")
        raw = file.read()
    if len(raw) != storage.nbytes:
        raise UnsafePickle(f"a storage of {storage.nbytes} bytes, of which {len(raw)} are there")
    return StoredValues(
        torch.frombuffer(bytearray(raw), dtype=storage.dtype) if raw else torch.empty(0, dtype=storage.dtype)
    )


def storage_id(pid: Any) -> StorageId:
    """Read a persistent id, ("storage", type, key, device, element count); in the old form a view follows, which is None."""
    if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or pid[5:] not in ((), (None,)):
        raise UnsafePickle("a nested file with an unknown persistent id")
    kind, key, numel = pid[1], pid[2], pid[4]
    if type(kind) is not Global or type(key) is not str or type(numel) is not int or not 0 <= numel < 2**48:
        raise UnsafePickle("a nested file with a storage of no known type or size")
    dtype = _DTYPES[kind.name.removeprefix("torch.")]
    return StorageId(dtype, key, numel * dtype.itemsize)


def member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return what lies under a name in a zip file of torch.save."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise UnsafePickle(f"a nested zip file with compressed data ({show(name)}), which torch.save never writes")
    return archive.read(name)
