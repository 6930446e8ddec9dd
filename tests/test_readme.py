"""README's commands are run and their output is compared with what README prints.

A fenced ``console`` block holds commands after ``$ ``, each followed by its output; ``python`` blocks are run as well.
Words must be equal and in the same order. Numbers with a decimal point may differ in the last digits, because
instruction sets round differently; what depends on the machine (seconds, engine) is left out.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
TOLERANCE = 0.03  # of scores: int8 kernels of different instruction sets
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.M | re.S)
# Commands that build environments or start servers are not run here; the build runs them.
RUN = ("turborank rank", "turborank models", "turborank --version")
MACHINE = re.compile(r"\d+\.\d+ s · .*$", flags=re.M)


def console_examples():
    """(command, printed output) of every console block whose command we run."""
    for language, block in FENCE.findall(TEXT):
        if language == "console":
            for command, output in re.findall(r"^\$ (.*(?:\\\n.*)*)\n((?:(?!\$ ).*\n)*)", block, flags=re.M):
                last = command.replace("\\\n", " ").split("&&")[-1].strip().removeprefix(".venv/bin/")
                if last.startswith(RUN) and output.strip():
                    yield pytest.param(last, output, id=last[:60])


def python_examples():
    return [
        pytest.param(block, id=f"python-{n}") for n, (kind, block) in enumerate(FENCE.findall(TEXT)) if kind == "python"
    ]


def tokens(text):
    """Words and numbers in order, without those that depend on the machine."""
    return MACHINE.sub("", text).split()


def number(token):
    return float(token) if re.fullmatch(r"[+-]?\d+\.\d+", token) else None


def assert_same(got, printed):
    assert [number(word) is None and word for word in tokens(got)] == [
        number(word) is None and word for word in tokens(printed)
    ], got
    pairs = zip(tokens(got), tokens(printed), strict=True)
    for ours, theirs in pairs:
        assert number(ours) == (None if number(theirs) is None else pytest.approx(number(theirs), abs=TOLERANCE)), got


@pytest.mark.parametrize(("command", "printed"), list(console_examples()))
def test_a_command_prints_what_readme_says(command, printed):
    program = f"{shlex.quote(sys.executable)} -c 'from turborank.cli.main import main; main()'"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "TURBORANK_ENGINE")
    }
    process = subprocess.run(
        ["bash", "-c", command.replace("turborank", program, 1)],
        cwd=ROOT, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert_same(process.stdout, printed)


@pytest.mark.parametrize("source", python_examples())
def test_a_python_example_runs_and_says_what_its_comments_say(source, capsys, monkeypatch):
    """A line that ends in ``# → text`` prints that text."""
    monkeypatch.chdir(ROOT)
    exec(compile(source, str(README), "exec"), {"__name__": "readme"})
    printed = re.findall(r"# → (.*)$", source, flags=re.M)
    if printed:
        assert_same(capsys.readouterr().out, "\n".join(printed))


def test_readme_shows_the_command_and_the_library():
    assert list(console_examples()), "README has no console block with a turborank command and its output"
    assert python_examples()


def test_links_in_documents_lead_somewhere():
    for page in [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_comparison_notices_what_it_should():
    printed = "1 0.912 bees.md\n\n13 documents · 0.21 s · model · native int8 amx\n"
    assert_same("  1 0.913  bees.md\n13 documents · 1.10 s · model · reference fp32", printed)
    for other in ("1 0.812 bees.md 13 documents · 0.2 s · m", "1 0.912 ants.md 13 documents ·", "1 0.912 bees.md"):
        with pytest.raises(AssertionError):
            assert_same(other, printed)
