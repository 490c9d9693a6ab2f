"""Robot demonstrations as training data: VST's Parquet, LIBERO's HDF5 and LeRobot, read without a conversion."""

from __future__ import annotations

import json
import re

import h5py
import numpy as np
import pytest

from action_data import actions, write_lerobot, write_libero, write_vst
from fastvst.config import load_config
from fastvst.data import Ledger, LoaderConfig, MixtureConfig, Processor, make_loader
from fastvst.data.check import check_source
from fastvst.data.ledger import SampleError
from fastvst.data.mixture import SourceConfig, open_configured
from fastvst.data.processor import with_action_tokens
from fastvst.data.sources import open_source
from fastvst.data.sources.action_rows import ActionRows
from fastvst.data.sources.hdf5_files import active_steps, task_of
from fastvst.vla import ActionCodec, ActionStatistics

TEXT = ActionRows(kind="text", bins=999)


def texts(sample) -> tuple[str, str]:
    """The question and the answer."""
    user, assistant = (m for m in sample.messages if m["role"] in ("user", "assistant"))
    return "".join(p.get("text", "") for p in user["content"]), assistant["content"][0]["text"]


def test_a_row_of_vst_is_asked_and_answered_as_vst_does(tmp_path) -> None:
    values = write_vst(tmp_path / "a.parquet")
    found = list(open_source(tmp_path / "a.parquet", actions=ActionRows()))
    assert [sample.id for sample in found] == [f"step-{step}" for step in range(5)]
    for sample, action in zip(found, values, strict=True):
        asked, answer = texts(sample)
        assert asked == "What action should the robot take to pick up the black bowl?"
        # vst/vla: token of bin b is the vocabulary's end minus b, so number 256 - b of the 256 added tokens
        bins = np.digitize(action, np.linspace(-1, 1, 256))
        assert answer == "".join(f"<|action_{256 - one}|>" for one in bins)
        assert sample.kind == "action" and len(sample.parts("image")) == 1


def test_statistics_read_the_actions_that_are_not_normalised(tmp_path) -> None:
    values = write_vst(tmp_path / "a.parquet")
    ranges = ActionStatistics((-3.0,) * 7, (3.0,) * 7, (True,) * 7)
    ranges.save(tmp_path / "s.json")
    options = ActionRows(kind="text", bins=999, statistics=str(tmp_path / "s.json"))
    for sample, action in zip(open_source(tmp_path / "a.parquet", actions=options), values, strict=True):
        np.testing.assert_allclose(options.codec.decode(texts(sample)[1]), action[None] * 3, atol=3 / 999 + 1e-5)


@pytest.mark.parametrize(
    "changes, options, words",
    [
        ({"action": None}, TEXT, "no 'action'"),
        ({"action": "0.1"}, TEXT, "shape"),
        ({"action": ["a"] * 7}, TEXT, "not a list of numbers"),
        ({"action": [0.1] * 6}, TEXT, "dims is 7"),
        ({"action": [float("nan")] * 7}, TEXT, "not_finite"),
        ({"action": [1.5] + [0.0] * 6}, TEXT, "1.5, outside of .* give the `statistics`"),
        ({"language_instruction": None}, TEXT, "language_instruction"),
        ({"language_instruction": " "}, TEXT, "no instruction"),
        ({}, ActionRows(kind="text", bins=999, chunk=4), "one step; chunk is 4"),
        ({}, ActionRows(kind="text", bins=999, state=True), "no finite state"),
    ],
    ids=str,
)
def test_a_row_that_is_no_action_is_named_and_costs_that_row_only(tmp_path, changes, options, words) -> None:
    write_vst(tmp_path / "a.parquet", steps=2, **changes)
    ledger = Ledger(max_fraction=1.0)
    assert list(open_source(tmp_path / "a.parquet", ledger=ledger, actions=options)) == []
    error = open_source(tmp_path / "a.parquet", actions=options).get([(0, 1)])[0]
    assert isinstance(error, SampleError) and error.reason == "bad_action"
    assert re.search(words, error.detail), error.detail


def test_libero_leaves_out_idle_steps_and_turns_its_images(tmp_path) -> None:
    values = actions(6)
    values[:, -1] = [-1, -1, -1, 1, 1, 1]
    values[1, :6] = 0  # idle
    values[3, :6] = 1e-6  # closes the gripper: kept
    values[4, :6] = 1e-6  # idle again
    name = "KITCHEN_SCENE10_put_the_bowl_on_the_stove_demo.hdf5"
    shown = write_libero(tmp_path / name, {"demo_10": actions(2, seed=1), "demo_2": values})
    source = open_source(tmp_path / name, actions=TEXT)
    found = list(source)
    stem = name.removesuffix(".hdf5")
    assert [one.id for one in found] == [f"{stem}/demo_2/{s}" for s in (0, 2, 3, 5)] + [
        f"{stem}/demo_10/{s}" for s in (0, 1)
    ]
    assert any("2 steps left out that do nothing" in line for line in source.first_lines())
    for sample, step in zip(found, (0, 2, 3, 5), strict=False):
        asked, answer = texts(sample)
        assert asked == "What action should the robot take to put the bowl on the stove?"
        assert answer == TEXT.codec.encode(values[step])
        (part,) = sample.parts("image")
        turned = np.rot90(shown["demo_2"][step], 2)
        assert np.array_equal(np.asarray(part["image"]), turned)
        assert (part["resized_width"], part["resized_height"]) == (256, 256)
    assert not any(sample.changes for sample in found)


def test_chunks_end_with_the_last_action_and_two_cameras_and_the_state_are_shown(tmp_path) -> None:
    values = actions(5)
    shown = write_libero(
        tmp_path / "open_it_demo.hdf5",
        {"demo_0": values},
        problem_info=json.dumps({"language_instruction": ["Open", "the drawer."]}),
    )
    options = ActionRows("text", 999, chunk=3, cameras=("agentview_rgb", "eye_in_hand_rgb"), state=True)
    source = open_source(tmp_path, actions=options)
    for step, sample in enumerate(source):
        asked, answer = texts(sample)
        assert asked.startswith("What action should the robot take to open the drawer?\nThe robot's state is ")
        assert asked.endswith(" ".join(f"{(9 * step + i) / 100:.3f}" for i in range(9)) + ".")
        assert answer == options.codec.encode(values[np.minimum(np.arange(step, step + 3), 4)])
        second = sample.parts("image")[1]["image"]
        assert np.array_equal(np.asarray(second), np.rot90(shown["demo_0"][::-1][step], 2))
    assert [texts(one) for one in source.get([(0, 4), (0, 1)])] == [texts(list(source)[4]), texts(list(source)[1])]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot_chunks_end_with_their_episode(tmp_path, version) -> None:
    values = write_lerobot(tmp_path / "set", version)
    options = ActionRows("text", 999, chunk=3, state=True)
    source = open_source(tmp_path / "set", actions=options)
    found = list(source)
    assert len(found) == 7 and len({one.id for one in found}) == 7
    for step, sample in enumerate(found):
        last = 2 if step < 3 else 6
        asked, answer = texts(sample)
        assert asked.startswith(f"What action should the robot take to open drawer {int(step > 2)}?")
        assert asked.endswith("0.500 0.250.")
        assert answer == options.codec.encode(values[np.minimum(np.arange(step, step + 3), last)])
    assert len(found[0].parts("image")) == 1
    lines = source.first_lines()
    assert any("ignored: the columns" in line and "timestamp" in line for line in lines)
    refs = [(block, row) for block, rows in enumerate(source.block_rows) for row in range(rows)]
    assert [texts(one) for one in source.get(refs[::-1])] == [texts(one) for one in found[::-1]]


def _damage(kind: str, path) -> None:
    with h5py.File(path, "r+") as file:
        demo = file["data/demo_0"]
        if kind == "no actions":
            del demo["actions"]
        elif kind == "fewer images":
            del demo["obs/agentview_rgb"]
            demo["obs/agentview_rgb"] = np.zeros((2, 8, 8, 3), np.uint8)
        elif kind == "float images":
            del demo["obs/agentview_rgb"]
            demo["obs/agentview_rgb"] = np.zeros((5, 8, 8, 3))
        elif kind == "other dims":
            del demo["actions"]
            demo["actions"] = np.zeros((5, 6))
        elif kind == "objects":
            del demo["actions"]
            demo.create_dataset("actions", data=np.array([["a"] * 7] * 5, object), dtype=h5py.string_dtype())
        elif kind == "link":
            del demo["actions"]
            demo["actions"] = h5py.ExternalLink("/etc/hostname", "/x")
        elif kind == "virtual":
            del demo["actions"]
            layout = h5py.VirtualLayout((5, 7), dtype=np.float64)
            layout[:] = h5py.VirtualSource("other.h5", "x", shape=(5, 7))
            demo.create_virtual_dataset("actions", layout)
        elif kind == "external":
            del demo["actions"]
            demo.create_dataset("actions", (5, 7), np.float64, external=[("/etc/hostname", 0, 280)])


@pytest.mark.parametrize(
    "kind, words",
    [
        ("no actions", "actions is missing"),
        ("fewer images", r"\(2, 8, 8, 3\) of uint8; expected \(5, height"),
        ("float images", "of float64"),
        ("other dims", "dims is 7"),
        ("objects", "expected numbers in this file"),
        ("link", "links to other files are not followed"),
        ("virtual", "lies in other files"),
        ("external", "lies in other files"),
    ],
)
def test_a_file_that_is_no_demonstration_is_named_and_opens_no_other_file(tmp_path, kind, words) -> None:
    write_libero(tmp_path / "good_demo.hdf5", {"demo_0": actions(3)})
    write_libero(tmp_path / "bad_demo.hdf5", {"demo_0": actions(5)})
    _damage(kind, tmp_path / "bad_demo.hdf5")
    source = open_source(tmp_path, actions=TEXT)
    assert len(source) == 3
    (problem,) = source.problems
    assert problem.id == "bad_demo.hdf5" and re.search(words, problem.detail), problem.detail


def test_names_of_tasks() -> None:
    assert task_of("pick_up_the_bowl_demo.hdf5") == "pick up the bowl"
    assert task_of("LIVING_ROOM_SCENE2_put_both_in_the_basket_demo.hdf5") == "put both in the basket"


def test_idle_steps_follow_openvlas_rule() -> None:
    """The rule of experiments/robot/libero/regenerate_libero_dataset.py (github.com/openvla/openvla), step by step."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.uniform(-1, 1, (30, 7)) * rng.choice([0, 1e-5, 1], (30, 1))
        values[:, -1] = rng.choice([-1, 1], 30)
        kept = []
        for action in values:
            still = np.linalg.norm(action[:-1]) < 1e-4
            if still and (not kept or action[-1] == kept[-1][-1]):
                continue
            kept.append(action)
        assert np.array_equal(values[active_steps(values)], np.array(kept).reshape(-1, 7))


def test_a_run_trains_on_them_with_spatial_rows_and_resumes_in_mid_step(tmp_path) -> None:
    write_libero(tmp_path / "open_it_demo.hdf5", {f"demo_{i}": actions(9, seed=i) for i in range(4)})
    rows = [{"question": f"How far is {i}?", "answer": f"{i} m", "id": str(i)} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.toml").write_text(
        f'[[sources]]\npath = "{tmp_path}/open_it_demo.hdf5"\nweight = 2.0\n'
        f'actions = {{kind = "text", bins = 999, chunk = 2}}\n[[sources]]\npath = "{tmp_path}/rows.jsonl"\n'
    )
    mixture = load_config(MixtureConfig, ["--config", str(tmp_path / "run.toml")], MixtureConfig(()))
    processor = Processor.preset("tiny", max_pixels=56 * 56, max_seq_len=256)
    config = LoaderConfig(tokens_per_pack=512, num_workers=0, buffer_samples=16)

    def batches(loader, count):
        stream = iter(loader)
        return [next(stream).tokens.tolist() for _ in range(count)]

    loader = make_loader(mixture, processor, config, ledger=Ledger(max_fraction=0.0))
    first = batches(loader, 3)
    state = loader.state_dict()
    rest = batches(loader, 3)
    again = make_loader(mixture, processor, config, ledger=Ledger(max_fraction=0.0))
    again.load_state_dict(state)
    assert batches(again, 3) == rest and first != rest


def test_tokens_are_added_to_the_processor_or_refused(tmp_path) -> None:
    write_vst(tmp_path / "a.parquet")
    source = SourceConfig(str(tmp_path / "a.parquet"), actions=ActionRows())
    processor = Processor.preset("tiny")
    with pytest.raises(ValueError, match="do not fit"):
        with_action_tokens(processor, ActionCodec())
    with pytest.raises(ValueError, match=r"no token '<\|action_"):
        next(iter(make_loader(MixtureConfig((source,)), processor, LoaderConfig(256, num_workers=0))))


def test_data_check_reads_them(tmp_path) -> None:
    write_libero(tmp_path / "open_it_demo.hdf5", {"demo_0": actions(5)})
    report = check_source(SourceConfig(str(tmp_path), actions=TEXT), Processor.preset("tiny"))
    assert report.rows == 5 and "action" in report.table()
    with pytest.raises(ValueError, match="no data files"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="belong together"):
        open_configured(SourceConfig(str(tmp_path), format="actions"))
    with pytest.raises(ValueError, match="belong together"):
        open_configured(SourceConfig(str(tmp_path), format="vst", actions=TEXT))


def test_statistics_that_cannot_be_read_end_the_run_at_its_start(tmp_path) -> None:
    write_vst(tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "a.parquet", actions=ActionRows(statistics=str(tmp_path / "none.json")))
    ActionStatistics((0.0,), (1.0,), (True,)).save(tmp_path / "s.json")
    with pytest.raises(ValueError, match="dims is 7; the statistics have 1"):
        open_source(tmp_path / "a.parquet", actions=ActionRows(statistics=str(tmp_path / "s.json")))
