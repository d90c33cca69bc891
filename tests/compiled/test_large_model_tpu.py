"""A model of seven billion parameters on a pod, beside what the examples' README says.

All of its layers are compiled, some fifteen seconds a step; no chip is needed.
"""

import os
from pathlib import Path

from collectives import collectives
import compiling
from pods import ROWS, bytes_a_chip, compiled, entries, transformer
import pytest


pytestmark = [
    pytest.mark.compile_tpu,
    pytest.mark.skipif(
        compiling.missing("tpu") is not None, reason="`libtpu` is not installed"
    ),
]

README = Path(__file__).parents[2] / "examples" / "README.md"
CHIPS = 256
LAYERS, WIDTH, HIDDEN, TOKENS = 32, 4096, 11008, 32000
SHAPES = transformer(WIDTH, HIDDEN, LAYERS)
SHAPES |= {"embed": (TOKENS, WIDTH), "head": (WIDTH, TOKENS), "norm": (WIDTH,)}
# All matrices' rows and columns, those of the layers first.
ROWS_OF_ALL = LAYERS * (6 * WIDTH + HIDDEN) + TOKENS + WIDTH
COLUMNS_OF_ALL = LAYERS * (5 * WIDTH + 2 * HIDDEN) + TOKENS + WIDTH
MATRICES = 7 * LAYERS + 2


@pytest.fixture(scope="module", autouse=True)
def described_chips():
    """Tell `libtpu` not to look for chips, nor to wait for whoever uses them."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


def promised(name):
    """Return the megabytes of state and of temporaries that the README tells."""
    lines = README.read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {name} | ")]
    cells = row.strip("| ").split(" | ")
    return [int(cells[i].removesuffix(" MB").replace(",", "")) for i in (1, 4)]


@pytest.mark.parametrize(
    ("name", "compressor", "placing", "rows"),
    [
        ("sparse", "top_k", "fsdp", ROWS),
        ("sparse", "top_k", "2-D", ROWS),
        ("sparse, 1 of 128, m = 1024", "top_k, 1 of 128", "fsdp", 1024),
        ("dense", "dense", "fsdp", ROWS),
        ("low rank, rows over 256", "low_rank", "fsdp", ROWS),
        ("low rank, 16 x 16", "low_rank", "2-D", ROWS),
    ],
)
def test_a_chip_holds_and_sends_what_the_readme_says(name, compressor, placing, rows):
    program, state = compiled(compressor, CHIPS, placing, "explicit", SHAPES, rows)
    held, temporary = promised(name)
    assert round(bytes_a_chip(state) / 1e6) == held
    memory = program.memory_analysis()
    # Donated, the state is written where it is. What is new is a share of the update,
    # vectors and short shares filled up to whole tiles.
    assert memory.alias_size_in_bytes >= bytes_a_chip(state)
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert 1 <= new / (4 * entries(SHAPES) / CHIPS) < 1.05
    assert memory.temp_size_in_bytes < 1.1 * 1e6 * temporary
    found = collectives(program)
    if compressor != "low_rank":
        assert found == [("all-reduce", rows)]
        return
    assert {kind for kind, _ in found} == {"all-reduce"}
    sizes = sorted(size for _, size in found)
    if placing == "fsdp":
        assert len(sizes) == 5
        assert sizes[-1] == 4 * COLUMNS_OF_ALL
    else:
        assert len(sizes) == 8
        lefts, rights = 4 * ROWS_OF_ALL // 16, 4 * COLUMNS_OF_ALL // 16
        small = (rows + 1) * 4**2 * MATRICES
        assert sizes[-2:] == [lefts, rights + small]
    assert sum(sizes[: -1 if placing == "fsdp" else -2]) < 12 * 4**2 * MATRICES
