"""
What a run leaves behind besides its journal line: curves, which can be watched while it goes on,
and the model, if it is the best of its machine so far. Both are in the cache, where the seal hides
them from train.py. The referee writes them, and no run fails because of them.

    uv run tensorboard --logdir ~/.cache/autoresearch/curves
"""

import json
import math
import os
import queue
import re
import shutil
import stat
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

INTERVAL = 3            # seconds between two points of a curve
NO_CURVES = 5           # a run of fewer seconds has none
MODELS = 5              # kept at most: the best of each text and machine, then the newest
MODELS_BYTES = 4 * 2**30            # that their weights take at most

# ------------------------------------------------------------------------------------------------
# Curves

def folder_name(line, description):
    """The name of a run in TensorBoard: when, commit, seed, and the subject of the commit."""
    when = time.strftime("%b%d-%H%M").lower()
    words = "-".join(re.findall(r"\w+", description))[:50]
    name = f"{when} {line['commit'] or 'no-commit'} seed {line['seed']} {words}".strip()
    return name if not line.get("wave") else f"{name} {line['run'][:6]}"


class Curves:
    """
    TensorBoard events, written by a thread of its own: no disk, however slow, holds up the run.

    add() may be called before the thread has imported TensorBoard, and after it has failed.
    """

    def __init__(self, folder):
        self.folder, self.points = folder, queue.SimpleQueue()
        self.thread = threading.Thread(target=self.write, daemon=True)
        self.thread.start()

    def write(self):
        with suppress(Exception):           # a full disk, no permission, a damaged installation
            from tensorboard.summary import Writer
            self.folder.mkdir(parents=True, exist_ok=True)
            writer = Writer(str(self.folder))
            while (point := self.points.get()) is not None:
                step, values, description = point
                for name, value in values.items():
                    writer.add_scalar(name, value, step, description=description)
                writer.flush()
            writer.close()

    def add(self, step, values, description=None):
        """values: {name: number}. description: of these curves, in Markdown."""
        self.points.put((step, values, description))

    def close(self):
        self.points.put(None)
        self.thread.join(5)


def read_curves(folder):
    """{name: [(step, value), ...]} of the curves of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})    # all, not a sample
    events.Reload()
    return {name: [(event.step, make_ndarray(event.tensor_proto).item())
                   for event in events.Tensors(name)] for name in events.Tags()["tensors"]}


def quarters(losses):
    """
    The training loss at a quarter, a half, three quarters and the end of a run; [] without points.

    losses: (progress from 0 to 1, loss) in order.
    """
    found = []
    for quarter in (0.25, 0.5, 0.75, 1):
        until = [loss for progress, loss in losses if progress <= quarter]
        found += [round(until[-1], 4)] if until else []
    return found if len(found) == 4 else []


def last_kept(folder, journal, line):
    """
    The journal line of the commit that results.tsv in `folder` has kept last, as it ran on the
    machine, budget and text of `line`, on the same seed if it did; None if there is none.
    """
    with suppress(OSError, ValueError):
        rows = [row.split("\t") for row in (folder / "results.tsv").read_text("utf-8").splitlines()]
        # Not the kept commit's half of a pair, whose row may follow the idea that was kept.
        kept = [row[0] for row in rows
                if len(row) == 5 and row[3] == "keep"
                and not row[4].startswith(("again, seed", "again seed"))]
        if not kept:
            return None
        found = None
        for text in journal.read_text("utf-8").splitlines():
            with suppress(ValueError, AttributeError, KeyError, TypeError, RecursionError):
                other = json.loads(text)
                same = all(other.get(key) == line[key]
                           for key in ("device", "time_budget", "dataset", "val_text_sha256"))
                commit = not other.get("dirty") and other["commit"]
                same &= bool(commit) and commit[:7] == kept[-1][:7]
                if same and other.get("train_loss"):
                    if found is None or other["seed"] == line["seed"] or (
                            found["seed"] != line["seed"]):
                        found = other
        return found

# ------------------------------------------------------------------------------------------------
# In train.py's process

def named_groups(optimizer):
    """{name: group} of an optimizer's groups; without a name it is their number."""
    groups = getattr(optimizer, "param_groups", [])
    return {str(group.get("name", n)): group for n, group in enumerate(groups)}


def rates(optimizer):
    groups = named_groups(optimizer)
    return {name: float(group["lr"]) for name, group in groups.items() if "lr" in group}


def gradient_norms(optimizer):
    """{name of a group: the norm of its gradient}, as tensors: nothing waits for the device."""
    import torch
    norms = {}
    for name, group in named_groups(optimizer).items():
        gradients = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                     for p in group["params"] if p.grad is not None]
        if gradients:
            norms[name] = torch.stack([g.norm() for g in gradients]).norm()
    return norms


def timed(step, x, y, device):
    """Seconds of step(x, y) before backward(), in it, and after it, if it calls that once."""
    import torch

    import machine
    times, backward = [], torch.Tensor.backward

    def note():
        machine.synchronize(device)
        times.append(time.monotonic())

    def noted(tensor, *arguments, **options):
        note()
        backward(tensor, *arguments, **options)
        note()

    torch.Tensor.backward = noted
    try:
        note()
        step(x, y)
        note()
    finally:
        torch.Tensor.backward = backward
    return [after - before for before, after in zip(times, times[1:])]


def print_details(run, numbers, line):
    """Print after the summary what may help with the next idea: five lines at most."""
    details = {"epochs": line["epochs"]}
    losses = [("train_loss", line["train_loss"], "nats at 1/4, 1/2, 3/4 and the end")]
    if "kept" in line:
        commit, kept = line["kept"]
        losses.append(("of_kept_commit", kept, f"{commit}, the last one kept"))
    for name, values, words in losses:
        if values:
            details[name] = " ".join(f"{value:.3f}" for value in values) + f"  ({words})"
    if len(run.step_parts) == 3:
        forward, backward, step = run.step_parts
        step *= numbers["num_steps"] / run.handed           # one for all batches of a step
        parts = {"forward": forward, "backward": backward, "optimizer": step}
        shares = [f"{name} {part / sum(parts.values()):.0%}" for name, part in parts.items()]
        details["step_time"] = ", ".join(shares) + "  (in the warm-up)"
    if run.training_log.norms:
        norms = [f"{name} {float(norm):.2g}" for name, norm in run.training_log.norms.items()]
        details["gradient_norm"] = ", ".join(norms) + "  (near the end)"
    print("---")
    for key, value in details.items():
        print(f"{key + ':':<17} {value}")


def save_weights(model, path):
    """Save what train.py calls its model. Returns "", or in words why that is not possible."""
    from safetensors.torch import save_model
    try:
        save_model(model, path)
        return ""
    except Exception as error:
        return f"the model is not kept: {error}"

# ------------------------------------------------------------------------------------------------
# Models

def kept_models(folder, dataset=None, commit=""):
    """
    The records (run.json) of the models in a folder, the best first; each has its `path`. Only
    those of a dataset and of commits that begin with `commit`, where these are given.
    """
    found = []
    for path in folder.glob("*/run.json"):
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            record = dict(json.loads(path.read_bytes()))
            wanted = dataset in (None, record["dataset"]) and record["commit"].startswith(commit)
            if wanted and math.isfinite(record["val_bpb"]):
                found.append(record | {"path": path.parent})
    return sorted(found, key=lambda record: record["val_bpb"])


def peers(record):
    """What runs must have in common for one to be better than another."""
    return tuple(record.get(key) for key in ("dataset", "val_text_sha256", "device", "time_budget"))


def is_best(folder, line):
    """Whether no kept model of the same text and machine is as good as that of a journal line."""
    return all(line["val_bpb"] < other["val_bpb"] for other in kept_models(folder)
               if peers(other) == peers(line))


def check_weights(path):
    """Raise ValueError unless a file of safetensors is whole. Reads its header alone."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "numpy") as file:
            if not file.keys():
                raise ValueError("no weights")
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def keep_model(folder, weights, program, tokenizer, record):
    """
    Copy a model into `folder`: all of it is there, or nothing.

    weights: the path of its file; program: the text of its train.py, bytes; tokenizer: the path of
    its tokenizer.b64; record: what is known of the run. Raises OSError or ValueError, and then
    leaves nothing behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix="part-", dir=folder))
    try:
        # train.py's process has made that file: no link to what only the referee may read.
        # Nor a pipe, which would wait for a writer.
        flags = [getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")]
        descriptor = os.open(weights, os.O_RDONLY | sum(flags))
        with FileLock(folder / "lock", timeout=60), open(descriptor, "rb") as source:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or about.st_size > MODELS_BYTES:
                raise ValueError(f"no file, or of more than {MODELS_BYTES / 2**30:.0f} GiB")
            with open(part / "weights.safetensors", "wb") as file:
                shutil.copyfileobj(source, file, 2**20)
                file.flush()
                os.fsync(file.fileno())
            check_weights(part / "weights.safetensors")
            (part / "train.py").write_bytes(program)
            shutil.copyfile(tokenizer, part / "tokenizer.b64")
            (part / "run.json").write_text(json.dumps(record, indent=1))
            place = folder / f"{record['commit'] or 'no-commit'}-{record['seed']}-{record['run']}"
            part.rename(place)
            forget(folder, place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def forget(folder, newest):
    """
    Remove what exceeds MODELS and MODELS_BYTES: the oldest first, those last that are the best of a
    machine and text, and the newest never.
    """
    best = {}
    for record in kept_models(folder):
        best.setdefault(peers(record), record["path"])

    def worth(place):
        return place == newest, place in best.values(), (place / "run.json").stat().st_mtime

    places = [path.parent for path in folder.glob("*/run.json")]
    size = 0
    for n, place in enumerate(sorted(places, key=worth, reverse=True)):
        with suppress(OSError):
            size += (place / "weights.safetensors").stat().st_size
        if place != newest and (n >= MODELS or size > MODELS_BYTES):
            shutil.rmtree(place, ignore_errors=True)
    for part in folder.glob("part-*"):                  # of a referee that was killed
        if time.time() - part.stat().st_mtime > 3600:
            shutil.rmtree(part, ignore_errors=True)
