"""The demo from end to end, on a tiny model in place of the real one."""

import json

from eckart.demo import run as demo
from eckart.testing import tiny_model, tiny_tokenizer


def test_the_demo_compresses_measures_lets_both_write_and_leaves_a_page(tmp_path, monkeypatch):
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    tiny_model("Llama", **options, max_position_embeddings=512).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(demo, "fetch_demo_model", lambda progress: tmp_path / "dense")
    monkeypatch.setattr(demo, "CALIBRATION", demo.Calibration(data=demo.CORPUS, windows=4, length=64))
    report = demo.run_demo(tmp_path / "out", recipe="svd-llm", keep=0.7)
    assert 0.5 < report.ledger.keep <= 0.7
    assert set(report.samples) == {"dense", "compressed"}
    row = json.loads(json.dumps(report.to_dict()))["evaluation"]["results"][0]
    assert f"{row['perplexity']:.3f}" in report.page.read_text()
    assert report.page == tmp_path / "out" / "report.html"
