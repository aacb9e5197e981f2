"""PixArt-Sigma: an eps transformer. The second half of its output, the learned sigma, is not trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from alignkit.adapters.comfyui import ATTENTION, FEED_FORWARD, Keys
from alignkit.adapters.lora_files import Origin
from alignkit.diffusion.schedules import VPSchedule
from alignkit.generators.description import Inputs, LatentSize, blank_mask, image_inputs
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Conditioning


class PixArtSigma(PipelineGenerator):
    """Adapter of `PixArtSigmaPipeline`. Images have the requested size and captions are not changed: the pipeline's
    resolution binning and caption cleaning are off, because training does neither.
    """

    component = "transformer"

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.prediction = pipeline.scheduler.config.prediction_type
        self.noise_schedule = VPSchedule(pipeline.scheduler.alphas_cumprod)
        self._tokens = min(300, pipeline.tokenizer.model_max_length)

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self._tokens, "use_resolution_binning": False, "clean_caption": False}

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeddings, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.text_device, max_sequence_length=self._tokens
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        micro = {"resolution": None, "aspect_ratio": None}
        output = net(x_t, timestep=model_time, added_cond_kwargs=micro, **cond.tensors).sample
        return output[:, : x_t.shape[1]]

    # --- description ---

    tokens = 300
    origin = Origin("PixArt", "PixArtTransformer2DModel")
    comfyui = Keys("transformer.", rf"transformer_blocks\.\d+\.(attn[12]\.({ATTENTION})|ff\.{FEED_FORWARD})")

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        return {
            **image_inputs(config, size, (cls.tokens, config.caption_channels)),
            "encoder_attention_mask": blank_mask(size.B, cls.tokens),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
