"""Blocks of a small pre-norm transformer, for characters and for patches."""

from flax import nnx
import jax


class Block(nnx.Module):
    """Attention and a two-layer network, each added to what it reads."""

    def __init__(self, width: int, heads: int, causal: bool, rngs: nnx.Rngs):
        linear = lambda fan_in, fan_out: nnx.Linear(
            fan_in, fan_out, use_bias=False, rngs=rngs
        )
        self.heads, self.causal = heads, causal
        self.norm_attention = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.query, self.key, self.value, self.output = (
            linear(width, width) for _ in range(4)
        )
        self.norm_network = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `(batch, length, width)` to the same shape."""
        normed = self.norm_attention(x)
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
        attended = jax.nn.dot_product_attention(
            split(self.query(normed)),
            split(self.key(normed)),
            split(self.value(normed)),
            is_causal=self.causal,
        )
        x = x + self.output(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_network(x))))


class Transformer(nnx.Module):
    """Blocks between learned positions and a last norm."""

    def __init__(
        self,
        length: int,
        layers: int,
        width: int,
        heads: int,
        causal: bool,
        rngs: nnx.Rngs,
    ):
        self.embed_positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List(
            [Block(width, heads, causal, rngs) for _ in range(layers)]
        )
        self.norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map embeddings `(batch, length, width)` to features of the same shape."""
        x = x + self.embed_positions.embedding[None, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
