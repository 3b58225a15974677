"""The mark of parameters that only `make test-slow` runs."""

import pytest


def slow(*values, **options):
    """A set of parameters for `pytest.mark.parametrize` that is marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)
