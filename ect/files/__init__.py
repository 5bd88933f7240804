"""The files of this project: models, checkpoints, and foreign pickles read as data."""
