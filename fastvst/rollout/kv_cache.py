"""The KV cache: pages of keys and values for all layers, counted by how many users each has."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvst.model import ModelConfig
from fastvst_kernels.shared.cpu import lazy_zeros


class OutOfPages(RuntimeError):
    """More pages were asked for than are free; the scheduler prevents it."""


class PagePool:
    """Pages of `page_size` tokens. A page is free when nobody uses it.

    Attributes:
        keys, values: (layers, pages, page_size, KV heads, head_dim). Page 0 belongs to nobody: the padding of tables
            points at it. All bytes are zero at the start, so that masked reads never meet a NaN.
        peak: the most pages ever in use at once.
    """

    def __init__(
        self, config: ModelConfig, pages: int, page_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, pages + 1, page_size, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = (lazy_zeros(shape, dtype, device) for _ in range(2))
        self.page_size = page_size
        self.pages = pages
        self.peak = 0
        self._highest = 0  # no page above it has ever been written
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
        """Pages that hold that many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """That many pages with one user each. Raises OutOfPages."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages asked for, {len(self._free)} of {self.pages} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        self.peak, self._highest = max(self.peak, self.used), max(self._highest, *taken, 0)
        return taken

    def retain(self, pages: Sequence[int]) -> None:
        """One more user for each of the pages."""
        for page in pages:
            if not self._users[page]:
                raise OutOfPages(f"page {page} is free and cannot be shared")
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One user less; pages without users are free again."""
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
        """Write saved keys and values into other pages, bit for bit."""
        index = torch.tensor(pages, device=self.keys.device)
        self.keys.index_copy_(1, index, saved[0].to(self.keys.device))
        self.values.index_copy_(1, index, saved[1].to(self.values.device))

    def clear(self) -> None:
        """Zero all bytes: after an error pages may hold NaN, which a mask does not hide."""
        self.keys[:, : self._highest + 1] = 0
        self.values[:, : self._highest + 1] = 0


def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page: keys and values of all layers."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * page_size * width * dtype.itemsize


def memory_bytes(memory: int | float, device: torch.device) -> int:
    """A budget in bytes from bytes (an int) or a share of the device's free memory (a float up to 1)."""
    if isinstance(memory, float):
        if not 0 < memory <= 1:
            raise ValueError(
                f"memory is {memory}; expected bytes as an int, or a share of free memory above 0, up to 1"
            )
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(memory * free)
    if memory < 1:
        raise ValueError(f"memory is {memory} bytes; expected a positive number")
    return memory
