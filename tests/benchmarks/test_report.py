"""The pages of the documentation are what `python -m benchmarks report` writes from the summaries in git."""

import pathlib
import re

import pytest

from benchmarks.__main__ import PAGES, WITH_HEADLINE, headline, studies
from benchmarks.core import report

STUDIES = studies()
RESULTS = pathlib.Path(report.__file__).parents[1] / "results"
GUIDES = [
    *sorted(PAGES.parent.glob("guides/*.md")),
    *(PAGES.parent / name for name in ("getting_started.md", "choosing_a_method.md")),
]
every_study = pytest.mark.parametrize("name", STUDIES)
every_page_with_headline = pytest.mark.parametrize("path", WITH_HEADLINE, ids=lambda path: path.name)
TYPED = "Measured numbers belong into tables, which summaries fill."
STALE = "Run `python -m benchmarks report`, and commit what it writes."


def measured_numbers(prose):
    """Decimals, spreads and shares, other than those of versions and links."""
    prose = re.sub(r"(JAX|Python|arXiv:) ?[\d.]+|Apache-[\d.]+|\]\(.*?\)", "", prose)
    return re.findall(r"\d\.\d|±|\d ?%", prose)


@every_study
def test_tables_and_page_are_what_report_writes(name):
    tables = STUDIES[name].tables(RESULTS / name)
    for stem, text in tables.items():
        assert (RESULTS / name / f"{stem}.md").read_text() == text, f"{stem}.md is stale. {STALE}"
    page = (PAGES / f"{name}.md").read_text()
    assert page == report.page(STUDIES[name], tables), f"docs/results/{name}.md is stale. {STALE}"
    assert {path.stem for path in (RESULTS / name).glob("*.md")} == tables.keys(), "A table that nothing writes."


@every_study
def test_a_page_shows_every_picture_and_no_number_typed_by_hand(name):
    template = (pathlib.Path(STUDIES[name].__file__).parent / "results.md").read_text()
    drawn = {path.name for path in (RESULTS / name).glob("*.png")}
    assert drawn == set(re.findall(rf"\]\(\.\./\.\./benchmarks/results/{name}/(.*?)\)", template))
    assert not measured_numbers(re.sub(r"\{\{.*?\}\}", "", template)), TYPED


@every_page_with_headline
def test_headline_is_what_report_writes(path):
    text = path.read_text()
    assert "<!-- results: begin -->" in text
    assert text == report.filled(text, headline()), f"{path.name} is stale. {STALE}"


@every_page_with_headline
def test_a_page_with_the_headline_has_no_number_typed_by_hand(path):
    without_code = re.sub(r"^```.*?^```$|^    .*?$|`.*?`", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not measured_numbers(report.typed_by_hand(without_code)), TYPED


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_a_guide_has_no_spread_or_share_typed_by_hand(path):
    """Guides have decimals, of options; what was measured is on the pages they link to."""
    assert not re.search(r"±|\d ?%", path.read_text()), TYPED


@every_study
def test_results_in_git_are_small(name):
    summaries = sum(path.stat().st_size for path in (RESULTS / name).glob("*.json"))
    assert summaries < 100_000
    assert max(path.stat().st_size for path in (RESULTS / name).glob("*.png")) < 150_000


def test_all_results_together_are_small():
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < 3_000_000
