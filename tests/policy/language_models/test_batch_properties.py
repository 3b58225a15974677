"""A row's result does not depend on the rest of its batch: order, duplicates, padding, buckets, tiles and portions."""

import functools

import pytest
import torch
from helpers.batch_cases import Case, Entry, close, drawn, in_float64, laws, limits, pad_columns, widened
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from minirec_pl.grpo.loss import eos_mask
from minirec_pl.policy.language_models import causal_lm
from minirec_pl.policy.language_models.causal_lm import Head, body_of, run_completions, run_prompts
from minirec_pl.policy.language_models.generation import Sampling, generate
from minirec_pl.policy.language_models.logps import completion_logps, completion_states, head_logps, token_logps

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable", "ignore:None of the inputs")

PAD, EOS, VOCABULARY, LONGEST = 0, (2, 5), 24, 60
SIZES = {
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 128}
    | dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0),
    "llama": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
}


@functools.cache
def model_of(kind, recomputes=False):
    """A tiny model in float64; one that recomputes, in training mode, runs each completion behind its own prompt."""
    torch.manual_seed(0)
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": list(EOS)}
    model = in_float64(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES[kind], **tokens)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    if not recomputes:
        return model.eval()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model.train()


def any_model(case, recomputes=False):
    return model_of(case.pick("gpt2", "llama"), recomputes)


def prompts_of(case):
    """Prompts of 1 to 60 tokens, padded on the left."""
    ids, real = case.padded(case.lengths(1, LONGEST), 6, VOCABULARY, left=True, fill=PAD)
    return {"ids": ids, "mask": real.long()}


def completions_of(case, shortest=0):
    """G completions of each prompt of at most L tokens, padded on the right with a token like any other."""
    group, longest = case.count(1, 4), case.pick(1, 5, 12)
    lengths = torch.tensor(case.lengths(shortest, longest, case.n * group), dtype=torch.int64)
    counts = torch.arange(longest) < lengths.view(case.n, group, 1)
    return {"tokens": case.integers(3, VOCABULARY, case.n, group, longest), "counts": counts}


def pad_prompts(case, *more):
    return lambda part: pad_columns(case, part, left=[("ids", PAD), ("mask", 0)], right=more)


def pad_sequences(case):
    return pad_prompts(case, ("tokens", 7), ("counts", False))


def prompts_and_completions(case):
    """`run_prompts`, whose caches are seen through the states of completions that follow."""
    model = any_model(case)

    def run(batch):
        with torch.no_grad():
            row = case.permutation(len(batch["ids"]))  # which of the prompts each sample has
            ids, mask = batch["ids"][torch.argsort(row)], batch["mask"][torch.argsort(row)]
            prompt = run_prompts(body_of(model), ids, mask, row)
            group, tokens, fed = batch["tokens"].shape[1], batch["tokens"].flatten(0, 1), batch["counts"].flatten(0, 1)
            order = case.permutation(len(tokens))
            sample = torch.arange(len(row)).repeat_interleave(group)[order]
            states = torch.empty(*tokens.shape, prompt.states.shape[-1], dtype=torch.float64)
            states[order] = run_completions(prompt, sample, tokens[order], fed[order])
            states = states.masked_fill(~fed[..., None], 0.0)
            return {"prompt": prompt.states, "states": of_width(states.view(*batch["tokens"].shape, -1), 2)}

    return Entry(run, {**prompts_of(case), **completions_of(case)}, pad_sequences(case))


def of_width(values, dimension):
    """Padded with zeros to 16 tokens."""
    return widened(values.movedim(dimension, -1), 16).movedim(-1, dimension)


def states_of_completions(case):
    """The states that produce tokens, of prompts that are shared, have been run, or are run again each time."""
    kind = case.pick("gpt2", "llama")

    def run(batch):
        way = case.pick("shared", "ran", "separate")
        model = model_of(kind, recomputes=way == "separate")
        prompts, completions = (batch["ids"], batch["mask"]), (batch["tokens"], batch["counts"])
        with torch.no_grad():
            prompt = run_prompts(body_of(model), *prompts) if way == "ran" else None
            states = completion_states(model, *prompts, *completions, prompt)
        return {"states": of_width(states.masked_fill(~batch["counts"][..., None], 0.0), 2)}

    return Entry(run, {**prompts_of(case), **completions_of(case)}, pad_sequences(case))


def logps_of_completions(case):
    model, temperature = any_model(case), case.pick(1.0, 0.6)

    def run(batch):
        with torch.no_grad():
            found = completion_logps(model, *batch.values(), temperature)
        return {"logps": widened(found.logps, 16), "entropy": widened(found.entropy, 16)}

    return Entry(run, {**prompts_of(case), **completions_of(case)}, pad_sequences(case))


def logps_of_tokens(case):
    model = any_model(case)

    def run(batch):
        with torch.no_grad():
            found = token_logps(model, batch["states"], batch["tokens"], batch["counts"], 0.7)
        return {"logps": widened(found.logps, 16), "entropy": widened(found.entropy, 16)}

    batch = completions_of(case)
    states = case.normal(*batch["tokens"].shape, 8)

    def pad(part):
        more = case.count(0, 3)
        part = {name: torch.nn.functional.pad(part[name], (0, more)) for name in ("tokens", "counts")} | {
            "states": torch.nn.functional.pad(part["states"], (0, 0, 0, more), value=5.0)
        }
        return part

    return Entry(run, {"states": states, **batch}, pad)


def logps_of_the_head(case):
    """With the gradient of the states; that of the weight is a sum over rows."""
    softcap, bias = case.pick(None, 2.0), case.pick(None, case.normal(VOCABULARY))
    head, temperature = Head(case.normal(VOCABULARY, 3), bias, softcap), case.pick(1.0, 0.5)

    def run(batch):
        tile = case.pick(None, (1, 9), (2, 5), (4, 30))
        states = batch["states"].clone().requires_grad_()
        logps, entropy = head_logps(head, states, batch["target"], temperature, tile)
        (slope,) = torch.autograd.grad((logps * batch["slope"]).sum(), states)
        return {"logps": logps.detach(), "entropy": entropy, "slope": slope}

    slope = case.normal(case.n) * case.flags(case.n, share=0.7)
    target = case.integers(0, VOCABULARY, case.n)
    return Entry(run, {"states": 2 * case.normal(case.n, 3), "target": target, "slope": slope})


def logits(case):
    """Of a head that is long for its few rows."""
    head = Head(case.normal(VOCABULARY, 3), case.pick(None, case.normal(VOCABULARY)), case.pick(None, 2.0))

    def run(batch):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(causal_lm, "_LONG_HEAD", case.pick(1, 2**14))
            patch.setattr(causal_lm, "_FEW_ROWS", case.pick(0, 4, 96))
            return {"logits": head.logits(batch["states"])}

    return Entry(run, {"states": case.normal(case.n, *case.pick((), (2,)), 3)})


def free_generation(case):
    model, group, length = any_model(case), case.count(1, 4), case.pick(1, 4, 7)
    strategy = case.pick("sample", "sample", "greedy")
    options = case.pick({}, {"top_k": 4}, {"top_p": 0.7})
    sampling = Sampling(strategy, temperature=case.pick(1.0, 0.7), **options)

    def run(batch):
        with torch.no_grad():
            prompts = batch["ids"], batch["mask"]
            ran = run_prompts(body_of(model), *prompts) if case.pick(False, True) else None
            uniform = batch["uniform"] if strategy == "sample" else None
            made = generate(model, *prompts, group, length, sampling=sampling, uniform=uniform, prompt=ran)
        return {name: widened(values, length) for name, values in made._asdict().items()}

    batch = {**prompts_of(case), "uniform": case.uniform(case.n, group, length)}
    return Entry(run, batch, pad_prompts(case))


def masks_of_ends(case):
    def run(batch):
        masks = {f"{cut}": eos_mask(batch["tokens"], EOS, mask_truncated_completions=cut) for cut in (False, True)}
        return masks

    return Entry(run, {"tokens": case.integers(2, 8, case.n, case.count(1, 4), case.count(1, 12))})


test_a_completion_depends_on_its_own_prompt_alone, test_no_prompts_at_all = laws(
    {
        "run_prompts and run_completions": prompts_and_completions,
        "completion_states": states_of_completions,
        "completion_logps": logps_of_completions,
        "token_logps": logps_of_tokens,
        "head_logps": logps_of_the_head,
        "Head.logits": logits,
        "generate": free_generation,
        "eos_mask": masks_of_ends,
    },
)


def gradients_of(function, parameters):
    return dict(enumerate(torch.autograd.grad(function(), parameters, allow_unused=True)))


def close_gradients(found, expected):
    for name, value in expected.items():
        assert (found[name] is None) == (value is None)
        if value is not None:
            close(found[name], value, f"gradient {name}")


@drawn
def test_the_gradient_of_completions_is_the_sum_of_those_of_parts(data):
    case = Case(data, data.draw(st.integers(1, 5)))
    model = any_model(case)
    batch = {**prompts_of(case), **completions_of(case)}
    batch["weight"] = case.normal(*batch["tokens"].shape)

    def total(rows):
        part = {name: values[rows] for name, values in batch.items()}
        weight = part.pop("weight")
        return (completion_logps(model, *part.values()).logps * weight).sum()

    parameters = list(model.parameters())
    order = case.permutation(case.n)
    with limits(case):
        whole = gradients_of(lambda: total(torch.arange(case.n)), parameters)
    with limits(case):
        parts = [total(rows) for rows in torch.split(order, case.count(1, case.n))]
        close_gradients(gradients_of(lambda: torch.stack(parts).sum(), parameters), whole)


@drawn
def test_the_gradient_of_the_head_is_the_sum_of_those_of_parts(data):
    case = Case(data, data.draw(st.integers(1, 9)))
    entry = logps_of_the_head(case)
    weight, bias = case.normal(VOCABULARY, 3).requires_grad_(), case.normal(VOCABULARY).requires_grad_()

    def total(rows):
        tile = case.pick(None, (1, 9), (2, 5), (4, 30))
        states, target, slope = (values[rows] for values in entry.batch.values())
        return (head_logps(Head(weight, bias, None), states, target, 1.0, tile)[0] * slope).sum()

    whole = gradients_of(lambda: total(torch.arange(case.n)), [weight, bias])
    parts = [total(rows) for rows in torch.split(case.permutation(case.n), case.count(1, case.n))]
    close_gradients(gradients_of(lambda: torch.stack(parts).sum(), [weight, bias]), whole)
