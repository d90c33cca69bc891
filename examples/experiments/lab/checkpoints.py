"""Parameters of a model to and from Orbax."""

import hashlib
from pathlib import Path

from flax import nnx
import jax
import numpy as np
import orbax.checkpoint as ocp


def save(path: Path, params: nnx.State, statistics: nnx.State) -> None:
    """Write the states of a model as `nnx.to_pure_dict` of both together."""
    both = nnx.to_pure_dict(nnx.merge_state(params, statistics))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), both)


def restore(path: Path, init) -> tuple[nnx.State, nnx.State]:
    """Return the parameters and statistics of a checkpoint.

    Args:
        path: What `save` has written, or any Orbax checkpoint of such a dictionary.
        init: From a key to both states, for their shapes.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint is of another model.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; --params takes a checkpoint")
    state = nnx.merge_state(*jax.eval_shape(init, jax.random.key(0)))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        nnx.to_pure_dict(state),
    )
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(path.resolve(), shapes)
    except (KeyError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} holds no parameters of this model: {first}") from None
    nnx.replace_by_pure_dict(state, restored)
    params, statistics = nnx.split_state(state, nnx.Param, nnx.BatchStat)
    return params, statistics


def digest(params) -> str:
    """Return a name for the values of parameters."""
    name = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        name.update(np.asarray(leaf).tobytes())
    return name.hexdigest()[:12]
