"""The data sets that are chosen by name, as dataclasses, read while training goes on or held in memory.

Stands alone (no torch) beside choices.py, which has all other choices and these as well.
"""

from dataclasses import dataclass, field


@dataclass
class DataConfig:
    """A data set by name; its classes and shape come from the data.

    ``train_limit``: keep that many training examples (0: all), as many of each class as of any other as far as they
    go; a smaller limit keeps some of a larger one's, and the test set stays whole. ``validation``: so many of the
    training examples become a split of their own, before the limit; at any limit and seed the same ones.
    ``normalisation``: ``none`` (pixels in [0, 1]), ``channel`` (the training set's mean 0 and deviation 1), or
    ``imagenet`` (the usual mean and deviation of ImageNet's channels).
    ``views``: epoch t trains on view t mod ``views`` of each example. View 0 is the example itself; in each other view
    it is moved by at most ``shift`` pixels and, with ``flip``, mirrored half of the time, always in the same way.
    """

    name: str
    train_limit: int = 0
    validation: int = 0
    normalisation: str = "none"
    views: int = 1
    shift: int = 0
    flip: bool = False


@dataclass
class DigitsConfig(DataConfig):
    """scikit-learn's handwritten digits, 1437 for training and 360 for testing."""

    name: str = "digits"


@dataclass
class SyntheticConfig(DataConfig):
    """Noisy class prototypes of any shape (channels, height, width), drawn from ``seed``."""

    name: str = "synthetic"
    shape: list[int] = field(default_factory=lambda: [3, 16, 16])
    classes: int = 10
    train: int = 2000
    test: int = 500
    noise: float = 1.0
    seed: int = 0


@dataclass
class AddConfig(DataConfig):
    """Random bits x_t, and at each step the target 1/2 + x_{t-a} / 2 - x_{t-b} / 4 with ``delays`` [a, b].

    It wants net=rnn net.readout=every loss=mse, whose ``centred`` is of labels alone. Before the first step x is 0.
    ``public``: as the paper's public code has it, where x wraps around in time and is 0 in the first a (b) EXAMPLES. An
    output is right if it is within 1/8 of its target, which is half of the least difference between two targets.
    """

    name: str = "add"
    steps: int = 20
    delays: list[int] = field(default_factory=lambda: [2, 5])
    train: int = 1000
    test: int = 500
    public: bool = False
    seed: int = 0


@dataclass
class ArchiveConfig(DataConfig):
    """CIFAR-10, CIFAR-100, MNIST or KMNIST in the files of their authors, below ``root`` as torchvision lays them out.

    ``verify``: each file must have the checksum of the published one; without it any files of the format will do.
    docs/data.md says where to get them.
    """

    name: str = "cifar10"
    root: str = "data"
    verify: bool = True
    normalisation: str = "channel"


@dataclass
class ImageFolderConfig(DataConfig):
    """Image files ``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val``), held in memory.

    Each is scaled until its shorter side has ``size`` pixels, then cropped to the central square. ``channels``: 3
    (colour) or 1 (grey). ``skip_undecodable``: leave out, and count, files that hold no readable image.
    """

    name: str = "imagefolder"
    root: str = "data/imagefolder"
    size: int = 64
    channels: int = 3
    skip_undecodable: bool = False
    normalisation: str = "channel"


@dataclass
class StreamedConfig(DataConfig):
    """What is common to data that is read while training goes on: decoded, cropped and scaled to ``size`` pixels.

    View 0 of an example, which evaluation takes, is the central square of its image scaled until the shorter side has
    ``resize`` pixels. In any other view a random part of the image, of ``scale`` of its area and 3/4 to 4/3 as wide as
    high, is scaled to the square, and with ``flip`` mirrored half of the time. ``views``: 0 is another view in each
    epoch; otherwise epoch t trains on view t mod ``views``. ``first_size``: training begins with squares of so many
    pixels, which grow to ``size`` from epoch growth[0] to epoch growth[1], in steps of 32 (0: ``size`` throughout).
    ``transform``: the name of one of torchvision's transforms, such as TrivialAugmentWide or RandAugment, that is
    applied to all views but 0. ``streams``: places in the data that are read from in turn; ``block``: so many
    neighbours are mixed in each. ``workers``: processes that read and decode (0: this one); ``worker_restarts``: how
    often one that was killed is started again.
    """

    name: str
    size: int = 224
    resize: int = 256
    first_size: int = 0
    growth: list[int] = field(default_factory=lambda: [0, 0])
    channels: int = 3
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    transform: str = ""
    streams: int = 16
    block: int = 1024
    workers: int = 2
    worker_restarts: int = 3
    views: int = 0
    flip: bool = True
    normalisation: str = "imagenet"

    def pixels(self, view: int) -> int:
        """The size of the squares of a view, which is that of epoch view - 1 where they grow."""
        begin, end = self.growth
        if not self.first_size or not 0 < view <= end:
            return self.size
        more = max(view - 1 - begin, 0) / (end - begin) * (self.size - self.first_size)
        return min(self.first_size + round(more / 32) * 32, self.size)


@dataclass
class WebDatasetConfig(StreamedConfig):
    """Shards of images, tars with a manifest: files or URLs, as ``a/train-{000000..000146}.tar``.

    ``manifest``, ``test_manifest``: where the manifests are if not beside the shards, as a/train.manifest.json.
    ``checksums``: CRC-32 of each image read: of ``remote`` shards, ``always`` or ``never``. A read that fails is tried
    ``retries`` more times; it fails after ``timeout`` seconds without a byte. ``skip``: so many images of each shard
    may be damaged; they are left out and counted. ``cache``: a folder for remote shards, of at most ``cache_gib``.
    """

    name: str = "webdataset"
    urls: str = ""
    test_urls: str = ""
    manifest: str = ""
    test_manifest: str = ""
    checksums: str = "remote"
    retries: int = 3
    timeout: float = 30.0
    skip: int = 0
    cache: str = ""
    cache_gib: float = 100.0


@dataclass
class FFCVConfig(StreamedConfig):
    """FFCV files ``path``, for training, and ``test_path``, made by tools/make_shards.py; ``workers``: its threads."""

    name: str = "ffcv"
    path: str = ""
    test_path: str = ""


DATA: dict[str, DataConfig] = {
    "digits": DigitsConfig(),
    "synthetic": SyntheticConfig(),
    "add": AddConfig(),
    **{name: ArchiveConfig(name=name) for name in ("cifar10", "cifar100", "kmnist", "mnist")},
    "imagefolder": ImageFolderConfig(),
    "webdataset": WebDatasetConfig(),
    "ffcv": FFCVConfig(),
}
