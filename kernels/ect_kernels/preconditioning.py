"""EDM's preconditioning, D_x = c_skip x + c_out F_x(c_in x, ln(sigma) / 4): its coefficients, for ops and networks alike."""

from __future__ import annotations

from torch import Tensor


def coefficients(sigma: Tensor, sigma_data: float, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in) of noise levels sigma of any shape, each of that shape and dtype.

    c_skip = sd^2 / ((sigma - shift)^2 + sd^2),  c_out = (sigma - shift) sd / sqrt(sigma^2 + sd^2),
    c_in = 1 / sqrt(sigma^2 + sd^2), sd: sigma_data. Sources: Karras et al., 2022 (EDM), table 1; the shift, which makes
    D_x = x at sigma = shift: Song et al., 2023 (consistency models), appendix C.
    """
    shifted, variance = sigma - shift, sigma_data**2
    root = (sigma**2 + variance).sqrt()
    return variance / (shifted**2 + variance), shifted * sigma_data / root, 1 / root
