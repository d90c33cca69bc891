"""The collectives of a compiled program."""

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
        Collectives inside a loop count once.
    """
    text = program if isinstance(program, str) else program.as_text()
    text = re.sub(r"/\*.*?\*/", "", text)  # numbers in tuples of more than five
    found = []
    for shapes, kind in _COLLECTIVE.findall(text):
        arrays = re.findall(r"\w+\[([\d,]*)\]", shapes)
        if shapes.startswith("(") and kind.endswith("-start"):
            arrays = arrays[len(arrays) // 2 :]  # (operands, results) of a start
        size = sum(int(np.prod([int(n) for n in a.split(",") if n])) for a in arrays)
        found.append((kind.removesuffix("-start"), size))
    return found


_COLLECTIVE = re.compile(
    r"= (\([^=]*?\)|\S+) ((?:all-reduce|all-gather|all-to-all|reduce-scatter"
    r"|collective-permute|collective-broadcast|ragged-all-to-all)(?:-start)?)\("
)
