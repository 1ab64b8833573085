"""
An n-gram model, counted during training. Mixed into the logits of evaluation it helps a small
network that has seen its text for minutes only; one that trains longer learns all this by itself.
"""

import torch
import torch.nn.functional as F
from torch import nn


class NGrams(nn.Module):
    """
    What followed the last tokens in the text so far: interpolated Kneser-Ney with one discount per
    order (Chen and Goodman 1999). A context is known by a hash, which makes an n-gram one integer
    and counting a sort. Bigrams are in a dense table, for small vocabularies; the rest in lists.
    """

    def __init__(self, order, vocab_size):
        super().__init__()
        self.order, self.vocab_size = order, vocab_size
        self.hashes = 2**62 // vocab_size       # hash x vocab_size + word fits into an int64
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("multipliers", torch.randint(2**62, (order,), generator=generator))
        self.seen = []                          # batches x, y that are still to be counted
        self.register_load_state_dict_pre_hook(make_room)

    @property
    def counted(self):
        return hasattr(self, "bigrams")

    def watch(self, x, y, epoch, progress):
        """Keep a run's batches until its first epoch or nine tenths of it are over, then count."""
        if self.counted:
            return
        if epoch <= 1 or not self.seen:
            self.seen.append((x, y))
        if epoch > 1 or progress > 0.9:
            self.count(*(torch.cat(batches) for batches in zip(*self.seen)))
            self.seen.clear()

    def hash(self, ids, n):
        """Of the n tokens up to each place of ids (B, T), or fewer at the start of a row: (B T)."""
        hashes = torch.full_like(ids, n)
        for back, multiplier in enumerate(self.multipliers[:n]):
            hashes[:, back:] += multiplier * (1 + ids[:, :ids.size(1) - back])
        return hashes.remainder_(self.hashes).flatten()

    @torch.no_grad()
    def count(self, x, y):
        """Count the n-grams up to each token of y (B, T), x shifted by one; -1 in y is no token."""
        before, words = x.flatten(), y.flatten()
        places, tables = (words >= 0).nonzero()[:, 0], []
        for n in range(self.order, 0, -1):
            contexts = self.hash(x, n - 1)
            keys, by_key = (contexts * self.vocab_size + words)[places].sort()
            _, count = keys.unique_consecutive(return_counts=True)
            # An n-gram keeps one place: shorter ones count the different tokens before them.
            places = places[by_key[count.cumsum(0) - count]]
            contexts, of, kinds = contexts[places].unique_consecutive(
                return_inverse=True, return_counts=True)
            once, twice = (count == 1).sum(), (count == 2).sum()
            discount = (once + 1) / (once + 2 * twice + 2)      # + 1, + 2: any word stays possible
            total = torch.zeros_like(kinds).index_add_(0, of, count)
            share = (count - discount) / total[of]
            left = discount * kinds / total                     # to what a shorter context says
            if n > 2:
                tables.append((contexts, kinds, left, words[places], share))
            elif n == 2:
                pairs, pair_share = (before[places], words[places]), share
                pair_left = share.new_ones(self.vocab_size).index_put_(pairs[:1], left[of])
            else:
                unigrams = (left / self.vocab_size).repeat(self.vocab_size)
                unigrams[words[places]] += share
        bigrams = torch.outer(pair_left, unigrams).index_put_(pairs, pair_share, accumulate=True)
        contexts, kinds, left, words, share = (torch.cat(parts) for parts in zip(*tables))
        contexts, by_context = contexts.sort()
        tables = dict(
            bigrams=bigrams, contexts=contexts, kinds=kinds[by_context].int(),
            ends=kinds.cumsum(0)[by_context].int(), left=left[by_context],  # of a context's words
            words=words.int(), share=share)
        for name, tensor in tables.items():
            self.register_buffer(name, tensor)

    def forward(self, ids):
        """Log probabilities (B, T, vocab_size) of the token after each place of ids (B, T)."""
        left, found = self.bigrams.new_ones(ids.numel()), []
        for n in range(self.order, 2, -1):
            hashes = self.hash(ids, n - 1)
            i = torch.searchsorted(self.contexts, hashes).clamp_(max=len(self.contexts) - 1)
            places = (self.contexts[i] == hashes).nonzero()[:, 0]
            i = i[places]
            kinds = self.kinds[i]
            entries = (self.ends[i] - kinds.cumsum(0)).repeat_interleave(kinds)
            entries += torch.arange(len(entries), device=ids.device)
            at = (places * self.vocab_size).repeat_interleave(kinds) + self.words[entries]
            found.append((at, self.share[entries] * left[places].repeat_interleave(kinds)))
            left[places] *= self.left[i]
        p = F.embedding(ids.flatten(), self.bigrams).mul_(left[:, None])
        for at, share in found:
            p.view(-1).index_add_(0, at, share)
        return p.log_().view(*ids.shape, -1)


def make_room(ngrams, state, prefix, *_):
    """Before load_state_dict: counting decides how large the tables are."""
    for name, tensor in state.items():
        if name.startswith(prefix):
            room = torch.empty_like(tensor, device=ngrams.multipliers.device)
            ngrams.register_buffer(name.removeprefix(prefix), room)
