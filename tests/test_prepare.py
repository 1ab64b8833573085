"""prepare.py as a program: idempotent, resumable, and one clear sentence for each mistake."""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import types

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

import prepare
import referee
from children import ROOT, program

TEXTS = [f"Story number {i}: once upon a time there were {i} small words. They ended well."
         for i in range(400)]


def prepare_own(source, cache):
    """Prepare one's own text with a small vocabulary."""
    return program("prepare.py", "--source", source, "--vocab-size", 300,
                   AUTORESEARCH_CACHE_DIR=cache)


def refused(result, *words):
    """Assert that a program has ended with one sentence, and these words in it."""
    assert result.returncode == 1, result.stdout
    assert "Traceback" not in result.stdout, result.stdout
    for word in words:
        assert word in result.stdout, result.stdout


def documents_of(cache):
    """The documents of each token shard of the chosen dataset, decoded."""
    choice = json.loads((cache / "dataset.json").read_text())
    folder = cache / choice["name"] / "vocab-300"
    tokenizer = prepare.load_tokenizer(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    documents = {}
    for name in choice["shards"]:
        tokens, offsets = referee.open_shard(folder, name, manifest[name])
        pieces = np.split(tokens, offsets[1:-1])
        documents[name] = [tokenizer.decode(piece.tolist()) for piece in pieces]
    return documents


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_the_second_time_does_nothing_and_says_so(cache):
    def times():
        files = [path for path in (cache / "sotu").rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files}

    before, start = times(), time.monotonic()
    result = program("prepare.py")
    assert time.monotonic() - start < 2     # without most of its imports, which a fork has
    assert result.returncode == 0
    assert "nothing to do" in result.stdout and "dataset: sotu" in result.stdout
    assert before == times()


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt", "folder"])
def test_own_text_of_every_kind_comes_back_whole(kind, tmp_path):
    source, cache = tmp_path / f"mine.{kind}", tmp_path / "cache"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), source)
    elif kind == "jsonl":
        source.write_text(jsonl(TEXTS))
    elif kind == "txt":
        source.write_text("\n\n".join(TEXTS))
    else:
        source.mkdir()
        for i, text in enumerate(TEXTS):
            (source / f"{i}.txt").write_text(text)
    result = prepare_own(source, cache)
    assert result.returncode == 0, result.stdout
    documents = documents_of(cache)
    assert sorted(sum(documents.values(), [])) == sorted(TEXTS)
    assert len(documents["val"]) > 5 and len(documents["test"]) > 5
    assert "nothing to do" in prepare_own(source, cache).stdout


def test_adding_files_moves_no_document_between_splits(tmp_path):
    source, cache = tmp_path / "mine", tmp_path / "cache"
    source.mkdir()
    (source / "b.jsonl").write_text(jsonl(TEXTS[:300]))
    assert prepare_own(source, cache).returncode == 0
    before = documents_of(cache)
    (source / "a.jsonl").write_text(jsonl(TEXTS[300:]))
    assert prepare_own(source, cache).returncode == 0
    after = documents_of(cache)
    for split in before:
        assert set(before[split]) < set(after[split])


def test_killed_half_way_it_goes_on_to_the_same_result(whole_cache, tmp_path):
    folder = tmp_path / "sotu" / "vocab-512"
    arguments = ["prepare.py", "--dataset", "sotu", "--vocab-size", "512"]
    child = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT,
        env=os.environ | {"AUTORESEARCH_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "tokenizer.b64").exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not (folder / "val.npy").exists()
    result = program(*arguments, AUTORESEARCH_CACHE_DIR=tmp_path)
    assert result.returncode == 0, result.stdout
    for name in ("tokenizer.b64", "manifest.json", "val.npy", "train-00000.offsets.npy"):
        whole = whole_cache / "sotu" / "vocab-512" / name
        assert (folder / name).read_bytes() == whole.read_bytes()


def damaged_source(kind, folder):
    """A source of text with something wrong."""
    source = folder / "mine"
    source.mkdir()
    match kind:
        case "missing":
            return folder / "nowhere"
        case "binary":
            (source / "a.txt").write_bytes(bytes(range(256)) * 10)
        case "zeros":
            (source / "a.txt").write_bytes(b"text\0text")
        case "bad json":
            (source / "a.jsonl").write_text('{"text": "fine"}\n{"words": 1\n')
        case "bad parquet":
            (source / "a.parquet").write_bytes(b"PAR1 this is none PAR1")
        case "no column":
            pyarrow.parquet.write_table(pyarrow.table({"words": TEXTS}), source / "a.parquet")
        case "too small":
            (source / "a.txt").write_text("a single document")
    return source


@pytest.mark.parametrize("kind,words", [
    ("empty", "no file of .parquet, .jsonl, .ndjson, .txt, .md found"),
    ("missing", "no such file or folder"),
    ("binary", "a.txt is not UTF-8 text"),
    ("zeros", "zero bytes"),
    ("bad json", "a.jsonl, line 2"),
    ("bad parquet", "a.parquet"),
    ("no column", "text"),
    ("too small", "too few"),
])
def test_a_bad_source_is_named_in_a_sentence(kind, words, tmp_path):
    refused(prepare_own(damaged_source(kind, tmp_path), tmp_path / "cache"), words)


@pytest.mark.parametrize("arguments,words", [
    (["--dataset", "wikipedia"], "climbmix, tinystories, sotu"),
    (["--vocab-size", 100], "between 257"),
    (["--dataset", "climbmix", "--num-shards", 0], "--num-shards 0"),
    (["--workers", 0], "--workers 0"),
])
def test_a_bad_argument_is_named_in_a_sentence(arguments, words, tmp_path):
    refused(program("prepare.py", *arguments, AUTORESEARCH_CACHE_DIR=tmp_path), words)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    result = program("prepare.py", AUTORESEARCH_CACHE_DIR=tmp_path / "file" / "cache")
    refused(result, "AUTORESEARCH_CACHE_DIR")


def test_a_truncated_shard_is_named_and_made_again(whole_cache, tmp_path):
    cache, name = tmp_path / "cache", "sotu/vocab-8192/val.npy"
    shutil.copytree(whole_cache, cache)
    (cache / name).write_bytes((cache / name).read_bytes()[:1000])
    command = "uv run prepare.py --dataset sotu --vocab-size 8192"
    result = program("train.py", AUTORESEARCH_CACHE_DIR=cache)
    refused(result, "val is missing or corrupted", command)
    result = program(*command.split()[2:], AUTORESEARCH_CACHE_DIR=cache)
    assert result.returncode == 0 and "val: 283 documents" in result.stdout
    assert (cache / name).read_bytes() == (whole_cache / name).read_bytes()


def test_two_at_once_the_second_steps_back(tmp_path):
    import fcntl
    with open(tmp_path / "prepare.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = program("prepare.py", AUTORESEARCH_CACHE_DIR=tmp_path)
    assert result.returncode == 1 and "another prepare.py" in result.stdout


def test_passages_are_paragraphs_up_to_four_kilobytes():
    paragraphs = ["word " * n for n in (300, 300, 300, 2000, 1, 1)]
    passages = list(prepare.passages("\n\n".join(paragraphs)))
    assert "\n\n".join(passages).split() == " ".join(paragraphs).split()
    fits = [len(passage.encode()) <= 4096 for passage in passages]
    assert fits == [True, True, False, True]


def test_numbers_are_cut_in_at_most_two_digits(cache):
    tokenizer = prepare.load_tokenizer(cache / "sotu" / "vocab-8192")
    for token in range(tokenizer.n_vocab - 1):
        text = tokenizer.decode_single_token_bytes(token)
        assert sum(48 <= byte < 58 for byte in text) <= 2
    text = "In 1862, é ☃ <|bos|>"
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert np.max(tokenizer.encode_ordinary("<|bos|>")) < tokenizer.n_vocab - 1


def test_how_much_is_evaluated_is_chosen_kept_and_does_not_depend_on_the_tokenizer(tmp_path):
    paragraphs = [
        f"A short paragraph about {i}, {i * i} and {hashlib.md5(str(i).encode()).hexdigest()}."
        for i in range(10_000)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))

    def manifest(vocab_size, *arguments):
        result = program("prepare.py", *arguments, "--vocab-size", vocab_size,
                         AUTORESEARCH_CACHE_DIR=tmp_path / "cache")
        assert result.returncode == 0, result.stdout
        [path] = (tmp_path / "cache").glob(f"own-*/vocab-{vocab_size}/manifest.json")
        return json.loads(path.read_text())

    small = manifest(300, "--source", tmp_path / "a.txt", "--eval-bytes", 30_000)
    assert 30_000 - 400 < small["val"]["bytes"] + 256 * small["val"]["documents"] <= 30_000
    other = manifest(400)                   # --eval-bytes is remembered, as the dataset is
    for split in ("val", "test"):
        assert other[split]["text_sha256"] == small[split]["text_sha256"]
        assert other[split]["tokens"] < small[split]["tokens"]
    large = manifest(400, "--eval-bytes", 500_000)
    assert large["val"]["documents"] > 3 * small["val"]["documents"]
    assert large["val"]["text_sha256"] != small["val"]["text_sha256"]
    assert large["train-00000"] == other["train-00000"]


@pytest.mark.parametrize("recipe", ["climbmix", "tinystories", "sotu"])
def test_every_kind_of_device_has_a_size_of_text(recipe):
    sizes = prepare.EVAL_BYTES[recipe]
    assert sizes["cuda"] >= sizes["small cuda"] >= sizes["mps"] >= sizes["cpu"] > 0


@pytest.mark.parametrize("device,processors,size", [
    ("cuda", 132, "cuda"), ("cuda", 76, "cuda"), ("cuda", 58, "small cuda"), ("mps", 0, "mps")])
def test_small_cards_get_less_text(device, processors, size, monkeypatch):
    properties = types.SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(prepare, "default_device", lambda: torch.device(device))
    arguments = argparse.Namespace(dataset="climbmix", source=None, eval_bytes=None)
    dataset, _ = prepare.choose(arguments)
    assert dataset.eval_bytes == prepare.EVAL_BYTES["climbmix"][size]


def test_sotu_is_evaluated_whole(whole_cache):
    manifest = json.loads((whole_cache / "sotu/vocab-8192/manifest.json").read_text())
    assert (manifest["val"]["bytes"], manifest["test"]["bytes"]) == (988_354, 1_165_260)
