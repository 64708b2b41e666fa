"""MambaConfig, by upstream's interface."""

from krait.torch import MambaConfig  # noqa: F401
