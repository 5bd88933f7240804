"""Every Triton launch of some updates, through Triton's own launch code: its binder, specialisation and compiler, for a GPU
that is not there. Prints one JSON object.

    python -m tests.gpu_paths.launches '{"launches": [{"gpu": "H100", "steps": [{"precision": "fp16"}], "ops": false}]}'

Run by test_triton.py in processes of its own: a process in which TRITON_INTERPRET was set has no such code.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import ect_kernels
import torch
import triton
from ect_kernels import consistency_loss, group_norm_silu, perturb, radam_ema
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ect.presets import PRESETS
from tests.gpu_paths import cases
from tests.gpu_paths.fake_gpu import GPUS, FakeGpu, Gpu, address

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Driver:
    """Triton's, of a machine with one GPU. Its number is no other's: by it Triton keeps what it has compiled."""

    binary_ext = "cubin"

    def __init__(self, gpu: Gpu) -> None:
        self.target = GPUTarget("cuda", gpu.arch, 32)
        self.number = list(GPUS.values()).index(gpu)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True


class Pointer:
    """A tensor as a launch sees it."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self._address = tensor.dtype, address(tensor)  # type: ignore[arg-type]

    def data_ptr(self) -> int:
        return self._address


@dataclass
class Compiled:
    """One kernel. stack, local: bytes of a thread outside its registers."""

    name: str
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    launches: int = 0


@dataclass
class Found:
    """What became of all launches; failures: message by kernel and constants."""

    gpu: str
    triton: str = triton.__version__
    launches: int = 0
    kernels: list[Compiled] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@contextmanager
def watch(found: Found) -> Iterator[None]:
    """Inside the block a launch compiles, and is written down."""
    known: dict[int, tuple[Any, Compiled]] = {}

    def launcher(function: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            given = [Pointer(a) if isinstance(a, Tensor) else a for a in args]
            named = {k: Pointer(v) if isinstance(v, Tensor) else v for k, v in options.items()}
            found.launches += 1
            try:
                kernel = function.run(*given, grid=grid, warmup=True, **named)
            except Exception as error:
                constants = {k: v for k, v in options.items() if isinstance(v, int)}
                found.failures[f"{function.fn.__name__} {constants}"] = f"{type(error).__name__}: {error}"[:600]
                return
            if id(kernel) not in known:
                known[id(kernel)] = kernel, usage(kernel)
                found.kernels.append(known[id(kernel)][1])
            known[id(kernel)][1].launches += 1

        return launch

    with mock.patch.object(JITFunction, "__getitem__", launcher):
        yield


def usage(kernel: Any) -> Compiled:
    """What ptxas made of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert match is not None, text
    registers, stack, local = map(int, match.groups())
    data = kernel.metadata
    return Compiled(data.name, data.num_warps, registers, stack, local, data.shared)


def update(gpu: FakeGpu, case: dict[str, Any]) -> None:
    """An update of a small network, or of DDPM++ as the recipes train it."""
    step = recipe(case) if case.pop("ddpmpp", False) else cases.step(**case)
    with closing(step.stream):
        step.stream.seek(0)
        step.update()


def recipe(case: dict[str, Any]) -> Any:
    """DDPM++ of the CIFAR-10 recipes, with 16 images."""
    from ect.assembly import flat_state, train_step
    from ect.data import Dataset, ImageStream

    cfg = replace(PRESETS["cifar10-1h"], batch=16, compile=False, graph=False, **case)
    data = Dataset("nothing", torch.zeros(64, 32, 32, 3, dtype=torch.uint8), None)
    state = flat_state(cfg, cases.network(cfg, data))
    return train_step(cfg, state, ImageStream(data, 0, "cuda", cfg.batch))


def ops() -> None:
    """What no step asks for: other numbers of averages, sizes that need the general kernels, noise that is given."""
    cuda = torch.device("cuda")
    for count, shadow in ((0, None), (2, torch.float16), (3, torch.bfloat16), (4, torch.float16)):
        arenas = [torch.zeros(64, device=cuda) for _ in range(4 + count)]
        state = radam_ema.new_state("adam", 1e-3, (0.9, 0.99), 1e-8, device=cuda)
        half = None if shadow is None else arenas[0].to(shadow)
        radam_ema.radam_ema(*arenas[:4], arenas[4:], half, *state)
    seed, t = torch.zeros((), dtype=torch.int64, device=cuda), torch.ones(2, device=cuda)
    for size, eps in ((7, None), (8, torch.zeros(2, 3, 8, 8, device=cuda))):
        images = torch.zeros(2, size, size, 3, dtype=torch.uint8, device=cuda)
        perturb.perturb(images, t, t, 0.5, seed, eps=eps)
    large = torch.zeros(2, 3, 64, 64, device=cuda)  # no sample of it fits into one block
    consistency_loss.consistency_loss(large, large, large, large, t, t, t, 0.0, 0.5)
    x = torch.zeros(2, 24, 5, 5, device=cuda)  # rows that no eight divide
    group_norm_silu.group_norm_silu(x[:, :12], x[0, :12, 0, 0], x[0, :12, 0, 0], 3, 1e-6, p=0.1, seed=seed)


def kernels() -> dict[str, JITFunction]:
    """Every kernel of the package by name, without the functions that only kernels call."""
    found = {}
    for module in pkgutil.iter_modules(ect_kernels.__path__):
        if module.name.endswith("_triton"):
            members = vars(importlib.import_module(f"ect_kernels.{module.name}")).items()
            found |= {name: f for name, f in members if isinstance(f, JITFunction) and name.endswith("_kernel")}
    return found


@triton.jit
def _params_kernel(params, n):  # type: ignore[no-untyped-def]
    pass


@triton.jit
def _specialize_impl_kernel(specialize_impl, n):  # type: ignore[no-untyped-def]
    pass


# Names that binders of Triton have for themselves, or had in some version.
PLANTS = (_params_kernel, _specialize_impl_kernel)


def bind(function: JITFunction) -> str | None:
    """What is wrong with the names of a kernel's parameters, found by binding: Triton writes a function with them as its
    parameters, in which they can hide what it needs itself."""
    parameters = inspect.signature(function.fn).parameters
    constants = {p.name for p in function.params if p.is_constexpr}
    pointer = Pointer(torch.empty(8))
    given = {name: 16 if name in constants else pointer for name in parameters}
    try:
        *_, binder = function.create_binder()
        bound, specialization, _ = binder(**given, num_warps=4)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if dict(bound) != given or len(specialization) != len(given):
        return f"bound as {dict(bound)}"
    return None


def launched(request: dict[str, Any]) -> Found:
    """What became of the launches of some steps on a GPU."""
    gpu = GPUS[request["gpu"]]
    driver.set_active(Driver(gpu))
    found, started = Found(gpu.name), time.process_time()
    with watch(found):
        for case in request["steps"]:
            with FakeGpu(gpu, triton=None) as fake:
                update(fake, dict(case))
        if request["ops"]:
            with FakeGpu(gpu, triton=None):
                ops()
    found.seconds = time.process_time() - started
    return found


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Of each request among `launches`, by GPU; then, where it is asked for, what is wrong with names of parameters."""
    found = {each["gpu"]: asdict(launched(each)) for each in request["launches"]}
    binds = {name: bind(function) for name, function in kernels().items()} if request.get("bind") else {}
    return {"found": found, "binds": binds, "plants": [bind(function) for function in PLANTS]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(json.loads(sys.argv[1]))))
