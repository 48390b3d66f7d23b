"""What nanoflax promises, a test for each.

They need no network. Those that compare with PyTorch skip where it is not installed.
"""

import gzip
import http.server
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from functools import cache, partial
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import bert_mlm
import common
import gpt_train
import resnet_stream

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import transformers
import zstandard
from flax import nnx
from PIL import Image, PngImagePlugin
from safetensors.numpy import load_file, save_file

try:
    import torch
except ImportError:
    torch = None
against_torch = pytest.mark.skipif(torch is None, reason="compares with PyTorch")

HERE = Path(__file__).parent
JSON = f"{Path(json.__file__).parent}/*.py"  # five real documents, 48 kB

# small runs: an epoch of these texts has eight steps
TEXTS = dict(
    data=JSON, val_docs=1, seq_len=32, n_layer=1, n_head=2, n_embd=32, dropout=0.1,
    optimizer="adamw", warmup_steps=2, steps=12, batch_size=128, device_rows=64,
    eval_every=6, ckpt_every=3, log_every=1,
)  # fmt: skip
GPT = TEXTS | dict(tokenizer="byte", sample_every=0)
BERT = TEXTS | dict(tokenizer="bpe:300", pre_norm=False)
RESNET = dict(
    width=8, image_size=8, crop_pad=1, shuffle_buffer=50, label_smoothing=0.0, mixup=0.0, ema=0.0,
    lr=0.02, warmup_steps=2, steps=6, batch_size=32, eval_every=3, ckpt_every=2, log_every=1,
)  # fmt: skip
SMALL = {gpt_train: GPT, bert_mlm: BERT, resnet_stream: RESNET}
KIND = {gpt_train: "gpt", bert_mlm: "bert", resnet_stream: "resnet"}  # their runs: out/KIND-001
scripts = pytest.mark.parametrize("script", SMALL, ids=lambda script: script.__name__)


# ---- what the tests use: runs, command lines, processes ----


@pytest.fixture(scope="session", autouse=True)
def one_compilation_cache(tmp_path_factory):
    """Every process of the tests shares it, and none touches the user's."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.getbasetemp() / "modules")
    jax.config.update("jax_compilation_cache_dir", os.environ["XDG_CACHE_HOME"] + "/nanoflax")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles faster
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if torch:
        torch.set_num_threads(1)  # more of them stand in each other's way where a core is busy


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(script=gpt_train, **changes):
    return script.main(script.Config(**SMALL[script] | changes))


def flags(**changes):
    """A Config's fields as they are typed on the command line."""
    typed = []
    for name, value in changes.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            typed.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            typed += [f"--{flag}", *value]
        else:
            typed += [f"--{flag}", str(value)]
    return typed


@pytest.fixture
def typed(monkeypatch, capsys):
    """(stdout, stderr) of a script's command line, in this process, which ends with code `code`."""

    def run(script, *args, code=0, **changes):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", [f"{script.__name__}.py", *args, *flags(**changes)])
            patch.setattr(sys, "stdout", sys.stdout)  # `cli` puts others in their place
            patch.setattr(sys, "stderr", sys.stderr)
            patch.setattr(os, "_exit", sys.exit)  # for the sake of a thread that still reads
            common.cli(
                KIND[script],
                script.Config,
                script.PRESETS,
                script.main,
                script.__doc__,
                script.FORGET,
            )
        out, err = capsys.readouterr()
        assert stop.value.code == code, err
        return out, err

    return run


def launch(program, *args, **env):
    """A script as its user starts it, or the text of a program, in a process of its own."""
    if isinstance(program, str):
        command = [sys.executable, "-c", program]
    else:
        command = [sys.executable, str(HERE / f"{program.__name__}.py")]
    return subprocess.Popen(
        [*command, *args],
        env=os.environ | {"PYTHONPATH": str(HERE)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes, code=0, timeout=300):
    """[(stdout, stderr)] of processes that run side by side and end with the exit code `code`."""
    ends = [process.communicate(timeout=timeout) for process in processes]
    assert {process.returncode for process in processes} == {code}, ends
    return ends


def lines(out_dir):
    """The lines of metrics.jsonl without what a clock tells: equal, bit for bit, in equal runs."""
    path = Path(out_dir) / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if line.endswith("\n"):
            values = json.loads(line)
            for clock in ("tokens_per_s", "images_per_s", "data_wait", "mfu"):
                values.pop(clock, None)
            found.append(values)
    return found


def saved_steps(out_dir):
    """The steps of its checkpoints."""
    return sorted(map(int, os.listdir(f"{out_dir}/ckpt")))


def wait_for_step(process, out_dir, step):
    """Return as soon as the run has logged that step, or ended."""
    while process.poll() is None and not any(line["step"] >= step for line in lines(out_dir)):
        time.sleep(0.01)


def kill_after(step, script, out_dir, *args, **env):
    """Start a run, and kill it shortly after it has logged that step."""
    process = launch(script, *args, "--out-dir", out_dir, **env)
    wait_for_step(process, out_dir, step)
    time.sleep(random.Random(step).random() * 0.1)
    process.kill()
    process.wait()


def as_process(monkeypatch, rank, world):
    monkeypatch.setattr(jax, "process_index", lambda: rank)
    monkeypatch.setattr(jax, "process_count", lambda: world)


# ---- what the tests use: files, and a hub ----


def write(files):
    """Write {name: bytes or str}."""
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def jsonl(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def parquet_of(*groups, **options):
    """A parquet file with a row group of each list of texts."""
    schema = pa.schema({"id": pa.int64(), "text": pa.string()})
    file = io.BytesIO()
    with pq.ParquetWriter(file, schema, compression="none") as writer:
        for texts in groups:
            table = pa.table({"id": range(len(texts)), "text": texts}, schema=schema)
            writer.write_table(table, **options)
    return file.getvalue()


def tar_of(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def card_of(configurations):
    """A data set's README.md with {configuration: its files}."""
    text = "---\nconfigs:\n"
    for name, files in configurations.items():
        text += f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {files}\n"
    return text + "---\n"


def png(pixels, kind="png", **options):
    """The bytes of a picture file; `pixels` is an array or an image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photograph(width=120, height=90):
    """A smooth picture in which left is red, right is green and the bottom is blue."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([255 - x, x, y], axis=-1).astype(np.uint8)


def write_classes(root, n=12, classes=("dark", "light")):
    """Class folders with `n` pictures each, the first class the darkest."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        for j in range(n):
            pixels = rng.integers(0, 90, (40, 48, 3)) + 150 * i
            write({f"{root}/{name}/{j}.png": png(np.uint8(pixels))})


def write_reviews(names):
    """reviews.parquet: the class of a text is its first word; labels stand as in `names`."""
    order = [name.removeprefix("very ") for name in names or ["bad", "fine", "good"]]
    draw = random.Random(0)
    texts = []
    labels = []
    for i in range(400):
        word = draw.choice(["bad", "fine", "good"])
        rest = draw.choices(["so", "it", "was"], k=draw.randrange(1, 9))
        texts.append(f"{word} {' '.join(rest)} {i}")
        labels.append(order.index(word))
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features(text=datasets.Value("string"), label=label)
    rows = datasets.Dataset.from_dict(dict(text=texts, label=labels), features=features)
    rows.to_parquet("reviews.parquet")


def open_one(name, configuration=None):
    """(common.Data, what takes the text out of a record)."""
    return gpt_train.open_one("--data", str(name), configuration, None, gpt_train.Config())


def documents(name, split="train", configuration=None):
    """(texts in the order of the files, number of bad records) of the data."""
    data, parse = open_one(name, configuration)
    texts = []
    bad = 0
    for records, _, window in common.windows(data.splits[split], 16, seed=None, **data.faults):
        good, bad = gpt_train.good_records(records, parse, window, bad)
        texts += [text for text in good if text]
    return texts, bad


class Hub(http.server.ThreadingHTTPServer):
    """Serves root/REPOSITORY/FILE by the hub's routes, and root/files/FILE as a web server."""

    daemon_threads = True
    sha = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.root = root
        self.faults = 0
        self.fault = lambda path: None  # may name what goes wrong with a request for a file
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.env = dict(
            HF_HOME=str(root / "home"), HF_ENDPOINT=self.url, HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DOWNLOAD_TIMEOUT="2",
        )  # fmt: skip

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the game."""

    def break_requests(self, after, kind_of):
        """Let `kind_of(n)` name what goes wrong with the n-th request for data after the first."""
        requests = count(-after)

        def fault(path):
            n = next(requests) if ".parquet" in path else -1
            return kind_of(n) if n >= 0 else None

        self.fault = fault


class HubRequest(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # the repository, the route with its revision, the file
    repositories = "files|HuggingFaceFW/fineweb-edu|gpt2"
    route = rf"(?:/api)?(?:/datasets|/models)?/({repositories})(?:/(\w+)/\w+)?/?(.*)"

    def log_message(self, *_):
        """Nothing."""

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        headers = dict(Content_Length=len(body), X_Repo_Commit=Hub.sha) | headers
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def go_wrong(self, kind, body):
        self.server.faults += 1
        self.close_connection = True
        if kind == "truncated":
            self.answer(206, body[: len(body) // 2], Content_Length=len(body))
        elif kind == "stall":
            time.sleep(4)
        elif kind == 429:
            self.answer(429, **{"Retry-After": 0})
        elif kind != "reset":
            self.answer(kind)
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        found = re.fullmatch(self.route, path)
        if not found:
            return self.answer(404, X_Error_Code="RepoNotFound")
        repository, route, name = found.groups()
        folder = self.server.root / repository
        if route != "tree" and name:
            return self.send_file(folder / name, path)
        is_flat = route == "tree" and "recursive=true" not in self.path.lower()
        listed = []
        for file in sorted((folder / name).glob("*" if is_flat else "**/*")):
            where = str(file.relative_to(folder))
            kind = "file" if file.is_file() else "directory"
            size = file.stat().st_size
            listed.append(dict(path=where, rfilename=where, oid=where, size=size, type=kind))
        if route == "tree":
            return self.answer(200, json.dumps(listed).encode())
        files = [entry for entry in listed if entry["type"] == "file"]
        about = dict(id=repository, sha=Hub.sha, siblings=files, tags=[], private=False)
        self.answer(200, json.dumps(about).encode())

    do_HEAD = do_GET

    def send_file(self, file, path):
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        body = file.read_bytes()
        code = 200
        headers = dict(ETag=f'"{zlib.crc32(body)}"', Accept_Ranges="bytes")
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part:
            first = int(part[1])
            last = min(int(part[2] or len(body)), len(body) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
            code = 206
            body = body[first : last + 1]
        fault = self.server.fault(path) if self.command == "GET" else None
        if fault:
            return self.go_wrong(fault, body)
        self.answer(code, body, **headers)


@pytest.fixture
def hub(tmp_path):
    """A hub with fineweb-edu (Python's library, in row groups of 4) and a small gpt2."""
    root = tmp_path / "hub"
    folder = root / "HuggingFaceFW/fineweb-edu"
    texts = [text for text in documents("stdlib")[0] if len(text) < 6000]
    for i, name in enumerate(["sample/10BT/000", "sample/10BT/001", "data/CC-MAIN-2013-20/train"]):
        write({folder / f"{name}.parquet": parquet_of(texts[i::3], row_group_size=4)})
    write({folder / "README.md": card_of({"default": "data/*/*", "sample-10BT": "sample/10BT/*"})})
    tokenizer = gpt_train.load_tokenizer("bpe:300", texts)
    gpt_train.save_pretrained(gpt.model(vocab_size=len(tokenizer)), root / "gpt2", tokenizer)
    return Hub(root)


# ---- models: small ones with every weight random, and what PyTorch makes of them ----


def as_torch(array):
    return torch.tensor(np.asarray(array)).long()


class Gpt:
    """What the tests ask of a kind of model."""

    def __init__(self):
        self.script = gpt_train
        self.auto = "AutoModelForCausalLM"
        self.optimizer = dict(betas=(0.9, 0.95))
        self.training = dict(
            optimizer="adamw", lr=1e-2, warmup_steps=3, steps=10, grad_clip=0.5, batch_size=4,
            device_rows=2,
        )  # fmt: skip
        self.twins = {"lm_head.weight": "transformer.wte.weight"}
        # what stands in weights' names, and in those of older files
        self.older = {"transformer.": ""}
        self.ignored = {"h.0.attn.bias": np.ones((1, 1, 48, 48), np.float32)}  # the causal mask
        self.refused = dict(
            scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, n_inner=96,
            activation_function="relu", add_cross_attention=True, tie_word_embeddings=False,
        )  # fmt: skip

    def new(self, rate=0.0, dtype="float32", remat=False, **changes):
        sizes = dict(vocab_size=199, n_positions=48, n_embd=48, n_layer=2, n_head=4)
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), rate)
        config = transformers.GPT2Config(**sizes | rates | changes)
        return gpt_train.GPT(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))

    def model(self, **changes):
        model = self.new(**changes)
        rng = np.random.default_rng(0)
        params = jax.tree.leaves(nnx.state(model), is_leaf=lambda x: isinstance(x, nnx.Variable))
        for param in params:
            noise = rng.normal(size=param.shape).astype(np.float32)
            param.set_value(param[...] + 0.1 * noise)
        return model

    def batch(self, seed=0):
        """What the train step is given. Microbatches hold unequal numbers of targets."""
        tokens = np.random.default_rng(seed).integers(0, 199, (4, 33)).astype(np.int32)
        tokens[1::2, 9:] = -1
        return (tokens,)

    def logits(self, model, tokens, key=None):
        return model(jnp.maximum(tokens, 0), key)

    def loss(self, model, tokens, key=None):
        nats, n = gpt_train.loss_sum(model, tokens[:, :-1], tokens[:, 1:], key)
        return nats / n

    def torch_logits(self, theirs, tokens):
        return theirs(as_torch(np.maximum(tokens, 0))).logits

    def torch_loss(self, theirs, tokens):
        labels = np.where(tokens < 0, -100, tokens)
        return theirs(as_torch(np.maximum(tokens, 0)), labels=as_torch(labels)).loss


class Bert(Gpt):
    def __init__(self, config=transformers.BertConfig):
        super().__init__()
        self.config = config
        self.script = bert_mlm
        self.auto = "AutoModelForMaskedLM"
        self.optimizer = dict(betas=(0.9, 0.98), eps=1e-6)
        self.twins = {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }
        self.older = {"Norm.weight": "Norm.gamma", "Norm.bias": "Norm.beta"}
        self.ignored = {
            "bert.embeddings.position_ids": np.arange(48),
            "bert.pooler.dense.bias": np.ones(48),
        }
        self.refused = dict(
            hidden_act="relu", position_embedding_type="relative_key", is_decoder=True,
            tie_word_embeddings=False,
        )  # fmt: skip

    def new(self, rate=0.0, dtype="float32", remat=False, head="mlm", **changes):
        sizes = dict(vocab_size=199, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
        sizes |= dict(intermediate_size=96, max_position_embeddings=48)
        rates = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), rate)
        config = self.config(**sizes | rates | changes)
        return bert_mlm.BERT(config, head=head, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))

    def batch(self, seed=0):
        """After masking. Rows of unequal length hold unequal numbers of targets."""
        tokens, lengths = padded(4, 33, seed)
        return (masker()(jax.random.key(seed), tokens) | dict(lengths=lengths),)

    def logits(self, model, batch, key=None):
        """Those of the padding are 0. The second half of a row has another token type."""
        places = jnp.arange(33)
        ends = batch["lengths"][:, None]
        types = (places > ends // 2).astype(int)
        hidden = model(batch["tokens"], batch["lengths"], types, key=key)
        return model.mlm_logits(hidden) * (places < ends)[..., None]

    def loss(self, model, batch, key=None):
        nats, n, _ = bert_mlm.loss_sum(model, batch, key)
        return nats / n

    def torch_logits(self, theirs, batch):
        places = torch.arange(33)
        ends = as_torch(batch["lengths"])[:, None]
        types = (places > ends // 2).long()
        mask = (places < ends).long()
        tokens = as_torch(batch["tokens"])
        return theirs(tokens, token_type_ids=types, attention_mask=mask).logits * mask[..., None]

    def torch_loss(self, theirs, batch):
        batch = {name: np.asarray(x) for name, x in batch.items()}
        tokens = batch["tokens"]
        rows, at = np.nonzero(batch["weights"])
        labels = np.full(tokens.shape, -100)
        labels[rows, batch["positions"][rows, at]] = batch["targets"][rows, at]
        mask = np.arange(tokens.shape[1]) < batch["lengths"][:, None]
        options = dict(attention_mask=as_torch(mask), labels=as_torch(labels))
        return theirs(as_torch(tokens), **options).loss


def tiny_view(size, share):
    """Sees the central square, `share` of a picture's short side long."""
    processor = transformers.BitImageProcessorPil(
        size={"shortest_edge": round(size / share)},
        crop_size={"height": size, "width": size},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=2,
    )
    return resnet_stream.View(processor)


class ResNet(Gpt):
    def __init__(self, kind="basic", stem="cifar"):
        super().__init__()
        self.kind = kind
        self.stem = stem
        self.size = 32 if stem == "imagenet" else 8
        self.script = resnet_stream
        self.auto = "AutoModelForImageClassification"
        self.optimizer = None
        self.training = dict(
            lr=2e-3, warmup_steps=3, steps=10, grad_clip=0.5, batch_size=8, device_rows=4,
            weight_decay=1.0, label_smoothing=0.1, ema=0.0, mixup=0.0,
        )  # fmt: skip
        self.twins = {}
        self.ignored = {}
        self.older = {"resnet.": ""}
        self.refused = dict(
            downsample_in_bottleneck=True, downsample_in_first_stage=True, num_channels=1,
            hidden_act="gelu", stem="deep",
        )  # fmt: skip

    def new(self, rate=0.0, dtype="float32", remat=False, classes=tuple("abcdefg"), size=None):
        sizes = dict(depths=[1, 2], hidden_sizes=[16, 32], embedding_size=8, layer_type=self.kind)
        names = resnet_stream.label_names(classes)
        config = transformers.ResNetConfig(**sizes, **names, stem=self.stem)
        options = dict(dropout=rate, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))
        return resnet_stream.ResNet(config, tiny_view(size or self.size, 0.875), **options)

    def batch(self, seed=0):
        images = np.random.default_rng(seed).integers(0, 256, (8, self.size, self.size, 3))
        return images.astype(np.uint8), np.arange(8) % 7

    def logits(self, model, images, labels, key=None):
        return model(model.view.normalise(images), key=key)

    def loss(self, model, images, labels, key=None):
        """The mean of two microbatches, each with the statistics of its own."""
        targets = 0.9 * jax.nn.one_hot(labels, 7) + 0.1 / 7
        nats = []
        for half in (slice(0, None, 2), slice(1, None, 2)):
            logits = model(model.view.normalise(images[half]), train=True, key=key)
            nats.append(-jnp.sum(targets[half] * jax.nn.log_softmax(logits), -1))
        return jnp.mean(jnp.stack(nats))

    def torch_logits(self, theirs, images, labels):
        pixels = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        return theirs(torch.tensor(pixels).float().permute(0, 3, 1, 2)).logits

    def torch_loss(self, theirs, images, labels):
        losses = []
        theirs.train()
        for i in (0, 1):
            logits = self.torch_logits(theirs, images[i::2], None)
            targets = as_torch(labels[i::2])
            losses.append(torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1))
        theirs.eval()
        return sum(losses) / 2


gpt = Gpt()
bert = Bert()
pre_norm = Bert(transformers.MegatronBertConfig)
resnet = ResNet()
bottleneck = ResNet("bottleneck", "imagenet")
MODELS = dict(gpt=gpt, bert=bert, bert_pre_norm=pre_norm, resnet=resnet, bottleneck=bottleneck)
all_models = pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS)
three_models = pytest.mark.parametrize("kind", [gpt, bert, resnet], ids=["gpt", "bert", "resnet"])


def padded(B, T, seed=0, V=199):
    """Tokens (B, T) of rows of unequal length, and their lengths."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[T], rng.integers(2, T, B - 1)]).astype(np.int32)
    tokens = rng.integers(5, V, (B, T))
    return np.where(np.arange(T) < lengths[:, None], tokens, 0).astype(np.int32), lengths


@cache
def masker(V=199, share=0.15):
    """mask_tokens, compiled, for a vocabulary whose first five ids are special."""
    tokenizer = SimpleNamespace(
        get_vocab=lambda: {str(i): i for i in range(V)},
        all_special_ids=[*range(5)],
        mask_token_id=4,
    )
    return jax.jit(partial(bert_mlm.mask_tokens, tokenizer=tokenizer, share=share))


def see(kind, model, batch, key=None):
    """Logits, compiled as a whole: operation by operation takes ten times as long."""
    return np.asarray(nnx.jit(kind.logits)(model, *batch, key=key))


def exported(kind, model):
    """{transformers' name: array} as PyTorch loads them."""
    kind.script.save_pretrained(model, "exported")
    return load_file("exported/model.safetensors")


def gradients(kind, model, batch, key=None):
    """(loss, {transformers' name: gradient})."""
    loss_and_grads = nnx.jit(nnx.value_and_grad(partial(kind.loss, key=key)))
    loss, grads = loss_and_grads(model, *batch)
    there = nnx.clone(model)
    nnx.update(there, grads)
    return float(loss), exported(kind, there)


def make_step(script, model, **changes):
    """(state, train_step, merge); merge(state) is (model, optimizer, ...)."""
    cfg = script.Config(**changes)
    schedule = script.make_schedule(cfg)
    parts = [model, nnx.Optimizer(model, script.make_optimizer(cfg, schedule), wrt=nnx.Param)]
    options = [schedule]
    if script is resnet_stream:
        parts.append(jax.tree.map(jnp.copy, model) if cfg.ema else None)
        options = [cfg, schedule]
    graphdef, state = nnx.split(tuple(parts))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    state = common.shard_state(mesh, state, fsdp=False)
    accum = script.count_microbatches(cfg.batch_size, cfg.device_rows)
    step = script.make_train_step(graphdef, state, accum, *options)
    return state, step, partial(nnx.merge, graphdef)


def in_torch(kind, folder):
    """Transformers' model of a folder, which has to fit."""
    options = {}
    if kind is resnet:  # transformers has no ResNet with the small stem
        options["trust_remote_code"] = True
    auto = getattr(transformers, kind.auto)
    theirs, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return theirs.eval()


@against_torch
@all_models
def test_logits_loss_and_gradients_equal_pytorch(kind):
    model = kind.model()
    batch = kind.batch()
    kind.script.save_pretrained(model, "model")
    theirs = in_torch(kind, "model")
    logits = see(kind, model, batch)
    np.testing.assert_allclose(logits, kind.torch_logits(theirs, *batch).detach(), atol=1e-4)
    np.testing.assert_array_equal(see(kind, kind.script.from_pretrained("model"), batch), logits)
    loss, grads = gradients(kind, model, batch)
    right = kind.torch_loss(theirs, *batch)
    right.backward()
    assert loss == pytest.approx(right.item(), abs=1e-5)
    for name, p in theirs.named_parameters():
        np.testing.assert_allclose(grads[name], p.grad, atol=2e-5, rtol=1e-4, err_msg=name)


@against_torch
@all_models
def test_ten_steps_equal_pytorch(kind):
    model = kind.model()
    kind.script.save_pretrained(model, "model")
    theirs = in_torch(kind, "model")
    state, step, merge = make_step(kind.script, model, **kind.training)
    decay = kind.script.Config(**kind.training).weight_decay
    groups = []
    for p in theirs.parameters():
        groups.append(dict(params=[p], weight_decay=decay * (p.ndim >= 2)))
    if kind.optimizer:
        optimizer = torch.optim.AdamW(groups, **kind.optimizer)
    else:
        optimizer = torch.optim.SGD(groups, lr=1, momentum=0.9, nesterov=True)
    for i in range(10):
        batch = kind.batch(seed=i)
        state, metrics = step(state, *batch, jax.random.key(i))
        loss = kind.torch_loss(theirs, *batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = float(metrics["lr"])
        optimizer.step()
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    trained = merge(state)[0]
    wanted = kind.torch_logits(theirs, *batch).detach()
    np.testing.assert_allclose(see(kind, trained, batch), wanted, atol=1e-3)
    found = exported(kind, trained)
    for name, statistic in theirs.named_buffers():
        if "running" in name:
            options = dict(atol=1e-4, rtol=1e-3, err_msg=name)
            np.testing.assert_allclose(found[name], statistic, **options)


@three_models
def test_published_names_load_and_what_changes_the_numbers_is_refused_by_name(kind):
    model = kind.model()
    batch = kind.batch()
    w = exported(kind, model)
    wanted = see(kind, model, batch)
    config = json.loads(Path("exported/config.json").read_text())
    shutil.copytree("exported", "model")

    def load(weights, **fields):
        write({"model/config.json": json.dumps(config | fields)})
        save_file(weights, "model/model.safetensors")
        return kind.script.from_pretrained("model")

    def older(name):
        return re.sub("|".join(kind.older), lambda found: kind.older[found[0]], name)

    twins = {twin: w[own] for twin, own in kind.twins.items()}
    without = {name: x for name, x in w.items() if name not in kind.twins.values()}
    old = {older(name): x for name, x in w.items()}
    for weights in (old | kind.ignored, w | twins, without | twins):
        np.testing.assert_array_equal(see(kind, load(weights), batch), wanted)

    for name, value in (kind.refused | dict(problem_type="regression")).items():
        with pytest.raises(common.UsageError, match=f"{name} is {value}, only"):
            load(w, **{name: value})
    name = [name for name in sorted(w) if "layer" in name or ".h." in name][-1]
    lacking = {other: x for other, x in w.items() if other != name}
    wrong = {
        "is missing": lacking,
        "expected": w | {name: w[name][:1]},
        "has no place in": w | {"adapter.weight": w[name]},
        "is not finite": w | {name: w[name] + np.nan},
        r"\(int8\)": w | {name: np.int8(w[name])},
    }
    for twin, x in twins.items():
        wrong[twin + ".*only tied ones"] = w | {twin: x + 1}
    for message, weights in wrong.items():
        with pytest.raises(common.UsageError, match=message):
            load(weights)


@three_models
def test_weights_are_read_from_one_file_or_several_and_only_from_safetensors(kind):
    model = kind.model()
    batch = kind.batch()
    wanted = see(kind, model, batch)
    w = exported(kind, model)
    shutil.copytree("exported", "model")
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(w)}
    for file in sorted({*index.values()}):
        part = {name: x for name, x in w.items() if index[name] == file}
        save_file(part, f"model/{file}")
    write({"model/model.safetensors.index.json": json.dumps({"weight_map": index})})
    name = next(name for name in w if name.endswith("weight"))
    save_file(w | {name: w[name] + 1}, "model/model.safetensors")
    found = see(kind, kind.script.from_pretrained("model"), batch)
    assert np.any(found != wanted), "one file goes before an index, as in transformers"
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    found = see(kind, kind.script.from_pretrained("model"), batch)
    np.testing.assert_array_equal(found, wanted)
    for file in index.values():
        Path("model", file).unlink(missing_ok=True)
    with pytest.raises(common.UsageError, match=r"no model\.safetensors in it"):
        kind.script.from_pretrained("model")


def test_bert_head_that_a_checkpoint_lacks_is_drawn_with_a_seed_and_else_refused():
    w = exported(bert, bert.model())
    encoder = {name: x for name, x in w.items() if name.startswith("bert.")}
    save_file(encoder, "exported/model.safetensors")
    assert bert_mlm.from_pretrained("exported", head=None).head is None
    with pytest.raises(common.UsageError, match=r"has no cls\..*, so no head for --task mlm"):
        bert_mlm.from_pretrained("exported")
    drawn = exported(bert, bert_mlm.from_pretrained("exported", seed=0))
    assert {*drawn} == {*w}
    for name, x in encoder.items():
        np.testing.assert_array_equal(drawn[name], x)


@three_models
def test_dropout_is_drawn_by_its_key_and_is_that_of_the_checkpoint_but_for_a_flag(kind):
    batch = kind.batch()
    dropping = kind.model(rate=0.2)
    np.testing.assert_array_equal(see(kind, dropping, batch), see(kind, kind.model(), batch))
    draws = [see(kind, dropping, batch, jax.random.key(i)) for i in (1, 1, 2)]
    assert np.all(draws[0] == draws[1]) and np.any(draws[0] != draws[2])
    if kind is resnet:
        return
    x = kind.script.dropout(jnp.ones(100_000), 0.2, jax.random.key(1))
    assert abs(x.mean() - 1) < 0.01 and abs((x == 0).mean() - 0.2) < 0.01
    exported(kind, kind.model(rate=0.1, vocab_size=300))
    tokenizer = kind.script.load_tokenizer("bpe:300")
    head = ["mlm"] if kind is bert else []
    for flag, rate in {None: 0.1, 0.0: 0.0}.items():
        cfg = kind.script.Config(init_from="exported", dropout=flag)
        config = kind.script.build(cfg, tokenizer, *head).config.to_dict()
        rates = {x for name, x in config.items() if re.search("_pdrop|dropout_prob", name)}
        assert rates == {rate}


@three_models
def test_bfloat16_remat_and_the_code_for_accelerators_give_the_same_numbers(kind, monkeypatch):
    batch = kind.batch()
    plain = see(kind, kind.model(), batch)
    half = kind.model(dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    off = np.abs(see(kind, half, batch) - plain).max()
    assert 1e-3 < off < 0.3, "nearly the same, and not in float32"
    if kind is not resnet:
        with monkeypatch.context() as patch:  # what the fused kernel is asked for, by XLA
            attend = jax.nn.dot_product_attention

            def attend_by_xla(*inputs, implementation, **options):
                return attend(*inputs, **options)

            patch.setattr(kind.script, "has_fused_attention", lambda q: True)
            patch.setattr(jax.nn, "dot_product_attention", attend_by_xla)
            np.testing.assert_allclose(see(kind, kind.model(), batch), plain, atol=1e-5)

    key = jax.random.key(1)
    loss, grads = gradients(kind, kind.model(rate=0.1), batch, key)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    same, others = gradients(kind, kind.model(rate=0.1, remat=True), batch, key)
    assert same == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        np.testing.assert_allclose(others[name], grad, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("script", [gpt_train, bert_mlm], ids=["gpt", "bert"])
def test_fused_attention_is_for_gpus_that_have_it(script, monkeypatch):
    q = jnp.zeros((4, 8, 2, 64), jnp.bfloat16)
    for capability in (None, "7.5", "gfx942", "8.0", "9.0", "12.0"):
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert script.has_fused_attention(q) == str(capability).endswith(".0")
        assert not script.has_fused_attention(q.astype(jnp.float32))
        assert not script.has_fused_attention(q[..., :20])


@pytest.mark.parametrize("kind", [gpt, bert], ids=["gpt", "bert"])
def test_bfloat16_gradients_at_32_768_tokens_are_those_of_float32(kind):
    text = "".join(documents(JSON)[0]).encode()[: 32 * 1024]
    # the space stands there some 8,000 times
    tokens = np.frombuffer(text, np.uint8).reshape(-1, 32).astype(np.int32) % 199
    batch = masker()(jax.random.key(0), tokens) if kind is bert else tokens
    _, half = gradients(kind, kind.new(dtype="bfloat16"), (batch,))
    _, whole = gradients(kind, kind.new(), (batch,))
    errors = {}
    for name, grad in whole.items():
        if not name.endswith("self.key.bias"):  # 0 but for rounding: softmax does not see it
            errors[name] = np.linalg.norm(half[name] - grad) / np.linalg.norm(grad)
    assert max(e for name, e in errors.items() if "wte" in name or "word" in name) < 0.01, errors
    assert max(errors.values()) < 0.03, errors


NEW = {  # a part of a weight's name: its deviation in a new model
    "gpt": (gpt, {"wte": 0.02, "wpe": 0.02, "c_fc.weight": 0.02, "c_proj.weight": 0.01, "bias": 0}),
    "bert": (
        bert,
        {"embeddings.weight": 0.02, "dense.weight": 0.02, "query.weight": 0.02, "bias": 0},
    ),
    "pre-norm": (pre_norm, {"query.weight": 0.02, "output.dense.weight": 0.01, "bias": 0}),
    "resnet": (
        bottleneck,
        {"1.layer.1.convolution": math.sqrt(2 / (9 * 8)), "2.normalization.weight": 0},
    ),
}


@pytest.mark.parametrize("case", NEW)
def test_new_model_starts_as_published(case):
    kind, deviations = NEW[case]
    weights = exported(kind, kind.new())
    for part, deviation in deviations.items():
        named = [w for name, w in weights.items() if part in name]
        found = [w for w in named if w.size > 500 or deviation == 0]
        assert found, part
        for w in found:
            assert np.std(w) == pytest.approx(deviation, rel=0.08), part


def test_resnets_have_the_published_sizes():
    for depth, millions in {18: 11.69, 34: 21.80, 50: 25.56, 101: 44.55, 152: 60.19}.items():
        cfg = resnet_stream.Config(depth=depth, width=64, stem="imagenet", image_size=32)
        create = partial(resnet_stream.build, cfg, [str(i) for i in range(1000)])
        params = jax.tree.leaves(nnx.state(nnx.eval_shape(create), nnx.Param))
        assert round(sum(math.prod(p.shape) for p in params) / 1e6, 2) == millions


@against_torch
@pytest.mark.parametrize(
    "kind, hidden", [(gpt, "transformer.h."), (bert, "bert.enc")], ids=["gpt", "bert"]
)
def test_muon_is_jordans_but_for_three_named_differences_and_only_inside(kind, hidden):
    """https://kellerjordan.github.io/posts/muon, restated; what is no hidden matrix is AdamW's."""

    def orthogonal(X):
        X = X / (X.norm() + 1e-7)
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        return X

    cfg = kind.script.Config(optimizer="muon", weight_decay=0.1, grad_clip=0.0)
    model = kind.model()
    rng = np.random.default_rng(0)
    params = nnx.state(model, nnx.Param)
    rule = kind.script.make_optimizer(cfg, lambda step: 0.01)
    state = rule.init(params)
    update = jax.jit(rule.update)
    weights = {name: torch.tensor(w) for name, w in exported(kind, model).items()}
    momentum = {}
    groups = []
    for name, w in weights.items():
        if name.startswith(hidden) and w.ndim == 2:
            momentum[name] = torch.zeros_like(w)
        else:
            groups.append(dict(params=[w], weight_decay=0.1 * (w.ndim == 2)))
    adamw = torch.optim.AdamW(groups, lr=0.01, **kind.optimizer)
    for t in range(1, 11):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        nnx.update(model, grads)
        for name, g in exported(kind, model).items():
            weights[name].grad = torch.tensor(g)
        adamw.step()
        for name, m in momentum.items():
            w = weights[name]
            g = w.grad
            m.lerp_(g, 1 - 0.95)
            # 1. NAdam's correction of the momentum's bias; 2. float32 instead of bfloat16
            corrected = torch.lerp(g / (1 - 0.95**t), m / (1 - 0.95 ** (t + 1)), 0.95)
            # 3. AdamW's size, instead of sqrt(max(1, rows / columns))
            size = 0.2 * max(w.shape) ** 0.5
            w -= 0.01 * (size * orthogonal(corrected) + 0.1 * w)
        nnx.update(model, params)
        for name, found in exported(kind, model).items():
            options = dict(atol=2e-5, rtol=2e-3, err_msg=name)
            np.testing.assert_allclose(found, weights[name], **options)


@scripts
def test_schedule_rises_and_falls_and_with_a_cooldown_may_be_extended(script):
    def rates(**changes):
        usual = dict(lr=1.0, min_lr=0.1, warmup_steps=10, steps=100)
        schedule = script.make_schedule(script.Config(**usual | changes))
        return [float(schedule(step)) for step in range(101)]

    usual = rates()
    assert 0 < usual[0] < 0.1 and usual[10] == max(usual) == 1
    assert usual[100] == pytest.approx(0.1) and usual[55] == pytest.approx(0.55)
    assert np.all(np.diff(usual[:11]) > 0) and np.all(np.diff(usual[10:]) < 0)
    is_line = abs(usual[30] - 0.8) < 1e-6
    assert is_line == (script is bert_mlm), "a line, and not a cosine"
    plateau = rates(cooldown=0.2)
    assert plateau[:11] == usual[:11] and plateau[10:81] == [1] * 71
    assert plateau[:81] == rates(cooldown=0.2, steps=200)[:81]
    np.testing.assert_allclose(np.diff(plateau[80:]), -0.045, atol=1e-6)


def test_resnet_mixup_and_running_mean_of_the_weights():
    def one_step(images, labels, seed=0, **changes):
        """(weights, their mean, loss) after a step, from the same start each time."""
        training = resnet.training | dict(device_rows=8) | changes
        state, step, merge = make_step(resnet_stream, resnet.model(), **training)
        state, metrics = step(state, images, labels, jax.random.key(seed))
        model, _, average = merge(state)
        mean = average and exported(resnet, average)
        return exported(resnet, model), mean, float(metrics["loss"])

    images, labels = resnet.batch()
    before = exported(resnet, resnet.model())
    after, mean, loss = one_step(images, labels, ema=0.05)
    for name, w in before.items():
        np.testing.assert_allclose(mean[name], 0.05 * w + 0.95 * after[name], atol=1e-6)
    # where each picture stands opposite to itself mixup does nothing; else it mixes two losses
    same = (np.concatenate([images[:4], images[3::-1]]), np.array([0, 1, 2, 3, 3, 2, 1, 0]))
    assert one_step(*same, mixup=0.4)[2] == pytest.approx(one_step(*same)[2], rel=1e-5)
    found = [one_step(images, labels, seed, mixup=0.4)[2] for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert min(abs(found[0] - other) for other in (found[2], loss)) > 1e-3


@pytest.mark.parametrize("share", [0.15, 0.3])
def test_bert_masking_hides_an_exact_count_of_ordinary_tokens_80_10_10(share):
    new = []
    old = []
    for seed in range(8):
        tokens, lengths = padded(512, 64, seed, V=200)
        tokens[np.random.default_rng(seed).random(tokens.shape) < 0.02] = 3
        tokens[:, 0] = 2
        tokens[np.arange(64) >= lengths[:, None]] = 0
        out = jax.device_get(masker(200, share)(jax.random.key(seed), tokens))
        rows, at = np.nonzero(out["weights"])
        places = np.zeros(tokens.shape, bool)
        places[rows, out["positions"][rows, at]] = True
        assert not np.any(places & (tokens < 5)), "never [CLS], [SEP] or [PAD]"
        n = np.sum(tokens >= 5, axis=1)
        wanted = np.where(n, np.maximum(1, np.floor(share * n + 0.5)), 0)
        np.testing.assert_array_equal(places.sum(1), wanted, "and no position twice")
        targets = np.take_along_axis(tokens, out["positions"], 1)
        np.testing.assert_array_equal(out["targets"], targets)
        assert np.all(out["tokens"][~places] == tokens[~places]), "nothing else changes"
        new = np.append(new, out["tokens"][places])
        old = np.append(old, tokens[places])
    random = new[(new != 4) & (new != old)]
    assert len(new) > 15_000
    assert abs(np.mean(new == 4) - 0.8) < 0.01
    assert abs(np.mean(new == old) - 0.1 - 0.1 / 195) < 0.01
    assert random.min() == 5 and random.max() == 199, "any ordinary token, no special one"


# ---- rows, tokenizers, and models put to use ----


@pytest.fixture(scope="session")
def tokenizer():
    """BERT's, small."""
    return bert_mlm.load_tokenizer("bpe:300", documents(JSON)[0])


@pytest.mark.parametrize("script", [gpt_train, bert_mlm], ids=["gpt", "bert"])
def test_rows_hold_the_documents_cut_anew_in_every_epoch(script, tokenizer):
    texts = documents(JSON)[0]
    end = "[SEP]"
    if script is gpt_train:
        tokenizer = gpt_train.load_tokenizer("byte")
        end = gpt_train.END
    epochs = []
    for seed in range(2):
        rows = script.pack(tokenizer, texts, 33, np.random.default_rng(seed))
        if script is bert_mlm:
            rows = rows["tokens"]
            assert np.all(rows[:, 0] == 2) and np.all(rows[:, -1] == 3)
            assert not np.any(rows == 0), "no padding"
            rows = rows[:, 1:-1]
        epochs.append({tuple(row) for row in rows.tolist()})
        parts = [part for row in rows for part in tokenizer.decode(row).split(end)]
        assert sum(map(len, parts)) > 0.95 * sum(map(len, texts)), "fewer than two rows are lost"
        for part in parts:
            assert any(part in text for text in texts), "a row is a stretch of a text"
    assert len(epochs[0] & epochs[1]) < 0.1 * len(epochs[0])


@pytest.mark.parametrize("script", [gpt_train, bert_mlm], ids=["gpt", "bert"])
def test_what_looks_like_a_special_token_is_text_and_in_a_prompt_the_token(script):
    tokenizer = script.load_tokenizer("bpe:300", ["one two three"] * 10)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer("one", truncation=True, max_length=4, padding="max_length")  # is saved with it
    tokenizer.save_pretrained("saved")
    tokenizer = script.load_tokenizer("saved")
    text = "one two three [MASK] <|endoftext|> [SEP]"
    ids = np.concatenate(script.encode(tokenizer, [text] * 2))
    assert tokenizer.decode(ids) == text * 2
    assert not {*ids} & {*tokenizer.all_special_ids}
    [ids] = script.encode(tokenizer, [text], special=True)
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tokenizer_of_words_without_spaces_is_trained_in_seconds():
    letters = "".join(random.Random(0).choices("acgt", k=1_000_000))
    assert len(gpt_train.load_tokenizer("bpe:1000", [letters])) == 1000


def test_ids_may_have_gaps_and_what_a_tokenizer_adds_is_in_a_document_once():
    vocab = {"def": 0, "return": 5, "self": 300, "?": 70_001, "<end>": 70_000}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="?"
    )
    words.save_pretrained("gaps")
    small = dict(steps=1, n_embd=8, batch_size=8, device_rows=8)
    last = train(tokenizer="gaps", **small, out_dir="a")
    assert last["loss"] == pytest.approx(math.log(70_002), rel=0.01)
    assert gpt_train.from_pretrained("a").config.vocab_size == 70_002

    # as Llama's adds its first token, and T5's the last
    added = dict(single="<end> $A <end>", special_tokens=[("<end>", 70_000)])
    framed = tokenizers.processors.TemplateProcessing(**added)
    words.backend_tokenizer.post_processor = framed
    assert words("self")["input_ids"] == [70_000, 300, 70_000]
    [row] = gpt_train.pack(words, ["self"], 3, np.random.default_rng(0))
    assert row.tolist() == [70_000, 300, 70_000]
    assert gpt_train.encode_prompts(words, ["self", ""], 9) == [[70_000, 300], [70_000]]

    # a new BERT's rows are framed, and so are texts by the tokenizer that is saved with it
    names = dict(mask_token="[M]", cls_token="[C]", sep_token="[S]", pad_token="[P]")
    words.add_special_tokens(names)
    words.save_pretrained("framed")
    words = bert_mlm.load_tokenizer("framed")
    assert words("self")["input_ids"] == [words.cls_token_id, 300, words.sep_token_id]


@against_torch
def test_greedy_text_is_that_of_transformers_whatever_the_lengths(typed):
    tokenizer = gpt_train.load_tokenizer("byte")
    model = gpt.model(vocab_size=257, n_positions=64)
    gpt_train.save_pretrained(model, "model", tokenizer)
    theirs = transformers.GPT2LMHeadModel.from_pretrained("model").eval()
    prompts = ["d", "import json\n", "def "]
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    wanted = []
    for row in rows:
        greedy = dict(max_new_tokens=30, do_sample=False, pad_token_id=256, eos_token_id=None)
        wanted.append(theirs.generate(as_torch([row]), **greedy)[0].tolist())
    use = dict(steps=0, init_from="model", temperature=0, max_new_tokens=30)
    out, _ = typed(gpt_train, prompt=tuple(prompts[:2]), **use)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in wanted[:2]]
    assert out == "\n---\n".join(texts) + "\n"

    tokens = np.array([row + [0] * (12 - len(row)) for row in rows])
    lengths = [len(row) for row in rows]
    draw = partial(gpt_train.generate, model, tokens, key=jax.random.key(0), lengths=lengths)
    eos = wanted[0][9]
    found = np.asarray(draw(30, temperature=0))
    ended = np.asarray(draw(30, temperature=0, eos=eos))
    for row, stopped, right, n in zip(found, ended, wanted, lengths):
        assert row[: n + 30].tolist() == right and not row[n + 30 :].any()
        end = n + [*right[n:], eos].index(eos)
        assert stopped[:end].tolist() == right[:end] and np.all(stopped[end:] == eos)
    with pytest.raises(ValueError, match="65 tokens, and the model has 64 positions"):
        draw(53)
    for weights in (model.ln_f.scale, model.ln_f.bias):
        weights.set_value(jnp.zeros(48))  # all tokens equally likely, whatever the text
    new = [row[n : n + 50] for row, n in zip(np.asarray(draw(50)), lengths)]
    assert len(np.unique(new)) > 100, "150 draws among 257: each has a key of its own"


P = np.array([0.5, 0.3, 0.15, 0.05])
SAMPLES = [  # temperature, top_k, top_p, the shares of the four tokens
    (1, None, None, P),
    (1, 2, None, [0.625, 0.375, 0, 0]),
    (1, None, 0.8 + 1e-4, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
    (1, None, 0.7, [0.625, 0.375, 0, 0]),
    (1, 3, 0.6, [0.625, 0.375, 0, 0]),
    (0.5, None, None, P**2 / np.sum(P**2)),
    (0, None, None, [1, 0, 0, 0]),
    (1e-40, None, None, [1, 0, 0, 0]),
    (1, None, 1e-6, [1, 0, 0, 0]),
]


@pytest.mark.parametrize("temperature, top_k, top_p, wanted", SAMPLES)
def test_sampling_follows_the_softmax_within_top_k_and_top_p(temperature, top_k, top_p, wanted):
    logits = jnp.asarray(np.tile(np.log(P), (40_000, 1)))
    drawn = gpt_train.sample(jax.random.key(0), logits, temperature, top_k, top_p)
    shares = np.bincount(drawn, minlength=4) / len(logits)
    np.testing.assert_allclose(shares, wanted, atol=0.01)


@pytest.fixture(scope="session")
def bert_folder(tokenizer, tmp_path_factory):
    """The folder of a small random BERT with its tokenizer."""
    path = tmp_path_factory.mktemp("bert") / "model"
    model = bert.model(vocab_size=300, max_position_embeddings=64)
    bert_mlm.save_pretrained(model, path, tokenizer)
    return str(path)


MEAN = dict(pooling_mode_mean_tokens=True)
CLS = dict(pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
MAX = CLS | dict(pooling_mode_max_tokens=True)
QUERY = dict(prompts=dict(q="query: "), default_prompt_name="q")
PROMPT = {"config_sentence_transformers.json": QUERY}
SHORT = {"sentence_bert_config.json": dict(max_seq_length=8)}
LOWER = {"sentence_bert_config.json": dict(do_lower_case=True)}
SENTENCES = {  # 1_Pooling, a third layer, other files; (pooling, normalised, length, prompt)
    "plain folder": (None, None, {}, ("mean", True, 64, "")),
    "not normalised": (CLS, None, {}, ("cls", False, 64, "")),
    "another spelling": (dict(pooling_mode="cls"), "Normalize", {}, ("cls", True, 64, "")),
    "length": (MEAN, "Normalize", SHORT, ("mean", True, 8, "")),
    "prompt": (MEAN, "Normalize", PROMPT, ("mean", True, 64, "query: ")),
    "lower case": (MEAN, "Normalize", LOWER, ("mean", True, 64, "")),
    # or what is said
    "max": (MAX, None, {}, "pooling is cls+max, only mean or cls; see --pooling"),
    "dense": (MEAN, "Dense", {}, "has Transformer, Pooling, Dense; only"),
}


def write_sentence_transformer(bert_folder, pooling, third, files):
    """model/, as sentence-transformers writes it: without a head, under BertModel's names."""
    shutil.copytree(bert_folder, "model")
    if pooling:
        transformers.AutoModel.from_pretrained(bert_folder).save_pretrained("model")
        layers = {"Transformer": "", "Pooling": "1_Pooling"}
        if third:
            layers[third] = f"2_{third}"
        modules = []
        for kind, path in layers.items():
            modules.append(dict(type=f"sentence_transformers.models.{kind}", path=path))
        files = files | {"modules.json": modules, "1_Pooling/config.json": pooling}
    write({f"model/{name}": json.dumps(content) for name, content in files.items()})


@against_torch
@pytest.mark.parametrize("case", SENTENCES)
def test_bert_embeddings_are_those_of_pytorch_and_sentence_transformers(case, bert_folder, typed):
    pooling, third, files, wanted = SENTENCES[case]
    write_sentence_transformer(bert_folder, pooling, third, files)
    texts = ["import json", "class JSONDecoder(object): pass", "x " * 90, "", "y"]
    write({"texts.txt": "\n".join(texts) + "\n"})
    embed = partial(typed, bert_mlm, steps=0, init_from="model", embed="texts.txt")
    if isinstance(wanted, str):
        assert wanted in embed(code=2)[1]
        return
    embed()
    mode, normalize, length, prompt = wanted
    texts = [prompt + text for text in texts]
    if files is LOWER:
        texts = [text.lower() for text in texts]
    theirs = transformers.AutoTokenizer.from_pretrained("model")
    options = dict(max_length=length, truncation=True, padding=True, return_tensors="pt")
    inputs = theirs(texts, return_token_type_ids=False, **options)
    model = transformers.AutoModel.from_pretrained("model").eval()
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    vectors = hidden[:, 0] if mode == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    if normalize:
        vectors = torch.nn.functional.normalize(vectors)
    np.testing.assert_allclose(np.load("texts.npy"), vectors.detach(), atol=1e-5)
    assert "texts.npy exists; delete it to replace it" in embed(code=2)[1]


@against_torch
def test_bert_fill_mask_gives_the_likeliest_tokens_of_each_mask(bert_folder, typed):
    texts = ("import [MASK] as np", "a [MASK] and")
    out, _ = typed(bert_mlm, steps=0, init_from=bert_folder, prompt=texts)
    pipeline = transformers.pipeline("fill-mask", bert_folder)
    blocks = []
    for text in texts:
        best = pipeline(text, top_k=5)
        blocks.append("\n".join(f"{x['score']:6.1%}  {x['sequence']!r}" for x in best))
    assert out == "\n\n".join(blocks) + "\n"


# ---- pictures ----

LAYOUTS = {  # pictures: their classes, and how many of them each split has; or what is said
    "a/0.png b/1.jfif b/2.PNG": (["a", "b"], {"train": 3}),
    "train/a/0.png train/b/1.png val/a/2.png": (["a", "b"], {"train": 2, "validation": 1}),
    "training/a/0.png training/b/1.png test/a/2.png": (["a", "b"], {"train": 2, "test": 1}),
    "test_tube/0.png train_dog/1.png pen/2.png": (["pen", "test_tube", "train_dog"], {"train": 3}),
    "cat/in/0.png cat/out/1.png dog/2.png": "expected d/CLASS/a.jpg",
    "train/cat/in/0.png train/dog/in/1.png": "expected d/train/CLASS/a.jpg",
    "cat/train/0.png dog/train/1.png": "expected d/CLASS/a.jpg",
    "train/0.png val/1.png": "expected d/train/CLASS/a.jpg",
    "train/a/0.png train/b/1.png val/2.png": "expected d/train/CLASS/a.jpg",
    "images/0.png images/1.png": "pictures of 1 (images); expected CLASS/a.jpg of two classes",
    "train/a/0.png train/b/1.png val/c/2.png": "validation has other classes than train: 1 (c)",
}


def open_pictures(name):
    """({split: [(bytes, label)], sorted}, classes)."""
    cfg = resnet_stream.Config()
    splits, _, classes = resnet_stream.open_one("--data", name, None, None, cfg)
    found = {}
    for split, (dataset, parse, _) in splits.items():
        rows = [parse(record, classes or range(9)) for record in dataset]
        found[split] = sorted((data, label) for _, data, label in rows)
    return found, classes


@pytest.mark.parametrize("files", LAYOUTS)
def test_class_of_a_picture_is_the_folder_below_that_of_its_split(files):
    write({f"d/{file}": png(photograph()) for file in files.split()})
    wanted = LAYOUTS[files]
    if isinstance(wanted, str):
        with pytest.raises(common.UsageError, match=re.escape(wanted)):
            open_pictures("d")
        return
    splits, classes = open_pictures("d")
    assert (classes, {split: len(rows) for split, rows in splits.items()}) == wanted


def test_every_format_gives_the_same_pictures_and_labels_from_disk_and_from_the_web(tmp_path):
    rng = np.random.default_rng(0)
    pictures = []
    packed = {}
    for i in range(6):
        picture = png(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        label = i // 3
        pictures.append((picture, label))
        packed |= {f"{i}.png": picture, f"{i}.cls": str(label).encode()}
        write({f"files/folder/train/{'ab'[label]}/{i}.png": picture})
    write({"files/a.tar": tar_of(packed)})
    rows = [{"image": {"bytes": data, "path": None}, "label": label} for data, label in pictures]
    classes = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features(image=datasets.Image(), label=classes)
    datasets.Dataset.from_list(rows, features=features).to_parquet("files/a.parquet")
    write(
        {
            "beside/cover.png": pictures[0][0],
            "beside/a.parquet": Path("files/a.parquet").read_bytes(),
        }
    )
    pictures.sort()
    web = f"{Hub(tmp_path).url}/files"
    for name in ("files/folder", "files/a.parquet", f"{web}/a.parquet", "beside"):
        assert open_pictures(name) == ({"train": pictures}, ["a", "b"]), name
    for name in ("files/a.tar", f"{web}/a.tar"):
        assert open_pictures(name) == ({"train": pictures}, []), name


def test_resnet_saves_before_it_says_that_its_validation_data_fail(monkeypatch):
    def fail(state):
        raise common.RunError("the data failed")

    monkeypatch.setattr(resnet_stream, "make_evaluate", lambda *args: fail)
    with pytest.raises(common.RunError, match="the data failed"):
        train(resnet_stream, eval_every=3, ckpt_every=100, out_dir="a")
    assert os.listdir("a/ckpt") == ["3"]


def test_resnet_odd_pictures_come_out_right():
    true = Image.fromarray(photograph())
    flat = Image.new("RGB", (40, 30), (200, 30, 60))
    clear = flat.convert("RGBA")
    clear.putalpha(Image.fromarray(np.uint8(np.repeat([[255, 0]], 30, 0).repeat(20, 1))))
    white = np.asarray(flat).copy()
    white[:, 20:] = 255
    grey = np.asarray(true.convert("L"))
    greys = np.repeat(grey[..., None], 3, -1)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    turned = true.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned by 90 degrees clockwise
    told = PngImagePlugin.PngInfo()
    told.add_text("comment", "long " * 500_000, zip=True)
    for name, data, wanted, most in (  # how far off it may be
        ("jpeg, turned", png(turned, "jpeg", quality=95, exif=exif), true, 12),
        ("png, turned", png(turned, exif=exif), true, 0),
        ("long metadata", png(true, pnginfo=told), true, 0),
        ("four colours of print", png(true.convert("CMYK"), "jpeg", quality=95), true, 12),
        ("gif", png(flat.convert("P", palette=Image.Palette.ADAPTIVE), "gif"), flat, 0),
        ("grey", png(true.convert("L")), greys, 1),
        ("16 bits", png(deep), greys, 1),
        ("transparent", png(clear), white, 0),
        ("transparent palette", png(clear.quantize(4)), white, 8),
    ):
        found = np.asarray(resnet_stream.open_image(name, data)).astype(int)
        assert np.abs(found - np.asarray(wanted)).max() <= most, name


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_resnet_crops_are_what_their_seed_says(crop):
    image = resnet_stream.open_image("a", png(photograph(640, 480), "jpeg", quality=95))
    cfg = resnet_stream.Config(crop=crop, crop_pad=8, flip=True)
    draws = []
    for seed in [0, *range(200)]:
        draws.append(resnet_stream.training_crop(image, 64, cfg, seed).astype(int))
    assert draws[0].shape == (64, 64, 3)
    assert (draws[0] == draws[1]).all() and (draws[1] != draws[2]).any()
    red_is_left = [draw[32, 20, 0] > draw[32, 43, 0] for draw in draws]
    assert 70 < sum(red_is_left) < 130


def test_resnet_random_boxes_are_parts_of_the_picture():
    boxes = []
    for seed in range(300):
        boxes.append(resnet_stream.random_box(640, 480, 0.25, np.random.default_rng(seed)))
    left, top, right, bottom = np.array(boxes).T
    assert min(left.min(), top.min(), 640 - right.max(), 480 - bottom.max()) >= 0
    share = (right - left) * (bottom - top) / (640 * 480)
    assert share.min() > 0.25 and share.max() < 1 and 0.5 < share.mean() < 0.65
    shape = (right - left) / (bottom - top)
    assert shape.min() >= 0.75 - 1e-6 and shape.max() <= 4 / 3 + 1e-6


BIT = dict(image_processor_type="BitImageProcessor", size={"shortest_edge": 64}, crop_size=56)
CONVNEXT = dict(
    feature_extractor_type="ConvNextFeatureExtractor", size=96, crop_pct=0.875, resample=3
)
VIT = dict(image_processor_type="ViTImageProcessor", size={"height": 64, "width": 64})
MORE = dict(image_processor_type="EfficientNetImageProcessor")
PROCESSORS = {  # preprocessor_config.json, and why it is refused
    "of microsoft/resnet-50": (CONVNEXT, None),
    "squashes": (VIT, None),
    "does not normalise": (BIT | dict(do_normalize=False), None),
    "none": (None, None),  # transformers' default for a ResNet
    "does not crop": (BIT | dict(do_center_crop=False), "pictures come out as"),
    "normalises twice": (MORE, ".* does more than resize"),
    "flips channels": (BIT | dict(do_flip_channel_order=True), "do_flip_channel_order: not"),
    "unknown": (dict(image_processor_type="Unknown"), "Unrecognized image processor"),
}


@against_torch
@pytest.mark.parametrize("case", PROCESSORS)
def test_resnet_evaluation_sees_what_transformers_image_processor_makes_of_a_picture(case):
    settings, refused = PROCESSORS[case]
    resnet_stream.save_pretrained(resnet.model(), "model")
    Path("model/preprocessor_config.json").unlink()
    if settings:
        colours = dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
        write({"model/preprocessor_config.json": json.dumps(colours | settings)})
    if refused:
        with pytest.raises(common.UsageError, match=f"preprocessor_config.json: {refused}"):
            resnet_stream.from_pretrained("model")
        return
    view = resnet_stream.from_pretrained("model").view
    processor = transformers.ConvNextImageProcessorPil()
    if settings:
        processor = transformers.AutoImageProcessor.from_pretrained("model", backend="pil")
    for size in ((200, 150), (150, 200), (57, 80)):
        data = png(photograph(*size))
        picture = Image.open(io.BytesIO(data))
        theirs = processor(picture, return_tensors="np")["pixel_values"][0]
        ours = view.normalise(view.pixels(resnet_stream.open_image("a", data)))
        np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=1e-5)
    larger = resnet_stream.from_pretrained("model", size=2 * view.size).view
    assert larger.size == 2 * view.size and np.all(larger.slope == view.slope)


def test_resnet_batches_count_corrupt_pictures_and_go_on_after_every_one(capfd):
    write_classes("a", 40)
    good = Path("a/dark/0.png").read_bytes()
    bad = {"cut": good[:-900], "short": b"\x89", "text": b"no picture"}
    bad["bits"] = good[:60] + b"?" * 900
    bad["bomb"] = good[:16] + b"\x00\x01\xff\xff" * 2 + good[24:]  # says it has 10 billion pixels
    write({f"a/light/{name}.png": data for name, data in bad.items()})
    for i in range(40):  # every dark picture recurs, with another label
        shutil.copy(f"a/dark/{i}.png", f"a/light/again{i}.png")
    cfg = resnet_stream.Config(data="a", val_every=4, crop_pad=0)
    pictures = resnet_stream.open_pictures(cfg)
    rows = resnet_stream.validation_rows(pictures, tiny_view(8, 1))
    held = [image.tobytes() for image, _ in rows]
    n = 120 - len(held)  # pictures to train on
    capfd.readouterr()

    def open_batches(batch_size, position=None):
        cfg.batch_size = batch_size
        cfg.shuffle_buffer = 50
        return resnet_stream.batches(pictures, 8, cfg, position)

    epochs = []
    for (images, _), place in islice(open_batches(n), 2):
        epochs.append([image.tobytes() for image in images])
        bad_records = place["bad"]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1], "another order"
    assert 12 < len({*held}) < 60
    assert len({*epochs[0], *held}) == 80 and not {*epochs[0]} & {*held}, "held out is held out"
    wrong = sum(zlib.crc32(data) % 4 != 0 for data in bad.values())
    assert wrong <= bad_records <= 2 * wrong
    said = capfd.readouterr().err
    assert said.count("data: skipped record") == bad_records and "a/light/cut.png: " in said

    whole = [((x.tolist(), y.tolist()), place) for (x, y), place in islice(open_batches(9), 25)]
    for i, (_, position) in enumerate(whole, 1):
        again = islice(open_batches(9, json.loads(json.dumps(position))), 25 - i)
        again = [(x.tolist(), y.tolist(), place["bad"]) for (x, y), place in again]
        assert again == [(*batch, place["bad"]) for batch, place in whole[i:]], i


def test_resnet_labels_are_names(capsys):
    """A model that calls every picture "dark" is right for those, in whatever order they stand."""
    model = resnet.model(classes=("light", "dark"), size=8)
    model.classifier.bias.set_value(jnp.array([0.0, 100.0]))
    resnet_stream.save_pretrained(model, "model")
    write_classes("photos/train", 4)
    write_classes("photos/val", 6, ["dark"])
    write_classes("photos/val", 2, ["light"])
    use = partial(train, resnet_stream, data="photos", init_from="model", batch_size=3)
    assert use(steps=0)["val_top1"] == 0.75
    assert use(steps=0, eval_batches=1)["val_top1"] != 0.75
    write({"a.png": png(photograph())})
    capsys.readouterr()
    use(steps=0, predict=("a.png",))
    assert capsys.readouterr().out.splitlines() == ["a.png", " 100.00%  dark", "   0.00%  light"]
    assert use(steps=1, lr=0.0, out_dir="same")["val_top1"] == 0.75
    assert "head" not in capsys.readouterr().out
    assert resnet_stream.from_pretrained("same").config.id2label == {0: "dark", 1: "light"}
    # other names of the same number: a new head, and in evaluation an error
    write_classes("others", 6, ("cat", "dog"))
    use = partial(use, data="others", val_every=2)
    message = r"2 \(light, dark\); those of the data are 2 \(cat"
    with pytest.raises(common.UsageError, match=message):
        use(steps=0)
    use(steps=1, lr=0.0, out_dir="other")
    new = resnet_stream.from_pretrained("other")
    assert "head       new" in capsys.readouterr().out
    assert new.config.id2label == {0: "cat", 1: "dog"}
    np.testing.assert_allclose(new.classifier.bias[...], 0, atol=1e-6)


NUMBERED = [f"class {i}" for i in range(1000)]
TWICE = [*NUMBERED[:999], NUMBERED[0]]  # as two of ImageNet's are cranes
MATCHES = [  # names in a head, the data's, the places of these there and the names then
    (["b", "a"], ["a", "b"], [1, 0], ["a", "b"]),
    (["1", "0"], ["0", "1"], [1, 0], ["0", "1"]),
    (["LABEL_0", "LABEL_1"], ["b", "a"], [0, 1], ["b", "a"]),
    (["x", "y"], ["0", "1"], [0, 1], ["x", "y"]),
    (["x", "y"], ["1", "2"], None, ["1", "2"]),
    (["a", "b"], ["a", "b", "c"], None, ["a", "b", "c"]),
]


@pytest.mark.parametrize("theirs, classes, places, names", MATCHES)
def test_classes_are_matched_by_name_or_where_one_side_counts_by_place(
    theirs, classes, places, names
):
    assert bert_mlm.match_classes(theirs, classes) == (places, names)
    assert resnet_stream.match_classes(theirs, classes)[:2] == (places, names)


def test_resnet_models_of_imagenet_know_two_classes_by_one_name():
    places = [*range(1000)]
    assert resnet_stream.match_classes(TWICE, NUMBERED)[0] == places
    assert resnet_stream.match_classes(TWICE, TWICE)[0] == places
    few = [*NUMBERED[:9], "x"]
    assert resnet_stream.match_classes(NUMBERED[:10], few)[0] is None


# ---- bad input ----

SOON = f"--data {JSON} --val-docs 1"  # other data take longer
BYTE = f"{SOON} --tokenizer byte"
CLASSES = "--task classify --val-docs 5 --data"
PREDICT = "--steps 0 --init-from resnet --predict"
BAD = {}  # script: {arguments after --steps 1: what is said}
BAD[gpt_train] = {
    "--preset gpt3": "gpt3",
    "--step 3": "--steps",
    "--n-embd 100 --n-head 3": "--n-embd 100: must be divisible by --n-head 3",
    "--lr nan": "--lr nan: must be finite, not negative",
    "--init-from ''": "--init-from: is empty",
    "--steps 0": "--steps 0: trains nothing; name a finished model with --init-from",
    "--resume": "--resume: out holds no gpt run",
    "--coordinator host --num-processes 2 --process-id 0": "needs HOST:PORT",
    # data
    "--data no/such.txt": "--data no/such.txt: Unable to find",
    "--data a.doc": "--data a.doc: no such file, or none with data; expected .parquet",
    "--data rows.jsonl": "--data rows.jsonl: no column text, only id, title, body",
    "--data numbers.csv": "--data numbers.csv: text is 7, no text",
    "--data rows.jsonl --data-name nonsense": "rows.jsonl: has no configuration nonsense",
    "--data configured --data-name nonsense": "--data configured: BuilderConfig 'nonsense' not",
    "--data broken.parquet": "--data broken.parquet: ",
    "--data http://127.0.0.1:9/a.parquet": "--data http://127.0.0.1:9/a.parquet: ",
    "--data saved": "--data saved: ",
    "--data mixed": "--data mixed: holds .jsonl, .parquet; name one kind, as in 'mixed/**/*.jsonl'",
    "--data unsplit": "a.jsonl'] is in no split; name those to train on",
    "--data others": "--data others: ",
    "--data open.csv": "--data open.csv: ",
    "--data headless.csv": "--data headless.csv: no column text, only 1, 2",
    "--data semi.csv": "--data semi.csv: no column text, only text;b",
    "--data tabs.csv": "--data tabs.csv: no column text, only text b",
    "--data utf16.csv": "--data utf16.csv: no column text, only ",
    "--data utf16.jsonl": "--data utf16.jsonl: no records in it, or none of the first ones",
    "--data mixed.json": "--data mixed.json: ",
    "--data latin.tar": "--data latin.tar: 'utf-8' codec can't decode byte 0xe9",
    f"--data {JSON} --val-docs 9": "--val-docs 9: there are 5; ask for fewer, or give --val-data",
    f"--data {JSON} --val-docs 5": "leaves none to train on",
    # weights and tokenizers
    "--init-from ./nowhere": " ./nowhere: no such folder, nor on the hub: Repo id must",
    f"{SOON} --init-from mixed --tokenizer byte": "--init-from mixed: no config.json in it",
    f"{SOON} --init-from broken --tokenizer byte": "--init-from broken: ",
    f"{SOON} --init-from gpt --seq-len 32": "no fast tokenizer in it (tokenizer.json); name one",
    f"{SOON} --init-from empty": "--tokenizer empty: ",
    f"{BYTE} --init-from gpt": "--tokenizer byte: ids up to 256, and gpt knows 199",
    f"{SOON} --init-from gpt --tokenizer bpe:300": "--tokenizer bpe:N: --init-from knows its own",
    f"{BYTE} --seq-len 8 --prompt 'a long one'": "--prompt: 10 tokens, and there are 8 positions",
    f"{BYTE} --out-dir gpt": "--out-dir gpt: not empty and not a run; choose another directory",
    f"{BYTE} --wandb mine": "--wandb mine: needs `pip install wandb`",
}
BAD[bert_mlm] = {
    f"{SOON} --tokenizer bytes": "--tokenizer bytes: has no mask_token; BERT needs one",
    f"{SOON} --tokenizer left": "--tokenizer left: truncates or pads at the left",
    "--task classify --data words.csv": "--data words.csv: label is good, no number",
    f"{SOON} --init-from bare": "--tokenizer bare: no fast tokenizer in it",
    f"{SOON} --tokenizer frameless --init-from bert": "frameless: does not make [CLS] text [SEP]",
    "--prompt 'import [MASK]'": "--prompt, --embed and --mteb: need a finished model and --steps 0",
    "--steps 0 --init-from bert --embed utf16.txt": "utf16.txt: is UTF-16, expected UTF-8",
    "--steps 0 --init-from bert --prompt 'import x'": "--prompt 'import x': holds no [MASK]",
    "--steps 0 --init-from bert --mteb STS12": "--mteb: needs `pip install mteb`",
    f"{CLASSES} text.jsonl": "--data text.jsonl: no column label, only text",
    f"{CLASSES} one.csv": "--val-docs 5: all are of class 1; give --val-data",
    f"{CLASSES} many.csv": "--label-column: a label is 3000000000; expected numbers of classes",
}
BAD[resnet_stream] = {
    "--stem imagenet": "--image-size 16: too small, at least 32",
    "--data rows.jsonl": "--data rows.jsonl: no column image, only id, title, body",
    "--data flat": "--data flat: flat/a.png: expected flat/CLASS/a.jpg",
    "--data ab --val-data ac": "--val-data ac: its classes are 2 (a, c); those of --data are 2 (a",
    "--data ab --val-every 9999999": "no picture to validate on; give --val-data, or a lower",
    f"{PREDICT} no.jpg": "--predict: [Errno 2] No such file or directory: 'no.jpg'",
    f"{PREDICT} a.doc": "--predict: a.doc: in no format that Pillow knows",
    "--init-from gpt": "--init-from gpt: a gpt2 model, expected resnet",
}


@pytest.fixture(scope="session")
def bad_inputs(tmp_path_factory, bert_folder):
    """A folder with all that they name."""
    root = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_bad_data()
        write_bad_models(bert_folder)
    return root


def write_bad_data():
    write({"a.doc": "x", "broken.parquet": "x" * 99, "flat/a.png": png(photograph())})
    write({"mixed/a.jsonl": jsonl("a"), "mixed/b.parquet": parquet_of(["b"])})
    write({"unsplit/a.jsonl": jsonl("a"), "unsplit/dev.jsonl": jsonl("b")})
    write({"configured/README.md": card_of({"a": "a.jsonl"}), "configured/a.jsonl": jsonl("a")})
    write({"rows.jsonl": '{"id": 1, "title": "a", "body": "b"}\n' * 30})
    write({"text.jsonl": '{"text": "a b"}\n' * 30})
    write({"latin.tar": tar_of({"a.txt": b"caf\xe9"})})
    write({"mixed.json": json.dumps([{"text": "2020-01-01"}, {"text": 5}])})
    write({"open.csv": 'text\n"a\nb\n', "headless.csv": "1,2\na,b\n"})
    write({"semi.csv": "text;b\na;b\n", "tabs.csv": "text\tb\na\tb\n"})
    write({"utf16.csv": "text\na\n".encode("utf-16"), "utf16.txt": "text".encode("utf-16-le")})
    write({"utf16.jsonl": jsonl("ab").encode("utf-16")})
    write({"others/a.parquet": parquet_of(["a"])})
    pq.write_table(pa.table({"body": ["b"]}), "others/b.parquet")
    write({"numbers.csv": "text\n" + "7\n" * 30, "words.csv": "text,label\n" + "a,good\n" * 30})
    write({"one.csv": "text,label\n" + "".join(f"a {i},1\n" for i in range(9))})
    write({"many.csv": "text,label\n" + "".join(f"a {i},{i % 2 * 3 * 10**9}\n" for i in range(9))})
    write_classes("ab", 4, "ab")
    write_classes("ac", 4, "ac")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk("saved")


def write_bad_models(bert_folder):
    tokenizer = gpt_train.load_tokenizer("byte")
    tokenizer.save_pretrained("bytes")
    tokenizer.add_special_tokens(
        dict.fromkeys(("mask_token", "cls_token", "sep_token", "pad_token"), "[X]")
    )
    tokenizer.save_pretrained("frameless")
    bert_mlm.load_tokenizer("bpe:300").save_pretrained("left")
    settings = json.loads(Path("left/tokenizer_config.json").read_text())
    settings["truncation_side"] = "left"
    write({"left/tokenizer_config.json": json.dumps(settings)})
    gpt_train.save_pretrained(gpt.model(), "gpt")
    write({"broken/model.safetensors": "x" * 99})
    shutil.copy("gpt/config.json", "broken")
    Path("empty").mkdir()
    shutil.copytree(bert_folder, "bert")
    bert_mlm.save_pretrained(bert.model(head=None), "bare")
    resnet_stream.save_pretrained(resnet.model(classes="abc"), "resnet")


@pytest.mark.parametrize("script, case", [(script, case) for script in BAD for case in BAD[script]])
def test_bad_input_is_one_line_and_exit_code_2(script, case, bad_inputs, typed, monkeypatch):
    monkeypatch.chdir(bad_inputs)
    before = sorted(Path(".").rglob("*"))
    _, err = typed(script, "--steps", "1", *shlex.split(case), code=2)
    assert BAD[script][case] in err
    is_box = case in ("--preset gpt3", "--step 3")  # of tyro
    assert is_box or len(err.strip().splitlines()) == 1
    assert sorted(Path(".").rglob("*")) == before, "nothing is written before all is found good"


def test_text_in_utf_16_is_named_before_it_is_refused(typed):
    write({"utf16.txt": "text".encode("utf-16")})
    _, err = typed(gpt_train, "--data", "utf16.txt", code=2)
    assert "holds NUL, as UTF-16 does" in err
    assert err.endswith("there are 0; ask for fewer, or give --val-data\n")


LIBRARY = "xla/stream_executor: RESOURCE_EXHAUSTED: "
ENDINGS = [  # an error, the exit code, what is said
    (common.UsageError("--data a: is odd"), 2, "--data a: is odd\n"),
    (common.RunError("step 3: loss nan"), 1, "step 3: loss nan\n"),
    (RuntimeError(f"{LIBRARY}Out of memory while"), 1, "out of memory on the device; try a lower"),
    (RuntimeError(f"{LIBRARY}[errno 28] No space left on device"), 1, "No space left on device;"),
    (OSError(28, "No space left on device"), 1, "No space left on device;"),
    (KeyboardInterrupt(), 130, ""),
    (TypeError("a slip"), 1, "raise error\nTypeError: a slip\n"),
]


@pytest.mark.parametrize("error, code, said", ENDINGS)
def test_error_is_one_line_or_keeps_its_traceback(error, code, said, typed, monkeypatch):
    def main(cfg):
        raise error

    monkeypatch.setattr(gpt_train, "main", main)
    _, err = typed(gpt_train, code=code)
    assert said in err and ("Traceback" in err) == isinstance(error, TypeError)


# ---- the command line ----

PRESETS = [(script, preset) for script in SMALL for preset in script.PRESETS]


@pytest.mark.parametrize("script, preset", PRESETS, ids=lambda x: getattr(x, "__name__", x))
def test_every_preset_has_help(script, preset, typed):
    text, _ = typed(script, "--preset", preset, "--help")
    batch_size = script.Config(**script.PRESETS[preset]).batch_size
    assert f"(default: {batch_size})" in text
    said = " ".join(re.sub("[│\n]", " ", text).split())
    source = inspect.getsource(script.Config) + inspect.getsource(common.RunConfig)
    for comment in re.findall(r"\S  # (.*)$", source, re.M):
        assert comment in said


TRAINED = {  # presets with flags that others lack; the others are these but for sizes
    "gpt2-large": gpt_train,
    "bert-large": bert_mlm,
    "classify": bert_mlm,
    "imagenet": resnet_stream,
}


@pytest.mark.parametrize("preset", TRAINED)
def test_preset_trains(preset, typed):
    script = TRAINED[preset]
    small = dict(preset=preset, steps=2, batch_size=8, device_rows=4, ckpt_every=2)
    if script is resnet_stream:
        write_classes("pictures", 16)
        size = dict(depth=18, width=8, image_size=32, dtype="float32", eval_batches=1)
        small |= dict(data="pictures", val_every=4, **size)
    elif preset == "classify":
        write_reviews(["bad", "fine", "good"])
        small |= dict(data="reviews.parquet", val_docs=20)
    else:
        small |= dict(data=JSON, val_docs=2)
    if script is not resnet_stream:
        small |= dict(tokenizer="bpe:300", seq_len=32, n_layer=1, n_head=2, n_embd=32)
    typed(script, **small, out_dir="a")
    [line] = lines("a")
    assert line["step"] == 2 and "val_loss" in line


@pytest.fixture
def configured(monkeypatch, typed):
    """The Config that a script's main is given."""

    def run(script, *args):
        given = []
        monkeypatch.setattr(script, "main", given.append)
        typed(script, *args)
        return given[0]

    return run


def test_preset_forgets_what_is_not_for_other_data_or_another_model(configured):
    fineweb = ("--preset", "gpt2")
    cfg = configured(gpt_train, *fineweb)
    assert (cfg.data_name, cfg.tokenizer) == ("sample-10BT", "gpt2")
    for other in (("--data", "x"), ("--data=x",)):
        cfg = configured(gpt_train, *fineweb, *other)
        assert (cfg.data, cfg.data_name, cfg.tokenizer) == ("x", None, "gpt2")
    cfg = configured(gpt_train, *fineweb, "--init-from", "x")
    assert (cfg.data_name, cfg.tokenizer) == ("sample-10BT", None)
    cfg = configured(bert_mlm, "--preset=bert-base", "--init-from=x", "--tokenizer=y")
    assert (cfg.tokenizer, cfg.seq_len) == ("y", 128)
    cfg = configured(bert_mlm, "--prompt", "a", "b c", "--preset", "classify", "--init-from", "x")
    assert cfg.prompt == ("a", "b c") and cfg.task == "classify"


@scripts
def test_what_may_change_and_what_is_forgotten_are_flags_of_the_script(script):
    own = {*script.Config.__dataclass_fields__} - {*common.RunConfig.__dataclass_fields__}
    assert own >= script.MAY_CHANGE
    for flag, other in script.FORGET.items():
        assert flag in own and other in own
    assert not {"seed", "data", "seq_len", "batch_size", "dtype"} & script.MAY_CHANGE


# ---- formats ----

TRIO = ["one\ntwo", 'three, "four"', "fünf\t6"]
ROWS = json.dumps([{"id": i, "text": text} for i, text in enumerate(TRIO)])
QUOTED = 'id,text\n0,"one\ntwo"\n1,"three, ""four"""\n2,fünf\t6\n'
DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
HALVES = '{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n'
CARD = card_of({"a": "a.*"})

FORMATS = {  # files, of which the first, or its folder, is opened; its texts; how many are bad
    "parquet": ({"a.parquet": parquet_of(TRIO)}, TRIO, 0),
    "parquet of no rows": ({"d/0.parquet": parquet_of([]), "d/1.parquet": parquet_of("a")}, "a", 0),
    "row group of no rows": ({"a.parquet": parquet_of([], "ab")}, "ab", 0),
    "json": ({"a.json": ROWS}, TRIO, 0),
    "json with a mark": ({"a.json": '\ufeff[{"text": "a"}]'}, "a", 0),
    "json of one record": ({"a.json": '{\n"text": "a"\n}'}, "a", 0),
    "jsonl": ({"a.jsonl": jsonl(TRIO)}, TRIO, 0),
    "jsonl.gz": ({"a.jsonl.gz": gzip.compress(jsonl(TRIO).encode())}, TRIO, 0),
    "jsonl.zst": ({"a.jsonl.zst": zstandard.compress(jsonl(TRIO).encode())}, TRIO, 0),
    "jsonl with a mark": ({"a.jsonl": "\ufeff" + jsonl("ab")}, "ab", 0),
    "jsonl cut short": ({"a.jsonl": jsonl("a") + '{"text": "b'}, "a", 1),
    "jsonl of no bytes": ({"d/0.jsonl": "", "d/1.jsonl": jsonl("a"), "d/2.jsonl": ""}, "a", 0),
    "jsonl of a card": ({"d/README.md": CARD, "d/a.jsonl": jsonl(["a", 5]) + "{"}, "a", 2),
    "empty is not bad": ({"a.jsonl": jsonl(["", "a", None, "b", ""]) + "\n\n"}, "ab", 0),
    "no texts": ({"a.jsonl": jsonl([5, "a", ["b"], {"c": 1}, True]) + "[1]\n"}, "a", 5),
    "deep": ({"a.jsonl": DEEP + jsonl("a")}, "a", 1),
    "half a character": ({"a.jsonl": HALVES}, ["\U0001f600"], 1),
    "csv": ({"a.csv": QUOTED}, TRIO, 0),
    "csv in which null is a word": ({"a.csv": "text\nnull\nNA\n\n5\n"}, ["null", "NA", "5"], 0),
    "csv with a mark": ({"a.csv": "\ufefftext\na\nb\n"}, "ab", 0),
    "csv with empty lines on top": ({"a.csv": "\n\ntext\na\n"}, "a", 0),
    "csv in another order": ({"d/0.csv": "id,text\n0,a\n", "d/1.csv": "text,id\nb,1\n"}, "ab", 0),
    "tsv": ({"a.tsv": "text\none\nNA\n5\n"}, ["one", "NA", "5"], 0),
    "tsv with lone quotes": ({"a.tsv": 'text\tn\n"a\t1\nb"\t2\n"c\t3\n'}, ['"a', 'b"', '"c'], 0),
    "txt": ({"a.txt": TRIO[0]}, TRIO[:1], 0),
    "txt with a mark": ({"a.txt": "\ufeffhello"}, ["hello"], 0),
    "txt in Latin-1": ({"a.txt": b"caf\xe9"}, ["caf\ufffd"], 0),
    "txt in UTF-16": ({"d/a.txt": "a".encode("utf-16"), "d/b.txt": "b"}, "b", 1),
    "txt in a folder": ({f"d/{i}.txt": text for i, text in enumerate(TRIO)}, TRIO, 0),
    "tar": ({"a.tar": tar_of({f"{i}.txt": text.encode() for i, text in enumerate(TRIO)})}, TRIO, 0),
    "odd name": ({"a [1]*.txt": "odd", "a 1b.txt": "another"}, ["odd"], 0),
    "odd name of csv": ({"a [1]*.csv": "text\nodd\n", "a 1b.csv": "text\nanother\n"}, ["odd"], 0),
    "odd folder": ({"[a] *b/0.txt": "odd", "a b/0.txt": "another"}, ["odd"], 0),
}


@pytest.mark.parametrize("case", FORMATS)
def test_every_format_gives_its_texts_from_disk_and_from_the_web(case, tmp_path):
    files, texts, bad = FORMATS[case]
    texts = list(texts)
    write({f"files/{name}": content for name, content in files.items()})
    first = next(iter(files)).split("/")[0]
    assert documents(f"files/{first}") == (texts, bad)
    if re.fullmatch(r"a\.\w+(\.\w+)?", first):
        assert documents(f"{Hub(tmp_path).url}/files/{first}") == (texts, bad)
    data, parse = open_one(f"files/{first}")
    found = []
    for records, _, window in common.windows(data.splits["train"], 2, seed=0):
        if window["epoch"] == 2:
            break
        good, _ = gpt_train.good_records(records, parse, window, 0)
        found += [text for text in good if text]
    assert sorted(found) == sorted(texts * 2), "in training too"


def test_splits_columns_and_configurations_are_found(tmp_path):
    names = ("train", "dev", "test")
    write({f"data/{name}.tsv": f"text\tlabel\n{name} is good\t1\nbad\t0\n" for name in names})
    assert documents("data") == (["train is good", "bad"], 0)
    assert documents("data", split="validation")[0] == ["dev is good", "bad"]
    for split in ("train", "test"):  # a folder may name the split, and a data set's card is no data
        write({f"folders/{split}/0.parquet": parquet_of([split])})
        write({f"documents/{split}/a.txt": split})
    write({"folders/README.md": "---\nlicense: mit\n---\n"})
    write({"folders/.hidden/0.parquet": parquet_of(["x"])})
    Path("linked").symlink_to("folders")
    for name in ("folders", "folders/", "documents", "linked", tmp_path / "folders"):
        found = [documents(name, split=split)[0] for split in ("train", "test")]
        assert found == [["train"], ["test"]], name
    cfg = gpt_train.Config(data="folders", val_docs=1)
    assert gpt_train.open_corpus(cfg).held_out == ["test"], "validation is on it"
    for pattern in ("folders/train/*.parquet", "*/train/*.txt", "documents/**/*.txt"):
        assert documents(pattern)[0][-1] == "train", "a glob names the files to train on"

    write({"d/README.md": card_of({"a": "a/*", "b": "b/*"})})
    write({f"d/{name}/0.jsonl": jsonl([name] * 3) for name in "ab"})
    for name in "ab":
        assert documents("d", configuration=name)[0] == [name] * 3
    write({"a.csv": "body,title\nlong,short\n"})
    cfg = gpt_train.Config(text_column="title")
    data, parse = gpt_train.open_one("--data", "a.csv", None, None, cfg)
    assert [parse(record) for record in data.splits["train"]] == ["short"]


# ---- streams ----


def write_numbers(kind="parquet", n=600, group=10, folder="numbers", first=0):
    """An IterableDataset of the texts "first" ... "first + n - 1" in three files, or one a file."""
    texts = [str(first + i) for i in range(n)]
    for i in range(3):
        part = texts[i * n // 3 : (i + 1) * n // 3]
        if kind == "parquet":
            write({f"{folder}/{i}.parquet": parquet_of(part, row_group_size=group)})
        elif kind == "jsonl":
            write({f"{folder}/{i}.jsonl": jsonl(part)})
        elif kind == "jsonl.gz":
            write({f"{folder}/{i}.jsonl.gz": gzip.compress(jsonl(part).encode())})
        elif kind == "csv":
            write({f"{folder}/{i}.csv": "text,id\n" + "".join(f"{text},a\n" for text in part)})
        else:
            write({f"{folder}/{text}.txt": text for text in part})
    return common.open_data(folder).splits["train"]


def shuffled_windows(dataset, size, position=None, **options):
    """([number, ...], position) of each window, shuffled by its own generator."""
    for records, rng, at in common.windows(dataset, size, position=position, **options):
        yield [int(record["text"]) for record in rng.permutation(records)], at


def numbers_of(dataset, size, epochs, seed=0):
    """A list of numbers for each epoch."""
    found = [[] for _ in range(epochs)]
    for numbers, at in shuffled_windows(dataset, size, seed=seed):
        if at["epoch"] == epochs:
            return found
        found[at["epoch"]] += numbers


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_record_comes_once_an_epoch_over_all_processes(world, monkeypatch):
    dataset = write_numbers()
    epochs = [[], []]
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        for epoch, numbers in zip(epochs, numbers_of(dataset, 50, epochs=2)):
            assert len(numbers) == pytest.approx(600 / world, abs=20), "about the same share"
            epoch += numbers
    assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(600)]
    assert epochs[0] != epochs[1], "every epoch has an order of its own"


def test_window_of_twenty_row_groups_mixes_nearly_as_well_as_a_permutation_of_all():
    dataset = write_numbers(n=8000, group=20)
    rng = np.random.default_rng(0)

    def spread(numbers):
        """Of the batches' means: what a train step sees of an order that follows the files."""
        return np.std(np.mean(np.reshape(numbers, (-1, 32)), axis=1))

    ideal = np.mean([spread(rng.permutation(8000)) for _ in range(4)])
    shuffled = [numbers_of(dataset, 400, epochs=1, seed=seed)[0] for seed in range(4)]
    assert np.mean([spread(numbers) for numbers in shuffled]) < 1.8 * ideal
    assert shuffled[0] != shuffled[1]
    [unshuffled] = numbers_of(dataset, 1, epochs=1)
    assert spread(unshuffled) > 4 * ideal, "without a window it is the order of the row groups"
    neighbours = np.diff(np.array(shuffled[0]) // 20) == 0
    assert np.mean(neighbours) < 0.1, "of one row group: 1/20 within a window"


def assert_resumes_everywhere(dataset, size, n):
    """From the position of each of the first `n` windows on the stream is what it was."""
    whole = list(islice(shuffled_windows(dataset, size, seed=3), n))
    positions = json.loads(json.dumps([at for _, at in whole]))  # after the thread has run ahead
    for i, position in enumerate(positions):
        again = islice(shuffled_windows(dataset, size, position, seed=3), n - i)
        for (numbers, at), (wanted, then) in zip(again, whole[i:], strict=True):
            assert numbers == wanted, i
            assert {**at, "state": None} == {**then, "state": None}
    return whole


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "csv", "txt"])
def test_stream_goes_on_after_every_window_over_epoch_ends(kind, world, monkeypatch):
    as_process(monkeypatch, world - 1, world)
    dataset = write_numbers(kind, n=60, group=4)
    whole = assert_resumes_everywhere(dataset, 7, n=24 // world)
    assert whole[-1][1]["epoch"] >= 2


@pytest.mark.parametrize("world", [1, 2])
def test_mixture_has_its_shares_and_goes_on_after_every_window(world, monkeypatch):
    as_process(monkeypatch, world - 1, world)
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s an epoch
    parts = [write_numbers(n=240), write_numbers(n=120, folder="more", first=1000)]
    mixture = datasets.interleave_datasets(
        [part.reshard() for part in parts],
        probabilities=[0.8, 0.2],
        seed=0,
        stopping_strategy="all_exhausted",
    )
    whole = assert_resumes_everywhere(mixture, 40, n=38 // world)
    epochs = [[], [], []]
    for numbers, at in whole:
        epochs[min(at["epoch"], 2)] += numbers
    assert epochs[2] and epochs[0] != epochs[1]
    for epoch in epochs[:2]:
        assert np.mean(np.array(epoch) < 1000) == pytest.approx(0.8, abs=0.03)
        n = len({*epoch})
        assert n == 360 if world == 1 else n >= 150, "no record is dropped"


def test_web_that_fails_changes_no_record(tmp_path, monkeypatch):
    texts = [f"{i}" + " " * 2000 for i in range(150)]
    write({"files/a.parquet": parquet_of(texts, row_group_size=10)})
    write({"files/a.jsonl": jsonl(texts)})
    write({"files/a.jsonl.zst": zstandard.compress(jsonl(texts).encode())})
    web = Hub(tmp_path)
    dice = random.Random(0)
    pauses = []
    here = threading.current_thread()  # others prefetch

    def pause(seconds):
        if threading.current_thread() is here:
            pauses.append(seconds)

    def fault(path):
        kinds = [500, 503, 504, 429, "reset", "truncated"]
        return dice.choice(kinds) if dice.random() < 0.2 else None

    monkeypatch.setattr(time, "sleep", pause)
    for name in ("a.parquet", "a.jsonl", "a.jsonl.zst"):
        web.fault = lambda path: None
        data = common.open_data(f"{web.url}/files/{name}")
        faults = data.faults | {"retries": 99}
        whole = list(islice(shuffled_windows(data.splits["train"], 50, seed=0), 6))
        web.fault = fault
        stormy = shuffled_windows(data.splits["train"], 50, seed=0, **faults)
        assert [numbers for numbers, _ in islice(stormy, 6)] == [numbers for numbers, _ in whole]
    assert web.faults > 5 and pauses, "most are mended beneath us"

    # it is given up in the end
    web.fault = lambda path: 500
    their_retry = "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL"
    monkeypatch.setattr(datasets.config, their_retry, 0)
    pauses.clear()
    with pytest.raises(common.RunError, match="the data failed 9 times in a row: "):
        next(shuffled_windows(data.splits["train"], 50, seed=0, **data.faults))
    assert [pause for pause in pauses if pause] == [1, 2, 4, 8, 16, 32, 60, 60], "they grow"


def test_broken_file_here_and_a_slip_in_a_generator_are_not_tried_again(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waits"))
    texts = [f"{i}" + " " * 2000 for i in range(150)]
    whole = parquet_of(texts, row_group_size=10)
    write({"hole.parquet": whole[:150_000] + bytes(30_000) + whole[180_000:]})
    write({"cut.jsonl.gz": gzip.compress(jsonl(texts).encode())[:-200]})
    broken = {
        "hole.parquet": "the data failed: ",
        "cut.jsonl.gz": "the data failed: .*in /.*/cut.json",
    }
    for name, message in broken.items():
        data = common.open_data(name)
        stream = shuffled_windows(data.splits["train"], 10, seed=0, **data.faults)
        assert next(stream)[0][0] < 150
        with pytest.raises(common.RunError, match=message):
            list(islice(stream, 15))

    def slip():
        yield {"text": "1"}
        yield {"text": undefined}  # noqa: F821

    dataset = datasets.IterableDataset.from_generator(slip)
    stream = common.windows(dataset, 1, seed=0, broken=common.BROKEN, retries=8)
    next(stream)
    with pytest.raises(NameError, match="undefined") as caught:
        next(stream)
    assert "slip" in [entry.name for entry in caught.traceback]
    assert caught.value.__notes__ == ["the data failed after record 1 of epoch 0"]


BATCHES = {  # script, flags, number of processes
    "gpt": (gpt_train, GPT, 1),
    "gpt, one of two processes": (gpt_train, GPT, 2),
    "bert": (bert_mlm, BERT, 1),
    "classify": (bert_mlm, BERT | dict(task="classify"), 1),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_go_on_after_every_one_with_exact_counts_and_never_hold_what_is_held_out(
    case, tokenizer, monkeypatch, capfd
):
    script, flags, world = BATCHES[case]
    as_process(monkeypatch, world - 1, world)
    texts = [f"<{i:03}>" + "x" * 11 for i in range(180)]
    texts[100:100] = texts[:2]  # copies of those that are held out
    records = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)]
    bad = ["[5]", '{"text": 5}', '{"text": "cut sho', '{"words": "x"}', '{"text": ""}']
    for i, record in enumerate(bad):
        records.insert(40 * i + 7, record)
    write({f"d/{i}.jsonl": "\n".join(records[100 * i : 100 * i + 100]) + "\n" for i in (0, 1)})
    small = dict(data="d", val_docs=2, seq_len=15, batch_size=4 * world, shuffle_buffer=16)
    cfg = script.Config(**flags | small)
    opened = script.open_corpus(cfg)
    if script is gpt_train:
        tokenizer = gpt_train.load_tokenizer("byte")
    capfd.readouterr()

    def open_batches(position=None):
        for batch, place in script.batches(opened, tokenizer, cfg, position):
            if place["window"]["epoch"] == 3:
                return
            yield jax.tree.map(lambda x: x.tolist(), batch), place

    whole = list(open_batches())
    for i, position in enumerate(json.loads(json.dumps([place for _, place in whole])), 1):
        again = [(batch, place["bad"]) for batch, place in open_batches(position)]
        assert again == [(batch, place["bad"]) for batch, place in whole[i:]], i
    text = ""
    for batch, _ in whole:
        for row in batch if script is gpt_train else batch["tokens"]:
            text += tokenizer.decode(row)
    seen = {int(number) for number in re.findall(r"<(\d\d\d)>", text)}
    assert len(seen) > 50 and not seen & {0, 1}
    counts = [place["bad"] for _, place in whole]
    assert counts == sorted(counts) and len({*counts}) > 4 // world, "they do not run ahead"
    if world == 1:
        assert counts[-1] == 3 * 4
        said = capfd.readouterr().err
        whys = ["not a JSON object", "text is 5", "Unterminated string", "no text in it"]
        for i, why in zip((7, 47, 87, 27), whys):  # either file comes first
            assert re.search(rf"data: skipped record (1?){i} of epoch [012]: {why}", said), i


def test_many_bad_records_end_the_stream_and_few_do_not(capfd):
    def count_good(name):
        data, parse = open_one(name)
        good = 0
        bad = 0
        for records, _, window in common.windows(data.splits["train"], 1000, seed=0):
            if window["epoch"] == 2:
                return good, bad
            found, bad = gpt_train.good_records(records, parse, window, bad)
            good += len(found)

    for name, share in {"few.jsonl": 120, "many.jsonl": 90}.items():
        write({name: jsonl([5 if i % share == 0 else "7" for i in range(20_000)])})
    assert count_good("few.jsonl") == (2 * 19_833, 2 * 167)
    with pytest.raises(common.RunError, match=r"of .* records are bad; the last one is record"):
        count_good("many.jsonl")
    assert capfd.readouterr().err.count("skipped") == 200, "the first hundred are logged"


def test_epoch_without_a_row_ends_the_run(typed):
    write({"a.jsonl": jsonl(["a", "b", "c"])})
    _, err = typed(gpt_train, **GPT | dict(data="a.jsonl", seq_len=64), code=1)
    assert err.endswith(": the data: an epoch gave no row (too short, or all held out)\n")


MEMORY = """
import resource, sys, common
def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
dataset = common.open_data("a.parquet").splits["train"]
before = peak()
characters = 0
for records, _, position in common.windows(dataset, 1000, seed=0):
    characters += sum(len(record["text"]) for record in records)
    if position["record"] == 149_000:
        break
print(characters, peak() - before)
"""


def test_memory_does_not_grow_with_the_file():
    rows = np.random.default_rng(0).integers(32, 127, (1000, 2000), dtype=np.uint8)
    texts = [row.tobytes().decode() for row in rows]
    write({"a.parquet": parquet_of(*[texts] * 150)})  # row groups of 2 MB
    assert Path("a.parquet").stat().st_size > 300e6
    [(out, _)] = finish(launch(MEMORY))
    characters, grown = map(int, out.split())
    assert characters == 150 * 1000 * 2000 and grown < 150e6


# ---- runs ----


def gpt_in_pytorch(folder, last):
    """The figures of a run on the document held out are those of PyTorch's model in its folder."""
    text = documents(JSON)[0][0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    nats = 0.0
    for i in range(0, len(ids) + 1, 32):  # rows of 32 in which every token is a target once
        inputs = torch.tensor([end, *ids][i : i + 32])
        targets = torch.tensor([*ids, end][i : i + 32])
        logs = theirs(inputs[None]).logits[0].log_softmax(-1)
        nats -= logs[range(len(targets)), targets].sum().item()
    assert last["val_loss"] == pytest.approx(nats / (len(ids) + 1), rel=1e-4)
    assert last["val_bpb"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)
    assert tokenizer.model_max_length == 32 == len(tokenizer(text, truncation=True)["input_ids"])
    assert theirs.generation_config.max_length == 32, "a pipeline ends in time"


def bert_in_pytorch(folder, last):
    text = documents(JSON)[0][0]
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokenizer = bert_mlm.load_tokenizer(str(folder))
    hide = partial(bert_mlm.mask_tokens, tokenizer=tokenizer, share=0.15)
    rows = bert_mlm.validation_rows(tokenizer, [text], 32, 1, hide)
    rows = {name: x[:, 0] for name, x in rows.items()}
    assert last["val_loss"] == pytest.approx(bert.torch_loss(theirs, rows).item(), rel=1e-4)
    shown = rows["tokens"].copy()
    np.put_along_axis(shown, rows["positions"], rows["targets"], axis=1)
    found = np.concatenate([row[1 : n - 1] for row, n in zip(shown, rows["lengths"])])
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found.tolist() == wanted, "every token once"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("import [MASK] as np")["input_ids"]
    assert tokenizer.decode(ids) == "[CLS]import[MASK] as np[SEP]"
    assert tokenizer.model_max_length == 32


def resnet_in_pytorch(folder, last):
    theirs = in_torch(resnet, folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    splits, _ = open_pictures("digits")
    files = [data for data, _ in splits["validation"]]
    assert len(files) == 359 and not {*files} & {data for data, _ in splits["train"]}
    labels = torch.tensor([label for _, label in splits["validation"]])
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    with torch.no_grad():
        logits = theirs(processor(images, return_tensors="pt")["pixel_values"]).logits
    hits = logits.topk(5).indices == labels[:, None]
    wanted = {
        "val_loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "val_top1": hits[:, 0].float().mean().item(),
        "val_top5": hits.any(1).float().mean().item(),
    }
    assert {name: last[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)


IN_PYTORCH = {
    gpt_train: gpt_in_pytorch,
    bert_mlm: bert_in_pytorch,
    resnet_stream: resnet_in_pytorch,
}
FILES = {"ckpt", "common.py", "config.json", "curves.png", "metrics.jsonl", "model.safetensors"}
FILES |= {"run.json"}


@pytest.fixture
def wandb(monkeypatch):
    """What is logged to a stub of Weights & Biases."""
    logged = []

    def init(**options):
        logged.append(options)
        return stub

    stub = SimpleNamespace(
        __spec__="stub",
        login=lambda: None,
        init=init,
        log=lambda line, step: logged.append(line),
        finish=lambda: logged.append("end"),
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return logged


@scripts
def test_run_leaves_metrics_curves_checkpoints_its_source_and_a_model(script, wandb, capsys):
    is_text = script is not resnet_stream
    options = dict(tokenizer="bpe:300") if is_text else dict(ema=0.5, mixup=0.2, dropout=0.1)
    if script is gpt_train:
        options["sample_every"] = 16
    options |= dict(steps=16, eval_every=8, ckpt_every=3)
    last = train(script, **options, wandb="mine")
    [folder] = Path("out").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert names >= FILES | {"tokenizer.json" if is_text else "predictions.png"}
    source = f"{script.__name__}.py"
    assert (folder / source).read_bytes() == (HERE / source).read_bytes()
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [*range(1, 17)] and found[-1] == last
    assert [line["step"] for line in found if "val_loss" in line] == [8, 16]
    assert last["val_loss"] < found[7]["val_loss"]
    assert 0 <= last["data_wait"] < 1 and last["mfu"] is None
    unit = "tokens" if is_text else "images"
    assert last[unit] == 16 * (128 * 32 if is_text else 32)
    assert saved_steps(folder) == [15, 16]
    info = json.loads((folder / "run.json").read_text())
    assert info["config"]["steps"] == 16 and info["versions"]["jax"] == jax.__version__
    start, *rest, end = wandb
    assert rest == found and end == "end" and start["project"] == "mine"
    assert re.fullmatch(folder.name + "-[0-9a-f]{8}", start["id"]), "directories' names recur"
    said = capsys.readouterr().out
    assert f"run        {folder}" in said and "step 16: loss" in said
    if is_text:  # transformers 4 knows the class by this name alone
        assert '"PreTrainedTokenizerFast"' in (folder / "tokenizer_config.json").read_text()

    again = dict(init_from=str(folder), batch_size=48, device_rows=48)
    if is_text:
        again["tokenizer"] = None
    evaluated = train(script, **again, steps=0)
    assert evaluated == pytest.approx({name: last[name] for name in evaluated}, rel=1e-5)
    assert [*Path("out").iterdir()] == [folder], "evaluating makes no run"
    tuned = train(script, **again, steps=2, lr=1e-4, out_dir="tuned")
    assert tuned["val_loss"] < found[7]["val_loss"], "it starts where the other ended"
    folder = folder.rename("moved")
    resumed = train(script, **again, steps=2, lr=1e-4, out_dir="tuned", resume=True)
    assert resumed == tuned, "it needs that one no more"
    if torch:
        IN_PYTORCH[script](folder, last)


def test_wandb_without_a_key_is_said_before_there_is_a_directory(wandb, typed, monkeypatch):
    def login():
        raise RuntimeError("No API key configured.")

    monkeypatch.setattr(sys.modules["wandb"], "login", login)
    _, err = typed(gpt_train, **GPT, wandb="mine", code=2)
    assert err == "gpt_train.py: --wandb mine: No API key configured.\n"
    assert not Path("out").exists()


def test_gpt_killed_stopped_before_its_cooldown_and_extended_equals_the_long_run():
    env = dict(JAX_DISABLE_MOST_OPTIMIZATIONS="0")  # as its user has it
    args = GPT | dict(cooldown=0.2, ckpt_every=10, eval_every=30, warmup_steps=10)  # 15 epochs
    finish(launch(gpt_train, *flags(**args | dict(steps=120, out_dir="long")), **env))
    kill_after(25, gpt_train, "out/gpt-001", *flags(**args | dict(steps=100)), **env)
    kill_after(55, gpt_train, "out/gpt-001", "--resume", **env)
    process = launch(gpt_train, "--resume", **env)  # the newest run is found; 40 is whole
    next(filter(re.compile(r"step \d+:").match, process.stdout))  # it trains
    process.send_signal(signal.SIGTERM)
    [(out, _)] = finish(process, code=143)
    [step] = re.findall(r"saved at step (\d+); go on with --resume --out-dir out/gpt-001\n", out)
    assert 40 < int(step) < 80, "before the cooldown"
    checkpoints = ocp.CheckpointManager(Path("out/gpt-001/ckpt").absolute())
    saved = ocp.args.Composite(state=ocp.args.StandardRestore())
    model, _ = checkpoints.restore(int(step), args=saved).state.values()
    exported = gpt_train.from_pretrained("out/gpt-001").wpe.embedding
    assert np.array_equal(exported, model["wpe"]["embedding"]["value"]), "it can be put to use"
    finish(launch(gpt_train, "--resume", "--steps", "120", **env))
    found = lines("out/gpt-001")
    assert found == lines("long") and len(found) == 120
    assert found[95]["lr"] > found[97]["lr"]
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("out/gpt-001", "long")]
    assert weights[0] == weights[1]


def test_run_that_diverges_ends_with_code_1_and_keeps_its_last_good_checkpoint(typed):
    bad = GPT | dict(lr=1e18, warmup_steps=0, grad_clip=0.0, ckpt_every=1, keep=20)
    _, err = typed(gpt_train, **bad, out_dir="loss", code=1)
    assert re.search(r"step \d+: .*loss (nan|inf).*; the checkpoints before are good; try", err)
    for step in saved_steps("loss"):
        assert math.isfinite(lines("loss")[step - 1]["loss"])
    # a step from a finite loss to weights that overflow, or whose loss does
    _, err = typed(gpt_train, **bad | dict(lr=3e38, weight_decay=10), out_dir="weights", code=1)
    assert "step 1: weights not finite; the last good checkpoint is None" in err
    _, err = typed(gpt_train, **bad | dict(lr=1e38, steps=1), out_dir="validation", code=1)
    assert re.search(r"step 1: .*val_loss nan", err)
    for out_dir in ("loss", "weights", "validation"):
        assert not Path(out_dir, "model.safetensors").exists()
        assert "NaN" not in Path(out_dir, "metrics.jsonl").read_text()
    assert saved_steps("weights") == saved_steps("validation") == []


def test_memory_that_is_not_enough_is_one_line():
    limited = "import resource, runpy; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)); "
    limited += f"runpy.run_path({gpt_train.__file__!r}, run_name='__main__')"
    big = dict(tokenizer="byte", seq_len=1024, batch_size=512, device_rows=512, steps=3, n_layer=1)
    [(_, err)] = finish(launch(limited, *flags(**big)), code=1)
    assert "Traceback" not in err
    assert "out of memory on the device; try a lower --device-rows" in err, err


def test_run_directory_is_never_taken_over_and_a_resume_changes_no_meaning(typed):
    files = {"d/0.txt": "one two three " * 3000, "val.txt": "one two three " * 10}
    write(files)
    args = GPT | dict(data="d", val_data="val.txt", steps=3, out_dir="a")
    typed(gpt_train, **args)
    before = (lines("a"), Path("a/run.json").read_bytes())

    def refused(message, *args, script=gpt_train, **changes):
        _, err = typed(script, *args, code=2, **changes)
        assert message in err, err
        assert (lines("a"), Path("a/run.json").read_bytes()) == before

    resume = ("--resume", "--out-dir", "a")
    refused("holds a run; --resume to go on with it, or choose another directory", **args)
    refused("a is of another script", *resume, script=bert_mlm)
    refused("--steps 2: a is at step 3", *resume, "--steps", "2")
    for changed in ("--seq-len 16", "--seed 7", "--shuffle-buffer 7", "--data d/0.txt"):
        refused(f"{changed}: the run in a was started with", *resume, *changed.split())
    write({"d/1.txt": "more"})
    refused("--resume: other files (", *resume, "--steps", "5")
    Path("d/1.txt").unlink()
    write({"val.txt": "one two three four " * 10})
    refused("--resume: other validation texts (", *resume, "--steps", "5")
    write(files)
    with pytest.raises(common.UsageError, match="name one by --out-dir"):
        train(resume=True)
    typed(gpt_train, *resume, steps=5, grad_clip=0, ckpt_every=1, eval_every=5)
    assert [line["step"] for line in lines("a")] == [1, 2, 3, 4, 5]
    assert lines("a")[:2] == before[0][:2]
    shutil.rmtree("a/ckpt")
    _, err = typed(gpt_train, *resume, code=2)
    assert "a was trained, and its checkpoints are gone" in err


def test_resume_needs_the_run_directory_alone_and_only_its_good_parts(typed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    typed(gpt_train, **GPT | dict(steps=2), out_dir="first")
    args = GPT | dict(init_from="first", out_dir="~/run", steps=9, keep=5)
    typed(gpt_train, **args)
    run = tmp_path / "run"
    whole = lines(run)
    weights = (run / "model.safetensors").read_bytes()
    assert [line["step"] for line in whole] == [*range(1, 10)] and saved_steps(run) == [3, 6, 9]
    shutil.rmtree("first")
    resume = partial(typed, gpt_train, "--resume", out_dir="~/run", init_from="elsewhere")
    for file in (run / "ckpt/9/state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    _, err = resume(code=2)
    assert len(err.splitlines()) == 1
    assert f"{run}/ckpt/9: of another model, or damaged (then delete it to go on from the" in err
    shutil.rmtree(run / "ckpt/9")
    metrics = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    metrics[2] = bytes(100) + metrics[2]  # what a power cut may leave
    (run / "metrics.jsonl").write_bytes(b"".join(metrics))
    resume()
    assert lines(run) == whole[:2] + whole[3:]
    assert (run / "model.safetensors").read_bytes() == weights
    (run / "run.json").write_text("{")
    _, err = resume(code=2)
    assert len(err.splitlines()) == 1 and "run.json: " in err


def test_printing_costs_no_step_and_a_second_process_is_refused_meanwhile(typed):
    """As `| tee log` and `| head` leave it, where the terminal knows ASCII alone."""
    args = GPT | dict(steps=100_000, eval_every=100_000, ckpt_every=100_000, out_dir="a")
    args |= dict(sample_every=20, max_new_tokens=20, temperature=3)
    process = launch(gpt_train, *flags(**args), PYTHONIOENCODING="ascii", LC_ALL="C")
    assert any("?" in line for line in process.stdout), "for what is not ASCII"
    process.stdout.close()
    process.stderr.close()
    last = lines("a")[-1]["step"]
    wait_for_step(process, "a", last + 100)
    _, err = typed(gpt_train, "--resume", out_dir="a", code=2)
    assert err == "gpt_train.py: --out-dir a: another process is training in it\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert saved_steps("a") == [lines("a")[-1]["step"]] and saved_steps("a")[0] > last + 100
    assert Path("a/model.safetensors").exists()


def test_run_killed_before_its_first_checkpoint_begins_again():
    train(out_dir="a", ckpt_every=100)
    whole = lines("a")
    shutil.rmtree("a/ckpt/12")
    train(resume=True, out_dir="a", ckpt_every=1)
    assert lines("a") == whole and saved_steps("a") == [11, 12]


def test_padding_that_a_tokenizer_was_saved_with_is_put_before_no_text():
    tokenizer = gpt_train.load_tokenizer("byte")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.padding_side = "left"
    tokenizer("one", padding="max_length", max_length=9)
    tokenizer.save_pretrained("padded")
    assert gpt_train.start_tokens(gpt_train.load_tokenizer("padded")) == []


def test_run_needs_no_output_and_no_cache_that_can_be_written():
    closed = "import runpy, sys; sys.stdout = sys.stderr = None; "
    closed += f"runpy.run_path({gpt_train.__file__!r}, run_name='__main__')"
    args = flags(**GPT | dict(steps=2, sample_every=1, max_new_tokens=5, out_dir="a"))
    finish(launch(closed, *args, XDG_CACHE_HOME="/proc/none"))
    assert saved_steps("a") == [2] and Path("a/model.safetensors").exists()


def test_stream_of_a_notebook_will_do(typed, monkeypatch):
    stream = io.StringIO()  # has no `reconfigure`
    monkeypatch.setattr(sys, "stdout", stream)
    typed(gpt_train, "--help")
    assert "usage: gpt_train.py" in stream.getvalue()


def slipping():
    for i in range(40):
        yield {"text": f"{i} is a good text " * 20}
    yield {"text": "here is a slip: " + 41}


def test_slip_in_a_generator_shows_its_line_and_what_was_trained_is_saved(typed, monkeypatch):
    opened = gpt_train.open_corpus

    def open_corpus(cfg):
        dataset = datasets.IterableDataset.from_generator(slipping)
        return opened(cfg)._replace(train=dataset)

    monkeypatch.setattr(gpt_train, "open_corpus", open_corpus)
    args = GPT | dict(shuffle_buffer=10, batch_size=8, device_rows=8, steps=1000, eval_every=1000)
    _, err = typed(gpt_train, **args | dict(ckpt_every=1000), out_dir="a", code=1)
    assert 'yield {"text": "here is a slip: " + 41}' in err
    assert 'test_all.py", line ' in err and "in slipping" in err
    assert "\nTypeError: can only concatenate str" in err
    assert "the data failed after record 40 of epoch 0" in err
    assert saved_steps("a") == [lines("a")[-1]["step"]] and saved_steps("a")[0] > 20


@against_torch
def test_bert_classifier_learns_and_matches_its_classes_by_name(typed):
    args = dict(task="classify", data="reviews.parquet", val_docs=60, batch_size=16, steps=90)
    args |= dict(eval_every=30, ckpt_every=20, lr=1e-2, warmup_steps=20, n_layer=2)
    args |= dict(dropout=0.0, device_rows=16)
    write_reviews(["bad", "fine", "good"])
    typed(bert_mlm, **BERT | args, out_dir="whole")
    last = lines("whole")[-1]
    assert last["val_acc"] > 0.95
    texts = ["good it was", "fine", "bad so it was so"]
    pipeline = transformers.pipeline("text-classification", "whole", top_k=None)
    use = dict(task="classify", steps=0, init_from="whole", prompt=tuple(texts))
    out, _ = typed(bert_mlm, **use)
    said = []
    for text, best, right in zip(texts, pipeline(texts), ["good", "fine", "bad"]):
        assert best[0]["label"] == right
        said += [text, *(f"{x['score']:8.2%}  {x['label']}" for x in best)]
    assert out.splitlines() == said

    evaluated = args | dict(steps=0, init_from="whole", tokenizer=None)
    tuned = evaluated | dict(steps=2, lr=1e-6)
    others = ["very bad", "very fine", "very good"]
    for i, names in enumerate((["good", "bad", "fine"], None, others)):
        write_reviews(names)
        if names is others:
            message = r"are 3 \(bad, fine, good\); those of the data are 3 \(very bad"
            with pytest.raises(common.UsageError, match=message):
                train(bert_mlm, **evaluated)
        else:
            assert train(bert_mlm, **evaluated)["val_acc"] == last["val_acc"]
        accuracy = train(bert_mlm, **tuned, out_dir=f"tuned{i}")["val_acc"]
        assert (accuracy > 0.95) == (names is not others), "other names are a new head"
        config = json.loads(Path(f"tuned{i}/config.json").read_text())
        assert [*config["id2label"].values()] == (names or ["bad", "fine", "good"])


# ---- the hub, kill -9, many devices, many processes ----

FINEWEB = GPT | dict(
    data="HuggingFaceFW/fineweb-edu", data_name="sample-10BT", tokenizer="gpt2", val_docs=3,
    shuffle_buffer=8, batch_size=64, steps=8,
)  # fmt: skip


def test_hub_weights_by_their_id_and_what_is_not_there_or_offline_is_one_line(hub):
    args = flags(init_from="gpt2", steps=0, prompt=("import",), temperature=0, max_new_tokens=8)
    offline = hub.env | dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME="empty")
    missing = launch(gpt_train, "--data", "some/where", **hub.env)
    unreached = launch(gpt_train, *shlex.split(SOON), "--init-from", "some/where", **offline)
    [(out, _)] = finish(launch(gpt_train, *args, **hub.env))
    assert out.startswith("import")
    for _, err in finish(missing, unreached, code=2):
        assert " some/where: " in err and len(err.splitlines()) == 1, err


def test_corrupt_line_and_a_number_among_texts_are_bad_records_on_the_hub_too(hub):
    folder = hub.root / "HuggingFaceFW/fineweb-edu"
    shutil.rmtree(folder)
    write({folder / "a.jsonl": jsonl(["a", 5, "b", "c"]) + '{"text": '})
    program = "import test_all; print(test_all.documents('HuggingFaceFW/fineweb-edu'))"
    [(out, err)] = finish(launch(program, **hub.env))
    assert out == "(['a', 'b', 'c'], 2)\n" and "record 1 of epoch 0: text is 5" in err


def test_glob_on_the_hub_is_read_at_one_commit(hub):
    then = "e" * 40
    asked = []
    hub.fault = asked.append
    program = """import common
for commit in None, {!r}:
    name = "hf://datasets/HuggingFaceFW/fineweb-edu/sample/*/*.parquet"
    data = common.open_data(name, None, commit)
    print(data.facts["commit"], len([*data.splits["train"]]))"""
    [(out, _)] = finish(launch(program.format(then), **hub.env))
    files = (hub.root / "HuggingFaceFW").glob("*/sample/*/*")
    n = sum(pq.read_metadata(file).num_rows for file in files)
    assert out == f"{Hub.sha} {n}\n{then} {n}\n"
    assert {commit for path in asked for commit in re.findall(r"\w{40}", path)} == {Hub.sha, then}


def test_hub_that_fails_changes_no_loss_killed_or_not(hub, monkeypatch):
    finish(launch(gpt_train, *flags(**FINEWEB, out_dir="whole"), **hub.env))
    assert len(lines("whole")) == 8
    kinds = [500, 503, 504, 429, "reset", "truncated", "stall"]
    hub.break_requests(6, lambda n: kinds[n // 2] if n % 2 == 0 and n < 14 else None)  # each once
    finish(launch(gpt_train, *flags(**FINEWEB, out_dir="once"), **hub.env))
    assert hub.faults == 7 and lines("once") == lines("whole")
    dice = random.Random(0)
    hub.break_requests(6, lambda n: dice.choice(kinds[:-1]) if dice.random() < 0.3 else None)
    kill_after(4, gpt_train, "killed", *flags(**FINEWEB), **hub.env)
    monkeypatch.setattr(Hub, "sha", "f" * 40)  # meanwhile a new commit: the run keeps the old one
    finish(launch(gpt_train, "--resume", "--out-dir", "killed", **hub.env))
    assert hub.faults >= 7 + 5 and lines("killed") == lines("whole")


def test_source_that_stays_away_is_given_up_with_a_checkpoint_and_ctrl_c_ends_the_wait(
    hub, typed, monkeypatch
):
    shutil.copytree(hub.root / "HuggingFaceFW/fineweb-edu/sample/10BT", hub.root / "files")
    args = GPT | dict(data=f"{hub.url}/files/000.parquet", batch_size=64, shuffle_buffer=4)
    args |= dict(steps=4000, eval_every=4000, ckpt_every=4000)
    patient = common.open_data

    def impatient(*args):
        data = patient(*args)
        return data._replace(faults=data.faults | dict(retries=1))

    hub.break_requests(20, lambda n: "reset")
    with monkeypatch.context() as patch:
        patch.setattr(common, "open_data", impatient)
        _, err = typed(gpt_train, **args, out_dir="a", code=1)
    assert "the data failed 2 times in a row: " in err.splitlines()[-1]
    hub.break_requests(20, lambda n: "reset")
    process = launch(gpt_train, *flags(**args, out_dir="b"))
    wait_for_step(process, "b", lines("a")[-1]["step"] - 5)
    time.sleep(3)  # the rows at hand are used up
    process.send_signal(signal.SIGINT)
    [(out, err)] = finish(process, code=130, timeout=60)
    assert "Traceback" not in err and "Exception ignored" not in err, err
    for out_dir in ("a", "b"):
        [saved] = saved_steps(out_dir)
        assert saved == lines(out_dir)[-1]["step"] > 1, "all that was trained is kept"
    assert f"saved at step {saved}" in out


REVIEWS = dict(task="classify", data="reviews.parquet", val_docs=60, batch_size=64, device_rows=32)
PICTURES = dict(data="pictures", val_every=4, ema=0.9, mixup=0.2, dropout=0.1, flip=True)
KILLED = {  # and gpt above
    "bert": (bert_mlm, BERT),
    "classify": (bert_mlm, BERT | REVIEWS),
    "resnet": (resnet_stream, RESNET | PICTURES),
}


@pytest.mark.parametrize("case", KILLED)
def test_kill_9_at_any_moment_and_over_epoch_ends_changes_no_bit(case, typed):
    script, args = KILLED[case]
    write_classes("pictures", 60)
    write({"pictures/light/broken.png": b"no picture"})
    write_reviews(["bad", "fine", "good"])
    typed(script, **args, out_dir="whole")
    kill_after(args["steps"] // 3, script, "killed", *flags(**args))
    if case == "bert":
        _, err = typed(script, init_from="killed", steps=0, data=JSON, val_docs=1, code=2)
        assert "--init-from killed: no model.safetensors in it; a run has one when it has" in err
    typed(script, "--resume", out_dir="killed")
    assert lines("killed") == lines("whole") and len(lines("whole")) == args["steps"]
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("killed", "whole")]
    assert weights[0] == weights[1]
    if case == "resnet":
        assert lines("whole")[-1]["bad_records"] >= 2, "two epochs"


def launch_two(*args, **changes):
    """gpt_train.py in two processes with a device each, which train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        changes["coordinator"] = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = []
    for i in range(2):
        typed = flags(**changes, num_processes=2, process_id=i)
        processes.append(launch(gpt_train, *args, *typed, XLA_FLAGS=""))
    return processes


def assert_same_losses(a, b, rtol):
    for x, y in zip(lines(a), lines(b), strict=True):
        assert x == pytest.approx(y, rel=rtol)


EIGHT = """
import jax, common, {script} as script
shard = common.shard_state
def measured(*args):
    state = shard(*args)
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    part = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    print("share", part / whole)
    return state
common.shard_state = measured
for name in {names}:
    script.main(script.Config(**{cfg} | dict(fsdp=name == "cut", out_dir=name)))
"""


@scripts
def test_eight_devices_give_the_losses_of_one_with_and_without_fsdp(script):
    cfg = SMALL[script] | dict(steps=3, eval_every=3, ckpt_every=3, dropout=0.0)
    rows = cfg["batch_size"]
    names = ["cut", "copied"] if script is gpt_train else ["cut"]
    # a device has two microbatches, but one for batch norm's sake
    cfg["device_rows"] = rows // 8 if script is resnet_stream else rows // 16
    program = EIGHT.format(script=script.__name__, cfg=cfg, names=names)
    eight = "--xla_force_host_platform_device_count=8"
    process = launch(program, XLA_FLAGS=eight, JAX_LOG_COMPILES="1")
    script.main(script.Config(**cfg | dict(device_rows=rows, out_dir="one")))
    [(out, err)] = finish(process)
    assert "8 x cpu" in out
    assert err.count("Compiling jit(train_step)") == len(names)
    for folder, share in zip(names, map(float, re.findall(r"share ([\d.]+)", out))):
        assert share == 1 if folder == "copied" else 1 / 8 <= share < 0.2
        # the gradient norm of a new ResNet hangs on differences of its statistics
        assert_same_losses("one", folder, rtol=1e-3 if script is resnet_stream else 1e-4)
    if script is gpt_train:  # a checkpoint moves between eight devices and one
        free = dict(resume=True, lr=1e-3, min_lr=1e-3, warmup_steps=0, steps=6)
        for folder in ("one", "cut"):
            script.main(script.Config(**cfg | free | dict(out_dir=folder)))
        assert_same_losses("one", "cut", rtol=1e-3)


TINY = "--n-layer 1 --n-embd 32 --seq-len 32 --val-docs 20"


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (gpt_train, f"{TINY} --tokenizer byte --sample-every 0"),
        (bert_mlm, TINY),
        (resnet_stream, "--batch-size 16 --device-rows 2"),
    ],
)
def test_fsdp_validates_on_many_batches(script, flags):
    devices = "--xla_force_host_platform_device_count=8"
    limit = "--xla_cpu_collective_call_terminate_timeout_seconds=20"
    flags = [*flags.split(), "--steps", "3", "--fsdp", "--out-dir", "run"]
    [(out, _)] = finish(launch(script, *flags, XLA_FLAGS=f"{devices} {limit}"))
    assert "8 x cpu" in out and lines("run")[-1]["step"] == 3


TOGETHER = GPT | dict(
    data="stdlib", shuffle_buffer=8, batch_size=64, dropout=0.0, fsdp=True, lr=1e-3, min_lr=1e-3,
    warmup_steps=0, eval_every=12,
)  # fmt: skip


def test_two_processes_train_together_and_a_kill_or_a_signal_to_one_changes_nothing(
    typed, monkeypatch
):
    (out, _), (other, _) = finish(*launch_two(**TOGETHER, out_dir="whole"))
    assert "2 x cpu" in out and "step" not in other, "only the first one prints"
    assert len(lines("whole")) == 12
    processes = launch_two(**TOGETHER | dict(steps=4000), out_dir="killed")
    wait_for_step(processes[0], "killed", 4)
    processes[1].kill()
    (_, err), _ = [process.communicate(timeout=60) for process in processes]
    assert processes[0].returncode
    assert "again with --resume" in err or "another task died" in err, err
    processes = launch_two("--resume", out_dir="killed")
    wait_for_step(processes[0], "killed", 12)
    processes[1].send_signal(signal.SIGTERM)
    (out, _), _ = finish(*processes, code=143, timeout=60)
    saved = saved_steps("killed")[-1]
    assert f"saved at step {saved}" in out
    assert lines("killed")[-1]["step"] == saved, "both at the same step"
    assert lines("killed")[:12] == lines("whole")
    _, err = typed(gpt_train, "--resume", out_dir="killed", steps=saved + 1, code=2)
    assert "--resume: other processes (1, in killed it was 2)" in err

    # one process that trains on the rows of both has the same losses
    cfg = gpt_train.Config(**TOGETHER)
    texts = gpt_train.open_corpus(cfg)
    tokenizer = gpt_train.load_tokenizer("byte")
    model = gpt_train.build(cfg, tokenizer)
    state, step, _ = make_step(gpt_train, model, **TOGETHER)
    shares = []
    for rank in (0, 1):
        as_process(monkeypatch, rank, 2)
        batches = gpt_train.batches(texts, tokenizer, cfg)
        shares.append([tokens for tokens, _ in islice(batches, 4)])
    for line, *parts in zip(lines("whole"), *shares):
        state, metrics = step(state, np.concatenate(parts), jax.random.key(0))
        assert float(metrics["loss"]) == pytest.approx(line["loss"], rel=1e-4)
