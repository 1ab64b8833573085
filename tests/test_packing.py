"""Training rows: packing covers each token once, rows are full, start with BOS, follow the seed."""

import random

import numpy as np
from hypothesis import given, settings, strategies as st

import referee


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), max_size=60),
    capacity=st.integers(2, 33),
    seed=st.integers(0, 5))
def test_packing_covers_every_token_and_invents_none(lengths, capacity, seed):
    starts = np.cumsum([0, *lengths])
    documents = ((count, 0, int(start)) for count, start in zip(lengths, starts))
    seen = np.zeros(starts[-1], dtype=int)
    for row in referee.pack(documents, capacity, random.Random(seed)):
        filled = sum(count + 1 for _, _, count in row)
        assert capacity - 1 <= filled <= capacity       # a BOS fills a single position left over
        for _, start, count in row:
            assert count > 0
            first, last = np.searchsorted(starts, [start, start + count - 1], "right")
            assert first == last                        # a piece is of one document
            seen[start:start + count] += 1
    assert seen.max(initial=0) <= 1
    assert (seen == 0).sum() < capacity * 2             # only what no longer fills a row is dropped


def test_best_fit_takes_the_longest_piece_that_fits():
    documents = [(5, 0, 0), (3, 0, 5), (2, 0, 8)]       # a row of 10 holds 5 + 1, then 3 + 1
    for seed in range(20):
        row = next(referee.pack(iter(documents), 10, random.Random(seed)))
        if row[0][2] == 5:
            assert [piece[2] for piece in row] == [5, 3]
            return
    raise AssertionError("no seed started the row with the piece of five tokens")


def fill_rows(seed, number=200, capacity=17):
    tokens = [np.arange(100, 600, dtype=np.uint16), np.arange(700, 800, dtype=np.uint16)]
    offsets = [np.array([0, 30, 31, 35, 200, 500]), np.array([0, 50, 100])]
    rows = np.empty((number, capacity), dtype=np.int64)
    referee.training_rows(tokens, offsets, 9999, capacity, seed)(rows)
    return rows


def test_rows_start_with_bos_have_no_padding_and_depend_on_the_seed_alone():
    rows = fill_rows(1)
    assert (rows[:, 0] == 9999).all()
    assert set(np.unique(rows[rows != 9999])) == {*range(100, 600), *range(700, 800)}
    here, following = rows[:, :-1], rows[:, 1:]
    inside = (here != 9999) & (following != 9999)
    assert (following[inside] == here[inside] + 1).all()        # a document's tokens, in order
    assert (fill_rows(1) == rows).all()
    assert (fill_rows(2) != rows).any()


def test_every_epoch_covers_the_corpus_in_another_order():
    offsets = [np.array([0, 3, 7, 12]), np.array([0, 2, 9])]
    stream = referee.shuffled_documents(offsets, 0)
    epochs = [tuple(next(stream) for _ in range(5)) for _ in range(8)]
    assert len({frozenset(epoch) for epoch in epochs}) == 1
    assert len(set(epochs)) > 1
    assert set(epochs[0]) == {(3, 0, 0), (4, 0, 3), (5, 0, 7), (2, 1, 0), (7, 1, 2)}
