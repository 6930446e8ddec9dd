"""Coverage-guided fuzzing of one format of targets.py with atheris (pip install atheris).

python tests/fuzz/fuzz.py TARGET SECONDS [FOLDER]     FOLDER keeps the corpus and what was found
"""

import os
import random
import sys
import tempfile
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

with atheris.instrument_imports(include=["turborank", "targets"]):
    import mutations
    import targets


MEMORY = os.environ.get("FUZZ_MEMORY", "2048")  # MiB of the process; more is a finding


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """A change of a JSON value at a random place, or one of libFuzzer's own."""
    changed = mutations.mutated(data, random.Random(seed)) if seed % 2 else None
    return (changed or atheris.Mutate(data, most))[:most]


def main() -> None:
    name, seconds = sys.argv[1], sys.argv[2]
    folder = Path(sys.argv[3] if len(sys.argv) > 3 else tempfile.mkdtemp(prefix="turborank-fuzz-"))
    corpus = folder / f"corpus-{name}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(targets.TARGETS[name].seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def attempt(data: bytes) -> None:
        targets.attempt(name, data)

    arguments = [
        sys.argv[0], f"-max_total_time={seconds}", f"-artifact_prefix={folder}/found-{name}-", "-max_len=16384",
        f"-timeout={3 * targets.BOUND:.0f}", f"-rss_limit_mb={MEMORY}", "-print_final_stats=1", str(corpus),
    ]  # fmt: skip
    atheris.Setup(arguments, attempt, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
