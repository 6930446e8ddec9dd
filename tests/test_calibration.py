"""Calibration: the fit against its formulas, thresholds by counting, intervals against published values."""

import json
import math

import numpy as np
import pytest
from helpers import write_checkpoint

from turborank import CheckpointError, InputError, Reranker, calibration
from turborank.calibration import Calibration, parse_target

pytest.importorskip("scipy")
pytest.importorskip("ir_measures")

from turborank.cli.main import run
from turborank.evaluate import calibrate as fitting

# five relevant of ten, by falling logit: + + - + - + - - + -
LOGITS = np.array([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])
RELEVANT = np.array([1, 1, 0, 1, 0, 1, 0, 0, 1, 0], dtype=bool)


def made(**changes):
    fields = {
        "slope": 2.0, "intercept": -1.0, "weights": "w", "pairs": 10, "relevant": 5,
        "curve": fitting.curve_of(LOGITS, RELEVANT), "about": {},
    }  # fmt: skip
    return Calibration(**{**fields, **changes})


def test_the_curve_counts():
    assert fitting.curve_of(LOGITS, RELEVANT)[:4] == ((9.0, 1, 1), (8.0, 2, 2), (7.0, 3, 2), (6.0, 4, 3))
    assert fitting.curve_of(np.array([1.0, 1, 1, 0]), np.array([True, False, True, True])) == ((1.0, 3, 2), (0.0, 4, 3))
    many = np.arange(5_000.0)
    curve = fitting.curve_of(many, many > 2_500)
    assert len(curve) == fitting.POINTS
    assert all(kept == sum(many >= logit) for logit, kept, _ in curve[::50])


@pytest.mark.parametrize(
    ("target", "logit"),
    [
        ("precision=1", 8), ("precision=0.75", 6), ("precision=0.6", 4), ("precision=0.5", 0), ("recall=0.2", 9),
        ("recall=0.21", 8), ("recall=0.8", 4), ("recall=1", 1), ("probability=0.5", 0.5),
        ("probability=0.9", (math.log(9) + 1) / 2),
    ],
)  # fmt: skip
def test_thresholds_are_the_logits_that_counting_finds(target, logit):
    assert made().threshold(target) == pytest.approx(logit)


def test_a_precision_that_is_never_reached_is_refused():
    unlucky = made(curve=((3.0, 1, 0), (2.0, 2, 1)), pairs=2, relevant=1)
    with pytest.raises(InputError, match=r"highest is 0\.500"):
        unlucky.threshold("precision=0.9")
    for text in ("precision", "accuracy=0.9", "precision=2", "recall=nan", "probability=x", "0.5"):
        with pytest.raises(InputError):
            parse_target(text)
    with pytest.raises(InputError):
        made().threshold("probability=1")


def test_the_fit_maximises_the_likelihood_of_platts_targets():
    slope, intercept = fitting.fit(LOGITS, RELEVANT)
    targets = np.where(RELEVANT, 6 / 7, 1 / 7)
    residual = 1 / (1 + np.exp(-(slope * LOGITS + intercept))) - targets
    assert abs(residual.sum()) < 1e-3  # the gradient of the log-likelihood
    assert abs((residual * LOGITS).sum()) < 1e-3
    scaled = fitting.fit(LOGITS * 10 + 3, RELEVANT)
    assert scaled[0] == pytest.approx(slope / 10, rel=1e-3)
    with pytest.raises(InputError, match="slope"):
        fitting.fit(-LOGITS, RELEVANT)


def test_a_known_scale_is_found_again():
    draw = np.random.default_rng(3)
    logits = draw.normal(0, 2, 20_000)
    relevant = draw.random(20_000) < 1 / (1 + np.exp(-(0.7 * logits - 1.5)))
    assert fitting.fit(logits, relevant) == pytest.approx((0.7, -1.5), abs=0.06)


def test_intervals_are_clopper_and_pearsons():
    # tables of exact binomial limits: 8 of 10 is .4439 to .9748, 0 of 10 up to .3085, 10 of 10 from .6915
    apart = np.arange(10)
    for hits, low, high in ((8, 0.4439, 0.9748), (0, 0.0, 0.3085), (10, 0.6915, 1.0)):
        share = fitting.interval(np.arange(10) < hits, apart)
        assert share == pytest.approx((hits / 10, low, high), abs=1e-4)


def test_pairs_of_one_query_count_less():
    hits = np.repeat([True, False, True, True, False, True, False, True], 4)  # each query all or nothing
    groups = np.repeat(np.arange(8), 4)
    # intraclass correlation 1: 32 pairs are worth about as many as there are queries
    assert fitting.design_effect(hits, groups) == pytest.approx(4 * 8 / 7 * 31 / 32)
    wide, narrow = fitting.interval(hits, groups), fitting.interval(hits, np.arange(32))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_intervals_cover_the_true_value_as_often_as_stated():
    draw = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        chances = draw.beta(2, 2, 12)  # twelve queries of five pairs, the truth being one half
        hits = (draw.random((12, 5)) < chances[:, None]).ravel()
        share = fitting.interval(hits, np.repeat(np.arange(12), 5))
        covered += share.low <= 0.5 <= share.high
    assert covered / 300 >= 0.92


WORDS = ("scouts dance for it", "sourdough needs a starter", "tides follow the moon", "the swarm votes", "bees fly")


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(tmp_path / "bees")


def judged(path, reranker, *, flip=False):
    """A file in which the upper half of each query's documents in this model's ranking is relevant, with exceptions."""
    lines = []
    for number in range(12):
        query = f"question {chr(97 + number)}"
        documents = [f"{text} {chr(97 + number)}" for text in WORDS]
        for rank, one in enumerate(reranker.rank(query, documents)):
            label = int((rank < 2) != (number % 6 == 0 and rank == 1)) if not flip else int(rank >= 3)
            lines.append({"query": query, "document": one.document, "label": label})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_rank_uses_the_threshold_of_a_calibration(model, tmp_path, capsys):
    lines = judged(tmp_path / "judged.jsonl", Reranker(model))
    assert run(["calibrate", str(tmp_path / "judged.jsonl"), "--model", str(model)]) == 0
    told = capsys.readouterr().out
    assert f"{len(lines)} pairs of 12 queries, {sum(one['label'] for one in lines)} relevant" in told
    assert (model / "calibration.svg").read_text().startswith("<?xml")
    reranker = Reranker(model)
    kept = reranker.calibration
    logits = np.array([reranker.score([(one["query"], one["document"])])[0] for one in lines])
    truth = np.array([one["label"] for one in lines], dtype=bool)
    for target, value in (("precision", 0.6), ("recall", 0.9)):
        least = kept.threshold(f"{target}={value}")
        chosen = logits >= least
        reached = truth[chosen].mean() if target == "precision" else chosen[truth].mean()
        assert reached >= value
        documents = [f"{text} c" for text in WORDS]
        ranked = reranker.rank("question c", documents, threshold=f"{target}={value}")
        assert ranked == [one for one in reranker.rank("question c", documents) if one.logit >= least]
    capsys.readouterr()
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS))
    rank = ["rank", "bees", str(tmp_path / "notes.jsonl"), "-m", str(model), "--json", "--threshold", "recall=0.9"]
    assert run(rank) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [one["probability"] for one in results] == [kept.probability(one["logit"]) for one in results]
    assert [one["logit"] for one in results] == [
        one.logit for one in reranker.rank("bees", WORDS) if one.logit >= kept.threshold("recall=0.9")
    ]


def test_findings_are_measured_on_queries_that_were_not_fitted(model, tmp_path):
    reranker = Reranker(model)
    judged(tmp_path / "judged.jsonl", reranker)
    pairs = fitting.read_judged(tmp_path / "judged.jsonl")
    found = fitting.calibrate(reranker, pairs, targets=("recall=1",))
    logits = np.array([reranker.score([one.pair])[0] for one in pairs], dtype=np.float64)
    truth = np.array([one.relevant for one in pairs])
    folds = np.repeat(np.arange(12), len(WORDS)) % fitting.FOLDS
    chances = np.empty(len(pairs))
    kept = np.empty(len(pairs), dtype=bool)
    for fold in range(fitting.FOLDS):
        slope, intercept = fitting.fit(logits[folds != fold], truth[folds != fold])
        chances[folds == fold] = 1 / (1 + np.exp(-(slope * logits[folds == fold] + intercept)))
        kept[folds == fold] = logits[folds == fold] >= logits[(folds != fold) & truth].min()
    assert found.brier == pytest.approx(((chances - truth) ** 2).mean())
    assert found.targets[0].recall.value == pytest.approx(kept[truth].mean())
    assert found.targets[0].precision.value == pytest.approx(truth[kept].mean())
    assert sum(one.pairs for one in found.bins) == len(pairs)


def test_other_weights_and_damaged_files_are_refused(model, tmp_path):
    reranker = Reranker(model)
    calibration.write(made(weights=reranker.weights_hash), tmp_path / "good.json")
    reranker.calibrate(tmp_path / "good.json")
    assert reranker.calibration == made(weights=reranker.weights_hash)
    calibration.write(made(), tmp_path / "other.json")
    with pytest.raises(InputError, match="of the weights"):
        reranker.calibrate(tmp_path / "other.json")
    for text in ("", "{}", '{"format": 9}', (tmp_path / "good.json").read_text().replace("2.0", "-2.0", 1)):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CheckpointError):
            reranker.calibrate(tmp_path / "bad.json")
    with pytest.raises(CheckpointError):
        reranker.calibrate(tmp_path / "none.json")


def test_a_model_without_calibration_says_what_to_do(model):
    with pytest.raises(InputError, match="turborank calibrate"):
        Reranker(model).rank("bees", ["a"], threshold="precision=0.9")
    with pytest.raises(InputError):
        Reranker(model).rank("bees", ["a"], threshold="often")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"query": "q", "document": "d"}\n', "judgement in one of the fields.*a.jsonl:1"),
        ("a.jsonl", '{"query": "q", "document": "d", "label": "x"}\n', "number.*a.jsonl:1"),
        ("a.jsonl", '{"query": "q", "label": 1}\n', "a.jsonl:1"),
        ("a.csv", "query,document,label\nq,d,1\n,d,0\n", "field query.*a.csv:3"),
        ("a.tsv", "query\tdocument\tlabel\nq\td\t1\n", "1 relevant of 1"),
    ],
)
def test_malformed_judged_pairs_are_reported_with_file_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        fitting.read_judged(tmp_path / name)


def test_tables_and_grades_are_read(tmp_path):
    (tmp_path / "a.csv").write_text('query,title,text,relevance\nq,t,"two\nlines",2\nq,,d,1\n')
    assert fitting.read_judged(tmp_path / "a.csv", relevant_from=2) == [
        (("q", "t two\nlines"), True),
        (("q", "d"), False),
    ]


def test_inverted_labels_are_refused(model, tmp_path, capsys):
    judged(tmp_path / "judged.jsonl", Reranker(model), flip=True)
    assert run(["calibrate", str(tmp_path / "judged.jsonl"), "--model", str(model)]) == 2
    assert "higher logits" in capsys.readouterr().err
    assert run(["calibrate", str(tmp_path / "judged.jsonl")]) == 2  # the embedded model: say where
    assert "--out" in capsys.readouterr().err
