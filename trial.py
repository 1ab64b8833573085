"""
A run of train.py in the background: coding agents cut off commands that take minutes.

    uv run trial.py 42                      # start one on seed 42
    uv run trial.py pair                    # start HEAD and the last kept commit: pair.py
    uv run trial.py COMMIT:42 COMMIT:43     # start several at once, on several GPUs: wave.py
    uv run trial.py wait                    # until it ends, 100 s at most; then the end of its log
    uv run trial.py stop
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

RESULTS = Path("results.tsv")
STATE = Path("trial.json")                  # the last run that was started here
KEYS = {"pid": int, "started": float, "log": Path, "command": list}
DETACHED = {"start_new_session": True}      # outlives the command and the agent that started it
if sys.platform == "win32":
    DETACHED = {"creationflags": subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP}


def last():
    """{pid, started, log, command} of the last run that was started here; {} if there is none."""
    try:
        found = json.loads(STATE.read_text("utf-8"))
        return {key: kind(found[key]) for key, kind in KEYS.items()}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def going():
    """The process of that run, or None once it has ended."""
    try:
        run = last()
        process = psutil.Process(run["pid"])
        # Not a later process with its number. A system may name the program by another path.
        same = process.cmdline()[1:] == run["command"][1:]
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (KeyError, ValueError, psutil.Error):
        return None


def git(*command):
    result = subprocess.run(["git", *command], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def budget_of_the_night():
    """The seconds of training that program.md names, as text; None if it names none."""
    program = Path("program.md")
    text = program.read_text("utf-8", errors="replace") if program.exists() else ""
    found = re.search(r"^Budget:(.*)", text, re.M)
    if found and not re.match(r" [\d.]+ seconds\b", found[1]):
        sys.exit(f"program.md says 'Budget:{found[1]}' instead of, say, 'Budget: 300 seconds'")
    return found and found[1].split()[0]


def start(runs, budget):
    """Start train.py on the seed runs[0], or pair.py, or wave.py with runs like COMMIT:SEED."""
    if process := going():
        sys.exit(f"a run is going, process {process.pid}; wait for it: uv run trial.py wait")
    if not RESULTS.exists():
        RESULTS.write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n", "utf-8")
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if budget := budget or environment.get("AUTORESEARCH_TIME_BUDGET") or budget_of_the_night():
        environment["AUTORESEARCH_TIME_BUDGET"] = budget
    if runs == ["pair"]:
        command, log = [sys.executable, os.path.abspath("pair.py")], Path("pair.out")
    elif ":" in runs[0]:
        command = [shutil.which("uv") or "uv", "run", "--script", os.path.abspath("wave.py"), *runs]
        log = Path("wave.out")
    elif len(runs) > 1 or not runs[0].isdecimal():
        sys.exit(f"{' '.join(runs)} is neither a seed, nor pair, nor runs like COMMIT:SEED")
    elif git("status", "--porcelain", "--", "train.py"):
        sys.exit("train.py is not as committed, so its number would belong to no commit; first:\n"
                 '    git commit -m "<the idea, and why it should help>" -- train.py')
    else:
        environment["AUTORESEARCH_SEED"] = runs[0]
        commit = git("rev-parse", "--short", "HEAD") or "nogit"
        log = Path(f"run-{commit}-{runs[0]}-{time.strftime('%d%H%M%S')}.log")
        command = [sys.executable, os.path.abspath("train.py")]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file,
                                   stderr=subprocess.STDOUT, env=environment, **DETACHED)
    state = {"pid": process.pid, "started": time.time(), "log": str(log), "command": command}
    STATE.write_text(json.dumps(state), "utf-8")
    print(f"started: {log}")


def wait(seconds):
    """Wait for the run to end. Print its number and what follows, or the last lines of its log."""
    run = last() or sys.exit("no run was started here; start one: uv run trial.py 42")
    if process := going():
        psutil.wait_procs([process], seconds)
    log = run["log"].read_text("utf-8", errors="replace") if run["log"].exists() else ""
    lines = log.splitlines()
    if going():
        since = time.time() - run["started"]
        print(f"{run['log']}: going for {since:.0f} s", *lines[-1:], sep="\n")
    else:
        summary = lines.index("---") if "---" in lines else len(lines) - 20
        print(f"{run['log']}: ended", *lines[max(0, summary):], sep="\n")


def stop():
    if process := going():
        family = [process, *process.children(recursive=True)]
        process.terminate()
        # What it has started ends with it, except on Windows and where it hangs.
        for each in psutil.wait_procs(family, 30)[1]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        print(f"stopped process {process.pid}")
    else:
        print("no run is going")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+",
                        help="a seed, pair, runs like COMMIT:SEED, wait, or stop")
    parser.add_argument("--budget", metavar="SECONDS",
                        help="of training; by default what program.md names, or 300")
    arguments = parser.parse_args()
    match arguments.what:
        case ["wait"]: wait(100)
        case ["stop"]: stop()
        case runs: start(runs, arguments.budget)
