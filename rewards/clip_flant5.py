"""VQAScore on CLIP-FlanT5 (Lin et al., arXiv 2404.01291): the likelihood of "Yes" to "does it show the prompt?".

Patch states of CLIP's last layer but one, mapped by two linear layers, are inserted into the question to Flan-T5. Both
networks are transformers' own; the t2v-metrics package, which has no gradient, is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import DataError, MissingFileError
from alignkit.records import Prompt, Scores, texts
from rewards.models.media import CLIP_MEAN, Preparation, check_media, precise
from rewards.models.weights import find_file, load_strictly, load_whole, read_state, shape_of, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import CLIPVisionModel, T5ForConditionalGeneration

BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
)
AFTER = "\n{question} ASSISTANT: "
CONTEXT = 2048  # tokens, the image counted as one
FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
ADVICE = "hf download zhiqiulin/clip-flant5-xl --local-dir FOLDER"
TOWER = "vision_tower.vision_tower.vision_model."
BESIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")  # unused parts of a whole CLIP
ALIASES = ("embed_tokens.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Padding of the published preprocessing: the mean colour, truncated to 8 bits.
FILL = tuple(int(255 * value) / 255 for value in CLIP_MEAN)


class ClipFlanT5:
    """exp(mean log-likelihood of the answer's tokens and its end) [B], in (0, 1).

    model: folder or hub id of zhiqiulin/clip-flant5-xl or -xxl, or the weights (or their index) in such a folder.
    tokenizer: folder or hub id of Flan-T5's tokenizer.
    vision_tower: folder or hub id of the CLIP model, for weights without one; None: the one in the model's config.
    question, answer: the question, with `{}` for the prompt, and the answer whose likelihood is the score.
    dtype: the precision of weights; the published package uses bfloat16. Scores are at least float32.

    Images are padded to a square with the mean colour. Raises MissingFileError for missing weights or tokenizers,
    DataError for weights of another model or a tokenizer of another vocabulary.
    """

    name = "clip_flant5"
    modality = "image"
    needs_prompt = True
    differentiable = True
    comparable_across_prompts = True
    native_range = (0.0, 1.0)
    licence = "Apache-2.0"
    source = "https://arxiv.org/abs/2404.01291"
    get = ADVICE

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str = "google/flan-t5-xl",
        vision_tower: str | None = None,
        question: str = 'Does this figure show "{}"? Please answer yes or no.',
        answer: str = "Yes",
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self._place, self._question = (device, torch_dtype(dtype)), question
        self._tokenizer = _tokenizer(tokenizer)
        path = find_file(model, FILES, ADVICE)
        home = str(path.parent) if path == Path(model) else model
        config = json.loads(find_file(home, ["config.json"], ADVICE).read_text(encoding="utf-8"))
        where = f"clip_flant5: {path}"
        state = {key: value.to(*self._place) for key, value in read_state(path, owner=self.name, advice=ADVICE).items()}
        tower, projector, rest = _split(state)
        self._tower = _tower(tower, where) if tower else _stored_tower(vision_tower or config["mm_vision_tower"])
        unused = config.get("mm_vision_select_layer", -2) + 1  # negative: layers after the one whose states are used
        self._tower.encoder.layers = self._tower.encoder.layers[: unused or None]
        self._projector = _projector(projector, where)
        self._t5 = _t5(rest, config, len(self._tokenizer), where)
        for part in (self._tower, self._projector, self._t5):
            part.to(*self._place).eval().requires_grad_(False)
        self._prepare = Preparation(self._tower.config.image_size, "pad", fill=FILL, pad_first=True)
        self._before, self._answer = self._tokens([BEFORE]).input_ids, self._tokens([answer]).input_ids

    def __call__(self, media: Tensor, prompts: Sequence[Prompt]) -> Scores:
        import torch

        pixels = self._prepare(check_media(media, prompts, self)).to(*self._place)
        image = self._projector(self._tower(pixels).last_hidden_state[:, 1:])
        questions = [AFTER.format(question=self._question.format(text)) for text in texts(prompts)]
        after = self._tokens(questions, CONTEXT - 1 - self._before.shape[1])
        before, words = self._t5.shared(self._before.expand(len(pixels), -1)), self._t5.shared(after.input_ids)
        ahead = after.attention_mask.new_ones(len(pixels), before.shape[1] + image.shape[1])
        answer = self._answer.expand(len(pixels), -1)
        logits = self._t5(
            inputs_embeds=torch.cat([before, image, words], dim=1),
            attention_mask=torch.cat([ahead, after.attention_mask], dim=1),
            decoder_input_ids=self._t5.prepare_decoder_input_ids_from_labels(answer),
            use_cache=False,
        ).logits
        return Scores(precise(logits).log_softmax(-1).gather(-1, answer[..., None]).mean((1, 2)).exp())

    def _tokens(self, lines: list[str], length: int = CONTEXT) -> Any:
        """Ids [n, L] and mask of lines; each ends in T5's end token, also the one before the image."""
        tokens = self._tokenizer(lines, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return tokens.to(self._place[0])


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Weights of CLIP, of the projector (both without their prefixes) and of T5."""

    def under(prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    rest = {key: value for key, value in state.items() if not key.startswith((TOWER, "mm_projector."))}
    return under(TOWER), under("mm_projector."), rest


def _tower(state: dict[str, Tensor], where: str) -> CLIPVisionModel:
    """OpenAI's CLIP ViT with the weights of `state`, whose shapes give its size; heads are 64 wide."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    state.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
    width, _, patch, _ = shape_of(state, "embeddings.patch_embedding.weight", where)
    places, _ = shape_of(state, "embeddings.position_embedding.weight", where)
    layers = {key.split(".")[2] for key in state if key.startswith("encoder.layers.")}
    sizes = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shape_of(state, "encoder.layers.0.mlp.fc1.weight", where)[0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,
        image_size=patch * round((places - 1) ** 0.5),
        patch_size=patch,
    )
    tower = CLIPVisionModel(sizes)
    load_strictly(tower, state, f"{where}, {TOWER}*")
    return tower


def _stored_tower(name: str) -> CLIPVisionModel:
    """A CLIP model from a folder or hub id."""
    import torch
    from transformers import CLIPVisionModel

    advice = f"clip_flant5: no CLIP vision model '{name}' here; hf download openai/clip-vit-large-patch14-336"
    try:
        return load_whole(CLIPVisionModel, name, "clip_flant5: vision_tower", beside=BESIDE, dtype=torch.float32)
    except OSError as error:
        raise MissingFileError(f"{advice}, and give its folder as vision_tower") from error


def _projector(state: dict[str, Tensor], where: str) -> nn.Module:
    """Two linear layers with a GELU between them, LLaVA's mlp2x_gelu."""
    from torch import nn

    out, width = shape_of(state, "0.weight", f"{where}, mm_projector.*")
    projector = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
    load_strictly(projector, state, f"{where}, mm_projector.*")
    return projector


def _t5(state: dict[str, Tensor], config: dict[str, Any], words: int, where: str) -> T5ForConditionalGeneration:
    """Flan-T5; rows that only pad the vocabulary are removed, as in the published package."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    rows, _ = shape_of(state, "shared.weight", where)
    if not words <= rows < words + 128:
        raise DataError(f"{where}: the tokenizer has {words} words, the weights {rows}; give Flan-T5's as tokenizer")
    state |= {key: state[key][:words] for key in ("shared.weight", "lm_head.weight") if key in state}
    state.pop("embed_tokens.weight", None)
    state |= dict.fromkeys(ALIASES[1:], state["shared.weight"])  # one tensor, stored under up to four names
    kept = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "torch_dtype")}
    with torch.device("meta"):
        t5 = T5ForConditionalGeneration(T5Config.from_dict({**kept, "vocab_size": words}))
    # The class ties its head to the embedding, but Flan-T5 has its own head: loading assigns it, nothing ties it again.
    load_strictly(t5, state, where)
    return t5


def _tokenizer(name: str) -> Any:
    """Flan-T5's tokenizer."""
    from transformers import T5Tokenizer

    try:
        return T5Tokenizer.from_pretrained(name)
    except OSError as error:
        raise MissingFileError(
            f"clip_flant5: no T5 tokenizer '{name}' here; hf download google/flan-t5-xl tokenizer.json "
            "tokenizer_config.json --local-dir FOLDER, and give it as tokenizer"
        ) from error
