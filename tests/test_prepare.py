"""prepare.py as a program: idempotent, resumable, and one clear sentence for each foreseeable mistake."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import prepare
import referee
from children import ROOT, program

TEXTS = [f"Story number {i}: once upon a time there were {i} small words. They ended well." for i in range(400)]


def own(path, cache, *more):
    return program("prepare.py", "--source", path, "--vocab-size", 300, *more, AUTORESEARCH_CACHE_DIR=cache)


def shards_of(cache):
    choice = json.loads((cache / "dataset.json").read_text())
    folder = cache / choice["name"] / "vocab-300"
    tokenizer, manifest = prepare.load_tokenizer(folder), json.loads((folder / "manifest.json").read_text())
    documents = {}
    for name in choice["shards"]:
        tokens, offsets = referee.open_shard(folder, name, manifest[name])
        documents[name] = [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(offsets, offsets[1:])]
    return documents


def test_the_second_time_does_nothing_and_says_so(cache):
    before = {path: path.stat().st_mtime_ns for path in (cache / "sotu").rglob("*") if path.is_file()}
    def seconds(*command):
        start = time.monotonic()
        result = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE)
        return time.monotonic() - start, result

    seconds("-c", "import prepare")                     # the first time, files come from the disk
    imports, _ = seconds("-c", "import prepare")
    all_of_it, result = seconds("prepare.py")
    assert result.returncode == 0 and "nothing to do" in result.stdout and "dataset: sotu" in result.stdout
    assert all_of_it < imports + 2
    assert before == {path: path.stat().st_mtime_ns for path in (cache / "sotu").rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt", "folder"])
def test_own_text_of_every_kind_comes_back_whole(kind, tmp_path):
    source = tmp_path / f"mine.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), source)
    elif kind == "jsonl":
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    elif kind == "txt":
        source.write_text("\n\n".join(TEXTS))
    else:
        source.mkdir()
        for i, text in enumerate(TEXTS):
            (source / f"{i}.txt").write_text(text)
    result = own(source, tmp_path / "cache")
    assert result.returncode == 0, result.stdout
    documents = shards_of(tmp_path / "cache")
    assert sorted(sum(documents.values(), [])) == sorted(TEXTS)
    assert len(documents["val"]) > 5 and len(documents["test"]) > 5
    assert "nothing to do" in own(source, tmp_path / "cache").stdout


def test_adding_files_moves_no_document_between_splits(tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    (source / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:300]))
    assert own(source, tmp_path / "cache").returncode == 0
    before = shards_of(tmp_path / "cache")
    (source / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[300:]))
    assert own(source, tmp_path / "cache").returncode == 0
    after = shards_of(tmp_path / "cache")
    for split in before:
        assert set(before[split]) < set(after[split])


def test_killed_at_any_moment_it_goes_on_to_the_same_result(tmp_path, cache):
    environment = os.environ | {"AUTORESEARCH_CACHE_DIR": str(tmp_path)}
    for seconds in (4,):
        child = subprocess.Popen([sys.executable, "prepare.py", "--dataset", "sotu", "--vocab-size", "512"], cwd=ROOT,
                                 env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        child.wait()
    result = program("prepare.py", "--dataset", "sotu", "--vocab-size", 512, AUTORESEARCH_CACHE_DIR=tmp_path)
    assert result.returncode == 0, result.stdout
    for name in ("tokenizer.b64", "manifest.json", "val.npy", "train-00000.offsets.npy"):
        assert (tmp_path / "sotu/vocab-512" / name).read_bytes() == (cache / "sotu/vocab-512" / name).read_bytes()


def damage_source(kind, folder):
    source = folder / "mine"
    source.mkdir()
    if kind == "binary":
        (source / "a.txt").write_bytes(bytes(range(256)) * 10)
    if kind == "zeros":
        (source / "a.txt").write_bytes(b"text\0text")
    if kind == "bad json":
        (source / "a.jsonl").write_text('{"text": "fine"}\n{"words": 1}\n')
    if kind == "bad parquet":
        (source / "a.parquet").write_bytes(b"PAR1 this is none PAR1")
    if kind == "no column":
        pyarrow.parquet.write_table(pyarrow.table({"words": TEXTS}), source / "a.parquet")
    if kind == "little":
        (source / "a.txt").write_text("a single document")
    return source if kind != "missing" else folder / "nowhere"


@pytest.mark.parametrize("kind,words", [
    ("empty", "no .parquet, .jsonl, .txt file"), ("missing", "no such file or folder"), ("binary", "a.txt is not UTF-8 text"),
    ("zeros", "zero bytes"), ("bad json", "a.jsonl, line 2"), ("bad parquet", "a.parquet"), ("no column", "text"),
    ("little", "too few")])
def test_a_bad_source_is_named_in_a_sentence(kind, words, tmp_path):
    result = own(damage_source(kind, tmp_path), tmp_path / "cache")
    assert result.returncode == 1 and words in result.stdout and "Traceback" not in result.stdout, result.stdout


@pytest.mark.parametrize("arguments,words", [
    (["--dataset", "wikipedia"], "climbmix, tinystories, sotu"), (["--vocab-size", 100], "between 257"),
    (["--dataset", "climbmix", "--num-shards", 0], "--num-shards 0"), (["--workers", 0], "--workers 0")])
def test_a_bad_argument_is_named_in_a_sentence(arguments, words, tmp_path):
    result = program("prepare.py", *arguments, AUTORESEARCH_CACHE_DIR=tmp_path)
    assert result.returncode == 1 and words in result.stdout and "Traceback" not in result.stdout, result.stdout


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    result = program("prepare.py", AUTORESEARCH_CACHE_DIR=tmp_path / "file" / "cache")
    assert result.returncode == 1 and "AUTORESEARCH_CACHE_DIR" in result.stdout and "Traceback" not in result.stdout


def test_a_truncated_shard_is_named_and_made_anew(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    shard = tmp_path / "cache/sotu/vocab-4096/val.npy"
    shard.write_bytes(shard.read_bytes()[:1000])
    result = program("train.py", AUTORESEARCH_CACHE_DIR=tmp_path / "cache")
    assert result.returncode == 1 and "val is missing or corrupted" in result.stdout and "Traceback" not in result.stdout
    command = "uv run prepare.py --dataset sotu --vocab-size 4096"
    assert command in result.stdout
    result = program(*command.split()[2:], AUTORESEARCH_CACHE_DIR=tmp_path / "cache")
    assert result.returncode == 0 and "val: 283 documents" in result.stdout
    assert shard.read_bytes() == (cache / "sotu/vocab-4096/val.npy").read_bytes()


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
    assert [len(passage.encode()) <= 4096 for passage in passages] == [True, True, False, True]


def test_numbers_are_cut_in_at_most_two_digits(cache):
    tokenizer = prepare.load_tokenizer(cache / "sotu" / "vocab-4096")
    for token in range(tokenizer.n_vocab - 1):
        text = tokenizer.decode_single_token_bytes(token)
        assert sum(48 <= byte < 58 for byte in text) <= 2
    assert tokenizer.decode(tokenizer.encode_ordinary("In 1862, é ☃ <|bos|>")) == "In 1862, é ☃ <|bos|>"
    assert np.max(tokenizer.encode_ordinary("<|bos|>")) < tokenizer.n_vocab - 1


def test_how_much_is_evaluated_is_chosen_kept_and_does_not_depend_on_the_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"A short paragraph about {i}, {i * i} and {hashlib.md5(str(i).encode()).hexdigest()}." for i in range(40_000)))

    def entries(*arguments):
        result = program("prepare.py", *arguments, AUTORESEARCH_CACHE_DIR=tmp_path / "cache")
        assert result.returncode == 0, result.stdout
        manifest = next((tmp_path / "cache").glob(f"own-*/vocab-{arguments[-1]}/manifest.json"))
        return json.loads(manifest.read_text())

    small = entries("--source", tmp_path / "a.txt", "--eval-bytes", 100_000, "--vocab-size", 300)
    assert 100_000 - 400 < small["val"]["bytes"] + 256 * small["val"]["documents"] <= 100_000
    other = entries("--vocab-size", 400)                # remembered, as the dataset is
    for split in ("val", "test"):
        assert other[split]["text_sha256"] == small[split]["text_sha256"]
        assert other[split]["tokens"] < small[split]["tokens"]
    whole = entries("--eval-bytes", 500_000, "--vocab-size", 400)
    assert whole["val"]["documents"] > 3 * small["val"]["documents"]
    assert whole["train-00000"] == other["train-00000"] and whole["val"]["text_sha256"] != small["val"]["text_sha256"]


@pytest.mark.parametrize("recipe", ["climbmix", "tinystories", "sotu"])
def test_every_kind_of_device_has_a_size_of_text(recipe):
    sizes = prepare.EVAL_BYTES[recipe]
    assert sizes["cuda"] >= sizes["mps"] >= sizes["cpu"] > 0


def test_sotu_is_evaluated_whole(cache):
    manifest = json.loads((cache / "sotu/vocab-4096/manifest.json").read_text())
    assert (manifest["val"]["bytes"], manifest["test"]["bytes"]) == (988_354, 1_165_260)
