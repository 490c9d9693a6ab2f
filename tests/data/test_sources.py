"""Every accepted form of data set on disk; its detection; errors that say what was found."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvst.data.ledger import Ledger, SampleError
from fastvst.data.sample import Sample
from fastvst.data.sources import open_source


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 28), (shade, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def talk(question: str, answer: str = "yes") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def vst_row(**changes) -> dict:
    row = {
        "id": "r1",
        "data_source": "si_depth",
        "type": "depth",
        "conversations": talk("<|image_pad|>Which is nearer?"),
        "images": [{"bytes": png(1), "path": None}],
        "meta_info": json.dumps([{"resized_width": -1, "resized_height": -1, "width": 32, "height": 28}]),
    }
    return {**row, **changes}


def write_parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def write_json(path, rows):
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def only(path, **options) -> Sample:
    (sample,) = open_source(path, **options)
    return sample


def layout(sample: Sample) -> list:
    """The role of every message, and its texts and kinds of media in order."""
    return [
        (m["role"], [p["text"] if p["type"] == "text" else p["type"].upper() for p in m["content"]])
        for m in sample.messages
    ]


# --- VST ---------------------------------------------------------------------------------------------------------


def test_vst_parquet(tmp_path) -> None:
    meta = json.dumps([{"resized_width": 56, "resized_height": 84, "width": 1, "height": 1}])
    answer = json.dumps({"answer": {"type": "number", "value": 2.5, "unit": "m"}, "metadata": {"room": 7}})
    sample = only(write_parquet(tmp_path / "a.parquet", [vst_row(meta_info=meta, answer=answer)]))
    assert (sample.id, sample.source, sample.kind) == ("r1", "si_depth", "depth")
    assert layout(sample) == [("user", ["IMAGE", "Which is nearer?"]), ("assistant", ["yes"])]
    assert sample.parts("image") == [{"type": "image", "image": png(1), "resized_width": 56, "resized_height": 84}]
    assert sample.answer == {"type": "number", "value": 2.5, "unit": "m"}
    assert sample.metadata["room"] == 7 and sample.metadata["meta_info"][0]["resized_height"] == 84


def test_images_are_at_their_marks(tmp_path) -> None:
    images = [{"bytes": png(i), "path": None} for i in range(3)]
    turns = [
        *talk("First <|vision_start|><|image_pad|><|vision_end|> then\n<|image_pad|>?<image>", "so"),
        *talk("and <|image_pad|>"),
    ]
    sample = only(write_parquet(tmp_path / "a.parquet", [vst_row(conversations=turns, images=images)]))
    assert layout(sample) == [
        ("user", ["First", "IMAGE", "then", "IMAGE", "?"]),  # VST strips the texts; the older mark is removed
        ("assistant", ["so"]),
        ("user", ["and", "IMAGE"]),
        ("assistant", ["yes"]),
    ]
    assert [part["image"] for part in sample.parts("image")] == [png(0), png(1), png(2)]


def test_without_marks_all_images_come_first_in_the_first_human_turn(tmp_path) -> None:
    turns = [{"from": "system", "value": "Be brief."}, *talk("Which?"), *talk("Sure?")]
    images = [{"bytes": png(i), "path": None} for i in range(2)]
    sample = only(write_parquet(tmp_path / "a.parquet", [vst_row(conversations=turns, images=images)]))
    assert layout(sample)[:2] == [("system", ["Be brief."]), ("user", ["IMAGE", "IMAGE", "Which?"])]


def test_older_marks_and_a_doubly_wrapped_conversation(tmp_path) -> None:
    row = vst_row(conversations=[talk("<image>\nWhich?")])
    assert layout(only(write_json(tmp_path / "a.json", [{**row, "images": [uri(png(1))]}])))[0] == (
        "user",
        ["IMAGE", "Which?"],
    )
    assert layout(only(write_parquet(tmp_path / "a.parquet", [row])))[0] == ("user", ["IMAGE", "Which?"])


@pytest.mark.parametrize(
    ("question", "images"),
    [
        ("<|image_pad|>?", 2),
        ("<|image_pad|><|image_pad|>?", 1),
        ("<image>?", 0),
        ("<|image_pad|>?", 0),
        ("<|video_pad|>?", 1),
    ],
)
def test_mark_count_mismatch_names_both_counts(tmp_path, question, images) -> None:
    row = vst_row(conversations=talk(question), images=[{"bytes": png(1), "path": None}] * images)
    path = write_parquet(tmp_path / "a.parquet", [vst_row(id="good"), row])
    with pytest.raises(SampleError, match=rf"si_depth/r1: mark_count: \d \w+ marks .* but \d|but {images}") as caught:
        list(open_source(path))
    assert caught.value.reason == "mark_count" and caught.value.id == "r1"


def test_videos_as_files_and_as_frames(tmp_path) -> None:
    files = vst_row(
        type="video",
        images=[{"bytes": b"\x00\x00\x00\x18ftypmp42", "path": None}],
        conversations=talk("<|video_pad|>What?"),
        id="file",
    )
    frames = vst_row(
        type="spatial_video",
        images=[{"bytes": png(i), "path": None} for i in range(4)],
        conversations=talk("What?"),
        id="frames",
    )
    first, second = open_source(write_parquet(tmp_path / "a.parquet", [files, frames]))
    assert first.parts("video") == [{"type": "video", "video": b"\x00\x00\x00\x18ftypmp42"}]
    assert second.parts("video") == [{"type": "video", "video": [png(0), png(1), png(2), png(3)]}]
    assert layout(second)[0] == ("user", ["VIDEO", "What?"])


def test_rl_rows(tmp_path) -> None:
    base = {"id": "q", "data_source": "rl", "question": "<image>A or B?", "images": [uri(png(1))]}
    choice = {
        **base,
        "thought": "hm",
        "answer": "A. left",
        "answer_gt": "A",
        "meta_info": json.dumps({"mode": ["multi_choices_score"], "question_type": "multi_choices"}),
    }
    boxes = {**base, "answer": "[]", "meta_info": json.dumps({"mode": ["bbox3d"]})}
    first, second = open_source(write_lines(tmp_path / "a.jsonl", [choice, boxes]))
    assert layout(first) == [("user", ["IMAGE", "A or B?"]), ("assistant", ["<think>hm</think> A. left"])]
    assert first.answer == {"type": "choice", "value": "A", "mode": ["multi_choices_score"]}
    assert first.kind == "thought" and first.metadata["meta_info"]["question_type"] == "multi_choices"
    assert second.answer["type"] == "boxes" and second.kind == "bbox_3d"


# --- LLaVA, ShareGPT, OpenAI -----------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_json, write_lines])
def test_llava(tmp_path, write) -> None:
    rows = [
        {"id": 7, "image": "a/ü.png", "conversations": talk("<image>\nWhat is «it»?")},
        {"id": "8", "image": ["x.png", "/abs/y.png"], "conversations": talk("<image> or <image>?")},
        {"id": "9", "video": "v.mp4", "conversations": talk("<video>\nWhat?")},
        {"id": "10", "conversations": talk("No picture at all — nur Text")},
    ]
    path = write(tmp_path / "set.json", rows)
    source = open_source(path)
    samples = list(source)
    assert source.format == "llava" and [s.id for s in samples] == ["7", "8", "9", "10"]
    assert {s.source for s in samples} == {"set"}
    assert samples[0].parts("image")[0]["image"] == str(tmp_path / "a/ü.png")
    assert [p["image"] for p in samples[1].parts("image")] == [str(tmp_path / "x.png"), "/abs/y.png"]
    assert samples[2].parts("video")[0]["video"] == str(tmp_path / "v.mp4")
    assert layout(samples[3])[0] == ("user", ["No picture at all — nur Text"])
    (tmp_path / "images").mkdir()
    first = next(iter(open_source(path, image_folder=tmp_path / "images", name="mine")))
    assert first.parts("image")[0]["image"] == str(tmp_path / "images" / "a/ü.png") and first.source == "mine"


def test_openai_parts(tmp_path) -> None:
    content = [
        {"type": "text", "text": "Compare <image>"},  # ordinary text here: the parts contain the images
        {"type": "image_url", "image_url": {"url": uri(png(5))}},
        {"type": "image", "image": "file:///data/p.png", "max_pixels": 50176},
        {"type": "image", "path": "q.png"},
        {"type": "video", "video": [uri(png(1)), "r.png"], "fps": 2.0},
    ]
    row = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": content},
            {"role": "assistant", "content": "done"},
        ]
    }
    source = open_source(write_lines(tmp_path / "o.jsonl", [row]))
    (sample,) = source
    assert source.format == "openai" and sample.id == "o.jsonl[0][0]"
    assert layout(sample)[1] == ("user", ["Compare <image>", "IMAGE", "IMAGE", "IMAGE", "VIDEO"])
    assert sample.parts("image") == [
        {"type": "image", "image": png(5)},
        {"type": "image", "image": "/data/p.png", "max_pixels": 50176},
        {"type": "image", "image": str(tmp_path / "q.png")},
    ]
    assert sample.parts("video")[0] == {"type": "video", "video": [png(1), str(tmp_path / "r.png")], "fps": 2.0}


def test_messages_with_marks_or_empty_parts_and_a_column_of_images(tmp_path) -> None:
    marks = {"messages": [{"role": "user", "content": "<image>a<image>"}], "images": ["1.png", "2.png"]}
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}, {"type": "image"}]
    empty = {"messages": [{"role": "user", "content": parts}], "images": ["1.png", "2.png"]}
    few = {"messages": [{"role": "user", "content": parts}], "images": ["1.png"], "id": "few"}
    rows = open_source(write_lines(tmp_path / "o.jsonl", [marks, empty, few]))
    stream = iter(rows)
    first = next(stream)
    second = next(stream)
    assert layout(first)[0][1] == ["IMAGE", "a", "IMAGE"] and layout(second)[0][1] == ["a", "IMAGE", "b", "IMAGE"]
    for sample in (first, second):
        assert [p["image"] for p in sample.parts("image")] == [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
    with pytest.raises(SampleError, match="o/few: mark_count: 2 image marks in the human turns, but 1 images"):
        next(stream)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": []}, "bad_schema"),
        ({"conversations": "text"}, "bad_schema"),
        ({"conversations": [{"from": "alien", "value": "?"}]}, "bad_schema"),
        ({"conversations": [{"from": "human"}]}, "bad_schema"),
        ({"conversations": talk("?"), "image": 5}, "bad_schema"),
        ({"conversations": talk("?"), "image": {"bytes": None, "path": None}}, "bad_schema"),
        ({"conversations": talk("?"), "image": "data:image/png;base64,????"}, "bad_base64"),
        ({"conversations": talk("?"), "image": "https://example.org/a.png"}, "remote_media"),
        ({"conversations": talk("?"), "meta_info": "{"}, "bad_schema"),
        ({"messages": [{"role": "robot", "content": "?"}]}, "bad_schema"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]}, "bad_schema"),
        ({"question": ["?"]}, "bad_schema"),
        ({"other": 1}, "bad_schema"),
        ([1, 2], "bad_row"),
    ],
)
def test_bad_rows_are_named_and_iteration_can_continue(tmp_path, row, reason) -> None:
    good = {"id": "good", "messages": [{"role": "user", "content": "hello"}], "conversations": None}
    bad = {"id": "bad", **row} if isinstance(row, dict) else row
    path = write_lines(tmp_path / "set.jsonl", [{**good, "conversations": talk("?")}, bad, {"id": "z", **good}])
    stream = iter(open_source(path))
    next(stream)
    with pytest.raises(SampleError) as caught:
        next(stream)
    assert caught.value.reason == reason and "set.jsonl[0][1]" in str(caught.value)


def test_with_a_ledger_bad_rows_are_counted_and_skipped(tmp_path) -> None:
    rows = [vst_row(id="a"), vst_row(id="b", images=[]), vst_row(id="c")]
    (tmp_path / "d").mkdir()
    write_parquet(tmp_path / "d" / "1.parquet", rows)
    (tmp_path / "d" / "0.parquet").write_bytes(b"")
    (tmp_path / "d" / "2.parquet").write_bytes(b"PAR1 but not really")
    ledger = Ledger()
    assert [s.id for s in open_source(tmp_path / "d", ledger=ledger)] == ["a", "c"]
    assert ledger.counts == {"empty_file": 1, "unreadable_file": 1, "mark_count": 1} and ledger.seen == 3
    with open(tmp_path / "lines.jsonl", "w") as file:
        file.write(json.dumps({"id": "1", "conversations": talk("?")}) + "\n{broken\n\n")
        file.write(json.dumps({"id": "2", "conversations": talk("?")}))  # without a line feed at the end
    ledger = Ledger()
    assert [s.id for s in open_source(tmp_path / "lines.jsonl", ledger=ledger)] == ["1", "2"]
    assert ledger.counts == {"bad_row": 1} and "not JSON" in ledger.summary()


# --- Hugging Face datasets -------------------------------------------------------------------------------------


def test_a_saved_hugging_face_dataset(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
            "images": datasets.Sequence(datasets.Image()),
        }
    )
    rows = [
        {"id": str(i), "conversations": talk("<image>?"), "images": [Image.new("RGB", (30, 30), (i, 0, 0))]}
        for i in range(5)
    ]
    data = datasets.Dataset.from_list(rows, features=features)
    data.save_to_disk(tmp_path / "plain")
    source = open_source(tmp_path / "plain")
    samples = list(source)
    assert source.format == "hf" and [s.id for s in samples] == list("01234")
    pixel = Image.open(io.BytesIO(samples[3].parts("image")[0]["image"])).getpixel((0, 0))
    assert pixel == (3, 0, 0)
    parts = datasets.DatasetDict({"dev": data.select([0]), "test": data.select([1, 2])})
    parts.save_to_disk(tmp_path / "parts")
    assert [s.id for s in open_source(tmp_path / "parts", split="test")] == ["1", "2"]
    with pytest.raises(ValueError, match=r"splits \['dev', 'test'\]; name one"):
        open_source(tmp_path / "parts")


# --- references --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """The same 700 rows in four file types with many blocks."""
    folder = tmp_path_factory.mktemp("big")
    rows = [{"id": f"é{i}", "conversations": talk("w" * (i % 9) + "日本", f"{i}")} for i in range(700)]
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(folder / "d.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return {
        "jsonl": open_source(write_lines(folder / "a.jsonl", rows)),
        "json": open_source(write_json(folder / "b.json", rows)),
        "parquet": open_source(write_parquet(folder / "c.parquet", rows, row_group_size=90)),
        "arrow": open_source(folder / "d.arrow"),
    }


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["jsonl", "json", "parquet", "arrow"]), st.lists(st.integers(0, 699), max_size=12))
def test_rows_are_found_by_reference(big, kind: str, picks: list[int]) -> None:
    source = big[kind]
    refs = [(b, r) for b, rows in enumerate(source.block_rows) for r in range(rows)]
    assert len(refs) == len(source) == 700 and len(source.blocks) > 2
    assert [s.id for s in source.get([refs[i] for i in picks])] == [f"é{i}" for i in picks]
    for block, row in [refs[i] for i in picks[:2]]:
        rest = [s.id for s in source.samples(block, row)]
        assert rest == [f"é{refs.index((block, r))}" for r in range(row, source.block_rows[block])]


def test_a_reference_beyond_the_data_is_an_error(big) -> None:
    with pytest.raises(ValueError, match="no row .0, 10000.*has changed"):
        big["jsonl"].get([(0, 10000)])


def test_all_containers_give_the_same_samples(big) -> None:
    first, *others = ([(s.id, layout(s)) for s in source] for source in big.values())
    assert len(first) == 700 and all(other == first for other in others)


# --- what cannot be opened -----------------------------------------------------------------------------------------


def test_errors_say_what_was_found_and_what_is_accepted(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no data set at .*nowhere"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "e").mkdir()
    with pytest.raises(ValueError, match="no data files.*found nothing.*accepted: Parquet"):
        open_source(tmp_path / "e")
    (tmp_path / "e" / "notes.txt").write_text("?")
    with pytest.raises(ValueError, match=r"found {'.txt': 1} .*notes.txt"):
        open_source(tmp_path / "e")
    with pytest.raises(ValueError, match="format is 'vts'; expected 'auto' or one of .*'vst'"):
        open_source(tmp_path / "e", format="vts")
    (tmp_path / "zero.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match="data set is empty: .*zero.jsonl: empty_file: the file has 0 bytes"):
        open_source(tmp_path / "zero.jsonl")
    with pytest.raises(ValueError, match="data set is empty: 1 files without rows"):
        open_source(write_json(tmp_path / "none.json", []))
    with pytest.raises(ValueError, match="unreadable_file: .*not a complete JSON array"):
        (tmp_path / "cut.json").write_text('[{"conversations": [')
        open_source(tmp_path / "cut.json")
    with pytest.raises(ValueError, match="neither Parquet, Arrow, JSON, CSV nor tar"):
        (tmp_path / "image.png").write_bytes(png(1))
        open_source(tmp_path / "image.png")
    path = write_lines(tmp_path / "odd.jsonl", [{"ask": 1, "reply": 2}])
    with pytest.raises(ValueError, match=r"columns \['ask', 'reply'\].*accepted:"):
        open_source(path)
    path = write_lines(tmp_path / "llava.jsonl", [{"conversations": talk("?")}])
    with pytest.raises(ValueError, match=r"'openai' needs one of \['messages'\]"):
        open_source(path, format="openai")
    with pytest.raises(FileNotFoundError, match="image folder .* does not exist"):
        open_source(path, image_folder=tmp_path / "missing")


def test_a_broken_row_group_is_counted_row_by_row(tmp_path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", [vst_row(id=str(i)) for i in range(60)], row_group_size=20, compression="zstd"
    )
    meta = pq.ParquetFile(path).metadata.row_group(1)
    column = next(meta.column(i) for i in range(meta.num_columns) if "bytes" in meta.column(i).path_in_schema)
    begin = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[begin : begin + 60] = b"\xff" * 60
    path.write_bytes(bytes(data))
    ledger = Ledger(max_fraction=1.0)
    ids = [s.id for s in open_source(path, ledger=ledger)]
    assert ids == [str(i) for i in [*range(20), *range(40, 60)]] and ledger.counts == {"bad_row": 20}


def test_importing_the_data_layer_is_light() -> None:
    heavy = ["transformers", "pandas", "datasets", "moderngl", "trimesh", "embreex", "av", "torchvision"]
    code = f"import sys, fastvst.data; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "arrow"])
def test_a_source_with_whole_rows_keeps_each_row_as_it_was_read(tmp_path, suffix: str) -> None:
    rows = [{"id": f"r{i}", "question": "how many?", "answer": "2", "mine": i, "nested": {"a": [i]}} for i in range(3)]
    path = tmp_path / f"rows.{suffix}"
    table = pa.Table.from_pylist(rows)
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    assert [sample.row for sample in open_source(path).with_whole_rows()] == rows
    assert [sample.row for sample in open_source(path)] == [None] * 3
