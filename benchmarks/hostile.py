"""Damaged and clumsy inputs by the thousand, killed runs and runs at once: what `docs/promises.md` counts.

    python benchmarks/hostile.py                       all of it, about half an hour on two cores
    python benchmarks/hostile.py files --trials 200    one kind, fewer of them

Everything is seeded, so a trial can be had again by its number. Each trial is a child of one process that has imported
everything, with a time limit; tiny models, in a folder of its own. Counted are outcomes: `same` (nothing that decides
was changed, and the result is what it was), `refused` (one line, exit code 2), and what must not be: `changed` (exit
code 0 and another model), `traceback`, `hang`, `left` (files left behind). Rows are written as they come; a second run
goes on behind them.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from _common import read_report, write_report
from safetensors import safe_open

import eckart
from eckart._cli import main as command_line
from eckart.errors import UserError
from eckart.testing import tiny_models, tiny_tokenizer

LIMIT = 60  # seconds of one trial
COUNTS = {"files": 2100, "plans": 260, "recipes": 260, "data": 520, "kills": 60, "pairs": 20}
BAD = ("changed", "traceback", "hang", "left")
VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 2.5, 10**13, 1e300, "", "x", "dense", "..", "../../etc/passwd", "a\0b", "\x1b[2J",
    "two\nlines", "\u202e", "x" * 5000, [], [[]], {}, {"x": {"y": [None]}}, "[/x]", "<script>",
]  # fmt: skip
Trial = Callable[[random.Random, Path], str]


# Mutants


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every `(container, key)` in plain data."""
    found = []
    for key, item in list(value.items()) if isinstance(value, dict) else list(enumerate(value)):
        found.append((value, key))
        if isinstance(item, dict | list):
            found += places(item)
    return found


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    """One to three changes of the data, or of its bytes."""
    if draw.random() < 0.25:
        return mutate_bytes(content, draw)
    data = json.loads(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        if not (known := places(data)):
            break
        container, key = draw.choice(known)
        how = draw.randrange(5)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[draw.choice(["x", "", "rank", "format", "\n"])] = container.pop(key)
        elif how == 2 and isinstance(container[key], int | float) and not isinstance(container[key], bool):
            container[key] = container[key] * draw.choice([0, 2, -1, 1.5, 10**6]) + draw.choice([0, 1])
        else:
            container[key] = deepcopy(draw.choice(VALUES))
    return json.dumps(data, indent=1).encode()


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(max(1, len(content)))
    return draw.choice(
        [
            content[:at],
            content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :],
            content[:at] + content[at + draw.randrange(1, 30) :],
            content[:at] + content[at : at + 30] + content[at:],
            b"\xef\xbb\xbf" + content,
            b"",
            b"[" * 100_000,
            content + b"\0" * 7,
        ]
    )


# A trial runs in a child


def in_child(trial: Callable[[], str]) -> str:
    """The outcome of a trial in a child of this process; `hang` if it takes longer than `LIMIT`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        try:
            answer = trial()
        except BaseException as error:
            answer = f"traceback: {type(error).__name__}: {str(error)[:300]}"
        os.write(writing, answer.encode("utf-8", "replace")[:4000])
        os._exit(0)
    os.close(writing)
    start = time.monotonic()
    while time.monotonic() - start < LIMIT:
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.005)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        return "hang"
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read().decode("utf-8", "replace") or "traceback: the process died"


def run_command(*words: str) -> tuple[int, str]:
    """Exit code and standard error of a command, run here; this process is a child that ends soon."""
    said, printed = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  the process ends soon
    os.dup2(printed.fileno(), 1)
    os.dup2(said.fileno(), 2)
    sys.argv = ["eckart", *words]
    code = 1
    try:
        command_line()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    said.seek(0)
    return code, said.read().decode("utf-8", "replace")


def judged(code: int, errors: str, same: Callable[[], bool]) -> str:
    """The outcome of a command: by its exit code, what it said, and whether its result is what it was."""
    last = errors.strip().splitlines()[-1] if errors.strip() else ""
    if "Traceback" in errors:
        return f"traceback: {last[:300]}"
    if code == 2:
        one_line = last.startswith("eckart: ") and last.isprintable()
        return "refused" if one_line else f"traceback: unclear refusal: {errors[:300]!r}"
    if code == 0:
        return "same" if same() else "changed"
    return f"traceback: exit code {code}: {last[:300]}"


# What is tried


RECIPES = {"pivoted": "eckart", "shared": "basis-sharing", "columns": "cpsvd"}


class Ground:
    """A dense tiny model, a text, and three checkpoints: pivoted, with shared bases, with preserved columns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        os.chdir(folder)
        tiny_models()["llama"]().save_pretrained("dense")
        tiny_tokenizer().save_pretrained("dense")
        Path("text.txt").write_text("Whatever lies in a folder is read with care, be it ours or not. " * 80)
        for name, recipe in RECIPES.items():
            text = eckart.Calibration("text.txt", windows=4, length=24)
            eckart.compress("dense", recipe=recipe, keep=0.6, calibration=text, out=name)
        shutil.copytree("pivoted", "undisturbed")
        self.ids = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(0))
        self.logits = {name: self.of(eckart.load(name)) for name in RECIPES}

    @torch.no_grad()
    def of(self, model: Any) -> torch.Tensor:
        logits: torch.Tensor = model(self.ids).logits
        return logits

    def is_same(self, name: str, model: Any) -> bool:
        return torch.equal(self.of(model), self.logits[name])


FILES = (
    "config.json", "config.json", "generation_config.json", "model.safetensors", "model.safetensors", "plan.json",
    "provenance.json", "spectra.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip


def files(ground: Ground) -> Trial:
    """A file of a checkpoint is changed, and the checkpoint read on one of the roads."""

    def trial(draw: random.Random, here: Path) -> str:
        name, file = draw.choice(list(RECIPES)), draw.choice(FILES)
        shutil.copytree(ground.folder / name, here / "c")
        content = (here / "c" / file).read_bytes()
        changed = mutate_safetensors(content, draw) if file.endswith("safetensors") else mutate_json(content, draw)
        (here / "c" / file).write_bytes(changed)
        road = draw.choice(["load", "load", "plain", "plain", "checked", *COMMANDS])
        return f"{in_child(lambda: take(road, ground, name, here))}|{road} {file}"

    return trial


def mutate_safetensors(content: bytes, draw: random.Random) -> bytes:
    """Bits of the weights, the head's JSON, or the whole as bytes."""
    size = int.from_bytes(content[:8], "little")
    head, body = content[8 : 8 + size], bytearray(content[8 + size :])
    how = draw.randrange(3)
    if how == 0:
        body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
        return content[: 8 + size] + bytes(body)
    if how == 1:
        new = mutate_json(head, draw)
        return len(new).to_bytes(8, "little") + new + bytes(body)
    return mutate_bytes(content, draw)


COMMANDS: dict[str, list[str]] = {
    "compare": ["compare", "c", "../undisturbed"],
    "export": ["export", "c", "--to", "merged", "--out", "out"],
    "verify": ["verify", "c"],
    "report": ["report", "c", "--out", "page.html"],
    "convert": ["convert", "c", "--storage", "pair", "--out", "out"],
    "eval": ["eval", "c", "--data", "../text.txt", "--windows", "2", "--length", "16", "--json"],
}


def take(road: str, ground: Ground, name: str, here: Path) -> str:
    """Read the checkpoint `c` on a road, in a child."""
    os.chdir(here)
    if road == "load":
        try:
            return "same" if ground.is_same(name, eckart.load("c")) else "changed"
        except UserError as error:
            return "refused" if str(error).isprintable() else f"traceback: not one line: {str(error)[:200]!r}"
    if road in ("plain", "checked"):
        options: dict[str, Any] = {}
        if road == "checked":
            from eckart.portable.hf import EckartConfig

            options = {"quantization_config": EckartConfig(verify=True)}
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained("c", **options)
        except Exception:  # transformers' own errors, of any class
            return "refused"
        if road == "checked":
            return "same" if ground.is_same(name, model) else "changed"
        return "same" if holds_what_the_file_holds(model) else "changed"
    return judged(*run_command(*COMMANDS[road]), lambda: command_was_right(road, ground, name))


def holds_what_the_file_holds(model: Any) -> bool:
    """On the plain road bits are not checked; but nothing may have been drawn at random."""
    with safe_open("c/model.safetensors", framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tied = set(model.all_tied_weights_keys)
    own = {key: value for key, value in model.state_dict().items() if key not in tied}
    return all(
        key in stored and (torch.equal(value, stored[key].to(value.dtype)) or bool(value.isnan().any()))
        for key, value in own.items()
    )


def command_was_right(road: str, ground: Ground, name: str) -> bool:
    if road == "convert":  # other factors, the same matrices but for rounding
        return bool(torch.allclose(ground.of(eckart.load("out")), ground.logits[name], atol=1e-3))
    if road == "export":
        dense = transformers.AutoModelForCausalLM.from_pretrained("out")
        return bool(torch.allclose(ground.of(dense), ground.logits[name], atol=1e-3))
    if road == "eval":
        return ground.is_same(name, eckart.load("c"))
    return True


def plans(ground: Ground) -> Trial:
    """A plan somebody has edited is carried out."""

    def trial(draw: random.Random, here: Path) -> str:
        source = ground.folder / draw.choice(list(RECIPES)) / "plan.json"
        (here / "plan.json").write_bytes(mutate_json(source.read_bytes(), draw))
        words = ["compress", "../dense", "--plan", "plan.json", "--recipe", "svd", "--out", "out"]
        return in_child(lambda: compressed(here, words))

    return trial


RECIPE = """
storage = "pivoted"
about = "for trials"

[factorizer]
name = "svd_llm"
damping = 1e-6

[allocator]
name = "uniform"

[grouping]
size = 1

[[refiners]]
name = "refit_coefficients"
"""


def recipes(ground: Ground) -> Trial:
    """A recipe that somebody wrote by hand."""
    words = ["1", "-1", "0.5", '"x"', "[]", "{}", "true", "nan", '"os:system"', '"eckart.linalg:Metric"', "[1, [2]]"]

    def trial(draw: random.Random, here: Path) -> str:
        lines = RECIPE.splitlines()
        for _ in range(draw.choice((1, 1, 2, 3))):
            at = draw.randrange(len(lines))
            key = lines[at].partition("=")[0]
            lines[at] = draw.choice([f"{key}= {draw.choice(words)}", "", lines[at] * 2, lines[at].upper(), "[x]"])
        text = "\n".join(lines).encode()
        (here / "r.toml").write_bytes(mutate_bytes(text, draw) if draw.random() < 0.2 else text)
        text_options = ["--data", "../text.txt", "--windows", "2", "--length", "16"]
        words_ = ["compress", "../dense", "--recipe", "r.toml", "--keep", "0.7", *text_options, "--out", "out"]
        return in_child(lambda: compressed(here, words_))

    return trial


def data(ground: Ground) -> Trial:
    """A data file that is not what it seems."""
    chat = [{"role": "user", "content": "How is it?"}, {"role": "assistant", "content": "Like this, more or less."}]
    rows = [{"id": f"r{i}", "messages": chat, "n": i} for i in range(30)]
    kinds = {
        "rows.jsonl": "\n".join(json.dumps({"text": "the cat sat on the mat " * 4, "n": i}) for i in range(30)),
        "chat.jsonl": "\n".join(map(json.dumps, rows)),
        "list.json": json.dumps([{"text": "a list of rows, each a text. " * 4} for _ in range(20)]),
        "plain.txt": "a text and no more than that. " * 60,
    }

    def trial(draw: random.Random, here: Path) -> str:
        name = draw.choice(list(kinds))
        content = kinds[name].encode()
        if name.endswith(".jsonl") and draw.random() < 0.6:
            lines = content.split(b"\n")
            lines[draw.randrange(4)] = mutate_json(lines[0], draw).replace(b"\n", b" ")
            content = b"\n".join(lines)
        else:
            content = mutate_bytes(content, draw)
        (here / name).write_bytes(content)
        text_options = ["--data", name, "--windows", "2", "--length", "16"]
        words = ["compress", "../dense", "--recipe", "svd-llm", "--keep", "0.7", *text_options, "--out", "out"]
        return in_child(lambda: compressed(here, words))

    return trial


def compressed(here: Path, words: list[str]) -> str:
    """The outcome of a compression, in a child: what was saved must load, what was refused leave nothing."""
    os.chdir(here)
    before = set(os.listdir())
    outcome = judged(*run_command(*words), lambda: eckart.load("out") is not None)
    left = sorted(set(os.listdir()) - before - {"out"}) + (
        ["out"] if outcome == "refused" and Path("out").exists() else []
    )
    return f"left: {left}" if left else outcome


RESUMABLE = {
    "svd-llm": ["--recipe", "svd-llm"],
    "eckart": ["--recipe", "eckart"],
    "d-rank": ["--recipe", "d-rank"],
    "duo-svd": ["--recipe", "duo-svd", "-o", "allocator.measured=0.5,1"],
    "lc-svd": ["--recipe", "lc-svd", "-o", "block_collaborative.steps=4"],
    "eckart --recover": ["--recipe", "eckart", "--recover", "-o", "recover.written=2"],
}


def command_of(recipe: str, work: str, out: str) -> list[str]:
    text = ["--data", "../text.txt", "--windows", "6", "--length", "24"]
    return ["compress", "../dense", *RESUMABLE[recipe], "--keep", "0.6", *text, "--work", work, "--out", out]


class Undisturbed:
    """What runs give that nobody disturbs, and how long they take."""

    def __init__(self, ground: Ground) -> None:
        self.bytes: dict[str, dict[str, bytes]] = {}
        self.seconds: dict[str, float] = {}
        for recipe in RESUMABLE:
            here = Path(tempfile.mkdtemp(prefix="undisturbed-", dir=ground.folder))
            start = time.monotonic()
            outcome = in_child(lambda here=here, recipe=recipe: compressed(here, command_of(recipe, "../w", "out")))
            if outcome not in ("same",) and not outcome.startswith("left: ['w"):
                raise SystemExit(f"{recipe}: {outcome}")
            self.seconds[recipe] = time.monotonic() - start
            self.bytes[recipe] = contents(here / "out")
            shutil.rmtree(ground.folder / "w", ignore_errors=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path, but for what names the folders of the run."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: content for name, content in found.items() if name not in ("provenance.json", "README.md")}


def start(here: Path, words: list[str]) -> int:
    """A command in a child of its own; its process id."""
    child = os.fork()
    if child == 0:
        os.chdir(here)
        os._exit(run_command(*words)[0])
    return child


def strays(here: Path) -> list[str]:
    """Partial files and locks that are left."""
    return [
        str(p.relative_to(here)) for p in here.rglob("*") if any(w in p.name for w in ("partial", ".lock", "decomp"))
    ]


def kills(ground: Ground) -> Trial:
    """A run is killed once or twice at any moment, its save included, and then finished by the same command."""
    undisturbed = Undisturbed(ground)

    def trial(draw: random.Random, here: Path) -> str:
        recipe = draw.choice(list(RESUMABLE))
        words, how = command_of(recipe, "w", "out"), draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        for _ in range(draw.choice((1, 2))):
            child = start(here, words)
            # Some of them late, while the checkpoint is written.
            time.sleep(undisturbed.seconds[recipe] * draw.choice([draw.random(), 0.8 + 0.2 * draw.random()]))
            os.kill(child, how)
            os.waitpid(child, 0)
            if (here / "out").exists() and contents(here / "out") != undisturbed.bytes[recipe]:
                return f"changed: a half written folder|{recipe}"
            shutil.rmtree(here / "out", ignore_errors=True)
        _, status = os.waitpid(start(here, words), 0)
        if code := os.waitstatus_to_exitcode(status):
            return f"traceback: exit code {code}|{recipe}"
        if contents(here / "out") != undisturbed.bytes[recipe]:
            return f"changed|{recipe}"
        return f"left: {left}|{recipe}" if (left := strays(here)) else f"same|{recipe}"

    return trial


def pairs(ground: Ground) -> Trial:
    """Two runs at once, with one work folder, or with one output folder."""
    undisturbed = Undisturbed(ground)

    def trial(draw: random.Random, here: Path) -> str:
        recipe, one_output = draw.choice(list(RESUMABLE)), draw.random() < 0.5
        outs, works = (("out", "out"), ("w1", "w2")) if one_output else (("a", "b"), ("w", "w"))
        children = []
        for work, out in zip(works, outs, strict=True):
            children.append(start(here, command_of(recipe, work, out)))
            time.sleep(draw.random() * 0.3 * undisturbed.seconds[recipe])
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        if codes != ([0, 2] if one_output else [0, 0]):
            return f"traceback: exit codes {codes}|{recipe}, one {'output' if one_output else 'work folder'}"
        if any(contents(here / out) != undisturbed.bytes[recipe] for out in set(outs)):
            return f"changed|{recipe}"
        return f"left: {left}|{recipe}" if (left := strays(here)) else f"same|{recipe}"

    return trial


KINDS = {"files": files, "plans": plans, "recipes": recipes, "data": data, "kills": kills, "pairs": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--trials", type=int, help="of each kind; by default what docs/promises.md says")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hostile.json"))
    given = parser.parse_args()
    out, kinds = given.out.resolve(), given.kinds or list(KINDS)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"{unknown[0]!r} is none of {', '.join(KINDS)}")
    os.environ.setdefault("ECKART_CACHE", tempfile.mkdtemp(prefix="eckart-hostile-cache-"))
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # a child may not use the threads of its parent
    report = read_report(out)
    with tempfile.TemporaryDirectory(prefix="eckart-hostile-") as folder:
        ground = Ground(Path(folder))
        for kind in kinds:
            trial, rows = KINDS[kind](ground), report["rows"].setdefault(kind, {})
            for number in range(given.first, given.first + (given.trials or COUNTS[kind])):
                if str(number) in rows:
                    continue
                here = ground.folder / f"trial-{number}"
                here.mkdir()
                rows[str(number)] = trial(random.Random(f"{kind} {number}"), here)
                if rows[str(number)].startswith(BAD):
                    print(kind, number, rows[str(number)], flush=True)
                os.chdir(ground.folder)
                shutil.rmtree(here)
                if number % 50 == 49:
                    write_report(out, report)
            write_report(out, report)
            counts = Counter(row.partition("|")[0].partition(":")[0] for row in rows.values())
            print(f"{kind}: {sum(counts.values())} trials, {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()
