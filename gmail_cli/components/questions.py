"""Readers of question sets (ScienceQA, MMMU) and of what models answered; how a question is put to a model."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gmail_cli.components.captions.formats import read_json
from gmail_cli.components.captions.sources import inside
from gmail_cli.components.metrics import answers
from gmail_cli.errors import InputError

DISCIPLINES = {
    "art_and_design": ("Art", "Art_Theory", "Design", "Music"),
    "business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "health_and_medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "humanities_and_social_science": ("History", "Literature", "Psychology", "Sociology"),
    "tech_and_engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
"""MMMU's disciplines and their subjects (Yue et al. 2024)."""
_SHOWN = 5
_LETTER = "Answer with the option's letter from the given choices directly."
_PHRASE = "Answer the question using a single word or phrase."
_MARK = "<image"
"""How MMMU writes of an image among its texts: ``<image 1>``."""
_IMAGE = "image_1"
"""Column of MMMU's first image, the one a model of one image is shown."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question.

    Attributes:
        id: Unique in its set.
        options: What to choose from; empty for an open question.
        right: The right options' numbers, or the right texts of an open question.
        groups: What it is counted under, beside all: ``natural_science``, ``with_image`` and so on.
        text: The question itself.
        context: What is told before it.
        image: Reads the image it is about, encoded; None where it has none.
    """

    id: str
    options: tuple[str, ...]
    right: tuple[int | str, ...]
    groups: tuple[str, ...]
    text: str = ""
    context: str = ""
    image: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """Questions of one benchmark, and the files that hold them and their images."""

    benchmark: Literal["scienceqa", "mmmu"]
    questions: tuple[Question, ...]
    files: tuple[Path, ...]

    def prompt(self, question: Question) -> str | None:
        """What a model is asked, as the evaluations of LLaVA write it: LLaVA's own for ScienceQA ("CQM"), MMMU's.

        None for MMMU's questions with several images among their options, which MMMU puts to no model of one image and
        counts as guessed.

        Raises:
            InputError: The question has no text.
        """
        if not question.text.strip():
            raise InputError(f"question {question.id} has no text to ask", hint="Give the benchmark's own files.")
        letters = [f"({letter}) {option}" for letter, option in zip(answers.LETTERS, question.options, strict=False)]
        if self.benchmark == "scienceqa":
            context = question.context.strip() or "N/A"
            return f"Context: {context}\nQuestion: {question.text}\nOptions: {' '.join(letters)}\n{_LETTER}"
        if sum(_MARK in option for option in question.options) > 1:
            return None
        if not letters:
            return f"{question.text}\n{_PHRASE}"
        return "\n".join([question.text, *letters, "", _LETTER])

    def mark(self, question: Question, response: str) -> tuple[float, bool]:
        """How right a response is (0, 1, or the chance of a guess where MMMU guesses), and whether it names one."""
        if not question.options:
            return float(answers.mmmu_open(response, answers=[str(each) for each in question.right])), True
        if self.benchmark == "scienceqa":
            given = answers.science_qa_choice(response, choices=len(question.options))
            return float(given in question.right), given is not None
        given = answers.mmmu_choice(response, options=question.options)
        if given is None:
            return len(question.right) / len(question.options), False
        return float(given in question.right), True


def read_questions(path: Path, *, split: str = "test") -> QuestionSet:
    """ScienceQA's folder (``problems.json`` and ``pid_splits.json``), or Parquet files of MMMU.

    Args:
        path: The folder or file; a folder of Parquet files is read whole.
        split: Of ScienceQA.

    Raises:
        InputError: It is neither, or holds a bad record.
    """
    if path.is_dir() and (path / "problems.json").is_file():
        return _science_qa(path, split)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    if not files:
        raise InputError(
            f"{path} is no set of questions",
            hint="Give ScienceQA's folder (problems.json, pid_splits.json), or Parquet files of MMMU.",
        )
    found = [question for file in files for question in _mmmu(file)]
    ids = [question.id for question in found]
    double = next((each for each in ids if ids.count(each) > 1), None) if len(set(ids)) < len(ids) else None
    if double is not None:
        raise InputError(f"{path} holds question {double!r} twice", hint="Give the files of one split.")
    return QuestionSet(benchmark="mmmu", questions=tuple(found), files=tuple(files))


def _science_qa(folder: Path, split: str) -> QuestionSet:
    problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    if not isinstance(splits, dict) or split not in splits:
        there = ", ".join(splits) if isinstance(splits, dict) else "none"
        raise InputError(f"{folder}/pid_splits.json has no split {split!r}", hint=f"There are: {there}.")
    found, files = [], [folder / "problems.json", folder / "pid_splits.json"]
    for key in map(str, splits[split]):
        record = problems.get(key) if isinstance(problems, dict) else None
        options, right = (record.get("choices"), record.get("answer")) if isinstance(record, dict) else (None, None)
        if not isinstance(options, list) or type(right) is not int or not 0 <= right < len(options) <= 5:
            raise InputError(f"{folder}/problems.json: problem {key} has no choices with the number of the right one")
        assert isinstance(record, dict)
        image = None
        if record.get("image"):
            file = inside(folder, f"images/{split}/{key}/{record['image']}")
            image, files = functools.partial(_image_file, file, key), [*files, file]
        found.append(
            Question(
                id=key,
                options=tuple(map(str, options)),
                right=(right,),
                groups=_science_qa_groups(record),
                text=str(record.get("question") or ""),
                context=str(record.get("hint") or ""),
                image=image,
            )
        )
    return QuestionSet(benchmark="scienceqa", questions=tuple(found), files=tuple(files))


def _image_file(file: Path, key: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        hint = "ScienceQA's images belong in images/<split>/<id>/ of its folder."
        raise InputError(f"the image of question {key}, {file}, cannot be read: {error.strerror}", hint=hint) from error


def _science_qa_groups(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Subject, kinds of context and grades, as the columns of ScienceQA's table (Lu et al. 2022)."""
    groups = [str(record["subject"]).replace(" ", "_")] if record.get("subject") else []
    text, image = bool(record.get("hint")), bool(record.get("image"))
    groups += ["text_context"] * text + ["image_context"] * image + ["no_context"] * (not text and not image)
    grade = str(record.get("grade", "")).removeprefix("grade")
    if grade.isdecimal():
        groups.append("grades_1_to_6" if int(grade) <= 6 else "grades_7_to_12")
    return tuple(groups)


def _mmmu(file: Path) -> list[Question]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["id", "options", "answer", "question_type"]
    try:
        there = pq.read_schema(file).names
        columns += ["question"] * ("question" in there)
        rows = pq.read_table(file, columns=columns, partitioning=None).to_pylist()
        # The small part of an image's column says whether there is one.
        shown = pq.ParquetFile(file).read([f"{_IMAGE}.path"])[_IMAGE].to_pylist() if _IMAGE in there else []
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"cannot read {file} as MMMU: {' '.join(str(error).split())[:200]}",
            hint="MMMU's Parquet files have id, options, answer and question_type.",
        ) from error
    return [
        _mmmu_question(row, file, image=functools.partial(_mmmu_image, file, place) if image else None)
        for place, (row, image) in enumerate(zip(rows, shown or [None] * len(rows), strict=True))
    ]


def _mmmu_image(file: Path, place: int) -> bytes:
    content = _mmmu_images(file)[place]["bytes"]
    if not content:
        raise InputError(f"{file}: {_IMAGE} of row {place} has no bytes", hint="Give MMMU's own files.")
    return bytes(content)


@functools.lru_cache(maxsize=1)
def _mmmu_images(file: Path) -> list[dict[str, Any]]:
    """The first images of one file; its questions are asked in its order."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).read([f"{_IMAGE}.bytes"])[_IMAGE].to_pylist()


def _mmmu_question(row: Mapping[str, Any], file: Path, *, image: Callable[[], bytes] | None) -> Question:
    key, answer = str(row["id"]), str(row["answer"] or "")
    if answer in ("", "?"):
        raise InputError(f"{file}: question {key} has no answer", hint="Use the validation split: test has none.")
    subject = "_".join(key.split("_")[1:-1])
    groups = tuple(name for name, subjects in DISCIPLINES.items() if subject in subjects)
    given = _listed(answer) if answer.startswith("[") else [answer]
    asked: dict[str, Any] = {"id": key, "text": str(row.get("question") or ""), "image": image}
    if row["question_type"] != "multiple-choice":
        return Question(**asked, options=(), right=tuple(given), groups=(*groups, "open"))
    options = _listed(row["options"])
    right = tuple(answers.LETTERS.find(letter) for letter in given)
    if not options or len(options) > len(answers.LETTERS) or not all(0 <= each < len(options) for each in right):
        raise InputError(f"{file}: question {key} has answer {answer!r} and {len(options)} options")
    return Question(**asked, options=tuple(options), right=right, groups=(*groups, "multiple_choice"))


def _listed(text: object) -> list[str]:
    """MMMU writes its lists as Python literals."""
    try:
        found = ast.literal_eval(str(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [str(each) for each in found] if isinstance(found, list) else []


def read_responses(path: Path, *, questions: QuestionSet) -> dict[str, str]:
    """What a model wrote for each question: JSON Lines of ``question_id`` and ``text`` (LLaVA), or one JSON object from
    id to text (MMMU).

    Raises:
        InputError: The file is neither, or does not hold exactly one response for each question.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"cannot read {path}: {why}", hint="Give the model's answers.") from error
    hint = 'Write {"question_id": "1", "text": "A"} a line, or one JSON object {"1": "A"}.'
    pairs = _pairs(content)
    if pairs is None:
        raise InputError(f"{path} holds no responses", hint=hint)
    found: dict[str, str] = {}
    for key, text in pairs:
        if not isinstance(text, str) or key in found:
            what = "a second response" if key in found else f"response {text!r:.60}, which is no text"
            raise InputError(f"{path}: question {key} has {what}", hint=hint)
        found[key] = text
    known = {question.id for question in questions.questions}
    for ids, what in (
        ([key for key in found if key not in known], "are not in the set"),
        ([key for key in known if key not in found], "have no response"),
    ):
        if ids:
            named = ", ".join(sorted(ids)[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")
            hint = "Questions and responses must be of one split; none is left out in silence."
            raise InputError(f"{path}: {len(ids)} questions {what}: {named}", hint=hint)
    return found


def _pairs(content: str) -> list[tuple[str, Any]] | None:
    try:
        whole = json.loads(content)
    except ValueError:
        try:
            whole = [json.loads(line) for line in content.splitlines() if line.strip()]
        except ValueError:
            return None
    if isinstance(whole, dict) and "question_id" not in whole:
        return list(whole.items())
    records = [whole] if isinstance(whole, dict) else whole
    if not isinstance(records, list) or not all(isinstance(each, dict) and "question_id" in each for each in records):
        return None
    return [(str(each["question_id"]), each.get("text")) for each in records]
