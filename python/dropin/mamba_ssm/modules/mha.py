"""MHA, by upstream's interface."""

from krait.torch import MHA  # noqa: F401
