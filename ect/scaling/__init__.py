"""A scaling study: runs over widths, lengths and seeds, and whether their quality follows a power law of the compute."""
