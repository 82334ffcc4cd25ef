"""`ternc train` and the seed's two commands, from text to a folder and on from a checkpoint."""

import json

import pytest
import torch
from training import text

import ternc
from ternc.bitnet_v3 import cli as bitnet_cli
from ternc.cli import main


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=32, n_layer=1, n_head=2, n_positions=512, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(text(6000).tolist()))
    return path


def test_train_writes_what_it_trained(model_folder, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["train", str(model_folder), "--text", str(text_file), "-o", str(out), "--json"]
    arguments += ["--steps", "40", "--save-every", "20", "--context", "32", "--batch", "4"]
    arguments += ["--learning-rate", "1e-2", "--device", "cpu", "--distil"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 40
    assert result["held_out_loss_packed"] < result["held_out_loss_float"] - 1
    assert {row["action"] for row in result["report"]["rows"]} == {"rewritten", "skipped"}
    packed = ternc.load(out)
    assert any(isinstance(module, ternc.TernaryLinear) for module in packed.modules())
    # The same from the checkpoint in the middle of the run.
    for path in (out / "run" / "epoch-2").iterdir():
        path.unlink()
    assert main([*arguments, "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["held_out_loss_packed"] == result["held_out_loss_packed"]


@pytest.mark.parametrize(
    "extra, words", [(["--context", "400"], "smaller --context"), (["--resume"], "no checkpoint")]
)
def test_mistakes_are_one_line(model_folder, text_file, tmp_path, capsys, extra, words):
    arguments = ["train", str(model_folder), "--text", str(text_file), "-o", str(tmp_path / "o")]
    assert main([*arguments, "--device", "cpu", "--context", "32", *extra]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and words in error[0]


def test_the_seed_commands(text_file, tmp_path, capsys):
    folder = tmp_path / "model"
    arguments = ["--text", str(text_file), "--output-dir", str(folder), "--num-epochs", "4"]
    arguments += ["--hidden-size", "32", "--num-layers", "1", "--num-heads", "2"]
    arguments += ["--context", "60", "--learning-rate", "1e-2"]
    assert bitnet_cli.train(arguments) == 0
    capsys.readouterr()
    assert bitnet_cli.infer([str(folder), "--prompt", "ternary ", "--max-length", "40"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ternary ") and len(printed.encode()) >= 40
    assert bitnet_cli.infer([str(tmp_path / "none"), "--prompt", "a"]) == 1
    assert bitnet_cli.infer([str(folder), "--prompt", ""]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("bitnet-v3: error: ") for line in errors)
