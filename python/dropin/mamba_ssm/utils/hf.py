"""Checkpoints in folders and on the Hugging Face hub, by upstream's interface."""

from krait.torch.hub import load_config_hf, load_state_dict_hf  # noqa: F401
