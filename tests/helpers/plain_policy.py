"""A generative policy by its definition (one sample at a time, no cache, no padding, float64), and small policies."""

import copy
import itertools

import torch

from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy
from minirec_pl.policy.folder import StoredPolicy, write_policy
from minirec_pl.policy.language_models.tiny import build_tiny

CONFIG = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLOSE, LETTERS = 3, (4, 5, 6)


def unequal_ids(n):
    """n token ids of 1 to 4 letters (most of them short), each ended by the closing token, in no order."""
    words = [word for length in (1, 2, 3, 4) for word in itertools.product(LETTERS, repeat=length)]
    words = words[: max(39, n)]
    chosen = [words[i] for i in torch.randperm(len(words), generator=torch.Generator().manual_seed(n)).tolist()[:n]]
    return [[*word, CLOSE] for word in chosen]


def padded(ids):
    longest = max(map(len, ids))
    return torch.tensor([[*tokens, *[-1] * (longest - len(tokens))] for tokens in ids])


def shaken(model):
    """Weights far from zero, so that no two tokens are about equally likely."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def one_token_policy(n_items=12, seed=0, **config):
    torch.manual_seed(seed)
    policy = GenerativePolicy(config={**CONFIG, **config})
    policy.bind(Catalogue([f"i{i}" for i in range(n_items)]))
    shaken(policy.model)
    return policy


def many_token_policy(folder, catalogue=12, seed=0, **config):
    """A policy whose items have ids of 2 to 4 tokens."""
    if isinstance(catalogue, int):
        catalogue = Catalogue([f"i{i}" for i in range(catalogue)])
    torch.manual_seed(seed)
    model = shaken(build_tiny({**CONFIG, **config}, 7))
    write_policy(folder, StoredPolicy(model, catalogue, padded(unequal_ids(len(catalogue))), {}))
    return GenerativePolicy(pretrained=str(folder))


def batch_of(histories, seen, targets=None):
    """Histories padded on the left, seen items on the right."""
    width, most = (max(1, *map(len, [[], *rows])) for rows in (histories, seen))
    batch = {
        "history": torch.tensor([[*[-1] * (width - len(row)), *row] for row in histories]),
        "seen": torch.tensor([[*row, *[-1] * (most - len(row))] for row in seen]),
        "sample_id": torch.arange(len(histories)) + 100,
    }
    return batch if targets is None else {**batch, "target": torch.tensor(targets)}


class PlainPolicy:
    """The same policy in float64, without dropout."""

    def __init__(self, policy):
        self.model = copy.deepcopy(policy.model).double().eval()
        self.ids = [tuple(t for t in row if t >= 0) for row in policy.trie.item_tokens.tolist()]
        self.start = policy.bos_token_id

    def prompt(self, history):
        return [self.start, *(token for item in history for token in self.ids[item])]

    def next_logits(self, tokens):
        return self.model(input_ids=torch.tensor([tokens])).logits[0, -1]

    def steps(self, history, seen, item, temperature=1.0):
        """(log-probability, entropy) of each token of an item's id."""
        known, out = self.prompt(history), []
        logits = self.model(input_ids=torch.tensor([[*known, *self.ids[item][:-1]]])).logits[0, len(known) - 1 :]
        open_ids = [tokens for i, tokens in enumerate(self.ids) if i not in set(seen)]
        for depth, token in enumerate(self.ids[item]):
            prefix = self.ids[item][:depth]
            allowed = sorted({tokens[depth] for tokens in open_ids if tokens[:depth] == prefix})
            logps = (logits[depth, allowed] / temperature).log_softmax(dim=0)
            out.append((logps[allowed.index(token)], -(logps.exp() * logps).sum()))
        return out

    def item_logp(self, history, seen, item, temperature=1.0):
        return sum(logp for logp, _ in self.steps(history, seen, item, temperature))

    def item_logps(self, history, seen, temperature=1.0):
        """float64 [n_items], -inf for seen items."""
        with torch.no_grad():
            return torch.tensor(
                [
                    -torch.inf if i in set(seen) else float(self.item_logp(history, seen, i, temperature))
                    for i in range(len(self.ids))
                ],
                dtype=torch.float64,
            )
