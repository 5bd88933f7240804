"""Libraries that the commands in benchmarks/ share."""
