"""The stream of prompts: dealt to ranks, restored exactly, with a ledger of unusable rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvst.data import Ledger, MixtureConfig, Processor, Sample, SampleError, SourceConfig, open_mixture
from fastvst.data.chat import THINK_SYSTEM
from fastvst.data.sources import open_source
from fastvst.rl.prompts import NoPrompts, PromptStream, make_prompt
from fastvst.rl.rewards.verifiable import score
from rl_run import write_questions


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.preset("tiny", max_pixels=56 * 56, max_seq_len=160)


def stream(
    path: Path,
    processor: Processor,
    rank: int = 0,
    size: int = 1,
    epochs: int | None = None,
    answers: int = 0,
    **more: object,
):
    config = MixtureConfig(sources=(SourceConfig(str(path)),), shuffle_buffer=7, epochs=epochs)
    return PromptStream(
        open_mixture(config), processor, Ledger(), rank=rank, size=size, completion_tokens=answers, **more
    )


def test_ranks_share_one_stream_and_a_checkpoint_restores_its_place(tmp_path: Path, processor: Processor) -> None:
    path = write_questions(tmp_path, 15)
    whole = [p.number for _ in range(4) for p in stream(path, processor).take(5)][:5]
    assert whole == [0, 1, 2, 3, 4]
    one, first, second = (stream(path, processor, rank, size) for rank, size in ((0, 1), (0, 2), (1, 2)))
    for count in (5, 3, 9):
        everything = [p.sample.id for p in one.take(count)]
        shares = [[p.sample.id for p in s.take(count)] for s in (first, second)]
        assert sorted(shares[0] + shares[1]) == sorted(everything), "each prompt goes to one rank"
        assert all(s == [i for i in everything if i in s] for s in shares), "in the order of the stream"
    state = json.loads(json.dumps(one.state_dict()))
    following = [(p.number, p.sample.id) for p in one.take(20)]
    again = stream(path, processor)
    again.load_state_dict(state)
    assert [(p.number, p.sample.id) for p in again.take(20)] == following


def test_prompts_are_dealt_by_their_expected_work(tmp_path: Path, processor: Processor) -> None:
    """Every fourth prompt is long: dealing in turn would give all long ones to one rank of two."""
    words = ["word " * (120 if i % 4 == 0 else 2) for i in range(16)]
    rows = [{"id": str(i), "question": q, "answer": "x", "type": "qa"} for i, q in enumerate(words)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def dealt(answers: int) -> list[list[int]]:
        config = MixtureConfig(sources=(SourceConfig(str(tmp_path / "rows.jsonl")),), shuffle_buffer=1, epochs=1)
        ranks = [
            PromptStream(open_mixture(config), processor, Ledger(), rank=r, size=2, completion_tokens=answers)
            for r in (0, 1)
        ]
        return [[len(s) for _, s in r.encode(r.take(16))] for r in ranks]

    first, second = dealt(0)
    assert abs(sum(first) - sum(second)) <= max(first) / 4 and sum(n > 100 for n in first) == 2
    first, second = dealt(100_000)
    assert len(first) == len(second) == 8, "with long completions every prompt has the same work"


def test_unusable_rows_are_in_the_ledger(tmp_path: Path, processor: Processor) -> None:
    path = write_questions(tmp_path, 4)
    meta = json.dumps({"mode": ["relaxed_score"]})
    bad = [
        {"id": "long", "question": "word " * 500, "answer": "x", "meta_info": meta},
        {"id": "mode", "question": "why", "answer": "x", "meta_info": json.dumps({"mode": ["bleu_score"]})},
        {"id": "none", "question": "why"},
        {"id": "token", "question": "why <|im_end|>", "answer": "x", "meta_info": meta},
    ]
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in bad))
    asked = stream(path, processor, epochs=1)
    found = asked.take(8)
    assert len(found) == 4
    assert asked.ledger.counts == {"too_long": 1, "reward_mode": 1, "no_answer": 1, "literal_special_token": 1}
    assert "bleu" in asked.ledger.summary()
    with pytest.raises(NoPrompts, match="data end after 4 prompts"):
        asked.take(1)
    broken = next(p.sample for p in found if p.sample.parts("image"))
    broken.parts("image")[0]["image"] = tmp_path / "gone.png"
    assert len(asked.encode(found)) == 3 and asked.ledger.counts["missing_image"] == 1


def test_an_own_reward_takes_rows_without_an_answer(tmp_path: Path, processor: Processor) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "question": "why", "mine": 1}\n')
    (prompt,) = stream(tmp_path / "rows.jsonl", processor, epochs=1, needs_answer=False).take(2)
    assert (prompt.sample.id, prompt.answer, prompt.modes) == ("a", None, ())


@pytest.mark.parametrize("system", ["none", "think", "Answer in French."])
def test_the_option_chooses_the_system_prompt_never_the_row(tmp_path: Path, processor: Processor, system: str) -> None:
    rows = [
        {"id": "t", "question": "why", "answer": "B", "meta_info": json.dumps({"mode": ["multi_choices_score"]})},
        {"id": "b", "question": "boxes", "answer": "[]", "meta_info": json.dumps({"mode": ["bbox3d"]})},
        {"id": "d", "question": "why", "answer": "B", "type": "qa"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    asked = stream(tmp_path / "rows.jsonl", processor, epochs=1, system=system)
    found = {p.sample.id: (p, s) for p, s in asked.encode(asked.take(3))}
    assert {i: (p.modes, p.thinking) for i, (p, _) in found.items()} == {
        "t": (("multi_choices",), system == "think"),
        "b": (("bbox3d",), False),
        "d": (("answer",), system == "think"),
    }
    texts = {i: processor.decode(s.tokens.tolist(), skip_special=False) for i, (_, s) in found.items()}
    assert [THINK_SYSTEM in texts[i] for i in "tbd"] == [system == "think", False, system == "think"]
    assert all(("in French" in text) == ("French" in system) for text in texts.values())
    assert all(text.endswith("<|im_start|>assistant\n") for text in texts.values())


def test_one_of_several_checkable_turns_is_asked_after_the_true_ones() -> None:
    turns = [{"type": "number", "value": value} for value in (1, 2, 3)]
    messages = [{"role": r, "content": f"{r} {k}"} for k in range(3) for r in ("user", "assistant")]
    sample = Sample.from_messages(messages, id="x", answer=turns[-1], metadata={"turn_answers": turns, "task": "size"})
    found = [make_prompt(sample, turn=k) for k in range(4)]
    assert [p.answer["value"] for p in found] == [1, 2, 3, 1] and [p.sample.id for p in found][:2] == ["x#0", "x#1"]
    assert [len(p.sample.messages) for p in found] == [2, 4, 6, 2]
    assert [p.question for p in found] == ["user 0", "user 1", "user 2", "user 0"]
    assert found[0].task == "size" and found[0].modes == ("mra",)
    row = found[1].row("2 m")
    assert (row.id, row.question, row.answer, row.modes) == ("x#1", "user 1", turns[1], ("mra",))
    with pytest.raises(SampleError, match="checkable"):
        make_prompt(Sample.from_messages(messages, metadata={"turn_answers": turns[:1]}))


@pytest.mark.parametrize(
    "answer", ["null", "None", "1.50", "2e3", "true", "[40, 12,80]", '{"x": 1}', ["two", "2"], {"x": 1}, 3.0, 7, False]
)
def test_the_answer_of_a_row_is_never_rewritten(tmp_path: Path, answer: object) -> None:
    row = {"id": "0", "messages": [{"role": "user", "content": "?"}], "answer": answer}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = open_source(tmp_path / "rows.jsonl")
    prompt = make_prompt(sample)
    assert prompt.answer["value"] == answer and type(prompt.answer["value"]) is type(answer)
    stated = answer[0] if answer == ["two", "2"] else answer if isinstance(answer, str) else json.dumps(answer)
    assert score(str(stated), prompt.answer, prompt.modes, thinking=False).accuracy == 1
    assert score("no", prompt.answer, prompt.modes, thinking=False).accuracy == 0


@pytest.mark.parametrize("answer", [None, float("nan")])
def test_a_missing_answer_is_no_answer(tmp_path: Path, answer: object) -> None:
    row = {"id": "0", "messages": [{"role": "user", "content": "?"}], "answer": answer}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = open_source(tmp_path / "rows.jsonl")
    with pytest.raises(SampleError, match="no_answer"):
        make_prompt(sample)


def test_a_checkpoint_forgets_what_was_drawn_ahead(tmp_path: Path, processor: Processor) -> None:
    """Prompts that were looked at but not used come again, and rejected rows behind them are counted once."""
    path = write_questions(tmp_path, 150, image_every=1000)
    lines = path.read_text().splitlines()
    for index in range(0, 150, 10):
        lines[index] = json.dumps({"id": f"bad{index}", "question": "why"})
    path.write_text("\n".join(lines) + "\n")
    for used in (0, 1, 63, 64, 65, 100):
        one = stream(path, processor)
        ahead = [one.peek(index) for index in range(used + 90)]
        one.use_up(used)
        state = json.loads(json.dumps(one.state_dict()))
        again = stream(path, processor)
        again.load_state_dict(state)
        assert again.asked == one.asked == used
        for index in range(120):
            known = one.peek(index)
            found = again.peek(index)
            assert known is not None and found is not None
            assert (found[0].number, found[0].sample.id, found[1]) == (known[0].number, known[0].sample.id, known[1])
        assert ahead[used] == one.peek(0) and again.drawn == one.drawn
        assert (again.ledger.seen, again.ledger.counts) == (one.ledger.seen, one.ledger.counts)
