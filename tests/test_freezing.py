"""Training the extra heads of a model whose own output must not move by a bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtp_fast.models import MTPConfig, MTPTransformer
from mtp_fast.training import TrainConfig, Trainer, multi_token_loss

TOKENS = np.random.default_rng(0).integers(0, 31, 4000).astype(np.uint16)


def small_model(**changes) -> MTPTransformer:
    torch.manual_seed(0)
    return MTPTransformer(MTPConfig(31, 32, 5, 4, 2, 3, 48, 64, **changes))


def train(model: MTPTransformer, route: str, directory, steps: int = 6) -> Trainer:
    config = TrainConfig(
        steps=steps,
        batch_size=2,
        context=32,
        learning_rate=1e-2,
        route=route,
        eval_every=100,
        eval_batches=1,
        freeze_next_token_model=True,
    )
    trainer = Trainer(model, config, TOKENS, TOKENS, directory)
    assert trainer.run()
    return trainer


@pytest.mark.parametrize("route", ["parallel", "headwise"])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True, "dropout": 0.1}, {"qkv_bias": True, "qk_norm": True}]
)
def test_training_leaves_the_next_token_model_as_it_was(route, changes, tmp_path):
    model = small_model(**changes)
    tokens = torch.randint(0, 31, (2, 40))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        before = [model.eval().logits(tokens, k) for k in range(3)]
    trainer = train(model, route, tmp_path)
    with torch.no_grad():
        after = [model.eval().logits(tokens, k) for k in range(3)]
    assert torch.equal(before[0], after[0])
    for k in (1, 2):
        assert (before[k] - after[k]).abs().max() > 1e-2
    for name, parameter in model.named_parameters():
        trained = name.startswith(("heads.1.", "heads.2."))
        assert parameter.requires_grad == trained
        assert torch.equal(parameter, weights[name]) != trained, name
    resumed = Trainer.resume(tmp_path, TOKENS, TOKENS)
    assert resumed.step == trainer.step
    assert not resumed.model.embedding.weight.requires_grad


def test_a_model_of_one_head_has_nothing_to_freeze_for():
    model = MTPTransformer(MTPConfig(31, 32, 2, 4, 2, 1, 48, 64))
    with pytest.raises(ValueError, match="nothing would be left to train"):
        model.freeze_next_token_model()


def test_routes_give_the_extra_heads_the_same_gradients_as_without_freezing():
    tokens = torch.randint(0, 31, (2, 40))
    gradients = []
    for freeze, route in ((False, "parallel"), (True, "parallel"), (True, "headwise")):
        model = small_model()
        if freeze:
            model.freeze_next_token_model()
        multi_token_loss(model, tokens, route=route).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    whole = {n: g for n, g in gradients[0].items() if n.startswith(("heads.1.", "heads.2."))}
    for frozen in gradients[1:]:
        assert frozen.keys() == whole.keys()
        for name, gradient in frozen.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-5, atol=1e-7)
