"""The cache of a run: what belongs into it, made or opened.

It stands alone because the tool that makes caches and the training that reads them must ask for the same thing.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from alignscale.config import TrainConfig, as_dict
from alignscale.data.examples import Encoding, Split
from alignscale.distributed import beside
from alignscale.environment import available_memory
from alignscale.frozen import Frozen, fingerprint
from alignscale.jacobian import build
from alignscale.jacobian.files import CacheError
from alignscale.jacobian.form import Form, Layout, bytes_of
from alignscale.jacobian.identity import MADE, MANIFEST, Moments, checked, claimed, folder_of, identity, seal
from alignscale.jacobian.plan import Costs, Machine, Planner, network_speed
from alignscale.jacobian.store import Store, Wanted, missing
from alignscale.nets import build as build_net
from alignscale.parallel import Mesh
from alignscale.traffic import plan_of, wires
from alignscale.types import Batch

CHUNK, CHUNK_BYTES = 250, 2**28
SPARE = 0.8
"""The part of free memory that a cache may take."""


@dataclass(frozen=True)
class Cache:
    """Of the initial network ``frozen`` at the examples ``train`` as ``encoding`` gives them to it."""

    config: TrainConfig
    frozen: Frozen
    encoding: Encoding
    train: Split
    inputs: bool
    mesh: Mesh
    recorded: bool
    """Whether the run's steps are recorded and replayed."""

    @property
    def home(self) -> Path:
        """Where it is."""
        return folder_of(self.config, self.inputs)

    @property
    def folder(self) -> Path:
        """Where this rank's units of it are."""
        ranks = self.mesh.width.ranks
        return self.home / f"width-{ranks.rank}-of-{ranks.size}" if ranks.size > 1 else self.home

    @cached_property
    def wanted(self) -> Wanted:
        """Rows and checksums of the training examples, by shard."""
        rows = torch.tensor([int(key.rpartition("/")[2]) for key in self.train.keys(torch.arange(len(self.train)))])
        names, counts = zip(*self.train.shards, strict=True)
        parts = zip(rows.split(counts), self.train.checksums.split(counts), strict=True)
        return dict(zip(names, parts, strict=True))

    @cached_property
    def input_shapes(self) -> list[tuple[int, ...]]:
        """Of what each layer reads of an example on this rank, without a pass through the network."""
        with torch.device("meta"):
            outline = build_net(self.config.net, self.train.shape, self.train.classes, self.config.batch_size)
            trace = outline.trace(torch.zeros(1, *self.train.shape))
        shapes = [tuple(one.shape[1:]) for one in trace.inputs]
        readout = self.frozen.net.readout
        if self.mesh.width.ranks.size > 1:
            shapes[readout] = (*shapes[readout][:-1], self.frozen.net.layers[readout].shape[1])
        return shapes

    @property
    def about(self) -> dict[str, object]:
        """What the cache must have been made of."""
        net, config = self.frozen.net, self.config
        shapes = {"layers": [layer.shape for layer in net.layers], "sites": net.shapes, "classes": self.train.classes}
        digest = fingerprint(net, as_dict(config.net), config.seed, self.mesh, moments=False)
        return identity(config, digest, self.encoding, shapes)

    @property
    def moments(self) -> Moments:
        """The statistics of calibrated norms at this rank's units."""
        return {name: buffer.cpu() for name, buffer in torch.nn.ModuleList(self.frozen.net.norms).state_dict().items()}

    def layout(self, form: Form) -> Layout:
        """What an example takes in this form."""
        return form.layout(self.frozen.net, self.train.classes, self.input_shapes)

    def _form(self) -> Form:
        """As the options name it; ``auto`` leaves all but the sites to them."""
        form = Form.of(self.config.jacobian, self.frozen.net, self.inputs)
        gathered = self.config.parallel.inputs == "gathered" and self.mesh.width.ranks.size > 1
        return replace(form, gathered=bool(form.inputs and gathered))

    def make(self, show: Callable[[str], None]) -> None:
        """Make what is missing, in the form that was chosen when the cache was begun.

        Raises CacheError, or OSError for a full disk. A collective of all ranks.
        """
        everyone, about, moments = self.mesh.everyone, self.about, self.moments
        begun = all(everyone.objects((self.folder / MANIFEST).exists()))
        kept = everyone.together(lambda: checked(self.folder, about, moments) if begun else None)
        auto = self.config.jacobian.name == "auto" and not self.config.jacobian.layers
        form = everyone.objects(kept if kept and auto else self.chosen())[0]  # memory may differ
        if form.sites[0] != "live":
            layout = self.layout(form)
            everyone.together(lambda: self.tiers(layout))
            found = everyone.objects(missing(self.folder, self.wanted, self.config.data.views))
            lacking = sorted({file for files in found for file in files})  # all units of a file are made together
            if lacking and self.config.frozen.weights == "partitioned" and self.mesh.data.size > 1:
                raise CacheError(
                    "frozen.weights=partitioned: expected stored or regenerated where a cache is made, as each rank "
                    f"makes files of its own, found {len(lacking)} to make; a run then reads them with any"
                )
            size = bytes_of(layout)
            count = sum(rows for _, _, rows in lacking)
            everyone.of_first(lambda: self._check_disk(count * size * self.mesh.width.ranks.size))
        everyone.together(lambda: claimed(self.folder, about, form, moments) if self.mesh.data.first else None)
        if form.sites[0] == "live":
            show(f"cache: {self.home}: live is fastest, or the only form for this network")
            return
        where = "in all" if self.folder == self.home else "on each rank"
        show(f"cache: {self.home}: {len(lacking)} files to make, {size:,} bytes an example, {count * size:,} {where}")
        if lacking:
            parts, tied = self._source(size), seal(about, form)
            build.build(self.folder, lacking, self.frozen, form, layout, parts, self.mesh, show, tied)

    def _check_disk(self, size: int) -> None:
        there = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        half = sum(path.stat().st_size for path in self.home.rglob(".*.partial"))  # of a killed builder, which go first
        free = shutil.disk_usage(there).free + half
        if size > free:
            raise CacheError(
                f"{self.folder}: the cache takes {size / 2**30:.1f} GiB, found {free / 2**30:.1f} GiB of free disk; "
                "choose another jacobian.root or form, or a smaller jacobian.dtype"
            )

    @cached_property
    def planner(self) -> Planner:
        """The cost model, with the speeds of the first rank's machine. A collective of all ranks."""
        config, net, inputs = self.config, self.frozen.net, self.input_shapes
        device, dtype, classes = self.encoding.device, self.encoding.dtype, self.train.classes
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        part = max(-(-config.batch_size // config.accumulation // self.mesh.data.size), 1)

        def measured() -> tuple[Machine, Costs]:
            machine = Machine.measured(device, self.folder.parent)
            return machine, Costs.measured(net, inputs, part, device, dtype, machine, self.recorded)

        machine, costs = self.mesh.everyone.of_first(measured)
        machine = replace(machine, network=network_speed(self.mesh.everyone, device))
        ranks = (self.mesh.width.ranks.size, self.mesh.data.size)
        told = wires(plan_of(config, self.train.shape, classes, *ranks, dtype.itemsize))
        return Planner(net, inputs, classes, part, machine, costs, dtype.itemsize, self.inputs, told)

    def chosen(self) -> Form:
        """The form that the options name; of ``auto`` the one that the cost model finds fastest, which may be live.

        A collective of all ranks.
        """
        options, net = self.config.jacobian, self.frozen.net
        if options.name != "auto" or options.layers:
            return self._form()
        live = replace(self._form(), sites=("live",) * len(net.shapes))
        if self.config.net.norm == "batch":
            return live
        planner = self.planner  # a collective, before what one rank may fail in

        def fastest() -> Form:
            best = self.candidates()["auto"]
            return best if planner.step(best, self.tier_of(best)) < planner.step(None, "host") else live

        return self.mesh.everyone.together(fastest)

    def candidates(self) -> dict[str, Form]:
        """Gates, explicit where the net has it, and the fastest mixture of both that fits."""
        options, net = self.config.jacobian, self.frozen.net
        kinds = ("gates",) if net.recurrent or net.public else ("gates", "explicit")
        forms = {name: replace(self._form(), sites=(name,) * len(net.shapes)) for name in kinds}
        mixed = forms["gates"]
        if "explicit" in forms:
            tier = options.tier if options.tier != "auto" else ("device" if self._on_gpu else "host")
            mixed = self.planner.best(mixed, tier, self.free(tier), self.examples)
        return {**forms, "auto": mixed}

    @property
    def examples(self) -> int:
        """Rows of the whole cache."""
        return len(self.train) * self.config.data.views

    @property
    def _on_gpu(self) -> bool:
        return self.encoding.device.type == "cuda"

    def free(self, tier: str) -> float:
        """Bytes that a cache may take on a rank in ``tier``."""
        if tier == "disk":
            return float(shutil.disk_usage(self.folder.parent).free)
        device = self.encoding.device if tier == "device" else torch.device("cpu")
        return SPARE * available_memory(device) / (beside() if device.type == "cpu" else 1)

    def tier_of(self, form: Form) -> str:
        """The slowest tier that a tensor of this form is kept in."""
        tiers = set(self.tiers(self.layout(form)).values())
        return next(tier for tier in ("disk", "host", "device") if tier in tiers)

    def _source(self, size: int) -> build.Source:
        chunk = max(1, min(CHUNK, CHUNK_BYTES // max(size, 1)))

        def batches(shard: str, view: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
            rows, sums = self.wanted[shard]
            start = 0
            with closing(self.train.of_shard(shard, self.encoding, view, chunk)) as found:
                for batch in found:
                    own = slice(start, start + len(batch.keys))
                    if [int(key.rpartition("/")[2]) for key in batch.keys] != rows[own].tolist():
                        break
                    yield batch, rows[own], sums[own]
                    start = own.stop
            if start < len(rows):
                raise CacheError(
                    f"{shard}: expected all of its {len(rows)} examples for the cache, found damaged ones that were "
                    f"left out, at or behind {shard}/{int(rows[start])}; mend the shard, or use jacobian=live"
                )

        return batches

    def open(self) -> Store | None:
        """The cache, checked; None where its form is ``live``, as ``auto`` may have chosen.

        Raises CacheError where it is missing or does not fit the run. A collective of all ranks.
        """
        options, everyone, about, moments = self.config.jacobian, self.mesh.everyone, self.about, self.moments
        found = everyone.together(lambda: checked(self.folder, about, moments))
        free = options.name == "auto" and not options.layers
        asked = replace(self._form(), sites=found.sites) if free else self._form()
        if found.sites[0] == "live" and asked.sites == found.sites:
            return None
        if found != asked:
            raise CacheError(f"{self.folder}: expected a cache in the form {asked}, found {found}; {MADE}")
        layout = self.layout(found)
        tiers = everyone.together(lambda: self.tiers(layout))
        views, device, net = self.config.data.views, self.encoding.device, self.frozen.net
        which = (self.folder, net, found, self.wanted, views, tiers, device)
        checks = (options.verify, layout, seal(about, found), everyone.still)
        return everyone.together(lambda: Store(*which, *checks))

    def tiers(self, layout: Layout) -> dict[str, str]:
        """Where each tensor of a row is kept: what is cheapest to read of what fits; the smallest first.

        Raises CacheError where ``jacobian.tier`` asks for what does not fit.
        """
        asked, order = self.config.jacobian.tier, ("device", "host") if self._on_gpu else ("host",)
        free = {tier: self.free(tier) for tier in ("device", "host")}
        found = {}
        for name, row in sorted(layout.items(), key=lambda item: bytes_of(dict([item]))):
            size = self.examples * bytes_of({name: row})
            tier = asked if asked != "auto" else next((one for one in order if size <= free[one]), "disk")
            if tier != "disk":
                free[tier] -= size
                if free[tier] < 0:
                    raise CacheError(
                        f"jacobian.tier={tier}: the cache takes {self.examples * bytes_of(layout) / 2**30:.1f} GiB, "
                        f"found {self.free(tier) / 2**30:.1f} GiB for it on each rank; use jacobian.tier=auto or "
                        "disk, or another form"
                    )
            found[name] = tier
        return found
