"""The inverse of the m x m system as a linear map, for derivatives of its solutions.

It is applied to whatever a derivative meets, and transposed for reverse mode, which the
loops of the solver cannot be. A factorisation that was kept serves no derivative: a new
one is made.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.dtypes import float0
import jax.numpy as jnp
import numpy as np

from efcp_jax.preconditioners import cholesky, system as systems


def inverse(
    system: systems.System, diagonal: jax.Array, multiply: Callable[..., jax.Array]
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
    r"""Return $M^{-1}$ for $M = D A D$, and whether no row depends on others.

    Args:
        system: $M$, a constant.
        diagonal: $D$, shape `(m,)`, a constant.
        multiply: $M$ as a linear map that may be differentiated.

    Returns:
        A linear map of vectors, to within the null space of $M$ where it has one, and a
        boolean.
    """
    size, dtype = system.size, diagonal.dtype
    factor: Any = cholesky.factorise(system.rows(0, size).T, size)
    sound = systems.is_sound(factor)
    # Both branches are taken where there is a batch: a NaN times 0 is no 0.
    factor = jnp.where(sound, factor, jnp.eye(size, dtype=dtype))
    one = jnp.ones((), dtype)

    def solve(_: Any, rhs: jax.Array) -> jax.Array:
        return lax.cond(
            sound,
            lambda rhs: cholesky.solve(factor, rhs),
            lambda rhs: systems.without_noise(system, diagonal, rhs / diagonal, one),
            rhs,
        )

    def transposed(_: Any, cotangent: jax.Array) -> jax.Array:
        linear = lambda rhs: solve(None, rhs)
        return jax.linear_transpose(linear, cotangent)(cotangent)[0]

    return lambda rhs: lax.custom_linear_solve(multiply, rhs, solve, transposed), sound


def kept(
    new: systems.Kept | None, damping: jax.Array, d_damping: jax.Array
) -> systems.Kept | None:
    """Return the derivative of what a step keeps: only the damping is used again.

    Of the factorisation it does not matter when it was made.
    """
    if new is None:
        return None
    none = np.zeros((), float0)
    return jax.tree.map(jnp.zeros_like, new)._replace(
        run=none, damping=jnp.where(new.damping == damping, d_damping, 0)
    )
