"""A Mamba-2 block's forward and backward: krait.torch's layer beside the C++ one, on CPUs.

The two take turns, C++ (bench_block) in a process of its own and PyTorch here, so that both meet
the same weather; what is printed are the smallest medians of a round, which a busy machine changes
least, and their ratio. Goal: PyTorch takes at most 5 % longer. "products" is torch's own time for
the two projections and their gradients, which are the part of the layer that is not Krait's.

    python bench/python_block.py BENCH_BLOCK [--rounds 5] [--repeats 5] [--threads 2] [--dtype ...]

Both sides get their gradients zeroed in each step. Parameters and activations are of the dtype on
both sides; the C++ block sums the gradients of parameters in f32, PyTorch's have their dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from typing import Callable

import torch

import krait
from krait.torch import Mamba2

SHAPES = ((768, 1, 256), (768, 1, 1024), (2560, 1, 256))
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def compiled_ms(program: str, case: str, repeats: int) -> float:
    """The median of the C++ block's times."""
    run = subprocess.run(
        [program, f"--benchmark_filter=^{case}$", "--benchmark_format=json",
         "--benchmark_min_time=0.05", f"--benchmark_repetitions={repeats}"],
        check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    times = [b for b in json.loads(run.stdout)["benchmarks"] if b.get("run_type") != "aggregate"]
    return statistics.median(b["real_time"] for b in times)


def median_ms(call: Callable[[], None], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def steps(d_model: int, batch: int, length: int, dtype: torch.dtype) -> list[Callable[[], None]]:
    """A step of the block, and one of its two projections by themselves."""
    torch.manual_seed(0)
    block = Mamba2(d_model, dtype=dtype)
    x = torch.randn(batch, length, d_model, dtype=dtype, requires_grad=True)
    inner = torch.randn(batch, length, block.d_inner, dtype=dtype, requires_grad=True)
    dout = torch.randn(batch, length, d_model, dtype=dtype)
    dinner = torch.randn(batch, length, block.in_proj.out_features, dtype=dtype)

    def clear() -> None:
        block.zero_grad()
        x.grad = inner.grad = None

    def step() -> None:
        clear()
        block(x).backward(dout)

    def products() -> None:
        clear()
        block.in_proj(x).backward(dinner)
        block.out_proj(inner).backward(dout)

    return [step, products]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", help="bench_block of a release build")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    krait.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, krait {krait.build_info()['version']}, ms of a step")
    print(f"{'':24}{'C++':>10}{'torch':>10}{'products':>10}{'ratio':>10}")
    for name in args.dtype or DTYPES:
        for d_model, batch, length in SHAPES:
            case = f"mamba2_{name}/d:{d_model}/B:{batch}/L:{length}/t:{args.threads}/real_time"
            calls = steps(d_model, batch, length, DTYPES[name])
            rounds = [
                (
                    compiled_ms(args.program, case, args.repeats),
                    *(median_ms(call, args.repeats) for call in calls),
                )
                for _ in range(args.rounds)
            ]
            compiled, torch_ms, products = (min(column) for column in zip(*rounds))
            ratio = torch_ms / compiled
            label = f"{name} d={d_model} B={batch} L={length}"
            print(f"{label:24}{compiled:10.1f}{torch_ms:10.1f}{products:10.1f}{ratio:10.2f}")


if __name__ == "__main__":
    main()
