"""ResNet (He et al. 2015) trained from a stream of pictures, in one file.

    python resnet_stream.py                     # offline: a small ResNet on handwritten digits
    python resnet_stream.py --preset imagenet   # ResNet-50 on ImageNet, streamed from the hub
    python resnet_stream.py --steps 0 --init-from microsoft/resnet-50 --predict cat.jpg dog.jpg

Pictures are decoded and cropped in threads as they arrive. A run killed at any moment goes on with
--resume, bit for bit. When it ends, its directory is a Hugging Face model.

Measured on two CPU cores: the first command reaches 99 to 100 % of the 359 held-out digits. Not
measured: cifar10 is after kuangliu/pytorch-cifar, 200 epochs, and aims at 95 %; imagenet is after
NVIDIA's DeepLearningExamples, 90 epochs, and aims at their 77.1 % top-1.

Shapes: B batch, H height, W width, C channels, S side of the square that the model sees.
"""

import dataclasses
import math
import numbers
import os
import re
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from glob import escape, glob
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal, NamedTuple

import common
from common import expect

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from datasets.data_files import SPLIT_KEYWORDS
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long metadata are no fault


@dataclasses.dataclass
class Config(common.RunConfig):
    # a recipe: other defaults for these flags
    preset: Literal["digits", "cifar10", "imagenet"] = "digits"
    # data
    data: str = "digits"  # digits (offline), a hub id, parquet or tar (file, URL, glob), a folder
    data_name: str | None = None  # configuration of a data set on the hub
    image_column: str | None = None  # column with the picture; else found by its type or name
    label_column: str | None = None  # column with the class, an int; else found by its type or name
    val_data: str | None = None  # to validate on; else data's validation or test split
    val_every: int = 10  # without either, one picture in so many is held out, never trained on
    num_classes: int | None = None  # needed where labels are bare numbers; else their names say it
    image_size: int | None = None  # side of what the model sees, S; else that of init_from, or 16
    eval_crop: float = 1.0  # share of the short side that evaluation sees; of init_from its own
    crop: Literal["pad", "resized"] = "pad"  # train on shifted pictures, or on random parts of them
    crop_pad: int = 2  # pad: shifted by at most so many pixels
    crop_area: float = 0.08  # resized: least share of the picture
    flip: bool = False  # mirror half of the pictures that are trained on
    mixup: float = 0.2  # mix pairs by Beta(mixup, mixup) (Zhang et al. 2017); 0 does not
    shuffle_buffer: int = 1_000  # pictures that are shuffled together, held as files
    # model
    depth: Literal[18, 34, 50, 101, 152] = 18  # layers; with init_from all sizes are its own
    width: int = 16  # channels after the stem; 64 is the published network
    stem: Literal["imagenet", "cifar"] = "cifar"  # 7x7 at stride 2 and a pool; for small ones 3x3
    dropout: float = 0.0  # on the pooled features
    init_from: str | None = None  # weights to start from: hub id, folder or run directory
    # training
    steps: int = 600  # optimizer steps; 0 only evaluates, or predicts, from init_from
    batch_size: int = 64  # pictures a step, over all devices
    device_rows: int = 256  # pictures that a device takes at once; more of them are microbatches
    lr: float = 0.1  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end
    cooldown: float = 0.0  # share of the steps in which a constant rate falls; 0 is a cosine
    warmup_steps: int = 50  # steps in which the rate rises in a line to lr
    momentum: float = 0.9  # of SGD, Nesterov's
    weight_decay: float = 5e-4  # on convolutions and the head, not on norms and biases
    label_smoothing: float = 0.1  # share of the target spread over all classes
    ema: float = 0.99  # decay of a mean of the weights, then evaluated and exported; 0 keeps none
    grad_clip: float = 0.0  # largest norm of the whole gradient; 0 does not clip
    seed: int = 0  # of the init, the order of the data, crops, mixup and dropout
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation, not of parameters
    remat: bool = False  # recompute each block in the backward pass: less memory, more work
    eval_batches: int = 0  # batches of validation pictures; 0 takes all
    # use
    predict: tuple[str, ...] = ()  # picture files to classify; with --steps 0


# what the two published recipes share, then each of them
PUBLISHED = {"width": 64, "flip": True, "mixup": 0.0, "ema": 0.0}
PRESETS = {
    "digits": {},
    "cifar10": PUBLISHED | {
        "data": "uoft-cs/cifar10", "shuffle_buffer": 10_000, "image_size": 32, "crop_pad": 4,
        "batch_size": 128, "steps": 78_200, "warmup_steps": 391, "label_smoothing": 0.0,
        "eval_every": 391, "ckpt_every": 1_955,
    },
    "imagenet": PUBLISHED | {
        "data": "ILSVRC/imagenet-1k", "shuffle_buffer": 5_000, "image_size": 224, "crop": "resized",
        "eval_crop": 0.875, "depth": 50, "stem": "imagenet", "dtype": "bfloat16",
        # 1,281,167 pictures / 1,024 are 1,251 steps an epoch, of which 90; 5 of them to warm up
        # (Goyal et al. 2017)
        "batch_size": 1_024, "steps": 112_590, "warmup_steps": 6_255, "lr": 1.024,
        "momentum": 0.875, "weight_decay": 2**-15, "eval_every": 6_255, "ckpt_every": 1_251,
    },
}  # fmt: skip
# flag: the preset's value that is void where this flag is given (no preset has one yet)
FORGET = {"data": "data_name"}

# flags that may change when a run goes on; another would change what its checkpoint means
MAY_CHANGE = {
    "steps", "device_rows", "lr", "min_lr", "cooldown", "warmup_steps", "momentum", "weight_decay",
    "label_smoothing", "mixup", "grad_clip", "init_from", "dropout", "remat", "eval_batches",
}  # fmt: skip


# ---- data: files -> pictures -> batches ----


class Split(NamedTuple):
    """A part of the data to read."""

    dataset: datasets.IterableDataset
    parse: Callable  # (record, classes) -> name, bytes and label of a picture, or BadPicture
    faults: dict  # arguments of common.windows: the errors to reopen after, and how often


class Pictures(NamedTuple):
    """What --data and --val-data name."""

    train: Split
    val: Split  # to validate on
    val_every: int  # where both are one split, one picture in so many is held out; else 0
    classes: list  # their names; [] until main takes those of --init-from
    facts: dict  # what a resume must find again


def open_pictures(cfg):
    """The Pictures of --data and --val-data. Raises UsageError."""
    old_facts = common.read_run(cfg.out_dir)["facts"] if cfg.resume else {}
    commit = old_facts.get("commit")
    splits, facts, classes = open_one("--data", cfg.data, cfg.data_name, commit, cfg)
    val_splits = splits
    if cfg.val_data:
        commit = old_facts.get("val commit")
        val_splits, more, others = open_one("--val-data", cfg.val_data, None, commit, cfg)
        why = f"its classes are {brief(others)}; those of --data are {brief(classes)}"
        expect(others == classes, f"--val-data {cfg.val_data}: {why}")
        facts |= {f"val {name}": fact for name, fact in more.items()}
    n = cfg.num_classes
    classes = classes or [str(i) for i in range(n or 0)]
    is_known = classes or cfg.init_from
    expect(is_known, f"--num-classes: needed, for {cfg.data} does not name its classes")
    expect(n in (None, len(classes)), f"--num-classes {n}: the data have {brief(classes)}")
    name = next(name for name in ("validation", "test", "train") if name in val_splits)
    is_one_split = name == "train" and not cfg.val_data
    return Pictures(
        train=splits["train"],
        val=val_splits[name],
        val_every=cfg.val_every if is_one_split else 0,
        classes=classes,
        facts=facts | {"classes": common.digest(classes)},
    )


def open_one(flag, name, configuration, commit, cfg):
    """({its name: Split}, facts for a resume, names of the classes) of what a flag names."""
    with common.usage_errors(f"{flag} {name}"):
        folder = os.path.expanduser(name).rstrip("/")
        files = find_pictures(folder)
        if name == "digits" and not configuration:
            data = open_digits()
        elif files and not configuration:
            data = open_folder(folder, files)
        else:
            data = common.open_data(name, configuration, commit)
        splits = {split: undecoded(dataset) for split, dataset in data.splits.items()}
        train = splits["train"]
        usual = ["image", "img", "jpg", "png", "jpeg", "webp"]
        image = find_typed_column(train, cfg.image_column, datasets.Image, usual)
        usual = ["label", "labels", "cls", "class"]
        label = find_typed_column(train, cfg.label_column, datasets.ClassLabel, usual)
    parse = partial(parse_record, image_column=image, label_column=label)
    for split, dataset in splits.items():
        if dataset.column_names:  # unknown of lines of JSON
            dataset = dataset.select_columns([image, label])
        splits[split] = Split(dataset, parse, data.faults)
    classes = getattr((train.features or {}).get(label), "names", [])
    return splits, data.facts, classes


def undecoded(dataset):
    """The data with each picture as its file, to be decoded later, in threads."""
    features = (dataset.features or {}).values()
    if any(isinstance(feature, datasets.Image) for feature in features):
        return dataset.decode(False)
    return dataset


def find_typed_column(dataset, asked, kind, usual):
    """The column `asked` for, else the only one of the type `kind`, else one with a usual name."""
    features = dataset.features or {}
    typed = [name for name, feature in features.items() if isinstance(feature, kind)]
    return common.find_column(dataset, asked, typed if len(typed) == 1 else usual)


def open_digits():
    """scikit-learn's digits (Alpaydin & Kaynak 1998); a fifth of them is held out."""
    from sklearn.datasets import load_digits  # slow to import

    found = load_digits()
    images = np.uint8(found.images * 255 / 16)  # (1797, 8, 8); found.images are 0 to 16
    rows = {"image": list(images), "label": found.target}
    label = datasets.ClassLabel(names=list("0123456789"))
    features = datasets.Features(image=datasets.Image(), label=label)
    data = datasets.Dataset.from_dict(rows, features)
    order = np.random.default_rng(0).permutation(len(data))
    n = len(data) // 5
    train = data.select(order[n:]).to_iterable_dataset(num_shards=100)
    validation = data.select(order[:n]).to_iterable_dataset(num_shards=100)
    return common.Data({"train": train, "validation": validation}, facts={}, faults={})


def find_pictures(folder):
    """The picture files in a local folder, sorted, without hidden ones.

    [] of no folder, and where there is parquet or tar, beside which a picture is decoration.
    """
    kinds = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
    found = glob(f"{escape(folder)}/**", recursive=True)
    if any(file.lower().endswith((".parquet", ".tar")) for file in found):
        return []
    return sorted(file for file in found if file.lower().endswith(kinds))


# a folder's name: what it holds, as `datasets` has it, {"val": "validation", ...}
SPLITS = {name: str(split) for split, names in SPLIT_KEYWORDS.items() for name in names}


def open_folder(folder, files):
    """The picture `files` of a folder: train/CLASS/a.jpg, val/CLASS/b.jpg ..., or CLASS/a.jpg.

    Each is a shard, so that an epoch is a permutation of all. (Streamed, datasets' imagefolder is
    one shard, in the order of the classes.)
    """
    roots = {}  # folder of class folders: its split
    for name in os.listdir(folder):
        if name in SPLITS:
            roots[f"{folder}/{name}"] = SPLITS[name]
    layout = "train/CLASS/a.jpg" if roots else "CLASS/a.jpg"
    if not roots:
        roots[folder] = "train"
    parts = {}
    # in any order but that of the classes, or --eval-batches would see only the first ones
    for i in np.random.default_rng(0).permutation(len(files)):
        root, name = os.path.split(os.path.dirname(files[i]))
        is_class = root in roots and name not in SPLITS  # train/test/a.jpg is a split misplaced
        expect(is_class, f"{files[i]}: expected {folder}/{layout}")
        part = parts.setdefault(roots[root], {"files": [], "labels": []})
        part["files"].append(files[i])
        part["labels"].append(name)
    expect("train" in parts, f"no pictures to train on; expected {layout}")
    classes = sorted(set(parts["train"]["labels"]))
    expect(len(classes) > 1, f"pictures of {brief(classes)}; expected {layout} of two classes")
    number = {name: i for i, name in enumerate(classes)}
    label = datasets.ClassLabel(names=classes)
    features = datasets.Features(image=datasets.Image(decode=False), label=label)
    splits = {}
    for split, part in parts.items():
        others = sorted(set(part["labels"]) - number.keys())
        expect(not others, f"{split} has other classes than train: {brief(others)}")
        part["labels"] = [number[name] for name in part["labels"]]
        splits[split] = datasets.IterableDataset.from_generator(
            read_pictures, features=features, gen_kwargs=part
        )
    names = [os.path.relpath(file, folder) for file in files]  # the folder may move
    return common.Data(splits, {"files": common.digest(names)}, faults={})


def read_pictures(files, labels):
    for file, label in zip(files, labels):
        yield {"image": {"path": file, "bytes": None}, "label": label}  # read later, in threads


class BadPicture(ValueError):
    """Why a record gives no row."""


def parse_record(record, classes, image_column, label_column):
    """(name, bytes, label) of a record's picture. Raises BadPicture."""
    label = record.get(label_column)
    is_whole = isinstance(label, numbers.Real) and label % 1 == 0  # nan and infinity are not
    if not (is_whole and 0 <= label < len(classes)):
        raise BadPicture(f"{label_column} is {str(label)[:40]}, of {len(classes)} classes")
    image = record.get(image_column)
    if isinstance(image, bytes):
        return "its picture", image, int(label)
    if not isinstance(image, dict):
        raise BadPicture(f"{image_column} is {str(image)[:40]}")
    name = str(image.get("path") or "its picture")
    data = image.get("bytes")
    if data is None:
        try:
            data = Path(name).read_bytes()
        except OSError as error:  # a URL is not fetched
            raise BadPicture(f"has no bytes, and {common.reason(error)}") from error
    return name, data, int(label)


# what Pillow raises for a broken file
BROKEN_PICTURE = (
    OSError, EOFError, ValueError, SyntaxError, TypeError, RuntimeError, LookupError,
    ArithmeticError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


def open_image(name, data, at_least=1 << 16):
    """The picture in a file's bytes, upright, in RGB, on white where it is transparent.

    A large jpeg may come at 1/2, 1/4 or 1/8 of its size, with `at_least` so many pixels a side.
    Raises BadPicture.
    """
    try:
        image = Image.open(BytesIO(data))
        image.draft(None, (at_least, at_least))
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16 bits and more, which convert() alone would clip
            white = 65535 if image.mode[0] == "I" else max(image.getextrema()[1], 1e-9)
            image = image.convert("F").point(lambda value: value * (255 / white)).convert("L")
        if image.has_transparency_data:
            background = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(background, image.convert("RGBA"))
        return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise BadPicture(f"{name}: in no format that Pillow knows") from error
    except BROKEN_PICTURE as error:
        raise BadPicture(f"{name}: {common.reason(error)}") from error


def random_box(width, height, least, rng):
    """(left, top, right, bottom) of a random part of a picture: `least` to all, 3:4 to 4:3."""
    area = rng.uniform(least, 1, 10)
    shape = np.exp(rng.uniform(-1, 1, 10) * math.log(4 / 3))
    widths = np.sqrt(area * shape * width * height)
    heights = np.sqrt(area / shape * width * height)
    for w, h in zip(widths, heights):
        if w <= width and h <= height:
            left, top = rng.random(2) * (width - w, height - h)
            return left, top, left + w, top + h
    side = min(width, height)  # of a long picture, the central square
    left = (width - side) / 2
    top = (height - side) / 2
    return left, top, left + side, top + side


def training_crop(image, size, cfg, seed):
    """A random crop (S, S, 3) uint8, of random area and shape or shifted; the same for a seed."""
    rng = np.random.default_rng(seed)
    bilinear = Image.Resampling.BILINEAR
    if cfg.crop == "resized":  # Szegedy et al. 2014
        box = random_box(*image.size, cfg.crop_area, rng)
        image = image.resize((size, size), bilinear, box, reducing_gap=2.0)
    else:  # the central square, black beyond its edge
        left, top = rng.integers(-cfg.crop_pad, cfg.crop_pad + 1, 2)
        image = ImageOps.fit(image, (size, size), bilinear)
        image = image.crop((left, top, left + size, top + size))
    pixels = np.asarray(image)
    if cfg.flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels


def is_held_out(data, every):
    """Whether a picture is one of the `every`th, to validate on; so are its copies."""
    return every > 0 and zlib.crc32(data) % every == 0


def make_row(record, pictures, size, cfg, seed):
    """(training crop, label) of a record, None where it is held out. Raises BadPicture."""
    name, data, label = pictures.train.parse(record, pictures.classes)
    if is_held_out(data, pictures.val_every):
        return None
    image = open_image(name, data, at_least=4 * size)
    return training_crop(image, size, cfg, seed), label


def batches(pictures, size, cfg, position=None):
    """Records -> pictures -> batches, each with the position to go on after it.

    A batch is images (B, S, S, 3) uint8 and labels (B,) int32; B is this process's share. Ends
    when a whole epoch has no row.
    """
    start = position or {"window": None, "row": 0, "bad": 0}
    skip = start["row"]  # records of the first window, in `order`, that were met before
    bad = start["bad"]  # bad ones until then
    last_epoch = start["window"]["epoch"] if position else -1  # of the last row that was given
    B = cfg.batch_size // jax.process_count()
    batch = []
    # place: where a window begins, its first "record" of an "epoch", after "seen" in all epochs
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for records, rng, place in common.windows(
            pictures.train.dataset,
            cfg.shuffle_buffer,
            seed=cfg.seed,
            position=start["window"],
            **pictures.train.faults,
        ):
            if place["epoch"] > last_epoch + 1:  # a whole epoch gave no row: `ahead` raises
                return
            seeds = rng.integers(2**63, size=len(records))
            order = rng.permutation(len(records))
            for first in range(skip, len(order), B):  # a whole window, decoded, is too large
                chunk = order[first : first + B]
                futures = [
                    pool.submit(make_row, records[r], pictures, size, cfg, seeds[r]) for r in chunk
                ]
                for i, future in enumerate(futures, first):  # i: a place in `order`, as `skip` is
                    try:
                        row = future.result()
                        if row is not None:  # else it is held out
                            batch.append(row)
                            last_epoch = place["epoch"]
                    except BadPicture as error:
                        bad += 1
                        n = place["record"] + order[i]
                        what = f"record {n:,} of epoch {place['epoch']}: {error}"
                        common.report_bad(bad, place["seen"] + i + 1, what)
                    if len(batch) == B:
                        images, labels = zip(*batch)
                        position = {"window": place, "row": i + 1, "bad": bad}
                        yield (np.stack(images), np.array(labels, np.int32)), position
                        batch = []
            skip = 0


def validation_rows(pictures, view):
    """The pictures to validate on, (S, S, 3) uint8, each once, and their labels."""

    def view_row(record):
        name, data, label = pictures.val.parse(record, pictures.classes)
        if pictures.val_every and not is_held_out(data, pictures.val_every):
            return None
        return view.pixels(open_image(name, data)), label

    bad = 0
    windows = common.windows(pictures.val.dataset, 64, seed=None, **pictures.val.faults)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for records, _, place in windows:
            futures = [pool.submit(view_row, record) for record in records]
            for i, future in enumerate(futures):
                try:
                    row = future.result()
                    if row is not None:
                        yield row
                except BadPicture as error:
                    bad += 1
                    n = place["record"] + i
                    common.report_bad(bad, n + 1, f"record {n:,} to validate on: {error}")


class View:
    """How a model sees pictures: as its image processor, one of transformers', makes them."""

    def __init__(self, processor):
        self.processor = processor
        # two plain pictures tell slope and offset, a ramp whether the processor does more than that
        black = self.look(Image.new("RGB", (48, 32), "black"))  # (3, S, S)
        white = self.look(Image.new("RGB", (32, 48), "white"))
        S = black.shape[-1]
        shapes = {black.shape, white.shape}
        expect(shapes == {(3, S, S)}, f"pictures come out as {shapes}, not as squares of one size")
        flips = getattr(processor, "do_flip_channel_order", False)
        expect(not flips, "do_flip_channel_order: not supported")
        center = (slice(None), S // 2, S // 2)
        self.size = S
        # rescales and normalises, as far as the processor does; a large crop has a black margin
        self.offset = black[center]
        self.slope = (white - black)[center] / 255
        ramp = Image.linear_gradient("L").convert("RGB")
        right = self.look(ramp).transpose(1, 2, 0)
        same = np.allclose(self.normalise(self.pixels(ramp)), right, atol=1e-4)
        name = type(processor).__name__
        expect(same, f"{name} does more than resize, crop, rescale and normalise")

    def look(self, image, **options):
        return self.processor(image, return_tensors="np", **options)["pixel_values"][0]

    def pixels(self, image):
        """The picture as the model is to see it, (S, S, 3) uint8."""
        return self.look(image, do_rescale=False, do_normalize=False).transpose(1, 2, 0)

    def normalise(self, images):
        """Pixels (..., 3) uint8 -> what the model reads, float32."""
        return images.astype(jnp.float32) * self.slope + self.offset


def read_view(folder, size=None):
    """The view in a model's folder, or transformers' default for a ResNet; `size` is another S."""
    # what transformers raises for settings that it does not know
    with common.usage_errors("preprocessor_config.json", LookupError, TypeError, AttributeError):
        names = ("preprocessor_config.json", "processor_config.json")
        if any((folder / name).exists() for name in names):
            processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        else:
            processor = transformers.ConvNextImageProcessorPil()
        view = View(processor)
        if size is None:
            return view
        settings = processor.to_dict()
        for name in ("size", "crop_size"):
            if settings.get(name):
                sides = settings[name].items()
                settings[name] = {side: round(n * size / view.size) for side, n in sides}
        return View(type(processor)(**settings))


# ---- model ----


def total(x):
    """Sum over all axes of x but the last, in float32."""
    if jax.default_backend() != "cpu":
        return jnp.sum(x, (0, 1, 2), jnp.float32)
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return jnp.ones(len(x)) @ x  # ten times faster than XLA's own sum over the leading axes


@jax.custom_gradient
def standardise(x, scale, bias):
    """x (B, H, W, C) -> (x - mean) / deviation * scale + bias, and mean and variance, float32.

    Only the first has a gradient: written out, it takes half of autodiff's passes over x.
    """
    n = x.size // x.shape[-1]
    mean = total(x) / n  # (C,)
    # E[x^2] - E[x]^2 would put a loss off by 1e-3 within three steps
    var = total(jnp.square(x - mean)) / n
    inv = jax.lax.rsqrt(var + 1e-5)

    def gradient(grads):
        dy, _, _ = grads
        x_hat = (x - mean) * inv
        dscale = total(dy * x_hat)
        dbias = total(dy)
        # y does not change when all of x moves or stretches: take dy's parts along 1, x_hat out
        dx = scale * inv * (dy - dbias / n - x_hat * dscale / n)
        return dx.astype(x.dtype), dscale, dbias

    return ((x - mean) * (inv * scale) + bias, mean, var), gradient


class ConvNorm(nnx.Module):
    """A convolution, padded as by PyTorch (SAME differs at stride 2), and batch norm in float32."""

    def __init__(self, C_in, C_out, size, stride, dtype, rngs, scale=1.0):
        self.dtype = dtype
        self.convolution = nnx.Conv(
            C_in,
            C_out,
            kernel_size=(size, size),
            strides=stride,
            padding=size // 2,
            use_bias=False,
            kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),  # He's
            dtype=dtype,
            rngs=rngs,
        )
        init = nnx.initializers.constant(scale)
        self.normalization = nnx.BatchNorm(C_out, scale_init=init, rngs=nnx.Rngs(0))  # draws none

    def __call__(self, x, train):
        x = self.convolution(x)
        norm = self.normalization
        if not train:
            return norm(x, use_running_average=True).astype(self.dtype)
        y, mean, var = standardise(x, norm.scale[...], norm.bias[...])
        n = x.size / x.shape[-1]
        # nnx's own keeps the biased variance; PyTorch, and so the published weights, the unbiased
        norm.mean[...] = 0.9 * norm.mean[...] + 0.1 * mean
        norm.var[...] = 0.9 * norm.var[...] + 0.1 * n / max(n - 1, 1) * var
        return y.astype(self.dtype)


class Block(nnx.Module):
    """Two 3x3 convolutions, or a bottleneck: 1x1, 3x3 on a quarter of the channels, 1x1."""

    def __init__(self, kind, C_in, C_out, stride, dtype, rngs):
        self.layer = nnx.List()
        # the last norm begins at 0, so that a new block is the identity (Goyal et al. 2017)
        if kind == "basic":
            self.layer.append(ConvNorm(C_in, C_out, 3, stride, dtype, rngs))
            self.layer.append(ConvNorm(C_out, C_out, 3, 1, dtype, rngs, scale=0.0))
        else:
            C = C_out // 4
            self.layer.append(ConvNorm(C_in, C, 1, 1, dtype, rngs))
            self.layer.append(
                ConvNorm(C, C, 3, stride, dtype, rngs)
            )  # v1.5; in v1 the first has the stride
            self.layer.append(ConvNorm(C, C_out, 1, 1, dtype, rngs, scale=0.0))
        changes = C_in != C_out or stride > 1
        self.shortcut = ConvNorm(C_in, C_out, 1, stride, dtype, rngs) if changes else None

    def __call__(self, x, train):
        y = x
        for layer in self.layer[:-1]:
            y = nnx.relu(layer(y, train))
        y = self.layer[-1](y, train)
        if self.shortcut is not None:
            x = self.shortcut(x, train)
        return nnx.relu(y + x)


class ResNet(nnx.Module):
    """ResNet v1.5 (He et al. 2015), its attributes named as in transformers.

    `config`: a transformers.ResNetConfig, and in it `stem`, "imagenet" where there is none. `view`:
    a View. `dtype`: of the computation; parameters are float32. model(images (B, H, W, 3), made by
    view.normalise) -> logits (B, classes) float32. `train` takes batch norm's statistics from the
    batch and keeps them. Dropout only where a key is given.
    """

    def __init__(self, config, view, *, dropout=0.0, dtype="float32", remat=False, rngs):
        self.config = nnx.static(config)
        self.view = nnx.static(view)
        self.dropout = dropout
        self.dtype = dtype
        self.remat = remat
        self.stem = getattr(config, "stem", "imagenet")
        C = config.embedding_size
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        self.embedder = ConvNorm(3, C, size, stride, dtype, rngs)
        self.stages = nnx.List()
        for i, C_out in enumerate(config.hidden_sizes):
            self.stages.append(nnx.List())
            for j in range(config.depths[i]):
                stride = 2 if i > 0 and j == 0 else 1
                self.stages[i].append(Block(config.layer_type, C, C_out, stride, dtype, rngs))
                C = C_out
        # PyTorch's; in float32 in any case
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.classifier = nnx.Linear(C, config.num_labels, kernel_init=init, rngs=rngs)

    def __call__(self, images, train=False, key=None):
        x = nnx.relu(self.embedder(images.astype(self.dtype), train))
        if self.stem == "imagenet":
            # windows overlap, so that its gradient is a sum: in float32
            x = nnx.max_pool(x.astype(jnp.float32), (3, 3), (2, 2), [(1, 1), (1, 1)])
            x = x.astype(self.dtype)
        run = nnx.remat(Block.__call__, static_argnums=2) if self.remat else Block.__call__
        for block in chain(*self.stages):  # (B, H, W, C); a stage but the first halves H and W
            x = run(block, x, train)
        x = jax.lax.optimization_barrier(x)  # XLA has made NaN of bfloat16 here, on a CPU
        x = jnp.mean(x.astype(jnp.float32), (1, 2))  # (B, C)
        x = nnx.Dropout(self.dropout)(x, deterministic=key is None, rngs=key)
        return self.classifier(x)


# ---- pretrained weights in and out ----

# fields of transformers' ResNetConfig that are followed or say nothing new; others: at default
FOLLOWED = {
    "depths", "hidden_sizes", "embedding_size", "layer_type", "out_features", "out_indices",
    "stage_names",
}  # fmt: skip
HEAD = ("classifier.1.weight", "classifier.1.bias")  # whose classes may be others
LEAST_SIZE = {"imagenet": 32, "cifar": 8}  # {stem: what the stem and the stages divide S by}


def label_names(classes):
    """Names of classes as transformers' configs hold them."""
    return {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: i for i, name in enumerate(classes)},
    }


def class_names(config):
    return [str(name) for _, name in sorted(config.id2label.items())]


def brief(names):
    return f"{len(names)} ({', '.join(names)[:60]})" if names else "none"


def match_classes(theirs, classes):
    """Find `classes` among those of a head: the place of each there, and names for all of them.

    They are matched by name; or by place, where one side just counts them or at most 1 % of the
    names differ (models of ImageNet call two classes crane). Else the places are None.
    """
    if sorted(theirs) == sorted(set(classes)):  # a name that recurs cannot be matched
        return [theirs.index(name) for name in classes], classes
    n = len(classes)
    counts = ([str(i) for i in range(n)], [f"LABEL_{i}" for i in range(n)])
    if len(theirs) != n:
        return None, classes
    if classes in counts:
        return list(range(n)), theirs
    n_other = sum(a != b for a, b in zip(theirs, classes))
    if theirs in counts or n_other <= n / 100:
        return list(range(n)), classes
    return None, classes


def checkpoint_names(model):
    """{name in the published checkpoint: parameter or statistic}."""
    leaves = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    names = {}
    for path, param in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        name = ".".join(leaves.get(part, str(part)) for part in path)
        name = re.sub(r"^stages\.(\d)", r"resnet.encoder.stages.\1.layers", name)
        name = re.sub("^embedder", "resnet.embedder.embedder", name)
        names[name.replace("classifier", "classifier.1")] = param
    return names


def from_pretrained(path, *, classes=None, new_head=False, size=None, seed=0, **options):
    """The ResNet of a hub id, a folder or a run directory; `options` are ResNet's.

    Its outputs are put in the order of the names `classes`, or with `new_head` begin anew where
    these are others. `size` is another side for pictures. Raises UsageError.
    """
    folder = common.snapshot(path, "*.safetensors")
    config = common.read_config(folder, [transformers.ResNetConfig], FOLLOWED)
    stem = getattr(config, "stem", "imagenet")
    expect(stem in LEAST_SIZE, f"stem is {stem}, only imagenet and cifar are known")
    weights = read_weights(folder)
    theirs = class_names(config) if "classifier.1.weight" in weights else []
    places, names = match_classes(theirs, classes or theirs)
    config.update(label_names(names))
    view = read_view(folder, size)

    def create():
        return ResNet(config, view, **options, rngs=nnx.Rngs(seed))

    if places:
        model = nnx.eval_shape(create)  # nothing is drawn: every parameter comes from the files
        may_lack = ()
    else:
        why = f"its classes are {brief(theirs)}; those of the data are {brief(names)}"
        expect(classes and new_head, why)
        print(f"head       new: {why}")
        model = create()
        weights = {name: w for name, w in weights.items() if name not in HEAD}
        may_lack = HEAD
    common.load_weights(checkpoint_names(model), weights, may_lack)
    if places:
        for param in (model.classifier.kernel, model.classifier.bias):
            param.set_value(param[..., np.array(places)])
    return model


def read_weights(folder):
    """{name: array} of a ResNet's folder, in our shapes."""
    weights = {}
    for name, w in common.read_weights(folder).items():
        if "num_batches_tracked" in name:
            continue
        if not name.startswith(("resnet.", "classifier.")):  # of a bare encoder
            name = f"resnet.{name}"
        # from (out, in, H, W) and (out, in)
        weights[name] = w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T
    return weights


# transformers has no ResNet with the small stem: these lines, in the exported folder, make one
CIFAR_CODE = """from torch import nn
from transformers import ResNetForImageClassification


class CifarResNetForImageClassification(ResNetForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(3, config.embedding_size, 3, padding=1, bias=False)
        stem.pooler = nn.Identity()
"""


def save_pretrained(model, folder):
    """Write what AutoModelForImageClassification and AutoImageProcessor read."""
    kind = "ResNetForImageClassification"
    config = type(model.config).from_dict(model.config.to_dict())
    weights = {}
    for name, param in checkpoint_names(model).items():
        w = common.to_host(param[...])
        weights[name] = w.transpose(3, 2, 0, 1) if w.ndim == 4 else w.T
        if name.endswith("running_var"):
            weights[name.replace("running_var", "num_batches_tracked")] = np.array(0)
    if model.stem == "cifar":
        kind = f"Cifar{kind}"
        config.auto_map = {"AutoModelForImageClassification": f"modeling_cifar_resnet.{kind}"}
    common.write_pretrained(folder, weights, config, kind, model.view.processor)
    if model.stem == "cifar" and jax.process_index() == 0:
        Path(folder, "modeling_cifar_resnet.py").write_text(CIFAR_CODE)


# ---- training ----


def count_microbatches(batch_size, device_rows):
    """As few as cut a batch evenly and leave a device `device_rows` rows at most."""
    devices = jax.device_count()
    expect(batch_size % devices == 0, f"--batch-size {batch_size}: {devices} devices cannot share")
    rows = batch_size // devices
    n = math.ceil(rows / device_rows)
    while rows % n:
        n += 1
    return n


def mean_loss(model, images, labels, cfg, key):
    """Mean cross-entropy in nats of images (B, S, S, 3) uint8, smoothed and mixed as cfg says."""
    mix_key, drop_key = jax.random.split(key)
    x = model.view.normalise(images)
    targets = jax.nn.one_hot(labels, model.config.num_labels)  # (B, classes)
    targets = optax.smooth_labels(targets, cfg.label_smoothing)  # Szegedy et al. 2015
    if cfg.mixup:  # the first picture with the last, and so on
        ratio = jax.random.beta(mix_key, cfg.mixup, cfg.mixup)
        x = ratio * x + (1 - ratio) * x[::-1]
        targets = ratio * targets + (1 - ratio) * targets[::-1]
    logits = model(x, train=True, key=drop_key)
    nats = optax.softmax_cross_entropy(logits, targets)  # (B,)
    return jnp.mean(nats)


def make_schedule(cfg):
    """Warm-up, then a cosine to min_lr; with `cooldown` a plateau, a line (arXiv 2405.18392)."""
    steps = max(cfg.steps, 1)
    warm = min(cfg.warmup_steps, steps - 1)
    start = cfg.lr / (warm + 1)
    if cfg.cooldown == 0:
        return optax.warmup_cosine_decay_schedule(start, cfg.lr, warm, steps, cfg.min_lr)
    fall = max(1, round(cfg.cooldown * steps))
    fall = min(fall, steps - warm)
    up = optax.linear_schedule(start, cfg.lr, warm)
    flat = optax.constant_schedule(cfg.lr)
    down = optax.linear_schedule(cfg.lr, cfg.min_lr, fall)
    return optax.join_schedules([up, flat, down], [warm, steps - fall])


def make_optimizer(cfg, schedule):
    """SGD with Nesterov momentum; weight decay is part of the gradient, as in PyTorch."""

    def is_decayed(params):  # convolutions and the head, not biases and norms
        return jax.tree.map(lambda p: p.ndim >= 2, params)

    # identity has the state of a clip, so that a resume may change --grad-clip
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    decay = optax.add_decayed_weights(cfg.weight_decay, is_decayed)
    sgd = optax.sgd(schedule, momentum=cfg.momentum, nesterov=True)
    return optax.chain(clip, decay, sgd)


def gradients(loss_fn, params, stats, batch, accum):
    """(batch norm's statistics after the last microbatch, (loss, gradients) summed over all).

    loss_fn is the mean of a microbatch over `accum`, so that the sum is the mean of the batch.
    """
    loss_and_grads = jax.value_and_grad(loss_fn, has_aux=True)

    def add_microbatch(carry, rows_and_key):
        stats, sums = carry
        (loss, stats), grads = loss_and_grads(params, stats, *rows_and_key)
        sums = jax.tree.map(jnp.add, sums, (loss, grads))
        return (stats, sums), None

    def cut(x):  # every accum-th row, so that devices keep their own: (accum, B / accum, ...)
        return x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1)

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    start = (stats, zeros)
    if accum == 1:  # three times as fast on a CPU as a scan of one
        end, _ = add_microbatch(start, batch)
    else:
        images, labels, key = batch
        microbatches = (cut(images), cut(labels), jax.random.split(key, accum))
        end, _ = jax.lax.scan(add_microbatch, start, microbatches)
    return end


def make_train_step(graphdef, state, accum, cfg, schedule):
    """jit: (state, images (B, S, S, 3) uint8, labels (B,), key of this step) -> (state, metrics).

    The state is donated. `graphdef` and `state` are those of (model, optimizer, running mean of the
    model or None); `accum` microbatches make a step, and batch norm sees one.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    model_def = nnx.graphdef(nnx.merge(graphdef, state)[0])
    options = {}
    if jax.default_backend() == "cpu" and jax.__version_info__[:2] == (0, 10) and not cfg.fsdp:
        # YNNPACK for all but convolutions, whose gradients XLA does 1.7 times faster; and not with
        # fsdp, for it refuses the layout of a gathered parameter
        kinds = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_ELTWISE"
        options["xla_cpu_experimental_ynn_fusion_type"] = kinds

    def loss_fn(params, stats, images, labels, key):
        model = nnx.merge(model_def, params, stats, copy=True)  # batch norm writes into its stats
        loss = mean_loss(model, images, labels, cfg, key)
        return loss / accum, nnx.state(model, nnx.BatchStat)

    @partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=options,
    )
    def train_step(state, images, labels, key):
        model, optimizer, average = nnx.merge(graphdef, state)
        params = nnx.state(model, nnx.Param)
        stats = nnx.state(model, nnx.BatchStat)
        batch = (images, labels, key)
        stats, (loss, grads) = gradients(loss_fn, params, stats, batch, accum)
        lr = schedule(optimizer.step[...])
        metrics = {"loss": loss, "lr": lr, "grad_norm": optax.global_norm(grads)}
        nnx.update(model, stats)
        optimizer.update(model, grads)
        if cfg.ema:  # the first steps count less, or the init would stay in it for long
            step = optimizer.step[...]
            decay = jnp.minimum(cfg.ema, step / (step + 10))
            states = (nnx.state(average), nnx.state(model))
            moved = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, *states)
            nnx.update(average, moved)
        return nnx.state((model, optimizer, average)), metrics

    return train_step


def exported(graphdef, state):
    """The model that is evaluated and exported: the running mean where there is one."""
    model, _, average = nnx.merge(graphdef, state)
    return average or model


def make_evaluate(graphdef, pictures, view, most, batch_size, mesh):
    """state -> ({"val_loss": nats, "val_top1", "val_top5": shares}, examples).

    It sees all pictures to validate on, or the first `most` where that is not 0. The examples are
    (picture, label, guess) of 32 of them.
    """

    @partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def eval_step(state, images, labels):
        model = exported(graphdef, state)
        logits = model(model.view.normalise(images))
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))  # (B, 5)
        hits = best == labels[:, None]
        is_real = labels >= 0
        sums = [jnp.sum(x * is_real) for x in (nats, hits[:, 0], hits.any(axis=1), 1)]
        return sums, best[:, 0]

    def evaluate(state):
        rows = islice(validation_rows(pictures, view), most or None)
        rng = np.random.default_rng(0)
        results = []
        shown = []
        while batch := list(islice(rows, batch_size)):
            shown += zip(rng.random(len(batch)), count(batch_size * len(results)), batch)
            shown = sorted(shown)[:32]  # an even draw from all rows, the same each time
            # any pictures, with a label that does not count, fill the last batch up
            batch += [(batch[0][0], -1)] * (batch_size - len(batch))
            images, labels = zip(*batch)
            arrays = (np.stack(images), np.array(labels, np.int32))
            arrays = common.shard_batch(mesh, arrays, whole=True)
            # one at a time: two programs that gather parameters can hang on a CPU
            jax.block_until_ready(results[-1:])
            results.append(eval_step(state, *arrays))
        sums, guesses = zip(*jax.device_get(results))
        loss, top1, top5, n = np.sum(sums, axis=0, dtype=np.float64).tolist()
        guesses = np.concatenate(guesses)
        examples = [(image, label, guesses[i]) for _, i, (image, label) in shown]
        figures = {"val_loss": loss / n, "val_top1": top1 / n, "val_top5": top5 / n}
        return figures, examples

    return evaluate


# ---- use ----


def draw_predictions(path, examples, names):
    """Draw pictures with the class that was guessed, in red where the true one is another."""
    from matplotlib.figure import Figure  # half a second to import

    figure = Figure(figsize=(12, 7), layout="constrained")
    for place, (image, label, guess) in enumerate(examples, 1):
        axes = figure.add_subplot(4, 8, place)
        axes.imshow(image)
        axes.axis("off")
        text = names[guess][:20]
        if guess != label:
            text += f"\nnot {names[label][:20]}"
        color = "black" if guess == label else "red"
        axes.set_title(text, size=8, color=color, parse_math=False)
    figure.savefig(path, dpi=100)


def predict_only(cfg):
    """Print the likeliest classes of each picture of --predict."""
    model = build(cfg, [])
    names = class_names(model.config)
    classify = nnx.jit(lambda model, images: jax.nn.softmax(model(images)))
    for name in cfg.predict:
        with common.usage_errors("--predict"):
            data = Path(name).expanduser().read_bytes()
            image = open_image(name, data)
        pixels = model.view.pixels(image)  # (S, S, 3)
        p = classify(model, model.view.normalise(pixels[None]))
        p = np.asarray(p)[0]  # (classes,)
        best = np.argsort(-p, kind="stable")[:5]
        print(name)
        for i in best:
            print(f"{p[i]:8.2%}  {names[i]}")
    return {}


# ---- the run ----


def check(cfg):
    """Raise UsageError for flags that cannot be meant."""
    sizes = ["batch_size", "device_rows", "shuffle_buffer", "width", "image_size", "num_classes"]
    sizes += ["log_every", "eval_every", "ckpt_every", "keep"]
    common.expect_each(cfg, sizes, lambda x: x >= 1, "must be at least 1")
    amounts = ["steps", "lr", "min_lr", "weight_decay", "grad_clip", "warmup_steps", "seed"]
    amounts += ["crop_pad", "mixup", "eval_batches"]
    common.expect_each(cfg, amounts, lambda x: 0 <= x < math.inf, "must be finite, not negative")
    common.expect_each(cfg, ["seed"], lambda x: x < 2**53, "must be below 2**53")
    shares = ["dropout", "ema", "momentum", "label_smoothing"]
    common.expect_each(cfg, shares, lambda x: 0 <= x < 1, "must be in [0, 1)")
    common.expect_each(cfg, ["cooldown"], lambda x: 0 <= x <= 1, "must be in [0, 1]")
    common.expect_each(cfg, ["crop_area", "eval_crop"], lambda x: 0 < x <= 1, "must be in (0, 1]")
    common.expect_each(cfg, ["val_every"], lambda x: x >= 2, "must be at least 2")
    expect(not cfg.predict or not cfg.steps, "--predict: needs --steps 0, and --init-from")
    if cfg.steps == 0:
        expect(cfg.init_from, "--steps 0: trains nothing; name a finished model with --init-from")
        expect(not cfg.resume, "--resume: has nothing to do with --steps 0; use --init-from")


def build(cfg, classes):
    """The model to start from: that of --init-from, whose sizes it has, or a new one."""
    options = {"dropout": cfg.dropout, "dtype": cfg.dtype, "remat": cfg.remat}
    if cfg.resume and common.newest_step(cfg.out_dir) >= 0:  # needs no --init-from
        with common.usage_errors(f"--resume: {cfg.out_dir}"):
            folder = common.snapshot(cfg.out_dir)
            config = common.read_config(folder, [transformers.ResNetConfig], FOLLOWED)
            view = read_view(folder)
        model = ResNet(config, view, **options, rngs=nnx.Rngs(cfg.seed))
    elif cfg.init_from:
        options |= {"classes": classes, "new_head": cfg.steps > 0, "size": cfg.image_size}
        with common.usage_errors(f"--init-from {cfg.init_from}"):
            model = from_pretrained(cfg.init_from, **options, seed=cfg.seed)
    else:  # not in one jit, which would compile far longer
        config, view = describe(cfg, classes)
        model = ResNet(config, view, **options, rngs=nnx.Rngs(cfg.seed))
    S = model.view.size
    least = LEAST_SIZE[model.stem]
    expect(least <= S, f"--image-size {S}: too small, at least {least}")
    return model


def describe(cfg, classes):
    """(config, view) of a new model, which sees the central square."""
    depths = {18: [2, 2, 2, 2], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
    depths[34] = depths[50]
    is_basic = cfg.depth < 50
    C = cfg.width if is_basic else 4 * cfg.width
    config = transformers.ResNetConfig(
        layer_type="basic" if is_basic else "bottleneck",
        depths=depths[cfg.depth],
        embedding_size=cfg.width,
        hidden_sizes=[C, 2 * C, 4 * C, 8 * C],
        stem=cfg.stem,  # transformers knows none but ImageNet's: ours is one more field
        **label_names(classes),
    )
    S = cfg.image_size or 16
    processor = transformers.BitImageProcessorPil(
        size={"shortest_edge": round(S / cfg.eval_crop)},
        crop_size={"height": S, "width": S},
        resample=Image.Resampling.BILINEAR,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    return config, View(processor)


def count_parameters(module):
    return sum(p.size for p in jax.tree.leaves(nnx.state(module, nnx.Param)))


def flops_of_image(graphdef, state, S):
    """To train on: XLA's own count of a forward pass, and twice that for the backward pass."""
    if jax.default_backend() == "cpu":  # whose peak is unknown
        return 0
    forward = jax.jit(lambda state, images: exported(graphdef, state)(images))
    return 3 * forward.lower(state, jnp.zeros((1, S, S, 3))).cost_analysis()["flops"]


def main(cfg):
    """Train as `cfg` says -> the last metrics; with steps 0 evaluate or predict."""
    check(cfg)
    if cfg.predict:
        return predict_only(cfg)
    key = jax.random.key(cfg.seed)

    # data: pictures to train and to validate on
    pictures = open_pictures(cfg)
    accum = count_microbatches(cfg.batch_size, cfg.device_rows)

    # model and optimizer, split once: their arrays are the state that the steps hand on
    model = build(cfg, pictures.classes)
    S = model.view.size
    names = class_names(model.config)
    pictures = pictures._replace(classes=names)  # a label beyond them is a bad record
    found = next(validation_rows(pictures, model.view), None)
    expect(found, "no picture to validate on; give --val-data, or a lower --val-every")
    schedule = make_schedule(cfg)
    optimizer = nnx.Optimizer(model, make_optimizer(cfg, schedule), wrt=nnx.Param)
    average = jax.tree.map(jnp.copy, model) if cfg.ema else None  # a running mean of the model
    graphdef, state = nnx.split((model, optimizer, average))
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    state = common.shard_state(mesh, state, cfg.fsdp)
    train_step = make_train_step(graphdef, state, accum, cfg, schedule)
    most = cfg.eval_batches * cfg.batch_size
    evaluate = make_evaluate(graphdef, pictures, model.view, most, cfg.batch_size // accum, mesh)
    if cfg.steps == 0:
        result, _ = evaluate(state)
        figures = [f"{name} {value:.4f}" for name, value in result.items()]
        print(*figures, f"on {cfg.val_data or cfg.data}")
        return result

    # the run directory, and what a resume must find again
    parts = [model.config, model.view.processor]
    run = common.RunDir("resnet", cfg, MAY_CHANGE, pictures.facts, parts)
    print(f"run        {run.path}, {jax.device_count()} x {jax.devices()[0].device_kind}")
    print(f"model      ResNet, {count_parameters(model) / 1e6:.1f} M parameters, {cfg.dtype}")
    print(f"data       {cfg.data}, {len(names)} classes, validation on {cfg.val_data or cfg.data}")
    print(f"step       {cfg.batch_size} pictures of {S} x {S}, {accum} microbatches, SGD")
    flops = flops_of_image(graphdef, state, S)
    del model, optimizer, average  # else the first device would keep its own whole copy
    # a window of pictures comes in a burst: up to 2 GB of them wait for the device
    batch_bytes = cfg.batch_size * S * S * 3
    n_ahead = int(np.clip(2e9 / batch_bytes, 2, 128))

    with common.Checkpoints(run.path / "ckpt", cfg.keep) as checkpoints, common.Stop() as stop:
        state, step, position = checkpoints.restore(state)
        log = common.Log(run, cfg, step, "images", cfg.batch_size, flops)
        stream = common.ahead(batches(pictures, S, cfg, position), n_ahead, stop)
        for batch, position in islice(log.timed(stream), cfg.steps - step):
            images, labels = common.shard_batch(mesh, batch)  # (B, S, S, 3) and (B,)
            state, metrics = train_step(state, images, labels, jax.random.fold_in(key, step))
            step += 1
            log.step(step, metrics | {"bad_records": position["bad"]})
            if step % cfg.eval_every == 0 or step == cfg.steps:
                with log.paused():
                    try:
                        figures, examples = evaluate(state)
                    except common.RunError as error:  # of the data: raised at the end, by stop.exit
                        if jax.process_count() > 1:  # the others do not know of it
                            raise
                        stop.error = error
                        break
                    if run.is_first:
                        draw_predictions(run.path / "predictions.png", examples, names)
                log.flush(figures)  # in the line of this step
            if step % cfg.ckpt_every == 0:
                log.flush()  # raises before a state that is not finite could be saved
                checkpoints.save(step, state, position)
            if stop.requested(step):
                break
        stream.close()
        log.flush()
        checkpoints.save(step, state, position)
        save_pretrained(exported(graphdef, state), run.path)
    log.close()
    print(f"a Hugging Face model folder is in {run.path}")
    stop.exit(run, step)
    return log.lines[-1]


if __name__ == "__main__":
    common.cli("resnet", Config, PRESETS, main, __doc__, FORGET)
