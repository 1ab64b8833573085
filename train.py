"""
One experiment: train a small GPT for five minutes on the text that prepare.py has made, print val_bpb.

    uv run train.py                     # six minutes, with start-up and evaluation

Everything in this file may be changed. What comes from prepare.py (the batches and their clock, the
metric, the seed) may not: it makes the numbers of different versions of this file comparable.
"""

import prepare  # first: from here on this process is sealed off from the texts

import ctypes
import math
import shutil
import threading
import time
from contextlib import suppress
from contextvars import copy_context
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.adamw import adamw

# ------------------------------------------------------------------------------------------------
# Hyperparameters: a column for each dataset; change the one that you run on.
# climbmix and tinystories start from runs published by others, on an H100 and on small GPUs and Macs; they have not been
# run here. sotu was measured on two CPU cores: dev/log.md.

RECIPES = "climbmix", "tinystories", "sotu"
HYPERPARAMETERS = {
    #                    climbmix  tinystories    sotu
    "vocab_size":       (    8192,        4096,    4096),   # a tokenizer that prepare.py has made
    "depth":            (       9,           4,       3),   # blocks
    "width":            (     640,         256,     128),   # of the residual stream
    "head_size":        (     128,          64,      64),   # of an attention head
    "windows":          ( "SSSSL",         "L",     "L"),   # pattern of short and long layers; the last is long
    "short_window":     (     256,         128,      64),   # tokens that a short layer sees, its own included
    "rotary_base":      (     2e5,         1e4,     1e4),   # wavelengths from 2 pi to 2 pi x this, in tokens
    "qk_scale":         (     1.1,         1.1,     1.2),   # factor on normed q and on normed k
    "softcap":          (      15,          15,      15),   # logits stay below this
    "values_every":     (       2,           2,       1),   # value embeddings on every nth block, the last included
    "look_back":        (       0,           0,       3),   # tokens before each that a convolution adds, ahead of attention and MLP
    "bigram_rows":      (       0,           0,   65536),   # of the hashed bigram table; 0 for none
    "embed_dropout":    (     0.0,         0.0,    0.05),   # share of tokens whose embedding is left out in training
    "values_dropout":   (     0.0,         0.0,     0.1),   # likewise of the value embeddings
    "bigram_dropout":   (     0.0,         0.0,    0.15),   # likewise of the bigram embedding
    "device_rows":      (     128,          32,      16),   # rows at once; halved, and accumulate doubled, to fit the memory
    "accumulate":       (       1,           1,       1),   # such micro-batches to an optimizer step
    "embedding_lr":     (     0.9,         0.6,    0.15),   # AdamW, token and value embeddings; x (width / 768)^-0.5
    "table_eps":        (     0.0,         0.0,     1.0),   # eps of these and the bigrams, in root mean squares of their gradient: slows rare rows
    "embedding_decay":  (   0.003,       0.003,    0.01),   # weight decay of the same
    "bigram_lr":        (     0.0,         0.0,     0.3),   # AdamW, bigram table; x (width / 768)^-0.5
    "head_lr":          (   0.005,       0.005,   0.008),   # AdamW, head; likewise
    "scalar_lr":        (     0.1,         0.1,     0.1),   # AdamW, gates and residual weights
    "near_lr":          (     0.0,         0.0,    0.02),   # AdamW, weights of that convolution
    "matrix_lr":        (    0.04,        0.04,    0.03),   # Muon, every matrix in the blocks
    "matrix_decay":     (     0.2,         0.2,     0.1),   # of the matrices, cautious, falling to 0 over the run
    "warmdown":         (    0.75,         0.6,     0.6),   # last share of the time, in which rates fall linearly
    "final_lr":         (    0.05,        0.05,    0.05),   # share of the rate that is left at the end
    "momentum_steps":   (     200,         200,     200),   # in which Muon's momentum rises from 0.85 to 0.95
}


def hyperparameters(recipe):
    """The column of that name, as attributes."""
    column = RECIPES.index(recipe)
    return SimpleNamespace(**{name: values[column] for name, values in HYPERPARAMETERS.items()})

# ------------------------------------------------------------------------------------------------
# Precision: bfloat16 products where the hardware is faster with them; elsewhere they can be 50 times slower

def measured_peak(device, dtype, size=2048):
    """FLOP/s of the best of a few large products."""
    a, best = torch.randn(size, size, device=device, dtype=dtype), math.inf
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()                            # item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def keep_memory():
    """Where the C library is glibc: keep freed memory. By default it returns large blocks, and each step pays for their pages anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
    mallopt(-1, 2 ** 31 - 1)                                # M_TRIM_THRESHOLD
    mallopt(-3, 2 ** 25)                                    # M_MMAP_THRESHOLD, the highest that every glibc takes


def compute_dtype(device):
    """bfloat16 on CUDA from Ampere on, and on a CPU that gains by it: some with the instructions are still slower."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and measured_peak(device, torch.bfloat16, 512) > 1.2 * measured_peak(device, torch.float32, 512)
    return torch.bfloat16 if fast else torch.float32


class Linear(nn.Linear):
    """x W^T in the precision of x; the weights are kept in float32."""

    def __init__(self, fan_in, fan_out):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

# ------------------------------------------------------------------------------------------------
# Attention: causal; q, k, v and the result (B, T, heads, head size); window: keys seen, the own one included

def sdpa(q, k, v, window):
    """torch's own. It has no kernel that skips what a window leaves out, so the caller must ask for the whole."""
    assert window >= q.size(1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def blockwise(q, k, v, window):
    """
    Plain products, a block of queries at a time with the keys that they see. torch's own kernel has a slow backward pass on a
    CPU: with these, compiled, a whole step is 1.17 times as fast (dev/log.md). The window saves what it leaves out.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    T, outputs = q.size(2), []
    size = max(128, T // 4)
    for start in range(0, T, size):
        end, first = min(start + size, T), max(0, start + 1 - window)
        queries, keys = torch.arange(start, end)[:, None], torch.arange(first, end)
        hidden = (keys > queries) | (keys <= queries - window)
        scores = (q[:, :, start:end] @ k[:, :, first:end].mT).float() * q.size(-1) ** -0.5
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1).to(v.dtype)
        outputs.append(weights @ v[:, :, first:end])
    return torch.cat(outputs, dim=2).transpose(1, 2)


def reach(q, window):
    """The window as the flash kernels take it: places to the left, -1 for all, and none to the right."""
    return (window - 1 if window < q.size(1) else -1), 0


def varlen(q, k, v, window):
    """FlashAttention-2 as torch carries it, from Ampere on; rows are sequences of one length."""
    from torch.nn.attention.varlen import varlen_attn       # not above: its import takes seconds
    B, T = q.shape[:2]
    ends = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    y = varlen_attn(*(t.flatten(0, 1) for t in (q, k, v)), ends, ends, T, T, window_size=reach(q, window))
    return y.unflatten(0, (B, T))


def flash3():
    """FlashAttention-3 for Hopper, from the hub: this version, and only from publishers that the hub trusts."""
    import kernels
    flash_attn_func = kernels.get_kernel("kernels-community/flash-attn3", version=1).flash_attn_func
    return lambda q, k, v, window: flash_attn_func(q, k, v, causal=True, window_size=reach(q, window))


def choose_attention(device):
    """The fastest attention that works here, and whether its cost falls with the window."""
    if device.type == "cpu":
        print("attention: blockwise, sliding windows")
        return blockwise, True
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    candidates = [("FlashAttention-3", flash3)] if capability == (9, 0) else []
    candidates += [("varlen_attn", lambda: varlen)] if capability >= (8, 0) else []
    for name, load in candidates:
        try:
            attend = load()
            q = torch.randn(1, 128, 1, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
            attend(q, q, q, 64).sum().backward()        # some load and then fail at the first call
            print(f"attention: {name}, sliding windows")
            return attend, True
        except Exception as error:                      # no network, no build for this card, a kernel that fails ...
            print(f"attention: no {name} here ({type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0][:100]})")
    why = f"CUDA capability {capability[0]}.{capability[1]}" if device.type == "cuda" else f"on {device.type}"
    print(f"attention: scaled_dot_product_attention ({why}), every layer over the whole context")
    return sdpa, False

# ------------------------------------------------------------------------------------------------
# Model

def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(length, size, base):
    """cos and sin, (length, 1, size / 2), of position x base^(-2i / size) (RoFormer, arXiv 2104.09864)."""
    angles = torch.outer(torch.arange(length), base ** (-torch.arange(0, size, 2) / size))[:, None]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def drop(x, share):
    """
    x (B, T, width) without a share of its tokens, the rest scaled up. Look-up tables learn by heart a text that they see
    several times; this keeps them from it at the cost of a look-up (after word dropout, arXiv 1512.05287).
    """
    if not share:
        return x
    return x * ((torch.rand(*x.shape[:2], 1, device=x.device) >= share) / (1 - share)).to(x.dtype)


def look_back(x, weights):
    """
    x (B, T, width) plus the n tokens before each, every channel with weights of its own (n, width), oldest first: a causal
    convolution (after Primer, arXiv 2109.08668). By it a shallow model sees phrases without spending attention on them.
    """
    if weights is None:
        return x
    n, T = weights.size(0), x.size(1)
    before = F.pad(x, (0, 0, n, 0))
    return x + sum(weights[j] * before[:, j:j + T] for j in range(n))


class Attention(nn.Module):
    def __init__(self, h, attend, window, gated):
        super().__init__()
        self.attend, self.window, self.head_size, self.scale = attend, window, h.head_size, h.qk_scale
        self.q, self.k, self.v, self.out = (Linear(h.width, h.width) for _ in range(4))
        if gated:
            self.gate = Linear(32, h.width // h.head_size)  # how much each head takes of the value embedding

    def forward(self, x, values, cos, sin):
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_size)) for linear in (self.q, self.k, self.v))
        if values is not None:
            v = v + 2 * torch.sigmoid(self.gate(x[..., :32]))[..., None] * values.to(x.dtype).view_as(v)
        q, k = (norm(rotate(t, cos, sin)) * self.scale for t in (q, k))
        return self.out(self.attend(q, k, v, self.window).flatten(-2))


class MLP(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.up, self.down = Linear(h.width, 4 * h.width), Linear(4 * h.width, h.width)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())       # ReLU^2: Primer, arXiv 2109.08668


class Block(nn.Module):
    def __init__(self, h, attend, window, gated):
        super().__init__()
        self.attention, self.mlp = Attention(h, attend, window, gated), MLP(h)
        self.near = nn.Parameter(torch.empty(2, h.look_back, h.width)) if h.look_back else None
        self.mix = nn.Parameter(torch.empty(3))             # weights of the stream, of x0 and of the bigram embedding

    def forward(self, x, x0, bigram, values, cos, sin):
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        if bigram is not None:
            x = x + mix[2] * bigram
        near = (None, None) if self.near is None else self.near.to(x.dtype)
        x = x + self.attention(look_back(norm(x), near[0]), values, cos, sin)
        return x + self.mlp(look_back(norm(x), near[1]))


def root_of(z, cap):
    """Logits z x root have the shape of cap x tanh(z / cap), and the slope root^3; on a CPU tanh takes longer."""
    return torch.rsqrt(1 + (z * (1 / cap)).square())


def chunk_loss(x, weight, targets, cap):
    """The summed cross entropy of a chunk, x (N, width), targets (N,), and its gradients by x and by the weight."""
    z = F.linear(x, weight).float()
    root = root_of(z, cap)
    e = (z * root - cap).exp()                              # no logit is above the cap: no need to look for the maximum
    total, scored = e.sum(-1, keepdim=True), (targets >= 0).float()[:, None]
    right = z.gather(-1, targets.clamp(min=0)[:, None])
    loss = (scored * (total.log() + cap - right * root_of(right, cap))).sum()
    p = e * (scored / total)
    hit = torch.arange(weight.size(0), dtype=torch.int32, device=x.device) == targets.int()[:, None]
    dz = (torch.where(hit, p - 1, p) * root ** 3).to(x.dtype)
    return loss, dz @ weight, (dz.T @ x).float()


CHUNK_LOGITS = {"cpu": 2 ** 22, "mps": 2 ** 24, "cuda": 2 ** 27}       # at once, 4 bytes each: on a CPU they fit its cache


class ChunkedLoss(torch.autograd.Function):
    """The mean loss of the head. The logits never exist as a whole: gradients are taken in the forward pass, by chunks."""

    @staticmethod
    def forward(ctx, x, weight, targets, cap, chunk_loss):
        number = 2 ** max(0, math.ceil(math.log2(x.size(0) * weight.size(0) / CHUNK_LOGITS[x.device.type])))
        total, dx, dw, products = 0, [], torch.zeros_like(weight), weight.to(x.dtype)
        for x_chunk, targets_chunk in zip(x.chunk(number), targets.chunk(number)):
            loss, gradient, dw_chunk = chunk_loss(x_chunk, products, targets_chunk, cap)
            total, dw = total + loss, dw.add_(dw_chunk)
            dx.append(gradient)
        scored = (targets >= 0).sum()
        ctx.save_for_backward(torch.cat(dx), dw, scored)
        return total / scored

    @staticmethod
    def backward(ctx, gradient):
        dx, dw, scored = ctx.saved_tensors
        return dx * (gradient / scored), dw * (gradient / scored), None, None, None


class Head(nn.Module):
    def __init__(self, h):
        super().__init__()
        assert h.softcap <= 40, "exp(-2 x softcap) would be zero in float32"
        self.cap, self.weight = h.softcap, nn.Parameter(torch.empty(h.vocab_size, h.width))
        self.chunk_loss = chunk_loss                        # build() compiles it

    def forward(self, x, targets=None):
        """Logits (B, T, vocabulary), or the mean loss over the targets (B, T) that are not -1."""
        x = norm(x)
        if targets is None:
            z = F.linear(x, self.weight.to(x.dtype)).float()
            return z * root_of(z, self.cap)
        return ChunkedLoss.apply(x.flatten(0, 1), self.weight, targets.flatten(), self.cap, self.chunk_loss)


class GPT(nn.Module):
    def __init__(self, h, context, dtype, attend=sdpa, skips=False):
        super().__init__()
        self.dtype, self.bigram_rows = dtype, h.bigram_rows
        self.dropout = h.embed_dropout, h.values_dropout, h.bigram_dropout
        pattern = h.windows if skips else "L"
        windows = [h.short_window if pattern[i % len(pattern)] == "S" and i < h.depth - 1 else context
                   for i in range(h.depth)]
        self.embed = nn.Embedding(h.vocab_size, h.width)
        self.values = nn.ModuleDict({str(i): nn.Embedding(h.vocab_size, h.width)
                                     for i in range(h.depth) if (h.depth - 1 - i) % h.values_every == 0})
        self.bigram = nn.Embedding(h.bigram_rows, h.width, sparse=True) if h.bigram_rows else None
        self.blocks = nn.ModuleList(Block(h, attend, window, str(i) in self.values) for i, window in enumerate(windows))
        self.head, self.block = Head(h), Block.forward      # build() compiles it
        for name, table in zip(("cos", "sin"), rotary_tables(context, h.head_size, h.rotary_base)):
            self.register_buffer(name, table.to(dtype), persistent=False)

    @torch.no_grad()
    def init_weights(self):
        bound = 0.68 * math.sqrt(3 / self.embed.embedding_dim)
        for name, p in self.named_parameters():
            match name.removesuffix(".weight").rstrip(".0123456789").split(".")[-1]:
                case "embed": p.normal_(std=0.8)
                case "q" | "k" | "v" | "up" | "values": p.uniform_(-bound, bound)
                case "out" | "down" | "gate" | "bigram" | "near": p.zero_()
                case "head": p.normal_(std=0.001)
                case "mix": p.copy_(torch.tensor([1, 0.1, 0.1]))
                case _: raise ValueError(f"no initialisation for {name}")

    def forward(self, ids, targets=None):
        """Logits (B, T, vocabulary) for token ids (B, T), or the mean loss over the targets (B, T) that are not -1."""
        embed_dropout, values_dropout, bigram_dropout = self.dropout if self.training else (0, 0, 0)
        x0 = drop(norm(self.embed(ids).to(self.dtype)), embed_dropout)
        x = x0.clone()          # were it the same tensor, the first block would be compiled apart from the others
        bigram = None
        if self.bigram is not None:
            bigram = drop(self.bigram(self.bigram_row(ids)).to(self.dtype), bigram_dropout)
        cos, sin = self.cos[:ids.size(1)], self.sin[:ids.size(1)]
        for i, block in enumerate(self.blocks):
            values = drop(self.values[str(i)](ids), values_dropout) if str(i) in self.values else None
            x = self.block(block, x, x0, bigram, values, cos, sin)
        return self.head(x, targets)

    def bigram_row(self, ids):
        previous = F.pad(ids, (1, 0))[:, :-1]
        return ((36313 * ids) ^ (27191 * previous)) % (self.bigram_rows - 1)

    def flops_per_token(self, context):
        """Training: 6 a matrix parameter, and 12 x width x keys seen (causal, windowed) a layer; look-ups cost none."""
        matrices = sum(p.numel() for p in (*self.blocks.parameters(), self.head.weight) if p.dim() == 2)
        keys = [sum(min(t + 1, block.attention.window) for t in range(context)) / context for block in self.blocks]
        return 6 * matrices + 12 * self.embed.embedding_dim * sum(keys)

# ------------------------------------------------------------------------------------------------
# Optimizer: Muon for the matrices, AdamW for the rest

POLAR_EXPRESS = (       # arXiv 2505.16932: coefficients (a, b, c) of five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalise(g, dtype=torch.float32):
    """The semi-orthogonal matrices nearest to g (N, rows, columns), about: singular values go to 1."""
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        s = x @ x.mT                                        # x <- a x + (b s + c s s) x
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g.dtype)


def muon_update(p, g, m, v, lr, momentum, beta2, decay, dtype):
    """
    One step of Muon on matrices p (N, rows, columns): gradient g, momentum m, and v, the running mean square of the
    rows or columns of the update, which NorMuon (arXiv 2510.05491) evens out. Decays only where the update agrees.
    """
    m.lerp_(g, 1 - momentum)
    o = orthogonalise(g.lerp(m, momentum), dtype)
    size = o.norm(dim=(-2, -1), keepdim=True)
    v.lerp_(o.square().mean(dim=long_side(p), keepdim=True), 1 - beta2)
    o = o * v.clamp(min=1e-10).rsqrt()
    o = o * (size / o.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))
    o = o * max(1, p.size(-2) / p.size(-1)) ** 0.5
    p.sub_(lr * (o + decay * p * (o * p >= 0)))


def long_side(p):
    """The dimension that a running mean square is taken over: one entry stays for each place on the longer side."""
    return -1 if p.size(-2) >= p.size(-1) else -2


def adamw_update(p, g, m, v, step, lr, betas, eps, decay):
    """
    One step of AdamW (arXiv 1711.05101) on p, in torch's fused version: gradient g, running means m of it and v of
    its square, and the number of steps before, a tensor ().
    """
    adamw([p], [g], [m], [v], [], [step], fused=True, lr=lr, beta1=betas[0], beta2=betas[1], eps=eps,
          weight_decay=decay, amsgrad=False, maximize=False)


def usual(v, share):
    """That share of the root mean square of a table's gradients; v: the running mean squares."""
    return share * v.mean().sqrt().item() if share else 0.0


class MuonAdamW(torch.optim.Optimizer):
    """Groups of kind "muon" (matrices of one shape, updated together) and "adamw"; a sparse gradient updates its rows."""

    def __init__(self, groups):
        super().__init__(groups, {})
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            update = self.step_muon if group["kind"] == "muon" else self.step_adamw
            update(**group)

    def step_muon(self, params, lr, momentum, beta2, decay, dtype, **_):
        p, g, state = torch.stack(params), torch.stack([p.grad for p in params]), self.state[params[0]]
        if not state:
            state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p.mean(dim=long_side(p), keepdim=True))}
        muon_update(p, g, state["m"], state["v"], lr, momentum, beta2, decay, dtype)
        torch._foreach_copy_(params, p.unbind())

    def step_adamw(self, params, lr, betas, eps, decay, table_eps=0.0, **_):
        for p in params:
            state = self.state[p]
            if not state:
                state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "step": torch.zeros((), device=p.device)}
            tables, g = (p, state["m"], state["v"]), p.grad
            if g.is_sparse:                                 # only the rows that the batch looked up
                g = g.coalesce()
                rows = g.indices()[0]
                q, m, v = (table[rows] for table in tables)
                adamw_update(q, g.values(), m, v, state["step"], lr, betas, eps + usual(v, table_eps), decay)
                for table, new in zip(tables, (q, m, v)):
                    table[rows] = new
            else:
                adamw_update(p, g, *tables[1:], state["step"], lr, betas, eps + usual(state["v"], table_eps), decay)


def make_optimizer(model, h, dtype):
    """A MuonAdamW whose groups cover every parameter exactly once."""
    scale = (h.width / 768) ** -0.5
    common = dict(kind="adamw", betas=(0.8, 0.95), eps=1e-10, decay=0.0)
    blocks = list(model.blocks.named_parameters())
    scalars = [p for name, p in blocks if name.endswith(("mix", "gate.weight"))]
    groups = [common | dict(params=[model.embed.weight, *model.values.parameters()], lr=scale * h.embedding_lr,
                             decay=h.embedding_decay, table_eps=h.table_eps),
              common | dict(params=[model.head.weight], lr=scale * h.head_lr),
              common | dict(params=scalars, lr=h.scalar_lr)]
    if h.look_back:
        groups.append(common | dict(params=[p for name, p in blocks if name.endswith("near")], lr=h.near_lr))
    if model.bigram is not None:
        groups.append(common | dict(params=[model.bigram.weight], lr=scale * h.bigram_lr, table_eps=h.table_eps))
    matrices = [p for name, p in blocks if not name.endswith(("mix", "near", "gate.weight"))]
    for shape in sorted({p.shape for p in matrices}):
        groups.append(dict(kind="muon", params=[p for p in matrices if p.shape == shape], lr=h.matrix_lr,
                           momentum=0.95, beta2=0.9, decay=h.matrix_decay, dtype=dtype))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters())), "a parameter is in no group, or in two"
    return MuonAdamW(groups)


def schedule(optimizer, h, step, progress):
    """Set the rates: constant, then falling linearly over the last `warmdown` of the time. progress: 0 to 1."""
    share = h.final_lr + (1 - h.final_lr) * min(1, (1 - progress) / h.warmdown)
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak_lr"]
        if group["kind"] == "muon":
            group["momentum"] = 0.85 + 0.1 * min(1, step / h.momentum_steps)
            group["decay"] = h.matrix_decay * (1 - progress)

# ------------------------------------------------------------------------------------------------
# Compilation, and the speed that the device could have

class Compiled:
    """A function through torch.compile; the function as it is from the first call on where that does not work."""

    def __init__(self, function):
        self.function, self.call = function, torch.compile(function, dynamic=False)

    def __call__(self, *arguments):
        try:
            return self.call(*arguments)
        except torch._dynamo.exc.ShortenTraceback as error:     # a compiler is missing, fails, or is none for this card
            if prepare.out_of_memory(error):
                raise
            reason = type(getattr(error, "inner_exception", error)).__name__ if shutil.which("c++") else "no C++ compiler"
            print(f"compile: {self.function.__qualname__} runs eager ({reason})")
            self.call = self.function
            return self.call(*arguments)


def compile_header():
    """The header of every kernel takes a C++ compiler 5 to 8 s: with this, on a second core while Python traces the model."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    with suppress(Exception):                               # the first kernel will meet it again, and Compiled say so
        CppPythonBindingsCodeCache.load_pybinding(["float*"], 'extern "C" void kernel(float*) {}')


def choose_compiler(device):
    """torch.compile, except on MPS: there a function that changes nothing. Blocks share one compilation."""
    if device.type == "mps":
        print("compile: eager (not on MPS)")
        return lambda function: function
    torch._inductor.config.cpp.vec_isa_ok = True        # believe the processor's flags: proving them takes 12 s
    torch._inductor.config.deterministic = True         # choose no kernel by timing it: two runs use the same ones
    torch._inductor.config.aot_inductor.enable_line_tables = False    # no line numbers for a debugger: they take 1 s
    if device.type == "cpu":                            # in this thread's context, which holds these settings
        threading.Thread(target=copy_context().run, args=(compile_header,), daemon=True).start()
    return Compiled


PEAK_FLOPS = {          # dense bfloat16 products added in float32, by NVIDIA's data sheets; parts of the device's name
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "GB10": 125e12, "RTX PRO 6000": 503e12, "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12, "RTX 3060": 25.5e12, "RTX 3060 Ti": 32.4e12, "RTX 3070": 40.6e12, "RTX 3070 Ti": 43.5e12,
    "RTX 3080": 59.5e12, "RTX 3080 Ti": 68.2e12, "RTX 3090": 71e12, "RTX 3090 Ti": 80e12, "RTX 4060": 30.2e12,
    "RTX 4060 Ti": 44.1e12, "RTX 4070": 58.3e12, "RTX 4070 SUPER": 71e12, "RTX 4070 Ti": 80.2e12,
    "RTX 4070 Ti SUPER": 88.2e12, "RTX 4080": 97.5e12, "RTX 4080 SUPER": 104.4e12, "RTX 4090": 165.2e12,
    "RTX 5060": 38.4e12, "RTX 5060 Ti": 47.4e12, "RTX 5070": 61.7e12, "RTX 5070 Ti": 87.9e12, "RTX 5080": 112.6e12,
    "RTX 5090": 209.5e12,
}


def peak_flops(device, dtype):
    """FLOP/s of the device in products of that type: from the table, else (a laptop's GPU, a CPU) measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and dtype == torch.bfloat16 else ""
    known = [part for part in PEAK_FLOPS if part in name and "Laptop" not in name]
    return PEAK_FLOPS[max(known, key=len)] if known else measured_peak(device, dtype)

# ------------------------------------------------------------------------------------------------
# Memory: as many rows at once as fit; the batch of an optimizer step stays the same

def bytes_needed(h, context, dtype):
    """
    A high estimate of the memory of a training step: 15 numbers of the width kept for the backward pass in every layer,
    parameters with gradient and two running means, a chunk of logits with its gradient.
    """
    activations = 15 * dtype.itemsize * h.width * h.depth * h.device_rows * context
    tables = h.vocab_size * (2 + h.depth / h.values_every) + h.bigram_rows
    return activations + 16 * h.width * (12 * h.width * h.depth + tables) + 12 * CHUNK_LOGITS["cuda"]


def halve(h):
    h.device_rows, h.accumulate = h.device_rows // 2, h.accumulate * 2


def fit_memory(h, context, device, dtype):
    """Halve the rows at once until their estimate fits into four fifths of a GPU's memory."""
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory
    while h.device_rows % 2 == 0 and bytes_needed(h, context, dtype) > 0.8 * total:
        halve(h)
    print(f"memory: {h.device_rows} rows at once, {h.accumulate} times a step, need about "
          f"{bytes_needed(h, context, dtype) / 2**30:.1f} of {total / 2**30:.1f} GiB")


def warm_up(run, h, model, optimizer):
    """Compile everything on made-up tokens, before the clock starts; where the memory does not suffice, halve the rows."""
    while not fits(run, h, model, optimizer):
        halve(h)
        print(f"memory: not enough; {h.device_rows} rows at once, {h.accumulate} times a step")
        optimizer.zero_grad()
        torch._dynamo.reset()                               # its limit of compilations is not for those of other sizes
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def fits(run, h, model, optimizer):
    """Take two steps on made-up tokens that leave no trace. False where the memory does not suffice and rows can be halved."""
    try:
        with run.warmup(model, optimizer) as made_up:
            for _ in range(2):
                model(*made_up(h.device_rows)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return True
    except Exception as error:
        if not prepare.out_of_memory(error) or h.device_rows % 2:
            raise
        return False

# ------------------------------------------------------------------------------------------------
# Training

def build(h, context, device):
    """The model, initialised, its blocks and head compiled for training, and its optimizer."""
    keep_memory()
    dtype = compute_dtype(device)
    model = GPT(h, context, dtype, *choose_attention(device)).to(device)
    model.init_weights()
    compiled = choose_compiler(device)
    model.block, model.head.chunk_loss = compiled(Block.forward), compiled(chunk_loss)
    return model, make_optimizer(model, h, dtype)


def train(run, h):
    model, optimizer = build(h, run.context, run.device)
    num_params = sum(p.numel() for p in model.parameters())
    print(f"model: {num_params / 1e6:.1f}M parameters, products in {model.dtype}")

    fit_memory(h, run.context, run.device, model.dtype)
    warm_up(run, h, model, optimizer)
    peak = peak_flops(run.device, model.dtype)

    step, loss = 0, 0.0
    for micro, (x, y) in enumerate(run.batches(h.device_rows), 1):
        part = model(x, y) / h.accumulate
        part.backward()
        loss += part.detach()
        if micro % h.accumulate == 0:
            schedule(optimizer, h, step, run.progress)
            optimizer.step()
            optimizer.zero_grad()
            run.log(step, loss)
            step, loss = step + 1, 0.0

    model.eval()
    model.block = Block.forward                         # to compile for evaluation would take longer than it saves
    run.evaluate_bpb(model)
    mfu = model.flops_per_token(run.context) * run.tokens / run.training_seconds / peak
    run.report(num_steps=step, num_params=num_params, depth=h.depth, mfu_percent=100 * mfu)


def main():
    h = hyperparameters(prepare.chosen_dataset().recipe)
    with prepare.Run(h.vocab_size) as run:
        train(run, h)


if __name__ == "__main__":
    main()
