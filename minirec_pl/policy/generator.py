"""The policy that recommends by generating the id of an item, token by token, under a trie of the catalogue."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minirec_pl.data.samples import Catalogue
from minirec_pl.errors import InputError
from minirec_pl.policy.folder import StoredPolicy, read_policy, write_policy
from minirec_pl.policy.rollout import CompletionStates, Prompt, Rollouts, draw, evaluation_mode, filter_logps
from minirec_pl.policy.tiny import SPECIAL_TOKENS, build_tiny, check_model
from minirec_pl.policy.trie import TokenTrie

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
            self._load(Path(pretrained))

    def _load(self, folder: Path) -> None:
        stored = read_policy(folder)
        self.model = stored.model
        self.training_cost = stored.training_cost
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
        self._check_length(tokens.shape[1] + self.id_length - 1)
        mask = (tokens >= 0).to(torch.int64)
        return torch.where(mask.bool(), tokens, self.pad_token_id), mask

    def _check_length(self, length: int) -> None:
        longest = getattr(self.model.config, "max_position_embeddings", None)
        if longest is not None and length > longest:
            raise InputError(
                f"prompt and item id take {length} tokens and the model has {longest} positions: lower "
                "data.history_window, or train a policy with a larger max_position_embeddings"
            )

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
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = self.model.base_model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=self.id_length > 1
        )
        return Prompt(output.last_hidden_state[:, -1].index_select(0, row), row, mask, output.past_key_values)

    @staticmethod
    def _fan_out(prompt: Prompt, group: int) -> tuple[Tensor, Any]:
        """Mask [B * G, T] and a cache for G completions of each prompt, which leaves the prompt's own as it is."""
        row = prompt.row.repeat_interleave(group)
        cache = copy.copy(prompt.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(row)
        return prompt.mask[row], cache

    def completion_states(self, prompt: Prompt, items: Tensor) -> CompletionStates:
        """Runs G completions on the cache of each prompt, differentiably.

        Args:
            prompt: from `run_prompt`.
            items: int64 [B, G], item index.
        """
        n_rows, group = items.shape
        if self.id_length == 1:
            return CompletionStates(prompt.states, prompt.states.new_empty(n_rows, group, 0, prompt.states.shape[-1]))
        mask, cache = self._fan_out(prompt, group)
        tokens = self.trie.item_tokens[items.flatten()]
        fed = tokens[:, 1:] >= 0
        tokens = torch.where(fed, tokens[:, :-1], self.pad_token_id)
        mask = torch.cat([mask, fed.to(mask.dtype)], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self.model.base_model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return CompletionStates(prompt.states, output.last_hidden_state.unflatten(0, (n_rows, group)))

    def fed_tokens(self, items: Tensor) -> int:
        """Tokens of the ids of `items` that are fed through the model: all but the last of each id."""
        return int((self.trie.item_tokens[items][..., 1:] >= 0).sum())

    def _child_logps(
        self, states: Tensor, depth: int, low: Tensor, high: Tensor, counts: Tensor, temperature: float
    ) -> Tensor:
        tokens, _, _ = self.trie.level(depth)
        logits = self._head_logits(states, tokens) / temperature
        allowed = self.trie.allowed_children(depth, low, high, counts)
        return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).log_softmax(dim=-1)

    def _head_logits(self, states: Tensor, tokens: Tensor) -> Tensor:
        head: nn.Linear = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        bias = None if head.bias is None else head.bias.index_select(0, tokens)
        return nn.functional.linear(states, head.weight.index_select(0, tokens), bias).float()

    def root_logps(self, states: Tensor, seen: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of the first id token, float32 [B, n_first_tokens], of prompts with `states` [B, D]."""
        counts = self.trie.available_below(seen)
        low = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        return self._child_logps(states, 0, low, low + self.trie.n_items, counts, temperature)

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
        group = items.shape[1]
        child = self.trie.child_of[items]
        root = self.root_logps(states.prompt, seen, temperature)
        logps = [root.gather(1, child[:, :, 0])]
        entropies = [_entropy(root.detach())[:, None].expand(-1, group)]
        counts = self.trie.available_below(seen).repeat_interleave(group, dim=0) if self.id_length > 1 else None
        for depth in range(1, self.id_length):
            assert counts is not None
            _, lows, highs = self.trie.level(depth - 1)
            parent = child[:, :, depth - 1].flatten().clamp(min=0)
            rows = self._child_logps(
                states.rest[:, :, depth - 1].flatten(0, 1), depth, lows[parent], highs[parent], counts, temperature
            )
            logps.append(rows.gather(1, child[:, :, depth].flatten()[:, None].clamp(min=0)).view_as(items))
            entropies.append(_entropy(rows.detach()).view_as(items))
        mask = child >= 0
        return (
            torch.stack(logps, dim=-1).masked_fill(~mask, 0.0),
            mask,
            torch.stack(entropies, dim=-1).masked_fill(~mask, 0.0),
        )

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
        shape = uniform.shape[:2]
        root = filter_logps(self.root_logps(prompt.states, seen, temperature), top_k, top_p)
        pick = draw(root, uniform[:, :, 0])
        logps, alive = [root.gather(1, pick).flatten()], [torch.ones_like(pick.flatten(), dtype=torch.bool)]
        pick = pick.flatten()
        tokens, lows, highs = self.trie.level(0)
        low, high, fed = lows[pick], highs[pick], tokens[pick]
        if self.id_length > 1:
            counts = self.trie.available_below(seen).repeat_interleave(shape[1], dim=0)
            mask, cache = self._fan_out(prompt, shape[1])
        for depth in range(1, self.id_length):
            open_ = self.trie.child_of[self.trie.order[low], depth] >= 0
            mask = torch.cat([mask, open_[:, None].to(mask.dtype)], dim=1)
            positions = (mask.cumsum(dim=1) - 1)[:, -1:].clamp(min=0)
            output = self.model.base_model(
                input_ids=fed[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            rows = self._child_logps(output.last_hidden_state[:, -1], depth, low, high, counts, temperature)
            rows = filter_logps(rows, top_k, top_p)
            pick = draw(rows, uniform[:, :, depth].flatten()[:, None]).flatten()
            tokens, lows, highs = self.trie.level(depth)
            logps.append(torch.where(open_, rows.gather(1, pick[:, None]).flatten(), 0.0))
            alive.append(open_)
            low, high = torch.where(open_, lows[pick], low), torch.where(open_, highs[pick], high)
            fed = torch.where(open_, tokens[pick], self.pad_token_id)
        return Rollouts(
            self.trie.order[low].view(shape),
            torch.stack(logps, dim=-1).view(*shape, -1),
            torch.stack(alive, dim=-1).view(*shape, -1),
        )

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
                logps = [
                    self.head_logps(state, part, seen)[0].sum(dim=-1) for state, part in zip(states, parts, strict=True)
                ]
                scores = torch.cat(logps, dim=1)
            return scores.clamp(min=torch.finfo(torch.float32).min)

    def sequence_tokens(self, batch: Batch) -> int:
        """Tokens that `sequence_nll` feeds through the model, padding not counted."""
        if self.id_length == 1:
            return int((batch["sequence"] >= 0).sum()) + len(batch["sequence"])
        return self.prompt_tokens(self._pairs(batch)) + self.fed_tokens(batch["target"])

    def _pairs(self, batch: Batch) -> Batch:
        """Warm-start pairs as single prompts."""
        sequence, row, position = batch["sequence"], batch["row"], batch["position"]
        columns = torch.arange(sequence.shape[1], device=sequence.device)
        history = sequence[row].masked_fill(columns > position[:, None], -1)
        return {"history": history, "seen": torch.full((len(row), 1), -1, device=row.device)}

    def sequence_nll(self, batch: Batch, dropout: float = 0.0) -> Tensor:
        """Mean negative log-likelihood of warm-start pairs in nats, a scalar with gradient.

        Args:
            batch: `sequence` int64 [B, T] item index right-padded with -1, and pairs `row`, `position`, `target` [P]:
                the state after `sequence[row, position]` predicts `target`.
            dropout: probability, in training mode, of dropping an input embedding or a last hidden state value;
                one-token ids only.
        """
        sequence, row, position, target = (batch[key] for key in ("sequence", "row", "position", "target"))
        if self.id_length > 1:
            logps, _, _ = self.completion_logps(self._pairs(batch), target[:, None])
            return -logps.sum() / max(1, len(target))
        tokens = torch.where(sequence >= 0, self.trie.item_tokens[sequence.clamp(min=0), 0], self.pad_token_id)
        tokens = nn.functional.pad(tokens, (1, 0), value=self.bos_token_id)
        self._check_length(tokens.shape[1])
        embeddings = nn.functional.dropout(self.model.get_input_embeddings()(tokens), dropout, self.training)
        states = self.model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        # The gradient of index_select adds up in a fixed order, that of indexing does not on several threads.
        states = states.flatten(0, 1).index_select(0, row * states.shape[1] + position + 1)
        states = nn.functional.dropout(states, dropout, self.training)
        logits = self._head_logits(states, self.trie.item_tokens[:, 0])
        return nn.functional.cross_entropy(logits, target, reduction="sum") / max(1, len(target))


def _entropy(logps: Tensor) -> Tensor:
    return -(logps.exp() * logps).sum(dim=-1)
