"""The documentation is true: generated pages are current, and every section that the code cites exists."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GENERATE = runpy.run_path(str(DOCS / "generate.py"))
CITING = [
    path
    for folder in ("src", "native", "tests", "bench", "runs", "docs", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".inl", ".c", ".sh", ".md") and path != Path(__file__).resolve()
]
CITATION = re.compile(r"docs/([\w-]+\.md) ((?:§[\d.]+\d|§\d)(?:(?:, | and )(?:§[\d.]+\d|§\d))*)")
PAGE = re.compile(r"docs/([\w/-]+\.md)")
BOOK = re.compile(r"\b(19|20)\d\d\b")  # a paper or book, cited with its year


def sections(page: Path) -> set[str]:
    """Numbers of a page's headings: ``## 3 Forward pass`` is section 3, ``### 3.2 Attention`` section 3.2."""
    return set(re.findall(r"^#+ (\d+(?:\.\d+)*) ", page.read_text(encoding="utf-8"), flags=re.M))


def faults(text: str) -> list[str]:
    """What a text cites and docs/ does not have."""
    missing = [f"no page docs/{page}" for page in PAGE.findall(text) if not (DOCS / page).is_file()]
    for page, cited in CITATION.findall(text):
        known = sections(DOCS / page) if (DOCS / page).is_file() else set()
        missing += [f"docs/{page} has no section {one}" for one in re.findall(r"[\d.]*\d", cited) if one not in known]
    loose = [line.strip() for line in CITATION.sub("", text).splitlines() if "§" in line and not BOOK.search(line)]
    return missing + [f"§ without a page of docs/: {line}" for line in loose]


@pytest.mark.parametrize("name", GENERATE["PAGES"])
def test_a_generated_page_is_up_to_date(name):
    assert (DOCS / name).read_text(encoding="utf-8") == GENERATE["PAGES"][name](), "run make docs"


def test_every_section_that_is_cited_exists():
    found = {str(path.relative_to(ROOT)): faults(path.read_text(encoding="utf-8")) for path in CITING}
    assert not {path: listed for path, listed in found.items() if listed}
    assert sum(len(CITATION.findall(path.read_text(encoding="utf-8"))) for path in CITING) > 8


def test_a_wrong_citation_is_noticed():
    assert faults("as docs/model.md §3.3 and §4 say") == []
    assert faults("docs/model.md §3.3, §9.9") == ["docs/model.md has no section 9.9"]
    assert faults("see docs/nowhere.md") == ["no page docs/nowhere.md"]
    assert faults("the specification §4") == ["§ without a page of docs/: the specification §4"]
    assert faults("Efron 1993, §13.3") == []


def test_sections_of_the_model_page_refer_to_one_another():
    page = DOCS / "model.md"
    cited = re.findall(r"\bsections? (\d+(?:\.\d+)*)", page.read_text(encoding="utf-8"))
    assert cited
    assert set(cited) <= sections(page)
