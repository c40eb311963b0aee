"""Marks slow parameters of tests, which the plain test command leaves out."""

import pytest


def slow(value):
    """Mark a value of a test's parameter, or a tuple of values of several parameters, as slow."""
    return pytest.param(*(value if isinstance(value, tuple) else [value]), marks=pytest.mark.slow)


def slow_except(kept, values):
    """Mark all values of a test's parameter as slow, except those to keep."""
    return [value if value in kept else slow(value) for value in values]
