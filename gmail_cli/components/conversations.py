"""Conversations about images: LLaVA's JSON, and what a language model reads of one.

LLaVA's files (Liu et al. 2023) are a JSON list of records ``{"id", "image", "conversations": [{"from": "human",
"value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A dog."}, ...]}``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from gmail_cli.errors import InputError, UsageError

IMAGE = "<image>"
"""Stands for the image in a turn, as LLaVA writes it."""
IMAGE_ID = -200
"""Stands for one image token among token ids."""
IGNORED = -100
"""Label of a token that is not supervised."""
DATE = "26 Jul 2024"
"""What templates that tell the date (Llama 3, SmolLM3) are told, so that a prompt is the same every day."""
SHOWN = 5
"""How many bad records an error names."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns of a user and an assistant in alternation, the user's first.

    Attributes:
        id: For messages.
        image: Name of the image they speak of; None for text alone.
        turns: Their texts; one of the user's turns holds `IMAGE` once, if there is an image. The last one may be the
            user's: a question.
    """

    id: str
    image: str | None
    turns: tuple[str, ...]


def read_conversations(
    path: Path, *, on_bad: Literal["fail", "skip"] = "fail"
) -> tuple[tuple[Conversation, ...], tuple[str, ...]]:
    """LLaVA's conversation JSON (a list) or the same records as JSON Lines; also a message for each record left out.

    A record with an image that no turn mentions shows it first, as LLaVA does.

    Raises:
        InputError: The file cannot be read or holds no record; with ``fail`` also when a record is bad.
    """
    try:
        content = path.read_text(encoding="utf-8")
        lines = [line for line in content.splitlines() if line.strip()]
        records = json.loads(content) if content.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        hint = 'Write a JSON list of {"id", "image", "conversations": [{"from": "human", "value": "..."}, ...]}.'
        raise InputError(f"{path} cannot be read as conversations: {error}", hint=hint) from error
    read = [_conversation(record, number) for number, record in enumerate(records)]
    found = [each for each in read if isinstance(each, Conversation)]
    bad = [f"{path.name}: record {number}: {each}" for number, each in enumerate(read) if isinstance(each, str)]
    refuse(bad, what=f"records of {path}", on_bad=on_bad)
    if not found:
        raise InputError(f"no usable conversation in {path}" + "".join(f"\n  {line}" for line in bad[:SHOWN]))
    return tuple(found), tuple(bad)


def refuse(bad: Sequence[str], *, what: str, on_bad: Literal["fail", "skip"]) -> None:
    """Stop and name the first bad records, unless they may be left out.

    Raises:
        InputError: There are some and ``on_bad`` is ``fail``.
    """
    if bad and on_bad == "fail":
        more = f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise InputError(
            f"{len(bad)} bad {what}:\n  " + "\n  ".join(bad[:SHOWN]) + more,
            hint="Repair them, or leave them out with --set data.on_bad=skip.",
        )


def _conversation(record: Any, number: int) -> Conversation | str:
    """A record's conversation, or what is wrong with it."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        return "conversations is no list of questions, each with its answer"
    texts = []
    for place, turn in enumerate(turns):
        speaker = ("human", "gpt")[place % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            return f"turn {place} is not a text from {speaker!r}"
        if not turn["value"].replace(IMAGE, "").strip():
            return f"turn {place} is empty"
        texts.append(turn["value"].strip())
    image = record.get("image")
    if image is not None and (not isinstance(image, str) or not image):
        return f"image is {image!r:.60}, not one name"
    mentioned = "\x00".join(texts).count(IMAGE)
    if mentioned > (image is not None):
        return f"{mentioned} times {IMAGE} for {int(image is not None)} image"
    if any(IMAGE in text for text in texts[1::2]):
        return f"{IMAGE} in an answer"
    if image is not None and not mentioned:
        texts[0] = shown(texts[0])
    return Conversation(id=str(record.get("id", number)), image=image, turns=tuple(texts))


def owner_of(image: str, *, known: Collection[str]) -> str | None:
    """The image record that a conversation's image names: by id, file name, stem, or COCO's number in it."""
    path = PurePosixPath(image)
    number = path.stem.rpartition("_")[2].lstrip("0")
    return next((name for name in (image, path.name, path.stem, number) if name in known), None)


def shown(question: str) -> str:
    """A question with the image in it: before it, unless it says where."""
    return question if IMAGE in question else f"{IMAGE}\n{question}"


def rendered(tokenizer: Any, turns: Sequence[str], *, ask: bool, think: bool = False) -> str:
    """Turns through a tokenizer's chat template, the same every day.

    Args:
        tokenizer: With a chat template.
        turns: The user's and the assistant's in alternation.
        ask: Go on to where the next answer begins.
        think: Leave it to the model whether it thinks first (Qwen 3, SmolLM3); otherwise its thought is an empty one.

    Raises:
        ValueError, TypeError, jinja2.TemplateError: The template fails.
    """
    roles = ("user", "assistant")
    template = re.sub(r"strftime_now\([^()]*\)", repr(DATE), tokenizer.get_chat_template())
    return str(
        tokenizer.apply_chat_template(
            [{"role": roles[place % 2], "content": turn.strip()} for place, turn in enumerate(turns)],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=ask,
            date_string=DATE,
            enable_thinking=think,
        )
    )


def turn_end(tokenizer: Any) -> str:
    """What ends an assistant's turn in a tokenizer's chat template: a token of its own, or the end-of-text token.

    Gemma says ``<end_of_turn>`` there and Phi-3 ``<|end|>``; a template that ends a turn with no token, as a tokenizer
    without one, has the end-of-text token.

    Args:
        tokenizer: With an end-of-text token.

    Raises:
        ValueError, TypeError, jinja2.TemplateError: The template fails.
    """
    if tokenizer.chat_template:
        said = "an answer"
        after = rendered(tokenizer, ["a question", said], ask=False).rpartition(said)[2].lstrip()
        known = {tokenizer.eos_token, *tokenizer.get_added_vocab()}
        if found := [token for token in known if token and after.startswith(token)]:
            return max(found, key=len)
    return str(tokenizer.eos_token)


class Chat:
    """How a language model is spoken to: its tokenizer's own chat template, or a plain one where it has none.

    The plain template is LLaVA's: ``USER: question ASSISTANT: answer``, after the start token if there is one.

    Args:
        tokenizer: Of the language model; needs an end-of-text token.
        name: Of the language model, for messages.
        image_tokens: Tokens that stand for an image.
        limit: Longer sequences are cut.

    Attributes:
        end: The end-of-text token, behind a caption.
    """

    def __init__(self, tokenizer: Any, *, name: str, image_tokens: int, limit: int) -> None:
        self.tokenizer, self.name, self.image_tokens, self.limit = tokenizer, name, image_tokens, limit
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {name} has no end-of-text token", hint="Choose another train.lm.")
        self.end = int(tokenizer.eos_token_id)

    @functools.cached_property
    def turn_end(self) -> int:
        """The token behind an answer (see `turn_end`).

        Raises:
            UsageError: The chat template fails.
        """
        return int(self.tokenizer.convert_tokens_to_ids(self._turn_end))

    @functools.cached_property
    def _turn_end(self) -> str:
        try:
            return turn_end(self.tokenizer)
        except Exception as error:
            raise UsageError(f"the chat template of {self.name} fails: {error}") from error

    def tokens(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Ids and labels of a conversation: only answers, each with the token that ends it, are supervised.

        Raises:
            InputError: Nothing supervised is left, as when the question alone fills the limit.
        """
        return self._cut(*self._encode(conversation.turns), what=f"conversation {conversation.id!r}")

    def caption(self, text: str, *, limit: int) -> tuple[list[int], list[int]]:
        """Ids and labels of an image followed by its caption (LLaVA's first stage), of at most ``limit`` tokens."""
        words = [*self._words(text)[: limit - 1], self.end]
        shown = self.image()
        return self._cut([*shown, *words], [IGNORED] * len(shown) + words, what=f"caption {text[:60]!r}")

    def image(self) -> list[int]:
        """Ids of an image alone, to be captioned by a model that only learned its first stage."""
        start = self.tokenizer.bos_token_id
        return [*([] if start is None else [start]), *[IMAGE_ID] * self.image_tokens]

    def question(self, turns: Sequence[str]) -> list[int]:
        """Ids of turns of which the last is a question, up to where the answer begins."""
        return self._encode(turns)[0]

    def _encode(self, turns: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids, and labels of the answers; up to where the next answer begins, if the last turn is a question."""
        plain = not self.tokenizer.chat_template and self.tokenizer.bos_token_id is not None
        ids = [int(self.tokenizer.bos_token_id)] if plain else []
        labels = [IGNORED] * len(ids)
        for text, supervised in self._segments(turns):
            added = self._words(text) if supervised else self._ids(text)
            if supervised and added[-1:] != [self.turn_end]:
                added.append(self.turn_end)
            ids += added
            labels += added if supervised else [IGNORED] * len(added)
        return ids, labels

    def _cut(self, ids: list[int], labels: list[int], *, what: str) -> tuple[list[int], list[int]]:
        ids, labels = ids[: self.limit], labels[: self.limit]
        if all(label == IGNORED for label in labels):
            raise InputError(
                f"{what} has no supervised token in its first {self.limit} tokens",
                hint="Raise train.conversation_tokens, or have fewer image tokens (train.visual_grid).",
            )
        return ids, labels

    def _ids(self, text: str) -> list[int]:
        """Token ids of text with an image in it, or none."""
        before, image, after = text.partition(IMAGE)
        return [*self._words(before), *[IMAGE_ID] * (self.image_tokens * bool(image)), *self._words(after)]

    def _words(self, text: str) -> list[int]:
        """Token ids of text alone, whatever it says."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _segments(self, turns: Sequence[str]) -> list[tuple[str, bool]]:
        """The text in pieces, each supervised or not."""
        if not self.tokenizer.chat_template:
            return [
                (f" {turn}" if place % 2 else f"{' ' * (place > 0)}USER: {turn} ASSISTANT:", bool(place % 2))
                for place, turn in enumerate(turns)
            ]
        whole, pieces, done = self._render(turns, ask=bool(len(turns) % 2)), [], 0
        for place in range(1, len(turns), 2):
            asked = self._render(turns[:place], ask=True)
            if not whole.startswith(asked):  # Qwen 3 drops the empty thought before all answers but the last
                asked = self._render(turns[:place], ask=True, think=True)
            at = whole.find(turns[place], len(asked))
            if not whole.startswith(asked) or at < 0:
                raise UsageError(
                    f"the chat template of {self.name} does not keep what was said before an answer",
                    hint="Take a language model whose template only appends turns, or conversations of one question.",
                )
            stop = at + len(turns[place])
            stop += len(self._turn_end) * whole.startswith(self._turn_end, stop)
            pieces += [(whole[done : len(asked)], False), (whole[len(asked) : stop], True)]
            done = stop
        return [*pieces, (whole[done:], False)] if len(turns) % 2 else pieces

    def _render(self, turns: Sequence[str], *, ask: bool = False, think: bool = False) -> str:
        try:
            return rendered(self.tokenizer, turns, ask=ask, think=think)
        except Exception as error:
            raise UsageError(f"the chat template of {self.name} fails: {error}") from error
