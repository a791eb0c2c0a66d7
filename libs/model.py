"""From a config and weights to a model, and from a model to images.

    model = Model.open("workdir/quickstart/train/ckpts/2000.ckpt")  # a .pth needs its config
    sample = model.sampler(steps=50, scale=1.4)
    images, finite = sample(indices=range(4), labels=[2, 0, 7, 3])  # (4, 3, H, W) uint8

Image i is a function of (config.seed, i, its label) and, through rounding, of the batch it is made in.
"""

import contextlib
import json
import re
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from ml_collections import ConfigDict
from torch import Tensor
from torchvision.models import ResNet50_Weights

import sde
from libs import UserError
from libs.autoencoder import DTYPES, Autoencoder, finite, float_to_uint8, load_autoencoder
from libs.checkpoint import (
    PIPELINE_FILES,
    differences,
    find_weights,
    fitting_weights,
    flatten_dict,
    read_state_dict,
    saved_settings,
)
from libs.compilation import choose_compile, compile_network, round_weights
from libs.dimr import DiMR, StageSpec
from libs.normalization import check_same_autoencoder
from libs.randomness import SampleNoise, to_device
from libs.solvers import SOLVERS, check_guidance, check_steps

ROOT = Path(__file__).resolve().parents[1]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # accelerate's mixed_precision; "no" is float32

Sampler = Callable[[Sequence[int], Sequence[int]], tuple[Tensor, Tensor]]

# --- Configs ----------------------------------------------------------------------------------------------------------


def config_json(config: ConfigDict) -> dict:
    """Return a config as plain JSON values, paths in the repository from its root: saved, they go to other machines."""
    return json.loads(config.to_json_best_effort().replace(f'"{ROOT}/', '"'))


def config_from_json(values: dict) -> ConfigDict:
    """Return the config that `config_json` was given, locked: JSON's lists become tuples again."""

    def tuples(values: dict) -> dict:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    values = json.loads(json.dumps(values), object_hook=tuples)
    values["nnet"]["stages"] = tuple(ConfigDict(stage) for stage in values["nnet"]["stages"])
    return ConfigDict(values).lock()


def saved_config(weights: Path) -> ConfigDict | None:
    """Read the config that is saved with a weights file; None: none is. Raises UserError for a damaged one."""
    saved = saved_settings(weights)
    if saved is None:
        return None
    try:
        config = config_from_json(saved["config"])
        build_stages(config)
        network_settings(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the config saved with {weights} is damaged: {error}") from error
    return config


def network_settings(config: ConfigDict) -> dict:
    """Return what decides a network and the meaning of its output, as {name in the config: JSON value}."""
    values = config_json(config)
    return {
        **flatten_dict(values["nnet"], "nnet"),
        "schedule": values["schedule"],
        "prediction": values["prediction"],
        "z_shape": values["z_shape"],
        "dataset.n_classes": values["dataset"]["n_classes"],
    }


def network_differences(config: ConfigDict, weights: Path) -> dict[str, str]:
    """Return how the `network_settings` saved with a weights file differ from a config's; nothing if none are saved."""
    saved = saved_config(weights)
    return differences(network_settings(saved), network_settings(config)) if saved else {}


# --- Networks ---------------------------------------------------------------------------------------------------------


def build_stages(config: ConfigDict) -> list[StageSpec]:
    """Return the specs of the branches, coarsest first: patch sizes 2^(R-1), ..., 2, 1 and the grids that follow."""
    if len(config.z_shape) != 3:
        raise UserError(f"config.z_shape must be (channels, height, width); found {tuple(config.z_shape)}")
    _, height, width = config.z_shape
    specs, n_stages = [], len(config.nnet.stages)
    for r, stage in enumerate(config.nnet.stages):
        patch = 2 ** (n_stages - 1 - r)
        if height % patch or width % patch:
            raise UserError(f"config.z_shape must be divisible by 2^(stages - 1) = {patch}; found {height}x{width}")
        fields = {name: value for name, value in stage.items() if name != "mlp_ratio"}
        sizes = {"patch_size": patch, "max_height": height // patch, "max_width": width // patch}
        specs.append(StageSpec(**fields, **sizes, hidden_dim=round(stage.dim * stage.mlp_ratio)))
    return specs


def build_network(config: ConfigDict) -> DiMR:
    """Build the network of a config, initialized from torch's global generator."""
    return DiMR(
        build_stages(config),
        channels=config.z_shape[0],
        n_classes=config.dataset.n_classes,
        norm_type=config.nnet.norm_type,
        block_grad_to_lowres=config.nnet.block_grad_to_lowres,
    )


def build_network_on_meta(config: ConfigDict) -> DiMR:
    """Build the network without memory for its weights: to count, or to load into."""
    with torch.device("meta"):
        return build_network(config)


def build_empty_network(config: ConfigDict, device: torch.device | str) -> DiMR:
    """Build the network with memory for its weights but no values, which are loaded next."""
    return build_network_on_meta(config).to_empty(device=device)


def loss_weights(config: ConfigDict) -> tuple[float, ...]:
    """Return config.loss_coeffs, the weight of each resolution's loss, or the published weights where it is None."""
    n_stages = len(config.nnet.stages)
    weights = config.loss_coeffs or sde.default_loss_weights(n_stages, config.prediction)
    numbers = [weight for weight in weights if isinstance(weight, int | float) and 0 <= weight < float("inf")]
    if len(weights) != n_stages or len(numbers) != n_stages:
        raise UserError(f"config.loss_coeffs must be {n_stages} numbers of at least 0; found {tuple(weights)}")
    return tuple(map(float, weights))


def read_network(
    path: str | Path, config: ConfigDict | None = None
) -> tuple[DiMR, dict[str, Tensor], ConfigDict, Path]:
    """Read weights in any form, and find their config.

    Args:
        path: all that `find_weights` takes: .pth, .safetensors, checkpoint or pipeline folder, hf://OWNER/REPO/FILE.
        config: in place of the config saved with the weights. It must describe the same network.

    Returns:
        The network on the meta device, its state dict as stored, the config, and the file that was read.
    """
    file = find_weights(path)
    state = read_state_dict(file)
    if config is None:
        config = saved_config(file)
    elif different := network_differences(config, file):
        raise UserError(f"{file} was trained with another config ({'; '.join(different.values())}): give that config")
    if config is None:
        raise UserError(f"no config is saved with {file}: give the one it was trained with as --config")
    nnet = build_network_on_meta(config)
    return nnet, fitting_weights(nnet, state, str(file)), config, file


def open_autoencoder(
    config: ConfigDict, device: torch.device | str, recorded: dict | None = None
) -> Autoencoder | None:
    """Load the autoencoder of a latent model; None for a pixel model (config.autoencoder.pretrained_path is "").

    Args:
        recorded: the identity that the model was trained with, see `libs.normalization.read_latent_stats`.
    """
    path, autoencoder, expected = config.autoencoder.pretrained_path, None, "pixels have 3"
    if path:
        if not Path(path).exists() and (ROOT / path).exists():  # configs give paths from the repository's root
            path = ROOT / path
        stats = config.autoencoder.latent_stats
        if (ROOT / stats).is_file() and not Path(stats).exists():
            stats = ROOT / stats
        autoencoder = load_autoencoder(path, DTYPES[config.autoencoder.decode_dtype], device, stats, recorded)
        expected = f"{path} has {autoencoder.latent_channels}"
    if config.z_shape[0] != (autoencoder.latent_channels if autoencoder is not None else 3):
        raise UserError(
            f"{expected} channels, config.z_shape has {config.z_shape[0]}: set config.autoencoder.pretrained_path"
        )
    return autoencoder


def image_size(config: ConfigDict, autoencoder: Autoencoder | None) -> tuple[int, int]:
    """Return (H, W) in pixels of what is sampled."""
    _, height, width = config.z_shape
    factor = autoencoder.downsample if autoencoder is not None else 1
    return height * factor, width * factor


# --- Models -----------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """A network with everything that makes images of its output.

    Attributes:
        config: `sampler` reads config.seed, z_shape, schedule, prediction and sample.
        nnet: the network, on `device`.
        precision: as accelerate's mixed_precision: no, bf16 or fp16.
        guide: the guiding network, a model without autoencoder; None: the network guides itself.
        autoencoder: None for a pixel model.
        weights: the file that the network was read from.
        class_names: in the order of the labels.
    """

    config: ConfigDict
    nnet: DiMR
    device: torch.device
    precision: str = "no"
    guide: "Model | None" = None
    autoencoder: Autoencoder | None = None
    weights: Path | None = None
    class_names: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        path: str | Path,
        config: ConfigDict | None = None,
        device: torch.device | str = "cpu",
        precision: str = "no",
        compile: str = "off",
        autoencoder: str | None = None,
    ) -> "Model":
        """Open weights with their config, guiding network, autoencoder and class names.

        Args:
            path, config: of `read_network`.
            compile: as config.sample.compile. What auto stands for on the device is put into the model's config.
            autoencoder: file, folder or hub id, in place of config.autoencoder.pretrained_path. A pipeline whose own
                config is taken has its own.
        """
        model = cls.open_network(path, config, torch.device(device), precision, compile)
        vae = model.weights.parent.parent / "vae"
        if config is None and model.weights.match(PIPELINE_FILES) and vae.is_dir():
            model.config.autoencoder.update(pretrained_path=str(vae), latent_stats="")  # is in its config
        if autoencoder is not None:
            model.config.autoencoder.pretrained_path = autoencoder
        model.guide = open_guide(model.config, model.device, precision, compile)
        trained = (saved_settings(model.weights) or {}).get("autoencoder")
        model.autoencoder = open_autoencoder(model.config, model.device, trained)
        if trained:
            check_same_autoencoder(model.autoencoder and model.autoencoder.identity, trained, model.weights)
        model.class_names = class_names(model.config, model.weights)
        return model

    @classmethod
    def open_network(
        cls, path: str | Path, config: ConfigDict | None, device: torch.device, precision: str, compile: str
    ) -> "Model":
        """Open a network to sample with: in eval mode, its weights rounded to `precision`, compiled."""
        nnet, state, config, weights = read_network(path, config)
        nnet = nnet.to_empty(device=device).eval().requires_grad_(False)
        nnet.load_state_dict(state)
        config = config.copy_and_resolve_references()
        config.sample.compile = choose_compile(compile, device)
        round_weights(nnet, precision)
        compile_network(nnet, config.sample.compile, final_weights=True)
        return cls(config, nnet, device, precision, weights=weights)

    def to_images(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Decode samples (B, C, h, w): uint8 images (B, 3, H, W), and which of them were finite (B,)."""
        images = x if self.autoencoder is None else self.autoencoder.decode(x)
        return float_to_uint8(images), finite(images)

    def sampler(
        self,
        steps: int | None = None,
        scale: float | None = None,
        watch: Callable[[Tensor, float, Sequence[Tensor]], None] | None = None,
    ) -> Sampler:
        """Return sample(indices, labels), the one way from a network to images.

        It gives uint8 images (B, 3, H, W) and which of them were finite (B,), for `libs.autoencoder.check_finite`; both
        are on the device, for which a call does not wait. The null label is no class.

        Args:
            steps: NFE per image; None: config.sample.sample_steps.
            scale: guidance scale, 1: none; None: config.sample.scale.
            watch: called after each network evaluation with x_t (B, C, H, W), t and the guided outputs of the branches,
                coarsest first.
        """
        settings, null_label = self.config.sample, self.nnet.null_label
        steps = settings.sample_steps if steps is None else steps
        scale = settings.scale if scale is None else scale
        schedule, prediction = sde.get_schedule(self.config.schedule), self.config.prediction
        check_steps(settings.algorithm, steps, "steps")
        check_guidance(scale, settings.scale_pow, settings.interval)

        @torch.no_grad()
        def sample(indices: Sequence[int], labels: Sequence[int]) -> tuple[Tensor, Tensor]:
            if not all(0 <= label <= null_label for label in labels):  # a GPU would say so late, and end the process
                raise UserError(f"labels must be in 0..{null_label} ({null_label}: no class); found {list(labels)}")
            noise = SampleNoise(indices, self.config.seed, tuple(self.config.z_shape), self.device)
            x = noise.draw()  # (B, C, H, W)
            y = to_device(torch.tensor(labels), self.device)
            predict = sde.guided_predictions(
                *(self.nnet, schedule, y, null_label, scale, settings.scale_pow, settings.interval),
                guide=self.guide.nnet if self.guide else None,
                prediction=prediction,
                guide_prediction=self.guide.config.prediction if self.guide else "eps",
            )

            def finest(x: Tensor, t: float) -> Tensor:
                predictions = predict(x, t)
                if watch is not None:
                    watch(x, t, predictions)
                return predictions[-1]

            model = sde.DiffusionModel(finest, schedule, prediction)
            dtype = AUTOCAST.get(self.precision)
            with torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext():
                x = SOLVERS[settings.algorithm](model, schedule, x, steps, noise.draw, settings.time_shift)
            return self.to_images(x)

        return sample


def open_guide(config: ConfigDict, device: torch.device, precision: str = "no", compile: str = "off") -> Model | None:
    """Open the guiding network of config.sample.autoguidance_path; None where that is not set."""
    path, config_path = config.sample.autoguidance_path, config.sample.autoguidance_config
    if not path:
        return None
    other = runpy.run_path(config_path)["get_config"]() if config_path else config
    for name in ("schedule", "z_shape", "dataset.n_classes"):
        found, expected = (network_settings(each)[name] for each in (other, config))
        if found != expected:
            raise UserError(f"the guiding network's {name} must be {expected}; found {found} in {config_path}")
    return Model.open_network(path, other, device, precision, compile)


# --- Class names ------------------------------------------------------------------------------------------------------


def imagenet_names() -> list[str]:
    """Return ImageNet's English names in the order of its 1000 labels, from torchvision (no download)."""
    return list(ResNet50_Weights.DEFAULT.meta["categories"])


def class_names(config: ConfigDict, weights: Path) -> list[str]:
    """Return the names of a model's classes in the order of their labels, as saved with its weights.

    ImageNet's folders (WordNet's numbers) have their English names instead. So have 1000 classes without names, as the
    released weights and imported features have them, where config.dataset.path contains "imagenet". Other classes
    without names are called by their numbers.
    """
    n = config.dataset.n_classes
    numbers, saved = [str(label) for label in range(n)], saved_settings(weights)
    names = (saved and saved["class_names"]) or numbers
    if len(names) != n:
        raise UserError(f"{weights} names {len(names)} classes, config.dataset.n_classes is {n}: give its own config")
    nameless = names == numbers and n == 1000 and "imagenet" in config.dataset.path.lower()
    synsets = n == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names)
    imagenet = synsets and (names[0], names[-1]) == ("n01440764", "n15075141")  # tench ... toilet tissue
    return imagenet_names() if nameless or imagenet else names
