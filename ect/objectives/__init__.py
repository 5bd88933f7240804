"""Objectives beside those of ect.objective, one file each."""
