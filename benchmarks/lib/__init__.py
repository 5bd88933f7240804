"""What the commands in benchmarks/ share."""
