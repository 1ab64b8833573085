"""
Have the best model in the cache continue a text, a token at a time.

    uv run sample.py "The state of the union" [--commit COMMIT] [--tokens N] [--temperature T]
    uv run sample.py --bpb FILE             # bits per byte of a text file of your own
"""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import prepare
from record import kept_models
from seal import seal

CONTROL = bytes(set(range(32)) - set(b"\n\t"))      # characters that may steer a terminal

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("text", nargs="?", default="")
parser.add_argument("--commit", default="", help="another model that is kept")
parser.add_argument("--tokens", type=int, default=200)
parser.add_argument("--temperature", type=float, default=0.8)
parser.add_argument("--bpb", metavar="FILE", type=Path)
arguments = parser.parse_args()
sys.stdout = sys.stderr         # for what the agent's code prints; the text goes to descriptor 1
if arguments.bpb and not arguments.bpb.is_file():
    sys.exit(f"there is no file {arguments.bpb}")
text = arguments.bpb.read_bytes() if arguments.bpb else arguments.text.encode()

dataset = prepare.chosen_dataset().name
models = kept_models(prepare.CACHE / "models", dataset, arguments.commit)
if not models:
    which = arguments.commit or f"of {dataset}"
    sys.exit(f"no model {which} is kept; train.py keeps the best ones")
run = models[0]
path, context = run["path"], run["context"]
print("{commit}, val_bpb {val_bpb:.6f}: {description}".format(**run))
tokenizer = prepare.load_tokenizer(path, "another good run will be kept")
weights = load_file(path / "weights.safetensors")
program = (path / "train.py").read_bytes()
bos = tokenizer.n_vocab - 1
tokens = tokenizer.encode_ordinary(text.decode(errors="replace"))

# The agent's code: sealed as in its run. prepare.sweep() of a later run removes the folder.
seal(Path(__file__).resolve(), prepare.CACHE, Path(tempfile.mkdtemp(prefix="autoresearch-")))
torch.compiler.set_stance("force_eager")            # compiling takes longer than writing a page
train = {"__name__": "train"}
exec(compile(program, "train.py", "exec"), train)
h = SimpleNamespace(**train["RECIPES"][run["recipe"]] | {"vocab_size": run["vocab_size"]})
device = prepare.default_device()
model, _ = train["build"](h, context, device)
model.eval().requires_grad_(False)
model.load_state_dict(weights)

if arguments.bpb:
    nats = 0.0
    for piece in torch.tensor(tokens, dtype=torch.int64).split(context):
        x = torch.tensor([[bos, *piece[:-1]]], device=device)
        nats -= model(x)[0].float().log_softmax(-1).cpu()[range(len(piece)), piece].sum().item()
    os.write(1, f"{nats / math.log(2) / max(1, len(text)):.6f} bits per byte\n".encode())
    sys.exit()
os.write(1, text)
for _ in range(arguments.tokens):
    x = torch.tensor([[bos, *tokens[1 - context:]]], device=device)
    logits = model(x)[0, -1, :bos].float() / max(arguments.temperature, 1e-3)
    tokens.append(torch.multinomial(logits.softmax(-1), 1).item())
    os.write(1, tokenizer.decode_single_token_bytes(tokens[-1]).translate(None, CONTROL))
os.write(1, b"\n")
