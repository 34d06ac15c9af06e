"""Compare a converted repository with the published numbers, in an interpreter that cannot import this package.

    python tests/golden_run.py FOLDER tests/fixtures/goldens/pretrain

Prints one JSON object: name -> largest difference, or whether two lists of ids are equal.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class Refuse(importlib.abc.MetaPathFinder):
    """Keeps this package out: all code must come from the folder."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_emu", "conversion"):
            raise ImportError(f"{name} must not be imported here")


sys.meta_path.insert(0, Refuse())

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor


IMAGE_PLACEHOLDER = "[<IMG_PLH>]"


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return (got.float() - expected).abs().max().item()


def translate_arguments(kwargs: dict) -> dict:
    """Arguments of the published generate to ours: its length penalty defaults to 0, its min_length counts `<s>`."""
    kwargs = {"length_penalty": 0.0, **kwargs} if kwargs["num_beams"] > 1 else dict(kwargs)
    if "min_length" in kwargs:
        kwargs["min_new_tokens"] = kwargs.pop("min_length") - 1
    return kwargs


def strip_padding(ids: list[int], pad_id: int) -> list[int]:
    """Generated ids without the padding behind them."""
    while ids and ids[-1] == pad_id:
        ids = ids[:-1]
    return ids


class GoldenRun:
    """The comparisons, each adding to `results`."""

    def __init__(self, repository: str, golden: str):
        self.golden = Path(golden)
        self.json = json.loads((self.golden / "golden.json").read_text())
        self.tensors = load_file(self.golden / "golden.safetensors")
        self.model = AutoModel.from_pretrained(repository, trust_remote_code=True)
        self.processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
        self.images = [Image.open(path) for path in sorted(self.golden.glob("image_*.png"))]
        self.results: dict[str, float | bool] = {}

    def encode(self, prompts: list[str], images: list[int]) -> dict:
        """Published prompts, whose slots are written out, to the model's inputs."""
        inputs = dict(self.processor.tokenizer(prompts, padding=True, return_tensors="pt"))
        if images:
            inputs["pixel_values"] = self.tensors["pixel_values"][images]
        return inputs

    @torch.no_grad()
    def run_networks(self) -> None:
        pixel_values = self.processor.image_processor(self.images, return_tensors="pt")["pixel_values"]
        self.results["pixel_values"] = difference(pixel_values, self.tensors["pixel_values"])
        tower = self.model.model.vision_model
        features = []
        hook = tower.post_layernorm.register_forward_pre_hook(lambda module, args: features.append(args[0]))
        embeds = self.model.get_image_features(self.tensors["pixel_values"]).pooler_output
        hook.remove()
        self.results["vision_features"] = difference(features[0], self.tensors["vision_features"])
        self.results["visual_embeds"] = difference(torch.stack(embeds), self.tensors["visual_embeds"])
        outputs = self.model(
            input_ids=self.tensors["lm.input_ids"],
            attention_mask=self.tensors["lm.attention_mask"],
            pixel_values=self.tensors["pixel_values"][:1],
            output_hidden_states=True,
        )
        self.results["logits"] = difference(outputs.logits, self.tensors["lm.logits"])
        self.results["hidden"] = difference(outputs.hidden_states[-1], self.tensors["lm.hidden"])
        self.results["regressed"] = difference(outputs.regressed_embeds, self.tensors["lm.regressed"])

    @torch.no_grad()
    def run_losses(self) -> None:
        golden = self.json["loss"]
        input_ids, mask = self.tensors["loss.input_ids"], self.tensors["loss.attention_mask"]
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            pixel_values=self.tensors["pixel_values"][golden["images"]],
            labels=input_ids.masked_fill(mask == 0, -100),
        )
        self.results["text_loss"] = abs(outputs.text_loss.item() / golden["text_loss"] - 1)
        self.results["regression_loss"] = abs(outputs.regression_loss.item() / golden["regression_mse"] - 1)
        self.results["num_text_targets"] = outputs.num_text_targets.item() == golden["num_text_targets"]
        self.results["num_regression_targets"] = (
            outputs.num_regression_targets.item() == golden["num_regression_targets"]
        )

    def run_tokenization(self) -> None:
        for number, entry in enumerate(self.json["tokenization"]):
            ids = self.processor.tokenizer(entry["text"])["input_ids"]
            self.results[f"tokenization.{number}"] = ids == entry["input_ids"]

    def run_generation(self) -> None:
        entries = [
            (f"generate.{number}", [entry["prompt"]], entry) for number, entry in enumerate(self.json["generate"])
        ]
        batch = self.json["generate_batch"]
        for name, prompts, entry in [*entries, ("generate_batch", batch["prompts"], batch)]:
            inputs = self.encode(prompts, entry["images"])
            ids = self.model.generate(**inputs, **translate_arguments(entry["kwargs"]))
            new_ids = ids[:, inputs["input_ids"].shape[1] :].tolist()
            pad_id = self.processor.tokenizer.pad_token_id
            got = [strip_padding(row, pad_id) for row in new_ids]
            # The published generator puts an `<s>` of its own in front.
            expected = [strip_padding(row[row[:1] == [1] :], pad_id) for row in entry["output_ids"]]
            self.results[name] = got == expected

    def run_rank(self) -> None:
        golden = self.json["rank"]
        inputs = self.encode([golden["prompt"]], golden["images"])
        ranked = self.model.rank_candidates(inputs, self.processor.encode_candidates(golden["candidates"]))
        self.results["rank"] = ranked.order.tolist() == golden["ranks"]

    def run_image_embeds(self) -> None:
        for number, entry in enumerate(self.json["generate_image"]):
            prompt = entry["prompt"].replace(entry["image_token"], "<image>")
            texts = [prompt + "[IMG]", entry["negative_prompt"] + "[IMG]"]  # as text: it takes white space before it
            images = [[self.images[index] for index in entry["images"]], []]
            inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
            embeds = self.model.generate(**inputs, generation_mode="image").image_embeds
            self.results[f"image_embeds.{number}"] = difference(embeds, self.tensors[entry["tensor"]])

    def run_pipeline(self, repository: str) -> None:
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        for number, entry in enumerate(self.json["pipeline"]):
            prompt = [part if isinstance(part, str) else self.images[part["image"]] for part in entry["inputs"]]
            arguments = {name: entry[name] for name in ("guidance_scale", "num_inference_steps", "height", "width")}
            latents = self.tensors[f"pipe.{number}.latents"]
            prompt = prompt[0] if len(prompt) == 1 else prompt
            output = pipe(prompt, latents=latents.clone(), output_type="latent", **arguments)
            expected = self.tensors[f"pipe.{number}.final_latents"]
            self.results[f"pipe.{number}.final_latents"] = difference(output.images, expected)
            output = pipe(prompt, latents=latents.clone(), output_type="np", **arguments)
            image = torch.from_numpy(output.images)
            self.results[f"pipe.{number}.image"] = difference(image, self.tensors[f"pipe.{number}.image"])
            self.results[f"pipe.{number}.nsfw"] = output.nsfw_content_detected == [entry["nsfw"]]


def main(repository: str, golden: str) -> None:
    run = GoldenRun(repository, golden)
    run.run_networks()
    run.run_tokenization()
    run.run_generation()
    run.run_rank()
    if "loss" in run.json:
        run.run_losses()
        run.run_image_embeds()
        run.run_pipeline(repository)
    print(json.dumps(run.results))


if __name__ == "__main__":
    main(*sys.argv[1:])
