"""Z-Image: a single-stream flow transformer that takes lists, with reversed time and velocity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from alignkit.adapters.lora_files import Origin
from alignkit.generators.description import Inputs, LatentSize, blank
from alignkit.generators.families.mixins import flow_schedule, linear_sigmas
from alignkit.generators.pipeline import PipelineGenerator
from alignkit.records import Conditioning


class ZImage(PipelineGenerator):
    """Adapter of `ZImagePipeline`; prompts are padded to `tokens` tokens, so that rows of a cache have one shape.

    The network gets each prompt without its padding, as in the pipeline. Not supported: cfg_normalization,
    cfg_truncation.
    """

    component = "transformer"
    prediction = "flow"
    tokens = 512
    unguided = 0.0

    def __init__(self, pipeline: Any, name: str) -> None:
        super().__init__(pipeline, name)
        self.noise_schedule = flow_schedule(pipeline.scheduler.config)

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.tokens}

    def text_window(self, tokenizer: Any) -> tuple[str, int]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "{}"}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return text.partition("{}")[0], self.tokens

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        # A copy, because the pipeline writes its chat template into its argument.
        rows, _ = self.pipeline.encode_prompt(list(prompts), self.text_device, False, max_sequence_length=self.tokens)
        states = torch.stack([pad(row, (0, 0, 0, self.tokens - len(row))) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=self.text_device)
        mask = torch.arange(self.tokens, device=self.text_device) < lengths[:, None]
        return {"encoder_hidden_states": states, "mask": mask.float()}

    def grid_arguments(self, steps: int, shape: Sequence[int]) -> dict[str, Any]:
        return linear_sigmas(self.pipeline.scheduler.config, steps, tokens=(shape[-2] // 2) * (shape[-1] // 2))

    def guide(self, cond_pred: Tensor, uncond_pred: Tensor, scale: float) -> Tensor:
        """The scale counts from the conditional prediction on, as in the guidance paper."""
        return cond_pred + scale * (cond_pred - uncond_pred)

    @property
    def pixel_multiple(self) -> int:
        return 2 * self.spatial_ratio

    def call_network(self, net: Any, x_t: Tensor, model_time: Tensor, cond: Conditioning) -> Tensor:
        rows = zip(cond.tensors["encoder_hidden_states"], cond.tensors["mask"].bool(), strict=True)
        images = list(x_t.unsqueeze(2).unbind(0))
        velocity = net(images, 1 - model_time, [states[mask] for states, mask in rows]).sample
        return -torch.stack(velocity).squeeze(2)

    # --- description ---

    origin = Origin("Z-Image", "ZImageTransformer2DModel", r"(layers|_refiner)\.\d+\.attention\.to_")

    @classmethod
    def network_inputs(cls, config: Any, size: LatentSize) -> Inputs:
        """Lists with one entry for each image."""
        images = [blank(config.in_channels, 1, size.H, size.W) for _ in range(size.B)]
        texts = [blank(cls.tokens, config.cap_feat_dim) for _ in range(size.B)]
        return {"x": images, "t": blank(size.B), "cap_feats": texts}
