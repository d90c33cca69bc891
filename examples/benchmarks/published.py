"""The published sparse M-FAC step in PyTorch, the baseline of `step.py`.

Error feedback, top-k over all parameters, one row of the Gram matrix, a factorisation
and the combination of the rows, with 64-bit indices and float32 values as published.
"""

import torch  # pyright: ignore[reportMissingImports]


class SparseMfac:
    """A window of sparse gradients; `step` returns the preconditioned gradient."""

    def __init__(self, size, window_size, density, damping=1e-2, seed=0):
        kept = max(1, round(density * size))
        generator = torch.Generator().manual_seed(seed)
        shape = (window_size, kept)
        self.damping, self.slot = damping, 0
        self.error = torch.zeros(size)
        self.indices = torch.randint(size, shape, generator=generator)
        self.values = torch.randn(shape, generator=generator)
        # A full window of rows that are nearly orthogonal, as random sparse rows are.
        self.gram = kept * torch.eye(window_size)

    @property
    def nbytes(self):
        """Bytes of the state."""
        held = (self.error, self.indices, self.values, self.gram)
        return sum(each.nbytes for each in held)

    @torch.no_grad()
    def step(self, gradient):
        """Return the update for `gradient`."""
        window_size = len(self.gram)
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
        matrix = self.gram + self.damping * window_size * torch.eye(window_size)
        factor = torch.linalg.cholesky(matrix)
        weights = torch.cholesky_solve(products[:, None], factor)
        # u = (c - G^T (lambda m I + K)^-1 G c) / lambda
        update = row.index_add_(
            0, self.indices.view(-1), (self.values * -weights).view(-1)
        )
        self.slot = (self.slot + 1) % window_size
        return update / self.damping
