"""The diffusers pipeline: eval.py's pixels, loaded in a fresh process without network, and diffusers' own solvers."""

import os
import subprocess
import sys
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, run, save_weights
from PIL import Image

import eval as evaluation
import libs.norms
import sde
from libs.checkpoint import find_weights
from libs.model import config_json, read_network
from libs.pipeline import DiMRPipeline, check_scheduler
from libs.scheduler import SolverScheduler
from scripts import convert_checkpoint as converting


def pipeline_of(weights):
    return converting.build_pipeline(*read_network(weights))


@pytest.fixture
def pipe(weights):
    pipe = pipeline_of(weights)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def evaluated(config, weights, folder):
    config.sample.mini_batch_size = 9  # all together, as the pipeline makes them
    evaluation.evaluate(config, str(weights), folder)
    return np.stack([np.asarray(Image.open(folder / f"{i}.png")) for i in range(9)])


LOADER = """
import sys, numpy
from libs.pipeline import DiMRPipeline
pipe = DiMRPipeline.from_pretrained(sys.argv[1])
numpy.save(sys.argv[2], numpy.stack(pipe(class_labels=[0, 0, 0, "1", 1, 1, 2, "2", 2], seed=1234).images))
"""


@pytest.mark.slow
def test_a_saved_pipeline_gives_the_pixels_of_eval_in_a_fresh_process_offline(tiny_config, weights, tmp_path):
    expected = evaluated(tiny_config, weights, tmp_path / "images")
    assert len(np.unique(expected.reshape(9, -1), axis=0)) == 9
    converting.convert(str(weights), tmp_path / "pipeline")
    done = run("-c", LOADER, tmp_path / "pipeline", tmp_path / "a.npy", env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "a.npy"), expected)
    from_folder = evaluated(tiny_config, tmp_path / "pipeline", tmp_path / "again")  # eval.py takes the folder too
    assert np.array_equal(from_folder, expected)
    pipe.save_pretrained(tmp_path / "saved")
    again = DiMRPipeline.from_pretrained(tmp_path / "saved")
    assert all(
        torch.equal(a, b) for a, b in zip(again.transformer.parameters(), pipe.transformer.parameters(), strict=True)
    )


@pytest.mark.parametrize("algorithm", ["ddpm", "euler_maruyama_sde"])
def test_other_settings_of_the_config_are_kept(tiny_config, weights, tmp_path, algorithm):
    """Noise drawn on the way, another schedule, an interval, pixels without an autoencoder."""
    continuous = algorithm.startswith("euler")
    tiny_config.sample.update(algorithm=algorithm, scale=1.7, scale_pow=None, interval=(0.1, 4.0))
    tiny_config.schedule = "vpsde" if continuous else "sd"
    if continuous:
        tiny_config.autoencoder.pretrained_path, tiny_config.z_shape = "", (3, 8, 8)
    torch.manual_seed(6)
    save_weights(tiny_config, weights)
    expected = evaluated(tiny_config, weights, tmp_path / "images")
    converting.convert(str(weights), tmp_path / "pipeline")
    pipe = DiMRPipeline.from_pretrained(tmp_path / "pipeline")
    assert (pipe.vae is None) == continuous
    images = pipe([0] * 3 + [1] * 3 + [2] * 3, seed=1234).images
    assert np.array_equal(np.stack(images), expected)
    if continuous:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match="DDIMScheduler: the network's schedule is vpsde, of continuous times"):
            pipe([0])


def test_a_call_overrides_what_is_saved(pipe):
    """Indices, guidance, steps and generators in place of the saved ones."""
    call = {"seed": 4, "indices": [7, 3], "guidance_scale": 1.0, "num_inference_steps": 6, "output_type": "pt"}
    some = pipe([1, 2], **call).images
    turned = pipe([2, 1], **(call | {"indices": [3, 7]})).images
    assert (some - turned.flip(0)).abs().max() <= 1.01 / 255  # a row's arithmetic may depend on its place
    for other in ({"guidance_scale": 3.0}, {"num_inference_steps": 5}, {"seed": 5}):
        assert not torch.equal(pipe([1, 2], **(call | other)).images, some)
    unguided = call | {"guidance_scale": 3.0, "guidance_interval": (1e4, 1e5)}  # noise levels that are not reached
    assert (pipe([1, 2], **unguided).images - some).abs().max() <= 1.01 / 255
    constant = pipe([1, 2], **(call | {"guidance_scale": 3.0, "guidance_power": 0})).images
    assert not torch.equal(constant, pipe([1, 2], **(call | {"guidance_scale": 3.0})).images)
    drawn = [pipe([1, 2], generator=torch.Generator().manual_seed(s), output_type="np").images for s in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    assert drawn[0].shape == (2, 16, 16, 3) and drawn[0].min() >= 0 and drawn[0].max() <= 1
    assert drawn[0].dtype == np.float32


@pytest.mark.parametrize(
    ("name", "settings", "end", "bound"),
    [
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, 1e-3, 2e-3),
        ("EulerDiscreteScheduler", {}, 0.0, 2e-2),
    ],
)
def test_schedulers_of_diffusers_reach_the_exact_solution(pipe, name, settings, end, bound):
    """For Gaussian data the end point is known. A time grid one index off misses it far more than the bounds.

    In place of the network: the exact noise prediction for data of mean 0.3 and deviation 1/2.
    """
    schedule = sde.get_schedule("sd")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def alpha_sigma(t):
        t = torch.tensor(t, dtype=torch.float64)
        return (schedule.alpha(t), schedule.sigma(t)) if t > 0 else (torch.tensor(1.0), torch.tensor(0.0))

    def noise_model(x, t):
        alpha, sigma = alpha_sigma(t)
        return (x - alpha * 0.3) * sigma / (sigma**2 + alpha**2 / 4)

    settings = {"timestep_spacing": "linspace", **settings}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    model = sde.DiffusionModel(noise_model, sde.DiscreteSchedule())
    found = pipe.step_by_step(model, noise.clone(), 900, torch.Generator().manual_seed(0))
    (alpha_1, sigma_1), (alpha_0, sigma_0) = alpha_sigma(1.0), alpha_sigma(end)
    deviations = ((sigma_0**2 + alpha_0**2 / 4) / (sigma_1**2 + alpha_1**2 / 4)).sqrt()
    assert (found - (alpha_0 * 0.3 + (noise - alpha_1 * 0.3) * deviations)).abs().max() < bound


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("DPMSolverSinglestepScheduler", {}),  # has an attribute `sample`, which is None
        ("UniPCMultistepScheduler", {}),
    ],
)
def test_schedulers_of_diffusers_end_where_ours_does(pipe, name, settings):
    """With the same guidance: its power and its interval depend on the time."""
    call = {"seed": 1, "num_inference_steps": 60, "output_type": "latent"}
    call |= {"guidance_power": 2.0, "guidance_interval": (0.3, 3.0)}
    own = pipe([0, 1], **call).images
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    theirs = pipe([0, 1], **call).images
    assert (own - theirs).abs().mean() < 0.05 * own.std()


def test_a_scheduler_that_draws_noise_is_seeded(pipe):
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    call = {"seed": 1, "num_inference_steps": 4, "output_type": "pt"}
    assert torch.equal(pipe([0, 1], **call).images, pipe([0, 1], **call).images)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("DDIMScheduler", {"beta_start": 0.0001}, "it has another noise schedule"),
        ("DDIMScheduler", {"trained_betas": [0.01] * 1000}, "it has another noise schedule"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "it has another noise schedule"),
        ("DDIMScheduler", {"clip_sample": True}, "it clips samples"),
        (
            "DDIMScheduler",
            {"prediction_type": "flow"},
            "prediction_type is flow, none of epsilon",
        ),
        ("EDMEulerScheduler", {}, "it has no discrete noise schedule"),
        ("FlowMatchEulerDiscreteScheduler", {}, "it has no discrete noise schedule"),
        ("DDIMInverseScheduler", {}, "goes from images to noise"),
    ],
)
def test_schedulers_of_another_process_are_refused(pipe, name, settings, message):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    with pytest.raises(ValueError, match=f"{name}.* {message}"):
        pipe([0], num_inference_steps=4)


def test_another_autoencoder_is_used(pipe):
    before = pipe([1], output_type="pt").images
    other = diffusers.AutoencoderKL.from_config(pipe.vae.config)
    pipe.vae = other
    assert not torch.equal(pipe([1], output_type="pt").images, before)


def test_decoding_is_where_the_weights_are_in_their_precision(pipe):
    """On meta, which stands for a GPU; in float16, which stays."""
    pipe.vae = pipe.vae.to("meta", torch.float16)
    images = pipe.decode(torch.zeros(17, 4, 8, 8))
    assert images.device == torch.device("meta") and images.dtype == torch.float32 and images.shape == (17, 3, 16, 16)
    assert {weight.dtype for weight in pipe.vae.parameters()} == {torch.float16}


def test_offloaded_weights_give_the_same_pictures(pipe):
    """Between its calls each module's weights are on meta: whoever reads them past the module fails."""
    before = pipe([1, 2], output_type="np").images
    for part in (pipe.transformer, pipe.vae):
        accelerate.cpu_offload(part, "cpu")
    assert {weight.device.type for weight in pipe.transformer.parameters()} == {"meta"}
    assert np.array_equal(pipe([1, 2], output_type="np").images, before)
    modules = {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert set(pipe.model_cpu_offload_seq.split("->")) == modules


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_weights(pipe, tmp_path, dtype):
    """Norms and time-dependent vectors are float32, also in arithmetic where someone has cast them."""
    expected = pipe([1, 2], output_type="np").images
    pipe.save_pretrained(tmp_path)
    half = DiMRPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    for name, weight in half.transformer.named_parameters():
        assert weight.dtype == (torch.float32 if "norm" in name else dtype), name
    assert half.transformer.dtype == half.vae.dtype == dtype
    for _ in range(2):
        assert np.abs(half([1, 2], output_type="np").images - expected).mean() < 0.02
        half.to(dtype=dtype)
    vector = libs.norms.TimeDependentVector(4, 0.3).to(dtype)
    assert vector(torch.rand(2)).dtype == torch.float32
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn)
    assert np.abs(pipe([1, 2], output_type="np").images - expected).mean() < 0.2


def test_what_cannot_be_decoded_is_refused_before_anything_is_computed(pipe, monkeypatch):
    latents = pipe([1], output_type="latent").images
    vae, pipe.vae = pipe.vae, None
    assert torch.equal(pipe([1], output_type="latent").images, latents)
    monkeypatch.setattr(type(pipe.transformer), "forward", None)
    with pytest.raises(ValueError, match=r"vae must decode 4 channels; found none: set one, or output_type='latent'"):
        pipe([1])
    for changes, message in (
        ({"latent_channels": 8}, "vae must decode 4 channels; found AutoencoderKL of 8 channels"),
        ({"shift_factor": 0.1}, "vae must normalize by one scaling_factor"),
        ({"scaling_factor": 0}, "vae must normalize by one scaling_factor"),
    ):
        pipe.vae = diffusers.AutoencoderKL.from_config({**vae.config, **changes})
        with pytest.raises(ValueError, match=message):
            pipe([1])


def test_the_network_as_a_model_of_diffusers(pipe):
    """Its output class, and gradients with activation checkpointing, switched on and off again."""
    network, x = pipe.transformer.requires_grad_(True), torch.randn(2, 4, 8, 8)
    inputs, gradients = (x, torch.rand(2), torch.tensor([0, 3])), []
    assert torch.equal(network(*inputs).sample, network(*inputs, return_dict=False)[0])
    for switch in (None, network.enable_gradient_checkpointing, network.disable_gradient_checkpointing):
        if switch:
            switch()
            assert network.is_gradient_checkpointing == (switch == network.enable_gradient_checkpointing)
        network.zero_grad()
        network(*inputs).sample.square().mean().backward()
        gradients.append([weight.grad for weight in network.parameters() if weight.grad is not None])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


def test_a_saved_pipeline_keeps_what_its_weights_were_trained_with_but_no_places(pipe, tiny_config, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    DiMRPipeline.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    texts = [path.read_text() for path in (tmp_path / "again").rglob("*.json")]
    assert len(texts) == 4 and not any(str(tmp_path.parent.parent) in text for text in texts)
    kept = config_json(read_network(tmp_path / "again")[2])
    for section, name in (("dataset", "path"), ("autoencoder", "pretrained_path")):
        tiny_config[section][name] = Path(tiny_config[section][name]).name
    assert kept == config_json(tiny_config)
    tiny_config.dataset.path = str(ROOT / "assets" / "digits")
    assert config_json(tiny_config)["dataset"]["path"] == "assets/digits"


@pytest.mark.parametrize(
    ("positional", "settings", "file"),
    [
        ((), {}, "safetensors"),
        ((False,), {}, "bin"),
        ((), {"variant": "fp16"}, "fp16.safetensors"),
        ((False,), {"variant": "fp16"}, "fp16.bin"),
        ((), {"max_shard_size": "40KB"}, "safetensors.index.json"),
        ((), {"max_shard_size": "40KB", "variant": "fp16"}, "safetensors.index.fp16.json"),
    ],
)
def test_every_form_that_is_saved_is_read_again(pipe, tmp_path, positional, settings, file):
    pipe.save_pretrained(tmp_path, *positional, **settings)
    assert find_weights(tmp_path).name == f"diffusion_pytorch_model.{file}"
    state = read_network(tmp_path)[1]
    assert all(torch.equal(state[name], weight) for name, weight in pipe.transformer.state_dict().items())
    again = DiMRPipeline.from_pretrained(tmp_path, variant=settings.get("variant"))
    assert all(torch.equal(state[name], weight) for name, weight in again.transformer.state_dict().items())


def test_code_in_the_folder_runs_only_where_it_is_trusted(pipe, tmp_path, monkeypatch):
    """The class at hand runs its own code. With trust the folder's is loaded, also where the class is imported."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    pipe.save_pretrained(tmp_path / "pipeline")
    call = {"class_labels": [1], "num_inference_steps": 4, "output_type": "np"}
    expected = pipe(**call).images
    trusted = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=True)
    assert type(trusted).__module__.startswith("diffusers_modules") and np.array_equal(trusted(**call).images, expected)
    for file in (tmp_path / "pipeline").rglob("*.py"):
        file.write_text("raise SystemExit")
    assert np.array_equal(DiMRPipeline.from_pretrained(tmp_path / "pipeline")(**call).images, expected)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline")


ELSEWHERE = """
import sys, numpy
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
numpy.save(sys.argv[2], numpy.stack(pipe([1, "2"], seed=3).images))
assert "libs" not in sys.modules and "sde" not in sys.modules
pipe.save_pretrained(sys.argv[1] + "-again")
"""


@pytest.mark.slow
def test_a_folder_needs_no_repository(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipeline")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "pipeline"), str(tmp_path / "a.npy")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.stack(pipe([1, "2"], seed=3).images))
    for file in (tmp_path / "pipeline").rglob("*.*"):
        assert (tmp_path / "pipeline-again" / file.relative_to(tmp_path / "pipeline")).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("algorithm", ["dpm_solver", "dpm_solver_3m", "ddpm", "heun"])
def test_the_scheduler_steps_as_its_solver_solves(tmp_path, algorithm):
    SolverScheduler(algorithm=algorithm).save_pretrained(tmp_path)
    scheduler = SolverScheduler.from_config(SolverScheduler.from_pretrained(tmp_path).config)
    assert scheduler.config.algorithm == algorithm
    noise, generator = torch.randn(2, 4, 8, 8), torch.Generator().manual_seed(7)

    def noise_model(x, t):
        return torch.tanh(x + t)

    expected = scheduler.solve(noise_model, noise, 9, lambda: torch.randn(noise.shape, generator=generator))
    scheduler.set_timesteps(9)
    for _ in range(2):  # the second time without set_timesteps
        x = noise
        generator.manual_seed(7)
        for k in scheduler.timesteps:
            eps = noise_model(scheduler.scale_model_input(x, k), (k.item() + 1) / 1000)
            x = scheduler.step(eps, k, x, generator=generator).prev_sample
        assert torch.allclose(x, expected, atol=1e-4)
    scheduler.step(eps, k, noise)
    with pytest.raises(ValueError, match="altered sample: use a scheduler of `compatibles`"):
        scheduler.step(eps, k, noise + 1)


def test_compatible_schedulers(pipe):
    """Those that diffusers lists are accepted, and back again."""
    names = {each.__name__ for each in pipe.scheduler.compatibles}
    assert {"DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"} <= names and len(names) > 10
    for each in pipe.scheduler.compatibles:
        if each.__name__ != "DPMSolverSDEScheduler":  # needs torchsde
            check_scheduler(each.from_config(pipe.scheduler.config), "sd")
    for ours in (pipe.scheduler, SolverScheduler()):
        back = SolverScheduler.from_config(diffusers.DDIMScheduler.from_config(ours.config).config).config
        assert {name: back.get(name) for name in ours.config} == dict(ours.config)
    pipe.scheduler = SolverScheduler("vpsde")
    with pytest.raises(ValueError, match="SolverScheduler: the network's schedule is sd"):
        pipe([0])


def test_every_evaluation_is_counted_on_the_progress_bar(pipe, capfd):
    pipe.set_progress_bar_config(disable=False)
    pipe([1], num_inference_steps=7)
    assert "7/7" in capfd.readouterr().err


def test_a_model_without_classes_needs_no_label(tiny_config, tmp_path):
    tiny_config.dataset.n_classes, tiny_config.sample.scale = 0, 1.0
    save_weights(tiny_config, tmp_path / "a.safetensors")
    pipe = pipeline_of(tmp_path / "a.safetensors")
    assert len(pipe().images) == 1 and len(pipe([0] * 3).images) == 3


def test_a_label_may_be_numpys(pipe):
    assert pipe(np.int64(1), output_type="np").images.shape[0] == 1
    assert pipe.labels == {"0": 0, "1": 1, "2": 2} and pipe.get_label_ids("2") == [2]
    assert pipe.get_label_ids(torch.tensor([[1], [2]])) == pipe.get_label_ids([[1], np.array([2])]) == [1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": [4]}, r"class labels are 0..3 \(3: no class\); found 4"),
        ({"class_labels": [1.7]}, r"class labels are 0..3 \(3: no class\); found 1.7"),
        ({}, "class_labels is not set: this model has 3 classes"),
        ({"class_labels": [None]}, r"class labels are 0..3 \(3: no class\); found None"),
        ({"class_labels": {1: 2}}, "class labels are 0..3"),
        ({"class_labels": [float("nan")]}, "class labels are 0..3"),
        ({"class_labels": []}, "the number of class_labels must be at least 1"),
        ({"class_labels": [0, 1], "indices": [3]}, r"indices must be one whole number .* per label \(2\); found \[3\]"),
        ({"class_labels": 0, "indices": "a"}, "indices must be one whole number of at least 0 per label"),
        ({"class_labels": 0, "seed": 1.5}, "seed must be a whole number in .*; found 1.5"),
        ({"class_labels": 0, "seed": -1}, "seed must be a whole number in .*; found -1"),
        ({"class_labels": 0, "generator": 3}, "generator must be a torch.Generator or a list of one per label"),
        ({"class_labels": [0] * 3, "generator": [torch.Generator()] * 2}, r"a list of one per label \(3\)"),
        ({"class_labels": 0, "guidance_scale": "2"}, "guidance_scale must be a number of at least 1 .*; found '2'"),
        ({"class_labels": 0, "guidance_power": -1}, "guidance_power must be a number of at least 0"),
        ({"class_labels": 0, "guidance_interval": 3}, r"guidance_interval must be \(low, high\)"),
        ({"class_labels": 0, "num_inference_steps": 2.5}, "num_inference_steps must be a whole number of at least 1"),
        ({"class_labels": 0, "output_type": "jpg"}, "output_type must be pil, np, pt or latent; found 'jpg'"),
        ({"class_labels": 0, "num_inference_steps": 2}, "num_inference_steps must be at least 3 for dpm_solver"),
        ({"class_labels": 0, "guidance_scale": 0.4}, "guidance_scale must be a number of at least 1"),
    ],
)
def test_calls_that_cannot_work(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)
