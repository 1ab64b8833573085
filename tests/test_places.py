"""
Disks that are full, read-only or gone, power that fails, clocks that are set.

    AUTORESEARCH_LONG_TESTS=1 uv run pytest tests/test_places.py    # the power fails 50 times
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import referee
import verify
from children import LONG, ROOT
from test_prepare import refused

WHOLE_DISK = ("--dev-bind", "/", "/")


def in_a_sandbox(place, options, *commands, **environment):
    """Run programs of the clone where other file systems are mounted, and return the result."""
    bwrap = verify.bubblewrap()
    if not bwrap:
        pytest.skip("bwrap does not work here")
    shell = "; ".join(f"{sys.executable} {command}" if command.split()[0].endswith(".py")
                      else command for command in commands)
    return subprocess.run([bwrap, *WHOLE_DISK, *map(str, options), "bash", "-c", shell],
                          cwd=place.clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=120, env=place.environment | environment)


@pytest.fixture
def small_run(place):
    (place.clone / "train.py").write_text(place.text)
    return place


def test_fault_a_full_disk_stops_prepare_with_a_sentence_and_then_it_goes_on(place, tmp_path):
    cache = tmp_path / "full"
    cache.mkdir()
    full = ["--size", 3_000_000, "--tmpfs", cache]
    prepare = "prepare.py --dataset sotu --vocab-size 400"
    result = in_a_sandbox(place, full, prepare, AUTORESEARCH_CACHE_DIR=str(cache))
    refused(result, "No space left on device", "Make room", "uv run prepare.py --dataset sotu")
    roomy = ["--size", 30_000_000, "--tmpfs", cache]
    result = in_a_sandbox(place, roomy, f"head -c 26000000 /dev/zero > {cache}/fill", prepare,
                          f"rm {cache}/fill", prepare, AUTORESEARCH_CACHE_DIR=str(cache))
    assert result.returncode == 0 and "No space left on device" in result.stdout, result
    assert "ready:" in result.stdout and "Traceback" not in result.stdout


def test_fault_a_read_only_cache_stops_a_run_before_it_trains(small_run):
    cache = small_run.cache
    result = in_a_sandbox(small_run, ["--ro-bind", cache, cache], "train.py")
    refused(result, "Read-only file system", str(cache))
    assert "step" not in result.stdout


def test_fault_a_full_folder_for_temporary_files_stops_a_run_before_it_trains(small_run):
    options = ["--size", 2_000_000, "--tmpfs", small_run.tmp]
    result = in_a_sandbox(small_run, options, "train.py")
    refused(result, "MiB left", "TMPDIR")
    assert "step" not in result.stdout


def with_files_of_at_most(size, code, *arguments):
    """Run code of referee.py in a child that can't write beyond that size, as on a full disk."""
    return subprocess.run(
        [sys.executable, "-c", f"import json, sys, referee\n{code}", *arguments], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


FINISH = """
from pathlib import Path
cache, line, number = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
referee.Draft(cache, line).finish(number)
"""


def test_fault_a_disk_that_fills_up_during_a_run_costs_no_line(tmp_path):
    journal = tmp_path / "journal.jsonl"
    for number in range(400):
        referee.append_line(journal, {"run": f"{number:016x}", "val_bpb": 1.25, "failure": None})
    line = {"run": "f" * 16, "commit": "abcdef0"}
    number = line | {"val_bpb": 1.25, "failure": None}
    before = journal.read_bytes()
    assert len(before) > referee.Draft.ROOM             # so that only the journal is too long
    for room in (0, 30, len(json.dumps(number))):       # the line would take one byte more
        journal.write_bytes(before)
        result = with_files_of_at_most(len(before) + room, FINISH, str(tmp_path),
                                       json.dumps(line), json.dumps(number))
        assert "takes it over" in result.stdout and "Traceback" not in result.stdout, result.stdout
        assert journal.read_bytes() == before           # nothing of the line, and nothing lost
        referee.adopt_drafts(tmp_path)
        *others, last = journal.read_text().splitlines()
        assert json.loads(last) == number and len(others) == 400
        assert not list((tmp_path / "running").iterdir())


def test_fault_no_room_for_a_shared_array(tmp_path):
    code = "referee.shared_array(sys.argv[1], 'float32', (1024, 1024))"
    assert with_files_of_at_most(2**22, code, str(tmp_path)).returncode == 0
    refused(with_files_of_at_most(2**22 - 1, code, str(tmp_path)), "no room for 4 MiB", "TMPDIR")


def test_fault_a_disk_that_is_gone_is_named(small_run):
    """A memory-mapped file that is cut off ends the referee by SIGBUS, as a lost network disk."""
    small_run.environment["AUTORESEARCH_TIME_BUDGET"] = "60"
    run = small_run.start()
    lines = iter(run.stdout.readline, "")
    assert any("step" in line for line in lines)
    [shard] = small_run.cache.glob("sotu/vocab-400/train-00000.npy")
    os.truncate(shard, 0)
    said = run.communicate(timeout=60)[0]
    assert "killed by SIGBUS" in said and "Traceback" not in said, said
    assert run.returncode == 1


def copied_in_the_middle(place, child, copy, moment):
    """A copy of the cache as it lies on the disk after so many seconds of the child's life."""
    time.sleep(moment)
    while True:
        try:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(place.cache, copy)
            break
        except shutil.Error:                            # a file was removed meanwhile
            pass
    child.kill()
    child.communicate()
    place.wait()


def test_kill_of_the_power_leaves_a_cache_that_works(small_run, tmp_path):
    draw, copy = random.Random(0), tmp_path / "copy"
    failures = 50 if LONG else 1
    for number in range(failures):
        before = len(small_run.lines())
        run = small_run.start()
        copied_in_the_middle(small_run, run, copy, draw.uniform(1, 4) if number else 2.5)
        drafts = len(list((copy / "running").glob("*.json")))
        result = subprocess.run([sys.executable, "train.py"], cwd=small_run.clone, text=True,
                                env=small_run.environment | {"AUTORESEARCH_CACHE_DIR": str(copy)},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert result.returncode == 0 and "val_bpb:" in result.stdout, result.stdout
        lines = [json.loads(line) for line in (copy / "journal.jsonl").read_text().splitlines()]
        ids = [line["run"] for line in lines]
        assert len(set(ids)) == len(ids) and lines[-1]["failure"] is None
        # The line of the run that the power ended, if it had one, and that of the next.
        assert len(lines) - before in ({2} if drafts else {1, 2})
        assert not list((copy / "running").iterdir())
    print(f"kill: the power failed {failures} times")


def test_kill_of_the_power_while_the_data_are_made(place, tmp_path):
    whole, draw = tmp_path / "whole", random.Random(0)
    shutil.copytree(place.cache, whole)
    for _ in range(50 if LONG else 1):
        shutil.rmtree(place.cache)
        command = [sys.executable, "prepare.py", "--dataset", "sotu", "--vocab-size", "400",
                   "--eval-bytes", "20000"]
        child = subprocess.Popen(command, cwd=place.clone, env=place.environment, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while not place.cache.exists():
            time.sleep(0.01)
        copied_in_the_middle(place, child, tmp_path / "copy", draw.uniform(0, 2))
        result = subprocess.run(
            command, cwd=place.clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=place.environment | {"AUTORESEARCH_CACHE_DIR": str(tmp_path / "copy")})
        assert result.returncode == 0, result.stdout
        for path in (whole / "sotu" / "vocab-400").iterdir():
            other = tmp_path / "copy" / "sotu" / "vocab-400" / path.name
            assert other.read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("set_by", [-7200, 0, 7200])
def test_fault_a_clock_that_is_set_ends_no_run(set_by, monkeypatch):
    """The wall clock jumps by two hours while train.py starts."""
    started = time.time()
    process = SimpleNamespace(create_time=lambda: started)
    monkeypatch.setattr(referee.time, "time", lambda: started + set_by + 3)
    age = referee.age(process)
    assert 0 <= age <= 60 and (set_by or age == pytest.approx(3))
