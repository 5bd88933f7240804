"""The sights of a run: log, grids, report."""
