"""transformers' Mamba on a CPU, with the drop-in for mamba_ssm and causal_conv1d and without.

A model of mamba-130m's sizes with random weights: the time of a prefill and of a training step
(forward, backward, AdamW). Each side is a process of its own, and the two take turns, so that both
meet the same weather; what is printed are the medians and the ratio. "products" is the time that
the model's Linear layers take by themselves, which no drop-in changes.

    python bench/python_transformers.py [--tokens 128 512 2048] [--training-tokens 256]
                                        [--layers 24] [--training-layers 4] [--repeats 3]
                                        [--threads 2]

The packages krait, mamba_ssm and causal_conv1d have to be importable (PYTHONPATH=python:python/dropin).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any, Callable


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def work(side: str, threads: int) -> None:
    """Answers lines "KIND LAYERS TOKENS" with the seconds that one call takes."""
    if side == "without":
        # As where they are not installed.
        for name in ("mamba_ssm", "causal_conv1d"):
            sys.modules[name] = None  # type: ignore[assignment]
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    torch.set_num_threads(threads)
    if side == "with":
        import krait

        krait.set_num_threads(threads)
    models: dict[int, Any] = {}
    optimizers: dict[int, Any] = {}

    def prepare(kind: str, layers: int, tokens: int) -> Callable[[], Any]:
        torch.manual_seed(0)
        if layers not in models:
            models[layers] = MambaForCausalLM(MambaConfig(num_hidden_layers=layers))
        model = models[layers]
        ids = torch.randint(0, 50280, (1, tokens))

        @torch.inference_mode()
        def prefill() -> None:
            model.eval()(ids)

        @torch.inference_mode()
        def products() -> None:
            for module in linears:
                module(torch.empty(1, tokens, module.in_features).fill_(0.5))

        def training_step() -> None:
            model.train()(ids, labels=ids).loss.backward()
            optimizers[layers].step()
            optimizers[layers].zero_grad()

        if kind == "training" and layers not in optimizers:
            optimizers[layers] = torch.optim.AdamW(model.parameters())
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        return {"prefill": prefill, "products": products, "training": training_step}[kind]

    for line in sys.stdin:
        kind, layers, tokens = line.split()
        print(seconds(prepare(kind, int(layers), int(tokens))), flush=True)


class Side:
    """A process that runs the model with the drop-in or without."""

    def __init__(self, side: str, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--side", side, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, kind: str, layers: int, tokens: int) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{kind} {layers} {tokens}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{kind} {layers} {tokens}: the process has ended")
        return float(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 512, 2048])
    parser.add_argument("--training-tokens", type=int, nargs="*", default=[256])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--training-layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("with", "without"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        work(options.side, options.threads)
        return
    fast, slow = (Side(side, options.threads) for side in ("with", "without"))
    cases = [("prefill", options.layers, n) for n in options.tokens]
    cases += [("training", options.training_layers, n) for n in options.training_tokens]
    print(f"{'':24}{'drop-in':>10}{'without':>10}{'products':>10}{'times':>10}")
    for case in cases:
        fast.run(*case), slow.run(*case)
        rounds = [(fast.run(*case), slow.run(*case)) for _ in range(options.repeats)]
        with_it, without = (statistics.median(column) for column in zip(*rounds))
        products = "-"
        if case[0] == "prefill":
            times = [fast.run("products", *case[1:]) for _ in range(options.repeats + 1)]
            products = f"{statistics.median(times[1:]):.3f}"
        ratio = statistics.median(b / a for a, b in rounds)
        label = f"{case[0]} {case[2]}"
        print(f"{label:24}{with_it:10.3f}{without:10.3f}{products:>10}{ratio:10.1f}", flush=True)
    fast.close(), slow.close()


if __name__ == "__main__":
    main()
