"""Evaluation: read questions, let the model answer, score by the rules of the benchmark's authors.

`from fastvst.evaluate import vsi_bench, mmsi_bench, cv_bench, blink, sunrgbd_det, ...`: one module per
benchmark, with load(path) -> rows, prompt(row) -> Sample and score(rows, predictions) -> Report (docs/evaluation.md).
"""
