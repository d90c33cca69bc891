"""What the passes over sparse rows mean; each platform computes them in its own form.

Small blocks lie side by side in tiles: entry number $i$ of 128 blocks is one line of a
tile, which is what a processor loads, compares and multiplies at once. The vector is
`(tiles, size, lanes)`, a row `(tiles, k, lanes)` values and offsets, a window of m rows
`(tiles, m k, lanes)`. Of blocks of more than 256 entries they are `(blocks, size)`,
`(blocks, k)` and `(blocks, m k)`: what is of one block lies along axis 1 in both. No
float is added in an order that is left open.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efcp_jax.devices.collectives import vary_like
from efcp_jax.devices.sections import Piece, section
from efcp_jax.passes import cpu, gpu, reference, tpu
from efcp_jax.passes.entries import SparseRow, Storage, Stored
from efcp_jax.passes.tpu_tiles import LANES as LANES


# Entries of the largest block that is stored in tiles: offsets are of 8 bits, and a
# comparison with every place of a block is cheap.
LARGEST = 256


@dataclasses.dataclass(frozen=True)
class Form:
    """The passes over blocks of one size.

    Attributes:
        size: Entries a block.
        kept: Entries kept of each block, k, in [1, size].
        storage: How entries are stored.
        tile: Blocks of a tile; None where blocks are not in tiles.
    """

    size: int
    kept: int
    storage: Storage
    tile: int | None = None

    @property
    def lanes(self) -> int:
        """Blocks that lie side by side."""
        return self.tile or 1

    def shape(self, count: int, entries: int) -> tuple[int, ...]:
        """Return the shape of so many `entries` of each block, in `count` units.

        A unit is a tile, or a block where there are no tiles.
        """
        return (count, entries, self.lanes)[: 3 if self.tile else 2]

    def per_entry(self, weights: jax.Array) -> jax.Array:
        """Return the weights of rows for each entry of a window, `(1, m k, 1)`."""
        line = jnp.repeat(weights, self.kept)[None]
        return line[:, :, None] if self.tile else line

    def positions(self, offsets: jax.Array) -> jax.Array:
        """Return where entries lie, counted from the first of the tiles they are of.

        They are unsigned, so that indexing looks for no negative ones.
        """
        offsets = offsets.astype(jnp.uint32)
        units, lanes = len(offsets), self.lanes
        if units * lanes == 1:
            return offsets
        first = jnp.arange(units, dtype=jnp.uint32) * (self.size * lanes)
        lane = jnp.arange(lanes, dtype=jnp.uint32)
        first = first[:, None] + lane[None]
        return offsets * lanes + first.reshape(self.shape(units, 1))

    def taken(self, vector: jax.Array, offsets: jax.Array) -> jax.Array:
        """Return the entries at `offsets` of a vector laid flat."""
        return vector.at[self.positions(offsets)].get(mode="promise_in_bounds")

    def place(self, values: jax.Array, offsets: jax.Array) -> jax.Array:
        """Return zeros with the entries of a row added, a vector laid flat."""
        zeros = jnp.zeros(values.size // values.shape[1] * self.size, values.dtype)
        # Entries of a row lie at places of their own, or are zeros: not written.
        return zeros.at[self.positions(offsets)].add(
            values, mode="promise_in_bounds", unique_indices=True
        )

    def select(self, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the entries of largest magnitude of every block, as they lie in a row.

        Values in the dtype of `vector`, and offsets, int32, ascending in each block.
        Among equal magnitudes the first come first; NaN comes before infinity.
        """
        return self._by_platform("select", vector)

    def residual(
        self, vector: jax.Array, values: jax.Array, offsets: jax.Array
    ) -> jax.Array:
        """Return `vector` less the entries of a row, in place if it is donated.

        Offsets are all different in a block, or have values of 0.
        """
        return self._by_platform("residual", vector, values, offsets)

    def inner(self, window: Stored, row: SparseRow) -> jax.Array:
        """Return the products of stored rows with a loaded one, `(m,)` in its dtype."""
        return self._by_platform("inner", window, row)

    def dot(self, window: Stored, vector: jax.Array) -> jax.Array:
        """Return the products of stored rows with a vector, `(m,)` in its dtype."""
        return self._by_platform("dot", window, vector)

    def combine(self, window: Stored, weights: jax.Array, runs: Any) -> list[jax.Array]:
        """Return the sum of stored rows times `weights`, `(m,)`, cut into flat leaves.

        `runs` has the sizes of the leaves that the blocks hold end to end, in groups: a
        CPU writes the leaves of a group together.
        """
        return self._by_platform("combine", window, weights, runs=runs)

    def feed(
        self,
        gradient: Any,
        error: Any,
        accept: jax.Array,
        count: jax.Array,
        *,
        by_parts: Callable[..., Any],
        finish: Callable[[jax.Array, jax.Array], tuple[Any, jax.Array]],
        pieces: Callable[[Any], Sequence[Piece]],
        dtype: np.dtype,
    ) -> tuple[Any, jax.Array, Any]:
        """Do what `Space.feed` does, but for the basis, in `dtype`.

        TPUs do it in one pass over all, CPUs and others over some blocks after others.
        Their `feed` returns values, rounded, and offsets of the row, float32 and int32,
        of which `finish` makes the row as it is stored and its scale; `pieces` is how
        they read `gradient`. An error that a platform does not take is fed `by_parts`,
        in pass after pass, and a derivative is that of this form. As few forms as
        possible are named: each of them is traced, whatever the platform.
        """

        def fed(module: Any, read: Callable[[Any], Any]) -> Callable[..., Any]:
            def call(gradient: Any, error: Any, *step: jax.Array) -> Any:
                *row, rest = module.feed(self, error, read(pieces(gradient)), *step)
                return *finish(*row), rest

            return call

        shape = jax.tree.leaves(error)[0].shape
        whole = lambda pieces: section(pieces, 0, math.prod(shape)).reshape(shape)
        others = fed(gpu, tuple) if gpu.feeds(self, error) else by_parts
        forms = {
            "cpu": fed(cpu, tuple) if cpu.feeds(self, error, dtype) else by_parts,
            "tpu": fed(tpu, whole) if tpu.feeds(self, error) else by_parts,
        }
        forms = {name: form for name, form in forms.items() if form is not others}
        run = jax.custom_jvp(
            lambda *given: lax.platform_dependent(*given, default=others, **forms)
        )
        run.defjvp(functools.partial(jax.jvp, by_parts))
        return run(gradient, error, accept, count)

    def _by_platform(self, name: str, *arrays: Any, **given: Any) -> Any:
        """Return what the platform's own form of the pass `name` returns.

        A derivative is that of the plain form: kernels have none, and loops would keep
        what they have seen.
        """

        def form(module: Any) -> Any:
            call = functools.partial(getattr(module, name), self, **given)
            return lambda *arrays: vary_like(arrays, call(*arrays))

        @jax.custom_jvp
        def run(*arrays: Any) -> Any:
            forms = {"cpu": form(cpu), "cuda": form(gpu), "tpu": form(tpu)}
            return lax.platform_dependent(*arrays, default=form(reference), **forms)

        @run.defjvp
        def _(primals: Any, tangents: Any) -> Any:
            made, plain = run(*primals), form(reference)
            if name == "select":
                # Which entries are largest is a constant, but where two are equal.
                take = functools.partial(jnp.take_along_axis, axis=1)
                plain = lambda vector: (take(vector, made[1]), made[1])
            return made, jax.jvp(plain, primals, tangents)[1]

        return run(*arrays)
