"""Everything about the package is in pyproject.toml; this file is where the extensions of csrc/ will be built."""

from setuptools import setup

setup()
