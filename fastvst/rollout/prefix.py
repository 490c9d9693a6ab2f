"""Prompts that begin alike share the pages of what they have in common: questions about the same pictures.

The first prompt computes the pages; the later ones begin behind them, in the same packed row if need be: keys and
values of a layer are written before any of its attention runs. Whole pages only, so that nobody writes into a page of
others.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fastvst.batch import EncodedSample
from fastvst.rollout.request import Prompt

FIRST = 16  # texts that differ in these tokens are not compared any further


def prefix_key(sample: EncodedSample, vision_key: bytes | None) -> tuple | None:
    """Equal for prompts that may begin alike; None where the pictures were not compared with others'."""
    if len(sample.grid) and vision_key is None:
        return None
    return ("pictures", vision_key) if vision_key is not None else ("text", sample.tokens[:FIRST].numpy().tobytes())


def find_donor(prompt: Prompt, resident: Iterable[Prompt], page_size: int) -> tuple[Prompt | None, int]:
    """The first prompt whose pages may serve `prompt`, and how many of them; (None, 0) where there is none.

    A donor has answers under way, so that it keeps its pages, and computes them itself or has computed them. The last
    token of `prompt` is never shared: its hidden state draws the first token of the answers.
    """
    if prompt.prefix_key is None or prompt.computed:
        return None, 0
    for other in resident:
        if other.prefix_key == prompt.prefix_key and other.active and (other.donor is None or other.ready):
            pages = min(_common_tokens(prompt.sample, other.sample), prompt.length - 1) // page_size
            if pages:
                return other, pages
    return None, 0


def _common_tokens(a: EncodedSample, b: EncodedSample) -> int:
    """How many tokens two samples with equal pictures have in common, their positions included."""
    length = min(len(a), len(b))
    differ = (a.tokens[:length] != b.tokens[:length]).numpy()
    differ |= (a.positions[:, :length] != b.positions[:, :length]).any(0).numpy()
    return int(np.argmax(differ)) if differ.any() else length


def forsake(donor: Prompt, resident: Iterable[Prompt]) -> None:
    """`donor` leaves: whoever counted on pages that it has not computed computes them (they hold these pages, too)."""
    for prompt in resident:
        if prompt.donor is donor:
            if donor.computed < prompt.shared:
                prompt.computed = donor.computed
            prompt.donor = None
            prompt.shared = 0
