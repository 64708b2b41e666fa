"""The switch between deterministic and faster kernels. Krait's results repeat in any case."""

from __future__ import annotations

import os
from typing import Optional

import torch

__all__ = ["set_deterministic_mode", "use_deterministic_mode"]

_chosen: Optional[bool] = None


def use_deterministic_mode():
    """What was set, else what MAMBA_DETERMINISTIC (0 or 1) or PyTorch says."""
    if _chosen is not None:
        return _chosen
    variable = os.environ.get("MAMBA_DETERMINISTIC")
    if variable:
        return variable[0] == "1"
    return torch.are_deterministic_algorithms_enabled()


def set_deterministic_mode(value):
    """Sets what ``use_deterministic_mode`` returns; None leaves it to the environment again."""
    global _chosen
    _chosen = value
