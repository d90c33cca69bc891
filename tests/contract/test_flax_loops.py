"""Training loops of Flax's documentation, but for the line that names the optimizer.

Written from the public descriptions, with smaller models and made-up data. What varies
is only what is passed where the documentation passes `optax.adamw(...)` or another
optimizer of Optax: an alias with the learning rate that the README recommends.

Every step waits for its loss. XLA for CPUs, with more devices than cores, deadlocks if
many steps are under way, whatever the optimizer.
"""

import functools
from typing import Any

from flax import linen as nn, nnx, struct
from flax.training import train_state
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import efcp_jax


pytestmark = pytest.mark.usefixtures("promotion")

STEPS = 60
# As in the README: about one over the window for M-FAC and about one for GGT, decaying.
OPTIMIZERS = {
    "mfac": lambda: efcp_jax.mfac(optax.cosine_decay_schedule(1 / 64, STEPS)),
    "sparse_mfac": lambda: efcp_jax.sparse_mfac(
        optax.cosine_decay_schedule(1 / 64, STEPS)
    ),
    "low_rank_mfac": lambda: efcp_jax.low_rank_mfac(
        optax.cosine_decay_schedule(1 / 64, STEPS)
    ),
    "ggt": lambda: efcp_jax.ggt(optax.cosine_decay_schedule(1.0, STEPS)),
    "sparse_ggt": lambda: efcp_jax.sparse_ggt(optax.cosine_decay_schedule(1.0, STEPS)),
    "low_rank_ggt": lambda: efcp_jax.low_rank_ggt(
        optax.cosine_decay_schedule(1.0, STEPS)
    ),
}
every_alias = pytest.mark.parametrize("name", OPTIMIZERS)


def falls(losses, share=0.5):
    """Assert that the loss at the end is less than a share of that at the start."""
    losses = np.asarray(losses)
    assert np.all(np.isfinite(losses))
    assert losses[-5:].mean() < share * losses[:3].mean()


@functools.cache
def digits(size=8, classes=4, batch=32):
    """Return batches of noisy pictures of a few classes."""
    generator = np.random.default_rng(0)
    templates = generator.uniform(size=(classes, size, size, 1))
    batches = []
    for _ in range(STEPS):
        labels = generator.integers(classes, size=batch)
        noise = generator.normal(size=(batch, size, size, 1)) / 4
        images = (templates[labels] + noise).astype(np.float32)
        batches.append({"image": images, "label": labels.astype(np.int32)})
    return batches


@functools.cache
def curve(batch=32):
    """Return batches of points of a parabola."""
    generator = np.random.default_rng(0)
    batches = []
    for _ in range(STEPS):
        x = generator.uniform(-2, 2, size=(batch, 1)).astype(np.float32)
        noise = generator.normal(0, 0.1, size=x.shape).astype(np.float32)
        batches.append((x, 0.8 * x**2 + 0.1 + noise))
    return batches


# The MNIST tutorial of nnx.


class CNN(nnx.Module):
    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(rate=0.025)
        self.conv2 = nnx.Conv(4, 8, kernel_size=(3, 3), rngs=rngs)
        self.avg_pool = functools.partial(
            nnx.avg_pool, window_shape=(2, 2), strides=(2, 2)
        )
        self.linear1 = nnx.Linear(32, 16, rngs=rngs)
        self.linear2 = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = self.batch_norm(self.conv1(x))
        x = self.avg_pool(nnx.relu(self.dropout(x, rngs=rngs)))
        x = self.avg_pool(nnx.relu(self.conv2(x)))
        x = nnx.relu(self.linear1(x.reshape(x.shape[0], -1)))
        return self.linear2(x)


@pytest.mark.slow
@every_alias
def test_the_mnist_tutorial_of_nnx(name):
    model = CNN(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)
    metrics = nnx.MultiMetric(
        accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss")
    )

    def loss_fn(model, rngs, batch):
        logits = model(batch["image"], rngs)
        loss = optax.softmax_cross_entropy_with_integer_labels(
            logits=logits, labels=batch["label"]
        ).mean()
        return loss, logits

    @nnx.jit
    def train_step(model, optimizer, metrics, rngs, batch):
        grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
        (loss, logits), grads = grad_fn(model, rngs, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(model, grads)

    rngs, history = nnx.Rngs(0), []
    model.train()
    for batch in digits():
        train_step(model, optimizer, metrics, rngs, batch)
        history.append(metrics.compute())
        metrics.reset()
    falls([each["loss"] for each in history])
    assert np.mean([each["accuracy"] for each in history[-5:]]) > 0.8


# The quick start of linen, and its guide to batch normalisation: a `TrainState` that
# carries metrics and statistics.


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(features=4, kernel_size=(3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.avg_pool(nn.relu(x), window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(features=8, kernel_size=(3, 3))(x)
        x = nn.avg_pool(nn.relu(x), window_shape=(2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(features=16)(x.reshape((x.shape[0], -1))))
        return nn.Dense(features=4)(x)


@struct.dataclass
class Metrics:
    total: jax.Array
    count: jax.Array

    @classmethod
    def empty(cls):
        return cls(total=jnp.zeros(()), count=jnp.zeros(()))

    def merge(self, loss):
        return Metrics(self.total + loss, self.count + 1)


class TrainState(train_state.TrainState):
    metrics: Metrics
    batch_stats: Any


@every_alias
def test_the_train_state_of_linen(name):
    module = LinenCNN()
    variables = module.init(jax.random.key(0), jnp.ones([1, 8, 8, 1]), train=False)
    state = TrainState.create(
        apply_fn=module.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=OPTIMIZERS[name](),
        metrics=Metrics.empty(),
    )

    @jax.jit
    def train_step(state, batch):
        def loss_fn(params):
            logits, updates = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                x=batch["image"],
                train=True,
                mutable=["batch_stats"],
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(
                logits=logits, labels=batch["label"]
            ).mean()
            return loss, updates

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, updates), grads = grad_fn(state.params)
        state = state.apply_gradients(grads=grads)
        return state.replace(
            batch_stats=updates["batch_stats"], metrics=state.metrics.merge(loss)
        )

    losses = []
    for batch in digits():
        state = train_step(state, batch)
        losses.append(float(state.metrics.total / state.metrics.count))
        state = state.replace(metrics=Metrics.empty())
    falls(losses)


# nnx on many devices. A mesh made by `jax.sharding.Mesh` has Auto axes.


class MLP(nnx.Module):
    def __init__(self, din, dmid, dout, *, rngs):
        self.linear1 = nnx.Linear(din, dmid, rngs=rngs)
        self.linear2 = nnx.Linear(dmid, dout, rngs=rngs)

    def __call__(self, x):
        return self.linear2(nnx.relu(self.linear1(x)))


def mean_square(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def train_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(mean_square)(model, x, y)
    optimizer.update(model, grads)
    return loss


@pytest.mark.slow
@every_alias
def test_data_parallel_training_in_nnx(name):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    model_sharding = NamedSharding(mesh, P())
    data_sharding = NamedSharding(mesh, P("data"))
    model = MLP(1, 64, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)

    # The state is made on one device and replicated then.
    state = nnx.state((model, optimizer))
    nnx.update((model, optimizer), jax.device_put(state, model_sharding))

    losses = []
    for x, y in curve():
        x, y = jax.device_put((x, y), data_sharding)
        losses.append(float(train_step(model, optimizer, x, y)))
    falls(losses)
    assert model.linear1.kernel[...].sharding.is_equivalent_to(model_sharding, 2)

    state = jax.device_get(nnx.state((model, optimizer)))
    nnx.update((model, optimizer), state)
    assert mean_square(model, *curve()[-1]) < 2 * np.mean(losses[-5:]) + 0.05


class AnnotatedMLP(nnx.Module):
    def __init__(self, din, dmid, dout, rngs):
        init = nnx.initializers.lecun_normal()
        parts = lambda f, names: nnx.with_partitioning(f, names)
        self.w1 = nnx.Param(parts(init, (None, "model"))(rngs.params(), (din, dmid)))
        self.b1 = nnx.Param(
            parts(nnx.initializers.zeros_init(), ("model",))(rngs.params(), (dmid,))
        )
        self.w2 = nnx.Param(parts(init, ("model", None))(rngs.params(), (dmid, dout)))

    def __call__(self, x):
        return nnx.relu(x @ self.w1 + self.b1) @ self.w2


@every_alias
def test_fsdp_and_tensor_parallel_training_in_nnx(name):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)

    @nnx.jit
    def create_model():
        model = AnnotatedMLP(1, 32, 1, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)
        return model, optimizer

    with jax.set_mesh(mesh):
        model, optimizer = create_model()
    losses = []
    for x, y in curve():
        x, y = jax.device_put((x, y), NamedSharding(mesh, P("data")))
        losses.append(float(train_step(model, optimizer, x, y)))
    falls(losses)


class DotReluDot(nnx.Module):
    def __init__(self, depth, rngs):
        init_fn = nnx.initializers.lecun_normal()
        self.dot1 = nnx.Linear(
            depth,
            depth,
            kernel_init=nnx.with_partitioning(init_fn, (None, "model")),
            use_bias=False,
            rngs=rngs,
        )
        self.w2 = nnx.Param(
            nnx.with_partitioning(init_fn, ("model", None))(
                rngs.params(), (depth, depth)
            )
        )

    def __call__(self, x):
        y = jax.nn.relu(self.dot1(x))
        y = jax.lax.with_sharding_constraint(y, P("data", "model"))
        return jnp.dot(y, self.w2[...])


class MultiDotReluDot(nnx.Module):
    def __init__(self, depth, num_layers, rngs):
        @nnx.split_rngs(splits=num_layers)
        @nnx.vmap(in_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        def create_sublayers(rngs):
            return DotReluDot(depth, rngs)

        self.layers = create_sublayers(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), transform_metadata={nnx.PARTITION_NAME: None})
        def scan_over_layers(x, layer):
            return layer(x), None

        return scan_over_layers(x, self.layers)[0]


@pytest.mark.slow
@every_alias
def test_scaling_up_in_nnx_with_a_scan_over_layers(name):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        rngs = nnx.Rngs(0)
        data = NamedSharding(mesh, P("data", None))
        x = jax.device_put(jax.random.normal(rngs.params(), (8, 16)), data)
        y = jax.device_put(jax.random.normal(rngs.params(), (8, 16)), data)
        model = nnx.jit(lambda: MultiDotReluDot(16, 2, rngs=nnx.Rngs(0)))()
        optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)
        where = model.layers.w2[...].sharding
        assert not where.is_fully_replicated
        losses = [float(train_step(model, optimizer, x, y)) for _ in range(STEPS)]
    falls(losses)
    assert model.layers.w2[...].sharding.is_equivalent_to(where, 3)


# linen on many devices: `jax.jit` is told by shardings that the boxes give.


class LinenDotReluDot(nn.Module):
    depth: int
    mesh: Any

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.xavier_normal()
        on = lambda *names: NamedSharding(self.mesh, P(*names))
        y = nn.Dense(
            self.depth,
            kernel_init=nn.with_partitioning(init, (None, "model")),
            use_bias=False,
        )(x)
        y = jax.lax.with_sharding_constraint(jax.nn.relu(y), on("data", "model"))
        w2 = self.param(
            "W2",
            nn.with_partitioning(init, ("model", None)),
            (self.depth, x.shape[-1]),
        )
        return jax.lax.with_sharding_constraint(jnp.dot(y, w2), on("data", None))


@pytest.mark.slow
@every_alias
def test_scaling_up_in_linen(name):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    x_sharding = NamedSharding(mesh, P("data", None))
    key = jax.random.key(0)
    x = jax.device_put(jax.random.normal(key, (8, 16)), x_sharding)
    model = LinenDotReluDot(16, mesh)
    tx = OPTIMIZERS[name]()

    def init_fn(key, x, model, optimizer):
        variables = model.init(key, x)
        return train_state.TrainState.create(
            apply_fn=model.apply, params=variables["params"], tx=optimizer
        )

    abstract = jax.eval_shape(
        functools.partial(init_fn, model=model, optimizer=tx), key, x
    )
    state_sharding = nn.get_sharding(abstract, mesh)
    state = jax.jit(
        init_fn,
        static_argnums=(2, 3),
        in_shardings=(NamedSharding(mesh, P()), x_sharding),
        out_shardings=state_sharding,
    )(key, x, model, tx)

    @functools.partial(
        jax.jit,
        in_shardings=(state_sharding, x_sharding),
        out_shardings=(state_sharding, None),
    )
    def train_step(state, x):
        def loss_fn(params):
            return jnp.mean((model.apply({"params": params}, x) - jnp.sin(x)) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(STEPS):
        state, loss = train_step(state, x)
        losses.append(float(loss))
    falls(losses)


# Gradient accumulation, from the optimization cookbook, and the guide to checkpoints.


@every_alias
def test_gradient_accumulation(name):
    model = MLP(1, 16, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model,
        tx=optax.MultiSteps(OPTIMIZERS[name](), every_k_schedule=3),
        wrt=nnx.Param,
    )
    batches = curve() * 3
    falls([float(train_step(model, optimizer, x, y)) for x, y in batches])


@pytest.mark.slow
@every_alias
def test_checkpoints(name, tmp_path):
    make = lambda: MLP(1, 16, 1, rngs=nnx.Rngs(0))
    model = make()
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)
    half = STEPS // 2
    losses = [float(train_step(model, optimizer, x, y)) for x, y in curve()[:half]]
    _, state = nnx.split((model, optimizer))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(state))

    def abstract():
        model = make()
        return model, nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)

    graphdef, target = nnx.split(nnx.eval_shape(abstract))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", nnx.to_pure_dict(target))
    nnx.replace_by_pure_dict(target, restored)
    again, resumed = nnx.merge(graphdef, target)
    for x, y in curve()[half:]:
        losses.append(float(train_step(again, resumed, x, y)))
        assert train_step(model, optimizer, x, y) == losses[-1]
    falls(losses)
