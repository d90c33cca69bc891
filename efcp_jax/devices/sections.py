"""Arrays laid end to end, read a section at a time.

A loop on a CPU reads each section where its leaf lies: no array as long as the model is
made to lay leaves side by side, or to widen them.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, TypeAlias

import chex
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.devices.layout import Layout


# From the number of a section to its entries.
Read: TypeAlias = Callable[[Any], jax.Array]


class Sections:
    """Arrays laid end to end.

    Args:
        arrays: Of one axis each.
        dtype: In which they are read.
    """

    def __init__(self, arrays: Sequence[jax.Array], dtype: np.dtype):
        self._arrays = arrays
        self._ends = [0, *np.cumsum([len(x) for x in arrays]).tolist()]
        self._dtype = dtype

    @classmethod
    def of(cls, layout: Layout, tree: chex.ArrayTree) -> "Sections":
        """Return the entries of `tree`, all of whose leaves are on this device."""
        given = zip(
            jax.tree.leaves(tree), layout.leaves, layout.matrices(tree), strict=True
        )
        # Widened where they are read, but for complex leaves, whose parts are laid out.
        arrays = [w if leaf.parts == 2 else jnp.asarray(x) for x, leaf, w in given]
        return cls([x.reshape(-1) for x in arrays], layout.dtype)

    def every(self, firsts: Sequence[int], size: int) -> Read:
        """Return what reads one of several sections of `size` entries.

        A section inside one array is cut from it; each of the others is put together by
        a branch of its own. So there are no more branches than sections.

        Args:
            firsts: Where each section begins. Behind the last array there are zeros.
            size: Entries of a section.

        Returns:
            Function from the number of a section to an array `(size,)`.
        """
        reads: list[Read] = []
        numbers: dict[Any, int] = {}
        chosen = []
        for first in firsts:
            index = int(np.searchsorted(self._ends, first, side="right")) - 1
            inside = index < len(self._arrays) and first + size <= self._ends[index + 1]
            key = index if inside else (first,)
            if key not in numbers:
                numbers[key] = len(reads)
                cut = functools.partial(self._inside, index, size)
                across = functools.partial(self._across, first, size)
                reads.append(cut if inside else across)
            chosen.append(numbers[key])
        table = np.array([chosen, firsts], np.int32)

        def read(i: Any) -> jax.Array:
            number, first = jnp.asarray(table)[:, i]
            return lax.switch(number, reads, first)

        return read

    def _inside(self, index: int, size: int, first: jax.Array) -> jax.Array:
        """Return the section that begins at `first` and lies in one array."""
        place = first - self._ends[index]
        piece = lax.dynamic_slice_in_dim(self._arrays[index], place, size)
        return piece.astype(self._dtype)

    def _across(self, start: int, size: int, first: jax.Array) -> jax.Array:
        """Return the section that begins at `start`, which `first` is."""
        del first
        pieces, missing = [], size
        for array, end in zip(self._arrays, self._ends[1:], strict=True):
            begin = end - len(array)
            low, high = max(start, begin), min(start + size, end)
            if low < high:
                pieces.append(array[low - begin : high - begin].astype(self._dtype))
                missing -= high - low
        return jnp.concatenate([*pieces, jnp.zeros(missing, self._dtype)])
