"""The two training stages as ordinary LightningModules: supervised warm start, then GRPO."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from minirec_pl.errors import InputError
from minirec_pl.gradients import GradientKind, GradientSpace
from minirec_pl.grpo import LossType, PolicyLoss, ScaleRewards, group_advantages, policy_loss
from minirec_pl.policy import GenerativePolicy
from minirec_pl.policy.rollout import evaluation_mode
from minirec_pl.probes import target_signals
from minirec_pl.recommender import EVALUATION_K, RecModule
from minirec_pl.rewards import RewardFunction, combine_rewards, hit
from minirec_pl.selection.signals import SampleSignals
from minirec_pl.trajectory import Trajectory


class WarmStartModule(RecModule):
    """Supervised next-item training, every position of a sequence at once: the proxy policy that GRPO starts from.

    Takes the batches of `RecDataModule(train_on="warm")`. Logs `train/loss`, the mean negative log-likelihood in nats.

    Args:
        policy: the recommender to train.
        dropout: probability of dropping a value of the input embeddings and of the last hidden states, in training
            only; for ids of one token.
        optimizer: see `RecModule`.
        lr_scheduler: see `RecModule`.
        predict_k: see `RecModule`.

    Raises:
        InputError: if `dropout` is outside [0, 1).
    """

    training_phase = "warm_start"

    def __init__(
        self,
        policy: GenerativePolicy,
        dropout: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        predict_k: int = EVALUATION_K,
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler, predict_k)
        if not 0.0 <= dropout < 1.0:
            raise InputError(f"dropout is {dropout}: it is a probability, from 0 to below 1")
        self.dropout = dropout

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the next item at every position that has one."""
        if "sequence" not in batch:
            raise InputError("WarmStartModule trains on sequences: set data.train_on to `warm`")
        loss = self.policy.sequence_nll(batch, self.dropout)
        tokens = self.policy.sequence_tokens(batch)
        self.cost.add(self.training_phase, forward=tokens, backward=tokens)
        self.log("train/loss", loss, on_step=True, on_epoch=False, batch_size=len(batch["target"]))
        return loss


class GRPORecModule(RecModule):
    """Group Relative Policy Optimization of a generative recommender (arXiv 2402.03300), option names as in TRL.

    Each step samples `num_generations` items per prompt, rewards them, and takes one step on the clipped objective with
    group-relative advantages. A step updates once per rollout batch, so the ratio is 1 when the gradient is taken.

    Args:
        policy: the recommender, usually a warm start.
        rewards: reward functions, TRL's contract (see `minirec_pl.rewards`); in YAML by dotted path.
        reward_weights: one weight per reward; None weighs each with 1.
        num_generations: G, rollouts per prompt, at least 2.
        temperature: divides the logits in sampling and in every other pass.
        top_k: sample among the k most likely tokens; None for all.
        top_p: sample among the smallest set of tokens with this mass; None for all.
        epsilon: lower clip width of the probability ratio.
        epsilon_high: upper clip width; None takes `epsilon`.
        beta: weight of the KL term against the policy at the start; 0 keeps no reference copy.
        loss_type: how token losses are averaged, see `minirec_pl.grpo.policy_loss`; `dapo` over the tokens of the
            batch, which is exact under accumulation where all ids have one length.
        scale_rewards: what divides the centred rewards, see `minirec_pl.grpo.group_advantages`.
        scoring_generations: rollouts per sample when samples are scored. The exact solve probability comes with the
            same forward pass and needs none, so 0 is allowed; at least 2 otherwise.
        optimizer: see `RecModule`.
        lr_scheduler: see `RecModule`.
        predict_k: see `RecModule`.

    Raises:
        InputError: if an option is out of range.
    """

    training_phase = "training"

    def __init__(
        self,
        policy: GenerativePolicy,
        rewards: Sequence[RewardFunction] = (hit,),
        reward_weights: list[float] | None = None,
        num_generations: int = 8,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        beta: float = 0.0,
        loss_type: LossType = "dapo",
        scale_rewards: ScaleRewards = "group",
        scoring_generations: int = 4,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        predict_k: int = EVALUATION_K,
    ) -> None:
        super().__init__(policy, optimizer, lr_scheduler, predict_k)
        if num_generations < 2:
            raise InputError(
                f"num_generations is {num_generations}: GRPO compares the rollouts of one prompt, so it "
                "must be at least 2"
            )
        if scoring_generations == 1 or scoring_generations < 0:
            raise InputError(
                f"scoring_generations is {scoring_generations}: give 0 (exact probabilities only) or at least 2"
            )
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature is {temperature}: it divides the logits, so it must be above 0")
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k is {top_k}: give at least 1, or null for all tokens")
        if top_p is not None and not 0 < top_p <= 1:
            raise InputError(f"top_p is {top_p}: it is a probability above 0 and at most 1, or null for all tokens")
        if reward_weights is not None and len(reward_weights) != len(rewards):
            raise InputError(
                f"reward_weights has {len(reward_weights)} numbers for {len(rewards)} rewards: give one each"
            )
        one = torch.ones(1, 2, 1)
        group_advantages(one[..., 0], scale_rewards=scale_rewards)
        options: dict[str, Any] = {
            "epsilon": epsilon,
            "epsilon_high": epsilon_high,
            "beta": beta,
            "loss_type": loss_type,
        }
        policy_loss(one, one, one[..., 0], one.bool(), ref_logps=one, max_completion_length=1, **options)
        self.rewards = list(rewards)
        self.reward_weights = reward_weights
        self.num_generations = num_generations
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.epsilon = epsilon
        self.epsilon_high = epsilon_high
        self.beta = beta
        self.loss_type: LossType = loss_type
        self.scale_rewards: ScaleRewards = scale_rewards
        self.scoring_generations = scoring_generations
        self.rollout_seed = torch.initial_seed()
        self.rollout_step = 0
        self.reference: GenerativePolicy | None = None
        self.trajectory = Trajectory()

    def configure_model(self) -> None:
        """Binds the policy and, with `beta` above 0, keeps a frozen copy of it as the reference."""
        super().configure_model()
        if self.beta > 0 and self.reference is None:
            self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the cost, the seed of the rollouts and, if it is followed, where the trajectory started."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rollout_seed"], checkpoint["rollout_step"] = self.rollout_seed, self.rollout_step
        if self.trajectory.start:
            checkpoint["trajectory_start"] = dict(self.trajectory.start)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what `on_save_checkpoint` kept."""
        super().on_load_checkpoint(checkpoint)
        self.rollout_seed = checkpoint.get("rollout_seed", self.rollout_seed)
        self.rollout_step = checkpoint.get("rollout_step", self.rollout_step)
        self.trajectory.start = dict(checkpoint.get("trajectory_start", self.trajectory.start))

    @property
    def _sampling(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    def _generator(self) -> torch.Generator:
        """Random numbers of a training batch, which depend on (seed, rank, rollout batches so far) alone."""
        words = np.random.SeedSequence([self.rollout_seed, self.global_rank, self.rollout_step]).generate_state(
            1, np.uint64
        )
        return torch.Generator(device=self.device).manual_seed(int(words[0]) & (2**63 - 1))

    def _scoring_numbers(self, sample_ids: Tensor) -> Tensor:
        """Uniform numbers [B, G, L] that depend on (seed, rollout batches so far, sample_id) alone."""
        size = (self.scoring_generations, self.policy.id_length)
        words = (self.rollout_seed, self.rollout_step)
        rows = [np.random.default_rng([*words, sample_id]).random(size) for sample_id in sample_ids.tolist()]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def _reward(self, batch: Mapping[str, Tensor], items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        group = items.shape[1]
        columns = {
            "prompts": lambda: self._prompt_texts(batch, group),
            "target": lambda: self.item_ids[batch["target"].cpu().numpy().repeat(group)].tolist(),
            "sample_id": lambda: batch["sample_id"].cpu().numpy().repeat(group).tolist(),
        }
        completions = self.item_ids[items.flatten().cpu().numpy()].tolist()
        total, by_name = combine_rewards(self.rewards, self.reward_weights, completions, columns)
        return total.view_as(items).to(items.device), by_name

    def _prompt_texts(self, batch: Mapping[str, Tensor], group: int) -> list[str]:
        rows = [" ".join(self.item_ids[row[row >= 0].numpy()]) for row in batch["history"].cpu()]
        return [text for text in rows for _ in range(group)]

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """One GRPO step.

        Returns:
            `loss`, and `signals`: the rewards [B, G] and solve probabilities [B] met on the way, for callbacks.
        """
        if "history" not in batch:
            raise InputError("GRPORecModule trains on single samples: set data.train_on to `pool`")
        with evaluation_mode(self.policy):
            prompt, target = self.policy.run_prompt(batch), batch["target"][:, None]
            size = (len(target), self.num_generations, self.policy.id_length)
            uniform = torch.rand(size, dtype=torch.float64, generator=self._generator(), device=self.device)
            items = self.policy.sample(prompt, batch["seen"], uniform, **self._sampling).items
            states = self.policy.completion_states(prompt, target)
            solved, _, _ = self.policy.head_logps(states, target, batch["seen"], self.temperature)
        self.rollout_step += 1
        rewards, by_name = self._reward(batch, items)
        advantages = group_advantages(rewards, scale_rewards=self.scale_rewards)
        logps, mask, entropy = self.policy.completion_logps(batch, items, self.temperature)
        reference_logps = None
        if self.reference is not None:
            with torch.no_grad():
                reference_logps, _, _ = self.reference.completion_logps(batch, items, self.temperature)
        objective = policy_loss(
            logps,
            logps.detach(),
            advantages,
            mask,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            beta=self.beta,
            ref_logps=reference_logps,
            loss_type=self.loss_type,
            max_completion_length=self.policy.id_length,
        )
        self._book_rollouts(batch, items)
        self._log_training(rewards, by_name, entropy, mask, objective)
        signals = SampleSignals(batch["sample_id"], rewards=rewards, solve_probability=solved.sum(dim=(1, 2)).exp())
        return {"loss": objective.loss, "signals": signals}

    def _book_rollouts(self, batch: Mapping[str, Tensor], items: Tensor) -> None:
        trained = self.policy.prompt_tokens(batch) + self.policy.fed_tokens(items)
        passes = 2 if self.reference is None else 3
        forward = passes * trained + self.policy.fed_tokens(batch["target"])
        self.cost.add("training", forward=forward, backward=trained, rollouts=items.numel())

    def _log_training(
        self, rewards: Tensor, by_name: Mapping[str, Tensor], entropy: Tensor, mask: Tensor, objective: PolicyLoss
    ) -> None:
        values = {
            "reward": rewards.mean(),
            "reward_std": rewards.std(dim=1).mean(),
            "frac_reward_zero_std": (rewards == rewards[:, :1]).all(dim=1).float().mean(),
            "entropy": entropy.sum() / mask.sum(),
            "clip_ratio/low_mean": objective.clip_low,
            "clip_ratio/high_mean": objective.clip_high,
            "completions/mean_length": mask.sum(dim=-1).float().mean(),
            **{f"rewards/{name}/mean": given.nanmean() for name, given in by_name.items()},
        }
        if objective.kl is not None:
            values["kl"] = objective.kl
        size = len(rewards)
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=size)
        self.log("train/loss", objective.loss.detach(), on_step=True, on_epoch=False, batch_size=size)
        self.log("train/reward", values["reward"], on_step=False, on_epoch=True, prog_bar=True, batch_size=size)

    def sample_signals(
        self, batch: Mapping[str, Tensor], gradient: GradientKind = "first", gradient_space: GradientSpace = "answer"
    ) -> SampleSignals:
        """Everything selection wants to know of a batch, from one forward pass in evaluation mode.

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
        target = batch["target"][:, None]
        rewards, group = None, self.scoring_generations
        forward = self.policy.prompt_tokens(batch) + self.policy.fed_tokens(target)
        with evaluation_mode(self.policy):
            prompt = self.policy.run_prompt(batch)
            states = self.policy.completion_states(prompt, target)
            if group > 0:
                numbers = self._scoring_numbers(batch["sample_id"])
                items = self.policy.sample(prompt, batch["seen"], numbers, **self._sampling).items
                rewards, _ = self._reward(batch, items)
                forward += self.policy.fed_tokens(items)
        measured = target_signals(
            self.policy, states, batch, self.temperature, gradient, gradient_space, self.trajectory
        )
        forward += measured.tokens
        self.cost.add("scoring", forward=forward, backward=measured.tokens, rollouts=group * len(target))
        return SampleSignals(
            batch["sample_id"],
            rewards=rewards,
            gradient=measured.gradient,
            embedding=states.prompt.detach(),
            solve_probability=measured.logp.exp(),
            alignment=measured.alignment,
        )
