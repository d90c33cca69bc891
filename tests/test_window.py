"""The window against a Python list of its last rows."""

import functools
from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from efcp_jax.feedback import Window


M = 4
STEPS = 3 * M + 2
SLOTS = range(M)

every_representation = pytest.mark.parametrize("name", cases.REPRESENTATIONS)


class Step(NamedTuple):
    """One insertion.

    Attributes:
        before: The window before it.
        after: The window behind it.
        stored: Every slot of `after` as a vector, without its scale.
        products: What `products` said before it.
        scale: The scale of the new row.
    """

    before: Window
    after: Window
    stored: np.ndarray
    products: Any
    scale: np.ndarray


@functools.cache
def history(name, accept=(True,) * STEPS):
    """Return every insertion, and the rows inserted so far as flat vectors."""
    space = cases.bound(name)

    @jax.jit
    def insert_all(gradients, accept):
        def insert(carry, given):
            (before, basis), (gradient, accepted) = carry, given
            row, scale, basis = space.compress(space.pack(gradient), basis, True)
            inner = lambda rows: space.inner(rows, row)
            products = before.products(inner, row)
            after = before.insert(row, scale, accepted)
            rows = [cases.stored_row(space, after.rows, i) for i in SLOTS]
            stored = [space.unpack(space.expand(each)) for each in rows]
            vector = jax.tree.map(lambda x: x * scale, space.expand(row))
            step = Step(before, after, stored, products, scale)
            return (after, basis), (step, space.unpack(vector))

        start = Window.empty(space, M, jnp.float32), space.zeros()[2]
        return jax.lax.scan(insert, start, (gradients, accept))[1]

    stacked, inserted = jax.device_get(
        insert_all(cases.gradients(STEPS), jnp.asarray(accept))
    )
    rows, kept, steps = cases.vectors(inserted), [], []
    for t in range(STEPS):
        if accept[t]:
            kept = [*kept, rows[t]][-M:]
        step = cases.at(stacked, t)
        stored = [oracles.flat(jax.tree.leaves(row)) for row in step.stored]
        steps.append((step._replace(stored=np.array(stored)), kept))
    return steps


@every_representation
def test_window_holds_the_last_rows(name):
    for count, (step, kept) in enumerate(history(name), start=1):
        window = step.after
        assert window.slot == count % M
        assert window.filled == min(count, M)
        rows = window.scale[:, None].astype(np.float64) * step.stored
        # The newest row lies before the next slot, the oldest at it.
        order = [(int(window.slot) - 1 - age) % M for age in range(len(kept))]
        expected = np.array(kept[::-1])
        np.testing.assert_allclose(rows[order], expected, rtol=1e-6, atol=1e-6)
        for slot in set(SLOTS) - set(order):
            assert not rows[slot].any()
            assert window.scale[slot] == 0


def test_rejected_rows_leave_the_window_as_it_was():
    accept = tuple(t % 3 != 1 for t in range(STEPS))
    for t, (step, kept) in enumerate(history("top_k", accept)):
        assert step.after.filled == len(kept)
        if not accept[t]:
            jax.tree.map(np.testing.assert_array_equal, step.before, step.after)


@every_representation
def test_inner_is_the_new_row_of_the_gram_matrix(name):
    for step, _ in history(name):
        slot = int(step.before.slot)
        leaves = cases.products_by_leaf(name, step.products)
        for product, part in zip(leaves, cases.parts(name), strict=True):
            expected = step.stored[:, part] @ step.stored[slot, part]
            np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-6)
        # Stored rows are at most about 1, whatever the gradient was.
        assert np.abs(step.stored[slot]).max() <= 1.001
        assert np.frexp(step.scale)[0] == 0.5


def test_an_empty_window_is_all_zeros_of_the_stored_types():
    space = cases.bound("top_k-blocks-bf16")
    window = Window.empty(space, M, jnp.float32)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(window))
    assert window.rows.values.shape == (1, 4 * M, 3)
    assert window.rows.values.dtype == jnp.bfloat16
    assert window.rows.offsets.dtype == jnp.uint8
    assert window.scale.shape == (M,)
