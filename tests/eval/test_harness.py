"""Answers to the harness's requests; a task from a local folder where lm-eval is installed."""

import json
import math
import sys

import pytest
import torch
from torch import nn

from ternc.errors import InputError, MissingExtraError
from ternc.eval import score_tasks
from ternc.eval.harness import Answers, _from_bytes, _to_bytes


class Bigram(nn.Module):
    """Bytes [B, T] -> logits that depend on the last byte alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 256)

    def forward(self, ids):
        return self.table(ids)


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Bigram().eval()
    with torch.no_grad():  # "a" is followed by "b", "b" by "c"
        made.table.weight[ord("a"), ord("b")] = made.table.weight[ord("b"), ord("c")] = 20.0
    return made


def log_p(model, text):
    ids = torch.tensor(list(text.encode()))
    table = model.table.weight.detach().log_softmax(-1)
    return float(table[ids[:-1], ids[1:]].sum())


@pytest.mark.parametrize("before, text, greedy", [("xa", "bc", True), ("a", "bb", False)])
def test_the_likelihood_of_a_continuation(model, before, text, greedy):
    with torch.no_grad():
        for context in (2, 100):
            found, same = Answers(model, _to_bytes, _from_bytes, context).likelihood(before, text)
            assert found == pytest.approx(log_p(model, before[-1] + text), abs=1e-4)
            assert same is greedy


def test_texts_and_continuations(model):
    answers = Answers(model, _to_bytes, _from_bytes, 6)
    with torch.no_grad():
        assert answers.likelihood("", "ab")[0] == pytest.approx(log_p(model, "\nab"), abs=1e-4)
        text = "some text that is longer than a window"
        assert answers.text_likelihood(text) == pytest.approx(log_p(model, "\n" + text), rel=1e-5)
        assert answers.continuation("xa", {"max_gen_toks": 2}) == "bc"
        assert answers.continuation("xa", {"until": "c"}) == "b"
        with pytest.raises(InputError, match="decode="):
            Answers(model, _to_bytes, None, 6).continuation("a", {})


def test_without_the_package_the_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"ternc\[eval\]"):
        score_tasks(model, ["anything"])


TASKS = {
    "letters": """
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
""",
    "lines": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list:
  - metric: bits_per_byte
""",
    "endings": """
output_type: generate_until
doc_to_text: question
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  max_gen_toks: 2
  until: ["c"]
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture
def tasks(tmp_path):
    """A folder with a task of each kind that the harness knows."""
    rows = [
        {"question": "a", "choices": ["bc", "zz"], "answer": 0},
        {"question": "xa", "choices": ["qq", "b"], "answer": 1},
        {"question": "b", "choices": ["zz", "c"], "answer": 0},
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{common}test_split: test{text}")
    return tmp_path


def test_a_local_task_of_every_kind(model, tasks):
    pytest.importorskip("lm_eval")
    scores = score_tasks(model, list(TASKS), folder=tasks)
    assert scores["letters"]["acc,none"] == pytest.approx(2 / 3)
    assert scores["endings"]["exact_match,none"] == pytest.approx(1 / 3)
    texts = ["a", "xa", "b"]
    nats = -sum(log_p(model, "\n" + text) for text in texts)
    bits = nats / math.log(2) / sum(map(len, texts))
    assert scores["lines"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)
    assert score_tasks(model, ["letters"], folder=tasks, limit=1)["letters"]["acc,none"] == 1
    with pytest.raises(InputError, match="no task 'nonsense'"):
        score_tasks(model, ["nonsense"], folder=tasks)
