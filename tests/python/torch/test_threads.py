"""Operators beside PyTorch's own: on the same threads, in processes that were forked."""

from __future__ import annotations

import subprocess
import sys

from krait.torch._operator import openmp_libraries

BEGIN = """
import os
import torch
from krait.torch import functional as K

torch.manual_seed(0)
torch.set_num_threads(3)
x, weight = torch.randn(4, 64, 4096), torch.randn(64, 4)


def threads():
    return len(os.listdir("/proc/self/task"))


"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_operators_start_no_threads_of_their_own():
    """Threads of PyTorch that wait by spinning would keep them from the processors."""
    code = """
(x + x).sum()
before = threads()
out = K.causal_conv1d(x, weight)
K.norm(x, torch.ones(4096))
assert threads() == before, f"{before} threads became {threads()}"

# As many as PyTorch has now, with the same result.
torch.set_num_threads(1)
assert torch.equal(K.causal_conv1d(x, weight), out)
assert threads() <= before

# Unless somebody says otherwise.
import krait

krait.set_num_threads(2)
assert torch.equal(K.causal_conv1d(x, weight), out)
print("done")
"""
    assert run(code) == "done"


def test_a_forked_process_computes_too():
    """OpenMP does not survive a fork once it has run: the child works on threads of its own."""
    code = """
out = K.causal_conv1d(x, weight)
child = os.fork()
if child == 0:
    import signal

    signal.alarm(60)
    torch.set_num_threads(1)  # as DataLoader's workers do: PyTorch's operators would wait for ever
    os._exit(0 if torch.equal(K.causal_conv1d(x, weight), out) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(K.causal_conv1d(x, weight), out)
print("done")
"""
    assert run(code) == "done"


def test_libraries_of_openmp_are_told_apart():
    one = """7f00-7f01 r-xp 00000000 fe:00 12  /env/torch/lib/libgomp.so.1
7f01-7f02 r--p 00000000 fe:00 12  /env/torch/lib/libgomp.so.1
7f02-7f03 r--p 00000000 fe:00 13  /usr/lib/libc.so.6
7f03-7f04 rw-p 00000000 00:00 0
"""
    assert openmp_libraries(one) == {"libgomp.so.1"}
    for other in ("libgomp-a34b3233.so.1", "libiomp5.so", "libomp.so"):
        assert openmp_libraries(f"{one}7f04-7f05 r-xp 0 fe:00 14  /env/lib/{other}\n") == {
            "libgomp.so.1",
            other,
        }
