"""The model card of a checkpoint, `README.md`: what was done to which model, from its plan and provenance.

It says only what stands there. The hub reads its head, people read the rest. Names are foreign text: they are written
so that they mean nothing in Markdown or HTML.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eckart.plans.plan import Plan
from eckart.support.escaping import plain

NAME = "README.md"


def card(provenance: Mapping[str, Any], plan: Plan | None) -> str:
    """Markdown with the hub's YAML head for a factorised checkpoint."""
    from huggingface_hub import ModelCardData

    source = str(_at(provenance, "model", "source") or "")
    head = ModelCardData(
        base_model=source if _is_hub_id(source) else None,
        base_model_relation="quantized" if _is_hub_id(source) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["eckart", "low-rank", *(["quantized"] if _packs(plan) else [])],
    )
    rows = "\n".join(f"| {what} | {value} |" for what, value in _facts(provenance, plan) if value)
    how = _FEW_BITS if _packs(plan) else _FACTORS
    return f"---\n{head.to_yaml()}\n---\n\n{_TEXT.format(model=_shown(source), how=how, rows=rows)}"


def _packs(plan: Plan | None) -> bool:
    return plan is not None and any(entry.bits is not None for entry in plan.entries)


_FACTORS = "made smaller by low-rank factorisation with eckart: some of its linear layers are two thin factors each."
_FEW_BITS = "made smaller with eckart: its linear layers have few bits, two thin factors, or both."


_TEXT = """# {model}, factorised

{model}, {how}
Everything else is as it was.

| | |
| --- | --- |
{rows}

`plan.json` says which layer has which rank, `provenance.json` what would make the same files again.

## Load it

`FOLDER` is this folder, or the name of its repository on the hub.

With eckart, bit for bit and compared with the hashes in `provenance.json`:

```python
import eckart

model = eckart.load("FOLDER")
```

With transformers and eckart installed, in its native class:

```python
import eckart
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")
```

With transformers alone, by the code in this folder:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
```

Without either, loading fails on a size mismatch. It never falls back to random weights.
`model.dequantize()` gives the plain dense model, with the factors multiplied out.
"""


def _facts(provenance: Mapping[str, Any], plan: Plan | None) -> list[tuple[str, str]]:
    """Rows `(what, value)` in words; an empty value for what is not recorded."""
    ledger, data = provenance.get("ledger"), provenance.get("calibration")
    recipe, versions = _at(provenance, "recipe", "name"), provenance.get("versions") or {}
    predicted, measured = _predicted(plan), _number(_at(provenance, "kl", "measured"))
    return [
        ("Made from", _shown(str(_at(provenance, "model", "source") or ""))),
        ("Revision", _words(_at(provenance, "model", "revision") or "")),
        ("Recipe", _code(recipe) if recipe else ""),
        ("Kept of the compressed layers", _share(ledger, "target_parameters")),
        ("Kept of the whole model", _share(ledger, "model_parameters")),
        ("Size", f"{ledger['model_bytes_kept']:,} of {ledger['model_bytes_dense']:,} bytes" if ledger else ""),
        ("Calibrated on", _calibration(data) if isinstance(data, Mapping) else ""),
        ("Predicted KL", "" if predicted is None else f"{predicted:.4g} nats per token, from the dense model"),
        ("Measured KL", "" if measured is None else f"{measured:.4g} nats per token, from the dense model"),
        ("Versions", ", ".join(_words(f"{name} {version}") for name, version in versions.items())),
    ]


def _share(ledger: Mapping[str, Any] | None, what: str) -> str:
    if not ledger:
        return ""
    kept, dense = ledger[f"{what}_kept"], ledger[f"{what}_dense"]
    return f"{kept / dense:.1%} ({kept:,} of {dense:,} parameters)"


def _calibration(data: Mapping[str, Any]) -> str:
    """The text by its name, without the folders of the machine that it was on."""
    windows = _words(f"{data.get('windows')} windows of {data.get('length')} tokens")
    parts = [Path(part).name if part.startswith(("/", ".", "~")) else part for part in str(data.get("spec")).split(",")]
    return f"{_words(', '.join(parts))}: {windows}, hash {_code(str(data.get('tokens_hash'))[:12])}"


def _predicted(plan: Plan | None) -> float | None:
    """The KL that the plan predicts, None if it predicts none."""
    return None if plan is None else _number(plan.reached.get("predicted_kl"))


def _number(value: Any) -> float | None:
    """A note as a number; None for what somebody has written in its place."""
    return float(value) if isinstance(value, int | float) else None


def _at(data: Mapping[str, Any], *keys: str) -> Any:
    """The value down a path of keys, None where there is none."""
    value: Any = data
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source, re.ASCII) is not None and not Path(source).exists()


def _shown(source: str) -> str:
    if not source:
        return "a model"
    return f"[{source}](https://huggingface.co/{source})" if _is_hub_id(source) else _code(Path(source).name)


def _code(text: object) -> str:
    """Text as code; one that would end the code or the cell of a table as words."""
    return _words(text) if set("`|\\") & set(plain(text)) else f"`{plain(text)}`"


def _words(text: object) -> str:
    """Text in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|~&#!$])", r"\\\1", plain(text))
