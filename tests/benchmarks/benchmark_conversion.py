"""Time and memory of a full-size conversion, against a plain copy of the checkpoint.

Measured: seconds of `cp`, and of `convert_emu_to_hub.py` from its start to its last written byte (imports, tokenizer,
key checks, finite check, SHA-256 of the source and all files included; the comparison afterwards is given apart), each
from a cold source and until the bytes are on the disk; and the largest anonymous memory of the converter, polled.

Physics: both read and write 28.4 GB, so the disk sets the floor, and twice 28.4 GB do not fit the page cache of a small
machine. A converter loses time by reading the source twice (the hash), by copying in memory, and by page faults. Mapped
pages are not its own memory: the system takes them back at will. Anonymous memory is torch, the libraries, and the
tensors that are changed (a fused bias, a merged weight, a cast).

    python tests/benchmarks/make_full_size_checkpoint.py /big/Emu-pretrain.pt
    python tests/benchmarks/benchmark_conversion.py /big/Emu-pretrain.pt --llama-config llama_config
    rm /big/Emu-pretrain.pt

It needs the space of the checkpoint once more; what it writes is deleted.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
WRITTEN = "written; comparing with the source"
POLL_S = 0.02
GB = 1e9
SHARD_BYTES = 5 * 10**9


def make_cold(file: Path) -> None:
    """Have everything on the disk, and the file out of the page cache."""
    os.sync()
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_copy(source: Path, target: Path) -> dict[str, float]:
    make_cold(source)
    started = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    copied = time.perf_counter()
    os.sync()
    result = {"seconds": copied - started, "seconds_on_disk": time.perf_counter() - started}
    target.unlink()
    return result


class MemoryWatch(threading.Thread):
    """Polls the memory of a process until it ends."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.peak_bytes = {"RssAnon": 0, "VmHWM": 0}

    def run(self) -> None:
        try:
            while True:
                found = dict(re.findall(r"^(RssAnon|VmHWM):\s+(\d+) kB", self.status.read_text(), re.MULTILINE))
                for name, value in found.items():
                    self.peak_bytes[name] = max(self.peak_bytes[name], int(value) * 1024)
                time.sleep(POLL_S)
        except (FileNotFoundError, ProcessLookupError):
            pass


def measure_conversion(source: Path, output: Path, options: list[str]) -> dict[str, float]:
    make_cold(source)
    script = ROOT / "conversion" / "convert_emu_to_hub.py"
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-u", script, source, f"--output={output}", *options], stdout=subprocess.PIPE, text=True
    )
    watch = MemoryWatch(process.pid)
    watch.start()
    result: dict[str, float] = {}
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{time.perf_counter() - started:7.1f} s  {line.rstrip()}", flush=True)
        if line.strip() == WRITTEN:
            # The converter goes on comparing; a sync from here waits for what it wrote.
            result["seconds"] = time.perf_counter() - started
            result["peak_anonymous_bytes_writing"] = watch.peak_bytes["RssAnon"]
            os.sync()
            result["seconds_on_disk"] = time.perf_counter() - started
    if process.wait():
        raise SystemExit(f"conversion failed with {process.returncode}")
    result["seconds_with_comparison"] = time.perf_counter() - started
    result["peak_anonymous_bytes"] = watch.peak_bytes["RssAnon"]
    result["peak_resident_bytes"] = watch.peak_bytes["VmHWM"]
    shutil.rmtree(output)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--llama-config", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("rest", nargs="*", help="options for the converter, after --")
    options = parser.parse_args()
    source, output = options.source, options.source.with_name("converted")
    print(
        f"{source}: {source.stat().st_size / GB:.2f} GB, {os.cpu_count()} cores, torch threads as the converter sets"
    )
    for _ in range(options.rounds):
        copy = measure_copy(source, source.with_name("copy"))
        print(f"cp: {copy['seconds']:.1f} s, on disk after {copy['seconds_on_disk']:.1f} s", flush=True)
        conversion = measure_conversion(source, output, [f"--llama-config={options.llama_config}", *options.rest])
        ratio, ratio_on_disk = (conversion[key] / copy[key] for key in ("seconds", "seconds_on_disk"))
        limit = (SHARD_BYTES + 10**9) / GB
        print(f"conversion: {conversion['seconds']:.1f} s = {ratio:.2f} cp")
        print(f"  on disk after {conversion['seconds_on_disk']:.1f} s = {ratio_on_disk:.2f} cp")
        print(f"  with the comparison {conversion['seconds_with_comparison']:.1f} s")
        print(f"  peak anonymous memory {conversion['peak_anonymous_bytes'] / GB:.2f} GB, limit {limit:.2f} GB")
        print(json.dumps({"cp": copy, "conversion": conversion}))


if __name__ == "__main__":
    main()
