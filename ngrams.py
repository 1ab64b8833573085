"""
Statistics of the text, counted during training: n-grams, and how often each token is there. Mixed
into the logits of evaluation they help a small network that has seen its text for minutes only;
beside one that trains longer they gain little.
"""

import sys
import time

import torch
import torch.nn.functional as F
from torch import nn


class NGrams(nn.Module):
    """
    What followed the last tokens in the text so far: interpolated Kneser-Ney with one discount per
    order (Chen and Goodman 1999). A context is known by a hash, which makes an n-gram one integer
    and counting a sort. For evaluation the bigrams become a dense vocabulary x vocabulary table.

    order: tokens of the longest n-grams, at least 3. Exits if the table would get too large.
    """

    bigrams = None      # the table, no part of the state: copies of a model make their own

    def __init__(self, order, vocab_size):
        super().__init__()
        if order < 3 or vocab_size > 2**14:
            sys.exit(f"n-grams of {order} tokens at a vocabulary of {vocab_size:,}: they take 3 or "
                     "more, and a vocabulary of at most 16,384; set ngram_order=0 in train.py")
        self.order, self.vocab_size = order, vocab_size
        self.hashes = 2**62 // vocab_size       # hash x vocab_size + word fits into an int64
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("multipliers", torch.randint(2**62, (order - 1,), generator=generator))
        self.kept = []                          # batches x, y that are still to be counted
        self.register_load_state_dict_pre_hook(make_room)

    @property
    def counted(self):
        return hasattr(self, "unigrams")

    def watch(self, x, y, epoch, progress):
        """Keep the batches of the first epoch, or of 90% of a shorter run, and then count them."""
        if self.counted:
            return
        if epoch <= 1 or not self.kept:
            self.kept.append((x.int(), y.int()))
        if epoch > 1 or progress > 0.9:
            start = time.monotonic()
            x, y = (torch.cat(batches).long() for batches in zip(*self.kept))
            self.kept.clear()
            self.count(x, y)
            print(f"n-grams of {y.numel():,} tokens counted in {time.monotonic() - start:.1f} s")

    def hash(self, ids, n):
        """Hashes (B x T) of the last n tokens at each place of ids (B, T), fewer at the start."""
        hashes = torch.full_like(ids, n)
        for back, multiplier in enumerate(self.multipliers[:min(n, ids.size(1))]):
            hashes[:, back:] += multiplier * (1 + ids[:, :ids.size(1) - back])
        return hashes.remainder_(self.hashes).flatten()

    @torch.no_grad()
    def count(self, x, y):
        """Count the n-grams up to each token of y (B, T), x shifted by one; -1 in y is no token."""
        words = y.flatten()
        places, tables = (words >= 0).nonzero()[:, 0], []
        for n in range(self.order, 0, -1):
            contexts = self.hash(x, n - 1)
            keys, by_key = (contexts * self.vocab_size + words)[places].sort()
            _, count = keys.unique_consecutive(return_counts=True)
            # An n-gram keeps one place: shorter ones count the different tokens before them.
            places = places[by_key[count.cumsum(0) - count]]
            contexts, context_of, kinds = contexts[places].unique_consecutive(
                return_inverse=True, return_counts=True)
            once, twice = (count == 1).sum(), (count == 2).sum()
            # n1 / (n1 + 2 n2), with 1 and 2 added so that it stays above 0, and with it the
            # probability of a word that was not seen.
            discount = (once + 1) / (once + 2 * twice + 2)
            total = torch.zeros_like(kinds).index_add_(0, context_of, count)
            share = (count - discount) / total[context_of]
            backoff = discount * kinds / total      # the share of what a shorter context says
            tables.append((contexts, kinds, backoff, words[places], share))
        _, _, backoff, word, share = tables.pop()
        unigrams = (backoff / self.vocab_size).repeat(self.vocab_size)
        unigrams[word] += share
        contexts, kinds, backoff, words, share = (torch.cat(parts) for parts in zip(*tables))
        contexts, by_context = contexts.sort()
        # A context's words are the `kinds` entries of words and share before its end.
        tables = dict(unigrams=unigrams, contexts=contexts, kinds=kinds[by_context].int(),
                      ends=kinds.cumsum(0)[by_context].int(), backoff=backoff[by_context],
                      words=words.int(), share=share)
        frequency = torch.bincount(y[y >= 0], minlength=self.vocab_size) + 1.0
        tables["frequency"] = frequency / frequency.sum()
        for name, tensor in tables.items():
            self.register_buffer(name, tensor)

    def forward(self, ids):
        """Probabilities (B, T, vocab_size) of the token after each place of ids (B, T)."""
        if self.bigrams is None:
            every = torch.arange(self.vocab_size, device=ids.device)[:, None]
            self.bigrams = self.unigrams.repeat(self.vocab_size, 1)
            self.interpolate(self.bigrams, every, [2])
        # Indexing the table would take four times as long on a CPU.
        p = F.embedding(ids.flatten(), self.bigrams)
        self.interpolate(p, ids, range(self.order, 2, -1))
        return p.view(*ids.shape, -1)

    def interpolate(self, p, ids, orders):
        """
        From p (B x T, vocab_size), what shorter contexts say of the token after each place of ids
        (B, T), to what contexts of these orders say, the longest first; in place.
        """
        # left: of the probability at each place, what is still for shorter contexts to give out
        left, found = p.new_ones(len(p)), []
        for n in orders:
            hashes = self.hash(ids, n - 1)
            i = torch.searchsorted(self.contexts, hashes).clamp_(max=len(self.contexts) - 1)
            places = (self.contexts[i] == hashes).nonzero()[:, 0]
            i = i[places]
            kinds = self.kinds[i]
            # The entries of all these contexts, one context after another, ...
            entries = (self.ends[i] - kinds.cumsum(0)).repeat_interleave(kinds)
            entries += torch.arange(len(entries), device=ids.device)
            # ... and where in p, seen flat, the word of each is.
            at = (places * self.vocab_size).repeat_interleave(kinds) + self.words[entries]
            found.append((at, self.share[entries] * left[places].repeat_interleave(kinds)))
            left[places] *= self.backoff[i]
        p.mul_(left[:, None])
        for at, share in found:
            p.view(-1).index_add_(0, at, share)

    def mix(self, logits, ids, share, trust):
        """
        Log probabilities (B, T, vocab_size) of the token after each place of ids (B, T), mixed from
        the n-grams' q and a network with these logits. First a share of log q goes into the logits,
        which gives p; then p and q are mixed linearly, and q weighs sigmoid(a + b log max q +
        c log max p), where a, b, c = trust. It overwrites logits.
        """
        a, b, c = trust
        q = self(ids)
        p = logits.lerp_(q.log(), share).softmax(-1)
        weight = (a + b * q.amax(-1, True).log() + c * p.amax(-1, True).log()).sigmoid()
        return p.lerp_(q, weight).log_()

    def raise_repeated(self, logits, ids, share, prior):
        """
        Returns logits (B, T, vocab_size), which it overwrites, plus share x log(1 + n / (prior x
        frequency)) for each token that its row ids (B, T) has had n times so far: a word of a
        document comes again, a rare one above all (fast marginal adaptation: Kneser, Peters and
        Klakow 1997).
        """
        same = ids[:, :, None] == ids[:, None]              # (B, T, T)
        is_first = ~same.tril(-1).any(-1)                   # one place of a row for each token
        is_first[:, 0] = False                              # BOS is no word
        n = same.float().cumsum_(1) * is_first[:, None]     # [b, t, s]: of the token at s, up to t
        bonus = n.div_(prior * self.frequency[ids][:, None]).log1p_().mul_(share)
        return logits.scatter_add_(2, ids[:, None].expand_as(bonus), bonus)


def make_room(ngrams, state, prefix, *_):
    """Before load_state_dict: counting decides how large the tables are."""
    ngrams.bigrams = None
    for name, tensor in state.items():
        if name.startswith(prefix):
            room = torch.empty_like(tensor, device=ngrams.multipliers.device)
            ngrams.register_buffer(name.removeprefix(prefix), room)
