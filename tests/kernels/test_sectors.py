"""How many 32-byte sectors the warps of the group norms ask for, counted: each sector that is asked for is used whole.

The accesses of 32 neighbouring threads that come at the same place of their order are one access of a warp, as on a GPU.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ect_kernels import native
from ect_kernels.testing import emulator
from lib import launches, sass
from torch import Tensor

from tests.kernels.test_dram import COUNT, run

ACCESS = np.dtype([("address", "u8"), ("bytes", "u4"), ("write", "u4"), ("thread", "u4"), ("block", "u4")])
ROOM = 1 << 21
Counted = dict[tuple[str, str], float]  # (launcher, argument) -> bytes of the sectors asked for, by bytes accessed


def sectors(accesses: np.ndarray) -> int:
    """32-byte sectors of all warps' accesses, counted anew at each access. g++ may split 16 bytes, which count as one."""
    accesses = accesses[
        np.lexsort((accesses["write"], accesses["thread"], accesses["block"]))
    ]  # a thread's own order stays
    key = accesses["block"].astype(np.int64) << 12 | accesses["thread"].astype(np.int64) << 1 | accesses["write"]
    vector = accesses["address"].astype(np.int64) // 16
    whole = np.concatenate([[True], (key[1:] != key[:-1]) | (vector[1:] != vector[:-1])])
    key, vector = key[whole], vector[whole]
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    nth = np.arange(len(key)) - np.repeat(starts, np.diff(np.append(starts, len(key))))
    warp = key >> 6 << 1 | key & 1
    return len(np.unique(np.stack([warp, nth, vector // 2]), axis=1).T)


@contextmanager
def counting(op: str) -> Iterator[Counted]:
    """Sectors of the launches of an op's CUDA kernels in the block, as backend 'emulated'."""
    found: Counted = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(emulator.FLAGS, "count", COUNT)
        try:
            library = ctypes.CDLL(str(emulator.build("count", emulator.ROOT / "csrc" / f"{op}.cu")))
        except FileNotFoundError as error:
            pytest.skip(str(error))
        library.cuda_host_message.restype = ctypes.c_char_p
        library.list_accesses.restype = ctypes.c_size_t
        original: Callable[..., None] = native.launch

        def launch(backend: str, name: str, *args: native.Argument) -> None:
            images, keep = {}, []
            for key, value in zip(launches.arguments_of(name), args, strict=True):
                if isinstance(value, Tensor) and value.dim() == 4 and value.numel():
                    size = value.numel() * value.element_size()
                    keep += [np.zeros(size, np.uint16), np.zeros(size, np.uint16)]
                    pointers = [ctypes.c_void_p(counter.ctypes.data) for counter in keep[-2:]]
                    images[key] = (value.data_ptr(), size)
                    assert (
                        library.count_tensor(ctypes.c_void_p(value.data_ptr()), ctypes.c_size_t(size), *pointers) == 0
                    )
            written = np.zeros(ROOM, ACCESS)
            library.list_accesses(ctypes.c_void_p(written.ctypes.data), ctypes.c_size_t(ROOM))
            try:
                original(backend, name, *args)
            finally:
                count = library.list_accesses(None, ctypes.c_size_t(0))
                library.count_no_tensor()
            assert count < ROOM
            written = written[:count]
            for key, (at, size) in images.items():
                inside = written[(written["address"] >= at) & (written["address"] < at + size)]
                if len(inside):
                    found[name, key] = 32 * sectors(inside) / float(inside["bytes"].sum())

        patch.setattr(native, "_emulated", [library])
        patch.setattr(native, "launch", launch)
        yield found


def image(channels: int, height: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, height, height, channels).to(dtype).permute(0, 3, 1, 2).requires_grad_()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "more", "height", "dtype", "device"),
    [
        (128, 0, 16, torch.float32, 0),  # neighbours take neighbouring 16 bytes
        (256, 0, 8, torch.float32, 1),
        (128, 128, 16, torch.float32, 0),
        (64, 32, 32, torch.float32, 0),  # one group in both sources
        (128, 0, 16, torch.float16, 0),
        (96, 0, 32, torch.float16, 0),  # 12 channels a group: 24 of them, 48 bytes, would end inside a sector
        (192, 0, 16, torch.float16, 2),
    ],
    ids=str,
)
def test_every_sector_is_used_whole(
    channels: int, more: int, height: int, dtype: torch.dtype, device: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOST_DEVICE", str(device))
    every = channels + more
    vectors = {name: torch.ones(every, requires_grad=True) for name in ("gamma", "beta")}
    groups = every // 12 if every % 12 == 0 else every // 8
    common: dict[str, Any] = {**vectors, "groups": groups, "eps": 1e-6, "p": 0.2, "seed": torch.tensor(7)}
    op = "residual_group_norm_silu" if more else "group_norm_silu"
    if more:
        given = {"a": image(channels, height, dtype), "skip": image(channels, height, dtype), "skip_scale": 0.7}
        given["other"] = image(more, height, dtype)
    else:
        given = {"x": image(channels, height, dtype)}
    with counting(op) as found:
        run(op, given | common, "emulated")
    assert {launcher for launcher, _ in found} == {f"{op}_fwd", f"{op}_bwd"}
    wasted = {key: ratio for key, ratio in found.items() if ratio > 1}
    assert not wasted, wasted


def test_halves_of_sectors_are_found() -> None:
    """A warp that takes every other 16 bytes, then the rest: twice the sectors."""
    accesses = np.zeros(64, ACCESS)
    accesses["thread"] = np.tile(np.arange(32), 2)
    accesses["bytes"] = 16
    accesses["address"] = 32 * accesses["thread"] + 16 * np.repeat([0, 1], 32)
    assert sectors(accesses) == 64
    accesses["address"] = 16 * accesses["thread"] + 512 * np.repeat([0, 1], 32)
    assert sectors(accesses) == 32


STORES = """
#include "access.cuh"
__global__ void stores(const __half* x, __half* y, float* z) {
  float e[8], first[4];
  load<true>(x, e);
  for (int j = 0; j < 4; j++) first[j] = e[j];
  store<true>(y, e);
  store<true>(z, first);
}
"""


@pytest.mark.slow
def test_outputs_are_stored_whole_and_stay_in_l2(tmp_path: Path) -> None:
    """128 bits at once and without evict-first: the next convolution reads at once what a norm has written."""
    try:
        nvcc = sass.tool("nvcc")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    (tmp_path / "stores.cu").write_text(STORES, encoding="utf-8")
    command = [
        nvcc,
        "-ptx",
        "-arch=sm_80",
        "-std=c++17",
        f"-I{emulator.ROOT}/csrc/common",
        "stores.cu",
        "-o",
        "stores.ptx",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    stores = re.findall(r"\bst\.[\w.]+", (tmp_path / "stores.ptx").read_text(encoding="utf-8"))
    assert stores == ["st.global.v4.u32"] * 2
