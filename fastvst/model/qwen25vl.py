"""Qwen2.5-VL on packed rows: `hidden = model(batch)`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastvst.batch import PackedBatch
from fastvst.model import refusals, weights
from fastvst.model.config import ModelConfig
from fastvst.model.decoder import Decoder
from fastvst.model.hub import local_checkpoint
from fastvst.model.layers import Attend
from fastvst.model.published import zero_padding
from fastvst.model.recompute import Recompute, of_tower
from fastvst.model.tiny_start import start_from_tower
from fastvst.model.vision import VisionTower
from fastvst_kernels import linear_cross_entropy, packed_attention, prepare

Head = Callable[[Tensor, Tensor], Any]
TINY_TOWER = Path(__file__).with_name("tiny_tower.safetensors")
TINY_BASE = Path(__file__).with_name("tiny_base.safetensors")
Start = Literal["random", "aligned", "base"]


class Qwen25VL(nn.Module):
    """The model (arXiv 2502.13923).

    `state_dict()` and files have the published names and shapes: `visual.*`, `model.*`, `lm_head.weight`. A parameter
    may hold several published tensors, see `fastvst.model.published`.

    All inputs are packed rows: there is no padding, no batch dimension and no attention mask. Sequence boundaries come
    from `cu_seqlens`, never from position ids. Fresh weights follow the distribution that transformers uses.

    Attributes:
        recompute: what the backward pass computes again: a policy of `fastvst.model.recompute`, for both towers or by
            tower.
        vision_on_every_rank: a pack without images runs the tower on a dummy image of 4 black patches, times 0, so that
            every rank takes part in the collectives of the tower's sharded parameters.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute: Recompute = "none"
        self.vision_on_every_rank = False
        self.init_weights()

    @classmethod
    def fresh(cls, preset: str, *, start: Start = "random") -> Qwen25VL:
        """A preset with random weights from torch's generator.

        The vision tower of "tiny" is pretrained (by `tools.build_tower`): a tower this small learns too slowly from
        question-answer pairs alone. `Qwen25VL(config)` draws every weight.

        Args:
            start: of the decoder of "tiny"; nothing changes for other presets. "aligned": words and two layers know the
                tower's tokens, see `tiny_start`. "base": the weights of `tools.build_base` with their own tower, which
                have seen images and language; nothing is random.
        """
        model = cls(ModelConfig.preset(preset))
        if preset == "tiny":
            load_start(model, start)
        return model

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, initializer_range) weights, zero biases, norms of one (transformers' `_init_weights`)."""
        spread = self.config.initializer_range
        zero_padding(self)
        for name, tensor in self.state_dict().items():  # views of the parameters
            if tensor.dim() == 1:
                tensor.fill_(0.0 if name.endswith("bias") else 1.0)
            else:  # drawn as one matrix: the numbers must not depend on padding
                tensor.copy_(torch.empty_like(tensor, memory_format=torch.contiguous_format).normal_(0.0, spread))

    def forward(
        self, batch: PackedBatch, head: Head | None = None, *, vision: Tensor | None = None, images_only: bool = False
    ) -> Any:
        """Final hidden states of a packed row, or the result of `head`.

        Args:
            batch: on the model's device.
            head: called as `head(hidden (T, hidden_size), weight (V, hidden_size))` inside this forward pass, where
                sharded parameters are gathered. Losses run here.
            vision: (N, hidden_size) merged vision tokens in tower order from an earlier call with a frozen tower; the
                tower does not run then.
            images_only: return `encode_images(batch)` and do nothing else. It is an option of `forward` because
                sharded parameters are gathered by hooks of `forward`.

        Returns:
            (T, hidden_size), or the result of `head`.
        """
        if images_only:
            return self.encode_images(batch)
        policy = of_tower(self.recompute, "decoder")
        hidden = self.model(self.embed(batch, vision), batch.positions, attend_packed(batch), recompute=policy)
        return hidden if head is None else head(hidden, self.head_weight)

    def logits(self, batch: PackedBatch) -> Tensor:
        """(T, vocab_size) logits, for tests and debugging: training never holds them all."""
        return self(batch, head=nn.functional.linear)

    def loss(self, batch: PackedBatch) -> Tensor:
        """() float32: cross entropy of the supervised tokens, the mean weighted by `batch.target_weights`.

        The logits are never held all at once. A training run that spreads a step over packs and ranks divides by the
        weight of all of them instead (`token_mean` in examples/sft.py).

        Raises:
            ValueError: no token of the batch is supervised.
        """
        if not batch.num_targets:
            raise ValueError(f"no token of {', '.join(batch.sample_ids)} is supervised; expected an assistant message")
        shares = batch.target_weights / batch.target_weights.sum()

        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            return linear_cross_entropy(hidden[batch.loss_rows], weight, batch.targets, row_weights=shares)

        return self(batch, head=head)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.embed_tokens.weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """(V, hidden_size) weight of the LM head, tied or not."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def encode_images(self, batch: PackedBatch) -> Tensor:
        """(N, hidden_size): the merged vision tokens of all images and videos, in tower order."""
        if not batch.num_patches:
            some = self._dummy_image(batch.device) if self.vision_on_every_rank else self.model.norm.weight[None]
            return some[:0]
        return self.visual(
            batch.pixel_values(),
            batch.vision_positions,
            batch.cu_windows,
            batch.cu_images,
            max_window=batch.max_window,
            max_image=batch.max_image,
            image_plan=batch.image_plan,
            recompute=of_tower(self.recompute, "vision"),
        )

    def embed(self, batch: PackedBatch, vision: Tensor | None = None) -> Tensor:
        """(T, hidden_size): token embeddings, with the merged vision tokens (`vision` if given) in their rows."""
        x = self.model.embed_tokens(batch.tokens)
        if batch.num_patches or vision is not None:
            vision = self.encode_images(batch) if vision is None else vision
            return x.index_copy(0, batch.vision_slots, vision.to(x.dtype))
        return x + 0.0 * self._dummy_image(x.device).sum() if self.vision_on_every_rank else x

    def _dummy_image(self, device: torch.device) -> Tensor:
        """(1, hidden_size): the merged token of one black image."""
        side = self.config.vision.spatial_merge_size
        count = side * side
        patches = torch.zeros(count, self.config.vision.patch_values, device=device)
        positions = torch.cartesian_prod(*[torch.arange(side, dtype=torch.int32, device=device)] * 2).view(count, 2)
        offsets = torch.arange(2, dtype=torch.int32, device=device) * count
        return self.visual(
            patches,
            positions,
            offsets,
            offsets,
            max_window=count,
            max_image=count,
            recompute=of_tower(self.recompute, "vision"),
        )

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Qwen25VL:
        """Load a Qwen2.5-VL directory: published or transformers 5.x tensor names, one file or many.

        The model is built without memory, then filled tensor by tensor: the host holds the model and at most the
        memory pages of one file.

        Args:
            directory: a folder, or a name on the Hub (see `fastvst.model.hub`).

        Raises:
            FileNotFoundError: no such directory, config or weights.
            ValueError: a LoRA adapter, a quantised checkpoint or another architecture.
            fastvst.model.weights.WeightsError: missing, unexpected, wrong-shaped, truncated or NaN tensors.
        """
        directory = local_checkpoint(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is not a directory; expected a Qwen2.5-VL model directory")
        refusals.check(directory)
        config = ModelConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = cls(config)
        weights.load(model, directory, tied=config.tie_word_embeddings, dtype=dtype, device=torch.device(device))
        return model

    def save_pretrained(
        self, directory: str | Path, processor: Any = None, *, max_shard_bytes: int = 5_000_000_000
    ) -> None:
        """Write a directory that transformers opens with no missing and no unexpected keys.

        Only the model's own files are replaced; every other file of the directory stays. The files are first written
        under a temporary name: after an error the directory is what it was before.

        Args:
            processor: its `save_pretrained(directory)` adds tokenizer, image processor and chat template.
            max_shard_bytes: largest size of one safetensors file.
        """
        state = self.state_dict()
        weights.save(Path(directory), self.config, state, processor=processor, max_shard_bytes=max_shard_bytes)


def load_start(model: Qwen25VL, start: Start) -> None:
    """The shipped weights of a tiny model, see `Qwen25VL.fresh`."""
    if start == "base":
        model.load_state_dict(load_file(TINY_BASE))
        return
    stored = load_file(TINY_TOWER)
    tower = {n.removeprefix("visual."): w for n, w in stored.items() if n.startswith("visual.")}
    model.visual.load_state_dict(tower)
    if start == "aligned":
        start_from_tower(model.model, model.config, stored)


def attend_packed(batch: PackedBatch) -> Attend:
    """Causal attention inside the sequences of a pack, with shared prompts."""
    plan = batch.plan
    if plan is None and batch.device.type == "cuda":  # once for all layers
        plan = prepare(batch.cu_seqlens, batch.groups, causal=True, num_tokens=batch.num_tokens)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(
            q, k, v, batch.cu_seqlens, causal=True, groups=batch.groups, max_seqlen=batch.max_seqlen, plan=plan
        )

    return attend
