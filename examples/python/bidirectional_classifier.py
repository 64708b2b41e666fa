"""A classifier of tokens that reads sequences both ways, on the scan itself, cell by cell.

    python examples/python/bidirectional_classifier.py [--steps 120]

The task needs both directions: which symbols stand between an opening and a closing bracket, where
some brackets have no counterpart? What the nearest bracket to the left is, a scan from the left
knows; the nearest one to the right is known to a scan from the right alone. The layer runs two
selective scans over the same projections, one of them with reverse=True. For comparison, the same
network without the second scan learns the same task.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from krait.torch import RMSNorm
from krait.torch.functional import causal_conv1d, selective_scan


# %% The layer.
class BidirectionalMamba(nn.Module):
    """A Mamba mixer with a scan from the left and, unless causal, one from the right."""

    def __init__(
        self, d_model: int, d_state: int = 8, d_conv: int = 4, expand: int = 2, causal: bool = False
    ) -> None:
        super().__init__()
        self.causal = causal
        self.d_inner, self.d_state, self.dt_rank = expand * d_model, d_state, max(d_model // 16, 1)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner)
        self.x_proj = nn.ModuleList(
            nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False) for _ in range(2)
        )
        self.dt_proj = nn.ModuleList(nn.Linear(self.dt_rank, self.d_inner) for _ in range(2))
        A = torch.arange(1, d_state + 1, dtype=torch.float32).expand(self.d_inner, d_state)
        self.A_log = nn.ParameterList(nn.Parameter(torch.log(A)) for _ in range(2))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, d_model) to the same shape."""
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        weight = self.conv1d.weight.squeeze(1)
        # The convolution looks a few tokens back on the way there, and ahead on the way back.
        there = causal_conv1d(x, weight, self.conv1d.bias, activation="silu")
        y = self._scan(0, there, z)
        if not self.causal:
            back = causal_conv1d(x.flip(-1), weight, self.conv1d.bias, activation="silu").flip(-1)
            y = y + self._scan(1, back, z)
        return self.out_proj(y.transpose(1, 2))

    def _scan(self, direction: int, x: Tensor, z: Tensor) -> Tensor:
        widths = [self.dt_rank, self.d_state, self.d_state]
        low_rank, B, C = self.x_proj[direction](x.transpose(1, 2)).split(widths, dim=-1)
        dt_proj = self.dt_proj[direction]
        return selective_scan(
            x,
            (low_rank @ dt_proj.weight.T).transpose(1, 2),
            -torch.exp(self.A_log[direction]),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D,
            z,
            dt_proj.bias,
            delta_softplus=True,
            reverse=direction == 1,
        )


# %% The network.
class Classifier(nn.Module):
    def __init__(self, symbols: int, d_model: int = 32, layers: int = 2, causal: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(symbols, d_model)
        self.layers = nn.ModuleList(
            BidirectionalMamba(d_model, causal=causal) for _ in range(layers)
        )
        self.norms = nn.ModuleList(RMSNorm(d_model) for _ in range(layers))
        self.norm = RMSNorm(d_model)
        self.head = nn.Linear(d_model, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) to logits (B, L) of standing between brackets."""
        hidden, residual = self.embedding(ids), None
        for norm, layer in zip(self.norms, self.layers):
            hidden, residual = norm(hidden, residual, prenorm=True)
            hidden = layer(hidden)
        return self.head(self.norm(hidden, residual)).squeeze(-1)


# %% The task.
OPENING, CLOSING, SYMBOLS = 0, 1, 8


def make_batch(count: int, length: int = 32) -> tuple[Tensor, Tensor]:
    """ids (count, length) with brackets here and there, and 1.0 for symbols between two."""
    ids = torch.randint(2, SYMBOLS, (count, length))
    chance = torch.rand(count, length)
    ids[chance < 0.1] = OPENING
    ids[chance > 0.9] = CLOSING

    def nearest_to_the_left(ids: Tensor) -> Tensor:
        places = torch.arange(length).expand_as(ids)
        brackets = torch.where(ids < 2, places, -1).cummax(dim=1).values
        return torch.where(brackets < 0, -1, ids.gather(1, brackets.clamp(min=0)))

    left = nearest_to_the_left(ids)
    right = nearest_to_the_left(ids.flip(1)).flip(1)
    return ids, ((left == OPENING) & (right == CLOSING)).float()


# %% Training.
def train(causal: bool, steps: int, batch: int, lr: float) -> float:
    """The accuracy on new sequences after training."""
    torch.manual_seed(0)
    model = Classifier(SYMBOLS, causal=causal)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        ids, labels = make_batch(batch)
        loss = nn.functional.binary_cross_entropy_with_logits(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"  step {step}: loss {loss.item():.3f}")
    ids, labels = make_batch(256)
    with torch.no_grad():
        return ((model(ids) > 0) == (labels > 0.5)).float().mean().item()


# %% With one scan, and with both.
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=120)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--lr", type=float, default=2e-2)
args = parser.parse_args()
accuracy = {}
for causal in (True, False):
    name = "from the left alone" if causal else "both ways"
    print(f"{name}:")
    accuracy[name] = train(causal, args.steps, args.batch, args.lr)
print("accuracy: " + ", ".join(f"{a:.1%} {name}" for name, a in accuracy.items()))
