"""fastvst's packed attention inside transformers: `attn_implementation="fastvst"`.

`register` adds an attention function and a mask function. The mask function gives the dense mask of transformers' SDPA.
The attention function reads from it which tokens are padding and where sequences begin, and computes the real tokens as
one packed row. A mask that says more (a sliding window, a prefix, an image block) and a KV cache go through torch's
attention with the same mask, which is logged once. A keyword that neither path uses is refused by name.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastvst_kernels.attention.api import packed_attention
from fastvst_kernels.integrations.packing import Packing, packing_of_mask, packing_of_rows
from fastvst_kernels.shared.backend import log_once

NAME = "fastvst"

# Keywords of the host that do not change what attention computes, each with the reason.
HARMLESS = {
    "position_ids": "the rotary embedding has used them, and the mask function separates packed rows by them",
    "position_embeddings": "the rotary embedding has used them",
    "cache_position": "the mask has the offsets of the cache",
    "past_key_values": "key and value contain the cache already",
    "past_key_value": "key and value contain the cache already",
    "layer_past": "key and value contain the cache already",
    "use_cache": "the host stores keys and values before it calls attention",
    "output_hidden_states": "the host collects them",
    "output_router_logits": "the host collects them",
    "return_dict": "the form of the host's result",
    "logits_to_keep": "used behind the last layer",
    "num_items_in_batch": "used by the loss",
    "deterministic": "a choice between flash-attn's backward kernels; ours are deterministic",
    "layer_idx": "the place of the layer",
    "hidden_act": "an option of the MLP",
    "hidden_dim": "a size",
    "dim": "a size",
    "max_length_k": "the longest sequence of the keys; checked through cu_seq_lens_k",
    "seq_idx": "the numbers of the sequences for state-space layers; position_ids and offsets separate them here",
    "mm_token_type_ids": "used by positions and by the mask function",
    "token_type_ids": "used by embeddings and by the mask function",
    "image_grid_thw": "used by the vision tower",
    "video_grid_thw": "used by the vision tower",
    "return_loss": "used by the loss",
    "labels": "used by the loss",
}


def register() -> None:
    """Make `attn_implementation="fastvst"` known to transformers: the attention function and its mask function."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    groups: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, Hq, T, D), key and value (B, Hkv, S, D) -> (B, T, Hq, D).

    Padding tokens get zeros.

    Args:
        cu_seq_lens_q, cu_seq_lens_k: equal offsets (S + 1,) of the sequences of one packed row.
        groups: (S,) shared prompts, see `packed_attention`; needs cu_seq_lens_q.

    Raises:
        ValueError: dropout, a keyword that is not known here, offsets that do not fit the mask.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    refuse(dropout, others)
    if attention_mask is None and sliding_window is not None and sliding_window < key.shape[2]:
        raise ValueError(f"attn_implementation='fastvst' got a sliding window of {sliding_window} without a mask of it")
    offsets = None if _is_vision(module, causal) else _offsets(query, cu_seq_lens_q, cu_seq_lens_k)
    if groups is not None and cu_seq_lens_q is None:
        raise ValueError("attn_implementation='fastvst' got groups without cu_seq_lens_q, the offsets that they index")
    packing = _packing(query, key, attention_mask, causal)
    if offsets is not None:
        packing = _packed_row(packing, offsets, max_length_q, groups, causal)
    if packing is None:
        return _torch_attention(module, query, key, value, attention_mask, scaling, is_causal)
    batch, heads, tokens, width = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # one row: a view, nothing is copied
    if packing.rows is not None:
        q, k, v = (x.index_select(0, packing.rows) for x in (q, k, v))
    out = packed_attention(
        q,
        k,
        v,
        packing.cu_seqlens,
        causal=packing.causal,
        scale=scaling,
        groups=None if offsets is None else groups,
        max_seqlen=packing.longest,
    )
    if packing.rows is not None:
        out = out.new_zeros(batch * tokens, heads, width).index_copy(0, packing.rows, out)
    return out.view(batch, tokens, heads, width), None


def refuse(dropout: float, others: dict[str, Any]) -> None:
    """Refuse dropout and keywords that change what attention computes.

    Raises:
        ValueError: names each of them.
    """
    found = [f"dropout {dropout}"] if dropout else []
    for name, value in others.items():
        if name not in HARMLESS and value is not None and value is not False:
            found.append(f"{name}={value!r}" if isinstance(value, (bool, int, float, str)) else name)
    if found:
        raise ValueError(
            f"attn_implementation='fastvst' got {', '.join(found)}, which packed attention does not compute; "
            "use 'eager' or 'sdpa' for this model"
        )


def _is_vision(module: nn.Module, causal: bool) -> bool:
    """Whether a call is of a vision tower, which calls for each window or image; the text's offsets do not apply."""
    name = type(getattr(module, "config", module)).__name__ + type(module).__name__
    return not causal and "Vision" in name


def _offsets(query: Tensor, of_queries: Tensor | None, of_keys: Tensor | None) -> Tensor | None:
    """The offsets of a packed row, if the host gives any."""
    if of_queries is None:
        if of_keys is not None:
            raise ValueError("attn_implementation='fastvst' got cu_seq_lens_k without cu_seq_lens_q")
        return None
    if query.shape[0] != 1:
        raise ValueError(f"attn_implementation='fastvst' got cu_seq_lens_q and {query.shape[0]} rows; expected one row")
    if of_keys is not None and of_keys is not of_queries and not torch.equal(of_keys, of_queries):
        raise ValueError("attn_implementation='fastvst' got cu_seq_lens_q and cu_seq_lens_k that differ")
    return of_queries.int()


def _packing(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Packing | None:
    """The packing of a call, or None where torch's attention has to compute it."""
    batch, _, tokens, _ = query.shape
    if key.shape[2] != tokens:
        log_once("attn_implementation='fastvst'", "torch", query.device.type, "keys of a cache or of another sequence")
        return None
    if mask is None:
        return packing_of_rows(batch, tokens, causal, query.device)
    plain = mask.dtype == torch.bool and mask.shape == (batch, 1, tokens, tokens)
    packing = _known(mask) if plain else None
    if packing is None:
        log_once("attn_implementation='fastvst'", "torch", query.device.type, "a mask that is more than packing")
    return packing


_masks: dict[int, tuple[weakref.ref[Tensor], int, Packing | None]] = {}


def _known(mask: Tensor) -> Packing | None:
    """`packing_of_mask`, once for all layers that get the same mask."""
    version = -1 if mask.is_inference() else mask._version
    kept = _masks.get(id(mask))
    if kept is not None and kept[0]() is mask and kept[1] == version and version >= 0:
        return kept[2]
    packing = packing_of_mask(mask)
    for name in [name for name, (reference, *_) in _masks.items() if reference() is None]:
        del _masks[name]
    _masks[id(mask)] = (weakref.ref(mask), version, packing)
    return packing


def _packed_row(
    packing: Packing | None, offsets: Tensor, longest: int | None, groups: Tensor | None, causal: bool
) -> Packing:
    """The packing of the offsets that the host gives; the mask may only repeat it.

    Raises:
        ValueError: the mask says something else.
    """
    if packing is None or packing.rows is not None:
        raise ValueError(
            "attn_implementation='fastvst' got cu_seq_lens_q together with padding, a cache or a mask that is more "
            "than sequences; give one of them"
        )
    whole = len(packing.cu_seqlens) == 2
    if groups is None and not whole and not torch.equal(packing.cu_seqlens, offsets.to(packing.cu_seqlens.device)):
        raise ValueError("attn_implementation='fastvst' got cu_seq_lens_q and position_ids of other sequences")
    return Packing(None, offsets, longest or packing.longest, causal and packing.causal)


def _torch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    is_causal: bool | None,
) -> tuple[Tensor, None]:
    """transformers' own call of torch's attention, with the same mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, mask, scaling=scaling, is_causal=is_causal
    )
    return found
