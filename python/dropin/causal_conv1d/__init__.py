"""Krait's stand-in for causal_conv1d 1.7, on CPU and CUDA alike."""

from krait_mamba_ssm_dropin import check_for_original

check_for_original("causal_conv1d", "causal-conv1d", __file__)

from .causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update  # noqa: E402
from .causal_conv1d_varlen import causal_conv1d_varlen_states  # noqa: E402

__version__ = "1.7.0+krait"
__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]
