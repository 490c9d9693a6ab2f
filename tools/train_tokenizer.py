"""Train the tiny preset's tokenizer, once; the package ships the result.

python tools/train_tokenizer.py                # rewrites fastvst/data/assets/tiny_tokenizer.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from fastvst.data.tokenizer import (
    PLAIN_ADDED_TOKENS,
    SPECIAL_TOKENS,
    TINY_TOKENIZER,
    TINY_VOCAB_SIZE,
    assemble,
    complete,
)

CORPUS = Path(__file__).with_name("tokenizer_corpus.txt")


def corpus() -> Iterator[str]:
    """Training text: the corpus file, each of its words alone, and spatial sentences with random contents (seed 0)."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    yield from lines
    words = sorted({word for line in lines for word in line.split() if word.isalpha() and word.islower()})
    for role in ("system", "user", "assistant"):  # every sample has these headers: one token each
        yield from [f"{role}\n"] * 100
    for word in words:  # inside and at the start of a sentence
        yield f"a {word} the {word}"
        yield word.capitalize()
    things = next(line for line in lines if line.startswith("bed beds")).split()
    colors = next(line for line in lines if line.startswith("red green")).split()
    sides = next(line for line in lines if line.startswith("left right")).split()
    rng = random.Random(0)
    for _ in range(3000):
        a, b = rng.sample(things, 2)
        c, d = rng.sample(colors, 2)
        s, t = rng.sample(sides, 2)
        n = rng.randint(1, 9)
        x = rng.uniform(-4, 4)
        box = ",".join(f"{rng.uniform(-3, 5):.2f}" for _ in range(9))
        corners = ", ".join(str(rng.randint(0, 959)) for _ in range(4))
        letter = rng.choice("ABCD")
        yield (
            rng.choice(
                (
                    f"Which one in {a}-A (bbox_2d: [{corners}]) and {b}-B (bbox_2d: [{corners}]) is closest?",
                    f"Which object is farther from the camera, the {a} ({c} point) or the {b} ({d} point)?",
                    f"The {a} is {abs(x):.1f} meters away from the {b}, to the {s} of it. {letter}. {t}",
                    f"Distance[{a}-A, {b}-B]={abs(x):.1f}m\nSo, the answer is {a}-A.",
                    f"What is the height of the {a} ({c} point-{n})?\n{n}{n} cm",
                    f"Options: A. {s}, B. {t}, C. {s} and {t}, D. {t} and {s}\n{letter}. {s}",
                    f'```json\n[\n\t{{"bbox_3d":[{box}],"label":"{a}"}},\n\t{{"bbox_3d":[{box}],"label":"{b}"}}\n]\n```',
                    f"hfov={abs(x) * 20:.2f}, vfov={abs(x) * 15:.2f}, image width={n * 97} and height={n * 71}",
                    f"<think>The {a} is {s} of the {b}, so it must be closer.</think> {letter}. point-{n}",
                    f"Detect the 3D bounding boxes of {a}, {b}.",
                )
            )
        )


def train() -> Tokenizer:
    """The tiny tokenizer, trained on `corpus()`. The result is the same every time.

    Raises:
        ValueError: the corpus is too small for TINY_VOCAB_SIZE tokens.
    """
    added = len(SPECIAL_TOKENS) + len(PLAIN_ADDED_TOKENS)
    tokenizer = complete(Tokenizer(BPE(fuse_unk=False, byte_fallback=False)))
    trainer = BpeTrainer(
        vocab_size=TINY_VOCAB_SIZE - added,
        min_frequency=1,  # the corpus is small, and every word in it was chosen
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = {token: i for token, i in model["vocab"].items() if token not in (*SPECIAL_TOKENS, *PLAIN_ADDED_TOKENS)}
    if sorted(vocab.values()) != list(range(TINY_VOCAB_SIZE - added)):
        raise ValueError(f"training made {len(vocab)} tokens; expected {TINY_VOCAB_SIZE - added}")
    return assemble(vocab, [(left, right) for left, right in model["merges"]])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TINY_TOKENIZER, help="file to write (default: the shipped one)")
    path = parser.parse_args(argv).out
    tokenizer = train()
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path), pretty=False)
    print(f"{path}: {tokenizer.get_vocab_size()} tokens, {path.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
