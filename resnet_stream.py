"""ResNet (He et al. 2015) trained from a stream of pictures, in one file.

    python resnet_stream.py                     # offline: a small ResNet on scikit-learn's handwritten digits
    python resnet_stream.py --preset imagenet   # ResNet-50 on ImageNet, streamed from the Hugging Face hub
    python resnet_stream.py --steps 0 --init-from microsoft/resnet-50 --predict cat.jpg dog.jpg

Pictures are decoded and cropped in threads as they arrive. A run killed at any moment goes on with --resume,
bit for bit. When it ends, its directory is a Hugging Face model folder.

Measured on two CPU cores: the first command reaches 99.7 % of the 359 held-out digits in 81 seconds. Not
measured: cifar10 is after kuangliu/pytorch-cifar, 200 epochs, and aims at 95 %; imagenet is after NVIDIA's
DeepLearningExamples, 90 epochs, and aims at their 77.1 % top-1.

Shapes: B batch, H height, W width, C channels, S side of the square that the model sees.
"""

import dataclasses
import math
import os
import re
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal

import common
from common import expect

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from datasets.utils.file_utils import xopen
from flax import nnx
from huggingface_hub.errors import EntryNotFoundError
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image, ImageOps, PngImagePlugin
from safetensors.numpy import save_file
from transformers import AutoImageProcessor, BitImageProcessorPil, ConvNextImageProcessorPil, ResNetConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BILINEAR = Image.Resampling.BILINEAR
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long metadata make no picture worse


@dataclasses.dataclass
class Config(common.RunConfig):
    preset: Literal["digits", "cifar10", "imagenet"] = (
        "digits"  # a recipe: other defaults for the flags below
    )
    # data
    data: tuple[str, ...] = ("digits",)  # digits (offline), synthetic, hub ids, files, URLs, folders
    data_name: tuple[str, ...] = ()  # configuration of each hub data set; - for none
    data_weights: tuple[float, ...] = ()  # share of each --data in the rows; equal without
    image_column: str | None = None  # column with the picture; found by its type
    label_column: str | None = None  # column with the class, an int; found by its type or name
    val_data: tuple[str, ...] = ()  # to validate on; else data's validation or test split, or see val_every
    val_every: int = 10  # where there is no such split: one picture in so many is held out, never trained on
    num_classes: int | None = None  # needed where labels are bare numbers; else found from their names
    image_size: int = 16  # side of the square that the model sees, S; left at the default, init_from's
    eval_crop: float = 1.0  # share of a picture's short side that evaluation sees; init_from has its own
    crop: Literal["pad", "resized"] = "pad"  # training sees shifted pictures, or random parts of them
    crop_pad: int = 2  # pad: shifted by at most so many pixels
    crop_area: float = 0.08  # resized: least share of the picture
    flip: bool = False  # training sees half of the pictures mirrored
    mixup: float = 0.2  # mixes pairs of pictures by Beta(mixup, mixup) (Zhang et al. 2017); 0 does not
    shuffle_buffer: int = 1_000  # pictures that are shuffled together, held as files
    # model
    depth: Literal[18, 34, 50, 101, 152] = 18  # layers
    width: int = 16  # channels after the stem; 64 is the published network
    stem: Literal["imagenet", "cifar"] = "cifar"  # 7x7 at stride 2 and a pool, or for small pictures 3x3
    dropout: float = 0.0  # on the pooled features
    init_from: str | None = None  # weights to start from: hub id, folder or run directory
    # training
    steps: int = 600  # optimizer steps; 0 only evaluates, or predicts, from init_from
    batch_size: int = 64  # pictures a step, over all devices
    device_rows: int = 256  # pictures that a device takes at once, to fit in memory
    accum: int | None = None  # microbatches in a step, batch norm sees one; else as few as device_rows allows
    lr: float = 0.1  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end, after half a cosine
    cooldown: float = 0.0  # share of the steps in which a constant rate falls in a line; 0 is the cosine
    warmup_steps: int = 50  # linear, from nothing to lr
    momentum: float = 0.9  # of SGD, Nesterov's: share of the last update in the next
    weight_decay: float = 5e-4  # on convolutions and the head, not on norms and biases
    label_smoothing: float = 0.1  # share of the target spread over all classes
    ema: float = 0.99  # decay of a running mean of the weights, then evaluated and exported; 0 keeps none
    grad_clip: float = 0.0  # largest norm of the whole gradient; 0 does not clip
    seed: int = 0  # of the init, the order of the data, crops, mixup and dropout
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters stay float32
    remat: bool = False  # recompute each block in the backward pass: less memory, a third more work
    eval_batches: int = 0  # batches of validation pictures; 0 takes all
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

# these may change when a run goes on, beside those of RunConfig
FREE = "steps device_rows accum lr min_lr cooldown warmup_steps momentum weight_decay label_smoothing mixup"
FREE += " grad_clip dropout remat eval_batches predict"


# ---- data ----


def open_digits():
    """scikit-learn's 1,797 handwritten digits (Alpaydin & Kaynak 1998) as png files, a fifth held out."""
    from sklearn.datasets import load_digits  # slow to import

    digits, files = load_digits(), []
    for pixels in digits.images:  # (8, 8), 0 to 16
        Image.fromarray(np.uint8(pixels * 255 / 16)).save(file := BytesIO(), "png")
        files.append(file.getvalue())
    order, splits = np.random.default_rng(0).permutation(len(files)), {}
    for split, part in {"validation": order[:359], "train": order[359:]}.items():
        rows = {"image": [files[i] for i in part], "label": digits.target[part]}
        splits[split] = datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=100)
    return common.Source(splits, {"image": "image", "label": "label"}, [*"0123456789"], 0, {})


def open_sources(cfg):
    """Sources to train on, and [(source, share)] to validate on: with one picture in `share` of its split."""
    roles = {"image": cfg.image_column, "label": cfg.label_column}
    train = [open_digits()] if cfg.data == ("digits",) else common.open_data(cfg, roles)
    if cfg.val_data:
        return train, [(source, 1) for source in common.open_data(cfg, roles, cfg.val_data, "--val-data")]
    return train, [(source, cfg.val_every if source.validation == "train" else 1) for source in train]


def class_names(cfg, sources):
    """The names of the classes, of all sources the same; None where the model of --init-from has to know."""
    n, names = cfg.num_classes, sources[0].classes
    for source in sources:
        others = f"its sources have other classes: {brief(names)}; {brief(source.classes)}"
        expect(source.classes == names, f"--data: {others}")
    needed = f"is needed, for {cfg.data[0]} does not name its classes"
    expect(n or names or cfg.init_from, f"--num-classes: {needed}")
    expect(not (n and names) or n == len(names), f"--num-classes {n}: {cfg.data[0]} has {brief(names)}")
    return names or (n and [str(i) for i in range(n)])


def brief(names):
    return textwrap.shorten(f"{len(names)}, {', '.join(names)}", 60, placeholder=" ...") if names else "none"


def read_file(value, retries):
    """The bytes of a picture's file: bytes, or {"bytes", "path"} as `datasets` has it. Raises ValueError."""
    value = {"bytes": value} if isinstance(value, bytes) else value
    if value.get("bytes") is not None:
        return value["bytes"]
    if not value.get("path"):
        raise ValueError("image has neither bytes nor a path")
    for failures in count(1):
        try:
            with xopen(value["path"], "rb") as file:
                return file.read()
        except Exception as error:  # the network's have no common kind
            cause = error.__cause__ or error  # fsspec finds no file where the host does not answer
            gone = isinstance(cause, FileNotFoundError | EntryNotFoundError)
            gone = gone or getattr(cause, "status", 0) in (403, 404, 410)
            if gone or "://" not in str(value["path"]):
                raise ValueError(common.in_brief(error)) from error
            common.wait_after(error, failures, retries)


def open_image(data, at_least=None):
    """The picture in a file's bytes, upright, in RGB, on white where it is transparent. Raises ValueError."""
    try:
        image = Image.open(BytesIO(data))
        if at_least:  # a large jpeg may come at 1/2, 1/4 or 1/8 of its size
            image.draft(None, (at_least, at_least))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16 bits and more, which convert() would clip
            pixels = np.asarray(image, np.float32)
            top = 65535 if image.mode.startswith("I") else pixels.max()
            image = Image.fromarray(np.uint8(255 * np.clip(pixels / top, 0, 1)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # pillow raises some ten kinds
        raise ValueError(common.in_brief(error)) from error


def random_box(width, height, least, rng):
    """(left, top, right, bottom) of a random part of a picture: `least` to all of it, 3:4 to 4:3."""
    area, shape = rng.uniform(least, 1, 10), np.exp(rng.uniform(-1, 1, 10) * math.log(4 / 3))
    for w, h in zip(np.sqrt(area * shape * width * height), np.sqrt(area / shape * width * height)):
        if w <= width and h <= height:
            left, top = rng.random(2) * (width - w, height - h)
            return left, top, left + w, top + h
    return None


def training_crop(cfg, size, data, key):
    """A random crop (S, S, 3) uint8, of random area and shape or shifted; the same for the same `key`."""
    rng, image, box = np.random.default_rng(key), open_image(data, 4 * size), None
    if cfg.crop == "resized":  # Szegedy et al. 2014
        box = random_box(*image.size, cfg.crop_area, rng)
    if box:
        image = image.resize((size, size), BILINEAR, box, reducing_gap=2.0)
    else:
        image = ImageOps.fit(image, (size, size), BILINEAR)  # the central square
    if cfg.crop == "pad":  # black beyond the edge
        left, top = rng.integers(-cfg.crop_pad, cfg.crop_pad + 1, 2)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)[:, :: -1 if cfg.flip and rng.random() < 0.5 else 1]


def make_rows(records, rng):
    """The records in another order, each with a key for its crop."""
    rows = zip(records["image"], records["label"], rng.integers(2**63, size=len(records["label"])))
    rows = [dict(image=image, label=label, key=key) for image, label, key in rows]
    return [rows[i] for i in rng.permutation(len(rows))]


def decode(crop, share, held_out, retries, row):
    """{"image": crop(bytes, key) (S, S, 3) uint8, "label": int32} of a row of make_rows; or the ValueError.

    One picture in `share`, by its bytes, wherever it stands and recurs, is for validation: None of the others
    where those `held_out` are wanted, and the other way round.
    """
    try:
        data = read_file(row["image"], retries)
        if share == 1 or (zlib.crc32(data) % share == 0) == held_out:
            return {"image": crop(data, row["key"]), "label": np.int32(row["label"])}
    except ValueError as error:
        path = row["image"].get("path") if isinstance(row["image"], dict) else None
        return ValueError(f"{path}: {error}") if path else error


def validation_rows(sources, view, retries):
    """Each picture of [(source, share), ...] that is held out, once, as `decode` gives it."""
    pool, seen, bad = ThreadPoolExecutor(os.cpu_count()), 0, 0
    crop = lambda data, _: view.pixels(open_image(data))
    for source, share in sources:
        rows = iter(source.stream(make_rows, 64, None, source.validation))
        while chunk := list(islice(rows, 64)):
            seen += len(chunk)
            for row in pool.map(partial(decode, crop, share, True, retries), chunk):
                if isinstance(row, ValueError):
                    bad += 1
                    common.report_bad(f"a picture to validate on: {row}", bad, seen)
                elif row is not None:
                    yield row


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

    Only y has a gradient: written out, it takes half of autodiff's passes over x.
    """
    return standardise_fwd(x, scale, bias)[0]


def standardise_fwd(x, scale, bias):
    n = x.size // x.shape[-1]
    mean = total(x) / n
    var = total(jnp.square(x - mean)) / n  # E[x^2] - E[x]^2 would put a loss off by 1e-3 within three steps
    inv = jax.lax.rsqrt(var + 1e-5)
    return ((x - mean) * (inv * scale) + bias, mean, var), (x, mean, inv, scale)


def standardise_bwd(saved, grads):
    (x, mean, inv, scale), (dy, _, _) = saved, grads
    x_hat, n = (x - mean) * inv, x.size // x.shape[-1]
    dscale, dbias = total(dy * x_hat), total(dy)
    # y does not change when all of x moves or stretches: take the parts of dy along 1 and along x_hat out
    dx = scale * inv * (dy - dbias / n - x_hat * dscale / n)
    return dx.astype(x.dtype), dscale, dbias


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


class ConvNorm(nnx.Module):
    """A convolution with He's init, padded as by PyTorch (SAME is another thing at stride 2), and a norm."""

    def __init__(self, fan_in, fan_out, size, stride, dtype, rngs, scale=1.0):
        init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        given = dict(strides=stride, padding=size // 2, use_bias=False, kernel_init=init, dtype=dtype)
        self.convolution = nnx.Conv(fan_in, fan_out, (size, size), **given, rngs=rngs)
        self.normalization = BatchNorm(fan_out, dtype, scale)

    def __call__(self, x, train):
        return self.normalization(self.convolution(x), train)


class Block(nnx.Module):
    """Two 3x3 convolutions, or a bottleneck: 1x1, 3x3 on a quarter of the channels, 1x1."""

    def __init__(self, kind, fan_in, fan_out, stride, dtype, rngs):
        layer, C = partial(ConvNorm, dtype=dtype, rngs=rngs), fan_out // 4
        # the last norm begins at 0, so that a new block is the identity (Goyal et al. 2017)
        if kind == "basic":
            layers = layer(fan_in, fan_out, 3, stride), layer(fan_out, fan_out, 3, 1, scale=0.0)
        else:  # v1 has the stride in the first
            layers = layer(fan_in, C, 1, 1), layer(C, C, 3, stride), layer(C, fan_out, 1, 1, scale=0.0)
        self.layer, changes = nnx.List(layers), fan_in != fan_out or stride > 1
        self.shortcut = layer(fan_in, fan_out, 1, stride) if changes else None

    def __call__(self, x, train):
        y = x
        for layer in self.layer[:-1]:
            y = nnx.relu(layer(y, train))
        y = self.layer[-1](y, train)
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x, train)))


class ResNet(nnx.Module):
    """ResNet v1.5 (He et al. 2015), its parts named as in transformers.

    `config`: a transformers.ResNetConfig, and in it `stem`, "imagenet" where there is none. `dtype`: of the
    computation; parameters are float32. model(images (B, H, W, 3), normalised) -> logits (B, classes).
    `train` takes batch norm's statistics from the batch and keeps them; dropout only with a key too.
    """

    def __init__(self, config, view, *, dropout=0.0, dtype="float32", remat=False, rngs):
        self.config, self.view, self.dropout = nnx.static(config), nnx.static(view), dropout
        self.dtype, self.remat = dtype, remat
        self.stem = getattr(config, "stem", "imagenet")
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        block = partial(Block, config.layer_type, dtype=dtype, rngs=rngs)
        C, stages = config.embedding_size, []
        self.embedder = ConvNorm(3, C, size, stride, dtype, rngs)
        for i, (depth, width) in enumerate(zip(config.depths, config.hidden_sizes)):
            first = block(C, width, stride=2 if i else 1)
            stages.append(nnx.List([first, *(block(width, width, stride=1) for _ in range(depth - 1))]))
            C = width
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's; float32 in any case
        self.stages = nnx.List(stages)
        self.classifier = nnx.Linear(C, config.num_labels, kernel_init=init, rngs=rngs)

    def __call__(self, images, train=False, key=None):
        x = nnx.relu(self.embedder(images.astype(self.dtype), train))
        if self.stem == "imagenet":
            # windows overlap, so that its gradient is a sum: in float32
            x = nnx.max_pool(x.astype(jnp.float32), (3, 3), (2, 2), [(1, 1), (1, 1)]).astype(self.dtype)
        call = nnx.remat(Block.__call__, static_argnums=2) if self.remat else Block.__call__
        for block in chain(*self.stages):  # (B, H, W, C), in each stage half of H and W, twice the C
            x = call(block, x, train)
        x = jnp.mean(x.astype(jnp.float32), (1, 2))  # (B, C)
        if key is not None and self.dropout > 0:
            x = jnp.where(jax.random.bernoulli(key, 1 - self.dropout, x.shape), x / (1 - self.dropout), 0)
        return self.classifier(x)


class View:
    """How a model wants to see pictures: what its image processor, one of transformers', makes of them."""

    def __init__(self, processor):
        self.processor = processor
        sizes = {self.pixels(Image.new("RGB", size)).shape[:2] for size in ((48, 32), (32, 48))}
        self.size = max(max(sizes))
        expect(sizes == {(self.size,) * 2}, f"pictures come out as {sizes}, and not as squares of one size")
        expect(not getattr(processor, "do_flip_channel_order", False), "do_flip_channel_order: not supported")
        images = [Image.new("RGB", (self.size,) * 2, color) for color in ("black", "white")]
        black, white = processor(images, return_tensors="np")["pixel_values"][:, :, 0, 0]
        self.offset, self.slope = black, (white - black) / 255  # rescaling, mean and deviation, if any

    def pixels(self, image):
        """The picture as the model is to see it, (S, S, 3) uint8."""
        raw = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
        return raw["pixel_values"][0].transpose(1, 2, 0)

    def normalise(self, images):
        """Pixels (..., 3) uint8 -> what the model reads, float32."""
        return images.astype(jnp.float32) * self.slope + self.offset

    def resized(self, size):
        settings = self.processor.to_dict()
        for name in {"size", "crop_size"} & {name for name in settings if settings[name]}:
            settings[name] = {side: round(n * size / self.size) for side, n in settings[name].items()}
        return View(type(self.processor)(**settings))


def new_view(size, share):
    """The view of a new model: the central square, `share` of a picture's short side long."""
    given = dict(size={"shortest_edge": round(size / share)}, crop_size=dict(height=size, width=size))
    given |= dict(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD, resample=BILINEAR)
    return View(BitImageProcessorPil(**given))


# ---- pretrained weights in and out ----


def checkpoint_names(model):
    """{transformers' name: parameter or statistic}."""
    leaves, names = dict(kernel="weight", scale="weight", mean="running_mean", var="running_var"), {}
    for path, param in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        part, *inner, leaf = map(str, path)
        if part == "stages":
            part, inner = "resnet.encoder.stages", [inner[0], "layers", *inner[1:]]
        part = {"embedder": "resnet.embedder.embedder", "classifier": "classifier.1"}.get(part, part)
        names[".".join([part, *inner, leaves.get(leaf, leaf)])] = param
    return names


def torchvision_name(name):
    """resnet.encoder.stages.0.layers.0.layer.1.normalization.bias -> layer1.0.bn2.bias."""
    *_, kind, leaf = name.split(".")
    conv = kind == "convolution"
    if m := re.search(r"stages\.(\d)\.layers\.(\d+)\.(?:layer\.(\d)|shortcut)", name):
        inner = f"{'conv' if conv else 'bn'}{int(m[3]) + 1}" if m[3] else f"downsample.{0 if conv else 1}"
        return f"layer{int(m[1]) + 1}.{m[2]}.{inner}.{leaf}"
    return f"fc.{leaf}" if name.startswith("classifier") else f"{'conv1' if conv else 'bn1'}.{leaf}"


def resnet_config(depth, width, stem, classes):
    """transformers' config of the ResNet of that depth; of its own it knows no stem but ImageNet's."""
    kind = "bottleneck" if depth >= 50 else "basic"
    sizes = [width * 2**i * (4 if kind == "bottleneck" else 1) for i in range(4)]
    given = dict(depths=list(DEPTHS[depth]), hidden_sizes=sizes, layer_type=kind, embedding_size=width)
    return ResNetConfig(**given, **common.label_names(classes), stem=stem)


def read_view(folder, where):
    """What preprocessor_config.json says; without one, what transformers has by default for a ResNet."""
    try:
        if any((folder / f"{name}_config.json").exists() for name in ("preprocessor", "processor")):
            return View(AutoImageProcessor.from_pretrained(folder, backend="pil"))
        return View(ConvNextImageProcessorPil())
    except Exception as error:  # transformers raises many kinds
        raise common.UsageError(f"{where}: preprocessor_config.json: {common.in_brief(error)}") from error


def from_pretrained(
    path, *, classes=None, new_head=False, size=None, dropout=0.0, dtype="float32", remat=False, seed=0
):
    """The ResNet of a hub id, a folder or a run directory, named as in transformers or as in torchvision.

    Its outputs are put in the order of the names `classes`, or with `new_head` begin anew where these are
    others. `size` is another side for pictures. Raises UsageError for what is not a ResNet.
    """
    where = f"--init-from {path}"
    config, weights, folder = common.read_pretrained((ResNetConfig,), path)
    sizes = "depths hidden_sizes embedding_size layer_type out_features out_indices stage_names"
    common.refuse_others(config, sizes, where)
    stem = getattr(config, "stem", "imagenet")
    expect(stem in ("imagenet", "cifar"), f"{where}: stem is {stem}, only imagenet and cifar are supported")
    view = read_view(folder, where)
    view = view.resized(size) if size not in (None, view.size) else view
    theirs = common.class_names(config) if {"classifier.1.weight", "fc.weight"} & {*weights} else []
    order = common.match_classes(theirs, classes) if classes else [*range(len(theirs))]
    others = f"its classes are {brief(theirs)}; those of the data are {brief(classes)}"
    expect(order or (classes and new_head), f"{where}: {others}")
    if classes:
        config.update(common.label_names(classes))
    create = lambda: ResNet(config, view, dropout=dropout, dtype=dtype, remat=remat, rngs=nnx.Rngs(seed))
    model = nnx.eval_shape(create) if order else create()
    if not order:
        print(f"head       new: {others}")
    state = nnx.state(model)
    for name, param in checkpoint_names(state).items():
        known = (name, name.removeprefix("resnet."), torchvision_name(name))
        w = next((weights.pop(n) for n in known if n in weights), None)
        if name.startswith("classifier") and not order:
            continue
        expect(w is not None, f"{where}: {name} is missing, and so is {known[-1]}")
        w = w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T  # PyTorch's are (out, in, H, W) and (out, in)
        expect(w.shape == param.shape, f"{where}: {name} is {w.shape}, expected {param.shape}")
        w = w[..., order] if name.startswith("classifier") else w
        param.set_value(jnp.asarray(w.astype(np.float32)))
    unused = [name for name in weights if not name.endswith("num_batches_tracked")]
    expect(not unused, f"{where}: {unused[:1]} has no place in a ResNet")
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
    """Write config.json, model.safetensors and preprocessor_config.json: what transformers loads."""
    folder, weights = Path(folder), {}
    for name, param in checkpoint_names(model).items():
        w = common.to_host(param[...])
        weights[name] = np.ascontiguousarray(w.transpose(3, 2, 0, 1) if w.ndim == 4 else w.T)
        if name.endswith("running_var"):
            weights[name.replace("running_var", "num_batches_tracked")] = np.array(0)
    if jax.process_index():
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kind, config = "ResNetForImageClassification", model.config.to_dict() | {"dtype": "float32"}
    config.pop("auto_map", None)
    if model.stem == "cifar":
        (folder / "modeling_cifar_resnet.py").write_text(CIFAR_CODE)
        kind = f"Cifar{kind}"
        config["auto_map"] = {"AutoModelForImageClassification": f"modeling_cifar_resnet.{kind}"}
    ResNetConfig.from_dict(config | {"architectures": [kind]}).save_pretrained(folder)
    model.view.processor.save_pretrained(folder)


# ---- loss and optimizer ----


def make_schedule(cfg):
    """Linear warm-up, then a cosine that reaches min_lr at `steps`, or with `cooldown` a plateau and a line.

    The second is warmup-stable-decay (arXiv 2405.18392): until it cools down, `steps` makes no difference.
    """
    steps = max(cfg.steps, 1)
    warm = min(cfg.warmup_steps, steps - 1)
    if cfg.cooldown == 0:
        return optax.warmup_cosine_decay_schedule(cfg.lr / (warm + 1), cfg.lr, warm, steps, cfg.min_lr)
    fall = max(1, round(cfg.cooldown * steps))
    parts = [optax.linear_schedule(cfg.lr / (warm + 1), cfg.lr, warm), optax.constant_schedule(cfg.lr)]
    parts.append(optax.linear_schedule(cfg.lr, cfg.min_lr, fall))
    return optax.join_schedules(parts, [warm, max(warm, steps - fall)])


def make_optimizer(cfg, schedule):
    """SGD with Nesterov momentum; weight decay is part of the gradient, as in PyTorch."""
    decayed = partial(jax.tree.map, lambda p: p.ndim >= 2)  # convolutions and the head, not biases and norms
    # of the same form without, so that a run can go on with another --grad-clip
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    sgd = optax.sgd(schedule, momentum=cfg.momentum, nesterov=True)
    return optax.chain(clip, optax.add_decayed_weights(cfg.weight_decay, decayed), sgd)


# ---- train and eval step ----


def conv_options():
    """Compiler options of a step on a CPU, where XLA's own weight gradients are faster than YNNPACK's."""
    kinds = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_ELTWISE"  # all but convolutions
    options = {"xla_cpu_experimental_ynn_fusion_type": kinds} if jax.default_backend() == "cpu" else {}
    with suppress(jax.errors.JaxRuntimeError):  # of a jaxlib that does not know them
        jax.jit(lambda: 0, compiler_options=options)()
        return options
    return {}


def make_train_step(graphdef, state, cfg, schedule):
    """jit: (state, images (B, S, S, 3) uint8, labels (B,), key of this step) -> (state, metrics).

    The state is donated. Batch norm's statistics are those of a microbatch.
    """
    accum = common.microbatches(cfg)

    def loss_fn(params, stats, model_def, images, labels, key):
        model, (mix_key, drop_key) = nnx.merge(model_def, params, stats, copy=True), jax.random.split(key)
        x, targets = model.view.normalise(images), jax.nn.one_hot(labels, model.config.num_labels)
        targets = optax.smooth_labels(targets, cfg.label_smoothing)  # Szegedy et al. 2015
        if cfg.mixup:  # each picture with the one as far from the other end
            share = jax.random.beta(mix_key, cfg.mixup, cfg.mixup)
            x, targets = (share * a + (1 - share) * a[::-1] for a in (x, targets))
        nats = optax.softmax_cross_entropy(model(x, train=True, key=drop_key), targets)
        return jnp.mean(nats) / accum, nnx.state(model, nnx.BatchStat)

    shardings = jax.tree.map(lambda x: x.sharding, state), None

    @partial(jax.jit, donate_argnums=0, out_shardings=shardings, compiler_options=conv_options())
    def train_step(state, images, labels, key):
        model, optimizer, average = nnx.merge(graphdef, state)
        model_def, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

        def microbatch(carry, batch):
            stats, loss, grads = carry
            (part, stats), found = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, model_def, *batch)
            return (stats, loss + part, jax.tree.map(jnp.add, grads, found)), None

        carry = stats, jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        if accum == 1:
            (stats, loss, grads), _ = microbatch(carry, (images, labels, key))
        else:  # every accum-th picture, so that devices keep their own: (accum, B / accum, ...)
            cut = lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1)
            parts = cut(images), cut(labels), jax.random.split(key, accum)
            (stats, loss, grads), _ = jax.lax.scan(microbatch, carry, parts)
        metrics = {"loss": loss, "lr": schedule(optimizer.step[...]), "grad_norm": optax.global_norm(grads)}
        nnx.update(model, stats)
        optimizer.update(model, grads)
        if cfg.ema:  # the first steps count less, or the init would stay in it for long
            decay = jnp.minimum(cfg.ema, optimizer.step[...] / (optimizer.step[...] + 10))
            move = lambda old, new: decay * old + (1 - decay) * new
            nnx.update(average, jax.tree.map(move, nnx.state(average), nnx.state(model)))
        return nnx.state((model, optimizer, average)), metrics

    return train_step


def exported(graphdef, state):
    """The model that is evaluated and exported: the running mean where there is one."""
    model, _, average = nnx.merge(graphdef, state)
    return average or model


def make_eval_step(graphdef, mesh):
    """jit: (state, images, labels (B,)) -> over the labels that are not -1 the sums of nats, top-1, top-5 and
    their number; and guesses (B,)."""

    def sums(state, images, labels):
        model, is_real = exported(graphdef, state), labels >= 0
        logits = model(model.view.normalise(images))
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]  # (B, 5)
        hits = best == labels[:, None]
        return [jnp.sum(x * is_real) for x in (nats, hits[:, 0], hits.any(axis=1), 1)], best[:, 0]

    return jax.jit(sums, out_shardings=NamedSharding(mesh, PartitionSpec()))


def evaluate(eval_step, state, rows, batch_size, mesh):
    """{val_loss, val_top1, val_top5} over all rows, and of some of them [(picture, label, guess)]."""
    results, shown, n = [], [], 0
    while batch := list(islice(rows, batch_size)):
        images, labels = (np.stack([row[name] for row in batch]) for name in ("image", "label"))
        short = batch_size - len(batch)  # blank pictures without a label fill the last batch up
        images = np.pad(images, [(0, short), *[(0, 0)] * 3])
        labels = np.pad(labels, (0, short), constant_values=-1)
        results.append(eval_step(state, *common.shard_batch(mesh, (images, labels), whole=True)))
        shown += [(n + i, row) for i, row in enumerate(batch[:8])]
        shown, n = shown[:: 2 if len(shown) > 256 else 1], n + batch_size
    sums, guesses = zip(*jax.device_get(results))
    (loss, top1, top5, n), guesses = np.sum(sums, axis=0, dtype=np.float64), np.concatenate(guesses)
    result = {"val_loss": float(loss / n), "val_top1": float(top1 / n), "val_top5": float(top5 / n)}
    some = shown[:: max(1, len(shown) // 32)][:32]
    return result, [(row["image"], row["label"], guesses[i]) for i, row in some]


# ---- use ----


def draw_predictions(path, shown, names):
    """A grid of pictures with the class that was guessed, in red with the true one where that is another."""
    from matplotlib.figure import Figure  # half a second to import

    figure = Figure(figsize=(12, 7), layout="constrained")
    for place, (image, label, guess) in enumerate(shown, 1):
        axes = figure.add_subplot(4, 8, place)
        axes.imshow(image)
        axes.axis("off")
        said, true = names[guess][:20], names[label][:20]
        title, color = (said, "black") if guess == label else (f"{said}\nnot {true}", "red")
        axes.set_title(title, size=8, color=color, parse_math=False)
    figure.savefig(path, dpi=100)


def use(cfg):
    """Print the likeliest classes of each picture of --predict."""
    model = build(cfg, None)
    names, classify = common.class_names(model.config), nnx.jit(lambda model, x: jax.nn.softmax(model(x)[0]))
    for name in cfg.predict:
        expect(Path(name).is_file(), f"--predict {name}: no such file")
        try:
            image = model.view.pixels(open_image(Path(name).read_bytes()))
        except ValueError as error:
            raise common.UsageError(f"--predict {name}: not a picture: {error}") from error
        shares = np.asarray(classify(model, model.view.normalise(image[None])))
        best = np.argsort(-shares, kind="stable")[:5]
        print(name, *(f"{shares[i]:8.2%}  {names[i]}" for i in best), sep="\n")
    return {}


# ---- the run ----


def check(cfg):
    """Raise UsageError for flags that cannot be meant."""
    common.check(cfg, "image_size", "shuffle_buffer", "width", "device_rows")
    expect(cfg.val_every > 1, f"--val-every {cfg.val_every}: must be at least 2, or all is held out")
    expect(min(cfg.crop_pad, cfg.mixup) >= 0, "--crop-pad and --mixup: must not be negative")
    expect(0 <= cfg.cooldown <= 1, f"--cooldown {cfg.cooldown}: must be in [0, 1]")
    expect(0 < cfg.crop_area <= 1, f"--crop-area {cfg.crop_area}: must be in (0, 1]")
    expect(0 < cfg.eval_crop <= 1, f"--eval-crop {cfg.eval_crop}: must be in (0, 1]")
    expect(0 <= cfg.ema < 1, f"--ema {cfg.ema}: must be in [0, 1)")
    expect(not cfg.predict or not cfg.steps, "--predict: needs --steps 0, and a model with --init-from")


def build(cfg, classes):
    """The model to start from: that of --init-from, whose sizes it has, or a new one, with these classes."""
    given = dict(dropout=cfg.dropout, dtype=cfg.dtype, remat=cfg.remat)
    if cfg.init_from:
        given["seed"] = cfg.seed
        default = Config(**PRESETS[cfg.preset]).image_size
        size = None if cfg.image_size == default else cfg.image_size
        model = from_pretrained(cfg.init_from, classes=classes, size=size, new_head=cfg.steps > 0, **given)
    else:
        config = resnet_config(cfg.depth, cfg.width, cfg.stem, classes)
        view = new_view(cfg.image_size, cfg.eval_crop)
        model = ResNet(config, view, **given, rngs=nnx.Rngs(cfg.seed))  # all in one jit compiles far longer
    stride = {"imagenet": 32, "cifar": 8}[model.stem]
    small = f"the {model.stem} stem and the stages divide it by {stride}"
    expect(model.view.size >= stride, f"--image-size {model.view.size}: too small, {small}")
    return model


def main(cfg):
    """Train as `cfg` says -> the last metrics; with steps 0 evaluate or predict. Raises UsageError."""
    check(cfg)
    key, mesh = jax.random.key(cfg.seed), common.make_mesh()
    if not cfg.steps and cfg.predict:
        return use(cfg)

    # data: pictures to train and to validate on, and a model for their classes
    train, val = open_sources(cfg)
    model, schedule = build(cfg, class_names(cfg, [*train, *(s for s, _ in val)])), make_schedule(cfg)
    view, names, S = model.view, common.class_names(model.config), model.view.size
    for source in (*train, *(source for source, _ in val)):
        source.classes = names  # where they are bare numbers, a larger one is a bad record
    asked = f"--val-data {' '.join(cfg.val_data)}" if cfg.val_data else f"--val-every {cfg.val_every}"
    expect(next(validation_rows(val, view, cfg.retries), None), f"{asked}: gives no picture to validate on")

    # model and optimizer, split once: their arrays are the state that the steps hand on
    optimizer = nnx.Optimizer(model, make_optimizer(cfg, schedule), wrt=nnx.Param)
    average = jax.tree.map(jnp.copy, model) if cfg.ema else None  # a running mean of the model
    graphdef, state = nnx.split((model, optimizer, average))
    state = common.shard_state(mesh, state, cfg.fsdp)
    train_step, eval_step = make_train_step(graphdef, state, cfg, schedule), make_eval_step(graphdef, mesh)
    accum = common.microbatches(cfg)

    def validate(state):
        rows = islice(validation_rows(val, view, cfg.retries), cfg.eval_batches * cfg.batch_size or None)
        return evaluate(eval_step, state, rows, cfg.batch_size // accum, mesh)

    data, val_name = " ".join((*cfg.data, *cfg.data_name)), " ".join(cfg.val_data or cfg.data)
    if not cfg.steps:
        result, _ = validate(state)
        print(*(f"{name} {value:.4f}" for name, value in result.items()), f"on {val_name}")
        return result

    # the run directory, its newest checkpoint, and the stream from where that was
    unchanged = common.unchanged(cfg, train) | {"classes": names}
    run = common.Run("resnet", cfg, unchanged, FREE.split(), lambda folder: None)
    state = run.restore(state)
    share = max(share for _, share in val)  # what is held out of one source is not trained on in another
    crop = partial(decode, partial(training_crop, cfg, S), share, False, cfg.retries)
    batches = common.open_batches(cfg, train, make_rows, run, crop)

    N, flops = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))), 0
    if jax.default_backend() != "cpu":  # forward by XLA's own count; backward is twice that
        forward = jax.jit(lambda state, images: exported(graphdef, state)(images))
        flops = 3 * forward.lower(state, jnp.zeros((1, S, S, 3))).cost_analysis()["flops"]
    print(f"model      ResNet, {N / 1e6:.1f} M parameters, {cfg.dtype}, on {run.info['devices']}")
    print(f"data       {data}, {len(names)} classes, validation on {val_name}")
    print(f"step       {cfg.batch_size} pictures of {S} x {S}, {accum} microbatches, SGD")
    print(f"run        {run.dir}, from step {run.step} to {cfg.steps}", flush=True)
    del model, optimizer, average  # with --fsdp, or the first device would keep it whole

    # a window of pictures comes in a burst: up to 2 GB of them wait for the device
    ahead = int(np.clip(2e9 / (cfg.batch_size * S * S * 3), 2, 128))
    with run.training(batches, ahead, "images", cfg.batch_size, flops):
        for step, batch in run.steps():
            images, labels = common.shard_batch(mesh, (batch["image"], batch["label"]))
            state, metrics = train_step(state, images, labels, jax.random.fold_in(key, step))
            run.log(state, metrics)
            if run.due(cfg.eval_every):
                with run.pause():
                    result, shown = validate(state)
                    if run.leads:
                        draw_predictions(run.dir / "predictions.png", shown, names)
                run.flush(result)
    save_pretrained(exported(graphdef, state), run.dir)
    print(f"a Hugging Face model folder is in {run.dir}")
    return run.last


if __name__ == "__main__":
    common.cli(Config, PRESETS, main, __doc__)
