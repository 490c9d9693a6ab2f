"""The tokenizer: the tiny one that ships with fastvst, how it was trained, and how to get Qwen2.5's own from its ranks.

Both are byte-level BPEs with the regex, the NFC normaliser and the 22 added tokens of Qwen2.5-VL, so that everything
above (template, labels, checkpoints) is the same code for a 4,096-token toy and for the published vocabulary.

    python -m fastvst.data.tokenizer build                                # rebuild assets/tiny_tokenizer.json
    python -m fastvst.data.tokenizer convert --ranks qwen.tiktoken --out DIR
"""

from __future__ import annotations

import argparse
import base64
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

ASSETS = Path(__file__).parent / "assets"
TINY_TOKENIZER = ASSETS / "tiny_tokenizer.json"
TINY_VOCAB_SIZE = 4096  # 4,074 byte-level BPE tokens + 22 added; ModelConfig.preset("tiny") has the same ids

# Qwen2.5's pre-tokenizer: contractions, words with one leading non-letter, single digits, punctuation, blanks.
SPLIT_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The added tokens of Qwen2.5-VL, in the order of their ids (151643..151664 there). Those of the first group are
# "special": decoding skips them, and text that contains one literally is refused.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_ADDED_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
REQUIRED_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def byte_symbols() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {b: chr(b) for b in printable}
    fresh = 256
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(fresh)
            fresh = fresh + 1
    return [symbols[b] for b in range(256)]


def assemble(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer in Qwen2.5's form around a byte-level BPE; the added tokens get the ids after `vocab`."""
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    return _dress(tokenizer)


def _dress(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    for names, special in ((SPECIAL_TOKENS, True), (PLAIN_ADDED_TOKENS, False)):
        tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return tokenizer


def tiny_tokenizer() -> Tokenizer:
    """The 4,096-token tokenizer of the tiny preset; ships inside the package."""
    return Tokenizer.from_file(str(TINY_TOKENIZER))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read `tokenizer.json` of a model directory and check that it is a Qwen2.5-VL tokenizer.

    Raises:
        FileNotFoundError: no directory or no tokenizer.json in it; the message says what to do.
        ValueError: not a tokenizer file, or a token that the chat template needs is missing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; expected one with tokenizer.json and config.json")
    path = directory / "tokenizer.json"
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in directory.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(
            f"{directory} has no tokenizer.json (it has {found}). Copy tokenizer.json from the published checkpoint, "
            f"or make it: python -m fastvst.data.tokenizer convert --ranks qwen.tiktoken --out {directory}"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every malformed file
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
    missing = [name for name in REQUIRED_TOKENS if tokenizer.token_to_id(name) is None]
    if missing:
        raise ValueError(f"{path} lacks the tokens {missing}; a Qwen2.5-VL tokenizer has all of {REQUIRED_TOKENS}")
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Qwen2.5's own tokenizer from its published ranks file


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Token bytes -> rank of a tiktoken file (one "base64 rank" per line).

    Raises:
        ValueError: a malformed line, or ranks that are not 0..n-1.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f'{path}, line {number}: expected "base64 rank", got {line[:60]!r}') from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: the {len(ranks)} ranks are not 0..{len(ranks) - 1}")
    return ranks


def from_ranks(ranks: dict[bytes, int]) -> Tokenizer:
    """The Hugging Face form of a rank-based BPE: every multi-byte token's merge is found by replaying the earlier ones.

    Takes about 5 s for Qwen2.5's 151,643 ranks.

    Raises:
        ValueError: a token that no merge of two earlier tokens makes.
    """
    symbols = byte_symbols()
    vocab = {}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        text = "".join([symbols[b] for b in token])
        vocab[text] = rank
        if len(token) > 1:
            left, right = _last_merge(token, rank, ranks)
            merges.append((text[: len(left)], text[len(left) :]))
    return assemble(vocab, merges)


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that remain of `token` when only merges of a lower rank are allowed."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = rank
        at = -1
        for i in range(len(parts) - 1):
            candidate = ranks.get(parts[i] + parts[i + 1], rank)
            if candidate < best:
                best = candidate
                at = i
        if at < 0:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    if len(parts) != 2:
        raise ValueError(f"token {token!r} of rank {rank} is not the merge of two tokens of lower rank")
    return parts[0], parts[1]


# ---------------------------------------------------------------------------------------------------------------------
# The tiny tokenizer


def corpus() -> Iterator[str]:
    """The text that the tiny tokenizer is trained on: assets/corpus.txt and spatial sentences with random contents."""
    lines = (ASSETS / "corpus.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    yield from lines
    words = sorted({word for line in lines for word in line.split() if word.isalpha() and word.islower()})
    for role in ("system", "user", "assistant"):  # these headers stand in every sample: one token each
        yield from [f"{role}\n"] * 100
    for word in words:  # as it stands inside and at the start of a sentence
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
    """Train the tiny tokenizer on `corpus()`; the same text gives the same tokenizer."""
    added = len(SPECIAL_TOKENS) + len(PLAIN_ADDED_TOKENS)
    tokenizer = _dress(Tokenizer(BPE(fuse_unk=False, byte_fallback=False)))
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
    """Command line: `build` retrains the tiny tokenizer in place, `convert` writes Qwen2.5's tokenizer.json."""
    parser = argparse.ArgumentParser(prog="python -m fastvst.data.tokenizer", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="train the tiny tokenizer")
    build.add_argument("--out", type=Path, default=TINY_TOKENIZER)
    convert = commands.add_parser("convert", help="make tokenizer.json from a published ranks file")
    convert.add_argument("--ranks", type=Path, required=True, help="qwen.tiktoken")
    convert.add_argument("--out", type=Path, required=True, help="directory for tokenizer.json")
    arguments = parser.parse_args(argv)
    if arguments.command == "build":
        tokenizer = train()
        path = arguments.out
    else:
        tokenizer = from_ranks(read_ranks(arguments.ranks))
        path = arguments.out / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path), pretty=False)
    print(f"{path}: {tokenizer.get_vocab_size()} tokens, {path.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
