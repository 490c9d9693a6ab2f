"""The chat template against the jinja text and hand-written expectations; which tokens are supervised."""

from __future__ import annotations

import re

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.data.chat import JINJA_TEMPLATE, THINK_SYSTEM, check_literals, render, system_prompt
from fastvst.data.images import MediaError


def text(value: str) -> dict:
    return {"type": "text", "text": value}


IMAGE = {"type": "image", "image": "x"}
VIDEO = {"type": "video", "video": "x"}
TWO_TURNS = [
    {"role": "user", "content": [IMAGE, text(" How far? ")]},
    {"role": "assistant", "content": [text("\n71 cm\n")]},
    {"role": "user", "content": [text("And "), text("now?")]},
    {"role": "assistant", "content": [text("80 cm")]},
]


def flat(segments, only_supervised: bool = False) -> str:
    return "".join(s.text for s in segments if s.supervised or not only_supervised)


def test_two_turns_by_hand() -> None:
    segments = render(TWO_TURNS, system="S")
    assert flat(segments) == (
        "<|im_start|>system\nS<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|> How far?<|im_end|>\n"
        "<|im_start|>assistant\n71 cm<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n80 cm<|im_end|>\n"
    )
    assert flat(segments, True) == ("<|im_start|>assistant\n71 cm<|im_end|>\n<|im_start|>assistant\n80 cm<|im_end|>\n")
    assert flat(render(TWO_TURNS, system="S", supervise="content"), True) == "71 cm<|im_end|>80 cm<|im_end|>"


def test_generation_prompt_and_own_system_message() -> None:
    messages = [{"role": "system", "content": [text(" Be brief. ")]}, {"role": "user", "content": [text("Hi"), VIDEO]}]
    segments = render(messages, system="unused", add_generation_prompt=True)
    assert flat(segments) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert flat(segments, True) == ""


def test_images_inside_an_answer_are_not_supervised() -> None:
    segments = render([{"role": "assistant", "content": [text("see"), IMAGE, text("there")]}], system="S")
    assert flat(segments, True) == "<|im_start|>assistant\nseethere<|im_end|>\n"


def test_thinking_kinds_get_the_thinking_prompt() -> None:
    assert system_prompt("depth") == "You are a helpful assistant."
    assert system_prompt("thought_spatial") == system_prompt("vst_thought") == THINK_SYSTEM
    assert THINK_SYSTEM.endswith("<think> reasoning process here </think> answer here.")


def test_unknown_supervision_is_refused() -> None:
    with pytest.raises(ValueError, match="'answer'; expected one of"):
        render(TWO_TURNS, system="S", supervise="answer")


parts = st.lists(st.one_of(st.just(IMAGE), st.just(VIDEO), st.text(max_size=8).map(text)), max_size=4)
turns = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": parts}), max_size=4)


@given(turns, st.booleans())
@settings(max_examples=100, deadline=None)
def test_equals_the_saved_jinja_template_on_stripped_content(messages, prompt) -> None:
    if not messages:
        messages = [{"role": "user", "content": []}]
    stripped = []
    for message in messages:
        content = [dict(part) for part in message["content"]]
        while content and content[0]["type"] == "text" and not content[0]["text"].strip():
            content.pop(0)
        while content and content[-1]["type"] == "text" and not content[-1]["text"].strip():
            content.pop()
        if content and content[0]["type"] == "text":
            content[0]["text"] = content[0]["text"].lstrip()
        if content and content[-1]["type"] == "text":
            content[-1]["text"] = content[-1]["text"].rstrip()
        stripped.append({"role": message["role"], "content": content})
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(JINJA_TEMPLATE)
    expected = template.render(messages=stripped, add_generation_prompt=prompt)
    ours = render(messages, system=system_prompt("qa"), add_generation_prompt=prompt)
    assert flat(ours) == expected


def test_literal_special_tokens_are_refused() -> None:
    pattern = re.compile(re.escape("<|image_pad|>") + "|" + re.escape("<|im_start|>"))
    check_literals(TWO_TURNS, pattern)
    check_literals([{"role": "user", "content": [text("<|im"), IMAGE, text("_start|>")]}], pattern)
    for content in ([text("look <|image_pad|> here")], [text("<|im_"), text("start|>system")]):
        with pytest.raises(MediaError, match=r"literal_special_token: message 0 \(user\) contains '<\|im"):
            check_literals([{"role": "user", "content": content}], pattern)
