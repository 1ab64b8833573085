"""What the GPU paths do, as far as a CPU can tell: every choice of attention, memory, shapes and dtypes on fake CUDA tensors."""

import io
import json
import os
import platform
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import GPUTooOldForTriton
from torch._subclasses.fake_tensor import FakeTensorMode

import prepare
import referee
import train
from children import ROOT, program
from test_model import dense_attention, qkv
from test_optimizer import small_model

CUDA = torch.device("cuda", 0)

# A stand-in for FlashAttention with the meaning of its arguments written out as a mask. FAIL is put in its place by some tests.
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
    """torch's varlen_attn by its documentation: sequences between the ends, window (left, 0) or (-1, 0)."""
    left, right = window_size
    assert right == 0 and (ends_q == ends_k).all() and ends_q.dtype == torch.int32
    pieces = [dense_attention(*(t[a:b][None] for t in (q, k, v)), left + 1 if left >= 0 else max_q)[0]
              for a, b in zip(ends_q[:-1], ends_q[1:])]
    return torch.cat(pieces)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(fail): a local kernel in the place of the hub's, which does `fail` when it is called; without it there is no network."""
    def hub(fail="pass"):
        for variant, backend in (("torch-universal", "cpu"), ("torch-cuda", "cuda")):
            build = tmp_path / "build" / variant
            build.mkdir(parents=True)
            (build / "__init__.py").write_text(STUB.format(fail=fail))
            (build / "metadata.json").write_text(json.dumps({
                "name": "flash-attn3", "id": f"stub_{variant}", "version": 1, "license": "MIT", "python-depends": [],
                "backend": {"type": backend}}))
        monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/flash-attn3={tmp_path}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    return hub


@pytest.fixture
def card(monkeypatch):
    """card(capability, gib, name): a CUDA GPU as far as the questions go that are asked about it."""
    def card(capability=(9, 0), gib=80, name="NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: types.SimpleNamespace(total_memory=gib * 2**30))
    return card


@pytest.mark.parametrize("window", [8, 24])
def test_flash3_is_the_dense_attention(hub, window):
    hub()
    q, k, v = qkv()
    torch.testing.assert_close(train.flash3()(q, k, v, window), dense_attention(q, k, v, window), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [8, 24])
def test_varlen_is_the_dense_attention(monkeypatch, window):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", reference_varlen)
    q, k, v = qkv()
    torch.testing.assert_close(train.varlen(q, k, v, window), dense_attention(q, k, v, window), atol=1e-5, rtol=1e-4)


def choose(monkeypatch):
    """choose_attention on a CUDA device, its trial on the CPU, in float32."""
    randn = torch.randn
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *size, device, dtype, **more: randn(*size, **more))
        return train.choose_attention(CUDA)


def broken(*_, **__):
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize("capability,local,varlen,chosen,says", [
    ((9, 0), "pass", reference_varlen, "FlashAttention-3", ""),
    ((9, 0), None, reference_varlen, "varlen_attn", "no FlashAttention-3 here (ValueError: "),     # no network
    ((9, 0), "raise RuntimeError('illegal instruction')", reference_varlen, "varlen_attn", "no FlashAttention-3 here (RuntimeError: illegal"),
    ((9, 0), "raise RuntimeError()", reference_varlen, "varlen_attn", "no FlashAttention-3 here (RuntimeError: no reason given)"),
    ((9, 0), None, broken, "scaled_dot_product_attention", "no varlen_attn here (RuntimeError: no kernel image"),
    ((8, 0), "pass", reference_varlen, "varlen_attn", ""),                              # A100: no FlashAttention-3 even if it is there
    ((8, 9), None, reference_varlen, "varlen_attn", ""),
    ((12, 0), None, reference_varlen, "varlen_attn", ""),
    ((12, 0), None, broken, "scaled_dot_product_attention (CUDA capability 12.0)", "no varlen_attn here"),
    ((7, 5), "pass", reference_varlen, "scaled_dot_product_attention (CUDA capability 7.5)", "")])
def test_every_choice_of_attention(capability, local, varlen, chosen, says, hub, card, monkeypatch, capsys):
    card(capability)
    if local:
        hub(local)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    attend, skips = choose(monkeypatch)
    printed = capsys.readouterr().out
    assert f"attention: {chosen}" in printed and says in printed
    assert printed.count("\n") == 1 + printed.count("here (") and skips == ("scaled_dot" not in chosen)
    q, k, v = qkv()
    window = 8 if skips else 24                         # sliding windows only where the kernel skips what they leave out
    torch.testing.assert_close(attend(q, k, v, window), dense_attention(q, k, v, window), atol=1e-5, rtol=1e-4)


def test_attention_without_cuda(capsys):
    assert train.choose_attention(torch.device("mps")) == (train.sdpa, False)
    assert "scaled_dot_product_attention (on mps)" in capsys.readouterr().out
    assert train.choose_attention(torch.device("cpu")) == (train.blockwise, True)
    assert "blockwise" in capsys.readouterr().out


@pytest.mark.parametrize("device,capability,dtype", [
    ("cuda", (8, 0), torch.bfloat16), ("cuda", (12, 1), torch.bfloat16), ("cuda", (7, 5), torch.float32), ("mps", None, torch.float32)])
def test_precision(device, capability, dtype, card):
    card(capability)
    assert train.compute_dtype(torch.device(device)) == dtype


@pytest.mark.parametrize("bfloat16,dtype", [(350e9, torch.bfloat16), (170e9, torch.float32), (3e9, torch.float32)])
def test_precision_of_a_cpu_is_the_faster_one(bfloat16, dtype, monkeypatch):
    monkeypatch.setattr(train, "measured_peak", lambda device, dtype, size: bfloat16 if dtype == torch.bfloat16 else 150e9)
    assert train.compute_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize("recipe,context", [("climbmix", 2048), ("tinystories", 512)])
@pytest.mark.parametrize("gib", [79, 47, 23.6, 15.7, 11.8, 7.8])
def test_the_micro_batch_fits_the_card_and_the_batch_stays(recipe, context, gib, card, capsys):
    card(gib=gib)
    h, full = train.hyperparameters(recipe), train.hyperparameters(recipe)
    train.fit_memory(h, context, CUDA, torch.bfloat16)
    need = train.bytes_needed(h, context, torch.bfloat16)
    assert need < 0.8 * gib * 2**30 and h.device_rows * h.accumulate == full.device_rows * full.accumulate
    assert f"memory: {h.device_rows} rows at once, {h.accumulate} times a step, need about {need / 2**30:.1f} of" in capsys.readouterr().out
    twice = types.SimpleNamespace(**vars(h) | {"device_rows": 2 * h.device_rows})
    assert h.device_rows == full.device_rows or train.bytes_needed(twice, context, torch.bfloat16) > 0.8 * gib * 2**30


def test_the_estimate_of_memory_is_above_what_others_measured():
    """45 GB at depth 8, 128 rows of 2,048 (recipe of the field's first script), its logits of 4 + 4 + 2 bytes whole."""
    h = train.hyperparameters("climbmix")
    h.depth, h.width = 8, 512
    logits = 128 * 2048 * 8192 * 10
    assert train.bytes_needed(h, 2048, torch.bfloat16) > 45e9 - logits


def test_out_of_memory_in_warmup_halves_the_rows(run, capsys):
    """And leaves weights, optimizer and batch as they were; with one row left it is an error."""
    model, h = small_model(vocab_size=512, bigram_rows=0)
    h.device_rows, h.accumulate = 8, 1
    optimizer = train.make_optimizer(model, h, torch.float32)
    before, forward = [p.clone() for p in model.parameters()], train.GPT.forward

    def small_card(ids, targets):
        loss = forward(model, ids[:, :32], targets[:, :32])
        if len(ids) > 2:
            raise torch.OutOfMemoryError("Tried to allocate 7 GiB")
        return loss

    model.forward = small_card
    train.warm_up(run, h, model, optimizer)
    assert (h.device_rows, h.accumulate) == (2, 4) and "2 rows at once, 4 times a step" in capsys.readouterr().out
    assert not optimizer.state and all((a == b).all() for a, b in zip(before, model.parameters()))
    model.forward = lambda ids, targets: small_card(torch.cat([ids] * 3), torch.cat([targets] * 3))
    with pytest.raises(torch.OutOfMemoryError):
        train.warm_up(run, h, model, optimizer)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model, h = small_model(bigram_rows=0)
    ids, targets = torch.randint(0, 63, (8, 32)), torch.randint(0, 63, (8, 32))
    gradients = []
    for number in (1, 4):
        model.zero_grad()
        for x, y in zip(ids.chunk(number), targets.chunk(number)):
            (model(x, y) / number).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for whole, parts in zip(*gradients):
        torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-4)


def test_chunks_of_logits_change_nothing(monkeypatch):
    model, _ = small_model(bigram_rows=0)
    ids, targets = torch.randint(0, 63, (8, 32)), torch.randint(-1, 63, (8, 32))
    results = []
    for elements in (2 ** 30, 2 ** 10):
        monkeypatch.setattr(train, "CHUNK_LOGITS", {"cpu": elements})
        model.zero_grad()
        model(ids, targets).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for whole, chunks in zip(*results):
        torch.testing.assert_close(whole, chunks, atol=1e-6, rtol=1e-4)


def fake_model(recipe, device, attend):
    h = train.hyperparameters(recipe)
    h.depth = 2
    with torch.device(device):
        model = train.GPT(h, 128, torch.bfloat16, attend, True)
    model.init_weights()
    return model, h


def flash_like(q, k, v, window):
    """Takes what the flash kernels take."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.shape == k.shape == v.shape
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    return train.sdpa(q, k, v, q.size(1))


@pytest.mark.parametrize("recipe", ["climbmix", "tinystories"])
def test_shapes_and_dtypes_of_a_step_on_cuda(recipe):
    """
    Forward with loss and optimizer step on fake CUDA tensors, the backward pass, which wants a driver there, on fake
    CPU tensors. Products, keys and values in bfloat16; weights, gradients, states, logits and loss in float32.
    """
    with FakeTensorMode():
        model, h = fake_model(recipe, "cuda", flash_like)
        ids = torch.zeros(2, 128, dtype=torch.int64, device="cuda")
        logits = model(ids)
        assert logits.shape == (2, 128, h.vocab_size) and logits.dtype == torch.float32 and logits.device.type == "cuda"
        loss = model(ids, ids)
        assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "cuda"
        optimizer = train.make_optimizer(model, h, torch.bfloat16)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        train.schedule(optimizer, h, 0, 0.0)
        optimizer.step()
        states = {(name, t.dtype, t.device.type) for state in optimizer.state.values() for name, t in state.items()}
        assert states == {(name, torch.float32, "cuda") for name in ("m", "v", "step")}

        model, h = fake_model(recipe, "cpu", flash_like)
        model(ids.cpu(), ids.cpu()).backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.shape == p.shape for p in model.parameters())
        train.make_optimizer(model, h, torch.bfloat16).step()


@pytest.mark.parametrize("name,peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2e12), ("NVIDIA GeForce RTX 3060", 25.5e12),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503e12), ("NVIDIA GB10", 125e12)])
def test_peak_of_a_known_card(name, peak, card):
    card(name=name)
    assert train.peak_flops(CUDA, torch.bfloat16) == peak


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "Some Card 9000"])
def test_peak_of_another_card_is_measured(name, card, monkeypatch):
    card(name=name)
    monkeypatch.setattr(train, "measured_peak", lambda device, dtype: 1.5e12)
    assert train.peak_flops(CUDA, torch.bfloat16) == 1.5e12


def test_flops_count_a_window_by_the_keys_that_it_leaves():
    model, h = small_model(depth=2, windows="S", short_window=4, bigram_rows=0)
    windowed = train.GPT(h, 32, torch.float32, dense_attention, True)
    keys = sum(min(t + 1, 4) for t in range(32)) / 32
    assert model.flops_per_token(32) - windowed.flops_per_token(32) == pytest.approx(12 * 64 * (16.5 - keys))


class SlowBuffer(torch.Tensor):
    """Pinned memory whose copy to the device is made late: when an event recorded after it is waited for."""
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
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **more: empty(*size, **more).as_subclass(SlowBuffer))
    monkeypatch.setattr(torch.cuda, "Event", lambda: events.append(Event()) or events[-1])
    found = batches(types.SimpleNamespace(type="cuda"))
    for event in events:
        event.synchronize()
    assert [int(x[0, 0]) for x, _ in found] == [int(x[0, 0]) for x in expected] == list(range(6))


def test_compiled_kernels_are_not_chosen_by_timing_them(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(torch._inductor.config, "deterministic", False)
    train.choose_compiler(torch.device("cpu"))
    assert torch._inductor.config.deterministic and capsys.readouterr().out == ""


def failing(error):
    """What torch.compile would make of a function, on a machine where its first call fails."""
    def call(*arguments):
        raise error
    return lambda function, dynamic: call


def test_a_card_that_triton_does_not_serve_runs_eager_and_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", failing(GPUTooOldForTriton(types.SimpleNamespace(name="GTX 1080", major=6, minor=1), None)))
    double = train.Compiled(lambda x: 2 * x)
    assert (double(3), double(4)) == (6, 8)
    assert capsys.readouterr().out.count("runs eager (GPUTooOldForTriton)") == 1


def test_memory_that_ends_while_compiling_is_not_taken_for_a_missing_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", failing(BackendCompilerFailed(len, torch.OutOfMemoryError("CUDA out of memory"), None)))
    with pytest.raises(BackendCompilerFailed, match="out of memory"):
        train.Compiled(len)([])


def test_the_header_that_a_thread_compiles_is_that_of_the_kernels(tmp_path):
    """In a child, where no header is there yet: one is made, not one by the thread and one by the kernel."""
    code = """if True:
        import threading, torch, train
        compiled = train.choose_compiler(torch.device("cpu"))
        print(compiled(lambda x: x * 2 + 1)(torch.ones(64)).sum().item())
        for thread in threading.enumerate():
            if thread.name.endswith("(run)"):
                thread.join()
    """
    environment = os.environ | {"TMPDIR": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "kernels")}
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert output.stdout == "192.0\n", output.stderr
    assert len(list(tmp_path.rglob("precompiled_headers/*.gch"))) == 1


def test_eager_on_mps_is_said(capsys):
    assert train.choose_compiler(torch.device("mps"))(len) is len
    assert capsys.readouterr().out == "compile: eager (not on MPS)\n"


DRIVER = "#!/bin/sh\necho 470.82.01\n"


@pytest.mark.parametrize("command", ["prepare.py", "train.py"])
def test_a_driver_too_old_is_said_before_anything_trains_on_the_cpu(command, tmp_path):
    (tmp_path / "nvidia-smi").write_text(DRIVER)
    (tmp_path / "nvidia-smi").chmod(0o755)
    more = {"AUTORESEARCH_CACHE_DIR": tmp_path / "cache"} if command == "prepare.py" else {}
    result = program(command, PATH=f"{tmp_path}:{os.environ['PATH']}", AUTORESEARCH_DEVICE="", **more)
    assert result.returncode == 1 and "Traceback" not in result.stdout, result.stdout
    for words in ("driver 470.82.01", f"torch {torch.__version__}", str(torch.version.cuda), "AUTORESEARCH_DEVICE=cpu"):
        assert words in result.stdout


def test_a_driver_without_a_gpu_is_none(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert prepare.unused_driver() == ""


def test_the_device_tells_processor_generations_apart(monkeypatch):
    def name(cpuinfo):
        monkeypatch.setattr(referee, "open", lambda *_: io.StringIO(cpuinfo), raising=False)
        return referee.processor()

    zen3, zen4 = ("".join(f"processor\t: {core}\ncpu family\t: 25\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n\n" for core in (0, 1))
                  for model in (1, 17))
    assert name(zen3).startswith("AMD EPYC, family 25 model 1, ")
    assert name(zen4).startswith("AMD EPYC, family 25 model 17, ")
    assert name("processor\t: 0\nBogoMIPS\t: 50.00\n") == f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


@pytest.mark.parametrize("gib,most", [(3, 2 ** 26), (70, 2 ** 28)])
def test_the_tokens_evaluated_at_once_follow_from_free_memory(gib, most, monkeypatch):
    """Float32 logits and three more tensors of their size, in a quarter of what is free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gib * 2 ** 30, 80 * 2 ** 30))
    logits = 4 * 8192 * prepare.evaluation_positions(CUDA, 8192)
    assert logits <= gib * 2 ** 30 / 16 and logits <= 4 * most
    assert prepare.evaluation_positions(torch.device("cpu"), 4096) == 1024
