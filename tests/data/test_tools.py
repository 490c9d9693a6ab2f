r"""Tool conversations and turns that are not learnt, compared with transformers and Qwen2.5-VL's own template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvst.data import Processor, Sample
from fastvst.data.check import check_source
from fastvst.data.ledger import SampleError
from fastvst.data.sources import open_source
from fastvst.data.sources.tools import HEAD, TAIL
from tool_talk import QWEN, TALK, TOOLS

TINY = Processor.preset("tiny")


def write(folder: Path, *rows: dict) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(folder: Path, row: dict) -> Sample:
    (sample,) = open_source(write(folder, row))
    return sample


def learnt(sample: Sample) -> str:
    return TINY.decode([t for t in TINY.encode(sample).labels.tolist() if t != -100], skip_special=False)


def as_text(call: dict) -> dict:
    """A call whose arguments are JSON text, as OpenAI writes them."""
    return {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("tools", [None, TOOLS, TOOLS * 2])
@pytest.mark.parametrize("form", ["openai", "openai text", "sharegpt"])
def test_tokens_are_those_of_the_public_template(tmp_path, system, tools, form) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=TINY.tokenizer)
    talk = [{"role": "system", "content": system}, *TALK] if system else TALK
    text = tokenizer.apply_chat_template(talk, tools=tools, chat_template=QWEN, tokenize=False)
    row: dict = {"messages": talk, "tools": tools}
    if form == "openai text":
        calls = [{**m, "tool_calls": [as_text(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in talk]
        row = {"messages": [{**m, "content": m["content"] or None} for m in calls], "tools": json.dumps(tools)}
        row = row if tools else {"messages": row["messages"]}
    if form == "sharegpt":
        names = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
        turns = []
        for message in talk:
            if "tool_calls" in message and not message["content"]:
                value = json.dumps([call["function"] for call in message["tool_calls"]])
                turns.append({"from": "function_call", "value": value})
            else:
                rest = {"tool_calls": message["tool_calls"]} if "tool_calls" in message else {}
                turns.append({"from": names[message["role"]], "value": message["content"], **rest})
        row = {"conversations": turns, "tools": json.dumps(tools) if tools else ""}
    encoded = TINY.encode(one(tmp_path, row))
    expected = TINY.tokenizer.encode(text, add_special_tokens=False).ids
    assert encoded.tokens.tolist() == expected
    assert learnt(one(tmp_path, row)).count("<tool_call>") == 3 and "tool_response" not in learnt(one(tmp_path, row))


def test_the_texts_are_in_the_template() -> None:
    written = QWEN.replace("\\n", "\n").replace('\\"', '"')
    assert HEAD in written and TAIL in written


def test_turns_with_weight_0_are_not_learnt(tmp_path) -> None:
    for key, no, yes in (("weight", 0, 1), ("loss", False, True), ("weight", "0", "1.0"), ("loss", "false", None)):
        turns = [
            {"role": "user", "content": "Which?"},
            {"role": "assistant", "content": "The zebra.", key: no},
            {"role": "user", "content": "Again."},
            {"role": "assistant", "content": "The sofa.", key: yes},
        ]
        sample = one(tmp_path, {"messages": turns})
        assert learnt(sample) == "<|im_start|>assistant\nThe sofa.<|im_end|>\n"
        assert learnt(Sample.from_json(sample.to_json())) == learnt(sample)
        plain = one(tmp_path, {"messages": [{k: v for k, v in t.items() if k != key} for t in turns]})
        assert TINY.encode(sample).tokens.tolist() == TINY.encode(plain).tokens.tolist()


@pytest.mark.parametrize(
    ("turn", "field"),
    [
        ({"content": "x", "weight": 0.5}, "weight is 0.5"),
        ({"content": "x", "weight": 1, "loss": False}, "contradict"),
        ({"content": "", "tool_calls": [{"function": {"arguments": "{}"}}]}, "name None"),
        ({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "not json"}}]}, "'not json'"),
        ({"content": "x", "refusal": "no"}, "refusal 'no'"),
        ({"content": None}, "turn 1"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_value(tmp_path, turn, field) -> None:
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", **turn}]}
    with pytest.raises(SampleError, match=field):
        one(tmp_path, row)
    with pytest.raises(SampleError, match="bad_tools.*'{'"):
        one(tmp_path, {"messages": row["messages"][:1], "tools": "{"})


def test_refusals_and_developer_messages_are_read(tmp_path) -> None:
    turns = [{"role": "developer", "content": "D"}, {"role": "user", "content": "?"}]
    sample = one(tmp_path, {"messages": [*turns, {"role": "assistant", "content": None, "refusal": "I cannot."}]})
    assert sample.messages[0]["role"] == "system" and "I cannot." in learnt(sample)


def test_half_of_a_surrogate_pair_costs_its_row(tmp_path) -> None:
    good = {"messages": [{"role": "user", "content": "x"}]}
    path = write(
        tmp_path, {"id": "\udc00", **good}, {"id": "bad", "messages": [{"role": "user", "content": "a \ud83d"}]}
    )
    report = check_source(path, TINY)
    assert report.counts == {"bad_text": 1} and report.usable == 1
    next(iter(open_source(path))).id.encode("utf-8")


def test_what_nothing_reads_is_listed_once_with_a_count(tmp_path) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "?", "cache": 1}], "name": "Ann"}]
    path = write(tmp_path, *[{"messages": turns, "score": 1}] * 3, {"messages": turns[:1]})
    report = check_source(path, TINY)
    assert report.ignored == {"score": 3, "messages[].name": 4, "messages[].content[].cache": 4} and not report.counts
    assert report.table().count("ignored: score in 3 rows, e.g. rows.jsonl[0][0]") == 1


def test_video_options_reach_the_video_or_are_refused(tmp_path) -> None:
    for key in ("nframes", "total_pixels", "sample_fps", "max_frames"):
        part = {"type": "video", "video": ["a.png", "b.png"], key: 2}
        assert one(tmp_path, {"messages": [{"role": "user", "content": [part]}]}).parts("video")[0][key] == 2
    for key in ("video_start", "video_end"):
        part = {"type": "video", "video": "a.mp4", key: 2.5}
        assert one(tmp_path, {"messages": [{"role": "user", "content": [part]}]}).parts("video")[0][key] == 2.5
        part["video"] = ["a.png", "b.png"]
        with pytest.raises(SampleError, match=f"unsupported_option: {key} is 2.5 on a list of frames"):
            one(tmp_path, {"messages": [{"role": "user", "content": [part]}]})
