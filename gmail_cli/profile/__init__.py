"""Profiles: TOML in, a frozen, typed, strict :class:`~gmail_cli.profile.schema.Profile` out.

Order: field default < profile file < ``--set section.key=value``. No environment variable changes a result.
``schema.py`` says what a profile may hold. ``[runtime]`` never enters an artifact's digest: it may not change a result.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from gmail_cli import shipped
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile.generation import Generate, Generator
from gmail_cli.profile.schema import SECTIONS, TERMS, Profile
from gmail_cli.profile.values import Section

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_PROFILE = "tiny"
LOCAL_PROFILE = Path("gmail.toml")


def locate(ref: str | None, *, named_by: str = "--profile", environment: Mapping[str, str] = os.environ) -> Path:
    """The profile file that applies: ``--profile``, then ``GMAIL_PROFILE``, then ``./gmail.toml``, then ``tiny``.

    Args:
        ref: A shipped profile's name or a path; None when the user gave none.
        named_by: The option or argument that named it, for the message.
        environment: Where ``GMAIL_PROFILE`` is looked up.

    Raises:
        UsageError: No such profile; names the nearest shipped one.
    """
    source = named_by
    if ref is None and environment.get("GMAIL_PROFILE"):
        ref, source = environment["GMAIL_PROFILE"], "GMAIL_PROFILE"
    if ref is None:
        return LOCAL_PROFILE if LOCAL_PROFILE.is_file() else shipped.profiles()[DEFAULT_PROFILE]
    known = shipped.profiles()
    if ref in known:
        return known[ref]
    path = Path(ref)
    if path.is_file():
        return path
    if path.is_dir():
        raise UsageError(f"{source}: {ref!r} is a folder, not a TOML file", hint="Name the profile's file in it.")
    near = difflib.get_close_matches(ref, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    hint += f"Shipped: {', '.join(known)}; or give the path of a TOML file."
    raise UsageError(f"{source}: no profile {ref!r}", hint=hint)


def load(
    ref: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    options: Mapping[str, str] = MappingProxyType({}),
    named_by: str = "--profile",
) -> Profile:
    """Load a profile and apply ``section.key=value`` overrides.

    Args:
        ref: A shipped name, a path, or None for the default search order (:func:`locate`).
        overrides: Texts as given to ``--set``; the value is TOML, or a bare string. A later one of a key wins.
        options: Keys whose first override came from another option than ``--set``, and its name, for the message;
            empty where it only followed from one.
        named_by: The option or argument that named ``ref``, for the message.

    Raises:
        UsageError: An unknown key, a value of the wrong type or out of range, or broken TOML.
    """
    path = ref if isinstance(ref, Path) else locate(ref, named_by=named_by)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"profile {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"profile {path} is not UTF-8 text: {error}") from error
    return loads(text, overrides=overrides, options=options, origin=str(path), name=path.stem)


def loads(
    text: str,
    *,
    overrides: Iterable[str] = (),
    options: Mapping[str, str] = MappingProxyType({}),
    origin: str = "profile",
    name: str = "custom",
) -> Profile:
    """Like :func:`load`, from TOML text; ``origin`` names it in errors, ``name`` is the default of `name`."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = "Correct that place; `gmail profile show tiny` prints a profile that loads."
        raise UsageError(f"{origin} is not valid TOML: {error}", hint=hint) from error
    values.setdefault("name", name)
    typed: dict[str, str] = {}
    for override in overrides:
        key = _apply(values, override)
        typed[key] = "--set" if key in typed else options.get(key, "--set")
    return build(values, origin=origin, typed=typed)


def build(
    values: Mapping[str, Any], *, origin: str = "profile", typed: Mapping[str, str] = MappingProxyType({})
) -> Profile:
    """Validate nested values into a :class:`Profile`.

    Args:
        values: What the TOML says.
        origin: Where it stands, for the message.
        typed: Keys that came from the command line, and the option that each was given by, for the message.

    Raises:
        UsageError: Names each wrong key, its value, what is allowed and the nearest known key.
    """
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors()[:8]:
            key = ".".join(map(str, item["loc"])) + "."
            given = (typed[each] for each in typed if key.startswith(f"{each}.") or f"{each}.".startswith(key))
            lines.append(f"{', '.join(dict.fromkeys(filter(None, given))) or origin}: {_explain(item)}")
        raise UsageError("\n".join(lines)) from None


def _apply(values: dict[str, Any], override: str) -> str:
    """Set what one ``--set`` says; returns its key."""
    key, equals, raw = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        hint = "Write --set section.key=value, such as --set align.lora_rank=8."
        raise UsageError(f"--set {override!r} is not of the form key=value", hint=hint)
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    table = values
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override!r}: {part!r} is not a section")
    table[parts[-1]] = value
    return ".".join(parts)


def _explain(item: Any) -> str:
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _keys_at(item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known) or 'nothing'}"
        return f"unknown key {location!r}{hint}"
    shown = json.dumps(item["input"], default=str)
    if location == "align.objective" and item["type"] == "string_pattern_mismatch":
        return f"{location} = {shown[:200]}: give paper, recommended, or a sum of {', '.join(TERMS)}, as cosine+0.5*eq1"
    return f"{location} = {shown[:200]}: {item['msg'].removeprefix('Value error, ')}"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Profile
    for part in location:
        if isinstance(part, int):  # a table of generate.mix
            continue
        if (model, part) == (Generate, "mix"):
            model = Generator
            continue
        field = model.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return []
        model = field.annotation
    return list(model.model_fields)


def dump(profile: Profile) -> str:
    """The resolved profile as TOML; loading the text gives an equal profile."""
    values = profile.model_dump()
    lines = [f"{key} = {toml(value)}" for key, value in values.items() if key not in SECTIONS]
    for section in SECTIONS:
        lines += ["", f"[{section}]", *(f"{key} = {toml(value)}" for key, value in values[section].items())]
    return "\n".join(lines) + "\n"


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        pairs = (f"{toml(str(key))} = {toml(each)}" for key, each in value.items() if each is not None)
        return "{" + ", ".join(pairs) + "}"
    raise TypeError(f"{value!r} has no TOML form")


def settings(section: Section) -> dict[str, Any]:
    """A section as JSON-able settings for a :class:`~gmail_cli.artifacts.StageKey`."""
    return section.model_dump(mode="json")


def schema() -> dict[str, Any]:
    """The JSON schema of a profile."""
    return Profile.model_json_schema()


def require_file(path: str, *, key: str) -> Path:
    """The path a profile key names.

    Raises:
        InputError: It does not exist.
    """
    if not Path(path).exists():
        raise InputError(f"{key} = {path!r} does not exist", hint=f"Set it with --set {key}=PATH.")
    return Path(path)
