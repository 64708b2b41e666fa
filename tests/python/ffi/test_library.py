"""Loading, threads, and several callers at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import krait
from krait import _library, ops

F32 = np.float32


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    return subprocess.run(
        [sys.executable, "-c", "import sys\n" + code],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = krait.get_num_threads()
    yield
    krait.set_num_threads(before)


def scan_arguments(batch: int, channels: int, length: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal((batch, channels, length), F32),
        rng.random((batch, channels, length), F32),
        -rng.random((channels, 16), F32),
        rng.standard_normal((batch, 16, length), F32),
        rng.standard_normal((batch, 16, length), F32),
    ]


def test_import_loads_nothing() -> None:
    code = """
import krait
print([name for name in ("torch", "tvm_ffi", "numpy") if sys.modules.get(name)])
"""
    result = run_python(code, KRAIT_LIBRARY="/nowhere/libkrait_ffi.so")
    assert result.stdout.strip() == "[]", result.stderr


def test_library_without_torch_and_torch_later() -> None:
    """Loading it does not import torch, whose tensors are operands all the same."""
    code = """
import numpy as np, krait
from krait import ops
x, weight = np.ones((1, 3, 5), np.float32), np.ones((3, 4), np.float32)
expected = ops.causal_conv1d(x, weight)
assert "torch" not in sys.modules
import torch
out = ops.causal_conv1d(torch.from_numpy(x), torch.from_numpy(weight))
assert type(out) is torch.Tensor and (out.numpy() == expected).all()
from krait.torch import functional
x = torch.from_numpy(x).bfloat16().requires_grad_()
functional.causal_conv1d(x, torch.ones(3, 4)).sum().backward()
print(x.grad.float().sum().item())
"""
    result = run_python(code)
    assert result.stdout.strip() == "42.0", result.stderr


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.4.1+cu121", True), ("2.10.0", True), ("2.11.0", False), ("2.15.0a0+git1", False)],
)
def test_versions_of_torch(monkeypatch: pytest.MonkeyPatch, version: str, expected: bool) -> None:
    monkeypatch.setattr(_library, "version", lambda name: version)
    assert _library._tensors_need_tvm_ffi() == expected


def test_nothing_is_compiled_for_old_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = "TVM_FFI_DISABLE_TORCH_C_DLPACK"
    monkeypatch.delenv(switch, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with _library._without_compiler():
        assert os.environ[switch] == "1"
    assert switch not in os.environ
    monkeypatch.setenv(switch, "0")
    with _library._without_compiler():
        assert os.environ[switch] == "0"


def test_other_threads_import_torch_meanwhile() -> None:
    code = """
import threading, types
from krait import _library
class Found:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            found.append(name)
found = []
sys.meta_path.insert(0, Found())
def look():
    try:
        import torch
    except ImportError:
        pass
with _library.without_torch():
    look()
    assert found == []
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
print(found)
"""
    result = run_python(code)
    assert result.stdout.strip() == "['torch']", result.stderr


def test_missing_library() -> None:
    code = "import krait; krait.build_info()"
    result = run_python(code, KRAIT_LIBRARY="/nowhere/libkrait_ffi.so")
    assert result.returncode != 0
    assert (
        "ImportError: krait: /nowhere/libkrait_ffi.so does not exist; KRAIT_LIBRARY names no file"
        in result.stderr
    )


def test_build_info() -> None:
    info = krait.build_info()
    assert info["version"] == krait.__version__
    assert Path(info["path"]).is_file()
    assert info["simd"]
    assert info["cuda_devices"] >= 0
    assert info["cuda"] or info["cuda_devices"] == 0


def test_only_the_functions_are_visible() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", krait.build_info()["path"]], capture_output=True, text=True
    )
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert names
    assert all(name.startswith("__tvm_ffi_") for name in names)


def test_number_of_threads() -> None:
    krait.set_num_threads(3)
    assert krait.get_num_threads() == 3
    krait.set_num_threads(0)
    assert krait.get_num_threads() == len(os.sched_getaffinity(0))
    for wrong in (-1, 4097):
        with pytest.raises(ValueError, match=rf"threads is {wrong}, expected 0"):
            krait.set_num_threads(wrong)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"KRAIT_NUM_THREADS": "5", "OMP_NUM_THREADS": "3"}, 5),
        ({"KRAIT_NUM_THREADS": "many", "OMP_NUM_THREADS": "2"}, 2),
    ],
)
def test_threads_of_the_environment(variables: dict[str, str], expected: int) -> None:
    result = run_python("import krait; print(krait.get_num_threads())", **variables)
    assert result.stdout.strip() == str(expected), result.stderr


def test_results_do_not_depend_on_threads() -> None:
    arguments = scan_arguments(2, 70, 90)
    krait.set_num_threads(1)
    expected = ops.selective_scan(*arguments)
    for count in (2, 4):
        krait.set_num_threads(count)
        np.testing.assert_array_equal(ops.selective_scan(*arguments), expected)


def test_lock_is_released() -> None:
    """While one thread computes, another one goes on."""
    krait.set_num_threads(1)
    arguments = scan_arguments(4, 512, 4000)
    spans: list[tuple[float, float]] = []

    def compute() -> None:
        for _ in range(3):
            begin = time.perf_counter()
            ops.selective_scan(*arguments)
            spans.append((begin, time.perf_counter()))

    worker = threading.Thread(target=compute)
    worker.start()
    ticks = []
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.001)
    worker.join()
    begin, end = max(spans, key=lambda span: span[1] - span[0])
    inside = sum(begin < tick < end for tick in ticks)
    assert end - begin > 0.02, "the call is too short for this test"
    assert inside > 5


def test_callers_at_a_time() -> None:
    krait.set_num_threads(2)
    cases = [scan_arguments(1, channels, 50) for channels in range(1, 9)]
    expected = [ops.selective_scan(*arguments) for arguments in cases]
    failures: list[BaseException] = []

    def work(which: int) -> None:
        try:
            for _ in range(40):
                np.testing.assert_array_equal(ops.selective_scan(*cases[which]), expected[which])
                with pytest.raises(ValueError):
                    ops.selective_scan(*cases[which][:4], cases[(which + 1) % 8][4][:, :3])
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_threads_may_change_between_calls_at_a_time() -> None:
    arguments = scan_arguments(1, 64, 200)
    expected = ops.selective_scan(*arguments)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                np.testing.assert_array_equal(ops.selective_scan(*arguments), expected)
        except BaseException as failure:
            failures.append(failure)

    worker = threading.Thread(target=work)
    worker.start()
    for i in range(60):
        krait.set_num_threads(1 + i % 4)
        ops.selective_scan(*arguments)
    stop.set()
    worker.join()
    assert not failures


def test_fork() -> None:
    """A forked process has none of the threads, and computes all the same."""
    code = """
import os, signal
import numpy as np, krait
from krait import ops
krait.set_num_threads(4)
x = np.random.default_rng(0).standard_normal((64, 256, 4), dtype=np.float32)
w = np.ones((256, 4), np.float32)
expected = ops.causal_conv1d(x, w)
child = os.fork()
if child == 0:
    signal.alarm(60)
    same = np.array_equal(ops.causal_conv1d(x, w), expected)
    krait.set_num_threads(2)
    same = same and np.array_equal(ops.causal_conv1d(x, w), expected)
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(ops.causal_conv1d(x, w), expected)
print("done")
"""
    result = run_python(code)
    assert result.stdout.strip() == "done", result.stderr


class Machine:
    """A library on a machine that has certificates or none."""

    def __init__(self, certificates: bool) -> None:
        self._certificates = certificates

    def has_certificates(self) -> bool:
        return self._certificates


def test_certificates_of_certifi(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken where the machine has none of its own, for whoever reads the environment."""
    certifi = pytest.importorskip("certifi")
    monkeypatch.setenv("SSL_CERT_FILE", "before")
    _library._trust_certifi(Machine(certificates=True))
    assert os.environ["SSL_CERT_FILE"] == "before"
    _library._trust_certifi(Machine(certificates=False))
    assert os.environ["SSL_CERT_FILE"] == certifi.where()
    monkeypatch.setitem(sys.modules, "certifi", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("SSL_CERT_FILE", "before")
    _library._trust_certifi(Machine(certificates=False))
    assert os.environ["SSL_CERT_FILE"] == "before"


def test_certificates_that_the_environment_names(tmp_path: Path) -> None:
    """The compiled library reads them, also those that this process has set for itself."""
    code = """
import os
from krait import _library
os.environ["SSL_CERT_DIR"] = sys.argv[0]
print(_library.library().has_certificates())
"""
    result = run_python(code)
    assert result.stdout.strip() == "True", result.stderr


def test_release_memory() -> None:
    """Scratch memory of a large call goes back to the system."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    krait.set_num_threads(1)
    before = resident()
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((600, 8), F32), rng.standard_normal((100000, 8), F32)
    ops.linear_cross_entropy(x, weight, np.zeros(600, np.int64), block=600)
    kept = resident()
    krait.release_memory()
    assert kept - before > 200e6
    assert resident() < before + 100e6


def test_ctrl_c_between_calls() -> None:
    """Python sees its signals once a call is over."""
    arguments = scan_arguments(2, 64, 500)
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        while True:
            ops.selective_scan(*arguments)
    ops.selective_scan(*arguments)
