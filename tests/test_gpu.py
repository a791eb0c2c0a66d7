"""What only a GPU can show. Skipped without one."""

import pytest
import torch
from conftest import overrides, run
from test_network import inputs, small_model
from test_train import losses

import sde
from libs.compilation import compile_network
from libs.optim import EMA, clip_or_skip, make_adamw
from libs.randomness import step_draws

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch):
    """cuDNN's convolutions take TensorFloat-32, of 10 bits, unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("how", ["off", "blocks"])
def test_faster_forms_have_the_references_gradients(how):
    arguments, gradients = [tensor.cuda() for tensor in inputs()], []
    for model in (small_model().cuda(), small_model().cuda()):
        if gradients:
            compile_network(model, how)
        sum(output.square().mean() for output in model(*arguments)).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_outputs_are_the_cpus():
    model = small_model()
    expected = model(*inputs())
    outputs = model.cuda()(*(tensor.cuda() for tensor in inputs()))
    for ours, cpu in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), cpu, rtol=1e-4, atol=1e-4)


def test_a_training_step_never_waits_for_the_device():
    model, schedule = small_model().cuda(), sde.DiscreteSchedule()
    optimizer, ema = make_adamw(model, 1e-3, (0.9, 0.99), 0.03), EMA(model, 0.99)
    skipped, y = torch.zeros(2, device="cuda"), torch.arange(3, device="cuda")

    def step(k):
        draws = step_draws(0, k, 3, (4, 8, 8), "cuda")
        t = schedule.times(draws.uniform_time)
        with torch.autocast("cuda", torch.bfloat16):
            predictions = model(schedule.add_noise(draws.latent_noise, draws.eps, t), schedule.network_time(t), y)
        sde.multi_resolution_loss(predictions, draws.eps, (0.25, 1.0)).mean().backward()
        clip_or_skip(optimizer, 1.0, skipped)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(k + 1)

    step(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(model.stages[0].skips[0].weight).all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_programs_as_they_are_on_a_gpu(tiny_config, tmp_path, precision):
    """Translated by the compiler, in 16 bits, with heads that it pads; the losses are those of float32 without."""
    tiny_config.nnet.stages[0].dim = 40  # heads of 10
    flags = overrides(tiny_config)
    for name, how, mixed in (("plain", "off", "no"), ("usual", "auto", precision)):
        workdir = [f"--workdir={tmp_path / name}", f"--config.train.compile={how}"]
        done = run("train.py", *flags, *workdir, env={"ACCELERATE_MIXED_PRECISION": mixed}, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "usual") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)
    for name, how in (("blocks", "blocks"), ("again", "blocks")):
        chosen = [f"--nnet_path={tmp_path / 'usual/ckpts/6.ckpt'}", f"--config.sample.compile={how}"]
        # Each process compiles for itself, as those of several machines do.
        env = {"ACCELERATE_MIXED_PRECISION": precision, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache_{name}")}
        done = run("eval.py", *flags, *chosen, f"--IMGsave_path={tmp_path / name}", env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(list((tmp_path / name).glob("*.png"))) == 12
    for image in (tmp_path / "blocks").glob("*.png"):
        assert image.read_bytes() == (tmp_path / "again" / image.name).read_bytes()
