"""The decoder's trainer with tiny real components: what it learns, what it leaves alone, and that it repeats itself."""

import json
import shutil
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, UNet2DConditionModel
from golden_emu import GOLDEN_EMU
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from training_decoder_run import (
    COLOURS,
    SIZE,
    WIDTH,
    assert_same_gradients,
    get_gradients,
    load_emu,
    make_arguments,
    make_pipeline,
    make_scheduler,
    make_stream,
    make_trainer,
    make_unet,
    train_plainly,
    write_pictures,
    write_shards,
)
from typer.testing import CliRunner

from conversion.decoder import check_decoder
from modeling_emu import EmuForMultimodalGeneration, EmuPipeline
from modeling_emu.cli import app
from modeling_emu.data import EmuMixture, EmuSource, Sample
from modeling_emu.training.decoder import EmuDecoderTrainer, draw_samples, make_schedule
from modeling_emu.training.decoder_arguments import DecoderArguments, DecoderTrainingArguments
from modeling_emu.training.decoder_cache import (
    END_BYTES,
    PrecomputedDecoderData,
    ShardWriter,
    check_fingerprint,
    hash_files,
    write_index,
)
from modeling_emu.training.decoder_data import DecoderEncoder, LiveDecoderData
from modeling_emu.training.decoder_run import DecoderRun, load_scheduler, train_decoder
from modeling_emu.training.recipes import PACKAGED_RECIPES, parse_as
from modeling_emu.training.samples import has_decoder, load_decoder


TESTS = Path(__file__).parent
DECODER_RECIPES = sorted(PACKAGED_RECIPES.glob("*decoder*.yaml"))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Runs of one process may ask for other precisions."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def emu():
    """The small model and its processor. Not to be changed."""
    return load_emu()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """Metadata file of four pictures with captions."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "pairs")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, emu, pictures) -> Path:
    """Pixels and the encoder's embeddings. Not to be changed."""
    return write_shards(tmp_path_factory.mktemp("shards") / "all", make_pipeline(emu), "encoder", pictures, emu)


def make_settings(tmp_path: Path, pictures: str, *more: str) -> list[str]:
    settings = [
        f"model={GOLDEN_EMU}",
        f"sources=[{{kind: image_text, files: '{pictures}'}}]",
        f"precomputed={tmp_path / 'shards'}",
        f"output_dir={tmp_path / 'out'}",
        "disable_tqdm=true",
        *more,
    ]
    return settings


def parse(recipe: str, *settings: str) -> tuple[DecoderArguments, DecoderTrainingArguments]:
    return parse_as(recipe, settings, DecoderArguments, DecoderTrainingArguments)


# -- it learns -----------------------------------------------------------------------------------------------------


def test_it_reproduces_four_pictures(tmp_path, emu, pictures):
    """From a recipe on the command line, as the small U-Net on pixels is trained."""
    start = tmp_path / "start"
    EmuPipeline(None, None, make_unet((32,)), None, make_scheduler()).save_pretrained(start)
    red = Path(pictures).with_name("red.png")
    settings = make_settings(
        tmp_path,
        pictures,
        f"decoder={start}",
        "max_steps=300",
        "learning_rate=4e-3",
        "ema_decay=0.9",
        f"validation_prompts=[[{{type: image, image: '{red}'}}]]",
        "validation_steps=1000",
        "validation_num_inference_steps=10",
        "validation_guidance_scale=1",
        "save_steps=0",
    )
    options = [option for setting in settings for option in ("--set", setting)]
    result = CliRunner().invoke(app, ["train", "decoder", "--recipe", "decoder-cpu", *options])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "out" / "final"
    assert result.stdout.splitlines()[-1] == str(folder)

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    scheduler = load_scheduler(folder)
    assert scheduler.config.prediction_type == "v_prediction"
    pipeline = EmuPipeline(*emu, unet, None, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = [Image.open(Path(pictures).with_name(f"{name}.png")) for name in COLOURS]
    drawn = pipeline(
        prompt_embeds=DecoderEncoder(pipeline, "encoder").embed_pictures(images),
        guidance_scale=1,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    expected = np.stack([np.asarray(image) for image in images]) / 255
    errors = np.abs(drawn[:, None] - expected).mean((2, 3, 4))  # of each drawn picture against each of the four
    assert errors.argmin(1).tolist() == [0, 1, 2, 3]
    assert errors.diagonal().max() < 0.08, errors  # measured: 0.062, and at least 0.108 to any other picture
    assert Image.open(tmp_path / "out" / "pictures" / "step-000300.png").size == (SIZE, SIZE)
    events = b"".join(file.read_bytes() for file in (tmp_path / "out").rglob("events.out.tfevents*"))
    assert b"pictures" in events
    assert b"loss" in events


# -- what a sample becomes -----------------------------------------------------------------------------------------


def test_the_last_picture_is_the_target_and_all_else_the_prompt(pictures, emu):
    stream = make_stream(pictures, emu)
    first, last = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (40, 30), "blue")
    parts = [{"type": "text", "text": "a"}, {"type": "image", "image": first}, {"type": "image", "image": last}]
    cut = stream.cut(Sample([*parts, {"type": "text", "text": "b"}], "shard:1"))
    assert cut.prompt == [*parts[:2], {"type": "text", "text": "b"}]
    assert cut.target.size == (30, 30)
    assert cut.key == "shard:1"
    with pytest.raises(ValueError, match="document shard:2 is left out: got no picture"):
        stream.cut(Sample(parts[:1], "shard:2"))
    with pytest.raises(ValueError, match=r"document shard:3 is left out: got \d+ tokens, expected at most \d+"):
        stream.cut(Sample([{"type": "text", "text": "word " * 4000}, parts[2]], "shard:3"))


@pytest.mark.parametrize("size", [(16, 16), (40, 30), (30, 41), (9, 12)])
def test_pictures_are_cropped_at_the_centre(pictures, emu, size):
    values = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize(size)
    cut = make_stream(pictures, emu).cut(Sample([{"type": "image", "image": image}], ""))
    expected = np.asarray(ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BILINEAR))
    assert cut.pixels.dtype == torch.uint8
    # The crop begins at a whole pixel, and the borders of a resized one are its own.
    shift = abs(size[0] - size[1]) % 2 / 2
    assert np.abs(cut.pixels.permute(1, 2, 0).numpy().astype(int) - expected).mean() <= 1 + 40 * shift


def test_a_caption_is_the_prompt_before_or_after_its_picture(pictures, emu):
    mixture = EmuMixture([EmuSource("image_text", pictures)], seed=0)
    orders = {tuple(part["type"] for part in sample.document) for sample in islice(mixture, 20)}
    assert orders == {("image", "text"), ("text", "image")}
    for cut in islice(make_stream(pictures, emu, repeat=True), 20):
        assert [part["type"] for part in cut.prompt] == ["text"]
        assert cut.prompt[0]["text"].split()[0] in COLOURS


def test_conditions_are_the_models_own(pictures, emu):
    pipeline = make_pipeline(emu)
    samples = list(make_stream(pictures, emu))
    regressed, encoded = (DecoderEncoder(pipeline, name)(samples) for name in ("regressed", "encoder"))
    for row, sample in enumerate(samples):
        assert_close(regressed.image_embeds[row], pipeline.encode_prompt(sample.prompt)[0][0], atol=2e-5, rtol=0)
        inputs = emu[1](images=[sample.target], text="<image>", return_tensors="pt")
        expected = emu[0].get_image_features(inputs["pixel_values"]).pooler_output[0]
        assert_close(encoded.image_embeds[row], expected, atol=1e-5, rtol=0)
        assert_close(encoded.latents_mean[row], sample.pixels / 127.5 - 1)
    assert not torch.allclose(regressed.image_embeds, encoded.image_embeds)
    assert torch.equal(DecoderEncoder(pipeline, "encoder").null_embeds, pipeline.get_null_embeds())


def test_the_vaes_distribution_is_in_the_scale_of_the_unet(pictures, emu):
    pipeline = make_pipeline(emu, with_vae=True)
    samples = list(make_stream(pictures, emu))
    batch = DecoderEncoder(pipeline, "encoder")(samples)
    pixels = torch.stack([sample.pixels for sample in samples]) / 127.5 - 1
    expected = pipeline.vae.encode(pixels).latent_dist
    assert_close(batch.latents_mean, expected.mean * pipeline.vae.config.scaling_factor)
    assert_close(batch.latents_std, expected.std * pipeline.vae.config.scaling_factor)
    assert (batch.latents_std > 0).all()


# -- what the U-Net is asked ---------------------------------------------------------------------------------------


def read_batch(trainer: EmuDecoderTrainer, batch_size: int = 4):
    return next(trainer.data.read(batch_size, 0, 0, 1, 0))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_target_is_what_the_scheduler_turns_back_into_the_picture(shards, tmp_path, prediction_type):
    trainer = make_trainer(shards, tmp_path, prediction_type=prediction_type)
    batch = read_batch(trainer)
    task = trainer.make_task(batch, first=0)
    assert trainer.scheduler.config.prediction_type == prediction_type
    scheduler = DDIMScheduler.from_config(trainer.scheduler.config)
    scheduler.set_timesteps(1000)
    for row, t in enumerate(task.timesteps):
        one = slice(row, row + 1)
        step = scheduler.step(task.target[one], t, task.noisy[one])
        assert_close(
            step.pred_original_sample, batch.latents_mean[one], atol=2e-4, rtol=0
        )  # divided by a small signal


def test_latents_are_drawn_from_the_vaes_distribution(shards, tmp_path):
    trainer = make_trainer(shards, tmp_path, prediction_type="v_prediction")
    batch = read_batch(trainer)
    certain = trainer.make_task(batch, first=0)
    batch.latents_std += 0.5
    drawn = trainer.make_task(batch, first=0)
    draws = draw_samples(trainer.args.seed, 0, batch.latents_mean.shape, 1000, 0.1)
    signal = trainer.noise_scheduler.alphas_cumprod[draws.timesteps][:, None, None, None] ** 0.5
    assert_close(drawn.noisy - certain.noisy, signal * 0.5 * draws.latents_noise, atol=1e-5, rtol=0)


def test_a_tenth_of_the_conditions_becomes_the_null_embeds(shards, tmp_path):
    draws = draw_samples(0, 0, torch.Size((20000, 1, 1, 1)), 1000, 0.1)
    assert abs(draws.is_dropped.float().mean() - 0.1) < 0.01
    assert abs(draws.timesteps.float().mean() - 499.5) < 10
    assert abs(draws.noise.std() - 1) < 0.02

    trainer = make_trainer(shards, tmp_path, condition_dropout=0.5)
    batch = read_batch(trainer, 32)
    is_dropped = draw_samples(trainer.args.seed, 7, batch.latents_mean.shape, 1000, 0.5).is_dropped
    seen = []
    trainer.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    trainer.compute_losses(trainer.make_task(batch, first=7))
    assert 0 < is_dropped.sum() < 32
    for row, dropped in enumerate(is_dropped):
        expected = trainer.data.null_embeds[0] if dropped else batch.image_embeds[row]
        assert torch.equal(seen[0][row], expected)


def test_a_sample_draws_the_same_in_any_batch():
    whole = draw_samples(3, 10, torch.Size((4, 3, 2, 2)), 1000, 0.5)
    halves = [draw_samples(3, first, torch.Size((2, 3, 2, 2)), 1000, 0.5) for first in (10, 12)]
    for name in ("noise", "latents_noise", "timesteps", "is_dropped"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))
    assert not torch.equal(whole.noise, draw_samples(4, 10, torch.Size((4, 3, 2, 2)), 1000, 0.5).noise)


# -- computed once -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["regressed", "encoder"])
@pytest.mark.parametrize("with_vae", [False, True])
def test_precomputed_batches_are_those_computed_on_the_fly(tmp_path, emu, pictures, condition, with_vae):
    pipeline = make_pipeline(emu, with_vae)
    folder = write_shards(tmp_path / "shards", pipeline, condition, pictures, emu)
    precomputed = PrecomputedDecoderData(folder, [1.0], seed=0)
    batch = next(precomputed.read(4, 0, 0, 1, 0))
    by_key = {sample.key: sample for sample in make_stream(pictures, emu)}
    live = DecoderEncoder(pipeline, condition)([by_key[key] for key in batch.keys])
    assert sorted(batch.keys) == sorted(by_key)
    for name in ("image_embeds", "latents_mean", "latents_std"):
        # Another batch sums in another order.
        assert_close(getattr(batch, name), getattr(live, name), atol=2e-5, rtol=1e-5)
    assert torch.equal(precomputed.null_embeds, pipeline.get_null_embeds())
    trainer = EmuDecoderTrainer(pipeline.unet, pipeline.scheduler, precomputed, make_arguments(tmp_path))
    losses = [trainer.compute_losses(trainer.make_task(given, first=0)) for given in (batch, live)]
    assert_close(*losses, atol=1e-5, rtol=1e-5)


def test_each_pass_reads_every_sample_once_in_a_new_order(shards):
    data = PrecomputedDecoderData(shards, [1.0], seed=0)
    places = list(islice(data.draw_places(0), 40))
    passes = [places[first : first + 4] for first in range(0, 40, 4)]
    assert all(sorted(seen) == [(0, number) for number in range(4)] for seen in passes)
    assert len(set(map(tuple, passes))) > 3
    assert list(islice(data.draw_places(17), 23)) == places[17:]
    keys = [key for batch in islice(data.read(4, 0, 0, 1, 0), 5) for key in batch.keys]
    workers = [key for batch in islice(data.read(4, 0, 0, 1, 2), 5) for key in batch.keys]
    ranks = [[batch.keys for batch in islice(data.read(2, 0, rank, 2, 0), 5)] for rank in range(2)]
    assert workers == keys
    assert [key for pair in zip(*ranks, strict=True) for half in pair for key in half] == keys
    assert next(data.read(4, 3, 0, 1, 0)).keys == keys[12:16]


def test_sources_are_drawn_by_weight(tmp_path, shards):
    folder = shutil.copytree(shards, tmp_path / "two")
    for file in sorted(folder.glob("shard-000-*")):
        shutil.copy(file, folder / file.name.replace("shard-000", "shard-001"))
    write_index(folder, 2)
    data = PrecomputedDecoderData(folder, [7, 2], seed=0)
    drawn = [source for source, _ in islice(data.draw_places(0), 9000)]
    assert abs(sum(drawn) / 9000 - 2 / 9) < 0.02
    assert list(islice(data.draw_places(70000), 5)) == list(islice(data.draw_places(0), 70000, 70005))
    with pytest.raises(ValueError, match="weights: got 1, expected 2"):
        PrecomputedDecoderData(folder, [1.0], seed=0)


def test_an_interrupted_computation_goes_on_where_it_was(tmp_path, emu, pictures, shards):
    encoder = DecoderEncoder(make_pipeline(emu), "encoder")
    folder = tmp_path / "shards"
    folder.mkdir()

    def fail_after_two(samples):
        if (folder / "shard-000-00000-00000.safetensors").exists():
            raise KeyboardInterrupt
        return encoder(samples)

    fail_after_two.pipeline = encoder.pipeline
    with pytest.raises(KeyboardInterrupt):
        ShardWriter(folder, 0, 0, 1).write(fail_after_two, make_stream(pictures, emu), 2, samples_per_shard=3)
    (folder / ".shard-000-00000-00001.safetensors.partial").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"got no index\.json"):
        PrecomputedDecoderData(folder, [1.0], seed=0)
    with pytest.raises(ValueError, match="processes: got 2 to go on with shards of 1"):
        ShardWriter(folder, 0, 0, 2).write(encoder, make_stream(pictures, emu), 2, samples_per_shard=3)
    written = ShardWriter(folder, 0, 0, 1).write(encoder, make_stream(pictures, emu), 2, samples_per_shard=3)
    assert [count for _, count in written] == [3, 1]
    for name, _ in written:
        got, expected = load_file(folder / name), load_file(shards / name)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in got)


def test_shards_of_something_else_are_refused_by_name(tmp_path):
    made = {"emu": "abc", "vae": None, "condition": "encoder", "sources": [{"files": ["a"]}]}
    check_fingerprint(tmp_path / "shards", made)
    check_fingerprint(tmp_path / "shards", made)
    with pytest.raises(ValueError, match=r"got shards of another condition \(condition encoder, now regressed\)"):
        check_fingerprint(tmp_path / "shards", made | {"condition": "regressed"})
    with pytest.raises(ValueError, match="got shards of another emu, sources"):
        check_fingerprint(tmp_path / "shards", made | {"emu": "x", "sources": []})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="which holds other things"):
        check_fingerprint(tmp_path / "other", made)


def test_shards_of_changed_sources_are_refused(tmp_path):
    pictures = write_pictures(tmp_path / "pairs")
    make = partial(DecoderRun, *parse("decoder-cpu", *make_settings(tmp_path, pictures)))
    folder = tmp_path / "fingerprint"
    check_fingerprint(folder, make().make_fingerprint(False))
    file = Path(pictures)
    text = file.read_text()
    file.write_text(text)  # the same again, at another time
    check_fingerprint(folder, make().make_fingerprint(False))
    for changed in (text + "\n", text.replace("a", "b", 1), text[::-1]):
        file.write_text(changed)
        with pytest.raises(ValueError, match=r"got shards of another contents \("):
            check_fingerprint(folder, make().make_fingerprint(False))
    file.unlink()
    check_fingerprint(folder, make().make_fingerprint(True))  # complete shards need no sources
    with pytest.raises(ValueError, match="which matches nothing"):
        make().make_fingerprint(False)


def test_both_ends_of_a_file_are_hashed(tmp_path):
    content = bytearray(3 * END_BYTES)
    (tmp_path / "whole.tar").write_bytes(content)
    whole = hash_files([str(tmp_path / "whole.tar")])
    for place in (0, END_BYTES - 1, len(content) - END_BYTES, len(content) - 1):
        changed = content.copy()
        changed[place] = 1
        (tmp_path / "whole.tar").write_bytes(changed)
        assert hash_files([str(tmp_path / "whole.tar")]) != whole
    remote = [f"https://example.org/{name}.tar" for name in "ab"]
    assert hash_files(remote[:1]) == hash_files(remote[:1]) != hash_files(remote[1:])


# -- one step ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_gradients(shards):
    return train_plainly(shards, batch_size=4, accumulation=1)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch_is_its_accumulated_parts(shards, whole_gradients, batch_size):
    assert_same_gradients(train_plainly(shards, batch_size, 4 // batch_size), whole_gradients)


def test_gradient_checkpointing_and_bfloat16_train_the_same(tmp_path, shards, whole_gradients):
    data = PrecomputedDecoderData(shards, [1.0], seed=42)
    options = {"max_steps": 2, "max_grad_norm": 0, "learning_rate": 0.0}
    args = make_arguments(tmp_path, gradient_checkpointing=True, **options)
    assert_same_gradients(get_gradients(EmuDecoderTrainer(make_unet(), make_scheduler(), data, args)), whole_gradients)
    AcceleratorState._reset_state(reset_partial_state=True)
    half = EmuDecoderTrainer(make_unet(), make_scheduler(), data, make_arguments(tmp_path, bf16=True, **options))
    gradients = get_gradients(half)[0]
    assert {parameter.dtype for parameter in half.parameters} == {torch.float32}
    flat, reference = (torch.cat([step[name].flatten() for name in step]) for step in (gradients, whole_gradients[0]))
    assert torch.cosine_similarity(flat, reference, dim=0) > 0.98
    assert not torch.equal(flat, reference)


def test_only_the_unet_moves(tmp_path, emu, pictures):
    pipeline = make_pipeline((EmuForMultimodalGeneration.from_pretrained(GOLDEN_EMU), emu[1]), with_vae=True)
    parts = {name: getattr(pipeline, name) for name in ("multimodal_encoder", "vae", "unet")}
    before = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in parts.items()}
    data = LiveDecoderData(DecoderEncoder(pipeline, "regressed"), make_stream(pictures, emu, repeat=True))
    trainer = EmuDecoderTrainer(pipeline.unet, pipeline.scheduler, data, make_arguments(tmp_path, max_steps=2))
    trainer.train()
    after = {name: part.state_dict() for name, part in parts.items()}
    for name in ("multimodal_encoder", "vae"):
        assert all(torch.equal(before[name][key], after[name][key]) for key in before[name])
        assert not any(parameter.requires_grad for parameter in parts[name].parameters())
    still = [key for key in before["unet"] if torch.equal(before["unet"][key], after["unet"][key])]
    assert still == []


def test_a_loss_that_is_not_finite_names_its_samples(tmp_path, shards):
    folder = shutil.copytree(shards, tmp_path / "shards")
    file = folder / "shard-000-00000-00001.safetensors"
    [bad_key] = json.loads(PrecomputedDecoderData(folder, [1.0], 0)._open(file.name)[1].__repr__().replace("'", '"'))
    tensors = load_file(file)
    tensors["image_embeds"][0, 0, 0] = torch.nan
    save_file(tensors, file, metadata={"keys": json.dumps([bad_key])})
    trainer = make_trainer(folder, tmp_path / "out", condition_dropout=0.0)
    before = [parameter.clone() for parameter in trainer.parameters]
    with pytest.raises(FloatingPointError, match=f"loss of step 1: .* samples: {bad_key}$"):
        trainer.train()
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.parameters, strict=True))


def test_every_loss_is_in_the_logs(tmp_path, shards):
    """Those of the steps after the last full `logging_steps`, too."""
    each = make_trainer(shards, tmp_path / "each", max_steps=3)
    each.train()
    pairs = make_trainer(shards, tmp_path / "pairs", max_steps=3, logging_steps=2)
    pairs.train()
    losses = [logs["loss"] for logs in each.log_history]
    assert [logs["step"] for logs in pairs.log_history] == [2, 3]
    assert [logs["loss"] for logs in pairs.log_history] == pytest.approx([(losses[0] + losses[1]) / 2, losses[2]])


def test_published_learning_rate():
    arguments, args = parse("decoder")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    factor = make_schedule(optimizer, args).lr_lambdas[0]
    steps = {0: 0, 2500: 5e-5, 5000: 1e-4, 9999: 1e-4, 10000: 5e-5, 13999: 5e-5, 14000: 1e-5, 14999: 1e-5}
    assert {step: pytest.approx(factor(step) * args.learning_rate) for step in steps} == steps
    assert (args.max_steps, args.per_device_train_batch_size * 64) == (15000, 1600)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay) == (0.9, 0.999, 0.01)
    assert (args.prediction_type, args.condition_dropout, arguments.condition) == ("epsilon", 0.1, "regressed")
    assert [source["weight"] for source in arguments.sources] == [7, 2]


# -- what is saved -------------------------------------------------------------------------------------------------


def test_the_averaged_weights_are_saved_and_the_others_in_the_checkpoint(tmp_path, shards):
    trainer = make_trainer(shards, tmp_path, save_steps=3, max_steps=3, prediction_type="v_prediction")
    trainer.train()
    trainer.save_model(tmp_path / "final")
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "final" / "unet")
    for got, average, trained in zip(saved.parameters(), trainer.ema.shadow_params, trainer.parameters, strict=True):
        assert torch.equal(got, average)
        assert not torch.equal(got, trained)
    checkpoint = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(checkpoint[name], value) for name, value in trainer.plain_unet.state_dict().items())
    scheduler = load_scheduler(tmp_path / "final")
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.prediction_type == "v_prediction"
    # Samples at evaluation draw with it, too.
    assert has_decoder(str(tmp_path / "final"))
    assert load_decoder(str(tmp_path / "final")).vae is None


def test_a_trained_decoder_is_one_to_assemble_from_and_to_load(tmp_path, emu, pictures):
    settings = make_settings(tmp_path, pictures, "max_steps=1", "condition=regressed", "report_to=none")
    folder = train_decoder(*parse("decoder-cpu", *settings, "validation_prompts=[red, [blue, square]]"))
    assert check_decoder(folder, WIDTH) == ["unet", "vae", "scheduler"]
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 1
    pipeline = EmuPipeline.from_pretrained(folder, trust_remote_code=True, multimodal_encoder=None, processor=None)
    pipeline = EmuPipeline(*emu, pipeline.unet, pipeline.vae, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a", num_inference_steps=2).images[0].size == (SIZE, SIZE)

    # The second run needs the shards alone, and goes on from the first one's U-Net.
    again = [*settings, f"decoder={folder}", f"output_dir={tmp_path / 'again'}", "learning_rate=0", "ema_decay=0"]
    other = train_decoder(*parse("decoder-cpu", *again))
    first, second = (load_file(path / "unet" / "diffusion_pytorch_model.safetensors") for path in (folder, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="got shards of another condition"):
        train_decoder(*parse("decoder-cpu", *settings, "condition=encoder"))


# -- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DECODER_RECIPES, ids=lambda path: path.stem)
def test_packaged_recipes_are_complete_and_known(path):
    arguments, training = parse(path.stem)
    assert arguments.sources
    assert training.max_steps > 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learning_rat=1", "got 'learning_rat', expected a known one; the nearest is 'learning_rate'"),
        ("condition=decoder", r"condition: got 'decoder', expected one of \('regressed', 'encoder'\)"),
        ("prediction_type=sample", "prediction_type: got 'sample'"),
        ("lr_scheduler_type=piecewise_constant", r"lr_scheduler_kwargs: got \[\], expected \['rates'\]"),
        ("sources=[]", "sources: got none"),
        ("sources=[{kind: mmc4, files: x}]", "kind of a decoder's source: got 'mmc4'"),
        ("sources=[{kind: image_text, file: x}]", "the nearest is 'files'"),
        ("max_steps=0", "max_steps: got 0"),
        ("condition_dropout=2", "condition_dropout: got 2"),
    ],
)
def test_a_wrong_recipe_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        parse("decoder-cpu", setting)


@pytest.mark.parametrize("setting", ["learning_rate=0", "lr_scheduler_kwargs.rates=1e-5"])
def test_pieces_of_a_learning_rate_need_a_peak_and_steps(setting):
    with pytest.raises(ValueError, match=r"piecewise_constant: got learning_rate .* expected a rate above 0"):
        parse("decoder", setting)


def test_a_unet_of_another_width_is_refused(tmp_path, shards):
    data = PrecomputedDecoderData(shards, [1.0], seed=0)
    unet = UNet2DConditionModel.from_config(make_unet().config | {"cross_attention_dim": 32})
    with pytest.raises(ValueError, match="cross_attention_dim: got 32, expected 64"):
        EmuDecoderTrainer(unet, make_scheduler(), data, make_arguments(tmp_path))
