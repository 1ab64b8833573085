"""Downloads from a local server that misbehaves: broken off, truncated, wrong, failing, gone."""

import hashlib
import http.server
import random
import shutil
import threading

import pyarrow
import pyarrow.parquet
import pytest

import prepare
from children import ROOT, copy_programs, program


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path. `faults` lists what goes wrong with the next requests, in order."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.faults = []
        self.ranges = []        # the Range header of each request for a file, or None
        self.tag = None
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        body = self.server.files.get(self.path)
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        if body is None:
            return self.send_error(404)
        tag = self.server.tag or f'"{hashlib.sha256(body).hexdigest()}"'
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        start = 0
        if asked and fault != "no range" and self.headers.get("If-Range") == tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(body) - start)
        self.send_header("ETag", tag)
        self.end_headers()
        part = body[start:]
        if fault == "cut":
            part = part[:len(part) // 2]
            self.close_connection = True
        if fault == "wrong bytes":
            part = bytes(len(part))
        self.wfile.write(part)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    server = Server()
    yield server
    server.shutdown()


BODY = bytes(range(256)) * 9000         # 2.3 MB: more than one block


def test_a_download_broken_off_twice_goes_on_where_it_stopped(server, tmp_path):
    server.files["/a.bin"] = BODY
    server.faults = ["cut", "cut"]
    prepare.download(server.url + "/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY
    starts = [int(asked[6:-1]) for asked in server.ranges if asked]
    assert server.ranges[0] is None and len(starts) == 2 and 0 < starts[0] < starts[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin"]


@pytest.mark.parametrize("faults", [[500, 503, 429], ["wrong bytes"], ["cut", "no range"]])
def test_errors_wrong_bytes_and_servers_without_ranges_are_survived(server, tmp_path, faults):
    server.files["/a.bin"] = BODY
    server.faults = faults
    prepare.download(server.url + "/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_two_versions_of_a_file_are_never_glued_together(server, tmp_path):
    server.files["/a.bin"] = bytes(len(BODY))
    server.faults = ["cut"] + [500] * 20
    with pytest.raises(OSError):
        prepare.download(server.url + "/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin.part").stat().st_size > 0
    assert not (tmp_path / "a.bin").exists()
    server.files["/a.bin"] = BODY
    server.faults = []
    prepare.download(server.url + "/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_missing_file_is_not_asked_for_twice_and_the_error_names_it(server, tmp_path, capsys):
    server.files["/a.bin"] = BODY
    urls = [server.url + "/a.bin", server.url + "/gone.bin"]
    with pytest.raises(SystemExit) as stop:
        prepare.download_all(urls, tmp_path, 2, "uv run prepare.py")
    for words in ("gone.bin", "404", "uv run prepare.py"):
        assert words in str(stop.value)
    assert (tmp_path / "a.bin").read_bytes() == BODY


def test_a_web_page_instead_of_parquet_is_refused(server, tmp_path):
    server.files["/a.parquet"] = b"<html>please log in</html>" * 10
    server.tag = '"x"'
    with pytest.raises(OSError, match="not a parquet"):
        prepare.download(server.url + "/a.parquet", tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


def parquet(texts):
    """The bytes of a parquet file of several row groups."""
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, sink, row_group_size=256, compression="zstd")
    return sink.getvalue().to_pybytes()


def test_climbmix_end_to_end_from_a_local_server(server, tmp_path, monkeypatch, capsys):
    """Shards, pinned validation and test, row groups: with the real reader and tokenizer."""
    monkeypatch.setattr(prepare, "CACHE", tmp_path)
    for number in (0, 1, prepare.CLIMBMIX_LAST - 1, prepare.CLIMBMIX_LAST):
        texts = [f"document {i} of shard {number}, which says little. " * 5 for i in range(700)]
        server.files[f"/shard_{number:05d}.parquet"] = parquet(texts)
    dataset = prepare.Dataset("climbmix", 2048, 300, "climbmix", server.url, eval_bytes=2_000_000)
    server.faults = [503, "cut"]
    assert prepare.prepare(dataset, 300, 2, 2, "uv run prepare.py")

    chosen = prepare.chosen_dataset()
    assert chosen.shards == ("train-00000", "train-00001", "val", "test")
    folder = prepare.folder_of(chosen, 300)
    manifest = prepare.read_json(folder / "manifest.json")
    tokenizer = prepare.load_tokenizer(folder)
    numbers = {"train-00001": 1, "test": prepare.CLIMBMIX_LAST - 1, "val": prepare.CLIMBMIX_LAST}
    for name, number in numbers.items():
        tokens, offsets = prepare.open_shard(folder, name, manifest[name])
        assert len(offsets) == 701
        text = tokenizer.decode(tokens[offsets[300]:offsets[301]].tolist())
        assert text.startswith(f"document 300 of shard {number},")

    requests = len(server.ranges)
    assert not prepare.prepare(chosen, 300, None, 2, "uv run prepare.py")
    assert len(server.ranges) == requests


def test_tinystories_from_a_local_server_to_its_number(server, tmp_path, monkeypatch):
    """Test, validation and training are ranges of rows of one file; then a run of a second."""
    cache, clone = tmp_path / "cache", tmp_path / "clone"
    monkeypatch.setattr(prepare, "CACHE", cache)
    monkeypatch.setattr(prepare, "TINYSTORIES_HELD_OUT", 300)
    monkeypatch.setattr(prepare, "TINYSTORIES_ROWS", 500)
    letters = random.Random(0)
    words = ["".join(letters.choices("aeilmnorst", k=6)) for _ in range(200)]
    stories = [f"Once there was {' '.join(letters.choices(words, k=5 + i % 90))}."
               for i in range(1600)]
    server.files["/tinystories_gpt4_clean.parquet"] = parquet(stories)
    dataset = prepare.Dataset("tinystories", 512, 400, "tinystories", server.url, 400_000)
    assert prepare.prepare(dataset, 400, 3, 2, "uv run prepare.py")

    folder = prepare.folder_of(dataset, 400)
    manifest = prepare.read_json(folder / "manifest.json")
    tokenizer = prepare.load_tokenizer(folder)
    for name, row in ("test", 0), ("val", 300), ("train-00000", 600), ("train-00001", 1100):
        tokens, offsets = prepare.open_shard(folder, name, manifest[name])
        assert tokenizer.decode(tokens[:offsets[1]].tolist()) == stories[row]
    assert manifest["train-00001"]["documents"] == 500      # and none in the third

    clone.mkdir()
    copy_programs(clone)
    shutil.copy(ROOT / "tests" / "small.py", clone / "train.py")
    result = program("train.py", cwd=clone, AUTORESEARCH_CACHE_DIR=cache,
                     AUTORESEARCH_TIME_BUDGET=1)
    assert result.returncode == 0 and "dataset:          tinystories" in result.stdout, (
        result.stdout)


def test_source_url_end_to_end(server, tmp_path):
    paragraphs = [f"Paragraph {i} has its own words, {i * i} of them." for i in range(500)]
    server.files["/mine.txt"] = "\n\n".join(paragraphs).encode()
    result = program("prepare.py", "--source", server.url + "/mine.txt", "--vocab-size", 300,
                     AUTORESEARCH_CACHE_DIR=tmp_path)
    assert result.returncode == 0 and "own-mine" in result.stdout, result.stdout
