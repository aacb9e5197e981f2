"""What each denoiser is called with, by its class: the shapes that the family's pipeline gives it, without contents.

A new family is one function and one line in each table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import UnknownNameError, nearest

# Places of a prompt as the family's pipeline pads it.
TEXT_TOKENS = {
    "UNet2DConditionModel": 77,
    "SD3Transformer2DModel": 77 + 256,  # CLIP's and T5's
    "FluxTransformer2DModel": 512,
    "PixArtTransformer2DModel": 300,
    "SanaTransformer2DModel": 300,
    "Lumina2Transformer2DModel": 256,
    "QwenImageTransformer2DModel": 512,
    "ZImageTransformer2DModel": 512,
    "DreamLiteUNetModel": 200,
    "WanTransformer3DModel": 512,
    "AnyFlowTransformer3DModel": 512,
    "LTXVideoTransformer3DModel": 128,
    "CogVideoXTransformer3DModel": 226,
    "HunyuanVideoTransformer3DModel": 256,
}
# Height, width and frames that a video family's pipeline draws by default.
VIDEO_SIZES = {
    "WanTransformer3DModel": (480, 832, 81),
    "AnyFlowTransformer3DModel": (480, 832, 81),
    "LTXVideoTransformer3DModel": (512, 704, 161),
    "CogVideoXTransformer3DModel": (480, 720, 49),
    "HunyuanVideoTransformer3DModel": (720, 1280, 129),
}


@dataclass(frozen=True, slots=True)
class Latents:
    """How many latents (B), and their size: T latent frames, H x W places."""

    B: int
    T: int
    H: int
    W: int


Inputs = dict[str, Any]


def denoiser_inputs(net: Any, size: Latents) -> Inputs:
    """Keywords of one call of `net`, in its precision but for the times. Raises UnknownNameError for other classes."""
    name = type(net).__name__
    if name not in _INPUTS:
        known = nearest(name, _INPUTS)
        raise UnknownNameError(
            f"no table says what a {name} is called with.{known} See alignkit.commands.doctor.denoiser_inputs"
        )
    given = _INPUTS[name](net.config, size, TEXT_TOKENS[name])
    times = {key: given.pop(key) for key in ("timestep", "r_timestep", "t") if key in given}
    return {**{key: _cast(value, net.dtype) for key, value in given.items()}, **times}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _cast(inner, dtype) for key, inner in value.items()}
    if isinstance(value, list):
        return [_cast(inner, dtype) for inner in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _mask(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.long)


def _image(config: Any, z: Latents, width: int, text: int, name: str = "hidden_states") -> Inputs:
    """What most take: latents [B, C, H, W], times [B], text states [B, tokens, width]."""
    latents = _empty(z.B, config.in_channels, z.H, z.W)
    return {name: latents, "timestep": _empty(z.B), "encoder_hidden_states": _empty(z.B, text, width)}


def _unet(config: Any, z: Latents, text: int) -> Inputs:
    given = _image(config, z, config.encoder_hid_dim or config.cross_attention_dim, text, "sample")
    sizes = 6 * (config.addition_time_embed_dim or 0)
    if config.addition_embed_type == "text_time":
        pooled = _empty(z.B, config.projection_class_embeddings_input_dim - sizes)
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": _empty(z.B, 6)}
    if config.time_cond_proj_dim:  # LCM's guidance
        given["timestep_cond"] = _empty(z.B, config.time_cond_proj_dim)
    return given


def _dreamlite(config: Any, z: Latents, text: int) -> Inputs:
    """The latent with an empty picture beside it, and the picture's width and height."""
    width = config.encoder_hid_dim or config.cross_attention_dim
    given = _image(config, Latents(z.B, z.T, z.H, 2 * z.W), width, text, "sample")
    return {
        **given,
        "encoder_attention_mask": _mask(z.B, text),
        "added_cond_kwargs": {"time_ids": _empty(z.B, 2)},
    }


def _z_image(config: Any, z: Latents, text: int) -> Inputs:
    """Lists, one entry a picture."""
    pictures = [_empty(config.in_channels, 1, z.H, z.W) for _ in range(z.B)]
    return {"x": pictures, "t": _empty(z.B), "cap_feats": [_empty(text, config.cap_feat_dim) for _ in range(z.B)]}


def _sd3(config: Any, z: Latents, text: int) -> Inputs:
    pooled = _empty(z.B, config.pooled_projection_dim)
    return {**_image(config, z, config.joint_attention_dim, text), "pooled_projections": pooled}


def _packed(config: Any, z: Latents, width: int, text: int) -> Inputs:
    """Latents as tokens [B, H/2 W/2, 4 C]."""
    tokens = _empty(z.B, z.H // 2 * (z.W // 2), config.in_channels)
    return {"hidden_states": tokens, "timestep": _empty(z.B), "encoder_hidden_states": _empty(z.B, text, width)}


def _flux(config: Any, z: Latents, text: int) -> Inputs:
    return {
        **_packed(config, z, config.joint_attention_dim, text),
        "pooled_projections": _empty(z.B, config.pooled_projection_dim),
        "guidance": _empty(z.B) if config.guidance_embeds else None,
        "img_ids": _empty(z.H // 2 * (z.W // 2), 3),
        "txt_ids": _empty(text, 3),
    }


def _qwen_image(config: Any, z: Latents, text: int) -> Inputs:
    places = [[(1, z.H // 2, z.W // 2)]] * z.B
    return {**_packed(config, z, config.joint_attention_dim, text), "img_shapes": places}


def _pixart(config: Any, z: Latents, text: int) -> Inputs:
    micro = {"resolution": None, "aspect_ratio": None}
    return {**_sana(config, z, text), "added_cond_kwargs": micro}


def _sana(config: Any, z: Latents, text: int) -> Inputs:
    return {**_image(config, z, config.caption_channels, text), "encoder_attention_mask": _mask(z.B, text)}


def _lumina2(config: Any, z: Latents, text: int) -> Inputs:
    return {**_image(config, z, config.cap_feat_dim, text), "encoder_attention_mask": _mask(z.B, text)}


def _video(config: Any, z: Latents, width: int, text: int) -> Inputs:
    """As `_image`, with latents [B, C, T, H, W]."""
    latents = _empty(z.B, config.in_channels, z.T, z.H, z.W)
    return {"hidden_states": latents, "timestep": _empty(z.B), "encoder_hidden_states": _empty(z.B, text, width)}


def _wan(config: Any, z: Latents, text: int) -> Inputs:
    return _video(config, z, config.text_dim, text)


def _anyflow(config: Any, z: Latents, text: int) -> Inputs:
    latents = _empty(z.B, z.T, config.in_channels, z.H, z.W)
    times = {"timestep": _empty(z.B, z.T), "r_timestep": _empty(z.B, z.T)}
    return {"hidden_states": latents, **times, "encoder_hidden_states": _empty(z.B, text, config.text_dim)}


def _cogvideox(config: Any, z: Latents, text: int) -> Inputs:
    latents = _empty(z.B, z.T, config.in_channels, z.H, z.W)
    states = _empty(z.B, text, config.text_embed_dim)
    return {"hidden_states": latents, "timestep": _empty(z.B), "encoder_hidden_states": states}


def _ltx(config: Any, z: Latents, text: int) -> Inputs:
    return {
        "hidden_states": _empty(z.B, z.T * z.H * z.W, config.in_channels),
        "timestep": _empty(z.B),
        "encoder_hidden_states": _empty(z.B, text, config.caption_channels),
        "encoder_attention_mask": _mask(z.B, text),
        "num_frames": z.T,
        "height": z.H,
        "width": z.W,
    }


def _hunyuan(config: Any, z: Latents, text: int) -> Inputs:
    return {
        **_video(config, z, config.text_embed_dim, text),
        "encoder_attention_mask": _mask(z.B, text),
        "pooled_projections": _empty(z.B, config.pooled_projection_dim),
        "guidance": _empty(z.B) if config.guidance_embeds else None,
    }


_INPUTS: dict[str, Callable[[Any, Latents, int], Inputs]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _sana,
    "Lumina2Transformer2DModel": _lumina2,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "DreamLiteUNetModel": _dreamlite,
    "WanTransformer3DModel": _wan,
    "AnyFlowTransformer3DModel": _anyflow,
    "LTXVideoTransformer3DModel": _ltx,
    "CogVideoXTransformer3DModel": _cogvideox,
    "HunyuanVideoTransformer3DModel": _hunyuan,
}
