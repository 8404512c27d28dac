"""Prompts of zero-shot classification: names of classes, and templates to put them into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gmail_cli.components.captions import Dataset
from gmail_cli.errors import InputError, UsageError

NAMED = {"openai-imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple-imagenet": "SIMPLE_IMAGENET_TEMPLATES"}
"""Template sets that come with open_clip: CLIP's 80 and the 7 of its notebook (CLIP, 2021)."""
IMAGENET_NAMES = "openai-imagenet"
"""The names CLIP gives the 1,000 classes of ImageNet, in the order of their WordNet ids; two stand there twice."""


def templates(chosen: Sequence[str]) -> tuple[str, ...]:
    """Every template that ``chosen`` stands for, with ``{}`` for the class name.

    Args:
        chosen: Templates, names of ``NAMED``, and text files with a template a line, in which ``{c}`` may stand for
            the class name (``zeroshot_classification_templates.txt`` of CLIP_benchmark).

    Raises:
        InputError: A file cannot be read or holds a line without a place for the class name.
        UsageError: Neither.
    """
    found: list[str] = []
    for each in chosen:
        if each in NAMED:
            import open_clip

            found += [template("{}") for template in getattr(open_clip, NAMED[each])]
        elif each.endswith(".txt"):
            found += [line.replace("{c}", "{}") for line in _lines(Path(each))]
            wrong = next((line for line in found if line.count("{}") != 1), None)
            if wrong is not None:
                raise InputError(f"{each}: {wrong!r} must hold {{c}} or {{}} once, for the class name")
        elif each.count("{}") == 1:
            found.append(each)
        else:
            hint = f"Write {{}} once for the class name, name a set ({', '.join(NAMED)}), or a .txt file of templates."
            raise UsageError(f"embed.templates: {each!r} is no template", hint=hint)
    return tuple(found)


def name_classes(dataset: Dataset, names: str) -> Dataset:
    """Give each class the name that prompts use; labels stay what they are.

    Args:
        dataset: Labels are numbers (a row of the list each), or as many as there are names: then in sorted order, as
            folders of WordNet ids are.
        names: A text file with a name a line (``classnames.txt`` of CLIP_benchmark), or ``openai-imagenet``.

    Raises:
        InputError: The file cannot be read, or the names do not fit the labels.
    """
    if names == IMAGENET_NAMES:
        import open_clip

        listed: Sequence[str] = open_clip.IMAGENET_CLASSNAMES
    else:
        listed = _lines(Path(names))
    labels = sorted({image.label for image in dataset.images if image.label is not None})
    if not labels:
        raise InputError(f"{dataset.name} has no labels to name", hint="Leave data.class_names empty.")
    if all(label.isdecimal() for label in labels):
        outside = next((label for label in labels if int(label) >= len(listed)), None)
        if outside is not None:
            raise InputError(
                f"{dataset.name} has label {outside}; {names} names {len(listed)} classes, from 0",
                hint="Use the class names of this set.",
            )
        width = max(map(len, labels))
        if any(str(int(label)) != label and len(label) != width for label in labels):
            raise InputError(f"{dataset.name} writes its labels in several ways", hint="Write them as plain numbers.")
        numbers = {int(label): label for label in labels}
        kept = [(numbers.get(number, str(number)), name) for number, name in enumerate(listed)]
    elif len(labels) == len(listed):
        kept = list(zip(labels, listed, strict=True))
    else:
        raise InputError(
            f"{dataset.name} has {len(labels)} classes, {names} names {len(listed)}",
            hint="Names go to labels in sorted order, so there must be as many.",
        )
    return replace(dataset, class_names=tuple(label for label, _ in kept), class_texts=tuple(name for _, name in kept))


def rows(dataset: Dataset, chosen: Sequence[str]) -> list[dict[str, str]]:
    """One prompt for each class and template: ``id``, ``label`` and ``text``.

    Raises:
        InputError, UsageError: As :func:`templates`.
    """
    filled = templates(chosen) if dataset.class_names else ()
    names = dataset.class_texts or dataset.class_names
    return [
        {"id": f"{label}/{number}", "label": label, "text": template.replace("{}", name)}
        for label, name in zip(dataset.class_names, names, strict=True)
        for number, template in enumerate(filled)
    ]


def _lines(file: Path) -> list[str]:
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"cannot read {file}: {why}", hint="Give a text file with one entry a line.") from error
    if not found:
        raise InputError(f"{file} is empty", hint="Give a text file with one entry a line.")
    return found
