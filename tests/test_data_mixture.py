"""The mixture, packing and the collator: what is drawn, how full rows are, whole tensors, and equal losses and gradients."""

import functools
import itertools
import json
import shutil
import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import make_model
from PIL import Image
from test_data_sources import make_page, make_png, write_img2dataset, write_json_lines, write_tar
from test_processing_emu import ASSISTANT, BOS, END, EOS, PAD, RED_DOG, SLOT, START, USER, make_processor
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, Trainer, TrainingArguments

from modeling_emu.data import (
    EmuDataCollator,
    EmuMixture,
    EmuSampleEncoder,
    EmuSource,
    EncodedSample,
    PackedDocuments,
    Sample,
)
from modeling_emu.data.packing import pack
from modeling_emu.processing_emu import EmuProcessor


IGNORED = -100
IMAGE = [START, SLOT, SLOT, SLOT, SLOT, END]


def make_image(level: int = 0) -> dict:
    return {"type": "image", "image": Image.new("RGB", (5, 4), (level, level, level))}


def make_text(text: str) -> dict:
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def processor() -> EmuProcessor:
    return make_processor()


@pytest.fixture(scope="module")
def instruct() -> EmuProcessor:
    return make_processor("instruct")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources: 5 shards of pairs, 2 of pages, 1 of chats."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pairs", "pages", "chats"):
        (folder / name).mkdir()
    write_img2dataset(folder / "pairs", 5, 8)
    for shard in range(2):
        pages = [
            make_page(5 + 3 * i, {j: [(j, 0.5)] for j in range(0, 5 + i, 2)}, "base64", folder, "") for i in range(6)
        ]
        write_json_lines(folder / "pages" / f"{shard}.jsonl", pages)
    chats = [{"instruction": "count " * (i % 7 + 1), "output": f"{i} " * (i % 11 + 1)} for i in range(20)]
    write_json_lines(folder / "chats" / "0.jsonl", chats)
    return folder


def make_sources(folder, kinds=("image_text", "mmc4", "instruction")) -> list[EmuSource]:
    files = {"image_text": "pairs/*.tar", "mmc4": "pages/*.jsonl", "instruction": "chats/*.jsonl"}
    return [EmuSource(kind, f"{folder}/{files[kind]}", name=kind) for kind in kinds]


def get_source_name(key: str) -> str:
    return {"pairs": "image_text", "pages": "mmc4", "chats": "instruction"}[key.split("/")[-2]]


# Encoding and collation of hand-made documents


def test_padded_batch_of_documents(processor):
    samples = [
        Sample([make_image(1), make_text("a red dog."), make_image(2)], "s:0"),
        Sample([make_text("a red dog.")], "s:1"),
    ]
    batch = EmuDataCollator(processor, return_keys=True)(samples)
    first = [BOS, *IMAGE, *RED_DOG, *IMAGE, EOS]
    second = [BOS, *RED_DOG, EOS]
    padding = len(first) - len(second)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "pixel_values", "keys"}
    assert batch["input_ids"].tolist() == [first, second + [PAD] * padding]
    assert batch["labels"].tolist() == [[IGNORED, *first[1:]], [IGNORED, *second[1:]] + [IGNORED] * padding]
    assert batch["attention_mask"].tolist() == [[1] * len(first), [1] * len(second) + [0] * padding]
    assert batch["keys"] == ["s:0", "s:1"]
    expected = processor(images=[part["image"] for part in samples[0].document[::2]], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_packed_batch_of_documents(processor):
    encoder = EmuSampleEncoder(processor)
    one, two, three = (
        encoder.encode(Sample(document, str(index)))
        for index, document in enumerate(
            [[make_image(1), make_text("a red dog.")], [make_text("a red dog.")], [make_image(3)]]
        )
    )
    batch = EmuDataCollator(processor)([[two, one], [three]])
    text, image = [BOS, *RED_DOG, EOS], [BOS, *IMAGE, *RED_DOG, EOS]
    alone = [BOS, *IMAGE, EOS]
    padding = len(text) + len(image) - len(alone)
    assert set(batch) == {"input_ids", "labels", "position_ids", "pixel_values", "use_cache"}
    assert batch["use_cache"] is False
    assert batch["input_ids"].tolist() == [text + image, alone + [PAD] * padding]
    assert batch["labels"].tolist() == [
        [IGNORED, *text[1:], IGNORED, *image[1:]],
        [IGNORED, *alone[1:]] + [IGNORED] * padding,
    ]
    assert batch["position_ids"].tolist() == [
        [*range(len(text)), *range(len(image))],
        [*range(len(alone)), *range(padding)],
    ]
    assert torch.equal(batch["pixel_values"], torch.cat([one.pixel_values, three.pixel_values]))


def test_labels_of_a_conversation_are_its_answers(instruct):
    document = [
        make_image(),
        make_image(),
        make_text("a red dog."),
        make_text("a red dog."),
        make_text("a"),
        make_text("a"),
    ]
    batch = EmuDataCollator(instruct)([Sample(document, "s:0", answers=(3, 5))])
    dog, a = RED_DOG, RED_DOG[:1]
    colon = instruct.tokenizer("[USER]: a", add_special_tokens=False)["input_ids"][1:-1]
    ids = [
        BOS,
        USER,
        *colon,
        *IMAGE,
        *IMAGE,
        *dog,
        ASSISTANT,
        *colon,
        *dog,
        EOS,
        USER,
        *colon,
        *a,
        ASSISTANT,
        *colon,
        *a,
        EOS,
    ]
    assert batch["input_ids"].tolist() == [ids]
    answers = [IGNORED] * len(ids)
    begin = ids.index(EOS)
    answers[begin - len(dog) : begin + 1] = [*dog, EOS]
    answers[-len(a) - 1 :] = [*a, EOS]
    assert batch["labels"].tolist() == [answers]


def test_a_system_message_of_the_data_is_not_learned(instruct):
    sample = Sample([make_text("hi"), make_text("a red dog.")], "s:0", answers=(1,), system="a red dog.")
    encoded = EmuSampleEncoder(instruct).encode(sample)
    assert encoded.input_ids.tolist()[1 : 1 + len(RED_DOG)] == RED_DOG
    assert encoded.labels[encoded.labels != IGNORED].tolist() == [*RED_DOG, EOS]


def test_a_template_without_marked_answers_is_refused(processor):
    with pytest.raises(ValueError, match=r"answers: got none|generation"):
        EmuSampleEncoder(processor).encode(Sample([make_text("a"), make_text("b")], "s:0", answers=(1,)))


def test_text_only_batches_have_no_pixels(processor):
    assert "pixel_values" not in EmuDataCollator(processor)([Sample([make_text("a red dog.")], "s:0")])


def test_packed_and_single_features_do_not_mix(processor):
    encoded = EmuSampleEncoder(processor).encode(Sample([make_text("a")], "s:0"))
    with pytest.raises(ValueError, match="got 1 packed rows of 2, expected all or none"):
        EmuDataCollator(processor)([encoded, [encoded]])


@pytest.mark.parametrize("answers", [None, (1, 3, 5)])
def test_counted_tokens_are_those_of_the_encoding(instruct, answers):
    video = {"type": "video", "video": [make_image(i)["image"] for i in range(3)]}
    for extra in ([], [make_image()], [video, make_image()]):
        document = [
            make_text("a red dog. "),
            make_text("one"),
            make_text("two"),
            make_text("3"),
            make_text("4"),
            make_text("5"),
        ]
        document[0:0] = extra
        moved = None if answers is None else tuple(index + len(extra) for index in answers)
        sample = Sample(document, "s:0", answers=moved)
        encoder = EmuSampleEncoder(instruct)
        assert encoder.count_tokens(sample) == len(encoder.encode(sample).input_ids)


def test_long_documents_are_split_where_parts_end(processor):
    document = list(itertools.chain.from_iterable([make_image(i), make_text("a red dog.")] for i in range(5)))
    encoder = EmuSampleEncoder(processor, max_length=25)
    pieces = encoder(Sample(document, "s:0"))
    whole = EmuSampleEncoder(processor)(Sample(document, "s:0"))[0]
    assert [piece.key for piece in pieces] == ["s:0#0", "s:0#1", "s:0#2"]
    assert all(len(piece.input_ids) <= 25 for piece in pieces)
    inner = [token for piece in pieces for token in piece.input_ids.tolist()[1:-1]]
    assert inner == whole.input_ids.tolist()[1:-1]
    assert torch.equal(torch.cat([piece.pixel_values for piece in pieces]), whole.pixel_values)


def test_long_conversations_are_split_where_answers_end(instruct):
    document = [make_text(text) for text in ("a red dog.", "a red dog.") * 4]
    encoder = EmuSampleEncoder(instruct, max_length=32)
    pieces = encoder(Sample(document, "s:0", answers=(1, 3, 5, 7)))
    assert len(pieces) > 1
    assert all(len(piece.input_ids) <= 32 for piece in pieces)
    learned = [token for piece in pieces for token in piece.labels[piece.labels != IGNORED].tolist()]
    assert learned == [*RED_DOG, EOS] * 4


@pytest.mark.parametrize(
    ("document", "answers"),
    [
        ([make_text("a red dog. " * 20)], None),
        ([make_image(), make_text("a red dog. " * 20)], None),
        ([make_image()] + [make_text("a red dog.")] * 8, (2, 4, 6, 8)),
    ],
)
def test_what_cannot_be_split_is_refused(instruct, document, answers):
    with pytest.raises(ValueError, match=r"tokens.*expected at most 30"):
        EmuSampleEncoder(instruct, max_length=30)(Sample(document, "s:0", answers=answers))


def test_special_tokens_in_the_data_are_refused(processor):
    with pytest.raises(ValueError, match="got special tokens"):
        EmuSampleEncoder(processor)(Sample([make_text("end </s> here")], "s:0"))


# Packed = padded


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_and_padded_give_equal_losses_and_gradients(processor, attention):
    small = make_small_processor(processor)
    text_config = {"vocab_size": len(processor.tokenizer), "pad_token_id": PAD, "attn_implementation": attention}
    ids = {"image_token_id": SLOT, "image_start_token_id": START, "image_end_token_id": END}
    model = make_model(text_config=text_config, **ids).train()
    encoder = EmuSampleEncoder(small)
    documents = [
        [make_text("a red dog."), make_image(10)],
        [make_text("two dogs and a cat on a red chair.")],
        [make_image(30), make_text("one"), make_image(40), make_image(200), make_text("two")],
        [make_image(90)],
        [make_image(120), make_text("a")],
    ]
    one, two, three, four, five = (encoder.encode(Sample(document, "")) for document in documents)
    collator = EmuDataCollator(small)
    results = []
    for features in (
        [one, two, three, four, five],
        [[one, two, three], [four, five]],
        [[one, two, three, four, five]],
    ):
        model.zero_grad()
        outputs = model(**collator(features))
        (outputs.text_loss_sum + outputs.regression_loss_sum).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        results.append((outputs, gradients))
    padded, padded_gradients = results[0]
    assert padded.num_text_targets > 10
    assert padded.num_regression_targets == 6 * 4
    for packed, gradients in results[1:]:
        for name in ("num_text_targets", "num_regression_targets"):
            assert getattr(packed, name) == getattr(padded, name)
        for name in ("text_loss_sum", "regression_loss_sum"):
            torch.testing.assert_close(getattr(packed, name), getattr(padded, name), rtol=1e-6, atol=0)
        for name, expected in padded_gradients.items():
            # float32 sums in another order: relative to the largest entry of the tensor
            error = (gradients[name] - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
            assert error < 1e-5, name
        total = torch.cat([gradient.flatten() for gradient in padded_gradients.values()])
        difference = torch.cat([gradient.flatten() for gradient in gradients.values()]) - total
        assert difference.norm() / total.norm() < 1e-6


# Packing


def test_rows_of_packing():
    assert pack([], 10) == []
    assert pack([10, 10], 10) == [[0], [1]]
    assert pack([3, 6, 4, 7], 10) == [[0, 3], [1, 2]]
    assert pack([5, 5, 5], 10) == [[0, 1], [2]]
    with pytest.raises(ValueError, match="document 1: got 11 tokens, expected at most 10"):
        pack([1, 11], 10)


def test_packing_fills_rows_of_a_mixed_set(folder, instruct, capsys):
    mixture = EmuMixture(make_sources(folder), encoder=EmuSampleEncoder(instruct, max_length=512))
    begin = time.perf_counter()
    rows = list(itertools.islice(iter(PackedDocuments(mixture)), 40))
    seconds = time.perf_counter() - begin
    lengths = [sum(len(document.input_ids) for document in row) for row in rows]
    assert max(lengths) <= 512
    collator = EmuDataCollator(instruct)
    documents = [document for row in rows for document in row]
    padded = collator(documents[:64])["attention_mask"].float().mean().item()
    packed = sum(lengths) / (512 * len(rows))
    kinds = Counter(get_source_name(document.key) for document in documents)
    with capsys.disabled():
        print(  # noqa: T201
            f"\nshare of tokens that are no padding: packed {packed:.4f}, padded (64 rows) {padded:.4f}; "
            f"{len(documents) / seconds:.0f} samples/s on one core; {dict(kinds)}"
        )
    assert len(kinds) == 3
    assert packed >= 0.95


def test_packing_neither_loses_nor_repeats_documents(folder, instruct):
    encoder = EmuSampleEncoder(instruct, max_length=128)
    mixture = EmuMixture(make_sources(folder), encoder=encoder, repeat=False)
    alone = Counter(document.key for document in mixture)
    packed = Counter(document.key for row in PackedDocuments(mixture, num_rows=3) for document in row)
    assert packed == alone
    assert max(alone.values()) == 1


def test_packing_resumes_exactly_at_every_row(folder, instruct):
    def make_packed() -> PackedDocuments:
        mixture = EmuMixture(make_sources(folder), encoder=EmuSampleEncoder(instruct, max_length=128), seed=5)
        return PackedDocuments(mixture, num_rows=3)

    packed = make_packed()
    rows, states = [], [json.loads(json.dumps(packed.state_dict()))]
    for row in itertools.islice(iter(packed), 12):
        rows.append([document.key for document in row])
        states.append(json.loads(json.dumps(packed.state_dict())))
    for at in range(12):
        resumed = make_packed()
        resumed.load_state_dict(states[at])
        assert resumed.state_dict() == states[at]
        resumed_rows = [[document.key for document in row] for row in itertools.islice(iter(resumed), 3)]
        assert resumed_rows[: 12 - at] == rows[at : at + 3]
    assert [[document.key for document in row] for row in itertools.islice(iter(packed), 12)] == rows


def test_packing_says_what_it_needs(folder, instruct):
    with pytest.raises(ValueError, match="got no encoder"):
        PackedDocuments(EmuMixture(make_sources(folder, ("image_text",))))
    stepped = EmuMixture(make_sources(folder), batch_sizes=[1, 1, 1], encoder=EmuSampleEncoder(instruct))
    with pytest.raises(ValueError, match="got batch_sizes"):
        PackedDocuments(stepped)


# The mixture


def test_samples_are_drawn_by_weight(folder, instruct):
    sources = make_sources(folder, ("image_text", "instruction"))
    names = [get_source_name(sample.key) for sample in itertools.islice(EmuMixture(sources, weights=[3, 1]), 400)]
    assert 270 <= names.count("image_text") <= 330


def test_a_step_is_of_one_source_with_its_own_batch_size(folder):
    sources = make_sources(folder, ("image_text", "instruction"))
    mixture = EmuMixture(sources, weights=[1, 3], batch_sizes=[4, 2])
    steps = [[get_source_name(sample.key) for sample in batch] for batch in itertools.islice(mixture, 100)]
    assert all(step in (["image_text"] * 4, ["instruction"] * 2) for step in steps)
    assert 60 <= sum(step[0] == "instruction" for step in steps) <= 90
    others = EmuMixture(make_sources(folder, ("image_text", "instruction")), weights=[1, 3], batch_sizes=[4, 2])
    others.split(1, 2)
    assert [get_source_name(batch[0].key) for batch in itertools.islice(others, 100)] == [step[0] for step in steps]


def test_steps_resume_exactly(folder):
    def make_mixture() -> EmuMixture:
        return EmuMixture(make_sources(folder, ("image_text", "instruction")), batch_sizes=[3, 2], seed=1)

    mixture = make_mixture()
    iterator = iter(mixture)
    batches, states = [], []
    for _ in range(30):
        batches.append([sample.key for sample in next(iterator)])
        states.append(json.loads(json.dumps(mixture.state_dict())))
    for at in (0, 7, 22):
        resumed = make_mixture()
        resumed.load_state_dict(states[at])
        assert [[s.key for s in batch] for batch in itertools.islice(resumed, 7)] == batches[at + 1 : at + 8]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_are_streamed_from_a_server(folder, num_workers):
    class QuietHandler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        source = EmuSource("image_text", [f"{address}/pairs/0000{shard}.tar" for shard in range(5)])
        mixture = EmuMixture([source], repeat=False)
        loader = DataLoader(mixture, batch_size=None, num_workers=num_workers, collate_fn=get_key)
        keys = list(loader)
        server.shutdown()
    assert sorted(keys) == [f"{address}/pairs/{s:05d}.tar:{s:05d}{row:04d}" for s in range(5) for row in range(8)]


@pytest.mark.parametrize("kind", ["image_text", "instruction"])
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (2, 2), (3, 1)])
def test_ranks_and_workers_share_every_sample_once(folder, kind, world_size, num_workers):
    """By shards where there are enough of them (5 of pairs), else by rows (1 shard of chats)."""
    keys = []
    for rank in range(world_size):
        mixture = EmuMixture(make_sources(folder, (kind,)), repeat=False)
        mixture.split(rank, world_size)
        loader = DataLoader(mixture, batch_size=None, num_workers=num_workers, collate_fn=get_key)
        keys.append(list(loader))
    whole = [sample.key for sample in EmuMixture(make_sources(folder, (kind,)), repeat=False)]
    assert Counter(itertools.chain.from_iterable(keys)) == Counter(whole)
    assert max(Counter(whole).values()) == 1
    assert all(keys)


def get_key(sample: Sample) -> str:
    return sample.key


def test_shards_are_shuffled_anew_in_every_pass(folder):
    mixture = EmuMixture(make_sources(folder, ("image_text",)))
    keys = [sample.key for sample in itertools.islice(mixture, 120)]
    passes = [keys[:40], keys[40:80], keys[80:]]
    assert len({tuple(each) for each in passes}) == 3
    assert all(sorted(each) == sorted(passes[0]) for each in passes)
    for each in passes:  # inside a shard, rows keep their order
        for _, shard in itertools.groupby(each, key=lambda key: key.rsplit(":", 1)[0]):
            rows = list(shard)
            assert len(rows) == 8
            assert rows == sorted(rows)


def test_what_is_random_depends_on_seed_and_pass_alone(folder, tmp_path):
    def get_sides(seed: int) -> list[tuple[str, str]]:
        mixture = EmuMixture(make_sources(folder, ("image_text",)), seed=seed)
        return [(sample.key, sample.document[0]["type"]) for sample in itertools.islice(mixture, 80)]

    sides = get_sides(0)
    assert sides == get_sides(0)
    shutil.copytree(folder / "pairs", tmp_path / "pairs")
    moved = EmuMixture(make_sources(tmp_path, ("image_text",)))
    names = [(key.rsplit("/", 1)[1], side) for key, side in sides]
    assert [
        (sample.key.rsplit("/", 1)[1], sample.document[0]["type"]) for sample in itertools.islice(moved, 80)
    ] == names
    assert dict(sides[:40]) != dict(sides[40:])
    assert dict(sides[:40]) != dict(get_sides(1)[:40])


def test_rows_and_broken_rows_are_counted_per_source(tmp_path):
    members = {"a.png": make_png(1), "a.txt": "fine", "b.png": b"", "b.txt": "broken"}
    source = EmuSource("image_text", str(write_tar(tmp_path / "0.tar", members)), name="web", max_broken_fraction=0.5)
    mixture = EmuMixture([source], repeat=False)
    assert len(list(mixture)) == 1
    assert mixture.count_rows() == {"web": {"num_rows": 2, "num_broken": 1}}


def test_a_mixture_refuses_what_does_not_match(folder):
    sources = make_sources(folder, ("image_text", "instruction"))
    for kwargs, message in (
        (dict(sources=[]), "sources: got names"),
        (dict(sources=[sources[0]] * 2), "all different"),
        (dict(sources=sources, weights=[1, 2, 3]), "weights: got"),
        (dict(sources=sources, weights=[1, 0]), "2 positive numbers"),
        (dict(sources=sources, batch_sizes=[1]), "batch_sizes: got"),
    ):
        with pytest.raises(ValueError, match=message):
            EmuMixture(**kwargs)
    with pytest.raises(ValueError, match="rank: got 2, expected 0 to 1"):
        EmuMixture(sources).split(2, 2)
    state = EmuMixture(sources[:1]).state_dict()
    with pytest.raises(ValueError, match="got 1 sources, expected 2"):
        EmuMixture(sources).load_state_dict(state)


def make_small_processor(processor: EmuProcessor) -> EmuProcessor:
    """The tokenizer of the goldens, and the tiny model's images."""
    image_processor = CLIPImageProcessorPil(size={"height": 28, "width": 28}, do_center_crop=False)
    return EmuProcessor(image_processor, processor.tokenizer, num_image_tokens=3, variant=processor.variant)


def make_trainer(folder, processor: EmuProcessor, packing: bool, output_dir, **kwargs) -> Trainer:
    small = make_small_processor(processor)
    ids = {"image_token_id": SLOT, "image_start_token_id": START, "image_end_token_id": END}
    model = make_model(text_config={"vocab_size": len(processor.tokenizer), "pad_token_id": PAD}, **ids)
    mixture = EmuMixture(make_sources(folder), encoder=EmuSampleEncoder(small, max_length=128), seed=7)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        **kwargs,
    )
    dataset = PackedDocuments(mixture) if packing else mixture
    return Trainer(model, arguments, train_dataset=dataset, data_collator=EmuDataCollator(small))


@pytest.mark.parametrize(("packing", "num_workers"), [(False, 0), (True, 0), (True, 2)])
def test_plain_trainer_trains_and_resumes_exactly(folder, instruct, packing, num_workers, tmp_path):
    kwargs = dict(save_steps=2, dataloader_num_workers=num_workers)
    whole = make_trainer(folder, instruct, packing, tmp_path / "whole", max_steps=5, **kwargs)
    before = {name: parameter.clone() for name, parameter in whole.model.named_parameters()}
    whole.train()
    assert [name for name, parameter in whole.model.named_parameters() if torch.equal(parameter, before[name])] == []

    resumed = make_trainer(folder, instruct, packing, tmp_path / "resumed", max_steps=5, **kwargs)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_an_encoded_sample_is_whole(processor):
    encoded = EmuSampleEncoder(processor)(Sample([make_image(), make_text("a")], "s:0"))[0]
    assert isinstance(encoded, EncodedSample)
    assert encoded.input_ids.shape == encoded.labels.shape
    assert encoded.pixel_values.shape == (1, 3, 224, 224)
