"""TrainStep: one update, top to bottom, without a host synchronisation; the same code on CPU, GPU and meta device.
Random draws are pure functions of (run seed, step, index in the batch): micro-batches and ranks equal one large batch to fp32
rounding, and a resume needs no generator state. All that changes is on the device: one CUDA graph serves the whole run.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import torch
from ect_kernels import philox
from ect_kernels.consistency_loss import consistency_loss
from ect_kernels.levels import levels
from ect_kernels.perturb import perturb
from torch import Tensor

from ect.data.augment import AugmentPipe
from ect.data.stream import ImageStream, to_float
from ect.models import EDMPrecond, MaskKey, fused
from ect.objective import WEIGHTINGS, ConsistencyObjective, Objective
from ect.optim import FlatState
from ect.ranks.distributed import World

WARM_UP = 3  # updates before a capture: libraries choose algorithms and allocate workspaces in the first ones


class TrainStep:
    """Calling it with (nimg, stage) trains on the images nimg ... nimg + batch of the stream, and returns the mean loss over
    this rank's images, a 0-d tensor that the next call overwrites.

    Args: state: its `compute` is the preconditioned network in train mode. objective: what to minimise. stream: uint8 images.
    seed: the run's. batch, micro_batch: images an update (all ranks together), and a forward pass. xflip: mirror half the
    images. augment: probability of EDM's augmentations. compiled: run the network through torch.compile. graph: capture the
    update into a CUDA graph at the first call.
    """

    def __init__(
        self, objective: Objective, state: FlatState[EDMPrecond], stream: ImageStream, *,
        seed: int, batch: int, micro_batch: int | None = None, xflip: bool = False, augment: float = 0.0,
        compiled: bool = False, graph: bool = False, world: World = World(),
    ) -> None:  # fmt: skip
        self.objective, self.state, self.stream, self.world = objective, state, stream, world
        self.seed, self.batch = seed, batch
        share = batch // world.size
        self.micro_batch = micro_batch or share
        self.starts = range(world.rank * share, (world.rank + 1) * share, self.micro_batch)
        several = len(self.starts) > 1 or self.starts[0] > 0
        self.net, self.xflip = state.compute, xflip
        self.use(compiled, graph)
        device = state.params.device
        self.augment = AugmentPipe(augment).to(device) if augment > 0 else None
        self.key, self.stage = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        # What the ops read n0 from: on the device, or torch.compile would make a graph for each micro-batch.
        firsts = torch.arange(self.starts.start, self.starts.stop, self.starts.step, device=device).unbind()
        self.firsts: list[Tensor | int] = list(firsts) if several else [0]
        self.mean_loss = torch.zeros((), device=device)

    def use(self, compiled: bool, graph: bool) -> None:
        """From the next call on run the network through torch.compile or not, and capture the update or not."""
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
        """One update of `tensors()`, from the images and scalars that __call__ put in place."""
        self.gradients()
        self.world.sum_(self.state.grads)
        self.state.step()

    def gradients(self) -> None:
        """The update's first part: mean loss and gradients of this rank's images."""
        scale = self.mean_loss.new_full((), 1 / self.batch)
        if self.state.loss_scale is not None:
            scale = scale * self.state.loss_scale
        self.mean_loss.zero_()
        for i in range(len(self.starts)):
            loss = self.loss(i).sum()
            grads = torch.autograd.grad(loss, self.state.inputs, scale, materialize_grads=True)
            self.state.load_grads(grads, add=i > 0)
            self.mean_loss += loss.detach() / (self.batch // self.world.size)

    def loss(self, i: int) -> Tensor:
        """Per-sample loss [micro_batch] of the i-th micro-batch."""
        images, labels = self.stream.batch(self.starts[i], self.micro_batch)
        n0 = self.firsts[i]
        on_ops = fused.wanted(self.net.runs_on_ops, self.state.params)
        if on_ops and self.augment is None and isinstance(self.objective, ConsistencyObjective):
            return self.fused_loss(self.objective, images, labels, n0)
        y, augment_labels = self.prepare(images, n0)
        normal = philox.normal(self.key, philox.STREAM_T, n0, len(y), 1, y.device).view(-1)
        eps = philox.normal(self.key, philox.STREAM_EPS, n0, len(y), y[0].numel(), y.device).view(y.shape)
        mask = MaskKey(self.key, n0)

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            student = torch.is_grad_enabled()
            with torch.set_grad_enabled(student or self.compiled):  # as in fused_loss
                D_x = self.net(x, sigma, labels, augment_labels, mask)
            return D_x if student else D_x.detach()

        return self.objective.train_loss(denoiser, y, normal, eps, self.stage)

    def fused_loss(
        self, objective: ConsistencyObjective, images: Tensor, labels: Tensor | None, n0: Tensor | int
    ) -> Tensor:
        """What objective.train_loss computes, on the ops: two launches from uint8 images to the U-Net's inputs, and one from
        its outputs to loss and gradient. A test holds the two equal."""
        sigma_data, m = objective.sigma_data, objective.mapping
        settings = (objective.P_mean, objective.P_std, m.q, m.k if m.kind == "sigmoid" else 0.0, m.b)
        t, r, label_t, label_r, flip = levels(self.key, self.stage, n0, len(images), *settings)
        in_t, in_r, x_t, x_r = perturb(images, t, r, sigma_data, self.key, n0, flip if self.xflip else None)
        mask, unet = MaskKey(self.key, n0), self.net.model
        # A graph compiled without gradients rounds differently, which is noise on D_t - D_r: the teacher runs the student's.
        with torch.set_grad_enabled(self.compiled):
            F_r = unet(in_r, label_r, labels, None, mask).detach()
        F_t = unet(in_t, label_t, labels, None, mask)
        w = WEIGHTINGS[objective.weighting](t, r, sigma_data)
        return consistency_loss(F_t, F_r, x_t, x_r, t, r, w, objective.c, sigma_data)

    def flips(self, n: int, n0: Tensor | int) -> Tensor | None:
        """Which images to mirror, bool [n]; None: none."""
        u = philox.uniform(self.key, philox.STREAM_FLIP, n0, n, 1, self.key.device) if self.xflip else None
        return None if u is None else u.view(n) < 0.5

    def prepare(self, images: Tensor, n0: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """uint8 [n, H, W, C] -> (float32 [n, C, H, W] in [-1, 1], flipped and augmented; augmentation labels [n, 9])."""
        n, device = len(images), images.device
        y = to_float(images, self.flips(n, n0))
        if self.augment is None:
            return y, None
        uniform = philox.uniform(self.key, philox.STREAM_AUGMENT_UNIFORM, n0, n, self.augment.uniforms, device)
        normal = philox.normal(self.key, philox.STREAM_AUGMENT_NORMAL, n0, n, self.augment.normals, device)
        return self.augment(y, uniform, normal)

    def tensors(self) -> list[Tensor]:
        """Every tensor that update() writes and that outlives it."""
        return [*self.state.tensors(), self.mean_loss]

    def parts(self) -> list[Callable[[], None]]:
        """The update in pieces, a CUDA graph each: with several ranks the sum over them stays between two graphs, for no device
        has shown yet that NCCL's sums can be captured."""
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
        """Record `parts()` into CUDA graphs, which later calls replay. Returns None, or why not: then everything is as it was,
        and an update runs without graphs."""
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
