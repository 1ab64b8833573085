"""
How often the rule of decide.py keeps an idea that does nothing, in percent.

    uv run dev/simulate.py [--nights N]

A night is four baselines and then 60 ideas. Each is compared on seed 42 with the last kept commit,
which may have been kept by chance, and in pairs on further seeds where decide.py asks for them.
The last kept commit runs again whenever ten rows have come. The noise of a run has two parts: that
of commit and seed, the same whenever they run again, and that of the machine, AR(1) with
correlation rho from one run to the next. Its variance is 1, so the floor of the margin plays no
part. Random seed 1.

In the last lines the noise has a third part, a speed that wanders as well, moves val_bpb by so many
standard deviations of the other two, and is seen in num_steps: what decide.py does on a CPU. The
runs of a pair train by turns, so that they have one speed, but for 0.3 of such a deviation.
"""

import argparse
import math
import random
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import decide

IDEAS = 60
APART = 0.3     # standard deviations of the rest, by which the speeds of a pair's runs differ
# The machine's fraction of the variance, rho, and what its speed adds.
MACHINES = [(0, 0, 0), (0.5, 0.5, 0), (0.8, 0.5, 0), (0.8, 0.8, 0), (0.8, 0.95, 0),
            (0, 0, 10), (0.5, 0.5, 3), (0.5, 0.5, 10), (0.5, 0.95, 10)]


class Night:
    """The runs of one night. Commits are numbered: 0 is the baseline."""

    def __init__(self, fraction, rho, speed, draw):
        self.fraction, self.rho, self.draw, self.by_steps = fraction, rho, draw, speed > 0
        # in units of ln(num_steps), which decide.SLOPE takes to val_bpb
        self.spread = speed / -decide.SLOPE
        self.mood, self.speed = draw(), draw()
        self.luck = {}
        self.values = {}

    def wander(self, value):
        return self.rho * value + math.sqrt(1 - self.rho ** 2) * self.draw()

    def run(self, commit, seed, speed=None):
        """(val_bpb, ln(num_steps)) of a run, at a speed of its own unless it is given."""
        self.mood, self.speed = self.wander(self.mood), self.wander(self.speed)
        if (commit, seed) not in self.luck:
            self.luck[commit, seed] = self.draw()
        x = self.spread * (self.speed if speed is None else speed)
        value = (math.sqrt(1 - self.fraction) * self.luck[commit, seed]
                 + math.sqrt(self.fraction) * self.mood + decide.SLOPE * x)
        self.values.setdefault(commit, []).append((value, x))
        return value, x

    def pair(self, kept, idea, seed):
        """What two runs by turns come to."""
        speed = self.wander(self.speed)
        theirs = self.run(kept, seed, speed)
        if self.by_steps:
            speed += APART / self.spread / -decide.SLOPE * self.draw()
        return theirs, self.run(idea, seed, speed)

    def judge(self):
        """decide.py's slope and margin, as of now."""
        # A commit that ran once says nothing about the noise.
        repeated = [values for values in self.values.values() if len(values) > 1]
        slope = decide.slope(repeated) if self.by_steps else 0
        equal = [[value - slope * x for value, x in values] for values in repeated]
        return slope, decide.margin(*decide.noise(equal, int(self.by_steps)))

    def decisions(self, ideas=IDEAS):
        """Whether each idea is kept, one after the other."""
        on_42 = [self.run(0, seed) for seed in (42, 43, 44, 42)][::3]
        kept, rows = 0, 0
        for idea in range(1, ideas + 1):
            if rows >= decide.AGAIN:
                on_42.append(self.run(kept, 42))
                rows = 0
            # Before the idea runs: its own runs do not count in the margin that it has to beat.
            slope, margin = self.judge()
            first = self.run(idea, 42)
            gain = (statistics.fmean(value - slope * x for value, x in on_42)
                    - (first[0] - slope * first[1]))
            faster = max(0, -slope * (first[1] - max(x for _, x in self.values[kept])))
            rows += 1
            result = decide.verdict(gain + faster, margin, self.by_steps)
            gains, costs = [gain], []
            while result == "run a pair":
                seed = decide.PAIR_SEEDS[len(costs)]
                theirs, mine = self.pair(kept, idea, seed)
                rows += 2
                gains.append(theirs[0] - mine[0])
                costs.append(mine[1] - theirs[1])
                gains[0] = gain - slope * statistics.fmean(costs)
                result = decide.pair_verdict(gains, margin)
            if result == "keep":
                kept, on_42 = idea, [first]
            yield result == "keep"


def main():
    parser = argparse.ArgumentParser(description="How often an idea that does nothing is kept.")
    parser.add_argument("--nights", metavar="N", type=int, default=10_000, help="default 10,000")
    nights = parser.parse_args().nights
    print("| machine's fraction of the variance, rho, speed | first idea | mean of the first 10 | "
          "mean of the first 60 |\n| --- | --- | --- | --- |")
    for fraction, rho, speed in MACHINES:
        generator = random.Random(1)
        counts = [0] * IDEAS

        draw = partial(generator.gauss, 0, 1)
        for _ in range(nights):
            for idea, kept in enumerate(Night(fraction, rho, speed, draw).decisions()):
                counts[idea] += kept
        means = [100 * statistics.fmean(counts[:ideas]) / nights for ideas in (1, 10, IDEAS)]
        name = f"{fraction}, {rho}, {speed}"
        print(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |", flush=True)


if __name__ == "__main__":
    main()
