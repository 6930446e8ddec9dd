"""Architecture rules: allowed imports, sizes of files and functions, the public interface.

LADDER defines the layers; docs/architecture.md explains them.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import turborank
from turborank import errors

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "turborank"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A unit (a module or package directly under turborank) imports only from rows above its own.
LADDER = (
    {"errors", "types"},
    # strings; the models we know; what a forward is written in; lists into one
    {"text", "catalog", "ops", "fusion"},
    {"architectures", "data"},  # data: files, formats and collections; no model
    {"checkpoint", "tokens", "calibration"},
    {"engines"},
    {"scheduler"},
    {"score_cache"},
    {"reranker"},
    {"evaluate", "serve", "export", "integrations", "compat", "benchmark", "bulk"},
    {"distill"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
LAYER = {unit: number for number, row in enumerate(LADDER) for unit in row}
# What is imported although it is not below: {(importer, imported): reason}
UPWARD: dict[tuple[str, str], str] = {
    ("integrations", "serve"): "a Ray Serve deployment is the HTTP service inside Ray",
}

# Libraries that are large, optional, or an idea of one place: library -> the modules that own it.
OWNERS = {
    "torch": ("ops", "engines.torch", "compat", "export", "distill"),
    "triton": ("ops.triton", "ops.triton_kernels"),
    "transformers": (),
    "tokenizers": ("tokens", "checkpoint", "export", "distill"),
    "safetensors": ("checkpoint", "export", "distill"),
    "huggingface_hub": ("checkpoint",),
    "starlette": ("serve",),
    "uvicorn": ("serve",),
    "msgspec": ("serve",),
    "prometheus_client": ("serve",),
    "bm25s": ("data.bm25",),
    "Stemmer": ("data.bm25",),
    "ir_measures": ("evaluate",),
    "matplotlib": ("evaluate",),
    "jinja2": ("evaluate",),
    "markupsafe": ("evaluate",),
    "accelerate": ("distill",),
    "scipy": ("distill", "evaluate"),
    "httpx": ("distill.http_teacher",),
    "tenacity": ("distill.http_teacher",),
    "langchain_core": ("integrations.langchain",),
    "pydantic": ("integrations.langchain",),
    "llama_index": ("integrations.llama_index",),
    "haystack": ("integrations.haystack",),
    "dspy": ("integrations.dspy",),
    "txtai": ("integrations.txtai",),
    "ray": ("integrations.ray",),
    "pyspark": ("integrations.spark",),
    "pandas": ("integrations.spark",),
    "pyarrow": ("data.files", "integrations.ray", "integrations.spark"),
    "mteb": ("compat",),
    "tqdm": ("compat",),
    "typer": ("cli",),
    "rich": ("cli",),
}

# The same inside packages, lowest first: a module imports only from rows above its own. "" is the package's __init__.
INSIDE: dict[str, tuple[set[str], ...]] = {
    "ops": ({"", "reference", "triton_kernels"}, {"torch"}, {"torch_padded", "torch_training", "triton"}),
    "architectures": ({"encoder"}, {"bert", "deberta", "jinabert", "modernbert"}, {""}),
    "checkpoint": ({"tensors", "verify"}, {"layouts"}, {"hub"}, {""}),
    "engines": ({"cores", "native_weights"}, {"native", "reference", "torch"}, {""}),
    "data": ({"", "dataset_table", "files"}, {"trec"}, {"corpus"}, {"bm25", "datasets"}),
    "evaluate": ({"calibrate", "measures"}, {"record"}, {"html"}, {"report"}, {"pipeline"}, {""}),
    "serve": (
        {"", "config", "wire"},
        {"auth", "dialects", "models", "queue"},
        {"telemetry"},
        {"http", "service"},
        {"app", "server"},
    ),
    "export": ({"onnx"}, {""}),
    "integrations": ({""}, {"dspy", "haystack", "langchain", "llama_index", "ray", "spark", "txtai"}),
    "distill": (
        {"", "biencoder", "folder", "formats", "losses", "report"},
        {"scores", "sources", "students"},
        {"batches", "http_teacher", "trainer"},
        {"recover", "teachers"},
        {"train"},
    ),
    "cli": (
        {"", "documents"},
        {"distill", "doctor", "evaluate", "models", "rank", "serve", "train"},
        {"main"},
    ),
}

MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 500, 60, 8
MAX_MODULES, MAX_IN_A_PACKAGE, MAX_CHAIN = 100, 20, 13
# "file.py" or "file.py:function" -> why it may be longer.
LONGER: dict[str, str] = {}
# module -> why its functions may take more parameters; "cli" and "ops" are free.
MORE_PARAMETERS = {"compat": "the signatures are those of sentence-transformers and mteb"}
NATIVE_SHARED, NATIVE_SET = 2_000, 200  # lines of C++: shared by all instruction sets, and of each one's file


def dotted(path: Path) -> str:
    """src/turborank/ops/reference.py -> "ops.reference"; a package's __init__ -> the package ("" at the top)."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def unit(module: str) -> str:
    return module.split(".")[0] or "__init__"


def imported(module: str) -> Iterator[tuple[str, str]]:
    """Every import of a module, also inside functions, as (top-level library, module inside turborank)."""
    for node in ast.walk(TREES[module]):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{MODULES[module]}:{node.lineno}: relative import; write turborank.…"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            library, _, inside = name.partition(".")
            if inside.startswith("_native"):  # the C++ extension imports nothing of ours
                continue
            while library == "turborank" and inside not in MODULES:  # a name in a module, not a module
                inside = inside.rpartition(".")[0]
            yield library, inside


GRAPH = {module: sorted({inside for library, inside in imported(module) if library == "turborank"}) for module in TREES}


def test_every_unit_has_its_place_on_the_ladder():
    assert {unit(module) for module in MODULES} - set(LAYER) == set(), "LADDER is out of date"


def test_the_ladder_is_documented():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", page, flags=re.M)
    documented = {int(row): set(re.findall(r"`(\w+)`", units.replace("turborank", "__init__"))) for row, units in rows}
    assert documented == dict(enumerate(LADDER[:-1]))  # __main__ only starts what is below


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    for target in GRAPH[module]:
        here, there = unit(module), unit(target)
        if target == "":
            assert LAYER[here] > LAYER["__init__"], f"{module} imports from the package __init__; name the submodule"
        elif here != there and (here, there) not in UPWARD:
            assert LAYER[there] < LAYER[here], f"{module} (row {LAYER[here]}) imports {target} (row {LAYER[there]})"


def test_every_module_of_a_package_has_its_place_on_its_ladder():
    documented = {package: set().union(*rows) for package, rows in INSIDE.items()}
    found: dict[str, set[str]] = {}
    for module in MODULES:
        package, _, name = module.partition(".")
        if package and (name or MODULES[module].name == "__init__.py"):
            found.setdefault(package, set()).add(name)
    assert found == documented
    assert max(map(len, found.values())) <= MAX_IN_A_PACKAGE


@pytest.mark.parametrize("module", [module for module in MODULES if unit(module) in INSIDE])
def test_imports_inside_a_package_go_down(module):
    package, _, here = module.partition(".")
    row = {name: number for number, names in enumerate(INSIDE[package]) for name in names}
    for target in GRAPH[module]:
        whose, _, there = target.partition(".")
        if whose == package and target != module:
            assert row[there] < row[here], f"{module} (row {row[here]}) imports {target} (row {row[there]})"


def test_the_package_stays_small_and_shallow():
    assert len(MODULES) <= MAX_MODULES
    longest: dict[str, tuple[str, ...]] = {}

    def chain(module: str) -> tuple[str, ...]:
        if module not in longest:
            below = [chain(target) for target in GRAPH[module] if target != module]
            longest[module] = (module, *max(below, key=len, default=()))
        return longest[module]

    worst = max(map(chain, MODULES), key=len)
    assert len(worst) <= MAX_CHAIN, " > ".join(worst)


@pytest.mark.parametrize("module", [module for module in MODULES if unit(module) not in ("cli", "ops")])
def test_functions_take_few_parameters(module):
    many = {
        node.name: count
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (count := _parameters(node.args)) > MAX_PARAMETERS
    }
    assert bool(many) == (module in MORE_PARAMETERS), f"{module}: {many}; options travel as frozen dataclasses"


def _parameters(arguments: ast.arguments) -> int:
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_no_import_cycles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in GRAPH[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_stay_where_they_belong(module):
    for library, _ in imported(module):
        owners = OWNERS.get(library)
        owned = owners is None or any(module == owner or module.startswith(owner + ".") for owner in owners)
        assert owned, f"{module} imports {library}, which belongs to {owners}"


def test_importing_turborank_is_light():
    heavy = "{'torch', 'transformers', 'starlette', 'uvicorn', 'huggingface_hub', 'typer', 'rich', 'matplotlib'}"
    code = f"import sys, turborank; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.returncode == 0, f"import turborank also imports {loaded.stderr}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    name, text = str(path.relative_to(PACKAGE)), path.read_text(encoding="utf-8")
    length = len(text.splitlines())
    too_long = {name: length} if length > MAX_FILE else {}
    for node in ast.walk(TREES[dotted(path)]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION:
                too_long[f"{name}:{node.name}"] = lines
    assert {key: lines for key, lines in too_long.items() if key not in LONGER} == {}


def test_the_native_engine_stays_small():
    """Lines of C++ without blanks and comments: of each instruction-set file, and of all that they share."""
    sources = [p for p in (ROOT / "native").iterdir() if p.suffix in {".cpp", ".h", ".inl"}]
    counts = {
        path.name: sum(
            bool(line.strip()) and not line.strip().startswith("//")
            for line in path.read_text(encoding="utf-8").splitlines()
        )
        for path in sources
    }
    vocabularies = {"avx2.inl", "avx512.inl", "avxvnni.inl", "neon.inl"}  # of one vector width, for one or two files
    sets = {
        name: count
        for name, count in counts.items()
        if name in vocabularies or (name.startswith("isa_") and name != "isa_table.cpp")
    }
    assert len(sets) >= 10
    assert max(sets.values()) <= NATIVE_SET, sets
    assert 1000 < sum(counts.values()) - sum(sets.values()) <= NATIVE_SHARED


@pytest.mark.parametrize("module", MODULES)
def test_public_signatures_say_what_they_take(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            assert node.args.kwarg is None, f"{module}.{node.name} takes **{node.args.kwarg.arg}"


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_module_does_nothing(module):
    calls = [node for node in TREES[module].body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert not calls, f"{module}:{calls[0].lineno}: a call at module level"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_prints(module):
    prints = [
        node.lineno
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not prints or unit(module) == "cli", f"{module} prints on lines {prints}"


def test_the_public_face_is_what_all_says():
    modules = {module.partition(".")[0] for module in MODULES}
    names = {name for name in vars(turborank) if not name.startswith("_") and name not in {*modules, "annotations"}}
    assert names | {"__version__"} == set(turborank.__all__) | {"__version__"}
    tree = {name for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__}
    assert {"Reranker", "Ranked", *tree} <= set(turborank.__all__)


def test_exemptions_are_still_needed():
    assert set(LONGER) <= {str(path.relative_to(PACKAGE)) for path in FILES} | {
        f"{path.relative_to(PACKAGE)}:{node.name}"
        for path in FILES
        for node in ast.walk(TREES[dotted(path)])
        if isinstance(node, ast.FunctionDef)
    }


def test_no_public_class_name_is_defined_twice():
    found: dict[str, list[str]] = {}
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


def test_no_module_imports_another_ones_private_name():
    private = [
        (module, f"{node.module}.{alias.name}")
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("turborank")
        for alias in node.names
        if alias.name.startswith("_") and alias.name not in ("_native", "__version__")
    ]
    assert private == []
