"""What the tests of the C ABI and of krait.ops share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """KRAIT_TEST_DEVICE=cuda runs the operators on a GPU."""
    device = os.environ.get("KRAIT_TEST_DEVICE", "cpu")
    if device == "cpu":
        return
    if request.module.__name__ not in ("test_selective_scan", "test_ssd", "test_other_operators"):
        pytest.skip(f"not for {device}")
    from on_device import OnDevice

    monkeypatch.setattr(request.module, "ops", OnDevice(request.module.ops, device))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20231201)
