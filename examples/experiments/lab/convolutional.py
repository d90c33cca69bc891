"""Residual networks with batch statistics, and CNNs over two axes and over one."""

import itertools

from flax import nnx
import jax
import jax.numpy as jnp


def _convolution(fan_in, fan_out, size, stride, rngs):
    return nnx.Conv(
        fan_in,
        fan_out,
        (size, size),
        strides=stride,
        use_bias=False,
        kernel_init=nnx.initializers.he_normal(),
        rngs=rngs,
    )


class Residual(nnx.Module):
    """Two convolutions around which the input is passed, projected where it changes."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, rngs: nnx.Rngs):
        self.conv1 = _convolution(fan_in, fan_out, 3, stride, rngs)
        self.norm1 = nnx.BatchNorm(fan_out, momentum=0.9, rngs=rngs)
        self.conv2 = _convolution(fan_out, fan_out, 3, 1, rngs)
        self.norm2 = nnx.BatchNorm(fan_out, momentum=0.9, rngs=rngs)
        self.changes = stride > 1 or fan_in != fan_out
        if self.changes:
            self.project = _convolution(fan_in, fan_out, 1, stride, rngs)
            self.norm_project = nnx.BatchNorm(fan_out, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map `(batch, height, width, channels)` to the next features."""
        y = nnx.relu(self.norm1(self.conv1(x), use_running_average=not train))
        y = self.norm2(self.conv2(y), use_running_average=not train)
        if self.changes:
            x = self.norm_project(self.project(x), use_running_average=not train)
        return nnx.relu(y + x)


class ResNet(nnx.Module):
    """ResNet-20 with `blocks=(3, 3, 3), width=16`; ResNet-18 with four twos and 64.

    Args:
        classes: Classes of the logits.
        channels: Channels of the images.
        blocks: Blocks of every stage; each stage halves the sides of the last.
        width: Channels of the first stage; each stage doubles the last.
        large: Whether the stem has a stride of four, as for ImageNet, instead of one.
        rngs: Where the parameters are drawn from.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        blocks: tuple[int, ...],
        width: int,
        large: bool,
        rngs: nnx.Rngs,
    ):
        self.large = large
        size, stride = (7, 2) if large else (3, 1)
        self.stem = _convolution(channels, width, size, stride, rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        stages, fan_in = [], width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage and not block else 1
                stages.append(Residual(fan_in, width << stage, stride, rngs))
                fan_in = width << stage
        self.blocks = nnx.List(stages)
        self.head = nnx.Linear(fan_in, classes, rngs=rngs)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images `(batch, height, width, channels)` to logits."""
        x = nnx.relu(self.norm(self.stem(images), use_running_average=not train))
        if self.large:
            x = nnx.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x, train)
        return self.head(jnp.mean(x, axis=(1, 2)))


class SmallCNN(nnx.Module):
    """Two convolutions, each pooled, and two dense layers, for images of any size.

    105,866 parameters for 28 x 28 pixels of grey.
    """

    def __init__(self, classes: int, shape: tuple[int, int, int], rngs: nnx.Rngs):
        height, width, channels = shape
        self.conv1 = nnx.Conv(channels, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        inside = -(-height // 4) * -(-width // 4) * 32
        self.dense = nnx.Linear(inside, 64, rngs=rngs)
        self.head = nnx.Linear(64, classes, rngs=rngs)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images `(batch, height, width, channels)` to logits."""
        del train
        x = _pooled(nnx.relu(self.conv1(images)))
        x = _pooled(nnx.relu(self.conv2(x)))
        x = nnx.relu(self.dense(x.reshape(len(x), -1)))
        return self.head(x)


def _pooled(x):
    """Return the maxima of squares of two by two features, none of which is negative.

    The derivative of `nnx.max_pool` takes CPUs longer than all else of a step: on one
    core the network's gradient of 64 images took 41 ms with it and takes 12.
    """
    count, height, width, features = x.shape
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    return x.reshape(count, -(-height // 2), 2, -(-width // 2), 2, features).max((2, 4))


class LineCNN(nnx.Module):
    """Three convolutions over the pixels in reading order, about 13,000 parameters."""

    def __init__(self, classes: int, channels: int, rngs: nnx.Rngs):
        widths = (channels, 16, 32, 64)
        self.layers = nnx.List(
            [
                nnx.Conv(a, b, (5,), strides=2, rngs=rngs)
                for a, b in itertools.pairwise(widths)
            ]
        )
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Map images `(batch, height, width, channels)` to logits."""
        del train
        x = images.reshape(len(images), -1, images.shape[-1])
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(jnp.mean(x, axis=1))
