from __future__ import annotations

import json
from pathlib import Path

from fastvst.data import LoaderConfig, MixtureConfig, Processor, SourceConfig, open_mixture
from fastvst.data.loader import make_planner
from fastvst.data.probe import PROBED_ROWS, probe
from small_run import write_data


def test_a_source_whose_first_rows_all_fail_is_found(tmp_path: Path) -> None:
    good = write_data(tmp_path / "good", 30)
    rows = [json.loads(line) for line in good.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["image"] = "nowhere.png" if number < 25 else row.get("image", "0.png")
        row["conversations"][0]["value"] = "<image>\nwhat?"
    (tmp_path / "good" / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "mixed.jsonl").write_text(json.dumps(rows[0]) + "\n" + good.read_text().splitlines()[1] + "\n")
    sources = tuple(SourceConfig(str(p)) for p in (good, tmp_path / "good" / "bad.jsonl", tmp_path / "mixed.jsonl"))
    mixture = open_mixture(MixtureConfig(sources, shuffle_buffer=0))
    before = mixture.state_dict()
    planner = make_planner(mixture, Processor.preset("tiny"), LoaderConfig(tokens_per_pack=1024), 1)
    first, second, third = probe(mixture, planner.examine)
    assert (first.rows, first.errors, first.hopeless) == (PROBED_ROWS, [], False)
    assert second.hopeless and len(second.errors) == PROBED_ROWS
    assert second.describe().startswith(
        "WARNING: bad: none of its first 20 rows can be used; the first reason: bad/0: "
    )
    assert "nowhere.png" in second.describe() and third.describe().startswith("mixed: 1 of its first 2 rows")
    assert mixture.state_dict() == before  # the run starts at the beginning


def test_rows_that_no_pack_can_hold_are_found(tmp_path: Path) -> None:
    data = write_data(tmp_path, 30)
    mixture = open_mixture(MixtureConfig((SourceConfig(str(data)),), shuffle_buffer=0))
    planner = make_planner(mixture, Processor.preset("tiny"), LoaderConfig(tokens_per_pack=8), 1)
    (found,) = probe(mixture, planner.examine)
    assert found.hopeless and "a pack holds 8" in found.describe()
