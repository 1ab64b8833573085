"""Runs as child processes and in process: the clock, warm-up, the journal, and every way to end."""

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import prepare
import referee
import train
from children import ROOT, copy_programs, forked, program
from test_optimizer import small_model

TINY = """
import torch, time, prepare
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(512, 512)
    def forward(self, ids):
        return self.table(ids)
with prepare.Run(512) as run:
    model = Model()
    {warm}
    for step, (x, y) in enumerate(run.batches(4)):
        {step}
    {end}
    run.evaluate_bpb(model)
    {report}
"""
REPORT = "run.report(num_steps=step, num_params=1, depth=1, flops_per_token=0)"


def tiny(folder, step="time.sleep(0.01)", end="pass", report=REPORT, warm="pass", **constants):
    """
    Run a program with a lookup table for a model, as a child with a journal of its own. constants:
    numbers to replace in referee.py.
    """
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    for name in ("sotu", "dataset.json"):
        (cache / name).symlink_to(Path(os.environ["AUTORESEARCH_CACHE_DIR"], name))
    copy_programs(folder)
    text = (folder / "referee.py").read_text()
    for name, value in constants.items():
        text, number = re.subn(rf"^{name} = \d+", f"{name} = {value}", text, flags=re.M)
        assert number == 1, f"referee.py has no {name}"
    (folder / "referee.py").write_text(text)
    program = TINY.format(step=step, end=end, report=report, warm=warm)
    (folder / "tiny.py").write_text(program)
    return forked(folder / "tiny.py", AUTORESEARCH_CACHE_DIR=cache, AUTORESEARCH_TIME_BUDGET=1)


def last_line(cache):
    """The last line of a journal, which the referee may write after the run has died."""
    journal = cache / "journal.jsonl"
    for _ in range(50):
        if journal.exists() and journal.read_text().endswith("\n"):
            return json.loads(journal.read_text().splitlines()[-1])
        time.sleep(0.2)
    raise AssertionError(f"no line in {journal}")


def tiny_and_line(folder, **options):
    """What tiny() returns, and the line in its journal."""
    return tiny(folder, **options), last_line(folder / "cache")


@pytest.fixture(scope="module")
def real_run(cache):
    """train.py itself for five seconds."""
    return program("train.py", AUTORESEARCH_TIME_BUDGET=5)


def test_end_to_end(real_run, cache):
    assert real_run.returncode == 0, real_run.stdout
    summary = real_run.stdout.split("---\n")[1]
    keys = re.findall(r"^([\w.]+):", summary, re.M)
    assert keys[:9] == [
        "val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent",
        "total_tokens_M", "num_steps", "num_params_M", "depth"]
    value = dict(re.findall(r"^([\w.]+): +(\S+)", summary, re.M))
    assert 1 < float(value["val_bpb"]) < 2.4        # untrained: 3; a table of single tokens: 2.4
    assert 4.2 < float(value["training_seconds"]) < 5.9
    assert "time_budget:      5 (not comparable)" in summary
    assert value["seed"] == "42" and value["dataset"] == "sotu"
    line = last_line(cache)
    assert f"{line['val_bpb']:.6f}" == value["val_bpb"] and line["failure"] is None
    assert 1 < line["test_bpb"] < 2.4
    assert f"{line['test_bpb']:.4f}" not in real_run.stdout
    assert len(real_run.stdout.splitlines()) < 40           # an agent reads this


def test_a_table_learns_nothing_but_ends_in_time(tmp_path):
    result, line = tiny_and_line(tmp_path)
    assert result.returncode == 0, result.stdout
    assert 0.9 < line["training_seconds"] < 1.1
    keys = """
        time commit dirty train_sha256 prepare_sha256 prepare_changed dataset vocab_size device
        share versions seed time_budget val_bpb test_bpb total_seconds num_steps total_tokens
        peak_vram_mb
    """
    assert set(keys.split()) <= set(line)
    assert line["train_sha256"] == referee.file_sha256(tmp_path / "tiny.py")


def test_the_iterator_ends_at_the_budget_and_progress_comes_from_its_clock(cache, monkeypatch):
    monkeypatch.setattr(prepare, "TIME_BUDGET", 0.5)
    run = prepare.Run(512)
    start, progress = time.monotonic(), []
    for x, y in run.batches(2):
        assert x.shape == y.shape == (2, 256)
        progress.append(run.progress)
        time.sleep(0.02)
    assert 0.45 < time.monotonic() - start < 0.6
    assert progress[0] == 0 and progress == sorted(progress) and 0.9 < progress[-1] <= 1


def test_batches_are_shifted_rows_that_never_score_bos(run):
    batches = run.batches(3)
    for _ in range(20):
        x, y = next(batches)
        assert (x[:, 0] == run.bos).all()
        following, target = x[:, 1:], y[:, :-1]
        inside = following != run.bos
        assert (following[inside] == target[inside]).all()
        assert (target[~inside] == -1).all()


def test_no_buffer_is_rewritten_while_it_is_in_use(run):
    batches = run.batches(2)
    kept = [next(batches)[0] for _ in range(3)]
    copies = [x.clone() for x in kept]
    next(batches)
    assert all((x == copied).all() for x, copied in zip(kept, copies))


def test_the_seed_decides_the_batches(cache, monkeypatch):
    def first_batch():
        return next(prepare.Run(512).batches(2))[0]

    first, again = first_batch(), first_batch()
    monkeypatch.setattr(prepare, "SEED", 7)
    other = first_batch()
    assert (first == again).all()
    assert (first != other).any()


def test_warmup_leaves_no_trace(run):
    model, h = small_model()
    optimizer = train.make_optimizer(model, h)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    rates = [group["lr"] for group in optimizer.param_groups]
    changed = []

    def step(x, y):
        assert x.shape == y.shape == (4, 256) and x.max() < 512
        train.set_schedule(optimizer, h, 1, 0.9)
        model(x[:, :32] % 64, y[:, :32] % 64).backward()
        optimizer.step()
        torch.randn(5)
        changed.append(any((model.state_dict()[name] != was).any() for name, was in before.items()))

    assert run.warmup(step, 4, model, optimizer) == 4
    assert changed == [True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all((model.state_dict()[name] == value).all() for name, value in before.items())
    assert not optimizer.state
    assert rates == [group["lr"] for group in optimizer.param_groups]
    assert (torch.get_rng_state() == random).all()
    assert not run.handed


def test_two_steps_after_warmup_are_those_without_it(cache):
    def losses(warm):
        run = prepare.Run(512)
        torch.manual_seed(0)
        model, h = small_model(vocab_size=512)
        optimizer = train.make_optimizer(model, h)

        def step(x, y):
            loss = model(x[:, :32], y[:, :32])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        if warm:
            run.warmup(step, 2, model, optimizer)
        return [step(x, y) for (x, y), _ in zip(run.batches(2), range(3))]

    assert losses(warm=True) == losses(warm=False)


def test_warmup_halves_the_rows_until_a_step_fits_in_memory(run, capsys):
    """And leaves no trace of the steps that did not fit. An odd number of rows is an error."""
    model, h = small_model(vocab_size=512)
    optimizer = train.make_optimizer(model, h)
    before = [p.clone() for p in model.parameters()]

    def step(x, y, most=2):
        model(x[:, :32], y[:, :32]).backward()
        optimizer.step()
        if len(x) > most:
            raise torch.OutOfMemoryError("Tried to allocate 7 GiB")

    assert run.warmup(step, 8, model, optimizer) == 2
    assert "not enough for a micro-batch of 4 rows, trying 2" in capsys.readouterr().out
    assert not optimizer.state
    assert all((a == b).all() for a, b in zip(before, model.parameters()))
    with pytest.raises(torch.OutOfMemoryError):
        run.warmup(lambda x, y: step(x, y, most=0), 3, model, optimizer)


# -- every way to end

def fails(result, line, *words):
    """Assert that a run has failed, says these words and has no number."""
    assert result.returncode != 0
    assert "val_bpb:" not in result.stdout
    for word in words:
        assert word in result.stdout, result.stdout
    assert line["failure"] and "val_bpb" not in line


@pytest.mark.parametrize("step,words", [
    ("run.log(step, torch.tensor(float('nan')))", "training loss is nan"),
    ("run.log(step, torch.tensor(99.0))", "training loss is 99.00"),
    ("raise torch.OutOfMemoryError('Tried to allocate 7 GiB')", "7 GiB): lower device_batch_size"),
    ("torch.empty(1 << 60)", "lower device_batch_size"),
    ("raise KeyboardInterrupt", "stopped by Ctrl-C"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)",
     "stopped by SIGTERM"),
])
def test_foreseeable_ends_have_one_sentence(step, words, tmp_path):
    result, line = tiny_and_line(tmp_path, step=step)
    fails(result, line, words)
    assert "Traceback" not in result.stdout


def test_a_bug_keeps_its_traceback(tmp_path):
    result, line = tiny_and_line(tmp_path, step="x.no_such_thing")
    fails(result, line, "Traceback", "no_such_thing")
    assert line["failure"].startswith("AttributeError")


def test_a_run_that_ends_before_its_number_has_failed(tmp_path):
    result, line = tiny_and_line(tmp_path, step="break", end="raise SystemExit(0)")
    assert line["failure"] and "val_bpb" not in line


def test_a_run_without_a_report_has_failed(tmp_path):
    result, line = tiny_and_line(tmp_path, step="break", report="pass")
    fails(result, line, "without evaluate_bpb and report")


def test_a_child_that_outlives_the_run_does_not_hold_up_its_journal_line(tmp_path):
    start = time.monotonic()
    fork = "import os; os.fork() or (time.sleep(40), os._exit(0))"
    result, line = tiny_and_line(tmp_path, step="break", end=fork)
    assert result.returncode == 0 and line["failure"] is None, result.stdout
    assert time.monotonic() - start < 30


def test_a_killed_run_is_in_the_journal(tmp_path):
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    result, line = tiny_and_line(tmp_path, step=kill)
    assert result.returncode == -signal.SIGKILL
    assert line["failure"] == referee.UNFINISHED


@pytest.mark.parametrize("message", [
    "'nonsense'", "'next', -4, 0", "'next', 10 ** 12, 0", "'evaluate', 'all'", "'start'",
    "'report', {}", "7"])
def test_a_bad_message_ends_the_run(message, tmp_path):
    """Whatever train.py's process says, the referee neither hangs nor gives a number."""
    result, line = tiny_and_line(tmp_path, step=f"run.channel.send({message})")
    assert result.returncode != 0 and "val_bpb:" not in result.stdout
    assert line["failure"]


def test_an_evaluation_that_would_not_fit_is_said_before_training(tmp_path):
    """Warm-up steps of half a second for 256 tokens: the text has enough of them for minutes."""
    slow = "run.warmup(lambda x, y: time.sleep(0.5), 1)"
    result, line = tiny_and_line(tmp_path, warm=slow)
    fails(result, line, "would take about", "uv run prepare.py --eval-bytes")
    assert "startup_seconds" not in line                # the clock has not started


# -- runs that hang, and referees that do

NO_LIMIT = "import faulthandler; faulthandler.cancel_dump_traceback_later(); time.sleep(60)"
SIGNAL = "import psutil, signal; psutil.Process().children()[0].send_signal(signal.{})"
# Half seconds: on the second, the referee looks whether the run is alive, and may find it dying.
HANGS = {
    "in Python": dict(step="time.sleep(60)", EXTRA_TIME=1.5),
    "in a native call": dict(step="import ctypes; ctypes.PyDLL(None).sleep(60)", EXTRA_TIME=1.5),
    "without a limit of its own": dict(step=NO_LIMIT, EXTRA_TIME=1.5),
    "with a referee that is gone": dict(step=SIGNAL.format("SIGKILL")),
    "with a referee that is stopped": dict(step=SIGNAL.format("SIGSTOP"), ANSWER_TIME=1),
}


def kill_referee(folder):
    for process in psutil.process_iter(["cmdline"]):
        if str(folder / "referee.py") in (process.info["cmdline"] or []):
            process.kill()


@pytest.fixture(scope="module")
def hung(cache, tmp_path_factory):
    """What became of each run of HANGS. They sleep most of the time, so all run at once."""
    def launch(options):
        folder = tmp_path_factory.mktemp("hung")
        start = time.monotonic()
        result = tiny(folder, **options)
        seconds = time.monotonic() - start
        return SimpleNamespace(folder=folder, result=result, output=result.stdout, seconds=seconds)

    with ThreadPoolExecutor(len(HANGS)) as pool:
        futures = {how: pool.submit(launch, options) for how, options in HANGS.items()}
    ends = {how: future.result() for how, future in futures.items()}
    yield ends
    for end in ends.values():
        kill_referee(end.folder)


# A native call keeps Python's lock, so only faulthandler's own thread can end it.
@pytest.mark.parametrize("how", ["in Python", "in a native call"])
def test_the_hard_limit_ends_a_run_that_hangs(how, hung):
    end = hung[how]
    assert end.seconds < 40
    assert end.result.returncode != 0
    assert "Timeout" in end.output and "tiny.py" in end.output, end.output
    assert "hard limit" in last_line(end.folder / "cache")["failure"]


def test_the_referee_ends_a_run_that_has_no_limit_of_its_own(hung):
    end = hung["without a limit of its own"]
    assert end.result.returncode == -signal.SIGKILL
    assert "hard limit" in last_line(end.folder / "cache")["failure"]


def test_a_referee_that_is_gone_ends_the_run(hung):
    end = hung["with a referee that is gone"]
    assert end.result.returncode == 1
    assert "FAIL: the referee is gone" in end.output and "val_bpb" not in end.output


def test_a_referee_that_does_not_answer_ends_the_run(hung):
    end = hung["with a referee that is stopped"]
    assert end.result.returncode == 1 and "Traceback" not in end.output
    assert "FAIL: the referee does not answer" in end.output


# -- the journal, and the environment

@pytest.mark.parametrize("own,busy,stolen,everything,ours", [
    (19.5, 19.6, 0, 20, 1.0),       # a run on two idle cores for ten seconds
    (10, 20, 0, 20, 0.5),           # and beside another like it
    (14, 15, 5, 20, 0.7),           # the host took 5 of 20
    (10, 50, 0, 160, 1.0),          # a GPU's run on 16 cores: others left some of them idle
    (25, 20, 0, 20, 1.0),           # clocks that do not tick alike
    (math.nan, 20, 0, 20, None)])       # it can't be told here
def test_the_share_of_the_machine_by_hand(own, busy, stolen, everything, ours):
    share = referee.machine_share(own, busy, stolen, everything)
    assert share.get("ours") == ours


@pytest.mark.parametrize("says,clocks", [
    ("echo 1755, 1980", {"mhz": 1755, "max_mhz": 1980}), ("echo '[N/A], [N/A]'", {}),
    ("echo no devices; exit 6", {})])
def test_the_clocks_of_a_gpu(says, clocks, tmp_path, monkeypatch):
    script = f'#!/bin/sh\n[ "$1 $2" = "-i GPU-12ab" ] && {says}\n'
    (tmp_path / "nvidia-smi").write_text(script)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert referee.gpu_clocks("12ab") == clocks
    assert referee.gpu_clocks("") == {}


def clone_of_small(folder):
    """small.py as the train.py of a clone of its own, with the programs as they are. Its path."""
    folder.mkdir()
    copy_programs(folder)
    text = (folder / "referee.py").read_text()
    (folder / "referee.py").write_text(text.replace("LEAVING = 10 ", "LEAVING = 1 "))
    return shutil.copy(ROOT / "tests" / "small.py", folder / "train.py")


def test_a_second_run_on_the_device_is_refused_or_waits(cache, tmp_path):
    """And the first, on a machine with another load, knows how much of it was not its own."""
    place = {"AUTORESEARCH_CACHE_DIR": tmp_path / "cache"}
    result = program("prepare.py", "--dataset", "sotu", "--vocab-size", 400, "--eval-bytes", 30_000,
                     **place)
    assert result.returncode == 0, result.stdout
    a, b, c = (clone_of_small(tmp_path / name) for name in "abc")
    journal = tmp_path / "cache" / "journal.jsonl"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(forked, a, AUTORESEARCH_TIME_BUDGET=6, **place)
        while not list((tmp_path / "cache").glob("running/*.json")):
            assert not first.done(), first.result().stdout
            time.sleep(0.01)
        spin = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
                for _ in os.sched_getaffinity(0)]
        try:
            second = forked(b, AUTORESEARCH_TIME_BUDGET=1, **place)
            began = time.monotonic()
            third = pool.submit(forked, c, AUTORESEARCH_TIME_BUDGET=1, AUTORESEARCH_WAIT=1, **place)
            first = first.result()
        finally:
            for process in spin:
                process.kill()
                process.wait()
        third = third.result()
        seconds = time.monotonic() - began
    assert second.returncode == 1
    assert "FAIL: another run is at work on this device" in second.stdout, second.stdout
    [process] = re.findall(rf"{a} \(process (\d+)\), since ", second.stdout)
    assert first.returncode == 0, first.stdout
    assert int(re.search(r"^machine: +(\d+)% ours", first.stdout, re.M)[1]) < 85, first.stdout
    assert third.returncode == 0, third.stdout
    assert f"waiting for the device: {a} (process {process})" in third.stdout, third.stdout
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["failure"] for line in lines] == [None, None]
    assert lines[1]["total_seconds"] < seconds - 1          # less what it waited


def test_a_killed_run_leaves_no_lock(cache, tmp_path):
    locks = [referee.DeviceLocks(["test-a", "test-b"]) for _ in range(2)]
    code = ("import os, referee\nlocks = referee.DeviceLocks(['test-b'])\n"
            "assert locks.take({'pid': 7}, 0) is None\nprint(1, flush=True)\ninput()")
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    child.stdout.readline()
    assert locks[0].take({"pid": 8}, 0.1) == {"pid": 7}
    child.kill()
    child.wait()
    assert locks[0].take({"pid": 8}, 0.1) is None
    assert locks[1].take({}, 0.1) == {"pid": 8}


def test_the_line_of_a_run_whose_referee_was_killed_is_written_by_the_next(tmp_path):
    def killed(run, last_words=""):
        code = ["import os, referee", "from pathlib import Path", f"line = {{'run': {run!r}}}",
                f"draft = referee.Draft(Path({str(tmp_path)!r}), line)", last_words,
                "os.kill(os.getpid(), 9)"]
        subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=ROOT)

    def journal():
        text = (tmp_path / "journal.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    killed("aaaa")
    living = referee.Draft(tmp_path, {"run": "bbbb"})
    for _ in range(2):
        referee.adopt_drafts(tmp_path)
        assert journal() == [{"run": "aaaa", "failure": referee.UNFINISHED}]
    killed("cccc", "referee.append_line(draft.journal, line)")     # between its last two acts
    referee.adopt_drafts(tmp_path)
    living.finish({"run": "bbbb", "failure": None})
    assert [line["run"] for line in journal()] == ["aaaa", "cccc", "bbbb"]
    assert not list((tmp_path / "running").iterdir())


def test_a_cache_that_cannot_be_written_is_said_before_any_training(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "running").write_text("a file where a folder should be")
    result = tiny(tmp_path)
    assert result.returncode == 1 and "cache can't be written (File exists)" in result.stdout
    assert "step" not in result.stdout and "Traceback" not in result.stdout


def test_journal_lines_of_many_writers_do_not_mix(tmp_path):
    writer = f"""
import pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import referee
for i in range(40):
    line = {{"writer": int(sys.argv[1]), "i": i, "long": "x" * 9000}}
    referee.append_line(pathlib.Path({str(tmp_path / "j")!r}), line)
"""
    children = [subprocess.Popen([sys.executable, "-c", writer, str(n)]) for n in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    found = sorted((line["writer"], line["i"]) for line in lines)
    assert found == [(writer, i) for writer in range(3) for i in range(40)]
    with open(tmp_path / "j", "a") as file:
        file.write('{"torn')
    referee.append_line(tmp_path / "j", {"after": "a torn line"})
    assert json.loads((tmp_path / "j").read_text().splitlines()[-1]) == {"after": "a torn line"}


@pytest.mark.parametrize("environment,words", [
    ({"AUTORESEARCH_TIME_BUDGET": "five"}, "AUTORESEARCH_TIME_BUDGET='five' is not a number"),
    ({"AUTORESEARCH_SEED": "-1"}, "AUTORESEARCH_SEED=-1 is not between 0 and 2^63"),
    ({"AUTORESEARCH_DEVICE": "tpu"}, "device 'tpu' is not available; available: cpu"),
    ({"AUTORESEARCH_CACHE_DIR": "/nowhere/at/all"}, "run: uv run prepare.py"),
])
def test_a_bad_environment_is_named_in_a_sentence(environment, words):
    result = program("train.py", **environment)
    assert result.returncode == 1 and words in result.stdout and "Traceback" not in result.stdout


@pytest.mark.parametrize("cache_set", [True, False])
def test_a_user_without_a_name_or_a_home(cache_set, cache, tmp_path):
    """As in a container started with a number for its user."""
    hide = """
import os, pwd, runpy, sys
def nobody(who):
    raise KeyError(who)
pwd.getpwuid = pwd.getpwnam = nobody
for name in "HOME", "USER", "LOGNAME", "LNAME", "USERNAME":
    os.environ.pop(name, None)
sys.argv = ["prepare.py"]
runpy.run_path("prepare.py", run_name="__main__")
"""
    environment = dict(os.environ)
    if not cache_set:
        del environment["AUTORESEARCH_CACHE_DIR"]
    result = subprocess.run([sys.executable, "-c", hide], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    words = "nothing to do" if cache_set else "no home folder: set AUTORESEARCH_CACHE_DIR"
    assert words in result.stdout and "Traceback" not in result.stdout, result.stdout


def test_the_sleep_of_a_machine_is_measured(monkeypatch):
    """By two clocks: one goes on while a laptop is suspended, the other does not."""
    monkeypatch.setattr(referee.time, "clock_gettime", lambda clock: time.monotonic() + asleep)
    asleep = 5.0
    before = referee.asleep()
    asleep = 65.0
    assert referee.asleep() - before == pytest.approx(60, abs=0.1)


def test_a_vocabulary_that_is_not_prepared_names_the_command(cache, tmp_path):
    text = (ROOT / "train.py").read_text()
    assert text.count("prepare.Run(h.vocab_size)") == 1
    text = text.replace("prepare.Run(h.vocab_size)", "prepare.Run(777)")
    copy_programs(tmp_path)
    (tmp_path / "train.py").write_text(text)
    result = program("train.py", cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert "uv run prepare.py --dataset sotu --vocab-size 777" in result.stdout
