"""torch.compile of the network: one graph, fixed shapes, the same numbers. The code generator itself is left out."""

import dataclasses

import pytest
import torch
from conftest import load_config
from functorch.compile import make_boxed_func
from test_network import COARSE, FINE, inputs
from torch import distributed
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
import sde
import utils
from benchmarks import passes
from libs import dimr
from libs.compilation import compile_network
from libs.dimr import Attention, DiMR
from libs.norms import TDRMSNorm

MODELS = ["DiMR-XL-2R_imagenet256", "DiMR-XL-3R_imagenet512"]


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are handed to the code generator from here on: [("forward" or "backward", graph)]."""
    found = []

    def note(kind):
        def compiler(graph, inputs):
            found.append((kind, graph))
            return make_boxed_func(graph)

        return compiler

    backend = aot_autograd(
        fw_compiler=note("forward"), bw_compiler=note("backward"), inference_compiler=note("forward")
    )
    compiler = torch.compile

    def compile_with_backend(function, options=None, **kwargs):
        return compiler(function, backend=backend, **kwargs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_with_backend)
    return found


def narrow(name):
    """The config of a published model with narrow branches of three blocks, its grids and patches."""
    config = load_config(name)
    for stage in config.nnet.stages:
        stage.dim, stage.num_heads, stage.depth = 16, 4, 3
    config.dataset.n_classes = 5
    return config


def test_the_third_published_model_is_the_first_made_wider():
    """So that its graphs are the first one's, and are not made again below."""
    first, third = narrow(MODELS[0]), narrow("DiMR-G-2R_imagenet256")
    assert utils.build_stages(first) == utils.build_stages(third)
    assert utils.loss_weights(first) == utils.loss_weights(third)
    assert (first.z_shape, first.nnet.norm_type) == (third.z_shape, third.nnet.norm_type)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_models_are_one_graph_forward_and_backward(graphs, name, dtype):
    config = narrow(name)
    torch.manual_seed(0)
    nnet = utils.build_network(config)
    x, t, y = torch.randn(2, *config.z_shape), torch.rand(2), torch.tensor([1, 5])
    weights = utils.loss_weights(config)

    def losses():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            predictions = nnet(x, t, y)
        loss = sde.multi_resolution_loss(predictions, x, weights).mean()
        nnet.zero_grad()
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in nnet.parameters()]

    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-3}
    expected = losses()
    compile_network(nnet, "whole")
    for found in (losses(), losses()):
        torch.testing.assert_close(found, expected, **close)
    assert [kind for kind, _ in graphs] == ["forward", "backward"]


@pytest.mark.slow
def test_blocks_of_three_branches_are_compiled_for_all_that_a_run_needs(graphs):
    """They share their code: three branches in three ways are more than PyTorch's 8 translations of one function."""
    config = narrow("DiMR-XL-3R_imagenet512")
    nnet = utils.build_network(config)
    compile_network(nnet, "blocks")

    def predict(n, n_times):
        return nnet(torch.randn(n, *config.z_shape), torch.rand(n_times), torch.zeros(n, dtype=torch.int64))

    def run():
        sum(prediction.mean() for prediction in predict(2, 2)).backward()  # training
        with torch.no_grad():
            predict(3, 3)  # the held-out loss
            predict(4, 1)  # samples
        return len(graphs)

    assert run() == run()


@pytest.mark.slow
def test_blocks_stay_whole_among_several_processes(graphs):
    """PyTorch would cut what is compiled inside of its DistributedDataParallel at every bucket of gradients."""
    config = narrow("DiMR-XL-2R_imagenet256")
    for stage in config.nnet.stages:
        stage.dim = 256  # several buckets to a block
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        counts = []
        for wrap in (lambda nnet: nnet, lambda nnet: DistributedDataParallel(nnet, bucket_cap_mb=1)):
            graphs.clear()
            torch._dynamo.reset()
            nnet = utils.build_network(config)
            compile_network(nnet, "blocks")
            wrap(nnet)(torch.randn(2, *config.z_shape), torch.rand(2), torch.zeros(2, dtype=torch.int64))
            counts.append(len(graphs))
    finally:
        distributed.destroy_process_group()
    assert counts[0] == counts[1] > 1


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "n_graphs"), [(None, 1), ((0.1, 2.0), 2)])
def test_a_set_is_sampled_without_compiling_again(tiny_config, tmp_path, graphs, interval, n_graphs):
    """The last batch is smaller; with an interval the network also runs on the conditional half alone."""
    nnet = utils.build_network(tiny_config)
    torch.save(nnet.state_dict(), tmp_path / "nnet.pth")
    tiny_config.sample.update(n_samples=12, mini_batch_size=5, compile="whole", interval=interval, scale=2.0)
    evaluation.evaluate(tiny_config, str(tmp_path / "nnet.pth"), tmp_path / "compiled")
    assert len(graphs) == n_graphs
    assert len(list((tmp_path / "compiled").glob("*.png"))) == 12


@pytest.mark.slow
def test_recorded_graphs_give_outputs_of_their_own(graphs):
    """With `graphs` a call must not change what an earlier one gave."""
    config = narrow(MODELS[0])
    nnet = utils.build_network(config).eval()
    x, t, y = torch.randn(2, *config.z_shape), torch.rand(1), torch.tensor([1, 5])
    with torch.no_grad():
        expected = nnet(x, t, y), nnet(x + 1, t, y)
        compile_network(nnet, "graphs")
        found = nnet(x, t, y), nnet(x + 1, t, y)
    torch.testing.assert_close(found, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("final", [False, True])
def test_weights_are_frozen_into_a_translation_when_final(monkeypatch, final):
    """In training they must not be: they change."""
    nnet = utils.build_network(narrow(MODELS[0])).eval()
    seen = []

    def note(*inputs):
        seen.append(torch._inductor.config.freezing)

    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: note)
    compile_network(nnet, "whole", final_weights=final)
    nnet(None, None, None)
    assert seen == [final] and not torch._inductor.config.freezing


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_made_wider_give_the_same_numbers(monkeypatch, heads):
    """As on a GPU, where heads of no multiple of 8 would be copied: here of 24, 12 and 6."""
    torch.manual_seed(0)
    attention = Attention(24, heads, TDRMSNorm)
    x, t = torch.randn(2, 7, 24, requires_grad=True), torch.rand(2)
    leaves = [x, *attention.parameters()]
    expected = attention(x, t)
    monkeypatch.setattr(dimr, "wants_full_heads", lambda z: True)
    found = attention(x, t)
    along = torch.randn_like(found)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, along) for y in (found, expected)))


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.14", reason="counts what the compiler of PyTorch 2.14 makes of it")
def test_features_are_not_copied_to_another_layout_on_a_gpu():
    """In the compiler's list of kernels for a GPU no pass around a depthwise convolution moves an array and no more."""
    stages = [dataclasses.replace(stage, depth=1) for stage in (COARSE, FINE)]
    with FakeTensorMode():
        found = passes.count(DiMR(stages, n_classes=5).forward, inputs(), torch.bfloat16, training=True)
    assert list(found) == ["forward", "backward"]
    for made in (*found["forward"], *found["backward"]):
        if made.kind == "fused pass" and made.lines and all(line.startswith("depthwise") for line in made.lines):
            assert len(made.reads) > 1 or sum(made.reads.values()) != sum(made.writes.values()), made
    # 4 products in the Transformer block (a gated MLP takes 2), 2 in the other, 1 between the branches
    counts = [sum(made.kind == "matrix product" for made in made_of) for made_of in found.values()]
    assert counts == [7, 14]
