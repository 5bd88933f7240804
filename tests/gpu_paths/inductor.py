"""The U-Net through Dynamo, AOTAutograd and Inductor for a GPU that is not there, down to the code that would run. Prints one
JSON object.

    python -m tests.gpu_paths.inductor '{"gpus": ["A100"], "cases": {"a name": {"arch": "ddpmpp", "precision": "fp16"}}}'

Run by test_inductor.py in processes of its own. What of torch is mocked is here and in fake_gpu.told, and nowhere else.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from unittest import mock

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch
import torch._dynamo.device_interface as device_interface
import torch._dynamo.utils
import torch._inductor.fx_passes.fuse_attention as fuse_attention
import torch._inductor.fx_passes.misc_patterns as misc_patterns
import torch._inductor.fx_passes.pad_mm as pad_mm
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.compile_fx import _recursive_joint_graph_passes, _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from triton.runtime import driver

from tests.gpu_paths import cases
from tests.gpu_paths.fake_gpu import GPUS, FakeGpu, Gpu, told
from tests.gpu_paths.launches import Driver

Graph = torch.fx.GraphModule
CONVOLUTIONS = ("extern_kernels.convolution(", "aten.convolution_backward", "convolution_backward(")
NAME = re.compile(r"\b(?:buf|primals_|tangents_|arg)\w+\b")  # of a tensor in Inductor's code
RUN = re.compile(r"\s*(triton_\w+)\.run\((.*)\)")
KERNEL = re.compile(r"(triton_\w+) = async_compile\.triton\(.*?, '''(.*?)'''", re.S)


class Stop(Exception):
    """The graphs are there; they need not run."""


@contextlib.contextmanager
def inductor_on(gpu: Gpu) -> Iterator[None]:
    """Inductor as it would be on a machine with this GPU."""
    driver.set_active(Driver(gpu))
    interface = device_interface.CudaInterface
    answers: list[tuple[Any, str, Any]] = [
        (interface, "is_available", staticmethod(lambda: True)),
        (interface, "get_compute_capability", staticmethod(lambda device=None: gpu.arch)),
        (interface, "current_device", staticmethod(lambda: 0)),
        (interface, "get_device_properties", staticmethod(gpu.properties)),
        (interface, "is_triton_capable", staticmethod(lambda device=None: True)),
        (interface, "raise_if_triton_unavailable", staticmethod(lambda device=None: None)),
        (interface.Worker, "get_device_properties", staticmethod(gpu.properties)),
        (interface.Worker, "current_device", staticmethod(lambda: 0)),
        (torch._dynamo.utils, "preserve_rng_state", contextlib.nullcontext),
        # Patterns are made by tracing on a real device.
        (fuse_attention, "_sfdp_init", lambda *args, **kwargs: None),
        (pad_mm, "_pad_mm_init", lambda *args, **kwargs: None),
        (misc_patterns, "_misc_patterns_init", lambda *args, **kwargs: None),
    ]
    with contextlib.ExitStack() as stack:
        for where, name, answer in answers:
            stack.enter_context(mock.patch.object(where, name, answer))
        # Folding constants computes them on the device.
        stack.enter_context(config.patch({"compile_threads": 1, "joint_graph_constant_folding": False}))
        yield


class Backend:
    """Of torch.compile: what Dynamo made runs as it is. dynamo: its graphs. forward, backward: of the latest, as Inductor's
    passes before the partition leave them."""

    forward: Graph
    backward: Graph

    def __init__(self) -> None:
        self.dynamo: list[Graph] = []

    def __call__(self, graph: Graph, inputs: Any) -> Callable[..., Any]:
        self.dynamo.append(graph)

        def partition(joint: Graph, args: Any, **options: Any) -> Any:
            values = [n.meta["val"] for n in joint.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
            with V.set_fake_mode(detect_fake_mode(values)):
                _recursive_joint_graph_passes(joint)
            parts = min_cut_rematerialization_partition(joint, args, compiler="inductor", **options)
            self.forward, self.backward = parts
            raise Stop

        backend = aot_autograd(
            fw_compiler=_run, bw_compiler=_run, partition_fn=partition, decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )  # fmt: skip
        with contextlib.suppress(Stop):
            backend(graph, inputs)
        return graph.forward

    def on_ops(self) -> bool:
        """Whether there are ops of ours in Dynamo's graphs, or in the parts that they hold."""
        parts = [part for graph in self.dynamo for part in graph.modules() if isinstance(part, Graph)]
        return any(str(node.target).startswith("ect.") for part in parts for node in part.graph.nodes)


def _run(graph: Graph, inputs: Any) -> Any:
    return make_boxed_func(graph)


def traced(function: Callable[..., Any], *inputs: Any) -> Backend:
    """A call under torch.compile."""
    backend = Backend()
    torch.compile(function, fullgraph=True, dynamic=False, backend=backend)(*inputs)
    return backend


def lowered(graph: Graph, backward: bool) -> tuple[str, GraphLowering]:
    """Inductor's code of a graph, and what it made the code from."""
    inputs = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
    with V.set_fake_mode(detect_fake_mode(inputs)), V.set_debug_handler(DebugContext()):
        _recursive_post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(graph, example_inputs=inputs, is_inference=False, is_backward=backward)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            code = lowering.codegen()
    code = code[0] if isinstance(code, tuple) else code
    return str(getattr(code, "value", code)), lowering


def zero_images(graph: Graph) -> list[str]:
    """4-D tensors of one value that a graph fills, and who reads them; ones are factors of arithmetic, which Inductor writes
    nowhere."""
    return [
        f"{node.target} {tuple(node.meta['val'].shape)} for {', '.join(sorted(str(user.target) for user in node.users))}"
        for node in graph.graph.nodes
        if node.op == "call_function" and re.search("zeros|full|ones", str(node.target)) and node.meta["val"].dim() == 4
        and node.users and 1 not in node.args[1:2]
    ]  # fmt: skip


def copies_round_convolutions(code: str) -> list[str]:
    """Kernels that only move values from one layout to another, to or from a convolution."""
    calls = code[code.index("def call(") :].splitlines()
    touched = {name for line in calls if any(c in line for c in CONVOLUTIONS) for name in NAME.findall(line)}
    for line in calls:  # results of a convolution's backward by their place: buf3 = buf2[0]
        if (part := re.match(r"\s*(\w+) = (\w+)\[\d\]", line)) is not None and part[2] in touched:
            touched.add(part[1])
    moves = {name for name, source in KERNEL.findall(code) if only_moves(source)}
    runs = [(match[1], set(NAME.findall(match[2]))) for line in calls if (match := RUN.match(line)) is not None]
    return [name for name, given in runs if name in moves and given & touched]


def only_moves(source: str) -> bool:
    """Whether a kernel stores what it loaded, in the same dtype."""
    values = re.findall(r"^\s*(tmp\d+) = (.*)$", source, re.M)
    stores = re.findall(r"tl\.store\((\w+) \+ .*, (tmp\d+), ", source)
    types = dict(re.findall(r"'((?:in|out)_ptr\d+)': '(\*\w+)'", source))
    loads = {name: match[1] for name, value in values if (match := re.match(r"tl\.load\((\w+) ", value)) is not None}
    return len(loads) == len(values) > 0 and all(types.get(to) == types.get(loads[value]) for to, value in stores)


def operations(code: str) -> Counter[str]:
    """What runs, by name; Inductor's own kernels as 'triton'."""
    calls = code[code.index("def call(") :].splitlines()
    pattern = r"\s*(?:\w+ = )?(?:(?:extern_kernels|torch\.ops\.aten|torch\.ops\.ect)\.(\w+)|(triton)_\w+\.run\()"
    found = [match for line in calls if (match := re.match(pattern, line)) is not None]
    return Counter(match[1] or match[2] for match in found)


def updates(case: dict[str, Any], fake: FakeGpu) -> Backend:
    """Two updates of two micro-batches each, whose network is compiled."""
    step, backend = cases.step(**case, accumulation=True), Backend()
    step.compiled = True
    step.net.model.compile(fullgraph=True, dynamic=False, backend=backend)
    with closing(step.stream), fake.for_compiler():
        assert len(step.starts) == 2
        step.update()
        step.update()
    return backend


def planted(fake: FakeGpu) -> Backend:
    """A convolution whose input lies otherwise than its weight, and a backward that fills an image with zeros."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x[:, :8].clone()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return torch.cat([dy, torch.zeros_like(dy)], 1)

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(x, weight, padding=1).cos() + Half.apply(x.sin()).repeat(1, 2, 1, 1)

    weight = torch.zeros(16, 3, 3, 16, device="cuda").permute(0, 3, 1, 2)
    inputs = torch.zeros(2, 16, 16, 16, device="cuda").requires_grad_(), weight.requires_grad_()
    with fake.for_compiler():
        return traced(function, *inputs)


def found(gpus: list[Gpu], case: dict[str, Any]) -> dict[str, Any]:
    """What became of a case."""
    torch._dynamo.reset()
    with FakeGpu(gpus[0], archs=cases.BUILT) as fake, inductor_on(gpus[0]):
        backend = planted(fake) if case.get("plant") else updates(case, fake)
    zeros = zero_images(backend.backward)
    answer: dict[str, Any] = {"graphs": len(backend.dynamo), "on ops": backend.on_ops(), "zeros": zeros}
    for gpu in gpus:
        graphs = {way: copy.deepcopy(getattr(backend, way)) for way in ("forward", "backward")}
        with told(gpu), inductor_on(gpu):
            codes = {way: lowered(graph, way == "backward")[0] for way, graph in graphs.items()}
        copies = {way: copies_round_convolutions(code) for way, code in codes.items()}
        answer[f"sm_{gpu.arch}"] = {"copies": copies, "runs": {way: operations(code) for way, code in codes.items()}}
    return answer


def main(request: dict[str, Any]) -> dict[str, Any]:
    gpus = [GPUS[name] for name in request["gpus"]]
    return {name: found(gpus, case) for name, case in request["cases"].items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(json.loads(sys.argv[1]))))
