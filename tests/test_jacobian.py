"""Claims about cached Jacobians: what they hold, what training from them is equal to, and what they take."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import Case, make
from run_cases import config, same, silent, weights

from alignscale.choices import ConvConfig, MLPConfig, NetConfig, RNNConfig, SGDConfig, SyntheticConfig
from alignscale.config import JACOBIANS, CalibrationConfig, EvaluationConfig, JacobianConfig
from alignscale.jacobian.explicit import encoded, jacobians
from alignscale.jacobian.form import Form, bytes_of
from alignscale.learner import Learner
from alignscale.nets import build
from alignscale.nets.network import contract
from alignscale.results import Result
from alignscale.train import train

FEED_FORWARD = [
    Case(net, norm, activation)
    for net in ("mlp", "conv3", "conv_stride4")
    for norm in ("none", "calibrated")
    for activation in ("relu", "gelu", "tanh", "erf")
]
IMAGENET = (ConvConfig(name="imagenet_conv7", width=512, strides=[4, 2, 1, 2, 1, 2, 1]), (3, 224, 224), 1000)
DEEP = (MLPConfig(width=4096, depth=8), (3, 32, 32), 10)


@pytest.mark.parametrize("case", FEED_FORWARD, ids=str)
def test_an_explicit_jacobian_is_that_of_autograd(case: Case) -> None:
    built = make(case)
    frozen, caught = built.fixed.frozen, []
    hooks = [norm.register_forward_hook(lambda *call: caught.append(call[2][0])) for norm in built.net.norms]
    own = [frozen.parameters(index)[0].clone().requires_grad_() for index in range(len(built.net.layers))]
    logits = built.net.trace(built.batch.images, lambda index: (own[index], frozen.parameters(index)[1])).logits
    for hook in hooks:
        hook.remove()
    found = jacobians(frozen, frozen.trace(built.batch.images), range(len(caught)))
    for label in range(logits.shape[1]):
        expected = torch.autograd.grad(logits[:, label].sum(), caught, retain_graph=True)
        for site, one in enumerate(expected):
            torch.testing.assert_close(found[site][:, label], one, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", FEED_FORWARD[::3], ids=str)
def test_layers_may_differ_in_form(case: Case) -> None:
    built = make(case)
    net, frozen = built.net, built.fixed.frozen
    trace = frozen.trace(built.batch.images)
    error = torch.randn(trace.logits.shape, dtype=torch.float64)
    for sites in (("explicit", "gates"), ("gates", "explicit")):
        form = Form((*sites, *["gates"] * len(net.shapes))[: len(net.shapes)], "fp64", "fp64")
        explicit = [site for site, kind in enumerate(form.sites) if kind == "explicit"]
        rows = form.rows(net, trace, jacobians(frozen, trace, explicit))
        cached = form.cached(net, rows, built.batch.images)
        for one, other in zip(frozen.pullback(error, cached), frozen.pullback(error, trace), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
        assert cached.inputs is not None
        assert all(torch.equal(one, other) for one, other in zip(cached.inputs, trace.inputs, strict=True))


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 0.004), ("fp16", 0.0005), ("fp8", 0.07)])
def test_a_narrow_dtype_keeps_each_example_and_class_to_its_precision_at_any_scale(dtype: str, error: float) -> None:
    exact = torch.randn(6, 5, 200) * 10.0 ** torch.linspace(-12, 12, 6)[:, None, None]
    exact[0, 0] = 0.0
    narrow = encoded(exact, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}[dtype])
    for label in range(5):
        unit = torch.zeros(6, 5)
        unit[:, label] = 1.0
        difference = (contract(narrow, unit) - exact[:, label]).abs().amax(1)
        assert (difference <= error * exact[:, label].abs().amax(1)).all()


def test_gates_of_the_same_batches_train_to_the_bits_of_live_ones() -> None:
    for rule in ("align_ada", "align_zero"):
        live, cached = (Learner("mlp", (3, 4, 4), 10, rule, SGDConfig(lr=0.3), seed=3) for _ in range(2))
        form = Form(("gates",) * 3, "fp32", "fp32")
        generator = torch.Generator().manual_seed(0)
        for step in range(20):
            images, labels = torch.randn(13, 3, 4, 4, generator=generator), torch.arange(13) % 10
            batch = live.encoding.batch(live._examples(images, labels, "train", 13), torch.arange(13), step)
            trace = cached.fixed.frozen.trace(batch.images)
            held = form.cached(cached.net, form.rows(cached.net, trace, {}), batch.images)
            assert live.update([batch], 0.3) == cached.update([replace(batch, cached=held)], 0.3)
        assert same(live.net.state_dict(), cached.net.state_dict())


def trained(folder: Path, form: str, net: NetConfig, rule: str, cache: Path, **changes: object) -> tuple[Result, Path]:
    """A run of 60 updates with the Jacobian in this form, from a cache that is made when it is missing."""
    options = {"net": net, "data": SyntheticConfig(shape=[2, 8, 8], train=107, test=31, classes=4, noise=0.5)}
    options |= {"optim": SGDConfig(lr=0.3), "epochs": 10, "evaluation": EvaluationConfig(["train"])}
    options |= {"calibration": CalibrationConfig(40), "jacobian": cached_in(cache, form)} | changes
    run = config(folder, rule, **options)
    return train(run, silent), folder


def cached_in(folder: Path, form: str, **changes: object) -> JacobianConfig:
    return replace(JACOBIANS[form], root=str(folder), build=True, **changes)


def losses(result: Result) -> torch.Tensor:
    return torch.tensor([point["train_end_loss"] for point in result["runs"][0]["curve"]])


SMALL: dict[str, NetConfig] = {
    "mlp": MLPConfig(width=40, depth=3),
    "tanh": MLPConfig(width=40, depth=2, activation="tanh", norm="calibrated"),
    "conv3": ConvConfig(name="conv3", width=8, norm="none", gain=1.4),
    "conv7": ConvConfig(name="conv7", width=6, strides=[1, 1, 1, 2, 1, 2, 1], norm="calibrated"),
    "gelu": ConvConfig(name="conv3", width=8, norm="none", gain=1.4, activation="gelu"),
    "rnn": RNNConfig(width=24),
    "rnn_calibrated": RNNConfig(width=24, norm="calibrated"),
}


@pytest.mark.parametrize("rule", ["align_ada", "align_zero"])
@pytest.mark.parametrize("name", SMALL)
def test_every_form_trains_to_the_live_result(tmp_path: Path, name: str, rule: str) -> None:
    live, _ = trained(tmp_path / "live", "live", SMALL[name], rule, tmp_path)
    for form in ("gates",) if "rnn" in name else ("gates", "explicit", "auto"):
        result, _ = trained(tmp_path / form, form, SMALL[name], rule, tmp_path / "cache")
        torch.testing.assert_close(losses(result), losses(live), rtol=1e-5, atol=1e-7)
        cosines = [[point["update_cosine"] for point in one["runs"][0]["curve"]] for one in (result, live)]
        torch.testing.assert_close(torch.tensor(cosines[0]), torch.tensor(cosines[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", [
    {"data": SyntheticConfig(shape=[2, 8, 8], train=107, test=31, classes=4, views=3, shift=1, flip=True)},
    {"accumulation": 3}, {"precision": "bf16"}, {"precision": "fp64"}, {"net": MLPConfig(width=40, blocks="theory")},
    {"data": SyntheticConfig(shape=[2, 8, 8], train=107, test=31, classes=4, normalisation="channel", train_limit=64)},
], ids=["views", "parts", "bf16", "fp64", "plain", "channel"])  # fmt: skip
def test_views_parts_precisions_and_normalisation_are_cached_too(tmp_path: Path, changes: dict[str, object]) -> None:
    options = {"net": MLPConfig(width=40)} | changes
    net = options.pop("net")
    live, _ = trained(tmp_path / "live", "live", net, "align_zero", tmp_path, **options)
    for form, dtype in (("gates", "fp32"), ("explicit", "fp64" if changes.get("precision") == "fp64" else "fp32")):
        jacobian = cached_in(tmp_path / "cache", form, dtype=dtype, inputs=dtype)
        result, _ = trained(tmp_path / form, form, net, "align_zero", tmp_path, **options, jacobian=jacobian)
        near = 2e-2 if changes.get("precision") == "bf16" else 1e-5
        torch.testing.assert_close(losses(result), losses(live), rtol=near, atol=1e-7)


@pytest.mark.parametrize("tier", ["host", "disk", "device"])
def test_the_tiers_give_the_same_bits(tmp_path: Path, tier: str) -> None:
    first = trained(tmp_path / "auto", "explicit", SMALL["mlp"], "align_zero", tmp_path / "cache")[1]
    jacobian = cached_in(tmp_path / "cache", "explicit", tier=tier)
    other = trained(tmp_path / tier, "explicit", SMALL["mlp"], "align_zero", tmp_path, jacobian=jacobian)[1]
    assert same(weights(first), weights(other))


@pytest.mark.parametrize("inputs", ["bf16", "recomputed"])
def test_initial_layer_inputs_may_be_rounded_or_recomputed(tmp_path: Path, inputs: str) -> None:
    live, _ = trained(tmp_path / "live", "live", SMALL["mlp"], "align_zero", tmp_path)
    for form in ("gates", "explicit"):
        jacobian = cached_in(tmp_path / "cache", form, inputs=inputs)
        result, _ = trained(tmp_path / form, form, SMALL["mlp"], "align_zero", tmp_path, jacobian=jacobian)
        near = 1e-5 if inputs == "recomputed" else 1e-2
        torch.testing.assert_close(losses(result), losses(live), rtol=near, atol=1e-6)


def test_logits_after_100_steps_equal_those_of_live_to_1e_5() -> None:
    live, cached = (Learner(MLPConfig(width=256), (1, 8, 8), 10, "align_ada", SGDConfig(lr=0.3)) for _ in range(2))
    images, labels = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 10
    batch = live.encoding.batch(live._examples(images, labels, "train", 50), torch.arange(50), 0)
    form, frozen = Form(("explicit",) * 3, "fp32", None), cached.fixed.frozen
    trace = frozen.trace(batch.images)
    held = form.cached(cached.net, form.rows(cached.net, trace, jacobians(frozen, trace, range(3))), batch.images)
    for _ in range(100):
        live.update([batch], 0.3)
        cached.update([replace(batch, cached=held)], 0.3)
    one, other = (learner.net(images) for learner in (live, cached))
    assert (one - other).norm() < 1e-5 * one.norm()


def outline(config: NetConfig, shape: tuple[int, ...], classes: int) -> Callable[[Form], int]:
    """Bytes that an example takes in a form, of a network without weights."""
    with torch.device("meta"):
        net = build(config, shape, classes)
        trace = net.trace(torch.zeros(1, *shape))
    return lambda form: bytes_of(form.layout(net, classes, [tuple(one.shape[1:]) for one in trace.inputs]))


def test_sizes_are_those_of_the_formats() -> None:
    size = outline(*IMAGENET)
    gates = Form(("gates",) * 7, "fp32", None)
    units = 512 * (56**2 + 28**2 + 28**2 + 14**2 + 14**2 + 7**2 + 7**2)
    assert size(gates) == units / 8
    assert size(replace(gates, sites=("explicit",) * 7, dtype="bf16")) == 2 * 1000 * units
    assert size(replace(gates, inputs="bf16")) - size(gates) == 2 * (units - 512 * 7 * 7 + 512)
    size = outline(*DEEP)
    assert size(Form(("gates",) * 8, "fp32", None)) == 8 * 4096 / 8
    assert size(Form(("explicit",) * 8, "bf16", None)) == 2 * 10 * 8 * 4096
    assert size(Form(("explicit",) * 8, "fp8", None)) == 10 * 8 * 4096 + 8 * 10 * 4


def test_other_rules_read_no_cache(tmp_path: Path) -> None:
    train(config(tmp_path / "run", "backprop", jacobian=replace(JACOBIANS["gates"], root=str(tmp_path))), silent)
    assert not list(tmp_path.glob("*gates*"))
