"""What a plain LoRA is: products of two matrices on unchanged base weights. Anything else is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from alignkit.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

EXACT_INITS = (True, False, None, "gaussian", "eva")  # of PEFT's init_lora_weights: the base weights stay as they are
# LoraConfig values that add more than a product of two matrices, which the export formats cannot hold.
MORE_THAN_LORA = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication"),
    *("target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config"),
    *("monteclora_config", "velora_config", "kasa_config"),
)
DORA_ENDS = (".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale")


def require_plain(config: Mapping[str, Any], where: str, advice: str) -> None:
    """Raise AdapterError unless LoraConfig values describe a plain LoRA on unchanged base weights."""
    init = config.get("init_lora_weights", True)
    if init not in EXACT_INITS:
        raise AdapterError(
            f"{where}: init_lora_weights '{init}' changes the base weights, so the network with the adapter off would "
            f"not be the base model. {advice} (init_lora_weights true or 'gaussian'; PEFT converts such an adapter by "
            "save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    extra = [key for key in MORE_THAN_LORA if config.get(key)]
    extra += ["bias"] if config.get("bias") not in (None, "none") else []
    if extra:
        title = "use_dora (DoRA)" if extra[0] == "use_dora" else extra[0]
        raise AdapterError(
            f"{where}: {title} is more than a plain LoRA, which the exports for diffusers and ComfyUI cannot hold. "
            f"{advice} without it"
        )


def require_loadable(state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError unless a file's weights and alphas are finite and a plain LoRA, with its LoraConfig values."""
    advice = "Export it as a plain LoRA"
    require_plain(config, where, advice)
    for key in state:
        if key.endswith(DORA_ENDS):
            require_plain({"use_dora": True}, f"{where}, '{key}'", advice)
    require_finite(state, where)
    alphas = {"lora_alpha": config.get("lora_alpha"), **(config.get("alpha_pattern") or {})}
    for key, alpha in alphas.items():
        if alpha is not None and not (isinstance(alpha, int | float) and math.isfinite(alpha)):
            raise AdapterError(f"{where}: the alpha of '{key}' is {alpha!r:.80}, not a finite number; export it again")


def require_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise AdapterError naming the first weight that holds NaN or infinite values."""
    for key, value in state.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise AdapterError(
                f"{where}: '{key}' holds NaN or infinite values. The file is damaged or its training diverged; use an "
                "earlier checkpoint or export it again"
            )
