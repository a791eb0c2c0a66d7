"""Run diffusers' own common tests on our pipeline and network, with DiTPipeline and its network as control.

    python benchmarks/diffusers_tests.py CHECKOUT > benchmarks/results/diffusers.md

CHECKOUT is a clone of https://github.com/huggingface/diffusers at a release. Its tests run with the installed
diffusers, and need transformers, peft, parameterized and requests_mock.
"""

import contextlib
import os
import platform
import re
import sys
from pathlib import Path
from typing import ClassVar

if __name__ == "__main__":  # pytest imports this file once more
    sys.path[:1] = [sys.argv[-1], str(Path(__file__).resolve().parents[1])]

import diffusers
import pytest
import torch
from tests.models.transformers.test_models_dit_transformer2d import (
    TestDiTTransformer2D,
    TestDiTTransformer2DMemory,
    TestDiTTransformer2DTraining,
)
from tests.pipelines.dit.test_dit import DiTPipelineFastTests
from tests.schedulers.test_scheduler_ddim import DDIMSchedulerTest
from tests.testing_utils import torch_device

from libs.network import DiMRNetwork
from libs.pipeline import DiMRPipeline
from libs.scheduler import SolverScheduler

SIZES = {"dim": 16, "depth": 3, "hidden_dim": 32}
BRANCHES = [
    {"block_type": "TransformerBlock", "patch_size": 2, "max_height": 4, "max_width": 4, "num_heads": 2, **SIZES},
    {"block_type": "ConvNeXtBlock", "patch_size": 1, "max_height": 8, "max_width": 8, **SIZES},
]


class DiMRPipelineTests(DiTPipelineFastTests):
    pipeline_class, output_type, test_inference = DiMRPipeline, "np", None  # test_inference: pixels of DiT
    test_layerwise_casting = test_group_offloading = True

    def get_dummy_components(self):
        vae = super().get_dummy_components()["vae"]
        return {"transformer": DiMRNetwork(BRANCHES).eval(), "vae": vae, "scheduler": SolverScheduler()}

    def get_dummy_inputs(self, device, seed=0):
        return {**super().get_dummy_inputs(device, seed), "num_inference_steps": 3, "output_type": self.output_type}

    def test_save_load_optional_components(self):
        self.output_type = "latent"  # all that there is without a vae
        super().test_save_load_optional_components()


class SolverSchedulerTests(DDIMSchedulerTest.__base__):
    scheduler_classes, forward_default_kwargs = (SolverScheduler,), (("num_inference_steps", 50),)
    test_step_shape = test_add_noise_device = test_trained_betas = None  # its steps follow one another, betas are fixed

    def get_scheduler_config(self, **kwargs):
        return {"schedule": "sd", **kwargs}


class OurNetwork:
    model_class, main_input_name, output_shape = DiMRNetwork, "x", (4, 8, 8)
    test_correct_class_remapping_from_dict_config = test_correct_class_remapping_from_pretrained_config = None
    test_correct_class_remapping = None  # these three: old names of DiT

    def get_init_dict(self):
        return {"branches": BRANCHES, "n_classes": 8}

    def get_dummy_inputs(self, batch_size=4):
        x = torch.randn(batch_size, 4, 8, 8, generator=self.generator).to(torch_device)
        t = torch.rand(batch_size, generator=self.generator).to(torch_device)
        return {"x": x, "t": t, "y": torch.arange(batch_size, device=torch_device)}


CONTROLS = (TestDiTTransformer2D, TestDiTTransformer2DMemory, TestDiTTransformer2DTraining)
TestDiMR, TestDiMRMemory, TestDiMRTraining = (type(c.__name__, (OurNetwork, c), {}) for c in CONTROLS)
TestDiMRTraining.test_gradient_checkpointing_is_applied = lambda self: super(
    CONTROLS[2], self
).test_gradient_checkpointing_is_applied({"DiMRNetwork"})
SUITES = {  # [control, ours]
    "pipeline": ["DiTPipelineFastTests", "DiMRPipelineTests"],
    "scheduler": ["DDIMSchedulerTest", "SolverSchedulerTests"],
    "network": ["TestDiTTransformer2D", "TestDiMR"],
    "network, memory": ["TestDiTTransformer2DMemory", "TestDiMRMemory"],
    "network, training": ["TestDiTTransformer2DTraining", "TestDiMRTraining"],
}


class Recorder:
    outcomes: ClassVar[dict[tuple[str, str], str]] = {}  # (class, test): outcome

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[tuple(report.nodeid.split("::")[1:])] = report.outcome


if __name__ == "__main__":
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:warnings", *sys.argv[1:-1]]
    with contextlib.redirect_stdout(sys.stderr):
        pytest.main([__file__, *options], plugins=[Recorder()])
    release = re.search(r'version="(.*?)"', Path(sys.argv[-1], "setup.py").read_text())[1]
    print(f"""# diffusers' common tests

    python benchmarks/diffusers_tests.py CHECKOUT

Of diffusers {release}, run with {diffusers.__version__} and torch {torch.__version__} on {torch_device}, \
{platform.machine()} with {os.cpu_count()} cores.

| suite | test | DiTPipeline's | ours |
|---|---|---|---|""")
    for suite, classes in SUITES.items():
        control, ours = ({k[1]: o for k, o in Recorder.outcomes.items() if k[0] == each} for each in classes)
        control = {test: control.get(test) for test in ours}  # without those about DiT or DDIM alone
        counts = ([*f.values()].count(o) for f in (control, ours) for o in ("passed", "failed", "skipped"))
        print("| " + suite + " | passed, failed, skipped | {}, {}, {} | {}, {}, {} |".format(*counts))
        for test in sorted(ours):
            if control[test] != ours[test] or ours[test] == "failed":
                print(f"| | {test} | {control[test]} | {ours[test]} |")
