"""Child processes for the tests, forked from a process with torch imported: saves seconds each."""

import json
import multiprocessing
import os
import queue
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
LONG = bool(os.environ.get("AUTORESEARCH_LONG_TESTS"))      # an hour more of tests
PATIENCE = 200          # seconds after which a child is killed
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "tiktoken", "numpy", "requests"])
# Both start() and join() collect exit statuses, of other children too. Two threads that do so at
# the same moment can lose one.
COLLECTING = threading.Lock()


def script(path, arguments, cwd, environment, output):
    """In the child: run a script as the main program, with its output in a file."""
    os.chdir(cwd)
    os.environ.update(environment)
    if "CORE" in environment:
        os.sched_setaffinity(0, {int(environment["CORE"])})
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import torch
    torch.set_num_threads(int(environment.get("THREADS", 2)))
    sys.argv = [str(path), *arguments]
    sys.path[0] = str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


def forked(path, *arguments, cwd=None, **environment):
    """Run a script as a child process. Its stdout and stderr come back as one text."""
    arguments = [str(argument) for argument in arguments]
    settings = {name: os.environ[name] for name in os.environ if name.startswith("AUTORESEARCH_")}
    settings |= {name: str(value) for name, value in environment.items()}
    cwd = cwd or path.parent
    with tempfile.NamedTemporaryFile("r") as output:
        child = FORKS.Process(target=script, args=(path, arguments, cwd, settings, output.name))
        with COLLECTING:
            child.start()
        wait([child.sentinel], PATIENCE)
        with COLLECTING:
            if child.exitcode is None:
                child.kill()
            child.join()
        return subprocess.CompletedProcess([path], child.exitcode, output.read())


def one_a_core(job, names):
    """
    {name: job(name, core)}: one at a time on each core of this machine. Two runs on one core would
    refuse to run together.
    """
    cores = queue.SimpleQueue()
    for core in os.sched_getaffinity(0):
        cores.put(core)

    def on_a_core(name):
        core = cores.get()
        try:
            return job(name, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        return dict(zip(names, pool.map(on_a_core, names)))


def program(name, *arguments, cwd=ROOT, **environment):
    """Run one of the project's programs, by name."""
    return forked(cwd / name, *arguments, **environment)


def copy_programs(folder):
    """Copy the project's programs into a folder, all but train.py: a test writes its own."""
    for path in ROOT.glob("*.py"):
        if path.name != "train.py":
            shutil.copy(path, folder)


class Place:
    """A clone with small.py as its train.py, a cache, and a folder for temporary files."""

    def __init__(self, folder):
        self.clone, self.cache, self.tmp = folder / "clone", folder / "cache", folder / "tmp"
        self.clone.mkdir()
        self.tmp.mkdir()
        copy_programs(self.clone)
        text = (self.clone / "prepare.py").read_text()
        (self.clone / "prepare.py").write_text(text.replace("STALE = 60 ", "STALE = 0 "))
        result = program("prepare.py", "--dataset", "sotu", "--vocab-size", 400, "--eval-bytes",
                         20_000, AUTORESEARCH_CACHE_DIR=self.cache)
        assert result.returncode == 0, result.stdout
        self.text = (ROOT / "tests" / "small.py").read_text()
        self.environment = os.environ | {
            "AUTORESEARCH_CACHE_DIR": str(self.cache), "TMPDIR": str(self.tmp),
            "AUTORESEARCH_TIME_BUDGET": "0.3", "OMP_NUM_THREADS": "1"}

    def start(self, fault="pass"):
        log = "run.log(step, loss)\n"
        text = self.text.replace(log, f"if step == 3:\n                {fault}\n            {log}")
        assert fault in text
        (self.clone / "train.py").write_text(text)
        return subprocess.Popen([sys.executable, "train.py"], cwd=self.clone, text=True,
                                env=self.environment, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)

    def lines(self):
        """The journal, whose every line is whole."""
        journal = self.cache / "journal.jsonl"
        text = journal.read_text() if journal.exists() else ""
        assert text.endswith("\n") or not text
        return [json.loads(line) for line in text.splitlines()]

    def referees(self):
        return [process for process in psutil.process_iter(["cmdline"])
                if str(self.clone / "referee.py") in (process.info["cmdline"] or [])]

    def wait(self):
        """Until no referee of this clone is left."""
        _, left = psutil.wait_procs(self.referees(), 30)
        assert not left

    def left(self):
        """What lies in the folder for temporary files."""
        known = "autoresearch-devices", "torchinductor_" + os.environ.get("USER", "root")
        return sorted(path.name for path in self.tmp.iterdir() if path.name not in known)
