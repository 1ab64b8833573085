"""decide.py: the rule on numbers worked out by hand, and a sentence for whatever is missing."""

import math
import os
import subprocess
import sys
import time

import pytest

import decide
from children import ROOT

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
KEPT, IDEA = "aaaaaa1", "bbbbbb2"


def row(commit, val_bpb, status, description):
    return f"{commit}\t{val_bpb:.6f}\t1.0\t{status}\t{description}"


# The runs lie 3, -1, -1, -1 thousandths from their mean 1.3: s = sqrt(12 / 3) = 2 thousandths with
# f = 3, so the margin is 10 thousandths. On seed 42 the baseline has 1.299.
BASELINE = [row(KEPT, 1.299, "keep", "baseline on cpu (2 cores), seed 42"),
            row(KEPT, 1.303, "keep", "baseline on cpu (2 cores), seed 43"),
            row(KEPT, 1.299, "keep", "baseline on cpu (2 cores), seed 44"),
            row(KEPT, 1.299, "keep", "again, seed 42")]


@pytest.fixture(scope="module", autouse=True)
def cache():
    """No test here needs prepared data."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(decide, "short_hash", lambda name, folder: IDEA if name == "HEAD" else name)
    return tmp_path


@pytest.fixture
def write(folder):
    """Write results.tsv."""
    def write(*rows):
        (folder / "results.tsv").write_text(HEADER + "".join(row + "\n" for row in rows))
    return write


@pytest.fixture
def log(folder):
    """Write a log that ended some minutes ago; more: what else it says, None for nothing."""
    def log(commit, seed, val_bpb, minutes=1, text="", /, **more):
        says = {"val_bpb": val_bpb and f"{val_bpb:.6f}", "num_steps": 1000,
                "device": "cpu (2 cores)", "seed": seed} | more
        lines = [f"{key + ':':<17} {value}" for key, value in says.items() if value is not None]
        path = folder / f"run-{commit}-{seed}-24{minutes:04}.log"
        path.write_text("\n".join([text, "---", *lines]) + "\n")
        ended = time.time() - 60 * minutes
        os.utime(path, (ended, ended))
    return log


@pytest.fixture
def answer(monkeypatch, capsys):
    """What decide.py prints, in one line, and its exit code."""
    def answer(*arguments):
        monkeypatch.setattr(sys, "argv", ["decide.py", *arguments])
        try:
            decide.main()
            words, code = capsys.readouterr().out, 0
        except SystemExit as error:
            words, code = f"{error}\n", 1
        assert words.count("\n") == 1
        return words.strip(), code
    return answer


@pytest.fixture
def git(tmp_path):
    """Run git in the folder of the logs."""
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return git


# -- the rule

def test_noise_is_pooled_over_commits():
    """Squares 1 + 0 + 1 and 4 + 4, so s = sqrt(10 / 3); a single run has no distance."""
    s, freedom = decide.noise([[1.0, 2.0, 3.0], [10.0, 14.0], [99.0]])
    assert freedom == 3 and s == pytest.approx((10 / 3) ** 0.5)
    s, freedom = decide.noise([[1.0, 2.0, 3.0], [10.0, 14.0], [99.0]], fitted=1)
    assert freedom == 2 and s == pytest.approx(5 ** 0.5)


@pytest.mark.parametrize("freedom,factor", [(2, 6), (3, 5), (4, 3.5), (7, 3.5), (8, 3), (50, 3)])
def test_the_factor_falls_as_the_noise_becomes_known(freedom, factor):
    assert decide.margin(0.01, freedom) == pytest.approx(factor * 0.01)
    assert decide.margin(0.0001, freedom) == 0.002


def test_a_noise_that_nobody_knows():
    s, freedom = decide.noise([[1.3], [1.2]])
    assert s != s and decide.margin(s, freedom) == 0.002


@pytest.mark.parametrize("val_bpb,result,simpler", [
    # gains 0.010001 and 0.010000: the margin has to be exceeded
    (1.288999, "keep", False), (1.289000, "run a pair", True),
    # 0.003334 and 0.003333: more than a third of it
    (1.295666, "run a pair", True), (1.295667, "discard", True),
    # worse by just less and just more than s
    (1.300999, "discard", True), (1.301001, "discard", False)])
def test_the_boundaries_on_seed_42(val_bpb, result, simpler, write, log, answer):
    write(*BASELINE)
    log(IDEA, 42, val_bpb)
    words, code = answer()
    assert words.startswith(f"{result}: gain {1.299 - val_bpb:+.6f} over {KEPT} on seed 42")
    assert "; margin 0.010000, noise 0.002000, f = 3" in words and code == 0
    assert ("or keep if the code got simpler" in words) == simpler
    assert ("now run uv run trial.py pair" in words) == (result == "run a pair")


def test_the_floor():
    assert decide.verdict(1.24 - 1.238, 0.002) == "run a pair"
    assert decide.verdict(1.24 - 1.237999, 0.002) == "keep"
    assert decide.verdict(1.24 - 1.237999, 0.002, always_pair=True) == "run a pair"


@pytest.mark.parametrize("val_bpb,result", [(1.298000, "run a pair"), (1.297999, "keep")])
@pytest.mark.parametrize("told", [[], [row(KEPT, 1.303, "keep", "again, seed 43")]])
def test_a_pair(val_bpb, result, told, write, log, answer):
    """
    Gain 0.009 on seed 42. With 0.005 on seed 43 the mean is 0.007, which is not more than 0.7 of
    the margin; with 0.005001 it is more. A row of the pair that is there already changes nothing:
    1.303 would put s at sqrt(0.0000192 / 4), and with it the margin at 0.0077.
    """
    write(*BASELINE, *told)
    log(IDEA, 42, 1.29, 20)
    log(IDEA, 43, val_bpb, 12)
    log(KEPT, 43, 1.303, 12)
    words, code = answer()
    assert words.startswith(f"{result}: gain +0.009000 over {KEPT} on seed 42, "
                            f"{1.303 - val_bpb:+.6f} on seed 43, mean +0.00700") and code == 0
    assert "(needed: 0.007000); margin 0.010000" in words


@pytest.mark.parametrize("val_bpb,result", [(1.28, "keep"), (1.298, "discard")])
def test_a_pair_counts_only_where_it_is_asked_for(val_bpb, result, write, log, answer):
    write(*BASELINE)
    log(IDEA, 42, val_bpb, 20)
    log(IDEA, 43, 1.303 - (1.299 - val_bpb), 12)
    log(KEPT, 43, 1.303, 12)
    words, code = answer()
    assert words.startswith(f"{result}: ") and "on seed 43" not in words and code == 0


def test_runs_of_different_times_are_no_pair(write, log, answer):
    """By the TIME in their names; of several pairs the newest counts."""
    write(*BASELINE)
    log(IDEA, 42, 1.29, 60)
    log(IDEA, 43, 1.294, 12)
    log(KEPT, 43, 1.303, 11)
    assert answer()[0].startswith("run a pair")
    log(KEPT, 43, 1.303, 12)
    log(IDEA, 43, 1.200, 20)
    log(KEPT, 43, 1.303, 20)
    assert "+0.009000 on seed 43, mean +0.009000 (needed: 0.007000)" in answer()[0]
    log(IDEA, 43, None, 3)
    log(KEPT, 43, 1.303, 3)
    words, code = answer()
    assert words.startswith(f"run-{IDEA}-43-240003.log has no val_bpb") and code == 1


@pytest.mark.parametrize("gains,result", [
    # the margin is 10 thousandths: 7, 5.715 and 4.95 are needed, 3.333 are worth another pair
    ([9, 5.1], "keep"), ([9, 5.0], "run a pair"), ([4, 2.67], "run a pair"), ([4, 2.66], "discard"),
    ([9, 5, 3.15], "keep"), ([9, 5, 3.14], "run a pair"), ([5, 3, 2], "discard"),
    ([9, 5, 3, 2.81], "keep"), ([9, 5, 3, 2.79], "discard")])
def test_more_pairs_need_a_smaller_mean(gains, result, write, log, answer):
    assert decide.pair_verdict([gain / 1000 for gain in gains], 0.01) == result
    write(*BASELINE)
    log(IDEA, 42, 1.299 - gains[0] / 1000, 60)
    for seed, gain in zip((43, 44, 45), gains[1:]):
        log(IDEA, seed, 1.303 - gain / 1000, 90 - seed)
        log(KEPT, seed, 1.303, 90 - seed)
    words, code = answer()
    assert words.startswith(f"{result}: gain +0.00") and code == 0
    assert words.count("on seed 4") == len(gains)
    assert f"(needed: {0.007 * math.sqrt(2 / len(gains)):.6f})" in words


# -- at equal steps

def test_the_slope_is_least_squares_with_a_prior():
    """
    By hand, deviations of 0.1 and 0.05: products -0.01, squares 0.02. The prior adds -0.11 x 0.01
    and 0.01, so the slope is -0.0111 / 0.03. A commit that ran once says nothing.
    """
    assert decide.slope([[(1.15, 6.9), (1.05, 7.1)], [(9.0, 1.0)]]) == pytest.approx(-0.37)
    assert decide.slope([]) == pytest.approx(-0.11)
    assert decide.slope([[(1.0, 6.0), (2.0, 7.0)]]) == 0       # more steps never count against


@pytest.fixture
def wandering(write, log):
    """
    Baselines at 1000, 1000, 1000 and 2000 steps whose val_bpb falls by 0.11 per unit of ln(steps),
    but for the second and third, 0.001 above and below. So s = sqrt(2e-6 / 2), and f = 2.
    """
    values = [1.3, 1.301, 1.299, 1.3 - 0.11 * math.log(2)]
    for (seed, steps), value in zip([(42, 1000), (43, 1000), (44, 1000), (42, 2000)], values):
        log(KEPT, seed, value, 90 + seed + steps // 100, num_steps=steps)
    names = "baseline on {}, seed 42", "baseline, seed 43", "baseline, seed 44", "again, seed 42"
    return lambda device="cpu (2 cores)": write(*(
        row(KEPT, value, "keep", name.format(device)) for value, name in zip(values, names)))


@pytest.mark.parametrize("gain,steps,result", [
    (0.01, 500, "run a pair"), (0.001, 1800, "discard"),
    # on the line, at twice the steps ever seen: 0.0762 more than the machine can explain
    (0.0, 4000, "run a pair")])
def test_a_gain_on_a_cpu_is_that_at_equal_steps(gain, steps, result, wandering, log, answer):
    """However large, only a pair confirms it: the idea's steps may cost more."""
    wandering()
    log(IDEA, 42, 1.3 - gain - 0.11 * math.log(steps / 1000), 3, num_steps=steps)
    line, code = answer()
    assert line.startswith(f"{result}: gain ") and "on seed 42 at equal steps" in line and code == 0
    assert float(line.split()[4 if "pair" in result else 2]) == pytest.approx(gain, abs=2e-6)
    assert ("+0.076246 for more steps than" in line) == (steps == 4000)
    assert "margin 0.006000, noise 0.001000, f = 2" in line


@pytest.mark.parametrize("steps,result", [(1000, "keep"), (800, "discard")])
def test_a_pair_tells_what_a_step_costs(steps, result, wandering, log, answer):
    """A fifth fewer steps are 0.0245 of val_bpb: 0.01 on seed 42 becomes -0.0145."""
    wandering()
    log(IDEA, 42, 1.29, 9, num_steps=1000)
    log(KEPT, 43, 1.301, 3, num_steps=1000)
    log(IDEA, 43, 1.291 - 0.11 * math.log(steps / 1000), 3, num_steps=steps)
    line, _ = answer()
    cost = 0.11 * math.log(steps / 1000)
    assert line.startswith(f"{result}: gain +0.010000 over {KEPT} on seed 42 at equal steps, with "
                           f"{steps / 1000:.3f} times the steps {0.01 + cost:+.6f}, "
                           f"{0.01 + cost:+.6f} on seed 43, mean")


def test_simpler_code_costs_no_steps_unseen(wandering, log, answer):
    """Before a pair nobody knows; after it the mean counts."""
    wandering()
    log(IDEA, 42, 1.3, 9, num_steps=1000)
    assert answer()[0].endswith("; or, if the code got simpler, run a pair")
    log(KEPT, 43, 1.301, 3, num_steps=1000)
    log(IDEA, 43, 1.301 - 0.11 * math.log(0.8), 3, num_steps=800)
    assert answer()[0].startswith("discard") and "simpler" not in answer()[0]
    log(IDEA, 43, 1.3, 3, num_steps=1000)
    assert answer()[0].endswith("; or keep if the code got simpler")
    log(IDEA, 43, 1.3, 3, num_steps=1000, time_budget="60 (not comparable)")
    words, code = answer()
    assert code == 1 and "-43-240003.log trained for 60 s" in words


def test_a_row_whose_log_is_gone_does_not_count(wandering, write, folder, log, answer):
    """At equal steps: 1.2 would make the noise many times larger."""
    wandering()
    table = (folder / "results.tsv").read_text()
    (folder / "results.tsv").write_text(table + row(KEPT, 1.2, "keep", "again, seed 42") + "\n")
    log(IDEA, 42, 1.29, 3, num_steps=1000)
    assert "(not at equal steps: no log has the val_bpb 1.200000 of the base" in answer()[0]
    (folder / "results.tsv").write_text(
        table + row("ccccccc", 1.31, "discard", "x") + "\n"
        + row("ccccccc", 1.2, "discard", "seed 43: x") + "\n")
    assert "margin 0.006000, noise 0.001000, f = 2" in answer()[0]


def test_a_gain_on_a_gpu_is_as_measured(wandering, log, answer):
    wandering("cuda (H100)")
    log(IDEA, 42, 1.15, 3, num_steps=500, device="cuda (H100)")
    gain = 1.3 - 0.055 * math.log(2) - 1.15
    assert answer()[0].startswith(f"run a pair: gain {gain:+.6f} over {KEPT} on seed 42; margin")


def test_of_runs_the_mean_counts_and_of_logs_the_newest(write, log, answer):
    """By hand: (1.299 + 1.297) / 2 = 1.298 on seed 42; the older log would be a gain of 0.098."""
    write(*BASELINE[:3], row(KEPT, 1.297, "keep", "again, seed 42"))
    log(IDEA, 42, 1.2, 30)
    log(IDEA, 42, 1.294, 3)
    words, _ = answer()
    assert words.startswith(f"discard: gain +0.004000 over {KEPT} on seed 42; margin 0.012583")


def test_the_last_kept_commit(write, log, answer):
    """The row of the pair's other half comes last, and does not bring the old commit back."""
    write(*BASELINE, row("ccccccc", 1.29, "keep", "wider"),
          row("ccccccc", 1.294, "keep", "seed 43: wider"),
          row(KEPT, 1.303, "keep", "again, seed 43"), row("ddddddd", 1.3, "discard", "deeper"))
    log(IDEA, 42, 1.25)
    assert answer()[0].startswith("keep: gain +0.040000 over ccccccc on seed 42")


def test_a_crash_is_no_number(write, log, answer):
    write(row(KEPT, 0, "crash", "baseline on cpu (2 cores), seed 42"), *BASELINE,
          row("ccccccc", 1.3, "discard", "wider"), row("ccccccc", 0, "crash", "seed 43: wider"))
    log(IDEA, 42, 1.28)
    assert "margin 0.010000, noise 0.002000, f = 3 (not at equal steps: no log" in answer()[0]


def test_a_machine_without_a_name_and_bytes_that_are_no_text(folder, log, answer):
    rows = [each.replace(" on cpu (2 cores)", "") for each in BASELINE]
    text = HEADER + "\n".join([*rows, row("ccccccc", 1.3, "discard", "\xe9")])
    (folder / "results.tsv").write_bytes(text.encode("latin-1"))
    log(IDEA, 42, 1.28, device="cuda (H100)")
    said = answer()[0]
    assert said.startswith("keep: gain +0.019000")
    assert "the baseline's row names no device: correct it" in said


def test_another_machine_is_another_session(write, log, answer):
    """There the runs lie 6, -2, -2, -2 from their mean 1.402, so s is 4 thousandths."""
    there = [row("ccccccc", 1.400, "keep", "baseline on cuda (H100), seed 42"),
             row("ccccccc", 1.408, "keep", "baseline on cuda (H100), seed 43"),
             row("ccccccc", 1.400, "keep", "baseline on cuda (H100), seed 44"),
             row("ccccccc", 1.400, "keep", "again, seed 42")]
    here = [*BASELINE, row("ccccccc", 1.25, "keep", "wider"),
            row(IDEA, 1.24, "discard", "undecided when the night moved")]
    write(*here, *there[:2])
    log(IDEA, 42, 1.37, device="cuda (H100)")
    words, code = answer()
    assert words.startswith("2 of 4 baselines missing: run ccccccc on seed 44 first") and code == 1
    write(*here, *there)
    assert answer()[0].startswith("keep: gain +0.030000 over ccccccc on seed 42; "
                                  "margin 0.020000, noise 0.004000, f = 3")
    log(IDEA, 42, 1.2)
    words, code = answer()
    assert "ran on cpu (2 cores), the baseline on cuda (H100): on a new machine run" in words
    assert code == 1


@pytest.mark.parametrize("description,kind,seed,machine", [
    ("baseline", "baseline", 42, None),
    ("Baseline, seed 43", "baseline", 43, None),
    ("baseline on cpu (AMD EPYC, 2 cores), seed 44", "baseline", 44, "cpu (AMD EPYC, 2 cores)"),
    ("baseline on cpu (x86_64), seed 42, again 1", "baseline", 42, "cpu (x86_64)"),
    ("baseline on cpu (x86_64), again, seed 42", "baseline", 42, "cpu (x86_64)"),
    ("again, seed 43", "repeat", 43, None),
    ("again, seed 43 (the pair of bbbbbb2)", "repeat", 43, None),
    ("seed 43 rows of the table", "idea", 42, None),
    ("again: a softer cap", "idea", 42, None),
    ("Seed 43: wider", "repeat", 43, None),
    ("wider; seed 43 was lucky", "idea", 42, None),
    ("baseline learning rate doubled", "idea", 42, None)])
def test_what_a_description_says(description, kind, seed, machine):
    row = decide.Row(0, KEPT, 1.3, 1.0, "keep", description)
    assert (row.kind, row.seed, row.machine) == (kind, seed, machine)


# -- a sentence for everything else

def test_an_idea_that_has_a_row_is_decided(write, answer):
    write(*BASELINE, row(IDEA, 1.2, "discard", "wider"))
    assert answer() == (f"discard: decided already, results.tsv has a row of {IDEA}", 0)


def test_when_to_repeat_the_last_kept_commit(write, log, answer):
    """Ten rows after it ran, the idea's own and crashes included; not while a pair is to be run."""
    others = [row(f"{number:07x}", 1.3, "discard", "no") for number in range(8)]
    others[3] = row(KEPT, 1.303, "keep", "again, seed 43")
    crash = row("e" * 7, 0, "crash", "out of memory")
    write(*BASELINE, *others)
    log(IDEA, 42, 1.3)
    assert "time to run" not in answer()[0]
    write(*BASELINE, *others, crash)
    assert answer()[0].endswith("; then it is time to run the last kept commit on seed 42 again")
    log(IDEA, 42, 1.295)
    words, _ = answer()
    assert words.startswith("run a pair") and "time to run" not in words
    assert "is the last kept commit: commit an idea; margin" in answer(KEPT)[0]
    write(*BASELINE, *others, crash, crash)
    assert "is the last kept commit: run it on seed 42 again; margin" in answer(KEPT)[0]


def test_a_busy_machine(write, log, answer):
    """899 steps are over 10% less than 1000, the median of the kept commit's runs; 900 are not."""
    write(*BASELINE)
    for minutes, steps in (90, 1000), (80, 1020), (70, 700):
        log(KEPT, 42, 1.299, minutes, num_steps=steps)
    log(IDEA, 42, 1.298, 3, num_steps=900)
    assert "busy" not in answer()[0]
    log(IDEA, 42, 1.298, 3, num_steps=899)
    assert f"; run-{IDEA}-42-240003.log has 899 steps instead of 1000: unless" in answer()[0]
    # the other half of a pair, which would make the idea look good
    log(IDEA, 42, 1.29, 20)
    log(IDEA, 43, 1.294, 5)
    log(KEPT, 43, 1.4, 5, num_steps=500)
    log(IDEA, 42, 1.29, 3)
    words = answer()[0]
    assert f"run-{KEPT}-43-240005.log has 500 steps" in words
    assert "busy, so move both logs of this pair" in words and "move this log" not in words


def test_a_night_has_one_budget(write, log, answer):
    write(*BASELINE)
    log(KEPT, 42, 1.299, 9, time_budget="60 (not comparable)")
    log(IDEA, 42, 1.28, 1, time_budget="60 (not comparable)")
    assert answer()[0].startswith("keep")
    log(IDEA, 42, 1.28, 1)
    words, code = answer()
    assert code == 1 and "trained for 300 s" in words and "again with --budget 60 behind" in words
    log(KEPT, 42, 1.299, 0)                 # a kept one at the other budget puts nothing right
    log(KEPT, 42, None, 10)
    assert answer()[0] == words
    log(IDEA, 42, 1.28, 0, time_budget="60 (not comparable)")
    assert answer()[1] == 1


def test_of_a_broken_pair_the_run_that_broke_is_named(write, log, answer):
    write(*BASELINE)
    log(IDEA, 42, 1.295, 60)
    log(IDEA, 43, None, 11, "FAIL: the training loss is NaN")
    log(KEPT, 43, None, 11, "stopped by SIGTERM: no result")
    assert "the training loss is NaN. Fix the bug" in answer()[0]
    log(IDEA, 43, None, 5, "stopped by SIGTERM: no result")
    log(KEPT, 43, None, 5, "Killed")
    assert answer()[0].startswith(f"run-{KEPT}-43-240005.log has no val_bpb")


def test_an_earlier_run_of_an_idea_is_not_doubted(write, log, answer):
    write(*BASELINE)
    log(KEPT, 42, 1.299, 9)
    log(IDEA, 42, 1.298, 2, machine="80% ours")
    log(IDEA, 42, 1.298, 1, machine="99% ours")
    assert "machine, the rest" not in answer()[0]


def test_a_machine_that_others_had_a_part_of(write, log, answer):
    """By the share in the log, whatever the number of steps."""
    write(*BASELINE)
    log(KEPT, 42, 1.299, 9)
    log(IDEA, 42, 1.298, 1, machine="90% ours", num_steps=10)
    assert "machine" not in answer()[0]
    log(IDEA, 42, 1.298, 1, machine="89% ours, the host took 3 core seconds")
    assert "had 89% of the machine, the rest went to others: move this log" in answer()[0]


def test_a_run_with_another_attention_than_the_kept_commit(write, log, answer):
    write(*BASELINE)
    log(KEPT, 42, 1.299, 9, attention="FlashAttention-3")
    log(IDEA, 42, 1.298, 1, attention="FlashAttention-3")
    assert "attention" not in answer()[0]
    log(IDEA, 42, 1.298, 1, attention="FlashAttention-3, not compiled")
    assert "ran with the attention FlashAttention-3, not compiled instead of" in answer()[0]
    log(IDEA, 42, 1.298, 1, attention="varlen_attn")
    said = answer()[0]
    assert "ran with the attention varlen_attn instead of FlashAttention-3: unless" in said
    log(IDEA, 42, 1.298, 1)                 # of a version whose summary names none
    assert "attention" not in answer()[0]
    # The half of a pair that was stopped names its attention as it does at its start.
    log(KEPT, 43, None, 0, "attention: FlashAttention-3, sliding windows")
    log(IDEA, 42, 1.298, 1, attention="FlashAttention-3")
    assert "attention" not in answer()[0]


def test_the_kept_half_of_a_pair_has_no_bug(write, log, answer):
    write(*BASELINE)
    log(IDEA, 42, 1.2950)
    log(IDEA, 43, None, 1, "stopped by SIGTERM: no result")
    log(KEPT, 43, None, 1, "FAIL: the loss is NaN")
    said, code = answer()
    assert "That is not the idea's doing" in said and "crash" not in said and code == 1



def test_without_results(folder, answer):
    assert answer() == ("there is no results.tsv: make it as program.md says (Setup)", 1)


@pytest.mark.parametrize("rows,words", [
    ([], "results.tsv has no baseline: run train.py as it is on seeds 42, 43, 44, and 42 again"),
    ([row(KEPT, 0, "crash", "baseline on cpu, seed 42")], "results.tsv has no baseline: run"),
    ([row(KEPT, 1.3, "keep", "again, seed 42")], "results.tsv has no baseline: run"),
    (BASELINE[:1], f"3 of 4 baselines missing: run {KEPT} on seed 43 first, or write its row"),
    (BASELINE[:2], f"2 of 4 baselines missing: run {KEPT} on seed 44 first"),
    (BASELINE[:3], f"1 of 4 baselines missing: run {KEPT} on seed 42 first"),
    (BASELINE[:2] + BASELINE[3:], f"1 of 4 baselines missing: run {KEPT} on seed 44 first"),
    (BASELINE[:2] + BASELINE[3:] + [row("ccccccc", 1.3, "discard", "seed 44: wider")],
     f"1 of 4 baselines missing: run {KEPT} on seed 44 first"),
    (BASELINE, f"there is no run-{IDEA}-42-*.log: run {IDEA} on seed 42 first"),
    (BASELINE + [row("ccccccc", 1.2, "keep", "baseline on cpu (2 cores), seed 43")],
     f"there is no run-{IDEA}-42-*.log: run {IDEA} on seed 42 first"),
    (["c 1.3 spaces"], "results.tsv, line 2: 1 fields between tabs instead of 5; correct it: c"),
    (BASELINE + [row(IDEA, 1.2, "maybe", "")], "results.tsv, line 6: status 'maybe' instead of"),
    ([f"{KEPT}\tx\t1.0\tkeep\t"], "line 2: could not convert string to float: 'x'; correct it"),
    ([row(KEPT, 0, "keep", "baseline")], "line 2: status keep, but val_bpb 0.000000; correct it"),
    ([row(KEPT, float("nan"), "discard", "")], "line 2: status discard, but val_bpb nan")])
def test_rows_that_are_missing_or_malformed(rows, words, write, answer):
    write(*rows)
    line, code = answer()
    assert words in line and code == 1


def test_a_last_kept_commit_without_a_row_on_seed_42(write, log, answer):
    write(*BASELINE, row("ccccccc", 1.2, "keep", "baseline on cpu (2 cores), seed 43"))
    log(IDEA, 42, 1.1)
    words, code = answer()
    assert words == "ccccccc, the last kept commit, has no row on seed 42: run it there first"
    assert code == 1


def test_the_last_kept_commit_itself(write, answer):
    write(*BASELINE)
    line, code = answer(KEPT)
    assert line.startswith(f"nothing to decide, {KEPT} is the last kept commit: commit an idea; "
                           "margin 0.010000, noise 0.002000, f = 3") and code == 1


@pytest.mark.parametrize("val_bpb,text,more,words", [
    (None, "", dict(), "has no val_bpb: wait if it is still running; move it to logs-<tag>/ if "
     f"it was stopped by mistake; if it crashed, `tail -n 50 run-{IDEA}-42-240001.log` says why"),
    (None, "FAIL: the loss is NaN", dict(), "FAIL: the loss is NaN. Fix the bug and commit on top"),
    (None, "FAIL: another run is at work on this device: process 7", dict(), "move this log to"),
    (1.2, "", dict(extra="60 (not comparable)"), "'extra: 60 (not comparable)': corr"),
    (1.2, "", dict(seed=43), "ran on seed 43: move it to logs-<tag>/, and run on seed 42"),
    (1.2, "", dict(device="cuda (H100)"), "ran on cuda (H100), the baseline on cpu (2 cores): on")])
def test_logs_without_a_number_that_compares(val_bpb, text, more, words, write, log, answer):
    """The newest log decides, though there is an older one that would do."""
    write(*BASELINE)
    log(IDEA, 42, 1.2, 30)
    log(IDEA, 42, val_bpb, 1, text, **more)
    line, code = answer()
    assert line.startswith(f"run-{IDEA}-42-240001.log") and words in line and code == 1


def test_an_idea_that_ran_on_seed_43_only(write, log, answer):
    write(*BASELINE)
    log(IDEA, 43, 1.2)
    assert answer() == (f"there is no run-{IDEA}-42-*.log: run {IDEA} on seed 42 first", 1)


# -- the programs

def test_the_command_in_a_clone(tmp_path, git):
    """With nothing but the standard library (-S), on HEAD and on a commit by name."""
    def program(*arguments):
        command = [sys.executable, "-S", ROOT / "decide.py", *arguments]
        result = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
        return result.stdout, result.returncode

    def unknown(name):
        return f"{name} is no commit here; `git log --oneline --all` lists them\n", 1

    results = tmp_path / "results.tsv"
    results.write_text(HEADER)
    assert program() == unknown("HEAD")
    git("init", "-q")
    git("commit", "-qm", "baseline", "--allow-empty")
    kept = git("rev-parse", "--short", "HEAD")
    results.write_text(HEADER + "\n".join(BASELINE).replace(KEPT, kept))
    assert program()[0].startswith(f"nothing to decide, {kept} is the last kept commit")
    git("commit", "-qm", "idea", "--allow-empty")
    idea = git("rev-parse", "--short", "HEAD")
    (tmp_path / f"run-{idea}-42-240100.log").write_text("val_bpb:          1.280000\n")
    said = program()
    assert said[0].startswith(f"keep: gain +0.019000 over {kept} on seed 42") and said[1] == 0
    assert program("HEAD", "--results", str(results)) == program(git("rev-parse", "HEAD")) == said
    assert program("nonsense") == unknown("nonsense")


def test_the_simulation_prints_its_table():
    """Few nights, so within wide bounds; 10,000 have 4.7, 3.0 and 1.1% on a steady machine."""
    result = subprocess.run([sys.executable, ROOT / "dev" / "simulate.py", "--nights", "200"],
                            capture_output=True, text=True, check=True)
    lines = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()]
    assert [line[0] for line in lines[2:]] == [
        "0, 0, 0", "0.5, 0.5, 0", "0.8, 0.5, 0", "0.8, 0.8, 0", "0.8, 0.95, 0",
        "0, 0, 10", "0.5, 0.5, 3", "0.5, 0.5, 10", "0.5, 0.95, 10"]
    for _, first, ten, sixty in lines[2:]:
        assert float(first) < 10 and 0.5 < float(ten) < 6 and 0.3 < float(sixty) < 3

def test_the_simulation_of_waves():
    code = ("import waves; print(waves.nights_with_false_keeps(20, 0, 0), "
            "*waves.replay(1, 333, 5, 1, 5), *waves.replay(8, 333, 5, 1, 5))")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "dev", capture_output=True,
                            text=True, check=True)
    false_keeps, one_slot, runs, _, _, eight_slots, *_ = map(float, result.stdout.split())
    assert false_keeps <= 20 and 5 < one_slot < 12 and 8 < runs < 12 and 30 < eight_slots < 60

# -- waves

@pytest.fixture
def wave(folder, write, log, answer, monkeypatch):
    """A log of a wave; the margin of the baseline is 10 thousandths, its mean on seed 42 1.299."""
    class Git:
        returncode = 0

    monkeypatch.setattr(decide.subprocess, "run", lambda *_, **__: Git)
    write(*BASELINE)

    def wave(commit, seed, val_bpb, stamp="w1", number=1, text="", /, **more):
        log(commit, seed, val_bpb, 1, text, **more)
        path = folder / f"run-{commit}-{seed}-240001.log"
        path.rename(folder / f"run-{commit}-{seed}-{stamp}-{number}.log")
    wave.git = Git
    return wave


@pytest.fixture
def confirm(wave):
    """The six runs of a wave, but one; gain: of the idea over the kept commit, on each seed."""
    def confirm(gain, stamp="w2", without=None):
        for seed in 43, 44, 45:
            for commit, val_bpb in (IDEA, 1.3 - gain), (KEPT, 1.3):
                if (commit, seed) != without:
                    wave(commit, seed, val_bpb, stamp)
    return confirm


def test_the_rule_for_waves():
    def rule(gain, *fresh):
        return decide.wave_verdict(gain, 0.009, list(fresh) or None)

    assert rule(0.003) == "discard" and rule(0.0031) == "confirm" and rule(1.0) == "confirm"
    needed = decide.FRESH * 0.009
    assert rule(0.004, needed, needed, needed) == "discard"
    assert rule(0.004, needed + 0.003, needed, needed - 0.0029) == "keep"
    assert rule(1.0, 0, 0, 0) == "discard"          # one lucky run keeps nothing
    assert rule(0.003, 1.0, 1.0, 1.0) == "keep" and rule(-1.0) == "discard"
    assert rule(1.240 - 1.237) == "discard"         # 0.0030000000000001137


def test_an_idea_of_a_wave_is_confirmed_beside_the_kept_commit(wave, answer):
    wave(IDEA, 42, 1.289)
    words, code = answer("--wave", IDEA)
    assert code == 0 and words.startswith(f"{IDEA} confirm: gain +0.010000 over {KEPT} on seed 42")
    runs = " ".join(f"{commit}:{seed}" for commit in (IDEA, KEPT) for seed in (43, 44, 45))
    assert words.endswith(f"put into the next wave: {runs}")
    for seed in (43, 44, 45):
        wave(IDEA, seed, 1.28, "w2")
        wave(KEPT, seed, 1.30, "w1")                # in another wave: counts for nothing
    assert " confirm: " in answer("--wave", IDEA)[0]
    wave(KEPT, 43, 1.300, "w2", 4)
    wave(KEPT, 44, 1.291, "w2", 5)
    wave(KEPT, 45, 1.294, "w2", 6)
    wave(KEPT, 45, 1.290, "w2", 7)                  # gains of 20, 11 and (14 + 10) / 2 thousandths
    words, _ = answer("--wave", IDEA)
    assert words.startswith(f"{IDEA} keep: ") and "mean +0.014333 on seeds 43, 44, 45" in words
    assert f"(needed: {decide.FRESH * 0.01:.6f})" in words
    for commit, val_bpb in (IDEA, 1.28), (KEPT, 1.281):
        for seed in (43, 44, 45):
            wave(commit, seed, val_bpb, "w3")       # the newest wave counts
    assert f"{IDEA} discard: " in answer("--wave", IDEA)[0]


def test_commits_of_a_wave_get_a_line_each(wave, monkeypatch, capsys):
    wave(IDEA, 42, 1.2985)
    wave("ccccccc", 42, 1.28)
    monkeypatch.setattr(sys, "argv", ["decide.py", "--wave", IDEA, "ccccccc"])
    decide.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{IDEA} discard", "ccccccc confirm"]
    monkeypatch.setattr(sys, "argv", ["decide.py", IDEA, "ccccccc"])
    with pytest.raises(SystemExit, match="2"):
        decide.main()
    assert "several commits are for --wave" in capsys.readouterr().err


def test_what_a_wave_lacks_is_said(wave, answer, folder):
    words, code = answer("--wave", IDEA)
    assert code == 1 and words == f"there is no run-{IDEA}-42-*.log: run {IDEA} on seed 42 first"
    wave(IDEA, 42, 1.289)
    wave.git.returncode = 1
    words, code = answer("--wave", IDEA)
    assert code == 1 and words.startswith(f"{IDEA} is not on top of {KEPT}, the last kept commit: ")
    wave.git.returncode = 0
    (folder / f"run-{IDEA}-42-w1-1.log").write_text("FAIL: the model reads ahead\n")
    words, code = answer("--wave", IDEA)
    assert code == 1 and "FAIL: the model reads ahead" in words


@pytest.mark.parametrize("val_bpb,result,simpler", [
    # gains 0.003334 and 0.003333: more than a third of the margin
    (1.295666, "confirm", False), (1.295667, "discard", True),
    # worse by just less and just more than s
    (1.300999, "discard", True), (1.301001, "discard", False), (0.5, "confirm", False)])
def test_the_boundaries_of_a_screening_wave(val_bpb, result, simpler, wave, answer):
    wave(IDEA, 42, val_bpb)
    words, code = answer("--wave", IDEA)
    assert words.startswith(f"{IDEA} {result}: gain {1.299 - val_bpb:+.6f} over {KEPT} on seed 42;")
    assert "; margin 0.010000, noise 0.002000, f = 3" in words and code == 0
    assert ("or keep if the code got simpler" in words) == simpler
    assert ("put into the next wave" in words) == (result == "confirm")


@pytest.mark.parametrize("val_bpb", [1.295, 0.5])
@pytest.mark.parametrize("more,result", [(0, "discard"), (1e-6, "keep")])
def test_the_boundary_of_a_confirming_wave(val_bpb, more, result, wave, confirm, answer):
    """The fresh seeds decide alone, however large the gain on seed 42."""
    needed = decide.FRESH * 0.01
    wave(IDEA, 42, val_bpb)
    confirm(needed + more)
    words, code = answer("--wave", IDEA)
    assert words.startswith(f"{IDEA} {result}: gain {1.299 - val_bpb:+.6f} over {KEPT} on seed 42, "
                            f"mean {needed + more:+.6f} on seeds 43, 44, 45 (needed: {needed:.6f})")
    assert "put into" not in words and code == 0


def test_a_wave_screens_against_the_mean_of_the_rows(write, wave, answer):
    """By hand: (1.299 + 1.297) / 2 = 1.298. The newest row alone would discard; a log is no row."""
    write(*BASELINE[:3], row(KEPT, 1.297, "keep", "again, seed 42"))
    wave(IDEA, 42, 1.2935)
    wave(KEPT, 42, 1.2)
    words, _ = answer("--wave", IDEA)
    assert words.startswith(f"{IDEA} confirm: gain +0.004500 over {KEPT} on seed 42; "
                            "margin 0.012583")


@pytest.mark.parametrize("without", [(IDEA, 44), (KEPT, 43), (KEPT, 45)])
def test_no_incomplete_wave_counts_however_new(without, wave, confirm, answer):
    wave(IDEA, 42, 1.289)
    confirm(0.1, "w2")
    confirm(0, "w3", without)
    wave(*without, 1.3, "w4")
    words, _ = answer("--wave", IDEA)
    assert words.startswith(f"{IDEA} keep: ") and "mean +0.100000 on seeds" in words
    wave(*without, 1.3, "w3")
    words, _ = answer("--wave", IDEA)
    assert words.startswith(f"{IDEA} discard: ") and "mean +0.000000 on seeds" in words


def test_runs_one_after_another_are_no_wave(wave, log, answer):
    wave(IDEA, 42, 1.289)
    for minutes, seed in enumerate((43, 44, 45), 10):
        log(IDEA, seed, 1.2, minutes)
        log(KEPT, seed, 1.3, minutes + 10)
    assert answer("--wave", IDEA)[0].startswith(f"{IDEA} confirm: ")


@pytest.mark.parametrize("commit,seed", [(IDEA, 42), (IDEA, 43), (KEPT, 44), (KEPT, 45)])
@pytest.mark.parametrize("val_bpb,text,more,words", [
    (1.2, "FAIL: the loss is NaN", dict(), "FAIL: the loss is NaN. "),
    (None, "", dict(), "has no val_bpb: wait if it is still running"),
    (1.2, "", dict(extra="60 (not comparable)"), "'extra: 60 (not comparable)': corr"),
    (1.2, "", dict(seed=46), "ran on seed 46: move it to logs-<tag>/, and run on seed"),
    (1.2, "", dict(device="cuda (H100)"), "ran on cuda (H100), the baseline on cpu (2 cores): on")])
def test_a_run_of_a_wave_that_does_not_compare(commit, seed, val_bpb, text, more, words, wave,
                                               confirm, answer):
    """One of the seven is enough, though the other six would do."""
    wave(IDEA, 42, 1.289, "w2")
    confirm(0.1)
    wave(commit, seed, val_bpb, "w2", 1, text, **more)
    line, code = answer("--wave", IDEA)
    assert line.startswith(f"run-{commit}-{seed}-w2-1.log") and words in line and code == 1
    assert ("Fix the bug" in line) == ("FAIL" in text and commit == IDEA)   # the kept one has none


def test_an_idea_on_another_base_is_refused(write, log, answer, git):
    """Commits of a real clone: one beside the last kept commit, one below it, two on top of it."""
    def commit(name):
        git("commit", "-qm", name, "--allow-empty")
        return git("rev-parse", "--short", "HEAD")

    git("init", "-q")
    below = commit("below")
    beside = commit("beside")
    git("checkout", "-q", below)
    kept = commit("kept")
    on_top = [commit("idea"), commit("idea on the idea")]
    write(*(each.replace(KEPT, kept) for each in BASELINE))
    for name in (below, beside, *on_top):
        log(name, 42, 1.28)
    for name in below, beside:
        assert answer("--wave", name) == (
            f"{name} is not on top of {kept}, the last kept commit: "
            f"git cherry-pick {name} onto it, and run that as a new idea", 1)
    for name in on_top:
        line, code = answer("--wave", name)
        assert line.startswith(f"{name} confirm: gain +0.019000 over {kept}") and code == 0


def test_one_bad_commit_of_a_wave_does_not_silence_the_rest(wave, monkeypatch, capsys):
    wave(IDEA, 42, 1.28)
    monkeypatch.setattr(sys, "argv", ["decide.py", "--wave", "ccccccc", IDEA])
    with pytest.raises(SystemExit, match="1"):
        decide.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("ccccccc undecided: there is no run-ccccccc-42-*.log")
    assert second.startswith(f"{IDEA} confirm: ")
