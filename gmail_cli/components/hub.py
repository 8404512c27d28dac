"""Weights from the hub: which files of a repository are fetched, and what to say when they cannot be."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError

from gmail_cli.errors import InputError, causes


def fetch(repository: str, *, revision: str, weights: Sequence[str]) -> Path:
    """A repository's configuration and tokenizer, with its weights in the first of several formats that it has.

    Args:
        repository: ``owner/name``.
        revision: A commit, tag or branch; empty takes the newest.
        weights: Names of the file of weights, the best first.

    Returns:
        Its folder in the hub cache.

    Raises:
        OSError: See `explain`.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    wanted = ["*.json", "*.txt", "*.model"]
    for name in weights:
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(repository, name, revision=revision or None)
            wanted.append(name)
            break
    return Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))


@contextlib.contextmanager
def tensors_alone(name: str) -> Iterator[None]:
    """Read weights that may lie in a file of torch's own format, which is a pickle: torch stops where one holds code.

    Raises:
        InputError: It does, or is no such file.
    """
    try:
        yield
    except (UnpicklingError, EOFError) as error:
        raise InputError(
            f"the weights of {name} hold something else than tensors, which is not read",
            hint="Take weights in .safetensors files.",
        ) from error


def explain(error: BaseException, repository: str, *, revision: str) -> tuple[str, str]:
    """Why a repository could not be loaded, and what to do about it: a message without its subject, and a hint."""
    from huggingface_hub import errors

    chain = list(causes(error))

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if is_a(errors.GatedRepoError):
        how = f"Accept them on the repository's page (or ask for access there), then {log_in}."
        return "it is for those who accepted its owner's terms", how
    if is_a(errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}", "Give a commit or a tag of that repository."
    if is_a(errors.RepositoryNotFoundError):
        return "the hub has no such repository", f"Check the name; to see a private one, {log_in}."
    at = f" --revision {revision}" if revision else ""
    hint = f"Where there is a network run `hf download {repository}{at}`, or name a local folder."
    if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}:
        return "HF_HUB_OFFLINE is set and the hub cache does not hold all of it", hint
    if is_a(errors.LocalEntryNotFoundError, ConnectionError):
        return "the hub cannot be reached, and its cache does not hold all of it", hint
    return (str(error).splitlines() or [type(error).__name__])[0], hint
