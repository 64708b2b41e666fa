"""Makes the packages of this checkout importable where none are installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Iterator

import pytest
import torch

_PYTHON = Path(__file__).resolve().parents[3] / "python"
for folder in (_PYTHON / "dropin", _PYTHON):
    package = "mamba_ssm" if folder.name == "dropin" else "krait"
    if importlib.util.find_spec(package) is None:
        sys.path.insert(0, str(folder))
        # Tests that start a Python of their own hand this on.
        earlier = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(folder) + (os.pathsep + earlier if earlier else "")

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """KRAIT_TEST_DEVICE=cuda runs the operators, modules and generation on a GPU."""
    device = os.environ.get("KRAIT_TEST_DEVICE", "cpu")
    if device == "cpu" or request.module.__name__ in ("test_lm_eval", "test_transformers"):
        yield
        return
    with torch.device(device):
        yield


# Nothing here needs the network; a library that tries says so at once.
for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[variable] = "1"
