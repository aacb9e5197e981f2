"""Three small photographs with captions, included so that rewards can be tested on real images without a download.

Sources and licences are in LICENCES.txt in this folder. A caption is right for its own photograph and wrong for the
other two.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CAPTIONS = {
    "astronaut": "a portrait of a smiling woman in an orange space suit",
    "coffee": "a cup of coffee on a saucer with a spoon",
    "chelsea": "a close-up photo of a cat",
}


def photographs() -> dict[str, Tensor]:
    """Float images [3, H, W] in [0, 1] by name, in the order of CAPTIONS; 320 x 320, 213 x 320 and 213 x 320."""
    import numpy as np
    import torch
    from PIL import Image

    images = {}
    for name in CAPTIONS:
        with Image.open(Path(__file__).with_name(f"{name}.jpg")) as image:
            images[name] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
    return images
