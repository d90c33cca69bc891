"""What runs say together: means and spreads over seeds, the best learning rate."""

from collections import defaultdict
from collections.abc import Callable
import json
import math
from typing import Any, NamedTuple

import numpy as np

from lab.optimizers import Spec


# What may differ between the runs of one table.
OWN = ("optimizer", "settings", "learning_rate", "seed")


class Line(NamedTuple):
    """An optimizer with its settings at one learning rate, over seeds.

    Attributes:
        spec: The optimizer and its settings.
        learning_rate: The peak.
        runs: The run of every seed.
    """

    spec: Spec
    learning_rate: float
    runs: list[dict[str, Any]]

    def values(self, name: str) -> np.ndarray:
        """Return a number of every seed; infinity where a loss has none."""
        return np.array([math.inf if r[name] is None else r[name] for r in self.runs])

    def curve(self, name: str) -> np.ndarray:
        """Return the curves of the seeds, `(seeds, points)`, gaps where they end."""
        curves = [
            [math.nan if v is None else v for v in run["curve"][name]]
            for run in self.runs
        ]
        longest = max(map(len, curves))
        return np.array([c + [math.nan] * (longest - len(c)) for c in curves])

    def pace(self) -> float:
        """Return the seconds of a step, the median of the runs."""
        return float(np.median(self.values("milliseconds_per_step"))) / 1e3


class Table(NamedTuple):
    """The runs of one workload that differ in nothing but their optimizers.

    Attributes:
        setup: The configuration that they share.
        lines: Every learning rate of every specification.
    """

    setup: dict[str, Any]
    lines: list[Line]

    def of(self, spec: Spec) -> list[Line]:
        """Return the lines of a specification, by their learning rates."""
        return [line for line in self.lines if line.spec == spec]

    def best(self) -> list[Line]:
        """Return the learning rate of lowest mean loss of every specification.

        Those with fewer seeds than another learning rate do not count.
        """
        specs = list({str(line.spec): line.spec for line in self.lines}.values())
        lines = []
        for spec in specs:
            most = max(len(line.runs) for line in self.of(spec))
            full = [line for line in self.of(spec) if len(line.runs) == most]
            lines.append(min(full, key=lambda line: line.values("loss").mean()))
        return lines

    def at_edge(self, line: Line) -> bool:
        """Return whether a better learning rate may lie outside of the grid."""
        rates = [each.learning_rate for each in self.of(line.spec)]
        return len(rates) > 1 and line.learning_rate in (min(rates), max(rates))


def tables(runs: list[dict[str, Any]]) -> list[Table]:
    """Return the tables of runs, in the order of their workloads."""
    by_setup: dict[str, list] = defaultdict(list)
    for run in runs:
        setup = {k: v for k, v in run["config"].items() if k not in OWN}
        by_setup[json.dumps(setup, sort_keys=True)].append(run)
    result = []
    for text, each in sorted(by_setup.items()):
        by_line: dict[tuple[str, float], list] = defaultdict(list)
        for run in each:
            config = run["config"]
            spec = Spec(config["optimizer"], config["settings"])
            by_line[str(spec), config["learning_rate"]].append(run)
        lines = []
        for (_, rate), same in sorted(by_line.items()):
            config = same[0]["config"]
            spec = Spec(config["optimizer"], config["settings"])
            lines.append(
                Line(spec, rate, sorted(same, key=lambda r: r["config"]["seed"]))
            )
        result.append(Table(json.loads(text), lines))
    return result


def markdown(table: Table) -> str:
    """Return a table in Markdown, the lowest loss first."""
    setup = dict(table.setup)
    columns = _columns(table)
    edge = lambda line: " *" if table.at_edge(line) else ""
    lines = sorted(table.best(), key=lambda each: each.values("loss").mean())
    rows = [
        f"**{setup.pop('workload')}**: "
        + ", ".join(f"{key} {value}" for key, value in setup.items()),
        "",
        _row(["optimizer", "learning rate", *columns]),
        "|---" * (2 + len(columns)) + "|",
    ]
    for line in lines:
        given = [f"`{line.spec}`", f"{line.learning_rate:g}{edge(line)}"]
        rows.append(_row(given + [cell(line) for cell in columns.values()]))
    tried = sorted({len(table.of(line.spec)) for line in lines})
    rows += [
        "",
        "Mean ± standard deviation over seeds, on the held-out data that the learning"
        f" rate, of {' or '.join(map(str, tried))} tried, was chosen on.",
    ]
    if any(map(edge, lines)):
        rows.append("`*`: at the edge of its grid; a better one may lie outside.")
    return "\n".join(rows)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _columns(table: Table) -> dict[str, Callable[[Line], str]]:
    """Return what is told of a line, by the heads of columns."""
    of_seeds = lambda name, form: lambda line: spread(line.values(name), form)
    runs = [run for line in table.lines for run in line.runs]
    columns = {"loss": of_seeds("loss", ".4g")}
    for name in ("accuracy", "error"):
        if all(name in run for run in runs):
            columns[name] = of_seeds(name, ".4f")
    if all("test_loss" in run for run in runs):
        columns |= {
            "test loss": of_seeds("test_loss", ".4g"),
            "test accuracy": of_seeds("test_accuracy", ".4f"),
        }
    columns |= {
        "bytes a parameter": lambda line: f"{line.runs[0]['bytes_per_parameter']:.1f}",
        "ms a step": lambda line: f"{1e3 * line.pace():.2f}",
    }
    if all("step_bytes" in run for run in runs):
        held = lambda line: np.median(line.values("step_bytes")) / 1e6
        columns["MB of a step"] = lambda line: f"{held(line):.1f}"
    each = lambda line: " ".join(f"{value:.4g}" for value in line.values("loss"))
    return columns | {"loss of every seed": each}


def spread(values: np.ndarray, form: str) -> str:
    """Return the mean, and the standard deviation where there are several."""
    if not np.isfinite(values).all():
        return f"diverged ({np.sum(~np.isfinite(values))} of {len(values)})"
    text = f"{values.mean():{form}}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1):.1g}"
    return text
