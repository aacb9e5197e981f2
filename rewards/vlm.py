"""A generative vision-language model as a critic whose answers carry gradients to the pixels.

The answer is read from logits, never sampled: the log-probability of "Yes" against "No" under a question (VQAScore,
arXiv 2404.01291), or of any given answer by teacher forcing, token by token, as Diffusion-DRF's explanations need
(arXiv 2601.04153). Not here: writing questions, generating answers, served models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from alignkit.errors import ConfigError, DataError
from rewards.media import precise
from rewards.vision_language import Seen, VisionLanguage, freeze, load
from rewards.weights import load_whole, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

Questions = Sequence[str] | Sequence[Sequence[str]]  # asked of all media, or each medium's own


@dataclass(frozen=True, slots=True)
class Readout:
    """Which first words of an answer count as positive, and which as negative.

    Spellings that are several tokens are left out. Without `negative` all other tokens are: the plain probability.
    """

    positive: tuple[str, ...] = ("Yes", " Yes", "yes", " yes", "YES", " YES")
    negative: tuple[str, ...] = ("No", " No", "no", " no", "NO", " NO")

    def ids(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """Token ids of both sides; ConfigError where a side has no single-token spelling or both share one."""
        positive, negative = (_single_tokens(tokenizer, words) for words in (self.positive, self.negative))
        if not positive or (self.negative and not negative):
            raise ConfigError(f"{self}: no spelling is a single token of this tokenizer; give others, or use `answers`")
        if set(positive) & set(negative):
            raise ConfigError(f"{self}: one token is on both sides; is it the unknown token?")
        return positive, negative


class VlmCritic:
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL model that is asked about pictures or clips (`alignkit.protocols.Critic`).

    `model`: folder or hub id with weights, tokenizer and preprocessor_config.json. `dtype`: of the weights; the
    read-out is at least float32. `rate`: frames per second of clips as they are given. `min_pixels`, `max_pixels`:
    bounds on a frame in place of the folder's. `checkpointing` trades a second forward for memory; results are equal.
    `owner` is named in errors.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        readout: Readout = Readout(),
        rate: float = 2.0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        checkpointing: bool = False,
        owner: str = "critic",
    ) -> None:
        from transformers import AutoModelForImageTextToText

        def build(config: Any) -> Any:
            return load_whole(AutoModelForImageTextToText, model, owner, config=config, dtype=torch_dtype(dtype))

        whole, tokenizer, patches = load(model, build, owner=owner, bounds=(min_pixels, max_pixels))
        freeze(whole, device, checkpointing=checkpointing)
        self._reader = VisionLanguage(whole.model, tokenizer, patches, rate=rate)
        self._words = whole.lm_head.weight
        self._positive, self._negative = readout.ids(tokenizer)

    def ask(self, media: Tensor, questions: Questions, *, eight_bit: bool = False) -> Tensor:
        """Log-probabilities [B, Q] of the positive answer, log sigma(margin), differentiable to the pixels.

        `media`: [B, 3, H, W] or [B, F, 3, H, W] in [0, 1]; `questions`: Q for all media, or a list of Q for each.
        `eight_bit`: of the media as 8-bit files, through the stock processor's rounding; without gradient.
        """
        from torch.nn import functional

        return functional.logsigmoid(self.margins(media, questions, eight_bit=eight_bit))

    def margins(self, media: Tensor, questions: Questions, *, eight_bit: bool = False) -> Tensor:
        """Log-odds [B, Q] of the positive answer: log-sum-exp over its spellings less that over the negative ones'."""
        asked = _each(media, questions)
        if len(set(map(len, asked))) > 1:
            raise DataError("media have different numbers of questions; use `margins_of`")
        pairs = [(index, question) for index, own in enumerate(asked) for question in own]
        return self.margins_of(media, pairs, eight_bit=eight_bit).unflatten(0, (len(asked), -1))

    def margins_of(self, media: Tensor, pairs: Sequence[tuple[int, str]], *, eight_bit: bool = False) -> Tensor:
        """Log-odds [N] for N pairs (medium, question): any number of questions for each medium."""
        seen = self._reader.see(media, eight_bit=eight_bit)
        rows = [self._reader.tokens(seen, question) for _, question in pairs]
        ends = [(index, len(row) - 1) for index, row in enumerate(rows)]
        states = precise(self._reader.read(seen, [index for index, _ in pairs], rows, ends))
        return self._margin(states)

    def _margin(self, states: Tensor) -> Tensor:
        """Log-odds [N] of the positive answer's first token at `states` [N, D]."""
        import torch

        wanted = self._positive + self._negative
        words = precise(self._words[wanted] if self._negative else self._words)
        logits = states @ words.to(states.dtype).mT
        if self._negative:
            positive, negative = logits.split([len(self._positive), len(self._negative)], dim=1)
            return positive.logsumexp(1) - negative.logsumexp(1)
        others = logits.index_fill(1, torch.tensor(self._positive, device=logits.device), -float("inf"))
        return logits[:, self._positive].logsumexp(1) - others.logsumexp(1)

    def answers(
        self, media: Tensor, questions: Questions, answers: Questions, *, reduce: Literal["sum", "mean"] = "sum"
    ) -> Tensor:
        """log P(answer | medium, question) [B, Q] by teacher forcing, summed or averaged over the answer's tokens.

        `answers` is shaped like `questions`. An answer ends where its text ends; write "Yes<|im_end|>" to make its end
        part of it. Raises DataError for an empty answer.
        """
        asked, said = _each(media, questions), _each(media, answers)
        if [len(own) for own in asked] != [len(own) for own in said] or len({len(own) for own in asked}) > 1:
            raise DataError("answers and questions differ in number; give each question one answer")
        seen = self._reader.see(media)
        pairs = [(index, *pair) for index, own in enumerate(asked) for pair in zip(own, said[index], strict=True)]
        losses = self._forced(seen, pairs, reduce)
        return losses.unflatten(0, (len(asked), -1))

    def _forced(self, seen: Seen, triples: Sequence[tuple[int, str, str]], reduce: str) -> Tensor:
        """Log-probabilities [N] of answers; the state before an answer's token predicts it."""
        import torch

        starts = [self._reader.tokens(seen, question) for _, question, _ in triples]
        ends = [self._reader.tokenizer(answer, add_special_tokens=False).input_ids for *_, answer in triples]
        if not all(ends):
            raise DataError("an answer is empty; give at least one token")
        rows = [[*start, *end[:-1]] for start, end in zip(starts, ends, strict=True)]
        spots = [(i, len(starts[i]) - 1 + k) for i, end in enumerate(ends) for k in range(len(end))]
        states = precise(self._reader.read(seen, [index for index, *_ in triples], rows, spots))
        scores = (states @ precise(self._words).to(states.dtype).mT).log_softmax(1)
        target = torch.tensor([token for end in ends for token in end], device=scores.device)
        each = scores.gather(1, target[:, None]).squeeze(1).split([len(end) for end in ends])
        return torch.stack([tokens.mean() if reduce == "mean" else tokens.sum() for tokens in each])


def _single_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    encoded = (tokenizer(word, add_special_tokens=False).input_ids for word in words)
    return sorted({ids[0] for ids in encoded if len(ids) == 1})


def _each(media: Tensor, questions: Questions) -> list[list[str]]:
    """Each medium's own list of questions."""
    if not questions or isinstance(questions, str):
        raise DataError(f"questions are {questions!r}; give a list of texts")
    if isinstance(questions[0], str):
        return [list(questions)] * len(media)
    if len(questions) != len(media):
        raise DataError(f"{len(media)} media with {len(questions)} lists of questions; give each its own")
    return [list(own) for own in questions]


def known_modality(modality: str, owner: str) -> str:
    """`modality`, if media of it can be asked about: "image" or "video"; else ConfigError naming `owner`."""
    if modality not in ("image", "video"):
        raise ConfigError(f"{owner}: modality '{modality}'; image and video are known")
    return modality
