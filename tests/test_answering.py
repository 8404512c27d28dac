"""LLaVA models answer ScienceQA and MMMU: what is asked, what is answered from, and what `gmail eval` makes of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_training import IMAGES, SIDE, World
from test_heads import TEXTS, pairs_of
from test_llava import DIM, TOKENS, arm_of, images, job_of
from transformers import GPT2Config, GPT2LMHeadModel

from gmail_cli.artifacts import Artifact
from gmail_cli.components import scenes
from gmail_cli.components.conversations import Conversation
from gmail_cli.components.heads import load_lm
from gmail_cli.components.llava import Llava, answer_questions
from gmail_cli.components.loop import Recipe, fit
from gmail_cli.components.questions import Question, QuestionSet, read_questions
from gmail_cli.components.tokenizer import save_tokenizer, train_tokenizer
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import build
from gmail_cli.stages import embed, evaluate, score, train

LETTER = "Answer with the option's letter from the given choices directly."


def science_qa(folder: Path) -> Path:
    """Three test questions, the second and third with an image."""
    base = {"choices": ["a ball", "a cube"], "answer": 1, "subject": "natural science", "grade": "grade2"}
    problems = {
        "7": {**base, "question": "Which is round?", "hint": "Look.", "image": None, "answer": 0},
        "8": {**base, "question": "What is it?", "hint": "", "image": "image.png"},
        "9": {**base, "question": "What is it?", "hint": "", "image": "image.png", "grade": "grade9"},
    }
    for key in ("8", "9"):
        (folder / "images" / "test" / key).mkdir(parents=True)
        (folder / "images" / "test" / key / "image.png").write_bytes(scenes.scene_bytes("test", int(key), size=SIDE))
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
    return folder


def mmmu(file: Path) -> Path:
    """A choice about an image, a choice among images, and an open question."""
    picture = {"bytes": scenes.scene_bytes("test", 3, size=SIDE), "path": "one.png"}
    rows = [
        ("validation_Math_1", "Which <image 1>?", "['1', '2']", "B", "multiple-choice"),
        ("validation_Math_2", "Which?", "['<image 1>', '<image 2>']", "A", "multiple-choice"),
        ("validation_Math_3", "How many in <image 1>?", "[]", "7", "open"),
    ]
    columns = ("id", "question", "options", "answer", "question_type")
    table = pa.Table.from_pylist([{**dict(zip(columns, row, strict=True)), "image_1": picture} for row in rows])
    pq.write_table(table, file)
    return file


def test_questions_are_put_as_the_evaluations_of_llava_put_them(tmp_path: Path) -> None:
    asked = read_questions(science_qa(tmp_path))
    assert asked.prompt(asked.questions[0]) == (
        f"Context: Look.\nQuestion: Which is round?\nOptions: (A) a ball (B) a cube\n{LETTER}"
    )
    assert asked.prompt(asked.questions[1]) == (
        f"Context: N/A\nQuestion: What is it?\nOptions: (A) a ball (B) a cube\n{LETTER}"
    )
    shown = [question.image and question.image() for question in asked.questions]
    assert shown == [None, *(scenes.scene_bytes("test", key, size=SIDE) for key in (8, 9))]
    assert len(asked.files) == 4
    others = read_questions(mmmu(tmp_path / "m.parquet"))
    assert [others.prompt(question) for question in others.questions] == [
        f"Which <image 1>?\n(A) 1\n(B) 2\n\n{LETTER}",
        None,
        "How many in <image 1>?\nAnswer the question using a single word or phrase.",
    ]
    assert others.questions[2].image is not None
    assert others.questions[2].image() == scenes.scene_bytes("test", 3, size=SIDE)
    problems = json.loads((tmp_path / "problems.json").read_text())
    problems["8"]["image"] = "../../../../../etc/passwd"
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(InputError, match="leaves the folder"):
        read_questions(tmp_path)


@functools.cache
def language_model(folder: Path, *, positions: int) -> Path:
    """Two layers with random weights that read as many tokens."""
    texts = [*TEXTS, LETTER, "Context: N/A Question: What is it? Options: (A) a ball (B) a cube USER: ASSISTANT: A B"]
    tokenizer = train_tokenizer(texts, entries=640)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=32, n_head=2, n_positions=positions)
    GPT2LMHeadModel(GPT2Config(**{**config.to_dict(), **ends, **drops})).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def model_of(folder: Path, *, instructed: bool = True) -> Llava:
    lm, tokenizer = load_lm(folder)
    about = {"lm": "mini", "lm_revision": "", "image_tokens": TOKENS, "prompt": "what", "instructed": instructed}
    torch.manual_seed(0)
    return Llava(DIM, lm=lm, tokenizer=tokenizer, about=about, lora_rank=8, lora_alpha=16.0).eval()


def of_pictures(right: Sequence[int], *, benchmark: Any = "scienceqa") -> QuestionSet:
    """Questions that only the image tells apart: picture ``number`` shows what is right."""
    found = [
        Question(
            id=str(number),
            options=("a ball", "a cube"),
            right=(choice,),
            groups=(),
            text="What is it?",
            image=functools.partial(bytes, [number]),
        )
        for number, choice in enumerate(right)
    ]
    return QuestionSet(benchmark=benchmark, questions=tuple(found), files=())


def see(pictures: Sequence[bytes]) -> torch.Tensor:
    return images()[[picture[0] for picture in pictures]]


def test_it_answers_from_the_image(tmp_path: Path) -> None:
    right, model = (0, 1, 1, 0), model_of(language_model(tmp_path, positions=160))
    asked = of_pictures(right)
    prompt = asked.prompt(asked.questions[0])
    owners = pairs_of(TEXTS, labels=(-1,) * 4, names=()).records
    talks = [
        Conversation(id=owner, image=owner, turns=(f"<image>\n{prompt}", "AB"[choice]))
        for owner, choice in zip(owners, right, strict=True)
    ]
    recipe = Recipe(steps=60, batch_size=4, lr=1e-2, restart_lr=1e-2)
    job = job_of(model, arm_of(images()), recipe=recipe, talks=talks, conversation_tokens=160)
    fit(model, loss=job.loss, rows=job.rows, recipe=recipe)
    found = answer_questions(model, asked, see=see, batch_size=3)
    assert found == {"0": "a", "1": "b", "2": "b", "3": "a"}  # its tokenizer knows no capitals
    turned = answer_questions(model, asked, see=lambda pictures: see(pictures).roll(1, 0))
    assert turned == {"0": "a", "1": "a", "2": "b", "3": "b"}
    blind = QuestionSet(benchmark="mmmu", questions=(Question(**_pictures_as_options()),), files=())
    assert answer_questions(model, blind, see=see) == {"x": ""}


def _pictures_as_options() -> dict[str, Any]:
    options = ("<image 1>", "<image 2>")
    return {"id": "x", "options": options, "right": (0,), "groups": (), "text": "Which?"}


def test_what_cannot_be_asked_is_named(tmp_path: Path) -> None:
    asked = of_pictures((0,))
    with pytest.raises(InputError, match=r"question 0 has \d+ tokens, and mini reads 40"):
        answer_questions(model_of(language_model(tmp_path, positions=40)), asked, see=see)
    with pytest.raises(InputError, match="learned captions alone"):
        answer_questions(model_of(tmp_path, instructed=False), asked, see=see)
    bare = QuestionSet(benchmark="mmmu", questions=(Question(**{**_pictures_as_options(), "text": " "}),), files=())
    with pytest.raises(InputError, match="question x has no text to ask"):
        bare.prompt(bare.questions[0])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    made = World(folder).make()
    language_model(folder / "reader", positions=200)
    science_qa(folder / "sqa")
    mmmu(folder / "mmmu.parquet")
    return made


def evaluated(world: World, *, trained: Artifact, **changes: Any) -> Artifact:
    data = {"train": "scenes:train", "train_limit": IMAGES, "test": "scenes:test", "test_limit": 4, "scene_size": SIDE}
    chosen = {
        "caption_tokens": 4,
        "answer_tokens": 6,
        "resamples": 100,
        "meteor": "off",
        "clip_score": False,
        "questions": [str(world.folder / "sqa"), str(world.folder / "mmmu.parquet")],
    }
    profile = build(
        {
            "data": data,
            "model": {"clip": str(world.folder / "clip")},
            "embed": {"gap_count": 0},
            "eval": {**chosen, **changes},
            "runtime": {"device": "cpu"},
        }
    )
    tables = embed.run(profile, world.workspace, train=trained)
    return evaluate.run(profile, world.workspace, embeddings=tables, train=trained)


@pytest.mark.parametrize("visual", ["patches", "pooled"])
def test_the_evaluation_asks_marks_and_keeps_the_answers(world: World, visual: str) -> None:
    settings = {"tasks": ["llava"], "arms": ["real"], "steps": 4, "visual_grid": 2, "seeds": [0, 1], "visual": visual}
    profile = world.profile(**settings, lm=str(world.folder / "reader"))
    made = evaluated(world, trained=train.run(profile, world.workspace, **world.inputs()))
    results = made.read_json("results.json")
    rows = {(row["seed"], row["metric"]): row for row in results["rows"]}
    for benchmark, path in (("scienceqa", world.folder / "sqa"), ("mmmu", world.folder / "mmmu.parquet")):
        values = []
        for seed in (0, 1):
            file = made.file(f"predictions/llava.real.seed{seed}.{benchmark}.json")
            found = score.questions(path, predictions=file)
            for metric, value in found.metrics.items():
                assert rows[seed, f"{benchmark}_{metric}"]["value"] == pytest.approx(value)
            assert rows[seed, f"{benchmark}_accuracy"]["n"] == 3
            values.append(found.metrics["accuracy"])
        whole = next(row for row in results["aggregates"] if row["metric"] == f"{benchmark}_accuracy")
        assert whole["mean"] == pytest.approx(sum(values) / 2)
        assert whole["low"] <= whole["mean"] <= whole["high"]
    assert "ScienceQA accuracy" in made.file("report.html").read_text()
    assert rows[0, "scienceqa_grades_7_to_12_accuracy"]["n"] == 1


def test_questions_that_cannot_be_evaluated_are_refused(world: World, tmp_path: Path) -> None:
    plain = build({"eval": {"questions": [str(world.folder / "sqa")]}})
    key = evaluate.plan_key(plain, embeddings="0" * 64)
    assert {"scienceqa"} <= set(key.inputs)
    assert "questions" not in key.settings
    assert "answer_tokens" not in evaluate.plan_key(build({}), embeddings="0" * 64).settings
    with pytest.raises(UsageError, match="names scienceqa twice"):
        evaluate.plan_key(build({"eval": {"questions": [str(world.folder / "sqa")] * 2}}), embeddings="0" * 64)
    science_qa(tmp_path)
    (tmp_path / "images" / "test" / "8" / "image.png").write_bytes(b"another")
    moved = evaluate.plan_key(build({"eval": {"questions": [str(tmp_path)]}}), embeddings="0" * 64)
    assert moved.inputs["scienceqa"] != key.inputs["scienceqa"]
    (tmp_path / "images" / "test" / "9" / "image.png").unlink()
    with pytest.raises(InputError, match=r"9/image.png' does not exist"):
        evaluate.plan_key(
            build({"eval": {"questions": [str(tmp_path)], "question_split": "test", "beams": 2}}), embeddings="0" * 64
        )
    probe = train.run(world.profile(tasks=["linear-probe"], arms=["real"], steps=2), world.workspace, **world.inputs())
    with pytest.raises(InputError, match="no model here answers them"):
        evaluated(world, trained=probe)
