"""Fine-tuning a checkpoint with plain PyTorch, cell by cell: an optimizer, a loop, no trainer.

    python examples/python/finetune.py --model MODEL --text FILE [--steps 60] [--save DIRECTORY]

MODEL is a directory with config.json, weights and tokenizer.json, or a name on the Hugging Face hub
such as state-spaces/mamba-130m. The text is cut in two: the model learns from the first nine
tenths, and its loss on the last tenth is printed before and after.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import krait
from krait.torch import MambaLMHeadModel
from krait.torch.functional import cross_entropy


# %% What is learned: to predict each token from those before it.
def loss_of(model: MambaLMHeadModel, ids: Tensor) -> Tensor:
    """Mean loss in nats of each token of ids (B, L + 1) but the first, given those before it."""
    return cross_entropy(model(ids[:, :-1]).logits, ids[:, 1:])


@torch.no_grad()
def evaluate(model: MambaLMHeadModel, ids: Tensor, length: int) -> float:
    model.eval()
    blocks = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)[:16]
    return loss_of(model, blocks).item()


# %% Settings.
parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", required=True)
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--save", help="directory for the new checkpoint")
args = parser.parse_args()
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

# %% The text, as ids.
tokenizer = krait.Tokenizer.from_pretrained(args.model)
ids = torch.tensor(tokenizer.encode(args.text.read_text(encoding="utf-8")), device=device)
held_out = len(ids) // 10
train, test = ids[:-held_out], ids[-held_out:]
if len(test) <= args.length:
    parser.error(f"{args.text} has {len(ids)} tokens, expected over {10 * args.length}")

# %% The model. Weights stay float32; matrix products run in bfloat16 under autocast.
model = MambaLMHeadModel.from_pretrained(args.model, device=device, dtype=torch.float32)
kept = [p for p in model.parameters() if getattr(p, "_no_weight_decay", False) or p.dim() < 2]
names = {id(p) for p in kept}
decayed = [p for p in model.parameters() if id(p) not in names]
optimizer = torch.optim.AdamW(
    [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
    lr=args.lr,
    betas=(0.9, 0.95),
)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)

# %% Training.
before = evaluate(model, test, args.length)
model.train()
for step in range(args.steps):
    starts = torch.randint(len(train) - args.length, (args.batch,)).tolist()
    batch = torch.stack([train[i : i + args.length + 1] for i in starts])
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = loss_of(model, batch)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 20 == 0 or step == args.steps - 1:
        print(f"step {step}: loss {loss.item():.3f}")
after = evaluate(model, test, args.length)
print(f"held-out loss: {before:.3f} before, {after:.3f} after")

# %% What it writes now.
prompt = ids[None, :8]
made = model.generate(prompt, 40, top_k=20, temperature=0.8, vocab_size=model.config.vocab_size)
print(repr(tokenizer.decode(made[0].tolist())))
if args.save:
    model.save_pretrained(args.save)
    Path(args.save, "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
