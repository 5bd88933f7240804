"""EDM's preconditioning, D_x = c_skip x + c_out F_x(c_in x, ln(sigma) / 4): its coefficients, for ops and networks alike."""

from __future__ import annotations

from torch import Tensor


def coefficients(sigma: Tensor, sigma_data: float, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (c_skip, c_out, c_in) of noise levels sigma of any shape, each of that shape and dtype."""
    shifted, variance = sigma - shift, sigma_data**2
    root = (sigma**2 + variance).sqrt()
    return variance / (shifted**2 + variance), shifted * sigma_data / root, 1 / root
