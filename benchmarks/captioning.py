"""Caption metrics of this package beside pycocoevalcap: equality and time.

    python benchmarks/captioning.py CAPTIONS.json [--images 5000] [--meteor] [--sets near far first]

CAPTIONS.json is in COCO's captions format. Three sets of captions are scored: the first reference of the same
image with words left out (near) and another image's first reference (far) against all references, and every
image's first reference against its others (first). Needs ``pycocoevalcap``; tokens are compared too when Java
is installed, and METEOR needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from gmail_cli.components.metrics.captioning import METRICS, score_captions
from gmail_cli.components.metrics.ptb import tokenise

SETS = ("near", "far", "first")


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = run()
    return result, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captions", type=Path)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--meteor", action="store_true")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="which captions to score")
    options = parser.parse_args()

    references: dict[str, list[str]] = {}
    for row in json.loads(options.captions.read_text())["annotations"]:
        references.setdefault(str(row["image_id"]), []).append(row["caption"])
    references = dict(list(references.items())[: options.images])
    ids = list(references)
    rng = random.Random(0)
    near = {i: " ".join(w for w in references[i][0].split() if rng.random() > 0.2) for i in ids}
    far = {i: references[ids[k - 1]][0] for k, i in enumerate(ids)}
    print(f"{len(ids)} images, {sum(map(len, references.values()))} references, {os.cpu_count()} cores")

    def tokens(texts: dict[str, list[str]]) -> dict[str, list[str]]:
        return PTBTokenizer().tokenize({i: [{"caption": t} for t in rows] for i, rows in texts.items()})

    if shutil.which("java"):
        theirs, seconds = timed(lambda: tokens(references))
        ours = {i: [tokenise(text) for text in texts] for i, texts in references.items()}
        wrong = sum(a != b for i in ids for a, b in zip(ours[i], theirs[i], strict=True))
        print(f"tokens: {wrong} captions differ; Java tokeniser {seconds:.2f} s")
    else:
        theirs = {i: [tokenise(text) for text in texts] for i, texts in references.items()}
        print("tokens: not compared, no Java")

    first = {i: references[i][0] for i in ids}
    others = {i: texts[1:] for i, texts in references.items()}
    sets = {"near": (references, near), "far": (references, far), "first": (others, first)}
    for name in options.sets:
        against, hypotheses = sets[name]
        truths = {i: theirs[i][-len(texts) :] for i, texts in against.items()}
        metrics = METRICS if options.meteor else tuple(metric for metric in METRICS if metric != "meteor")
        tokenise("")
        found, seconds = timed(lambda: score_captions(against, hypotheses, metrics=metrics))  # noqa: B023
        print(f"{name}: ours {seconds:.2f} s" + "".join(f"\n  {why}" for why in found.absent.values()))
        captions = {i: [tokenise(text)] for i, text in hypotheses.items()}
        peers = [("bleu", Bleu(4)), ("rouge_l", Rouge()), ("cider", Cider())]
        if "meteor" in found.corpus:
            peers.append(("meteor", Meteor()))
        for metric, peer in peers:
            (score, each), seconds = timed(lambda: peer.compute_score(truths, captions))  # noqa: B023
            names = [f"bleu_{n}" for n in range(1, 5)] if metric == "bleu" else [metric]
            scores = score if metric == "bleu" else [score]
            for full_name, value in zip(names, scores, strict=True):
                difference = abs(found.corpus[full_name] - value)
                print(f"  {full_name:8} {value:.6f}  differs by {difference:.1e}")
            if metric in found.per_image:
                apart = float(np.abs(found.per_image[metric] - np.asarray(each)).max())
                print(f"  {'':8} per image by at most {apart:.1e}; pycocoevalcap {seconds:.2f} s")
            else:
                print(f"  {'':8} pycocoevalcap {seconds:.2f} s")


if __name__ == "__main__":
    main()
