"""What a card would have to do, counted without one: kernels, bytes and memory of a step."""

from functools import cache

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import benchmark
import machine
import prepare
import referee
import train
from children import LONG


@cache
def counts(name):
    if name == "climbmix" and not LONG:
        pytest.skip("takes half a minute: AUTORESEARCH_LONG_TESTS=1 runs it")
    with torch.compiler.set_stance("default"):
        # Of climbmix's nine blocks five, one of each kind, to save time.
        return benchmark.counts(name, **{"depth": 5} if name == "climbmix" else {})


@pytest.mark.parametrize("name,part,kernels,gigabytes", [
    ("climbmix", "forward", 244, 70.7),
    ("climbmix", "backward", 219, 72.0),
    ("climbmix", "optimizer", 78, 3.26),
    ("tinystories", "forward", 124, 2.58),
    ("tinystories", "backward", 173, 3.0),
    ("tinystories", "optimizer", 78, 0.44)])
def test_a_step_on_cuda_does_not_get_more_expensive(name, part, kernels, gigabytes):
    found, bytes_moved = counts(name)[part]
    assert 0.8 * kernels < found <= kernels and 0.8 * gigabytes < bytes_moved / 1e9 <= gigabytes


def test_a_kernel_is_an_operation_or_a_group_that_is_fused():
    """By hand: 4 x 1,000 floats; three operations one by one, then as one kernel."""
    def function(x):
        return (x + 1).relu() * 2

    with torch.compiler.set_stance("default"), FakeTensorMode():
        x = torch.zeros(1000)
        eager, compiled = benchmark.Counter(), benchmark.Counter()
        with eager:
            function(x)
        fused = compiled.compile(function)
        with compiled:
            fused(x)
            fused(x)
    assert (eager.kernels, eager.bytes) == (3, 3 * 2 * 4000)
    assert (compiled.kernels, compiled.bytes) == (2, 2 * 2 * 4000)


# GB/s of memory and dense TFLOP/s of the dtype that is used, from the data sheets.
CARDS = {
    "NVIDIA L4": ("climbmix", 300, 121), "RTX 4060 Ti 16GB": ("climbmix", 288, 44),
    "RTX 2000 Ada": ("climbmix", 224, 48), "NVIDIA A2": ("climbmix", 200, 18),
    "Tesla T4": ("tinystories", 320, 65), "GTX 1650": ("tinystories", 128, 3),
    "Apple M1": ("tinystories", 68, 2.6)}


def positions_shown(name, kind):
    """Positions of both texts at EVAL_BYTES, four bytes a token, documents of many lengths."""
    context, room = prepare.DATASETS[name].context, prepare.EVAL_BYTES[name][kind]
    mean = {"climbmix": 800, "tinystories": 180}[name]
    lengths = np.random.default_rng(0).lognormal(np.log(mean), 0.8, 10**5).astype(int) + 1
    lengths = lengths[np.cumsum(4 * lengths + context) <= room]
    _, pieces = referee.cut_into_pieces(np.concatenate([[0], np.cumsum(lengths)]), context)
    return 2 * referee.row_width(pieces, context).sum()


@pytest.mark.parametrize("card", CARDS)
def test_the_evaluation_fits_every_card(card):
    """
    At a third of the bandwidth, which an H100 reached, and half of the FLOP/s, and with two slow
    cores for the cross entropy, 12 us a position on an EPYC (Zen 4). There are 300 s for it, less
    a minute of start-up.
    """
    name, bandwidth, tflops = CARDS[card]
    positions = positions_shown(name, "mps" if card == "Apple M1" else "small cuda")
    bytes_moved = counts(name)["evaluation"][1] * (9 / 5 if name == "climbmix" else 1)
    with torch.device("meta"):
        dataset = prepare.DATASETS[name]
        h, context = benchmark.recipe(dataset), dataset.context
        flops = train.GPT(h, context, torch.bfloat16).flops_per_token(context) / 3
    seconds = positions * (bytes_moved / 2**16 / (1e9 / 3 * bandwidth) + flops / (5e11 * tflops)
                           + 12e-6)
    print(f"{card}: {name}, {positions / 1e6:.1f}M positions, {seconds:.0f} s")
    assert 5 < seconds < 70


@pytest.mark.parametrize("name", ["climbmix", "tinystories"])
def test_the_evaluation_takes_a_quarter_of_free_memory_at_most(name, monkeypatch):
    """On fake CUDA tensors: a card with 3 GiB free."""
    free, device = 3 * 2**30, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 4 * 2**30))
    dataset = prepare.DATASETS[name]
    h, context = benchmark.recipe(dataset), dataset.context
    rows = machine.evaluation_positions(device, h.vocab_size) // context
    tracker = MemTracker()
    with FakeTensorMode(), torch.no_grad():
        with device:
            model = train.GPT(h, context, torch.bfloat16, machine.varlen, True).eval()
            ids = torch.zeros(rows, context, dtype=torch.int64)
        with tracker:
            model(ids)
    peak = tracker.get_tracker_snapshot("peak")[device]
    activations = sum(size for kind, size in peak.items() if getattr(kind, "name", "") == "ACT")
    assert 4 * rows * context * h.vocab_size < activations < free / 4
