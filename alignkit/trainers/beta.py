"""The default of `beta` by what a network predicts.

Errors of velocities (flow models) are larger than those of noise and differ more between candidates, so the same pull
to the reference needs a smaller beta.
"""

from __future__ import annotations

import json
from pathlib import Path

from alignkit.shipped import model_path

BETA = 5000.0  # of Diffusion-DPO's SDXL runs
FLOW_BETA = 500.0  # published values for flow models lie between 100 and 2000


def default_beta(prediction: str) -> float:
    """The default for a network of this `prediction` (see `alignkit.diffusion.conversions.TARGETS`)."""
    return FLOW_BETA if prediction == "flow" else BETA


def beta_note(prediction: str | None) -> str:
    """Which default a network gets and why; None: what it predicts is not known before it is loaded."""
    reason = f"flow models {FLOW_BETA:g} (published: 100 to 2000), others {BETA:g} (Diffusion-DPO's SDXL)"
    if prediction is None:
        return f"beta is not set: it follows from what the network predicts; {reason}"
    return f"beta is not set: {default_beta(prediction):g}, as the network predicts {prediction}; {reason}"


def stored_prediction(model: str) -> str | None:
    """What the network of a local folder or a model of the sandbox predicts, by its scheduler; None for a hub id."""
    file = Path(model_path(model)) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text(encoding="utf-8"))
    prediction = str(config.get("prediction_type", "epsilon"))
    is_flow = "FlowMatch" in config.get("_class_name", "") or prediction.startswith("flow")
    return "flow" if is_flow else prediction
