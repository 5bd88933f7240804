"""Hostile and damaged files: nothing in them runs, nothing crashes, and one kind of error names what they ask for."""

from __future__ import annotations

import builtins
import copyreg
import functools
import importlib
import io
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ect.edm_pickle import _TABLE, UnsafePickle, read
from ect.errors import UserError
from tests import edm_files as edm
from tests.edm_files import Call, Persistent, Storage, View, small_net

GLOBALS = [*_TABLE, "torch.storage._load_from_bytes"]
SYSTEM = f"{os.system.__module__}.system"  # posix or nt


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "snapshot.pkl"


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that the payloads create: it must not be there at the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the payload was executed"


def refusal(path: Path, data: bytes) -> str:
    """The message with which the file is refused: one line that begins with its name."""
    path.write_bytes(data)
    with pytest.raises(UnsafePickle) as caught:
        read(path)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, pickle.UnpicklingError)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    return message.removeprefix(f"{path}: ")


# --- code ------------------------------------------------------------------------------------------------------------


def by_getattr(code: str) -> Call:
    """From a harmless function through its __globals__ to eval: what a real getattr in the table would allow."""
    names = Call(getattr, torch._utils._rebuild_tensor_v2, "__globals__")
    builtin = Call(Call(getattr, names, "get"), "__builtins__")
    return Call(Call(Call(getattr, builtin, "get"), "eval"), code)


def in_storage(code: str, zipped: bool) -> Storage:
    return Storage(edm.blob_of(Call(eval, code), zipped))


PAYLOADS: dict[str, tuple[Callable[[str], object], str]] = {
    "os.system": (lambda code: Call(os.system, f"{_python()} -c \"{code}\""), f"asks for {SYSTEM}"),
    "eval": (lambda code: Call(eval, code), "asks for builtins.eval"),
    "exec": (lambda code: Call(exec, code), "asks for builtins.exec"),
    "nested": (lambda code: {"a": [(Call(list, Call(map, eval, [code])),)]}, "asks for builtins.list"),
    "partial": (lambda code: Call(functools.partial(eval, code)), "asks for functools.partial"),
    "getattr": (by_getattr, "builtins.getattr: an attribute of the global torch._utils._rebuild_tensor_v2"),
    "import": (lambda code: Call(Call(getattr, Call(importlib.import_module, "builtins"), "eval"), code), "import_module"),
    "storage": (lambda code: in_storage(code, False), "torch.storage._load_from_bytes: asks for builtins.eval"),
    "zip": (lambda code: in_storage(code, True), "torch.storage._load_from_bytes: asks for builtins.eval"),
    "source": (lambda code: Persistent("AugmentPipe", {}, f"{code}\n", version=7), "expected type 'class', version 6"),
}  # fmt: skip


def _python() -> str:
    import sys

    return sys.executable


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["loss_fn", "attribute", "weight"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_code_is_not_executed(path: Path, canary: Path, name: str, where: str, protocol: int) -> None:
    make, says = PAYLOADS[name]
    payload = make(f"open({str(canary)!r}, 'w').close()")
    nets = {
        "loss_fn": {"loss_fn": payload, "ema": small_net()},
        "attribute": {"ema": small_net(skip_scale=payload)},
        "weight": {"ema": small_net(weight=payload)},
    }
    data = edm.dump(nets[where], protocol)
    if name != "os.system" or where == "loss_fn":  # each file really is hostile (starting a shell takes long)
        edm.load_unsafely(data)
        canary.unlink()
    assert says in refusal(path, data)
