"""transformers' models compute on the drop-in what they do on their own slow path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close

pytest.importorskip("transformers", "5.23", "older releases do not run the operators on a CPU")

import transformers_models  # noqa: E402

FALLS_BACK = "falling back to its reference PyTorch implementation"


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a Python without the drop-in computes."""
    path = tmp_path_factory.mktemp("transformers") / "slow.pt"
    program = Path(transformers_models.__file__)
    subprocess.run([sys.executable, str(program), str(path)], check=True, timeout=300)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", list(transformers_models.MODELS))
def test_model(name: str, slow: Any) -> None:
    expected, found = slow[name], transformers_models.run(name)
    assert any(FALLS_BACK in text for text in expected["warnings"])
    assert not any(FALLS_BACK in text for text in found["warnings"])
    for part in ("evaluation", "training", "padded", "generation"):
        assert found[part].keys() == expected[part].keys()
        for what, value in expected[part].items():
            if part == "training" and name == "falcon_mamba":
                continue
            scale = max(1.0, float(value.abs().max()))
            close(found[part][what] / scale, value / scale, what=f"{name}, {part}, {what}")
