"""Other people's tools on a real model compressed by every recipe: what each of them said.

    python benchmarks/tools.py MODEL CALIBRATION.txt --work DIR

For each recipe: a checkpoint (calibrated on little text: which tools take it does not depend on that), its logits
after `from_pretrained`, `generate` and `pipeline` against the model in memory, `trust_remote_code` in a process that
cannot import eckart, the same without it (which must refuse), a second `save_pretrained`, the command line of the LM
Evaluation Harness on a local task against `eckart eval`, and a training step of LoRA. `--onnx` names recipes whose
exported graph must give the tokens of torch. Rows are written as they come.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from _common import read_report, write_report

import eckart
from eckart.checkpoints import checkpoint
from eckart.recipes import BUILT_IN

ONE_STEP = {"block_collaborative.steps": 1, "block_collaborative.check_every": 1}
FEW = {"candidates": 2, "finalists": 1, "windows": 2, "held_out": 1}
OPTIONS = {  # so that the long recipes are short
    "duo-svd": {"allocator.measured": "0.4,1.0", "allocator.windows": 1, "allocator.length": 32},
    "lc-svd": {**ONE_STEP, **{f"allocator.{name}": value for name, value in FEW.items()}},
    "lc-svd-fixed": ONE_STEP,
}
PROMPT = "The capital of France is"
BARE = """
import json, sys
sys.modules["eckart"] = None  # as where it is not installed
import torch, transformers
transformers.logging.set_verbosity_error()
try:
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "trust")
    with torch.no_grad():
        print(json.dumps(model(torch.tensor([json.loads(sys.argv[3])])).logits[0, -1].topk(5).indices.tolist()))
except Exception as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""
TASK = """task: tool_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
QUESTIONS = [
    ("The opposite of hot is", ["cold", "green", "seven"]),
    ("Two plus two is", ["four", "a horse", "rain"]),
    ("A cat is an", ["animal", "number", "hour"]),
    ("Paris is the capital of", ["France", "bread", "the sea"]),
    ("Snow is", ["white", "loud", "square"]),
    ("You drink", ["water", "stones", "roofs"]),
]


def write_task(folder: Path) -> None:
    rows = [{"question": q, "choices": c, "answer": 0} for q, c in QUESTIONS]
    (folder / "tool_choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tool_choice.yaml").write_text(TASK.format(file=folder / "tool_choice.jsonl"))


@torch.no_grad()
def in_transformers(folder: Path, made: eckart.Compression) -> dict:
    """`from_pretrained`, `generate`, `pipeline` and a second save, each against the model in memory."""
    ids = made.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    wanted = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    logits, tokens = made.model(ids).logits, made.model.generate(**wanted)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    pipe = transformers.pipeline("text-generation", model=str(folder))
    text = pipe(PROMPT, max_new_tokens=12, do_sample=False)[0]["generated_text"]
    loaded.save_pretrained(folder.with_name("again"))
    again = transformers.AutoModelForCausalLM.from_pretrained(folder.with_name("again"))
    bare = json.dumps(ids[0].tolist())
    trusted, refused = (
        json.loads(subprocess.run([sys.executable, "-W", "ignore", "-c", BARE, str(folder), how, bare],
                                  capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        for how in ("trust", "refuse")
    )  # fmt: skip
    return {
        "from_pretrained, bit-equal": torch.equal(loaded(ids).logits, logits),
        "generate, same tokens": torch.equal(loaded.generate(**wanted), tokens),
        "pipeline, same text": text == made.tokenizer.decode(tokens[0], skip_special_tokens=True),
        "saved again, bit-equal": torch.equal(again(ids).logits, logits),
        "trust_remote_code without eckart, same top 5": trusted == logits[0, -1].topk(5).indices.tolist(),
        "refused without both": isinstance(refused, str),
        "refusal": refused[:200],
        "text": text,
    }


def in_the_harness(folder: Path, tasks: Path) -> dict:
    """The harness's own command line, and `eckart eval`, on the same local task."""
    out = tasks / "harness"
    model = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    argv = ["run", "--model", "hf", "--model_args", model, "--tasks", "tool_choice", "--include_path", str(tasks)]
    argv += ["--device", "cpu", "--output_path", str(out / folder.parent.name), "--batch_size", "1"]
    subprocess.run([sys.executable, "-m", "lm_eval", *argv], check=True, capture_output=True)
    found = json.loads(max((out / folder.parent.name).rglob("results*.json")).read_text())["results"]["tool_choice"]
    ours = eckart.evaluate(folder, task_names=["tool_choice"], include_path=tasks)
    return {
        "harness": found["acc,none"],
        "harness, acc_norm": found["acc_norm,none"],
        "eckart eval": ours["tasks"][0]["metrics"],
    }


def with_lora(folder: Path) -> dict:
    """One step of LoRA on the factors of the attention."""
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(target_modules="all-linear", r=4)
    model = peft.get_peft_model(model, config)
    ids = torch.arange(100, 164)[None]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(round(float(loss), 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"lora losses": losses, "lora learns": min(losses[1:]) < losses[0]}


def in_onnx(folder: Path) -> dict:
    """Greedy tokens of the exported graph against torch."""
    from eckart.engines.onnx_model import OnnxModel

    start = time.perf_counter()
    graph = eckart.export(folder, to="onnx", out=folder.with_name("onnx")).out
    seconds = round(time.perf_counter() - start, 1)
    model, ids = eckart.load(folder), checkpoint.load_tokenizer(folder)(PROMPT, return_tensors="pt")["input_ids"]
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    found = OnnxModel(graph).greedy(ids.numpy(), wanted.shape[1] - ids.shape[1])
    return {"onnx, same tokens": found == wanted[0, ids.shape[1] :].tolist(), "onnx seconds to export": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", default=list(BUILT_IN))
    parser.add_argument("--onnx", nargs="*", default=["eckart", "d-rank"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tools.json"))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    write_task(arguments.work)
    report = read_report(arguments.out)
    for recipe in arguments.recipes:
        if recipe in report["rows"]:
            continue
        folder = arguments.work / recipe / "made"
        shutil.rmtree(folder, ignore_errors=True)
        calibration = eckart.Calibration(arguments.calibration, windows=4, length=256)
        options = OPTIONS.get(recipe, {})
        made = eckart.compress(
            arguments.model, recipe=recipe, keep=0.7, options=options, calibration=calibration, out=folder
        )
        row = in_transformers(folder, made)
        row |= in_the_harness(folder, arguments.work) | with_lora(folder)
        row |= in_onnx(folder) if recipe in arguments.onnx else {}
        report["rows"][recipe] = row
        print(recipe, json.dumps(row), flush=True)
        write_report(arguments.out, report)


if __name__ == "__main__":
    main()
