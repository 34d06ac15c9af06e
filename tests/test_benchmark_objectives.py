"""The experiment on objectives: arms of each sort end to end at a scale that means nothing, and the arithmetic of its report."""

import json
import math
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from benchmarks.objectives import runner
from benchmarks.objectives.arms import ARMS, BEGINNINGS, DIFFUSION, FIRST_ARMS, HALF, LATER_ARMS, TRAIN_ALL, WHOLE
from benchmarks.objectives.measuring import ABILITY_NAMES, LOSS_NAMES
from benchmarks.objectives.moving_targets import compute_losses_with_moving_targets
from benchmarks.objectives.report import NOTHING, draw_plot, make_table, summarise
from benchmarks.objectives.runner import Settings, make_untrained_with, read_results, run_experiment, working_in
from benchmarks.objectives.text_to_image import TEXT_LENGTH, Pairs, TextToImage, TextToImageTrainer, encode_texts
from diffusers import DDIMScheduler
from PIL import Image
from transformers import PreTrainedTokenizerFast

from modeling_emu import EmuForMultimodalGeneration
from modeling_emu.cli.loading import EMU_TINY, load_pipeline
from modeling_emu.training.decoder_arguments import DecoderTrainingArguments
from modeling_emu.training.recipes import parse_as


SEED = 3
SETTINGS = Settings(scale=0.0005, vision_scale=0.0002, num_pairs=40, num_samples=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with two arms of one seed: the joint objective and the specialist that is no Emu."""
    output = tmp_path_factory.mktemp("objectives")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_emu.evaluation.asking.NUM_INFERENCE_STEPS", 2)
        run_experiment(output, [SEED], ["both", DIFFUSION], SETTINGS)
    return output


def test_two_arms_run_to_their_results(run):
    both, diffusion = read_results(run)
    assert (both["arm"], diffusion["arm"]) == ("both", DIFFUSION)
    assert set(both["figures"]) == set(ABILITY_NAMES)
    assert set(diffusion["figures"]) == {name for name in ABILITY_NAMES if name.startswith("pictures")}
    assert set(both["losses"]) == set(LOSS_NAMES)
    assert diffusion["losses"] == {}
    assert all(0 < loss < 20 for loss in both["losses"].values())
    for result in (both, diffusion):
        assert (result["seed"], result["settings"]) == (SEED, asdict(SETTINGS))
        assert all(figure["num_samples"] == 2 for figure in result["figures"].values())


def test_what_is_done_is_not_done_again(run, monkeypatch):
    files = list(run.glob("seed-*/*/result.json"))
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr(runner, "run_stage", None)
    run_experiment(run, [SEED], ["both", DIFFUSION], SETTINGS)
    assert [file.read_bytes() for file in files] == before


def test_an_arm_that_was_stopped_before_it_was_measured_is_not_trained_again(run, monkeypatch):
    """Its stages are marked as done: the same weights are measured again, with the same figures."""
    monkeypatch.setattr("modeling_emu.evaluation.asking.NUM_INFERENCE_STEPS", 2)
    monkeypatch.setattr("modeling_emu.training.tiny.parse_as", None)  # no recipe is read for a run
    file = run / f"seed-{SEED}" / "both" / "result.json"
    before = file.read_bytes()
    file.unlink()
    run_experiment(run, [SEED], ["both"], SETTINGS)
    assert file.read_bytes() == before


def test_all_arms_of_a_seed_begin_alike(run):
    """The same pairs in both layouts, and the packaged model's encoder, which is frozen; all else is random, and learns."""
    folder = run / f"seed-{SEED}"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "both", "data", DIFFUSION, "validation", WHOLE,
    ]  # fmt: skip
    paths = (EMU_TINY, folder / WHOLE / "start", folder / "both" / "language" / "final")
    packaged, start, end = (EmuForMultimodalGeneration.from_pretrained(path).state_dict() for path in paths)
    for name, tensor in start.items():
        is_encoder = name.startswith(("model.vision_model", "model.causal_former"))
        assert torch.equal(tensor, packaged[name]) == is_encoder, name
        assert torch.equal(tensor, end[name]) == is_encoder, name


def test_an_arm_with_the_emu_of_another_trains_the_decoder_alone(run, tmp_path, monkeypatch):
    """So that what differs between the two is the decoder: captions and losses are the same."""
    monkeypatch.setattr("modeling_emu.evaluation.asking.NUM_INFERENCE_STEPS", 2)
    copied = shutil.copytree(run, tmp_path / "run")
    run_experiment(copied, [SEED], ["decoder-tuned"], SETTINGS)
    tuned = copied / f"seed-{SEED}" / "decoder-tuned"
    assert sorted(path.name for path in tuned.iterdir()) == ["decoder", runner.RESULT_FILE]
    results = {result["arm"]: result for result in read_results(copied)}
    assert results["decoder-tuned"]["losses"] == results["both"]["losses"]
    for name, figure in results["both"]["figures"].items():
        assert name.startswith("pictures") or results["decoder-tuned"]["figures"][name] == figure

    (tuned / runner.RESULT_FILE).unlink()
    shutil.rmtree(tuned / "decoder" / "final" / "unet")  # what draws: without it nothing can be measured
    with pytest.raises(OSError, match="decoder-tuned/decoder/final/unet"):
        run_experiment(copied, [SEED], ["decoder-tuned"], SETTINGS)


def test_other_settings_are_refused_in_the_same_folder(run):
    with pytest.raises(ValueError, match=r"run: got .*'scale': 0.5"):
        run_experiment(run, [SEED], ["both"], Settings(scale=0.5))


def test_unknown_arms_and_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"arms: got \['all'\], expected some of \['both'"):
        run_experiment(tmp_path, [0], ["both", "all"], SETTINGS)
    with pytest.raises(ValueError, match="vision_scale: got 0, expected more than 0"):
        Settings(vision_scale=0)
    with pytest.raises(ValueError, match="num_samples: got 1, expected at least 2"):
        Settings(num_samples=1)


def test_a_seed_is_worked_at_by_one_process(tmp_path):
    with working_in(tmp_path), pytest.raises(ValueError, match="in which another process works"), working_in(tmp_path):
        pass


# Arms


def test_the_arms_are_those_that_were_asked_for():
    assert [arm.name for arm in FIRST_ARMS] == ["both", "text", "regression", "captioner", "diffusion"]
    assert len(ARMS) == len(FIRST_ARMS) + len(LATER_ARMS)
    assert BEGINNINGS[HALF] * 2 == BEGINNINGS[WHOLE]


@pytest.mark.parametrize("arm", [arm for arm in ARMS.values() if arm.name != DIFFUSION], ids=lambda arm: arm.name)
def test_every_arm_is_a_recipe_with_the_losses_it_names(arm):
    arguments, training = parse_as("tiny-pretrain", arm.settings, *runner.STAGE_RUNS["tiny-pretrain"][1])
    weights = (arguments.objective["text_loss_weight"], arguments.objective["regression_loss_weight"])
    expected = {"text": (1, 0), "captioner": (1, 0), "regression": (0, 1)}
    assert weights == expected.get(arm.name, (1, 1))
    assert arm.draws == (weights[1] == 1)
    assert (training.freeze == []) == (TRAIN_ALL in arm.settings)
    is_packaged = training.freeze and arm.beginning == WHOLE and arguments.objective.get("regression_loss") != "cosine"
    if arm.same_emu_as:
        twin = ARMS[arm.same_emu_as]
        assert (arm.settings, arm.beginning, arm.run) == (twin.settings, twin.beginning, twin.run)
    else:
        assert arm.tunes_decoder == (not is_packaged)
    [source] = arguments.sources
    assert source["kind"] == ("obelics" if arm.name == "captioner" else "image_text")


def test_half_the_image_tokens_are_half_everywhere(tmp_path):
    """In the network, in what it reads, and in what it draws from."""
    make_untrained_with(tmp_path / "untrained", 0, BEGINNINGS[HALF])
    pipeline = load_pipeline(tmp_path / "untrained")
    assert pipeline.processor.num_image_tokens == pipeline.multimodal_encoder.config.num_image_tokens == 2
    embeds = pipeline.regress_embeds([[{"type": "text", "text": "a circle."}]])
    assert embeds.shape == (1, 2, 192)
    image = Image.new("RGB", (32, 32))
    inputs = pipeline.processor(documents=[[{"type": "image", "image": image}]], return_tensors="pt")
    [embeds] = pipeline.multimodal_encoder.get_image_features(inputs["pixel_values"]).pooler_output
    assert embeds.shape == (2, 192)


def test_an_arm_with_other_embeddings_tunes_the_visual_decoder(run, monkeypatch):
    """Half the image tokens, and an encoder that learned to see with as many."""
    monkeypatch.setattr("modeling_emu.evaluation.asking.NUM_INFERENCE_STEPS", 2)
    run_experiment(run, [SEED], ["n-halved"], SETTINGS)
    folder = run / f"seed-{SEED}"
    encoder, end = (
        EmuForMultimodalGeneration.from_pretrained(folder / path / "final").state_dict()
        for path in ("half/vision", "n-halved/language")
    )
    is_encoder = [name.startswith(("model.vision_model", "model.causal_former")) for name in end]
    assert [torch.equal(tensor, encoder[name]) for name, tensor in end.items()] == is_encoder
    assert (folder / "n-halved" / "decoder" / "final" / "unet").is_dir()
    assert not (folder / "both" / "decoder").exists()
    assert [result["arm"] for result in read_results(run)] == ["both", DIFFUSION, "n-halved"]


def test_targets_that_are_not_detached_have_the_same_loss_and_get_gradients(run):
    model = EmuForMultimodalGeneration.from_pretrained(run / f"seed-{SEED}" / "both" / "language" / "final")
    config = model.config
    slots = [
        config.image_start_token_id,
        *[config.image_token_id] * config.num_image_tokens,
        config.image_end_token_id,
    ]
    input_ids = torch.tensor([[1, *slots, 300, 2]])
    gradients = {}
    for detached in (True, False):
        generator = torch.Generator().manual_seed(0)
        embeds, regressed = (
            torch.randn(*input_ids.shape, 192, generator=generator).requires_grad_() for _ in range(2)
        )
        logits = torch.randn(*input_ids.shape, config.text_config.vocab_size, generator=generator)
        arguments = (input_ids, None, input_ids, logits, embeds, regressed)
        if detached:
            losses = model.compute_losses(*arguments)
        else:
            losses = compute_losses_with_moving_targets(model, *arguments)
        losses["regression_loss_sum"].backward()
        gradients[detached] = (embeds.grad, regressed.grad, {name: loss.item() for name, loss in losses.items()})
    assert gradients[True][0] is None
    assert torch.equal(gradients[True][1], gradients[False][1])
    assert gradients[True][2] == gradients[False][2]
    # What is predicted stands one place before its target, so both get the same gradient, the other way round.
    assert torch.equal(gradients[False][0][:, 1:], -gradients[False][1][:, :-1])
    assert gradients[False][0].abs().sum() > 0


# The specialist for pictures


@pytest.fixture
def trainer(run, tmp_path):
    """Makes trainers of the specialist, all alike, of four steps."""
    start = run / f"seed-{SEED}" / WHOLE / "start"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
    pairs = Pairs(str(run / f"seed-{SEED}" / "data" / "caption" / "*.tar"), tokenizer, 32)
    args = DecoderTrainingArguments(
        "out", 4, per_device_train_batch_size=2, learning_rate=1e-3, lr_scheduler_type="cosine", seed=1,
        prediction_type="v_prediction", warmup_steps=1, ema_decay=0.5,
    )  # fmt: skip

    def make():
        model = TextToImage.make(start, EMU_TINY, seed=1)
        scheduler = DDIMScheduler.from_pretrained(EMU_TINY / "scheduler")
        return TextToImageTrainer(model, scheduler, pairs, encode_texts(tokenizer, [""])[0], args, tmp_path, "cpu")

    return make


def test_the_specialist_learns_in_all_its_parts_and_goes_on_where_it_was_stopped(trainer, monkeypatch):
    whole = trainer()
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    monkeypatch.setattr("benchmarks.objectives.text_to_image.SAVE_STEPS", 3)
    whole.train()
    after = whole.model.state_dict()
    assert [name for name, tensor in before.items() if torch.equal(tensor, after[name])] == []
    resumed = trainer()
    assert resumed.checkpoint.exists()
    resumed.train()
    assert resumed.step == 4
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, after[name]), name


def test_the_learning_rate_rises_and_falls_to_nothing(trainer, monkeypatch):
    rates = []
    monkeypatch.setattr(
        TextToImageTrainer, "_save", lambda trainer: rates.append(trainer.lr_schedule.get_last_lr()[0])
    )
    monkeypatch.setattr("benchmarks.objectives.text_to_image.SAVE_STEPS", 1)
    trainer().train()
    assert rates[0] == pytest.approx(1e-3)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0)


def test_every_pair_is_drawn_as_often_as_any_other(trainer):
    pairs = trainer().pairs
    size = SETTINGS.num_pairs
    rows = [row for row, _ in zip(pairs.draw_rows(0, 0), range(2 * size), strict=False)]
    assert sorted(rows[:size]) == sorted(rows[size:]) == list(range(size))
    assert rows[:size] != rows[size:]
    later = [row for row, _ in zip(pairs.draw_rows(0, size + 7), range(10), strict=False)]
    assert later == rows[size + 7 : size + 17]


def test_a_text_says_the_same_whatever_follows_it(trainer):
    """What pads a text is read by no position before it."""
    model, pairs = trainer().model.eval(), trainer().pairs
    ids = pairs.input_ids[:1]
    length = int((ids != ids[0, -1]).sum())
    other = ids.clone()
    other[:, length:] = 5
    assert ids.shape == (1, TEXT_LENGTH)
    assert 0 < length < TEXT_LENGTH
    assert torch.equal(model.encode(ids)[:, :length], model.encode(other)[:, :length])


# The report


def make_result(arm: str, seed: int, shares: dict[str, int], losses: dict[str, float]) -> dict:
    figures = {name: {"num_right": right, "num_samples": 200, "baselines": {}} for name, right in shares.items()}
    return {"arm": arm, "seed": seed, "settings": asdict(Settings()), "figures": figures, "losses": losses}


@pytest.fixture
def results():
    return [
        make_result("both", 0, {"captions": 190, "pictures": 100}, {"text loss": 0.25}),
        make_result("both", 1, {"captions": 180, "pictures": 104}, {"text loss": 0.5}),
        make_result("both", 2, {"captions": 200, "pictures": 96}, {"text loss": 0.3}),
        make_result("captioner", 0, {"captions": 197}, {}),
    ]


def test_the_summary_is_the_mean_over_seeds(results):
    summary = summarise(results)
    assert summary["both"]["captions"].values == (0.95, 0.9, 1.0)
    assert summary["both"]["captions"].mean == pytest.approx(0.95)
    assert summary["both"]["pictures"].mean == pytest.approx(0.5)
    assert summary["both"]["text loss"].mean == pytest.approx(0.35)
    assert summary["captioner"]["captions"].mean == pytest.approx(0.985)
    assert set(summary["captioner"]) == {"captions"}


def test_the_table_has_means_with_their_range(results):
    lines = make_table(results).splitlines()
    assert lines[0] == (
        "Mean over seeds (least to greatest); scale 0.15, vision_scale 0.5, num_pairs 40000, num_samples 200."
    )
    header, _, both, captioner = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert header == ["arm", "seeds", *ABILITY_NAMES, *LOSS_NAMES, "what it is"]
    cells = dict(zip(header, both, strict=True))
    assert (cells["arm"], cells["seeds"], cells["what it is"]) == ("both", "3", "text and regression loss")
    assert cells["captions"] == "95.0% (90.0% to 100.0%)"
    assert cells["pictures"] == "50.0% (48.0% to 52.0%)"
    assert cells["text loss"] == "0.3500 (0.2500 to 0.5000)"
    cells = dict(zip(header, captioner, strict=True))
    assert (cells["seeds"], cells["captions"], cells["pictures"]) == ("1", "98.5%", NOTHING)


def test_results_of_different_settings_share_no_table(results):
    results[1]["settings"] = asdict(Settings(scale=0.5))
    for function in (make_table, draw_plot):
        with pytest.raises(ValueError, match="expected some, all of the same"):
            function(results)
        with pytest.raises(ValueError, match="results: got 0"):
            function([])


def test_the_plot_has_a_row_per_arm_and_marks_where_values_are(results):
    plot = draw_plot(results)
    fewer = draw_plot(results[:3])
    assert plot.width == fewer.width
    assert plot.height > fewer.height

    def find_marks(image):
        pixels = np.asarray(image, dtype=int)
        return np.flatnonzero((pixels[..., 2] - pixels[..., 0] > 100).any(0))  # much more blue than red

    one = [make_result("both", 0, {"captions": right}, {}) for right in (0, 200)]
    low, high = (find_marks(draw_plot([result])) for result in one)
    assert math.isclose(high.mean() - low.mean(), 210, abs_tol=1)  # a panel's width


def test_results_are_read_in_the_order_of_arms_and_seeds(tmp_path, results):
    for result in reversed(results):
        folder = tmp_path / f"seed-{result['seed']}" / result["arm"]
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
    assert read_results(tmp_path) == results
