"""Loss and loop: gradients, determinism, resume, signals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mtp_fast.models import MTPConfig, MTPTransformer, load_checkpoint
from mtp_fast.training import TrainConfig, Trainer, multi_token_loss, read_metrics

CONFIG = MTPConfig(
    vocab_size=256,
    dim=32,
    n_layers=4,
    n_attention_heads=2,
    n_kv_heads=1,
    n_future_tokens=3,
    ffn_dim=64,
    max_seq_len=64,
)
TRAIN = TrainConfig(
    steps=8, batch_size=2, context=24, eval_every=3, eval_batches=2, checkpoint_every=3
)


def new_model(**changes) -> MTPTransformer:
    torch.manual_seed(0)
    return MTPTransformer(dataclasses.replace(CONFIG, **changes))


def random_tokens(seed: int = 0, count: int = 4000) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count).astype(np.uint8)


def new_trainer(directory, model=None, train=None, **changes) -> Trainer:
    train = random_tokens() if train is None else train
    return Trainer(
        model or new_model(), dataclasses.replace(TRAIN, **changes), train, train, directory
    )


def logged_losses(directory) -> list[list[float]]:
    return [metrics.loss for metrics in read_metrics(directory)]


def test_loss_is_the_sum_of_the_heads_cross_entropies():
    model, tokens = new_model(), torch.randint(0, 256, (2, 20))
    document_ids = (torch.arange(20) >= 11).long().expand(2, -1)
    weights = [1.0, 0.5, 0.25]
    loss, stats = multi_token_loss(
        model, tokens, head_weights=weights, document_ids=document_ids, return_stats=True
    )
    expected = []
    for k in range(3):
        logits, target = model.logits(tokens, k)[:, : -1 - k], tokens[:, 1 + k :].clone()
        target[document_ids[:, 1 + k :] != document_ids[:, : -1 - k]] = -100
        expected.append(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
    torch.testing.assert_close(stats.loss, torch.stack(expected).detach())
    torch.testing.assert_close(loss, sum(w * e for w, e in zip(weights, expected, strict=True)))


def test_loss_rejects_an_unknown_route():
    with pytest.raises(ValueError, match=r"route must be .* got 'serial'"):
        multi_token_loss(new_model(), torch.zeros(1, 8, dtype=torch.int64), route="serial")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"dropout": 0.3}])
def test_both_routes_have_the_same_gradients(precision, changes):
    model, tokens = new_model(**changes), torch.randint(0, 256, (2, 20))
    options = {
        "head_weights": [1.0, 0.5, 0.25],
        "document_ids": (torch.arange(20) >= 11).long().expand(2, -1),
        "return_stats": True,
    }
    results = []
    for route in ("parallel", "headwise"):
        torch.manual_seed(7)
        model.zero_grad()
        for _ in range(2):  # gradients add up over micro-batches
            with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
                loss, stats = multi_token_loss(model, tokens, route=route, **options)
            (loss * 0.5).backward()
        results.append((loss, stats, {n: p.grad for n, p in model.named_parameters()}))
    (loss, stats, gradients), (loss_, stats_, gradients_) = results
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    if precision == torch.bfloat16:
        tolerance = {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(loss_, loss, **tolerance)
    torch.testing.assert_close(tuple(stats_), tuple(stats), **tolerance)
    assert gradients_.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(gradients_[name], gradients[name], **tolerance, msg=name)


def test_headwise_keeps_one_heads_activations(monkeypatch):
    """When a head starts, no tensor is alive that another head saved for its backward."""

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    model, saved, counts = new_model(), weakref.WeakSet(), []

    def pack(tensor):
        box = Saved(tensor)
        saved.add(box)
        return box

    def head(x, k):
        counts.append(len(saved))
        return MTPTransformer.head(model, x, k)

    monkeypatch.setattr(model, "head", head)
    tokens = torch.randint(0, 256, (2, 20))
    for route in ("parallel", "headwise"):
        counts.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            loss = multi_token_loss(model, tokens, route=route)
        of_trunk = counts[0]
        assert of_trunk > 0
        if route == "parallel":  # the measure sees what it should
            assert counts[2] > counts[1] > of_trunk
        else:
            assert counts == [of_trunk] * 3
        del loss


def test_headwise_leaves_frozen_parameters_alone():
    model, tokens = new_model(), torch.randint(0, 256, (2, 20))
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("heads.1"))
    multi_token_loss(model, tokens, route="headwise").backward()
    assert {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None} == {"1"}
    with pytest.raises(ValueError, match=r"head_weights must be \(3,\)"):
        multi_token_loss(model, tokens, route="headwise", head_weights=[1.0])


def test_trainer_rejects_a_context_beyond_the_model(tmp_path):
    with pytest.raises(ValueError, match="context=65 exceeds the model's max_seq_len=64"):
        new_trainer(tmp_path, context=65)


def test_trainer_rejects_a_separator_beyond_the_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="separator=256 is not in the vocabulary of 256"):
        new_trainer(tmp_path, separator=256)


@pytest.mark.parametrize("name", ["head_weights", "head_dropout"])
def test_trainer_rejects_a_list_of_another_length(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must have one value for each of 3 heads, got 2"):
        new_trainer(tmp_path, **{name: (0.5, 0.5)})


def test_later_heads_weights_warm_in(tmp_path):
    trainer = new_trainer(tmp_path, head_weights=(1.0, 0.5, 0.2), head_weights_warmup=0.5)
    module, seen = trainer._loss, []
    trainer._loss = lambda tokens, weights, ids: seen.append(weights) or module(tokens, weights)
    head = trainer.model.heads[1].attention.qkv.weight
    before = head.clone()
    trainer.train_step()
    assert torch.equal(head, before)  # no gradient, and at a learning rate of 0 no decay
    assert trainer.run()
    expected = [[1.0, 0.5 * f, 0.2 * f] for f in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0)]
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(expected))
    assert not torch.equal(head, before)


def test_dropout_warms_in_globally_or_by_head(tmp_path):
    model = new_model(dropout=0.4)
    trainer = new_trainer(tmp_path, model, head_dropout=(0.0, 0.1, 0.2), dropout_warmup=0.5)
    for step in range(6):
        trainer.train_step()
        factor = min(1.0, step / 4)
        assert model.dropout == pytest.approx(0.4 * factor)
        assert model.trunk.blocks[0].dropout == pytest.approx(0.4 * factor)
        of_heads = [head.dropout for head in model.heads]
        assert of_heads == pytest.approx([0.0, 0.1 * factor, 0.2 * factor])
    trainer.save()
    resumed = Trainer.resume(tmp_path, random_tokens(), random_tokens())
    assert resumed.config == trainer.config
    assert resumed.train_step().loss == trainer.train_step().loss


@pytest.mark.parametrize("route", ["parallel", "headwise"])
def test_predictions_across_a_separator_are_not_scored(tmp_path, route):
    trainer = new_trainer(tmp_path, train=random_tokens() % 10, route=route, separator=7)

    def expected(windows):
        losses = []
        for k in range(3):
            logits, target = new_model().logits(windows, k), windows[:, 1 + k :]
            each = F.cross_entropy(logits[:, : -1 - k].mT, target, reduction="none")
            # What lies between: the token that head k predicts from, and those it leaps over.
            inside = [(windows[:, i : i + target.shape[1]] != 7) for i in range(1 + k)]
            losses.append(each[torch.stack(inside).all(0)].mean().item())
        return losses

    validation = [trainer._validation.batch(i) for i in range(TRAIN.eval_batches)]
    mean = np.mean([expected(windows) for windows in validation], axis=0)
    assert trainer.validate() == pytest.approx(mean, rel=1e-5)
    assert trainer.train_step().loss == pytest.approx(expected(trainer._train.batch(0)), rel=1e-5)


def test_matrices_decay_and_norms_do_not(tmp_path):
    model = new_model()
    with torch.no_grad():
        model.embedding.weight[255] = 1.0  # a row without gradient changes by its decay alone
    train = random_tokens() % 200
    trainer = new_trainer(tmp_path, model, train, weight_decay=0.5, warmup=0.0, learning_rate=0.1)
    trainer.train_step()
    torch.testing.assert_close(model.embedding.weight[255], torch.full((32,), 1 - 0.1 * 0.5))
    groups = trainer._optimizer.param_groups
    assert {id(p) for g in groups if not g["weight_decay"] for p in g["params"]} == {
        id(p) for name, p in model.named_parameters() if "norm" in name
    }


def test_gradients_are_clipped(tmp_path):
    trainer = new_trainer(tmp_path, grad_clip=1e-3)
    seen = []
    trainer._optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
        )
    )
    assert trainer.train_step().grad_norm > 0.1
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_training_learns_a_periodic_text(tmp_path):
    tokens = np.frombuffer(b"multi-token prediction! " * 200, np.uint8)
    trainer = new_trainer(tmp_path, train=tokens, steps=120, learning_rate=1e-2, batch_size=8)
    assert trainer.run()
    last = read_metrics(tmp_path)[-1]
    assert last.step == 120
    assert last.tokens == 120 * 8 * 24
    assert all(loss < 0.1 for loss in last.validation_loss)


def test_accumulation_equals_a_larger_batch(tmp_path):
    """Four windows at once, or as two micro-batches that together hold the same windows."""
    tokens = random_tokens()
    parts = new_trainer(tmp_path / "a", train=tokens, accumulation=2)
    whole = new_trainer(tmp_path / "b", train=tokens, batch_size=4)
    batches = [parts._train.batch(0), parts._train.batch(1)]
    whole._train.batch = lambda index: torch.cat(batches)
    one, other = parts.train_step(), whole.train_step()
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    assert one.tokens == other.tokens


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_has_the_same_losses(tmp_path, precision, dropout):
    def trainer(name):
        return new_trainer(tmp_path / name, new_model(dropout=dropout), precision=precision)

    assert trainer("whole").run()
    killed = trainer("killed")
    while killed.step < 5:  # the last checkpoint is of step 3
        killed.train_step()
        if killed.step == 3:
            killed.save()
    del killed
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "tok')  # and the log ends in half a line
    resumed = Trainer.resume(tmp_path / "killed", random_tokens(), random_tokens())
    assert resumed.step == 3
    assert resumed.run()
    assert logged_losses(tmp_path / "whole") == logged_losses(tmp_path / "killed")
    whole, killed_model = (load_checkpoint(tmp_path / n) for n in ("whole", "killed"))
    for a, b in zip(whole.parameters(), killed_model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_and_stops(tmp_path, number):
    trainer = new_trainer(tmp_path)

    def report(metrics):
        if metrics.step == 4:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    assert not trainer.run(report)
    assert signal.getsignal(number) is handler
    resumed = Trainer.resume(tmp_path, random_tokens(), random_tokens())
    assert resumed.step == 4
    assert resumed.run()


def test_a_run_by_the_clock_ends_and_counts_on_after_resume(tmp_path):
    trainer = new_trainer(tmp_path, steps=None, minutes=1.0)
    trainer.train_step()
    assert 0 < trainer.progress < 1
    trainer.seconds = 59.9999
    assert trainer.run()
    assert read_metrics(tmp_path)[-1].validation_loss is not None
    assert Trainer.resume(tmp_path, random_tokens(), random_tokens()).progress == 1


def test_damaged_training_states_are_refused_and_kept(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be resumed: it has no training_state\.pt"):
        Trainer.resume(tmp_path, random_tokens(), random_tokens())
    trainer = new_trainer(tmp_path)
    trainer.train_step()
    trainer.save()
    state = tmp_path / "training_state.pt"
    data = state.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"not a checkpoint"):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"training_state\.pt is damaged"):
            Trainer.resume(tmp_path, random_tokens(), random_tokens())
        assert state.read_bytes() == damaged
    torch.save({"step": 1}, state)
    with pytest.raises(ValueError, match="not of this version"):
        Trainer.resume(tmp_path, random_tokens(), random_tokens())


def test_metrics_are_json_lines(tmp_path):
    new_trainer(tmp_path, steps=3).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["validation_loss"] is None for line in lines] == [True, True, False]
    assert read_metrics(tmp_path / "nowhere") == []


@pytest.mark.slow
@pytest.mark.parametrize("route", ["parallel", "headwise"])
def test_a_compiled_run_has_the_same_losses(tmp_path, route):
    eager = new_trainer(tmp_path / "eager", route=route)
    compiled = new_trainer(tmp_path / "compiled", route=route, compile=True)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert eager.run()
    assert not counters["stats"]
    assert compiled.run()
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    for a, b in zip(
        read_metrics(tmp_path / "eager"), read_metrics(tmp_path / "compiled"), strict=True
    ):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert (a.validation_loss or []) == pytest.approx(b.validation_loss or [], rel=1e-4)
    resumed = Trainer.resume(tmp_path / "compiled", random_tokens(), random_tokens())
    assert resumed.model.state_dict().keys() == eager.model.state_dict().keys()


def test_tensorboard_has_what_the_metrics_have(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mtp_fast.training.tensorboard import TensorBoardLog

    def train(trainer, until):
        with TensorBoardLog(tmp_path / "log", trainer.step) as log:
            while trainer.step < until:
                log.report(trainer.train_step())

    trainer = new_trainer(tmp_path, steps=6)
    train(trainer, 4)
    trainer.save()
    train(trainer, 6)
    time.sleep(1)  # TensorBoard orders logs by the second
    train(Trainer.resume(tmp_path, random_tokens(), random_tokens()), 6)
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    metrics = read_metrics(tmp_path)
    for k in range(3):
        scalars = events.Scalars(f"loss/head_{k}")
        assert [s.step for s in scalars] == [1, 2, 3, 4, 5, 6]
        assert [s.value for s in scalars] == pytest.approx([m.loss[k] for m in metrics])
    validation = events.Scalars("validation/head_2")
    assert [s.step for s in validation] == [3, 6]
    assert validation[1].value == pytest.approx(metrics[5].validation_loss[2])
    for name in ("learning_rate", "grad_norm"):
        values = [s.value for s in events.Scalars(name)]
        assert values == pytest.approx([getattr(m, name) for m in metrics])
