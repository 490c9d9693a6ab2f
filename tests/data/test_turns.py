"""Turns of a conversation: names of roles, JSON in a cell, contents in every nesting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastvst.data.ledger import SampleError
from fastvst.data.sample import Sample
from fastvst.data.sources.rows import to_sample
from fastvst.data.sources.turns import ROLE_NAMES

TALK = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]
SPOKEN = [("user", "Who?"), ("assistant", "Ann.")]


def read(**row: Any) -> Sample:
    return to_sample({"id": "r", **row}, source="s", where="w", folder=Path("/d"))


def spoken(sample: Sample) -> list[tuple[str, str]]:
    return [(m["role"], "".join(p["text"] for p in m["content"])) for m in sample.messages]


@pytest.mark.parametrize("user", ["human", "user", "User", "HUMAN", "prompter", " user ", "Human:"])
@pytest.mark.parametrize("model", ["gpt", "assistant", "bot", "model", "Assistant", "chatbot", "AI", "GPT"])
def test_names_of_roles(user: str, model: str) -> None:
    for keys in (("from", "value"), ("role", "content"), ("role", "value"), ("speaker", "text")):
        turns = [{keys[0]: user, keys[1]: "Who?"}, {keys[0]: model, keys[1]: "Ann."}]
        assert spoken(read(conversations=turns)) == SPOKEN
    exact = user in ROLE_NAMES and model in ROLE_NAMES
    assert exact == (not read(messages=[{"role": user, "content": "a"}, {"role": model, "content": "b"}]).changes)


def test_a_role_that_nobody_knows_is_refused_with_the_turn() -> None:
    for role in ("robot", "", None, 5, ["user"]):
        with pytest.raises(SampleError, match="bad_schema.*turn 0 is"):
            read(messages=[{"role": role, "content": "?"}])


@pytest.mark.parametrize("write", [json.dumps, repr, lambda turns: "\n " + json.dumps(turns, indent=1)])
def test_turns_as_text(write) -> None:
    sample = read(messages=write(TALK))
    assert spoken(sample) == SPOKEN and sample.changes[0][0] == "json_text"
    for text in ("hello", "[1, 2", "{}", "5", "[" * 10_000):
        with pytest.raises(SampleError) as caught:
            read(messages=text)
        assert caught.value.reason == "bad_schema" and "messages" in caught.value.detail


@pytest.mark.parametrize(
    "content",
    [
        "Who?",
        ["Who?"],
        [{"type": "text", "text": "Who?"}],
        {"type": "text", "text": "Who?"},
        [[{"type": "text", "text": "Who?"}]],
        [{"text": "Who?"}],
        [{"type": "input_text", "text": "Who?"}],
        [{"type": "text", "value": "Who?"}],
        [{"type": "text", "text": "Who", "image": None}, "?"],
    ],
)
def test_contents_in_every_nesting(content) -> None:
    assert spoken(read(messages=[{"role": "user", "content": content}, TALK[1]])) == SPOKEN


def test_parts_as_qwen_vl_writes_them() -> None:
    sample = read(messages=[{"role": "user", "content": [{"image": "a.png"}, {"text": "Who?"}]}])
    assert [p["type"] for p in sample.messages[0]["content"]] == ["image", "text"]
    assert {code for code, _ in sample.changes} == {"part_without_type"}
    both = [{"image": "a.png", "text": "Who?"}]
    with pytest.raises(SampleError, match="bad_schema"):
        read(messages=[{"role": "user", "content": both}])


def test_numbers_are_texts_and_truth_values_are_not() -> None:
    sample = read(conversations=[{"from": "human", "value": "How many?"}, {"from": "gpt", "value": 4}])
    assert spoken(sample)[1] == ("assistant", "4") and sample.changes[0][0] == "number_as_text"
    for value in (True, None, {"a": 1}, [5]):
        with pytest.raises(SampleError):
            read(conversations=[{"from": "human", "value": "How many?"}, {"from": "gpt", "value": value}])


def test_a_system_message_that_is_no_text_is_refused() -> None:
    assert spoken(read(messages=TALK, system="Be brief."))[0] == ("system", "Be brief.")
    assert spoken(read(question="Who?", answer="Ann.", system="Be brief."))[0] == ("system", "Be brief.")
    with pytest.raises(SampleError, match=r"system is \['Be brief.'\]"):
        read(messages=TALK, system=["Be brief."])
