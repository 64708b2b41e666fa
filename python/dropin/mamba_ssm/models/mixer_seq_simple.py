"""Language models, by upstream's interface."""

from krait.torch import MambaLMHeadModel, MixerModel, create_block  # noqa: F401
