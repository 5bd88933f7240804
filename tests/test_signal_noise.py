"""Signal noise: the emulated roundings are the ones meant, the reference is exact, and what is compared is comparable."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ect
from ect.assembly import network_spec
from ect.config import DataConfig
from ect.cost.signal_noise import (
    TIGHTEST,
    differences,
    emulated_tf32,
    in_fp64,
    in_precision,
    relative_errors,
    signal_noise,
    to_tf32,
)
from ect.data import Dataset, load
from ect.files.checkpoint import load_model
from ect.models import EDMPrecond, MaskKey, build
from ect.objective import Mapping
from ect.optim import FlatState
from tests.tiny import NET

DATA = load(DataConfig(labels=True))
IMAGES = DATA.images[:32]


def trained() -> EDMPrecond:
    return load_model(Path(ect.__file__).parent / "models" / "digits.safetensors")[0]


def tiny(dropout: float = 0.0, dataset: Dataset = DATA) -> EDMPrecond:
    torch.manual_seed(0)
    kwargs = {"model_channels": NET.model_channels, "channel_mult": [1, 2], "attn_resolutions": [4], "dropout": dropout}
    spec = network_spec(NET, "ECMPrecond", dataset, 0)
    net = build({**spec, "kwargs": {**spec["kwargs"], **kwargs}})
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


@pytest.mark.parametrize(
    ("x", "want"),
    [
        (1 + 2**-10, 1 + 2**-10),
        (1 + 2**-11, 1 + 2**-10),  # a tie goes away from zero
        (1 + 2**-11 - 2**-23, 1.0),
        (1 + 3 * 2**-11, 1 + 2**-9),
        (2 - 2**-23, 2.0),
        (0.0, 0.0),
    ],
)
def test_tf32_has_ten_bits_and_rounds_to_nearest(x: float, want: float) -> None:
    got = to_tf32(torch.tensor([x, -x]))
    assert got.tolist() == pytest.approx([want, -want], rel=0, abs=0)


def test_tf32_rounds_tensors_of_any_layout() -> None:
    x = torch.randn(4, 6, 5, 5)
    want = to_tf32(x)
    assert 2**-13 < ((want - x) / x).abs().max() <= 2**-11
    assert torch.equal(to_tf32(x.contiguous(memory_format=torch.channels_last)), want)
    assert torch.equal(to_tf32(x.transpose(0, 1)), want.transpose(0, 1))


def test_tf32_products_round_their_operands_and_nothing_else() -> None:
    x, w, b = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3), torch.randn(8)
    q, k, v = torch.randn(3, 2, 1, 36, 8)
    xr, wr = to_tf32(x), to_tf32(w)
    with emulated_tf32():
        conv = F.conv2d(x, w, b, padding=1)
        linear = F.linear(x[0, 0], w[0, 0, 0].repeat(4, 2), b[:4])
        attention = F.scaled_dot_product_attention(q, k, v)
        total = b.expand(36, 8).clone().addmm_(x[0].flatten(1).t(), w[:, :, 0, 0])
        others = x * x + x.exp()
        half = F.linear(x.half(), x[0].half().flatten(1)[:, :6])
    torch.testing.assert_close(conv, F.conv2d(xr, wr, b, padding=1), rtol=0, atol=1e-5)
    assert (conv - F.conv2d(x, w, b, padding=1)).abs().max() > 1e-4
    torch.testing.assert_close(linear, F.linear(xr[0, 0], wr[0, 0, 0].repeat(4, 2), b[:4]), rtol=0, atol=1e-6)
    torch.testing.assert_close(total, b + xr[0].flatten(1).t() @ wr[:, :, 0, 0], rtol=0, atol=1e-6)
    p = (to_tf32(q * 8**-0.25) @ to_tf32(k * 8**-0.25).mT).softmax(-1)
    torch.testing.assert_close(attention, to_tf32(p) @ to_tf32(v), rtol=0, atol=1e-5)
    assert torch.equal(others, x * x + x.exp())
    assert torch.equal(half, F.linear(x.half(), x[0].half().flatten(1)[:, :6]))


@pytest.mark.parametrize("with_labels", [True, False])
def test_the_reference_is_the_network_with_its_dropout_in_fp64(with_labels: bool) -> None:
    net = tiny(dropout=0.3)
    labels = DATA.labels[:4] if with_labels and DATA.labels is not None else None
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.02, 0.5, 3.0, 40.0])
    exact = in_fp64(net, labels)(x, sigma)
    plain = net.train()(x, sigma, labels, None, MaskKey(torch.tensor(1), 0))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), plain, rtol=1e-4, atol=1e-4)
    again = in_precision(net, "fp32", labels)(x, sigma)
    assert torch.equal(again, plain)


@pytest.mark.parametrize(("name", "half"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_is_what_a_step_computes(name: str, half: torch.dtype) -> None:
    net = tiny(dropout=0.3)
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.02, 0.5, 3.0, 40.0])
    got = in_precision(net, name)(x, sigma)
    state = FlatState(net.train(), half=half, core=net.half_weights())
    state.compute.model.on_ops = True
    assert torch.equal(got, state.compute(x, sigma, None, None, MaskKey(torch.tensor(1), 0)))


@pytest.mark.slow
def test_noise_grows_as_the_mantissa_shrinks() -> None:
    noise = {p: signal_noise(trained(), p, IMAGES, levels=(0.1, 3.0)) for p in ("fp32", "tf32", "fp16", "bf16")}
    for t in (0.1, 3.0):
        assert 0 < noise["fp32"][t] < 0.01 * noise["tf32"][t]
        assert 5 < noise["bf16"][t] / noise["fp16"][t] < 12  # 3 bits: 8
        assert 0.3 < noise["fp16"][t] / noise["tf32"][t] < 1.6


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_may_be_compared_with_fp32(precision: str) -> None:
    """What a run prints, at less than its last digit's worth."""
    exact, quick = (
        signal_noise(trained(), precision, IMAGES[:16], against=dtype) for dtype in (torch.float64, torch.float32)
    )
    assert quick == pytest.approx(exact, rel=0.005)


@pytest.mark.slow
def test_a_larger_gap_has_less_noise() -> None:
    tight, loose = (
        signal_noise(trained(), "fp16", IMAGES, levels=(3.0,), mapping=Mapping(q=2.0), stage=stage)[3.0]
        for stage in (7, 3)
    )
    assert loose < 0.2 * tight
    assert tight == signal_noise(trained(), "fp16", IMAGES, levels=(3.0,), mapping=TIGHTEST)[3.0]


def test_the_network_stays_as_it_is() -> None:
    net = trained()
    before = copy.deepcopy(net.state_dict())
    signal_noise(net, "fp16", IMAGES[:2], levels=(1.0,))
    assert not net.training and net.runs_on_ops is None
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_differences_are_of_one_noise_at_t_and_r() -> None:
    seen = []

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append((x, sigma))
        return sigma.view(-1, 1, 1, 1) * torch.ones_like(x)

    found = differences(denoiser, IMAGES, levels=(0.5, 2.0), mapping=Mapping("const", q=4.0))
    for i, t in enumerate((0.5, 2.0)):
        (x_t, t_), (x_r, r_) = seen[2 * i : 2 * i + 2]
        assert torch.equal(t_, torch.full((32,), t)) and torch.equal(r_, torch.full((32,), 0.75 * t))
        torch.testing.assert_close((x_t - x_r) / (0.25 * t), (seen[0][0] - seen[1][0]) / 0.125, rtol=0, atol=1e-4)
        torch.testing.assert_close(found[t], torch.full_like(found[t], 0.25 * t))
    y = IMAGES.permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(4 * seen[1][0] - 3 * seen[0][0], y, rtol=0, atol=1e-5)


def test_relative_errors_are_medians_over_images() -> None:
    exact = {1.0: torch.ones(3, 1, 2, 2)}
    found = {1.0: exact[1.0] * torch.tensor([1.0, 1.1, 5.0]).view(3, 1, 1, 1)}
    assert relative_errors(found, exact)[1.0] == pytest.approx(0.1)


def test_a_level_without_a_student_teacher_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"level 0\.1: r is 0"):
        signal_noise(trained(), "fp16", IMAGES, levels=(0.1,), mapping=Mapping(q=2.0), stage=0)
