"""The rows of benchmarks/step_time.py: from the public design's step to this project's, one change a row.

The first row is public_step.PublicStep, the public code's own operations, which all ratios are to; the next ones are
baseline.PlainStep; `+fused ops` is ect.step.TrainStep with the public design's optimizer; from `+flat
optimizer` on, everything is built by the functions that the trainer itself uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ect import precision
from ect.assembly import build_objective, flat_state, network_spec, train_step
from ect.config import Config, DataConfig
from ect.config.emas import beta_of
from ect.data import Dataset, ImageStream, load
from ect.models import EDMPrecond, build
from ect.objective import ConsistencyObjective
from ect.presets import PRESETS
from ect.step import TrainStep
from lib import public_net
from lib.baseline import ParameterState, PlainStep
from lib.public_step import PublicStep

STAGE = 0
Step = PublicStep | PlainStep | TrainStep


@dataclass(frozen=True)
class Case:
    """A network with its recipe and data. kimg: length of the recipe that predicted minutes refer to."""

    name: str
    cfg: Config
    dataset: Dataset

    @property
    def kimg(self) -> float:
        return self.cfg.total_kimg

    def spec(self) -> dict[str, Any]:
        """Return the description of the network, as model files have it."""
        return network_spec(self.cfg.net, "ECMPrecond", self.dataset, 0)

    def network(self, device: torch.device) -> EDMPrecond:
        torch.manual_seed(0)
        net = build(self.spec())
        for p in net.parameters():  # public checkpoints are trained: no weight is near zero
            if p.dim() > 1 and float(p.detach().std()) < 1e-3:
                torch.nn.init.xavier_uniform_(p)
        return net.to(device).train()

    def objective(self) -> ConsistencyObjective:
        objective = build_objective(self.cfg.objective, self.cfg.net.sigma_data)
        assert isinstance(objective, ConsistencyObjective)
        return objective


def case(net: str, device: torch.device, batch: int | None = None) -> Case:
    """Return the case 'digits' (batch 64), or 'ddpmpp', the network of cifar10-1h on random images (128; on a CPU 4)."""
    if net == "digits":
        cfg = PRESETS["digits"]
        dataset = load(DataConfig())
    else:
        cfg = replace(PRESETS["cifar10-1h"], batch=128 if device.type == "cuda" else 4)
        images = torch.randint(256, (1024, 32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        dataset = Dataset("random", images, None)
    return Case(net, replace(cfg, batch=batch or cfg.batch), dataset)


@dataclass(frozen=True)
class Row:
    """A row of the waterfall.

    name: as printed. precision: of the step, and which products torch may take in TF32. build: makes the step of a case
    on a device. not_on: device types it makes no sense on. captured: into a CUDA graph.
    """

    name: str
    precision: str
    build: Callable[[Case, torch.device], Step]
    not_on: tuple[str, ...] = ()
    captured: bool = False


class Runner:
    """Calls a row's step with the next images, under the row's precision settings."""

    def __init__(self, row: Row, case: Case, device: torch.device) -> None:
        self.precision = precision.PRECISIONS[row.precision]
        precision.apply(self.precision)
        self.step, self.batch, self.calls = row.build(case, device), case.cfg.batch, itertools.count()

    def __call__(self) -> Tensor:
        precision.apply(self.precision)
        return self.step(next(self.calls) * self.batch, STAGE)

    def resident(self) -> int:
        """Return the bytes of the state between steps."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.step.tensors()}
        return sum(storages.values())


def _public(case: Case, device: torch.device) -> PublicStep:
    optim, spec = case.cfg.optim, case.spec()
    net = public_net.denoiser(spec["kwargs"], spec["sigma_data"], case.network(torch.device("cpu")).state_dict())
    return PublicStep(
        net.to(device), case.objective(), case.dataset.images, batch=case.cfg.batch, lr=optim.lr, betas=optim.betas,
        ema_beta=beta_of(optim.emas[0]),
    )  # fmt: skip


def _plain(**options: bool) -> Callable[[Case, torch.device], Step]:
    def make(case: Case, device: torch.device) -> PlainStep:
        optim = case.cfg.optim
        return PlainStep(
            case.network(device), case.objective(), case.dataset.images, batch=case.cfg.batch, lr=optim.lr,
            betas=optim.betas, ema_beta=beta_of(optim.emas[0]), **options,
        )  # fmt: skip

    return make


def _stream(case: Case, device: torch.device) -> ImageStream:
    return ImageStream(case.dataset, case.cfg.seed, device, case.cfg.batch)


def _fused(case: Case, device: torch.device) -> TrainStep:
    net, optim = case.network(device).to(memory_format=torch.channels_last), case.cfg.optim
    half, core = precision.PRECISIONS["fp16"].half, net.half_weights()
    state: Any = ParameterState(
        net, lr=optim.lr, betas=optim.betas, ema_beta=beta_of(optim.emas[0]), half=half, core=core
    )  # the part of FlatState that TrainStep uses
    return train_step(replace(case.cfg, compile=False, graph=False), state, _stream(case, device))


def _own(**options: Any) -> Callable[[Case, torch.device], Step]:
    def make(case: Case, device: torch.device) -> TrainStep:
        cfg = replace(case.cfg, **options)
        return train_step(cfg, flat_state(cfg, case.network(device)), _stream(case, device))

    return make


def teacher_rows(device: torch.device) -> list[Row]:
    """Return the compiled step with its teacher's pass under no_grad, and as the trainer has it, on the student's graph.

    ect.step says why it has it so.
    """
    half: Literal["fp16", "fp32"] = "fp16" if device.type == "cuda" else "fp32"

    def build(on_students: bool) -> Callable[[Case, torch.device], Step]:
        def make(case: Case, device: torch.device) -> TrainStep:
            cfg = replace(case.cfg, precision=half, channels_last=True, compile=True, graph=False)
            step = train_step(cfg, flat_state(cfg, case.network(device)), _stream(case, device))
            step.compiled = on_students  # the network is compiled either way
            return step

        return make

    return [Row("under no_grad", half, build(False)), Row("on the student's graph", half, build(True))]


def rows(device: torch.device) -> list[Row]:
    """Return all rows in order; those that make no sense on `device` say so in not_on.

    The CPU stays in fp32, for its half precision is emulated. From `+flat optimizer` on its network runs on the ops where
    they were built in C++, but for `+compile`, which fuses PyTorch's own operations.
    """
    gpu = device.type == "cuda"
    half = "fp16" if gpu else "fp32"
    options: dict[str, Any] = {"precision": half, "channels_last": True}
    return [
        Row("public", "fp32", _public),
        Row("plain", "fp32", _plain()),
        Row("+tf32", "tf32", _plain(), ("cpu",)),
        Row("+channels-last", "tf32", _plain(channels_last=True)),
        Row("+fp16", "tf32", _plain(channels_last=True, half=True), ("cpu",)),
        Row("+fused ops", "fp16", _fused, ("cpu",)),
        Row("+flat optimizer", half, _own(**options, compile=False, graph=False)),
        Row("+graph", half, _own(**options, compile=False, graph=True), ("cpu",), captured=True),
        Row("+compile", half, _own(**options, compile=True, graph=gpu), captured=gpu),
        Row("trainer's default", half, _own(), ("cuda",)),  # on a GPU, in a short run, that is "+graph"
    ]


def compile_rows(device: torch.device) -> tuple[str, str]:
    """Return the rows without and with torch.compile, alike in all else."""
    return "+graph" if device.type == "cuda" else "+flat optimizer", "+compile"
