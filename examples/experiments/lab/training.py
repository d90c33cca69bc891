"""The compiled training loop, over several seeds at once where that is asked for."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import efcp_jax
from lab.workload import Workload


class Trainer:
    """One workload with one optimizer, for any learning rate and any seeds.

    The learning rate is an argument of what is compiled, so that a grid of them is
    compiled once.

    Args:
        workload: What is trained.
        optimizer: From the peak of the learning rate, traced, to the optimizer.
        together: Seeds that are trained at once by `jax.vmap`; 1 compiles no batching.
        scan: Whether many steps are compiled into one `jax.lax.scan`. None for all but
            convolutions on CPUs, which are 15 to 20 times slower in a compiled loop.
    """

    def __init__(
        self,
        workload: Workload,
        optimizer: Callable[[Any], optax.GradientTransformation],
        together: int = 1,
        scan: bool | None = None,
    ):
        self.workload = workload
        self.optimizer = optimizer
        self.together = together
        slow = workload.convolutions and jax.default_backend() == "cpu"
        self.scan = not slow if scan is None else scan
        over = lambda function, *axes: (
            jax.vmap(function, in_axes=axes) if together > 1 else function
        )
        self._step = over(self._step_of_one, 0, 0, None, 0, None, None)
        loop = self._scanned if self.scan else self._step
        # Donated, the window is updated in place.
        self._loop = jax.jit(loop, donate_argnums=0)
        self._init = jax.jit(over(self._start, 0, None))
        self._evaluate = jax.jit(over(workload.evaluate, 0, 0, None, None))
        self._compiled: Any = None

    @functools.cached_property
    def size(self) -> tuple[float, int]:
        """The bytes of state a parameter, and the number of parameters."""
        params, _ = jax.eval_shape(self.workload.init, jax.random.key(0))
        report = efcp_jax.memory_report(self.optimizer(1.0), params)
        return report.per_parameter, report.parameters

    def run(
        self,
        peak: float,
        seeds: Sequence[int],
        steps: int,
        evaluations: int,
        title: str = "",
    ) -> list[dict[str, Any]]:
        """Train `together` seeds and return what each of them is judged by."""
        return self.fit(peak, seeds, steps, evaluations, title)[0]

    def fit(self, peak, seeds, steps, evaluations, title=""):
        """Train, and return the outcome of every seed, parameters and statistics.

        Compilation and evaluation are not in the seconds. Seeds that are trained at
        once share them.
        """
        between = steps // evaluations
        chunk = divisor(between, self.workload.chunk)
        carry, streams, fixed = self._begin(peak, seeds)
        curve: dict[str, list] = {"step": [], "seconds": [], "train_loss": []}
        held_out, losses, seconds = [], [], 0.0
        with tqdm(total=steps, desc=title, unit="step", leave=False) as progress:
            for first in range(0, steps, chunk):
                numbers = np.arange(first, first + chunk, dtype=np.int32)
                carry, loss, spent = self._chunk(carry, streams, numbers, fixed)
                seconds += spent
                losses.append(loss)
                progress.update(chunk)
                if (first + chunk) % between:
                    continue
                held_out.append(self._on(self.workload.evaluations(), carry))
                curve["step"].append(first + chunk)
                curve["seconds"].append(seconds / len(seeds))
                curve["train_loss"].append(np.concatenate(losses).mean(axis=0))
                losses = []
                mean = float(np.mean(held_out[-1]["loss"]))
                progress.set_postfix(loss=f"{mean:.4f}", refresh=False)
                if not np.isfinite(held_out[-1]["loss"]).any():
                    break  # it does not come back
        outcomes = [_result(i, curve, held_out) for i in range(len(seeds))]
        if self.workload.tests is not None:
            test = self._on(self.workload.tests(), carry)
            for i, outcome in enumerate(outcomes):
                outcome |= {f"test_{k}": float(f"{v[i]:.6g}") for k, v in test.items()}
        step_bytes = self._step_bytes() // len(seeds)
        outcomes = [outcome | {"step_bytes": step_bytes} for outcome in outcomes]
        return outcomes, carry[0], carry[1]

    def losses(self, peak: float, seed: int, steps: int) -> Iterator[float]:
        """Train one seed and yield the loss before every step."""
        carry, streams, fixed = self._begin(peak, [seed])
        chunk = divisor(steps, self.workload.chunk)
        for first in range(0, steps, chunk):
            numbers = np.arange(first, first + chunk, dtype=np.int32)
            carry, loss, _ = self._chunk(carry, streams, numbers, fixed)
            yield from loss[:, 0]

    def _begin(self, peak, seeds):
        """Return the first carry, the streams of batches, and what stays as it is."""
        streams = [self.workload.batches(np.random.default_rng(s)) for s in seeds]
        keys = self._stack([jax.random.key(seed) for seed in seeds])
        fixed = (keys, self.workload.data, jnp.float32(peak))
        return self._init(keys, fixed[-1]), streams, fixed

    def _step_bytes(self) -> int:
        """Return what a step holds at once beside the data set, as XLA plans it."""
        memory = self._compiled.memory_analysis()
        whole = memory.argument_size_in_bytes + memory.output_size_in_bytes
        whole += memory.temp_size_in_bytes - memory.alias_size_in_bytes
        return whole - sum(leaf.nbytes for leaf in jax.tree.leaves(self.workload.data))

    def _on(self, items: Iterable[Any], carry: Any) -> dict[str, np.ndarray]:
        """Return the mean loss, and others, on `items`, one a seed."""
        params, statistics, _ = carry
        total: dict[str, Any] = {}
        for item in items:
            sums = self._evaluate(params, statistics, self.workload.data, item)
            total = {
                name: total.get(name, 0.0) + np.asarray(value, np.float64)
                for name, value in sums.items()
            }
        count = total.pop("count")
        return {name: np.atleast_1d(each / count) for name, each in total.items()}

    def _start(self, key, peak):
        params, statistics = self.workload.init(key)
        return params, statistics, self.optimizer(peak).init(params)

    def _step_of_one(self, carry, item, number, key, data, peak):
        params, statistics, state = carry
        batch = self.workload.batch(data, item, jax.random.fold_in(key, number))
        gradient_of = jax.value_and_grad(self.workload.loss, has_aux=True)
        (loss, after), gradient = gradient_of(params, statistics, batch)
        # What line searches take, and all others ignore.
        value_fn = lambda params: self.workload.loss(params, statistics, batch)[0]
        extra = {"value": loss, "grad": gradient, "value_fn": value_fn}
        tx = optax.with_extra_args_support(self.optimizer(peak))
        updates, state = tx.update(gradient, state, params, **extra)
        return (optax.apply_updates(params, updates), after, state), loss

    def _scanned(self, carry, items, numbers, *fixed):
        step = lambda carry, each: self._step(carry, *each, *fixed)
        return jax.lax.scan(step, carry, (items, numbers))

    def _chunk(self, carry, streams, numbers, fixed):
        """Make some steps and return the carry, losses `(steps, seeds)` and seconds."""
        items = [self._stack([next(s) for s in streams]) for _ in numbers]
        if self.scan:
            stacked = jax.tree.map(lambda *each: np.stack(each), *items)
            calls = [(stacked, numbers)]
        else:
            calls = list(zip(items, numbers, strict=True))
        if self._compiled is None:
            lowered = self._loop.lower(carry, *calls[0], *fixed)
            self._compiled = lowered.compile()
        losses = []
        start = time.perf_counter()
        for call in calls:
            carry, loss = self._compiled(carry, *call, *fixed)
            losses.append(loss)
        jax.block_until_ready((carry, losses))
        seconds = time.perf_counter() - start
        return carry, np.stack(losses).reshape(len(numbers), -1), seconds

    def _stack(self, trees):
        """Return one tree for the seeds: stacked, or the only one."""
        if self.together == 1:
            return trees[0]
        on_host = isinstance(jax.tree.leaves(trees)[0], np.ndarray)
        stack = np.stack if on_host else jnp.stack
        return jax.tree.map(lambda *each: stack(each), *trees)


def _result(i, curve, held_out):
    """Return the curves of seed `i` and where they end, to six digits."""
    curve = curve | {"train_loss": [each[i] for each in curve["train_loss"]]}
    for name in held_out[0]:
        curve[name] = [each[name][i] for each in held_out]
    for name in curve.keys() - {"step"}:
        curve[name] = [float(f"{value:.6g}") for value in curve[name]]
    ends = {k: curve[k][-1] for k in (*held_out[0], "train_loss", "seconds")}
    # The median, which a machine that was busy for a while does not change.
    spans = (np.diff(curve[name], prepend=0) for name in ("seconds", "step"))
    milliseconds = 1e3 * np.median(np.divide(*spans))
    return {
        **ends,
        "diverged": not math.isfinite(ends["loss"]),
        "milliseconds_per_step": float(f"{milliseconds:.6g}"),
        "curve": curve,
    }


def divisor(number: int, most: int) -> int:
    """Return the largest divisor of `number` that is at most `most`."""
    return max(d for d in range(1, min(number, most) + 1) if number % d == 0)
