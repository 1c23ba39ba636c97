"""`report`: one self-contained page about a checkpoint, from what it says of itself, stored results, and new ones."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from eckart.errors import OptionError
from eckart.evaluation import results as stored
from eckart.evaluation import samples
from eckart.evaluation.measure import evaluate
from eckart.measuring.protocol import Protocol, ProtocolOptions
from eckart.pages.report_facts import gather
from eckart.pages.report_page import page
from eckart.progress import Progress, silent
from eckart.support.escaping import plain
from eckart.support.files import check_file, write_text

NAME = "report.html"


def report(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    results: Sequence[str | Path | Mapping[str, Any]] = (),
    against: str | None = None,
    data_specs: Sequence[str] = (),
    prompts: Sequence[str] = (),
    tokenizer: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    **options: Unpack[ProtocolOptions],
) -> dict[str, Any]:
    """Write the report of the checkpoint `folder` to `out` (`folder`/report.html) and return its facts as plain data.

    `results` are what `eckart eval --json` and `eckart bench --json` printed about this checkpoint: files, or
    plain data as `evaluate` and `bench` return it.
    With `data_specs` its perplexity is measured as `evaluate` does (`options` are those of the protocol), beside the
    dense model's with `against`; with `against` or `prompts` the models write samples. Without any of these no weight
    is read. `tokenizer` and `trust_remote_code` are those of `evaluate`.
    Raises `UserError` for a folder or a file that is not what it should be, or results about another model.
    """
    facts = gather(folder)
    path = Path(folder) / NAME if out is None else Path(out)
    check_file(path)  # before any work
    measurements = [
        stored.checked(result, "a result") if isinstance(result, Mapping) else stored.read(result) for result in results
    ]
    for source, result in zip(results, measurements, strict=True):
        if not stored.is_about(result, folder):
            name = "a result" if isinstance(source, Mapping) else source
            raise OptionError(
                f"{name}: is about {plain(result['model'])}, not about {folder}; give results of this model."
            )
    names: dict[str, Any] = {"tokenizer": tokenizer, "trust_remote_code": trust_remote_code}
    if data_specs:
        measure = partial(evaluate, folder, against=against, data_specs=data_specs, progress=progress)
        measurements.append(measure(**names, **options))
    wanted = bool(against or prompts)
    facts |= {
        "evaluations": [result for result in measurements if result["format"] == stored.EVAL],
        "benches": [result for result in measurements if result["format"] == stored.BENCH],
        "samples": _samples(folder, against, prompts, names, Protocol(**options), progress) if wanted else None,
    }
    write_text(path, page(facts))
    return {"format": "eckart-report", "version": 1, "page": str(path), **facts}


def _samples(
    folder: str | Path,
    against: str | None,
    prompts: Sequence[str],
    names: Mapping[str, Any],
    protocol: Protocol,
    progress: Progress,
) -> dict[str, Any]:
    """What the models write after each prompt."""
    prompts = list(prompts) or list(samples.PROMPTS)
    progress("sample", 0, 2)

    def write(model: str | Path) -> list[str]:
        return samples.write(model, prompts, device=protocol.device, dtype=protocol.dtype, **names)

    dense: Sequence[str | None] = [None] * len(prompts) if against is None else write(against)
    progress("sample", 1, 2)
    compressed = write(folder)
    progress("sample", 2, 2)
    rows = zip(prompts, dense, compressed, strict=True)
    texts = [{"prompt": prompt, "dense": one, "compressed": other} for prompt, one, other in rows]
    return {"new_tokens": samples.NEW_TOKENS, "texts": texts}
