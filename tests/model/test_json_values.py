"""Every field of every JSON file of a model directory x odd values: the same meaning, or one error that names it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastvst.data import Processor, Sample
from fastvst.data.images import PatchGeometry
from fastvst.data.processor_config import make_config
from fastvst.data.processor_files import ProcessorFiles, read_files, write_files
from fastvst.data.tokenizer import tiny_tokenizer
from fastvst.model import ModelConfig, Qwen25VL, json_values
from fastvst.rollout import Engine, SamplingParams

FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json")
MORE = ("processor_config.json", "video_preprocessor_config.json", "fastvst_processor.json", "chat_template.json")
ODD: list[Any] = [
    None,
    [],
    {},
    "",
    "x",
    True,
    False,
    0,
    -1,
    1.5,
    1e400,
    "7",
    [[7]],
    [7, 7],
    ["7"],
    [True],
    [None],
    10**9,
]
ODD += [{"a": 1}, [7, None], float("nan"), [1, 2, 3, 4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    processor = Processor.preset("tiny", max_pixels=112 * 112)
    Qwen25VL(ModelConfig.preset("tiny")).save_pretrained(path, processor=processor)
    flat = json.loads((path / "preprocessor_config.json").read_text())
    (path / "video_preprocessor_config.json").write_text(
        json.dumps(flat | {"fps": 2, "min_frames": 4, "max_frames": 8})
    )
    (path / "generation_config.json").write_text(
        json.dumps(json.loads((path / "generation_config.json").read_text()) | {"temperature": 0.1, "top_k": 1})
    )
    return path


def changes(content: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(place of a field, odd value) for every field, also of objects inside."""
    for name, value in content.items():
        if prefix == () and name == "added_tokens_decoder":
            continue  # one entry for each token
        yield from (((*prefix, name), odd) for odd in ODD)
        if isinstance(value, dict):
            yield from changes(value, (*prefix, name))


def put(content: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(content))
    inner = copy
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return copy


TOKENIZER = tiny_tokenizer()  # read once: a processor takes 50 ms, almost all of it for the tokenizer


def load(path: Path, name: str) -> tuple[ModelConfig, Any, ProcessorFiles | None]:
    """What loading a model, or a processor, reads in the JSON files: (config, options, files)."""
    config = ModelConfig.from_pretrained(path)
    if name in ("config.json", "generation_config.json"):
        return config, None, None
    files, found = read_files(path, config, TOKENIZER)
    return config, make_config(found), files


def save(path: Path, config: ModelConfig, options: Any, files: ProcessorFiles | None) -> None:
    path.mkdir(exist_ok=True)
    if files is not None:
        write_files(path, TOKENIZER, PatchGeometry(mean=options.image_mean, std=options.image_std), options, files)
    (path / "config.json").write_text(config.to_json())
    (path / "generation_config.json").write_text(config.generation_json())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*FILES, *MORE])
def test_every_field_with_an_odd_value(folder: Path, tmp_path: Path, name: str) -> None:
    """What loads can be written and read again with the same meaning, and its EOS tokens can be used."""
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if name == "processor_config.json":
        image = json.loads((folder / "preprocessor_config.json").read_text())
        video = json.loads((folder / "video_preprocessor_config.json").read_text())
        (tmp_path / name).write_text(json.dumps({"image_processor": image, "video_processor": video}))
    content = json.loads((tmp_path / name).read_text())
    wrong = []
    loaded = 0
    for place, odd in changes(content):
        (tmp_path / name).write_text(json.dumps(put(content, place, odd)))
        try:
            found = load(tmp_path, name)
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
            inside = place[-1] in ("text_config", "vision_config") and "hidden_size" in said
            if not (place[-1] in said or inside) or not any(file in said for file in (name, "config.json")):
                wrong.append((place, odd, str(error)[:200]))
            continue
        except Exception as error:
            wrong.append((place, odd, repr(error)[:200]))
            continue
        loaded += 1
        if loaded % 7 == 0:
            save(tmp_path / "again", *found)
            if load(tmp_path / "again", name)[:2] != found[:2]:
                wrong.append((place, odd, "another meaning after saving"))
    assert wrong == [], "\n".join(map(str, wrong))
    assert loaded > 0


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, (7,)),
        ([7, 9], (7, 9)),
        ([7, 7, 9, 7], (7, 9)),
        ("7", (7,)),
        (7.0, (7,)),
        ([10**6, 7], (10**6, 7)),
        ([], None),
        ([[7]], None),
        ([True], None),
        (True, None),
        ([None], None),
        ("<|im_end|>", None),
        (-1, None),
        (7.5, None),
        ({}, None),
    ],
)
def test_eos_tokens(folder: Path, tmp_path: Path, file: str, value: Any, expected: tuple[int, ...] | None) -> None:
    for one in folder.iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    content = json.loads((folder / file).read_text())
    if file == "config.json":
        (tmp_path / "generation_config.json").unlink()
        content["text_config"]["eos_token_id"] = value
    else:
        content["eos_token_id"] = value
    (tmp_path / file).write_text(json.dumps(content))
    if expected is None:
        with pytest.raises(ValueError, match=rf"{file}.*eos_token_id is .*; expected a token id, or a list"):
            Qwen25VL.from_pretrained(tmp_path)
        return
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = Qwen25VL.from_pretrained(tmp_path).eval()
    assert model.config.eos_token_ids == expected
    assert any("outside of the vocabulary" in str(w.message) for w in warned) == (10**6 in expected)
    engine = Engine(model, Processor.from_pretrained(tmp_path), memory=1 << 24)
    sample = Sample.from_messages([{"role": "user", "content": "How many?"}])
    assert engine.generate([sample], SamplingParams(temperature=0, max_tokens=3))[0][0].tokens


@given(st.integers(1, 10**6))
def test_a_count_in_another_dress_is_that_count(value: int) -> None:
    for dress in (value, float(value), str(value), f"{value}.0"):
        assert json_values.count()(dress) == value
        assert json_values.number()(dress) == value
    assert json_values.number()(f"1e-{value % 30}") == pytest.approx(10.0 ** -(value % 30))


@given(st.one_of(st.none(), st.booleans(), st.text(), st.lists(st.integers()), st.floats(allow_nan=True)))
def test_readers_return_a_value_of_their_type_or_raise_value_errors(value: Any) -> None:
    wanted = {"count": int, "flag": bool, "text": str, "number": (int, float), "mapping": dict, "token_ids": list}
    readers = {"count": json_values.count(), "number": json_values.number()}
    for name, kind in wanted.items():
        try:
            found = readers.get(name, getattr(json_values, name))(value)
        except ValueError as error:
            assert str(error)
        else:
            assert isinstance(found, kind)
