"""Claims about the alignment of trained runs: both ways to Sigma, the live numbers, movement, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import alignment as tool
import pytest
import torch
from run_cases import config, silent
from safetensors.torch import load_file, save_file
from tangent_kernel import label_alignment, tangent

from alignscale import checkpoint
from alignscale.checkpoint import complete, sealed
from alignscale.choices import AddConfig, ConvConfig, MLPConfig, MSEConfig, RNNConfig, SGDConfig
from alignscale.config import AnalysisConfig, LogConfig, TrainConfig
from alignscale.nets import build
from alignscale.restore import restored
from alignscale.train import train

TRACKED = AnalysisConfig(track_errors=True)


def tracked(folder: Path, rule: str = "backprop", **changes: object) -> TrainConfig:
    return config(folder, rule, precision="fp64", analysis=TRACKED, **changes)


@pytest.mark.parametrize("rule", ["backprop", "align_ada", "align_zero"])
def test_sigma_from_the_summed_errors_is_that_of_the_driven_network(rule: str, tmp_path: Path) -> None:
    options = tracked(tmp_path / "run", rule)
    options.optim.momentum = 0.0  # type: ignore[attr-defined]
    train(options, silent)
    for layer in tool.analyse(tmp_path / "run", "last", replay=True, sample=20)["layers"]:
        assert layer["definition"] == pytest.approx(layer["frozen_network"], abs=1e-6)
        if rule == "align_zero":  # which makes just these changes
            assert layer["definition"] == pytest.approx(1, abs=1e-9)


def test_a_convolution_with_calibrated_norms_too(tmp_path: Path) -> None:
    net = ConvConfig(name="conv3", width=6, strides=[1, 2], norm="calibrated")
    options = tracked(tmp_path / "run", net=net)
    options.calibration.examples, options.optim.momentum = 50, 0.0  # type: ignore[attr-defined]
    train(options, silent)
    for layer in tool.analyse(tmp_path / "run", "last", replay=True, sample=20)["layers"]:
        assert layer["definition"] == pytest.approx(layer["frozen_network"], abs=1e-6)


def test_a_resumed_run_has_summed_the_same_errors(tmp_path: Path) -> None:
    train(tracked(tmp_path / "whole"), silent)
    options = tracked(tmp_path / "parts")
    options.checkpoint.every_steps, options.checkpoint.keep = 1, 50
    train(options, silent)
    kept = checkpoint.complete(tmp_path / "parts/checkpoints")
    for path in kept[7:]:
        shutil.rmtree(path)
    (tmp_path / "parts/result.json").unlink()
    train(options, silent)
    first, second = (
        load_file(checkpoint.complete(tmp_path / name / "checkpoints")[-1] / "errors.safetensors")["sums"]
        for name in ("whole", "parts")
    )
    assert torch.equal(first, second)
    assert first.abs().min() > 0


def test_a_replay_of_another_training_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even where a wide network hardly moves."""
    wide = {"net": MLPConfig(width=512, depth=2), "optim": SGDConfig(lr=0.1), "epochs": 1}
    train(config(tmp_path / "run", **wide), silent)
    train(config(tmp_path / "other", "feedback_alignment", **wide), silent)
    assert tool.main([str(tmp_path / "run"), "--replay"]) == 0
    (path,) = complete(tmp_path / "run/checkpoints")[-1:]
    (other,) = complete(tmp_path / "other/checkpoints")[-1:]
    manifest, strange = (json.loads((one / "manifest.json").read_text()) for one in (path, other))
    shutil.copy(other / "model.safetensors", path)
    manifest["files"]["model.safetensors"] = strange["files"]["model.safetensors"]
    (path / "manifest.json").write_text(json.dumps(sealed(manifest)))
    assert tool.main([str(tmp_path / "run"), "--replay"]) == 2
    assert "of its change away from its checkpoint at step 6; expected the same weights" in capsys.readouterr().err


def test_a_replay_decays_towards_the_start_as_the_run_does(tmp_path: Path) -> None:
    optim = SGDConfig(lr=0.5, weight_decay=0.3, decay_towards="initial")
    train(tracked(tmp_path, "align_zero", optim=optim), silent)
    row = tool.analyse(tmp_path, "last", True, 20)
    assert [layer["frozen_network"] for layer in row["layers"]] == pytest.approx([1, 1, 1], abs=1e-6)


def test_a_readout_at_every_time_is_analysed_without_a_kernel(tmp_path: Path) -> None:
    options = {
        "net": RNNConfig(width=16, readout="every"),
        "data": AddConfig(train=40, test=10),
        "loss": MSEConfig(centred=False),
    }
    train(config(tmp_path, "align_ada", **options, analysis=TRACKED, epochs=1), silent)
    row = tool.analyse(tmp_path, "last", False, 20)
    assert all(layer["definition"] is not None for layer in row["layers"][:2])
    assert "kernel_change" not in row


def test_live_numbers_are_those_of_the_tool(tmp_path: Path) -> None:
    options = tracked(tmp_path / "run")
    options.log = LogConfig(progress=False, alignment_every=18, alignment_examples=0)
    train(options, silent)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (estimated,) = [row for row in rows if row["kind"] == "alignment"]
    live = [row for row in rows if row["kind"] == "epoch"][-1]
    assert 0 < estimated["alignment_error"] < 0.1
    assert abs(estimated["alignment"] - live["alignment"]) < 5 * estimated["alignment_error"]
    layers = tool.analyse(tmp_path / "run", "last", replay=False, sample=20)["layers"]
    for number in (1, 2):
        assert live[f"alignment_layer{number}"] == pytest.approx(layers[number - 1]["definition"], rel=1e-12)
    assert live["weight_change"] > 0


def test_the_linearisation_is_autograd_s() -> None:
    net = build(MLPConfig(width=5, depth=2, activation="tanh"), (1, 2, 2), 3).double()
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in net.parameters()]
    change = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in net.parameters()]
    images = torch.randn(4, 1, 2, 2, generator=generator, dtype=torch.float64)
    names = [name for name, _ in net.named_parameters()]

    def logits(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (images,))

    found = tangent(net, lambda i: (weights[2 * i], weights[2 * i + 1]), images, [change[i : i + 2] for i in (0, 2, 4)])
    values = [value.requires_grad_() for value in weights]
    grads = [[torch.autograd.grad(one, values, retain_graph=True) for one in row] for row in logits(*values)]
    jacobian = torch.stack([torch.stack([torch.cat([g.flatten() for g in one]) for one in row]) for row in grads])
    expected = jacobian @ torch.cat([one.flatten() for one in change])
    assert torch.allclose(found.moved, expected, rtol=1e-10)  # type: ignore[arg-type]
    assert torch.allclose(found.kernel, torch.einsum("acp,bcp->ab", jacobian, jacobian) / 3, rtol=1e-10)


def test_a_kernel_of_the_labels_is_aligned_with_them() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1])
    ideal = torch.nn.functional.one_hot(labels, 3).double() - 1 / 3
    assert label_alignment(ideal @ ideal.T, labels, 3) == pytest.approx(1)
    assert label_alignment(torch.eye(5).double(), labels, 3) < 0.9


def spoil(folder: Path, change: str) -> None:
    """Write a checkpoint with something wrong in it, sealed as if it had been written so."""
    (path,) = checkpoint.complete(folder / "checkpoints")[-1:]
    manifest = checkpoint.read_manifest(path)
    file = path / ("errors.safetensors" if change == "errors" else "model.safetensors")
    tensors = load_file(file)
    name = next(iter(tensors))
    if change == "nan":
        tensors[name][0] = float("nan")
    elif change == "shape" or change == "errors":
        tensors[name] = tensors[name][1:].contiguous()
    elif change == "seed":
        manifest["fingerprint"] = "0123456789abcdef"
    save_file(tensors, file)
    manifest["files"][file.name] = checkpoint.checksum(file)
    if change == "missing":
        file.unlink()
    (path / checkpoint.MANIFEST).write_text(json.dumps(checkpoint.sealed(manifest)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", "expected finite weights, found NaN or infinity at step 18; give an earlier --checkpoint"),
        ("shape", "expected the layers of this run's network, found others"),
        ("errors", "expected the errors of 107 training examples, found 106"),
        ("seed", "the checkpoint belongs to another seed"),
        ("missing", "found no file"),
    ],
)
def test_what_cannot_be_analysed_is_refused_with_the_remedy(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tracked(tmp_path / "run"), silent)
    spoil(tmp_path / "run", change)
    assert tool.main([str(tmp_path / "run"), "--json", str(tmp_path / "rows.json")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "rows.json").exists()


def test_a_run_without_errors_says_how_to_get_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = config(tmp_path / "run", "backprop")
    train(options, silent)
    assert tool.main([str(tmp_path / "run")]) == 2
    assert "--replay" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "run"), "--replay", "--threads", "1"]) == 0
    assert "frozen_network" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected the errors from the start on"):
        train(replace(options, analysis=TRACKED), silent)


def test_the_data_may_not_change_between(tmp_path: Path) -> None:
    train(tracked(tmp_path / "run"), silent)
    path = tmp_path / "run/config.yaml"
    path.write_text(path.read_text().replace("seed: 0\n", "seed: 1\n"))
    with pytest.raises(ValueError, match="seed: 0 -> 1"):
        restored(tmp_path / "run")
