"""The playground page in a real browser: by mouse, by keyboard and by the accessibility tree that screen readers use.

SCREENSHOTS may name a folder, where each look at the page is kept as a picture.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the service needs pip install 'turborank[serve]'")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from playwright import sync_api as playwright
from serving import running

from turborank.serve import auth

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if not CHROMIUM:
    pytest.skip("no Chromium on this machine", allow_module_level=True)

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator["object"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open the page; afterwards check that it had no errors and sent no request to another server."""
    seen = []

    def visit(up, *, viewport=None, scheme="light", **more):
        context = browser.new_context(viewport=viewport or DESK, color_scheme=scheme, **more)
        page = context.new_page()
        page.set_default_timeout(90_000)  # for machines that are busy with other things
        faults, asked = [], []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(up.url)
        seen.append((context, faults, asked, up.url))
        return page

    yield visit
    for context, faults, asked, url in seen:
        context.close()
        assert not faults
        assert all(one.startswith((url, "data:")) for one in asked)


def picture(page, name: str) -> None:
    if os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(os.environ["SCREENSHOTS"]) / f"{name}.png"), full_page=True)


def rank(page) -> None:
    page.get_by_role("button", name="Rank", exact=True).click()
    page.wait_for_selector("#results > li")


def test_ranking_by_mouse(up, visit, library):
    page = visit(up)
    picture(page, "desk-light-before")
    rank(page)
    documents = page.locator("#documents").input_value().split("\n\n")
    want = library.rank(page.locator("#query").input_value(), documents)
    assert page.locator("#results .score").all_text_contents() == [f"score {one.score:.3f}" for one in want]
    assert page.locator("#results .text").all_text_contents() == [documents[one.index] for one in want]
    assert "5 documents ranked by bees" in page.locator("#status").inner_text()
    assert f"{sum(one.tokens for one in want):,} tokens" in page.locator("#status").inner_text()
    marked = page.locator("#results mark").all_text_contents()
    assert marked, "expected a passage to be marked in the documents of several"
    assert all(any(mark in document and mark != document for document in documents) for mark in marked)
    picture(page, "desk-light")


def test_ranking_by_keyboard_alone(up, visit):
    page = visit(up)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the ranking"
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.press("Control+a")
    page.keyboard.type("which animal dances")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "documents"
    page.keyboard.press("Control+a")
    page.keyboard.type("bees dance\ntides follow the moon")
    assert page.locator("#count").inner_text() == "2 documents"
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#results > li")
    assert page.locator("#results > li").count() == 2
    page.locator("#tab-curl").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-python"
    assert "urllib.request" in page.locator("#code").inner_text()


def test_everything_has_a_name_and_news_is_announced(up, visit):
    page = visit(up)
    nameless = page.evaluate(
        """[...document.querySelectorAll("input:not([hidden]), select, textarea, button")]
           .filter((one) => !(one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim()))
           .map((one) => one.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("#status").get_attribute("aria-live") == "polite"
    assert page.locator("#error").get_attribute("role") == "alert"
    assert page.locator("html").get_attribute("lang") == "en"
    tree = page.locator("body").aria_snapshot()
    for part in (
        'heading "turborank"',
        'textbox "Question"',
        'textbox "Documents"',
        'button "Rank"',
        "- main",
        "- status",
    ):
        assert part in tree


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
def test_axe_finds_nothing(up, visit, scheme, viewport):
    """axe-core's rules (WCAG 2 A and AA, and good practice) over the page before and after a ranking, options open."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(up, viewport=viewport, scheme=scheme, bypass_csp=True)  # the page's policy lets no script in
    page.locator("#files").set_input_files([{"name": "bees.txt", "mimeType": "text/plain", "buffer": b"bees dance"}])
    page.locator("summary").first.click()
    found = [axe.run(page)]
    rank(page)
    page.wait_for_timeout(400)  # bars have grown, nothing is half transparent any more
    found.append(axe.run(page))
    faults = [
        (one["id"], [node["html"] for node in one["nodes"]]) for each in found for one in each.response["violations"]
    ]
    assert faults == []


CONTRAST = """(theme) => {
  document.documentElement.dataset.theme = theme;
  const style = getComputedStyle(document.documentElement);
  const light = (name) => {
    const hex = style.getPropertyValue(name).trim().slice(1);
    const [r, g, b] = [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
      .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  return [["--ink", "--paper"], ["--ink", "--card"], ["--soft", "--paper"], ["--soft", "--card"],
          ["--mark-ink", "--mark"], ["--accent-ink", "--accent"], ["--bad", "--bad-paper"], ["--bad", "--paper"],
          ["--ink", "--code"]]
    .map(([front, back]) => {
      const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
      return [front, back, (a + .05) / (b + .05)];
    });
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_contrast_meets_wcag(up, visit, theme):
    weak = [row for row in visit(up).evaluate(CONTRAST, theme) if row[2] < 4.5]
    assert weak == []


def test_dark_follows_the_system_and_can_be_switched(up, visit):
    page = visit(up, scheme="dark")
    rank(page)
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    picture(page, "desk-dark")
    page.get_by_role("button", name="Switch to light colours").click()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != dark


def test_a_page_of_phone_width_does_not_overflow(up, visit):
    page = visit(up, viewport=PHONE)
    rank(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    small = page.evaluate(
        "[...document.querySelectorAll('button')].filter((one) => one.offsetHeight && one.offsetHeight < 40).length"
    )
    assert small == 0
    picture(page, "phone-light")


def test_files_and_their_hostile_contents_are_only_text(up, visit):
    page = visit(up)
    page.get_by_role("button", name="Clear").click()
    hostile = "<img src=x onerror=\"document.title='broken'\"> <script>document.title='broken'</script> bees dance here"
    files = [("bees.txt", hostile), ("empty.txt", " "), ("tides.md", "tides follow the moon")]
    page.locator("#files").set_input_files(
        [{"name": name, "mimeType": "text/plain", "buffer": text.encode()} for name, text in files]
    )
    page.get_by_text("2 files").wait_for()
    assert "1 file left out" in page.locator("#status").inner_text()
    rank(page)
    assert set(page.locator("#results .name").all_inner_texts()) == {"bees.txt", "tides.md"}
    assert hostile in page.locator("#results").inner_text()
    assert page.title() == "turborank · playground"


def test_files_are_dropped_anywhere_and_taken_back_one_by_one(up, visit):
    page = visit(up)
    dropped = page.evaluate_handle(
        """() => {
             const carried = new DataTransfer();
             for (const name of ["one.txt", "two.txt"]) carried.items.add(new File([`bees of ${name}`], name));
             return carried;
           }"""
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": dropped})
    assert page.get_by_text("Drop text files to add them").is_visible()
    page.dispatch_event("footer", "drop", {"dataTransfer": dropped})
    page.get_by_text("2 files").wait_for()
    assert page.get_by_text("Drop text files to add them").is_hidden()
    page.get_by_role("button", name="Remove one.txt").click()
    assert page.locator("#chips li").all_inner_texts() == ["two.txt\n×"]
    assert page.locator("#count").inner_text() == "5 documents and 1 file"
    assert page.evaluate("document.activeElement.id") == "choose"


def test_the_marked_passage_is_in_sight_in_a_long_document(up, visit):
    page = visit(up)
    page.locator("#documents").fill("")
    lines = "\n\n".join(
        f"Paragraph {number} is about tides, and is about as long as the others are." for number in range(40)
    )
    page.locator("#files").set_input_files([{"name": "long.txt", "mimeType": "text/plain", "buffer": lines.encode()}])
    rank(page)
    box, mark = page.locator("#results .text").bounding_box(), page.locator("#results mark").bounding_box()
    assert box["y"] <= mark["y"] < box["y"] + box["height"]
    assert page.locator("#results .text").evaluate("(text) => text.scrollHeight > 3 * text.clientHeight")


def test_errors_and_cut_documents_are_shown(up, visit):
    page = visit(up)
    page.locator("#documents").fill("bees " * 200)
    rank(page)
    assert "not read" in page.locator("#results .cut").inner_text()
    page.locator("summary").first.click()
    page.locator("#length").select_option("error")
    page.get_by_role("button", name="Rank", exact=True).click()
    page.wait_for_selector("#error:not([hidden])")
    assert "400: expected a pair of at most 512 tokens" in page.locator("#error").inner_text()
    picture(page, "desk-error")


def test_the_offered_call_works_as_it_stands(up, visit, tmp_path):
    import subprocess
    import sys

    page = visit(up)
    page.locator("#documents").fill("it's \"here\"\n\nthe bees' dance \\ 🐝")
    rank(page)
    scores = [float(text.split()[-1]) for text in page.locator("#results .score").all_text_contents()]
    if shutil.which("curl"):
        done = subprocess.run(["bash", "-c", page.locator("#code").inner_text()], capture_output=True, text=True)
        assert done.stdout.startswith('{"id":'), done
    page.locator("#tab-python").click()
    done = subprocess.run([sys.executable, "-c", page.locator("#code").inner_text()], capture_output=True, text=True)
    assert [round(float(line.split()[0]), 3) for line in done.stdout.splitlines()] == scores, done.stderr


def test_a_server_with_keys_can_be_used(model, visit, tmp_path):
    secret = auth.new(tmp_path / "keys.toml", "me")
    with running(model, keys=str(tmp_path / "keys.toml")) as up:
        page = visit(up)
        page.get_by_role("button", name="Rank", exact=True).click()
        page.wait_for_selector("#error:not([hidden])")
        assert "401" in page.locator("#error").inner_text()
        page.locator("summary").first.click()
        page.get_by_label("API key").fill(secret)
        rank(page)
        assert "$TURBORANK_API_KEY" in page.locator("#code").inner_text()
        assert secret not in page.locator("#code").inner_text()
        assert page.locator("#error").is_hidden()
