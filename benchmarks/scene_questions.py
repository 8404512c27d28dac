"""Questions about scenes of the built-in world in the formats of the field, and a language model that can answer them.

    python benchmarks/scene_questions.py FOLDER [--training 400] [--test 500] [--steps 800]

FOLDER gets ``conversations.json`` (LLaVA's): about each of the first scenes of ``scenes:train`` three questions and the
request for a caption; and for the first scenes of ``scenes:test`` a question each with options in ScienceQA's layout
(``scienceqa/``) and another to be answered in a word, in MMMU's (``mmmu.parquet``). A question is about one of five
attributes: of the largest thing its class, colour and position; the ground; the sky. Those with options have the
attribute as their subject.

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
from typing import Any, Literal

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
OPTIONS = 3
ASKED_AT_ONCE = 3
PROMPT = "Describe the image in one sentence."
TEXTS = 20_000
"""Scenes whose captions the language model learns from, none of them among those that are shown."""
BATCH = 24
LANGUAGE = 0.1
"""Weight of the loss over all tokens beside that over answers."""

Values = dict[str, list[str]]


def main() -> None:
    """Write the four."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--training", type=int, default=400)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--steps", type=int, default=800)
    given = parser.parse_args()
    folder: Path = given.folder
    folder.mkdir(parents=True)
    told = [scenes.attributes(scenes.sample_scene("train", index)) for index in range(400)]
    values = {name: sorted({each[name] for each in told}) for name in ASKED}
    records = []
    for index in range(given.training):
        scene = scenes.sample_scene("train", index)
        turns = talk(scene, values)
        said = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]
        records.append({"id": scene.scene_id, "image": scene.scene_id, "conversations": said})
    (folder / "conversations.json").write_text(json.dumps(records, indent=1))
    science_qa(folder / "scienceqa", given.test, values)
    mmmu(folder / "mmmu.parquet", given.test)
    language_model(folder / "lm", values, steps=given.steps, test=given.test)


def talk(scene: scenes.Scene, values: Values) -> list[str]:
    """Some questions about a scene, each with its answer, then the request for a caption with the first one."""
    facts, dice = scenes.attributes(scene), random.Random(f"talk/{scene.scene_id}")
    turns: list[str] = []
    for name in dice.sample(list(ASKED), ASKED_AT_ONCE):
        turns += asked("scienceqa" if dice.random() < 1 / 3 else "mmmu", facts, name, values, dice)
    turns[0] = f"<image>\n{turns[0]}"
    return [*turns, PROMPT, scenes.captions(scene)[0]]


def asked(
    kind: Literal["scienceqa", "mmmu"], facts: dict[str, str], name: str, values: Values, dice: random.Random
) -> tuple[str, str]:
    """The question as the evaluation writes it, and its answer."""
    options, right = choices(facts, name, values, dice) if kind == "scienceqa" else ([], 0)
    question = Question(id=name, options=tuple(options), right=(right,), groups=(), text=ASKED[name])
    text = QuestionSet(benchmark=kind, questions=(question,), files=()).prompt(question)
    assert text is not None
    return text, "ABCDE"[right] if options else facts[name]


def choices(facts: dict[str, str], name: str, values: Values, dice: random.Random) -> tuple[list[str], int]:
    """The right value among others of the attribute, and its place."""
    others = dice.sample([each for each in values[name] if each != facts[name]], OPTIONS - 1)
    options = dice.sample([facts[name], *others], OPTIONS)
    return options, options.index(facts[name])


def test_question(kind: Literal["scienceqa", "mmmu"], index: int, values: Values) -> tuple[str, list[str], str]:
    """What is asked of a test scene: which attribute, its options, the right value."""
    facts = scenes.attributes(scenes.sample_scene("test", index))
    dice = random.Random(f"{kind}/{index}")
    name = dice.choice(list(ASKED))
    return name, choices(facts, name, values, dice)[0] if kind == "scienceqa" else [], facts[name]


def science_qa(folder: Path, test: int, values: Values) -> None:
    """ScienceQA's folder."""
    problems = {}
    for index in range(test):
        name, options, right = test_question("scienceqa", index, values)
        problems[str(index)] = {
            "question": ASKED[name],
            "choices": options,
            "answer": options.index(right),
            "hint": "",
            "image": "image.png",
            "subject": name,
            "grade": "grade1",
        }
        image = folder / "images" / "test" / str(index) / "image.png"
        image.parent.mkdir(parents=True)
        image.write_bytes(scenes.scene_bytes("test", index))
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))


def mmmu(file: Path, test: int) -> None:
    """MMMU's Parquet file of open questions."""
    rows = []
    for index in range(test):
        name, _, right = test_question("mmmu", index, {})
        image = {"bytes": scenes.scene_bytes("test", index), "path": f"{index}.png"}
        rows.append(
            {"id": f"validation_{name}_{index}", "question": f"<image 1> {ASKED[name]}", "options": "[]"}
            | {"answer": right, "question_type": "open", "image_1": image}
        )
    pq.write_table(pa.Table.from_pylist(rows), file)


# -- the language model ------------------------------------------------------------------------------------------


def language_model(folder: Path, values: Values, *, steps: int, test: int) -> None:
    """Train it on what is said of scenes' captions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    known = [scenes.sample_scene("train", 100_000 + index) for index in range(TEXTS)]
    shown = [scenes.captions(scene)[0] for scene in known]
    talks = [talk(scene, values)[:-2] for scene in known]
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
    right = {kind: answered(model.eval(), chat, kind, values, test) for kind in ("scienceqa", "mmmu")}
    print(json.dumps({"parameters": model.num_parameters(), "right about captions": right}))


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


def answered(model: Any, chat: Chat, kind: Literal["scienceqa", "mmmu"], values: Values, test: int) -> float:
    """The share of the test questions that it answers about the scenes' captions."""
    right = 0
    for index in range(test):
        scene = scenes.sample_scene("test", index)
        name, options, value = test_question(kind, index, values)
        question = Question(id=name, options=tuple(options), right=(0,), groups=(), text=ASKED[name])
        text = QuestionSet(benchmark=kind, questions=(question,), files=()).prompt(question)
        asking = chat.question([f"<image>\n{text}"])
        ids, _ = filled(asking, asking, chat.tokenizer, scenes.captions(scene)[0])
        made = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :]
        given = chat.tokenizer.decode(made, skip_special_tokens=True).strip()
        right += given == ("ABCDE"[options.index(value)] if options else value)
    return right / test


if __name__ == "__main__":
    main()
