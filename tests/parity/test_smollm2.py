"""Real pretrained weights: SmolLM2-135M as a Ministral-3 gives the logits of the Llama model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, Ministral3ForCausalLM, PreTrainedTokenizerBase

from ostro.models.ministral_bidirectional import Ministral3BidirectionalConfig, Ministral3BidirectionalModel
from tests.helpers.smollm2 import MISSING, load_smollm2, smollm2_as_ministral3, smollm2_folder

FOLDER = smollm2_folder()
pytestmark = pytest.mark.skipif(FOLDER is None, reason=MISSING)

TEXTS = [
    "The capital of France is",
    "Search engines read a query and rank documents by how well they answer it, so the",
]


@pytest.fixture(scope="module")
def smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    assert FOLDER is not None
    return load_smollm2(FOLDER)


@pytest.fixture(scope="module")
def ministral3(smollm2: tuple[LlamaForCausalLM, PreTrainedTokenizerBase]) -> Ministral3ForCausalLM:
    return smollm2_as_ministral3(smollm2[0])


def test_logits_are_those_of_the_llama_model(
    smollm2: tuple[LlamaForCausalLM, PreTrainedTokenizerBase], ministral3: Ministral3ForCausalLM
) -> None:
    llama, tokenizer = smollm2
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = llama(**inputs).logits[tokens]
        logits = ministral3(**inputs).logits[tokens]
    # the same float32 operations in the same order, but for the query scale, which multiplies by exactly 1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    last = inputs["attention_mask"][0].sum() - 1
    assert tokenizer.decode(logits[last].argmax()) == " Paris"


def test_its_tower_as_a_bidirectional_model_sees_what_follows(
    smollm2: tuple[LlamaForCausalLM, PreTrainedTokenizerBase], ministral3: Ministral3ForCausalLM
) -> None:
    tokenizer = smollm2[1]
    fields = {key: value for key, value in ministral3.config.to_dict().items() if key != "model_type"}
    with torch.device("meta"):
        model = Ministral3BidirectionalModel(Ministral3BidirectionalConfig(**fields))
    model.load_state_dict(ministral3.model.state_dict(), assign=True)
    model.rotary_emb = ministral3.model.rotary_emb
    river, money = (tokenizer(f"bank of the {noun}", return_tensors="pt")["input_ids"] for noun in ("river", "euro"))
    with torch.no_grad():
        causal = [ministral3.model(input_ids=ids).last_hidden_state[0, 0] for ids in (river, money)]
        both_ways = [model.eval()(input_ids=ids).last_hidden_state[0, 0] for ids in (river, money)]
    torch.testing.assert_close(causal[0], causal[1], atol=1e-5, rtol=1e-5)
    assert torch.nn.functional.cosine_similarity(*both_ways, dim=0) < 0.999
