"""AdamW against torch's, Muon against an SVD, and groups that cover every parameter once."""

from types import SimpleNamespace

import pytest
import torch

import prepare
import train


def recipe(name="sotu", **changes):
    """The hyperparameters of a recipe; of sotu's, small ones."""
    h = SimpleNamespace(**train.RECIPES[name])
    h.vocab_size = prepare.DATASETS[name].vocab_size
    if name == "sotu":
        h.vocab_size, h.depth, h.width, h.head_dim = 64, 2, 64, 32
    for key, value in changes.items():
        setattr(h, key, value)
    return h


def small_model(**changes):
    """A model without dropout, and its hyperparameters."""
    h = recipe(**dict(embed_dropout=0.0, value_dropout=0.0) | changes)
    model = train.GPT(h, 32, torch.float32)
    model.init_weights()
    return model, h


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(decay):
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(7, 5)) for _ in range(2))
    numbers = dict(lr=0.03, betas=(0.8, 0.95), eps=1e-10)
    a = train.MuonAdamW([dict(kind="adamw", params=[ours], decay=decay, **numbers)])
    b = torch.optim.AdamW([theirs], weight_decay=decay, **numbers)
    for _ in range(20):
        ours.grad = theirs.grad = torch.randn(7, 5)
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)


def test_relative_eps_is_a_multiple_of_the_rms_of_the_gradient():
    """torch's AdamW with that eps, set before each step; and rows seen rarely move less."""
    torch.manual_seed(0)
    numbers = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-10)
    table = torch.nn.Embedding(4, 3)
    alone = torch.nn.Parameter(table.weight.detach().clone())
    a = train.MuonAdamW([
        dict(kind="adamw", params=[table.weight], decay=0.1, relative_eps=2.0, **numbers)])
    b = torch.optim.AdamW([alone], weight_decay=0.1, **numbers)
    ids = torch.tensor([0, 0, 0, 0, 1, 2, 3])
    for _ in range(30):
        weight = 1 + 0.1 * torch.randn(7, 1)
        (table(ids) * weight).sum().backward()
        alone.grad = torch.zeros(4, 3).index_add_(0, ids, weight.expand(7, 3))
        rms = b.state[alone]["exp_avg_sq"].mean().sqrt().item() if b.state else 0
        b.param_groups[0]["eps"] = 1e-10 + 2 * rms
        before = table.weight.detach().clone()
        a.step()
        b.step()
        a.zero_grad()
    torch.testing.assert_close(table.weight, alone)
    moved = (table.weight - before * (1 - 0.1 * 0.1)).abs().mean(dim=1)
    assert moved[0] > 2 * moved[1] > 0


@pytest.mark.parametrize("shape", [(2, 32, 32), (3, 64, 16), (1, 16, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_orthogonalize_keeps_the_singular_vectors_and_evens_the_values(shape, dtype):
    torch.manual_seed(0)
    g = 1e-4 * torch.randn(shape)           # as gradients are: in float16 they would lose digits
    o = train.orthogonalize(g, dtype)
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    values = torch.linalg.svdvals(o)
    assert o.dtype == g.dtype and values.min() > 0.6 and values.max() < 1.3
    polar = u @ v
    cosine = (o * polar).sum((-2, -1)) / o.norm(dim=(-2, -1)) / polar.norm(dim=(-2, -1))
    assert cosine.min() > 0.97


@pytest.mark.parametrize("rows,columns", [(12, 8), (8, 12)])
def test_muon_step_by_the_book(rows, columns):
    """One step of the formula, with the exact polar factor by an SVD instead of the iteration."""
    torch.manual_seed(0)
    p, g = torch.nn.Parameter(torch.randn(rows, columns)), torch.randn(rows, columns)
    old, p.grad = p.detach().clone(), g.clone()
    lr, momentum, beta2, decay = 0.1, 0.9, 0.95, 0.5
    group = dict(kind="muon", params=[p], lr=lr, momentum=momentum, beta2=beta2, decay=decay)
    train.MuonAdamW([group | dict(dtype=torch.float32)]).step()
    m = (1 - momentum) * g
    u, _, vh = torch.linalg.svd((1 - momentum) * g + momentum * m, full_matrices=False)
    o = u @ vh
    mean_square = (1 - beta2) * o.square().mean(dim=1 if rows >= columns else 0, keepdim=True)
    normed = o / mean_square.sqrt()
    o = normed * o.norm() / normed.norm() * max(1, rows / columns) ** 0.5
    expected = old - lr * (o + decay * old * (o * old >= 0))
    moved, wanted = p.detach() - old, expected - old
    assert (moved * wanted).sum() / moved.norm() / wanted.norm() > 0.98
    assert moved.norm() / wanted.norm() == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("changes", [{}, {"value_embed_every": 2, "depth": 3}])
def test_every_parameter_is_in_exactly_one_group(changes):
    model, h = small_model(**changes)
    optimizer = train.make_optimizer(model, h)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in model.parameters()}
    model.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="does not know extra"):
        train.make_optimizer(model, h)


def test_a_parameter_without_initialization_is_named():
    model, _ = small_model()
    model.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="extra"):
        model.init_weights()


def test_schedule_ends_where_it_should():
    model, h = small_model()
    optimizer = train.make_optimizer(model, h)
    h.warmdown, h.final_lr = 0.5, 0.1
    for progress, fraction in ((0, 1), (0.5, 1), (0.75, 0.55), (1, 0.1)):
        train.set_schedule(optimizer, h, 1000, progress)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(fraction * group["peak_lr"])
    muon = [group for group in optimizer.param_groups if group["kind"] == "muon"]
    assert [group["decay"] for group in muon] == [0, 0, 0]
