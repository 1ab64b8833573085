"""morning.py as a person runs it in a clone: the page, or why there is none."""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from children import ROOT
from test_notebook import HEADER, run_line

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]


def morning(clone, *arguments):
    return subprocess.run([sys.executable, "morning.py", *arguments], cwd=clone, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone with what morning.py needs, and an empty cache."""
    monkeypatch.setenv("AUTORESEARCH_CACHE_DIR", str(tmp_path / "cache"))
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("morning.py", "decide.py", "record.py", "seal.py", "trial.py", "analysis.ipynb"):
        shutil.copy(ROOT / name, clone)
    return clone


def commit(clone, text):
    (clone / "train.py").write_text(text)
    subprocess.run([*GIT, "add", "train.py"], cwd=clone, check=True)
    subprocess.run([*GIT, "commit", "-qm", "x"], cwd=clone, check=True)
    command = [*GIT, "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, cwd=clone, check=True, stdout=subprocess.PIPE,
                          text=True).stdout.strip()


def test_the_page_of_a_night(clone):
    subprocess.run([*GIT, "init", "-q"], cwd=clone, check=True)
    before, after = commit(clone, "depth = 3\n"), commit(clone, "depth = 4  # <b>deeper</b>\n")
    rows = [f"{before}\t1.300000\t1.0\tkeep\tbaseline",
            f"{before}\t1.300500\t1.0\tkeep\tbaseline, seed 43",
            f"{after}\t1.270000\t1.0\tkeep\tsize: four layers <script>alert(1)</script>",
            "ccccccc\t1.310000\t1.0\tdiscard\tschedule: no warmdown"]
    journal = [run_line(before, 1.3, 1.28), run_line(before, 1.3005, 1.2805, seed=43),
               run_line(after, 1.27, 1.253), run_line("ccccccc", 1.31, 1.29)]
    old = ["ddddddd\t1.400000\t1.0\tkeep\tbaseline",
           "eeeeeee\t1.380000\t1.0\tkeep\tsize: three layers"]
    journal += [run_line("ddddddd", 1.4, 1.4, time="2026-11-20T01:00:00+0000"),
                run_line("eeeeeee", 1.38, 1.39, time="2026-11-20T01:10:00+0000")]
    (clone / "results.tsv").write_text(HEADER + "\n".join(rows))
    (clone / "results-nov20.tsv").write_text(HEADER + "\n".join(old))
    (clone / "journal.jsonl").write_text("\n".join(json.dumps(
        {"device": "cpu (two cores)", "val_text_sha256": "a"} | line) for line in journal))
    nbformat.validate(nbformat.read(clone / "analysis.ipynb", as_version=4))
    done = morning(clone)
    assert done.returncode == 0 and "open " in done.stdout, done.stdout
    page = (clone / "morning.html").read_text("utf-8")

    # One file: nothing is fetched, and the picture is in it.
    assert not re.findall(r'(?:src|href)="(?:https?:)?//[^"]*"', page)
    assert page.count("data:image/png;base64,") >= 1
    assert (clone / "progress.png").exists()
    # What the agent and its code wrote is text.
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    assert '<span class="minus">-depth = 3</span>' in page
    assert '<span class="plus">+depth = 4  # &lt;b&gt;deeper&lt;/b&gt;</span>' in page
    # Gains, sealed ones beside them, and the table of all experiments.
    assert re.search(r"four layers .*held up \(gain \+0\.0300, sealed \+0\.0270\)", page)
    assert page.count("<td>discard<td>schedule: no warmdown") == 1
    # All nights on this machine.
    assert "1.4000 -&gt; 1.3800, 50% of it held on the sealed text" in page
    assert "size: 2 kept of 2, gained 0.0500" in page
    assert "schedule: 0 kept of 1, never gained" in page


def test_without_a_night_it_says_so_in_a_sentence(clone):
    for arguments in [], ["nowhere.tsv"]:
        done = morning(clone, *arguments)
        assert done.returncode == 1 and len(done.stdout.splitlines()) == 1, done.stdout
        assert f"there is no {arguments[0] if arguments else 'results.tsv'}" in done.stdout
    assert not (clone / "morning.html").exists()
