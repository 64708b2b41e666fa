"""Generation with Krait, cell by cell (open it as a notebook, or run it as it is).

    python examples/python/generate.py [MODEL [PROMPT]]

MODEL is a directory with a checkpoint or a name on the Hugging Face hub, such as
state-spaces/mamba2-130m; the small model inside the package where left out, which has read
Shakespeare.
"""

# %% A model, where this machine computes fastest.
import sys

import numpy as np

import krait

model = krait.LanguageModel.from_pretrained(*sys.argv[1:2])
prompt = sys.argv[2] if len(sys.argv) > 2 else "ROMEO:"
described = model.describe()
print(f"{model.name}: {described.architecture}, {described.parameters:,} parameters")

# %% Text, piece by piece as it is made.
print(prompt, end="")
stream = model.generate(prompt, max_new_tokens=60, temperature=0.7, seed=1, stream=True)
for piece in stream:
    print(piece, end="", flush=True)
made = stream.generation
speed = made.timing.new_tokens / max(made.timing.decode_seconds, 1e-9)
print(f"\n[{made.finish_reason} after {len(made.new_ids)} tokens, {speed:.0f} a second]\n")

# %% Several prompts are one batch, of any lengths; a text may end each.
prompts = [prompt, "JULIET:\nO", "To be, or not to be"]
for start, one in zip(prompts, model.generate(prompts, 40, seed=2, stop="\n\n"), strict=True):
    print(f"--- {one.finish_reason}, mean log-probability {one.logprobs.mean():.2f}")
    print(start + one.text)

# %% How well the model predicts a text.
text = "But, soft! what light through yonder window breaks?"
score = model.score(text)
print(f"\n{text}\n{score.loss:.3f} nats per token, {score.bits_per_byte:.3f} bits per byte")

# %% A state is what the model remembers of a text. It costs as much after a million tokens as after
# one, and a fork of it begins another continuation without reading the text again.
state = model.new_state()
logits = model.logits(text, state=state, last=True)
print(f"\nafter {state.position} tokens the state has {state.nbytes:,} bytes; what may come next:")
for id in np.argsort(logits[: model.vocab_size])[::-1][:3]:
    fork = state.fork()
    words = [int(id)]
    for _ in range(8):
        words.append(int(fork.step(words[-1])[: model.vocab_size].argmax()))
    print(f"  {model.tokenizer.decode(words)!r}")

# %% States are saved and loaded, also into another process.
image = state.to_bytes()
again = krait.State.from_bytes(model, image)
assert np.array_equal(again.step(5), state.step(5))
print(f"{len(image):,} bytes hold all of it")
