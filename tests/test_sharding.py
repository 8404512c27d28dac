"""A language model shared out among gloo processes: the curve of one process, checkpoints for any number of them."""

from __future__ import annotations

import gc
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_heads import TEXTS
from test_llava import DIM, TALK, TOKENS, job_of
from test_loop import FileCheckpoints
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gmail_cli.components import loop, parallel
from gmail_cli.components.arms import Arm, View
from gmail_cli.components.conversations import Conversation
from gmail_cli.components.heads import load_lm
from gmail_cli.components.llava import Llava
from gmail_cli.components.loop import Recipe, fit
from gmail_cli.components.pairs import Candidates
from gmail_cli.components.tokenizer import save_tokenizer, train_tokenizer

SELF = Path(__file__)
RECIPE = Recipe(steps=7, batch_size=6, lr=1e-2, restart=2, restart_lr=1e-2, ema=0.9, warmup=1, log_every=1)
"""Two steps of captions, in which the language model's update sleeps, and five of conversations."""
LEGS = {  # processes, whether they are to share the language model out, and the step after which they die
    "tied": [(2, True, 4), (3, True, 6), (1, False, None)],
    "untied": [(1, True, 3), (2, True, None)],
}


def save_lm(folder: Path, *, tied: bool) -> None:
    """A language model with random weights: GPT-2, whose first layer is its last one too, or Llama."""
    tokenizer = train_tokenizer([*TEXTS, *TALK.turns, "user assistant what"], entries=620)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    lm: PreTrainedModel
    if tied:
        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        lm = GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=64, n_head=2, n_positions=64, **ends, **drops)
        )
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 150, "num_hidden_layers": 2, "max_position_embeddings": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads, **ends))
    lm.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def train(
    folder: Path, lm_folder: Path, *, sharded: bool, shared: bool, log: Callable[[Llava, Any], None] | None = None
) -> list[dict[str, float]]:
    """Train a LLaVA model on images of both flows and write it into ``folder/model``."""
    lm, tokenizer = load_lm(lm_folder, empty=sharded and parallel.ranks().rank > 0)
    about = {"lm": "lm", "lm_revision": "", "image_tokens": TOKENS, "prompt": "what", "instructed": True}
    torch.manual_seed(0)
    model = Llava(DIM, lm=lm, tokenizer=tokenizer, about=about, dual=True, lora_rank=2, lora_alpha=4.0).eval()
    if sharded:
        parallel.shard(model, model.lm, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    shows = Candidates.of([[row] for row in range(4)])
    views = [View(torch.randn(4, TOKENS, DIM, generator=generator), shows, real=real) for real in (True, False)]
    talks = [TALK, *[Conversation(id=text, image=None, turns=("what is it", text)) for text in TEXTS]]
    job = job_of(model, Arm(tuple(views), share=0.5), recipe=RECIPE, talks=talks)
    curve = fit(
        model,
        loss=job.loss,
        rows=job.rows,
        recipe=RECIPE,
        checkpoints=FileCheckpoints(folder / "checkpoint.safetensors"),
        checkpoint_seconds=0.0,
        shared=shared,
        log=(lambda rows: log(model, rows)) if log else None,
    )
    if parallel.ranks().rank == 0:
        (folder / "model").mkdir()
        job.export(folder / "model")
    return curve


def held(model: Llava) -> dict[str, int]:
    """How many values of the language model this process holds, of its gradients and of AdamW's moments; and the bytes
    of all tensors there are in it, and the number of modules that are gathered one at a time."""

    def count(tensors: Any) -> int:
        return sum(each.to_local().numel() if isinstance(each, DTensor) else each.numel() for each in tensors)

    gc.collect()
    objects = gc.get_objects()
    parameters = list(model.lm.parameters())
    (adam,) = (each for each in objects if type(each) is torch.optim.AdamW)
    plain = [each for each in objects if type(each) in (torch.Tensor, torch.nn.Parameter)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in plain}
    return {
        "weights": count(parameters),
        "gradients": count(each.grad for each in parameters if each.grad is not None),
        "moments": count(adam.state[each]["exp_avg"] for each in parameters if each in adam.state),
        "bytes": sum(storages.values()),
        "units": sum(isinstance(each, FSDPModule) for each in model.modules()),
    }


def leg(home: Path, kind: str, *, count: int, number: int, port: int, sharded: bool, dies: int | None) -> None:
    """What one process of a leg does."""
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    folder = home / f"together-{kind}"

    def log(model: Llava, rows: list[dict[str, float]]) -> None:
        if len(rows) == (dies or RECIPE.steps - 1):
            (folder / f"held-{count}-{number}.json").write_text(json.dumps(held(model)))
        if len(rows) == dies:
            os._exit(0)

    curve = train(folder, home / kind, sharded=sharded, shared=True, log=log)
    if number == 0:
        (folder / "curve.json").write_text(json.dumps(curve))


def test_a_shared_language_model_learns_as_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", math.inf)
    for kind in LEGS:
        save_lm(tmp_path / kind, tied=kind == "tied")
        for runs in ("together", "alone"):
            (tmp_path / f"{runs}-{kind}").mkdir()
    environment = os.environ | {"PYTHONPATH": f"{SELF.parents[1]}:{SELF.parent}", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, str(SELF), str(tmp_path)], env=environment) as run:
        curves = {k: train(tmp_path / f"alone-{k}", tmp_path / k, sharded=False, shared=False) for k in LEGS}
        assert run.wait(timeout=300) == 0
    for kind, legs in LEGS.items():
        alone, together = tmp_path / f"alone-{kind}", tmp_path / f"together-{kind}"
        given = json.loads((together / "curve.json").read_text())
        for column in given[0]:
            wanted = [row[column] for row in curves[kind]]
            assert [row[column] for row in given] == pytest.approx(wanted, abs=1e-5), column
        for name in ("model/projector", "model/adapter/adapter_model", "checkpoint"):
            weights = [load_file(made / f"{name}.safetensors") for made in (alone, together)]
            assert weights[0].keys() == weights[1].keys()
            for key, value in weights[0].items():
                torch.testing.assert_close(weights[1][key], value, atol=1e-4, rtol=0)
        found = {
            count: [json.loads((together / f"held-{count}-{number}.json").read_text()) for number in range(count)]
            for count, _, _ in legs
        }
        (whole,) = found.pop(1)
        for count, shares in found.items():
            for what, slack in (("weights", 0.02), ("gradients", 0.1), ("moments", 0.1)):
                assert sum(each[what] for each in shares) == whole[what] > 0
                assert max(each[what] for each in shares) <= (1 / count + slack) * whole[what], (count, what)
            assert {each["units"] for each in shares} == {5}  # two layers, both ends and the rest
            least = 0.95 * 4 * whole["weights"] * (1 - 1 / count)
            assert min(whole["bytes"] - each["bytes"] for each in shares) >= least


if __name__ == "__main__":
    loop.CHECKPOINT_SHARE = math.inf
    home = Path(sys.argv[1])
    for kind, legs in LEGS.items():
        for count, sharded, dies in legs:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            children = []
            for number in range(count):
                children.append(os.fork())
                if children[-1] == 0:
                    leg(home, kind, count=count, number=number, port=port, sharded=sharded, dies=dies)
                    os._exit(0)
            ends = [os.waitpid(child, 0)[1] for child in children]
            if any(ends):
                sys.exit(1)
            saved = int(load_file(home / f"together-{kind}" / "checkpoint.safetensors")["step"])
            assert saved == (dies or RECIPE.steps) - 1
