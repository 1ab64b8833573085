"""program.md's own commands, taken from its text, in a clone whose train.py takes a moment."""

import os
import re
import subprocess
import sys
import time

import pytest

from children import ROOT, copy_programs

TEXT = (ROOT / "program.md").read_text()

# Prints what decide.py reads. What it is told comes from its own last lines, as an idea's would.
STUB = '''
import os, time
if os.environ.get("STOP"):
    time.sleep(60)
print("---")
seed = os.environ["AUTORESEARCH_SEED"]
bpb = {{"42": {0}, "43": {1}}}.get(seed, 1.2501)
for key, value in dict(val_bpb=f"{{bpb:.6f}}", peak_vram_mb=1024.0, num_steps=100,
                       device="cpu (test, 2 cores)", seed=seed, machine="100% ours").items():
    print(f"{{key + ':':<17}} {{value}}")
'''


def commands(heading, containing):
    """The indented block below a heading of program.md that contains these words."""
    section = TEXT.split(f"\n## {heading}")[1].split("\n## ")[0]
    blocks = re.findall(r"(?:^ {4,}\S.*\n)+", section, re.M)
    [block] = [block for block in blocks if containing in block]
    return "\n".join(line.strip() for line in block.splitlines())


def inline(containing):
    """The command between backquotes, broken over lines or not, that contains these words."""
    quoted = [" ".join(each.split()) for each in re.findall(r"`([^`]+)`", TEXT)]
    [command] = {each for each in quoted if containing in each}
    return command


RUN, WAIT = commands("Running an experiment", "trial.py").splitlines()
DISCARD = commands("The loop, forever", "update-ref")
COMMIT = inline("git commit -m")
STOP = inline("trial.py stop")
PAIR = inline("trial.py pair")


@pytest.fixture
def clone(tmp_path):
    """A clone on the branch of a night; shell(script): its output. uv runs this Python there."""
    folder = tmp_path / "clöne of autoresearch"
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    for name in "program.md", "decide.py", "trial.py", "pair.py", "machine.py", ".gitignore":
        (folder / name).write_text((ROOT / name).read_text())
    (tmp_path / "bin").mkdir()
    uv = tmp_path / "bin" / "uv"
    uv.write_text(f'#!/bin/sh\n[ "$1" = run ] && shift\nexec {sys.executable} "$@"\n')
    uv.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    environment |= {f"GIT_{who}_{what}": "night@example.org" for who in ("AUTHOR", "COMMITTER")
                    for what in ("NAME", "EMAIL")}

    def shell(script, **more):
        result = subprocess.run(["bash", "-c", script], cwd=folder, env=environment | more,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return result.stdout.strip()

    (folder / "train.py").write_text(STUB.format(1.25, 1.2501))
    shell("git checkout -qb autoresearch/test && git add -A && git commit -qm stub && "
          "git branch -f main")
    return folder, shell


def run(shell, seed):
    """Run train.py on a seed as program.md says; its log's name."""
    started = shell(RUN.replace("42", str(seed)))
    log = re.fullmatch(r"started: (run-\S+-\d+-\d{8}\.log)", started)[1]
    assert shell(WAIT).startswith(f"{log}: ended\n")
    return log


def row(folder, commit, bpb, status, words):
    with open(folder / "results.tsv", "a") as file:
        file.write(f"{commit}\t{bpb:.6f}\t1.0\t{status}\t{words}\n")


def idea(folder, shell, *bpb):
    """Write an idea into train.py and commit it. Returns its hash."""
    (folder / "train.py").write_text(STUB.format(*bpb))
    shell(COMMIT.replace('"<the idea, and why it should help>"', "'an idea'"))
    return shell("git rev-parse --short HEAD")


def baselines(folder, shell):
    """Four runs and their rows; decide.py asks for each that is missing."""
    kept = shell("git rev-parse --short HEAD")
    for number, seed in enumerate((42, 43, 44)):
        if number:
            said = shell("uv run decide.py")
            assert f"{4 - number} of 4 baselines missing: run {kept} on seed {seed} first" in said
        assert run(shell, seed).startswith(f"run-{kept}-{seed}-")
        row(folder, kept, 1.25, "keep", f"baseline on cpu (test, 2 cores), seed {seed}")
    row(folder, kept, 1.2502, "keep", "again, seed 42")
    assert "nothing to decide" in shell("uv run decide.py")
    return kept


def test_the_loop_keeps_discards_crashes_and_runs_pairs(clone):
    folder, shell = clone
    kept = baselines(folder, shell)
    steering = (folder / "program.md").read_text() + "\nTry smaller models.\n"
    (folder / "program.md").write_text(steering)            # the human, in the middle of the night

    better = idea(folder, shell, 1.24, 1.24)
    assert "run-" in shell("uv run decide.py") and "first" in shell("uv run decide.py")
    run(shell, 42)
    assert shell("uv run decide.py").startswith("keep: gain +0.010100")
    row(folder, better, 1.24, "keep", "better")

    worse = idea(folder, shell, 1.26, 1.26)
    run(shell, 42)
    assert shell("uv run decide.py").startswith("discard: gain -0.020000")
    row(folder, worse, 1.26, "discard", "worse")
    table = (folder / "results.tsv").read_text()
    discard = DISCARD.replace("<tag>", "test").replace("<last kept hash>", better)
    shell(discard.replace("<short hash>", worse))
    assert shell("git rev-parse --short HEAD") == better
    assert shell("git for-each-ref refs/discarded").endswith(f"refs/discarded/test/{worse}")
    assert (folder / "results.tsv").read_text() == table
    assert (folder / "program.md").read_text() == steering

    near = idea(folder, shell, 1.2388, 1.2399)
    run(shell, 42)
    assert shell("uv run decide.py").startswith("run a pair: gain +0.001200")
    assert shell(PAIR) == "started: pair.out"
    said = shell(WAIT)
    assert re.search(rf"^run-{near}-43-\d+.log: val_bpb 1.239900, 100 steps$", said, re.M)
    assert re.search(rf"^run-{better}-43-\d+.log: val_bpb 1.240000, 100 steps$", said, re.M)
    assert shell("uv run decide.py").startswith("discard: gain +0.001200")
    assert shell("git rev-parse --short HEAD") == near
    shell(discard.replace("<short hash>", near))

    (folder / "train.py").write_text("raise ValueError('a bug')")
    shell(COMMIT.replace('"<the idea, and why it should help>"', "'a crash'"))
    log = run(shell, 42)
    assert "ValueError: a bug" in (folder / log).read_text()
    assert "has no val_bpb" in shell("uv run decide.py")
    crash = shell("git rev-parse --short HEAD")
    row(folder, crash, 0, "crash", "a bug")
    shell(discard.replace("<short hash>", crash))
    assert shell("git rev-parse --short HEAD") == better != kept
    assert shell("git status --short") == "M program.md"


def test_picking_up_finds_its_own_run_alone(clone):
    folder, shell = clone
    other = subprocess.Popen(["tail", "-f", folder / "train.py"], stdout=subprocess.DEVNULL)
    assert "no run was started here" in shell(WAIT) and "no run is going" in shell(STOP)
    shell(RUN, STOP="1")
    assert "a run is going" in shell(RUN)
    script = "import trial; trial.wait(0.1)"
    assert "going for" in shell(f"{sys.executable} -c '{script}'")
    assert shell(STOP).startswith("stopped process")
    assert shell(WAIT).count("ended") == 1 and other.poll() is None
    # The number of a process that ended goes to another one, or its file is torn.
    (folder / "trial.json").write_text(
        f'{{"pid": {other.pid}, "started": {time.time()}, "log": "run-x.log", '
        f'"command": ["python", "{folder}/train.py"]}}')
    assert "ended" in shell(WAIT) and "no run is going" in shell(STOP) and other.poll() is None
    (folder / "trial.json").write_text('{"pid": 1')
    assert "no run was started here" in shell(WAIT)
    other.kill()
    other.wait()


def test_a_real_run_is_known_while_it_goes_on(clone, cache):
    """It is sealed: in another working folder than the one it was started in."""
    folder, shell = clone
    copy_programs(folder)
    small = (ROOT / "tests" / "small.py").read_text()
    (folder / "train.py").write_text(small.replace("prepare.Run(400)", "prepare.Run(512)"))
    shell(COMMIT.replace('"<the idea, and why it should help>"', "'a real run'"))
    started = shell(f"{RUN} --budget 30", AUTORESEARCH_CACHE_DIR=str(cache))
    log = folder / started.removeprefix("started: ")
    while "step " not in log.read_text():
        assert "Error" not in log.read_text() and "FAIL" not in log.read_text()
        time.sleep(0.1)
    assert "a run is going" in shell(RUN)
    assert shell(STOP).startswith("stopped process") and "ended" in shell(WAIT)


def test_a_run_belongs_to_its_commit(clone):
    folder, shell = clone
    (folder / "train.py").write_text(STUB.format(1.2, 1.2))
    assert "train.py is not as committed" in shell(RUN) and not list(folder.glob("run-*.log"))
    assert "neither a seed" in shell("uv run trial.py forty-two")


def test_trial_passes_the_budget_on_and_starts_waves(clone):
    folder, shell = clone
    budget = "import os; print('budget', os.environ['AUTORESEARCH_TIME_BUDGET'])"
    (folder / "train.py").write_text(budget)
    (folder / "wave.py").write_text("import sys; print('wave of', *sys.argv[1:])")
    (folder.parent / "bin" / "uv").write_text(
        f'#!/bin/sh\nshift; [ "$1" = --script ] && shift\nexec {sys.executable} "$@"\n')
    shell(COMMIT.replace('"<the idea, and why it should help>"', "'a budget'"))
    shell(f"{RUN} --budget 60")
    assert shell(WAIT).endswith("budget 60")
    # the human's line in program.md, where the environment says nothing
    steering = (folder / "program.md").read_text()
    unset = "unset AUTORESEARCH_TIME_BUDGET; "
    (folder / "program.md").write_text(steering.replace("Budget: 300 s", "Budget: 45 s"))
    shell(unset + RUN)
    assert shell(WAIT).endswith("budget 45")
    (folder / "program.md").write_text(steering.replace("Budget: 300 s", "Budget: five minutes; s"))
    assert "instead of, say, 'Budget: 300 seconds'" in shell(unset + RUN)
    assert shell("uv run trial.py abc:42 def:43") == "started: wave.out"
    assert shell(WAIT) == "wave.out: ended\nwave of abc:42 def:43"


def test_in_a_worktree_the_same_commands_work(clone, tmp_path):
    folder, shell = clone
    shell(f"git worktree add -q -b autoresearch/other '{tmp_path}/tree' main")
    log = shell(f"cd '{tmp_path}/tree'; {RUN}; {WAIT} > /dev/null").split()[-1]
    assert "val_bpb" in (tmp_path / "tree" / log).read_text()
    assert "results.tsv has no baseline" in shell(
        f"cd '{tmp_path}/tree'; uv run decide.py")
