"""What nanoflax promises, a test for each. They need no network; those against PyTorch skip without torch."""

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
from itertools import count, islice, takewhile
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlparse

import bert_mlm
import common
import gpt_train
import resnet_stream
from common import Stream

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
TEXT = dict(data=(JSON,), val_docs=1, seq_len=32, n_layer=1, n_head=2, n_embd=32, batch_size=128, accum=2)
TEXT |= dict(optimizer="adamw", dropout=0.1, warmup_steps=2, steps=12, eval_every=6, ckpt_every=3)
GPT = TEXT | dict(tokenizer="byte", sample_every=0, log_every=1)  # an epoch has eight steps
BERT = TEXT | dict(tokenizer="bpe:300", pre_norm=False, log_every=1)
RESNET = dict(width=8, steps=6, batch_size=32, warmup_steps=2, eval_every=3, log_every=1, ckpt_every=2)
RESNET |= dict(shuffle_buffer=50, lr=0.02, label_smoothing=0.0, ema=0.0, mixup=0.0, image_size=8, crop_pad=1)
SMALL = {gpt_train: GPT, bert_mlm: BERT, resnet_stream: RESNET}
scripts = pytest.mark.parametrize("script", SMALL, ids=lambda script: script.__name__)

train = lambda script=gpt_train, **changes: script.main(script.Config(**SMALL[script] | changes))
jsonl = lambda texts: "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
texts_of = lambda records, rng: records["text"]
pairs_of = lambda records, rng: [*zip(*records.values())]
to_ids = lambda records, rng: [{"ids": int(text)} for text in rng.permutation(records["text"])]
as_torch = lambda array: torch.tensor(np.asarray(array)).long()


@pytest.fixture(scope="session", autouse=True)
def one_compilation_cache(tmp_path_factory):
    """Every process of the tests shares it, and none touches the user's."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
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


def flags(**changes):
    """A Config's fields as they are typed on the command line."""
    typed = []
    for name, value in changes.items():
        values = value if isinstance(value, tuple) else () if isinstance(value, bool) else (value,)
        typed += ["--" + "no-" * (value is False) + name.replace("_", "-"), *map(str, values)]
    return typed


@pytest.fixture
def typed(monkeypatch, capsys):
    """(stdout, stderr) of a script's command line, in this process; it ends with the exit code `code`."""

    def run(script, *args, code=0, **changes):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *args, *flags(**changes)])
        monkeypatch.setattr(os, "_exit", sys.exit)  # for the sake of a thread that still reads
        with pytest.raises(SystemExit) as stop:
            common.cli(script.Config, script.PRESETS, script.main, script.__doc__)
        out, err = capsys.readouterr()
        assert stop.value.code == code, err
        return out, err

    return run


def launch(program, *args, **env):
    """A script as its user starts it, or the text of a program, in a process of its own."""
    command = ["-c", program] if isinstance(program, str) else [str(HERE / f"{program.__name__}.py")]
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    env = os.environ | env | {"PYTHONPATH": str(HERE)}
    return subprocess.Popen([sys.executable, *command, *args], env=env, **how)


def finish(*processes, code=0, timeout=300):
    """[(stdout, stderr), ...] of processes that run side by side and end with the exit code `code`."""
    ends = [process.communicate(timeout=timeout) for process in processes]
    assert {process.returncode for process in processes} == {code}, ends
    return ends


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


def write(files):
    """Write {name: bytes or str}."""
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def open_train(*data, roles=("text",), **changes):
    return common.open_data(gpt_train.Config(data=data, **changes), dict.fromkeys(roles))


def documents(data, split="train"):
    """(texts in the order of the files, number of bad records) of the data."""
    stream = Stream(open_train(data)[0], texts_of, 16, None, split)
    return [*stream], stream.position["bad"]


class Hub(http.server.ThreadingHTTPServer):
    """Serves root/REPOSITORY/FILE by the hub's routes, and root/files/FILE as a plain web server."""

    daemon_threads, sha = True, "0123456789abcdef0123456789abcdef01234567"
    handle_error = lambda *_: None  # a client that hangs up is part of the game

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.root, self.faults = root, 0
        self.fault = lambda path: None  # may name what goes wrong with a request for a file
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.env = dict(HF_HOME=str(root / "home"), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
        self.env |= dict(HF_ENDPOINT=self.url, HF_HUB_DOWNLOAD_TIMEOUT="2", HF_HUB_OFFLINE="0")

    def break_requests(self, after, kind_of):
        """Let `kind_of(n)` name what goes wrong with the n-th request for data after the first ones."""
        requests = count(-after)
        number = lambda path: next(requests) if ".parquet" in path else -1
        self.fault = lambda path: kind_of(n) if (n := number(path)) >= 0 else None


class HubRequest(http.server.BaseHTTPRequestHandler):
    protocol_version, log_message = "HTTP/1.1", lambda *_: None
    # the repository, the route with its revision, the file
    route = r"(?:/api)?(?:/datasets|/models)?/(files|HuggingFaceFW/fineweb-edu|gpt2)(?:/(\w+)/\w+)?/?(.*)"

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in (dict(Content_Length=len(body), X_Repo_Commit=Hub.sha) | headers).items():
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
        elif kind != "reset":
            self.answer(kind, **{"Retry-After": 0} if kind == 429 else {})
        self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        found = re.fullmatch(self.route, path)
        if not found:
            return self.answer(404, X_Error_Code="RepoNotFound")
        repo, route, name = found.groups()
        folder = self.server.root / repo
        if route != "tree" and name:
            return self.send_file(folder / name, path)
        pattern, listed = "*" if route == "tree" and "recursive=true" not in self.path.lower() else "**/*", []
        for file in sorted((folder / name).glob(pattern)):
            kind, where = "file" if file.is_file() else "directory", str(file.relative_to(folder))
            listed.append(dict(path=where, rfilename=where, oid=where, size=file.stat().st_size, type=kind))
        about = dict(id=repo, sha=Hub.sha, siblings=[x for x in listed if x["type"] == "file"], tags=[])
        self.answer(200, json.dumps(listed if route == "tree" else about | dict(private=False)).encode())

    def send_file(self, file, path):
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        body, code = file.read_bytes(), 200
        head = dict(ETag=f'"{zlib.crc32(body)}"', Accept_Ranges="bytes")
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(part[1]), min(int(part[2] or len(body)), len(body) - 1)
            head["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
            code, body = 206, body[first : last + 1]
        fault = self.server.fault(path) if self.command == "GET" else None
        return self.go_wrong(fault, body) if fault else self.answer(code, body, **head)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path):
    """A hub with fineweb-edu (the standard library's documents, in row groups of 4) and a small gpt2."""
    root = tmp_path / "hub"
    folder = root / "HuggingFaceFW/fineweb-edu"
    texts = [text for text in documents("stdlib")[0] if len(text) < 6000]
    for i, name in enumerate(["sample/10BT/000", "sample/10BT/001", "data/CC-MAIN-2013-20/train"]):
        write({folder / f"{name}.parquet": parquet_of(texts[i::3], row_group_size=4)})
    write({folder / "README.md": card_of({"default": "data/*/*", "sample-10BT": "sample/10BT/*"})})
    tokenizer = gpt_train.load_tokenizer("bpe:300", texts)
    gpt_train.save_pretrained(gpt.model(vocab_size=len(tokenizer)), root / "gpt2", tokenizer)
    return Hub(root)


# ---- data: formats, splits, columns, streams ----


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
            writer.write_table(pa.table({"id": range(len(texts)), "text": texts}, schema=schema), **how)
    return file.getvalue()


def card_of(configurations):
    """A data set's README.md."""
    split = "- config_name: {}\n  data_files:\n  - split: train\n    path: {}\n"
    return "---\nconfigs:\n" + "".join(split.format(*item) for item in configurations.items()) + "---\n"


def test_every_format_gives_the_same_documents_pictures_and_labels_from_disk_and_from_the_web(tmp_path):
    texts = ["one\ntwo", 'three, "four"', "fünf\t6"]
    plain = ["one", 'three, "four', "null", "NA", "5"]  # what a tsv can hold
    rows, packed = [{"id": i, "text": text} for i, text in enumerate(texts)], jsonl(texts).encode()
    files = {"a.parquet": parquet_of(texts), "a.json": json.dumps(rows), "a.jsonl": packed}
    files["a.csv"] = 'id,text\n0,"one\ntwo"\n1,"three, ""four"""\n2,fünf\t6\n'
    files |= {"a.jsonl.gz": gzip.compress(packed), "a.jsonl.zst": zstandard.compress(packed)}
    files |= {"a.tar": tar_of({f"{i}.txt": text.encode() for i, text in enumerate(texts)})}
    files |= {"a.tsv": "text\n" + "\n".join(plain), "a.txt": texts[0]}
    write({f"files/{name}": content for name, content in files.items()})
    write({f"folder/{i}.txt": text for i, text in enumerate(texts)})
    web = Hub(tmp_path)
    for name in files:
        wanted = {"a.tsv": plain, "a.txt": texts[:1]}.get(name, texts)
        for data in (f"files/{name}", f"{web.url}/files/{name}"):
            assert documents(data) == (wanted, 0), data
    for data in ("folder", "folder/", "folder/*.txt"):
        assert documents(data) == (texts, 0), data

    rng, parts = np.random.default_rng(0), {}
    pictures = [(i // 3, png(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))) for i in range(6)]
    write({f"files/f/train/{'ab'[label]}/{i}.png": p for i, (label, p) in enumerate(pictures)})
    rows = [{"image": {"bytes": p, "path": None}, "label": label} for label, p in pictures]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    datasets.Dataset.from_list(rows, features=features).to_parquet("files/b.parquet")
    for i, (label, content) in enumerate(pictures):
        parts |= {f"{i}.png": content, f"{i}.cls": str(label).encode()}
    write({"files/b.tar": tar_of(parts)})
    places = [f"{place}/{name}" for place in ("files", f"{web.url}/files") for name in ("b.parquet", "b.tar")]
    for data in ("files/f", "files/f/train", "files/f/*/*/*.png", *places):
        [source] = open_train(data, roles=("image", "label"))
        found = Stream(source, pairs_of, 4, None)
        assert {(label, common.read_file(image, 0)) for image, label in found} == {*pictures}, data
        assert source.classes == (None if data.endswith("tar") else ["a", "b"])


DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}"
HALVES = '{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n'
CARD = card_of({"a": "a.*"})
ODD_TEXTS = {  # files, what to open (or the first of them), the documents and the bad records in them
    "null and NA are words": ({"a.csv": "text\nnull\nNA\n\n5\n"}, None, ["null", "NA", "5"], 0),
    "mark in csv": ({"a.csv": "\ufefftext\na\nb\n"}, None, ["a", "b"], 0),
    "mark in txt": ({"a.txt": "\ufeffhello"}, None, ["hello"], 0),
    "empty rows": ({"a.jsonl": jsonl(["", "a", None, "b", ""]) + "\n\n"}, None, ["a", "b"], 0),
    "deep JSON": ({"a.jsonl": f"{DEEP}\n" + jsonl(["a"])}, None, ["a"], 1),
    "cut short": ({"a.jsonl": jsonl(["a"]) + '{"text": "b'}, None, ["a"], 1),
    "not texts": ({"a.jsonl": jsonl([5, "a", ["b"], {"c": 1}, True]) + "[1]\n"}, None, ["a"], 5),
    "half a character": ({"a.jsonl": HALVES}, None, ["\U0001f600"], 1),
    "not UTF-8 in tar": ({"a.tar": tar_of({"a.txt": b"caf\xe9"})}, None, ["caf\ufffd"], 0),
    "odd name": ({"a [1]*.txt": "odd", "a 1b.txt": "another"}, None, ["odd"], 0),
    "odd folder": ({"[a] *b/0.txt": "odd", "a b/0.txt": "another"}, "[a] *b", ["odd"], 0),
    "file without rows": ({"d/0.parquet": parquet_of([]), "d/1.parquet": parquet_of(["a"])}, "d", ["a"], 0),
    "files of no bytes": ({"d/0.jsonl": "", "d/1.jsonl": jsonl(["a"]), "d/2.jsonl": ""}, "d", ["a"], 0),
    "number on top": ({"a.csv": "1\n2\n"}, None, ["1", "2"], 0),
    "number among texts": ({"a.json": '[{"text": "2020-01-01"}, {"text": 5}]'}, None, ["2020-01-01"], 1),
    "json over lines": ({"a.json": '{\n"text": "a"\n}'}, None, ["a"], 0),
    "jsonl of a card": ({"d/README.md": CARD, "d/a.jsonl": jsonl(["a", 5]) + "{"}, "d", ["a"], 2),
    "empty lines on top": ({"a.csv": "\n\ntext\na\n"}, None, ["a"], 0),
    "parts of a csv": ({"d/0.csv": "id,text\n0,a\n", "d/1.csv": "1,b\n2,c\n3\n"}, "d", ["a"], 3),
    "csv of a card": ({"d/README.md": CARD, "d/a.csv": "text\nNA\n07\n"}, "d", ["NA", "07"], 0),
    "tsv of a card": ({"d/README.md": CARD, "d/a.tsv": 'text\n"a\nb\n'}, "d", ['"a', "b"], 0),
}


@pytest.mark.parametrize("case", ODD_TEXTS)
def test_odd_texts_are_read_as_they_are_and_empty_is_not_bad(case):
    files, name, texts, bad = ODD_TEXTS[case]
    write(files)
    name = name or next(iter(files))
    assert documents(name) == (texts, bad)
    rows = Stream(open_train(name)[0], texts_of, 2, 0)
    assert sorted(islice(rows, 2 * len(texts))) == sorted(texts * 2), "in training too"


def test_splits_columns_headers_and_configurations_are_found():
    write({f"data/{s}.tsv": f"text\tlabel\n{s} is good\t1\nbad\t0\n" for s in ("train", "dev", "test")})
    assert documents("data") == (["train is good", "bad"], 0)
    assert documents("data", split="validation")[0] == ["dev is good", "bad"]
    for split in ("train", "test"):  # a folder may name the split, and a data set's card is no data
        write({f"folders/{split}/0.parquet": parquet_of([split]), f"documents/{split}/a.txt": split})
    write({"folders/README.md": "---\nlicense: mit\n---\n", "folders/.hidden/0.parquet": parquet_of(["x"])})
    Path("linked").symlink_to("folders")
    for data in ("folders", "folders/", "folders/**/*.parquet", "documents", "documents/**/*.txt", "linked"):
        assert open_train(data)[0].validation == "test"
        assert [documents(data, split=split)[0] for split in ("train", "test")] == [["train"], ["test"]], data
    write({"d/README.md": card_of({"a": "a/*", "b": "b/*"})})
    write({f"d/{name}/0.jsonl": jsonl([name] * 3) for name in "ab"})
    for name in "ab":
        assert [*Stream(open_train("d", data_name=(name,))[0], texts_of, 4, None)] == [name] * 3

    write({"a.csv": "body,title,label\nlong,short,3\n", "b.csv": "body,label\na,0\nb,\nc,1\nd,-1\ne,2.0\n"})
    pairs = lambda source: [*Stream(source, pairs_of, 4, None)]
    [source] = common.open_data(gpt_train.Config(data=("a.csv",)), {"text": "title", "label": None})
    assert pairs(source) == [("short", 3)]
    [source] = open_train("b.csv", roles=("text", "label"))
    assert pairs(source) == [("a", 0), ("c", 1), ("e", 2)]
    source.classes = ["no", "yes"]
    assert pairs(source) == [("a", 0), ("c", 1)]


def numbers(n=600, group=10, folder="numbers", first=0):
    """A source of the rows "first" ... "first + n - 1" in three parquet files of row groups of `group`."""
    for i in range(3):
        part = [str(first + x) for x in range(i * n // 3, (i + 1) * n // 3)]
        write({f"{folder}/{i}.parquet": parquet_of(part, row_group_size=group)})
    return open_train(folder)[0]


def as_process(monkeypatch, rank, world):
    monkeypatch.setattr(jax, "process_index", lambda: rank)
    monkeypatch.setattr(jax, "process_count", lambda: world)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_row_comes_once_an_epoch_over_all_processes(world, monkeypatch):
    epochs, source = [[], []], numbers()
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        stream, before = Stream(source, to_ids, 50, 0), len(epochs[0])
        for row in takewhile(lambda _, s=stream: s.position["epoch"] < 2, stream):
            epochs[stream.position["epoch"]].append(row["ids"])
        assert len(epochs[0]) - before == pytest.approx(600 / world, abs=20), "shares of about the same size"
    assert sorted(epochs[0]) == sorted(epochs[1]) == [*range(600)]
    assert epochs[0] != epochs[1], "every epoch has an order of its own"


def test_mixture_has_its_shares_and_goes_on_after_every_batch_over_epoch_ends(monkeypatch):
    as_process(monkeypatch, 1, 2)
    sources, weights = [numbers(240), numbers(120, folder="more", first=1000)], (0.7, 0.3)
    streams = lambda: [Stream(source, to_ids, 25, 0) for source in sources]

    def take(n, start=0, position=None):
        found = common.batches(streams(), 32, seed=3, start=start, position=position, weights=weights)
        ids, positions = zip(*[(batch["ids"], position) for batch, position in islice(found, n)])
        return np.array(ids).tolist(), positions

    whole, positions = take(60)  # of 16 rows, over several epochs of 120 and 60
    rows = np.reshape(whole, -1)
    assert np.mean(rows < 1000) == pytest.approx(0.7, abs=0.03)
    for stream, mine in zip(streams(), (rows[rows < 1000], rows[rows >= 1000])):
        alone = [row["ids"] for row in islice(stream, len(mine))]
        assert mine.tolist() == alone, "its own order, and no row is dropped"
    for n, position in enumerate(positions[:-1], 1):
        assert take(60 - n, n, json.loads(json.dumps(position)))[0] == whole[n:], n


def test_window_of_twenty_row_groups_mixes_nearly_as_well_as_a_permutation_of_all():
    source, rng = numbers(8000, group=20), np.random.default_rng(0)
    epoch = lambda seed, window: [row["ids"] for row in islice(Stream(source, to_ids, window, seed), 8000)]
    # of the batches' means: what a train step sees of an order that follows the files
    spread = lambda rows: np.std(np.mean(np.reshape(rows, (-1, 32)), axis=1))
    ideal = np.mean([spread(rng.permutation(8000)) for _ in range(4)])
    shuffled = [epoch(seed, 400) for seed in range(4)]
    assert np.mean([*map(spread, shuffled)]) < 1.8 * ideal and shuffled[0] != shuffled[1]
    assert spread(epoch(0, 1)) > 4 * ideal, "without a window it would be the order of the row groups"
    assert np.mean(np.diff(np.array(shuffled[0]) // 20) == 0) < 0.1, "of one row group: 1/20 within a window"


def test_web_that_fails_changes_no_row_and_is_given_up_in_the_end(tmp_path, monkeypatch):
    texts, pauses = [f"{i} " + "x" * 2000 for i in range(150)], []
    write({"files/a.parquet": parquet_of(texts, row_group_size=10), "files/a.jsonl": jsonl(texts)})
    write({"files/a.jsonl.zst": zstandard.compress(jsonl(texts).encode())})
    web, dice = Hub(tmp_path), random.Random(0)
    make_rows = lambda records, rng: [int(text.split()[0]) for text in rng.permutation(records["text"])]
    here = threading.current_thread()  # others prefetch
    pause = lambda seconds: pauses.append(seconds) if threading.current_thread() is here else None
    monkeypatch.setattr(time, "sleep", pause)
    whole = Path("files/a.parquet").read_bytes()
    write({"hole.parquet": whole[:150_000] + bytes(30_000) + whole[180_000:]})
    write({"cut.jsonl.gz": gzip.compress(jsonl(texts).encode())[:-200]})

    def slip():
        yield {"text": "1"}
        yield {"text": undefined}  # noqa: F821

    source = common.Source({"train": datasets.IterableDataset.from_generator(slip)}, {"text": "text"})
    with pytest.raises(NameError):  # with its traceback: it is no fault of the data
        [*Stream(source, texts_of, 1, 0)]
    broken = {"hole.parquet": "the data failed: ", "cut.jsonl.gz": "the data failed: cut.jsonl.gz: "}
    for name, message in broken.items():  # files that lie here are not opened again
        rows = iter(Stream(open_train(name)[0], make_rows, 10, 0))
        assert next(rows) < 150
        with pytest.raises(common.RunError, match=message):
            [*islice(rows, 150)]
    assert not pauses
    for name in ("a.parquet", "a.jsonl", "a.jsonl.zst"):
        web.fault = lambda path: None
        [source] = open_train(f"{web.url}/files/{name}", retries=99)
        whole = [*islice(Stream(source, make_rows, 50, 0), 300)]
        kinds = [500, 503, 504, 429, "reset", "truncated"]
        web.fault = lambda path: dice.choice(kinds) if dice.random() < 0.2 else None  # noqa: B023
        assert [*islice(Stream(source, make_rows, 50, 0), 300)] == whole
    assert web.faults > 5 and pauses, "most are mended beneath us"
    picture = lambda name: common.read_file({"bytes": None, "path": f"{web.url}/files/{name}"}, 99)
    assert {picture("a.jsonl") for _ in range(20)} == {jsonl(texts).encode()}, "pictures known by their URL"
    with pytest.raises(ValueError):  # a bad record
        picture("missing.png")
    web.fault, source.retries = lambda path: 500, 8
    monkeypatch.setattr(datasets.config, "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL", 0)  # theirs
    pauses.clear()
    with pytest.raises(common.RunError, match="the data failed 9 times in a row: "):
        next(iter(Stream(source, make_rows, 50, 0)))
    assert [*filter(None, pauses)] == [1, 2, 4, 8, 16, 32, 60, 60], "they grow"


def test_bad_records_are_skipped_logged_counted_and_stop_the_stream_where_they_are_many(capfd):
    records = [json.dumps({"text": str(i)}) for i in range(200)]
    for i, value in enumerate(["[5]", '{"text": 5}', '{"text": "cut sho', '{"words": "x"}', '{"text": ""}']):
        records.insert(20 * i + 7, value)
    write({"a.jsonl": "\n".join(records)})
    [source] = open_train("a.jsonl")

    def stream(position=None, n=0):
        return common.batches([Stream(source, to_ids, 10, 0)], 4, seed=0, start=n, position=position)

    found = [*islice(stream(), 100)]
    counts = [position["bad_records"] for _, position in found]
    rows = [x for batch, _ in found for x in batch["ids"].tolist()]
    assert sorted(rows[:200]) == [*range(200)] == sorted(rows[200:]), "the good ones, once an epoch"
    assert counts[49] == 4 and counts[99] == 8 and len({*counts}) > 4, "the count does not run ahead"
    for n in (1, 31):  # the first is inside a window with a bad record
        assert [p["bad_records"] for _, p in islice(stream(found[n - 1][1], n), 100 - n)] == counts[n:]
    said = capfd.readouterr().err
    whys = {7: "not a JSON object", 27: "text is 5", 47: "Unterminated string", 67: "no text in it"}
    for i, why in whys.items():
        assert f"data: skipped record {i} of epoch 0: {why}" in said and f"record {i} of epoch 1" in said

    for name, share in (("few.jsonl", 120), ("many.jsonl", 90)):
        write({name: jsonl([5 if i % share == 0 else "7" for i in range(20_000)])})
    few, many = (Stream(open_train(name)[0], to_ids, 1000, 0) for name in ("few.jsonl", "many.jsonl"))
    assert len([*islice(few, 40_000)]) == 40_000
    with pytest.raises(common.RunError, match=r"of .* records of the data are bad; the last one is"):
        len([*islice(many, 40_000)])
    assert capfd.readouterr().err.count("skipped") == 200, "the first hundred are logged"


MEMORY = """
import resource, sys, common, gpt_train
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
[source], before = common.open_data(gpt_train.Config(data=("a.parquet",)), {"text": None}), peak()
rows = common.Stream(source, lambda records, rng: [sum(map(len, records["text"]))], 1000, 0)
print(sum(n for n, _ in zip(rows, range(150))), peak() - before)
"""


def test_memory_does_not_grow_with_the_file():
    rows = np.random.default_rng(0).integers(32, 127, (1000, 2000), dtype=np.uint8)
    texts = [row.tobytes().decode() for row in rows]
    write({"a.parquet": parquet_of(*[texts] * 150)})  # row groups of 2 MB
    assert Path("a.parquet").stat().st_size > 300e6
    [(out, _)] = finish(launch(MEMORY))
    characters, grown = map(int, out.split())
    assert characters == 150 * 1000 * 2000 and grown < 150e6


# ---- the models: small ones with every weight random, their batches, and what PyTorch makes of these ----


class Gpt:
    def __init__(self):
        self.script, self.auto, self.optimizer = gpt_train, "AutoModelForCausalLM", dict(betas=(0.9, 0.95))
        self.training = dict(optimizer="adamw", lr=1e-2, warmup_steps=3, steps=10, batch_size=4, accum=2)
        self.twins = {"lm_head.weight": "transformer.wte.weight"}
        self.older = {"transformer.": ""}  # what stands in weights' names, and in those of older files
        self.ignored = {"h.0.attn.bias": np.ones((1, 1, 48, 48), np.float32)}  # the causal mask
        self.refused = dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, n_inner=96)
        self.refused |= dict(activation_function="relu", add_cross_attention=True, tie_word_embeddings=False)

    def new(self, rate=0.0, dtype="float32", remat=False, **changes):
        sizes = dict(vocab_size=199, n_positions=48, n_embd=48, n_layer=2, n_head=4)
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), rate)
        config = transformers.GPT2Config(**sizes | rates | changes)
        return gpt_train.GPT(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))

    def model(self, **changes):
        model, rng = self.new(**changes), np.random.default_rng(0)
        for param in jax.tree.leaves(nnx.state(model), is_leaf=lambda p: isinstance(p, nnx.Variable)):
            param.set_value(param[...] + 0.1 * rng.normal(size=param.shape).astype(np.float32))
        return model

    def batch(self, seed=0):
        """What the train step is given. Microbatches hold unequal numbers of targets."""
        tokens = np.random.default_rng(seed).integers(0, 199, (4, 33)).astype(np.int32)
        tokens[1::2, 9:] = -1
        return (tokens,)

    def logits(self, model, tokens, key=None):
        return model(jnp.maximum(tokens, 0), key)

    def loss(self, model, tokens, key=None):
        nats, count = gpt_train.loss_sum(model, tokens[:, :-1], tokens[:, 1:], key)
        return nats / count

    def torch_logits(self, theirs, tokens):
        return theirs(as_torch(np.maximum(tokens, 0))).logits

    def torch_loss(self, theirs, tokens):
        labels = np.where(tokens < 0, -100, tokens)
        return theirs(as_torch(np.maximum(tokens, 0)), labels=as_torch(labels)).loss


class Bert(Gpt):
    def __init__(self, pre_norm=False):
        super().__init__()
        self.config = transformers.MegatronBertConfig if pre_norm else transformers.BertConfig
        self.script, self.auto = bert_mlm, "AutoModelForMaskedLM"
        self.optimizer = dict(betas=(0.9, 0.98), eps=1e-6)
        self.twins = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
        self.twins["cls.predictions.decoder.bias"] = "cls.predictions.bias"
        self.older = {"Norm.weight": "Norm.gamma", "Norm.bias": "Norm.beta"}
        self.ignored = {"bert.embeddings.position_ids": np.arange(48), "bert.pooler.dense.bias": np.ones(48)}
        self.refused = dict(hidden_act="relu", position_embedding_type="relative_key", is_decoder=True)
        self.refused |= dict(tie_word_embeddings=False)

    def new(self, rate=0.0, dtype="float32", remat=False, head="mlm", **changes):
        sizes = dict(vocab_size=199, hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
        sizes |= dict(intermediate_size=96, max_position_embeddings=48)
        sizes |= dict(hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
        config = self.config(**sizes | changes)
        return bert_mlm.BERT(config, head=head, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))

    def batch(self, seed=0):
        """After masking; rows are of unequal length, so that they hold unequal numbers of targets."""
        tokens, lengths = padded(4, 33, seed)
        return (masker()(jax.random.key(seed), tokens) | dict(lengths=lengths),)

    def logits(self, model, batch, key=None):
        """Those of the padding are 0; the second half of a row has another token type."""
        places, ends = jnp.arange(33), batch["lengths"][:, None]
        hidden = model(batch["tokens"], batch["lengths"], (places > ends // 2).astype(int), key=key)
        return model.mlm_logits(hidden) * (places < ends)[..., None]

    def loss(self, model, batch, key=None):
        sums = bert_mlm.loss_sum(model, batch, key)
        return sums["nats"] / sums["count"]

    def torch_logits(self, theirs, batch):
        places, ends = torch.arange(33), as_torch(batch["lengths"])[:, None]
        how = dict(token_type_ids=(places > ends // 2).long(), attention_mask=(places < ends).long())
        return theirs(as_torch(batch["tokens"]), **how).logits * how["attention_mask"][..., None]

    def torch_loss(self, theirs, batch):
        tokens, places, asked = (np.asarray(batch[name]) for name in ("tokens", "positions", "weights"))
        labels, (rows, at) = np.full(tokens.shape, -100), np.nonzero(asked)
        labels[rows, places[rows, at]] = np.asarray(batch["targets"])[rows, at]
        mask = np.arange(tokens.shape[1]) < np.asarray(batch["lengths"])[:, None]
        return theirs(as_torch(tokens), attention_mask=as_torch(mask), labels=as_torch(labels)).loss


def tiny_view(size, share):
    """Sees the central square, `share` of a picture's short side long."""
    look = dict(size={"shortest_edge": round(size / share)}, crop_size={"height": size, "width": size})
    look |= dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], resample=2)
    return resnet_stream.View(transformers.BitImageProcessorPil(**look))


class ResNet(Gpt):
    def __init__(self, kind="basic", stem="cifar"):
        self.kind, self.stem, self.size = kind, stem, 32 if stem == "imagenet" else 8
        self.script, self.auto, self.optimizer = resnet_stream, "AutoModelForImageClassification", None
        self.training = dict(lr=2e-3, warmup_steps=3, steps=10, batch_size=8, accum=2, weight_decay=1.0)
        self.training |= dict(label_smoothing=0.1, ema=0.0, mixup=0.0)
        self.twins, self.ignored, self.older = {}, {}, {"resnet.": ""}
        self.refused = dict(downsample_in_bottleneck=True, downsample_in_first_stage=True, num_channels=1)
        self.refused |= dict(hidden_act="gelu", stem="deep")

    def new(self, rate=0.0, dtype="float32", remat=False, classes=tuple("abcdefg"), size=None):
        sizes = dict(depths=[1, 2], hidden_sizes=[16, 32], embedding_size=8, layer_type=self.kind)
        config = transformers.ResNetConfig(**sizes, **common.label_names(classes), stem=self.stem)
        options = dict(dropout=rate, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))
        return resnet_stream.ResNet(config, tiny_view(size or self.size, 0.875), **options)

    def batch(self, seed=0):
        images = np.random.default_rng(seed).integers(0, 256, (8, self.size, self.size, 3))
        return images.astype(np.uint8), np.arange(8) % 7

    def logits(self, model, images, labels, key=None):
        return model(model.view.normalise(images), key=key)

    def loss(self, model, images, labels, key=None):
        """The mean of two microbatches, each with the statistics of its own."""
        targets, halves = 0.9 * jax.nn.one_hot(labels, 7) + 0.1 / 7, (slice(0, None, 2), slice(1, None, 2))
        logits = [model(model.view.normalise(images[half]), train=True, key=key) for half in halves]
        nats = [-jnp.sum(targets[half] * jax.nn.log_softmax(x), -1) for half, x in zip(halves, logits)]
        return jnp.mean(jnp.stack(nats))

    def torch_logits(self, theirs, images, labels):
        pixels = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        return theirs(torch.tensor(pixels).float().permute(0, 3, 1, 2)).logits

    def torch_loss(self, theirs, images, labels):
        loss = partial(torch.nn.functional.cross_entropy, label_smoothing=0.1)
        logits = [self.torch_logits(theirs.train(), images[i::2], None) for i in (0, 1)]
        theirs.eval()
        return sum(loss(logits[i], as_torch(labels[i::2])) for i in (0, 1)) / 2


gpt, bert, pre_norm = Gpt(), Bert(), Bert(pre_norm=True)
resnet, bottleneck = ResNet(), ResNet("bottleneck", "imagenet")
KINDS = dict(gpt=gpt, bert=bert, bert_pre_norm=pre_norm, resnet=resnet, resnet_bottleneck=bottleneck)
three_kinds = pytest.mark.parametrize("kind", [gpt, bert, resnet], ids=["gpt", "bert", "resnet"])


def padded(B, T, seed=0, V=199):
    """Tokens (B, T) of rows of unequal length, and their lengths."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[T], rng.integers(2, T, B - 1)]).astype(np.int32)
    return np.where(np.arange(T) < lengths[:, None], rng.integers(5, V, (B, T)), 0).astype(np.int32), lengths


@cache
def masker(V=199, share=0.15):
    """mask_tokens, compiled, for a vocabulary whose first five ids are special."""
    words = dict(get_vocab=lambda: {str(i): i for i in range(V)}, all_special_ids=[*range(5)])
    tokenizer = SimpleNamespace(**words, mask_token_id=4)
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
    loss, grads = nnx.jit(nnx.value_and_grad(lambda *x: kind.loss(*x, key=key)))(model, *batch)
    there = nnx.clone(model)
    nnx.update(there, grads)
    return float(loss), exported(kind, there)


def make_step(script, model, **changes):
    """(state, train_step, merge); merge(state) is (model, optimizer, ...). BERT's batches are masked."""
    cfg = script.Config(**changes)
    schedule, prepare = script.make_schedule(cfg), [lambda key, batch: batch] if script is bert_mlm else []
    parts = [model, nnx.Optimizer(model, script.make_optimizer(cfg, schedule), wrt=nnx.Param)]
    if script is resnet_stream:
        parts.append(jax.tree.map(jnp.copy, model) if cfg.ema else None)
    graphdef, state = nnx.split(tuple(parts))
    state = common.shard_state(common.make_mesh(), state, fsdp=False)
    step = script.make_train_step(graphdef, state, cfg, schedule, *prepare)
    return state, step, partial(nnx.merge, graphdef)


@against_torch
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_logits_loss_gradients_and_ten_steps_equal_pytorch(kind):
    model, batch = kind.model(), kind.batch()
    kind.script.save_pretrained(model, "model")
    load = partial(getattr(transformers, kind.auto).from_pretrained, "model", output_loading_info=True)
    # transformers has no ResNet with the small stem
    theirs, info = load(trust_remote_code=True) if kind is resnet else load()
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.eval()
    logits = see(kind, model, batch)
    np.testing.assert_allclose(logits, kind.torch_logits(theirs, *batch).detach(), atol=1e-4)
    np.testing.assert_array_equal(see(kind, kind.script.from_pretrained("model"), batch), logits)

    loss, grads = gradients(kind, model, batch)
    right = kind.torch_loss(theirs, *batch)
    right.backward()
    assert loss == pytest.approx(right.item(), abs=1e-5)
    for name, p in theirs.named_parameters():
        np.testing.assert_allclose(grads[name], p.grad, atol=2e-5, rtol=1e-4, err_msg=name)

    state, step, merge = make_step(kind.script, model, **kind.training, grad_clip=0.5)
    decay = kind.script.Config(**kind.training).weight_decay
    groups = [dict(params=[p], weight_decay=decay * (p.ndim >= 2)) for p in theirs.parameters()]
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
    found, wanted = exported(kind, merge(state)[0]), kind.torch_logits(theirs, *batch).detach()
    np.testing.assert_allclose(see(kind, merge(state)[0], batch), wanted, atol=1e-3)
    for name, statistic in theirs.named_buffers():
        if "running" in name:
            np.testing.assert_allclose(found[name], statistic, atol=1e-4, rtol=1e-3, err_msg=name)


@three_kinds
def test_published_names_load_and_what_changes_the_numbers_is_refused_by_name(kind):
    model, batch = kind.model(), kind.batch()
    w, wanted = exported(kind, model), see(kind, model, batch)
    config = json.loads(Path("exported/config.json").read_text())
    shutil.copytree("exported", "model")

    older = lambda name: re.sub("|".join(kind.older), lambda found: kind.older[found[0]], name)

    def load(weights, **fields):
        write({"model/config.json": json.dumps(config | fields)})
        save_file(weights, "model/model.safetensors")
        return kind.script.from_pretrained("model")

    twins = {twin: w[own] for twin, own in kind.twins.items()}
    files = [{older(name): x for name, x in w.items()} | kind.ignored, w | twins]
    files.append({name: x for name, x in w.items() if name not in kind.twins.values()} | twins)
    for weights in files:
        np.testing.assert_array_equal(see(kind, load(weights), batch), wanted)
    if kind is bert:  # an encoder alone: with a seed the head is drawn
        encoder = {name: x for name, x in w.items() if name.startswith("bert.")}
        assert load(encoder).head is None
        with pytest.raises(common.UsageError, match=r"has no cls\..*, so no head for mlm"):
            bert_mlm.from_pretrained("model", head="mlm")
        drawn = exported(kind, bert_mlm.from_pretrained("model", head="mlm", seed=0))
        assert {*drawn} == {*w} and all(np.all(drawn[name] == x) for name, x in encoder.items())
    for name, value in (kind.refused | dict(problem_type="regression")).items():
        with pytest.raises(common.UsageError, match=f"{name} is {value}, only"):
            load(w, **{name: value})
    *_, name = (name for name in sorted(w) if "layer" in name or ".h." in name)
    lacking, cut = {n: x for n, x in w.items() if n != name}, w | {name: w[name][:1]}
    wrong = {"is missing": lacking, "expected": cut, "has no place in": w | {"adapter.weight": w[name]}}
    wrong |= {twin + r".*only tied ones": w | {twin: x + 1} for twin, x in twins.items()}
    wrong |= {"is not finite": w | {name: w[name] + np.nan}, r"\(int8\)": w | {name: np.int8(w[name])}}
    for message, weights in wrong.items():
        with pytest.raises(common.UsageError, match=message):
            load(weights)

    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(w)}
    for file in {*index.values()}:
        save_file({name: x for name, x in w.items() if index[name] == file}, f"model/{file}")
    write({"model/model.safetensors.index.json": json.dumps({"weight_map": index})})
    save_file(w | {name: w[name] + 1}, "model/model.safetensors")  # goes before an index, as in transformers
    assert np.any(see(kind, kind.script.from_pretrained("model"), batch) != wanted)
    Path("model/model.safetensors").rename("model/pytorch_model.bin")
    np.testing.assert_array_equal(see(kind, kind.script.from_pretrained("model"), batch), wanted)
    Path("model/model.safetensors.index.json").unlink()
    with pytest.raises(common.UsageError, match=r"no model\.safetensors in it"):
        kind.script.from_pretrained("model")


@three_kinds
def test_dropout_remat_bfloat16_and_the_code_for_accelerators(kind, monkeypatch):
    batch, key = kind.batch(), jax.random.key(1)
    plain, dropping = see(kind, kind.model(), batch), kind.model(rate=0.2)
    np.testing.assert_array_equal(see(kind, dropping, batch), plain)
    draws = [see(kind, dropping, batch, jax.random.key(i)) for i in (1, 1, 2)]
    assert np.all(draws[0] == draws[1]) and np.any(draws[0] != draws[2])
    if kind is not resnet:
        with monkeypatch.context() as patch:  # what the fused kernel is asked for, computed by XLA
            attend = jax.nn.dot_product_attention
            patch.setattr(common, "has_fused_attention", lambda q: True)
            patch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **o: attend(*a, **o))
            np.testing.assert_allclose(see(kind, kind.model(), batch), plain, atol=1e-5)
        x = kind.script.dropout(jnp.ones(100_000), 0.2, key)
        assert abs(x.mean() - 1) < 0.01 and abs((x == 0).mean() - 0.2) < 0.01
        exported(kind, kind.model(rate=0.1, vocab_size=300))
        tokenizer = kind.script.load_tokenizer("bpe:300")
        for flag, rate in {None: 0.1, 0.0: 0.0}.items():  # the checkpoint's, but for a flag
            cfg = kind.script.Config(init_from="exported", dropout=flag)
            head = ["mlm"] if kind is bert else []
            config = kind.script.build(cfg, tokenizer, *head).config.to_dict()
            assert {x for name, x in config.items() if re.search("_pdrop|dropout_prob", name)} == {rate}

    half = kind.model(dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    assert 1e-3 < np.abs(see(kind, half, batch) - plain).max() < 0.3, "nearly the same, and not in float32"

    loss, grads = gradients(kind, kind.model(rate=0.1), batch, key)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    same, others = gradients(kind, kind.model(rate=0.1, remat=True), batch, key)
    assert same == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        np.testing.assert_allclose(others[name], grad, rtol=1e-3, atol=1e-5, err_msg=name)
    # fused attention is for GPUs that have it
    q = jnp.zeros((4, 8, 2, 64), jnp.bfloat16)
    for capability in (None, "7.5", "gfx942", "8.0", "9.0", "12.0"):
        monkeypatch.setattr(jax, "devices", lambda c=capability: [SimpleNamespace(compute_capability=c)])
        assert common.has_fused_attention(q) == str(capability).endswith(".0")
        assert not common.has_fused_attention(q.astype(jnp.float32))
        assert not common.has_fused_attention(q[..., :20])


def test_bfloat16_gradients_at_32_768_tokens_are_those_of_float32():
    text = "".join(documents(JSON)[0]).encode()[: 32 * 1024]  # the space stands there some 8,000 times
    tokens, norm = np.frombuffer(text, np.uint8).reshape(-1, 32).astype(np.int32) % 199, np.linalg.norm
    for kind, batch in ((gpt, tokens), (bert, masker()(jax.random.key(0), tokens))):
        models = (kind.new(dtype=dtype) for dtype in ("bfloat16", "float32"))
        (_, half), (_, whole) = (gradients(kind, model, (batch,)) for model in models)
        errors = {name: norm(half[name] - grad) / norm(grad) for name, grad in whole.items()}
        # these are 0 but for rounding: softmax does not see them
        errors = {name: e for name, e in errors.items() if not name.endswith("self.key.bias")}
        assert max(e for name, e in errors.items() if "wte" in name or "word" in name) < 0.01, errors
        assert max(errors.values()) < 0.03, errors


NEW = {  # a part of a weight's name: its deviation in a new model
    "gpt": (gpt, {"wte": 0.02, "wpe": 0.02, "c_fc.weight": 0.02, "c_proj.weight": 0.01, "bias": 0}),
    "bert": (bert, {"embeddings.weight": 0.02, "dense.weight": 0.02, "query.weight": 0.02, "bias": 0}),
    "pre-norm": (pre_norm, {"query.weight": 0.02, "output.dense.weight": 0.01, "bias": 0}),
    "resnet": (bottleneck, {"1.layer.1.convolution": math.sqrt(2 / (9 * 8)), "2.normalization.weight": 0}),
}


@pytest.mark.parametrize("case", NEW)
def test_new_model_starts_as_published(case):
    kind, deviations = NEW[case]
    weights = exported(kind, kind.new())
    for part, deviation in deviations.items():
        found = [w for name, w in weights.items() if part in name and (w.size > 500 or deviation == 0)]
        assert found and all(np.std(w) == pytest.approx(deviation, rel=0.08) for w in found), part
    if kind is bottleneck:
        for depth, millions in {18: 11.69, 34: 21.80, 50: 25.56, 101: 44.55, 152: 60.19}.items():
            cfg = resnet_stream.Config(depth=depth, width=64, stem="imagenet", image_size=32)
            create = lambda cfg=cfg: resnet_stream.build(cfg, range(1000))
            params = jax.tree.leaves(nnx.state(nnx.eval_shape(create), nnx.Param))
            assert round(sum(math.prod(p.shape) for p in params) / 1e6, 2) == millions


@against_torch
@pytest.mark.parametrize("kind, hidden", [(gpt, "transformer.h."), (bert, "bert.enc")], ids=["gpt", "bert"])
def test_muon_is_jordans_but_for_three_named_differences_and_for_hidden_matrices_only(kind, hidden):
    """https://kellerjordan.github.io/posts/muon, restated; what is no hidden matrix stays on AdamW."""

    def orthogonal(X):
        X = X / (X.norm() + 1e-7)
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        return X

    cfg = kind.script.Config(optimizer="muon", weight_decay=0.1, grad_clip=0.0)
    model, rng = kind.model(), np.random.default_rng(0)
    params, rule = nnx.state(model, nnx.Param), kind.script.make_optimizer(cfg, lambda step: 0.01)
    state, update = rule.init(params), jax.jit(rule.update)
    weights = {name: torch.tensor(w) for name, w in exported(kind, model).items()}
    momentum = {n: torch.zeros_like(w) for n, w in weights.items() if n.startswith(hidden) and w.ndim == 2}
    rest = [w for name, w in weights.items() if name not in momentum]
    groups = [dict(params=[w], weight_decay=0.1 * (w.ndim == 2)) for w in rest]
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
            w, g = weights[name], weights[name].grad
            m.lerp_(g, 1 - 0.95)
            # 1. NAdam's correction of the momentum's bias; 2. float32 instead of bfloat16
            corrected = torch.lerp(g / (1 - 0.95**t), m / (1 - 0.95 ** (t + 1)), 0.95)
            # 3. AdamW's size, instead of sqrt(max(1, rows / columns))
            w -= 0.01 * (0.2 * max(w.shape) ** 0.5 * orthogonal(corrected) + 0.1 * w)
        nnx.update(model, params)
        for name, found in exported(kind, model).items():
            np.testing.assert_allclose(found, weights[name], atol=2e-5, rtol=2e-3, err_msg=name)


@scripts
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


def test_resnet_mixup_and_running_mean_of_the_weights():
    def one_step(images, labels, seed=0, **changes):
        """(weights, their mean, loss) after a step, from the same start each time."""
        training = resnet.training | dict(accum=1) | changes
        state, step, merge = make_step(resnet_stream, resnet.model(), **training)
        state, metrics = step(state, images, labels, jax.random.key(seed))
        model, _, average = merge(state)
        return exported(resnet, model), average and exported(resnet, average), float(metrics["loss"])

    images, labels = resnet.batch()
    before, (after, mean, loss) = exported(resnet, resnet.model()), one_step(images, labels, ema=0.05)
    for name, w in before.items():
        np.testing.assert_allclose(mean[name], 0.05 * w + 0.95 * after[name], atol=1e-6)
    # where each picture stands opposite to itself mixup does nothing; else it mixes two losses
    same = np.concatenate([images[:4], images[3::-1]]), np.array([0, 1, 2, 3, 3, 2, 1, 0])
    assert one_step(*same, mixup=0.4)[2] == pytest.approx(one_step(*same)[2], rel=1e-5)
    found = [one_step(images, labels, seed, mixup=0.4)[2] for seed in (1, 1, 2)]
    assert found[0] == found[1] and min(abs(found[0] - other) for other in (found[2], loss)) > 1e-3


@pytest.mark.parametrize("share", [0.15, 0.3])
def test_bert_masking_hides_an_exact_count_of_ordinary_tokens_80_10_10(share):
    new, old = [], []
    for seed in range(8):
        tokens, lengths = padded(512, 64, seed, V=200)
        tokens[np.random.default_rng(seed).random(tokens.shape) < 0.02] = 3
        tokens[:, 0], tokens[np.arange(64) >= lengths[:, None]] = 2, 0
        out = jax.device_get(masker(200, share)(jax.random.key(seed), tokens))
        places, (rows, at) = np.zeros(tokens.shape, bool), np.nonzero(out["weights"])
        places[rows, out["positions"][rows, at]] = True
        assert not np.any(places & (tokens < 5)), "never [CLS], [SEP] or [PAD]"
        n = np.sum(tokens >= 5, axis=1)
        wanted = np.where(n, np.maximum(1, np.floor(share * n + 0.5)), 0)
        np.testing.assert_array_equal(places.sum(1), wanted, "and no position twice")
        np.testing.assert_array_equal(out["targets"], np.take_along_axis(tokens, out["positions"], 1))
        assert np.all(out["tokens"][~places] == tokens[~places]), "nothing else changes"
        new, old = np.append(new, out["tokens"][places]), np.append(old, tokens[places])
    masked, kept, random = np.mean(new == 4), np.mean(new == old), new[(new != 4) & (new != old)]
    assert len(new) > 15_000 and abs(masked - 0.8) < 0.01 and abs(kept - 0.1 - 0.1 / 195) < 0.01
    assert random.min() == 5 and random.max() == 199, "any ordinary token, no special one"


# ---- rows, tokenizers, pictures, and models put to use ----


@pytest.fixture(scope="session")
def tokenizer():
    """BERT's, small."""
    return bert_mlm.load_tokenizer("bpe:300", documents(JSON)[0])


@pytest.mark.parametrize("script", [gpt_train, bert_mlm], ids=["gpt", "bert"])
def test_rows_hold_the_documents_but_for_those_held_out(script, tokenizer):
    texts, epochs, end = documents(JSON)[0], [], gpt_train.END if script is gpt_train else "[SEP]"
    tokenizer = gpt_train.load_tokenizer("byte") if script is gpt_train else tokenizer
    for seed in range(2):
        records, rng = {"text": texts}, np.random.default_rng(seed)
        rows = [row["tokens"] for row in script.pack(tokenizer, {texts[0]}, 33, records, rng)]
        epochs.append({tuple(row) for row in rows})
        if script is bert_mlm:
            assert all(row[0] == 2 and row[-1] == 3 and 0 not in row for row in rows), "no padding"
            rows = [row[1:-1] for row in rows]
        parts = [part for row in rows for part in tokenizer.decode(row).split(end)]
        assert sum(map(len, parts)) > 0.95 * sum(map(len, texts[1:])), "fewer than two rows are given up"
        assert all(any(part in text for text in texts[1:]) for part in parts), "a row is a stretch of a text"
    assert len(epochs[0] & epochs[1]) < 0.1 * len(epochs[0]), "another cut in every epoch"


def test_tokenizers_take_texts_as_they_are_and_ids_may_have_gaps_and_be_large():
    for script in (gpt_train, bert_mlm):
        tokenizer = script.load_tokenizer("bpe:300", ["one two three"] * 10)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer("one", truncation=True, max_length=4, padding="max_length")  # is saved with it
        tokenizer.save_pretrained(script.__name__)
        tokenizer = script.load_tokenizer(script.__name__)
        text = "one two three [MASK] <|endoftext|> [SEP]"  # what looks like a special token is text
        ids = np.concatenate(common.encode(tokenizer, [text] * 2))
        assert tokenizer.decode(ids) == text * 2 and not {*ids} & {*tokenizer.all_special_ids}
        [ids] = common.encode(tokenizer, [text], framed=True, special=True)
        assert ids.tolist() == tokenizer(text)["input_ids"], "in a prompt it is one, as in transformers"
    letters = "".join(random.Random(0).choices("acgt", k=1_000_000))
    assert len(gpt_train.load_tokenizer("bpe:1000", [letters])) == 1000, "in seconds, not in hours"

    vocab = {"def": 0, "return": 5, "self": 300, "?": 70_001, "<end>": 70_000}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="?")
    words.save_pretrained("gaps")
    last = train(tokenizer="gaps", steps=1, n_embd=8, batch_size=8, accum=1, out_dir="a")
    assert last["loss"] == pytest.approx(math.log(70_002), rel=0.01)
    assert gpt_train.from_pretrained("a").config.vocab_size == 70_002
    framed = dict(single="<end> $A", special_tokens=[("<end>", 70_000)])  # as Llama's adds its first token
    words.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**framed)
    [row] = gpt_train.pack(words, (), 3, {"text": ["self"]}, np.random.default_rng(0))
    assert row["tokens"].tolist() == [*words("self")["input_ids"], 70_000] == [70_000, 300, 70_000]
    # a new BERT's rows are framed, and so are texts by the tokenizer that is saved with it
    words.add_special_tokens(dict(mask_token="[M]", cls_token="[C]", sep_token="[S]", pad_token="[P]"))
    bert_mlm.build(bert_mlm.Config(n_layer=1, n_embd=8), words, None)
    assert words("self")["input_ids"] == [words.cls_token_id, 300, words.sep_token_id]


@against_torch
def test_greedy_text_is_that_of_transformers_whatever_the_lengths_and_ends_at_the_end_token(typed):
    tokenizer, model = gpt_train.load_tokenizer("byte"), gpt.model(vocab_size=257, n_positions=64)
    gpt_train.save_pretrained(model, "model", tokenizer)
    theirs = transformers.GPT2LMHeadModel.from_pretrained("model").eval()
    prompts = ["d", "import json\n", "def "]
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    greedy = dict(max_new_tokens=30, do_sample=False, pad_token_id=256, eos_token_id=None)
    wanted = [theirs.generate(as_torch([row]), **greedy)[0].tolist() for row in rows]
    use = dict(steps=0, init_from="model", temperature=0, max_new_tokens=30)
    out, _ = typed(gpt_train, "--prompt", prompts[0], "--prompt", prompts[1], **use)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in wanted[:2]]
    assert out == "\n---\n".join(texts) + "\n"
    tokens, lengths = np.array([row + [0] * (12 - len(row)) for row in rows]), [*map(len, rows)]
    draw = partial(gpt_train.generate, model, tokens, key=jax.random.key(0), lengths=lengths)
    eos = wanted[0][9]
    found, ended = (np.asarray(draw(30, temperature=0, eos=end)) for end in (None, eos))
    for row, stopped, right, n in zip(found, ended, wanted, lengths):
        assert row[: n + 30].tolist() == right and not row[n + 30 :].any()
        end = n + [*right[n:], eos].index(eos)
        assert stopped[:end].tolist() == right[:end] and np.all(stopped[end:] == eos)
    with pytest.raises(ValueError, match=r"12 \+ 53 tokens, and the model has 64 positions"):
        draw(53)
    for weights in (model.ln_f.scale, model.ln_f.bias):
        weights.set_value(jnp.zeros(48))  # all tokens equally likely, whatever the text
    new = [row[n : n + 50] for row, n in zip(np.asarray(draw(50)), lengths)]
    assert len(np.unique(new)) > 100, "150 draws among 257: each has a key of its own"


def test_sampling_follows_the_softmax_within_top_k_and_top_p():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    many, cold = jnp.asarray(np.tile(np.log(p), (40_000, 1))), p**2
    for temperature, top_k, top_p, wanted in (
        (1, None, None, p),
        (1, 2, None, [0.625, 0.375, 0, 0]),
        (1, None, 0.8 + 1e-4, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        (1, None, 0.7, [0.625, 0.375, 0, 0]),
        (1, 3, 0.6, [0.625, 0.375, 0, 0]),
        (0.5, None, None, cold / cold.sum()),
        (0, None, None, [1, 0, 0, 0]),
        (1, None, 1e-6, [1, 0, 0, 0]),
    ):
        drawn = gpt_train.sample(jax.random.key(0), many, temperature, top_k, top_p)
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / len(many), wanted, atol=0.01)


@pytest.fixture(scope="session")
def bert_folder(tokenizer, tmp_path_factory):
    """The folder of a small random BERT with its tokenizer."""
    path = tmp_path_factory.mktemp("bert") / "model"
    bert_mlm.save_pretrained(bert.model(vocab_size=300, max_position_embeddings=64), path, tokenizer)
    return str(path)


MEAN = dict(pooling_mode_mean_tokens=True)
CLS = dict(pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
PROMPT = {"config_sentence_transformers.json": dict(prompts=dict(q="query: "), default_prompt_name="q")}
SHORT = {"sentence_bert_config.json": dict(max_seq_length=8)}
SENTENCES = {  # 1_Pooling, a third layer, other files; (pooling, normalised, length, prompt) or what is said
    "plain folder": (None, None, {}, ("mean", True, 64, "")),
    "not normalised": (CLS, None, {}, ("cls", False, 64, "")),
    "another spelling": (dict(pooling_mode="cls"), "Normalize", {}, ("cls", True, 64, "")),
    "length": (MEAN, "Normalize", SHORT, ("mean", True, 8, "")),
    "prompt": (MEAN, "Normalize", PROMPT, ("mean", True, 64, "query: ")),
    "max": (CLS | dict(pooling_mode_max_tokens=True), None, {}, "pooling is cls+max, only mean or cls"),
    "dense": (MEAN, "Dense", {}, "has Transformer, Pooling, Dense; only"),
}


@against_torch
@pytest.mark.parametrize("case", SENTENCES)
def test_bert_embeddings_are_those_of_pytorch_and_sentence_transformers(case, bert_folder, typed):
    pooling, third, files, wanted = SENTENCES[case]
    shutil.copytree(bert_folder, "model")
    if pooling:  # there the encoder has no head, and BertModel's names
        transformers.AutoModel.from_pretrained(bert_folder).save_pretrained("model")
        layers = {"Transformer": "", "Pooling": "1_Pooling"} | ({third: f"2_{third}"} if third else {})
        modules = [dict(type=f"sentence_transformers.models.{kind}", path=p) for kind, p in layers.items()]
        files = files | {"modules.json": modules, "1_Pooling/config.json": pooling}
    write({f"model/{name}": json.dumps(content) for name, content in files.items()})
    texts = ["import json", "class JSONDecoder(object): pass", "x " * 90, "", "y"]
    write({"texts.txt": "\n".join(texts) + "\n"})
    embed = partial(typed, bert_mlm, steps=0, init_from="model", embed="texts.txt")
    if isinstance(wanted, str):
        assert wanted in embed(code=2)[1]
        return
    embed()
    mode, normalize, length, prompt = wanted
    options = dict(padding=True, return_tensors="pt", return_token_type_ids=False, truncation=True)
    texts, theirs = [prompt + text for text in texts], transformers.AutoTokenizer.from_pretrained("model")
    inputs = theirs(texts, max_length=length, **options)
    hidden = transformers.AutoModel.from_pretrained("model").eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    vectors = hidden[:, 0] if mode == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    vectors = torch.nn.functional.normalize(vectors) if normalize else vectors
    np.testing.assert_allclose(np.load("texts.npy"), vectors.detach(), atol=1e-5)
    assert "texts.npy exists; --overwrite to replace it" in embed(code=2)[1]


@against_torch
def test_bert_fill_mask_gives_the_likeliest_tokens_of_each_mask(bert_folder, typed):
    texts = ["import [MASK] as np", "a [MASK] and"]
    out, _ = typed(bert_mlm, "--prompt", texts[0], "--prompt", texts[1], steps=0, init_from=bert_folder)
    pipeline, wanted = transformers.pipeline("fill-mask", bert_folder), []
    for text in texts:
        wanted.append("\n".join(f"{x['score']:6.1%}  {x['sequence']!r}" for x in pipeline(text, top_k=5)))
    assert out == "\n\n".join(wanted) + "\n"


def png(pixels, kind="png", **options):
    """The bytes of a picture file; `pixels` is an array or an image."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def photograph(width=120, height=90):
    """A smooth picture in which left is red, right is green and the bottom is blue."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([255 - x, x, y], axis=-1).astype(np.uint8)


def write_folder(root, n=12, classes=("dark", "light")):
    """Class folders with `n` pictures each, the first class the darkest."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        pictures = [png(np.uint8(rng.integers(0, 90, (40, 48, 3)) + 150 * i)) for _ in range(n)]
        write({f"{root}/{name}/{j}.png": picture for j, picture in enumerate(pictures)})


LAYOUTS = {  # pictures: their classes, and how many of them each split has
    "cat/in/0.png cat/out/1.png dog/2.jfif": (["cat", "dog"], {"train": 3}),
    "x/train/a/0.png x/train/b/1.png x/val2017/a/2.png": (["a", "b"], {"train": 2, "validation": 1}),
    "train-images/a/0.png train-images/b/1.png Testing/a/2.png": (["a", "b"], {"train": 2, "test": 1}),
    "test_tube/0.png train_station/1.png pen/2.png": (["pen", "test_tube", "train_station"], {"train": 3}),
    "train/0.png val/1.png": None,
    "my_train/0.png my_val/1.png": None,  # a split's name would be a class
}


@pytest.mark.parametrize("files", LAYOUTS)
def test_class_of_a_picture_is_the_folder_below_that_of_its_split(files):
    write({f"d/{file}": png(photograph()) for file in files.split()})
    if LAYOUTS[files] is None:
        with pytest.raises(common.UsageError, match="its pictures are in no class folders"):
            open_train("d", roles=("image", "label"))
        return
    [source] = open_train("d", roles=("image", "label"))
    found = {split: len([*Stream(source, pairs_of, 4, None, split)]) for split in source.splits}
    assert (source.classes, found) == LAYOUTS[files]


def test_resnet_odd_pictures_come_out_right():
    true, flat = Image.fromarray(photograph()), Image.new("RGB", (40, 30), (200, 30, 60))
    clear, white = flat.convert("RGBA"), np.asarray(flat).copy()
    clear.putalpha(Image.fromarray(np.uint8(np.repeat([[255, 0]], 30, 0).repeat(20, 1))))
    white[:, 20:] = 255
    grey = np.asarray(true.convert("L"))
    greys, deep = np.repeat(grey[..., None], 3, -1), Image.fromarray(grey.astype(np.uint16) * 257)
    turned, exif, told = true.transpose(Image.Transpose.ROTATE_90), Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 6  # to be seen turned by 90 degrees clockwise
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
        off = np.asarray(resnet_stream.open_image(data)).astype(int) - np.asarray(wanted)
        assert np.abs(off).max() <= most, name


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
    assert min(left.min(), top.min(), 640 - right.max(), 480 - bottom.max()) >= 0
    share, shape = (right - left) * (bottom - top) / (640 * 480), (right - left) / (bottom - top)
    assert share.min() > 0.25 and share.max() < 1 and 0.5 < share.mean() < 0.65
    assert shape.min() >= 0.75 - 1e-6 and shape.max() <= 4 / 3 + 1e-6


BIT = dict(image_processor_type="BitImageProcessor", size={"shortest_edge": 64}, crop_size=56)
CONVNEXT = dict(feature_extractor_type="ConvNextFeatureExtractor", size=96, crop_pct=0.875, resample=3)
VIT = dict(image_processor_type="ViTImageProcessor", size={"height": 64, "width": 64})
PROCESSORS = {  # preprocessor_config.json, and why it is refused
    "of microsoft/resnet-50": (CONVNEXT, None),
    "squashes": (VIT, None),
    "does not normalise": (BIT | dict(do_normalize=False), None),
    "none": (None, None),  # transformers' default for a ResNet
    "does not crop": (BIT | dict(do_center_crop=False), "pictures come out as"),
    "normalises twice": (dict(image_processor_type="EfficientNetImageProcessor"), ".* does more than resize"),
    "flips channels": (BIT | dict(do_flip_channel_order=True), "do_flip_channel_order: not supported"),
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
    load = partial(transformers.AutoImageProcessor.from_pretrained, "model", backend="pil")
    processor = load() if settings else transformers.ConvNextImageProcessorPil()
    for size in ((200, 150), (150, 200), (57, 80)):
        data = png(photograph(*size))
        theirs = processor(Image.open(io.BytesIO(data)), return_tensors="np")["pixel_values"][0]
        ours = view.normalise(view.pixels(resnet_stream.open_image(data)))
        np.testing.assert_allclose(ours, theirs.transpose(1, 2, 0), atol=1e-5)
    larger = resnet_stream.from_pretrained("model", size=2 * view.size).view
    assert larger.size == 2 * view.size and np.all(larger.slope == view.slope)


def test_resnet_pictures_held_out_are_never_trained_on_all_others_are_and_corrupt_ones_are_counted(capfd):
    write_folder("a", 40)
    good = Path("a/dark/0.png").read_bytes()
    bad = {"cut": good[:-900], "short": b"\x89", "text": b"no picture", "bits": good[:60] + b"?" * 900}
    bad["bomb"] = good[:16] + b"\x00\x01\xff\xff" * 2 + good[24:]  # says it has 10 billion pixels
    write({f"a/light/{name}.png": data for name, data in bad.items()})
    for i in range(40):  # every dark picture recurs, with another label
        shutil.copy(f"a/dark/{i}.png", f"a/light/again{i}.png")
    cfg = resnet_stream.Config(data=("a",), val_every=4, crop_pad=0)
    (source,), val, _ = resnet_stream.open_sources(cfg)
    held = [*resnet_stream.validation_rows(val, tiny_view(8, 1.0), 0)]
    crop = partial(resnet_stream.training_crop, cfg, 8)
    decode = partial(resnet_stream.decode, crop, val[0][1], False, cfg.retries)
    streams = [Stream(source, resnet_stream.make_rows, cfg.shuffle_buffer, cfg.seed)]
    batches = common.batches(streams, 120 - len(held), seed=0, decode=decode)
    key = lambda image: np.asarray(image).tobytes()
    capfd.readouterr()
    (one, _), (other, position) = islice(batches, 2)  # two epochs
    epochs = [[key(image) for image in batch["image"]] for batch in (one, other)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1], "another order"
    held = {key(row["image"]) for row in held}
    assert 12 < len(held) < 60 and len({*epochs[0]} | held) == 80 and not {*epochs[0]} & held
    wrong = sum(zlib.crc32(data) % 4 != 0 for data in bad.values())
    assert wrong <= position["bad_records"] <= 2 * wrong
    said = capfd.readouterr().err
    assert said.count("skipped a record of batch") == position["bad_records"] and "a/light/cut.png: " in said


def test_resnet_labels_are_names(capsys):
    """A model that calls every picture "dark" is right for those, in whatever order and number they stand."""
    model = resnet.model(classes=("light", "dark"), size=8)
    model.classifier.bias.set_value(jnp.array([0.0, 100.0]))
    resnet_stream.save_pretrained(model, "model")
    write_folder("photos/train", 4)
    write_folder("photos/val", 6, ["dark"])
    write_folder("photos/val", 2, ["light"])
    use = partial(train, resnet_stream, data=("photos",), init_from="model", batch_size=3)
    assert use(steps=0)["val_top1"] == 0.75 and use(steps=0, eval_batches=1)["val_top1"] != 0.75
    write({"a.png": png(photograph())})
    capsys.readouterr()
    use(steps=0, predict=("a.png",))
    assert capsys.readouterr().out.splitlines() == ["a.png", " 100.00%  dark", "   0.00%  light"]
    assert use(steps=1, lr=0.0, out_dir="same")["val_top1"] == 0.75 and "head" not in capsys.readouterr().out
    assert resnet_stream.from_pretrained("same").config.id2label == {0: "dark", 1: "light"}
    # other names of the same number: a new head, and in evaluation an error
    write_folder("others", 6, ("cat", "dog"))
    use = partial(use, data=("others",), val_every=2)
    with pytest.raises(common.UsageError, match=r"2 \(light, dark\); those of the data are 2 \(cat"):
        use(steps=0)
    use(steps=1, lr=0.0, out_dir="other")
    new = resnet_stream.from_pretrained("other")
    assert "head       new" in capsys.readouterr().out and new.config.id2label == {0: "cat", 1: "dog"}
    np.testing.assert_allclose(new.classifier.bias[...], 0, atol=1e-6)
    # numbers are as they stand, and so are ImageNet's 1,000, two of which models know by one name
    match = lambda theirs, classes: common.match_classes(theirs, classes)[:2]
    assert match(["LABEL_0", "LABEL_1"], ["b", "a"]) == ([0, 1], ["b", "a"])
    assert match(["x", "y"], ["0", "1"]) == ([0, 1], ["x", "y"])
    assert match(["x", "y"], ["1", "2"])[0] is None and match(["1", "0"], ["0", "1"])[0] == [1, 0]
    names, few = [f"class {i}" for i in range(1000)], ["a", "b", "c"]
    twice = [*names[:999], names[0]]
    assert match(twice, names)[0] == match(twice, twice)[0] == [*range(1000)]
    assert match(names[:10], [*names[:9], "x"])[0] is None and match(["a", "b"], few) == (None, few)


# ---- runs ----


def gpt_in_pytorch(folder, last):
    """The figures of a run on the document held out are those of PyTorch's model in its folder."""
    [text, *_], tokenizer = documents(JSON)[0], transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, end, nats = tokenizer(text)["input_ids"], tokenizer.eos_token_id, 0.0
    for i in range(0, len(ids) + 1, 32):  # rows of 32 in which every token is a target once
        inputs, targets = torch.tensor([end, *ids][i : i + 32]), torch.tensor([*ids, end][i : i + 32])
        nats -= theirs(inputs[None]).logits[0].log_softmax(-1)[range(len(targets)), targets].sum().item()
    assert last["val_loss"] == pytest.approx(nats / (len(ids) + 1), rel=1e-4)
    assert last["val_bpb"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)
    assert tokenizer.model_max_length == 32 == len(tokenizer(text, truncation=True)["input_ids"])


def bert_in_pytorch(folder, last):
    [text, *_], tokenizer = documents(JSON)[0], transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    cfg, roles = bert_mlm.Config(**BERT), {"text": None}
    _, _, rows, _ = bert_mlm.prepare(cfg, open_train(JSON), roles, str(folder))
    assert last["val_loss"] == pytest.approx(bert.torch_loss(theirs, rows).item(), rel=1e-4)
    np.put_along_axis(shown := rows["tokens"].copy(), rows["positions"], rows["targets"], axis=1)
    found = np.concatenate([row[1 : n - 1] for row, n in zip(shown, rows["lengths"])])
    assert found.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"], "every token once"
    ids = tokenizer("import [MASK] as np")["input_ids"]
    assert tokenizer.decode(ids) == "[CLS]import[MASK] as np[SEP]" and tokenizer.model_max_length == 32


def resnet_in_pytorch(folder, last):
    auto = transformers.AutoModelForImageClassification
    theirs = auto.from_pretrained(folder, trust_remote_code=True).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    [source] = open_train("digits", roles=("image", "label"))
    rows, others = ([*Stream(source, resnet_stream.make_rows, 64, None, split)] for split in source.splits)
    files, others = ([row["image"]["bytes"] for row in part] for part in (rows, others))
    assert len(files) == 359 and not {*files} & {*others}
    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    labels = torch.tensor([row["label"] for row in rows])
    with torch.no_grad():
        logits = theirs(processor(images, return_tensors="pt")["pixel_values"]).logits
    best, loss = logits.topk(5).indices == labels[:, None], torch.nn.functional.cross_entropy(logits, labels)
    wanted = [float(x) for x in (loss, best[:, 0].float().mean(), best.any(1).float().mean())]
    assert [last[f"val_{name}"] for name in ("loss", "top1", "top5")] == pytest.approx(wanted, rel=1e-4)


IN_PYTORCH = {gpt_train: gpt_in_pytorch, bert_mlm: bert_in_pytorch, resnet_stream: resnet_in_pytorch}
FILES = {"ckpt", "config.json", "curves.png", "metrics.jsonl", "model.safetensors", "run.json"}


@scripts
def test_run_leaves_metrics_curves_checkpoints_and_a_model_folder(script, monkeypatch, capsys):
    logged, wandb = [], SimpleNamespace(__spec__="stub", finish=lambda: logged.append("end"))
    wandb.init, wandb.log = lambda **how: logged.append(how) or wandb, lambda line, step: logged.append(line)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    is_text = script is not resnet_stream
    more = dict(tokenizer="bpe:300") if is_text else dict(ema=0.5, mixup=0.2, dropout=0.1)
    more |= dict(sample_every=16, profile="trace") if script is gpt_train else {}
    last = train(script, **more, steps=16, eval_every=8, ckpt_every=3, wandb="mine")
    said, [folder], unit = capsys.readouterr().out, Path("out").iterdir(), "tokens" if is_text else "images"
    assert {p.name for p in folder.iterdir()} >= FILES | {"tokenizer.json" if is_text else "predictions.png"}
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == [*range(1, 17)] and found[-1] == last
    assert [line["step"] for line in found if "val_loss" in line] == [8, 16]
    assert last["val_loss"] < found[7]["val_loss"] and 0 <= last["data_wait"] < 1 and last["mfu"] is None
    assert last[unit] == 16 * (128 * 32 if is_text else 32)
    assert sorted(path.name for path in (folder / "ckpt").iterdir()) == ["15", "16"]
    info = json.loads((folder / "run.json").read_text())
    assert info["config"]["steps"] == 16 and info["jax"] == jax.__version__
    start, *rest, end = logged
    assert rest == found and end == "end" and start["project"] == "mine"
    assert re.fullmatch(folder.name + "-[0-9a-f]{8}", start["id"]), "directories' names recur"
    if script is gpt_train:
        assert "a profile of steps 10 to 15 is in trace" in said and [*Path("trace").rglob("*.xplane.pb")]
    figures = rf"[\d,]+ {unit}/s, \d+ ms a step, data wait [\d.]+%, peak memory [\d.]+ GB, \d+ s in all"
    assert any(re.fullmatch(figures, line) for line in said.splitlines())

    again = dict(tokenizer=None) if is_text else {}
    again |= dict(init_from=str(folder), batch_size=48, accum=1, steps=0)
    evaluated = train(script, **again)
    assert evaluated == pytest.approx({name: last[name] for name in evaluated}, rel=1e-5)
    assert [*Path("out").iterdir()] == [folder], "evaluating makes no run"
    tuned = train(script, **again | dict(steps=2, lr=1e-4, out_dir="tuned"))
    assert tuned["val_loss"] < found[7]["val_loss"], "it starts where the other ended"
    if torch:
        IN_PYTORCH[script](folder, last)


def test_gpt_killed_stopped_before_its_cooldown_and_extended_equals_the_long_run():
    env = dict(JAX_DISABLE_MOST_OPTIMIZATIONS="0")  # as its user has it
    args = GPT | dict(cooldown=0.2, ckpt_every=10, eval_every=30, warmup_steps=10)  # over 15 epochs
    finish(launch(gpt_train, *flags(**args | dict(steps=120, out_dir="long")), **env))
    kill_after(25, gpt_train, "out/gpt-001", *flags(**args | dict(steps=100)), **env)
    kill_after(55, gpt_train, "out/gpt-001", "--resume", **env)  # then the checkpoint of step 40 is whole
    process = launch(gpt_train, "--resume", **env)  # the newest run is found
    next(filter(re.compile(r"step \d+:").match, process.stdout))  # it trains
    process.send_signal(signal.SIGTERM)
    [(out, _)] = finish(process, code=143)
    [step] = re.findall(r"saved at step (\d+); go on with --resume --out-dir out/gpt-001\n", out)
    saved = ocp.args.Composite(state=ocp.args.StandardRestore())
    assert 40 < int(step) < 80, "before the cooldown"
    checkpoints = ocp.CheckpointManager(Path("out/gpt-001/ckpt").absolute())
    model, _ = checkpoints.restore(int(step), args=saved).state.values()
    exported = gpt_train.from_pretrained("out/gpt-001").wpe.embedding
    assert np.array_equal(exported, model["wpe"]["embedding"]["value"]), "it can be put to use"
    finish(launch(gpt_train, "--resume", "--steps", "120", **env))
    found, wanted = lines("out/gpt-001"), lines("long")
    assert found == wanted and len(wanted) == 120 and wanted[95]["lr"] > wanted[97]["lr"]
    assert Path("out/gpt-001/model.safetensors").read_bytes() == Path("long/model.safetensors").read_bytes()


def test_run_that_cannot_go_on_keeps_its_last_good_checkpoint():
    bad = dict(lr=1e18, warmup_steps=0, grad_clip=0.0, ckpt_every=1, keep=20)
    with pytest.raises(common.RunError, match=r"step \d+: .*loss (nan|inf).*the last good checkpoint is \d"):
        train(**bad, out_dir="diverged")
    for step in map(int, os.listdir("diverged/ckpt")):
        assert math.isfinite(lines("diverged")[step - 1]["loss"])
    limited = "import resource, runpy; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)); "
    limited += f"runpy.run_path({gpt_train.__file__!r}, run_name='__main__')"
    big = dict(data="synthetic", tokenizer="byte", seq_len=1024, batch_size=512, accum=1, steps=3, n_layer=1)
    [(_, err)] = finish(launch(limited, *flags(**big)), code=1)
    assert "Traceback" not in err and "out of memory on the device; try a smaller" in err, err


def test_run_directory_is_never_taken_over_and_a_resume_changes_no_meaning(typed):
    texts = {"text.txt": "one two three " * 3000, "val.txt": "one two three " * 10}
    write(texts)
    args = flags(**GPT | dict(data=("text.txt",), val_data=("val.txt",), steps=3, out_dir="a"))
    typed(gpt_train, *args)
    before, resume = lines("a"), ("--resume", "--out-dir", "a")

    def refused(message, *args, script=gpt_train):
        _, err = typed(script, *args, code=2)
        assert message in err and lines("a") == before, err

    refused("holds a run already; --resume to go on with it, --overwrite to start again", *args)
    refused("--init-from", *args, "--overwrite", "--init-from", "a")
    refused("a is no run of bert_mlm.py", *resume, script=bert_mlm)
    refused("--steps 2: a is at step 3 already", *resume, "--steps", "2")
    for changed in ("--seq-len 16", "--seed 7", "--shuffle-buffer 7", "--data text.txt val.txt"):
        refused("the run in a was started with", *resume, *changed.split())
    write({"text.txt": "one two three four " * 3000})
    refused("--resume: other files of 0 text.txt (", *resume, "--steps", "5")
    write(texts)
    typed(gpt_train, *resume, steps=5, grad_clip=0, ckpt_every=1, eval_every=5)
    assert [line["step"] for line in lines("a")] == [1, 2, 3, 4, 5] and lines("a")[:2] == before[:2]
    before = lines("a")
    shutil.rmtree("a/ckpt")
    refused("a was trained, and its checkpoints are gone", *resume)
    typed(gpt_train, *args, "--overwrite")
    assert lines("a")[:2] == before[:2]


def write_reviews(names):
    """reviews.parquet: the class of a text is its first word, the labels stand in the order of `names`."""
    order, rng = [name.removeprefix("very ") for name in names or ["bad", "fine", "good"]], random.Random(0)
    words = [rng.choice(["bad", "fine", "good"]) for _ in range(400)]
    more = [" ".join(rng.choices(["so", "it", "was"], k=rng.randrange(1, 9))) for _ in words]
    texts = [f"{word} {rest} {i}" for i, (word, rest) in enumerate(zip(words, more))]
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features(text=datasets.Value("string"), label=label)
    rows = dict(text=texts, label=[order.index(word) for word in words])
    datasets.Dataset.from_dict(rows, features=features).to_parquet("reviews.parquet")


@against_torch
def test_bert_classifier_learns_and_matches_its_classes_by_name():
    args = dict(task="classify", data=("reviews.parquet",), val_docs=60, batch_size=16, steps=90)
    args |= dict(eval_every=30, ckpt_every=20, lr=1e-2, n_layer=2, dropout=0.0, accum=1)
    write_reviews(["bad", "fine", "good"])
    last = train(bert_mlm, **args, out_dir="whole")
    assert last["val_acc"] > 0.95
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained("whole").eval()
    texts = ["good it was", "fine", "bad so it was so"]
    inputs = transformers.AutoTokenizer.from_pretrained("whole")(texts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    model, wanted = bert_mlm.from_pretrained("whole"), theirs(**inputs).logits.detach()
    tokens, lengths = inputs["input_ids"].numpy().astype(np.int32), inputs["attention_mask"].sum(1).numpy()
    found = nnx.jit(lambda model, *x: model.class_logits(model(*x)))(model, tokens, lengths)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert [theirs.config.id2label[int(i)] for i in wanted.argmax(1)] == ["good", "fine", "bad"]
    evaluated = args | dict(steps=0, init_from="whole", tokenizer=None)
    tuned = evaluated | dict(steps=2, lr=1e-6, overwrite=True, out_dir="tuned")
    others = ["very bad", "very fine", "very good"]
    for names, known in ((["good", "bad", "fine"], True), (None, True), (others, False)):
        write_reviews(names)
        if known:
            assert train(bert_mlm, **evaluated)["val_acc"] == last["val_acc"]
        else:
            with pytest.raises(
                common.UsageError, match=r"are 3 \(bad, fine, good\); those of the data are 3 \(very bad"
            ):
                train(bert_mlm, **evaluated)
        assert (train(bert_mlm, **tuned)["val_acc"] > 0.95) == known, "other names are a new head"
        exported = json.loads(Path("tuned/config.json").read_text())["id2label"].values()
        assert [*exported] == (names or ["bad", "fine", "good"])


# ---- the hub, kill -9, many devices, many processes ----

FINEWEB = GPT | dict(data=("HuggingFaceFW/fineweb-edu",), data_name=("sample-10BT",), tokenizer="gpt2")
FINEWEB |= dict(val_docs=3, shuffle_buffer=8, batch_size=64, steps=8)
EVERYTHING = dict(data=("pictures",), val_every=4, ema=0.9, mixup=0.2, dropout=0.1, flip=True)
KILLED = {bert_mlm: BERT, resnet_stream: RESNET | EVERYTHING}  # and gpt_train above


def test_hub_weights_by_their_id_and_what_is_not_there_or_offline_is_one_line(hub):
    args = flags(init_from="gpt2", steps=0, prompt="import", temperature=0, max_new_tokens=8)
    offline = hub.env | dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME="empty")
    missing = launch(gpt_train, "--data", "some/where", **hub.env)
    unreached = launch(gpt_train, "--init-from", "some/where", **offline)
    [(out, _)] = finish(launch(gpt_train, *args, **hub.env))
    assert out.startswith("import")
    for _, err in finish(missing, unreached, code=2):
        assert " some/where: " in err and len(err.splitlines()) == 1, err


def test_corrupt_line_and_a_number_among_texts_are_bad_records_on_the_hub_too(hub):
    shutil.rmtree(folder := hub.root / "HuggingFaceFW/fineweb-edu")
    write({folder / "a.jsonl": jsonl(["a", 5, "b", "c"]) + '{"text": '})
    program = "import test_all; print(test_all.documents('HuggingFaceFW/fineweb-edu'))"
    [(out, err)] = finish(launch(program, **hub.env))
    assert out == "(['a', 'b', 'c'], 2)\n" and "record 1 of epoch 0: text is 5" in err


def test_glob_on_the_hub_is_read_at_one_commit(hub):
    then, asked = "e" * 40, []
    hub.fault = asked.append
    program = """import common
for commit in None, {!r}:
    name = "hf://datasets/HuggingFaceFW/fineweb-edu/sample/*/*.parquet"
    source = common.open_source(name, None, commit, {{"text": None}}, 0)
    print(source.unchanged["commit"], len([*source.splits["train"]]))"""
    [(out, _)] = finish(launch(program.format(then), **hub.env))
    n = sum(pq.read_metadata(file).num_rows for file in (hub.root / "HuggingFaceFW").glob("*/sample/*/*"))
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
    hub.break_requests(9, lambda n: dice.choice(kinds[:-1]) if dice.random() < 0.25 else None)
    kill_after(4, gpt_train, "killed", *flags(**FINEWEB), **hub.env)
    monkeypatch.setattr(Hub, "sha", "f" * 40)  # a new commit meanwhile: the run goes on with the old one
    finish(launch(gpt_train, "--resume", "--out-dir", "killed", **hub.env))
    assert hub.faults >= 7 + 5 and lines("killed") == lines("whole")


def test_source_that_stays_away_is_given_up_with_a_checkpoint_and_ctrl_c_ends_the_wait(hub, typed):
    shutil.copytree(hub.root / "HuggingFaceFW/fineweb-edu/sample/10BT", hub.root / "files")
    long = GPT | dict(data=(f"{hub.url}/files/000.parquet",), steps=4000, eval_every=4000, ckpt_every=4000)
    long |= dict(batch_size=64, shuffle_buffer=4)
    hub.break_requests(20, lambda n: "reset")
    _, err = typed(gpt_train, **long, out_dir="a", retries=1, code=1)
    assert "the data failed 2 times in a row: " in err.splitlines()[-1]
    hub.break_requests(20, lambda n: "reset")
    process = launch(gpt_train, *flags(**long, out_dir="b"))
    wait_for_step(process, "b", lines("a")[-1]["step"] - 5)
    time.sleep(3)  # the rows at hand are used up
    process.send_signal(signal.SIGINT)
    [(out, err)] = finish(process, code=130, timeout=60)
    assert "Traceback" not in err and "Exception ignored" not in err, err
    for out_dir in ("a", "b"):
        [saved] = map(int, os.listdir(f"{out_dir}/ckpt"))
        assert saved == lines(out_dir)[-1]["step"] > 1, "all that was trained on good data is kept"
    assert f"saved at step {saved}" in out
    _, err = typed(gpt_train, init_from="a", steps=0, code=2)
    assert "--init-from a: a run that has not ended; --resume it (--steps N" in err
    hub.break_requests(0, lambda n: None)
    pq.write_table(pq.read_table(file := hub.root / "files/000.parquet")[:-1], file)
    assert "--resume: other files of 0 http" in typed(gpt_train, "--resume", out_dir="a", code=2)[1]


@pytest.mark.parametrize("script", KILLED, ids=lambda script: script.__name__)
def test_kill_9_at_any_moment_and_over_epoch_ends_changes_no_bit(script, typed):
    write_folder("pictures", 60)
    write({"pictures/light/broken.png": b"no picture"})
    args = KILLED[script]
    typed(script, **args, out_dir="whole")
    kill_after(args["steps"] // 3, script, "killed", *flags(**args))
    typed(script, "--resume", out_dir="killed")
    assert lines("killed") == lines("whole") and len(lines("whole")) == args["steps"]
    assert Path("killed/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    if script is resnet_stream:
        assert lines("whole")[-1]["bad_records"] >= 2, "two epochs"


def launch_two(*args, **changes):
    """gpt_train.py in two processes with a device each, which train together."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        who = dict(coordinator=f"127.0.0.1:{probe.getsockname()[1]}", num_processes=2)
    return [launch(gpt_train, *args, *flags(**changes, **who, process_id=i), XLA_FLAGS="") for i in (0, 1)]


def assert_same_losses(a, b, rtol):
    for x, y in zip(lines(a), lines(b), strict=True):
        assert x == pytest.approx(y, rel=rtol)


EIGHT = """
import jax, common, {script} as script
shard = common.shard_state
def measured(*args):
    state = shard(*args)
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    print("share", sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)) / whole)
    return state
common.shard_state = measured
for name in {names}:
    script.main(script.Config(**{cfg} | dict(fsdp=name == "cut", out_dir=name)))
"""


@scripts
def test_eight_devices_give_the_losses_of_one_with_and_without_fsdp(script):
    cfg = SMALL[script] | dict(steps=3, eval_every=3, ckpt_every=3, dropout=0.0)
    names = ["cut", "copied"] if script is gpt_train else ["cut"]
    program = EIGHT.format(script=script.__name__, cfg=cfg, names=names)
    eight = "--xla_force_host_platform_device_count=8"
    process = launch(program, XLA_FLAGS=eight, JAX_LOG_COMPILES="1")
    script.main(script.Config(**cfg | dict(accum=1, out_dir="one")))  # nor does cutting a step change them
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


def test_two_processes_train_together_and_a_kill_or_a_signal_to_one_changes_nothing(typed, monkeypatch):
    streamed = GPT | dict(data=("stdlib",), shuffle_buffer=8, batch_size=64, dropout=0.0, fsdp=True)
    streamed |= dict(lr=1e-3, min_lr=1e-3, warmup_steps=0, eval_every=12)
    (out, _), (other, _) = finish(*launch_two(**streamed, out_dir="whole"))
    assert "2 x cpu" in out and "step" not in other, "only the first one prints"
    assert len(lines("whole")) == 12
    processes = launch_two(**streamed | dict(steps=4000), out_dir="killed")
    wait_for_step(processes[0], "killed", 4)
    processes[1].kill()
    (_, err), _ = (process.communicate(timeout=60) for process in processes)
    assert processes[0].returncode and ("again with --resume" in err or "another task died" in err), err
    processes = launch_two("--resume", out_dir="killed")
    wait_for_step(processes[0], "killed", 12)
    processes[1].send_signal(signal.SIGTERM)
    (out, _), _ = finish(*processes, code=143, timeout=60)
    saved = max(map(int, os.listdir("killed/ckpt")))
    assert f"saved at step {saved}" in out and lines("killed")[-1]["step"] == saved, "both at the same step"
    assert lines("killed")[:12] == lines("whole")
    _, err = typed(gpt_train, "--resume", out_dir="killed", steps=saved + 1, code=2)
    assert "--resume: other processes of 0 stdlib (1, before 2)" in err
    # one process that trains on the rows of both has the same losses
    cfg, tokenizer, rows = gpt_train.Config(**streamed), gpt_train.load_tokenizer("byte"), []
    [source] = open_train("stdlib")
    held_out, _ = common.hold_out_texts(cfg, [source])
    for rank in (0, 1):
        as_process(monkeypatch, rank, 2)
        stream = Stream(source, partial(gpt_train.pack, tokenizer, {*held_out}, 33), 8, 0)
        rows.append([b["tokens"] for b, _ in islice(common.batches([stream], 64, seed=0), 4)])
    state, step, _ = make_step(gpt_train, gpt_train.build(cfg, tokenizer), **streamed)
    for line, *parts in zip(lines("whole"), *rows):
        state, metrics = step(state, np.concatenate(parts), jax.random.key(0))
        assert float(metrics["loss"]) == pytest.approx(line["loss"], rel=1e-4)


# ---- the command line ----

PRESETS = [(script, preset) for script in SMALL for preset in script.PRESETS]
TRAINED = ("gpt2-large", "bert-large", "classify", "imagenet")  # others are these but for sizes, or defaults


@pytest.mark.parametrize("script, preset", PRESETS, ids=lambda value: getattr(value, "__name__", value))
def test_every_preset_has_help_and_trains(script, preset, typed):
    text, _ = typed(script, "--preset", preset, "--help")
    assert f"(default: {script.Config(**script.PRESETS[preset]).batch_size})" in text
    assert re.findall(r"(\w+) options ", text) == ["preset", "data", "model", "training", "use", "run"]
    assert all(f" {why}" in text for why in re.findall(r": .*  # (.{20})", inspect.getsource(script.Config)))
    if preset not in TRAINED:
        return
    small = dict(preset=preset, data=("synthetic",), data_name=("-",), steps=2, batch_size=8, accum=2)
    if script is resnet_stream:
        small |= dict(width=8, depth=18, image_size=32, dtype="float32", eval_batches=1)
    else:
        small |= dict(tokenizer="bpe:300", val_docs=4, seq_len=32, n_layer=1, n_head=2, n_embd=32)
    typed(script, **small, out_dir="a")
    assert lines("a")[-1]["step"] == 2 and "val_loss" in lines("a")[-1]


SOON = f"--data {JSON} --val-docs 1 --tokenizer byte"  # other data take longer
BAD = {}  # script: {arguments after --steps 1: what is said}
BAD[gpt_train] = {
    "--preset gpt3": "gpt3",
    "--step 3": "--steps",
    "--n-embd 100 --n-head 3": "--n-embd 100: must be divisible by --n-head 3",
    "--data no/such.txt": "--data no/such.txt: no such file",
    "--data a.doc": "--data a.doc: no data in it; expected .parquet",
    "--data rows.jsonl": "cannot tell the text column, one of id, title, body; name one",
    "--init-from ''": "--init-from : is empty",
    "--lr nan": "--lr nan: must be finite and not negative",
    "--data-weights 1 2": "--data-weights (1.0, 2.0): expected one for each --data",
    "--data rows.jsonl --data-name nonsense": "rows.jsonl: has no configuration nonsense",
    "--data broken.parquet": "--data broken.parquet: ",
    "--data http://127.0.0.1:9/a.parquet": "--data http://127.0.0.1:9/a.parquet: ",
    "--data saved": "--data saved: was written by save_to_disk; write it with to_parquet",
    "--data mixed": "--data mixed: holds json, parquet; name one kind",
    "--data others": "b.parquet'] has other columns, or classes, than",
    "--data open.csv": "open.csv: unexpected end of data",
    "--data twice.csv": "twice.csv: has two columns ['text']",
    "--data semi.csv": "semi.csv: is not separated by ,",
    "--data tabs.csv": "tabs.csv: is not separated by ,",
    "--data classes": "classes/b.parquet'] has other columns, or classes, than",
    "--data utf16.csv": "utf16.csv: is UTF-16, expected UTF-8",
    "--data utf16.txt": "utf16.txt: is UTF-16, expected UTF-8",
    f"--data {JSON} --val-docs 9": "--val-docs 9: there are 5; ask for fewer, or give --val-data",
    f"--data {JSON} --val-docs 5": "leaves none to train on",
    "--init-from ./nowhere": "--init-from ./nowhere: no such folder, nor on the hub: Repo id must",
    "--init-from mixed --tokenizer byte": "--init-from mixed: no config.json in it",
    "--init-from gpt --seq-len 32": "no fast tokenizer in it (tokenizer.json)",
    f"{SOON} --init-from gpt": "ids up to 256, and gpt knows 199",
    "--init-from broken --tokenizer byte": "--init-from broken: ",
    f"{SOON} --batch-size 10 --accum 4": "--batch-size 10: must be a multiple of 4 (--accum 4 x 1 devices)",
    f"{SOON} --seq-len 8 --prompt 'a long one'": "--prompt: 10 tokens",
    "--steps 0": "--steps 0: trains nothing; name a finished model with --init-from",
    "--resume": "--resume: out holds no run",
    f"{SOON} --out-dir gpt": "--out-dir gpt: not empty and not a run",
    "--coordinator host --num-processes 2 --process-id 0": "needs HOST:PORT",
}
BAD[bert_mlm] = {
    "--tokenizer bytes": "--tokenizer bytes: has no mask_token; BERT needs one",
    "--init-from bare": "--tokenizer bare: no fast tokenizer in it",
    "--tokenizer left": "--tokenizer left: truncates or pads at the left",
    f"{SOON[:-4]}frameless --init-from bert": "--tokenizer frameless: does not make [CLS] text [SEP]",
    "--steps 0 --init-from bert --embed utf16.txt": "utf16.txt: is UTF-16, expected UTF-8",
    "--steps 0 --init-from bert --prompt 'import x'": "--prompt 'import x': holds no [MASK]",
    "--steps 0 --init-from bert --mteb STS12": "needs `pip install mteb`",
    "--task classify --data text.jsonl": "no label in column text, one of text",
    "--task classify --data one.csv --val-docs 5": "all are of class 1",
    "--task classify --data many.csv --val-docs 5": "--label-column: a label is 3000000000",
}
BAD[resnet_stream] = {
    "--stem imagenet": "--image-size 16: too small, at least 32",
    "--data rows.jsonl": "cannot tell the image column, one of id, title",
    "--data flat": "its pictures are in no class folders; expected CLASS/",
    "--data ab ac": "have other classes: 2 (a, b); 2 (a, c)",
    "--data ab --val-every 9999999": "--val-every 9999999: ",
    "--steps 0 --init-from resnet --predict no.jpg": "no.jpg: not a picture: [Errno 2] No such file",
    "--init-from gpt": "--init-from gpt: a gpt2 model, expected resnet",
}


@pytest.fixture(scope="session")
def bad_inputs(tmp_path_factory, bert_folder):
    """A folder with all that they name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root := tmp_path_factory.mktemp("bad"))
        write({"a.doc": "x", "broken.parquet": "x" * 99, "broken/model.safetensors": "x" * 99})
        write({"mixed/a.jsonl": jsonl("a"), "mixed/b.parquet": parquet_of(["b"])})
        write({"rows.jsonl": '{"id": 1, "title": "a", "body": "b"}\n' * 30, "flat/a.png": png(photograph())})
        write({"utf16.csv": "text\na\n".encode("utf-16"), "utf16.txt": "text".encode("utf-16-le")})
        write({"text.jsonl": '{"text": "a b"}\n' * 30})
        write({"open.csv": 'text\n"a\nb\n', "twice.csv": "text,text\na,b\n", "semi.csv": "text;b\na;b\n"})
        write({"tabs.csv": "text\tb\na\tb\n"})
        write({"others/a.parquet": parquet_of(["a"])})
        pq.write_table(pa.table({"body": ["b"]}), "others/b.parquet")
        for names in ("ab", "ba"):
            features = dict(text=datasets.Value("string"), label=datasets.ClassLabel(names=[*names]))
            rows = datasets.Dataset.from_dict(dict(text=["a"], label=[0]), datasets.Features(features))
            rows.to_parquet(f"classes/{names[0]}.parquet")
        write({"one.csv": "text,label\n" + "".join(f"a {i},1\n" for i in range(9))})
        write({"many.csv": "text,label\n" + "".join(f"a {i},{i % 2 * 3 * 10**9}\n" for i in range(9))})
        write_folder("ab", 4, "ab")
        write_folder("ac", 4, "ac")
        datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk("saved")
        (byte := gpt_train.load_tokenizer("byte")).save_pretrained("bytes")
        byte.add_special_tokens(dict.fromkeys(("mask_token", "cls_token", "sep_token", "pad_token"), "[X]"))
        byte.save_pretrained("frameless")
        bert_mlm.load_tokenizer("bpe:300").save_pretrained("left")
        settings = json.loads(Path("left/tokenizer_config.json").read_text()) | {"truncation_side": "left"}
        write({"left/tokenizer_config.json": json.dumps(settings)})
        gpt_train.save_pretrained(gpt.model(), "gpt")
        shutil.copy("gpt/config.json", "broken")
        shutil.copytree(bert_folder, "bert")
        bert_mlm.save_pretrained(bert.model(head=None), "bare")
        resnet_stream.save_pretrained(resnet.model(classes="abc"), "resnet")
    return root


@pytest.mark.parametrize("script, case", [(script, case) for script in BAD for case in BAD[script]])
def test_bad_input_is_one_line_and_exit_code_2(script, case, bad_inputs, typed, monkeypatch):
    monkeypatch.chdir(bad_inputs)
    before = sorted(Path(".").rglob("*"))
    _, err = typed(script, "--steps", "1", *shlex.split(case), code=2)
    assert BAD[script][case] in err
    assert len(err.strip().splitlines()) == 1 or case in ("--preset gpt3", "--step 3"), "tyro's box"
    assert sorted(Path(".").rglob("*")) == before, "nothing is written before all is found good"
