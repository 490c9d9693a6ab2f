"""Evaluation: read questions, let the model answer, score as the benchmark's authors do.

`from fastvst.evaluate import vsi_bench, mmsi_bench, cv_bench, blink, sunrgbd_det, ...`: one module for each benchmark,
with load(path) -> rows, prompt(row) -> Sample and score(rows, predictions) -> Report (docs/evaluation.md).
"""
