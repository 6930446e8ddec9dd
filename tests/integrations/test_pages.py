"""The page of every adapter is executed by its framework's test and listed in the index."""

from pages import PAGES


def test_every_page_is_run_by_the_test_of_its_framework_and_is_in_the_index():
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    for page in PAGES.glob("*.md"):
        if page.name != "README.md":
            test = PAGES.parents[1] / "tests" / "integrations" / f"test_{page.stem}.py"
            assert f'pages.run("{page.name}")' in test.read_text(encoding="utf-8")
            assert f"({page.name})" in index
