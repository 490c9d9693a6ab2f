"""A small classification tree: the rules that the blind battery tries."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

CUTS = 12  # thresholds tried for each feature: quantiles of its values


@dataclass
class Tree:
    """A CART tree on numeric features; `least` rows in a leaf.

    `fit` takes features (N, F) and classes (N,) in [0, K); `shares` gives the classes' shares (N, K) in the leaves.
    """

    depth: int = 3
    least: int = 15
    share: np.ndarray = field(default_factory=lambda: np.zeros(0))
    split: tuple[int, float] | None = None
    below: Tree | None = None
    above: Tree | None = None

    def fit(self, x: np.ndarray, y: np.ndarray, classes: int) -> Tree:
        counts = np.bincount(y, minlength=classes).astype(float)
        self.share = (counts + 1e-3) / (counts + 1e-3).sum()
        if self.depth == 0 or len(y) < 2 * self.least:
            return self
        target = np.eye(classes)[y]
        best = _gini(counts)
        for k in range(x.shape[1]):
            for cut in np.unique(np.quantile(x[:, k], np.linspace(0, 1, CUTS + 2)[1:-1])):
                low = x[:, k] <= cut
                size = int(low.sum())
                if min(size, len(y) - size) < self.least:
                    continue
                left = target[low].sum(0)
                impurity = _gini(left) + _gini(counts - left)
                if impurity < best - 1e-9:
                    best = impurity
                    self.split = (k, float(cut))
        if self.split is not None:
            low = x[:, self.split[0]] <= self.split[1]
            self.below = Tree(self.depth - 1, self.least).fit(x[low], y[low], classes)
            self.above = Tree(self.depth - 1, self.least).fit(x[~low], y[~low], classes)
        return self

    def shares(self, x: np.ndarray) -> np.ndarray:
        if self.split is None or self.below is None or self.above is None:
            return np.tile(self.share, (len(x), 1))
        low = x[:, self.split[0]] <= self.split[1]
        result = np.empty((len(x), len(self.share)))
        result[low] = self.below.shares(x[low])
        result[~low] = self.above.shares(x[~low])
        return result


def _gini(counts: np.ndarray) -> float:
    """Gini impurity times the number of rows."""
    total = counts.sum()
    return float(total - (counts**2).sum() / total) if total else 0.0
