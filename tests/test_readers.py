"""Training on pixels and extraction read in processes: in a small /dev/shm, killed, and at unreadable images."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load_config, overrides, run
from PIL import Image
from test_train import losses, wait_for_step

import train as training
from libs import UserError
from libs.data import StepBatches
from libs.images import ImageTree, UnreadableImage
from libs.train_state import read_checkpoint
from scripts import check_images

# --- A small /dev/shm -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """600 JPEGs of 256 x 256 in two classes: batches of 64 are 12.6 MB."""
    folder = tmp_path_factory.mktemp("jpegs")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    for i in range(600):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        image.save(folder / "ab"[i % 2] / f"{i}.jpg", quality=50)
    return folder


READ_ALL = """if True:
    import sys
    from functools import partial
    from libs.data import StepBatches, make_loader, read_ahead
    from libs.images import ImageDataset, ImageTree, batch_ranges, read_range
    if sys.argv[2] == "train":
        results = make_loader(ImageDataset(sys.argv[1], 256), StepBatches(600, 60, 0), 4, pin_memory=False)
    else:
        read = partial(read_range, ImageTree(sys.argv[1]), 256)
        results = read_ahead(read, batch_ranges(0, 600, 60), 4, by_processes=True, depth=2)
    for _ in range(10):
        assert next(results)[0].shape == (60, 3, 256, 256)
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "extract"])
def test_a_small_dev_shm_is_enough(jpegs, program):
    """Docker's 64 MB. What the programs do with the images is left out, which would take minutes."""
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small /dev/shm")
    command = ["unshare", "-m", "sh", "-c", f'{mount}; exec "$@"', "sh", sys.executable, "-c", READ_ALL, jpegs, program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# --- Training on pixels -----------------------------------------------------------------------------------------------


def pixel_config(images, n_classes=3, side=16):
    config = load_config("DiMR-M-3R_imagenet64")
    config.z_shape = (3, side, side)
    for stage in config.nnet.stages:
        stage.dim, stage.depth, stage.num_heads = 8, 3, 2
    config.dataset.update(path=str(images), n_classes=n_classes, num_workers=1)
    config.train.update(n_steps=12, batch_size=8, log_interval=1, eval_interval=0, save_interval=0, grid=(2, 5))
    config.sample.grid_steps = 3
    return config


def pixel_flags(config) -> list[str]:
    flags = [
        flag.replace("configs/digits_released.py", "configs/DiMR-M-3R_imagenet64.py") for flag in overrides(config)
    ]
    flags += [f"--config.nnet.stages[{i}].num_heads=2" for i in range(3)]
    return [*flags, f"--config.z_shape={tuple(config.z_shape)}", "--config.dataset.num_workers=1"]


@pytest.fixture
def damaged(tiny_images, tmp_path):
    """A copy of the 60 pictures, and one of them that is none: needed after 3 steps, by the second process of two."""
    folder = shutil.copytree(tiny_images, tmp_path / "images")
    tree, steps = ImageTree(folder), iter(StepBatches(120, 8, pixel_config(folder).seed))
    seen = {record // 2 for _ in range(3) for record in next(steps)}
    picture = Path(tree.path(next(record // 2 for record in next(steps)[4:] if record // 2 not in seen)))
    picture.write_bytes(b"no picture")
    return folder, picture


def test_training_saves_before_it_ends_at_an_unreadable_image(damaged, tmp_path):
    folder, picture = damaged
    config = pixel_config(folder)
    with pytest.raises(UnreadableImage, match=rf"{picture}: cannot identify .*: replace it and re-run to resume"):
        training.train(config, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "ckpts").iterdir()] == ["3.ckpt"]
    assert len(losses(tmp_path / "run")) == 3
    Image.new("RGB", (16, 16)).save(picture)
    assert training.train(config, tmp_path / "run") == 0
    assert len(losses(tmp_path / "run")) == 12


@pytest.mark.slow
def test_one_process_of_two_meets_the_image_and_both_end_in_one_line(damaged, tmp_path):
    folder, picture = damaged
    flags = pixel_flags(pixel_config(folder))
    done = run("train.py", *flags, f"--workdir={tmp_path / 'run'}", processes=2, timeout=120)
    assert done.returncode == 1 and f"error: {picture}: cannot identify" in done.stderr
    assert "is gone" not in done.stderr and 'train.py", line' not in done.stderr
    assert [p.name for p in (tmp_path / "run" / "ckpts").iterdir()] == ["3.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_reader_killed_while_training_is_one_line(tiny_images, tmp_path, processes):
    config = pixel_config(tiny_images)
    config.train.n_steps = 100_000
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"] if processes > 1 else []
    command = [sys.executable, *launcher, "train.py", *pixel_flags(config), f"--workdir={tmp_path}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 3)
    trainer = started.pid if processes == 1 else children(started.pid)[-1]
    os.kill(children(trainer)[-1], signal.SIGKILL)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 1 and "error: a reading process ended (killed? out of memory?)" in said
    assert len(list((tmp_path / "ckpts").iterdir())) == 1


def children(pid: int) -> list[int]:
    return sorted(int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
@pytest.mark.slow
def test_a_signal_to_all_processes_saves(tiny_images, tmp_path, number):
    """As a terminal's Ctrl+C, its end, and Slurm send it."""
    config = pixel_config(tiny_images)
    config.train.n_steps = 100_000
    command = [sys.executable, "train.py", *pixel_flags(config), f"--workdir={tmp_path}"]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_step(tmp_path, 3)
    os.killpg(started.pid, number)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 75 and "Traceback" not in said and "error:" not in said
    assert [f"{int((tmp_path / 'requeue').read_text())}.ckpt"] == [p.name for p in (tmp_path / "ckpts").iterdir()]


def test_images_are_checked_beforehand_and_left_out(damaged, tmp_path, capsys):
    (folder, picture), out = damaged, tmp_path / "unreadable.txt"
    name = picture.relative_to(folder).as_posix()
    with pytest.raises(SystemExit, match="replace these images, or list them by --out"):
        check_images.main([f"--images={folder}", "--workers=1"])
    assert "1 of 60 images cannot be read\n" in capsys.readouterr().out
    check_images.main([f"--images={folder}", f"--out={out}", "--workers=1"])
    assert out.read_text() == f"{name}\n"
    config = pixel_config(folder)
    config.train.n_steps = 4
    config.dataset.leave_out = str(out)
    assert training.train(config, tmp_path / "run") == 0
    (saved,) = (tmp_path / "run" / "ckpts").iterdir()
    data = read_checkpoint(saved)[0]["data"]
    assert data["n_records"] == 118 and data["sha256"] == ImageTree(folder, [name]).digest
    assert data["sha256"] != ImageTree(folder).digest
    out.write_text("class1/none.png\n")
    with pytest.raises(UserError, match=r"does not hold class1/none\.png, which is to be left out"):
        training.train(config, tmp_path / "other")
    for file in (folder / "class1").iterdir():
        file.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"1 of the 3 class folders in .* are empty \(class1, \.\.\.\)"):
        check_images.main([f"--images={folder}", f"--out={out}", "--workers=0"])


def test_a_pixel_model_with_leftovers_of_a_latent_one(tiny_latents, tiny_images, tmp_path):
    config = pixel_config(tiny_latents)
    with pytest.raises(UserError, match=r"holds latents: set config\.autoencoder\.pretrained_path, or a folder"):
        training.train(config, tmp_path / "run")
    config = pixel_config(tiny_images)
    config.z_shape = (4, 16, 16)
    with pytest.raises(UserError, match=r"pixels have 3 channels, config\.z_shape has 4"):
        training.train(config, tmp_path / "run")
    config = pixel_config(tiny_images)
    config.autoencoder.pretrained_path = "leftover.pth"
    with pytest.raises(UserError, match=r"No autoencoder at leftover\.pth"):
        training.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
