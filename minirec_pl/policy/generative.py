"""The policy that recommends by generating the id of an item, token by token, under a trie of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minirec_pl.data.samples import Catalogue
from minirec_pl.policy.catalogue_text import rows_of
from minirec_pl.policy.folder import Chat, StoredPolicy, read_policy, write_policy
from minirec_pl.policy.item_ids import IdKind, check_id_options, load_with_ids
from minirec_pl.policy.language_models.causal_lm import (
    body_of,
    cache_under_checkpointing,
    head_of,
    run_completions,
    run_prompt,
    run_prompts,
)
from minirec_pl.policy.language_models.decoding import TokenRows, decode, decode_beams
from minirec_pl.policy.language_models.exact_buffers import ExactBuffers
from minirec_pl.policy.language_models.model_config import text_setting
from minirec_pl.policy.language_models.model_support import try_untrained
from minirec_pl.policy.language_models.pretrained import LanguageModel
from minirec_pl.policy.language_models.sampling import CompletionStates, Prompt, Rollouts, evaluation_mode
from minirec_pl.policy.language_models.tiny import SPECIAL_TOKENS, build_tiny, check_model
from minirec_pl.policy.prompt import EncodedPrompts, PromptTemplate, encode_ids
from minirec_pl.policy.ranking import item_scores
from minirec_pl.policy.semantic_ids import SemanticIds
from minirec_pl.policy.supervised import check_prompts, check_rules, sequence_nll, sequence_tokens
from minirec_pl.policy.trie import TokenTrie
from minirec_pl.policy.trie_head import TrieHead, child_logps, item_logps
from minirec_pl.utils.errors import InputError

Batch = Mapping[str, Tensor]


class GenerativePolicy(ExactBuffers):
    """A causal language model that generates an item id constrained to the catalogue.

    Give one of `pretrained`, a folder that `save_pretrained` wrote; `language_model`, which is prompted in words by its
    chat template and gets the ids of `item_ids`; and `config`, from which a small model with one token per item is
    built. The last two wait until the catalogue is known (`bind`).

    Args:
        pretrained: a Hugging Face folder with the side file `minirec.json` (catalogue, item ids, prompt).
        config: `model_type` (default "llama") and keys of that model's transformers config, e.g. `hidden_size`.
        language_model: any causal language model of the hub or of a folder.
        item_ids: what a language model writes for an item: its `title`, the new tokens of a `semantic` id, or one new
            `token` of its own, with which a single forward pass ranks the whole catalogue.
        semantic_ids: how semantic ids are made; the defaults of `SemanticIds` if None.
        prompt: what a language model is asked; the defaults of `PromptTemplate` if None.
        evaluation_beams: rank only the items that a beam search of this width ends with, since the exact
            log-probabilities of all ids of several tokens take a large model long; the others follow in the order of
            the catalogue, and metrics at ranks beyond the width mean nothing. None ranks all of them exactly.

    Raises:
        InputError: if not exactly one of the three is given, an option does not go with it, the folder or its side file
            is missing or damaged, or transformers refuses the config.
    """

    model: Any
    trie: TokenTrie

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
        check_id_options(language_model is not None, item_ids, semantic_ids, prompt)
        if evaluation_beams is not None and evaluation_beams < 1:
            raise InputError(f"evaluation_beams is {evaluation_beams}: give at least 1, or null for an exact ranking")
        self.config, self.language_model = config, language_model
        self.item_ids: IdKind = item_ids
        self.semantic_ids = semantic_ids
        self.prompt = prompt or PromptTemplate()
        self.evaluation_beams = evaluation_beams
        self.training_cost: dict[str, Any] = {}
        self.catalogue: Catalogue | None = None
        self.chat: Chat | None = None
        if pretrained is not None:
            self._take(read_policy(Path(pretrained)))

    def _take(self, stored: StoredPolicy) -> None:
        self.trie = TokenTrie(stored.item_tokens)
        check_model(stored.model, cache=self.trie.depth > 1)
        self.model, self.training_cost, self.chat = stored.model, stored.training_cost, stored.chat
        start = text_setting(self.model, "bos_token_id")
        self.pad_token_id = int(text_setting(self.model, "pad_token_id"))
        self.bos_token_id = self.pad_token_id if start is None else int(start)
        self.catalogue = stored.catalogue

    def bind(self, catalogue: Catalogue) -> None:
        """Ties the policy to a catalogue: builds or loads its model, or checks that a loaded one fits.

        Raises:
            InputError: if the policy was trained for another catalogue, or the language model cannot be had.
        """
        if self.catalogue is not None:
            if self.catalogue.fingerprint != catalogue.fingerprint:
                raise InputError(
                    f"the policy was trained for a catalogue of {len(self.catalogue)} items and the data has "
                    f"{len(catalogue)} (or other ids): train a warm start on this data set, or point "
                    "`data.path` to the old one"
                )
        elif self.language_model is not None:
            semantic = self.semantic_ids or SemanticIds()
            self._take(load_with_ids(self.language_model, catalogue, self.item_ids, semantic, self.prompt))
        else:
            assert self.config is not None
            model = build_tiny(self.config, len(SPECIAL_TOKENS) + len(catalogue))
            try_untrained(model)
            self._take(StoredPolicy(model, catalogue, torch.arange(len(catalogue))[:, None] + len(SPECIAL_TOKENS), {}))

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
        write_policy(Path(folder), StoredPolicy(self.model, self.catalogue, self.trie.item_tokens, cost, self.chat))

    @property
    def id_length(self) -> int:
        """L, the largest number of tokens in an item id."""
        return self.trie.depth

    def encode(self, batch: Batch) -> EncodedPrompts:
        """The different prompts of a batch as tokens, padded on the left, and which of them each sample has.

        A language model's are words, see `PromptTemplate.encode`. The others are a start token, then the ids of the
        history, oldest first; neighbours with the same history share one.

        Args:
            batch: with `history` int64 [B, W], item index padded with -1 anywhere.

        Raises:
            InputError: if prompt and item id together are longer than the model's positions, naming the sample, or a
                prompt has a token that the model has no embedding for.
        """
        if self.chat is not None:
            assert self.catalogue is not None
            positions = text_setting(self.model, "max_position_embeddings")
            longest = None if positions is None else positions - self.id_length + 1
            tokenizer, prompt, ids = self.chat.tokenizer, self.chat.prompt, self.chat.id_texts
            own_ids, rows = self.chat.kind != "title", rows_of(self.model)
            encoded = prompt.encode(tokenizer, batch, self.catalogue, longest, ids, own_ids=own_ids, rows=rows)
            check_rules(self.model, encoded, self.id_length, batch.get("sample_id"))
            return encoded
        encoded = encode_ids(batch["history"], self.trie.item_tokens, self.bos_token_id, self.pad_token_id)
        check_prompts(self.model, encoded, self.id_length - 1, batch.get("sample_id"))
        check_rules(self.model, encoded, self.id_length, batch.get("sample_id"))
        return encoded

    def prompt_states(self, batch: Batch) -> Tensor:
        """Last hidden state of each prompt, float [B, D]; equal prompts are run once."""
        return self.run_prompt(batch).states

    def prompt_tokens(self, batch: Batch) -> int:
        """Tokens that `run_prompt` feeds through the model, padding not counted."""
        return int(self.encode(batch).mask.sum())

    def run_prompt(self, batch: Batch) -> Prompt:
        """Runs the prompts of a batch (see `encode`) through the model."""
        run = run_prompt if self.chat is None else run_prompts
        return run(body_of(self.model), *self.encode(batch), keep_cache=self.id_length > 1)

    def completion_states(self, prompt: Prompt, items: Tensor) -> CompletionStates:
        """Runs G completions on the cache of each prompt, differentiably, as far as their tokens are not certain.

        Args:
            prompt: from `run_prompt`.
            items: int64 [B, G], item index.
        """
        n_rows, group = items.shape
        length, width = self.trie.decided[items.flatten()] - 1, prompt.states.shape[-1]
        most = int(length.max())
        if most < 1:
            return CompletionStates(prompt.states, prompt.states.new_zeros(n_rows, group, self.id_length - 1, width))
        fed = torch.arange(most, device=items.device) < length[:, None]
        tokens = torch.where(fed, self.trie.item_tokens[items.flatten(), :most], self.pad_token_id)
        sample = torch.arange(n_rows, device=items.device).repeat_interleave(group)
        rest = run_completions(prompt, sample, tokens, fed)
        rest = nn.functional.pad(rest, (0, 0, 0, self.id_length - 1 - most))
        return CompletionStates(prompt.states, rest.view(n_rows, group, self.id_length - 1, width))

    def fed_tokens(self, items: Tensor) -> int:
        """Tokens of the ids of `items` that are fed: all but the last one that is not certain, see `TokenTrie`."""
        return int((self.trie.decided[items] - 1).sum())

    def root_logps(self, states: Tensor, seen: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the first id token, float32 [B, n_first_tokens], of prompts with `states` [B, D]."""
        counts = self.trie.available_below(seen)
        low = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        return child_logps(head_of(self.model), self.trie, states, 0, low, low + self.trie.n_items, counts, temperature)

    def head_logps(
        self, states: CompletionStates, items: Tensor, seen: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of completions under the constrained policy, from their hidden states alone.

        Each token's distribution is the softmax of logits / temperature over the tokens that lead to an item of the
        catalogue the user has not seen.

        Args:
            states: from `completion_states`.
            items: int64 [B, G], item index.
            seen: int64 [B, S], item index padded with -1.
            temperature: divides the logits, as in sampling.

        Returns:
            logps float32 [B, G, L] (0 where masked), mask bool [B, G, L], entropy float32 [B, G, L] in nats, without
            gradient.
        """
        return item_logps(head_of(self.model), self.trie, states, items, seen, temperature)

    def completion_logps(self, batch: Batch, items: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """`head_logps` of the batch's prompts: (logps, mask, entropy), each [B, G, L]."""
        with cache_under_checkpointing(self.model) as shared:
            if not shared and self.id_length > 1:
                raise InputError(
                    f"{type(self.model).__name__} has no cache under gradient checkpointing: set "
                    "language_model.gradient_checkpointing to false"
                )
            states = self.completion_states(self.run_prompt(batch), items)
        return self.head_logps(states, items, batch["seen"], temperature)

    def generate(
        self,
        batch: Batch,
        num_generations: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Rollouts:
        """Samples `num_generations` items per prompt with replacement, in evaluation mode and without gradients.

        Args:
            batch: with `history` [B, W] and `seen` [B, S].
            num_generations: G.
            temperature: divides the logits.
            top_k: keep the k most likely tokens at each step; None keeps all.
            top_p: keep the smallest set of tokens with this mass; None keeps all.
            generator: the random numbers; None uses torch's global generator.
        """
        with evaluation_mode(self):
            prompt = self.run_prompt(batch)
            size = (len(prompt.states), num_generations, self.id_length)
            uniform = torch.rand(size, dtype=torch.float64, generator=generator, device=prompt.states.device)
            return self.sample(prompt, batch["seen"], uniform, temperature=temperature, top_k=top_k, top_p=top_p)

    @torch.no_grad()
    def sample(
        self,
        prompt: Prompt,
        seen: Tensor,
        uniform: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Rollouts:
        """As `generate`, from prompts that have been run and given random numbers.

        Args:
            prompt: from `run_prompt`.
            seen: int64 [B, S], items that may not be generated, padded with -1.
            uniform: float64 [B, G, L] in [0, 1), one number per token of a rollout.
            temperature: divides the logits.
            top_k: as in `generate`.
            top_p: as in `generate`.
        """
        head = TrieHead(head_of(self.model), self.trie, seen, temperature, top_k, top_p)
        group, length = uniform.shape[1:]
        return self._rollouts(decode(prompt, head, group, length, uniform), group)

    @torch.no_grad()
    def beams(self, prompt: Prompt, seen: Tensor, num_generations: int, temperature: float = 1.0) -> Rollouts:
        """The `num_generations` items that a beam search of that width ends with, the most likely first.

        Args:
            prompt: from `run_prompt`.
            seen: as in `sample`.
            num_generations: G, different items for each prompt.
            temperature: divides the logits.

        Raises:
            InputError: if fewer than G items are left for a sample.
        """
        head = TrieHead(head_of(self.model), self.trie, seen, temperature)
        rollouts = self._rollouts(decode_beams(prompt, head, num_generations, self.id_length), num_generations)
        fewest = int((rollouts.items >= 0).sum(dim=1).min())
        if fewest < num_generations:
            raise InputError(f"a sample has {fewest} items left for {num_generations} beams: lower num_generations")
        return rollouts

    def _rollouts(self, rows: TokenRows, group: int) -> Rollouts:
        items = self.trie.items_of(rows.tokens.masked_fill(~rows.mask, -1)).view(-1, group)
        mask = (self.trie.item_tokens[items] >= 0) & (items >= 0)[..., None]
        return Rollouts(items, rows.logps.view_as(mask), mask)

    def item_logps(self, batch: Batch, chunk: int = 4096) -> Tensor:
        """Log-probability of every item, float32 [B, n_items]; seen items get the lowest finite value.

        Exact: one forward pass for one-token ids; longer ids are teacher-forced, at most `chunk` completions at a time,
        on the cache of the prompts. With `evaluation_beams` longer ids that no beam ends with get the lowest value too.
        """
        return item_scores(self, batch, chunk)

    def supervised_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The loss of a warm start on single samples with `target` int64 [B], and the tokens that were run for it.

        It is the mean negative log-likelihood of the target's id after the prompt among the ids of the whole
        catalogue, in nats, a scalar with gradient.
        """
        target = batch["target"]
        nothing = torch.full((len(target), 1), -1, device=target.device)
        logps, _, _ = self.completion_logps({**batch, "seen": nothing}, target[:, None])
        return -logps.sum() / len(target), self.prompt_tokens(batch) + self.fed_tokens(target)

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
