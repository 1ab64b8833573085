"""One's own text: valid but odd files, files that hold no text, and sizes that don't fit memory."""

import bz2
import gzip
import json
import random
import subprocess
import sys
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

import owntext
import prepare
from children import ROOT, program
from test_prepare import TEXTS, documents_of, jsonl, prepare_own, refused


def read(path, whole=True):
    return list(owntext.file_documents(path, whole))


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("line,text", [
    ('{"text": "a\u2028b\u0085c"}', "a\u2028b\u0085c"),         # valid in JSON, unescaped
    ('{"text": "tab", "more": [1, {"text": 2}]}\r', "tab"),
    ('{"text": null}', None),
    ('{"text": 5}', None),
    ('{"words": "none"}', None),
    ('["text"]', None),
    ('{"text": "\\ud83d\\ude00"}', "\U0001f600")])
def test_a_line_of_json(line, text, tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{line}\n\n" + '{"text": "next"}', newline="")
    assert read(tmp_path / "a.jsonl") == [text, "next"]


@pytest.mark.parametrize("name,pack", [
    ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd), ("a.ndjson.BZ2", bz2.compress),
    ("a.JSONL.GZ", lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]))])
def test_compressed_files(name, pack, tmp_path):
    (tmp_path / name).write_bytes(pack(jsonl(TEXTS).encode()))
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_byte_order_marks(encoding, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "é"}\n', encoding)
    (tmp_path / "b.TXT").write_text("é\r\n\r\nè", encoding, newline="")
    assert read(tmp_path / "a.jsonl") == ["é"]
    assert read(tmp_path / "b.TXT") == ["é\n\nè"]
    assert read(tmp_path / "b.TXT", whole=False) == ["é", "è"]


@pytest.mark.parametrize("values,kind", [
    (["a", None, "b"], pyarrow.string()), (["a", None, "b"], pyarrow.large_string()),
    ([b"a", None, b"b"], pyarrow.binary()), ([b"a", None, b"b"], pyarrow.large_binary()),
    (["a", None, "b"], pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))])
def test_columns_of_parquet(values, kind, tmp_path):
    table = pyarrow.table({"text": pyarrow.array(values, kind), "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", None, "b"]


def test_half_a_surrogate_pair_is_replaced():
    assert owntext.valid("a\ud800b") == "a\ufffdb"
    assert owntext.valid("\ud83d\ude00") == "\U0001f600"
    assert owntext.valid("plain é") == "plain é"


def test_hidden_files_are_not_read(tmp_path):
    for name in "0001.txt", "._0001.txt", ".git/a.txt", "sub/B.Md", "c.py":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert owntext.find_files(tmp_path) == [tmp_path / "0001.txt", tmp_path / "sub" / "B.Md"]
    assert owntext.find_files(tmp_path / "c.py") == []


def bad_file(kind, folder):
    """A file that holds no text, beside good ones."""
    match kind:
        case "zeros":
            (folder / "bad.txt").write_bytes(b"a\0b")
        case "binary":
            (folder / "bad.txt").write_bytes(bytes(range(128, 256)))
        case "cut gzip":
            data = random.Random(0).randbytes(10**5).hex().encode()
            (folder / "bad.txt.gz").write_bytes(gzip.compress(data)[:-2000])
        case "no gzip":
            (folder / "bad.txt.gz").write_text("plain text")
        case "bad json":
            (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "cut')
        case "deep json":
            (folder / "bad.jsonl").write_text("[" * 10**6)
        case "no key":
            (folder / "bad.jsonl").write_text('{"words": "none"}\n')
        case "numbers":
            pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), folder / "bad.parquet")
        case "no column":
            pyarrow.parquet.write_table(pyarrow.table({"words": ["a"]}), folder / "bad.parquet")
        case "no parquet":
            (folder / "bad.parquet").write_text("<html>please log in</html>")


@pytest.mark.parametrize("kind,words", [
    ("zeros", "bad.txt contains zero bytes"),
    ("binary", "bad.txt is not UTF-8 text"),
    ("cut gzip", "bad.txt.gz can't be read"),
    ("no gzip", "bad.txt.gz can't be read"),
    ("bad json", "bad.jsonl, line 2: not a JSON object"),
    ("deep json", "bad.jsonl can't be read"),
    ("no key", "bad.jsonl holds no text"),
    ("numbers", "bad.parquet: its column text holds int64"),
    ("no column", "bad.parquet has no column named text"),
    ("no parquet", "bad.parquet can't be read")])
def test_a_file_without_text_is_named_and_left_out_if_asked(kind, words, tmp_path, capsys):
    source = tmp_path / "mine"
    source.mkdir()
    (source / "good.jsonl").write_text(jsonl(TEXTS))
    bad_file(kind, source)
    with pytest.raises(owntext.NoText, match=words):
        owntext.split(source, tmp_path / "copy", skip=False)
    paths = owntext.split(source, tmp_path / "copy", skip=True)
    what = "left out from there on" if kind == "bad json" else "left out"
    assert f"{what}: {source}/bad" in capsys.readouterr().out
    copied = [text for path in paths.values() for text in prepare.parquet_documents(path)]
    assert set(TEXTS) <= set(copied) and len(copied) <= len(TEXTS) + 1


def test_empty_rows_are_counted_and_a_name_does_not_color_the_terminal(tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    rows = [{"text": None}, {"text": " \n\u3000"}, {"text": ""}]
    (source / "a.jsonl").write_text(jsonl(TEXTS) + "".join(json.dumps(row) + "\n" for row in rows))
    result = prepare_own(source, tmp_path / "cache")
    assert result.returncode == 0, result.stdout
    assert "left out: rows or documents without text, 3 of them" in result.stdout
    assert sorted(sum(documents_of(tmp_path / "cache").values(), [])) == sorted(TEXTS)

    (source / "\x1b[31mred\udcff.txt").write_bytes(b"\0")
    result = prepare_own(source, tmp_path / "cache")
    refused(result, r"\x1b[31mred\udcff.txt contains zero bytes", "--skip-unreadable")
    assert "\x1b" not in result.stdout
    result = program("prepare.py", "--source", source, "--vocab-size", "300", "--skip-unreadable",
                     AUTORESEARCH_CACHE_DIR=tmp_path / "cache")
    assert result.returncode == 0, result.stdout
    assert r"left out: " in result.stdout and "\x1b" not in result.stdout


@pytest.mark.parametrize("space", ["\t", "\u3000"])
def test_a_million_spaces_are_tokenized_to_the_same_bytes(space, tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    long = "before" + space * (10**6 // len(space)) + "after"
    (source / "a.jsonl").write_text(jsonl([*TEXTS, long]))
    result = prepare_own(source, tmp_path / "cache")
    assert result.returncode == 0, result.stdout[-2000:]
    assert long in sum(documents_of(tmp_path / "cache").values(), [])


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    """200 MB in a file of documents, and in one line without an end: a few MB at a time."""
    monkeypatch.setattr(owntext, "SHARD_BYTES", 2**24)
    monkeypatch.setattr(owntext, "ROW_GROUP_BYTES", 2**20)
    monkeypatch.setattr(owntext, "HELD_OUT_BYTES", 2**20)
    source = tmp_path / "mine"
    source.mkdir()
    with open(source / "a.txt", "w") as file:
        for number in range(100):
            file.write(f"{number} " * 250_000)
    with open(source / "b.jsonl", "w") as file:
        for number in range(50_000):
            file.write(json.dumps({"text": f"{number} " + "words " * 300}) + "\n")
    tracemalloc.start()
    paths = owntext.split(source, tmp_path / "copy", skip=False)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()
    assert len(paths) >= 10
    sizes = [sum(len(text) for text in prepare.parquet_documents(path)) for path in paths.values()]
    assert max(sizes) < 2**24 + 2 * owntext.LONGEST
    total = sum((source / name).stat().st_size for name in ("a.txt", "b.jsonl"))
    assert 0.85 * total < sum(sizes) < total          # most of the held-out text is left out


def test_a_killed_copy_is_made_again(tmp_path):
    source = tmp_path / "mine.jsonl"
    source.write_text(jsonl(TEXTS))
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ["prepare.py"]
import os, owntext, prepare
split = owntext.split
def killed(*arguments):
    split(*arguments)
    os.kill(os.getpid(), 9)
owntext.split = killed
sys.argv += ["--source", {str(source)!r}, "--vocab-size", "300"]
prepare.main()
"""
    environment = {"AUTORESEARCH_CACHE_DIR": str(tmp_path / "cache"), "AUTORESEARCH_DEVICE": "cpu"}
    child = subprocess.run([sys.executable, "-c", code], env=prepare.os.environ | environment)
    assert child.returncode == -9
    assert prepare_own(source, tmp_path / "cache").returncode == 0
    assert sorted(sum(documents_of(tmp_path / "cache").values(), [])) == sorted(TEXTS)


def test_a_copy_that_has_lost_a_file_is_made_again(tmp_path):
    source, cache = tmp_path / "mine.jsonl", tmp_path / "cache"
    source.write_text(jsonl(TEXTS))
    assert prepare_own(source, cache).returncode == 0
    [copy] = cache.glob("own-*/text/val.parquet")
    copy.unlink()
    again = program("prepare.py", "--source", source, "--vocab-size", 290,
                    AUTORESEARCH_CACHE_DIR=cache)
    assert again.returncode == 0 and copy.exists(), again.stdout


def test_a_name_that_says_nothing_of_its_kind_is_not_downloaded(tmp_path):
    result = program("prepare.py", "--source", "http://localhost:9/file?id=5",
                     AUTORESEARCH_CACHE_DIR=tmp_path)
    refused(result, "http://localhost:9/file?id=5: its name has none of the endings .parquet")


def test_the_vocabulary_that_was_prepared_is_the_one_that_train_py_takes(tmp_path, monkeypatch):
    source, cache = tmp_path / "mine.jsonl", tmp_path / "cache"
    source.write_text(jsonl(TEXTS))
    command = ["prepare.py", "--source", source]
    place = {"AUTORESEARCH_CACHE_DIR": cache}
    refused(program(*command, **place), "too short for a vocabulary of 8192", "--vocab-size")
    assert program(*command, "--vocab-size", 300, **place).returncode == 0
    said = program(*command, "--vocab-size", 290, **place).stdout
    assert "train.py takes the vocabulary of 300 unless" in said and "vocab_size=290" in said
    monkeypatch.setattr(prepare, "CACHE", cache)
    runs = prepare.Run(), prepare.Run(290)
    assert [run.vocab_size for run in runs] == [300, 290]
    for run in runs:
        run.channel.send("fail", "the test is over")


def test_the_same_source_takes_the_settings_of_another_dataset(tmp_path, monkeypatch):
    source = tmp_path / "mine.jsonl"
    source.write_text(jsonl(TEXTS))
    command = ["prepare.py", "--source", source, "--vocab-size", 300]
    for more, recipe in ([], "sotu"), (["--dataset", "tinystories"], "tinystories"), (
            [], "tinystories"):
        result = program(*command, *more, AUTORESEARCH_CACHE_DIR=tmp_path / "cache")
        assert result.returncode == 0, result.stdout
        choice = json.loads((tmp_path / "cache" / "dataset.json").read_text())
        assert (choice["recipe"], choice["context"]) == (
            recipe, prepare.DATASETS[recipe].context)
