"""Positions of tokens and patches: M-RoPE for the decoder, windows and 2-D positions for the vision tower.

All of it is integer arithmetic on grids. The loader's workers compute it on the CPU, so that the device never waits for
the host. It depends neither on token ids nor on pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TEXT = 0
IMAGE = 1
VIDEO = 2


def mrope_positions(
    modality: np.ndarray,
    grids: Sequence[Sequence[int]],
    *,
    merge_size: int = 2,
    tokens_per_second: float = 2,
    second_per_grid_ts: Sequence[float] | None = None,
    video_rule: str = "extent",
) -> np.ndarray:
    """(t, h, w) position of every token of one sequence (Qwen2.5-VL, arXiv 2502.13923 §2.1.3).

    A text token adds 1 on all three axes. The tokens of an image or video have their own (t, h, w) coordinates plus the
    position at its start. Frame t of a video has the coordinate `floor(t * second_per_grid * tokens_per_second)`.

    Args:
        modality: (L,) TEXT, IMAGE or VIDEO of every token; a grid has `t*h*w / merge_size**2` of the non-text tokens.
        grids: (I, 3) patch grids (t, h, w) in reading order, images and videos together.
        second_per_grid_ts: seconds between temporal grid steps, one for each *video*; default 1.0, which is exact for
            2 frames per second.
        video_rule: "extent": second_per_grid_ts is used as it is, and text resumes after the largest coordinate of the
            video, as in the training of the published weights (transformers 4.49 to 5.2, vLLM). "grid": text resumes
            after max(h, w) / merge_size and second_per_grid_ts is truncated to whole seconds, as in transformers >=
            5.3; then text overlaps a long video, and above 2 frames per second all frames have one time. The rules
            agree on images.

    Returns:
        (3, L) int32.

    Raises:
        ValueError: the vision tokens of `modality` are not those of the grids.
    """
    if video_rule not in ("extent", "grid"):
        raise ValueError(f"video_rule is {video_rule!r}; expected 'extent' or 'grid'")
    modality = np.asarray(modality)
    length = len(modality)
    out = np.empty((3, length), dtype=np.int32)
    seconds = iter(second_per_grid_ts) if second_per_grid_ts is not None else None
    is_text = modality == TEXT
    at = 0
    start = 0
    used = 0
    for t, h, w in grids:
        vision = np.flatnonzero(~is_text[at:])
        if len(vision) == 0:
            break
        text = int(vision[0])
        out[:, at : at + text] = np.arange(start, start + text, dtype=np.int32)
        at += text
        start += text
        rows = h // merge_size
        columns = w // merge_size
        count = t * rows * columns
        video = modality[at] == VIDEO
        if at + count > length or (modality[at : at + count] != modality[at]).any():
            break
        step = float(next(seconds)) if (video and seconds is not None) else 1.0
        if video_rule == "grid":
            step = int(step)
        times = np.arange(t)
        if video:  # in float32 and in this order, as published: 3 * 1.4 * 25 is 105 there and 104.99... in float64
            times = (times.astype(np.float32) * np.float32(step) * np.float32(tokens_per_second)).astype(np.int32)
        shape = (t, rows, columns)
        out[0, at : at + count] = start + np.broadcast_to(times[:, None, None], shape).reshape(-1)
        out[1, at : at + count] = start + np.broadcast_to(np.arange(rows)[None, :, None], shape).reshape(-1)
        out[2, at : at + count] = start + np.broadcast_to(np.arange(columns)[None, None, :], shape).reshape(-1)
        extent = max(rows, columns)
        if video_rule == "extent" or not video:
            extent = max(extent, int(times[-1]) + 1)
        at += count
        start += extent
        used += 1
    if used != len(grids) or not is_text[at:].all():
        expected = [int(t * (h // merge_size) * (w // merge_size)) for t, h, w in grids]
        raise ValueError(
            f"the sequence has {int((~is_text).sum())} vision tokens, but its {len(grids)} grids need {expected} "
            "in that order; the number of image tokens and images must match"
        )
    out[:, at:] = np.arange(start, start + length - at, dtype=np.int32)
    return out


def window_side(merge_size: int, window_size: int, patch_size: int) -> int:
    """Side of a window in merged tokens. Raises ValueError for a window smaller than one."""
    side = window_size // merge_size // patch_size
    if side < 1:
        raise ValueError(f"window_size {window_size} is smaller than one merged patch of {merge_size * patch_size} px")
    return side


@functools.lru_cache(maxsize=4096)  # images of one data set have few sizes, and a planner counts the FLOPs of every row
def frame_windows(height: int, width: int, merge_size: int, side: int) -> tuple[int, ...]:
    """Patches in every window of a frame of height x width patches, row by row.

    Args:
        side: see `window_side`.
    """
    rows = height // merge_size
    columns = width // merge_size
    heights = [min(side, rows - at) for at in range(0, rows, side)]
    widths = [min(side, columns - at) for at in range(0, columns, side)]
    return tuple(a * b * merge_size**2 for a in heights for b in widths)


@dataclass(frozen=True)
class VisionLayout:
    """The order in which the vision tower computes the patches of one sample.

    A *unit* is one merged token: merge_size x merge_size patches, which are adjacent in memory.

    Attributes:
        window_order: (N,) int64; position j of the tower's order holds unit `window_order[j]` of the reading order.
        window_lengths: (W,) int32; patches in each attention window, in tower order; sums to P.
        image_lengths: (F,) int32; patches in each frame (an image is one frame, a video `t` of them); sums to P.
        positions: (P, 2) int32; (row, column) of each patch in its frame, in tower order.
    """

    window_order: np.ndarray
    window_lengths: np.ndarray
    image_lengths: np.ndarray
    positions: np.ndarray


def vision_layout(
    grids: Sequence[Sequence[int]], *, merge_size: int = 2, window_size: int = 112, patch_size: int = 14
) -> VisionLayout:
    """Window order of images and videos with the patch grids `grids` (I, 3).

    Windows are squares of `window_size` pixels (8 x 8 patches as published), starting at the top left corner of every
    frame; those at the right and lower edge are smaller. No window spans two frames, so the order permutes patches
    inside frames only, and frame boundaries stay valid for the full-attention layers.
    """
    side = window_side(merge_size, window_size, patch_size)
    orders: list[np.ndarray] = []
    lengths: list[int] = []
    frames: list[int] = []
    positions: list[np.ndarray] = []
    base = 0
    for t, h, w in grids:
        rows = h // merge_size
        columns = w // merge_size
        row, column = (a.reshape(-1) for a in np.indices((rows, columns)))
        window = (row // side) * -(-columns // side) + column // side
        order = np.argsort(window, kind="stable")  # raster order inside a window
        counts = frame_windows(h, w, merge_size, side)
        dy, dx = (a.reshape(-1) for a in np.indices((merge_size, merge_size)))
        patch_row = (row[order, None] * merge_size + dy).reshape(-1)
        patch_column = (column[order, None] * merge_size + dx).reshape(-1)
        frame_positions = np.stack([patch_row, patch_column], axis=1).astype(np.int32)
        for _ in range(t):
            orders.append(order + base)
            base += rows * columns
            lengths.extend(counts)
            frames.append(h * w)
            positions.append(frame_positions)
    if not orders:
        empty = np.zeros((0,), dtype=np.int32)
        return VisionLayout(np.zeros((0,), np.int64), empty, empty, np.zeros((0, 2), np.int32))
    return VisionLayout(
        np.concatenate(orders).astype(np.int64),
        np.asarray(lengths, dtype=np.int32),
        np.asarray(frames, dtype=np.int32),
        np.concatenate(positions),
    )
