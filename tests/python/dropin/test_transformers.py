"""transformers' models compute on the drop-in what they do on their own slow path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close

pytest.importorskip("transformers", "5.15", "older releases run none of this on a CPU")

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
    device = os.environ.get("KRAIT_TEST_DEVICE", "cpu")
    expected, found = slow[name], transformers_models.run(name, device)
    assert any(FALLS_BACK in text for text in expected["warnings"])
    assert not any(FALLS_BACK in text for text in found["warnings"])
    parts = ["evaluation", "padded", "generation"]
    if name != "falcon_mamba":
        # In training it hands its norm of dt to mamba_inner_fn, which applies it behind the
        # projection of dt; its own slow path applies it before.
        parts.append("training")
    for part in parts:
        assert found[part].keys() == expected[part].keys()
        for what, value in expected[part].items():
            scale = max(1.0, float(value.abs().max()))
            close(found[part][what] / scale, value / scale, what=f"{name}, {part}, {what}")
