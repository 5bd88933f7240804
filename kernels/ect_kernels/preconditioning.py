"""EDM's preconditioning, D_x = c_skip x + c_out F_x(c_in x, c_noise): its coefficients, for ops and networks alike."""

from __future__ import annotations

from torch import Tensor


def coefficients(sigma: Tensor, sigma_data: float, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (c_skip, c_out, c_in) of noise levels sigma of any shape, each of that shape and dtype."""
    shifted, variance = sigma - shift, sigma_data**2
    root = (sigma**2 + variance).sqrt()
    return variance / (shifted**2 + variance), shifted * sigma_data / root, 1 / root


def noise_label(sigma: Tensor) -> Tensor:
    """Return c_noise = ln(sigma) / 4, what the network is told of noise levels sigma > 0 of any shape."""
    return sigma.log() / 4
