"""The two training stages as ordinary LightningModules: supervised warm start, then GRPO."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from minirec_pl.errors import InputError
from minirec_pl.grpo import LossType, PolicyLoss, ScaleRewards, group_advantages, policy_loss
from minirec_pl.policy import GenerativePolicy
from minirec_pl.policy.rollout import evaluation_mode
from minirec_pl.probes import GradientKind, head_signal
from minirec_pl.recommender import EVALUATION_K, RecModule
from minirec_pl.rewards import RewardFunction, combine_rewards, hit
from minirec_pl.selection.signals import SampleSignals


class WarmStartModule(RecModule):
    """Supervised next-item training, every position of a sequence at once: the proxy policy that GRPO starts from.

    Takes the batches of `RecDataModule(train_on="warm")`. Logs `train/loss`, the mean negative log-likelihood in nats.
    """

    training_phase = "warm_start"

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the next item at every position that has one."""
        loss = self.policy.sequence_nll(batch)
        tokens = int((batch["sequence"] >= 0).sum()) * self.policy.id_length + len(batch["sequence"])
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
        loss_type: how token losses are averaged, see `minirec_pl.grpo.policy_loss`.
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
        if temperature <= 0:
            raise InputError(f"temperature is {temperature}: it divides the logits, so it must be above 0")
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
        self.reference: GenerativePolicy | None = None

    def configure_model(self) -> None:
        """Binds the policy and, with `beta` above 0, keeps a frozen copy of it as the reference."""
        super().configure_model()
        if self.beta > 0 and self.reference is None:
            self.reference = copy.deepcopy(self.policy).requires_grad_(False).eval()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the cost and the seed of the rollouts."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rollout_seed"] = self.rollout_seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the cost and the seed of the rollouts."""
        super().on_load_checkpoint(checkpoint)
        self.rollout_seed = checkpoint.get("rollout_seed", self.rollout_seed)

    def _generator(self, purpose: int, step: int) -> torch.Generator:
        """Random numbers that depend on (seed, purpose, step, rank) alone."""
        words = np.random.SeedSequence([self.rollout_seed, purpose, step, self.global_rank]).generate_state(
            1, np.uint64
        )
        return torch.Generator(device=self.device).manual_seed(int(words[0]) & (2**63 - 1))

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
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        rollouts = self.policy.generate(
            batch,
            self.num_generations,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            generator=self._generator(0, step),
        )
        rewards, by_name = self._reward(batch, rollouts.items)
        advantages = group_advantages(rewards, scale_rewards=self.scale_rewards)
        with_target = torch.cat([rollouts.items, batch["target"][:, None]], dim=1)
        logps, mask, entropy = self.policy.completion_logps(batch, with_target, self.temperature)
        solve_probability = logps[:, -1].detach().sum(dim=-1).exp()
        logps, mask, entropy = logps[:, :-1], mask[:, :-1], entropy[:, :-1]
        reference_logps = None
        if self.reference is not None:
            with torch.no_grad():
                reference_logps, _, _ = self.reference.completion_logps(batch, rollouts.items, self.temperature)
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
        self._book_rollouts(batch, mask)
        self._log_training(rewards, by_name, entropy, mask, objective)
        signals = SampleSignals(batch["sample_id"], rewards=rewards, solve_probability=solve_probability)
        return {"loss": objective.loss, "signals": signals}

    def _book_rollouts(self, batch: Mapping[str, Tensor], mask: Tensor) -> None:
        prompts, fed = self.policy.prompt_tokens(batch), int(mask[:, :, 1:].sum())
        passes = 2 if self.reference is None else 3
        self.cost.add(
            "training", forward=passes * (prompts + fed), backward=prompts + fed, rollouts=mask.shape[0] * mask.shape[1]
        )

    def _log_training(
        self, rewards: Tensor, by_name: Mapping[str, Tensor], entropy: Tensor, mask: Tensor, objective: PolicyLoss
    ) -> None:
        std = rewards.std(dim=1)
        values = {
            "reward": rewards.mean(),
            "reward_std": std.mean(),
            "frac_reward_zero_std": (std == 0).float().mean(),
            "entropy": entropy.detach().sum() / mask.sum(),
            "clip_ratio/low_mean": objective.clip_low,
            "clip_ratio/high_mean": objective.clip_high,
            "completions/mean_length": mask.sum(dim=-1).float().mean(),
            **{f"rewards/{name}/mean": values.nanmean() for name, values in by_name.items()},
        }
        if objective.kl is not None:
            values["kl"] = objective.kl
        size = len(rewards)
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=size)
        self.log("train/loss", objective.loss.detach(), on_step=True, on_epoch=False, batch_size=size)
        self.log("train/reward", values["reward"], on_step=False, on_epoch=True, prog_bar=True, batch_size=size)

    def sample_signals(self, batch: Mapping[str, Tensor], gradient: GradientKind = "first") -> SampleSignals:
        """Everything selection wants to know of a batch, from one forward pass in evaluation mode.

        Args:
            batch: prompts with `history`, `seen`, `target` and `sample_id`.
            gradient: `first` for u = -dp/dh of the exact solve probability p at the hidden states that produce the
                target; `hvp` for the published Hessian-vector product, see `minirec_pl.probes.head_signal`.

        Returns:
            rewards [B, scoring_generations] (None with 0), gradient [B, D], embedding [B, D] (last hidden state of the
            prompt), solve_probability [B].
        """
        target = batch["target"][:, None]
        with evaluation_mode(self.policy):
            states = self.policy.completion_states(batch, target)

        def target_logp(leaves: Sequence[Tensor]) -> Tensor:
            logps, _, _ = self.policy.head_logps(type(states)(*leaves), target, batch["seen"], self.temperature)
            return logps.sum(dim=(1, 2))

        signal, logp = head_signal(target_logp, states, gradient)
        rewards, group = None, self.scoring_generations
        if group > 0:
            items = self._scoring_rollouts(batch, states.prompt, group)
            rewards, _ = self._reward(batch, items)
        tokens = self.policy.prompt_tokens(batch) + len(target) * states.rest.shape[2]
        self.cost.add("scoring", forward=tokens, rollouts=group * len(target))
        return SampleSignals(
            batch["sample_id"],
            rewards=rewards,
            gradient=signal,
            embedding=states.prompt.detach(),
            solve_probability=logp.exp(),
        )

    def _scoring_rollouts(self, batch: Mapping[str, Tensor], prompt: Tensor, group: int) -> Tensor:
        generator = self._generator(1, int(batch["sample_id"][0]) + (self.global_step << 32))
        if self.policy.id_length == 1 and self.top_k is None and self.top_p is None:
            with torch.no_grad():
                root = self.policy.root_logps(prompt, batch["seen"], self.temperature)
            return self.policy.sample_from(root, group, generator)
        self.cost.add(
            "scoring", forward=self.policy.prompt_tokens(batch) + len(prompt) * group * (self.policy.id_length - 1)
        )
        options: dict[str, Any] = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return self.policy.generate(batch, group, generator=generator, **options).items
