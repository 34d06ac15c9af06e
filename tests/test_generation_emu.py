"""generate(): what the loop gives against a plain uncached loop written here, in every mode, batch and cache."""

import re

import pytest
import torch
import transformers
from conftest import BOS, END, EOS, NUM_IMAGE_TOKENS, PAD, SLOT, START, image_ids, make_batch, make_config, make_model
from packaging import version
from torch.testing import assert_close
from transformers import CompileConfig, GenerationConfig, StaticCache, TextStreamer
from transformers.generation import BaseStreamer, MaxTimeCriteria
from transformers.utils import logging

from modeling_emu import EmuForMultimodalGeneration, generation_emu


# Prompts in different modes: plain text, an image, an image to start at once, text after an image.
ROWS = [
    [BOS, 5, 6, 7, 8],
    [BOS, *image_ids(), 9, 10],
    [BOS, 11, START],
    [BOS, *image_ids(), 12, *image_ids()],
]
# Makes images start often enough in a random model.
START_BIAS = {"sequence_bias": {(START,): 6.0}}


def select_pixels(pixel_values: torch.Tensor, rows: list[list[int]], row: int) -> torch.Tensor | None:
    """The pixels of one row's images."""
    counts = [ids.count(START) if ids[-1] != START else ids.count(START) - 1 for ids in rows]
    first = sum(counts[:row])
    return pixel_values[first : first + counts[row]] if counts[row] else None


@torch.no_grad()
def generate_uncached(model, ids, pixel_values, mode, num_new_tokens, bias=0.0, max_images=None):
    """One row, no cache, no padding, the whole prompt again at each step: the published way."""
    prompt = torch.tensor([ids])
    embeds = model.get_input_embeddings()(prompt)
    if pixel_values is not None:
        features = torch.stack(model.get_image_features(pixel_values).pooler_output).flatten(0, 1)
        embeds[prompt == SLOT] = features
    images, current = [], None
    ids, num_prompt = list(ids), len(ids)
    while len(ids) < num_prompt + num_new_tokens:
        outputs = model(inputs_embeds=embeds)
        scores = outputs.logits[0, -1].clone()
        scores[START] += bias
        started = sum(1 for i in ids[num_prompt:] if i == END)
        if ids[-1] == START and mode != "text":
            current, next_id = [], SLOT
        elif current is not None:
            next_id = SLOT if len(current) < NUM_IMAGE_TOKENS else END
        else:
            scores[[SLOT, END]] = float("-inf")
            if mode == "text" or (max_images is not None and started >= max_images):
                scores[START] = float("-inf")
            next_id = int(scores.argmax())
        ids.append(next_id)
        if next_id == SLOT:
            next_embed = outputs.regressed_embeds[:, -1:]
            current.append(next_embed[0])
            if len(current) == NUM_IMAGE_TOKENS:
                images.append(torch.cat(current))
        else:
            current = None
            next_embed = model.get_input_embeddings()(torch.tensor([[next_id]]))
        embeds = torch.cat((embeds, next_embed), dim=1)
        if next_id == EOS:
            break
    return ids[num_prompt:], images


def trim(ids: list[int]) -> list[int]:
    """Generated ids of a row up to its end token, without the padding after it."""
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "compiled": {
        "cache_implementation": "static",
        "compile_config": CompileConfig(backend="aot_eager", fullgraph=True),
    },
}


def get_cache_arguments(name: str) -> dict:
    """Arguments of one cache, compiled also on a CPU where asked."""
    arguments = dict(CACHES[name])
    if "compile_config" in arguments:
        arguments["compile_config"]._compile_all_devices = True
    return arguments


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_batch_in_mixed_modes_equals_plain_uncached_loops(cache, mode):
    model = make_model()
    batch = make_batch(ROWS, num_images=3)
    bias = START_BIAS if mode == "interleaved" else {}
    torch.compiler.reset()
    outputs = model.generate(**batch, generation_mode=mode, max_new_tokens=17, **bias, **get_cache_arguments(cache))
    sequences = outputs if mode == "text" else outputs.sequences
    num_images = 0
    for row, ids in enumerate(ROWS):
        expected, images = generate_uncached(
            model, ids, select_pixels(batch["pixel_values"], ROWS, row), mode, 17, bias=6.0 if bias else 0.0
        )
        assert trim(sequences[row, batch["input_ids"].shape[1] :].tolist()) == expected
        if mode == "interleaved":
            generated = outputs.image_embeds[outputs.image_rows == row]
            assert len(generated) == len(images)
            for got, image in zip(generated, images, strict=True):
                # other shapes of the same sums
                assert_close(got, image, atol=2e-5, rtol=1e-4)
            num_images += len(images)
    if mode == "interleaved":
        assert num_images >= 4, "the case must generate images in several rows"
        assert outputs.image_rows.tolist() == sorted(outputs.image_rows.tolist())


@pytest.mark.parametrize("cache", CACHES)
def test_image_mode_equals_plain_uncached_loops(cache):
    model = make_model()
    batch = make_batch(ROWS, num_images=3)
    torch.compiler.reset()
    outputs = model.generate(**batch, generation_mode="image", **get_cache_arguments(cache))
    assert outputs.image_embeds.shape == (len(ROWS), NUM_IMAGE_TOKENS, 32)
    assert outputs.image_rows.tolist() == list(range(len(ROWS)))
    for row, ids in enumerate(ROWS):
        prompt = ids if ids[-1] == START else [*ids, START]
        pixels = select_pixels(batch["pixel_values"], ROWS, row)
        expected, images = generate_uncached(model, prompt, pixels, "interleaved", NUM_IMAGE_TOKENS + 1)
        tail = outputs.sequences[row, -len(prompt) - NUM_IMAGE_TOKENS - 1 :].tolist()
        assert tail == prompt + expected
        assert_close(outputs.image_embeds[row], images[0], atol=2e-5, rtol=1e-4)


def test_compiled_image_steps_are_one_graph_without_recompilation():
    model = make_model()
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    batch = make_batch([[BOS, 5, 6]])
    for _ in range(2):
        model.generate(**batch, generation_mode="image", **get_cache_arguments("compiled"))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("rows", [[[BOS, 5, 6]], [[BOS, 5, 6, 7], [BOS, 5]]], ids=["one row", "padded rows"])
def test_image_mode_asks_nothing_of_the_device_between_steps(rows):
    def count_reads(num_image_tokens: int) -> int:
        config = make_config()
        config.causal_former_config.num_image_tokens = num_image_tokens
        model = EmuForMultimodalGeneration(config).eval()
        reads = 0

        def count(function):
            def counted(tensor, *args, **kwargs):
                nonlocal reads
                reads += 1
                return function(tensor, *args, **kwargs)

            return counted

        with pytest.MonkeyPatch.context() as patch:
            for name in ("item", "__bool__", "tolist", "nonzero", "__int__", "__index__"):
                patch.setattr(torch.Tensor, name, count(getattr(torch.Tensor, name)))
            # without a ready mask, each step of padded rows would ask which are
            model.generate(**make_batch(rows), generation_mode="image")
        return reads

    assert count_reads(3) == count_reads(9) > 0


def test_language_model_reads_each_position_once(tiny_model):
    lengths = []
    hook = tiny_model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    tiny_model.generate(**make_batch([[BOS, 5, 6]]), generation_mode="image")
    hook.remove()
    assert lengths == [4, *[1] * (NUM_IMAGE_TOKENS - 1)]


@pytest.mark.parametrize("arguments", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}])
def test_vision_tower_runs_once_per_image(tiny_model, arguments):
    batch = make_batch([ROWS[1], ROWS[3]], num_images=3)
    num_images = []
    hook = tiny_model.model.vision_model.register_forward_pre_hook(
        lambda module, args: num_images.append(len(args[0]))
    )
    tiny_model.generate(**batch, max_new_tokens=3, **arguments)
    hook.remove()
    assert num_images == [3]


def test_return_sequences_read_the_images_of_their_own_row(tiny_model):
    rows = [ROWS[1], ROWS[3]]
    batch = make_batch(rows, num_images=3)
    beams = tiny_model.generate(**batch, max_new_tokens=4, num_beams=3, num_return_sequences=3)
    for row, ids in enumerate(rows):
        single = make_batch([ids]) | {"pixel_values": select_pixels(batch["pixel_values"], rows, row)}
        alone = tiny_model.generate(**single, max_new_tokens=4, num_beams=3, num_return_sequences=3)
        assert [trim(r.tolist()) for r in beams[3 * row : 3 * row + 3, batch["input_ids"].shape[1] :]] == [
            trim(r.tolist()) for r in alone[:, len(ids) :]
        ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.05, "repetition_penalty": 1.3},
        {"typical_p": 0.9, "no_repeat_ngram_size": 2},
        {"epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
        {"top_k": 1, "renormalize_logits": True, "suppress_tokens": [7, SLOT]},
    ],
)
def test_sampling_with_stock_processors_keeps_images_whole(tiny_model, arguments):
    torch.manual_seed(0)
    batch = make_batch(ROWS, num_images=3)
    outputs = tiny_model.generate(
        **batch, generation_mode="interleaved", do_sample=True, max_new_tokens=30, **START_BIAS, **arguments
    )
    new_ids = outputs.sequences[:, batch["input_ids"].shape[1] :]
    whole = 0
    for prompt, ids in zip(ROWS, new_ids.tolist(), strict=True):
        text = "".join(chr(token_id) for token_id in [prompt[-1], *trim(ids)])
        runs = text.split(chr(START))[1:]
        for run in runs[:-1]:
            assert run.startswith(chr(SLOT) * NUM_IMAGE_TOKENS + chr(END))
            whole += 1
        whole += bool(runs) and runs[-1].startswith(chr(SLOT) * NUM_IMAGE_TOKENS)
    assert outputs.image_embeds.shape[0] == whole > 0
    assert outputs.image_embeds.isfinite().all()


@pytest.mark.parametrize("max_images", [0, 1, 2])
def test_max_images_bounds_every_row(tiny_model, max_images):
    batch = make_batch(ROWS[:2], num_images=1)
    outputs = tiny_model.generate(
        **batch, generation_mode="interleaved", max_images=max_images, max_new_tokens=40, **START_BIAS
    )
    counts = torch.bincount(outputs.image_rows, minlength=2)
    assert (counts <= max_images).all()
    assert int(counts.max()) == max_images
    for row, ids in enumerate(ROWS[:2]):
        pixels = select_pixels(batch["pixel_values"], ROWS, row)
        expected, _ = generate_uncached(tiny_model, ids, pixels, "interleaved", 40, bias=6.0, max_images=max_images)
        assert trim(outputs.sequences[row, batch["input_ids"].shape[1] :].tolist()) == expected


def test_image_cut_short_keeps_its_ids_and_says_so(tiny_model, caplog):
    outputs = tiny_model.generate(**make_batch([[BOS, 5, START]]), generation_mode="interleaved", max_new_tokens=2)
    assert outputs.sequences[0, -2:].tolist() == [SLOT, SLOT]
    assert outputs.image_embeds.shape == (0, NUM_IMAGE_TOKENS, 32)
    assert "end inside an image" in caplog.text


def test_text_mode_starts_no_image_whatever_the_bias(tiny_model):
    ids = tiny_model.generate(
        **make_batch([ROWS[0]]), max_new_tokens=20, sequence_bias={(START,): 50.0, (SLOT,): 60.0}
    )
    assert not set(ids[0, len(ROWS[0]) :].tolist()) & {START, SLOT, END}


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_continuing_from_the_cache_equals_one_run(tiny_model, mode):
    batch = make_batch([ROWS[1], ROWS[0]], num_images=1)
    options = {} if mode == "image" else {"max_new_tokens": 10, **START_BIAS}
    first = tiny_model.generate(**batch, generation_mode=mode, return_dict_in_generate=True, **options)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    mask = torch.cat((batch["attention_mask"], torch.ones_like(first.sequences[:, batch["input_ids"].shape[1] :])), 1)
    mask = mask[:, -first.sequences.shape[1] :]
    if mode == "image":  # [IMG] was appended: every row grew on the right
        mask = torch.cat((batch["attention_mask"], torch.ones_like(mask[:, : NUM_IMAGE_TOKENS + 2])), 1)
    if int(first.sequences[0, -1]) == SLOT or int(first.sequences[1, -1]) == SLOT:
        pytest.fail("the first run must not end inside an image")
    second = tiny_model.generate(
        input_ids=first.sequences,
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=6,
    )
    for row, ids in enumerate([ROWS[1], ROWS[0]]):
        prompt = [*ids, START] if mode == "image" else ids
        bias = 0.0 if mode == "image" else 6.0
        pixels = batch["pixel_values"] if row == 0 else None
        num_first = NUM_IMAGE_TOKENS + 1 if mode == "image" else 10
        _, images = generate_uncached(tiny_model, prompt, pixels, "interleaved", num_first, bias=bias)
        ids_so_far = [token_id for token_id in first.sequences[row].tolist() if token_id != PAD]
        whole = torch.tensor([ids_so_far])
        embeds = tiny_model.get_input_embeddings()(whole)
        known = [] if pixels is None else list(tiny_model.get_image_features(pixels).pooler_output)
        embeds[whole == SLOT] = torch.cat([*known, *images]) if known or images else embeds[whole == SLOT]
        expected = tiny_model.generate(inputs_embeds=embeds, max_new_tokens=6)[0].tolist()
        assert trim(second[row, first.sequences.shape[1] :].tolist()) == trim(expected)


def test_image_mode_takes_a_generation_config_as_it_is(tiny_model, caplog):
    batch = make_batch([ROWS[0]])
    expected = tiny_model.generate(**batch, generation_mode="image").image_embeds
    config = GenerationConfig(max_new_tokens=2, max_length=5, pad_token_id=PAD)
    before = config.to_dict()
    caplog.clear()
    got = tiny_model.generate(**batch, generation_mode="image", generation_config=config).image_embeds
    assert_close(got, expected, atol=0, rtol=0)
    assert config.to_dict() == before
    assert "deprecated" not in caplog.text


def test_image_mode_runs_under_autocast(tiny_model):
    batch = make_batch([ROWS[1], ROWS[0]], num_images=1)
    exact = tiny_model.generate(**batch, generation_mode="image").image_embeds
    with torch.autocast("cpu", torch.bfloat16):
        got = tiny_model.generate(**batch, generation_mode="image").image_embeds
    assert (got.float() - exact).norm() < 0.1 * exact.norm()


def test_image_steps_bring_embeddings_to_the_device_of_the_ids():
    class OtherDeviceHead(torch.nn.Linear):
        """Stands for a head on a second device: what it gives must be asked back."""

        def forward(self, hidden_states):
            return super().forward(hidden_states).to("meta")

    model = make_model()
    head = OtherDeviceHead(32, 32, bias=False)
    ids = torch.ones(1, 1, dtype=torch.long)
    model.regression_head = head
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        generation_emu.regress_next(model, input_ids=ids, visual_inputs=torch.ones(1, 1, 32))


def test_a_cache_of_the_caller_serves_image_mode(tiny_model):
    batch = make_batch([ROWS[0]])
    expected = tiny_model.generate(**batch, generation_mode="image").image_embeds
    cache = StaticCache(config=tiny_model.config.get_text_config(), max_cache_len=64)
    got = tiny_model.generate(**batch, generation_mode="image", past_key_values=cache).image_embeds
    assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23.0"),
    reason="older versions cannot cut image features",
)
def test_chunked_prefill_changes_nothing(tiny_model):
    batch = make_batch([ROWS[3]], num_images=2)
    expected = tiny_model.generate(**batch, max_new_tokens=6)
    got = tiny_model.generate(**batch, max_new_tokens=6, prefill_chunk_size=4)
    assert got.tolist() == expected.tolist()


def test_streamer_sees_every_id(tiny_model):
    class Recorder(BaseStreamer):
        def __init__(self):
            self.ids = []

        def put(self, value):
            self.ids += value.flatten().tolist()

        def end(self):
            self.ids.append("end")

    streamer = Recorder()
    outputs = tiny_model.generate(
        **make_batch([ROWS[2]]), generation_mode="interleaved", max_new_tokens=9, streamer=streamer
    )
    assert streamer.ids == [*outputs.sequences[0].tolist(), "end"]


def test_scores_and_states_are_returned_where_asked_for(tiny_model):
    outputs = tiny_model.generate(
        **make_batch([ROWS[2]]),
        generation_mode="interleaved",
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        output_hidden_states=True,
    )
    num_new = outputs.sequences.shape[1] - len(ROWS[2])
    assert len(outputs.scores) == len(outputs.logits) == len(outputs.hidden_states) == num_new
    assert outputs.scores[0].argmax().item() == SLOT


def compute_candidate_loss(model, prompt: list[int], candidate: list[int], pixel_values) -> float:
    """Sum of token losses of one candidate after its prompt, in one plain pass."""
    ids = torch.tensor([prompt + candidate])
    with torch.no_grad():
        log_probs = model(ids, pixel_values=pixel_values).logits[0].log_softmax(-1)
    return -sum(float(log_probs[len(prompt) + i - 1, token_id]) for i, token_id in enumerate(candidate))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_rank_candidates_equals_one_plain_pass_each(tiny_model, reduction):
    prompt = [BOS, *image_ids(), 9, 10]
    generator = torch.Generator().manual_seed(3)
    candidates = [torch.randint(3, 90, (1 + i % 5,), generator=generator).tolist() for i in range(19)]
    batch = make_batch([prompt], num_images=1)
    ranked = tiny_model.rank_candidates(batch, candidates, reduction=reduction)
    expected = [compute_candidate_loss(tiny_model, prompt, c, batch["pixel_values"]) for c in candidates]
    if reduction == "mean":
        expected = [loss / (len(prompt) + len(c) - 1) for loss, c in zip(expected, candidates, strict=True)]
    assert_close(ranked.losses, torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert ranked.order.tolist() == torch.tensor(expected).argsort().tolist()


def test_rank_candidates_beyond_the_context_is_refused(tiny_model):
    with pytest.raises(ValueError, match="got 257 positions, expected at most 256"):
        tiny_model.rank_candidates(make_batch([[BOS] * 250]), [[5], [6] * 7])


def test_rank_candidates_reads_padding_and_one_image_once(tiny_model):
    prompt = [BOS, *image_ids(), 9, 10]
    padded = make_batch([prompt, [BOS] * 12], num_images=1)
    padded = {name: value[:1] for name, value in padded.items()}
    runs = []
    hook = tiny_model.model.vision_model.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    ranked = tiny_model.rank_candidates(padded, [[7, 8], [9]], reduction="mean")
    hook.remove()
    plain = tiny_model.rank_candidates(make_batch([prompt], num_images=1), [[7, 8], [9]], reduction="mean")
    assert_close(ranked.losses, plain.losses, atol=1e-5, rtol=1e-5)
    assert runs == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generation_mode": "picture"}, "generation_mode: got 'picture'"),
        ({"generation_mode": "image", "num_beams": 2}, "num_beams: got 2 in image mode"),
        ({"generation_mode": "interleaved", "num_beams": 2}, "num_beams: got 2 in interleaved mode"),
        ({"use_cache": False}, "use_cache: got False"),
        ({"guidance_scale": 2.0}, "guidance_scale: got 2.0"),
        ({"max_images": 1}, "max_images: got 1 in text mode"),
        ({"generation_mode": "interleaved", "max_images": -1}, "max_images: got -1"),
        ({"generation_mode": "image", "streamer": TextStreamer(None)}, "streamer: got one in image mode"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "got right padding"),
        ({"input_ids": torch.ones(1, 256, dtype=torch.long), "attention_mask": None}, "got 256 positions and 2 to"),
        ({"max_new_tokens": 255}, "got 3 positions and 255 to generate, expected at most 257"),
        ({"max_new_tokens": None, "max_length": 258}, "got 3 positions and 255 to generate"),
        ({"generation_config": GenerationConfig(max_new_tokens=255), "max_new_tokens": None}, "and 255 to generate"),
        ({"input_ids": torch.ones(1, 3)}, "input_ids: got torch.float32 (1, 3)"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long), "attention_mask": None}, "got torch.int64 (1, 0)"),
        ({"generation_mode": "image", "stopping_criteria": [MaxTimeCriteria(1)]}, "stopping_criteria: got one"),
        ({"generation_mode": "image", "output_scores": True}, "output_scores: got True in image mode"),
        ({"generation_mode": "interleaved", "max_images": 0} | make_batch([[BOS, START]]), "max_images: got 0 with"),
        ({"pixel_values": torch.zeros(1, 3, 28, 28)}, "image slots in input_ids: got 0, expected 3"),
        ({"pixel_values": torch.zeros(1, 3, 30, 28)}, "pixel_values: got"),
        ({"pixel_values": torch.zeros(1, 3, 28, 28, dtype=torch.long)}, "expected a float dtype"),
        ({"input_ids": torch.tensor([[BOS, *image_ids()]]), "attention_mask": None}, "got 3, expected 0"),
    ],
)
def test_what_cannot_be_generated_is_refused(tiny_model, arguments, message):
    batch = make_batch([[BOS, 5, 6]]) | {"max_new_tokens": 2} | arguments
    batch = {name: value for name, value in batch.items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_model.generate(**batch)


def test_embeddings_as_prompt_are_for_text_mode(tiny_model):
    ids = torch.tensor([ROWS[0]])
    embeds = tiny_model.get_input_embeddings()(ids)
    expected = tiny_model.generate(input_ids=ids, max_new_tokens=5)[0, len(ROWS[0]) :]
    assert tiny_model.generate(inputs_embeds=embeds, max_new_tokens=5)[0].tolist() == expected.tolist()
    with pytest.raises(ValueError, match="expected the prompt as ids"):
        tiny_model.generate(inputs_embeds=embeds, generation_mode="image")


def test_emu_i_warns_once_that_it_does_not_draw(caplog):
    logging.warning_once.cache_clear()  # another test may have been warned
    model = make_model(variant="instruct")
    model.generate(**make_batch([ROWS[0]]), max_new_tokens=2)
    assert "not trained to make images" not in caplog.text
    for mode in ("image", "interleaved"):
        model.generate(**make_batch([ROWS[0]]), generation_mode=mode)
    assert caplog.text.count("not trained to make images") == 1


def test_continuous_batching_is_refused(tiny_model):
    with pytest.raises(ValueError, match="generate_batch"):
        tiny_model.generate(**make_batch([[BOS, 5, 6]]), max_new_tokens=2, cache_implementation="paged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "max"}, "reduction: got 'max'"),
        ({"candidates": []}, "candidates: got"),
        ({"candidates": [[5], []]}, "none of them empty"),
        ({"inputs": make_batch([[BOS, 5], [BOS, 6]])}, "prompts: got 2"),
    ],
)
def test_what_cannot_be_ranked_is_refused(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.rank_candidates(**{"inputs": make_batch([[BOS, 5]]), "candidates": [[5]], **arguments})
