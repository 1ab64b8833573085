"""
wave.py with a stub train.py: on this machine alone, on two machines, on a machine with three GPUs.
The machines are Ray nodes on this host, their GPUs numbers without a card.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from children import LONG, ROOT, copy_programs

STUB = """
import json, os, signal, sys, time
from pathlib import Path

BEHAVIOR, SECONDS = "ok", 2.0
cache = Path(os.environ["AUTORESEARCH_CACHE_DIR"])
facts = {"pid": os.getpid(), "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "nice": os.nice(0),
         "threads": os.environ.get("OMP_NUM_THREADS"), "cores": sorted(os.sched_getaffinity(0)),
         "wave": os.environ["AUTORESEARCH_WAVE"], "seed": os.environ["AUTORESEARCH_SEED"]}

def note(word):
    with open(cache / "notes", "a") as file:
        file.write(json.dumps(facts | {"word": word, "at": time.time()}) + "\\n")

note("start")
if BEHAVIOR == "hangs":
    time.sleep(1000)
while BEHAVIOR == "meets two others" and (cache / "notes").read_text().count('"start"') < 3:
    time.sleep(0.1)
if BEHAVIOR == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if BEHAVIOR == "fails":
    sys.exit("FAIL: the model reads ahead")
time.sleep(SECONDS)
line = {"wave": facts["wave"], "val_bpb": 1.25, "test_bpb": 1.9876543}
with open(cache / "journal.jsonl", "a") as file:
    file.write(json.dumps(line) + "\\n")
note("end")
print("val_bpb:          1.250000\\npeak_vram_mb:     512.0\\nnum_steps:        77")
"""

# A tenth of a real run: the harness is all there, the model is a table.
TABLE = """
import prepare
import torch
from torch import nn

with prepare.Run(512) as run:
    model = nn.Embedding(512, 512)
    optimizer = torch.optim.SGD(model.parameters(), lr=10)
    for step, (x, y) in enumerate(run.batches(8)):
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    run.evaluate_bpb(model)
    run.report(num_steps=step, num_params=512 ** 2, depth=1, flops_per_token=1)
"""


@pytest.fixture(scope="module")
def python():
    """The Python that `uv run --script wave.py` takes, with Ray."""
    if not shutil.which("uv"):
        pytest.skip("uv is not installed, which installs Ray")
    script = ROOT / "wave.py"
    made = subprocess.run(["uv", "sync", "-q", "--script", script], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"Ray can't be installed here: {made.stderr.strip()[-200:]}")
    found = subprocess.run(["uv", "python", "find", "--script", script], capture_output=True,
                           text=True, check=True)
    return found.stdout.strip()


class Checkout:
    """A repository with wave.py and a stub train.py, and a cache with something prepared."""

    def __init__(self, folder, python):
        self.folder, self.python = folder / "checkout", python
        self.cache = folder / "cache"
        self.folder.mkdir()
        copy_programs(self.folder)
        self.git("init", "-q", "-b", "main")
        (self.folder / ".gitignore").write_text("run-*.log\n")
        self.ok = self.commit()
        prepared = self.cache / "text" / "vocab-64"
        prepared.mkdir(parents=True)
        dataset = {"name": "text", "shards": ["a"]}
        (self.cache / "dataset.json").write_text(json.dumps(dataset))
        splits = {"val": {"text_sha256": "v"}, "test": {"text_sha256": "t"}}
        (prepared / "manifest.json").write_text(json.dumps(splits))

    def git(self, *arguments):
        who = "-c", "user.name=test", "-c", "user.email=test@example.com"
        return subprocess.run(["git", *who, *arguments], cwd=self.folder, capture_output=True,
                              text=True, check=True).stdout.strip()

    def commit(self, behavior="ok", seconds=2.0, text=STUB):
        """Commit a train.py and return the short hash."""
        text = text.replace('"ok", 2.0', f'"{behavior}", {seconds}')
        (self.folder / "train.py").write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", behavior)
        return self.git("rev-parse", "--short", "HEAD")

    def start(self, *arguments, **environment):
        env = os.environ | {"AUTORESEARCH_CACHE_DIR": str(self.cache),
                            "UV_PROJECT_ENVIRONMENT": sys.prefix} | environment
        return subprocess.Popen([self.python, "wave.py", *arguments], cwd=self.folder, text=True,
                                env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def wave(self, *arguments, **environment):
        """(exit status, output) of a wave."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def notes(self, word="start"):
        path = self.cache / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        return [note for note in map(json.loads, lines) if note["word"] == word]

    def journal(self):
        return [json.loads(line)
                for line in (self.cache / "journal.jsonl").read_text().splitlines()]

    def logs(self):
        return sorted(self.folder.glob("run-*.log"))


@pytest.fixture
def checkout(tmp_path, python):
    return Checkout(tmp_path, python)


def until(condition, seconds=60):
    """Wait until the condition holds; False if it does not in time."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def gone(notes):
    return all(not psutil.pid_exists(note["pid"]) for note in notes)


class Cluster:
    """Ray nodes on this host, of which each is a machine with made-up GPUs."""

    def __init__(self, python, head_gpus):
        self.ray = str(Path(python).with_name("ray"))
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")     # sockets want a short path
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.address = f"127.0.0.1:{server.getsockname()[1]}"
        token = Path(self.folder) / "token"
        token.write_text("0123456789abcdef" * 4)
        self.env = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN_PATH": str(token), "RAY_memory_monitor_refresh_ms": "0",
                    # A dead node is noticed after 3 s instead of 30.
                    "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000",
                    "RAY_health_check_failure_threshold": "2",
                    # A node without a head ends after 5 s instead of 60.
                    "RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
        self.start("--head", "--port", self.address.split(":")[1], "--num-gpus", head_gpus,
                   "--include-dashboard", "false", "--temp-dir", self.folder)

    def start(self, *arguments):
        command = [self.ray, "start", "--disable-usage-stats", "--num-cpus", 1,
                   "--object-store-memory", 80_000_000, *arguments]
        made = subprocess.run([str(word) for word in command], env=os.environ | self.env,
                              capture_output=True, text=True, timeout=100)
        assert made.returncode == 0, made.stdout + made.stderr

    def add(self, gpus, *arguments):
        """Start a node and return its process."""
        before = set(self.processes("raylet"))
        self.start("--address", self.address, "--num-gpus", gpus, *arguments)
        [node] = set(self.processes("raylet")) - before
        return node

    def processes(self, name=""):
        found = []
        for process in psutil.process_iter(["name", "cmdline"]):
            words = process.info["cmdline"] or []
            if name in process.info["name"] and any(self.folder in word for word in words):
                found.append(process)
        return found

    def stop(self):
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def cluster(python, head_gpus=0):
    made = Cluster(python, head_gpus)
    try:
        yield made
    finally:
        made.stop()

# ------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not LONG, reason="takes half a minute: AUTORESEARCH_LONG_TESTS=1 runs it")
def test_runs_that_fail_hang_or_die_end_alone(checkout):
    commits = {word: checkout.commit(word) for word in ("fails", "dies", "hangs")}
    ok = checkout.ok
    (checkout.folder / "train.py").write_text("raise SystemExit('the tree is being edited')")
    runs = [f"{ok}:42", f"{ok}:42", *(f"{commit}:43" for commit in commits.values()), f"{ok}:44"]
    status, output = checkout.wave(*runs, "--limit", "5")
    assert status == 1
    assert output.count("val_bpb 1.250000  0.5 GB  77 steps") == 3, output
    assert "FAIL: the model reads ahead" in output and "killed by signal 9" in output
    assert "FAIL: still running after 5 s, so it was stopped" in output
    assert len(checkout.logs()) == 6 and gone(checkout.notes())
    names = {path.name.split("-")[1] for path in checkout.logs()}
    assert names == {ok, *commits.values()}
    # One at a time, with all of the machine and not at the low priority that Ray would give.
    starts, ends = checkout.notes(), checkout.notes("end")
    assert [each["wave"].split("/")[1:] for each in starts] == [[str(n), "1"] for n in range(1, 7)]
    assert ends[0]["at"] < starts[1]["at"] and ends[1]["at"] < starts[2]["at"]
    for note in starts:
        assert note["nice"] == os.nice(0) and note["threads"] is None
        assert note["cores"] == sorted(os.sched_getaffinity(0))
    # The journal lines are where they were written, once; the sealed number is in no log.
    assert [line["wave"] for line in checkout.journal()] == [note["wave"] for note in ends]
    texts = [output, *(path.read_text() for path in checkout.logs())]
    assert not any("1.98" in text or "test_bpb" in text for text in texts)


def test_the_real_harness_sees_a_clean_commit(checkout, cache):
    commit = checkout.commit(text=TABLE)
    (checkout.folder / "train.py").write_text("raise SystemExit('the tree is being edited')")
    status, output = checkout.wave(f"{commit}:43", AUTORESEARCH_CACHE_DIR=str(cache),
                                   AUTORESEARCH_TIME_BUDGET="1")
    assert status == 0 and "val_bpb" in output, output
    line = json.loads((cache / "journal.jsonl").read_text().splitlines()[-1])
    assert line["commit"] == commit and line["dirty"] is False and line["failure"] is None
    assert line["prepare_changed"] is False and line["seed"] == 43 and line["val_bpb"] > 0
    assert line["wave"].endswith("/1/1") and line["wave"].split("/")[0] in checkout.logs()[0].name
    cores = len(os.sched_getaffinity(0))
    assert line["share"] == {"node": os.uname().nodename, "cores": cores,
                             "of": os.cpu_count(), "nice": os.nice(0)}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_killed_leaves_no_run_behind(checkout, signum):
    driver = checkout.start(f"{checkout.commit('hangs')}:42", f"{checkout.ok}:42")
    assert until(checkout.notes)
    driver.send_signal(signum)
    output, _ = driver.communicate(timeout=60)
    assert until(lambda: gone(checkout.notes()), 20)
    assert len(checkout.notes()) == 1 and driver.returncode != 0
    if signum == signal.SIGTERM:
        assert "stopped; runs that have ended have their logs" in output
        assert "Traceback" not in output


def test_what_cannot_run_is_said_in_one_sentence(checkout):
    ok = checkout.ok
    loose = checkout.git("commit-tree", "HEAD^{tree}", "-m", "on no branch")
    (checkout.folder / "prepare.py").write_text("# another harness")
    checkout.git("commit", "-q", "-a", "-m", "another harness")
    other = checkout.git("rev-parse", "--short", "HEAD")
    checkout.git("reset", "-q", "--hard", ok)
    checkout.git("branch", "other", other)
    elsewhere = {"RAY_ADDRESS": "127.0.0.1:1"}
    empty = {"AUTORESEARCH_CACHE_DIR": str(checkout.folder / "empty")}
    for run, environment, sentence in [
        ("HEAD", {}, "'HEAD' is not COMMIT:SEED, such as HEAD:42"),
        ("abcdef1:42", {}, "abcdef1 is no commit here; `git log --oneline --all` lists them"),
        (f"{loose}:42", {}, f"so it does not travel: git branch idea/NAME {loose}"),
        (f"{other}:42", {}, f"{other} has another prepare.py than this checkout"),
        (f"{ok}:42", elsewhere, "RAY_ADDRESS=127.0.0.1:1: nobody answers there"),
        (f"{ok}:42", empty, "has no text: in"),
    ]:
        status, output = checkout.wave(run, **environment)
        assert status == 1 and sentence in output, output
        assert len(output.strip().splitlines()) == 1, output
    assert not checkout.notes()


CHECK = """
import json, os, sys
import wave
machine = json.loads(sys.argv[1])
for what, value in (("GPU", "H100"), ("torch", "torch-2.13.0"), ("text", "sotu (1)"),
                    ("prepare.py", wave.sha256(b"prepare"))):
    machine.setdefault(what, value)
other = machine | {"name": "other"} | json.loads(sys.argv[2])
(wave.HERE / "prepare.py").write_bytes(b"prepare")
wave.check([machine | {"name": "one"}, other], "GPU", {"AUTORESEARCH_CACHE_DIR": "/nowhere"})
print("alike")
"""


@pytest.mark.parametrize("other,sentence", [
    ({}, "alike"),
    ({"GPU": "A100"}, "since the GPU differs: H100 on one; A100 on other"),
    ({"torch": "torch-2.12.0"}, "since the torch differs: torch-2.13.0 on one; torch-2.12.0 on o"),
    ({"text": "sotu (2)"}, "since the text differs: sotu (1) on one; sotu (2) on other"),
    ({"prepare.py": "12345678"}, " on this checkout, one; 12345678 on other"),
    ({"torch": None}, "other has no torch: in "), ({"text": None}, "other has no text: in ")])
def test_machines_that_are_not_alike_are_refused_by_name(other, sentence, checkout, python):
    result = subprocess.run([python, "-c", CHECK, "{}", json.dumps(other)], cwd=checkout.folder,
                            capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert sentence in output and "Traceback" not in output
    assert result.returncode == (sentence != "alike")


KEEP = """
import sys
from pathlib import Path
import wave
for line in (b'{"wave": "1"}', b'{"wave": "1"}', b'{"wave": "2"}'):
    wave.keep_line(Path("journal.jsonl"), line + bytes([10]))
"""


def test_a_line_comes_home_once_and_after_one_that_was_cut_off(checkout, python):
    journal = checkout.folder / "journal.jsonl"
    journal.write_bytes(b'{"cut o')
    subprocess.run([python, "-c", KEEP], cwd=checkout.folder, check=True)
    lines = [b'{"cut o', b'{"wave": "1"}', b'{"wave": "2"}', b""]
    assert journal.read_bytes().split(b"\n") == lines


@pytest.mark.skipif(not LONG, reason="takes a minute: AUTORESEARCH_LONG_TESTS=1 runs it")
def test_a_node_that_dies_has_its_runs_started_again(checkout, python):
    slow = checkout.commit(seconds=4)
    with cluster(python) as machines:
        nodes = [machines.add(1), machines.add(1)]
        wrong = checkout.folder / "wrong"
        wrong.write_text("fedcba9876543210" * 4)
        refused = machines.env | {"RAY_AUTH_TOKEN_PATH": str(wrong)}
        status, output = checkout.wave(f"{slow}:42", **refused)
        assert status == 1 and not checkout.notes()
        last = output.strip().splitlines()[-1]              # Ray's own warnings come before it
        assert last.startswith(f"RAY_ADDRESS={machines.address}: "), output
        assert "is its token in ~/.ray/auth_token here" in last and "Traceback" not in output

        driver = checkout.start(*(f"{slow}:{seed}" for seed in range(42, 48)), **machines.env)
        assert until(lambda: len(checkout.notes()) == 2)
        assert len(checkout.notes("end")) == 0                      # two at once
        nodes[1].kill()
        output, _ = driver.communicate(timeout=120)
        assert driver.returncode == 0, output
        assert output.count("val_bpb 1.250000") == 6 and len(checkout.logs()) == 6
        assert "is gone: its runs start again elsewhere" in output and "Traceback" not in output
        lines = checkout.journal()
        assert len({line["wave"] for line in lines}) == len(lines) == 6
        assert len(checkout.notes()) == 7 and gone(checkout.notes())

        machines.add(1, "--resources", '{"accelerator_type:T4": 1}')
        status, output = checkout.wave(f"{slow}:42", **machines.env)
        assert status == 1 and "numbers would not compare, since the GPU differs: " in output
        assert "T4 on " in output and "unknown on " in output


def test_three_gpus_of_a_machine_and_the_loss_of_its_head(checkout, python):
    meets = checkout.commit("meets two others", seconds=0)      # so no run ends before all are on
    with cluster(python, head_gpus=3) as machines:
        runs = [f"{meets}:{seed}" for seed in (42, 43, 44)]
        status, output = checkout.wave(*runs, "--limit", "60", **machines.env)
        assert status == 0, output
        starts = sorted(checkout.notes(), key=lambda note: note["gpu"])
        assert [note["gpu"] for note in starts] == ["0", "1", "2"]
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // 3)         # of two cores, the first one does for two GPUs
        for slot, note in enumerate(starts):
            first = slot * share % len(cores)
            assert note["cores"] == cores[first:first + share] and note["threads"] == str(share)
            assert note["nice"] == os.nice(0)

        driver = checkout.start(f"{checkout.commit('hangs')}:42", **machines.env)
        assert until(lambda: len(checkout.notes()) == 4)
        [head] = machines.processes("gcs_server")
        head.kill()
        output, _ = driver.communicate(timeout=120)
        assert driver.returncode == 1
        assert "the head of the cluster (" in output and "is gone, and 1 runs with it" in output
        assert "Traceback" not in output
        assert until(lambda: gone(checkout.notes()), 60)
