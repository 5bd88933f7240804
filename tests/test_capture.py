"""An update can be captured into a CUDA graph: nothing in it waits for the host, or changes but through device memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ect.assembly import flat_state, network_spec
from ect.config import Config, DataConfig, NetConfig, OptimConfig
from ect.data import ImageStream, load
from ect.models import build
from ect.models.guided import Guided
from ect.objective import ConsistencyObjective, DiffusionObjective, Objective
from ect.objectives.distillation import ConsistencyDistillation
from ect.step import TrainStep
from ect.tangent.network import Features
from tests.audit import Audit, faults, watch_references
from tests.tiny import NET

DATA = load(DataConfig(labels=True))
BATCH = 8
FEATURES = Features(8, 1).requires_grad_(False)


WHOLE = replace(NET, channel_mult=(1, 2), attn_resolutions=(4,), label_dropout=0.2)
EDM2 = replace(WHOLE, arch="edm2-narrow", model_channels=16)  # which writes to its weights before the passes


def make(
    objective: Objective | None = None, on_ops: bool = True, precision: str = "fp32", net_cfg: NetConfig = WHOLE,
    **options: Any,
) -> TrainStep:  # fmt: skip
    torch.manual_seed(0)
    spec = network_spec(net_cfg, "ECMPrecond", DATA, 9 if options.get("augment") else 0)
    net = build(spec).train()
    net.model.on_ops = on_ops
    optim = OptimConfig(lr=1e-3, emas=(".9", "rel:.05"), clip=1.0)
    cfg = Config(precision=precision, optim=optim)  # type: ignore[arg-type]
    step = {"seed": 1, "batch": BATCH, **options}
    if (guidance := step.pop("guidance", None)) is not None:
        step["teacher"] = Guided(copy.deepcopy(net).eval().requires_grad_(False), guidance)
    return TrainStep(
        objective or ConsistencyObjective(), flat_state(cfg, net), ImageStream(DATA, 1, batch=BATCH), **step
    )


STEPS: dict[str, dict[str, Any]] = {
    "fused": {},
    "fused, flips, accumulation": {"xflip": True, "micro_batch": 2},
    "fused, fp16": {"precision": "fp16"},
    "fused, bf16": {"precision": "bf16", "micro_batch": 4},
    "augmented": {"augment": 0.5, "xflip": True},
    "diffusion": {"objective": DiffusionObjective()},
    "diffusion, augmented, fp16": {"objective": DiffusionObjective(), "augment": 0.5, "precision": "fp16"},
    "along features, flips, accumulation": {
        "objective": ConsistencyObjective(distance=FEATURES.distance),
        "xflip": True,
        "micro_batch": 4,
    },
    "a guided teacher": {"objective": ConsistencyDistillation(), "guidance": 2.0, "micro_batch": 4},
    "EDM2": {"net_cfg": EDM2, "on_ops": False},
    "EDM2, fp16, accumulation": {"net_cfg": EDM2, "precision": "fp16", "micro_batch": 4},
    "plain": {"on_ops": False},
    "plain, augmented": {"on_ops": False, "augment": 0.5, "micro_batch": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_an_update_can_be_captured(name: str) -> None:
    assert faults(make(**STEPS[name])) == []


@pytest.mark.slow
@pytest.mark.usefixtures("pytorch_ops")
@pytest.mark.parametrize("name", ["fused, fp16", "augmented"])
def test_so_it_can_where_an_op_falls_back_to_its_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = Audit()
    watch_references(audit, monkeypatch.setattr)
    make(**STEPS[name]).update()
    assert len(audit.calls) > 1000
    assert audit.faults == []


def _rebind_loss(step: TrainStep) -> None:
    step.mean_loss = step.mean_loss + 0


def _rebind_arena(step: TrainStep) -> None:
    step.state.moments["exp_avg"] = step.state.moments["exp_avg"].clone()


def _count_on_the_host(step: TrainStep) -> None:
    step.updates = getattr(step, "updates", 0) + 1  # type: ignore[attr-defined]
    step.mean_loss.mul_(step.updates)  # type: ignore[attr-defined]


def _branch_on_the_host(step: TrainStep) -> None:
    _count_on_the_host(step)
    if step.updates % 2:  # type: ignore[attr-defined]
        step.mean_loss.zero_()


def _pass_on(step: TrainStep) -> None:
    previous = getattr(step, "previous", step.mean_loss)
    step.previous = step.mean_loss + previous  # type: ignore[attr-defined]


FAULTS: dict[str, tuple[str, Callable[[TrainStep], object]]] = {
    "item": ("host read", lambda step: step.mean_loss.item()),
    "float": ("host read", lambda step: float(step.state.params[0])),
    "is_nonzero": ("host read", lambda step: step.mean_loss.is_nonzero()),
    "if": ("host read", lambda step: 1 if step.mean_loss > 0 else 0),
    "equal": ("host read", lambda step: torch.equal(step.state.params, step.state.grads)),
    "nonzero": ("data-dependent shape", lambda step: step.state.grads.nonzero()),
    "masked_select": ("data-dependent shape", lambda step: step.state.grads.masked_select(step.state.grads > 0)),
    "unique": ("data-dependent shape", lambda step: step.state.grads.unique()),
    "mask index": ("data-dependent shape", lambda step: step.state.grads[step.state.grads > 0]),
    "mask assignment": ("data-dependent shape", lambda step: step.state.grads.__setitem__(step.state.grads > 9, 0)),
    "repeat": ("data-dependent shape", lambda step: torch.ones(2).repeat_interleave(torch.ones(2, dtype=torch.int64))),
    "tensor": ("host data", lambda step: torch.tensor(3.0)),
    "as_tensor": ("host data", lambda step: step.mean_loss + torch.as_tensor([1.0, 2.0])),
    "list index": ("host data", lambda step: step.state.params[[0, 2]]),
    "to": ("device copy", lambda step: step.state.params.to("meta")),
    "copy_": ("device copy", lambda step: torch.empty_like(step.state.params, device="meta").copy_(step.state.params)),
    "new loss": ("state storage", _rebind_loss),
    "new arena": ("state storage", _rebind_arena),
    "host number": ("another update", _count_on_the_host),
    "host branch": ("another update", _branch_on_the_host),
    "new memory passed on": ("other memory", _pass_on),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_audit_finds_a_planted_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the network, so that the smallest one will do."""
    kind, plant = FAULTS[name]
    step = make(net_cfg=NET)
    update = step.update

    def broken() -> None:
        update()
        plant(step)

    monkeypatch.setattr(step, "update", broken)
    found = faults(step)
    assert found and any(text.startswith(kind) for text in found), found


@pytest.mark.slow
@pytest.mark.usefixtures("pytorch_ops")
def test_the_audit_sees_into_the_reference_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    from ect_kernels import perturb

    original = perturb.reference_fwd

    def broken(i: perturb.Inputs) -> perturb.Output:
        float(i.t[0])
        return original(i)

    op, audit = perturb.OP, Audit()
    reference = replace(op.backends["reference"], fwd=broken)
    monkeypatch.setattr(op, "backends", {**op.backends, "reference": reference})
    watch_references(audit, monkeypatch.setattr)
    make(net_cfg=NET).update()
    assert audit.faults and all(text.startswith("host read") for text in audit.faults)
