"""The model against plain formulas: attention, windows, rotary, loss, causality, FLOPs."""

import math

import pytest
import torch

import train
from test_optimizer import small_model


def dense_attention(q, k, v, window):
    """softmax(q k^T / sqrt(d)) v with a mask written out, one place at a time."""
    T, size = q.size(1), q.size(-1)
    y = torch.zeros_like(q)
    for t in range(T):
        first = max(0, t - window + 1)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, first:t + 1]) / math.sqrt(size)
        y[:, t] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, first:t + 1])
    return y


def qkv(B=2, T=24, heads=2, size=16):
    torch.manual_seed(0)
    return [torch.randn(B, T, heads, size) for _ in range(3)]


@pytest.mark.parametrize("attend", [train.sdpa, train.blockwise])
def test_full_attention_is_the_dense_one(attend):
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v, 24), dense_attention(q, k, v, 24), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("T", [100, 128, 300, 515])
@pytest.mark.parametrize("window", [1, 40, 129, 200, 515])
def test_blocks_of_queries_make_no_difference(T, window):
    """Forward and backward, in lengths that are no multiple of a block and windows that end inside one."""
    mine, reference = qkv(1, T), qkv(1, T)
    for tensors, attend in ((mine, train.blockwise), (reference, dense_attention)):
        for t in tensors:
            t.requires_grad_()
        attend(*tensors, window).square().sum().backward()
    torch.testing.assert_close(train.blockwise(*mine, window), dense_attention(*reference, window), atol=1e-5, rtol=1e-4)
    for a, b in zip(mine, reference):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_sdpa_refuses_a_window_that_it_would_ignore():
    with pytest.raises(AssertionError):
        train.sdpa(*qkv(), 8)


def test_windows_reach_the_kernel_that_skips():
    """A kernel that honours windows gets them by pattern; one that does not gets the whole context everywhere."""
    h = small_model()[1]
    h.depth, h.windows, h.short_window = 5, "SSL", 8
    windows = lambda skips: [block.attention.window for block in train.GPT(h, 32, torch.float32, dense_attention, skips).blocks]
    assert windows(True) == [8, 8, 32, 8, 32]           # the last layer is long whatever the pattern says
    assert windows(False) == [32] * 5


def test_a_window_limits_what_a_layer_sees():
    h = small_model()[1]
    h.depth, h.windows, h.short_window, h.bigram_rows = 2, "S", 4, 0
    model = train.GPT(h, 32, torch.float32, dense_attention, True)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        model.blocks[0].near.zero_()                    # of look_back, which sees three tokens more
    block = model.blocks[0]
    x = torch.randn(1, 32, 64)
    values = torch.randn(1, 32, 64)
    changed = x.clone()
    changed[:, 10] += 1
    cos, sin = model.cos, model.sin
    moved = (block(x, x, None, values, cos, sin) - block(changed, changed, None, values, cos, sin)).abs().amax((0, 2))
    assert (moved[:10] == 0).all() and (moved[10:14] > 0).all() and (moved[14:] == 0).all()


def test_look_back_is_a_causal_depthwise_convolution():
    x, weights = torch.randn(2, 20, 6), torch.randn(3, 6)
    kernel = torch.cat([weights, torch.ones(1, 6)]).T[:, None]      # oldest first, then the token itself
    wanted = torch.nn.functional.conv1d(torch.nn.functional.pad(x.mT, (3, 0)), kernel, groups=6).mT
    torch.testing.assert_close(train.look_back(x, weights), wanted)


def test_rotary_depends_on_the_distance_alone():
    cos, sin = train.rotary_tables(50, 16, 1e4)
    q, k = torch.randn(16), torch.randn(16)
    at = lambda x, t: train.rotate(x[None, None, None], cos[t:t + 1], sin[t:t + 1]).flatten()
    assert torch.dot(at(q, 7), at(k, 3)) == pytest.approx(torch.dot(at(q, 44), at(k, 40)).item(), abs=1e-4)
    assert at(q, 9).norm() == pytest.approx(q.norm().item(), rel=1e-5)


def noisy_model(**changes):
    model, h = small_model(**changes)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_every_parameter_of_every_recipe_learns(recipe):
    h = train.hyperparameters(recipe)
    h.vocab_size, h.width, h.head_size, h.bigram_rows = 64, 64, 32, min(h.bigram_rows, 64)
    model = train.GPT(h, 32, torch.float32)
    model.init_weights()
    optimizer = train.make_optimizer(model, h, torch.float32)
    before = [p.clone() for p in model.parameters()]
    for _ in range(3):                                  # what is zero at the start keeps what is behind it from learning
        model(torch.randint(0, 63, (8, 32)), torch.randint(0, 63, (8, 32))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((p != old).any() for p, old in zip(model.parameters(), before))


@pytest.mark.parametrize("changes", [{}, {"bigram_rows": 0, "values_every": 2}])
def test_the_model_is_causal_and_its_rows_are_independent(changes):
    model = noisy_model(**changes).eval()
    ids = torch.randint(0, 63, (3, 32))
    logits = model(ids)
    other = ids.clone()
    other[:, 20:] = torch.randint(0, 63, (3, 12))
    torch.testing.assert_close(model(other)[:, :20], logits[:, :20], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(ids[1:2]), logits[1:2], atol=1e-5, rtol=1e-4)
    assert (model(other)[:, 20:] - logits[:, 20:]).abs().max() > 1e-3


def test_the_loss_is_the_mean_cross_entropy_of_the_scored_targets():
    model = noisy_model()
    ids, targets = torch.randint(0, 63, (2, 32)), torch.randint(0, 63, (2, 32))
    targets[0, 5:9] = -1
    p = model(ids).detach().softmax(-1)
    by_hand = [-math.log(p[b, t, targets[b, t]]) for b in range(2) for t in range(32) if targets[b, t] >= 0]
    assert model(ids, targets).item() == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
    assert model(ids).abs().max() < train.hyperparameters("sotu").softcap


def test_the_gradients_taken_by_hand_in_the_head_are_those_of_autograd():
    model = noisy_model(bigram_rows=0)
    ids, targets = torch.randint(0, 63, (2, 32)), torch.randint(-1, 63, (2, 32))
    (3 * model(ids, targets)).backward()
    by_hand = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (3 * torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-1)).backward()
    for ours, autograds in zip(by_hand, (p.grad for p in model.parameters())):
        torch.testing.assert_close(ours, autograds, atol=1e-6, rtol=1e-3)


def test_dropout_leaves_out_whole_tokens_keeps_the_mean_and_ends_with_training():
    torch.manual_seed(0)
    x = torch.ones(50, 100, 3)
    y = train.drop(x, 0.25)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y == y[..., :1]).all() and y.mean() == pytest.approx(1, abs=0.03)
    assert train.drop(x, 0.0) is x
    model, ids = noisy_model(embed_dropout=0.5, values_dropout=0.5, bigram_dropout=0.5), torch.randint(0, 63, (2, 32))
    assert (model(ids) != model(ids)).any()
    model.eval()
    assert (model(ids) == model(ids)).all()


def test_flops_per_token_by_hand():
    """Two blocks of width 64: q, k, v, out 4 x 64^2, MLP 8 x 64^2, gate 2 x 32; head 64 x 64; 16.5 keys on average."""
    model, _ = small_model()
    matrices = 2 * (12 * 64 ** 2 + 64) + 64 * 64
    assert model.flops_per_token(32) == 6 * matrices + 12 * 64 * 2 * 16.5
