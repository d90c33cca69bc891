"""Results made small enough to be kept: all numbers, few points of few curves."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lab import results
from lab.summary import tables


CURVES = ("step", "loss")  # what figures draw


def thin(runs: list[dict[str, Any]], points: int = 12) -> list[dict[str, Any]]:
    """Return the runs with what tables and figures are made of.

    Curves are kept of the best learning rate of every optimizer alone, `points` of
    them with the first and the last, to four digits.
    """
    kept = []
    for table in tables(runs):
        best = {(str(line.spec), line.learning_rate) for line in table.best()}
        for line in table.lines:
            drawn = (str(line.spec), line.learning_rate) in best
            for run in line.runs:
                curve = _curve(run["curve"], points) if drawn else {}
                kept.append({**run, "curve": curve})
                if not drawn:
                    kept[-1].pop("machine", None)
    return kept


def _curve(curve, points):
    last = len(curve["step"]) - 1
    index = sorted({round(i) for i in np.linspace(0, last, min(points, last + 1))})
    number = lambda x: x if x is None or isinstance(x, int) else float(f"{x:.4g}")
    return {name: [number(curve[name][i]) for i in index] for name in CURVES}


def write(runs: list[dict[str, Any]], path: Path) -> None:
    """Write runs as a file of results, a line each."""
    lines = [
        f"{json.dumps(results.key(run['config']))}:"
        f"{json.dumps(run, separators=(',', ':'), allow_nan=False)}"
        for run in runs
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(sorted(lines)) + "\n}\n")
