"""Error against NFE of every solver: where the exact answer is known, and on the trained digits model.

    python benchmarks/solvers.py            # benchmarks/results/solvers.png and solvers.md; a minute or two
    python benchmarks/solvers.py --digits workdir/quickstart/train/ckpts/2000.ckpt     # solvers_digits.png and .md

Exact: four Gaussians in the plane, whose noise prediction is known in closed form. All solvers take the same noise.

- rms: root mean square distance to where the exact probability-flow ODE ends (the released solver with an NFE of 6,000,
  uniform in lambda). An ancestral sampler has no such end.
- W1: Wasserstein-1 distance to those exact samples, mean over the two coordinates. The noise of ddpm is its own: it
  cannot come closer than an independent exact sample, whose distance is the floor.

Digits: configs/digits_released.py with its guidance. The reference is the released solver with a large NFE, uniform in
lambda; the floor is the distance of the second-order multistep solver with the same NFE. Relative to the latents' rms.
"""

import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from anywhere

import sde
import utils
from benchmarks.machine import describe_run
from libs.launch import Parser
from libs.model import Model
from libs.randomness import SampleNoise
from libs.solvers import SOLVERS, dpm_solver_multistep, dpm_solver_singlestep, lambda_times

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, -0.5], [0.8, -0.8], [0.2, 0.9], [1.2, 0.6]], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.15, 0.25, 0.1], dtype=torch.float64)
EXACT_NFE = (5, 7, 10, 14, 20, 30, 50, 80, 120, 180, 250)
DIGITS_NFE = (4, 6, 8, 10, 14, 20, 30, 50, 80)
DIGITS_REFERENCE = 402  # NFE
N_POINTS, N_DIGITS = 5000, 50

# All solvers but Euler-Maruyama; the multistep ones also on the times of the released sampler.
COMPARED = {name: solver for name, solver in SOLVERS.items() if not name.startswith("euler_m")}
COMPARED["2m, uniform t"] = lambda f, s, x, n, draw: dpm_solver_multistep(f, s, x, s.grid(n), 2)
COMPARED["3m, uniform t"] = lambda f, s, x, n, draw: dpm_solver_multistep(f, s, x, s.grid(n), 3)


def mixture_noise_model(schedule):
    """eps(x, t) = -sigma times the score of the mixture at time t; x (N, 2)."""

    def noise_model(x, t):
        t = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = alpha**2 * STDS**2 + sigma**2  # (K,)
        away = x[:, None] - alpha * MEANS  # (N, K, 2)
        log_density = WEIGHTS.log() - away.square().sum(-1) / (2 * variance) - variance.log()
        share = log_density.softmax(1)  # (N, K)
        return sigma * (share[..., None] * away / variance[:, None]).sum(1)

    return noise_model


def wasserstein(x, y):
    return (x.sort(0).values - y.sort(0).values).abs().mean().item()


def independent_sample(schedule, n, generator):
    """Draw points (n, 2) of the noised mixture at t_start."""
    t = torch.tensor(schedule.t_start, dtype=torch.float64)
    which = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    x0 = MEANS[which] + STDS[which, None] * torch.randn(n, 2, dtype=torch.float64, generator=generator)
    return schedule.add_noise(x0, torch.randn(n, 2, dtype=torch.float64, generator=generator), t.expand(n))


def exact_errors(schedule):
    """Measure one schedule: {solver: curve of rms}, {solver: curve of W1}, each {NFE: error}, and the floor of W1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N_POINTS, 2, dtype=torch.float64, generator=generator)
    model = mixture_noise_model(schedule)
    exact = dpm_solver_singlestep(model, schedule, x, lambda_times(schedule, 6000), [3] * 2000)
    rms, w1 = {}, {name: {} for name in COMPARED}
    for name, solver in COMPARED.items():
        for n in EXACT_NFE:
            found = solver(model, schedule, x, n, lambda: torch.randn(x.shape, dtype=x.dtype, generator=generator))
            w1[name][n] = wasserstein(found, exact)
            if name != "ddpm":
                rms.setdefault(name, {})[n] = (found - exact).square().sum(1).mean().sqrt().item()
    floor = np.mean([wasserstein(independent_sample(schedule, N_POINTS, generator), exact) for _ in range(20)])
    return rms, w1, floor


@torch.no_grad()
def report_digits(weights):
    """Measure the digits model: text and figure."""
    config = utils.load_config(utils.ROOT / "configs" / "digits_released.py")
    schedule, nnet = sde.get_schedule(config.schedule), Model.open(weights, config).nnet
    labels = torch.arange(N_DIGITS) % config.dataset.n_classes
    noise = SampleNoise(range(N_DIGITS), config.seed, tuple(config.z_shape), torch.device("cpu"))
    x, sample = noise.draw(), config.sample
    model = sde.guided_noise_model(nnet, schedule, labels, nnet.null_label, sample.scale, sample.scale_pow)
    times = lambda_times(schedule, DIGITS_REFERENCE)
    reference = dpm_solver_singlestep(model, schedule, x, times, [3] * (DIGITS_REFERENCE // 3))

    def error(found):
        return ((found - reference).square().mean() / reference.square().mean()).sqrt().item()

    curves = {
        name: {n: error(solver(model, schedule, x, n, noise.draw)) for n in DIGITS_NFE}
        for name, solver in COMPARED.items()
        if name != "ddpm"  # whose end is another for every noise it draws
    }
    floor = error(dpm_solver_multistep(model, schedule, x, times, 2))
    figure, axes = plt.subplots(figsize=(6.4, 4.8))
    draw(axes, curves, floor, xlabel="NFE", ylabel="distance to the reference / size of latents")
    axes.legend(fontsize=8)
    text = (
        f"{N_DIGITS} digits, the guidance of configs/digits_released.py; reference: the released solver with an NFE of "
        f"{DIGITS_REFERENCE}.\nTwo references are {floor:.1e} apart (grey line): no distance below that is known.\n\n"
    )
    rows = [(name, {n: f"{error:.1e}" for n, error in curve.items()}) for name, curve in curves.items()]
    return text + table((6, 10, 20, 50, 80), rows), figure


def draw(axes, curves, floor, **labels):
    """Plot error curves, one color per solver in all plots, and the floor in grey."""
    colors = dict(zip(COMPARED, plt.get_cmap("tab10").colors, strict=False))
    for name, curve in curves.items():
        style = ":." if "uniform" in name else ".-"
        axes.loglog(curve.keys(), curve.values(), style, color=colors[name], linewidth=1.2, label=name)
    if floor:
        axes.axhline(floor, color="grey", linewidth=0.8)
    axes.set(**labels)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)


def table(columns, rows):
    """Make a Markdown table of errors: rows (solver, {NFE: text})."""
    lines = [f"| solver | {' | '.join(map(str, columns))} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells[n] for n in columns)} |" for name, cells in rows]) + "\n"


def report_exact():
    """Measure all schedules: text and figure."""
    figure, axes = plt.subplots(2, len(sde.SCHEDULES), figsize=(4.6 * len(sde.SCHEDULES), 7.5), sharey="row")
    text = (
        f"{N_POINTS:,} points. rms: distance to where the exact ODE takes the same noise. W1: distance to its "
        "distribution\n(grey line: the floor for ddpm, whose noise is its own). Columns: NFE.\n"
    )
    for (above, below), schedule in zip(axes.T, sde.SCHEDULES, strict=True):
        rms, w1, floor = exact_errors(sde.get_schedule(schedule))
        draw(above, rms, None, title=f"schedule {schedule}", ylabel="rms distance to the exact ODE", ylim=(1e-7, 10))
        draw(below, w1, floor, xlabel="NFE", ylabel="Wasserstein-1 distance")
        cells = {
            name: {n: f"{f'{rms[name][n]:.1e}' if name in rms else '-'} ({w1[name][n]:.1e})" for n in EXACT_NFE}
            for name in COMPARED
        }
        text += f"\nSchedule `{schedule}`: rms (W1, floor for ddpm {floor:.1e})\n\n"
        text += table((10, 20, 50, 250), cells.items())
    axes[1, 0].legend(fontsize=8)
    return text, figure


def main():
    parser = Parser(__doc__)
    parser.add_argument("--digits", metavar="WEIGHTS", help="checkpoint of the digits model: solvers_digits.* only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    text, figure = report_digits(args.digits) if args.digits else report_exact()
    name, title = ("solvers_digits", "digits") if args.digits else ("solvers", "an exact mixture of Gaussians")
    seconds = f"{time.perf_counter() - started:.0f} s"
    head = f"# Solvers on {title}\n\n{describe_run()}, {seconds}.\n\n![Error against NFE]({name}.png)\n\n"
    out = utils.ROOT / "benchmarks" / "results" / name
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=110)
    out.with_suffix(".md").write_text(head + text)
    print(head + text)


if __name__ == "__main__":
    main()
