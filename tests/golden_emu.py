"""Where the repository lies that conversion makes of the golden base Emu: small and untrained, for tests that train.

It is the base checkpoint of `fixtures/goldens/pretrain`, converted in that folder with

    python ../../../../conversion/convert_emu_to_hub.py pretrain --llama-config llama_config \\
        --model-config Emu.json --causal-former-config causal_former_t5.json --output DIR

less the `.py` files, `conversion_report.json`, the card, `safety_checker/` and `feature_extractor/`, which
`model_index.json` has as `[null, null]`; and with `"variant": "untrained"`. `test_conversion.py` compares it with a conversion.
"""

from pathlib import Path


GOLDEN_EMU = Path(__file__).parent / "fixtures" / "golden_emu"
