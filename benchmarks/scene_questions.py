"""Questions about scenes of the built-in world in the formats of the field, and a language model that can answer them.

    python benchmarks/scene_questions.py FOLDER [--training 400] [--test 500] [--steps 1500]

FOLDER gets ``conversations.json`` (LLaVA's): about each of the first scenes of ``scenes:train`` five questions, each to
be answered in a word, and the request for a caption; and ``mmmu.parquet`` (MMMU's): one such question about each of the
first scenes of ``scenes:test``. The questions are about five attributes: of the largest thing its class, colour and
position; the ground; the sky.

``lm/`` is a small causal language model in transformers' format that has learned from text alone to answer them, about
captions that stand where the image will: what LLaVA expects of its language model. How often it is right about captions
of the test scenes is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn import functional

from gmail_cli.components import scenes
from gmail_cli.components.conversations import IGNORED, IMAGE_ID, Chat, Conversation
from gmail_cli.components.questions import Question, QuestionSet

ASKED = {
    "class": "What is the largest thing?",
    "colour": "What colour is the largest thing?",
    "position": "Where is the largest thing?",
    "ground": "What is the ground?",
    "sky": "How is the sky?",
}
PROMPT = "Describe the image in one sentence."
TEXTS = 20_000
"""Scenes whose captions the language model learns from, none of them among those that are shown."""
BATCH = 32
LANGUAGE = 0.1
"""Weight of the loss over all tokens beside that over answers."""


def main() -> None:
    """Write the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--training", type=int, default=400)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1500)
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True)
    records = []
    for index in range(given.training):
        scene = scenes.sample_scene("train", index)
        turns = talk(scene)
        said = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]
        records.append({"id": scene.scene_id, "image": scene.scene_id, "conversations": said})
    (folder / "conversations.json").write_text(json.dumps(records, indent=1))
    mmmu(folder / "mmmu.parquet", given.test)
    language_model(folder / "lm", steps=given.steps, test=given.test)


def talk(scene: scenes.Scene) -> list[str]:
    """The questions about a scene, each with its answer, then the request for a caption with the first one."""
    facts, dice = scenes.attributes(scene), random.Random(f"talk/{scene.scene_id}")
    turns: list[str] = []
    for name in dice.sample(list(ASKED), len(ASKED)):
        turns += [prompt(name), facts[name]]
    turns[0] = f"<image>\n{turns[0]}"
    return [*turns, PROMPT, scenes.captions(scene)[0]]


def prompt(name: str) -> str:
    """The question about an attribute as the evaluation puts it."""
    question = Question(id=name, options=(), right=(), groups=(), text=ASKED[name])
    text = QuestionSet(benchmark="mmmu", questions=(question,), files=()).prompt(question)
    assert text is not None
    return text


def test_question(index: int) -> tuple[str, str]:
    """Which attribute of a test scene is asked for, and the answer."""
    name = random.Random(f"test/{index}").choice(list(ASKED))
    return name, scenes.attributes(scenes.sample_scene("test", index))[name]


def mmmu(file: Path, test: int) -> None:
    """MMMU's Parquet file of open questions."""
    rows = []
    for index in range(test):
        name, right = test_question(index)
        image = {"bytes": scenes.scene_bytes("test", index), "path": f"{index}.png"}
        rows.append(
            {"id": f"validation_{name}_{index}", "question": f"<image 1> {ASKED[name]}", "options": "[]"}
            | {"answer": right, "question_type": "open", "image_1": image}
        )
    pq.write_table(pa.Table.from_pylist(rows), file)


# -- the language model ------------------------------------------------------------------------------------------


def language_model(folder: Path, *, steps: int, test: int) -> None:
    """Train it on what is said of scenes' captions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    known = [scenes.sample_scene("train", 100_000 + index) for index in range(TEXTS)]
    shown = [scenes.captions(scene)[0] for scene in known]
    talks = [talk(scene)[:-2] for scene in known]
    tokenizer = tokenizer_of([*shown, *("\n".join(each) for each in talks)])
    chat = Chat(tokenizer, name="lm", image_tokens=1, limit=512)
    rows = [
        filled(*chat.tokens(Conversation(id="", image="", turns=tuple(turns))), tokenizer, caption)
        for turns, caption in zip(talks, shown, strict=True)
    ]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.05)
    dice, start = random.Random(0), time.perf_counter()
    for step in range(steps):
        ids, labels = padded(dice.sample(rows, BATCH))
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        answers = functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
        tokens = functional.cross_entropy(logits, ids[:, 1:].flatten(), ignore_index=tokenizer.pad_token_id)
        loss = answers + LANGUAGE * tokens
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            told = f"answers {answers.item():.3f}, tokens {tokens.item():.3f}"
            print(f"step {step}, loss of {told}, {time.perf_counter() - start:.0f} s", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(json.dumps({"parameters": model.num_parameters(), "right about captions": right(model.eval(), chat, test)}))


def tokenizer_of(texts: Sequence[str]) -> Any:
    """Byte-level BPE of 1,500 tokens, with case."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(texts, vocab_size=1500, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def filled(ids: list[int], labels: list[int], tokenizer: Any, caption: str) -> tuple[list[int], list[int]]:
    """Token ids of turns with a caption in the place of the image, and their labels."""
    place, words = ids.index(IMAGE_ID), tokenizer(caption)["input_ids"]
    told = [*labels[:place], *[IGNORED] * len(words), *labels[place + 1 :]]
    return [*ids[:place], *words, *ids[place + 1 :]], told


def padded(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of a batch."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([each + [0] * (longest - len(each)) for each, _ in rows])
    return ids, torch.tensor([each + [IGNORED] * (longest - len(each)) for _, each in rows])


def right(model: Any, chat: Chat, test: int) -> float:
    """The share of the test questions that it answers about the scenes' captions."""
    count = 0
    for index in range(test):
        name, answer = test_question(index)
        asking = chat.question([f"<image>\n{prompt(name)}"])
        ids, _ = filled(asking, asking, chat.tokenizer, scenes.captions(scenes.sample_scene("test", index))[0])
        made = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :]
        count += chat.tokenizer.decode(made, skip_special_tokens=True).strip() == answer
    return count / test


if __name__ == "__main__":
    main()
