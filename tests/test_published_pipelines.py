"""Pipelines and LoRA weights as their authors publish them, beyond what `save_pretrained` writes by itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_pipelines
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gmail_cli.components import diffusion, pipelines
from gmail_cli.errors import InputError, SetupError, UsageError

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # in diffusers' own Chroma
]

SAMPLING = diffusion.Sampling(steps=2, guidance=3.0, batch_size=2, height=32, width=32)
WORDS = ["q_proj", "k_proj", "v_proj", "out_proj"]
JOBS = [diffusion.Job(noun, f"a {noun}", 0) for noun in ("cat", "elephant", "dog")]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small pipeline."""
    root = tmp_path_factory.mktemp("published")

    def found(kind: str) -> Path:
        return root / kind if (root / kind).exists() else small_pipelines.save(kind, root / kind)

    return found


def drawn(pipeline: Any, jobs: list[diffusion.Job] = JOBS, **changed: Any) -> list[diffusion.Drawn]:
    sampler = diffusion.Sampler(pipeline, sampling=dataclasses.replace(SAMPLING, **changed))
    return [each for batch in sampler.draw(jobs) for each in batch]


def pixels(pipeline: Any, **changed: Any) -> list[bytes]:
    return [each.pixels.tobytes() for each in drawn(pipeline, **changed)]


def floats(pipeline: Any, jobs: list[diffusion.Job]) -> dict[diffusion.Job, Tensor]:
    """What the pipeline returns, before it is rounded to bytes."""
    sampler = diffusion.Sampler(pipeline, sampling=SAMPLING)
    call, found = sampler._call, {}

    def recorded(rows: Any, encode: Any) -> Any:
        images = call(rows, encode)
        found.update(zip([job for job, _ in rows], images, strict=True))
        return images

    sampler._call = recorded  # type: ignore[method-assign]
    list(sampler.draw(jobs))
    return found


# -- repositories ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sharded", "partly"), [(False, True), (True, False)])
def test_weights_that_are_there_as_a_variant_only(
    folder: Callable[[str], Path], tmp_path: Path, sharded: bool, partly: bool
) -> None:
    plain = pipelines.load_pipeline(str(folder("sdxl")))
    plain.save_pretrained(tmp_path / "fp16", variant="fp16", **({"max_shard_size": "20KB"} if sharded else {}))
    if partly:
        shutil.rmtree(tmp_path / "fp16" / "vae")
        shutil.copytree(folder("sdxl") / "vae", tmp_path / "fp16" / "vae")
    assert any(".fp16" in path.name for path in (tmp_path / "fp16").rglob("*.safetensors"))
    assert pixels(pipelines.load_pipeline(str(tmp_path / "fp16"))) == pixels(plain)


def edited(place: Path, target: Path, **changed: Any) -> str:
    """A copy with another ``model_index.json``."""
    shutil.copytree(place, target)
    index = target / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changed))
    return str(target)


def test_pipelines_that_cannot_be_drawn_with_are_named(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    from diffusers.utils import dummy_torch_and_transformers_and_sentencepiece_objects as dummies

    sd1 = folder("sd1")
    with pytest.raises(SetupError, match=r"is a NextPipeline, which diffusers \d\S* does not have"):
        pipelines.load_pipeline(edited(sd1, tmp_path / "next", _class_name="NextPipeline"))
    with pytest.raises(SetupError, match="draws by code of its own"):
        pipelines.load_pipeline(edited(sd1, tmp_path / "own", _class_name=["pipeline", "OwnPipeline"]))
    with pytest.raises(UsageError, match="StableDiffusionInpaintPipeline, which needs an image"):
        pipelines.load_pipeline(edited(sd1, tmp_path / "hole", _class_name="StableDiffusionInpaintPipeline"))
    monkeypatch.setattr(diffusers, "KolorsPipeline", dummies.KolorsPipeline)  # as where sentencepiece is not installed
    monkeypatch.setattr(pipelines, "find_spec", lambda name: None if name == "sentencepiece" else name)
    with pytest.raises(SetupError, match="is a KolorsPipeline, for which diffusers needs sentencepiece") as told:
        pipelines.load_pipeline(edited(sd1, tmp_path / "kolors", _class_name="KolorsPipeline"))
    assert told.value.hint == "pip install sentencepiece"
    pickled = Path(edited(sd1, tmp_path / "pickled"))
    (pickled / "unet" / "diffusion_pytorch_model.safetensors").rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors") as told:
        pipelines.load_pipeline(str(pickled))
    assert "pickles" in str(told.value.hint)


def test_sd3_that_was_saved_without_its_t5(folder: Callable[[str], Path], tmp_path: Path) -> None:
    from diffusers import StableDiffusion3Pipeline

    parts = pipelines.load_pipeline(str(folder("sd3"))).components
    StableDiffusion3Pipeline(**parts | {"text_encoder_3": None, "tokenizer_3": None}).save_pretrained(tmp_path / "sd3")
    pipeline = pipelines.load_pipeline(str(tmp_path / "sd3"))
    assert pipeline.text_encoder_3 is None
    jobs = [diffusion.Job("fits", "a b c", 0), diffusion.Job("cut", "a" * 40, 0)]  # CLIP reads 32 here
    assert [each.truncated for each in drawn(pipeline, jobs)] == [False, True]


# -- what some pipelines do otherwise --------------------------------------------------------------------------


def test_flux_schnell_reads_as_many_tokens_as_its_authors_give_it(folder: Callable[[str], Path]) -> None:
    pipeline = pipelines.load_pipeline(str(folder("flux-schnell")))
    told: list[int] = []
    pipeline.text_encoder_2.register_forward_pre_hook(lambda _, inputs: told.append(inputs[0].shape[1]))
    drawn(pipeline, height=16, width=16)
    assert set(told) == {256}


def test_qwen_image_is_guided_and_led_away(folder: Callable[[str], Path]) -> None:
    pipeline = pipelines.load_pipeline(str(folder("qwen-image")))
    several = [pixels(pipeline, guidance=scale) for scale in (1.0, 3.0, 6.0)]
    several.append(pixels(pipeline, negative_prompt="bad"))
    assert len({images[0] for images in several}) == 4


def test_nothing_is_said_of_weights_that_are_found_as_a_variant(
    folder: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipelines.load_pipeline(str(folder("sd1"))).save_pretrained(tmp_path, variant="fp16")
    capfd.readouterr()
    pipelines.load_pipeline(str(tmp_path))
    assert "rror" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["qwen-image", "cogview4", "z-image"])
def test_no_longer_prompt_beside_it_moves_an_image(kind: str, folder: Callable[[str], Path]) -> None:
    """They pad to the longest prompt of a batch, which moves the last bits of the others; CogView 4 attends to it."""
    pipeline = pipelines.load_pipeline(str(folder(kind)))
    together, alone = floats(pipeline, JOBS), floats(pipeline, JOBS[:1])
    assert torch.equal(together[JOBS[0]], alone[JOBS[0]])
    assert together.keys() == set(JOBS)


def test_prompts_of_one_number_of_tokens_are_of_one_wherever_they_stand(folder: Callable[[str], Path]) -> None:
    """A full stop is a token of its own where Qwen's turn ends after it, whatever other signs it goes together with."""
    from transformers import Qwen2TokenizerFast

    pipeline = pipelines.load_pipeline(str(folder("qwen-image")))
    vocabulary = pipeline.tokenizer.get_vocab()
    vocabulary = {token: row for token, row in vocabulary.items() if row < 256} | {".<": 259}
    pipeline.tokenizer = Qwen2TokenizerFast(vocab=vocabulary | {"<|im_end|>": 258}, merges=[(".", "<")])
    sampler = diffusion.Sampler(pipeline, sampling=SAMPLING)
    jobs = [diffusion.Job(text, text, 0) for text in ("a cat.", "a cat", "a cow.", "a dog")]
    assert list(sampler._batches(jobs, range(4))) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("kind", ["z-image", "flux2-klein"])
def test_what_a_chat_says_before_a_prompt_takes_room(kind: str, folder: Callable[[str], Path]) -> None:
    sampler = diffusion.Sampler(pipelines.load_pipeline(str(folder(kind))), sampling=SAMPLING)
    room = 512 - len(sampler.pipeline.tokenizer("<|im_start|>user\n").input_ids)
    assert sampler._truncated(["a" * room, "a" * (room + 1)]) == [False, True]


def test_text_encoders_that_read_one_length_whatever_their_tokenizers_say(folder: Callable[[str], Path]) -> None:
    """HunyuanDiT's T5 reads 256 tokens, here two for a word, each of HiDream's four encoders 128."""
    hunyuan = diffusion.Sampler(pipelines.load_pipeline(str(folder("hunyuan-dit"))), sampling=SAMPLING)
    assert hunyuan._truncated([" ".join("a" * words) for words in (127, 128)]) == [False, True]
    hidream = diffusion.Sampler(small_pipelines.hidream(), sampling=SAMPLING)
    assert hidream._truncated(["a" * 128, "a" * 129]) == [False, True]


# -- kinds that were never tried -------------------------------------------------------------------------------


def untried(pipeline: Any, **methods: Any) -> Any:
    """The pipeline as one of a class that nobody has seen."""
    pipeline.__class__ = type("UnseenPipeline", (type(pipeline),), methods)
    return pipeline


def test_an_unseen_pipeline_is_drawn_with_if_rows_do_not_change_each_other(folder: Callable[[str], Path]) -> None:
    expected = pixels(pipelines.load_pipeline(str(folder("sd1"))))
    assert pixels(untried(pipelines.load_pipeline(str(folder("sd1"))))) == expected

    def mixed(self: Any, *args: Any, **options: Any) -> Any:
        own, negative = type(self).__mro__[1].encode_prompt(self, *args, **options)
        return own + own.mean(0), negative

    pipeline = untried(pipelines.load_pipeline(str(folder("sd1"))), encode_prompt=mixed)
    drawn(pipeline, [JOBS[0]])
    with pytest.raises(UsageError, match=r"UnseenPipeline draws an image otherwise .* beside others") as told:
        drawn(pipeline, [JOBS[0], diffusion.Job("dog", "a dog", 0)])
    assert told.value.hint == "set generate.batch_size to 1"
    assert len({*pixels(pipeline, batch_size=1)}) == 3


def test_an_unseen_pipeline_that_is_driven_otherwise_is_named(folder: Callable[[str], Path]) -> None:
    def missing(self: Any, *args: Any, **options: Any) -> Any:
        return {}["it"]

    pipeline = untried(pipelines.load_pipeline(str(folder("sd1"))), encode_prompt=missing)
    with pytest.raises(UsageError, match=r"a UnseenPipeline cannot be driven as other pipelines are: .it"):
        drawn(pipeline)

    def one_alone(self: Any, *args: Any, **options: Any) -> Any:
        return type(self).__mro__[1].encode_prompt(self, *args, **options)[0].expand(3, -1, -1) + torch.zeros(2, 1, 1)

    pipeline = untried(
        pipelines.load_pipeline(str(folder("sd1"))), encode_prompt=one_alone
    )  # as PRX does, with guidance
    with pytest.raises(UsageError, match=r"cannot draw with .*: The size of tensor a") as told:
        drawn(pipeline, [JOBS[0]], batch_size=1, height=0, width=0)
    assert "some pipelines generate.batch_size = 1" in str(told.value.hint)

    def of_images(self: Any, image: Any, prompt: str = "", guidance_scale: float = 1.0) -> Any:
        return image

    with pytest.raises(UsageError, match="does not draw from text alone, it takes no generator"):
        drawn(untried(pipelines.load_pipeline(str(folder("sd1"))), __call__=of_images))


def test_another_size_than_was_asked_for_is_named(folder: Callable[[str], Path]) -> None:
    pipeline = pipelines.load_pipeline(str(folder("flux")))  # it takes multiples of 4 here, and rounds without a word
    with pytest.raises(
        UsageError, match=r"height = 16, width = 20 where generate\.height = 18 and generate\.width = 20"
    ):
        drawn(pipeline, height=18, width=20)


def test_prompts_that_wait_are_tokenised_once(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = diffusion.Sampler(pipelines.load_pipeline(str(folder("qwen-image"))), sampling=SAMPLING)
    told: list[str] = []
    count = sampler._alike
    monkeypatch.setattr(sampler, "_alike", lambda prompt: told.append(prompt) or count(prompt))
    jobs = [diffusion.Job(f"{row}", "a " + "b" * (row % 5), k) for row in range(20) for k in range(2)]
    assert sorted(row for rows in sampler._batches(jobs, range(40)) for row in rows) == [*range(40)]
    assert sorted(told) == sorted({job.prompt for job in jobs})


def test_steps_lie_where_models_of_few_steps_want_them(folder: Callable[[str], Path]) -> None:
    """SDXL's own sampler begins below the last of its 1,000 steps; SDXL-Lightning is drawn from there."""
    sdxl = str(folder("sdxl"))
    for spacing, first in (("default", 751), ("trailing", 999)):
        pipeline = pipelines.load_pipeline(sdxl, scheduler="EulerDiscreteScheduler", timestep_spacing=spacing)
        pipeline.scheduler.set_timesteps(4)
        assert int(pipeline.scheduler.timesteps[0]) == first
    with pytest.raises(UsageError, match="FlowMatchEulerDiscreteScheduler has no such setting"):
        pipelines.load_pipeline(str(folder("sd3")), timestep_spacing="trailing")


def test_a_size_that_does_not_suit_the_network_is_named(folder: Callable[[str], Path]) -> None:
    pipeline = pipelines.load_pipeline("tiny")
    with pytest.raises(UsageError, match=r"height = 24, width = 40: Sizes of tensors"):
        drawn(pipeline, height=24, width=40)


def test_schedulers_of_distilled_models_do_not_take_the_place_of_flow_matching(folder: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="LCMScheduler' does not suit") as told:
        pipelines.load_pipeline(str(folder("sd3")), scheduler="LCMScheduler")
    assert told.value.hint == "use 'default' or one of: FlowMatchEulerDiscreteScheduler"


# -- LoRA ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def lora(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of LoRA weights of denoiser and CLIP text encoders, in diffusers' format."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    def made(kind: str) -> Path:
        target = tmp_path_factory.mktemp(f"lora-{kind}")
        pipeline = pipelines.load_pipeline(str(folder(kind)))
        torch.manual_seed(1)
        layers = {}
        for name in ("unet", "transformer", "text_encoder"):
            if (part := getattr(pipeline, name, None)) is not None:
                modules = WORDS if name == "text_encoder" else ["to_q", "to_v"]
                part.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=modules, init_lora_weights=False))
                layers[f"{name}_lora_layers"] = get_peft_model_state_dict(part)
        pipeline.save_lora_weights(target, **layers)
        return target / "pytorch_lora_weights.safetensors"

    return made


@pytest.mark.parametrize("kind", ["sd1", "flux"])
def test_a_lora_of_the_text_encoder_is_added_too(
    kind: str, folder: Callable[[str], Path], lora: Callable[[str], Path]
) -> None:
    file, size = lora(kind), {"height": 16, "width": 16}
    merged = pipelines.load_pipeline(str(folder(kind)), lora=str(file))
    beside = pipelines.load_pipeline(str(folder(kind)))
    beside.load_lora_weights(str(file.parent), weight_name=file.name)
    assert pixels(merged, **size) == pixels(beside, **size)
    words = {name: each for name, each in load_file(file).items() if name.startswith("text_encoder")}
    save_file(words, file.with_name("words.safetensors"))
    told = pipelines.load_pipeline(str(folder(kind)), lora=str(file.with_name("words.safetensors")))
    assert pixels(told, **size)[0] != pixels(pipelines.load_pipeline(str(folder(kind))), **size)[0]


def test_a_lora_is_read_once(
    folder: Callable[[str], Path], lora: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    file, read = lora("sd1"), list[str]()
    whole = safetensors.torch.load_file
    monkeypatch.setattr(
        "safetensors.torch.load_file", lambda path, **more: read.append(str(path)) or whole(path, **more)
    )
    pipelines.load_pipeline(str(folder("sd1")), lora=str(file))
    assert read.count(str(file)) == 1


def test_a_lora_in_the_format_of_kohya(folder: Callable[[str], Path], lora: Callable[[str], Path]) -> None:
    file = lora("sd1")
    renamed = {}
    for name, weights in load_file(file).items():
        part, _, rest = name.partition(".")
        module, side, _ = rest.rpartition(".lora_A.") if ".lora_A." in rest else rest.rpartition(".lora_B.")
        module = f"lora_unet.{module}" if part == "unet" else f"lora_te.text_model.{module}"
        where = module.replace(".", "_")
        renamed[f"{where}.{'lora_down' if side == '.lora_A.' else 'lora_up'}.weight"] = weights
        renamed[f"{where}.alpha"] = torch.tensor(2.0)
    save_file(renamed, file.with_name("kohya.safetensors"))
    one, other = (
        pipelines.load_pipeline(str(folder("sd1")), lora=str(file.with_name(name)))
        for name in (file.name, "kohya.safetensors")
    )
    assert pixels(one) == pixels(other)


def test_a_lora_of_which_only_a_part_fits_is_refused(
    folder: Callable[[str], Path], lora: Callable[[str], Path]
) -> None:
    """FLUX and Stable Diffusion have the same text encoder, and diffusers leaves out the rest without a word."""
    for kind, other in (("flux", "sd1"), ("sd1", "flux")):
        with pytest.raises(InputError, match=r"of the \d+ modules that it changes the pipeline has 8"):
            pipelines.load_pipeline(str(folder(kind)), lora=str(lora(other)))
