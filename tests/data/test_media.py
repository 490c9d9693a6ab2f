"""The images of a row in every dress that files have: base64, paths of other systems, arrays, JSON in a cell."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvst.data.ledger import SampleError
from fastvst.data.sources import open_source
from fastvst.data.sources.media import looks_like_media, media_list, payload
from fastvst.data.sources.row_context import RowContext


def row(folder: Path = Path("/data")) -> RowContext:
    return RowContext("set", "r1", "set.jsonl[0][0]", folder)


def png(shade: int = 1) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 28), (shade, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


PNG = png() + b"\0" * ((1 - len(png())) % 3)  # its base64 ends with padding
TEXT = base64.b64encode(PNG).decode()
URLSAFE = base64.urlsafe_b64encode(PNG).decode()
WRAPPED = base64.encodebytes(PNG).decode()


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (PNG, None),
        (bytearray(PNG), None),
        ({"bytes": PNG, "path": "x.png"}, None),
        ({"bytes": list(PNG), "path": None}, None),
        ({"bytes": TEXT}, None),
        ({"url": f"data:image/png;base64,{TEXT}"}, None),
        (f"data:image/png;base64,{TEXT}", None),
        (f"data:;base64,{TEXT}", None),
        (f"DATA:image/png;charset=utf-8;BASE64,{TEXT}", None),
        (f"  data:image/png;base64,{TEXT}\n", None),
        (f"data:image/png;base64,{WRAPPED}", "base64_repaired"),
        (f"data:image/png;base64,{TEXT.rstrip('=')}", "base64_repaired"),
        (f"data:image/png;base64,{quote(TEXT, safe='')}", "base64_repaired"),
        (f"data:image/png,{quote(PNG)}", "percent_encoded_data"),
        (TEXT, "bare_base64"),
        (URLSAFE, "bare_base64"),
        (WRAPPED, "bare_base64"),
        (TEXT.rstrip("="), "bare_base64"),
    ],
)
def test_bytes_are_the_same_in_every_dress(value, change) -> None:
    context = row()
    assert payload(value, context) == PNG
    assert [code for code, _ in context.changes] == ([change] if change else [])


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=90), st.integers(1, 20), st.booleans(), st.booleans())
def test_base64_is_read_as_the_library_wrote_it(data: bytes, width: int, urlsafe: bool, padded: bool) -> None:
    text = (base64.urlsafe_b64encode if urlsafe else base64.b64encode)(data).decode()
    text = text if padded else text.rstrip("=")
    text = "\r\n".join(text[at : at + width] for at in range(0, len(text), width))
    assert payload(f"data:application/octet-stream;base64,{text}", row()) == data


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("data:image/png;base64,????", "bad_base64"),
        ("data:image/png;base64", "bad_base64"),
        ("data:image/png;base64,abcde", "bad_base64"),
        ("https://example.org/a.png", "remote_media"),
        ("HTTP://example.org/a.png", "remote_media"),
        ("s3://bucket/a.png", "remote_media"),
        ("hf://datasets/a/b.png", "remote_media"),
        ("C:\\data\\a.png", "bad_path"),
        ("D:/data/a.png", "bad_path"),
        ("file:///C:/data/a.png", "bad_path"),
        ("\\\\server\\share\\a.png", "bad_path"),
        ("~nobody-of-this-name/a.png", "bad_path"),
        ("a\0.png", "bad_path"),
        ("x" * 300, "bad_path"),
        ("\ud83d.png", "bad_path"),
        ({"bytes": None, "path": None}, "bad_schema"),
        ({"width": 5}, "bad_schema"),
        ({"bytes": [1, 2, 999]}, "bad_schema"),
        (5, "bad_schema"),
        ("", "bad_schema"),
        (True, "bad_schema"),
        ([[1, 2], [3]], "bad_schema"),
        (np.full((3, 30, 30), 9, np.uint8), "bad_schema"),
        (np.full((30, 30, 3), 0.5), "bad_schema"),
        (np.full((30, 30, 3), 999), "bad_schema"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_value(value, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        payload(value, row())
    assert caught.value.reason == reason and "(at set.jsonl[0][0])" in caught.value.detail


def test_paths_of_other_systems(tmp_path) -> None:
    cases = {
        "a/b.png": (tmp_path / "a/b.png", None),
        "a\\b.png": (tmp_path / "a/b.png", "path_of_another_system"),
        ".\\a\\b.png": (tmp_path / "a/b.png", "path_of_another_system"),
        " a.png\n": (tmp_path / "a.png", "blanks_around_path"),
        "/abs/a.png": (Path("/abs/a.png"), None),
        "file:///abs/a.png": (Path("/abs/a.png"), None),
        "file://localhost/abs/a.png": (Path("/abs/a.png"), None),
        "file:/abs/a.png": (Path("/abs/a.png"), None),
        "file:///abs/two%20words%C3%BC.png": (Path("/abs/two wordsü.png"), "percent_encoded_path"),
        "two%20words.png": (tmp_path / "two%20words.png", None),
        "~/a.png": (Path.home() / "a.png", "path_of_another_system"),
    }
    for text, (expected, change) in cases.items():
        context = row(tmp_path)
        assert Path(payload(text, context)) == expected, text
        assert [code for code, _ in context.changes] == ([change] if change else []), text


def test_a_file_of_exactly_that_name_wins(tmp_path) -> None:
    for name in ("a\\b.png", " c.png", "~d.png", "[1].png", "C:\\e.png"):
        (tmp_path / name).write_bytes(PNG)
        context = row(tmp_path)
        (value,) = media_list(name, "image", context)
        assert payload(value, context) == str(tmp_path / name) and not context.changes
    (tmp_path / "f%20g.png").write_bytes(PNG)
    assert payload(f"file://{tmp_path}/f%20g.png", row()) == str(tmp_path / "f%20g.png")


def test_columns_of_images() -> None:
    for value in (["a.png", "b.png"], json.dumps(["a.png", "b.png"]), "['a.png', 'b.png']", ("a.png", "b.png")):
        assert media_list(value, "images", row()) == ["a.png", "b.png"]
    for value in (None, "", [], float("nan"), "[]"):
        assert media_list(value, "images", row()) == []
    (one,) = media_list(json.dumps({"bytes": TEXT}), "image", row())
    assert payload(one, row()) == PNG
    pixels = np.arange(30 * 28 * 3, dtype=np.uint8).reshape(30, 28, 3)
    for value in (pixels, pixels.tolist(), pixels.astype(np.int64)):
        (one,) = media_list(value, "image", row())
        context = row()
        assert np.array_equal(np.asarray(payload(one, context)), pixels)
        assert context.changes[0][0] == "array_of_pixels"
    grey = Image.new("L", (4, 3), 7)
    assert payload(grey, row()) is grey and payload(np.asarray(grey), row()).tobytes() == grey.tobytes()


def test_columns_that_hold_images_are_recognised() -> None:
    for value in (
        "a/B.JPG",
        PNG,
        {"bytes": PNG},
        ["a.png"],
        {"path": "a.webp"},
        f"data:image/png;base64,{TEXT}",
        "v.mp4",
    ):
        assert looks_like_media(value)
    for value in ("a text", 5, None, [], {}, b"text", ["words"], {"bytes": None}):
        assert not looks_like_media(value)


def test_a_path_leaves_the_folder_of_the_data_only_if_an_option_allows_it(tmp_path: Path) -> None:
    data = tmp_path / "set"
    images = tmp_path / "images"
    for folder in (data / "a", images, tmp_path / "secret"):
        folder.mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(folder / "x.png")
    (data / "inside").symlink_to(data / "a")
    (data / "link.png").symlink_to(tmp_path / "secret" / "x.png")
    (data / "folder").symlink_to(tmp_path / "secret")
    within = ["a/x.png", "./a/../a/x.png", "inside/x.png", str(data / "a" / "x.png")]
    relative = [
        "../secret/x.png",
        "link.png",
        "folder/x.png",
        "a/../../secret/x.png",
        "../set2/x.png",
        "..\\secret\\x.png",
    ]
    absolute = [str(tmp_path / "secret" / "x.png"), (tmp_path / "secret" / "x.png").as_uri(), "~/x.png", "/etc/passwd"]
    rows = [{"question": "<image>?", "answer": "a", "image": path} for path in within + relative + absolute]
    rows.append({"question": "<video>?", "answer": "a", "video": [["a/x.png", "../secret/x.png"]]})
    rows.append({"question": "<img>../secret/x.png</img>?", "answer": "a"})
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def refused(**options: Any) -> list[int]:
        source = open_source(data / "rows.jsonl", **options)
        found = list(source.samples(0))
        bad = [k for k, one in enumerate(found) if isinstance(one, SampleError)]
        assert {found[k].reason for k in bad} <= {"outside_path"}
        return bad

    first = len(within)
    last = first + len(relative) + len(absolute)
    only_relative = [*range(first, first + len(relative)), last, last + 1]
    assert refused() == only_relative
    assert refused(outside_paths="never") == list(range(first, last + 2))
    assert refused(outside_paths="always") == []
    with pytest.raises(ValueError, match="outside_paths is True; expected one of"):
        open_source(data / "rows.jsonl", outside_paths=True)  # type: ignore[arg-type]


def test_files_of_a_cached_repository_are_links_to_its_blobs(tmp_path: Path) -> None:
    repository = tmp_path / "datasets--a--b"
    snapshot = repository / "snapshots" / "123"
    for folder in (repository / "blobs", snapshot / "images"):
        folder.mkdir(parents=True)
    (repository / "blobs" / "f00").write_bytes(b"image")
    (snapshot / "images" / "x.png").symlink_to("../../../blobs/f00")
    (snapshot / "rows.jsonl").write_text('{"question": "<image>?", "answer": "a", "image": "images/x.png"}\n')
    for place in (snapshot / "rows.jsonl", snapshot):
        (sample,) = open_source(place, outside_paths="never")
        assert sample.parts("image")[0]["image"].endswith("123/images/x.png")
