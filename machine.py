"""
What this machine can do: device, precision, attention kernel, compiler, memory.

Nobody edits it during research. It decides how fast a model learns and, by precision, windows of
the attention kernel, and has_matrix_unit, also which model: compare runs of one machine only.
"""

import ctypes
import functools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time

import psutil
import torch
import torch.nn.functional as F

# Logits computed at once, 4 bytes each. On a CPU they fit the cache.
CHUNK_LOGITS = {"cpu": 2**22, "mps": 2**24, "cuda": 2**27}

# What a run was made with, for its journal line: runs with different kernels do not compare.
chosen = {"attention": "train.py's own", "compiled": True, "dtype": None}

# ------------------------------------------------------------------------------------------------
# Device

# --no-config: torch's own index names no dates, which exclude-newer in pyproject.toml asks for.
INSTALL_TORCH = ("uv pip install --no-config --reinstall-package torch --torch-backend={} "
                 "torch==" + torch.__version__.split("+")[0])


def unused_driver():
    """The version of an NVIDIA driver whose GPU torch does not see; empty where there is none."""
    if torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    query = subprocess.run(command, text=True, capture_output=True)
    return query.stdout.split("\n")[0].strip() if query.returncode == 0 else ""


def no_code():
    """Why this torch has no code for the NVIDIA GPU that it sees; empty if it has."""
    if torch.version.hip:
        return ""
    capability = torch.cuda.get_device_capability()
    built = [name.removeprefix("sm_").rstrip("af") for name in torch.cuda.get_arch_list()
             if name.startswith("sm_")]
    oldest = min(map(int, built), default=0)
    if 10 * capability[0] + capability[1] >= oldest:
        return ""
    return (f"torch {torch.__version__} has no code for {torch.cuda.get_device_name()}, which has "
            f"compute capability {capability[0]}.{capability[1]}; its oldest is "
            f"{oldest // 10}.{oldest % 10}. The build for CUDA 12.6 has it (pytorch#172352): "
            f"{INSTALL_TORCH.format('cu126')}, and export UV_NO_SYNC=1; or train on the CPU: "
            "AUTORESEARCH_DEVICE=cpu")


@functools.cache        # so that it is said once
def mention_amd():
    """Say so if the machine may have an AMD GPU that this torch, built for CUDA, can't use."""
    if not torch.version.hip and os.path.exists("/dev/kfd"):
        print("device: there is an AMD driver here (/dev/kfd), but this torch is not built for "
              f"ROCm. For that: {INSTALL_TORCH.format('auto')}, and export UV_NO_SYNC=1")


def default_device():
    """The torch device to train on: AUTORESEARCH_DEVICE, or the best one available."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    wanted = os.environ.get("AUTORESEARCH_DEVICE")
    if not wanted and (driver := unused_driver()):
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            reason = "CUDA_VISIBLE_DEVICES hides it. Unset that"
        elif torch.version.cuda:
            reason = f"its driver {driver} is probably too old. Update it"
        else:
            reason = ("this torch is a build for CPUs. Install another: "
                      f"{INSTALL_TORCH.format('auto')}, and export UV_NO_SYNC=1")
        sys.exit(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, does not see "
                 f"this machine's NVIDIA GPU: {reason}, "
                 "or train on the CPU: AUTORESEARCH_DEVICE=cpu")
    if wanted in (None, "", "cuda") and available[0] == "cuda" and (sentence := no_code()):
        sys.exit(sentence)
    if not wanted and available == ["cpu"]:
        mention_amd()
    if wanted and wanted not in available:
        sys.exit(f"AUTORESEARCH_DEVICE: device {wanted!r} is not available; "
                 f"available: {', '.join(available)}")
    return torch.device(wanted or available[0])


def synchronize(device):
    """Wait until the device has finished all work queued on it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def read_later(x):
    """
    A function that returns the number in x, a tensor (). On CUDA it waits for x but for nothing
    that was queued after it, as float(x) would.
    """
    if x.device.type != "cuda":
        return lambda: float(x)
    copy = x.to("cpu", non_blocking=True)       # into pinned memory
    copied = torch.cuda.Event()
    copied.record()

    def read():
        copied.synchronize()
        return float(copy)
    return read

# ------------------------------------------------------------------------------------------------
# Memory

def keep_freed_memory():
    """
    Tell glibc, where it is the C library, to keep freed memory. By default it returns large blocks
    to the system, and every step page-faults them in again (dev/log.md).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-1, 2**31 - 1)      # M_TRIM_THRESHOLD
        mallopt(-3, 2**25)          # M_MMAP_THRESHOLD, the highest value that every glibc accepts


def keep_off_system_memory(device):
    """
    On Windows and WSL2 the driver moves what does not fit a card to the machine's memory, and
    every step crawls: let torch raise instead, as on Linux (NVIDIA, "CUDA Sysmem Fallback Policy").
    """
    if device.type == "cuda" and (sys.platform == "win32" or "microsoft" in platform.release()):
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(0.95 * free / total, device)


def out_of_memory(error):
    """Whether the exception says that the device or the machine is out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def release_memory(device):
    """Drop what a failed trial left behind, compiled code for its shapes included."""
    torch._dynamo.reset()           # its limit of recompilations should not count them
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device):
    """Bytes: the device's peak on CUDA, what the driver holds on MPS, the process's peak on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):    # on Windows, which has no module resource
        return memory.peak_wset
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def evaluation_positions(device, vocab_size):
    """Tokens to evaluate at once; on a GPU their float32 logits take a 16th of what is free."""
    logits = CHUNK_LOGITS["cpu"]
    if device.type == "cuda":
        torch.cuda.empty_cache()        # what training has freed is still torch's until then
        logits = torch.cuda.mem_get_info(device)[0] // 64
    elif device.type == "mps":
        torch.mps.empty_cache()
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        logits = free // 64
    return max(1, min(logits, 2**28) // vocab_size)

# ------------------------------------------------------------------------------------------------
# Precision and peak

def measured_peak(device, dtype, size=None):
    """FLOP/s of square matmuls, at the best of eight times."""
    size = size or {"cuda": 8192, "mps": 4096, "cpu": 2048}[device.type]    # enough to fill it
    products = 1 if device.type == "cpu" else 10        # queued, so that no launch is waited for
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(products):
            a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 * products / best


def fastest_dtype(device):
    """
    The dtype for matmuls. bfloat16 on NVIDIA from Ampere on, float32 on MPS: in half precision
    torch's attention reads ahead there (pytorch#195910). Elsewhere 16 bits if they are clearly
    faster: some CPUs and AMD GPUs have no fast bfloat16, and Turing has tensor cores for float16.
    """
    if device.type == "mps":
        return torch.float32
    half = torch.bfloat16
    if device.type == "cuda" and not torch.version.hip:
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return half
        half = torch.float16
    size = 512 if device.type == "cpu" else 2048
    faster = measured_peak(device, half, size) > 1.2 * measured_peak(device, torch.float32, size)
    return half if faster else torch.float32


def compute_dtype(device):
    """fastest_dtype(), measured once: near its threshold a second answer could be another."""
    chosen["dtype"] = chosen["dtype"] or fastest_dtype(device)
    return chosen["dtype"]


def has_matrix_unit():
    """
    Whether matmuls have hardware of their own here: AMX, a GPU. There a wide model costs little. It
    is the machine that counts, not the device: sample.py builds on a CPU what a GPU has trained.
    """
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return gpu or torch.cpu.get_capabilities().get("amx_bf16", False)


# Dense bfloat16 FLOP/s with float32 accumulation, from the makers' data sheets. Keys: parts of
# names. An MI250X is two devices for torch.
PEAK_FLOPS = {
    "MI210": 181e12, "MI250": 181e12, "MI250X": 191.5e12, "MI300A": 980.6e12, "MI300X": 1307.4e12,
    "MI325X": 1307.4e12, "MI350X": 2306.9e12, "MI355X": 2516.6e12, "B300": 2250e12,
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "GB10": 125e12,
    "RTX PRO 6000": 503e12, "RTX 6000 Ada": 364e12, "RTX A6000": 155e12,
    "RTX 3060": 25.5e12, "RTX 3060 Ti": 32.4e12, "RTX 3070": 40.6e12, "RTX 3070 Ti": 43.5e12,
    "RTX 3080": 59.5e12, "RTX 3080 Ti": 68.2e12, "RTX 3090": 71e12, "RTX 3090 Ti": 80e12,
    "RTX 4060": 30.2e12, "RTX 4060 Ti": 44.1e12, "RTX 4070": 58.3e12, "RTX 4070 SUPER": 71e12,
    "RTX 4070 Ti": 80.2e12, "RTX 4070 Ti SUPER": 88.2e12, "RTX 4080": 97.5e12,
    "RTX 4080 SUPER": 104.4e12, "RTX 4090": 165.2e12, "RTX 5060": 38.4e12,
    "RTX 5060 Ti": 47.4e12, "RTX 5070": 61.7e12, "RTX 5070 Ti": 87.9e12, "RTX 5080": 112.6e12,
    "RTX 5090": 209.5e12,
}


def peak_flops(device, dtype):
    """FLOP/s of the device's matmuls: from the table, else (a CPU, a laptop's GPU) measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [part for part in PEAK_FLOPS if re.search(rf"{part}\b", name)]     # not A1000
        if known and "Laptop" not in name:
            return PEAK_FLOPS[max(known, key=len)]
    return measured_peak(device, dtype)

# ------------------------------------------------------------------------------------------------
# Attention, causal. q, k, v and the result: (B, T, heads, head_dim). window: keys that a query
# sees, its own included.

def sdpa(q, k, v, window):
    """torch's own. It does not skip what a window hides, so it only takes whole windows."""
    assert window >= q.size(1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Products(torch.autograd.Function):
    """q @ k.mT, with a gradient of k that is laid out like k: a matmul's own is transposed."""

    @staticmethod
    def forward(ctx, q, k):
        ctx.save_for_backward(q, k)
        return q @ k.mT

    @staticmethod
    def backward(ctx, gradient):
        q, k = ctx.saved_tensors
        return gradient @ k, gradient.mT @ q


def blockwise(q, k, v, window):
    """
    Plain matmuls, a block of queries at a time with the keys that it sees; compiled, the softmax
    is fused. torch's own kernel has a slow backward pass on a CPU: with this one a whole step is
    1.17 times as fast (dev/log.md).
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    T = q.size(2)
    size = max(128, T // 4)
    outputs = []
    for start in range(0, T, size):
        end = min(start + size, T)
        first = max(0, start + 1 - window)
        queries = torch.arange(start, end, dtype=torch.int32, device=q.device)[:, None]
        keys = torch.arange(first, end, dtype=torch.int32, device=q.device)
        hidden = keys > queries
        if window < end:
            hidden |= keys <= queries - window
        scores = Products.apply(q[:, :, start:end], k[:, :, first:end]).float() * q.size(-1) ** -0.5
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1).to(v.dtype)
        outputs.append(weights @ v[:, :, first:end])
    return torch.cat(outputs, dim=2).transpose(1, 2)


FLASH3, FLASH3_VERSION = "kernels-community/flash-attn3", 1
flash3_folder = None    # the copy of it that prepare.py has made; set by prepare.py
flash_attn_func = None  # its function, once load_flash3() has loaded it


def flash_window(T, window):
    """The window as flash kernels take it: keys to the left (-1: all of them) and to the right."""
    return (window - 1, 0) if window < T else (-1, 0)


def varlen(q, k, v, window):
    """FlashAttention-2 as torch carries it, from Ampere on; the sequences all have one length."""
    from torch.nn.attention.varlen import varlen_attn       # here, since it takes seconds to import
    B, T = q.shape[:2]
    ends = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    window_size = flash_window(T, window)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return varlen_attn(q, k, v, ends, ends, T, T, window_size=window_size).unflatten(0, (B, T))


def is_hopper(device):
    """Whether it is an H100, H200 or GH200. On ROCm the numbers mean other cards."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


def fetch_flash3(folder):
    """
    Download FlashAttention-3 for Hopper from the hub, where only trusted publishers count, and copy
    it to folder/COMMIT/VARIANT: a night has one kernel, and needs no network. Raises what the hub's
    libraries raise.
    """
    import kernels
    from huggingface_hub import HfApi
    refs = HfApi().list_repo_refs(FLASH3, repo_type="kernel")
    commits = {branch.name: branch.target_commit for branch in refs.branches}
    commit = commits[f"v{FLASH3_VERSION}"]
    variant = kernels.install_kernel(FLASH3, revision=commit)
    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(variant, part / variant.name)       # files, where the hub's cache has links
    part.rename(folder / commit)


def load_flash3():
    """Load the copy of FlashAttention-3 in flash3_folder. A RuntimeError if there is none."""
    global flash_attn_func
    if not flash3_folder:
        raise RuntimeError("not downloaded: uv run prepare.py")
    os.environ["HF_HUB_OFFLINE"] = "1"          # kernels would ask the hub at every start
    import kernels
    flash_attn_func = kernels.get_local_kernel(flash3_folder).flash_attn_func


def flash3(q, k, v, window):
    """FlashAttention-3, which a copy of a model (verify.py) is the first to call in its process."""
    if flash_attn_func is None:
        load_flash3()
    return flash_attn_func(q, k, v, causal=True, window_size=flash_window(q.size(1), window))


def try_attention(attend, device):
    """
    Compare with plain attention, gradients included, for a window and for all of the context. Some
    kernels fail at the first call; some ignore a window or return NaN. Raises whatever comes of it.
    """
    T = 256
    inputs = [torch.randn(2, T, 2, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
              for _ in range(3)]
    weight = torch.randn(2, T, 2, 128, device=device, dtype=torch.bfloat16)
    for window in 64, T:
        found, expected = (
            [output, *torch.autograd.grad(output, inputs, weight)]
            for output in (attend(*inputs, window), blockwise(*inputs, window)))
        for a, b in zip(found, expected):
            error = ((a - b).float().norm() / b.float().norm()).item()
            if not error < 0.05:        # of bfloat16: less than 0.01
                raise ValueError(f"with a window of {window} it is {error:.0%} off")


def choose_attention(device, dtype):
    """
    The fastest attention that works on this device for queries of this dtype, and whether a window
    makes it cheaper.
    """
    if device.type == "cpu":
        print("attention: blockwise, sliding windows")
        chosen["attention"] = "blockwise"
        return blockwise, True
    reason = f"{dtype} on {device.type}"
    if device.type == "cuda":
        reason = f"{dtype} on {torch.cuda.get_device_name(device)}"
    candidates = []
    if device.type == "cuda" and dtype == torch.bfloat16:
        if is_hopper(device):
            candidates.append(("FlashAttention-3", flash3))
        candidates.append(("varlen_attn", varlen))
    for name, attend in candidates:
        try:
            try_attention(attend, device)
            print(f"attention: {name}, sliding windows")
            chosen["attention"] = name
            return attend, True
        except Exception as error:      # no network, no build for this card, a kernel that fails
            words = str(error).splitlines() or ["no reason given"]
            print(f"attention: no {name} here ({type(error).__name__}: {words[0][:100]})")
    print(f"attention: scaled_dot_product_attention ({reason}), every layer over the whole context")
    chosen["attention"] = "scaled_dot_product_attention"
    return sdpa, False

# ------------------------------------------------------------------------------------------------
# Compiler

def no_compiler(device):
    """Why nothing can be compiled for this device; empty if it can."""
    from torch._inductor import cpp_builder
    from torch.utils._triton import has_triton
    if device.type == "mps":
        return "not on MPS"         # torch's compiler is not ready there
    if device.type == "cuda":
        return "" if has_triton() else "no Triton for this GPU here"
    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError:            # none, or on Windows one that does not speak English
        return "no C++ compiler"
    return ""


def start_compiler(function):
    """function through torch.compile, or the function itself where nothing can be compiled."""
    if reason := no_compiler(default_device()):
        return eager(function, reason)
    from torch._inductor import config
    # Choose no kernel by timing it, so that two runs use the same ones. On CUDA it costs time, and
    # attention adds gradients in any order there.
    config.deterministic = default_device().type == "cpu"
    config.cpp.vec_isa_ok = True        # trust the CPU's flags: trying them takes 12 s
    config.aot_inductor.enable_line_tables = False      # no line numbers for a debugger: 1 s less
    return torch.compile(function, dynamic=False)


def eager(function, reason):
    """The function, which is not compiled for that reason."""
    print(f"compile: {function.__qualname__} runs eager ({reason})")
    chosen["compiled"] = False
    return function


def compiled(function):
    """
    Decorator: compile the function at its first call. Where that does not work it runs eager, and
    one printed line says so; its backward pass is compiled later, where nothing catches a failure.
    A module in eval mode runs eager too: evaluation has rows of many lengths, and compiling for
    each takes longer than it saves.
    """
    call = None

    @functools.wraps(function)
    def wrapper(*arguments):
        nonlocal call
        if not getattr(arguments[0], "training", True):
            return function(*arguments)
        if call is None:
            call = start_compiler(function)
        try:
            return call(*arguments)
        except torch._dynamo.exc.ShortenTraceback as error:
            if out_of_memory(error):
                raise
            call = eager(function, type(getattr(error, "inner_exception", error)).__name__)
            return function(*arguments)
    return wrapper


def compiled_on(kind):
    """Decorator: compiled(), but on devices of this kind alone."""
    return compiled if default_device().type == kind else lambda function: function

# ------------------------------------------------------------------------------------------------
# Loss in chunks

def in_chunks(loss):
    """
    Decorator for loss(x, weight, targets, *settings), a sum over the rows of x (N, width) and
    targets (N,): takes it a chunk of rows at a time, and each chunk's gradients in the forward pass
    too. So the logits of the whole batch, by far its largest tensor, never exist at once: faster on
    a CPU (dev/log.md), and GiBs less on a GPU.
    """
    gradients_and_loss = compiled(torch.func.grad_and_value(loss, argnums=(0, 1)))

    class Chunks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, targets, *settings):
            ctx.settings = len(settings)
            chunks = 1
            while len(x) * len(weight) / chunks > CHUNK_LOGITS[x.device.type]:
                chunks *= 2
            total, x_gradients, weight_gradient = 0, [], torch.zeros_like(weight)
            for part, its_targets in zip(x.chunk(chunks), targets.chunk(chunks)):
                gradients, value = gradients_and_loss(part, weight, its_targets, *settings)
                total += value
                x_gradients.append(gradients[0])
                weight_gradient += gradients[1]
            ctx.save_for_backward(torch.cat(x_gradients), weight_gradient)
            return total

        @staticmethod
        def backward(ctx, gradient):
            x_gradient, weight_gradient = ctx.saved_tensors
            return gradient * x_gradient, gradient * weight_gradient, None, *[None] * ctx.settings

    return Chunks.apply
