"""One small prepared cache for all tests, made from the embedded corpus: no GPU, no internet."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

# pytest -n 2: a core for each worker, so that runs in one take nothing from runs in another.
# Before torch, which counts the cores once.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(WORKER.removeprefix("gw")) % len(cores)]})

import pytest
import torch

from children import ROOT, Place, program

CACHE = tempfile.TemporaryDirectory(prefix="autoresearch-tests-")
os.environ["AUTORESEARCH_CACHE_DIR"] = CACHE.name
os.environ["AUTORESEARCH_DEVICE"] = "cpu"
os.environ["AUTORESEARCH_TIME_BUDGET"] = "10"
os.environ.pop("AUTORESEARCH_SEED", None)
sys.path.insert(0, str(ROOT))
torch.compiler.set_stance("force_eager")        # in this process; child processes compile


# These take the longest: they come first, so that no worker is left alone with one at the end.
SLOW = ["test_redteam.py", "test_run.py", "test_wave.py", "test_pair.py", "test_soak.py",
        "test_windows.py", "test_places.py", "test_program.py", "test_record.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [*SLOW, item.path.name].index(item.path.name))


def prepare_sotu(folder, *arguments):
    """Prepare sotu at two vocabularies. The first one, 8192, is train.py's."""
    for size in (8192, 512):
        result = program("prepare.py", "--dataset", "sotu", "--vocab-size", size, *arguments,
                         AUTORESEARCH_CACHE_DIR=folder)
        assert result.returncode == 0, result.stdout
    return folder


@pytest.fixture(scope="session")
def whole_cache(tmp_path_factory):
    """A cache as `prepare.py --dataset sotu` makes it: all of the text is evaluated."""
    return prepare_sotu(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="session", autouse=True)
def cache(whole_cache):
    """The cache that every program uses by default. It evaluates a fifth of the text, for speed."""
    folder = Path(CACHE.name)
    shutil.copytree(whole_cache / "sotu", folder / "sotu")
    return prepare_sotu(folder, "--eval-bytes", 200_000)


@pytest.fixture(autouse=True)
def end_of_referees():
    """A referee that outlived its test would kill pytest when the run's hard limit is over."""
    yield
    referees = sys.modules["prepare"].referees if "prepare" in sys.modules else []
    while referees:
        referee = referees.pop()
        referee.stdin.close()
        referee.wait(30)
        referee.stdout.close()


@pytest.fixture
def run(cache):
    """A prepare.Run on the small vocabulary, not entered."""
    import prepare
    run = prepare.Run(512)
    yield run
    run.channel.send("fail", "the test is over")


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    for process in place.referees():
        process.kill()
