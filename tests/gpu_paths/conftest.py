"""Tests of the code that runs on a GPU, without one."""
