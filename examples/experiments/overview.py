"""The figure of the front page: the losses of all optimizers, drawn from their table.

    python examples/experiments/overview.py

reads the table of `examples/experiments/README.md` and writes
`examples/figures/overview.svg`. The same table gives the same file everywhere.
"""

import argparse
from pathlib import Path
import re
from typing import NamedTuple


HERE = Path(__file__).parent
TABLE = HERE / "README.md"
FIGURE = HERE.parent / "figures" / "overview.svg"
NAMES, BYTES, PANEL, GAP = 250, 34, 104, 12  # pixels across
TOP, ROW = 28, 16  # and down
BASELINE, OURS, WITHOUT = "#777777", "#1f6fb2", "#c0392b"
REFERENCE = "AdamW, b2 = 0.999"  # the line down each panel


class Loss(NamedTuple):
    """A cell: mean and standard deviation, 0 where none is given."""

    mean: float
    spread: float


class Row(NamedTuple):
    """A line of the table: an optimizer, its bytes and its loss on every workload."""

    name: str
    bytes: str
    losses: list[Loss]

    @property
    def color(self) -> str:
        """Tell baselines, ours and what is without feedback apart."""
        if "no error feedback" in self.name:
            return WITHOUT
        return OURS if re.search("GGT|M-FAC|the same", self.name) else BASELINE


def table(text: str) -> tuple[list[str], list[Row]]:
    """Return workloads and rows of the first table of all optimizers in a page."""
    lines = text[text.index("| optimizer | bytes a parameter") :].split("\n\n")[0]
    head, _, *body = (
        [cell.strip() for cell in re.sub(r"[*`]", "", line).strip("|").split("|")]
        for line in lines.splitlines()
    )
    number = lambda cell: Loss(*map(float, (cell + " ± 0").split(" ± ")[:2]))
    rows = [Row(name, size, list(map(number, cells))) for name, size, *cells in body]
    return head[2:], rows


def write(x: float, y: float, text: str, where: str = "start", size: int = 11) -> str:
    """Return a text at a place, its start, middle or end there."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{where}" font-size="{size}">'
        f"{text}</text>"
    )


def line(x: float, y: float, to_x: float, to_y: float, color: str, dash="none") -> str:
    """Return a line from one place to another."""
    return (
        f'<path d="M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}" stroke="{color}"'
        f' stroke-dasharray="{dash}"/>'
    )


def panel(title: str, left: float, rows: list[Row], column: int) -> list[str]:
    """Return one workload: a dot and a bar of one standard deviation for each row."""
    losses = [row.losses[column] for row in rows]
    low = min(each.mean - each.spread for each in losses)
    high = max(each.mean + each.spread for each in losses)
    at = lambda value: left + 6 + (PANEL - 12) * (value - low) / (high - low)
    bottom = TOP + ROW * len(rows)
    (reference,) = [row.losses[column].mean for row in rows if row.name == REFERENCE]
    parts = [
        write(left + PANEL / 2, 16, title, "middle", 12),
        line(left, bottom, left + PANEL, bottom, "#bbbbbb"),
        line(at(reference), TOP, at(reference), bottom, "#bbbbbb", "3 3"),
    ]
    for value in (min(x.mean for x in losses), max(x.mean for x in losses)):
        parts.append(line(at(value), bottom, at(value), bottom + 4, "#bbbbbb"))
        parts.append(write(at(value), bottom + 15, f"{value:.3g}", "middle", 10))
    for i, (row, loss) in enumerate(zip(rows, losses, strict=True)):
        y = TOP + ROW * (i + 0.5)
        ends = (at(loss.mean - loss.spread), at(loss.mean + loss.spread))
        parts.append(line(ends[0], y, ends[1], y, row.color))
        parts.append(
            f'<circle cx="{at(loss.mean):.1f}" cy="{y}" r="3.5" fill="{row.color}"/>'
        )
    return parts


def draw(workloads: list[str], rows: list[Row]) -> str:
    """Return the figure as an SVG."""
    start = NAMES + BYTES + GAP
    width = start + len(workloads) * (PANEL + GAP)
    height = TOP + ROW * len(rows) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        write(start - GAP, 16, "bytes a parameter", "end", 12),
    ]
    for i, row in enumerate(rows):
        y = TOP + ROW * (i + 0.5) + 4
        name = row.name.replace("no error feedback", "no feedback")
        parts.append(write(8 + 12 * name.startswith("the same"), y, name))
        parts.append(write(start - GAP, y, row.bytes, "end"))
    for i, title in enumerate(workloads):
        parts += panel(title, start + i * (PANEL + GAP), rows, i)
    return "\n".join([*parts, "</svg>", ""])


def main(argv: list[str] | None = None) -> None:
    """Draw the figure anew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=FIGURE)
    output = parser.parse_args(argv).output
    output.write_text(draw(*table(TABLE.read_text())))
    print(f"written to {output}")


if __name__ == "__main__":
    main()
