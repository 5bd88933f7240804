"""Objectives against the golden vectors, the identities of the method, and the traps of its public code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ect.models import ECMPrecond, EDMPrecond, SongUNet
from ect.objective import WEIGHTINGS, ConsistencyObjective, DiffusionObjective, Mapping, pseudo_huber
from tests.golden_data import MANIFEST, load, part, rel_l2


def golden_net(name: str, cls: type, prefix: str = "state.") -> tuple[torch.nn.Module, dict[str, Tensor]]:
    g = load(name)
    net = cls(SongUNet(**MANIFEST[name]["kwargs"]))
    net.load_state_dict(part(g, prefix))
    return net.train(), g


@pytest.mark.parametrize("i", range(len(MANIFEST["mapping"]["cases"])))
def test_mapping_matches_golden(i: int) -> None:
    g, case = load("mapping"), MANIFEST["mapping"]["cases"][i]
    mapping = Mapping(case["adj"], case["q"], case["k"], case["b"])
    for stage in (case["stage"], torch.tensor(case["stage"])):
        assert (mapping(g["t"], stage) - g[f"r.{i}"]).abs().max() / g["t"].max() <= 1e-6


@pytest.mark.parametrize("i", range(len(MANIFEST["loss"]["cases"])))
def test_loss_and_gradients_match_golden(i: int) -> None:
    case = MANIFEST["loss"]["cases"][i]
    net, g = golden_net("loss", ECMPrecond)
    objective = ConsistencyObjective(Mapping(case.get("adj", "sigmoid"), case["q"]), c=case["c"])
    t = (objective.P_mean + objective.P_std * g["n"]).exp()
    r = objective.mapping(t, case["stage"])
    assert rel_l2(t, g[f"{i}.t"]) <= 1e-6
    assert rel_l2(r, g[f"{i}.r"]) <= 1e-5
    loss = objective.loss(net, g["images"], t, r, g["eps"])
    assert rel_l2(loss.detach(), g[f"{i}.loss"]) <= 1e-4
    loss.mean().backward()
    grads = {k: p.grad for k, p in net.named_parameters()}
    total = torch.stack([p.norm() for p in grads.values()]).norm()
    assert rel_l2(total, g[f"{i}.grad_norm"]) <= 1e-3
    for key, want in part(g, f"{i}.grad.").items():
        assert rel_l2(grads[key], want) <= 1e-3, key
    torch.testing.assert_close(objective.train_loss(net, g["images"], g["n"], g["eps"], case["stage"]), loss)


def test_diffusion_loss_matches_golden() -> None:
    net, g = golden_net("edm", EDMPrecond)
    objective = DiffusionObjective()
    sigma = (objective.P_mean + objective.P_std * g["n"]).exp()
    loss = objective.loss(net, g["images"], sigma, g["eps"])
    assert rel_l2(loss.detach(), g["loss"]) <= 1e-4
    assert torch.equal(objective.loss(net, g["images"], sigma.view(-1, 1, 1, 1), g["eps"]), loss)
    per_sample = objective.train_loss(net, g["images"], g["n"], g["eps"], 0)
    torch.testing.assert_close(per_sample, loss.sum((1, 2, 3)))
    one = objective.loss(net, g["images"], 0.7, g["eps"])
    torch.testing.assert_close(one, objective.loss(net, g["images"], torch.full([4], 0.7), g["eps"]))


T = torch.tensor([1e-4, 0.1, 1.0, 10.0, 80.0])
RATIOS = {  # q, stage: r/t at t -> 0, 0.1, 1, 10, 80
    (2, 0): [0, 0, 0, 0.49982, 0.5],
    (2, 1): [0, 0, 0.21212, 0.74991, 0.75],
    (4, 0): [0, 0, 0.21212, 0.74991, 0.75],
    (2, 2): [0.375, 0.39998, 0.60606, 0.87495, 0.875],
    (2, 5): [0.92188, 0.925, 0.95076, 0.98437, 0.98438],
    (256, 0): [0.98047, 0.98125, 0.98769, 0.99609, 0.99609],
}


@pytest.mark.parametrize(("q", "stage"), RATIOS)
def test_mapping_ratios(q: float, stage: int) -> None:
    ratio = Mapping(q=q)(T, stage) / T
    torch.testing.assert_close(ratio, torch.tensor(RATIOS[q, stage]), atol=1e-4, rtol=0)


def test_mapping_properties() -> None:
    t = torch.logspace(-3, 2, 400, dtype=torch.float64)
    previous = torch.zeros_like(t)
    for stage in range(8):
        r = Mapping()(t, stage)
        assert ((r >= 0) & (r < t)).all()
        ratio = r / t
        assert (ratio.diff() >= -1e-12).all() and (ratio >= previous).all()
        n = 1 + 8 * torch.sigmoid(-t)
        assert torch.equal(r == 0, n >= 2 ** (stage + 1))
        torch.testing.assert_close(((1 - ratio) * 2 ** (stage + 1))[r > 0], n[r > 0])
        previous = ratio
    torch.testing.assert_close(Mapping(q=256)(t, 0), Mapping(q=2)(t, 7))
    torch.testing.assert_close(Mapping(q=256)(t, 0), Mapping(q=4)(t, 3))
    const = torch.stack([Mapping("const")(t, s)[0] / t[0] for s in range(8)])
    assert const.tolist() == pytest.approx([1 - 2.0 ** -(s + 1) for s in range(8)])
    first_nonzero = Mapping()(torch.tensor([math.log(7) - 1e-3, math.log(7) + 1e-3]), 0)
    assert first_nonzero[0] == 0 and first_nonzero[1] > 0


@pytest.mark.parametrize("c", [0.0, 0.03, 1.0, 1e4])
def test_pseudo_huber(c: float) -> None:
    d = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    s = d.detach().square().sum((1, 2, 3))
    torch.testing.assert_close(pseudo_huber(d, c), (s + c * c).sqrt() - c, rtol=1e-6, atol=1e-9)
    (grad,) = torch.autograd.grad(pseudo_huber(d, c).sum(), d)
    torch.testing.assert_close(grad, d.detach() / (s + c * c).sqrt().view(-1, 1, 1, 1))
    if c == 1e4:
        torch.testing.assert_close(2 * c * pseudo_huber(d, c), s, rtol=1e-6, atol=0)


@pytest.mark.parametrize("c", [0.0, 0.06])
def test_zero_distance_has_zero_gradient(c: float) -> None:
    d = torch.zeros(2, 1, 4, 4, requires_grad=True)
    pseudo_huber(d, c).sum().backward()
    assert torch.equal(d.grad, torch.zeros_like(d))


def test_weightings() -> None:
    t = torch.tensor([0.01, 0.5, 5.0])
    r = 0.5 * t
    assert WEIGHTINGS["inverse_c_out_sq"](t, r, 0.5).tolist() == pytest.approx([10004, 8, 4.04], rel=1e-5)
    c_out_sq = (t * 0.5) ** 2 / (t**2 + 0.25)
    torch.testing.assert_close(WEIGHTINGS["inverse_c_out_sq"](t, r, 0.5), 1 / c_out_sq)
    assert WEIGHTINGS["inverse_t"](t, r, 0.5).tolist() == pytest.approx([100, 2, 0.2])
    assert WEIGHTINGS["inverse_t_sq"](t, r, 0.5).tolist() == pytest.approx([1e4, 4, 0.04])
    assert WEIGHTINGS["uniform"](t, r, 0.5).tolist() == [1, 1, 1]
    r = Mapping()(t, 4)
    n = 1 + 8 * torch.sigmoid(-t)
    torch.testing.assert_close(WEIGHTINGS["inverse_gap"](t, r, 0.5), 2**5 / (t * n))


def images(n: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 1, 8, 8), torch.rand(n) + 0.2, torch.randn(n, 1, 8, 8)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_weighs_the_loss(weighting: str) -> None:
    y, t, eps = images()
    r = t / 2
    plain = ConsistencyObjective(weighting="uniform").loss(lambda x, s: 0.3 * x, y, t, r, eps)
    got = ConsistencyObjective(weighting=weighting).loss(lambda x, s: 0.3 * x, y, t, r, eps)
    torch.testing.assert_close(got, plain * WEIGHTINGS[weighting](t, r, 0.5))


def test_student_and_teacher_share_noise() -> None:
    y, t, eps = images()
    seen: list[tuple[Tensor, Tensor]] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x, sigma))
        return x

    ConsistencyObjective().loss(denoiser, y, t, 0.7 * t, eps)
    (x_t, s_t), (x_r, s_r) = seen
    torch.testing.assert_close((x_t - x_r) / (s_t - s_r).view(-1, 1, 1, 1), eps, rtol=1e-4, atol=1e-4)


def test_rows_at_r_zero_take_the_clean_image() -> None:
    y, t, eps = images()
    r = torch.where(torch.arange(6) % 2 == 0, 0.0, 0.5 * t)
    w = torch.tensor(0.4, requires_grad=True)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        assert (sigma > 0).all()
        return w * x / sigma.view(-1, 1, 1, 1)

    loss = ConsistencyObjective().loss(denoiser, y, t, r, eps)
    x_t = y + t.view(-1, 1, 1, 1) * eps
    want = (0.4 * x_t / t.view(-1, 1, 1, 1) - y).flatten(1).norm(dim=1) / t
    torch.testing.assert_close(loss[::2], want[::2])
    assert loss.isfinite().all()


def test_small_r_reaches_the_teacher_unclamped() -> None:
    y, t, eps = images(2)
    seen: list[Tensor] = []
    r = torch.tensor([1e-6, 0.0])
    ConsistencyObjective().loss(lambda x, s: seen.append(s) or x, y, t, r, eps)
    assert seen[0].tolist() == pytest.approx([1e-6, 1.0])  # the teacher goes first


def test_no_gradient_reaches_the_teacher() -> None:
    y, t, eps = images()
    calls: list[Tensor] = []
    w = torch.tensor(0.5, requires_grad=True)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(w * x)
        return calls[-1]

    ConsistencyObjective().loss(denoiser, y, t, 0.5 * t, eps).sum().backward()
    assert not calls[0].requires_grad and calls[1].requires_grad


@pytest.mark.parametrize("share", [True, False])
def test_dropout_mask_is_shared(share: bool) -> None:
    net = SongUNet(8, 1, 1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=0.3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    D = ECMPrecond(net).train()
    y, t, eps = images()
    plain = ConsistencyObjective(weighting="uniform").loss(D, y, t, t, eps, share_rng=share)
    assert (plain == 0).all() if share else (plain > 0).all()
    (gradient,) = torch.autograd.grad(plain.sum(), net.dec["8x8_aux_conv"].weight)
    assert gradient.isfinite().all()
    assert (gradient == 0).all() == share


def test_sharing_leaves_the_global_generator_advanced_once() -> None:
    y, t, eps = images(1)

    def draws(x: Tensor, sigma: Tensor) -> Tensor:
        return x * torch.rand(())

    torch.manual_seed(5)
    ConsistencyObjective().loss(draws, y, t, t / 2, eps)
    after = torch.rand(())
    torch.manual_seed(5)
    torch.rand(())
    assert torch.equal(after, torch.rand(()))


def test_noise_level_distribution() -> None:
    objective = ConsistencyObjective()
    n = torch.distributions.Normal(0.0, 1.0)
    assert math.exp(objective.P_mean) == pytest.approx(0.3329, abs=1e-4)
    beyond = 1 - n.cdf(torch.tensor((math.log(80) - objective.P_mean) / objective.P_std))
    assert float(beyond) == pytest.approx(0.00306, abs=2e-5)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="c is -1"):
        ConsistencyObjective(c=-1)
    with pytest.raises(ValueError, match=r"c is nan"):
        ConsistencyObjective(c=math.nan)
    with pytest.raises(ValueError, match="weighting is 'snr'"):
        ConsistencyObjective(weighting="snr")
    with pytest.raises(ValueError, match="q is 1"):
        Mapping(q=1)
    with pytest.raises(ValueError, match="kind is 'tanh'"):
        Mapping("tanh")
