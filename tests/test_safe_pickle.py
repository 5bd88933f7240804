"""Hostile and damaged files: nothing in them runs, nothing crashes, and one kind of error names what they ask for."""

from __future__ import annotations

import copyreg
import functools
import io
import os
import pickle
import random
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from ect.files.edm_pickle import _TABLE, UnsafePickle, read
from ect.files.safe_pickle import Budget, Machine
from tests import edm_files as edm
from tests.edm_files import Call, Storage, refusal, small_net

GLOBALS = [*_TABLE, "torch.storage._load_from_bytes"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "snapshot.pkl"


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that the payloads create: it must not be there at the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the payload was executed"


# --- code ------------------------------------------------------------------------------------------------------------


def by_getattr(code: str) -> Call:
    """From a harmless function through its __globals__ to eval: what a real getattr in the table would allow."""
    names = Call(getattr, torch._utils._rebuild_tensor_v2, "__globals__")
    builtin = Call(Call(getattr, names, "get"), "__builtins__")
    return Call(Call(Call(getattr, builtin, "get"), "eval"), code)


def in_storage(code: str, zipped: bool) -> Storage:
    return Storage(edm.blob_of(Call(eval, code), zipped))


def at_once(code: str) -> str:
    return f'"{sys.executable}" -c "{code}"'


PAYLOADS: dict[str, tuple[Callable[[str], object], str]] = {
    "os.system": (lambda code: Call(os.system, at_once(code)), f"asks for {os.system.__module__}.system,"),
    "eval": (lambda code: Call(eval, code), "asks for builtins.eval,"),
    "exec": (lambda code: Call(exec, code), "asks for builtins.exec,"),
    "nested": (lambda code: {"a": [(Call(list, Call(map, eval, [code])),)]}, "asks for builtins.list,"),
    "partial": (lambda code: Call(functools.partial(eval, code)), "asks for functools.partial,"),
    "getattr": (by_getattr, "builtins.getattr: an attribute of the global torch._utils._rebuild_tensor_v2"),
    "import": (lambda code: Call(Call(getattr, Call(import_module, "builtins"), "eval"), code), "importlib.import_module,"),
    "storage": (lambda code: in_storage(code, False), "torch.storage._load_from_bytes: asks for builtins.eval,"),
    "zip": (lambda code: in_storage(code, True), "torch.storage._load_from_bytes: asks for builtins.eval,"),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["loss_fn", "attribute", "weight"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_code_is_not_executed(path: Path, canary: Path, name: str, where: str, protocol: int) -> None:
    make, says = PAYLOADS[name]
    payload = make(f"open({str(canary)!r}, 'w').close()")
    files = {
        "loss_fn": {"loss_fn": payload, "ema": small_net()},
        "attribute": {"ema": small_net(skip_scale=payload)},
        "weight": {"ema": small_net(weight=payload)},
    }
    data = edm.dump(files[where], protocol)
    edm.load_unsafely(data)
    canary.unlink()  # so the file really is hostile
    assert says in refusal(path, data)


@pytest.mark.parametrize("protocol", [2, 4])
def test_embedded_source_is_not_executed(path: Path, canary: Path, protocol: int) -> None:
    data = edm.edm_snapshot(small_net(source=f"open({str(canary)!r}, 'w').close()"), protocol)
    edm.load_unsafely(data)
    canary.unlink()
    path.write_bytes(data)
    assert torch.equal(read(path).state["model.weight"], edm.WEIGHT)


def test_plain_values_of_all_protocols() -> None:
    value = {
        "a": [1, 2.5, None, True, -(1 << 80), "\u00e9", b"\xff", (), (1,), (1, 2, 3, 4)],
        7: ({"x"}, frozenset({1})),
    }
    for protocol in range(6):
        data = io.BytesIO(pickle.dumps((value, value), protocol))
        table = {"builtins.set": set, "builtins.frozenset": frozenset, "_codecs.encode": str.encode}
        first, second = Machine(table, Budget(work=10_000)).run(data)
        assert first == value and first is second


def raw(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


def named(name: str) -> bytes:
    """The opcode that pushes a global."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


ATTACHMENTS = [
    (b"}(\x8c\x04evilK\x01ub", "sets the state (BUILD) of"),
    (b"N}(\x8c\x04evilK\x01u\x86b", "sets the state (BUILD) of"),
    (b"\x8c\x04evilK\x01s", "adds items (SETITEM) to"),
    (b"(\x8c\x04evilK\x01u", "adds items (SETITEMS) to"),
    (b"K\x01a", "adds items (APPEND) to"),
    (b"(K\x01e", "adds items (APPENDS) to"),
    (b"(K\x01\x90", "adds items (ADDITEMS) to"),
]


@pytest.mark.parametrize("name", GLOBALS)
def test_nothing_can_be_attached_to_a_global(path: Path, name: str) -> None:
    for state, says in ATTACHMENTS:
        assert f"{says} the global {name}" in refusal(path, raw(named(name) + state))
    assert not hasattr(torch._utils._rebuild_tensor_v2, "evil")


def test_attaching_to_a_global_is_a_real_attack() -> None:
    pickle.loads(raw(named("torch._utils._rebuild_tensor_v2") + ATTACHMENTS[0][0]))
    assert torch._utils._rebuild_tensor_v2.evil == 1
    del torch._utils._rebuild_tensor_v2.evil


@pytest.mark.parametrize("target", [b"N", b"}", b"]", b")", b"K\x01", b"\x8c\x01a"])
def test_build_on_plain_values(path: Path, target: bytes) -> None:
    assert "sets the state (BUILD) of a value of type" in refusal(path, raw(target + b"}b"))


HOSTILE_ARGUMENTS: list[bytes] = [
    b")", b"N\x85", b"K\x01\x85", b"]\x85", b"}\x85", b"\x8c\x03abc\x85", b"C\x03abc\x85", b"NN\x86", b"NNN\x87", b"]]\x86",
    b"(NNNNt", b"(NNNNNNNNNt", b"}}\x86", b"\x8c\x01aN\x86", b"ccollections\nOrderedDict\n\x85",
    b"cnumpy\ndtype\n\x8c\x02f8\x85RN\x86", b"cnumpy\ndtype\n\x8c\x02f8\x85RC\x01a\x86",
    b"cnumpy\ndtype\n\x8c\x02f8\x85R)bC\x08abcdefgh\x86", b"cnumpy\ndtype\n\x8c\x02f8\x85RNN\x86bC\x08abcdefgh\x86",
    b"\x8a\xff" + b"\x7f" * 255 + b"\x85", b"](K\x01K\x02e\x85", b"(ccollections\nOrderedDict\n)RK\x01))t",
]  # fmt: skip


@pytest.mark.parametrize("name", GLOBALS)
def test_arguments_that_do_not_fit(path: Path, name: str) -> None:
    for arguments in HOSTILE_ARGUMENTS:
        says = refusal(path, raw(named(name) + arguments + b"R"))
        assert name in says or re.search("holds (a value of type|nothing)", says)  # refused, or built a plain value


@pytest.mark.parametrize("name", GLOBALS)
def test_too_many_arguments(path: Path, name: str) -> None:
    says = refusal(path, raw(named(name) + b"(" + b"K\x01" * 9 + b"tR"))
    if name == "torch.device":  # takes any, and keeps them
        assert "holds a value of type tuple" in says
    elif _TABLE.get(name, name) is None:
        assert f"calls the global {name}, which is no function" in says
    else:
        assert f"calls {name} with arguments that do not fit" in says


@pytest.mark.parametrize("function", [b"N", b"\x8c\x04eval", b"}", b"cbuiltins\nset\n)R", b"ctorch\nfloat32\n"])
@pytest.mark.parametrize("call", [b")R", b")\x81"])
def test_only_functions_of_the_table_are_called(path: Path, function: bytes, call: bytes) -> None:
    for body in (function + call, named("builtins.set") + b"N" + call[1:]):
        assert re.match("calls .* which is no function of a snapshot", refusal(path, raw(body)))


@pytest.mark.parametrize("cached", [False, True])
def test_extension_codes(path: Path, canary: Path, cached: bool) -> None:
    copyreg.add_extension("builtins", "eval", 0x70)
    try:
        code = f"open({str(canary)!r}, 'w').close()".encode()
        body = b"\x8c" + bytes([len(code)]) + code + b"\x85R"
        if cached:
            pickle.loads(raw(b"\x82\x70" + body))
            canary.unlink()
        assert "instruction EXT1" in refusal(path, raw(b"\x82\x70" + body))
        assert "instruction EXT2" in refusal(path, raw(b"\x83\x70\x00" + body))
        assert "instruction EXT4" in refusal(path, raw(b"\x84\x70\x00\x00\x00" + body))
    finally:
        copyreg.remove_extension("builtins", "eval", 0x70)
        copyreg.clear_extension_cache()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"K\x01Q", "instruction BINPERSID"),
        (b"Pid\n", "instruction PERSID"),
        (b"(iposix\nsystem\n", "instruction INST posix system"),
        (b"(cposix\nsystem\no", "asks for posix.system,"),
        (b"(ccollections\nOrderedDict\no", "instruction OBJ"),
        (b"ccollections\nOrderedDict\n)}\x92", "instruction NEWOBJ_EX"),
        (b"\x8c\x05posixN\x93", "named by a value of type str and a value of type NoneType"),
        (b"\x8c\x07a\x1b[31m\n\x8c\x01b\x93", "asks for 'a\\x1b[31m\\n.b',"),
        (b"ctorch.nn\nfunctional.__builtins__\n", "asks for torch.nn.functional.__builtins__,"),
        (b"(Na", "IndexError"),
        (b"0", "IndexError"),
        (b"t", "IndexError"),
        (b"h\x05", "KeyError"),
        (b"}(NNu", "uses a value of type NoneType as a key"),
        (b"})Ns", "uses a value of type tuple as a key"),
        (b"(N\x91", "uses a value of type NoneType as a key"),
        (b"}(K\x01u", "ValueError"),
    ],
)
def test_instructions(path: Path, body: bytes, says: str) -> None:
    assert says in refusal(path, raw(body))


# --- size, depth and damage ------------------------------------------------------------------------------------------


DEEP = 200_000  # more than the C stack holds


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"}" + b")" + b"\x85" * DEEP + b"K\x01s", "uses a value of type tuple as a key"),
        (b"\x8f(" + b")" + b"\x85" * DEEP + b"\x90", "uses a value of type tuple as a key"),
        (b")" + b"\x85" * DEEP, "holds a value of type tuple"),
        (b"]" * DEEP + b"a" * (DEEP - 1), "holds a value of type list"),
        (b"(" * DEEP + b"t" * DEEP, "holds a value of type tuple"),
        (named("torch.Size") + b")" + b"\x85" * DEEP + b"R", "holds a value of type tuple"),
        (b"]" + b"2" * 3, "instruction DUP"),
        (b"]q\x00" + b"](h\x00h\x00eq\x00" * 60, "holds a value of type list"),
        (b"\x8e" + struct.pack("<Q", 1 << 62) + b"abc", "truncated, damaged"),
        (b"\x8d" + struct.pack("<Q", 1 << 62) + b"abc", "truncated, damaged"),
        (b"\x8e" + b"\xff" * 8 + b"abc", "truncated, damaged"),
        (b"\x8b\xff\xff\xff\x7fabc", "truncated, damaged"),
        (b"\x8b\xff\xff\xff\xffabc", "truncated, damaged"),
        (b"\x95" + b"\xff" * 8 + b"Nr\xff\xff\xff\xff", "holds a value of type NoneType"),
        (b"}\x8b\x10\x27\x00\x00" + b"\x7f" * 10_000 + b"Ns", "uses a key that is larger"),
        (
            b"}("
            + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(60_000))
            + b"u",
            "uses a key that is larger",
        ),  # one hash for all
        (b"Np%d\n" % (2**61 - 1), "uses a key that is larger"),
        (b"}X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"Ns", "uses a key that is larger"),  # slow to compare
    ],
)
def test_bombs(path: Path, body: bytes, says: str) -> None:
    begin = time.process_time()
    assert re.search(says, refusal(path, raw(body)))
    assert time.process_time() - begin < 5


LARGE = edm.blob_of(edm.storage_of(torch.zeros(10_000)))


@pytest.mark.parametrize(
    ("value", "call"),
    [
        (b"](" + b"K\x01" * 50_000 + b"e", named("builtins.set")),
        (b"](" + b"K\x01" * 50_000 + b"e", named("torch.Size")),
        (b"X\x00\x00\x10\x00" + bytes(1 << 20), named("torch.device")),
        (b"B" + struct.pack("<I", len(LARGE)) + LARGE, named("torch.storage._load_from_bytes")),
    ],
)
def test_using_data_over_and_over(path: Path, value: bytes, call: bytes) -> None:
    body = value + b"\x85q\x000" + b"](" + (call + b"h\x00R") * 5000 + b"e"
    assert "uses its data over and over" in refusal(path, raw(body))


def test_too_many_instructions() -> None:
    with pytest.raises(UnsafePickle, match="more instructions than any known snapshot"):
        Machine({}, Budget(work=0, opcodes=5)).run(io.BytesIO(raw(b"NNNN")))
    assert Machine({}, Budget(work=0, opcodes=6)).run(io.BytesIO(raw(b"NNNN"))) is None


def test_every_truncation_is_reported(path: Path) -> None:
    data = edm.ect_snapshot(small_net())
    for end in range(0, len(data), 3):
        assert refusal(path, data[:end])


@pytest.mark.slow
def test_random_damage_never_escapes(path: Path) -> None:
    data, draw, survived = edm.ect_snapshot(small_net()), random.Random(0), 0
    for _ in range(1000):
        damaged = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 5])):
            damaged[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read(path)
            survived += 1
        except UnsafePickle:
            pass
    assert 0 < survived < 1000
