"""Tiny random pipelines of every family, from the real classes; `FAMILIES` is what the conformance suite runs over.

A new family: one builder and one line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from alignkit.sandbox import models

SIDE = 16  # pixels
WIDTH = 32  # of text states
TOKENS = models.TOKENS
VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


@dataclass(frozen=True)
class Family:
    """build: the pipeline. arguments: what its call needs beside the ordinary. texts: its own conditioning of prompts,
    by the names that the adapter gives. codec: its own latents of pixels, and the pixels that come of them. side:
    pixels a side. guidance: a scale at which it calls the network once a step.
    """

    build: Callable[[], Any]
    texts: Callable[[Any, Sequence[str]], Mapping[str, Tensor]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    codec: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None  # the ordinary one, without shift
    side: int = SIDE
    guidance: float = 1.0


# --- parts ----------------------------------------------------------------------------------------------------------


def vae(levels: int = 2, **changes: Any) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        **{"scaling_factor": 0.7, **changes},
    )


def clip() -> Any:
    tokenizer = models.clip_tokenizer()
    shared = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shared | {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = shared | {"image_size": SIDE, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    return transformers.CLIPModel(config).eval()


def clip_text(*, pooled: bool) -> Any:
    config = clip().config.text_config
    config.projection_dim = WIDTH
    return (transformers.CLIPTextModelWithProjection if pooled else transformers.CLIPTextModel)(config).eval()


def t5(width: int = WIDTH) -> Any:
    size = len(models.t5_tokenizer())
    config = transformers.T5Config(
        vocab_size=size, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return transformers.T5EncoderModel(config).eval()


def gemma_tokenizer(limit: int = 40) -> Any:
    """Letter by letter."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {name: index for index, name in enumerate(names)}
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=limit)


def gemma() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=len(gemma_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return transformers.Gemma2Model(config).eval()


def unet_2d(**changes: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        block_out_channels=(16,),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        **{"cross_attention_dim": WIDTH, **changes},
    )


def sd3_transformer() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )


# --- pipelines ------------------------------------------------------------------------------------------------------


def _sandboxed(name: str) -> Any:
    """A pipeline put together by the sandbox's own builder, from tiny parts."""
    import pytest

    from alignkit.sandbox import generators

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "unet", unet_2d)
        patch.setattr(models, "transformer", sd3_transformer)
        patch.setattr(models, "t5", lambda: t5(2 * WIDTH))
        patch.setattr(models, "text_encoder", clip_text)
        return {"unet": generators.build_unet, "flow": generators.build_flow}[name](vae())


def _sd3() -> Any:
    pipeline = _sandboxed("flow")
    pipeline.vae.register_to_config(shift_factor=0.1)
    return pipeline


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


def _qwen_image() -> Any:
    bytes_ = ["<|endoftext|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {name: index for index, name in enumerate(bytes_)}
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=sight)
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
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])
    language = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    return diffusers.QwenImagePipeline(scheduler, coder, language, tokenizer, net)


# --- their own codec ------------------------------------------------------------------------------------------------


def kl_codec(shift: float = 0.0) -> Callable[[Any, Tensor], tuple[Tensor, Tensor]]:
    """(posterior mode - shift) * scale, as diffusers' own training scripts have it."""

    def code(pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raw = pipeline.vae.encode(pixels * 2 - 1).latent_dist.mode()
        return (raw - shift) * 0.7, pipeline.vae.decode(raw).sample

    return code


def _dc_codec(pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    raw = pipeline.vae.encode(pixels * 2 - 1).latent
    return raw * 0.7, pipeline.vae.decode(raw).sample


def _qwen_codec(pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    raw = pipeline.vae.encode((pixels * 2 - 1)[:, :, None]).latent_dist.mode()
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.5, 1.5, 2.0, 1.0])
    latents = (raw[:, :, 0] - mean[:, None, None]) / std[:, None, None]
    return latents, pipeline.vae.decode(raw).sample[:, :, 0]


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
    """Padded with zeros to 512 places."""
    rows, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=512)
    states, used = torch.zeros(len(rows), 512, WIDTH), torch.zeros(len(rows), 512, dtype=torch.long)
    states[:, : rows.shape[1]], used[:, : rows.shape[1]] = rows, mask
    return {"encoder_hidden_states": states, "encoder_hidden_states_mask": used}


FAMILIES = {
    "unet": Family(lambda: _sandboxed("unet"), _unet_texts),
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
}


def build(name: str) -> Any:
    """The pipeline of a family, with something in every weight: zero-initialised layers would hide mistakes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = FAMILIES[name].build()
        net = pipeline.components["unet" if "unet" in pipeline.components else "transformer"]
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return pipeline
