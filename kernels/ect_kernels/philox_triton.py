"""The dropout mask of ect_kernels.philox in Triton: the same bits, one Philox call for eight elements.

With i the flat NHWC index of an element in the global batch, its counter is (i // 8 mod 2^32, layer, 0, 0), and element
i mod 8 = k uses the low (k even) or high (k odd) half of word k // 2. The key is the 64-bit seed, loaded from the device.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep8(
    seed: tl.tensor, block: tl.tensor, layer: tl.tensor, threshold: tl.tensor, rows: tl.constexpr, columns: tl.constexpr
) -> tl.tensor:
    """Which elements stay: bool [rows, columns] of the block numbers i // 8 mod 2^32, uint32 [rows, columns // 8].

    seed: int64 scalar. layer, threshold: integer scalars (of a kernel that does not specialise them).
    """
    w0, w1, w2, w3 = tl.philox(seed, block, layer.to(tl.uint32), 0, 0)
    # A join adds a last, fastest axis: [..., word // 2, word % 2, half] in memory order is the order of the elements.
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(low, high), (rows, columns)) >= threshold.to(tl.uint32)


@triton.jit
def keep1(seed: tl.tensor, index: tl.tensor, layer: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """Which elements stay, bool of the shape of `index` (flat NHWC indices i, int64); for rows that no eight divide.

    One Philox call for each element.
    """
    w0, w1, w2, w3 = tl.philox(seed, (index >> 3).to(tl.uint32), layer.to(tl.uint32), 0, 0)
    k = (index & 7).to(tl.int32)
    word = tl.where(k < 4, tl.where(k < 2, w0, w1), tl.where(k < 6, w2, w3))
    return tl.where(k & 1 == 1, word >> 16, word & 0xFFFF) >= threshold.to(tl.uint32)
