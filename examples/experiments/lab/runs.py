"""The runs of one command: what the results do not hold yet is trained."""

import math
import os

import jax
import optax

import efcp_jax
from lab.optimizers import Spec
from lab.results import Results
from lab.training import Trainer
from lab.workload import Workload


# Learning rates at which a search ends, wherever the best one lies.
MOST_RATES = 9


class Runs:
    """The runs of one workload.

    Args:
        args: What the command was called with.
        workload: What is trained.
        steps: Steps of a run.
        evaluations: Points of its curve.
        store: What there is already, and where runs are added.
    """

    def __init__(
        self, args, workload: Workload, steps: int, evaluations: int, store: Results
    ):
        self.args, self.workload, self.store = args, workload, store
        self.steps, self.evaluations = steps, evaluations

    def mean(self, spec: Spec, peak: float, trainer: Trainer, seeds: int) -> float:
        """Train seeds 0, 1, ... and return the mean of their losses, or infinity."""
        together = trainer.together
        for first in range(0, seeds, together):
            self._train(spec, peak, trainer, range(first, first + together))
        losses = [
            self.store[self._config(spec, peak, seed)]["loss"] for seed in range(seeds)
        ]
        return math.inf if None in losses else sum(losses) / seeds

    def search(
        self, spec: Spec, means: dict[float, float], factor: float, trainer: Trainer
    ) -> None:
        """Add learning rates beyond the end of the grid at which the best one lies."""
        while len(means) < MOST_RATES:
            best = min(means, key=means.__getitem__)
            if best not in (min(means), max(means)) or means[best] == math.inf:
                return
            peak = best * factor if best == max(means) else best / factor
            peak = float(f"{peak:.3g}")
            means[peak] = self.mean(spec, peak, trainer, self.args.seeds)

    def _train(self, spec: Spec, peak: float, trainer: Trainer, seeds: range) -> None:
        configs = [self._config(spec, peak, seed) for seed in seeds]
        title = f"{spec} lr {peak:g} seeds {','.join(map(str, seeds))}"
        if all(config in self.store for config in configs):
            print(f"{title}: there already", flush=True)
            return
        outcomes = trainer.run(peak, seeds, self.steps, self.evaluations, title)
        each, parameters = trainer.size
        fixed = {
            "bytes_per_parameter": round(each, 4),
            "parameters": parameters,
            "machine": _machine(trainer.together),
        }
        pairs = zip(configs, outcomes, strict=True)
        self.store.add([{"config": c, **outcome, **fixed} for c, outcome in pairs])
        print(f"{title}: {_line(outcomes)}", flush=True)

    def _config(self, spec: Spec, peak: float, seed: int):
        """Return everything that a result depends on, beside the versions."""
        return {
            "workload": self.workload.name,
            **self.workload.config,
            "optimizer": spec.name,
            "settings": spec.settings,
            "learning_rate": peak,
            "schedule": self.args.schedule,
            "warmup": self.args.warmup,
            "steps": self.steps,
            "evaluations": self.evaluations,
            "seed": seed,
        }


def _machine(together: int):
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "batch_seeds": together,
        "efcp_jax": efcp_jax.__version__,
        "jax": jax.__version__,
        "optax": optax.__version__,
    }


def _line(outcomes):
    """Return the outcome of some seeds in a line."""
    means = {
        name: sum(each[name] for each in outcomes) / len(outcomes)
        for name in ("loss", "accuracy", "error", "seconds")
        if name in outcomes[0]
    }
    seconds = means.pop("seconds")
    told = [f"{name} {mean:.4f}" for name, mean in means.items()]
    return f"{', '.join(told)}, {seconds:.1f} s a run"
