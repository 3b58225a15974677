"""The policy that recommends by generating the id of an item, token by token, under a trie of the catalogue."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minirec_pl.data.samples import Catalogue
from minirec_pl.errors import InputError
from minirec_pl.policy.causal_lm import body_of, head_of, run_completions, run_prompt
from minirec_pl.policy.decoding import TokenRows, decode, decode_beams
from minirec_pl.policy.folder import StoredPolicy, read_policy, write_policy
from minirec_pl.policy.rollout import CompletionStates, Prompt, Rollouts, evaluation_mode
from minirec_pl.policy.supervised import check_positions, pairs_as_prompts, sequence_nll
from minirec_pl.policy.tiny import SPECIAL_TOKENS, build_tiny, check_model
from minirec_pl.policy.trie import TokenTrie
from minirec_pl.policy.trie_head import TrieHead, child_logps, item_logps

Batch = Mapping[str, Tensor]


class GenerativePolicy(nn.Module):
    """A causal language model that generates an item id constrained to the catalogue.

    Give either `pretrained`, a folder that `save_pretrained` wrote, or `config`, from which a small model with one
    token per item is built as soon as the catalogue is known (`bind`).

    Args:
        pretrained: a Hugging Face folder with the side file `minirec.json` (catalogue and item ids).
        config: `model_type` (default "llama") and keys of that model's transformers config, e.g. `hidden_size`.

    Raises:
        InputError: if both or neither are given, the folder or its side file is missing or damaged, or transformers
            refuses the config.
    """

    trie: TokenTrie

    def __init__(self, pretrained: str | None = None, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        if (pretrained is None) == (config is None):
            raise InputError("GenerativePolicy takes exactly one of `pretrained` (a folder) and `config` (a new model)")
        self.config = config
        self.training_cost: dict[str, Any] = {}
        self.catalogue: Catalogue | None = None
        if pretrained is not None:
            stored = read_policy(Path(pretrained))
            self.model, self.training_cost = stored.model, stored.training_cost
            self._bind(stored.catalogue, stored.item_tokens)

    def _bind(self, catalogue: Catalogue, item_tokens: Tensor) -> None:
        check_model(self.model)
        self.trie = TokenTrie(item_tokens)
        self.pad_token_id = int(self.model.config.pad_token_id)
        self.bos_token_id = int(self.model.config.bos_token_id)
        self.catalogue = catalogue

    def bind(self, catalogue: Catalogue) -> None:
        """Ties the policy to a catalogue: builds the model of a `config`, or checks that a loaded one fits.

        Raises:
            InputError: if the policy was trained for another catalogue.
        """
        if self.catalogue is None:
            assert self.config is not None
            self.model = build_tiny(self.config, len(SPECIAL_TOKENS) + len(catalogue))
            self._bind(catalogue, torch.arange(len(catalogue))[:, None] + len(SPECIAL_TOKENS))
        elif self.catalogue.fingerprint != catalogue.fingerprint:
            raise InputError(
                f"the policy was trained for a catalogue of {len(self.catalogue)} items and the data has "
                f"{len(catalogue)} (or other ids): train a warm start on this data set, or point "
                "`data.path` to the old one"
            )

    def save_pretrained(self, folder: str | Path, training_cost: Mapping[str, Any] | None = None) -> None:
        """Writes model, tokenizer and side file as one Hugging Face folder, replacing it whole or not at all.

        Args:
            folder: the folder to write; an older policy there is replaced.
            training_cost: what training this policy cost, kept with it so that later runs can state the sum.

        Raises:
            InputError: if the policy has no catalogue yet, or the folder cannot be written or holds something else.
        """
        if self.catalogue is None:
            raise InputError("the policy has no catalogue yet: fit it, or call bind(catalogue), before saving")
        stored = StoredPolicy(
            self.model, self.catalogue, self.trie.item_tokens, dict(training_cost or self.training_cost)
        )
        write_policy(Path(folder), stored)

    @property
    def id_length(self) -> int:
        """L, the largest number of tokens in an item id."""
        return self.trie.depth

    def encode(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts as tokens: a start token, then the ids of the history, oldest first, padded on the left.

        Args:
            history: int64 [B, W], item index padded with -1 anywhere.

        Returns:
            input_ids int64 [B, T] and attention_mask int64 [B, T].

        Raises:
            InputError: if prompt and item id together are longer than the model's positions.
        """
        tokens = torch.where(history[..., None] >= 0, self.trie.item_tokens[history.clamp(min=0)], -1).flatten(1)
        tokens = nn.functional.pad(tokens, (1, 0), value=self.bos_token_id)
        real = tokens >= 0
        tokens = tokens.gather(1, torch.argsort(real.to(torch.int8), dim=1, stable=True))
        tokens = tokens[:, tokens.shape[1] - int(real.sum(dim=1).max()) :]
        check_positions(self.model, tokens.shape[1] + self.id_length - 1)
        mask = (tokens >= 0).to(torch.int64)
        return torch.where(mask.bool(), tokens, self.pad_token_id), mask

    def prompt_states(self, batch: Batch) -> Tensor:
        """Last hidden state of each prompt, float [B, D]; neighbours with the same history are run once."""
        return self.run_prompt(batch).states

    def prompt_tokens(self, batch: Batch) -> int:
        """Tokens that `run_prompt` feeds through the model, padding not counted."""
        return int(self.encode(torch.unique_consecutive(batch["history"], dim=0))[1].sum())

    def run_prompt(self, batch: Batch) -> Prompt:
        """Runs the prompts of `history` int64 [B, W] through the model."""
        history, row = torch.unique_consecutive(batch["history"], dim=0, return_inverse=True)
        input_ids, mask = self.encode(history)
        return run_prompt(body_of(self.model), input_ids, mask, row, keep_cache=self.id_length > 1)

    def completion_states(self, prompt: Prompt, items: Tensor) -> CompletionStates:
        """Runs G completions on the cache of each prompt, differentiably.

        Args:
            prompt: from `run_prompt`.
            items: int64 [B, G], item index.
        """
        n_rows, group = items.shape
        if self.id_length == 1:
            return CompletionStates(prompt.states, prompt.states.new_empty(n_rows, group, 0, prompt.states.shape[-1]))
        tokens = self.trie.item_tokens[items.flatten()]
        fed = tokens[:, 1:] >= 0
        tokens = torch.where(fed, tokens[:, :-1], self.pad_token_id)
        sample = torch.arange(n_rows, device=items.device).repeat_interleave(group)
        rest = run_completions(prompt, sample, tokens, fed)
        return CompletionStates(prompt.states, rest.view(n_rows, group, -1, rest.shape[-1]))

    def fed_tokens(self, items: Tensor) -> int:
        """Tokens of the ids of `items` that are fed through the model: all but the last of each id."""
        return int((self.trie.item_tokens[items][..., 1:] >= 0).sum())

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
        items = self.trie.items_of(rows.tokens.masked_fill(~rows.mask, -1))
        shape = (-1, group, self.id_length)
        return Rollouts(items.view(-1, group), rows.logps.view(shape), rows.mask.view(shape))

    def item_logps(self, batch: Batch, chunk: int = 4096) -> Tensor:
        """Exact log-probability of every item, float32 [B, n_items]; seen items get the lowest finite value.

        One forward pass for one-token ids; longer ids are teacher-forced, `chunk` completions at a time, on the cache
        of the prompts.
        """
        with evaluation_mode(self):
            prompt, seen = self.run_prompt(batch), batch["seen"]
            if self.id_length == 1:
                scores = self.root_logps(prompt.states, seen)[:, self.trie.child_of[:, 0]]
            else:
                rows = len(seen)
                every = torch.arange(self.trie.n_items, device=seen.device).expand(rows, -1)
                parts = torch.split(every, max(1, chunk // rows), dim=1)
                states = (self.completion_states(prompt, part) for part in parts)
                logps = (self.head_logps(*pair, seen)[0].sum(dim=-1) for pair in zip(states, parts, strict=True))
                scores = torch.cat(list(logps), dim=1)
            return scores.clamp(min=torch.finfo(torch.float32).min)

    def sequence_tokens(self, batch: Batch) -> int:
        """Tokens that `sequence_nll` feeds through the model, padding not counted."""
        if self.id_length == 1:
            return int((batch["sequence"] >= 0).sum()) + len(batch["sequence"])
        return self.prompt_tokens(pairs_as_prompts(batch)) + self.fed_tokens(batch["target"])

    def sequence_nll(self, batch: Batch, dropout: float = 0.0) -> Tensor:
        """Mean negative log-likelihood of warm-start pairs in nats, a scalar with gradient.

        Args:
            batch: `sequence` int64 [B, T] item index right-padded with -1, and pairs `row`, `position`, `target` [P]:
                the state after `sequence[row, position]` predicts `target`.
            dropout: probability, in training mode, of dropping an input embedding or a last hidden state value;
                one-token ids only.
        """
        return sequence_nll(self, batch, dropout)
