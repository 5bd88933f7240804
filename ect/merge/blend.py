"""Linear combinations of the weights of one network, as several model files of a run have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ect.files.checkpoint import load_model, read_model, read_spec
from ect.files.fit import check_finite, check_names
from ect.files.kept import Kept
from ect.files.model_file import save_model

Coefficients = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """Weights that others are mixed with: name, in a table and in the file that is made, and where they are from."""

    name: str
    path: Path
    ema: int | None = None


def parts_of(kept: Sequence[Kept]) -> list[Part]:
    """Return raw weights as parts, each by the name of its file."""
    return [Part(one.path.name, one.path) for one in kept]


class Blend:
    """The combinations sum_i c_i theta_i of the parameters of several parts, in order; buffers are those of the last part.

    Parts stay on `device` in the precision of their files; sums are fp32. Raises UserError where a file is damaged, or two
    are not of one network.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        self.parts, last = list(parts), parts[-1]
        self.net, self.info = load_model(last.path, device=device, ema=last.ema)
        self.spec, self._names = read_spec(last.path), [name for name, _ in self.net.named_parameters()]
        self._thetas = [self._flat(part).to(device) for part in parts]

    def _flat(self, part: Part) -> Tensor:
        """Return the parameters of a part, one after another."""
        snapshot = read_model(part.path, part.ema)
        check_names(self.net.state_dict(), snapshot.state, str(part.path))
        check_finite(snapshot.state, str(part.path))
        return torch.cat([snapshot.state[name].flatten() for name in self._names])

    @torch.no_grad()
    def load(self, coefficients: Coefficients) -> None:
        """Give the network `net` the combination of these coefficients, [parts]."""
        total = torch.zeros_like(self._thetas[0], dtype=torch.float32)
        for theta, c in zip(self._thetas, coefficients.tolist(), strict=True):
            if c:
                total.add_(theta, alpha=c)
        sizes = [parameter.numel() for parameter in self.net.parameters()]
        for parameter, values in zip(self.net.parameters(), total.split(sizes), strict=True):
            parameter.copy_(values.view(parameter.shape))

    def save(self, path: Path, coefficients: Coefficients, about: dict[str, Any]) -> None:
        """Write the combination as a model file, which says what it is made of. about: how the coefficients were found."""
        self.load(coefficients)
        made = {part.name: c for part, c in zip(self.parts, coefficients.tolist(), strict=True) if c}
        info = {key: value for key, value in self.info.items() if key not in ("ema", "weights")}
        save_model(path, self.net.state_dict(), self.spec, {**info, "merged": {**about, "coefficients": made}})
