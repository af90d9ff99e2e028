"""The same weights in Mistral's native layout, written from the format's description, not through Ostro's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_LAST = {"weight": "weight", "weight_scale_inv": "qscale_weight", "activation_scale": "qscale_act"}
_BLOCKS = {
    "self_attn": {
        "q_proj": "attention.wq",
        "k_proj": "attention.wk",
        "v_proj": "attention.wv",
        "o_proj": "attention.wo",
    },
    "mlp": {"gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3"},
}
_BLOCKS |= {"attention": _BLOCKS["self_attn"], "feed_forward": _BLOCKS["mlp"]}
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
_WHOLE = {
    "lm_head.weight": "output.weight",
    "model.language_model.embed_tokens.weight": "tok_embeddings.weight",
    "model.language_model.norm.weight": "norm.weight",
    "model.vision_tower.patch_conv.weight": "vision_encoder.patch_conv.weight",
    "model.vision_tower.ln_pre.weight": "vision_encoder.ln_pre.weight",
    "model.multi_modal_projector.norm.weight": "pre_mm_projector_norm.weight",
    "model.multi_modal_projector.patch_merger.merging_layer.weight": "patch_merger.merging_layer.weight",
    "model.multi_modal_projector.linear_1.weight": "vision_language_adapter.w_in.weight",
    "model.multi_modal_projector.linear_2.weight": "vision_language_adapter.w_out.weight",
}


def native_name(runtime: str) -> str:
    """Mistral's name of a runtime parameter or scale."""
    if runtime in _WHOLE:
        return _WHOLE[runtime]
    inside = runtime.removeprefix("model.").removeprefix("language_model.")
    inside = inside.replace("vision_tower.", "vision_encoder.")
    prefix, _, rest = inside.partition("layers.")
    number, *path, last = rest.split(".")
    stored = _NORMS.get(path[0], path[0]) if len(path) == 1 else _BLOCKS[path[0]][path[1]]
    return f"{prefix}layers.{number}.{stored}.{_LAST[last]}"


def write_native_folder(folder: Path, source: Path, *, num_shards: int = 1) -> None:
    """Writes `params.json` and `consolidated*.safetensors` with the weights of a folder in the identity layout.

    Args:
        folder: Made when it does not exist.
        source: An identity folder with one file.
        num_shards: Files to spread the tensors over, numbered and without an index when there are several.
    """
    config = json.loads((source / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    stored = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            part = vision if "vision" in name else text
            tensor = interleaved(tensor, part["head_dim"] or part["hidden_size"] // part["num_attention_heads"])
        stored[native_name(name)] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params(config)))
    for shard in range(num_shards):
        name = f"consolidated-{shard + 1:05d}-of-{num_shards:05d}" if num_shards > 1 else "consolidated"
        part_of_keys = {key: stored[key].contiguous() for key in sorted(stored)[shard::num_shards]}
        save_file(part_of_keys, folder / f"{name}.safetensors")


def interleaved(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows `[0, 1, ..., d - 1]` of each head as `[0, d / 2, 1, d / 2 + 1, ...]`; one scale for all stays."""
    if tensor.numel() == 1:
        return tensor
    half = head_dim // 2
    order = [
        head + place + side * half
        for head in range(0, len(tensor), head_dim)
        for place in range(half)
        for side in (0, 1)
    ]
    return tensor.view(torch.uint8)[order].view(tensor.dtype) if tensor.dtype.itemsize == 1 else tensor[order]


def params(config: dict[str, Any]) -> dict[str, Any]:
    """`params.json` of a `config.json`."""
    text, vision, rope = config["text_config"], config["vision_config"], config["text_config"]["rope_parameters"]
    original = rope["original_max_position_embeddings"]
    result: dict[str, Any] = {
        "dim": text["hidden_size"],
        "n_layers": text["num_hidden_layers"],
        "hidden_dim": text["intermediate_size"],
        "n_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_key_value_heads"],
        "norm_eps": text["rms_norm_eps"],
        "head_dim": text["head_dim"],
        "vocab_size": text["vocab_size"],
        "rope_theta": rope["rope_theta"],
        "tied_embeddings": config["tie_word_embeddings"],
        "max_position_embeddings": text["max_position_embeddings"],
        "yarn": {
            "factor": rope["factor"],
            "original_max_position_embeddings": original,
            "beta": rope["beta_fast"],
            "alpha": rope["beta_slow"],
            "apply_scale": False,
        },
        "llama_4_scaling": {"beta": rope["llama_4_scaling_beta"], "original_max_position_embeddings": original},
        "vision_encoder": {
            **{key: vision[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")},
            **{key: vision[key] for key in ("num_attention_heads", "num_channels", "image_size", "patch_size")},
            "rope_theta": vision["rope_parameters"]["rope_theta"],
            "spatial_merge_size": config["spatial_merge_size"],
            "image_token_id": config.get("image_token_index", config.get("image_token_id")),
            "image_break_token_id": 12,
            "image_end_token_id": 13,
            "max_image_size": vision["image_size"],
            "adapter_bias": False,
            "mm_projector_id": "patch_merge",
            "add_pre_mm_projector_layer_norm": True,
        },
    }
    if config.get("quantization_config"):
        result["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    return result
