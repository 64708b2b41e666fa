"""transformers' models compute on the drop-in what they do on their own slow path."""

from __future__ import annotations

import inspect
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
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated  # noqa: E402

# In training FalconMamba hands its norm of dt to mamba_inner_fn, which applies it behind the
# projection of dt; its own slow path applies it before. In older releases of
# transformers, 5.17 among them, the slow path of three others norms all channels together; the kernels
# norm each group.
UNLIKE_ITSELF = ["falcon_mamba"]
if "group_size" not in inspect.signature(MambaRMSNormGated).parameters:
    UNLIKE_ITSELF += ["mamba2", "bamba", "granite_hybrid"]

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
    parts = ["evaluation", "padded", "generation", "padded generation"]
    if name not in UNLIKE_ITSELF:
        parts.append("training")
    for part in parts:
        assert found[part].keys() == expected[part].keys()
        for what, value in expected[part].items():
            scale = max(1.0, float(value.abs().max()))
            close(found[part][what] / scale, value / scale, what=f"{name}, {part}, {what}")
    # Both round to 16 bits, each in its way, and a single gradient that cancels may be off by
    # several times what the other's is, either way round. Ours has to be as near to float32 on
    # average, and nowhere far from it.
    first = "first logits of padded generation"
    exact = {**expected["evaluation"], first: expected["padded generation"]["logits"][0]}
    assert found["bfloat16"].keys() == expected["bfloat16"].keys() == exact.keys()
    errors = []
    for what, value in exact.items():
        assert found["bfloat16"][what].dtype == expected["bfloat16"][what].dtype, what
        if value.norm() > 0.0:
            pair = (found["bfloat16"][what], expected["bfloat16"][what])
            errors.append([float((t.float() - value).norm() / value.norm()) for t in pair])
            assert errors[-1][0] < 0.25, f"{name}, bfloat16, {what}"
    ours, slows = (sum(side) / len(errors) for side in zip(*errors))
    assert ours <= 1.5 * slows + 1e-3, f"{name}, bfloat16: off by {ours}, the slow path by {slows}"
