"""Collectives: computations side by side that share theirs, and those of a program."""

from collections.abc import Generator, Iterable
import re
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np


# A computation that yields what it wants reduced over mesh axes (by `lax.psum` or
# `lax.pmax`), receives the result, and returns its own. With None for the axes it asks
# for a function of a batch of small arrays.
Routine = Generator[tuple[Any, jax.Array, tuple[str, ...] | None], jax.Array, Any]


def together(routines: Iterable[Routine]) -> list[Any]:
    """Run `routines` side by side and return their results.

    What they yield in the same round, for the same axes, travels in one collective,
    however many there are. Batches for the same function are one batch.
    """
    routines = list(routines)
    results: list[Any] = [None] * len(routines)
    answers: dict[int, Any] = dict.fromkeys(range(len(routines)))
    while answers:
        requests: dict[Any, dict[int, jax.Array]] = {}
        for index, answer in answers.items():
            try:
                reduce, value, axes = routines[index].send(answer)
            except StopIteration as stop:
                results[index] = stop.value
            else:
                alike = value.shape[1:] if axes is None else None
                key = (reduce, axes, value.dtype, alike)
                requests.setdefault(key, {})[index] = value
        answers = {}
        for (reduce, axes, *_), values in requests.items():
            if axes is None:
                answers |= _batched(reduce, values)
            else:
                answers |= joined(reduce, axes, values)
    return results


def joined(reduce: Any, axes: tuple[str, ...], tree: Any) -> Any:
    """Return `reduce(x, axes)` of all x of `tree`, of one dtype, in one collective."""
    if not axes:
        return tree
    if len(jax.tree.leaves(tree)) < 2:
        return jax.tree.map(lambda x: reduce(x, axes), tree)
    flat, restore = ravel_pytree(tree)
    return restore(reduce(flat, axes))


def _batched(function: Any, values: dict[int, jax.Array]) -> dict[int, jax.Array]:
    """Return `function` of each of `values`, in one batch along the first axis."""
    ends = np.cumsum([len(value) for value in values.values()])
    results = function(jnp.concatenate(list(values.values())))
    return dict(zip(values, jnp.split(results, ends[:-1]), strict=True))


def collectives(program: Any) -> list[tuple[str, int]]:
    """Return kind and size of every collective of a compiled program.

    Args:
        program: What `jax.jit(f).lower(...).compile()` returns, or its text.

    Returns:
        Pairs such as `("all-reduce", 64)`, in order. The size counts the elements of
        the result on one device; arrays that travel together count once, together.
        Collectives inside a loop count once, and so do those that a TPU sends beside
        other work.

    Notes:
        What an update of this package exchanges, with m floats for a window of m rows:

        | parameters | collectives |
        |---|---|
        | replicated (data parallel) | all-reduce of m, all-gather of the update |
        | sharded over every axis (FSDP, tensor parallel, both) | all-reduce of m |
        | sharded over some axes, none over others | both, the all-gather over *idle* |

        An axis is idle if it shards no parameter at all; the state is divided over it
        as by ZeRO. Shard parameters over it too to have the single all-reduce. A leaf
        that is replicated while others are sharded (a bias beside FSDP matrices) is
        held by all devices of the axis, in blocks of its own, and weighs one over their
        number in inner products: keep large leaves sharded.

        A metric, which optimizers have by default, adds an all-reduce for each set of
        mesh axes that cuts matrices, of a number for each row or column that is cut.
        Low rank adds a few of the small factors, r numbers a column and r^2 a leaf,
        each of them one for all leaves together; where parameters are replicated, the
        leaves of every shape are gathered together, each entry once.
    """
    text = program if isinstance(program, str) else program.as_text()
    text = re.sub(r"/\*.*?\*/", "", text)  # numbers in tuples of more than five
    written = [each for body in re.split(r"^}", text, flags=re.M) for each in _of(body)]
    found = []
    for shapes, kind in written:
        arrays = re.findall(r"\w+\[([\d,]*)\]", shapes)
        if shapes.startswith("(") and kind.endswith("-start"):
            arrays = arrays[len(arrays) // 2 :]  # (operands, results) of a start
        size = sum(int(np.prod([int(n) for n in a.split(",") if n])) for a in arrays)
        found.append((kind.removesuffix("-start"), size))
    return found


def _of(body: str) -> list[tuple[str, str]]:
    """Return shapes and kind of the collectives that begin in one computation.

    Compilers for TPUs write one that travels beside other work several times: where it
    begins, in the work it travels beside, and where it ends.
    """
    every = _COLLECTIVE.findall(body)
    if "AsyncCollective" in body or "%async_collective_fusion" in body.split("(")[0]:
        starts = [line for line in body.splitlines() if "AsyncCollectiveStart" in line]
        operands = {name for line in starts for name in re.findall(r"%[\w.-]+", line)}
        every = [each for each in every if each[0] in operands]
    return [each[1:] for each in every]


_COLLECTIVE = re.compile(
    r"(%?[\w.-]+) = (\([^=]*?\)|\S+)"
    r" ((?:all-reduce|all-gather|all-to-all|reduce-scatter"
    r"|collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?)\("
)
