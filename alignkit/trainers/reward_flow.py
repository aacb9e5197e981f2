"""Direct reward gradients: sample, decode, score, and follow the gradient of the reward through the denoising chain.

One engine for ReFL, DRaFT, AlignProp, DRTune and others; an estimator (`alignkit.diffusion.estimators`) says which
steps carry gradients. The gradient is exact for those steps: each step, the decoding and, if there are several, each
reward is checkpointed, so that memory is that of one step. The caller passes the loaded rewards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from alignkit.diffusion.estimators import ChainPlan, Estimator, find_estimator
from alignkit.diffusion.solvers import FreshNoise
from alignkit.diffusion.steps import Steps
from alignkit.errors import ConfigError
from alignkit.generators.codec import at_least_float32
from alignkit.generators.decoding import Decoding
from alignkit.generators.rollout import ByStep, at_step, keyed_sources, rollout
from alignkit.generators.state_gradients import LargestGradients, StateGradients
from alignkit.generators.switching import by_step
from alignkit.protocols import Preparing, Reward
from alignkit.records import LossOutput, Prompt, Sampling, texts
from alignkit.trainers.chains import Chains, require_bounded, require_trained
from alignkit.trainers.data import EpochData, PromptData
from alignkit.trainers.data_loss import DataLossConfig, OneSize, data_errors, drop_media, null_condition, with_media
from alignkit.trainers.guard import WatchConfig
from alignkit.trainers.guarded import GuardedTrainer
from alignkit.trainers.ranges import COUNT, NOT_NEGATIVE, POSITIVE, require_in_range
from alignkit.trainers.reward_watch import logged_parts
from alignkit.trainers.self_check import SelfCheck
from alignkit.trainers.velocity_penalty import VelocityPenalty, both
from alignkit.trainers.weighted_rewards import WeightedRewards

GROWTH_LIMIT = 1e6
_RANGES = {
    "sampling_steps": COUNT,
    "noise_samples": NOT_NEGATIVE,
    "decode_frames": COUNT,
    "state_gradient_cap": POSITIVE,
    "growth_limit": POSITIVE,
    "kl_weight": NOT_NEGATIVE,
}


@dataclass
class RewardConfig(WatchConfig, DataLossConfig):
    """How chains are sampled, which rewards are maximised, and which steps carry gradients."""

    reward_weights: dict[str, float] | None = field(
        default=None, metadata={"help": "Weights of the rewards that are maximised, by their names under `rewards`."}
    )
    reward_targets: dict[str, float] | None = field(
        default=None, metadata={"help": "By name, the value above which a reward is not increased further."}
    )
    estimator: str = field(
        default="draft",
        metadata={
            "help": "Which steps carry gradients: exact (all), refl, draft, draft-3, draft-lv, alignprop, drtune, "
            "first-step, flowbp-sparse. The next five keys replace single settings of it."
        },
    )
    gradient_steps: str | None = field(
        default=None,
        metadata={
            "help": "all; last K, first K, random K, even K (K: 3, 30%, or drawn from 1-100%); or window A-B (2-5 or "
            "0%-40%)."
        },
    )
    coupling: float | None = field(
        default=None, metadata={"help": "Gradient at a step's input: 1 exact, 0 stopped (DRTune), or between."}
    )
    unconditional_gradient: bool | None = field(
        default=None, metadata={"help": "Whether the unconditional call of guidance carries gradients too."}
    )
    early_end: str | None = field(
        default=None,
        metadata={"help": "Steps after which the chain may end with the predicted clean latents: 75%-100%; '' never."},
    )
    noise_samples: int | None = field(
        default=None, metadata={"help": "Further noise samples of the last step (DRaFT-LV)."}
    )
    state_gradient_cap: float | None = field(
        default=1.0,
        metadata={
            "help": "Cap each row's gradient of the state at this multiple of its norm after the last step; null: off."
        },
    )
    growth_limit: float = field(
        default=GROWTH_LIMIT,
        metadata={"help": "Stop when the state's gradient exceeds that after the last step by this factor."},
    )
    kl_weight: float = field(
        default=0.0, metadata={"help": "Weight of the squared velocity difference to the reference on visited states."}
    )
    sampling_steps: int = field(default=30, metadata={"help": "Denoising steps of a chain."})
    guidance_scale: float = field(default=5.0, metadata={"help": "Guidance scale of the chain; 1: no guidance."})
    eta: float = field(
        default=0.0,
        metadata={"help": "DDIM's eta: new noise in each step, from 0 (none) to 1 (ancestral)."},
    )
    flow_sde: float = field(
        default=0.0,
        metadata={"help": "Noise level a of Flow-GRPO's SDE steps (there 0.7), of flow models alone; 0: none."},
    )
    height: int = field(default=512, metadata={"help": "Height of what is sampled, in pixels."})
    width: int = field(default=512, metadata={"help": "Width of what is sampled, in pixels."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames of a video; default: 1."})

    decode_frames: int | None = field(
        default=None, metadata={"help": "Decode and score only the first frames of a video, this many; default: all."}
    )
    decode_cache_on_cpu: bool = field(
        default=False,
        metadata={"help": "Keep what a causal video VAE caches between latent frames in the memory of the CPU."},
    )
    decode_tiles: bool = field(
        default=False,
        metadata={"help": "Decode in spatial tiles: memory of one tile, slightly other pixels at seams."},
    )

    @property
    def trained_rewards(self) -> tuple[str, ...]:
        # Not checked in __post_init__: the library and the model card make a config of defaults alone.
        if not self.reward_weights:
            raise ConfigError("reward_weights is missing: name at least one of `rewards` with its weight, e.g. clip: 1")
        return tuple(self.reward_weights)

    @property
    def needs_media(self) -> bool:
        """Whether the loss reads the rows' images or clips."""
        return self.data_weight > 0

    @property
    def sampling(self) -> Sampling:
        """How the chains are sampled."""
        return Sampling(self.sampling_steps, self.guidance_scale, self.height, self.width, self.num_frames or 1)

    @property
    def fresh_noise(self) -> FreshNoise:
        """The new noise in each step of the chains."""
        return FreshNoise(self.eta, self.flow_sde)

    @property
    def decoding(self) -> Decoding:
        """How the result of a chain is decoded: with activation checkpoints."""
        return Decoding(self.decode_frames, cache_on_cpu=self.decode_cache_on_cpu, tiles=self.decode_tiles)

    @property
    def gradient(self) -> Estimator:
        """The estimator with the keys that replace its settings."""
        given = {
            "steps": self.gradient_steps,
            "coupling": self.coupling,
            "unconditional": self.unconditional_gradient,
            "early_end": self.early_end,
            "noise_samples": self.noise_samples,
        }
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(find_estimator(self.estimator), **changes)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_in_range(vars(self), _RANGES)
        weights = {f"reward_weights.{name}": weight for name, weight in (self.reward_weights or {}).items()}
        require_in_range(weights, dict.fromkeys(weights, POSITIVE))
        for name, target in (self.reward_targets or {}).items():
            if name not in (self.reward_weights or {}) or not math.isfinite(target):
                raise ConfigError(f"reward_targets.{name} is {target}; give a finite target of one of reward_weights")
        if self.train_text_encoder:
            raise ConfigError("train_text_encoder: this method trains the denoiser alone; leave it out")
        self.gradient.draw(self.sampling.steps)
        bool(self.fresh_noise)


class RewardTrainer(GuardedTrainer):
    """Maximises rewards by their gradients through the chain; loss [P], one chain for each prompt.

    The loss of a row is minus the weighted mean of its rewards (the mean over the chain and its `noise_samples`) plus
    `kl_weight` times the velocity penalty and `data_weight` times the denoising error of the row's image or clip, which
    is brought to the size of the chains (`data_loss`). `rewards` are the loaded rewards by name
    (`alignkit.protocols.Reward`). Noise is keyed by (`noise_seed`, prompt id, epoch), that of a step (`eta`,
    `flow_sde`, LCM) by the step too. What the estimator draws is keyed by (`noise_seed`, step). Held-out losses are
    those of the whole chain.

    Raises ConfigError, before the training, naming a reward without gradients at the pixels, and DataError naming a
    prompt that lacks what a reward needs.
    """

    args: RewardConfig

    def __init__(
        self,
        model: Any,
        args: RewardConfig,
        train_dataset: Any,
        *rest: Any,
        rewards: Mapping[str, Reward],
        **options: Any,
    ) -> None:
        self.needs_reference = args.kl_weight > 0
        weights = {name: (args.reward_weights or {})[name] for name in args.trained_rewards}
        self._rewards = WeightedRewards(rewards, weights, args.reward_targets or {})
        self._estimator = args.gradient
        self._gradients: StateGradients | LargestGradients = StateGradients(0)
        self._loss_scale_P = torch.ones(1)
        super().__init__(model, args, train_dataset, *rest, rewards=self._rewards.rewards, **options)
        self._try_rewards()

    @override
    def prepare_model(self, args: Any) -> None:
        """As in AlignTrainer; what is not trained is frozen, because gradients only pass through it."""
        self.generator.require_sampling(args.sampling)
        super().prepare_model(args)
        if self.generator.model.trained_encoders:
            raise ConfigError(
                "the adapter trains text encoders; this method trains the denoiser alone: start without it"
            )
        if args.fresh_noise and (self.generator.own_steps or (args.flow_sde and self.generator.prediction != "flow")):
            raise ConfigError(
                f"eta is {args.eta}, flow_sde {args.flow_sde}: '{self.generator.name}' cannot have them. eta is for "
                "all models but few-step ones with steps of their own, flow_sde for those of them that predict a flow"
            )
        trained = set(self.trained_module().modules())
        for part in self.generator.pipeline.components.values():  # Wan 2.2's other expert among them
            if isinstance(part, nn.Module) and part not in trained:
                part.requires_grad_(False)
        self._null = null_condition(self.generator) if args.data_weight > 0 else {}

    @override
    def prepare_data(self, rows: Any, args: Any) -> EpochData | None:
        """As in AlignTrainer; with `data_weight` the rows' media are encoded too.

        The prompts have the media of a dataset themselves only where a reward is `Preparing`.
        """
        keeps_media = any(isinstance(reward, Preparing) for reward in self._rewards.rewards.values())
        if not args.needs_media or rows is None or isinstance(rows, EpochData):
            return super().prepare_data(rows if keeps_media else drop_media(rows), args)
        frames = (args.num_frames or 1) if self.generator.modality == "video" else None
        sizes = OneSize(num_frames=frames, height=args.height, width=args.width)
        return with_media(self.generator, rows, args, sizes, self.ranks, keeps_media=keeps_media)

    def _try_rewards(self) -> None:
        """Prepare the rewards for all prompts; call each once, on decoded noise for the first, at the training size."""
        prompts = [*self.prompts, *(self.validation.prompts if self.validation else ())]
        with self.accelerator.local_main_process_first():  # the others read what it has cached
            for reward in self._rewards.rewards.values():
                if isinstance(reward, Preparing):
                    reward.prepare(prompts)
        first = next((data[0] for data in (self.train_dataset, self._held_out) if data), None)
        if first is None:
            return
        source = torch.Generator().manual_seed(int(first["seed"]))
        with torch.no_grad(), self.components_on(self.args.device), self._own_precision():
            noise = self.generator.initial_noise(self._latent_shape, source).to(self.args.device)
            media = self.generator.decode(noise, self.args.decoding)
        with self._own_precision():
            parts = self._rewards.require_gradients(media, first["prompts"], self.generator.modality)
        self._rewards.logged = {name: logged_parts(names, self.prompts) for name, names in parts.items()}

    @override
    def check_gradients(self, batch: Mapping[str, Any]) -> None:
        """`SelfCheck`, for the first prompt."""
        args, autocast = self.args, self.accelerator.autocast
        options: dict[str, Any] = {"half": bool(args.bf16 or args.fp16), "decoding": args.decoding}
        check = SelfCheck(self.generator, args.sampling, args.device, autocast, self._own_precision, **options)
        check.run(batch["prompts"][0], self._rewards.rewards if self._recomputes_rewards else {})

    @override
    def last_scores(self) -> Mapping[str, Tensor]:
        """Those of the weighted rewards."""
        return self._rewards.scores

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts of the training and held-out rows; none of data of another class than `PromptData`."""
        datas = (self.train_dataset, self._held_out)
        return [prompt for data in datas if isinstance(data, PromptData) for prompt in data.prompts]

    # --- the loss ---

    def method_loss(self, model: nn.Module, batch: Mapping[str, Any]) -> LossOutput:
        prompts: list[Prompt] = batch["prompts"]
        seeds = batch["seed"].tolist()
        sources = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        grid = self.generator.grid(self.args.sampling_steps, self._latent_shape)
        plan = ChainPlan(Steps(), len(grid) - 1)  # held out: the whole chain
        if torch.is_grad_enabled():  # equal for all ranks and micro-batches of a step
            plan = self._estimator.draw(len(grid), self.args.noise_seed, self.state.global_step)
        cond = self.conditioning(model, texts(prompts), plan.steps, len(grid))
        grid = grid.ending_at(plan.end)
        chains = Chains(self.denoiser(model), cond, grid, seeds, self._noise(sources) * grid.start)
        latents, penalty_P, (reward_P, metrics) = self.scored(chains, plan.steps, prompts)
        noised = self._noised(chains, plan, latents.detach(), sources)
        further = [self._score(sample, prompts)[0] for sample in noised]
        loss_P = -torch.stack([reward_P, *further]).mean(0)
        if penalty_P is not None:
            loss_P = loss_P + self.args.kl_weight * penalty_P
            metrics["velocity_difference"] = penalty_P.detach().mean()
        if self.args.data_weight > 0:
            error_P = data_errors(self.generator, model, batch, self._null)
            loss_P = loss_P + self.args.data_weight * error_P
            metrics["data_error"] = error_P.detach().mean()
        if loss_P.requires_grad:
            loss_P.register_hook(self._note_scale)
        return LossOutput(loss_P, metrics)

    def denoiser(self, model: nn.Module) -> Any:
        """What the chains call, from the module as it is wrapped."""
        return model

    def conditioning(self, model: nn.Module, prompts: list[str], steps: Steps, count: int) -> ByStep:  # noqa: ARG002
        """That of chains of `count` steps, of which `steps` carry gradients."""
        with torch.no_grad(), self._own_precision():
            return by_step(self.generator.conditioner, prompts, count, self.generator.device)

    def scored(
        self, chains: Chains, steps: Steps, prompts: list[Prompt]
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, dict[str, Tensor]]]:
        """The final latents [P, C, ...], the velocity penalty [P] if there is one, what is maximised [P], metrics."""
        self._gradients = gradients = StateGradients(len(chains.grid), self.args.state_gradient_cap)
        penalty = self.penalty(chains, steps)
        options = {"on_step": both(gradients, penalty), "sources": keyed_sources(chains.seeds), "steps": steps}
        latents = rollout(self.generator, chains.cond, chains.x, chains.grid, **options, **self.options(chains))
        require_trained(latents, steps, self.state.global_step)
        penalty_P = None if penalty is None else penalty.mean()
        return latents, penalty_P, self._score(latents, prompts)

    def penalty(self, chains: Chains, steps: Steps) -> VelocityPenalty | None:
        """The velocity penalty on the states of `chains` at `steps`, if it has a weight."""
        if self.args.kl_weight == 0:
            return None
        start = chains.model, chains.cond, chains.grid, chains.x
        return VelocityPenalty(self.generator, *start, scale=self.args.guidance_scale, steps=steps)

    def options(self, chains: Chains) -> dict[str, Any]:
        """Keywords of `rollout` that all chains share."""
        return {"scale": self.args.guidance_scale, "model": chains.model, "fresh": self.args.fresh_noise}

    def _noised(self, chains: Chains, plan: ChainPlan, x0: Tensor, sources: list[torch.Generator]) -> Iterator[Tensor]:
        """Denoised latents of `x0` noised to the last step's level with fresh noise, `noise_samples` times."""
        last = chains.grid[-1:]
        steps = replace(plan.steps, active=None)
        for sample in range(plan.noise_samples):
            x = float(last.alpha[0]) * x0 + float(last.sigma[0]) * self._noise(sources)
            options = {"steps": steps, "sources": keyed_sources(chains.seeds, "sample", sample)}
            cond = at_step(chains.cond, len(chains.grid) - 1)
            yield rollout(self.generator, cond, x, last, **options, **self.options(chains))

    def _noise(self, sources: list[torch.Generator]) -> Tensor:
        """Unit noise [P, C, ...], at least float32, each row from its own source."""
        noise = torch.cat([self.generator.initial_noise(self._latent_shape, source) for source in sources])
        return at_least_float32(noise.to(self.args.device, torch.promote_types(noise.dtype, self.generator.net.dtype)))

    def _score(self, latents: Tensor, prompts: list[Prompt]) -> tuple[Tensor, dict[str, Tensor]]:
        """What is maximised [P] and the rewards' means, of the decoded latents."""
        with self._own_precision():
            return self._rewards(self.decoded(latents), prompts, checkpointed=self._recomputes_rewards)

    def decoded(self, latents: Tensor) -> Tensor:
        """Media [P, ...] in [0, 1] of latents, checkpointed where these have gradients."""
        return self.generator.decode(latents, self.args.decoding)

    @property
    def _recomputes_rewards(self) -> bool:
        return len(self._rewards.rewards) > 1 or self._estimator.noise_samples > 0

    def _own_precision(self) -> AbstractContextManager[Any]:
        """Within it text encoders, VAE and rewards compute in the dtype of their weights, as where images are made."""
        return torch.autocast(self.args.device.type, enabled=False)

    @property
    def _latent_shape(self) -> tuple[int, ...]:
        sampling = self.args.sampling
        return self.generator.latent_shape(sampling.height, sampling.width, sampling.num_frames)

    # --- the state's gradient ---

    def _note_scale(self, gradient_P: Tensor) -> None:
        """The factor of each row's loss in what is differentiated: its share of the step, and fp16's loss scale."""
        self._loss_scale_P = gradient_P.detach()

    @override
    def training_step(self, *inputs: Any, **options: Any) -> Tensor:
        """As in Trainer; after the backward pass the norms of the state's gradient are checked and logged."""
        loss = super().training_step(*inputs, **options)
        norms = dict(sorted(self._gradients.norms.items()))
        if not self.args.fp16:  # whose loss scaler meets infinite gradients by design, and skips the step
            require_bounded(self._gradients.growth(), self.args.growth_limit, self.state.global_step)
        scale_P = self._loss_scale_P.abs().clamp(min=torch.finfo(torch.float32).tiny)
        means = {f"state_gradient/{index:02d}": (norm_P / scale_P).mean() for index, norm_P in norms.items()}
        self._health.add(means, len(scale_P))
        return loss
