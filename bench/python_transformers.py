"""transformers' Mamba on a CPU, with the drop-in for mamba_ssm and causal_conv1d and without.

A model of mamba-130m's sizes with random weights: the time of a prefill and of a training step
(forward, backward, AdamW). Each side runs in a process of its own; what is printed last is the
ratio of the medians.

    python bench/python_transformers.py [--tokens 512] [--layers 24] [--repeats 3] [--threads 2] [--no-training]

The packages krait, mamba_ssm and causal_conv1d have to be importable (PYTHONPATH=python:python/dropin).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any, Callable


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure(options: argparse.Namespace) -> dict[str, float]:
    if options.side == "without":
        # As where they are not installed.
        for name in ("mamba_ssm", "causal_conv1d"):
            sys.modules[name] = None  # type: ignore[assignment]
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    if options.side == "with":
        import krait

        krait.set_num_threads(options.threads)
    model = MambaForCausalLM(MambaConfig(num_hidden_layers=options.layers))
    ids = torch.randint(0, 50280, (1, options.tokens))

    @torch.inference_mode()
    def prefill() -> None:
        model.eval()(ids)

    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = {"prefill": median_seconds(prefill, options.repeats)}
    if not options.no_training:
        seconds["training step"] = median_seconds(step, options.repeats)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-training", action="store_true", help="prefill alone")
    parser.add_argument("--side", choices=("with", "without"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    seconds = {}
    for side in ("with", "without"):
        run = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--side", side],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds[side] = json.loads(run.stdout.splitlines()[-1])
    for name, fast in seconds["with"].items():
        slow = seconds["without"][name]
        print(f"{name:14} {fast:8.3f} s, without the drop-in {slow:8.3f} s: {slow / fast:.1f} times")


if __name__ == "__main__":
    main()
