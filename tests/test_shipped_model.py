"""The shipped model's files say what other packages ask of a model and its tokenizer."""

import json

from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_ssm.models import REVIEWS
from scripts.train_reviews import EOS, EOS_ID, PAD_ID, SENTIMENT, SENTIMENT_ID, Recipe, new_model


def test_every_special_token_is_named() -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS), AutoTokenizer.from_pretrained(REVIEWS)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == (EOS, EOS_ID)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (SENTIMENT, SENTIMENT_ID)
    assert tokenizer("").input_ids == [SENTIMENT_ID]  # the token behind each text is the one that ends it
    for config in (model.config, model.generation_config):  # a text that is written ends at <eos>
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (EOS_ID, EOS_ID, PAD_ID)


def test_the_script_that_trains_it_writes_the_same_configuration() -> None:
    made = new_model(Recipe()).config.to_dict()
    config = json.loads((REVIEWS / "config.json").read_text(encoding="utf-8"))
    names = [*(name for name in config if name.endswith("_token_id")), "vocab_size", "hidden_size", "state_size"]
    assert {name: made[name] for name in names} == {name: config[name] for name in names}
