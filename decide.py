"""
What to do with an idea: keep it, run a pair with the last kept commit, or discard it.

    uv run decide.py [COMMIT] [--results PATH]
    uv run decide.py --wave COMMIT ...

COMMIT is HEAD unless named. On seed 42 its newest run-COMMIT-42-*.log beside results.tsv counts, on
other seeds the newest pair with the last kept commit. Baseline, last kept commit and noise come
from the rows of results.tsv, their num_steps from the logs. Prints one line that starts with
the decision. If something is missing, the line says what to do first, and the exit code is 1.
--wave: the rule for runs that wave.py made, several at a time: keep an idea, confirm it on three
fresh seeds, or discard it; a line for each commit.
"""

import argparse
import itertools
import math
import re
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

BASELINE_SEEDS = [43, 44, 42, 42]
FLOOR = 0.002           # no smaller gain is worth having, however quiet the machine
PAIR = 0.7              # of the margin: what the mean of two gains has to exceed
PAIR_SEEDS = [43, 44, 45]           # of an idea's first, second and third pair
AGAIN = 10              # rows after which the last kept commit runs again
FRESH_SEEDS = [43, 44, 45]          # on which a wave confirms an idea
FRESH = 1.2             # of the margin: what the mean of the three gains has to exceed

# On a CPU the speed wanders, and val_bpb with it: by so much per unit of ln(num_steps) on two cores
# (dev/log.md, sotu). A night corrects it by its own runs of one commit; this counts among them like
# a deviation of 10% in one run, since four baselines that differ in seed are easily off by a third:
# -0.15 in the night nov28, where all of its runs gave -0.106.
SLOPE = -0.11
SLOPE_WEIGHT = 0.01

# Descriptions of rows that are not ideas, as program.md has them written. An idea may begin with
# the same words: "seed 64 rows of the table", "baseline on a diet".
BASELINE = re.compile(
    r"baseline(?:(?: on (?P<machine>.+?))?(?:, again)?, seed (?P<seed>\d+).*)?$", re.I)
REPEAT = re.compile(r"(?P<again>again,? )?seed (?P<seed>\d+)(?(again)\b|(?=[:,;]|$))", re.I)

# What a `FAIL:` says when train.py is not to blame
MACHINE = re.compile(r"another run is at work|can't be written|is corrupted|has no room|MiB left"
                     "|do not add up|no result from Ray")

# ------------------------------------------------------------------------------------------------
# The rule

def noise(groups, fitted=0):
    """
    (s, f) of groups of val_bpb, one group per commit. s: the standard deviation of a commit's runs
    about their mean, pooled over the commits, NaN if none ran twice; f: its degrees of freedom,
    without the `fitted` that are spent: 1 if a slope was fitted to these runs.
    """
    squares, freedom = 0.0, 0
    for values in groups:
        mean = statistics.fmean(values)
        squares += sum((value - mean) ** 2 for value in values)
        freedom += len(values) - 1
    freedom = max(0, freedom - fitted)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def slope(groups):
    """
    The change of val_bpb per unit of ln(num_steps) between runs of one commit: least squares over
    groups of pairs (val_bpb, ln(num_steps)), one group per commit, with SLOPE as a prior.
    """
    xy, xx = SLOPE * SLOPE_WEIGHT, SLOPE_WEIGHT
    for group in groups:
        mean = [statistics.fmean(column) for column in zip(*group)]
        for value, x in group:
            xy += (x - mean[1]) * (value - mean[0])
            xx += (x - mean[1]) ** 2
    return min(0, xy / xx)


def margin(s, freedom):
    """The gain that counts. The factor falls as s becomes known (dev/simulate.py)."""
    factor = 6 if freedom < 3 else 5 if freedom < 4 else 3.5 if freedom < 8 else 3
    return max(FLOOR, factor * s) if freedom else FLOOR


def verdict(gain, margin, always_pair=False):
    """
    keep, run a pair, or discard. gain: in val_bpb over the last kept commit, on seed 42.
    always_pair: of a gain at equal steps only a pair can tell what it costs.
    """
    # Rounded: 1.240000 - 1.238000 is not more than 0.002.
    if round(gain - margin, 9) > 0 and not always_pair:
        return "keep"
    return "run a pair" if round(gain - margin / 3, 9) > 0 else "discard"


def needed(gains, margin):
    """What the mean of so many gains has to exceed: the noise of a mean falls with their number."""
    return PAIR * margin * math.sqrt(2 / len(gains))


def pair_verdict(gains, margin):
    """keep, run a pair, or discard. gains: on seed 42 and in one pair or more."""
    mean = statistics.fmean(gains)
    if round(mean - needed(gains, margin), 9) > 0:
        return "keep"
    more = len(gains) <= len(PAIR_SEEDS) and round(mean - margin / 3, 9) > 0
    return "run a pair" if more else "discard"


def wave_verdict(gain, margin, fresh=None):
    """
    keep, confirm, or discard. gain: in val_bpb on seed 42 over the mean of the last kept commit's
    runs; fresh: on FRESH_SEEDS, over its runs in the same wave, once they have run. They decide
    alone: of hundreds of ideas, the best on one seed are the luckiest.
    """
    if fresh is None:
        return "confirm" if round(gain - margin / 3, 9) > 0 else "discard"
    return "keep" if round(statistics.fmean(fresh) - FRESH * margin, 9) > 0 else "discard"

# ------------------------------------------------------------------------------------------------
# results.tsv

@dataclass
class Row:
    """
    n: counts from 0. train: stands for the train.py that ran: the short hash, or in analysis.ipynb
    its sha256. steps: the num_steps of its run, None if its log is gone.
    """
    n: int
    commit: str
    val_bpb: float
    memory_gb: float
    status: str
    description: str

    def __post_init__(self):
        baseline, repeat = BASELINE.match(self.description), REPEAT.match(self.description)
        self.kind = "baseline" if baseline else "repeat" if repeat else "idea"
        self.machine = baseline and baseline["machine"]
        named = baseline or repeat
        self.seed = int(named and named["seed"] or 42)
        self.train = self.commit[:7]
        self.steps = None


def read_results(path, complain):
    """
    The rows of results.tsv, with the num_steps of the logs beside it. complain: called with a
    sentence for each malformed row.
    """
    rows = []
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if not line.strip() or fields[0] == "commit":
            continue
        try:
            if len(fields) != 5:
                raise ValueError(f"{len(fields)} fields between tabs instead of 5")
            commit, val_bpb, memory_gb, status, description = fields
            row = Row(len(rows), commit, float(val_bpb), float(memory_gb), status, description)
            if status not in ("keep", "discard", "crash"):
                raise ValueError(f"status {status!r} instead of keep, discard or crash")
            if status != "crash" and not 0 < row.val_bpb < math.inf:
                raise ValueError(f"status {status}, but val_bpb {val_bpb}")
            rows.append(row)
        except ValueError as error:
            complain(f"{path}, line {number}: {error}; correct it: {line[:80]}")
    steps = {}
    for log in path.parent.glob("run-*-*.log"):
        found = summary(log.read_text("utf-8", errors="replace"))
        steps[log.name.split("-")[1][:7], found.get("val_bpb")] = found.get("num_steps")
    for row in rows:
        row.steps = number_of_steps(steps.get((row.train, f"{row.val_bpb:.6f}")))
    return rows


class Session:
    """What ran on one machine: a baseline on several seeds, and all that is compared with it."""

    def __init__(self, rows):
        self.rows, self.first, self.machine = rows, rows[0], rows[0].machine
        self.fit_slope()
        groups = {}
        for row in rows:
            row.equal = self.at_equal_steps(row.val_bpb, row.steps)
        for row in self.counted():
            groups.setdefault(row.train, []).append(row.equal)
        self.noise, self.freedom = noise(groups.values(), int(self.by_steps))
        self.margin = margin(self.noise, self.freedom)
        # The old kept commit's half of a pair may have its row after the idea that replaced it.
        self.kept = [row for row in rows if row.status == "keep" and row.kind != "repeat"][-1]

    def fit_slope(self):
        """
        Set `by_steps`, whether val_bpb is brought to equal steps, on a CPU (a GPU's speed is
        steady); `slope`, for that; `usual`, the ln(num_steps) of the baseline.
        """
        self.slope = self.usual = 0
        baseline = [row.steps for row in self.rows if row.train == self.first.train]
        self.by_steps = (self.machine or "").startswith("cpu") and None not in baseline
        if not self.by_steps:
            return
        groups = {}
        for row in self.counted():
            groups.setdefault(row.train, []).append((row.val_bpb, math.log(row.steps)))
        self.slope = slope(groups.values())
        self.usual = statistics.fmean(map(math.log, baseline))

    def counted(self):
        """The rows that compare: at equal steps those with steps."""
        return [row for row in self.rows if row.steps or not self.by_steps]

    def at_equal_steps(self, val_bpb, steps):
        """What a run would have got in as many steps as the baseline takes on average."""
        return val_bpb - self.slope * (math.log(steps) - self.usual) if steps else val_bpb

    def __str__(self):
        words = f"margin {self.margin:.6f}, noise {self.noise:.6f}, f = {self.freedom}"
        if not self.machine:
            words += " (the baseline's row names no device: correct it)"
        elif self.machine.startswith("cpu") and not self.by_steps:
            lost = [f"{row.val_bpb:.6f}" for row in self.rows
                    if row.train == self.first.train and not row.steps]
            words += (f" (not at equal steps: no log has the val_bpb {' or '.join(lost)} of the "
                      "baseline's rows; correct these, or move their logs back)")
        return words

    def runs(self, train, seed):
        """The rows of one train.py on one seed."""
        return [row for row in self.counted() if row.train == train and row.seed == seed]

    def missing(self):
        """The seeds on which the baseline has yet to run."""
        ran = Counter(row.seed for row in self.rows if row.train == self.first.train)
        return list((Counter(BASELINE_SEEDS) - ran).elements())


def sessions(rows):
    """A session starts with the first row kept, and with each baseline on another machine."""
    found = []
    for row in rows:
        if row.status == "crash":
            continue
        if found and row.machine in (None, found[-1][0].machine):
            found[-1].append(row)
        elif row.status == "keep" and row.kind != "repeat":
            found.append([row])
    return [Session(each) for each in found]

# ------------------------------------------------------------------------------------------------
# Logs

def same_commit(a, b):
    """Whether two hashes, short or long, name one commit."""
    return bool(a and b) and (a.startswith(b) or b.startswith(a))


def summary(text):
    """The summary of a log, as a dictionary of texts; empty if there is none."""
    return dict(re.findall(r"^(\w+): +(\S.*)$", text, re.M))


def number_of_steps(text):
    return int(text) if text and text.isdecimal() and int(text) else None


def logs(folder, commit, seed="*"):
    """The summaries of a commit's logs, as dictionaries, the newest last."""
    found = []
    for path in folder.glob(f"run-*-{seed}-*.log"):
        if same_commit(path.name.split("-")[1], commit):
            text = path.read_text("utf-8", errors="replace")
            more = {"name": path.name, "text": text, "ended": path.stat().st_mtime}
            found.append(summary(text) | more)
    return sorted(found, key=lambda log: log["ended"])


def number(log, seed, machine, kept=False):
    """
    The val_bpb of a log. Exits if there is none, or if it cannot be compared. kept: whether it is
    the last kept commit's, which has no bug.
    """
    name, text = log["name"], log["text"]
    if failure := re.search(r"^FAIL.*", text, re.M):
        if kept or MACHINE.search(failure[0]):
            sys.exit(f"{name}: {failure[0]}. That is not the idea's doing: once it is put right, "
                     "move this log to logs-<tag>/ and run again")
        sys.exit(f"{name}: {failure[0]}. Fix the bug and commit on top, or write a `crash` row")
    if "val_bpb" not in log:
        sys.exit(f"{name} has no val_bpb: wait if it is still running; move it to logs-<tag>/ "
                 f"if it was stopped by mistake; if it crashed, `tail -n 50 {name}` says why")
    # A night may have a budget of its own: one_budget() compares them.
    if doubt := re.search(r"^(?!time.budget).*\(not comparable\)", text, re.M):
        sys.exit(f"{name} says {' '.join(doubt[0].split())!r}: correct that and run again")
    if log.get("seed", str(seed)) != str(seed):
        sys.exit(f"{name} ran on seed {log['seed']}: move it to logs-<tag>/, and run on "
                 f"seed {seed}")
    if machine and log.get("device", machine) != machine:
        sys.exit(f"{name} ran on {log['device']}, the baseline on {machine}: on a new machine "
                 "run the last kept commit on seeds 42, 43, 44, and 42 again, then the idea; if it "
                 "is the same machine, correct the baseline's rows")
    return float(log["val_bpb"])


def time_of(log):
    """The TIME in a log's name, the same for both runs of a pair (a wave's has a number behind)."""
    return log["name"].removesuffix(".log").split("-", 3)[3]


def pairs(folder, commit, kept):
    """
    {seed: (log of the commit, log of the last kept one)} of what pair.py has run, the newest pair
    on each seed.
    """
    found = {}
    for seed in PAIR_SEEDS:
        theirs = {time_of(log): log for log in logs(folder, kept, seed)}
        for log in logs(folder, commit, seed):
            if time_of(log) in theirs:
                found[seed] = log, theirs[time_of(log)]
    return found


def fresh_gains(folder, commit, kept, machine):
    """The gains of a commit on FRESH_SEEDS in the newest wave with all six runs, or None."""
    def by_wave(name, seed):
        found = {}
        for log in logs(folder, name, seed):
            found.setdefault(log["name"].split("-")[3], []).append(log)
        return found

    def mean(logs, seed, kept=False):
        return statistics.fmean(number(log, seed, machine, kept) for log in logs)

    mine, theirs = ([by_wave(name, seed) for seed in FRESH_SEEDS] for name in (commit, kept))
    waves = set.intersection(*map(set, mine + theirs))
    if not waves:
        return None
    newest = max(waves, key=lambda wave: mine[0][wave][-1]["ended"])
    return [mean(b[newest], seed, kept=True) - mean(a[newest], seed)
            for a, b, seed in zip(mine, theirs, FRESH_SEEDS)]


def busy(log, usual, again="move this log to logs-<tag>/ and run again"):
    """
    A warning if others had over 10% of the machine during a run; for a log that does not tell, if
    it took over 10% fewer steps than those in `usual`. Else an empty text.
    """
    if share := re.match(r"(\d+)% ours", log.get("machine", "")):
        if int(share[1]) >= 90:
            return ""
        return f"; {log['name']} had {share[1]}% of the machine, the rest went to others: {again}"
    counts = [int(each["num_steps"]) for each in usual if "num_steps" in each]
    steps = int(log.get("num_steps", 0))
    if not counts or steps >= 0.9 * statistics.median(counts):
        return ""
    return (f"; {log['name']} has {steps} steps instead of {statistics.median(counts):.0f}: unless "
            f"the idea slows a step down, the machine was busy, so {again}")


def other_kernels(log, usual):
    """A warning if a run had another attention than those in `usual`; else an empty text."""
    # A run that has not ended names its attention in other words, those of its start.
    named = [each["attention"] for each in usual if "val_bpb" in each and "attention" in each]
    attention = log.get("attention")
    if not named or attention in (None, named[-1]):
        return ""
    # " in float32": the dtype, which is measured
    kernel = "" if attention.split(" in ")[0] == named[-1].split(" in ")[0] else (
        "run uv run prepare.py, ")
    return (f"; {log['name']} ran with the attention {attention} instead of {named[-1]}: unless "
            f"the idea changes that, {kernel}move this log to logs-<tag>/ and run again")

# ------------------------------------------------------------------------------------------------
# The program

def one_budget(mine, theirs):
    """Exits if two logs are of different budgets."""
    budgets = [log.get("time_budget", "300").split()[0] for log in (mine, theirs)]
    if len(set(budgets)) > 1:
        sys.exit(f"{mine['name']} trained for {budgets[0]} s, {theirs['name']} for {budgets[1]} s: "
                 f"a night has one budget; run it again with --budget {budgets[1]} behind "
                 "uv run trial.py, or start a new night")


def first_gain(session, folder, commit):
    """
    The gain on seed 42 over the mean of the last kept commit, at equal steps on a CPU, and the
    num_steps. Exits if something is missing.
    """
    kept = session.kept
    runs = logs(folder, commit, 42)
    if not runs:
        sys.exit(f"there is no run-{commit}-42-*.log: run {commit} on seed 42 first")
    value = number(runs[-1], 42, session.machine)
    for theirs in logs(folder, kept.commit, 42):
        if "val_bpb" in theirs:
            one_budget(runs[-1], theirs)
    earlier = [row.equal for row in session.runs(kept.train, 42)]
    if not earlier:
        what = "row on seed 42:"
        if any(row.train == kept.train and row.seed == 42 for row in session.rows):
            what = "row on seed 42 with the val_bpb of a log: correct the row, or"
        sys.exit(f"{kept.commit}, the last kept commit, has no {what} run it there first")
    steps = number_of_steps(runs[-1].get("num_steps"))
    if session.by_steps and not steps:
        sys.exit(f"{runs[-1]['name']} has no num_steps: correct train.py's report and run again")
    return statistics.fmean(earlier) - session.at_equal_steps(value, steps), steps


def faster(session, steps):
    """
    The gain of taking more steps than the last kept commit ever took, in val_bpb: that may be the
    idea, and not the machine.
    """
    kept = [row.steps for row in session.rows if row.train == session.kept.train and row.steps]
    if not session.by_steps or not kept:
        return 0
    return max(0, -session.slope * math.log(steps / max(kept)))


def by_pairs(session, found, gain):
    """
    (verdict, mean gain, words) with the logs of pairs, by seed. gain: on seed 42. Exits if one of
    them cannot be compared.
    """
    gains, costs, told = [], [], []
    for seed, (mine, theirs) in found.items():
        # If one run of a pair broke, pair.py stopped the other: name the one that broke.
        broken_first = sorted((mine, theirs), key=lambda log: "stopped by SIGTERM" in log["text"])
        value = {log["name"]: number(log, seed, session.machine, log is theirs)
                 for log in broken_first}
        one_budget(mine, theirs)
        gains.append(value[theirs["name"]] - value[mine["name"]])
        told.append(f"{gains[-1]:+.6f} on seed {seed}")
        if session.by_steps:
            costs.append(math.log(int(mine["num_steps"]) / int(theirs["num_steps"])))
    if costs:
        # What a step costs: in a pair both have had the same moments of the machine.
        cost = statistics.fmean(costs)
        gain -= session.slope * cost
        told = [f"with {math.exp(cost):.3f} times the steps {gain:+.6f}", *told]
    gains = [gain, *gains]
    told.append(f"mean {statistics.fmean(gains):+.6f} "
                f"(needed: {needed(gains, session.margin):.6f})")
    return pair_verdict(gains, session.margin), statistics.fmean(gains), ", ".join(told)


def decision(session, folder, commit, found):
    """
    (verdict, why and what next) for a commit, by its logs and the pairs `found`. Exits if something
    is missing.
    """
    kept = session.kept
    # The margin is that before the pairs, even if rows of them are there already.
    of_pairs = {(seed, float(log.get("val_bpb", 0))) for seed, (_, log) in found.items()}
    session = Session([row for row in session.rows
                       if row.kind != "repeat" or (row.seed, row.val_bpb) not in of_pairs])
    gain, steps = first_gain(session, folder, commit)
    more = faster(session, steps)
    result = verdict(gain + more, session.margin, session.by_steps)
    words = f"gain {gain:+.6f} over {kept.commit} on seed 42"
    if session.by_steps:
        words += " at equal steps"
    if more and not found:
        words += f" and {more:+.6f} for more steps than {kept.commit} ever took, if due to the idea"
    simpler = "; or keep if the code got simpler"
    if found and (result == "run a pair" or session.by_steps):
        result, gain, told = by_pairs(session, found, gain)
        words += f", {told}"
    elif session.by_steps:
        simpler = "; or, if the code got simpler, run a pair" if result == "discard" else ""
    words += f"; {session}"
    if result == "run a pair":
        words += "; now run uv run trial.py pair"
    if result != "keep" and gain >= -session.noise:
        words += simpler
    usual = logs(folder, kept.commit)
    log = logs(folder, commit, 42)[-1]                      # earlier ones do not count
    words += busy(log, usual) + other_kernels(log, usual)
    for log in itertools.chain(*found.values()):
        if "val_bpb" not in log:
            continue
        again = "move both logs of this pair to logs-<tag>/ and run it again"
        words += busy(log, usual, again) + other_kernels(log, usual)
    return result, words


def wave_decision(session, folder, commit):
    """(verdict, why and what next) for a commit of a wave. Exits if something is missing."""
    kept = session.kept
    git = ["git", "-C", folder, "merge-base", "--is-ancestor", kept.commit, commit]
    if subprocess.run(git, capture_output=True).returncode:
        sys.exit(f"{commit} is not on top of {kept.commit}, the last kept commit: "
                 f"git cherry-pick {commit} onto it, and run that as a new idea")
    gain, _ = first_gain(session, folder, commit)
    fresh = fresh_gains(folder, commit, kept.commit, session.machine)
    result = wave_verdict(gain, session.margin, fresh)
    words = f"gain {gain:+.6f} over {kept.commit} on seed 42"
    if fresh:
        seeds = ", ".join(map(str, FRESH_SEEDS))
        words += (f", mean {statistics.fmean(fresh):+.6f} on seeds {seeds} "
                  f"(needed: {FRESH * session.margin:.6f})")
    words += f"; {session}"
    if result == "confirm":
        both = " ".join(f"{name}:{seed}" for name in (commit, kept.commit) for seed in FRESH_SEEDS)
        words += f"; put into the next wave: {both}"
    if result == "discard" and gain >= -session.noise:
        words += "; or keep if the code got simpler"
    usual = logs(folder, kept.commit)
    for log in logs(folder, commit):
        if "val_bpb" in log:
            words += busy(log, usual) + other_kernels(log, usual)
    return result, words


def short_hash(name, folder):
    """The short hash of a commit. Exits if there is none."""
    git = ["git", "-C", folder, "rev-parse", "--short", "--verify", "--quiet", f"{name}^{{commit}}"]
    found = subprocess.run(git, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{name} is no commit here; `git log --oneline --all` lists them")
    return found.stdout.strip()


def decide(rows, session, commit, path, wave):
    """One line for a commit. Exits if something is missing."""
    folder = path.parent
    repeats = [row.n for row in rows if row.kind == "repeat" and row.seed == 42]
    rows_since = len(rows) - 1 - max(repeats + [session.first.n])
    if commit[:7] == session.kept.train:
        again = rows_since >= AGAIN and not wave
        task = "run it on seed 42 again" if again else "commit an idea"
        sys.exit(f"nothing to decide, {commit} is the last kept commit: {task}; {session}")
    told = [row for row in rows if row.n > session.first.n and row.train == commit[:7]]
    if told:
        name = f"{commit} " if wave else ""
        return f"{name}{told[-1].status}: decided already, {path} has a row of {commit}"
    if wave:
        result, words = wave_decision(session, folder, commit)
        return f"{commit} {result}: {words}"
    found = pairs(folder, commit, session.kept.commit)
    result, words = decision(session, folder, commit, found)
    # The row of this idea comes next, and two for each pair.
    rows_since += 1 + 2 * len(found)
    if result != "run a pair" and rows_since >= AGAIN:
        words += "; then it is time to run the last kept commit on seed 42 again"
    return f"{result}: {words}"


def main():
    parser = argparse.ArgumentParser(description="Keep an idea, run it again, or discard it?")
    parser.add_argument("commits", metavar="COMMIT", nargs="*", default=["HEAD"],
                        help="default: HEAD")
    parser.add_argument("--results", metavar="PATH", type=Path, default=Path("results.tsv"))
    parser.add_argument("--wave", action="store_true", help="runs of wave.py, several at a time")
    arguments = parser.parse_args()
    if len(arguments.commits) > 1 and not arguments.wave:
        parser.error("several commits are for --wave")
    path = arguments.results
    if not path.exists():
        sys.exit(f"there is no {path}: make it as program.md says (Setup)")
    commits = [short_hash(name, path.parent) for name in arguments.commits]
    rows = read_results(path, sys.exit)
    found = sessions(rows)
    if not found:
        sys.exit(f"{path} has no baseline: run train.py as it is on seeds 42, 43, 44, and 42 again")
    session = found[-1]
    if missing := session.missing():
        sys.exit(f"{len(missing)} of 4 baselines missing: run {session.first.commit} on seed "
                 f"{missing[0]} first, or write its row if it has run")
    undecided = 0
    for commit in commits:
        try:
            print(decide(rows, session, commit, path, arguments.wave))
        except SystemExit as reason:
            if len(commits) == 1:
                raise
            print(f"{commit} undecided: {reason}")
            undecided += 1
    if undecided:
        sys.exit(1)


if __name__ == "__main__":
    main()
