"""The diffusers pipeline: eval.py's pixels, loaded in a fresh process without network, and diffusers' own solvers."""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image
from safetensors.torch import save_file

import eval as evaluation
import sde
from libs.class_names import class_label
from libs.model import build_network, config_json, imagenet_names, read_network
from libs.pipeline import DiMRPipeline
from scripts import convert_checkpoint as converting


@pytest.fixture
def weights(tiny_config, tmp_path):
    """A tiny model with its config inside."""
    torch.manual_seed(5)
    tiny_config.sample.update(n_samples=9, mini_batch_size=9)
    save_weights(tiny_config, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def save_weights(config, path):
    """Random weights, large enough that the class shows in the pictures."""
    state = {name: t + 0.2 * torch.randn(t.shape) for name, t in build_network(config).state_dict().items()}
    save_file(state, path, {"config": json.dumps(config_json(config))})


def pipeline_of(weights):
    return converting.build_pipeline(*read_network(weights))


@pytest.fixture
def pipe(weights):
    pipe = pipeline_of(weights)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def evaluated(config, weights, folder):
    evaluation.evaluate(config, str(weights), folder)
    return np.stack([np.asarray(Image.open(folder / f"{i}.png")) for i in range(9)])


LOADER = """
import sys, numpy
from libs.pipeline import DiMRPipeline
pipe = DiMRPipeline.from_pretrained(sys.argv[1])
numpy.save(sys.argv[2], numpy.stack(pipe(class_labels=[0, 0, 0, "1", 1, 1, 2, "2", 2], seed=1234).images))
"""


@pytest.mark.slow
def test_a_saved_pipeline_gives_the_pixels_of_eval_in_a_fresh_process_offline(tiny_config, weights, pipe, tmp_path):
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
        (
            "DPMSolverMultistepScheduler",
            {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"},
            1e-3,
            2e-3,
        ),
        ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}, 0.0, 2e-2),
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

    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    found = pipe.step_by_step(noise_model, noise.clone(), 900, torch.Generator().manual_seed(0))
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
        ("DDIMScheduler", {"prediction_type": "sample"}, "prediction_type is sample, not epsilon"),
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


def test_decoding_leaves_the_autoencoder_on_its_device(pipe, monkeypatch):
    """On meta, which stands for a GPU; wrapped without saying so, it would be taken to the CPU."""
    taken_to = []
    monkeypatch.setattr("libs.pipeline.Autoencoder", lambda vae, device="cpu": taken_to.append(torch.device(device)))
    pipe.vae = pipe.vae.to("meta")
    with pytest.raises(AttributeError):
        pipe.decode(torch.zeros(1, 4, 8, 8))
    assert taken_to == [torch.device("meta")]


def test_a_saved_pipeline_keeps_what_its_weights_were_trained_with(pipe, tiny_config, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    DiMRPipeline.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert config_json(read_network(tmp_path / "again")[2]) == config_json(tiny_config)


def test_every_evaluation_is_counted_on_the_progress_bar(pipe, capfd):
    pipe.set_progress_bar_config(disable=False)
    pipe([1], num_inference_steps=7)
    assert "7/7" in capfd.readouterr().err


def test_a_model_without_classes_needs_no_label(tiny_config, tmp_path):
    tiny_config.dataset.n_classes, tiny_config.sample.scale = 0, 1.0
    save_weights(tiny_config, tmp_path / "a.safetensors")
    pipe = pipeline_of(tmp_path / "a.safetensors")
    assert len(pipe().images) == 1 and len(pipe([0] * 3).images) == 3


def test_labels_by_number_and_by_name(pipe):
    names = imagenet_names()
    assert [class_label(word, names) for word in (207, "207", "golden retriever", " Golden Retriever")] == [207] * 4
    assert names[0] == "tench" and names[999] == "toilet tissue" and len(set(names)) == 1000
    assert pipe.names == ["0", "1", "2"] and class_label(3, pipe.names) == 3
    assert pipe(np.int64(1), output_type="np").images.shape[0] == 1
    with pytest.raises(ValueError, match=r"no class is called 'retriever'; there are .*golden retriever"):
        class_label("retriever", names)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"class_labels": [4]}, r"class labels are 0..3 \(3: no class\); found 4"),
        ({"class_labels": [1.7]}, r"class labels are 0..3 \(3: no class\); found 1.7"),
        ({}, "class_labels is not set: this model has 3 classes"),
        ({"class_labels": [0, 1], "indices": [3]}, "indices must be one per label; found 1 for 2"),
        ({"class_labels": 0, "output_type": "jpg"}, "output_type must be pil, np, pt or latent; found 'jpg'"),
        ({"class_labels": 0, "num_inference_steps": 2}, "num_inference_steps must be at least 3 for dpm_solver"),
        ({"class_labels": 0, "guidance_scale": 0.4}, "the guidance scale must be at least 1"),
    ],
)
def test_calls_that_cannot_work(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call)
