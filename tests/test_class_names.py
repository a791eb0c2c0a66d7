"""What classes are called: the names of the training data's folders, from training to every program that samples."""

import json
import shutil

import pytest
import torch
from conftest import load_config, run
from safetensors.torch import save_file
from test_train import assert_same_checkpoint, losses

import train as training
import utils
from libs import checkpoint
from libs.class_names import class_label, find_classes, imagenet_names
from libs.files import json_digest
from libs.pipeline import DiMRPipeline
from scripts import convert_checkpoint as converting
from scripts import demo, sample

TREE = ["class0", "class1", "class2"]  # folders of the data of the tests
SYNSETS = ["n01440764", *(f"n{10_000_000 + i}" for i in range(998)), "n15075141"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def trained(tiny_config, run_folder):
    """The checkpoint of a run of three steps on the store of `TREE`."""
    folder = run_folder / "ckpts" / "3.ckpt"
    if not folder.exists():
        tiny_config.train.n_steps = 3
        training.train(tiny_config, run_folder)
    return folder


def saved_names(weights):
    return checkpoint.saved_settings(checkpoint.find_weights(weights))["class_names"]


def test_names_go_from_the_data_with_the_weights_into_every_form(trained, tmp_path):
    """Checkpoint, safetensors and pipeline; what diffusers saves again, too."""
    assert saved_names(trained) == TREE
    one, pipeline, other = (
        tmp_path / "own" / "a.safetensors",
        tmp_path / "pipeline",
        tmp_path / "other" / "b.safetensors",
    )
    for source, out in ((trained, one), (one, pipeline), (pipeline, other)):
        converting.convert(str(source), out)
        assert saved_names(out) == TREE
    pipe = DiMRPipeline.from_pretrained(pipeline)
    assert pipe.names == TREE
    by_name, by_number = (pipe([word], output_type="pt").images for word in ("Class2", 2))
    assert torch.equal(by_name, by_number)
    with pytest.raises(ValueError, match="no class is called 'class'; near it: class0, class1, class2"):
        pipe(["class"])
    pipe.save_pretrained(tmp_path / "again")
    assert saved_names(tmp_path / "again") == TREE
    converting.convert(str(trained), tmp_path / "a.pth")  # has tensors alone
    assert checkpoint.saved_settings(tmp_path / "a.pth") is None


def test_the_programs_take_names_and_write_them(trained, tmp_path, monkeypatch):
    for name, words in (("a.png", "class2,Class0"), ("b.png", "2,0")):
        flags = ("--nnet_path", trained, "--steps", 3, "--grid", tmp_path / name)
        done = run("scripts/sample.py", "--classes", words, *flags)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    model = sample.Model(str(trained), None)
    drawn = []
    monkeypatch.setattr(sample, "draw_grid", lambda cells, rows, columns: drawn.append((rows, columns)))
    sample.sample_grid(model, [2, 3], 1, 0, [None], [3], ("class", "sample"))
    sample.trajectory_sheet(model, model.with_settings(0, None, 3), [1], [0])
    assert drawn[0] == ([""], ["class2", "no class"])
    assert drawn[1][0] == ["class1, branch 1 (1/2)", "class1, branch 2"]

    assert [demo.caption(label, model.names) for label in demo.offered("class", model.names)] == [
        "class0 (0)",
        "class1 (1)",
        "class2 (2)",
        "no class (3)",
    ]
    assert demo.checked(model, "class1", None, 0, 2, 3, 2).label == 1


def test_a_pixel_model_has_its_folders_names(tiny_images, tmp_path):
    config = load_config("DiMR-M-3R_imagenet64")
    config.z_shape = (3, 16, 16)
    for stage in config.nnet.stages:
        stage.dim, stage.depth, stage.num_heads = 8, 1, 2
    config.dataset.update(path=str(tiny_images), n_classes=3, num_workers=0)
    config.train.update(n_steps=1, batch_size=4)
    training.train(config, tmp_path / "classes")
    assert saved_names(tmp_path / "classes" / "ckpts" / "1.ckpt") == TREE
    config.dataset.n_classes = 0
    training.train(config, tmp_path / "none")
    assert saved_names(tmp_path / "none" / "ckpts" / "1.ckpt") == []
    assert sample.Model(str(tmp_path / "none" / "ckpts" / "1.ckpt"), None).names == []


def without_names(folder):
    """Make a checkpoint one of before names were saved."""
    state = json.loads((folder / "state.json").read_text())
    del state["class_names"]
    digests = state.pop("sha256")
    digests["state.json"] = json_digest(state)
    (folder / "state.json").write_text(json.dumps({**state, "sha256": digests}))


def test_a_checkpoint_from_before_names_samples_and_goes_on_exactly(tiny_config, trained, run_folder, tmp_path):
    for name in ("new", "old"):
        shutil.copytree(run_folder, tmp_path / name)
    before = tmp_path / "old" / "ckpts" / "3.ckpt"
    without_names(before)
    assert saved_names(before) is None and sample.Model(str(before), None).names == ["0", "1", "2"]
    tiny_config.train.n_steps = 4
    for name in ("new", "old"):
        training.train(tiny_config, tmp_path / name)
    assert losses(tmp_path / "old") == losses(tmp_path / "new")
    after = [tmp_path / name / "ckpts" / "4.ckpt" for name in ("new", "old")]
    assert_same_checkpoint(*after)
    assert [saved_names(folder) for folder in after] == [TREE, TREE]


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        (None, "assets/datasets/imagenet256_features", imagenet_names()),  # before names were saved
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
    settings = {"config": utils.config_json(config), "step": 7} | ({"class_names": names} if names else {})
    save_file({}, tmp_path / "a.safetensors", checkpoint.settings_metadata(settings))
    (tmp_path / "state.json").write_text(json.dumps(settings))
    for weights in (tmp_path / "a.safetensors", tmp_path / "beside.pth"):
        assert utils.class_names(config, weights) == expected


@pytest.mark.parametrize("name", ["DiMR-XL-2R_imagenet256", "DiMR-XL-3R_imagenet512", "DiMR-M-3R_imagenet64"])
def test_the_published_configs_are_imagenets(tmp_path, name):
    assert utils.class_names(load_config(name), tmp_path / "released.pth")[207] == "golden retriever"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], r"state.pth has the names of 2 classes .*, expected config.dataset.n_classes, 3: give the config"),
        ("abc", r"the settings saved with .*state.pth are damaged: class_names is no list of names"),
        ([1, 2, 3], r"the settings saved with .*state.pth are damaged: class_names is no list of names"),
    ],
)
def test_names_that_do_not_fit_are_told(tiny_config, tmp_path, names, message):
    settings = {"config": utils.config_json(tiny_config), "class_names": names}
    (tmp_path / "state.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        utils.class_names(tiny_config, tmp_path / "state.pth")


def test_a_name_means_one_class_or_is_told():
    names = ["Cat", "cat", "dog", "Kitten", "dog", "a, b"]
    assert [class_label(word, names) for word in ("cat", "Cat", "kitten", " KITTEN ", "a, b")] == [1, 0, 3, 3, 5]
    for word, message in (
        ("CAT", r"^several classes are called 'CAT': Cat \(0\), cat \(1\); give the number of one$"),
        ("dog", r"^several classes are called 'dog': dog \(2\), dog \(4\); give the number of one$"),
        ("kiten", "^no class is called 'kiten'; near it: Kitten$"),
        ("qqqq", "^no class is called 'qqqq'; there are: Cat, cat, dog, Kitten, dog, ...$"),
        (" ", "^no class is called ' '; there are: "),
    ):
        with pytest.raises(ValueError, match=message):
            class_label(word, names)
    with pytest.raises(ValueError, match=r"^no class is called 'dog'$"):
        class_label("dog", [])


def test_a_number_is_the_label_even_where_a_class_is_called_so():
    """Folders 0 to 11 in sorted order: label 2 is called 10."""
    names = sorted(map(str, range(12)))
    assert names[2] == "10" and class_label("10", names) == 10 and class_label(10, names) == 10
    assert find_classes("10", names) == [10, 2] and demo.chosen("10", None, names) == 10
    assert [sample.class_caption(label, names) for label in (0, 2, 12)] == ["0", "10 (2)", "no class"]
    assert demo.caption(2, names) == "10 (2)"
    assert (
        class_label("03", ["00", "01", "02", "03"]) == 3 and sample.class_caption(3, ["00", "01", "02", "03"]) == "03"
    )
