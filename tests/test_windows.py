"""Prompts in several windows of CLIP's text encoder: where they are cut, what each is to diffusers, the same bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import small_pipelines
import torch
from test_pipelines import generate, gmail, images

from gmail_cli.artifacts import Artifact
from gmail_cli.components import diffusion, pipelines
from gmail_cli.components.windows import Windows, cut
from gmail_cli.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

ROOM = 30
"""Letters in a window of the small tokenizers."""
SHORT, LONG = "a cat", " ".join("abcdefghij" * 3 + "zyxwvutsrq")
LONGER = " ".join("klmnopqrst" * 3 + "uvwxyzabcd" * 3 + "efghijklmn" * 3)
SAMPLING = diffusion.Sampling(
    steps=2, guidance=3.0, negative_prompt="a dog", batch_size=2, height=32, width=32, prompt_windows=3
)
JOBS = [
    diffusion.Job(name, prompt, k)
    for name, prompt in (("short", SHORT), ("long", LONG), ("fits", "f i t s"), ("longer", LONGER), ("other", "o x"))
    for k in range(2)
]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(params=["sd1", "sdxl"])
def kind(request: pytest.FixtureRequest, folders: Path) -> str:
    if not (folders / request.param).exists():
        small_pipelines.save(request.param, folders / request.param)
    return str(request.param)


def drawn(sampler: diffusion.Sampler, jobs: list[diffusion.Job], **where: int) -> dict[diffusion.Job, bytes]:
    made = [each for batch in sampler.draw(jobs, **where) for each in batch]
    assert [each.job for each in made] == jobs[where.get("start", 0) :]
    return {each.job: each.pixels.tobytes() for each in made}


def words(text: str) -> list[str]:
    """Tokens of words that are one token each, as CLIP writes them."""
    return [f"{word}</w>" for word in text.split()]


def spans(tokens: list[str], *, room: int = 15, most: int = 9) -> list[tuple[int, int]]:
    return [(part.start, part.stop) for part in cut(tokens, room=room, most=most)]


def test_a_prompt_is_cut_where_a_sentence_a_clause_or_a_word_ends() -> None:
    plain = words("w " * 40)
    assert spans(words("w " * 15)) == [(0, 15)]
    assert spans([]) == [(0, 0)]
    assert spans(plain) == [(0, 15), (15, 30), (30, 40)]
    comma = [*plain[:12], ",</w>", *plain[13:]]
    assert spans(comma) == [(0, 13), (13, 28), (28, 40)]
    assert spans([*plain[:10], ",</w>", *plain[11:]]) == [(0, 11), (11, 26), (26, 40)], "a last 4 of 15 is looked at"
    assert spans([*plain[:9], ",</w>", *plain[10:]]) == [(0, 15), (15, 30), (30, 40)]
    assert spans([*comma[:11], ".</w>", *comma[12:]]) == [(0, 12), (12, 27), (27, 40)], "a sentence before a clause"
    assert spans([*plain[:14], "un", "cut</w>", *plain[16:]]) == [(0, 14), (14, 29), (29, 40)]
    assert spans(["x"] * 40) == [(0, 15), (15, 30), (30, 40)], "one word goes on at each place"
    assert spans([*comma[:11], ".</w>", *comma[12:]], room=15, most=3) == [(0, 12), (12, 27), (27, 40)]
    tight = [*comma, *words("w w w w")]
    assert spans(tight, most=3) == [(0, 15), (15, 30), (30, 44)], "at the comma it would not fit any more"
    assert spans(comma, most=2) == [(0, 15), (15, 30)], "what is left out is as little as can be"


def test_each_window_is_what_diffusers_makes_of_its_words(kind: str, folders: Path) -> None:
    pipeline = pipelines.load_pipeline(str(folders / kind))
    names = diffusion.ENCODED[type(pipeline).__name__]

    def encoded(prompt: str, negative: str) -> dict[str, Any]:
        every = pipeline.encode_prompt(
            prompt=[prompt] * 2,
            negative_prompt=[negative] * 2,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        return {name: each[0] for name, each in zip(names, every, strict=True)}

    windows = Windows(pipeline, most=4, negative_prompt=LONGER)
    found = windows.encode([LONG, SHORT], batch_size=2)
    left_over = windows.encode_negative(batch_size=2)
    letters = LONG.split()
    parts = [encoded(" ".join(letters[:ROOM]), ""), encoded(" ".join(letters[ROOM:]), ""), encoded("", "")]
    hidden = torch.cat([each["prompt_embeds"] for each in parts])
    assert windows.count(SHORT) == windows.count(LONG) == 3, "as many as the negative prompt has"
    assert torch.equal(found[LONG]["prompt_embeds"], hidden)
    assert len(left_over["negative_prompt_embeds"][0]) == 4 * 32
    longer = [encoded("", " ".join(LONGER.split()[at : at + ROOM])) for at in (0, ROOM, 2 * ROOM)]
    negative = torch.cat([*(each["negative_prompt_embeds"] for each in longer), encoded("", "")["prompt_embeds"]])
    assert torch.equal(left_over["negative_prompt_embeds"][0], negative)
    if kind == "sdxl":
        assert torch.equal(found[LONG]["pooled_prompt_embeds"], parts[0]["pooled_prompt_embeds"])
        pooled = left_over["negative_pooled_prompt_embeds"][0]
        assert torch.equal(pooled, longer[0]["negative_pooled_prompt_embeds"])
        bare = Windows(pipeline, most=2, negative_prompt="").encode_negative(batch_size=2)
        assert pipeline.config.force_zeros_for_empty_prompt
        assert [name for name, each in bare.items() if each.any()] == []
    assert not windows.cut(LONGER).truncated
    assert Windows(pipeline, most=2, negative_prompt=None).cut(LONGER).truncated


def test_images_do_not_depend_on_the_windows_of_their_neighbours(kind: str, folders: Path) -> None:
    pipeline = pipelines.load_pipeline(str(folders / kind))
    split = diffusion.Sampler(pipeline, sampling=SAMPLING)
    whole = drawn(split, JOBS)
    assert len(set(whole.values())) == len(JOBS)
    assert drawn(split, JOBS[::-1]) == whole
    shuffled = [JOBS[at] for at in (3, 0, 6, 9, 2, 5, 8, 7, 1, 4)]
    assert drawn(split, shuffled) == whole
    for job in JOBS[::3]:
        assert drawn(split, [job]) == {job: whole[job]}
    assert drawn(split, JOBS, start=3) == {job: whole[job] for job in JOBS[3:]}

    cut_off = drawn(diffusion.Sampler(pipeline, sampling=dataclasses.replace(SAMPLING, prompt_windows=1)), JOBS)
    assert {job.caption_id for job in JOBS if cut_off[job] == whole[job]} == {"short", "fits", "other"}
    ends = [dataclasses.replace(job, prompt=f"{job.prompt} z z") for job in JOBS]
    assert not set(drawn(split, ends).values()) & set(whole.values()), "what comes last is read"


def test_prompts_are_split_where_drawing_begins_with_a_real_image_too(kind: str, folders: Path) -> None:
    from gmail_cli.components.scenes import scene_bytes

    pipeline = pipelines.load_pipeline(str(folders / kind), image_to_image=True)
    sampling = dataclasses.replace(SAMPLING, steps=4, strength=0.5)
    split, cut_off = (
        diffusion.Sampler(
            pipeline,
            sampling=dataclasses.replace(sampling, prompt_windows=most),
            begins=lambda owner: scene_bytes("train", 0, size=40),
        )
        for most in (3, 1)
    )
    whole = drawn(split, JOBS)
    assert drawn(split, JOBS[::-1]) == whole
    plain = drawn(cut_off, JOBS)
    assert {job.caption_id for job in JOBS if plain[job] == whole[job]} == {"short", "fits", "other"}


def test_a_batch_holds_prompts_of_as_many_windows_and_a_restart_draws_the_same_batches(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (folders / "sd1").exists():
        small_pipelines.save("sd1", folders / "sd1")
    sampler = diffusion.Sampler(pipelines.load_pipeline(str(folders / "sd1")), sampling=SAMPLING)
    seen: list[list[str]] = []
    draw = sampler._call
    monkeypatch.setattr(
        sampler, "_call", lambda rows, encode: seen.append([job.prompt for job, _ in rows]) or draw(rows, encode)
    )
    jobs = [JOBS[at] for at in (0, 2, 4, 3, 6, 8)]
    ready = [len(batch) for batch in sampler.draw(jobs)]
    every = [[SHORT, "f i t s"], [LONG, LONG], [LONGER, LONGER], ["o x", "o x"]]
    assert seen == every
    assert ready == [1, 3, 1, 1], "images come in order"
    for start, left in ((2, every), (3, every[1:]), (4, every[2:])):
        seen.clear()
        assert sum(len(batch) for batch in sampler.draw(jobs, start=start)) == len(jobs) - start
        assert seen == left


@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart-sigma", "sana"], indirect=True)
def test_pipelines_that_read_long_prompts_otherwise_refuse_to_split_them(kind: str, folders: Path) -> None:
    pipeline = pipelines.load_pipeline(str(folders / kind))
    sampling = diffusion.Sampling(steps=1, guidance=3.0, prompt_windows=2)
    reads = "Gemma2Model" if kind == "sana" else "T5EncoderModel"
    with pytest.raises(UsageError, match=rf"prompt_windows = 2: .* not for this .*, whose {reads} reads long prompts"):
        diffusion.Sampler(pipeline, sampling=sampling)


def test_long_captions_are_the_same_bytes_in_any_order_and_shard_and_none_is_cut(
    kind: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gmail_cli.stages.generate.drawing.SHARD", 4)
    rows = [
        {"image_id": each, "caption_id": each, "caption": text}
        for each, text in zip("abc", (SHORT, LONG, LONGER), strict=True)
    ]
    for name, order in (("captions", rows), ("reversed", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
    told = {}
    for most in (1, 2, 3):
        more = () if most == 1 else ("--set", f"generate.prompt_windows={most}")
        generate(monkeypatch, folders / kind, "captions.jsonl", *more, run=f"most-{most}")
        told[most] = Artifact.load(tmp_path / f"runs/most-{most}/generate/latest")
    assert {most: each.summary["truncated_share"] for most, each in told.items()} == {1: 2 / 3, 2: 1 / 3, 3: 0}
    assert "prompt_windows" not in told[1].manifest["key"]["settings"]
    whole = images(told[3].path)
    for part in ("2/2", "1/2"):
        generate(monkeypatch, folders / kind, "reversed.jsonl", "--shard", part, *more, "--workspace", "parts")
    assert images(tmp_path / "parts/one/generate/latest") == whole
    moved = {
        most: {caption for caption, k in whole if images(told[most].path)[caption, k] != whole[caption, k]}
        for most in (1, 2)
    }
    assert moved == {1: {LONG, LONGER}, 2: {LONGER}}
    line = ["artifacts", "verify", "--regenerate", "6"]
    assert [gmail(monkeypatch, *line, str(each.path)) for each in told.values()] == [0, 0, 0]
    assert gmail(monkeypatch, *line, "--set", "generate.prompt_windows=2", str(told[1].path)) == 0
