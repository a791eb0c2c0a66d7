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

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import utils
from configs import common
from libs import dimr, norms
from libs.model import build_network, build_network_on_meta, build_stages
from scripts import draw_network

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = [*ROOT.glob("*.py"), *(ROOT / "libs").glob("*.py"), *(ROOT / "scripts").glob("*.py")]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
COMMAND = re.compile(r"(\w+=\S+ +)*(python3?|accelerate launch|torchrun|bash|eval\.py) ")

# Every command of the documents runs in a test, in paths and sizes of its own, or needs what no test has.
TESTS = "".join(path.read_text() for path in [*ROOT.glob("tests/*.py"), ROOT / "docs/new_data.md"])
NOT_RUN = {
    "scripts/quickstart.sh": "installs and trains for minutes; it is the README's first command and is run by hand",
    "scripts/test.sh": "runs these tests",
    "scripts/first_losses.sh": "is run by hand before and after a change",
    "benchmarks/cpu.sh": "takes 20 minutes and 24 GB",
}
NEEDS = {
    "ImageNet": r"imagenet|IMAGENET|ImageNet",
    "released weights, or a user's": r"released|WEIGHTS|DiMR-(XL|G)_|VIRTUAL_|NAME|REF|FOLDER",
    "several GPUs": r"--multi_gpu|--config_file|--num_machines|--nproc_per_node",
}


def commands(text: str) -> list[str]:
    """Every command in a document: of code blocks, fenced or indented, and of `code` in sentences and tables."""
    text = text.replace("\\\n", " ")
    rest = FENCED.sub("", text)
    blocks = [block[2] for block in FENCED.finditer(text)]
    blocks += re.findall(r"(?:^    .*\n)+", rest, re.M) + re.findall(r"`([^`\n]+)`", rest)
    lines = [re.sub(r"\s+#.*", "", " ".join(line.split())) for block in blocks for line in block.splitlines()]
    return [line for line in lines if COMMAND.match(line)]


ALL_COMMANDS = sorted({command for path in DOCS for command in commands(path.read_text())})


def program(command: str) -> str:
    """The project's program that a command starts; "" if none."""
    found = re.search(r"[\w./]+\.(py|sh)\b", command)
    return found[0] if found else ""


def test_the_documents_have_commands():
    assert len(ALL_COMMANDS) > 30 and all(len(commands(path.read_text())) for path in DOCS[:2])


@pytest.mark.parametrize("command", [c for c in ALL_COMMANDS if program(c)])
def test_every_command_runs_in_a_test_or_cannot_and_its_flags_exist(command):
    name = program(command)
    assert (ROOT / name).is_file() and (name in NOT_RUN or re.search(rf"\b{Path(name).stem}\b", TESTS))
    if not name.startswith(("scripts", "benchmarks")) and "new_data" not in command:
        needs = [need for need, pattern in NEEDS.items() if re.search(pattern, command)]
        assert needs or "..." in command or "part0" in command or command == "python3 img2npz.py", command
    assert not unknown_flags(command), command


def unknown_flags(command: str) -> list[str]:
    """Those that the program of a command does not take: flags by its source, overrides by the config."""
    words = shlex.split(re.sub(r"[\[\]…|]", " ", command))
    source = (ROOT / program(command)).read_text()
    config = re.search(r"--config=(configs/[\w-]+\.py)", command)
    config = utils.load_config(ROOT / (config[1] if config and "NAME" not in config[1] else "configs/digits.py"))
    after = words[next(i for i, word in enumerate(words) if word.endswith(program(command))) + 1 :]
    fields, unknown = {"config.FIELD", *common.fields(config, "config.")}, []
    for name in [word[2:].split("=")[0] for word in after if word.startswith("--")]:
        if name.startswith("config."):
            known = "define_config_flag" in source and name in fields
        else:
            known = name == "config" or any(f'"{n}"' in source for n in (name, f"--{name}", f"--{name[3:]}"))
            known |= f" --{name} " in source and program(command).endswith(".sh")
        unknown += [] if known else [name]
    return unknown


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


def shell(script: str, folder: Path, **env: str) -> str:
    """Run a script in a folder by bash, stopping at the first error; return what it printed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **env}
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_guide_to_new_data_word_for_word(inception_assets, tmp_path):
    """Its commands in their order, in a fresh clone, with its own small settings; Inception's weights are random."""
    clone = tmp_path / "DiMR"
    unwanted = (".git", ".venv", "workdir", "wandb", "saved_images*", "__pycache__", "datasets")
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*unwanted))
    blocks = [block[2] for block in FENCED.finditer((ROOT / "docs/new_data.md").read_text()) if block[1] == "bash"]
    assert len(blocks) == 7
    shell("\n".join(blocks), clone, TORCH_HOME=str(inception_assets))

    made = clone / "workdir" / "new_data"
    assert Image.open(made / "pairs_images" / "3.png").size == (64, 32)
    assert Image.open(made / "crops_images" / "3.png").size == (64, 64)
    assert Image.open(made / "pairs_run" / "samples" / "2.png").size == (64 + 4, 10 * (32 + 2) + 2)
    assert (made / "crops_images" / "class_lab.txt").read_text() == "0\n" * 4
    assert (made / "pairs_images.npz").is_file()
    scores = json.loads((made / "pairs_images_report" / "metrics.json").read_text())
    assert scores["fid"] > 0


@pytest.mark.parametrize("name", ["digit_pairs", "photo_crops", *(p.stem for p in (ROOT / "configs").glob("DiMR*.py"))])
def test_a_config_is_short(name):
    path = ROOT / "configs" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 25
    build_network_on_meta(utils.load_config(path))


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
    texts, missing = texts_in_code(), []
    for message in messages:
        pattern = re.compile(".*?".join(re.escape(part.strip()) for part in message.split("…") if part.strip()), re.S)
        missing += [] if any(map(pattern.search, texts)) else [message]
    assert not missing


# --- Configs and links ------------------------------------------------------------------------------------------------


def test_short_forms_of_a_branch_take_its_other_settings():
    assert common.transformer(96, 5, num_heads=4, mlp_ratio=3.0).mlp_ratio == 3.0
    own = common.stage("ConvNeXtBlock", 24, 3, kernel_size=5, mlp_ratio=3.0)
    assert common.convnext(24, 3, mlp_ratio=3.0, kernel_size=5) == own


def test_links_lead_somewhere():
    for path in DOCS:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_method_is_drawn_from_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "--config=configs/digit_pairs.py", f"--out={tmp_path / 'n.png'}"])
    draw_network.main()
    assert (tmp_path / "n.png").stat().st_size > 10_000


def test_the_table_of_the_method_is_the_configs():
    rows = re.findall(r"^\| ([\w ]+) \| (.+) \|$", (ROOT / "docs/method.md").read_text(), re.M)
    table = {name: cells.split(" | ") for name, cells in rows}
    names = ("DiMR-XL-2R_imagenet256", "DiMR-XL-3R_imagenet512", "DiMR-M-3R_imagenet64")
    for i, name in enumerate(names):
        config = utils.load_config(ROOT / "configs" / f"{name}.py")
        specs = build_stages(config)
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
    nnet = build_network(config)
    shapes = [tuple(o.shape) for o in nnet(torch.randn(2, 4, 8, 16), torch.zeros(2), torch.tensor([3, 10]))]
    assert shapes == [(2, 4, 4, 8), (2, 4, 8, 16)]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_arguments_of_public_functions_have_type_hints(path):
    """Those of constructors and __call__ too; the linter's rule ANN201 sees to results."""
    tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    functions = [node for scope in (tree, *classes) for node in scope.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        if not function.name.startswith("_") or function.name in ("__init__", "__call__"):
            given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            lacking = [arg.arg for arg in given if not arg.annotation and arg.arg not in ("self", "cls")]
            assert not lacking, function.name
