"""The curve of a learning rate range test."""

import numpy as np

from lab.drawing import COLORS, plt
from lab.ranges import Range


def rates(seen: Range, title: str):
    """Draw the loss against the learning rate, and what was chosen."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    axis.plot(seen.rates, seen.losses, color=COLORS[0], alpha=0.3, label="loss")
    axis.plot(seen.rates, seen.smoothed, color=COLORS[0], label="smoothed")
    axis.axvline(seen.turn, color="0.5", linestyle=":", label="lowest")
    axis.axvline(seen.rate, color=COLORS[1], label=f"chosen, {seen.rate:g}")
    low, high = seen.smoothed.min(), seen.smoothed[0]
    room = 0.3 * max(high - low, 1e-3 * abs(high))
    axis.set(xscale="log", xlabel="learning rate", ylabel="loss", title=title)
    if low > 0 and high / low > 30:
        axis.set(yscale="log", ylim=(low / 3, np.max(seen.smoothed) * 3))
    else:
        axis.set_ylim(low - room, high + room)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    return figure
