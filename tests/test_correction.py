"""Measured correction: factors recovered from a known truth, measurements against plain code, bounds that are met."""

import json

import pytest
import torch

import eckart
from eckart import recipes
from eckart._cli import app
from eckart.checkpoints import checkpoint
from eckart.errors import BudgetError, OptionError
from eckart.planning.correction import corrected, measure_correction
from eckart.planning.goals import Goal
from eckart.plans.plan import Plan
from eckart.testing import tiny_models, tiny_tokenizer
from eckart.text.data import load_windows
from eckart.types import Entry, Group, Spectrum, Target

TEXT = "".join(chr(97 + int(i)) for i in torch.randint(26, (6000,), generator=torch.Generator().manual_seed(0)))
KINDS = {"q": 3.0, "v": 0.5, "down": 2.0}
DEPTH = (4.0, 1.0, 1.0, 0.7, 2.0, 0.3, 1.0, 3.0, 1.0, 1.5)


@pytest.fixture
def folder(tmp_path):
    tiny_models()["llama"]().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "dense")


@pytest.fixture
def options(folder, tmp_path):
    return {"recipe": "eckart", "calibration": eckart.Calibration(str(tmp_path / "text.txt"), 16, 24)}


def ten_blocks():
    """Spectra and a plan of ten blocks with three kinds each; one matrix is dense."""
    spectra, entries = [], []
    generator = torch.Generator().manual_seed(0)
    for block in range(10):
        for kind in KINDS:
            group = Group((Target(f"blocks.{block}.{kind}", block, kind, 6, 6, False),))
            values = torch.rand(6, generator=generator, dtype=torch.float64).sort(descending=True).values
            spectra.append(Spectrum(group, values, 0.01))
            entries.append(Entry(group.names, None if (block, kind) == (4, "v") else 1 + block % 4))
    return spectra, entries


def truth(spectra, entries, factor, together=1.0):
    """What a KL measurement would say if each group's loss were its prediction times `factor(group)`."""
    losses = {s.group.name: s.loss(e.rank) * factor(s.group) for s, e in zip(spectra, entries, strict=True)}

    def measure(parts):
        return [sum(losses[n] for n in part) * (together if len(part) == len(losses) else 1.0) for part in parts]

    return measure


def test_factors_of_kinds_are_recovered_with_one_probe_each():
    spectra, entries = ten_blocks()
    asked = []
    real = truth(spectra, entries, lambda group: KINDS[group.kind], together=1.3)

    def measure(parts):
        asked.extend(parts)
        return real(parts)

    found = measure_correction(spectra, entries, "cheap", measure)
    assert len(asked) == len(KINDS) + 1
    for spectrum in spectra:
        assert found.multipliers[spectrum.group.name] == pytest.approx(KINDS[spectrum.group.kind])
    assert found.together == pytest.approx(1.3)
    corrected = found.apply(spectra)
    predicted = sum(s.loss(e.rank) for s, e in zip(corrected, entries, strict=True))
    assert predicted == pytest.approx(found.measured) == pytest.approx(real([[s.group.name for s in spectra]])[0])


def test_full_recovers_depth_as_well_and_cheap_does_not():
    spectra, entries = ten_blocks()
    measure = truth(spectra, entries, lambda group: KINDS[group.kind] * DEPTH[group.targets[0].block])
    found = {level: measure_correction(spectra, entries, level, measure).apply(spectra) for level in ("cheap", "full")}

    def worst(corrected):
        pairs = zip(corrected, spectra, entries, strict=True)
        errors = [abs(s.loss(e.rank) / measure([[o.group.name]])[0] - 1) for s, o, e in pairs if e.rank is not None]
        return max(errors)

    assert worst(found["full"]) < 0.02
    assert worst(found["cheap"]) > 0.3


def test_the_recipes_correct_in_full():
    for name in ("eckart", "eckart-full"):
        assert recipes.find(name).make_allocator().correction_level() == "full"


def test_a_part_that_is_all_dense_keeps_its_prediction():
    spectra, entries = ten_blocks()
    entries = [Entry(e.targets, None) if s.group.kind == "v" else e for s, e in zip(spectra, entries, strict=True)]
    found = measure_correction(spectra, entries, "cheap", truth(spectra, entries, lambda group: KINDS[group.kind]))
    assert {found.multipliers[s.group.name] for s in spectra if s.group.kind == "v"} == {1.0}


def kl_of(folder, out, windows):
    """Plain code: mean over tokens of KL(dense || compressed), both loaded from their folders."""
    with torch.no_grad():
        dense, cut = (
            checkpoint.load_model(str(f))(windows).logits[:, :-1].double().log_softmax(-1) for f in (folder, out)
        )
    return float((dense.exp() * (dense - cut)).sum(-1).mean())


@pytest.mark.parametrize("extra", [{}, {"refiners": "recover", "recover.epochs": 1}])
def test_what_is_reported_is_the_kl_of_the_saved_model_on_text_that_was_not_calibrated_on(
    folder, options, tmp_path, extra
):
    made = eckart.compress(folder, keep=0.6, out=tmp_path / "out", options=extra, **options)
    read = load_windows(str(tmp_path / "text.txt"), tiny_tokenizer(), windows=16, length=24, spare=8)
    assert not {tuple(row) for row in read.unseen.tolist()} & {tuple(row) for row in read.ids.tolist()}
    told = checkpoint.read_provenance(tmp_path / "out")["kl"]
    assert told["unseen"] is True
    assert (told["windows"], told["length"]) == read.unseen.shape
    assert told["measured"] == pytest.approx(kl_of(folder, tmp_path / "out", read.unseen), rel=1e-3)
    assert told["predicted"] == made.plan.reached["predicted_kl"]
    if not extra:
        assert 1 / 1.5 < told["predicted"] / told["measured"] < 1.5
        assert told["measured"] == made.plan.reached["measured_kl"]


def test_a_text_without_more_windows_is_measured_on_itself_and_says_so(folder, options, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT[: 16 * 24])
    made = eckart.compress(folder, keep=0.6, **options)
    assert made.provenance["kl"]["unseen"] is False


@pytest.mark.parametrize("level", ["cheap", "full"])
def test_a_bound_on_the_kl_is_met_when_measured_and_nearly_used_up(folder, options, level):
    loose = eckart.compress(folder, keep=0.5, **options).provenance["kl"]["measured"]
    for bound in (0.3 * loose, 0.8 * loose):
        made = eckart.compress(folder, max_kl=bound, options={"allocator.correction": level}, **options)
        assert 0.8 * bound < made.provenance["kl"]["measured"] <= bound
    assert made.ledger.keep < 0.9


def test_the_correction_can_be_turned_off_and_is_measured_all_the_same(folder, options):
    plain = eckart.compress(folder, keep=0.6, options={"allocator.correction": "off"}, **options)
    assert "measured_kl" not in plain.plan.reached
    assert plain.provenance["kl"]["measured"] > 0
    with pytest.raises(OptionError, match="correction"):
        eckart.plan(folder, keep=0.6, options={"allocator.correction": "some"}, **options)


def test_a_plan_leaves_the_model_as_it_was(options, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    model = tiny_models()["llama"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    eckart.plan(model, tokenizer=tiny_tokenizer(), keep=0.6, **options)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_command_line_prints_both(folder, tmp_path, capsys):
    text = ["--data", str(tmp_path / "text.txt"), "--windows", "16", "--length", "24"]
    app(["compress", folder, "--keep", "0.6", *text, "--out", str(tmp_path / "out")], standalone_mode=False)
    said = " ".join(capsys.readouterr().out.split())
    kl = json.loads((tmp_path / "out" / "provenance.json").read_text())["kl"]
    assert f"KL from the dense model: {kl['measured']:.4f} nats per token measured" in said
    assert f"{kl['predicted']:.4f} predicted for the plan" in said
    assert "tokens that calibration did not see" in said


def test_a_bound_that_every_plan_misses_is_refused():
    spectra, entries = ten_blocks()
    plan = Plan(tuple(entries), {}, {"predicted_kl": 0.1, "keep": 0.5})
    with pytest.raises(
        BudgetError, match=r"^max_kl is 0\.01, but no plan was found that measures at most that; ask for more\.$"
    ):
        corrected(
            Goal(max_kl=0.01), plan, lambda correction: plan, spectra, "cheap",
            truth(spectra, entries, lambda group: 1.0), lambda entries: 5.0,
        )  # fmt: skip
