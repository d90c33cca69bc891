"""The tables of the experiments' README say what the results say that are stored."""

import json
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[2] / "examples" / "experiments"
README = (FOLDER / "README.md").read_text()


def told(values, form):
    return f"{values.mean():{form}} ± {values.std(ddof=1):.1g}"


@pytest.mark.whole
@pytest.mark.parametrize(
    ("name", "tables", "seeds"),
    [
        ("fashion_mnist_cnn", 1, 3),
        ("fashion_mnist_cnn_10_epochs", 1, 3),
        ("fashion_mnist_resnet20", 1, 3),
        ("fashion_mnist_resnet20_10_epochs", 1, 3),
        ("physics", 4, 5),
    ],
)
def test_every_stored_mean_is_in_the_readme(load, name, tables, seeds):
    runs = json.loads((FOLDER / "stored" / f"{name}.json").read_text()).values()
    found = load("lab.summary").tables(list(runs))
    assert len(found) == tables
    lines = [line for table in found for line in table.best()]
    for line in lines:
        assert len(line.runs) == seeds, line.spec
        if name == "physics":
            cell = told(line.values("loss"), ".2f")
        else:
            accuracy = told(100 * line.values("test_accuracy"), ".1f")
            cell = f"| {line.runs[0]['bytes_per_parameter']:.1f} | {accuracy} |"
        assert cell in README, line.spec
