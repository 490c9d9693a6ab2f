"""The KV cache: pages of keys and values for all layers, and the sharing of pages between prompts.

A page counts its users and is free when it has none. Prompts with a common prefix (questions about the same images)
share the pages of that prefix. The first prompt computes them and the later ones start behind them, in the same packed
row if need be: a layer writes its keys and values before any of its attention runs. Only whole pages are shared, so no
prompt writes into a page that another one reads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastvst.batch import EncodedSample
from fastvst.model import ModelConfig
from fastvst.rollout.request import PromptState, RolloutError
from fastvst_kernels.shared.cpu import lazy_zeros
from fastvst_kernels.shared.tensors import send

KEY_TOKENS = 16  # text prompts that differ in their first 16 tokens are not compared any further


class OutOfPages(RuntimeError):
    """More pages were requested than are free; the scheduler prevents this."""


class PagePool:
    """Pages of `page_size` tokens with counted users.

    Attributes:
        keys, values: (layers, pages, page_size, KV heads, head_dim). Page 0 is never allocated: the padding of page
            tables points at it. All bytes start as zero, so that masked reads never meet a NaN.
        peak: the largest number of pages in use at the same time so far.
    """

    def __init__(
        self, config: ModelConfig, pages: int, page_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, pages + 1, page_size, config.num_key_value_heads, config.head_dim)
        self.keys = lazy_zeros(shape, dtype, device)
        self.values = lazy_zeros(shape, dtype, device)
        self.page_size = page_size
        self.pages = pages
        self.peak = 0
        self._highest = 0  # pages above it have never been written
        self._users = [0] * (pages + 1)
        self._free = list(range(pages, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.pages - len(self._free)

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def needed(self, tokens: int) -> int:
        """Number of pages that hold that many tokens."""
        return -(-tokens // self.page_size)

    def slots(self, pages: Sequence[int] | np.ndarray, begin: int, end: int) -> np.ndarray:
        """(end - begin,) int64: where tokens begin..end of a list of pages are in `keys[layer].flatten(0, 1)`."""
        token = np.arange(begin, end)
        return np.asarray(pages, dtype=np.int64)[token // self.page_size] * self.page_size + token % self.page_size

    def allocate(self, count: int) -> list[int]:
        """Take that many free pages, with one user each. Raises OutOfPages."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages requested, {len(self._free)} of {self.pages} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        self.peak = max(self.peak, self.used)
        self._highest = max(self._highest, *taken, 0)
        return taken

    def retain(self, pages: Sequence[int]) -> None:
        """Add one user to each of the pages."""
        for page in pages:
            if not self._users[page]:
                raise OutOfPages(f"page {page} is free and cannot be shared")
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Remove one user from each of the pages; a page without users is free again."""
        for page in pages:
            if not self._users[page]:
                raise OutOfPages(f"page {page} is released more often than it was taken")
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)

    def save(self, pages: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies of the pages' keys and values on the host, each (layers, count, page_size, KV heads, head_dim)."""
        index = torch.tensor(pages, device=self.keys.device)
        return self.keys.index_select(1, index).cpu(), self.values.index_select(1, index).cpu()

    def restore(self, saved: tuple[Tensor, Tensor], pages: Sequence[int]) -> None:
        """Write saved keys and values into other pages, with the same bits."""
        index = torch.tensor(pages, device=self.keys.device)
        self.keys.index_copy_(1, index, saved[0].to(self.keys.device))
        self.values.index_copy_(1, index, saved[1].to(self.values.device))

    def wipe(self, pages: Sequence[int], begin: int) -> None:
        """Zero what a list of pages has from token `begin` on, and page 0."""
        slots = np.concatenate([self.slots(pages, begin, len(pages) * self.page_size), np.arange(self.page_size)])
        index = send(torch.from_numpy(slots), self.keys.device)
        for cache in (self.keys, self.values):
            cache.flatten(1, 2).index_fill_(1, index, 0)

    def clear(self) -> None:
        """Zero all bytes. After an error pages may hold NaN, which a mask does not hide."""
        self.keys[:, : self._highest + 1] = 0
        self.values[:, : self._highest + 1] = 0


def make_pool(
    config: ModelConfig, memory: int | float, page_size: int, *, dtype: torch.dtype, device: torch.device
) -> PagePool:
    """As many pages as fit a memory budget (see `memory_bytes`). Raises RolloutError if not even one fits."""
    size = page_bytes(config, page_size, dtype)
    budget = memory_bytes(memory, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the pages need two whole pieces of memory
    if budget < 2 * size:  # page 0 comes on top
        raise RolloutError(f"rollout memory is {budget} bytes; one page of {page_size} tokens is {size}")
    return PagePool(config, budget // size - 1, page_size, dtype=dtype, device=device)


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page: keys and values of all layers."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * page_size * width * dtype.itemsize


def memory_bytes(memory: int | float, device: torch.device) -> int:
    """A memory budget in bytes, given as bytes (an int) or as a share of the device's free memory (a float up to 1)."""
    if isinstance(memory, float):
        if not 0 < memory <= 1:
            raise ValueError(
                f"memory is {memory}; expected bytes as an int, or a share of free memory above 0, up to 1"
            )
        if device.type == "cuda":
            # What torch has freed and keeps for itself is free too; `empty_cache` gives it back before the pages come.
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + cached
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(memory * free)
    if memory < 1:
        raise ValueError(f"memory is {memory} bytes; expected a positive number")
    return memory


def prefix_key(sample: EncodedSample, vision_key: bytes | None) -> tuple | None:
    """Equal for prompts that may have a common prefix; None if the images were not compared with those of others."""
    if not len(sample.grid):
        return ("text", sample.tokens[:KEY_TOKENS].numpy().tobytes())
    return None if vision_key is None else ("images", vision_key)


class ResidentPrompts:
    """The prompts that have pages.

    Attributes:
        shared_tokens: prompt tokens that were found in the pages of another prompt so far.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.shared_tokens = 0
        self._prompts: list[PromptState] = []
        self._incomplete: list[PromptState] = []

    def incomplete(self) -> list[PromptState]:
        """Those that are not completely computed, in the order in which they got their pages."""
        self._incomplete = [p for p in self._incomplete if not p.ready]
        return self._incomplete

    def find_donor(self, prompt: PromptState) -> tuple[PromptState | None, int]:
        """The first prompt that can share pages with `prompt`, and how many; (None, 0) if there is none.

        A donor has active completions, so that it keeps its pages, and it computes (or has computed) these pages
        itself. The last token of `prompt` is never shared: the first token of its completions is drawn from its hidden
        state.
        """
        if prompt.prefix_key is None or prompt.computed:
            return None, 0
        for other in self._prompts:
            if other.prefix_key == prompt.prefix_key and other.active and (other.donor is None or other.ready):
                tokens = min(_common_tokens(prompt.sample, other.sample), prompt.length - 1)
                if tokens >= self.pool.page_size:
                    return other, tokens // self.pool.page_size
        return None, 0

    def load(self, prompt: PromptState, donor: PromptState | None, shared: int) -> None:
        """Give a prompt its pages, the first `shared` of them from `donor`; restore them if it was swapped out."""
        pool = self.pool
        if donor is not None:
            pool.retain(donor.pages[:shared])
            prompt.pages = donor.pages[:shared]
            prompt.donor = donor
            prompt.shared = shared * pool.page_size
            prompt.computed = prompt.shared
            self.shared_tokens += prompt.shared
        prompt.pages = prompt.pages + pool.allocate(pool.needed(prompt.length) - shared)
        self._prompts.append(prompt)
        if prompt.saved is not None:
            pool.restore(prompt.saved, prompt.pages)
            prompt.saved = None
        if not prompt.ready:
            self._incomplete.append(prompt)

    def drop(self, prompt: PromptState) -> None:
        """Take the pages of a prompt away, if it has any. Prompts that share them compute what it has not computed."""
        if not prompt.pages:
            return
        self.pool.release(prompt.pages)
        prompt.pages = []
        self._prompts.remove(prompt)
        if prompt in self._incomplete:
            self._incomplete.remove(prompt)
        for other in self._prompts:
            if other.donor is prompt:
                if prompt.computed < other.shared:
                    other.computed = prompt.computed
                other.donor = None
                other.shared = 0

    def make_room(self, pages: int, keep: PromptState | None = None) -> bool:
        """Swap out prompts without active completions, newest first, until that many pages are free."""
        if self.pool.free >= pages:
            return True
        for prompt in sorted(self._prompts, key=lambda p: -p.order):
            if prompt.active or prompt is keep or not prompt.pages:
                continue
            if prompt.computed:
                prompt.saved = self.pool.save(prompt.pages)
            self.drop(prompt)
            if self.pool.free >= pages:
                return True
        return False


def _common_tokens(a: EncodedSample, b: EncodedSample) -> int:
    """Length of the common prefix of two samples with equal images: tokens and positions must agree."""
    length = min(len(a), len(b))
    differ = (a.tokens[:length] != b.tokens[:length]).numpy()
    differ |= (a.positions[:, :length] != b.positions[:, :length]).any(0).numpy()
    return int(np.argmax(differ)) if differ.any() else length
