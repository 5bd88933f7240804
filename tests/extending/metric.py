"""Contrast: how far the spread of the pixels is from that of the data."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ect.data import Dataset
from ect.metrics import Column, Evaluator
from ect.metrics.choice import EXTRA


class Contrast(Evaluator):
    """The standard deviation of the generated pixels over that of the data's; 1 is best."""

    def __init__(self, dataset: Dataset) -> None:
        self.columns = (Column("contrast"),)
        self.std = dataset.images.double().std()
        self.used = {"images": len(dataset.images)}

    def evaluate(self, images: Iterable[Tensor]) -> dict[str, float]:
        """Return the figure of each column; images come in batches of uint8 [n, H, W, C]."""
        return {"contrast": float(torch.cat(list(images)).double().std() / self.std)}


EXTRA.append(lambda dataset: None if dataset is None else Contrast(dataset))
