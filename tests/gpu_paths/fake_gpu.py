"""A GPU that is not there: its memory has shapes, dtypes and addresses, but no values, and reads as ones on the host.

`FakeGpu(GPUS["H100"])` is a context: inside it torch says that the device exists, tensors on "cuda" are fake ones, those on the
CPU are real, and autograd runs. What a step does that a GPU would have to wait for, or could not do at all, is in `events`.
"""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from ect_kernels import native, registry
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.gpu_paths.engine import walked_in_python
from tests.tracing import resting

aten = torch.ops.aten


@dataclass(frozen=True)
class Gpu:
    """What torch and Triton ask of a device. shared, shared_sm: bytes of shared memory of one block at most, and of an SM."""

    name: str
    capability: tuple[int, int]
    sms: int
    shared: int
    shared_sm: int
    threads_sm: int
    memory: int
    l2: int

    @property
    def arch(self) -> int:
        return 10 * self.capability[0] + self.capability[1]

    def properties(self, device: Any = None) -> types.SimpleNamespace:
        """torch.cuda.get_device_properties."""
        major, minor = self.capability
        return types.SimpleNamespace(
            name=self.name, major=major, minor=minor, multi_processor_count=self.sms, total_memory=self.memory, uuid="",
            warp_size=32, regs_per_multiprocessor=65536, shared_memory_per_block=49152, L2_cache_size=self.l2,
            shared_memory_per_block_optin=self.shared, shared_memory_per_multiprocessor=self.shared_sm,
            max_threads_per_multi_processor=self.threads_sm, max_threads_per_block=1024, gcnArchName="",
        )  # fmt: skip


KB, MB, GB = 1 << 10, 1 << 20, 1 << 30
GPUS = {
    "T4": Gpu("Tesla T4", (7, 5), 40, 64 * KB, 64 * KB, 1024, 15 * GB, 4 * MB),
    "A100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 * KB, 164 * KB, 2048, 79 * GB, 40 * MB),
    "RTX 3090": Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82, 99 * KB, 100 * KB, 1536, 24 * GB, 6 * MB),
    "RTX 4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 99 * KB, 100 * KB, 1536, 24 * GB, 72 * MB),
    "H100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 227 * KB, 228 * KB, 2048, 79 * GB, 50 * MB),
    "B200": Gpu("NVIDIA B200", (10, 0), 148, 227 * KB, 228 * KB, 2048, 178 * GB, 126 * MB),
    "RTX 5090": Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 99 * KB, 100 * KB, 1536, 32 * GB, 96 * MB),
}


class Stream:
    """Of torch.cuda, and its stream and device contexts and events: they order what nothing runs."""

    cuda_stream, device_index = 0, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cuda", 0)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Graph:
    """Of torch.cuda: what it captured ran once, and a replay runs nothing."""

    def replay(self) -> None:
        pass

    def pool(self) -> tuple[int, int]:
        return 0, 0


@contextlib.contextmanager
def told(gpu: Gpu, devices: int = 1) -> Iterator[list[int]]:
    """torch.cuda as it speaks on a machine with such GPUs. Yields a stack whose last entry is the current device's number."""
    current = [0]

    @contextlib.contextmanager
    def device(where: Any) -> Iterator[None]:
        current.append(_number(where, current))
        yield
        current.pop()

    def set_device(where: Any) -> None:
        current[-1] = _number(where, current)

    free = gpu.memory * 9 // 10
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: devices,
        "current_device": lambda: current[-1],
        "set_device": set_device,
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_name": lambda device=None: gpu.name,
        "get_device_properties": gpu.properties,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
        "is_bf16_supported": lambda *args, **kwargs: gpu.capability >= (8, 0),
        "mem_get_info": lambda device=None: (free, gpu.memory),
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "manual_seed_all": lambda seed: None,
        "is_current_stream_capturing": lambda: False,
        "current_stream": Stream,
        "stream": Stream,
        "device": device,
        "Stream": Stream,
        "Event": Stream,
        "CUDAGraph": Graph,
        "graph": lambda *args, **kwargs: Stream(),
        "_lazy_init": lambda: None,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch._C, "_select_conv_backend", return_value=_CUDNN))
        stack.enter_context(mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _layout))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention(gpu)))
        # torch holds every tensor on a device that it finds absent for one of its own making; here some are of ours.
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        # nn.Module.to: torch swaps fake parameters, which their weak references forbid.
        stack.enter_context(
            mock.patch.object(torch.utils, "swap_tensors", lambda old, new: setattr(old, "data", new.data))
        )
        stack.enter_context(walked_in_python())
        torch._C._ensureCUDADeviceGuardSet()  # nothing is asked of the driver when a device becomes current
        yield current


def _number(device: Any, current: list[int]) -> int:
    index = device if isinstance(device, int) else torch.device(device).index
    return current[-1] if index is None else index


_CUDNN = torch._C._ConvBackend.Cudnn


def _layout(x: Tensor, weight: Tensor, *rest: Any) -> torch.memory_format:
    """cuDNN's rule: channels-last where input or weight is."""
    last = any(t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return torch.channels_last if last else torch.contiguous_format


def _attention(gpu: Gpu) -> Any:
    """The kernels that torch would choose on the device: flash for halves from sm_80 on, else memory-efficient attention."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not q.is_cuda:
            return original(q, k, v, *args, **kwargs)
        half = q.dtype in (torch.float16, torch.bfloat16)
        if half and gpu.capability >= (8, 0) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0:
            return aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, torch.is_grad_enabled())[0]

    original = F.scaled_dot_product_attention
    return attention


@dataclass(frozen=True)
class Event:
    """kind: 'mixed devices', 'host read', 'host data', 'host copy', 'host work' or 'data-dependent shape'."""

    kind: str
    op: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.op} {self.what}"


class FakeGpu:
    """The context. events: what happened since the last `watch()` that a step on the device must not do. calls: operations.
    launches: of the stub that stands for the CUDA extension, by name; launched_on: which devices were current then.

    archs: what that extension was built for, as its `archs()` says; None: it was not built. triton: why Triton cannot be used,
    or None. The implementations of the ops run too, as far as they can without values: down to the launch.
    """

    def __init__(
        self, gpu: Gpu, devices: int = 1, archs: list[tuple[int, int]] | None = None, triton: str | None = "left out"
    ) -> None:
        self.gpu, self.devices, self.archs, self.triton = gpu, devices, archs, triton
        self.events: list[Event] = []
        self.calls: list[str] = []
        self.launches: Counter[str] = Counter()
        self.launched_on: set[int] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> FakeGpu:
        enter, before = self._stack.enter_context, torch._C._only_lift_cpu_tensors()
        self.current = enter(told(self.gpu, self.devices))
        extension = None if self.archs is None else Extension(self)
        enter(mock.patch.object(native, "extension", return_value=extension))
        native._probe.cache_clear()
        self._stack.callback(native._probe.cache_clear)
        if self.triton is not None:
            enter(mock.patch.object(native, "why_no_triton", return_value=self.triton))
        enter(mock.patch.object(FakeTensor, "data_ptr", address, create=True))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the CPU, then copied
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        self._memory = enter(_Memory(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def for_compiler(self) -> Iterator[None]:
        """Inside the block torch.compile can trace, which it refuses under modes that are not torch's own: every tensor is
        fake, and nothing is watched."""
        self._memory.__exit__(None, None, None)
        try:
            # cuDNN's grid sampling has shapes on no device but a real one (_SHAPES), and no part in the network.
            with self._memory.fake, torch.backends.cudnn.flags(enabled=False):
                yield
        finally:
            self._memory.__enter__()

    @contextlib.contextmanager
    def watch(self) -> Iterator[list[Event]]:
        """The events of the block."""
        self.events.clear()
        self.calls.clear()
        yield self.events


class Extension:
    """Stands for the compiled module: counts what is launched."""

    def __init__(self, owner: FakeGpu) -> None:
        self._owner = owner

    def archs(self) -> list[tuple[int, int]]:
        return self._owner.archs or []

    def probe(self) -> str:
        return ""

    def __getattr__(self, name: str) -> Any:
        if not name.endswith(("_fwd", "_bwd")):
            raise AttributeError(name)

        def launcher(*args: Any) -> None:
            assert all(isinstance(a, int | float) for a in args), args
            self._owner.launches[name] += 1
            self._owner.launched_on.add(self._owner.current[-1])

        return launcher


def address(tensor: FakeTensor) -> int:
    """Of the first element, in memory that begins at a multiple of 512 bytes as the allocator's does."""
    return 0 if tensor.numel() == 0 else (1 << 30) + tensor.storage_offset() * tensor.element_size()


class _Memory(TorchDispatchMode):
    """Operations on the device's tensors are done by shape, the others as ever."""

    def __init__(self, owner: FakeGpu) -> None:
        super().__init__()
        self.owner, self.fake = owner, FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.ours if func.namespace == "ect" else self.torchs)(func, args, dict(kwargs or {}))

    def ours(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An op of ect_kernels: what implements it runs, and the result is that of its shapes."""
        if not self.note(func, args, kwargs, None):
            return func(*args, **kwargs)
        with self, torch.no_grad():
            implementation(str(func))(*args, **kwargs)
        with self.fake:
            return func(*args, **kwargs)

    @resting
    def torchs(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One of torch's operations."""
        if func.namespace == "prim":
            return func(*args, **kwargs)
        kwargs.pop("pin_memory", None)  # host memory that no driver has to know
        device = kwargs.get("device")
        wanted = None if device is None else torch.device(device).type
        on_gpu = self.note(func, args, kwargs, wanted)
        if on_gpu and func in _READS:
            return _READS[func](args[0])
        if func is aten.copy_.default and on_gpu and args[0].device.type != "cuda":
            return args[0].fill_(1)
        if func is aten.is_pinned.default:
            return False
        if not on_gpu and wanted != "cuda":
            return func(*args, **kwargs)
        with self.fake:
            out = _SHAPES.get(func, func)(*args, **kwargs)
        return out if wanted != "cpu" else tree_map_only(FakeTensor, _read, out)

    def note(self, func: Any, args: Any, kwargs: Any, wanted: str | None) -> bool:
        """Write an operation down, with what is wrong in it. Whether one of its tensors is on the device."""
        lists = (a if isinstance(a, list | tuple) else (a,) for a in (*args, *kwargs.values()))
        name, tensors = str(func), [t for some in lists for t in some if isinstance(t, Tensor)]
        self.owner.calls.append(name)
        if (kind := _fault(func, name, tensors, wanted)) is not None:
            shapes = ", ".join(f"{t.device.type} {tuple(t.shape)}" for t in tensors[:4])
            self.owner.events.append(Event(kind, name, shapes))
        return any(t.device.type == "cuda" for t in tensors)


_READS: dict[Any, Callable[[Tensor], Any]] = {
    aten._local_scalar_dense.default: lambda t: 1.0 if t.dtype.is_floating_point else t.dtype == torch.bool or 1,
    aten.equal.default: lambda t: True,
}

# What torch has shapes of on no device but a real one.
_SHAPES: dict[Any, Callable[..., Any]] = {
    aten.cudnn_grid_sampler.default: lambda x, grid: x.new_empty((*x.shape[:2], *grid.shape[1:3])),
}


def _read(tensor: FakeTensor) -> Tensor:
    """What a copy on the host has in it."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).fill_(1)


def implementation(name: str) -> Callable[..., Any]:
    """What runs on the device for an op ect.<name>.default."""
    return registry.FUNCTIONS[name.split(".")[1]]


def _fault(func: Any, name: str, tensors: list[Tensor], wanted: str | None) -> str | None:
    """The kind of event that an operation is, or None."""
    kinds = {t.device.type for t in tensors}
    by_number = name.startswith("aten.index") and all(t.dtype not in (torch.bool, torch.uint8) for t in tensors[1:])
    if name.startswith("aten.lift_fresh"):
        return "host data"
    if torch.Tag.data_dependent_output in func.tags:
        return "host read" if "cuda" in kinds else "host work"
    if torch.Tag.dynamic_output_shape in func.tags and not by_number:
        return "data-dependent shape"
    if func in (aten._to_copy.default, aten.copy_.default) and len(kinds | ({wanted} if wanted else set())) > 1:
        return "host copy"
    if len(kinds) > 1:
        return "mixed devices"
    if kinds == {"cpu"} or (not tensors and wanted != "cuda" and func.namespace == "aten"):
        return "host work"
    return None
