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
    base = {"gpu": "sm_90", "arch": 90, "measured": False}
    base["configs"] = {"kernel": {"16x64": [5], "16x80": [6], "16x80 plain": [7]}, "other": {"16": [8]}}
    (tmp_path / "sm_90.json").write_text(json.dumps(base))
    monkeypatch.setattr(tile_tables, "TABLES", tmp_path)
    tile_tables.table_for.cache_clear()
    merged = tile_tables.table_for("Some GPU", 90)
    assert merged.configs == {
        "kernel": {"16x64": (1, 2, 3, 4), "16x80": (6,), "16x80 plain": (7,)},  # a table of one entry is enough
        "other": {"16": (8,)},
    }
    assert merged.measured and merged.name == "Some GPU"
    cpu = torch.device("cpu")
    assert tile_tables.config("kernel", "16x80", cpu) == (6,)
    assert tile_tables.config("kernel", "16x80", cpu, tile_tables.PLAIN) == (7,)
    assert tile_tables.config("kernel", "16x64", cpu, tile_tables.PLAIN) == (5,)
    with pytest.raises(ValueError, match="has no configuration for kernel at 16x96"):
        tile_tables.config("kernel", "16x96", cpu, tile_tables.PLAIN)
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
        yield Compiled(100, 200 if numbers == (1,) else 0, 10, 100, 50, {})

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
    assert any("(1,): spills 200 bytes" in line for line in lines)
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


def test_tuning_measures_small_spills_and_leaves_out_wrong_results(monkeypatch):
    from fastvst_kernels.tuning import tune
    from fastvst_kernels.tuning.aot import Compiled

    spills = {(1,): 0, (2,): 128, (3,): 136, (4,): 0, (5,): 0}
    results = {(1,): 1.0, (2,): 1.0 + 1e-6, (4,): 1.1, (5,): float("nan")}
    seconds = {(1,): 5.0, (2,): 4.0, (4,): 3.0, (5,): 2.0}

    def compiled(shape, numbers, arch):
        yield Compiled(100, spills[numbers], 10, 100, 50, {})

    def problem(shape, device):
        def run(numbers):
            run.last = numbers
            return torch.full((3,), results[numbers]), torch.zeros(0)

        return run

    tunable = tune.Tunable(("a",), lambda shape, arch: tuple(spills), compiled, problem)

    def timed(run):
        run()
        return seconds[run.__defaults__[0]]

    monkeypatch.setattr(tune, "median_seconds", timed)
    lines: list[str] = []
    found = tune.choose("kernel", tunable, "a", tune.Target("g", 90, torch.device("cpu")), lines.append)
    assert found == ((2,), 4.0)
    assert [line.split(": ")[1] for line in lines] == [
        "5000.000 ms",
        "4000.000 ms, spills 128 bytes",
        "spills 136 bytes",
        "other results than the first candidate, left out",
        "other results than the first candidate, left out",
    ]


def test_tuning_visits_the_published_models_first():
    from fastvst_kernels.tuning import tune

    found = tune.classes()
    shapes = [shape for _, _, shape in found]
    assert len(found) == sum(len(tunable.shapes) for tunable in tune.tunables().values())
    first = shapes[: sum(shape in tune.PUBLISHED for shape in shapes)]
    assert set(first) == set(tune.PUBLISHED) and first[0] == "16x128"
    assert [kernel for kernel, _, shape in found if shape == "16x128"][:3] == [
        "attention_forward",
        "attention_backward_queries",
        "attention_backward_keys",
    ]


def test_a_tuned_table_is_complete_whenever_tuning_stops_and_the_command_resumes(tmp_path, monkeypatch):
    from fastvst_kernels.tuning import tune
    from fastvst_kernels.tuning.aot import Compiled

    monkeypatch.setattr(tune, "median_seconds", lambda run: 1.0)
    tried: list[str] = []

    def tunable(kernel, found):
        def problem(shape, device):
            tried.append(f"{kernel}:{shape}")
            return lambda numbers: ()

        return tune.Tunable(
            found.shapes, lambda shape, arch: ((1,),), lambda *_: iter([Compiled(9, 0, 1, 9, 9, {})]), problem
        )

    faked = {kernel: tunable(kernel, found) for kernel, found in tune.tunables().items()}
    monkeypatch.setattr(tune, "tunables", lambda: faked)
    path = tmp_path / "g.json"
    target = tune.Target("g", 90, torch.device("cpu"))
    assert not tune.tune(path, target, "", 0.0, lambda line: None)
    shipped = tile_tables.read_table(tile_tables.TABLES / "sm_90.json").configs
    assert tile_tables.read_table(path).configs == shipped and not tried
    assert tune.tune(path, target, "attention_forward:16x128", float("inf"), lambda line: None)
    assert tried == ["attention_forward:16x128"]
    found = tile_tables.read_table(path).configs
    assert found["attention_forward"]["16x128"] == (1,)
    assert found["attention_forward"]["16x80"] == shipped["attention_forward"]["16x80"]
    assert tune.tune(path, target, "", float("inf"), lambda line: None)
    assert len(tried) == len(set(tried)) == len(tune.classes()) and "untimed" not in json.loads(path.read_text())
