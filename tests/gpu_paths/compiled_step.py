"""What the compiled step of DDPM++ launches and moves: the U-Net as in Inductor's code for a GPU that is not there, the rest of
the update as ect.cost.footprint counts it. Prints a table, and the totals as one JSON object.

    python -m tests.gpu_paths.compiled_step '{"images": 128}'
    python -m tests.gpu_paths.compiled_step '{"preset": "imagenet64-s"}'                 (EDM2-S; "blocks": 1 is faster)

A convolution, product or attention is one launch, whatever its library makes of it; all else as launched. The traffic of an op
is its inputs and outputs, that of Inductor's own kernels what its scheduler says that they read and write. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_iter, tree_map

from ect.assembly import flat_state, network_spec, train_step
from ect.cost.footprint import Footprint, bytes_moved, launches
from ect.cost.trace import Event, trace
from ect.data import Dataset, ImageStream
from ect.models import MaskKey, build
from ect.presets import PRESETS
from ect.step import TrainStep
from tests.gpu_paths import cases, inductor
from tests.gpu_paths.fake_gpu import GPUS, FakeGpu, told

IMAGES, SIZES = 128, {"cifar10-1h": 32, "imagenet64-s": 64}
INDUCTOR, RESAMPLING = "Inductor's own kernels", "Inductor's own kernels: resampling"
WEIGHTS = "Inductor's own kernels: weights and vectors"
RESAMPLES = re.compile("avg_pool2d|_unsafe_index|upsample")


@dataclass
class Cost:
    """launches and bytes by name. between: bytes that all kernels between the convolutions move at the least: they write what a
    convolution reads and read what it writes, and to come back they read what it read once more. fused: bytes that Inductor's
    own kernels would move if those that nothing parts were one: each of their inputs read once, and of their results those
    written that others read."""

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    between: int = 0
    fused: Counter[str] = field(default_factory=Counter)

    def add(self, other: Cost, times: int = 1) -> None:
        for _ in range(times):
            self.between += other.between
            self.fused.update(other.fused)
            self.launches.update(other.launches)
            self.bytes.update(other.bytes)

    def table(self) -> str:
        names = sorted(self.bytes, key=lambda name: -self.bytes[name])
        lines = [f"{name:45}  {self.launches[name]:8}  {self.bytes[name] / 1e9:8.3f}" for name in names]
        return "\n".join([f"{'':45}  launches  GB moved", *lines])


def step(device: str, images: int, preset: str, blocks: int | None) -> TrainStep:
    """Of a recipe in fp16; blocks: of the network at each resolution, where not the recipe's."""
    cfg = replace(PRESETS[preset], batch=images, precision="fp16", channels_last=True, compile=False, graph=False)
    if blocks is not None:  # of a named size's network, whose name stands for another number
        arch: Any = cfg.net.arch.split("-")[0]
        cfg = replace(cfg, net=replace(cfg.net, arch=arch, num_blocks=blocks))
    size = SIZES[preset]
    labels = torch.empty(50_000, 1000, device=device) if cfg.data.labels else None
    data = Dataset(preset, torch.empty(50_000, size, size, 3, dtype=torch.uint8, device=device), labels)
    with torch.device(device):
        net = build(network_spec(cfg.net, "ECMPrecond", data, 0)).train()
    net.model.on_ops = True
    return train_step(cfg, flat_state(cfg, net), ImageStream(data, 0, device, images))


def of_images(node: Any, images: int) -> bool:
    """Whether a kernel of Inductor's reads or writes images, of which there are so many, and not only weights or vectors."""
    buffers = (V.graph.try_get_buffer(dep.name) for dep in node.read_writes.reads_and_writes())
    sizes = [buffer.get_size() for buffer in buffers if buffer is not None]
    return any(len(size) > 2 and size[0] == images for size in sizes)


def fused_bytes(nodes: list[Any], results: set[str], images: int) -> Counter[str]:
    """Of the scheduler's nodes: what the own kernels among them, by name, would move at the least, fused wherever no library's
    kernel lies between. results: names of the buffers that the graph returns.

    Two kernels are taken as one where they share a buffer and have as many of the library's kernels before them.
    """
    level: dict[str, int] = {}  # of a buffer: the library's kernels before who reads it
    readers: dict[str, set[int]] = {}
    moved: dict[int, dict[str, int]] = {}
    group: dict[tuple[int, str], set[int]] = {}  # of (level, buffer): the kernels that are one
    for i, node in enumerate(nodes):
        reads, writes = ([dep.name for dep in deps] for deps in (node.read_writes.reads, node.read_writes.writes))
        at = max((level.get(name, 0) for name in reads), default=0)
        library = isinstance(node, ExternKernelSchedulerNode)
        part = library and type(node.node).__name__ == "MultiOutput"  # a name for one of a library's results
        level.update((name, at + (library and not part)) for name in [*writes, *node.get_buffer_names()])
        for name in reads:
            readers.setdefault(name, set()).add(i)
        if not library:
            moved[i] = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
            merged = {i}.union(*(group.get((at, name), ()) for name in moved[i]))
            for key in {(at, name) for j in merged for name in moved[j]}:
                group[key] = merged
    total: Counter[str] = Counter()
    for kernels in {id(kernels): kernels for kernels in group.values()}.values():
        written = {name for i in kernels for name in nodes[i].get_buffer_names()}
        sizes: Counter[str] = Counter()
        for i in kernels:
            for name, size in moved[i].items():
                inner = name in written and name not in results and readers.get(name, set()) <= kernels
                sizes[name] = 0 if inner else max(sizes[name], size)
        total[INDUCTOR if any(of_images(nodes[i], images) for i in kernels) else WEIGHTS] += sum(sizes.values())
    return total


def of_graph(graph: torch.fx.GraphModule, backward: bool, images: int) -> tuple[Cost, list[Tensor]]:
    """Of a graph lowered by Inductor, and the graph's results."""
    code, lowering = inductor.lowered(graph, backward)
    cost, runs = Cost(), inductor.operations(code)
    cost.launches[INDUCTOR] = runs.pop("triton")
    with V.set_graph_handler(lowering):
        cost.fused = fused_bytes(lowering.scheduler.nodes, set(lowering.get_output_names()), images)
        for node in lowering.scheduler.nodes:
            if not isinstance(node, ExternKernelSchedulerNode):
                origins = {str(origin.target) for part in node.get_nodes() for origin in part.node.origins}
                own = (
                    RESAMPLING
                    if any(map(RESAMPLES.search, origins))
                    else INDUCTOR
                    if of_images(node, images)
                    else WEIGHTS
                )
                cost.bytes[own] += node.get_read_write_buffers_sizes()
    for node in graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        function, name = node.target, node.target._schema.name.split("::")[1]
        adds_nothing = node.kwargs.get("beta") == 0 and not runs[name]  # which Inductor makes a plain product
        function, name = (torch.ops.aten.mm.default, "mm") if name == "addmm" and adds_nothing else (function, name)
        if not runs[name]:
            continue
        args, kwargs = tree_map(
            lambda a: a.meta["val"] if isinstance(a, torch.fx.Node) else a, (node.args, node.kwargs)
        )
        if function is not node.target:
            args, kwargs = args[1:], {}
        event = Event.of(function, args, kwargs, node.meta["val"])
        if name in ("convolution", "convolution_backward"):
            images_of = (*args[: 1 if name == "convolution" else 2], *tree_iter(node.meta["val"]))
            cost.between += sum(t.nbytes for t in images_of if isinstance(t, Tensor) and len(t) == images)
        cost.launches[name] += launches(event)
        cost.bytes[name] += bytes_moved(event)
        runs[name] -= 1
    assert not any(runs.values()), f"in the code, but not in the graph: {+runs}; the other way: {-runs}"
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    return cost, [node.meta["val"] for node in tree_iter(output.args) if isinstance(node, torch.fx.Node)]


class Stub(nn.Module):
    """In the U-Net's place: makes its result and gradients, which have the strides that the compiled ones have, of nothing."""

    def __init__(self, unet: nn.Module, grads: list[Tensor]) -> None:
        super().__init__()
        of_kind: dict[Any, list[Tensor]] = {}  # the graph has an order of its own
        for grad in grads:
            of_kind.setdefault((grad.shape, grad.dtype), []).append(grad)
        self.on_ops, self.parameters_, self.begin_step = True, list(unet.parameters()), unet.begin_step
        self.grads = [of_kind[p.shape, p.dtype].pop() for p in self.parameters_]

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        grads = self.grads

        class Nothing(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
                return torch.empty_like(x)

            @staticmethod
            def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
                return None, *(torch.empty_strided(g.shape, g.stride(), dtype=g.dtype, device="meta") for g in grads)

        result: Tensor = Nothing.apply(x, *self.parameters_)
        return result


def main(request: dict[str, Any]) -> dict[str, Any]:
    images, gpu = request.get("images", IMAGES), GPUS["A100"]
    preset, blocks = request.get("preset", "cifar10-1h"), request.get("blocks")
    with FakeGpu(gpu, archs=cases.BUILT) as fake, inductor.inductor_on(gpu):
        made = step("cuda", images, preset, blocks)
        made.stream.close()
        unet, key = made.net.model, made.key
        unet.begin_step()
        labels = torch.zeros(images, unet.label_dim, device="cuda") if unet.label_dim else None
        inputs = (
            torch.zeros(images, SIZES[preset], SIZES[preset], 3, device="cuda").permute(0, 3, 1, 2),
            torch.zeros(images, device="cuda"), labels, None, MaskKey(key, made.firsts[0]),
        )  # fmt: skip
        with fake.for_compiler():
            graphs = inductor.traced(unet, *inputs)
    with told(gpu), inductor.inductor_on(gpu):
        ways = {"forward": of_graph(graphs.forward, False, images)[0]}
        ways["backward"], grads = of_graph(graphs.backward, True, images)
    eager = step("meta", images, preset, blocks)
    eager_cost = Footprint.of(trace(eager.update))
    setattr(eager.net, eager.net.unet_name, Stub(eager.net.model, grads))
    rest = Footprint.of(trace(eager.update))
    total = Cost()
    total.add(ways["forward"], 2)  # the teacher's pass runs the student's graph
    total.add(ways["backward"])
    total.add(
        Cost(
            Counter({name: line.launches for name, line in rest.by_op.items()}),
            Counter({name: line.bytes for name, line in rest.by_op.items()}),
        )
    )
    # Of Inductor's kernels all but the resampling, also what is neither norm nor concat: it would be of no use to split them.
    norms = sum(size for name, size in total.bytes.items() if "norm" in name or name in ("sum_rows", INDUCTOR, WEIGHTS))
    print(total.table())
    blocks = sum(eager_cost.traffic[name] for name in ("norm", "activation", "dropout", "residual", "concat"))
    return {
        "launches": {"compiled": sum(total.launches.values()), "eager": eager_cost.launches},
        "GB": {"compiled": sum(total.bytes.values()) / 1e9, "eager": sum(eager_cost.traffic.values()) / 1e9},
        "norm to concat, GB": {"compiled": norms / 1e9, "eager": blocks / 1e9},
        "between convolutions, at least, GB": total.between / 1e9,
        "Inductor's own, GB": sum(total.bytes[name] for name in (INDUCTOR, RESAMPLING, WEIGHTS)) / 1e9,
        "if all were fused, GB": {name: size / 1e9 for name, size in total.fused.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=json.loads, nargs="?", default={}, help="a JSON object")
    print(json.dumps(main(parser.parse_args().settings)))
