"""`ternc generate` and `ternc bench` on small folders, packed and float."""

import json

import pytest
import torch
from torch import nn

import ternc
from ternc.cli import bench, main

transformers = pytest.importorskip("transformers")


def decoder(**changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 256,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "eos_token_id": None,
            **changes,
        }
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of one byte-level decoder, "float" and "packed"."""
    root = tmp_path_factory.mktemp("decoder")
    model = decoder()
    model.save_pretrained(root / "float")
    packed = ternc.quantize(model, ternc.Config(planes=2, group_size=16, activation_bits=None))
    ternc.save(packed, root / "packed")
    return {"float": (root / "float", model), "packed": (root / "packed", packed)}


def last_error(capsys):
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    return error[0]


@pytest.mark.parametrize("kind", ["float", "packed"])
def test_generate_is_the_likeliest_byte_of_the_whole_text_each_time(folders, kind, capsys):
    folder, model = folders[kind]
    assert main(["generate", str(folder), "--prompt", "one", "--tokens", "12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ids = torch.tensor([list(b"one")])
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert found["text"] == bytes(ids[0, 3:].tolist()).decode("utf-8", errors="replace")
    assert (found["prompt_tokens"], found["new_tokens"]) == (3, 12)
    assert found["tokens_per_second"] == 12 / found["seconds"]


def test_generate_draws_by_its_seed(folders, capsys):
    def drawn(seed):
        command = ["generate", str(folders["packed"][0]), "--prompt", "a", "--tokens", "24"]
        assert main([*command, "--temperature", "2", "--seed", seed]) == 0
        return capsys.readouterr().out

    first = drawn("1")
    assert first.startswith("a") and first == drawn("1") != drawn("2")


def test_generate_with_a_tokenizer(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["a", "b", "c", "d", "?"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    decoder(vocab_size=5).save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "a c b", "--tokens", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt_tokens"] == 3 and set(found["text"].split()) <= set(words)
    assert len(found["text"].split()) == found["new_tokens"] == 4


def test_generate_by_an_encoder_and_decoder(tmp_path, capsys):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=256, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "one", "--tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 5


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", "a", "--tokens", "64"], "64 positions"),
        (["--prompt", "a", "--tokens", "0"], "at least 1 token"),
        (["--prompt", "a", "--temperature", "-1"], "no negative temperature"),
    ],
)
def test_mistakes_of_generate_are_named(folders, extra, words, capsys):
    assert main(["generate", str(folders["packed"][0]), *extra]) == 1
    assert words in last_error(capsys)


def test_generate_refuses_a_model_without_a_head(tmp_path, capsys):
    decoder().model.save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 1
    assert "generates no text" in last_error(capsys)


@pytest.mark.parametrize("kind", ["float", "packed"])
def test_bench_times_every_form(folders, kind, capsys):
    options = ["--tokens", "1", "3", "--rounds", "2", "--inner", "eager", "--device", "cpu"]
    own = ["--planes", "1"] if kind == "float" else []
    assert main(["bench", str(folders[kind][0]), *options, *own, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["tokens"], row["form"]): row for row in found["rows"]}
    assert set(rows) == {(n, form) for n in (1, 3) for form in ("float", "packed", "ternc")}
    for (tokens, form), row in rows.items():
        assert row["milliseconds"] > 0
        base = rows[tokens, "float"]["milliseconds"]
        assert row["speed"] == pytest.approx(base / row["milliseconds"])
        assert bool(row["kernels"]) == (form != "float")
    assert rows[3, "ternc"]["difference"] < 1e-2 and rows[3, "packed"]["difference"] is None
    assert found["bytes"]["packed"] < found["bytes"]["float"]
    assert "1 of 8 weights stay floating point" in found["note"]
    assert ("random weights" in found["note"]) == (kind == "packed")


def test_bench_of_models_without_cache_or_tokens(tmp_path, capsys):
    torch.manual_seed(0)
    text = transformers.DistilBertConfig(
        vocab_size=64, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=16
    )
    image = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    )  # fmt: skip
    transformers.DistilBertModel(text).save_pretrained(tmp_path / "text")
    transformers.ViTModel(image).save_pretrained(tmp_path / "image")
    for name, tokens in (("text", [5]), ("image", [None])):
        command = ["bench", str(tmp_path / name), "--tokens", "5", "--rounds", "1", "--json"]
        assert main([*command, "--inner", "eager", "--device", "cpu"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert [row["tokens"] for row in rows] == 3 * tokens


def test_bench_of_a_layer_goes_round_its_copies(monkeypatch):
    monkeypatch.setattr(bench, "ROTATED", 1 << 16)
    copies, seen = bench._copies(nn.Linear(64, 48)), []
    assert len(copies) == 6 and len({copy.weight.data_ptr() for copy in copies}) == 6
    for copy in copies:
        copy.register_forward_hook(lambda module, *_: seen.append(module))
    call = bench._call(copies, ((torch.randn(2, 64),), {}), "cpu")
    for _ in range(8):
        call()
    assert seen == copies + copies[:2]


def test_bench_shows_a_wrong_answer(monkeypatch, capsys):
    def wrong(gm, example_inputs, **_):
        return lambda *args: tuple(2 * out for out in gm(*args))

    monkeypatch.setattr(bench, "ROTATED", 1)
    monkeypatch.setattr("ternc.backend.ternc_backend", wrong)
    command = ["bench", "--layer", "16", "16", "--tokens", "1", "--inner", "eager", "--json"]
    assert main([*command, "--rounds", "1", "--device", "cpu"]) == 0
    rows = {row["form"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["ternc"]["difference"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--planes", "1"], "is packed"),
        (["--tokens", "65"], "64 positions"),
        (["--rounds", "0"], "positive numbers"),
    ],
)
def test_mistakes_of_bench_are_named(folders, extra, words, capsys):
    assert main(["bench", str(folders["packed"][0]), *extra]) == 1
    assert words in last_error(capsys)


@pytest.mark.parametrize("arguments", [[], ["folder", "--layer", "8", "8"]])
def test_bench_takes_a_folder_or_a_layer(arguments):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
