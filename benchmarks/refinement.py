"""Refinement of blocks and recovery, separately and together, from one closed form of recipe eckart.

    python benchmarks/refinement.py MODEL CALIBRATION.txt TEST.txt [--keep 0.8]

The protocol of `recipes.py`. Rows are written as they come; a second run measures only what is missing. The time of
a row is what its refiners took; calibration and planning, which all rows share, are beside them. The peak of memory is
the process's so far, less the model and the dense predictions kept for measuring.
"""

import argparse
import json
import resource
import time
from pathlib import Path

from recipes import figures, read_tests

from eckart import Calibration, recipes
from eckart.support.versions import versions
from eckart.measuring.probe import in_place
from eckart.planning.goals import Goal
from eckart.plans.plan import Plan, resolve
from eckart.portable.linear import weight_view
from eckart.progress import silent
from eckart.run import Run
from eckart.support.files import write_text

BLOCKS = {"refiners": "block_collaborative"}


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out = arguments.out
        self.report = json.loads(self.out.read_text()) if self.out.exists() else {"rows": {}}
        calibration = Calibration(arguments.calibration, windows=32, length=512)
        self.run = Run(arguments.model, "eckart", {}, calibration, None, (), (), "cpu", "auto", None, silent)
        self.tests, self.dense = read_tests(self.run.model, self.run.tokenizer, arguments.test)
        self.report["dense"] = figures(self.run.model, self.tests, self.dense)
        self.report["versions"] = versions()

    def chain(self, plan: Plan, keep: float, steps: list[tuple[str, str, dict]]) -> None:
        """Refine one closed form step after step and measure after each; a step is a row's name, recipe and options."""
        run = self.run
        if all(f"{name} {keep}" in self.report["rows"] for name, _, _ in steps):
            return
        groups, entries = resolve(plan, run.layout.targets)
        names = [name for entry in entries if entry.rank is not None for name in entry.targets]
        weights = {name: weight_view(run.model.get_submodule(name)) for name in names}
        assert run.windows is not None
        assert run.held_out is not None
        notes: list = []
        seconds = 0.0
        with in_place(run.model, groups, entries, run.put):
            for name, recipe, options in steps:
                start = time.perf_counter()
                for refiner in recipes.find(recipe, options).make_refiners():
                    refiner.refine_(run.refinement(plan, weights, run.windows.ids, notes))
                seconds += time.perf_counter() - start
                row = {**plan.reached, "peak_minus_model_bytes": self._peak(), "seconds_refine": round(seconds, 1)}
                row |= {**figures(run.model, self.tests, self.dense), "measured_kl": run.held_out.kl()}
                row["seconds_shared"] = {stage: round(value, 1) for stage, value in run.seconds.items()}
                self.report["rows"][f"{name} {keep}"] = {**row, "refinement": list(notes)}
                print(name, keep, row["wikitext-2"], row["python-docs"], row["seconds_refine"], flush=True)
                write_text(self.out, json.dumps(self.report, indent=1) + "\n")

    def _peak(self) -> int:
        """Bytes of memory that this process has had at most, without the model and what is kept for measuring."""
        kept = sum(p.nbytes for p in self.run.model.parameters())
        kept += sum(window.nbytes for windows in self.dense.values() for window in windows)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/refinement.json"))
    arguments = parser.parse_args()
    bench = Bench(arguments)
    recover, keep = {"refiners": "recover"}, arguments.keep
    plan = bench.run.make_plan(Goal.of(keep, None, None), 1)
    bench.chain(plan, keep, [("eckart", "eckart", {"refiners": "none"}), ("eckart --recover", "eckart", recover)])
    full = [("eckart, blocks refined", "eckart-full", BLOCKS), ("eckart-full", "eckart-full", recover)]
    bench.chain(plan, keep, full)


if __name__ == "__main__":
    main()
