"""A generative vision-language model as a critic: answer probabilities, differentiable to the pixels.

Answers are scored from logits, never sampled: the log-probability of "Yes" against "No" under a question (VQAScore,
arXiv 2404.01291), or of any given answer by teacher forcing, token by token, as for Diffusion-DRF's explanations
(arXiv 2601.04153). The model's own answers come from greedy decoding. Not here: writing questions, served models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from alignkit.errors import ConfigError, DataError
from rewards.models.media import check_pixels, precise
from rewards.models.vision_language import Seen, VisionLanguage, freeze, load
from rewards.models.weights import content_of, load_whole, torch_dtype, with_adapter

if TYPE_CHECKING:
    from torch import Tensor

Questions = Sequence[str] | Sequence[Sequence[str]]  # the same for all media, or a list for each medium


def listed(given: Any, what: str) -> tuple[Any, ...]:
    """`given` as a tuple. Raises ConfigError naming `what` for a text or another value that is not a list."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"{what} is {given!r}; give a list, [{given!r}]")
    return tuple(given)


@dataclass(frozen=True, slots=True)
class Readout:
    """The first words of an answer that count as positive and as negative.

    Spellings of several tokens are ignored. With an empty `negative` all other tokens are negative, which gives the
    plain probability. Raises ConfigError for a side that is a text: give a list.
    """

    positive: tuple[str, ...] = ("Yes", " Yes", "yes", " yes", "YES", " YES")
    negative: tuple[str, ...] = ("No", " No", "no", " no", "NO", " NO")

    def __post_init__(self) -> None:
        object.__setattr__(self, "positive", listed(self.positive, "readout: positive"))  # frozen
        object.__setattr__(self, "negative", listed(self.negative, "readout: negative"))

    @classmethod
    def of(cls, given: Readout | Mapping[str, Sequence[str]]) -> Readout:
        """From a mapping with `positive`, `negative` or both. Raises ConfigError for other keys."""
        if isinstance(given, Readout):
            return given
        if unknown := set(given) - {"positive", "negative"}:
            raise ConfigError(f"readout: {', '.join(sorted(unknown))} is unknown; it has positive and negative")
        return cls(**given)

    def ids(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """Token ids of both sides; ConfigError if a side has no single-token spelling or both share a token."""
        positive, negative = (_single_tokens(tokenizer, words) for words in (self.positive, self.negative))
        if not positive or (self.negative and not negative):
            raise ConfigError(f"{self}: no spelling is a single token of this tokenizer; give others, or use `answers`")
        if set(positive) & set(negative):
            raise ConfigError(f"{self}: one token is on both sides; is it the unknown token?")
        return positive, negative


class VlmCritic:
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL model that answers questions on media (`alignkit.protocols.Critic`).

    `model`: folder or hub id with weights, tokenizer and preprocessor_config.json. `adapter`: a folder with a LoRA of
    PEFT, merged into the model. `dtype`: of the weights; logits are at least float32. `rate`: frames per second of
    clips as they are given. `min_pixels`, `max_pixels`: bounds on a frame that replace the folder's. `checkpointing`:
    activation checkpointing; results are equal. `owner`: the name in errors.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        readout: Readout | Mapping[str, Sequence[str]] = Readout(),
        rate: float = 2.0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        checkpointing: bool = False,
        adapter: str | None = None,
        owner: str = "critic",
    ) -> None:
        from transformers import AutoModelForImageTextToText

        def build(config: Any) -> Any:
            whole = load_whole(AutoModelForImageTextToText, model, owner, config=config, dtype=torch_dtype(dtype))
            return whole if adapter is None else with_adapter(whole, adapter, owner)

        whole, tokenizer, patches = load(model, build, owner=owner, bounds=(min_pixels, max_pixels))
        freeze(whole, device, checkpointing=checkpointing)
        self._reader = VisionLanguage(whole.model, tokenizer, patches, rate=rate)
        self._whole, self._words, self._owner = whole, whole.lm_head.weight, owner
        self._positive, self._negative = Readout.of(readout).ids(tokenizer)

    def ask(self, media: Tensor, questions: Questions, *, eight_bit: bool = False) -> Tensor:
        """Log-probabilities [B, Q] of the positive answer, log sigma(margin), differentiable to the pixels.

        `media`: [B, 3, H, W] or [B, F, 3, H, W] in [0, 1]; `questions`: Q for all media, or a list of Q for each.
        `eight_bit`: for the media as 8-bit files, rounded as by the stock processor; without gradient.
        """
        from torch.nn import functional

        return functional.logsigmoid(self.margins(media, questions, eight_bit=eight_bit))

    def margins(self, media: Tensor, questions: Questions, *, eight_bit: bool = False) -> Tensor:
        """Log-odds [B, Q] of the positive answer: log-sum-exp over positive spellings less that over negative ones."""
        lists = self._each(media, questions)
        if len(set(map(len, lists))) > 1:
            raise DataError("media have different numbers of questions; use `margins_of`")
        pairs = [(index, question) for index, own in enumerate(lists) for question in own]
        return self.margins_of(media, pairs, eight_bit=eight_bit).unflatten(0, (len(lists), -1))

    def margins_of(self, media: Tensor, pairs: Sequence[tuple[int, str]], *, eight_bit: bool = False) -> Tensor:
        """Log-odds [N] for N pairs (index of the medium, question)."""
        self._check(media, [question for _, question in pairs])
        seen = self._reader.see(media, eight_bit=eight_bit)
        rows = [self._reader.tokens(seen, question) for _, question in pairs]
        ends = [(index, len(row) - 1) for index, row in enumerate(rows)]
        return self._margin(self._reader.read(seen, [index for index, _ in pairs], rows, ends))

    def _margin(self, states: Tensor) -> Tensor:
        """Log-odds [N] of the positive answer's first token at `states` [N, D]."""
        import torch

        logits = self._logits(states, self._positive + self._negative if self._negative else None)
        if self._negative:
            positive, negative = logits.split([len(self._positive), len(self._negative)], dim=1)
            return positive.logsumexp(1) - negative.logsumexp(1)
        others = logits.index_fill(1, torch.tensor(self._positive, device=logits.device), -float("inf"))
        return logits[:, self._positive].logsumexp(1) - others.logsumexp(1)

    def _logits(self, states: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Logits [N, words] of `states` [N, D] for `rows` of the head, or all; at least float32 under autocast too."""
        import torch

        words = self._all_words if rows is None else precise(self._words[rows])
        with torch.autocast(states.device.type, enabled=False):
            states = precise(states)
            return states @ words.to(states.dtype).mT

    @cached_property
    def _all_words(self) -> Tensor:
        """The whole head in at least float32; of half-precision weights a copy that is made once and kept.

        It needs words x width x 4 bytes, 2.0 GiB for Qwen2.5-VL-7B, from the first use of all words on. Graphs share
        it; a conversion in each call would add a copy to every graph.
        """
        return precise(self._words)

    def answers(
        self, media: Tensor, questions: Questions, answers: Questions, *, reduce: Literal["sum", "mean"] = "sum"
    ) -> Tensor:
        """log P(answer | medium, question) [B, Q] by teacher forcing, summed or averaged over the answer's tokens.

        `answers` has the form of `questions`. The end of an answer is not scored; write "Yes<|im_end|>" to include it.
        Raises DataError for an empty answer.
        """
        asked, given = self._each(media, questions), self._each(media, answers)
        if [len(own) for own in asked] != [len(own) for own in given] or len({len(own) for own in asked}) > 1:
            raise DataError("answers and questions differ in number; give each question one answer")
        self._check(media, [question for own in asked for question in own])
        seen = self._reader.see(media)
        pairs = [(index, *pair) for index, own in enumerate(asked) for pair in zip(own, given[index], strict=True)]
        scores = self._forced(seen, pairs, reduce)
        return scores.unflatten(0, (len(asked), -1))

    def answers_of(self, media: Tensor, triples: Sequence[tuple[int, str, str]], *, eight_bit: bool = False) -> Tensor:
        """Mean log-probability of an answer's tokens [N], for N triples (index of the medium, question, answer)."""
        self._check(media, [question for _, question, _ in triples])
        return self._forced(self._reader.see(media, eight_bit=eight_bit), triples, "mean")

    def write(self, media: Tensor, pairs: Sequence[tuple[int, str]], *, limit: int) -> list[str]:
        """The model's own answers to N pairs (index of the medium, question), by greedy decoding, without gradient.

        At most `limit` tokens each. An answer is empty where the model ends its turn at once.
        """
        import torch

        self._check(media, [question for _, question in pairs])
        with torch.no_grad():
            seen = self._reader.see(media)

        def pick(state: Tensor) -> int:
            return int(self._logits(state).argmax())

        texts = []
        for index, question in pairs:
            ids = self._reader.continuation(seen, index, self._reader.tokens(seen, question), pick, limit)
            texts.append(self._reader.tokenizer.decode(ids, skip_special_tokens=True).strip())
        return texts

    @cached_property
    def content(self) -> str:
        """A fingerprint of all that answers depend on: weights and their dtype, words, chat template, pixels, rate."""
        reader = self._reader
        patches = {kind: asdict(cut) for kind, cut in reader.patches.items()}
        words = sorted(reader.tokenizer.get_vocab().items())
        return content_of(self._whole, [words, reader.tokenizer.chat_template, patches, reader.rate])

    @property
    def rate(self) -> float:
        """Frames per second of clips as they are given."""
        return self._reader.rate

    def _forced(self, seen: Seen, triples: Sequence[tuple[int, str, str]], reduce: str) -> Tensor:
        """Log-probabilities [N] of answers; each token is predicted from the state before it."""
        import torch

        starts = [self._reader.tokens(seen, question) for _, question, _ in triples]
        ends = [self._reader.tokenizer(answer, add_special_tokens=False).input_ids for *_, answer in triples]
        if not all(ends):
            raise DataError("an answer is empty; give at least one token")
        rows = [[*start, *end[:-1]] for start, end in zip(starts, ends, strict=True)]
        spots = [(i, len(starts[i]) - 1 + k) for i, end in enumerate(ends) for k in range(len(end))]
        scores = self._logits(self._reader.read(seen, [index for index, *_ in triples], rows, spots)).log_softmax(1)
        target = torch.tensor([token for end in ends for token in end], device=scores.device)
        each = scores.gather(1, target[:, None]).squeeze(1).split([len(end) for end in ends])
        return torch.stack([tokens.mean() if reduce == "mean" else tokens.sum() for tokens in each])

    def _check(self, media: Tensor, questions: Sequence[str]) -> None:
        """Raises DataError for media that `check_pixels` refuses, for no question and for an empty one."""
        check_pixels(media, self._owner, "video" if media.dim() == 5 else "image")
        if not questions or not all(question.strip() for question in questions):
            raise DataError(f"{self._owner}: a question of {list(questions)} is empty; give each a text")

    def _each(self, media: Tensor, questions: Questions) -> list[list[str]]:
        """Each medium's own list of questions."""
        if not questions or isinstance(questions, str):
            raise DataError(f"{self._owner}: questions are {questions!r}; give a list of texts")
        if isinstance(questions[0], str):
            return [list(questions)] * len(media)
        if len(questions) != len(media) or any(isinstance(own, str) for own in questions):
            raise DataError(f"{self._owner}: {len(media)} media with {len(questions)} lists of questions; one for each")
        return [list(own) for own in questions]


def _single_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    encoded = (tokenizer(word, add_special_tokens=False).input_ids for word in words)
    return sorted({ids[0] for ids in encoded if len(ids) == 1})


def known_modality(modality: str, owner: str) -> str:
    """`modality` if it is "image" or "video"; else ConfigError naming `owner`."""
    if modality not in ("image", "video"):
        raise ConfigError(f"{owner}: modality '{modality}'; image and video are known")
    return modality
