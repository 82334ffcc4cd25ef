"""Every field of `BitNetV3Config` changes what a short run leaves behind."""

import dataclasses

import pytest
import torch
from bitnet_models import SMALL, batches

import ternc.bitnet_v3 as bitnet_v3
from ternc.errors import InputError

FIELDS = {
    "vocab_size": 65,
    "hidden_size": 64,
    "num_layers": 1,
    "num_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 8,
    "rope_base": 100.0,
    "dropout": 0.5,
    "tie_embeddings": False,
    "progressive_quantization": False,
    "mpq_stages": [{"epochs": 1, "bits": 1.58}],
    "mpq_temperature": "cosine",
    "mpq_mode": "literal",
    "group_size": 16,
    "activation_bits": 4,
    "adaptive_hadamard": False,
    "hadamard_learnable_scale": False,
    "hadamard_learnable_shift": False,
    "knowledge_distillation": False,
    "gakd_alpha": 0.1,
    "gakd_beta": 0.9,
    "gakd_gamma": 0.9,
    "gakd_temperature": 1.0,
    "gakd_gradient": "hvp",
    "dynamic_regularization": False,
    "qap_initial_lambda": 100.0,
    "qap_schedule": "constant",
    "qap_decay_rate": 0.1,
    "enhanced_ste": False,
    "ste_momentum": 0.1,
    "ste_power": 1.0,
    "learning_rate": 1e-2,
    "weight_decay": 3.0,
}


def outcome(**changes):
    """Shapes and numbers that a short run leaves behind."""
    changes = {"qap_schedule": "constant", **changes}
    if "qap_decay_rate" in changes:
        changes["qap_schedule"] = "decay"
    torch.manual_seed(0)
    config = bitnet_v3.BitNetV3Config(
        **{**SMALL, "dropout": 0.0, "learning_rate": 3e-3, "qap_initial_lambda": 5.0, **changes}
    )
    student = bitnet_v3.BitNetV3Model(config)
    torch.manual_seed(1)
    teacher = bitnet_v3.BitNetV3Model(config, prepared=False)
    trainer = bitnet_v3.BitNetV3Trainer(student, config)
    trainer.set_teacher_model(teacher)
    try:
        trainer.train(batches(), num_epochs=3, eval_every=None)
    except InputError as error:
        return str(error)
    state = {name: tensor.double().sum().item() for name, tensor in student.state_dict().items()}
    return sorted(state.items())


def test_every_field_is_listed():
    assert set(FIELDS) == {field.name for field in dataclasses.fields(bitnet_v3.BitNetV3Config)}


@pytest.fixture(scope="module")
def baselines():
    return {
        "constant": outcome(),
        "ramp": outcome(qap_schedule="ramp"),
        "decay": outcome(qap_decay_rate=0.95),
    }


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_behaviour(field, baselines):
    base = {"qap_schedule": "ramp", "qap_decay_rate": "decay"}.get(field, "constant")
    changed = outcome(**{field: FIELDS[field]})
    assert changed != baselines[base]
