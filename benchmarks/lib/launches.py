"""The launches of each CUDA launcher at the shapes of DDPM++/NCSN++: kernels, threads, dynamic shared memory.

It runs no kernel.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ect_kernels import native
from ect_kernels.testing import emulator
from torch import Tensor

N = 128
LEVELS = [(128, 32), (256, 32), (384, 32), (512, 32), (256, 16), (512, 16), (256, 8), (512, 8)]  # channels, height
CONCATS = [(256, 0, 32), (256, 256, 32), (256, 128, 32), (256, 0, 16), (256, 256, 16), (256, 0, 8), (256, 256, 8)]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class Launch:
    """The launches of one kernel: most threads of a CTA, most dynamic shared memory in bytes, the shapes it serves.

    pointers: kernel parameter ("2", or "0+64" inside a struct) -> (name of the launcher's argument that it holds, whether that
    is a tensor of the data's size rather than a vector by channel, sample or group).
    """

    threads: int = 0
    shared: int = 0
    shapes: list[str] = field(default_factory=list)
    pointers: dict[str, tuple[str, bool]] = field(default_factory=dict)


def image(channels: int, height: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    """Return a channels-last tensor of N images, its memory untouched."""
    x = torch.empty(N, height, height, channels, dtype=dtype).permute(0, 3, 1, 2)
    return x.requires_grad_(grad)


def calls(op: str, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (shape, arguments) of an op's public function as the networks call it; memory is not initialised."""
    seed = torch.zeros((), dtype=torch.int64)
    sigma = torch.ones(N)
    if op == "group_norm_silu":
        for channels, height in LEVELS:
            x = image(channels, height, dtype)
            vectors = {name: torch.empty(channels, requires_grad=True) for name in ("gamma", "beta")}
            v = torch.empty(N, channels, dtype=dtype, requires_grad=True)
            common = {"x": x, **vectors, "groups": 32, "eps": 1e-6}
            yield f"{channels}x{height}", common
            yield f"{channels}x{height} v p", {**common, "v": v, "p": 0.2, "seed": seed}
            yield f"{channels}x{height} norm", {**common, "act": False}
    elif op == "residual_group_norm_silu":
        for channels, more, height in CONCATS:
            extra = {"other": image(more, height, dtype)} if more else {}
            vectors = {name: torch.empty(channels + more, requires_grad=True) for name in ("gamma", "beta")}
            bias = {name: torch.empty(channels, requires_grad=True) for name in ("bias", "skip_bias")}
            a, skip = (image(channels, height, dtype) for _ in range(2))
            common = {
                "a": a,
                "skip": skip,
                **vectors,
                **extra,
                **bias,
                "groups": 32,
                "eps": 1e-6,
                "skip_scale": 0.5**0.5,
            }
            yield f"{channels}+{more}x{height}", common
    elif op == "radam_ema":
        from ect_kernels.radam_ema import MAX_EMAS, new_state

        arenas = {name: torch.empty(1 << 22) for name in ("params", "grads", "exp_avg", "exp_avg_sq")}
        emas, shadow = [torch.empty(1 << 22) for _ in range(MAX_EMAS)], None
        if dtype != torch.float32:
            shadow = torch.empty(1 << 22, dtype=dtype)
        f64, i64 = new_state("radam", 1e-4, (0.9, 0.99), 1e-8, ema_betas=(0.99, 0.999, 0.9999, 0.0), loss_scale=1024.0)
        yield "arena", {**arenas, "emas": emas, "shadow": shadow, "state_f64": f64, "state_i64": i64}
    elif op == "levels":
        given = {"seed": seed, "stage": torch.tensor(3), "n0": 0, "batch": N}
        yield "levels", {**given, "P_mean": -1.1, "P_std": 2.0, "q": 2.0, "k": 8.0, "b": 1.0}
    elif op == "perturb":
        images = torch.empty(N, 32, 32, 3, dtype=torch.uint8)
        common = {"images": images, "t": sigma, "r": sigma, "sigma_data": 0.5, "seed": seed, "dtype": dtype}
        yield "3x32", common
        yield "3x32 flip", {**common, "flip": torch.zeros(N, dtype=torch.bool)}
    elif op == "consistency_loss":
        F_t, F_r = image(3, 32, dtype), image(3, 32, dtype, grad=False)
        given = {name: image(3, 32, torch.float32, grad=False) for name in ("x_t", "x_r")}
        yield (
            "3x32",
            {"F_t": F_t, "F_r": F_r, **given, "t": sigma, "r": sigma, "weight": sigma, "c": 0.06, "sigma_data": 0.5},
        )


def run(function: Any, arguments: dict[str, Any]) -> None:
    """Run forward, and backward where an argument has a gradient."""
    outputs = function(**arguments, backend="emulated")
    outputs = [
        out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out is not None and out.requires_grad
    ]
    inputs = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
    if outputs and inputs:
        torch.autograd.grad(outputs, inputs, [torch.empty_like(out) for out in outputs], allow_unused=True)


# The emulator's device (CUDA_HOST_DEVICE) that gives a block so much shared memory, in KB.
DEVICES = {99: 0, 163: 1, 227: 2}


def record(op: str, kilobytes: int | None = None) -> dict[str, Launch]:
    """Return {kernel: Launch} of csrc/<op>.cu at the shapes of `calls`, under the kernels' names as `demangle` writes them.

    kilobytes: of shared memory that a block may have on the device; default: on the emulator's current one.
    """
    chosen = {} if kilobytes is None else {"CUDA_HOST_DEVICE": str(DEVICES[kilobytes])}
    with mock.patch.dict(os.environ, chosen):
        return _record(op)


def _record(op: str) -> dict[str, Launch]:
    path = emulator.build("record", emulator.ROOT / "csrc" / f"{op}.cu")
    library = ctypes.CDLL(str(path))
    library.recorded_launches.restype = ctypes.c_char_p
    library.forget_launches()
    function = getattr(importlib.import_module(f"ect_kernels.{op}"), op)
    at = symbols(path)
    found: dict[str, Launch] = {}

    def launch(backend: str, name: str, *args: native.Argument) -> None:
        original(backend, name, *args)
        for line in library.recorded_launches().decode().splitlines():
            offset, _, threads, shared, *values = line.split()
            entry = found.setdefault(at[int(offset)], Launch())
            entry.threads, entry.shared = max(entry.threads, int(threads)), max(entry.shared, int(shared))
            if current not in entry.shapes:
                entry.shapes.append(current)
            entry.pointers.update(pointers(values, dict(zip(arguments_of(name), args, strict=True))))
        library.forget_launches()

    original = native.launch
    native.load_emulator(path)
    native.launch = launch
    try:
        for dtype in DTYPES:
            for current, arguments in calls(op, dtype):  # noqa: B007 (launch() reads it)
                run(function, arguments)
    finally:
        native.launch = original
        native._emulated.pop(0)
    return found


def pointers(values: list[str], args: dict[str, native.Argument]) -> dict[str, tuple[str, bool]]:
    """Return which of the launcher's tensors each 8-byte word of a kernel's arguments (in hex) points into."""
    tensors = {name: value for name, value in args.items() if isinstance(value, Tensor) and value.numel()}
    largest = max((value.numel() for value in tensors.values()), default=0)
    found = {}
    for index, text in enumerate(values):
        data = bytes.fromhex(text)
        for offset in range(0, len(data) - 7, 8):
            address = int.from_bytes(data[offset : offset + 8], "little")
            for name, value in tensors.items():
                if value.data_ptr() <= address < value.data_ptr() + value.numel() * value.element_size():
                    found[f"{index}+{offset}" if offset else str(index)] = (name, 8 * value.numel() >= largest)
    return found


def arguments_of(launcher: str) -> list[str]:
    """Return the names of a launcher's arguments, without the stream, as csrc/*.cu declares them."""
    for source in emulator.sources():
        found = re.search(rf"\bint {launcher}\((.*?)\)\s*\{{", source.read_text(encoding="utf-8"), re.S)
        if found:
            return re.findall(r"(\w+)\s*(?:,|$)", found[1].strip())[:-1]
    raise ValueError(f"no launcher {launcher} in csrc/")


def symbols(library: Path) -> dict[int, str]:
    """Return {offset: demangled name} of a library's functions."""
    lines = subprocess.run(["nm", str(library)], capture_output=True, text=True, check=True).stdout.splitlines()
    parts = [line.split() for line in lines if len(line.split()) == 3]
    names = demangle([name for _, _, name in parts])
    return {int(address, 16): names[name] for address, _, name in parts}


def demangle(mangled: list[str]) -> dict[str, str]:
    """Return {symbol: "kernel<template arguments>"}, the same for nvcc's and g++'s symbols."""
    lines = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = {}
    for symbol, line in zip(mangled, lines.splitlines(), strict=True):
        line = line.replace("(anonymous namespace)::", "").removeprefix("void ")
        names[symbol] = _head(line)
    return names


def demangled(listing: dict[str, str]) -> dict[str, str]:
    """Return the texts by symbol, by the names of `demangle` instead."""
    names = demangle(list(listing))
    return {names[symbol]: text for symbol, text in listing.items()}


def _head(line: str) -> str:
    """Return a demangled function without its parameter list: up to the first '(' outside of <>."""
    depth = 0
    for i, letter in enumerate(line):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return line[:i]
    return line
