"""The posterior target: its formula against fp64 sums over all images, with flips and classes; steps and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ect.assembly import build_objective, posterior_mean, train_step
from ect.config import Config, DataConfig, ObjectiveConfig
from ect.cost.memory import predict
from ect.data import Dataset, ImageStream
from ect.data.stream import to_float
from ect.errors import UserError
from ect.objective import Mapping
from ect.objectives import posterior
from ect.objectives.posterior import PosteriorMean, PosteriorTarget
from ect.options import parse
from ect.ranks.distributed import World
from ect.step import TrainStep
from ect.trainer import Trainer
from tests.test_objective_options import assert_near, gradients
from tests.test_step import DATA, make, put
from tests.tiny import config, run

COUNT = 300
IMAGES, LABELS = DATA.images[:COUNT], DATA.labels[:COUNT]  # type: ignore[index]


def noisy(sigma: float, n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Return fp32 images x, their levels and their labels."""
    g = torch.Generator().manual_seed(1)
    x = to_float(IMAGES[:n]) + sigma * torch.randn(n, 1, 8, 8, generator=g)
    return x, torch.full([n], sigma), LABELS[:n]


def by_hand(x: Tensor, sigma: Tensor, labels: Tensor | None, flips: bool) -> Tensor:
    """The mean in fp64, a row at a time."""
    found = []
    for i, row in enumerate(x.double()):
        kept = IMAGES if labels is None else IMAGES[LABELS.argmax(1) == labels[i].argmax()]
        data = kept.permute(0, 3, 1, 2).double() / 127.5 - 1
        if flips:
            data = torch.cat([data, data.flip(3)])
        logits = -(row - data).square().sum((1, 2, 3)) / (2 * float(sigma[i]) ** 2)
        weights = (logits - logits.max()).exp()
        found.append((weights.view(-1, 1, 1, 1) * data).sum(0) / weights.sum())
    return torch.stack(found)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("sigma", [0.02, 0.5, 2.0, 80.0])
def test_it_is_the_mean_over_all_images(
    sigma: float, flips: bool, conditional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, level, labels = noisy(sigma)
    given = labels if conditional else None
    want = by_hand(x, level, given, flips)
    for chunk in (2**24, 64 * 37, 1):
        monkeypatch.setattr(posterior, "CHUNK", chunk)
        mean = PosteriorMean(IMAGES, LABELS if conditional else None, flips)
        got = mean(x, level, given)
        assert got.dtype == torch.float32 and got.shape == x.shape
        torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-5)
    if sigma == 0.02:
        torch.testing.assert_close(got, to_float(IMAGES[: len(x)]), rtol=0, atol=1e-4)  # one image explains it
    if sigma == 2.0:
        for other in ((given, not flips), (None if conditional else labels, flips)):
            assert not torch.allclose(by_hand(x, level, *other), want, atol=0.02)


def test_levels_may_differ_within_a_batch() -> None:
    x, _, _ = noisy(1.0)
    levels = torch.logspace(-2, 1.9, len(x))
    torch.testing.assert_close(
        PosteriorMean(IMAGES)(x, levels).double(), by_hand(x, levels, None, False), rtol=0, atol=5e-5
    )


def test_the_pair_is_a_step_along_the_ode_of_the_data() -> None:
    y, g = to_float(IMAGES[:12]), torch.Generator().manual_seed(0)
    normal, eps = torch.randn(12, generator=g), torch.randn(12, 1, 8, 8, generator=g)
    objective = PosteriorTarget(Mapping(), weighting="uniform")
    t = (-1.1 + 2 * normal).exp()
    r, seen = objective.mapping(t, 1), []

    def student(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return 0.3 * x

    loss = objective.train_loss(student, y, normal, eps, 1, PosteriorMean(IMAGES))
    x_t, (T, R) = y + t.view(-1, 1, 1, 1) * eps, (level.view(-1, 1, 1, 1) for level in (t, r))
    xbar = by_hand(x_t, t, None, False).float()
    x_r = x_t + (R - T) * (x_t - xbar) / T
    torch.testing.assert_close(seen[0], x_r, rtol=1e-4, atol=1e-4)
    target = torch.where(R > 0, 0.3 * x_r, xbar)
    torch.testing.assert_close(loss, (0.3 * x_t - target).flatten(1).norm(dim=1), rtol=1e-3, atol=1e-4)
    assert 0 < int((r == 0).sum()) < 12


def of(on_ops: bool = False, **how: Any) -> TrainStep:
    hard: dict[str, Any] = {"xflip": True, "net": {"label_dropout": 0.3, "dropout": 0.2}}
    dataset = Dataset("digits", IMAGES, LABELS)
    teacher = posterior_mean(Config(data=DataConfig(xflip=True)), ImageStream(dataset, 1))
    made = make(
        build_objective(ObjectiveConfig(target="posterior"), 0.5), dataset=dataset, teacher=teacher, **hard, **how
    )
    made.net.model.on_ops = on_ops
    put(made, 0, 3)
    return made


def test_parts_ranks_and_ops_make_the_same_step() -> None:
    want = gradients(of())
    assert_near(gradients(of(micro_batch=4)), want)
    assert_near(sum(gradients(of(micro_batch=3, world=World(rank, 2))) for rank in range(2)), want)  # type: ignore[arg-type]
    assert_near(gradients(of(on_ops=True)), want)
    assert of().teacher.flips and of().teacher.classes is not None  # type: ignore[union-attr]


def test_a_step_is_made_with_the_streams_own_images() -> None:
    step = make(dataset=Dataset("digits", IMAGES, LABELS))
    cfg = config(
        objective=ObjectiveConfig(target="posterior"),
        data=DataConfig(xflip=True, labels=True),
        batch=12,
        batch_per_device=12,
    )
    made: Any = train_step(cfg, step.state, step.stream).teacher
    assert made.images is step.stream.images and made.flips and torch.equal(made.classes, LABELS.argmax(1))


def test_streamed_images_are_refused() -> None:
    streamed = ImageStream(Dataset("digits", IMAGES, None), 1, batch=4, resident=False)
    with pytest.raises(
        UserError, match=r"--objective\.target posterior: each step reads all images, .*streamed to cpu.*; take a"
    ):
        posterior_mean(Config(), streamed)


def test_what_it_cannot_be_over_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"target posterior: expected another with --data\.augment"):
        parse(["--objective.target", "posterior", "--data.augment", ".1"])
    with pytest.raises(UserError, match=r"target posterior: expected self with --objective\.kind diffusion"):
        parse(["--objective.target", "posterior", "--objective.kind", "diffusion"])
    with pytest.raises(ValueError, match="knows no augmented ones"):
        PosteriorMean(IMAGES)(*noisy(1.0)[:2], None, torch.zeros(12, 9))
    cfg = config(objective=ObjectiveConfig(target="posterior"))
    with pytest.raises(UserError, match=r"digits has label vectors, .* leave out --data\.labels"):
        Trainer(cfg, tmp_path, Dataset("digits", IMAGES, 0.5 * LABELS), torch.device("cpu"))


@pytest.mark.slow
def test_a_run_trains_towards_it(tmp_path: Path) -> None:
    cfg = config(
        objective=ObjectiveConfig(target="posterior", n_stages=4, stage_kimg=0.024), data=DataConfig(labels=True)
    )
    run(cfg, tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.slow
def test_memory_has_room_for_its_sums(tmp_path: Path) -> None:
    dataset = Dataset("digits", IMAGES, None)
    spec = Trainer(config(), tmp_path, dataset, torch.device("cpu")).spec
    alone, both = (
        predict(replace(config(), objective=ObjectiveConfig(target=target)), spec, dataset, torch.device("cpu"), 8)
        for target in ("self", "posterior")
    )
    assert both.state == alone.state and both.launches > alone.launches
