"""The model against plain formulas: attention, windows, rotary, loss, causality, FLOPs."""

import math

import pytest
import torch
import torch.nn.functional as F

import machine
import train
from test_optimizer import recipe, small_model


def assert_close(ours, expected, atol=1e-5, rtol=1e-4):
    torch.testing.assert_close(ours, expected, atol=atol, rtol=rtol)


def dense_attention(q, k, v, window):
    """softmax(q k^T / sqrt(d)) v, one position at a time."""
    T, head_dim = q.size(1), q.size(-1)
    y = torch.zeros_like(q)
    for t in range(T):
        first = max(0, t - window + 1)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, first:t + 1]) / math.sqrt(head_dim)
        y[:, t] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, first:t + 1])
    return y


def qkv(B=2, T=24, heads=2, head_dim=16):
    torch.manual_seed(0)
    return [torch.randn(B, T, heads, head_dim) for _ in range(3)]


@pytest.mark.parametrize("attend", [machine.sdpa, machine.blockwise])
def test_full_attention_is_the_dense_one(attend):
    q, k, v = qkv()
    assert_close(attend(q, k, v, 24), dense_attention(q, k, v, 24))


@pytest.mark.parametrize("T", [100, 128, 300, 515])
@pytest.mark.parametrize("window", [1, 40, 129, 200, 515])
def test_blocks_of_queries_make_no_difference(T, window):
    """Forward and backward, at lengths and windows that end inside a block."""
    mine, reference = qkv(1, T), qkv(1, T)
    for tensors, attend in ((mine, machine.blockwise), (reference, dense_attention)):
        for t in tensors:
            t.requires_grad_()
        attend(*tensors, window).square().sum().backward()
    assert_close(machine.blockwise(*mine, window), dense_attention(*reference, window))
    for a, b in zip(mine, reference):
        assert_close(a.grad, b.grad)


def test_sdpa_refuses_a_window_that_it_would_ignore():
    with pytest.raises(AssertionError):
        machine.sdpa(*qkv(), 8)


def test_windows_reach_the_kernel_that_skips():
    """By the pattern where windows save time; elsewhere every layer sees the whole context."""
    h = recipe(depth=5, window_pattern="SSL", short_window=8)

    def windows(windowed):
        model = train.GPT(h, 32, torch.float32, dense_attention, windowed)
        return [block.attention.window for block in model.blocks]

    assert windows(True) == [8, 8, 32, 8, 32]           # the last layer is long in any pattern
    assert windows(False) == [32] * 5


def test_a_window_limits_what_a_layer_sees():
    h = recipe(window_pattern="S", short_window=4, short_conv=0)
    model = train.GPT(h, 32, torch.float32, dense_attention, True)
    add_noise(model, 0.05)
    block, x, value_embed = model.blocks[0], torch.randn(1, 32, 64), torch.randn(1, 32, 64)
    changed = x.clone()
    changed[:, 10] += 1

    def outputs(x):
        return block(x, x, value_embed, 1, model.cos, model.sin)

    moved = (outputs(x) - outputs(changed)).abs().amax((0, 2))
    assert (moved[:10] == 0).all() and (moved[10:14] > 0).all() and (moved[14:] == 0).all()


def test_short_conv_is_a_causal_depthwise_convolution():
    x, conv = torch.randn(2, 20, 6), train.ShortConv(6, 3)
    torch.nn.init.normal_(conv.weight)
    kernel = torch.cat([conv.weight, torch.ones(1, 6)]).T[:, None]    # ends with the token itself
    expected = F.conv1d(F.pad(x.mT, (3, 0)), kernel, groups=6).mT
    assert_close(conv(x), expected)


def test_rotary_depends_on_the_distance_alone():
    cos, sin = train.rotary_tables(50, 16, 1e4)
    q, k = torch.randn(16), torch.randn(16)

    def at(x, t):
        return train.rotate(x[None, None, None], cos[t:t + 1], sin[t:t + 1]).flatten()

    near, far = torch.dot(at(q, 7), at(k, 3)), torch.dot(at(q, 44), at(k, 40))
    assert near.item() == pytest.approx(far.item(), abs=1e-4)
    assert at(q, 9).norm() == pytest.approx(q.norm().item(), rel=1e-5)


def add_noise(model, scale=0.1):
    model.init_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))


def noisy_model(**changes):
    model, _ = small_model(**changes)
    add_noise(model)
    return model


def random_ids(rows=2, lowest=0):
    return torch.randint(lowest, 63, (rows, 32))


@pytest.mark.parametrize("name", train.RECIPES)
def test_every_parameter_of_every_recipe_learns(name):
    h = recipe(name, vocab_size=64, width=64, head_dim=32)
    model = train.GPT(h, 32, torch.float32)
    model.init_weights()
    optimizer = train.make_optimizer(model, h)
    before = [p.clone() for p in model.parameters()]
    for _ in range(3):      # what starts at zero keeps the gradient from what is behind it
        model(random_ids(8), random_ids(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((p != old).any() for p, old in zip(model.parameters(), before))


@pytest.mark.parametrize("changes", [{}, {"ngram_order": 0, "value_embed_every": 2}])
def test_the_model_is_causal_and_its_rows_are_independent(changes):
    model = noisy_model(**changes).eval()
    if model.ngrams is not None:
        model.ngrams.count(random_ids(9), random_ids(9))
    ids = random_ids(3)
    logits = model(ids)
    other = ids.clone()
    other[:, 20:] = random_ids(3)[:, 20:]
    assert_close(model(other)[:, :20], logits[:, :20])
    assert_close(model(ids[1:2]), logits[1:2])
    assert (model(other)[:, 20:] - logits[:, 20:]).abs().max() > 1e-3


@pytest.mark.parametrize("cap", [0, 2])
def test_the_loss_is_the_mean_cross_entropy_of_the_scored_targets(cap):
    model, ids, targets = noisy_model(), random_ids(), random_ids()
    model.h.softcap = cap
    targets[0, 5:9] = -1
    p = model(ids).detach().softmax(-1)
    nats = []
    for b in range(2):
        for t in range(32):
            if targets[b, t] >= 0:
                nats.append(-math.log(p[b, t, targets[b, t]]))
    assert model(ids, targets).item() == pytest.approx(sum(nats) / len(nats), abs=1e-5)
    assert (model(ids).abs().max() < 2) == (cap == 2)
    assert train.softcap(torch.tensor([99.0]), 0) == 75


def test_a_sampled_head_keeps_the_targets_and_is_right_on_average():
    torch.manual_seed(0)
    weight, x, targets = torch.randn(60, 8), torch.randn(8) / 4, torch.tensor([7, 3, -1, 11, 7])
    frequency = torch.randint(1, 200, (60,)).float()
    sums = []
    for _ in range(4000):
        rows, places, stands_for = train.sample(weight, targets, frequency, 12)
        assert places[2] == -1 and (rows[places] == weight[targets])[[0, 1, 3, 4]].all()
        assert len(rows.unique(dim=0)) == 12 and (stands_for[places[[0, 1, 3]]] == 0).all()
        sums.append((rows @ x + stands_for).exp().sum())
    sums, expected = torch.stack(sums), (weight @ x).exp().sum()
    assert abs(sums.mean() - expected) < 4 * sums.std() / 4000**0.5 < 0.1 * expected
    assert sums.std() > 0.1 * expected


def test_a_sampled_head_leaves_out_targets_that_find_no_room():
    weight, targets = torch.randn(60, 8), torch.arange(20)
    rows, places, stands_for = train.sample(weight, targets, torch.ones(60), 12)
    scored = places >= 0
    assert scored.sum() == 12 and (rows[places[scored]] == weight[targets[scored]]).all()
    assert (stands_for == 0).all()


def test_training_with_candidates_is_close_to_training_with_all_tokens():
    losses = []
    for candidates in (0, 40):
        torch.manual_seed(0)
        model, ids, targets = noisy_model(candidates=candidates), random_ids(), random_ids()
        losses.append(sum(model(ids, targets % 32).item() for _ in range(200)) / 200)
        assert model.seen.sum() == 64 + (200 * targets.numel() if candidates else 0)
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


@pytest.mark.parametrize("chunk_logits", [2**30, 2**10])
def test_the_gradients_taken_by_chunks_are_those_of_torchs_cross_entropy(chunk_logits, monkeypatch):
    monkeypatch.setitem(machine.CHUNK_LOGITS, "cpu", chunk_logits)
    model, ids, targets = noisy_model(), random_ids(8), random_ids(8, lowest=-1)
    (3 * model(ids, targets)).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model(ids).flatten(0, 1)
    (3 * F.cross_entropy(logits, targets.flatten(), ignore_index=-1)).backward()
    for grad, p in zip(ours, model.parameters()):
        assert_close(grad, p.grad, atol=1e-6, rtol=1e-3)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model, ids, targets = noisy_model(), random_ids(8), random_ids(8)
    gradients = []
    for steps in (1, 4):
        model.zero_grad()
        for x, y in zip(ids.chunk(steps), targets.chunk(steps)):
            (model(x, y) / steps).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for whole, parts in zip(*gradients):
        assert_close(whole, parts, atol=1e-6)


def test_dropout_drops_whole_positions_keeps_the_mean_and_ends_with_training():
    """A rate of 0.1 is one of 0.25 in the middle of the third epoch, and never more than 0.5."""
    torch.manual_seed(0)
    for name in ("embed_dropout", "value_dropout"):
        model, ids = noisy_model(**{name: 0.1}), random_ids(100)
        assert (model(ids) == model(ids)).all()         # at the start it drops nothing
        for epoch, kept in (2.5, 0.75), (9, 0.5):
            model.epoch.fill_(epoch)
            factor = model.dropout(ids, 0.1)
            assert factor.shape == (*ids.shape, 1)
            assert factor.unique().tolist() == pytest.approx([0, 1 / kept])
            assert factor.mean().item() == pytest.approx(1, abs=0.1)
            assert (model(ids) != model(ids)).any()
        model.eval()
        assert (model(ids) == model(ids)).all()


def test_flops_per_token_by_hand():
    """
    Two blocks of width 64: q, k, v, out 4 x 64^2, MLP 8 x 64^2, gate 2 x 32, two convolutions
    3 x 64; unembedding 64 x 64. Keys: 16.5 on average, in a window of 4 (1 + 2 + 3 + 29 x 4) / 32.
    """
    model, h = small_model(window_pattern="S", short_window=4)
    weights = 2 * (12 * 64**2 + 64 + 2 * 3 * 64) + 64 * 64
    assert model.flops_per_token(32) == 6 * weights + 12 * 64 * (16.5 + 16.5)
    windowed = train.GPT(h, 32, torch.float32, dense_attention, True)
    assert windowed.flops_per_token(32) == 6 * weights + 12 * 64 * (122 / 32 + 16.5)
