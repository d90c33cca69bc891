"""States that version 0.1.0 saved on one device, carried over on the host.

An upgrader moves vectors, bases, windows and what there is for each Gram matrix, as a
mover does. Nothing is rounded.
"""

from typing import Any

import jax
import numpy as np

from efcp_jax.passes.entries import SparseRow


class SparseUpgrader:
    """Moves entries saved by version 0.1.0: `(blocks, m, k)`, and no empty blocks."""

    def __init__(self, new: Any) -> None:
        self.new = new

    def _padded(self, array: Any) -> np.ndarray:
        array = np.asarray(array)
        missing = self.new.blocks.count - len(array)
        return np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)])

    def vector(self, vector: Any) -> np.ndarray:
        """Return a vector of today's blocks."""
        return self._padded(vector)

    def basis(self, basis: Any) -> Any:
        """Return what is carried between steps, which is nothing."""
        return basis

    def rows(self, rows: Any) -> Any:
        """Return a window of today's shape; a dictionary counts as a pair of arrays."""
        if isinstance(rows, dict):
            rows = SparseRow(rows["values"], rows["offsets"])
        put = lambda leaf: self.new.passes.from_blocks(self._padded(leaf))
        return jax.tree.map(put, rows)

    def grams(self, grams: Any) -> Any:
        """Return what there is one of for all parameters."""
        return grams


class FactorUpgrader:
    """Moves factors saved by version 0.1.0: trees that mirror the parameters.

    Of every leaf they hold an error `(rows, cols)`, a basis `(cols, r)`, factors
    `(rows, m, r)` and `(cols, m, r)`, and a Gram matrix where the compressor is block
    diagonal. A leaf kept whole was the matrix `(1, n)` with factors of one column,
    `[[1]]` and itself.
    """

    def __init__(self, new: Any) -> None:
        self.new = new

    def _batches(self, tree: Any, member: Any, thin: bool = False) -> dict[str, Any]:
        """Return `member(leaf)` of the leaves of each group, stacked."""
        leaves = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
        count = len(self.new.layout.leaves)
        each = len(leaves) // count  # arrays a leaf; None counts as one
        parts = [leaves[i * each : (i + 1) * each] for i in range(count)]
        stacked = {}
        for group in self.new.groups:
            if not (thin and group.matrix.whole):
                made = [member(parts[i]) for i in group.indices]
                stacked[group.name] = None if made[0] is None else np.stack(made)
        return stacked

    def vector(self, tree: Any) -> dict[str, Any]:
        """Return a vector in batches."""
        made = self._batches(tree, lambda leaf: np.asarray(leaf[0]))
        for group in self.new.groups:
            if group.matrix.whole:
                made[group.name] = made[group.name][:, 0]
        return made

    def basis(self, tree: Any) -> dict[str, Any]:
        """Return what is carried between steps, in batches."""
        return self._batches(tree, lambda leaf: np.asarray(leaf[0]).T, thin=True)

    def rows(self, rows: Any) -> Any:
        """Return a window in batches; a dictionary counts as a pair of trees."""
        left, right = rows.values() if isinstance(rows, dict) else rows

        def factor(leaf: Any) -> np.ndarray:
            moved = np.moveaxis(np.asarray(leaf[0]), 0, -1)  # (m, r, n)
            return moved.reshape(-1, moved.shape[-1])

        kind = type(self.new.zeros()[1])
        return kind(
            self._batches(left, factor, thin=True), self._batches(right, factor)
        )

    def grams(self, grams: Any) -> Any:
        """Return what there is for each Gram matrix, in batches if block diagonal."""
        if not self.new.block_diagonal:
            return grams
        return self._batches(
            grams, lambda leaf: None if leaf[0] is None else np.asarray(leaf[0])
        )
