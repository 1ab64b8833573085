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
import sys
from functools import partial
from pathlib import Path

import simulate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import decide

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
        self.on_42 = []                                 # of the last kept commit
        seeds = [42, 42, 43, 44, 42, 42, 43, 44]
        for (_, seed), value in self.wave([(0, seed) for seed in seeds[:slots]]):
            self.on_42 += [value] if seed == 42 else []

    def wave(self, runs):
        """((commit, seed), val_bpb) of runs at the same time."""
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
        """One wave, with at most `new` new ideas in it; the number there was room for."""
        margin = decide.margin(*decide.noise(v for v in self.values.values() if len(v) > 1))
        slots, seeds = len(self.moods), decide.FRESH_SEEDS
        self.promising.sort()
        count = min(len(self.promising), max(1, slots // 3 - 1))
        confirmed = [self.promising.pop()[1] for _ in range(count)]
        fresh = [(commit, seed) for commit in [self.kept, *confirmed] for seed in seeds]
        runs = fresh if confirmed else [(self.kept, 42)]
        room = slots - len(runs)
        first = self.ideas + 1
        self.ideas += min(new, room)
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
        return room


def nights_with_false_keeps(nights, of_slot, of_wave):
    """(percent of nights with one or more, false keeps a night)."""
    draw = partial(random.Random(1).gauss, 0, 1)
    counts = []
    for _ in range(nights):
        night = Night(8, of_slot, of_wave, draw)
        while night.ideas < IDEAS or night.promising:
            night.next(IDEAS - night.ideas)
        counts.append(night.false_keeps)
    return 100 * statistics.fmean(count > 0 for count in counts), statistics.fmean(counts)
