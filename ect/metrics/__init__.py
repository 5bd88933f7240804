"""Quality of generated images: `make_evaluator` picks the metrics for a data set, `quality_rows` rates a network."""

from __future__ import annotations

from ect.metrics.choice import make_evaluator, reference
from ect.metrics.evaluator import Column, Evaluator
from ect.metrics.fidelity import FidelityOptions
from ect.metrics.quality import (
    QualityRow,
    RemoteEvaluator,
    named,
    quality_rows,
    quality_table,
)
from ect.metrics.target import Crossing, Target

__all__ = [
    "Column",
    "Crossing",
    "Evaluator",
    "FidelityOptions",
    "QualityRow",
    "RemoteEvaluator",
    "Target",
    "make_evaluator",
    "named",
    "quality_rows",
    "quality_table",
    "reference",
]
