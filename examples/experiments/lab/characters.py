"""A transformer that predicts the next character of a text."""

import hashlib
from pathlib import Path
import sysconfig

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from lab import classifying
from lab.transformer import Transformer
from lab.workload import Workload


VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))  # printable ASCII
HELD_OUT = 0.1  # share of the text, its end
EVALUATION_BATCH = 128


def standard_library() -> str:
    """Return the source of the standard library's modules, in alphabetical order."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    return "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)


def encode(text: str, size: int) -> np.ndarray:
    """Return the first `size` characters of the vocabulary in the text, as bytes."""
    index = {character: i for i, character in enumerate(VOCABULARY)}
    kept = [index[character] for character in text if character in index]
    return np.array(kept[:size], np.uint8)


class Model(nnx.Module):
    """From characters to the logits of the next ones."""

    def __init__(self, context: int, layers: int, width: int, heads: int, rngs):
        self.embed = nnx.Embed(len(VOCABULARY), width, rngs=rngs)
        self.transformer = Transformer(context, layers, width, heads, True, rngs)
        self.head = nnx.Linear(width, len(VOCABULARY), use_bias=False, rngs=rngs)

    def __call__(self, characters: jax.Array) -> jax.Array:
        """Map `(batch, length)` to `(batch, length, vocabulary)`."""
        return self.head(self.transformer(self.embed(characters)))


def workload(
    text: np.ndarray,
    *,
    name: str = "text",
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    context: int = 64,
    batch_size: int = 32,
    windows: int = 512,
) -> Workload:
    """Return the workload of an encoded text.

    Args:
        text: Indices into the vocabulary, `(characters,)`; the last tenth is held out.
        name: Names the results.
        layers: Blocks of the transformer.
        width: Length of a character's features; a multiple of `heads`.
        heads: Heads of the attention.
        context: Characters that are seen.
        batch_size: Windows of the text in a batch.
        windows: Windows of the held-out text that are evaluated, evenly spread.

    Raises:
        ValueError: A held-out text shorter than a window, or heads that do not divide
            the width.
    """
    if width % heads:
        raise ValueError(f"--width {width} is no multiple of --heads {heads}")
    kept = round((1 - HELD_OUT) * len(text))
    if len(text) - kept <= context or kept <= context:
        raise ValueError(
            f"a text of {len(text)} characters is too short for --context {context};"
            f" it takes {round((context + 1) / HELD_OUT) + 1}"
        )
    graph, init = classifying.split(
        lambda rngs: Model(context, layers, width, heads, rngs)
    )

    def batches(rng):
        while True:
            yield rng.integers(0, kept - context, batch_size, dtype=np.int32)

    def cut(characters, starts):
        index = starts[:, None] + jnp.arange(context + 1)
        window = characters[index].astype(jnp.int32)
        return window[:, :-1], window[:, 1:]

    def logits(params, statistics, characters):
        return nnx.merge(graph, params, statistics)(characters)

    def loss(params, statistics, batch):
        characters, following = batch
        losses = classifying.cross_entropy(
            logits(params, statistics, characters), following
        )
        return losses.mean(), statistics

    def evaluations():
        starts = np.linspace(0, len(text) - kept - context - 1, windows)
        count = -(-windows // EVALUATION_BATCH)
        return np.array_split(starts.astype(np.int32), count)

    def evaluate(params, statistics, data, starts):
        characters, following = cut(data["held_out"], starts)
        return classifying.sums(logits(params, statistics, characters), following)

    return Workload(
        name=name,
        config={
            "text": hashlib.sha256(text.tobytes()).hexdigest()[:12],
            "characters": len(text),
            "layers": layers,
            "width": width,
            "heads": heads,
            "context": context,
            "batch_size": batch_size,
            "windows": windows,
        },
        data={"train": jnp.asarray(text[:kept]), "held_out": jnp.asarray(text[kept:])},
        init=init,
        batches=batches,
        batch=lambda data, starts, key: cut(data["train"], starts),
        loss=loss,
        evaluations=evaluations,
        evaluate=evaluate,
        per_epoch=max(kept // (context * batch_size), 1),
    )
