"""Block, by upstream's interface."""

from krait.torch import Block  # noqa: F401
