"""The shape of a Qwen2.5-VL, read from and written to `config.json`, and the published presets."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WRITTEN_FOR = "5.17.0"  # the transformers version whose form of config.json `to_json` writes


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
        video_rule: where text resumes after a video, see `fastvst.model.positions.mrope_positions`.
        initializer_range: standard deviation of fresh weights.
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
    bos_token_id: int = 151643
    pad_token_id: int = 151643
    eos_token_ids: tuple[int, ...] = (151645, 151643)
    video_rule: str = "extent"

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

        The EOS tokens come from `generation_config.json` if the file exists.

        Raises:
            FileNotFoundError: no such directory or no config.json in it.
            ValueError: another architecture, an unknown rope type or activation, a missing field.
        """
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; expected the directory of a Qwen2.5-VL checkpoint")
        generation = path.with_name("generation_config.json")
        try:
            config = cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
            path = generation
            eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}: {error}") from error
        return dataclasses.replace(config, eos_token_ids=_ids(eos)) if eos is not None else config

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """From the content of config.json; see `from_pretrained`."""
        if data.get("model_type") != "qwen2_5_vl":
            raise ValueError(f"model_type is {data.get('model_type')!r}; expected 'qwen2_5_vl'")
        text = {**data, **data["text_config"]} if "text_config" in data else data
        vision = dict(data.get("vision_config") or {})
        for name, tower in (("text", text), ("vision", vision)):
            if tower.get("hidden_act", "silu") != "silu":
                raise ValueError(f"{name} hidden_act is {tower['hidden_act']!r}; only 'silu' is known")
        if text.get("use_sliding_window"):
            raise ValueError("use_sliding_window is true; sliding windows in the decoder are not supported")
        if "in_chans" in vision:
            vision["in_channels"] = vision["in_chans"]
        known = {f.name for f in dataclasses.fields(VisionConfig)}
        vision = {k: tuple(v) if isinstance(v, list) else v for k, v in vision.items() if k in known}
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [n for n in names if n not in text]
        if missing:
            raise ValueError(f"the fields {missing} are missing")
        optional = {
            n: text[n]
            for n in ("rms_norm_eps", "max_position_embeddings", "initializer_range", "bos_token_id", "pad_token_id")
            if text.get(n) is not None
        }
        ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        optional |= {n: data[n] for n in ids if n in data}
        eos = text.get("eos_token_id")
        if eos is not None:
            optional["eos_token_ids"] = _ids(eos)
        theta, section = _rope(text)
        tied = data.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
        return cls(
            **{n: text[n] for n in names},
            num_key_value_heads=text.get("num_key_value_heads") or text["num_attention_heads"],
            vision=VisionConfig(**vision),
            rope_theta=theta,
            mrope_section=section,
            tie_word_embeddings=tied,
            video_rule=data.get("fastvst_video_rule") or _video_rule(str(data.get("transformers_version", "4"))),
            **optional,
        )

    def to_json(self) -> str:
        """config.json in the nested form of transformers 5.x, which transformers 4.5x opens too."""
        vision = dataclasses.asdict(self.vision) | {"fullatt_block_indexes": list(self.vision.fullatt_block_indexes)}
        vision |= {"model_type": "qwen2_5_vl_vision", "hidden_act": "silu", "in_chans": self.vision.in_channels}
        vision |= {"initializer_range": self.initializer_range}
        rope = {"rope_type": "default", "type": "mrope", "mrope_section": list(self.mrope_section)}
        names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        names += ["num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "initializer_range"]
        names += ["bos_token_id", "pad_token_id", "tie_word_embeddings"]
        text = {n: getattr(self, n) for n in names} | {
            "model_type": "qwen2_5_vl_text",
            "hidden_act": "silu",
            "use_sliding_window": False,
            "eos_token_id": self.eos_token_ids[0],
            "rope_theta": self.rope_theta,
            "rope_scaling": rope,
            "rope_parameters": rope | {"rope_theta": self.rope_theta},
        }
        ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        data = {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            **{n: getattr(self, n) for n in ids},
            "tie_word_embeddings": self.tie_word_embeddings,
            "fastvst_video_rule": self.video_rule,
            "transformers_version": WRITTEN_FOR,
            "text_config": text,
            "vision_config": vision,
        }
        return json.dumps(data, indent=2) + "\n"

    def generation_json(self) -> str:
        """generation_config.json: greedy by default, ends at any of `eos_token_ids`."""
        data = {
            "bos_token_id": self.bos_token_id,
            "pad_token_id": self.pad_token_id,
            "eos_token_id": list(self.eos_token_ids),
            "do_sample": False,
            "transformers_version": WRITTEN_FOR,
        }
        return json.dumps(data, indent=2) + "\n"


def _ids(eos: int | list[int]) -> tuple[int, ...]:
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _rope(text: dict[str, Any]) -> tuple[float, tuple[int, int, int]]:
    """(theta, mrope_section) from `rope_parameters` (5.x) or `rope_scaling` and `rope_theta` (4.x)."""
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    if not rope or "mrope_section" not in rope:
        raise ValueError(f"rope_scaling / rope_parameters is {rope!r}; expected a dict with 'mrope_section'")
    kinds = {rope.get("rope_type"), rope.get("type")} - {None}
    if not kinds <= {"default", "mrope"}:
        raise ValueError(f"rope type {sorted(kinds)} is not known; expected 'mrope' (or 'default' with mrope_section)")
    return float(rope.get("rope_theta") or text.get("rope_theta", 1_000_000.0)), tuple(rope["mrope_section"])


def _video_rule(version: str) -> str:
    """Files of transformers >= 5.3 were trained with its positions ("grid"), the published ones with "extent"."""
    numbers = [int(p) if p.isdigit() else 0 for p in version.split(".")[:2]]
    return "grid" if numbers >= [5, 3] else "extent"


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
