"""2,000 mutated rows of every form through data check, loader and generate: no crash, every row is accounted for."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from fastvst.cli.generate_rows import read_rows
from fastvst.data import Ledger, LoaderConfig, MixtureConfig, Processor, Sample, SourceConfig
from fastvst.data.check import check_source
from fastvst.data.loader import make_loader
from fastvst.data.mixture import open_configured

TINY = Processor.preset("tiny", max_seq_len=512)
CALL = {"function": {"name": "f", "arguments": '{"a": 1}'}}
FORMS: dict[str, dict[str, Any]] = {
    "conversations": {
        "id": "r",
        "type": "qa",
        "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A.", "loss": True}],
        "meta_info": "[]",
        "tools": "[]",
    },
    "messages": {
        "id": "r",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "", "weight": 1, "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "one"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    "question": {"id": "r", "question": "?", "answer": "A", "answer_gt": "A", "thought": "t", "meta_info": "{}"},
}
VALUES = (None, "", 0, -1, 1.5, True, [], {}, [None], [[]], "\ud83d", "\0", "<image>", "<|im_end|>", "[[", {"a": {}})
VALUES += ("data:image/png;base64,xx", "/nowhere.png", "x" * 3000, 10**400, float("nan"), [1, 2], "NaN", "é\u2028")


def mutate(row: dict[str, Any], rng: random.Random) -> Any:
    """The row with one to three values replaced, removed or renamed, at any depth."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        node: Any = row
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
                node = node[key]
                continue
            kind = rng.random()
            if kind < 0.7:
                node[key] = copy.deepcopy(rng.choice(VALUES))
            elif kind < 0.85:
                del node[key]
            elif isinstance(node, dict):
                node[rng.choice(["image", "images", "video", "fps", "weight", "refusal", "odd"])] = rng.choice(VALUES)
            break
    return row


@pytest.mark.parametrize("form", FORMS)
def test_every_mutated_row_is_accounted_for(tmp_path, form: str) -> None:
    rng = random.Random(form)
    rows = [FORMS[form], *(mutate(FORMS[form], rng) for _ in range(1999))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check_source(path, TINY)
    refused = sum(1 for problem in report.problems if problem.reason not in ("duplicate_id", "literal_mark"))
    assert report.rows == 2000 and 200 < report.usable < 2000 and report.usable + refused >= 2000
    ledger = Ledger(max_fraction=1.0)
    mixture = MixtureConfig((SourceConfig(str(path)),), epochs=1, shuffle_buffer=0)
    packs = list(make_loader(mixture, TINY, LoaderConfig(512, num_workers=0, buffer_samples=64), ledger=ledger))
    assert sum(len(pack.sample_ids) for pack in packs) + ledger.total == 2000
    source = SourceConfig(str(path))
    asked = list(read_rows(open_configured(source), source))  # generate writes the error in the place of the answer
    assert len(asked) == 2000 and sum(isinstance(row.sample, Sample) for row in asked) >= report.usable
