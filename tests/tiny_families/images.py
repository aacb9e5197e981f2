"""Tiny random text-to-image pipelines, from the real classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from alignkit.sandbox import models
from tiny_families.parts import (
    SIDE,
    TOKENS,
    VP,
    WIDTH,
    Family,
    clip_text,
    gemma,
    gemma_tokenizer,
    kl_codec,
    qwen_tokenizer,
    sd3_transformer,
    t5,
    unet_2d,
    vae,
)

DREAMLITE = (  # the beginning of its template
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)

# --- pipelines ------------------------------------------------------------------------------------------------------


def _unet() -> Any:
    """A pipeline put together by the sandbox's own builder, from tiny parts."""
    import pytest

    from alignkit.sandbox import generators

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "unet", unet_2d)
        patch.setattr(models, "text_encoder", lambda: clip_text(pooled=False))
        return generators.build_unet(vae())


def _sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        sd3_transformer(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae(shift_factor=0.1),
        clip_text(pooled=True),
        models.clip_tokenizer(),
        clip_text(pooled=True),
        models.clip_tokenizer(),
        t5(2 * WIDTH),
        models.t5_tokenizer(),
    )


def _sdxl() -> Any:
    net = unet_2d(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae(),
        clip_text(pooled=False),
        clip_text(pooled=True),
        models.clip_tokenizer(),
        models.clip_tokenizer(),
        net,
        diffusers.EulerDiscreteScheduler(
            **{name: value for name, value in VP.items() if name != "clip_sample"},
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


def _flux() -> Any:
    net = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae(shift_factor=0.1),
        clip_text(pooled=False),
        models.clip_tokenizer(),
        t5(),
        models.t5_tokenizer(),
        net,
    )


def _pixart() -> Any:
    net = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=SIDE // 2,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(models.t5_tokenizer(), t5(), vae(), net, diffusers.DDIMScheduler(**VP))


def _sana() -> Any:
    coder = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.7,
    )
    net = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=SIDE // 2,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.SanaPipeline(gemma_tokenizer(), gemma(), coder, net, scheduler)


def _lcm() -> Any:
    net = unet_2d(time_cond_proj_dim=16)
    scheduler = diffusers.LCMScheduler(**VP, original_inference_steps=50)
    parts = (vae(), clip_text(pooled=False), models.clip_tokenizer(), net, scheduler)
    return diffusers.LatentConsistencyModelPipeline(*parts, None, None, requires_safety_checker=False)


def _lumina2() -> Any:
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(256, 16, 16),
        cap_feat_dim=WIDTH,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return diffusers.Lumina2Pipeline(net, scheduler, vae(4, shift_factor=0.1), gemma(), gemma_tokenizer(240))


def _qwen_sizes(tokenizer: Any, **sight: Any) -> dict[str, Any]:
    """Of a language model that sees."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }
    sight |= {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    return {"text_config": text, "vision_config": sight}


def _qwen_image() -> Any:
    tokenizer = qwen_tokenizer()
    config = transformers.Qwen2_5_VLConfig(**_qwen_sizes(tokenizer))
    coder = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 2.0, 1.0],
    )
    net = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    language = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    return diffusers.QwenImagePipeline(scheduler, coder, language, tokenizer, net)


def _z_image() -> Any:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}user: {{ message['content'] }}{% endfor %}"
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    net = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 4],
        axes_lens=[600, 16, 16],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    language = transformers.Qwen3Model(config).eval()
    return diffusers.ZImagePipeline(scheduler, vae(shift_factor=0.1), language, tokenizer, net)


def _dreamlite() -> Any:
    tokenizer = qwen_tokenizer(DREAMLITE)
    config = transformers.Qwen3VLConfig(**_qwen_sizes(tokenizer, deepstack_visual_indexes=[0]))
    language = transformers.Qwen3VLForConditionalGeneration(config).eval()
    coder = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        scaling_factor=0.7,
    )
    net = diffusers.DreamLiteUNetModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 8, 16),
        attention_head_dim=(1, 1, 2),
        layers_per_block=1,
        norm_num_groups=4,
        ff_mult=3,
        use_linear_projection=True,
        cross_attention_dim=WIDTH,
        addition_embed_type="time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=2 * 8,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.DreamLitePipeline(language, tokenizer, None, coder, net, scheduler)


# --- their own codec ------------------------------------------------------------------------------------------------


def _dc_codec(pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    raw = pipeline.vae.encode(pixels * 2 - 1).latent
    return raw * 0.7, pipeline.vae.decode(raw).sample


def _qwen_codec(pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    raw = pipeline.vae.encode((pixels * 2 - 1)[:, :, None]).latent_dist.mode()
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.5, 2.0, 1.0])
    latents = (raw[:, :, 0] - mean[:, None, None]) / std[:, None, None]
    return latents, pipeline.vae.decode(raw).sample[:, :, 0]


def _tiny_codec(pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    raw = pipeline.vae.encode(pixels * 2 - 1).latents
    return raw * 0.7, pipeline.vae.decode(raw).sample


# --- their own conditioning -----------------------------------------------------------------------------------------


def _unet_texts(pipeline: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    rows, _ = pipeline.encode_prompt(list(prompts), "cpu", 1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": rows}


def _sd3_texts(pipeline: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    texts = [list(prompts)] * 3
    rows, _, pooled, _ = pipeline.encode_prompt(*texts, do_classifier_free_guidance=False, max_sequence_length=TOKENS)
    return {"encoder_hidden_states": rows, "pooled_projections": pooled}


def _sdxl_texts(pipeline: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    rows, _, pooled, _ = pipeline.encode_prompt(list(prompts), list(prompts), "cpu", 1, True)
    return {"encoder_hidden_states": rows, "text_embeds": pooled}


def _flux_texts(pipeline: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    rows, pooled, _ = pipeline.encode_prompt(list(prompts), list(prompts), max_sequence_length=TOKENS)
    return {"encoder_hidden_states": rows, "pooled_projections": pooled}


def _masked_texts(pipeline: Any, prompts: Sequence[str], **options: Any) -> Mapping[str, Tensor]:
    rows, mask, _, _ = pipeline.encode_prompt(list(prompts), True, **options)
    return {"encoder_hidden_states": rows, "encoder_attention_mask": mask}


def _sana_texts(pipeline: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    # The call's own default, as it stands in its signature.
    instruction = type(pipeline).__call__.__wrapped__.__defaults__[-1]
    return _masked_texts(pipeline, prompts, max_sequence_length=40, complex_human_instruction=instruction)


def _lumina2_texts(pipeline: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    return _masked_texts(pipeline, prompts, max_sequence_length=240)


def _qwen_texts(pipeline: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    states, used = _padded(*pipeline.encode_prompt(list(prompts), max_sequence_length=512), 512)
    return {"encoder_hidden_states": states, "encoder_hidden_states_mask": used}


def _z_image_texts(pipeline: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    rows, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=512)
    states, mask = torch.zeros(len(rows), 512, WIDTH), torch.zeros(len(rows), 512)
    for index, row in enumerate(rows):
        states[index, : len(row)], mask[index, : len(row)] = row, 1
    return {"encoder_hidden_states": states, "mask": mask}


def _dreamlite_texts(pipeline: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    told = [f"[Generate]: {prompt}" for prompt in prompts]
    given = pipeline.encode_prompt("generate", told, "cpu", torch.float32, max_sequence_length=200)
    return dict(zip(("encoder_hidden_states", "encoder_attention_mask"), _padded(*given, 200), strict=True))


def _padded(rows: Tensor, mask: Tensor, places: int) -> tuple[Tensor, Tensor]:
    states, used = torch.zeros(len(rows), places, WIDTH), torch.zeros(len(rows), places, dtype=torch.long)
    states[:, : rows.shape[1]], used[:, : rows.shape[1]] = rows, mask
    return states, used


IMAGES = {
    "unet": Family(_unet, _unet_texts),
    "flow": Family(_sd3, _sd3_texts, {"max_sequence_length": TOKENS}, kl_codec(0.1)),
    "lcm": Family(_lcm, _unet_texts, guidance=8.5),
    "sdxl": Family(_sdxl, _sdxl_texts),
    "flux": Family(_flux, _flux_texts, {"max_sequence_length": TOKENS}, kl_codec(0.1), guidance=3.5),
    "pixart": Family(
        _pixart,
        lambda pipeline, prompts: _masked_texts(pipeline, prompts, max_sequence_length=TOKENS),
        {"max_sequence_length": TOKENS, "use_resolution_binning": False, "clean_caption": False},
    ),
    "sana": Family(
        _sana, _sana_texts, {"max_sequence_length": 40, "use_resolution_binning": False}, _dc_codec, side=32
    ),
    "lumina2": Family(_lumina2, _lumina2_texts, {"max_sequence_length": 240}, kl_codec(0.1), side=32),
    "qwen_image": Family(_qwen_image, _qwen_texts, {"max_sequence_length": 512, "negative_prompt": " "}, _qwen_codec),
    "z_image": Family(_z_image, _z_image_texts, {"max_sequence_length": 512}, kl_codec(0.1), guidance=0.0),
    "dreamlite": Family(
        _dreamlite, _dreamlite_texts, {"max_sequence_length": 200}, _tiny_codec, without=("processor",), alone=True
    ),
}
