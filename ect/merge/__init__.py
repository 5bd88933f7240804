"""Networks made of the weights that a run kept: `python -m ect.merge`. Each way to choose coefficients is a file here."""

from ect.merge.posthoc import posthoc_coefficients

__all__ = ["posthoc_coefficients"]
