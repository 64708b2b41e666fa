"""Mamba2, by upstream's interface."""

from krait.torch import Mamba2  # noqa: F401
