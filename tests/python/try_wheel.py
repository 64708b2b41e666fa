"""What an installed wheel must be able to do, with NumPy alone beside it (scripts/test-wheel)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np

import krait
from krait import ops


def operators() -> None:
    """A scan against its recurrence in double precision."""
    rng = np.random.default_rng(0)
    u, delta = rng.standard_normal((2, 1, 64, 100), dtype=np.float32)
    A = -np.exp(rng.standard_normal((64, 16), dtype=np.float32))
    B, C = rng.standard_normal((2, 1, 16, 100), dtype=np.float32)
    y, state = ops.selective_scan(u, delta, A, B, C, delta_softplus=True, return_last_state=True)
    d = np.logaddexp(delta[0].astype(float), 0.0)
    h = np.zeros((64, 16))
    for t in range(100):
        h = np.exp(d[:, t, None] * A) * h + d[:, t, None] * B[0, :, t] * u[0, :, t, None]
        np.testing.assert_allclose(y[0, :, t], h @ C[0, :, t], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state[0], h, rtol=1e-3, atol=1e-5)
    # A product that oneDNN takes, on the OpenMP of the wheel.
    x, weight = np.ones((300, 256), np.float32), np.ones((512, 256), np.float32)
    assert (ops.linear(x, weight) == 256).all()


def models() -> None:
    """The bundled model writes, in Python and on the command line."""
    model = krait.LanguageModel.from_pretrained()
    assert np.isfinite(np.asarray(model.logits([[1, 2, 3]]))).all()
    result = subprocess.run(
        [sys.executable, "-m", "krait", "generate", "--prompt", "ROMEO:", "--max-new-tokens", "5"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("ROMEO:"), result.stdout


def main() -> None:
    assert importlib.util.find_spec("torch") is None
    info = krait.build_info()
    assert importlib.metadata.version("krait-ssm") == krait.__version__ == info["version"]
    assert Path(info["path"]).parent == Path(krait.__file__).parent
    operators()
    models()
    print(f"Python {sys.version.split()[0]}, NumPy {np.__version__}: {info}")


if __name__ == "__main__":
    main()
