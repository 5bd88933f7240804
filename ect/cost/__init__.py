"""The cost of a step and the noise of its rounding, found before it runs."""
