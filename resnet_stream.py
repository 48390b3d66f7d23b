"""ResNet (He et al. 2015) trained from a stream of images, in one file.

    python resnet_stream.py                     # offline: a small ResNet on scikit-learn's handwritten digits
    python resnet_stream.py --preset imagenet   # ResNet-50 on ImageNet, streamed from the Hugging Face hub
    python resnet_stream.py --steps 0 --init-from microsoft/resnet-50 --predict cat.jpg dog.jpg

Pictures are decoded and cropped in threads as they arrive. A run killed at any moment goes on with --resume,
bit for bit. When it ends, its directory is a Hugging Face model folder.

Presets, their recipes and what they aim at:
digits    offline: 99.7 % of the 359 held-out digits in 66 to 75 seconds on two CPU cores
cifar10   ResNet-18 much as in kuangliu/pytorch-cifar, 200 epochs: aims at 95-96 %, not measured here
imagenet  ResNet-50 v1.5 much as in NVIDIA's DeepLearningExamples, 90 epochs: aims at their 77.1 % top-1, not
          measured here

Shapes: B batch, H height, W width, C channels, S side of the square that the model sees.
"""

import dataclasses
import json
import math
import os
import re
import textwrap
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import common
from common import expect, flag

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image, ImageOps
from safetensors.numpy import save_file
from transformers import ResNetConfig

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@dataclasses.dataclass
class Config:
    preset: Literal["digits", "cifar10", "imagenet"] = (
        "digits"  # a recipe: other defaults for the flags below
    )
    # data
    data: tuple[str, ...] = ("digits",)  # digits (offline), synthetic, hub ids, files, URLs, folders
    data_name: tuple[str, ...] = ()  # configuration of each hub data set, as in sample-10BT; - for none
    data_weights: tuple[float, ...] = ()  # share of each --data in the rows; equal without
    image_column: str | None = None  # column with the picture; found by its type
    label_column: str | None = None  # column with the class, an int; found by its type or name
    val_data: tuple[str, ...] = ()  # to validate on; else data's validation or test split, or see val_every
    val_every: int = 10  # where there is no such split: one picture in so many is held out, never trained on
    image_size: int = 16  # side of the square that the model sees, S; left at the default, init_from's
    crop: Literal["pad", "resized"] = "pad"  # training sees shifted pictures, or random parts of them
    crop_pad: int = 2  # pad: shifted by at most so many pixels
    crop_area: float = 0.08  # resized: least share of the picture
    flip: bool = False  # training sees half of the pictures mirrored
    eval_crop: float = 1.0  # share of a picture's short side that evaluation sees; init_from has its own
    mixup: float = 0.2  # mixes pairs of pictures by Beta(mixup, mixup) (Zhang et al. 2017); 0 does not
    shuffle_buffer: int = 1_000  # pictures that are shuffled together, held as files
    retries: int = 8  # times in a row that a source that fails is opened again
    # model
    depth: int = 18  # layers: 18, 34, 50, 101 or 152
    width: int = 16  # channels after the stem; 64 is the published network
    stem: Literal["imagenet", "cifar"] = "cifar"  # 7x7 at stride 2 and a pool, or for small pictures 3x3
    num_classes: int | None = None  # needed where labels are bare numbers; else found from their names
    dropout: float = 0.0  # on the pooled features
    init_from: str | None = None  # weights to start from: hub id, folder or run directory
    # training
    steps: int = 600  # optimizer steps; 0 only evaluates, or predicts, from init_from
    batch_size: int = 64  # pictures a step, over all devices
    accum: int = 1  # microbatches that a step is cut into, to fit in memory; batch norm sees one at a time
    lr: float = 0.1  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end, after half a cosine
    warmup_steps: int = 50  # linear, from nothing to lr
    momentum: float = 0.9  # of SGD, Nesterov's: share of the last update in the next
    weight_decay: float = 5e-4  # on convolutions and the head, not on norms and biases
    label_smoothing: float = 0.1  # share of the target spread over all classes
    ema: float = 0.99  # decay of a running mean of the weights, then evaluated and exported; 0 keeps none
    grad_clip: float = 0.0  # largest norm of the whole gradient; 0 does not clip
    seed: int = 0  # of the init, the order of the data, crops, mixup and dropout
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters stay float32
    remat: bool = False  # recompute each block in the backward pass: less memory, a third more work
    fsdp: bool = False  # shard parameters and optimizer state over the devices
    # run
    coordinator: str | None = None  # HOST:PORT of process 0 where several train together; auto asks jax
    num_processes: int | None = None  # how many these are; found with auto, SLURM and Open MPI
    process_id: int | None = None  # which of them this one is, from 0
    out_dir: str | None = None  # directory of the run; else the next free out/resnet-001, out/resnet-002, ...
    resume: bool = False  # go on with the run in out_dir, or with the newest one
    overwrite: bool = False  # delete the run in out_dir and start again
    log_every: int = 10  # steps between two lines of metrics.jsonl
    eval_every: int = 150  # steps between two validations, which redraw curves.png and predictions.png
    eval_batches: int = 0  # batches of validation pictures; 0 takes all
    ckpt_every: int = 150  # steps between two checkpoints
    keep: int = 2  # newest checkpoints to keep
    profile: str | None = None  # directory for a trace of steps 10 to 15, for TensorBoard or XProf
    wandb: str | None = None  # project on Weights & Biases to log to
    # use
    predict: tuple[str, ...] = ()  # picture files to classify; with --steps 0


CIFAR = dict(data=("uoft-cs/cifar10",), image_size=32, crop_pad=4, flip=True, shuffle_buffer=10_000)
CIFAR |= dict(width=64, steps=78_200, batch_size=128, eval_every=391, ckpt_every=1_955, warmup_steps=391)
CIFAR |= dict(label_smoothing=0.0, ema=0.0, mixup=0.0)
IMAGENET = dict(data=("ILSVRC/imagenet-1k",), image_size=224, crop="resized", flip=True, eval_crop=0.875)
IMAGENET |= dict(shuffle_buffer=5_000, depth=50, width=64, stem="imagenet", ema=0.0, mixup=0.0)
# 1,281,167 pictures / 1,024 are 1,251 steps an epoch, of which 90, and 5 to warm up (Goyal et al. 2017)
IMAGENET |= dict(steps=112_590, batch_size=1_024, warmup_steps=6_255, eval_every=6_255, ckpt_every=1_251)
IMAGENET |= dict(lr=1.024, momentum=0.875, weight_decay=2**-15, dtype="bfloat16")
PRESETS = {"digits": {}, "cifar10": CIFAR, "imagenet": IMAGENET}


# ---- data ----


class View(NamedTuple):
    """How a model wants to see a picture when it is evaluated: what preprocessor_config.json says."""

    size: int  # side of the central square, S
    short: int  # to which the short side is resized before
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resample: int = Image.Resampling.BILINEAR


DECODERS = ThreadPoolExecutor(os.cpu_count(), "decode")  # pillow works without the interpreter's lock


def open_image(data, shrink=None):
    """The picture in the bytes `data`, upright, in RGB, on white where it is transparent.

    `shrink(width, height)` is the least size that is of use: a jpeg may come at 1/2, 1/4 or 1/8 of its own.
    """
    image = Image.open(BytesIO(data))
    if shrink is not None:
        image.draft(None, shrink(*image.size))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits and more, which convert() would clip
        pixels = np.asarray(image, np.float32)
        top = 65535 if image.mode.startswith("I") else pixels.max()
        image = Image.fromarray(np.uint8(255 * np.clip(pixels / top, 0, 1)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def central(width, height, share=1.0):
    """Box (left, top, right, bottom) of the central square, `share` of the short side long."""
    side = min(width, height) * share
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width, height, areas, shapes, where):
    """Box of the first of the `areas` (of 1) and `shapes` (width / height) that fits, at `where` (2,)."""
    for area, shape in zip(areas, shapes):
        w, h = math.sqrt(area * shape * width * height), math.sqrt(area / shape * width * height)
        if w <= width and h <= height:
            left, top = where[0] * (width - w), where[1] * (height - h)
            return left, top, left + w, top + h
    return central(width, height)


def resize(image, size, box, resample=Image.Resampling.BILINEAR):
    return image.resize((size, size), resample, box, reducing_gap=2.0)


def least(box_of, size):
    """The least (width, height) of a picture in which the box is still `size` pixels long and wide."""

    def shrink(width, height):
        left, top, right, bottom = box_of(width, height)
        scale = size / min(right - left, bottom - top)
        return math.ceil(width * scale), math.ceil(height * scale)

    return shrink


def evaluation_crop(data, view):
    """The picture in the bytes `data` as the model wants to see it, (S, S, 3) uint8."""
    box_of = partial(central, share=view.size / view.short)
    image = open_image(data, least(box_of, view.size))
    return np.asarray(resize(image, view.size, box_of(*image.size), view.resample))


def training_crop(data, cfg, view, key):
    """A random crop (S, S, 3) uint8, shifted or of random area and shape; the same for the same `key`."""
    rng, S = np.random.default_rng(key), view.size
    where, mirror = rng.random(2), cfg.flip and rng.random() < 0.5
    if cfg.crop == "pad":
        image = open_image(data, least(central, S))
        image = image if image.size == (S, S) else resize(image, S, central(*image.size))
        left, top = (where * (2 * cfg.crop_pad + 1)).astype(int) - cfg.crop_pad
        image = image.crop((left, top, left + S, top + S))  # black beyond the edge
    else:  # Szegedy et al. 2014
        areas, shapes = rng.uniform(cfg.crop_area, 1, 10), np.exp(rng.uniform(-1, 1, 10) * math.log(4 / 3))
        box_of = partial(random_box, areas=areas, shapes=shapes, where=where)
        image = open_image(data, least(box_of, S))
        image = resize(image, S, box_of(*image.size))
    return np.asarray(image)[:, ::-1] if mirror else np.asarray(image)


def is_held_out(data, every):
    """Whether a picture is for validation: one in `every` is, by its bytes, wherever it stands and recurs."""
    return zlib.crc32(data) % every == 0


def decode(source, crop, classes, batch):
    """{"image": (S, S, 3) uint8 each, "label": int32} of the records for which `crop` gives a picture."""

    def attempt(value, record):
        try:
            data = common.image_bytes(value)
        except (FileNotFoundError, IsADirectoryError) as error:
            return error  # any other fault of disk or network is the stream's to mend
        try:
            return crop(data, record)
        except Exception as error:  # pillow raises some ten kinds
            return error

    rows = {"image": [], "label": []}
    found = DECODERS.map(attempt, batch["image"], batch["record"])
    for image, label, record in zip(found, batch["label"], batch["record"]):
        if label >= classes:
            source.skip(record, f"label is {label}, expected a class from 0 to {classes - 1}")
        elif isinstance(image, Exception):
            source.skip(record, common.first_line(image))
        elif image is not None:
            rows["image"].append(image)
            rows["label"].append(np.int32(label))
    return rows


def training_images(source, cfg, view, classes, every, epoch):
    """One epoch of `source` as rows {"image": (S, S, 3) uint8, "label": int32}, cropped at random.

    With `every` above 1, but for the pictures held out.
    """

    def shuffle(batch):
        records = batch["record"]
        order = np.random.default_rng([cfg.seed, epoch, source.rank, records[0]]).permutation(len(records))
        return {name: [column[i] for i in order] for name, column in batch.items()}

    def crop(data, record):
        if every == 1 or not is_held_out(data, every):
            return training_crop(data, cfg, view, [cfg.seed, epoch, record])

    stages = (shuffle, cfg.shuffle_buffer), (partial(decode, source, crop, classes), 64)
    return source.map(epoch, cfg.seed, *stages)


def validation_batches(sources, view, classes, batch_size):
    """Each picture of [(source, every), ...] that is held out, once, in batches of training_images' columns.

    Blank pictures with the label -1 fill the last one up.
    """
    images, labels = [], []
    for source, every in sources:
        # a pass of its own: training counts the bad records of its own at the same time
        source = dataclasses.replace(source, epoch=None, recent=deque(maxlen=101))
        crop = lambda data, _, every=every: evaluation_crop(data, view) if is_held_out(data, every) else None
        rows = iter(source)
        while chunk := list(islice(rows, 64)):
            source.seen = chunk[-1]["record"]
            found = decode(source, crop, classes, {name: [row[name] for row in chunk] for name in chunk[0]})
            images, labels = images + found["image"], labels + found["label"]
            while len(images) >= batch_size:
                yield np.stack(images[:batch_size]), np.stack(labels[:batch_size])
                images, labels = images[batch_size:], labels[batch_size:]
    if images:
        short = batch_size - len(images)
        yield np.pad(images, [(0, short), *[(0, 0)] * 3]), np.pad(labels, (0, short), constant_values=-1)


def open_digits(seed):
    """scikit-learn's 1,797 handwritten digits (Alpaydin & Kaynak 1998) as png files, every fifth held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    files = []
    for pixels in digits.images:  # (8, 8), 0 to 16
        Image.fromarray(np.uint8(pixels * 255 / 16)).save(file := BytesIO(), "png")
        files.append({"bytes": file.getvalue(), "path": None})
    classes = [str(name) for name in digits.target_names]
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=classes))
    order, n, sources = np.random.default_rng(seed).permutation(len(files)), len(files) // 5, {}
    for split, part in {"validation": order[:n], "train": order[n:]}.items():
        rows = {"image": [files[i] for i in part], "label": digits.target[part].tolist()}
        shards = max(4, jax.process_count())
        ds = datasets.Dataset.from_dict(rows, features).to_iterable_dataset(num_shards=shards)
        columns = {"image": "image", "label": "label"}
        how = dict(rank=jax.process_index(), world=jax.process_count())
        sources[split] = common.Source(ds, columns, dict(data="digits", split=split), classes, **how)
    return sources


# ---- model ----


def total(x):
    """Sum over all axes of x but the last, in float32."""
    if jax.default_backend() != "cpu":
        return jnp.sum(x, (0, 1, 2), jnp.float32)
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return jnp.ones(len(x)) @ x  # ten times faster than XLA's own sum over the leading axes


@jax.custom_vjp
def standardise(x, scale, bias):
    """(y (B, H, W, C), mean (C,), variance (C,)) in float32: y is (x - mean) / deviation * scale + bias.

    Mean and variance are over B, H and W. Only y has a gradient: written out, it takes half of autodiff's
    passes over x.
    """
    return standardise_fwd(x, scale, bias)[0]


def standardise_fwd(x, scale, bias):
    n = x.size // x.shape[-1]
    mean = total(x) / n
    var = total(jnp.square(x - mean)) / n  # E[x^2] - E[x]^2 would put a loss off by 1e-3 within three steps
    inv = jax.lax.rsqrt(var + 1e-5)
    return ((x - mean) * (inv * scale) + bias, mean, var), (x, mean, inv, scale)


def standardise_bwd(saved, grads):
    (x, mean, inv, scale), dy = saved, grads[0]
    x_hat = (x - mean) * inv
    dbias, dscale = total(dy), total(dy * x_hat)
    n = x.size // x.shape[-1]
    return (scale * inv * (dy - (dbias + x_hat * dscale) / n)).astype(x.dtype), dscale, dbias


standardise.defvjp(standardise_fwd, standardise_bwd)


class BatchNorm(nnx.Module):
    """Ioffe & Szegedy 2015. Statistics are taken and kept in float32, over the batch of all devices."""

    def __init__(self, features, dtype, scale=1.0):
        self.scale = nnx.Param(jnp.full(features, scale, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(features)), nnx.BatchStat(jnp.ones(features))
        self.dtype = dtype

    def __call__(self, x, train):
        if not train:
            scale = self.scale[...] * jax.lax.rsqrt(self.var[...] + 1e-5)
            return ((x - self.mean[...]) * scale + self.bias[...]).astype(self.dtype)
        y, mean, var = standardise(x, self.scale[...], self.bias[...])
        n = x.size / x.shape[-1]
        # nnx.BatchNorm keeps the biased variance; PyTorch, and so the published weights, the unbiased one
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * mean
        self.var[...] = 0.9 * self.var[...] + 0.1 * n / max(n - 1, 1) * var
        return y.astype(self.dtype)


def conv(fan_in, fan_out, size, stride, dtype, rngs):
    """A convolution with He's init, padded as PyTorch does it: SAME is another thing at stride 2."""
    init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
    how = dict(strides=stride, padding=size // 2, use_bias=False, kernel_init=init, dtype=dtype)
    return nnx.Conv(fan_in, fan_out, (size, size), **how, rngs=rngs)


def head(fan_in, classes, rngs):
    """The classifier, with PyTorch's init; in float32 whatever comes before."""
    init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return nnx.Linear(fan_in, classes, kernel_init=init, rngs=rngs)


def shortcut(fan_in, fan_out, stride, dtype, rngs):
    """A projection where a block changes the shape (downsample.0 and .1 in torchvision), else nothing."""
    if fan_in == fan_out and stride == 1:
        return nnx.List([])
    return nnx.List([conv(fan_in, fan_out, 1, stride, dtype, rngs), BatchNorm(fan_out, dtype)])


class Basic(nnx.Module):
    def __init__(self, fan_in, fan_out, stride, dtype, rngs):
        self.conv1 = conv(fan_in, fan_out, 3, stride, dtype, rngs)
        self.bn1 = BatchNorm(fan_out, dtype)
        self.conv2 = conv(fan_out, fan_out, 3, 1, dtype, rngs)
        # scale 0: a new block is the identity (Goyal et al. 2017)
        self.bn2 = BatchNorm(fan_out, dtype, scale=0.0)
        self.downsample = shortcut(fan_in, fan_out, stride, dtype, rngs)

    def __call__(self, x, train):
        y = nnx.relu(self.bn1(self.conv1(x), train))
        y = self.bn2(self.conv2(y), train)
        if self.downsample:
            x = self.downsample[1](self.downsample[0](x), train)
        return nnx.relu(x + y)


class Bottleneck(nnx.Module):
    def __init__(self, fan_in, fan_out, stride, dtype, rngs):
        C = fan_out // 4
        self.conv1, self.bn1 = conv(fan_in, C, 1, 1, dtype, rngs), BatchNorm(C, dtype)
        # v1 has the stride in conv1
        self.conv2, self.bn2 = conv(C, C, 3, stride, dtype, rngs), BatchNorm(C, dtype)
        self.conv3, self.bn3 = conv(C, fan_out, 1, 1, dtype, rngs), BatchNorm(fan_out, dtype, scale=0.0)
        self.downsample = shortcut(fan_in, fan_out, stride, dtype, rngs)

    def __call__(self, x, train):
        y = nnx.relu(self.bn1(self.conv1(x), train))
        y = nnx.relu(self.bn2(self.conv2(y), train))
        y = self.bn3(self.conv3(y), train)
        if self.downsample:
            x = self.downsample[1](self.downsample[0](x), train)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """ResNet v1.5 (He et al. 2015), its attributes named as in torchvision.

    `config`: a transformers.ResNetConfig, and in it `stem`, "imagenet" where there is none. `view`: how it
    wants to see pictures. `dtype`: of the computation; parameters are float32.
    model(images (B, H, W, 3) float, normalised) -> logits (B, classes) float32. `train` takes batch norm's
    statistics from the batch and keeps them; dropout only where a key is given too.
    """

    def __init__(self, config, view, *, dropout=0.0, dtype="float32", remat=False, rngs):
        self.config, self.view, self.dropout = nnx.static(config), nnx.static(view), dropout
        self.dtype, self.remat = dtype, remat
        self.stem = getattr(config, "stem", "imagenet")
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        block = Bottleneck if config.layer_type == "bottleneck" else Basic
        C = config.embedding_size
        self.conv1, self.bn1 = conv(3, C, size, stride, dtype, rngs), BatchNorm(C, dtype)
        for i, (depth, width) in enumerate(zip(config.depths, config.hidden_sizes), 1):
            first = block(C, width, 1 if i == 1 else 2, dtype, rngs)
            rest = [block(width, width, 1, dtype, rngs) for _ in range(depth - 1)]
            setattr(self, f"layer{i}", nnx.List([first, *rest]))
            C = width
        self.fc = head(C, config.num_labels, rngs)

    def __call__(self, images, train=False, key=None):
        x = nnx.relu(self.bn1(self.conv1(images.astype(self.dtype)), train))
        if self.stem == "imagenet":
            x = nnx.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for i in range(1, len(self.config.depths) + 1):
            for block in getattr(self, f"layer{i}"):  # (B, H, W, C), then half of H and W, twice the C
                call = type(block).__call__
                x = (nnx.remat(call, static_argnums=2) if self.remat else call)(block, x, train)
        x = jnp.mean(x.astype(jnp.float32), (1, 2))  # (B, C)
        if key is not None and self.dropout > 0:
            x = jnp.where(jax.random.bernoulli(key, 1 - self.dropout, x.shape), x / (1 - self.dropout), 0)
        return self.fc(x)


def normalise(images, view):
    """uint8 (..., 3) -> float32 with the view's mean and deviation taken out."""
    mean, std = np.array(view.mean, np.float32), np.array(view.std, np.float32)
    return images.astype(jnp.float32) * (1 / (255 * std)) - mean / std


# ---- pretrained weights in and out ----


def checkpoint_names(model):
    """{torchvision's name: parameter or statistic}."""
    leaves = dict(kernel="weight", scale="weight", bias="bias", mean="running_mean", var="running_var")
    flat = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {".".join([*map(str, path[:-1]), leaves[path[-1]]]): param for path, param in flat}


def transformers_name(name):
    """transformers' name of a tensor: layer1.0.bn2.bias is
    resnet.encoder.stages.0.layers.0.layer.1.normalization.bias."""
    *_, leaf = name.split(".")
    kind = "convolution" if re.search(r"conv\d|downsample.0", name) else "normalization"
    if m := re.match(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)", name):
        part = "shortcut" if m[3] == "downsample." else f"layer.{int(m[4]) - 1}"
        return f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.{part}.{kind}.{leaf}"
    return f"classifier.1.{leaf}" if name.startswith("fc.") else f"resnet.embedder.embedder.{kind}.{leaf}"


def torch_layout(array):
    """(H, W, in, out) -> (out, in, H, W), (in, out) -> (out, in); a vector stays."""
    return np.ascontiguousarray(np.transpose(array, {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]))


def our_layout(array):
    return np.transpose(array, {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])


def resnet_config(depth, width, stem, classes):
    """transformers' config of the ResNet of that depth; of its own it knows no stem but ImageNet's."""
    kind = "bottleneck" if depth >= 50 else "basic"
    sizes = [width * 2**i * (4 if kind == "bottleneck" else 1) for i in range(4)]
    how = dict(depths=list(DEPTHS[depth]), hidden_sizes=sizes, layer_type=kind, embedding_size=width)
    return ResNetConfig(**how, **label_names(classes), stem=stem)


def depth_of(config):
    return sum(config.depths) * (3 if config.layer_type == "bottleneck" else 2) + 2


def label_names(classes):
    return dict(id2label=dict(enumerate(classes)), label2id={name: i for i, name in enumerate(classes)})


def read_model(folder, path):
    """(ResNetConfig, View) of a folder in transformers' or timm's format."""
    read = lambda name: json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    raw, seen = read("config.json"), read("preprocessor_config.json")
    if "architecture" in raw:  # timm's
        name, cfg = raw["architecture"], raw.get("pretrained_cfg", {})
        known = [f"resnet{depth}" for depth in DEPTHS]
        expect(name in known, f"--init-from {path}: architecture is {name}, expected {', '.join(known)}")
        classes = cfg.get("label_names") or [str(i) for i in range(raw["num_classes"])]
        config = resnet_config(int(name.removeprefix("resnet")), 64, "imagenet", classes)
        resample = Image.Resampling[cfg.get("interpolation", "bicubic").upper()]
        size = cfg.get("input_size", [3, 224, 224])[-1]
        seen = dict(size=size, crop_pct=cfg.get("crop_pct", 0.875), resample=resample)
        seen |= dict(image_mean=cfg.get("mean"), image_std=cfg.get("std"))
    else:
        config = common.read_config((ResNetConfig,), folder, path)
    fixed = dict(hidden_act="relu", num_channels=3, downsample_in_first_stage=False)
    for name, value in (fixed | dict(downsample_in_bottleneck=False)).items():
        found = getattr(config, name)
        expect(found == value, f"--init-from {path}: {name} is {found}, only {value} is supported")
    edge = lambda size: size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
    short = edge(seen.get("size", 224))
    size = edge(seen["crop_size"]) if "crop_size" in seen else short
    if "crop_pct" in seen:  # ConvNext's processor and timm: this share of the short side is seen
        short = int(size / seen["crop_pct"])
    mean, std = (tuple(seen.get(f"image_{name}") or getattr(View, name)) for name in ("mean", "std"))
    return config, View(size, short, mean, std, int(seen.get("resample", Image.Resampling.BILINEAR)))


def from_pretrained(path, *, classes=None, size=None, dropout=0.0, dtype="float32", remat=False, seed=0):
    """The ResNet of a hub id, a folder or a run directory, named as in transformers or as in torchvision.

    Names of `classes` that are not as many as the checkpoint's get a new head; `size` is another side for
    pictures. Raises UsageError for what is not a ResNet.
    """
    files = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
    folder = common.snapshot(path, "--init-from", files)
    config, view = read_model(folder, path)
    if size is not None:
        view = view._replace(size=size, short=round(view.short * size / view.size))
    weights, trained = common.read_weights(folder, path), config.num_labels
    if classes is not None:
        config.update(label_names(classes))
    how = dict(dropout=dropout, dtype=dtype, remat=remat)
    model = nnx.eval_shape(lambda: ResNet(config, view, **how, rngs=nnx.Rngs(0)))
    fresh = config.num_labels != trained
    if fresh:
        print(f"head       new, for {config.num_labels} classes; {path} has {trained}")
        model.fc = head(model.fc.in_features, config.num_labels, nnx.Rngs(seed))
    state = nnx.state(model)
    for name, param in checkpoint_names(state).items():
        if fresh and name.startswith("fc."):
            continue
        theirs = transformers_name(name)
        found = [n for n in (name, theirs, theirs.removeprefix("resnet.")) if n in weights]
        expect(found, f"--init-from {path}: {name} is missing, and so is {theirs}")
        w = our_layout(weights[found[0]].astype(np.float32))
        expect(w.shape == param.shape, f"--init-from {path}: {found[0]} is {w.shape}, expected {param.shape}")
        param.set_value(jnp.asarray(w))
    nnx.update(model, state)
    return model


# transformers has no ResNet with the small stem: these lines, in the exported folder, make one of its own
CIFAR_CODE = '''"""ResNet with a 3x3 stem and no pool; loaded with trust_remote_code=True."""

from torch import nn
from transformers import ResNetForImageClassification


class CifarResNetForImageClassification(ResNetForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(3, config.embedding_size, 3, padding=1, bias=False)
        stem.pooler = nn.Identity()
'''


def save_pretrained(model, folder):
    """Write config.json, model.safetensors and preprocessor_config.json: what transformers loads.

    A model with the small stem is loaded with trust_remote_code=True.
    """
    folder, weights = Path(folder), {}
    for name, param in checkpoint_names(model).items():
        theirs = transformers_name(name)
        weights[theirs] = torch_layout(common.to_host(param[...]))
        if name.endswith("running_var"):
            weights[theirs.replace("running_var", "num_batches_tracked")] = np.array(0)
    if jax.process_index():
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kind = "ResNetForImageClassification"
    config = model.config.to_dict() | {"architectures": [kind], "dtype": "float32"}
    config.pop("auto_map", None)
    if model.stem == "cifar":
        (folder / "modeling_cifar_resnet.py").write_text(CIFAR_CODE)
        kind = f"Cifar{kind}"
        config |= {"architectures": [kind]}
        config |= {"auto_map": {"AutoModelForImageClassification": f"modeling_cifar_resnet.{kind}"}}
    ResNetConfig.from_dict(config).save_pretrained(folder)
    view = model.view
    seen = dict(image_processor_type="BitImageProcessor", do_resize=True, size={"shortest_edge": view.short})
    seen |= dict(do_center_crop=True, crop_size=dict(height=view.size, width=view.size))
    seen |= dict(do_rescale=True, do_normalize=True, do_convert_rgb=True, rescale_factor=1 / 255)
    seen |= dict(image_mean=view.mean, image_std=view.std, resample=int(view.resample))
    (folder / "preprocessor_config.json").write_text(json.dumps(seen, indent=2) + "\n")


# ---- loss and optimizer ----


def cross_entropy(logits, labels, smoothing=0.0):
    """In nats (B,); smoothing (Szegedy et al. 2015) spreads that share of the target over all classes."""
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    uniform = -jnp.mean(jax.nn.log_softmax(logits), axis=-1) if smoothing else 0
    return (1 - smoothing) * nats + smoothing * uniform


def make_schedule(cfg):
    """Linear warm-up for `warmup_steps`, then a cosine that reaches min_lr at `steps`."""
    steps = max(cfg.steps, 1)
    warm = min(cfg.warmup_steps, steps - 1)
    return optax.warmup_cosine_decay_schedule(cfg.lr / (warm + 1), cfg.lr, warm, steps, cfg.min_lr)


def make_optimizer(cfg, schedule):
    """SGD with Nesterov momentum; weight decay is part of the gradient, as in PyTorch."""
    decayed = partial(jax.tree.map, lambda p: p.ndim >= 2)  # convolutions and the head, not biases and norms
    rule = optax.add_decayed_weights(cfg.weight_decay, decayed)
    rule = optax.chain(rule, optax.sgd(schedule, momentum=cfg.momentum, nesterov=True))
    # of the same form without, so that a run can go on with another --grad-clip
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    return optax.chain(clip, rule)


def make_state(model, cfg, schedule):
    """(graphdef, state) of the model, its optimizer and with --ema the running mean of the model."""
    parts = [model, nnx.Optimizer(model, make_optimizer(cfg, schedule), wrt=nnx.Param)]
    if cfg.ema:
        graphdef, state = nnx.split(model)
        parts.append(nnx.merge(graphdef, jax.tree.map(jnp.copy, state)))
    return nnx.split(tuple(parts))


# ---- train and eval step ----


def conv_options():
    """Compiler options of a step on a CPU, where XLA's own weight gradients are faster than YNNPACK's."""
    kinds = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_ELTWISE"  # all but convolutions
    options = {"xla_cpu_experimental_ynn_fusion_type": kinds}
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # a jaxlib that does not know them
        return {}
    return options


def make_train_step(graphdef, state, cfg, schedule):
    """jit: (state, images (B, S, S, 3) uint8, labels (B,), key of this step) -> (state, metrics).

    The state is donated. Batch norm's statistics are those of a microbatch.
    """

    def loss_fn(params, stats, model_def, images, labels, key):
        model, (mix_key, drop_key) = nnx.merge(model_def, params, stats, copy=True), jax.random.split(key)
        x, targets = normalise(images, model.view), [(1.0, labels)]
        if cfg.mixup:  # each picture with the one as far from the other end
            share = jax.random.beta(mix_key, cfg.mixup, cfg.mixup)
            x, targets = share * x + (1 - share) * x[::-1], [(share, labels), (1 - share, labels[::-1])]
        logits = model(x, train=True, key=drop_key)
        nats = sum(share * cross_entropy(logits, target, cfg.label_smoothing) for share, target in targets)
        return jnp.mean(nats) / cfg.accum, nnx.state(model, nnx.BatchStat)

    shardings = jax.tree.map(lambda x: x.sharding, state), None

    @partial(jax.jit, donate_argnums=0, out_shardings=shardings, compiler_options=conv_options())
    def train_step(state, images, labels, key):
        model, optimizer, *average = nnx.merge(graphdef, state)
        model_def, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

        def microbatch(carry, batch):
            stats, loss, grads = carry
            (part, stats), found = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, model_def, *batch)
            return (stats, loss + part, jax.tree.map(jnp.add, grads, found)), None

        carry = stats, jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        if cfg.accum == 1:
            (stats, loss, grads), _ = microbatch(carry, (images, labels, key))
        else:  # every accum-th picture, so that devices keep their own: (accum, B / accum, ...)
            cut = lambda x: x.reshape(-1, cfg.accum, *x.shape[1:]).swapaxes(0, 1)
            parts = cut(images), cut(labels), jax.random.split(key, cfg.accum)
            (stats, loss, grads), _ = jax.lax.scan(microbatch, carry, parts)
        metrics = {"loss": loss, "lr": schedule(optimizer.step[...]), "grad_norm": optax.global_norm(grads)}
        nnx.update(model, stats)
        optimizer.update(model, grads)
        for mean in average:  # the first steps count less, or the init would stay in it for long
            decay = jnp.minimum(cfg.ema, optimizer.step[...] / (optimizer.step[...] + 10))
            move = lambda old, new, decay=decay: decay * old + (1 - decay) * new
            nnx.update(mean, jax.tree.map(move, nnx.state(mean), nnx.state(model)))
        return nnx.state((model, optimizer, *average)), metrics

    return train_step


def exported(graphdef, state):
    """The model that is evaluated and exported: the running mean where there is one."""
    model, _, *average = nnx.merge(graphdef, state)
    return average[0] if average else model


def eval_sums(model, images, labels):
    """Sums over the labels (B,) that are not -1: nats, top-1, top-5, number; and guesses (B,)."""
    logits, valid = model(normalise(images, model.view)), labels >= 0
    nats = cross_entropy(logits, jnp.maximum(labels, 0))
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]  # (B, 5)
    hits = best == labels[:, None]
    return [jnp.sum(x * valid) for x in (nats, hits[:, 0], hits.any(axis=1), 1)], best[:, 0]


def evaluate(eval_step, state, batches, put):
    """({val_loss, val_top1, val_top5} over all pictures, [(picture, label, guess), ...] of some of them)."""
    sums, shown, n, stride = np.zeros(4), [], 0, 1
    for images, labels in batches:
        parts, guesses = jax.device_get(eval_step(state, put(images), put(labels)))
        sums += parts
        for image, label, guess in zip(images, labels, guesses):
            if label >= 0 and n % stride == 0:
                shown.append((image.copy(), label, guess))
            n += label >= 0
            if len(shown) == 64:  # how many there are is known at the end
                shown, stride = shown[::2], 2 * stride
    loss, top1, top5 = sums[:3] / n
    return {"val_loss": float(loss), "val_top1": float(top1), "val_top5": float(top5)}, shown


def draw_predictions(path, shown, classes):
    """A grid of pictures with the class that was guessed, in red with the true one where that is another."""
    from matplotlib.figure import Figure  # half a second to import

    shown = shown[:: max(1, len(shown) // 32)][:32]
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes in (grid := figure.subplots(4, 8).reshape(-1)):
        axes.axis("off")
    for axes, (image, label, guess) in zip(grid, shown):
        axes.imshow(image)
        said, true = (textwrap.shorten(str(classes[i]), 20, placeholder="...") for i in (guess, label))
        title, color = (said, "black") if guess == label else (f"{said}\nnot {true}", "red")
        axes.set_title(title, size=8, color=color)
    figure.savefig(path.with_suffix(".tmp.png"), dpi=100)
    os.replace(path.with_suffix(".tmp.png"), path)


# ---- prediction ----


def predict(model, pictures, top=5):
    """[(class, probability), ...] of the likeliest classes for each picture, the bytes of a file."""
    classify = nnx.jit(lambda model, images: jax.nn.softmax(model(normalise(images, model.view))))
    found = []
    for i in range(0, len(pictures), 64):
        images = np.stack(list(DECODERS.map(partial(evaluation_crop, view=model.view), pictures[i : i + 64])))
        for row in np.asarray(classify(model, images)):
            best = np.argsort(-row, kind="stable")[:top]
            found.append([(model.config.id2label[int(k)], float(row[k])) for k in best])
    return found


# ---- the run ----


def check(cfg):
    """Raise UsageError for flags that cannot be meant."""
    common.check(cfg, "image_size shuffle_buffer width")
    expect(cfg.val_every > 1, f"--val-every {cfg.val_every}: must be at least 2, or all is held out")
    expect(cfg.depth in DEPTHS, f"--depth {cfg.depth}: expected {', '.join(map(str, DEPTHS))}")
    n = cfg.num_classes
    expect(n is None or n > 1, f"--num-classes {n}: must be above 1")
    expect(cfg.crop_pad >= 0, f"--crop-pad {cfg.crop_pad}: must not be negative")
    expect(cfg.mixup >= 0, f"--mixup {cfg.mixup}: must not be negative; 0 does not mix")
    for name in ("crop_area", "eval_crop"):
        expect(0 < getattr(cfg, name) <= 1, f"{flag(name)} {getattr(cfg, name)}: must be in (0, 1]")
    for name in ("momentum", "ema", "label_smoothing"):
        expect(0 <= getattr(cfg, name) < 1, f"{flag(name)} {getattr(cfg, name)}: must be in [0, 1)")
    expect(not cfg.predict or not cfg.steps, "--predict: needs --steps 0, and a model with --init-from")


def build(cfg, classes):
    """The model to start from: that of --init-from, or a new one; with these names of classes if any."""
    how = dict(dropout=cfg.dropout, dtype=cfg.dtype, remat=cfg.remat)
    if cfg.init_from:
        default = Config(**PRESETS[cfg.preset])
        size = None if cfg.image_size == default.image_size else cfg.image_size
        model = from_pretrained(cfg.init_from, classes=classes, size=size, seed=cfg.seed, **how)
        config = model.config
        sizes = dict(depth=depth_of(config), width=config.embedding_size, stem=model.stem)
        for name, found in sizes.items():  # left at the default, they are those of the checkpoint
            asked, known = getattr(cfg, name), (found, getattr(default, name))
            expect(asked in known, f"{flag(name)} {asked}: {cfg.init_from} has {found}")
    else:
        config = resnet_config(cfg.depth, cfg.width, cfg.stem, classes)
        view = View(cfg.image_size, round(cfg.image_size / cfg.eval_crop))
        model = ResNet(config, view, **how, rngs=nnx.Rngs(cfg.seed))  # one jit of it all compiles far longer
    stride = {"imagenet": 32, "cifar": 8}[model.stem]
    small = f"the {model.stem} stem and the stages divide it by {stride}"
    expect(model.view.size >= stride, f"--image-size {model.view.size}: too small, {small}")
    return model


def open_sources(cfg):
    """Training sources, validation sources, each with the share held out of it, and the classes or None.

    A share `every` is one picture in so many: 1 where it is a whole split.
    """
    columns = {"image": cfg.image_column, "label": cfg.label_column}
    opened = [open_digits(cfg.seed)] if cfg.data == ("digits",) else common.open_data(cfg, columns)
    train, val = [], []
    for splits in opened:
        own = splits.get("validation", splits.get("test"))
        every = 1 if own or cfg.val_data else cfg.val_every
        train.append((splits["train"], every))
        val.append((own or splits["train"], every))
    if cfg.val_data:
        found = common.open_data(cfg, columns, cfg.val_data, "--val-data")
        val = [(splits.get("validation", splits.get("test", splits["train"])), 1) for splits in found]
    n, classes = cfg.num_classes, train[0][0].classes
    if cfg.data == ("synthetic",):
        n = n or 1_000  # as ImageNet
    for source, _ in (*train, *val):
        unlike = f"{source.fingerprint['data']} has {brief(source.classes)}, {cfg.data[0]} {brief(classes)}"
        expect(source.classes == classes, f"--data: the classes must be the same; {unlike}")
    if classes is None:
        expect(n or cfg.init_from, f"--num-classes: is needed, for {cfg.data[0]} does not name its classes")
        most = max(row["label"] for source, _ in train for row in islice(source, 16))
        expect(n is None or most < n, f"--num-classes {n}: {cfg.data[0]} has a label {most}")
        return train, val, n and [str(i) for i in range(n)]
    expect(n is None or n >= len(classes), f"--num-classes {n}: {cfg.data[0]} has {len(classes)} classes")
    return train, val, [*classes, *map(str, range(len(classes), n or 0))]


def brief(names):
    return textwrap.shorten(", ".join(names or ["no names of classes"]), 60, placeholder=" ...")


def read_picture(name):
    """The bytes of a file given to --predict."""
    expect(Path(name).is_file(), f"--predict {name}: no such file")
    data = Path(name).read_bytes()
    try:
        open_image(data)
    except Exception as error:  # pillow raises some ten kinds
        raise common.UsageError(f"--predict {name}: not an image: {common.first_line(error)}") from error
    return data


def main(cfg):
    """Train as `cfg` says -> the last metrics; with steps 0 evaluate or predict. Raises UsageError."""
    check(cfg)
    key, mesh = jax.random.key(cfg.seed), common.make_mesh()
    if not cfg.steps and cfg.predict:
        pictures = [read_picture(name) for name in cfg.predict]
        for name, best in zip(cfg.predict, predict(build(cfg, None), pictures)):
            print(name, *(f"{p:8.2%}  {label}" for label, p in best), sep="\n")
        return {}

    # the pictures, and a model for their classes
    train, val, classes = open_sources(cfg)
    model, schedule = build(cfg, classes if cfg.steps else None), make_schedule(cfg)
    view, names, data = model.view, model.config.id2label, " ".join((*cfg.data, *cfg.data_name))
    n, S, val_name = len(names), view.size, " ".join(cfg.val_data) or data
    fits = classes is None or len(classes) == n
    expect(fits, f"--init-from {cfg.init_from}: has {n} classes, {data} {len(classes or ())}")

    held_out = next(validation_batches(val, view, n, 1), None)
    expect(held_out, "--val-every: no picture is held out; give a smaller number, or --val-data")

    # model and optimizer, split once: their arrays are the state that the steps hand on
    graphdef, state = make_state(model, cfg, schedule)
    state = common.shard_state(mesh, state, cfg.fsdp)
    train_step = make_train_step(graphdef, state, cfg, schedule)
    sums = lambda state, images, labels: eval_sums(exported(graphdef, state), images, labels)
    eval_step = jax.jit(sums, out_shardings=common.replicated(mesh))
    put, put_whole = partial(common.shard_batch, mesh), partial(common.shard_whole_batch, mesh)

    def validate(state):
        batches = validation_batches(val, view, n, cfg.batch_size)
        batches = common.Prefetch(islice(batches, cfg.eval_batches or None), depth=2)
        with closing(batches):
            return evaluate(eval_step, state, batches, put_whole)

    if not cfg.steps:
        result, _ = validate(state)
        print(*(f"{name} {value:.4f}" for name, value in result.items()), f"on {val_name}")
        return result

    # the run directory, the newest checkpoint in it, and the stream from where that was
    found = common.fingerprint([s for s, _ in train]) | {"classes": list(names.values())}
    run = common.Run("resnet", cfg, found, lambda folder: None)
    step, state, position = run.restore(state)
    epochs = [partial(training_images, s, cfg, view, n, every) for s, every in train]
    rows, how = cfg.batch_size // jax.process_count(), dict(seed=cfg.seed, position=position)
    if cfg.data == ("synthetic",):
        columns = dict(image=((S, S, 3), 0, 256, np.uint8), label=((), 0, n, np.int32))
        stream = common.synthetic_batches(columns, rows, **how)
    else:
        how |= dict(weights=cfg.data_weights, retries=cfg.retries)
        stream = common.batches(epochs, rows, **how)
    # a window of pictures comes in a burst: up to 2 GB of them wait for the device
    ahead = int(np.clip(2e9 / (cfg.batch_size * S * S * 3), 2, 128))
    stream = common.Prefetch(stream, depth=ahead, stop=lambda: run.stop)

    N, flops = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))), 0
    if common.peak_flops():  # forward by XLA's own count; backward is twice that
        forward = jax.jit(lambda state, images: exported(graphdef, state)(images))
        flops = 3 * forward.lower(state, jnp.zeros((1, S, S, 3))).cost_analysis()["flops"]
    kind = f"ResNet-{depth_of(model.config)}, {model.stem} stem"
    print(f"model      {kind}, {N / 1e6:.1f} M parameters, {cfg.dtype}")
    print(f"devices    {jax.device_count()} x {jax.devices()[0].device_kind}")
    print(f"data       {data}, {n} classes, validation on {val_name}")
    print(f"step       {cfg.batch_size} pictures of {S} x {S}, SGD")
    print(f"run        {run.dir}, from step {step} to {cfg.steps}", flush=True)
    del model  # with --fsdp, or the first device would keep it whole

    with run.training(step, "images", cfg.batch_size, flops, stream):
        for batch, position in islice(stream, cfg.steps - step):  # ends early on Ctrl-C or SIGTERM
            images, labels = put((batch["image"], batch["label"]))
            state, metrics = train_step(state, images, labels, jax.random.fold_in(key, step))
            step += 1
            run.step(step, state, position, metrics)
            last = step == cfg.steps
            if step % cfg.eval_every == 0 or last:
                with run.pause():
                    result, shown = validate(state)
                    if run.leads:
                        draw_predictions(run.dir / "predictions.png", shown, names)
                run.flush(**result)
            if step % cfg.ckpt_every == 0 or last:
                run.save()
    save_pretrained(exported(graphdef, state), run.dir)
    print(f"a Hugging Face model folder is in {run.dir}")
    return run.last


if __name__ == "__main__":
    common.cli(Config, PRESETS, main, __doc__)
