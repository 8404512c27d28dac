"""The LLaVA-style model: what of a conversation is supervised, what each stage trains, and the whole way to scores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from small_training import IMAGES, SIDE, World
from test_heads import TEXTS, pairs_of
from transformers import GPT2Config, GPT2LMHeadModel

from gmail_cli.artifacts import Artifact, Workspace
from gmail_cli.components import captions
from gmail_cli.components.arms import Arm, View
from gmail_cli.components.clip_files import build_clip, load_clip, save_clip
from gmail_cli.components.conversations import (
    IGNORED,
    IMAGE_ID,
    Chat,
    Conversation,
    owner_of,
    read_conversations,
)
from gmail_cli.components.heads import load_lm
from gmail_cli.components.llava import (
    Llava,
    answer,
    caption_prompt,
    captions_as_conversations,
    covered,
    llava_job,
    load_llava,
    meet,
)
from gmail_cli.components.loop import Recipe, fit, learning_rate
from gmail_cli.components.tokenizer import save_tokenizer, train_tokenizer
from gmail_cli.errors import InputError, UsageError
from gmail_cli.profile import build
from gmail_cli.stages import embed, evaluate, train

SELF = Path(__file__)
CHATML = (
    "{% for m in messages %}{{ '<|startoftext|>' + m['role'] + ' ' + m['content'] + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|startoftext|>assistant ' }}{% endif %}"
)
TALK = Conversation(id="talk", image="1", turns=("<image>\nwhat is it", "a red ball", "and where", "on sand"))
DIM, TOKENS = 12, 3


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of two layers with random weights and a chat template of its own."""
    folder = tmp_path_factory.mktemp("lm")
    tokenizer = train_tokenizer([*TEXTS, *TALK.turns, "user assistant what"], entries=620)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=32, n_head=2, n_positions=64, **ends, **drops)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture
def model(lm_folder: Path) -> Llava:
    return make(lm_folder)


def make(lm_folder: Path, *, dual: bool = False, instructed: bool = True) -> Llava:
    lm, tokenizer = load_lm(lm_folder)
    about = {
        "lm": str(lm_folder),
        "lm_revision": "",
        "image_tokens": TOKENS,
        "prompt": "what",
        "instructed": instructed,
    }
    torch.manual_seed(0)
    rank = 8 if instructed else 0
    return Llava(DIM, lm=lm, tokenizer=tokenizer, about=about, dual=dual, lora_rank=rank, lora_alpha=16.0).eval()


def images(count: int = 4, *, seed: int = 0) -> torch.Tensor:
    """Image tokens at half precision, as they are kept."""
    return torch.randn(count, TOKENS, DIM, generator=torch.Generator().manual_seed(seed)).half()


# -- what is supervised ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, CHATML])
def test_answers_alone_are_supervised(lm_folder: Path, template: str | None) -> None:
    _, tokenizer = load_lm(lm_folder)
    tokenizer.chat_template = template
    chat = Chat(tokenizer, name="mini", image_tokens=TOKENS, limit=64)
    ids, labels = chat.tokens(TALK)
    told = [token for token in labels if token != IGNORED]
    end = tokenizer.eos_token
    assert tokenizer.decode(told).replace(" ", "") == f"aredball{end}onsand{end}"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    assert ids.count(IMAGE_ID) == TOKENS
    start = labels.index(told[0])
    assert chat.question(TALK.turns[:1]) == ids[:start]  # what is asked at inference is what was learned
    assert chat.question(TALK.turns[:3]) == ids[: len(chat.question(TALK.turns[:3]))]
    words, told = chat.caption("a red ball", limit=3)
    assert words[-3:] == told[-3:]
    assert words[-1] == tokenizer.eos_token_id
    assert IMAGE_ID not in chat.caption("a red <image>", limit=20)[1]
    assert set(told[:-3]) == {IGNORED}


def test_a_sample_without_a_supervised_token_is_an_error(lm_folder: Path) -> None:
    _, tokenizer = load_lm(lm_folder)
    with pytest.raises(InputError, match=r"conversation 'talk' has no supervised token in its first 8 tokens"):
        Chat(tokenizer, name="mini", image_tokens=TOKENS, limit=8).tokens(TALK)
    with pytest.raises(InputError, match=r"caption 'a red ball' has no supervised token"):
        Chat(tokenizer, name="mini", image_tokens=9, limit=8).caption("a red ball", limit=20)


def test_a_template_that_forgets_is_refused(lm_folder: Path) -> None:
    _, tokenizer = load_lm(lm_folder)
    tokenizer.chat_template = CHATML.replace("for m in messages", "for m in messages[-1:]")
    with pytest.raises(UsageError, match="does not keep what was said before an answer"):
        Chat(tokenizer, name="mini", image_tokens=TOKENS, limit=64).tokens(TALK)


def record(*turns: str, **other: Any) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[place % 2], "value": turn} for place, turn in enumerate(turns)]
    return {"id": "r", "conversations": said, **other}


def test_conversations_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    good = [
        record("<image>\nwhat?", "a ball", image="1.jpg"),
        record("no mark", "a cube", image="2.jpg"),
        record("hello", "hi"),
    ]
    bad = [
        record("what?", image="1.jpg"),
        record("<image>", "a ball", image="1.jpg"),
        record("<image> or <image>?", "a ball", image="1.jpg"),
        record("<image> what?", "a ball"),
        record("what?", "<image>", image="1.jpg"),
        record("what?", "a ball", image=["1.jpg", "2.jpg"]),
        "nothing",
    ]
    file.write_text(json.dumps(good))
    found, left = read_conversations(file)
    assert [each.turns[0] for each in found] == ["<image>\nwhat?", "<image>\nno mark", "hello"]
    assert [each.image for each in found] == ["1.jpg", "2.jpg", None]
    assert not left
    file.write_text("\n".join(map(json.dumps, [*good, *bad])))
    with pytest.raises(InputError, match=r"(?s)7 bad records of .*record 3: conversations is no list"):
        read_conversations(file)
    found, left = read_conversations(file, on_bad="skip")
    assert len(found) == 3
    assert len(left) == len(bad)
    file.write_text("[{")
    with pytest.raises(InputError, match="cannot be read as conversations"):
        read_conversations(file)


def test_images_are_found_by_the_names_of_the_field() -> None:
    known = {"9", "dog.jpg", "train-000001", "a/b.png"}
    names = ["coco/train2017/000000000009.jpg", "COCO_train2014_000000000009.jpg", "x/dog.jpg", "train-000001.png"]
    assert [owner_of(name, known=known) for name in names] == ["9", "9", "dog.jpg", "train-000001"]
    assert owner_of("a/b.png", known=known) == "a/b.png"
    assert owner_of("../../9.jpg/x", known=known) is None
    pairs = pairs_of(TEXTS, labels=(-1,) * 4, names=())
    strange = Conversation(id="s", image="77.jpg", turns=("<image> what", "a ball"))
    assert [each.image for each in covered([TALK, strange], pairs, on_bad="skip")] == ["1"]
    with pytest.raises(InputError, match=r"1 bad conversations:\n  s: image '77.jpg' is none of the 4"):
        covered([TALK, strange], pairs, on_bad="fail")
    with pytest.raises(InputError, match="no conversation is about an image"):
        covered([strange], pairs, on_bad="skip")


# -- training ----------------------------------------------------------------------------------------------------


def job_of(
    model: Llava,
    arm: Arm,
    *,
    recipe: Recipe,
    real: Arm | None = None,
    talks: Any = None,
    conversation_tokens: int = 64,
) -> Any:
    pairs = pairs_of(TEXTS, labels=(-1,) * 4, names=())
    talks = captions_as_conversations(pairs, prompt="what") if talks is None else talks
    limits = {"caption_tokens": 20, "conversation_tokens": conversation_tokens}
    return llava_job(model, pairs, arm, real=real, conversations=talks, recipe=recipe, **limits)


def arm_of(tokens: torch.Tensor, *, real: bool = True) -> Arm:
    rows = pairs_of(TEXTS, labels=(-1,) * 4, names=()).real
    assert rows is not None
    return Arm((View(tokens, rows, real=real),))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # plain peft asks transformers by an old name
def test_it_learns_what_images_show_and_keeps_it_in_its_folder(model: Llava, tmp_path: Path) -> None:
    recipe = Recipe(steps=90, batch_size=4, lr=1e-2, restart=30, restart_lr=1e-2)
    job = job_of(model, arm_of(images()), recipe=recipe)
    before = {name: value.clone() for name, value in model.lm.state_dict().items()}
    fit(model, loss=job.loss, rows=job.rows, recipe=recipe)
    after = model.lm.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if "lora_" not in name)
    assert all(not torch.equal(after[name], before[name]) for name in after if "lora_B" in name)
    prompts = [caption_prompt(model)] * 4
    assert answer(model, prompts, images(), max_tokens=20) == list(TEXTS)
    assert answer(model, prompts, images(), max_tokens=20, batch_size=3, beams=2) == list(TEXTS)
    job.export(tmp_path)
    loaded = load_llava(tmp_path)
    assert answer(loaded, prompts, images(), max_tokens=20) == list(TEXTS)
    plain = PeftModel.from_pretrained(load_lm(model.about["lm"])[0], tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(plain(input_ids=ids).logits, model.lm(input_ids=ids).logits)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="holds no adapter"):
        load_llava(tmp_path)
    with pytest.raises(InputError, match="holds no LLaVA model"):
        load_llava(tmp_path / "adapter")


def test_the_first_stage_trains_the_projector_alone(model: Llava) -> None:
    recipe = Recipe(steps=40, batch_size=4, lr=1e-2, restart=20, restart_lr=3e-3)
    job = job_of(model, arm_of(images()), recipe=recipe)
    job.loss(torch.arange(4), 3).backward()
    trained = {name: p.grad is not None for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, moved in trained.items() if not moved} == {n for n in trained if "lora_" in n}
    model.zero_grad()
    job.loss(torch.arange(4), 20).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    rates = [learning_rate(step, recipe) for step in (0, 19, 20, 39)]
    assert rates[0] == 1e-2
    assert rates[2] == 3e-3
    assert max(rates[1], rates[3]) < 1e-4


def test_padding_and_text_alone_change_no_row(model: Llava) -> None:
    chat = model.chat(limit=64)
    text = Conversation(id="t", image=None, turns=("and where", "on sand"))
    rows = [chat.tokens(TALK), chat.tokens(text)]

    def loss(chosen: list[int], pad: int = 0) -> torch.Tensor:
        length = max(len(rows[i][0]) for i in chosen) + pad
        ids, labels = (
            torch.tensor([rows[i][part] + [fill] * (length - len(rows[i][0])) for i in chosen])
            for part, fill in ((0, chat.end), (1, IGNORED))
        )
        shown = sum(i == 0 for i in chosen)
        lengths = torch.tensor([len(rows[i][0]) for i in chosen])
        return model(ids, labels, images(shown), torch.ones(shown, dtype=torch.bool), lengths)

    counts = [sum(label != IGNORED for label in labels) for _, labels in rows]
    alone = [loss([i]).item() for i in (0, 1)]
    assert loss([0], pad=3).item() == pytest.approx(alone[0], rel=1e-5)
    mean = sum(n * each for n, each in zip(counts, alone, strict=True)) / sum(counts)
    assert loss([1, 0]).item() == pytest.approx(mean, rel=1e-5)
    assert loss([0]).item() != pytest.approx(model(*_one(rows[0], images(1, seed=9))).item(), rel=1e-5)


def _one(row: tuple[list[int], list[int]], tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    ids, labels = (torch.tensor([part]) for part in row)
    return ids, labels, tokens, torch.ones(1, dtype=torch.bool), torch.tensor([ids.shape[1]])


def test_each_flow_has_a_projector_and_the_real_one_meets_the_generated(lm_folder: Path) -> None:
    model = make(lm_folder, dual=True)
    assert model.generated is not None
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1))).Q
    count = 300
    pairs = pairs_of(tuple(f"caption {i}" for i in range(count)), labels=(-1,) * count, names=())
    assert pairs.real is not None
    generated = images(count, seed=2) * torch.linspace(0.5, 3, DIM).half()
    real = (generated.float() @ turn).half()
    arms = [Arm((View(values, pairs.real, real=flow),)) for values, flow in ((real, True), (generated, False))]
    with torch.no_grad():
        model.generated.first.weight.add_(torch.randn(model.generated.first.weight.shape))
    flags = torch.ones(count, dtype=torch.bool)
    target = model.project(generated, ~flags)
    before = (model.project(real, flags) - target).square().mean() / target.var()
    meet(model, arms[0], arms[1], pairs)
    after = (model.project(real, flags) - target).square().mean() / target.var()
    assert before > 0.5
    assert after < 0.3 * before
    mixed = model.project(real, flags & (torch.arange(count) % 2 == 0))
    torch.testing.assert_close(mixed[0], model.project(real, flags)[0])
    torch.testing.assert_close(mixed[1], model.project(real, ~flags)[1])
    recipe = Recipe(steps=2, batch_size=4, lr=1e-2, restart=1, restart_lr=1e-2)
    job_of(make_shown := make(lm_folder, dual=True), arm_of(images(), real=False), recipe=recipe)
    assert make_shown.generated is not None
    assert not any(p.requires_grad for p in make_shown.real.parameters())
    assert all(p.requires_grad for p in make_shown.generated.parameters())


# -- image tokens ------------------------------------------------------------------------------------------------


def test_patch_tokens_are_the_last_layer_but_one_or_the_last_map(world: World) -> None:
    import numpy as np

    vit, pixels = (
        load_clip(world.folder / "clip"),
        np.random.default_rng(0).integers(0, 255, (2, 3, SIDE, SIDE), "uint8"),
    )
    seen: list[torch.Tensor] = []
    block = vit.model.visual.transformer.resblocks[-2]
    hook = block.register_forward_hook(lambda _, __, output: seen.append(output))
    tokens = vit.encode_patches(pixels)
    hook.remove()
    torch.testing.assert_close(tokens, seen[0][:, 1:])
    coarse = vit.encode_patches(pixels, grid=2)
    assert coarse.shape == (2, 4, 32)
    torch.testing.assert_close(coarse[:, 0], tokens.unflatten(1, (4, 4))[:, :2, :2].flatten(1, 2).mean(1))
    with pytest.raises(UsageError, match=r"train.visual_grid = 5: .* has 4 by 4 patches"):
        vit.encode_patches(pixels, grid=5)
    convolutional = {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    config = {"model_cfg": {**vit.config["model_cfg"], "vision_cfg": convolutional}, "preprocess_cfg": {}}
    net = build_clip(config, tokenizer=vit.tokenizer)
    assert net.encode_patches(pixels).shape == (2, 1, 256)


# -- the stages --------------------------------------------------------------------------------------------------

SHORT: dict[str, Any] = {"tasks": ["llava"], "steps": 16, "visual_grid": 2, "prompt": "what", "lora_rank": 4}
PROJECTOR = "llava.real.seed0/projector.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world")).make()


def run(world: World, workspace: Workspace | None = None, **settings: Any) -> Artifact:
    profile = world.profile(**{**SHORT, "arms": ["real"], **settings})
    return train.run(profile, workspace or world.workspace, **world.inputs())


def test_every_arm_and_projection_is_trained_scored_and_shown(world: World) -> None:
    arms = ["real", "generated-aligned", "mixed"]
    trained = run(world, arms=arms, dual_projection="both", steps=20)
    rows = trained.read_json("cells.json")
    assert [row["name"] for row in rows] == [f"llava.{arm}.seed0{end}" for arm in arms for end in ("", "+dual")]
    for row in rows:
        curve = trained.read_jsonl(f"{row['folder']}/metrics.jsonl")
        assert curve[-1]["loss"] < curve[0]["loss"]
    contents = {trained.files[f"{row['folder']}/projector.safetensors"]["sha256"] for row in rows}
    assert len(contents) == len(rows)
    data = {"train": "scenes:train", "train_limit": IMAGES, "test": "scenes:test", "test_limit": 6, "scene_size": SIDE}
    profile = build(
        {
            "data": data,
            "model": {"clip": str(world.folder / "clip")},
            "embed": {"gap_count": 0},
            "eval": {"caption_tokens": 8, "resamples": 100, "meteor": "off"},
            "runtime": {"device": "cpu"},
        }
    )
    tables = embed.run(profile, world.workspace, train=trained)
    made = evaluate.run(profile, world.workspace, embeddings=tables, train=trained)
    for row in rows:
        written = made.read_json(f"predictions/{row['name']}.json")
        assert len(written) == 6
        assert any(written.values())
    assert {"llava.real.cider", "llava.real+dual.bleu_4", "llava.mixed.rouge_l"} <= set(made.summary["metrics"])
    f_r = load_clip(world.folder / "clip")
    (world.folder / "other").mkdir()
    save_clip(build_clip(f_r.config, seed=9, tokenizer=f_r.tokenizer), world.folder / "other")
    model = profile.model.model_copy(update={"clip": str(world.folder / "other")})
    foreign = embed.run(profile.model_copy(update={"model": model}), world.workspace, train=trained)
    with pytest.raises(InputError, match=r"llava\..* was trained with encoder .*, the test images were embedded with"):
        evaluate.run(profile, world.workspace, embeddings=foreign, train=trained)


def talk_file(folder: Path) -> Path:
    data = captions.read("scenes:train", limit=IMAGES, scene_size=SIDE)
    shown = [record("<image>\nwhat", data.captions_of(each.id)[0].text, image=f"{each.id}.jpg") for each in data.images]
    file = folder / "talk.json"
    file.write_text(json.dumps([*shown, record("which ball", "red")]))
    return file


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("visual", "pooled"),
        ("visual_grid", 1),
        ("pretrain_share", 0.7),
        ("pretrain_share", 0.0),
        ("prompt", "where"),
        ("instruct_lr", 1e-4),
        ("lora_rank", 2),
        ("lora_alpha", 4.0),
        ("conversation_tokens", 30),
        ("caption_tokens", 3),
        ("conversations", None),
    ],
)
def test_settings_move_the_result(world: World, tmp_path: Path, name: str, value: Any) -> None:
    value = str(talk_file(tmp_path)) if name == "conversations" else value
    base, other = run(world, steps=6), run(world, steps=6, **{name: value})
    assert base.digest != other.digest
    assert base.files[PROJECTOR]["sha256"] != other.files[PROJECTOR]["sha256"]


def test_a_projector_alone_captions_without_a_question(world: World) -> None:
    artifact = run(world, pretrain_share=1.0)
    folder = artifact.folder("llava.real.seed0")
    assert not (folder / "adapter").exists()
    made = load_llava(folder)
    assert caption_prompt(made) == made.chat(limit=80).image()


def test_conversations_belong_to_the_key_by_content_and_need_their_images(world: World, tmp_path: Path) -> None:
    first = talk_file(tmp_path)
    (tmp_path / "b").mkdir()
    second = talk_file(tmp_path / "b")
    keys = [train.plan_key(world.profile(**SHORT, arms=["real"], conversations=str(file))) for file in (first, second)]
    assert keys[0].digest == keys[1].digest
    second.write_text(json.dumps([record("<image> what", "a ball", image="stranger.jpg")]))
    changed = world.profile(**SHORT, arms=["real"], conversations=str(second))
    assert train.plan_key(changed).digest != keys[0].digest
    with pytest.raises(InputError, match=r"image 'stranger.jpg' is none of the 30"):
        train.run(changed, world.workspace, **world.inputs())
    with pytest.raises(InputError, match=r"train.conversations = 'nowhere.json' does not exist"):
        train.plan_key(world.profile(**SHORT, arms=["real"], conversations="nowhere.json"))


KILLED: dict[str, Any] = {**SHORT, "arms": ["generated-aligned"], "dual_projection": "on", "steps": 40}


def test_a_killed_stage_ends_in_the_same_bytes(world: World, tmp_path: Path) -> None:
    whole = train.run(world.profile(**KILLED), Workspace(tmp_path, "whole"), **world.inputs())
    environment = os.environ | {"PYTHONPATH": f"{SELF.parents[1]}:{SELF.parent}", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(SELF), str(world.folder), str(tmp_path)]
    done = subprocess.run(script, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["killed"] * 2 + ["finished"]
    resumed = Workspace(tmp_path, "killed").latest("train")
    assert resumed is not None
    assert resumed.content == whole.content


if __name__ == "__main__":  # killed in either stage, then left to finish
    home, results, at = World(Path(sys.argv[1])), Workspace(Path(sys.argv[2]), "killed"), Path(sys.argv[2], "steps")
    at.write_text("0")
    for stop in (10, 30, None):
        child = os.fork()
        if child == 0:
            train.run(
                home.profile(**KILLED),
                results,
                **home.inputs(),
                progress=lambda done, _: at.write_text(str(done)) and None,
            )
            os._exit(0)
        while stop is not None and int(at.read_text() or 0) < stop:
            time.sleep(0.002)
        if stop is not None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "finished", flush=True)
