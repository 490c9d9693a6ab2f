"""Processor: Sample -> EncodedSample, and the cost of a sample without decoding its images."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from fastvst.batch import IGNORE, NORMALISED, Cost, EncodedSample
from fastvst.data import chat_template
from fastvst.data.chat import DEFAULT_SYSTEM, PADS, Segment, check_literals, render, system_prompt
from fastvst.data.fov import unify_fov_messages
from fastvst.data.images import MediaError, PatchGeometry
from fastvst.data.processor_config import ProcessorConfig, make_config
from fastvst.data.processor_files import ProcessorFiles, read_files, write_files
from fastvst.data.refused import refused
from fastvst.data.sample import Message, Sample
from fastvst.data.tokenizer import TextIds, load_tokenizer, tiny_tokenizer
from fastvst.data.too_long import how_to_admit
from fastvst.data.tool_turns import take_apart
from fastvst.data.vision_inputs import VisionInput, load_patches, measure_vision_inputs
from fastvst.model.config import ModelConfig
from fastvst.model.flops import sample_flops
from fastvst.model.hub import local_checkpoint
from fastvst.model.positions import IMAGE, TEXT, VIDEO, mrope_positions, vision_layout
from fastvst.model.vocabulary import rows_for
from fastvst.vla.actions import ActionCodec, add_action_tokens

CHARACTERS_A_TOKEN = 512  # no token is longer (that of Qwen2.5: 128 blanks): a longer text is not even tokenized


@dataclass(frozen=True)
class TokenizedSample:
    """A sample as tokens and image sizes; no pixel has been decoded.

    Attributes:
        tokens, labels: (L,) int32, as in EncodedSample.
        inputs: images and videos in reading order.
        cost: what the packer balances.
        notes: reason codes of the changes that were made.
    """

    tokens: np.ndarray
    labels: np.ndarray
    inputs: list[VisionInput]
    cost: Cost
    notes: tuple[str, ...]


class Processor:
    """Tokenizer, chat template and image rules of one model directory.

    Attributes:
        tokenizer: the `tokenizers.Tokenizer`.
        model_config: the ModelConfig, which determines patch geometry, positions and FLOPs.
        config, geometry: the ProcessorConfig and the PatchGeometry.
        files: the files that it was read from, with the model's own chat template.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_config: ModelConfig,
        config: ProcessorConfig | None = None,
        files: ProcessorFiles | None = None,
    ) -> None:
        """Raises ValueError if tokenizer and model disagree about token ids."""
        self.tokenizer = tokenizer
        self._text_ids = TextIds(tokenizer)
        self.model_config = model_config
        self.config = config or ProcessorConfig()
        self.files = files or ProcessorFiles()
        vision = model_config.vision
        self.geometry = PatchGeometry(
            vision.patch_size,
            vision.temporal_patch_size,
            vision.spatial_merge_size,
            self.config.image_mean,
            self.config.image_std,
        )
        self._stats = NORMALISED  # pixel_stats of what `encode` makes
        self._ids: dict[str, int] = {}
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        self._literals = re.compile("|".join(re.escape(name) for name in sorted(special, key=len, reverse=True)))
        _check_vocabulary(self)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, model_config: ModelConfig | None = None, **options: Any
    ) -> Processor:
        """Read `tokenizer.json`, `preprocessor_config.json` and `config.json` of a model directory.

        Args:
            directory: a folder, or a name on the Hub (see `fastvst.model.hub`).
            model_config: used instead of the directory's `config.json`.
            options: fields of ProcessorConfig; they override those of the directory.

        Raises:
            FileNotFoundError: a missing directory or file, named, with what to do.
            ValueError: an unknown option (the message has the nearest valid name), or files that contradict each other.
        """
        directory = local_checkpoint(directory)
        tokenizer = load_tokenizer(directory)
        if model_config is None:
            if not (directory / "config.json").is_file():
                raise FileNotFoundError(
                    f"{directory} has no config.json; copy it from the checkpoint, or pass model_config=..."
                )
            model_config = ModelConfig.from_pretrained(directory)
        files, found = read_files(directory, model_config, tokenizer)
        return cls(tokenizer, model_config, make_config(found | options), files)

    @classmethod
    def preset(cls, name: str = "tiny", *, model_config: ModelConfig | None = None, **options: Any) -> Processor:
        """The processor of the tiny preset, which needs no directory.

        Args:
            name: "tiny"; the published presets need their published tokenizer and have no processor here.
            model_config, options: as in `from_pretrained`.
        """
        if name != "tiny":
            raise ValueError(f"no processor preset {name!r}; only 'tiny'. Use Processor.from_pretrained(directory)")
        return cls(tiny_tokenizer(), model_config or ModelConfig.preset("tiny"), make_config(options))

    def with_uint8_patches(self) -> Processor:
        """The same processor with uint8 patches and `pixel_stats` from `encode`: the model normalises them (loader)."""
        found = copy.copy(self)
        found._stats = torch.tensor([self.config.image_mean, self.config.image_std], dtype=torch.float32)
        return found

    def token_id(self, name: str) -> int:
        """Id of the token with this name, e.g. "<|im_end|>". Raises ValueError if the tokenizer has no such token."""
        if name not in self._ids:
            found = self.tokenizer.token_to_id(name)
            if found is None:
                raise ValueError(f"the tokenizer has no token {name!r}")
            self._ids[name] = found
        return self._ids[name]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; `skip_special` leaves out special tokens (`<|im_end|>`, pads, ...)."""
        return self.tokenizer.decode([int(i) for i in token_ids], skip_special_tokens=skip_special)

    def measure(self, sample: Sample, *, add_generation_prompt: bool = False) -> Cost:
        """The cost of `encode(sample)`, from its text and its image headers. Raises SampleError as `encode` does."""
        return self.inspect(sample, add_generation_prompt=add_generation_prompt).cost

    def inspect(self, sample: Sample, *, add_generation_prompt: bool = False) -> TokenizedSample:
        """Tokens, image sizes, cost and notes from text and image headers. Raises SampleError as `encode` does."""
        with refused(sample):
            return self._tokenize(sample, add_generation_prompt)

    def encode(self, sample: Sample, *, add_generation_prompt: bool = False) -> EncodedSample:
        r"""Tokens, labels, positions and patches of one sample.

        Args:
            add_generation_prompt: drop the last message if it is the assistant's, and end with
                `<|im_start|>assistant\n` (evaluation, RL).

        Raises:
            SampleError: a sample that cannot be used. Reasons: "too_long", "literal_special_token", "empty_sample",
                "missing_image", "broken_image", "empty_file", "empty_image", "aspect_ratio", "bad_image_type",
                "decompression_bomb", "decode_timeout", "missing_video", "broken_video", "empty_video",
                "bad_video_type", "bad_fps", "bad_field", "chat_template", "unexpected_error" (of a library).
        """
        with refused(sample):
            return self._encode(sample, self._tokenize(sample, add_generation_prompt))

    def _encode(self, sample: Sample, tokenized: TokenizedSample) -> EncodedSample:
        dtype = np.uint8 if len(self._stats) else np.float32
        patches, notes = load_patches(tokenized.inputs, self.config, self.geometry, dtype)
        vision = self.model_config.vision
        tokens = tokenized.tokens
        grids = [one.grid for one in tokenized.inputs]
        modality = np.full(len(tokens), TEXT, dtype=np.int8)
        modality[tokens == self.token_id("<|image_pad|>")] = IMAGE
        modality[tokens == self.token_id("<|video_pad|>")] = VIDEO
        positions = mrope_positions(
            modality,
            grids,
            merge_size=vision.spatial_merge_size,
            tokens_per_second=vision.tokens_per_second,
            second_per_grid_ts=[one.frames.seconds_per_grid for one in tokenized.inputs if one.frames],
            video_rule=self.config.video_rule or self.model_config.video_rule,
        )
        layout = vision_layout(
            grids,
            merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        return EncodedSample(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(tokenized.labels),
            positions=torch.from_numpy(positions),
            patches=torch.from_numpy(patches),
            grid=torch.tensor(grids, dtype=torch.int32).reshape(-1, 3),
            vision_slots=torch.from_numpy(np.flatnonzero(modality != TEXT).astype(np.int32)),
            window_order=torch.from_numpy(layout.window_order.astype(np.int32)),
            window_lengths=torch.from_numpy(layout.window_lengths),
            image_lengths=torch.from_numpy(layout.image_lengths),
            vision_positions=torch.from_numpy(layout.positions),
            cost=tokenized.cost,
            source=sample.source,
            id=sample.id,
            kind=sample.kind,
            notes=tuple(dict.fromkeys(tokenized.notes + notes)),
            source_sizes=tuple(one.source_size for one in tokenized.inputs),
            sizes=tuple(one.size for one in tokenized.inputs),
            pixel_stats=self._stats,
        )

    def _tokenize(self, sample: Sample, add_generation_prompt: bool) -> TokenizedSample:
        """Raises MediaError with the reason codes of `encode`."""
        messages = list(sample.messages)
        if add_generation_prompt and messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise MediaError("empty_sample", "the sample has no messages")
        check_literals(messages, self._literals, sample.metadata.get("special_tokens") or ())
        notes: tuple[str, ...] = ()
        if self.config.enable_fov and sample.kind == "bbox_3d":
            messages, note = unify_fov_messages(
                messages, self.config.fov_base_width, self.config.max_source_pixels, self.config.rules
            )
            notes = (note,)
        inputs = measure_vision_inputs(messages, self.config, self.geometry)
        notes += tuple(note for one in inputs for note in one.notes)
        grids = [one.grid for one in inputs]
        patches = sum(t * h * w for t, h, w in grids)
        merged = patches // self.model_config.vision.spatial_merge_size**2
        if merged > self.config.max_seq_len:  # before a list of so many tokens takes memory
            raise _too_long(self, messages, merged, inputs)
        tokens, labels = _conversation(self, messages, sample, grids, add_generation_prompt)
        if len(tokens) > self.config.max_seq_len:
            raise _too_long(self, messages, len(tokens), inputs)
        flops = sample_flops(self.model_config, len(tokens), grids, int((labels != IGNORE).sum()))
        cost = Cost(len(tokens), patches, float(flops))
        return TokenizedSample(tokens, labels, inputs, cost, tuple(dict.fromkeys(notes)))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files with which transformers' AutoTokenizer and image processors open the directory.

        These are tokenizer.json, tokenizer_config.json, preprocessor_config.json, chat_template.json and
        chat_template.jinja. fastvst_processor.json holds the options that have no place in them, so that
        `from_pretrained` restores this processor. `from_pretrained` also needs the model's `config.json`
        (`Qwen25VL.save_pretrained`).
        """
        write_files(Path(directory), self.tokenizer, self.geometry, self.config, self.files)


def with_action_tokens(processor: Processor, codec: ActionCodec, *, grow: bool = False) -> Processor:
    """The same processor; its tokenizer has the tokens of a codec of robot actions. `save_pretrained` writes them.

    Args:
        grow: where the embedding of the model has no rows for them, `model_config.vocab_size` of the result is larger;
            `fastvst.model.vocabulary.grow_vocabulary` makes the model's rows.

    Raises:
        ValueError: the embedding has no rows for them, and does not grow.
    """
    tokenizer = Tokenizer.from_str(processor.tokenizer.to_str())
    before = tokenizer.get_vocab_size()
    rows = processor.model_config.vocab_size
    if not add_action_tokens(tokenizer, codec, rows_for(before + len(codec.token_names), rows) if grow else rows):
        return processor
    config = dataclasses.replace(processor.model_config, vocab_size=rows_for(tokenizer.get_vocab_size(), rows))
    return Processor(tokenizer, config, processor.config, processor.files)


def _too_long(
    processor: Processor, messages: Sequence[Message], tokens: int, inputs: Sequence[VisionInput]
) -> MediaError:
    config = processor.config
    merge = processor.model_config.vision.spatial_merge_size**2
    merged = sum(t * h * w // merge for t, h, w in (one.grid for one in inputs))
    return MediaError(
        "too_long",
        f"{tokens} tokens ({merged} of {len(inputs)} images) and max_seq_len is {config.max_seq_len}; samples are "
        f"never truncated. {how_to_admit(messages, tokens - merged, config, processor.geometry)}",
    )


def _check_vocabulary(processor: Processor) -> None:
    """Raise ValueError if tokenizer and model disagree about token ids."""
    model = processor.model_config
    for name, expected in (
        ("<|image_pad|>", model.image_token_id),
        ("<|video_pad|>", model.video_token_id),
        ("<|vision_start|>", model.vision_start_token_id),
        ("<|vision_end|>", model.vision_end_token_id),
    ):
        found = processor.token_id(name)
        if found != expected:
            raise ValueError(
                f"the tokenizer has {name} at id {found}, the model's config.json at {expected}; the two files belong "
                "to different models"
            )
    size = processor.tokenizer.get_vocab_size()
    if size > model.vocab_size:
        raise ValueError(f"the tokenizer has {size} tokens, the model only {model.vocab_size}")


def _conversation(
    processor: Processor,
    messages: list[Message],
    sample: Sample,
    grids: Sequence[tuple[int, int, int]],
    add_generation_prompt: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """(L,) int32 tokens and labels, by the stock template or by the model's own."""
    characters = sum(len(p["text"]) for message in messages for p in message["content"] if p["type"] == "text")
    if characters > CHARACTERS_A_TOKEN * processor.config.max_seq_len:
        detail = f"{characters:,} characters cannot be {processor.config.max_seq_len:,} tokens (max_seq_len)"
        raise MediaError("too_long", detail)
    if processor.files.template is not None:
        try:
            return _own_template(processor, messages, sample.kind, grids, add_generation_prompt)
        except ValueError as error:
            raise MediaError("chat_template", str(error)) from error
    segments = render(
        messages,
        system=system_prompt(sample.kind),
        supervise=processor.config.supervise,
        add_generation_prompt=add_generation_prompt,
    )
    return _tokens_and_labels(processor, segments, grids)


def _own_template(
    processor: Processor,
    messages: list[Message],
    kind: str,
    grids: Sequence[tuple[int, int, int]],
    add_generation_prompt: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """(L,) int32 tokens and labels by the model's own chat template; without labels if a completion is to follow."""
    template = processor.files.template
    assert template is not None
    thinking = system_prompt(kind) != DEFAULT_SYSTEM
    messages, tools = take_apart(messages, keep_added=thinking)
    if messages[0]["role"] != "system" and thinking:
        messages = [{"role": "system", "content": [{"type": "text", "text": system_prompt(kind)}]}, *messages]
    merge = processor.model_config.vision.spatial_merge_size**2
    counts = iter([t * h * w // merge for t, h, w in grids])
    pads: dict[int, list[int]] = {processor.token_id(name): [] for name in PADS.values()}
    for part in [part for message in messages for part in message["content"]]:
        if part["type"] in PADS:
            pads[processor.token_id(PADS[part["type"]])].append(next(counts))
    if add_generation_prompt:
        text = template.render(messages, tools=tools, add_generation_prompt=True)
        spans: list[tuple[int, int]] = []
    else:
        text, spans = template.render_supervised(messages, processor.config.supervise, tools)
    vision = {processor.token_id(name) for name in (*PADS.values(), "<|vision_start|>", "<|vision_end|>")}
    return chat_template.tokens_and_labels(processor.tokenizer, text, spans, pads, vision)


def _tokens_and_labels(
    processor: Processor, segments: Sequence[Segment], grids: Sequence[tuple[int, int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """(L,) int32 tokens and labels of the rendered conversation, with one pad for every merged patch of `grids`."""
    merge = processor.model_config.vision.spatial_merge_size**2
    remaining = iter(grids)
    tokens: list[int] = []
    supervised: list[tuple[int, int]] = []  # never the first token: a system message comes first
    for segment in segments:
        if segment.kind == "text":
            ids = processor._text_ids(segment.text)
        elif segment.kind == "special":
            ids = [processor.token_id(segment.text)]
        else:
            t, h, w = next(remaining)
            ids = [processor.token_id(segment.text)] * (t * h * w // merge)
        if segment.supervised:
            supervised.append((len(tokens), len(tokens) + len(ids)))
        tokens += ids
    array = np.asarray(tokens, dtype=np.int32)
    labels = np.full(len(tokens), IGNORE, dtype=np.int32)
    for start, end in supervised:
        labels[start:end] = array[start:end]
    return array, labels
