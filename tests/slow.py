"""Marks what takes long, so that the plain test command leaves it out."""

import pytest


def slow(value):
    """A value of a test's parameter, or a tuple of several parameters' values, with the mark."""
    return pytest.param(*(value if isinstance(value, tuple) else [value]), marks=pytest.mark.slow)


def slow_except(kept, values):
    """The values of a test's parameter, all but some of them marked."""
    return [value if value in kept else slow(value) for value in values]
