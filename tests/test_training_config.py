"""What a training configuration accepts, and its schedules."""

from __future__ import annotations

import pytest
import torch

from mtp_fast.training import TrainConfig, default_precision


def test_learning_rate_warms_up_and_follows_a_cosine():
    config = TrainConfig(steps=1, learning_rate=1.0, final_learning_rate=0.1, warmup=0.2)
    rates = [config.learning_rate_at(p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.55, 0.1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 1.0}, "give one of steps and minutes"),
        ({"steps": None}, "give one of steps and minutes"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"final_learning_rate": 0.1}, r"in \[0, learning_rate=0.003\], got 0.1"),
        ({"learning_rate": 1e-5}, "final_learning_rate must be in"),
        ({"final_learning_rate": -1e-5}, "final_learning_rate must be in"),
        ({"separator": -1}, "separator must be a token id, got -1"),
        ({"precision": "int8"}, "precision must be"),
        ({"warmup": 1.0}, "warmup must be in"),
        ({"head_weights_warmup": 1.5}, r"head_weights_warmup must be in \[0, 1\], got 1.5"),
        ({"dropout_warmup": -0.1}, "dropout_warmup must be in"),
        ({"head_weights": (1.0, -1.0, 1.0)}, "head_weights must be finite and not negative"),
        ({"head_weights": (1.0, float("nan"), 1.0)}, "head_weights must be finite"),
        ({"compile": True, "dropout_warmup": 0.1}, "dropout_warmup must be 0"),
        ({"head_dropout": (0.0, 1.0, 0.0)}, r"head_dropout must be in \[0, 1\)"),
    ],
)
def test_train_config_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 8, **changes})


def test_default_precision_is_one_that_training_takes():
    TrainConfig(steps=1, precision=default_precision(torch.device("cpu")))
