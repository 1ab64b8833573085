"""pair.py: two real runs that train by turns, and what becomes of one when the other breaks."""

import itertools
import json
import os
import re
import subprocess
import sys
import time

import psutil
import pytest

import referee
from children import ROOT, copy_programs, forked, program

LOG = "            run.log(step, loss)\n"
BUDGET = 3         # seconds
AHEAD = referee.Turns.AHEAD


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory):
    """For small.py: little text to evaluate."""
    folder = tmp_path_factory.mktemp("cache")
    result = program("prepare.py", "--dataset", "sotu", "--vocab-size", 400, "--eval-bytes", 20_000,
                     AUTORESEARCH_CACHE_DIR=folder)
    assert result.returncode == 0, result.stdout
    return folder


class Pair:
    """A clone whose first commit is the baseline, with one idea on top."""

    def __init__(self, folder, cache, idea="pass"):
        """idea: code to run in each step."""
        self.clone, self.tmp = folder / "clone", folder / "tmp"
        self.cache = folder / "cache"
        for new in self.clone, self.tmp, self.cache:
            new.mkdir()
        for name in "sotu", "dataset.json":
            (self.cache / name).symlink_to(cache / name)
        copy_programs(self.clone)
        said = 'import time; print("step", time.monotonic())'
        self.git("init", "-q")
        self.kept = self.commit(said)
        rows = [f"{self.kept}\t2.0\t0.1\tkeep\tbaseline on cpu, seed {seed}\n"
                for seed in (42, 43, 44, 42)]
        (self.clone / "results.tsv").write_text("".join(rows))
        self.idea = self.commit(f"{said}; {idea}")
        self.environment = os.environ | {
            "AUTORESEARCH_CACHE_DIR": str(self.cache), "TMPDIR": str(self.tmp),
            "AUTORESEARCH_TIME_BUDGET": str(BUDGET)}

    def git(self, *arguments):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(command, cwd=self.clone, check=True, capture_output=True,
                              text=True).stdout.strip()

    def commit(self, code):
        text = (ROOT / "tests" / "small.py").read_text()
        assert LOG in text
        (self.clone / "train.py").write_text(text.replace(LOG, f"            {code}\n{LOG}"))
        self.git("add", "*.py")
        self.git("commit", "-qm", "a commit")
        return self.git("rev-parse", "--short", "HEAD")

    def run(self):
        return forked(self.clone / "pair.py", **self.environment)

    def log(self, commit):
        [log] = self.clone.glob(f"run-{commit}-43-*.log")
        return log

    def lines(self):
        text = (self.cache / "journal.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def left(self):
        """What lies in the folder for temporary files."""
        known = "autoresearch-devices", "torchinductor_"
        return [path.name for path in self.tmp.iterdir() if not path.name.startswith(known)]

    def steps(self, commit):
        """When the steps of a commit ended."""
        text = self.log(commit).read_text()
        return [float(at) for at in re.findall(r"^step (\d+\.\d+)$", text, re.M)]


def test_two_runs_train_by_turns(tmp_path, small_cache):
    pair = Pair(tmp_path, small_cache)
    result = pair.run()
    assert result.returncode == 0, result.stdout
    assert f"{pair.idea} and {pair.kept} on seed 43, by turns" in result.stdout
    for commit in pair.idea, pair.kept:
        line = rf"^run-{commit}-43-\d+.log: val_bpb [\d.]+, \d+ steps$"
        assert re.search(line, result.stdout, re.M)
    stamps = {pair.log(commit).name.split("-")[3] for commit in (pair.idea, pair.kept)}
    assert len(stamps) == 1
    # each had its whole budget, and the number of the seed
    lines = pair.lines()
    assert {line["commit"] for line in lines} == {pair.idea, pair.kept}
    for line in lines:
        assert line["turns"] and line["seed"] == 43 and line["failure"] is None
        assert 0.9 * BUDGET < line["training_seconds"] < 1.1 * BUDGET
    # one after the other: never did both train within one turn
    steps = sorted((at, commit) for commit in (pair.idea, pair.kept) for at in pair.steps(commit))
    blocks = [[at for at, _ in group]
              for _, group in itertools.groupby(steps, lambda step: step[1])]
    assert BUDGET / AHEAD / 2 <= len(blocks) <= 2 * BUDGET / AHEAD + 2
    assert max(block[-1] - block[0] for block in blocks) < 4 * AHEAD
    assert not pair.left()


@pytest.mark.parametrize("fault,words,other", [
    ("exit('broken')", "broken", "stopped by SIGTERM"),
    # work in a thread goes on while the main one waits for its turn
    ("import threading; step or threading.Thread(daemon=True, target=lambda: "
     "[pow(3, 9**6) for _ in iter(int, 1)]).start()",
     "while it was the turn of the other run of the pair", "stopped by SIGTERM"),
    ("import os; os.kill(os.getpid(), 9)", "", "stopped by SIGTERM")])
def test_a_run_that_breaks_ends_the_other(fault, words, other, tmp_path, small_cache):
    pair = Pair(tmp_path, small_cache, fault)
    result = pair.run()
    assert result.returncode == 1
    for commit in pair.idea, pair.kept:
        assert f"{pair.log(commit).name}: no val_bpb" in result.stdout
    assert words in pair.log(pair.idea).read_text()
    assert other in pair.log(pair.kept).read_text()
    assert len(pair.lines()) == 2 and not pair.left()


def test_beside_a_run_that_does_not_start_none_is_started(tmp_path, small_cache):
    pair = Pair(tmp_path, small_cache)
    (pair.clone / "train.py").write_text("import prepare, nonsense")
    pair.git("commit", "-qam", "nonsense")
    result = pair.run()
    assert result.returncode == 1 and result.stdout.count("no val_bpb") == 2
    assert not list(pair.clone.glob(f"run-{pair.kept}-*"))


def test_turns_leave_two_clocks_side_by_side(tmp_path):
    """By hand: steps of 0.35 and 0.2 s, each run goes on until it is 0.1 s ahead."""
    (tmp_path / "turn").write_text("0 0\n")
    both = [referee.Turns(tmp_path / name) for name in "01"]
    clocks, order = [0.0, 0.0], []
    for each in both:
        each.mark("ready")
    for _ in range(5):
        for name, (each, step) in enumerate(zip(both, (0.35, 0.2))):
            assert each.is_mine() and not both[1 - name].is_mine()
            while clocks[name] < each.until:
                clocks[name] = round(clocks[name] + step, 6)
                order.append(str(name))
            each.pass_on(clocks[name])
    assert "".join(order) == "0111" "01" "011" "011" "011"
    both[1].mark("over")
    assert both[0].is_mine() and both[0].until == float("inf")


def test_a_pair_that_is_stopped_leaves_nothing_behind(tmp_path, small_cache):
    pair = Pair(tmp_path, small_cache)
    process = subprocess.Popen([sys.executable, "pair.py"], cwd=pair.clone, text=True,
                               env=pair.environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    while not (list(pair.clone.glob(f"run-{pair.kept}-*")) and pair.steps(pair.kept)):
        assert process.poll() is None
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 4                             # two runs and their referees
    process.terminate()
    assert "stopped by SIGTERM" in process.communicate(timeout=60)[0] and process.returncode == 1
    assert not psutil.wait_procs(family, 30)[1] and not pair.left()
    assert len(pair.lines()) == 2


def test_what_a_pair_cannot_do_is_said(tmp_path, small_cache):
    pair = Pair(tmp_path, small_cache)
    for commit, seed in itertools.product((pair.idea, pair.kept), (43, 44, 45)):
        (pair.clone / f"run-{commit}-{seed}-01120000.log").write_text("---\nval_bpb:  1.9\n")
    result = pair.run()
    assert result.returncode == 1 and f"{pair.idea} has had its three pairs" in result.stdout
    pair.git("reset", "-q", "--hard", pair.kept)
    result = pair.run()
    assert result.returncode == 1 and "is the last kept commit itself" in result.stdout
    (pair.clone / "results.tsv").write_text("")
    result = pair.run()
    assert result.returncode == 1 and "results.tsv has no baseline yet" in result.stdout
