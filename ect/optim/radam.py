"""RAdam and Adam on the op radam_ema, which has formulas and sources; the results equal torch.optim's."""

from __future__ import annotations

from typing import Any

from ect_kernels.radam_ema import radam_ema

from ect.optim.arenas import Arenas
from ect.optim.rule import Rule


class RAdam(Rule):
    """Rectified Adam (Liu et al., 2020), with averages and half-precision copy in the same three launches.

    The gradients are left cleaned and clipped; a loss scale stays on them. Non-finite gradients never enter the moments:
    without a loss scale nan becomes 0 and inf +-1e5 (the public code's rule), with one the whole step is skipped.
    """

    moments = ("exp_avg", "exp_avg_sq")
    takes_loss_scale = True
    op_name = "radam"

    def step(self, arenas: Arenas[Any]) -> None:
        m, v = (arenas.moments[name] for name in self.moments)
        radam_ema(arenas.params, arenas.grads, m, v, arenas.emas, arenas.shadow, self.state_f64, self.state_i64)


class Adam(RAdam):
    """Adam (Kingma & Ba, 2015), with averages, half-precision copy and non-finite gradients handled as by `RAdam`."""

    op_name = "adam"
