"""
Readers of our own files on mutated ones: a sentence or the same numbers, no traceback, no hang.

    AUTORESEARCH_LONG_TESTS=1 uv run pytest tests/test_fuzz.py      # 100,000 of each kind
"""

import gzip
import hashlib
import io
import json
from contextlib import redirect_stdout

import nbformat
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import decide
import prepare
import referee
from children import LONG, ROOT
from test_notebook import HEADER, JOURNAL, NIGHT
from test_prepare import TEXTS, jsonl, prepare_own

FILES = ("dataset.json", "manifest.json", "tokenizer.b64", "val.npy", "val.offsets.npy",
         "test.offsets.npy", "train-00000.npy", "train-00000.offsets.npy")
WORDS = (b"", b"0", b"-1", b"null", b"[]", b"{}", b'"', b"NaN", b"1e999", b"\n", b"\t", b"\0",
         b"\xff", b"9" * 30, b"../../x", b"[" * 5000, b"keep", b"seed 43: ", b"baseline", b",")
# What becomes of a file: at some place, so many bytes are replaced by these.
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0, 0, 1, 2, 8, 1000]),
                             st.one_of(st.sampled_from(WORDS), st.binary(max_size=8))),
                   min_size=1, max_size=4)


def many(short, long):
    return settings(max_examples=long if LONG else short, deadline=None, derandomize=not LONG,
                    database=None, suppress_health_check=list(HealthCheck))


def mutated(data, changes):
    for where, length, new in changes:
        start = int(where * len(data))
        data = data[:start] + new + data[start + length:]
    return data


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small prepared cache: its folder, the paths of FILES, and the bytes of each."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "mine.jsonl").write_text(jsonl(TEXTS))
    result = prepare_own(folder / "mine.jsonl", folder / "cache")
    assert result.returncode == 0, result.stdout
    cache = folder / "cache"
    [tokens] = cache.glob("own-*/vocab-300")
    paths = {name: (cache if name == "dataset.json" else tokens) / name for name in FILES}
    return cache, paths, {name: path.read_bytes() for name, path in paths.items()}


def all_that_a_run_reads(cache, monkeypatch):
    """A digest of what the readers of a run make of the cache. Exits as they do."""
    monkeypatch.setattr(prepare, "CACHE", cache)
    dataset = prepare.chosen_dataset()
    run = referee.Referee.__new__(referee.Referee)
    run.folder, run.vocab_size = prepare.folder_of(dataset, dataset.vocab_size), dataset.vocab_size
    missing = run.missing({"shards": dataset.shards})
    if missing:
        raise SystemExit(missing)
    digest = hashlib.sha256()
    shards = [shard for shard in dataset.shards if shard.startswith("train")]
    arrays = [array for each in run.checked_texts() for array in each]
    for shard in shards:
        arrays += referee.checked_shard(run.folder, shard, run.manifest[shard])
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(repr([dataset.context, dataset.recipe, dataset.vocab_size, shards]).encode())
    digest.update(repr([run.manifest[split]["bytes"] for split in referee.SPLITS]).encode())
    digest.update(repr(prepare.load_tokenizer(run.folder).encode("some words")).encode())
    return digest.hexdigest()


# What a change in dataset.json may do without a word: choose another prepared dataset's settings.
SETTINGS = b'"vocab_size"', b'"context"', b'"recipe"', b'"shards"', b'"name"'


def test_fuzz_the_cache_of_a_run(small, monkeypatch):
    cache, paths, whole = small
    right = all_that_a_run_reads(cache, monkeypatch)
    counts = {"refused": 0, "the same": 0}

    @many(400, 100_000)
    @given(st.sampled_from(FILES), CHANGES)
    def check(name, changes):
        paths[name].write_bytes(mutated(whole[name], changes))
        try:
            found = all_that_a_run_reads(cache, monkeypatch)
            same_settings = name != "dataset.json" or (
                settings_of(paths[name].read_bytes()) == settings_of(whole[name]))
            assert found == right or not same_settings, (name, changes)
            counts["the same"] += 1
        except SystemExit as error:
            assert str(error)
            counts["refused"] += 1
        finally:
            paths[name].write_bytes(whole[name])

    check()
    print(f"fuzz: {counts['refused']} changed caches were refused, {counts['the same']} were read")
    assert min(counts.values()) > 0


def settings_of(data):
    """The values in dataset.json that decide what a run computes: a person may change them."""
    value = json.loads(data)
    return [value[name.decode().strip('"')] for name in SETTINGS]


def test_fuzz_results_tsv_and_journal_in_decide_and_notebook(tmp_path, monkeypatch):
    """decide.py names each bad row; every cell of the notebook runs to its end."""
    notebook = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
    cells = [compile(cell.source, "analysis.ipynb", "exec") for cell in notebook.cells
             if cell.cell_type == "code" and "savefig" not in cell.source]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTORESEARCH_CACHE_DIR", str(tmp_path))
    table = (HEADER + "".join(row + "\n" for row in NIGHT)).encode()
    lines = "".join(json.dumps(line) + "\n" for line in JOURNAL).encode()

    @many(150, 100_000)
    @given(CHANGES, CHANGES, st.booleans())
    def check(in_table, in_journal, both):
        (tmp_path / "results.tsv").write_bytes(mutated(table, in_table))
        (tmp_path / "journal.jsonl").write_bytes(mutated(lines, in_journal) if both else lines)
        rows = decide.read_results(tmp_path / "results.tsv", str)
        for session in decide.sessions(rows):
            assert session.margin >= decide.FLOOR and session.missing() is not None
        names = {}
        with redirect_stdout(io.StringIO()) as said:
            for cell in cells:
                exec(cell, names)
        assert "experiments in results.tsv" in said.getvalue()

    check()


def test_fuzz_one_s_own_files(tmp_path):
    """Every reader of owntext.py: documents, or NoText."""
    import owntext
    from test_download import parquet
    whole = {"a.jsonl": jsonl(TEXTS[:20]).encode(), "a.txt": "\n\n".join(TEXTS[:20]).encode(),
             "a.parquet": parquet(TEXTS[:20]),
             "a.jsonl.gz": gzip.compress(jsonl(TEXTS[:20]).encode())}

    @many(300, 100_000)
    @given(st.sampled_from(sorted(whole)), CHANGES, st.booleans())
    def check(name, changes, at_once):
        path = tmp_path / name
        path.write_bytes(mutated(whole[name], changes))
        try:
            for text in owntext.file_documents(path, at_once):
                assert text is None or owntext.valid(text).encode() is not None
        except owntext.NoText as error:
            assert name in str(error)

    check()
