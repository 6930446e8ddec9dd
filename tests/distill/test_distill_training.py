import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from turborank import Reranker, TrainingError
from turborank.distill import students, train
from turborank.distill.batches import BatchOptions, BatchSampler
from turborank.distill.folder import TrainingFolder
from turborank.distill.train import DevEvaluation, ServingOptions, TrainOptions, held_out
from turborank.distill.trainer import CURVE, Run, Schedule, checkpoints
from turborank.errors import InputError, ModelNotFoundError
from turborank.tokens import PairEncoder

LISTS = BatchOptions(budget=256, documents=4, hard=2, document_tokens=(8, 16), long_every=4, long_tokens=(40,))


@pytest.fixture(scope="module")
def student(word_folder, tmp_path_factory):
    folder = TrainingFolder.load(word_folder)
    tokenizer = students.train_tokenizer([*folder.texts, *folder.queries], size=300)
    path = tmp_path_factory.mktemp("student")
    students.from_scratch(tokenizer, shape="micro", seed=1).save(path)
    return path


def run(word_folder, student, out, dev=None, dev_queries=200, **schedule):
    plan = Schedule(**({"steps": 6, "learning_rate": 1e-3, "warmup": 2, "save_every": 3, "average": 0.9} | schedule))
    return train.train(
        word_folder,
        student,
        out,
        plan,
        LISTS,
        TrainOptions(
            teachers=["t"],
            dev=dev or [word_folder],
            dev_queries=dev_queries,
            bf16=False,
            train_words=True,
            threads=1,
        ),
    )


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def curve(out):
    rows = [json.loads(line) for line in (out / CURVE).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


def test_a_run_that_was_stopped_ends_in_the_same_bits(word_folder, student, tmp_path):
    run(word_folder, student, tmp_path / "whole")
    run(word_folder, student, tmp_path / "parts", stop=3)
    assert not (tmp_path / "parts" / "final" / "state.json").exists()
    run(word_folder, student, tmp_path / "parts")
    assert files(tmp_path / "whole" / "final") == files(tmp_path / "parts" / "final")
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert [row["step"] for row in curve(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]


def test_what_was_trained_after_the_last_checkpoint_is_done_again(word_folder, student, tmp_path):
    run(word_folder, student, tmp_path / "whole")
    run(word_folder, student, tmp_path / "killed", stop=5)
    (newest,) = (path for path in checkpoints(tmp_path / "killed") if path.name == "step-000005")
    (newest / "state.json").unlink()  # as if the process had died while it was being written
    run(word_folder, student, tmp_path / "killed")
    assert files(tmp_path / "whole" / "final") == files(tmp_path / "killed" / "final")
    assert curve(tmp_path / "whole") == curve(tmp_path / "killed")


def test_checkpoints_are_models(word_folder, student, tmp_path):
    run(word_folder, student, tmp_path)
    newest = checkpoints(tmp_path)[-1]
    for folder in (newest, tmp_path / "final", tmp_path / "best"):
        assert np.isfinite(Reranker(folder).rank("amber", ["amber heron", "kelp"])[0].logit)


def test_training_teaches(word_folder, student, tmp_path):
    before = train.train(
        word_folder, student, tmp_path / "none", Schedule(steps=1, learning_rate=0.0), LISTS,
        TrainOptions(teachers=["t"], bf16=False, train_words=True),
    )  # fmt: skip
    run(word_folder, student, tmp_path / "run", steps=150, learning_rate=3e-3, save_every=150, evaluate_every=50)
    first, last = curve(tmp_path / "run")[0], curve(tmp_path / "run")[-1]
    assert last["loss"] < 0.5 * first["loss"]
    assert before.name == "final"
    # A held-out word was never a query: what carries over is that equal words match.
    # By chance the right document of six is at rank r = 1 … 6, where nDCG is 1 / log2(1 + r).
    chance = np.mean([1 / np.log2(1 + rank) for rank in range(1, 7)])
    assert last["ndcg@10"] > chance + 0.05


def test_another_run_is_not_continued(word_folder, student, tmp_path):
    run(word_folder, student, tmp_path, stop=3)
    with pytest.raises(InputError, match="another schedule"):
        run(word_folder, student, tmp_path, learning_rate=1e-4)
    with pytest.raises(InputError, match="another dev_queries"):
        run(word_folder, student, tmp_path, dev_queries=1)


@pytest.mark.parametrize(("file", "what"), [("qrels/train.tsv", "lists"), ("scores/t.trec", "teachers")])
def test_a_run_is_not_continued_on_other_data(word_folder, student, tmp_path, file, what):
    folder, out = tmp_path / "folder", tmp_path / "run"
    shutil.copytree(word_folder, folder)
    run(folder, student, out, stop=3)
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace("\t1\n", "\t2\n", 1) if what == "lists" else text.replace(" 3", " 4", 1))
    assert (folder / file).read_text() != text
    with pytest.raises(InputError, match=f"another {what}"):
        run(folder, student, out)


def test_refused_options_can_be_corrected_in_the_same_folder(word_folder, student, tmp_path):
    plan, fp32 = Schedule(steps=1), TrainOptions(bf16=False)
    with pytest.raises(InputError, match="expected shares of the sources"):
        train.train(word_folder, student, tmp_path, plan, replace(LISTS, shares={"nope": 3.0}), fp32)
    train.train(word_folder, student, tmp_path, plan, LISTS, fp32)
    assert len(curve(tmp_path)) == 1


def test_what_a_run_wrote_before_its_first_checkpoint_is_written_again(student, tmp_path):
    (tmp_path / CURVE).write_text('{"step": 1}\n{"step": 2}\n')
    assert not Run(students.Student.load(student), tmp_path, Schedule(steps=6)).resume()
    assert curve(tmp_path) == []


def test_development_folders_of_one_name_are_both_measured(word_folder, student, tmp_path):
    for parent in ("a", "b"):
        shutil.copytree(word_folder, tmp_path / parent / "lists")
    dev = [tmp_path / parent / "lists" for parent in ("a", "b")]
    run(word_folder, student, tmp_path / "run", dev=dev, steps=1)
    assert {f"ndcg@10 {path}" for path in dev} <= set(curve(tmp_path / "run")[0])


def test_a_relevant_document_that_no_pool_holds_counts_against_the_measure(word_folder, student, tmp_path):
    """One of two relevant documents at rank r; the ideal DCG is 1 + 1/log2(3) instead of 1."""
    shutil.copytree(word_folder, tmp_path / "folder")
    [query] = held_out(TrainingFolder.load(word_folder), 1)
    folder = TrainingFolder.load(tmp_path / "folder")
    members = {folder.doc_ids[folder.doc_index[at]] for at in range(*folder.bounds[query : query + 2])}
    missed = next(name for name in folder.doc_ids if name not in members)
    with (tmp_path / "folder/qrels/dev.tsv").open("a") as file:
        file.write(f"{folder.query_ids[query]}\t{missed}\t1\n")
    start, serving = students.Student.load(student), ServingOptions(queries=1, engine="reference")
    before, after = (
        DevEvaluation({"one": TrainingFolder.load(path)}, serving)(start)["ndcg@10"]
        for path in (word_folder, tmp_path / "folder")
    )
    assert after == pytest.approx(before / (1 + 1 / np.log2(3)))
    assert before > 0


def test_a_loss_that_is_not_finite_stops_the_run(word_folder, student, tmp_path):
    run(word_folder, student, tmp_path, stop=3)
    good = files(checkpoints(tmp_path)[-1])
    start = students.Student.load(student)
    broken = Run(start, tmp_path, Schedule(steps=6, average=0.9))
    broken.resume()

    def not_finite(model, step):
        loss = model.log_scale.sum() * torch.nan
        from turborank.distill.trainer import Loss

        return Loss(loss, {"kl": float("nan")}, 1)

    with pytest.raises(TrainingError, match=r"finite loss, got nan at step 4.*last good checkpoint"):
        broken.train(not_finite)
    assert files(checkpoints(tmp_path)[-1]) == good


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(word_folder, student, tmp_path):
    run(word_folder, student, tmp_path, stop=3)
    before = files(tmp_path / "step-000003")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(TrainingError, match="expected to write a checkpoint"):
            run(word_folder, student, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path / "step-000003") == before
    assert not list(tmp_path.glob(".*partial"))


def test_recomputing_changes_no_gradient(word_folder, student):
    start = students.Student.load(student)
    folder = TrainingFolder.load(word_folder)
    sampler = BatchSampler(folder, PairEncoder(start.tokenizer, max_length=64), folder.scores("t"), LISTS)
    gradients = []
    for recompute in (False, True):
        from turborank.distill.trainer import StudentModel, tensors

        model = StudentModel(start)
        model.recompute = recompute
        model(tensors(sampler.draw(0).batch)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


def test_the_scale_is_part_of_the_saved_head(word_folder, student):
    from turborank.distill.trainer import StudentModel, tensors

    start = students.Student.load(student)
    folder = TrainingFolder.load(word_folder)
    batch = BatchSampler(folder, PairEncoder(start.tokenizer, max_length=64), None, LISTS).draw(0).batch
    model = StudentModel(start)
    plain = model(tensors(batch))
    with torch.no_grad():
        model.log_scale.fill_(np.log(3.0))
    saved = students.Student(model.weights(start.weights), start.raw_config, start.tokenizer)
    torch.testing.assert_close(StudentModel(saved)(tensors(batch)), 3.0 * plain, rtol=1e-5, atol=1e-6)


def test_lists_hold_what_they_should(word_folder, student):
    start = students.Student.load(student)
    folder = TrainingFolder.load(word_folder)
    sampler = BatchSampler(folder, PairEncoder(start.tokenizer, max_length=64), folder.scores("t"), LISTS, seed=7)
    for step in range(8):
        lists = sampler.draw(step)
        assert not folder.held_out[lists.queries].any()
        targets = lists.targets
        assert targets.labels[:, 0].tolist() == [1.0] * len(lists.queries)
        assert (targets.labels[:, 1:] == -1).all()
        assert (targets.teacher[:, 0] == 3.0).all()
        assert (targets.teacher[:, 1:] < 0).all()
        assert targets.real.all()
        lengths = np.diff(lists.batch.cu_seqlens)
        long = step % 4 == 3
        fixed = len(sampler.template.prefix) + len(sampler.template.middle) + len(sampler.template.suffix)
        limit = (40 if long else 16) + fixed + 4  # a query is a word: at most a few pieces
        assert lengths.max() <= limit
        assert (lengths.min() >= 40) is np.bool_(long) or not long
        again = sampler.draw(step)
        assert np.array_equal(lists.batch.input_ids, again.batch.input_ids)
    short = BatchSampler(folder, PairEncoder(start.tokenizer, max_length=24), folder.scores("t"), LISTS, seed=7)
    assert max(int(np.diff(short.draw(step).batch.cu_seqlens).max()) for step in range(8)) == 24  # positions end there
    other = BatchSampler(folder, PairEncoder(start.tokenizer, max_length=64), folder.scores("t"), LISTS, seed=8)
    assert not np.array_equal(other.draw(0).batch.input_ids, sampler.draw(0).batch.input_ids)


def test_a_better_unlabelled_document_is_not_a_negative(word_folder, student):
    start = students.Student.load(student)
    folder = TrainingFolder.load(word_folder)
    scores = folder.scores("t").copy()
    scores[folder.labels > 0] = -1.25  # below two of the five others
    sampler = BatchSampler(
        folder, PairEncoder(start.tokenizer, max_length=64), scores, BatchOptions(budget=256, documents=6)
    )
    targets = sampler.draw(0).targets
    expected = targets.teacher <= -1.25
    assert torch.equal(targets.trusted, expected)
    assert not targets.trusted.all()


def test_two_processes_train_one_student(word_folder, student, tmp_path):
    """torchrun, gloo on one CPU: each rank samples its own lists, and gradients are averaged."""
    import subprocess
    import sys

    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "turborank",
    ]
    command += [
        "distill",
        "train",
        str(word_folder),
        "--student",
        str(student),
        "--out",
        str(tmp_path / "run"),
        "-t",
        "t",
    ]
    # Nothing is learnt, so that the second measurement is no better and ends the run of both at the fourth step.
    command += [
        "--steps",
        "12",
        "--evaluate-every",
        "2",
        "--patience",
        "1",
        "--learning-rate",
        "1e-12",
        "--budget",
        "128",
        "--documents",
        "4",
        "--long-tokens",
        "",
        "--fp32",
        "--threads",
        "1",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = curve(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    options = BatchOptions(budget=128, documents=4, long_every=0)
    folder, start = TrainingFolder.load(word_folder), students.Student.load(student)
    encoder = PairEncoder(start.tokenizer, max_length=8192)
    sizes = [
        BatchSampler(folder, encoder, folder.scores("t"), options, rank=rank).draw(0).batch.tokens for rank in (0, 1)
    ]
    assert rows[0]["tokens"] == sum(sizes)
    assert np.isfinite(Reranker(tmp_path / "run" / "final").rank("amber", ["amber heron"])[0].logit)


def losing(model, step):
    from turborank.distill.trainer import Loss

    return Loss(model.log_scale.square().sum() + 1.0, {}, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_curve_that_does_not_fit_the_disk_is_said_so(word_folder, student, tmp_path):
    run(word_folder, student, tmp_path, stop=3)
    (tmp_path / CURVE).unlink()
    (tmp_path / CURVE).symlink_to("/dev/full")
    full = Run(students.Student.load(student), tmp_path, Schedule(steps=6, average=0.9))
    full.state.step = 3
    with pytest.raises(TrainingError, match=r"expected to write the curve, got: the disk is full"):
        full.train(losing)
    assert checkpoints(tmp_path)[-1].name == "step-000003"


def test_early_stopping_ends_a_run(word_folder, student, tmp_path):
    """Measures 1, 3, 2, 2.5, …: the best is the second, and two worse ones after it end the run at the fourth."""
    values = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    schedule = Schedule(steps=50, save_every=50, evaluate_every=5, patience=2)
    patient = Run(students.Student.load(student), tmp_path, schedule)
    patient.train(losing, lambda student: {"ndcg@10": next(values)})
    rows = curve(tmp_path)
    assert [row["ndcg@10"] for row in rows if "ndcg@10" in row] == [1.0, 3.0, 2.0, 2.5]
    assert rows[-1]["step"] == 20
    assert checkpoints(tmp_path)[-1].name == "step-000020"
    assert (tmp_path / "best" / "model.safetensors").is_file()
    again = Run(students.Student.load(student), tmp_path, schedule)
    assert again.resume()
    again.train(losing, lambda student: {"ndcg@10": next(values)})
    assert curve(tmp_path) == rows  # it has ended


def test_a_step_that_does_not_fit_the_memory_is_said_so(word_folder, student, tmp_path):
    run(word_folder, student, tmp_path, stop=3)
    short = Run(students.Student.load(student), tmp_path, Schedule(steps=6, average=0.9))
    short.resume()

    def too_large(model, step):
        return torch.empty(1 << 60)  # an exbibyte of floats

    with pytest.raises(TrainingError, match=r"fit the memory.*at step 4.*lower --budget"):
        short.train(too_large)
    assert checkpoints(tmp_path)[-1].name == "step-000003"


def test_a_fault_of_the_loss_is_not_taken_for_memory(student, tmp_path):
    broken = Run(students.Student.load(student), tmp_path, Schedule(steps=6))

    def misshapen(model, step):
        return torch.zeros(2, 3) @ torch.zeros(2, 3)

    with pytest.raises(RuntimeError, match="shapes"):
        broken.train(misshapen)


def test_a_missing_student_or_folder_is_named(word_folder, student, tmp_path):
    with pytest.raises(InputError, match="expected a training folder"):
        train.train(tmp_path, student, tmp_path / "run", Schedule(steps=1), LISTS)
    with pytest.raises(ModelNotFoundError, match="expected a model folder"):
        train.train(word_folder, tmp_path / "none", tmp_path / "run", Schedule(steps=1), LISTS)
    with pytest.raises(InputError, match="expected the scores of 'absent'"):
        train.train(word_folder, student, tmp_path / "run", Schedule(steps=1), LISTS, TrainOptions(teachers=["absent"]))
    with pytest.raises(InputError, match="expected a teacher for these losses"):
        train.train(word_folder, student, tmp_path / "run", Schedule(steps=1), LISTS, TrainOptions(loss="kl:1"))
