"""A figure of dense rows beside compressed ones: what they reach, and in what time."""

import numpy as np

from lab.drawing import COLORS, finite, label_loss, legend_below, plain, plt
from lab.optimizers import ALIASES, Spec
from lab.summary import Line, Table


FAMILIES = {"mfac": ("M-FAC", COLORS[0]), "ggt": ("GGT", COLORS[1])}
# How rows are kept: line, marker, and whether it is filled.
ROWS = {
    "dense": ("-", "o", True),
    "sparse": ("--", "s", True),
    "low rank": (":", "^", True),
    "sparse, no feedback": ("--", "s", False),
    "low rank, no feedback": (":", "^", False),
}
BASELINES = (
    *(("-", "D"), ("--", "P"), (":", "X"), ("-.", "v")),
    *(((0, (1, 3)), "*"), ((0, (6, 1, 1, 1, 1, 1)), "<")),
)


def draw(table: Table):
    """Draw accuracy (or error) against bytes, and loss against seconds.

    Of every family and kind of rows the line of lowest loss. None where no family has
    dense and compressed rows.
    """
    chosen: dict[tuple[str, str], Line] = {}
    lines = sorted(finite(table.best()), key=lambda each: each.values("loss").mean())
    for line in lines:
        chosen.setdefault(kind(line.spec), line)
    if not any(
        (family, "dense") in chosen
        and any(f == family and rows != "dense" for f, rows in chosen)
        for family in FAMILIES
    ):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    name = _figure_of_merit(list(chosen.values()))
    for (label, style, filled), line in zip(
        _styles(chosen), chosen.values(), strict=True
    ):
        _point(axes[0], line, name, label, style, filled)
        x, loss = line.curve("step").mean(axis=0) * line.pace(), line.curve("loss")
        color = style["color"]
        face = {"markerfacecolor": color if filled else "white", "markevery": [-1]}
        axes[1].plot(x, loss.mean(axis=0), **face, **style)
        axes[1].fill_between(
            x, loss.min(axis=0), loss.max(axis=0), alpha=0.1, color=color
        )
    unit = table.setup.get("unit")
    head = f"{unit} of the error" if unit and name == "error" else name
    head = head.replace("_", " ")
    axes[0].set(xscale="log", xlabel="bytes of state a parameter", ylabel=head)
    axes[1].set(xscale="log", xlabel="seconds")
    for axis in axes:
        axis.grid(alpha=0.3)
        plain(axis)
    label_loss(axes[1], table)
    return legend_below(figure, axes[0])


def kind(spec: Spec) -> tuple[str, str]:
    """Return the family and how rows are kept, or the name of a baseline twice."""
    if spec.name not in ALIASES:
        return spec.name, spec.name
    rows, _, family = spec.name.rpartition("_")
    rows = rows.replace("_", " ") or "dense"
    if spec.settings.get("error_feedback") is False:
        rows += ", no feedback"
    return family, rows


def _styles(chosen):
    """Yield label, style and whether markers are filled, of each that was chosen."""
    baselines = 0
    for family, rows in chosen:
        if family in FAMILIES:
            title, color = FAMILIES[family]
            line, marker, filled = ROWS[rows]
            label = f"{title}, {rows}"
        else:
            line, marker = BASELINES[baselines % len(BASELINES)]
            color, filled, label = ("0.35", True, family)
            baselines += 1
        yield label, {"color": color, "linestyle": line, "marker": marker}, filled


def _figure_of_merit(lines):
    """Return what all lines have: the accuracy on a test set, or else."""
    for name in ("test_accuracy", "accuracy", "error"):
        if all(name in run for line in lines for run in line.runs):
            return name
    return "loss"


def _point(axis, line, name, label, style, filled):
    values = line.values(name)
    bars = np.abs(values.mean() - np.array([[values.min()], [values.max()]]))
    axis.errorbar(
        max(line.runs[0]["bytes_per_parameter"], 0.1),  # logarithmic
        values.mean(),
        yerr=bars,
        label=label,
        markerfacecolor=style["color"] if filled else "white",
        **style,
    )
