"""Downloads from a local server that misbehaves: broken off, truncated, wrong, failing, gone."""

import gzip
import hashlib
import http.server
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

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
        self.tokens = []        # the Authorization header of each request, or None
        self.sleeps = []        # seconds that prepare.py slept between attempts
        self.stopped = threading.Event()
        self.tag = None
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    """A fault is a status, a dict of headers to add or change, or a word."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        body = server.files.get(self.path)
        fault = server.faults.pop(0) if server.faults else None
        server.tokens.append(self.headers.get("Authorization"))
        if isinstance(fault, tuple):                    # a status with headers
            self.send_response(fault[0])
            for name, value in fault[1].items():
                self.send_header(name, value)
            self.send_header("Content-Length", 0)
            return self.end_headers()
        if isinstance(fault, int):
            return self.send_error(fault)
        if body is None:
            return self.send_error(404)
        if fault == "hang up":
            return self.connection.close()
        # The tag is a hash, but not the sha256 of the bytes, as in the storage behind the hub.
        tag = server.tag or f'"{hashlib.sha3_256(body).hexdigest()}"'
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        start = 0
        glued = fault in ("other tag", "other range")   # continues with a file that has changed
        if asked and fault != "no range" and (glued or self.headers.get("If-Range") == tag):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        part = body[start:]
        headers = {"Content-Length": len(part), "ETag": tag}
        if not self.path.startswith("/storage/"):
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        if start:
            first = start + (fault == "other range")
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
        match fault:
            case "other tag": headers["ETag"] = '"another"'
            case "cut": part = part[:len(part) // 2]
            case "wrong bytes": part = bytes(len(part))
            case "no length" | "no length, cut": del headers["Content-Length"]
            case "too long": headers["Content-Length"] += 7
            case "gzip":
                part = gzip.compress(part)
                headers |= {"Content-Encoding": "gzip", "Content-Length": len(part)}
            case "chunked" | "chunked, cut":
                del headers["Content-Length"]
                headers["Transfer-Encoding"] = "chunked"
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault in ("chunked", "chunked, cut"):
            half = len(part) // 2
            part = b"%x\r\n%b\r\n" % (half, part[:half]) + b"%x\r\n%b\r\n0\r\n\r\n" % (
                len(part) - half, part[half:])
            if fault == "chunked, cut":
                part = part[:half + 100]
        if fault in ("stall", "trickle"):
            self.wfile.write(part[:1000])
            for byte in range(1000, 1050):
                if server.stopped.wait(0.1 if fault == "trickle" else 5):
                    break
                self.wfile.write(part[byte:byte + 1])
        else:
            self.wfile.write(part)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setattr(prepare.time, "sleep", server.sleeps.append)
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()


BODY = bytes(range(256)) * 9000         # 2.3 MB: more than one block


def test_a_download_broken_off_twice_goes_on_where_it_stopped(server, tmp_path):
    server.files["/a.bin"] = BODY
    server.faults = ["cut", "cut"]
    prepare.download(server.url + "/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY
    starts = [int(asked[6:-1]) for asked in server.ranges if asked]
    assert server.ranges[0] is None and len(starts) == 2 and 0 < starts[0] < starts[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin"]


SHA256 = f'"{hashlib.sha256(BODY).hexdigest()}"'
OLD_DATE = "Wed, 21 Oct 2015 07:28:00 GMT"


@pytest.mark.parametrize("faults", [
    [500, 503, 429, 408], ["hang up"], ["stall"], ["trickle"], ["wrong bytes"],
    ["cut", "no range"], ["cut", 416], ["cut", "other tag"], ["cut", "other range"],
    ["no length"], ["no length, cut"], ["too long"], ["gzip"], ["cut", "gzip"], ["chunked"],
    ["chunked, cut"], [(503, {"Retry-After": "30"})], [(429, {"Retry-After": OLD_DATE})],
    [(429, {"Retry-After": "soon"})], [(302, {"Location": "/b.bin"})],
    [(302, {"Location": "/storage/a.bin", "X-Linked-ETag": SHA256})],
    [(302, {"Location": "/storage/a.bin", "X-Linked-ETag": SHA256}), "wrong bytes"],
    [(307, {"Location": "http://localhost:{port}/b.bin"}), "cut"]], ids=str)
def test_fault_that_passes_ends_with_the_right_bytes(faults, server, tmp_path, monkeypatch):
    """Each at the first request, or at one after the other."""
    monkeypatch.setattr(prepare, "TIMEOUT", 0.5)
    server.files |= {"/a.bin": BODY, "/b.bin": BODY, "/storage/a.bin": BODY}
    for fault in faults:
        if isinstance(fault, tuple) and "Location" in fault[1]:
            where = fault[1]["Location"].format(port=server.server_port)
            fault = fault[0], fault[1] | {"Location": where}
        server.faults.append(fault)
    prepare.download(server.url + "/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    assert not server.faults and len(server.sleeps) <= len(faults)
    if "'30'" in str(faults):
        assert server.sleeps == [30]
    if OLD_DATE in str(faults):
        assert server.sleeps == [0]


@pytest.mark.parametrize("name,faults,words", [
    ("a.bin", [500] * 6, "500"),
    ("a.bin", [404], "404"),
    ("a.bin", [401], "401 Client Error: Unauthorized.*set HF_TOKEN"),
    ("a.bin", [(429, {"Retry-After": "7200"})], "429"),
    ("a.bin", [(302, {"Location": "/a.bin"})] * 40, "redirects"),
    ("a.bin", [(302, {"Location": "http://[broken"})], "a.bin"),
    ("a.bin", ["cut"] * 6, "the connection broke"),
    ("a.bin", ["wrong bytes"] * 6, "its sha256 is not the one"),
    ("cut.parquet", [], "not a parquet file"),
    ("page.parquet", [], "not a parquet file"),
    ("a%2f..%2fb\x1b[31m.bin", [404], r"b%1B\[31m.bin|b\\x1b\[31m.bin")], ids=str)
def test_fault_that_stays_ends_in_a_sentence_and_loses_nothing(name, faults, words, server,
                                                               tmp_path):
    cut = parquet(["text"])[:-9]
    server.files |= {"/a.bin": BODY, "/good.bin": BODY, "/cut.parquet": cut,
                     "/page.parquet": b"<html>please log in</html>"}
    prepare.download_all([server.url + "/good.bin"], tmp_path, 1, "uv run prepare.py")
    server.faults = list(faults)
    with pytest.raises(SystemExit, match=words) as stop:
        prepare.download_all([f"{server.url}/good.bin", f"{server.url}/{name}"], tmp_path, 1,
                             "uv run prepare.py")
    assert "To continue, run: uv run prepare.py" in str(stop.value)
    assert "\x1b" not in str(stop.value)
    assert (tmp_path / "good.bin").read_bytes() == BODY
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".part", ".tag")
                and path.name != "good.bin"]
    server.faults = []
    if name == "a.bin":                                 # the state that it left can be gone on from
        prepare.download(f"{server.url}/{name}", tmp_path / name)
        assert (tmp_path / name).read_bytes() == BODY


def test_fault_of_the_own_disk_is_not_tried_again(server, tmp_path, monkeypatch):
    server.files["/a.bin"] = BODY

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prepare.download(server.url + "/a.bin", tmp_path / "a.bin")
    assert not server.sleeps and len(server.ranges) == 1


@pytest.mark.parametrize("url,name", [
    ("http://host/a/b.txt?download=1", "b.txt"), ("http://host/a/..", "download"),
    ("http://host", "download"), ("http://host/a%2f..%2fb.txt", "a%2f..%2fb.txt")])
def test_names_of_files_stay_in_their_folder(url, name):
    assert prepare.file_name(url) == name


def test_a_token_goes_to_the_hub_alone(server, tmp_path, monkeypatch):
    """Not to the host that the hub sends it on to, nor to other servers."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(prepare, "HUB", f"http://localhost:{server.server_port}")
    server.files |= {"/a.bin": BODY, "/b.bin": BODY}
    server.faults = [(302, {"Location": f"{server.url}/b.bin"})]
    prepare.download(f"{prepare.HUB}/a.bin", tmp_path / "a.bin")
    prepare.download(f"{server.url}/b.bin", tmp_path / "b.bin")
    assert server.tokens == ["Bearer hf_secret", None, None]


def test_the_hub_is_the_one_of_hf_endpoint():
    code = "import prepare; print(prepare.DATASETS['climbmix'].url)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                           env=os.environ | {"HF_ENDPOINT": "http://mirror:8080/"}).stdout
    assert found == "http://mirror:8080/datasets/karpathy/climbmix-400b-shuffle/resolve/main\n"


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


def test_a_file_without_texts_is_fetched_once(server, tmp_path):
    server.files["/a.parquet"] = parquet(["text"]).replace(b"text", b"next")
    with pytest.raises(SystemExit, match="a.parquet: it has no column named text"):
        prepare.download_all([server.url + "/a.parquet"], tmp_path, 1, "uv run prepare.py")
    assert server.ranges == [None] and not (tmp_path / "a.parquet.part").exists()


def test_ctrl_c_ends_the_downloads_at_once(server, tmp_path):
    """Not after those that are going on, which here take half a minute each."""
    server.files |= {f"/{n}.bin": BODY for n in range(9)}
    server.faults = ["stall"] * 9
    urls = [f"{server.url}/{n}.bin" for n in range(9)]
    code = f"import prepare; prepare.download_all({urls}, prepare.Path({str(tmp_path)!r}), 2, 'it')"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for _ in range(600):
        if list(tmp_path.glob("*.part")):
            break
        server.stopped.wait(0.1)
    child.send_signal(signal.SIGINT)
    start = time.monotonic()
    said, _ = child.communicate(timeout=60)
    assert time.monotonic() - start < 5 and child.returncode == 1
    assert "stopped; what has arrived is kept. To continue, run: it" in said
    assert "Traceback" not in said and list(tmp_path.glob("*.part"))


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
