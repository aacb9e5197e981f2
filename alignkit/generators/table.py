"""The one table of generator families, by the class of the pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignkit.resolve import resolve

if TYPE_CHECKING:
    from alignkit.adapters.lora_files import Origin
    from alignkit.generators.description import FamilyDescription

GENERATORS = {
    "StableDiffusionPipeline": "alignkit.generators.families.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "alignkit.generators.families.stable_diffusion_xl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "alignkit.generators.families.stable_diffusion3:StableDiffusion3",
    "LatentConsistencyModelPipeline": "alignkit.generators.families.latent_consistency:LatentConsistency",
    "FluxPipeline": "alignkit.generators.families.flux:Flux",
    "PixArtSigmaPipeline": "alignkit.generators.families.pixart:PixArtSigma",
    "SanaPipeline": "alignkit.generators.families.sana:Sana",
    "Lumina2Pipeline": "alignkit.generators.families.lumina2:Lumina2",
    "QwenImagePipeline": "alignkit.generators.families.qwen_image:QwenImage",
    "ZImagePipeline": "alignkit.generators.families.z_image:ZImage",
    "DreamLitePipeline": "alignkit.generators.families.dreamlite:DreamLite",
    "WanPipeline": "alignkit.generators.families.wan:Wan",
    "AnyFlowPipeline": "alignkit.generators.families.anyflow:AnyFlow",
    "CogVideoXPipeline": "alignkit.generators.families.cogvideox:CogVideoX",
    "LTXPipeline": "alignkit.generators.families.ltx_video:LTXVideo",
    "HunyuanVideoPipeline": "alignkit.generators.families.hunyuan_video:HunyuanVideo",
}


def origins() -> list[Origin]:
    """How the LoRA files of every family are recognised."""
    return [family.origin for family in families()]


def families() -> list[type[FamilyDescription]]:
    """All families of the table, imported."""
    return [resolve(name, GENERATORS, kind="generator") for name in GENERATORS]
