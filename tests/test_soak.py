"""
Many runs one after another, some of them killed or broken, and then what is left of them.

    AUTORESEARCH_LONG_TESTS=1 uv run pytest tests/test_soak.py      # 200 runs, 50 kills of each
"""

import random
import shutil
import time

import psutil
import pytest

import record
from children import LONG

FAULTS = {
    "an exception": "raise KeyError('bug')",
    "no number": "loss = loss * float('nan')",
    "an exit": "raise SystemExit(3)",
    "a sudden end": "import os; os._exit(1)",
    "a child that stays": "import subprocess; subprocess.Popen(['sleep', '1000'])",
}


@pytest.mark.parametrize("whom", ["train.py", "referee.py"])
def test_kill_at_any_moment_tears_no_line_and_leaves_nothing(whom, place):
    """The next run works, and takes away what a killed referee could not."""
    draw = random.Random(whom)
    kills = 50 if LONG else 2
    begun = 0
    for number in range(kills):
        run = place.start()
        moment = draw.uniform(0, 4) if number % 2 else 2.5    # in the training at least once
        end = time.monotonic() + moment
        while time.monotonic() < end and run.poll() is None:
            time.sleep(0.01)
        for process in [run] if whom == "train.py" else place.referees():
            process.kill()
        said, _ = run.communicate(timeout=60)
        begun += "device:" in said
        assert "Traceback" not in said or "KeyboardInterrupt" in said, (moment, said)
        place.wait()
        if number % 2:
            said, _ = place.start().communicate(timeout=60)
            assert "val_bpb:" in said, said
            place.wait()
            begun += 1
            ids = [line["run"] for line in place.lines()]
            assert len(set(ids)) == len(ids) >= begun       # a run that began may not have said so
            assert place.left() == [] and not list((place.cache / "running").iterdir())
    for process in psutil.process_iter(["cwd", "pid"]):
        assert not str(process.info["cwd"] or "").startswith(str(place.tmp)), process
    print(f"kill: {kills} of {whom}, {len(place.lines())} lines in the journal, nothing left")


def test_soak_of_runs_a_third_of_them_with_faults(place):
    draw = random.Random(0)
    count, good, memory, disk = 200 if LONG else 3, 0, [], []
    for number in range(count):
        fault = draw.choice(list(FAULTS)) if number % 3 == 1 else None
        run = place.start(FAULTS[fault] if fault else "pass")
        said, _ = run.communicate(timeout=60) if fault != "a child that stays" else (
            run.wait(60), None)
        place.wait()
        line = place.lines()[-1]
        assert len(place.lines()) == number + 1
        works = fault in (None, "a child that stays")
        assert (line["failure"] is None) == works, (fault, said, line)
        good += works
        if works:
            memory.append(line["peak_vram_mb"])
        disk.append(sum(path.stat().st_size for path in place.cache.rglob("*")
                        if path.is_file() and path.name != "journal.jsonl"
                        and "models" not in path.parts))
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == ["sleep", "1000"]:
            process.kill()
    assert place.left() == [] and not place.referees()
    assert len(set(disk)) == 1 and max(memory) < 1.2 * min(memory)
    assert 1 <= len(list((place.cache / "models").iterdir())) <= record.MODELS
    numbers = [line for line in place.lines() if line["failure"] is None]
    assert len(numbers) == good
    print(f"soak: {count} runs, {good} numbers, {count} journal lines; memory {min(memory):.0f} to "
          f"{max(memory):.0f} MB, cache {disk[-1]:,} bytes throughout, no process or file left")
    shutil.rmtree(place.clone)
