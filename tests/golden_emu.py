"""Where the repository lies that conversion makes of the golden base Emu: small and untrained, for tests that train."""

from pathlib import Path


GOLDEN_EMU = Path(__file__).parent / "fixtures" / "golden_emu"
