"""The shape of a Qwen2.5-VL, read from and written to `config.json`, and the published presets."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvst.model import config_json
from fastvst.model.checkpoint_files import CONFIG, GENERATION, json_text, read_json
from fastvst.model.hub import local_checkpoint

# Counts above these build modules, tables or images until the memory is full; the 72B model is far below.
MOST = {
    "vocab_size": 10_000_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "num_hidden_layers": 1000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "depth": 1000,
    "num_heads": 100_000,
    "out_hidden_size": 1_000_000,
    "in_channels": 100,
    "patch_size": 1000,
    "temporal_patch_size": 100,
    "spatial_merge_size": 100,
    "window_size": 100_000,
    "tokens_per_second": 1_000_000,
}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower (arXiv 2502.13923 §2.1.1); the defaults are the published 3B and 7B tower.

    Attributes:
        out_hidden_size: width of the decoder.
        window_size: side of an attention window in pixels.
        fullatt_block_indexes: blocks that attend over the whole frame.
        tokens_per_second: temporal M-RoPE steps for each second of video.
    """

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: int = 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: channels x frames x pixels (1176 as published)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class ModelConfig:
    """A whole Qwen2.5-VL. Token ids are those of the tokenizer of the weights.

    Attributes:
        mrope_section: how many of the head_dim / 2 rotary frequencies follow (t, h, w).
        eos_token_ids: tokens that end a completion; the first one is `<|im_end|>`.
        pad_token_id: None where config.json has none, as in the published files.
        video_rule: where text resumes after a video, see `fastvst.model.positions.mrope_positions`.
        initializer_range: standard deviation of fresh weights.
        stored: file name -> content of the config.json and generation_config.json that were read. Files that are
            written have their form, and their other fields.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vision: VisionConfig = field(default_factory=VisionConfig)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 128_000
    initializer_range: float = 0.02
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    bos_token_id: int | None = 151643
    pad_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = (151645, 151643)
    video_rule: str = "extent"
    stored: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        v = self.vision
        problems = [
            (self.hidden_size % self.num_attention_heads, "hidden_size must be a multiple of num_attention_heads"),
            (self.num_attention_heads % self.num_key_value_heads, "attention heads must be a multiple of KV heads"),
            (self.head_dim % 16, "head_dim must be a multiple of 16"),
            (sum(self.mrope_section) * 2 != self.head_dim, "mrope_section must sum to head_dim / 2"),
            (v.hidden_size % v.num_heads, "vision hidden_size must be a multiple of its num_heads"),
            (v.head_dim % 16, "vision head_dim must be a multiple of 16"),
            (v.out_hidden_size != self.hidden_size, "vision out_hidden_size must be the decoder's hidden_size"),
            (v.window_size % (v.patch_size * v.spatial_merge_size), "window_size must be whole merged patches"),
            (any(not 0 <= i < v.depth for i in v.fullatt_block_indexes), "fullatt_block_indexes must be below depth"),
            (self.video_rule not in ("extent", "grid"), "video_rule must be 'extent' or 'grid'"),
        ]
        wrong = [text for failed, text in problems if failed]
        for part in (self, v):
            found = [(f.name, getattr(part, f.name)) for f in dataclasses.fields(part) if f.name in MOST]
            wrong += [f"{n} is {value:,}, expected at most {MOST[n]:,}" for n, value in found if value > MOST[n]]
        if wrong:
            raise ValueError(f"invalid model config: {'; '.join(wrong)}; got {self}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """ "tiny" (2.7 M parameters, for CPU) or a published shape: "3b", "7b", "32b", "72b"."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; expected one of {sorted(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ModelConfig:
        """Read `config.json`: the flat form of transformers 4.x or the nested one (`text_config`) of 5.x.

        A field that the file leaves out has the value that transformers gives it. The EOS tokens come from
        `generation_config.json` if the file exists.

        Args:
            directory: a folder, or a name on the Hub (see `fastvst.model.hub`).

        Raises:
            FileNotFoundError: no such directory or no config.json in it.
            ValueError: another architecture, an unknown rope type or activation, a missing field.
        """
        path = local_checkpoint(directory) / CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; expected the directory of a Qwen2.5-VL checkpoint")
        generation = path.with_name(GENERATION)
        stored = {CONFIG: read_json(path)}
        if generation.is_file():
            stored[GENERATION] = read_json(generation)
        try:
            config = _from_stored(stored)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        outside = [token for token in config.eos_token_ids if token >= config.vocab_size]
        if outside:
            warnings.warn(
                f"{path.parent}: eos_token_id {outside} is outside of the vocabulary of {config.vocab_size} tokens; no "
                "completion ends with it",
                stacklevel=2,
            )
        twice = config_json.contradictions(stored[CONFIG])
        if twice:
            warnings.warn(f"{path}: {'; '.join(twice)}, as in transformers", stacklevel=2)
        return config

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """From the content of config.json; see `from_pretrained`."""
        return _from_stored({CONFIG: data})

    def to_json(self) -> str:
        """config.json: the file that was read with the fields that have changed, else `config_json.fresh`."""
        return json_text(self.config_content())

    def generation_json(self) -> str:
        """generation_config.json, which keeps the settings of the file that was read."""
        if GENERATION not in self.stored:
            return json_text(config_json.fresh_generation(self))
        return json_text(config_json.updated_generation(self.stored[GENERATION], self.changes()[0]))

    def config_content(self) -> dict[str, Any]:
        """The content of `to_json`."""
        if CONFIG not in self.stored:
            return config_json.fresh(self)
        return config_json.updated(self.stored[CONFIG], *self.changes())

    def changes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields of this config and of its tower, with their values, that differ from the files that were read."""
        before = _from_stored(self.stored) if CONFIG in self.stored else self
        return _differences(before, self), _differences(before.vision, self.vision)


def _from_stored(stored: Mapping[str, Any]) -> ModelConfig:
    fields, tower = config_json.parse(stored[CONFIG])
    try:
        eos = config_json.generation_eos(stored.get(GENERATION, {}))
    except ValueError as error:
        raise ValueError(f"{GENERATION}: {error}") from error
    if eos is not None:
        fields["eos_token_ids"] = eos
    return ModelConfig(**fields, vision=VisionConfig(**tower), stored=stored)


def _differences(before: Any, after: Any) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(before) if f.compare and f.name != "vision"]
    return {n: getattr(after, n) for n in names if getattr(after, n) != getattr(before, n)}


def _published(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv: int, tower: int, tied=False):
    vision = VisionConfig(out_hidden_size=hidden, intermediate_size=tower)
    return ModelConfig(vocab, hidden, intermediate, layers, heads, kv, vision, tie_word_embeddings=tied)


def _tiny() -> ModelConfig:
    vocab = 4096
    special = 4096 - 22  # Qwen's 22 special tokens are the last ones, in its order
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        vision=VisionConfig(
            depth=2,
            hidden_size=64,
            intermediate_size=192,
            num_heads=2,
            out_hidden_size=192,
            fullatt_block_indexes=(1,),
        ),
        mrope_section=(4, 6, 6),
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        initializer_range=0.08,  # 1 / sqrt(192); with 0.02, 8,000 samples teach only the form of answers
        image_token_id=special + 12,
        video_token_id=special + 13,
        vision_start_token_id=special + 9,
        vision_end_token_id=special + 10,
        bos_token_id=special,
        pad_token_id=special,
        eos_token_ids=(special + 2, special),
    )


# Shapes: config.json of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct.
PRESETS = {
    "tiny": _tiny(),
    "3b": _published(151936, 2048, 11008, 36, 16, 2, 3420, tied=True),
    "7b": _published(152064, 3584, 18944, 28, 28, 4, 3420),
    "32b": _published(152064, 5120, 27648, 64, 40, 8, 3456),
    "72b": _published(152064, 8192, 29568, 80, 64, 8, 3456),
}
