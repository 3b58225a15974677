"""What a recommender must do to be trained, scored, evaluated and saved: the interface of policies."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from minirec_pl.data.samples import Catalogue
from minirec_pl.policy.language_models.exact_buffers import ExactBuffers
from minirec_pl.rewards.calls import RewardFunction
from minirec_pl.rewards.functions import hit
from minirec_pl.selection.probes.gradients import GradientKind, GradientSpace
from minirec_pl.selection.probes.trajectory import Trajectory
from minirec_pl.utils.errors import InputError, check_whole
from minirec_pl.utils.identity import Identity

Batch = Mapping[str, Tensor]
RolloutKind = Literal["sample", "beam", "expected", "supervised"]
ROLLOUTS: tuple[RolloutKind, ...] = ("sample", "beam", "expected", "supervised")
WITHOUT_ROLLOUTS = ("expected", "supervised")
ITEM_OPTIONS = frozenset({"rollouts", "distinct_rollouts", "wasted_groups"})
TEXT_OPTIONS = frozenset(
    {"max_completion_length", "mask_truncated_completions", "relabel_topk", "negatives_across_ranks"}
)


@dataclass(frozen=True)
class RolloutOptions:
    """How groups of rollouts are drawn; each is an option of `GRPORecModule` and explained there.

    Raises:
        InputError: if one is out of range.
    """

    num_generations: int = 8
    scoring_generations: int = 4
    rollouts: RolloutKind = "sample"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_completion_length: int | None = None
    mask_truncated_completions: bool = False
    distinct_rollouts: bool = False
    relabel_topk: int = 1
    negatives_across_ranks: bool = False
    preference_pairs: bool = False

    def __post_init__(self) -> None:
        check_whole(
            num_generations=self.num_generations,
            scoring_generations=self.scoring_generations,
            top_k=self.top_k,
            max_completion_length=self.max_completion_length,
            relabel_topk=self.relabel_topk,
        )
        if self.num_generations < 2:
            raise InputError(
                f"num_generations is {self.num_generations}: GRPO compares the rollouts of one prompt, so it must be "
                "at least 2"
            )
        if self.scoring_generations == 1 or self.scoring_generations < 0:
            raise InputError(
                f"scoring_generations is {self.scoring_generations}: give 0 (exact probabilities only) or at least 2"
            )
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}: it divides the logits, so it must be above 0")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}: give at least 1, or null for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(
                f"top_p is {self.top_p}: it is a probability above 0 and at most 1, or null for all tokens"
            )
        if self.rollouts not in ROLLOUTS:
            raise InputError(f"rollouts is {self.rollouts!r}: choose one of {', '.join(ROLLOUTS)}")
        if self.rollouts in WITHOUT_ROLLOUTS and (self.distinct_rollouts or self.narrowed):
            raise InputError(
                f"rollouts='{self.rollouts}' draws nothing: set distinct_rollouts to false, top_k "
                "and top_p to null, or rollouts to sample"
            )
        if self.distinct_rollouts and self.narrowed:
            raise InputError("distinct_rollouts draws from the whole distribution: set top_k and top_p to null")
        if self.rollouts == "beam" and (self.distinct_rollouts or self.narrowed):
            raise InputError(
                "rollouts='beam' takes the most likely items, all different: set distinct_rollouts to false, top_k and "
                "top_p to null"
            )

    @property
    def narrowed(self) -> bool:
        """Whether some tokens are never sampled."""
        return self.top_k is not None or (self.top_p or 1.0) < 1.0

    @property
    def given(self) -> set[str]:
        """Options for some policies only that are not at their default, by their names in `GRPORecModule`."""
        chosen = {
            "rollouts": self.rollouts != "sample",
            "distinct_rollouts": self.distinct_rollouts,
            "wasted_groups": self.preference_pairs,
            "max_completion_length": self.max_completion_length is not None,
            "mask_truncated_completions": self.mask_truncated_completions,
            "relabel_topk": self.relabel_topk != 1,
            "negatives_across_ranks": self.negatives_across_ranks,
        }
        return {name for name, there in chosen.items() if there}


def uniform_numbers(random: torch.Generator | Tensor, size: tuple[int, int, int]) -> Tensor:
    """The numbers of `Policy.roll_out`, float64 of a size."""
    if isinstance(random, Tensor):
        return random
    return torch.rand(size, dtype=torch.float64, generator=random, device=random.device)


class Ranking(NamedTuple):
    """What rankings of the whole catalogue say of their targets.

    Attributes:
        rank: int64, of the target among the unseen items, from 1, ties in the order of the catalogue; 0 where the
            user has seen it.
        probability: float32, softmax probability of the target over the unseen items; 0 where it was seen.
        best: int64, the item ranked first.
    """

    rank: Tensor
    probability: Tensor
    best: Tensor


@dataclass
class DrawnGroups:
    """G rollouts of each of B prompts, as a policy draws them.

    Attributes:
        items: int64 [B, G], item index; of a rollout that ranks items, the first.
        logps: float32 [B, G, L], log-probabilities with which the tokens were drawn; 0 where there is none.
        mask: bool [B, G, L], tokens that the loss counts.
        tokens: that went through the model.
        measure: from rows int64 [n] to log-probabilities and entropies float32 [n, G, L] under the policy, without
            gradient, and the tokens that this takes. G may be the largest of these groups, where they are of unequal
            size.
        target: gives log-probabilities float32 [B, L] of the target's tokens, and which exist, bool [B, L]; None
            where the target is not a completion.
        texts: int64 [B, G, L], tokens of the rollouts, padded with -1, where these are texts and not items.
        ranking: of a rollout that ranks the catalogue, fields [B, G].
        context: what `Policy.signals` takes over.
    """

    items: Tensor
    logps: Tensor
    mask: Tensor
    tokens: int
    measure: Callable[[Tensor], tuple[Tensor, Tensor, int]]
    target: Callable[[], tuple[Tensor, Tensor]] | None = None
    texts: Tensor | None = None
    ranking: Ranking | None = None
    context: Any = None

    def of_size(self, rows: Tensor, size: int) -> DrawnGroups:
        """The groups at these rows int64 [n], whose size this is, out of groups of unequal size.

        Their tokens are 0, since those of the whole were counted.
        """

        def measure(some: Tensor) -> tuple[Tensor, Tensor, int]:
            logps, entropy, tokens = self.measure(rows[some])
            return logps[:, :size], entropy[:, :size], tokens

        def target() -> tuple[Tensor, Tensor]:
            assert self.target is not None
            logps, exists = self.target()
            return logps[rows], exists[rows]

        return DrawnGroups(
            self.items[rows, :size],
            self.logps[rows, :size],
            self.mask[rows, :size],
            0,
            measure,
            None if self.target is None else target,
            None if self.texts is None else self.texts[rows, :size],
            None if self.ranking is None else Ranking(*(values[rows, :size] for values in self.ranking)),
        )


class CompletionPass(NamedTuple):
    """What an update needs of rollouts under the present policy, with gradient.

    Attributes:
        logps: float [B, G, L]; any value where masked.
        entropy: float [B, G, L] in nats, without gradient.
        tokens: run forward and backward.
        target_logps: float [B, L], of the target's tokens, where asked for.
        rank_target: of a policy that ranks the catalogue: from rollouts int64 [B, K] and the items int64 [n] that are
            each other's negatives to the log-probability of the target after each, float [B * K], and the tokens run.
    """

    logps: Tensor
    entropy: Tensor
    tokens: int
    target_logps: Tensor | None = None
    rank_target: Callable[[Tensor, Tensor], tuple[Tensor, int]] | None = None


class TargetPass(NamedTuple):
    """What an update without rollouts needs of the targets under the present policy, with gradient.

    Attributes:
        logp: float [B], log-probability in nats of the whole id of each target; the lowest finite value or less where
            it cannot be generated.
        length: tokens that an average over tokens divides by: those of the longest id.
        tokens: run forward and backward.
        distribution: float [B, V], log-probabilities of all that may be generated, where an id is one token; else None.
    """

    logp: Tensor
    length: int
    tokens: int
    distribution: Tensor | None = None


class SupervisedLoss(NamedTuple):
    """The loss of a warm start.

    Attributes:
        loss: mean negative log-likelihood in nats, a scalar with gradient.
        tokens: run forward and backward.
        forward: run forward only.
    """

    loss: Tensor
    tokens: int
    forward: int = 0


@dataclass(frozen=True)
class SignalOptions:
    """Which signals are asked for.

    Attributes:
        gradient: which gradient signal.
        space: where it is taken.
        temperature: divides the logits.
        seed: of what is drawn for it, with the sample_id.
        trajectory: remembers where training started.
    """

    gradient: GradientKind
    space: GradientSpace
    temperature: float
    seed: int
    trajectory: Trajectory


class PolicySignals(NamedTuple):
    """What a policy knows of samples beside their rewards, all detached.

    Attributes:
        gradient: float32 [B, D].
        embedding: float [B, E].
        solve_probability: float [B], exact, where the policy knows it.
        alignment: float32 [B] in [-1, 1], with the way that training has gone, where asked for.
        forward: tokens run forward.
        backward: tokens run backward.
    """

    gradient: Tensor
    embedding: Tensor
    solve_probability: Tensor | None
    alignment: Tensor | None
    forward: int
    backward: int


class Policy(ExactBuffers, ABC):
    """A recommender that GRPO can train: a torch module over the items of a catalogue.

    Batches have a row for each of B samples: `sample_id` and `target` int64 [B], `history` int64 [B, W], item index
    padded with -1 on the left, most recent last, `seen` int64 [B, S], padded with -1 anywhere, and what else the
    DataModule knows. A row of any result depends on its own sample alone.

    Attributes:
        catalogue: of the items; None until `bind`.
        training_cost: what training this policy has cost, see `save_pretrained`.
        made_for: facts of the data that it was last trained on, kept in its folder; empty before any training, None
            where the folder does not say.
        extra_options: options of `GRPORecModule` for some policies only that make sense for this one, out of
            `ITEM_OPTIONS` and `TEXT_OPTIONS`.
        ranks_catalogue: whether each rollout ranks the catalogue, so that the best of a group learn the item, too.
        draws_unequal_groups: whether `roll_out` draws groups of unequal size at once, see there; otherwise it is called
            once for each size.
        made_of: arguments that a new policy is made of; a folder that `save_pretrained` wrote, given as the argument
            `pretrained`, takes their place.
    """

    extra_options: ClassVar[frozenset[str]] = frozenset()
    ranks_catalogue: ClassVar[bool] = False
    draws_unequal_groups: ClassVar[bool] = False
    made_of: ClassVar[frozenset[str]] = frozenset()
    catalogue: Catalogue | None = None
    training_cost: Mapping[str, Any]
    made_for: Mapping[str, str] | None

    def __init__(self) -> None:
        super().__init__()
        self.training_cost = {}
        self.made_for = {}

    @property
    def identity(self) -> Identity:
        """What its weights are for, besides the items of the catalogue; of a policy of your own its class."""
        return Identity({"policy": type(self).__name__})

    @classmethod
    def unloaded(cls, options: Mapping[str, Any]) -> Policy:
        """A policy with these arguments that has loaded nothing, to check the options of a run before it starts."""
        return cls(**options)

    @abstractmethod
    def bind(self, catalogue: Catalogue) -> None:
        """Ties the policy to a catalogue: makes what depends on it, or checks that it is the one trained for."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path, training_cost: Mapping[str, Any] | None = None) -> None:
        """Writes the policy as one folder, replacing it whole or not at all.

        Args:
            folder: the folder to write; an older policy there is replaced.
            training_cost: what training this policy cost, kept with it so that later runs can state the sum.
        """

    @abstractmethod
    def item_logps(self, batch: Batch) -> Tensor:
        """Log-probability of every item, float32 [B, n_items], in evaluation mode; the lowest value for seen ones."""

    def reasoned_item_logps(self, batch: Batch) -> tuple[Tensor, list[str]]:
        """`item_logps`, and the text that each recommendation rests on.

        Raises:
            InputError: if the policy writes no text.
        """
        raise InputError(
            f"{type(self).__name__} recommends without a text: leave out --reasoning, or take a RetrievalPolicy"
        )

    @abstractmethod
    def warm_start_loss(self, batch: Batch, dropout: float, step: int) -> SupervisedLoss:
        """The loss of supervised training on a batch of `RecDataModule`, single samples or sequences.

        Args:
            batch: with `history` and `target` of single samples; or, of `RecDataModule(train_on="warm")`, `sequence`
                int64 [B, T], item index padded with -1 on the right, and pairs `row`, `position`, `target` int64 [P]:
                what follows `sequence[row, position]` is `target`.
            dropout: probability of dropping a value, see `WarmStartModule`.
            step: optimizer steps so far.
        """

    def default_rewards(self) -> list[RewardFunction]:
        """The rewards of GRPO where none are given."""
        return [hit]

    def check_options(self, options: RolloutOptions, rewards: Sequence[RewardFunction]) -> None:
        """Refuses options of `GRPORecModule` that make no sense for this policy.

        Raises:
            InputError: naming the option.
        """
        if options.rollouts in WITHOUT_ROLLOUTS and type(self).target_pass is Policy.target_pass:
            raise InputError(
                f"rollouts='{options.rollouts}' needs the exact probability of the target, and a {type(self).__name__} "
                "does not give it: set rollouts to sample, or take a GenerativePolicy"
            )
        for name in sorted(options.given - self.extra_options):
            others = "generate an item" if name in ITEM_OPTIONS else "reason in text"
            raise InputError(
                f"{name} is for policies that {others}, and a {type(self).__name__} does not: leave it out"
            )

    @abstractmethod
    def rollout_length(self, options: RolloutOptions) -> int:
        """L, tokens of a rollout at most."""

    @abstractmethod
    def roll_out(self, batch: Batch, options: RolloutOptions, random: torch.Generator | Tensor) -> DrawnGroups:
        """Draws groups of rollouts in evaluation mode, without gradient.

        Args:
            batch: the prompts. With `draws_unequal_groups` it may have a column `group_size` int64 [B]: how many of the
                G rollouts a sample gets. The others are not drawn and have no token; their item is any.
            options: how they are drawn.
            random: numbers float64 [B, G, L] in [0, 1), one for each token, so that a row depends on its own numbers
                alone; or what draws them.
        """

    def words(self, texts: Tensor) -> list[str]:
        """`DrawnGroups.texts` in words, flat.

        Raises:
            InputError: if the policy writes no text.
        """
        raise InputError(f"{type(self).__name__} draws texts but has no `words(texts)`: define it")

    @abstractmethod
    def completion_pass(
        self, batch: Batch, items: Tensor, texts: Tensor | None, temperature: float, *, with_target: bool = False
    ) -> CompletionPass:
        """Rollouts under the present policy, in the mode that it is in.

        Args:
            batch: the prompts.
            items: int64 [B, G], see `DrawnGroups`, as is `texts`.
            texts: int64 [B, G, L] or None.
            temperature: divides the logits.
            with_target: whether the log-probabilities of the target are asked for.
        """

    def target_pass(self, batch: Batch, temperature: float) -> TargetPass:
        """The targets under the present policy, in the mode that it is in, for training without rollouts.

        Args:
            batch: the prompts.
            temperature: divides the logits.

        Raises:
            InputError: if the policy does not know the exact probability of a target.
        """
        raise InputError(f"{type(self).__name__} has no `target_pass(batch, temperature)`: set rollouts to sample")

    @property
    def equal_lengths(self) -> bool:
        """Whether the ids of all items have as many tokens, see `GRPORecModule`."""
        return True

    @abstractmethod
    def signals(
        self, batch: Batch, drawn: DrawnGroups | None, advantages: Tensor | None, options: SignalOptions
    ) -> PolicySignals:
        """What selection wants to know of samples, see `GRPORecModule.sample_signals`.

        Args:
            batch: the prompts.
            drawn: their rollouts; None where none are asked for.
            advantages: float32 [B, G] of the rollouts.
            options: which signals.
        """

    def refresh_items(self, step: int | None = None) -> int:
        """Brings what is kept of the items up to date with the weights; a policy that keeps nothing has nothing to do.

        Args:
            step: optimizer steps so far, to go by a schedule; None for what belongs to the present weights.

        Returns:
            Tokens that went through the model.
        """
        return 0

    def with_negatives(
        self,
        batches: Sequence[Batch],
        words: Sequence[int],
        ranks: tuple[int, int] | None,
        reduce: Callable[[Tensor], Tensor],
    ) -> Sequence[Batch]:
        """The batches of a generation with the items that their targets are compared with, where the policy does.

        Args:
            batches: as large on every rank.
            words: seed of a draw, with the sample_id.
            ranks: the own rank and how many there are, if the others' targets of the same batch are negatives too.
            reduce: sums a tensor over the ranks.
        """
        return batches
