"""From what a model wrote to the answer it gave, and whether that is right, by each benchmark's own rules.

ScienceQA as LLaVA's evaluation reads it, MMMU as its authors' does (Yue et al. 2024). Where MMMU's draws an option at
random because it finds none, the expectation of that draw counts, so that a score does not depend on a seed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"
_GROUPED = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_BEFORE_ANSWERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MARKS = (":", ",", ".", "!", "?", ";", "'")


def science_qa_choice(response: str, *, choices: int) -> int | None:
    """Number of the option that a response to a ScienceQA question names; None where it names none.

    A lone letter, a letter with a full stop and a space at the beginning, or "The answer is" and a letter.
    """
    text = response.replace("\n", ". ")
    letter = ""
    if re.fullmatch("[A-E]", text.strip()):
        letter = text.strip()
    elif re.match(r"[A-E]\. ", text):
        letter = text[0]
    else:
        found = re.search(r"The answer is ([A-E])\.", text) or re.search("The answer is ([A-E])", text)
        letter = found[1] if found else ""
    place = LETTERS.index(letter) if letter else choices
    return place if place < choices else None


def mmmu_choice(response: str, *, options: Sequence[str]) -> int | None:
    """Number of the option that a response to an MMMU question names last; None where it names none.

    ``(B)``, else a ``B`` between spaces, else (in more than five words) the text of an option.
    """
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        response = response.strip(mark)
    padded = f" {response} "
    letters = LETTERS[: len(options)]
    sought = [[f"({letter})" for letter in letters], [f" {letter} " for letter in letters]]
    for forms in sought:
        places = [padded.rfind(form) for form in forms]
        if max(places) >= 0:
            return places.index(max(places))
    if len(padded.split()) > 5:
        places = [padded.lower().rfind(option.lower()) for option in options]
        if max(places) >= 0:
            return places.index(max(places))
    return None


def mmmu_open(response: str, *, answers: Sequence[str]) -> bool:
    """Whether a response to an open MMMU question is right: a right number, or a right text inside what it concludes.

    What it concludes is, for each of its lines, the shortest part after words such as "is" or "answer"; a line's
    numbers count too. Numbers are compared to two decimals.
    """
    right = [form for answer in answers for form in _forms(answer)]
    for part in _conclusions(response):
        for given in (part, *(number for kind in (_GROUPED, _SCIENTIFIC, _PLAIN) for number in kind.findall(part))):
            for form in _forms(given):
                if isinstance(form, str):
                    if any(isinstance(each, str) and each in form for each in right):
                        return True
                elif form in right:
                    return True
    return False


def _conclusions(response: str) -> list[str]:
    text = response.strip().strip(".").lower()
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines):
        words = _BEFORE_ANSWERS if number < len(lines) - 1 else (*_BEFORE_ANSWERS, "=")
        shortest = ""
        for word in words:
            tail = line.rpartition(word)[2].strip()
            if word in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in _MARKS:
            found.append(shortest)
    return found or [text]


def _forms(text: str) -> list[str | float]:
    """A number to two decimals, or the text in lower case; a single letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
