"""Students, recovery, intermediate losses: against transformers' BERT, the reference, and arithmetic."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from turborank import Reranker
from turborank.distill import students, train
from turborank.distill.biencoder import BiEncoder
from turborank.distill.folder import TrainingFolder
from turborank.distill.recover import ReadingOptions, RecoveryLoss, Texts, check, joint_batch
from turborank.distill.trainer import Run, Schedule, StudentModel, tensors
from turborank.errors import CheckpointError, InputError, UnknownKeyError
from turborank.ops import reference, torch_training
from turborank.ops import torch as torch_ops
from turborank.types import Pair

WORDS = ["the", "red", "fox", "saw", "a", "blue", "heron", "near", "old", "mills", "and", "ran", "over", "bridges"]
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 36 + i)) for i in range(8)]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """A small random BERT by transformers, in sentence-transformers' layout."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = students.train_tokenizer(TEXTS, size=200)
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=96,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    save_file({name: w.contiguous() for name, w in model.state_dict().items()}, folder / "model.safetensors")
    config.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 40}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder, model


def test_the_bi_encoder_is_transformers_bert(bert_folder):
    folder, model = bert_folder
    ours = BiEncoder.load(folder)
    ids = ours.token_ids(TEXTS)
    assert max(map(len, ids)) == 38  # 40 with the template
    batch = ours.pack(ids)
    states = ours.layers(batch)
    vectors = ours.embed(TEXTS, dtype=torch.float32)
    for place, text in enumerate(ids):
        full = torch.tensor([[*ours.prefix, *text, *ours.suffix]])
        with torch.no_grad():
            theirs = model(full, output_hidden_states=True).hidden_states
        start = int(batch.cu_seqlens[place])
        for mine, other in zip(states, theirs, strict=True):
            torch.testing.assert_close(mine[start : start + full.shape[1]], other[0], atol=2e-5, rtol=1e-4)
        mean = theirs[-1][0].mean(0)
        np.testing.assert_allclose(vectors[place], (mean / mean.norm()).numpy(), atol=1e-5)


def test_a_folder_that_is_no_bi_encoder(bert_folder, tmp_path):
    folder, _ = bert_folder
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(CheckpointError, match="expected mean pooling"):
        BiEncoder.load(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"hidden_size": 128}))
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight: expected \[\d+, 128\], got \[\d+, 64\]"):
        BiEncoder.load(tmp_path)


def test_heads_move_with_everything_that_belongs_to_them(bert_folder):
    """With equal slopes, any permutation of the heads leaves the logits unchanged."""
    folder, _ = bert_folder
    plain = students.from_bert(folder)
    matched = students.from_bert(folder, probes=TEXTS[:3])
    moved = [name for name in plain.weights if not torch.equal(plain.weights[name], matched.weights[name])]
    assert any("query" in name for name in moved), "no head was moved, so this test shows nothing"
    batch = tensors_of(plain, TEXTS[0], TEXTS[1])
    for student in (plain, matched):
        student.raw_config["alibi_slopes"] = [0.01] * 4
    torch.testing.assert_close(StudentModel(plain)(batch), StudentModel(matched)(batch), atol=1e-4, rtol=1e-4)


def test_repeated_positions_leave_the_source_as_it_is(bert_folder):
    """With flat slopes every state is that of transformers' own class, which reads the pair with its segments."""
    folder, theirs = bert_folder
    student = students.from_bert(folder, positions="repeat", head="classifier", max_length=1000)
    student.raw_config["alibi_slopes"] = [0.0] * 4
    assert (student.config.learned_positions, student.config.repeat_from, student.config.max_length) == (96, 64, 1000)
    batch, trace = tensors_of(student, TEXTS[0], TEXTS[1]), []
    StudentModel(student)(batch, trace)
    with torch.no_grad():
        read = theirs(
            batch.input_ids[None].long(), token_type_ids=batch.type_ids[None].long(), output_hidden_states=True
        )
    for ours, other in zip(trace[:-1], read.hidden_states, strict=False):
        torch.testing.assert_close(ours.detach(), other[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(trace[-1][0].detach(), read.hidden_states[-1][0, 0], atol=2e-5, rtol=1e-4)
    frozen = StudentModel(student, freeze_words=True)
    assert frozen.frozen == {students.WORDS, "embeddings.position_embeddings.weight"}
    with pytest.raises(UnknownKeyError, match="positions"):
        students.from_bert(folder, positions="last")


def tensors_of(student, query, document):
    from turborank.tokens import PairEncoder, pack

    encoder = PairEncoder(student.tokenizer, max_length=512)
    return tensors(pack([windows[0] for windows in encoder.encode([Pair(query, document)])]))


def test_layers_are_kept_whole(bert_folder):
    folder, _ = bert_folder
    whole = students.from_bert(folder)
    half = students.from_bert(folder, layers=2)
    last = students.from_bert(folder, layers=[3])
    key = "attention.self.query.weight"
    assert torch.equal(half.weights[f"encoder.layer.0.{key}"], whole.weights[f"encoder.layer.0.{key}"])
    assert torch.equal(half.weights[f"encoder.layer.1.{key}"], whole.weights[f"encoder.layer.3.{key}"])
    assert torch.equal(last.weights[f"encoder.layer.0.{key}"], whole.weights[f"encoder.layer.3.{key}"])
    assert (half.config.num_hidden_layers, last.config.num_hidden_layers) == (2, 1)
    for layers in ([4], [0, 0], [], [-1]):
        with pytest.raises(InputError, match="different layers between 0 and 3, for the source has 4, got"):
            students.from_bert(folder, layers=layers)
    for layers in (0, 5, -1):
        with pytest.raises(InputError, match="expected 1 to 4 layers, for the source has 4, got"):
            students.from_bert(folder, layers=layers)


@pytest.mark.parametrize("head", students.HEADS)
def test_every_student_can_be_served(bert_folder, tmp_path, head):
    folder, _ = bert_folder
    students.from_bert(folder, head=head).save(tmp_path / head)
    ranking = Reranker(tmp_path / head, engine="reference").rank("red fox", ["blue heron", "a red fox"])
    assert sorted(r.index for r in ranking) == [0, 1]
    scratch = students.from_scratch(students.train_tokenizer(TEXTS, size=200, kind="bpe"), shape="micro", head=head)
    scratch.save(tmp_path / f"{head}-scratch")
    assert Reranker(tmp_path / f"{head}-scratch").rank("red fox", ["blue heron"])[0].index == 0


def test_layers_of_a_cross_encoder(bert_folder, tmp_path):
    folder, _ = bert_folder
    students.from_bert(folder, head="classifier").save(tmp_path / "teacher")
    student = students.from_layers(tmp_path / "teacher", layers=2)
    teacher = students.Student.load(tmp_path / "teacher")
    assert torch.equal(student.weights["classifier.weight"], teacher.weights["classifier.weight"])
    assert torch.equal(
        student.weights["encoder.layer.1.output.dense.weight"], teacher.weights["encoder.layer.3.output.dense.weight"]
    )
    student.save(tmp_path / "half")
    for layers, expected in ((4, "expected 1 to 2 layers"), ([0, 0], "expected different layers between 0 and 1")):
        with pytest.raises(InputError, match=expected):
            students.from_layers(tmp_path / "half", layers=layers)


@pytest.mark.parametrize("layers", [0, -1])
def test_a_student_from_scratch_has_a_layer(layers):
    with pytest.raises(InputError, match="expected one layer or more"):
        students.from_scratch(students.train_tokenizer(TEXTS, size=200), shape="micro", layers=layers)


def test_what_the_source_reads_of_a_pair():
    """Tokens of the student and of the source side by side; the source reads longer documents in windows."""

    class Source:
        max_tokens, prefix, suffix = 6, [101], [102]

    batch, texts, rows = joint_batch(Source, [([1, 2], [3, 4, 5, 6, 7, 8]), ([9], [10])])
    assert batch.input_ids.tolist() == [101, 1, 2, 102, 3, 4, 5, 6, 7, 8, 102, 101, 9, 102, 10, 102]
    assert batch.type_ids.tolist() == [0] * 4 + [1] * 7 + [0] * 3 + [1] * 2
    read = [token for text in texts for token in [101, *text, 102]]
    assert [list(t) for t in texts] == [[1, 2], [3, 4, 5, 6], [7, 8], [9], [10]]
    assert [read[row] for row in rows] == batch.input_ids.tolist()


def test_losses_of_recovery_are_shares_of_what_there_is_to_learn(bert_folder):
    folder, _ = bert_folder
    source = BiEncoder.load(folder)
    student = students.from_bert(folder, slopes="gentle")
    texts = Texts(source, TEXTS, TEXTS, [], ReadingOptions(budget=100, query_tokens=8, document_tokens=20), 0)
    recovery = RecoveryLoss(source, texts, layers=range(4), dtype=torch.float32)
    model = StudentModel(student)
    with torch.no_grad():
        loss = recovery(model, 0)
    assert 0 < loss.parts["hidden"] < 2  # MSE / variance: 0 is itself, 1 knows the mean, 2 is a stranger
    assert 0 < loss.parts["pooled"] < 1


def test_recovery_recovers(bert_folder, word_folder, tmp_path):
    folder, _ = bert_folder
    students.from_bert(folder).save(tmp_path / "student")
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": " ".join(TEXTS)}) + "\n")
    train.recover(
        tmp_path / "student", folder, word_folder, tmp_path / "run",
        Schedule(steps=120, learning_rate=3e-3, warmup=4, save_every=120),
        train.RecoverOptions(bf16=False, long=[long], budget=300, long_tokens=(60,)),
    )  # fmt: skip
    curve = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    for part in ("hidden", "pooled"):
        first, last = (np.mean([row[part] for row in rows]) for rows in (curve[:3], curve[-10:]))
        assert last < 0.85 * first
    assert Reranker(tmp_path / "run" / "final").rank("red", ["fox"])[0].index == 0


def test_what_cannot_be_recovered_is_named(bert_folder, tmp_path):
    folder, _ = bert_folder
    source = BiEncoder.load(folder)
    for faulty in ((), (0,), (-5, 100)):
        with pytest.raises(InputError, match="expected tokens of long documents, each 1 or more"):
            ReadingOptions(long_tokens=faulty)
    with pytest.raises(InputError, match="expected the folder of a bi-encoder, got none at"):
        BiEncoder.load(tmp_path / "nosuch")
    narrow = students.from_scratch(source.tokenizer, shape="micro", layers=2)
    narrow.raw_config["vocab_size"] += 1
    narrow.weights[students.WORDS] = torch.zeros(narrow.raw_config["vocab_size"], 64)
    learned = students.Student(source.weights, json.loads((folder / "config.json").read_text()), source.tokenizer)
    learned.weights |= students._new_head("classifier", 64, {}, torch.Generator())
    for student, got in ((narrow, "got one of ALiBi, 64 wide"), (learned, "got one of bert without ALiBi")):
        with pytest.raises(InputError, match=got):
            check(student.config, source.config)


@pytest.mark.parametrize("kind", train.KINDS)
def test_inner_terms_are_zero_for_the_teacher_itself_and_fall(bert_folder, word_folder, tmp_path, kind):
    folder, _ = bert_folder
    teacher = students.from_bert(folder, head="classifier")
    teacher.save(tmp_path / "teacher")
    term = train.IntermediateLoss(train.parse_intermediate(f"{kind}:{tmp_path / 'teacher'}:2"), teacher, torch.float32)
    batch = tensors_of(teacher, TEXTS[0], TEXTS[1])
    trace: list[torch.Tensor] = []
    record: list[tuple[torch.Tensor, ...]] = []
    StudentModel(teacher)(batch, trace, record)
    assert term(batch, trace, record).item() == pytest.approx(0.0, abs=1e-6)
    student = students.from_layers(tmp_path / "teacher", layers=2)
    for weight in student.weights.values():  # a random BERT's layers change little: make the two differ
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    term = train.IntermediateLoss(train.parse_intermediate(f"{kind}:{tmp_path / 'teacher'}"), student, torch.float32)
    run = Run(student, tmp_path / "run", Schedule(steps=15, learning_rate=1e-3, warmup=1), freeze_words=False)
    values = []
    for _ in range(15):
        trace, record = [], []
        run.model(batch, trace, record)
        value = term(batch, trace, record)
        run.adam.zero_grad()
        value.backward()
        run.adam.step()
        values.append(value.item())
    assert values[0] > 0
    assert values[-1] < 0.8 * values[0]


def test_an_inner_teacher_must_read_the_same_tokens(bert_folder, tmp_path):
    folder, _ = bert_folder
    students.from_bert(folder, head="classifier").save(tmp_path / "teacher")
    other = students.from_scratch(
        students.train_tokenizer([*TEXTS, "entirely different words"], size=250), shape="micro"
    )
    with pytest.raises(InputError, match="another vocabulary"):
        train.IntermediateLoss(train.parse_intermediate(f"hidden:{tmp_path / 'teacher'}"), other, torch.float32)
    for text in ("hidden", "hidden:", "outer:model:1", "hidden:model:inf"):
        with pytest.raises(InputError, match="expected hidden:MODEL"):
            train.parse_intermediate(text)
    assert train.parse_intermediate("relations:org/name:0.5") == ("relations", "org/name", 0.5)


@pytest.mark.parametrize("slopes", [(), (0.25, 0.5, 0.1, 0.0)])
def test_training_attention_equals_the_reference_forward_and_backward(slopes, monkeypatch):
    monkeypatch.setattr(torch_training, "QUERY_BLOCK", 16)  # several blocks a pair
    rng = np.random.default_rng(0)
    cu = np.asarray([0, 5, 45, 46], np.int32)
    q, k, v, up = rng.normal(size=(4, 46, 32)).astype(np.float32)
    expected = reference.attention(q, k, v, cu, 4, slopes, False)
    results = []
    for ops in (torch_training, torch_ops):
        parts = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
        out = ops.attention(*parts, torch.from_numpy(cu), 4, slopes, False)
        (out * torch.from_numpy(up)).sum().backward()
        results.append([out.detach(), *(part.grad for part in parts)])
    np.testing.assert_allclose(results[0][0].numpy(), expected, atol=1e-5)
    for ours, autograd in zip(*results, strict=True):
        torch.testing.assert_close(ours, autograd, atol=1e-5, rtol=1e-4)


def test_vocabularies_hold_their_texts(word_folder):
    folder = TrainingFolder.load(word_folder)
    for kind in students.TOKENIZERS:
        tokenizer = students.train_tokenizer(folder.texts, kind=kind, size=400)
        encoded = tokenizer.encode("amber heron", "kelp")
        assert tokenizer.decode(encoded.ids).split() == ["amber", "heron", "kelp"]
        assert tokenizer.num_special_tokens_to_add(True) == (3 if kind == "wordpiece" else 4)
    with pytest.raises(InputError, match="at least 64 pieces"):
        students.train_tokenizer(["a"], size=10)
