"""Networks made of the raw weights that a run kept: `python -m ect.merge`. Each way to choose coefficients is a file here."""
