"""The published sparse M-FAC step in PyTorch, the baseline of `step.py`.

Error feedback, top-k over all parameters, one row of the Gram matrix, a factorisation
and the combination of the rows, with 64-bit indices and float32 values as published.

`SparseMfac` takes the m x m part and the combination as the published code does on a
CPU, row by row. `Improved` replaces both loops by one library call each, the least that
a user of PyTorch would change.
"""

import torch  # pyright: ignore[reportMissingImports]


class SparseMfac:
    """A window of sparse gradients; `step` returns the preconditioned gradient."""

    def __init__(self, size, window_size, density, damping=1e-2, seed=0):
        kept = max(1, round(density * size))
        generator = torch.Generator().manual_seed(seed)
        shape = (window_size, kept)
        self.damping = damping
        # Coefficients of older rows than the newest are kept, so a step takes the less,
        # the later its slot. From here on it is the mean over all slots.
        self.slot = round(0.63 * window_size)
        self.error = torch.zeros(size)
        self.indices = torch.randint(size, shape, generator=generator)
        self.values = torch.randn(shape, generator=generator)
        # A full window of rows that are nearly orthogonal, as random sparse rows are.
        self.gram = kept * torch.eye(window_size)
        self.inverse = torch.eye(window_size)

    @property
    def nbytes(self):
        """Bytes of the state."""
        held = (self.error, self.indices, self.values, self.gram, self.inverse)
        return sum(each.nbytes for each in held)

    @torch.no_grad()
    def step(self, gradient):
        """Return the update for `gradient`."""
        self.error += gradient
        _, indices = torch.topk(self.error.abs(), self.values.shape[1], sorted=False)
        values = self.error[indices]
        self.error[indices] = 0
        self.indices[self.slot], self.values[self.slot] = indices, values
        row = torch.zeros_like(gradient)
        row[indices] = values
        entries = row[self.indices.view(-1)].view_as(self.values)
        products = (self.values * entries).sum(1)
        self.gram[self.slot], self.gram[:, self.slot] = products, products
        # u = (c - G^T (lambda m I + K)^-1 G c) / lambda
        update = self.subtract(row, self.solve(products))
        self.slot = (self.slot + 1) % len(self.gram)
        return update / self.damping

    def system(self):
        size = len(self.gram)
        return self.gram + self.damping * size * torch.eye(size)

    def solve(self, products):
        """Return the coefficients, row by row, from an inverse that rows extend."""
        size = len(self.gram)
        # LU without pivots, which PyTorch has on GPUs only: L = lower / diagonal.
        lower = torch.linalg.cholesky(self.system())
        diagonal = lower.diagonal()
        lower = lower / diagonal
        for i in range(max(self.slot, 1), size):
            self.inverse[i, :i] = -(lower[i, :i] @ self.inverse[:i, :i])
        reduced = products.clone()
        for i in range(1, size):
            reduced[i:] -= lower[i:, i - 1] * reduced[i - 1]
        return (reduced / diagonal**2) @ self.inverse

    def subtract(self, row, weights):
        for indices, values, weight in zip(
            self.indices, self.values, weights.tolist(), strict=True
        ):
            row.index_add_(0, indices, -weight * values)
        return row


class Improved(SparseMfac):
    """The same step with one factorisation and one addition of all rows."""

    def solve(self, products):
        factor = torch.linalg.cholesky(self.system())
        return torch.cholesky_solve(products[:, None], factor)[:, 0]

    def subtract(self, row, weights):
        entries = (self.values * -weights[:, None]).view(-1)
        return row.index_add_(0, self.indices.view(-1), entries)
