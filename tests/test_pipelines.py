"""Every kind of pipeline that `gmail generate` is said to drive: loaded from its own format, drawing the same bytes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import small_pipelines
import torch

from gmail_cli import cli
from gmail_cli.artifacts import Artifact, file_sha256
from gmail_cli.components import diffusion, pipelines
from gmail_cli.errors import InputError, UsageError

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # in diffusers' own Chroma
]

NOUNS = ("cat", "dog", "cow", "hen", "fox")
OPTIONS: dict[str, list[str]] = {
    "sdxl-turbo": ["generate.steps=1", "generate.guidance=0.0"],
    "sd-lcm": ["generate.guidance=1.0"],
    "flux": ["generate.height=16", "generate.width=16"],
    "flux-schnell": ["generate.height=16", "generate.width=16"],
    "qwen-image": ["generate.height=32", "generate.width=32"],
    "z-image": ["generate.height=32", "generate.width=32"],
    "auraflow": ["generate.height=32", "generate.width=32"],
    "chroma": ["generate.height=16", "generate.width=16"],
    "flux2-klein": ["generate.height=16", "generate.width=16"],
}
"""What differs from two steps and a guidance of 3."""
SAMPLING = diffusion.Sampling(steps=2, guidance=3.0, batch_size=2, height=32, width=32)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(params=small_pipelines.KINDS)
def kind(request: pytest.FixtureRequest, folders: Path) -> str:
    if not (folders / request.param).exists():
        small_pipelines.save(request.param, folders / request.param)
    return str(request.param)


def gmail(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command; its exit code."""
    monkeypatch.setattr("sys.argv", ["gmail", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def generate(monkeypatch: pytest.MonkeyPatch, folder: Path, captions: str, *more: str, run: str = "one") -> None:
    """`gmail generate` on a file of captions."""
    options = ["generate.steps=2", "generate.guidance=3.0", "generate.batch_size=2", *OPTIONS.get(folder.name, [])]
    chosen = [word for option in [f"generate.model={folder}", *options] for word in ("--set", option)]
    line = ["--captions", captions, "--per-caption", "2", "--run", run, "--json", *chosen, *more]
    assert gmail(monkeypatch, "generate", *line) == 0


def images(path: Path) -> dict[tuple[str, int], bytes]:
    artifact = Artifact.load(path)
    assert artifact.verify() == []
    records = artifact.read_jsonl("records.jsonl")
    return {(each["caption"], each["k"]): artifact.file(each["path"]).read_bytes() for each in records}


def test_images_are_the_same_bytes_in_any_order_shard_and_encoding(
    kind: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gmail_cli.stages.generate.drawing.SHARD", 2)
    rows = [{"image_id": noun, "caption_id": noun, "caption": f"a {noun} on a table"} for noun in NOUNS]
    for name, order in (("captions", rows), ("reversed", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
    generate(monkeypatch, folders / kind, "captions.jsonl")
    expected = images(Path("runs/one/generate/latest"))
    assert len(expected) == len(set(expected.values())) == 2 * len(NOUNS)
    told = json.loads(capsys.readouterr().out)["summary"]
    assert told["encodings_reused"] == (told["pipeline"] in diffusion.ENCODED)
    assert told["pipeline"] == json.loads((folders / kind / "model_index.json").read_text())["_class_name"]

    for part in ("2/2", "1/2"):
        generate(monkeypatch, folders / kind, "reversed.jsonl", "--shard", part, "--workspace", "parts")
    assert images(Path("parts/one/generate/latest")) == expected
    monkeypatch.setattr(diffusion, "ENCODED", {})
    generate(monkeypatch, folders / kind, "captions.jsonl", "--workspace", "text")
    assert images(Path("text/one/generate/latest")) == expected


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("sd1", 32),
        ("sd3", 256),
        ("flux", 512),
        ("flux-schnell", 256),
        ("pixart-alpha", 120),
        ("pixart-sigma", 300),
        ("sana", 300),
        ("chroma", 512),
        ("auraflow", 256),
        ("cogview4", 1024),
    ],
    indirect=["kind"],
)
def test_captions_longer_than_the_text_encoders_are_marked(kind: str, limit: int, folders: Path) -> None:
    """What T5 or Gemma reads is set by diffusers, whatever length the tokenizer's own file names."""
    pipeline = pipelines.load_pipeline(str(folders / kind))
    last = next(each for n in ("_3", "_2", "") if (each := getattr(pipeline, f"tokenizer{n}", None)) is not None)
    letters = limit + 1 - len(last("a").input_ids)  # a token each, beside those that begin and end the text
    fits, cut = "a" * letters, "a" * (letters + 1)
    assert [len(last(text).input_ids) for text in (fits, cut)] == [limit, limit + 1]
    sampler = diffusion.Sampler(pipeline, sampling=SAMPLING)
    jobs = [diffusion.Job("fits", fits, 0), diffusion.Job("cut", cut, 0)]
    assert [drawn.truncated for batch in sampler.draw(jobs) for drawn in batch] == [False, True]


@pytest.mark.parametrize("kind", ["sd3"], indirect=True)
def test_an_encoder_that_was_left_out_reads_no_caption(kind: str, folders: Path) -> None:
    pipeline = pipelines.load_pipeline(str(folders / kind))
    pipeline.text_encoder_3 = None
    sampler = diffusion.Sampler(pipeline, sampling=SAMPLING)
    jobs = [diffusion.Job("fits", "a b c", 0), diffusion.Job("cut", "a" * 40, 0)]  # CLIP's 32, T5's 256
    assert [drawn.truncated for drawn in next(sampler.draw(jobs))] == [False, True]


@pytest.mark.parametrize("kind", ["sd2", "sdxl", "sd3", "flux"], indirect=True)
def test_images_that_begin_as_real_ones_are_the_same_bytes_too(kind: str, folders: Path) -> None:
    from gmail_cli.components.scenes import scene_bytes

    def begins(owner: str) -> bytes:
        return scene_bytes("train", NOUNS.index(owner), size=40)

    pipeline = pipelines.load_pipeline(str(folders / kind), image_to_image=True)
    size = 16 if kind == "flux" else 0
    sampling = dataclasses.replace(SAMPLING, steps=4, strength=0.5, height=size, width=size)
    sampler = diffusion.Sampler(pipeline, sampling=sampling, begins=begins)
    assert sampler.reuses_encodings
    jobs = [diffusion.Job(noun, f"a {noun}", k, noun) for noun in NOUNS[:3] for k in range(2)]

    def drawn(jobs: list[diffusion.Job]) -> dict[diffusion.Job, bytes]:
        return {each.job: each.pixels.tobytes() for batch in sampler.draw(jobs) for each in batch}

    whole = drawn(jobs)
    assert len(set(whole.values())) == 6
    assert drawn(jobs[::-1]) == whole
    assert drawn(jobs[4:5]) == {jobs[4]: whole[jobs[4]]}
    moved = [dataclasses.replace(job, owner=NOUNS[4]) for job in jobs]
    assert not set(drawn(moved).values()) & set(whole.values())
    sampler.reuses_encodings = False
    assert drawn(jobs) == whole


@pytest.mark.parametrize("kind", ["flux"], indirect=True)
def test_noise_that_is_not_an_images_own_stops_the_run(kind: str, folders: Path) -> None:
    pipeline = pipelines.load_pipeline(str(folders / kind))
    pipeline.scheduler.register_to_config(stochastic_sampling=True)  # FLUX gives its scheduler no generator
    sampler = diffusion.Sampler(pipeline, sampling=SAMPLING)
    with pytest.raises(UsageError, match=r"FluxPipeline with FlowMatchEuler.*own seed"):
        next(sampler.draw([diffusion.Job("a", "a cat", 0)]))
    with pytest.raises(UsageError, match="takes no negative prompt"):
        diffusion.Sampler(pipeline, sampling=dataclasses.replace(SAMPLING, negative_prompt="bad"))


@pytest.mark.parametrize("kind", ["sd1", "flux"], indirect=True)
def test_a_lora_moves_the_images_as_far_as_its_scale_says(
    kind: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = pipelines.load_pipeline(str(folders / kind))
    name = "transformer" if kind == "flux" else "unet"
    network = getattr(pipeline, name)
    torch.manual_seed(0)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipeline.save_lora_weights(tmp_path, **{f"{name}_lora_layers": get_peft_model_state_dict(network)})
    monkeypatch.chdir(tmp_path)
    Path("captions.txt").write_text("a cat\n")

    def drawn(run: str, *more: str) -> dict[tuple[str, int], bytes]:
        generate(monkeypatch, folders / kind, "captions.txt", *more, run=run)
        return images(Path(f"runs/{run}/generate/latest"))

    lora = ["--set", "generate.lora=pytorch_lora_weights.safetensors"]
    plain, full = drawn("plain"), drawn("full", *lora)
    assert plain.keys() == full.keys()
    assert all(plain[key] != full[key] for key in plain)
    assert drawn("none", *lora, "--set", "generate.lora_scale=0.0") == plain
    artifact = Artifact.load(Path("runs/full/generate/latest"))
    assert artifact.manifest["key"]["models"]["lora"] == file_sha256(Path("pytorch_lora_weights.safetensors"))
    line = ["artifacts", "verify", "--regenerate", "2", str(artifact.path)]
    assert gmail(monkeypatch, *line) == 0
    Path("pytorch_lora_weights.safetensors").rename("moved.safetensors")
    assert gmail(monkeypatch, *line) == 3
    assert gmail(monkeypatch, *line, "--set", "generate.lora=moved.safetensors") == 0


@pytest.mark.parametrize("kind", ["sd1", "pixart-sigma"], indirect=True)
def test_lora_weights_that_do_not_fit_are_refused(kind: str, folders: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"unet.nowhere.lora_A.weight": torch.ones(2, 2), "unet.nowhere.lora_B.weight": torch.ones(2, 2)}, other)
    wrong = (
        (UsageError, "diffusers loads no LoRA into a PixArt")
        if kind.startswith("pixart")
        else (InputError, "does not fit")
    )
    with pytest.raises(wrong[0], match=wrong[1]):
        pipelines.load_pipeline(str(folders / kind), lora=str(other))
    with pytest.raises(InputError, match=r"not a \.safetensors file"):
        pipelines.load_pipeline(str(folders / kind), lora=str(tmp_path))
