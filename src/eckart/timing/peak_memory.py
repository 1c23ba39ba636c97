"""Peak memory of one model, measured in a process of its own: what loading and running it adds.

`python -m eckart.timing.peak_memory MODEL DTYPE THREADS BATCH PROMPT STEPS` prints JSON.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def peak_memory(model: str, dtype: str, threads: int, batch: int, prompt: int, steps: int) -> int | None:
    """Bytes above a process that has only imported everything; None where the system does not tell (no /proc).

    A model that is read by memory map counts with the pages it has touched.
    """
    if not STATUS.exists():
        return None
    command = [sys.executable, "-W", "ignore", "-m", "eckart.timing.peak_memory", model, dtype]
    arguments = [str(number) for number in (threads, batch, prompt, steps)]
    process = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    peak: int = json.loads(process.stdout.splitlines()[-1])["bytes"]
    return peak


def _high_water() -> int:
    """The most memory this process has held, in bytes (`ru_maxrss` would start at that of the parent)."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main(model: str, dtype: str, threads: str, batch: str, prompt: str, steps: str) -> None:
    import transformers

    from eckart.checkpoints import pretrained
    from eckart.timing import subjects as speed_subjects

    torch.set_num_threads(int(threads))
    config = transformers.AutoConfig.from_pretrained(str(pretrained.locate(model)))
    ids = speed_subjects.prompt_ids(config.vocab_size, int(batch), int(prompt))
    before = _high_water()
    subject = speed_subjects.load(model, dtype, "cpu", int(threads))
    token, state = subject.prefill(ids)
    for _ in range(int(steps)):
        token, state = subject.step(token, state)
    sys.stdout.write(json.dumps({"bytes": _high_water() - before}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
