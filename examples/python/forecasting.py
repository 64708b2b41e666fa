"""Forecasting time series with continuous inputs, cell by cell, and a forecast step by step.

    python examples/python/forecasting.py [--steps 120]

A small Mamba-2 network reads noisy oscillations of two channels and predicts the next value of
each. There is no vocabulary: a linear layer takes the values in, another gives a mean and a spread,
and the loss is the Gaussian likelihood. Then it forecasts 16 values of series that it has not seen:
one pass over the past leaves a state behind, and each further step costs the same, however long the
past was. The result is compared with repeating the last value.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch
from torch import Tensor, nn

from krait.torch import Block, InferenceParams, Mamba2, RMSNorm


# %% The network.
class Forecaster(nn.Module):
    def __init__(self, channels: int, d_model: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.encode = nn.Linear(channels, d_model)
        self.blocks = nn.ModuleList(
            Block(
                d_model,
                partial(Mamba2, d_state=16, headdim=16, layer_idx=i),
                nn.Identity,
                norm_cls=RMSNorm,
                fused_add_norm=True,
            )
            for i in range(layers)
        )
        self.norm = RMSNorm(d_model)
        self.decode = nn.Linear(d_model, 2 * channels)

    def forward(
        self, values: Tensor, state: InferenceParams | None = None
    ) -> tuple[Tensor, Tensor]:
        """values (B, L, channels) to means and variances of the values that follow each."""
        hidden, residual = self.encode(values), None
        for block in self.blocks:
            hidden, residual = block(hidden, residual, inference_params=state)
        change, spread = self.decode(self.norm(hidden, residual)).chunk(2, dim=-1)
        return values + change, nn.functional.softplus(spread) + 1e-4

    @torch.no_grad()
    def forecast(self, past: Tensor, count: int) -> Tensor:
        """The means of `count` further values of past (B, L, channels): (B, count, channels)."""
        batch, length, _ = past.shape
        state = InferenceParams(max_seqlen=length + count, max_batch_size=batch)
        value = self(past, state)[0][:, -1:]
        made = [value]
        state.seqlen_offset = length
        for _ in range(count - 1):
            value = self(value, state)[0]
            state.seqlen_offset += 1
            made.append(value)
        return torch.cat(made, dim=1)


# %% The series.
def make_series(count: int, length: int) -> Tensor:
    """(count, length, 2): noisy oscillations of a random period, and of twice its frequency."""
    time = torch.arange(length, dtype=torch.float32)
    period = torch.empty(count, 1).uniform_(12, 24)
    phase = torch.empty(count, 1).uniform_(0, 2 * math.pi)
    angle = 2 * math.pi * time / period + phase
    series = torch.stack((angle.sin(), 0.5 * (2 * angle).cos()), dim=-1)
    return series + 0.02 * torch.randn_like(series)


# %% Settings.
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--length", type=int, default=96)
parser.add_argument("--lr", type=float, default=2e-2)
args = parser.parse_args()
torch.manual_seed(0)

# %% Training.
model = Forecaster(channels=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
for step in range(args.steps):
    series = make_series(args.batch, args.length)
    mean, variance = model(series[:, :-1])
    # The first values of a series say nothing about its period yet.
    loss = nn.functional.gaussian_nll_loss(mean[:, 8:], series[:, 9:], variance[:, 8:])
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 20 == 0 or step == args.steps - 1:
        print(f"step {step}: loss {loss.item():.3f}")

# %% Forecasts of series that it has not seen.
horizon = 16
series = make_series(64, args.length + horizon)
past, future = series.split([args.length, horizon], dim=1)
error = (model.forecast(past, horizon) - future).square().mean().sqrt().item()
naive = (past[:, -1:] - future).square().mean().sqrt().item()
print(f"error over {horizon} steps: {error:.3f}; of the last value repeated: {naive:.3f}")
