"""Figures of a table: curves, memory, feedback and sensitivity."""

import numpy as np

from lab.drawing import COLORS, finite, in_legend, label_loss, legend_below, plain, plt
from lab.optimizers import ALIASES, REGISTRY, Spec
from lab.summary import Line, Table


MOST = 12  # lines that can be told apart, those of lowest loss
STYLES = ("-", "--", ":", "-.")


def curves(table: Table):
    """Draw the loss against steps and against seconds, at the best learning rates."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for i, line in enumerate(_lowest(table)):
        loss = line.curve("loss")
        style = {"color": COLORS[i % 10], "linestyle": STYLES[i // 10 % 4]}
        step = line.curve("step").mean(axis=0)
        for axis, x in zip(axes, (step, step * line.pace()), strict=True):
            axis.plot(x, loss.mean(axis=0), label=in_legend(line.spec), **style)
            axis.fill_between(
                x, loss.min(axis=0), loss.max(axis=0), alpha=0.15, color=style["color"]
            )
    for axis, name in zip(axes, ("step", "seconds"), strict=True):
        axis.set(xlabel=name)
        axis.grid(alpha=0.3)
    label_loss(axes[0], table)
    return legend_below(figure, axes[0])


def memory(table: Table):
    """Draw loss and accuracy, or error, against the bytes of state a parameter."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    runs = [run for line in table.lines for run in line.runs]
    names = ("loss", "accuracy" if "accuracy" in runs[0] else "error")
    for i, line in enumerate(_lowest(table)):
        x = max(line.runs[0]["bytes_per_parameter"], 0.1)  # logarithmic
        style = {"color": COLORS[i % 10], "marker": "osD^"[i // 10 % 4]}
        for axis, name in zip(axes, names, strict=True):
            values = line.values(name)
            bars = [[values.mean() - values.min()], [values.max() - values.mean()]]
            axis.errorbar(
                x,
                values.mean(),
                yerr=bars,
                linestyle="",
                label=in_legend(line.spec),
                **style,
            )
    for axis, name in zip(axes, names, strict=True):
        unit = table.setup.get("unit")
        label = f"{unit} of the {name}" if unit else name
        axis.set(xscale="log", xlabel="bytes of state a parameter", ylabel=label)
        axis.grid(alpha=0.3)
        plain(axis)
    label_loss(axes[0], table)
    return legend_below(figure, axes[0])


def feedback(table: Table):
    """Draw the loss with and without error feedback; None without such a pair."""
    best = {str(line.spec): line for line in finite(table.best())}
    pairs = []
    for line in best.values():
        if line.spec.settings.get("error_feedback") is False:
            partner = best.get(str(_without(line.spec, "error_feedback")))
            if partner:
                pairs.append((partner, line))
    if not pairs:
        return None
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.7 * len(pairs)))
    names = [in_legend(with_feedback.spec) for with_feedback, _ in pairs]
    for offset, label in ((-0.2, "error feedback"), (0.2, "none")):
        lines = [pair[offset > 0] for pair in pairs]
        x = np.concatenate([line.values("loss") for line in lines])
        y = np.repeat(np.arange(len(pairs)), [len(line.runs) for line in lines])
        color = COLORS[offset > 0]
        axis.plot(x, y + offset, "o", color=color, ms=4, alpha=0.6, label=label)
        for at, line in enumerate(lines):
            axis.plot(line.values("loss").mean(), at + offset, "|", color=color, ms=14)
    axis.set(yticks=range(len(pairs)), yticklabels=names, xlabel="loss of every seed")
    axis.grid(alpha=0.3)
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure


def sensitivity(table: Table):
    """Draw the loss against the learning rate, and against damping or eps.

    None where neither was varied.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    best = table.best()
    for i, chosen in enumerate(_lowest(table)):
        lines = finite(table.of(chosen.spec))
        if len(lines) > 1:
            rates = np.array([line.learning_rate for line in lines])
            style = {"color": COLORS[i % 10], "linestyle": STYLES[i // 10 % 4]}
            centre = REGISTRY[chosen.spec.name].centre(chosen.spec.settings)
            _band(axes[0], rates / centre, lines, style, in_legend(chosen.spec))
    families: dict[str, list[tuple[float, Line]]] = {}
    for line in finite(best):
        name, value = damping(line.spec)
        if name:
            label = f"{in_legend(_without(line.spec, name))}, {name}"
            families.setdefault(label, []).append((value, line))
    for i, (label, family) in enumerate(sorted(families.items())):
        if len(family) > 1:
            family.sort(key=lambda each: each[0])
            values, lines = zip(*family, strict=True)
            _band(axes[1], np.array(values), lines, {"color": COLORS[i % 10]}, label)
    if not any(axis.lines for axis in axes):
        plt.close(figure)
        return None
    axes[0].set(xlabel="learning rate / centre of its grid")
    axes[1].set(xlabel="damping or eps, each at its best learning rate")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.set_xscale("log")
        else:
            axis.remove()
    if axes[0].lines:
        plain(axes[0])
    if axes[1].lines:
        axes[1].legend(fontsize=7)
    label_loss(axes[0] if axes[0].lines else axes[1], table)
    return legend_below(figure, axes[0])


def damping(spec: Spec) -> tuple[str, float]:
    """Return the name and the value of the damping that is set, or none."""
    name = "eps" if "ggt" in spec.name else "damping"
    value = spec.settings.get(name)
    return ("", 0.0) if value is None else (name, float(value))


def _without(spec, name):
    return Spec(spec.name, {k: v for k, v in spec.settings.items() if k != name})


def _lowest(table):
    """Return the best lines of the baselines, and of our optimizers of lowest loss."""
    lines = finite(table.best())
    lines.sort(key=lambda line: line.values("loss").mean())
    ours = [line for line in lines if line.spec.name in ALIASES]
    baselines = [line for line in lines if line.spec.name not in ALIASES]
    return baselines + ours[: MOST - len(baselines)]


def _band(axis, x, lines, style, label):
    losses = [line.values("loss") for line in lines]
    axis.plot(x, [v.mean() for v in losses], marker=".", label=label, **style)
    lowest, highest = [v.min() for v in losses], [v.max() for v in losses]
    axis.fill_between(x, lowest, highest, alpha=0.15, color=style["color"])


KINDS = {
    "curves": curves,
    "memory": memory,
    "feedback": feedback,
    "sensitivity": sensitivity,
}
