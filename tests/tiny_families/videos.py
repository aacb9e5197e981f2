"""Tiny random text-to-video pipelines, from the real classes: clips of 5 or 9 frames."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor

from alignkit.sandbox import models
from tiny_families.parts import TOKENS, WIDTH, Family, clip_text, t5

MEAN, STD = [0.1, -0.2, 0.3, 0.0], [0.5, 1.5, 2.0, 1.0]

# --- pipelines ------------------------------------------------------------------------------------------------------


def _umt5() -> Any:
    size = len(models.t5_tokenizer())
    config = transformers.UMT5Config(
        vocab_size=size, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return transformers.UMT5EncoderModel(config).eval()


def _wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],  # 4 frames: it always codes so many at a time
        latents_mean=MEAN,
        latents_std=STD,
        scale_factor_spatial=4,
    )


WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": WIDTH,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def _wan(experts: int = 1, **options: Any) -> Any:
    nets = [diffusers.WanTransformer3DModel(**WAN) for _ in range(experts)]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.WanPipeline(models.t5_tokenizer(), _umt5(), _wan_vae(), scheduler, *nets, **options)


def _anyflow() -> Any:
    net = diffusers.AnyFlowTransformer3DModel(**WAN)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    return diffusers.AnyFlowPipeline(models.t5_tokenizer(), _umt5(), net, _wan_vae(), scheduler)


def _cogvideox() -> Any:
    coder = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
        scaling_factor=0.7,
    )
    net = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=2,
        max_text_seq_length=TOKENS,
        use_rotary_positional_embeddings=True,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    return diffusers.CogVideoXPipeline(models.t5_tokenizer(), t5(), coder, net, scheduler)


def _ltx() -> Any:
    coder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        down_block_types=("LTXVideoDownBlock3D", "LTXVideoDownBlock3D"),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        timestep_conditioning=True,
        patch_size=1,
        scaling_factor=0.7,
        decoder_causal=False,
    )
    coder.latents_mean, coder.latents_std = torch.tensor(MEAN), torch.tensor(STD)
    net = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=1,
        caption_channels=WIDTH,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return diffusers.LTXPipeline(scheduler, coder, t5(), models.t5_tokenizer(), net)


def _llama_tokenizer() -> Any:
    """Letters, and the words of the pipeline's template, which would leave no place for a prompt."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    letters = [chr(code) for code in range(33, 127)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=letters, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False
    )
    model.train_from_iterator([DEFAULT_PROMPT_TEMPLATE["template"]] * 2, trainer)
    learnt = json.loads(model.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    return transformers.LlamaTokenizer(vocab=learnt["vocab"], merges=merges, pad_token="<pad>")


def _hunyuan() -> Any:
    tokenizer = _llama_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    coder = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.7,
    )
    net = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(2, 4, 4),
    )
    return diffusers.HunyuanVideoPipeline(
        transformers.LlamaModel(config).eval(),
        tokenizer,
        net,
        coder,
        FlowMatchEulerDiscreteScheduler(shift=7.0),
        clip_text(pooled=False, places=77),
        models.clip_tokenizer(),
    )


# --- their own codec and conditioning -------------------------------------------------------------------------------

Codec = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def _codec(mean: Sequence[float], std: Sequence[float], *rest: Tensor) -> Codec:
    """(posterior mode - mean) / std of each channel."""

    def code(pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raw = pipeline.vae.encode(pixels.transpose(1, 2) * 2 - 1).latent_dist.mode()
        centre, spread = (torch.tensor(values).reshape(1, -1, 1, 1, 1) for values in (mean, std))
        return (raw - centre) / spread, pipeline.vae.decode(raw, *rest).sample.transpose(1, 2)

    return code


def _states(pipeline: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    rows, _ = pipeline.encode_prompt(list(prompts), max_sequence_length=TOKENS)
    return {"encoder_hidden_states": rows}


def _ltx_texts(pipeline: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    rows, mask, _, _ = pipeline.encode_prompt(list(prompts), max_sequence_length=TOKENS)
    return {"encoder_hidden_states": rows, "encoder_attention_mask": mask}


def _hunyuan_texts(pipeline: Any, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    rows, pooled, mask = pipeline.encode_prompt(list(prompts))
    return {"encoder_hidden_states": rows, "encoder_attention_mask": mask, "pooled_projections": pooled}


_LIMIT = {"max_sequence_length": TOKENS}
_PLAIN = _codec([0.0], [1 / 0.7])
_EACH = _codec(MEAN, STD)
_WAN = (_states, _LIMIT, _EACH)

VIDEOS = {
    "wan": Family(_wan, *_WAN, frames=5),
    "wan_tokens": Family(lambda: _wan(expand_timesteps=True), *_WAN, frames=5),
    "wan_high": Family(lambda: _wan(2, boundary_ratio=0.875), *_WAN, frames=5),
    "wan_low": Family(
        lambda: _wan(2, boundary_ratio=0.875),
        *_WAN,
        frames=5,
        options={"expert": "transformer_2"},
        loading={"load_into_transformer_2": True},
        late=True,
    ),
    "anyflow": Family(_anyflow, *_WAN, frames=5),
    "cogvideox": Family(_cogvideox, _states, _LIMIT, _PLAIN, frames=5),
    "ltx": Family(
        _ltx, _ltx_texts, _LIMIT, _codec(MEAN, [value / 0.7 for value in STD], torch.zeros(2)), side=32, frames=9
    ),
    "hunyuan": Family(_hunyuan, _hunyuan_texts, {}, _PLAIN, side=32, frames=5, guidance=6.0),
}
