"""Tables of configurations: complete, nearest architecture, logged once; tuning without a GPU."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch

from fastvst_kernels.shared import tile_tables

ROOT = Path(__file__).parents[3]
ARCHS = (80, 89, 90, 100, 120)


@pytest.mark.parametrize("arch", ARCHS)
def test_shipped_tables_hold_every_attention_shape(arch: int):
    table = tile_tables.read_table(tile_tables.TABLES / f"sm_{arch}.json")
    assert table.arch == arch and not table.measured
    kernels = ("attention_forward", "attention_backward_queries", "attention_backward_keys")
    for kernel, width, dtype in itertools.product(kernels, range(16, 257, 16), (torch.bfloat16, torch.float32)):
        tile = tile_tables.Tile(*table.configs[kernel][tile_tables.shape_class(width, dtype)])
        assert tile.block_m in (16, 32, 64, 128) and tile.block_n in (16, 32, 64, 128)


@pytest.mark.parametrize("arch", ARCHS)
def test_shipped_tables_hold_every_tunable_kernel(arch: int):
    from fastvst_kernels.tuning import tune

    table = tile_tables.read_table(tile_tables.TABLES / f"sm_{arch}.json")
    for kernel, tunable in tune.tunables().items():
        assert set(table.configs[kernel]) == set(tunable.shapes), kernel
        for shape, numbers in table.configs[kernel].items():
            assert numbers in tunable.candidates(shape, arch), (kernel, shape)


def test_heads_are_two_powers_of_two():
    assert [tile_tables.pieces(width) for width in (80, 96, 128)] == [(64, 16), (64, 32), (128, 0)]
    for width in range(16, 257, 16):
        first, rest = tile_tables.pieces(width)
        assert width <= first + rest < 2 * width and (first == width) == (rest == 0)
        assert first & (first - 1) == 0 and rest & (rest - 1) == 0 and (rest == 0 or rest >= 16)


def test_an_unknown_gpu_takes_the_nearest_architecture_and_says_so_once(caplog):
    tile_tables.table_for.cache_clear()
    with caplog.at_level(logging.INFO, logger="fastvst_kernels"):
        assert tile_tables.table_for("Some GPU", 103).arch == 100
        assert tile_tables.table_for("Some GPU", 103).arch == 100
        assert tile_tables.table_for("Other GPU", 86).arch == 89
    said = [r.message for r in caplog.records]
    assert len(said) == 2 and "no tuned table for Some GPU (sm_103)" in said[0] and "sm_100" in said[0]


def test_a_tuned_table_goes_before_the_architectures(tmp_path, monkeypatch):
    table = {"gpu": "Some GPU", "arch": 90, "measured": True, "configs": {"kernel": {"16x64": [1, 2, 3, 4]}}}
    (tmp_path / "some-gpu.json").write_text(json.dumps(table))
    monkeypatch.setattr(tile_tables, "TABLES", tmp_path)
    tile_tables.table_for.cache_clear()
    assert tile_tables.table_for("Some GPU", 90).configs["kernel"]["16x64"] == (1, 2, 3, 4)
    (tmp_path / "some-gpu.json").write_text("[]")
    with pytest.raises(ValueError, match="some-gpu.json is no table"):
        tile_tables.read_table(tmp_path / "some-gpu.json")
    tile_tables.table_for.cache_clear()


def test_tuning_without_a_gpu_says_what_is_missing(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from fastvst_kernels.tuning import tune

    assert tune.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_tuning_keeps_what_is_known_and_the_fastest_clean_candidate(tmp_path, monkeypatch):
    from fastvst_kernels.tuning import tune
    from fastvst_kernels.tuning.aot import Compiled

    def compiled(shape, numbers, arch):
        yield Compiled(100, 8 if numbers == (1,) else 0, 10, 100, 50, {})

    seconds = {(2,): 3.0, (3,): 2.0, (1,): 1.0}
    tunable = tune.Tunable(
        ("a", "b"), lambda shape, arch: ((1,), (2,), (3,)), compiled, lambda shape, device: lambda n: n
    )
    monkeypatch.setattr(tune, "tunables", lambda: {"kernel": tunable})
    monkeypatch.setattr(tune, "median_seconds", lambda run: seconds[run()])
    path = tmp_path / "table.json"
    tune.write_table(path, {"gpu": "g", "arch": 90, "measured": True, "configs": {"kernel": {"a": [9]}}})
    lines: list[str] = []
    target = tune.Target("g", 90, torch.device("cpu"))
    assert tune.tune(path, target, "", float("inf"), lines.append)
    assert tile_tables.read_table(path).configs == {"kernel": {"a": (9,), "b": (3,)}}
    assert any("(1,): spills" in line for line in lines)
    assert not tune.tune(tmp_path / "late.json", target, "", 0.0, lines.append)


def test_rechecking_moves_what_is_not_clean_to_the_next_candidate(tmp_path, monkeypatch):
    from fastvst_kernels.tuning import tune
    from fastvst_kernels.tuning.aot import Compiled

    def compiled(shape, numbers, arch):
        yield Compiled(100, 8 if numbers in ((2,), (4,)) else 0, 10, 100, 50, {})

    candidates = ((1,), (2,), (3,), (4,))
    tunable = tune.Tunable(tuple("abcde"), lambda shape, arch: candidates, compiled, lambda shape, device: int)
    monkeypatch.setattr(tune, "tunables", lambda: {"kernel": tunable})
    path = tmp_path / "table.json"
    held = {"a": [1], "b": [2], "c": [3], "d": [4], "e": [9]}
    tune.write_table(path, {"gpu": "sm_90", "arch": 90, "measured": False, "configs": {"kernel": held}})
    assert tune.main(["--compile-only", "90", "--out", str(path), "--recheck"]) == 0
    expected = {"a": (1,), "b": (3,), "c": (3,), "d": (1,), "e": (1,)}
    assert tile_tables.read_table(path).configs == {"kernel": expected}
    with pytest.raises(SystemExit):
        tune.main(["--recheck"])
