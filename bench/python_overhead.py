"""What a call from PyTorch costs beyond the C++ call, in microseconds.

Each operator is called on tensors so small that its kernel takes next to no time: once as the
compiled function, on outputs that exist already, and once through krait.torch.functional, without
and with autograd. Goals: 5 microseconds beyond the compiled call without autograd, 20 with it.

    python bench/python_overhead.py [--repeats 7] [--calls 2000] [--json FILE]

Times are those of the calling thread on the processor, the smallest of several repeats, so that a
busy machine changes them little. The backward pass counts from the loss to the gradients, with
torch's own engine, beside the compiled backward function.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any, Callable

import torch

from krait import build_info, set_num_threads
from krait.torch import functional as K
from krait.torch._operator import native


def microseconds(call: Callable[[], Any], calls: int, repeats: int) -> float:
    for _ in range(calls // 10):
        call()
    best = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(calls):
            call()
        best = min(best, (time.thread_time() - start) / calls)
    return best * 1e6


class Case:
    """One operator: its compiled calls, and the same through PyTorch."""

    def __init__(
        self,
        inputs: list[torch.Tensor],
        compiled: Callable[[], Any],
        compiled_for_grad: Callable[[], Any],
        compiled_backward: Callable[[], Any],
        call: Callable[..., torch.Tensor],
    ) -> None:
        self.compiled = compiled
        self.compiled_for_grad = compiled_for_grad
        self.compiled_backward = compiled_backward
        self.call = call
        self.inputs = inputs
        self.leaves = [t.clone().requires_grad_() for t in inputs]

    def measure(self, calls: int, repeats: int) -> dict[str, float]:
        def timed(f: Callable[[], Any]) -> float:
            return microseconds(f, calls, repeats)

        plain, leaves = self.inputs, self.leaves
        dout = torch.ones_like(self.call(*plain))

        def both() -> None:
            torch.autograd.grad(self.call(*leaves), leaves, dout)

        compiled, for_grad, backward = map(
            timed, (self.compiled, self.compiled_for_grad, self.compiled_backward)
        )
        recorded = timed(lambda: self.call(*leaves))
        return {
            "compiled": compiled,
            "torch": timed(lambda: self.call(*plain)) - compiled,
            "autograd": recorded - for_grad,
            "compiled_backward": backward,
            "backward": timed(both) - recorded - backward,
        }


def selective_scan() -> Case:
    B, D, L, N = 1, 8, 1, 4
    u, delta, z = (torch.rand(B, D, L) for _ in range(3))
    A, skip, bias = -torch.rand(D, N), torch.rand(D), torch.rand(D)
    b, c = torch.rand(B, N, L), torch.rand(B, N, L)
    inputs = [u, delta, A, b, c, skip, z, bias]
    shape = native("selective_scan_checkpoints_shape")(B, D, L, N, False, 1)
    out, checkpoints = torch.empty_like(u), torch.empty(tuple(shape))
    du, ddelta, dA, db, dc, dskip, dz, dbias = map(torch.zeros_like, inputs)
    run, back = native("selective_scan"), native("selective_scan_backward")
    rest = (None, None, None)

    def forward(kept: Any) -> Any:
        return run(*inputs, *rest, None, True, False, out, None, None, kept)

    return Case(
        inputs,
        lambda: forward(None),
        lambda: forward(checkpoints),
        lambda: back(
            *inputs, *rest, True, False, out, None, checkpoints, du, ddelta, dz, None, db, dc, dA,
            dskip, dbias,
        ),
        lambda *t: K.selective_scan(*t, delta_softplus=True),
    )  # fmt: skip


def ssd() -> Case:
    B, L, H, P, N = 1, 1, 2, 8, 16
    x, dt, A = torch.rand(B, L, H, P), torch.rand(B, L, H), -torch.rand(H)
    b, c = torch.rand(B, L, 1, N), torch.rand(B, L, 1, N)
    skip, z, bias = torch.rand(H), torch.rand(B, L, H, P), torch.rand(H)
    inputs = [x, dt, A, b, c, skip, z, bias]
    out = torch.empty_like(x)
    dx, ddt, dA, db, dc, dskip, dz, dbias = map(torch.zeros_like, inputs)
    run, back = native("ssd"), native("ssd_backward")
    rest, options = (None, None, None), (True, 0.0, float("inf"), False, 0)

    def forward() -> Any:
        return run(*inputs, *rest, None, *options, out, None, None)

    return Case(
        inputs,
        forward,
        forward,
        lambda: back(
            *inputs, *rest, *options, out, None, dx, ddt, db, dc, dz, None, dA, dskip, dbias
        ),
        lambda *t: K.ssd(*t, dt_softplus=True),
    )


def causal_conv1d() -> Case:
    x, weight, bias = torch.rand(1, 8, 4), torch.rand(8, 4), torch.rand(8)
    inputs = [x, weight, bias]
    out = torch.empty_like(x)
    dx, dweight, dbias = map(torch.zeros_like, inputs)
    run, back = native("causal_conv1d"), native("causal_conv1d_backward")

    def forward() -> Any:
        return run(*inputs, None, None, None, None, "silu", out, None, None)

    return Case(
        inputs,
        forward,
        forward,
        lambda: back(*inputs, None, None, None, "silu", out, None, dx, dweight, dbias, None),
        lambda *t: K.causal_conv1d(*t, activation="silu"),
    )


def norm() -> Case:
    x, weight, bias = torch.rand(4, 64), torch.rand(64), torch.rand(64)
    inputs = [x, weight, bias]
    out = torch.empty_like(x)
    dx, dweight, dbias = map(torch.zeros_like, inputs)
    run, back = native("norm"), native("norm_backward")
    options = (1e-5, 0, True)

    def forward() -> Any:
        return run("rms", *inputs, None, None, *options, False, out, None)

    return Case(
        inputs,
        forward,
        forward,
        lambda: back("rms", *inputs, None, *options, out, None, dx, None, None, dweight, dbias),
        lambda *t: K.norm(*t, eps=1e-5),
    )


CASES = {
    "selective_scan": selective_scan,
    "ssd": ssd,
    "causal_conv1d": causal_conv1d,
    "norm": norm,
}
COLUMNS = ("compiled", "torch", "autograd", "compiled_backward", "backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_num_threads(1)
    print(f"torch {torch.__version__}, krait {build_info()['version']} ({build_info()['simd']})")
    print("microseconds: the compiled call, and what PyTorch adds to it")
    print(f"{'':16}" + "".join(f"{c:>19}" for c in COLUMNS))
    results = {}
    for name, make in CASES.items():
        results[name] = make().measure(args.calls, args.repeats)
        print(f"{name:16}" + "".join(f"{results[name][c]:19.2f}" for c in COLUMNS))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "microseconds": results}, file, indent=2)


if __name__ == "__main__":
    main()
