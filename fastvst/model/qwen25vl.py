"""Qwen2.5-VL on packed rows: `hidden = model(batch)`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastvst.model import weights
from fastvst.model.config import ModelConfig
from fastvst.model.decoder import Decoder
from fastvst.model.layers import Attend, Norm
from fastvst.model.vision import PatchKernel, VisionTower
from fastvst_kernels import packed_attention

if TYPE_CHECKING:
    from fastvst.batch import PackedBatch

Head = Callable[[Tensor, Tensor], Any]
TINY_TOWER = Path(__file__).with_name("tiny_tower.safetensors")


class Qwen25VL(nn.Module):
    """The model (arXiv 2502.13923). Parameter names are the published ones: `visual.*`, `model.*`, `lm_head.weight`.

    It knows packed rows only: no padding, no batch dimension, no attention mask. Sequence boundaries come from
    `cu_seqlens`, never from position ids. Fresh weights are drawn as transformers draws them.

    Attributes:
        recompute: "none", "light" or "full"; what backward computes again (see `fastvst.model.layers`).
        vision_on_every_rank: a pack without pictures runs the tower on 4 black patches times 0, so that the
            collectives of sharded parameters happen on every rank.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute = "none"
        self.vision_on_every_rank = False
        self.init_weights()

    @classmethod
    def fresh(cls, preset: str) -> Qwen25VL:
        """A preset with weights drawn from torch's generator.

        The vision tower of "tiny" comes trained, for too small a tower learns to see far too slowly from questions and
        answers alone; `tools.build_tower` made it, and says on what. `Qwen25VL(config)` draws all.
        """
        model = cls(ModelConfig.preset(preset))
        if preset == "tiny":
            stored = load_file(TINY_TOWER)
            tower = {n.removeprefix("visual."): w for n, w in stored.items() if n.startswith("visual.")}
            model.visual.load_state_dict(tower)
        return model

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, initializer_range) weights, zero biases, norms of one (transformers' `_init_weights`)."""
        for module in self.modules():
            if isinstance(module, Norm):
                module.weight.fill_(1.0)
            elif isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.initializer_range)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, PatchKernel):
                module.weight.normal_(0.0, self.config.initializer_range)

    def forward(
        self, batch: PackedBatch, head: Head | None = None, *, vision: Tensor | None = None, see_only: bool = False
    ) -> Any:
        """Final hidden states of a packed row, or what `head` makes of them.

        Args:
            batch: on the model's device.
            head: called as `head(hidden (T, hidden_size), weight (V, hidden_size))` inside this forward, where sharded
                parameters are whole; this is how losses run.
            vision: (N, hidden_size) merged vision tokens in tower order from an earlier call, when the tower is frozen;
                the tower does not run then.
            see_only: return the (N, hidden_size) merged vision tokens and nothing else.

        Returns:
            (T, hidden_size), or head's result.
        """
        if see_only:
            return self.see(batch)
        hidden = self.model(self.embed(batch, vision), batch.positions, attend_packed(batch), recompute=self.recompute)
        return hidden if head is None else head(hidden, self.head_weight)

    def logits(self, batch: PackedBatch) -> Tensor:
        """(T, vocab_size) logits, for tests and debugging: training never holds them all."""
        return self(batch, head=nn.functional.linear)

    @property
    def head_weight(self) -> Tensor:
        """(V, hidden_size) weight of the output layer, tied or not."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def see(self, batch: PackedBatch) -> Tensor:
        """(N, hidden_size): the pictures' merged tokens, in tower order."""
        if not batch.num_patches:
            seen = self._black_picture(batch.device) if self.vision_on_every_rank else self.model.norm.weight[None]
            return seen[:0]
        return self.visual(
            batch.patches,
            batch.vision_positions,
            batch.cu_windows,
            batch.cu_images,
            max_window=batch.max_window,
            max_image=batch.max_image,
            recompute=self.recompute,
        )

    def embed(self, batch: PackedBatch, vision: Tensor | None = None) -> Tensor:
        """(T, hidden_size): token embeddings with the pictures' merged tokens (`vision` if given) in their rows."""
        x = self.model.embed_tokens(batch.tokens)
        if batch.num_patches or vision is not None:
            vision = self.see(batch) if vision is None else vision
            return x.index_copy(0, batch.vision_slots, vision.to(x.dtype))
        return x + 0.0 * self._black_picture(x.device).sum() if self.vision_on_every_rank else x

    def _black_picture(self, device: torch.device) -> Tensor:
        side = self.config.vision.spatial_merge_size
        count = side * side
        patches = torch.zeros(count, self.config.vision.patch_values, device=device)
        positions = torch.cartesian_prod(*[torch.arange(side, dtype=torch.int32, device=device)] * 2).view(count, 2)
        offsets = torch.arange(2, dtype=torch.int32, device=device) * count
        return self.visual(
            patches, positions, offsets, offsets, max_window=count, max_image=count, recompute=self.recompute
        )

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Qwen25VL:
        """Load a Qwen2.5-VL directory: published or transformers 5.x tensor names, one file or many.

        Tensors are read one after another onto a model without memory of its own, so that the host holds at most one
        file's pages above the model.

        Raises:
            FileNotFoundError: no such directory, config or weights.
            fastvst.model.weights.WeightsError: missing, unexpected, wrong-shaped or truncated tensors, all named.
        """
        return weights.load(cls, Path(directory), dtype, torch.device(device))

    def save_pretrained(
        self, directory: str | Path, processor: Any = None, *, max_shard_bytes: int = 5_000_000_000
    ) -> None:
        """Write a directory that transformers opens with no missing and no unexpected keys.

        Args:
            processor: its `save_pretrained(directory)` adds tokenizer, image processor and chat template.

        The directory is written beside and renamed into place: on an error the old one is intact.
        """
        state = self.state_dict()
        weights.save(Path(directory), self.config, state, processor=processor, max_shard_bytes=max_shard_bytes)


def attend_packed(batch: PackedBatch) -> Attend:
    """Causal attention inside the sequences of a pack, with shared prompts."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(
            q, k, v, batch.cu_seqlens, causal=True, groups=batch.groups, max_seqlen=batch.max_seqlen
        )

    return attend
