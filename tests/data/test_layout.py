"""Which files of a folder are rows, compared with `datasets`; what is not read is named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastvst.data.mixture import MixtureConfig, SourceConfig, open_mixture
from fastvst.data.sources import open_source
from fastvst.data.sources.layout import find_files, glob_regex

datasets = pytest.importorskip("datasets")
JSON_LINES = (".jsonl",)
WORDS = ["train", "test", "validation", "dev", "val", "eval", "training", "rows", "a", "testing1", "valid", "my"]


def touch(root: Path, *names: str) -> Path:
    """Files with one row each, whose id is the file's name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"id": name, "messages": [{"role": "user", "content": "?"}]}
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([row]), path)
        else:
            path.write_text(json.dumps(row) + "\n")
    return root


def ids(root: Path, **options) -> list[str]:
    return [sample.id for sample in open_source(root, **options)]


def of_the_library(root: Path) -> dict[str, set[str]]:
    """Split -> files, as `load_dataset(root)` finds them."""
    patterns = datasets.data_files.get_data_patterns(str(root))
    found = datasets.data_files.DataFilesDict.from_patterns(patterns, str(root), allowed_extensions=[".jsonl"])
    return {split: {str(Path(name).relative_to(root)) for name in names} for split, names in found.items()}


def random_name(rng: random.Random) -> str:
    def word() -> str:
        return rng.choice(["", "", rng.choice(WORDS) + rng.choice("-._ 0")]) + rng.choice(WORDS)

    folders = [word() for _ in range(rng.choice([0, 0, 1, 1, 2]))]
    if rng.random() < 0.15:
        folders = ["data"]
    shard = rng.choice(["", "", "", "-00000-of-00002", "-00001-of-00002-ab12", "_0", "0"])
    return "/".join([*folders, word() + shard + ".jsonl"])


def test_splits_are_those_of_the_library(tmp_path) -> None:
    rng = random.Random(0)
    compared = 0
    for number in range(150):
        root = touch(tmp_path / f"r{number}", *{random_name(rng) for _ in range(rng.randint(1, 5))})
        try:
            expected = of_the_library(root)
        except ValueError:  # the name of a split has a blank or a hyphen
            with pytest.raises(ValueError, match="expected words joined by dots"):
                find_files(root, JSON_LINES, None)
            continue
        for split, names in expected.items():
            others = set().union(*(found for name, found in expected.items() if name != split))
            if names & others:  # the library trains on a row that is also in another split
                with pytest.raises(ValueError, match="belongs to several of the splits"):
                    find_files(root, JSON_LINES, split)
                continue
            found = find_files(root, JSON_LINES, split)
            assert {str(path.relative_to(root)) for path in found.files} == names, (sorted(root.rglob("*")), split)
            compared += 1
        if len(expected) > 1:
            with pytest.raises(ValueError, match="has the splits") as caught:
                find_files(root, JSON_LINES, None)
            assert all(repr(str(split)) in str(caught.value) for split in expected)
        with pytest.raises(ValueError, match="there is no 'nothing'"):
            find_files(root, JSON_LINES, "nothing")
    assert compared > 120


def test_a_repository_with_shards(tmp_path) -> None:
    names = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test", "hard.cases")]
    root = touch(tmp_path, *names)
    mixture = open_mixture(MixtureConfig((SourceConfig(str(root), split="train"),), epochs=1, shuffle_buffer=0))
    assert [drawn.sample.id for drawn in mixture] == [names[0]]
    assert ids(root, split="hard.cases") == [names[3]]
    with pytest.raises(ValueError, match=r"splits \['hard.cases', 'test', 'train', 'validation'\]; name one"):
        open_source(root)
    assert ids(root / names[2]) == ids(root / names[2], split="test") == [names[2]]
    with pytest.raises(ValueError, match="is the split 'test', not 'train'"):
        open_source(root / names[2], split="train")


README = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: ["parts/a*", "more/**"]
  - split: held_out
    path: parts/b.jsonl
---
# Rows
"""


def test_the_readme_names_the_files(tmp_path) -> None:
    root = touch(tmp_path, "parts/a1.jsonl", "parts/a2.jsonl", "parts/b.jsonl", "more/x/y.jsonl", "test.jsonl")
    (root / "README.md").write_text(README)
    builder = datasets.load_dataset_builder(str(root), cache_dir=str(tmp_path / ".cache"))
    expected = {split: sorted(Path(f).name for f in files) for split, files in builder.config.data_files.items()}
    for split in ("train", "held_out"):
        layout = find_files(root, JSON_LINES, split)
        assert sorted(path.name for path in layout.files) == expected[split]
    assert layout.others == [(".jsonl", 1, "test.jsonl")]
    with pytest.raises(ValueError, match="'held_out', 'train'"):
        open_source(root)
    (root / "README.md").write_text("---\nconfigs:\n- config_name: en\n  data_files: a.jsonl\n- config_name: de\n---\n")
    with pytest.raises(ValueError, match=r"configurations \['en', 'de'\]"):
        open_source(root)
    (root / "README.md").write_text("---\nconfigs:\n- config_name: en\n  data_files: gone*.jsonl\n---\n")
    with pytest.raises(ValueError, match="no file of README.md"):
        open_source(root)


def test_saved_data_sets_are_the_files_of_state_json(tmp_path) -> None:
    rows = [{"id": f"r{k}", "messages": [{"role": "user", "content": f"Question {k}"}]} for k in range(6)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "ds", num_shards=2)
    loaded = datasets.load_from_disk(str(tmp_path / "ds"))
    loaded.map(lambda row: {**row, "id": "old"})
    assert any(path.name.startswith("cache-") for path in (tmp_path / "ds").iterdir())
    assert ids(tmp_path / "ds") == list(datasets.load_from_disk(str(tmp_path / "ds"))["id"])
    assert ("cache", 1) in [other[:2] for other in open_source(tmp_path / "ds").layout.others]
    with pytest.raises(ValueError, match="is the split 'train'; there is no 'test'"):
        open_source(tmp_path / "ds", split="test")
    parts = datasets.DatasetDict({"train": data.select([0, 1]), "test": data.select([2])})
    parts.save_to_disk(tmp_path / "dict")
    assert ids(tmp_path / "dict", split="train") == ["r0", "r1"] and ids(tmp_path / "dict", split="test") == ["r2"]
    with pytest.raises(ValueError, match=r"splits \['test', 'train'\]; name one"):
        open_source(tmp_path / "dict")
    (tmp_path / "ds" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="state.json names 'data-00001-of-00002.arrow'"):
        open_source(tmp_path / "ds")


def test_the_cache_of_load_dataset(tmp_path) -> None:
    touch(tmp_path / "repo", "train.jsonl", "test.jsonl")
    cache = tmp_path / "prepared"
    datasets.load_dataset(str(tmp_path / "repo"), cache_dir=str(cache))
    assert ids(cache, split="test") == ["test.jsonl"]
    touch(tmp_path / "other", "train.jsonl", "test.jsonl", "test-2.jsonl")
    datasets.load_dataset(str(tmp_path / "other"), cache_dir=str(cache))
    with pytest.raises(ValueError, match="2 prepared data sets"):
        open_source(cache, split="test")


def test_a_cached_repository_is_read_at_its_main_revision(tmp_path) -> None:
    root = tmp_path / "datasets--a--b"
    touch(root, "snapshots/111/rows.jsonl", "snapshots/222/rows.jsonl")
    (root / "blobs").mkdir()
    with pytest.raises(ValueError, match=r"snapshots \['111', '222'\]"):
        open_source(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("222")
    assert [path.parent.name for path in open_source(root).layout.files] == ["222"]


def test_files_that_are_not_read_are_named(tmp_path) -> None:
    root = touch(tmp_path, "rows.parquet", "more.jsonl", "old/~x.parquet", ".hidden.parquet", "_temporary/a.parquet")
    touch(root, "cache-12.arrow", "part.parquet.incomplete", "tmpab12cd34.parquet", "config.json", "notes.csv")
    (root / "i.png").write_bytes(b"x")
    source = open_source(root)
    assert sorted(sample.id for sample in source) == ["old/~x.parquet", "rows.parquet"]
    assert source.layout.others == [
        (".csv", 1, "notes.csv"),
        (".incomplete", 1, "part.parquet.incomplete"),
        (".jsonl", 1, "more.jsonl"),
        (".png", 1, "i.png"),
        ("cache", 2, "cache-12.arrow"),
    ]
    line = "\n".join(source.first_lines())
    assert "not read: .csv 1 (notes.csv), .incomplete 1 (part.parquet.incomplete), .jsonl 1 (more.jsonl)" in line
    assert "split" not in line


def test_a_file_outside_the_splits_is_never_left_out_silently(tmp_path) -> None:
    root = touch(tmp_path, "rows.jsonl", "my_test.jsonl")
    with pytest.raises(ValueError, match="name the split 'test', but rows.jsonl belongs to no split"):
        open_source(root)
    source = open_source(root, split="test")
    assert [s.id for s in source] == ["my_test.jsonl"] and source.layout.others == [(".jsonl", 1, "rows.jsonl")]
    assert "split test" in source.describe()


@pytest.mark.parametrize("pattern", ["data/train-*", "**/*.jsonl", "a?/[!x]*.json", "*", "x/**", "a.b/[ab]c"])
def test_glob_patterns(pattern: str) -> None:
    import re

    fsspec = pytest.importorskip("fsspec.implementations.memory")
    names = ["data/train-1", "data/x/train-1", "q.jsonl", "a/b/q.jsonl", "ab/y1.json", "ab/x1.json", "x/a", "x/b/c"]
    names += ["a.b/ac", "aXb/ac", "a.b/cc"]
    system = fsspec.MemoryFileSystem()
    system.store.clear()
    for name in names:
        system.pipe(f"/root/{name}", b"")
    found = {name.removeprefix("/root/") for name in system.glob(f"/root/{pattern}") if system.isfile(name)}
    assert {name for name in names if re.fullmatch(glob_regex(pattern), name)} == found


def test_a_data_folder_of_llama_factory_is_several_data_sets(tmp_path) -> None:
    touch(tmp_path, "a.jsonl", "b.jsonl")
    assert ids(tmp_path) == ["a.jsonl", "b.jsonl"]
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.jsonl"}, "hub": {"hf_hub_url": "x"}}))
    with pytest.raises(ValueError, match=r"names data sets of their own: \['a.jsonl'\]; give the path"):
        open_source(tmp_path)
    assert ids(tmp_path / "a.jsonl") == ["a.jsonl"]
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"description": "", "features": {"id": {"dtype": "string"}}})
    )
    assert ids(tmp_path) == ["a.jsonl", "b.jsonl"], "that of `datasets` describes the columns"


def test_a_file_that_is_one_object_names_its_lists(tmp_path) -> None:
    coco = {"info": {}, "images": [{"id": 1}], "annotations": [{"caption": "x"}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    with pytest.raises(ValueError, match=r"one object; save the list of rows \(images or annotations\)"):
        open_source(tmp_path / "coco.json")
