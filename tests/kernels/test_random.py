"""The CUDA kernels, through the emulator, on random sizes, options and values, against fp64 truth; the same ones every time.

Sizes and options of which the networks have few: single pixels and channels, groups of one, prime widths, samples whose
global index is past 2^32, nearly everything dropped, eps of 0, misaligned images, empty batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from random import Random
from typing import Any

import pytest
import torch
from ect_kernels import consistency_loss as loss
from ect_kernels import dispatch, philox, radam_ema
from ect_kernels import group_norm_silu as norm
from ect_kernels import perturb as noise
from ect_kernels import residual_group_norm_silu as residual
from ect_kernels.testing.truth import Case, check
from torch import Tensor

from tests.kernels.conftest import load_emulated

CASES = 40
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FIRST = (0, 1, 3, 2**31 - 1, 2**33 + 5, 2**44 + 1)  # global number of a batch's first sample


@cache
def forms(op: str) -> list[str]:
    """The backends to check: CUDA on the emulator, and C++ on this CPU."""
    load_emulated(op)
    return [name for name in ("emulated", "native") if dispatch.OPS[op].why_not(name, torch.device("cpu")) is None]


class Draw(Random):
    """Options of one case, and its tensors."""

    def __init__(self, op: str, number: int) -> None:
        super().__init__(f"{op} {number}")
        self.generator = torch.Generator().manual_seed(number)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std + mean

    def maybe(self, make: Callable[[], Any], chance: float = 0.5) -> Any:
        return make() if self.random() < chance else None

    def image(self, n: int, c: int, h: int, w: int, dtype: torch.dtype, **values: float) -> Tensor:
        """[n, c, h, w] in one of the layouts and at one of the alignments that callers may have."""
        x = self.normal(n, c, h, w, **values).to(dtype)
        match self.choice(("channels_last", "channels_last", "nchw", "sliced", "shifted")):
            case "channels_last":
                return x.contiguous(memory_format=torch.channels_last)
            case "sliced":
                return torch.cat([x, x], 1)[:, :c]
            case "shifted":  # channels-last, one element off its alignment
                room = torch.zeros(x.numel() + 1, dtype=dtype)[1:].view(n, h, w, c)
                return room.copy_(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x

    def size(self) -> tuple[int, int, int]:
        """n, h, w."""
        sides = (
            (1, 1),
            (1, self.randint(1, 40)),
            (self.randint(1, 12), self.randint(1, 12)),
            (8, 8),
            (16, 16),
            (41, 29),
        )
        h, w = self.choice(sides)
        return self.choice((0, 1, 5, 67 if h * w < 9 else 4)) if self.random() < 0.2 else self.randint(1, 3), h, w

    def groups(self, pixels: int) -> tuple[int, int]:
        """Groups, channels of each; few where there are many pixels."""
        each = self.choice((1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 16, 24, 33, 64))
        return self.choice((1, 2, 3) if pixels > 256 else (1, 1, 2, 3, 5, 8, 16, 32 if each <= 16 else 4)), each

    def dropout(self) -> dict[str, Any]:
        p = self.choice((0.0, 0.0, 0.2, 0.5, 0.999, 65535 / 65536, 1 / 65536, 1e-9))
        seed = torch.tensor(self.choice((0, -1, 2**63 - 1, -(2**63), self.getrandbits(62))))
        return {"p": p, "seed": seed, "layer": self.choice((0, 7, 2**31 - 1)), "n0": self.choice(FIRST)}


def clones(values: dict[str, Any]) -> Callable[[torch.device], dict[str, Any]]:
    return lambda device: dict(values)


@pytest.mark.parametrize("number", range(CASES))
def test_group_norm_silu(number: int) -> None:
    draw = Draw("group_norm_silu", number)
    (n, h, w), dtype = draw.size(), draw.choice(DTYPES)
    groups, each = draw.groups(h * w)
    c = groups * each
    values = {
        "x": draw.image(n, c, h, w, dtype, mean=draw.choice((0, 0, 3, -300)), std=draw.choice((1, 1, 0.01, 30))),
        "gamma": draw.normal(c, mean=1, std=0.3).to(draw.choice((torch.float32, dtype))),
        "beta": draw.normal(c, std=0.3),
        "groups": groups, "eps": draw.choice((0.0, 1e-6, 1e-5, 1.0)), "act": draw.random() < 0.7, **draw.dropout(),
        "v": draw.maybe(lambda: draw.normal(n, c)),
    }  # fmt: skip
    if draw.random() < 0.5:
        values |= {name: draw.normal(n, c, std=0.5) for name in ("scale", "shift")}
    names = tuple(name for name in ("x", "gamma", "beta", "v", "scale", "shift") if values.get(name) is not None)
    for backend in forms("group_norm_silu"):
        check(norm.group_norm_silu, backend, Case(str((n, c, h, w, groups, dtype)), clones(values), names))


@pytest.mark.parametrize("number", range(CASES))
def test_residual_group_norm_silu(number: int) -> None:
    draw = Draw("residual_group_norm_silu", number)
    (n, h, w), dtype = draw.size(), draw.choice(DTYPES)
    groups, each = draw.groups(h * w)
    both = groups * each
    c = draw.choice((both, draw.randint(1, both), min(both, 8 * draw.randint(1, 1 + both // 8))))
    mean, std = draw.choice((0, 0, 3, -30)), draw.choice((1, 1, 0.01, 30))
    values = {
        "a": draw.image(n, c, h, w, dtype, mean=mean, std=std),
        "skip": draw.maybe(lambda: draw.image(n, c, h, w, dtype, std=std), 0.7),
        "other": draw.image(n, both - c, h, w, dtype, std=std) if c < both else None,
        "gamma": draw.normal(both, mean=1, std=0.3), "beta": draw.normal(both, std=0.3),
        "bias": draw.maybe(lambda: draw.normal(c)), "skip_bias": draw.maybe(lambda: draw.normal(c)),
        "skip_scale": draw.choice((1.0, 0.5**0.5, -2.0)), "groups": groups, "eps": draw.choice((0.0, 1e-6, 1e-5, 1.0)),
        "act": draw.random() < 0.7, **draw.dropout(),
    }  # fmt: skip
    tensors = ("a", "skip", "other", "gamma", "beta", "bias", "skip_bias")
    names = tuple(name for name in tensors if values[name] is not None)
    name = str((n, c, both - c, h, w, groups, dtype))
    for backend in forms("residual_group_norm_silu"):
        check(residual.residual_group_norm_silu, backend, Case(name, clones(values), names))


@pytest.mark.parametrize("number", range(CASES))
def test_perturb(number: int) -> None:
    draw = Draw("perturb", number)
    (n, h, w), c, dtype = draw.size(), draw.choice((1, 2, 3, 3, 4, 5, 8, 17)), draw.choice(DTYPES)
    t, sigma_data = draw.normal(n, std=2).exp(), draw.choice((0.5, 1e-3, 30.0))
    seed, n0 = torch.tensor(draw.choice((0, -1, 2**63 - 1, draw.getrandbits(62)))), draw.choice(FIRST)
    images = torch.randint(256, (n * h * w * c + 1,), dtype=torch.uint8, generator=draw.generator)
    given = draw.image(n, c, h, w, torch.float32)
    eps = given if draw.random() < 0.4 else None
    values = {
        "images": images[(first := draw.choice((0, 0, 1))) : n * h * w * c + first].view(n, h, w, c),
        "t": t, "r": t * draw.choice((0.0, 0.5, 1.0)) * (torch.arange(n) % 3 != 1), "sigma_data": sigma_data,
        "flip": draw.maybe(lambda: torch.arange(n) % 2 == 0), "dtype": dtype, "seed": seed, "n0": n0, "eps": eps,
    }  # fmt: skip

    def with_truth(**kwargs: Any) -> tuple[Tensor, ...]:
        if kwargs["t"].dtype == torch.float64:
            kwargs["dtype"] = torch.float64
            if n > 0 and kwargs["eps"] is None:  # the noise in fp64 from the same bits
                even = c * h * w + c * h * w % 2
                u = philox.uniform(seed, philox.STREAM_EPS, n0, n, even, seed.device).double().view(n, -1, 2)
                radius, angle = (-2 * u[..., 0].log()).sqrt(), 2 * math.pi * u[..., 1]
                both = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).view(n, even)
                kwargs["eps"] = both[:, : c * h * w].reshape(n, c, h, w)
        return noise.perturb(**kwargs)

    for backend in forms("perturb"):
        check(with_truth, backend, Case(str((n, c, h, w, dtype)), clones(values)))


@pytest.mark.parametrize("number", range(CASES))
def test_consistency_loss(number: int) -> None:
    draw = Draw("consistency_loss", number)
    (n, h, w), c, dtype = draw.size(), draw.choice((1, 2, 3, 3, 4, 5, 17)), draw.choice(DTYPES)
    if number % 10 == 0:
        h, w, c = 64, 85, 4  # over 80 KiB of differences: read twice
    t = draw.normal(n, std=2).exp()
    F_t, F_r = (draw.image(n, c, h, w, dtype, std=draw.choice((1, 1, 100))) for _ in range(2))
    x_t, x_r = (draw.image(n, c, h, w, torch.float32) for _ in range(2))
    r = t * draw.choice((0.0, 0.5, 0.999)) * (torch.arange(n) % 3 != 1)
    if draw.random() < 0.2:  # no distance at all: sigma of t and r, network outputs and images agree
        F_r, x_r, r = F_t, x_t, t
    values = {
        "F_t": F_t, "F_r": F_r, "x_t": x_t, "x_r": x_r, "t": t, "r": r, "weight": draw.normal(n).abs() + 0.1,
        "c": draw.choice((0.0, 0.06, 1e-8, 30.0)), "sigma_data": draw.choice((0.5, 2.0)),
    }  # fmt: skip
    for backend in forms("consistency_loss"):
        check(loss.consistency_loss, backend, Case(str((n, c, h, w, dtype)), clones(values), ("F_t",)))


@pytest.mark.parametrize("number", range(CASES))
def test_radam_ema(number: int) -> None:
    """A few steps from a random state, with gradients that are partly not finite, too large for the clip, or zero."""
    draw = Draw("radam_ema", number)
    n = 8 * draw.choice((0, 1, 3, 2048, 2049, draw.randint(1, 300), draw.randint(1, 6000)))
    half, emas = draw.choice((None, torch.float16, torch.bfloat16)), draw.randint(0, radam_ema.MAX_EMAS)
    arenas = {name: draw.normal(n) for name in ("params", "exp_avg", "exp_avg_sq", *(f"ema{k}" for k in range(emas)))}
    arenas["exp_avg_sq"] = arenas["exp_avg_sq"].square() * draw.choice((0.0, 1e-6, 1.0))
    state = radam_ema.new_state(
        draw.choice(radam_ema.OPTIMIZERS), draw.choice((0.0, 1e-4, 0.1)), draw.choice(((0.9, 0.99), (0.0, 0.999), (0.5, 0.5))),
        draw.choice((1e-8, 1e-3)), draw.choice((None, 1.0, 1e-3)), draw.sample((0.0, 0.5, 0.999, 1.0), emas),
        draw.choice((None, 1.0, 65536.0)), draw.choice((1, 2, 2000)),
    )  # fmt: skip
    gradients = [draw.normal(n, std=draw.choice((0.0, 1e-4, 1.0, 1e4))) for _ in range(4)]
    for grads in gradients if n else ():
        if draw.random() < 0.3:
            grads[draw.randrange(n)] = draw.choice((math.nan, math.inf, -math.inf))

    def run(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        own = {name: arena.to(dtype, copy=True) for name, arena in arenas.items()}
        f64, i64 = (part.clone() for part in state)
        i64[radam_ema.I64.STEPS] = number % 7
        shadow = None if half is None else own["params"].to(half)
        moments = [own["exp_avg"], own["exp_avg_sq"]]
        averages = [own[f"ema{k}"] for k in range(emas)]
        function = radam_ema.reference if dtype == torch.float64 else partial(radam_ema.radam_ema, backend=backend)
        for grads in gradients:
            grads = grads.to(dtype, copy=True)
            function(own["params"], grads, *moments, averages, shadow, f64, i64)
        assert shadow is None or torch.equal(shadow, own["params"].to(shadow.dtype))
        return {**own, "grads": grads, "f64": f64, "i64": i64}

    truth, plain = run("", torch.float64), run("reference", torch.float32)
    for backend in forms("radam_ema"):
        near(run(backend, torch.float32), truth, plain)


def near(got: dict[str, Tensor], truth: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Hold an optimizer's tensors to the bar."""
    assert torch.equal(got["i64"], truth["i64"])
    for name, want in truth.items():
        if want.numel() == 0:
            continue
        found, same = got[name].double(), got[name].double() == want.double()  # infinities
        allowed = 2 * float((plain[name].double() - want.double()).abs().nan_to_num(posinf=0.0, nan=0.0).max())
        eps = torch.finfo(torch.float32 if name == "f64" else got[name].dtype).eps if name != "i64" else 0.0
        allowed += 4 * eps * float(want.double().abs().nan_to_num(posinf=0.0).max())
        error = float(torch.where(same, 0.0, (found - want.double()).abs()).max())
        assert error <= allowed, f"{name}: error {error:.3g}, bar {allowed:.3g}"
