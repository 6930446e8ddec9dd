"""Invalid options of student, recover and train: an error in one line, and no output."""

import pytest

from turborank.cli import main
from turborank.distill import students, train
from turborank.distill.folder import TrainingFolder
from turborank.errors import InputError


@pytest.fixture(scope="module")
def models(word_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    texts = TrainingFolder.load(word_folder).texts
    students.from_scratch(students.train_tokenizer(texts, size=200), shape="micro").save(folder / "student")
    return folder


FAULTS = [
    ("student layers --from {student}", "expected 1 to 2 layers"),
    ("student layers --from {student} --layers 0", "expected 1 to 2 layers"),
    ("student layers --from {student} --layers=", "expected how many layers, or which"),
    ("student scratch --texts {lists} --layers -1", "expected one layer or more"),
    ("student scratch --texts {lists} --layers 0,1", "expected a number of layers"),
    ("train {lists} --student {student} --save-every 0", "--save-every"),
    ("train {lists} --student {student} --dev-queries 0", "--dev-queries"),
    ("train {lists} --student {student} --documents 1", "--documents"),
    ("train {lists} --student {student} --seed -1", "--seed"),
    ("train {lists} --student {student} --average 2", "expected a factor of 0 to 1"),
    ("train {lists} --student {student} --document-tokens=", "expected numbers of tokens"),
    ("train {lists} --student {student} --long-tokens 0", "expected numbers of tokens"),
    ("train {lists} --student {student} --share words=abc", "expected SOURCE=NUMBER, 0 or more, got 'words=abc'"),
    ("train {lists} --student {student} --share words=-1", "expected SOURCE=NUMBER, 0 or more, got 'words=-1'"),
    ("recover {student} --source nosuch --texts {lists}", "expected the folder of a bi-encoder, got none at nosuch"),
    ("recover {student} --source {student} --texts {lists} --long-tokens=", "expected tokens of long documents"),
]


@pytest.mark.parametrize(("line", "expected"), FAULTS)
def test_a_bad_option_is_answered_in_one_line(word_folder, models, tmp_path, capsys, line, expected):
    arguments = line.format(lists=word_folder, student=models / "student").split(" ")
    assert main.run(["distill", *arguments, "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_shares_are_of_sources_that_are_there(word_folder, models, tmp_path, capsys):
    arguments = [
        "distill",
        "train",
        str(word_folder),
        "--student",
        str(models / "student"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main.run([*arguments, "--share", "nope=3"]) == 2
    assert "got one of 'nope'" in capsys.readouterr().err


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"expected a file, got nothing at .*long.jsonl"):
        train._hash(tmp_path / "long.jsonl")
