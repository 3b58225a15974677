"""The policy that recommends by generating the id of an item, token by token, under a trie of the catalogue."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minirec_pl.data.loader import GROUP_SIZE
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy.distinct import sample_distinct
from minirec_pl.policy.folder import StoredPolicy, read_policy, write_policy
from minirec_pl.policy.identity import model_facts, other_item, texts_identity, tokenizer_fact
from minirec_pl.policy.interface import (
    ITEM_OPTIONS,
    Batch,
    CompletionPass,
    DrawnGroups,
    PolicySignals,
    RolloutOptions,
    SignalOptions,
    SupervisedLoss,
    TargetPass,
    uniform_numbers,
)
from minirec_pl.policy.item_id_generator import ItemIdGenerator
from minirec_pl.policy.item_ids import IdKind, built_ids, check_id_options, load_with_ids
from minirec_pl.policy.language_models.causal_lm import head_of
from minirec_pl.policy.language_models.decoding import decode_beams
from minirec_pl.policy.language_models.model_config import text_setting
from minirec_pl.policy.language_models.model_support import try_untrained
from minirec_pl.policy.language_models.pretrained import LanguageModel
from minirec_pl.policy.language_models.sampling import Prompt, Rollouts
from minirec_pl.policy.language_models.tiny import SPECIAL_TOKENS, build_tiny, check_model
from minirec_pl.policy.prompt import PromptTemplate
from minirec_pl.policy.semantic_ids import SemanticIds
from minirec_pl.policy.supervised import sequence_nll, sequence_tokens, shared_states
from minirec_pl.policy.target_signals import target_signals
from minirec_pl.policy.trie import TokenTrie, TrieHead
from minirec_pl.utils.errors import InputError, check_whole
from minirec_pl.utils.identity import Identity, fact
from minirec_pl.utils.modules import evaluation_mode

_LOGITS = 2**22  # of completions that are scored at a time
_CACHE_BYTES = 2**28  # of the keys and values of their prompts


class GenerativePolicy(ItemIdGenerator):
    """A causal language model that generates an item id constrained to the catalogue.

    Give one of `pretrained`, a folder that `save_pretrained` wrote; `language_model`, which is prompted in words by its
    chat template and gets the ids of `item_ids`; and `config`, from which a small model is built whose only tokens are
    those of the items. The last two wait until the catalogue is known (`bind`).

    Args:
        pretrained: a Hugging Face folder with the side file `minirec.json` (catalogue, item ids, prompt).
        config: `model_type` (default "llama") and keys of that model's transformers config, e.g. `hidden_size`.
        language_model: any causal language model of the hub or of a folder.
        item_ids: what a language model writes for an item: its `title`, the new tokens of a `semantic` id, or one new
            `token` of its own, with which a single forward pass ranks the whole catalogue. A model of a `config` writes
            `semantic` ids, with codes from the log, or else one token.
        semantic_ids: how semantic ids are made; the defaults of `SemanticIds` if None.
        prompt: what a language model is asked; the defaults of `PromptTemplate` if None.
        evaluation_beams: rank only the items that a beam search of this width ends with; None ranks all of them
            exactly, which takes a large model long where ids have several tokens. The others follow in the order of
            the catalogue, so metrics at ranks beyond the width mean nothing.

    Raises:
        InputError: if not exactly one of the three is given, an option does not go with it, the folder or its side file
            is missing or damaged, or transformers refuses the config.
    """

    extra_options = ITEM_OPTIONS
    draws_unequal_groups = True
    made_of = frozenset({"config", "language_model", "semantic_ids", "prompt"})

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        language_model: LanguageModel | None = None,
        item_ids: IdKind = "title",
        semantic_ids: SemanticIds | None = None,
        prompt: PromptTemplate | None = None,
        evaluation_beams: int | None = None,
    ) -> None:
        super().__init__()
        if (pretrained is not None) + (config is not None) + (language_model is not None) != 1:
            raise InputError(
                "GenerativePolicy takes exactly one of `pretrained` (a folder), `config` (a new model) and "
                "`language_model`"
            )
        check_id_options(language_model is not None, config is not None, item_ids, semantic_ids, prompt)
        check_whole(evaluation_beams=evaluation_beams)
        if evaluation_beams is not None and evaluation_beams < 1:
            raise InputError(f"evaluation_beams is {evaluation_beams}: give at least 1, or null for an exact ranking")
        self.config, self.language_model = config, language_model
        self.item_ids: IdKind = item_ids
        self.semantic_ids = semantic_ids
        self.prompt = prompt or PromptTemplate()
        self.evaluation_beams = evaluation_beams
        self.chat = None
        self.id_words: list[str] | None = None
        self._tokenizer_fact = ""
        if pretrained is not None:
            self._take(read_policy(Path(pretrained)))
            kind = self.chat.kind if self.chat is not None else "token" if self.id_words is None else "semantic"
            if item_ids not in ("title", kind):
                warnings.warn(f"the policy in '{pretrained}' goes on with its item_ids {kind!r}", stacklevel=2)

    @classmethod
    def unloaded(cls, options: Mapping[str, Any]) -> GenerativePolicy:
        """See `Policy.unloaded`."""
        return cls(config={})

    def _take(self, stored: StoredPolicy) -> None:
        self.trie = TokenTrie(stored.item_tokens)
        check_model(stored.model, cache=self.trie.depth > 1)
        self.model, self.training_cost, self.chat = stored.model, stored.training_cost, stored.chat
        self.made_for = stored.made_for
        start = text_setting(self.model, "bos_token_id")
        self.pad_token_id = int(text_setting(self.model, "pad_token_id"))
        self.bos_token_id = self.pad_token_id if start is None else int(start)
        self.catalogue, self.id_words = stored.catalogue, stored.words

    def bind(self, catalogue: Catalogue) -> None:
        """Ties the policy to a catalogue: builds or loads its model, or checks that a loaded one fits.

        Raises:
            InputError: if the policy was trained for another catalogue, or the language model cannot be had.
        """
        if self.catalogue is not None:
            if self.catalogue.fingerprint != catalogue.fingerprint:
                raise InputError(
                    f"the policy was trained for a catalogue of {len(self.catalogue)} items and the data has "
                    f"{len(catalogue)}{other_item(self.catalogue, catalogue)}: train a warm start on this data set, or "
                    "point `data.path` to the old one"
                )
        elif self.language_model is not None:
            semantic = self.semantic_ids or SemanticIds()
            loaded = load_with_ids(self.language_model, catalogue, self.item_ids, semantic, self.prompt)
            self._take(loaded._replace(made_for={}))
        else:
            assert self.config is not None
            tokens, words = built_ids(catalogue, self.item_ids, self.semantic_ids)
            model = build_tiny(self.config, len(SPECIAL_TOKENS) + len(words))
            try_untrained(model)
            tokens = tokens.where(tokens < 0, tokens + len(SPECIAL_TOKENS))
            several = words if tokens.shape[1] > 1 else None
            self._take(StoredPolicy(model, catalogue, tokens, {}, words=several, made_for={}))

    def save_pretrained(self, folder: str | Path, training_cost: Mapping[str, Any] | None = None) -> None:
        """Writes model, or its adapters, tokenizer and side file as one folder, replacing it whole or not at all.

        Args:
            folder: the folder to write; an older policy there is replaced.
            training_cost: what training this policy cost, kept with it so that later runs can state the sum.

        Raises:
            InputError: if the policy has no catalogue yet, or the folder cannot be written or holds something else.
        """
        if self.catalogue is None:
            raise InputError("the policy has no catalogue yet: fit it, or call bind(catalogue), before saving")
        cost = dict(training_cost or self.training_cost)
        tokens = self.trie.item_tokens
        stored = StoredPolicy(self.model, self.catalogue, tokens, cost, self.chat, self.id_words, self.made_for)
        write_policy(Path(folder), stored)

    @property
    def identity(self) -> Identity:
        """See `Policy.identity`: item ids, what kind of model it is, and what is put into words how."""
        own = [super().identity]
        if self.catalogue is not None:
            own.append(Identity({"item_ids": fact(self.item_ids, self.trie.item_tokens.cpu().numpy().tobytes())}))
            own.append(Identity(model_facts(self.model)))
        if self.catalogue is not None and self.chat is not None:
            self._tokenizer_fact = self._tokenizer_fact or tokenizer_fact(self.chat.tokenizer)
            prompt = {f"prompt.{name}": str(value) for name, value in asdict(self.chat.prompt).items()}
            own += [Identity({"tokenizer": self._tokenizer_fact, **prompt}), texts_identity(self.catalogue)]
        return Identity.of(own)

    def item_logps(self, batch: Batch, chunk: int = 4096) -> Tensor:
        """Log-probability of every item, float32 [B, n_items]; seen items get the lowest finite value.

        Exact: one forward pass for one-token ids; longer ids are teacher-forced, at most `chunk` completions at a time,
        on the cache of the prompts. With `evaluation_beams` longer ids that no beam ends with get the lowest value too.
        """
        return _item_scores(self, batch, chunk)

    def supervised_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The loss of a warm start on single samples with `target` int64 [B], and the tokens that were run for it.

        It is the mean negative log-likelihood of the target's id after the prompt among the ids of the whole
        catalogue, in nats, a scalar with gradient.
        """
        target = batch["target"]
        nothing = torch.full((len(target), 1), -1, device=target.device)
        logps, _, _ = self.completion_logps({**batch, "seen": nothing}, target[:, None])
        return -logps.sum() / len(target), self.prompt_tokens(batch) + self.fed_tokens(target)

    def warm_start_loss(self, batch: Batch, dropout: float, step: int) -> SupervisedLoss:
        """See `Policy.warm_start_loss`: `supervised_loss` of single samples, `sequence_nll` of sequences.

        Raises:
            InputError: if the batch has neither.
        """
        if "history" in batch:
            return SupervisedLoss(*self.supervised_loss(batch))
        if "sequence" not in batch:
            raise InputError("WarmStartModule trains on sequences: set data.train_on to `warm`")
        return SupervisedLoss(self.sequence_nll(batch, dropout), self.sequence_tokens(batch))

    def sequence_tokens(self, batch: Batch) -> int:
        """Tokens that `sequence_nll` feeds through the model, padding not counted."""
        return sequence_tokens(self, batch)

    def sequence_nll(self, batch: Batch, dropout: float = 0.0) -> Tensor:
        """Mean negative log-likelihood of warm-start pairs in nats, a scalar with gradient.

        Args:
            batch: `sequence` int64 [B, T] item index right-padded with -1, and pairs `row`, `position`, `target` [P]:
                the state after `sequence[row, position]` predicts `target`.
            dropout: probability, in training mode, of dropping a value of the last hidden states, and of the input
                embeddings where a `config` was given; for one-token ids only.
        """
        return sequence_nll(self, batch, dropout)

    def rollout_length(self, options: RolloutOptions) -> int:
        """See `Policy.rollout_length`."""
        return self.id_length

    def roll_out(self, batch: Batch, options: RolloutOptions, random: torch.Generator | Tensor) -> DrawnGroups:
        """See `Policy.roll_out`: items with replacement, without, or those that a beam search ends with."""
        target, seen, sizes = batch["target"][:, None], batch["seen"], batch.get(GROUP_SIZE)
        with evaluation_mode(self):
            prompt = self.run_prompt(batch)
            drawn = self._draw(prompt, batch, options, random)
            states = self.completion_states(prompt, target)

        def measure(rows: Tensor) -> tuple[Tensor, Tensor, int]:
            with evaluation_mode(self):
                part, items = prompt._replace(states=prompt.states[rows], row=prompt.row[rows]), drawn.items[rows]
                items = items if sizes is None else items[:, : int(sizes[rows].max())]
                found = self.completion_states(part, items)
                logps, _, entropy = self.head_logps(found, items, seen[rows], options.temperature)
            return logps, entropy, self.fed_tokens(items)

        def target_logps() -> tuple[Tensor, Tensor]:
            with evaluation_mode(self):
                logps, mask, _ = self.head_logps(states, target, seen, options.temperature)
            return logps[:, 0], mask[:, 0]

        items = drawn.items if sizes is None else drawn.items[drawn.mask.any(dim=-1)]
        tokens = self.prompt_tokens(batch) + self.fed_tokens(items) + self.fed_tokens(target)
        return DrawnGroups(drawn.items, drawn.logps, drawn.mask, tokens, measure, target_logps, context=states)

    def _draw(
        self, prompt: Prompt, batch: Batch, options: RolloutOptions, random: torch.Generator | Tensor
    ) -> Rollouts:
        group, temperature = options.num_generations, options.temperature
        if options.distinct_rollouts:
            assert isinstance(random, torch.Generator)
            return sample_distinct(self, prompt, batch, group, random, temperature)
        if options.rollouts == "beam":
            return self.beams(prompt, batch["seen"], group, temperature)
        numbers = uniform_numbers(random, (len(batch["target"]), group, self.id_length))
        narrowed: dict[str, Any] = {"temperature": temperature, "top_k": options.top_k, "top_p": options.top_p}
        return self.sample(prompt, batch["seen"], numbers, **narrowed, sizes=batch.get(GROUP_SIZE))

    def completion_pass(
        self, batch: Batch, items: Tensor, texts: Tensor | None, temperature: float, *, with_target: bool = False
    ) -> CompletionPass:
        """See `Policy.completion_pass`."""
        if with_target:
            items = torch.cat([batch["target"][:, None], items], dim=1)
        logps, _, entropy = self.completion_logps(batch, items, temperature)
        tokens = self.prompt_tokens(batch) + self.fed_tokens(items)
        if not with_target:
            return CompletionPass(logps, entropy, tokens)
        return CompletionPass(logps[:, 1:], entropy[:, 1:], tokens, target_logps=logps[:, 0])

    def target_pass(self, batch: Batch, temperature: float) -> TargetPass:
        """See `Policy.target_pass`: with ids of one token, prompts that others begin with are not run again."""
        target = batch["target"]
        outside = (target < 0) | (target >= self.trie.n_items)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise InputError(
                f"the target of sample_id {int(batch['sample_id'][row])} is item {int(target[row])}, and the catalogue "
                f"has items 0 to {self.trie.n_items - 1}: give positions in the catalogue"
            )
        if self.id_length > 1:
            logps, _, _ = self.completion_logps(batch, target[:, None], temperature)
            tokens = self.prompt_tokens(batch) + self.fed_tokens(target)
            return TargetPass(logps[:, 0].sum(dim=1), self.id_length, tokens)
        states, tokens = shared_states(self, batch)
        every = self.root_logps(states, batch["seen"], temperature)
        return TargetPass(every.gather(1, self.trie.child_of[target])[:, 0], 1, tokens, every)

    def signals(
        self, batch: Batch, drawn: DrawnGroups | None, advantages: Tensor | None, options: SignalOptions
    ) -> PolicySignals:
        """See `Policy.signals`: all of them by the target's exact probability, whatever the rollouts found."""
        if drawn is None:
            target = batch["target"][:, None]
            with evaluation_mode(self):
                states = self.completion_states(self.run_prompt(batch), target)
            forward = self.prompt_tokens(batch) + self.fed_tokens(target)
        else:
            states, forward = drawn.context, drawn.tokens
        found = target_signals(
            self, states, batch, options.temperature, options.gradient, options.space, options.trajectory
        )
        solved, embedding = found.logp.exp(), states.prompt.detach()
        return PolicySignals(
            found.gradient, embedding, solved, found.alignment, forward + found.tokens, backward=found.tokens
        )


def _item_scores(policy: GenerativePolicy, batch: Mapping[str, Tensor], chunk: int) -> Tensor:
    with evaluation_mode(policy):
        prompt, seen = policy.run_prompt(batch), batch["seen"]
        if policy.id_length == 1:
            scores = policy.root_logps(prompt.states, seen)[:, policy.trie.child_of[:, 0]]
        elif policy.evaluation_beams is not None:
            scores = _of_beams(policy, prompt, seen, min(policy.evaluation_beams, policy.trie.n_items))
        else:
            most = max(1, min(chunk, _most_completions(policy, prompt)) // len(seen))
            every = torch.arange(policy.trie.n_items, device=seen.device).expand(len(seen), -1)
            parts = []
            for items in torch.split(every, most, dim=1):
                states = policy.completion_states(prompt, items)
                parts.append(policy.head_logps(states, items, seen)[0].sum(dim=-1))
            scores = torch.cat(parts, dim=1)
        return scores.clamp(min=torch.finfo(torch.float32).min)


def _most_completions(policy: GenerativePolicy, prompt: Prompt) -> int:
    """Completions at a time that keep within the bounds of memory above."""
    layers: list[Any] = prompt.cache.layers
    cached: int = sum(layer.keys[0].nbytes + layer.values[0].nbytes for layer in layers)
    return max(1, min(_CACHE_BYTES // cached, _LOGITS // policy.trie.widest))


def _of_beams(policy: GenerativePolicy, prompt: Prompt, seen: Tensor, width: int) -> Tensor:
    n_items, lowest = policy.trie.n_items, torch.finfo(torch.float32).min
    rows = decode_beams(prompt, TrieHead(head_of(policy.model), policy.trie, seen), width, policy.id_length)
    found = policy.trie.items_of(rows.tokens.masked_fill(~rows.mask, -1)).view(-1, width)
    logps = rows.logps.sum(dim=1).float().view(-1, width)
    scores = torch.full((len(seen), n_items + 1), lowest, dtype=torch.float32, device=seen.device)
    return scores.scatter_(1, found.where(found >= 0, n_items), logps)[:, :n_items]
