"""Products with the inverse of a trained Fisher matrix, from the optimizer state."""

from typing import Any

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from efcp_jax import _validate, _validate_trees, window as windows
from efcp_jax.compressors import Compressor, each_gram, of_grams, scoped
from efcp_jax.preconditioners.ridge import ridge
from efcp_jax.protocol import transformation
from efcp_jax.reports.find import own_states
from efcp_jax.states import ScaleByMfacState
from efcp_jax.window import Window


# The first product, and those with what it has left over of the tree; and how often the
# m x m system is solved for each, again with what is left over.
_PRODUCTS = 3
_SOLUTIONS = 2


def inverse_fisher_product(
    tree: Any,
    state: Any,
    damping: chex.Numeric,
    *,
    compressor: Compressor,
    block_diagonal: bool = False,
    divisor: str = "window_size",
    sharding: Any = None,
) -> Any:
    r"""Multiply a tree by the inverse of the damped Fisher matrix of a trained M-FAC.

    $(\lambda I + G^T G / m)^{-1} x = (x - G^T w) / \lambda$ with
    $(m \lambda I + K) w = G x$, where the rows of $G$ are the window's. For influence
    functions, pruning scores and Laplace approximations; $x$ need not be a gradient.

    Args:
        tree: $x$, a tree of the structure and shapes of the parameters.
        state: The state of any optimizer that contains exactly one `scale_by_mfac`,
            however deeply chained, masked or wrapped. Masked parameters must be masked
            in `tree` too.
        damping: $\lambda > 0$, in the unit of a squared gradient entry; it need not be
            that of the training.
        compressor: The compressor that the state was made with, such as `identity()`
            for `mfac` and `top_k(2 / 128, block_size=128)` for `sparse_mfac`.
        block_diagonal: As the state was made with.
        divisor: `"window_size"` averages the Fisher matrix over $m$ rows, `"filled"`
            over the rows there are; as of `scale_by_mfac`.
        sharding: As of `scale_by_mfac`.

    Returns:
        A tree like `tree`, in its dtypes.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, `state` contains none or several states
            of M-FAC, or the one that it contains is in a metric, or does not fit `tree`
            and `compressor`.

    Examples:
        >>> import efcp_jax, jax.numpy as jnp
        >>> tx = efcp_jax.mfac(0.1, window_size=1, metric=None)
        >>> params = jnp.zeros(2)
        >>> _, state = tx.update(jnp.array([3., 0.]), tx.init(params), params)
        >>> x = jnp.array([10., 10.])
        >>> y = efcp_jax.inverse_fisher_product(
        ...     x, state, 1.0, compressor=efcp_jax.identity())
        >>> print(y.round(3))  # 10 / (1 + 9), 10 / 1
        [ 1. 10.]

    References:
        Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
        Information <https://arxiv.org/abs/2107.03356>`_, 2021

    Notes:
        Time: an eigendecomposition of the m x m matrix and nine times two passes over
        the window: what the formula alone leaves over is taken as a tree of its own
        two times.
        Memory: four vectors.
        Accuracy, with $\kappa = 1 + |G|^2 / (m \lambda)$, the condition number: the
        relative residual $|x - A y| / |x|$ is about 3e-8 $|G|^2 |y| / (m |x|)$ in
        float32, but not less than the rounding unit; rounding $y$ alone costs a tenth
        of that. Trees along the longest rows have small $y$: they stay below 1e-4 up to
        $\kappa$ of 3e5. Trees across the rows have $|y| = |x| / \lambda$ and stay
        below it up to 2e3. From 1e7 on the residual is about 1, and the damping must be
        larger.
        Call it under `jax.jit`, and under `jax.vmap` for several trees.
    """
    found = own_states(state, (ScaleByMfacState,))
    if len(found) != 1:
        raise ValueError(
            "`state` must contain exactly one state of `scale_by_mfac`, got"
            f" {len(found)}. Pass the part of the state that belongs to one."
        )
    if not isinstance(compressor, Compressor):
        raise TypeError(
            "`compressor` must be the compressor that `state` was made with, got"
            f" {compressor!r}. Pass for example `efcp_jax.identity()`."
        )
    block_diagonal = _validate.boolean("block_diagonal", block_diagonal)
    compressor = scoped(compressor, block_diagonal)
    if callable(damping):
        raise TypeError(
            f"`damping` must be a number, got {damping!r}. Pass the schedule's value."
        )
    damping = _validate.number(
        "damping",
        damping,
        low=0.0,
        open_low=True,
        remedy="Pass a small number such as 1e-5.",
    )
    divisor = _validate.choice("divisor", divisor, ("window_size", "filled"))
    _validate_trees.floating_leaves(tree, "tree")
    own: Any = found[0]
    if own.metric is not None:
        raise ValueError(
            "The window of `state` is in a metric that changes from step to step, so"
            " its Fisher matrix is not that of the parameters. Train with"
            " `metric=None`."
        )
    size = own.window.scale.shape[0]

    def init(space):
        dtype = space.layout.dtype
        gram = of_grams(space.counts, jnp.zeros((size, size), dtype))
        return _only(own, windows.empty(space, size, dtype), gram)

    def specs(space):
        one: Any = PartitionSpec()
        window = Window(rows=space.specs()[1], scale=one, slot=one, filled=one)
        return _only(own, window, of_grams(space.counts, one))

    def step(space, updates, held, values):
        window = held.window
        rows = window.filled if divisor == "filled" else size
        product = _product(space, updates, held, values["damping"], rows)
        return space.layout.cast(space.unpack(product)), held

    solver = transformation(
        compressor, init, specs, step, {"damping": damping}, sharding
    )
    return solver.update(tree, _only(own, own.window, own.gram))[0]


def _only(state: Any, window: Any, gram: Any) -> Any:
    """Return a state of the window and its Gram matrix alone."""
    nothing = dict.fromkeys(state._fields)
    return state._replace(**{**nothing, "window": window, "gram": gram})


def _product(space: Any, tree: Any, state: Any, damping: Any, rows: Any) -> Any:
    """Return this device's part of the product with the inverse, a vector."""
    window, dtype = state.window, space.layout.dtype
    damping = jnp.asarray(damping, dtype)
    shift = damping * jnp.maximum(jnp.asarray(rows, dtype), 1)
    of_each = lambda function, *trees: each_gram(function)(state.gram, *trees)
    systems = of_each(lambda gram: ridge(gram, window.scale, shift))
    over = lambda function, *grams: of_each(
        lambda _, *args: function(*args), systems, *grams
    )
    vector = space.pack(tree)

    def left_over(vector: Any, solution: Any) -> Any:
        """Return $x - G^T w$."""
        weights = over(lambda system, v: system.weights * v, solution)
        combined = space.combine(window.rows, weights)
        return jax.tree.map(jnp.subtract, vector, combined)

    def products(vector: Any) -> Any:
        return space.layout.sum(space.dot(window.rows, vector))

    def approximate(vector: Any) -> Any:
        """Return the product by the formula."""
        solution, rest = over(lambda system: jnp.zeros_like(system.shift)), vector
        for _ in range(_SOLUTIONS):
            # From the rows themselves: what rounding has made of K does not remain.
            more = over(
                lambda system, b, v: system.solve(system.residual(b, v)),
                products(rest),
                solution,
            )
            solution = jax.tree.map(jnp.add, solution, more)
            rest = left_over(vector, solution)
        return jax.tree.map(lambda leaf: leaf / damping, rest)

    def residual(product: Any) -> Any:
        """Return x less the damped Fisher matrix times its product with the inverse."""
        share = window.scale * (damping / shift)
        weights = over(lambda _, b: window.scale * (share * b), products(product))
        combined = space.combine(window.rows, weights)
        return jax.tree.map(
            lambda x, y, c: x - damping * y - c, vector, product, combined
        )

    def improve(_: jax.Array, best: tuple[Any, Any, jax.Array]) -> Any:
        product, rest, size = best
        product = jax.tree.map(jnp.add, product, approximate(rest))
        rest = residual(product)
        new = product, rest, _size(space, rest)
        # True for NaN, which is to be seen.
        better = ~(new[2] >= size)
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)

    nothing = jax.tree.map(jnp.zeros_like, vector)
    start = nothing, vector, jnp.asarray(jnp.inf, dtype)
    return lax.fori_loop(0, _PRODUCTS, improve, start)[0]


def _size(space: Any, vector: Any) -> jax.Array:
    """Return the sum of all magnitudes, which neither over- nor underflows easily."""
    sums = [jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(vector)]
    return space.layout.sum(sum(sums, jnp.zeros((), space.layout.dtype)))
