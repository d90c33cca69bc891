"""The textbook in its slowest form: NumPy, Python lists of rows, d x d matrices.

Nothing here is taken from the package, so changing the package cannot change what its
results are compared with. A window is a Python list of vectors, the newest last.
Compression is decided in the dtype of its input, because a decision that falls the
other way for the last bit is a different algorithm; everything else is float64.
"""

import math

import numpy as np


def matrix(leaf) -> np.ndarray:
    """Return `leaf` as a real matrix, its last axis against all others."""
    leaf = np.asarray(leaf)
    if np.iscomplexobj(leaf):
        leaf = np.atleast_1d(leaf)
        leaf = np.concatenate([leaf.real, leaf.imag], axis=-1)
    columns = leaf.shape[-1] if leaf.ndim else 1
    return leaf.reshape(-1, columns)


def flat(leaves, dtype=np.float64) -> np.ndarray:
    """Return the leaves laid end to end."""
    return np.concatenate([matrix(leaf).astype(dtype).ravel() for leaf in leaves])


def rounded(value, dtype):
    """Return `value` rounded to `dtype`, in the dtype it came in."""
    if dtype is None:
        return value
    return np.asarray(value).astype(dtype).astype(np.asarray(value).dtype)


def quantised(vector, size, dtype) -> np.ndarray:
    """Return `vector` rounded to 8 bits, tile by tile of 128 blocks of `size`.

    The unit of a tile is the power of two that brings its largest entry below 128 for
    integers and below 256 for floats.
    """
    most, above = {"int8": (127, 128), "float8_e4m3fn": (240, 256)}[
        np.dtype(dtype).name
    ]
    result = np.zeros_like(vector)
    for start in range(0, len(vector), 128 * size):
        tile = vector[start : start + 128 * size].astype(np.float64)
        unit = 2.0 ** math.frexp(np.abs(tile).max())[1] / above
        scaled = np.clip(tile / unit, -most, most)
        whole = np.rint(scaled) if dtype == np.int8 else scaled.astype(dtype)
        result[start : start + 128 * size] = unit * whole.astype(np.float64)
    return result


def lanes_of(length, size) -> int:
    """Return how many blocks share a run of entries: up to 128 small ones."""
    return min(128, -(-length // size)) if size <= 256 else 1


def blocks(length, size, lanes=None) -> list[range]:
    """Return where the entries of each block lie in a vector of `length`.

    The blocks of a run take an entry each in turn, as columns of a matrix do.
    """
    lanes, found = lanes or lanes_of(length, size), []
    for start in range(0, length, size * lanes):
        end = min(start + size * lanes, length)
        found += [range(first, end, lanes) for first in range(start, start + lanes)]
    return found


def top_k(vector, density, block_size=None, value_dtype=None, lanes=None) -> np.ndarray:
    """Keep the largest entries of each block, one block and one entry at a time."""
    size = min(block_size or len(vector), len(vector))
    kept = max(1, round(density * size))
    result = np.zeros_like(vector)
    for block in blocks(len(vector), size, lanes):
        for i in sorted(block, key=lambda i: (-abs(vector[i]), i))[:kept]:
            result[i] = vector[i]
    if value_dtype is not None and np.dtype(value_dtype).itemsize == 1:
        return quantised(result, size, np.dtype(value_dtype))
    return rounded(result, value_dtype)


def subspace_step(gradient, basis) -> tuple[np.ndarray, np.ndarray]:
    """Project the matrix `gradient` on the span of `gradient @ basis`."""
    left, _ = np.linalg.qr(gradient @ basis)
    right = gradient.T @ left
    return left @ right.T, right


def with_feedback(compress, gradients) -> tuple[list, list]:
    """Return the compressed gradients and the errors behind each."""
    error, rows, errors = np.zeros_like(gradients[0]), [], []
    for gradient in gradients:
        total = error + gradient
        rows.append(compress(total))
        error = total - rows[-1]
        errors.append(error)
    return rows, errors


def moment(rows, b1=0.0, nesterov=False) -> np.ndarray:
    """Return the first moment of `rows`, the newest last."""
    total = np.zeros(len(rows[-1]))
    for age, row in enumerate(reversed(rows)):
        total += (1 - b1) * b1**age * np.asarray(row, np.float64)
    return b1 * total + (1 - b1) * rows[-1] if nesterov else total


def mfac(rows, damping, divisor, b1=0.0, nesterov=False) -> np.ndarray:
    """Solve with the d x d damped Fisher matrix of `rows` for their first moment."""
    rows = [np.asarray(row, np.float64) for row in rows]
    fisher = np.zeros((len(rows[-1]), len(rows[-1])))
    for row in rows:
        fisher += np.outer(row, row) / divisor
    rhs = moment(rows, b1, nesterov)
    return np.linalg.solve(damping * np.eye(len(fisher)) + fisher, rhs)


def ggt(rows, eps, b1=0.0, b2=1.0, nesterov=False) -> np.ndarray:
    """Apply ((G^T G)^{1/2} + eps I)^{-1} to the first moment of `rows`."""
    rows = [np.asarray(row, np.float64) for row in rows]
    ages = range(len(rows) - 1, -1, -1)
    faded = np.array([b2**age * row for age, row in zip(ages, rows, strict=True)])
    # The moment lies in the span of the rows. The other directions of the full d x d
    # root would only add their rounding, divided by eps.
    _, singular, right = np.linalg.svd(faded, full_matrices=False)
    rhs = right @ moment(rows, b1, nesterov)
    return right.T @ (rhs / (singular + eps))


def published_mfac(rows, damping, dtype) -> np.ndarray:
    """Return x / damping minus a correction, the published form, all in `dtype`."""
    window = np.asarray(rows, dtype)
    gradient, size = window[-1], len(window)
    damping = dtype(damping)
    inner = dtype(size) * damping * np.eye(size, dtype=dtype) + window @ window.T
    weights = np.linalg.solve(inner, window @ (gradient / damping))
    return gradient / damping - window.T @ weights


def relative_error(value, expected) -> float:
    """Return |value - expected| / |expected|, or |value| where that is 0 / 0."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(value - expected) / (norm if norm > 0 else 1.0))
