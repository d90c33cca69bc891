"""Arrays laid end to end, read a section at a time.

A loop on a CPU reads each section where its leaf lies: no array as long as the model is
made to lay leaves side by side, or to widen them.
"""

from collections.abc import Callable, Sequence
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
        branches: dict[tuple[str, int], Read] = {}
        chosen = []
        for first in firsts:
            index = int(np.searchsorted(self._ends, first, side="right")) - 1
            inside = index < len(self._arrays) and first + size <= self._ends[index + 1]
            key = ("inside", index) if inside else ("across", first)
            if key not in branches:
                cut = self._inside(index, firsts, size)
                branches[key] = cut if inside else self._across(first, size)
            chosen.append([*branches].index(key))
        table, read = np.array(chosen, np.int32), [*branches.values()]
        return lambda i: lax.switch(jnp.asarray(table)[i], read, i)

    def _inside(self, index: int, firsts: Sequence[int], size: int) -> Read:
        """Return what reads sections that lie in one array."""

        def read(i: Any) -> jax.Array:
            places = np.array(firsts) - self._ends[index]
            place = jnp.asarray(np.maximum(places, 0).astype(np.int32))[i]
            piece = lax.dynamic_slice_in_dim(self._arrays[index], place, size)
            return piece.astype(self._dtype)

        return read

    def _across(self, first: int, size: int) -> Read:
        """Return what reads the section that begins at `first`."""

        def read(i: Any) -> jax.Array:
            del i
            pieces, missing = [], size
            for array, start, end in zip(
                self._arrays, self._ends, self._ends[1:], strict=False
            ):
                low, high = max(first, start), min(first + size, end)
                if low < high:
                    pieces.append(array[low - start : high - start].astype(self._dtype))
                    missing -= high - low
            return jnp.concatenate([*pieces, jnp.zeros(missing, self._dtype)])

        return read
