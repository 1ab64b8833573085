"""
A night on many GPUs by the rule of `decide.py --wave`, simulated from a recorded night.

    uv run dev/waves.py [--nights N] [--replay nights/nov24]

First table: in how many of 100 nights of 500 ideas that do nothing at least one is kept, with eight
slots. The noise of a run, variance 1, has three parts: that of commit and seed, the same whenever
they run again; that of a slot, AR(1) with correlation 0.5 from wave to wave; that of a whole wave,
which all its runs share. The floor of the margin plays no part. Random seed 1.

Second table: eight hours like the recorded night, whose seconds for a run and between two runs it
takes, at several numbers of slots. An agent takes IDEA_SECONDS to write an idea, while the wave
before runs. One slot follows the rule for pairs, as dev/simulate.py does.
"""

import argparse
import json
import math
import random
import statistics
from datetime import datetime
from functools import partial
from pathlib import Path

import simulate         # which has the folder above on the path

import decide

FIRST_SEEDS = [42, 42, 43, 44, 42, 42, 43, 44]      # of the first wave
IDEAS = 500
HOURS = 8
IDEA_SECONDS = 60
NOISE = {       # parts of the variance: of the slot, of the whole wave
    "commit and seed alone": (0, 0), "half of it the slot's": (0.5, 0),
    "half of it the wave's": (0, 0.5), "0.8 the slot's": (0.8, 0), "0.8 the wave's": (0, 0.8),
}


class Night:
    """Waves of runs. Commits are numbered: 0 is the baseline, and no idea does anything."""

    def __init__(self, slots, of_slot, of_wave, draw):
        self.parts = [math.sqrt(part) for part in (1 - of_slot - of_wave, of_slot, of_wave)]
        self.draw = draw
        self.moods = [draw() for _ in range(slots)]
        self.luck, self.values = {}, {}
        self.kept, self.false_keeps, self.ideas, self.runs = 0, 0, 0, 0
        self.promising = []                             # (gain, commit) to be confirmed
        first = self.wave([(0, seed) for seed in FIRST_SEEDS[:slots]])
        self.on_42 = [value for (_, seed), value in first if seed == 42]    # of the last kept one

    def wave(self, runs):
        """((commit, seed), val_bpb) of runs at the same time, one a slot."""
        assert len(runs) <= len(self.moods)
        common = self.draw()
        self.moods = [(mood + math.sqrt(3) * self.draw()) / 2 for mood in self.moods]
        results = []
        for run, mood in zip(runs, self.moods):
            if run not in self.luck:
                self.luck[run] = self.draw()
            own, of_slot, of_wave = self.parts
            value = own * self.luck[run] + of_slot * mood + of_wave * common
            self.values.setdefault(run[0], []).append(value)
            results.append((run, value))
        self.runs += len(results)
        return results

    def next(self, new):
        """One wave, with at most `new` new ideas in it."""
        margin = decide.margin(*decide.noise(v for v in self.values.values() if len(v) > 1))
        slots, seeds = len(self.moods), decide.FRESH_SEEDS
        self.promising.sort()
        count = min(len(self.promising), max(1, slots // 3 - 1))
        confirmed = [self.promising.pop()[1] for _ in range(count)]
        fresh = [(commit, seed) for commit in [self.kept, *confirmed] for seed in seeds]
        runs = fresh if confirmed else [(self.kept, 42)]
        first = self.ideas + 1
        self.ideas += min(new, slots - len(runs))
        runs += [(idea, 42) for idea in range(first, self.ideas + 1)]
        results = dict(self.wave(runs))
        if not confirmed:
            self.on_42.append(results[self.kept, 42])
        base = statistics.fmean(self.on_42)
        for idea in range(first, self.ideas + 1):
            gain = base - results[idea, 42]
            if decide.wave_verdict(gain, margin) == "confirm":
                self.promising.append((gain, idea))
        passed = []
        for commit in confirmed:
            gains = [results[self.kept, seed] - results[commit, seed] for seed in seeds]
            if decide.wave_verdict(math.inf, margin, gains) == "keep":
                passed.append((statistics.fmean(gains), commit))
        if passed:
            _, self.kept = max(passed)
            self.false_keeps += 1
            self.on_42 = self.values[self.kept][:1]     # its first run was on seed 42
            self.promising.clear()                      # on the old base: new ideas, if at all


def nights_with_false_keeps(nights, of_slot, of_wave):
    """The percentage of nights of IDEAS ideas in which at least one is kept."""
    draw = partial(random.Random(1).gauss, 0, 1)
    counts = []
    for _ in range(nights):
        night = Night(8, of_slot, of_wave, draw)
        while night.ideas < IDEAS or night.promising:
            night.next(IDEAS - night.ideas)
        counts.append(night.false_keeps)
    return 100 * statistics.fmean(count > 0 for count in counts)


def recorded(folder):
    """Median seconds of a run, and between the end of one and the start of the next."""
    lines = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    starts = [datetime.strptime(line["time"], "%Y-%m-%dT%H:%M:%S%z").timestamp() for line in lines]
    seconds = [line["total_seconds"] for line in lines]
    gaps = [after - before - run for before, after, run in zip(starts, starts[1:], seconds)]
    return statistics.median(seconds), statistics.median(gaps)


def replay(slots, run_seconds, gap, agents, nights):
    """
    (ideas an hour, runs an hour, empty slots in percent, false keeps a night) of nights in which
    each of `agents` writes an idea in IDEA_SECONDS.
    """
    draw = partial(random.Random(1).gauss, 0, 1)
    ideas, runs, waves, kept = 0, 0, 0, 0
    cycle = run_seconds + gap
    for _ in range(nights):
        if slots == 1:
            night = simulate.Night(0, 0, 0, draw)
            for result in night.decisions(ideas=10_000):        # more than fit into a night
                if (sum(map(len, night.values.values())) + 1) * cycle > HOURS * 3600:
                    break
                ideas += 1
                kept += result
            runs += sum(map(len, night.values.values()))
            waves += HOURS * 3600 / cycle
            continue
        night, clock, written = Night(slots, 0, 0, draw), cycle, 0.0
        waves += 1
        while clock + cycle <= HOURS * 3600:
            # An agent thinks while a wave runs; it does not wait for more ideas than it has.
            written += agents * cycle / IDEA_SECONDS
            before = night.ideas
            night.next(int(written))
            written -= night.ideas - before
            clock += cycle
            waves += 1
        ideas += night.ideas
        runs += night.runs
        kept += night.false_keeps
    hours = nights * HOURS
    return ideas / hours, runs / hours, 100 * (1 - runs / (waves * slots)), kept / nights


def main():
    parser = argparse.ArgumentParser(description="The rule for waves, simulated.")
    parser.add_argument("--nights", metavar="N", type=int, default=1000, help="default 1,000")
    parser.add_argument("--replay", metavar="FOLDER", type=Path, help="default nights/nov24",
                        default=Path(__file__).resolve().parent.parent / "nights" / "nov24")
    arguments = parser.parse_args()
    print("| noise | nights of 500 ideas with a false keep |\n| --- | --- |")
    for name, parts in NOISE.items():
        print(f"| {name} | {nights_with_false_keeps(arguments.nights, *parts):.1f}% |", flush=True)
    run_seconds, gap = recorded(arguments.replay)
    print(f"\n{HOURS} hours of runs of {run_seconds:.0f} s with {gap:.0f} s between them, "
          f"{IDEA_SECONDS} s of an agent for an idea; the noise that of commit and seed alone\n"
          "\n| slots | agents | ideas an hour | runs an hour | empty | false keeps a night |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for slots in (1, 8, 64, 512):
        needed = math.ceil(slots * IDEA_SECONDS / (run_seconds + gap))
        for agents in sorted({1, needed}):
            nights = max(30, arguments.nights // slots)
            ideas, runs, empty, kept = replay(slots, run_seconds, gap, agents, nights)
            print(f"| {slots} | {agents} | {ideas:,.0f} | {runs:,.0f} | {empty:.0f}% | "
                  f"{kept:.2f} |", flush=True)


if __name__ == "__main__":
    main()
