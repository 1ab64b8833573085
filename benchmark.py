"""
What this machine can do, and what a run makes of it.

    uv run benchmark.py                 # minutes; let nothing else run beside it
    uv run benchmark.py --grid          # and how cost grows with the shape of the model
    uv run benchmark.py --counts        # instead, what a step on CUDA costs; needs no GPU

Times of a step are medians, peaks the best of several; ratios are of figures from the same run.
"""

import argparse
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stdout
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import machine
import prepare
import referee
import train


def recipe(dataset):
    """The hyperparameters that train.py takes for a dataset."""
    h = SimpleNamespace(**train.RECIPES[dataset.recipe])
    h.vocab_size = h.vocab_size or dataset.vocab_size
    return h

# ------------------------------------------------------------------------------------------------
# Timings

def median_seconds(function, times=9):
    function()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak(device, dtype):
    """The best of three measurements, FLOP/s."""
    return max(machine.measured_peak(device, dtype) for _ in range(3))


def loader_tokens_per_second(context):
    """Packing rows on one core, from 20 million tokens in documents of 600 on average."""
    rng = np.random.default_rng(0)
    lengths = rng.geometric(1 / 600, 20_000_000 // 600)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(0, 8000, offsets[-1]).astype(np.uint16)
    fill = referee.training_rows([tokens], [offsets], 8191, context + 1, 0)
    rows = np.empty((2 ** 17 // context, context + 1), dtype=np.int64)
    return rows.size / median_seconds(lambda: fill(rows), 60)


def tokenizer_bytes_per_second(folder):
    tokenizer = prepare.load_tokenizer(folder)
    tokens = np.load(folder / "val.npy")
    text = tokenizer.decode(tokens.tolist())

    def encode():
        tokenizer.encode_to_numpy(text, disallowed_special=())

    return len(text.encode()) / median_seconds(encode, 3)


class Step:
    """A training step on made-up tokens, timed in its parts."""

    def __init__(self, h, context, device):
        torch.manual_seed(0)
        self.h, self.context, self.device = h, context, device
        self.model, self.optimizer = train.build(h, context, device)
        self.ids = torch.randint(0, h.vocab_size - 1, (h.device_batch_size, context), device=device)

    def seconds(self, times=15):
        """Medians of forward, backward and optimizer, seconds."""
        parts = []
        for _ in range(times + 3):
            marks = [self.now()]
            loss = self.model(self.ids, self.ids)
            marks.append(self.now())
            loss.backward()
            marks.append(self.now())
            self.optimizer.step()
            self.optimizer.zero_grad()
            marks.append(self.now())
            parts.append(np.diff(marks))
        return np.median(parts[3:], axis=0)

    def now(self):
        machine.synchronize(self.device)
        return time.perf_counter()

    def speed(self):
        """Tokens/s and FLOP/s."""
        tokens = self.ids.numel() / self.seconds().sum()
        return tokens, tokens * self.model.flops_per_token(self.context)


def fractions(step, seconds=60):
    """Of the training time: model and optimizer, waiting for batches, logging."""
    prepare.TIME_BUDGET = seconds
    run = prepare.Run(step.h.vocab_size)
    spent = {"training": 0.0, "loader": 0.0, "logging": 0.0}
    mark = step.now()

    def lap(name):
        nonlocal mark
        now = step.now()
        spent[name] += now - mark
        mark = now

    for number, (x, y) in enumerate(run.batches(step.h.device_batch_size)):
        if number == 0:
            mark = step.now()                       # what came before is startup
        lap("loader")
        if step.model.ngrams is not None:
            step.model.ngrams.watch(x, y, run.epoch, run.progress)
        loss = step.model(x, y)
        loss.backward()
        train.set_schedule(step.optimizer, step.h, number, run.progress)
        step.optimizer.step()
        step.optimizer.zero_grad()
        lap("training")
        run.log(number, loss)
        lap("logging")
    run.channel.send("fail", "benchmark.py: no number")
    return {name: each / sum(spent.values()) for name, each in spent.items()}


def real_run(budget, **environment):
    """train.py as a child: seconds of startup and of evaluation."""
    environment = os.environ | {"AUTORESEARCH_TIME_BUDGET": str(budget)} | environment
    result = subprocess.run([sys.executable, "train.py"], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = result.stdout
    summary = dict(re.findall(r"^(\w+): +(\S+)", text, re.M))
    if "val_bpb" not in summary:
        sys.exit(f"train.py gave no number:\n{text}")
    return float(summary["startup_seconds"]), float(summary["evaluation_seconds"])


def grid(h, device, float32):
    """Tokens/s and MFU over shapes: one thing changed at a time."""
    print("\nhow cost grows, 4,096 tokens a step (percent of the float32 peak)")
    shapes = dict(width=(128, 256, 512), depth=(2, 4, 8), context=(128, 512, 2048),
                  vocab_size=(1024, 2048, 4096, 8192))
    for name, values in shapes.items():
        for value in values:
            changed = SimpleNamespace(**vars(h) | {"context": 256, name: value})
            changed.device_batch_size = 4096 // changed.context
            with redirect_stdout(None):                 # the attention is the same each time
                tokens, flops = Step(changed, changed.context, device).speed()
            mfu = f"{100 * flops / float32:.0f}%"
            print(f"  {name + ' ' + str(value):<16}{tokens:>10,.0f} tokens/s {mfu:>6}", flush=True)


# ------------------------------------------------------------------------------------------------
# Counts: kernels that a step on CUDA launches, and bytes that they read and write

NO_KERNEL = "empty", "empty_strided", "is_pinned", "detach", "device"


class Counter(TorchDispatchMode):
    """
    Counts a kernel for each operation that runs eager, and for each group of operations that
    torch's compiler fuses; its bytes are those of all inputs and outputs. On fake CPU tensors, so
    it is the fusion for a CPU that is counted.
    """

    def __init__(self):
        super().__init__()
        self.kernels = self.bytes = 0
        self.compiled = False           # whether it is a compiled graph that runs

    @classmethod
    def is_infra_mode(cls):
        return True                     # torch compiles nothing inside other modes

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function.__name__.split(".")[0]
        if not (self.compiled or function.is_view or name in NO_KERNEL):
            self.kernels += 1
            for x in tree_leaves((arguments, options, result)):
                if isinstance(x, torch.Tensor):
                    self.bytes += x.numel() * x.element_size()
        return result

    def compile(self, function):
        """The function, compiled into graphs that count themselves when they are called."""
        from torch._inductor.compile_fx import compile_fx

        def backend(graph, inputs):
            return compile_fx(graph, inputs, inner_compile=self.counting)
        return torch.compile(function, dynamic=False, backend=backend)

    def counting(self, graph, inputs, is_inference=False, is_backward=False, **_):
        """For the compiler's last stage: fuse and count, but leave the graph as it is."""
        from torch._functorch.aot_autograd import make_boxed_func
        from torch._guards import detect_fake_mode
        from torch._inductor.compile_fx import record_original_output_strides
        from torch._inductor.debug import DebugContext
        from torch._inductor.graph import GraphLowering
        from torch._inductor.virtualized import V

        record_original_output_strides(graph)
        lowered = GraphLowering(graph, is_inference=is_inference, is_backward=is_backward)
        with (unset_fake_temporarily(), V.set_fake_mode(detect_fake_mode(inputs)),
              V.set_debug_handler(DebugContext()), V.set_graph_handler(lowered),
              V.set_extern_kernel_nodes([])):
            lowered.run(*inputs)
            lowered._update_scheduler()
            nodes = lowered.scheduler.nodes
            bytes_moved = sum(node.get_read_write_buffers_sizes() for node in nodes)

        def call(*arguments):
            self.kernels += len(nodes)
            self.bytes += bytes_moved
            self.compiled = True
            try:
                return graph(*arguments)
            finally:
                self.compiled = False
        return make_boxed_func(call)


@contextmanager
def as_on_cuda(counter):
    """train.py as a module that compiles and computes, on fake CPU tensors, as on CUDA."""
    spec = importlib.util.spec_from_file_location("train_on_cuda", train.__file__)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    with patch.object(machine, "default_device", lambda: torch.device("cuda")):
        spec.loader.exec_module(module)     # its decorators ask for the device

    def look_up(table, ids, dtype):
        return F.embedding(ids, table.weight.to(dtype))

    with (FakeTensorMode(), patch.object(machine, "start_compiler", counter.compile),
          patch.dict(machine.CHUNK_LOGITS, cpu=machine.CHUNK_LOGITS["cuda"]),
          patch.object(module, "look_up", look_up)):
        yield module


def counts(name, **changes):
    """
    (kernels, bytes) of a step of a recipe by part, and of showing 65,536 tokens for val_bpb.
    changes: hyperparameters that replace the recipe's.
    """
    dataset = prepare.DATASETS[name]
    h, context = recipe(dataset), dataset.context
    vars(h).update(changes)
    counter, found = Counter(), {}

    def part(name, function, *arguments):
        counter.kernels = counter.bytes = 0
        with counter:
            result = function(*arguments)
        found[name] = counter.kernels, counter.bytes
        return result

    with as_on_cuda(counter) as module:
        model = module.GPT(h, context, torch.bfloat16, machine.varlen, True)
        optimizer = module.make_optimizer(model, h)
        ids = torch.zeros(h.device_batch_size, context, dtype=torch.int64)
        for _ in range(2):              # the first one also makes gradients and states
            loss = part("forward", model, ids, ids)
            part("backward", loss.backward)
            part("optimizer", optimizer.step)
        with torch.no_grad():
            part("evaluation", model.eval(), ids.new_zeros(2**16 // context, context))
    return found


def print_counts():
    for name in "climbmix", "tinystories":
        dataset = prepare.DATASETS[name]
        tokens = recipe(dataset).device_batch_size * dataset.context
        print(f"{name}, {tokens:,} tokens in bfloat16")
        for part, (kernels, bytes_moved) in counts(name).items():
            print(f"  {part:<12}{kernels:>6} kernels {bytes_moved / 1e9:>8.2f} GB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--grid", action="store_true", help="also the table of shapes")
    parser.add_argument("--counts", action="store_true", help="only the counts of a step on CUDA")
    arguments = parser.parse_args()
    if arguments.counts:
        return print_counts()
    machine.keep_freed_memory()         # as in a run
    dataset, device = prepare.chosen_dataset(), prepare.default_device()
    h = recipe(dataset)
    dtype = machine.compute_dtype(device)

    float32, compute = peak(device, torch.float32), peak(device, dtype)
    print(f"peak of matmuls      {float32 / 1e9:,.0f} GFLOP/s in float32, "
          f"{compute / 1e9:,.0f} in {dtype}")
    step = Step(h, dataset.context, device)
    seconds = step.seconds()
    forward, backward, optimizer = seconds / seconds.sum()
    tokens = step.ids.numel() / seconds.sum()
    flops = tokens * step.model.flops_per_token(dataset.context)
    print(f"training step        {1000 * seconds.sum():.0f} ms: forward {forward:.0%}, "
          f"backward {backward:.0%}, optimizer {optimizer:.0%}")
    print(f"  {tokens:,.0f} tokens/s, {flops / 1e9:,.0f} GFLOP/s: MFU {flops / float32:.0%} "
          f"of the float32 peak, {flops / compute:.0%} of the {dtype} peak")

    split = fractions(step)
    for context in 2048, 256:
        speed = loader_tokens_per_second(context)
        print(f"loader, context {context:<5}{speed / 1e6:.0f}M tokens/s on one core, "
              f"{speed / tokens:,.0f} times what training takes")
    folder = prepare.folder_of(dataset, h.vocab_size)
    print(f"tokenizer            {tokenizer_bytes_per_second(folder) / 1e6:.1f} MB/s on one core")

    with tempfile.TemporaryDirectory() as empty:        # torch keeps compiled headers in TMPDIR
        cold, _ = real_run(5, TORCHINDUCTOR_CACHE_DIR=empty, TMPDIR=empty)
    warm, evaluation = real_run(5)
    print(f"startup              {cold:.0f} s with a cold compile cache, {warm:.0f} s warm")
    print(f"evaluation           {evaluation:.0f} s, validation and sealed test together")
    parts = [f"{300 * fraction:.1f} s {name}" for name, fraction in split.items()]
    print(f"of 300 s             {', '.join(parts)}")
    if arguments.grid:
        grid(h, device, float32)


if __name__ == "__main__":
    main()
