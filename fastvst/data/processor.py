"""Processor: Sample -> EncodedSample, and what a sample costs without decoding its pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from fastvst.batch import IGNORE, Cost, EncodedSample
from fastvst.data.chat import check_literals, render, system_prompt
from fastvst.data.images import (
    MediaError,
    PatchGeometry,
    image_size,
    load_rgb,
    patchify,
    resize_planar,
    target_size,
)
from fastvst.data.ledger import SampleError
from fastvst.data.processor_config import ProcessorConfig, make_config, read_preprocessor, write_files
from fastvst.data.sample import Message, Part, Sample
from fastvst.data.tokenizer import load_tokenizer, tiny_tokenizer
from fastvst.data.video import (
    BUDGET_SLACK,
    VideoPlan,
    explicit_size,
    load_frames,
    plan_video,
    total_pixel_budget,
)
from fastvst.model.config import ModelConfig
from fastvst.model.flops import sample_flops
from fastvst.model.positions import IMAGE, TEXT, VIDEO, mrope_positions, vision_layout


@dataclass(frozen=True)
class _Picture:
    """One picture or video that is going to be encoded: where it comes from, its size, its patch grid (t, h, w)."""

    part: Part
    size: tuple[int, int]
    grid: tuple[int, int, int]
    video: VideoPlan | None


@dataclass(frozen=True)
class _Plan:
    """A sample as tokens and picture sizes; no pixel has been decoded."""

    tokens: np.ndarray
    labels: np.ndarray
    pictures: list[_Picture]
    cost: Cost
    notes: tuple[str, ...]


class Processor:
    """Tokenizer, chat template and picture rules of one model directory.

    Attributes:
        tokenizer: the `tokenizers.Tokenizer`.
        config: the ProcessorConfig.
        model_config: the ModelConfig that gives patch geometry, positions and FLOPs.
    """

    def __init__(self, tokenizer: Tokenizer, model_config: ModelConfig, config: ProcessorConfig | None = None) -> None:
        """Raises ValueError if the model's token ids are not those of the tokenizer."""
        self.tokenizer = tokenizer
        self.model_config = model_config
        self.config = config or ProcessorConfig()
        vision = model_config.vision
        self.geometry = PatchGeometry(
            vision.patch_size,
            vision.temporal_patch_size,
            vision.spatial_merge_size,
            self.config.image_mean,
            self.config.image_std,
        )
        self._ids: dict[str, int] = {}
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(index for index, token in added.items() if token.special)
        names = sorted((token.content for token in added.values() if token.special), key=len, reverse=True)
        self._literals = re.compile("|".join(re.escape(name) for name in names))
        for name, expected in (
            ("<|image_pad|>", model_config.image_token_id),
            ("<|video_pad|>", model_config.video_token_id),
            ("<|vision_start|>", model_config.vision_start_token_id),
            ("<|vision_end|>", model_config.vision_end_token_id),
        ):
            if self.token_id(name) != expected:
                raise ValueError(
                    f"the tokenizer has {name} at id {self.token_id(name)}, the model's config.json at {expected}; "
                    "the two files belong to different models"
                )
        if tokenizer.get_vocab_size() > model_config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model only {model_config.vocab_size}"
            )

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, model_config: ModelConfig | None = None, **options: Any
    ) -> Processor:
        """Read `tokenizer.json`, `preprocessor_config.json` and `config.json` of a model directory.

        Args:
            model_config: instead of the directory's `config.json`.
            options: fields of ProcessorConfig; they win over what the directory says.

        Raises:
            FileNotFoundError: a missing directory or file, named, with what to do.
            ValueError: an unknown option (with the nearest valid name), or files that contradict each other.
        """
        directory = Path(directory)
        tokenizer = load_tokenizer(directory)
        if model_config is None:
            if not (directory / "config.json").is_file():
                raise FileNotFoundError(
                    f"{directory} has no config.json; copy it from the checkpoint, or pass model_config=..."
                )
            model_config = ModelConfig.from_pretrained(directory)
        return cls(tokenizer, model_config, make_config({**read_preprocessor(directory, model_config), **options}))

    @classmethod
    def preset(cls, name: str = "tiny", *, model_config: ModelConfig | None = None, **options: Any) -> Processor:
        """The processor of the tiny preset, without any directory.

        Args:
            name: "tiny"; the published presets need their published tokenizer, so they have no processor here.
            model_config, options: as `from_pretrained`.
        """
        if name != "tiny":
            raise ValueError(f"no processor preset {name!r}; only 'tiny'. Use Processor.from_pretrained(directory)")
        return cls(tiny_tokenizer(), model_config or ModelConfig.preset("tiny"), make_config(options))

    def token_id(self, name: str) -> int:
        """Id of a token by its name, e.g. "<|im_end|>". Raises ValueError if the tokenizer has no such token."""
        if name not in self._ids:
            found = self.tokenizer.token_to_id(name)
            if found is None:
                raise ValueError(f"the tokenizer has no token {name!r}")
            self._ids[name] = found
        return self._ids[name]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; special tokens (`<|im_end|>`, pads, ...) are left out unless told otherwise."""
        return self.tokenizer.decode([int(i) for i in token_ids], skip_special_tokens=skip_special)

    def measure(self, sample: Sample, *, add_generation_prompt: bool = False) -> Cost:
        """The cost of `encode(sample)`, from its text and its pictures' headers. Raises SampleError as `encode`."""
        try:
            return self._plan(sample, add_generation_prompt).cost
        except MediaError as error:
            raise SampleError(error.reason, sample.source, sample.id, error.detail) from error

    def encode(self, sample: Sample, *, add_generation_prompt: bool = False) -> EncodedSample:
        r"""Tokens, labels, positions and patches of one sample.

        Args:
            add_generation_prompt: drop the last message if it is the assistant's, and end with
                `<|im_start|>assistant\n` (evaluation, RL).

        Raises:
            SampleError: a sample that cannot be used. Reasons: "too_long", "literal_special_token", "empty_sample",
                "missing_image", "broken_image", "empty_file", "empty_image", "aspect_ratio", "bad_image_type",
                "decompression_bomb", "decode_timeout", "missing_video", "broken_video", "empty_video",
                "bad_video_type", "bad_fps".
        """
        try:
            plan = self._plan(sample, add_generation_prompt)
            patches = self._patches(plan)
        except MediaError as error:
            raise SampleError(error.reason, sample.source, sample.id, error.detail) from error
        vision = self.model_config.vision
        grids = [picture.grid for picture in plan.pictures]
        modality = np.full(len(plan.tokens), TEXT, dtype=np.int8)
        modality[plan.tokens == self.token_id("<|image_pad|>")] = IMAGE
        modality[plan.tokens == self.token_id("<|video_pad|>")] = VIDEO
        positions = mrope_positions(
            modality,
            grids,
            merge_size=vision.spatial_merge_size,
            tokens_per_second=vision.tokens_per_second,
            second_per_grid_ts=[p.video.seconds_per_grid for p in plan.pictures if p.video],
            video_rule=self.model_config.video_rule,
        )
        layout = vision_layout(
            grids,
            merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        return EncodedSample(
            tokens=torch.from_numpy(plan.tokens),
            labels=torch.from_numpy(plan.labels),
            positions=torch.from_numpy(positions),
            patches=torch.from_numpy(patches),
            grid=torch.tensor(grids, dtype=torch.int32).reshape(-1, 3),
            vision_slots=torch.from_numpy(np.flatnonzero(modality != TEXT).astype(np.int32)),
            window_order=torch.from_numpy(layout.window_order.astype(np.int32)),
            window_lengths=torch.from_numpy(layout.window_lengths),
            image_lengths=torch.from_numpy(layout.image_lengths),
            vision_positions=torch.from_numpy(layout.positions),
            cost=plan.cost,
            source=sample.source,
            id=sample.id,
            kind=sample.kind,
            notes=plan.notes,
        )

    def _plan(self, sample: Sample, add_generation_prompt: bool) -> _Plan:
        messages = list(sample.messages)
        if add_generation_prompt and messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise MediaError("empty_sample", "the sample has no messages")
        check_literals(messages, self._literals)
        notes: tuple[str, ...] = ()
        if self.config.enable_fov and sample.kind == "bbox_3d":
            messages, note = unify_fov_messages(messages, self.config.fov_base_width, self.config.max_source_pixels)
            notes = (note,)
        pictures = self._measure_pictures(messages)
        segments = render(
            messages,
            system=system_prompt(sample.kind),
            supervise=self.config.supervise,
            add_generation_prompt=add_generation_prompt,
        )
        merge = self.model_config.vision.spatial_merge_size**2
        used = iter(pictures)
        tokens: list[int] = []
        runs: list[tuple[int, int]] = []  # supervised stretches; never the first token, a system message leads
        for segment in segments:
            if segment.kind == "text":
                ids = self.tokenizer.encode(segment.text, add_special_tokens=False).ids
            elif segment.kind == "special":
                ids = [self.token_id(segment.text)]
            else:
                t, h, w = next(used).grid
                ids = [self.token_id(segment.text)] * (t * h * w // merge)
            if segment.supervised:
                runs.append((len(tokens), len(tokens) + len(ids)))
            tokens += ids
        limit = self.config.max_seq_len
        if len(tokens) > limit:
            vision = sum(t * h * w // merge for t, h, w in (p.grid for p in pictures))
            raise MediaError(
                "too_long",
                f"{len(tokens)} tokens ({vision} of {len(pictures)} pictures) and max_seq_len is {limit}; samples are "
                "never truncated: raise max_seq_len or lower max_pixels",
            )
        array = np.asarray(tokens, dtype=np.int32)
        labels = np.full(len(tokens), IGNORE, dtype=np.int32)
        for start, end in runs:
            labels[start:end] = array[start:end]
        grids = [picture.grid for picture in pictures]
        patches = sum(t * h * w for t, h, w in grids)
        targets = int((labels != IGNORE).sum())
        cost = Cost(len(tokens), patches, float(sample_flops(self.model_config, len(tokens), grids, targets)))
        return _Plan(array, labels, pictures, cost, notes)

    def _measure_pictures(self, messages: list[Message]) -> list[_Picture]:
        """Size and grid of every picture and video in reading order, from headers."""
        config = self.config
        factor = self.geometry.factor
        patch = self.geometry.patch_size
        parts = [part for message in messages for part in message["content"] if part["type"] in ("image", "video")]
        budget = total_pixel_budget(config.max_seq_len, factor)
        images = sum(part["type"] == "image" for part in parts)
        most = config.max_pixels
        if config.share_pixels and images > 1:
            most = min(most, max(budget // images, int(BUDGET_SLACK * config.video_min_pixels)))
        most = max(most, config.min_pixels)
        pictures = []
        for part in parts:
            video = None
            if part["type"] == "image":
                width, height = image_size(part["image"], max_source_pixels=config.max_source_pixels)
                size = target_size(
                    width,
                    height,
                    factor=factor,
                    min_pixels=part.get("min_pixels") or config.min_pixels,
                    max_pixels=part.get("max_pixels") or most,
                    explicit=explicit_size(part),
                )
                steps = 1
            else:
                video = plan_video(
                    part,
                    config.video,
                    total_pixels=budget,
                    factor=factor,
                    max_source_pixels=config.max_source_pixels,
                )
                size = video.size
                steps = len(video.indices) // self.geometry.temporal_patch_size
            pictures.append(_Picture(part, size, (steps, size[1] // patch, size[0] // patch), video))
        return pictures

    def _patches(self, plan: _Plan) -> np.ndarray:
        """Decode, resize, normalise and patchify: (P, 1176) float32, written in place picture by picture."""
        config = self.config
        out = np.empty((plan.cost.patches, self.geometry.patch_dim), dtype=np.float32)
        at = 0
        for picture in plan.pictures:
            t, h, w = picture.grid
            rows = out[at : at + t * h * w]
            at += t * h * w
            if picture.video is None:
                image = load_rgb(
                    picture.part["image"],
                    max_source_pixels=config.max_source_pixels,
                    time_limit=config.image_time_limit,
                )
                frames = [resize_planar(image, picture.size, config.resize)]
            else:
                frames = load_frames(
                    picture.part,
                    picture.video,
                    time_limit=config.video_time_limit,
                    max_source_pixels=config.max_source_pixels,
                    resize=config.resize,
                )
            patchify(frames, self.geometry, rows)
        return out

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files with which transformers' AutoTokenizer and image processors open the directory.

        tokenizer.json, tokenizer_config.json, preprocessor_config.json, chat_template.json and chat_template.jinja, and
        fastvst_processor.json with the options that those have no place for, so that `from_pretrained` gives this
        processor back.
        `config.json` is the model's (`Qwen25VL.save_pretrained`), and `from_pretrained` needs it.
        """
        write_files(Path(directory), self.tokenizer, self.geometry, self.config)


def unify_fov_messages(messages: list[Message], base_width: int, max_source_pixels: int) -> tuple[list[Message], str]:
    """Rewrite a 3D-box sample for the virtual camera: the prompt's camera line and the picture's size (VST §1.6).

    Returns:
        The messages and a note: "fov_unified", or "fov_unchanged:<why>" with the messages as they were.
    """
    # here, so that the data layer does not need the spatial one
    from fastvst.spatial.prompts import to_fov_prompt, to_fov_prompts

    images = [
        (m, p)
        for m, message in enumerate(messages)
        for p, part in enumerate(message["content"])
        if part["type"] == "image"
    ]
    if not images:
        return messages, "fov_unchanged:0_images"
    sizes = [image_size(messages[m]["content"][p]["image"], max_source_pixels=max_source_pixels) for m, p in images]
    changed = [{**message, "content": [dict(part) for part in message["content"]]} for message in messages]
    for message in changed:
        if message["role"] != "user":
            continue
        for part in message["content"]:
            if part["type"] != "text":
                continue
            if len(images) == 1:
                text, size = to_fov_prompt(part["text"], *sizes[0], base_width=base_width)
                new_sizes = [size]
            else:  # one camera line for each image
                text, new_sizes = to_fov_prompts(part["text"], sizes, base_width=base_width)
            if text != part["text"]:
                part["text"] = text
                for (m, p), (width, height) in zip(images, new_sizes, strict=True):
                    picture = changed[m]["content"][p]
                    picture["resized_width"] = width
                    picture["resized_height"] = height
                return changed, "fov_unified"
    if len(images) != 1:
        return messages, f"fov_unchanged:{len(images)}_images"
    return messages, "fov_unchanged:no_camera_line"
