"""`--dry-run --device-memory` on shipped settings: a run that does not fit ends with what to change, and that fits."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
import torch.distributed as dist

from fastvst.train.run import run_script
from rl_run import load_rl, write_questions
from small_run import ROOT, load_script, write_model

COSTS = (
    "--model.recompute auto",
    "--optimizer.state bf16",
    "--optimizer.state 8bit",
    "tokens_per_pack",
    "GPUs for each copy",
    "--optimizer.freeze",
)


def ending(main: Callable, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> str | int:
    """What the script gives to sys.exit: 0, or the text of its error, which makes the status 1."""
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    try:
        run_script(main)
    except SystemExit as end:
        return end.code if end.code is not None else 0
    finally:
        if dist.is_initialized():  # an error leaves it to the end of the process
            dist.destroy_process_group()
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(("file", "load"), [("vst.toml", load_script), ("vst_rl.toml", load_rl)])
def test_a_shipped_run_that_does_not_fit_is_told_what_to_change(file, load, tmp_path, monkeypatch) -> None:
    start = write_model(tmp_path / "model")
    rows = write_questions(tmp_path, 8)
    arguments = ["--config", str(ROOT / "examples" / file), "--model.path", str(start), "--out", str(tmp_path / "run")]
    arguments += ["--data.sources", f'[{{path = "{rows}"}}]', "--parallel.device", "cpu", "--dry-run"]
    arguments += ["--device-memory", "0.6"]  # the small model with packs of the shipped size needs 0.5 to 0.8 GiB
    main = load().main
    found = ending(main, monkeypatch, arguments)
    assert isinstance(found, str) and "does not fit" in found and "in order of cost" in found
    lines = [line for line in found.splitlines() if re.match(r"\s+\d\. ", line)]
    places = [next(place for place, cost in enumerate(COSTS) if cost in line) for line in lines]
    assert places == sorted(places) and len(lines) > 2
    fitting = next(line for line in lines if "which fits" in line)
    name, value = re.search(r"--(\S+) ([\w,]*\w)", fitting).groups()  # type: ignore[union-attr]
    assert ending(main, monkeypatch, [*arguments, f"--{name}", value]) == 0
    assert not (tmp_path / "run").exists()
