"""Prompts that a language model writes: the same whatever else is written, written once, the caption kept."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import small_pipelines
import torch
from safetensors.torch import load_file

from gmail_cli import cli
from gmail_cli.artifacts import Artifact, Waiting, Workspace
from gmail_cli.components import rewriting
from gmail_cli.components.heads import SHIPPED_LMS
from gmail_cli.components.rewriting import Rewriter, Wanted, load_rewriter, usable
from gmail_cli.errors import InputError, SetupError, UsageError
from gmail_cli.profile import build
from gmail_cli.profile.generation import Rewrite
from gmail_cli.profile.schema import Profile
from gmail_cli.stages import generate
from gmail_cli.stages.generate import checking, drawing, exporting, planning

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CAPTIONS = [
    "a red car",
    "two green trees on the left of a small house",
    "a boat",
    "a blue ball in the middle of the grass " * 3,  # padded to another length
    "a cat and a dog",
    "snow, and a yellow sun above a grey mountain on the right",
]
WANTED = [Wanted(f"c{row}", caption, k) for row, caption in enumerate(CAPTIONS) for k in range(2)]
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def rewriter(**changed: Any) -> Rewriter:
    return load_rewriter("tiny", **({"instruction": "{}", "max_tokens": 12, "batch_size": 4} | changed))


def texts(writer: Rewriter, wanted: Sequence[Wanted]) -> dict[Wanted, str | None]:
    return {wanted[row]: text for batch in writer.write(wanted) for row, text in batch}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_does_not_depend_on_those_that_are_written_beside_it(temperature: float) -> None:
    writer = rewriter(temperature=temperature)
    whole = texts(writer, WANTED)
    assert len(whole) == len(WANTED)
    assert len(set(whole.values())) >= (10 if temperature else 5)
    assert texts(writer, WANTED[::-1]) == whole
    for each in WANTED[::3]:
        assert texts(writer, [each]) == {each: whole[each]}
    for shards in (2, 4):
        apart = [texts(rewriter(temperature=temperature), WANTED[shard::shards]) for shard in range(shards)]
        assert {wanted: text for part in apart for wanted, text in part.items()} == whole


def test_a_row_is_the_same_numbers_wherever_it_stands_in_a_batch_and_whoever_its_neighbours_are() -> None:
    writer, seen = rewriter(), []
    writer._lm.lm_head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits[:, -1].clone()))
    alike = [each for each in WANTED if len(each.caption) < 60]
    texts(writer, alike[:4])
    first, seen[:] = [step[0] for step in seen], []
    texts(writer, [*alike[4:7], alike[0]])
    moved = [step[3] for step in seen]
    assert len(first) == len(moved) == 12
    assert all(bool((one == other).all()) for one, other in zip(first, moved, strict=True))


def test_what_is_drawn_depends_on_seed_caption_and_k_and_greedy_texts_on_the_caption_alone() -> None:
    base = WANTED[2]
    others = [Wanted(base.caption_id, base.caption, 5), Wanted("other", base.caption, 0)]
    drawn = texts(rewriter(temperature=1.0), [base, *others])
    assert len({*drawn.values(), texts(rewriter(temperature=1.0, seed=1), [base])[base]}) == 4
    greedy = texts(rewriter(), [base, *others])
    assert len(set(greedy.values())) == 1
    assert texts(rewriter(temperature=1e-6), [base])[base] == greedy[base]


def test_settings_that_a_model_is_published_with_do_not_change_what_is_written(tmp_path: Path) -> None:
    """Qwen's has a penalty on words that were said, which the caption's own and the padding would count among."""
    shutil.copytree(SHIPPED_LMS["tiny"], tmp_path / "lm")
    file = tmp_path / "lm" / "generation_config.json"
    published = {"do_sample": True, "temperature": 0.3, "repetition_penalty": 1.5, "max_length": 20}
    file.write_text(json.dumps(json.loads(file.read_text()) | published))
    options = {"instruction": "{}", "max_tokens": 12, "batch_size": 4}
    assert texts(load_rewriter(str(tmp_path / "lm"), **options), WANTED) == texts(rewriter(), WANTED)


def test_a_language_model_of_older_files_is_read_but_nothing_in_them_is_run(tmp_path: Path) -> None:
    """Vicuna has `pytorch_model.bin` alone, which is a pickle."""
    shutil.copytree(SHIPPED_LMS["tiny"], tmp_path / "lm")
    older = tmp_path / "lm" / "pytorch_model.bin"
    torch.save(load_file(tmp_path / "lm" / "model.safetensors"), older)
    (tmp_path / "lm" / "model.safetensors").unlink()
    options = {"instruction": "{}", "max_tokens": 12, "batch_size": 4}
    assert texts(load_rewriter(str(tmp_path / "lm"), **options), WANTED) == texts(rewriter(), WANTED)

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"transformer.wte.weight": Trap()}, older)
    with pytest.raises(InputError, match="hold something else than tensors"):
        load_rewriter(str(tmp_path / "lm"), **options)
    assert not (tmp_path / "sprung").exists()


def test_thoughts_that_the_template_begins_and_nothing_ends_are_no_prompt() -> None:
    writer = rewriter(instruction="Say more of {}")
    writer._tokenizer.chat_template = CHATML.replace("<assistant>", "<assistant><think>\n")
    assert set(texts(writer, WANTED[:4]).values()) == {None}


def test_a_chat_template_is_used_and_without_one_the_model_goes_on() -> None:
    writer = rewriter(instruction="Say more of {}: be exact")
    tokenizer = writer._tokenizer
    assert tokenizer.decode(writer._ask("a red car")) == tokenizer.decode(
        tokenizer("Say more of a red car: be exact")["input_ids"]
    )
    tokenizer.chat_template = CHATML
    asked = "<user>Say more of a red car: be exact</user><assistant>"
    assert writer._ask("a red car") == tokenizer(asked, add_special_tokens=False)["input_ids"]
    tokenizer.chat_template = "{{ nobody.knows.this }}"
    with pytest.raises(UsageError, match="chat template of tiny fails"):
        writer._ask("a red car")


@pytest.mark.parametrize(
    ("text", "chat", "ended", "told"),
    [
        (" a red\n car ", True, True, "a red car"),
        (" a red\n car ", False, True, "a red"),
        ('Here is the prompt:\n\n"A red car."', True, True, "A red car."),
        ('"A" or "B"!', True, True, '"A" or "B"!'),
        ("A red car. It stands on", True, False, "A red car."),
        ("A red car that stands on", True, False, "A red car that stands on"),
        ("A red car. It stands.", True, True, "A red car. It stands."),
        ("", True, True, None),
        ("\n", False, False, None),
        ("?! 12", True, True, None),
        ("one red car here and one red car here and", True, True, "one red car here and one red car here and"),
        ("one red car here and " * 3, True, True, None),
        ("雪の中の赤い車", True, True, "雪の中の赤い車"),
        ("<think>\nThe user wants a car.\n</think>\n\nA red car.", True, True, "A red car."),
        ("<think>The user wants a car. Cars are", True, False, None),
        ("<think>a red car", False, True, "<think>a red car"),
    ],
)
def test_what_is_usable_of_a_text(text: str, chat: bool, ended: bool, told: str | None) -> None:
    assert usable(text, chat=chat, ended=ended) == told


def test_what_does_not_fit_the_model_or_the_machine_is_named() -> None:
    with pytest.raises(UsageError, match=r"max_tokens = 500, and tiny reads 128 in all"):
        rewriter(max_tokens=500)
    with pytest.raises(UsageError, match="float16"):
        rewriter(dtype="float16")
    with pytest.raises(SetupError, match=r"nobody/lm.*OFFLINE"):
        load_rewriter("nobody/lm", revision="abc", instruction="{}", max_tokens=8)
    assert texts(rewriter(), [Wanted("long", "a red car " * 60)]) == {Wanted("long", "a red car " * 60): None}


# -- the stage -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator") / "sd1"
    small_pipelines.save("sd1", folder)
    return folder


OWN = {"lm": "tiny", "instruction": "{}, ", "max_tokens": 12, "temperature": 1.0, "per_image": True, "batch_size": 4}


def profile(folder: Path, *, images: int = 4, data: dict[str, Any] | None = None, **changed: Any) -> Profile:
    """Twenty captions with two images each."""
    chosen = {"model": str(folder), "steps": 1, "guidance": 2.0, "batch_size": 4, "per_caption": 2, "rewrite": OWN}
    data = data or {"train": "scenes:train", "train_limit": images}
    return build({"data": data, "generate": chosen | changed})


def test_the_caption_stays_and_what_was_written_is_drawn_and_recorded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[Any] = []
    loads: list[bool] = []

    def load(*arguments: Any, **named: Any) -> Rewriter:
        writers.append(weakref.ref(made := load_rewriter(*arguments, **named)))
        return made

    def sampler(*arguments: Any, **named: Any) -> Any:
        loads.append(writers[-1]() is None)
        return whole(*arguments, **named)

    whole = drawing.load_sampler
    monkeypatch.setattr(rewriting, "load_rewriter", load)
    monkeypatch.setattr(drawing, "load_sampler", sampler)
    chosen = profile(folder, prompt_template=["{original} {caption}", "{caption}"])
    told: list[tuple[int, int]] = []
    artifact = generate.run(chosen, Workspace(tmp_path), progress=lambda *at: told.append(at))
    assert loads == [True]  # the language model was gone before the pipeline came
    assert told == sorted(told)
    assert told[-1] == (80, 80)  # forty prompts and forty images
    records = artifact.read_jsonl("records.jsonl")
    planned = planning.plan(chosen)
    assert [row["caption"] for row in records] == [each.caption for each in planned]
    expected = texts(
        load_rewriter("tiny", instruction="{}, ", max_tokens=12, temperature=1.0, batch_size=4),
        [Wanted(each.caption_id, each.caption, each.k) for each in planned],
    )
    assert [row["rewritten"] for row in records] == [
        expected[Wanted(each.caption_id, each.caption, each.k)] for each in planned
    ]
    assert len({row["rewritten"] for row in records}) > 20
    assert artifact.summary["not_rewritten"] == sum(row["rewritten"] is None for row in records)
    assert artifact.verify() == []
    assert generate.plan_key(chosen).digest == artifact.digest

    plain = profile(folder, rewrite={}, prompt_template="{caption}")
    untold = generate.run(plain, Workspace(tmp_path)).read_jsonl("records.jsonl")
    for row, other in zip(records, untold, strict=True):
        assert (row["sha256"] == other["sha256"]) == (row["rewritten"] is None and row["k"] == 1)
    assert "rewritten" not in untold[0]
    monkeypatch.setattr(rewriting, "load_rewriter", None)  # what is drawn again is told what was written then
    assert checking.regenerate(chosen, artifact, count=40) == []
    assert checking.regenerate(chosen.model_copy(update={"generate": plain.generate}), artifact, count=3) == []
    exporting.export(artifact, str(tmp_path / "set"))
    rows = pq.read_table(tmp_path / "set" / "images.parquet").to_pylist()
    assert [row["rewritten"] for row in rows] == [row["rewritten"] for row in records]


def test_what_pipeline_is_told_comes_from_template_caption_and_text() -> None:
    def told(template: str, written: str | None) -> str:
        return planning.prompt([template], "a {label}", label="cat", k=3, written=written)

    template = "{label}: {original}, {caption}!"
    assert told(template, "a {original} cat") == "cat: a {label}, a {original} cat!"
    assert told(template, None) == "cat: a {label}, a {label}!"


def test_a_caption_too_long_to_be_rewritten_is_drawn_as_it_is_and_counted(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "captions.jsonl"
    rows = [{"caption": "a red car"}, {"caption": "a red car " * 60}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = profile(folder, data={"train": str(file)}, rewrite={"lm": "tiny", "instruction": "{}, "})
    artifact = generate.run(chosen, Workspace(tmp_path))
    records = artifact.read_jsonl("records.jsonl")
    assert [row["rewritten"] is None for row in records] == [False, False, True, True]
    assert records[0]["rewritten"] == records[1]["rewritten"]  # one text for all images of a caption
    assert artifact.summary["not_rewritten"] == 2
    same = generate.run(profile(folder, data={"train": str(file)}, rewrite={}), Workspace(tmp_path))
    plain = same.read_jsonl("records.jsonl")
    assert [row["sha256"] for row in plain[2:]] == [row["sha256"] for row in records[2:]]
    assert plain[0]["sha256"] != records[0]["sha256"]


def test_every_setting_moves_the_digest_and_none_does_without_a_model(folder: Path) -> None:
    changes: dict[str, Any] = {
        "instruction": "a {}",
        "max_tokens": 9,
        "temperature": 0.5,
        "per_image": False,
        "batch_size": 5,
        "dtype": "bfloat16",
    }
    assert {*changes, "lm", "revision"} == Rewrite.model_fields.keys()

    def digest(**changed: Any) -> str:
        return generate.plan_key(profile(folder, rewrite=OWN | changed)).digest

    assert len({digest(), *(digest(**{name: value}) for name, value in changes.items())}) == 1 + len(changes)
    without = {digest(lm="", **{name: value}) for name, value in changes.items()}
    assert without == {generate.plan_key(profile(folder, rewrite={})).digest}
    key = generate.plan_key(profile(folder, rewrite=OWN | {"lm": "some/lm", "revision": "abc"}))
    assert key.models["rewrite"] == "some/lm@abc"
    with pytest.raises(UsageError, match=r"generate\.rewrite\.lm = 'some/lm' .* needs generate\.rewrite\.revision"):
        digest(lm="some/lm")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rewrite": {"instruction": "say more"}}, "instruction"),
        ({"rewrite": {"per_image": True}}, "per_image"),
        ({"rewrite": {"lm": "tiny"}, "prompt_template": "a {label}"}, "no prompt_template holds"),
        ({"rewrite": {"lm": "tiny"}, "source": "import", "import_path": "x"}, "rewrite.lm"),
        ({"rewrite": {"model": "tiny"}}, "rewrite.model"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        build({"generate": wrong})


def test_generators_of_a_mixture_are_told_what_one_alone_is_told_and_loaded_one_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = [{"name": "plain"}, {"name": "other", "guidance": 3.0}]
    told: list[tuple[int, int]] = []
    loaded: list[Any] = []

    def sampler(*arguments: Any, **named: Any) -> Any:
        assert all(each() is None for each in loaded)
        made, device = whole(*arguments, **named)
        loaded.append(weakref.ref(made.pipeline))
        return made, device

    whole = drawing.load_sampler
    with monkeypatch.context() as patched:
        patched.setattr(drawing, "load_sampler", sampler)
        mixed = generate.run(profile(folder, mix=mix), Workspace(tmp_path), progress=lambda *at: told.append(at))
    assert len(loaded) == 2
    assert told == sorted(told)
    assert told[-1] == (80, 80)
    alone = generate.run(profile(folder), Workspace(tmp_path))
    texts_of = [{row["key"]: row["rewritten"] for row in each.read_jsonl("records.jsonl")} for each in (mixed, alone)]
    assert texts_of[0] == texts_of[1]
    assert mixed.summary["not_rewritten"] == alone.summary["not_rewritten"]
    assert checking.estimate(profile(folder, mix=mix), Workspace(tmp_path / "none"))["prompts"] == 40


PRELOADED = [
    "gmail_cli.stages.generate.drawing",
    "gmail_cli.components.rewriting",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.schedulers.scheduling_ddim",
    "transformers.models.clip.modeling_clip",
    "transformers.models.gpt2.modeling_gpt2",
]

# -- interruption ----------------------------------------------------------------------------------------------


def rows_of(partial: Path) -> list[bytes]:
    """What stands in the logs of prompts, a torn last line left out."""
    files = sorted(partial.glob("scratch/prompts/*"))
    return [line for file in files for line in file.read_bytes().split(b"\n")[:-1]]


def test_killed_while_it_writes_and_stopped_while_it_draws_a_run_writes_nothing_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = profile(folder, images=12)  # 60 captions, 120 images
    expected = generate.run(chosen, Workspace(tmp_path / "whole"))
    workspace = Workspace(tmp_path / "killed")
    partial = workspace.folder("generate") / f"{expected.digest[:12]}.partial"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=generate.run, args=(chosen, workspace))
    child.start()
    while child.is_alive() and len(rows_of(partial)) < 30:
        time.sleep(0.002)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    there = rows_of(partial)
    assert 30 <= len(there) < 120
    asked: list[int] = []
    write = Rewriter.write

    def counting(self: Rewriter, wanted: Sequence[Wanted]) -> Iterator[list[tuple[int, str | None]]]:
        asked.append(len(wanted))
        return write(self, wanted)

    def stop(done: int, total: int) -> None:
        if done >= 120 + 8:
            raise OSError("the disk went away")

    with monkeypatch.context() as patched:
        patched.setattr(Rewriter, "write", counting)
        with pytest.raises(OSError, match="went away"):
            generate.run(chosen, workspace, progress=stop)
    assert sum(asked) == 120 - len(there)
    assert rows_of(partial)[: len(there)] == there
    monkeypatch.setattr(rewriting, "load_rewriter", None)  # all are there
    resumed = generate.run(chosen, workspace)
    assert resumed.files == expected.files
    assert resumed.summary == expected.summary


def test_parts_write_their_own_prompts_and_end_in_the_bytes_of_one_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "SHARD", 8)
    chosen = profile(folder, per_caption=3, rewrite=OWN | {"per_image": False})  # images of a caption lie in two shards
    told: list[tuple[int, int]] = []
    expected = generate.run(chosen, Workspace(tmp_path / "whole"), progress=lambda *at: told.append(at))
    assert told[-1] == (85, 85)  # sixty images, and twenty captions of which five lie in two shards
    workspace = Workspace(tmp_path / "parts")
    found = [generate.run_part(chosen, workspace, part=(part, 3)) for part in (3, 1, 2)]
    assert [isinstance(each, Waiting) for each in found] == [True, True, False]
    assert isinstance(found[-1], Artifact)
    assert found[-1].content == expected.content
    assert found[-1].summary == expected.summary


def test_a_shard_whose_prompts_another_process_writes_is_left_to_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "SHARD", 8)
    chosen, workspace = profile(folder), Workspace(tmp_path)
    work = drawing.Work(chosen)
    assert work.prompts is not None
    with workspace.open(work.key, shared=True) as slot, work.prompts.log(slot, work.shards[1]).claim() as mine:
        assert mine
        waiting = generate.run_part(chosen, workspace, part=(1, 1))
        assert waiting == Waiting(work.key, 4, 5)
    assert isinstance(generate.run_part(chosen, workspace, part=(1, 1)), Artifact)


def test_ctrl_c_finishes_the_prompts_in_progress(folder: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 8:
            signal.raise_signal(signal.SIGINT)

    chosen, workspace = profile(folder), Workspace(tmp_path)
    with pytest.raises(KeyboardInterrupt, match="8 of 40 prompts are there"):
        generate.run(chosen, workspace, progress=stop)
    told: list[tuple[int, int]] = []
    generate.run(chosen, workspace, progress=lambda *at: told.append(at))
    assert told[0] == (12, 80)


def test_a_dry_run_says_how_many_prompts_and_what_they_cost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space = Workspace(tmp_path)
    assert checking.estimate(profile(folder), space) == {"images": 40, "captions": 20, "reused": 0, "prompts": 40}
    one = OWN | {"per_image": False}
    assert checking.estimate(profile(folder, rewrite=one), space)["prompts"] == 20
    told = checking.estimate(profile(folder), space, batches=1)
    assert told["seconds"] == pytest.approx(40 * (told["seconds_per_prompt"] + told["seconds_per_image"]))
    monkeypatch.chdir(tmp_path)
    line = ["gmail", "generate", "--dry-run", "--limit", "2", "--set", "generate.rewrite.lm=tiny"]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert "2 images of 2 captions, 2 prompts to write" in capsys.readouterr().out
    assert list(tmp_path.rglob("prompts")) == []
