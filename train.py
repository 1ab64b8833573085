"""
One experiment: train a small GPT for five minutes on the text that prepare.py made, print val_bpb.

    uv run train.py                     # about six minutes with startup and evaluation

Hyperparameters, model, optimizer, training loop, in this order; everything may be changed. What
comes from prepare.py (batches, clock, metric, seed) is fixed, so that results of two versions of
this file are comparable. The dataset is the one that prepare.py was last run for. machine.py holds
what is hardware-specific (dtype, attention kernels, compiler), ngrams.py the model of counts that
the recipe of a small text mixes into evaluation.
"""

import prepare  # first: it seals this process off from the texts, before torch starts threads

import math
from collections import defaultdict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.adamw import adamw

import machine
from ngrams import NGrams

# ------------------------------------------------------------------------------------------------
# Hyperparameters: each has its default in BASE; a recipe overrides some for its dataset

BASE = dict(
    # Model
    vocab_size=None,            # of a tokenizer that prepare.py has made; None: the dataset's own
    depth=4,                    # blocks
    width=256,                  # of the residual stream
    head_dim=64,                # of each attention head
    window_pattern="L",         # Short and Long attention layers, repeated; the last one is long
    short_window=256,           # tokens that a short layer sees; all where windows gain nothing
    rotary_base=1e4,            # wavelengths from 2 pi to almost 2 pi x this, in tokens
    qk_scale=1.1,               # multiplies queries and keys after RMS norm
    softcap=15,                 # bound of the logits, at most 75; 0: only clamped at 75 from above
    value_embed_every=2,        # value embeddings in every nth block, back from the last; 0: none
    candidates=0,               # tokens in the softmax of a micro-batch; 0: the whole vocabulary
    # For a small text
    short_conv=0,               # previous tokens in a causal depthwise convolution
    embed_dropout=0.0,          # chance to zero a position's token embedding, times epochs so far
    value_dropout=0.0,          # the same, value embeddings; both are 0.5 at most
    ngram_order=0,              # tokens of the longest n-grams counted for evaluation; 0: none
    ngram_share=0.0,            # of their log probabilities in the logits of evaluation
    ngram_trust=(-0.7, 1.2, -0.4),      # a, b, c of the linear mixture that follows: NGrams.mix
    repeat_share=0.0,           # bonus of a token that its row has had; only with n-grams on
    repeat_prior=600,           # tokens of average text that the row is taken to follow
    # Batch
    device_batch_size=32,       # rows of a micro-batch; warmup halves it on out of memory
    grad_accum_steps=1,         # micro-batches per optimizer step
    # AdamW; rates of the embeddings and the output head are multiplied by (width / 768)^-0.5
    embedding_lr=0.6,           # token and value embeddings
    embedding_decay=0.003,      # their weight decay
    relative_eps=0.0,           # eps of all embeddings / RMS of their gradient: slows rare rows
    unembedding_lr=0.005,       # output head
    scalar_lr=0.1,              # gates and residual weights
    short_conv_lr=0.02,
    # Muon, for the matrices of attention and MLP
    matrix_lr=0.04,
    matrix_decay=0.2,           # cautious weight decay, falls to 0 over the run
    momentum_steps=200,         # steps over which momentum rises from 0.85 to 0.95
    # Schedule
    warmdown=0.6,               # final fraction of the run, with linear learning rate decay
    final_lr=0.05,              # learning rate at the end, as a fraction of its peak
)


def recipe(**overrides):
    unknown = overrides.keys() - BASE.keys()
    assert not unknown, f"not in BASE: {unknown}"
    return BASE | overrides


RECIPES = {
    # Published by others, none of it run here on this text. H100: karpathy/autoresearch, 8 March
    # 2026. B200: mikeapedia/autoresearch-at-home, 150 runs, SESSION_SUMMARY.md.
    "climbmix": recipe(
        depth=9,                # H100
        width=640,              # H100
        head_dim=128,           # H100; on the B200 64 was worse
        window_pattern="SSSSL", # H100
        rotary_base=2e5,        # H100
        softcap=13,             # B200, of a tanh, which bends later: 11, 14 and 15 were worse
        device_batch_size=64,   # B200: 2^17 tokens a step; 2^15 and 2^18 were worse
        embedding_lr=1.2,       # B200, of token embeddings; its value embeddings had 0.3
        matrix_lr=0.025,        # B200, at 2^17 tokens; H100: 0.04 at 2^18
        matrix_decay=0.1525,    # B200
        warmdown=0.75,          # H100; B200: 0.7
        final_lr=0.02,          # B200, after a decay by square root: 0.0006 better than 0.005
    ),
    # Starts from published runs on small GPUs and Macs; not run here
    "tinystories": recipe(),
    # Measured on two CPU cores: dev/log.md
    "sotu": recipe(
        depth=3,
        # Where matmuls are cheap, 128 would see the text more often still, and memorize it.
        width=192 if machine.has_matrix_unit() else 128,
        qk_scale=1.2,
        value_embed_every=1,
        short_conv=3,
        softcap=0,              # one pass over the logits fewer: 5% more steps
        candidates=2304,        # a batch has some 1,500 different targets; any above 2,304 are lost
        embed_dropout=0.05,
        value_dropout=0.1,
        ngram_order=6,
        ngram_share=0.2,
        repeat_share=0.45,
        device_batch_size=16,
        embedding_lr=0.15,
        embedding_decay=0.01,
        relative_eps=1.0,
        unembedding_lr=0.008,
        matrix_lr=0.03,
        matrix_decay=0.1,
    ),
}

# ------------------------------------------------------------------------------------------------
# Model

def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(length, head_dim, base):
    """cos and sin of position x base^(-2i / head_dim), (length, 1, head_dim / 2): RoFormer."""
    frequencies = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(length), frequencies)[:, None]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class Linear(nn.Linear):
    """x W^T in the dtype of x; the weights stay in float32."""

    def __init__(self, fan_in, fan_out):
        super().__init__(fan_in, fan_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class ShortConv(nn.Module):
    """A causal depthwise convolution over n previous tokens, plus x (Primer, arXiv 2109.08668)."""

    def __init__(self, width, n):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, width))   # oldest token first

    def forward(self, x):               # (B, T, width)
        n, T = self.weight.size(0), x.size(1)
        weights = self.weight.to(x.dtype)
        padded = F.pad(x, (0, 0, n, 0))
        for j in range(n):
            x = x + weights[j] * padded[:, j:j + T]
        return x


GATE_INPUT = 32     # channels of x that decide how much of the value embedding a head takes


class Attention(nn.Module):
    """
    attend(q, k, v, window) is causal and scales by head_dim^-0.5; its arguments and result are
    (B, T, heads, head_dim). Any other function that keeps to this may take its place.

    x: (B, T, width). value_embed (B, T, width) or None: a second embedding of the tokens, of this
    block alone, added to v after a gate from 0 to 2 per head (after arXiv 2410.17897), times
    dropout, a factor for each position (B, T, 1), or 1. cos and sin: (T, 1, head_dim / 2). q, k, v
    and gate only hold weights: one matmul applies all four.
    """

    def __init__(self, h, attend, window, gated):
        super().__init__()
        self.attend, self.window = attend, window
        self.head_dim, self.scale = h.head_dim, h.qk_scale
        self.q = Linear(h.width, h.width)
        self.k = Linear(h.width, h.width)
        self.v = Linear(h.width, h.width)
        self.out = Linear(h.width, h.width)
        if gated:
            self.gate = Linear(GATE_INPUT, h.width // h.head_dim)

    def forward(self, x, value_embed, dropout, cos, sin):
        weights = [self.q.weight, self.k.weight, self.v.weight]
        if value_embed is not None:     # rows in multiples of 8: else a GPU's matmul is slow
            heads = len(self.gate.weight)
            weights.append(F.pad(self.gate.weight, (0, x.size(-1) - GATE_INPUT, 0, -heads % 8)))
        # One matmul: the gradient of x is one tensor, which a CPU need not add up from four.
        parts = F.linear(x, torch.cat(weights).to(x.dtype)).split([len(w) for w in weights], -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts[:3])
        if value_embed is not None:
            gate = 2 * torch.sigmoid(parts[3][..., :heads]) * dropout       # (B, T, heads)
            v = v + gate[..., None] * value_embed.to(x.dtype).view_as(v)
        q = norm(rotate(q, cos, sin)) * self.scale
        k = norm(rotate(k, cos, sin)) * self.scale
        return self.out(self.attend(q, k, v, self.window).flatten(-2))


class MLP(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.up = Linear(h.width, 4 * h.width)
        self.down = Linear(4 * h.width, h.width)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())       # ReLU^2: Primer, arXiv 2109.08668


class Block(nn.Module):
    """x: the residual stream; x0: the normed token embedding."""

    def __init__(self, h, attend, window, gated):
        super().__init__()
        self.attention = Attention(h, attend, window, gated)
        self.mlp = MLP(h)
        self.residual = nn.Parameter(torch.empty(2))        # weights of x and x0
        self.attention_conv = ShortConv(h.width, h.short_conv) if h.short_conv else nn.Identity()
        self.mlp_conv = ShortConv(h.width, h.short_conv) if h.short_conv else nn.Identity()

    @machine.compiled_on("cpu")         # a block at a time: the same code for all of them
    def forward(self, x, x0, value_embed, dropout, cos, sin):
        weights = self.residual.to(x.dtype)
        x = weights[0] * x + weights[1] * x0
        x = x + self.attention(self.attention_conv(norm(x)), value_embed, dropout, cos, sin)
        return x + self.mlp(self.mlp_conv(norm(x)))


def softcap(z, cap):
    """
    Logits within +-cap, or below 75 where cap is 0. z / sqrt(1 + (z / cap)^2) bends earlier than
    the usual cap x tanh(z / cap), and takes a CPU less time.
    """
    if not cap:
        return z.clamp(max=75)          # the sum of exp() over a vocabulary stays finite
    return z * torch.rsqrt(1 + (z * (1 / cap)).square())


@machine.in_chunks                      # a batch's logits never exist at once
def summed_loss(x, weight, targets, stands_for, cap):
    """
    Cross entropy in nats, summed over targets (N,) that are not -1. x: the residual stream after
    the last block, (N, width). stands_for: the log of how many tokens each row of weight is for.
    """
    logits = softcap(F.linear(norm(x), weight.to(x.dtype)).float(), cap) + stands_for
    tokens = torch.arange(len(weight), dtype=torch.int32, device=x.device)
    is_target = targets.int()[:, None] == tokens            # unlike gather(), fused with the rest
    target_logits = logits.where(is_target, 0).sum(-1)
    loss = logits.exp().sum(-1).log() - target_logits       # softcap bounds exp: no overflow
    return (loss * (targets >= 0)).sum()


def look_up(table, ids, dtype):
    """
    Rows of an nn.Embedding. On a GPU the table is cast to dtype first: a fraction of the bytes, and
    its gradient is summed in dtype as well. Elsewhere the caller casts the rows.
    """
    return F.embedding(ids, table.weight.to(dtype)) if ids.is_cuda else table(ids)


def sample(weight, targets, frequency, size):
    """
    `size` rows of the output head, weight (vocab_size, width): those of all targets (N,) and others
    drawn at random, frequent tokens likelier. Returns the rows, the targets as indices into them,
    and per row the log of how many tokens it stands for, which makes the sum of the softmax right
    on average (priority sampling, arXiv cs/0509026). Targets that find no room become -1.
    """
    wanted = torch.zeros(len(weight) + 1, device=weight.device)
    wanted[targets] = math.inf                              # the last one takes -1
    wanted = wanted[:-1]
    priority = wanted + frequency / torch.rand_like(wanted).clamp(min=1e-6)
    priority, rows = priority.topk(size + 1)
    rows, threshold = rows[:-1], priority[-1]
    stands_for = (threshold / frequency[rows]).log().clamp(min=0).masked_fill(wanted[rows] > 0, 0)
    place = torch.full_like(frequency, -1, dtype=torch.long)
    place[rows] = torch.arange(size, device=weight.device)
    return F.embedding(rows, weight), torch.where(targets < 0, -1, place[targets]), stands_for


class GPT(nn.Module):
    """
    A new parameter must be added to init_weights and to make_optimizer, which raise on unknown
    names. windowed: whether attend gains by a window; if not, every layer sees the whole context.
    """

    def __init__(self, h, context, dtype, attend=machine.sdpa, windowed=False):
        super().__init__()
        self.h, self.dtype = h, dtype
        self.embed = nn.Embedding(h.vocab_size, h.width)
        self.ngrams = NGrams(h.ngram_order, h.vocab_size) if h.ngram_order else None
        self.value_embed = nn.ModuleDict()
        self.blocks = nn.ModuleList()
        for i in range(h.depth):
            letter = h.window_pattern[i % len(h.window_pattern)]
            short = letter == "S" and windowed and i < h.depth - 1
            window = h.short_window if short else context
            gated = h.value_embed_every > 0 and (h.depth - 1 - i) % h.value_embed_every == 0
            if gated:
                self.value_embed[str(i)] = nn.Embedding(h.vocab_size, h.width)
            self.blocks.append(Block(h, attend, window, gated))
        self.unembed = Linear(h.width, h.vocab_size)
        self.register_buffer("seen", torch.ones(h.vocab_size))      # times as a target, plus 1
        self.register_buffer("epoch", torch.zeros(()), persistent=False)    # of training
        cos, sin = rotary_tables(context, h.head_dim, h.rotary_base)
        self.register_buffer("cos", cos.to(dtype), persistent=False)
        self.register_buffer("sin", sin.to(dtype), persistent=False)

    @torch.no_grad()
    def init_weights(self):
        bound = 0.68 * math.sqrt(3 / self.h.width)          # standard deviation 0.68 / width^0.5
        for name, p in self.named_parameters():
            match role(name):
                case "embed":
                    p.normal_(std=0.8)
                case "unembed":
                    p.normal_(std=0.001)
                case "attention.q" | "attention.k" | "attention.v" | "mlp.up" | "value_embed":
                    p.uniform_(-bound, bound)
                case ("attention.out" | "mlp.down" | "attention.gate"
                      | "attention_conv" | "mlp_conv"):
                    p.zero_()
                case "residual":
                    p.copy_(torch.tensor([1, 0.1]))
                case _:
                    raise ValueError(f"init_weights does not know {name}")

    def forward(self, ids, targets=None):
        """
        Logits (B, T, vocab_size) in float32 for token ids (B, T): evaluation takes these. With
        targets (B, T), in training, their mean loss in nats, ignoring -1.
        """
        h, x = self.h, self.hidden(ids)
        if targets is None:
            logits = softcap(self.unembed(norm(x)).float(), h.softcap)
            if self.ngrams is not None and self.ngrams.counted:
                logits = self.ngrams.mix(logits, ids, h.ngram_share, h.ngram_trust)
                logits = self.ngrams.raise_repeated(logits, ids, h.repeat_share, h.repeat_prior)
            return logits
        targets = targets.flatten()
        weight, stands_for = self.unembed.weight, torch.zeros_like(self.seen)
        if 0 < h.candidates < h.vocab_size:
            self.seen += torch.bincount(targets[targets >= 0], minlength=h.vocab_size)
            weight, targets, stands_for = sample(weight, targets, self.seen, h.candidates)
        loss = summed_loss(x.flatten(0, 1), weight, targets, stands_for, h.softcap)
        return loss / (targets >= 0).sum()

    @machine.compiled_on("cuda")        # one graph: all blocks, and the look-ups
    def hidden(self, ids):
        """The residual stream after the last block: (B, T, width)."""
        h = self.h
        x0 = norm(look_up(self.embed, ids, self.dtype)).to(self.dtype)
        x0 = x0 * self.dropout(ids, h.embed_dropout)
        x = x0.clone()      # aliased inputs would have block 0 compiled separately
        cos, sin = self.cos[:ids.size(1)], self.sin[:ids.size(1)]
        for i, block in enumerate(self.blocks):
            value_embed = dropout = None
            if str(i) in self.value_embed:
                value_embed = look_up(self.value_embed[str(i)], ids, self.dtype)
                dropout = self.dropout(ids, h.value_dropout)
            x = block(x, x0, value_embed, dropout, cos, sin)
        return x

    def dropout(self, ids, rate):
        """
        A factor for each position of ids, (B, T, 1), or 1. In training some are 0, more of them
        with every epoch: embeddings memorize a text that comes again (arXiv 1512.05287 drops words
        for the same reason). p is a tensor, since each new number would be compiled again.
        """
        if not (rate and self.training):
            return 1
        p = (rate * self.epoch).clamp(max=0.5)
        kept = torch.rand(*ids.shape, 1, device=ids.device) >= p
        return (kept / (1 - p)).to(self.dtype)

    def flops_per_token(self, context):
        """
        Training FLOPs: 6 per weight and 12 x width per key that attention sees, on average over
        positions (PaLM, arXiv 2204.02311, appendix B); embedding lookups cost none.
        """
        weights = [*self.blocks.parameters(), self.unembed.weight[:self.h.candidates or None]]
        flops = 6 * sum(p.numel() for p in weights if p.dim() == 2)
        for block in self.blocks:
            keys = sum(min(t + 1, block.attention.window) for t in range(context)) / context
            flops += 12 * self.h.width * keys
        return flops


def role(name):
    """What a parameter does: "attention.q" for "blocks.0.attention.q.weight"."""
    words = name.split(".")
    return ".".join(w for w in words if w not in ("blocks", "weight") and not w.isdigit())

# ------------------------------------------------------------------------------------------------
# Optimizer: Muon for the matrices in the blocks, AdamW for the rest

POLAR_EXPRESS = (           # coefficients a, b, c of five steps: arXiv 2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def orthogonalize(g, dtype=torch.float32):
    """The semi-orthogonal matrices nearest to g (N, rows, columns): singular values near 1."""
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g
    x = (x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)).to(dtype)
    for a, b, c in POLAR_EXPRESS:                           # x <- a x + (b s + c s s) x
        s = x @ x.mT
        polynomial = torch.baddbmm(s, s, s, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(g.dtype)


def short_side(p):
    """The dimension that NorMuon averages over, which leaves a mean per row or per column."""
    return -1 if p.size(-2) >= p.size(-1) else -2


@machine.compiled_on("cuda")
def muon_update(p, g, m, v, lr, momentum, beta2, decay, dtype):
    """
    One step of Muon on matrices p (N, rows, columns) with gradient g, momentum m, and v, second
    moments of the update per row or column, which NorMuon (arXiv 2510.05491) divides by. Weight
    decay is cautious (arXiv 2510.12402): only where it agrees with the update.
    """
    m.lerp_(g, 1 - momentum)
    update = orthogonalize(g.lerp(m, momentum), dtype)      # Nesterov
    norm_before = update.norm(dim=(-2, -1), keepdim=True)
    v.lerp_(update.square().mean(dim=short_side(p), keepdim=True), 1 - beta2)
    update = update * v.clamp(min=1e-10).rsqrt()
    norm_after = update.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10)
    update = update * (norm_before / norm_after)
    update = update * max(1, p.size(-2) / p.size(-1)) ** 0.5
    p.sub_(lr * (update + decay * p * (update * p >= 0)))


def adamw_update(p, g, m, v, steps, lr, betas, eps, decay):
    """
    One step of AdamW (arXiv 1711.05101), torch's fused one, on lists of tensors: gradients g,
    running means m of g and v of its square, numbers of steps before this one as tensors ().
    """
    adamw(p, g, m, v, [], steps, fused=True, lr=lr, beta1=betas[0], beta2=betas[1],
          eps=eps, weight_decay=decay, amsgrad=False, maximize=False)


class MuonAdamW(torch.optim.Optimizer):
    """
    Parameter groups of kind "muon", matrices of one shape updated together, and of kind "adamw",
    where relative_eps is added to eps in units of the RMS of a tensor's gradient (its running mean
    before this step, which starts at 0).
    """

    def __init__(self, groups):
        super().__init__(groups, {})
        for group in self.param_groups:
            group["peak_lr"] = group["lr"]

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["kind"] == "muon":
                self.step_muon(**group)
            else:
                self.step_adamw(**group)

    def step_muon(self, params, lr, momentum, beta2, decay, dtype, **_):
        p, g = torch.stack(params), torch.stack([p.grad for p in params])
        state = self.state[params[0]]
        if not state:
            state["m"] = torch.zeros_like(p)
            state["v"] = torch.zeros_like(p.mean(dim=short_side(p), keepdim=True))
        if p.is_cuda:       # a compiled function would be compiled again for each new float
            lr, momentum, decay = (torch.tensor(value) for value in (lr, momentum, decay))
        muon_update(p, g, state["m"], state["v"], lr, momentum, beta2, decay, dtype)
        torch._foreach_copy_(params, p.unbind())

    def step_adamw(self, params, lr, betas, eps, decay, relative_eps=0.0, **_):
        for p in params:
            if not self.state[p]:
                self.state[p].update(m=torch.zeros_like(p), v=torch.zeros_like(p),
                                     step=torch.zeros((), device=p.device))
        g, states = [p.grad for p in params], [self.state[p] for p in params]
        m, v, steps = ([state[key] for state in states] for key in ("m", "v", "step"))
        if not relative_eps:
            adamw_update(params, g, m, v, steps, lr, betas, eps, decay)     # few kernels for all
            return
        for each in zip(params, g, m, v, steps):
            rms = each[3].mean().sqrt().item()
            adamw_update(*([tensor] for tensor in each), lr, betas, eps + relative_eps * rms, decay)


def make_optimizer(model, h):
    """A MuonAdamW with every parameter in exactly one group."""
    params = defaultdict(list)
    for name, p in model.named_parameters():
        params[role(name)].append(p)

    def take(*roles):
        return [p for role in roles for p in params.pop(role, [])]

    scale = (h.width / 768) ** -0.5
    groups = [
        dict(name="embeddings", params=take("embed", "value_embed"), lr=scale * h.embedding_lr,
             decay=h.embedding_decay, relative_eps=h.relative_eps),
        dict(name="unembed", params=take("unembed"), lr=scale * h.unembedding_lr),
        dict(name="scalars", params=take("residual", "attention.gate"), lr=h.scalar_lr),
        dict(name="short_conv", params=take("attention_conv", "mlp_conv"), lr=h.short_conv_lr),
    ]
    adamw_defaults = dict(kind="adamw", betas=(0.8, 0.95), eps=1e-10, decay=0.0)
    groups = [adamw_defaults | group for group in groups if group["params"]]

    matrices = take("attention.q", "attention.k", "attention.v", "attention.out",
                    "mlp.up", "mlp.down")
    muon_defaults = dict(kind="muon", lr=h.matrix_lr, momentum=0.95, beta2=0.9,
                         decay=h.matrix_decay, dtype=model.dtype)
    for shape in sorted({p.shape for p in matrices}):
        same_shape = [p for p in matrices if p.shape == shape]
        name = "matrices {} x {}".format(*shape)
        groups.append(muon_defaults | dict(name=name, params=same_shape))
    assert not params, f"make_optimizer does not know {', '.join(params)}"
    return MuonAdamW(groups)


def set_schedule(optimizer, h, step, progress):
    """
    Learning rates are constant, then fall linearly over `warmdown`; Muon's momentum rises over
    `momentum_steps`, and its weight decay falls to 0. progress: 0 to 1.
    """
    fraction = h.final_lr + (1 - h.final_lr) * min(1, (1 - progress) / max(h.warmdown, 1e-9))
    for group in optimizer.param_groups:
        group["lr"] = fraction * group["peak_lr"]
        if group["kind"] == "muon":
            group["momentum"] = 0.85 + 0.1 * min(1, step / max(1, h.momentum_steps))
            group["decay"] = h.matrix_decay * (1 - progress)

# ------------------------------------------------------------------------------------------------
# Training

def build(h, context, device):
    """The model, initialized, and its optimizer."""
    dtype = machine.compute_dtype(device)
    attend, windowed = machine.choose_attention(device, dtype)
    model = GPT(h, context, dtype, attend, windowed).to(device)
    model.init_weights()
    return model, make_optimizer(model, h)


def main():
    h = SimpleNamespace(**RECIPES[prepare.chosen_dataset().recipe])
    with prepare.Run(h.vocab_size) as run:
        h.vocab_size = run.vocab_size
        model, optimizer = build(h, run.context, run.device)
        num_params = sum(p.numel() for p in model.parameters())
        print(f"model: {num_params / 1e6:.1f}M parameters, matmuls in {model.dtype}")
        # In float16 small gradients would vanish; elsewhere the scaler does nothing.
        scaler = torch.amp.GradScaler(run.device.type, enabled=model.dtype == torch.float16)

        def dummy_step(x, y):
            scaler.scale(model(x, y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        # Before the clock starts: compile on random tokens, halve the rows until they fit in
        # memory, put model and optimizer back as they were.
        rows = run.warmup(dummy_step, h.device_batch_size, model, optimizer, scaler)
        grad_accum_steps = h.grad_accum_steps * h.device_batch_size // rows

        step, train_loss = 0, 0.0
        for micro_step, (x, y) in enumerate(run.batches(rows), start=1):   # until time is up
            if model.ngrams is not None:
                model.ngrams.watch(x, y, run.epoch, run.progress)
            model.epoch.fill_(run.epoch)
            loss = model(x, y) / grad_accum_steps
            scaler.scale(loss).backward()
            train_loss += loss.detach()
            if micro_step % grad_accum_steps == 0:
                set_schedule(optimizer, h, step, run.progress)
                scaler.step(optimizer)
                scaler.update()
                run.log(step, train_loss, optimizer)
                optimizer.zero_grad()
                step += 1
                train_loss = 0.0

        run.evaluate_bpb(model)                             # in eval mode, without gradients
        run.report(num_steps=step, num_params=num_params, depth=h.depth,
                   flops_per_token=model.flops_per_token(run.context))


if __name__ == "__main__":
    main()
