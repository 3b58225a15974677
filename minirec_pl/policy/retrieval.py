"""The policy that reasons in text, then recommends from the hidden state behind an answer marker."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from minirec_pl.data.loader import GROUP_SIZE
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy.catalogue_text import check_rows, encode_texts, rows_of
from minirec_pl.policy.folder import RetrieverText, check_parts, read_retriever, stored_vectors, write_retriever
from minirec_pl.policy.identity import model_facts, texts_identity, tokenizer_fact
from minirec_pl.policy.interface import (
    TEXT_OPTIONS,
    Batch,
    CompletionPass,
    DrawnGroups,
    Policy,
    PolicySignals,
    Ranking,
    RolloutOptions,
    SignalOptions,
    SupervisedLoss,
    uniform_numbers,
)
from minirec_pl.policy.item_index import ItemIndex, draw_negatives
from minirec_pl.policy.language_models.causal_lm import body_of, run_prompts, same_in_training
from minirec_pl.policy.language_models.generation import Sampling, eos_token_ids, generate
from minirec_pl.policy.language_models.model_config import text_setting
from minirec_pl.policy.language_models.model_support import check_support
from minirec_pl.policy.language_models.pretrained import LanguageModel
from minirec_pl.policy.language_models.sampling import Prompt
from minirec_pl.policy.prompt import EncodedPrompts, PromptTemplate, check_rules
from minirec_pl.policy.reasoning import Reasoning, ReasoningPass, kept_tokens, read_reasoning, unit
from minirec_pl.rewards.calls import RewardFunction, reward_name
from minirec_pl.rewards.functions import SoftmaxMixReward, hit, rank_penalty
from minirec_pl.selection.probes.gradients import head_gradient, head_hvp
from minirec_pl.utils.errors import InputError, check_whole
from minirec_pl.utils.identity import Identity
from minirec_pl.utils.modules import evaluation_mode

SIGNAL_NEGATIVES = 64  # items that a sample's signal compares the target with, where training compares with none


class RetrievalPolicy(Policy):
    """A language model that thinks about a user in words and then ranks the catalogue (R2ec, arXiv 2505.16994).

    A chat prompt with the history is answered by a reasoning, which ends with the model's end of sequence or at
    `max_completion_length`; then the answer marker is put. With h the last hidden state there and v_j that of item j's
    text, which the same model reads, followed by the same marker, the score of item j is cos(h, v_j) /
    `similarity_temperature`, and the policy's choice is the softmax over the items the user has not seen.

    Give either `language_model` or `pretrained`. Options that are None are those of `pretrained`, or the default.

    Args:
        language_model: which model, and what of it is trained.
        pretrained: a folder that `save_pretrained` wrote.
        prompt: the texts of the prompt; default `PromptTemplate()`.
        answer_marker: text put after the reasoning, and after an item's text; default `<answer>`.
        item_prompt: what the model reads of an item, with `{text}` for its text; default `{text}`.
        similarity_temperature: divides the cosines; default 0.02.
        max_completion_length: tokens of a reasoning at most; 0 recommends at once; default 256.
        longest_item: tokens that are kept of an item; default 128.
        cached_negatives: items from the cache that each sample's target is compared with in training, besides the
            other targets of the batch.
        reason_in_warm_start: learn the supervised stage after a sampled reasoning, as in evaluation; false learns it
            right after the prompt, which is cheaper.
        refresh_items_every_n_steps: optimizer steps after which rollouts get items encoded anew. Evaluation always
            takes vectors of the present weights.
        refresh_budget: tokens of such a refresh, stalest items first, among equals the shortest; None takes all.
        item_dtype: dtype of the cached item vectors.

    Raises:
        InputError: if both or neither of `language_model` and `pretrained` are given, the folder holds no such policy,
            or an option is out of range.
    """

    extra_options = TEXT_OPTIONS
    draws_unequal_groups = True
    ranks_catalogue = True
    made_of = frozenset({"language_model"})
    index: ItemIndex
    marker: Tensor

    def __init__(
        self,
        language_model: LanguageModel | None = None,
        pretrained: str | None = None,
        prompt: PromptTemplate | None = None,
        answer_marker: str | None = None,
        item_prompt: str | None = None,
        similarity_temperature: float | None = None,
        max_completion_length: int | None = None,
        longest_item: int | None = None,
        cached_negatives: int = 0,
        reason_in_warm_start: bool = True,
        refresh_items_every_n_steps: int = 100,
        refresh_budget: int | None = None,
        item_dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        self.folder = None if pretrained is None else Path(pretrained)
        self._made_of: Mapping[str, str] = {}
        self._tokenizer_fact = ""
        text = RetrieverText()
        if self.folder is not None and language_model is None:
            stored = read_retriever(self.folder)
            language_model, text, self.training_cost = stored.language_model, stored.text, stored.training_cost
            self.made_for, self._made_of = stored.made_for, stored.made_of
        elif self.folder is not None or language_model is None:
            raise InputError("RetrievalPolicy takes exactly one of `language_model` and `pretrained` (a folder)")
        self.text = text.updated(
            prompt=prompt,
            answer_marker=answer_marker,
            item_prompt=item_prompt,
            similarity_temperature=similarity_temperature,
            max_completion_length=max_completion_length,
            longest_item=longest_item,
        )
        if self.folder is not None and self.text != text:
            warnings.warn(f"the policy in '{self.folder}' goes on with {self.text.unlike(text)}", stacklevel=2)
        check_whole(
            cached_negatives=cached_negatives,
            refresh_items_every_n_steps=refresh_items_every_n_steps,
            refresh_budget=refresh_budget,
        )
        budget = 1 if refresh_budget is None else refresh_budget
        if cached_negatives < 0 or refresh_items_every_n_steps < 1 or budget < 1:
            raise InputError(
                f"cached_negatives is {cached_negatives}, refresh_items_every_n_steps {refresh_items_every_n_steps}, "
                f"refresh_budget {refresh_budget}: give at least 0, 1 and 1"
            )
        self.language_model = language_model
        self.cached_negatives = cached_negatives
        self.reason_in_warm_start = reason_in_warm_start
        self.refresh_items_every_n_steps = refresh_items_every_n_steps
        self.refresh_budget = refresh_budget
        self.item_dtype = getattr(torch, item_dtype)
        self.model: Any = None
        self.tokenizer: Any = None
        if self.folder is not None:
            self._load()

    @classmethod
    def unloaded(cls, options: Mapping[str, Any]) -> RetrievalPolicy:
        """See `Policy.unloaded`."""
        made = cls.__new__(cls)
        super(RetrievalPolicy, made).__init__()
        made.text = RetrieverText().updated(max_completion_length=options["max_completion_length"])
        return made

    def _load(self) -> None:
        self.model, self.tokenizer = self.language_model.load()
        try:
            check_parts(self.model, self.tokenizer, self._made_of)
        except InputError as error:
            raise InputError(f"the policy in '{self.folder}' cannot be read: {error}") from error
        check_support(self.model, cache=True)
        marker = self.tokenizer(self.text.answer_marker, add_special_tokens=False)["input_ids"]
        check_rows(max(marker), rows_of(self.model), self.tokenizer)
        self.register_buffer("marker", torch.tensor(marker), persistent=False)

    @property
    def max_completion_length(self) -> int:
        """Tokens of a reasoning at most."""
        return self.text.max_completion_length

    @property
    def similarity_temperature(self) -> float:
        """Divides the cosines."""
        return self.text.similarity_temperature

    @torch.inference_mode(False)
    def bind(self, catalogue: Catalogue) -> None:
        """Ties the policy to a catalogue, any, since items are known by their texts; loads a `language_model`.

        Raises:
            InputError: if the model cannot be had, or an item's text or the marker has a token without an embedding.
        """
        now = self.catalogue
        if now is not None and now.fingerprint == catalogue.fingerprint and now.texts == catalogue.texts:
            return
        if self.model is None:
            self._load()
        texts = [self.text.item_text(text) for text in catalogue.texts]
        ids = encode_texts(self.tokenizer, texts, add_special_tokens=True)
        tokens = [item[: self.text.longest_item] + self.marker.tolist() for item in ids]
        check_rows(max(map(max, tokens)), rows_of(self.model), self.tokenizer)
        width = self.model.get_input_embeddings().embedding_dim
        device = next(self.model.parameters()).device
        self.index = ItemIndex(tokens, width, self.item_dtype, self.tokenizer.pad_token_id).to(device)
        self.catalogue = catalogue
        vectors = None if self.folder is None else stored_vectors(self.folder, self.index)
        if vectors is not None:
            self.index.vectors.copy_(vectors)
            self.index.step.zero_()
            self.index.encoded_with.fill_(self._weights())

    def save_pretrained(self, folder: str | Path, training_cost: Mapping[str, Any] | None = None) -> None:
        """Writes adapters (or the whole model), tokenizer, options and item vectors, replacing the folder whole or not.

        The vectors are left out if they are not those of the present weights; they are then made again.

        Args:
            folder: the folder to write; an older policy there is replaced.
            training_cost: what training this policy cost, kept with it so that later runs can state the sum.

        Raises:
            InputError: if the policy has no catalogue yet, or the folder cannot be written or holds something else.
        """
        if self.catalogue is None:
            raise InputError("the policy has no catalogue yet: fit it, or call bind(catalogue), before saving")
        fresh = bool((self.index.encoded_with == self._weights()).all())
        write_retriever(
            Path(folder),
            model=self.model,
            tokenizer=self.tokenizer,
            language_model=self.language_model,
            text=self.text,
            index=self.index if fresh else None,
            training_cost=dict(training_cost or self.training_cost),
            made_for=self.made_for,
        )

    @property
    def identity(self) -> Identity:
        """See `Policy.identity`: what is put into words how, and what kind of model reads it."""
        own = [super().identity, Identity(self.text.facts())]
        if self.model is not None:
            self._tokenizer_fact = self._tokenizer_fact or tokenizer_fact(self.tokenizer)
            own.append(Identity({"tokenizer": self._tokenizer_fact, **model_facts(self.model)}))
        if self.catalogue is not None:
            own.append(texts_identity(self.catalogue))
        return Identity.of(own)

    def _weights(self) -> float:
        """A number that changes with the trained weights; NaN where they have diverged."""
        sums = [p.detach().sum(dtype=torch.float64) for p in self.model.parameters() if p.requires_grad]
        values = [(place + 1) * float(value) for place, value in enumerate(sums)]
        return math.fsum(values) if all(map(math.isfinite, values)) else math.nan

    def refresh_items(self, step: int | None = None) -> int:
        """Encodes the items that are due, see `ItemIndex.due`.

        Args:
            step: optimizer steps so far, to go by the schedule; None for vectors of the present weights.

        Returns:
            Tokens that went through the model.
        """
        weights = self._weights()
        due = self.index.due(weights, step, self.refresh_items_every_n_steps, self.refresh_budget)
        with evaluation_mode(self):
            return self.index.refresh(self.model, due, weights, step)

    def encode(self, batch: Batch, length: int | None = None) -> EncodedPrompts:
        """The prompts of a batch as tokens.

        Args:
            batch: `history` int64 [B, W] and what else `PromptTemplate.encode` knows.
            length: tokens of a reasoning that must fit after them; None for `max_completion_length`.

        Raises:
            InputError: if one is too long for the model, or has a token that the model has no embedding for.
        """
        assert self.catalogue is not None
        room = (self.max_completion_length if length is None else length) + len(self.marker)
        context = text_setting(self.model, "max_position_embeddings")
        longest = None if context is None else context - room
        rows = rows_of(self.model)
        encoded = self.text.prompt.encode(self.tokenizer, batch, self.catalogue, longest, rows=rows)
        check_rules(self.model, encoded, room, batch.get("sample_id"))
        return encoded

    @torch.no_grad()
    def reason(
        self,
        prompts: EncodedPrompts,
        num_generations: int = 1,
        *,
        length: int | None = None,
        sampling: Sampling | None = None,
        uniform: Tensor | None = None,
        ran: Prompt | None = None,
        sizes: Tensor | None = None,
    ) -> Reasoning:
        """Reasonings of each prompt, in evaluation mode.

        Args:
            prompts: from `encode`.
            num_generations: G.
            length: L, tokens at most; None for `max_completion_length`.
            sampling: how tokens are chosen; plain sampling if None.
            uniform: float64 [B, G, L] in [0, 1), one number for each token; torch's global generator if None.
            ran: what `run` made of the prompts.
            sizes: int64 [B], how many of the G reasonings each prompt gets; None for all. The others have no token.
        """
        length = self.max_completion_length if length is None else length
        size = (len(prompts.row), num_generations, length)
        texts = torch.full(size, -1, device=prompts.row.device)
        if length == 0:
            return Reasoning(texts, texts.float())
        ids, mask = (part.index_select(0, prompts.row) for part in (prompts.input_ids, prompts.mask))
        drawn: dict[str, Any] = {"sampling": sampling, "uniform": uniform, "prompt": ran, "sizes": sizes}
        made = generate(self.model, ids, mask, num_generations, length, **drawn)
        logps, longest = made.logps.new_zeros(size), made.ids.shape[-1]
        texts[..., :longest] = made.ids.masked_fill(~made.mask, -1)
        logps[..., :longest] = made.logps
        return Reasoning(texts, logps)

    def read(
        self,
        prompts: EncodedPrompts,
        texts: Tensor,
        temperature: float = 1.0,
        *,
        with_logps: bool = True,
        ran: Prompt | None = None,
    ) -> ReasoningPass:
        """One pass over prompts, texts int64 [B, G, L] and marker, with gradient; see `read_reasoning`."""
        return read_reasoning(self.model, prompts, texts, self.marker, temperature, with_logps=with_logps, ran=ran)

    def run(self, prompts: EncodedPrompts) -> Prompt:
        """The prompts run once, each different one, for `reason` and `read` in the same mode."""
        ran = run_prompts(body_of(self.model), prompts.input_ids, prompts.mask)
        return ran._replace(states=ran.states.index_select(0, prompts.row), row=prompts.row)

    def words(self, texts: Tensor) -> list[str]:
        """Texts int64 [..., L], padded with -1, in words, flat."""
        rows = [[token for token in row if token >= 0] for row in texts.flatten(0, -2).tolist()]
        decoded: list[str] = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return decoded

    def truncated(self, texts: Tensor) -> Tensor:
        """Which texts int64 [..., L] ended at the length and not with an end of sequence, bool [...]."""
        return kept_tokens(texts, eos_token_ids(self.model)) == texts.shape[-1]

    def rank(self, states: Tensor, target: Tensor, seen: Tensor) -> Ranking:
        """The targets int64 [B] among all unseen items, for the states [B, G, D] of each sample; fields are [B, G]."""
        group = states.shape[1]
        target, seen = (values.repeat_interleave(group, dim=0) for values in (target, seen))
        ranking = self.index.rank(states.flatten(0, 1), target, seen, self.similarity_temperature)
        return Ranking(*(values.view(-1, group) for values in ranking))

    def item_logps(self, batch: Batch) -> Tensor:
        """Log-probability of every item after greedy reasoning, float32 [B, n_items]; the lowest value for seen ones.

        Besides the result, at most 64 MiB of scores exist at a time.
        """
        return self.reasoned_item_logps(batch)[0]

    def reasoned_item_logps(self, batch: Batch) -> tuple[Tensor, list[str]]:
        """`item_logps`, and the reasoning of each sample in words."""
        self.refresh_items()
        with evaluation_mode(self):
            prompts = self.encode(batch)
            ran = self.run(prompts)
            texts = self.reason(prompts, sampling=Sampling("greedy"), ran=ran).texts
            states = self.read(prompts, texts, with_logps=False, ran=ran).states[:, 0]
            logps = self.index.log_softmax(states, batch["seen"], self.similarity_temperature)
            return logps, self.words(texts)

    def target_logps(
        self, states: Tensor, target: Tensor, batch_items: Tensor, negatives: Tensor, ran: Prompt | None = None
    ) -> Tensor:
        """Log-probability of targets among the items of a batch and cached negatives, float [R].

        Gradient goes through states and the batch's items, encoded here, not the cache. An item counts once.

        Args:
            states: float [R, D].
            target: int64 [R], each among the batch's items.
            batch_items: int64 [n], any of them may repeat.
            negatives: int64 [R, K], padded with -1.
            ran: from `run` with gradient, for its body.
        """
        items = torch.unique(batch_items)
        users = unit(states)
        vectors = self.index.encode(self.model, items, None if ran is None else ran.body).to(users.dtype)
        with torch.autocast(users.device.type, enabled=False):
            logits = users @ vectors.T
            if negatives.shape[1]:
                ordered = negatives.sort(dim=1).values
                again = nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
                closed = again | (ordered < 0) | torch.isin(ordered, items)
                others = self.index.vectors[ordered.clamp(min=0)].to(users.dtype)
                cosines = torch.bmm(others, users[..., None])[..., 0]
                logits = torch.cat([logits, cosines.masked_fill(closed, -torch.inf)], dim=1)
        logps = (logits / self.similarity_temperature).log_softmax(dim=1)
        return logps.gather(1, torch.searchsorted(items, target)[:, None])[:, 0]

    def batch_tokens(self, items: Tensor) -> int:
        """Tokens that `target_logps` feeds through the model for the batch's items int64 [n]."""
        return int(self.index.lengths[torch.unique(items).cpu()].sum())

    def warm_start_loss(self, batch: Batch, dropout: float, step: int) -> SupervisedLoss:
        """See `Policy.warm_start_loss`.

        Raises:
            InputError: for sequences.
        """
        if "history" not in batch:
            raise InputError(
                "a RetrievalPolicy learns from single samples: set data.train_on to one with a history each"
            )
        refreshed = self.refresh_items(step) if self.cached_negatives else 0
        return SupervisedLoss(*self.supervised_loss(batch), forward=refreshed)

    def supervised_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Contrastive loss of a warm start: mean of -log p of each target, see `target_logps`.

        Args:
            batch: single samples with `history`, `target` and `sample_id`.

        Returns:
            The loss in nats, and the tokens that went through the model, sampled ones included.
        """
        length = self.max_completion_length if self.reason_in_warm_start else 0
        prompts, target = self.encode(batch, length), batch["target"]
        ran = self.run(prompts) if same_in_training(self.model) else None  # with gradient, and sampled from
        texts = self.reason(prompts, length=length, ran=ran).texts
        passed = self.read(prompts, texts, with_logps=False, ran=ran)
        words = torch.randint(2**31, (1,)).tolist()
        assert self.catalogue is not None
        negatives = draw_negatives(len(self.catalogue), target, batch["sample_id"], words, self.cached_negatives)
        logps = self.target_logps(passed.states[:, 0], target, target, negatives, ran)
        sampled = passed.tokens - len(target) * len(self.marker) if length else 0
        shared = 0 if ran is None else int(prompts.mask.sum())
        return -logps.mean(), passed.tokens + sampled + shared + self.batch_tokens(target)

    def default_rewards(self) -> list[RewardFunction]:
        """See `Policy.default_rewards`."""
        return [SoftmaxMixReward()]

    def check_options(self, options: RolloutOptions, rewards: Sequence[RewardFunction]) -> None:
        """See `Policy.check_options`."""
        super().check_options(options, rewards)
        for reward in rewards:
            if reward in (hit, rank_penalty):
                raise InputError(
                    f"the reward {reward_name(reward)} compares completions with the target, and those of a "
                    "RetrievalPolicy are texts: take minirec_pl.rewards.SoftmaxMixReward or NDCGReward, which go by "
                    "the target's rank"
                )
        if options.scoring_generations == 0:
            raise InputError(
                "scoring_generations is 0: a RetrievalPolicy is scored by its rollouts, so give at least 2"
            )
        if not 1 <= options.relabel_topk <= options.num_generations:
            raise InputError(
                f"relabel_topk is {options.relabel_topk}: give 1 to num_generations ({options.num_generations}) "
                "rollouts"
            )
        if self.rollout_length(options) < 1:
            raise InputError(
                "max_completion_length is 0: rollouts without a text are all the same, so give at least 1 token to "
                "train on"
            )

    def rollout_length(self, options: RolloutOptions) -> int:
        """See `Policy.rollout_length`."""
        length = options.max_completion_length
        return self.max_completion_length if length is None else length

    def roll_out(self, batch: Batch, options: RolloutOptions, random: torch.Generator | Tensor) -> DrawnGroups:
        """See `Policy.roll_out`: reasonings, each with the ranking of the catalogue that follows from it."""
        length, sizes = self.rollout_length(options), batch.get(GROUP_SIZE)
        numbers = uniform_numbers(random, (len(batch["target"]), options.num_generations, length))
        sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
        with evaluation_mode(self):
            prompts = self.encode(batch, length)
            ran = self.run(prompts)
            drawn: dict[str, Any] = {
                "length": length,
                "sampling": sampling,
                "uniform": numbers,
                "ran": ran,
                "sizes": sizes,
            }
            texts, logps = self.reason(prompts, numbers.shape[1], **drawn)
            passed, ranking = self._read_and_rank(batch, prompts, texts, sampling.temperature, ran)
        mask = texts >= 0
        if options.mask_truncated_completions:
            mask = mask & ~self.truncated(texts)[..., None]
        markers = (texts.shape[0] * texts.shape[1] if sizes is None else int(sizes.sum())) * len(self.marker)
        tokens = int(prompts.mask.sum()) + 2 * passed.tokens - markers

        def measure(rows: Tensor) -> tuple[Tensor, Tensor, int]:
            return passed.logps[rows], passed.entropy[rows], 0

        return DrawnGroups(
            ranking.best, logps, mask, tokens, measure, texts=texts, ranking=ranking, context=passed.states
        )

    def _read_and_rank(
        self, batch: Batch, prompts: EncodedPrompts, texts: Tensor, temperature: float, ran: Prompt
    ) -> tuple[ReasoningPass, Ranking]:
        """`read` and `rank` of texts int64 [B, G, L]; groups of unequal size one size after the other, then padded."""
        sizes = batch.get(GROUP_SIZE)
        if sizes is None:
            passed = self.read(prompts, texts, temperature, ran=ran)
            return passed, self.rank(passed.states, batch["target"], batch["seen"])
        places, passes, rankings = [], [], []
        for size in sorted(set(sizes.tolist())):
            rows = (sizes == size).nonzero().flatten()
            own, own_ran = prompts._replace(row=prompts.row[rows]), ran._replace(row=ran.row[rows])
            part = self.read(own, texts[rows, :size], temperature, ran=own_ran._replace(states=ran.states[rows]))
            places.append(rows)
            passes.append(part)
            rankings.append(self.rank(part.states, batch["target"][rows], batch["seen"][rows]))
        order = torch.cat(places).argsort()

        def joined(parts: Sequence[Tensor]) -> Tensor:
            missing = [(0, 0) * (part.ndim - 2) + (0, texts.shape[1] - part.shape[1]) for part in parts]
            return torch.cat([pad(part, size) for part, size in zip(parts, missing, strict=True)])[order]

        logps, entropy, states = (joined(parts) for parts in zip(*(part[:3] for part in passes), strict=True))
        ranking = Ranking(*(joined(parts) for parts in zip(*rankings, strict=True)))
        return ReasoningPass(logps, entropy, states, sum(part.tokens for part in passes)), ranking

    def completion_pass(
        self, batch: Batch, items: Tensor, texts: Tensor | None, temperature: float, *, with_target: bool = False
    ) -> CompletionPass:
        """See `Policy.completion_pass`."""
        assert texts is not None
        assert not with_target
        passed = self.read(self.encode(batch, texts.shape[-1]), texts, temperature)

        def rank_target(rollouts: Tensor, batch_items: Tensor) -> tuple[Tensor, int]:
            places = rollouts[..., None].expand(-1, -1, passed.states.shape[-1])
            states = passed.states.gather(1, places).flatten(0, 1)
            target, negatives = (
                batch[name].repeat_interleave(rollouts.shape[1], 0) for name in ("target", "negatives")
            )
            return self.target_logps(states, target, batch_items, negatives), self.batch_tokens(batch_items)

        return CompletionPass(passed.logps, passed.entropy, passed.tokens, rank_target=rank_target)

    def signals(
        self, batch: Batch, drawn: DrawnGroups | None, advantages: Tensor | None, options: SignalOptions
    ) -> PolicySignals:
        """See `Policy.signals`.

        With h_n the state of rollout n behind the answer marker and l_n its item loss, whose negatives come from the
        item cache: u = (1/G) sum_n A_n d l_n / d h_n for `first`; for `hvp` the published Hessian-vector product of the
        first rollout with A = 1. The embedding is the mean of h_n / |h_n|.

        Raises:
            InputError: if the gradient is `trajectory` or the space `lora`.
        """
        if options.gradient == "trajectory" or options.space == "lora":
            raise InputError(
                "a RetrievalPolicy has gradient signals at the hidden state of the answer: set the selector's gradient "
                "to first or hvp, and its gradient_space to answer"
            )
        assert drawn is not None
        assert advantages is not None
        states, target = drawn.context, batch["target"]
        size = self.cached_negatives or SIGNAL_NEGATIVES
        others = draw_negatives(len(self.index), target, batch["sample_id"], (options.seed,), size)
        vectors = self.index.vectors[torch.cat([target[:, None], others], dim=1)]
        first = torch.zeros_like(target)
        head: dict[str, Any] = {"temperature": self.similarity_temperature, "cosine": True}
        if options.gradient == "hvp":
            signal = head_hvp(states[:, 0], vectors, first, **head)
        else:
            slopes = [head_gradient(states[:, g], vectors, first, **head) for g in range(states.shape[1])]
            signal = (torch.stack(slopes, dim=1) * advantages[..., None]).mean(dim=1)
        embedding = unit(states).mean(dim=1).float()
        return PolicySignals(signal.float(), embedding, None, None, forward=drawn.tokens, backward=0)

    def with_negatives(
        self,
        batches: Sequence[Batch],
        words: Sequence[int],
        ranks: tuple[int, int] | None,
        reduce: Callable[[Tensor], Tensor],
    ) -> list[dict[str, Any]]:
        """Batches with a column `negatives` int64 [B, K]: items from the cache, and the targets of other ranks."""
        elsewhere = None
        if ranks is not None:
            target = torch.cat([batch["target"] for batch in batches])
            table = torch.zeros(ranks[1], len(target), dtype=torch.float64, device=target.device)
            table[ranks[0]] = target.to(table)
            table = reduce(table).to(target)
            elsewhere = torch.cat([table[: ranks[0]], table[ranks[0] + 1 :]])
        made, start = [], 0
        for batch in batches:
            target = batch["target"]
            negatives = draw_negatives(len(self.index), target, batch["sample_id"], words, self.cached_negatives)
            if elsewhere is not None:
                there = elsewhere[:, start : start + len(target)].flatten()
                negatives = torch.cat([negatives, there.expand(len(target), -1)], dim=1)
            start += len(target)
            made.append({**batch, "negatives": negatives})
        return made
