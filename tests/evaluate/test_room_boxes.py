import numpy as np
import pytest

from fastvst.evaluate.room_boxes import ANY, guess, labelled, matched_iou, mean_boxes, of_truth, score_boxes

ROOMS = ["a", "a", "b", "c"]


def box(x, size=1.0):
    return [x, 0.0, 3.0, size, size, size, 0.0, 0.0, 0.0]


def boxes(*rows, label="chair"):
    return {label: np.array(rows, dtype=np.float64)}


def iou_of_shifted_cubes(shift):
    return max(1 - shift, 0.0) / (1 + min(shift, 1.0))


def test_matched_iou_is_the_mean_over_true_boxes_and_misses_count_as_zero():
    truth = [boxes(box(0), box(5)), boxes(box(0)), boxes(box(1)), boxes(box(2))]
    found = [boxes(box(0.5), box(9)), {}, boxes(box(1)), boxes(box(2), label="table")]
    got = score_boxes(found, truth, ROOMS).matched.mean
    assert got == pytest.approx((iou_of_shifted_cubes(0.5) + 0 + 0 + 1 + 0) / 5, abs=1e-9)


def test_average_precision_is_the_area_under_the_precision_by_hand():
    """Chairs: hit, miss, hit of 3 true ones = precision 1 up to recall 1/3, then 2/3 up to 2/3. Tables: none found."""
    truth = [boxes(box(0)), boxes(box(0)), boxes(box(0)), boxes(box(0), label="table")]
    found = [boxes(box(0.1)), boxes(box(7)), boxes(box(0.2)), boxes(box(7), label="table")]
    recalls = np.linspace(0, 1, 101)
    chairs = np.where(recalls <= 1 / 3, 1.0, np.where(recalls <= 2 / 3, 2 / 3, 0.0)).mean()
    got = score_boxes(found, truth, ROOMS).precision
    assert got.mean == pytest.approx(chairs / 2, abs=1e-6)
    assert got.low <= got.mean <= got.high


def test_boxes_of_a_class_that_is_true_elsewhere_are_false_positives():
    truth = [boxes(box(0)), boxes(box(0), label="table")]
    right = [boxes(box(0)), boxes(box(0), label="table")]
    stray = [boxes(box(0)) | boxes(box(0), label="table"), boxes(box(0), label="table")]
    assert score_boxes(right, truth, ["a", "b"]).precision.mean == pytest.approx(1.0)
    assert score_boxes(stray, truth, ["a", "b"]).precision.mean == pytest.approx(0.75)


def test_one_true_box_takes_one_predicted_box():
    assert matched_iou(np.array([[0.9, 0.8], [0.7, 0.1]])).tolist() == [0.9, 0.1]
    assert matched_iou(np.zeros((0, 2))).tolist() == [0.0, 0.0]


def test_the_mean_box_of_each_class():
    turned = [2.0, 0.0, 3.0, 2.0, 1.0, 1.0, 0.0, 90.0, 0.0]
    training = [boxes(box(0), box(2)), boxes(turned, label="table")]
    means = mean_boxes(training)
    assert means["chair"][0, :6].tolist() == [1.0, 0.0, 3.0, 1.0, 1.0, 1.0]
    assert means["table"].tolist() == [turned]
    asked = of_truth([{"bbox_3d": box(0), "label": "Chair"}, {"bbox_3d": box(1), "label": "lamp"}])
    given = guess(means, asked)
    assert given["chair"].tolist() == means["chair"].tolist() and given["lamp"].tolist() == means[ANY].tolist()


def test_labels_are_compared_like_answers():
    assert list(labelled(np.array([box(0), box(1), box(2)]), ["The Chair", "chair", "table"])) == ["chair", "table"]
    assert labelled(np.zeros((0, 9)), []) == {}
