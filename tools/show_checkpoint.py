"""Show what a checkpoint holds, from any number of ranks and any ZeRO stage, on one CPU process; export its weights.

    python tools/show_checkpoint.py runs/my-run --checkpoint best
    python tools/show_checkpoint.py runs/my-run --export weights.safetensors

Every file is compared with its checksum first. Nothing is unpickled: checkpoints are safetensors and JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import save

from alignscale import checkpoint
from alignscale.checkpoint import CheckpointError
from alignscale.files import write_atomic


def rows(manifest: dict[str, Any], tensors: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per tensor: part, name, shape, dtype, norm, whether all numbers are finite."""
    return [
        {
            "part": part, "name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."),
            "norm": tensor.double().norm().item(), "finite": bool(tensor.isfinite().all()),
        }
        for part, named in tensors.items()
        for name, tensor in named.items()
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Show a run's checkpoint, and export its weights.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint's")
    parser.add_argument("--checkpoint", default="last", metavar="WHICH", help="last, best or a step (default: last)")
    parser.add_argument("--export", type=Path, metavar="FILE.safetensors", help="write the weights and norms here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    options = parser.parse_args(arguments)
    try:
        whole = (options.run / checkpoint.MANIFEST).is_file()
        path = options.run if whole else checkpoint.find(options.run / "checkpoints", options.checkpoint)
        manifest = checkpoint.read_manifest(path)
        tensors = {part: checkpoint.read(path, manifest, part) for part in ("model", "optimizer")}
        found = rows(manifest, tensors)
        print(f"{path}: after step {manifest['step']}, initial network {manifest['fingerprint']}")
        print(f"made with: {', '.join(f'{key} {value}' for key, value in manifest['made_with'].items())}")
        for row in found:
            odd = "" if row["finite"] else "  NOT FINITE"
            print(f"{row['part']:10s} {row['name']:28s} {row['dtype']:8s} {row['shape']!s:20s} {row['norm']:.6g}{odd}")
        if options.export:
            about = {"step": str(manifest["step"]), "fingerprint": manifest["fingerprint"]}
            write_atomic(options.export, save(tensors["model"], about))
        if options.json:
            write_atomic(options.json, (json.dumps(found, indent=1) + "\n").encode())
    except (CheckpointError, OSError) as problem:
        print(f"show_checkpoint: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
