"""Lets a torchvision built for CUDA be imported beside a torch without it: its compiled operators are absent then.

Installed into the environment of vLLM with a `.pth` file, for its workers are fresh processes. Transforms of pictures,
all that serving needs of torchvision, are plain torch; the operators' names must exist, though nobody calls them.
"""

import torch

if torch.version.cuda is None:
    # The library object must live as long as the process: its definitions go when it does.
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
