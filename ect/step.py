"""TrainStep: one update, top to bottom, without a host synchronisation; the same code on CPU, GPU and meta device.

Random draws are pure functions of (run seed, step, index in the batch): micro-batches and ranks equal one large batch to fp32
rounding, and a resume needs no generator state. All that changes is on the device: one CUDA graph serves the whole run.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ect_kernels import philox
from torch import Tensor, nn

from ect.data.augment import AugmentPipe
from ect.data.stream import ImageStream, to_float
from ect.models import EDMPrecond, MaskKey, fused
from ect.objective import Denoiser, Draw, Objective
from ect.optim import FlatState
from ect.ranks.distributed import World

WARM_UP = 3  # updates before a capture: libraries choose algorithms and allocate workspaces in the first ones


class TrainStep:
    """One update of the weights, called with (nimg, stage): it trains on the images nimg ... nimg + batch of the stream.

    A call returns the mean loss over this rank's images, a 0-d tensor that the next call overwrites.

    Args: state: its `compute` is the preconditioned network in train mode. objective: what to minimise. stream: uint8 images.
    seed: the run's. batch, micro_batch: images an update (all ranks together), and a forward pass. xflip: mirror half the
    images. augment: probability of EDM's augmentations. compiled: run the network through torch.compile. graph: capture the
    update into a CUDA graph at the first call. teacher: a frozen network in eval mode, or the posterior mean over the images,
    for an objective that wants one; it is never compiled. Raises ValueError where the objective wants one and gets none, or
    gets one that it does not want.
    """

    def __init__(
        self, objective: Objective, state: FlatState[EDMPrecond], stream: ImageStream, *,
        seed: int, batch: int, micro_batch: int | None = None, xflip: bool = False, augment: float = 0.0,
        compiled: bool = False, graph: bool = False, world: World = World(),
        teacher: Callable[..., Tensor] | None = None,
    ) -> None:  # fmt: skip
        wanted = objective.wants_teacher or objective.wants_data
        if wanted != (teacher is not None):
            raise ValueError(f"{type(objective).__name__} takes {'a' if wanted else 'no'} teacher")
        self.objective, self.state, self.stream, self.world = objective, state, stream, world
        self.seed, self.batch = seed, batch
        share = batch // world.size
        self.micro_batch = micro_batch or share
        self.starts = range(world.rank * share, (world.rank + 1) * share, self.micro_batch)
        several = len(self.starts) > 1 or self.starts[0] > 0
        self.net, self.teacher, self.xflip = state.compute, teacher, xflip
        self.use(compiled, graph)
        device = state.params.device
        self.augment = AugmentPipe(augment).to(device) if augment > 0 else None
        self.key, self.stage = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        # What the ops read n0 from: on the device, or torch.compile would make a graph for each micro-batch.
        firsts = torch.arange(self.starts.start, self.starts.stop, self.starts.step, device=device).unbind()
        self.firsts: list[Tensor | int] = list(firsts) if several else [0]
        self.mean_loss = torch.zeros((), device=device)

    def use(self, compiled: bool, graph: bool) -> None:
        """Choose, from the next call on, whether torch.compile runs the network, and whether the update is captured."""
        self.compiled, self.wants_graph = compiled, graph
        self.graphs: list[torch.cuda.CUDAGraph] = []
        model = self.net.model
        if not compiled:
            model._compiled_call_impl = None  # torch offers no other way back
        elif model._compiled_call_impl is None:
            model.compile(fullgraph=True, dynamic=False)

    def __call__(self, nimg: int, stage: int) -> Tensor:
        self.stream.seek(nimg)
        self.key.fill_((self.seed << 32) | (nimg // self.batch))  # the run's seed is the high half of the Philox key
        self.stage.fill_(stage)
        if self.wants_graph and not self.graphs and (reason := self.capture()) is not None:
            self.wants_graph = False
            warnings.warn(f"the update cannot be captured into a CUDA graph, and runs without: {reason}", stacklevel=2)
        for i, graph in enumerate(self.graphs):
            if i > 0:
                self.world.sum_(self.state.grads)
            graph.replay()
        if not self.graphs:
            self.update()
        return self.mean_loss

    def update(self) -> None:
        """Update all of `tensors()` once, from the images and scalars that __call__ put in place."""
        self.gradients()
        self.world.sum_(self.state.grads)
        self.state.step()

    def gradients(self) -> None:
        """Do the update's first part: compute the mean loss and the gradients of this rank's images."""
        scale = self.mean_loss.new_full((), 1 / self.batch)
        if self.state.loss_scale is not None:
            scale = scale * self.state.loss_scale
        self.mean_loss.zero_()
        self.net.model.begin_step()
        for i in range(len(self.starts)):
            loss = self.loss(i).sum()
            grads = torch.autograd.grad(loss, self.state.inputs, scale, materialize_grads=True)
            self.state.load_grads(grads, add=i > 0)
            self.mean_loss += loss.detach() / (self.batch // self.world.size)

    def loss(self, i: int) -> Tensor:
        """Compute the loss of each sample, [micro_batch], of the i-th micro-batch."""
        images, labels = self.stream.batch(self.starts[i], self.micro_batch)
        n0, net, objective = self.firsts[i], self.net, self.objective
        mask = MaskKey(self.key, n0)
        on_ops = fused.wanted(net.runs_on_ops, self.state.params)
        if on_ops and self.augment is None and net.is_edm:
            unet = self.bind(net.model, labels, None, mask)
            fast = objective.fast_loss(unet, net.sigma_data, images, self.key, n0, self.stage, self.xflip)
            if fast is not None:
                return fast
        y, augment_labels = self.prepare(images, n0)
        inputs: dict[str, Any] = {name: self.draw(draw, y, n0) for name, draw in objective.draws.items()}
        if self.teacher is not None:
            inputs["teacher"] = partial(self.teacher, class_labels=labels, augment_labels=augment_labels)
        denoiser = self.bind(net, labels, augment_labels, mask)
        return objective.train_loss(denoiser, y, stage=self.stage, **inputs)

    def bind(self, module: nn.Module, labels: Tensor | None, augment_labels: Tensor | None, mask: MaskKey) -> Denoiser:
        """Return the network, or its U-Net, as a function of images and noise level, which rounds alike without gradients."""

        def call(x: Tensor, level: Tensor) -> Tensor:
            student = torch.is_grad_enabled()
            # A graph compiled without gradients rounds differently, which is noise on D_t - D_r: D_r runs the student's.
            with torch.set_grad_enabled(student or self.compiled):
                out: Tensor = module(x, level, labels, augment_labels, mask)
            return out if student else out.detach()

        return call

    def draw(self, draw: Draw, y: Tensor, n0: Tensor | int) -> Tensor:
        """Draw the fp32 numbers that an objective declares, for images y [n, C, H, W]; ect.objective.Draw has their shape."""
        size = y[0].numel() if draw.size is None else draw.size
        numbers = philox.normal(self.key, draw.stream, n0, len(y), size, y.device)
        if draw.size is None:
            return numbers.view(y.shape)
        return numbers.view(-1) if size == 1 else numbers

    def flips(self, n: int, n0: Tensor | int) -> Tensor | None:
        """Draw which of n images to mirror, bool [n]; None: none of them."""
        u = philox.uniform(self.key, philox.STREAM_FLIP, n0, n, 1, self.key.device) if self.xflip else None
        return None if u is None else u.view(n) < 0.5

    def prepare(self, images: Tensor, n0: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """Turn uint8 [n, H, W, C] into fp32 [n, C, H, W] in [-1, 1], flipped and augmented, and augmentation labels [n, 9]."""
        n, device = len(images), images.device
        y = to_float(images, self.flips(n, n0))
        if self.augment is None:
            return y, None
        uniform = philox.uniform(self.key, philox.STREAM_AUGMENT_UNIFORM, n0, n, self.augment.uniforms, device)
        normal = philox.normal(self.key, philox.STREAM_AUGMENT_NORMAL, n0, n, self.augment.normals, device)
        return self.augment(y, uniform, normal)

    def tensors(self) -> list[Tensor]:
        """Return every tensor that update() writes and that outlives it."""
        return [*self.state.tensors(), self.mean_loss, *self.objective.tensors()]

    def parts(self) -> list[Callable[[], None]]:
        """Return the update in pieces, each of which becomes a CUDA graph.

        With several ranks the sum over them stays between two graphs: no device has shown yet that NCCL's can be captured.
        """
        return [self.update] if self.world.size == 1 else [self.gradients, self.state.step]

    def warm_up(self, updates: int = WARM_UP) -> None:
        """Run updates, without the sum over ranks, then put everything back."""
        saved = [tensor.clone() for tensor in self.tensors()]
        try:
            for _ in range(updates):
                for part in self.parts():
                    part()
        finally:
            torch._foreach_copy_(self.tensors(), saved)

    def capture(self) -> str | None:
        """Record `parts()` into CUDA graphs, which later calls replay.

        Returns None, or why that failed: then everything is as it was, and an update runs without graphs.
        """
        device = self.state.params.device
        try:
            self.graphs = self._captured(device)
            return None
        except Exception as error:  # out of memory, or anything that a library does not do while it is captured
            first: BaseException = error  # the end of a broken capture fails too, with less to say
            while first.__context__ is not None:
                first = first.__context__
            reason = f"{type(first).__name__}: {(str(first).splitlines() or [''])[0]}"
            del first
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # of the memory that the graphs held: with `error` they are gone
        return reason

    def _captured(self, device: torch.device) -> list[torch.cuda.CUDAGraph]:
        gc.collect()  # autograd nodes of a step before, kept by a cycle, would hold that step's stream
        graphs: list[torch.cuda.CUDAGraph] = []
        side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # a capture that breaks would leave its own stream the current one
            self.warm_up()
            for part in self.parts():
                graph, pool = torch.cuda.CUDAGraph(), graphs[0].pool() if graphs else None
                with torch.cuda.graph(graph, pool, side, "thread_local"):  # other threads: images, NCCL
                    part()
                graphs.append(graph)
        current.wait_stream(side)
        return graphs
