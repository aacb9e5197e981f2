"""Folders with random weights under the keys and file names of the published ones, for speed and nothing else.

Sizes are moderate, so that a forward takes a second on one CPU core, or `tiny`. Each function writes a folder once and
returns it. Tokenizers cut text about as finely as the real ones do. What rewards read: tests/rewards.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from rewards.clip_flant5 import AFTER, BEFORE
from rewards.models.blip import Blip, TextEncoder, VisionTransformer
from rewards.models.templates import HPSV3, VIDEO_REWARD
from rewards.video_reward import LEAST_PIXELS, TOKENS

TEXTS = ("a red bicycle beside a wall", "two cats on a sofa", "an old harbour at night, oil painting", "a bowl of soup")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,."
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)


@dataclass(frozen=True)
class Size:
    """Width of the towers (heads are 64 wide), layers, the side of images in BLIP and CLIP, and in a VLM."""

    width: int
    layers: int
    side: int
    vlm_side: int


MODERATE, TINY = Size(384, 6, 224, 336), Size(128, 2, 32, 56)


def clip(work: Path, size: Size) -> Path:
    """A CLIPModel; a token a letter."""
    folder = work / "clip"
    if not folder.exists():
        names = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
        words = CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=77)
        both = {"hidden_size": size.width, "intermediate_size": 4 * size.width, "hidden_act": "gelu"}
        both |= {"num_attention_heads": size.width // 64}
        text = both | {"num_hidden_layers": 2 * size.layers // 3, "vocab_size": len(words)}
        text |= {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id}
        text |= {"pad_token_id": words.pad_token_id}
        vision = both | {"num_hidden_layers": size.layers, "patch_size": 16, "image_size": size.side}
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256)).save_pretrained(folder)
        words.save_pretrained(folder)
    return folder


def image_reward(work: Path, size: Size) -> Path:
    """ImageReward.pt and BERT's vocab.txt: words of the texts, and letters."""
    folder = work / "image_reward"
    if not folder.exists():
        folder.mkdir()
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_words(*TEXTS), *LETTERS]
        vocabulary = list(dict.fromkeys([*vocabulary, *(f"##{letter}" for letter in LETTERS)]))
        (folder / "vocab.txt").write_text("\n".join(vocabulary))
        wide, inner = size.width, 4 * size.width
        see = VisionTransformer(wide, inner, size.layers, 16, (size.side // 16) ** 2 + 1)
        read = TextEncoder(len(vocabulary) + 2, 512, wide, inner, size.layers, wide)
        sizes = ((wide, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))
        layers = {name: nn.Linear(*pair) for name, pair in zip("02467", sizes, strict=True)}
        network = nn.ModuleDict({"blip": Blip(see, read), "mlp": nn.ModuleDict({"layers": nn.ModuleDict(layers)})})
        torch.save(network.state_dict(), folder / "ImageReward.pt")
    return folder


def clip_flant5(work: Path, size: Size) -> Path:
    """CLIP-FlanT5's weights in one file, its config, and T5's tokenizer: words of the template, and letters."""
    folder = work / "clip_flant5"
    if not folder.exists():
        known = [
            f"▁{word}" for word in _words(BEFORE, AFTER, 'Does this figure show "{}"? Please answer yes or no. Yes')
        ]
        letters = sorted({*LETTERS, *"".join(known), '"', "?", "▁"})
        pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")] + [(word, -1.0) for word in known]
        words = T5Tokenizer(vocab=[*pieces, *((letter, -9.0) for letter in letters)], extra_ids=0)
        words.save_pretrained(folder)
        wide, inner = size.width, 4 * size.width
        towers = {"hidden_size": wide, "intermediate_size": inner, "num_attention_heads": wide // 64}
        towers |= {"num_hidden_layers": size.layers, "patch_size": 14, "image_size": size.side // 14 * 14}
        t5 = {"vocab_size": len(words), "d_model": wide, "d_kv": 64, "d_ff": inner, "num_heads": wide // 64}
        t5 |= {"num_layers": size.layers, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
        parts = {
            "vision_tower.vision_tower.vision_model": CLIPVisionModel(CLIPVisionConfig(**towers)),
            "mm_projector": nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, wide)),
        }
        model = T5ForConditionalGeneration(T5Config(**t5, tie_word_embeddings=False))
        state = model.state_dict() | {f"{n}.{k}": v for n, part in parts.items() for k, v in part.state_dict().items()}
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"mm_vision_select_layer": -2}))
    return folder


def qwen2_vl(work: Path, size: Size) -> Path:
    """A Qwen2-VL folder; its byte-pair tokenizer is trained on the templates, so words of theirs are few tokens."""
    folder = work / "qwen2_vl"
    if not folder.exists():
        words = byte_pairs(HPSV3, VIDEO_REWARD, *TEXTS)
        heads = size.width // 64
        rope = {"type": "default", "rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
        text = {"vocab_size": len(words), "hidden_size": size.width, "intermediate_size": 4 * size.width}
        text |= {"num_hidden_layers": size.layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
        text |= {"rope_parameters": rope, "rope_scaling": rope, "tie_word_embeddings": False}
        text |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        tower = {"depth": size.layers, "embed_dim": size.width, "hidden_size": size.width, "num_heads": heads}
        names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
        ids = dict(zip(names, words.convert_tokens_to_ids(list(SPECIAL[3:])), strict=True))
        config = AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=tower, **ids)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
        words.save_pretrained(folder)
        bounds = {"min_pixels": 56 * 56, "max_pixels": size.vlm_side**2}
        (folder / "preprocessor_config.json").write_text(json.dumps(bounds))
    return folder


def hpsv3(work: Path, size: Size) -> Path:
    """HPSv3.safetensors beside a Qwen2-VL."""
    folder = qwen2_vl(work, size)
    head = {"0": nn.Linear(size.width, 1024), "3": nn.Linear(1024, 16), "5": nn.Linear(16, 2)}
    save_file(_with_head(folder, nn.ModuleDict(head), 1), folder / "HPSv3.safetensors")
    return folder


def video_reward(work: Path, size: Size) -> Path:
    """VideoReward's folder, merged, beside a Qwen2-VL: model_config.json and model.pth of the last checkpoint."""
    folder = qwen2_vl(work, size)
    (folder / "checkpoint-1").mkdir(exist_ok=True)
    state = _with_head(folder, nn.Linear(size.width, 1, bias=False), len(TOKENS))
    torch.save({f"base_model.model.{name}": value for name, value in state.items()}, folder / "checkpoint-1/model.pth")
    moments = {f"{part}_{kind}": float(kind == "std") for part in ("VQ", "MQ", "TA") for kind in ("mean", "std")}
    data = {"fps": 2.0, "num_frames": None, "max_frame_pixels": LEAST_PIXELS}
    (folder / "model_config.json").write_text(json.dumps({"data_config": data, "inference_config": moments}))
    return folder


def _with_head(folder: Path, head: nn.Module, tokens: int) -> dict[str, Tensor]:
    """The weights in `folder` with rows for so many new tokens, and the head's."""
    state = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.randn(tokens, state[name].shape[1])])
    return state | {f"rm_head.{name}": value for name, value in head.state_dict().items()}


def byte_pairs(*corpus: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose pairs are those of `corpus`, with yes and no, and Qwen's special tokens."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=letters, show_progress=False)
    pairs.train_from_iterator([*corpus, "Yes No yes no " * 9], trainer)
    words = PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<|im_end|>", pad_token="<|endoftext|>")  # noqa: S106 - no secret
    words.add_tokens(list(SPECIAL), special_tokens=True)
    return words


def _words(*corpus: str) -> list[str]:
    return list(dict.fromkeys(" ".join(corpus).replace(",", " ").split()))
