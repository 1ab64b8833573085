# /// script
# requires-python = ">=3.11"
# dependencies = ["filelock==4.2.12", "ray==2.60.0", "tqdm==4.70.1"]
# [tool.uv]
# exclude-newer = "2026-11-20T00:00:00Z"
# ///
"""
A wave: runs of train.py side by side, each of a commit on a seed, each on a GPU of its own.

    uv run --script wave.py COMMIT:SEED ... [--limit SECONDS]

As many run at once as there are GPUs (without any, one at a time on the CPU), here or, if
RAY_ADDRESS names one, on a Ray cluster. Each has a clone of its own, so the checkout may be edited
meanwhile. As a run ends, its numbers are printed, its log is written to run-COMMIT-SEED-WAVE-N.log
and its journal line comes home. Exit code 1 if a run has no number.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",       # kill no run for the memory that others take
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",       # workers have packages of their own
}
import ray
from filelock import FileLock
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from tqdm import tqdm

import decide
from seal import HARNESS

HERE = Path(__file__).resolve().parent
GRACE = 360             # seconds for all but training, after which a run hangs
RETRIES = 2             # of a run whose machine died
HANGS = "hangs"         # in place of an exit status
ACCELERATOR_TYPE = "accelerator_type:"      # Ray's resource that names the kind of GPU

# ------------------------------------------------------------------------------------------------
# On the machines of the wave

def cache_folder(settings):
    """Where data and journal are on this machine."""
    default = Path.home() / ".cache" / "autoresearch"
    return Path(settings.get("AUTORESEARCH_CACHE_DIR") or default).expanduser()


def sha256(data):
    return hashlib.sha256(data).hexdigest()[:8]


def text_in(cache):
    """The prepared text in words, with a hash of what is evaluated; None if there is none."""
    with suppress(OSError, ValueError, KeyError):
        dataset = json.loads((cache / "dataset.json").read_bytes())
        found = {len(dataset["shards"])}
        for path in (cache / dataset["name"]).glob("vocab-*/manifest.json"):
            manifest = json.loads(path.read_bytes())
            found |= {manifest[split]["text_sha256"] for split in ("val", "test")}
        return f"{dataset['name']} ({sha256(repr(sorted(map(str, found))).encode())})"


def cores():
    """The numbers of the cores that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count()))


@ray.remote(max_calls=1)
def describe(settings, python):
    """What this machine is, as far as numbers depend on it. Asked with all of its GPUs free."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError, TypeError):
        processor = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)[1]
    torch = [path.name for path in python.parent.parent.glob("**/torch-*.dist-info")]
    prepare = HERE / "prepare.py"
    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return {"gpus": sorted(gpus), "cores": len(cores()), "processor": processor,
            "torch": torch[0] if torch else None, "text": text_in(cache_folder(settings)),
            "prepare.py": sha256(prepare.read_bytes()) if prepare.exists() else None}


def journal_line(journal, wave):
    """The newest line of a journal that is of that wave and run, as bytes; empty if none is."""
    with suppress(OSError):
        for line in reversed(journal.read_bytes().splitlines(keepends=True)):
            if wave.encode() in line and json.loads(line).get("wave") == wave:
                return line
    return b""


@ray.remote(max_calls=1, max_retries=RETRIES)
def experiment(bundle, commit, seed, wave, settings, python, machines, limit):
    """A run: (exit status, log, journal line, slot). Ray repeats it if its machine dies."""
    context = ray.get_runtime_context()
    machine = machines[context.get_node_id()]
    gpus = context.get_accelerator_ids().get("GPU", [])
    slot = machine["gpus"].index(gpus[0]) if gpus else 0
    env = os.environ | settings | {"AUTORESEARCH_SEED": seed, "AUTORESEARCH_WAVE": wave,
                                   "PYTHONUNBUFFERED": "1"}
    for name in "OMP_NUM_THREADS", "PYTHONBREAKPOINT", "VIRTUAL_ENV":   # Ray's and uv's
        env.pop(name, None)
    if machine["slots"] > 1:
        env["OMP_NUM_THREADS"] = str(machine["share"])
        if hasattr(os, "sched_setaffinity"):
            first = slot * machine["share"] % len(cores())      # more GPUs than cores: shared
            os.sched_setaffinity(0, cores()[first:first + machine["share"]])
    status, line = HANGS, b""
    with tempfile.TemporaryDirectory(prefix="wave-", ignore_cleanup_errors=True) as folder:
        folder = Path(folder)
        (folder / "bundle").write_bytes(bundle)
        clone = folder / "clone"
        subprocess.run(["git", "clone", "-q", "-n", folder / "bundle", clone], check=True)
        subprocess.run(["git", "-C", clone, "checkout", "-q", "--detach", commit], check=True)
        with open(folder / "log", "w+b") as log:
            with suppress(subprocess.TimeoutExpired):
                # A child of Ray's worker, which Ray kills with it, and no grandchild.
                status = subprocess.run(
                    [python, "train.py"], cwd=clone, env=env, timeout=limit,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode
            # The referee of a run that was killed may still be writing.
            for _ in range(1 if status == 0 else 6):
                if line := journal_line(cache_folder(settings) / "journal.jsonl", wave):
                    break
                time.sleep(0.5)
            log.seek(0)
            text = log.read().decode(errors="replace")
    where = f"GPU {gpus[0]} of {platform.node()}" if gpus else platform.node()
    return status, text, line, where

# ------------------------------------------------------------------------------------------------
# On this machine

def git(*arguments):
    """What git prints, as bytes. Exits with its own words where it fails."""
    result = subprocess.run(["git", "-C", HERE, *arguments], capture_output=True)
    if result.returncode:
        sys.exit(f"git {arguments[0]}: {result.stderr.decode().strip()}")
    return result.stdout


def parse(argument):
    """(short hash, hash, seed) of COMMIT:SEED. Exits if it cannot run or cannot be compared."""
    name, _, seed = argument.rpartition(":")
    if not name or not seed.isdigit():
        sys.exit(f"{argument!r} is not COMMIT:SEED, such as HEAD:42")
    short = decide.short_hash(name, HERE)
    commit = git("rev-parse", short).decode().strip()
    if not git("for-each-ref", "--count=1", "--contains", commit):
        sys.exit(f"{name} is on no branch, so it does not travel: git branch idea/NAME {name}")
    if changed := git("diff", "--name-only", commit, "--", *HARNESS).split():
        sys.exit(f"{name} has another {changed[0].decode()} than this checkout: its numbers would "
                 f"not compare; cherry-pick it onto a branch of this checkout, without that file")
    return short, commit, seed


def answers(address):
    """Whether somebody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    with suppress(OSError, ValueError):
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        return True
    return False


def connect():
    """Join the cluster that RAY_ADDRESS names, or start a Ray that ends with this process."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet = dict(log_to_driver=False, configure_logging=False)
    if address == "local":
        gpus = {} if os.environ.get("AUTORESEARCH_DEVICE", "cuda") == "cuda" else {"num_gpus": 0}
        ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000,
                 **gpus, **quiet)
        return
    if ":" in address and not answers(address):
        sys.exit(f"RAY_ADDRESS={address}: nobody answers there; start the cluster (README, Many "
                 "GPUs), or unset RAY_ADDRESS to use this machine alone")
    try:
        ray.init(address, **quiet)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        sys.exit(f"RAY_ADDRESS={address}: {reason}; if it runs, is its token in "
                 "~/.ray/auth_token here, and RAY_AUTH_MODE=token set?")


def machines_of_the_wave(settings, python, say):
    """
    What describe() says of each machine that has slots, by the id of its Ray node, with its slots
    and its share: the cores of a slot. Exits unless all slots are alike.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    kind = "GPU" if any("GPU" in node["Resources"] for node in nodes) else "CPU"
    asked = {}
    for node in nodes:
        if number := node["Resources"].get(kind):
            gpus = {"num_cpus": 0, "num_gpus": number}
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = describe.options(scheduling_strategy=here, **gpus if kind == "GPU" else {})
            asked[task.remote(settings, python)] = node
    if ray.wait(list(asked), num_returns=len(asked), timeout=20)[1]:
        say("waiting for machines that are at work for somebody else")
    machines = {}
    for answer, node in asked.items():
        machine = ray.get(answer) | {"name": node["NodeManagerHostname"], "slots": 1,
                                     "cpus": node["Resources"].get("CPU", 0)}
        if kind == "GPU":
            kinds = [name for name in node["Resources"] if name.startswith(ACCELERATOR_TYPE)]
            machine |= {"GPU": kinds[0].removeprefix(ACCELERATOR_TYPE) if kinds else "unknown",
                        "slots": len(machine["gpus"])}
        machine["share"] = max(1, machine["cores"] // machine["slots"])
        machines[node["NodeID"]] = machine
    check(list(machines.values()), kind, settings)
    share = min(machine["share"] for machine in machines.values())
    return {node: machine | {"share": share} for node, machine in machines.items()}


def check(machines, kind, settings):
    """Exits unless the slots of all machines are alike, and as this checkout has it."""
    for machine in machines:
        for what, command in ("torch", "uv sync"), ("text", "uv run prepare.py"):
            if not machine[what]:
                sys.exit(f"{machine['name']} has no {what}: in {HERE} there, run: {command}")
    mine = {"name": "this checkout", "text": text_in(cache_folder(settings)),
            "prepare.py": sha256((HERE / "prepare.py").read_bytes())}
    hardware = ["GPU"] if kind == "GPU" else ["processor", "cores"]
    for what in [*hardware, "torch", "text", "prepare.py"]:
        names = {}
        for machine in [mine, *machines]:
            if machine.get(what):
                names.setdefault(machine[what], []).append(machine["name"])
        if len(names) > 1:
            found = "; ".join(f"{value} on {', '.join(who)}" for value, who in names.items())
            sys.exit(f"numbers would not compare, since the {what} differs: {found}")


def keep_line(journal, line):
    """
    Append a run's line to this machine's journal, unless that is where it was written. The lock,
    and a new line after one that was cut off: as in referee.append_line, which needs numpy.
    """
    journal.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(journal.with_suffix(".lock")), open(journal, "a+b") as file:
        file.seek(0)
        lines = file.read()
        if line not in lines:
            file.write(line if not lines or lines.endswith(b"\n") else b"\n" + line)


def numbers(status, log):
    """What a run came to, in one line."""
    found = dict(re.findall(r"^(\w+): +(\S+)", log, re.M))
    if "val_bpb" in found and status == 0:
        memory = float(found.get("peak_vram_mb", 0)) / 1024
        return f"val_bpb {found['val_bpb']}  {memory:.1f} GB  {found.get('num_steps')} steps"
    last = (re.findall(r"^FAIL.*", log, re.M) or log.splitlines() or ["no output"])[-1]
    return "".join(character for character in last if character.isprintable())[:200]


def outcome(task, limit):
    """(exit status, log, journal line, slot) of a task that is done, whatever became of it."""
    try:
        status, log, line, slot = ray.get(task)
    except ray.exceptions.RayError as error:
        return 1, f"FAIL: no result from Ray: {str(error).splitlines()[-1]}\n", b"", "nowhere"
    if status == HANGS:
        log += f"FAIL: still running after {limit:.0f} s, so it was stopped\n"
    elif status < 0:
        log += f"FAIL: train.py was killed by signal {-status}\n"
    return status, log, line, slot


def watch(tasks, machines, say):
    """Yield tasks as they end. Exits if the head of the cluster or its last machine is gone."""
    address, alive, silent = ray.get_runtime_context().gcs_address, set(machines), 0
    while tasks:
        done, tasks = ray.wait(tasks, timeout=2)
        yield from done
        silent = 0 if answers(address) else silent + 1
        if silent == 3:
            say(f"the head of the cluster ({address}) is gone, and {len(tasks)} runs with it; "
                "start the cluster and run them again")
            os._exit(1)             # an orderly end would wait for the head
        if silent:
            continue
        now = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for node in alive - now:
            say(f"{machines[node]['name']} is gone: its runs start again elsewhere")
        alive &= now
        if not alive:
            sys.exit(f"no machine is left for {len(tasks)} runs; run them again")


def main():
    parser = argparse.ArgumentParser(description="Run commits side by side, each on its own GPU.")
    parser.add_argument("runs", metavar="COMMIT:SEED", nargs="+", type=parse)
    parser.add_argument("--limit", metavar="SECONDS", type=float, help="after which a run is "
                        f"stopped (default: the time budget and {GRACE} s)")
    arguments = parser.parse_args()
    settings = {name: value for name, value in os.environ.items()
                if name.startswith("AUTORESEARCH_")}
    limit = arguments.limit or float(settings.get("AUTORESEARCH_TIME_BUDGET") or 300) + GRACE
    venv = Path(os.environ.get("UV_PROJECT_ENVIRONMENT") or HERE / ".venv").absolute()
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    journal = cache_folder(settings) / "journal.jsonl"
    wave = time.strftime("%m%d%H%M%S") + secrets.token_hex(1)   # two may start at once
    # Ray prints its own view of every fault to stdout, in dozens of lines.
    say = partial(tqdm.write, file=sys.stdout)
    sys.stdout = None
    connect()
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # Ray has put its own there
    machines = machines_of_the_wave(settings, python, say)
    slots = sum(machine["slots"] for machine in machines.values())
    say(f"wave {wave}: {len(arguments.runs)} runs in {slots} slots")
    bundle = ray.put(git("bundle", "create", "-q", "-", "--all"))
    gpu = any(machine["gpus"] for machine in machines.values())
    whole = {"num_cpus": max(machine["cpus"] for machine in machines.values())}
    task = experiment.options(
        **{"num_gpus": 1, "num_cpus": 0} if gpu else whole,
        label_selector={"ray.io/node-id": f"in({','.join(machines)})"},
        runtime_env={"env_vars": {"RAY_worker_niceness": "0"}})     # Ray's own is 15
    waiting = {}
    for number, (short, commit, seed) in enumerate(arguments.runs, 1):
        name = f"{wave}/{number}/{slots}"       # in the journal: wave, run, slots
        run = task.remote(bundle, commit, seed, name, settings, python, machines, limit)
        waiting[run] = number, short, seed
    good = 0
    with tqdm(total=len(waiting), unit="run", disable=None) as bar:
        for run in watch(list(waiting), machines, say):
            number, short, seed = waiting.pop(run)
            status, log, line, slot = outcome(run, limit)
            path = Path(f"run-{short}-{seed}-{wave}-{number}.log")
            with open(path, "x") as file:
                file.write(log)
            if line:
                keep_line(journal, line)
            good += status == 0
            bar.update()
            say(f"{short} seed {seed}  {numbers(status, log)}  {slot}  {path}")
    sys.exit(good < len(arguments.runs))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; runs that have ended have their logs, the others left nothing")
