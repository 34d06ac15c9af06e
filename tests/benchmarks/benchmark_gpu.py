"""Speed and memory of the published size on one GPU, with random weights.

Decoding one row reads the layers of the language model and a head once per step, so memory bandwidth bounds it: the
least time of a step is the bytes of layers and regression head over the bandwidth that a plain copy reaches on the
same card, printed beside each time. Pictures add 50 steps of a U-Net of Stable Diffusion 1.5's size, twice per step
for guidance.

    python tests/benchmarks/benchmark_gpu.py
    python tests/benchmarks/benchmark_gpu.py --quantization 4bit
    python tests/benchmarks/benchmark_gpu.py --size tiny --device cpu

The last runs all of it at a size that means nothing, to see that it runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import BitsAndBytesConfig, GenerationConfig

from modeling_emu import EmuConfig, EmuForMultimodalGeneration, EmuPipeline


BOS, PAD = 1, 32000
TINY = {
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "causal_former_config": {"encoder_hidden_size": 32, "projection_size": 64, "num_hidden_layers": 1},
    "text_config": {
        "model_type": "llama",
        "vocab_size": 32004,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}
NUM_NEW_TOKENS = 128
NUM_STEPS = 50


class Bench:
    """One device, with a clock that waits for it."""

    def __init__(self, device: str):
        self.device = torch.device(device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, function: Callable[[], object], runs: int = 5, warmups: int = 2) -> float:
        """Median seconds of a call."""
        times = []
        for run in range(warmups + runs):
            self.synchronize()
            begin = time.perf_counter()
            function()
            self.synchronize()
            if run >= warmups:
                times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def measure_bandwidth(self) -> float:
        """Bytes per second of a copy, read and written counted."""
        source = torch.empty(1 << (30 if self.device.type == "cuda" else 26), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.measure(lambda: target.copy_(source))

    def peak_gib(self) -> str:
        if self.device.type != "cuda":
            return "not measured"
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"


def make_model(size: str, device: torch.device, quantization: str | None) -> EmuForMultimodalGeneration:
    """Random weights made on the device; quantised as `from_pretrained` does, where asked."""
    config = EmuConfig(**(TINY if size == "tiny" else {}))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    # What is quantised on the way to the device is made beside it, or its own size would be the peak.
    with device if quantization is None else torch.device("cpu"):
        model = EmuForMultimodalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    if quantization is not None:
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=quantization == "4bit",
            load_in_8bit=quantization == "8bit",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = EmuForMultimodalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=model.state_dict(),
            quantization_config=quantization_config,
            dtype=torch.bfloat16,
            device_map={"": device},
        ).eval()
    model.generation_config = GenerationConfig(bos_token_id=BOS, pad_token_id=PAD)
    return model


def make_pipeline(size: str, model: EmuForMultimodalGeneration) -> EmuPipeline:
    """A decoder of Stable Diffusion 1.5's size, or a tiny one, without a tokenizer: prompts come as embeddings."""
    widths = (32, 64) if size == "tiny" else (320, 640, 1280, 1280)
    attention = len(widths) - 1
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * attention + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attention,
        cross_attention_dim=model.config.text_config.hidden_size,
        attention_head_dim=8,
    )
    vae_widths = (32, 32, 32, 32) if size == "tiny" else (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=vae_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
    )
    return EmuPipeline(
        multimodal_encoder=None,
        processor=None,
        unet=unet,
        vae=vae,
        scheduler=PNDMScheduler(skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
    ).to(model.device, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="published", choices=("published", "tiny"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantization", choices=("8bit", "4bit"))
    arguments = parser.parse_args()
    bench = Bench(arguments.device)
    model = make_model(arguments.size, bench.device, arguments.quantization)
    num_slots = model.config.num_image_tokens
    read = (model.model.language_model.layers, model.regression_head)  # a text step also reads the head of the tokens
    read_per_step = sum(p.numel() * p.element_size() for part in read for p in part.parameters())
    bandwidth = bench.measure_bandwidth()
    least_ms = 1e3 * read_per_step / bandwidth
    print(
        f"copy {bandwidth / 1e9:.0f} GB/s; {read_per_step / 1e9:.2f} GB of weights: at least {least_ms:.2f} ms a step"
    )

    inputs = {"input_ids": torch.randint(3, 32000, (1, 24), device=bench.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    caches = {
        "dynamic cache": {"cache_implementation": "dynamic"},
        "static cache, compiled": {"cache_implementation": "static"},
    }
    for name, cache in caches.items():
        text = {"max_new_tokens": NUM_NEW_TOKENS, "min_new_tokens": NUM_NEW_TOKENS, **cache}
        text_ms = 1e3 * bench.measure(lambda text=text: model.generate(**inputs, **text)) / NUM_NEW_TOKENS
        image_ms = 1e3 * bench.measure(lambda cache=cache: model.generate(**inputs, generation_mode="image", **cache))
        print(
            f"{name}: {1e3 / text_ms:.1f} tokens/s ({text_ms / least_ms:.2f} x the least time); "
            f"image embeddings {image_ms:.0f} ms ({image_ms / num_slots / least_ms:.2f} x)"
        )
    print(f"peak memory of the encoder: {bench.peak_gib()}")

    pipe = make_pipeline(arguments.size, model)
    pipe.set_progress_bar_config(disable=True)
    num_steps = 2 if arguments.size == "tiny" else NUM_STEPS

    def draw() -> None:
        embeds = model.generate(**inputs, generation_mode="image").image_embeds
        pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, num_inference_steps=num_steps, output_type="np")

    print(f"a picture of 512 x 512 in {num_steps} steps: {bench.measure(draw, runs=3, warmups=1):.2f} s")
    print(f"peak memory with the decoder: {bench.peak_gib()}")


if __name__ == "__main__":
    main()
