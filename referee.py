"""
The referee of a run: a process of its own beside train.py, which `import prepare` starts.

It alone has the texts, the clock and the journal. train.py's process gets training batches one by
one while the clock runs, and in evaluation it is shown token ids and gives back logits; the cross
entropy is computed here. Messages are lists, as lines of JSON over two pipes; tokens and logits
pass through memory-mapped files. Nothing that comes from train.py is ever unpickled or run.

No torch in here: the referee is up before train.py has imported its own.
"""

import ast
import base64
import hashlib
import itertools
import json
import math
import os
import platform
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left, insort
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from filelock import FileLock

# ------------------------------------------------------------------------------------------------
# Constants

COMPARABLE_BUDGET = 300     # seconds of training; runs of another length are marked as such
EXTRA_TIME = 300            # seconds that a run may take beside its budget, from start to finish
OVERRUN = 0.02              # fraction of the budget that training may run over, plus a step
ANSWER_TIME = 60            # seconds after which a message is late
POOL = 1024                 # documents from which the packing chooses
COPIES = 16                 # of the model in a verified run, fresh, each for a part of the text
COPY_TIME = 2               # seconds for loading a copy and its first call, beside the rest

# ------------------------------------------------------------------------------------------------
# Token shards: NAME.npy holds a shard's tokens (uint16, without BOS), NAME.offsets.npy where each
# of its documents starts and the last one ends

def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_shard(folder, name, entry):
    """
    The shard's tokens (uint16, memory-mapped) and document offsets (int64, one more than
    documents).

    Raises ValueError or OSError if the files are not what the manifest's `entry` says.
    """
    tokens = np.load(folder / f"{name}.npy", mmap_mode="r")
    offsets = np.load(folder / f"{name}.offsets.npy")
    if tokens.dtype != np.uint16 or not len(tokens) == entry["tokens"] == offsets[-1]:
        raise ValueError("its length is not the one in the manifest")
    if len(offsets) != entry["documents"] + 1:
        raise ValueError("its number of documents is not the one in the manifest")
    return tokens, offsets


def checked_shard(folder, name, entry):
    """
    open_shard(), after its tokens were checked against the sha256 in the manifest. Exits if they
    differ.
    """
    try:
        if file_sha256(folder / f"{name}.npy") == entry["sha256"]:
            return open_shard(folder, name, entry)
    except (OSError, ValueError):
        pass
    sys.exit(f"FAIL: {folder / name}.npy is corrupted; delete {folder} and run: uv run prepare.py")


def token_bytes(folder):
    """
    UTF-8 bytes of every token, int64 of shape (vocab_size,); 0 for BOS. Counted on the token's raw
    bytes: decoded to str, a token that is not valid UTF-8 would count three bytes for its
    replacement character.
    """
    lines = (folder / "tokenizer.b64").read_bytes().splitlines()
    return np.array([len(base64.b64decode(line)) for line in lines] + [0])

# ------------------------------------------------------------------------------------------------
# Packing: rows of exactly `capacity` tokens, each piece of a document after a BOS, nothing thrown
# away

def pack(documents, capacity, rng, pool_size=POOL):
    """
    Plan rows: lists of pieces (shard, start, count) whose tokens, with one BOS a piece, add up to
    `capacity`.

    documents: an iterator of (count, shard, start). A random document of a pool starts a row, the
    longest that fits comes next (best fit), and where none fits the longest is cut; its tail goes
    back to the pool. A single position that is left over is filled with a BOS. Ends when the
    documents do; what then does not fill a row is dropped.
    """
    pool = []
    while True:
        row, free, pick = [], capacity, None
        while free > 1:
            while len(pool) < pool_size and (document := next(documents, None)):
                insort(pool, document)
            if not pool:
                return
            count, shard, start = pool.pop(rng.randrange(len(pool)) if pick is None else pick)
            taken = min(count, free - 1)
            row.append((shard, start, taken))
            if taken < count:
                insort(pool, (count - taken, shard, start + taken))
            free -= taken + 1
            # the longest with count < free; or -1, the longest of all
            pick = bisect_left(pool, (free,)) - 1
        yield row


def shuffled_documents(offsets, seed):
    """
    (count, shard, start) of every document, epoch after epoch, each in a new order. offsets: an
    array per shard.
    """
    documents = np.concatenate([
        np.stack([np.diff(ends), np.full(len(ends) - 1, shard), ends[:-1]], axis=1)
        for shard, ends in enumerate(offsets)])
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(len(documents))
        for block in np.array_split(order, len(order) // POOL + 1):
            yield from map(tuple, documents[block].tolist())


def training_rows(tokens, offsets, bos, capacity, seed):
    """
    Return fill(rows): writes the next packed rows into an integer array of shape (rows, capacity).
    """
    # a small part of an epoch, so that epochs hardly mix
    pool_size = min(POOL, 1 + sum(map(len, offsets)) // 8)
    plan = pack(shuffled_documents(offsets, seed), capacity, random.Random(seed), pool_size)

    def fill(rows):
        rows[:, -1] = bos                               # stays where a single position is left over
        for row, pieces in zip(rows, plan):
            at = 0
            for shard, start, count in pieces:
                row[at] = bos
                row[at + 1:at + 1 + count] = tokens[shard][start:start + count]
                at += count + 1
    return fill

# ------------------------------------------------------------------------------------------------
# The metric, and the probes that it rests on

def cut_into_pieces(offsets, context):
    """
    Start and length, in tokens, of the pieces of at most `context` tokens that documents are
    evaluated in.
    """
    lengths = np.diff(offsets)
    # of pieces a document; none for an empty one
    number = -(-lengths // context)
    nth = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
    starts = np.repeat(offsets[:-1], number) + nth * context
    return starts, np.minimum(np.repeat(offsets[1:], number) - starts, context)


def row_widths(context):
    """
    The widths of rows in evaluation: a short piece does not fill a whole row, and a compiled model
    meets few shapes.
    """
    return np.unique([-(-context * quarter // 4) for quarter in (1, 2, 3, 4)])


def row_width(counts, context):
    """The width of the row in which a piece of that many tokens is evaluated."""
    widths = row_widths(context)
    return widths[np.searchsorted(widths, counts)]


def cross_entropy(logits, targets, pool, chunk=64):
    """
    -log softmax(logits)[target] for logits (N, vocab_size) in float16 or float32 and targets (N,):
    float32 (N,), in nats. In chunks that fit the processor's cache, on the threads of `pool`.
    """
    def losses(start):
        z = logits[start:start + chunk].astype(np.float32)
        z -= z.max(axis=1, keepdims=True)
        right = z[np.arange(len(z)), targets[start:start + chunk]]
        return np.log(np.exp(z, out=z).sum(axis=1)) - right

    # NaN and infinity are found in the result
    with np.errstate(invalid="ignore", over="ignore"):
        return np.concatenate(list(pool.map(losses, range(0, len(logits), chunk))))


class Exam:
    """
    All that a model is shown in evaluation, in an order drawn anew each time from the system's
    entropy.

    A view is a piece of text as a row of tokens: BOS, the tokens but the last, padding (BOS too).
    Every piece is shown once for the number. Among these views are the probes:
    - copies: a piece shown again, beside other rows and at another time. Its losses must not
      change.
    - prefixes: the first tokens of a piece and nothing after them. Its losses must be those of the
      whole piece: what comes later must not matter (causality). At its end there is nothing to read
      ahead, so a model that does so in the whole piece gives itself away, however well it picks its
      moments.

    With `parts` > 1 the views are dealt out to as many copies of the model, and a probe goes to
    another copy than its piece: no model can repeat there what it said here.
    """

    def __init__(self, texts, bos, context, positions, parts=1):
        """
        texts: a (tokens, offsets) for each split. positions: of a batch, about, padding included.
        """
        self.bos, self.context = bos, context
        self.tokens = np.concatenate([tokens for tokens, _ in texts]).astype(np.int32)
        cuts = [cut_into_pieces(offsets, context) for _, offsets in texts]
        bases = np.cumsum([0] + [len(tokens) for tokens, _ in texts])
        self.starts = np.concatenate([starts + base for (starts, _), base in zip(cuts, bases)])
        self.lengths = np.concatenate([lengths for _, lengths in cuts])
        self.split = np.repeat(np.arange(len(cuts)), [len(starts) for starts, _ in cuts])
        self.pieces = len(self.starts)

        secret = np.random.default_rng()
        # A prefix ends at one token, and finds a model out that reads ahead there: for a fraction f
        # of the tokens, a run of n prefixes misses it with a chance of (1 - f)^n. With 70 (a plain
        # run of sotu) 2.7% for f = 5%; with 1,024 13% for 0.2%.
        number = 1024 if parts > 1 else min(512, max(32, self.pieces // 32))
        whole = np.arange(self.pieces)
        copied = secret.integers(self.pieces, size=number // 3 + 1)
        cut = secret.choice(np.flatnonzero(self.lengths > 1), number)
        part = secret.permutation(self.pieces) % parts
        away = secret.integers(1, max(2, parts), size=len(copied) + number)
        part = np.concatenate([part, (part[np.concatenate([copied, cut])] + away) % parts])

        # cuts in every part of a row
        spread = (secret.permutation(number) + secret.random(number)) / number
        prefix = 1 + (spread * (self.lengths[cut] - 1)).astype(int)
        self.piece = np.concatenate([whole, copied, cut])
        # tokens that a view shows
        self.count = np.concatenate([self.lengths, self.lengths[copied], prefix])
        self.kind = np.repeat([0, 1, 2], [self.pieces, len(copied), number])
        self.parts = [
            self.batches_of(np.flatnonzero(part == n), positions, secret, fill=parts == 1)
            for n in range(parts)]
        self.copies, self.prefixes = (np.flatnonzero(self.kind == kind) for kind in (1, 2))

        order = np.concatenate([batch for batches in self.parts for batch in batches])
        self.turn = np.empty(len(order), dtype=int)                     # when a view is shown
        self.turn[order] = np.arange(len(order))
        # nats, by view and position
        self.nll = np.zeros((len(self.piece), context), dtype=np.float32)
        # whether logits ever differ between positions
        self.differs = False

    def batches_of(self, views, positions, secret, fill):
        """
        Batches of views whose rows have one width, in random order. If `fill`, further copies make
        each batch of a width the same size: a compiled model then meets no more shapes than there
        are widths.
        """
        batches = []
        widths = row_width(self.lengths[self.piece[views]], self.context)
        for width in np.unique(widths):
            group = secret.permutation(views[widths == width])
            # a copy should be in another batch than its piece
            rows = max(1, min(positions // width, len(group) // 8))
            if fill and len(group) % rows:
                more = secret.choice(self.piece[group], rows - len(group) % rows)
                new = len(self.piece) + np.arange(len(more))
                self.piece = np.concatenate([self.piece, more])
                self.count = np.concatenate([self.count, self.lengths[more]])
                self.kind = np.concatenate([self.kind, np.ones_like(more)])
                group = secret.permutation(np.concatenate([group, new]))
            batches += np.array_split(group, range(rows, len(group), rows))
        return [batches[i] for i in secret.permutation(len(batches))]

    def view(self, views):
        """
        What the model gets and what it is scored on: ids and targets, int32 (B, width); targets are
        -1 in padding.
        """
        pieces, counts = self.piece[views], self.count[views, None]
        position = np.arange(row_width(self.lengths[pieces], self.context).max())
        at = np.minimum(self.starts[pieces, None] + position, len(self.tokens) - 1)
        targets = np.where(position < counts, self.tokens[at], -1)
        ids = np.roll(targets, 1, axis=1)
        ids[:, 0] = self.bos
        # A full-width view would end with its last token unread; in padding, and behind a prefix,
        # there is BOS.
        ids[ids < 0] = self.bos
        ids = np.where(position < counts, ids, self.bos)
        return ids.astype(np.int32), targets.astype(np.int32)

    def take(self, views, losses, differs):
        """Keep a batch's losses, (B, width), 0 in padding. Exits if they are not finite."""
        if not np.isfinite(losses).all():
            sys.exit("FAIL: the logits hold NaN or infinity")
        self.differs |= bool(differs)
        self.nll[views, :losses.shape[1]] = losses

    def check(self):
        """
        The probes: compare the views of each piece. Exits, naming what failed, where, by how much.
        """
        if not self.differs:
            sys.exit("FAIL: the logits are the same at every position: the model does not look at its input")
        shown = np.arange(self.context) < self.count[:, None]
        moved = np.where(shown, self.nll - self.nll[self.piece], 0)
        # of the device, in nats
        noise = math.sqrt((moved[self.copies] ** 2).sum() / shown[self.copies].sum())
        most = np.abs(moved[self.copies]).max()
        self.check_independence(most, noise)
        self.check_causality(moved[self.prefixes], most, noise)

    def check_independence(self, most, noise):
        """
        A row's losses must not depend on the other rows of its batch, nor on what was shown before.
        """
        # On a CPU the two losses were the same bits (sotu, bfloat16); the rest is room for a GPU,
        # whose kernels may round differently from batch to batch: nothing to gain there. Dropout,
        # statistics of a batch, a cache: 0.1 and more.
        if most > 1 or noise > 0.01:
            sys.exit(f"FAIL: independence: the loss of a token moved by up to {most:.3g} nats when its row was shown again "
                     "beside other rows, at another time: information leaks between rows or batches (or dropout is on)")
        if len(self.parts) > 1:
            return
        # Five standard errors: a false alarm in three million runs. Catches a model that learns
        # from the text as it goes.
        each = self.nll[:self.pieces].sum(axis=1) / self.lengths
        late = self.turn[:self.pieces] > len(self.turn) // 2
        if not 16 < late.sum() < self.pieces - 16:
            return
        gain = each[~late].mean() - each[late].mean()
        if gain > 5 * each.std() * math.sqrt(1 / late.sum() + 1 / (~late).sum()):
            sys.exit(f"FAIL: independence: pieces shown late cost {gain:.3g} nats a token less than those shown early: "
                     "the model learns from the text that it is measured on")

    def check_causality(self, moved, most, noise):
        """
        A prefix must have the losses of its piece. moved: by how much it differs, (prefixes,
        context).
        """
        # Shapes and kernels are the same for both: what moves is the device's noise, which the
        # copies show (0 on a CPU). The largest of n such differences is hardly ever four times the
        # largest of n / 3; 2e-3 nats is 0.1% of a loss.
        leak = np.abs(moved).max()
        if leak > max(2e-3, 4 * most):
            view, position = np.unravel_index(np.abs(moved).argmax(), moved.shape)
            sys.exit(f"FAIL: causality: the loss at position {position} moved by {leak:.3g} nats when the text from position "
                     f"{self.count[self.prefixes[view]]} on was taken away (device noise {most:.1g}): the model reads ahead")
        # A leak may hide in noise made for it, but not in the mean: just before the cut, all losses
        # rise. Five standard errors at seven distances: a false alarm in half a million runs.
        for distance in range(1, min(8, self.context)):
            rows = np.flatnonzero(self.count[self.prefixes] >= distance)
            leak = moved[rows, self.count[self.prefixes[rows]] - distance].mean() if len(rows) else 0
            if leak > 1e-4 + 5 * noise / math.sqrt(max(1, len(rows))):
                sys.exit(f"FAIL: causality: the loss {distance} before the end of a prefix was {leak:.3g} nats higher on average "
                         "than in the whole text: the model reads ahead")

    def nats(self):
        """The sum of nats of each split."""
        return np.bincount(self.split, self.nll[:self.pieces].sum(axis=1, dtype=np.float64))

# ------------------------------------------------------------------------------------------------
# The journal: one line a run, whichever way it ends

UNFINISHED = "killed or crashed before it ended"


def append_line(path, line):
    """
    Append a dict as a JSON line in a single write under a lock, so that two runs at once do not
    mix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")), open(path, "a+b") as file:
        torn = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            # a line that a crash of the machine cut off
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def git(folder, *arguments):
    """What git prints, bytes; empty where there is no git or no repository."""
    if not shutil.which("git"):
        return b""
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True).stdout


def processor():
    """
    The processor in words. Two of them make different runs of one budget, so the journal tells them
    apart.
    """
    name, cpu = platform.processor() or platform.machine(), {}
    with suppress(OSError):
        for line in open("/proc/cpuinfo"):
            key, _, value = line.partition(":")
            cpu.setdefault(key.strip(), value.strip())
    if "model name" in cpu:
        name = cpu["model name"]
    # a cloud may give two generations one name
    if "cpu family" in cpu:
        name += f", family {cpu['cpu family']} model {cpu['model']}"
    return f"{name}, {os.cpu_count()} cores"


def first_statement(text):
    """
    The first statement of a program after its docstring, as text; empty for what is not Python.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return ""
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return ast.unparse(body[0]) if body else ""

# ------------------------------------------------------------------------------------------------
# The process

class Channel:
    """Messages, lists of plain data, as lines of JSON over two pipes (file descriptors)."""

    def __init__(self, reader, writer):
        self.reader, self.writer, self.inbox = reader, writer, queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        pending = b""
        with suppress(OSError):
            while chunk := os.read(self.reader, 1 << 16):
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    self.inbox.put(line)
        self.inbox.put(None)

    def send(self, *message):
        # a reader that is gone says so in receive()
        with suppress(OSError):
            os.write(self.writer, json.dumps(message).encode() + b"\n")

    def receive(self, timeout=ANSWER_TIME):
        """
        The next message; ["gone"] from the end of the pipe on, ["late"] after `timeout` seconds.
        """
        try:
            line = self.inbox.get(timeout=timeout)
        except queue.Empty:
            return ["late"]
        if line is None:
            self.inbox.put(None)
            return ["gone"]
        message = json.loads(line)
        return message if isinstance(message, list) and message else [message]


def shared_array(folder, dtype, shape):
    """
    A memory-mapped array in a new file of `folder`, and the file's path. The file is opened once,
    under a random name: train.py's process can write to the folder, and a link that it puts in the
    file's place leads the referee nowhere.
    """
    descriptor, path = tempfile.mkstemp(dir=folder)
    with os.fdopen(descriptor, "r+b") as file:
        file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "r+", shape=shape), path


class Referee:
    """
    One run as its referee sees it. Every message of train.py's process names a method in ANSWERS.

    settings: pid of the process to watch, cache, scratch (a folder shared with it), program, seed,
    budget; and for a verified run `sandbox`, the command to put before that of a copy of the model,
    empty where there is none.
    """
    ANSWERS = "sealed", "start", "warm", "next", "evaluate", "report", "fail"

    def __init__(self, settings, channel):
        self.settings, self.channel = settings, channel
        self.cache, self.scratch, self.budget = Path(settings["cache"]), settings["scratch"], settings["budget"]
        self.verified = "sandbox" in settings
        self.process = psutil.Process(settings["pid"])
        self.started = time.monotonic() - (time.time() - self.process.create_time())
        self.limit = self.budget + EXTRA_TIME * (2 if self.verified else 1)
        self.line, self.is_sealed, self.done = None, False, False
        # first_batch: the clock, monotonic seconds
        self.fill = self.first_batch = self.nats = None
        self.handed = self.tokens = 0                           # batches and tokens handed out
        self.pool = ThreadPoolExecutor(os.cpu_count())

    # -- the run

    def serve(self):
        """
        Answer until the run is over, then write its line. Whatever goes wrong is the run's failure,
        in a sentence.
        """
        try:
            while not self.done:
                word, *rest = self.hear(self.channel)
                if word not in self.ANSWERS:
                    break
                getattr(self, word)(*rest)
        except SystemExit as error:
            self.end(str(error))
            self.channel.send("fail", str(error))
        except Exception as error:
            self.end(f"FAIL: the referee stopped: {type(error).__name__}: {error}")
            raise
        finally:
            self.end(UNFINISHED)
            shutil.rmtree(self.scratch, ignore_errors=True)

    def end(self, failure):
        """Write the journal line, once."""
        if self.line and not self.done:
            if failure:
                self.line = {key: value for key, value in self.line.items() if key not in ("val_bpb", "test_bpb")}
            self.line |= {"failure": failure, "total_seconds": round(self.seconds(), 1)}
            append_line(self.cache / "journal.jsonl", self.line)
        self.done = True

    def seconds(self):
        """Seconds since the process was started."""
        return time.monotonic() - self.started

    def hear(self, channel):
        """The next message; past the hard limit everything ends."""
        while (message := channel.receive(1)) == ["late"]:
            # its own faulthandler should have ended it
            if self.seconds() > self.limit + 5:
                with suppress(psutil.NoSuchProcess):
                    for process in (self.process, *self.process.children(recursive=True)):
                        if process.pid != os.getpid():
                            process.kill()
                sys.exit(f"still running after the hard limit of {self.limit:.0f} s")
            # but a child of it may hold the pipe open
            if not self.is_alive():
                return channel.receive(1)
        if message == ["gone"] and self.seconds() > self.limit - 1:
            sys.exit(f"still running after the hard limit of {self.limit:.0f} s")
        return message

    def is_alive(self):
        """Whether the process has not ended."""
        try:
            return self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def cpu_seconds(self):
        """Processor seconds of the process and its children, those that have ended included."""
        total = 0
        with suppress(psutil.Error):
            for process in (self.process, *self.process.children(recursive=True)):
                if process.pid != os.getpid():
                    with suppress(psutil.Error):
                        # user, system, and of children that were waited for
                        total += sum(process.cpu_times()[:4])
        return total

    def sealed(self, yes):
        """Sent by `import prepare`, before any line of train.py."""
        self.is_sealed = bool(yes)

    def start(self, vocab_size, device, name, torch_version):
        """
        train.py has chosen its tokenizer. device: cpu, cuda or mps; name: of the GPU, if it has
        one.
        """
        if self.line:
            sys.exit("FAIL: a second Run; there is one a process")
        dataset = json.loads((self.cache / "dataset.json").read_bytes())
        self.folder = self.cache / dataset["name"] / f"vocab-{int(vocab_size)}"
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_bytes())
        except (OSError, ValueError):
            self.channel.send("missing", "manifest.json")
            return
        self.shards = [name for name in dataset["shards"] if name.startswith("train")]
        self.vocab_size, self.bos, self.context = vocab_size, vocab_size - 1, dataset["context"]
        self.accelerator = device != "cpu"
        for shard in (*dataset["shards"], "val", "test"):
            try:
                open_shard(self.folder, shard, self.manifest[shard])
            except (OSError, ValueError, KeyError):
                self.channel.send("missing", shard)
                return
        program, here = Path(self.settings["program"]), Path(__file__).parent
        text = program.read_bytes() if program.is_file() else b""
        changed = False
        for file in ("prepare.py", "referee.py", "seal.py"):
            committed = git(here, "show", f"HEAD:./{file}")
            changed |= bool(committed) and committed != (here / file).read_bytes()
        self.line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": git(here, "rev-parse", "--short", "HEAD").decode().strip(),
            # program.md is the human's, at any time
            "dirty": bool(git(here, "status", "--porcelain", "--untracked-files=no", ".", ":!program.md")),
            "train_sha256": hashlib.sha256(text).hexdigest() if text else None,
            "prepare_sha256": file_sha256(here / "prepare.py"),
            "referee_sha256": file_sha256(here / "referee.py"),
            "seal_sha256": file_sha256(here / "seal.py"),
            "prepare_changed": changed if git(here, "rev-parse", "HEAD") else None,
            "dataset": dataset["name"],
            "vocab_size": vocab_size,
            "context": self.context,
            "manifest_sha256": file_sha256(self.folder / "manifest.json"),
            "tokenizer_sha256": file_sha256(self.folder / "tokenizer.b64"),
            "val_text_sha256": self.manifest["val"]["text_sha256"],
            "test_text_sha256": self.manifest["test"]["text_sha256"],
            "val_bytes": self.manifest["val"]["bytes"],
            "device": name or f"{device} ({processor()})",
            "versions": {"python": platform.python_version(), "torch": torch_version},
            "seed": self.settings["seed"],
            "time_budget": self.budget,
            "sealed": self.is_sealed,
        }
        if self.verified:
            self.line |= {"verified": True, "isolated": bool(self.settings["sandbox"])}
        if self.is_sealed and first_statement(text) != "import prepare":
            sys.exit("FAIL: `import prepare` must be the first statement of train.py: from there on the text is sealed")
        self.channel.send("started", self.line["device"], self.line["prepare_changed"])

    # -- training

    def warm(self, seconds_per_token):
        """
        How long a training step took in warm-up, a token. Evaluation takes less; if that does not
        fit, say so now.
        """
        tokens = 0
        for name in ("val", "test"):
            offsets = np.load(self.folder / f"{name}.offsets.npy")
            _, lengths = cut_into_pieces(offsets, self.context)
            tokens += row_width(lengths, self.context).sum()
        room = EXTRA_TIME - self.seconds()
        if tokens * seconds_per_token > room:
            size = max(self.manifest["val"]["bytes"] * room / 2 / (tokens * seconds_per_token), 1000)
            sys.exit(f"FAIL: evaluating {tokens:,} tokens would take about {tokens * seconds_per_token:.0f} s here, and "
                     f"{room:.0f} s are left for it; run: uv run prepare.py --eval-bytes {size:.0f}")
        self.channel.send("fits")

    def next(self, rows, queued):
        """
        Hand out the next batch of that many rows, unless the time is over. queued: steps that the
        device is behind.
        """
        if self.nats is not None:
            sys.exit("FAIL: a training batch was asked for after the evaluation")
        if self.fill is None:
            shards = [checked_shard(self.folder, name, self.manifest[name]) for name in self.shards]
            self.fill = training_rows(*zip(*shards), self.bos, self.context + 1, self.settings["seed"])
            self.batch, self.batch_path = shared_array(self.scratch, np.int32, (rows, self.context + 1))
            self.packed = np.empty_like(self.batch)
            self.fill(self.packed)
            self.line |= {"startup_seconds": round(self.seconds(), 1), "startup_cpu_seconds": round(self.cpu_seconds(), 1)}
            self.first_batch = time.monotonic()
        if rows != len(self.batch):
            sys.exit("FAIL: the number of rows a batch has changed; it stays the same over a run")
        elapsed = time.monotonic() - self.first_batch if self.handed else 0.0
        if self.handed and elapsed + queued * elapsed / self.handed >= self.budget:
            self.channel.send("over", elapsed)
            return
        self.batch[:] = self.packed
        self.handed += 1
        self.tokens += rows * self.context
        self.channel.send("batch", elapsed, self.batch_path)
        # the next one, while train.py is at work on this
        self.fill(self.packed)

    # -- the number

    def evaluate(self, positions):
        """
        Show both texts to the model, `positions` tokens at once, and say what it is worth on the
        validation text.
        """
        if self.first_batch is None:
            sys.exit("FAIL: no training batch was taken before the evaluation")
        if self.nats is not None:
            sys.exit("FAIL: evaluated twice; a run has one evaluation")
        # 2% of the budget (of a short one: half a second) and one step
        training = time.monotonic() - self.first_batch
        allowed = self.budget + max(OVERRUN * self.budget, 0.5) + min(training / self.handed, 0.1 * self.budget)
        if self.verified:
            model = self.copied_model()
            training = max(training, time.monotonic() - self.first_batch - COPY_TIME)
        if training > allowed:
            sys.exit(f"FAIL: {training:.1f} s of training, where {allowed:.1f} s (budget, 2% and one step) are allowed")
        splits = "val", "test"
        texts = [checked_shard(self.folder, split, self.manifest[split]) for split in splits]
        for split, (tokens, _) in zip(splits, texts):
            if token_bytes(self.folder)[tokens].sum() != self.manifest[split]["bytes"]:
                sys.exit(f"FAIL: the bytes of the tokens in {self.folder} do not add up to those of the text")

        start = time.monotonic()
        positions = max(self.context, min(positions, 2 ** 28 // self.vocab_size))
        exam = Exam(texts, self.bos, self.context, positions, COPIES if self.verified else 1)
        if self.verified:
            with model:
                self.examine_copies(exam, positions, model.name)
        else:
            self.examine(self.channel, exam, exam.parts[0], positions, self.scratch)
        exam.check()
        self.nats = exam.nats()
        bpb = [nats / math.log(2) / self.manifest[split]["bytes"] for split, nats in zip(splits, self.nats)]
        self.line |= {"val_bpb": bpb[0], "test_bpb": bpb[1], "training_seconds": round(training, 1),
                      "evaluation_seconds": round(time.monotonic() - start, 1)}
        self.channel.send("result", bpb[0], training)           # the sealed number stays here

    def examine(self, channel, exam, batches, positions, folder):
        """
        Show batches of views through `channel` and keep their losses. Returns the seconds that were
        waited for logits. Logits come in pieces of at most `limit` positions, by turns into two
        halves of a shared array.
        """
        limit = min(positions, 2 ** 25 // self.vocab_size) if self.accelerator else positions
        ids_shared, ids_path = shared_array(folder, np.int32, positions)
        dtype = np.float16 if self.accelerator else np.float32
        logits, logits_path = shared_array(folder, dtype, (2, limit, self.vocab_size))
        channel.send("exam", ids_path, logits_path, positions, limit, str(logits.dtype))
        waited = 0
        for views in batches:
            ids, targets = exam.view(views)
            ids_shared[:ids.size] = ids.ravel()
            channel.send("show", *ids.shape)
            losses, differs, taken, targets = [], False, 0, targets.ravel()
            while taken < len(targets):
                start = time.monotonic()
                word, count = (*self.hear(channel), 0)[:2]
                waited += time.monotonic() - start
                if word == "fail":
                    sys.exit(str(count))
                if word != "logits" or not 0 < count <= min(limit, len(targets) - taken):
                    sys.exit("FAIL: the evaluation was broken off")
                piece = logits[len(losses) % 2, :count]
                differs |= (piece[0] != piece[-1]).any()
                losses.append(cross_entropy(piece, targets[taken:taken + count], self.pool))
                taken += count
                channel.send("taken")
            losses = np.concatenate(losses)
            losses[np.isfinite(losses) & (targets < 0)] = 0
            exam.take(views, losses.reshape(ids.shape), differs)
        return waited

    def copied_model(self):
        """The trained model, as a temporary file that train.py's process does not see."""
        descriptor, path = tempfile.mkstemp(dir=self.scratch)
        self.channel.send("copy", path)
        word, *rest = self.hear(self.channel)
        if word != "copied":
            sys.exit(str(rest[0]) if word == "fail" and rest else "FAIL: the evaluation was broken off")
        self.compiles = bool(rest[0])
        model = tempfile.NamedTemporaryFile()
        # the file that was opened, not a link in its place
        with open(descriptor, "rb") as source:
            shutil.copyfileobj(source, model)
        model.flush()
        return model

    def examine_copies(self, exam, positions, model):
        """
        Show each part of the text to a fresh copy of the model (a file), in a sandbox of its own:
        nothing that was shown before can help it. A copy that takes much longer than a forward pass
        does something else, such as training on.
        """
        with tempfile.TemporaryDirectory() as folder:
            folders = [tempfile.mkdtemp(dir=folder) for _ in exam.parts]
            copies, channels = [], []
            for n, batches in enumerate(exam.parts):
                # two start at once, but none while another is timed
                if n == len(copies):
                    copies += [self.start_copy(each, model) for each in folders[n:n + 2]]
                    channels += [self.ready(copy) for copy in copies[n:]]
                try:
                    seconds = self.examine_copy(channels[n], exam, batches, positions, folders[n], model)
                finally:
                    copies[n].kill()
                    copies[n].wait()
                tokens = sum(exam.view(views)[0].size for views in batches)
                # 2% of the budget is what training may run over; a forward pass takes less than a
                # training step.
                allowed = COPY_TIME + OVERRUN * self.budget + min(tokens / self.tokens, OVERRUN) * self.budget
                if seconds > allowed:
                    sys.exit(f"FAIL: a copy of the model took {seconds:.1f} s for its part of the text, where {allowed:.1f} s "
                             "are allowed: what else does it do?")

    def examine_copy(self, channel, exam, batches, positions, folder, model):
        """Have a copy load the model and show it its part. Returns the seconds that it took."""
        start = time.monotonic()
        channel.send("load", model, self.vocab_size)
        word, *rest = self.hear(channel)
        if word != "loaded":
            sys.exit(str(rest[0]) if rest else "FAIL: a copy of the model could not be loaded, see above")
        seconds = time.monotonic() - start
        return seconds + self.examine(channel, exam, batches, positions, folder)

    def start_copy(self, folder, model):
        """The process of a copy, which sees `folder` and the file `model`."""
        program = str(Path(__file__).with_name("verify.py"))
        command = [sys.executable, program, "--copy", folder, str(int(self.compiles))]
        if self.settings["sandbox"]:
            bound = ["--bind", folder, folder, "--ro-bind", model, model, "--"]
            command = [*self.settings["sandbox"], *bound, *command]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ready(self, copy):
        """The channel to a copy, which is ready to load the model."""
        channel = Channel(copy.stdout.fileno(), copy.stdin.fileno())
        if self.hear(channel) != ["ready"]:
            sys.exit("FAIL: a copy of the model could not be started, see above")
        return channel

    # -- the end

    def report(self, numbers):
        """
        The run is over, and has its number. numbers: what only train.py's process knows, by its own
        account.
        """
        if self.nats is None:
            sys.exit("FAIL: report without evaluate_bpb")
        known = ("num_steps", "peak_vram_mb", "mfu_percent", "num_params", "depth", "reseeded")
        self.line |= {"total_tokens": self.tokens} | {key: numbers.get(key) for key in known}
        self.end(None)
        told = "startup_seconds", "evaluation_seconds", "total_seconds", "sealed"
        self.channel.send("written", {key: self.line[key] for key in told})

    def fail(self, sentence):
        """train.py's process ends by itself, without a number."""
        self.end(str(sentence) or UNFINISHED)


def main():
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):                # they are meant for the run
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    Referee(json.loads(sys.argv[1]), Channel(0, 1)).serve()


if __name__ == "__main__":
    main()
