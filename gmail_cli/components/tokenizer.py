"""A CLIP-style byte-pair tokenizer learned from captions.

Same scheme as CLIP's: lower-cased, byte-level, ``</w>`` closing every word, so any text has an encoding. The
entries are the 256 bytes, the 256 word-final bytes, the learned merges, then start and end of text; the end of
text has the highest id, which is what CLIP's argmax pooling looks for, and also pads.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from gmail_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START = "<|startoftext|>"
END = "<|endoftext|>"
CONTEXT_LENGTH = 77
_WORD_END = "</w>"
_FIXED_ENTRIES = 2 * 256 + 2


def train_tokenizer(texts: Iterable[str], *, entries: int = 1280) -> CLIPTokenizer:
    """Learn a tokenizer of at most ``entries`` entries from ``texts`` (fewer when every word is already whole).

    Raises:
        UsageError: ``entries`` leaves no room for a merge beside the 514 fixed entries.
    """
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import CLIPTokenizer

    if entries <= _FIXED_ENTRIES:
        raise UsageError(
            f"a tokenizer of {entries} entries has no room for merges",
            hint=f"Ask for more than {_FIXED_ENTRIES} entries.",
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    scheme = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(BPE(end_of_word_suffix=_WORD_END))
    learner.normalizer, learner.pre_tokenizer = scheme.normalizer, scheme.pre_tokenizer
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=entries - 2,
            end_of_word_suffix=_WORD_END,
            initial_alphabet=[*alphabet, *(byte + _WORD_END for byte in alphabet)],
            show_progress=False,
        ),
    )
    merges = _merges(learner)[: entries - _FIXED_ENTRIES]
    tokens = [*alphabet, *(byte + _WORD_END for byte in alphabet), *(a + b for a, b in merges), START, END]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT_LENGTH,
    )


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write ``tokenizer`` into ``folder`` for every reader: ``tokenizer.json``, ``vocab.json`` and ``merges.txt``."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def _merges(learner: object) -> list[tuple[str, str]]:
    import json

    pairs = json.loads(learner.to_str())["model"]["merges"]  # type: ignore[attr-defined]
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in pairs]
