"""Cleaning, cutting and the queries made from passages."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turborank import text as texts
from turborank.distill import sources
from turborank.errors import UnknownKeyError

CLEANED = [  # rule, text, by hand
    ("treebank", "the football conference -lrb- afc -rrb- champion", "the football conference (afc) champion"),
    ("treebank", "`` It 's done , '' she said .", '"It\'s done," she said.'),
    ("treebank", "they do n't know , do they ?", "they don't know, do they?"),
    ("treebank", "-LRB- Farrar -RRB- 24 -- 10", "(Farrar) 24 -- 10"),
    ("transcript", "So {disfmarker} Morgan wants {vocalsound} it", "So Morgan wants it"),
    ("alternatives", "What is (are) Knee Replacement ?", "What is Knee Replacement ?"),
    ("alternatives", "the symptom(s) of (rare) gout", "the symptom of (rare) gout"),
    ("spaces", " a\n \tb\u00a0c ", "a b c"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "text", "expected"), CLEANED)
def test_cleaning(rule, text, expected):
    assert texts.cleaner([rule])(text) == expected


def test_every_rule_is_tested_and_an_unknown_one_named():
    assert {rule for rule, *_ in CLEANED} == set(texts.CLEANERS)
    with pytest.raises(UnknownKeyError, match="did you mean 'treebank'"):
        texts.cleaner(["treebanks"])


def test_spaces_inside_quotation_marks_are_removed():
    """An opening mark loses the blank after it, a closing one the blank before it."""
    assert texts.treebank("he said `` hello there '' to me") == 'he said "hello there" to me'


sentence = st.integers(1, 300).map(lambda count: " ".join(["Word"] + ["word"] * (count - 1)) + ".")


@given(st.lists(sentence, max_size=30), st.integers(0, 2**32))
def test_passages_are_whole_sentences_of_the_promised_length(parts, seed):
    text = " ".join(parts)
    cut = list(texts.cut(text, np.random.default_rng(seed)))
    assert all(texts.MIN_WORDS <= len(passage.split()) <= texts.MAX_WORDS for passage in cut)
    joined = " ".join(cut)
    assert text.startswith(joined)  # nothing lost but the end, nothing twice, in order
    assert len(text.split()) - len(joined.split()) < texts.MIN_WORDS
    if all(len(part.split()) <= texts.LONGEST_SENTENCE for part in parts):
        assert all(passage.endswith(".") and passage.startswith("Word") for passage in cut)


TEXTS = [
    "Bees make honey in summer from the flowers of lime trees. They sleep in winter, when no flower opens anywhere. "
    "The queen alone lays eggs for the whole of the hive.",
    "Wasps make paper in summer from the wood of old fences. Short one.",
    "Too short.",
]


def made(kind, count, seed=0):
    return list(sources.make(TEXTS, np.ones(len(TEXTS)), {kind: count}, seed))


def test_sentences_are_sentences_of_their_passage():
    for query in made("sentence", 10):
        assert query.text in texts.sentences(TEXTS[query.passage])
        assert len(query.text.split()) in sources.SENTENCE_WORDS
    assert sorted(query.passage for query in made("sentence", 10)) == [0, 1]  # each passage once, the last has none


def test_spans_are_consecutive_sentences():
    [query] = made("span", 10)
    first, second, third = texts.sentences(TEXTS[0])
    assert query.text in (f"{first} {second}", f"{second} {third}", f"{first} {second} {third}")


ENDS = [  # text, its sentences, those of strict mode; by hand
    ("One ends. Two! Three?", ["One ends.", "Two!", "Three?"], ["One ends.", "Two!", "Three?"]),
    ("See Fig. 3, e.g. the bee.", ["See Fig.", "3, e.g.", "the bee."], ["See Fig. 3, e.g. the bee."]),
    ("no capitals. here either.", ["no capitals.", "here either."], ["no capitals. here either."]),
    ('He said "go." She went.', ['He said "go."', "She went."], ['He said "go."', "She went."]),
    ("Fin. (Ende.) Élan. «Oui.» ж", ["Fin.", "(Ende.)", "Élan.", "«Oui.» ж"], ["Fin.", "(Ende.)", "Élan.", "«Oui.» ж"]),
    ("蜂は飛ぶ。花は咲く。", ["蜂は飛ぶ。", "花は咲く。"], ["蜂は飛ぶ。", "花は咲く。"]),
    ("A heading\n\nText.", ["A heading", "Text."], ["A heading", "Text."]),
    (" 3.14 is pi ", ["3.14 is pi"], ["3.14 is pi"]),
    ("", [], []),
]


@pytest.mark.parametrize(("text", "loose", "strict"), ENDS)
def test_ends_of_sentences(text, loose, strict):
    assert texts.sentences(text) == loose
    assert texts.sentences(text, strict=True) == strict


def words_of(text):
    return list(dict.fromkeys(text.lower().replace(",", "").replace(".", "").split()))


@pytest.mark.parametrize("seed", range(8))
def test_keywords_are_the_rarest_words_in_their_order(seed):
    counts = Counter(word for text in TEXTS for word in words_of(text))
    for query in made("keywords", 10, seed):
        words = query.text.split()
        [there] = [found for one in texts.sentences(TEXTS[query.passage]) if set(words) <= set(found := words_of(one))]
        assert words == [word for word in there if word in words]
        assert max(counts[word] for word in words) <= min(counts[word] for word in there if word not in words)


def test_made_queries_depend_on_the_seed_alone():
    assert made("keywords", 2, seed=3) == made("keywords", 2, seed=3)
    assert len({tuple(made("keywords", 2, seed=seed)) for seed in range(8)}) > 1


def test_a_passage_of_half_the_weight_comes_half_as_often():
    texts = [f"Number {n} is a sentence of eight words." for n in range(2000)]
    weights = np.where(np.arange(2000) < 1000, 1.0, 0.5)
    places = [query.passage for query in sources.make(texts, weights, {"sentence": 300}, 0)]
    light = sum(place >= 1000 for place in places) / len(places)
    assert 0.25 < light < 0.42  # a third, within three standard deviations of the binomial
