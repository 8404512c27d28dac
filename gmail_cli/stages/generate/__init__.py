"""``gmail generate``: one image file and one record for every (caption, k).

Images are drawn from captions (``source = "pipeline"``) or brought in from elsewhere (``source = "import"``). The plan
is cut into shards of about ``SHARD`` images. Each keeps a log of its records, appended in order after their images are
on disk, so an interrupted run continues after the last whole record and ends in the bytes of a run that was never
interrupted, and several processes (:func:`run_part`) may share the shards. At the end the logs are laid one after
another.
"""

from __future__ import annotations

from gmail_cli.artifacts import Artifact, StageKey, Waiting, Workspace
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import sources
from gmail_cli.stages.generate.choosing import afterwards, checker_of, chosen_key, filtered, scored, scored_key
from gmail_cli.stages.generate.drawing import Progress, Work
from gmail_cli.stages.generate.mixing import Mixture
from gmail_cli.stages.generate.planning import device_of


def plan_key(profile: Profile) -> StageKey:
    """What `run` would make, without loading a model; captions and images enter by content, not by path.

    Raises:
        InputError: Captions or images that are missing or corrupt.
        UsageError: A hub model without its revision.
    """
    key = _work(profile).key
    generate = profile.generate
    if scored(generate):
        key = scored_key(profile, key)
    return chosen_key(profile, key) if filtered(generate) else key


def run(profile: Profile, workspace: Workspace, *, progress: Progress | None = None) -> Artifact:
    """Make (or find) the images that a profile asks for.

    ``gmail generate --captions coco.json --per-caption 5 --limit 20`` takes the first 20 image records of the file;
    each has 5 captions, each caption gets 5 images: 500 in all.

    Args:
        profile: What is read of it: ``generate``, ``data``, ``runtime`` and ``seed``.
        workspace: Where the artifact goes.
        progress: Called with (images done, images in all); with ``generate.rewrite`` prompts count too.

    Returns:
        The artifact: ``images/<000>/<key>.<ext>`` and ``records.jsonl`` with one object per image: key, caption_id,
        caption, owner, label, k, seed, attempt, sha256, path, bytes, width, height, truncated, generator; with
        ``generate.rewrite`` also ``rewritten``, what a language model made of the caption (None where nothing usable);
        with ``generate.score`` or ``generate.safety_checker`` also its scores, and in ``rejected.jsonl`` those that
        ``min_clip_score``, ``keep_best`` or ``max_unsafe`` left out.

    Raises:
        InputError: Captions or images that are missing or corrupt.
        SetupError: A model or device this machine lacks.
        UsageError: Settings that do not fit the model.
        KeyboardInterrupt: After Ctrl-C, when the batch in progress is on disk.
    """
    made = _work_in(workspace, profile).make(workspace, progress=progress)
    return afterwards(profile, workspace, made, progress=progress)


def run_part(
    profile: Profile, workspace: Workspace, *, part: tuple[int, int], progress: Progress | None = None
) -> Artifact | Waiting:
    """Make one of several parts of what ``run`` makes; the process that finds all parts done makes the artifact.

    Part i of n is the i-th of n runs of neighbouring shards. The processes of all parts may run together, on machines
    that share the workspace; one that was killed is started again with the same part, or left to ``run``.

    Args:
        profile: As for ``run``; the same in every process.
        workspace: As for ``run``.
        part: (i, n): which part, counted from 1, of how many.
        progress: Called with (images done, images of the part).

    Raises:
        UsageError: As ``run``; or i is not one of 1 to n.
    """
    sources.require_part(*part)
    made = _work_in(workspace, profile).make_part(workspace, part=part, progress=progress)
    return made if isinstance(made, Waiting) else afterwards(profile, workspace, made, progress=None)


def _work_in(workspace: Workspace, profile: Profile) -> Work | Mixture:
    """What a profile asks for; before images are drawn, what is wrong with safety checker or compiler is said."""
    work, generate = _work(profile), profile.generate
    if workspace.find(work.key) is None:
        if generate.compile and generate.source == "pipeline":
            from gmail_cli.components.compilation import require_compiler

            require_compiler("generate.compile", device=device_of(profile))
        if generate.safety_checker:
            checker_of(generate)
    return work


def _work(profile: Profile) -> Work | Mixture:
    return Mixture(profile) if profile.generate.mix else Work(profile)
