"""A sharded folder: mapped, quantised with and without a text, interrupted, with the same files."""

import hashlib
import itertools
import json

import pytest
import torch

import ternc
from ternc.calibration import resume
from ternc.cli import main
from ternc.errors import CheckpointError
from ternc.pretrained import mapped

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small language model over bytes in several files, its head tied to its embedding."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("sharded")
    transformers.LlamaForCausalLM(config).save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {i} of a text, {i * i} characters of it.\n" for i in range(40)))
    return path


def digests(path):
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.iterdir()
        if file.suffix in (".safetensors", ".json")
    }


def status(folder, out, *options):
    return main(["quantize", str(folder), "-o", str(out), "--planes", "2", *options])


def quantize(folder, out, *options):
    assert status(folder, out, *options) == 0
    return digests(out)


def test_a_mapped_model_is_the_loaded_one_and_its_files_stay(folder):
    before = digests(folder)
    model = mapped("LlamaForCausalLM", folder)
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    ids = torch.randint(256, (1, 9))
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert digests(folder) == before


def test_names_of_another_model_are_left_to_from_pretrained(folder):
    assert mapped("LlamaModel", folder) is None


def test_a_damaged_index_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match="not in the folder"):
        mapped("LlamaForCausalLM", tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="damaged"):
        mapped("LlamaForCausalLM", tmp_path)


def test_two_runs_and_one_interrupted_at_every_layer_write_identical_files(
    folder, text, tmp_path, monkeypatch
):
    options = ["--calibration", str(text), "--context", "32", "--sequences", "24"]
    first = quantize(folder, tmp_path / "first", *options)
    assert quantize(folder, tmp_path / "second", *options) == first

    kept, out = tmp_path / "kept", tmp_path / "third"
    write = resume.Store.write
    for done in itertools.count():
        written = []

        def one_group_then_stop(store, decisions, written=written):
            if written:
                raise KeyboardInterrupt
            written.append(write(store, decisions))

        monkeypatch.setattr(resume.Store, "write", one_group_then_stop)
        if status(folder, out, *options, "--resume", str(kept)) == 0:
            break
        assert not out.exists() and len(list(kept.glob("*.safetensors"))) == done + 1
    assert done == 7, "two blocks of four groups: every one was the last before an interruption"
    assert digests(out) == first

    loaded = ternc.load(out)
    assert all(
        "gptq" in row.reason or "als" in row.reason for row in ternc.report(loaded).rewritten
    )


def test_every_stage_is_reached_from_the_command_line(folder, text, tmp_path, capsys):
    options = "--context 16 --sequences 16 --rotation hadamard --method als --int8 *embed* --json"
    options += " --tuning-epochs 1 --reconstruction-steps 2"
    assert status(folder, tmp_path, *options.split(), "--calibration", str(text)) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    reasons = {row["name"]: row["reason"] for row in rows if row["action"] == "rewritten"}
    layer = reasons["model.layers.1.mlp.down_proj"]
    assert "als" in layer and "reconstruct" in layer and "tun" in layer
    assert {"model.embed_tokens", "lm_head"} <= set(reasons)
    config = ternc.load(tmp_path)._ternc_config
    assert (config.method, config.rotation, config.int8) == ("als", "hadamard", ("*embed*",))
