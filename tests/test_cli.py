"""The command, run in this process through its entry point, and in a few tests as a separate process."""

import dataclasses
import inspect
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import native_config, small_config, write_checkpoint
from random_models import random_weights

import turborank
from turborank import Reranker, catalog, engines, tokens
from turborank.checkpoint import hashes, read
from turborank.cli import main, rank
from turborank.engines import native
from turborank.types import ModelConfig, RerankerOptions

LIMIT = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random model whose tokens are single letters; reads LIMIT of them."""
    folder = tmp_path_factory.mktemp("cli") / "little-model"
    return str(write_checkpoint(folder, small_config(max_length=LIMIT)))


@pytest.fixture
def turborank_command(model, capsys, monkeypatch):
    """Run ``turborank ARGUMENTS``; (exit code, standard output, standard error)."""

    def call(*arguments, stdin=b"", columns="100"):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main.run([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def files(tmp_path):
    texts = {
        "bees.txt": "Bees fly. Hives are full of bees.",
        "trees.txt": "Trees stand.",
        "seas.txt": "Seas move. " * 20,
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return [str(tmp_path / name) for name in texts]


def ranked(out):
    """The rows of the table as (rank, score, name)."""
    return re.findall(r"^ *(\d+)  (\d\.\d{3})  (\S+)", out, flags=re.M)


def test_json_is_what_the_library_says(turborank_command, model, files):
    code, out, err = turborank_command("rank", "where are bees?", *files, "-m", model, "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert list(answer) == ["model", "engine", "query", "results", "seconds"]
    assert (answer["model"], answer["query"]) == ("little-model", "where are bees?")
    texts = [Path(file).read_text(encoding="utf-8") for file in files]
    expected = turborank.Reranker(model).rank("where are bees?", texts)
    for result, document in zip(answer["results"], expected, strict=True):
        assert result == {
            "index": document.index,
            "name": files[document.index],
            "score": document.score,
            "logit": document.logit,
            "tokens": document.tokens,
            "truncated": document.truncated,
        }
        assert result["score"] == pytest.approx(1 / (1 + math.exp(-result["logit"])), abs=1e-12)


def test_the_table_has_the_order_of_the_json(turborank_command, model, files):
    results = json.loads(turborank_command("rank", "bees", *files, "-m", model, "--json")[1])["results"]
    code, out, err = turborank_command("rank", "bees", *files, "-m", model, columns="240")
    assert (code, err) == (0, "")
    expected = [(str(place), f"{row['score']:.3f}", row["name"]) for place, row in enumerate(results, 1)]
    assert ranked(out) == expected
    assert "3 documents" in out


def test_the_passage_is_the_sentence_about_the_question(turborank_command, model, files):
    out = turborank_command("rank", "what are hives full of?", files[0], "-m", model, columns="240")[1]
    assert "Hives are full of bees." in out
    assert "Bees fly" not in out


def test_unread_tokens_are_listed_below_the_table(turborank_command, model, files):
    """Letters and full stops are tokens; the template has 4 and the question 4."""
    letters = len("Seasmove.") * 20
    out = turborank_command("rank", "bees", *files, "-m", model)[1]
    assert f"{files[2]}: read {LIMIT} tokens, cut {letters + 4 + 4 - LIMIT}" in out
    assert "--length windows" in out
    assert files[0] + ": read" not in out
    windows = turborank_command("rank", "bees", *files, "-m", model, "--length", "windows")[1]
    assert "cut" not in windows
    json_out = turborank_command("rank", "bees", files[2], "-m", model, "--length", "windows", "--json")[1]
    assert json.loads(json_out)["results"][0]["tokens"] == letters + 8


def test_windows_are_advised_only_where_they_help(turborank_command, model, files):
    advice = "--length windows reads"
    assert advice in turborank_command("rank", "bees", files[2], "-m", model)[1]
    assert advice not in turborank_command("rank", "bees", files[1], "-m", model)[1]
    for length in ("truncate", "windows"):
        out = turborank_command("rank", "bees " * 40, files[1], "-m", model, "--length", length)[1]
        assert "cut" in out
        assert advice not in out


def test_rows_without_text_are_ranked_and_named(turborank_command, model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "bee"}\n' + '{"text": " "}\n' * (rank.MAX_NOTES + 2))
    code, out, err = turborank_command("rank", "q", path, "-m", model, "--json")
    assert (code, len(json.loads(out)["results"])) == (0, rank.MAX_NOTES + 3)
    assert err.splitlines()[0] == f"turborank: {path}:2 has no text"
    assert err.splitlines()[rank.MAX_NOTES :] == ["turborank: and 2 more have no text"]


def test_truncated_documents_are_listed_even_if_not_shown(turborank_command, model, files):
    results = json.loads(turborank_command("rank", "bees", *files, "-m", model, "--json")[1])["results"]
    place = next(place for place, row in enumerate(results) if row["index"] == 2)
    keep = 1 if place else 2  # seas.txt is, or is not, the best
    out = turborank_command("rank", "bees", *files, "-m", model, "--top-n", str(keep))[1]
    assert len(ranked(out)) == keep
    assert f"{keep} of 3 documents" in out
    assert f"{files[2]}: read {LIMIT} tokens" in out


def test_many_cut_documents_are_counted(turborank_command, model, tmp_path):
    rows = [json.dumps({"text": "x" * (LIMIT - 4 - 1 + n)}) for n in range(1, 9)]  # n tokens too many each
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    out = turborank_command("rank", "q", tmp_path / "rows.jsonl", "-m", model)[1]
    assert out.count(f": read {LIMIT} tokens") == rank.MAX_NOTES
    assert f"and {8 - rank.MAX_NOTES} more: cut {6 + 7 + 8} tokens in all" in out


def test_top_n_and_threshold_keep_the_best(turborank_command, model, files):
    rows = json.loads(turborank_command("rank", "bees", *files, "-m", model, "--json")[1])["results"]
    scores = [row["score"] for row in rows]
    between = (scores[0] + scores[1]) / 2
    command = ("rank", "bees", *files, "-m", model)
    assert json.loads(turborank_command(*command, "--json", "-n", "2")[1])["results"] == rows[:2]
    assert json.loads(turborank_command(*command, "--json", "--threshold", between)[1])["results"] == rows[:1]
    code, out, _ = turborank_command(*command, "--threshold", "1")
    assert code == 0
    assert f"no document reaches the threshold; the best score is {scores[0]:.3f}" in out


def test_fields_choose_what_is_read(turborank_command, model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "name": "bee", "notes": "buzz"}\n')
    command = ("rank", "q", path, "-m", model, "--json")
    sizes = {}
    for fields in (["name"], ["notes"], ["name", "notes"]):
        options = [part for field in fields for part in ("--field", field)]
        sizes[len(fields), fields[0]] = json.loads(turborank_command(*command, *options)[1])["results"][0]["tokens"]
    assert sizes == {(1, "name"): 5 + 3, (1, "notes"): 5 + 4, (2, "name"): 5 + 7}


def test_standard_input_is_one_document_a_line(turborank_command, model):
    code, out, _ = turborank_command("rank", "q", "-m", model, "--json", stdin=b"one\n\nthree\n")
    assert code == 0
    assert {row["name"]: row["tokens"] for row in json.loads(out)["results"]} == {"line 1": 8, "line 3": 10}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rank"], "Missing argument"),
        (["rank", "q", "--bogus"], "No such option: --bogus; see turborank rank --help"),
        (["rank", "q", "--top-n", "x"], "--top-n"),
        (["rank", "q", "{file}", "-n", "0"], "expected --top-n to be a positive integer, got 0"),
        (["rank", "q", "{file}", "--threshold", "1.5"], "expected --threshold between 0 and 1, got 1.5"),
        (["rank", "q", "{file}", "--threshold", "nan"], "expected --threshold between 0 and 1, got nan"),
        (["rank", " ", "{file}"], "expected a question, got an empty one"),
        (["rank", "\udce9", "{file}"], "expected the question in UTF-8"),
        (["rank", "q", "{file}", "missing.txt"], "missing.txt: expected a file, got none of that name"),
        (["rank", "q"], "standard input: expected some text"),
        (["rank", "q", "{file}", "-m", "{model}", "--engine", "warp"], "expected engine to be one of"),
        (["rank", "q", "{file}", "-m", "{model}", "--length", "long"], "expected length to be one of"),
        (["rank", "q", "{file}", "-m", "{model}", "--threads", "0"], "expected threads to be"),
        (["rank", "q", "{file}", "-m", "{model}", "--max-length", "97"], "number from 16 to 96, got 97"),
        (["rank", "q", "{long}", "-m", "{model}", "--length", "error"], "expected a pair of at most 96 tokens"),
        (["rank", "q", "{file}", "{long}", "-m", "{model}", "--length", "error"], "turborank: {long}: expected a pair"),
        (["rank", "q", "{file}", "-m", "{model}", "--precision", "fp16"], "to be one of auto, fp32, got 'fp16'"),
        (["rank", "q", "{file}", "-m", "~nobody-of-this-name/model"], "expected a model folder, got no such path"),
        (["rank", "q", "{file}", "-m", "a" * 5000], "expected the model to be one of"),
        (["bench", "--threads", "-1"], "expected threads to be a whole number from 1 to 4096, got -1"),
        (["bench", "--threads", "0"], "expected threads to be a whole number from 1 to 4096, got 0"),
        (["rank", "q", "{file}", "-m", "jina-reranker-v1-turbo"], "did you mean 'jina-reranker-v1-turbo-en'?"),
        (["rank", "q", "{file}", "-m", "./nowhere"], "expected a model folder"),
        (["dance"], "No such command 'dance'"),
    ],
)
def test_an_error_is_one_line_and_nothing_else(turborank_command, model, files, arguments, expected):
    places = {"file": files[0], "long": files[2], "model": model}
    code, out, err = turborank_command(*(argument.format(**places) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("turborank: ")
    assert expected.format(**places) in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("library", "extra"), main.EXTRAS.items())
def test_a_library_that_is_not_installed_is_named_with_its_extra(turborank_command, monkeypatch, library, extra):
    needing = main.Command(lambda: __import__(library), ())
    monkeypatch.setitem(main.COMMANDS, "doctor", needing)
    monkeypatch.setitem(sys.modules, library, None)  # as import finds it where it is not installed
    code, out, err = turborank_command("doctor")
    assert (code, out) == (2, "")
    assert (
        err == f"turborank: expected the library {library}, got none of that name; pip install 'turborank[{extra}]'\n"
    )


def test_a_document_cannot_rewrite_the_terminal(turborank_command, model, tmp_path):
    path = tmp_path / "evil.txt"
    path.write_text("\x1b[2J\x1b]0;owned\x07 [bold]bees[/bold] \x9b31m")
    out = turborank_command("rank", "bees", path, "-m", model, columns="200")[1]
    assert not set(out) & {"\x1b", "\x07", "\x9b"}
    assert "[bold]bees[/bold]" in out  # and is no markup of ours either


@pytest.mark.parametrize("columns", ["40", "60", "100", "200"])
def test_the_table_fits_its_width(turborank_command, model, files, columns, monkeypatch):
    monkeypatch.chdir(Path(files[0]).parent)
    names = [Path(file).name for file in files]
    out = turborank_command("rank", "bees", *names, "-m", model, columns=columns)[1]
    table = out.partition("\n\n")[0]
    assert max(len(line) for line in table.splitlines()) <= int(columns)
    assert all(name in table for name in names)


def test_models_prints_the_catalog(turborank_command):
    code, out, _ = turborank_command("models")
    assert code == 0
    rows = json.loads(turborank_command("models", "--json")[1])
    assert [row["name"] for row in rows] == list(catalog.MODELS)
    for row in rows:
        line = next(line for line in out.splitlines() if line.startswith(row["name"]))
        million = row["parameters"] / 1e6
        assert (f"{million:.1f} M" if million < 100 else f"{million:,.0f} M") in line
        assert f" {row['speed']} " in line
        assert f"{row['max_length']:,}" in line
        assert row["licence"] in line
        assert ("†" in line) == (row["name"] == "jina-reranker-v2-base-multilingual") == row["noncommercial"]
        assert row["where"] in line
    assert max(map(len, out.splitlines())) <= 120
    assert "many languages, long documents: bge-reranker-v2-m3" in out
    assert "turborank-embedded-v1 by turborank-embedded-v2" in out
    assert [row["name"] for row in rows if row["default"]] == [catalog.DEFAULT]
    assert next(row for row in rows if row["name"] == "jina-reranker-v1-base-en")["where"] == "not public"


def test_doctor_says_what_runs_and_what_it_computes(turborank_command, model):
    code, out, _ = turborank_command("doctor", "-m", model, "--json")
    findings = {(row["topic"], row["what"]): row for row in json.loads(out)}
    assert code == 0
    assert all(row["well"] for row in findings.values())
    for name, digest in hashes(read(model)).items():
        assert findings["model", name]["value"] == f"sha256 {digest}"
    assert findings["engines", "compiled by"]["value"].endswith("-O3")
    for name, row in engines.ENGINES.items():
        assert (row.available() is None) == findings["engines", name]["value"].startswith("usable")
    answer = turborank.Reranker(model).score(
        [("What is the capital of France?", "Paris is the capital and largest city of France.")]
    )
    assert f"logit {answer[0]:+.4f}" in findings["score", "answer"]["value"]
    assert "all checks passed" in turborank_command("doctor", "-m", model)[1]


def test_doctor_finds_a_damaged_model(turborank_command, tmp_path):
    folder = write_checkpoint(tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    code, out, _ = turborank_command("doctor", "-m", folder)
    assert code == 1
    assert re.search(r"BROKEN +loading", out)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy says that the sum overflows
def test_doctor_finds_scores_that_are_no_numbers(turborank_command, tmp_path):
    config: ModelConfig = small_config()
    weights = random_weights(config)
    weights["classifier.weight"][:] = 3e38  # finite, but the sum overflows
    code, out, _ = turborank_command("doctor", "-m", write_checkpoint(tmp_path / "huge", weights=weights, dtype="F32"))
    assert code == 1
    assert re.search(r"BROKEN +(ranking|error)", out)


def test_doctor_says_why_an_engine_was_chosen(turborank_command, model, monkeypatch):
    assert "requested with --engine" in turborank_command("doctor", "-m", model, "--engine", "reference")[1]
    monkeypatch.setenv("TURBORANK_ENGINE", "reference")
    out = turborank_command("doctor", "-m", model)[1]
    assert "TURBORANK_ENGINE=reference" in out
    assert re.search(r"chosen +reference, fp32", out)


@pytest.mark.skipif(native.available() is not None, reason="the native engine is not built")
def test_doctor_says_which_instruction_set_runs_and_why_no_better_one(turborank_command, tmp_path, monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    folder = write_checkpoint(tmp_path / "native", native_config())
    code, out, _ = turborank_command("doctor", "-m", folder, "--engine", "native", "--json")
    rows = {row["what"]: row["value"] for row in json.loads(out) if row["topic"] == "engine"}
    assert code == 0
    assert rows["instruction set"].startswith("portable: products by int8 multiply-add, attention in fp32")
    for isa in native.isas()[:-1]:  # portable is the last
        assert rows[f"not {isa}"] == "usable, but TURBORANK_ISA=portable"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    for flag, isa, feature in (("amx_int8", "amx", "AMX"), ("avx2", "avx2", "AVX2"), ("i8mm", "armi8mm", "FEAT_I8MM")):
        if flags and flag not in flags.split() and f"not {isa}" in rows:
            assert rows[f"not {isa}"].startswith("this machine lacks")
            assert feature in rows[f"not {isa}"]


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_has_examples(turborank_command, name):
    command = main.COMMANDS[name]
    code, out, _ = turborank_command(*name.split(), "--help", columns="200")
    assert code == 0
    assert command.examples
    for purpose, line in command.examples:
        assert purpose in out
        assert line in out
        assert f"turborank {name}" in line


def test_help_is_what_no_argument_gives(turborank_command):
    code, out, err = turborank_command()
    assert (code, err) == (0, "")
    assert all(name.split()[0] in out for name in main.COMMANDS)
    assert out == turborank_command("-h")[1]


@pytest.mark.parametrize("group", main.GROUPS)
def test_a_group_alone_prints_its_help(turborank_command, group):
    code, out, err = turborank_command(group)
    assert (code, err) == (0, "")
    assert all(name.removeprefix(f"{group} ") in out for name in main.COMMANDS if name.startswith(f"{group} "))
    assert out == turborank_command(group, "-h")[1]


def test_version(turborank_command):
    assert turborank_command("--version") == (0, f"turborank {turborank.__version__}\n", "")


def test_length_policies_in_help_are_all_there_are(turborank_command):
    out = re.sub(r"[│\s]+", " ", turborank_command("rank", "--help", columns="200")[1])
    assert all(policy in out for policy in tokens.LENGTH_POLICIES)
    assert all(name in out for name in engines.ENGINES)


# As processes: what only they can show.

COMMAND = [sys.executable, "-c", "from turborank.cli.main import main; main()"]


def test_starting_loads_nothing_heavy():
    heavy = "{'torch', 'starlette', 'huggingface_hub', 'matplotlib', 'rich.table', 'turborank.serve.app'}"
    start = "import sys; from turborank.cli.main import build; build()"
    code = f"{start}; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_names_that_are_not_utf8_are_printed(model, tmp_path):
    path = os.fsencode(str(tmp_path)) + b"/caf\xe9.txt"
    with open(path, "w") as file:
        file.write("bees")
    process = subprocess.run([*COMMAND, "rank", "bees", path, "-m", model], capture_output=True)
    assert process.returncode == 0, process.stderr
    assert "caf\ufffd.txt" in re.sub(r"\s", "", process.stdout.decode())


def test_output_to_an_ascii_terminal_works(model, tmp_path):
    (tmp_path / "a.txt").write_text("Honig für Bären 蜂蜜", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    process = subprocess.run(
        [*COMMAND, "rank", "bees", tmp_path / "a.txt", "-m", model], capture_output=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    assert b"Honig f?r B?ren" in process.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
@pytest.mark.parametrize("arguments", [["rank"], ["rank", "--json"], ["models"], ["models", "--json"], ["--version"]])
def test_a_full_disk_is_reported_in_one_line(model, files, arguments):
    ranking = ["bees", *files, "-m", model] if arguments[0] == "rank" else []
    with open("/dev/full", "w") as full:
        process = subprocess.run([*COMMAND, *arguments, *ranking], stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 2
    assert process.stderr == "turborank: cannot write the output: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="closes descriptors with a shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_work_if_files_are_given(model, files, closed):
    command = ["sh", "-c", f'"$@" {closed}', "sh", *COMMAND, "rank", "bees"]
    process = subprocess.run([*command, *files, "-m", model], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert len(ranked(process.stdout)) == (0 if ">&-" in closed.replace("2>&-", "") else len(files))
    process = subprocess.run([*command, "-m", model], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.count("\n") == (0 if "2>&-" in closed else 1)


def test_a_closed_pipe_prints_no_traceback(model, files):
    command = subprocess.Popen(
        [*COMMAND, "rank", "bees", *files, "-m", model], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    command.stdout.close()
    error = command.stderr.read()
    command.stderr.close()
    assert command.wait() == 128 + signal.SIGPIPE  # as the shell counts it
    assert error == b""


def test_one_description_of_a_reranker_s_options() -> None:
    """The library, the commands and the server agree on names and defaults; RerankerOptions has the help texts."""
    Settings = pytest.importorskip("turborank.serve.config").Settings
    described = {one.name: one.default for one in dataclasses.fields(RerankerOptions)}
    arguments = inspect.signature(Reranker).parameters
    assert {name: one.default for name, one in arguments.items() if name != "model"} == described
    asked = {name: value for name, value in described.items() if name != "faithful"} | {"offline": False}
    for command in ("rank", "score", "evaluate", "calibrate", "distill score"):
        given = inspect.signature(main.COMMANDS[command].run).parameters
        assert {name: given[name].default for name in asked} == asked
    settings = {one.name: one.default for one in dataclasses.fields(Settings)}
    assert {name: settings[name] for name in asked} == asked | {"max_length": 0, "threads": 0}  # 0: None in TOML
