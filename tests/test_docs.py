"""The documents: their commands, messages, settings and links are those of the code."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import utils
from configs import common
from libs import dimr, norms

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [*ROOT.glob("*.py"), *(ROOT / "libs").glob("*.py"), *(ROOT / "scripts").glob("*.py")]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
COMMAND = re.compile(r"(\w+=\S+ +)*(python3?|accelerate launch|torchrun|bash|eval\.py) ")

# Every command of the documents runs in a test, or needs what no test has. A command is found by its program; where
# the program runs in a test, the same command differs from it in paths and sizes only.
RUN_BY_TESTS = {
    "scripts/make_digits.py": "test_digits.py",
    "scripts/make_pictures.py": "test_docs.py",
    "scripts/extract_imagenet_feature.py": "test_docs.py, test_extract.py",
    "scripts/inspect_latents.py": "test_docs.py, test_import.py",
    "scripts/import_latents.py": "test_import.py",
    "scripts/compute_fid_stats.py": "test_docs.py, test_fid_stats.py",
    "scripts/evaluate_npz.py": "test_adm_suite.py",
    "scripts/check_golden.py": "test_golden.py",
    "scripts/describe_model.py": "test_cost.py",
    "scripts/draw_network.py": "test_docs.py",
    "scripts/make_config_reference.py": "test_docs.py",
    "scripts/first_losses.sh": "test_docs.py",
    "scripts/posthoc_ema.py": "test_train.py",
    "scripts/convert_checkpoint.py": "test_convert.py, test_pipeline.py",
    "scripts/sample.py": "test_sample.py",
    "scripts/demo.py": "test_demo.py",
    "train.py": "test_docs.py, test_train.py, test_topology.py, test_sharding.py",
    "eval.py": "test_docs.py, test_eval.py, test_sample_set.py",
    "img2npz.py": "test_docs.py, test_img2npz.py, test_sample_set.py",
}
NOT_RUN = {
    "scripts/quickstart.sh": "installs and trains for minutes; it is the README's first command and is run by hand",
    "scripts/test.sh": "runs these tests",
    "benchmarks/cpu.sh": "takes 20 minutes and 24 GB",
    "benchmarks/faults.py": "takes half an hour; test_faults.py injects the same faults",
}
NEEDS = {
    "ImageNet": r"imagenet|IMAGENET|ImageNet",
    "released weights, or a user's": r"released|WEIGHTS|DiMR-(XL|G)_|VIRTUAL_|NAME|REF|FOLDER",
    "several GPUs": r"--multi_gpu|--config_file|--num_machines|--nproc_per_node",
}


def commands(text: str) -> list[str]:
    """Every command in a document: of code blocks, fenced or indented, and of `code` in sentences and tables."""
    lines = [line for block in FENCED.finditer(text) for line in block[2].replace("\\\n", " ").splitlines()]
    rest = FENCED.sub("", text)
    for block in re.finditer(r"(?:^    .*\n)+", rest, re.M):
        lines += block[0].replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", rest)
    lines = [re.sub(r"\s+#.*", "", " ".join(line.split())) for line in lines]
    return [line for line in lines if COMMAND.match(line)]


ALL_COMMANDS = sorted({command for path in DOCS for command in commands(path.read_text())})


def program(command: str) -> str | None:
    """The project's program that a command starts."""
    found = re.search(r"[\w./]+\.(py|sh)\b", command)
    return found[0] if found else None


def test_the_documents_have_commands():
    assert len(ALL_COMMANDS) > 30 and all(len(commands(path.read_text())) for path in DOCS[:2])


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if program(c)])
def test_every_command_runs_in_a_test_or_cannot(command):
    assert (ROOT / program(command)).is_file()
    assert program(command) in RUN_BY_TESTS | NOT_RUN
    name = rf"\b{Path(program(command)).stem}\b|training\.train|docs/new_data"
    for test in RUN_BY_TESTS.get(program(command), "").split(", "):
        assert not test or re.search(name, (ROOT / "tests" / test).read_text()), test
    if not program(command).startswith(("scripts", "benchmarks")) and "new_data" not in command:
        needs = [name for name, pattern in NEEDS.items() if re.search(pattern, command)]
        assert needs or "..." in command or "part0" in command or command == "python3 img2npz.py", command


def unknown_flags(command: str) -> list[str]:
    """Those that the program of a command does not take: flags by its source, overrides by the config."""
    words = shlex.split(re.sub(r"[\[\]…|]", " ", command))
    source = (ROOT / program(command)).read_text()
    config = re.search(r"--config=(configs/[\w-]+\.py)", command)
    config = utils.load_config(ROOT / (config[1] if config and "NAME" not in config[1] else "configs/digits.py"))
    after = words[next(i for i, word in enumerate(words) if word.endswith(program(command))) + 1 :]
    unknown = []
    for name in [word[2:].split("=")[0] for word in after if word.startswith("--")]:
        if name.startswith("config."):
            known = "define_config_flag" in source and (name == "config.FIELD" or has_field(config, name))
        else:
            forms = (f'"--{name}"', f'"--{name.removeprefix("no-")}"', f'"{name}"')
            known = name == "config" or any(form in source for form in forms)
        unknown += [] if known else [name]
    return unknown


def has_field(config: ml_collections.ConfigDict, name: str) -> bool:
    """Does `name` (config.a.b) lead to a field?"""
    for part in name.split(".")[1:]:
        if part not in config:
            return False
        config = config[part]
    return True


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if program(c)])
def test_every_flag_of_a_command_exists(command):
    assert not unknown_flags(command), command


def test_a_flag_of_another_program_is_found():
    """Overrides of the config too: scripts/sample.py takes none."""
    field = "config.autoencoder.pretrained_path"
    assert unknown_flags(f"python scripts/sample.py --{field}=x --autoencoder x --metrics=y") == [field, "metrics"]
    assert unknown_flags(f"eval.py --config=configs/digits.py --{field}=x --config.sample.nothing=1 --cfg=2") == [
        "config.sample.nothing"
    ]


def test_quickstart_says_how_to_go_on(tmp_path):
    """Where it uses a .venv of its own; here one whose python installs nothing."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("requirements.txt", "workdir/quickstart/report.json", ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('#!/bin/sh\necho "$PWD/.venv"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    made = shell("bash scripts/quickstart.sh", tmp_path, VIRTUAL_ENV="", CONDA_PREFIX="")
    assert made.endswith("source .venv/bin/activate\n") and "Already done" in made
    assert "activate" not in shell("PATH=.venv/bin:$PATH; bash scripts/quickstart.sh", tmp_path, VIRTUAL_ENV="own")


@pytest.fixture(scope="module")
def fresh_clone(tmp_path_factory) -> Path:
    """The project's files alone, as a clone has them."""
    folder = tmp_path_factory.mktemp("clone") / "DiMR"
    unwanted = shutil.ignore_patterns(".git", ".venv", "workdir", "wandb", "saved_images*", "__pycache__", "datasets")
    shutil.copytree(ROOT, folder, ignore=unwanted)
    return folder


def shell(script: str, folder: Path, **env: str) -> str:
    """Run a script in a folder by bash, stopping at the first error; returns what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_guide_to_new_data_word_for_word(fresh_clone, inception_assets, tmp_path):
    """Its commands in their order, in a fresh clone, with its own small settings; Inception's weights are random."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "checkpoints").symlink_to(inception_assets / "inception")
    blocks = [block[2] for block in FENCED.finditer((ROOT / "docs/new_data.md").read_text()) if block[1] == "bash"]
    assert len(blocks) == 7
    shell("\n".join(blocks), fresh_clone, TORCH_HOME=str(tmp_path))

    made = fresh_clone / "workdir" / "new_data"
    assert Image.open(made / "pairs_images" / "3.png").size == (64, 32)
    assert Image.open(made / "crops_images" / "3.png").size == (64, 64)
    assert Image.open(made / "pairs_run" / "samples" / "2.png").size == (64 + 4, 10 * (32 + 2) + 2)
    assert (made / "crops_images" / "class_lab.txt").read_text() == "0\n" * 4
    assert (made / "pairs_images.npz").is_file()
    scores = json.loads((made / "pairs_images_report" / "metrics.json").read_text())
    assert scores["fid"] > 0


@pytest.mark.parametrize("name", ["digit_pairs", "photo_crops", *(p.stem for p in (ROOT / "configs").glob("DiMR*.py"))])
def test_a_config_is_short(name):
    text = (ROOT / "configs" / f"{name}.py").read_text().splitlines()
    assert len(text) < 25
    utils.build_network_on_meta(utils.load_config(ROOT / "configs" / f"{name}.py"))


# --- Messages ---------------------------------------------------------------------------------------------------------


def texts_in_code() -> list[str]:
    """Every string of the programs, with … for what is filled in."""
    texts = []
    for path in PROGRAMS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[sdgr]", "…", node.value))
    return texts


def test_every_message_of_the_troubleshooting_is_in_the_code():
    messages = re.findall(r"^\| `([^`]+)`", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert len(messages) > 30
    texts = texts_in_code()
    for message in messages:
        parts = [re.escape(part.strip()) for part in re.split("…", message) if part.strip()]
        pattern = re.compile(".*?".join(parts), re.S)
        assert any(pattern.search(text) for text in texts), message


# --- Reference, links, citation ---------------------------------------------------------------------------------------


def test_the_configuration_reference_is_up_to_date():
    """Made anew by the script, and naming every field that a config has."""
    from scripts import make_config_reference

    text = (ROOT / "docs/configuration.md").read_text()
    assert text == make_config_reference.reference(), "run python scripts/make_config_reference.py"
    fields = utils.load_config(ROOT / "configs/digits.py")
    for name, value in fields.items():
        for field in [f"{name}.{key}" for key in value] if hasattr(value, "keys") else [name]:
            assert f"`{field}`" in text, field


def longer_stage(
    dim,
    activation="gelu",
    widths=(1, 2),
):
    return dict(
        dim=dim,  # width
        activation=activation,  # gelu or silu
        widths=widths,  # of something, and something else
    )


def test_the_reference_reads_any_signature():
    from scripts import make_config_reference

    assert make_config_reference.stage_rows(longer_stage) == [
        ("nnet.stages[i].dim", "", "width"),
        ("nnet.stages[i].activation", '"gelu"', "gelu or silu"),
        ("nnet.stages[i].widths", "(1, 2)", "of something, and something else"),
    ]


def test_short_forms_of_a_branch_take_its_other_settings():
    assert common.transformer(96, 5, num_heads=4, mlp_ratio=3.0).mlp_ratio == 3.0
    assert common.convnext(24, 3, mlp_ratio=3.0, kernel_size=5).to_dict() == {
        **common.stage("ConvNeXtBlock", 24, 3).to_dict(),
        "mlp_ratio": 3.0,
        "kernel_size": 5,
    }


def test_links_lead_somewhere():
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert paper["year"] == 2024 and paper["identifiers"][0]["value"] == "arXiv:2406.09416"
    assert [author["family-names"] for author in paper["authors"]] == ["Liu", "Zeng", "He", "Yu", "Shen", "Chen"]


def test_the_method_is_drawn_from_the_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "scripts/draw_network.py", "--config=configs/digit_pairs.py", f"--out={tmp_path / 'n.png'}"],
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0 and (tmp_path / "n.png").stat().st_size > 10_000


def test_the_table_of_the_method_is_the_configs():
    rows = re.findall(r"^\| ([\w ]+) \| (.+) \|$", (ROOT / "docs/method.md").read_text(), re.M)
    table = {name: cells.split(" | ") for name, cells in rows}
    names = ("DiMR-XL-2R_imagenet256", "DiMR-XL-3R_imagenet512", "DiMR-M-3R_imagenet64")
    for i, name in enumerate(names):
        config = utils.load_config(ROOT / "configs" / f"{name}.py")
        specs = utils.build_stages(config)
        assert table["network sees"][i] == "x".join(map(str, config.z_shape))
        assert table["grids of the branches"][i] == ", ".join(f"{s.max_height}x{s.max_width}" for s in specs)
        assert table["widths"][i] == ", ".join(str(s.dim) for s in specs)
        assert table["blocks"][i] == ", ".join(str(s.depth) for s in specs)


def test_a_block_and_a_norm_are_added_as_contributing_says(monkeypatch):
    """One class each, entered in the table; on tokens and on the grid."""

    class Mixer(nn.Module):
        on_tokens = True

        def __init__(self, spec, norm):
            super().__init__()
            self.norm, self.linear = norm(spec.dim), nn.Linear(spec.dim, spec.dim)

        def forward(self, x, t):
            return x + self.linear(self.norm(x, t))

    class Centred(nn.Module):
        def __init__(self, dim):
            super().__init__()

        def forward(self, x, t):
            return x - x.mean(-1, keepdim=True)

    monkeypatch.setitem(dimr.BLOCKS, "Mixer", Mixer)
    monkeypatch.setitem(norms.NORMS, "Centred", Centred)
    config = utils.load_config(ROOT / "configs/digit_pairs.py")
    config.nnet.norm_type = "Centred"
    for stage in config.nnet.stages:
        stage.block_type, stage.dim, stage.depth = "Mixer", 16, 3
    nnet = utils.build_network(config)
    shapes = [tuple(o.shape) for o in nnet(torch.randn(2, 4, 8, 16), torch.zeros(2), torch.tensor([3, 10]))]
    assert shapes == [(2, 4, 4, 8), (2, 4, 8, 16)]


# --- Type hints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_functions_have_type_hints(path):
    """Of every argument and result; constructors' results aside."""
    lacking = []
    for scope in ast.walk(ast.parse(path.read_text())):
        if not isinstance(scope, ast.Module | ast.ClassDef) or scope.__dict__.get("name", "").startswith("_"):
            continue
        for function in scope.body:
            if not isinstance(function, ast.FunctionDef) or function.name.startswith("_") != (
                function.name in ("__init__", "__call__")
            ):
                continue
            given = function.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            lacking += [
                f"{function.name}({a.arg})" for a in arguments if not a.annotation and a.arg not in ("self", "cls")
            ]
            if function.returns is None and function.name != "__init__":
                lacking.append(f"{function.name} -> ?")
    assert not lacking
