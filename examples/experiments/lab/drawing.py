"""What figures have in common: axes, legends, and small files."""

import io

import matplotlib
import numpy as np
from PIL import Image


matplotlib.use("Agg")

from matplotlib import pyplot as plt, ticker


DPI = 80
PALETTE = 160  # colours of a file
COLORS = plt.get_cmap("tab10").colors  # pyright: ignore[reportAttributeAccessIssue]
_DTYPES = {None: "float32", "bfloat16": "bf16"}
LOG = 8  # ratio of losses from which their axis is logarithmic


def finite(lines):
    """Leave out what has diverged, which no axis has room for."""
    return [line for line in lines if np.isfinite(line.values("loss")).all()]


def in_legend(spec):
    """Return a specification as a legend has room for it."""
    settings = dict(spec.settings)
    words = []
    if isinstance(settings.get("metric"), bool):
        words.append("metric" if settings.pop("metric") else "no metric")
    if "window_size" in settings:
        words.append(f"m={settings.pop('window_size')}")
    dtypes = [settings.pop(f"{of}_dtype", None) for of in ("value", "error")]
    if any(dtypes):
        words.append("/".join(_DTYPES.get(each) or str(each) for each in dtypes))
    if settings.pop("error_feedback", None) is False:
        words.append("no feedback")
    words += [f"{key}={value}" for key, value in settings.items()]
    return ", ".join([spec.name, *words])


def plain(axis):
    """Label a logarithmic axis of less than two decades by numbers in full."""
    low, high = axis.get_xlim()
    if high / low < 100:
        ticks = [n * 10**e for e in range(-9, 10) for n in (1, 2, 3, 5)]
        axis.xaxis.set_major_locator(ticker.FixedLocator(ticks))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_xlim(low, high)


def label_loss(axis, table):
    """Label the axis of losses, logarithmic where they span much."""
    low, high = axis.dataLim.y0, axis.dataLim.y1
    if low > 0 and high / low > LOG:
        axis.set_yscale("log")
    unit = table.setup.get("unit")
    axis.set_ylabel(f"{unit} of the loss" if unit else "loss on held-out data")


def legend_below(figure, axis):
    """Put one legend under both axes, in a figure that grows with it."""
    handles, labels = axis.get_legend_handles_labels()
    if not labels:
        return figure
    columns = 4 if max(map(len, labels)) < 26 else 2
    inches = 0.15 + 0.17 * -(-len(labels) // columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + inches)
    figure.tight_layout(rect=(0, inches / (height + inches), 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=columns, fontsize=7)
    return figure


def save(figure, path) -> None:
    """Write a figure as a small PNG, of few colours."""
    whole = io.BytesIO()
    figure.savefig(whole, dpi=DPI)
    plt.close(figure)
    Image.open(whole).convert("RGB").quantize(PALETTE).save(path, optimize=True)
