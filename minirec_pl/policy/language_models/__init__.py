"""Causal language models: loaded, adapted, run on padded and shared prompts, sampled from, and measured."""
