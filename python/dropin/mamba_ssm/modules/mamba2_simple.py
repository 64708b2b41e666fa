"""Mamba2Simple, by upstream's interface."""

from krait.torch import Mamba2Simple  # noqa: F401
