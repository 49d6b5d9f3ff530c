"""Show what a checkpoint holds, from any number of ranks and any ZeRO stage, on one CPU process; export its weights.

    python tools/show_checkpoint.py runs/my-run --checkpoint best
    python tools/show_checkpoint.py runs/my-run --export weights.safetensors
    python tools/show_checkpoint.py runs/my-run --export-universal for-deepspeed

Every file is compared with its checksum first. Nothing is unpickled: checkpoints are safetensors and JSON.
"""

import argparse
import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from argument_types import ended, new_file, write_json
from safetensors.torch import save
from torch import Tensor

from alignscale import checkpoint
from alignscale.checkpoint import CheckpointError
from alignscale.files import write_atomic

UNIVERSAL = {"ds_version": "0.19.8", "universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
"""Whose universal format is written."""


def rows(manifest: dict[str, Any], tensors: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per tensor: part, name, shape, dtype, norm, whether all numbers are finite."""
    return [
        {
            "part": part, "name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."),
            "norm": tensor.double().norm().item(), "finite": bool(tensor.isfinite().all()),
        }
        for part, named in tensors.items()
        for name, tensor in sorted(named.items(), key=lambda pair: _place(pair[0]))
    ]  # fmt: skip


def _place(name: str) -> list[str]:
    """By which names are in the order of layers, whichever ranks wrote them."""
    return [word.zfill(9) if word.isdecimal() else word for word in name.split(".")]


def universal(folder: Path, tag: str, step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """DeepSpeed's universal checkpoint ``folder/tag`` of weights and optimizer, and ``folder/latest_universal``.

    For ``engine.load_checkpoint(folder, load_lr_scheduler_states=False)`` with ``checkpoint: {load_universal: true}``,
    any number of ranks and ZeRO stage 1 or 2, with Adam 3; weights have the names of ``Network.named_parameters()``.
    A weight that did not learn has states of 0; norms' moments and optimizer settings are not in it.
    Raises CheckpointError for a checkpoint of coefficients or a tag that is there, OSError where it cannot be written.
    """
    weights = {name: tensor for name, tensor in tensors["model"].items() if name.startswith("layers.")}
    states = {name: tensor for name, tensor in tensors["optimizer"].items() if not name.endswith(".step")}
    if strange := sorted(name for name in states if name.rsplit(".", 1)[0] not in weights):
        raise CheckpointError(
            f"expected states of weights, found {strange[0]}: form=dual trains none, so DeepSpeed cannot go on with "
            "them; --export writes the weights alone"
        )
    if (folder / tag).exists():
        raise CheckpointError(f"{folder / tag}: expected no checkpoint of that name yet; choose another folder")
    steps = next(
        (one for name, one in tensors["optimizer"].items() if name.endswith(".step")), torch.tensor(float(step))
    )
    partial = folder / f".{tag}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        files: dict[str, Any] = {}
        for name, weight in weights.items():
            files |= {f"zero/{name}/fp32.pt": {"param": weight}, f"zero/{name}/step.pt": steps}
            for key in {name.rsplit(".", 1)[1] for name in states}:
                state = states.get(f"{name}.{key}", torch.zeros_like(weight))
                files[f"zero/{name}/{key}.pt"] = {"param": state}
        whole = {"state": {0: {"step": steps}}, "param_groups": [{}]}
        files["zero/optimizer_state.pt"] = {**UNIVERSAL, **whole, "optimizer_state_dict": whole}
        progress = {"global_steps": step, "skipped_steps": 0, "dp_world_size": 1, "mp_world_size": 1, "module": None}
        for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):  # stages 1 and 2, stage 3
            files[f"{name}_model_states.pt"] = {**UNIVERSAL, **progress}
        for name, content in files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            whole_file = io.BytesIO()
            torch.save(content, whole_file)
            write_atomic(path, whole_file.getvalue())
        partial.rename(folder / tag)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    write_atomic(folder / "latest_universal", tag.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Show a run's checkpoint, and export its weights.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint's")
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last, best or a step (default: last)")
    parser.add_argument("--export", type=new_file, metavar="FILE.safetensors", help="write the weights and norms here")
    parser.add_argument("--export-universal", type=Path, metavar="FOLDER", help="weights and optimizer for DeepSpeed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    options = parser.parse_args(arguments)
    try:
        whole = (options.run / checkpoint.MANIFEST).is_file()
        if not whole and not (options.run / "checkpoints").is_dir():
            raise CheckpointError(f"{options.run}: expected a run's folder, or a checkpoint's, found neither")
        path = options.run.resolve() if whole else checkpoint.find(options.run / "checkpoints", options.checkpoint)
        for target in filter(None, (options.export, options.export_universal, options.json)):
            if target.resolve().is_relative_to(path.resolve()):
                raise CheckpointError(
                    f"{target}: expected a place outside of the checkpoint {path}, which must stay whole"
                )
        if options.export and options.export.suffix != ".safetensors":
            raise CheckpointError(
                f"{options.export}: expected a name that ends in .safetensors, the format of the export"
            )
        manifest = checkpoint.read_manifest(path)
        tensors = {part: checkpoint.read(path, manifest, part) for part in checkpoint.parts(manifest)}
        found = rows(manifest, tensors)
        print(f"{path}: after step {manifest['step']}, initial network {manifest['fingerprint']}")
        print(f"made with: {', '.join(f'{key} {value}' for key, value in manifest['made_with'].items())}")
        for row in found:
            odd = "" if row["finite"] else "  NOT FINITE"
            print(f"{row['part']:10s} {row['name']:34s} {row['dtype']:8s} {row['shape']!s:20s} {row['norm']:.6g}{odd}")
        if options.export:
            about = {"step": str(manifest["step"]), "fingerprint": manifest["fingerprint"]}
            write_atomic(options.export, save(tensors["model"], about))
        if options.export_universal:
            universal(options.export_universal, path.name, manifest["step"], tensors)
        write_json(options.json, found)
        for target in filter(None, (options.export, options.export_universal, options.json)):
            print(f"written: {target}")
    except (CheckpointError, OSError) as problem:
        print(f"show_checkpoint: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    ended(main)
