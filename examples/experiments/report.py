"""Tables and figures of results.

    python examples/experiments/report.py out/experiments/*.json --output out/report

--thin keeps what they are made of in a small file, from which they are drawn anew
without training:

    python examples/experiments/report.py out/experiments/images.json --thin images.json
    python examples/experiments/report.py images.json --output out/report
"""

import argparse
import json
from pathlib import Path

from lab import beside, drawing, figures, summary, thinning


FIGURES = {**figures.KINDS, "beside": beside.draw}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", nargs="+", type=Path, help="files that the experiments wrote")
    add("--output", type=Path, default=Path("out/report"), help="folder")
    add(
        "--figures",
        nargs="*",
        choices=FIGURES,
        default=list(FIGURES),
        help="(default: all that the results have something for)",
    )
    add("--thin", type=Path, metavar="FILE", help="a small file of these results")
    args = parser.parse_args(argv)
    runs = []
    for path in args.results:
        try:
            runs += json.loads(path.read_text()).values()
        except (OSError, AttributeError, json.JSONDecodeError) as error:
            parser.error(f"{path} is no file of results: {error}")
    if not runs:
        parser.error("the files have no runs")
    if args.thin:
        runs = thinning.thin(runs)
        thinning.write(runs, args.thin)
    args.output.mkdir(parents=True, exist_ok=True)
    texts, count = [], {}
    for table in summary.tables(runs):
        texts.append(summary.markdown(table))
        name = table.setup["workload"]
        count[name] = count.get(name, 0) + 1
        for kind in args.figures:
            figure = FIGURES[kind](table)
            if figure is not None:
                file = f"{name}-{count[name]}-{kind}.png"
                drawing.save(figure, args.output / file)
                texts.append(f"![{name}, {kind}]({file})")
    text = "\n\n".join(texts) + "\n"
    (args.output / "report.md").write_text(text)
    print(text)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
