"""
How often the rule of decide.py keeps an idea that does nothing, in percent.

    uv run dev/simulate.py [--nights N]

A night is four baselines and then 60 ideas. Each is compared on seed 42 with the last kept commit,
which may have been kept by chance, and by a pair on seed 43 where decide.py asks for it. The last
kept commit runs again whenever ten rows have come. The noise of a run has two parts: that of commit
and seed, the same whenever they run again, and that of the machine, AR(1) with correlation rho from
one run to the next. Its variance is 1, so the floor of the margin plays no part. Random seed 1.
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
# The machine's fraction of the variance, and rho.
MACHINES = [(0, 0), (0.5, 0.5), (0.8, 0.5), (0.8, 0.8), (0.8, 0.95)]


class Night:
    """The runs of one night. Commits are numbered: 0 is the baseline."""

    def __init__(self, fraction, rho, draw):
        self.fraction, self.rho, self.draw = fraction, rho, draw
        self.speed = draw()
        self.luck = {}
        self.values = {}

    def run(self, commit, seed):
        """The val_bpb of a run."""
        self.speed = self.rho * self.speed + math.sqrt(1 - self.rho ** 2) * self.draw()
        if (commit, seed) not in self.luck:
            self.luck[commit, seed] = self.draw()
        value = (math.sqrt(1 - self.fraction) * self.luck[commit, seed]
                 + math.sqrt(self.fraction) * self.speed)
        self.values.setdefault(commit, []).append(value)
        return value

    def margin(self):
        # A commit that ran once says nothing about the noise.
        repeated = [values for values in self.values.values() if len(values) > 1]
        return decide.margin(*decide.noise(repeated))

    def decisions(self, ideas=IDEAS):
        """Whether each idea is kept, one after the other."""
        on_42 = [self.run(0, seed) for seed in (42, 43, 44, 42)][::3]
        kept, rows = 0, 0
        for idea in range(1, ideas + 1):
            if rows >= decide.AGAIN:
                on_42.append(self.run(kept, 42))
                rows = 0
            # Before the idea runs: its own runs do not count in the margin that it has to beat.
            margin = self.margin()
            value = self.run(idea, 42)
            gain = statistics.fmean(on_42) - value
            rows += 1
            result = decide.verdict(gain, margin)
            if result == "run the pair":
                second = -self.run(idea, 43) + self.run(kept, 43)
                rows += 2
                result = decide.verdict(gain, margin, second)
            if result == "keep":
                kept, on_42 = idea, [value]
            yield result == "keep"


def main():
    parser = argparse.ArgumentParser(description="How often an idea that does nothing is kept.")
    parser.add_argument("--nights", metavar="N", type=int, default=10_000, help="default 10,000")
    nights = parser.parse_args().nights
    print("| machine's fraction of the variance, rho | first idea | mean of the first 10 | "
          "mean of the first 60 |\n| --- | --- | --- | --- |")
    for fraction, rho in MACHINES:
        generator = random.Random(1)
        counts = [0] * IDEAS

        draw = partial(generator.gauss, 0, 1)
        for _ in range(nights):
            for idea, kept in enumerate(Night(fraction, rho, draw).decisions()):
                counts[idea] += kept
        means = [100 * statistics.fmean(counts[:ideas]) / nights for ideas in (1, 10, IDEAS)]
        name = f"{fraction}, {rho}" if fraction else "0"
        print(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |", flush=True)


if __name__ == "__main__":
    main()
