"""Runs as child processes and in process: the clock, warm-up, the journal, and every way to end."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

import prepare
import referee
import train
from children import ROOT, forked, program
from test_optimizer import small_model

TINY = """
import torch, time, prepare
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(512, 512)
    def forward(self, ids):
        return self.table(ids)
{before}
with prepare.Run(512) as run:
    model = Model()
    {warm}
    for step, (x, y) in enumerate(run.batches(4)):
        {step}
    {end}
    run.evaluate_bpb(model)
    {report}
"""
REPORT = "run.report(num_steps=step, num_params=1, depth=1, mfu_percent=0)"


def tiny(tmp_path, before="", step="time.sleep(0.01)", end="pass", report=REPORT, constants=(), warm="pass", **environment):
    """A program with a lookup table for a model, run as a child with a journal of its own."""
    (tmp_path / "tiny.py").write_text(TINY.format(before=before, step=step, end=end, report=report, warm=warm))
    cache = tmp_path / "cache"
    if not cache.exists():
        cache.mkdir()
        for name in ("sotu", "dataset.json"):
            (cache / name).symlink_to(os.path.join(os.environ["AUTORESEARCH_CACHE_DIR"], name))
    for name in ("prepare.py", "seal.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "referee.py").write_text(re.sub(*constants, (ROOT / "referee.py").read_text()) if constants else (ROOT / "referee.py").read_text())
    environment = {"AUTORESEARCH_CACHE_DIR": cache, "AUTORESEARCH_TIME_BUDGET": 1} | environment
    result = forked(tmp_path / "tiny.py", **environment)
    journal = cache / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return result, lines[-1] if lines else None


@pytest.fixture(scope="module")
def real_run(cache):
    """train.py itself for ten seconds."""
    return program("train.py", AUTORESEARCH_TIME_BUDGET=10)


def test_end_to_end(real_run, cache):
    assert real_run.returncode == 0, real_run.stdout
    summary = real_run.stdout.split("---\n")[1]
    keys = re.findall(r"^([\w.]+):", summary, re.M)
    assert keys[:9] == ["val_bpb", "training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent", "total_tokens_M",
                        "num_steps", "num_params_M", "depth"]
    value = dict(re.findall(r"^([\w.]+): +(\S+)", summary, re.M))
    assert 1 < float(value["val_bpb"]) < 2.4                # an untrained model has 3, a table of single tokens 2.4
    assert 9 < float(value["training_seconds"]) < 11
    assert "time_budget:      10 (not comparable)" in summary
    assert value["seed"] == "42" and value["dataset"] == "sotu"
    line = json.loads((cache / "journal.jsonl").read_text().splitlines()[-1])
    assert f"{line['val_bpb']:.6f}" == value["val_bpb"] and line["failure"] is None
    assert 1 < line["test_bpb"] < 2.4 and f"{line['test_bpb']:.4f}" not in real_run.stdout
    assert len(real_run.stdout.splitlines()) < 40           # an agent reads this


def test_a_table_learns_nothing_but_ends_in_time(tmp_path):
    result, line = tiny(tmp_path)
    assert result.returncode == 0, result.stdout
    assert 0.9 < line["training_seconds"] < 1.1
    for key in ("time", "commit", "dirty", "train_sha256", "prepare_sha256", "prepare_changed", "dataset", "vocab_size", "device",
                "versions", "seed", "time_budget", "val_bpb", "test_bpb", "total_seconds", "num_steps", "total_tokens", "peak_vram_mb"):
        assert key in line
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
        inside = x[:, 1:] != run.bos
        assert (x[:, 1:][inside] == y[:, :-1][inside]).all() and (y[:, :-1][~inside] == -1).all()


def test_no_buffer_is_rewritten_while_it_is_in_use(run):
    batches = run.batches(2)
    kept = [next(batches) for _ in range(3)]
    copies = [x.clone() for x, _ in kept]
    next(batches)
    assert all((x == copied).all() for (x, _), copied in zip(kept, copies))


def test_the_seed_decides_the_batches(cache, monkeypatch):
    first = [next(prepare.Run(512).batches(2))[0] for _ in range(2)]
    monkeypatch.setattr(prepare, "SEED", 7)
    other = next(prepare.Run(512).batches(2))[0]
    assert (first[0] == first[1]).all() and (first[0] != other).any()


def test_warmup_leaves_no_trace(run):
    model, h = small_model()
    optimizer = train.make_optimizer(model, h, torch.float32)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    rates = [group["lr"] for group in optimizer.param_groups]
    with run.warmup(model, optimizer) as made_up:
        for _ in range(3):
            x, y = made_up(4)
            assert x.shape == (4, 256) and x.max() < 512
            train.schedule(optimizer, h, 1, 0.9)
            model(x[:, :32] % 64, y[:, :32] % 64).backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.randn(5)
        assert any((model.state_dict()[name] != value).any() for name, value in before.items())
    assert all((model.state_dict()[name] == value).all() for name, value in before.items())
    assert not optimizer.state and rates == [group["lr"] for group in optimizer.param_groups]
    assert (torch.get_rng_state() == random).all() and not run.handed


def test_two_steps_after_warmup_are_those_without_it(cache):
    def losses(warm):
        run = prepare.Run(512)
        torch.manual_seed(0)
        model, h = small_model(vocab_size=512)
        optimizer = train.make_optimizer(model, h, torch.float32)
        if warm:
            with run.warmup(model, optimizer) as made_up:
                model(*(t[:, :32] for t in made_up(2))).backward()
                optimizer.step()
                optimizer.zero_grad()
        result = []
        for (x, y), _ in zip(run.batches(2), range(3)):
            loss = model(x[:, :32], y[:, :32])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            result.append(loss.item())
        return result
    assert losses(True) == losses(False)


# -- every way to end

def fails(result, line, *words):
    assert result.returncode != 0 and "val_bpb:" not in result.stdout
    assert all(word in result.stdout for word in words), result.stdout
    assert line["failure"] and "val_bpb" not in line


@pytest.mark.parametrize("step,words", [
    ("run.log(step, torch.tensor(float('nan')))", "training loss is nan"),
    ("run.log(step, torch.tensor(99.0))", "training loss is 99.00"),
    ("raise torch.OutOfMemoryError('Tried to allocate 7 GiB')", "7 GiB): lower device_rows"),
    ("torch.empty(1 << 60)", "lower device_rows"),
    ("raise KeyboardInterrupt", "stopped by Ctrl-C"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)", "stopped by SIGTERM")])
def test_foreseeable_ends_have_one_sentence(step, words, tmp_path):
    result, line = tiny(tmp_path, step=step)
    fails(result, line, words)
    assert "Traceback" not in result.stdout


def test_a_bug_keeps_its_traceback(tmp_path):
    result, line = tiny(tmp_path, step="x.no_such_thing")
    fails(result, line, "Traceback", "no_such_thing")
    assert line["failure"].startswith("AttributeError")


def test_a_run_without_a_number_has_failed(tmp_path):
    result, line = tiny(tmp_path, end="raise SystemExit(0)")
    assert line["failure"] and "val_bpb" not in line
    fails(*tiny(tmp_path, report="pass"), "without evaluate_bpb and report")


def test_a_child_that_outlives_the_run_does_not_hold_up_its_journal_line(tmp_path):
    start = time.monotonic()
    result, line = tiny(tmp_path, end="import os; os.fork() or (time.sleep(40), os._exit(0))")
    assert result.returncode == 0 and line["failure"] is None, result.stdout
    assert time.monotonic() - start < 30


def test_a_killed_run_is_in_the_journal(tmp_path):
    result, line = tiny(tmp_path, step="import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert result.returncode == -signal.SIGKILL
    line = awaited(tmp_path)
    assert line["failure"] == referee.UNFINISHED


def awaited(tmp_path):
    """The last line of the journal, which the referee may write after the run has died."""
    journal = tmp_path / "cache" / "journal.jsonl"
    for _ in range(50):
        if journal.exists() and journal.read_text().endswith("\n"):
            return json.loads(journal.read_text().splitlines()[-1])
        time.sleep(0.2)


HANGS = {
    "in Python": "time.sleep(60)",
    "in a native call that holds the lock": "import ctypes; ctypes.PyDLL(None).sleep(60)"}


@pytest.mark.parametrize("how", HANGS)
def test_the_hard_limit_ends_a_run_that_hangs(how, tmp_path):
    start = time.monotonic()
    result, line = tiny(tmp_path, step=HANGS[how], constants=("EXTRA_TIME = 300 ", "EXTRA_TIME = 4 "))
    assert time.monotonic() - start < 40
    assert result.returncode != 0 and "Timeout" in result.stdout and "tiny.py" in result.stdout, result.stdout
    assert "hard limit" in awaited(tmp_path)["failure"]


def test_the_referee_ends_a_run_that_has_no_limit_of_its_own(tmp_path):
    result, line = tiny(tmp_path, step="import faulthandler; faulthandler.cancel_dump_traceback_later(); time.sleep(60)",
                        constants=("EXTRA_TIME = 300 ", "EXTRA_TIME = 4 "))
    assert result.returncode == -signal.SIGKILL
    assert "hard limit" in awaited(tmp_path)["failure"]


REFEREE = "import psutil, signal; [referee] = psutil.Process().children(); referee.send_signal(signal.{})"


def test_a_referee_that_is_gone_ends_the_run(tmp_path):
    result, line = tiny(tmp_path, step=REFEREE.format("SIGKILL"))
    assert result.returncode == 1 and "FAIL: the referee is gone" in result.stdout and "val_bpb" not in result.stdout


def test_a_referee_that_does_not_answer_ends_the_run(tmp_path):
    result, line = tiny(tmp_path, step=REFEREE.format("SIGSTOP"), constants=("ANSWER_TIME = 60 ", "ANSWER_TIME = 1 "))
    for process in psutil.process_iter(["cmdline"]):
        if str(tmp_path / "referee.py") in (process.info["cmdline"] or []):
            process.kill()
    assert result.returncode == 1 and "FAIL: the referee does not answer" in result.stdout and "Traceback" not in result.stdout


@pytest.mark.parametrize("message", ["'nonsense'", "'next', -4, 0", "'next', 10 ** 12, 0", "'evaluate', 'all'", "'start'", "'report', {}", "7"])
def test_a_message_that_is_none_ends_the_run(message, tmp_path):
    """Whatever train.py's process says, the referee neither hangs nor gives a number."""
    result, line = tiny(tmp_path, step=f"run.channel.send({message})")
    assert result.returncode != 0 and "val_bpb:" not in result.stdout
    assert awaited(tmp_path)["failure"]


def test_an_evaluation_that_would_not_fit_is_said_before_training(tmp_path):
    """A step that takes 0.2 s for 4 x 256 tokens: the text of 500,000 tokens (vocabulary 512: more) would take minutes."""
    slow = "with run.warmup() as made_up:\n        for _ in range(3):\n            made_up(4); time.sleep(1)\n    "
    result, line = tiny(tmp_path, warm=slow)
    fails(result, line, "would take about", "uv run prepare.py --eval-bytes")
    assert "startup_seconds" not in line                # the clock has not started


def test_journal_lines_of_many_writers_do_not_mix(tmp_path):
    writer = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import referee, pathlib\n" \
             f"for i in range(40): referee.append_line(pathlib.Path({str(tmp_path / 'j')!r}), " \
             "{'writer': int(sys.argv[1]), 'i': i, 'long': 'x' * 9000})"
    children = [subprocess.Popen([sys.executable, "-c", writer, str(n)]) for n in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert sorted((line["writer"], line["i"]) for line in lines) == [(w, i) for w in range(3) for i in range(40)]
    (tmp_path / "j").open("a").write('{"torn')
    referee.append_line(tmp_path / "j", {"after": "a torn line"})
    assert json.loads((tmp_path / "j").read_text().splitlines()[-1]) == {"after": "a torn line"}


@pytest.mark.parametrize("environment,words", [
    ({"AUTORESEARCH_TIME_BUDGET": "five"}, "AUTORESEARCH_TIME_BUDGET='five' is not a number"),
    ({"AUTORESEARCH_DEVICE": "tpu"}, "AUTORESEARCH_DEVICE=tpu is not here"),
    ({"AUTORESEARCH_CACHE_DIR": "/nowhere/at/all"}, "run: uv run prepare.py")])
def test_a_bad_environment_is_named_in_a_sentence(environment, words):
    result = program("train.py", **environment)
    assert result.returncode == 1 and words in result.stdout and "Traceback" not in result.stdout


def test_a_vocabulary_that_is_not_prepared_names_the_command(cache, tmp_path):
    text = (ROOT / "train.py").read_text()
    assert re.search(r'"vocab_size": .*4096\)', text)
    (tmp_path / "train.py").write_text(re.sub(r'("vocab_size": .*)4096\)', r"\g<1>777)", text))
    for name in ("prepare.py", "referee.py", "seal.py"):
        shutil.copy(ROOT / name, tmp_path)
    result = program("train.py", cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert "uv run prepare.py --dataset sotu --vocab-size 777" in result.stdout
