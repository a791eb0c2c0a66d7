"""scripts/sweep_guidance.py: what it makes again, its table, and that its sets are eval.py's."""

import ml_collections
import numpy as np
import pytest
from conftest import load_config
from PIL import Image

import eval as evaluation
from scripts.sweep_guidance import Scorer, Setting, combine, open_scorer, sweep


def ink(folder, accelerator=None):
    """In place of a score: the mean of the pixels."""
    return {"ink": float(np.mean([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]))}


def test_every_setting_is_scored_once(tiny_config, weights, tmp_path):
    out, scored = tmp_path / "sweep", []
    scorer = Scorer({"ink": "mean ink"}, {"by": "ink"}, lambda folder, _: scored.append(folder) or ink(folder))
    settings = combine([1.0, 4.0], [None, 2.0], [None], [3, 4])
    assert len(settings) == 2 * (1 + 1 * 2) and len({setting.name() for setting in settings}) == 6
    sweep(tiny_config, str(weights), out, settings[:2], scorer)
    assert len(scored) == 2
    rows = sweep(tiny_config, str(weights), out, settings, scorer)
    assert len(scored) == 6
    found = [scores["ink"] for _, scores in rows]
    assert found == sorted(found) and len(set(found)) > 2
    table = [line.strip("| ").split(" | ") for line in (out / "sweep.md").read_text().splitlines()[2:]]
    assert table[0] == ["scale", "power", "interval", "steps", "mean ink"]
    assert [float(row[-1]) for row in table[2:]] == pytest.approx(found, abs=1e-4)
    assert {tuple(row[1:4]) for row in table[2:] if row[0] == "1"} == {("none", "none", "3"), ("none", "none", "4")}
    assert (out / "sweep.png").stat().st_size > 10_000
    sweep(tiny_config, str(weights), out, settings[:1], scorer._replace(identity={"by": "another"}))
    assert len(scored) == 7

    config = ml_collections.ConfigDict(tiny_config)  # a set of the sweep is the set of eval.py
    config.sample.update(scale=4.0, scale_pow=2.0, sample_steps=3)
    evaluation.evaluate(config, str(weights), tmp_path / "alone")
    of_setting = {setting.name(): scores for setting, scores in rows}
    assert of_setting["scale4_power2_intervalnone_steps3"] == ink(tmp_path / "alone")


def test_settings(tmp_path):
    assert Setting(2.0, 2.0, (0.2, 3.0), 20).name() == "scale2_power2_interval0.2-3_steps20"
    config = load_config("digits")
    with pytest.raises(ValueError, match="nothing to score by: set --reference, or --digits"):
        open_scorer(None, "absent", config)
    with pytest.raises(ValueError, match="the guidance scale must be at least 1"):  # before any is sampled
        sweep(config, "absent", tmp_path, combine([2.0, 0.5], [None], [None], [20]), Scorer({}, {}, None))
