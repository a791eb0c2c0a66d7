"""What classes are called: the names of the training data's folders, from training to every program that samples."""

import json

import pytest
import torch
from conftest import load_config
from forked import run_forked
from safetensors.torch import save_file

from libs import checkpoint
from libs.class_names import class_label, find_classes
from libs.model import Model, class_names, config_json, imagenet_names
from libs.pipeline import DiMRPipeline
from scripts import convert_checkpoint as converting
from scripts import sample

TREE = ["class0", "class1", "class2"]  # folders of the data of the tests
SYNSETS = ["n01440764", *(f"n{10_000_000 + i}" for i in range(998)), "n15075141"]


def saved_names(weights):
    return checkpoint.saved_settings(checkpoint.find_weights(weights))["class_names"]


def test_names_go_from_the_data_with_the_weights_into_every_form(trained_run, tmp_path):
    """Checkpoint, safetensors and pipeline; what diffusers saves again, too."""
    trained = trained_run / "ckpts" / "3.ckpt"
    assert saved_names(trained) == TREE
    one, pipeline = tmp_path / "own" / "a.safetensors", tmp_path / "pipeline"
    other = tmp_path / "other" / "b.safetensors"
    for source, out in ((trained, one), (one, pipeline), (pipeline, other)):
        converting.convert(str(source), out)
        assert saved_names(out) == TREE
    pipe = DiMRPipeline.from_pretrained(pipeline)
    assert pipe.names == TREE
    by_name, by_number = (pipe([word], output_type="pt").images for word in ("Class2", 2))
    assert torch.equal(by_name, by_number)
    with pytest.raises(ValueError, match=r"no class is called 'class'; there are class0 \(0\), class1"):
        pipe(["class"])
    pipe.save_pretrained(tmp_path / "again")
    assert saved_names(tmp_path / "again") == TREE
    converting.convert(str(trained), tmp_path / "a.pth")  # has tensors alone
    assert checkpoint.saved_settings(tmp_path / "a.pth") is None


def test_the_programs_take_names_and_write_them(trained_run, tmp_path, monkeypatch):
    trained = trained_run / "ckpts" / "3.ckpt"
    for name, words in (("a.png", "class2,Class0"), ("b.png", "2,0")):
        flags = ("--nnet_path", trained, "--steps", 3, "--grid", tmp_path / name)
        done = run_forked("scripts/sample.py", "--classes", words, *flags)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    model = Model.open(trained)
    drawn = []
    monkeypatch.setattr(sample, "draw_sheet", lambda cells, rows, columns: drawn.append((rows, columns)))
    sample.sample_grid(model, [2, 3], 1, 0, [None], [3])
    sample.trajectory_sheet(sample.with_settings(model, 0, None, 3), [1], [0])
    assert drawn[0] == ([""], ["class2", "no class"])
    assert drawn[1][0] == ["class1, branch 1 (1/2)", "class1, branch 2"]


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        (None, "assets/datasets/imagenet256_features", imagenet_names()),  # as the released weights
        (None, "/data/ImageNet/train", imagenet_names()),
        (None, "/data/birds", [str(i) for i in range(1000)]),
        ([str(i) for i in range(1000)], "imagenet256_features", imagenet_names()),  # imported features have no names
        (SYNSETS, "/data/in1k", imagenet_names()),
        (SYNSETS[1:] + ["n20000000"], "/data/imagenet21k", SYNSETS[1:] + ["n20000000"]),
        ([f"bird {i}" for i in range(1000)], "/data/imagenet", [f"bird {i}" for i in range(1000)]),
        (sorted(map(str, range(1000))), "/data/imagenetv2", sorted(map(str, range(1000)))),
    ],
)
def test_imagenets_names_are_for_imagenet_alone(tmp_path, names, path, expected):
    config = load_config("DiMR-XL-2R_imagenet256")
    config.dataset.path = path
    settings = {"config": config_json(config), "step": 7} | ({"class_names": names} if names else {})
    save_file({}, tmp_path / "a.safetensors", checkpoint.settings_metadata(settings))
    (tmp_path / "state.json").write_text(json.dumps(settings))
    for weights in (tmp_path / "a.safetensors", tmp_path / "beside.pth"):
        assert class_names(config, weights) == expected


@pytest.mark.parametrize("name", ["DiMR-XL-2R_imagenet256", "DiMR-XL-3R_imagenet512", "DiMR-M-3R_imagenet64"])
def test_the_published_configs_are_imagenets(tmp_path, name):
    assert class_names(load_config(name), tmp_path / "released.pth")[207] == "golden retriever"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], r"state.pth names 2 classes, config.dataset.n_classes is 3"),
        ("abc", r"the settings saved with .*state.pth are damaged: class_names is no list of names"),
        ([1, 2, 3], r"the settings saved with .*state.pth are damaged: class_names is no list of names"),
    ],
)
def test_names_that_do_not_fit_are_told(tiny_config, tmp_path, names, message):
    settings = {"config": config_json(tiny_config), "class_names": names}
    (tmp_path / "state.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        class_names(tiny_config, tmp_path / "state.pth")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("CAT", r"^several classes are called 'CAT'; there are Cat \(0\), cat \(1\)$"),
        ("dog", r"^several classes are called 'dog'; there are dog \(2\), dog \(4\)$"),
        ("kiten", r"^no class is called 'kiten'; there are Kitten \(3\)$"),
        ("qqqq", r"^no class is called 'qqqq'; there are Cat \(0\), cat \(1\), dog \(2\), Kitten \(3\), dog \(4\)$"),
        (" ", "^no class is called ' '; there are "),
        ("7", r"^class labels are 0..6 \(6: no class\); found 7$"),
        (1.5, r"^class labels are 0..6 \(6: no class\); found 1.5$"),
    ],
)
def test_a_name_means_one_class_or_is_an_error(word, message):
    names = ["Cat", "cat", "dog", "Kitten", "dog", "a, b"]
    found = [class_label(word, names) for word in ("cat", "Cat", "kitten", " KITTEN ", "a, b", 6)]
    assert found == [1, 0, 3, 3, 5, 6]
    with pytest.raises(ValueError, match=message):
        class_label(word, names)
    with pytest.raises(ValueError, match=r"^no class is called 'dog'$"):
        class_label("dog", [])


def test_a_number_is_the_label_even_where_a_class_is_called_so():
    """Folders 0 to 11 in sorted order: label 2 is called 10."""
    names = sorted(map(str, range(12)))
    assert names[2] == "10" and class_label("10", names) == 10 and class_label(10, names) == 10
    assert find_classes("10", names) == [10, 2]
    assert [sample.class_caption(label, names) for label in (0, 2, 12)] == ["0", "10 (2)", "no class"]
    assert (
        class_label("03", ["00", "01", "02", "03"]) == 3 and sample.class_caption(3, ["00", "01", "02", "03"]) == "03"
    )
