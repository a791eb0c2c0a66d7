"""Check the network, the diffusion and the training step against golden tensors made by the released code.

    python scripts/check_golden.py FILE.safetensors [FILE ...] [--compile whole] [--precision bf16] [--device cuda]

Knows three kinds of file by their contents: model files (weights, outputs, losses, gradients, a small fit, guided
samples), solver files (schedule/*, fast3/*) and SDE files (vpsde/*, em/*, guidance/*, targets/*). Prints, per file and
group, the largest relative error max |a - b| / max |b| over the group's tensors and exits with status 1 if one is above
its tolerance (1e-5; 5e-5 where a sampler's many steps add up; 1e-4 for compiled networks and on a GPU). In 16 bits the
deviations of the network's groups are printed and not judged.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sde
from libs.checkpoint import load_weights, released_name
from libs.compilation import compile_network
from libs.dimr import DiMR, StageSpec
from libs.optim import EMA, make_adamw, set_lr, warmup_lr
from libs.solvers import dpm_solver_fast

TOLERANCE = 1e-5
SAMPLER_TOLERANCE = 5e-5
SAMPLER_GROUPS = {"guided samples", "solver", "Euler-Maruyama"}

OTHER_TOLERANCE = 1e-4  # another compiler or device rounds otherwise
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Comparison = tuple[str, Tensor, Tensor]  # group, ours, golden


@dataclass(frozen=True)
class Way:
    """How the network is computed: `compile` as of compile_network, `precision` a key of PRECISIONS."""

    compile: str = "off"
    precision: str = "no"
    device: str = "cpu"

    def autocast(self) -> AbstractContextManager:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.device, dtype, enabled=dtype != torch.float32)

    def tolerance(self, group: str) -> float:
        """Largest relative error that is right for a group."""
        if self.precision != "no":
            return float("inf")
        own = SAMPLER_TOLERANCE if group in SAMPLER_GROUPS else TOLERANCE
        return own if self == Way() else max(own, OTHER_TOLERANCE)


PLAIN = Way()


def relative_error(ours: Tensor, golden: Tensor) -> float:
    """max |a - b| / max |b|; infinite for another shape or a NaN."""
    if ours.shape != golden.shape:
        return float("inf")
    ours, golden = ours.detach().double().cpu(), golden.double().cpu()
    error = ((ours - golden).abs().max() / golden.abs().max()).item()
    return error if error == error else float("inf")


def build_model(released_config: dict) -> DiMR:
    """The network of a golden file from its metadata, written in the released code's field names."""
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
        for stage in released_config["stage_configs"]
    ]
    return DiMR(
        stages,
        channels=released_config["channels"],
        n_classes=released_config["num_classes"] - 1,  # the released count includes the null class
        norm_type=released_config["norm_type"],
        block_grad_to_lowres=released_config["block_grad_to_lowres"],
    )


def load_golden_model(golden: dict[str, Tensor], metadata: dict[str, str]) -> DiMR:
    model = build_model(json.loads(metadata["config"]))
    load_weights(model, {k.removeprefix("state/"): v for k, v in golden.items() if k.startswith("state/")}, "golden")
    return model


def compare_outputs(group: str, prefix: str, outputs: tuple[Tensor, ...], golden: dict) -> Iterator[Comparison]:
    for r, output in enumerate(outputs):
        yield group, output, golden[f"{prefix}/{r}"]


def check_model(golden: dict[str, Tensor], metadata: dict[str, str], way: Way = PLAIN) -> Iterator[Comparison]:
    """Everything a model file holds, through the same parts that train.py and eval.py use."""
    golden = {name: tensor.to(way.device) for name, tensor in golden.items()}
    x, y, t = golden["x"], golden["y"], golden["log_snr"] / 4
    model = load_golden_model(golden, metadata).to(way.device).eval()
    compile_network(model, way.compile, final_weights=True)
    with torch.no_grad(), way.autocast():
        yield from compare_outputs("outputs", "out", model(x, t, y), golden)
        if "out_same_t/0" in golden:
            same_t = torch.tensor([1.3 / 4], device=way.device)
            yield from compare_outputs("outputs", "out_same_t", model(x, same_t, y), golden)
        if "small/x" in golden:
            yield from compare_outputs("smaller input", "small/out", model(golden["small/x"], t, y), golden)
    if "train/x0" in golden:
        yield from check_training(golden, metadata, way)
    yield from check_samples(model, golden, way)


def check_training(golden: dict[str, Tensor], metadata: dict[str, str], way: Way) -> Iterator[Comparison]:
    schedule = sde.DiscreteSchedule()
    x0, eps, y = golden["train/x0"], golden["train/eps"], golden["y"]
    t = golden["train/n"].double() / schedule.n_timesteps
    xn = schedule.add_noise(x0, eps, t)
    model = load_golden_model(golden, metadata).to(way.device)
    fit = json.loads(metadata["fit"]) if "fit/losses" in golden else None
    ema = EMA(model, fit["ema"]) if fit else None  # before the network is compiled, as in train.py
    compile_network(model, way.compile)
    weights = sde.default_loss_weights(len(model.stages))

    def losses() -> Tensor:
        with way.autocast():
            predictions = model(xn, schedule.network_time(t), y)
        return sde.multi_resolution_loss(predictions, eps, weights)

    loss = losses()
    yield "loss", xn, golden["train/xn"]
    yield "loss", torch.tensor(weights), golden["train/loss_coeffs"]
    yield "loss", loss, golden["train/loss"]
    loss.mean().backward()
    norms = {released_name(name): p.grad.norm() for name, p in model.named_parameters()}
    yield "gradients", torch.stack(list(norms.values())).norm(), golden["train/grad_norm"]
    named = [name for name in norms if f"grad_norm/{name}" in golden]
    if named:
        yield (
            "gradients",
            torch.stack([norms[n] for n in named]),
            torch.stack([golden[f"grad_norm/{n}"] for n in named]),
        )

    if not fit:
        return
    model.zero_grad()
    optimizer = make_adamw(model, fit["lr"], tuple(fit["betas"]), fit["weight_decay"])
    history = []
    for step in range(fit["steps"]):
        set_lr(optimizer, warmup_lr(fit["lr"], step, fit["warmup"]))
        optimizer.zero_grad()
        loss = losses().mean()
        loss.backward()
        optimizer.step()
        ema.update(step + 1)
        history.append(loss.item())
    yield "fit", torch.tensor(history), golden["fit/losses"]
    x, t = golden["x"], golden["log_snr"] / 4
    with torch.no_grad(), way.autocast():
        yield from compare_outputs("fit", "fit/out", model.eval()(x, t, y), golden)
        yield from compare_outputs("EMA", "fit/ema_out", ema.model(x, t, y), golden)


def check_samples(model: DiMR, golden: dict[str, Tensor], way: Way) -> Iterator[Comparison]:
    schedule = sde.DiscreteSchedule()
    for key, expected in golden.items():
        match = re.fullmatch(r"sample/(constant|power_cosine)_([\d.]+)(?:_([\d.]+))?/(\d+)", key)
        if match:
            power = float(match[3]) if match[3] else None
            noise_model = sde.guided_noise_model(
                model, schedule, golden["sample/y"], model.null_label, scale=float(match[2]), power=power
            )
            with way.autocast():
                samples = dpm_solver_fast(noise_model, schedule, golden["sample/x_init"], int(match[4]))
            yield "guided samples", samples, expected


def stand_in_noise_model(x: Tensor, t: float) -> Tensor:
    """The smooth function that the golden sampler runs used in place of a network."""
    return 0.7 * torch.sin(3 * x + 5 * t) + 0.3 * x


def check_solver(golden: dict[str, Tensor], metadata: dict[str, str], way: Way) -> Iterator[Comparison]:
    schedule = sde.DiscreteSchedule()
    if "schedule/t" in golden:
        t = golden["schedule/t"].double()
        yield "schedule", schedule.log_alpha(t), golden["schedule/log_alpha"]
        yield "schedule", schedule.sigma(t), golden["schedule/sigma"]
        yield "schedule", schedule.lambda_(t), golden["schedule/lambda"]
        yield "schedule", schedule.inverse_lambda(golden["schedule/lambda"]), golden["schedule/inverse_lambda"]
    for key, expected in golden.items():
        match = re.fullmatch(r"fast([123])/(\d+)/x", key)
        if match:
            times = []

            def noise_model(x: Tensor, t: float, times: list[float] = times) -> Tensor:
                times.append(t)
                return stand_in_noise_model(x, t)

            x = dpm_solver_fast(noise_model, schedule, golden["x_init"], int(match[2]), order=int(match[1]))
            yield "solver", x, expected
            yield "solver", torch.tensor(times), golden[key.removesuffix("x") + "times"]


def check_sde(golden: dict[str, Tensor], metadata: dict[str, str], way: Way) -> Iterator[Comparison]:
    for name in ("vpsde", "vpsde_cosine"):
        if f"{name}/t" not in golden:
            continue
        process = sde.get_schedule(name)
        t = golden[f"{name}/t"].double()
        ours = {
            "cum_alpha": process.alpha_bar(t),
            "cum_beta": process.sigma(t).square(),
            "snr": process.snr(t),
            "nsr": process.nsr(t),
            "drift": process.drift(t),
            "diffusion": process.diffusion(t),
            "log_snr": process.log_snr(t),
        }
        for quantity, values in ours.items():
            if f"{name}/{quantity}" in golden:
                yield "SDE", values, golden[f"{name}/{quantity}"]
    for key, expected in golden.items():
        if match := re.fullmatch(r"em/(vpsde|vpsde_cosine)_(sde|ode)_(\d+)", key):
            process = sde.get_schedule(match[1])

            def noise_model(x: Tensor, t: float, process: sde.ContinuousSchedule = process) -> Tensor:
                return stand_in_noise_model(x, process.log_snr(torch.tensor(t, dtype=torch.float64)).item() / 10)

            torch.manual_seed(int(metadata["em_seed"]))
            x = sde.euler_maruyama(noise_model, process, golden["em/x_init"], int(match[3]), ode=match[2] == "ode")
            yield "Euler-Maruyama", x, expected
        if match := re.fullmatch(r"guidance/power_cosine_([\d.]+)_([\d.]+)", key):
            weights = [sde.guidance_weight(t, float(match[1]), float(match[2])) for t in golden["guidance/t"].tolist()]
            yield "guidance", torch.tensor(weights), expected
        if match := re.fullmatch(r"targets/(even|odd)/(\d+)", key):
            eps = golden[f"targets/{match[1]}/eps"]
            odd = match[1] == "odd"
            ratio = (eps.shape[-1] - odd) // (int(match[2]) - odd)
            yield "targets", sde.multi_scale_target(eps, ratio), expected


def check_file(path: str, way: Way = PLAIN) -> dict[str, float]:
    """The largest relative error of every group in a golden file.

    Raises:
        ValueError: an unreadable file, or one of none of the known kinds.
    """
    try:
        with safe_open(path, "pt") as file:
            golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    if any(key.startswith("state/") for key in golden):
        check = check_model
    elif any(key.startswith(("schedule/", "fast")) for key in golden):
        check = check_solver
    else:
        check = check_sde
    errors = {}
    for group, ours, expected in check(golden, metadata, way):
        errors[group] = max(errors.get(group, 0.0), relative_error(ours, expected))
    if not errors:
        raise ValueError(f"{path}: none of the known golden groups is in it; found {', '.join(sorted(golden)[:5])}")
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="golden .safetensors files")
    parser.add_argument("--compile", default="off", choices=["whole", "blocks", "off"], help="as config.train.compile")
    parser.add_argument("--precision", default="no", choices=PRECISIONS, help="of the network, by autocast")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32, on a GPU too
    way = Way(arguments.compile, arguments.precision, arguments.device)
    failures = 0
    for path in arguments.files:
        try:
            errors = check_file(path, way)
        except ValueError as error:
            print(f"{error}")
            failures += 1
            continue
        print(Path(path).name)
        for group, error in errors.items():
            ok = error <= way.tolerance(group)
            failures += not ok
            verdict = "not judged" if way.precision != "no" else "ok" if ok else f"ABOVE {way.tolerance(group):.0e}"
            print(f"  {group:16s} {error:9.2e}  {verdict}")
    print(f"{failures} failed" if failures else "all groups within tolerance" if way.precision == "no" else "done")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
