"""Training of the sandbox's vision-language model: many questions about one scene or clip, packed in one sequence.

Runs under plain `transformers.Trainer`; `alignkit sandbox train vlm` repeats it, `vlm_accuracy` measures the result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, set_seed

from alignkit.sandbox import questions
from alignkit.sandbox.clips import Motion, at, covers, film, move
from alignkit.sandbox.questions import HEADS, MEANT, NOUNS, Question, Subject, meanings, phrases, whereabouts
from alignkit.sandbox.recipes import Recipe, fit
from alignkit.sandbox.scenes import PALETTE, SHAPES, Scene, render
from alignkit.sandbox.vlm import MERGE, PATCH, TEMPORAL, TOKENS_PER_SECOND, save, tokenizer, vlm
from alignkit.sandbox.worlds import to_tensor
from alignkit.seeds import derive_seed

OPENING, VISION = "<|im_start|>user\n", ("<|vision_start|>", "<|vision_end|>")
CAPTIONED = ("caption", "pair")  # kinds of question with a caption in them
CLOSING, END = "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Stage(Recipe):
    """`count`: most questions a subject; 0 trains the vision tower only. `near`: as in `questions.Subject`.

    `judged`: kinds of question for which a head at the last layer but one is trained on whether they are true.
    """

    count: int = 4
    near: float = 0.5
    judged: tuple[str, ...] = CAPTIONED


# First the vision tower is trained on labels of patches: from answers alone it learns shapes slowly. Then it is frozen,
# since the first gradients of the language model destroy its features. Captions and pairs are learnt only after the
# learning rate is restarted; which colour belongs to which object only if nearly all wrong colours are those of another
# object: before, "is the circle red?" was answered as "is anything red?".
STAGES = (
    Stage(steps=900, batch=48, learning_rate=1.5e-3, seed=111, count=0),
    Stage(steps=1500, batch=32, learning_rate=1.5e-3, seed=112),
    Stage(steps=1200, batch=32, learning_rate=1e-3, seed=113),
    Stage(
        steps=660,
        batch=32,
        learning_rate=1e-3,
        seed=116,
        count=10,
        near=0.9,
        judged=(*CAPTIONED, "color", "object"),
    ),
)
CLASSES = {kind: number for number, kind in enumerate(((s, c) for s in SHAPES for c in PALETTE), start=1)}
FACTS = {"object": 1 + len(CLASSES), "side": HEADS["side"], "way": HEADS["way"]}
MEDIA = 2  # at most in a row

Patchify = Callable[[Tensor], tuple[Tensor, Tensor]]


class Interviews(Dataset[dict[str, Any]]):
    """`size` subjects with up to `count` questions each: 15% pairs of images, 20% clips, 65% single images.

    A row has `media`, a list of images [3, 64, 64] or one clip [F, 3, 64, 64]; for each of them `facts` of its patches,
    `meant`, the facts that words refer to (`meanings`), and `shown`, which `phrases` of the caption it shows;
    `questions`; `interval`, time steps from one pair of frames to the next.
    """

    def __init__(self, size: int, seed: int, count: int = 4, near: float = 0.5) -> None:
        self.size, self.seed, self.count, self.near = size, seed, count, near

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(derive_seed("interview", self.seed, index))
        kind = int(rng.integers(20))
        if kind < 3:
            return _pair_row(rng)
        about = questions.subject(rng, self.near)
        if kind < 7:
            return _clip_row(about, rng, self.count)
        asked = questions.ask(about, rng, self.count)  # before the image: both draw from `rng`
        return image_row(about, with_noise(render(about.scene, rng), rng), asked)


def _pair_row(rng: np.random.Generator) -> dict[str, Any]:
    *scenes, caption, question = questions.pair(rng)
    return {
        "media": [with_noise(render(scene, rng), rng) for scene in scenes],
        "interval": 1,
        "facts": [facts(scene)[None] for scene in scenes],
        "questions": [question],
        "meant": [meanings(scene) for scene in scenes],
        "shown": [phrases(caption, scene) for scene in scenes],
    }


def _clip_row(about: Subject, rng: np.random.Generator, count: int) -> dict[str, Any]:
    scene, motion = move(about.scene, rng)
    about = replace(about, scene=scene, motion=motion)
    frames = int(rng.choice([4, 6, 8]))
    clip = torch.stack([to_tensor(frame) for frame in film(scene, motion, rng, frames=frames)])
    shares = np.linspace(0, 1, frames).reshape(-1, TEMPORAL).mean(1)
    by_time = torch.stack([facts(at(scene, motion, float(share)), motion) for share in shares])
    return {
        "media": [clip],
        "facts": [by_time],
        "interval": int(rng.choice([1, 2, 4])),
        "questions": questions.ask(about, rng, count),
        "meant": [meanings(scene, motion)],
        "shown": [phrases(about.caption, scene)],
    }


def image_row(about: Subject, image: Tensor, asked: list[Question]) -> dict[str, Any]:
    """The row of `image` [3, 64, 64], which shows the scene of `about`, with the questions `asked`."""
    return {
        "questions": asked,
        "media": [image],
        "interval": 1,
        "facts": [facts(about.scene)[None]],
        "meant": [meanings(about.scene)],
        "shown": [phrases(about.caption, about.scene)],
    }


def facts(scene: Scene, motion: Motion | None = None) -> Tensor:
    """Facts [8, 8, kinds] of each patch in the order of FACTS: object (0 is the ground), side, way; -100 for none."""
    labels = torch.full((1 + len(scene.things), len(FACTS)), -100)
    labels[0, 0] = 0
    for row, thing in enumerate(scene.things, start=1):
        place = whereabouts(scene, thing, motion)
        labels[row, 0] = CLASSES[thing.shape, thing.color]
        labels[row, 1:] = torch.tensor([place.get("side", -100), place.get("way", -100)])
    return labels[torch.from_numpy(covers(scene, PATCH))]


def with_noise(image: np.ndarray, rng: np.random.Generator) -> Tensor:
    """The image, in half of all cases with a little noise, as generated images have."""
    noise = rng.normal(0, 0.02, image.shape) if rng.random() < 0.5 else 0.0
    return to_tensor(np.clip(image + noise, 0, 1).astype(np.float32))


class Interview:
    """Collates rows: all questions about one subject are packed in one sequence and do not attend to each other.

    With the mask a question attends only to the media and to itself, and its positions start where the media end, so
    its answer is exactly that of a sequence with this question alone, while the media are encoded once.
    """

    def __init__(
        self,
        words: Qwen2Tokenizer,
        model: Qwen2_5_VLForConditionalGeneration,
        patchify: Patchify,
        judged: Collection[str] = CAPTIONED,
    ) -> None:
        self.words, self.patchify, self.judged = words, patchify, judged
        self.ids = {"image": model.config.image_token_id, "video": model.config.video_token_id}
        self.place = model.model.get_rope_index
        self.spelled = {words.convert_tokens_to_ids(f"Ġ{word}"): word for word in (*MEANT, *NOUNS)}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = [self._sequence(row) for row in rows]
        length = max(len(sequence["ids"]) for sequence in sequences)
        batch = {name: torch.full((len(rows), length), fill) for name, fill in _FILLS.items()}
        batch["positions"] = torch.zeros(3, len(rows), length, dtype=torch.long)
        batch["weights"] = torch.zeros(len(rows), length)
        batch["meant"] = torch.full((MEDIA * len(HEADS), len(rows), length), -100)
        batch["shown"] = torch.full((MEDIA, len(rows), length), -100)
        for row, sequence in enumerate(sequences):
            for name, values in sequence.items():
                batch[name][..., row, : values.shape[-1]] = values
        patches, grids = zip(*(self.patchify(medium[None]) for row in rows for medium in row["media"]), strict=True)
        labels = torch.cat([by_squares(facts) for row in rows for facts in row["facts"]])
        return batch | {"patches": torch.cat(patches), "grids": torch.cat(grids), "facts": labels}

    def _encode(self, text: str) -> list[int]:
        return self.words(text, add_special_tokens=False).input_ids

    def _sequence(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        """Token ids, group (0 media, else the question's number), targets, weights and positions of one row."""
        ids = self._encode(OPENING)
        kinds = [0] * len(ids)
        grids: dict[int, list[list[int]]] = {1: [], 2: []}
        for medium in row["media"]:
            frames = len(medium) if medium.dim() == 4 else 1
            time, kind = -(-frames // TEMPORAL), 2 if medium.dim() == 4 else 1
            side = medium.shape[-1] // PATCH
            grids[kind].append([time, side, side])
            pads = [self.ids["video" if kind == 2 else "image"]] * (time * (side // MERGE) ** 2)
            ids += [*self._encode(VISION[0]), *pads, *self._encode(VISION[1])]
            kinds += [0, *([kind] * len(pads)), 0]
        start = self._places(ids, kinds, grids, row["interval"])
        nothing = torch.full((MEDIA * len(HEADS), len(ids)), -100)
        pieces = [(torch.tensor(ids), start, nothing[0], torch.zeros(len(ids)), nothing, nothing[:MEDIA])]
        groups = [0] * len(ids)
        for number, question in enumerate(row["questions"], start=1):
            question_ids, answer = self._encode(question.text + CLOSING), self._encode(question.answer + END)
            line = torch.tensor([*question_ids, *answer])
            places = start[0, -1] + 1 + torch.arange(len(line))  # the token before is text
            targets = torch.full((len(line),), -100)
            targets[len(question_ids) - 1 : -1] = torch.tensor(answer)
            weights = (targets >= 0) / len(answer)
            labels = self._labels(row, question, question_ids, len(line))
            pieces.append((line, places.expand(3, -1), targets, weights, *labels))
            groups += [number] * len(line)
        names = ("ids", "positions", "targets", "weights", "meant", "shown")
        joined = {name: torch.cat(parts, -1) for name, parts in zip(names, zip(*pieces, strict=True), strict=True)}
        return joined | {"groups": torch.tensor(groups)}

    def _labels(self, row: Mapping[str, Any], question: Question, ids: list[int], length: int) -> tuple[Tensor, Tensor]:
        """Facts that the words refer to [MEDIA * heads, L], and 1 or 0 where a phrase is or is not shown [MEDIA, L].

        The latter is at every noun of a caption, for its phrase, and at the last word of "Is the circle red?".
        """
        spelled = [self.spelled.get(token, "") for token in ids]
        meant, shown = torch.full((MEDIA, len(HEADS), length), -100), torch.full((MEDIA, length), -100)
        nouns = [place for place, word in enumerate(spelled) if word in NOUNS]
        for medium, (known, truths) in enumerate(zip(row["meant"], row["shown"], strict=True)):
            for place, word in enumerate(spelled):
                if word in known:
                    meant[medium, :, place] = torch.tensor([known[word].get(head, -100) for head in HEADS])
            if question.kind in self.judged:
                is_claim = question.kind not in CAPTIONED
                places = [max(place for place, word in enumerate(spelled) if word)] if is_claim else nouns
                shown[medium, places] = torch.tensor([int(question.answer == "Yes")] if is_claim else truths)
        return meant.flatten(0, 1), shown

    def _places(self, ids: list[int], kinds: list[int], grids: Mapping[int, list[list[int]]], interval: int) -> Tensor:
        """Positions [3, L] of the part before the questions, by the model's own rule."""
        image, video = (torch.tensor(grids[kind]) if grids[kind] else None for kind in (1, 2))
        seconds = torch.full((len(grids[2]),), interval / TOKENS_PER_SECOND)
        positions, _ = self.place(
            torch.tensor([ids]),
            torch.tensor([kinds]),
            image_grid_thw=image,
            video_grid_thw=video,
            second_per_grid_ts=seconds,
        )
        return positions[:, 0]


def by_squares(labels: Tensor) -> Tensor:
    """Facts [T, 8, 8, kinds] as [T * 64, kinds] in the tower's order: the patches of a merged square are adjacent."""
    # axes: time, row, row in square, column, column in square, kind
    squares = labels.unflatten(2, (-1, MERGE)).unflatten(1, (-1, MERGE))
    return squares.transpose(2, 3).flatten(0, 4)


_FILLS = {"ids": 0, "groups": -1, "targets": -100}


def see_only_own(groups: Tensor) -> Tensor:
    """Additive mask [B, 1, L, L]: causal attention to the media (group 0) and to the same question."""
    length = groups.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=groups.device).tril()
    same = (groups[:, :, None] == groups[:, None, :]) | (groups[:, None, :] == 0)
    mask = torch.zeros(groups.shape[0], 1, length, length, device=groups.device)
    return mask.masked_fill(~(same & causal)[:, None], torch.finfo(torch.float32).min)


class Answering(nn.Module):
    """Cross-entropy of the answers, averaged over questions, plus auxiliary losses that are needed to learn binding.

    Patch features are classified twice: before merging, by a linear head, and after it, by the word embeddings of the
    language model, which brings words and image features into one space. At the middle layer a head predicts the facts
    that a word refers to; at the last layer but one, which phrases of a caption are true, as raters mark words (arXiv
    2312.10240). Without these heads, which are not stored, yes/no answers on colours and captions stayed at chance.
    """

    _keys_to_ignore_on_save = None

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, words: Qwen2Tokenizer) -> None:
        super().__init__()
        self.vlm = model
        self._shapes, self._colors = (
            words.convert_tokens_to_ids([f"Ġ{name}" for name in names]) for names in (SHAPES, PALETTE)
        )
        self.facts = nn.Linear(model.config.vision_config.hidden_size, sum(FACTS.values()))
        self.meanings = nn.Linear(model.config.text_config.hidden_size, MEDIA * sum(HEADS.values()))
        self.phrases = nn.Linear(model.config.text_config.hidden_size, MEDIA * 2)
        self.only_vision = False

    def forward(
        self,
        *,
        patches: Tensor,
        grids: Tensor,
        facts: Tensor,
        ids: Tensor,
        groups: Tensor,
        positions: Tensor,
        targets: Tensor,
        weights: Tensor,
        meant: Tensor,
        shown: Tensor,
    ) -> dict[str, Tensor]:
        seen = self.vlm.model.visual(patches, grid_thw=grids)
        auxiliary = _cross_entropy(self.facts(seen.last_hidden_state), facts.T, list(FACTS.values()))
        if self.only_vision:
            return {"loss": auxiliary}
        states = read(self.vlm, seen.pooler_output, ids, groups, positions)
        hidden, half = states[-1], states[len(states) // 2]
        auxiliary = auxiliary + self._naming(seen.pooler_output, facts[:, 0])
        auxiliary = auxiliary + _cross_entropy(self.meanings(half), meant, MEDIA * list(HEADS.values()))
        auxiliary = auxiliary + _cross_entropy(self.phrases(states[-2]), shown, MEDIA * [2])
        return {"loss": answer_loss(self.vlm, hidden, targets, weights) + 0.3 * auxiliary}

    def _naming(self, merged: Tensor, objects: Tensor) -> Tensor:
        """Cross-entropy of the object's shape and colour, with word embeddings as weights; merged patches with one."""
        shown = objects.unflatten(0, (-1, MERGE**2)).amax(1)
        tokens, kinds = merged[shown > 0], shown[shown > 0] - 1
        words = self.vlm.get_input_embeddings().weight
        parts = ((self._shapes, kinds // len(PALETTE)), (self._colors, kinds % len(PALETTE)))
        losses = [functional.cross_entropy((tokens @ words[ids].T).float(), kind) for ids, kind in parts]
        return torch.stack(losses).sum()


def _cross_entropy(logits: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
    """Sum over heads of the cross-entropy of `logits` [..., sum of sizes] where `labels` [heads, ...] are not -100."""
    losses = [
        functional.cross_entropy(own[label >= 0], label[label >= 0])
        for own, label in zip(logits.float().split(sizes, dim=-1), labels, strict=True)
        if (label >= 0).any()
    ]
    return torch.stack([logits.new_zeros(()), *losses]).sum()


def answer_loss(model: Qwen2_5_VLForConditionalGeneration, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of the answers from last states [B, L, width], averaged over questions."""
    valid = targets >= 0
    losses = functional.cross_entropy(model.lm_head(hidden[valid]).float(), targets[valid], reduction="none")
    return (losses * weights[valid]).sum() / weights.sum()


def read(
    model: Qwen2_5_VLForConditionalGeneration, seen: Tensor, ids: Tensor, groups: Tensor, positions: Tensor
) -> tuple[Tensor, ...]:
    """States [B, L, width] before and after every layer, of packed questions with the merged patches `seen`."""
    embedded = model.get_input_embeddings()(ids)
    pads = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
    embedded = embedded.masked_scatter(pads[..., None], seen.to(embedded.dtype))
    mask = see_only_own(groups).to(embedded.dtype)
    given = {"inputs_embeds": embedded, "position_ids": positions, "attention_mask": mask}
    return model.model.language_model(**given, output_hidden_states=True).hidden_states


def train_vlm(
    patchify: Patchify, out: Path, work: Path, stages: Sequence[Stage] = STAGES
) -> Qwen2_5_VLForConditionalGeneration:
    """Train the vision tower on facts of patches, then the rest on answers, and save the model with its tokenizer.

    `patchify` cuts media into patches; it is an argument because this package does not import `rewards`.
    """
    set_seed(stages[0].seed)
    words = tokenizer()
    model = vlm(words)
    objective = Answering(model, words)
    for number, stage in enumerate(stages, start=1):
        objective.only_vision = stage.count == 0
        for part in (model.model.visual.patch_embed, model.model.visual.blocks, objective.facts):
            part.requires_grad_(objective.only_vision)
        rows = Interviews(stage.scenes, stage.seed, stage.count, stage.near)
        fit(objective, rows, stage, work / f"stage-{number}", Interview(words, model, patchify, stage.judged))
    save(model, words, out)
    return model
