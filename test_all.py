"""What nanoflax promises, a test for each. They need no network; those against PyTorch skip without torch."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import itertools
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
import sysconfig
import tarfile
import threading
import time
import zlib
from functools import cache, partial
from itertools import islice
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
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from flax import nnx
from PIL import Image, PngImagePlugin
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    MegatronBertConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
)

HERE = Path(__file__).parent
JSON = sysconfig.get_path("stdlib") + "/json/*.py"  # five real documents, 48 kB
TINY = dict(data=(JSON,), val_docs=1, tokenizer="byte", seq_len=32, n_layer=1, n_head=2, n_embd=32, steps=12)
TINY |= dict(batch_size=128, accum=2, optimizer="adamw", dropout=0.1, eval_every=12, log_every=1)
TINY |= dict(ckpt_every=3, sample_every=0)  # an epoch has eight steps
BERT = dict(data=(JSON,), val_docs=1, tokenizer="bpe:300", seq_len=32, n_layer=1, n_head=2, n_embd=32)
BERT |= dict(steps=12, batch_size=128, optimizer="adamw", warmup_steps=2, log_every=1, eval_every=6)
BERT |= dict(ckpt_every=3, pre_norm=False)
RESNET = dict(width=8, steps=6, batch_size=32, warmup_steps=2, eval_every=6, log_every=1, ckpt_every=2)
RESNET |= dict(shuffle_buffer=500, lr=0.02, label_smoothing=0.0, ema=0.0, mixup=0.0, image_size=8, crop_pad=1)
EVERYTHING = dict(eval_every=3, ema=0.9, mixup=0.2, label_smoothing=0.1, dropout=0.1, flip=True)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Every process of the tests shares one compilation cache, and none touches the user's."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.getbasetemp() / "modules")
    jax.config.update("jax_compilation_cache_dir", os.environ["XDG_CACHE_HOME"] + "/nanoflax")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_disable_most_optimizations", True)  # it compiles faster
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def flags(**changes):
    """A Config's fields as they are typed on the command line."""
    typed = []
    for name, value in changes.items():
        values = value if isinstance(value, tuple) else () if isinstance(value, bool) else (value,)
        typed += ["--" + "no-" * (value is False) + name.replace("_", "-"), *map(str, values)]
    return typed


def python(*args, **env):
    """Python in a process of its own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        [sys.executable, *args], env=os.environ | env | {"PYTHONPATH": str(HERE)}, **pipes
    )


def launch(script, *args, **env):
    """The script as its user starts it."""
    return python(str(HERE / f"{script.__name__}.py"), *args, **env)


def finish(*processes, timeout=300):
    """[(exit code, stdout, stderr), ...] of processes that run side by side."""
    ends = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends)]


def run(script, *args, **env):
    return finish(launch(script, *args, **env))[0]


@pytest.fixture
def typed(monkeypatch, capsys):
    """(exit code, stdout, stderr) of a script's command line, in this process."""

    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *args])
        monkeypatch.setattr(os, "_exit", sys.exit)  # for the sake of a thread that still reads
        with pytest.raises(SystemExit) as stop:
            common.cli(script.Config, script.PRESETS, script.main, script.__doc__)
        return stop.value.code, *capsys.readouterr()

    return run


def train(**changes):
    return gpt_train.main(gpt_train.Config(**TINY | changes))


def lines(out_dir):
    """The lines of metrics.jsonl, without what a clock tells: the same, bit for bit, in two equal runs."""
    path = Path(out_dir) / "metrics.jsonl"
    found = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in found if line.endswith("\n")]
    clock = ("tokens_per_s", "images_per_s", "data_wait", "mfu")
    return [{name: x for name, x in line.items() if name not in clock} for line in found]


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


@nnx.jit
def forward(model, *inputs, **how):
    """model(*inputs), compiled as a whole: operation by operation takes ten times as long."""
    return model(*inputs, **how)


def open_train(*data, roles=("text",), **changes):
    return common.open_data(gpt_train.Config(data=data, **changes), dict.fromkeys(roles))


def documents(*data, split="train"):
    """(texts in the order of the files, bad records) of the data."""
    texts, bad = [], 0
    for source in open_train(*data):
        stream = source.stream(lambda records, rng: records["text"], 16, None, split)
        texts += stream
        bad += stream.position["bad"]
    return texts, bad


# ---- the Hugging Face hub, as a local server that speaks its routes ----


class Hub(http.server.ThreadingHTTPServer):
    """Serves root/{datasets,models}/ID/FILE by the hub's routes, and root/files/FILE as a plain web server.

    `fault(path)` may name something to go wrong with a request.
    """

    daemon_threads = True
    sha = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.root, self.fault, self.faults = root, lambda path: None, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.env = dict(HF_HOME=str(root / "home"), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
        self.env |= dict(HF_ENDPOINT=self.url, HF_HUB_DOWNLOAD_TIMEOUT="2")

    def handle_error(self, request, client_address):
        pass  # a client that hangs up is part of the game

    def break_requests(self, after, kind_of):
        """Let `kind_of(n)` name what goes wrong with the n-th request for data after the first ones."""
        requests, lock = itertools.count(-after), threading.Lock()

        def fault(path):
            with lock:
                n = next(requests) if ".parquet" in path else -1
            return kind_of(n) if n >= 0 else None

        self.fault = fault


class HubRequest(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in dict(Content_Length=len(body), X_Repo_Commit=Hub.sha, **headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def go_wrong(self, kind, body):
        self.server.faults += 1
        self.close_connection = True
        if kind == "truncated":
            self.send_response(206)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
        elif kind == "stall":
            time.sleep(4)
        elif kind != "reset":
            self.answer(kind, **{"Retry-After": 0} if kind == 429 else {})
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if path.startswith("/files/"):
            return self.send_file(self.server.root / path[1:], path)
        root = self.server.root / ("datasets" if "/datasets/" in path else "models")
        folders = [folder for folder in (*root.glob("*"), *root.glob("*/*")) if folder.is_dir()]
        folders = [f for f in folders if f"/{f.relative_to(root)}/" in f"{path}/"]
        if not folders:
            return self.answer(404, X_Error_Code="RepoNotFound")
        folder = max(folders, key=lambda folder: len(str(folder)))
        repo = str(folder.relative_to(root))
        # the route, the revision, the file; without any, what there is to know of the repository
        route, *rest = f"{path}/".split(f"/{repo}/", 1)[1].rstrip("/").split("/")
        file = folder / "/".join(rest[1:])
        if route in ("", "revision"):
            siblings = [{"rfilename": str(p.relative_to(folder))} for p in folder.rglob("*") if p.is_file()]
            return self.answer(200, dict(id=repo, sha=Hub.sha, siblings=siblings, tags=[], private=False))
        if route == "tree":
            found = sorted(file.glob("**/*" if "recursive=true" in self.path.lower() else "*"))
            kind = lambda p: "file" if p.is_file() else "directory"
            about = lambda p: dict(
                path=str(p.relative_to(folder)), oid=p.name, size=p.stat().st_size, type=kind(p)
            )
            return self.answer(200, [about(p) for p in found])
        self.send_file(file if route == "resolve" else Path("nowhere"), path)

    def send_file(self, file, path):
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        body, code = file.read_bytes(), 200
        head = dict(ETag=f'"{hashlib.sha1(body).hexdigest()}"', Accept_Ranges="bytes")
        if self.command == "HEAD":
            return self.answer(200, body, **head)
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
            head["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
            code, body = 206, body[first : last + 1]
        fault = self.server.fault(path)
        return self.go_wrong(fault, body) if fault else self.answer(code, body, **head)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """A hub with fineweb-edu (the standard library's documents, in row groups of 4) and a small gpt2."""
    root = tmp_path / "hub"
    folder = root / "datasets/HuggingFaceFW/fineweb-edu"
    texts = [text for text in documents("stdlib")[0] if len(text) < 6000]
    for i, name in enumerate(["sample/10BT/000", "sample/10BT/001", "data/CC-MAIN-2013-20/train"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"text": texts[i::3], "id": [str(j) for j in range(len(texts[i::3]))]})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=4)
    files = {"default": "data/*/*", "sample-10BT": "sample/10BT/*"}
    card = [f"- config_name: {k}\n  data_files:\n  - split: train\n    path: {v}\n" for k, v in files.items()]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(card) + "---\n")
    tokenizer = gpt_train.load_tokenizer("bpe:300", texts)
    gpt_train.save_pretrained(tiny_model(len(tokenizer)), root / "models/gpt2", tokenizer)
    hub = Hub(root)
    yield hub
    hub.shutdown()


FINEWEB = TINY | dict(data=("HuggingFaceFW/fineweb-edu",), data_name=("sample-10BT",), tokenizer="gpt2")
FINEWEB |= dict(val_docs=3, shuffle_buffer=8, batch_size=64, steps=8)


# ---- data: formats, splits, columns ----

TEXTS = ["one\ntwo", 'three, "four"', "fünf\t6"]
PLAIN = ["one", 'three, "four', "null", "NA", "5"]  # what a tsv can hold


def tar_of(files):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def parquet_of(*groups, **how):
    """A parquet file with a row group of each list of texts."""
    schema = pa.schema({"id": pa.int64(), "text": pa.string()})
    with pq.ParquetWriter(file := io.BytesIO(), schema, compression="none") as writer:
        for texts in groups:
            table = pa.table({"id": range(len(texts)), "text": texts}, schema=schema)
            writer.write_table(table, **how)
    return file.getvalue()


def write(files):
    """Write {name: bytes or str}."""
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def jsonl(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def test_every_format_gives_the_same_documents_from_disk_and_from_the_web(tmp_path):
    csv = "id,text\n" + "".join(
        f'{i},"{text.replace(chr(34), 2 * chr(34))}"\n' for i, text in enumerate(TEXTS)
    )
    rows, packed = [{"id": i, "text": text} for i, text in enumerate(TEXTS)], jsonl(TEXTS).encode()
    files = {"a.parquet": parquet_of(TEXTS), "a.json": json.dumps(rows), "a.jsonl": packed, "a.csv": csv}
    files |= {"a.jsonl.gz": gzip.compress(packed), "a.jsonl.zst": zstandard.compress(packed)}
    files |= {"a.tar": tar_of({f"{i}.txt": text.encode() for i, text in enumerate(TEXTS)})}
    files |= {"a.tsv": "text\n" + "\n".join(PLAIN), "a.txt": TEXTS[0]}
    write({f"files/{name}": content for name, content in files.items()})
    write({f"folder/{i}.txt": text for i, text in enumerate(TEXTS)})
    web = Hub(tmp_path)
    for name in files:
        wanted = {"a.tsv": PLAIN, "a.txt": TEXTS[:1]}.get(name, TEXTS)
        for data in (f"files/{name}", f"{web.url}/files/{name}"):
            assert documents(data) == (wanted, 0), data
    for data in ("folder", "folder/", "folder/*.txt", "files/a.csv"):
        assert documents(data) == (TEXTS, 0), data
    assert documents("files/a.csv", "folder") == (TEXTS + TEXTS, 0)


DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
ODD_TEXTS = {  # files, what to open (or the first of them), the documents and the bad records in them
    "null and NA are words": ({"a.csv": "text\nnull\nNA\n\n5\n"}, None, ["null", "NA", "5"], 0),
    "mark in jsonl": ({"a.jsonl": "\ufeff" + jsonl(["a", "b"])}, None, ["a", "b"], 0),
    "mark in csv": ({"a.csv": "\ufefftext\na\nb\n"}, None, ["a", "b"], 0),
    "mark in txt": ({"a.txt": "\ufeffhello"}, None, ["hello"], 0),
    "mark in tar": ({"a.tar": tar_of({"a.txt": "\ufeffhello".encode()})}, None, ["hello"], 0),
    "empty rows": ({"a.jsonl": jsonl(["", "a", None, "b", ""]) + "\n\n"}, None, ["a", "b"], 0),
    "deep JSON": ({"a.jsonl": f"{DEEP}\n" + jsonl(["a"])}, None, ["a"], 1),
    "cut short": ({"a.jsonl": jsonl(["a"]) + '{"text": "b'}, None, ["a"], 1),
    "not texts": ({"a.jsonl": jsonl([5, "a", ["b"], {"c": 1}, True]) + "[1]\n"}, None, ["a"], 5),
    "half a character": (
        {"a.jsonl": '{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n'},
        None,
        ["\U0001f600"],
        1,
    ),
    "not UTF-8 in txt": ({"a.txt": b"caf\xe9"}, None, ["caf\ufffd"], 0),
    "not UTF-8 in tar": ({"a.tar": tar_of({"a.txt": b"caf\xe9"})}, None, ["caf\ufffd"], 0),
    "odd name": ({"a [1]*.txt": "odd", "a 1b.txt": "another"}, None, ["odd"], 0),
    "odd folder": ({"[a] *b/0.txt": "odd", "a b/0.txt": "another"}, "[a] *b", ["odd"], 0),
    "file without rows": ({"d/0.parquet": parquet_of([]), "d/1.parquet": parquet_of(["a"])}, "d", ["a"], 0),
    "files of no bytes": ({"d/0.jsonl": "", "d/1.jsonl": jsonl(["a"]), "d/2.jsonl": ""}, "d", ["a"], 0),
    "rows in the middle": ({"a.parquet": parquet_of([], ["a", "b"], [], ["c"])}, None, ["a", "b", "c"], 0),
    "number on top": ({"a.tsv": "a word\t1\nanother\t0\n"}, None, ["a word", "another"], 0),
}


@pytest.mark.parametrize("case", ODD_TEXTS)
def test_odd_texts_are_read_as_they_are_and_empty_is_not_bad(case):
    files, name, texts, bad = ODD_TEXTS[case]
    write(files)
    name = name or next(iter(files))
    assert documents(name) == (texts, bad)
    rows = open_train(name)[0].stream(lambda records, rng: records["text"], 2, 0)
    assert sorted(islice(rows, 2 * len(texts))) == sorted(texts * 2), "in training too"


def png(pixels, kind="png", **options):
    """The bytes of a picture file; `pixels` is an array or an image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def test_every_format_gives_the_same_pictures_and_labels_from_disk_and_from_the_web(tmp_path):
    rng = np.random.default_rng(0)
    pictures = {(i % 2, png(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))) for i in range(6)}
    write({f"files/f/train/{'ab'[label]}/{i}.png": p for i, (label, p) in enumerate(sorted(pictures))})
    rows = [{"image": {"bytes": p, "path": None}, "label": label} for label, p in sorted(pictures)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    datasets.Dataset.from_list(rows, features=features).to_parquet("files/a.parquet")
    parts = {}
    for i, (label, content) in enumerate(sorted(pictures)):
        parts |= {f"{i}.png": content, f"{i}.cls": str(label).encode()}
    write({"files/a.tar": tar_of(parts)})
    url = Hub(tmp_path).url
    places = [f"{place}/{name}" for place in ("files", f"{url}/files") for name in ("a.parquet", "a.tar")]
    for data in ("files/f", "files/f/train", "files/f/*/*/*.png", *places):
        [source] = open_train(data, roles=("image", "label"))
        make_rows = lambda records, rng: [*zip(records["label"], records["image"])]
        found = source.stream(make_rows, 4, None)
        assert {(label, resnet_stream.read_file(image, 0)) for label, image in found} == pictures, data
        assert source.classes == (None if data.endswith("tar") else ["a", "b"])


def test_splits_columns_headers_and_configurations_are_found():
    write({f"data/{s}.tsv": f"{s} is good\t1\nbad\t0\n" for s in ("train", "dev", "test")})
    for split in ("train", "test"):  # a folder may name the split, and a data set's card is no data
        write({f"folders/{split}/0.parquet": parquet_of([split]), f"documents/{split}/a.txt": split})
    write({"folders/README.md": "---\nlicense: mit\n---\n", "folders/.hidden/0.parquet": parquet_of(["x"])})
    Path("linked").symlink_to("folders")
    assert documents("data") == (["train is good", "bad"], 0)
    assert documents("data", split="validation")[0] == ["dev is good", "bad"]
    for data in ("folders", "folders/", "folders/**/*.parquet", "documents", "documents/**/*.txt", "linked"):
        assert open_train(data)[0].validation == "test"
        assert [documents(data, split=split)[0] for split in ("train", "test")] == [["train"], ["test"]], data
    write({"a.csv": "body,title,label\nlong,short,3\n", "b.csv": "body,label\na,0\nb,\nc,1\nd,-1\ne,2.0\n"})
    [source] = common.open_data(gpt_train.Config(data=("a.csv",)), {"text": "title", "label": None})
    row = lambda records, rng: [*zip(records["text"], records["label"])]
    assert [*source.stream(row, 4, None)] == [("short", 3)]
    [source] = common.open_data(gpt_train.Config(data=("b.csv",)), {"text": None, "label": None})
    assert [*source.stream(row, 4, None)] == [("a", 0), ("c", 1), ("e", 2)]
    source.classes = ["no", "yes"]
    assert [*source.stream(row, 4, None)] == [("a", 0), ("c", 1)]
    card = [f"- config_name: {k}\n  data_files:\n  - split: train\n    path: {k}/*\n" for k in "ab"]
    write({"d/README.md": "---\nconfigs:\n" + "".join(card) + "---\n"})
    write({f"d/{name}/0.jsonl": jsonl([name] * 3) for name in "ab"})
    for name in "ab":
        [source] = open_train("d", data_name=(name,))
        assert [*source.stream(lambda records, rng: records["text"], 4, None)] == [name] * 3


# ---- streams ----


def numbers(n=600, group=10, files=3, folder="numbers"):
    """A source of the rows "0".."n-1" in parquet files of row groups of `group`."""
    for i in range(files):
        part = [str(x) for x in range(i * n // files, (i + 1) * n // files)]
        write({f"{folder}/{i}.parquet": parquet_of(part, row_group_size=group)})
    return open_train(folder)[0]


def to_ids(records, rng):
    return [{"ids": int(text)} for text in rng.permutation(records["text"])]


def take(batches, n):
    return [batch["ids"].tolist() for batch, _ in islice(batches, n)]


def as_process(monkeypatch, rank, world):
    monkeypatch.setattr(jax, "process_index", lambda: rank)
    monkeypatch.setattr(jax, "process_count", lambda: world)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_row_comes_once_an_epoch_over_all_processes(world, monkeypatch):
    shares = []
    source = numbers()
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        stream, epochs = source.stream(to_ids, 50, 0), {0: [], 1: [], 2: []}
        rows = iter(stream)
        while stream.position["epoch"] < 2:
            row = next(rows)
            epochs[stream.position["epoch"]].append(row["ids"])
        shares.append([epochs[0], epochs[1]])
        assert len(epochs[0]) == pytest.approx(600 / world, abs=20), "shares of about the same size"
    orders = [[x for share in shares for x in share[epoch]] for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == [*range(600)]
    assert orders[0] != orders[1], "every epoch has an order of its own"


def test_stream_goes_on_after_every_batch_over_epoch_ends(monkeypatch):
    as_process(monkeypatch, 1, 2)
    source = numbers(240)
    stream = lambda position=None, n=0: common.batches(
        [source.stream(to_ids, 25, 0)], 14, seed=0, start=n, position=position
    )
    whole = take(stream(), 40)  # of seven rows: over two ends of an epoch of 120
    for epoch in range(2):
        rows = [x for ids in whole for x in ids][120 * epoch : 120 * (epoch + 1)]
        assert len({*rows}) == 120, "no row is dropped at an epoch's end"
    for n, (_, position) in enumerate(islice(stream(), 39), 1):
        saved = json.dumps(position)
        assert len(saved) < 2000
        assert take(stream(json.loads(saved), n), 40 - n) == whole[n:], n


def test_window_of_twenty_row_groups_mixes_nearly_as_well_as_a_permutation_of_all():
    source = numbers(8000, group=20)

    def spread(rows):
        """Of the batches' means: what a train step sees of an order that follows the files."""
        return np.std(np.mean(np.reshape(rows, (-1, 32)), axis=1))

    def epoch(seed, window):
        return [row["ids"] for row in islice(source.stream(to_ids, window, seed), 8000)]

    ideal = np.mean([spread(np.random.default_rng(i).permutation(8000)) for i in range(4)])
    shuffled = [epoch(seed, 400) for seed in range(4)]
    assert np.mean([*map(spread, shuffled)]) < 1.8 * ideal
    assert spread(epoch(0, 1)) > 4 * ideal, "without a window it would be the order of the row groups"
    assert np.mean(np.diff(np.array(shuffled[0]) // 20) == 0) < 0.1, "of one row group: 1/20 within a window"


def test_mixture_has_its_shares_and_every_source_its_own_order_resumed_or_not():
    write({"letters.parquet": parquet_of([str(x) for x in range(1000, 1200)], row_group_size=10)})
    sources = [numbers(), *open_train("letters.parquet")]

    def stream(position=None, n=0, of=(0, 1), weights=(0.7, 0.3)):
        streams = [sources[i].stream(to_ids, 50, 0) for i in of]
        return common.batches(streams, 16, seed=3, start=n, position=position, weights=weights)

    whole = take(stream(), 120)
    rows = np.reshape(whole, -1)
    assert np.mean(rows < 1000) == pytest.approx(0.7, abs=0.03)
    for i, is_mine in enumerate((rows < 1000, rows >= 1000)):
        alone = np.reshape(take(stream(of=(i,), weights=()), 100), -1)
        np.testing.assert_array_equal(rows[is_mine], alone[: is_mine.sum()])
    for n, (_, position) in enumerate(islice(stream(), 60), 1):
        if n % 10 == 0:
            assert take(stream(json.loads(json.dumps(position)), n), 20) == whole[n : n + 20]


def test_web_that_fails_changes_no_row_and_is_given_up_in_the_end(tmp_path, monkeypatch):
    texts, pauses = [f"{i} " + "x" * 2000 for i in range(300)], []
    write({"files/a.parquet": parquet_of(texts, row_group_size=10), "files/a.jsonl": jsonl(texts)})
    write({"files/a.jsonl.zst": zstandard.compress(jsonl(texts).encode())})
    web, dice = Hub(tmp_path), random.Random(0)
    make_rows = lambda records, rng: [int(text.split()[0]) for text in rng.permutation(records["text"])]
    sleep, here = time.sleep, threading.current_thread()  # a thread of another test may sleep too
    pause = lambda seconds: pauses.append(seconds) if threading.current_thread() is here else sleep(seconds)
    monkeypatch.setattr(time, "sleep", pause)
    for name in ("a.parquet", "a.jsonl", "a.jsonl.zst"):
        web.fault = lambda path: None
        [source] = open_train(f"{web.url}/files/{name}", retries=99)
        for wait in ("READ", "READ_SERVER_UNAVAILABLE", "READ_RATE_LIMIT"):  # of `datasets` itself
            monkeypatch.setattr(datasets.config, f"STREAMING_{wait}_RETRY_INTERVAL", 0)
        whole = [*islice(source.stream(make_rows, 50, 0), 600)]
        kinds = [500, 503, 504, 429, "reset", "truncated"]
        web.fault = lambda path: dice.choice(kinds) if dice.random() < 0.2 else None  # noqa: B023
        assert [*islice(source.stream(make_rows, 50, 0), 600)] == whole
    assert web.faults > 5 and pauses, "most are mended beneath us"
    web.fault, source.retries = lambda path: 500, 8
    pauses.clear()
    with pytest.raises(common.RunError, match="the data failed 9 times in a row: "):
        next(iter(source.stream(make_rows, 50, 0)))
    assert [*filter(None, pauses)] == [1, 2, 4, 8, 16, 32, 60, 60], "they grow"
    pauses.clear()
    pq.write_table(pa.table({"text": ["7"] * 20}), "0.parquet")
    pq.write_table(pa.table({"words": ["7"] * 20}), "1.parquet")
    with pytest.raises(common.RunError, match=r"the data failed [A-Z]"):
        [*open_train("*.parquet")[0].stream(make_rows, 5, None)]
    assert not pauses, "files that lie here are read once"


def test_bad_records_are_skipped_logged_counted_and_stop_the_stream_where_they_are_many(capfd):
    records = [json.dumps({"text": str(i)}) for i in range(200)]
    for i, value in enumerate(["[5]", '{"text": 5}', '{"text": "cut sho', '{"words": "x"}', '{"text": ""}']):
        records.insert(20 * i + 7, value)
    write({"a.jsonl": "\n".join(records)})
    [source] = open_train("a.jsonl")

    def stream(position=None, n=0):
        return common.batches([source.stream(to_ids, 10, 0)], 4, seed=0, start=n, position=position)

    found = [*islice(stream(), 100)]
    counts = [position["bad_records"] for _, position in found]
    rows = [x for batch, _ in found for x in batch["ids"].tolist()]
    assert sorted(rows[:200]) == [*range(200)] == sorted(rows[200:]), "the good ones, once an epoch"
    assert counts[49] == 3 and counts[99] == 6 and counts == sorted(counts)
    assert len({*counts}) > 4, "the count does not run ahead"
    assert [p["bad_records"] for _, p in islice(stream(found[30][1], 31), 69)] == counts[31:]
    said = capfd.readouterr().err
    for i, why in ((7, "not a JSON object"), (27, "text is 5"), (47, "Unterminated string")):
        assert f"data: skipped record {i} of epoch 0: {why}" in said and f"record {i} of epoch 1" in said

    for share, stops in ((120, False), (90, True)):
        texts = [5 if i % share == 0 else "7" for i in range(20_000)]
        write({"many.jsonl": jsonl(texts)})
        rows = open_train("many.jsonl")[0].stream(to_ids, 1000, 0)
        if stops:
            with pytest.raises(common.RunError, match=r"of .* records of the data are bad; the last one is"):
                [*islice(rows, 40_000)]
        else:
            assert len([*islice(rows, 40_000)]) == 40_000
    assert capfd.readouterr().err.count("skipped") == 200, "the first hundred are logged"


MEMORY = """
import resource, sys, common, gpt_train
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
[source], before = common.open_data(gpt_train.Config(data=("a.parquet",)), {"text": None}), peak()
rows = source.stream(lambda records, rng: [sum(map(len, records["text"]))], 1000, 0)
print(sum(n for n, _ in zip(rows, range(150))), peak() - before)
"""


def test_memory_does_not_grow_with_the_file():
    rows = np.random.default_rng(0).integers(32, 127, (1000, 2000), dtype=np.uint8)
    table = pa.table({"text": [row.tobytes().decode() for row in rows]})
    with pq.ParquetWriter("a.parquet", table.schema, compression="none") as file:
        for _ in range(150):  # row groups of 2 MB
            file.write_table(table)
    assert Path("a.parquet").stat().st_size > 300e6
    [(code, out, err)] = finish(python("-c", MEMORY))
    assert code == 0, err
    characters, grown = map(int, out.split())
    assert characters == 150 * 1000 * 2000 and grown < 150e6


# ---- gpt_train.py: the model against transformers' PyTorch GPT-2 ----


def randomised(model):
    """Every parameter random, biases and norms too."""
    rng = np.random.default_rng(0)
    for param in jax.tree.leaves(nnx.state(model), is_leaf=lambda p: isinstance(p, nnx.Param)):
        param.set_value(param[...] + 0.1 * rng.normal(size=param.shape).astype(np.float32))
    return model


def tiny_model(vocab_size=199, n_positions=48, dtype="float32", remat=False, **changes):
    sizes = dict(vocab_size=vocab_size, n_positions=n_positions, n_embd=48, n_layer=2, n_head=4)
    config = GPT2Config(**sizes | dict(embd_pdrop=0, attn_pdrop=0, resid_pdrop=0) | changes)
    model = gpt_train.GPT(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))
    return randomised(model)


def random_tokens(B, T, V=199, seed=0):
    return np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)


def mean_loss(model, tokens, targets, key=None):
    nats, count = gpt_train.loss_sum(model, tokens, targets, key)
    return nats / count


def make_step(script, model, cfg, *prepare, fsdp=False):
    """(graphdef, state, train_step) of a script for a model."""
    schedule = script.make_schedule(cfg)
    optimizer = nnx.Optimizer(model, script.make_optimizer(cfg, schedule), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    state = common.shard_state(common.make_mesh(), state, fsdp)
    return graphdef, state, script.make_train_step(graphdef, state, cfg, schedule, *prepare)


def ten_adamw_steps(theirs, cfg, state, step, batches, torch_loss, **adam):
    """Our state after a step on each batch, all with the loss and gradient norm of PyTorch's AdamW."""
    import torch

    groups = [dict(params=[p for p in theirs.parameters() if p.ndim >= 2], weight_decay=cfg.weight_decay)]
    groups += [dict(params=[p for p in theirs.parameters() if p.ndim < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, **adam)
    for i, batch in enumerate(batches):
        state, metrics = step(state, batch, jax.random.key(i))
        loss = torch_loss(theirs, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = float(metrics["lr"])
        optimizer.step()
        assert abs(metrics["loss"] - loss.item()) < 1e-4 and abs(metrics["grad_norm"] - norm.item()) < 1e-3
    return state


def test_logits_loss_gradients_ten_steps_and_decoding_equal_transformers():
    torch = pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel

    model = tiny_model()
    gpt_train.save_pretrained(model, "model")
    theirs, as_torch = GPT2LMHeadModel.from_pretrained("model").eval(), lambda x: torch.tensor(x).long()
    tokens = random_tokens(4, 33)
    out = theirs(as_torch(tokens), labels=as_torch(tokens))
    np.testing.assert_allclose(forward(model, tokens), out.logits.detach(), atol=1e-4)

    out.loss.backward()
    loss, grads = nnx.jit(nnx.value_and_grad(mean_loss))(model, tokens[:, :-1], tokens[:, 1:])
    assert abs(loss - out.loss.item()) < 1e-5
    ours, wanted = gpt_train.checkpoint_names(grads), dict(theirs.transformer.named_parameters())
    assert {*ours} == {*wanted}
    for name, grad in ours.items():
        right = wanted[name].grad.numpy()
        np.testing.assert_allclose(grad[...][: len(right)], right, atol=1e-5, err_msg=name)
        assert not np.any(grad[...][len(right) :]), "the padding of the vocabulary learns nothing"

    lengths, new = [1, 4, 9, 12], 30
    found = gpt_train.generate(
        model, tokens[:, :12], new, key=jax.random.key(0), temperature=0, lengths=lengths
    )
    for row, n in enumerate(lengths):
        prompt = as_torch(tokens[row : row + 1, :n])
        how = dict(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
        right = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **how)[0]
        assert found[row, : n + new].tolist() == right.tolist() and not found[row, n + new :].any()

    cfg = dict(optimizer="adamw", lr=1e-2, warmup_steps=3, steps=10, batch_size=4, accum=2, grad_clip=0.5)
    cfg = gpt_train.Config(**cfg)
    graphdef, state, step = make_step(gpt_train, model, cfg)
    loss_of = lambda theirs, tokens: theirs(as_torch(tokens), labels=as_torch(tokens)).loss
    batches = [random_tokens(4, 33, seed=i) for i in range(10)]
    state = ten_adamw_steps(theirs, cfg, state, step, batches, loss_of, betas=(0.9, 0.95), eps=1e-8)
    trained = nnx.merge(graphdef, state)[0]
    np.testing.assert_allclose(forward(trained, tokens), theirs(as_torch(tokens)).logits.detach(), atol=1e-3)


def test_published_names_load_and_what_changes_the_numbers_is_refused_by_name():
    model, tokens, folder = tiny_model(), random_tokens(2, 20), Path("model")
    gpt_train.save_pretrained(model, folder)
    weights = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    assert "transformer.h.1.mlp.c_proj.weight" in weights and "lm_head.weight" not in weights
    bare = {name.removeprefix("transformer."): w for name, w in weights.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 48, 48), np.float32)  # the causal mask, as in the published file
    names = sorted(bare)
    files = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    (folder / "model.safetensors").unlink()
    for file, part in files.items():
        save_file({name: bare[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for positions in (48, 20):
        again = gpt_train.from_pretrained("model", n_positions=positions)
        np.testing.assert_array_equal(forward(again, tokens), forward(model, tokens))
    (folder / "model.safetensors.index.json").unlink()

    def load(weights=weights, **fields):
        (folder / "config.json").write_text(json.dumps(config | fields))
        save_file(weights, folder / "model.safetensors")
        return gpt_train.from_pretrained("model")

    table = weights["transformer.wte.weight"]
    head = {name: w for name, w in weights.items() if name != "transformer.wte.weight"}
    for tied in (head | {"lm_head.weight": table}, weights | {"lm_head.weight": table}):
        np.testing.assert_array_equal(forward(load(tied), tokens), forward(model, tokens))
    refused = dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, activation_function="relu")
    refused |= dict(tie_word_embeddings=False, add_cross_attention=True, n_inner=96)
    for name, value in refused.items():
        with pytest.raises(common.UsageError, match=f"{name} is {value}, only"):
            load(**{name: value})
    for wrong, fields, message in (
        (weights | {"lm_head.weight": table + 1}, {}, "lm_head.weight"),  # untied, whatever the config says
        (weights, dict(vocab_size=150), "199 tokens, and vocab_size 150"),
        (weights, dict(n_layer=1), r"h.1.attn.c_attn.*has no place in a GPT-2"),
        (weights, dict(n_layer=3), r"h.2.*is missing"),
        (weights | {"adapter.weight": table}, {}, "adapter.weight has no place"),
    ):
        with pytest.raises(common.UsageError, match=message):
            load(wrong, **fields)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(common.UsageError, match=r"no model.safetensors in it"):
        gpt_train.from_pretrained("model")


# ---- gpt_train.py: the model by itself, sampling ----


def test_dropout_remat_bfloat16_and_the_head_for_accelerators(monkeypatch):
    tokens, key = random_tokens(2, 20), jax.random.key(1)
    model = tiny_model(embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)
    np.testing.assert_array_equal(forward(model, tokens), forward(tiny_model(), tokens))
    assert np.any(forward(model, tokens, key) != forward(model, tokens, jax.random.key(2)))
    np.testing.assert_array_equal(forward(model, tokens, key), forward(model, tokens, key))
    x = gpt_train.dropout(jnp.ones(100_000), 0.2, key)
    assert abs(x.mean() - 1) < 0.01 and abs((x == 0).mean() - 0.2) < 0.01
    # with all weights kept, the attention that knows dropout is the fused one
    nearly = tiny_model(attn_pdrop=1e-9)
    np.testing.assert_allclose(forward(nearly, tokens, key), forward(nearly, tokens), atol=1e-5)

    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    targets = np.where(tokens % 5, tokens, -1)
    gradients = lambda model, key=None: nnx.jit(nnx.value_and_grad(mean_loss))(model, tokens, targets, key)
    jax.tree.map(close, *(gradients(tiny_model(resid_pdrop=0.1, remat=r), key) for r in (False, True)))
    on_cpu = gradients(tiny_model())
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        jax.tree.map(
            close,
            nnx.jit(nnx.value_and_grad(lambda *x: mean_loss(*x)))(tiny_model(), tokens, targets),
            on_cpu,
        )

    half = tiny_model(dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    assert forward(half, tokens).dtype == jnp.float32 and half.hidden(tokens)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(forward(half, tokens), forward(tiny_model(), tokens), atol=0.15)


def test_new_model_starts_as_gpt2_does():
    config = GPT2Config(n_layer=8, n_embd=64, n_head=4, vocab_size=500, n_positions=64)
    model = nnx.jit(lambda: gpt_train.GPT(config, rngs=nnx.Rngs(0)))()
    std = lambda p: float(np.std(p[...]))
    assert std(model.wte.embedding) == pytest.approx(0.02, rel=0.05)
    assert std(model.h[3].mlp.c_fc.kernel) == pytest.approx(0.02, rel=0.05)
    for layer in (model.h[3].mlp.c_proj, model.h[3].attn.c_proj):
        assert std(layer.kernel) == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        assert not np.any(layer.bias[...])
    tokens = random_tokens(4, 64, 500)
    assert nnx.jit(mean_loss)(model, tokens, tokens[:, ::-1]) == pytest.approx(math.log(500), rel=0.01)


def test_cached_decoding_equals_the_full_forward_and_stops_at_the_end_token():
    model, tokens, how = tiny_model(), random_tokens(3, 5), dict(key=jax.random.key(0), temperature=0)
    out = np.asarray(gpt_train.generate(model, tokens, 30, **how))
    logits = forward(model, out)  # all at once
    np.testing.assert_array_equal(out[:, 5:], np.argmax(logits, axis=-1)[:, 4:-1])
    with pytest.raises(ValueError, match=r"5 \+ 44 tokens, and the model has 48 positions"):
        gpt_train.generate(model, tokens, 44, key=jax.random.key(0))
    eos = int(out[0, 10])
    stopped = np.asarray(gpt_train.generate(model, tokens, 30, eos=eos, **how))
    for a, b in zip(out[:, 5:], stopped[:, 5:]):
        end = [*a, eos].index(eos)
        assert (a[:end] == b[:end]).all() and (b[end:] == eos).all()
    model.ln_f.scale.set_value(jnp.zeros(48))
    model.ln_f.bias.set_value(jnp.zeros(48))  # all tokens equally likely, whatever the text
    drawn = gpt_train.generate(model, tokens, 43, key=jax.random.key(0))[:, 5:]
    assert len(np.unique(drawn)) > 80, "129 draws among 199: each has a key of its own"


def test_sampling_follows_the_softmax_within_top_k_and_top_p():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    many, cold = jnp.asarray(np.tile(np.log(p), (40_000, 1))), p**2
    for how, wanted in (
        ({}, p),
        (dict(top_k=2), [0.625, 0.375, 0, 0]),
        (dict(top_p=0.8 + 1e-4), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (dict(top_p=0.7), [0.625, 0.375, 0, 0]),
        (dict(top_k=3, top_p=0.6), [0.625, 0.375, 0, 0]),
        (dict(temperature=0.5), cold / cold.sum()),
        (dict(temperature=0), [1, 0, 0, 0]),
        (dict(top_k=1), [1, 0, 0, 0]),
        (dict(top_p=1e-6), [1, 0, 0, 0]),
    ):
        drawn = gpt_train.sample(
            jax.random.key(0), many, **dict(temperature=1.0, top_k=None, top_p=None) | how
        )
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / len(many), wanted, atol=0.01)


# ---- gpt_train.py: the train step ----


def one_step(cfg, tokens):
    """(metrics, {name: parameter}, optimizer state) after a step on `tokens`."""
    graphdef, state, step = make_step(gpt_train, tiny_model(), cfg)
    state, metrics = step(state, tokens, jax.random.key(0))
    model, optimizer = nnx.merge(graphdef, state)
    names = gpt_train.checkpoint_names(model).items()
    return metrics, {name: np.asarray(p[...]) for name, p in names}, nnx.state(optimizer)


def test_accumulation_weighs_targets_alike_and_decay_and_muon_are_for_matrices():
    tokens = random_tokens(8, 33)
    tokens[1::4, 5:] = -1  # these rows would count for more in a mean of means
    cfg = gpt_train.Config(optimizer="adamw", batch_size=8, accum=1, warmup_steps=0, weight_decay=0, lr=1e-3)
    metrics, plain, moments = one_step(cfg, tokens)
    for accum in (2, 8):
        found, _, theirs = one_step(dataclasses.replace(cfg, accum=accum), tokens)
        assert float(found["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
        assert float(found["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-4)
        # the updates themselves hang on the sign of gradients near zero
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), theirs, moments)
    _, muon, _ = one_step(dataclasses.replace(cfg, optimizer="muon"), tokens)
    for optimizer, without in (("adamw", plain), ("muon", muon)):
        _, decayed, _ = one_step(dataclasses.replace(cfg, optimizer=optimizer, weight_decay=0.5), tokens)
        for name, w in decayed.items():
            assert np.any(w != without[name]) == (w.ndim == 2), name
    for name, w in muon.items():
        hidden = name.startswith("h.") and w.ndim == 2
        assert np.allclose(w, plain[name], atol=1e-6) != hidden, name


def test_muon_is_jordans_but_for_three_named_differences():
    """https://kellerjordan.github.io/posts/muon, restated; `bias_corrected` and the scale are optax's."""
    torch = pytest.importorskip("torch")

    def orthogonal(G):
        X = G.T if G.shape[0] > G.shape[1] else G
        X = X / (X.norm() + 1e-7)
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        return X.T if G.shape[0] > G.shape[1] else X

    cfg, shapes = (
        gpt_train.Config(optimizer="muon", weight_decay=0, grad_clip=0),
        [(32, 96), (96, 32), (32, 32)],
    )
    rule, rng = gpt_train.make_optimizer(cfg, lambda step: 0.01), np.random.default_rng(0)
    draw = lambda: {"h": {str(s): rng.normal(size=s).astype(np.float32) for s in shapes}}
    params = draw()
    state, buffers = rule.init(params), {str(s): torch.zeros(s) for s in shapes}
    update = jax.jit(rule.update)
    for t in range(1, 11):
        grads = draw()
        updates, state = update(grads, state, params)
        for shape in shapes:
            g, buffer = torch.tensor(grads["h"][str(shape)]), buffers[str(shape)]
            buffer.lerp_(g, 1 - 0.95)
            plain = torch.lerp(g, buffer, 0.95)
            # 1. NAdam's correction of the momentum's bias; 2. float32 instead of bfloat16
            corrected = torch.lerp(g / (1 - 0.95**t), buffer / (1 - 0.95 ** (t + 1)), 0.95)
            # 3. AdamW's size, instead of sqrt(max(1, rows / columns))
            scale = 0.01 * 0.2 * max(shape) ** 0.5
            found = torch.tensor(np.asarray(updates["h"][str(shape)])) / -scale
            torch.testing.assert_close(found, orthogonal(corrected), atol=2e-4, rtol=2e-3)
            cosine = torch.nn.functional.cosine_similarity(
                found.flatten(), orthogonal(plain).flatten(), dim=0
            )
            assert cosine > 0.9, "and uncorrected nearly the same"


@pytest.mark.parametrize("script", [gpt_train, bert_mlm, resnet_stream])
def test_schedule_rises_and_falls_and_with_a_cooldown_may_be_extended(script):
    def rate(**changes):
        cfg = script.Config(**dict(lr=1.0, min_lr=0.1, warmup_steps=10, steps=100) | changes)
        return [float(script.make_schedule(cfg)(step)) for step in range(101)]

    usual, plateau, longer = rate(), rate(cooldown=0.2), rate(cooldown=0.2, steps=200)
    assert 0 < usual[0] < 0.1 and usual[10] == max(usual) == 1 and usual[100] == pytest.approx(0.1)
    assert np.all(np.diff(usual[:11]) > 0) and np.all(np.diff(usual[10:]) < 0)
    assert usual[55] == pytest.approx(0.55)
    assert (abs(usual[30] - 0.8) < 1e-6) == (script is bert_mlm), "a line, and not a cosine"
    assert plateau[:11] == usual[:11] and plateau[10:81] == [1] * 71 and plateau[:81] == longer[:81]
    np.testing.assert_allclose(np.diff(plateau[80:]), -0.045, atol=1e-6)


# ---- gpt_train.py: rows, tokenizers ----


def test_rows_hold_the_documents_but_for_those_held_out_and_validation_every_token_once():
    texts, _ = documents(JSON)
    tokenizer, epochs = gpt_train.load_tokenizer("byte"), []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        rows = [row["tokens"] for row in gpt_train.pack(tokenizer, {texts[0]}, 33, {"text": texts}, rng)]
        kept = "".join(tokenizer.decode(row) for row in rows)
        size = sum(len(text) + len(gpt_train.END) for text in texts[1:])
        assert size - 2 * 33 * len(gpt_train.END) < len(kept) <= size, "fewer than two rows are given up"
        parts = [tokenizer.decode(row).split(gpt_train.END)[0] for row in rows]
        assert all(any(part in text for text in texts[1:]) for part in parts), "a row is a stretch of a text"
        epochs.append({tuple(row) for row in rows})
    assert len(epochs[0] & epochs[1]) < 0.1 * len(epochs[0]), "another cut in every epoch"
    for n in range(30):  # text for a row is not thrown away
        found = gpt_train.pack(tokenizer, (), 10, {"text": ["x" * n]}, np.random.default_rng(n))
        assert min(1, (n + 1) // 10) <= len(found) <= (n + 1) // 10

    inputs, targets = gpt_train.validation_rows(tokenizer, texts[:2], 32)
    tokens = gpt_train.join(tokenizer, texts[:2])
    np.testing.assert_array_equal(targets[targets >= 0], tokens)
    np.testing.assert_array_equal(inputs.reshape(-1)[: len(tokens)], [tokenizer.eos_token_id, *tokens[:-1]])
    model, mesh = tiny_model(257, 32), common.make_mesh()
    graphdef, state = nnx.split((model, None))
    eval_step = gpt_train.make_eval_step(graphdef, mesh)
    rows = inputs[:50], targets[:50]
    means = [gpt_train.evaluate(eval_step, state, rows, size, mesh)["val_loss"] for size in (7, 50)]
    np.testing.assert_allclose(means, nnx.jit(mean_loss)(model, *rows), rtol=1e-5)


def test_tokenizers_take_texts_as_they_are():
    for script in (gpt_train, bert_mlm):
        tokenizer = script.load_tokenizer("bpe:300", ["one two three"] * 10)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer("one", truncation=True, max_length=4, padding="max_length")  # is saved with it
        tokenizer.save_pretrained(script.__name__)
        tokenizer = script.load_tokenizer(script.__name__)
        ids = np.concatenate(common.encode(tokenizer, ["one two three"] * 2))
        assert tokenizer.decode(ids, skip_special_tokens=True) == "one two three" * 2
    tokenizer = gpt_train.load_tokenizer("bpe:300", ["a <|endoftext|> b"] * 10)
    ids = gpt_train.join(tokenizer, ["a <|endoftext|> b", "c"])
    assert (ids == tokenizer.eos_token_id).sum() == 2, "the end token inside a document is text"
    assert tokenizer.decode(ids) == "a <|endoftext|> b<|endoftext|>c<|endoftext|>"
    letters, start = random.Random(0).choices("acgt", k=1_000_000), time.perf_counter()
    assert len(gpt_train.load_tokenizer("bpe:1000", ["".join(letters)])) == 1000
    assert time.perf_counter() - start < 30, "a word of a million letters"


def test_ids_of_a_tokenizer_may_have_gaps_and_be_large(typed):
    vocab = {"def": 0, "return": 5, "self": 300, "?": 70_001, "<end>": 70_000}
    words = Tokenizer(models.WordLevel(vocab, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="?").save_pretrained("gaps")
    small = flags(**TINY | dict(tokenizer="gaps", steps=1, n_embd=8, batch_size=8, accum=1, out_dir="a"))
    code, _, err = typed(gpt_train, *small)
    assert code == 0, err
    assert lines("a")[0]["loss"] == pytest.approx(math.log(70_002), rel=0.01)
    assert gpt_train.from_pretrained("a").config.vocab_size == 70_002


# ---- gpt_train.py: runs ----


def test_run_leaves_metrics_curves_checkpoints_and_a_model_folder_that_pytorch_loads(monkeypatch, capsys):
    logged = []
    wandb = SimpleNamespace(log=lambda line, step: logged.append(line), finish=lambda: logged.append("end"))
    wandb.init = lambda **how: logged.append(how) or wandb
    wandb.__spec__ = "stub"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    last = train(tokenizer="bpe:300", steps=16, eval_every=8, sample_every=16, wandb="mine", profile="trace")
    said, folder = capsys.readouterr().out, Path("out/gpt-001")
    files = "ckpt config.json curves.png metrics.jsonl model.safetensors run.json tokenizer.json"
    assert {*files.split()} <= {path.name for path in folder.iterdir()}
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [*range(1, 17)] and found[-1] == last
    assert last["tokens"] == 16 * 128 * 32 and last["mfu"] is None and 0 <= last["data_wait"] < 1
    assert last["val_loss"] < found[7]["val_loss"] < math.log(300)
    assert sorted(path.name for path in (folder / "ckpt").iterdir()) == ["15", "16"]
    info = json.loads((folder / "run.json").read_text())
    assert info["config"]["steps"] == 16 and info["jax"] == jax.__version__
    start, *rest, end = logged
    assert rest == found and end == "end" and start["project"] == "mine"
    assert re.fullmatch(r"gpt-001-[0-9a-f]{8}", start["id"]), "directories' names recur"
    assert "a profile of steps 10 to 15 is in trace" in said
    assert next(Path("trace").rglob("*.xplane.pb")).stat().st_size > 10_000
    figures = r"[\d,]+ tokens/s, \d+ ms a step, data wait [\d.]+%, peak memory [\d.]+ GB, \d+ s in all"
    assert any(re.fullmatch(figures, line) for line in said.splitlines())

    # bits per byte do not depend on the tokenizer: sum the nats by hand
    [text, *_], _ = documents(JSON)
    tokenizer, model = gpt_train.load_tokenizer(str(folder)), gpt_train.from_pretrained(str(folder))
    nats, _ = nnx.jit(gpt_train.loss_sum)(model, *gpt_train.validation_rows(tokenizer, [text], 32))
    assert last["val_bpb"] == pytest.approx(float(nats) / math.log(2) / len(text.encode()), rel=1e-4)

    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokens = AutoModelForCausalLM.from_pretrained(folder), random_tokens(2, 20)
    wanted = theirs(torch.tensor(tokens).long()).logits.detach()
    np.testing.assert_allclose(forward(model, tokens), wanted, atol=1e-4)
    exported = AutoTokenizer.from_pretrained(folder)
    assert exported(text)["input_ids"] == common.encode(tokenizer, [text])[0].tolist()
    assert exported.model_max_length == 32 == len(exported(text, truncation=True)["input_ids"])


def test_finished_run_is_evaluated_sampled_and_fine_tuned_and_one_seed_gives_one_run(capsys):
    val = sysconfig.get_path("stdlib") + "/email/mime/text.py"
    for name in ("base", "again"):
        trained = train(out_dir=name, val_data=(val,))
    assert lines("base") == lines("again")
    train(out_dir="other", seed=1, steps=1)
    assert lines("other")[0]["loss"] != lines("base")[0]["loss"]
    use = dict(steps=0, init_from="base", tokenizer=None, dropout=0.0)
    for source in (dict(data=(val,)), dict(val_data=(val,))):
        assert train(**use | source)["val_loss"] == pytest.approx(trained["val_loss"], rel=1e-5)
    capsys.readouterr()
    train(**use, prompt=("def ", "import json\n"), max_new_tokens=12)
    first = capsys.readouterr().out.split("\n---\n")
    assert len(first) == 2 and "def " in first[0] and first[1].startswith("import json\n")
    tuned = train(**use | dict(steps=12, dropout=0.1, lr=1e-4, out_dir="tuned", val_data=(val,)))
    assert lines("tuned")[0]["loss"] < lines("base")[6]["loss"], "it starts where the other ended"
    assert tuned["val_loss"] < trained["val_loss"]
    assert not Path("out").exists(), "neither evaluating nor sampling makes a run"


MAIN = """
import os, sys, common, gpt_train
def main(*argv):
    sys.argv = ["gpt_train.py", *argv]
    common.cli(gpt_train.Config, gpt_train.PRESETS, gpt_train.main, "")
"""
KILL_AT_25 = """
log = common.Run.log
common.Run.log = lambda run, *args: log(run, *args) or run.step == 25 and os.kill(os.getpid(), 9)
main(*sys.argv[1:])
"""


def test_run_stopped_before_its_cooldown_and_extended_equals_the_long_run(typed, monkeypatch):
    args = TINY | dict(cooldown=0.2, ckpt_every=10, eval_every=100)
    process = python("-c", MAIN + KILL_AT_25, *flags(**args | dict(steps=60)))
    train(**args | dict(steps=100, out_dir="long"))
    assert finish(process)[0][0] == -signal.SIGKILL
    with monkeypatch.context() as patch:
        log = common.Run.log
        stop = lambda run, *args: log(run, *args) or (run.step == 40 and signal.raise_signal(signal.SIGTERM))
        patch.setattr(common.Run, "log", stop)
        code, out, err = typed(gpt_train, "--resume")  # the newest run is found
    assert code == 143 and "saved at step 40; go on with --resume --out-dir out/gpt-001" in out, err
    code, _, err = typed(gpt_train, "--resume", "--steps", "100")
    assert code == 0, err
    found, wanted = lines("out/gpt-001"), lines("long")
    assert found == wanted and wanted[79]["lr"] > wanted[81]["lr"]
    assert Path("out/gpt-001/model.safetensors").read_bytes() == Path("long/model.safetensors").read_bytes()


def test_run_that_cannot_go_on_keeps_its_last_good_checkpoint(monkeypatch):
    bad = dict(lr=1e18, warmup_steps=0, grad_clip=0.0, ckpt_every=1, keep=20)
    with pytest.raises(common.RunError, match=r"step \d+: .*loss (nan|inf).*the last good checkpoint is \d"):
        train(**bad, out_dir="diverged")
    for step in map(int, os.listdir("diverged/ckpt")):
        assert math.isfinite(lines("diverged")[step - 1]["loss"])

    def broken(*args, **how):
        yield from islice(batches(*args, **how), 4)
        raise common.RunError("the data failed")

    batches = common.batches
    monkeypatch.setattr(common, "batches", broken)
    with pytest.raises(common.RunError, match="the data failed"):
        train(out_dir="a")
    assert "4" in os.listdir("a/ckpt")
    limit = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))"
        + MAIN
        + "main(*sys.argv[1:])"
    )
    big = dict(data="synthetic", tokenizer="byte", seq_len=1024, batch_size=512, accum=1, steps=3, n_layer=1)
    [(code, _, err)] = finish(python("-c", limit, *flags(**big)))
    assert code == 1 and "Traceback" not in err and "out of memory on the device; try a smaller" in err, err


def test_run_directory_is_never_taken_over_and_a_resume_changes_no_meaning(typed):
    write({"text.txt": "one two three " * 3000, "val.txt": "one two three " * 10})
    args = flags(**TINY | dict(data=("text.txt",), val_data=("val.txt",), steps=3, out_dir="a"))
    assert typed(gpt_train, *args)[0] == 0
    before, resume = lines("a"), ("--resume", "--out-dir", "a")

    def refused(message, *args, script=gpt_train):
        code, _, err = typed(script, *args)
        assert code == 2 and message in err and lines("a") == before, err

    refused("holds a run already; --resume to go on with it, --overwrite to start again", *args)
    refused("--init-from", *args, "--overwrite", "--init-from", "a")
    refused("a is no run of bert_mlm.py", *resume, script=bert_mlm)
    refused("--steps 2: a is at step 3 already", *resume, "--steps", "2")
    for changed in ("--seq-len 16", "--seed 7", "--shuffle-buffer 7", "--data text.txt val.txt"):
        refused("the run in a was started with", *resume, *changed.split())
    write({"text.txt": "one two three four " * 3000})
    refused("--resume: the data 0 text.txt are", *resume, "--steps", "5")
    write({"text.txt": "one two three " * 3000})
    longer = ("--steps", "5", "--grad-clip", "0", "--ckpt-every", "1", "--eval-every", "5")
    assert typed(gpt_train, *resume, *longer)[0] == 0
    assert [line["step"] for line in lines("a")] == [1, 2, 3, 4, 5] and lines("a")[:2] == before[:2]
    before = lines("a")
    info = json.loads(Path("a/run.json").read_text())
    info["data"]["0 text.txt"]["processes"] = 4
    Path("b").mkdir()
    write({"b/run.json": json.dumps(info)})
    shutil.copy("a/tokenizer.json", "b/tokenizer.json")
    shutil.copy("a/tokenizer_config.json", "b/tokenizer_config.json")
    refused("'processes': 4", "--resume", "--out-dir", "b")
    shutil.rmtree("a/ckpt")
    refused("a was trained, and its checkpoints are gone", *resume)
    assert typed(gpt_train, *args, "--overwrite")[0] == 0 and lines("a")[:2] == before[:2]


# ---- gpt_train.py: from the hub ----


EACH = """
for argv in {lines}:
    try:
        main(*argv)
    except SystemExit as stop:
        print("code", stop.code)
"""


def test_hub_weights_by_their_id_and_what_is_not_there_or_offline_is_one_line(hub):
    args = flags(init_from="gpt2", steps=0, prompt="import", temperature=0, max_new_tokens=8)
    missing = [(flag, "some/where") for flag in ("--data", "--init-from", "--tokenizer")]
    online = python("-c", MAIN + EACH.format(lines=[args, missing[0]]), **hub.env)
    nowhere = hub.env | dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME="empty")
    offline = python("-c", MAIN + EACH.format(lines=missing), **nowhere)
    (_, out, err), (_, codes, errors) = finish(online, offline, timeout=60)
    assert out.startswith("import") and re.findall(r"code (\d)", out) == ["0", "2"], err
    assert "--data some/where: " in err.splitlines()[-1] and codes.split()[1::2] == ["2"] * 3, errors
    assert len(errors.splitlines()) == 3 and errors.count(" some/where: ") == 3, errors


def test_hub_that_fails_changes_no_loss_killed_or_not(hub, monkeypatch):
    code, _, err = run(gpt_train, *flags(**FINEWEB, out_dir="whole"), **hub.env)
    assert code == 0 and len(lines("whole")) == 8, err
    kinds = [500, 503, 504, 429, "reset", "truncated", "stall"]
    hub.break_requests(6, lambda n: kinds[n // 2] if n % 2 == 0 and n < 14 else None)  # each once
    code, _, err = run(gpt_train, *flags(**FINEWEB, out_dir="once"), **hub.env)
    assert code == 0 and hub.faults == 7, err
    assert lines("once") == lines("whole")

    dice = random.Random(0)
    hub.break_requests(9, lambda n: dice.choice(kinds[:-1]) if dice.random() < 0.25 else None)
    kill_after(4, gpt_train, "killed", *flags(**FINEWEB), **hub.env)
    monkeypatch.setattr(Hub, "sha", "f" * 40)  # a new commit meanwhile: the run goes on with the old one
    code, _, err = run(gpt_train, "--resume", "--out-dir", "killed", **hub.env)
    assert code == 0 and hub.faults >= 5, err
    assert lines("killed") == lines("whole")


def test_source_that_stays_away_is_given_up_with_a_checkpoint_and_ctrl_c_ends_the_wait(hub):
    shutil.copytree(hub.root / "datasets/HuggingFaceFW/fineweb-edu/sample/10BT", hub.root / "files")
    long = TINY | dict(data=(f"{hub.url}/files/000.parquet",), steps=4000, eval_every=4000, ckpt_every=4000)
    long |= dict(batch_size=64, shuffle_buffer=4)
    for out_dir, retries in (("a", 1), ("b", 8)):
        hub.break_requests(20, lambda n: "reset")
        process = launch(gpt_train, *flags(**long, out_dir=out_dir, retries=retries))
        if retries == 8:
            wait_for_step(process, out_dir, lines("a")[-1]["step"] - 5)
            time.sleep(3)  # the rows at hand are used up
            process.send_signal(signal.SIGINT)
        [(code, out, err)] = finish(process, timeout=60)
        assert code == (1 if retries == 1 else 130) and "Traceback" not in err, err
        [saved] = map(int, os.listdir(f"{out_dir}/ckpt"))
        assert saved == lines(out_dir)[-1]["step"] > 1, "all that was trained on good data is kept"
        if retries == 1:
            assert "try 1 of 1 in 1 s" in err and "the data failed 2 times in a row: " in err.splitlines()[-1]
        else:
            assert f"saved at step {saved}" in out and "Exception ignored" not in err


# ---- kill -9 ----

OPTIMISED = dict(JAX_DISABLE_MOST_OPTIMIZATIONS="0")  # the environment of a process as its user has it
PICTURES = dict(data=("pictures",), val_every=4, shuffle_buffer=50, eval_every=6)
KILLED = {gpt_train: TINY, bert_mlm: BERT | dict(dropout=0.1, accum=2)}  # over two ends of an epoch
KILLED |= {resnet_stream: RESNET | EVERYTHING | PICTURES}


@pytest.mark.parametrize("script", KILLED)
def test_kill_9_at_any_moment_and_over_epoch_ends_changes_no_bit(script, typed):
    write_folder("pictures", 60)
    write({"pictures/light/broken.png": b"no picture"})
    args, n, execute, env = flags(**KILLED[script]), KILLED[script]["steps"], typed, {}
    if script is gpt_train:
        execute, env = partial(run, **OPTIMISED), OPTIMISED
    code, _, err = execute(script, *args, "--out-dir", "whole")
    assert code == 0, err
    kill_after(n // 3, script, "killed", *args, **env)
    if script is gpt_train:
        kill_after(2 * n // 3, script, "killed", "--resume", **env)
    code, _, err = execute(script, "--resume", "--out-dir", "killed")
    assert code == 0, err
    assert lines("killed") == lines("whole") and len(lines("whole")) == n
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("whole", "killed")]
    assert weights[0] == weights[1]
    if script is resnet_stream:
        assert lines("whole")[-1]["bad_records"] >= 2, "two epochs"


# ---- many devices, many processes ----

SMALL = TINY | dict(batch_size=64, dropout=0.0)
MANY = {gpt_train: SMALL, bert_mlm: BERT | dict(batch_size=64, accum=2), resnet_stream: RESNET}


def devices(n):
    return dict(XLA_FLAGS=f"--xla_force_host_platform_device_count={n}")


def launch_two(*args, **changes):
    """gpt_train.py in two processes with a device each, which train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        who = dict(coordinator=f"127.0.0.1:{probe.getsockname()[1]}", num_processes=2)
    return [launch(gpt_train, *args, *flags(**changes, **who, process_id=i), **devices(1)) for i in (0, 1)]


def assert_same_losses(a, b, rtol):
    for name in ("loss", "grad_norm", "val_loss"):
        x, y = ([line[name] for line in lines(folder) if name in line] for folder in (a, b))
        np.testing.assert_allclose(x, y, rtol=rtol)


EIGHT = """
import jax, common, {script} as script
shard = common.shard_state
def measured(*args):
    state = shard(*args)
    leaves = jax.tree.leaves(state)
    pieces = [s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == jax.devices()[0]]
    print("share", sum(pieces) / sum(x.nbytes for x in leaves))
    return state
common.shard_state = measured
for name in {names}:
    script.main(script.Config(**{cfg} | dict(fsdp=name == "cut", out_dir=name)))
"""


@pytest.mark.parametrize("script", MANY)
def test_eight_devices_give_the_losses_of_one_with_and_without_fsdp(script, caplog):
    cfg = MANY[script] | dict(steps=3, eval_every=3, ckpt_every=3)
    names = ["cut", "copied"] if script is gpt_train else ["cut"]
    program = EIGHT.format(script=script.__name__, cfg=cfg, names=names)
    process = python("-c", program, **devices(8), JAX_LOG_COMPILES="1")
    with jax.log_compiles():
        script.main(script.Config(**cfg, out_dir="one"))
    [(code, out, err)] = finish(process)
    assert code == 0 and "8 x cpu" in out, err
    compiled = "Compiling jit(train_step)"
    assert sum(compiled in line for line in caplog.messages) == 1 and err.count(compiled) == len(names)
    for folder, share in zip(names, map(float, re.findall(r"share ([\d.]+)", out))):
        assert share == 1 if folder == "copied" else 1 / 8 <= share < 0.2
        # the gradient norm of a new ResNet hangs on differences of its statistics
        assert_same_losses("one", folder, rtol=1e-3 if script is resnet_stream else 1e-4)
    if script is gpt_train:  # a checkpoint moves between eight devices and one
        free = dict(resume=True, lr=1e-3, min_lr=1e-3, warmup_steps=0, steps=6)
        for folder in ("one", "cut"):
            script.main(script.Config(**cfg | free | dict(out_dir=folder)))
        assert_same_losses("one", "cut", rtol=1e-3)


def test_two_processes_train_together_and_a_kill_or_a_signal_to_one_changes_nothing(monkeypatch):
    streamed = SMALL | dict(
        data=("stdlib",), shuffle_buffer=8, fsdp=True, lr=1e-3, min_lr=1e-3, warmup_steps=0
    )
    ends = finish(*launch_two(**streamed, out_dir="whole"))
    assert [code for code, _, _ in ends] == [0, 0] and len(lines("whole")) == 12, ends
    assert "2 x cpu" in ends[0][1] and "step" not in ends[1][1], "only the first one prints"
    processes = launch_two(**streamed | dict(steps=4000), out_dir="killed")
    wait_for_step(processes[0], "killed", 4)
    processes[1].kill()
    (code, _, err), _ = finish(*processes, timeout=60)
    assert code not in (0, None) and ("again with --resume" in err or "another task died" in err), err
    processes = launch_two("--resume", out_dir="killed")
    wait_for_step(processes[0], "killed", 12)
    processes[1].send_signal(signal.SIGTERM)
    (code, out, err), (other, _, _) = finish(*processes, timeout=60)
    assert (code, other) == (143, 143), err
    saved = max(map(int, os.listdir("killed/ckpt")))
    assert f"saved at step {saved}" in out and lines("killed")[-1]["step"] == saved, "both at the same step"
    assert lines("killed")[:12] == lines("whole")

    # one process that trains on the rows of both has the same losses
    cfg, tokenizer, rows = gpt_train.Config(**streamed), gpt_train.load_tokenizer("byte"), []
    [source] = common.open_data(cfg, {"text": None})
    held_out, _ = common.hold_out_texts(cfg, [source])
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            as_process(patch, rank, 2)
            stream = source.stream(partial(gpt_train.pack, tokenizer, {*held_out}, 33), 8, 0)
            rows.append([b["tokens"] for b, _ in islice(common.batches([stream], 64, seed=0), 4)])
    _, state, step = make_step(gpt_train, gpt_train.build(cfg, tokenizer), cfg)
    for line, *parts in zip(lines("whole"), *rows):
        state, metrics = step(state, np.concatenate(parts), jax.random.key(0))
        assert float(metrics["loss"]) == pytest.approx(line["loss"], rel=1e-4)


def test_fused_attention_is_for_gpus_that_have_it(monkeypatch):
    q = jnp.zeros((4, 8, 2, 64), jnp.bfloat16)
    for capability in (None, "7.5", "gfx942", "8.0", "9.0", "12.0"):
        monkeypatch.setattr(jax, "devices", lambda c=capability: [SimpleNamespace(compute_capability=c)])
        assert common.attention_kernel(q) == ("cudnn" if str(capability).endswith(".0") else None)
        assert common.attention_kernel(q.astype(jnp.float32)) is None
        assert common.attention_kernel(q[..., :20]) is None


# ---- bert_mlm.py: the model against transformers' PyTorch BERT ----


def tiny_bert(seed=0, pre_norm=False, head="mlm", dtype="float32", remat=False, **changes):
    sizes = dict(vocab_size=199, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3)
    sizes |= dict(intermediate_size=96, max_position_embeddings=48)
    sizes |= dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    config = (MegatronBertConfig if pre_norm else BertConfig)(**sizes | changes)
    model = bert_mlm.BERT(config, head=head, dtype=dtype, remat=remat, rngs=nnx.Rngs(seed))
    return randomised(model)


def padded(B, T, seed=0, V=199):
    """Tokens (B, T) of rows of unequal length, their lengths, and token types."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[T], rng.integers(2, T, B - 1)]).astype(np.int32)
    tokens = np.where(np.arange(T) < lengths[:, None], rng.integers(5, V, (B, T)), 0).astype(np.int32)
    return tokens, lengths, (np.arange(T) > lengths[:, None] // 2).astype(np.int32)


@cache
def masker(V=199, special=5, share=0.15):
    """mask_tokens, compiled, for a vocabulary whose first ids are special."""
    rules = dict(special=np.arange(V) < special, ordinary=np.arange(special, V, dtype=np.int32), mask=4)
    return jax.jit(partial(bert_mlm.mask_tokens, rules=rules, share=share))


def mlm_batch(B=4, T=33, seed=0):
    """A batch as the train step sees it after masking, with rows of unequal length and weight."""
    tokens, lengths, _ = padded(B, T, seed)
    return masker()(jax.random.key(seed), tokens) | dict(lengths=lengths)


def torch_inputs(**arrays):
    import torch

    return {name: torch.tensor(np.asarray(x)).long() for name, x in arrays.items()}


def torch_loss(theirs, batch):
    """Loss of transformers' model on the same masked batch: labels are -100 where nothing is asked."""
    tokens = np.asarray(batch["tokens"])
    labels = np.full(tokens.shape, -100)
    for row, (at, targets, weights) in enumerate(zip(batch["positions"], batch["targets"], batch["weights"])):
        labels[row, at[weights > 0]] = targets[weights > 0]
    mask = np.arange(tokens.shape[1]) < np.asarray(batch["lengths"])[:, None]
    return theirs(**torch_inputs(input_ids=tokens, attention_mask=mask, labels=labels)).loss


def masked_loss(model, batch, key=None):
    sums = bert_mlm.loss_sum(model, batch, key)
    return sums["nats"] / sums["count"]


@pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])
def test_bert_logits_loss_gradients_and_ten_steps_equal_transformers(pre_norm):
    pytest.importorskip("torch")
    from transformers import AutoModelForMaskedLM

    model = tiny_bert(pre_norm=pre_norm)
    bert_mlm.save_pretrained(model, "model")
    theirs, info = AutoModelForMaskedLM.from_pretrained("model", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.eval()

    tokens, lengths, types = padded(4, 33)
    mask = np.arange(33) < lengths[:, None]
    inputs = torch_inputs(input_ids=tokens, attention_mask=mask, token_type_ids=types)
    wanted = theirs(**inputs).logits.detach().numpy()
    logits = np.asarray(model.mlm_logits(forward(model, tokens, lengths, types)))
    np.testing.assert_allclose(logits[mask], wanted[mask], atol=1e-4)

    batch = mlm_batch()
    loss = torch_loss(theirs, batch)
    loss.backward()
    ours, grads = nnx.jit(nnx.value_and_grad(masked_loss))(model, batch)
    assert abs(ours - loss.item()) < 1e-5
    wanted, grads = dict(theirs.named_parameters()), bert_mlm.checkpoint_names(grads)
    assert {*grads} == {*wanted} - {*bert_mlm.TIED}
    for name, grad in grads.items():
        grad, right = np.asarray(grad[...]), wanted[name].grad.numpy()
        grad = grad.T if bert_mlm.is_kernel(name) else grad
        np.testing.assert_allclose(grad[: len(right)], right, atol=2e-5, err_msg=name)
        assert not np.any(grad[len(right) :]), "the padding of the vocabulary learns nothing"

    changes = dict(lr=1e-2, warmup_steps=3, steps=10, accum=2, grad_clip=0.5, weight_decay=0.1)
    cfg = bert_mlm.Config(optimizer="adamw", batch_size=4, **changes)
    graphdef, state, step = make_step(bert_mlm, model, cfg, lambda key, batch: batch)
    batches = [mlm_batch(seed=i) for i in range(10)]
    state = ten_adamw_steps(theirs, cfg, state, step, batches, torch_loss, betas=(0.9, 0.98), eps=1e-6)
    logits = theirs(**inputs).logits.detach().numpy()
    model = nnx.merge(graphdef, state)[0]
    ours = np.asarray(model.mlm_logits(forward(model, tokens, lengths, types)))
    np.testing.assert_allclose(ours[mask], logits[mask], atol=1e-3)


def test_bert_published_names_old_and_new_load_and_what_does_not_fit_is_refused():
    model, tokens = tiny_bert(), padded(3, 20)[0]
    bert_mlm.save_pretrained(model, "model")
    weights, config = load_file("model/model.safetensors"), json.loads(Path("model/config.json").read_text())
    encoder = {name: w for name, w in weights.items() if name.startswith("bert.")}
    extra = {"bert.embeddings.position_ids": np.arange(48)[None], "bert.pooler.dense.bias": np.ones(48)}
    old = {
        n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): w
        for n, w in weights.items()
    }
    twins = {twin: weights[name] for twin, name in bert_mlm.TIED.items()}
    under_twins = {name: w for name, w in weights.items() if name not in bert_mlm.TIED.values()} | twins
    bare = {n.removeprefix("bert."): w for n, w in (encoder | extra).items()}
    cases = dict(old=old | extra, encoder=encoder | extra, bare=bare, twins=under_twins, both=weights | twins)
    for case, names in cases.items():
        save_file(names, "model/model.safetensors")
        found = bert_mlm.from_pretrained("model")
        assert found.head == (None if case in ("encoder", "bare") else "mlm")
        np.testing.assert_array_equal(forward(found, tokens), forward(model, tokens), err_msg=case)
    wrong = {name: w + 1 for name, w in twins.items()}
    for names, message in (
        (encoder, "has no cls.predictions.bias, .*; needed for --task mlm"),
        (weights | wrong, "only tied ones are supported"),
        (weights | {"adapter.weight": np.ones(3)}, "adapter.weight"),
    ):
        save_file(names, "model/model.safetensors")
        with pytest.raises(common.UsageError, match=message):
            bert_mlm.from_pretrained("model", head="mlm")
    save_file(weights, "model/model.safetensors")
    fields = dict(hidden_act="relu", position_embedding_type="relative_key", is_decoder=True, vocab_size=198)
    for name, value in (fields | dict(tie_word_embeddings=False)).items():
        Path("model/config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(
            common.UsageError, match=name if name != "vocab_size" else "has 199 rows, not 198"
        ):
            bert_mlm.from_pretrained("model")


def test_bert_remat_dropout_and_bfloat16():
    batch, key, (tokens, lengths, _) = mlm_batch(), jax.random.key(0), padded(4, 33)
    rates = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    grads = [nnx.jit(nnx.grad(masked_loss))(tiny_bert(remat=r, **rates), batch, key) for r in (False, True)]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *grads)
    real, nearly = np.arange(33) < lengths[:, None], tiny_bert(attention_probs_dropout_prob=1e-9)
    fused = forward(nearly, tokens, lengths)
    np.testing.assert_allclose(forward(nearly, tokens, lengths, key=key)[real], fused[real], atol=1e-5)
    assert np.any(forward(tiny_bert(**rates), tokens, lengths, key=key) != fused)
    half = tiny_bert(dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    assert half.mlm_logits(forward(half, tokens)).dtype == jnp.float32
    np.testing.assert_allclose(forward(half, tokens).astype("f4"), forward(tiny_bert(), tokens), atol=0.15)


def test_bfloat16_gradients_at_32_768_tokens_are_those_of_float32():
    text = "".join(documents(JSON)[0]).encode()[: 32 * 1024]  # the space stands there some 8,000 times
    tokens = np.frombuffer(text, np.uint8).astype(np.int32).reshape(256, 128)
    sizes = dict(vocab_size=256, n_positions=128, n_embd=32, n_layer=1, n_head=2, embd_pdrop=0, attn_pdrop=0)
    gpt = partial(gpt_train.GPT, GPT2Config(**sizes, resid_pdrop=0))
    sizes = dict(vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(intermediate_size=64, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    bert, batch = partial(bert_mlm.BERT, BertConfig(**sizes)), masker(256)(jax.random.key(0), tokens)
    for create, loss, data in (
        (gpt, mean_loss, (tokens, np.roll(tokens, -1))),
        (bert, masked_loss, (batch,)),
    ):
        grad = nnx.jit(nnx.grad(loss))
        half, whole = (grad(create(dtype=d, rngs=nnx.Rngs(0)), *data) for d in ("bfloat16", "float32"))
        errors = {}
        for (path, ours), (_, right) in zip(nnx.to_flat_state(half), nnx.to_flat_state(whole)):
            error, size = (np.linalg.norm(x) for x in (ours[...] - right[...], right[...]))
            errors[".".join(map(str, path))] = float(error / size)
        # this one is 0 but for rounding: softmax does not see it
        errors.pop("bert.encoder.layer.0.attention.self.key.bias", None)
        assert max(e for name, e in errors.items() if "wte" in name or "word" in name) < 0.01, errors
        assert max(errors.values()) < 0.03, errors


# ---- bert_mlm.py: masking, training, evaluation ----


@pytest.mark.parametrize("share", [0.15, 0.3])
def test_bert_masking_hides_an_exact_count_of_ordinary_tokens_80_10_10(share):
    new, old = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        tokens, lengths, _ = padded(512, 64, seed, V=200)
        tokens[rng.random(tokens.shape) < 0.02] = 3
        tokens[:, 0], tokens[np.arange(512), lengths - 1] = 2, 3
        tokens[np.arange(64) >= lengths[:, None]] = 0
        out = jax.device_get(masker(200, 5, share)(jax.random.key(seed), tokens))
        places, (rows, at) = np.zeros(tokens.shape, bool), np.nonzero(out["weights"])
        places[rows, out["positions"][rows, at]] = True
        n = np.sum(tokens >= 5, axis=1)
        assert not np.any(places & (tokens < 5)), "never [CLS], [SEP] or [PAD]"
        wanted = np.where(n, np.maximum(1, np.floor(share * n + 0.5)), 0)
        np.testing.assert_array_equal(places.sum(1), wanted, "and no position twice")
        assert out["positions"].shape == (512, math.floor(share * 64 + 0.5))
        np.testing.assert_array_equal(out["targets"], np.take_along_axis(tokens, out["positions"], 1))
        assert np.all(out["tokens"][~places] == tokens[~places]), "nothing else changes"
        new, old = np.append(new, out["tokens"][places]), np.append(old, tokens[places])
    masked, kept, random = np.mean(new == 4), np.mean(new == old), new[(new != 4) & (new != old)]
    assert len(new) > 15_000 and abs(masked - 0.8) < 0.01 and abs(kept - 0.1 - 0.1 / 195) < 0.01
    assert random.min() == 5 and random.max() == 199, "any ordinary token, no special one"
    other = masker(200, 5, share)(jax.random.key(9), tokens)
    assert np.any(other["positions"] != out["positions"]), "keyed by the step"


def test_bert_accumulation_draws_the_masks_of_one_large_batch_and_weighs_targets_alike():
    prepare, results = lambda key, batch: masker()(key, batch["tokens"]), []
    for accum in (1, 4):  # rows with few tokens would count for more in a mean of means
        cfg = bert_mlm.Config(optimizer="adamw", steps=10, warmup_steps=0, accum=accum, batch_size=8)
        _, state, step = make_step(bert_mlm, tiny_bert(num_hidden_layers=1), cfg, prepare)
        results.append(step(state, dict(tokens=padded(8, 33)[0]), jax.random.key(0))[1])
    for name, value in results[1].items():
        assert value == pytest.approx(float(results[0][name]), rel=1e-4), name


def test_bert_evaluation_is_a_mean_over_targets_in_any_batch_size():
    model, rows = tiny_bert(), jax.device_get(mlm_batch(B=10))
    graphdef, state = nnx.split((model,))
    mesh = common.make_mesh()
    step = bert_mlm.make_eval_step(graphdef, mesh)
    found = [bert_mlm.evaluate(step, state, rows, size, mesh) for size in (4, 10)]
    sums = nnx.jit(bert_mlm.loss_sum)(model, rows)
    assert found[0]["val_loss"] == pytest.approx(float(sums["nats"] / sums["count"]), rel=1e-5)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0]["val_acc"] == pytest.approx(float(sums["hits"] / rows["weights"].sum()))


@pytest.fixture(scope="session")
def tokenizer():
    return bert_mlm.load_tokenizer("bpe:300", documents(JSON)[0])


@pytest.fixture(scope="session")
def bert_folder(tokenizer, tmp_path_factory):
    """The folder of a small random BERT with its tokenizer."""
    path = tmp_path_factory.mktemp("bert") / "model"
    model = tiny_bert(vocab_size=len(tokenizer), max_position_embeddings=64)
    bert_mlm.save_pretrained(model, path, tokenizer)
    return str(path)


def test_bert_rows_hold_the_documents_but_for_those_held_out(tokenizer):
    texts, epochs = documents(JSON)[0], []
    for seed in range(2):
        records, rng = {"text": texts}, np.random.default_rng(seed)
        rows = np.stack([row["tokens"] for row in bert_mlm.pack(tokenizer, {texts[0]}, 32, records, rng)])
        assert np.all(rows[:, 0] == 2) and np.all(rows[:, -1] == 3) and not np.any(rows == 0), "no padding"
        inner = [tokenizer.decode(row[1:-1]).split("[SEP]")[0] for row in rows]
        assert sum(map(len, inner)) > 0.95 * sum(map(len, texts[1:]))
        assert sum(text in texts[0] for text in inner) < 0.1 * len(rows), "held out"
        assert all(any(text in document for document in texts) for text in inner)
        epochs.append({tuple(row) for row in rows})
    assert len(epochs[0] & epochs[1]) < 0.1 * len(epochs[0]), "another cut in every epoch"
    cfg = bert_mlm.Config(**BERT)
    sources = common.open_data(cfg, {"text": None})
    tokenizer, make_rows, val_rows, _ = bert_mlm.prepare_mlm(cfg, sources, "bpe:300")
    assert make_rows.args[1] == {texts[0]}
    shown = val_rows["tokens"].copy()
    np.put_along_axis(shown, val_rows["positions"], val_rows["targets"], axis=1)
    wanted = bert_mlm.encode(tokenizer, [texts[0]])[0]
    found = np.concatenate([row[1 : n - 1] for row, n in zip(shown, val_rows["lengths"])])
    np.testing.assert_array_equal(found, wanted, "every token once")
    ids = bert_mlm.encode(tokenizer, ["a [MASK] b [SEP]"])[0]
    assert not {*ids} & {*tokenizer.all_special_ids}, "text that looks like a special token is text"


def write_sentence_files(path, pooling, *, normalize=True, limits=None, about=None, more=()):
    layers = [
        ("Transformer", ""),
        ("Pooling", "1_Pooling"),
        *[("Normalize", "2_Normalize")] * normalize,
        *more,
    ]
    modules = [dict(idx=i, name=str(i), path=p, type=f"st.models.{k}") for i, (k, p) in enumerate(layers)]
    (path / "1_Pooling").mkdir(exist_ok=True)
    names = ("modules", "1_Pooling/config", "sentence_bert_config", "config_sentence_transformers")
    for name, content in zip(names, (modules, pooling, limits or {}, about or {})):
        (path / f"{name}.json").write_text(json.dumps(content))


MEAN = dict(pooling_mode_mean_tokens=True)
CLS = dict(pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
ROOT = dict(pooling_mode_mean_tokens=False, pooling_mode_mean_sqrt_len_tokens=True)
PROMPTS, SHORT = dict(prompts=dict(q="query: "), default_prompt_name="q"), dict(max_seq_length=8)
SENTENCES = {  # 1_Pooling, the other files, and (pooling, normalised, length, prompt) or what is said
    "plain folder": (None, {}, ("mean", True, 64, "")),
    "mean": (MEAN, {}, ("mean", True, 64, "")),
    "not normalised": (CLS, dict(normalize=False), ("cls", False, 64, "")),
    "another spelling": (dict(pooling_mode="cls"), {}, ("cls", True, 64, "")),
    "length": (MEAN, dict(limits=SHORT), ("mean", True, 8, "")),
    "prompt": (MEAN, dict(about=PROMPTS), ("mean", True, 64, "query: ")),
    "max": (CLS | dict(pooling_mode_max_tokens=True), {}, "pooling is cls+max, only mean or cls"),
    "root of length": (ROOT, {}, "pooling is mean_sqrt_len"),
    "dense": (MEAN, dict(more=[("Dense", "3_Dense")]), "has Transformer, Pooling, Normalize, Dense; only"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_bert_embeddings_are_those_of_pytorch_and_sentence_transformers(case, bert_folder, typed):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel

    pooling, files, wanted = SENTENCES[case]
    shutil.copytree(bert_folder, "model")
    if pooling:
        write_sentence_files(Path("model"), pooling, **files)
    texts = ["import json", "class JSONDecoder(object): pass", "x " * 90, "", "y"]
    Path("texts.txt").write_text("\n".join(texts) + "\n")
    args = flags(steps=0, init_from="model", embed="texts.txt")
    code, _, err = typed(bert_mlm, *args)
    if isinstance(wanted, str):
        assert code == 2 and wanted in err
        return
    assert code == 0, err
    theirs, inputs = AutoModel.from_pretrained("model").eval(), AutoTokenizer.from_pretrained("model")
    mode, normalize, length, prompt = wanted
    options = dict(padding=True, return_tensors="pt", return_token_type_ids=False, truncation=True)
    inputs = inputs([prompt + text for text in texts], max_length=length, **options)
    hidden, mask = theirs(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    vectors = hidden[:, 0] if mode == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    vectors = torch.nn.functional.normalize(vectors) if normalize else vectors
    np.testing.assert_allclose(np.load("texts.npy"), vectors.detach(), atol=1e-5)
    code, _, err = typed(bert_mlm, *args)
    assert code == 2 and "texts.npy exists; --overwrite to replace it" in err


def test_bert_fill_mask_gives_the_likeliest_tokens_of_each_mask(bert_folder, tokenizer, typed):
    model, texts = bert_mlm.from_pretrained(bert_folder), ["import [MASK] as np", "a [MASK] and [MASK]"]
    fills = bert_mlm.fill_mask(model, tokenizer, texts)
    ids = AutoTokenizer.from_pretrained(bert_folder)(texts[1])["input_ids"]
    at = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
    logits = model.mlm_logits(forward(model, np.array([ids])))[0]
    for place, best in zip(at, fills[1:]):
        p = np.asarray(jax.nn.softmax(logits[place]))
        np.testing.assert_allclose([x for x, _ in best], np.sort(p)[::-1][:5], rtol=1e-4)
        assert best[0][1] == tokenizer.decode([*ids[1:place], int(p.argmax()), *ids[place + 1 : -1]])
    code, out, _ = typed(bert_mlm, *flags(steps=0, init_from=bert_folder, prompt=texts[0]))
    assert code == 0 and len(out.splitlines()) == 5
    assert all(re.fullmatch(r" *\d+\.\d%  'import.* as np'", line) for line in out.splitlines())


# ---- bert_mlm.py: runs ----


def test_bert_run_leaves_a_folder_that_pytorch_loads():
    last = bert_mlm.main(bert_mlm.Config(**BERT, dropout=0.1, accum=2, out_dir="whole"))
    assert last["val_loss"] < lines("whole")[5]["val_loss"] < math.log(300) and 0 <= last["val_acc"] <= 1
    same = BERT | dict(steps=0, init_from="whole", tokenizer=None)
    again = bert_mlm.main(bert_mlm.Config(**same))
    assert again["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    tuned = bert_mlm.main(bert_mlm.Config(**same | dict(steps=2, lr=1e-4, out_dir="tuned")))
    assert tuned["val_loss"] < lines("whole")[5]["val_loss"], "it starts where the other ended"

    torch = pytest.importorskip("torch")
    from transformers import AutoModelForMaskedLM

    tokenizer = AutoTokenizer.from_pretrained("whole")
    ids = tokenizer("import [MASK] as np")["input_ids"]
    assert tokenizer.decode(ids) == "[CLS]import[MASK] as np[SEP]" and tokenizer.model_max_length == 32
    model, theirs = bert_mlm.from_pretrained("whole"), AutoModelForMaskedLM.from_pretrained("whole")
    wanted = theirs.eval()(torch.tensor([ids])).logits.detach()
    np.testing.assert_allclose(model.mlm_logits(forward(model, np.array([ids]))), wanted, atol=1e-4)


CLASSIFY = BERT | dict(task="classify", data=("reviews.parquet",), val_docs=60, batch_size=16, steps=60)
CLASSIFY |= dict(eval_every=30, ckpt_every=20, lr=1e-2, n_layer=2)


def write_reviews(names, n=400):
    """reviews.parquet: the class of a text is its first word, the labels stand in the order of `names`."""
    rng = np.random.default_rng(0)
    words = rng.choice(["bad", "fine", "good"], n).tolist()
    texts = [
        f"{w} {' '.join(rng.choice(['so', 'it', 'was'], rng.integers(1, 9)))} {i}"
        for i, w in enumerate(words)
    ]
    order = [name.removeprefix("very ") for name in names or ["bad", "fine", "good"]]
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features(text=datasets.Value("string"), label=label)
    rows = dict(text=texts, label=[order.index(word) for word in words])
    datasets.Dataset.from_dict(rows, features=features).to_parquet("reviews.parquet")


def test_bert_classifier_learns_resumes_and_matches_its_classes_by_name(typed):
    pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    write_reviews(["bad", "fine", "good"])
    last = bert_mlm.main(bert_mlm.Config(**CLASSIFY, out_dir="whole"))
    assert last["val_acc"] > 0.95
    kill_after(30, bert_mlm, "killed", *flags(**CLASSIFY))
    assert typed(bert_mlm, "--resume", "--out-dir", "killed")[0] == 0
    assert lines("killed") == lines("whole")
    config = json.loads(Path("whole/config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "fine", "2": "good"}

    theirs, tokenizer = AutoModelForSequenceClassification.from_pretrained("whole").eval(), AutoTokenizer
    texts = ["good it was", "fine", "bad so it was so"]
    inputs = tokenizer.from_pretrained("whole")(texts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    model, wanted = bert_mlm.from_pretrained("whole"), theirs(**inputs).logits.detach()
    tokens, lengths = inputs["input_ids"].numpy().astype(np.int32), inputs["attention_mask"].sum(1).numpy()
    np.testing.assert_allclose(model.class_logits(forward(model, tokens, lengths)), wanted, atol=1e-4)
    assert [config["id2label"][str(int(i))] for i in wanted.argmax(1)] == ["good", "fine", "bad"]

    evaluated = CLASSIFY | dict(steps=0, init_from="whole", tokenizer=None)
    tuned = evaluated | dict(steps=2, lr=1e-6, overwrite=True, out_dir="tuned")
    others = ["very bad", "very fine", "very good"]
    for names, known in ((["good", "bad", "fine"], True), (None, True), (others, False)):
        write_reviews(names)
        if known:
            assert bert_mlm.main(bert_mlm.Config(**evaluated))["val_acc"] == last["val_acc"]
        else:
            with pytest.raises(common.UsageError, match="are bad, fine, good, and the data's very bad"):
                bert_mlm.main(bert_mlm.Config(**evaluated))
        found = bert_mlm.main(bert_mlm.Config(**tuned))
        assert (found["val_acc"] > 0.95) == known, "other names are a new head"
        exported = json.loads(Path("tuned/config.json").read_text())["id2label"].values()
        assert [*exported] == (names or ["bad", "fine", "good"])


@pytest.mark.parametrize("preset", bert_mlm.PRESETS)
def test_bert_every_preset_trains(preset, typed):
    write_reviews(None)
    small = BERT | dict(preset=preset, steps=2, batch_size=8, device_rows=8, out_dir="a", data_name=("-",))
    small |= dict(data=("reviews.parquet",)) if preset == "classify" else {}
    code, _, err = typed(bert_mlm, *flags(**small | dict(val_docs=4)))
    assert code == 0 and lines("a")[-1]["step"] == 2, err


def train_resnet(**changes):
    return resnet_stream.main(resnet_stream.Config(**RESNET | changes))


def photograph(width=120, height=90):
    """A smooth picture in which left is red, right is green and the bottom is blue."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([255 - x, x, y], axis=-1).astype(np.uint8)


def write_folder(root, n=12, classes=("dark", "light"), size=(40, 48)):
    """Class folders with `n` pictures each, the first class the darkest."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        for j in range(n):
            pixels = np.uint8(rng.integers(0, 90, (*size, 3)) + 150 * i // max(1, len(classes) - 1))
            Path(root, name).mkdir(parents=True, exist_ok=True)
            Path(root, name, f"{j}.png").write_bytes(png(pixels))
    return str(root)


def write_parquet(path, rows, label):
    features = datasets.Features(image=datasets.Image(), label=label)
    datasets.Dataset.from_list(rows).cast(features).to_parquet(path)


def tiny_resnet(kind="basic", stem="cifar", classes=tuple("abcdefg"), size=32, dtype="float32", **options):
    """A small ResNet with every parameter and statistic random."""
    sizes = dict(depths=[1, 2], hidden_sizes=[16, 32], embedding_size=8, layer_type=kind)
    config = ResNetConfig(**sizes, **common.label_names(classes), stem=stem)
    view = resnet_stream.new_view(size, 0.875)
    model = resnet_stream.ResNet(config, view, dtype=dtype, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(0)
    for name, param in resnet_stream.checkpoint_names(model).items():
        if param.ndim == 1:
            is_scale = name.endswith(("_var", "normalization.weight"))
            values = rng.uniform(0.5, 1.5, param.shape) if is_scale else 0.3 * rng.normal(size=param.shape)
            param.set_value(jnp.asarray(values.astype(np.float32)))
    return model


def random_images(B=4, S=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (B, S, S, 3)).astype(np.uint8)


@nnx.jit
def see(model, images, train=False, key=None):
    return model(model.view.normalise(images), train=train, key=key)


def stepper(model, **changes):
    """(state, step, merge) to train `model`; merge(state) is (model, optimizer, average)."""
    cfg = dict(warmup_steps=0, weight_decay=0.0, ema=0.0, mixup=0.0, label_smoothing=0.0) | changes
    cfg = resnet_stream.Config(**cfg)
    schedule = resnet_stream.make_schedule(cfg)
    optimizer = nnx.Optimizer(model, resnet_stream.make_optimizer(cfg, schedule), wrt=nnx.Param)
    average = jax.tree.map(jnp.copy, model) if cfg.ema else None
    graphdef, state = nnx.split((model, optimizer, average))
    state = common.shard_state(common.make_mesh(), state, fsdp=False)
    step = resnet_stream.make_train_step(graphdef, state, cfg, schedule)
    return state, step, partial(nnx.merge, graphdef)


def arrays(model):
    """{transformers' name: array in PyTorch's layout} of parameters and statistics."""
    layout = lambda w: w.transpose(3, 2, 0, 1) if w.ndim == 4 else w.T
    return {n: layout(np.asarray(p[...])) for n, p in resnet_stream.checkpoint_names(model).items()}


# ---- resnet_stream.py: the model ----


@pytest.mark.parametrize("kind, stem", [("bottleneck", "imagenet"), ("basic", "cifar")])
def test_resnet_logits_gradients_statistics_and_ten_steps_equal_pytorch(kind, stem):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForImageClassification

    torch.set_num_threads(1)  # more of them stand in each other's way where a core is busy
    model = tiny_resnet(kind, stem)
    to_torch = lambda images: torch.tensor(np.asarray(model.view.normalise(images))).permute(0, 3, 1, 2)
    resnet_stream.save_pretrained(model, "model")
    own = dict(trust_remote_code=True) if stem == "cifar" else {}  # transformers has no such stem
    theirs = AutoModelForImageClassification.from_pretrained("model", **own).eval()
    images = random_images()
    wanted = theirs(to_torch(images)).logits.detach()
    np.testing.assert_allclose(see(model, images), wanted, atol=1e-4)
    again = resnet_stream.from_pretrained("model")
    np.testing.assert_array_equal(see(again, images), see(model, images))

    theirs.train()
    decayed, rest = ([p for p in theirs.parameters() if (p.ndim >= 2) is big] for big in (True, False))
    groups = [{"params": decayed, "weight_decay": 1.0}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=1, momentum=0.9, nesterov=True)
    how = dict(lr=2e-3, warmup_steps=3, steps=10, weight_decay=1.0, label_smoothing=0.1)
    state, step, merge = stepper(model, **how)
    for i in range(10):
        images, labels = random_images(8, seed=i), np.arange(8) % 7
        state, metrics = step(state, images, labels, jax.random.key(i))
        logits = theirs(to_torch(images)).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in theirs.parameters()))
        lr, before = float(metrics["lr"]), {n: p.detach().clone() for n, p in theirs.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), abs=3e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-3)
        if i == 0:  # how far each weight went tells its gradient
            found = arrays(merge(state)[0])
            for name, p in theirs.named_parameters():
                wanted = p.grad + before[name] * (p.ndim >= 2)
                grad = (before[name].numpy() - found[name]) / (1.9 * lr)  # Nesterov: 1 + momentum
                np.testing.assert_allclose(grad, wanted, atol=5e-4, rtol=2e-3, err_msg=name)
    found, wanted = arrays(merge(state)[0]), theirs.state_dict()
    assert {name for name in wanted if "num_batches" not in name} == {*found}
    for name, w in found.items():
        np.testing.assert_allclose(w, wanted[name], atol=1e-4, rtol=1e-3, err_msg=name)


def test_resnet_every_depth_has_the_published_number_of_parameters_and_init():
    for depth, millions in {18: 11.69, 34: 21.80, 50: 25.56, 101: 44.55, 152: 60.19}.items():
        config = resnet_stream.resnet_config(depth, 64, "imagenet", range(1000))
        model = nnx.eval_shape(lambda config=config: resnet_stream.ResNet(config, None, rngs=nnx.Rngs(0)))
        count = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
        assert round(count / 1e6, 2) == millions
    config = resnet_stream.resnet_config(50, 16, "imagenet", range(10))
    config.update(dict(depths=[2, 1, 1]))
    model = resnet_stream.ResNet(config, None, rngs=nnx.Rngs(0))
    first, second = model.stages[0][1], model.stages[1][0]
    std = float(np.std(second.layer[1].convolution.kernel[...]))
    assert std == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.05), "He's, by fan out"
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 64))
    np.testing.assert_array_equal(first(x, False), x)  # the identity, but for the relu
    assert [layer.convolution.strides for layer in second.layer] == [1, 2, 1], "v1.5"
    assert np.abs(model.classifier.kernel[...]).max() <= 1 / math.sqrt(256)


def test_resnet_published_names_load_and_what_changes_the_numbers_is_refused_by_name(capsys):
    model, images = tiny_resnet(), random_images()
    resnet_stream.save_pretrained(model, "ours")
    weights = load_file("ours/model.safetensors")
    torchvision = {resnet_stream.torchvision_name(name): w for name, w in weights.items()}
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "fc.bias"} < {*torchvision}
    assert {"layer2.0.downsample.1.bias", "layer2.1.bn2.num_batches_tracked"} < {*torchvision}
    folder = Path("other")
    folder.mkdir()
    config = json.loads(Path("ours/config.json").read_text())

    def load(weights=weights, **changes):
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | changes))
        return resnet_stream.from_pretrained(str(folder))

    for other in (torchvision, {name.removeprefix("resnet."): w for name, w in weights.items()}):
        loaded = load(other, stem="cifar")
        np.testing.assert_array_equal(see(loaded, images), see(load(), images))
    refused = {"downsample_in_bottleneck": True, "downsample_in_first_stage": True, "num_channels": 1}
    for name, value in (refused | {"hidden_act": "gelu", "stem": "deep"}).items():
        with pytest.raises(common.UsageError, match=f"{name} is {value}, only"):
            load(**{name: value})
    extra = {"resnet.embedder.se.weight": np.zeros(3, np.float32)}
    with pytest.raises(common.UsageError, match=r"se\.weight.* has no place in a ResNet"):
        load(weights | extra)
    with pytest.raises(common.UsageError, match=r"classifier.* is \(7,\), expected \(3,\)"):
        load(id2label={"0": "a", "1": "b", "2": "c"}, label2id={})
    with pytest.raises(common.UsageError, match=r"classifier\.1\.bias is missing"):
        load({name: w for name, w in weights.items() if name != "classifier.1.bias"})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(common.UsageError, match=r"no model.safetensors in it"):
        resnet_stream.from_pretrained(str(folder))
    assert capsys.readouterr().out == ""


def test_resnet_bfloat16_remat_accumulation_mixup_ema_and_dropout():
    images, labels = random_images(4), np.arange(4)
    half, full = tiny_resnet(dtype="bfloat16"), tiny_resnet()
    assert {p.dtype for p in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    out = see(half, images)
    assert (
        out.dtype == jnp.float32 and half.embedder(images.astype(jnp.bfloat16), False).dtype == jnp.bfloat16
    )
    np.testing.assert_allclose(out, see(full, images), atol=0.3)
    dropping = tiny_resnet(dropout=0.5)
    np.testing.assert_array_equal(see(dropping, images), see(full, images))
    draws = [see(dropping, images, key=jax.random.key(i)) for i in (0, 1)]
    assert np.any(draws[0] != draws[1])

    def stepping(model=full, **changes):
        """(images, labels, seed) -> ((model, optimizer, average), metrics), from the same start each time."""
        state, step, merge = stepper(jax.tree.map(jnp.copy, model), **changes)

        def run(images, labels, seed=0):
            after, metrics = step(jax.tree.map(jnp.copy, state), images, labels, jax.random.key(seed))
            return merge(after), {name: float(value) for name, value in metrics.items()}

        return run

    plain, mixed = stepping(), stepping(mixup=0.4)
    (model, _, _), whole = plain(images, labels)
    # two equal microbatches are one of them; the statistics move twice
    in_two = stepping(tiny_resnet(remat=True), accum=2, batch_size=8)
    (parts, _, _), metrics = in_two(np.repeat(images, 2, axis=0), np.repeat(labels, 2))
    assert metrics == pytest.approx(whole, rel=1e-4)
    before, once, twice = (arrays(m) for m in (full, model, parts))
    for name, w in before.items():
        times = 1.9 if "running" in name else 1
        np.testing.assert_allclose(twice[name] - w, times * (once[name] - w), rtol=1e-3, atol=2e-5)
    # where each picture stands opposite to itself mixup does nothing; else it mixes two losses
    same = np.concatenate([images[:2], images[1::-1]]), np.array([0, 1, 1, 0])
    assert mixed(*same)[1]["loss"] == pytest.approx(plain(*same)[1]["loss"], rel=1e-5)
    found = [mixed(images, labels, seed)[1]["loss"] for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2] and found[0] != whole["loss"]
    (model, _, mean), _ = stepping(ema=0.05)(images, labels)
    new, averaged = arrays(model), arrays(mean)
    for name, w in before.items():
        np.testing.assert_allclose(averaged[name], 0.05 * w + 0.95 * new[name], atol=1e-6)


# ---- resnet_stream.py: pictures ----


def test_resnet_odd_pictures_come_out_right():
    true = Image.fromarray(photograph())
    flat = Image.new("RGB", (40, 30), (200, 30, 60))
    clear = flat.convert("RGBA")
    clear.putalpha(Image.fromarray(np.uint8(np.repeat([[255, 0]], 30, 0).repeat(20, 1))))
    grey = np.asarray(true.convert("L"))
    greys, deep = np.repeat(grey[..., None], 3, -1), Image.fromarray(grey.astype(np.uint16) * 257)
    turned, exif = true.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be seen turned by 90 degrees clockwise
    told = PngImagePlugin.PngInfo()
    told.add_text("comment", "long " * 500_000, zip=True)
    palette = flat.convert("P", palette=Image.Palette.ADAPTIVE)
    white = np.asarray(flat).copy()
    white[:, 20:] = 255
    bits = true.convert("L").point(lambda v: 255 * (v > 127)).convert("1")
    table = {  # file, what is to be seen, how far off it may be
        "png": (png(true), true, 0),
        "jpeg": (png(true, "jpeg", quality=95), true, 12),
        "jpeg, turned": (png(turned, "jpeg", quality=95, exif=exif), true, 12),
        "png, turned": (png(turned, exif=exif), true, 0),
        "long metadata": (png(true, pnginfo=told), true, 0),
        "four colours of print": (png(true.convert("CMYK"), "jpeg", quality=95), true, 12),
        "palette": (png(palette), flat, 0),
        "gif": (png(palette, "gif"), flat, 0),
        "grey": (png(true.convert("L")), greys, 1),
        "16 bits": (png(deep), greys, 1),
        "1 bit": (png(bits), (greys > 127) * 255, 0),
        "transparent": (png(clear), white, 0),
        "transparent palette": (png(clear.quantize(4)), white, 8),
    }
    for name, (data, wanted, most) in table.items():
        off = np.asarray(resnet_stream.open_image(data)).astype(int) - np.asarray(wanted)
        assert np.abs(off).max() <= most, name
    assert (np.asarray(resnet_stream.open_image(png(clear.convert("LA"))))[:, 20:] == 255).all()


def test_resnet_crops_are_what_their_key_says():
    data = png(photograph(640, 480), "jpeg", quality=95)
    for crop in ("pad", "resized"):
        cfg = resnet_stream.Config(crop=crop, crop_pad=8, flip=True)
        draws = [resnet_stream.training_crop(cfg, 64, data, key).astype(int) for key in [0, *range(200)]]
        assert draws[0].shape == (64, 64, 3)
        assert (draws[0] == draws[1]).all() and (draws[1] != draws[2]).any()
        assert 70 < sum(draw[32, 20, 0] < draw[32, 43, 0] for draw in draws) < 130, "red is on the left"
    boxes = [resnet_stream.random_box(640, 480, 0.25, np.random.default_rng(i)) for i in range(300)]
    left, top, right, bottom = np.array(boxes).T
    assert (left >= 0).all() and (top >= 0).all() and (right <= 640).all() and (bottom <= 480).all()
    share, shape = (right - left) * (bottom - top) / (640 * 480), (right - left) / (bottom - top)
    assert share.min() > 0.25 and share.max() < 1 and 0.5 < share.mean() < 0.65
    assert shape.min() >= 0.75 - 1e-6 and shape.max() <= 4 / 3 + 1e-6
    files = [png(photograph(4 * n, 3 * n), "jpeg", quality=95) for n in (60, 600)]
    cfg = resnet_stream.Config(crop_pad=0)
    small, large = (resnet_stream.training_crop(cfg, 40, file, 0).astype(int) for file in files)
    assert np.abs(small - large).max() < 8, "a large jpeg comes at a part of its size"


BIT = dict(image_processor_type="BitImageProcessor", size={"shortest_edge": 64}, crop_size=56)
CONVNEXT = dict(feature_extractor_type="ConvNextFeatureExtractor", size=96, crop_pct=0.875, resample=3)
VIT = dict(image_processor_type="ViTImageProcessor", size={"height": 64, "width": 64})
PROCESSORS = {  # preprocessor_config.json, and why it is refused
    "crops": (BIT, None),
    "of microsoft/resnet-50": (CONVNEXT, None),
    "squashes": (VIT, None),
    "does not normalise": (BIT | dict(do_normalize=False), None),
    "rescales otherwise": (BIT | dict(rescale_factor=1 / 127.5), None),
    "none": (None, None),  # transformers' default for a ResNet
    "does not crop": (BIT | dict(do_center_crop=False), "pictures come out as"),
    "flips channels": (BIT | dict(do_flip_channel_order=True), "do_flip_channel_order: not supported"),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_resnet_evaluation_sees_what_transformers_image_processor_makes_of_a_picture(case):
    pytest.importorskip("torch")
    from transformers import AutoImageProcessor, ConvNextImageProcessorPil

    resnet_stream.save_pretrained(tiny_resnet(), "model")
    (settings, refused), path = PROCESSORS[case], Path("model/preprocessor_config.json")
    colours = dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    path.write_text(json.dumps(colours | (settings or {})))
    if settings is None:
        path.unlink()
    if refused:
        with pytest.raises(common.UsageError, match=f"preprocessor_config.json: {refused}"):
            resnet_stream.from_pretrained("model")
        return
    view = resnet_stream.from_pretrained("model").view
    load = partial(AutoImageProcessor.from_pretrained, "model", backend="pil")
    processor = load() if settings else ConvNextImageProcessorPil()
    for size in ((200, 150), (150, 200), (57, 80)):
        data = png(photograph(*size))
        theirs = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
        ours = view.normalise(view.pixels(resnet_stream.open_image(data)))
        np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=1e-5)
    resnet_stream.save_pretrained(resnet_stream.from_pretrained("model"), "again")
    again = resnet_stream.from_pretrained("again", size=2 * view.size).view
    assert again.size == 2 * view.size
    np.testing.assert_allclose(again.slope, view.slope, rtol=1e-6)


# ---- resnet_stream.py: data ----


def open_rows(cfg, n):
    """(batches of n training pictures, validation rows), of 8 x 8 pixels, as `main` reads them."""
    (source,), val = resnet_stream.open_sources(cfg)
    crop = partial(resnet_stream.training_crop, cfg, 8)
    decode = partial(resnet_stream.decode, crop, val[0][1], False, cfg.retries)
    streams = [source.stream(resnet_stream.make_rows, cfg.shuffle_buffer, cfg.seed)]
    batches = common.batches(streams, n, seed=cfg.seed, decode=decode)
    held_out = [*resnet_stream.validation_rows(val, resnet_stream.new_view(8, 1.0), 0)]
    return batches, held_out


def test_resnet_held_out_pictures_are_never_trained_on_and_all_others_are():
    folder, cfg = Path(write_folder("a", 40)), resnet_stream.Config(data=("a",), val_every=4, crop_pad=0)
    for i in range(40):  # every dark picture recurs, with another label
        (folder / f"light/again{i}.png").write_bytes((folder / f"dark/{i}.png").read_bytes())
    _, held = open_rows(cfg, 1)
    assert 12 < len(held) < 60
    batches, _ = open_rows(cfg, 120 - len(held))
    key = lambda image: np.asarray(image).tobytes()
    epochs = [[key(image) for image in next(batches)[0]["image"]] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1], "another order"
    assert len({*epochs[0]} | {key(row["image"]) for row in held}) == 80, "nothing is lost"
    assert not {*epochs[0]} & {key(row["image"]) for row in held}


def test_resnet_corrupt_pictures_are_skipped_and_counted(capfd):
    write_folder("a", 30)
    good = Path("a/dark/0.png").read_bytes()
    bad = {"cut": good[:-900], "short": b"\x89", "text": b"no picture", "bits": good[:60] + b"?" * 900}
    bad["bomb"] = good[:16] + b"\x00\x01\xff\xff" * 2 + good[24:]  # says it has 10 billion pixels
    for name, data in bad.items():
        Path(f"a/light/{name}.png").write_bytes(data)
    batches, held = open_rows(resnet_stream.Config(data=("a",), val_every=5, shuffle_buffer=20), 5)
    several = (60 - len(held)) * 2 // 5 + 1  # a little more than two epochs
    *_, (_, position) = islice(batches, several)
    wrong = sum(zlib.crc32(data) % 5 != 0 for data in bad.values())
    assert 2 * wrong <= position["bad_records"] <= 3 * wrong
    said = capfd.readouterr().err
    assert said.count("skipped a record of batch") == position["bad_records"] and "a/light/cut.png: " in said


def test_resnet_picture_that_cannot_be_fetched_is_fetched_again_or_bad(monkeypatch, capfd):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    Path("a.png").write_bytes(png(photograph()))
    fetch = lambda name: {"bytes": None, "path": f"http://127.0.0.1:{server.server_port}/{name}"}
    faults, xopen = [ConnectionResetError("gone"), TimeoutError("slow")], resnet_stream.xopen

    def flaky(*args):
        if faults:
            raise faults.pop()
        return xopen(*args)

    monkeypatch.setattr(resnet_stream, "xopen", flaky)
    assert resnet_stream.read_file(fetch("a.png"), 2) == Path("a.png").read_bytes()
    said = capfd.readouterr().err
    assert "slow; try 1 of 2" in said and "gone; try 2 of 2" in said
    for missing in (fetch("b.png"), {"bytes": None, "path": "b.png"}):
        with pytest.raises(ValueError):
            resnet_stream.read_file(missing, 2)
    server.shutdown()
    server.server_close()
    with pytest.raises(common.RunError, match="the data failed 3 times in a row"):
        resnet_stream.read_file(fetch("a.png"), 2)


def test_resnet_labels_are_names(capsys):
    """A model that calls every picture "dark" is right for those, in whatever order and number they stand."""
    model = tiny_resnet(classes=("light", "dark"), size=8)
    model.classifier.bias.set_value(jnp.array([0.0, 100.0]))
    resnet_stream.save_pretrained(model, "model")
    write_folder("photos/train", 4)
    write_folder("photos/val", 6)
    for i in range(4):
        Path(f"photos/val/light/{i}.png").unlink()  # 6 dark, 2 light
    cfg = dict(data=("photos",), init_from="model", batch_size=3)
    assert train_resnet(**cfg, steps=0)["val_top1"] == 0.75
    train_resnet(**cfg, steps=1, lr=0.0, out_dir="same")
    assert lines("same")[-1]["val_top1"] == 0.75 and "head" not in capsys.readouterr().out
    assert resnet_stream.from_pretrained("same").config.id2label == {0: "dark", 1: "light"}
    # other names of the same number: a new head, and in evaluation an error
    write_folder("others", 6, ("cat", "dog"))
    cfg |= dict(data=("others",), val_every=2)
    with pytest.raises(common.UsageError, match="2, light, dark; those of the data are 2, cat, dog"):
        train_resnet(**cfg, steps=0)
    train_resnet(**cfg, steps=1, lr=0.0, out_dir="other")
    new = resnet_stream.from_pretrained("other")
    assert "head       new" in capsys.readouterr().out and new.config.id2label == {0: "cat", 1: "dog"}
    assert np.abs(new.classifier.bias[...]).max() < 1
    np.testing.assert_allclose(arrays(new)["classifier.1.bias"], 0, atol=1e-6)
    # so has a model without a head
    weights = load_file("model/model.safetensors")
    save_file({n: w for n, w in weights.items() if "classifier" not in n}, "model/model.safetensors")
    with pytest.raises(common.UsageError, match="its classes are none"):
        train_resnet(**cfg, steps=0)
    train_resnet(**cfg, steps=1, out_dir="headless")
    # numbers are as they stand, and so are ImageNet's 1,000, two of which models know by one name
    match = common.match_classes
    assert match(["LABEL_0", "LABEL_1"], ["b", "a"]) == match(["x", "y"], ["0", "1"]) == [0, 1]
    assert match([*"0123456789"], sorted("9876543210")) == [*range(10)]
    assert match([str(i) for i in range(11)], sorted(str(i) for i in range(11)))[2] == 10
    names = [f"class {i}" for i in range(1000)]
    assert match([*names[:999], names[0]], names) == [*range(1000)]
    assert match(names[:10], [*names[:9], "x"]) is None and match(["a", "b"], ["a", "b", "c"]) is None


# ---- resnet_stream.py: runs ----


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """(folder, last metrics) of a short run with everything on."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    return folder, train_resnet(**EVERYTHING, out_dir=str(folder))


def test_resnet_run_leaves_a_model_folder_that_pytorch_loads(digits_run):
    folder, last = digits_run
    files = "ckpt config.json curves.png metrics.jsonl model.safetensors modeling_cifar_resnet.py"
    files += " predictions.png preprocessor_config.json run.json"
    assert {*files.split()} == {path.name for path in folder.iterdir()}
    assert lines(folder)[-1].items() <= last.items() and last["images"] == 6 * 32
    assert 0 <= last["val_top1"] <= last["val_top5"] <= 1
    assert [line["step"] for line in lines(folder) if "val_loss" in line] == [3, 6]
    assert Image.open(folder / "predictions.png").size == (1200, 700)

    torch = pytest.importorskip("torch")
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    theirs = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    source = resnet_stream.open_digits()
    rows = list(source.stream(resnet_stream.make_rows, 64, None, "validation"))
    assert len(rows) == 359 and theirs.config.id2label[9] == "9"
    train_rows = source.stream(resnet_stream.make_rows, 64, None, "train")
    assert not {row["image"] for row in rows} & {row["image"] for row in train_rows}
    images = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]
    labels = torch.tensor([row["label"] for row in rows])
    with torch.no_grad():
        logits = theirs(processor(images, return_tensors="pt")["pixel_values"]).logits
    best = logits.topk(5).indices == labels[:, None]
    assert last["val_loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4
    )
    assert last["val_top1"] == pytest.approx(float(best[:, 0].float().mean()), abs=1e-6)
    assert last["val_top5"] == pytest.approx(float(best.any(1).float().mean()), abs=1e-6)


def test_resnet_finished_run_is_evaluated_predicts_and_is_fine_tuned(digits_run, capsys):
    folder, last = digits_run
    for size in (7, 359, 1000):
        again = train_resnet(steps=0, init_from=str(folder), batch_size=size)
        assert again["val_top1"] == last["val_top1"] and again["val_top5"] == last["val_top5"]
        assert again["val_loss"] == pytest.approx(last["val_loss"], rel=1e-4)
    few = train_resnet(steps=0, init_from=str(folder), batch_size=50, eval_batches=1)["val_top1"]
    assert 50 * few == pytest.approx(round(50 * few)), "of 50 pictures, not of all 359"
    digit = next(iter(resnet_stream.open_digits().stream(resnet_stream.make_rows, 64, None, "validation")))
    Path("a.png").write_bytes(digit["image"])
    Path("b.jpg").write_bytes(png(photograph(), "jpeg"))
    capsys.readouterr()
    train_resnet(steps=0, init_from=str(folder), predict=("a.png", "b.jpg"))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 12 and said[0] == "a.png" and said[6] == "b.jpg"
    percent = [float(line.split("%")[0]) for line in said[1:6]]
    assert percent == sorted(percent, reverse=True) and 50 < sum(percent) <= 100
    model = resnet_stream.from_pretrained(str(folder))
    assert said[1].split()[-1] == str(
        np.argmax(see(model, model.view.pixels(resnet_stream.open_image(digit["image"]))[None]))
    )
    train_resnet(data=(write_folder("pictures"),), init_from=str(folder), steps=2, out_dir="tuned")
    tuned = resnet_stream.from_pretrained("tuned")
    assert tuned.config.id2label == {0: "dark", 1: "light"} and tuned.view.size == 8


@pytest.mark.parametrize("preset", ["cifar10", "imagenet"])
def test_resnet_every_preset_trains_on_pictures_from_parquet(preset):
    rng, names = np.random.default_rng(0), ["x", "y", "z"]
    pixels = lambda: rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
    rows = [{"image": {"bytes": png(pixels())}, "label": i % 3} for i in range(24)]
    Path("pictures").mkdir()
    for split in ("train", "test"):
        write_parquet(f"pictures/{split}.parquet", rows, datasets.ClassLabel(names=names))
    small = dict(preset=preset, **resnet_stream.PRESETS[preset]) | dict(width=8, depth=18, dtype="float32")
    small |= dict(data=("pictures",), image_size=32, batch_size=8, steps=2, out_dir="a")
    last = resnet_stream.main(resnet_stream.Config(**small))
    assert last["step"] == 2 and "val_top5" in last
    assert json.loads(Path("a/config.json").read_text())["id2label"] == {"0": "x", "1": "y", "2": "z"}


# ---- the command line ----


@pytest.mark.parametrize("preset", gpt_train.PRESETS)
def test_every_preset_has_help_and_trains(preset, typed):
    code, text, _ = typed(gpt_train, "--preset", preset, "--help")
    assert code == 0 and "tokens in a row" in text
    default = gpt_train.PRESETS[preset].get("n_embd", 96)
    assert str(default) in text.split("--n-embd")[1].split("--dropout")[0]
    if preset == "gpt2-large":  # the others differ from it in sizes and remat
        small = TINY | dict(preset=preset, tokenizer="bpe:300", batch_size=4, steps=2, n_layer=1)
        code, _, err = typed(gpt_train, *flags(**small))
        assert code == 0, err


BAD = {}  # script: {arguments after --steps 1: what is said}
BAD[gpt_train] = {
    "--preset gpt3": "gpt3",
    "--step 3": "--steps",
    "--n-embd 100 --n-head 3": "--n-embd 100: must be divisible by --n-head 3",
    "--data no/such.txt": "--data no/such.txt: no such file",
    "--data a.doc": "--data a.doc: no data in it; expected .parquet",
    "--data empty.jsonl": "--data empty.jsonl: no data in it",
    "--data rows.jsonl": "cannot tell the text column of id, title, body; name one",
    "--data rows.jsonl --text-column txt": "no text in column txt, one of id, title, body",
    "--data-weights 1 2": "--data-weights (1.0, 2.0): expected one for each --data",
    "--data-weights -1": "must be above 0",
    "--data-name a b": "expected one for each --data",
    "--data mixed --data-name nonsense": "nonsense",
    "--data rows.jsonl --data-name nonsense": "a file has no configuration nonsense",
    "--retries -1": "--retries -1: must not be negative",
    "--data not.jsonl": "--data not.jsonl: no JSON object in its first lines",
    "--data broken.parquet": "--data broken.parquet: ",
    "--data http://127.0.0.1:9/a.parquet": "--data http://127.0.0.1:9/a.parquet: ",
    "--data saved": "--data saved: was written by save_to_disk; write it with to_parquet",
    "--data mixed": "--data mixed: holds jsonl, parquet; name one kind",
    f"--data {JSON} --val-docs 9": "--val-docs 9: there are 5; ask for fewer, or give --val-data",
    f"--data {JSON} --val-docs 5": "leaves none to train on",
    "--tokenizer bpe:12": "--tokenizer bpe:12: expected bpe:N, N above 256",
    "--tokenizer ./nowhere": "./nowhere: no such folder, and not a hub id",
    "--tokenizer saved": "--tokenizer saved: ",
    "--init-from ./nowhere": "./nowhere: no such folder, and not a hub id",
    "--init-from mixed --tokenizer byte": "--init-from mixed: no config.json in it",
    "--init-from mixed": "mixed: ",
    "--init-from model --seq-len 32": "no fast tokenizer in it (tokenizer.json)",
    "--init-from larger --tokenizer byte": "--seq-len 128: larger has 48 positions",
    "--init-from model --tokenizer byte": "ids up to 256, and model knows 199",
    "--init-from broken --tokenizer byte": "--init-from broken: ",
    "--batch-size 10 --accum 4": "--batch-size 10: must be a multiple of 4 (--accum 4 x 1 devices)",
    "--cooldown 2": "--cooldown 2.0: must be in [0, 1]",
    "--top-p 1.5": "--top-p 1.5: must be in (0, 1]",
    "--prompt ''": "--prompt: is empty",
    f"--data {JSON} --val-docs 1 --tokenizer byte --seq-len 8 --prompt 'a long one'": "--prompt: 10 tokens",
    "--steps 0": "--steps 0: trains nothing; name a finished model with --init-from",
    "--resume": "--resume: out holds no run",
    "--resume --out-dir model": "--resume: model holds no run",
    "--out-dir model": "--out-dir model: not empty and not a run",
    "--wandb x": "--wandb x: needs `pip install wandb`",
    "--profile p": "--profile p: records steps 10 to 15 of 1",
    "--num-processes 2": "need --coordinator HOST:PORT",
    "--coordinator host --num-processes 2 --process-id 0": "needs HOST:PORT",
    "--coordinator h:1 --num-processes 2 --process-id 2": "--process-id from 0 to N - 1",
}
BAD[bert_mlm] = {
    "--tokenizer gpt": "--tokenizer gpt: has no mask_token; BERT needs one",
    "--tokenizer bpe:12": "--tokenizer bpe:12: expected bpe:N, N above 261",
    "--init-from bare": "--tokenizer bare: no fast tokenizer in it",
    "--steps 0 --init-from bert --prompt 'import x'": "--prompt 'import x': holds no [MASK]",
    f"--steps 0 --init-from bert --prompt [MASK]{'x' * 300}": "303 tokens, and there are 64 positions",
    "--steps 0 --init-from bare --tokenizer bert --prompt [MASK]": "bare: has no cls.predictions.bias",
    "--prompt 'a [MASK]'": "need a finished model and --steps 0",
    "--steps 0 --init-from bert --embed no.txt": "--embed no.txt: no such file",
    "--steps 0 --init-from bert --mteb STS12": "--mteb STS12: No module named 'mteb'",
    "--init-from bert --seq-len 128": "--seq-len 128: bert has 64 positions",
    "--init-from bare --tokenizer bert": "ids up to 299, and bare knows 199",
    "--mask-share 1.5": "--mask-share 1.5: must be in (0, 1)",
    "--task classify --data text.jsonl": "cannot tell the label column",
    "--task classify --data one.csv --val-docs 5": "all are of class 1",
    "--task classify --data two.csv --val-docs 5 --steps 0 --init-from bert": "needed for --task classify",
}
BAD[resnet_stream] = {
    "--depth 20": "--depth",
    "--image-size 4": "--image-size 4: too small, the cifar stem",
    "--stem imagenet": "--image-size 16: too small, the imagenet stem",
    "--num-classes 5": "--num-classes 5: digits has 10",
    "--data bare.parquet": "--num-classes: is needed, for bare.parquet does not name its",
    "--data rows.jsonl": "cannot tell the image column of id, title",
    "--data bare.parquet --label-column class": "column class, one of image",
    "--data flat": "its pictures are in no class folders; expected CLASS/",
    "--data ab ac": "--data: its sources have other classes: 2, a, b; 2, a, c",
    "--data ab --val-every 9999999": "--val-every 9999999: ",
    "--steps 0 --init-from model --predict no.jpg": "no.jpg: no such file",
    "--steps 0 --init-from model --predict rows.jsonl": "rows.jsonl: not a picture",
    "--predict a.jpg": "--predict: needs --steps 0",
    "--init-from gpt": "--init-from gpt: a gpt2 model, expected resnet",
    "--init-from torch": "--init-from torch: no model.safetensors in it",
    "--init-from broken": "--init-from broken: ",
    "--init-from unsure": "--init-from unsure: preprocessor_config.json: ",
    "--steps 0 --init-from model": "its classes are 3, a, b, c;",
    "--crop-area 0": "--crop-area 0.0: must be in (0, 1]",
    "--ema 1": "--ema 1.0: must be in [0, 1)",
    "--batch-size 10 --accum 4": "--batch-size 10: must be a multiple of 4",
}


@pytest.fixture(scope="session")
def bad_inputs(tmp_path_factory, tokenizer):
    """A folder for each script."""
    root = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        for script in BAD:
            (root / script.__name__).mkdir()
        patch.chdir(root / "gpt_train")
        write({"empty.jsonl": "", "a.doc": "x", "not.jsonl": "text\nmore text\n", "broken.parquet": "x" * 99})
        write({"rows.jsonl": '{"id": 1, "title": "a", "body": "b"}\n' * 30, "mixed/a.jsonl": jsonl("a")})
        write({"mixed/b.parquet": parquet_of(["b"])})
        datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk("saved")
        for name, size in dict(model=199, larger=300, broken=300).items():
            gpt_train.save_pretrained(tiny_model(size), name)
        write({"broken/model.safetensors": "x" * 99})
        patch.chdir(root / "bert_mlm")
        model = tiny_bert(vocab_size=len(tokenizer), max_position_embeddings=64)
        bert_mlm.save_pretrained(model, "bert", tokenizer)
        bert_mlm.save_pretrained(tiny_bert(head=None), "bare")
        words = tokenizer.backend_tokenizer
        type(tokenizer)(tokenizer_object=words, eos_token="[SEP]").save_pretrained("gpt")
        rows = lambda classes: "text,label\n" + "".join(f"x {i},{1 - i % classes}\n" for i in range(30))
        write({"text.jsonl": '{"text": "a b"}\n' * 30, "one.csv": rows(1), "two.csv": rows(2)})
        patch.chdir(root / "resnet_stream")
        rows = [{"image": {"bytes": png(photograph(8, 8))}, "label": i % 3} for i in range(9)]
        write_parquet("bare.parquet", rows, datasets.Value("int64"))
        write({"rows.jsonl": '{"id": 1, "title": "a"}\n' * 30, "flat/a.png": png(photograph(8, 8))})
        write_folder("ab", 4, "ab")
        write_folder("ac", 4, "ac")
        for name in ("model", "torch", "broken", "unsure", "gpt"):
            resnet_stream.save_pretrained(tiny_resnet(classes="abc"), name)
        Path("torch/model.safetensors").rename("torch/pytorch_model.bin")
        write(
            {
                "gpt/config.json": '{"model_type": "gpt2"}',
                "broken/config.json": '{"model_type": "resnet", "layer_type": "x"}',
            }
        )
        write({"unsure/preprocessor_config.json": '{"image_processor_type": "Unknown"}'})
    return root


@pytest.mark.parametrize("script, case", [(script, case) for script in BAD for case in BAD[script]])
def test_bad_input_is_one_line_and_exit_code_2(script, case, bad_inputs, typed, monkeypatch):
    monkeypatch.chdir(bad_inputs / script.__name__)
    before = sorted(Path(".").rglob("*"))
    code, _, err = typed(script, "--steps", "1", *shlex.split(case))
    assert code == 2 and BAD[script][case] in err, err
    of_tyro = case in ("--preset gpt3", "--step 3", "--depth 20")  # it draws a box
    assert len(err.strip().splitlines()) == 1 or of_tyro
    assert sorted(Path(".").rglob("*")) == before, "nothing is written before all is found good"
