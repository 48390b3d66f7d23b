"""ResNet (He et al. 2015) trained from a stream of pictures, in one file.

    python resnet_stream.py                     # offline: a small ResNet on scikit-learn's handwritten digits
    python resnet_stream.py --preset imagenet   # ResNet-50 on ImageNet, streamed from the Hugging Face hub
    python resnet_stream.py --steps 0 --init-from microsoft/resnet-50 --predict cat.jpg dog.jpg

Pictures are decoded and cropped in threads as they arrive. A run killed at any moment goes on with --resume,
bit for bit. When it ends, its directory is a Hugging Face model folder.

Measured on two CPU cores: the first command reaches 99.2 to 99.7 % of the 359 held-out digits. Not measured:
cifar10 is after kuangliu/pytorch-cifar, 200 epochs, and aims at 95 %; imagenet is after NVIDIA's
DeepLearningExamples, 90 epochs, and aims at their 77.1 % top-1.

Shapes: B batch, H height, W width, C channels, S side of the square that the model sees.
"""

import dataclasses
import math
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal

import common
from common import brief, expect

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image, ImageOps, PngImagePlugin
from transformers import AutoImageProcessor, BitImageProcessorPil, ConvNextImageProcessorPil, ResNetConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

DEPTHS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
BILINEAR = Image.Resampling.BILINEAR
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # long metadata make no picture worse


@dataclasses.dataclass
class Config(common.RunConfig):
    # a recipe: other defaults for the flags below
    preset: Literal["digits", "cifar10", "imagenet"] = "digits"
    # data
    data: tuple[str, ...] = ("digits",)  # digits (offline), synthetic, hub ids, files, URLs, folders
    data_name: tuple[str, ...] = ()  # configuration of each hub data set; - for none
    data_weights: tuple[float, ...] = ()  # share of each --data in the rows; equal without
    image_column: str | None = None  # column with the picture; found by its type
    label_column: str | None = None  # column with the class, an int; found by its type or name
    val_data: tuple[str, ...] = ()  # to validate on; else data's validation or test split, or see val_every
    val_every: int = 10  # where there is no such split: one picture in so many is held out, never trained on
    num_classes: int | None = None  # needed where labels are bare numbers; else found from their names
    image_size: int | None = None  # side of what the model sees, S; else that of init_from, or 16
    eval_crop: float = 1.0  # share of a picture's short side that evaluation sees; of init_from its own
    crop: Literal["pad", "resized"] = "pad"  # training sees shifted pictures, or random parts of them
    crop_pad: int = 2  # pad: shifted by at most so many pixels
    crop_area: float = 0.08  # resized: least share of the picture
    flip: bool = False  # training sees half of the pictures mirrored
    mixup: float = 0.2  # mixes pairs of pictures by Beta(mixup, mixup) (Zhang et al. 2017); 0 does not
    shuffle_buffer: int = 1_000  # pictures that are shuffled together, held as files
    # model
    depth: Literal[18, 34, 50, 101, 152] = 18  # layers; with init_from all sizes are its own
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
    min_lr: float = 0.0  # learning rate at the end
    cooldown: float = 0.0  # last share of the steps, in which a constant rate falls in a line; 0 is a cosine
    warmup_steps: int = 50  # steps in which the rate rises in a line to lr
    momentum: float = 0.9  # of SGD, Nesterov's
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


CIFAR = dict(data=("uoft-cs/cifar10",), image_size=32, crop_pad=4, flip=True, shuffle_buffer=10_000, width=64)
CIFAR |= dict(steps=78_200, batch_size=128, warmup_steps=391, label_smoothing=0.0, ema=0.0, mixup=0.0)
CIFAR |= dict(eval_every=391, ckpt_every=1_955)
IMAGENET = dict(data=("ILSVRC/imagenet-1k",), image_size=224, crop="resized", flip=True, eval_crop=0.875)
IMAGENET |= dict(shuffle_buffer=5_000, depth=50, width=64, stem="imagenet", ema=0.0, mixup=0.0)
# 1,281,167 pictures / 1,024 are 1,251 steps an epoch, of which 90, and 5 to warm up (Goyal et al. 2017)
IMAGENET |= dict(steps=112_590, batch_size=1_024, warmup_steps=6_255, eval_every=6_255, ckpt_every=1_251)
IMAGENET |= dict(lr=1.024, momentum=0.875, weight_decay=2**-15, dtype="bfloat16")
PRESETS = {"digits": {}, "cifar10": CIFAR, "imagenet": IMAGENET}

# these may change when a run goes on, beside those of RunConfig
FREE = "steps device_rows accum lr min_lr cooldown warmup_steps momentum weight_decay label_smoothing mixup"
FREE += " grad_clip dropout remat eval_batches"


# ---- data ----


def open_sources(cfg):
    """(sources to train on, [(source, one_in)] to validate on as in decode, names of the classes or [])."""
    roles, n = {"image": cfg.image_column, "label": cfg.label_column}, cfg.num_classes
    train = common.open_data(cfg, roles)
    held, names = common.open_data(cfg, roles, "val_data") or train, train[0].classes
    one_in = 1 if cfg.val_data else cfg.val_every
    for source in (*train, *held):
        same = source.classes == names
        expect(same, f"--data, --val-data: have other classes: {brief(names)}; {brief(source.classes)}")
    expect(names or n or cfg.init_from, f"--num-classes: needed, for {cfg.data[0]} does not name its classes")
    expect(not names or n in (None, len(names)), f"--num-classes {n}: {cfg.data[0]} has {brief(names)}")
    val = [(source, one_in if source.validation == "train" else 1) for source in held]
    return train, val, names or [str(i) for i in range(n or 0)]


def open_image(data, at_least=1 << 16):
    """The picture in a file's bytes, upright, in RGB, on white where it is transparent. Raises ValueError."""
    try:
        image = Image.open(BytesIO(data))
        image.draft(None, (at_least, at_least))  # a large jpeg may come at 1/2, 1/4 or 1/8 of its size
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16 bits and more, which convert() alone would clip
            white = 65535 if image.mode[0] == "I" else max(image.getextrema()[1], 1e-9)
            image = image.convert("F").point(lambda value: value * (255 / white)).convert("L")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
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
    side = min(width, height)  # of a long picture, the central square
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def training_crop(cfg, size, data, key):
    """A random crop (S, S, 3) uint8, of random area and shape or shifted; the same for the same `key`."""
    rng, image = np.random.default_rng(key), open_image(data, 4 * size)
    if cfg.crop == "resized":  # Szegedy et al. 2014
        box = random_box(*image.size, cfg.crop_area, rng)
        image = image.resize((size, size), BILINEAR, box, reducing_gap=2.0)
    else:  # the central square, black beyond its edge
        left, top = rng.integers(-cfg.crop_pad, cfg.crop_pad + 1, 2)
        image = ImageOps.fit(image, (size, size), BILINEAR).crop((left, top, left + size, top + size))
    return np.asarray(image)[:, :: -1 if cfg.flip and rng.random() < 0.5 else 1]


def make_rows(records, rng):
    """The records in another order, each with a key for its crop."""
    n = len(records["label"])
    keys, order = rng.integers(2**63, size=n), rng.permutation(n)
    return [{"image": records["image"][i], "label": records["label"][i], "key": keys[i]} for i in order]


def decode(crop, one_in, held_out, retries, row):
    """{"image": crop(bytes, key) (S, S, 3) uint8, "label": int32} of a row of make_rows; or the ValueError.

    A checksum of its bytes says whether a picture is held out, one in `one_in`; the other kind gives None.
    """
    try:
        data = common.read_file(row["image"], retries)
        if one_in == 1 or (zlib.crc32(data) % one_in == 0) == held_out:
            return {"image": crop(data, row["key"]), "label": np.int32(row["label"])}
    except ValueError as error:
        path = row["image"].get("path") if isinstance(row["image"], dict) else None
        return ValueError(f"{path}: {error}") if path else error


def validation_rows(sources, view, retries):
    """Each picture of [(source, one_in), ...] that is held out, once, as `decode` gives it."""
    pool, seen, bad = ThreadPoolExecutor(os.cpu_count()), 0, 0
    crop = lambda data, _: view.pixels(open_image(data))
    for source, one_in in sources:
        rows = iter(common.Stream(source, make_rows, 64, None, source.validation))
        while chunk := list(islice(rows, 64)):
            seen += len(chunk)
            for row in pool.map(partial(decode, crop, one_in, True, retries), chunk):
                if isinstance(row, ValueError):
                    bad += 1
                    common.report_bad(f"a picture to validate on: {row}", bad, seen)
                elif row is not None:
                    yield row


class View:
    """How a model sees pictures: as its image processor, one of transformers', makes them."""

    def __init__(self, processor):
        look = lambda picture: processor(picture, return_tensors="np")["pixel_values"][0]
        black, white = look(Image.new("RGB", (48, 32), "black")), look(Image.new("RGB", (32, 48), "white"))
        S, shapes = black.shape[-1], {black.shape, white.shape}
        expect(shapes == {(3, S, S)}, f"pictures come out as {shapes}, not as squares of one size")
        expect(not getattr(processor, "do_flip_channel_order", False), "do_flip_channel_order: not supported")
        self.processor, self.size = processor, S
        # rescales and normalises, as far as the processor does; a large crop has a black margin
        self.offset, self.slope = black[:, S // 2, S // 2], (white - black)[:, S // 2, S // 2] / 255
        ramp = Image.linear_gradient("L").convert("RGB")
        same = np.allclose(self.normalise(self.pixels(ramp)), look(ramp).transpose(1, 2, 0), atol=1e-4)
        expect(same, f"{type(processor).__name__} does more than resize, crop, rescale and normalise")

    def pixels(self, image):
        """The picture as the model is to see it, (S, S, 3) uint8."""
        raw = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
        return raw["pixel_values"][0].transpose(1, 2, 0)

    def normalise(self, images):
        """Pixels (..., 3) uint8 -> what the model reads, float32."""
        return images.astype(jnp.float32) * self.slope + self.offset


def read_view(folder, size):
    """The view in a model's folder, or transformers' default for a ResNet; with `size` for pictures of it."""
    with common.blame("preprocessor_config.json"):
        processor = ConvNextImageProcessorPil()
        if any((folder / f"{name}_config.json").exists() for name in ("preprocessor", "processor")):
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        view, settings = View(processor), processor.to_dict()
        if size is not None:
            for name in {"size", "crop_size"} & {name for name in settings if settings[name]}:
                settings[name] = {side: round(n * size / view.size) for side, n in settings[name].items()}
            view = View(type(processor)(**settings))
        return view


# ---- model ----


def total(x):
    """Sum over all axes of x but the last, in float32."""
    if jax.default_backend() != "cpu":
        return jnp.sum(x, (0, 1, 2), jnp.float32)
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return jnp.ones(len(x)) @ x  # ten times faster than XLA's own sum over the leading axes


@jax.custom_gradient
def standardise(x, scale, bias):
    """(y (B, H, W, C), mean (C,), variance (C,)) in float32: y is (x - mean) / deviation * scale + bias.

    Only y has a gradient: written out, it takes half of autodiff's passes over x.
    """
    n = x.size // x.shape[-1]
    mean = total(x) / n
    var = total(jnp.square(x - mean)) / n  # E[x^2] - E[x]^2 would put a loss off by 1e-3 within three steps
    inv = jax.lax.rsqrt(var + 1e-5)

    def gradient(grads):
        dy, x_hat = grads[0], (x - mean) * inv
        dscale, dbias = total(dy * x_hat), total(dy)
        # y does not change when all of x moves or stretches: take the parts of dy along 1 and x_hat out
        dx = scale * inv * (dy - dbias / n - x_hat * dscale / n)
        return dx.astype(x.dtype), dscale, dbias

    return ((x - mean) * (inv * scale) + bias, mean, var), gradient


class ConvNorm(nnx.Module):
    """A convolution, padded as by PyTorch (SAME is another thing at stride 2), and batch norm in float32."""

    def __init__(self, fan_in, fan_out, size, stride, dtype, rngs, scale=1.0):
        he = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        options = dict(strides=stride, padding=size // 2, use_bias=False, kernel_init=he, dtype=dtype)
        self.convolution, self.dtype = nnx.Conv(fan_in, fan_out, (size, size), **options, rngs=rngs), dtype
        constant = nnx.initializers.constant(scale)
        self.normalization = nnx.BatchNorm(fan_out, scale_init=constant, rngs=nnx.Rngs(0))  # draws nothing

    def __call__(self, x, train):
        x, norm = self.convolution(x), self.normalization
        if not train:
            return norm(x, use_running_average=True).astype(self.dtype)
        y, mean, var = standardise(x, norm.scale[...], norm.bias[...])
        n = x.size / x.shape[-1]
        # nnx's own keeps the biased variance; PyTorch, and so the published weights, the unbiased one
        norm.mean[...] = 0.9 * norm.mean[...] + 0.1 * mean
        norm.var[...] = 0.9 * norm.var[...] + 0.1 * n / max(n - 1, 1) * var
        return y.astype(self.dtype)


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
    `train` takes batch norm's statistics from the batch and keeps them. Dropout only where a key is given.
    """

    def __init__(self, config, view, *, dropout=0.0, dtype="float32", remat=False, rngs):
        self.config, self.view, self.dropout = nnx.static(config), nnx.static(view), dropout
        self.dtype, self.remat, self.stem = dtype, remat, getattr(config, "stem", "imagenet")
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        block = partial(Block, config.layer_type, dtype=dtype, rngs=rngs)
        C, self.stages = config.embedding_size, nnx.List()
        self.embedder = ConvNorm(3, C, size, stride, dtype, rngs)
        for i, (depth, width) in enumerate(zip(config.depths, config.hidden_sizes)):
            first = block(C, width, stride=2 if i else 1)
            self.stages.append(nnx.List([first, *(block(width, width, stride=1) for _ in range(depth - 1))]))
            C = width
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's; float32 in any case
        self.classifier = nnx.Linear(C, config.num_labels, kernel_init=init, rngs=rngs)

    def __call__(self, images, train=False, key=None):
        x = nnx.relu(self.embedder(images.astype(self.dtype), train))
        if self.stem == "imagenet":
            # windows overlap, so that its gradient is a sum: in float32
            x = nnx.max_pool(x.astype(jnp.float32), (3, 3), (2, 2), [(1, 1), (1, 1)]).astype(self.dtype)
        call = nnx.remat(Block.__call__, static_argnums=2) if self.remat else Block.__call__
        for block in chain(*self.stages):  # (B, H, W, C), in each stage half of H and W, twice the C
            x = call(block, x, train)
        x = jax.lax.optimization_barrier(x)  # else jax 0.12's CPU compiler makes NaN of bfloat16 here
        x = jnp.mean(x.astype(jnp.float32), (1, 2))  # (B, C)
        x = nnx.Dropout(self.dropout)(x, deterministic=key is None, rngs=key)  # none without key
        return self.classifier(x)


# ---- pretrained weights in and out ----


def checkpoint_names(model):
    """{transformers' name: parameter or statistic}."""
    leaves, names = dict(kernel="weight", scale="weight", mean="running_mean", var="running_var"), {}
    for path, param in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        name = ".".join(leaves.get(part, str(part)) for part in path)
        name = re.sub(r"^stages\.(\d)", r"resnet.encoder.stages.\1.layers", name)
        name = re.sub("^embedder", "resnet.embedder.embedder", name)
        names[name.replace("classifier", "classifier.1")] = param
    return names


def from_pretrained(path, *, classes=None, new_head=False, size=None, seed=0, **options):
    """The ResNet of a hub id, a folder or a run directory.

    Its outputs are put in the order of the names `classes`, or with `new_head` begin anew where these are
    others. `size` is another side for pictures; `options` are ResNet's. Raises UsageError.
    """
    followed = "depths hidden_sizes embedding_size layer_type out_features out_indices stage_names"
    config, weights, folder = common.read_pretrained((ResNetConfig,), path, followed)
    theirs = common.class_names(config) if "classifier.1.weight" in weights else []
    order, names, why = common.match_classes(theirs, classes or theirs)
    expect(order or (classes and new_head), why or "has no classes")
    if not order:
        print(f"head       new: {why}")
    config.update(common.label_names(names))
    view = read_view(folder, size)
    create = lambda: ResNet(config, view, **options, rngs=nnx.Rngs(seed))
    model = nnx.eval_shape(create) if order else create()
    expect(model.stem in ("imagenet", "cifar"), f"stem is {model.stem}, only imagenet and cifar are known")

    names, loaded = checkpoint_names(model), {}
    for name, w in weights.items():
        name = name if name.startswith(("resnet.", "classifier.")) else f"resnet.{name}"  # of a bare encoder
        if "num_batches_tracked" not in name and (order or not name.startswith("classifier.")):
            loaded[name] = w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T  # from (out, in, H, W), (out, in)
    common.load_weights(names, loaded, may_lack=() if order else ("classifier.",))
    if order:
        for param in (model.classifier.kernel, model.classifier.bias):
            param.set_value(param[..., np.array(order)])
    return model


# transformers has no ResNet with the small stem: these lines, in the exported folder, make one of its own
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
    """Write config.json, model.safetensors and preprocessor_config.json: what transformers loads."""
    weights, kind = {}, "ResNetForImageClassification"
    config = ResNetConfig.from_dict(model.config.to_dict())
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


def make_schedule(cfg):
    """Linear warm-up, then a cosine to min_lr; with `cooldown` a plateau and a line (arXiv 2405.18392)."""
    steps = max(cfg.steps, 1)
    warm = min(cfg.warmup_steps, steps - 1)
    if cfg.cooldown == 0:
        return optax.warmup_cosine_decay_schedule(cfg.lr / (warm + 1), cfg.lr, warm, steps, cfg.min_lr)
    fall = min(max(1, round(cfg.cooldown * steps)), steps - warm)
    up, down = (cfg.lr / (warm + 1), cfg.lr, warm), (cfg.lr, cfg.min_lr, fall)
    parts = optax.linear_schedule(*up), optax.constant_schedule(cfg.lr), optax.linear_schedule(*down)
    return optax.join_schedules(parts, [warm, steps - fall])


def make_optimizer(cfg, schedule):
    """SGD with Nesterov momentum; weight decay is part of the gradient, as in PyTorch."""
    decayed = partial(jax.tree.map, lambda p: p.ndim >= 2)  # convolutions and the head, not biases and norms
    # of the same form without, so that a run can go on with another --grad-clip
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    sgd = optax.sgd(schedule, momentum=cfg.momentum, nesterov=True)
    return optax.chain(clip, optax.add_decayed_weights(cfg.weight_decay, decayed), sgd)


def make_train_step(graphdef, state, cfg, schedule):
    """jit: (state, images (B, S, S, 3) uint8, labels (B,), key) -> (state, metrics). The state is donated."""
    shardings, accum = jax.tree.map(lambda x: x.sharding, state), common.microbatches(cfg)
    options = {}
    if jax.default_backend() == "cpu" and jax.__version_info__[:2] == (0, 10):
        # all but convolutions, of which XLA's own gradients are faster than YNNPACK's (ResNet-18: 1.7 times)
        kinds = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_ELTWISE"
        options = {"xla_cpu_experimental_ynn_fusion_type": kinds}

    def loss_fn(params, stats, model_def, images, labels, key):
        model, (mix_key, drop_key) = nnx.merge(model_def, params, stats, copy=True), jax.random.split(key)
        x, targets = model.view.normalise(images), jax.nn.one_hot(labels, model.config.num_labels)
        targets = optax.smooth_labels(targets, cfg.label_smoothing)  # Szegedy et al. 2015
        if cfg.mixup:  # the first picture with the last, and so on
            ratio = jax.random.beta(mix_key, cfg.mixup, cfg.mixup)
            x, targets = (ratio * a + (1 - ratio) * a[::-1] for a in (x, targets))
        nats = optax.softmax_cross_entropy(model(x, train=True, key=drop_key), targets)
        return jnp.mean(nats) / accum, nnx.state(model, nnx.BatchStat)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
    def train_step(state, images, labels, key):
        model, optimizer, average = nnx.merge(graphdef, state)
        model_def, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

        def microbatch(carry, batch):
            stats, sums = carry
            (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, model_def, *batch)
            return (stats, jax.tree.map(jnp.add, sums, (loss, grads))), None

        carry = stats, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        if accum == 1:  # three times as fast on a CPU as a scan of one
            (stats, (loss, grads)), _ = microbatch(carry, (images, labels, key))
        else:  # every accum-th picture, so that devices keep their own: (accum, B / accum, ...)
            cut = lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1)
            batches = cut(images), cut(labels), jax.random.split(key, accum)
            (stats, (loss, grads)), _ = jax.lax.scan(microbatch, carry, batches)
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


def make_evaluate(graphdef, open_rows, batch_size, mesh):
    """state -> {val_loss, val_top1, val_top5} over all rows, and [(picture, label, guess)] of 32 of them."""

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def eval_step(state, images, labels):
        model, is_real = exported(graphdef, state), labels >= 0
        logits = model(model.view.normalise(images))
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]  # (B, 5)
        hits = best == labels[:, None]
        return [jnp.sum(x * is_real) for x in (nats, hits[:, 0], hits.any(axis=1), 1)], best[:, 0]

    def evaluate(state):
        rows, rng, results, shown = open_rows(), np.random.default_rng(0), [], []
        while batch := list(islice(rows, batch_size)):
            shown += zip(rng.random(len(batch)), count(batch_size * len(results)), batch)
            shown = sorted(shown)[:32]  # an even draw from all rows, the same each time
            # blank pictures with a label that does not count fill the last batch up
            blank = {"image": np.zeros_like(batch[0]["image"]), "label": np.int32(-1)}
            batch += [blank] * (batch_size - len(batch))
            arrays = [np.stack([row[name] for row in batch]) for name in ("image", "label")]
            results.append(eval_step(state, *common.shard_batch(mesh, arrays, whole=True)))
        sums, guesses = zip(*jax.device_get(results))
        loss, top1, top5, n = np.sum(sums, axis=0, dtype=np.float64).tolist()
        guesses = np.concatenate(guesses)
        examples = [(row["image"], row["label"], guesses[i]) for _, i, row in shown]
        return {"val_loss": loss / n, "val_top1": top1 / n, "val_top5": top5 / n}, examples

    return evaluate


# ---- use ----


def draw_predictions(path, shown, names):
    """A grid of pictures with the class that was guessed, in red with the true one where that is another."""
    from matplotlib.figure import Figure  # half a second to import

    figure = Figure(figsize=(12, 7), layout="constrained")
    for place, (image, label, guess) in enumerate(shown, 1):
        axes = figure.add_subplot(4, 8, place)
        axes.imshow(image)
        axes.axis("off")
        text = names[guess][:20] + (f"\nnot {names[label][:20]}" if guess != label else "")
        axes.set_title(text, size=8, color="black" if guess == label else "red", parse_math=False)
    figure.savefig(path, dpi=100)


def use(cfg):
    """Print the likeliest classes of each picture of --predict."""
    model = build(cfg, None)
    names, classify = common.class_names(model.config), nnx.jit(lambda model, x: jax.nn.softmax(model(x)[0]))
    for name in cfg.predict:
        with common.blame(f"--predict {name}: not a picture"):
            image = model.view.pixels(open_image(Path(name).read_bytes()))
        p = np.asarray(classify(model, model.view.normalise(image[None])))
        best = np.argsort(-p, kind="stable")[:5]
        print(name, *(f"{p[i]:8.2%}  {names[i]}" for i in best), sep="\n")
    return {}


# ---- the run ----


def check(cfg):
    """Raise UsageError for flags that cannot be meant."""
    sizes = ["shuffle_buffer", "width", "image_size", "num_classes"]
    common.check(cfg, sizes, ["crop_pad", "mixup", "eval_batches"], ["ema", "momentum", "label_smoothing"])
    expect(cfg.val_every > 1, f"--val-every {cfg.val_every}: must be at least 2, or all is held out")
    expect(0 < cfg.crop_area <= 1, f"--crop-area {cfg.crop_area}: must be in (0, 1]")
    expect(0.1 <= cfg.eval_crop <= 1, f"--eval-crop {cfg.eval_crop}: must be in [0.1, 1]")
    expect(not cfg.predict or not cfg.steps, "--predict: needs --steps 0, and a model with --init-from")


def build(cfg, classes):
    """The model to start from: that of --init-from, whose sizes it has, or a new one, with these classes."""
    options = dict(dropout=cfg.dropout, dtype=cfg.dtype, remat=cfg.remat)
    if cfg.init_from:
        options |= dict(classes=classes, new_head=cfg.steps > 0, size=cfg.image_size, seed=cfg.seed)
        with common.blame(f"--init-from {cfg.init_from}"):
            model = from_pretrained(cfg.init_from, **options)
    else:
        kind, widening = ("basic", 1) if cfg.depth < 50 else ("bottleneck", 4)
        sizes = dict(layer_type=kind, depths=DEPTHS[cfg.depth], embedding_size=cfg.width)
        sizes["hidden_sizes"] = [cfg.width * widening * 2**i for i in range(4)]
        # transformers knows no stem but ImageNet's; ours is a further field
        config = ResNetConfig(**sizes, **common.label_names(classes), stem=cfg.stem)
        S = cfg.image_size or 16
        crop = dict(size={"shortest_edge": round(S / cfg.eval_crop)}, crop_size={"height": S, "width": S})
        colors = dict(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
        view = View(BitImageProcessorPil(**crop, **colors, resample=BILINEAR))
        model = ResNet(config, view, **options, rngs=nnx.Rngs(cfg.seed))  # all in one jit compiles far longer
    least = {"imagenet": 32, "cifar": 8}[model.stem]  # the stem and the stages divide it by so much
    expect(model.view.size >= least, f"--image-size {model.view.size}: too small, at least {least}")
    return model


def main(cfg):
    """Train as `cfg` says -> the last metrics; with steps 0 evaluate or predict. Raises UsageError."""
    check(cfg)
    key, mesh = jax.random.key(cfg.seed), common.make_mesh()
    if cfg.predict:
        return use(cfg)

    # data: pictures to train and to validate on, and a model for their classes
    train, val, classes = open_sources(cfg)
    model, schedule = build(cfg, classes), make_schedule(cfg)
    view, names, S = model.view, common.class_names(model.config), model.view.size
    for source in (*train, *(source for source, _ in val)):
        source.classes = names  # where they are bare numbers, a larger one is a bad record
    most = cfg.eval_batches * cfg.batch_size or None
    val_rows = lambda: islice(validation_rows(val, view, cfg.retries), most)
    expect(next(val_rows(), None), f"--val-every {cfg.val_every}: no picture to validate on")

    # model and optimizer, split once: their arrays are the state that the steps hand on
    optimizer = nnx.Optimizer(model, make_optimizer(cfg, schedule), wrt=nnx.Param)
    average = jax.tree.map(jnp.copy, model) if cfg.ema else None  # a running mean of the model
    graphdef, state = nnx.split((model, optimizer, average))
    state = common.shard_state(mesh, state, cfg.fsdp)
    train_step, accum = make_train_step(graphdef, state, cfg, schedule), common.microbatches(cfg)
    evaluate = make_evaluate(graphdef, val_rows, cfg.batch_size // accum, mesh)
    data, val_name = " ".join((*cfg.data, *cfg.data_name)), " ".join(cfg.val_data or cfg.data)
    if not cfg.steps:
        result, _ = evaluate(state)
        print(*(f"{name} {value:.4f}" for name, value in result.items()), f"on {val_name}")
        return result

    # the run directory, its newest checkpoint, and the stream from where that was
    run = common.Run("resnet", cfg, train, {"classes": names}, FREE)
    state = run.restore(state)
    one_in = max(one_in for _, one_in in val)  # what is held out of one source is not trained on in another
    crop = partial(decode, partial(training_crop, cfg, S), one_in, False, cfg.retries)
    batches = run.open_batches(train, make_rows, crop)

    N, flops = sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))), 0
    if jax.default_backend() != "cpu":  # forward by XLA's own count; backward is twice that
        forward = jax.jit(lambda state, images: exported(graphdef, state)(images))
        flops = 3 * forward.lower(state, jnp.zeros((1, S, S, 3))).cost_analysis()["flops"]
    print(f"model      ResNet, {N / 1e6:.1f} M parameters, {cfg.dtype}, on {run.info['devices']}")
    print(f"data       {data}, {len(names)} classes, validation on {val_name}")
    print(f"step       {cfg.batch_size} pictures of {S} x {S}, {accum} microbatches, SGD")
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
                    result, shown = evaluate(state)
                    if run.leads:
                        draw_predictions(run.dir / "predictions.png", shown, names)
                    run.flush(result)
    save_pretrained(exported(graphdef, state), run.dir)
    return run.end()


if __name__ == "__main__":
    common.cli(Config, PRESETS, main, __doc__)
