"""Error against network evaluations of every solver: where the exact answer is known, and on the trained digits model.

    python benchmarks/solvers.py            # benchmarks/results/solvers.png and solvers.md; a minute or two
    python benchmarks/solvers.py --digits workdir/quickstart/train/ckpts/2000.ckpt     # solvers_digits.png and .md

Where it is known: the data are four Gaussians in the plane, of different weights and widths, for which the noise
prediction is known in closed form; so solvers are judged without a network's error. All start from the same noise at
t_end and end at t_start.

- rms: root mean square distance to where the exact probability-flow ODE takes the same noise (the released solver with
  6,000 evaluations, uniform in lambda). An ancestral sampler has no such end.
- W1: Wasserstein-1 distance of the samples to those exact ones, mean over the two coordinates. ddpm's noise is its own:
  it cannot come closer than an independent exact sample, whose distance is given as the floor.

On the digits model (configs/digits.py with its guidance, the weights that scripts/quickstart.sh trains) the reference
is where the released solver takes the same noise with very many evaluations, uniform in lambda, in float32; how far the
second-order multistep solver ends from there with as many says how well it is known. Distances are root mean squares
over latents, as shares of the latents' own.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import sde
import utils
from libs.randomness import SampleNoise
from libs.solvers import SOLVERS, dpm_solver_multistep, dpm_solver_singlestep, lambda_times, uniform_times

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, -0.5], [0.8, -0.8], [0.2, 0.9], [1.2, 0.6]], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.15, 0.25, 0.1], dtype=torch.float64)
EVALUATIONS = (5, 7, 10, 14, 20, 30, 50, 80, 120, 180, 250)
IN_TABLE = (10, 20, 50, 250)

# Beside the solvers that can be chosen: the multistep ones on the grid of the released sampler.
VARIANTS = {
    **SOLVERS,
    "2m, uniform t": lambda eps, schedule, x, steps, draw: dpm_solver_multistep(
        eps, schedule, x, uniform_times(schedule, steps), 2
    ),
    "3m, uniform t": lambda eps, schedule, x, steps, draw: dpm_solver_multistep(
        eps, schedule, x, uniform_times(schedule, steps), 3
    ),
}


def mixture_noise_model(schedule):
    """eps(x, t) = -sigma times the score of the mixture at time t; x (N, 2)."""

    def noise_model(x, t):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = schedule.log_alpha(t).exp(), schedule.sigma(t)
        variance = alpha**2 * STDS**2 + sigma**2  # (K,)
        away = x[:, None] - alpha * MEANS  # (N, K, 2)
        log_density = WEIGHTS.log() - away.square().sum(-1) / (2 * variance) - variance.log()
        share = log_density.softmax(1)  # (N, K)
        return sigma * (share[..., None] * away / variance[:, None]).sum(1)

    return noise_model


def wasserstein(x, y):
    return (x.sort(0).values - y.sort(0).values).abs().mean().item()


def independent_sample(schedule, n, generator):
    """Points (n, 2) of the noised mixture at t_start."""
    t = torch.tensor(schedule.t_start, dtype=torch.float64)
    which = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    x0 = MEANS[which] + STDS[which, None] * torch.randn(n, 2, dtype=torch.float64, generator=generator)
    eps = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    return schedule.log_alpha(t).exp() * x0 + schedule.sigma(t) * eps


def errors(schedule, n_points):
    """Rows (solver, evaluations, rms or None, W1) on one schedule; and the floor of W1 for independent points."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_points, 2, dtype=torch.float64, generator=generator)
    model = mixture_noise_model(schedule)
    exact = dpm_solver_singlestep(model, schedule, x, lambda_times(schedule, 6000), [3] * 2000)
    rows = []
    for name, solve in VARIANTS.items():
        for steps in EVALUATIONS:
            found = solve(model, schedule, x, steps, lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator))
            rms = None if name == "ddpm" else (found - exact).square().sum(1).mean().sqrt().item()
            rows.append((name, steps, rms, wasserstein(found, exact)))
    floor = np.mean([wasserstein(independent_sample(schedule, n_points, generator), exact) for _ in range(20)])
    return rows, floor


def plot(rows_of, path):
    """rms (above) and W1 (below) against evaluations, a column per schedule."""
    figure, axes = plt.subplots(2, len(rows_of), figsize=(4.6 * len(rows_of), 7.5), sharex=True, sharey="row")
    for column, (schedule, (rows, floor)) in zip(axes.T, rows_of.items(), strict=True):
        for name in VARIANTS:
            style = {"linestyle": ":" if "uniform" in name else "-", "marker": ".", "linewidth": 1.2}
            own = [row for row in rows if row[0] == name]
            if name != "ddpm":
                column[0].loglog([row[1] for row in own], [row[2] for row in own], label=name, **style)
            else:
                column[0].plot([], [])  # keeps one colour per solver in both rows
            column[1].loglog([row[1] for row in own], [row[3] for row in own], label=name, **style)
        column[1].axhline(floor, color="grey", linewidth=0.8)
        column[0].set_title(f"schedule {schedule}")
        column[1].set_xlabel("network evaluations")
        for axis in column:
            axis.grid(alpha=0.3, which="both", linewidth=0.5)
    axes[0, 0].set_ylabel("rms distance to the exact ODE")
    axes[0, 0].set_ylim(1e-7, 10)
    axes[1, 0].set_ylabel("Wasserstein-1 distance")
    axes[1, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(rows_of):
    """Markdown: rms / W1 at a few numbers of evaluations."""
    lines = []
    for schedule, (rows, floor) in rows_of.items():
        lines += [
            f"\nSchedule `{schedule}`: rms (W1, floor for ddpm {floor:.1e})\n",
            f"| solver | {' | '.join(map(str, IN_TABLE))} |",
        ]
        lines.append("|---" * (len(IN_TABLE) + 1) + "|")
        values = {(name, steps): (rms, w1) for name, steps, rms, w1 in rows}
        for name in VARIANTS:
            cells = []
            for steps in IN_TABLE:
                rms, w1 = values[name, steps]
                cells.append(f"{f'{rms:.1e}' if rms is not None else '-'} ({w1:.1e})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


DIGITS_EVALUATIONS = (4, 6, 8, 10, 14, 20, 30, 50, 80)
DIGITS_IN_TABLE = (6, 10, 20, 50, 80)
DIGITS_REFERENCE = 402  # evaluations


@torch.no_grad()
def digits_errors(weights, n_images):
    """Rows (solver, evaluations, error) on the digits model, and how far two references are apart."""
    config = utils.load_config(utils.ROOT / "configs" / "digits.py")
    schedule, nnet = sde.get_schedule(config.schedule), utils.build_network(config).eval()
    utils.load_network_weights(nnet, weights)
    labels = torch.arange(n_images) % config.dataset.n_classes
    noise = SampleNoise(range(n_images), config.seed, tuple(config.z_shape), torch.device("cpu"))
    x = noise.draw()
    sample = config.sample
    model = sde.guided_noise_model(nnet, schedule, labels, nnet.null_label, sample.scale, sample.scale_pow)
    times = lambda_times(schedule, DIGITS_REFERENCE)
    reference = dpm_solver_singlestep(model, schedule, x, times, [3] * (DIGITS_REFERENCE // 3))
    unit = reference.square().mean().sqrt().item()

    def error(found):
        return (found - reference).square().mean().sqrt().item() / unit

    apart = error(dpm_solver_multistep(model, schedule, x, lambda_times(schedule, DIGITS_REFERENCE), 2))
    rows = []
    for name, solve in VARIANTS.items():
        if name != "ddpm":  # whose end is another for every noise it draws
            rows += [(name, n, error(solve(model, schedule, x, n, noise.draw))) for n in DIGITS_EVALUATIONS]
    return rows, apart


def report_digits(weights, n_images, out):
    """solvers_digits.png and solvers_digits.md."""
    started = time.perf_counter()
    rows, apart = digits_errors(weights, n_images)
    seconds = time.perf_counter() - started
    figure, axes = plt.subplots(figsize=(6.4, 4.8))
    lines = [f"| solver | {' | '.join(map(str, DIGITS_IN_TABLE))} |", "|---" * (len(DIGITS_IN_TABLE) + 1) + "|"]
    for name in dict.fromkeys(row[0] for row in rows):
        own = {evaluations: error for solver, evaluations, error in rows if solver == name}
        axes.loglog(own.keys(), own.values(), ":." if "uniform" in name else ".-", linewidth=1.2, label=name)
        lines.append(f"| {name} | {' | '.join(f'{own[n]:.1e}' for n in DIGITS_IN_TABLE)} |")
    axes.axhline(apart, color="grey", linewidth=0.8)
    axes.set(xlabel="network evaluations", ylabel="distance to the reference / size of latents")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "solvers_digits.png", dpi=110)
    text = (
        "# Solvers on the trained digits model\n\n"
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}; "
        f"`python benchmarks/solvers.py {' '.join(sys.argv[1:])}`, {seconds:.0f} s.\n"
        f"{n_images} digits, the guidance of configs/digits.py; reference: the released solver, {DIGITS_REFERENCE}\n"
        f"evaluations. Two references are {apart:.1e} apart (grey line): no distance below that is known.\n\n"
        "![Distance against evaluations](solvers_digits.png)\n\n" + "\n".join(lines) + "\n"
    )
    (out / "solvers_digits.md").write_text(text)
    print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_points", type=int, default=5000)
    parser.add_argument("--digits", metavar="WEIGHTS", help="checkpoint of the digits model: solvers_digits.* only")
    parser.add_argument("--n_images", type=int, default=50, help="digits")
    parser.add_argument("--out", default="benchmarks/results", help="folder for the picture and the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.digits:
        report_digits(args.digits, args.n_images, Path(args.out))
        return
    started = time.perf_counter()
    rows_of = {name: errors(sde.get_schedule(name), args.n_points) for name in sde.SCHEDULES}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    plot(rows_of, out / "solvers.png")
    text = (
        "# Solvers on an exact mixture of Gaussians\n\n"
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
        f"NumPy {np.__version__}; `python benchmarks/solvers.py {' '.join(sys.argv[1:])}".rstrip()
        + f"`, {time.perf_counter() - started:.0f} s. {args.n_points:,} points.\n\n"
        "![Error against evaluations](solvers.png)\n\n"
        "rms: distance to where the exact ODE takes the same noise. W1: distance to its distribution (grey line: the\n"
        "floor for ddpm, whose noise is its own). Columns: network evaluations.\n" + table(rows_of)
    )
    (out / "solvers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
