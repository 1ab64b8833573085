"""machine.py, and what the GPU paths do as far as a CPU can tell: stand-ins, fake CUDA tensors."""

import json
import os
import platform
import subprocess
import sys
import types
from functools import partial

import cloudpickle
import kernels
import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import GPUTooOldForTriton
from torch._subclasses.fake_tensor import FakeTensorMode

import machine
import prepare
import referee
import train
from children import ROOT, program
from test_model import assert_close, dense_attention, qkv
from test_optimizer import recipe

CUDA = torch.device("cuda", 0)

# A stand-in for FlashAttention that spells out its arguments as a mask. Some tests make it fail.
STUB = '''
import torch

def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
    {fail}
    left, right = window_size
    T = q.size(1)
    distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        mask = mask & (distance <= left)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.size(-1) ** 0.5
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)
'''


def reference_varlen(q, k, v, ends_q, ends_k, max_q, max_k, window_size=(-1, -1)):
    """torch's varlen_attn by its documentation: sequences between ends, (left, 0) or (-1, 0)."""
    left, right = window_size
    assert right == 0 and (ends_q == ends_k).all() and ends_q.dtype == torch.int32
    window = left + 1 if left >= 0 else max_q
    pieces = []
    for a, b in zip(ends_q[:-1], ends_q[1:]):
        pieces.append(dense_attention(q[None, a:b], k[None, a:b], v[None, a:b], window)[0])
    return torch.cat(pieces)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(fail): a kernel in prepare.py's folder that does `fail` when called; no network."""
    def hub(fail="pass"):
        variant = tmp_path / "flash3" / "c0ffee" / "torch-universal"
        variant.mkdir(parents=True)
        (variant / "__init__.py").write_text(STUB.format(fail=fail))
        (variant / "metadata.json").write_text(json.dumps({
            "name": "flash-attn3", "id": f"stub_{tmp_path.name}", "version": 1, "license": "MIT",
            "python-depends": [], "backend": {"type": "cpu"}}))
        monkeypatch.setattr(machine, "flash3_folder", variant)
        get = kernels.get_local_kernel
        monkeypatch.setattr(kernels, "get_local_kernel", lambda path: get(path, backend="cpu"))
    monkeypatch.setattr(machine, "flash_attn_func", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return hub


@pytest.fixture
def card(monkeypatch):
    """card(capability, name): a CUDA GPU, as far as anyone asks about it."""
    def card(capability=(9, 0), name="NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    return card


@pytest.mark.parametrize("window", [8, 24])
def test_flash3_is_the_dense_attention(hub, window):
    hub()
    q, k, v = qkv()
    assert_close(machine.flash3(q, k, v, window), dense_attention(q, k, v, window))


@pytest.mark.parametrize("window", [8, 24])
def test_varlen_is_the_dense_attention(monkeypatch, window):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reference_varlen)
    q, k, v = qkv()
    assert_close(machine.varlen(q, k, v, window), dense_attention(q, k, v, window))


def choose(monkeypatch, dtype=torch.bfloat16):
    """choose_attention on a CUDA device, its trial on the CPU, in float32."""
    randn = torch.randn
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *size, device, dtype, **more: randn(*size, **more))
        return machine.choose_attention(CUDA, dtype)


def broken(*_, **__):
    raise RuntimeError("no kernel image is available for execution on the device")


FLASH3, VARLEN = "FlashAttention-3", "varlen_attn"
SDPA = "scaled_dot_product_attention"
NO_KERNEL = "no varlen_attn here (RuntimeError: no kernel image"
ILLEGAL = "raise RuntimeError('illegal instruction')"


def without_window(*arguments, window_size):
    return reference_varlen(*arguments, window_size=(-1, 0))


def nan_without_window(*arguments, window_size):
    result = reference_varlen(*arguments, window_size=window_size)
    return result * (float("nan") if window_size[0] < 0 else 1)


def wrong_gradient(q, k, v, *arguments, **more):
    return reference_varlen(q, k, v.detach() + 0 * v, *arguments, **more)


@pytest.mark.parametrize("varlen,window", [
    (without_window, 64), (nan_without_window, 256), (wrong_gradient, 64)])
def test_a_kernel_that_computes_something_else_is_not_used(varlen, window, card, monkeypatch,
                                                           capsys):
    card((8, 0))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    attend, _ = choose(monkeypatch)
    assert attend is machine.sdpa
    assert f"no varlen_attn here (ValueError: with a window of {window} it is" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("capability,local,varlen,chosen,says", [
    ((9, 0), "pass", reference_varlen, FLASH3, ""),
    ((9, 0), None, reference_varlen, VARLEN, "not downloaded: uv run prepare.py"),
    ((9, 0), ILLEGAL, reference_varlen, VARLEN, "no FlashAttention-3 here (RuntimeError: illegal"),
    ((9, 0), "raise RuntimeError()", reference_varlen, VARLEN, "(RuntimeError: no reason given)"),
    ((9, 0), None, broken, SDPA, NO_KERNEL),
    ((8, 0), "pass", reference_varlen, VARLEN, ""),     # A100: FlashAttention-3 is for Hopper alone
    ((8, 9), None, reference_varlen, VARLEN, ""),
    ((12, 0), None, reference_varlen, VARLEN, ""),
    ((12, 0), None, broken, SDPA + " (torch.bfloat16 on NVIDIA H100", "no varlen_attn here"),
    ((7, 5), "pass", reference_varlen, SDPA + " (torch.float16 on NVIDIA H100", "")])
def test_every_choice_of_attention(capability, local, varlen, chosen, says,
                                   hub, card, monkeypatch, capsys):
    card(capability)
    if local:
        hub(local)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    attend, skips = choose(monkeypatch, torch.bfloat16 if capability[0] > 7 else torch.float16)
    printed = capsys.readouterr().out
    assert f"attention: {chosen}" in printed and says in printed
    assert printed.count("\n") == 1 + printed.count("here (")
    assert skips == ("scaled_dot" not in chosen)
    q, k, v = qkv()
    window = 8 if skips else 24                         # sdpa takes whole windows only
    assert_close(attend(q, k, v, window), dense_attention(q, k, v, window))


def test_attention_without_cuda(capsys):
    float32 = torch.float32
    assert machine.choose_attention(torch.device("mps"), float32) == (machine.sdpa, False)
    assert "scaled_dot_product_attention (torch.float32 on mps)" in capsys.readouterr().out
    assert machine.choose_attention(torch.device("cpu"), float32) == (machine.blockwise, True)
    assert "blockwise" in capsys.readouterr().out


FLOAT16, FLOAT32, BFLOAT16 = torch.float16, torch.float32, torch.bfloat16


@pytest.mark.parametrize("device,capability,hip,peaks,dtype", [
    ("cuda", (8, 0), None, {}, BFLOAT16),               # from Ampere on, without measuring
    ("cuda", (12, 1), None, {}, BFLOAT16),
    ("cuda", (7, 5), None, {FLOAT16: 25, FLOAT32: 6}, FLOAT16),             # T4
    ("cuda", (7, 5), None, {FLOAT16: 6, FLOAT32: 6}, FLOAT32),
    ("cuda", (9, 4), "7.1", {BFLOAT16: 600, FLOAT32: 90}, BFLOAT16),        # MI300X
    ("cuda", (10, 3), "7.1", {BFLOAT16: 20, FLOAT32: 22}, FLOAT32),         # RDNA2
    ("mps", None, None, {}, FLOAT32),
    ("cpu", None, None, {BFLOAT16: 0.35, FLOAT32: 0.15}, BFLOAT16),
    ("cpu", None, None, {BFLOAT16: 0.17, FLOAT32: 0.15}, FLOAT32),
    ("cpu", None, None, {BFLOAT16: 0.003, FLOAT32: 0.15}, FLOAT32)])
def test_precision_is_the_fastest_that_is_safe(device, capability, hip, peaks, dtype, card,
                                               monkeypatch):
    card(capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(machine, "measured_peak", lambda device, dtype, size: peaks[dtype])
    assert machine.fastest_dtype(torch.device(device)) == dtype


def test_precision_is_chosen_once(monkeypatch):
    monkeypatch.setitem(machine.chosen, "dtype", None)
    for first in BFLOAT16, FLOAT32:         # on a busy machine the second answer is another
        monkeypatch.setattr(machine, "fastest_dtype", lambda device, dtype=first: dtype)
        assert machine.compute_dtype(torch.device("cpu")) == BFLOAT16


class Batches:
    """A prepare.Run that hands out three batches of made-up tokens."""
    device, context, progress, epoch = torch.device("cpu"), 64, 0.0, 0.0

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def __enter__(self):
        torch.manual_seed(0)
        return self

    def warmup(self, step, rows, *things):
        self.things = things
        return rows

    def batches(self, rows):
        for _ in range(3):
            yield torch.randint(self.vocab_size - 1, (2, rows, self.context)).unbind()

    def ignore(self, *_, **__):
        pass

    __exit__ = log = evaluate_bpb = report = ignore


def test_in_float16_the_loss_is_scaled_and_the_gradients_are_not(cache, monkeypatch):
    """The optimizer of the real loop gets the gradients of float32, but for float16's digits."""
    def gradients(dtype, enabled):
        found, scales = [], []

        class Optimizer(train.MuonAdamW):
            def step(self):
                found.append([p.grad.clone() for group in self.param_groups
                              for p in group["params"]])

        class Scaler(torch.amp.GradScaler):
            def update(self):
                assert self.is_enabled() == enabled
                scales.append(self.get_scale())
                super().update()

        with monkeypatch.context() as patch:
            patch.setattr(machine, "compute_dtype", lambda device: dtype)
            patch.setattr(train, "MuonAdamW", Optimizer)
            patch.setattr(torch.amp, "GradScaler", Scaler)
            train.main()
        assert len(found) == 3 and scales == 3 * [2.0**16 if enabled else 1.0]
        return found

    small = recipe("tinystories", vocab_size=256, depth=2, width=64, device_batch_size=2)
    monkeypatch.setitem(train.RECIPES, "sotu", vars(small))
    monkeypatch.setattr(prepare, "Run", Batches)
    for a, b in zip(gradients(torch.float16, True), gradients(torch.float32, False)):
        for found, expected in zip(a, b):
            assert (found - expected).norm() <= 0.02 * expected.norm() + 1e-6


def test_amd_cards_without_fast_bfloat16_get_no_flash_attention(card, monkeypatch):
    """Their capability, (10, 3) for RDNA2, would be Ampere's on NVIDIA."""
    card((10, 3), "AMD Radeon RX 6800")
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reference_varlen)
    assert choose(monkeypatch, FLOAT32) == (machine.sdpa, False)
    card((9, 4), "AMD Instinct MI300X")     # which is no Hopper either
    assert choose(monkeypatch, BFLOAT16)[0] is machine.varlen


def test_the_measured_peak_counts_every_product(monkeypatch):
    """A clock that a product moves by 1 ms, and a wait by another: 10 products in 11 ms at most."""
    now = [0.0]

    class Square:
        def __matmul__(self, other):
            now[0] += 1e-3

    def wait(device):
        now[0] += 1e-3

    sizes = []
    monkeypatch.setattr(torch, "randn", lambda *size, **_: sizes.append(size) or Square())
    monkeypatch.setattr(machine, "synchronize", wait)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    assert machine.measured_peak(CUDA, FLOAT32) == pytest.approx(10 * 2 * 8192**3 / 11e-3)
    assert machine.measured_peak(CUDA, FLOAT32, 2048) == pytest.approx(10 * 2 * 2048**3 / 11e-3)
    assert machine.measured_peak(torch.device("cpu"), FLOAT32) == pytest.approx(2048**3 / 1e-3)
    assert sizes == [(8192, 8192), (2048, 2048), (2048, 2048)]


def test_the_peak_of_a_card_is_that_of_the_longest_name_that_fits(card, monkeypatch):
    monkeypatch.setattr(machine, "measured_peak", lambda device, dtype: 1.5e12)
    peaks = []
    for name in ("NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090 Laptop GPU", "Some Card 9000",
                 "AMD Instinct MI250X", "AMD Instinct MI300X", "NVIDIA RTX A1000"):
        card(name=name)
        peaks.append(machine.peak_flops(CUDA, torch.bfloat16))
    assert peaks == [756e12, 1.5e12, 1.5e12, 191.5e12, 1307.4e12, 1.5e12]


def flash_like(q, k, v, window):
    """Takes what the flash kernels take."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.shape == k.shape == v.shape
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    return machine.sdpa(q, k, v, q.size(1))


def fake_model(h, device):
    with torch.device(device):
        model = train.GPT(h, 128, torch.bfloat16, flash_like, True)
    model.init_weights()
    return model


@pytest.mark.parametrize("name", ["climbmix", "tinystories"])
def test_shapes_and_dtypes_of_a_step_on_cuda(name):
    """
    Forward with loss and optimizer step on fake CUDA tensors; the backward pass, which wants a
    driver there, on fake CPU tensors. Matmuls, keys and values are in bfloat16; weights, gradients,
    states, logits and loss in float32.
    """
    h = recipe(name, depth=2)
    with FakeTensorMode():
        model = fake_model(h, "cuda")
        ids = torch.zeros(2, 128, dtype=torch.int64, device="cuda")
        logits = model(ids)
        assert logits.shape == (2, 128, h.vocab_size)
        assert logits.dtype == torch.float32 and logits.device.type == "cuda"
        optimizer = train.make_optimizer(model, h)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        train.set_schedule(optimizer, h, 0, 0.0)
        optimizer.step()
        for state in optimizer.state.values():
            assert all(t.dtype == torch.float32 and t.device.type == "cuda" for t in state.values())

        model = fake_model(h, "cpu")
        loss = model(ids.cpu(), ids.cpu())
        assert loss.shape == () and loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.shape == p.shape
                   for p in model.parameters())
        train.make_optimizer(model, h).step()


class SlowBuffer(torch.Tensor):
    """Pinned memory whose copy is made late: when an event recorded after it is waited for."""
    pending = []

    def to(self, device, non_blocking):
        assert non_blocking
        copied = torch.zeros(self.shape, dtype=self.dtype)
        self.pending.append((self.as_subclass(torch.Tensor), copied))
        return copied


class Event:
    """torch.cuda.Event, for SlowBuffer."""

    def record(self):
        self.copies, SlowBuffer.pending = list(SlowBuffer.pending), []

    def synchronize(self):
        for buffer, copied in self.__dict__.pop("copies", []):
            copied.copy_(buffer)


def test_no_pinned_buffer_is_rewritten_while_its_copy_is_under_way(monkeypatch):
    """All copies as late as they may be; each batch must still be what a CPU gets."""
    def batches(device):
        stage = prepare.stager(device, 511, (2, 257))
        return [stage(np.full((2, 257), number)) for number in range(6)]

    expected = [x.clone() for x, _ in batches(torch.device("cpu"))]
    empty, events = torch.empty, []

    def slow_empty(*size, pin_memory, **more):
        return empty(*size, **more).as_subclass(SlowBuffer)

    def new_event():
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(torch, "empty", slow_empty)
    monkeypatch.setattr(torch.cuda, "Event", new_event)
    found = batches(types.SimpleNamespace(type="cuda"))
    for event in events:
        event.synchronize()
    assert [int(x[0, 0]) for x, _ in found] == [int(x[0, 0]) for x in expected] == list(range(6))


def failing(error):
    """What torch.compile would make of a function, on a machine where its first call fails."""
    def call(*arguments):
        raise error
    return lambda function, dynamic: call


def test_a_card_that_triton_does_not_serve_runs_eager_and_says_so_once(monkeypatch, capsys):
    card = types.SimpleNamespace(name="GTX 1080", major=6, minor=1)
    monkeypatch.setattr(torch, "compile", failing(GPUTooOldForTriton(card, None)))
    double = machine.compiled(lambda x: 2 * x)
    assert (double(3), double(4)) == (6, 8)
    assert capsys.readouterr().out.count("runs eager (GPUTooOldForTriton)") == 1


def test_without_a_compiler_it_runs_eager_and_says_why(monkeypatch, capsys):
    from torch._inductor import config
    monkeypatch.setitem(machine.chosen, "compiled", True)
    double = machine.compiled(lambda x: 2 * x)
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert (double(3), double(4)) == (6, 8)
    assert capsys.readouterr().out.count("runs eager (no C++ compiler)") == 1
    assert machine.chosen["compiled"] is False

    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)    # so on Windows
    assert "no Triton" in machine.no_compiler(CUDA)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    assert machine.no_compiler(CUDA) == ""


def test_memory_that_ends_while_compiling_is_not_taken_for_a_missing_compiler(monkeypatch):
    error = BackendCompilerFailed(len, torch.OutOfMemoryError("CUDA out of memory"), None)
    monkeypatch.setattr(torch, "compile", failing(error))
    with pytest.raises(BackendCompilerFailed, match="out of memory"):
        machine.compiled(len)([])


def test_a_module_is_compiled_in_training_and_eager_in_evaluation(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *_: calls.append(1))

    class Module(torch.nn.Module):
        @machine.compiled
        def forward(self, x):
            return x

    module = Module()
    assert module(3) is None and calls == [1]
    assert module.eval()(3) == 3 and calls == [1]


def test_eager_on_mps_is_said(monkeypatch, capsys):
    monkeypatch.setattr(machine, "default_device", lambda: torch.device("mps"))
    assert machine.start_compiler(len) is len
    assert "eager (not on MPS)" in capsys.readouterr().out


def test_compiled_on_leaves_other_devices_alone():
    double = lambda x: 2 * x        # noqa: E731
    assert machine.compiled_on("cuda")(double) is double
    assert machine.compiled_on("cpu")(double).__wrapped__ is double


def test_the_log_reads_a_loss_that_is_done_and_waits_for_nothing_later(monkeypatch):
    """A copy that arrives when its event is waited for, as on CUDA it may."""
    class Loss:
        device, value = CUDA, 2.5

        def to(self, device, non_blocking):
            assert device == "cpu" and non_blocking
            self.copy = torch.zeros(())
            return self.copy

    class LossEvent(Event):
        def synchronize(self):
            loss.copy.fill_(loss.value)

    events, loss = [None], Loss()
    monkeypatch.setattr(torch.cuda, "Event", lambda: events.append(LossEvent()) or events[-1])
    read = machine.read_later(loss)
    assert loss.copy.item() == 0            # nothing has been waited for
    assert read() == 2.5
    assert machine.read_later(torch.tensor(1.5))() == 1.5


def test_the_kernel_of_the_hub_is_fetched_once(card, monkeypatch, tmp_path, capsys):
    card()
    asked = []
    monkeypatch.setattr(prepare, "CACHE", tmp_path)
    monkeypatch.setattr(prepare, "default_device", lambda: CUDA)

    def fetch(folder, error=None):
        asked.append(folder)
        if error:
            raise error

    monkeypatch.setattr(machine, "fetch_flash3", partial(fetch, error=OSError("no network")))
    prepare.fetch_kernel()
    assert "(no network): training takes another" in capsys.readouterr().out
    monkeypatch.setattr(machine, "fetch_flash3", fetch)
    prepare.fetch_kernel()
    assert asked == 2 * [tmp_path / "flash3"]
    monkeypatch.setattr(machine, "flash3_folder", tmp_path)
    prepare.fetch_kernel()
    card((8, 0), "A100")
    monkeypatch.setattr(machine, "flash3_folder", None)
    prepare.fetch_kernel()
    assert len(asked) == 2


def test_the_kernel_is_copied_at_one_commit_and_found_by_the_next_run(monkeypatch, tmp_path):
    branches = [types.SimpleNamespace(name=name, target_commit=commit)
                for name, commit in (("main", "a"), ("v1", "c0ffee"), ("v2", "b"))]

    class Hub:
        def list_repo_refs(self, repo, repo_type):
            assert (repo, repo_type) == ("kernels-community/flash-attn3", "kernel")
            return types.SimpleNamespace(branches=branches)

    blob = tmp_path / "blob"
    blob.write_text("code")
    variant = tmp_path / "snapshot" / "torch-stable-abi29-cu130"
    variant.mkdir(parents=True)
    (variant / "__init__.py").symlink_to(blob)          # as the hub's cache has them

    def install(repo, revision):
        assert revision == "c0ffee"
        return variant

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(kernels, "install_kernel", install)
    cache = tmp_path / "cache"
    machine.fetch_flash3(cache / "flash3")
    code = "import machine, prepare; print(machine.flash3_folder)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                           env=os.environ | {"AUTORESEARCH_CACHE_DIR": str(cache)}).stdout
    copy = cache / "flash3" / "c0ffee" / variant.name
    assert found == f"{copy}\n"
    blob.unlink()
    assert (copy / "__init__.py").read_text() == "code"


def test_a_copy_of_a_model_loads_the_kernel_itself(hub, monkeypatch):
    """Pickled as verify.py's copies are: by the name of machine.flash3 alone."""
    hub()
    q, k, v = qkv()
    attend = cloudpickle.loads(cloudpickle.dumps(machine.flash3))
    assert attend is machine.flash3
    assert_close(attend(q, k, v, 8), dense_attention(q, k, v, 8))


DRIVER = "#!/bin/sh\necho 470.82.01\n"


@pytest.mark.parametrize("command", ["prepare.py", "train.py"])
def test_a_driver_too_old_is_said_before_anything_trains_on_the_cpu(command, tmp_path):
    (tmp_path / "nvidia-smi").write_text(DRIVER)
    (tmp_path / "nvidia-smi").chmod(0o755)
    more = {"AUTORESEARCH_CACHE_DIR": tmp_path / "cache"} if command == "prepare.py" else {}
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = program(command, PATH=path, AUTORESEARCH_DEVICE="", **more)
    assert result.returncode == 1 and "Traceback" not in result.stdout, result.stdout
    assert "driver 470.82.01" in result.stdout and "AUTORESEARCH_DEVICE=cpu" in result.stdout
    assert f"torch {torch.__version__}" in result.stdout and torch.version.cuda in result.stdout


@pytest.mark.parametrize("system,release,limited", [
    ("win32", "10", True), ("linux", "6.6.87.2-microsoft-standard-WSL2", True),
    ("linux", "6.18.0", False)])
def test_memory_that_would_spill_is_limited(system, release, limited, monkeypatch):
    fractions = []
    monkeypatch.setattr(machine.sys, "platform", system)
    monkeypatch.setattr(machine.platform, "release", lambda: release)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction",
                        lambda fraction, device: fractions.append(fraction))
    machine.keep_off_system_memory(CUDA)
    machine.keep_off_system_memory(torch.device("cpu"))
    assert fractions == ([0.95 * 6 / 8] if limited else [])


@pytest.mark.parametrize("hidden,cuda,sentence", [
    (None, None, "this torch is a build for CPUs. Install another: uv pip install"),
    ("", "13.0", "CUDA_VISIBLE_DEVICES hides it. Unset that"),
    ("-1", "13.0", "CUDA_VISIBLE_DEVICES hides it. Unset that"),
    (None, "13.0", "its driver 470.82.01 is probably too old. Update it")])
def test_why_torch_does_not_see_the_gpu(hidden, cuda, sentence, monkeypatch):
    monkeypatch.setattr(machine, "unused_driver", lambda: "470.82.01")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("AUTORESEARCH_DEVICE")
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with pytest.raises(SystemExit, match=sentence):
        machine.default_device()


@pytest.mark.parametrize("capability,hip,refused", [
    ((6, 1), None, True), ((7, 0), None, True), ((7, 5), None, False), ((9, 0), None, False),
    ((12, 1), None, False), ((6, 1), "7.1", False)])
def test_a_card_that_this_torch_has_no_code_for_is_refused(capability, hip, refused, card,
                                                           monkeypatch):
    card(capability, "GeForce GTX 1080")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    built = ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setenv("AUTORESEARCH_DEVICE", "cuda")
    if not refused:
        assert machine.default_device().type == "cuda"
        return
    with pytest.raises(SystemExit) as error:
        machine.default_device()
    words = str(error.value)
    assert f"GTX 1080, which has compute capability {capability[0]}.{capability[1]}" in words
    assert "its oldest is 7.5" in words and "--torch-backend=cu126" in words
    monkeypatch.setenv("AUTORESEARCH_DEVICE", "cpu")
    assert machine.default_device().type == "cpu"


def test_an_amd_driver_that_torch_was_not_built_for_is_mentioned_once(monkeypatch, capsys):
    machine.mention_amd.cache_clear()
    monkeypatch.setattr(machine.os.path, "exists", lambda path: path == "/dev/kfd")
    monkeypatch.setattr(machine, "unused_driver", lambda: "")
    monkeypatch.delenv("AUTORESEARCH_DEVICE")
    for _ in range(2):
        assert machine.default_device().type == "cpu"
    assert capsys.readouterr().out.count("--torch-backend=auto torch==") == 1
    machine.mention_amd.cache_clear()


def test_a_driver_without_a_gpu_is_none(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert machine.unused_driver() == ""


def test_the_device_names_the_chip_of_a_mac(monkeypatch, tmp_path):
    script = "#!/bin/sh\n[ $2 = machdep.cpu.brand_string ] && echo Apple M4"
    (tmp_path / "sysctl").write_text(script)
    (tmp_path / "sysctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(referee.sys, "platform", "darwin")
    monkeypatch.setattr(referee.Path, "read_text", lambda path: "")
    assert referee.processor() == f"Apple M4, {os.cpu_count()} cores"


def test_the_device_tells_processor_generations_apart(monkeypatch):
    def name(cpuinfo):
        monkeypatch.setattr(referee.Path, "read_text", lambda path: cpuinfo)
        return referee.processor()

    epyc = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n\n"
    assert name(epyc.format(1)).startswith("AMD EPYC, family 25 model 1, ")         # Zen 3
    assert name(epyc.format(17)).startswith("AMD EPYC, family 25 model 17, ")       # Zen 4
    unknown = platform.processor() or platform.machine()
    assert name("processor\t: 0\nBogoMIPS\t: 50.00\n") == f"{unknown}, {os.cpu_count()} cores"


@pytest.mark.parametrize("gib,most", [(3, 2 ** 26), (70, 2 ** 28)])
def test_the_tokens_evaluated_at_once_follow_from_free_memory(gib, most, monkeypatch):
    """A sixteenth for float32 logits: with three more tensors of their size, a quarter."""
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
    monkeypatch.setattr(torch.cuda, "mem_get_info",
                        lambda device: (freed and gib * 2 ** 30, 80 * 2 ** 30))
    logits = 4 * 8192 * machine.evaluation_positions(CUDA, 8192)
    assert logits <= gib * 2 ** 30 / 16 and logits <= 4 * most
    assert machine.evaluation_positions(torch.device("cpu"), 4096) == 1024
