"""The files of image and video processors, read as the pinned transformers reads them, and written back."""

import ast
import copy
import importlib.util
import json
import warnings
from pathlib import Path

import pytest

from fastvst.data import Processor
from fastvst.data.processor_files import DEFAULTS, PIXEL_STEPS, VIDEO_DEFAULTS
from fastvst.model import ModelConfig

# The classes need torchvision, which fastvst does not: their source is read, not imported.
MODELS = Path(importlib.util.find_spec("transformers").origin).parent / "models" / "qwen2_vl"


def their_class(kind: str) -> ast.ClassDef:
    tree = ast.parse((MODELS / f"{kind}_processing_qwen2_vl.py").read_text())
    name = {"image": "Qwen2VLImageProcessor", "video": "Qwen2VLVideoProcessor"}[kind]
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def class_attributes(kind: str) -> dict:
    """The attributes of a class: values of constant expressions, and the text of names."""
    found = {}
    for node in [node for node in their_class(kind).body if isinstance(node, ast.Assign)]:
        text = ast.unparse(node.value)
        try:
            found[node.targets[0].id] = eval(text, {"__builtins__": {}})
        except NameError:
            found[node.targets[0].id] = text
    return found


class Base:
    def __init__(self, **kwargs):
        vars(self).update(kwargs)


def their_processor(kind: str, fields: dict):
    """An instance that went through transformers' own __init__, without its base class."""
    definition = their_class(kind)
    simple = [
        node
        for node in definition.body
        if isinstance(node, ast.Assign) and node.targets[0].id in class_attributes(kind)
    ]
    numbers = [node for node in simple if not isinstance(class_attributes(kind)[node.targets[0].id], str)]
    init = next(node for node in definition.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    init.args.kwarg.annotation = None
    definition.body = [*numbers, init]
    definition.bases = [ast.Name("Base", ast.Load())]
    definition.decorator_list = []
    space = {"Base": Base}
    exec(compile(ast.fix_missing_locations(ast.Module([definition], [])), "transformers", "exec"), space)
    return space[definition.name](**copy.deepcopy(fields))


@pytest.fixture
def folder(tmp_path) -> Path:
    Processor.preset("tiny").save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(ModelConfig.preset("tiny").to_json())
    for name in ("video_preprocessor_config.json", "fastvst_processor.json"):
        (tmp_path / "m" / name).unlink()
    return tmp_path / "m"


def test_absent_fields_mean_what_transformers_means():
    """Every default, so that a new version of transformers that moves one is noticed."""
    image = class_attributes("image")
    video = class_attributes("video")
    assert image["size"] == {"shortest_edge": DEFAULTS["min_pixels"], "longest_edge": DEFAULTS["max_pixels"]}
    assert video["size"] == {
        k: VIDEO_DEFAULTS[n] for k, n in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))
    }
    assert (video["min_frames"], video["max_frames"]) == (VIDEO_DEFAULTS["min_frames"], VIDEO_DEFAULTS["max_frames"])
    for found in (image, video):
        assert (found["image_mean"], found["image_std"]) == ("OPENAI_CLIP_MEAN", "OPENAI_CLIP_STD")
        assert found["resample"] == "PILImageResampling.BICUBIC"
        assert [found[name] for name in ("patch_size", "temporal_patch_size", "merge_size")] == [14, 2, 2]
        for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            assert found[name] is PIXEL_STEPS[name] is True
    assert video["do_sample_frames"] is False and "fps" not in video


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"size": {"shortest_edge": 784, "longest_edge": 78400}},
        {"min_pixels": 1568, "max_pixels": 15680},
        {"min_pixels": 1568, "max_pixels": 15680, "size": {"shortest_edge": 784, "longest_edge": 78400}},
        {"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 784, "longest_edge": 78400}},
        {"min_frames": 8, "max_frames": 16, "fps": 4},
        {"fps": None, "num_frames": None, "do_sample_frames": True},
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_limits_of_videos_are_those_of_transformers(folder, tmp_path, fields, nested):
    image = json.loads((folder / "preprocessor_config.json").read_text())
    if nested:
        whole = {"image_processor": image, "video_processor": fields}
        (folder / "processor_config.json").write_text(json.dumps(whole))
    else:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(fields))
    theirs = their_processor("video", fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = Processor.from_pretrained(folder)
    config = processor.config
    size = theirs.size
    assert (config.video_min_pixels, config.video_max_pixels) == (size["shortest_edge"], size["longest_edge"])
    assert (config.min_frames, config.max_frames) == (theirs.min_frames, theirs.max_frames)
    assert config.fps == (getattr(theirs, "fps", None) or 2.0)
    processor.save_pretrained(tmp_path / "same")
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        if (folder / name).is_file():
            assert json.loads((tmp_path / "same" / name).read_text()) == json.loads((folder / name).read_text())
    Processor.from_pretrained(folder, video_max_pixels=200_704, max_frames=32).save_pretrained(tmp_path / "other")
    again = Processor.from_pretrained(tmp_path / "other", model_config=ModelConfig.preset("tiny")).config
    assert (again.video_max_pixels, again.max_frames, again.min_frames) == (200_704, 32, config.min_frames)
    name = "processor_config.json" if nested else "video_preprocessor_config.json"
    written = json.loads((tmp_path / "other" / name).read_text())
    changed = their_processor("video", written["video_processor"] if nested else written)
    assert (changed.size["longest_edge"], changed.max_frames) == (200_704, 32)


def test_limits_of_transformers_4_52(folder):
    config = json.loads((folder / "config.json").read_text()) | {"transformers_version": "4.52.4"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "video_preprocessor_config.json").write_text("{}")
    found = Processor.from_pretrained(folder).config
    assert (found.video_min_pixels, found.video_max_pixels) == (56 * 56, 1280 * 784)  # its Qwen2VLVideoProcessor


def test_a_number_of_frames_in_place_of_a_rate(folder):
    (folder / "video_preprocessor_config.json").write_text('{"num_frames": 12, "do_sample_frames": true}')
    found = Processor.from_pretrained(folder).config
    assert (found.min_frames, found.max_frames) == (12, 12)


def test_a_fresh_processor_is_the_same_in_transformers(tmp_path):
    Processor.preset("tiny", video_max_pixels=200_704, fps=4.0).save_pretrained(tmp_path / "m")
    theirs = their_processor("video", json.loads((tmp_path / "m" / "video_preprocessor_config.json").read_text()))
    assert theirs.size == {"shortest_edge": 100_352, "longest_edge": 200_704} and theirs.fps == 4.0


@pytest.mark.parametrize(
    "first, second, words",
    [
        ("processor_config.json", "video_preprocessor_config.json", "video limits of processor_config.json are used"),
        ("video_preprocessor_config.json", "fastvst_processor.json", "has other values of video_max_pixels"),
    ],
)
def test_of_two_truths_about_videos_the_loser_is_named(folder, first, second, words):
    image = json.loads((folder / "preprocessor_config.json").read_text())
    size = {"size": {"shortest_edge": 100_352, "longest_edge": 200_704}}
    nested = {"image_processor": image, "video_processor": size}
    (folder / first).write_text(json.dumps(nested if first == "processor_config.json" else size))
    (folder / second).write_text("{}" if "video" in second else '{"video_max_pixels": 300000}')
    with pytest.warns(UserWarning, match=words) as said:
        assert Processor.from_pretrained(folder).config.video_max_pixels == 200_704
    assert len(said) == 1


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"patch_size": 16}, "patch_size = 16, config.json says 14"),
        ({"do_rescale": False}, "do_rescale = False"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "normalises videos with"),
    ],
)
def test_videos_that_are_processed_otherwise_are_refused(folder, fields, words):
    (folder / "video_preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"video_preprocessor_config.json.*{words}"):
        Processor.from_pretrained(folder)


def test_nothing_of_a_folder_runs(folder, tmp_path):
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("processing_own.py", "tokenization_own.py", "__init__.py"):
        (folder / name).write_text(code)
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        own = {"auto_map": {"AutoProcessor": "processing_own.Own", "AutoTokenizer": ["tokenization_own.Own", None]}}
        fields = json.loads((folder / name).read_text()) | own | {"trust_remote_code": True}
        (folder / name).write_text(json.dumps(fields))
    Processor.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert not marker.exists()
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["trust_remote_code"] is True


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "chat_template.json",
        "chat_template.jinja",
    ],
)
def test_huge_files_are_refused_before_they_are_read(folder, name):
    with open(folder / name, "wb") as file:
        file.truncate(2**40)  # sparse: nothing is on the disk
    with pytest.raises(ValueError, match=f"{name} has 1,099,511,627,776 bytes"):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json", "chat_template.jinja"])
def test_pointers_of_git_lfs_are_named(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize("content", ["[" * 1_000_000, '{"a": ' * 200_000, "{,}", "[1]"])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json"]
)
def test_deep_and_damaged_files_are_named(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        Processor.from_pretrained(folder)


@pytest.mark.parametrize("decoder", [[1], {"x": {"content": "a"}}, {"4096": 7}, {"4096": {"text": "a"}}])
def test_added_tokens_that_cannot_be_read_are_named(folder, decoder):
    fields = json.loads((folder / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="tokenizer_config.json( gives the token|: the added tokens cannot be read)"):
        Processor.from_pretrained(folder)
