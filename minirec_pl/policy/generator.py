"""The policy that recommends by generating the id of an item, token by token, under a trie of the catalogue."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minirec_pl.data.samples import Catalogue
from minirec_pl.errors import InputError
from minirec_pl.policy.rollout import Rollouts, evaluation_mode, filter_logps
from minirec_pl.policy.tiny import SPECIAL_TOKENS, build_tiny, item_tokenizer
from minirec_pl.policy.trie import TokenTrie

Batch = Mapping[str, Tensor]
SIDE_FILE = "minirec.json"


class CompletionStates(NamedTuple):
    """Hidden states from which the head produces the tokens of B x G completions.

    Attributes:
        prompt: float [B, D], the last hidden state of each prompt, which produces every first token.
        rest: float [B, G, L - 1, D], the states that produce the later tokens (L - 1 = 0 for one-token ids).
    """

    prompt: Tensor
    rest: Tensor


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
        from transformers import AutoModelForCausalLM

        side = folder / SIDE_FILE
        if not side.is_file():
            raise InputError(
                f"no policy in '{folder}' ({SIDE_FILE} is missing): train one first, for example with "
                "`minirec fit --config configs/ml-100k/warm-start.yaml`, or give its folder as "
                "policy.init_args.pretrained"
            )
        try:
            stored = json.loads(side.read_text(encoding="utf-8"))
            catalogue = Catalogue(stored["item_ids"], stored["titles"])
            item_tokens = torch.tensor(stored["item_tokens"])
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).train()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the policy in '{folder}' cannot be read ({reason}): train or copy it again") from error
        self.training_cost = stored.get("training_cost", {})
        self._bind(catalogue, item_tokens)

    def _bind(self, catalogue: Catalogue, item_tokens: Tensor) -> None:
        self.catalogue = catalogue
        self.trie = TokenTrie(item_tokens)
        self.pad_token_id = int(self.model.config.pad_token_id)
        self.bos_token_id = int(self.model.config.bos_token_id)

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
            folder: the folder to write; an existing one is replaced.
            training_cost: what training this policy cost, kept with it so that later runs can state the sum.
        """
        if self.catalogue is None:
            raise InputError("the policy has no catalogue yet: fit it, or call bind(catalogue), before saving")
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            self.model.save_pretrained(scratch)
            item_tokenizer(self.catalogue.item_ids).save_pretrained(scratch)
            side = {
                "item_ids": list(self.catalogue.item_ids),
                "titles": self.catalogue.titles and list(self.catalogue.titles),
                "item_tokens": self.trie.item_tokens.tolist(),
                "training_cost": dict(training_cost or self.training_cost),
            }
            (scratch / SIDE_FILE).write_text(json.dumps(side), encoding="utf-8")
            os.chmod(scratch, 0o755)
            if target.exists():
                shutil.rmtree(target)
            os.replace(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

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
        """
        tokens = torch.where(history[..., None] >= 0, self.trie.item_tokens[history.clamp(min=0)], -1).flatten(1)
        tokens = nn.functional.pad(tokens, (1, 0), value=self.bos_token_id)
        real = tokens >= 0
        tokens = tokens.gather(1, torch.argsort(real.to(torch.int8), dim=1, stable=True))
        tokens = tokens[:, tokens.shape[1] - int(real.sum(dim=1).max()) :]
        mask = (tokens >= 0).to(torch.int64)
        return torch.where(mask.bool(), tokens, self.pad_token_id), mask

    def prompt_states(self, batch: Batch) -> Tensor:
        """Last hidden state of each prompt, float [B, D]; neighbours with the same history are run once."""
        history, row = torch.unique_consecutive(batch["history"], dim=0, return_inverse=True)
        return self._run_prompt(history, use_cache=False)[0][row]

    def prompt_tokens(self, batch: Batch) -> int:
        """Tokens that `prompt_states` feeds through the model, padding not counted."""
        return int(self.encode(torch.unique_consecutive(batch["history"], dim=0))[1].sum())

    def _run_prompt(self, history: Tensor, use_cache: bool) -> tuple[Tensor, Tensor, Any]:
        input_ids, mask = self.encode(history)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = self.model.base_model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=use_cache
        )
        return output.last_hidden_state[:, -1], mask, output.past_key_values

    def completion_states(self, batch: Batch, items: Tensor) -> CompletionStates:
        """Runs each prompt once, then the G completions on its shared cache, differentiably.

        Args:
            batch: with `history` int64 [B, W].
            items: int64 [B, G], item index.
        """
        n_rows, group = items.shape
        if self.id_length == 1:
            prompt = self.prompt_states(batch)
            return CompletionStates(prompt, prompt.new_empty(n_rows, group, 0, prompt.shape[-1]))
        prompt, mask, cache = self._run_prompt(batch["history"], use_cache=True)
        cache.batch_repeat_interleave(group)
        tokens = self.trie.item_tokens[items.flatten()][:, :-1]
        fed = (tokens >= 0).to(mask.dtype)
        mask = torch.cat([mask.repeat_interleave(group, dim=0), fed], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self.model.base_model(
            input_ids=torch.where(tokens >= 0, tokens, self.pad_token_id),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return CompletionStates(prompt, output.last_hidden_state.unflatten(0, (n_rows, group)))

    def _child_logps(
        self, states: Tensor, depth: int, low: Tensor, high: Tensor, counts: Tensor, temperature: float
    ) -> Tensor:
        tokens, _, _ = self.trie.level(depth)
        head = self.model.get_output_embeddings()
        bias = None if head.bias is None else head.bias[tokens]
        logits = nn.functional.linear(states, head.weight[tokens], bias).float() / temperature
        allowed = self.trie.allowed_children(depth, low, high, counts)
        return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).log_softmax(dim=-1)

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
            logps float32 [B, G, L] (0 where masked), mask bool [B, G, L], entropy float32 [B, G, L] in nats.
        """
        group = items.shape[1]
        child = self.trie.child_of[items]
        root = self.root_logps(states.prompt, seen, temperature)
        logps = [root.gather(1, child[:, :, 0])]
        entropies = [_entropy(root)[:, None].expand(-1, group)]
        counts = self.trie.available_below(seen).repeat_interleave(group, dim=0) if self.id_length > 1 else None
        for depth in range(1, self.id_length):
            assert counts is not None
            _, lows, highs = self.trie.level(depth - 1)
            parent = child[:, :, depth - 1].flatten().clamp(min=0)
            rows = self._child_logps(
                states.rest[:, :, depth - 1].flatten(0, 1), depth, lows[parent], highs[parent], counts, temperature
            )
            logps.append(rows.gather(1, child[:, :, depth].flatten()[:, None].clamp(min=0)).view_as(items))
            entropies.append(_entropy(rows).view_as(items))
        mask = child >= 0
        return (
            torch.stack(logps, dim=-1).masked_fill(~mask, 0.0),
            mask,
            torch.stack(entropies, dim=-1).masked_fill(~mask, 0.0),
        )

    def completion_logps(self, batch: Batch, items: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """`head_logps` of `completion_states`: (logps, mask, entropy), each [B, G, L]."""
        return self.head_logps(self.completion_states(batch, items), items, batch["seen"], temperature)

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
            prompt, mask, cache = self._run_prompt(batch["history"], use_cache=self.id_length > 1)
            options = (temperature, top_k, top_p, generator)
            return self._sample(prompt, mask, cache, batch["seen"], num_generations, *options)

    def sample_from(self, root: Tensor, num_generations: int, generator: torch.Generator | None = None) -> Tensor:
        """Samples items of one-token ids from `root_logps`, int64 [B, G], without another forward pass."""
        _, low, _ = self.trie.level(0)
        child = torch.multinomial(root.exp(), num_generations, replacement=True, generator=generator)
        return self.trie.order[low[child]]

    def _sample(
        self,
        prompt: Tensor,
        mask: Tensor,
        cache: Any,
        seen: Tensor,
        group: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: torch.Generator | None,
    ) -> Rollouts:
        root = filter_logps(self.root_logps(prompt, seen, temperature), top_k, top_p)
        child = torch.multinomial(root.exp(), group, replacement=True, generator=generator)
        logps = [root.gather(1, child).flatten()]
        alive = [torch.ones_like(logps[0], dtype=torch.bool)]
        child = child.flatten()
        tokens, lows, highs = self.trie.level(0)
        low, high, fed = lows[child], highs[child], tokens[child]
        if self.id_length > 1:
            counts = self.trie.available_below(seen).repeat_interleave(group, dim=0)
            cache.batch_repeat_interleave(group)
            mask = mask.repeat_interleave(group, dim=0)
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
            pick = torch.multinomial(rows.exp(), 1, generator=generator).flatten()
            tokens, lows, highs = self.trie.level(depth)
            logps.append(torch.where(open_, rows.gather(1, pick[:, None]).flatten(), 0.0))
            alive.append(open_)
            low, high = torch.where(open_, lows[pick], low), torch.where(open_, highs[pick], high)
            fed = torch.where(open_, tokens[pick], self.pad_token_id)
        shape = (len(prompt), group)
        return Rollouts(
            self.trie.order[low].view(shape),
            torch.stack(logps, dim=-1).view(*shape, -1),
            torch.stack(alive, dim=-1).view(*shape, -1),
        )

    def item_logps(self, batch: Batch, chunk: int = 256) -> Tensor:
        """Exact log-probability of every item, float32 [B, n_items]; seen items get the lowest finite value.

        One forward pass for one-token ids; longer ids are teacher-forced `chunk` items at a time.
        """
        with evaluation_mode(self):
            lowest = torch.finfo(torch.float32).min
            if self.id_length == 1:
                scores = self.root_logps(self.prompt_states(batch), batch["seen"])[:, self.trie.child_of[:, 0]]
            else:
                every = torch.arange(self.trie.n_items, device=batch["history"].device)
                rows = len(batch["history"])
                scores = torch.cat(
                    [
                        self.completion_logps(batch, part.expand(rows, -1))[0].sum(dim=-1)
                        for part in torch.split(every, chunk)
                    ],
                    dim=1,
                )
            return scores.clamp(min=lowest)

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
            columns = torch.arange(sequence.shape[1], device=sequence.device)
            history = sequence[row].masked_fill(columns > position[:, None], -1)
            nothing = torch.full((len(row), 1), -1, device=row.device)
            logps, _, _ = self.completion_logps({"history": history, "seen": nothing}, target[:, None])
            return -logps.sum() / max(1, len(target))
        tokens = torch.where(sequence >= 0, self.trie.item_tokens[sequence.clamp(min=0), 0], self.pad_token_id)
        tokens = nn.functional.pad(tokens, (1, 0), value=self.bos_token_id)
        embeddings = nn.functional.dropout(self.model.get_input_embeddings()(tokens), dropout, self.training)
        states = self.model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[row, position + 1]
        states = nn.functional.dropout(states, dropout, self.training)
        head = self.model.get_output_embeddings()
        logits = nn.functional.linear(states, head.weight, head.bias)[:, self.trie.item_tokens[:, 0]]
        return nn.functional.cross_entropy(logits.float(), target, reduction="sum") / max(1, len(target))


def _entropy(logps: Tensor) -> Tensor:
    return -(logps.exp() * logps).sum(dim=-1)
