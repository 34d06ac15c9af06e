"""EmuTrainer: the same step for every split of the same data, parts, checkpoints, and losses that are not finite."""

import itertools
import json
import signal

import pytest
import torch
from conftest import BOS, EOS, GOLDENS, image_ids, make_model
from python_processes import TESTS, TWO_PROCESSES, run_python
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.data import IterableDataset
from training_killed_run import make_killable_trainer
from training_run import KeepGradients, TinyCollator, make_arguments, make_samples, run_training
from transformers import TrainingArguments

from modeling_emu import EmuConfig, EmuForMultimodalGeneration
from modeling_emu.training.arguments import EmuTrainingArguments
from modeling_emu.training.checkpoints import get_last_complete_checkpoint
from modeling_emu.training.parts import PARTS, freeze_parts, get_part
from modeling_emu.training.trainer import EmuTrainer, EvaluationShare, count_targets


RELATIVE = 1e-6  # float32, other orders of summation


def make_trainer(tmp_path, model=None, samples=None, **kwargs) -> EmuTrainer:
    return EmuTrainer(
        model=make_model() if model is None else model,
        args=make_arguments(str(tmp_path), **kwargs),
        train_dataset=make_samples() if samples is None else samples,
        eval_dataset=make_samples(),
        data_collator=TinyCollator(),
    )


@pytest.fixture(scope="module")
def reference():
    """One process, four samples at once."""
    return run_training(make_model(), 4)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    make_model().save_pretrained(folder / "model")
    process = run_python(
        *TWO_PROCESSES, str(TESTS / "training_run.py"), str(folder / "model"), str(folder / "outputs.pt")
    )
    assert process.returncode == 0, process.stderr[-6000:]
    return torch.load(folder / "outputs.pt", weights_only=False)


def assert_same_training(got: dict, expected: dict) -> None:
    """Equal gradients of each step and equal weights, by the largest and the mean difference."""
    assert len(got["gradients"]) == len(expected["gradients"]) == 2
    pairs = [*zip(got["gradients"], expected["gradients"], strict=True), (got["weights"], expected["weights"])]
    for got_tensors, expected_tensors in pairs:
        assert got_tensors.keys() == expected_tensors.keys()
        left = torch.cat([got_tensors[name].flatten() for name in expected_tensors])
        right = torch.cat([tensor.flatten() for tensor in expected_tensors.values()])
        difference = (left - right).abs()
        assert difference.max() <= RELATIVE * right.abs().max()
        assert difference.mean() <= RELATIVE * right.abs().mean()
    fields = ("loss", "text_loss", "regression_loss", "num_text_targets", "num_regression_targets")
    for got_log, expected_log in zip(got["logs"][:2], expected["logs"][:2], strict=True):
        for field in fields:
            assert got_log[field] == pytest.approx(expected_log[field], rel=1e-5), field


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "packed"), [(1, 4, False), (2, 2, False), (4, 1, True), (2, 2, True), (1, 4, True)]
)
def test_any_split_in_one_process_gives_the_same_step(reference, batch_size, accumulation, packed):
    assert_same_training(run_training(make_model(), batch_size, accumulation, packed), reference)


@pytest.mark.parametrize("split", ["2 x 2", "2 x 1 x 2", "2 x 2 packed", "fsdp"])
def test_two_processes_give_the_same_step(reference, two_processes, split):
    """One of them has no image in step 1, and no target in step 2; with one sample each, an image and no text."""
    assert_same_training(two_processes[split], reference)


def test_fsdp_shards_the_model(two_processes):
    assert set(two_processes["fsdp"]["sharded"]) == set(two_processes["fsdp"]["weights"])


def test_the_loss_is_the_weighted_mean_over_all_targets(reference):
    model = make_model(text_loss_weight=0.5, regression_loss_weight=3.0)
    logs = run_training(model, 2, 2)["logs"][0]
    assert logs["loss"] == pytest.approx(0.5 * logs["text_loss"] + 3 * logs["regression_loss"], rel=1e-6)
    first = reference["logs"][0]
    assert (logs["text_loss"], logs["num_text_targets"]) == (pytest.approx(first["text_loss"]), 4 + 3 + 4)
    assert (logs["regression_loss"], logs["num_regression_targets"]) == (pytest.approx(first["regression_loss"]), 8)


@pytest.mark.parametrize("supervise", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_counts_are_those_of_the_forward(packed, supervise):
    model = make_model(supervise_image_start=supervise)
    batch = TinyCollator(packed)(make_samples())
    counts = count_targets(batch, model.config)
    del batch["keys"]
    outputs = model(**batch, use_cache=False)
    assert counts.tolist() == [outputs.num_text_targets, outputs.num_regression_targets]


@torch.no_grad()
def test_packed_equals_padded_at_each_position(tiny_model):
    samples = make_samples()
    padded, packed = TinyCollator()(samples), TinyCollator(True)(samples)
    real = padded["attention_mask"].bool()
    del padded["keys"], packed["keys"]
    left, right = tiny_model(**padded, use_cache=False), tiny_model(**packed, use_cache=False)
    assert_close(left.logits[real], right.logits[0], atol=1e-5, rtol=1e-5)
    assert_close(left.regressed_embeds[real], right.regressed_embeds[0], atol=1e-5, rtol=1e-5)


def test_golden_losses(converted_pretrain, tmp_path):
    golden = json.loads((GOLDENS / "pretrain" / "golden.json").read_text())["loss"]
    tensors = load_file(GOLDENS / "pretrain" / "golden.safetensors")
    ids, mask = tensors["loss.input_ids"], tensors["loss.attention_mask"]
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": tensors["pixel_values"][golden["images"]],
        "labels": ids.masked_fill(mask == 0, -100),
    }
    config = EmuConfig.from_pretrained(converted_pretrain)
    config.causal_former_config.dropout = 0.0  # the golden numbers are of a model in evaluation mode
    model = EmuForMultimodalGeneration.from_pretrained(converted_pretrain, config=config)
    trainer = EmuTrainer(
        model=model,
        args=make_arguments(str(tmp_path), batch_size=1),
        train_dataset=[0],
        data_collator=lambda samples: batch,
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["text_loss"] == pytest.approx(golden["text_loss"], rel=1e-5)
    assert logs["regression_loss"] == pytest.approx(golden["regression_mse"], rel=1e-5)
    assert logs["num_text_targets"] == golden["num_text_targets"]
    assert logs["num_regression_targets"] == golden["num_regression_targets"]
    assert logs["loss"] == pytest.approx(golden["text_loss"] + golden["regression_mse"], rel=1e-5)


def test_evaluation_is_exact_for_any_batch_size(tmp_path):
    samples = make_samples()
    batch = TinyCollator()(samples)
    del batch["keys"]
    model = make_model()
    expected = model(**batch)
    for batch_size in (3, 8):
        trainer = make_trainer(tmp_path, model, per_device_eval_batch_size=batch_size)
        metrics = trainer.evaluate()
        assert metrics["eval_text_loss"] == pytest.approx(expected.text_loss.item(), rel=1e-5)
        assert metrics["eval_regression_loss"] == pytest.approx(expected.regression_loss.item(), rel=1e-5)
        assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
        assert metrics["eval_num_text_targets"] == expected.num_text_targets


@pytest.mark.parametrize(("num_samples", "batch_size"), [(0, 1), (1, 1), (3, 1), (4, 2), (7, 2), (5, None)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_evaluate_each_sample_once_and_run_equally_often(num_samples, batch_size, world_size):
    stream = list(range(num_samples)) if batch_size else [[number] for number in range(num_samples)]
    shares = [list(EvaluationShare(stream, batch_size, rank, world_size)) for rank in range(world_size)]
    counted = [sample for share in shares for batch, is_repeated in share if not is_repeated for sample in batch]
    assert sorted(counted) == list(range(num_samples))
    assert len({len(share) for share in shares}) == 1
    assert all(batch for share in shares for batch, _ in share)


@pytest.mark.parametrize("frozen", [[], *([part] for part in PARTS), ["vision", "causal_former", "heads"]], ids=str)
def test_frozen_parts_stay_and_the_others_move_at_their_rates(tmp_path, frozen):
    rates = {"vision": 0.04, "causal_former": 0.1, "language_model": 0.03, "heads": 0.05}
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    named_rates = {f"{part}_learning_rate": rate for part, rate in rates.items() if part != "heads"}
    keep = KeepGradients()
    trainer = EmuTrainer(
        model=model,
        args=make_arguments(str(tmp_path), max_steps=1, freeze=frozen, learning_rate=0.05, **named_rates),
        train_dataset=make_samples(),
        data_collator=TinyCollator(),
        callbacks=[keep],
    )
    trainer.train()
    for name, parameter in model.named_parameters():
        part = get_part(name)
        if part in frozen:
            assert torch.equal(parameter, before[name]), name
            assert name not in keep.gradients[0]
        else:
            gradient = keep.gradients[0][name]
            assert gradient.abs().max() > 0, name
            assert not torch.equal(parameter, before[name]), name
            assert_close(parameter.detach(), before[name] - rates[part] * gradient, atol=1e-6, rtol=1e-5)
    logged = {name: value for name, value in trainer.state.log_history[0].items() if name.endswith("_learning_rate")}
    assert logged == {f"{part}_learning_rate": rate for part, rate in rates.items() if part not in frozen}


def test_each_parameter_is_in_one_group_with_the_decay_of_trainer(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, model, weight_decay=0.05)
    optimizer = trainer.create_optimizer()
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    expected = set(trainer.get_decay_parameter_names(model))
    assert {name for name, parameter in model.named_parameters() if id(parameter) in decayed} == expected
    assert "model.causal_former.queries" in expected
    assert not any("norm" in name or name.endswith("bias") for name in expected)


def test_a_parameter_of_no_part_is_refused(tmp_path):
    model = make_model()
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got 'extra\.weight', expected a name in one of Emu's parts"):
        make_trainer(tmp_path, model).create_optimizer()
    with pytest.raises(ValueError, match=r"got 'extra\.weight'"):
        freeze_parts(model, ["vision"])


def test_wrong_freezing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="freeze: got 'vison', expected some of vision, causal_former"):
        EmuTrainingArguments(output_dir=str(tmp_path), freeze=["vison"])
    with pytest.raises(ValueError, match="parameters to train: got none"):
        make_trainer(tmp_path, freeze=list(PARTS)).train()


def test_plain_training_arguments_work(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to="none", logging_steps=1, save_strategy="no"
    )
    trainer = EmuTrainer(
        model=make_model(), args=arguments, train_dataset=make_samples(), data_collator=TinyCollator()
    )
    trainer.train()
    assert trainer.state.log_history[0]["num_text_targets"] > 0


@pytest.mark.parametrize(("value", "bad_keys"), [("nan", "shard-0:2"), ("inf", "shard-0:2, shard-0:3")])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_samples(tmp_path, value, bad_keys):
    samples, model = make_samples(), make_model()
    if value == "nan":
        samples[2]["pixels"][0, 0, 0, 0] = float("nan")
    else:  # regressed embeddings whose squares are too large for float32
        model.regression_head.weight.data *= 1e25
    batch = TinyCollator()(samples[2:3])
    del batch["keys"]
    assert str(model(**batch).loss.item()) == value
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make_trainer(tmp_path, model, samples, batch_size=1, accumulation=4)
    message = f"loss of step 1: got NaN or infinity.*micro-batches: {bad_keys}$"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_every_process_stops_at_the_loss_of_one_and_names_its_samples(two_processes):
    first, second = two_processes["errors"]
    assert first == second
    assert first.endswith("samples of these micro-batches: shard-0:2, shard-0:3")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = make_killable_trainer(str(tmp_path_factory.mktemp("whole")))
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


@pytest.mark.parametrize(("when", "step", "resumed_from"), [("after_step", 3, 2), ("while_saving", 4, 2)])
def test_a_killed_run_ends_as_if_it_had_not_been_killed(tmp_path, uninterrupted, when, step, resumed_from):
    process = run_python(str(TESTS / "training_killed_run.py"), str(tmp_path), when, str(step))
    assert process.returncode == -signal.SIGKILL, process.stderr[-4000:]
    assert (tmp_path / "checkpoint-4" / "optimizer.pt").exists() == (when == "while_saving")
    assert get_last_complete_checkpoint(tmp_path) == tmp_path / f"checkpoint-{resumed_from}"
    if when == "while_saving":
        with pytest.raises(ValueError, match="expected one that was written to its end"):
            make_killable_trainer(str(tmp_path)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer = make_killable_trainer(str(tmp_path))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, uninterrupted[name]), name
    assert get_last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_only_complete_checkpoints_are_kept_and_resumed(tmp_path):
    with pytest.raises(ValueError, match="got no complete one"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    make_trainer(tmp_path, batch_size=2, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    (tmp_path / "checkpoint-9").mkdir()
    assert get_last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


class EndlessSamples(IterableDataset):
    """A stream, of which Trainer cannot know how many steps an epoch has."""

    def split(self, rank, world_size):
        assert (rank, world_size) == (0, 1)

    def __iter__(self):
        return itertools.cycle(make_samples())


def test_a_run_that_had_taken_its_last_step_takes_no_other(tmp_path):
    """Killed after its last checkpoint and resumed, with a learning rate that is not zero at the end."""
    settings = {"batch_size": 2, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, samples=EndlessSamples(), **settings)
    trainer.train()
    resumed = make_trainer(tmp_path, samples=EndlessSamples(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 1
    untrained = dict(make_model().named_parameters())
    expected = dict(trainer.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert any(not torch.equal(parameter, untrained[name]) for name, parameter in expected.items())


def test_eight_documents_are_learned_by_heart(tmp_path):
    """Both losses go to nothing on documents that the model has seen often enough."""
    samples = make_samples()
    for number, sample in enumerate(samples):
        inner = [token for token in sample["ids"] if token not in (BOS, EOS)]
        sample["ids"] = [BOS, 30 + number, *inner, EOS]  # each can be told from its beginning
        sample["labels"] = [-100, -100, *sample["ids"][2:]]
    model = make_model()
    trainer = make_trainer(
        tmp_path,
        model,
        samples,
        batch_size=8,
        num_train_epochs=400,
        max_grad_norm=1.0,
        optim="adamw_torch",
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        logging_steps=400,
        freeze=["vision", "causal_former"],
    )
    trainer.train()
    last = trainer.evaluate(samples)
    assert last["eval_text_loss"] < 0.05
    assert last["eval_regression_loss"] < 1e-3
    assert_answers(model.eval(), samples)


@torch.no_grad()
def assert_answers(model: EmuForMultimodalGeneration, samples: list[dict]) -> None:
    """From the beginning of each document, the model gives its images, and, after them, its text."""
    for sample in samples:
        ids = sample["ids"]
        starts = [place for place, token in enumerate(ids) if token == image_ids()[0]]
        pixels = sample["pixels"]
        for number, start in enumerate(starts):
            given = {"pixel_values": pixels[:number]} if number else {}
            embeds = model.generate(torch.tensor([ids[:start]]), generation_mode="image", **given).image_embeds
            expected = model.get_image_features(pixels[number : number + 1]).pooler_output[0]
            assert torch.nn.functional.mse_loss(embeds[0], expected) < 1e-3
        length = starts[-1] + len(image_ids()) if starts else 2
        given = {"pixel_values": pixels} if starts else {}
        answer = model.generate(torch.tensor([ids[:length]]), max_new_tokens=8, do_sample=False, **given)
        if sample["labels"][-1] != -100 and len(ids) > length:
            assert answer[0].tolist() == ids
