"""EmuPipeline with the tiny real components of the converted golden repository."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import GOLDENS
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from loopback_hub import LoopbackHub
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel, CLIPImageProcessorPil
from typer.testing import CliRunner

from modeling_emu import EmuForMultimodalGeneration, EmuPipeline, EmuProcessor
from modeling_emu.cli import app
from modeling_emu.cli.loading import load_pipeline
from modeling_emu.documents_emu import get_frame_indices, prepare_documents
from modeling_emu.hub.repository import find_decoder_problems


GOLDEN = GOLDENS / "pretrain"
SIZE = 16  # of the golden pictures
N, WIDTH = 4, 64  # image slots, width of the language model
SHORT = {"height": SIZE, "width": SIZE, "num_inference_steps": 3}
LATENTS = (4, 8, 8)


def load_components(folder: Path) -> dict:
    return {
        "multimodal_encoder": EmuForMultimodalGeneration.from_pretrained(folder),
        "processor": EmuProcessor.from_pretrained(folder),
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
        "scheduler": PNDMScheduler.from_pretrained(folder / "scheduler"),
        "safety_checker": StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker"),
        "feature_extractor": CLIPImageProcessorPil.from_pretrained(folder / "feature_extractor"),
    }


@pytest.fixture(scope="module")
def components(converted_pretrain):
    """Not to be changed."""
    return load_components(converted_pretrain)


@pytest.fixture
def own_components(converted_pretrain):
    """A test's own, to change."""
    return load_components(converted_pretrain)


def make_pipe(components: dict, **changes) -> EmuPipeline:
    pipe = EmuPipeline(**{**components, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(components):
    return make_pipe(components)


@pytest.fixture
def decoder(components):
    """A pipeline without the encoder."""
    return make_pipe(components, multimodal_encoder=None, processor=None)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


GOLDEN_CALLS = json.loads((GOLDEN / "golden.json").read_text())["pipeline"]


@pytest.fixture(scope="module")
def images():
    return [Image.open(path) for path in sorted(GOLDEN.glob("image_*.png"))]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(num_pictures: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_pictures, *LATENTS, generator=seeded(seed))


def random_embeds(num_prompts: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_prompts, N, WIDTH, generator=seeded(seed))


@contextmanager
def counted(module: torch.nn.Module):
    """Counts the calls of a module, with the rows of each."""
    rows = []

    def record(module, args, kwargs):
        rows.append(next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value)).shape[0])

    hook = module.register_forward_pre_hook(record, with_kwargs=True)
    yield rows
    hook.remove()


@torch.no_grad()
def draw_plainly(pipe, scheduler, condition, uncondition, latents, num_inference_steps, scale, rescale=0.0):
    """The published loop, one pass per side of the guidance."""
    scheduler.set_timesteps(num_inference_steps)
    latents = latents * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(latents, t)
        cond = pipe.unet(inputs, t, condition).sample
        guided = cond
        if uncondition is not None:
            uncond = pipe.unet(inputs, t, uncondition).sample
            guided = uncond + scale * (cond - uncond)
            same_spread = guided * cond.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
            guided = rescale * same_spread + (1 - rescale) * guided
        latents = scheduler.step(guided, t, latents).prev_sample
    return latents


# -- the published numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(GOLDEN_CALLS)))
def test_documents_give_the_published_pictures(pipe, golden, images, number):
    call = GOLDEN_CALLS[number]
    prompt = [part if isinstance(part, str) else images[part["image"]] for part in call["inputs"]]
    arguments = {name: call[name] for name in ("guidance_scale", "num_inference_steps", "height", "width")}
    latents = golden[f"pipe.{number}.latents"]
    got = pipe(prompt, latents=latents, output_type="latent", **arguments)
    assert_close(got.images, golden[f"pipe.{number}.final_latents"], atol=1e-4, rtol=0)
    got = pipe(prompt, latents=latents, output_type="np", **arguments)
    assert_close(torch.from_numpy(got.images), golden[f"pipe.{number}.image"], atol=1e-4, rtol=0)
    assert got.nsfw_content_detected == [call["nsfw"]]


@pytest.mark.parametrize("number", range(3))
def test_published_embeddings_give_the_published_pictures_without_the_encoder(decoder, golden, number):
    call, embeds = GOLDEN_CALLS[number], golden[f"image_embeds.{number}"]
    arguments = {name: call[name] for name in ("guidance_scale", "num_inference_steps", "height", "width")}
    got = decoder(
        prompt_embeds=embeds[:1],
        negative_prompt_embeds=embeds[1:],
        latents=golden[f"pipe.{number}.latents"],
        output_type="np",
        **arguments,
    )
    assert_close(torch.from_numpy(got.images), golden[f"pipe.{number}.image"], atol=1e-4, rtol=0)


# -- prompts -------------------------------------------------------------------------------------------------------


def test_shorthand_and_full_form_are_the_same_prompt(pipe, images):
    full = [[{"type": "text", "text": "a "}, {"type": "image", "image": images[0]}, {"type": "text", "text": "b"}]]
    assert torch.equal(pipe.encode_prompt(["a ", images[0], "b"])[0], pipe.encode_prompt(full)[0])
    assert torch.equal(pipe.encode_prompt("a")[0], pipe.encode_prompt([["a"]])[0])
    assert torch.equal(pipe.encode_prompt(images[0])[0], pipe.encode_prompt([images[0]])[0])


def test_white_space_before_the_image_start_is_none(pipe, images):
    expected = pipe.encode_prompt(["a", images[0], "b"])[0]
    assert torch.equal(pipe.encode_prompt(["a", images[0], "b \n"])[0], expected)
    assert torch.equal(pipe.encode_prompt(["a", images[0], "b ", "  "])[0], expected)


def test_a_video_is_its_frames(pipe, images):
    frames = [images[0], images[1], images[2]] * 4
    seen = [frames[index] for index in get_frame_indices(len(frames))]
    assert torch.equal(pipe.encode_prompt(["see ", frames])[0], pipe.encode_prompt(["see ", *seen])[0])


def test_several_texts_are_refused_with_both_ways_to_write_them(pipe):
    with pytest.raises(ValueError, match=r"one document or 2.*\[\[text, text\]\].*\[\[text\], \[text\]\]"):
        pipe(["a cat", "a dog"])


def test_a_batch_is_its_prompts_one_by_one(pipe, images):
    prompts = [["a red ball"], [images[0], images[1]], ["This: ", images[2], "and more: "]]
    negative = [["blue"], [""], [images[1]]]
    generators = [seeded(seed) for seed in range(3)]
    batch = pipe(prompts, negative, generator=generators, output_type="pt", **SHORT).images
    for row, (prompt, negative_prompt) in enumerate(zip(prompts, negative, strict=True)):
        single = pipe(prompt, negative_prompt, generator=seeded(row), output_type="pt", **SHORT).images
        assert_close(batch[row : row + 1], single, atol=2e-5, rtol=0)  # sums in another order


def test_pictures_of_one_prompt_follow_each_other(pipe):
    pictures = pipe([["a"], ["b"]], num_images_per_prompt=2, latents=noise(4), output_type="pt", **SHORT).images
    repeated = pipe([["a"], ["a"], ["b"], ["b"]], latents=noise(4), output_type="pt", **SHORT).images
    assert_close(pictures, repeated, atol=2e-5, rtol=0)  # sums in another order


def test_one_negative_prompt_serves_all(pipe):
    one = pipe([["a"], ["b"]], "blue", latents=noise(2), output_type="pt", **SHORT).images
    each = pipe([["a"], ["b"]], [["blue"], ["blue"]], latents=noise(2), output_type="pt", **SHORT).images
    assert_close(one, each, atol=2e-5, rtol=0)
    assert not torch.allclose(one, pipe([["a"], ["b"]], latents=noise(2), output_type="pt", **SHORT).images)


# -- the null embeddings -------------------------------------------------------------------------------------------


def test_null_embeds_are_those_of_the_empty_prompt(pipe, golden):
    assert_close(pipe.get_null_embeds(), golden["image_embeds.0"][1:], atol=2e-5, rtol=0)
    assert torch.equal(pipe.get_null_embeds(), pipe.regress_embeds(prepare_documents("")))


def test_null_embeds_are_computed_once(pipe):
    with counted(pipe.multimodal_encoder.model.language_model) as passes:
        pipe("a cat", **SHORT)
        num_first = len(passes)
        pipe("a cat", **SHORT)
        pipe("a cat", negative_prompt="", **SHORT)
        assert len(passes) - num_first == 2 * N  # the prompt, and N - 1 embeddings read back
    assert num_first == 2 * N


def test_kept_null_embeds_are_those_recomputed(pipe):
    kept = [pipe("a cat", generator=seeded(), output_type="pt", **SHORT).images for _ in range(2)][1]
    pipe.forget_null_embeds()
    assert torch.equal(pipe("a cat", generator=seeded(), output_type="pt", **SHORT).images, kept)
    given = pipe.regress_embeds(prepare_documents(""))
    got = pipe("a cat", negative_prompt_embeds=given, generator=seeded(), output_type="pt", **SHORT).images
    assert torch.equal(got, kept)


def test_null_embeds_follow_the_encoder(own_components):
    pipe = make_pipe(own_components)
    before = pipe.get_null_embeds()
    with torch.no_grad():
        pipe.multimodal_encoder.regression_head.weight.mul_(1.5)  # as an optimiser would
    after = pipe.get_null_embeds()
    assert not torch.allclose(before, after)
    assert pipe.get_null_embeds() is after

    pipe.to(dtype=torch.bfloat16)
    assert pipe.get_null_embeds().dtype == torch.bfloat16
    other = EmuForMultimodalGeneration(pipe.multimodal_encoder.config).to(torch.bfloat16).eval()
    pipe.multimodal_encoder = other
    assert not torch.equal(pipe.get_null_embeds(), after.bfloat16())
    assert torch.equal(pipe.get_null_embeds(), make_pipe(pipe.components).get_null_embeds())


# -- the loop ------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_picture(pipe):
    first, again, other = (
        pipe("a cat", generator=seeded(seed), output_type="np", **SHORT).images for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_guidance_follows_the_published_formula(decoder):
    cond, uncond, latents = random_embeds(2), random_embeds(2, seed=1), noise(2)
    for scale, rescale in ((7.5, 0.0), (3.0, 0.7)):
        got = decoder(
            prompt_embeds=cond,
            negative_prompt_embeds=uncond,
            latents=latents,
            guidance_scale=scale,
            guidance_rescale=rescale,
            output_type="latent",
            **SHORT,
        )
        scheduler = PNDMScheduler.from_config(decoder.scheduler.config)
        expected = draw_plainly(decoder, scheduler, cond, uncond, latents, 3, scale, rescale)
        assert_close(got.images, expected, atol=1e-4, rtol=0)  # one pass over both sides; guidance magnifies


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_guidance_of_one_or_less_is_none(decoder, scale):
    cond, latents = random_embeds(), noise()
    with counted(decoder.unet) as rows:
        got = decoder(prompt_embeds=cond, latents=latents, guidance_scale=scale, output_type="latent", **SHORT)
    assert set(rows) == {1}
    scheduler = PNDMScheduler.from_config(decoder.scheduler.config)
    assert torch.equal(got.images, draw_plainly(decoder, scheduler, cond, None, latents, 3, scale))


@pytest.mark.parametrize(
    "scheduler_class",
    [
        PNDMScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DPMSolverMultistepScheduler,
        LMSDiscreteScheduler,
        HeunDiscreteScheduler,
    ],
)
def test_any_scheduler(decoder, scheduler_class):
    if scheduler_class is LMSDiscreteScheduler:
        pytest.importorskip("scipy")
    decoder.scheduler = scheduler_class.from_config(decoder.scheduler.config)
    cond, uncond, latents = random_embeds(), random_embeds(seed=1), noise()
    arguments = {"prompt_embeds": cond, "negative_prompt_embeds": uncond, "latents": latents, **SHORT}
    first, again = (decoder(generator=seeded(), output_type="latent", **arguments).images for _ in range(2))
    assert torch.equal(first, again)
    if scheduler_class is not EulerAncestralDiscreteScheduler:  # draws noise of its own
        scheduler = scheduler_class.from_config(decoder.scheduler.config)
        assert_close(first, draw_plainly(decoder, scheduler, cond, uncond, latents, 3, 7.5), atol=2e-4, rtol=1e-4)


def test_timesteps_and_sigmas_of_ones_own(decoder):
    arguments = {"prompt_embeds": random_embeds(), "guidance_scale": 1, "output_type": "latent"}
    arguments |= {"latents": noise(), "height": SIZE, "width": SIZE}
    decoder.scheduler = EulerDiscreteScheduler.from_config(decoder.scheduler.config)
    sigmas, timesteps = [14.0, 3.0, 0.5], [900, 500, 100]
    decoder(sigmas=sigmas, **arguments)
    assert torch.isin(torch.tensor(sigmas), decoder.scheduler.sigmas).all()
    decoder(timesteps=timesteps, **arguments)
    assert decoder.scheduler.timesteps.tolist() == timesteps
    assert decoder.num_timesteps == 3
    with pytest.raises(ValueError, match="Only one of"):
        decoder(timesteps=timesteps, sigmas=sigmas, **arguments)
    decoder.scheduler = PNDMScheduler.from_config(decoder.scheduler.config)
    with pytest.raises(ValueError, match="does not support custom"):
        decoder(timesteps=timesteps, **arguments)


def test_height_and_width_default_to_the_unet_and_can_be_chosen(decoder):
    arguments = {"prompt_embeds": random_embeds(), "guidance_scale": 1, "num_inference_steps": 1}
    assert decoder(**arguments).images[0].size == (SIZE, SIZE)
    assert decoder(height=24, **arguments).images[0].size == (SIZE, 24)
    assert decoder(height=20, width=32, **arguments).images[0].size == (32, 20)


def test_a_call_leaves_the_components_as_they_were(own_components, images):
    pipe = make_pipe(own_components)
    networks = {name: part for name, part in own_components.items() if isinstance(part, torch.nn.Module)}
    before = {name: {key: t.clone() for key, t in part.state_dict().items()} for name, part in networks.items()}
    configs = {name: str(part.config) for name, part in networks.items()}
    pipe(["a", images[0]], **SHORT)
    for name, part in networks.items():
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in part.state_dict().items())
        assert str(part.config) == configs[name]
        assert not part.training


def test_latents_and_pictures_of_every_output_type_agree(pipe):
    def run(output_type):
        return pipe("a cat", generator=seeded(), output_type=output_type, **SHORT).images

    latents, array, tensor, pictures = run("latent"), run("np"), run("pt"), run("pil")
    assert latents.shape == (1, *LATENTS)
    assert tensor.shape == (1, 3, SIZE, SIZE)
    assert array.shape == (1, SIZE, SIZE, 3)
    assert torch.equal(tensor.permute(0, 2, 3, 1), torch.from_numpy(array))
    assert np.array_equal(np.asarray(pictures[0]), (array[0] * 255).round().astype(np.uint8))
    with torch.no_grad():
        assert torch.equal((pipe.decode_latents(latents) / 2 + 0.5).clamp(0, 1), tensor)


def test_given_latents_are_the_generators(pipe):
    drawn = pipe("a cat", generator=seeded(), output_type="latent", **SHORT).images
    assert torch.equal(pipe("a cat", latents=noise(), output_type="latent", **SHORT).images, drawn)


def test_a_tuple_has_the_same_fields(pipe):
    output = pipe("a cat", generator=seeded(), output_type="np", **SHORT)
    images, flags = pipe("a cat", generator=seeded(), output_type="np", return_dict=False, **SHORT)
    assert np.array_equal(images, output.images)
    assert flags == output.nsfw_content_detected == [False]


# -- callbacks -----------------------------------------------------------------------------------------------------


def test_a_callback_sees_each_step_and_may_change_it(pipe):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))

    names = ["latents", "prompt_embeds"]
    arguments = {"generator": seeded(), "output_type": "latent", **SHORT}
    untouched = pipe("a", callback_on_step_end=look, callback_on_step_end_tensor_inputs=names, **arguments).images
    assert [entry[0] for entry in seen] == list(range(pipe.num_timesteps))
    assert [entry[1] for entry in seen] == pipe.scheduler.timesteps.tolist()
    shapes = {"latents": (1, *LATENTS), "prompt_embeds": (2, N, WIDTH)}
    assert all(entry[2] == shapes for entry in seen)

    arguments["generator"] = seeded()
    zeroed = pipe("a", callback_on_step_end=lambda p, i, t, kw: {"latents": 0 * kw["latents"]}, **arguments).images
    assert torch.equal(zeroed, torch.zeros_like(untouched))


def test_a_callback_may_interrupt(pipe):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    with counted(pipe.unet) as calls:
        pipe("a", callback_on_step_end=stop, **SHORT)
    assert len(calls) == 2
    with counted(pipe.unet) as calls:
        pipe("a", **SHORT)
    assert len(calls) == pipe.num_timesteps > 2


def test_diffusers_own_callback_ends_the_guidance(pipe):
    with counted(pipe.unet) as rows:
        pipe("a", callback_on_step_end=SDCFGCutoffCallback(cutoff_step_index=1, cutoff_step_ratio=None), **SHORT)
    assert rows == [2, 2, *[1] * (pipe.num_timesteps - 2)]


# -- safety checker ------------------------------------------------------------------------------------------------


def test_unsafe_pictures_are_black(own_components):
    pipe = make_pipe(own_components)
    assert pipe("a", generator=seeded(), output_type="np", **SHORT).images.max() > 0
    with torch.no_grad():
        pipe.safety_checker.concept_embeds_weights.fill_(-2)  # below every cosine
    for output_type in ("np", "pt", "pil"):
        output = pipe("a", generator=seeded(), output_type=output_type, **SHORT)
        assert output.nsfw_content_detected == [True]
        assert np.asarray(output.images[0]).max() == 0


def test_without_a_safety_checker_nothing_is_said(components):
    pipe = make_pipe(components, safety_checker=None, feature_extractor=None)
    assert pipe("a", **SHORT).nsfw_content_detected is None
    assert pipe("a", output_type="latent", **SHORT).nsfw_content_detected is None


# -- interleaved documents -----------------------------------------------------------------------------------------


@pytest.fixture
def storyteller(own_components):
    """A pipeline whose model starts images now and then."""
    pipe = make_pipe(own_components)
    with torch.no_grad():
        head = pipe.multimodal_encoder.lm_head.weight
        head.mul_(3)
        head[pipe.multimodal_encoder.config.image_start_token_id] = 2 * head.std(0)
    return pipe


def test_a_document_keeps_the_order_of_generation(storyteller):
    torch.manual_seed(3)
    arguments = {"max_new_tokens": 60, "do_sample": True, "eos_token_id": [999], **SHORT}
    document = storyteller.generate_document("Once upon a time", generator=seeded(), pictures_at_once=2, **arguments)
    kinds = [part["type"] for part in document]
    assert "image" in kinds[:-1]
    assert "text" in kinds
    assert all(set(part) == {"type", "image", "nsfw_content_detected"} for part in document if part["type"] == "image")

    # The same run by hand.
    generator = seeded()
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
    inputs = storyteller.processor(documents="Once upon a time", return_tensors="pt")
    outputs = storyteller.multimodal_encoder.generate(
        **inputs, generation_mode="interleaved", max_new_tokens=60, do_sample=True, eos_token_id=[999]
    )
    parts = storyteller.processor.decode_documents(outputs, inputs["input_ids"].shape[1])[0]
    assert [part["type"] for part in parts] == kinds
    embeds = [part["image_embeds"] for part in parts if part["type"] == "image"]
    pictures = storyteller(prompt_embeds=torch.stack(embeds), generator=generator, **SHORT).images
    for part, expected in zip(document, parts, strict=True):
        if part["type"] == "text":
            assert part == expected
        else:
            got, expected_picture = (np.asarray(picture).astype(int) for picture in (part["image"], pictures.pop(0)))
            assert np.abs(got - expected_picture).max() <= 1  # sums in another order, then rounding


def test_sampling_with_a_generator_repeats_and_leaves_the_global_state(storyteller):
    arguments = {"max_new_tokens": 20, "do_sample": True, "num_inference_steps": 1}
    state = torch.get_rng_state()
    texts = [
        [part.get("text") for part in storyteller.generate_document("Once", generator=seeded(seed), **arguments)]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert texts[0] == texts[1] != texts[2]
    storyteller.generate_document("Once", **arguments)
    assert not torch.equal(torch.get_rng_state(), state)


def test_documents_in_a_batch(storyteller, images):
    arguments = {"max_new_tokens": 12, "num_inference_steps": 1, "pictures_at_once": 1}
    prompts = [["Once upon a time"], ["See ", images[0], "here"]]
    batch = storyteller.generate_document(prompts, **arguments)
    assert len(batch) == 2
    for prompt, document in zip(prompts, batch, strict=True):
        single = storyteller.generate_document(prompt, **arguments)
        assert [part.get("text") for part in document] == [part.get("text") for part in single]
    again = storyteller.processor(documents=batch)  # what comes out goes in
    assert len(again["input_ids"]) == 2


# -- memory, devices, dtypes ---------------------------------------------------------------------------------------


def test_slicing_and_tiling_reach_the_vae(own_components):
    pipe = make_pipe(own_components)
    arguments = {"latents": noise(2), "output_type": "pt", **SHORT}
    whole = pipe([["a"], ["b"]], **arguments).images
    pipe.enable_vae_slicing()
    assert_close(pipe([["a"], ["b"]], **arguments).images, whole, atol=1e-5, rtol=0)
    pipe.enable_vae_tiling()
    assert pipe.vae.use_slicing
    assert pipe.vae.use_tiling
    pipe.disable_vae_slicing()
    pipe.disable_vae_tiling()
    assert not pipe.vae.use_slicing
    assert not pipe.vae.use_tiling


def offload_sequentially(pipe):
    """What `enable_sequential_cpu_offload` does, onto "cpu", where that method makes "cpu:0" of it."""
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name not in pipe._exclude_from_cpu_offload:
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)


@pytest.mark.parametrize(
    "offload", [lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), offload_sequentially], ids=["whole", "parts"]
)
def test_offloading_draws_the_same_picture(own_components, images, offload):
    """Onto the CPU itself: every hook runs."""
    pipe = make_pipe(own_components)
    expected = pipe(["a", images[0]], generator=seeded(), output_type="pt", **SHORT).images
    offload(pipe)
    pipe.forget_null_embeds()
    with counted(pipe.multimodal_encoder.model.language_model) as passes:
        for _ in range(2):
            got = pipe(["a", images[0]], generator=seeded(), output_type="pt", **SHORT).images
            assert_close(got, expected, atol=1e-6, rtol=0)
    assert len(passes) == 3 * N  # null embeds once


def test_offloading_brings_the_encoder_before_its_vision_tower_runs(own_components, images):
    pipe = make_pipe(own_components)
    pipe.enable_model_cpu_offload(device="cpu")
    order = []

    def record(name, run):
        def recorded(*args, **kwargs):
            order.append(name)
            return run(*args, **kwargs)

        return recorded

    names = {id(part): name for name, part in pipe.components.items()}
    for entry in pipe._all_hooks:
        name = names[id(entry.model)]
        entry.hook.pre_forward = record(name, entry.hook.pre_forward)
    tower = pipe.multimodal_encoder.model.vision_model
    tower.register_forward_pre_hook(lambda module, args: order.append("vision tower"))
    pipe(["a", images[0]], guidance_scale=1, **SHORT)
    assert order[:2] == ["multimodal_encoder", "vision tower"]
    assert list(dict.fromkeys(order)) == ["multimodal_encoder", "vision tower", "unet", "vae"]


def test_bfloat16_and_mixed_dtypes(own_components):
    pipe = make_pipe(own_components).to(dtype=torch.bfloat16)
    assert pipe("a", output_type="pt", **SHORT).images.dtype == torch.bfloat16
    pipe.unet.float()
    pipe.vae.float()
    assert pipe("a", output_type="pt", **SHORT).images.dtype == torch.float32


def test_from_pipe_shares_the_components(pipe):
    other = EmuPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert all(other.components[name] is part for name, part in pipe.components.items())
    got, expected = (p("a", generator=seeded(), output_type="np", **SHORT).images for p in (other, pipe))
    assert np.array_equal(got, expected)


# -- without a VAE -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixel_unet():
    """A U-Net that works on pixels. Not to be changed."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
    )


@pytest.fixture
def pixel_pipe(components, pixel_unet):
    """A pipeline whose pictures no VAE decodes."""
    return make_pipe(components, vae=None, unet=pixel_unet, safety_checker=None, feature_extractor=None)


def test_without_a_vae_the_latents_are_the_picture(pixel_pipe):
    assert pixel_pipe.vae_scale_factor == 1
    assert pixel_pipe.default_size == (SIZE, SIZE)
    call = {"num_inference_steps": 3, "height": 18, "width": 20}
    latents = pixel_pipe("a", generator=seeded(), output_type="latent", **call).images
    assert latents.shape == (1, 3, 18, 20)
    assert torch.equal(pixel_pipe.decode_latents(latents), latents)
    picture = pixel_pipe("a", generator=seeded(), output_type="pt", **call).images
    assert torch.equal(picture, (latents / 2 + 0.5).clamp(0, 1))


def test_without_a_vae_there_is_nothing_to_slice_or_tile(pixel_pipe):
    for name in ("enable_vae_slicing", "disable_vae_slicing", "enable_vae_tiling", "disable_vae_tiling"):
        with pytest.raises(ValueError, match="vae: got None, expected one"):
            getattr(pixel_pipe, name)()


def test_without_a_vae_the_unet_must_work_on_pixels(components):
    with pytest.raises(ValueError, match="in_channels: got 4 without a vae, expected 3"):
        make_pipe(components, vae=None)


def test_a_repository_without_a_vae_loads_everywhere(pixel_pipe, tmp_path):
    folder = tmp_path / "saved"
    pixel_pipe.save_pretrained(folder)
    assert not (folder / "vae").exists()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == [None, None]
    assert find_decoder_problems(folder) == []
    expected = pixel_pipe("a", generator=seeded(), output_type="pt", **SHORT).images

    diffusers_own = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    for loaded in (diffusers_own, load_pipeline(folder), make_pipe(load_pipeline(folder).components)):
        loaded.set_progress_bar_config(disable=True)
        assert loaded.vae is None
        got = loaded("a", generator=seeded(), output_type="pt", **SHORT).images
        assert_close(got, expected, atol=1e-5, rtol=0)  # memory is aligned otherwise
    assert torch.equal(model.lm_head.weight, pixel_pipe.multimodal_encoder.lm_head.weight)

    result = CliRunner().invoke(app, ["info", str(folder)])
    assert "works on pixels" in " ".join(result.output.split())
    options = ["--mode", "image", "--model", str(folder), "--steps", "2", "--seed", "1", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["generate", "a", *options])
    assert Image.open(result.stdout.strip()).size == (SIZE, SIZE)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "both or none"),
        ({"prompt": "a", "prompt_embeds": random_embeds()}, "both or none"),
        ({"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": random_embeds()}, "beside"),
        ({"prompt_embeds": random_embeds()[0]}, r"prompt_embeds: got \(4, 64\)"),
        ({"prompt_embeds": random_embeds()[..., :5]}, r"expected \(num_prompts, num_image_tokens, 64\)"),
        (
            {"prompt_embeds": random_embeds(), "negative_prompt_embeds": random_embeds()[:, :2]},
            "expected as many for both",
        ),
        ({"prompt": "a", "negative_prompt_embeds": random_embeds()[:, :2]}, "'multimodal_encoder': 4"),
        ({"prompt_embeds": random_embeds()[:, :2]}, "'multimodal_encoder': 4"),
        ({"prompt": "a", "negative_prompt_embeds": random_embeds(2)}, "got 2, expected 1 or 1"),
        ({"prompt": [["a"], ["b"]], "negative_prompt": [["a"]] * 3}, "got 3, expected 1 or 2"),
        ({"prompt": []}, "empty list"),
        ({"prompt": [["a"], []]}, "document 1: got an empty list"),
        ({"prompt": 7}, "got int"),
        ({"prompt": "a <image>"}, "special tokens"),
        ({"prompt": [{"type": "sound", "sound": 1}]}, "'sound'"),
        ({"prompt": "a", "height": 15}, "multiples of 2"),
        ({"prompt": "a", "width": -16}, "multiples of 2"),
        ({"prompt": "a", "width": 0}, "multiples of 2"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt: got 0"),
        ({"prompt": "a", "generator": [seeded(), seeded()]}, "got a list of 2, expected 1"),
        ({"prompt": "a", "num_images_per_prompt": 2, "generator": [seeded()]}, "got a list of 1, expected 2"),
        ({"prompt": "a", "latents": noise(2)}, r"latents: got \(2, 4, 8, 8\), expected \(1, 4, 8, 8\)"),
        ({"prompt": "a", "height": 24, "latents": noise()}, r"expected \(1, 4, 12, 8\)"),
        ({"prompt": "a", "output_type": "jpeg"}, "output_type: got 'jpeg'"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]}, r"got \['noise'\]"),
    ],
)
def test_a_call_that_cannot_work_is_refused_before_anything_runs(pipe, arguments, message):
    refused = pytest.raises(ValueError, match=message)
    with counted(pipe.multimodal_encoder) as passes, counted(pipe.unet) as calls, refused:
        pipe(**{"height": SIZE, "width": SIZE, **arguments})
    assert passes == calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pictures_at_once": 0}, "pictures_at_once"),
        ({"height": 15}, "multiples of 2"),
        ({"negative_prompt": [["a"], ["b"]]}, "expected 1 for all"),
        ({"generator": [seeded()]}, "expected one torch.Generator"),
        ({"generation_mode": "text"}, "generation_mode"),
        ({"num_return_sequences": 3, "do_sample": True}, "num_return_sequences: got 3"),
        ({"negative_prompt_embeds": random_embeds(2)}, "got 2, expected 1 for all"),
    ],
)
def test_a_document_that_cannot_be_drawn_is_refused_before_it_is_generated(pipe, arguments, message):
    with counted(pipe.multimodal_encoder) as passes, pytest.raises((ValueError, TypeError), match=message):
        pipe.generate_document("a", **arguments)
    assert passes == []


def test_what_needs_the_encoder_says_so_without_it(decoder):
    with pytest.raises(ValueError, match=r"multimodal_encoder: got None with prompt.*pass prompt_embeds"):
        decoder("a")
    with pytest.raises(ValueError, match=r"got None with guidance.*negative_prompt_embeds or guidance_scale=1"):
        decoder(prompt_embeds=random_embeds())
    with pytest.raises(ValueError, match="multimodal_encoder: got None"):
        decoder.generate_document("a")


def test_components_that_do_not_fit_are_refused(components, own_components):
    with pytest.raises(ValueError, match="feature_extractor: got None"):
        make_pipe(components, feature_extractor=None)
    own_components["unet"].register_to_config(cross_attention_dim=32)
    with pytest.raises(ValueError, match="cross_attention_dim: got 32, expected 64"):
        make_pipe(own_components)


def test_settings_without_effect_are_named(pipe, caplog):
    pipe("a", negative_prompt="b", guidance_scale=1, **SHORT)
    assert "negative prompt has no effect" in caplog.text


# -- saving --------------------------------------------------------------------------------------------------------


def test_saving_makes_a_repository_for_both_libraries(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="600KB")
    names = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()}
    package = Path(__file__).parents[1] / "modeling_emu"
    assert {file.name for file in package.glob("*_emu*.py")} == {name for name in names if name.endswith(".py")}
    assert {"config.json", "processor_config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert not any(name.startswith(("multimodal_encoder/", "processor/")) for name in names)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_emu", "EmuPipeline"]
    assert index["multimodal_encoder"] == ["transformers", "EmuHubModel"]
    assert index["processor"] == ["transformers", "EmuHubProcessor"]
    assert "_name_or_path" not in index


def test_a_decoder_saves_alone(decoder, tmp_path):
    decoder.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["multimodal_encoder"] == index["processor"] == [None, None]
    assert not list(tmp_path.glob("*.safetensors"))


def test_pickles_and_variants_are_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="variant"):
        pipe.save_pretrained(tmp_path, variant="fp16")
    assert not any(tmp_path.iterdir())


RELOAD = """
import json, sys
from pathlib import Path
import torch
from diffusers import DiffusionPipeline
from transformers import AutoModel, AutoProcessor

source, folder = sys.argv[1:]
trust = {"trust_remote_code": True}

def draw(name, **kwargs):
    pipe = DiffusionPipeline.from_pretrained(name, **trust, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe, pipe("a red ball", generator=generator, num_inference_steps=2, output_type="pt").images

def check_equal(first, second):
    files = [*Path(first).glob("*.py"), Path(first) / "model_index.json", Path(first) / "config.json"]
    assert {"pipeline_emu.py", "modeling_emu.py", "processing_emu.py"} <= {file.name for file in files}
    for file in files:
        assert file.read_text() == (Path(second) / file.name).read_text(), file

try:
    DiffusionPipeline.from_pretrained(source)
    raise SystemExit("code ran without being trusted")
except ValueError as error:
    assert "trust_remote_code" in str(error)

pipe, expected = draw(source)
assert "modeling_emu" not in sys.modules
pipe.save_pretrained(f"{folder}/first", max_shard_size="600KB")
again, picture = draw(f"{folder}/first")
torch.testing.assert_close(picture, expected, atol=1e-5, rtol=0)  # memory is aligned otherwise
again.save_pretrained(f"{folder}/second")
check_equal(f"{folder}/first", f"{folder}/second")

encoder = AutoModel.from_pretrained(f"{folder}/second", **trust)
processor = AutoProcessor.from_pretrained(f"{folder}/second", **trust)
given, picture = draw(f"{folder}/second", multimodal_encoder=encoder, processor=processor)
assert given.multimodal_encoder is encoder and given.processor is processor
torch.testing.assert_close(picture, expected, atol=1e-5, rtol=0)  # memory is aligned otherwise
given.save_pretrained(f"{folder}/third")
check_equal(f"{folder}/third", f"{folder}/second")

half, picture = draw(f"{folder}/third", dtype=torch.bfloat16)
assert {part.dtype for part in half.components.values() if isinstance(part, torch.nn.Module)} == {torch.bfloat16}
_, picture = draw(f"{folder}/third", device_map="cpu")
torch.testing.assert_close(picture, expected, atol=1e-5, rtol=0)  # memory is aligned otherwise
bare = DiffusionPipeline.from_pretrained(f"{folder}/third", multimodal_encoder=None, processor=None, **trust)
assert bare.multimodal_encoder is None and bare.processor is None

# `device_map="balanced"` measures models without weights first.
from diffusers import pipelines
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, _load_empty_model
empty = _load_empty_model(
    "transformers", "EmuHubModel", ALL_IMPORTABLE_CLASSES, pipelines, False, name="multimodal_encoder",
    dtype=torch.float16, cached_folder=f"{folder}/third", force_download=False, local_files_only=False,
)
assert empty.device.type == "meta" and type(empty).__name__ == "EmuForMultimodalGeneration"

# Once the stand-ins are there, anybody's index may name them: the code of such a folder does not run.
import shutil, transformers
poisoned = Path(shutil.copytree(f"{folder}/third", f"{folder}/poisoned"))
for file in poisoned.glob("*.py"):
    file.write_text("raise SystemExit('code ran without being trusted')")
for class_name in ("EmuHubModel", "EmuHubProcessor"):
    getattr(transformers, class_name).from_pretrained(str(poisoned))

pipe.push_to_hub("org/pushed")
pipe.save_pretrained(f"{folder}/fourth", push_to_hub=True, repo_id="org/saved")
for name in ("org/pushed", "org/saved"):
    pushed, picture = draw(name)
    torch.testing.assert_close(picture, expected, atol=1e-5, rtol=0)  # memory is aligned otherwise
    assert type(AutoModel.from_pretrained(name, **trust)).__name__ == "EmuForMultimodalGeneration"
print("done")
"""


def test_saving_loading_and_pushing_keep_all_of_it(converted_pretrain, tmp_path):
    """In a fresh interpreter with empty caches, which does not have this package."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "token"}
    with LoopbackHub(tmp_path / "repositories") as hub:
        process = subprocess.run(
            [sys.executable, "-c", RELOAD, str(converted_pretrain), str(tmp_path)],
            cwd=tmp_path,
            env=environment | {"HF_ENDPOINT": hub.endpoint},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.stdout.endswith("done\n"), process.stderr
        pushed = {file.relative_to(hub.folder / "org/pushed").as_posix() for file in hub.list_files("org/pushed")}
    saved = {file.relative_to(tmp_path / "fourth").as_posix() for file in (tmp_path / "fourth").rglob("*.*")}
    assert saved == pushed
