"""Compiles passes over windows of many shapes for a device that is not here.

Run by `compiling.worker` for tpu or cuda; prints JSON: what was compiled, and the
errors of what was not.
"""

import functools
import json
import sys

from collectives import collectives
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
import programs

import efcp_jax
from efcp_jax.passes import gpu, tpu
from efcp_jax.passes.entries import SparseRow, Storage
from efcp_jax.passes.forms import Form
from efcp_jax.quantized import Quantized


# Tiles, blocks a tile, entries a block, entries kept, rows.
SHAPES = [
    (3, 128, 128, 1, 256),
    (2, 128, 128, 3, 350),
    (17, 128, 256, 4, 9),
    (3, 128, 100, 5, 7),
    (2, 128, 200, 9, 11),
    (2, 128, 64, 2, 1024),
    (5, 128, 1, 1, 8),
    (2, 128, 8, 8, 5),
    (1, 128, 256, 256, 3),
    (1, 27, 128, 2, 9),
    (1, 1, 7, 3, 4),
]


def passes(module, shape, dtype):
    """Yield name, function and arguments of the passes over one shape."""
    tiles, lanes, size, kept, rows = shape
    form = Form(size, kept, Storage.of(jnp.dtype(dtype), size), lanes)
    struct = jax.ShapeDtypeStruct
    vector = struct((tiles, size, lanes), jnp.float32)
    entry = jax.eval_shape(lambda: form.storage.zeros(form.shape(tiles, kept)))
    longer = lambda x: struct((x.shape[0], rows * x.shape[1], *x.shape[2:]), x.dtype)
    window = jax.tree.map(longer, entry)
    values = struct(form.shape(tiles, kept), jnp.float32)
    row = SparseRow(values, entry.offsets)
    weights = struct((rows,), jnp.float32)
    given = lambda name: functools.partial(getattr(module, name), form)
    yield "select", given("select"), (vector,)
    residual = lambda v, row: module.residual(form, v, row.values, row.offsets)
    yield "residual", residual, (vector, row)
    yield "inner", given("inner"), (window, row)
    # The last leaf ends inside of a block.
    total = max(1, tiles * lanes * size - 3)
    combine = functools.partial(given("combine"), runs=((total,),))
    yield "combine", combine, (window, weights)
    yield "dot", given("dot"), (window, vector)
    units = struct((tiles, size, 1), jnp.bfloat16)
    for error in (vector, Quantized(struct(vector.shape, jnp.int8), units)):
        if module is tpu and tpu.feeds(form, error):
            step = struct((), jnp.bool_), struct((), jnp.int32)
            name = "feed" if error is vector else "feed bytes"
            yield name, given("feed"), (error, vector, *step)


def batched(function, arguments):
    """Return `function` over a batch of two, and its arguments."""
    add = lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype)
    return jax.vmap(function), jax.tree.map(add, arguments)


def sharded_step(platform):
    """Return a step over four devices, which only the TPU's description has."""
    devices = programs.described(platform)
    mesh = Mesh(np.array(devices[:4]), ("x",), axis_types=(AxisType.Explicit,))
    sparse = efcp_jax.top_k(2 / 128, block_size=128, value_dtype=jnp.bfloat16)
    tx = efcp_jax.scale_by_mfac(16, compressor=sparse)
    place = NamedSharding(mesh, PartitionSpec("x"))
    params = jax.ShapeDtypeStruct((1024, 300), jnp.float32, sharding=place)
    with jax.set_mesh(mesh):
        state = jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            efcp_jax.sharding.abstract_state(tx, params),
            efcp_jax.sharding.state_shardings(tx, params),
        )
        step = jax.jit(tx.update, donate_argnums=1)
        compiled = step.lower(params, state, params).compile()
    return dict(collectives(compiled))


def main(platform):
    place, done, errors = programs.sharding(platform), [], {}
    module = tpu if platform == "tpu" else gpu

    def attempt(name, make):
        try:
            make()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {str(error)[:500]}"
        else:
            done.append(name)

    def compiling(function, arguments):
        at = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        jax.jit(function).lower(*jax.tree.map(at, arguments)).compile()

    for i, shape in enumerate(SHAPES):
        for dtype in ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn"):
            for name, function, arguments in passes(module, shape, dtype):
                if name in ("select", "residual") and dtype != "float32":
                    continue  # no value is stored
                label = f"{name} {shape} {dtype}"
                attempt(label, functools.partial(compiling, function, arguments))
                if i in (1, 3) and dtype in ("bfloat16", "int8"):
                    many = functools.partial(compiling, *batched(function, arguments))
                    attempt(f"vmap {label}", many)
    collectives = []
    if platform == "tpu":
        step = lambda: collectives.append(sharded_step(platform))
        attempt("sharded step", step)
    print(json.dumps({"done": done, "errors": errors, "collectives": collectives}))


if __name__ == "__main__":
    main(sys.argv[1])
