"""analysis.ipynb on good, empty, broken and cheating files: what it prints, and its picture."""

import json
import math
import random
import shutil

import matplotlib
import matplotlib.figure
import matplotlib.pyplot
import nbformat
import pytest

from children import ROOT

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription\n"
SHA = "a" * 64


@pytest.fixture(scope="module", autouse=True)
def cache():
    """No test here needs prepared data."""


@pytest.fixture(scope="module")
def cells():
    """The notebook's code, compiled once."""
    notebook = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
    return [compile(cell.source, "analysis.ipynb", "exec")
            for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def names():
    """The notebook's variables, after it was executed."""
    return {}


@pytest.fixture
def execute(cells, names, tmp_path, monkeypatch, capsys):
    """
    Write the two files, run the notebook's cells on them, return what they print. The picture is
    saved only if asked for, which takes most of the time.
    """
    def execute(rows=None, journal=None, picture=False):
        if rows is not None:
            (tmp_path / "results.tsv").write_text(HEADER + "".join(row + "\n" for row in rows))
        if journal is not None:
            lines = [json.dumps(line) + "\n" for line in journal]
            (tmp_path / "journal.jsonl").write_text("".join(lines))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("AUTORESEARCH_CACHE_DIR", str(tmp_path / "cache"))
        matplotlib.use("Agg")
        if not picture:
            monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *_, **__: None)
        for cell in cells:
            exec(cell, names)
        matplotlib.pyplot.close("all")
        assert not picture or (tmp_path / "progress.png").stat().st_size > 5000
        return capsys.readouterr().out
    return execute


def run_line(commit, val, test, **more):
    return {"time": "2026-11-24T01:00:00+0000", "commit": commit, "seed": 42, "val_bpb": val,
            "test_bpb": test, "failure": None, "prepare_sha256": SHA, "prepare_changed": False,
            "dirty": False, "time_budget": 300, "total_seconds": 350} | more


NIGHT = [
    "aaaaaa1\t1.300000\t1.0\tkeep\tbaseline",
    "aaaaaa1\t1.301000\t1.0\tkeep\tbaseline, seed 43",
    "aaaaaa1\t1.299000\t1.0\tkeep\tbaseline, seed 44",
    "bbbbbb2\t1.280000\t1.1\tkeep\ttwice the steps",
    "cccccc3\t1.310000\t1.1\tdiscard\tno soft cap",
    "dddddd4\t0.000000\t0.0\tcrash\ta typo",
    "eeeeee5\t1.270000\t1.1\tkeep\tlucky",
    "ffffff6\t1.000000\t1.1\tkeep\ttoo good to be true"]
JOURNAL = [
    run_line("aaaaaa1", 1.3, 1.28),
    run_line("aaaaaa1", 1.301, 1.281, seed=43),
    run_line("aaaaaa1", 1.299, 1.279, seed=44),
    run_line("bbbbbb2", 1.28, 1.262),
    run_line("cccccc3", 1.31, 1.29),
    run_line("dddddd4", None, None, failure="SyntaxError"),
    run_line("eeeeee5", 1.27, 1.263),
    run_line("ffffff6", None, None, failure="FAIL: causality")]


def test_a_night(execute):
    text = execute(NIGHT, JOURNAL, picture=True)
    assert "8 experiments" in text
    assert "baseline 1.300000 over 3 runs, noise 0.001000" in text
    assert "#7 ffffff6" in text and "no number (FAIL: causality)" in text
    assert "twice the steps: held up (gain +0.0200, sealed +0.0180)" in text
    assert "lucky: not on the sealed text (gain +0.0100, sealed -0.0010)" in text


def test_repeated_runs_count_in_the_noise_and_by_their_mean(execute):
    """
    By hand: the baseline's runs lie -1, 0, -2 and 3 thousandths from their mean, the kept commit's
    -1 and 1: the root of 16 / 4.
    """
    again = ["aaaaaa1\t1.304000\t1.0\tkeep\tagain, seed 42",
             "bbbbbb2\t1.282000\t1.1\tkeep\tagain, seed 42"]
    journal = JOURNAL[:5] + [run_line("aaaaaa1", 1.304, 1.284), run_line("bbbbbb2", 1.282, 1.264)]
    text = execute(NIGHT[:3] + again[:1] + NIGHT[3:5] + again[1:], journal)
    assert "baseline 1.301000 over 4 runs, noise 0.002000, margin 0.007000" in text
    assert "val_bpb 1.3020 -> 1.2810: a gain of 0.0210, 3.0 times the margin" in text
    assert "1.2820 -> 1.2630: a gain of 0.0190; 90% held up" in text
    assert "Every row agrees" in text


def test_an_idea_that_was_kept_because_it_is_simpler_is_no_gain(execute):
    night = NIGHT[:4] + ["1111111\t1.281000\t1.1\tkeep\tshorter"]
    text = execute(night, JOURNAL[:4] + [run_line("1111111", 1.281, 1.263)])
    assert "#3 twice the steps: held up" in text and "shorter" not in text


def test_two_commits_with_one_train_are_repeated_runs(execute):
    """Their runs lie -1 and 1 thousandth from the mean: the root of 2."""
    rows = ["aaaaaa1\t1.300000\t1.0\tkeep\tbaseline", "bbbbbb2\t1.302000\t1.0\tkeep\tbaseline"]
    journal = [run_line("aaaaaa1", 1.3, 1.28), run_line("bbbbbb2", 1.302, 1.282)]
    assert "over 1 runs, noise nan, margin 0.002000" in execute(rows, journal)
    text = execute(rows, [line | {"train_sha256": SHA} for line in journal])
    assert "baseline 1.301000 over 2 runs, noise 0.001414, margin 0.008485" in text


def test_a_night_that_moves_to_another_machine(execute, names):
    """There, everything is worse by 0.1; only what was measured on one machine is compared."""
    moved = ["bbbbbb2\t1.380000\t1.1\tkeep\tbaseline on slow, seed 42",
             "bbbbbb2\t1.382000\t1.1\tkeep\tbaseline on slow, seed 43",
             "1111111\t1.360000\t1.1\tkeep\tdepth 4", "2222222\t1.370000\t1.1\tdiscard\tdepth 5"]
    journal = [line | {"device": "fast"} for line in JOURNAL[:4]]
    journal += [run_line("bbbbbb2", 1.38, 1.36, device="slow"),
                run_line("bbbbbb2", 1.382, 1.362, seed=43, device="slow"),
                run_line("1111111", 1.36, 1.345, device="slow"),
                run_line("2222222", 1.37, 1.35, device="fast")]
    named = [row.replace("baseline", "baseline on fast") for row in NIGHT[:3]]
    named[0] += ", seed 42"
    text = execute(named + NIGHT[3:4] + moved, journal, picture=True)
    assert "baseline 1.300000 over 3 runs, noise 0.001000, margin 0.006000 on fast" in text
    assert "baseline 1.381000 over 2 runs, noise 0.001414, margin 0.008485 on slow" in text
    assert "val_bpb 1.3000 -> 1.2800: a gain of 0.0200" in text
    assert "val_bpb 1.3800 -> 1.3600: a gain of 0.0200" in text
    assert "1.3600 -> 1.3450: a gain of 0.0150; 75% held up" in text
    assert "#7 2222222 ran on fast: not comparable" in text and "#6 1111111 ran on" not in text
    labels = [label.get_text() for label in names["axes"].texts]
    assert labels == ["fast", "twice the steps", "slow", "depth 4"]


def test_where_the_speed_wanders_val_bpb_is_that_at_the_usual_speed(execute, names):
    """
    By hand: 0.11 per unit of ln(steps). The idea is 0.02 better at equal steps, but in its pair it
    takes 0.9 times the steps: 0.0116 of it are lost, on the sealed text as well.
    """
    def line(commit, steps, bpb, words, seed=42):
        """A row and its journal line; bpb: at 1000 steps."""
        bpb = round(bpb - 0.11 * math.log(steps / 1000), 6)
        status = "discard" if words == "worse" else "keep"
        run = dict(seed=seed, num_steps=steps, device="cpu (2 cores)")
        return (f"{commit}\t{bpb:.6f}\t1.0\t{status}\t{words}",
                run_line(commit, bpb, bpb - 0.02, **run))

    lines = [line("aaaaaa1", 1000, 1.3, "baseline on cpu (2 cores), seed 42"),
             line("aaaaaa1", 1000, 1.301, "baseline on cpu (2 cores), seed 43", 43),
             line("aaaaaa1", 1000, 1.299, "baseline on cpu (2 cores), seed 44", 44),
             line("aaaaaa1", 1000, 1.3, "again, seed 42"),
             line("bbbbbb2", 1900, 1.28, "wider"),
             line("bbbbbb2", 900, 1.28, "seed 43: wider", 43),
             line("aaaaaa1", 1000, 1.30001, "again, seed 43", 43),
             line("ccccccc", 500, 1.29, "worse")]
    text = execute(*zip(*lines))
    assert "val_bpb 1.3000 -> 1.2916: a gain of 0.0084" in text
    assert "sealed 1.2800 -> 1.2716: a gain of 0.0084; 100% held up" in text
    assert "500 to 1900 steps; val_bpb changes by -0.110 per unit of ln(steps)" in text
    # worse by 0.01 than the kept one at equal steps, whose cost it shares
    assert names["rows"][-1].fair == pytest.approx(1.3016, abs=1e-4)


@pytest.mark.parametrize("change,words", [
    (dict(prepare_changed=True), "prepare.py differs"),
    (dict(prepare_sha256="b" * 64), "another prepare.py"),
    (dict(referee_sha256="b" * 64), "another referee.py"),
    (dict(reseeded=True), "seed of its own"),
    (dict(seed=7), "ran with seed 7, which the row does not say"),
    (dict(time_budget=600), "time budget 600 s, the first run's 300"),
    (dict(machine={"ours": 0.6, "stolen": 0.0}), "others had 40% of the machine"),
    (dict(dirty=True), "not committed"),
    (dict(val_bpb=1.4), "the journal 1.400000"),
    (dict(commit="9999999"), "no run of this commit")])
def test_a_row_that_the_journal_contradicts_is_named(change, words, execute):
    journal = [dict(line) for line in JOURNAL]
    journal[3] |= change
    lines = [line for line in execute(NIGHT, journal).splitlines() if "Look at #3 bbbbbb2" in line]
    assert len(lines) == 1 and words in lines[0]


def test_a_night_at_another_budget_is_a_night_of_its_own(execute):
    text = execute(NIGHT[:4], [line | {"time_budget": 60.0} for line in JOURNAL[:4]])
    assert "A night at a time budget of 60.0 s: its numbers compare among themselves" in text
    assert "Look at" not in text and "twice the steps: held up" in text
    assert "time budget" not in execute(NIGHT[:4], JOURNAL[:4])


def test_an_earlier_night_in_the_journal_casts_no_doubt(execute):
    """It had another harness, and slow evaluations; this night starts with its own first row."""
    before = [run_line(f"000000{n}", 1.5, 1.5, time="2026-11-20T01:00:00+0000", seed=n,
                       evaluation_seconds=1, prepare_sha256="b" * 64) for n in range(5)]
    text = execute(NIGHT[:4], before + JOURNAL[:4])
    assert "Look at" not in text and "Every row agrees" in text
    assert "0 runs in the journal are in no row" in text


@pytest.mark.parametrize("words", [
    "seed 64 rows of the table with their neighbors", "seeds drawn per row", "again: a softer cap",
    "baseline on a diet", "baseline attention in fewer blocks", "Again"])
def test_an_idea_may_begin_with_the_words_of_other_rows(words, execute):
    rows = NIGHT[:3] + [f"bbbbbb2\t1.280000\t1.1\tkeep\t{words}"]
    text = execute(rows, JOURNAL[:4])
    assert f"#3 {words}: held up (gain +0.0200" in text


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e999", "-0.0"])
def test_a_number_that_is_none_is_named(value, execute):
    rows = NIGHT[:3] + [f"bbbbbb2\t{value}\t1.1\tkeep\tlucky"]
    text = execute(rows, JOURNAL[:3] + [run_line("bbbbbb2", float(value), float(value))])
    assert "skipped: results.tsv, line 5: status keep, but val_bpb" in text
    assert "Nothing was better than the baseline" in text
    crashed = NIGHT[:3] + [f"bbbbbb2\t{value}\tinf\tcrash\tfailed"]
    assert "4 experiments" in execute(crashed, JOURNAL[:3])


def test_what_was_verified_comes_first_and_is_compared_only_with_itself(execute):
    """
    By hand: means 1.31 and 1.29. A run on another text or budget is no gain, a failed one no
    number, and none of them belongs to a row.
    """
    def verified(commit, val, **more):
        line = run_line(commit, val, val and val - 0.02, verified=True, isolated=True, device="cpu",
                        val_text_sha256="t")
        return line | more

    lines = [verified("aaaaaa1", 1.30, seed=7), verified("aaaaaa1", 1.32, seed=8),
             verified("bbbbbb2", 1.28, seed=7), verified("bbbbbb2", 1.30, seed=8),
             verified("eeeeee5", 1.10, isolated=False, val_text_sha256="u"),
             verified("bbbbbb2", 1.50, seed=9, time_budget=60),
             verified("ffffff6", None, failure="FAIL: causality")]
    text = execute(NIGHT, JOURNAL + lines)
    assert ("aaaaaa1: val_bpb 1.310000, sealed 1.290000, standard deviations 0.0141 and 0.0141, "
            "seeds 7, 8 on cpu, 300 s, isolated") in text
    assert "bbbbbb2: val_bpb 1.290000" in text
    assert "a gain of +0.0200 over aaaaaa1, on the sealed text +0.0200" in text
    assert "seeds 42 on cpu, 300 s, NOT isolated" in text and text.count("a gain of +") == 1
    assert "ffffff6 on seed 42 got no number: FAIL: causality" in text
    assert text.index("aaaaaa1: val_bpb") < text.index("baseline 1.300000 over 3 runs")
    assert "which were reported" not in text and "8 runs in the journal\n" in text


def test_outliers_and_commits_that_ran_more_often_than_they_have_rows_are_named(execute):
    usual = dict(startup_cpu_seconds=20.0, startup_seconds=10.0, evaluation_seconds=10.0,
                 val_text_sha256="t", sealed=True)
    journal = [line | usual for line in JOURNAL]
    journal[3] |= dict(startup_cpu_seconds=200.0, evaluation_seconds=70.0)
    journal[4] |= dict(val_text_sha256="u", sealed=False)
    journal.append(run_line("bbbbbb2", 1.29, 1.27) | usual)
    text = execute(NIGHT, journal)
    assert ("bbbbbb2 at 2026-11-24T01:00:00+0000: 200 s of processor time before the first batch, "
            "usually 20") in text
    assert "70 s of evaluation, usually 10" in text and text.count("what was it doing") == 2
    assert "bbbbbb2 got 2 numbers, rows in results.tsv: 1; which were reported?" in text
    assert text.count("which were reported") == 1
    assert "another text to evaluate" in text and "not sealed" in text
    assert "#4 cccccc3 was evaluated on another text: not comparable" in text


@pytest.mark.parametrize("rows,journal", [
    (None, None), ([], None), ([], []), (NIGHT[:1], JOURNAL[:1]), (NIGHT, None),
    (["dddddd4\t0.000000\t0.0\tcrash\ta typo"] * 3, [])])
def test_little_or_nothing_to_read(rows, journal, execute):
    text = execute(rows, journal, picture=True)
    assert f"{len(rows or [])} experiments" in text
    assert ("There is no journal here" in text) == (not journal)


def test_malformed_rows_and_lines_are_named_and_skipped(execute, tmp_path):
    (tmp_path / "journal.jsonl").write_text(json.dumps(JOURNAL[0]) + '\n{"torn\n7\n')
    text = execute([NIGHT[0], "bbbbbb2 1.28 spaces instead of tabs", "c\tx\t1\tkeep\td",
                    "d\t1.2\t1\tmaybe\te", ""])
    assert "1 experiments" in text and "1 runs in the journal" in text
    for number in (3, 4, 5):
        assert f"skipped: results.tsv, line {number}:" in text
    for number in (2, 3):
        assert f"skipped: journal.jsonl, line {number}: not a JSON object" in text


def a_hundred_experiments():
    """Every eighth idea is kept, and the one after it: labels as close as they come."""
    draw, rows, best = random.Random(1), list(NIGHT[:3]), 1.3
    for number in range(100):
        kept = number % 8 in (0, 1)
        if kept:
            best -= 0.01
        val_bpb = best if kept else best + abs(draw.gauss(0.001, 0.01))
        status = "keep" if kept else "discard"
        words = "an idea that takes long to describe"
        rows.append(f"{number:07x}\t{val_bpb:.6f}\t1\t{status}\t{words}")
    return rows


def labels_and_points(names):
    """
    Labels as rectangles (left, bottom, right, top) and points, in pixels, both turned back by the
    labels' 45 degrees.
    """
    axes = names["axes"]
    axes.figure.draw_without_rendering()
    half = math.sqrt(0.5)

    def turned(x, y):
        return half * (x + y), half * (y - x)

    labels = []
    for label in axes.texts:
        if label.get_rotation() == 45:
            assert len(label.get_text()) <= 32
            dx, dy = (points * axes.figure.dpi / 72 for points in label.xyann)
            x, y = axes.transData.transform(label.xy)
            u, v = turned(x + dx, y + dy)
            # level, it is placed relative to the point around which it is rotated
            label.set_rotation(0)
            box = label.get_window_extent().translated(u - x - dx, v - y - dy)
            labels.append((box.x0, box.y0, box.x1, box.y1))
    points = []
    for collection in axes.collections:
        if collection.get_label() in ("kept", "discarded"):
            shown = axes.transData.transform(collection.get_offsets())
            points += [turned(x, y) for x, y in shown]
    return labels, points


@pytest.mark.parametrize("night,named", [
    ("nov24", 2), ("nov25", 0), ("nov28", 2), ("nov29", 10), (None, 13)])
def test_labels_cover_no_point_and_no_other_label(night, named, execute, names, tmp_path):
    if night:
        for name in ("results.tsv", "journal.jsonl"):
            shutil.copy(ROOT / "nights" / night / name, tmp_path)
        execute()
    else:
        execute(a_hundred_experiments())
    labels, points = labels_and_points(names)
    assert len(labels) == named and len(points) > 12
    radius = 3 * names["figure"].dpi / 72
    for left, bottom, right, top in labels:
        # its left and lower ends, turned again, lie in the picture
        assert left - top > 0 and left + bottom > 0
        for x, y in points:
            beside = max(left - x, x - right, bottom - y, y - top)
            assert beside > radius
    for number, (left, bottom, right, top) in enumerate(labels):
        for other in labels[:number]:
            assert max(left - other[2], other[0] - right, bottom - other[3], other[1] - top) > 0


def in_wave(name, start, commit, val, **more):
    return run_line(commit, val, val, time=f"2026-11-24T{start}+0000", wave=name,
                    **{"total_seconds": 300} | more)


def test_waves_are_counted_once_with_the_time_that_slots_stood_empty(execute):
    """
    By hand: two slots for 900 s, from 1:00 to 1:15. Four runs of 300 s fill 1,200 of 1,800 s. They
    are 16 an hour.
    """
    rows = ["aaaaaa1\t1.300000\t1.0\tkeep\tbaseline",
            "aaaaaa1\t1.301000\t1.0\tkeep\tagain, seed 42"]
    journal = [
        in_wave("w1/1/2", "01:00:00", "aaaaaa1", 1.3),
        in_wave("w1/2/2", "01:00:00", "aaaaaa1", None, failure="killed", total_seconds=100),
        in_wave("w1/2/2", "01:00:00", "aaaaaa1", 1.301),
        in_wave("w1/1/2", "01:00:00", "aaaaaa1", 1.3),          # came home twice
        in_wave("w2/1/2", "01:10:00", "bbbbbb2", 1.299),
        in_wave("w2/2/2", "01:10:00", "cccccc3", None, failure="FAIL: causality"),
        in_wave("w2/2/2", "01:10:00", "cccccc3", None, failure="FAIL: causality")]
    text = execute(rows, journal)
    assert "4 runs in the journal" in text and "1 runs without a number" in text
    assert ("2 waves of up to 2 slots, 4 experiments, 16.0 runs an hour; "
            "the slots stood empty for 33% of their time") in text
    assert "which were reported" not in text and "Every row agrees" in text


@pytest.mark.parametrize("lines,words", [
    ([(1.31, None), (1.3, None)], None),
    ([(1.3, None), (None, "killed")], None),
    ([(None, "killed"), (1.3, None)], None),
    ([(None, "killed"), (None, "FAIL: causality")], "no number (FAIL: causality)")])
def test_of_a_run_started_again_the_last_line_with_a_number_counts(lines, words, execute):
    journal = [in_wave("w1/1/1", "01:00:00", "aaaaaa1", val, failure=failure)
               for val, failure in lines]
    text = execute(NIGHT[:1], journal)
    assert "1 runs in the journal\n" in text
    assert (words or "Every row agrees") in text


def test_a_wave_of_fewer_slots_and_the_time_between_waves(execute):
    """
    By hand, in minutes of a slot: the waves have 4 x 10 and 2 x 5, and 10 between them count for
    all 4 slots, so of 90 the runs fill 4 x 5 + 5 + 5. Six runs in 25 minutes are 14.4 an hour.
    The third wave lies beside the first and adds 1 x 5, all of it filled: of 95 the runs fill 35.
    """
    journal = [in_wave(f"w1/{number}/4", start, "aaaaaa1", 1.3 + number / 1000)
               for number, start in enumerate(["01:00:00"] * 3 + ["01:05:00"])]
    journal += [in_wave("w2/1/2", "01:20:00", "aaaaaa1", 1.31),
                in_wave("w2/2/2", "01:20:00", "aaaaaa1", 1.32)]
    text = execute(NIGHT[:1], journal[::-1])
    assert "2 waves of up to 4 slots, 6 experiments, 14.4 runs an hour" in text
    assert "empty for 67% of their time" in text
    beside = in_wave("w3/1/1", "01:02:00", "aaaaaa1", 1.33)
    text = execute(NIGHT[:1], journal + [beside])
    assert "3 waves" in text and "16.8 runs an hour" in text
    assert "empty for 63% of their time" in text


def test_slots_that_were_never_empty_are_not_less_than_that(execute):
    """The first run's start was noted 20 s late, the second's at once, so they seem to overlap."""
    journal = [in_wave("w1/1/1", "01:00:20", "aaaaaa1", 1.3),
               in_wave("w1/2/1", "01:05:02", "aaaaaa1", 1.31)]
    assert "empty for 0% of their time" in execute(NIGHT[:1], journal)


@pytest.mark.parametrize("more", [{}, {"wave": "mine"}])
def test_a_night_without_waves_prints_nothing_of_them(more, execute):
    assert "slots" not in execute(NIGHT, [line | more for line in JOURNAL])


def test_rows_of_one_commit_and_seed_in_a_wave_take_its_lines_in_order(execute, names):
    """
    The rows #0 and #1 have equal numbers. #2 has a wrong one: it takes what is left, not what is
    #3's, and not another seed's.
    """
    rows = ["aaaaaa1\t1.300000\t1.0\tkeep\tbaseline",
            "aaaaaa1\t1.300000\t1.0\tkeep\tagain, seed 42",
            "aaaaaa1\t1.200000\t1.0\tkeep\tagain, seed 42",
            "aaaaaa1\t1.303000\t1.0\tkeep\tagain, seed 42"]
    values = [1.305, 1.3, 1.3, 1.303, 1.304]
    journal = [in_wave(f"w1/{number}/5", "01:00:00", "aaaaaa1", val)
               for number, val in enumerate(values, 1)]
    for number, line in enumerate(journal):
        line["test_bpb"] = 1.2 + number / 100
    journal[0]["seed"] = 43
    text = execute(rows, journal)
    assert [row.test_bpb for row in names["rows"]] == [1.21, 1.22, 1.24, 1.23]
    assert text.count("before believing") == 1
    assert "#2 aaaaaa1 (keep, 1.200000)" in text and "the journal 1.304000" in text


@pytest.mark.parametrize("more,words", [
    (dict(share={"cores": 1, "nice": 0}), "had 1 cores, the first run 2"),
    (dict(share={"cores": 4, "nice": 0}), "had 4 cores, the first run 2"),
    (dict(share={"cores": 2, "nice": 5}), "ran at nice 5"),
    (dict(share={"cores": 2, "nice": -5}), "ran at nice -5"),
    (dict(attention="varlen_attn"), "attention was varlen_attn, the first run's FlashAttention-3"),
    (dict(dtype="float32"), "matmuls were in float32, the first run's in bfloat16"),
    (dict(compiled=False), "was not compiled")])
def test_a_run_with_less_of_the_machine_is_doubted(execute, more, words):
    usual = {"share": {"cores": 2, "nice": 0}, "attention": "FlashAttention-3", "compiled": True,
             "dtype": "bfloat16"}
    rows = ["aaaaaa1\t1.300000\t1.0\tkeep\tbaseline", "bbbbbb2\t1.280000\t1.0\tkeep\ta gain"]
    first = run_line("aaaaaa1", 1.3, 1.3, **usual)
    same, other = (run_line("bbbbbb2", 1.28, 1.28, **each) for each in (usual, usual | more))
    assert "before believing" not in execute(rows, [first, same])
    text = execute(rows, [first, other])
    assert f"before believing it: {words}\n" in text


def test_cores_compare_only_on_one_device_and_where_the_journal_has_them(execute):
    def run(commit, val, device, **more):
        return run_line(commit, val, val, device=device, **more)

    other = run("bbbbbb2", 1.28, "slow", share={"cores": 4, "nice": 0})
    for first in (run("aaaaaa1", 1.3, "fast", share={"cores": 2, "nice": 0}),
                  run("aaaaaa1", 1.3, "slow")):
        assert "before believing" not in execute(NIGHT[:1] + NIGHT[3:4], [first, other])
