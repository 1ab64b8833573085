"""
What this machine can do, and what a run makes of it. Apart from the tests, since nothing here passes or fails.

    uv run benchmark.py                 # about ten minutes; let nothing else run beside it
    uv run benchmark.py --grid          # how cost grows with width, depth, context and vocabulary, some minutes more

Timings are medians; ratios are of figures measured in the same run.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout

import numpy as np
import torch

import prepare
import referee
import train


def median_seconds(function, times=9):
    function()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak(device, dtype):
    """The better of three measurements, FLOP/s."""
    return max(train.measured_peak(device, dtype) for _ in range(3))


def loader_tokens_per_second(context, mean_document):
    """Of packing and filling rows on one core, from documents of that mean length (geometric) over 20 million tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.geometric(1 / mean_document, 20_000_000 // mean_document)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(0, 8000, offsets[-1]).astype(np.uint16)
    fill = referee.training_rows([tokens], [offsets], 8191, context + 1, 0)
    rows = np.empty((2 ** 17 // context, context + 1), dtype=np.int64)
    return rows.size / median_seconds(lambda: fill(rows), 60)


def tokenizer_bytes_per_second(folder):
    tokenizer = prepare.load_tokenizer(folder)
    tokens = np.load(folder / "val.npy")
    text = tokenizer.decode(tokens.tolist())
    return len(text.encode()) / median_seconds(lambda: tokenizer.encode_to_numpy(text, disallowed_special=()), 3)


class Step:
    """A training step on made-up tokens, timed in its parts."""

    def __init__(self, h, context, device):
        torch.manual_seed(0)
        self.h, self.context, self.device = h, context, device
        self.model, self.optimizer = train.build(h, context, device)
        self.ids = torch.randint(0, h.vocab_size - 1, (h.device_rows, context), device=device)

    def seconds(self, times=15):
        """Medians of forward, backward and optimizer, seconds."""
        parts = []
        for _ in range(times + 3):
            marks = [time.perf_counter()]
            loss = self.model(self.ids, self.ids)
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.device.type != "cpu":
                getattr(torch, self.device.type).synchronize()
            marks.append(time.perf_counter())
            parts.append(np.diff(marks))
        return np.median(parts[3:], axis=0)

    def speed(self):
        """Tokens/s and FLOP/s."""
        tokens = self.ids.numel() / self.seconds().sum()
        return tokens, tokens * self.model.flops_per_token(self.context)


def shares(step, seconds=60):
    """Of the training time, the shares of the model and its optimizer, of waiting for batches, and of logging."""
    prepare.TIME_BUDGET = seconds
    run, spent, mark = prepare.Run(step.h.vocab_size), dict.fromkeys(("training", "loader", "logging"), 0.0), time.perf_counter()

    def lap(name):
        nonlocal mark
        now = time.perf_counter()
        spent[name] += now - mark
        mark = now

    for number, (x, y) in enumerate(run.batches(step.h.device_rows)):
        if number == 0:
            mark = time.perf_counter()              # what came before the first batch is start-up
        lap("loader")
        loss = step.model(x, y)
        loss.backward()
        train.schedule(step.optimizer, step.h, number, run.progress)
        step.optimizer.step()
        step.optimizer.zero_grad()
        lap("training")
        run.log(number, loss)
        lap("logging")
    return {name: each / sum(spent.values()) for name, each in spent.items()}


def real_run(budget, **environment):
    """train.py as a child: its summary and the seconds to the clock's start, for training and for evaluation."""
    environment = os.environ | {"AUTORESEARCH_TIME_BUDGET": str(budget)} | environment
    text = subprocess.run([sys.executable, "train.py"], env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT).stdout
    summary = dict(re.findall(r"^(\w+): +(\S+)", text, re.M))
    if "val_bpb" not in summary:
        sys.exit(f"train.py gave no number:\n{text}")
    startup = float(summary["startup_seconds"])
    return startup, float(summary["total_seconds"]) - float(summary["training_seconds"]) - startup


def grid(h, device, float32):
    """Tokens/s and MFU over shapes: one thing changed at a time."""
    print("\nhow cost grows, 4,096 tokens a step (percent of the float32 peak)")
    base = dict(width=h.width, depth=h.depth, context=256, vocab_size=h.vocab_size)
    for name, values in dict(width=(128, 256, 512), depth=(2, 4, 8), context=(128, 512, 2048),
                             vocab_size=(1024, 2048, 4096, 8192)).items():
        for value in values:
            shape = base | {name: value}
            changed = argparse.Namespace(**vars(h) | {key: shape[key] for key in ("width", "depth", "vocab_size")})
            changed.device_rows = 4096 // shape["context"]
            with redirect_stdout(None):                 # what train.py says of its attention is the same each time
                tokens, flops = Step(changed, shape["context"], device).speed()
            print(f"  {name + ' ' + str(value):<16}{tokens:>10,.0f} tokens/s {100 * flops / float32:5.0f}%", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--grid", action="store_true", help="also the table of shapes")
    arguments = parser.parse_args()
    dataset, device = prepare.chosen_dataset(), prepare.default_device()
    h = train.hyperparameters(dataset.recipe)
    dtype = train.compute_dtype(device)

    float32, compute = peak(device, torch.float32), peak(device, dtype)
    print(f"peak of products     {float32 / 1e9:,.0f} GFLOP/s in float32, {compute / 1e9:,.0f} in {dtype}")
    step = Step(h, dataset.context, device)
    parts = step.seconds()
    tokens = step.ids.numel() / parts.sum()
    flops = tokens * step.model.flops_per_token(dataset.context)
    print(f"training step        {1000 * parts.sum():.0f} ms: forward {parts[0] / parts.sum():.0%}, "
          f"backward {parts[1] / parts.sum():.0%}, optimizer {parts[2] / parts.sum():.0%}")
    print(f"  {tokens:,.0f} tokens/s, {flops / 1e9:,.0f} GFLOP/s: MFU {flops / float32:.0%} of the float32 peak, "
          f"{flops / compute:.0%} of the {dtype} peak")

    split = shares(step)
    for context, mean in ((2048, 600), (256, 600)):
        speed = loader_tokens_per_second(context, mean)
        print(f"loader, context {context:<5}{speed / 1e6:.0f}M tokens/s on one core, {speed / tokens:,.0f} times what training takes")
    folder = prepare.folder_of(dataset, h.vocab_size)
    print(f"tokenizer            {tokenizer_bytes_per_second(folder) / 1e6:.1f} MB/s on one core")

    with tempfile.TemporaryDirectory() as compilations:
        cold, _ = real_run(5, TORCHINDUCTOR_CACHE_DIR=compilations, TMPDIR=compilations)     # torch keeps its header in TMPDIR
    warm, evaluation = real_run(5)
    print(f"start-up             {cold:.0f} s with a cold compile cache, {warm:.0f} s warm")
    print(f"evaluation           {evaluation:.0f} s, validation and sealed test together")
    print("of 300 s             " + ", ".join(f"{300 * share:.1f} s {name}" for name, share in split.items()))
    if arguments.grid:
        grid(h, device, float32)


if __name__ == "__main__":
    main()
