"""Questions about scenes of the built-in world, in the formats of the field: what `llava` is taught and asked.

    python benchmarks/scene_questions.py FOLDER [TRAINING] [TEST]

FOLDER gets ``conversations.json`` (LLaVA's): about each of the first TRAINING (400) scenes of ``scenes:train`` three
questions and the request for a caption; and for the first TEST (500) scenes of ``scenes:test`` a question each with
options in ScienceQA's layout (``scienceqa/``) and another to be answered in a word, in MMMU's (``mmmu.parquet``). A
question is about one of five attributes: of the largest thing its class, colour and position; the ground; the sky. Those
with options have the attribute as their subject.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from gmail_cli.components import scenes
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


def main() -> None:
    """Write the three."""
    folder = Path(sys.argv[1])
    training, test = (int(given) for given in (*sys.argv[2:4], *("400", "500")[len(sys.argv) - 2 :]))
    folder.mkdir(parents=True)
    told = [scenes.attributes(scenes.sample_scene("train", index)) for index in range(training)]
    values = {name: sorted({each[name] for each in told}) for name in ASKED}
    conversations = []
    for index, facts in enumerate(told):
        turns = []
        for turn, name in enumerate(random.Random(f"order/{index}").sample(list(ASKED), ASKED_AT_ONCE)):
            dice = random.Random(f"train/{index}/{name}")
            text, answer = asked("scienceqa" if (index + turn) % 3 == 0 else "mmmu", facts, name, values, dice)
            turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        scene = scenes.sample_scene("train", index).scene_id
        turns += [
            {"from": "human", "value": PROMPT},
            {"from": "gpt", "value": scenes.captions(scenes.sample_scene("train", index))[0]},
        ]
        conversations.append({"id": scene, "image": scene, "conversations": turns})
    (folder / "conversations.json").write_text(json.dumps(conversations, indent=1))
    science_qa(folder / "scienceqa", test, values)
    mmmu(folder / "mmmu.parquet", test)


def asked(
    kind: Literal["scienceqa", "mmmu"],
    facts: dict[str, str],
    name: str,
    values: dict[str, list[str]],
    dice: random.Random,
) -> tuple[str, str]:
    """The question as the evaluation writes it, and its answer."""
    options, right = choices(facts, name, values, dice) if kind == "scienceqa" else ([], 0)
    question = Question(id=name, options=tuple(options), right=(right,), groups=(), text=ASKED[name])
    text = QuestionSet(benchmark=kind, questions=(question,), files=()).prompt(question)
    assert text is not None
    return text, "ABCDE"[right] if options else facts[name]


def choices(
    facts: dict[str, str], name: str, values: dict[str, list[str]], dice: random.Random
) -> tuple[list[str], int]:
    """The right value among others of the attribute, and its place."""
    others = dice.sample([each for each in values[name] if each != facts[name]], OPTIONS - 1)
    options = dice.sample([facts[name], *others], OPTIONS)
    return options, options.index(facts[name])


def science_qa(folder: Path, test: int, values: dict[str, list[str]]) -> None:
    """ScienceQA's folder."""
    problems = {}
    for index in range(test):
        facts = scenes.attributes(scenes.sample_scene("test", index))
        dice = random.Random(f"test/{index}")
        name = dice.choice(list(ASKED))
        options, right = choices(facts, name, values, dice)
        problems[str(index)] = {
            "question": ASKED[name],
            "choices": options,
            "answer": right,
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
        facts = scenes.attributes(scenes.sample_scene("test", index))
        name = random.Random(f"open/{index}").choice(list(ASKED))
        image = {"bytes": scenes.scene_bytes("test", index), "path": f"{index}.png"}
        rows.append(
            {"id": f"validation_{name}_{index}", "question": f"<image 1> {ASKED[name]}", "options": "[]"}
            | {"answer": facts[name], "question_type": "open", "image_1": image}
        )
    pq.write_table(pa.Table.from_pylist(rows), file)


if __name__ == "__main__":
    main()
