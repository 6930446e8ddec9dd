"""Write the generated pages of docs/ from the code; with --check, only say whether they are out of date.

cli.md (commands), models.md (catalog), reference.md (public API), engines.md (what runs where). A test runs the check,
so the pages cannot differ from what the program does.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from turborank import catalog
from turborank.architectures import ARCHITECTURES
from turborank.cli.main import COMMANDS, build
from turborank.engines import ENGINES
from turborank.engines.native import SEVEN_BITS
from turborank.types import ModelConfig

HERE = Path(__file__).resolve().parent
NOTE = "<!-- Written by docs/generate.py (make docs); do not edit. -->"


def cli() -> str:
    """Every subcommand: what it does, what it takes, examples."""
    lines = [NOTE, "", "# The command", "", "`turborank COMMAND --help` says the same on the terminal.", ""]
    lines += ["Errors are one line on standard error; the exit code is then 2, and nothing has been printed.", ""]
    application: Any = typer.main.get_command(build())
    for name in COMMANDS:
        command = functools.reduce(lambda group, word: group.commands[word], name.split(), application)
        lines += [f"## turborank {name}", "", inspect.cleandoc(command.help), ""]
        lines += ["```console", *_examples(name), "```", ""]
        lines += ["| argument or option | default | |", "|---|---|---|", *_parameters(command), ""]
    return "\n".join(lines)


def _examples(name: str) -> Iterator[str]:
    for number, (purpose, line) in enumerate(COMMANDS[name].examples):
        if number:
            yield ""
        yield from (f"# {purpose}", f"$ {line}")


def _parameters(command: Any) -> Iterator[str]:
    for parameter in command.params:
        names = ", ".join(f"`{name}`" for name in parameter.opts) if parameter.opts[0].startswith("-") else ""
        names = names or f"`{parameter.name.upper()}{'…' if parameter.nargs != 1 else ''}`"
        default = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
        written = "" if default is None or default is False else str(default)
        yield f"| {names} | {written} | {(parameter.help or '').replace('|', '/')} |"


def models() -> str:
    """The catalog: which to begin with, the facts, the published quality."""
    lines = [NOTE, "", "# Models", ""]
    lines += ["The models known by name; `turborank models` also shows which are on your machine. A folder in one of"]
    lines += [
        "the layouts below, or a Hugging Face id, can be used instead of a name.",
        "",
        "## Where to begin",
        "",
        "| you want | take |",
        "|---|---|",
    ]
    lines += [f"| {need} | `{name}` |" for need, name in catalog.PICKS]
    lines += ["", "## What they are", ""]
    lines += [
        "| name | on the Hub | family | parameters | layers × hidden | work | speed | tokens | languages | licence |"
    ]
    lines += ["|---|---|---|--:|--:|--:|---|--:|---|---|"]
    for row in catalog.MODELS.values():
        family = row.architecture + ("" if row.architecture in ARCHITECTURES else " (not yet)")
        licence = f"**{row.licence}**, no commercial use" if row.noncommercial else row.licence
        cells = [
            row.name, f"`{row.repo}`" if row.repo else "", family, f"{row.parameters:,}",
            f"{row.layers} × {row.hidden_size}", f"{row.work:.2f}", row.speed, f"{row.max_length:,}", row.languages,
            licence,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    limits = ", ".join(f"{name} up to {limit:g}" for name, limit in catalog.SPEEDS[:-1])
    lines += ["", *WORK.format(limits=limits, last=catalog.SPEEDS[-1][0]).splitlines()]
    lines += ["", "## Published quality", "", "| name | MTEB | NanoBEIR | BEIR | LoCo | hit rate | MKQA |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for row in catalog.MODELS.values():
        figures = (row.mteb, row.nanobeir, row.beir, row.loco, row.hit_rate, row.mkqa)
        if any(figure is not None for figure in figures):
            lines.append(f"| {row.name} | {' | '.join('' if f is None else f'{f:.2f}' for f in figures)} |")
    lines += ["", *QUALITY.splitlines()]
    lines += ["", "## Notes", ""]
    lines += [f"- **{row.name}**: {row.note}." for row in catalog.MODELS.values() if row.note]
    lines += [f"- **{old}**: replaced by {new}; its name is refused." for old, new in catalog.RETIRED.items()]
    return "\n".join([*lines, "", *LAYOUTS, ""])


WORK = """Work is computed from the shape: multiply-adds per token in the linear layers, as a multiple of MiniLM-L6's
10.6 million. It determines the speed class:
{limits}; {last} above.
Attention is not included: it grows with the square of the length, except in ModernBERT's sliding layers (two of
three). Measured speed beside published quality:
[bench/results](../bench/results/2026-11-29-amd-epyc-zen-5.md). The licence is that of the published model; loading
a model whose licence forbids commercial use logs a warning."""

QUALITY = """Published figures times 100, not measured with turborank; compare them within a column only. MTEB (English,
v2, retrieval; mean of six first stages) and NanoBEIR are nDCG@10 from the announcement of the Ettin rerankers; BEIR and
LoCo (nDCG@10) and the hit rate (at 10) are from the model card of jina-reranker-v1; MKQA (nDCG@10, 26 languages) from
that of jina-reranker-v2. The Ettin rerankers were trained on parts of the data that MTEB and BEIR test."""

LAYOUTS = """## Layouts that load

- `config.json`, `model.safetensors`, `tokenizer.json`: what transformers writes. `architectures` and `id2label` may be
  missing; the family is decided by `model_type` and tensor names.
- Shards: `model.safetensors.index.json` and the files it names, in the same folder.
- sentence-transformers' modules (`modules.json`): Transformer alone, or Transformer, Pooling, Dense, LayerNorm, Dense
  as the Ettin rerankers have them. Pooling is then the module's, whatever `config.json` says.
- ModernBERT's config as transformers 4 writes it (two rope thetas, every n-th layer global) and as 5 does
  (`rope_parameters`, `layer_types`).
- jina-reranker-v2's own tensor names. Its code is never run.
- A classifier with two labels, if its `id2label` names one `relevant` and the other `irrelevant` or `not_relevant`, or
  with `checkpoint.load(…, relevant_label=1)`: its logit is the difference of the two. Otherwise it is refused.
- Renamed repositories (`cross-encoder/ms-marco-MiniLM-L6-v2` and `-L-6-v2`) are found in the cache under either name.

Refused, with what to do instead: pickles, folders with ONNX files alone, embedding models, decoders.""".splitlines()


# The public modules, with the sentence that introduces each.
MODULES = {
    "turborank": "Ranking. Importing it loads neither torch nor a web framework.",
    "turborank.compat": "What sentence-transformers and mteb expect: [differences](evaluation.md#with-other-tools).",
    "turborank.evaluate": "Measuring models on datasets; needs the extra `eval`.",
}
EXTRA_NAMES = {"turborank.compat": ("CrossEncoder", "MtebCrossEncoder")}  # of modules without __all__


def reference() -> str:
    """The public API, from signatures and docstrings."""
    lines = [NOTE, "", "# Library reference", "", "Dimension letters: P pairs, K documents of one list.", ""]
    lines += ["Training has no stable Python interface yet; use the [commands](cli.md).", ""]
    for name, purpose in MODULES.items():
        module = importlib.import_module(name)
        lines += [f"## {name}", "", purpose, ""]
        for public in EXTRA_NAMES.get(name) or module.__all__:
            lines += _described(public, getattr(module, public))
    return "\n".join(lines)


def _described(name: str, value: Any) -> Iterator[str]:
    """A class with its public methods, a function, or the keys of a table."""
    if inspect.isclass(value):
        error = issubclass(value, BaseException)
        fields = error or hasattr(value, "__dataclass_fields__") or issubclass(value, tuple)
        yield from _entry("###", name, value, None if fields else _signature(name, value.__init__))
        yield from _fields(value) if fields else ()
        for method, function in vars(value).items():
            if inspect.isfunction(function) and not method.startswith("_") and function.__doc__ and not error:
                yield from _entry("####", f"{name}.{method}", function, _signature(method, function))
        return
    if callable(value):
        yield from _entry("###", name, value, _signature(name, value))
    elif isinstance(value, str):
        yield from (f"### {name}", "", "The version, as in the package's metadata.", "")
    else:
        yield from (f"### {name}", "", "Table: " + ", ".join(f"`{key}`" for key in value) + ".", "")


def _entry(level: str, name: str, value: Any, signature: str | None) -> Iterator[str]:
    yield from (f"{level} {name}", "")
    if signature:
        yield from ("```text", signature, "```", "")
    text = re.sub(r":(?:class|func|mod|data):`[~]?([^`]+)`", r"`\1`", inspect.getdoc(value) or "").replace("``", "`")
    paragraph, _, rest = text.partition("\n\nArgs:")
    yield from (paragraph, "")
    if rest:
        yield from ("```text", f"Args:{rest}".rstrip(), "```", "")


def _signature(name: str, function: Any) -> str:
    """Name, parameters with types and defaults, result; one parameter a line where a line would be too long."""
    signature = inspect.signature(function)
    parts: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        kind = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        default = (
            ""
            if parameter.default is parameter.empty
            else " = " + getattr(parameter.default, "__name__", repr(parameter.default))
        )
        parts += [] if parameter.name == "self" else [f"{star}{parameter.name}{kind}{default}"]
    result = "" if signature.return_annotation in (signature.empty, "None") else f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(parts)}){result}"
    return line if len(line) <= 100 else "\n    ".join([f"{name}(", *(f"{part}," for part in parts)]) + f"\n){result}"


def _fields(value: Any) -> Iterator[str]:
    """The fields of a dataclass or named tuple as a table, with the comments that stand beside them in the source."""
    names = getattr(value, "__dataclass_fields__", None) or getattr(value, "_fields", ())
    found = re.findall(r"^    (\w+): ([^=#\n]+?)(?: = [^#\n]+?)?(?:  # (.*))?$", inspect.getsource(value), flags=re.M)
    rows = [(name, kind, text) for name, kind, text in found if name in names]
    if rows:
        yield from ("| field | type | |", "|---|---|---|")
        for name, kind, text in rows:
            yield f"| `{name}` | `{kind.strip()}` | {text} |".replace(" | None`", " or None`")
        yield ""


NATIVE = HERE.parent / "native"


def engine_table() -> str:
    """Architecture × engine × precision, and instruction set × precision of the native engine."""
    lines = [NOTE, "", "# Engines", ""]
    lines += [
        "`Reranker(engine=…, precision=…)` and `--engine`, `--precision` choose; `auto` takes the first that fits.",
        "",
    ]
    lines += [f"- **{name}**: {row.note}." for name, row in ENGINES.items()]
    lines += ["", "| architecture | " + " | ".join(ENGINES) + " |", "|---" * (1 + len(ENGINES)) + "|"]
    for architecture in ARCHITECTURES:
        cells = [", ".join(row.precisions) if row.supports(_sized(architecture)) else "–" for row in ENGINES.values()]
        lines.append(f"| {architecture} | " + " | ".join(cells) + " |")
    lines += ["", "The native engine needs hidden and head sizes that are multiples of 32; others use `reference`."]
    lines += ["fp16 of the torch engine needs a GPU.", ""]
    lines += ["## Instruction sets of the native engine", ""]
    lines += ["The best row that this processor has is used; `TURBORANK_ISA` forces one. Cells name the instruction of"]
    lines += ["the matrix product.", "", "| instruction set | int8 | bf16 | fp32 |", "|---|---|---|---|"]
    for isa, kernels in instruction_sets().items():
        lines.append(f"| `{isa}` | " + " | ".join(kernels.get(p, "–") for p in ("int8", "bf16", "fp32")) + " |")
    return "\n".join([*lines, ""])


def _sized(architecture: str) -> ModelConfig:
    """A model of the catalog's usual size."""
    return ModelConfig(architecture, 30_522, 384, 6, 12, 1536, 512, 2, 1e-12)


def instruction_sets() -> dict[str, dict[str, str]]:
    """Row of native/isa_table.cpp -> precision -> instruction, read from the C++ tables: no machine has all rows."""
    table = (NATIVE / "isa_table.cpp").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in sorted(NATIVE.glob("isa_*.cpp"))]
    rows = {isa: _kernels(choose, sources) for isa, choose in re.findall(r'\{"(\w+)", [\w |]+, (\w+)\}', table)}
    for isa, seven in SEVEN_BITS.items():
        rows[isa]["int8"] += f"; with the cosine heads {rows.pop(seven)['int8']}"
    return rows


def _kernels(choose: str, sources: list[str]) -> dict[str, str]:
    """What the function ``choose`` returns for each precision; one may hand on to another row's function."""
    [source] = [text for text in sources if re.search(rf"Kernels\* {choose}\(Precision", text)]
    body = source.partition(f"Kernels* {choose}(Precision")[2].partition("\n}")[0]
    tables = r'constexpr Kernels (\w+) = table<[^>]*>\("([^"]+)"'
    instructions = dict(re.findall(tables, source))
    for space, inside in re.findall(r"namespace (\w+) \{\n(?=(.*?)\n\}  // namespace \1\n)", source, re.DOTALL):
        instructions |= {f"{space}::{name}": said for name, said in re.findall(tables, inside)}
    found = {}
    if handed := re.search(r"return (\w+_kernels)\(", body):
        found.update(_kernels(handed[1], sources))
    for precision in ("int8", "bf16", "fp32"):
        chosen = re.search(rf"Precision::{precision}\b[^&]*?(?:features & (\w+) \? )?&([\w:]+)", body)
        if chosen:
            found[precision] = f"`{instructions[chosen[2]]}`" + (", with AVX512-BF16" if chosen[1] == "kBf16" else "")
    if fallback := re.search(r"return &(\w+);\s*$", body):
        found.setdefault("fp32", f"`{instructions[fallback[1]]}`")
    return found


PAGES = {"cli.md": cli, "models.md": models, "reference.md": reference, "engines.md": engine_table}


def main(check: bool) -> int:
    stale = 0
    for name, page in PAGES.items():
        path, text = HERE / name, page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if not check:
            path.write_text(text, encoding="utf-8")
        print(f"docs/{name}", "is out of date; run make docs" if check else "written")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
