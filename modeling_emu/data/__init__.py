"""Documents from sources: readers, their mixture, packing, and the collator.

    sources = [EmuSource("image_text", "laion/*.tar"), EmuSource("mmc4", "mmc4/*.jsonl", media="mmc4/images")]
    encoder = EmuSampleEncoder(processor, max_length=2048)
    mixture = EmuMixture(sources, weights=[2, 1], encoder=encoder)
    loader = DataLoader(PackedDocuments(mixture), batch_size=4, collate_fn=EmuDataCollator(processor))

The room knows the processor, and nothing of models or trainers.
"""

from .collator import EmuDataCollator
from .encoding import EmuSampleEncoder, EncodedSample
from .mixture import EmuMixture
from .packing import PackedDocuments
from .samples import Sample
from .source import KINDS, EmuSource


__all__ = [
    "KINDS",
    "EmuDataCollator",
    "EmuMixture",
    "EmuSampleEncoder",
    "EmuSource",
    "EncodedSample",
    "PackedDocuments",
    "Sample",
]
