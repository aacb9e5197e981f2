"""The parts of the sandbox's video generator before training: Wan's classes at small size.

One function a model, as in `models.py`. Initial weights are functions of torch's seed.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from alignkit.sandbox.film_captions import TOKENS, WORDS
from alignkit.sandbox.models import t5_tokenizer

CHANNELS = 32  # of a latent
SHIFT = 3.0  # of times in training and sampling: most of a clip is decided at high noise
TEXT_WIDTH = 128


def tokenizer() -> T5Tokenizer:
    """One token a word."""
    return t5_tokenizer(TOKENS, WORDS)


def vae() -> AutoencoderKLWan:
    """1 + 4 k frames of 32 x 32 x 3 pixels <-> 1 + k latent frames of 4 x 4 x 32.

    As in Wan 2.2, the network sees patches of 2 x 2 pixels, which makes it four times cheaper.
    """
    coder = AutoencoderKLWan(
        base_dim=16,
        dim_mult=[1, 2, 3],
        z_dim=CHANNELS,
        num_res_blocks=1,
        temperal_downsample=[True, True],  # sic
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    with torch.no_grad():
        # torch's own convolutions weaken a signal threefold in variance, so that of the latents is below the
        # posterior's noise and no image is learnt for hundreds of steps.
        for layer in coder.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d):
                layer.weight.mul_(3**0.5)
                layer.bias.zero_()
        coder.quant_conv.bias[CHANNELS:] -= 10  # almost no noise
        coder.decoder.conv_out.bias.fill_(-0.85)  # dark, as most pixels are
    return coder


@torch.no_grad()
def inflate(coder: AutoencoderKLWan) -> None:
    """Make an autoencoder that has learnt single frames code each clip frame by frame, as a start for whole clips.

    Single frames train the last of a kernel's taps in time alone. The others, still random, become 0; where time is
    halved the last of two frames is kept, where it is doubled each frame is repeated.
    """
    for name, layer in coder.named_modules():
        if isinstance(layer, nn.Conv3d) and layer.kernel_size[0] > 1:
            layer.weight[:, :, :-1] = 0
            if name.endswith("time_conv"):
                width = layer.in_channels
                layer.weight[:, :, -1, 0, 0] = torch.eye(width).repeat(layer.out_channels // width, 1)
                layer.bias.zero_()


def text_encoder() -> UMT5EncoderModel:
    """One layer, trained together with the transformer."""
    config = UMT5Config(
        vocab_size=len(tokenizer()),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config).eval()


def transformer() -> WanTransformer3DModel:
    """The flow-matching transformer: 144 tokens, one for each place of 8 x 8 pixels and 4 frames, in six blocks."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=576,
        num_layers=6,
        rope_max_seq_len=32,
    )


def pipeline(coder: AutoencoderKLWan) -> WanPipeline:
    """Components as in Wan 2.1."""
    return WanPipeline(tokenizer(), text_encoder(), coder, FlowMatchEulerDiscreteScheduler(shift=SHIFT), transformer())
