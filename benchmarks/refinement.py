"""Refinement of blocks and recovery, separately and together, from one closed form of recipe eckart.

    python benchmarks/refinement.py MODEL CALIBRATION.txt TEST.txt [--keep 0.8]

The protocol of `recipes.py`. Rows are written as they come; a second run measures only what is missing. The time of
a row is what its refiners took; calibration and planning, which all rows share, are beside them. The peak of memory is
the process's so far, less the model and the dense predictions kept for measuring.
"""

import argparse
import resource
import time
from pathlib import Path

from _common import Bench, Corpora, read_report, write_report

from eckart import recipes
from eckart.planning.goals import Goal
from eckart.planning.planner import Planned

BLOCKS = {"refiners": "block_collaborative"}


class Chains:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.out, self.report = arguments.out, read_report(arguments.out)
        self.bench = Bench(arguments.model, arguments.calibration)
        self.bench.decompose(recipes.find("eckart"))
        self.corpora = Corpora(self.bench.model, self.bench.tokenizer, arguments.test)
        self.report["dense"] = self.corpora.figures(self.bench.model)

    def chain(self, planned: Planned, keep: float, steps: list[tuple[str, str, dict]]) -> None:
        """Refine one closed form step after step and measure after each; a step is a row's name, recipe and options."""
        model = self.bench.model
        if all(f"{name} {keep}" in self.report["rows"] for name, _, _ in steps):
            return
        assert planned.held_out is not None
        seconds = 0.0
        with self.bench.in_place(planned.plan) as work:
            for name, recipe, options in steps:
                start = time.perf_counter()
                for refiner in recipes.find(recipe, options).make_refiners():
                    refiner.refine_(work)
                seconds += time.perf_counter() - start
                row = {**planned.plan.reached, "peak_minus_model_bytes": self._peak()}
                row |= {"seconds_refine": round(seconds, 1), **self.corpora.figures(model)}
                row["measured_kl"] = planned.held_out.kl()
                row["seconds_shared"] = {stage: round(value, 1) for stage, value in self.bench.stages.seconds.items()}
                self.report["rows"][f"{name} {keep}"] = {**row, "refinement": list(work.notes)}
                print(name, keep, row["wikitext-2"], row["python-docs"], row["seconds_refine"], flush=True)
                write_report(self.out, self.report)

    def _peak(self) -> int:
        """Bytes of memory that this process has had at most, without the model and what is kept for measuring."""
        kept = sum(p.nbytes for p in self.bench.model.parameters()) + self.corpora.kept_bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/refinement.json"))
    arguments = parser.parse_args()
    chains, recover, keep = Chains(arguments), {"refiners": "recover"}, arguments.keep
    planned = chains.bench.plan(recipes.find("eckart"), Goal(keep))
    chains.chain(planned, keep, [("eckart", "eckart", {"refiners": "none"}), ("eckart --recover", "eckart", recover)])
    full = [("eckart, blocks refined", "eckart-full", BLOCKS), ("eckart-full", "eckart-full", recover)]
    chains.chain(planned, keep, full)


if __name__ == "__main__":
    main()
