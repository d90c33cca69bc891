"""The collectives of a compiled program, which tell what a step sends."""

import re
from typing import Any

import numpy as np


def collectives(program: Any) -> list[tuple[str, int]]:
    """Return kind and size of every collective of a compiled program.

    Args:
        program: What `jax.jit(f).lower(...).compile()` returns, or its text.

    Returns:
        Pairs such as `("all-reduce", 64)`, in order. The size counts the elements of
        the result on one device; arrays that travel together count once, together.
        Collectives inside a loop count once, and so do those that a TPU sends beside
        other work.
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
