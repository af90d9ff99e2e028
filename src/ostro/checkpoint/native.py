"""`params.json` of Mistral's native layout as the configuration of the transformers model: `config_of_params(params)`.

Tensors are left to `reader`. The file says how a model was made, in Mistral's words; what it leaves out is the same in
all models of the family.

Source: `convert_ministral3_weights_to_hf.py` of transformers; YaRN's `apply_scale` as vLLM reads it: false means that
cosine and sine are not scaled, which transformers says by `mscale` equal to `mscale_all_dim`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ostro.checkpoint.quantization import quantization_config
from ostro.errors import LayoutError

_TEXT = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
}
_VISION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "head_dim",
)
_MAX_TOKENS = 262144
_FP8 = "fp8_e4m3"


def config_of_params(params: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`config.json` of the same model, as plain data.

    Args:
        params: Content of `params.json`.
        path: The file, for messages.

    Returns:
        Of a `Mistral3Config` where there is a vision encoder, else of a `Ministral3Config`; with `quantization_config`
        for FP8 weights.

    Raises:
        LayoutError: When an entry that the model cannot be built without is absent, the position scaling is not one
            of the family's, or the quantisation is another than FP8.
    """
    try:
        text = _text_config(params)
        vision = dict(params["vision_encoder"]) if params.get("vision_encoder") else None
        config = text if vision is None else _outer_config(params, text, vision)
    except (KeyError, TypeError, ValueError) as error:
        raise LayoutError(
            f"{path}: cannot be read as a Mistral-3 model ({error!r}); expected the params.json of a Mistral-3 "
            "release, or add its config.json"
        ) from error
    quantization = params.get("quantization")
    if quantization:
        if quantization.get("qformat_weight") != _FP8:
            raise LayoutError(
                f"{path}: quantization.qformat_weight must be {_FP8!r}, got {quantization.get('qformat_weight')!r}"
            )
        scheme: Literal["static", "dynamic"] = "static" if quantization.get("qscheme_act") == "TENSOR" else "dynamic"
        config["quantization_config"] = quantization_config(scheme)
    return config


def _text_config(params: Mapping[str, Any]) -> dict[str, Any]:
    window = params.get("sliding_window")
    return {
        **{name: params[key] for key, name in _TEXT.items()},
        "model_type": "ministral3",
        "architectures": ["Ministral3ForCausalLM"],
        "dtype": "bfloat16",
        "max_position_embeddings": params.get("max_position_embeddings") or params.get("max_seq_len") or _MAX_TOKENS,
        "rope_parameters": _rope(params),
        "sliding_window": None if window is None else int(window),
        "tie_word_embeddings": bool(params.get("tied_embeddings", False)),
    }


def _rope(params: Mapping[str, Any]) -> dict[str, Any]:
    beta = (params.get("llama_4_scaling") or {"beta": 0.0})["beta"]
    yarn = params.get("yarn")
    if not yarn:
        return {"rope_type": "default", "rope_theta": params["rope_theta"], "llama_4_scaling_beta": beta}
    return {
        "rope_type": "yarn",
        "rope_theta": params["rope_theta"],
        "factor": float(yarn["factor"]),
        "original_max_position_embeddings": int(yarn["original_max_position_embeddings"]),
        "beta_fast": float(yarn["beta"]),
        "beta_slow": float(yarn["alpha"]),
        "mscale": 1.0,
        "mscale_all_dim": 0.0 if yarn.get("apply_scale", False) else 1.0,
        "llama_4_scaling_beta": float(beta),
    }


def _outer_config(params: Mapping[str, Any], text: dict[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    tower = {key: vision[key] for key in _VISION if key in vision}
    rope = {"rope_type": "default", "rope_theta": vision["rope_theta"]}
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_index": vision.get("image_token_id", 10),
        "model_type": "mistral3",
        "multimodal_projector_bias": bool(vision.get("adapter_bias", False)),
        "projector_hidden_act": "gelu",
        "spatial_merge_size": vision["spatial_merge_size"],
        "text_config": {key: value for key, value in text.items() if key not in ("architectures", "dtype")},
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": {**tower, "hidden_act": "silu", "model_type": "pixtral", "rope_parameters": rope},
        "vision_feature_layer": -1,
    }
