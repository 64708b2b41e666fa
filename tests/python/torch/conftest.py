"""What the tests of krait.torch share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.fixture(autouse=True)
def _same_numbers_each_time():
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """KRAIT_TEST_DEVICE=cuda runs operators, layers and models on a GPU, which has no f64."""
    device = os.environ.get("KRAIT_TEST_DEVICE", "cpu")
    if device == "cpu" or request.module.__name__ in ("test_cuda", "test_distributed"):
        yield
        return
    if request.module.__name__ not in ("test_functional", "test_modules", "test_models"):
        pytest.skip(f"not for {device}")
    with torch.device(device):
        yield


@pytest.fixture
def golden() -> Path:
    return GOLDEN
