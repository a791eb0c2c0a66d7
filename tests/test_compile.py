"""torch.compile of the network: one graph, fixed shapes, the same numbers. The code generator itself is left out."""

import pytest
import torch
from conftest import load_config
from functorch.compile import make_boxed_func
from test_network import inputs, small_model
from torch import distributed
from torch._dynamo.backends.common import aot_autograd
from torch.nn.parallel import DistributedDataParallel

import eval as evaluation
import sde
from libs import compilation
from libs.compilation import compile_network, use_forms
from libs.dimr import Attention, DiMR, LongSkip, StageSpec, Upsample
from libs.model import build_network, build_stages, loss_weights
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
    assert build_stages(first) == build_stages(third)
    assert loss_weights(first) == loss_weights(third)
    assert (first.z_shape, first.nnet.norm_type) == (third.z_shape, third.nnet.norm_type)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_models_are_one_graph_forward_and_backward(graphs, name, dtype):
    config = narrow(name)
    torch.manual_seed(0)
    nnet = build_network(config)
    x, t, y = torch.randn(2, *config.z_shape), torch.rand(2), torch.tensor([1, 5])
    weights = loss_weights(config)

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
    nnet = build_network(config)
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
            nnet = build_network(config)
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
    nnet = build_network(tiny_config)
    torch.save(nnet.state_dict(), tmp_path / "nnet.pth")
    tiny_config.sample.update(n_samples=12, mini_batch_size=5, compile="whole", interval=interval, scale=2.0)
    evaluation.evaluate(tiny_config, str(tmp_path / "nnet.pth"), tmp_path / "compiled")
    assert len(graphs) == n_graphs
    assert len(list((tmp_path / "compiled").glob("*.png"))) == 12


@pytest.mark.parametrize("final", [False, True])
def test_final_weights_are_compiled_in_and_kernels_do_not_depend_on_timings(monkeypatch, caplog, final):
    """In training weights change, and the compiler may time kernels to choose among them."""
    nnet = build_network(narrow(MODELS[0])).eval()
    caplog.set_level("INFO")
    frozen, options = [], []

    def compiler(function, **kwargs):
        options.append(kwargs["options"])
        return lambda *inputs: frozen.append(torch._inductor.config.freezing)

    monkeypatch.setattr(torch, "compile", compiler)
    compile_network(nnet, "whole", final_weights=final)
    nnet(None, None, None)
    assert frozen == [final] and not torch._inductor.config.freezing
    assert options == [{"deterministic": True} if final else None]
    assert "the first call takes minutes" in caplog.text


def gradients(prepare, recompute="off"):
    """Outputs and gradients of a small network, made faster by `prepare`, in training mode."""
    model = small_model().train()
    prepare(model)
    compilation.checkpoint_activations(model, recompute)
    outputs = model(*inputs())
    sum(output.square().mean() for output in outputs).backward()
    return [*(output.detach() for output in outputs), *(parameter.grad for parameter in model.parameters())]


FORMS = {"CPU_FORMS": compilation.CPU_FORMS, "COMPILED_FORMS": compilation.COMPILED_FORMS}
FORMS["COMPILED_GPU_FORMS"] = compilation.COMPILED_GPU_FORMS  # heads of 8 channels are padded to 8: see below


@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_faster_forms_compute_what_the_layers_do(forms):
    expected, found = gradients(lambda model: None), gradients(lambda model: use_forms(model, forms))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_padded_heads_give_the_same_numbers(heads):
    """Heads of 24, 12 and 6 channels."""
    torch.manual_seed(0)
    attention = Attention(24, heads, TDRMSNorm)
    x, t = torch.randn(2, 7, 24, requires_grad=True), torch.rand(2)
    leaves = [x, *attention.parameters()]
    expected, found = attention(x, t), compilation.padded_attention(attention, x, t)
    along = torch.randn_like(found)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, leaves, along) for y in (found, expected)))


@pytest.mark.parametrize("tokens", [compilation.FEW_TOKENS, compilation.FEW_TOKENS + 1])
def test_attention_on_a_cpu_in_16_bits(tokens):
    """By the plain formula and by PyTorch's kernel: as exact as 16-bit inputs allow."""
    torch.manual_seed(0)
    attention = Attention(24, 2, TDRMSNorm)
    x, t = torch.randn(2, tokens, 24), torch.rand(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = compilation.cpu_attention(attention, x, t)
    torch.testing.assert_close(found.float(), attention(x, t), rtol=2**-6, atol=2**-7)


@pytest.mark.parametrize("recompute", ["all", "2", "selective"])
def test_activation_checkpointing_changes_no_number(recompute):
    for expected, found in zip(gradients(lambda m: None), gradients(lambda m: None, recompute), strict=True):
        assert torch.equal(expected, found)


def test_long_skips_round_as_their_matmul_does():
    skip, x, other = LongSkip(8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compilation.rounded_long_skip(skip, x, other), skip(x, other))


@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_upsampling_by_parts(offset):
    """In float32 against the plain form in float64; also with a mean far from zero."""
    torch.manual_seed(0)
    upsample, t = Upsample(48, 4, 2), torch.rand(3)
    for parameter in upsample.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    parts = [torch.randn(3, 2, 2, 16) * scale + offset for scale in (0.1, 1.0, 4.0)]
    found = compilation.upsample_by_parts(upsample, parts, t)
    exact = upsample.double()([part.double() for part in parts], t.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3 if offset else 1e-5)


@pytest.mark.parametrize(("height", "off"), [(16, False), (9, True)])
def test_cudnn_attention_is_off_where_it_is_wrong(monkeypatch, height, off):
    """At 64 tokens modulo 128: 1 + 9 x 7, not 1 + 16 x 7."""
    calls = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    stage = StageSpec("TransformerBlock", 8, 1, 8, patch_size=1, max_height=height, max_width=7, num_heads=1)
    nnet = DiMR([stage], n_classes=5)
    compile_network(nnet.to("meta"), "off")  # any device but a CPU
    assert calls == [False] * off


# --- The depthwise convolution as one operation ---


@pytest.mark.parametrize("size", [(2, 5, 9, 6, 7), (3, 4, 4, 5, 1), (1, 2, 3, 4, 5)])
def test_as_one_operation_it_has_pytorchs_gradients(size):
    torch.manual_seed(0)
    *shape, k = size
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1], 1, k, k, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (x, weight)]
    expected, found = compilation.as_image_convolution(*leaves), compilation.depthwise_conv(*leaves)
    assert torch.equal(found, expected)
    along = torch.randn(found.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(found, leaves, along)
    for ours, pytorchs in zip(gradients, torch.autograd.grad(expected, leaves, along), strict=True):
        torch.testing.assert_close(ours, pytorchs, rtol=1e-12, atol=1e-12)
    for i, leaf in enumerate(leaves):  # with the other frozen
        alone = compilation.depthwise_conv(*(other if other is leaf else other.detach() for other in leaves))
        gradient = torch.autograd.grad(alone, leaf, along)[0]
        assert torch.equal(gradient, gradients[i]) and gradient.stride() == leaf.stride()


def test_in_bfloat16_the_gradient_of_the_weights_is_summed_in_float32():
    torch.manual_seed(0)
    x, weight, along = torch.randn(8, 16, 16, 6), torch.randn(6, 1, 7, 7), torch.randn(8, 16, 16, 6)
    found, exact = (
        compilation.depthwise_gradients(*(a.bfloat16().to(dtype) for a in (along, x, weight)), True, True)
        for dtype in (torch.bfloat16, torch.float64)
    )
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - wanted).abs().max() <= wanted.abs().max() * 2**-8


def test_as_one_operation_it_is_registered_well():
    x, weight = torch.randn(2, 3, 4, 6), torch.randn(6, 1, 3, 3)
    torch.library.opcheck(compilation.depthwise_conv, (x.requires_grad_(), weight.requires_grad_()))
    for needed in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(compilation.depthwise_gradients, (x.detach(), x.detach(), weight.detach(), *needed))
