"""The training report: input, content, and that the page is self-contained."""

import json
import re
import xml.etree.ElementTree as ET
from html import unescape
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from turborank.distill.report import POINTS, read_curve, thin, write_report
from turborank.errors import InputError


def row(step, **more):
    return {
        "step": step,
        "tokens": 1000 * step,
        "lr": 1e-4,
        "grad_norm": 2.0,
        "tokens_per_s": 500,
        "kl": 1 / step,
        **more,
    }


def write(folder: Path, rows, manifest=None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "curve.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows), encoding="utf-8")
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path):
    """Four steps, evaluated at 2, 3 and 4; the best is the third."""
    measured = {2: 0.41, 3: 0.5321, 4: 0.49}
    rows = [
        row(s, loss=2 / s, **{"kl@2": 3 / s, "log_scale": 0.5}, **({"ndcg@10": measured[s]} if s in measured else {}))
        for s in range(1, 5)
    ]
    return write(tmp_path / "small & <run>", rows, {"seed": 7, "baselines": {"<bm25>": {"ndcg@10": 0.4}}})


def test_names_are_told_apart(run):
    curve = read_curve(run / "curve.jsonl")
    assert curve.losses == ("kl", "kl@2")
    assert curve.measures == ("ndcg@10",)
    assert curve.seconds() == pytest.approx(4000 / 500)


def test_a_measure_taken_at_every_step_is_one(tmp_path):
    folder = write(tmp_path / "run", [row(1, **{"nDCG@10": 0.3}), row(2, **{"nDCG@10": 0.4})])
    assert read_curve(folder / "curve.jsonl").measures == ("nDCG@10",)


def cells(html, first):
    """The cells of the first table row that starts with ``first``."""
    found = re.search(rf"<tr><td>{first}</td>(.*?)</tr>", html)
    assert found, first
    return re.findall(r"<td[^>]*>(.*?)</td>", found[1])


def test_first_best_and_last_evaluation_are_shown(run):
    html = write_report(run).read_text(encoding="utf-8")
    assert cells(html, "first") == ["2", "2,000", "0.4100"]
    assert cells(html, "best") == ["3", "3,000", "0.5321"]
    assert cells(html, "last") == ["4", "4,000", "0.4900"]
    assert "Evaluations since the best one: 1." in html
    assert "time in steps <b>8 s</b>" in html


def test_the_page_stands_alone_and_its_names_are_escaped(run):
    page = write_report(run)
    html = page.read_text(encoding="utf-8")
    assert page == run / "report.html"
    assert "<run>" not in html
    assert "Training of small &amp; &lt;run&gt;" in html
    assert not re.search(r'(src|href)="(?!#)', html.replace('xlink:href="#', 'href="#'))
    assert "<script" not in html
    assert "@import" not in html


def test_hostile_names_of_runs_losses_and_manifests_are_texts(tmp_path):
    hostile = "<script>alert('1')</script> $\\frac$ {{ 1 }}"
    rows = [row(1, **{hostile: 1.0}), row(2, **{hostile: 2.0, f"ndcg {hostile}": 0.5})]
    folder = write(tmp_path / "<script>", rows, {"remark": hostile, "baselines": {hostile: {f"ndcg {hostile}": 0.4}}})
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "Training of &lt;script&gt;" in page
    pictures = [ET.fromstring(picture) for picture in re.findall(r"<svg.*?</svg>", page, re.S)]
    assert hostile in "".join(pictures[0].itertext())  # the baseline
    assert hostile in "".join(pictures[1].itertext())  # the loss
    assert unescape(page).count(f"ndcg {hostile}") >= 3  # two tables, one legend


def test_every_picture_is_well_formed_and_says_what_it_is(run):
    html = write_report(run).read_text(encoding="utf-8")
    pictures = re.findall(r"<svg.*?</svg>", html, re.S)
    labels = [ET.fromstring(picture).get("aria-label") for picture in pictures]
    assert labels == ["Measures", "Losses", "Total loss", "Learning rate", "Gradient", "Speed", "Logit scale"]
    texts = " ".join("".join(ET.fromstring(pictures[0]).itertext()).split())
    assert "0.5321" in texts  # the best, marked
    assert "<bm25> 0.4000" in texts
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_a_run_without_evaluations_says_so(tmp_path):
    html = write_report(write(tmp_path / "run", [row(1)])).read_text(encoding="utf-8")
    assert "Not evaluated yet" in html


def test_the_same_run_gives_the_same_page(run, tmp_path):
    first, second = write_report(run).read_bytes(), write_report(run, tmp_path / "again.html").read_bytes()
    assert first == second


def test_long_runs_are_averaged_in_parts():
    steps = np.arange(1.0, 10 * POINTS + 1)
    line = thin(steps, np.tile([1.0, 2.0, 3.0, 4.0, 10.0], 2 * POINTS))
    assert line.steps.tolist() == [10.0 * i for i in range(1, POINTS + 1)]
    assert set(line.mean) == {4.0}
    assert set(line.low) == {1.0}
    assert set(line.high) == {10.0}


def test_a_short_line_is_itself_and_skips_what_is_no_number():
    line = thin(np.asarray([1.0, 2.0, 3.0, 4.0]), np.asarray([5.0, np.nan, 7.0, np.inf]))
    assert line.steps.tolist() == [1.0, 3.0]
    assert line.mean.tolist() == [5.0, 7.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"step": 1, "tokens": 2}\n{"step": 2}\n', "curve.jsonl:2"),
        ('{"step": 1, "tokens": 2}\n\n[1]\n', "curve.jsonl:3"),
        ('{"step": 1, "tokens": 2, "kl": "x"}\n', "curve.jsonl:1"),
        ('{"step": 1, "tok', "curve.jsonl:1"),
        ("\n", "an empty file"),
    ],
)
def test_a_damaged_curve_is_named_by_its_line(tmp_path, text, said):
    (tmp_path / "curve.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        write_report(tmp_path)
    assert said in str(caught.value)


def test_a_folder_without_a_run_is_said(tmp_path):
    with pytest.raises(InputError, match="got no such file"):
        write_report(tmp_path)


def test_a_damaged_manifest_is_said(tmp_path):
    folder = write(tmp_path / "run", [row(1)])
    (folder / "manifest.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="a JSON object, got list"):
        write_report(folder)
