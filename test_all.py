"""What nanoflax promises, a test for each. They need no network; those against PyTorch skip without torch."""

import bz2
import dataclasses
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import lzma
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
from functools import cache, partial
from itertools import islice, repeat
from pathlib import Path
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
import safetensors.numpy
import tokenizers
import zstandard
from flax import nnx
from PIL import Image
from tqdm import tqdm
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
OPTIMISED = dict(JAX_DISABLE_MOST_OPTIMIZATIONS="0")  # the environment of a process as its user has it
TINY = dict(data=(JSON,), val_docs=1, tokenizer="byte", seq_len=32, n_layer=2, n_head=2, n_embd=32, steps=12)
TINY |= dict(batch_size=128, accum=1, eval_every=12, log_every=1, sample_every=0)  # eight steps an epoch
TINY |= dict(ckpt_every=3)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Every process of the tests shares one compilation cache, and none touches the user's."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
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
        if value is False:
            typed.append(common.flag(f"no_{name}"))
            continue
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        typed += [common.flag(name), *map(str, values)]
    return typed


def start(*args, **env):
    """Python in a process of its own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *args], env=os.environ | env, **pipes)


def launch(script, *args, **env):
    """The script as its user starts it."""
    return start(str(HERE / script), *args, **env)


def run(script, *args, **env):
    """(exit code, stdout, stderr) of the script."""
    process = launch(script, *args, **env)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def lines(out_dir):
    path = Path(out_dir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(out_dir):
    """What must be the same, bit for bit, in two runs of the same command."""
    exact = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss", "val_bpb")
    return [{name: line[name] for name in exact if name in line} for line in lines(out_dir)]


@nnx.jit
def forward(model, *inputs, **how):
    """model(*inputs), compiled as a whole: operation by operation takes ten times as long."""
    return model(*inputs, **how)


def wait_for_step(process, out_dir, step):
    """Return as soon as the run has logged that step, or ended."""
    while process.poll() is None and not any(line["step"] >= step for line in lines(out_dir)):
        time.sleep(0.01)


def documents(*data):
    """The texts of the data, in the order of the files."""
    return [r["text"] for r in common.mix(open_train(*data))]


def open_train(*data, script=gpt_train, columns=("text",), **changes):
    cfg = script.Config(data=data, **changes)
    return [splits["train"] for splits in common.open_data(cfg, dict.fromkeys(columns))]


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


class HubRequest(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", **headers):
        if isinstance(body, list | dict):
            body = json.dumps(body).encode()
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
        kind, repo = ("datasets" if "/datasets/" in path else "models"), None
        for folder in (self.server.root / kind).glob("**/"):
            name = str(folder.relative_to(self.server.root / kind))
            if (
                f"/{name}/" in f"{path}/"
                and (repo is None or len(name) > len(repo))
                and len(name.split("/")) < 3
            ):
                repo = name
        if repo is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        # the route, the revision, the file; without any, what there is to know of the repository
        route, *rest = f"{path}/".split(f"/{repo}/", 1)[1].rstrip("/").split("/")
        folder, file = self.server.root / kind / repo, "/".join(rest[1:])
        if route in ("", "revision"):
            siblings = [{"rfilename": str(p.relative_to(folder))} for p in folder.rglob("*") if p.is_file()]
            return self.answer(200, dict(id=repo, sha=Hub.sha, siblings=siblings, tags=[], private=False))
        if route == "tree":
            deep = "recursive=true" in self.path.lower()
            found = sorted((folder / file).rglob("*") if deep else (folder / file).glob("*"))
            kinds = lambda p: (
                dict(type="file", size=p.stat().st_size) if p.is_file() else dict(type="directory", size=0)
            )
            return self.answer(
                200, [dict(path=str(p.relative_to(folder)), oid=p.name, **kinds(p)) for p in found]
            )
        if route != "resolve":
            return self.answer(404, X_Error_Code="EntryNotFound")
        self.send_file(folder / file, path)

    def send_file(self, file, path):
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        body = file.read_bytes()
        head = dict(ETag=f'"{hashlib.sha1(body).hexdigest()}"', Accept_Ranges="bytes")
        if self.command == "HEAD":
            return self.answer(200, body, **head)
        code = 200
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
            head["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
            code, body = 206, body[first : last + 1]
        fault = self.server.fault(path)
        return self.go_wrong(fault, body) if fault else self.answer(code, body, **head)

    do_HEAD = do_GET


# ---- common.py: sources ----

TEXTS = ["one\ntwo", 'three, "four"', "fünf\t6"]


def write_texts(folder):
    """TEXTS in every format, three records each -> the names."""
    folder.mkdir(parents=True)
    table = pa.table({"id": [0, 1, 2], "text": TEXTS})
    pq.write_table(table, folder / "a.parquet")
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "a.jsonl").write_bytes(lines)
    for suffix, library in {"gz": gzip, "bz2": bz2, "xz": lzma, "zst": zstandard}.items():
        (folder / f"a.jsonl.{suffix}").write_bytes(library.compress(lines))
    table.to_pandas().to_csv(folder / "a.csv", index=False)
    table.to_pandas().to_csv(folder / "a.tsv", index=False, sep="\t")
    write_tar(folder / "a.tar", {f"{i}.txt": text.encode() for i, text in enumerate(TEXTS)})
    return [path.name for path in folder.iterdir()]


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_every_format_gives_the_same_documents_from_disk_and_from_the_web(tmp_path):
    names = write_texts(tmp_path / "files")
    web = Hub(tmp_path)
    for name in names:
        for data in (f"files/{name}", f"{web.url}/files/{name}"):
            assert documents(data) == TEXTS, data
    for i, text in enumerate(TEXTS):
        Path("folder").mkdir(exist_ok=True)
        Path(f"folder/{i}.txt").write_text(text)
    for data in ("folder", "folder/*.txt"):
        assert documents(data) == TEXTS
    assert documents("files/a.csv", "folder") == [text for text in TEXTS for _ in range(2)]


@pytest.fixture
def pictures():
    """{(class number, content)} of six small images in two classes."""
    found = set()
    for i in range(6):
        file = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        found.add((i % 2, file.getvalue()))
    return found


def test_every_format_gives_the_same_images_and_labels_from_disk_and_from_the_web(tmp_path, pictures):
    files = tmp_path / "files"
    for i, (label, content) in enumerate(sorted(pictures)):
        path = files / "folder" / "train" / "ab"[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    rows = [
        {"image": {"bytes": content, "path": None}, "label": label} for label, content in sorted(pictures)
    ]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    datasets.Dataset.from_list(rows, features=features).to_parquet(files / "a.parquet")
    parts = {}
    for i, (label, content) in enumerate(sorted(pictures)):
        parts |= {f"{i}.png": content, f"{i}.cls": str(label).encode()}
    write_tar(files / "a.tar", parts)
    web = Hub(tmp_path)
    for data in ("folder", "folder/train", "a.parquet", "a.tar"):
        for place in ("files", f"{web.url}/files"):
            if data.startswith("folder") and place != "files":
                continue  # there is no listing a folder of the web
            (source,) = open_train(f"{place}/{data}", columns=("image", "label"))
            found = {(r["label"], common.image_bytes(r["image"])) for r in source}
            assert found == pictures, data
            assert source.classes == (["a", "b"] if data != "a.tar" else None)


def test_splits_columns_and_headers_are_found():
    Path("data").mkdir()
    for split in ("train", "dev", "test"):
        Path(f"data/{split}.tsv").write_text(f"{split} is good\t1\nbad\t0\n")
    (found,) = common.open_data(gpt_train.Config(data=("data",)), {"text": None, "label": None})
    assert {name: next(iter(source))["text"] for name, source in found.items()} == {
        "train": "train is good",
        "validation": "dev is good",
        "test": "test is good",
    }
    for split in ("train", "test"):  # a folder may name the split, and a data set's card is no data
        Path(f"folders/{split}").mkdir(parents=True)
        pq.write_table(pa.table({"text": [split]}), f"folders/{split}/0.parquet")
        Path(f"documents/{split}").mkdir(parents=True)
        Path(f"documents/{split}/a.txt").write_text(split)
    Path("folders/README.md").write_text("---\nlicense: mit\n---\n")
    Path("folders/.hidden").mkdir()
    shutil.copy("folders/test/0.parquet", "folders/.hidden/0.parquet")
    Path("linked").mkdir()
    for split in ("train", "test"):
        Path(f"linked/{split}").symlink_to(Path(f"folders/{split}").absolute())
    for data in ("folders", "folders/", "folders/**/*.parquet", "documents", "documents/**/*.txt", "linked"):
        (found,) = common.open_data(gpt_train.Config(data=(data,)), {"text": None})
        texts = {name: [row["text"] for row in rows] for name, rows in found.items()}
        assert texts == dict(train=["train"], test=["test"]), data
    shutil.copy("folders/train/0.parquet", "data[1].parquet")
    shutil.copy("folders/test/0.parquet", "data1.parquet")
    assert documents("data[1].parquet") == ["train"], "a name, not a pattern"
    Path("a.csv").write_text("body,title,label\nlong,short,3\n")
    (found,) = common.open_data(gpt_train.Config(data=("a.csv",)), {"text": "title", "label": None})
    source = found["train"]
    assert list(source) == [{"text": "short", "label": 3, "record": 0}]


# ---- common.py: streams ----


def write_numbers(n=600, group=10, files=3):
    """Rows "0".."n-1" in parquet files of row groups of `group`."""
    Path("numbers").mkdir()
    for i in range(files):
        part = [str(x) for x in range(i * n // files, (i + 1) * n // files)]
        pq.write_table(pa.table({"text": part}), f"numbers/{i}.parquet", row_group_size=group)
    return open_train("numbers")[0]


def numbers_of(source, epoch, window=50, seed=0):
    """An epoch of the numbers, permuted in windows and then in a second stage taken four at a time."""

    def permute(batch):
        order = np.random.default_rng([seed, epoch, source.rank, batch["record"][0]]).permutation
        order = order(len(batch["text"]))
        return {name: [values[i] for i in order] for name, values in batch.items()}

    def parse(batch):
        return {"ids": [int(text) for text in batch["text"]]}

    return source.map(epoch, seed, (permute, window), (parse, 4))


def take(stream, n):
    return [batch["ids"].tolist() for batch, _ in islice(stream, n)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_no_row_is_lost_or_repeated_over_epochs_and_processes(world):
    source, orders = write_numbers(), []
    for epoch in range(2):
        rows = []
        for rank in range(world):
            share = dataclasses.replace(source, rank=rank, world=world)
            rows.append([row["ids"] for row in numbers_of(share, epoch)])
            assert len(rows[-1]) == pytest.approx(600 / world, abs=20), "shares of about the same size"
        orders.append([x for share in rows for x in share])
        assert sorted(orders[-1]) == list(range(600))
    assert orders[0] != orders[1], "every epoch has an order of its own"


def test_batches_run_over_epoch_ends_and_drop_no_row():
    source = write_numbers()
    rows = [x for ids in take(common.batches([partial(numbers_of, source)], 7), 600) for x in ids]
    for epoch in range(7):
        assert sorted(rows[600 * epoch : 600 * (epoch + 1)]) == list(range(600))


def test_stream_resumes_after_every_batch():
    share = dataclasses.replace(write_numbers(120), rank=1, world=2)
    stream = lambda position=None: common.batches([partial(numbers_of, share)], 7, position=position)
    whole = take(stream(), 20)  # over two ends of an epoch
    for i, (_, position) in enumerate(islice(stream(), 19)):
        saved = json.dumps(position)
        assert len(saved) < 4000
        assert take(stream(json.loads(saved)), 19 - i) == whole[i + 1 :]


def test_shuffle_window_of_twenty_row_groups_mixes_nearly_as_well_as_a_permutation_of_all():
    source = write_numbers(8000, group=20)

    def spread(rows):
        """Of the batches' means: what a training step sees of an order that follows the files."""
        return np.std(np.mean(np.reshape(rows, (-1, 32)), axis=1))

    shuffled = [spread([row["ids"] for row in numbers_of(source, epoch, window=400)]) for epoch in range(4)]
    ideal = [spread(np.random.default_rng(i).permutation(8000)) for i in range(4)]
    by_file = spread([row["ids"] for row in numbers_of(source, 0, window=1)])
    assert np.mean(shuffled) < 1.8 * np.mean(ideal)
    assert by_file > 4 * np.mean(ideal)
    neighbours = [row["ids"] // 20 for row in numbers_of(source, 0, window=400)]
    assert np.mean(np.diff(neighbours) == 0) < 0.1, "of one row group: 1/20 within the window"


def test_mixture_has_its_shares_and_every_source_its_own_order_resumed_or_not():
    numbers = write_numbers()
    letters = [str(x) for x in range(1000, 1200)]
    pq.write_table(pa.table({"text": letters}), "letters.parquet", row_group_size=10)
    both = [partial(numbers_of, source) for source in (numbers, *open_train("letters.parquet"))]
    stream = lambda position=None: common.batches(both, 16, seed=3, weights=(0.7, 0.3), position=position)
    whole = take(stream(), 120)
    rows = np.reshape(whole, -1)
    assert np.mean(rows < 1000) == pytest.approx(0.7, abs=0.03)
    for i, is_mine in enumerate((rows < 1000, rows >= 1000)):
        alone = [x for ids in take(common.batches(both[i : i + 1], 16), 100) for x in ids]
        assert rows[is_mine].tolist() == alone[: is_mine.sum()]
    for i, (_, position) in enumerate(islice(stream(), 60)):
        if i % 10 == 9:
            assert take(stream(json.loads(json.dumps(position))), 20) == whole[i + 1 : i + 21]


def break_at(open_epoch, rows):
    """open_epoch, but for a connection that breaks at the next of `rows` whenever it is opened."""

    def broken(row, index, fail_at):
        if index == fail_at:
            raise ConnectionResetError("connection reset")
        return row

    def open_broken(epoch):
        ds = open_epoch(epoch).map(broken, with_indices=True, fn_kwargs={"fail_at": next(rows, None)})
        ds.set_epoch(1 + epoch)
        return ds

    return open_broken


def test_stream_survives_a_broken_source_with_the_same_batches(monkeypatch, capfd):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    numbers = partial(numbers_of, write_numbers(60))
    whole = take(common.batches([numbers], 7), 20)
    flaky = break_at(numbers, iter([3, 17, 30, 38, None, 5]))
    assert take(common.batches([flaky], 7), 20) == whole
    assert capfd.readouterr().err.count("connection reset") == 5
    pauses.clear()
    with pytest.raises(common.StreamError, match="9 times in a row: connection reset"):
        next(common.batches([break_at(numbers, repeat(0))], 7))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60], "they grow"


def test_web_that_fails_at_random_changes_no_row(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(common, "wait", lambda what, failures, retries: tqdm.write(f"data: {what}"))
    texts = [f"{i} " + "x" * 2000 for i in range(300)]
    (tmp_path / "files").mkdir()
    pq.write_table(pa.table({"text": texts}), "files/a.parquet", row_group_size=10, compression="none")
    Path("files/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("files/a.jsonl.zst").write_bytes(zstandard.compress(Path("files/a.jsonl").read_bytes()))
    web, dice = Hub(tmp_path), random.Random(0)
    kinds = [500, 503, 504, 429, "reset", "truncated"]

    def read(source):
        stage = lambda batch: {"ids": [int(text.split()[0]) for text in batch["text"]]}
        return take(common.batches([lambda epoch: source.map(epoch, 0, (stage, 50))], 30), 20)

    for name in ("a.parquet", "a.jsonl", "a.jsonl.zst"):
        (source,) = open_train(f"{web.url}/files/{name}")
        whole = read(source)
        monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
        web.fault = lambda path: dice.choice(kinds) if dice.random() < 0.15 else None
        assert read(source) == whole
        web.fault = lambda path: None
    assert web.faults > 5 and "data:" in capfd.readouterr().out  # most are mended beneath us


BAD_RECORDS = [None, "", 5, ["a"], {"b": 1}, True]


def test_bad_records_are_skipped_logged_and_counted_with_the_rows_trained_on(capfd):
    texts = [str(i) for i in range(200)]
    for i, bad in enumerate(BAD_RECORDS):
        texts.insert(20 * i + 7, bad)
    lines = [json.dumps({"text": text}) for text in texts]
    lines.insert(150, '{"text": "cut sho')
    Path("a.jsonl").write_text("\n".join(lines))
    (source,) = open_train("a.jsonl")
    stream = lambda position=None: common.batches(
        [partial(numbers_of, source, window=10)], 4, position=position
    )
    rows, counts = [], []
    for i, (batch, position) in enumerate(islice(stream(), 100)):
        rows += batch["ids"].tolist()
        counts.append(position["bad"])
        if i == 30:
            saved = position
    assert sorted(rows[:200]) == list(range(200)) == sorted(rows[200:])
    assert counts[49] == 7 and counts[99] == 14 and counts == sorted(counts)
    assert len(set(counts)) > 5, "the count does not run ahead"
    assert [position["bad"] for _, position in islice(stream(saved), 69)] == counts[31:]
    said = capfd.readouterr().err
    for i, why in ((7, "text is missing"), (27, "text is empty"), (47, "text is of type int")):
        assert f"data: skipped record {i} of epoch 0: {why}" in said
    assert "record 150 of epoch 1: not a JSON object" in said


def test_more_than_one_bad_record_in_a_hundred_stops_the_stream():
    for share, stops in ((120, False), (90, True)):
        texts = [None if i % share == 0 else "7" for i in range(30_000)]
        pq.write_table(pa.table({"text": texts}), "a.parquet", row_group_size=5000)
        stream = common.batches([partial(numbers_of, *open_train("a.parquet"), window=1000)], 1000)
        if stops:
            with pytest.raises(common.StreamError, match="more than 1 % of the last 10,000 records"):
                take(stream, 25)
        else:
            take(stream, 25)


def test_few_bad_records_in_every_epoch_do_not_add_up():
    Path("a.jsonl").write_text(
        "".join(json.dumps({"text": str(i) * (i % 200 > 0)}) + "\n" for i in range(24_000))
    )
    epoch = partial(numbers_of, open_train("a.jsonl")[0], window=1000)
    *_, (_, position) = islice(common.batches([epoch], 4000), 17)  # nearly three epochs, 120 bad in each
    assert 300 < position["bad"] <= 360


def test_half_a_character_is_a_bad_record(capfd):
    Path("a.jsonl").write_text('{"text": "half an emoji \\ud83d"}\n{"text": "a whole one \\ud83d\\ude00"}\n')
    assert documents("a.jsonl") == ["a whole one \U0001f600"]
    assert "half a character" in capfd.readouterr().err


def test_files_that_do_not_fit_together_end_the_stream_with_a_line():
    pq.write_table(pa.table({"text": ["a"] * 20}), "0.parquet")
    pq.write_table(pa.table({"words": ["a"] * 20}), "1.parquet")
    epoch = partial(numbers_of, open_train("*.parquet")[0])
    with pytest.raises(common.StreamError, match="the data cannot be read: "):
        take(common.batches([epoch], 30), 2)


def test_labels_that_cannot_be_meant_are_bad_records(capfd):
    Path("a.csv").write_text("text,label\na,0\nb,\nc,1\nd,-1\ne,2\n")
    (source,) = open_train("a.csv", columns=("text", "label"))
    assert [(r["text"], r["label"]) for r in source] == [("a", 0), ("c", 1), ("e", 2)]
    source.classes = ["no", "yes"]
    assert [r["text"] for r in source] == ["a", "c"]
    assert "record 4: label is 2, expected a class from 0 to 1" in capfd.readouterr().err


def test_memory_does_not_grow_with_the_file():
    noise = np.random.default_rng(0)
    schema = pa.schema({"text": pa.string()})
    with pq.ParquetWriter("a.parquet", schema, compression="none") as file:
        for _ in range(150):  # 2 MB each, in one file of 300
            rows = noise.integers(32, 127, (1000, 2000), dtype=np.uint8)
            file.write_table(pa.table({"text": [row.tobytes().decode() for row in rows]}))
    assert Path("a.parquet").stat().st_size > 300e6
    program = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
import common, gpt_train
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
source = common.open_data(gpt_train.Config(data=("a.parquet",)), {"text": None})[0]["train"]
rows = source.map(0, 0, (lambda batch: {"n": [len(text) for text in batch["text"]]}, 1000))
print(sum(row["n"] for row in rows), peak() - before)
"""
    process = subprocess.run([sys.executable, "-c", program, str(HERE)], capture_output=True, text=True)
    characters, grown = map(int, process.stdout.split())
    assert characters == 150 * 1000 * 2000
    assert grown < 400e6


def test_prefetch_raises_the_streams_own_exception_where_it_is_read():
    def stream():
        yield 1
        raise KeyError("from the stream")

    ahead = common.Prefetch(stream(), depth=4)
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="from the stream"):
        next(ahead)
    ahead.close()


def test_prefetch_ends_when_told_to_and_counts_the_wait():
    def slow():
        while True:
            time.sleep(0.3)
            yield 1

    stopped = []
    ahead = common.Prefetch(slow(), depth=1, stop=lambda: bool(stopped))
    assert next(ahead) == 1
    assert 0.2 < ahead.waited < 1
    stopped.append(True)
    assert list(ahead) == []
    ahead.close()
    assert not ahead.thread.is_alive()


# ---- gpt_train.py: data ----


def test_packing_repeats_no_token_and_gives_up_fewer_than_two_rows():
    for n in [*range(60), 500, 997]:
        rows = gpt_train.pack(np.arange(n), 10, np.random.default_rng(n))
        ids = np.sort(rows.reshape(-1))
        assert rows.shape == (len(rows), 10)
        assert (np.diff(rows) == 1).all(), "a row is a stretch of the text"
        assert len(np.unique(ids)) == len(ids)
        assert n - len(ids) < 20
        assert len(rows) >= (n >= 10), "text for a row is not thrown away"


def test_training_rows_hold_the_documents_and_differ_between_epochs():
    cfg = gpt_train.Config(**TINY | dict(shuffle_buffer=2))
    train = common.open_data(cfg, {"text": None})[0]["train"]
    texts = documents(JSON)
    tokenizer = gpt_train.load_tokenizer("byte")
    epochs = []
    for epoch in range(2):
        rows = [tuple(r["tokens"]) for r in gpt_train.training_rows(train, tokenizer, cfg, {texts[0]}, epoch)]
        kept = "".join(tokenizer.decode(row) for row in rows)
        assert len(kept) > 0.98 * sum(len(text) + len(gpt_train.END) for text in texts[1:])
        whole = [tokenizer.decode([*gpt_train.encode(tokenizer, [text])]) for text in texts]
        found = [sum(tokenizer.decode(row).split(gpt_train.END)[0] in text for row in rows) for text in whole]
        assert found[0] < 0.1 * len(rows) and all(found[1:]), "the held-out document is not trained on"
        epochs.append(set(rows))
    assert len(epochs[0] & epochs[1]) < 0.1 * len(epochs[0]), "another cut in every epoch"


def test_empty_documents_are_skipped_and_counted():
    texts = [*documents(JSON), None, "", None]
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    last = gpt_train.main(gpt_train.Config(**TINY | dict(data=("a.jsonl",), steps=2, out_dir="a")))
    assert last["bad_records"] >= 3 and last["bad_records"] % 3 == 0, (
        "in every epoch, as far as the stream is ahead"
    )


def test_truncation_and_padding_saved_with_a_tokenizer_do_not_touch_documents():
    for script in (gpt_train, bert_mlm):
        tokenizer = script.load_tokenizer("bpe:300", ["one two three"] * 10)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer("one", truncation=True, max_length=4, padding="max_length")
        tokenizer.save_pretrained(script.__name__)
        tokenizer = script.load_tokenizer(script.__name__)
        ids = np.concatenate([np.atleast_1d(x) for x in script.encode(tokenizer, ["one two three"] * 2)])
        assert tokenizer.decode(ids, skip_special_tokens=True) == "one two three" * 2


def test_end_token_inside_a_document_is_text():
    tokenizer = gpt_train.load_tokenizer("bpe:300", ["a <|endoftext|> b"] * 10)
    ids = gpt_train.encode(tokenizer, ["a <|endoftext|> b", "c"])
    assert (ids == tokenizer.eos_token_id).sum() == 2
    assert tokenizer.decode(ids) == "a <|endoftext|> b<|endoftext|>c<|endoftext|>"


def test_validation_counts_every_token_once_whatever_the_batch_size():
    texts = documents(JSON)[:2]
    tokenizer = gpt_train.load_tokenizer("byte")
    inputs, targets = gpt_train.validation_rows(tokenizer, texts, 32)
    assert (targets[targets >= 0] == gpt_train.encode(tokenizer, texts)).all()
    assert (
        inputs[0, 0] == tokenizer.eos_token_id
        and (inputs.reshape(-1)[1:] == targets.reshape(-1)[:-1])[:-40].all()
    )
    model = tiny_model(257, 32)
    loss_sum = nnx.jit(gpt_train.loss_sum)
    means = [gpt_train.evaluate(loss_sum, model, inputs, targets, size, jnp.asarray) for size in (7, 1000)]
    nats, count = loss_sum(model, inputs, targets)
    np.testing.assert_allclose(means, nats / count, rtol=1e-5)


# ---- gpt_train.py: the model against transformers' PyTorch GPT-2 ----


def tiny_model(vocab_size=199, n_positions=48, seed=0, dtype="float32", **changes):
    """A small GPT with every parameter random, biases and norms too."""
    sizes = dict(vocab_size=vocab_size, n_positions=n_positions, n_embd=48, n_layer=2, n_head=4)
    config = GPT2Config(**sizes | dict(embd_pdrop=0, attn_pdrop=0, resid_pdrop=0) | changes)
    model = gpt_train.GPT(config, dtype=dtype, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for param in jax.tree.leaves(nnx.state(model), is_leaf=lambda p: isinstance(p, nnx.Param)):
        param.set_value(param[...] + 0.1 * rng.normal(size=param.shape).astype(np.float32))
    nnx.update(model, nnx.state(model))
    return model


@pytest.fixture
def both(tmp_path):
    """Our model, and the one that transformers loads from our export."""
    pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel

    model = tiny_model()
    gpt_train.save_pretrained(model, tmp_path / "model")
    return model, GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()


def random_tokens(B, T, V=199, seed=0):
    return np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)


def test_logits_loss_and_gradients_equal_transformers(both):
    import torch

    model, theirs = both
    tokens = random_tokens(4, 33)
    out = theirs(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long())
    out.loss.backward()
    np.testing.assert_allclose(forward(model, tokens), out.logits.detach().numpy(), atol=1e-4)

    def loss_fn(model):
        nats, count = gpt_train.loss_sum(model, tokens[:, :-1], tokens[:, 1:])
        return nats / count

    loss, grads = nnx.jit(nnx.value_and_grad(loss_fn))(model)
    assert abs(loss - out.loss.item()) < 1e-5
    theirs = dict(theirs.transformer.named_parameters())
    ours = gpt_train.checkpoint_names(grads)
    assert set(ours) == set(theirs)
    for name, grad in ours.items():
        wanted = theirs[name].grad.numpy()
        np.testing.assert_allclose(grad[...][: len(wanted)], wanted, atol=1e-5, err_msg=name)
        assert not np.any(grad[...][len(wanted) :]), "the padding of the vocabulary learns nothing"


def test_ten_optimizer_steps_equal_pytorch_adamw(both):
    import torch

    model, theirs = both
    cfg = gpt_train.Config(optimizer="adamw", lr=1e-2, warmup_steps=3, steps=10, accum=2, grad_clip=0.5)
    schedule = gpt_train.make_schedule(cfg)
    graphdef, state = nnx.split(
        (model, nnx.Optimizer(model, gpt_train.make_optimizer(cfg, schedule), wrt=nnx.Param))
    )
    state = common.shard_state(common.make_mesh(), state, fsdp=False)
    step = gpt_train.make_train_step(graphdef, state, cfg.accum, schedule)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for i in range(10):
        tokens = random_tokens(4, 33, seed=i)
        state, metrics = step(state, tokens, jax.random.key(i))
        loss = theirs(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(i))
        optimizer.step()
        assert abs(metrics["loss"] - loss.item()) < 1e-4
        assert abs(metrics["grad_norm"] - norm.item()) < 1e-3
    model = nnx.merge(graphdef, state)[0]
    tokens = random_tokens(2, 20)
    np.testing.assert_allclose(
        forward(model, tokens), theirs(torch.tensor(tokens).long()).logits.detach(), atol=1e-3
    )


def test_greedy_decoding_equals_transformers_for_prompts_of_any_length(both):
    import torch

    model, theirs = both
    lengths, T, new = [1, 4, 9, 12], 12, 30
    tokens = random_tokens(4, T)
    ours = gpt_train.generate(model, tokens, new, key=jax.random.key(0), temperature=0, lengths=lengths)
    for row, n in enumerate(lengths):
        prompt = torch.tensor(tokens[row : row + 1, :n]).long()
        how = dict(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None)
        wanted = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **how)[0]
        assert ours[row, : n + new].tolist() == wanted.tolist()
        assert not ours[row, n + new :].any()


def test_published_names_load_without_prefix_and_in_pieces(tmp_path):
    from safetensors.numpy import load_file, save_file

    model, folder = tiny_model(), tmp_path / "model"
    gpt_train.save_pretrained(model, folder)
    weights = load_file(folder / "model.safetensors")
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
    again, tokens = gpt_train.from_pretrained(str(folder)), random_tokens(2, 20)
    np.testing.assert_array_equal(forward(again, tokens), forward(model, tokens))
    shorter = gpt_train.from_pretrained(str(folder), n_positions=20)
    np.testing.assert_array_equal(forward(shorter, tokens), forward(model, tokens))


# ---- gpt_train.py: the model by itself ----


def test_no_position_sees_a_later_one():
    model, tokens, t = tiny_model(), random_tokens(1, 20), 11
    seen = nnx.jit(nnx.grad(lambda model: model(tokens)[0, t].sum()))(model)["wpe"]["embedding"][...]
    used = np.abs(seen).sum(axis=1) > 0
    assert used[: t + 1].all() and not used[t + 1 :].any()


def test_dropout_needs_a_key_and_keeps_the_mean():
    tokens, key = random_tokens(2, 20), jax.random.key(1)
    model = tiny_model(embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)
    np.testing.assert_array_equal(forward(model, tokens), forward(tiny_model(), tokens))
    assert np.any(forward(model, tokens, key) != forward(model, tokens, jax.random.key(2)))
    np.testing.assert_array_equal(forward(model, tokens, key), forward(model, tokens, key))
    x = gpt_train.dropout(jnp.ones(100_000), 0.2, key)
    assert abs(x.mean() - 1) < 0.01 and abs((x == 0).mean() - 0.2) < 0.01
    # with all weights kept, the attention that knows dropout is the fused one
    nearly = tiny_model(embd_pdrop=0, attn_pdrop=1e-9, resid_pdrop=0)
    np.testing.assert_allclose(forward(nearly, tokens, key), forward(nearly, tokens), atol=1e-5)


def test_remat_changes_no_gradient():
    tokens = random_tokens(2, 20)
    grads = []
    for remat in (False, True):
        model = tiny_model(resid_pdrop=0.1)
        model.remat = remat
        loss = lambda model: gpt_train.loss_sum(model, tokens, tokens, jax.random.key(0))[0]
        grads.append(nnx.jit(nnx.grad(loss))(model))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *grads)


def test_bfloat16_stays_near_float32_with_float32_parameters_and_logits():
    tokens = random_tokens(2, 20)
    half = tiny_model(dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    assert forward(half, tokens).dtype == jnp.float32
    assert half.hidden(tokens)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(forward(half, tokens), forward(tiny_model(), tokens), atol=0.15)


def many_tokens():
    """32,768 bytes of Python's source, (32, 1024) int32: the space stands there some 8,000 times."""
    text = "".join(documents(JSON))
    return np.frombuffer(text.encode()[: 32 * 1024], np.uint8).astype(np.int32).reshape(32, 1024)


def gradient_errors(loss, half, whole):
    """{parameter: error of its bfloat16 gradient, as a share of the float32 one}."""
    half, whole = (nnx.to_flat_state(nnx.jit(nnx.grad(loss))(model)) for model in (half, whole))
    errors = {}
    for (path, ours), (_, right) in zip(half, whole):
        error, size = (np.linalg.norm(x) for x in (ours[...] - right[...], right[...]))
        errors[".".join(map(str, path))] = float(error / size)
    return errors


def test_bfloat16_gradients_at_32_768_tokens_are_those_of_float32():
    tokens = many_tokens()
    config = GPT2Config(
        vocab_size=256, n_embd=32, n_layer=1, n_head=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
    )
    gpts = [gpt_train.GPT(config, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in ("bfloat16", "float32")]
    targets = np.concatenate([tokens.reshape(-1)[1:], [-1]]).reshape(tokens.shape).astype(np.int32)
    loss = lambda model: gpt_train.loss_sum(model, tokens, targets)[0] / tokens.size
    errors = gradient_errors(loss, *gpts)
    assert errors["wte.embedding"] < 0.01 and max(errors.values()) < 0.03, errors

    rows = tokens.reshape(256, 128)
    sizes = dict(vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    rates = dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    config = BertConfig(**sizes, intermediate_size=64, **rates)
    berts = [bert_mlm.BERT(config, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in ("bfloat16", "float32")]
    batch = masker(256, 5, ())(jax.random.key(0), rows)
    loss = lambda model: bert_mlm.loss_sum(model, batch)[0] / jnp.sum(batch["weights"])
    errors = gradient_errors(loss, *berts)
    del errors["bert.encoder.layer.0.attention.self.key.bias"]  # 0 but for rounding: softmax does not see it
    assert errors["bert.embeddings.word_embeddings.embedding"] < 0.01, errors
    assert max(errors.values()) < 0.03, errors


def test_new_model_starts_as_gpt2_does():
    config = GPT2Config(n_layer=8, n_embd=64, n_head=4, vocab_size=500, n_positions=64)
    model = gpt_train.GPT(config, rngs=nnx.Rngs(0))
    std = lambda p: float(np.std(p[...]))
    assert std(model.wte.embedding) == pytest.approx(0.02, rel=0.05)
    assert std(model.h[3].mlp.c_fc.kernel) == pytest.approx(0.02, rel=0.05)
    assert std(model.h[3].mlp.c_proj.kernel) == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert std(model.h[3].attn.c_proj.kernel) == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    tokens = random_tokens(4, 64, 500)
    nats, count = gpt_train.loss_sum(model, tokens, tokens[:, ::-1])
    assert nats / count == pytest.approx(math.log(500), rel=0.01)


# ---- gpt_train.py: sampling ----


def test_cached_decoding_equals_the_full_forward():
    model, tokens = tiny_model(), random_tokens(2, 5)
    out = np.asarray(gpt_train.generate(model, tokens, 30, key=jax.random.key(0), temperature=0))
    logits = forward(model, out)  # all at once
    np.testing.assert_array_equal(out[:, 5:], np.argmax(logits, axis=-1)[:, 4:-1])
    with pytest.raises(ValueError, match="5 \\+ 44 tokens, and the model has 48 positions"):
        gpt_train.generate(model, tokens, 44, key=jax.random.key(0))


def test_sampling_follows_the_softmax_within_top_k_and_top_p():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    many = jnp.asarray(np.tile(logits, (40_000, 1)))

    def shares(**how):
        how = dict(temperature=1.0, top_k=None, top_p=None) | how
        return np.bincount(gpt_train.sample(jax.random.key(0), many, **how), minlength=4) / len(many)

    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.01)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.01)
    np.testing.assert_allclose(shares(top_p=0.8 + 1e-4), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.01)
    np.testing.assert_allclose(shares(top_p=0.7), [0.625, 0.375, 0, 0], atol=0.01)
    np.testing.assert_allclose(shares(top_k=3, top_p=0.6), [0.625, 0.375, 0, 0], atol=0.01)
    cold = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(shares(temperature=0.5), cold / cold.sum(), atol=0.01)
    np.testing.assert_array_equal(shares(temperature=0), [1, 0, 0, 0])
    np.testing.assert_array_equal(shares(top_k=1), [1, 0, 0, 0])
    np.testing.assert_array_equal(shares(top_p=1e-6), [1, 0, 0, 0])


def test_every_sampled_token_has_a_key_of_its_own():
    model = tiny_model()
    model.ln_f.scale.set_value(jnp.zeros(48))
    model.ln_f.bias.set_value(jnp.zeros(48))  # all tokens equally likely, whatever the text
    out = gpt_train.generate(model, random_tokens(4, 2), 40, key=jax.random.key(0))[:, 2:]
    assert len(np.unique(out)) > 100, "160 draws among 199"


def test_generation_stops_at_the_end_token():
    model, tokens = tiny_model(), random_tokens(3, 4)
    how = dict(key=jax.random.key(0), temperature=0)
    free = np.asarray(gpt_train.generate(model, tokens, 20, **how))[:, 4:]
    eos = int(free[0, 5])
    stopped = np.asarray(gpt_train.generate(model, tokens, 20, eos=eos, **how))[:, 4:]
    for a, b in zip(free, stopped):
        end = [*a, eos].index(eos)
        assert (a[:end] == b[:end]).all() and (b[end:] == eos).all()


# ---- gpt_train.py: the training step ----


def one_step(cfg, tokens, model=None, key=None):
    """(metrics, state) after a step on `tokens`."""
    model, schedule = model or tiny_model(), gpt_train.make_schedule(cfg)
    graphdef, state = nnx.split(
        (model, nnx.Optimizer(model, gpt_train.make_optimizer(cfg, schedule), wrt=nnx.Param))
    )
    step = gpt_train.make_train_step(graphdef, state, cfg.accum, schedule)
    return step(state, tokens, jax.random.key(0) if key is None else key)[::-1]


def test_accumulation_equals_one_large_batch_where_rows_have_unequal_numbers_of_targets():
    tokens = random_tokens(8, 33)
    tokens[1::4, 5:] = -1  # these would count for more in a mean of means
    cfg = gpt_train.Config(optimizer="adamw", accum=1, warmup_steps=0)
    tokens = np.where(tokens < 0, -1, tokens)
    whole = one_step(cfg, tokens)
    for accum in (2, 8):
        parts = one_step(dataclasses.replace(cfg, accum=accum), tokens)
        assert parts[0]["loss"] == pytest.approx(float(whole[0]["loss"]), rel=1e-5)
        assert parts[0]["grad_norm"] == pytest.approx(float(whole[0]["grad_norm"]), rel=1e-4)
        moments = parts[1][1], whole[1][1]  # the updates themselves hang on the sign of gradients near zero
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4), *moments)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_for_matrices_only(optimizer):
    decayed, plain = [], []
    for weight_decay, found in ((0.5, decayed), (0.0, plain)):
        cfg = gpt_train.Config(optimizer=optimizer, accum=1, warmup_steps=0, weight_decay=weight_decay)
        state = one_step(cfg, random_tokens(4, 33))[1]
        found += jax.tree.leaves(state[0])
    for a, b in zip(decayed, plain):
        assert np.any(np.asarray(a) != np.asarray(b)) == (a.ndim == 2)


def test_muon_is_for_the_hidden_matrices_and_has_updates_of_adamw_size():
    cfg = gpt_train.Config(optimizer="muon", accum=1, warmup_steps=0, weight_decay=0, lr=1e-3)
    tokens = random_tokens(4, 33)
    adamw = one_step(dataclasses.replace(cfg, optimizer="adamw"), tokens)[1][0]
    before, after = (
        gpt_train.checkpoint_names(s) for s in (nnx.state(tiny_model()), one_step(cfg, tokens)[1][0])
    )
    for name, adam in gpt_train.checkpoint_names(adamw).items():
        update = np.asarray(after[name][...] - before[name][...])
        if name.startswith("h.") and update.ndim == 2:
            singular = np.linalg.svd(update, compute_uv=False) / (0.2e-3 * max(update.shape) ** 0.5)
            assert np.median(singular) > 0.5 and singular.max() < 1.5, f"{name} is near orthogonal"
        else:
            np.testing.assert_allclose(after[name][...], adam[...], atol=1e-6, err_msg=name)


def test_schedule_warms_up_and_comes_down():
    cfg = gpt_train.Config(lr=1.0, min_lr=0.1, warmup_steps=10, steps=100)
    lr = [float(gpt_train.make_schedule(cfg)(step)) for step in range(101)]
    assert 0 < lr[0] < 0.1 and lr[10] == max(lr) == 1 and lr[100] == pytest.approx(0.1)
    assert np.all(np.diff(lr[:11]) > 0) and np.all(np.diff(lr[10:]) < 0)
    assert lr[55] == pytest.approx(0.55)


# ---- gpt_train.py: runs ----


def test_run_leaves_metrics_curves_checkpoints_and_a_model_folder_that_pytorch_loads(capsys):
    last = gpt_train.main(gpt_train.Config(**TINY | dict(tokenizer="bpe:300", eval_every=6, sample_every=12)))
    said, folder = capsys.readouterr().out, Path("out/gpt-001")
    assert len(said.split("first step")[0].splitlines()) < 10
    assert {"ckpt", "config.json", "curves.png", "metrics.jsonl", "model.safetensors", "run.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert [line["step"] for line in lines(folder)] == list(range(1, 13))
    assert lines(folder)[-1] == last and lines(folder)[-1]["tokens"] == 12 * 128 * 32
    assert last["val_loss"] < lines(folder)[5]["val_loss"] < math.log(301)
    assert last["mfu"] is None and 0 <= last["data_wait"] < 1
    assert sorted(path.name for path in (folder / "ckpt").iterdir()) == ["12", "9"]
    info = json.loads((folder / "run.json").read_text())
    assert info["config"]["steps"] == 12 and info["jax"] == jax.__version__

    # bits per byte does not depend on the tokenizer: sum the nats by hand
    text = documents(JSON)[0]
    tokenizer, model = gpt_train.load_tokenizer(str(folder)), gpt_train.from_pretrained(str(folder))
    nats, _ = gpt_train.loss_sum(model, *gpt_train.validation_rows(tokenizer, [text], 32))
    assert last["val_bpb"] == pytest.approx(float(nats) / math.log(2) / len(text.encode()), rel=1e-4)

    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs, tokens = AutoModelForCausalLM.from_pretrained(folder), random_tokens(2, 20)
    np.testing.assert_allclose(
        forward(model, tokens), theirs(torch.tensor(tokens).long()).logits.detach(), atol=1e-4
    )
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert ids == gpt_train.encode(tokenizer, [text])[:-1].tolist()


def test_finished_run_can_be_evaluated_sampled_and_fine_tuned(capsys):
    gpt_train.main(gpt_train.Config(**TINY | dict(out_dir="base")))
    trained = lines("base")[-1]
    capsys.readouterr()
    again = gpt_train.main(gpt_train.Config(**TINY | dict(steps=0, init_from="base", tokenizer=None)))
    assert again["val_loss"] == pytest.approx(trained["val_loss"], rel=1e-5)
    evaluated = TINY | dict(steps=0, init_from="base", tokenizer=None)
    few = gpt_train.main(gpt_train.Config(**evaluated | dict(batch_size=8, eval_batches=2)))
    rows = gpt_train.validation_rows(gpt_train.load_tokenizer("base"), documents(JSON)[:1], 32)
    nats, count = nnx.jit(gpt_train.loss_sum)(gpt_train.from_pretrained("base"), *(x[:16] for x in rows))
    assert few["val_loss"] == pytest.approx(float(nats / count), rel=1e-5)
    prompts = ("def ", "import json\n")
    sampling = dict(steps=0, init_from="base", prompt=prompts, max_new_tokens=12, tokenizer=None)
    gpt_train.main(gpt_train.Config(**sampling))
    first = capsys.readouterr().out.split("\n---\n")
    assert len(first) == 2 and "def " in first[0] and first[1].startswith("import json\n")
    tuned = gpt_train.main(
        gpt_train.Config(**TINY | dict(init_from="base", tokenizer=None, lr=1e-4, out_dir="tuned"))
    )
    assert lines("tuned")[0]["loss"] < lines("base")[6]["loss"], "it starts where the other ended"
    assert tuned["val_loss"] < trained["val_loss"]
    assert not Path("out").exists(), "neither evaluating nor sampling makes a run"


def test_separate_validation_source():
    val = sysconfig.get_path("stdlib") + "/email/mime/text.py"
    gpt_train.main(gpt_train.Config(**TINY | dict(steps=2, val_data=(val,), out_dir="a")))
    seen = lines("a")[-1]["val_loss"]
    for source in (dict(data=(val,)), dict(val_data=(val,))):
        again = gpt_train.main(
            gpt_train.Config(**TINY | dict(steps=0, init_from="a", tokenizer=None) | source)
        )
        assert again["val_loss"] == pytest.approx(seen, rel=1e-5)


def test_kill_9_at_any_moment_twice_and_over_epoch_ends_changes_no_loss():
    args = TINY | dict(accum=2, dropout=0.1)
    code, _, err = run("gpt_train.py", *flags(**args, out_dir="whole"), **OPTIMISED)
    assert code == 0, err
    args, rng = flags(**args, out_dir="killed"), random.Random(0)
    for step in (4, 8):
        process = launch("gpt_train.py", *args, **OPTIMISED)
        wait_for_step(process, "killed", step)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.wait()
        args = flags(resume=True, out_dir="killed")
    code, _, err = run("gpt_train.py", *args, **OPTIMISED)
    assert code == 0, err
    assert losses("killed") == losses("whole") and len(losses("whole")) == 12
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resume_goes_on(number, monkeypatch, capsys):
    process = launch("gpt_train.py", *flags(**TINY | dict(steps=2000, ckpt_every=5000)))
    wait_for_step(process, "out/gpt-001", 5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err and "Exception ignored" not in err
    saved = max(int(path.name) for path in Path("out/gpt-001/ckpt").iterdir())
    assert f"saved at step {saved}; go on with --resume --out-dir out/gpt-001" in out
    assert lines("out/gpt-001")[-1]["step"] == saved
    again = flags(resume=True, steps=saved + 3)  # the newest run is found
    code, _, err = typed(monkeypatch, capsys, gpt_train, *again)
    assert code == 0, err
    assert [line["step"] for line in lines("out/gpt-001")] == list(range(1, saved + 4))


def test_run_that_diverges_stops_and_keeps_its_good_checkpoint():
    cfg = gpt_train.Config(
        **TINY | dict(lr=1e18, warmup_steps=0, grad_clip=0.0, ckpt_every=1, keep=20, out_dir="a")
    )
    with pytest.raises(
        common.RunError, match=r"step \d+: .*loss (nan|inf).*the last good checkpoint is step"
    ):
        gpt_train.main(cfg)
    for path in Path("a/ckpt").iterdir():
        assert np.isfinite(next(line["loss"] for line in lines("a") if line["step"] == int(path.name)))


def test_stream_that_gives_up_leaves_a_checkpoint(monkeypatch):
    def broken(*args, **how):
        yield from islice(batches(*args, **how), 4)
        raise common.StreamError("the data cannot be read")

    batches = common.batches
    monkeypatch.setattr(common, "batches", broken)
    with pytest.raises(common.RunError, match="cannot be read"):
        gpt_train.main(gpt_train.Config(**TINY | dict(out_dir="a")))
    assert "4" in os.listdir("a/ckpt")


def test_wandb_gets_every_line(monkeypatch):
    Path("wandb.py").write_text(
        "import json\nlog = lambda line, step: print('logged', json.dumps(line), file=open('log', 'a'))\n"
        "class Run:\n    log = staticmethod(log)\n    finish = staticmethod(lambda: None)\n"
        "init = lambda **how: print('init', how['project'], how['id'], file=open('log', 'a')) or Run\n"
    )
    monkeypatch.syspath_prepend(".")
    gpt_train.main(gpt_train.Config(**TINY | dict(steps=2, wandb="mine", out_dir="a")))
    del sys.modules["wandb"]
    first = Path("log").read_text().splitlines()[0]
    assert re.fullmatch(r"init mine a-[0-9a-f]{8}", first), "a name of its own: directories' names recur"
    assert [json.loads(x[7:]) for x in Path("log").read_text().splitlines()[1:]] == lines("a")


# ---- gpt_train.py from the hub ----


@pytest.fixture
def hub(tmp_path):
    """A hub with fineweb-edu (the standard library's documents, in row groups of 4) and a small gpt2."""
    root = tmp_path / "hub"
    folder = root / "datasets/HuggingFaceFW/fineweb-edu"
    texts = [text for text in documents("stdlib") if len(text) < 6000]
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


FINEWEB = dict(data=("HuggingFaceFW/fineweb-edu",), data_name=("sample-10BT",), tokenizer="gpt2")
FINEWEB = TINY | FINEWEB | dict(val_docs=3, shuffle_buffer=8, batch_size=64, steps=8)


def test_hub_data_tokenizer_and_weights_by_their_ids(hub):
    code, _, err = run("gpt_train.py", *flags(**FINEWEB, out_dir="a"), **hub.env)
    assert code == 0, err
    assert len(lines("a")) == 8
    args = flags(init_from="gpt2", steps=0, prompt="import", temperature=0, max_new_tokens=8)
    code, out, err = run("gpt_train.py", *args, **hub.env)
    assert code == 0 and out.startswith("import"), err
    code, _, err = run("gpt_train.py", "--data", "some/where", **hub.env)
    assert code == 2 and "--data some/where" in err.splitlines()[-1]


def break_requests(hub, after, kind_of):
    """Let `kind_of(n)` name what goes wrong with the n-th request for data after the first ones."""
    requests, lock = itertools.count(-after), threading.Lock()

    def fault(path):
        if ".parquet" not in path:
            return None
        with lock:
            n = next(requests)
        return kind_of(n) if n >= 0 else None

    hub.fault = fault


def test_hub_that_fails_changes_no_loss_killed_or_not(hub, monkeypatch):
    code, _, err = run("gpt_train.py", *flags(**FINEWEB, out_dir="whole"), **hub.env)
    assert code == 0, err
    kinds = [500, 503, 504, 429, "reset", "truncated", "stall"]
    break_requests(hub, 6, lambda n: kinds[n // 2] if n % 2 == 0 and n < 14 else None)  # each once
    code, _, err = run("gpt_train.py", *flags(**FINEWEB, out_dir="once"), **hub.env)
    assert code == 0, err
    assert hub.faults == 7
    assert losses("once") == losses("whole")

    dice = random.Random(0)
    break_requests(hub, 9, lambda n: dice.choice(kinds[:-1]) if dice.random() < 0.25 else None)
    process = launch("gpt_train.py", *flags(**FINEWEB, out_dir="killed"), **hub.env)
    wait_for_step(process, "killed", 4)
    process.kill()
    process.wait()
    monkeypatch.setattr(Hub, "sha", "f" * 40)  # a new commit meanwhile: the run goes on with the old one
    code, _, err = run("gpt_train.py", *flags(resume=True, out_dir="killed"), **hub.env)
    assert code == 0, err
    assert hub.faults >= 10
    assert losses("killed") == losses("whole")


def test_source_that_stays_away_is_given_up_with_a_checkpoint(hub):
    shutil.copytree(hub.root / "datasets/HuggingFaceFW/fineweb-edu/sample/10BT", hub.root / "files")
    web = dict(data=(f"{hub.url}/files/000.parquet",), data_name=(), tokenizer="byte", shuffle_buffer=4)
    args = flags(**FINEWEB | web | dict(steps=4000, eval_every=4000, ckpt_every=4000, out_dir="a", retries=1))
    break_requests(hub, 20, lambda n: "reset")
    code, _, err = run("gpt_train.py", *args)
    assert code == 1 and "Traceback" not in err, err
    assert "try 1 of 1 in 1 s" in err and "the data failed 2 times in a row: " in err.splitlines()[-1]
    (saved,) = (int(path.name) for path in Path("a/ckpt").iterdir())
    assert saved == lines("a")[-1]["step"] > 1, "all that was trained on good data is kept"


def test_ctrl_c_while_the_hub_is_down_ends_at_once(hub):
    args = flags(
        **FINEWEB | dict(steps=4000, eval_every=4000, ckpt_every=4000, shuffle_buffer=4), out_dir="a"
    )
    break_requests(hub, 20, lambda n: "reset")
    process, seen = launch("gpt_train.py", *args, **hub.env), -1
    wait_for_step(process, "a", 2)
    while process.poll() is None and seen != lines("a")[-1]["step"]:  # until the rows at hand are used up
        seen = lines("a")[-1]["step"]
        time.sleep(3)
    start = time.perf_counter()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "Exception ignored" not in err, err
    assert time.perf_counter() - start < 20
    (saved,) = (int(path.name) for path in Path("a/ckpt").iterdir())
    assert f"saved at step {saved}" in out and saved >= seen


# ---- the command line ----


def typed(monkeypatch, capsys, script, *args):
    """(exit code, stdout, stderr) of a command line, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *args])
    monkeypatch.setattr(os, "_exit", sys.exit)  # for the sake of a thread that still reads
    try:
        common.cli(script.Config, script.PRESETS, script.main, script.__doc__)
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("preset", gpt_train.PRESETS)
def test_every_preset_has_help_and_trains(preset, monkeypatch, capsys):
    code, text, _ = typed(monkeypatch, capsys, gpt_train, "--preset", preset, "--help")
    assert code == 0 and "tokens in a row" in text
    default = gpt_train.PRESETS[preset].get("n_embd", 96)
    assert str(default) in text.split("--n-embd")[1].split("--dropout")[0]
    if preset != "gpt2-large":
        return  # the others differ from it in sizes and remat, and the stdlib is in other tests
    # the preset's --data-name is for its own data, not for these
    small = dict(preset=preset, data=(JSON, JSON), val_docs=1, tokenizer="bpe:300", seq_len=64)
    small |= dict(n_layer=1, n_head=2, n_embd=64, batch_size=4, accum=2, steps=2, sample_every=0)
    code, _, err = typed(monkeypatch, capsys, gpt_train, *flags(**small))
    assert code == 0, err
    assert [line["step"] for line in lines("out/gpt-001")] == [2]


BAD = {
    "unknown preset": (["--preset", "gpt3"], "gpt3"),
    "typo": (["--step", "3"], "--steps"),
    "heads": (["--n-embd", "100", "--n-head", "3"], "--n-embd 100: must be divisible by --n-head 3"),
    "file": (["--data", "no/such.txt"], "--data no/such.txt: no such file"),
    "format": (["--data", "a.doc"], "cannot tell what it is from its name; expected .parquet"),
    "empty file": (["--data", "empty.jsonl"], "--data empty.jsonl: no documents"),
    "no text column": (
        ["--data", "rows.jsonl"],
        "no text column among id, title, body; name one with --text-column",
    ),
    "missing column": (
        ["--data", "rows.jsonl", "--text-column", "txt"],
        "no text column txt among id, title, body",
    ),
    "weights": (["--data-weights", "1", "2"], "--data-weights 1.0 2.0: one for each --data"),
    "negative weight": (["--data-weights", "-1"], "--data-weights -1.0: must be above 0"),
    "names": (["--data-name", "a", "b"], "--data-name a b: one for each --data, - for none"),
    "retries": (["--retries", "-1"], "--retries -1: must not be negative"),
    "nothing of JSON": (["--data", "not.jsonl"], "--data not.jsonl: no JSON object in its first ten lines"),
    "web": (["--data", "http://127.0.0.1:9/a.parquet"], "--data http://127.0.0.1:9/a.parquet: "),
    "few documents": (["--data", JSON, "--val-docs", "9"], "--val-docs 9: *json/*.py has only 5 documents"),
    "nothing left": (
        ["--data", JSON, "--val-docs", "5"],
        "--val-docs 5: leaves no document of *json/*.py to train on",
    ),
    "tokenizer": (["--tokenizer", "bpe:12"], "expected bpe:N with N above 256"),
    "no tokenizer": (["--tokenizer", "./nowhere"], "--tokenizer ./nowhere: no such folder, and not a hub id"),
    "no model": (["--init-from", "./nowhere"], "./nowhere: no such folder, and not a hub id"),
    "not a model": (["--init-from", ".", "--tokenizer", "byte"], "--init-from .: no config.json in it"),
    "positions": (["--init-from", "larger", "--tokenizer", "byte"], "--seq-len 128: larger has 48 positions"),
    "sizes": (
        ["--init-from", "model", "--seq-len", "8", "--tokenizer", "byte", "--n-layer", "9"],
        "--n-layer 9: model has 2",
    ),
    "vocabulary": (
        ["--init-from", "model", "--seq-len", "8", "--tokenizer", "byte"],
        "257 tokens, and model has a vocabulary of 199",
    ),
    "batch": (
        ["--batch-size", "10", "--accum", "4"],
        "--batch-size 10: must be a multiple of 4 (--accum 4 x 1 devices); try --accum 2 or --batch-size 8",
    ),
    "top-k": (["--top-k", "0"], "--top-k 0: must be at least 1"),
    "top-p": (["--top-p", "1.5"], "--top-p 1.5: must be in (0, 1]"),
    "prompt": (["--prompt", ""], "--prompt: is empty"),
    "long prompt": (
        [
            "--data",
            JSON,
            "--val-docs",
            "1",
            "--tokenizer",
            "byte",
            "--seq-len",
            "8",
            "--prompt",
            "a long one",
        ],
        "--prompt: 10 tokens, and there are 8 positions",
    ),
    "one document": (
        ["--data", "one.txt", "--val-docs", "1"],
        "leaves no document of one.txt*or give --val-data",
    ),
    "mixed": (["--data", "."], "--data .: holds json, jsonl, text; name one kind"),
    "no steps": (["--steps", "0"], "--steps 0: trains nothing; name a finished model with --init-from"),
    "nothing to resume": (["--resume"], "--resume: no run of gpt_train.py under out/"),
    "no run": (["--resume", "--out-dir", "model"], "--resume: model holds no run"),
    "taken": (["--out-dir", "model"], "--out-dir model: not empty and not a run"),
    "wandb": (["--wandb", "x"], "--wandb x: needs `pip install wandb`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, monkeypatch, capsys):
    Path("empty.jsonl").write_text("")
    Path("a.doc").write_text("x")
    Path("one.txt").write_text("x")
    Path("not.jsonl").write_text("text\nmore text\n")
    Path("rows.jsonl").write_text('{"id": 1, "title": "a", "body": "b"}\n' * 30)
    gpt_train.save_pretrained(tiny_model(), "model")
    gpt_train.save_pretrained(tiny_model(300), "larger")
    before = sorted(path for path in Path(".").rglob("*"))
    args, message = BAD[case]
    code, _, err = typed(monkeypatch, capsys, gpt_train, "--steps", "1", *args)
    assert code == 2
    head, _, tail = message.partition("*")
    assert head in err and tail in err
    if case not in ("unknown preset", "typo"):  # tyro draws a box around these
        assert len(err.strip().splitlines()) == 1
    assert sorted(path for path in Path(".").rglob("*")) == before, (
        "nothing is written before the flags are good"
    )


def test_run_directory_is_never_taken_over_without_being_told(monkeypatch, capsys):
    args = flags(**TINY | dict(steps=3, n_layer=1, out_dir="a"))
    assert typed(monkeypatch, capsys, gpt_train, *args)[0] == 0
    before = losses("a")
    code, _, err = typed(monkeypatch, capsys, gpt_train, *args)
    assert code == 2 and "holds a run already; --resume to go on with it, --overwrite" in err
    assert losses("a") == before
    for changes, message in {
        ("--data", sysconfig.get_path("stdlib") + "/email/*.py"): "was started with",
        ("--seq-len", "16"): "--seq-len 16: the run in a was started with 32; start a new run to change it",
        ("--seed", "7"): "--seed 7: the run in a was started with 0",
        ("--shuffle-buffer", "7"): "--shuffle-buffer 7: the run in a was started with 1000",
        ("--data", JSON, JSON, "--data-weights", "1", "2"): "the run in a was started with",
        ("--preset", "gpt2"): "--preset gpt2: the run in a was started with stdlib",
        ("--steps", "2"): "--steps 2: the run in a is at step 3 already",
    }.items():
        code, _, err = typed(monkeypatch, capsys, gpt_train, "--resume", "--out-dir", "a", *changes)
        assert code == 2 and message in err
    info = json.loads(Path("a/run.json").read_text())
    info["data"]["processes"] = 4
    Path("a/run.json").write_text(json.dumps(info))
    code, _, err = typed(monkeypatch, capsys, gpt_train, "--resume", "--out-dir", "a", "--steps", "5")
    assert code == 2 and "processes of the data is 1, and was 4 when a began" in err
    info["data"]["processes"] = 1
    Path("a/run.json").write_text(json.dumps(info))
    assert losses("a") == before
    longer = ("--resume", "--out-dir", "a", "--steps", "5", "--grad-clip", "0", "--ckpt-every", "1")
    assert typed(monkeypatch, capsys, gpt_train, *longer)[0] == 0
    assert [line["step"] for line in lines("a")] == [1, 2, 3, 4, 5] and losses("a")[:2] == before[:2]
    code, _, err = typed(monkeypatch, capsys, gpt_train, *args, "--overwrite", "--init-from", "a")
    assert code == 2 and "--init-from a: --overwrite would delete it" in err
    code, _, err = typed(monkeypatch, capsys, bert_mlm, "--resume", "--out-dir", "a")
    assert code == 2 and "--resume: a is no run of bert_mlm.py" in err
    shutil.rmtree("a/ckpt")
    code, _, err = typed(monkeypatch, capsys, gpt_train, "--resume", "--out-dir", "a")
    assert code == 2 and "a has no checkpoint any more, and was at step 5" in err and len(lines("a")) == 5
    assert typed(monkeypatch, capsys, gpt_train, *args, "--overwrite")[0] == 0
    assert losses("a") == before


def test_changed_files_are_not_resumed(monkeypatch, capsys):
    Path("text.txt").write_text("one two three " * 3000)
    Path("val.txt").write_text("one two three " * 10)
    args = flags(**TINY | dict(data=("text.txt",), val_data=("val.txt",), steps=2, out_dir="a"))
    assert typed(monkeypatch, capsys, gpt_train, *args)[0] == 0
    Path("text.txt").write_text("one two three four " * 3000)
    code, _, err = typed(monkeypatch, capsys, gpt_train, "--resume", "--out-dir", "a", "--steps", "4")
    assert code == 2 and "files of the data" in err


def test_hub_that_cannot_be_reached_is_said_at_once():
    nowhere = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_DISABLE_XET="1")
    start = time.perf_counter()
    data = launch("gpt_train.py", "--data", "some/where", **nowhere)
    code, _, err = run("gpt_train.py", "--init-from", "some/model", **nowhere)
    assert code == 2 and "some/model: no such folder, nor on the hub" in err.splitlines()[-1]
    _, err = data.communicate(timeout=100)
    assert data.returncode == 2 and "without a network, try the default --data" in err.splitlines()[-1]
    assert time.perf_counter() - start < 60


def test_same_command_same_losses():
    short = TINY | dict(steps=3, dropout=0.1, n_layer=1)
    for name in ("a", "b"):
        gpt_train.main(gpt_train.Config(**short, out_dir=name))
    assert losses("a") == losses("b")
    gpt_train.main(gpt_train.Config(**short, out_dir="c", seed=1))
    assert losses("c")[0]["loss"] != losses("a")[0]["loss"]


# ---- bert_mlm.py: the model against transformers' PyTorch BERT ----

BERT = dict(data=(JSON,), val_docs=1, tokenizer="bpe:300", seq_len=32, n_layer=2, n_head=2, n_embd=32)
BERT |= dict(steps=12, batch_size=128, optimizer="adamw", lr=1e-2, warmup_steps=2, log_every=1)
BERT |= dict(eval_every=12, ckpt_every=3)
CLASSIFY = BERT | dict(task="classify", pre_norm=False, val_docs=None, batch_size=16, steps=60)
CLASSIFY |= dict(eval_every=30, ckpt_every=20)


def tiny_bert(seed=0, pre_norm=False, head="mlm", dtype="float32", remat=False, **changes):
    """A small BERT with every parameter random, biases and norms too."""
    sizes = dict(vocab_size=199, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(intermediate_size=96, max_position_embeddings=48, num_labels=3)
    sizes |= dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    config = (MegatronBertConfig if pre_norm else BertConfig)(**sizes | changes)
    model = bert_mlm.BERT(config, head=head, dtype=dtype, remat=remat, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for param in jax.tree.leaves(nnx.state(model), is_leaf=lambda p: isinstance(p, nnx.Param)):
        param.set_value(param[...] + 0.1 * rng.normal(size=param.shape).astype(np.float32))
    return model


def padded(B, T, seed=0, V=199):
    """Tokens (B, T) of rows of unequal length, their lengths, and token types."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[T], rng.integers(2, T, B - 1)]).astype(np.int32)
    tokens = np.where(np.arange(T) < lengths[:, None], rng.integers(1, V, (B, T)), 0).astype(np.int32)
    return tokens, lengths, (np.arange(T) > lengths[:, None] // 2).astype(np.int32)


def mlm_batch(B=4, T=33, seed=0):
    """A batch as the training step sees it after masking, with rows of unequal length and weight."""
    tokens, lengths, _ = padded(B, T, seed)
    return masker(199, 5, ())(jax.random.key(seed), tokens) | dict(lengths=lengths)


def torch_mlm(theirs, batch):
    """Loss of transformers' model on the same masked batch: labels are -100 where nothing is asked."""
    import torch

    tokens = np.asarray(batch["tokens"])
    labels = np.full(tokens.shape, -100)
    for row, (at, targets, weights) in enumerate(
        zip(*(np.asarray(batch[k]) for k in ("positions", "targets", "weights")))
    ):
        labels[row, at[weights > 0]] = targets[weights > 0]
    mask = np.arange(tokens.shape[1]) < np.asarray(batch["lengths"])[:, None]
    inputs = dict(input_ids=tokens, attention_mask=mask, labels=labels)
    return theirs(**{k: torch.tensor(x).long() for k, x in inputs.items()}).loss


@pytest.fixture(params=[False, True], ids=["post-norm", "pre-norm"])
def berts(request, tmp_path):
    """Our BERT, and the one that transformers loads from our export; pre-norm is Megatron's there."""
    pytest.importorskip("torch")
    from transformers import AutoModelForMaskedLM

    model = tiny_bert(pre_norm=request.param)
    bert_mlm.save_pretrained(model, tmp_path / "model")
    theirs, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model, theirs.eval()


def test_bert_logits_with_padding_and_token_types_equal_transformers(berts):
    import torch

    model, theirs = berts
    tokens, lengths, types = padded(5, 33)
    mask = np.arange(33) < lengths[:, None]
    inputs = dict(input_ids=tokens, attention_mask=mask, token_type_ids=types)
    wanted = theirs(**{k: torch.tensor(x).long() for k, x in inputs.items()}).logits.detach().numpy()
    logits = model.mlm_logits(forward(model, tokens, mask, types))
    np.testing.assert_allclose(np.asarray(logits)[mask], wanted[mask], atol=1e-4)
    bare = theirs(torch.tensor(tokens).long()).logits.detach()
    np.testing.assert_allclose(model.mlm_logits(forward(model, tokens)), bare, atol=1e-4)


def test_bert_masked_loss_and_gradients_equal_transformers(berts):
    model, theirs = berts
    batch = mlm_batch()
    loss = torch_mlm(theirs, batch)
    loss.backward()

    def loss_fn(model):
        return bert_mlm.loss_sum(model, batch)[0] / jnp.sum(batch["weights"])

    ours, grads = nnx.jit(nnx.value_and_grad(loss_fn))(model)
    assert abs(ours - loss.item()) < 1e-5
    wanted = dict(theirs.named_parameters())
    grads = bert_mlm.checkpoint_names(grads)
    assert set(grads) == set(wanted) - {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    for name, grad in grads.items():
        grad, theirs = np.asarray(grad[...]), wanted[name].grad.numpy()
        grad = grad.T if bert_mlm.is_kernel(name) else grad
        np.testing.assert_allclose(grad[: len(theirs)], theirs, atol=2e-5, err_msg=name)
        assert not np.any(grad[len(theirs) :]), "the padding of the vocabulary learns nothing"


def bert_step(cfg, batch, model, schedule, prepare=lambda key, batch: batch):
    graphdef, state = nnx.split(
        (model, nnx.Optimizer(model, bert_mlm.make_optimizer(cfg, schedule), wrt=nnx.Param))
    )
    state = common.shard_state(common.make_mesh(), state, fsdp=False)
    return graphdef, state, bert_mlm.make_train_step(graphdef, state, cfg.accum, schedule, prepare)


def test_ten_bert_optimizer_steps_equal_pytorch_adamw(berts):
    import torch

    model, theirs = berts
    changes = dict(lr=1e-2, warmup_steps=3, steps=10, accum=2, grad_clip=0.5, weight_decay=0.1)
    cfg = bert_mlm.Config(optimizer="adamw", **changes)
    schedule = bert_mlm.make_schedule(cfg)
    graphdef, state, step = bert_step(cfg, None, model, schedule)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    for i in range(10):
        batch = mlm_batch(seed=i)
        state, metrics = step(state, batch, jax.random.key(i))
        loss = torch_mlm(theirs, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), cfg.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(i))
        optimizer.step()
        assert abs(metrics["loss"] - loss.item()) < 1e-4
        assert abs(metrics["grad_norm"] - norm.item()) < 1e-3
    tokens = padded(2, 20)[0]
    model, logits = nnx.merge(graphdef, state)[0], theirs(torch.tensor(tokens).long()).logits.detach()
    np.testing.assert_allclose(model.mlm_logits(forward(model, tokens)), logits, atol=1e-3)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_bert_classifier_export_has_the_same_logits_in_pytorch(pre_norm):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    model = tiny_bert(pre_norm=pre_norm, head="classify")
    bert_mlm.save_pretrained(model, "model")
    theirs, info = AutoModelForSequenceClassification.from_pretrained("model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens, lengths, _ = padded(5, 33)
    mask = np.arange(33) < lengths[:, None]
    wanted = theirs.eval()(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).logits
    np.testing.assert_allclose(model.class_logits(forward(model, tokens, mask)), wanted.detach(), atol=1e-4)
    again = bert_mlm.from_pretrained("model")
    np.testing.assert_array_equal(
        again.class_logits(forward(again, tokens)), model.class_logits(forward(model, tokens))
    )


def test_bert_published_names_old_and_new_load():
    from safetensors.numpy import load_file, save_file

    model, tokens = tiny_bert(), padded(3, 20)[0]
    bert_mlm.save_pretrained(model, "model")
    weights = load_file("model/model.safetensors")
    assert weights["bert.encoder.layer.1.attention.self.query.bias"].shape == (48,)
    assert weights["bert.encoder.layer.1.intermediate.dense.weight"].shape == (96, 48), "(out, in)"
    encoder = {name: w for name, w in weights.items() if name.startswith("bert.")}
    extra = {"bert.embeddings.position_ids": np.arange(48)[None], "bert.pooler.dense.bias": np.ones(48)}
    new, old = [(".weight", ".gamma"), (".bias", ".beta")], "LayerNorm"
    rename = lambda n: n.replace(*new[0]).replace(*new[1]) if old in n else n
    files = {
        "google's": {rename(n): w for n, w in (weights | extra).items()},
        "without a head": encoder | extra,
        "without a prefix": {n.removeprefix("bert."): w for n, w in (encoder | extra).items()},
    }
    for case, names in files.items():
        save_file(names, "model/model.safetensors")
        found = bert_mlm.from_pretrained("model")
        assert found.head == ("mlm" if case == "google's" else None)
        np.testing.assert_array_equal(forward(found, tokens), forward(model, tokens), err_msg=case)
    with pytest.raises(common.UsageError, match=r"has no cls.predictions.bias, .*for --task mlm"):
        bert_mlm.from_pretrained("model", head="mlm")
    anew = [bert_mlm.from_pretrained("model", head="mlm", new_head=True, seed=s) for s in (0, 0, 1)]
    np.testing.assert_array_equal(forward(anew[0], tokens), forward(model, tokens))
    logits = [m.mlm_logits(m(tokens)) for m in anew]
    assert np.all(logits[0] == logits[1]) and np.any(logits[0] != logits[2])


def test_bert_attention_with_dropout_is_the_fused_one_where_all_weights_are_kept():
    tokens, lengths, _ = padded(3, 20)
    mask = np.arange(20) < lengths[:, None]
    nearly, key = tiny_bert(attention_probs_dropout_prob=1e-9), jax.random.key(0)
    np.testing.assert_allclose(
        forward(nearly, tokens, mask, key=key)[mask], forward(nearly, tokens, mask)[mask], atol=1e-5
    )
    model = tiny_bert(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    np.testing.assert_array_equal(
        forward(model, tokens, mask, key=key), forward(model, tokens, mask, key=key)
    )
    assert np.any(forward(model, tokens, mask, key=key) != forward(model, tokens, mask))
    assert np.any(
        forward(model, tokens, mask, key=key) != forward(model, tokens, mask, key=jax.random.key(1))
    )


def test_bert_remat_changes_no_gradient_and_bfloat16_stays_near():
    batch = mlm_batch()
    loss = lambda m: bert_mlm.loss_sum(m, batch, jax.random.key(0))[0]
    grads = [
        nnx.jit(nnx.grad(loss))(tiny_bert(hidden_dropout_prob=0.1, remat=remat)) for remat in (False, True)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *grads)
    half, tokens = tiny_bert(dtype="bfloat16"), padded(2, 20)[0]
    assert {p.dtype for p in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    assert (
        forward(half, tokens).dtype == jnp.bfloat16
        and half.mlm_logits(forward(half, tokens)).dtype == jnp.float32
    )
    np.testing.assert_allclose(
        forward(half, tokens).astype(np.float32), forward(tiny_bert(), tokens), atol=0.15
    )


# ---- bert_mlm.py: masking ----


def masking(B=512, T=64, V=200, seed=0, special=10, **how):
    """(tokens, rules, what mask_tokens makes of them): specials at the ends, in the middle, and padding."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[T, 3, 2], rng.integers(2, T + 1, B - 3)])
    tokens = rng.integers(special, V, (B, T)).astype(np.int32)
    tokens[rng.random((B, T)) < 0.02] = 3
    tokens[:, 0], tokens[np.arange(B), lengths - 1] = 2, 3
    tokens[np.arange(T) >= lengths[:, None]] = 0
    rules = mask_rules(V, special)
    how = tuple(how.items())
    mask = masker(V, special, how)
    return tokens, rules, {name: np.asarray(x) for name, x in mask(jax.random.key(seed), tokens).items()}


@cache
def masker(V, special, how):
    return jax.jit(partial(bert_mlm.mask_tokens, rules=mask_rules(V, special), **dict(how)))


def mask_rules(V=199, special=5):
    """Of a vocabulary whose first ids are special, and where every third id goes on with a word."""
    ids = np.arange(V)
    begins = (ids < special) | (ids % 3 > 0)
    return dict(special=ids < special, begins=begins, ends=ids < special, ordinary=ids[special:], mask=4)


def masked_places(tokens, out):
    places = np.zeros(tokens.shape, bool)
    rows, at = np.nonzero(out["weights"])
    places[rows, out["positions"][rows, at]] = True
    assert places.sum() == out["weights"].sum(), "no position twice"
    return places


def words_of(tokens, rules):
    """Word numbers, written plainly: a token belongs to the word before it unless it begins one."""
    words = np.zeros(tokens.shape, int)
    for row, ids in enumerate(tokens):
        for t, token in enumerate(ids):
            new = t == 0 or rules["begins"][token] or rules["ends"][ids[t - 1]]
            words[row, t] = words[row, t - 1] + new if t else 0
    return words


@pytest.mark.parametrize("share", [0.15, 0.3])
def test_masking_hides_an_exact_count_of_ordinary_tokens_and_tells_the_truth(share):
    for seed in range(4):
        tokens, rules, out = masking(seed=seed, share=share)
        places, real = masked_places(tokens, out), ~rules["special"][tokens]
        assert not np.any(places & ~real), "never [CLS], [SEP] or [PAD]"
        n = real.sum(1)
        wanted = np.where(n, np.maximum(1, np.floor(share * n + 0.5)), 0)
        np.testing.assert_array_equal(places.sum(1), wanted)
        assert out["positions"].shape == (512, math.floor(share * 64 + 0.5))
        np.testing.assert_array_equal(out["targets"], np.take_along_axis(tokens, out["positions"], 1))
        assert np.all(out["tokens"][~places] == tokens[~places]), "nothing else changes"


def test_masking_is_80_10_10_and_even_over_positions_and_draws():
    places, new, old = [], [], []
    for seed in range(15):
        tokens, rules, out = masking(seed=7 * seed)
        places.append(masked_places(tokens, out))
        new.append(out["tokens"][places[-1]])
        old.append(tokens[places[-1]])
    new, old = np.concatenate(new), np.concatenate(old)
    n = len(new)
    masked, kept = np.mean(new == 4), np.mean(new == old)
    assert n > 30_000
    assert abs(masked - 0.8) < 0.01 and abs(kept - 0.1 - 0.1 / 190) < 0.01
    random = new[(new != 4) & (new != old)]
    assert random.min() >= 10, "no special token is put in"
    counts, mean = np.bincount(random, minlength=200)[10:], len(random) / 190
    assert 110 < np.sum((counts - mean) ** 2) / mean < 280, "any ordinary token (chi-square of 189)"
    # a full row of its own: each position equally often
    tokens = np.full((4000, 22), 50, np.int32)
    tokens[:, 0], tokens[:, -1] = 2, 3
    out = jax.jit(partial(bert_mlm.mask_tokens, rules=rules))(jax.random.key(0), tokens)
    share = masked_places(tokens, out).mean(0)
    assert share[0] == share[-1] == 0 and np.all(np.abs(share[1:-1] - 3 / 20) < 0.025)


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_whole_words_are_whole_and_the_count_exact_while_one_token_words_last(share):
    short = 0
    for seed in range(3):
        tokens, rules, out = masking(seed=seed, share=share, whole_word=True)
        places, real, words = masked_places(tokens, out), ~rules["special"][tokens], words_of(tokens, rules)
        assert not np.any(places & ~real)
        for row in range(len(tokens)):
            n, count = real[row].sum(), places[row].sum()
            quota = max(1, math.floor(share * n + 0.5)) if n else 0
            sizes = np.bincount(words[row][real[row]], minlength=words[row].max() + 1)
            hit = np.bincount(words[row][places[row]], minlength=len(sizes))
            assert np.all((hit == 0) | (hit == sizes)), "a word is masked whole or not at all"
            assert count <= quota
            if count < quota:
                assert np.all(hit[sizes == 1] == 1), "short only when no one-token word is left"
                short += 1
    assert 0 < short < 100


def test_masking_is_keyed_by_the_step_and_rows_differ():
    tokens, rules = masking()[0][:8], mask_rules(200, 10)
    draw = lambda i: np.asarray(
        bert_mlm.mask_tokens(jax.random.fold_in(jax.random.key(0), i), tokens, rules)["tokens"]
    )
    np.testing.assert_array_equal(draw(3), draw(3))
    assert np.any(draw(3) != draw(4))
    same = np.tile(tokens[:1], (8, 1))
    out = bert_mlm.mask_tokens(jax.random.key(0), same, rules)
    assert len(np.unique(np.asarray(out["positions"]), axis=0)) == 8


def test_word_starts_of_wordpiece_and_byte_level_tokenizers():
    texts = ["import numpy as np\nprint(foo_bar.baz2, naïve Größe"] * 3
    bpe = bert_mlm.load_tokenizer("bpe:300", texts)
    piece = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    piece.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    names = [*map(str, bert_mlm.SPECIAL.values())]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=80, special_tokens=names, show_progress=False)
    piece.train_from_iterator(texts, trainer)
    piece = PreTrainedTokenizerFast(tokenizer_object=piece, **bert_mlm.SPECIAL)
    wanted = re.findall(r"[^\W_]+|\S", texts[0])
    for tokenizer in (bpe, piece):
        rules = bert_mlm.masking_rules(tokenizer)
        assert rules["special"].sum() == 5 and rules["mask"] == tokenizer.convert_tokens_to_ids("[MASK]")
        ids = bert_mlm.encode(tokenizer, texts)[0]
        words = words_of(ids[None], rules)[0]
        found = [tokenizer.decode(ids[words == w]).replace("##", "").strip() for w in range(words.max() + 1)]
        assert [w for w in found if w] == wanted


def test_gathered_head_equals_the_full_head():
    model, batch = tiny_bert(), mlm_batch()
    mask = np.arange(33) < batch["lengths"][:, None]

    def full(model):  # logits of all positions, and only then those asked for
        logits = model.mlm_logits(forward(model, batch["tokens"], mask))
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), place(batch["targets"])[..., None], 2)[..., 0]
        return jnp.sum(nats * place(batch["weights"]))

    place = lambda x: jnp.zeros((4, 33), x.dtype).at[jnp.arange(4)[:, None], batch["positions"]].set(x)
    gathered = lambda model: bert_mlm.loss_sum(model, batch)[0]
    (a, grad_a), (b, grad_b) = (nnx.jit(nnx.value_and_grad(f))(model) for f in (gathered, full))
    assert a == pytest.approx(float(b), rel=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-4), grad_a, grad_b)
    assert nnx.eval_shape(bert_mlm.target_logits, model, batch).shape == (4, 5, 199)


def test_bert_accumulation_draws_the_same_masks_and_weighs_tokens_alike():
    tokens = padded(8, 33)[0]  # rows with few tokens would count for more in a mean of means
    rules = mask_rules()
    prepare = lambda key, batch: bert_mlm.mask_tokens(key, batch["tokens"], rules)
    results = []
    for accum in (1, 4):
        cfg = bert_mlm.Config(optimizer="adamw", lr=1e-2, steps=10, warmup_steps=0, accum=accum)
        model = tiny_bert(num_hidden_layers=1)
        _, state, step = bert_step(cfg, None, model, bert_mlm.make_schedule(cfg), prepare)
        results.append(step(state, dict(tokens=tokens), jax.random.key(0))[1])
    for metrics in results[1:]:
        for name, value in metrics.items():
            assert value == pytest.approx(float(results[0][name]), rel=1e-4), name
    masked = jax.jit(prepare)(jax.random.split(jax.random.key(0))[0], dict(tokens=tokens))
    nats, hits, _ = nnx.jit(bert_mlm.loss_sum)(tiny_bert(num_hidden_layers=1), masked)
    assert results[0]["loss"] == pytest.approx(float(nats / masked["weights"].sum()), rel=1e-5)
    assert results[0]["acc"] == pytest.approx(float(hits / masked["weights"].sum()), rel=1e-5)


def test_bert_schedule_is_linear_up_and_down():
    cfg = bert_mlm.Config(lr=1.0, min_lr=0.1, warmup_steps=10, steps=100)
    lr = [float(bert_mlm.make_schedule(cfg)(step)) for step in range(101)]
    assert 0 < lr[0] < 0.1 and lr[10] == max(lr) == 1 and lr[100] == pytest.approx(0.1)
    np.testing.assert_allclose(np.diff(lr[10:]), -0.01, atol=1e-6)


def test_new_bert_starts_as_published():
    config = BertConfig(num_hidden_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=500)
    model = bert_mlm.BERT(config, rngs=nnx.Rngs(0))
    std = lambda p: float(np.std(p[...]))
    layer = model.bert.encoder.layer[2]
    for p in (layer.attention["self"].key.kernel, layer.output.dense.kernel):
        assert std(p) == pytest.approx(0.02, rel=0.05)
    tokens = random_tokens(4, 64, 500)
    logits = model.mlm_logits(forward(model, tokens))
    nats = -np.mean(np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[..., None], 2))
    assert nats == pytest.approx(math.log(500), rel=0.02)


# ---- bert_mlm.py: data ----


def bert_tokenizer():
    return bert_mlm.load_tokenizer("bpe:300", documents(JSON))


def test_bert_rows_are_framed_and_hold_the_documents_but_for_those_held_out():
    cfg, tokenizer, texts = (
        bert_mlm.Config(**BERT | dict(shuffle_buffer=2)),
        bert_tokenizer(),
        documents(JSON),
    )
    source = open_train(JSON, script=bert_mlm)[0]
    epochs = []
    for epoch in range(2):
        rows = [r["tokens"] for r in bert_mlm.training_rows(source, tokenizer, cfg, {texts[0]}, epoch)]
        rows = np.stack(rows)
        assert rows.shape[1] == 32
        assert np.all(rows[:, 0] == tokenizer.cls_token_id) and np.all(rows[:, -1] == tokenizer.sep_token_id)
        assert not np.any(rows == tokenizer.pad_token_id), "no padding"
        kept = "".join(tokenizer.decode(row[1:-1]) for row in rows)
        assert len(kept) > 0.97 * sum(map(len, texts[1:]))
        whole = [tokenizer.decode(bert_mlm.encode(tokenizer, [text])[0]) for text in texts]
        inside = [
            sum(tokenizer.decode(row[1:-1]).split("[SEP]")[0] in text for row in rows) for text in whole
        ]
        assert inside[0] < 0.1 * len(rows) and all(inside[1:])
        epochs.append({tuple(row) for row in rows})
    assert len(epochs[0] & epochs[1]) < 0.1 * len(epochs[0]), "another cut in every epoch"


def test_bert_validation_rows_hold_every_token_once():
    tokenizer, texts = bert_tokenizer(), documents(JSON)[:2]
    rows = bert_mlm.validation_rows(tokenizer, texts, 32)
    ends = dict(cls=tokenizer.cls_token_id, sep=tokenizer.sep_token_id)
    assert np.all(rows[:, 0] == ends["cls"]) and np.all(rows[:-1, -1] == ends["sep"])
    inner = np.concatenate([row[1 : np.flatnonzero(row == ends["sep"])[-1]] for row in rows])
    wanted = np.concatenate([*bert_mlm.encode(tokenizer, [texts[0]]), [ends["sep"]]])
    wanted = np.concatenate([wanted, *bert_mlm.encode(tokenizer, [texts[1]])])
    np.testing.assert_array_equal(inner, wanted)


def test_special_tokens_inside_a_text_are_text_and_training_a_tokenizer_is_exact():
    tokenizer = bert_tokenizer()
    ids = bert_mlm.encode(tokenizer, ["a [MASK] b [SEP]"])[0]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == "a [MASK] b [SEP]"
    again = bert_tokenizer()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def reviews(n=600, long=0):
    """Texts whose class is told by one word of theirs, the first `long` of them longer than the rest."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, n)
    fill = lambda i: " ".join(rng.choice(["so", "it", "was", "then"], rng.integers(1, 9) + 40 * (i < long)))
    texts = [f"{['bad', 'fine', 'good'][label]} {fill(i)} {i}" for i, label in enumerate(labels)]
    return texts, labels.tolist()


def write_reviews(folder="reviews", **how):
    texts, labels = reviews(**how)
    Path(folder).mkdir()
    for split, part in {"train": slice(100, None), "validation": slice(0, 100)}.items():
        rows = zip(texts[part], labels[part])
        Path(f"{folder}/{split}.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    return folder


def test_labelled_rows_come_by_length_each_with_its_label():
    data = write_reviews(long=150)
    cfg = bert_mlm.Config(**CLASSIFY | dict(data=(data,), shuffle_buffer=200, seq_len=40))
    source = open_train(data, script=bert_mlm, columns=("text", "label"))[0]
    tokenizer, wanted = bert_tokenizer(), {r["text"]: r["label"] for r in source}
    cut, held = set(), next(iter(wanted))
    how = dict(classes=["a", "b", "c"], cut=cut)
    rows = list(bert_mlm.labelled_rows(source, tokenizer, cfg, {held}, 0, **how))
    assert len(rows) > 450
    assert len(rows) % cfg.batch_size == 0
    seen = []
    for row in rows:
        text = tokenizer.decode(row["tokens"][1 : row["lengths"] - 1])
        found = [t for t in wanted if t.startswith(text)] if row["lengths"] == 40 else [text]
        assert found and wanted[found[0]] == row["targets"]
        assert np.all(row["tokens"][row["lengths"] :] == tokenizer.pad_token_id)
        seen += found
    assert len(set(seen)) == len(seen) and held not in seen
    assert 40 < len(cut) <= 50, "the long ones"
    widths = [max(r["lengths"] for r in rows[i : i + 16]) for i in range(0, len(rows), 16)]
    assert sorted(widths)[len(widths) // 2] < 30 and max(widths) == 40
    assert widths != sorted(widths), "lengths do not come in order"


# ---- bert_mlm.py: evaluation, fill-mask, embeddings ----


def test_bert_evaluation_is_a_mean_over_targets_in_any_batch_size():
    model, batch = tiny_bert(), {k: np.asarray(x) for k, x in mlm_batch(B=10).items()}
    step = nnx.jit(bert_mlm.eval_sums)
    found = [bert_mlm.evaluate(step, model, batch, size, lambda x: x) for size in (4, 10)]
    nats, _, guess = nnx.jit(bert_mlm.loss_sum)(model, batch)
    weights = batch["weights"] > 0
    assert found[0]["val_loss"] == pytest.approx(float(nats) / weights.sum(), rel=1e-5)
    assert found[1]["val_loss"] == pytest.approx(found[0]["val_loss"], rel=1e-5)
    assert found[0]["val_acc"] == found[1]["val_acc"] == np.mean((guess == batch["targets"])[weights])


def test_macro_f1_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    model, (tokens, lengths, _) = tiny_bert(head="classify"), padded(50, 20)
    guess = np.argmax(model.class_logits(forward(model, tokens, np.arange(20) < lengths[:, None])), 1)
    rng = np.random.default_rng(0)
    for classes in (3, 2):  # of the third class there may be none, but for guesses
        targets = np.where(rng.random(50) < 0.5, guess, rng.integers(0, classes, 50)).astype(np.int32)
        batch = dict(tokens=tokens, lengths=lengths, targets=targets, weights=np.ones(50, np.float32))
        found = bert_mlm.evaluate(nnx.jit(bert_mlm.eval_sums), model, batch, 16, lambda x: x)
        assert found["val_acc"] == pytest.approx(np.mean(targets == guess))
        assert found["val_f1"] == pytest.approx(metrics.f1_score(targets, guess, average="macro"))


def test_unigram_baseline_is_the_loss_of_the_frequencies():
    tokens = np.array([[2, 7, 7, 7, 9, 3, 0, 0]], np.int32)
    batch = dict(targets=np.array([[7, 9, 7]]), weights=np.array([[1.0, 1, 0]]))
    loss, accuracy = bert_mlm.unigram_baseline(tokens, mask_rules(12), batch)
    assert loss == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2) and accuracy == 0.5


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory):
    """A run directory's worth of a random BERT with its tokenizer; and both loaded."""
    folder, tokenizer = tmp_path_factory.mktemp("bert") / "model", bert_tokenizer()
    model = tiny_bert(vocab_size=len(tokenizer), max_position_embeddings=64)
    bert_mlm.save_pretrained(model, folder, tokenizer)
    return str(folder), model, tokenizer


def test_embedding_does_not_depend_on_batch_padding_or_company(small_bert, capsys):
    _, model, tokenizer = small_bert
    texts = [text[i * 40 :][: 3 * i + 1] for i, text in enumerate(documents(JSON) * 5)]
    for pooling in ("mean", "cls"):
        vectors = bert_mlm.embed(model, tokenizer, texts, pooling)
        assert vectors.shape == (25, 48) and vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
        small = bert_mlm.embed(model, tokenizer, texts[::-1], pooling, batch_size=4)[::-1]
        np.testing.assert_allclose(small, vectors, atol=2e-6)
        alone = bert_mlm.embed(model, tokenizer, texts[3:4], pooling, batch_size=1)[0]
        np.testing.assert_allclose(alone, vectors[3], atol=2e-6)
    assert len({bert_mlm.bucket(n, 512) for n in range(1, 513)}) == 11, "a handful of compilations"
    assert all(n <= bert_mlm.bucket(n, 512) <= max(16, 1.5 * n) for n in range(1, 513))
    capsys.readouterr()
    cut = bert_mlm.embed(model, tokenizer, ["a" * 500, "b", "c" * 400])
    assert "2 of 3 texts are longer than 64 tokens and were cut" in capsys.readouterr().out
    assert np.all(np.isfinite(cut))


def test_embeddings_equal_those_of_pytorch(small_bert):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel

    folder, model, tokenizer = small_bert
    texts = ["import json", "class JSONDecoder(object):\n    pass", "x"]
    theirs, inputs = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = inputs(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    hidden, mask = theirs.eval()(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    wanted = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).detach()
    np.testing.assert_allclose(bert_mlm.embed(model, tokenizer, texts), wanted, atol=1e-5)
    wanted = torch.nn.functional.normalize(hidden[:, 0]).detach()
    np.testing.assert_allclose(bert_mlm.embed(model, tokenizer, texts, "cls"), wanted, atol=1e-5)


def test_fill_mask_gives_the_likeliest_tokens_of_each_mask(small_bert):
    folder, model, tokenizer = small_bert
    texts = ["import [MASK] as np", "a [MASK] and [MASK]"]
    fills = bert_mlm.fill_mask(model, tokenizer, texts)
    assert [len(best) for best in fills] == [5, 5, 5]
    ids = AutoTokenizer.from_pretrained(folder)(texts[1])["input_ids"]
    at = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
    logits = model.mlm_logits(forward(model, np.array([ids])))[0]
    for place, best in zip(at, fills[1:]):
        p = np.asarray(jax.nn.softmax(logits[place]))
        np.testing.assert_allclose([x for x, _ in best], np.sort(p)[::-1][:5], rtol=1e-4)
        ids_then = [*ids[1:place], int(p.argmax()), *ids[place + 1 : -1]]
        assert best[0][1] == tokenizer.decode(ids_then)
    assert bert_mlm.encode_prompts(tokenizer, texts, 64)[1] == ids
    assert fills[0][0][1].startswith("import") and fills[0][0][1].endswith(" as np")


def test_embed_writes_a_vector_a_line(small_bert, monkeypatch, capsys):
    folder, model, tokenizer = small_bert
    Path("texts.txt").write_text("one\n\nthree\u2028\f\n", encoding="utf-8")
    args = ["--steps", "0", "--init-from", folder, "--embed", "texts.txt"]
    assert typed(monkeypatch, capsys, bert_mlm, *args)[0] == 0
    vectors = np.load("texts.npy")
    np.testing.assert_allclose(
        vectors, bert_mlm.embed(model, tokenizer, ["one", "", "three\u2028\f"]), atol=1e-6
    )
    code, _, err = typed(monkeypatch, capsys, bert_mlm, *args)
    assert code == 2 and "texts.npy exists; --overwrite to replace it" in err
    assert typed(monkeypatch, capsys, bert_mlm, *args, "--overwrite", "--pooling", "cls")[0] == 0
    first = bert_mlm.embed(model, tokenizer, ["one", "", "three\u2028\f"], "cls")
    np.testing.assert_allclose(np.load("texts.npy"), first, atol=1e-6)


def test_mteb_gets_an_encoder_and_our_embeddings(small_bert, monkeypatch, capsys):
    folder, model, tokenizer = small_bert
    Path("mteb/models").mkdir(parents=True)
    Path("mteb/models/abs_encoder.py").write_text("class AbsEncoder: pass\n")
    Path("mteb/models/__init__.py").write_text(
        "class ModelMeta:\n    create_empty = staticmethod(lambda about: about)\n"
    )
    Path("mteb/__init__.py").write_text(
        "from types import SimpleNamespace as N\n"
        "def get_task(name):\n    if name != 'STS': raise KeyError(f'{name} not found. Did you mean STS?')\n"
        "    return name\n"
        "ResultCache = lambda path: path\n"
        "def evaluate(model, tasks, cache, **how):\n"
        "    got.update(meta=model.mteb_model_meta, cache=cache)\n"
        "    got['x'] = model.encode([{'text': ['a', 'b']}, {'text': ['c']}], task_metadata=None)\n"
        "    return N(task_results=[N(task_name=t, get_score=lambda: 0.5) for t in tasks])\n"
        "got = {}\n"
    )
    monkeypatch.syspath_prepend(".")
    args = ["--steps", "0", "--init-from", folder, "--mteb"]
    try:
        assert typed(monkeypatch, capsys, bert_mlm, *args, "STS")[0] == 0
        got = sys.modules["mteb"].got
        np.testing.assert_allclose(got["x"], bert_mlm.embed(model, tokenizer, ["a", "b", "c"]), atol=1e-6)
        assert got["meta"]["name"] == "nanoflax/model" and got["cache"] == "out/mteb"
        code, _, err = typed(monkeypatch, capsys, bert_mlm, *args, "STX")
        assert code == 2 and "--mteb STX: STX not found. Did you mean STS?" in err
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "mteb"]:
            del sys.modules[name]


# ---- bert_mlm.py: runs ----


def bert_losses(out_dir):
    return [
        {k: v for k, v in line.items() if not k.endswith("_per_s") and k != "data_wait"}
        for line in lines(out_dir)
    ]


def test_bert_run_leaves_a_folder_that_pytorch_loads_and_that_can_be_used(capsys):
    last = bert_mlm.main(bert_mlm.Config(**BERT | dict(eval_every=6)))
    said, folder = capsys.readouterr().out, Path("out/bert-001")
    assert "% " in said and "for i in" not in said and said.count("The capital of France is") == 10
    files = {"ckpt", "config.json", "curves.png", "metrics.jsonl", "model.safetensors", "run.json"}
    assert files <= {path.name for path in folder.iterdir()}
    assert [line["step"] for line in lines(folder)] == list(range(1, 13)) and lines(folder)[-1] == last
    assert last["tokens"] == 12 * 128 * 32 and 0 <= last["val_acc"] <= 1 and 0 <= last["acc"] <= 1
    assert last["val_loss"] < lines(folder)[5]["val_loss"] < math.log(300)
    same = BERT | dict(steps=0, init_from=str(folder), tokenizer=None)
    again = bert_mlm.main(bert_mlm.Config(**same))
    assert again["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    loss = re.search(r"baseline   loss ([\d.]+), accuracy 0.\d+ by", capsys.readouterr().out)
    assert 3 < float(loss[1]) < math.log(300)
    bert_mlm.main(bert_mlm.Config(**same | dict(prompt=("import [MASK]",))))
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 5 and all(re.match(r" *\d+\.\d%  'import", line) for line in shown)
    tuned = bert_mlm.main(bert_mlm.Config(**same | dict(steps=2, lr=1e-4, out_dir="tuned")))
    assert tuned["val_loss"] < lines(folder)[5]["val_loss"], "it starts where the other ended"

    torch = pytest.importorskip("torch")
    from transformers import AutoModelForMaskedLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("import [MASK] as np")["input_ids"]
    assert tokenizer.decode(ids) == "[CLS]import[MASK] as np[SEP]"
    model, theirs = bert_mlm.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder)
    wanted = theirs.eval()(torch.tensor([ids])).logits.detach()
    np.testing.assert_allclose(model.mlm_logits(forward(model, np.array([ids]))), wanted, atol=1e-4)


def test_bert_kill_9_changes_no_loss():
    small = BERT | dict(dropout=0.1, whole_word=True, accum=2, n_layer=1)
    code, _, err = run("bert_mlm.py", *flags(**small, out_dir="whole"))
    assert code == 0, err
    process = launch("bert_mlm.py", *flags(**small, out_dir="killed"))
    wait_for_step(process, "killed", 5)
    process.kill()
    process.wait()
    args = flags(resume=True, out_dir="killed")
    code, _, err = run("bert_mlm.py", *args)
    assert code == 0, err
    assert bert_losses("killed") == bert_losses("whole") and len(bert_losses("whole")) == 12
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_classifier_learns_resumes_and_loads_in_pytorch(monkeypatch, capsys):
    cfg = bert_mlm.Config(**CLASSIFY | dict(data=(write_reviews(long=3),), out_dir="whole"))
    last = bert_mlm.main(cfg)
    said = capsys.readouterr().out
    assert last["val_acc"] > 0.95 and last["val_f1"] > 0.95 and last["texts"] == 60 * 16
    few = bert_mlm.main(dataclasses.replace(cfg, steps=0, init_from="whole", tokenizer=None, eval_batches=1))
    assert 16 * few["val_acc"] == pytest.approx(round(16 * few["val_acc"])), "of 16 texts, not of all 100"
    assert "3 classes" in said and "of 100 texts are longer than --seq-len 32 and were cut" in said

    def broken(*args, **how):
        yield from islice(batches(*args, **how), 30)
        raise common.StreamError("gone")

    batches = common.batches
    monkeypatch.setattr(common, "batches", broken)
    with pytest.raises(common.StreamError, match="gone"):
        bert_mlm.main(dataclasses.replace(cfg, out_dir="again"))
    monkeypatch.setattr(common, "batches", batches)
    code, _, err = typed(monkeypatch, capsys, bert_mlm, "--resume", "--out-dir", "again")
    assert code == 0, err
    assert bert_losses("again") == bert_losses("whole")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    theirs, tokenizer = AutoModelForSequenceClassification.from_pretrained("whole").eval(), AutoTokenizer
    inputs = tokenizer.from_pretrained("whole")(["good it was"], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    model = bert_mlm.from_pretrained("whole")
    ours = model.class_logits(forward(model, inputs["input_ids"].numpy()))
    np.testing.assert_allclose(ours, theirs(**inputs).logits.detach(), atol=1e-4)
    assert int(torch.argmax(theirs(**inputs).logits)) == 2


def test_class_names_come_from_the_data_and_go_into_the_folder(small_bert):
    texts, labels = reviews(120)
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "fine", "good"])
    )
    datasets.Dataset.from_dict(dict(text=texts, label=labels), features=features).to_parquet("a.parquet")
    how = CLASSIFY | dict(data=("a.parquet",), steps=2, val_docs=20, out_dir="a", tokenizer=None)
    how |= dict(n_layer=4, n_head=4, n_embd=128)  # the defaults: they are those of the checkpoint
    bert_mlm.main(bert_mlm.Config(**how | dict(init_from=small_bert[0])))
    config = json.loads(Path("a/config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "fine", "2": "good"}


def test_preset_of_a_large_bert_trains(monkeypatch, capsys):
    small = dict(
        preset="bert-large", data=(JSON,), data_name=("-",), val_docs=1, tokenizer="bpe:300", seq_len=32
    )
    small |= dict(n_layer=1, n_head=2, n_embd=32, batch_size=8, accum=2, steps=2, out_dir="a", pre_norm=True)
    code, _, err = typed(monkeypatch, capsys, bert_mlm, *flags(**small))
    assert code == 0, err
    assert [line["step"] for line in lines("a")] == [2]
    assert json.loads(Path("a/config.json").read_text())["model_type"] == "megatron-bert"


BERT_BAD = {
    "no mask token": (["--tokenizer", "gpt"], "--tokenizer gpt: has no mask token; BERT needs one"),
    "tokenizer": (["--tokenizer", "bpe:12"], "--tokenizer bpe:12: expected bpe:N with N above 261"),
    "no mask": (["--steps", "0", "--init-from", "bert", "--prompt", "import x"], "holds no [MASK]"),
    "long prompt": (
        ["--steps", "0", "--init-from", "bert", "--prompt", "[MASK]" + "x" * 300],
        "303 tokens, and there are 64 positions",
    ),
    "no mask in training": (["--prompt", "import x"], "--prompt 'import x': holds no [MASK]"),
    "no head": (
        ["--steps", "0", "--init-from", "bare", "--prompt", "[MASK]"],
        "bare: has no cls.predictions",
    ),
    "embed what": (
        ["--steps", "0", "--init-from", "bert", "--embed", "no.txt"],
        "--embed no.txt: no such file",
    ),
    "embed empty": (["--steps", "0", "--init-from", "bert", "--embed", "empty.txt"], "empty.txt: is empty"),
    "embed in training": (["--embed", "empty.txt"], "--embed empty.txt: is for a finished model"),
    "mteb": (
        ["--steps", "0", "--init-from", "bert", "--mteb", "STS12"],
        "--mteb STS12: needs `pip install mteb`",
    ),
    "positions": (["--init-from", "bert", "--seq-len", "128"], "--seq-len 128: bert has 64 positions"),
    "vocabulary": (
        ["--init-from", "tiny", "--tokenizer", "bert", "--seq-len", "32"],
        "has 300 tokens, and tiny has a vocabulary of 199",
    ),
    "not a bert": (
        ["--init-from", "gpt", "--tokenizer", "bert"],
        "a gpt2 model, expected bert or megatron-bert",
    ),
    "norms": (
        ["--init-from", "pre", "--no-pre-norm"],
        "--no-pre-norm: pre is a pre-norm BERT",
    ),
    "share": (["--mask-share", "1.5"], "--mask-share 1.5: must be in (0, 1)"),
    "string labels": (["--task", "classify", "--data", "strings.csv"], "are strings"),
    "no labels": (["--task", "classify", "--data", "text.jsonl"], "no label column among text"),
    "one class": (
        ["--task", "classify", "--data", "one.csv", "--val-docs", "5"],
        "--data one.csv: all labels are 1; expected two classes or more",
    ),
    "other classes": (
        ["--task", "classify", "--data", "two.csv", "--val-data", "three.csv"],
        "validation has label 2, and training 2 classes",
    ),
    "no classifier": (
        [
            "--task",
            "classify",
            "--data",
            "two.csv",
            "--val-docs",
            "5",
            "--steps",
            "0",
            "--init-from",
            "bert",
            "--seq-len",
            "32",
        ],
        "bert: has no ",
    ),
}


@pytest.mark.parametrize("case", BERT_BAD)
def test_bad_input_to_bert_is_one_line_and_exit_code_2(case, small_bert, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mteb" else find_spec(name))
    Path("bert").symlink_to(small_bert[0])
    bert_mlm.save_pretrained(tiny_bert(head=None), "bare", small_bert[2])
    bert_mlm.save_pretrained(tiny_bert(), "tiny")
    bert_mlm.save_pretrained(tiny_bert(pre_norm=True), "pre", small_bert[2])
    gpt_train.save_pretrained(tiny_model(257), "gpt", gpt_train.load_tokenizer("byte"))
    Path("empty.txt").write_text("\n \n")
    Path("text.jsonl").write_text('{"text": "a b"}\n' * 30)
    for name, labels in dict(strings=["x", "y"], one=[1], two=[0, 1], three=[0, 1, 2]).items():
        rows = [f"{name} {i},{labels[i % len(labels)]}\n" for i in range(30)]
        Path(f"{name}.csv").write_text("text,label\n" + "".join(rows))
    before = sorted(path for path in Path(".").rglob("*"))
    args, message = BERT_BAD[case]
    code, _, err = typed(monkeypatch, capsys, bert_mlm, "--steps", "1", *args)
    assert code == 2 and message in err, err
    assert len(err.strip().splitlines()) == 1
    assert sorted(path for path in Path(".").rglob("*")) == before


# ---- resnet_stream.py: pictures ----

RESNET = dict(width=8, steps=6, batch_size=32, warmup_steps=2, eval_every=6, log_every=1, ckpt_every=2)
RESNET |= dict(shuffle_buffer=500, lr=0.02, label_smoothing=0.0, ema=0.0, mixup=0.0, image_size=8, crop_pad=1)


def png(pixels, kind="png", **how):
    """The bytes of a picture file; `pixels` is an array or an image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file := io.BytesIO(), kind, **how)
    return file.getvalue()


def photograph(width=120, height=90):
    """A smooth picture in which left is red, right is green and the bottom is blue."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([255 - x, x, y], axis=-1).astype(np.uint8)


def write_folder(root, n=12, size=(48, 40)):
    """An image folder of two classes, dark and light, with `n` pictures each."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(("dark", "light")):
        for j in range(n):
            pixels = np.uint8(rng.integers(0, 90, (size[1], size[0], 3)) + 150 * i)
            path = Path(root, name, f"{j}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(pixels))
    return str(root)


def test_odd_pictures_come_out_right():
    true = Image.fromarray(photograph())
    flat = Image.new("RGB", (40, 30), (200, 30, 60))
    clear = flat.convert("RGBA")
    clear.putalpha(Image.fromarray(np.uint8(np.repeat([[255, 0]], 30, 0).repeat(20, 1))))
    grey = np.asarray(true.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    turned = true.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned by 90 degrees clockwise
    see = lambda data: np.asarray(resnet_stream.open_image(data)).astype(int)
    near = lambda a, b, most: np.abs(np.asarray(a).astype(int) - b).max() <= most
    assert near(true, see(png(true)), 0)
    assert near(true, see(png(true, "jpeg", quality=95)), 12)
    assert near(true, see(png(turned, "jpeg", quality=95, exif=exif)), 12)
    assert near(true, see(png(turned, exif=exif)), 0)
    assert near(true, see(png(true.convert("CMYK"), "jpeg", quality=95)), 12)
    assert near(flat, see(png(flat.convert("P", palette=Image.Palette.ADAPTIVE))), 0)
    assert near(flat, see(png(flat.convert("P", palette=Image.Palette.ADAPTIVE), "gif")), 0)
    for mode in (true.convert("L"), deep):
        assert near(np.repeat(grey[..., None], 3, -1), see(png(mode)), 1)
    assert near(
        np.repeat(grey[..., None] > 127, 3, -1) * 255,
        see(png(true.convert("L").point(lambda v: 255 * (v > 127)).convert("1"))),
        0,
    )
    both = see(png(clear))
    assert (both[:, :20] == (200, 30, 60)).all() and (both[:, 20:] == 255).all(), "on white"
    assert (see(png(clear.convert("LA")))[:, 20:] == 255).all()
    palette = clear.quantize(4)
    assert (see(png(palette))[:, 20:] == 255).all() and near(
        flat.crop((0, 0, 20, 30)), see(png(palette))[:, :20], 8
    )


def test_crops_are_what_their_key_says():
    data = png(photograph(640, 480), "jpeg", quality=95)
    view = resnet_stream.View(64, 64)
    for crop in ("pad", "resized"):
        cfg = resnet_stream.Config(crop=crop, crop_pad=8, flip=True)
        draw = lambda *key, cfg=cfg: resnet_stream.training_crop(data, cfg, view, key).astype(int)
        assert (draw(0, 1, 2) == draw(0, 1, 2)).all() and draw(0, 1, 2).shape == (64, 64, 3)
        assert all((draw(0, 1, 2) != draw(*key)).any() for key in ((0, 1, 3), (0, 2, 2), (1, 1, 2)))
        mirrored = [draw(0, 0, i)[32, 20, 0] < draw(0, 0, i)[32, 43, 0] for i in range(200)]
        assert 70 < sum(mirrored) < 130, "red is on the left"
    boxes, cfg = [], resnet_stream.Config(crop="resized", crop_area=0.25)
    for i in range(300):
        rng = np.random.default_rng(i)
        areas, shapes = rng.uniform(cfg.crop_area, 1, 10), np.exp(rng.uniform(-1, 1, 10) * math.log(4 / 3))
        boxes.append(resnet_stream.random_box(640, 480, areas, shapes, rng.random(2)))
    left, top, right, bottom = np.array(boxes).T
    assert (left >= 0).all() and (top >= 0).all() and (right <= 640).all() and (bottom <= 480).all()
    share, shape = (right - left) * (bottom - top) / (640 * 480), (right - left) / (bottom - top)
    assert share.min() > 0.25 and share.max() < 1 and 0.5 < share.mean() < 0.65
    assert shape.min() >= 0.75 - 1e-6 and shape.max() <= 4 / 3 + 1e-6
    # a jpeg that comes at half its size gives nearly the same picture
    big = png(photograph(1600, 1200), "jpeg", quality=95)
    small, whole = (
        resnet_stream.evaluation_crop(d, resnet_stream.View(56, 64)).astype(int) for d in (big, data)
    )
    assert np.abs(small - whole).max() < 8


def test_evaluation_sees_what_transformers_image_processor_makes_of_the_export(tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoImageProcessor

    view = resnet_stream.View(56, 64, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    resnet_stream.save_pretrained(tiny_resnet(view=view), tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    for size in ((200, 150), (150, 200), (57, 80)):
        data = png(photograph(*size))
        theirs = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
        ours = resnet_stream.normalise(resnet_stream.evaluation_crop(data, view), view)
        assert np.abs(ours - theirs.transpose(1, 2, 0)).mean() < 0.02
    assert resnet_stream.from_pretrained(str(tmp_path)).view == view
    cfg = resnet_stream.Config(image_size=16, eval_crop=0.5, width=8)
    assert resnet_stream.build(cfg, ["a", "b"]).view == resnet_stream.View(16, 32)


def test_digits_are_all_there_and_no_picture_is_in_both_splits():
    splits = resnet_stream.open_digits(0)
    files = {name: [row["image"]["bytes"] for row in source] for name, source in splits.items()}
    assert len(files["train"]) + len(files["validation"]) == 1797 and len(files["validation"]) == 359
    assert len({*files["train"]} & {*files["validation"]}) == 0
    again, other = resnet_stream.open_digits(0), resnet_stream.open_digits(1)
    assert [row["image"]["bytes"] for row in again["validation"]] == files["validation"]
    assert [row["image"]["bytes"] for row in other["validation"]] != files["validation"]


def both_parts(sources, cfg, epoch=0):
    """(training rows of an epoch, validation pictures) of [(source, every), ...]."""
    view = resnet_stream.View(8, 8)
    train = [row for s, n in sources for row in resnet_stream.training_images(s, cfg, view, 2, n, epoch)]
    val = [
        x
        for images, labels in resnet_stream.validation_batches(sources, view, 2, 7)
        for x in images[labels >= 0]
    ]
    return train, val


def test_held_out_pictures_are_not_trained_on_and_all_others_are():
    cfg = resnet_stream.Config(data=(write_folder("a", 40),), val_every=4, crop_pad=0, image_size=8)
    train, val, classes = resnet_stream.open_sources(cfg)
    assert classes == ["dark", "light"] and train[0][1] == val[0][1] == 4
    seen, held = both_parts(train, cfg)
    keys = lambda images: {np.asarray(image).tobytes() for image in images}
    assert len(seen) + len(held) == 80 and 8 < len(held) < 32
    assert not keys(held) & keys(row["image"] for row in seen)
    again = both_parts(train, cfg, 1)[0]
    assert keys(r["image"] for r in again) == keys(r["image"] for r in seen)
    assert [r["image"].tobytes() for r in again] != [r["image"].tobytes() for r in seen], "another order"
    assert sum(row["label"] for row in seen[: len(seen) // 2]) not in (0, len(seen) // 2), "classes are mixed"


def test_corrupt_pictures_are_skipped_and_counted(capfd):
    folder = write_folder("a", 30)
    good = Path("a/dark/0.png").read_bytes()
    bad = {"cut": good[:-900], "none": b"", "text": b"no picture", "bits": good[:60] + b"?" * 900}
    for name, data in bad.items():
        Path(f"a/light/{name}.png").write_bytes(data)
    cfg = resnet_stream.Config(data=(folder,), val_every=2, shuffle_buffer=20)
    train, _, _ = resnet_stream.open_sources(cfg)
    seen, held = both_parts(train, cfg)
    assert len(seen) + len(held) == 60
    epoch = partial(resnet_stream.training_images, train[0][0], cfg, resnet_stream.View(8, 8), 2, 1)
    *_, (_, position) = islice(common.batches([epoch], 30), 4)  # two epochs of 60
    assert position["bad"] in (7, 8), "the last ones may stand behind the last good picture"
    assert capfd.readouterr().err.count("data: skipped record") >= 8
    batch = {"image": [b"", b""], "label": [0, 1], "record": [4, 5]}
    rows = resnet_stream.decode(train[0][0], lambda data, record: np.zeros((8, 8, 3)), 1, batch)
    assert rows["label"] == [0]
    assert "label is 1, expected a class from 0 to 0" in capfd.readouterr().err


def test_picture_that_cannot_be_fetched_is_the_streams_to_mend(monkeypatch, capfd):
    folder, read, reads = write_folder("a", 30), common.image_bytes, itertools.count()

    def flaky(value):
        if next(reads) in (9, 70):
            raise ConnectionResetError("gone for a while")
        return read(value)

    cfg = resnet_stream.Config(data=(folder,), val_every=2, shuffle_buffer=20)
    train, _, _ = resnet_stream.open_sources(cfg)
    wanted = both_parts(train, cfg)
    monkeypatch.setattr(common, "image_bytes", flaky)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    epoch = partial(resnet_stream.training_images, train[0][0], cfg, resnet_stream.View(8, 8), 2, 2)
    stream = common.batches([epoch], len(wanted[0]))
    (batch, position), _ = next(stream), next(stream)
    monkeypatch.setattr(common, "image_bytes", read)
    again, _ = next(common.batches([epoch], len(wanted[0])))
    np.testing.assert_array_equal(batch["image"], again["image"])
    assert position["bad"] == 0 and capfd.readouterr().err.count("gone for a while; try") == 2


# ---- resnet_stream.py: the model against transformers' PyTorch ResNet ----


def tiny_resnet(kind="bottleneck", stem="imagenet", classes=7, view=None, seed=0, dtype="float32", **how):
    """A small ResNet with every parameter and statistic random."""
    stages = dict(depths=[1, 2, 1, 1], hidden_sizes=[16, 16, 32, 32]) | how.pop("stages", {})
    sizes = dict(embedding_size=8, layer_type=kind) | stages
    names = resnet_stream.label_names([f"class {i}" for i in range(classes)])
    config = ResNetConfig(**sizes, **names, stem=stem)
    view = view or resnet_stream.View(32, 32)
    model = resnet_stream.ResNet(config, view, dtype=dtype, rngs=nnx.Rngs(seed), **how)
    rng = np.random.default_rng(seed)
    for name, param in resnet_stream.checkpoint_names(model).items():
        if param.ndim == 1:
            positive = re.search(r"var$|bn\d\.weight|downsample\.1\.weight", name)
            values = rng.uniform(0.5, 1.5, param.shape) if positive else 0.3 * rng.normal(size=param.shape)
            param.set_value(jnp.asarray(values.astype(np.float32)))
    return model


def torch_resnet(folder, stem="imagenet"):
    import torch
    from transformers import AutoModelForImageClassification

    torch.set_num_threads(1)  # more of them stand in each other's way where a core is busy
    own = dict(trust_remote_code=True) if stem == "cifar" else {}  # transformers has no such stem
    return AutoModelForImageClassification.from_pretrained(folder, **own)


def random_images(B=4, S=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (B, S, S, 3)).astype(np.uint8)


def to_torch(images, view):
    import torch

    return torch.tensor(np.asarray(resnet_stream.normalise(images, view))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind, stem", [("bottleneck", "imagenet"), ("basic", "cifar")])
def test_logits_loss_gradients_and_statistics_equal_transformers(kind, stem, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, images, labels = tiny_resnet(kind, stem), random_images(), np.arange(4)
    resnet_stream.save_pretrained(model, tmp_path / "model")
    theirs, x = torch_resnet(tmp_path / "model", stem).eval(), resnet_stream.normalise(images, model.view)
    assert theirs.config.id2label[3] == "class 3"
    np.testing.assert_allclose(
        forward(model, x), theirs(to_torch(images, model.view)).logits.detach(), atol=1e-4
    )
    again = resnet_stream.from_pretrained(str(tmp_path / "model"))
    np.testing.assert_array_equal(forward(again, x), forward(model, x))

    theirs.train()
    loss = torch.nn.functional.cross_entropy(
        theirs(to_torch(images, model.view)).logits, torch.tensor(labels), label_smoothing=0.1
    )
    loss.backward()
    model_def, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def loss_fn(params):
        model = nnx.merge(model_def, params, stats, copy=True)
        nats = resnet_stream.cross_entropy(model(x, train=True), labels, 0.1)
        return nats.mean(), nnx.state(model, nnx.BatchStat)

    (ours, stats), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    assert abs(ours - loss.item()) < 1e-5
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    wanted |= {name: b for name, b in theirs.named_buffers() if "num_batches" not in name}
    found = resnet_stream.checkpoint_names(grads) | resnet_stream.checkpoint_names(stats)
    assert {resnet_stream.transformers_name(name) for name in found} == set(wanted)
    for name, value in found.items():
        theirs = wanted[resnet_stream.transformers_name(name)].numpy()
        value = resnet_stream.torch_layout(np.asarray(value[...]))
        np.testing.assert_allclose(value, theirs, atol=2e-5, rtol=1e-3, err_msg=name)


def sgd(model, cfg):
    """(graphdef, state, step) to train `model`."""
    schedule = resnet_stream.make_schedule(cfg)
    graphdef, state = resnet_stream.make_state(model, cfg, schedule)
    state = common.shard_state(common.make_mesh(), state, fsdp=False)
    return graphdef, state, resnet_stream.make_train_step(graphdef, state, cfg, schedule)


def test_ten_sgd_steps_equal_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    model = tiny_resnet()
    resnet_stream.save_pretrained(model, tmp_path)
    theirs = torch_resnet(tmp_path).train()
    cfg = resnet_stream.Config(lr=2e-3, warmup_steps=3, steps=10, weight_decay=1.0, ema=0.0, mixup=0.0)
    graphdef, state, step = sgd(model, cfg)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 1.0},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1, momentum=0.9, nesterov=True)
    for i in range(10):
        images, labels = random_images(8, seed=i), np.arange(8) % 7
        state, metrics = step(state, images, labels, jax.random.key(i))
        logits = theirs(to_torch(images, model.view)).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = float(metrics["lr"])
        optimizer.step()
        assert metrics["loss"] == pytest.approx(loss.item(), abs=2e-5)
    trained = resnet_stream.exported(graphdef, state)
    for name, value in resnet_stream.checkpoint_names(trained).items():
        wanted = theirs.state_dict()[resnet_stream.transformers_name(name)].numpy()
        value = resnet_stream.torch_layout(np.asarray(value[...]))
        np.testing.assert_allclose(value, wanted, atol=1e-4, rtol=1e-3, err_msg=name)


def test_both_naming_schemes_load_and_another_number_of_classes_gets_a_new_head(capsys):
    from safetensors.numpy import save_file

    config = resnet_stream.resnet_config(18, 8, "imagenet", ["a", "b", "c"])
    view = resnet_stream.View(56, 64, resample=3)
    model = resnet_stream.ResNet(config, view, rngs=nnx.Rngs(0))
    names = resnet_stream.checkpoint_names(model)
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer2.0.downsample.1.bias"} < set(
        names
    )
    torchvision = {name: resnet_stream.torch_layout(np.asarray(p[...])) for name, p in names.items()}
    resnet_stream.save_pretrained(model, "ours")
    Path("named").mkdir()
    save_file(torchvision, "named/model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        Path("named", name).write_text(Path("ours", name).read_text())
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    named = resnet_stream.from_pretrained("named")
    np.testing.assert_array_equal(forward(named, x), forward(model, x))
    assert capsys.readouterr().out == "" and named.config.id2label == {0: "a", 1: "b", 2: "c"}
    other = resnet_stream.from_pretrained("ours", classes=list("abcde"), size=112)
    assert "new, for 5 classes; ours has 3" in capsys.readouterr().out
    assert other(x).shape == (2, 5) and other.view == view._replace(size=112, short=128)
    np.testing.assert_array_equal(other.layer4[1].conv2.kernel[...], model.layer4[1].conv2.kernel[...])


def test_published_folders_are_read_as_they_are(capsys):
    """The config.json and preprocessor_config.json of microsoft/resnet-50 and of timm/resnet18.a1_in1k."""
    from safetensors.numpy import save_file

    Path("hub").mkdir()
    model = nnx.eval_shape(
        lambda: resnet_stream.ResNet(
            resnet_stream.resnet_config(18, 64, "imagenet", range(1000)), None, rngs=nnx.Rngs(0)
        )
    )
    shapes = {
        name: np.zeros(p.shape, np.float32) for name, p in resnet_stream.checkpoint_names(model).items()
    }
    save_file(
        {name: resnet_stream.torch_layout(zero) for name, zero in shapes.items()}, "hub/model.safetensors"
    )
    timm = dict(architecture="resnet18", num_classes=1000, num_features=512)
    seen = dict(
        input_size=[3, 224, 224],
        crop_pct=0.95,
        interpolation="bicubic",
        mean=[0.5, 0.5, 0.5],
        std=[0.2, 0.2, 0.2],
    )
    Path("hub/config.json").write_text(json.dumps(timm | {"pretrained_cfg": seen}))
    found = resnet_stream.from_pretrained("hub")
    assert found.view == (224, 235, (0.5,) * 3, (0.2,) * 3, 3) and found.config.num_labels == 1000
    Path("hub/config.json").write_text(json.dumps(timm | {"architecture": "resnet50d"}))
    with pytest.raises(common.UsageError, match="architecture is resnet50d, expected resnet18, resnet34"):
        resnet_stream.from_pretrained("hub")
    theirs = dict(
        crop_pct=0.875, do_resize=True, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    theirs |= dict(feature_extractor_type="ConvNextFeatureExtractor", resample=3, size=224)
    Path("hub/preprocessor_config.json").write_text(json.dumps(theirs))
    config = dict(
        model_type="resnet", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic"
    )
    Path("hub/config.json").write_text(json.dumps(config | dict(downsample_in_bottleneck=True)))
    with pytest.raises(common.UsageError, match="downsample_in_bottleneck is True, only False is supported"):
        resnet_stream.from_pretrained("hub")
    config |= dict(id2label={str(i): str(i) for i in range(1000)})
    Path("hub/config.json").write_text(json.dumps(config))
    assert resnet_stream.from_pretrained("hub").view == resnet_stream.View(224, 256, resample=3)


# ---- resnet_stream.py: the model by itself ----


@pytest.mark.parametrize(
    "depth, millions", [(18, 11.69), (34, 21.80), (50, 25.56), (101, 44.55), (152, 60.19)]
)
def test_every_depth_has_the_published_number_of_parameters(depth, millions):
    config = resnet_stream.resnet_config(depth, 64, "imagenet", range(1000))
    model = nnx.eval_shape(lambda: resnet_stream.ResNet(config, None, rngs=nnx.Rngs(0)))
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert round(count / 1e6, 2) == millions


def test_new_resnet_starts_as_published():
    config = resnet_stream.resnet_config(50, 16, "imagenet", range(10))
    model = resnet_stream.ResNet(config, None, rngs=nnx.Rngs(0))
    std = lambda p: float(np.std(p[...]))
    assert std(model.layer3[2].conv2.kernel) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    assert std(model.layer2[0].downsample[0].kernel) == pytest.approx(math.sqrt(2 / 128), rel=0.05)
    assert not model.layer1[0].bn3.scale[...].any() and (model.layer1[0].bn2.scale[...] == 1).all()
    block, x = model.layer1[1], jax.random.uniform(jax.random.key(0), (2, 8, 8, 64))
    np.testing.assert_array_equal(block(x, False), x)  # the identity, but for the relu
    assert model.layer2[0].conv2.strides == 2 and model.layer2[0].conv1.strides == 1
    assert np.abs(model.fc.kernel[...]).max() <= 1 / math.sqrt(512)


def test_bfloat16_resnet_has_float32_parameters_statistics_and_logits():
    half, x = tiny_resnet(dtype="bfloat16"), np.random.default_rng(0).normal(size=(4, 64, 64, 3))
    train = nnx.jit(lambda model, x: model(x, train=True))
    logits = train(half, x)
    assert logits.dtype == jnp.float32
    assert half.bn1(half.conv1(x.astype(jnp.bfloat16)), False).dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    full = tiny_resnet()
    np.testing.assert_allclose(logits, train(full, x), atol=0.3)
    np.testing.assert_allclose(half.layer1[0].bn1.var[...], full.layer1[0].bn1.var[...], rtol=0.02)


def test_remat_accumulation_mixup_and_ema():
    small = partial(tiny_resnet, stages=dict(depths=[1, 1], hidden_sizes=[16, 32]))
    cfg = resnet_stream.Config(
        steps=10, warmup_steps=0, weight_decay=0.0, ema=0.0, mixup=0.0, label_smoothing=0.0
    )
    images, labels, start = random_images(4, 32), np.arange(4), small()

    def stepper(how=None, **changes):
        """(images, labels, seed) -> ((model, optimizer, ...), metrics) after a step from the same start."""
        graphdef, state, step = sgd(small(**how or {}), dataclasses.replace(cfg, **changes))

        def run(images, labels, seed=0):
            after, metrics = step(jax.tree.map(jnp.copy, state), images, labels, jax.random.key(seed))
            return nnx.merge(graphdef, after), {name: float(value) for name, value in metrics.items()}

        return run

    plain, mixed = stepper(), stepper(mixup=0.4)
    (model, _), whole = plain(images, labels)
    # two equal microbatches are one of them; the statistics move twice
    (parts, _), metrics = stepper(dict(remat=True), accum=2)(
        np.repeat(images, 2, axis=0), np.repeat(labels, 2)
    )
    assert metrics == pytest.approx(whole, rel=1e-4)
    np.testing.assert_allclose(parts.fc.kernel[...], model.fc.kernel[...], atol=1e-5)
    for name in ("mean", "var"):
        first, once, twice = (getattr(m.layer2[0].bn2, name)[...] for m in (start, model, parts))
        np.testing.assert_allclose(twice - first, 1.9 * (once - first), rtol=1e-3, atol=1e-5)

    # where each picture stands opposite to itself mixup does nothing; else it mixes two losses
    same = np.concatenate([images[:2], images[1::-1]]), np.array([0, 1, 1, 0])
    assert mixed(*same)[1]["loss"] == pytest.approx(plain(*same)[1]["loss"], rel=1e-5)
    found = [mixed(images, labels, seed)[1]["loss"] for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2] and found[0] != whole["loss"]

    (model, _, mean), _ = stepper(ema=0.05)(images, labels)
    for get in (lambda m: m.fc.kernel[...], lambda m: m.bn1.var[...]):
        np.testing.assert_allclose(get(mean), 0.05 * get(start) + 0.95 * get(model), atol=1e-6)


def test_dropout_is_for_training_with_a_key():
    model, x = tiny_resnet(dropout=0.5), np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    np.testing.assert_array_equal(forward(model, x), forward(tiny_resnet(), x))
    assert np.any(forward(model, x, key=jax.random.key(0)) != forward(model, x, key=jax.random.key(1)))


# ---- resnet_stream.py: evaluation ----


def test_evaluation_counts_every_picture_once_whatever_the_batch_size():
    val = resnet_stream.open_digits(0)["validation"]
    model = tiny_resnet(stem="cifar", classes=10, view=resnet_stream.View(8, 8))
    graphdef, state = nnx.split((model, None))
    step = jax.jit(lambda state, *batch: resnet_stream.eval_sums(nnx.merge(graphdef, state)[0], *batch))
    batches = lambda size: resnet_stream.validation_batches([(val, 1)], model.view, 10, size)
    images, labels = (np.concatenate(x) for x in zip(*batches(50)))
    images, labels = images[labels >= 0], labels[labels >= 0]
    assert len(labels) == 359
    logits = np.asarray(forward(model, resnet_stream.normalise(images, model.view)))
    order = np.argsort(-logits, axis=1)
    top1, top5 = (order[:, 0] == labels).mean(), (order[:, :5] == labels[:, None]).any(axis=1).mean()
    assert top1 < top5 < 1
    for size in (7, 64, 359, 1000):
        found, shown = resnet_stream.evaluate(step, state, batches(size), jnp.asarray)
        assert found["val_top1"] == pytest.approx(top1) and found["val_top5"] == pytest.approx(top5)
        assert found["val_loss"] == pytest.approx(
            float(resnet_stream.cross_entropy(logits, labels).mean()), rel=1e-5
        )
        assert 32 <= len(shown) <= 64 and all(
            guess == order[images_index(images, image)][0] for image, _, guess in shown[:5]
        )


def images_index(images, image):
    return next(i for i in range(len(images)) if (images[i] == image).all())


# ---- resnet_stream.py: runs ----


EVERYTHING = dict(eval_every=3, ema=0.9, mixup=0.2, label_smoothing=0.1, dropout=0.1, flip=True)


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """(folder, last metrics) of a short run with everything on."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    return folder, resnet_stream.main(resnet_stream.Config(**RESNET | EVERYTHING, out_dir=str(folder)))


def test_resnet_run_leaves_a_model_folder_that_pytorch_loads(digits_run, monkeypatch, tmp_path):
    folder, last = digits_run
    files = "ckpt config.json curves.png metrics.jsonl model.safetensors modeling_cifar_resnet.py"
    files += " predictions.png preprocessor_config.json run.json"
    assert {*files.split()} <= {path.name for path in folder.iterdir()}
    assert (
        lines(folder)[-1] == last
        and last["images"] == 6 * 32
        and 0 <= last["val_top1"] <= last["val_top5"] <= 1
    )
    assert Image.open(folder / "predictions.png").size == (1200, 700)
    assert [line["step"] for line in lines(folder) if "val_loss" in line] == [3, 6]

    torch = pytest.importorskip("torch")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    theirs, model = torch_resnet(folder, "cifar").eval(), resnet_stream.from_pretrained(str(folder))
    x = random_images(3, 8)
    with torch.no_grad():
        wanted = theirs(to_torch(x, model.view)).logits
    np.testing.assert_allclose(forward(model, resnet_stream.normalise(x, model.view)), wanted, atol=1e-4)
    assert theirs.config.id2label[9] == "9"


def test_resnet_is_evaluated_predicts_and_is_fine_tuned(digits_run, capsys):
    folder, last = digits_run
    again = resnet_stream.main(resnet_stream.Config(steps=0, init_from=str(folder), batch_size=50))
    assert again["val_top1"] == last["val_top1"] and again["val_loss"] == pytest.approx(
        last["val_loss"], rel=1e-4
    )
    few = resnet_stream.main(
        resnet_stream.Config(steps=0, init_from=str(folder), batch_size=50, eval_batches=1)
    )
    assert 50 * few["val_top1"] == pytest.approx(round(50 * few["val_top1"])), (
        "of 50 pictures, not of all 359"
    )
    row = next(iter(resnet_stream.open_digits(0)["validation"]))
    Path("a.png").write_bytes(row["image"]["bytes"])
    Path("b.jpg").write_bytes(png(photograph(), "jpeg"))
    capsys.readouterr()
    resnet_stream.main(resnet_stream.Config(steps=0, init_from=str(folder), predict=("a.png", "b.jpg")))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 12 and said[0] == "a.png" and said[6] == "b.jpg"
    percent = [float(line.split("%")[0]) for line in said[1:6]]
    assert percent == sorted(percent, reverse=True) and 50 < sum(percent) <= 100
    model = resnet_stream.from_pretrained(str(folder))
    image = resnet_stream.evaluation_crop(row["image"]["bytes"], model.view)
    best = int(np.argmax(forward(model, resnet_stream.normalise(image[None], model.view))))
    assert said[1].split()[-1] == str(best)
    changes = dict(data=(write_folder("pictures"),), init_from=str(folder), steps=2, out_dir="tuned")
    resnet_stream.main(resnet_stream.Config(**RESNET | changes))
    assert "new, for 2 classes" in capsys.readouterr().out
    tuned = resnet_stream.from_pretrained("tuned")
    assert tuned.config.id2label == {0: "dark", 1: "light"} and tuned.view.size == 8


def resnet_losses(folder):
    exact = ("step", "loss", "lr", "grad_norm", "images", "val_loss", "val_top1", "val_top5")
    return [{name: line[name] for name in exact if name in line} for line in lines(folder)]


def test_kill_9_and_resume_of_a_resnet_changes_nothing():
    args = RESNET | EVERYTHING | dict(eval_every=6)
    code, _, err = run("resnet_stream.py", *flags(**args, out_dir="whole"), **OPTIMISED)
    assert code == 0, err
    process = launch("resnet_stream.py", *flags(**args, out_dir="killed"), **OPTIMISED)
    wait_for_step(process, "killed", 3)
    process.kill()
    process.wait()
    code, _, err = run("resnet_stream.py", *flags(resume=True, out_dir="killed"), **OPTIMISED)
    assert code == 0, err
    assert resnet_losses("killed") == resnet_losses("whole") and len(lines("whole")) == 6
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("whole", "killed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("preset", ["cifar10", "imagenet"])
def test_every_resnet_preset_trains_on_pictures_from_parquet(preset):
    rng = np.random.default_rng(0)
    rows = [
        {"img": {"bytes": png(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8))}, "label": i % 3}
        for i in range(24)
    ]
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["x", "y", "z"]))
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows).cast(features).to_parquet(f"pictures/{split}.parquet")
    small = dict(preset=preset, **resnet_stream.PRESETS[preset]) | dict(width=8, depth=18, dtype="float32")
    small |= dict(data=("pictures",), image_size=32, batch_size=8, steps=2, out_dir="a")
    last = resnet_stream.main(resnet_stream.Config(**small))
    assert last["step"] == 2 and "val_top5" in last
    assert json.loads(Path("a/config.json").read_text())["id2label"] == {"0": "x", "1": "y", "2": "z"}


RESNET_BAD = {
    "depth": (["--depth", "20"], "--depth 20: expected 18, 34, 50, 101, 152"),
    "small for cifar": (["--image-size", "4"], "--image-size 4: too small, the cifar stem"),
    "small for imagenet": (
        ["--stem", "imagenet"],
        "--image-size 16: too small, the imagenet stem*divide it by 32",
    ),
    "too few classes": (["--num-classes", "5"], "--num-classes 5: digits has 10 classes"),
    "labels beyond": (
        ["--data", "bare.parquet", "--num-classes", "2"],
        "--num-classes 2: bare.parquet has a label 2",
    ),
    "no names": (
        ["--data", "bare.parquet"],
        "--num-classes: is needed, for bare.parquet does not name its classes",
    ),
    "no image column": (["--data", "rows.jsonl"], "no image column among id, title"),
    "no label column": (
        ["--data", "bare.parquet", "--label-column", "class"],
        "no label column class among image, label",
    ),
    "no classes": (["--data", "flat"], "in no class folder; expected CLASS/"),
    "no such file": (
        ["--steps", "0", "--init-from", "model", "--predict", "no.jpg"],
        "--predict no.jpg: no such file",
    ),
    "nothing held out": (
        ["--data", "bare.parquet", "--num-classes", "3", "--val-every", "1000000"],
        "--val-every: no",
    ),
    "no picture": (
        ["--steps", "0", "--init-from", "model", "--predict", "rows.jsonl"],
        "--predict rows.jsonl: not an image",
    ),
    "predict while training": (["--predict", "a.jpg"], "--predict: needs --steps 0"),
    "other model": (["--init-from", "gpt"], "--init-from gpt: a gpt2 model, expected resnet"),
    "other depth": (["--init-from", "model", "--depth", "50"], "--depth 50: model has 18"),
    "classes of the model": (
        ["--steps", "0", "--init-from", "model"],
        "--init-from model: has 3 classes, digits 10",
    ),
    "crop area": (["--crop-area", "0"], "--crop-area 0.0: must be in (0, 1]"),
    "ema": (["--ema", "1"], "--ema 1.0: must be in [0, 1)"),
    "batch": (["--batch-size", "10", "--accum", "4"], "--batch-size 10: must be a multiple of 4"),
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    rows = [{"image": {"bytes": png(np.zeros((8, 8, 3), np.uint8))}, "label": i % 3} for i in range(9)]
    datasets.Dataset.from_list(rows).cast(features).to_parquet(folder / "bare.parquet")
    (folder / "rows.jsonl").write_text('{"id": 1, "title": "a"}\n' * 30)
    (folder / "flat").mkdir()
    (folder / "flat/a.png").write_bytes(rows[0]["image"]["bytes"])
    config = resnet_stream.resnet_config(18, 8, "cifar", ["a", "b", "c"])
    model = resnet_stream.ResNet(config, resnet_stream.View(8, 8), rngs=nnx.Rngs(0))
    resnet_stream.save_pretrained(model, folder / "model")
    gpt_train.save_pretrained(tiny_model(), folder / "gpt")
    return folder


@pytest.mark.parametrize("case", RESNET_BAD)
def test_bad_input_of_a_resnet_is_one_line_and_exit_code_2(case, bad_folder, monkeypatch, capsys):
    monkeypatch.chdir(bad_folder)
    before = sorted(path for path in Path(".").rglob("*"))
    args, message = RESNET_BAD[case]
    code, _, err = typed(monkeypatch, capsys, resnet_stream, "--steps", "1", *args)
    assert code == 2
    head, _, tail = message.partition("*")
    assert head in err and tail in err and len(err.strip().splitlines()) == 1
    assert sorted(path for path in Path(".").rglob("*")) == before


def test_fused_attention_is_for_gpus_that_have_it(monkeypatch):
    q = jnp.zeros((4, 8, 2, 64), jnp.bfloat16)
    assert common.attention_kernel(q) is None, "on a CPU"
    for capability, fused in {
        "9.0": "cudnn",
        "8.0": "cudnn",
        "12.0": "cudnn",
        "7.5": None,
        "gfx942": None,
    }.items():
        monkeypatch.setattr(
            jax, "devices", lambda c=capability: [type("Device", (), dict(compute_capability=c))]
        )
        assert common.attention_kernel(q) == fused
        assert common.attention_kernel(q.astype(jnp.float32)) is None
        assert common.attention_kernel(jnp.zeros((4, 8, 2, 20), jnp.bfloat16)) is None


# ---- many devices, many processes ----

MANY = {
    "gpt_train": TINY | dict(batch_size=64, accum=2, n_layer=1),
    "bert_mlm": BERT | dict(batch_size=64, accum=2, n_layer=1),
    "resnet_stream": RESNET,
}


def devices(n):
    return dict(XLA_FLAGS=f"--xla_force_host_platform_device_count={n}")


def launch_two(script, **changes):
    """The script in two processes with a device each, which train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    ids = [dict(coordinator=address, num_processes=2, process_id=i) for i in (0, 1)]
    return [launch(f"{script}.py", *flags(**changes | who), **devices(1)) for who in ids]


def finish(processes, timeout=300):
    """[(exit code, stdout, stderr), ...] of processes that run side by side."""
    ends = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *end) for process, end in zip(processes, ends)]


def assert_same_losses(a, b, rtol):
    for name in ("loss", "grad_norm", "val_loss"):
        x, y = ([line[name] for line in lines(folder) if name in line] for folder in (a, b))
        np.testing.assert_allclose(x, y, rtol=rtol)


TWICE = """
import {script} as script
script.main(script.Config(**{cfg}, fsdp=False, out_dir="copied"))
script.main(script.Config(**{cfg}, fsdp=True, out_dir="cut"))
"""


def python(code, **env):
    return start("-c", code, **env, PYTHONPATH=str(HERE))


@pytest.mark.parametrize("script", [gpt_train, bert_mlm, resnet_stream])
def test_eight_devices_give_the_losses_of_one_with_and_without_fsdp(script, caplog):
    cfg = MANY[script.__name__] | dict(steps=3, eval_every=3)
    process = python(TWICE.format(script=script.__name__, cfg=cfg), **devices(8), JAX_LOG_COMPILES="1")
    with jax.log_compiles():
        script.main(script.Config(**cfg, out_dir="one"))
    [(code, out, err)] = finish([process])
    assert code == 0 and "8 x cpu" in out, err
    compiled = "Compiling jit(train_step)"
    assert sum(compiled in line for line in caplog.messages) == 1 and err.count(compiled) == 2
    for folder in ("copied", "cut"):
        # the gradient norm of a new ResNet hangs on differences of its statistics
        assert_same_losses("one", folder, rtol=1e-3 if script is resnet_stream else 1e-4)
    if script is resnet_stream:
        again = resnet_stream.main(resnet_stream.Config(steps=0, init_from="cut", batch_size=100))
        assert again["val_top1"] == lines("cut")[-1]["val_top1"]


SHARDED = """
import common, gpt_train, jax, numpy as np
from flax import nnx
class Tokenizer:
    eos_token_id = 0
    def __len__(self): return 300
cfg = gpt_train.Config(n_layer=2, n_embd=64, seq_len=32, batch_size=8, optimizer="adamw")
mesh, schedule = common.make_mesh(), gpt_train.make_schedule(cfg)
model = gpt_train.build(cfg, Tokenizer())
optimizer = nnx.Optimizer(model, gpt_train.make_optimizer(cfg, schedule), wrt=nnx.Param)
graphdef, state = nnx.split((model, optimizer))
for fsdp in (False, True):
    copy = common.shard_state(mesh, jax.tree.map(lambda x: x.copy(), state), fsdp)
    step = gpt_train.make_train_step(graphdef, copy, 1, schedule)
    copy, _ = step(copy, common.shard_batch(mesh, np.zeros((8, 33), np.int32)), jax.random.key(0))
    leaves = jax.tree.leaves(copy)
    pieces = [s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == jax.devices()[0]]
    print(sum(pieces) / sum(x.nbytes for x in leaves))
"""


def test_fsdp_leaves_an_eighth_of_the_state_on_each_of_eight_devices():
    [(_, out, err)] = finish([python(SHARDED, **devices(8))])
    copied, cut = map(float, out.split())
    assert copied == 1 and 1 / 8 <= cut < 0.13, err


def test_checkpoint_moves_between_one_and_eight_devices():
    cfg = MANY["gpt_train"] | dict(
        lr=1e-3, min_lr=1e-3, warmup_steps=0, ckpt_every=3
    )  # no schedule to stretch
    gpt_train.main(gpt_train.Config(**cfg | dict(steps=9), out_dir="whole"))
    gpt_train.main(gpt_train.Config(**cfg | dict(steps=3), out_dir="moved"))
    resumed = flags(resume=True, fsdp=True, out_dir="moved", steps=6)
    code, out, err = run("gpt_train.py", *resumed, **devices(8))
    assert code == 0 and "8 x cpu" in out, err
    gpt_train.main(gpt_train.Config(**cfg | dict(steps=9), out_dir="moved", resume=True))
    for a, b in zip(lines("whole"), lines("moved"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), a["step"]


def test_two_processes_give_the_losses_of_one():
    cfg = MANY["resnet_stream"] | dict(data=("synthetic",), num_classes=3, steps=3, eval_every=3, fsdp=True)
    two = launch_two("resnet_stream", **cfg, out_dir="two")
    one = launch("resnet_stream.py", *flags(**cfg | dict(fsdp=False), out_dir="one"), **devices(2))
    (code, out, err), (other, silent, noise), (alone, _, _) = finish([*two, one])
    assert (code, other, alone) == (0, 0, 0), err + noise
    assert "2 x cpu" in out and "step" not in silent
    assert_same_losses("one", "two", rtol=1e-5)
    weights = [safetensors.numpy.load_file(f"{folder}/model.safetensors") for folder in ("one", "two")]
    for name, w in weights[0].items():
        np.testing.assert_allclose(w, weights[1][name], rtol=1e-3, atol=1e-4, err_msg=name)


STREAMED = TINY | dict(data=("stdlib",), batch_size=64, shuffle_buffer=8, n_layer=1, fsdp=True)


def test_killed_process_ends_the_other_and_resume_goes_on_exactly():
    ends = finish(launch_two("gpt_train", **STREAMED, out_dir="whole"))
    assert [code for code, _, _ in ends] == [0, 0], ends
    for victim, step in ((1, 4), (0, 8)):
        how = STREAMED if victim else dict(resume=True)
        processes = launch_two("gpt_train", **how, out_dir="killed")
        wait_for_step(processes[0], "killed", step)
        processes[victim].kill()
        code, _, err = finish(processes, timeout=60)[1 - victim]
        assert code not in (0, None)
        assert "lost another one" in err or "another task died" in err, err
    with pytest.raises(common.UsageError, match="processes of the data is 1, and was 2"):
        gpt_train.main(gpt_train.Config(**STREAMED, out_dir="killed", resume=True))
    ends = finish(launch_two("gpt_train", out_dir="killed", resume=True))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert losses("killed") == losses("whole") and len(losses("whole")) == 12

    # one process that trains on the rows of both has the same losses
    cfg, tokenizer = gpt_train.Config(**STREAMED), gpt_train.load_tokenizer("byte")
    [source] = open_train("stdlib")
    held_out = {next(iter(source))["text"]}
    parts = [dataclasses.replace(source, rank=rank, world=2) for rank in (0, 1)]
    epochs = [partial(gpt_train.training_rows, part, tokenizer, cfg, held_out) for part in parts]
    streams = [common.batches([epoch], cfg.batch_size // 2) for epoch in epochs]
    model, schedule = gpt_train.build(cfg, tokenizer), gpt_train.make_schedule(cfg)
    optimizer = nnx.Optimizer(model, gpt_train.make_optimizer(cfg, schedule), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    state = common.shard_state(common.make_mesh(), state, fsdp=False)
    step = gpt_train.make_train_step(graphdef, state, cfg.accum, schedule)
    for line in lines("whole")[:4]:
        rows = np.concatenate([next(stream)[0]["tokens"] for stream in streams])
        state, metrics = step(state, rows, jax.random.key(0))
        assert float(metrics["loss"]) == pytest.approx(line["loss"], rel=1e-4)


def test_signal_to_one_process_stops_and_saves_all_at_the_same_step():
    processes = launch_two("gpt_train", **STREAMED | dict(steps=5000, ckpt_every=5000), out_dir="a")
    wait_for_step(processes[0], "a", 5)
    processes[1].send_signal(signal.SIGTERM)
    (code, out, err), (other, _, _) = finish(processes, timeout=60)
    assert (code, other) == (143, 143), err
    [saved] = os.listdir("a/ckpt")
    assert f"saved at step {saved}" in out and lines("a")[-1]["step"] == int(saved)


LAUNCH_BAD = {
    "alone": (dict(num_processes=2), "need --coordinator HOST:PORT"),
    "no port": (dict(coordinator="host", num_processes=2, process_id=0), "expected HOST:PORT of process 0"),
    "id": (dict(coordinator="h:1", num_processes=2, process_id=2), "ids go from 0 to 1"),
    "no cluster": (dict(coordinator="auto"), "could not join the other processes"),
    "mixed": (dict(data=("synthetic", JSON)), "synthetic does not mix with other data"),
    "profile": (dict(TINY, profile="p"), "steps 10 to 15 of a run are recorded, and this one has 12"),
}


@pytest.mark.parametrize("changes, message", LAUNCH_BAD.values(), ids=LAUNCH_BAD.keys())
def test_bad_launch_is_one_line(changes, message, monkeypatch, capsys):
    if changes == dict(coordinator="auto"):  # this one begins to join: not in the tests' own process
        code, _, err = run("gpt_train.py", *flags(**changes))
    else:
        code, _, err = typed(monkeypatch, capsys, gpt_train, *flags(**changes))
    assert code in (1, 2) and message in err.splitlines()[-1], err
    assert "Traceback" not in err


def test_profile_holds_steps_10_to_15_and_the_last_line_says_how_fast_it_went(capsys):
    cfg = TINY | dict(data=("synthetic",), n_layer=1, steps=16, eval_every=16, profile="trace", out_dir="a")
    gpt_train.main(gpt_train.Config(**cfg))
    out = capsys.readouterr().out
    assert "a profile of steps 10 to 15 is in trace" in out
    [trace] = Path("trace").rglob("*.xplane.pb")
    assert trace.stat().st_size > 10_000
    last = next(line for line in out.splitlines() if "in all" in line)
    figures = r"[\d,]+ tokens/s, \d+ ms a step, data wait [\d.]+%, peak memory [\d.]+ GB, "
    figures += r"compiling [\d.]+ s, \d+ s in all"
    assert re.fullmatch(figures, last), last


def test_synthetic_rows_are_the_same_in_any_process_and_go_on_after_a_resume():
    columns = {"x": ((3,), 0, 1000, np.int32), "y": ((), 5, 6, np.int32)}
    stream = common.synthetic_batches(columns, 4, seed=0, position=None)
    (first, position), (second, _) = next(stream), next(stream)
    assert first["x"].shape == (4, 3) and first["y"].tolist() == [5] * 4
    assert not np.array_equal(first["x"], second["x"])
    again, _ = next(common.synthetic_batches(columns, 4, seed=0, position=position))
    np.testing.assert_array_equal(again["x"], second["x"])


def test_malloc_gives_memory_back_where_a_step_takes_a_third_of_it(monkeypatch):
    calls = []
    record = lambda name: lambda *args: calls.append((name, *args))
    monkeypatch.setattr(
        common, "GLIBC", type("", (), dict(mallopt=record("mallopt"), malloc_trim=record("trim")))
    )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1024
    for share, wanted in ((0.3, []), (0.4, [("mallopt", -4, 65_536), ("trim", 0)])):
        most = type("", (), dict(ru_maxrss=int(share * total)))
        monkeypatch.setattr(resource, "getrusage", lambda _, most=most: most)
        common.spare_memory()
        assert calls == wanted


def test_out_of_memory_ends_with_advice():
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    big = dict(data="synthetic", tokenizer="byte", seq_len=1024, batch_size=512, accum=1, steps=3, n_layer=1)
    how = dict(preexec_fn=limit, capture_output=True, text=True)
    done = subprocess.run([sys.executable, str(HERE / "gpt_train.py"), *flags(**big)], **how)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert "out of memory on the device" in message and "--accum" in message and "--fsdp" in message


@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_head_in_parts_has_the_loss_and_gradients_of_the_whole_and_less_memory(dtype, rtol, monkeypatch):
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(4, 64, 16)), rng.normal(size=(1024, 16)).astype(np.float32)
    x, targets = jnp.asarray(x, dtype), rng.integers(0, 1000, (4, 64))
    targets[0, :5] = -1

    def plain(x, table):
        logits = (x @ table.astype(x.dtype).T)[..., :1000].astype(jnp.float32)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], -1)[
            ..., 0
        ]
        return 3 * jnp.sum(nats * (targets >= 0))

    def run(f):
        f = jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(x, table).compile()
        return f(x, table), f.memory_analysis().temp_size_in_bytes

    (loss, grads), _ = run(plain)
    needed = []
    for most in (2**28, 16 * 1000 * 4):
        monkeypatch.setattr(gpt_train, "LOGITS", most)
        (found, theirs), memory = run(
            lambda x, table: 3 * gpt_train.head_loss(x, table, jnp.asarray(targets), 1000)
        )
        needed.append(memory)
        assert float(found) == pytest.approx(float(loss), rel=rtol)
        assert float(3 * gpt_train.head_loss(x, table, jnp.asarray(targets), 1000)) == pytest.approx(
            float(loss), rel=rtol
        )
        for a, b in zip(theirs, grads):
            scale = float(jnp.max(jnp.abs(b.astype(jnp.float32))))
            np.testing.assert_allclose(
                a.astype(np.float32), b.astype(np.float32), rtol=rtol, atol=rtol * scale
            )
    assert needed[1] < needed[0] / 2
