"""SD 1.x / 2.x: a U-Net with eps or v prediction on a discrete VP schedule."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from alignkit.adapters.comfyui import kohya_keys
from alignkit.adapters.lora_files import Origin
from alignkit.diffusion.schedules import VPSchedule
from alignkit.generators.description import Inputs, LatentSize, blank, image_inputs
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Conditioning


class StableDiffusion(PipelineGenerator):
    """Adapter of `StableDiffusionPipeline`; the prediction type comes from the scheduler's config."""

    component = "unet"
    unused_parts = ("safety_checker", "feature_extractor")  # what is blacked out cannot be ranked

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.prediction = pipeline.scheduler.config.prediction_type
        self.noise_schedule = VPSchedule(pipeline.scheduler.alphas_cumprod)

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeddings, _ = self.pipeline.encode_prompt(prompts, self.text_device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings}

    def call_network(self, net: nn.Module, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        return net(x_t, model_time, encoder_hidden_states=cond.tensors["encoder_hidden_states"]).sample

    # --- description ---

    tokens = 77
    origin = Origin(
        "a U-Net (Stable Diffusion 1.x or 2.x, SDXL, LCM)",
        "UNet2DConditionModel",
        r"(down|up)_blocks|mid_block|(in|out)put_blocks|middle_block",
        {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"},
    )
    comfyui = kohya_keys("lora_unet_")

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        """Inputs of all its relatives: SDXL's sizes and pooled text, LCM's guidance."""
        width = config.encoder_hid_dim or config.cross_attention_dim
        tensors = image_inputs(config, size, (cls.tokens, width), "sample")
        sizes = 6 * (config.addition_time_embed_dim or 0)
        if config.addition_embed_type == "text_time":
            pooled = blank(size.B, config.projection_class_embeddings_input_dim - sizes)
            tensors["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": blank(size.B, 6)}
        if config.time_cond_proj_dim:
            tensors["timestep_cond"] = blank(size.B, config.time_cond_proj_dim)
        return tensors
