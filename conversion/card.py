"""The model card of a converted folder: the text of `model_cards/`, and what this folder holds, from the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard


PLACE = "*Conversion writes here what the folder holds: its parts, their numbers and dtypes.*"
DECODER_TAGS = ("diffusers", "text-to-image")  # true only where there is a visual decoder

MERGED = "Emu-I's LoRA is merged into the language model."
ADAPTER = """\
Emu-I's LoRA is **not** merged: it lies in `adapter/`, and without it the model is not Emu-I. Load it (with PEFT) after the
model:

```python
model.load_adapter("{name}", adapter_kwargs={{"subfolder": "adapter"}})
```"""
NO_DECODER = "There is no visual decoder in this folder: it gives text and image embeddings, and no pictures."
DECODER = """\
The visual decoder draws what the model continues with:

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True, dtype=torch.bfloat16).to("cuda")
pipe("An image of a dog wearing a pair of glasses.").images[0]
```"""


def make_card(template: Path, report: Mapping[str, Any], name: str) -> str:
    """The card of one folder.

    Args:
        template: a file of `model_cards/`, with a line where the folder is described.
        report: of the conversion.
        name: that stands for the repository in the template's code.
    """
    card = ModelCard.load(template)
    if not report["decoder"]:
        card.data.tags = [tag for tag in card.data.tags if tag not in DECODER_TAGS]
    return str(card).replace(PLACE, describe_folder(report, name))


def describe_folder(report: Mapping[str, Any], name: str) -> str:
    """What a folder holds and how its parts are loaded, in Markdown; arguments of `make_card`."""
    files = ", ".join(f"`{file}`" for file in report["source"])
    parts = report["parts"] | report["decoder"]
    rows = [
        f"| {part} | {facts['parameters']:,} | {', '.join(facts['dtypes_written'])} |" for part, facts in parts.items()
    ]
    paragraphs = [
        f"Converted from {files} (variant {report['variant']}), every tensor accounted for and compared with its source.\n"
        "`conversion_report.json` has the checksums.",
        "\n".join(["| part | parameters | dtype |", "|---|---|---|", *rows]),
        {"merge": MERGED, "adapter": ADAPTER.format(name=name), None: ""}[report["lora"]],
        DECODER.format(name=name) if report["decoder"] else NO_DECODER,
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
