"""Krait's stand-in for mamba_ssm 2.3.2, on CPU and CUDA alike."""

from typing import Any

from krait_mamba_ssm_dropin import check_for_original

check_for_original("mamba_ssm", "mamba-ssm", __file__)

from .models.mixer_seq_simple import MambaLMHeadModel  # noqa: E402
from .modules.mamba2 import Mamba2  # noqa: E402
from .modules.mamba_simple import Mamba  # noqa: E402
from .ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn  # noqa: E402

__version__ = "2.3.2+krait"
__all__ = ["Mamba", "Mamba2", "MambaLMHeadModel", "mamba_inner_fn", "selective_scan_fn"]


def __getattr__(name: str) -> Any:
    if name == "Mamba3":
        # Raises the ImportError that says what is missing.
        from .modules import mamba3  # noqa: F401
    raise AttributeError(f"module 'mamba_ssm' has no attribute {name!r}")
