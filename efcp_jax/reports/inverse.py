"""Products with the inverse of a trained Fisher matrix, from the optimizer state."""

from typing import Any, NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import optax

from efcp_jax import _validate, _validate_trees
from efcp_jax.compressors import Compressor, each_gram, of_grams, scoped
from efcp_jax.feedback import Window
from efcp_jax.preconditioners.mfac import Ridge, ridge
from efcp_jax.protocol import Step
from efcp_jax.reports import only_state
from efcp_jax.transforms import ScaleByMfacState


# Products, each with what those before have left over of the tree; and how often the
# m x m system is solved for each, likewise.
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
        the window, as the formula is applied again to what it leaves. Memory: four
        vectors.
        Accuracy, with $\kappa = 1 + |G|^2 / (m \lambda)$, the condition number: the
        relative residual $|x - A y| / |x|$ is about 3e-8 $|G|^2 |y| / (m |x|)$ in
        float32, but not less than the rounding unit. Trees along the longest rows have
        small $y$: they stay below 1e-4 up to $\kappa$ of 3e5. Trees across the rows
        have $|y| = |x| / \lambda$ and stay below it up to 2e3. From 1e7 on the residual
        is about 1, and the damping must be larger.
        Call it under `jax.jit`, and under `jax.vmap` for several trees.
    """
    own = only_state(state, (ScaleByMfacState,), "scale_by_mfac")
    if not isinstance(compressor, Compressor):
        raise TypeError(
            "`compressor` must be the compressor that `state` was made with, got"
            f" {compressor!r}. Pass for example `efcp_jax.identity()`."
        )
    if callable(damping):
        raise TypeError(
            f"`damping` must be a number, got {damping!r}. Pass the schedule's value."
        )
    damping = _validate.number("damping", damping)
    divisor = _validate.choice("divisor", divisor, ("window_size", "filled"))
    _validate_trees.floating_leaves(tree, "tree")
    if own.metric is not None:
        raise ValueError(
            "The window of `state` is in a metric that changes step by step, so its"
            " Fisher matrix is not that of the parameters. Train with `metric=None`."
        )
    block_diagonal = _validate.boolean("block_diagonal", block_diagonal)
    compressor = scoped(compressor, block_diagonal)
    solver = _solver(compressor, own, divisor, damping, sharding)
    held: Any = _Held(own.window, own.gram)
    return solver.update(tree, held)[0]


class _Held(NamedTuple):
    """What is needed of a state of M-FAC."""

    window: Window
    gram: Any
    error: None = None


def _solver(
    compressor: Any, state: Any, divisor: str, damping: Any, sharding: Any
) -> optax.GradientTransformation:
    """Return the product as the step of a transformation, which knows many devices."""
    size = len(state.window.scale)

    def init(space):
        window = Window.empty(space, size, space.layout.dtype)
        gram = jnp.zeros((size, size), space.layout.dtype)
        return _Held(window, of_grams(space.counts, gram))

    def specs(space):
        one: Any = PartitionSpec()
        return _Held(Window.specs(space), of_grams(space.counts, one))

    def step(space, updates, held, values):
        damping = jnp.asarray(values["damping"], space.layout.dtype)
        rows = held.window.filled if divisor == "filled" else size
        shift = damping * jnp.maximum(jnp.asarray(rows, damping.dtype), 1)
        systems = each_gram(lambda gram: ridge(gram, held.window.scale, shift))
        fisher = _Fisher(space, held.window, damping, shift, systems(held.gram))
        product = fisher.refined(space.pack(updates))
        return space.layout.cast(space.unpack(product)), held

    given = {"damping": damping}
    return Step(compressor, init, specs, step, given, sharding).transformation


class _Fisher(NamedTuple):
    r"""$A = \lambda I + G^T G / n$, and what solves $n \lambda I + K$ of its parts."""

    space: Any
    window: Window
    damping: jax.Array
    shift: jax.Array  # $n \lambda$
    systems: Any

    def products(self, vector: Any) -> Any:
        """Return $G x$, of the rows as they are stored."""
        return self.space.layout.sum(self.space.dot(self.window.rows, vector))

    def less_rows(self, vector: Any, weights: Any) -> Any:
        """Return $x - G^T w$."""
        combined = self.space.combine(self.window.rows, weights)
        return jax.tree.map(jnp.subtract, vector, combined)

    def solved(self, vector: Any) -> Any:
        """Return the product with the inverse, by the formula."""
        weights = each_gram(lambda v, system: system.weights * v)
        # From the rows themselves: what rounding has made of K does not remain.
        better = each_gram(lambda b, system, v: system.better(b, v))
        nothing = lambda system: jnp.zeros_like(system.shift)
        is_system = lambda node: isinstance(node, Ridge)
        rest, solution = vector, jax.tree.map(nothing, self.systems, is_leaf=is_system)
        for _ in range(_SOLUTIONS):
            solution = better(self.products(rest), self.systems, solution)
            rest = self.less_rows(vector, weights(solution, self.systems))
        return jax.tree.map(lambda leaf: leaf / self.damping, rest)

    def residual(self, vector: Any, product: Any) -> Any:
        """Return x less the matrix times `product`."""
        scale, share = self.window.scale, self.damping / self.shift
        weights = each_gram(lambda b: scale * (scale * share * b))
        rest = jax.tree.map(lambda x, y: x - self.damping * y, vector, product)
        return self.less_rows(rest, weights(self.products(product)))

    def refined(self, vector: Any) -> Any:
        """Return the product with the inverse, and with what each product leaves."""

        def improve(_: jax.Array, best: tuple[Any, Any, jax.Array]) -> Any:
            product, rest, size = best
            product = jax.tree.map(jnp.add, product, self.solved(rest))
            rest = self.residual(vector, product)
            # A sum of magnitudes hardly ever over- or underflows.
            sums = [jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(rest)]
            total = self.space.layout.sum(sum(sums, jnp.zeros_like(self.damping)))
            # True for NaN, which is to be seen.
            better = ~(total >= size)
            new = product, rest, total
            return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)

        zeros = jax.tree.map(jnp.zeros_like, vector)
        start = zeros, vector, jnp.full_like(self.damping, jnp.inf)
        return lax.fori_loop(0, _PRODUCTS, improve, start)[0]
