"""The documentation: generated pages are current, cited sections exist, and the code of every page runs."""

import functools
import glob
import gzip
import importlib.metadata
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import typer
from helpers import write_checkpoint
from random_models import model_config
from safetensors.numpy import load_file, save_file

from turborank import Reranker, __version__
from turborank.cli import main as cli
from turborank.engines import native
from turborank.errors import InputError

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
    """Citations in a text that docs/ does not have."""
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


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_to_headings_lead_to_one():
    for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8")):
            there = page.parent / target if target else page
            assert anchor in anchors(there), f"{page.name} links to {target}#{anchor}"


# --- the code of the pages, run in a scratch folder whose files have the names that a page uses -------------------

FENCE = re.compile(r"^```(console|python)\n(.*?)^```$", flags=re.M | re.S)
GENERATED = {*GENERATE["PAGES"]}
# Commands that are not run here, and why. A line that begins so is left out.
NOT_RUN = {
    "pip install": "the build installs",
    "turborank serve": "runs until it is stopped; tests/serve starts servers, with certificates too",
    "openssl": "tests/serve/test_serve_tls.py makes certificates",
    "curl --cacert": "tests/serve/test_serve_tls.py",
    "pip wheel": "the build makes wheels",
    "docker": "needs docker; make conformance-core checks the files",
    "TURBORANK_API_KEY=change-me docker": "needs docker; make conformance-core checks the files",
    "turborank keys new search-team && kubectl": "needs a cluster",
    "helm": "needs a cluster; make conformance-core renders the chart",
}


def lines_of(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def tiny_model(path: Path) -> None:
    """A random JinaBERT of the native engine's sizes, with a tokenizer that knows letters."""
    size = {"vocab_size": 99, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
    config = model_config(**size, slopes=(0.25, 0.0625), max_length=512, num_hidden_layers=1)
    write_checkpoint(path, config, dtype="F32")


def for_distillation(folder: Path) -> None:
    """Pairs, a cross-encoder with five layers, a bi-encoder, long texts and FAQ files; all tiny."""
    families = pytest.importorskip("families", reason="needs pip install 'turborank[train]' transformers")
    rows = [{"query": f"what is {word}", "passage": f"{word} is the capital"} for word in families.WORDS]
    with gzip.open(folder / "pairs.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    families.save_family(folder / "BAAI" / "bge-reranker-base", "xlm_roberta", num_hidden_layers=5)
    bert = folder / "all-MiniLM-L6-v2"
    shape = {**families.SMALL, **families.STATED["bert"], "num_hidden_layers": 1}
    families.transformers.BertModel(families.transformers.BertConfig(**shape)).save_pretrained(bert)
    families.wordpiece().save(str(bert / "tokenizer.json"))
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    lines_of(folder / "books.jsonl", [{"text": "paris is the capital of france. " * 40}])
    (folder / "faq").mkdir()
    (folder / "faq" / "password.md").write_text("Choose reset on the page where you sign in.")


def for_evaluation(folder: Path) -> None:
    """A collection of two queries in BEIR layout, a run over it, and two models."""
    pytest.importorskip("bm25s", reason="needs pip install 'turborank[eval]'")
    write_collection(folder / "my-data")
    for run in ("dense.trec", "bm25.trec"):
        (folder / run).write_text("q0 Q0 d0 1 2.0 x\nq0 Q0 d2 2 1.0 x\nq1 Q0 d1 1 2.0 x\n")
    for name in ("jina-reranker-v1-tiny-en", "path/to/mine"):
        tiny_model(folder / name)


def write_collection(data: Path) -> None:
    """Two queries and three documents in BEIR layout."""
    (data / "qrels").mkdir(parents=True)
    texts = ["the moon pulls the sea", "yeast makes dough rise", "a sail is a wing"]
    lines_of(data / "corpus.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(texts)])
    lines_of(data / "queries.jsonl", [{"_id": "q0", "text": "moon sea"}, {"_id": "q1", "text": "dough"}])
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t1\n")


def for_calibration(folder: Path) -> None:
    """Judged pairs that a tiny model, and the embedded one, order as they were judged."""
    pytest.importorskip("scipy", reason="needs pip install 'turborank[eval]'")
    tiny_model(folder / "my-model")
    (folder / "notes").mkdir()
    texts = ["scouts dance for it", "sourdough needs a starter", "tides follow the moon", "the swarm votes"]
    for number, text in enumerate(texts):
        (folder / "notes" / f"{number}.md").write_text(text)
    for file, model in (("judged.jsonl", folder / "my-model"), ("judged.csv", None)):
        reranker = Reranker(model)
        ranked = [(query, one.document, int(place < 2)) for query in ("bees", "bread", "sea", "home", "wind", "moon")
                  for place, one in enumerate(reranker.rank(query, texts))]  # fmt: skip
        if file.endswith("csv"):
            rows = [f"{query},{document},{label}\n" for query, document, label in ranked]
            (folder / file).write_text("query,document,label\n" + "".join(rows))
        else:
            lines_of(folder / file, [{"query": q, "document": d, "label": label} for q, d, label in ranked])


def for_scale(folder: Path) -> None:
    """Pairs, and lists of candidates with their corpus."""
    write_collection(folder)
    lines_of(folder / "pairs.jsonl", [{"query": "moon sea", "document": "the moon pulls the sea"}])
    lines_of(folder / "lists.jsonl", [{"query": "moon sea", "candidates": ["d0", "d2"]}])


def for_export(folder: Path) -> None:
    for library in ("torch", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="needs pip install 'turborank[torch,onnx]'")
    families = pytest.importorskip("families")
    tiny_model(folder / "my-model")
    families.save_family(folder / "my-bert-student", "bert")


def for_gpu(folder: Path) -> None:
    """The commands are the same without a GPU: torch then computes on the CPU."""
    pytest.importorskip("torch", reason="needs pip install 'turborank[torch]'")
    (folder / "examples" / "texts").mkdir(parents=True)
    (folder / "examples" / "texts" / "bees.md").write_text("Bees scout for hollow trees.")


class Page(NamedTuple):
    """How the code of a page is run: its files, names for its Python code, and text replaced to keep the run small."""

    prepare: Callable[[Path], None]
    names: Mapping[str, Any] = MappingProxyType({})
    replaced: Mapping[str, str] = MappingProxyType({})
    slow: bool = False


SMALL_RUN = "--steps 2 --evaluate-every 2 --budget 256 --documents 3 --long-every 0 --threads 1"
PAGES = {
    "distillation.md": Page(
        for_distillation,
        {"lists": Path("lists"), "student": Path("student"), "out": Path("run-python")},
        {
            "--held-out 0.02": "--held-out 0.4 --bm25 3 --random 2",
            "--out run\n": f"--out run {SMALL_RUN}\n",
            "--steps 600": "--steps 2 --budget 256 --long-tokens 64 --threads 1",
            "--texts lists --out student": "--texts lists --out student-alibi",
            "recover student": "recover student-alibi",
            "steps=1000": "steps=2",
            "BatchOptions()": "BatchOptions(budget=256, documents=3, hard=1, long_every=0)",
        },
    ),
    "evaluation.md": Page(for_evaluation, replaced={"evaluate scifact": "evaluate my-data/ --models path/to/mine",
                                                    "trec-covid": "my-data/ --models bm25 --out another"}),
    "caching.md": Page(lambda folder: None),
    "calibration.md": Page(for_calibration),
    "depth.md": Page(lambda folder: None),
    "export.md": Page(for_export, slow=True),
    "gpu.md": Page(for_gpu),
    "scale.md": Page(for_scale),
    "serving.md": Page(lambda folder: None),
}  # fmt: skip


def code(name: str) -> list[tuple[str, str]]:
    return FENCE.findall((DOCS / name).read_text(encoding="utf-8"))


def commands(block: str) -> list[str]:
    """The command lines of a console block, continued lines joined, comments behind two spaces cut off."""
    found = re.findall(r"^\$ ((?:.*\\\n)*.*)", block, flags=re.M)
    return [re.sub(r"  +# .*", "", line.replace("\\\n", " ")).strip() for line in found]


def run_command(line: str) -> None:
    """A turborank command, in this process; file patterns are expanded as a shell does."""
    words = [word for one in shlex.split(line) for word in (sorted(glob.glob(one)) if "*" in one else [one])]
    assert words[0] == "turborank", f"no rule to run {line!r}; add one to NOT_RUN with its reason"
    assert cli.run(words[1:]) == 0, line


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * p.slow) for n, p in PAGES.items()])
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    page = PAGES[name]
    monkeypatch.chdir(tmp_path)
    page.prepare(tmp_path)
    for language, block in code(name):
        for before, after in page.replaced.items():
            block = block.replace(before, after)
        if language == "python":
            if "import mteb" not in block:  # tests/conformance/test_mteb.py evaluates with it
                exec(compile(block, name, "exec"), {"__name__": "page", **page.names})
            continue
        for line in commands(block):
            if line.startswith("curl localhost:8080"):
                with loopback(tmp_path) as url:
                    subprocess.run(["bash", "-c", line.replace("localhost:8080", f"-sf {url}")], check=True)
            elif not line.startswith(tuple(NOT_RUN)):
                run_command(line)


@contextmanager
def loopback(folder: Path) -> Iterator[str]:
    """The address of a server with a tiny model."""
    pytest.importorskip("starlette", reason="needs pip install 'turborank[serve]'")
    if not shutil.which("curl"):
        pytest.skip("no curl on this machine")
    sys.path.append(str(Path(__file__).parent / "serve"))
    from serving import running

    tiny_model(folder / "tiny")
    with running(folder / "tiny") as up:
        yield up.url


def test_no_page_with_code_is_forgotten_and_no_rule_is_stale():
    pages = {page.name for page in DOCS.glob("*.md") if FENCE.search(page.read_text(encoding="utf-8"))} - GENERATED
    assert pages <= set(PAGES), "pages with code that no test runs"
    everything = [line for name in PAGES for kind, block in code(name) if kind == "console" for line in commands(block)]
    assert [start for start in NOT_RUN if not any(line.startswith(start) for line in everything)] == []
    for name, page in PAGES.items():
        text = "".join(block for _, block in code(name))
        assert [before for before in page.replaced if before not in text] == [], name


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_options_of_every_example_of_a_command_exist(name):
    """docs/cli.md and --help print these lines; they are parsed here, not run."""
    command = functools.reduce(
        lambda group, word: group.commands[word], name.split(), typer.main.get_command(cli.build())
    )
    for _, line in cli.COMMANDS[name].examples:
        [arguments] = re.findall(rf"turborank {name}\b([^|&]*)", line)
        command.make_context(name, shlex.split(arguments))


def test_make_has_the_verbs_that_the_pages_name():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md"), *(ROOT / ".github").rglob("*.yml")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?:^\$ |`|run: )make ([a-z-]+)", text, flags=re.M)
        assert set(named) <= targets, page.name


def test_packages_and_charts_take_the_version_from_the_code():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    source = project["tool"]["scikit-build"]["metadata"]["version"]
    assert source == {"provider": "scikit_build_core.metadata.regex", "input": "src/turborank/__init__.py"}
    assert f'\n__version__ = "{__version__}"\n' in (ROOT / source["input"]).read_text(encoding="utf-8")
    assert importlib.metadata.version("turborank") == __version__  # what is installed was built from this code
    chart = (ROOT / "deploy" / "helm" / "turborank" / "Chart.yaml").read_text(encoding="utf-8")
    assert re.findall(r"^(?:version|appVersion): \"?([^\s\"]+)", chart, flags=re.M) == [__version__, __version__]


def test_the_citation_names_the_version_and_forms_are_yaml():
    yaml = pytest.importorskip("yaml", reason="needs pyyaml, which transformers brings")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    for path in (ROOT / ".github").rglob("*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.parent.name == "ISSUE_TEMPLATE" and path.stem != "config":
            assert {"name", "description", "body"} <= set(form), path.name


def test_the_table_of_instruction_sets_has_what_this_machine_runs():
    isas = {isa: set(native.precisions(isa)) for isa in native.isas()}
    if not isas:
        pytest.skip("the native engine is not built")
    table = GENERATE["instruction_sets"]()
    assert set(isas) <= set(table)
    assert all(precisions <= set(table[isa]) for isa, precisions in isas.items())


# --- docs/troubleshooting.md: each error is provoked, and its message compared with the page's ------------------------


def command_error(*arguments: str) -> Callable[[pytest.CaptureFixture[str]], str]:
    def provoke(capsys: pytest.CaptureFixture[str]) -> str:
        assert cli.run(arguments) == 2
        return capsys.readouterr().err

    return provoke


def one_document(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(InputError) as caught:
        Reranker("tiny", engine="reference").rank("question", "document")
    return str(caught.value)


RANK = ("rank", "question", "document.txt", "--model")
PROVOKED = {
    "1": command_error(*RANK, "jina-reranker-v1-tiny-en", "--offline"),
    "2": command_error(*RANK, "jina-turbo"),
    "3": command_error(*RANK, "pickle"),
    "4": command_error(*RANK, "embedding"),
    "5": command_error(*RANK, "tiny", "--length", "error"),
    "6": command_error(*RANK, "tiny", "--precision", "bf16"),
    "7": command_error("evaluate", "my-data", "--models", "bm25"),
    "8": one_document,
    "9": command_error("serve", "--host", "0.0.0.0"),
    "10": command_error("evaluate", "broken", "--models", "bm25"),
}


@pytest.fixture(scope="module")
def broken_things(tmp_path_factory):
    """Inputs that provoke the errors."""
    folder = tmp_path_factory.mktemp("broken-things")
    for name in ("tiny", "pickle", "embedding"):
        tiny_model(folder / name)
    (folder / "pickle" / "model.safetensors").rename(folder / "pickle" / "pytorch_model.bin")
    weights = load_file(folder / "embedding" / "model.safetensors")
    bare = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    save_file(bare, folder / "embedding" / "model.safetensors")
    (folder / "document.txt").write_text("bees " * 400, encoding="utf-8")
    write_collection(folder / "my-data")
    write_collection(folder / "broken")
    with (folder / "broken" / "corpus.jsonl").open("a", encoding="utf-8") as file:
        file.write("not JSON\n")
    return folder


def messages() -> dict[str, str]:
    """Section number -> the message that it shows."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^## (\d+) .*?^```text\n(.*?)\n```$", page, flags=re.M | re.S))


def test_every_error_of_the_page_is_provoked():
    assert set(messages()) == set(PROVOKED)


@pytest.mark.parametrize("number", PROVOKED)
def test_an_error_reads_as_the_page_says(number, broken_things, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(broken_things)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    if number == "6":
        monkeypatch.setenv("TURBORANK_ISA", "portable")  # which no machine lacks, and which has no bf16
    if number == "7":
        monkeypatch.setitem(sys.modules, "bm25s", None)
    if number == "9":
        pytest.importorskip("starlette", reason="needs pip install 'turborank[serve]'")
    if number == "10":
        pytest.importorskip("bm25s", reason="needs pip install 'turborank[eval]'")
    said = " ".join(PROVOKED[number](capsys).split())
    parts = [re.escape(part.strip()) for part in messages()[number].split("…")]
    assert re.search(r".*?".join(parts), said), said
