"""TrainStep: accumulation equals one batch, draws follow the global index, every option reaches the maths."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ect.assembly import flat_state, network_spec
from ect.config import Config, DataConfig, OptimConfig
from ect.data import ImageStream, load
from ect.models import EDMPrecond, build
from ect.objective import ConsistencyObjective, DiffusionObjective, Mapping, Objective
from ect.optim import FlatState
from ect.ranks.distributed import World
from ect.step import TrainStep
from tests.tiny import NET

DATA = load(DataConfig(labels=True))


def make(objective: Objective | None = None, **options: Any) -> TrainStep:
    torch.manual_seed(0)
    net_options = options.pop("net", {})
    dataset = options.pop("dataset", replace(DATA, labels=None))
    spec = network_spec(replace(NET, **net_options), "ECMPrecond", dataset, 9 if options.get("augment") else 0)
    net = build(spec).train()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    optim = OptimConfig("adam", lr=1e-3)
    state = flat_state(Config(precision=options.pop("precision", "fp32"), optim=optim), net)
    step = {"seed": 1, "batch": 12, **options}
    return TrainStep(objective or ConsistencyObjective(), state, ImageStream(dataset, 1, batch=step["batch"]), **step)


def put(step: TrainStep, nimg: int, stage: int) -> None:
    """What a call does before the update."""
    step.stream.seek(nimg)
    step.key.fill_((step.seed << 32) | (nimg // step.batch))
    step.stage.fill_(stage)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [ConsistencyObjective(), DiffusionObjective()])
@pytest.mark.parametrize(
    "options", [{}, {"xflip": True, "augment": 0.5, "dataset": DATA, "net": {"label_dropout": 0.3}}]
)
@pytest.mark.parametrize("micro_batch", [1, 3, 6])
def test_accumulation_equals_one_batch(objective: Objective, options: dict, micro_batch: int) -> None:
    whole, parts = make(objective, **options), make(objective, **options, micro_batch=micro_batch)
    for nimg in (0, 12):
        assert float(parts(nimg, 3)) == pytest.approx(float(whole(nimg, 3)), rel=1e-5)
        assert (parts.state.grads - whole.state.grads).norm() < 1e-4 * whole.state.grads.norm()


def test_the_loss_is_the_reference_objective_of_the_prepared_images() -> None:
    step = make(net={"dropout": 0.0})
    captured: dict[str, torch.Tensor] = {}

    class Spy(Objective):
        def train_loss(self, denoiser, y, normal, eps, stage):  # type: ignore[no-untyped-def]
            captured.update(y=y, normal=normal, eps=eps)
            return ConsistencyObjective().train_loss(denoiser, y, normal, eps, stage)

    step.objective = Spy()
    put(step, 36, 2)
    got = step.loss(0)
    images, _ = step.stream.batch(0, 12)
    assert torch.equal(captured["y"], images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    t = (-1.1 + 2.0 * captured["normal"]).exp()
    objective = ConsistencyObjective()
    want = objective.loss(step.net, captured["y"], t, objective.mapping(t, 2), captured["eps"])
    torch.testing.assert_close(got, want)


def test_the_fast_form_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss equals the other's, so that nothing else would tell."""

    class Own(ConsistencyObjective):
        """A subclass, which has none."""

    prepared: list[Any] = []
    original = TrainStep.prepare
    monkeypatch.setattr(TrainStep, "prepare", lambda *args: prepared.append(args) or original(*args))
    for objective, count in ((ConsistencyObjective(), 0), (Own(), 1)):
        step = make(objective)
        step.net.model.on_ops = True
        step(0, 0)
        assert len(prepared) == count


def test_draws_change_with_step_seed_and_sample() -> None:
    losses = {(seed, nimg): float(make(seed=seed)(nimg, 3)) for seed in (1, 2) for nimg in (0, 12)}
    assert len(set(losses.values())) == 4
    assert losses[1, 12] == float(make(seed=1)(12, 3))


def test_every_step_draws_new_noise_levels_and_noise_from_streams_of_their_own() -> None:
    step, seen = make(), []

    class Spy(Objective):
        def train_loss(self, denoiser, y, normal, eps, stage):  # type: ignore[no-untyped-def]
            seen.append((normal, eps))
            return y.flatten(1).sum(1)

    step.objective = Spy()
    for number in (0, 1):
        put(step, 12 * number, 0)
        step.loss(0)
    (normal, eps), (other_normal, other_eps) = seen
    assert not torch.equal(normal, other_normal) and not torch.equal(eps, other_eps)
    assert not torch.equal(normal, eps.flatten(1)[:, 0])


def test_augmentation_labels_reach_the_network() -> None:
    step, seen = make(augment=0.9), []
    forward = step.net.model.forward
    step.net.model.forward = lambda *args: seen.append(args[3]) or forward(*args)  # type: ignore[func-returns-value]
    step(0, 0)
    assert len(seen) == 2 and seen[0].shape == (12, 9) and (seen[0] != 0).any()


@pytest.mark.parametrize("nimg", [0, 12, 120])
def test_the_key_holds_seed_and_step(nimg: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    original = TrainStep.loss

    def loss(self: TrainStep, n0: int) -> torch.Tensor:
        keys.append(int(self.key))
        return original(self, n0)

    monkeypatch.setattr(TrainStep, "loss", loss)
    make(seed=7)(nimg, 0)
    assert keys == [(7 << 32) | (nimg // 12)]


def test_flips_and_augmentation_change_the_images_and_label_them() -> None:
    images = DATA.images[:64]
    plain, _ = make().prepare(images, 0)
    flipped, labels = make(xflip=True).prepare(images, 0)
    assert labels is None
    mirrored = (flipped == plain.flip(3)).flatten(1).all(1)
    same = (flipped == plain).flatten(1).all(1)
    assert (mirrored | same).all() and 16 < int((mirrored & ~same).sum()) < 48
    augmented, labels = make(augment=0.5).prepare(images, 0)
    assert labels is not None and labels.shape == (64, 9)
    untouched = (labels == 0).all(1)
    assert 0 < int(untouched.sum()) < 64
    assert torch.equal(augmented[untouched], plain[untouched])
    assert not torch.equal(augmented[~untouched], plain[~untouched])


def test_labels_reach_the_network() -> None:
    step, seen = make(dataset=DATA), []
    forward = step.net.model.forward
    step.net.model.forward = lambda *args: seen.append(args[2]) or forward(*args)  # type: ignore[func-returns-value]
    step(0, 0)
    assert len(seen) == 2 and torch.equal(seen[0], step.stream.batch(0, 12)[1])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_student_and_teacher_share_the_mask_and_agree_at_r_equal_t(dropout: float) -> None:
    class Same:
        """A mapping with r = t."""

        def __call__(self, t: torch.Tensor, stage: int) -> torch.Tensor:
            return t

    step = make(ConsistencyObjective(mapping=Same(), weighting="uniform"), net={"dropout": dropout})  # type: ignore[arg-type]
    assert float(step(0, 0)) == 0.0
    assert (step.state.grads == 0).all()


@pytest.mark.slow
def test_training_lowers_the_diffusion_loss() -> None:
    step = make(DiffusionObjective(), batch=32)
    step.state.lr = 3e-3
    losses = [float(step(i * 32, 0)) for i in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.slow
def test_tuning_on_gaussian_data_finds_the_exact_consistency_function() -> None:
    """Data N(0, 1/4): the probability-flow solution is f(x, t) = x / (2 sqrt(t^2 + 1/4)) (identity of the method)."""

    class Net(torch.nn.Module):
        label_dim = 0

        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(3, 64),
                torch.nn.SiLU(),
                torch.nn.Linear(64, 64),
                torch.nn.SiLU(),
                torch.nn.Linear(64, 1),
            )

        def forward(self, x, noise_labels, *_):  # type: ignore[no-untyped-def]
            x_, c = x.flatten(1), noise_labels.expand(len(x))[:, None]
            u = torch.cat([x_, c, x_ * c], dim=1)
            return self.layers(u).view_as(x)

    D = EDMPrecond(Net()).train()
    state = FlatState(D, "adam", lr=3e-3, ema_betas=[0.99])
    # A large c makes the pseudo-Huber a squared distance, whose minimiser is the mean, as the exact solution needs.
    objective = ConsistencyObjective(c=10.0, P_mean=-0.5, P_std=1.5)
    steps = 2400
    for i in range(steps):
        g = torch.Generator().manual_seed(i)
        y, normal, eps = 0.5 * torch.randn(256, 1, 1, 1, generator=g), *torch.randn(2, 256, generator=g)
        state.lr = 3e-3 * (1 - i / steps)
        loss = objective.train_loss(D, y, normal, eps.view(-1, 1, 1, 1), min(i // 300, 7)).mean()
        state.load_grads(torch.autograd.grad(loss, state.inputs))
        state.step()
    D.load_state_dict(state.ema_state_dict(0))
    for t in (0.2, 1.0, 5.0, 20.0):
        x = torch.linspace(-2, 2, 41).view(-1, 1, 1, 1) * (t * t + 0.25) ** 0.5
        with torch.no_grad():
            error = D(x, t) - x * 0.5 / (t * t + 0.25) ** 0.5
            mean = x * 0.25 / (t * t + 0.25)  # the diffusion denoiser, which a consistency model must leave behind
        assert float(error.square().mean().sqrt()) < 0.08, t
        gap = x * 0.5 / (t * t + 0.25) ** 0.5 - mean
        assert float(error.square().mean()) < 0.1 * float(gap.square().mean()) or t < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("c", [0.0, 0.06])
@pytest.mark.parametrize("options", [{}, {"xflip": True, "dataset": DATA, "micro_batch": 4}])
def test_the_fused_step_equals_the_readable_one(c: float, options: dict) -> None:
    objective = ConsistencyObjective(c=c, weighting="inverse_c_out_sq")
    plain, fused = make(objective, **options), make(objective, **options)
    plain.net.model.on_ops, fused.net.model.on_ops = False, True
    for stage in (0, 3):  # with and without rows of r = 0
        assert float(fused(0, stage)) == pytest.approx(float(plain(0, stage)), rel=1e-5)
        torch.testing.assert_close(fused.state.grads, plain.state.grads, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_half_precision_step_follows_fp32(half: torch.dtype) -> None:
    name = "fp16" if half == torch.float16 else "bf16"
    want, got = (make(precision=name, net={"dropout": 0.2}) for name in ("fp32", name))
    want.net.model.on_ops = True
    for i in range(3):
        assert float(got(12 * i, 2)) == pytest.approx(float(want(12 * i, 2)), rel=0.02)
    scale = 1.0 if got.state.loss_scale is None else float(got.state.loss_scale)
    assert (scale > 1) == (half == torch.float16) and int(got.state.skipped) == 0
    error = (got.state.grads / scale - want.state.grads).norm() / want.state.grads.norm()
    assert 1e-5 < float(error) < 0.1  # it is rounded, and no more than that
    seen = set()
    for layer in got.net.modules():
        if isinstance(layer, torch.nn.Module) and getattr(layer, "kernel", 0):
            seen.add((layer.weight.dtype, layer in (got.net.model.enc["8x8_conv"], got.net.model.dec["8x8_aux_conv"])))
    assert seen == {(half, False), (torch.float32, True)}


def test_an_overflow_skips_the_step_and_the_next_one_works() -> None:
    step = make(precision="fp16")
    step.state.loss_scale.fill_(2.0**31)
    before = step.state.params.clone()
    step(0, 2)
    assert torch.equal(step.state.params, before)
    assert (int(step.state.skipped), float(step.state.loss_scale)) == (1, 2.0**30)
    assert int(step.state.nonfinite) > 0
    step.state.loss_scale.fill_(2.0**10)
    step(12, 2)
    assert not torch.equal(step.state.params, before) and int(step.state.skipped) == 1


def test_warm_up_leaves_no_trace() -> None:
    step, fresh = make(), make()
    put(step, 0, 2)
    step.warm_up(2)
    for i in range(2):
        assert torch.equal(step(12 * i, 2), fresh(12 * i, 2))
    assert torch.equal(step.state.params, fresh.state.params)
    assert torch.equal(step.state.rule.state_f64, fresh.state.rule.state_f64)


@pytest.mark.parametrize(
    "options", [{}, {"xflip": True, "dataset": DATA, "net": {"label_dropout": 0.3, "dropout": 0.2}}]
)
def test_shares_of_two_ranks_add_up_to_one_batch(options: dict) -> None:
    grads = []

    class Part(World):
        def sum_(self, tensor: torch.Tensor) -> None:
            grads.append(tensor.clone())
            tensor.copy_(sum(grads))

    whole, other, mine = make(**options), make(**options, world=Part(0, 2)), make(**options, world=Part(1, 2))
    other(12, 2)
    loss = (mine(12, 2) + other.mean_loss) / 2
    torch.testing.assert_close(loss, whole(12, 2), rtol=1e-5, atol=0)
    torch.testing.assert_close(mine.state.params, whole.state.params, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("on_ops", [True, False])
def test_the_compiled_step_equals_the_eager_one_and_student_equals_teacher(on_ops: bool) -> None:
    same = Mapping("const", q=math.inf)  # r = t
    eager, compiled = make(net={"dropout": 0.2}), make(net={"dropout": 0.2}, compiled=True)
    for step in (eager, compiled):
        step.net.model.on_ops = on_ops
    for i in range(2):
        assert float(compiled(12 * i, i)) == pytest.approx(float(eager(12 * i, i)), rel=1e-5)
        torch.testing.assert_close(compiled.state.grads, eager.state.grads, rtol=1e-3, atol=1e-4)
    compiled.objective = ConsistencyObjective(mapping=same, weighting="uniform")
    assert float(compiled(24, 0)) == 0.0
    assert (compiled.state.grads == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("objective", [ConsistencyObjective(), DiffusionObjective()])
def test_all_micro_batches_share_one_compiled_graph(objective: Objective) -> None:
    """Dynamo specialises on Python numbers: a graph for each micro-batch, until it gives up at the ninth."""
    step, graphs = make(objective, net={"dropout": 0.1}, micro_batch=1), []
    step.net.model.on_ops = True

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    step.net.model.compile(fullgraph=True, dynamic=False, backend=backend)
    step.compiled = True
    step(0, 0)
    assert len(graphs) == 1


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_draws_for_its_own_images(rank: int) -> None:
    """Also where it has one alone: the second rank's is the second of the batch."""
    step = make(batch=3, world=World(rank, 3))
    assert list(map(int, step.firsts)) == [rank]


def test_a_sum_over_ranks_stays_between_two_captures() -> None:
    for size in (1, 2, 3):
        step = make(batch=size, world=World(0, size))
        assert step.parts() == ([step.update] if size == 1 else [step.gradients, step.state.step])
