"""Every recipe at its best beside the others: perplexity with errors, KL, questions, wall time and memory of each.

    python benchmarks/comparison.py MODEL CALIBRATION.txt TEST.txt
    python benchmarks/comparison.py MODEL CALIBRATION.txt TEST.txt --rows "d-rank 0.8" --piqa valid.jsonl --labels l.lst

A row is one `eckart.compress` in a process of its own, from start to saved folder: calibrated on the first 32 windows
of 512 tokens, its wall time, and the most memory that the process has held above the bytes of the model. Then, not
timed, the saved model is loaded and measured on the first 64 windows of 512 of the test text and of the second half of
Python's documentation: the loss of each window, so that rows can be compared in pairs; KL from the dense model on the
first 8. With `--piqa` its questions are asked, too (of the two endings the likelier by length). Rows are lines of
`--out`, written as they come; a second run measures what is missing, and goes on inside a long row from `--work`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _common import LENGTH, WINDOWS, log_probabilities

TEST_WINDOWS, KL_WINDOWS = 64, 8
NARROW, WIDE = (0.8, 0.6), (0.9, 0.8, 0.7, 0.6, 0.5)
PIVOTED = {"storage": "pivoted"}
TRAINING_FREE, REFINED, RECOVERED = "training-free", "blocks refined", "with recovery"


@dataclass(frozen=True)
class Row:
    """A recipe with its options; which kind of method it is; at which shares it is run."""

    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = TRAINING_FREE
    keeps: tuple[float, ...] = NARROW


ROWS = {
    "dense": Row("", keeps=(1.0,)),
    "svd": Row("svd"),
    "fwsvd": Row("fwsvd"),
    "asvd, uniform ranks": Row("asvd", {"allocator": "uniform"}),
    "asvd": Row("asvd"),
    "svd-llm (W)": Row("svd-llm", keeps=WIDE),
    "svd-llm (W), pivoted": Row("svd-llm", PIVOTED),
    "basis-sharing": Row("basis-sharing"),
    "d-rank": Row("d-rank", keeps=WIDE),
    "d-rank, pivoted": Row("d-rank", PIVOTED),
    "d-rank, branch for LLaMA": Row("d-rank", {"allocator.guard": "multi_head", "allocator.beta": 0.2}),
    "d-rank, as printed": Row("d-rank", {"allocator.guard": "paper", "allocator.beta": 0.3}),
    "cpsvd": Row("cpsvd"),
    "duo-svd": Row("duo-svd"),
    "lc-svd-fixed": Row("lc-svd-fixed", kind=REFINED),
    "lc-svd": Row("lc-svd", kind=REFINED),
    "eckart, uncorrected": Row("eckart", {"allocator.correction": "off"}),
    "eckart": Row("eckart", keeps=WIDE),
    "eckart, pairs": Row("eckart", {"storage": "pair"}),
    "eckart, blocks refined": Row("eckart-full", {"refiners": "block_collaborative"}, REFINED),
    "svd-llm (W) --recover": Row("svd-llm", {"refiners": "recover"}, RECOVERED),
    "d-rank --recover": Row("d-rank", {"refiners": "recover"}, RECOVERED),
    "duo-svd --recover": Row("duo-svd", {"refiners": "recover"}, RECOVERED),
    "lc-svd --recover": Row("lc-svd", {"refiners": "block_collaborative,recover"}, RECOVERED),
    "eckart --recover": Row("eckart", {"refiners": "recover"}, RECOVERED),
    "eckart-full": Row("eckart-full", kind=RECOVERED),
}
TASK = """task: piqa_local
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
validation_split: validation
output_type: multiple_choice
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def measure(name: str, keep: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: compress and save, then load and measure."""
    found, model = {"row": name, "keep": keep, "kind": ROWS[name].kind}, arguments.model
    with tempfile.TemporaryDirectory() as folder:
        if ROWS[name].recipe:
            model = f"{folder}/out"
            found |= compress(ROWS[name], keep, model, arguments.work or f"{folder}/work", arguments)
        return {**found, **figures(model, folder, arguments)}


def compress(row: Row, keep: float, out: str, work: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the compression took and what it says of itself."""
    import eckart
    from eckart.recipes import find

    start, recipe = time.perf_counter(), find(row.recipe, row.options)
    calibration = eckart.Calibration(arguments.calibration, windows=WINDOWS, length=LENGTH)
    made = eckart.compress(arguments.model, recipe=recipe, keep=keep, calibration=calibration, work=work, out=out)
    return {
        "wall_seconds": round(time.perf_counter() - start, 1),
        "seconds": {stage: round(value, 1) for stage, value in made.seconds.items()},
        "peak_minus_model_bytes": peak_bytes() - made.ledger.model_bytes_dense,
        "keep_reached": made.ledger.keep,
        "model_bytes": made.ledger.model_bytes_kept,
        "recipe": recipe.to_dict(),
        **{key: made.plan.reached[key] for key in ("predicted_kl", "measured_kl") if key in made.plan.reached},
    }


def figures(model_folder: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Losses of windows and KL on both corpora, and the questions where they are asked for."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eckart.text.data import load_windows

    model, dense = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (model_folder, arguments.model))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    found: dict[str, Any] = {}
    for label, spec in {"wikitext-2": arguments.test, "python-docs": "python-docs"}.items():
        losses, divergences = [], []
        windows = load_windows(spec, tokenizer, windows=TEST_WINDOWS, length=LENGTH, purpose="evaluation").ids
        for number, window in enumerate(windows):
            mine = log_probabilities(model, window)
            losses.append(-float(mine.gather(1, window[1:, None]).mean(dtype=torch.float64)))
            if number < KL_WINDOWS:
                reference = log_probabilities(dense, window)
                divergences.append(float((reference.exp() * (reference - mine)).sum(dtype=torch.float64)) / len(mine))
        found[label] = {"losses": [round(loss, 6) for loss in losses], "kl": sum(divergences) / len(divergences)}
    if arguments.piqa:
        found["piqa"] = questions(model, tokenizer, folder, arguments)
    return found


def questions(model: Any, tokenizer: Any, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The accuracies of PIQA's validation questions, by the harness, with their standard errors."""
    from eckart.evaluation.tasks import make_run, run_tasks

    labels = Path(arguments.labels).read_text().split()
    rows = [json.loads(line) for line in Path(arguments.piqa).read_text().splitlines()]
    file = Path(folder) / "piqa.jsonl"
    lines = [json.dumps({**row, "label": int(label)}) for row, label in zip(rows, labels, strict=True)]
    file.write_text("\n".join(lines) + "\n")
    tasks = Path(folder) / "tasks"
    tasks.mkdir()
    (tasks / "piqa_local.yaml").write_text(TASK.format(file=file))
    (result,) = run_tasks(make_run(["piqa_local"], tasks, arguments.limit), model, tokenizer)
    return {**result["metrics"], "questions": result["protocol"]["documents"]}


def peak_bytes() -> int:
    """The most memory that this process has been resident with."""
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")]
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/comparison.jsonl"))
    parser.add_argument("--rows", nargs="*", help='such as "d-rank 0.8"; all without it')
    parser.add_argument("--work", help="a folder that keeps what long rows have finished")
    parser.add_argument("--piqa", help="PIQA's validation questions, JSON lines")
    parser.add_argument("--labels", help="their answers, one a line")
    parser.add_argument("--limit", type=int, help="of questions")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.only:
        name, _, keep = arguments.only.rpartition(" ")
        print(json.dumps(measure(name, float(keep), arguments)))
        return
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    done = {(row["row"], row["keep"]) for row in map(json.loads, lines)}
    wanted = arguments.rows or [f"{name} {keep:g}" for name, row in ROWS.items() for keep in row.keeps]
    for label in wanted:
        name, _, keep = label.rpartition(" ")
        if (name, float(keep)) in done:
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--only", label]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if run.returncode:
            print(f"{label}: failed", flush=True)
            continue
        found = {**json.loads(run.stdout.splitlines()[-1]), "load_average": os.getloadavg()[0]}
        with arguments.out.open("a") as out:
            out.write(json.dumps(found) + "\n")
        print(label, {key: found.get(key) for key in ("wall_seconds", "keep_reached", "measured_kl")}, flush=True)


if __name__ == "__main__":
    main()
