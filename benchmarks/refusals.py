"""How long a refusal takes: each mistake that can be known is told in one line, within seconds.

    python benchmarks/refusals.py MODEL CALIBRATION.txt

Every row is a fresh process of `eckart compress` with one mistake, wall time from start to end, and what it said.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _common import read_report, write_report

Mistake = tuple[str, list[str]]


def mistakes(model: str, text: str) -> Iterator[Mistake]:
    """What is wrong, and the command; run in an empty folder."""
    data = ["--data", text, "--windows", "32", "--length", "512"]
    usual = ["compress", model, "--keep", "0.8", *data]
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/x").write_text("")
    Path("loop").symlink_to("loop")
    yield "the output is a file", [*usual, "--out", "file"]
    yield "the output is a folder with files", [*usual, "--out", "full"]
    yield "the output lies under a file", [*usual, "--out", "file/out"]
    yield "the output is a link to itself", [*usual, "--out", "loop"]
    yield "the name of the output is too long", [*usual, "--out", "x" * 300]
    yield "the output is on a device without room", [*usual, "--out", "/proc/out"]
    yield "the work folder is a file", [*usual, "--out", "o", "--work", "file"]
    yield "the work folder lies in the output", [*usual, "--out", "o", "--work", "o/work"]
    yield "a device that is not there", [*usual, "--out", "o", "--device", "cuda:7"]
    yield "a dtype that is unknown", [*usual, "--out", "o", "--dtype", "int3"]
    yield "an option that is unknown", [*usual, "--out", "o", "-o", "factorizer.dampin=1"]
    yield "a method that is none", [*usual, "--out", "o", "-o", "factorizer=os:system"]
    yield "a recipe that is unknown", [*usual, "--out", "o", "--recipe", "svdllm"]
    yield "a share out of reach", ["compress", model, "--keep", "0.0001", *data, "--out", "o"]
    yield "a size out of reach", ["compress", model, "--size", "1MB", *data, "--out", "o"]
    yield "a bound by a recipe that predicts nothing", [
        "compress", model, "--max-kl", "0.1", "--recipe", "svd-llm", *data, "--out", "o",
    ]  # fmt: skip
    Path("plan.json").write_text('{"format": "eckart-plan", "version": 1, "entries": [{"targets": ["x"], "rank": 3}]}')
    yield "a plan of another model", [*usual, "--plan", "plan.json", "--out", "o"]
    yield "text that is not there", ["compress", model, "--data", "nowhere.txt", "--out", "o"]
    yield "too little text", ["compress", model, "--data", text, "--windows", "9999", "--length", "2048", "--out", "o"]
    yield (
        "windows that are too long",
        ["compress", model, "--data", text, "--windows", "1", "--length", "9999", "--out", "o"],
    )
    for what, change in SPOILED.items():
        folder = Path(what.replace(" ", "-"))
        folder.mkdir()
        for path in Path(model).iterdir():
            (folder / path.name).symlink_to(path.resolve())
        change(folder)
        yield what, ["compress", str(folder), "--keep", "0.8", *data, "--out", "o"]


def replace(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**content, **changes}))


SPOILED = {
    "a quantised model": lambda f: replace(f / "config.json", quantization_config={"quant_method": "modelopt"}),
    "an adapter beside the model": lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
    "a tokenizer that is missing": lambda f: [path.unlink() for path in f.glob("tokenizer*")],
    "a model type that nobody knows": lambda f: replace(f / "config.json", model_type="x", architectures=["X"]),
    "a generation config that is no file of JSON": lambda f: (
        (f / "generation_config.json").unlink(missing_ok=True),
        (f / "generation_config.json").write_text("{"),
    ),
    "a class of a reward model without its head": lambda f: replace(
        f / "config.json", architectures=["LlamaForSequenceClassification"]
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/refusals.json"))
    given = parser.parse_args()
    out, report = given.out.resolve(), read_report(given.out.resolve())
    model, text = os.path.abspath(given.model), os.path.abspath(given.calibration)
    folder = tempfile.mkdtemp(prefix="eckart-refusals-")
    os.chdir(folder)
    for what, command in mistakes(model, text):
        start = time.perf_counter()
        run = subprocess.run([sys.executable, "-m", "eckart", *command], capture_output=True, text=True)
        seconds = round(time.perf_counter() - start, 1)
        said = run.stderr.strip().replace(model, "MODEL").replace(text, "TEXT").replace(folder, "HERE")
        left = sorted(path.name for path in Path().iterdir() if path.name in ("o", "out") or "partial" in path.name)
        right = run.returncode == 2 and len(said.splitlines()) == 1 and not left
        report["rows"][what] = {"seconds": seconds, "exit_code": run.returncode, "said": said, "right": right}
        print(f"{seconds:5.1f} s  {'' if right else 'NOT RIGHT  '}{what}: {said}", flush=True)
        write_report(out, report)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
