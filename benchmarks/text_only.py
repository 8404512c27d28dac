"""A captioner trained on texts alone, with noise or a memory, on made-up embeddings with a gap between modalities.

    python benchmarks/text_only.py

Prints, for each noise, the loss and the share of exact captions: of the texts it learned, of images as they are, and of
images seen through the memory of all texts.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from gmail_cli.components.arms import Arm, View
from gmail_cli.components.heads import Captioner, generate_captions
from gmail_cli.components.loop import Recipe, fit
from gmail_cli.components.pairs import Candidates, Pairs
from gmail_cli.components.tasks import clipcap_job
from gmail_cli.components.tokenizer import train_tokenizer

COLOURS, THINGS = ("red", "blue", "green", "white", "black", "pink"), ("ball", "cube", "tree", "house")
TEXTS = tuple(f"a {colour} {thing}" for colour in COLOURS for thing in THINGS)
DIM, IMAGES = 16, 4


def main() -> None:
    """One line for each noise."""
    drawn = torch.Generator().manual_seed(0)
    parts = [functional.normalize(torch.randn(n, DIM, generator=drawn), dim=-1) for n in (len(COLOURS), len(THINGS), 1)]
    texts = functional.normalize((parts[0][:, None] + parts[1][None]).flatten(0, 1), dim=-1)
    spread = 0.08 * torch.randn(IMAGES * len(TEXTS), DIM, generator=drawn)
    images = functional.normalize(texts.repeat(IMAGES, 1) + 0.5 * parts[2] + spread, dim=-1)
    rows, count = Candidates.of([[row] for row in range(len(TEXTS))]), len(TEXTS)
    pairs = Pairs(
        texts=TEXTS,
        records=tuple(map(str, range(count))),
        owners=torch.arange(count),
        text_ids=torch.arange(count),
        labels=torch.full((count,), -1),
        class_names=(),
        real=rows,
        generated=rows,
    )
    tokenizer = train_tokenizer(TEXTS, entries=560)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=32, n_head=2, n_positions=48, **ends, **drops)

    def right(captioner: Captioner, features: torch.Tensor) -> float:
        written = generate_captions(captioner, features, max_tokens=8)
        return sum(a == b for a, b in zip(written, TEXTS * (len(features) // count), strict=True)) / len(features)

    print("noise\tloss\ttexts\timages\tmemory")
    for noise in (0.0, 0.1, 0.2, 0.3):
        torch.manual_seed(0)
        lm = GPT2LMHeadModel(config).eval()
        captioner = Captioner(DIM, lm=lm, tokenizer=tokenizer, lm_name="mini", prefix_length=4, tune_lm=True)
        arm = Arm((View(texts, rows, real=True),), noise=noise)
        job = clipcap_job(captioner, pairs, arm, meeting=None, caption_tokens=16)
        curve = fit(captioner, loss=job.loss, rows=job.rows, recipe=Recipe(steps=150, batch_size=count, lr=5e-3))
        plain = [right(captioner, texts), right(captioner, images)]
        captioner.memory = texts
        shares = [*plain, right(captioner, images)]
        print(f"{noise}\t{curve[-1]['loss']:.3f}\t" + "\t".join(f"{share:.3f}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
