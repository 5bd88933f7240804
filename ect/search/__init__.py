"""Searches after the training: choices that are rated on images of their own, and reported on others (judge.py)."""
