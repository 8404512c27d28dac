"""The captioner that retrieves: memory, words that stand out, what is supervised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from gmail_cli.components import ifcap
from gmail_cli.components.heads import IGNORED
from gmail_cli.components.tokenizer import train_tokenizer
from gmail_cli.errors import InputError

TEXTS = ("a red ball on snow", "the red ball", "a blue ball", "a tree on snow", "a red house")
DIM = 8


@pytest.fixture
def captioner(tmp_path: Path) -> ifcap.RetrievalCaptioner:
    tokenizer = train_tokenizer(TEXTS, entries=560)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=2, n_embd=32, n_head=2, n_positions=64, initializer_range=0.3, **ends
    )
    return ifcap.RetrievalCaptioner(
        DIM,
        captions=TEXTS,
        vectors=functional.normalize(torch.randn(len(TEXTS), DIM), dim=-1),
        retrieved=2,
        filtered=3,
        lm=GPT2LMHeadModel(config).eval(),
        tokenizer=tokenizer,
        lm_name="mini",
        prefix_length=3,
        tune_lm=True,
    )


def test_a_text_never_finds_itself(captioner: ifcap.RetrievalCaptioner):
    found = captioner.retrieve(captioner.vectors, count=5)
    assert found[:, 0].tolist() == [0, 1, 2, 3, 4]
    others = captioner.retrieve(captioner.vectors, count=5, but=torch.arange(5))
    assert others.tolist() == found[:, 1:].tolist()
    beyond = captioner.retrieve(captioner.vectors, count=2, but=torch.tensor([9, 9, 9, 9, 9]))  # not in the memory
    assert beyond.tolist() == found[:, :2].tolist()


def test_words_that_stand_out():
    """Counts red 3, ball 2, snow 1, blue 1: mean 1.75, deviation 0.83, so more than 2.58."""
    assert ifcap.standing_out(["a red ball", "the red ball on snow", "red and blue"]) == ["red"]
    assert ifcap.standing_out(["a ball", "a tree"]) == []
    assert ifcap.standing_out(["on the other"]) == []


def test_only_the_caption_is_supervised_and_its_sentence_is_read(captioner: ifcap.RetrievalCaptioner):
    captioner.fusion.out_proj.weight.data.normal_()
    answers = [row[row != IGNORED] for row in captioner.tokenize(TEXTS[:2])]
    told = captioner.sentences([["red", "ball"], []])
    assert [captioner.tokenizer.decode(row) for row in told] == [
        "there are red , ball in image .",
        "there are something in image .",
    ]
    inputs, wanted = ifcap.behind(told, answers, context=captioner.context)
    real = torch.ones(2, dtype=torch.bool)
    prefix = captioner.prefix(captioner.vectors[:2], real)
    loss = captioner.loss_behind(prefix, inputs, wanted)
    alone = []
    for row in range(2):  # each by itself, without padding, from the model's own log-probabilities
        tokens = torch.tensor([told[row] + answers[row].tolist()])
        embedded = torch.cat([prefix[row : row + 1], captioner.lm.get_input_embeddings()(tokens)], dim=1)
        scores = captioner.lm(inputs_embeds=embedded).logits.log_softmax(-1)[0, -len(answers[row]) - 1 : -1]
        alone.append(-scores.gather(1, answers[row][:, None]).flatten())
    torch.testing.assert_close(loss, torch.cat(alone).mean())
    loss.backward()
    assert captioner.fusion.in_proj_weight.grad is not None
    assert float(captioner.fusion.in_proj_weight.grad.abs().max()) > 0
    other, expected = ifcap.behind(captioner.sentences([["tree"], []]), answers, context=captioner.context)
    assert not torch.allclose(captioner.loss_behind(prefix, other, expected), loss)
    cut, _ = ifcap.behind(told, answers, context=len(answers[0]) + 2)
    assert cut.shape[1] == len(answers[0]) + 2


def test_captions_do_not_depend_on_who_is_read_together(captioner: ifcap.RetrievalCaptioner, tmp_path: Path):
    captioner.fusion.out_proj.weight.data.normal_()
    features = torch.randn(6, DIM)
    together = ifcap.write_captions(captioner, features, max_tokens=5)
    one_by_one = [ifcap.write_captions(captioner, row[None], max_tokens=5)[0] for row in features]
    assert together == one_by_one
    assert len(set(together)) > 1
    ifcap.save_retrieval_captioner(captioner, tmp_path)
    again = ifcap.load_retrieval_captioner(tmp_path)
    assert ifcap.write_captions(again, features, max_tokens=5) == together
    assert again.config() == captioner.config()
    (tmp_path / "captions.json").unlink()
    with pytest.raises(InputError, match="holds no IFCap captioner"):
        ifcap.load_retrieval_captioner(tmp_path)
