"""Pages: their links lead somewhere, their figure is that of the table, code is run."""

from pathlib import Path
import re
import tomllib

import pytest


ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md")], key=lambda page: str(page)
)
names = lambda page: str(page.relative_to(ROOT))

pytestmark = pytest.mark.whole


def prose(page):
    """Return a page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.DOTALL)


def anchors(page):
    """Return what a heading of a page is called in a link, as on GitHub."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", each).lower().replace(" ", "-") for each in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        paths = {
            (page.parent / link).resolve()
            for page in new
            for link in re.findall(r"\]\(([^)\s#]+\.md)", prose(page))
            if not link.startswith("https://")
        }
        new = paths - reached
    assert set(PAGES) <= reached


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 250
    assert len(text.encode()) <= 11_000


def test_every_page_with_examples_is_run():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    run = [
        ROOT / path for path in settings["tool"]["pytest"]["ini_options"]["testpaths"]
    ]
    for page in PAGES:
        if re.search(r"^ *>>> ", page.read_text(), re.MULTILINE):
            assert any(page.is_relative_to(path) for path in run), page


def test_the_figure_of_the_readme_is_drawn_from_the_table(load, tmp_path):
    overview = load("overview")
    overview.main(["--output", str(tmp_path / "overview.svg")])
    assert (tmp_path / "overview.svg").read_text() == overview.FIGURE.read_text()
    workloads, rows = overview.table(overview.TABLE.read_text())
    assert len(workloads) == 5
    assert len(rows) == 17
    assert rows[0].losses[0] == (1.816, 0.005)
