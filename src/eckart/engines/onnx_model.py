"""Run an exported ONNX graph with its cache in ONNX Runtime: what `eckart export --to onnx` wrote.

Needs onnxruntime and numpy only, so it is also the example of how to use such a folder without torch.
"""

from pathlib import Path
from typing import Any

import numpy as np

from eckart.support.extras import require

GRAPH = "model.onnx"
Past = dict[str, Any]


class OnnxModel:
    """A causal language model in one graph; `past` holds one array for each cache input of the graph."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        require("export", "running an ONNX graph", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if threads is not None:  # otherwise it takes every core of the machine
            options.intra_op_num_threads = threads
        path = str(Path(folder) / GRAPH)
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]

    def empty_past(self, batch: int) -> Past:
        """A cache of no tokens: `[batch, heads, 0, size]` in the graph's dtype."""
        return {
            spec.name: np.zeros([batch, *(int(d) if str(d).isdigit() else 0 for d in spec.shape[1:])], np.float32)
            for spec in self.session.get_inputs()
            if spec.name.startswith("input.")
        }

    def __call__(self, ids: Any, past: Past | None = None) -> tuple[Any, Past]:
        """Logits `[batch, tokens, vocabulary]` of ids `[batch, tokens]` that follow `past`, and the cache with them."""
        batch, tokens = ids.shape
        past = self.empty_past(batch) if past is None else past
        past_tokens = next((array.shape[2] for array in past.values()), 0)
        feed = {
            "input_ids": ids,
            "position_ids": np.broadcast_to(np.arange(past_tokens, past_tokens + tokens), (batch, tokens)),
            "attention_mask": np.ones((batch, past_tokens + tokens), np.int64),
            **past,
        }
        outputs = dict(zip(self.outputs, self.session.run(None, {n: feed[n] for n in self.inputs}), strict=True))
        return outputs["logits"], {n: outputs[n.replace("input.", "output.", 1)] for n in past}

    def greedy(self, ids: Any, count: int) -> Any:
        """The `count` most likely tokens that follow ids `[1, tokens]`, one after the other."""
        logits, past = self(ids)
        tokens = [int(logits[0, -1].argmax())]
        while len(tokens) < count:
            logits, past = self(np.array([[tokens[-1]]]), past)
            tokens.append(int(logits[0, -1].argmax()))
        return tokens
