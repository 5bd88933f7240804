"""The draws of ect_kernels.philox in Triton: the same bits; the dropout mask takes one Philox call for eight elements.

Of the mask: with i the flat NHWC index of an element in the global batch, its counter is (i // 8 mod 2^32, layer, 0, 0), and
element i mod 8 = k uses the low (k even) or high (k odd) half of word k // 2. The key is the 64-bit seed, from the device.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_sample(n0: tl.tensor) -> tl.tensor:
    """Return the global sample number that a pointer holds, int64; 0 for None."""
    first = tl.full((), 0, tl.int64)
    if n0 is not None:
        first = tl.load(n0)
    return first


@triton.jit
def keep8(
    seed: tl.tensor, block: tl.tensor, layer: tl.tensor, threshold: tl.tensor, rows: tl.constexpr, columns: tl.constexpr
) -> tl.tensor:
    """Return which elements stay: bool [rows, columns] of the block numbers i // 8 mod 2^32, uint32 [rows, columns // 8].

    seed: int64 scalar. layer, threshold: integer scalars (of a kernel that does not specialise them).
    """
    w0, w1, w2, w3 = tl.philox(seed, block, layer.to(tl.uint32), 0, 0)
    # A join adds a last, fastest axis: [..., word // 2, word % 2, half] in memory order is the order of the elements.
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(low, high), (rows, columns)) >= threshold.to(tl.uint32)


@triton.jit
def keep1(seed: tl.tensor, index: tl.tensor, layer: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """Return which elements stay, bool of the shape of `index` (flat NHWC indices i, int64); for rows that no eight divide.

    It calls Philox once for each element.
    """
    w0, w1, w2, w3 = tl.philox(seed, (index >> 3).to(tl.uint32), layer.to(tl.uint32), 0, 0)
    k = (index & 7).to(tl.int32)
    word = tl.where(k < 4, tl.where(k < 2, w0, w1), tl.where(k < 6, w2, w3))
    return tl.where(k & 1 == 1, word >> 16, word & 0xFFFF) >= threshold.to(tl.uint32)


@triton.jit
def unit(word: tl.tensor) -> tl.tensor:
    """Turn a Philox word into a uniform number in (0, 1], as ect_kernels.philox.uniform forms it."""
    return ((word >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08


@triton.jit
def box_muller(first: tl.tensor, second: tl.tensor) -> tuple[tl.tensor, ...]:
    """Make two standard normals of two Philox words, as ect_kernels.philox.normal forms them."""
    u, v = unit(first), unit(second)
    radius = tl.sqrt_rn(-2.0 * tl.log(u))
    quadrant = tl.floor(4.0 * v + 0.5)
    a = (v - 0.25 * quadrant) * 6.283185307179586
    a2 = a * a
    sine = a + a * a2 * (-1 / 6 + a2 * (1 / 120 + a2 * (-1 / 5040 + a2 * (1 / 362880))))
    cosine = 1.0 + a2 * (-1 / 2 + a2 * (1 / 24 + a2 * (-1 / 720 + a2 * (1 / 40320 - a2 * (1 / 3628800)))))
    q = quadrant.to(tl.int32) & 3
    odd = (q & 1) == 1
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return radius * tl.where((q == 1) | (q == 2), -x, x), radius * tl.where(q >= 2, -y, y)
