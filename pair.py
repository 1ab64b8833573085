"""
A pair: an idea and the last kept commit on one seed, under the same conditions.

    uv run trial.py pair                    # in the background, as program.md has it
    uv run pair.py [COMMIT]                 # HEAD unless named

On a CPU both train by short turns (Turns in referee.py), so a moment in which the machine is slow
hits both. Elsewhere they run one after the other: the speed of a GPU is steady, and its memory
may not hold two. Each is in a clone of its own, so train.py may be edited meanwhile. The seed is
43, for an idea's second pair 44, for its third 45. Logs: run-COMMIT-SEED-TIME.log, the same TIME
for both. If one of the two fails, the other is stopped.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import decide

HERE = Path(__file__).resolve().parent


def start(commit, seed, log, folder, name, by_turns):
    """Start a commit's train.py in a clone of its own."""
    clone = folder / f"clone{name}"
    git = "git", "-C", clone
    subprocess.run(["git", "clone", "-q", "--no-checkout", "--shared", HERE, clone], check=True)
    subprocess.run([*git, "checkout", "-q", "--detach", commit], check=True)
    shutil.copy(HERE / "results.tsv", clone)        # names the commit whose losses a log shows
    environment = os.environ | {"AUTORESEARCH_SEED": str(seed), "PYTHONUNBUFFERED": "1"}
    if by_turns:
        environment["AUTORESEARCH_TURNS"] = str(folder / name)
        environment["KMP_BLOCKTIME"] = "0"      # Intel's threads would spin into the other's turn
    with open(log, "wb") as file:
        return subprocess.Popen([sys.executable, "train.py"], cwd=clone, env=environment,
                                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)


def run(commits, seed, by_turns):
    """Run a pair of commits on a seed. Returns their logs."""
    stamp = time.strftime("%d%H%M%S")
    logs = [HERE / f"run-{commit}-{seed}-{stamp}.log" for commit in commits]
    with tempfile.TemporaryDirectory(prefix="pair-", ignore_cleanup_errors=True) as folder:
        folder = Path(folder)
        (folder / "turn").write_text("0 0\n")
        processes = []
        try:
            for name, (commit, log) in enumerate(zip(commits, logs)):
                processes.append(start(commit, seed, log, folder, str(name), by_turns))
                # The second starts once the first is ready to train; without turns, has ended.
                while processes[-1].poll() is None and not (folder / f"{name}.ready").exists():
                    time.sleep(0.1)
                if processes[-1].poll():
                    break
            while True:
                states = [process.poll() for process in processes]      # None: it goes on
                if any(states) or None not in states:
                    break                           # one has failed, or both have their number
                time.sleep(0.1)
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
    return logs


def main():
    parser = argparse.ArgumentParser(description="Run an idea and the last kept commit by turns.")
    parser.add_argument("commit", metavar="COMMIT", nargs="?", default="HEAD")
    idea = decide.short_hash(parser.parse_args().commit, HERE)
    sessions = decide.sessions(decide.read_results(HERE / "results.tsv", sys.exit))
    if not sessions:
        sys.exit("results.tsv has no baseline yet: run train.py on seeds 42, 43, 44, and 42 again")
    kept = decide.short_hash(sessions[-1].kept.commit, HERE)
    if idea == kept:
        sys.exit(f"{idea} is the last kept commit itself: commit an idea first")
    import machine                                      # loads torch, which takes seconds

    done = [seed for seed, both in decide.pairs(HERE, idea, kept).items()
            if all("val_bpb" in log for log in both)]
    left = [seed for seed in decide.PAIR_SEEDS if seed not in done]
    if not left:
        sys.exit(f"{idea} has had its three pairs: uv run decide.py")
    seed = left[0]
    by_turns = machine.default_device().type == "cpu"
    print(f"{idea} and {kept} on seed {seed}, {'by turns' if by_turns else 'one after the other'}",
          flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM: no result"))
    logs = run([idea, kept], seed, by_turns)
    print("---")
    summaries = [decide.summary(log.read_text("utf-8", errors="replace")) if log.exists() else {}
                 for log in logs]
    for log, found in zip(logs, summaries):
        said = f"val_bpb {found.get('val_bpb')}, {found.get('num_steps')} steps"
        print(f"{log.name}: {said if 'val_bpb' in found else 'no val_bpb'}")
    if not all("val_bpb" in found for found in summaries):
        sys.exit(1)


if __name__ == "__main__":
    main()
