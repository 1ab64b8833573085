"""The n-gram model against Kneser-Ney by the book, counted in dictionaries."""

import math
from collections import Counter

import pytest
import torch

from ngrams import NGrams

VOCAB, ORDER = 6, 4


def gram(n, row, t):
    """n tokens of a row up to t, of which fewer exist where it begins."""
    return (n, *row[max(0, t - n + 1):t + 1])


class ByTheBook:
    """
    P_n(w | c) = max(count(c w) - D, 0) / count(c) + D kinds(c) / count(c) P_(n-1)(w | shorter c),
    the counts of all but the longest n-grams being of the different tokens before them.
    """

    def __init__(self, x, y):
        occurrences = [(row, t, words[t]) for row, words in zip(x, y)
                       for t in range(len(row)) if words[t] >= 0]
        self.counts = {ORDER: Counter((gram(ORDER - 1, row, t), w) for row, t, w in occurrences)}
        for n in range(ORDER - 1, 0, -1):
            longer = {(gram(n, row, t), gram(n - 1, row, t), w) for row, t, w in occurrences}
            self.counts[n] = Counter((context, w) for _, context, w in longer)

    def discount(self, n):
        kinds = Counter(self.counts[n].values())
        return (kinds[1] + 1) / (kinds[1] + 2 * kinds[2] + 2)

    def probability(self, w, row, t, n=ORDER):
        if n == 0:
            return 1 / VOCAB
        shorter = self.probability(w, row, t, n - 1)
        context = gram(n - 1, row, t)
        after = {word: count for (c, word), count in self.counts[n].items() if c == context}
        if not after:
            return shorter
        total, discount = sum(after.values()), self.discount(n)
        return (max(after.get(w, 0) - discount, 0) + discount * len(after) * shorter) / total


@pytest.fixture
def counted():
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (5, 31))
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    y[torch.rand(y.shape) < 0.1] = -1
    ngrams = NGrams(ORDER, VOCAB)
    ngrams.count(x, y)
    return ngrams, x, y


def test_it_is_interpolated_kneser_ney(counted):
    ngrams, x, y = counted
    book = ByTheBook(x.tolist(), y.tolist())
    ids = torch.cat([x[:2, :12], torch.randint(0, VOCAB, (2, 12))])     # known contexts, and new
    probabilities = ngrams(ids)
    expected = [[[book.probability(w, row, t) for w in range(VOCAB)] for t in range(12)]
                for row in ids.tolist()]
    torch.testing.assert_close(probabilities, torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4, 12))


def test_the_mixture_trusts_the_surer_one(counted):
    ngrams, x, _ = counted
    logits = torch.randn(*x.shape, VOCAB)
    mixed = ngrams.mix(logits.clone(), x, 0.3, (-0.4, 1.5, -0.7)).exp()
    for b, t in ((0, 0), (2, 7), (4, 29)):
        net = [math.exp(z) for z in logits[b, t].tolist()]
        net = [value / sum(net) for value in net]
        theirs = ngrams(x)[b, t].tolist()
        both = [n ** 0.7 * q ** 0.3 for n, q in zip(net, theirs)]
        both = [value / sum(both) for value in both]
        weight = 1 / (1 + math.exp(0.4 - 1.5 * math.log(max(theirs)) + 0.7 * math.log(max(both))))
        expected = [(1 - weight) * p + weight * q for p, q in zip(both, theirs)]
        assert mixed[b, t].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_token_gains_with_each_time_its_row_has_had_it(counted):
    ngrams, x, y = counted
    logits = torch.zeros(*x.shape, VOCAB)
    ngrams.raise_repeated(logits, x, 0.5, 20)
    words = Counter(y[y >= 0].tolist())
    for b, row in enumerate(x.tolist()):
        for t in range(len(row)):
            for w in range(VOCAB):
                frequency = (words[w] + 1) / (sum(words.values()) + VOCAB)
                # what the row begins with is BOS in a text, and counts for nothing
                n = row[:t + 1].count(w) if w != row[0] else 0
                gain = 0.5 * math.log(1 + n / (20 * frequency))
                assert logits[b, t, w].item() == pytest.approx(gain, abs=1e-5)


def test_it_survives_being_saved(counted):
    ngrams, x, _ = counted
    again = NGrams(ORDER, VOCAB)
    again.load_state_dict(ngrams.state_dict())
    assert again.counted and (again(x) == ngrams(x)).all()


@pytest.mark.parametrize("epoch,progress,rows", [(1.01, 0.5, 4), (0.5, 0.91, 5)])
def test_it_counts_the_first_epoch_once(counted, epoch, progress, rows):
    _, x, y = counted
    ngrams, alone = NGrams(ORDER, VOCAB), NGrams(ORDER, VOCAB)
    for i in range(4):
        ngrams.watch(x[i:i + 1], y[i:i + 1], 0.2 * i, 0.1 * i)
        assert not ngrams.counted
    for _ in range(3):
        ngrams.watch(x[4:], y[4:], epoch, progress)
    alone.count(x[:rows], y[:rows])
    assert (ngrams(x) == alone(x)).all() and not ngrams.kept


@pytest.mark.parametrize("length", range(1, 7))
def test_rows_may_be_shorter_than_its_contexts(counted, length):
    ngrams, x, _ = counted
    torch.testing.assert_close(ngrams(x[:, :length]), ngrams(x)[:, :length])


@pytest.mark.parametrize("order,vocab_size", [(2, 64), (6, 2**14 + 1)])
def test_what_it_cannot_do_is_said(order, vocab_size):
    with pytest.raises(SystemExit, match="set ngram_order=0"):
        NGrams(order, vocab_size)
