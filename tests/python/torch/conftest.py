"""What the tests of krait.torch share."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.fixture(autouse=True)
def _same_numbers_each_time():
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture
def golden() -> Path:
    return GOLDEN
