import dataclasses

import pytest
from PIL import Image

from fastvst.data import Processor, Sample
from fastvst.evaluate import rooms
from fastvst.model import ModelConfig, Qwen25VL


def row(turns, answers, **metadata):
    image = {"type": "image", "image": Image.new("RGB", (56, 56))}
    messages = []
    for number, (asked, reply) in enumerate(turns):
        content = [image] * (number == 0) + [{"type": "text", "text": asked}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    return Sample.from_messages(messages, id="r", answer=answers[-1], metadata={"task": "t", **metadata})


def number(value):
    return {"type": "number", "value": value, "unit": "cm", "tolerance": 0.1}


def test_every_turn_is_a_question_with_the_true_answers_before_it():
    sample = row([("a?", "1 cm"), ("b?", "2 cm")], [number(2)], turn_answers=[number(1), number(2)])
    first, second = rooms.questions([sample])
    assert [first.text, second.text] == ["a?", "b?"]
    assert [first.answer["value"], second.answer["value"]] == [1, 2]
    assert [len(q.sample.messages) for q in (first, second)] == [2, 4]
    assert first.sample.id != second.sample.id


def test_answers_that_do_not_fit_the_turns_are_an_error():
    with pytest.raises(ValueError, match="2 assistant turns but 1 checkable"):
        rooms.questions([row([("a?", "1 cm"), ("b?", "2 cm")], [number(2)])])


def test_answer_all_keeps_the_order_whatever_the_batches():
    config = dataclasses.replace(ModelConfig.preset("tiny"), num_hidden_layers=1)
    model = Qwen25VL(config)
    processor = Processor.preset("tiny", max_pixels=56 * 56)
    asked = rooms.questions(
        [dataclasses.replace(row([(f"{word} ?", "1 cm")], [number(1)]), id=word) for word in ["red", "chair", "far"]]
    )
    together = rooms.answer_all(model, processor, asked, batch_size=8)
    alone = [rooms.answer_all(model, processor, [q], batch_size=1)[0] for q in asked]
    assert together == alone
    assert model.training, "the mode is given back"
