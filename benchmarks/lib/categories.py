"""The time of a step by category, from torch.profiler: every operation or kernel belongs to one.

On a CPU an operation takes the category of the outermost enclosing one whose name says something (aten::add_ within
RAdam's step is the optimizer's), with its self time; on a GPU a kernel is classified by its name. Names that inductor
makes list the operations fused into a kernel. What no name places is `other`; the time in which nothing runs is `host`.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

CATEGORIES = ("conv", "norm", "residual", "attention", "optimizer", "other", "host")
# In order: the first pattern found in a name decides. conv: with all matrix products; norm: with SiLU, dropout and embedding.
_RULES = [
    ("optimizer", r"optimizer|radam|multi_tensor_apply|_foreach_|nan_to_num|lerp"),
    ("norm", r"group_norm|GroupNorm|RowwiseMoments|ComputeFusedParams|ComputeInternalGradients|ComputeBackwardFused"),
    ("norm", r"Silu|silu|dropout|bernoulli"),
    ("attention", r"scaled_dot_product|ScaledDotProduct|softmax|Softmax|flash|fmha|attention"),
    ("other", r"perturb|consistency_loss|levels_fwd|ect::levels"),
    ("conv", r"skip_product|AddSkip"),
    (
        "residual",
        r"(cpp|triton_\w+?)_fused\w*_(add|cat|mul)",
    ),  # before conv: fused names list the convolution they follow
    ("other", r"(cpp|triton_\w+?)_fused"),
    ("conv", r"conv|Conv|cudnn|xmma|cutlass|gemm|gemv|nchwToNhwc|nhwcToNchw|wgrad|dgrad|fprop|cublas|splitK"),
    ("conv", r"aten::(linear|mm|addmm|matmul|bmm)$|MmBackward|AddmmBackward"),
    ("residual", r"aten::(add|add_|cat|mul|mul_|div|div_)$|(Add|Mul|Cat|Div)Backward|CatArray|Functor_add|MulFunctor"),
]
_PATTERNS = [(category, re.compile(pattern)) for category, pattern in _RULES]
# Operations that touch no memory, or only ask for it: no launches.
_FREE = re.compile(
    r"aten::(_?unsafe_view|_?reshape\w*|view\w*|as_strided\w*|expand\w*|permute|transpose|t|select|slice|narrow|split\w*|chunk"
    r"|unbind|squeeze|unsqueeze|flatten|detach\w*|alias|empty\w*|new_empty\w*|resize_|resolve\w+|result_type|to|set_|numpy_T"
    r"|lift_fresh|contiguous|item|is_nonzero|_has_compatible_shallow_copy_type)$|^detach"
)


@dataclass
class Profile:
    """A step under the profiler.

    share: of its wall clock, by category. launches: kernels on a GPU; on a CPU, the operations that call no other and
    move data. transient: most bytes allocated above what lived before the step (CPU only).
    """

    share: dict[str, float]
    launches: int
    transient: int


def category(name: str) -> str | None:
    """Return the category of an operation's or kernel's name, None where the name says nothing."""
    return next((category for category, pattern in _PATTERNS if pattern.search(name)), None)


def take(step: Callable[[], Any], device: torch.device, calls: int = 1) -> Profile:
    """Profile `calls` of `step`, or one where that takes more than a second; the shares are medians."""
    wall, taken = _once(step, device)
    runs = [taken] + [_once(step, device)[1] for _ in range(0 if wall > 1e6 else calls - 1)]
    medians = {name: statistics.median(run.share[name] for run in runs) for name in CATEGORIES}
    total = sum(medians.values())
    return replace(taken, share={name: value / total for name, value in medians.items()})


def _once(step: Callable[[], Any], device: torch.device) -> tuple[float, Profile]:
    """Return the microseconds of one call, and its profile."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    whole = torch.profiler.record_function("whole step")
    with profile(activities=activities, profile_memory=not gpu) as trace, whole:
        step()
        if gpu:
            torch.cuda.synchronize(device)
    events = list(trace.events() or [])
    wall = next(e for e in events if e.name == "whole step" and e.device_type == DeviceType.CPU).time_range.elapsed_us()
    times = dict.fromkeys(CATEGORIES, 0.0)
    for key, microseconds in _gpu(events) if gpu else _cpu(events):
        times[key] += microseconds
    times["host"] = max(wall - sum(times.values()), 0.0)
    total = sum(times.values())
    share = {name: value / total for name, value in times.items()}
    return wall, Profile(share, _launches(events, gpu), 0 if gpu else _transient(trace))


def _gpu(events: Iterable[Any]) -> Iterable[tuple[str, float]]:
    return [(category(e.name) or "other", e.time_range.elapsed_us()) for e in events if _is_kernel(e)]


def _is_kernel(event: Any) -> bool:
    """Return whether this is a kernel, copy or fill on the device; ranges of record_function are none."""
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def _cpu(events: Iterable[Any]) -> Iterable[tuple[str, float]]:
    memo: dict[int, str | None] = {}

    def outermost(event: Any) -> str | None:
        if event is None:
            return None
        if event.id not in memo:
            memo[event.id] = outermost(event.cpu_parent) or category(event.name)
        return memo[event.id]

    for event in events:
        if event.name in ("whole step", "[memory]"):
            continue
        if _is_frame(event.name) and outermost(event) is None:
            continue  # Python between operations: host
        yield outermost(event) or "other", event.self_cpu_time_total


def _is_frame(name: str) -> bool:
    """Return whether this is a range that encloses operations and does nothing itself."""
    return not name.startswith(("aten::", "ect::", "mkldnn::", "autograd::", "graph_", "cpp_"))


def _launches(events: Iterable[Any], gpu: bool) -> int:
    if gpu:
        return sum(_is_kernel(event) for event in events)
    return sum(
        not [child for child in event.cpu_children if not _FREE.search(child.name)]
        and event.name not in ("whole step", "[memory]")
        and not _is_frame(event.name)
        and not event.name.startswith("autograd::")
        and not _FREE.search(event.name)
        for event in events
    )


def _transient(trace: profile) -> int:
    """Return the peak of the running sum of allocations and releases."""
    assert trace.profiler is not None
    results: Any = trace.profiler.kineto_results
    steps = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    live = peak = 0
    for _, size in steps:
        live += size
        peak = max(peak, live)
    return peak
