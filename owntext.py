"""
A user's own text: what `uv run prepare.py --source` reads, in a stream, whatever its size.

Texts come from the world, so anything may be in them: a row without text is left out and counted, a
file that holds no text is named, and what is printed of a name has its control characters escaped.
"""

import hashlib
import heapq
import io
import json
import re
from collections import Counter
from contextlib import contextmanager

import pyarrow
import pyarrow.parquet
from pyarrow import types

from referee import printable
from seal import COMPRESSED, TEXT_KINDS, text_kind

BLOCK = 2**20               # characters read at once
LONGEST = 2**22             # characters of a document in a .txt or .md file; longer ones are cut
SHARD_BYTES = 2**28         # of text in a shard
ROW_GROUP_BYTES = 2**24     # of text that is in memory while a shard is written or read
HELD_OUT_BYTES = 2**26      # of text kept for validation and for test; more is left out


class NoText(Exception):
    """A sentence that says which file holds no text, and why."""


class TooLittle(Exception):
    """A sentence that says what the source lacks."""


def find_files(source):
    """The files of text below a folder, except hidden ones (macOS's ._*); or the file itself."""
    if not source.is_dir():
        return [source] if text_kind(source) else []
    files = []
    for path in source.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if text_kind(path) and not hidden and path.is_file():
            files.append(path)
    return sorted(files)

# ------------------------------------------------------------------------------------------------
# Files: each reader yields a file's documents, None for a row without text

@contextmanager
def open_text(path, newline=None):
    """The file, decompressed and decoded by its byte order mark, else as UTF-8."""
    packed = COMPRESSED.get(path.suffix.lower())
    with open(path, "rb") as file, pyarrow.input_stream(file, compression=packed) as stream:
        reader = io.BufferedReader(stream)
        mark = reader.peek(2)[:2]
        encoding = "utf-16" if mark in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        yield io.TextIOWrapper(reader, encoding, newline=newline)


def plain_text(path, whole):
    """A .txt or .md file: one document if `whole`, else one between blank lines."""
    pending = ""
    with open_text(path) as file:
        while block := file.read(BLOCK):
            if "\0" in block:
                raise NoText(f"{path} contains zero bytes, so it is not text")
            pending += block
            if not whole:
                *done, pending = pending.split("\n\n")
                yield from filter(None, map(str.strip, done))
            if len(pending) > LONGEST:
                yield pending
                pending = ""
    if pending := pending if whole else pending.strip():
        yield pending


def json_lines(path):
    """The key `text` of each line. By hand: pyarrow.json stops at the first row without a text."""
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise NoText(f"{path}, line {number}: not a JSON object") from None
            text = row.get("text") if isinstance(row, dict) else None
            yield text if isinstance(text, str) else None


def parquet(path):
    """The column `text` of a parquet file; bytes are decoded."""
    with open(path, "rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
        kind = file.schema_arrow.field("text").type
        if types.is_dictionary(kind):
            kind = kind.value_type
        tests = types.is_string, types.is_large_string, types.is_binary, types.is_large_binary
        if not any(test(kind) for test in tests):
            raise NoText(f"{path}: its column text holds {kind}")
        for batch in file.iter_batches(1024, columns=["text"]):
            for text in batch.column(0).to_pylist():
                yield text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def file_documents(path, whole):
    """A file's documents, None for a row without text. Raises NoText if it is no text."""
    try:
        match text_kind(path):
            case ".parquet": yield from parquet(path)
            case ".jsonl" | ".ndjson": yield from json_lines(path)
            case _: yield from plain_text(path, whole)
    except UnicodeDecodeError as error:
        raise NoText(f"{path} is not UTF-8 text ({error.reason})") from None
    except KeyError:
        raise NoText(f"{path} has no column named text") from None
    except (pyarrow.ArrowException, OSError, EOFError, RecursionError) as error:
        raise NoText(f"{path} can't be read: {error}") from None


def valid(text):
    """The text with surrogates paired, or replaced where half a pair is missing."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


LONG_SPACE = re.compile(r"\s{10000}")


def cut_spaces(text):
    """
    The text in pieces without a run of over 10,000 spaces: the tokenizers' regular expressions
    overflow their stacks at a million of them.
    """
    start = 0
    for run in LONG_SPACE.finditer(text):
        yield text[start:run.end()]
        start = run.end()
    yield text[start:]

# ------------------------------------------------------------------------------------------------
# The copy that shards are made of

class Writer:
    """Writes documents to parquet files of SHARD_BYTES each, NAME-00000.parquet and so on."""
    schema = pyarrow.schema([("text", pyarrow.large_string())])

    def __init__(self, folder, name):
        self.folder, self.name, self.paths = folder, name, []
        self.texts, self.pending, self.room, self.file = [], 0, 0, None

    def add(self, text, size):
        if self.room <= 0:
            self.close()
            self.paths.append(self.folder / f"{self.name}-{len(self.paths):05d}.parquet")
            self.file = pyarrow.parquet.ParquetWriter(
                self.paths[-1], self.schema, compression="zstd")
            self.room = SHARD_BYTES
        self.texts.append(text)
        self.pending += size
        self.room -= size
        if self.pending > ROW_GROUP_BYTES:
            self.flush()

    def flush(self):
        self.file.write_table(pyarrow.table({"text": self.texts}, self.schema))
        self.texts, self.pending = [], 0

    def close(self):
        if self.file:
            self.flush()
            self.file.close()


class Held:
    """The documents with the smallest numbers, as many as fit into HELD_OUT_BYTES."""

    def __init__(self):
        self.heap, self.size = [], 0

    def add(self, number, text, size):
        heapq.heappush(self.heap, (-number, text, size))
        self.size += size
        while self.size > HELD_OUT_BYTES and len(self.heap) > 1:
            self.size -= heapq.heappop(self.heap)[2]

    def texts(self):
        return [text for _, text, _ in sorted(self.heap, reverse=True)]


def split(source, folder, skip):
    """
    Read the source once and write its documents into `folder` as parquet: {name: path}.

    A twentieth each is validation and test, by a hash of the text: adding files moves none, and
    which are evaluated does not depend on the names of files. skip: whether to go on where a file
    holds no text. Raises NoText if not, and TooLittle if there is too little text.
    """
    files = find_files(source)
    if not files:
        kinds = ", ".join(TEXT_KINDS)
        raise TooLittle(f"--source {source}: no file of {kinds} found, nor one of them compressed")
    folder.mkdir(parents=True, exist_ok=True)
    train, val, test = Writer(folder, "train"), Held(), Held()
    count = Counter()
    for path in files:
        try:
            found = False
            for text in file_documents(path, source.is_dir()):
                if not text or text.isspace():
                    count["empty"] += 1
                    continue
                found = True
                count["documents"] += 1
                text = valid(text)
                raw = text.encode()
                digest = hashlib.blake2b(raw, digest_size=8).digest()
                number = int.from_bytes(digest, "big")
                match number % 20:
                    case 0: val.add(number, text, len(raw))
                    case 1: test.add(number, text, len(raw))
                    case _: train.add(text, len(raw))
            if not found and path.stat().st_size:
                raise NoText(f"{path} holds no text")
        except NoText as error:
            if not skip:
                raise
            what = "left out from there on" if found else "left out"
            print(printable(f"{what}: {error}"))
    train.close()
    if count["empty"]:
        print(f"left out: rows or documents without text, {count['empty']:,} of them")
    if not (train.paths and val.heap and test.heap):
        raise TooLittle(
            f"--source {source}: {count['documents']} documents are too few to set some aside for "
            "validation and test; a few hundred will do (in a .txt file given by itself, blank "
            "lines separate documents)")
    paths = {path.stem: path for path in train.paths}
    for name, held in ("val", val), ("test", test):
        paths[name] = folder / f"{name}.parquet"
        table = pyarrow.table({"text": held.texts()}, Writer.schema)
        pyarrow.parquet.write_table(table, paths[name], row_group_size=4096)
    return paths
