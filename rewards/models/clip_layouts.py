"""Layouts of CLIP checkpoints: open_clip's names to transformers' names, tensor shapes to a CLIPConfig.

The two libraries have the same network, but open_clip fuses query, key and value, and stores projections transposed.
Not here: open_clip's other towers (timm, CoCa, HF text encoders), whose keys are reported as unexpected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor
from transformers import CLIPConfig

from alignkit.errors import DataError

WIDE_HEADS = 16  # ViT-H, g and G have 16 heads at every width; narrower towers have heads of width 64

_TOWERS = {"visual.": "vision_model.", "": "text_model.", "text.": "text_model."}
_PLACES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # transformers' spelling
    "visual.ln_post.": "vision_model.post_layernorm.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "logit_scale": "logit_scale",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_PARTS = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def transformers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under CLIPModel's names, translated from open_clip's if needed.

    Unknown names are kept, so that loading reports them. Left out: buffers of positions, which old files store.
    """
    kept = {key: value for key, value in tensors.items() if not key.endswith("position_ids")}
    if "visual.class_embedding" not in kept:
        return kept
    return {new: tensor for key, value in kept.items() for new, tensor in _translate(key, value)}


def _translate(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One open_clip tensor under its names in transformers; names of the text tower may begin with `text.`."""
    plain = key.removeprefix("text.")
    tower, _, block = plain.partition("transformer.resblocks.")
    if block and tower in _TOWERS:
        layer, _, part = block.partition(".")
        prefix = f"{_TOWERS[tower]}encoder.layers.{layer}."
        if part.startswith("attn.in_proj_"):
            kind = part.removeprefix("attn.in_proj_")
            yield from ((f"{prefix}self_attn.{n}_proj.{kind}", t) for n, t in zip("qkv", value.chunk(3), strict=True))
        else:
            yield prefix + _renamed(part, _PARTS), value
    elif plain in _PROJECTIONS:
        yield _PROJECTIONS[plain], value.t().contiguous()
    else:
        yield _renamed(plain, _PLACES), value


def _renamed(key: str, table: Mapping[str, str]) -> str:
    """`key` with its prefix, or the whole key, replaced as `table` maps it."""
    for old, new in table.items():
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key.removeprefix(old)
    return key


def config_of(
    tensors: Mapping[str, Tensor], *, name: str, path: str, special: Mapping[str, int], activation: str
) -> CLIPConfig:
    """The CLIPConfig of a state dict in transformers' names; `activation` and the heads are not in the shapes.

    `special`: the tokenizer's bos_token_id, eos_token_id (whose state is the text's pooled state) and pad_token_id.
    Raises DataError where a tensor that determines the config is missing.
    """
    try:
        patches = tensors["vision_model.embeddings.patch_embedding.weight"]
        places = tensors["vision_model.embeddings.position_embedding.weight"]
        vocabulary = tensors["text_model.embeddings.token_embedding.weight"]
        window = tensors["text_model.embeddings.position_embedding.weight"]
        projection = tensors["text_projection.weight"]
        inner = {tower: tensors[f"{tower}.encoder.layers.0.mlp.fc1.weight"] for tower in ("vision_model", "text_model")}
    except KeyError as error:
        raise DataError(f"{name}: '{path}' is no CLIP checkpoint: it lacks {error} (in transformers' names)") from error
    vision, text = (_tower(tensors, tower, weight) | {"hidden_act": activation} for tower, weight in inner.items())
    grid = round((len(places) - 1) ** 0.5)
    vision |= {"image_size": grid * patches.shape[-1], "patch_size": patches.shape[-1]}
    text |= {"vocab_size": len(vocabulary), "max_position_embeddings": len(window), **special}
    text["num_attention_heads"] = max(1, text["hidden_size"] // 64)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=len(projection))


def _tower(tensors: Mapping[str, Tensor], tower: str, inner: Tensor) -> dict[str, int | str]:
    prefix = f"{tower}.encoder.layers."
    layers = {key.removeprefix(prefix).partition(".")[0] for key in tensors if key.startswith(prefix)}
    wide, width = inner.shape
    heads = WIDE_HEADS if width >= 80 * WIDE_HEADS else max(1, width // 64)
    sizes = {"hidden_size": width, "intermediate_size": wide, "num_hidden_layers": len(layers)}
    return sizes | {"num_attention_heads": heads}
