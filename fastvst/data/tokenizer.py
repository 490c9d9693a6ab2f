"""Tokenizers: the tiny one of this package, and the conversion of Qwen2.5's published ranks file.

Both are byte-level BPEs with the regex, the NFC normaliser and the 22 added tokens of Qwen2.5-VL. Template, labels and
checkpoints therefore use the same code for 4,096 tokens and for the published vocabulary.

    python -m fastvst.data.tokenizer convert --ranks qwen.tiktoken --out DIR

`tools/train_tokenizer.py` trains the tiny tokenizer.
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from fastvst.model.checkpoint_files import check_pointer, check_size, read_json

ASSETS = Path(__file__).parent / "assets"
TINY_TOKENIZER = ASSETS / "tiny_tokenizer.json"
TINY_VOCAB_SIZE = 4096  # 4,074 byte-level BPE tokens + 22 added; ModelConfig.preset("tiny") has the same ids

# Qwen2.5's pre-tokenizer: contractions, words with one leading non-letter, single digits, punctuation, blanks.
SPLIT_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The added tokens of Qwen2.5-VL, in the order of their ids (151643..151664 there). Those of the first group are
# "special": decoding skips them, and text that contains one literally is rejected.
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
SHORT = 400  # characters of a text whose tokens are kept: system prompts, role names and line ends are in every row
MOST_SHORT = 4096  # texts that are kept; then their tokens are forgotten
MAX_TOKENIZER = 2**28  # bytes; Qwen2.5's tokenizer.json has 11 MB


class TextIds:
    """Ids of texts without special tokens; those of short texts are kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._kept: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The ids of a text. The list may be shared: do not change it."""
        known = self._kept.get(text)
        if known is None:
            known = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._kept) == MOST_SHORT:
                self._kept.clear()
            if len(text) <= SHORT:
                self._kept[text] = known
        return known


def byte_symbols() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {b: chr(b) for b in printable}
    fresh = 256
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(fresh)
            fresh += 1
    return [symbols[b] for b in range(256)]


def assemble(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer in Qwen2.5's form around a byte-level BPE; the added tokens get the ids after `vocab`."""
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    return complete(tokenizer)


def complete(tokenizer: Tokenizer) -> Tokenizer:
    """Give a byte-level BPE the normaliser, pre-tokenizer, decoder and added tokens of Qwen2.5-VL; returns it."""
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
    """The 4,096-token tokenizer of the tiny preset; it is part of the package."""
    return Tokenizer.from_file(str(TINY_TOKENIZER))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read `tokenizer.json` of a model directory and check that it is a Qwen2.5-VL tokenizer.

    Raises:
        FileNotFoundError: no directory, or no tokenizer.json in it; the message says what to do.
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
    check_pointer(path)
    check_size(path, MAX_TOKENIZER)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every malformed file
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
    tokenizer.no_truncation()  # samples are never cut or padded; transformers switches both off on every call
    tokenizer.no_padding()
    _add_tokens(tokenizer, directory)
    missing = [name for name in REQUIRED_TOKENS if tokenizer.token_to_id(name) is None]
    if missing:
        raise ValueError(f"{path} lacks the tokens {missing}; a Qwen2.5-VL tokenizer has all of {REQUIRED_TOKENS}")
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, directory: Path) -> None:
    """Add the tokens that are only in tokenizer_config.json or added_tokens.json, as transformers does.

    Raises:
        ValueError: a token would get another id than the file says.
    """
    found: dict[int, AddedToken] = {}
    path = directory / "tokenizer_config.json"
    fields = read_json(path) if path.is_file() else {}
    legacy = directory / "added_tokens.json"
    try:
        if "added_tokens_decoder" in fields:
            for number, token in fields["added_tokens_decoder"].items():
                found[int(number)] = AddedToken(**{k: v for k, v in token.items() if not k.startswith("__")})
        elif legacy.is_file():
            found = {int(number): AddedToken(name, normalized=False) for name, number in read_json(legacy).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path if fields else legacy}: the added tokens cannot be read: {error}") from error
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for number, token in sorted(found.items()):
        if token.content not in known:
            tokenizer.add_tokens([token])
            if tokenizer.token_to_id(token.content) != number:
                raise ValueError(
                    f"{path} gives the token {token.content!r} the id {number}; after tokenizer.json it would be "
                    f"{tokenizer.token_to_id(token.content)}. The two files belong to different models"
                )


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
    """The Hugging Face form of a rank-based BPE. Replaying the earlier merges finds the merge of a multi-byte token.

    Takes about 5 s for Qwen2.5's 151,643 ranks.

    Raises:
        ValueError: a token that is not the merge of two earlier tokens.
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
    """The two parts that remain of `token` if only merges of lower rank are allowed."""
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


def main(argv: list[str] | None = None) -> None:
    """Command line: `convert` writes Qwen2.5's tokenizer.json."""
    parser = argparse.ArgumentParser(prog="python -m fastvst.data.tokenizer", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="make tokenizer.json from a published ranks file")
    convert.add_argument("--ranks", type=Path, required=True, help="ranks file in tiktoken's format (qwen.tiktoken)")
    convert.add_argument("--out", type=Path, required=True, help="directory for tokenizer.json")
    arguments = parser.parse_args(argv)
    tokenizer = from_ranks(read_ranks(arguments.ranks))
    path = arguments.out / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path), pretty=False)
    print(f"{path}: {tokenizer.get_vocab_size()} tokens, {path.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
