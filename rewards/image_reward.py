"""ImageReward (Xu et al., arXiv 2304.05977): BLIP encodes the prompt given the image, an MLP scores it.

Trained on rankings of images of one prompt, so scores compare within a prompt only; over its training data they have
mean 0 and deviation 1. BLIP is `rewards.models.blip`; the packages image-reward, timm and fairscale are not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from alignkit.errors import DataError, MissingFileError
from alignkit.records import Prompt, Scores, texts
from rewards.models.media import Preparation, check_media, precise
from rewards.models.weights import find_file, load_strictly, read_state, shape_of, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35
FILES = ("ImageReward.safetensors", "ImageReward.pt")
ADVICE = "hf download THUDM/ImageReward ImageReward.pt --local-dir FOLDER"
# In the published file but not needed for the score: BLIP's contrastive projections, and a buffer 0, 1, 2, ...
UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids")


class ImageReward:
    """(MLP(BLIP's first text state) - 0.167) / 1.033 [B], without bounds; about 0 is average, 2 very good.

    model: ImageReward.pt (or its tensors as .safetensors), its folder, or a hub id.
    tokenizer: folder or hub id of BERT's uncased tokenizer; prompts are cut to 35 tokens.
    dtype: the precision of BLIP's weights; the head and scores are at least float32.

    Images are scaled and cropped to a square as for CLIP. Raises MissingFileError for missing weights or tokenizers,
    DataError for weights of another model or a tokenizer of another vocabulary.
    """

    name = "image_reward"
    modality = "image"
    needs_prompt = True
    differentiable = True
    comparable_across_prompts = False
    native_range = (-float("inf"), float("inf"))
    licence = "Apache-2.0"
    source = "https://arxiv.org/abs/2304.05977"
    get = ADVICE

    def __init__(
        self, model: str, *, tokenizer: str = "bert-base-uncased", device: str = "cpu", dtype: str = "float32"
    ) -> None:
        import torch

        path = find_file(model, FILES, ADVICE)
        state = {
            key: value
            for key, value in read_state(path, owner=self.name, advice=ADVICE).items()
            if not UNUSED.fullmatch(key)
        }
        self._place = (device, torch_dtype(dtype))
        self._model = _network(state, f"image_reward: {path}").to(device).eval().requires_grad_(False)
        self._model["blip"].to(self._place[1])
        self._model["mlp"].to(torch.promote_types(self._place[1], torch.float32))
        self._prepare = Preparation(self._model["blip"].visual_encoder.size, centre="even")
        self._tokenizer = _tokenizer(tokenizer)
        words = self._model["blip"].text_encoder.embeddings["word_embeddings"].num_embeddings
        if len(self._tokenizer) != words:
            raise DataError(
                f"image_reward: tokenizer '{tokenizer}' has {len(self._tokenizer)} words with [DEC] and [ENC], the "
                f"weights {words}; the published ones belong to bert-base-uncased"
            )

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        import torch

        pixels = self._prepare(check_media(media, prompts, self)).to(*self._place)
        tokens = self._tokenizer(
            texts(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(pixels.device)
        states = self._model["blip"](pixels, tokens.input_ids, tokens.attention_mask)
        with torch.autocast(states.device.type, enabled=False):  # bfloat16 near 1 has steps of 1/128
            raw = self._model["mlp"]["layers"](precise(states[:, 0])).squeeze(-1)
        return Scores((raw - MEAN) / STD)


def _network(state: Mapping[str, Tensor], where: str) -> nn.Module:
    """BLIP and the head with the weights of the published file."""
    import torch
    from torch import nn

    from rewards.models.blip import blip_like

    # Linear maps without activations; the numbers skip the dropout between them in training.
    sizes = [shape_of(state, f"mlp.layers.{number}.weight", where) for number in (0, 2, 4, 6, 7)]
    with torch.device("meta"):
        one, two, three, four, five = (nn.Linear(width, out) for out, width in sizes)
        layers = nn.Sequential(one, nn.Identity(), two, nn.Identity(), three, nn.Identity(), four, five)
        network = nn.ModuleDict({"blip": blip_like(state, "blip.", where), "mlp": nn.ModuleDict({"layers": layers})})
    load_strictly(network, state, where)
    return network


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    """BERT's tokenizer with BLIP's two extra tokens: the weights have their rows, although no score uses them."""
    from transformers import BertTokenizer

    try:
        tokenizer = BertTokenizer.from_pretrained(name)
    except OSError as error:
        raise MissingFileError(
            f"image_reward: no BERT tokenizer '{name}' here; hf download bert-base-uncased vocab.txt "
            "tokenizer.json tokenizer_config.json --local-dir FOLDER"
        ) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer
