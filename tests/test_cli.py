"""The command line: help, usage errors, one-line errors, JSON, the flow of the demo."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ternc.cli
from ternc.calibration.reconstruct import Reconstruction
from ternc.calibration.tune import Tuning
from ternc.cli import COMMANDS, main
from ternc.cli.console import config_of
from ternc.cli.options import add_options, given, settings_of
from ternc.config import Config
from ternc.demo.corpus import CorpusError, is_held_out, read_corpus
from ternc.demo.measure import interleaved_medians
from ternc.demo.run import Outcome, Settings, Variant
from ternc.demo.train import bits_per_byte
from ternc.errors import TerncError
from ternc.formats import layouts
from ternc.reporting import Report, Row

ROOT = Path(__file__).parent.parent
FIELDS = {field: getattr(Config(), field) for field in Config().to_dict()}


def exit_status(arguments):
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert exit_status([command, "--help"]) == 0
    assert f"usage: ternc {command}" in capsys.readouterr().out


def test_help_lists_every_command(capsys):
    assert exit_status(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["quantize", "folder"],
        ["explain"],
        ["quantize", "f", "-o", "g", "--planes", "x"],
        ["quantize", "f", "-o", "g", "--method", "greedy"],
        ["quantize", "f", "-o", "g", "--calibration", "no-such-text"],
        ["explain", "f", "--bits-budget", "3"],
        ["generate", "f", "--prompt", "a", "--device", "gpu"],
        ["eval", "f", "--device", "cuda:99"],
    ],
)
def test_usage_errors_exit_with_2(arguments, capsys):
    assert exit_status(arguments) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["explain", "no-such-folder"], "no readable config.json"),
        (["quantize", "no-such-folder", "-o", "out", "--planes", "5"], "planes=5"),
        (["explain", "no-such-folder", "--error-budget", "3"], "error_budget=3.0"),
        (["quantize", "f", "-o", "g", "--bits-budget", "3"], "--bits-budget needs a text"),
        (["quantize", "f", "-o", "g", "--tuning-epochs", "3"], "--tuning needs a text"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(arguments, words, capsys):
    assert exit_status(arguments) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert error[0].startswith("ternc: error: ")
    assert words in error[0]


def test_options_reach_the_configuration(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("ternc.cli.bench.config_of", lambda n: seen.append(config_of(n)))
    monkeypatch.setattr("ternc.cli.huggingface.load_folder", lambda folder: 1 / 0)
    wanted = Config(
        planes=2, error_budget=0.2, bits_budget=3.5, group_size=None, tie_scales=False,
        activation_bits=None, rotation="hadamard", method="als", exclude=("a.*", "b"),
        include=("c",), int8=("d", "e"), seed=7,
    )  # fmt: skip
    changed = [field for field in wanted.to_dict() if getattr(wanted, field) != FIELDS[field]]
    assert changed == list(FIELDS), "every field has an option"
    arguments = (
        "--planes 2 --error-budget 0.2 --bits-budget 3.5 --group-size none --no-tie-scales "
        "--activation-bits none --rotation hadamard --method als --exclude a.* --exclude b "
        "--include c --int8 d --int8 e --seed 7"
    )
    with pytest.raises(ZeroDivisionError):
        main(["bench", "missing", *arguments.split()])
    assert seen == [wanted]


def test_training_options_reach_their_dataclasses():
    parser = argparse.ArgumentParser()
    add_options(parser, Tuning, "tuning")
    add_options(parser, Reconstruction, "reconstruction")
    options = "--tuning-epochs 3 --reconstruction-window 2 --reconstruction-autocast bfloat16"
    namespace = parser.parse_args(options.split())
    assert settings_of(namespace, Tuning) == Tuning(epochs=3)
    assert settings_of(namespace, Reconstruction) == Reconstruction(window=2, autocast="bfloat16")
    assert given(parser.parse_args([]), Tuning) == {}


def test_default_options_are_the_default_configuration(monkeypatch):
    seen = []
    monkeypatch.setattr("ternc.cli.explain.config_of", lambda n: seen.append(config_of(n)))
    exit_status(["explain", "missing"])
    assert seen == [Config()]


def test_python_m_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "ternc", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"ternc {ternc.__version__}")


def test_info_says_what_is_here(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "C++ library" in printed
    assert "kernel on the CPU" in printed


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m ternc info | true"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "")


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["torch"] == torch.__version__
    assert info["gpu"]["available"] == torch.cuda.is_available()
    if info["library"]["path"] is None:
        assert info["library"]["why_not"]
        assert info["isa"] is None
    else:
        assert {isa["name"] for isa in info["isas"]} >= {"scalar", info["isa"]}
    for isa in info["isas"]:
        assert isa["available"] == (isa["why_not"] is None)
    assert [layout["number"] for layout in info["layouts"]] == sorted(layouts.ALL)


@pytest.fixture(scope="module")
def packed_folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    assert main(["quantize", str(model_folder), "-o", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_explain_a_model_folder(model_folder, capsys):
    assert main(["explain", str(model_folder), "--planes", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    linears = [row for row in report["rows"] if row["shape"]]
    assert len(linears) == 7, "six in the layer, one pooler"
    assert all(row["action"] == "rewritten" and "x1" in row["format"] for row in linears)


def test_explain_takes_a_packed_folder_as_it_is(packed_folder, capsys):
    assert main(["explain", str(packed_folder)]) == 0
    assert "packed linear" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["quantize", "train"])
def test_what_needs_float_weights_refuses_packed_ones(command, packed_folder, tmp_path, capsys):
    arguments = [command, str(packed_folder), "-o", str(tmp_path / "out")]
    arguments += ["--text", str(packed_folder / "ternc.json")] if command == "train" else []
    assert main(arguments) == 1
    assert "are packed already" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "train"])
def test_a_model_is_not_overwritten(command, model_folder, monkeypatch, capsys):
    before = (model_folder / "model.safetensors").read_bytes()
    monkeypatch.chdir(model_folder)
    text = ["--text", "config.json"] if command == "train" else []
    assert main([command, str(model_folder), "-o", ".", *text]) == 1
    assert "folder of the model itself" in capsys.readouterr().err
    assert (model_folder / "model.safetensors").read_bytes() == before


def test_explain_writes_a_page(model_folder, tmp_path, capsys):
    page = tmp_path / "out.html"
    arguments = ["explain", str(model_folder), "--html", str(page), "--bandwidth", "20"]
    assert main(arguments) == 0
    text = page.read_text()
    assert model_folder.name in text and '"bandwidth":20000000000.0' in text
    assert "7 of 7 rewritten" in capsys.readouterr().out, "the table is printed all the same"


def test_a_page_that_cannot_be_written_is_one_line(model_folder, tmp_path, capsys):
    assert main(["explain", str(model_folder), "--html", str(tmp_path / "no" / "out.html")]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and "No such file" in error[0]


def test_quantize_a_model_folder(model_folder, tmp_path, capsys):
    output = tmp_path / "packed"
    assert main(["quantize", str(model_folder), "-o", str(output), "--planes", "2"]) == 0
    assert "7 of 7 rewritten" in capsys.readouterr().out
    assert (output / "tokenizer.json").read_text() == "{}"

    from ternc.cli.huggingface import example_inputs, load_model

    model = load_model(model_folder)
    expected = ternc.quantize(model, Config(planes=2))
    with torch.inference_mode():
        inputs = example_inputs(model)
        left, right = ternc.load(output)(**inputs), expected(**inputs)
    assert torch.equal(left.last_hidden_state, right.last_hidden_state)


@pytest.mark.parametrize(
    "config, words",
    [
        ('{"architectures": ["NoSuchModel"]}', "no class 'NoSuchModel'"),
        ('{"architectures": ["AutoTokenizer"]}', "no model class 'AutoTokenizer'"),
        ('{"architectures": [3]}', "is no configuration of a model"),
        ("[]", "is no configuration of a model"),
        ('{"hidden_size": 33, ', "no readable config.json"),
        ('"hidden_size": 32', "does not build a BertModel"),
        ('"vocab_size": 50', "does not build a BertModel"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_in_one_line(
    config, words, model_folder, tmp_path, capsys
):
    """Whatever transformers makes of sizes that do not fit together, or fit no memory."""
    absurd = {
        '"hidden_size": 32': '"hidden_size": 33',
        '"vocab_size": 50': f'"vocab_size": {10**15}',
    }
    if config in absurd:
        text = (model_folder / "config.json").read_text()
        assert config in text
        config = text.replace(config, absurd[config])
        shutil.copyfile(model_folder / "model.safetensors", tmp_path / "model.safetensors")
    elif "Auto" in config:
        shutil.copyfile(model_folder / "model.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    assert main(["explain", str(tmp_path)]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1 and words in error[0]


def test_a_folder_that_names_no_class(model_folder, tmp_path, capsys):
    config = json.loads((model_folder / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copyfile(model_folder / "model.safetensors", tmp_path / "model.safetensors")
    assert main(["explain", str(tmp_path)]) == 0
    assert "7 of 7 rewritten" in capsys.readouterr().out


@pytest.mark.slow
def test_quick_demo_runs_the_whole_flow(capsys):
    status = main(["demo", "--quick", "--json"])
    captured = capsys.readouterr()
    outcome = json.loads(captured.out)
    variants = {variant["name"]: variant for variant in outcome["variants"]}
    assert set(variants) == {
        "eager fp32",
        "ternc planes=auto",
        "ternc planes=1",
        "ternc backend only",
    }
    assert outcome["steps"] > 0
    assert variants["ternc planes=1"]["bytes"] < variants["ternc planes=auto"]["bytes"]
    assert variants["ternc planes=auto"]["bytes"] < variants["eager fp32"]["bytes"]
    assert variants["ternc backend only"]["bytes"] > variants["eager fp32"]["bytes"]
    near = variants["eager fp32"]["bits_per_byte"]
    assert variants["ternc planes=auto"]["bits_per_byte"] == pytest.approx(near, rel=0.05)
    kernels = [
        row["kernel"]
        for report in outcome["reports"].values()
        for row in report["rows"]
        if row["action"] == "rewritten" and row["shape"]
    ]
    assert len(kernels) == 3 * 7, "q, k, v, out, gate, up, down; the head stays"
    on_reference = any(kernel in (None, "reference") for kernel in kernels)
    assert status == (1 if on_reference else 0), captured.err


def outcome(kernel):
    row = Row("layer", "linear", "rewritten", "why", shape=(4, 4), kernel=kernel)
    variant = Variant("eager fp32", 1.0, 100, 0.1, 0.1)
    reports = {"ternc planes=auto": Report([row])}
    return Outcome(Settings.quick(), 1, 1, 1, [variant], reports)


@pytest.mark.parametrize("kernel, status", [("scalar", 0), ("reference", 1), (None, 1)])
def test_demo_fails_where_no_kernel_ran(kernel, status, monkeypatch, capsys):
    monkeypatch.setattr("ternc.cli.demo.run_demo", lambda settings, say: outcome(kernel))
    assert main(["demo", "--quick"]) == status
    assert ("no kernel ran layer" in capsys.readouterr().err) == bool(status)


def test_corpus_parts_share_no_file(tmp_path):
    names = [f"module_{i}.py" for i in range(60)]
    for name in names:
        (tmp_path / name).write_text(f"# {name}\n" * 20)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_module.py").write_text("# left out\n")
    corpus = read_corpus(tmp_path, context=16)
    train, held_out = bytes(corpus.train.tolist()), bytes(corpus.held_out.tolist())
    assert corpus.files == 60
    assert b"left out" not in train + held_out
    for name in names:
        line = f"# {name}\n".encode()
        assert (line in held_out, line in train) == (is_held_out(name), not is_held_out(name))


def test_empty_corpus_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match="0 source files"):
        read_corpus(tmp_path)
    assert issubclass(CorpusError, TerncError)


def test_bits_per_byte_of_a_uniform_guess_is_8():
    text = torch.arange(0, 200, dtype=torch.uint8)
    uniform = lambda ids: torch.zeros(*ids.shape, 256)  # noqa: E731
    assert bits_per_byte(uniform, text, length=16, windows=4) == pytest.approx(8.0)


def test_bits_per_byte_scores_the_next_byte():
    text = torch.arange(0, 200, dtype=torch.uint8)
    oracle = lambda ids: 100.0 * torch.nn.functional.one_hot(ids + 1, 256)  # noqa: E731
    assert bits_per_byte(oracle, text, length=16, windows=4) == pytest.approx(0.0, abs=1e-6)


def test_medians_take_turns():
    order = []
    medians = interleaved_medians(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warm_up=1
    )
    assert order == ["a", "b"] * 3
    assert set(medians) == {"a", "b"}


def test_folder_loading_stays_offline(model_folder):
    from ternc.cli.huggingface import load_model

    load_model(model_folder)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
