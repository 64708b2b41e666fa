"""Makes the files beside it with Hugging Face's library (pip install tokenizers; 0.23.3 made these)."""
import json
import pathlib
import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

here = pathlib.Path(__file__).parent


def train(texts, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def mixed_texts():
    """Runs, ties, blank lines, contractions, digits, scripts and white space of many kinds."""
    draw = random.Random(1)
    alphabets = [
        "ab",
        "a -\n=",
        "etaoin shrdlu'st're'll \n\t.,!?0123456789",
        "\u00e9\u00fc\u00df\u0430\u0431\u0432\u03b1\u03b2 \u3000\u00a0\u2009\u4e2d\u6587\u3042\u0627\u0644\U0001f600\u0301",
    ]
    for i in range(60):
        letters = alphabets[i % len(alphabets)]
        repeat = i % 3 == 0
        yield "".join(draw.choice(letters) * (draw.randrange(1, 9) if repeat else 1) for _ in range(300))


mixed = list(mixed_texts())
with open(here / "mixed.jsonl", "w") as out:
    for number, text in enumerate(mixed):
        out.write(json.dumps({"id": number, "text": text}, ensure_ascii=number % 2 == 0) + "\n")
tokenizer = train(mixed, 700)
tokenizer.save(str(here / "mixed.json"))
unseen = ["the 's'tt  re'll\n\n\n 00aab====a--- \t", "\u4e2d\u6587\u3042\u3000\U0001f600\u0301\u00e9 <|endoftext|>a b", "QZ~\u2603"]
cases = [{"text": text, "ids": tokenizer.encode(text).ids} for text in mixed[:4] + unseen]
(here / "cases.json").write_text(json.dumps(cases))

shakespeare = (here / "../../data/tinyshakespeare.txt").read_text()
train([shakespeare], 512).save(str(here / "shakespeare.json"))
