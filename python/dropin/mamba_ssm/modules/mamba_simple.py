"""Mamba, by upstream's interface."""

from krait.torch import Mamba  # noqa: F401
