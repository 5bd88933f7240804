"""Snapshots of EDM and ECT: whole ones spoilt, and programs of the pickle machine."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from ect.files import edm_pickle
from ect.files.model_file import check_fits
from ect.models import build
from tests import edm_files as edm
from tests.fuzz.mutations import spoilt

SPEC: dict[str, Any] = {
    "precond": "ECMPrecond", "sigma_data": 0.5, "sigma_min": 0.002, "unet": "SongUNet",
    "kwargs": {**edm.SMALL, "model_channels": 4, "channel_mult": [1], "attn_resolutions": []},
}  # fmt: skip
_GLOBALS = [
    "os system", "builtins eval", "builtins getattr", "builtins set", "torch_utils.persistence _reconstruct_persistent_obj",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch.storage _load_from_bytes", "torch Size",
    "collections OrderedDict", "numpy dtype", "numpy.core.multiarray scalar", "_codecs encode", "torch float32", "torch device",
    "torch.nn.modules.container ModuleList", "dnnlib.util EasyDict", "subprocess Popen",
]  # fmt: skip
_OPS = [
    b"(", b")", b"]", b"}", b"\x8f", b"N", b"\x88", b"\x89", b"K\x01", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f",
    b"0", b"1", b"2", b"t", b"l", b"d", b"\x91", b"e", b"\x90", b"u", b"s", b"a", b"\x85", b"\x86", b"\x87", b"R",
    b"\x81", b"b", b"Q", b"\x94", b"q\x00", b"h\x00", b"r\x00\x00\x00\x7f", b"p0\n", b"g0\n", b"g-1\n",
    b"I99999999999999999999\n", b"L1L\n", b"F1e999\n", b"S'a'\n", b"Va\n", b"\x8c\x03ema", b"X\x02\x00\x00\x00os",
    b"C\x02ab", b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"\x8a\xff" + b"\x7f" * 255,
    b"G\x7f\xf0\x00\x00\x00\x00\x00\x00", b"\x93", b"\x92", b"\x82\x01", b"Pa\n", b"\x97", b"\x98",
    b"\x95" + b"\x08" + bytes(7), b"\x80\x05", b"\x8e" + (1 << 40).to_bytes(8, "little"), b"B\xff\xff\xff\x7f", b"i",
    b"o", b"\x8c\x06latin1",
]  # fmt: skip


def files() -> list[bytes]:
    torch.manual_seed(0)
    whole = edm.from_net(build(SPEC), SPEC)
    small = [edm.small_net(), edm.small_net(precond="ECMPrecond", sigma_min=0.002)]
    return [
        edm.edm_snapshot(whole),
        edm.ect_snapshot(small[0]),
        edm.dump({"ema": small[1]}, 2),
        edm.edm_snapshot(small[0], 3),
    ]


@st.composite
def programs(draw: st.DrawFn) -> bytes:
    """A pickle of instructions in any order, with globals that files have, and that they must not have."""
    names = st.sampled_from(_GLOBALS).map(lambda name: f"c{name.replace(' ', chr(10))}\n".encode())
    pieces = draw(st.lists(st.sampled_from(_OPS) | names, max_size=60))
    pieces = [piece * draw(st.sampled_from([1, 1, 1, 3, 2000])) if draw(st.booleans()) else piece for piece in pieces]
    return b"\x80\x04" + b"".join(pieces) + b"."


def dressed(value: Any) -> bytes:
    """A snapshot whose network is any value of Python."""
    return pickle.dumps({"ema": value}, 4)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4) | st.tuples(inner, inner)
    ),
)
INPUTS = st.one_of(*map(spoilt, files()), programs(), VALUES.map(dressed), st.binary(max_size=200))


def read(folder: Path, data: bytes) -> Any:
    path = folder / "file.pkl"
    path.write_bytes(data)
    snapshot = edm_pickle.read(path)
    check_fits(snapshot, str(path))
    return snapshot
