"""`transformers serve` beside a torchvision built for CUDA, whose decoders cannot be loaded: PIL reads the pictures."""

import io

import numpy as np
import torch
from PIL import Image
from transformers import image_utils
from transformers.cli.transformers import main


def decode_image(data: torch.Tensor, mode: object) -> torch.Tensor:
    """Bytes of a picture as uint8 [3, H, W]."""
    picture = Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


if __name__ == "__main__":
    image_utils.decode_image = decode_image
    main()
