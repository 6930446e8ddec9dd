"""A small data set for tests: a corpus about animals, pairs, and files in every format."""

import gzip
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ANIMALS = re.findall(
    r"\w+", "bee wasp ant moth fly cat dog cow pig hen fox owl elk eel cod bat rat yak emu asp koi gnu ape jay"
)
HABITS = ("sleeps in the hollow of an old tree", "feeds at dusk near water", "keeps its young warm in winter")


def passages() -> list[str]:
    """Three for each animal."""
    return [f"The {animal} {habit}." for animal in ANIMALS for habit in HABITS]


def pairs() -> list[dict[str, Any]]:
    """A question for every passage."""
    questions = ("Where does the {} sleep?", "When does the {} feed?", "How does the {} keep its young warm?")
    return [
        {"query": question.format(animal), "passage": f"The {animal} {habit}."}
        for animal in ANIMALS
        for question, habit in zip(questions, HABITS, strict=True)
    ]


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """Records as JSON lines (strings unchanged), gzipped if the name ends in .gz."""
    text = "".join((one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)) + "\n" for one in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def shuffled(records: list[Any], seed: int) -> list[Any]:
    """Another order."""
    copy = list(records)
    random.Random(seed).shuffle(copy)
    return copy


def read_lines(path: Path) -> list[Any]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder except the score cache."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "cache" not in path.parts}
