"""Check the network, the diffusion and the training step against golden tensors made by the released code.

    python scripts/check_golden.py FILE.safetensors [FILE ...] [--compile whole] [--precision bf16] [--device cuda]

A file holds a model (weights, outputs, losses, gradients, a small fit, guided samples) or results of schedules, solvers
and guidance. Prints the largest relative error max |a - b| / max |b| of each group of tensors. Exits with status 1 if
one is above its tolerance: 1e-5; 5e-5 for samplers, whose many steps add up; 1e-4 for compiled networks and on a GPU.
In 16 bits the errors are printed only.
"""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sde
from libs.checkpoint import load_weights, released_name
from libs.compilation import compile_network
from libs.dimr import DiMR, StageSpec
from libs.launch import Parser
from libs.model import AUTOCAST
from libs.optim import EMA, make_adamw, set_lr, warmup_lr
from libs.solvers import dpm_solver_fast

TOLERANCE = 1e-5
SAMPLER_TOLERANCE = 5e-5
SAMPLER_GROUPS = {"guided samples", "solver", "Euler-Maruyama"}
OTHER_TOLERANCE = 1e-4  # another compiler or device rounds differently

Comparison = tuple[str, Tensor, Tensor]  # group, ours, golden


@dataclass(frozen=True)
class Way:
    """How the network is computed: `compile` as of compile_network, `precision` as accelerate's mixed_precision."""

    compile: str = "off"
    precision: str = "no"
    device: str = "cpu"

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, AUTOCAST.get(self.precision), enabled=self.precision in AUTOCAST)

    def tolerance(self, group: str) -> float:
        """Get the largest relative error that is accepted in a group."""
        if self.precision != "no":
            return float("inf")
        own = SAMPLER_TOLERANCE if group in SAMPLER_GROUPS else TOLERANCE
        return own if self == Way() else max(own, OTHER_TOLERANCE)


PLAIN = Way()


def relative_error(ours: Tensor, golden: Tensor) -> float:
    """Compute max |a - b| / max |b|; infinite for another shape or a NaN."""
    if ours.shape != golden.shape:
        return float("inf")
    ours, golden = ours.detach().double().cpu(), golden.double().cpu()
    error = ((ours - golden).abs().max() / golden.abs().max()).item()
    return error if error == error else float("inf")


def load_golden_model(golden: dict[str, Tensor], metadata: dict[str, str]) -> DiMR:
    """Build the network of a golden file, whose config has the released code's field names, with its weights."""
    config = json.loads(metadata["config"])
    stages = [
        StageSpec(
            block_type=stage["block_type"],
            dim=stage["dim"],
            depth=stage["num_blocks"] // 2 * 2 + 1,  # what the released code builds
            hidden_dim=stage["hidden_dim"],
            patch_size=stage["input_feature_ratio"],
            max_height=stage["max_height"],
            max_width=stage["max_width"],
            num_heads=stage.get("num_attention_heads", 1),
            kernel_size=stage.get("kernel_size", 7),
            head_kernel_size=stage["final_kernel_size"],
        )
        for stage in config["stage_configs"]
    ]
    n_classes = config["num_classes"] - 1  # the released count includes the null class
    model = DiMR(stages, config["channels"], n_classes, config["norm_type"], config["block_grad_to_lowres"])
    load_weights(model, {k.removeprefix("state/"): v for k, v in golden.items() if k.startswith("state/")}, "golden")
    return model


def check_model(golden: dict[str, Tensor], metadata: dict[str, str], way: Way) -> Iterator[Comparison]:
    """Compare everything in a model file, through the parts that train.py and eval.py use."""
    golden = {name: tensor.to(way.device) for name, tensor in golden.items()}
    x, y, t = golden["x"], golden["y"], golden["log_snr"] / 4
    model = load_golden_model(golden, metadata).to(way.device).eval()
    compile_network(model, way.compile, final_weights=True)

    def compare(group: str, prefix: str, network: DiMR, x: Tensor, t: Tensor) -> Iterator[Comparison]:
        if f"{prefix}/0" in golden:
            with torch.no_grad(), way.autocast():
                outputs = network(x, t, y)
            yield from ((group, output, golden[f"{prefix}/{r}"]) for r, output in enumerate(outputs))

    yield from compare("outputs", "out", model, x, t)
    yield from compare("outputs", "out_same_t", model, x, torch.tensor([1.3 / 4], device=way.device))
    yield from compare("smaller input", "small/out", model, golden.get("small/x"), t)
    if "train/x0" in golden:
        trained = load_golden_model(golden, metadata).to(way.device)
        fit = json.loads(metadata["fit"]) if "fit/losses" in golden else None
        ema = EMA(trained, fit["ema"]) if fit else None  # before the network is compiled, as in train.py
        compile_network(trained, way.compile)
        yield from check_training(trained, golden, way, fit, ema)
        if fit:
            yield from compare("fit", "fit/out", trained.eval(), x, t)
            yield from compare("EMA", "fit/ema_out", ema.model, x, t)
    schedule = sde.DiscreteSchedule()
    for key, expected in golden.items():
        if match := re.fullmatch(r"sample/(constant|power_cosine)_([\d.]+)(?:_([\d.]+))?/(\d+)", key):
            scale, power = float(match[2]), float(match[3]) if match[3] else None
            noise_model = sde.guided_noise_model(model, schedule, golden["sample/y"], model.null_label, scale, power)
            with way.autocast():
                samples = dpm_solver_fast(noise_model, schedule, golden["sample/x_init"], int(match[4]))
            yield "guided samples", samples, expected


def check_training(model: DiMR, golden: dict, way: Way, fit: dict | None, ema: EMA | None) -> Iterator[Comparison]:
    """Compare losses and gradients of one batch, and the losses of a fit to it."""
    schedule = sde.DiscreteSchedule()
    x0, eps, y = golden["train/x0"], golden["train/eps"], golden["y"]
    t = golden["train/n"].double() / schedule.n_timesteps
    weights = sde.default_loss_weights(len(model.stages))

    def compute_loss() -> Tensor:
        with way.autocast():
            losses = sde.training_losses(model, schedule, x0, eps, t, y)
        return sde.weighted_sum(losses, weights)

    loss = compute_loss()
    yield "loss", schedule.add_noise(x0, eps, t), golden["train/xn"]
    yield "loss", torch.tensor(weights), golden["train/loss_coeffs"]
    yield "loss", loss, golden["train/loss"]
    loss.mean().backward()
    norms = {released_name(name): p.grad.norm() for name, p in model.named_parameters()}
    yield "gradients", torch.stack(list(norms.values())).norm(), golden["train/grad_norm"]
    if named := [name for name in norms if f"grad_norm/{name}" in golden]:
        ours, expected = [norms[name] for name in named], [golden[f"grad_norm/{name}"] for name in named]
        yield "gradients", torch.stack(ours), torch.stack(expected)
    if not fit:
        return
    model.zero_grad()
    optimizer = make_adamw(model, fit["lr"], tuple(fit["betas"]), fit["weight_decay"])
    history = []
    for step in range(fit["steps"]):
        set_lr(optimizer, warmup_lr(fit["lr"], step, fit["warmup"]))
        optimizer.zero_grad()
        loss = compute_loss().mean()
        loss.backward()
        optimizer.step()
        ema.update(step + 1)
        history.append(loss.item())
    yield "fit", torch.tensor(history), golden["fit/losses"]


def stand_in_noise_model(x: Tensor, t: float) -> Tensor:
    """Evaluate the smooth function that the golden sampler runs used in place of a network."""
    return 0.7 * torch.sin(3 * x + 5 * t) + 0.3 * x


def check_formulas(golden: dict[str, Tensor], metadata: dict[str, str], way: Way) -> Iterator[Comparison]:
    """Compare everything in a file without a network."""
    if "schedule/t" in golden:
        schedule, t, lam = sde.DiscreteSchedule(), golden["schedule/t"].double(), golden["schedule/lambda"]
        yield "schedule", schedule.log_alpha(t), golden["schedule/log_alpha"]
        yield "schedule", schedule.sigma(t), golden["schedule/sigma"]
        yield "schedule", schedule.lambda_(t), lam
        yield "schedule", schedule.inverse_lambda(lam), golden["schedule/inverse_lambda"]
    for key, expected in golden.items():
        if match := re.fullmatch(r"fast([123])/(\d+)/x", key):
            times = []

            def noise_model(x: Tensor, t: float, times: list[float] = times) -> Tensor:
                times.append(t)
                return stand_in_noise_model(x, t)

            order, steps, schedule = int(match[1]), int(match[2]), sde.DiscreteSchedule()
            yield "solver", dpm_solver_fast(noise_model, schedule, golden["x_init"], steps, order), expected
            yield "solver", torch.tensor(times), golden[key.removesuffix("x") + "times"]
        if match := re.fullmatch(r"(vpsde|vpsde_cosine)/(\w+)", key):
            schedule, t = sde.get_schedule(match[1]), golden[f"{match[1]}/t"].double()
            if match[2] == "cum_beta":
                yield "SDE", schedule.sigma(t).square(), expected
            elif match[2] != "t":
                yield "SDE", getattr(schedule, match[2].replace("cum_alpha", "alpha_bar"))(t), expected
        if match := re.fullmatch(r"em/(vpsde|vpsde_cosine)_(sde|ode)_(\d+)", key):
            schedule = sde.get_schedule(match[1])

            def noise_model(x: Tensor, t: float, schedule: sde.ContinuousSchedule = schedule) -> Tensor:
                return stand_in_noise_model(x, schedule.log_snr(torch.tensor(t, dtype=torch.float64)).item() / 10)

            torch.manual_seed(int(metadata["em_seed"]))
            x = sde.euler_maruyama(noise_model, schedule, golden["em/x_init"], int(match[3]), ode=match[2] == "ode")
            yield "Euler-Maruyama", x, expected
        if match := re.fullmatch(r"guidance/power_cosine_([\d.]+)_([\d.]+)", key):
            weights = [sde.guidance_weight(t, float(match[1]), float(match[2])) for t in golden["guidance/t"].tolist()]
            yield "guidance", torch.tensor(weights), expected
        if match := re.fullmatch(r"targets/(even|odd)/(\d+)", key):
            eps, odd = golden[f"targets/{match[1]}/eps"], match[1] == "odd"
            ratio = (eps.shape[-1] - odd) // (int(match[2]) - odd)
            yield "targets", sde.multi_scale_target(eps, ratio), expected


def check_file(path: str | Path, way: Way = PLAIN) -> dict[str, float]:
    """Compute the largest relative error of every group in a golden file."""
    with safe_open(path, "pt") as file:
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata() or {}
    check = check_model if any(key.startswith("state/") for key in golden) else check_formulas
    errors = {}
    for group, ours, expected in check(golden, metadata, way):
        errors[group] = max(errors.get(group, 0.0), relative_error(ours, expected))
    return errors


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="golden .safetensors files")
    parser.add_argument("--compile", default="off", choices=["whole", "blocks", "off"], help="as config.train.compile")
    parser.add_argument("--precision", default="no", choices=["no", *AUTOCAST], help="of the network, by autocast")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32, on a GPU too
    way = Way(arguments.compile, arguments.precision, arguments.device)
    failures = 0
    for path in arguments.files:
        print(Path(path).name)
        errors = check_file(path, way)
        if not errors:
            sys.exit(f"error: {path} holds none of the known golden groups")
        for group, error in errors.items():
            above = error > way.tolerance(group)
            failures += above
            print(f"  {group:16s} {error:9.2e}" + (f"  ABOVE {way.tolerance(group):.0e}" if above else ""))
    judged = "not judged" if way.precision != "no" else "all groups within tolerance"
    print(f"{failures} failed" if failures else judged)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
