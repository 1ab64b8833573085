"""One small prepared cache for all tests, made from the embedded corpus; no GPU, no internet."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CACHE = tempfile.TemporaryDirectory(prefix="autoresearch-tests-")
os.environ |= {"AUTORESEARCH_CACHE_DIR": CACHE.name, "AUTORESEARCH_DEVICE": "cpu", "AUTORESEARCH_TIME_BUDGET": "10"}
for name in ("AUTORESEARCH_SEED",):
    os.environ.pop(name, None)
sys.path.insert(0, str(ROOT))


def program(*command, cwd=ROOT, **environment):
    """Run one of the two programs as a child process; stdout and stderr come back as one text."""
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, text=True, stdout=subprocess.PIPE, timeout=300,
                          stderr=subprocess.STDOUT, env=os.environ | {k: str(v) for k, v in environment.items()})


@pytest.fixture(scope="session", autouse=True)
def cache():
    """The cache folder, with sotu prepared at two vocabularies; 2048, train.py's, is the last and so the chosen one."""
    for size in (512, 2048):
        result = program("prepare.py", "--dataset", "sotu", "--vocab-size", size)
        assert result.returncode == 0, result.stdout
    return Path(CACHE.name)


@pytest.fixture
def run(cache, monkeypatch, tmp_path):
    """A prepare.Run on the small vocabulary, with a journal of its own; not entered."""
    import prepare
    return prepare.Run(512)
