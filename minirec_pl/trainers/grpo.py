"""The RL stage, Group Relative Policy Optimization, as an ordinary LightningModule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from minirec_pl.data.loader import GENERATION, GROUP_SIZE, REPEATED, GenerationSchedule, in_hand
from minirec_pl.data.own_columns import OwnColumns
from minirec_pl.grpo.buffer import Generation, RolloutBatch, figures_of, signals_of, take_rows, totals_of
from minirec_pl.grpo.collector import RolloutCollector
from minirec_pl.grpo.expected import Expectation
from minirec_pl.grpo.loss import Baseline, ImportanceSamplingLevel, LossType, ScaleRewards
from minirec_pl.grpo.objective import WASTED_GROUPS, Objective, WastedGroups
from minirec_pl.grpo.reference import adapters_off, check_sync, frozen_copy, is_fresh_lora, mix_into
from minirec_pl.grpo.sampler import RolloutSampler
from minirec_pl.policy.interface import WITHOUT_ROLLOUTS, Policy, RolloutKind, RolloutOptions
from minirec_pl.rewards.calls import Rewarder, RewardFunction, asked_for, check_columns, checked_rewards, described
from minirec_pl.rewards.hit_or_miss import check_hit_values, hit_values, is_hit_or_miss
from minirec_pl.selection.group_sizes import AdaptiveGenerations, GroupSizer
from minirec_pl.selection.probes.gradients import GradientKind, GradientSpace
from minirec_pl.selection.probes.trajectory import Trajectory
from minirec_pl.selection.session.callback import SessionCallback
from minirec_pl.selection.session.resume import position as batch_position
from minirec_pl.selection.session.scoring import is_sharded
from minirec_pl.selection.session.session import session_of
from minirec_pl.selection.signals import SampleSignals
from minirec_pl.trainers.grpo_checks import (
    check_adaptive,
    check_ids,
    check_schedule,
    check_selectors,
    check_single,
    check_without_rollouts,
)
from minirec_pl.trainers.recommender import EVALUATION_K, RecModule
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.identity import Identity, fact
from minirec_pl.utils.modules import evaluation_mode
from minirec_pl.utils.ranks import gather_states, own_state


class GRPORecModule(RecModule):
    """Group Relative Policy Optimization of a recommender (arXiv 2402.03300), option names as in TRL.

    `num_generations` rollouts, items or reasonings, are sampled per prompt and rewarded, for all the batches of an
    optimizer step at once, so that what its loss is averaged over is known before the first backward pass. With one
    update per rollout (the default) the ratio is 1 when the gradient is taken. Groups that the loss does not depend on
    are not trained on. A policy that reasons and ranks is trained by RecPO, see `minirec_pl.grpo.item_loss`.

    Where the reward is a function of hit or miss and the policy knows the probability of its target exactly,
    `rollouts="expected"` needs none: its gradient is the expectation of the sampled one, see
    `minirec_pl.selection.group_moments`, at the price of one supervised step.

    Args:
        policy: the recommender, usually a warm start.
        rewards: reward functions, TRL's contract (see `minirec_pl.rewards.calls`); in YAML by dotted path. None takes
            `hit`, and for a RetrievalPolicy `SoftmaxMixReward()`.
        reward_weights: one weight per reward; None weighs each with 1.
        num_generations: G, rollouts per prompt, at least 2.
        rollouts: `sample` draws them; `beam` takes the items that a beam search of width G ends with (ReRe, arXiv
            2510.12211), for a GenerativePolicy. They say little of a mean reward, see `distinct_rollouts`.
            `expected` draws none and takes the expectation of the gradient over all groups of `num_generations`, for a
            GenerativePolicy and rewards of hit or miss (`minirec_pl.rewards.hit_or_miss`); `supervised` takes the
            log-likelihood of the target instead, the rival of both. Item ids of unequal length take `expected` with
            `loss_type: dr_grpo` only, and `beta` goes with ids of one token.
        temperature: divides the logits in sampling and in every other pass.
        top_k: sample among the k most likely tokens; None for all.
        top_p: sample among the smallest set of tokens with this mass; None for all.
        max_completion_length: tokens of a reasoning at most; None takes that of the RetrievalPolicy.
        mask_truncated_completions: leave the tokens of reasonings that ended at that length out of the token loss.
        distinct_rollouts: draw the items of a group without replacement; not with top_k or top_p, nor with a selector
            in mode `official`. A mean reward then says little (that of a hit is at most 1 / G), so that the exact solve
            probability stands for it in selection.
        relabel_topk: of a RetrievalPolicy's groups, how many of the best rollouts learn the item.
        negatives_across_ranks: compare a RetrievalPolicy's targets also with those of the same batch on other ranks,
            whose vectors come from the cache.
        epsilon: lower clip width of the probability ratio.
        epsilon_high: upper clip width; None takes `epsilon`.
        delta: upper bound of the ratio where the advantage is negative; None for none.
        beta: weight of the KL term against the policy at the start; 0 keeps no reference copy.
        use_bias_correction_kl: multiply the KL estimate by the ratio, so that its gradient is that of the divergence.
        loss_type: how token losses are averaged: `grpo`, `bnpo`, `dr_grpo` or `dapo`, see
            `minirec_pl.grpo.policy_loss`.
        importance_sampling_level: `token`, or `sequence` for one ratio per completion (GSPO).
        scale_rewards: what divides the centred rewards: the standard deviation of the `group` or of the `batch`, the
            `mean` of the group (MaxRL), or `none`, see `minirec_pl.grpo.group_advantages`.
        baseline: what is subtracted from a reward: the `mean` of the group, or of the others, `leave_one_out`.
        num_iterations: how often each rollout is trained on.
        steps_per_generation: training batches that rollouts are made for at once, a multiple of the Trainer's
            accumulate_grad_batches; None takes that.
        wasted_groups: what becomes of groups without reward variance. `keep` counts them in the average.
            `dynamic_sampling` drops them and draws for more prompts (DAPO). `preference_pairs` turns those in which
            nothing found the target into target-over-sampled pairs, see `minirec_pl.grpo.preference_loss`.
        oversample: with `dynamic_sampling`, how many prompts the loader delivers for one that is trained on.
        adaptive_generations: as many rollouts for each sample as make a mixed group likely, by its solve probability;
            None for `num_generations`, which samples get whose solve probability is not known. Each group weighs 1. For
            `rollouts: sample`, with MiniRec or another callback that records rewards, whose budget is then one of
            rollouts: `num_generations` for each sample of it.
        sync_ref_model: move the reference after the policy (TR-DPO, arXiv 2404.09656).
        ref_model_sync_steps: optimizer steps from one sync to the next.
        ref_model_mixup_alpha: share of the policy in the new reference; the rest is the old one.
        scoring_generations: rollouts per sample when samples are scored. The exact solve probability comes with the
            same forward pass and needs none, so 0 is allowed; at least 2 otherwise.
        optimizer: makes the optimizer from the trainable parameters.
        lr_scheduler: makes a scheduler, stepped once per optimizer step; None keeps the rate constant.
        predict_k: length of the lists of `predict`, at least 1.

    Raises:
        InputError: if an option is out of range.
    """

    training_phase = "training"

    def __init__(
        self,
        policy: Policy,
        rewards: Sequence[RewardFunction] | None = None,
        reward_weights: list[float] | None = None,
        num_generations: int = 8,
        rollouts: RolloutKind = "sample",
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        max_completion_length: int | None = None,
        mask_truncated_completions: bool = False,
        distinct_rollouts: bool = False,
        relabel_topk: int = 1,
        negatives_across_ranks: bool = False,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        delta: float | None = None,
        beta: float = 0.0,
        use_bias_correction_kl: bool = True,
        loss_type: LossType = "dapo",
        importance_sampling_level: ImportanceSamplingLevel = "token",
        scale_rewards: ScaleRewards = "group",
        baseline: Baseline = "mean",
        num_iterations: int = 1,
        steps_per_generation: int | None = None,
        wasted_groups: WastedGroups = "keep",
        oversample: float = 2.0,
        adaptive_generations: AdaptiveGenerations | None = None,
        sync_ref_model: bool = False,
        ref_model_sync_steps: int = 512,
        ref_model_mixup_alpha: float = 0.6,
        scoring_generations: int = 4,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        predict_k: int = EVALUATION_K,
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler, predict_k)
        self.objective = Objective(
            loss_type=loss_type,
            epsilon=epsilon,
            epsilon_high=epsilon_high,
            delta=delta,
            beta=beta,
            use_bias_correction_kl=use_bias_correction_kl,
            importance_sampling_level=importance_sampling_level,
            scale_rewards=scale_rewards,
            baseline=baseline,
            relabel_topk=relabel_topk,
        )
        check_schedule(num_iterations, steps_per_generation)
        check_sync(beta, sync_ref_model, ref_model_sync_steps, ref_model_mixup_alpha)
        if wasted_groups not in WASTED_GROUPS:
            raise InputError(f"wasted_groups is {wasted_groups!r}: choose one of {', '.join(WASTED_GROUPS)}")
        if not 1 <= oversample < math.inf:
            raise InputError(f"oversample is {oversample}: it is a multiple of data.batch_size, at least 1")
        if adaptive_generations is not None:
            check_adaptive(adaptive_generations, num_generations, rollouts, distinct_rollouts, scale_rewards)
        self.rewards = policy.default_rewards() if rewards is None else checked_rewards(rewards)
        if reward_weights is not None and len(reward_weights) != len(self.rewards):
            raise InputError(
                f"reward_weights has {len(reward_weights)} numbers for {len(self.rewards)} rewards: give one each"
            )
        self.reward_weights = reward_weights
        self.own_columns = OwnColumns()
        self._columns_fact: dict[str, str] = {}
        self.num_generations = num_generations
        self.rollouts = rollouts
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.max_completion_length = max_completion_length
        self.mask_truncated_completions = mask_truncated_completions
        self.distinct_rollouts = distinct_rollouts
        self.relabel_topk = relabel_topk
        self.negatives_across_ranks = negatives_across_ranks
        self.num_iterations = num_iterations
        self.steps_per_generation = steps_per_generation
        self.wasted_groups = wasted_groups
        self.oversample = oversample if wasted_groups == "dynamic_sampling" else None
        self.adaptive_generations = adaptive_generations
        self.sync_ref_model = sync_ref_model
        self.ref_model_sync_steps = ref_model_sync_steps
        self.ref_model_mixup_alpha = ref_model_mixup_alpha
        self.scoring_generations = scoring_generations
        policy.check_options(self.rollout_options, self.rewards)
        self.expectation = self._expectation() if rollouts in WITHOUT_ROLLOUTS else None
        self.rollout_seed = torch.initial_seed()
        self.rollout_step = 0
        self.reference: Policy | None = None
        self.trajectory = Trajectory()
        self.generation: Generation | None = None
        self._adapter_is_new = False
        self._generated_at = (-1, -1)

    @property
    def reward_arguments(self) -> frozenset[str]:
        """What the rewards ask for by name; the DataModule keeps those of its columns."""
        return asked_for(self.rewards)

    def use_columns(self, own: OwnColumns) -> None:
        """Takes the columns of the data that rewards ask for.

        Raises:
            InputError: if a reward asks for a column that there is not.
        """
        check_columns(self.rewards, own)
        self.own_columns = own
        kept = sorted([*own.interactions.items(), *own.items.items()], key=lambda pair: pair[0])
        if kept:
            names = ", ".join(name for name, _ in kept)
            self._columns_fact = {"reward_columns": fact(names, *(repr(v.tolist()).encode() for _, v in kept))}

    @property
    def identity(self) -> Identity:
        """See `RecModule.identity`; the rewards too."""
        facts = {"rewards": ", ".join(sorted(described(reward) for reward in self.rewards)), **self._columns_fact}
        return Identity.of([super().identity, Identity(facts)])

    @property
    def rollout_options(self) -> RolloutOptions:
        """How groups of rollouts are drawn."""
        names = [field.name for field in fields(RolloutOptions) if field.name != "preference_pairs"]
        options = {name: getattr(self, name) for name in names}
        return RolloutOptions(**options, preference_pairs=self.wasted_groups == "preference_pairs")

    def _expectation(self) -> Expectation:
        check_without_rollouts(self.rollouts, self.num_iterations, self.steps_per_generation, self.wasted_groups)
        return Expectation(
            self.num_generations,
            self.objective.scale_rewards,
            self.objective.baseline,
            hit_values(self.rewards, self.reward_weights),
            self.objective.beta,
            self.objective.use_bias_correction_kl,
            likelihood=self.rollouts == "supervised",
        )

    @property
    def rewarder(self) -> Rewarder:
        """Calls the rewards."""
        return Rewarder(self.rewards, self.reward_weights, self.item_ids, self.own_columns, self._warn)

    @property
    def sampler(self) -> RolloutSampler:
        """Draws and rewards groups of rollouts, with the options as they are now."""
        largest = 0 if self.adaptive_generations is None else self.adaptive_generations.max
        made = (self.policy, self.rollout_options, self.rewarder, self.objective, self.cost, self.trajectory)
        return RolloutSampler(*made, largest=largest)

    def _warn(self, text: str) -> None:
        if self._trainer is None:
            warnings.warn(text, stacklevel=3)
        else:
            session_of(self.trainer).warn_once(self.trainer, text, text)

    @property
    def generation_schedule(self) -> GenerationSchedule:
        """How the training loader serves the batches: see `minirec_pl.data.loader.ResumableLoader`."""
        steps = self.steps_per_generation or self.trainer.accumulate_grad_batches
        return GenerationSchedule(steps, self.num_iterations, self.oversample or 1.0)

    def setup(self, stage: str) -> None:
        """Checks what depends on the Trainer."""
        if stage == "fit":
            self.use_columns(getattr(getattr(self.trainer, "datamodule", None), "own_columns", self.own_columns))
            check_schedule(self.num_iterations, self.steps_per_generation, self.trainer.accumulate_grad_batches)
            if self.distinct_rollouts or self.rollouts == "beam":
                check_selectors(self.trainer.callbacks)  # type: ignore[attr-defined]
            self._size_groups()

    def _size_groups(self) -> None:
        """Has the session size the groups, if that is asked for."""
        sizer = None
        if self.adaptive_generations is not None:
            if not any(isinstance(c, SessionCallback) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
                raise InputError(
                    "adaptive_generations goes by the rewards met so far, and no callback keeps them: add MiniRec, or "
                    "RewardHistory to train on the whole pool"
                )
            if is_sharded(self.trainer):
                raise InputError(
                    f"{type(self.trainer.strategy).__name__} needs all ranks to run the model equally often, and with "
                    "adaptive_generations they run it once for each size of group: use the strategy ddp, or leave out "
                    "adaptive_generations"
                )
            hits = all(is_hit_or_miss(reward) for reward in self.rewards)
            sizer = GroupSizer(self.num_generations, self.adaptive_generations, by_target=hits)
        session_of(self.trainer).sizer = sizer

    def configure_model(self) -> None:
        """Binds the policy; with `beta` above 0 keeps a frozen copy, unless a new adapter can be switched off."""
        super().configure_model()
        if self.expectation is not None:
            check_ids(self.rollouts, self.policy, self.rollout_options, self.objective)
        if self.objective.beta > 0 and self.reference is None and not self._adapter_is_new:
            self._adapter_is_new = is_fresh_lora(self.policy) and not self.sync_ref_model
            self.reference = None if self._adapter_is_new else frozen_copy(self.policy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the cost, the seed of the rollouts, those still to be trained on, and the trajectory's start."""
        super().on_save_checkpoint(checkpoint)
        interrupted = in_hand(self.trainer.fit_loop.epoch_loop.batch_progress)
        again = interrupted and self._generated_at == batch_position(
            self.trainer
        )  # the batch's rollouts are drawn again
        checkpoint["rollout_seed"], checkpoint["rollout_step"] = self.rollout_seed, self.rollout_step - int(again)
        if self.generation is not None and (self.generation.left or interrupted):
            checkpoint["generation"] = gather_states(self.generation.state_dict(), self.device)
        if self.trajectory.start:
            checkpoint["trajectory_start"] = dict(self.trajectory.start)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` kept."""
        super().on_load_checkpoint(checkpoint)
        self.rollout_seed = checkpoint.get("rollout_seed", self.rollout_seed)
        self.rollout_step = checkpoint.get("rollout_step", self.rollout_step)
        self.trajectory.start = dict(checkpoint.get("trajectory_start", self.trajectory.start))
        states = checkpoint.get("generation")
        self.generation = None if states is None else Generation.from_state(own_state(states, "unfinished rollouts"))

    def on_train_start(self) -> None:
        """Brings rollouts of a checkpoint to where the policy is by now."""
        super().on_train_start()
        if self.generation is not None:
            self.generation.to(self.device)

    def weights_replaced(self) -> None:
        """Starts the trajectory anew and encodes the items again; for weights that are set once samples were scored."""
        self.trajectory.start.clear()
        self.cost.add("scoring", forward=self.policy.refresh_items())

    def _generator(self) -> torch.Generator:
        """Random numbers of a generation, which depend on (seed, rank, generations so far) alone."""
        words = np.random.SeedSequence([self.rollout_seed, self.global_rank, self.rollout_step])
        return torch.Generator(device=self.device).manual_seed(int(words.generate_state(1, np.uint64)[0]) & (2**63 - 1))

    @contextmanager
    def _as_reference(self) -> Iterator[Policy]:
        policy = self.policy if self.reference is None else self.reference
        with evaluation_mode(policy), adapters_off(policy) if self._adapter_is_new else nullcontext():
            yield policy

    def _reference_logps(self, rollouts: RolloutBatch) -> Tensor:
        with self._as_reference() as policy:
            return self.sampler.reference_logps(policy, rollouts)

    def _reference_distribution(self, batch: Mapping[str, Tensor]) -> Tensor:
        with self._as_reference() as policy:
            passed = policy.target_pass(batch, self.temperature)
        self.cost.add("training", forward=passed.tokens)
        assert passed.distribution is not None
        return passed.distribution

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Any]:
        """One forward pass of the objective; the first of a generation makes its rollouts.

        Returns:
            `loss`; `trained`, the sample_ids [n] that are trained on for the first time; and, with new rollouts,
            `signals`: their rewards [B, G] and solve probabilities [B], for callbacks.
        """
        if "history" not in batch:
            raise InputError("GRPORecModule trains on single samples: set data.train_on to `pool`")
        output: dict[str, Any] = {}
        if GENERATION not in batch:
            check_single(self.generation_schedule)
        place = batch.get(GENERATION, {"position": 0, "positions": 1, "batches": [batch]})
        if place["position"] == 0:
            begin = self._generate if self.expectation is None else self._count_groups
            signals = begin(place["batches"], place["positions"])
            output |= {} if signals is None else {"signals": signals}
        generation, position = self.generation, place["position"]
        if generation is None or not position - 1 <= generation.position <= position:
            raise InputError(
                "the rollouts of the running generation are missing: resume from a checkpoint of this run, or from one "
                "of an epoch's end"
            )
        generation.position = position
        accumulate = self.trainer.accumulate_grad_batches
        shares = generation.totals[position // accumulate] / (accumulate * self.trainer.world_size)
        if self.expectation is not None:
            return self._expected_step(self.expectation, batch, shares[2])
        rollouts = generation.at(position)
        update = self.objective.update(self.policy, rollouts, shares, self.temperature)
        self.cost.add("training", forward=update.tokens, backward=update.tokens)
        values = {
            "entropy": update.entropy,
            "clip_ratio/low_mean": update.clip_low,
            "clip_ratio/high_mean": update.clip_high,
            "train/loss": update.loss.detach(),
            **{name: v for name, v in (("kl", update.kl), ("item_loss", update.item_loss)) if v is not None},
        }
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=len(rollouts))
        first_time = position < len(generation.batches)
        return {**output, "loss": update.loss, "trained": rollouts.batch["sample_id"][: None if first_time else 0]}

    def _expected_step(self, expectation: Expectation, batch: Mapping[str, Any], groups: Tensor) -> dict[str, Any]:
        own = without_repeats(batch)
        update = expectation.update(self.policy, self._reference_distribution, own, groups, self.temperature)
        self.cost.add("training", forward=update.tokens, backward=update.tokens)
        ids = own["sample_id"]
        if not len(ids):
            return {"loss": update.loss, "trained": ids}
        self.log_dict(update.figures, on_step=True, on_epoch=False, batch_size=len(ids))
        reward = update.figures["reward"]
        self.log("train/reward", reward, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(ids))
        signals = SampleSignals(ids, solve_probability=update.solve_probability)
        return {"loss": update.loss, "trained": ids, "signals": signals}

    def _count_groups(self, batches: Sequence[Mapping[str, Any]], positions: int) -> None:
        """Finds what the losses of an optimizer step are averaged over, before the first of them."""
        accumulate = self.trainer.accumulate_grad_batches
        check_schedule(self.num_iterations, self.generation_schedule.steps, accumulate)
        if self.rollout_step == 0:
            check_hit_values(self.rewarder, batches[0])
        sizes = [len(without_repeats(batch)["sample_id"]) for batch in batches]
        totals = totals_of(
            [(size * self.policy.rollout_length(self.rollout_options), size, size) for size in sizes],
            positions,
            accumulate,
        )
        if self.trainer.world_size > 1:
            totals = self._sum_over_ranks(totals)
        self.generation = Generation([], positions, totals)
        self.rollout_step, self._generated_at = self.rollout_step + 1, batch_position(self.trainer)

    def _generate(self, batches: Sequence[Mapping[str, Tensor]], positions: int) -> SampleSignals | None:
        accumulate = self.trainer.accumulate_grad_batches
        check_schedule(self.num_iterations, self.generation_schedule.steps, accumulate)
        several = self.trainer.world_size > 1
        self.cost.add("training", forward=self.policy.refresh_items(self.trainer.global_step))
        ranks = (self.global_rank, self.trainer.world_size) if several and self.negatives_across_ranks else None
        words = (self.rollout_seed, self.rollout_step)
        batches = [self._with_sizes(batch) for batch in batches]
        batches = self.policy.with_negatives(batches, words, ranks, self._sum_over_ranks)
        collector = RolloutCollector(
            roll_out=self.sampler.roll_out,
            objective=self.objective,
            reference=self._reference_logps if self.objective.beta > 0 else None,
            oversample=self.oversample,
            reduce=self._sum_over_ranks if several else None,
        )
        self.generation, drawn = collector.collect(batches, positions, accumulate, self._generator())
        self.rollout_step, self._generated_at = self.rollout_step + 1, batch_position(self.trainer)
        values, size = figures_of(drawn), sum(map(len, drawn))
        if self.oversample is not None:
            values["dynamic_sampling/drawn"] = torch.tensor(size, dtype=torch.float32)
            values["dynamic_sampling/trained"] = torch.tensor(
                sum(map(len, self.generation.batches)), dtype=torch.float32
            )
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=size)
        self.log("train/reward", values["reward"], on_step=False, on_epoch=True, prog_bar=True, batch_size=size)
        return signals_of(drawn, with_rewards=not self.distinct_rollouts and self.rollouts == "sample")

    def _with_sizes(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A batch with the sizes of its groups, if these are unequal."""
        if self.adaptive_generations is None:
            return batch
        sizes, groups = torch.full_like(batch["sample_id"], self.num_generations), session_of(self.trainer).groups
        if groups is not None:
            asked = groups.of(batch["sample_id"]).to(sizes.device)
            sizes = asked.where(asked > 0, sizes)
        return {**batch, GROUP_SIZE: sizes}

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        total = self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes the step and, when it is time, moves the reference after the policy."""
        super().optimizer_step(*args, **kwargs)
        if self.sync_ref_model and (self.trainer.global_step + 1) % self.ref_model_sync_steps == 0:
            assert self.reference is not None
            mix_into(self.reference, self.policy, self.ref_model_mixup_alpha)

    def sample_signals(
        self, batch: Mapping[str, Tensor], gradient: GradientKind = "first", gradient_space: GradientSpace = "answer"
    ) -> SampleSignals:
        """Everything selection wants to know of a batch, from one forward pass in evaluation mode.

        What follows is for a GenerativePolicy; see `RetrievalPolicy.signals` for the other.

        Args:
            batch: prompts with `history`, `seen`, `target` and `sample_id`.
            gradient: `first` for u = -dp of the exact solve probability p; `hvp` for the published Hessian-vector
                product; `trajectory` for `first` and, once training has moved, the alignment with the way the
                parameters have gone since it was first asked for; see `minirec_pl.probes.target_signals`.
            gradient_space: `answer` takes them at the hidden states that produce the target, on the head alone; `lora`
                by the trainable parameters, with a forward and a backward pass of each sample, projected to 512 values.

        Returns:
            rewards [B, scoring_generations] (None with 0), gradient [B, D], embedding [B, D] (last hidden state of the
            prompt), solve_probability [B] (before top_k and top_p), alignment [B] or None. A row depends on its own
            sample alone, not on the rest of the batch or the rank.

        Raises:
            InputError: if `hvp` is asked for in the space `lora`, or nothing that could be followed is trained.
        """
        training = self._trainer is not None and self.trainer.state.fn == "fit"
        forward = self.policy.refresh_items(self.trainer.global_step if training else None)
        self.cost.add("scoring", forward=forward)
        return self.sampler.signals(batch, (self.rollout_seed, self.rollout_step), gradient, gradient_space)


def without_repeats(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The samples of a batch but for one that is there to make the ranks equal."""
    repeated = batch.get(REPEATED)
    rows = torch.arange(len(batch["sample_id"]), device=batch["sample_id"].device)
    return take_rows(batch, rows if repeated is None else rows[~repeated])
