"""The search for a linear combination of saved weights, LCSC (Liu et al., ICLR 2025, arXiv 2404.02241).

    theta(a) = theta_1 + sum_{i >= 2} a_i (theta_i - theta_1),    a unconstrained

so the coefficients of the theta_i sum to 1, and may be negative. The a_i are found by CMA-ES (Hansen & Ostermeier, 2001) of
the library `cma`, which the extra `search` installs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ect.errors import UserError
from ect.merge.blend import Coefficients

STEP = 0.1
"""Standard deviation of the first steps from the start, in each a_i."""


def library() -> Any:
    """Return the library cma. Raises UserError where it is not installed."""
    try:
        import cma
    except ImportError as error:
        raise UserError(
            "--search: the library cma is not installed; pip install 'easy-consistency-tuning[search]'"
        ) from error
    return cma


def search(rate: Callable[[Coefficients], float], start: Coefficients, ratings: int, seed: int) -> list[Coefficients]:
    """Return what CMA-ES ends with: its mean, and the best combination that it met; coefficients that sum to 1.

    Args: rate: what is to be small. start: coefficients that sum to 1, at least 2. ratings: about how often `rate` may be
    asked, at least once for a generation. seed: of the steps; the same one gives the same search.
    """
    random = np.random.default_rng(seed)
    options = {"verbose": -9, "seed": float("nan"), "randn": lambda *shape: random.standard_normal(shape)}
    strategy = library().CMAEvolutionStrategy(start[1:], STEP, options)
    for _ in range(max(ratings // strategy.popsize, 1)):
        steps = strategy.ask()
        strategy.tell(steps, [rate(_whole(step)) for step in steps])
        if strategy.stop():
            break
    found = strategy.result
    return [_whole(found.xfavorite), _whole(found.xbest)]


def _whole(a: Coefficients) -> Coefficients:
    """Return the coefficients of all weights, of those of all but the first."""
    return np.concatenate([[1 - a.sum()], a])
