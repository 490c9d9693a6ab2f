"""The page of an RL run escapes what models and rows contain."""

from __future__ import annotations

from pathlib import Path

from fastvst.rl.heldout import evaluation_row, write_evaluation
from fastvst.rl.page import visible, write_report
from fastvst.rl.records import RolloutLog
from fastvst.train import distributed
from fastvst.train.distributed import ParallelConfig
from rl_records import UGLY_TEXTS, question, record

WORLD = distributed.start(ParallelConfig(device="cpu", threads=1), environment={})


def test_the_page_escapes_completions_rows_and_settings(tmp_path: Path) -> None:
    group = record(0, UGLY_TEXTS, [0, 0, 1, 0, 0], task="<i>task</i>")
    log = RolloutLog(tmp_path, rank=0, done=0)
    log.write(1, [group])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "answers": 5}\n')
    row = evaluation_row(0, [question(0)], [record(0, ["3"], [1.0])], WORLD)
    write_evaluation(tmp_path, row, WORLD)
    html = write_report(tmp_path, {"out": "</pre><script>"}).read_text(encoding="utf-8")
    assert "<script>" not in html and "<b>how" not in html and "<i>task" not in html
    assert "&lt;script&gt;alert(1)" in html and "\u2400\u241b[31m\ufffd" in html and "(empty)" in html
    assert len(html) < 60_000 and "data:image/jpeg;base64," in html and "advantage" in html
    assert visible("a\tb\nc") == "a\tb\nc"


def test_the_page_shows_each_of_a_few_groups_once(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, rank=0, done=0)
    for step in range(3):
        log.write(step + 1, [record(step, [f"completion {step}"], [0.0])])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "answers": 3}\n')
    html = write_report(tmp_path, {}).read_text(encoding="utf-8")
    assert [html.count(f"completion {step}") for step in range(3)] == [1, 1, 1]
