"""Language models as they are published: start tokens, scaled embeddings, generation settings, thoughts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from gmail_cli.components import sitta
from gmail_cli.components.conversations import DATE, IGNORED, Chat, Conversation, rendered
from gmail_cli.components.heads import SHIPPED_LMS, Captioner, generate, generate_captions, load_lm
from gmail_cli.components.llava import Llava, answer
from gmail_cli.errors import UsageError

TEXTS = ["a red ball on sand", "two blue cubes.", "what is it", "A picture of", "user assistant model think"]
THINKS = """{% for m in messages %}<|{{ m.role }}|>
{% if m.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m.content }}</s>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
"""Qwen 3's way: an empty thought before the last answer, none before those that came earlier."""
GEMMA = """{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}\
<start_of_turn>{{ role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
PHI = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""
LLAMA = """{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]\
{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"""
BARE = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
DIM = 12


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of two layers: its tokenizer begins texts with <bos>, its embeddings are scaled on the way."""
    folder = tmp_path_factory.mktemp("gemma")
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    ends = ["<bos>", "</s>", "<unk>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    inner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=ends + bytes_))
    plain = json.loads(inner.to_str())
    plain["added_tokens"] = [each for each in plain["added_tokens"] if each["content"] in ends]
    inner = Tokenizer.from_str(json.dumps(plain))
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 64}
    config = Gemma3TextConfig(vocab_size=len(tokenizer), head_dim=32, num_key_value_heads=1, **size, **ids)
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_prefix_begins_with_the_start_token_and_has_the_size_of_tokens(gemma: Path):
    lm, tokenizer = load_lm(gemma)
    captioner = Captioner(DIM, lm=lm, tokenizer=tokenizer, lm_name="gemma", prefix_length=3).eval()
    tokens = lm.get_input_embeddings()(torch.arange(len(tokenizer)))
    assert captioner.scale == pytest.approx(float(tokens.std()), rel=0.1)
    about = {"lm": str(gemma), "lm_revision": "", "image_tokens": 1, "prompt": "what", "instructed": False}
    assert float(Llava(DIM, lm=lm, tokenizer=tokenizer, about=about).real.scale) == pytest.approx(captioner.scale)
    seen = []
    lm.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given.get("inputs_embeds")), with_kwargs=True
    )
    features, real = torch.randn(2, DIM), torch.ones(2, dtype=torch.bool)
    captioner(features, real, captioner.tokenize(["a red ball", "two blue cubes."]))
    generate_captions(captioner, features, max_tokens=2)
    for inputs in seen[:2]:  # of training, and of the first token that is written
        torch.testing.assert_close(inputs[:, 0], tokens[:1].expand(2, -1))
        torch.testing.assert_close(inputs[:, 1:4], captioner.prefix(features, real))
    assert captioner.context == 64 - 3 - 1
    with pytest.raises(
        UsageError, match=r"train\.prefix_length = 62 leaves no room for a caption: gemma reads 63 tokens"
    ):
        Captioner(DIM, lm=lm, tokenizer=tokenizer, lm_name="gemma", prefix_length=62)


def test_sitta_begins_with_the_start_token_and_stops_at_a_sentence(gemma: Path):
    lm, tokenizer = load_lm(gemma)
    about = {"lm": str(gemma), "lm_revision": "", "encoder": "0" * 64, "tokens": 2, "orders": 2}
    model = sitta.LinearMap(DIM, lm=lm, tokenizer=tokenizer, about=about)
    model.fit(torch.randn(3, DIM), TEXTS[:3], how="least-squares")
    asked = []
    point, line = tokenizer.convert_tokens_to_ids("."), tokenizer.convert_tokens_to_ids("<0x0A>")

    def ends(_module: object, _args: object, output: object) -> None:
        output.logits[..., point] += 1e4  # type: ignore[attr-defined]

    lm.register_forward_hook(ends)
    lm.register_forward_pre_hook(lambda _m, _a, given: asked.append(given["input_ids"]), with_kwargs=True)
    texts = sitta.write_captions(model, torch.randn(1, DIM), embed=lambda some: torch.zeros(len(some), DIM))
    assert texts == ["."]
    assert bool((asked[0][:, 0] == tokenizer.bos_token_id).all())
    assert tokenizer("\n", add_special_tokens=False)["input_ids"][-1] == line


def test_greedy_search_is_greedy_whatever_the_model_was_published_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shutil.copytree(SHIPPED_LMS["tiny"], tmp_path / "lm")
    file = tmp_path / "lm" / "generation_config.json"
    published = {"repetition_penalty": 9.0, "max_length": 30, "do_sample": True, "temperature": 0.5, "top_k": 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | published))
    written = []
    for place in ("tiny", tmp_path / "lm"):
        lm, tokenizer = load_lm(place)
        ids = torch.tensor([tokenizer("a red ball and a red ball", add_special_tokens=False)["input_ids"]])
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "num_beams": 1}
        written.append(generate(lm, **asked, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    assert torch.equal(*written)
    assert not [each for each in caplog.records if "max_length" in each.getMessage()]


@pytest.mark.parametrize("turns", [("what is it", "a red ball"), ("what is it", "a red ball", "what", "on sand")])
def test_an_empty_thought_is_told_and_not_learned(gemma: Path, turns: tuple[str, ...]):
    _, tokenizer = load_lm(gemma)
    tokenizer.chat_template = THINKS
    chat = Chat(tokenizer, name="qwen3", image_tokens=2, limit=500)
    ids, labels = chat.tokens(Conversation(id="talk", image=None, turns=turns))
    told = tokenizer.decode([label for label in labels if label != IGNORED])
    assert "think" not in told
    assert told.replace(" ", "") == "".join(turns[1::2]).replace(" ", "").replace("ballon", "ball</s>on") + "</s>"
    asked = chat.question(turns[:-1])
    assert asked == ids[: len(asked)], "what is asked is not what was learned"
    assert "<think>" in tokenizer.decode(asked)


def test_a_prompt_is_the_same_every_day(gemma: Path):
    _, tokenizer = load_lm(gemma)
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}" + THINKS
    chat = Chat(tokenizer, name="smollm3", image_tokens=2, limit=500)
    assert DATE in tokenizer.decode(chat.question(["what is it"]))


@pytest.mark.parametrize(
    ("template", "end"),
    [(GEMMA, "<end_of_turn>"), (PHI, "<|end|>"), (LLAMA, "</s>"), (THINKS, "</s>"), (BARE, "</s>"), (None, "</s>")],
)
@pytest.mark.parametrize("special", [True, False])
def test_an_answer_ends_as_the_template_ends_it(gemma: Path, template: str | None, end: str, special: bool):
    """In what is learned and in what is written: nothing behind that token is read as part of the answer."""
    lm, tokenizer = load_lm(gemma)
    for token in ("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>"):
        tokenizer.add_tokens(AddedToken(token, normalized=False, special=special), special)
    lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.chat_template = template
    about = {"lm": "gemma", "lm_revision": "", "image_tokens": 2, "prompt": "what", "instructed": True}
    model = Llava(DIM, lm=lm, tokenizer=tokenizer, about=about).eval()
    chat = Chat(tokenizer, name="gemma", image_tokens=2, limit=500)
    turns = ("what is it", "a red ball", "what", "on sand")
    ids, labels = chat.tokens(Conversation(id="talk", image=None, turns=turns))
    stop = tokenizer.convert_tokens_to_ids(end)
    assert chat.turn_end == stop
    told = [label for label in labels if label != IGNORED]
    assert told.count(stop) == 2
    assert told[-1] == stop
    assert tokenizer.eos_token_id not in {*ids} - {stop}
    if template in (GEMMA, PHI, THINKS):  # the others have no such token, or a space before it
        whole = rendered(tokenizer, turns, ask=False)
        assert tokenizer.decode(ids).replace(" ", "") == whole[: whole.rindex(end) + len(end)].replace(" ", "")
    words = tokenizer("a ball", add_special_tokens=False)["input_ids"]
    said = iter([*words, stop, *words, *words])

    def says(_module: object, _args: object, output: Any) -> None:
        output.logits[:, -1, next(said)] += 1e4

    lm.register_forward_hook(says)
    assert answer(model, [chat.question(turns[:1])], torch.empty(0, 1, DIM), max_tokens=6) == ["a ball"]
