"""Child processes for the tests: forks of a process that has torch imported already, which saves seconds each."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "tiktoken", "numpy", "requests"])


def script(path, arguments, cwd, environment, output):
    """In the child: run a script as the main program, with its output in a file."""
    os.chdir(cwd)
    os.environ.update(environment)
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import torch
    torch.set_num_threads(int(environment.get("THREADS", 2)))
    sys.argv, sys.path[0] = [str(path), *arguments], str(path.parent)
    runpy.run_path(str(path), run_name="__main__")


def forked(path, *arguments, cwd=None, **environment):
    """Run a script as a child process of its own; stdout and stderr come back as one text."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("AUTORESEARCH_")}
    with tempfile.NamedTemporaryFile("r") as output:
        child = FORKS.Process(target=script, args=(path, [str(a) for a in arguments], cwd or path.parent,
                                                   settings | {k: str(v) for k, v in environment.items()}, output.name))
        child.start()
        child.join(200)
        if child.exitcode is None:
            child.kill()
            child.join()
        return subprocess.CompletedProcess([path], child.exitcode, output.read())


def program(name, *arguments, cwd=ROOT, **environment):
    """One of the two programs, by name."""
    return forked(cwd / name, *arguments, **environment)
