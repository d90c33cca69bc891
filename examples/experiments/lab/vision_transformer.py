"""A small vision transformer: patches, blocks, the mean over positions."""

from flax import nnx
import jax
import jax.numpy as jnp

from lab.transformer import Transformer


class VisionTransformer(nnx.Module):
    """From images to logits.

    Args:
        classes: Classes of the logits.
        shape: Height, width and channels of the images.
        patch: Side of a patch, a divisor of both sides of the images.
        layers: Blocks of the transformer.
        width: Length of a patch's features, a multiple of `heads`.
        heads: Heads of the attention.
        rngs: Where the parameters are drawn from.
    """

    def __init__(
        self,
        classes: int,
        shape: tuple[int, int, int],
        patch: int,
        layers: int,
        width: int,
        heads: int,
        rngs: nnx.Rngs,
    ):
        self.patch = patch
        height, breadth, channels = shape
        count = (height // patch) * (breadth // patch)
        self.embed = nnx.Linear(patch * patch * channels, width, rngs=rngs)
        self.transformer = Transformer(count, layers, width, heads, False, rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images `(batch, height, width, channels)` to logits."""
        del train
        count, height, breadth, channels = images.shape
        rows, columns = height // self.patch, breadth // self.patch
        x = images.reshape(count, rows, self.patch, columns, self.patch, channels)
        x = x.swapaxes(2, 3).reshape(count, rows * columns, -1)
        return self.head(jnp.mean(self.transformer(self.embed(x)), axis=1))
