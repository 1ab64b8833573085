"""A small but whole train.py, which the red team patches: the real one changes every night."""

import prepare

import torch
import torch.nn.functional as F
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, width=48):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids):
        x = F.rms_norm(self.embed(ids), (self.embed.embedding_dim,))
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        at = torch.arange(ids.size(1))
        scores = q @ k.mT / q.size(-1) ** 0.5 - 0.1 * (at[:, None] - at).abs().to(q.dtype)
        scores = scores.masked_fill(at > at[:, None], -torch.inf)
        x = x + scores.softmax(-1) @ v
        x = x + self.down(F.relu(self.up(x)))
        return self.head(x)


def main():
    with prepare.Run(400) as run:
        torch.set_num_threads(1)
        model = Model(run.vocab_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = 0
        for x, y in run.batches(4):
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.log(step, loss)
            step += 1
        run.evaluate_bpb(model)
        num_params = sum(p.numel() for p in model.parameters())
        run.report(num_steps=step, num_params=num_params, depth=1, flops_per_token=0)


if __name__ == "__main__":
    main()
