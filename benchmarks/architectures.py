"""Every decoder of transformers, tiny and random: what comes out right, what is refused, what goes wrong.

    python benchmarks/architectures.py                 all of them, into results/architectures.jsonl; goes on there
    python benchmarks/architectures.py --only llama    some of them, measured anew
    python benchmarks/architectures.py --table         docs/architectures.md from the results; nothing is measured

Each model has a process of its own with a time limit, so that one that crashes or hangs ends nothing. Its block walk is
compared with the states that its own forward pass has between blocks, the Grams of its loss gradients with those that
plain autograd finds through the whole model. Then each recipe compresses it at keep 0.8 on four windows of 24 tokens;
what is saved is loaded by `eckart.load` and by the auto class, and both are compared with the compressed model in
memory: tensors, logits, and what they generate with the cache and without.
"""

import argparse
import json
import multiprocessing as mp
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import families
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import eckart
from eckart.errors import EckartError, UserError
from eckart.model.discovery import Layout, discover
from eckart.model.operators import operator
from eckart.model.residence import residence_of
from eckart.model.walk import open_stream, walk
from eckart.planning.preflight import LEAST_COVERED
from eckart.statistics.sums import Need
from eckart.statistics.sweep import sweep
from eckart.support.versions import versions
from eckart.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "architectures.jsonl", ROOT / "docs" / "architectures.md"
RECIPES = ("svd-llm", "eckart")
KEEP, WINDOWS, LENGTH, NEW = 0.8, 4, 24, 6
CLOSE = 1e-3  # relative: what float32 may do to a gradient that passes a few blocks
WORK = ("calibrate", "gradients", "decompose", "factorise")  # stages after which a refusal comes too late
SECONDS = 240

Row = dict[str, Any]


def examine(name: str, folder: Path) -> Row:
    """All that is found out about one model type, as plain data."""
    row: Row = {"model_type": name}
    try:
        model = families.build(name)
    except Exception as error:
        return {**row, "built": said(error)}
    row |= {"class": type(model).__name__, "built": True}
    with told(row, "discovered"):
        layout = discover(model)
        row |= {"targets": len(layout.targets), "covered": layout.covered, "left": layout.uncovered, "discovered": True}
        ids = torch.randint(5, 90, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
        with told(row, "walk"):
            row["walk"] = walk_gap(model, layout, ids)
        with told(row, "gradients"):
            row["gradients"] = gradient_gap(model, layout, ids)
    for recipe in RECIPES:
        row[recipe] = outcome(name, recipe, folder / recipe)
    return row


@contextmanager
def told(row: Row, key: str) -> Iterator[None]:
    """What goes wrong inside is the value of `key`, in words."""
    try:
        yield
    except Exception as error:
        row[key] = said(error)


def said(error: BaseException) -> str:
    """An error as one line; of those that are not ours, the class and where it was raised."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, EckartError):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {text}"


@torch.no_grad()
def walk_gap(model: nn.Module, layout: Layout, ids: Tensor) -> float:
    """The largest relative difference between what enters a block in a plain forward pass and in the walk."""
    residence, entering = residence_of(model, layout), list[Tensor]()

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]).clone())

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in residence.structure]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    stream, gaps = open_stream(model, residence, [ids]), []
    for at in walk(residence, stream):
        expected = entering[at.index].float()
        actual = stream.native(0).float()
        gaps.append(float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)))
    return max(gaps)


def gradient_gap(model: nn.Module, layout: Layout, ids: Tensor) -> float:
    """The largest relative difference between a target's gradient Gram and that of autograd through the whole model.

    Gradients of the summed next-token loss; a tall matrix has the Gram of the gradients at its input. Experts, whose
    Grams are taken a little from their layer's, have oracles of their own (`tests/test_routed_statistics.py`).
    """
    targets = [target for target in layout.targets if target.expert is None]
    need = Need.TRUE_GRADIENT_GRAM
    collected = {name: found for block in sweep(model, layout, ids, [need]) for name, found in block.items()}
    outputs: dict[str, list[Tensor]] = {target.name: [] for target in targets}

    def listener(name: str) -> Callable[[Tensor, Tensor], None]:
        def listen(x: Tensor, y: Tensor) -> None:
            if y.requires_grad:
                y.retain_grad()
                outputs[name].append(y)

        return listen

    handles = [h for t in targets for h in operator(model, t.name).listen(listener(t.name))]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    gaps = [0.0]
    for target in targets:
        gradients = [y.grad.flatten(0, -2).double() for y in outputs[target.name] if y.grad is not None]
        statistics, expected = collected[target.name], sum(g.T @ g for g in gradients)
        gram = statistics.gradient_gram or statistics.pulled_gradient_gram
        if not gradients or gram is None:
            continue
        if statistics.gradient_gram is None:
            weight = operator(model, target.name).weight.double()
            expected = weight.T @ expected @ weight
        gaps.append(float((gram.matrix - expected).norm() / expected.norm().clamp(min=1e-30)))
    model.zero_grad()
    return max(gaps)


def outcome(name: str, recipe: str, folder: Path) -> Row:
    """What becomes of a model with a recipe: `is` right, refused, wrong or error, and what was `said`."""
    begun: set[str] = set()
    folder.mkdir()
    (folder / "text.txt").write_text(text())
    try:
        model = families.build(name)
        made = eckart.compress(
            model,
            recipe=recipe,
            keep=KEEP,
            include=named(model),
            calibration=eckart.Calibration(str(folder / "text.txt"), windows=WINDOWS, length=LENGTH),
            tokenizer=tiny_tokenizer(),
            out=folder / "out",
            progress=lambda stage, done, total: begun.add(stage),
        )
        wrong = list(differences(made.model, folder / "out"))
        return {"is": "wrong" if wrong else "right", "said": "; ".join(wrong)}
    except UserError as error:
        early = not begun & set(WORK)
        return {"is": "refused" if early else "error", "said": said(error) if early else f"late: {said(error)}"}
    except Exception as error:
        return {"is": "error", "said": said(error)}


def named(model: nn.Module) -> list[str]:
    """The targets by name where they are too small a part of the blocks to be compressed unasked, experts for one."""
    layout = discover(model)
    return sorted({target.kind for target in layout.targets}) if layout.covered < LEAST_COVERED else []


def text() -> str:
    """Letters at random: windows for the calibration and the unseen ones beside it."""
    letters = torch.randint(26, (8000,), generator=torch.Generator().manual_seed(0))
    return "".join(chr(97 + int(letter)) for letter in letters)


def differences(made: Any, folder: Path) -> Iterator[str]:
    """In which the saved model is not the one in memory, in words."""
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(2))
    roads: dict[str, Callable[[], Any]] = {
        "eckart.load": lambda: eckart.load(folder),
        "from_pretrained": lambda: native_road(made, folder),
    }
    expected = answers(made, ids)
    for road, load in roads.items():
        loaded = load()
        if type(loaded) is not type(made):
            yield f"{road}: is a {type(loaded).__name__}, not a {type(made).__name__}"
            continue
        mine, theirs = made.state_dict(), loaded.state_dict()
        other = [key for key in mine if key not in theirs or not torch.equal(mine[key], theirs[key])]
        if other:
            yield f"{road}: {len(other)} tensors differ, {other[0]} for one"
        found = answers(loaded, ids)
        yield from (f"{road}: {what} differ" for what in expected if not same(expected[what], found[what]))


def native_road(made: Any, folder: Path) -> Any:
    """As transformers loads it: by an auto class where one gives this class, else by the class itself."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(made.config.model_type) == type(made).__name__
    return (transformers.AutoModelForCausalLM if known else type(made)).from_pretrained(folder)


def same(one: Any, other: Any) -> bool:
    """Equal; logits to rounding, since products of equal numbers may differ with where they lie in memory."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        exact = not one.is_floating_point()
        return torch.equal(one, other) if exact else torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    return type(one) is type(other) and (not isinstance(one, str) or one == other)


@torch.no_grad()
def answers(model: Any, ids: Tensor) -> dict[str, Any]:
    """Logits, and tokens generated with the cache and without; where a family does not generate, the error's class."""
    found: dict[str, Any] = {"logits": model(input_ids=ids, use_cache=False).logits}
    for cache in (True, False):
        what = f"tokens generated with{'' if cache else 'out'} the cache"
        try:
            found[what] = model.generate(
                input_ids=ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=cache
            )
        except Exception as error:
            found[what] = type(error).__name__
    return found


def _child(name: str, pipe: Connection) -> None:
    pipe.send(examined(name))


def examined(name: str) -> Row:
    with tempfile.TemporaryDirectory(prefix="architectures-") as folder:
        return examine(name, Path(folder))


def apart(name: str, seconds: float) -> Row:
    """`examine` in a process of its own."""
    context = mp.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        row: Row = receiver.recv() if receiver.poll(seconds) else {"crashed": f"took more than {seconds:.0f} s"}
    except EOFError:
        process.join()
        row = {"crashed": f"the process ended with {process.exitcode}"}
    process.kill()
    process.join()
    return {"model_type": name, **row, "seconds": round(time.perf_counter() - start, 1), "versions": versions()}


def read(path: Path) -> dict[str, Row]:
    """The last row of each model type."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["model_type"]: row for row in rows}


def verdict(row: Row, recipe: str) -> str:
    """right, refused, wrong (in silence), error, or unbuilt."""
    if "crashed" in row:
        return "error"
    if row["built"] is not True:
        return "unbuilt"
    found: str = row[recipe]["is"]
    gaps = [row.get("walk", 0.0)] + ([row.get("gradients", 0.0)] if recipe == "eckart" else [])
    if found == "right" and any(not isinstance(gap, float) or gap > CLOSE for gap in gaps):
        return "wrong"
    return found


def counts(rows: dict[str, Row]) -> dict[str, Counter[str]]:
    return {recipe: Counter(verdict(row, recipe) for row in rows.values()) for recipe in RECIPES}


def page(rows: dict[str, Row]) -> str:
    """Markdown: what was done, the counts, a line for each model type."""
    used = {row["versions"]["transformers"] for row in rows.values()}
    lines = [
        "# Which models it works on",
        "",
        f"Every model type of transformers {' and '.join(sorted(used))} that has a causal language model, tiny and "
        f"random (`benchmarks/families.py`), compressed at keep {KEEP} and loaded again "
        "(`benchmarks/architectures.py`, which wrote this page and says what is compared). **right**: the block walk "
        "gives the model's own states and, for eckart, its own gradients; the saved checkpoint loads bit for bit by "
        "`eckart.load` and by transformers, and generates the same tokens with the cache and without. **refused**: "
        "one line before any work. *Covered* is the share of the blocks' parameters that are targets.",
        "",
        "| | right | refused | wrong | error | not built |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for recipe, found in counts(rows).items():
        figures = [found[what] for what in ("right", "refused", "wrong", "error", "unbuilt")]
        lines.append(f"| {recipe} | " + " | ".join(map(str, figures)) + " |")
    lines += ["", "| model type | class | covered | svd-llm | eckart | |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [_line(rows[name]) for name in sorted(rows)]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    share = f"{100 * row['covered']:.0f} %" if "covered" in row else "-"
    found = [verdict(row, recipe) for recipe in RECIPES]
    return f"| {row['model_type']} | {row.get('class', '-')} | {share} | {' | '.join(found)} | {_remark(row)} |"


def _remark(row: Row) -> str:
    """Why a model is not right, in words."""
    if "crashed" in row or row["built"] is not True:
        return str(row.get("crashed") or row["built"]).replace("|", "/")[:200]
    remarks = [row[recipe]["said"] for recipe in RECIPES if row[recipe]["said"]]
    gaps = [f"{key} off by {row[key]:.1e}" for key in ("walk", "gradients") if float_above(row.get(key))]
    return "; ".join(dict.fromkeys([*remarks, *gaps])).replace("|", "/")[:400]


def float_above(gap: Any) -> bool:
    return isinstance(gap, float) and gap > CLOSE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="model types, measured anew")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one model")
    parser.add_argument("--table", action="store_true", help="write the page from the results")
    chosen = parser.parse_args()
    known = read(chosen.results)
    if not chosen.table:
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        examined("llama")  # what all need is imported before the processes part
        for name in chosen.only or [name for name in families.names() if name not in known]:
            row = apart(name, chosen.seconds)
            known[name] = row
            with chosen.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, *(verdict(row, recipe) for recipe in RECIPES), _remark(row), flush=True)
        for recipe, found in counts(known).items():
            print(recipe, dict(found))
    if chosen.table:
        PAGE.write_text(page(known))


if __name__ == "__main__":
    main()
