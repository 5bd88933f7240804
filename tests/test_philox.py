"""The counter-based generator: published vectors, statistics, and the layout of the dropout mask."""

from __future__ import annotations

import math

import pytest
import torch
from ect_kernels import philox

CPU = torch.device("cpu")


def test_known_answers() -> None:
    """Vectors of the Random123 distribution (kat_vectors): counter, key -> output."""

    def run(counter: list[int], key: list[int]) -> list[str]:
        seed = torch.tensor(key[0] | (key[1] - (1 << 32) if key[1] >= 1 << 31 else key[1]) << 32)
        words = philox.philox4x32(seed, torch.tensor([counter[0]]), *counter[1:])
        return [f"{int(w):08x}" for w in words]

    ones = 0xFFFFFFFF
    assert run([0] * 4, [0, 0]) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert run([ones] * 4, [ones, ones]) == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert run(*pi) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_uniform_and_normal_statistics() -> None:
    u = philox.uniform(3, 1, 0, 2000, 101, CPU)
    assert u.shape == (2000, 101) and u.min() > 0 and u.max() < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.003)
    z = philox.normal(3, 1, 0, 2000, 101, CPU)
    assert float(z.mean()) == pytest.approx(0, abs=0.01)
    assert float(z.var()) == pytest.approx(1, abs=0.01)
    assert float((z**4).mean()) == pytest.approx(3, abs=0.1)
    assert abs(float((z[:, 0] * z[:, 1]).mean())) < 0.1
    other = philox.normal(4, 1, 0, 2000, 101, CPU)
    stream = philox.normal(3, 2, 0, 2000, 101, CPU)
    for a in (other, stream):
        assert abs(float((z * a).mean())) < 0.01


@pytest.mark.parametrize("draw", [philox.uniform, philox.normal])
def test_draws_follow_the_global_index(draw) -> None:  # type: ignore[no-untyped-def]
    whole = draw(torch.tensor(9), 5, 0, 10, 7, CPU)
    assert torch.equal(whole[6:], draw(9, 5, torch.tensor(6), 4, 7, CPU))


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5])
def test_dropout_mask_layout(p: float) -> None:
    """Every element by hand, from the definition in the docstring; 3*5*7 elements a sample straddle the blocks."""
    seed, layer, n0, x = 1234567890123, 4, 2, torch.randn(3, 5, 3, 7)
    got = philox.dropout(x, p, torch.tensor(seed), layer, n0)
    threshold = round(65536 * p)
    for n, c, h, w in [(0, 0, 0, 0), (0, 4, 2, 6), (1, 2, 1, 3), (2, 4, 2, 6), (2, 0, 1, 1), (1, 1, 0, 5)]:
        i = (((n0 + n) * 3 + h) * 7 + w) * 5 + c
        words = philox.philox4x32(seed, torch.tensor([i // 8]), layer)
        half = (int(words[(i % 8) // 2]) >> (16 * (i % 2))) & 0xFFFF
        want = float(x[n, c, h, w]) * 65536 / (65536 - threshold) if half >= threshold else 0.0
        assert float(got[n, c, h, w]) == pytest.approx(want, rel=1e-6)


def test_dropout_rate_and_independence() -> None:
    x = torch.ones(64, 16, 8, 8)
    n = x.numel()
    masks = [philox.dropout(x, 0.2, seed, layer) > 0 for seed in (1, 2) for layer in (0, 1)]
    for mask in masks:
        assert abs(float(mask.float().mean()) - 0.8) < 4 * math.sqrt(0.16 / n)
    for i, a in enumerate(masks):
        for b in masks[i + 1 :]:
            both = float((a & b).float().mean())
            assert abs(both - 0.64) < 4 * math.sqrt(0.64 * 0.36 / n)
    kept = philox.dropout(x, 0.2, 1, 0)
    assert float(kept.max()) == pytest.approx(65536 / (65536 - 13107))


def test_dropout_is_independent_of_the_batch_split_and_of_strides() -> None:
    x = torch.randn(6, 3, 5, 5)
    whole = philox.dropout(x, 0.3, 7, 2, 0)
    for n0 in (4, torch.tensor(4)):
        assert torch.equal(whole[4:], philox.dropout(x[4:], 0.3, 7, 2, n0))
    assert torch.equal(whole, philox.dropout(x.to(memory_format=torch.channels_last), 0.3, 7, 2, 0))
