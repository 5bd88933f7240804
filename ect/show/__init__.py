"""What a run shows of itself: log, grids, report."""
