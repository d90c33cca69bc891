r"""What functions have in common, said once and written into each of their docstrings.

A docstring asks for it by name, as those of SciPy and Matplotlib do: `%(arguments)s`
becomes the section of arguments, in the order of the signature; the other names are
those of `_PIECES`. A literal percent sign is `%%`.
"""

from collections.abc import Callable
import inspect
import re
import textwrap
from typing import Any, TypeVar


_Function = TypeVar("_Function", bound=Callable[..., Any])

_COMMON = r"""
window_size: Number of gradients $m$ kept, at least 1; None for 64.
nesterov: Whether the moment looks ahead:
    $b_1 \sum_i (1 - b_1) b_1^{age_i} g_i + (1 - b_1) c_t$.
compressor: `identity()`, `top_k(...)` or `low_rank(...)`. None is `identity()`.
block_diagonal: Whether every leaf has a Gram matrix of its own, a block-diagonal
    preconditioner, instead of one for all parameters. Each is solved by itself, and
    blocks of `top_k` hold entries of one leaf only.
metric: What gradients and updates are measured in, `diagonal_metric(...)`: the
    step is made on $D^{-1/2} g_t$, and the update multiplied by $D^{-1/2}$. None
    for the Euclidean metric.
error_feedback: Whether what the compressor drops is added to the next gradient.
    Switch it off behind `error_feedback(compressor)` in a chain.
error_dtype: Dtype in which the error is kept. None for the working dtype (float32,
    or float64 for float64 parameters), in which no part of a gradient is lost, and
    in the sparse optimizers for the default of `value_dtype`. `jnp.bfloat16` halves
    it and loses its rounding. `jnp.int8` keeps a byte an entry and a power of two a
    block, rounded at random so that in the mean nothing is lost; on CPUs one vector
    of the working dtype is a temporary then.
skip_nonfinite: Whether a gradient with an entry that is not finite is skipped: a
    zero update, an unchanged error and window, and `skipped` counted up. False lets
    such entries through.
sharding: Where the parameters live: a `NamedSharding` or `PartitionSpec` for every
    leaf, as a tree prefix. None takes it from the arrays' types under Explicit mesh
    axes; under Auto axes it spreads the step over the mesh in a way of its own, see
    `efcp_jax.sharding`.
"""

MFAC = r"""
learning_rate: Step size; a number or a schedule. A step along the newest row is
    about $m$ long in units of that row's inverse norm, so values near $1 / m$ are
    natural: `1 / 64` for the default window.
damping: $\lambda > 0$, in the unit of a squared gradient entry; a number or a
    schedule. None for 0.1 with `relative=True`. Large values give $c_t / \lambda$,
    a plain gradient. For values that go to 0, $\langle u, c_t \rangle$ goes to $m$,
    so the learning rate belongs near $1 / m$.
relative: Whether `damping` and the update are in units of the window itself: with
    $s^2$ the mean squared norm of its rows, $\lambda$ is `damping` $s^2 / m$, that
    many times the mean of the eigenvalues of the Fisher matrix that are not zero
    (with `divisor="filled"`, $s^2$ over the rows there are), and the update is
    multiplied by $s$. Multiplying the loss by a number then changes nothing at all.
b1: Decay of the first moment, in [0, 1). It needs no momentum buffer: the moment is
    taken over the window. 0 takes the newest row.
divisor: `"window_size"` averages the Fisher matrix over $m$ rows from the first
    step on, as published; `"filled"` over the rows there are, which makes the first
    steps shorter by up to $m$ times.
"""

GGT = r"""
learning_rate: Step size; a number or a schedule. The preconditioned gradient is at
    most about 1 long, so values near 1 are natural.
eps: $\epsilon \ge 0$, added to every singular value of the window, in the unit of a
    gradient norm; a number or a schedule. None for 1e-3 with `relative=True`. Large
    values give $c_t / \epsilon$, a plain gradient; 0 gives the pseudo-inverse. For
    values that go to 0 the update is at most 1 long, so the learning rate belongs
    near 1.
relative: Whether `eps` is in units of the window itself: of the root mean square of
    the norms of its rows. Multiplying the loss by a number then changes nothing.
b1: Decay of the first moment, in [0, 1), at most `b2`. It needs no momentum buffer:
    the moment is taken over the window. 0 takes the newest row.
b2: Decay of the older rows of the window, in (0, 1]. 1 keeps them as they are.
"""

OPTIMIZER = r"""
momentum: Decay of a trace of the updates, in [0, 1); a number or a schedule. None
    or 0 for none, without a buffer.
weight_decay: Decoupled weight decay, at least 0, multiplied by the learning rate; a
    number or a schedule.
mask: Tree of booleans, or a function from parameters to one, that says which leaves
    decay; None for all.
metric: What gradients and updates are measured in, `diagonal_metric(...)`: the
    step is made on $D^{-1/2} g_t$, and the update multiplied by $D^{-1/2}$. None
    for the Euclidean metric. `"auto"` for `diagonal_metric()` with `relative=True`
    or without a damping or eps, and for None where that is in the published unit.
rank: Columns of the factors of every matrix, at least 1; None for 4. Leaves that
    such factors would not make smaller are kept whole.
value_dtype: Floating dtype of the stored rows; None for the working dtype.
"""

SPARSE = r"""
density: Share of the entries kept of every block, in (0, 1]; None for two of 128.
block_size: Entries a block, at least 1; None for 128. Up to 256 every platform is
    fast; at least the number of parameters makes one block of all.
value_dtype: Dtype of the stored values; None for bfloat16, or with density 1, where
    nothing is dropped, for the working dtype. Narrower ones are `jnp.int8` and
    `jnp.float8_e4m3fn`; see `top_k`.
"""

_RAISES = """Raises:
    TypeError: An argument is of the wrong type, or a structural one is traced.
    ValueError: An argument is out of range."""

_PAPER = """    Modoranu et al., `Error Feedback Can Accurately Compress Preconditioners
    <https://arxiv.org/abs/2306.06098>`_, 2024"""

_PIECES = {
    "raises": _RAISES,
    "an_optimizer": f"""Returns:
    A gradient transformation to be passed to the training loop like any of Optax's.

{_RAISES}""",
    "mfac_papers": f"""References:
    Frantar et al., `M-FAC: Efficient Matrix-Free Approximations of Second-Order
    Information <https://arxiv.org/abs/2107.03356>`_, 2021

{_PAPER}""",
    "ggt_papers": f"""References:
    Agarwal et al., `Efficient Full-Matrix Adaptive Regularization
    <https://arxiv.org/abs/1806.02958>`_, 2019

{_PAPER}""",
    "paper": f"References:\n{_PAPER}",
}


def documented(*blocks: str) -> Callable[[_Function], _Function]:
    """Return a decorator that writes into a docstring what it asks for by name.

    Of an argument that several of the `blocks` speak of, the last is taken.
    """
    known = {}
    for block in (_COMMON, *blocks):
        entries = re.split(r"\n(?=\w)", block.strip())
        known |= {entry.partition(":")[0]: entry for entry in entries}

    def fill(function: _Function) -> _Function:
        if function.__doc__ is None:  # under `python -OO`
            return function
        said = [known[name] for name in inspect.signature(function).parameters]
        section = "Args:\n" + textwrap.indent("\n".join(said), "    ")
        # Python 3.13 has removed the indentation, earlier versions have not.
        text = inspect.cleandoc(function.__doc__)
        function.__doc__ = text % {**_PIECES, "arguments": section}
        return function

    return fill
