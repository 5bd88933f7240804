"""Samplers against the golden vectors and against data models whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ect.models import ECMPrecond, EDMPrecond, SongUNet
from ect.sampler import Consistency, Heun, Sampler, consistency_sample, draw, generate, heun_sample, to_uint8
from tests.golden_data import MANIFEST, load, part, rel_l2


@pytest.mark.parametrize("i", range(3))
def test_consistency_sampler_matches_golden(i: int) -> None:
    case, g = MANIFEST["sampler"], load("sampler")
    D = ECMPrecond(SongUNet(**case["kwargs"])).eval()
    D.load_state_dict(part(g, "state."))
    x = consistency_sample(D, g["latents"], [case["t_max"], *case["mid_t"][i]], g["noises"])
    assert x.dtype == torch.float64
    assert rel_l2(x, g[f"x.{i}"]) <= 1e-5


@pytest.mark.parametrize("steps", [4, 18])
def test_heun_sampler_matches_golden(steps: int) -> None:
    g = load("edm")
    D = EDMPrecond(SongUNet(**MANIFEST["edm"]["kwargs"])).eval()
    D.load_state_dict(part(g, "state."))
    assert rel_l2(heun_sample(D, g["latents"], steps), g[f"heun{steps}"]) <= 1e-4


class Counting:
    """The exact denoiser of data N(0, sd^2), counting its calls."""

    def __init__(self, sd: float = 0.5) -> None:
        self.sd, self.calls = sd, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return x * self.sd**2 / (self.sd**2 + sigma.view(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize("sigmas", [[80.0], [80.0, 0.821], [80.0, 5.0, 0.8, 0.1]])
def test_consistency_sampler_calls_once_a_sigma_and_keeps_an_oracle(sigmas: list[float]) -> None:
    x_0, calls = torch.randn(3, 1, 4, 4), []

    def oracle(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma[0]))
        return x_0

    out = consistency_sample(oracle, torch.randn(3, 1, 4, 4), sigmas)
    assert torch.equal(out, x_0.double())
    assert calls == pytest.approx(sigmas)


def test_heun_converges_to_the_exact_flow_of_gaussian_data() -> None:
    z, errors = torch.randn(64, 1, 4, 4), []
    for steps in (8, 16, 32):
        D = Counting()
        x = heun_sample(D, z, steps)
        assert D.calls == 2 * steps - 1
        exact = z.double() * 80 * 0.5 / (80**2 + 0.5**2) ** 0.5
        errors.append(float((x - exact).norm() / exact.norm()))
    assert errors[2] < 0.02 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3
    assert heun_sample(Counting(), z, 1).isfinite().all()


def test_exact_consistency_function_gives_the_data_distribution() -> None:
    def f(x: Tensor, sigma: Tensor) -> Tensor:
        return x * 0.5 / (sigma.view(-1, 1, 1, 1) ** 2 + 0.25).sqrt()

    for sigmas in ([80.0], [80.0, 0.821]):
        x = consistency_sample(f, torch.randn(4000, 1, 2, 2), sigmas)
        assert float(x.std()) == pytest.approx(0.5, rel=0.02)


def test_impossible_settings() -> None:
    z = torch.randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match="sigmas is empty"):
        consistency_sample(Counting(), z, [])
    with pytest.raises(ValueError, match="steps is 0"):
        heun_sample(Counting(), z, 0)


def tiny(**kwargs: object) -> ECMPrecond:
    torch.manual_seed(0)
    net = SongUNet(8, 1, 1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], **kwargs)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return ECMPrecond(net).eval()


@pytest.mark.parametrize("sampler", [Consistency((80.0,)), Consistency((80.0, 0.821)), Heun(3)], ids=str)
@pytest.mark.parametrize("label_dim", [0, 3])
def test_an_image_depends_on_its_seed_not_on_the_batch(sampler: Sampler, label_dim: int) -> None:
    net = tiny(label_dim=label_dim)
    whole = torch.cat(list(generate(net, range(7), sampler, batch=7)))
    parts = torch.cat(list(generate(net, range(7), sampler, batch=3)))
    alone = torch.cat(list(generate(net, [4], sampler)))
    assert whole.shape == (7, 8, 8, 1) and whole.dtype == torch.uint8
    assert (whole.int() - parts.int()).abs().max() <= 1  # rounding of fp32, then to a level
    assert (whole[4:5].int() - alone.int()).abs().max() <= 1
    assert len({bytes(image.numpy().tobytes()) for image in whole}) == 7


def test_an_image_is_made_of_the_latents_and_noises_of_its_seed() -> None:
    net, seeds = tiny(), (3, 1)
    latents, noises = (torch.stack(drawn) for drawn in zip(*(draw(net, s, 2)[::2] for s in seeds), strict=True))
    made = torch.cat(list(generate(net, seeds, Consistency((80.0, 5.0, 0.8)))))
    assert torch.equal(made, to_uint8(consistency_sample(net, latents, [80.0, 5.0, 0.8], noises.transpose(0, 1))))
    assert torch.equal(torch.cat(list(generate(net, seeds, Heun(4)))), to_uint8(heun_sample(net, latents, 4)))


def test_class_idx_fixes_the_class() -> None:
    net = tiny(label_dim=3)
    by_class = [torch.cat(list(generate(net, range(4), Consistency((80.0,)), class_idx=c))) for c in range(3)]
    drawn = torch.cat(list(generate(net, range(4), Consistency((80.0,)))))
    assert not torch.equal(by_class[0], by_class[1])
    assert all(any(torch.equal(drawn[i], b[i]) for b in by_class) for i in range(4))


def test_to_uint8_is_floor_of_127_5_x_plus_128() -> None:
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 2.0]).view(1, 1, 1, 8)
    assert to_uint8(x).flatten().tolist() == [0, 0, 64, 128, 191, 255, 255, 255]
    levels = torch.arange(256)
    assert torch.equal(to_uint8((levels / 127.5 - 1).view(1, 1, 1, 256)).flatten().long(), levels)
