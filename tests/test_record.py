"""What a run leaves: its curves, the best model, the lines that help the next idea."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import record
from children import ROOT, copy_programs, forked, program

# ------------------------------------------------------------------------------------------------
# One run of the real train.py, watched


@pytest.fixture(scope="module")
def night(tmp_path_factory, whole_cache):
    """A clone in which train.py ran once for 8 s, on its small vocabulary: (clone, cache, said)."""
    clone, cache = tmp_path_factory.mktemp("night"), tmp_path_factory.mktemp("cache")
    shutil.copytree(whole_cache, cache, dirs_exist_ok=True)
    prepared = program("prepare.py", "--dataset", "sotu", "--vocab-size", 512, "--eval-bytes",
                       30_000, AUTORESEARCH_CACHE_DIR=cache)
    assert prepared.returncode == 0, prepared.stdout
    copy_programs(clone)
    text = (ROOT / "train.py").read_text().replace("vocab_size=None, ", "vocab_size=512,  ")
    assert "vocab_size=512" in text
    (clone / "train.py").write_text(text)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "Wider \x1b[31m MLP"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=clone,
                       check=True)
    result = forked(clone / "train.py", AUTORESEARCH_CACHE_DIR=cache, AUTORESEARCH_TIME_BUDGET=8)
    assert result.returncode == 0, result.stdout
    return clone, cache, result.stdout


def test_curves_are_there_for_tensorboard_and_without_the_sealed_number(night):
    _, cache, said = night
    [folder] = (cache / "curves").iterdir()
    assert re.fullmatch(r"\w{5}-\d{4} [0-9a-f]{7} seed 42 Wider-x1b-31m-MLP", folder.name)
    curves = record.read_curves(folder)
    assert {"loss", "tokens per second", "share of the machine", "val_bpb"} < curves.keys()
    assert {"rate/embeddings", "rate/unembed"} < curves.keys()
    assert any(name.startswith("rate/matrices ") for name in curves)
    losses = [value for _, value in curves["loss"]]
    assert len(losses) >= 2 and losses[-1] < losses[0] and losses[0] == pytest.approx(
        math.log(512), rel=0.1)
    rates = [value for _, value in curves["rate/unembed"]]
    assert rates[-1] < rates[0]                             # the schedule ends in a fall
    [line] = map(json.loads, (cache / "journal.jsonl").read_text().splitlines())
    assert curves["val_bpb"] == [(line["num_steps"], np.float32(line["val_bpb"]))]
    data = b"".join(path.read_bytes() for path in folder.iterdir())
    assert line["commit"].encode() + b": Wider" in data     # shown beside the number
    assert np.float32(line["val_bpb"]).tobytes() in data
    assert np.float32(line["test_bpb"]).tobytes() not in data


def test_every_point_of_a_long_run_comes_back(tmp_path):
    curves = record.Curves(tmp_path / "run")
    for step in range(200):
        curves.add(step, {"loss": 1 / (step + 1)})
    curves.close()
    expected = [(step, np.float32(1 / (step + 1))) for step in range(200)]
    assert record.read_curves(tmp_path / "run") == {"loss": expected}


def test_the_last_lines_of_a_run(night):
    _, cache, said = night
    summary, details = said.split("\n---\n")[1:]
    assert "val_bpb:" in summary
    lines = dict(line.split(":", 1) for line in details.strip().splitlines()[:-1])
    assert list(lines) == ["epochs", "train_loss", "step_time", "gradient_norm"]
    losses = [float(word) for word in lines["train_loss"].split()[:4]]
    [line] = map(json.loads, (cache / "journal.jsonl").read_text().splitlines())
    assert losses == pytest.approx(line["train_loss"], abs=1e-3) and losses[3] < losses[0]
    shares = [int(share) for share in re.findall(r"(\d+)%", lines["step_time"])]
    assert len(shares) == 3 and 99 <= sum(shares) <= 101 and min(shares) > 0
    assert "embeddings " in lines["gradient_norm"] and "nan" not in lines["gradient_norm"]
    assert len(details.strip().splitlines()) <= 10


def test_the_model_is_kept_with_all_that_it_takes_to_load_it(night):
    clone, cache, said = night
    [kept] = record.kept_models(cache / "models")
    [line] = map(json.loads, (cache / "journal.jsonl").read_text().splitlines())
    assert kept["val_bpb"] == line["val_bpb"] and kept["commit"] == line["commit"]
    assert "test_bpb" not in kept and str(line["test_bpb"]) not in (
        kept["path"] / "run.json").read_text()
    assert (kept["path"] / "train.py").read_bytes() == (clone / "train.py").read_bytes()
    weights = load_file(kept["path"] / "weights.safetensors")
    assert any(name.startswith("ngrams.") for name in weights)
    counts = "ngrams.", "seen"
    numbers = [w.numel() for name, w in weights.items() if not name.startswith(counts)]
    assert sum(numbers) == line["num_params"]
    assert "uv run sample.py" in said


def sample(night, *arguments):
    clone, cache, _ = night
    return subprocess.run([sys.executable, "sample.py", *map(str, arguments)], cwd=clone, text=True,
                          env=os.environ | {"AUTORESEARCH_CACHE_DIR": str(cache)},
                          capture_output=True)


def test_sample_writes_on_and_scores_a_file(night, tmp_path):
    clone, cache, _ = night
    result = sample(night, "The state of the union", "--tokens", 20, "--temperature", 0)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The state of the union")
    assert len(result.stdout) > len("The state of the union") + 20
    assert "val_bpb" in result.stderr and "\x1b" not in result.stderr
    again = sample(night, "The state of the union", "--tokens", 20, "--temperature", 0)
    assert again.stdout == result.stdout                    # without chance

    # By hand: the whole text in rows of the context, each after a BOS.
    text = (ROOT / "README.md").read_text()[:3000]
    (tmp_path / "mine.txt").write_text(text)
    said = sample(night, "--bpb", tmp_path / "mine.txt").stdout
    assert float(said.split()[0]) == pytest.approx(bits_per_byte(night, text), abs=2e-3)


def bits_per_byte(night, text):
    clone, cache, _ = night
    code = f"""
import sys; sys.path.insert(0, {str(clone)!r})
import torch, train, prepare, record
from types import SimpleNamespace
from safetensors.torch import load_file
torch.compiler.set_stance("force_eager")
from pathlib import Path
[kept] = record.kept_models(Path({str(cache / "models")!r}))
h = SimpleNamespace(**train.RECIPES["sotu"] | dict(vocab_size=512))
model, _ = train.build(h, 256, torch.device("cpu"))
model.load_state_dict(load_file(kept["path"] / "weights.safetensors"))
model.eval()
text = {text!r}
ids = prepare.load_tokenizer(Path({str(cache / "sotu" / "vocab-512")!r})).encode(text)
bits = 0.0
with torch.no_grad():
    for start in range(0, len(ids), 256):
        row = [511] + ids[start:start + 256]
        odds = torch.softmax(model(torch.tensor([row[:-1]]))[0].double(), -1)
        for position, target in enumerate(row[1:]):
            bits -= torch.log2(odds[position, target]).item()
print("BITS", bits / len(text.encode()))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={
        **os.environ, "AUTORESEARCH_CACHE_DIR": str(cache)})
    assert "BITS" in result.stdout, result.stderr
    return float(result.stdout.split("BITS")[1])


def test_sample_says_what_is_missing(night, tmp_path):
    for arguments, words in [(("--commit", "zzz"), "no model zzz is kept"),
                             (("--bpb", tmp_path / "none"), "there is no file")]:
        result = sample(night, *arguments)
        assert result.returncode == 1 and words in result.stderr
        assert "Traceback" not in result.stderr


def test_train_py_can_read_neither_the_models_nor_the_curves_of_earlier_runs(place):
    (place.cache / "models" / "x").mkdir(parents=True)
    (place.cache / "curves").mkdir()
    for path in ("models/x/weights.safetensors", "curves/events"):
        (place.cache / path).write_bytes(b"secret")
        said = place.start(f"open({str(place.cache / path)!r}).read()").communicate(timeout=60)[0]
        assert "is sealed" in said and "val_bpb:" not in said, said
        place.wait()


def test_no_curves_where_they_can_t_be_written(place):
    (place.cache / "curves").write_text("a file in the way")
    place.environment["AUTORESEARCH_TIME_BUDGET"] = "6"
    said = place.start().communicate(timeout=100)[0]
    assert "val_bpb:" in said and "Traceback" not in said and "curves" not in said, said

# ------------------------------------------------------------------------------------------------
# Parts


def test_quarters_are_the_last_losses_until_then():
    losses = [(0.0, 8.0), (0.2, 7.0), (0.26, 6.0), (0.5, 5.0), (0.74, 4.0), (0.99, 3.0)]
    assert record.quarters(losses) == [7.0, 5.0, 4.0, 3.0]
    assert record.quarters([]) == [] and record.quarters([(0.9, 3.0)]) == []


def line_of(commit, seed=42, **more):
    return {"commit": commit, "seed": seed, "device": "cpu", "time_budget": 300, "dataset": "sotu",
            "val_text_sha256": "a", "train_loss": [4, 3, 2, float(seed)]} | more


def test_the_last_kept_commit_as_it_ran_here(tmp_path):
    journal = tmp_path / "journal.jsonl"
    lines = [line_of("aaaaaaa"), line_of("bbbbbbb"), line_of("bbbbbbb", 43),
             line_of("bbbbbbb", 43, device="gpu", train_loss=[9] * 4),
             line_of("bbbbbbb", time_budget=60, train_loss=[8] * 4),
             line_of("ccccccc"), line_of("bbbbbbb", train_loss=[])]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines) + "torn {\n" + "[" * 9999)
    row = "{}\t1.2\t1.0\t{}\tx\n"
    assert record.last_kept(tmp_path, journal, line_of("ddddddd")) is None
    (tmp_path / "results.tsv").write_text(
        row.format("aaaaaaa", "keep") + row.format("bbbbbbb", "keep")
        + row.format("ccccccc", "discard") + "aaaaaaa\t1.2\t1.0\tkeep\tagain, seed 43\n")
    for seed, other in ((42, 42), (43, 43), (44, 43)):
        found = record.last_kept(tmp_path, journal, line_of("ddddddd", seed))
        assert (found["commit"], found["seed"]) == ("bbbbbbb", other)
    assert record.last_kept(tmp_path, journal, line_of("ddddddd", device="tpu")) is None


@pytest.fixture
def files(tmp_path):
    save_file({"w": torch.arange(6.0)}, tmp_path / "w.safetensors")
    (tmp_path / "tokenizer.b64").write_bytes(b"YQ==\n")
    return tmp_path / "w.safetensors", b"program", tmp_path / "tokenizer.b64"


def keep(folder, files, val_bpb, **more):
    known = {"run": os.urandom(4).hex(), "commit": "abcdef0", "seed": 42, "val_bpb": val_bpb,
             "dataset": "sotu", "val_text_sha256": "a", "device": "cpu"} | more
    if record.is_best(folder, known):
        record.keep_model(folder, *files, known)
        time.sleep(0.01)                                    # the newest one is known by its time


def test_the_best_models_are_kept_within_bounds(files, tmp_path, monkeypatch):
    folder = tmp_path / "models"
    keep(folder, files, 1.5, device="gpu")                  # the best of its machine: it stays
    for number in range(12):
        keep(folder, files, 1.4 - number / 100)
        keep(folder, files, 1.4 - number / 100 + 0.005)     # not as good
    kept = record.kept_models(folder)
    assert len(kept) == record.MODELS and kept[0]["val_bpb"] == pytest.approx(1.29)
    assert sorted(each["device"] for each in kept) == ["cpu"] * 4 + ["gpu"]
    assert record.kept_models(folder, "sotu", "abc") == kept
    assert record.kept_models(folder, "other") == record.kept_models(folder, "sotu", "b") == []
    size = files[0].stat().st_size
    monkeypatch.setattr(record, "MODELS_BYTES", int(2.5 * size))
    keep(folder, files, 1.2)
    assert [each["val_bpb"] for each in record.kept_models(folder)] == [1.2, 1.5]


def test_weights_that_are_damaged_linked_or_too_large_are_not_kept(files, tmp_path, monkeypatch):
    folder, (weights, *others) = tmp_path / "models", files
    link, cut = tmp_path / "link", tmp_path / "cut"
    link.symlink_to(weights)
    cut.write_bytes(weights.read_bytes()[:-3])
    for path in (link, cut, tmp_path, tmp_path / "none", tmp_path / "tokenizer.b64"):
        with pytest.raises((OSError, ValueError)):
            keep(folder, (path, *others), 1.0)
    monkeypatch.setattr(record, "MODELS_BYTES", 10)
    with pytest.raises(ValueError, match="more than"):
        keep(folder, files, 1.0)
    assert record.kept_models(folder) == [] and [path.name for path in folder.iterdir()] == ["lock"]


def test_the_parts_of_a_step_are_timed():
    def step(x, y):
        time.sleep(0.05)
        (x * y).sum().backward()
        time.sleep(0.02)

    x = torch.ones(3, requires_grad=True)
    before = torch.Tensor.backward
    forward, backward, rest = record.timed(step, x, torch.ones(3), torch.device("cpu"))
    assert 0.05 <= forward < 0.2 and 0.02 <= rest < 0.2 and backward < 0.05
    assert torch.Tensor.backward is before
    with pytest.raises(ValueError):
        record.timed(lambda x, y: int("x"), x, x, torch.device("cpu"))
    assert torch.Tensor.backward is before


def test_gradient_norms_by_group():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))
    table = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SGD([dict(params=[a, b], name="both"), dict(params=[table.weight])],
                                lr=0.1)
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0, 0.0])
    table(torch.tensor([1, 1])).sum().backward()            # each of two elements: 2
    norms = record.gradient_norms(optimizer)
    assert norms["both"].item() == pytest.approx(5)
    assert norms["1"].item() == pytest.approx(math.sqrt(8))
    assert record.rates(optimizer) == {"both": 0.1, "1": 0.1} and record.rates(None) == {}
