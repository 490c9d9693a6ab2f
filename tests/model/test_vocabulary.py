"""Rows appended to a vocabulary: present tokens keep their logits, and transformers opens what is saved."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from fastvst.batch import pack
from fastvst.data import Processor
from fastvst.data.processor import with_action_tokens
from fastvst.model import Qwen25VL
from fastvst.model.vocabulary import grow_vocabulary, rows_for
from fastvst.vla import ActionCodec
from hf_parity import hf_forward, make_models, make_sample, relative, small_config
from small_run import write_model

PARTS = [("text", 3), ("image", 3, 2), ("text", 9)]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_present_tokens_keep_their_logits_and_transformers_has_the_same_ones(tied, tmp_path) -> None:
    model = make_models(small_config(tie_word_embeddings=tied), torch.float32, seed=1)[0]
    batch = pack([make_sample(model.config, PARTS)])
    before = model.logits(batch)
    model.save_pretrained(tmp_path / "before")  # growth of a checkpoint, not of a fresh model
    model = Qwen25VL.from_pretrained(tmp_path / "before")
    grow_vocabulary(model, 128, seed=5)
    assert relative(model.logits(batch)[:, :101], before) < 1e-6
    names = {name for name, _ in model.named_parameters()}
    assert len(names) == len(list(model.parameters())) and ("lm_head.weight" in names) == (not tied)
    with pytest.warns(UserWarning, match="vocab_size is 128"):
        model.save_pretrained(tmp_path / "after")
    loaded = Qwen25VL.from_pretrained(tmp_path / "after")
    assert loaded.config.vocab_size == 128 and torch.equal(loaded.logits(batch), model.logits(batch))
    theirs, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "after", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    sample = make_sample(model.config, [("text", 5)])
    sample.tokens[2] = 120  # a new token as input
    assert relative(model.logits(pack([sample])), hf_forward(model.config, sample, theirs)[1]) < 1e-5


def test_new_rows_are_near_the_mean_and_differ_and_follow_the_seed() -> None:
    grown = []
    for seed in (0, 0, 1):
        model = make_models(small_config(), torch.float32, seed=1)[0]
        grow_vocabulary(model, 256, seed)
        grown.append(model)
    first, again, other = (model.head_weight.detach() for model in grown)
    assert torch.equal(first, again) and not torch.equal(first, other)
    old = first[:101]
    new = first[101:]
    assert (new - old.mean(0)).abs().max() < old.std(0).max() and torch.cdist(new, new)[0, 1:].min() > 0.01
    embedding = grown[0].model.embed_tokens.weight
    assert not torch.equal(embedding[101:], first[101:])  # two tables, two draws
    grow_vocabulary(grown[0], 256)
    with pytest.raises(ValueError, match="cannot shrink to 255"):
        grow_vocabulary(grown[0], 255)


def test_new_rows_learn_and_keep_the_dtype() -> None:
    model = make_models(small_config(), torch.bfloat16, seed=1)[0]
    model.model.embed_tokens.weight.requires_grad_(False)
    grow_vocabulary(model, 128)
    assert model.head_weight.dtype == torch.bfloat16 and not model.model.embed_tokens.weight.requires_grad
    model.float().logits(pack([make_sample(model.config, [("text", 4)])])).logsumexp(-1).sum().backward()
    assert model.head_weight.grad[101:].abs().sum() > 0


@pytest.mark.parametrize(
    "tokens, rows, expected",
    [(100, 101, 101), (101, 101, 101), (102, 101, 128), (129, 101, 256), (151_921, 0, 151_936)],
)
def test_the_rows_are_whole_multiples_only_where_they_grow(tokens, rows, expected) -> None:
    assert rows_for(tokens, rows) == expected


def test_a_processor_grows_by_request_only_and_its_files_name_the_same_ids(tmp_path) -> None:
    processor = Processor.from_pretrained(write_model(tmp_path / "m"))
    codec = ActionCodec(bins=200)
    with pytest.raises(ValueError, match='so 0 are free. .* grow = true, .* or kind = "text"'):
        with_action_tokens(processor, codec)
    grown = with_action_tokens(processor, codec, grow=True)
    assert processor.model_config.vocab_size == 4096 and grown.model_config.vocab_size == 4352
    assert with_action_tokens(grown, codec, grow=True) is grown
    assert with_action_tokens(grown, ActionCodec("text", 999), grow=True) is grown
    more = with_action_tokens(grown, ActionCodec(bins=256))  # 56 further tokens fit into the rows that were rounded up
    assert more.model_config.vocab_size == 4352
    model = Qwen25VL.from_pretrained(tmp_path / "m")
    grow_vocabulary(model, grown.model_config.vocab_size)
    with pytest.warns(UserWarning, match="vocab_size"):
        model.save_pretrained(tmp_path / "grown", processor=grown)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "grown")
    ours = Processor.from_pretrained(tmp_path / "grown")
    ids = [ours.token_id(name) for name in codec.token_names]
    assert ids == list(range(4096, 4296)) == theirs.convert_tokens_to_ids(codec.token_names)
    assert theirs("x<|action_7|><|action_8|>")["input_ids"][-2:] == [4103, 4104]
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["text_config"]["vocab_size"] == 4352
