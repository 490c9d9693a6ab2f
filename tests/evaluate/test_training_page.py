import json
import re

import pytest
from PIL import Image

from fastvst.data.sample import Sample
from fastvst.evaluate.rooms import Question, RoomResults, TaskScore, summarise
from fastvst.evaluate.statistics import Interval
from fastvst.evaluate.training_page import write_report
from fastvst.html import line_chart

BOX = {"bbox_3d": [0.0, 0.0, 3.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], "label": "chair"}


def question(task, room, value, text="Which is <b>closer</b>?", kind="text"):
    image = Image.new("RGB", (64, 48), (200, 180, 160))
    answer = {"type": kind, "value": value} | ({"tolerance": 0.15} if kind == "boxes" else {})
    reply = value if kind == "text" else "```json\n[]\n```"
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    metadata = {"task": task, "room_seed": room, "intrinsics": [60.0, 60.0, 32.0, 24.0]}
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    sample = Sample.from_messages(messages, id=f"{task}-{room}", metadata=metadata, answer=answer)
    return Question(sample, task, str(room), text, answer)


@pytest.fixture
def results():
    held = [question("depth", room, "red") for room in range(8)]
    held += [question("boxes", 9, [BOX], kind="boxes")]
    training = [question("depth", room, "blue" if room else "red") for room in range(4)]
    training += [question("boxes", 1, [BOX], kind="boxes")]
    return summarise(
        held, ["red"] * 6 + ["blue", "<script>"] + ["no boxes"], [1.0] * 6 + [0.0] * 3, training, examples=18
    )


def test_baselines_come_from_the_training_rows(results):
    depth = next(t for t in results.tasks if t.task == "depth")
    assert depth.majority_answer == "blue", "held-out rows must not choose the majority answer"
    assert depth.majority.mean == 0.0 and depth.model.mean == 0.75
    assert 0.0 < depth.random.mean < 1.0


def test_boxes_have_average_precision_and_matched_iou_with_the_mean_box_as_baseline(results):
    forms = {form.task: form for form in results.forms}
    for name in ("boxes: AP at IoU 0.15", "boxes: matched IoU"):
        assert forms[name].model.mean == 0.0, "an answer without boxes"
        assert forms[name].majority.mean == pytest.approx(1.0), "the only training box is the true one"
    assert [len(results.answered), results.answered[0].prediction] == [9, "red"]


def test_page_is_one_static_file_with_everything(results, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "loss": 3.0 - 0.1 * i}) for i in range(20)]
    metrics.write_text("\n".join(lines) + '\n{"step": 20, "lo', encoding="utf-8")  # killed while writing
    page = write_report(tmp_path / "report", metrics, results, {"steps": 20}).read_text(encoding="utf-8")
    assert page.count("<svg") == 1 and "final loss 1.100" in page
    assert page.count('class="card"') == len(results.examples) == 9
    assert page.count("data:image/jpeg;base64,") == 9
    assert "<script" not in page and "&lt;script&gt;" in page, "model output is escaped"
    assert "&lt;b&gt;closer&lt;/b&gt;" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    scores = json.loads((tmp_path / "report" / "results.json").read_text())
    assert {row["task"]: row["above_majority"] for row in scores} == {"boxes": False, "depth": True}


@pytest.mark.parametrize(
    "majority, random, above",
    [
        (Interval(0.2, 0.1, 0.3), Interval(0.5, 0.45, 0.55), False),  # better than the majority, worse than a guess
        (Interval(0.5, 0.45, 0.55), Interval(0.2, 0.1, 0.3), False),
        (Interval(0.3, 0.2, 0.41), Interval(0.2, 0.1, 0.3), False),  # the mean is above both, the interval is not
        (Interval(0.3, 0.2, 0.39), Interval(0.25, 0.2, 0.3), True),
    ],
)
def test_a_task_is_marked_only_above_both_baselines(majority, random, above, tmp_path):
    results = RoomResults((TaskScore("depth", 10, Interval(0.45, 0.4, 0.5), majority, random, "left"),))
    assert results.table().endswith("above both baselines") is above
    assert results.to_json()[0]["above_majority"] is above
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 2.0}\n')
    page = write_report(tmp_path / "report", tmp_path / "metrics.jsonl", results, {}).read_text(encoding="utf-8")
    assert ("<td class=good>45.0 [40.0, 50.0]</td>" in page) is above


def test_page_without_results_still_has_the_curve(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0, "loss": 2.0}\n')
    page = write_report(tmp_path / "report", metrics, None, {}).read_text(encoding="utf-8")
    assert "<svg" in page and "Held-out" not in page


@pytest.mark.parametrize("values", [[], [float("nan")] * 3])
def test_chart_without_values_says_so(values):
    chart = line_chart(list(range(len(values))), values, x_label="step", y_label="loss")
    assert "<svg" not in chart and "No values" in chart


def test_chart_spans_the_data():
    chart = line_chart([0, 1, 2], [5.0, float("inf"), 1.0], x_label="step", y_label="loss")
    points = re.search(r'points="([^"]+)"', chart).group(1).split()
    (x0, y0), (x1, y1) = (tuple(map(float, p.split(","))) for p in points)
    assert len(points) == 2 and x0 < x1 and y0 < y1, "a smaller loss is drawn lower"


def test_a_task_whose_questions_have_no_true_box_is_scored_without_average_precision():
    rows = [question("boxes", room, [], kind="boxes") for room in range(2)]
    found = summarise(rows, ["[]", "[]"], [1.0, 1.0], rows, examples=2)
    assert [t.task for t in found.tasks] == ["boxes"] and found.forms == ()
