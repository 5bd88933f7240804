"""What is read from and written to disk: models, checkpoints, and foreign pickles read as data."""
