"""Time of the N = 32 embeddings of one image, against a loop that does what the published one does.

The published loop has no cache: for each of the 32 embeddings it reads prompt and embeddings so far again, for two
rows, the prompt and the empty prompt that guidance needs. `generate(generation_mode="image")` reads the prompt once,
then one position per embedding; the empty prompt's embeddings are kept from the first call of a process.

What bounds each: the published loop computes 2 rows x 32 passes over the prompt, so it is bound by arithmetic; a
cached step reads every weight once for one position, so it is bound by memory, and bf16 halves what it reads.

    python tests/benchmarks/benchmark_image_embeds.py
    python tests/benchmarks/benchmark_image_embeds.py --dtype bfloat16
    python tests/benchmarks/benchmark_image_embeds.py --runs 9

Same weights, one process, the two in turn. On a machine that others use, too, the fastest of each says more than the
median of the pairs.
"""

import argparse
import statistics
import time

import torch

from modeling_emu import EmuConfig, EmuForMultimodalGeneration


BOS, PAD, START, END, SLOT = 1, 32000, 32001, 32002, 32003
IMAGE_SIZE = 28
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1}  # of the norm
PROMPTS = {"12 words": (16, 0), "document with 4 images": (48, 4)}  # text tokens, images


def make_model(dtype: torch.dtype) -> EmuForMultimodalGeneration:
    """A language model of 12 layers x 1024 behind a tower that is too small to matter."""
    config = EmuConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "initializer_range": 0.02,
        },
        causal_former_config={
            "encoder_hidden_size": 64,
            "projection_size": 1024,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 32004,
            "hidden_size": 1024,
            "intermediate_size": 2752,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "pad_token_id": PAD,
        },
    )
    torch.manual_seed(0)
    return EmuForMultimodalGeneration(config).to(dtype).eval()


def make_inputs(num_text_tokens: int, num_images: int, num_slots: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A prompt whose images stand between equal stretches of text."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(3, 32000, (num_text_tokens,), generator=generator).tolist()
    ids = [BOS]
    for part in range(num_images + 1):
        stretch = num_text_tokens // (num_images + 1)
        ids += text[part * stretch : (part + 1) * stretch]
        if part < num_images:
            ids += [START, *[SLOT] * num_slots, END]
    inputs = {"input_ids": torch.tensor([ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if num_images:
        inputs["pixel_values"] = torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(dtype)
    return inputs


@torch.no_grad()
def regress_published(model: EmuForMultimodalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """`(2, N, D)`: prompt and empty prompt, both read again for every embedding, without a cache."""
    embed = model.get_input_embeddings()
    start = torch.tensor([[START]])
    prompt = torch.cat((inputs["input_ids"], start), dim=1)
    embeds = embed(prompt)
    if "pixel_values" in inputs:
        features = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)
        embeds = embeds.masked_scatter((prompt == SLOT).unsqueeze(-1), features)
    empty = embed(torch.tensor([[BOS, START]]))
    padding = embed(torch.full((1, embeds.shape[1] - 2), PAD))
    embeds = torch.cat((embeds, torch.cat((padding, empty), dim=1)))
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    mask[1, :-2] = 0
    for _ in range(model.config.num_image_tokens):
        hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        regressed = model.regression_head(hidden.last_hidden_state[:, -1:])
        embeds = torch.cat((embeds, regressed), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
    return embeds[:, -model.config.num_image_tokens :]


def measure(function, *arguments) -> tuple[float, torch.Tensor]:
    begin = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - begin, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.set_num_threads(2)
    model = make_model(dtype)

    def regress(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model.generate(**inputs, generation_mode="image").image_embeds

    print(f"{arguments.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.runs} runs")
    for name, (num_text_tokens, num_images) in PROMPTS.items():
        inputs = make_inputs(num_text_tokens, num_images, model.config.num_image_tokens, dtype)
        _, expected = measure(regress_published, model, inputs)  # warm-up, and the same numbers
        _, got = measure(regress, inputs)
        error = ((got - expected[:1]).norm() / expected[:1].norm()).item()
        if error > TOLERANCES[arguments.dtype]:
            raise SystemExit(f"{name}: the two differ by {error:.1e} of the norm")
        pairs = [
            (measure(regress_published, model, inputs)[0], measure(regress, inputs)[0]) for _ in range(arguments.runs)
        ]
        published, ours = (sorted(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(first / second for first, second in pairs)
        print(
            f"{name} ({inputs['input_ids'].shape[1]} positions): {ratio:.1f}x, the median of the pairs; "
            f"{published[0] / ours[0]:.1f}x by the fastest of each ({published[0]:.2f} s, {ours[0]:.2f} s); "
            f"relative difference {error:.1e}"
        )


if __name__ == "__main__":
    main()
