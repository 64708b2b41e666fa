"""GatedMLP, by upstream's interface."""

from krait.torch import GatedMLP  # noqa: F401
