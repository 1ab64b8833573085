"""One small prepared cache for all tests, made from the embedded corpus; no GPU, no internet."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from children import ROOT, program

CACHE = tempfile.TemporaryDirectory(prefix="autoresearch-tests-")
os.environ |= {"AUTORESEARCH_CACHE_DIR": CACHE.name, "AUTORESEARCH_DEVICE": "cpu", "AUTORESEARCH_TIME_BUDGET": "10"}
os.environ.pop("AUTORESEARCH_SEED", None)
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def cache():
    """The cache folder, with sotu prepared at two vocabularies; 4096, train.py's, is the last and so the chosen one."""
    for size in (512, 4096):
        result = program("prepare.py", "--dataset", "sotu", "--vocab-size", size)
        assert result.returncode == 0, result.stdout
    return Path(CACHE.name)


@pytest.fixture
def run(cache, monkeypatch, tmp_path):
    """A prepare.Run on the small vocabulary; not entered."""
    import prepare
    run = prepare.Run(512)
    yield run
    run.channel.send("fail", "the test is over")
