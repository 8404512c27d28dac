"""Penn Treebank tokens of captions, as the COCO caption evaluation defines them, without Java.

The protocol's tokeniser is Stanford's PTBTokenizer 3.4.1 with ``-preserveLines -lowerCase``, whose
punctuation tokens are then dropped. This is a scanner of our own with the same output on the captions of COCO
val2017 and Flickr8k; rules for text that captions do not hold (foreign phone numbers, XML) are left out.

Two habits of the original that change scores are kept: brackets stay, as ``-lrb-`` and ``-rrb-``, because
lower-casing hides them from the list of punctuation; and a mixed fraction holds a no-break space. One is not:
whether a last word like "K." keeps its full stop depended on the first word of the next caption in the file;
here it loses it, as before a caption that begins with "A" or "The".
"""

from __future__ import annotations

import re
from functools import lru_cache

_DROPPED = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
_REWRITTEN = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
    "£": "#",
    "€": "$",
    "¢": "cents",
    "\u2026": "...",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
} | dict.fromkeys(("&quot;", "&apos;", "&nbsp;", '"', "‘", "’", "‛", "“", "”", "„", "–", "—"), "'")

# Words that keep a full stop after them wherever they stand, in any case.
_ABBREVIATIONS = (
    r"adj|adm|adv|al|ala|apr|ariz|assn|assoc|asst|atty|attys|aug|ave|bancorp|bhd|bldg|blvd|brig|bros|"
    r"calif|capt|cf|cmdr|co|col|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs|ens|esq|est|etc|"
    r"ext|feb|fla|fri|ft|ga|gen|gov|govs|hon|inc|ind|insp|intl|invt|jan|jr|jul|jun|kan|kans|ky|lieut|lt|"
    r"ltd|maj|mar|md|messrs|mich|minn|mlle|mme|mo|mon|mont|mr|mrs|ms|msgr|mt|natl|neb|nev|nov|oct|okla|"
    r"penn|pfc|ph|plc|pres|prof|profs|pvt|rd|rep|reps|rev|rt|sen|sens|sep|sept|seq|sfc|sgt|spc|sq|sr|st|"
    r"ste|supt|supts|sys|tel|tenn|thu|thurs|treas|tue|tues|univ|va|vs|vt|wed|wis|wisc|wyo|ph\.d"
)
_CAPITAL_ABBREVIATIONS = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_NUMBER_ABBREVIATIONS = "art|ca|figs?|nos?|op|pp|prop"  # only before a number
# After a single letter and a full stop these words begin a sentence ("vitamin C. The", but "J. Doe").
_SENTENCE_STARTS = (
    r"A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|"
    r"More|Mr\.|Ms\.|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|"
    r"They|This|We|What|When|While|Yet|You"
)

_L = r"[^\W\d_½¼¾]"  # a letter
_A = r"[^\W_½¼¾]"  # a letter or digit
_Q = "['’]"  # an apostrophe
_SUFFIX = rf"{_Q}(?i:ll|re|ve|s|m|d)(?!{_L})"
_WORD_END = rf"(?!{_A}|[-_/'’]{_A})"

# The longest match wins in the original; here the first does, so longer ones stand before shorter ones.
_TOKEN = re.compile(
    "|".join(
        (
            r"https?://[^\s\"<>|()]+[^\s\"<>|.!?(){},-]",
            (
                r"(?:www\.(?:[^\s\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"
                r"|(?:[^\s\"`'<>|.!?(){},$/-]+\.)+(?:com|net|org|edu)(?![\w]))"
                r"(?:/[^\s\"<>|()]*[^\s\"<>|.!?(){},-])?"
            ),
            r"[A-Za-z0-9][^\s\"<>|()@]*@(?:[^\s\"<>|().]+\.)*[^\s\"<>|().!?,;:]+",
            r"</?[A-Za-z][\w.:-]*(?:\s+[\w:-]+(?:=\"[^\"]*\")?)*\s*/?>",
            r"&(?:amp|lt|gt|quot|apos|nbsp|#\d+);",
            r"[:;=]['’]?-?[()DPdp|\[\]@](?![A-Za-z])",
            r"[-^<>=~]_[-^<>=~]",
            r"\(\d{3}\)\s\d{3}-\d{4}",
            r"\d{1,4}[-\s]\d{1,4}/\d{1,4}(?!\d)",
            rf"[A-Za-z](?:\.[A-Za-z])+\.(?!{_A})(?:-{_L}+)?",
            rf"(?i:{_ABBREVIATIONS})\.(?!{_A})(?:-{_L}+)?",
            rf"(?:{_CAPITAL_ABBREVIATIONS}|{_CAPITAL_ABBREVIATIONS.upper()})\.(?!{_A})",
            rf"(?i:{_NUMBER_ABBREVIATIONS})\.(?=\s*\d)",
            rf"[A-Za-z]\.(?!{_A}|\.|\s*$|\s+(?:{_SENTENCE_STARTS})(?:\s|$))",
            rf"{_L}{_A}*(?:[.!?]{_L}{_A}*)+",
            rf"{_L}+\.(?=[,;:])",
            # Contractions: the verb, then its suffix.
            r"(?i:n['’`]t)",
            rf"{_L}+(?=(?i:n['’`]t))",
            (
                rf"(?i:can(?=not{_WORD_END})|(?:gon|wan)(?=na{_WORD_END})|got(?=ta{_WORD_END})"
                rf"|(?:lem|gim)(?=me{_WORD_END}))"
            ),
            rf"{_L}+(?={_SUFFIX})",
            _SUFFIX,
            rf"{_Q}(?i:t)(?=(?i:is|was)(?!{_L}))",
            rf"{_Q}(?i:em|til|cause)",
            rf"{_Q}[nN]{_Q}|{_Q}[nN](?!{_A})",
            rf"{_Q}\d\ds?(?!{_A}|{_Q})",
            rf"[cC]{_Q}mon|[oO]l{_Q}|(?i:somethin|dunkin){_Q}",
            rf"[yY]{_Q}(?={_L})",
            rf"(?:[dDoOlL]|[A-HJ-XZn]){_Q}{_L}{{2,}}",
            rf"[lLdDjJ]{_Q}",
            rf"{_L}*[aeiouyAEIOUY]{_Q}[aeiouA-Z]{_L}*",
            # Words, numbers and what holds them together.
            r"[A-Z]+(?:[+&][A-Z]+)+|[cC](?:\+\+|#)|(?:US|HK|NT|NZ|A|C|S)\$",
            rf"{_A}+(?:-{_L}+){{0,2}}(?:\\?/{_A}+(?:-{_L}+){{0,2}}){{1,2}}",
            rf"\d+(?:[.,]\d+)+(?:-{_A}+)+",
            r"[-+]?\d*(?:[.:,]\d+)+",
            rf"{_A}+(?:[-_]{_A}+)*",
            r"[-+]\d+",
            rf"#{_L}+|@[A-Za-z]\w*",
            r"[?!]+|\.{3}|-{2,}|_+|\*+",
            r"\S",
        )
    )
)
# Where a token depends on what stands beyond the next space, the line is scanned whole.
_ACROSS_SPACES = re.compile(rf"<|\d\s\d|\(\d{{3}}\)\s|\b[A-Za-z]\.\s|(?i:\b(?:{_NUMBER_ABBREVIATIONS})\.\s+\d)")


def tokenise(caption: str) -> str:
    """The caption's tokens in lower case, without punctuation, joined by single spaces.

    >>> tokenise("A man's T-shirt, in St. Paul (it isn't new).")
    "a man 's t-shirt in st. paul -lrb- it is n't new -rrb-"
    """
    if _ACROSS_SPACES.search(caption):
        return " ".join(_scan(caption))
    return " ".join(token for chunk in caption.split() for token in _cached(chunk))


@lru_cache(maxsize=1 << 16)
def _cached(chunk: str) -> tuple[str, ...]:
    return _scan(chunk)


def _scan(text: str) -> tuple[str, ...]:
    tokens = []
    for raw in _TOKEN.findall(text):
        token = _REWRITTEN.get(raw)
        if token is None:
            token = raw.replace("’", "'").replace(" ", "\u00a0").lower()
            if len(raw) > 1 and not raw[-1].isalnum():
                token = "".join(_REWRITTEN.get(c, c) if c in "()[]" else c for c in token)
        if token not in _DROPPED and not token.startswith("--"):
            tokens.append(token)
    return tuple(tokens)
