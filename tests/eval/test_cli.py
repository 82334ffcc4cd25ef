"""`ternc eval` on small folders: a language model, an encoder, and what it refuses."""

import json

import pytest
import torch

import ternc
from ternc.cli import main

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """(packed folder, float folder) of a small byte-level language model without a tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("language")
    model.save_pretrained(folder / "float")
    q = ternc.quantize(model, ternc.Config(planes=2, group_size=16))
    ternc.save(q, folder / "packed")
    return folder / "packed", folder / "float"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A short text, read byte by byte.\n" * 6)
    return path


def test_a_language_model(language, text, capsys):
    packed, float_ = map(str, language)
    command = ["eval", packed, "--text", str(text), "--context", "64", "--json"]
    assert main([*command, "--against", float_]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == len(text.read_bytes()) and found["tokens"] == found["bytes"]
    assert 6 < found["bits_per_byte"] < 10  # random weights know nothing
    assert 0 < found["kl"] < 0.1 and 0.5 < found["top1"] <= 1
    assert main([*command, "--limit", "40"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 40


def test_windows_are_no_longer_than_the_model_has_positions(text, tmp_path, capsys):
    config = transformers.GPT2Config(vocab_size=256, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    assert main(["eval", str(tmp_path / "model"), "--text", str(text), "--json"]) == 0
    said = capsys.readouterr()
    assert "windows of 16 tokens, not 512" in said.err
    assert json.loads(said.out)["tokens"] == len(text.read_bytes()) - 1


def test_as_text(language, text, capsys):
    assert main(["eval", str(language[1]), "--text", str(text), "--context", "64"]) == 0
    assert "bits_per_byte" in capsys.readouterr().out


def test_an_encoder_needs_another_model(text, tmp_path, capsys):
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    assert main(["eval", str(tmp_path / "encoder"), "--text", str(text)]) == 1
    assert "--against" in capsys.readouterr().err


def test_tasks_are_given_to_the_harness(language, tmp_path, monkeypatch, capsys):
    seen = []

    def score_tasks(model, tasks, **options):
        seen.append((type(model).__name__, tasks, options))
        return {"letters": {"acc,none": 0.5}}

    monkeypatch.setattr("ternc.eval.score_tasks", score_tasks)
    options = f"--task letters --task-folder {tmp_path} --examples 3 --context 64"
    assert main(["eval", str(language[0]), *options.split()]) == 0
    assert capsys.readouterr().out.split() == ["letters", "acc,none", "0.5000"]
    (name, tasks, given), *_ = seen
    assert (name, tasks, given["limit"], given["folder"]) == (
        "LlamaForCausalLM", ["letters"], 3, tmp_path,
    )  # fmt: skip
    assert main(["eval", str(language[0])]) == 1
    assert "--text FILE or --task" in capsys.readouterr().err
