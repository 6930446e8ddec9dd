"""Speed and error of engines and other libraries; what ``turborank bench`` measures.

Each contestant (an engine in one precision, or another library) runs in its own worker process. The parent sends
commands as JSON lines and suspends all workers but the one it measures.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from turborank.architectures import ARCHITECTURES, jinabert
from turborank.errors import EngineError, InputError, UnknownKeyError
from turborank.tokens import pack
from turborank.types import Encoding, Float32, ModelConfig

TURN = 0.25  # minimum seconds of calls in one turn of a contestant; one call at least
SLOW = 2.0  # seconds; contestants with slower calls get a turn in every second round only
BATCH = 32  # pairs in a padded batch, the default of the other libraries

Scorer = Callable[[Sequence[Encoding], int], Float32]  # (encodings, batch size) -> logits (P,)


@dataclass(frozen=True)
class Contestant:
    """One way to run the model, measured in its own process.

    ``loader`` is ``"module:function"`` or ``"file.py:function"``; the function takes the model's folder, the number of
    threads and ``options`` and returns a Scorer.
    """

    name: str
    label: str
    loader: str = "turborank.benchmark:load_engine"
    options: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


class EngineScorer:
    """A turborank engine with the scheduler's batches: no padding, limited by a token budget."""

    def __init__(self, engine: Any, token_budget: int) -> None:
        self.engine = engine
        self.token_budget = token_budget

    def __call__(self, pairs: Sequence[Encoding], _batch: int = BATCH) -> Float32:
        from turborank.scheduler import plan

        out = np.empty(len(pairs), dtype=np.float32)
        for places in plan([len(pair) for pair in pairs], self.token_budget):
            out[places] = self.engine.logits(pack([pairs[i] for i in places]))
        return out


def load_engine(model: Path, threads: int, options: Mapping[str, Any]) -> EngineScorer:
    """Scorer of the engine and precision that ``options`` names."""
    from turborank import checkpoint, engines
    from turborank.scheduler import budget

    given = checkpoint.read(model)
    name, precision = engines.choose(options["engine"], options.get("precision", "auto"), given.config)
    engine = engines.prepare(given.weights, given.config, name=name, precision=precision, threads=threads)
    return EngineScorer(engine, budget(engine))


def function(reference: str) -> Any:
    """Import the object that ``"module:name"`` or ``"file.py:name"`` refers to."""
    where, _, name = reference.rpartition(":")
    if not where.endswith(".py"):
        return getattr(importlib.import_module(where), name)
    spec = importlib.util.spec_from_file_location(Path(where).stem, where)
    if spec is None or spec.loader is None:
        raise InputError(f"expected a Python file with {name}, got {where}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


class _Work:
    """The commands of a worker process; each method is one command."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        load = function(order["loader"])
        imported = time.perf_counter()
        self.scorer: Scorer = load(Path(order["model"]), order["threads"], order["options"])
        self.sizes = sizes(Path(order["model"]))
        loaded = time.perf_counter()
        self.scorer(self._pairs("1x64"), BATCH)
        scored = time.perf_counter()
        engine = getattr(self.scorer, "engine", None)
        self.about = {
            "import_s": imported - began, "load_s": loaded - imported, "first_s": scored - loaded,
            "isa": getattr(engine, "isa", None), "precision": getattr(engine, "precision", None),
        }  # fmt: skip

    def _pairs(self, workload: str) -> list[Encoding]:
        return encodings(workload, *self.sizes)

    def time(self, workload: str, batch: int, seconds: float) -> list[float]:
        """Wall seconds of each call until ``seconds`` are used up, one at least."""
        pairs = self._pairs(workload)
        took: list[float] = []
        end = time.perf_counter() + seconds
        while not took or time.perf_counter() < end:
            start = time.perf_counter()
            self.scorer(pairs, batch)
            took.append(time.perf_counter() - start)
        return took

    def logits(self, workload: str, batch: int) -> list[float]:
        return [float(x) for x in self.scorer(self._pairs(workload), batch)]

    def peak(self) -> int:
        return peak_memory()


def worker() -> None:
    """Entry point of a worker process: execute commands, one JSON line each, until standard input closes.

    Answers go to a copy of standard output; the original is redirected to standard error, because libraries print.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    work = _Work(json.loads(sys.stdin.readline()))
    answer(work.about)
    for line in sys.stdin:
        order = json.loads(line)
        answer(getattr(work, order.pop("do"))(**order))


class Process:
    """A contestant's worker process, suspended by SIGSTOP (where the system has it) between commands."""

    def __init__(self, contestant: Contestant, model: Path, threads: int) -> None:
        self.contestant = contestant
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | dict(contestant.env)
        self._child = subprocess.Popen(
            [sys.executable, "-c", "from turborank.benchmark import worker; worker()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True,
        )  # fmt: skip
        order = {"loader": contestant.loader, "options": dict(contestant.options), "model": str(model)}
        self.about = self._ask(order | {"threads": threads})

    def _ask(self, order: Mapping[str, Any]) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(order) + "\n")
            self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            assert self._child.stderr is not None
            said = self._child.stderr.read().strip().splitlines()
            reason = said[-1] if said else f"exit code {self._child.wait()}"
            self.close()
            raise EngineError(f"expected {self.contestant.name} to run, got: {reason}")
        return json.loads(line)

    def time(self, workload: str, batch: int, seconds: float) -> list[float]:
        """Wall seconds of each call until ``seconds`` are used up, one at least."""
        return [float(took) for took in self._order("time", workload=workload, batch=batch, seconds=seconds)]

    def logits(self, workload: str, batch: int) -> list[float]:
        """The workload's logits (P,)."""
        return [float(logit) for logit in self._order("logits", workload=workload, batch=batch)]

    def peak(self) -> int:
        """Peak resident memory of the process in bytes."""
        return int(self._order("peak"))

    def _order(self, do: str, **arguments: Any) -> Any:
        self.signal("SIGCONT")
        try:
            return self._ask({"do": do, **arguments})
        finally:
            self.signal("SIGSTOP")

    def signal(self, name: str) -> None:
        """Send the named signal, if the system has it and the process is alive."""
        if hasattr(signal, name) and self._child.poll() is None:
            self._child.send_signal(getattr(signal, name))

    def close(self) -> None:
        """Kill the process and close its pipes."""
        self._child.kill()
        with contextlib.suppress(BrokenPipeError), self._child:
            pass  # leaving closes the pipes and waits


@contextlib.contextmanager
def processes(contestants: Sequence[Contestant], model: Path, threads: int) -> Iterator[dict[str, Process]]:
    """Worker processes of all contestants, loaded and suspended. Raises EngineError when one cannot start."""
    running: dict[str, Process] = {}
    try:
        for contestant in contestants:
            running[contestant.name] = Process(contestant, model, threads)
            running[contestant.name].signal("SIGSTOP")
        yield running
    finally:
        for process in running.values():
            process.close()


Turn = tuple[str, int]  # a contestant's name and a batch size


def in_turns(
    running: Mapping[str, Process], turns: Mapping[str, Sequence[Turn]], rounds: int
) -> dict[str, dict[Turn, list[float]]]:
    """Workload -> turn -> seconds of every counted call.

    The order of contestants is reversed in every second round. The first call of a contestant is a warm-up and is not
    counted, unless it takes more than SLOW seconds: then it counts, and the contestant gets a turn in every second
    round only.
    """
    took: dict[str, dict[Turn, list[float]]] = {w: {turn: [] for turn in each} for w, each in turns.items()}
    for number in range(rounds):
        for workload, each in took.items():
            for turn in list(each)[:: -1 if number % 2 else 1]:
                name, batch = turn
                if number == 0:
                    first = running[name].time(workload, batch, 0.0)
                    each[turn] += [s for s in first if s > SLOW]
                slow = bool(each[turn]) and each[turn][0] > SLOW
                if not (slow and number % 2 == 0):
                    each[turn] += running[name].time(workload, batch, TURN)
    return took


# Workloads, and a model with random weights.


class Workload(NamedTuple):
    """Pairs of given lengths in tokens, in the caller's order."""

    title: str
    lengths: tuple[int, ...]


def _ragged(pairs: int = 100, median: float = 142.0, spread: float = 0.6) -> tuple[int, ...]:
    """Log-normal lengths in tokens, 16 to 1,024, mean about 170, similar to search results."""
    drawn = np.random.default_rng(11).lognormal(math.log(median), spread, pairs)
    return tuple(int(n) for n in np.clip(np.rint(drawn), 16, 1024))


WORKLOADS: dict[str, Workload] = {
    "ragged": Workload("100 documents, mean {mean:.0f} tokens", _ragged()),
    "32x128": Workload("32 × 128", (128,) * 32),
    "8x512": Workload("8 × 512", (512,) * 8),
    "2x2048": Workload("2 × 2,048", (2048,) * 2),
    "1x64": Workload("1 × 64", (64,)),
    "1x8192": Workload("1 × 8,192", (8192,)),
}
LONG = "1x8192"  # padded peers need up to 12 GB for it, so it runs in one process at a time


def title(workload: str) -> str:
    """Display name of a workload."""
    lengths = WORKLOADS[workload].lengths
    return WORKLOADS[workload].title.format(mean=sum(lengths) / len(lengths))


def lengths(workload: str, longest: int | None = None) -> list[int]:
    """Tokens of each pair, of which a model with fewer positions reads the first ``longest``."""
    return [n if longest is None else min(n, longest) for n in WORKLOADS[workload].lengths]


def encodings(workload: str, vocabulary: int, types: int = 2, longest: int | None = None) -> list[Encoding]:
    """The workload's random tokens, the same in every process; two thirds of each pair are the document."""
    rng = np.random.default_rng(5)
    out = []
    for n in lengths(workload, longest):
        ids = rng.integers(5, vocabulary, n).astype(np.int32)
        second = (np.arange(n) >= n // 3) if types > 1 else np.zeros(n)
        out.append(Encoding(ids, second.astype(np.int32), read=n))
    return out


def sizes(model: Path) -> tuple[int, int, int]:
    """Vocabulary size, number of token types and positions of a checkpoint, for ``encodings``."""
    config = json.loads((model / "config.json").read_text())
    unused = int(config["pad_token_id"]) + 1 if config["model_type"] == "xlm-roberta" else 0
    types = int(config.get("type_vocab_size", 0))  # ModernBERT has none
    return int(config["vocab_size"]), types, int(config["max_position_embeddings"]) - unused


TURBO: dict[str, Any] = {
    "architectures": ["JinaBertModel"], "model_type": "bert", "position_embedding_type": "alibi",
    "feed_forward_type": "geglu", "hidden_act": "gelu", "vocab_size": 61056, "hidden_size": 384,
    "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "max_position_embeddings": 8192,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "alibi_slopes": "halved-tail",
}  # fmt: skip


def turbo_config(layers: int = 6) -> ModelConfig:
    """Config of jina-reranker-v1-turbo-en's shape; tests use fewer layers."""
    raw = TURBO | {"num_hidden_layers": layers}
    found = jinabert.recognise(raw, {"encoder.layer.0.mlp.gated_layers.weight": (3072, 384)})
    assert found is not None
    return found


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, Float32]:
    """Random weights, N(0, 0.02²) as in the published config, with non-zero biases and gains other than one.

    Query and key weights have the variance 1/C, so that attention scores have a standard deviation of about 1: with
    flat attention, ALiBi skipping would drop more blocks than in a trained model.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, Float32] = {}
    for name, shape in ARCHITECTURES[config.architecture].parameters(config).items():
        wide = name.endswith(("query.weight", "key.weight"))
        spread = 1 / math.sqrt(config.hidden_size) if wide else 0.02
        centre = 1.0 if name.lower().endswith("layernorm.weight") else 0.0
        weights[name] = (centre + spread * rng.standard_normal(shape, dtype=np.float32)).astype(np.float32)
    return weights


def write_model(folder: Path, tokenizer: Path, layers: int = 6) -> None:
    """Write a checkpoint of random weights in the published layout, in bfloat16 as the published one."""
    config = turbo_config(layers)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blocks, offset = [], 0
    for name, value in random_weights(config).items():
        bits = value.view(np.uint32)
        block = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # to nearest, ties to even
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [offset, offset + len(block)]}
        blocks.append(block)
        offset += len(block)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TURBO | {"num_hidden_layers": layers}, indent=1))
    if tokenizer.resolve() != (folder / "tokenizer.json").resolve():
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(blocks)


# Speed and error of everything that can run on this machine.


def speed(workload: str, took: Sequence[float], longest: int | None = None) -> dict[str, float]:
    """Minimum and median seconds, and tokens per second (padding excluded) of the fastest call."""
    tokens = sum(lengths(workload, longest))
    return {"min_s": min(took), "median_s": float(np.median(took)), "tokens_s": tokens / min(took), "calls": len(took)}


def error(logits: Sequence[float], exact: Sequence[float]) -> dict[str, float | None]:
    """Maximum and rms distance from the reference engine's logits, and Spearman's rank correlation.

    ``rms_share`` is the rms error divided by the standard deviation of the reference engine's logits.
    """
    got, want = np.asarray(logits, np.float64), np.asarray(exact, np.float64)
    rms = float(np.sqrt(np.mean((got - want) ** 2)))
    many = len(want) > 2
    ranks = [np.argsort(np.argsort(x)) for x in (got, want)]
    return {
        "max": float(np.abs(got - want).max()), "rms": rms,
        "rms_share": rms / float(want.std()) if many else None,
        "spearman": float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if many else None,
    }  # fmt: skip


def exact_logits(model: Path, workload: str) -> list[float]:
    """Logits (P,) of the reference engine, which is slow."""
    scorer = load_engine(model, 1, {"engine": "reference"})
    return [float(x) for x in scorer(encodings(workload, *sizes(model)))]


def engines_here() -> list[Contestant]:
    """Contestants of this package: every precision of every instruction set here, and torch if it is installed."""
    from turborank.engines import ENGINES, native

    out = [
        Contestant(
            f"{isa}-{precision}",
            f"turborank {precision}, {isa}",
            options={"engine": "native", "precision": precision},
            env={native.ISA_VARIABLE: isa},
        )
        for isa in native.isas()
        for precision in native.precisions(isa)
    ]
    if ENGINES["torch"].available() is None:
        precision = ENGINES["torch"].automatic()
        label = f"turborank {precision}, torch"
        out.append(Contestant("torch", label, options={"engine": "torch", "precision": precision}))
    return out


def _peers(file: Path, model: Path) -> tuple[list[Contestant], dict[str, str]]:
    """Contestants of a PEERS table (see bench/peers.py) that can run here, and for the others the reason."""
    file = file.resolve()
    if not file.is_file():
        raise InputError(f"expected a Python file with a table PEERS, got no file at {file}")
    ready, left_out = [], {}
    for name, row in function(f"{file}:PEERS").items():
        missing = [need for need in row.needs if importlib.util.find_spec(need) is None]
        if missing:
            left_out[name] = f"not installed: {', '.join(missing)}"
            continue
        try:
            if row.prepare is not None:
                row.prepare(model, row.options)
        except Exception as error:  # libraries raise anything; a failure becomes a line of the report
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        ready.append(Contestant(name, row.label, f"{file}:{row.load.__name__}", row.options))
    return ready, left_out


def compare(
    *, workloads: Sequence[str], rounds: int, threads: int | None = None, peers: Path | None = None, errors: bool = True
) -> dict[str, Any]:
    """Measure everything that can run here on each of ``workloads``.

    Returns ``workloads`` (name -> rows with speed and error) and ``left_out`` (name -> reason).
    Raises UnknownKeyError for an unknown workload, and EngineError when a contestant fails.
    """
    from turborank import catalog
    from turborank.engines import allowed_cores
    from turborank.reranker import MAX_THREADS, whole

    threads = allowed_cores() if threads is None else whole("threads", threads, most=MAX_THREADS)
    for workload in workloads:
        if workload not in WORKLOADS:
            raise UnknownKeyError("workload", workload, tuple(WORKLOADS))
    with tempfile.TemporaryDirectory(prefix="turborank-bench-") as folder:
        model = Path(folder)
        write_model(model, catalog.lookup(catalog.DEFAULT).folder / "tokenizer.json")
        contestants = engines_here()
        others, left_out = _peers(peers, model) if peers is not None else ([], {})
        contestants += others
        if not contestants:
            contestants = [Contestant("reference", "turborank fp32, numpy", options={"engine": "reference"})]
        labels = {contestant.name: contestant.label for contestant in contestants}
        found: dict[str, list[dict[str, Any]]] = {workload: [] for workload in workloads}
        with processes(contestants, model, threads) as running:
            took = in_turns(running, {w: [(name, BATCH) for name in running] for w in workloads}, rounds)
            for workload, each in took.items():
                exact = exact_logits(model, workload) if errors else None
                for (name, batch), seconds in each.items():
                    row: dict[str, Any] = {"name": name, "label": labels[name], **speed(workload, seconds)}
                    if exact is not None:
                        row |= error(running[name].logits(workload, batch), exact)
                    found[workload].append(row)
    return {"workloads": found, "left_out": left_out}
