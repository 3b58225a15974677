"""A causal language model that writes item ids under a trie of the catalogue: states, probabilities, samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minirec_pl.policy.catalogue_text import rows_of
from minirec_pl.policy.folder import Chat
from minirec_pl.policy.interface import Batch, Policy
from minirec_pl.policy.language_models.causal_lm import (
    body_of,
    cache_under_checkpointing,
    head_of,
    run_completions,
    run_prompt,
    run_prompts,
)
from minirec_pl.policy.language_models.decoding import TokenRows, decode, decode_beams
from minirec_pl.policy.language_models.model_config import text_setting
from minirec_pl.policy.language_models.sampling import CompletionStates, Prompt, Rollouts
from minirec_pl.policy.prompt import EncodedPrompts, check_prompts, check_rules, encode_ids
from minirec_pl.policy.trie import TokenTrie, TrieHead, child_logps, item_logps
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.modules import evaluation_mode


class ItemIdGenerator(Policy):
    """Generates item ids constrained to the catalogue.

    Attributes:
        model: a causal language model of transformers.
        trie: of the ids of the catalogue.
        chat: how a language model is prompted in words; None for prompts of item tokens.
        pad_token_id: pads prompts of item tokens.
        bos_token_id: starts them.
    """

    model: Any
    trie: TokenTrie
    chat: Chat | None
    pad_token_id: int
    bos_token_id: int

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

    def prompt_tokens(self, batch: Batch) -> int:
        """Tokens that `run_prompt` feeds through the model, padding not counted."""
        return int(self.encode(batch).mask.sum())

    def run_prompt(self, batch: Batch) -> Prompt:
        """Runs the prompts of a batch (see `encode`) through the model."""
        return self.run_encoded(self.encode(batch))

    def run_encoded(self, prompts: EncodedPrompts) -> Prompt:
        """As `run_prompt`, of prompts that are tokens already."""
        run = run_prompt if self.chat is None else run_prompts
        return run(body_of(self.model), *prompts, keep_cache=self.id_length > 1)

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
                    "--model.policy.language_model.gradient_checkpointing to false"
                )
            states = self.completion_states(self.run_prompt(batch), items)
        return self.head_logps(states, items, batch["seen"], temperature)

    @property
    def equal_lengths(self) -> bool:
        """See `Policy.equal_lengths`."""
        return bool((self.trie.item_tokens >= 0).all())

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
        sizes: Tensor | None = None,
    ) -> Rollouts:
        """As `generate`, from prompts that have been run and given random numbers.

        Args:
            prompt: from `run_prompt`.
            seen: int64 [B, S], items that may not be generated, padded with -1.
            uniform: float64 [B, G, L] in [0, 1), one number per token of a rollout.
            temperature: divides the logits.
            top_k: as in `generate`.
            top_p: as in `generate`.
            sizes: int64 [B], how many of the G items each prompt gets; None for all. The others are item 0 without a
                token.
        """
        head = TrieHead(head_of(self.model), self.trie, seen, temperature, top_k, top_p)
        group, length = uniform.shape[1:]
        rollouts = self._rollouts(decode(prompt, head, group, length, uniform, sizes), group)
        if sizes is None:
            return rollouts
        exists = torch.arange(group, device=sizes.device) < sizes[:, None]
        return Rollouts(rollouts.items.where(exists, 0), rollouts.logps, rollouts.mask & exists[..., None])

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
