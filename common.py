"""Small helpers that know no script or model: command line, data, devices, weights, run."""

import argparse
import csv
import ctypes
import dataclasses
import hashlib
import importlib
import json
import logging
import lzma
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from glob import escape
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

# glibc hands big buffers back after every step, 20-30 % of a step on a CPU: tell it to keep them
if sys.platform == "linux":
    with suppress(AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": we know

import aiohttp
import datasets
import filelock
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import tyro
import zstandard
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.distributed import split_dataset_by_node
from huggingface_hub import HfFileSystem, dataset_info, metadata_load, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

# ---- errors ----


class UsageError(ValueError):
    """A flag or a file that the user can mend. On the command line: one line and exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on. On the command line: one line and exit code 1."""


def expect(condition, message):
    """Raise UsageError(message) unless the condition holds."""
    if not condition:
        raise UsageError(message)


# what the libraries raise where a file is broken or a connection ends, even inside a packed file
BROKEN = (
    OSError, EOFError, zlib.error, zstandard.ZstdError, tarfile.TarError, pa.ArrowException,
    SafetensorError, aiohttp.ClientError, lzma.LZMAError, *HfHubHTTPError.__bases__,
)  # fmt: skip


@contextmanager
def usage_errors(where, *more_kinds):
    """Turn what a library says of a file or flag into a UsageError; a slip keeps its traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"{where}: needs `pip install {error.name}`") from error
    except (ValueError, *BROKEN, *more_kinds) as error:
        raise UsageError(f"{where}: {reason(error)}") from error
    except Exception as error:
        error.add_note(f"while reading {where}")
        raise


def reason(error):
    """What an error and its notes say, in a line."""
    while "check your connection" in str(error) and error.__context__:  # the hub hides a 429 there
        error = error.__cause__ or error.__context__
    text = " ".join([str(error), *getattr(error, "__notes__", [])])
    return " ".join(text.split())[:300] or type(error).__name__


# ---- command line ----


@dataclasses.dataclass
class RunConfig:
    """Flags of every script; a resume may change them, but not the number of processes."""

    out_dir: str | None = None  # directory of the run; else the next free out/NAME-001, ...
    resume: bool = False  # go on with the run in out_dir, or with the newest one
    log_every: int = 10  # steps between two lines of metrics.jsonl
    eval_every: int = 250  # steps between two validations, which redraw curves.png
    ckpt_every: int = 250  # steps between two checkpoints
    keep: int = 2  # newest checkpoints to keep
    fsdp: bool = False  # devices keep shards of parameters and optimizer state; a step gathers them
    wandb: str | None = None  # project on Weights & Biases to log to
    coordinator: str | None = None  # HOST:PORT of process 0, or auto on a cluster
    num_processes: int | None = None  # how many processes train together
    process_id: int | None = None  # which of them this one is, from 0


def cli(kind, Config, presets, main, doc, forget):
    """Run `main` with a Config of the command line, and exit with its code."""
    prepare_process()
    code = 1
    try:
        cfg = parse_flags(kind, Config, presets, doc, forget)
        join_processes(cfg)
        main(cfg)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        message = in_one_line(error)
        name = Path(sys.argv[0]).name
        print(f"{name}: {message}" if message else traceback.format_exc(), file=sys.stderr)
        if isinstance(error, UsageError):
            code = 2
        elif jax.process_count() > 1:
            print("start all processes again with --resume", file=sys.stderr)
    leave(code)


def in_one_line(error):
    """What is said in place of a traceback; "" where that tells more."""
    text = " ".join(str(error).split())
    if "No space left on device" in text:
        return "No space left on device; the checkpoints before this one are sound"
    if "RESOURCE_EXHAUSTED" in text:
        advice = "try a lower --device-rows, --remat, or --fsdp on several devices"
        return f"out of memory on the device; {advice}: {text[:300]}"
    return text if isinstance(error, UsageError | RunError) else ""


def leave(code):
    """Exit, without waiting for a thread that reads from the network or for lost processes."""
    if code == 0 and jax.distributed.is_initialized():
        jax.distributed.shutdown()  # without it the others would take this process for lost
    is_reading = any(thread.name.startswith("ahead") for thread in threading.enumerate())
    if is_reading or jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


class SafeStream:
    """A text stream that may fail: a closed pipe or terminal costs a line, and never a step."""

    def __init__(self, stream):
        self.stream = stream
        with suppress(AttributeError):  # of a notebook
            stream.reconfigure(line_buffering=True, errors="replace")

    def write(self, text):
        with suppress(OSError, ValueError, AttributeError):  # the last where it is closed: None
            self.stream.write(text)

    def flush(self):
        with suppress(OSError, ValueError, AttributeError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def prepare_process():
    """Output that costs no step, no messages of libraries, compiled code that is kept."""
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)
    for library in ("datasets", "huggingface_hub", "transformers", "absl"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # their exceptions say it
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    with suppress(OSError):
        os.makedirs(cache, exist_ok=True)
    if not os.access(cache, os.W_OK):
        cache = tempfile.mkdtemp()  # a streamed data set makes a folder there, too
        datasets.config.HF_DATASETS_CACHE = cache
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", f"{cache}/nanoflax")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def parse_flags(kind, Config, presets, doc, forget):
    """A Config: its own defaults, those of --preset or of the resumed run, then the flags."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default=Config.preset)
    early.add_argument("--resume", action="store_true")
    for flag in ("out_dir", *forget):
        early.add_argument(f"--{flag.replace('_', '-')}", f"--{flag}", dest=flag)
    known, _ = early.parse_known_args()
    preset = known.preset if known.preset in presets else Config.preset  # tyro refuses another
    defaults = {"preset": preset} | presets[preset]
    for flag, other in forget.items():
        if getattr(known, flag) is not None:
            defaults.pop(other, None)
    if known.resume:
        runs = sorted(Path("out").glob(f"{kind}-*/run.json"), key=os.path.getmtime)
        expect(known.out_dir or runs, f"--resume: out holds no {kind} run; name one with --out-dir")
        out_dir = known.out_dir or runs[-1].parent
        defaults = read_run(out_dir)["config"] | {"out_dir": str(out_dir)}
        others = sorted(defaults.keys() - Config.__dataclass_fields__.keys())
        expect(not others, f"--resume: {out_dir} is of another script or version, with {others}")
        defaults |= {name: tuple(x) for name, x in defaults.items() if isinstance(x, list)}
    cfg = tyro.cli(Config, default=Config(**defaults), description=doc)
    for name, value in vars(cfg).items():
        expect(value != "", f"--{name.replace('_', '-')}: is empty")
    return cfg


def newest_step(out_dir):
    """The step of the newest checkpoint in a run directory; -1 where there is none yet."""
    names = [path.name for path in Path(out_dir).expanduser().glob("ckpt/*")]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def read_run(out_dir):
    """The run.json of a run directory: its config, and facts that a resume must find again."""
    path = Path(str(out_dir)).expanduser() / "run.json"
    expect(path.exists(), f"--resume: {out_dir} holds no run (no run.json); name one by --out-dir")
    with usage_errors(path):
        return json.loads(path.read_text())


def join_processes(cfg):
    """Make this process one of several with --coordinator; then only the first one prints."""
    address = cfg.coordinator
    numbers = (cfg.num_processes, cfg.process_id)
    if address is None:
        expect(numbers == (None, None), "--num-processes, --process-id: need --coordinator")
        return
    expect(address == "auto" or ":" in address, f"--coordinator {address}: needs HOST:PORT or auto")
    is_auto = address == "auto"  # ask SLURM, Open MPI, Kubernetes or the cloud
    options = {"cluster_detection_method": None if is_auto else "deactivate"}
    options["heartbeat_timeout_seconds"] = 30
    with usage_errors(f"--coordinator {address}", RuntimeError):
        jax.distributed.initialize(None if is_auto else address, *numbers, **options)
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def expect_each(cfg, names, is_right, what):
    """Raise UsageError unless is_right(value) for each flag in `names` that has a value."""
    for name in names:
        value = getattr(cfg, name)
        expect(value is None or is_right(value), f"--{name.replace('_', '-')} {value}: {what}")


# ---- data: what --data names -> datasets.IterableDataset ----

CSV = {"keep_default_na": False, "encoding": "utf-8-sig", "encoding_errors": "replace"}

# how `datasets` reads a file by its extension: a builder and its options; or our read_text
BUILDERS = {
    ".parquet": ("parquet", {"batch_size": 1_000}),  # else that of the first row group: 0 if empty
    ".json": ("json", {"on_mixed_types": None}),  # else a number makes all texts of a column JSON
    ".csv": ("csv", CSV),
    ".tsv": ("csv", CSV | {"sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".tar": ("webdataset", {}),
    ".jsonl": ("lines", {}),
    ".ndjson": ("lines", {}),
    ".txt": ("document", {}),
    ".md": ("document", {}),
    ".py": ("document", {}),
}
BAD = "__bad__"  # of a line that is no record: {BAD: why} stands in its place

STALLED = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=30, sock_read=30)}}
# small blocks: a resume fetches what it needs, not all that lies before it in the file
STORAGE = {"hf": {"block_size": 1 << 16}, "http": STALLED, "https": STALLED}


class Data(NamedTuple):
    """A data set, opened."""

    splits: dict  # {"train", perhaps "validation" and "test": IterableDataset}
    facts: dict  # what a resume must find again: the files, and on the hub the commit
    faults: dict  # arguments of `windows`: which errors are the data's, and how often to reopen


def open_data(name, configuration=None, revision=None):
    """Data of a hub id (its newest commit, or `revision`), a file, a glob, a folder or a URL."""
    config = datasets.config  # its own retries would hide a fault for minutes
    config.STREAMING_READ_MAX_RETRIES = 2
    config.STREAMING_READ_RETRY_INTERVAL = 1
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 1
    config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 1
    if name.startswith("hf://"):  # read at one commit, also when the run goes on
        at = HfFileSystem().resolve_path(name)
        commit = revision or dataset_info(at.repo_id, revision=at.revision).sha
        name = f"hf://datasets/{at.repo_id}@{commit}/{at.path_in_repo}"
    path = Path(name).expanduser()
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and extension(name) not in BUILDERS
    card = path / "README.md"
    has_card = card.is_file() and "configs" in (metadata_load(card) or {})
    is_on_hub = is_id and not path.exists()
    if has_card or is_on_hub:
        place = str(path) if has_card else name
        options = {"revision": revision, "storage_options": STORAGE}
        builder = datasets.load_dataset_builder(place, configuration, **options)
        files = builder.config.data_files or {}
        files = {str(split): [str(file) for file in part] for split, part in files.items()}
        kinds = {extension(file) for part in files.values() for file in part}
        is_lines = kinds and kinds <= {".jsonl", ".ndjson"} and not builder.config.field
        splits = open_files(files) if is_lines else builder.as_streaming_dataset()
    else:
        expect(not configuration, f"has no configuration {configuration}")
        files = find_files(name)
        splits = open_files(files)
    if len(splits) == 1 and is_on_hub:  # whatever its name
        splits = {"train": next(iter(splits.values()))}
    expect("train" in splits, f"has no train split, only {', '.join(splits)}; name its files")
    n = jax.process_count()
    shards = splits["train"].reshard().num_shards if n > 1 else 1  # slow: reads footers
    expect(shards >= n, f"has {shards} shards (files, row groups) for {n} processes")
    paths = [file for part in files.values() for file in part]
    commit = re.search(r"@([0-9a-f]{40})/", " ".join(paths))
    names = [Path(path).name for path in paths]  # their folder may move
    facts = {"files": digest(names), "commit": commit and commit[1]}
    is_remote = any("://" in path for path in paths)
    return Data(splits, facts, {"broken": BROKEN, "retries": 8 if is_remote else 0})


def extension(name):
    """The extension that says what a file or URL holds, whatever its compression."""
    path = re.sub(r"[?#].*", "", name) if "://" in name else name
    return Path(re.sub(r"\.(gz|bz2|xz|zst)$", "", path.lower())).suffix


def find_files(name):
    """{split: [file]} of a file, a glob, a folder or a URL: of one kind, and none of them empty."""
    path = Path(name).expanduser()
    root = escape(str(path.absolute()))
    everything = []
    if path.is_dir():  # which file is of which split is decided by `datasets`
        splits = DataFilesDict.from_patterns(get_data_patterns(root), root)
        everything = DataFilesDict.from_patterns({"all": ["**"]}, root)["all"]
    else:
        pattern = root if path.is_file() else os.path.expanduser(name)
        splits = DataFilesDict.from_patterns({"train": [pattern]})
    found = {}
    for split, files in splits.items():
        files = [file for file in files if extension(file) in BUILDERS]
        files = [file for file in files if "://" in file or os.path.getsize(file) > 0]
        if files:
            found[str(split)] = files
    kinds = sorted({extension(file) for files in found.values() for file in files})
    expect(kinds, f"no such file, or none with data; expected {' '.join(BUILDERS)}")
    example = f"'{name.rstrip('/')}/**/*{kinds[0]}'"
    expect(len(kinds) == 1, f"holds {', '.join(kinds)}; name one kind, as in {example}")
    others = set(everything).difference(*splits.values())
    unused = sorted(file for file in others if extension(file) in kinds)
    expect(not unused, f"{unused[:1]} is in no split; name those to train on, and --val-data")
    return found


def open_files(splits):
    """{split: IterableDataset} of {split: [file]}, all of one kind; a file is a shard."""
    name, options = BUILDERS[extension(next(iter(splits.values()))[0])]
    if name in ("lines", "document"):
        make = partial(datasets.IterableDataset.from_generator, read_text)
        by_line = {"by_line": name == "lines"}
        return {
            split: make(gen_kwargs={"files": files} | by_line) for split, files in splits.items()
        }
    patterns = {}
    for split, files in splits.items():
        patterns[split] = [file if "://" in file else escape(file) for file in files]
    options = options | {"data_files": patterns, "storage_options": STORAGE}
    return datasets.load_dataset_builder(name, **options).as_streaming_dataset()


def read_text(files, by_line):
    """Records of text files: a line of JSON each, or a whole document each."""
    # not by datasets' builders (5.2.0): json ends at a corrupt line, and text cannot read a URL
    for file in files:
        compression = fsspec.utils.infer_compression(re.sub(r"[?#].*", "", file))
        options = STORAGE.get(file.partition("://")[0], {}) | {"compression": compression}
        try:
            with fsspec.open(file, "rt", encoding="utf-8-sig", errors="replace", **options) as text:
                if by_line:
                    yield from map(parse_line, text)
                else:
                    yield {"text": text.read()}
        except BROKEN as error:
            error.add_note(f"in {file}")
            raise


def parse_line(line):
    """The record in a line of JSON; {} of an empty line, {BAD: why} of one that is no record."""
    try:
        record = json.loads(line.strip() or "{}")
    except (ValueError, RecursionError) as error:
        return {BAD: reason(error)}
    return record if isinstance(record, dict) else {BAD: "not a JSON object"}


def digest(value):
    """16 letters that change with a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def find_column(dataset, asked, usual, kind=object):
    """The column `asked` for, else the first of the `usual` names that there is, of a `kind`."""
    records = [record for record in islice(dataset, 10) if isinstance(record, dict)]
    names = list(dict.fromkeys(name for record in records for name in record if name != BAD))
    expect(names, "no records in it, or none of the first ones can be read")
    for name in [asked] if asked else usual:
        if name in names:
            values = [record[name] for record in records if record.get(name) is not None]
            if values and not any(isinstance(value, kind) for value in values):
                raise UsageError(
                    f"{name} is {values[0]!s:.40}, no {'text' if kind is str else 'number'}"
                )
            return name
    raise UsageError(f"no column {asked or usual[0]}, only {', '.join(names)}")


def report_bad(bad, seen, what):
    """Log a bad record, up to the hundredth; RunError if `bad` is more, and over 1 % of `seen`."""
    if bad <= 100:
        more = "; any more are only counted" if bad == 100 else ""
        tqdm.write(f"data: skipped {what}{more}", file=sys.stderr)
    elif bad > seen / 100:
        raise RunError(f"{bad:,} of {seen:,} records are bad; the last one is {what}")


def windows(dataset, size, *, seed, position=None, broken=(), retries=0):
    """Yield (records, rng, position) for ever: `size` of an IterableDataset, and where they begin.

    Each process takes its own shards (files, row groups), in every epoch in another order; with
    seed None all in the files' order, once. Shuffle a window with its `rng`. Given a `position` of
    the same size and seed it goes on with that window. After a `broken` error it reopens the data.
    """
    at = position or {"epoch": 0, "record": 0, "seen": 0, "state": None}
    process = jax.process_index()
    share = dataset if seed is None else None  # the shards of this process, once they are known
    stream = None
    failures = 0
    while True:
        try:
            if share is None:  # reshard reads the footers of parquet, which may fail as well
                n = jax.process_count()
                share = split_dataset_by_node(dataset.reshard(), process, n, strategy="shards")
            if stream is None:
                if seed is not None:  # `datasets` shuffles the shards in every epoch but 0
                    share.set_epoch(1 + 1000 * seed + at["epoch"])
                share.load_state_dict(at["state"])  # None: from the start
                stream = iter(share)
            records = list(islice(stream, size))
        except broken as error:
            failures += 1
            stream = None
            wait_after(error, failures, retries)
            continue
        except Exception as error:
            error.add_note(f"the data failed after record {at['record']:,} of epoch {at['epoch']}")
            raise
        failures = 0
        if records:
            rng = np.random.default_rng([seed or 0, at["epoch"], process, at["record"]])
            yield records, rng, at
            at = at | {"seen": at["seen"] + len(records), "record": at["record"] + len(records)}
            at["state"] = share.state_dict()  # behind these records
        elif seed is None:
            return
        elif at["record"] == 0:
            raise RunError("the data: an epoch without a record")
        else:
            at = at | {"epoch": at["epoch"] + 1, "record": 0, "state": None}
            stream = None


def wait_after(error, failures, retries):
    """Wait 1, 2, 4 ... 60 s after the `failures`th fault in a row. RunError after `retries`."""
    if failures > retries:
        times = f" {failures} times in a row" if retries else ""
        raise RunError(f"the data failed{times}: {reason(error)}") from error
    pause = min(2 ** (failures - 1), 60)
    tqdm.write(f"data: {reason(error)}; try {failures} of {retries} in {pause} s", file=sys.stderr)
    time.sleep(pause)


def ahead(items, depth, stop):
    """Yield what a generator yields, made up to `depth` items ahead by a thread, until a signal.

    An error waits in stop.error, so that all before it is saved; several processes raise it.
    """
    thread = ThreadPoolExecutor(1, "ahead")  # `leave` knows it by this name
    ready = deque(thread.submit(next, items, None) for _ in range(depth))
    try:
        while stop.signal is None:
            if wait([ready[0]], timeout=0.1).done:  # returns in time to see a signal
                item = ready.popleft().result()
                if item is None:
                    raise RunError("the data: an epoch gave no row (too short, or all held out)")
                ready.append(thread.submit(next, items, None))
                yield item
    except Exception as error:
        if jax.process_count() > 1:
            raise
        stop.error = error
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


# ---- devices ----

# dense bf16 FLOP/s from the makers' data sheets; a device without an entry has no mfu
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "T4": 65e12, "V100": 125e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
}  # fmt: skip


def peak_flops():
    """bf16 FLOP/s of all devices together, or infinity where they are unknown."""
    device = jax.devices()[0].device_kind
    known = [flops for name, flops in PEAK_FLOPS.items() if re.search(rf"{name}\b", device)]
    return known[0] * jax.device_count() if known else math.inf


def shard_batch(mesh, batch, whole=False):
    """Put host arrays on the mesh, cut along B: this process's rows, or the `whole` batch."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    make = partial(jax.make_array_from_process_local_data, sharding)
    return jax.tree.map(lambda x: make(x, x.shape if whole else None), batch)


def shard_state(mesh, state, fsdp):
    """Copy a state to every device, or with fsdp cut arrays along the largest axis that divides."""

    def sharding(x):
        axes = [axis for axis, size in enumerate(x.shape) if fsdp and size % mesh.size == 0]
        spec = [None] * x.ndim
        if axes:
            spec[max(axes, key=lambda axis: x.shape[axis])] = "data"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.device_put(state, jax.tree.map(sharding, state))


def to_host(array):
    """A whole array as numpy, wherever its pieces are; every process must ask for it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def gather(value):
    """The JSON `value` of every process, in a list; at most 64 kB each."""
    text = np.frombuffer(json.dumps(value).encode().ljust(1 << 16), np.uint8)
    rows = multihost_utils.process_allgather(text)
    return [json.loads(row.tobytes()) for row in rows.reshape(-1, 1 << 16)]


# ---- pretrained files ----

# fields of transformers' configs that change nothing in the numbers
NOT_COMPUTED = """architectures dtype torch_dtype transformers_version _name_or_path id2label
label2id num_labels initializer_range use_cache bos_token_id eos_token_id pad_token_id
sep_token_id task_specific_params output_attentions output_hidden_states return_dict"""


def snapshot(path, *more):
    """The folder of a path or hub id, of which it loads configs, tokenizers and `more` patterns."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    with usage_errors(f"{path}: no such folder, nor on the hub"):
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.txt", "*.model", *more]))


def read_config(folder, kinds, followed):
    """A folder's config, of a class in `kinds`; a field is in `followed` or has its default."""
    path = Path(folder) / "config.json"
    expect(path.exists(), "no config.json in it")
    model_type = json.loads(path.read_text()).get("model_type")
    known = {kind.model_type: kind for kind in kinds}
    expect(model_type in known, f"a {model_type} model, expected {' or '.join(known)}")
    config = known[model_type].from_pretrained(folder)
    free = {*followed, *NOT_COMPUTED.split()}
    defaults = {"position_embedding_type": "absolute"} | type(config)().to_dict()  # in old files
    for name, default in defaults.items():
        value = getattr(config, name, default)
        # or the problem_type that our heads save
        is_followed = name in free or value in (default, "single_label_classification")
        expect(is_followed, f"{name} is {value}, only {default} is supported")
    return config


def read_weights(folder):
    """{name: array} of a model folder's safetensors, in one file or in several."""
    expect(not (folder / "adapter_config.json").exists(), "has a PEFT adapter; merge it first")
    files = sorted(folder.glob("model.safetensors")) or sorted(folder.glob("model-*.safetensors"))
    expect(files, "no model.safetensors in it; a run has one when it has ended (--resume it)")
    weights = {}
    for file in files:
        weights.update(load_file(file))
    return weights


def load_weights(params, weights, may_lack=()):
    """Set params {name: parameter} to weights {name: array}: all but those of prefixes `may_lack`.

    Returns the names that kept their init. Raises UsageError.
    """
    lacking = [name for name in params if name not in weights]
    missing = [name for name in lacking if not name.startswith(tuple(may_lack))]
    expect(not missing, f"{missing[:1]} is missing")
    others = [name for name in weights if name not in params]
    expect(not others, f"{others[:1]} has no place in the model")
    for name, w in weights.items():
        shape = params[name].shape
        expect(w.shape == shape, f"{name} is {w.shape}, expected {shape}")
        is_sound = jnp.issubdtype(w.dtype, jnp.floating) and np.isfinite(w).all()
        expect(is_sound, f"{name} is not finite, or quantised ({w.dtype})")
        params[name].set_value(jnp.asarray(w.astype(np.float32)))
    return lacking


def write_pretrained(folder, weights, config, kind, *parts):
    """A model folder of weights {name: array}, for transformers' class `kind`; `parts` save too."""
    if jax.process_index() > 0:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: np.asarray(w, order="C") for name, w in weights.items()}
    fields = config.to_dict() | {"architectures": [kind], "dtype": "float32"}
    with tempfile.TemporaryDirectory(dir=folder) as made:  # moved when whole: a resume reads them
        save_file(weights, f"{made}/model.safetensors", metadata={"format": "pt"})
        for part in (type(config).from_dict(fields), *parts):
            part.save_pretrained(made)
        path = Path(made, "tokenizer_config.json")
        if path.exists():  # transformers 4 knows this class by its older name alone
            text = path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"')
            path.write_text(text)
        for name in os.listdir(made):
            os.replace(f"{made}/{name}", folder / name)


# ---- the run ----


class RunDir:
    """The directory of a run, locked: run.json, its source, files written whole.

    Refuses one that holds another run, a flag that has changed and is not in `may_change`, and
    other `facts`. Saves `parts` (a tokenizer, a config) for a resume.
    """

    def __init__(self, kind, cfg, may_change, facts, parts=()):
        self.is_first = jax.process_index() == 0
        config = json.loads(json.dumps(dataclasses.asdict(cfg)))  # tuples are lists in JSON
        config |= {"coordinator": None, "num_processes": None, "process_id": None, "resume": False}
        facts = json.loads(json.dumps(facts | {"processes": jax.process_count()}))
        digests = gather(digest([config, facts]))
        expect(len(set(digests)) == 1, "the processes have other flags, or see other data")
        path = None
        if self.is_first:
            if cfg.wandb:
                with usage_errors(f"--wandb {cfg.wandb}", Exception):
                    importlib.import_module("wandb").login()  # fails without a key, before a run
            with usage_errors(f"--out-dir {cfg.out_dir or 'out'}"):
                path = str(self.take(kind, cfg))
        self.path = Path(gather(path)[0])  # the first process chose it
        self.id = f"{self.path.name}-{os.urandom(4).hex()}"  # for W&B, where names recur
        if cfg.resume:
            then = read_run(self.path)
            self.id = then["id"]
            self.compare(then, config, facts, {*RunConfig.__dataclass_fields__, *may_change})
        elif self.is_first:
            for part in parts:
                part.save_pretrained(self.path)
            script = sys.modules[type(cfg).__module__]  # a notebook has no file
            for file in {getattr(script, "__file__", __file__), __file__}:
                shutil.copy(file, self.path)
        info = {"id": self.id, "config": config | {"out_dir": str(self.path)}, "facts": facts}
        info["versions"] = {name: version(name) for name in ("jax", "flax", "optax", "datasets")}
        self.write("run.json", json.dumps(info, indent=1))

    def take(self, kind, cfg):
        """Lock the next free out/KIND-001, or --out-dir where it is free or to be resumed."""
        path = Path(cfg.out_dir or "out").expanduser()
        path.mkdir(parents=True, exist_ok=True)
        if cfg.out_dir is None:
            for n in count(1):
                path = Path(f"out/{kind}-{n:03d}")
                with suppress(FileExistsError):
                    path.mkdir()
                    break
        names = set(os.listdir(path)) - {"run.lock"}
        if names and not cfg.resume:
            expect("run.json" in names, "not empty and not a run; choose another directory")
            raise UsageError("holds a run; --resume to go on with it, or choose another directory")
        self.lock = filelock.FileLock(path / "run.lock", is_singleton=True)  # as long as self lives
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise UsageError("another process is training in it") from error
        return path

    def compare(self, then, config, facts, may_change):
        """Refuse by name what would change the meaning of the run's checkpoint."""
        is_lost = (self.path / "metrics.jsonl").exists() and not (self.path / "ckpt").exists()
        expect(not is_lost, f"--resume: {self.path} was trained, and its checkpoints are gone")
        step = newest_step(self.path)
        expect(step <= config["steps"], f"--steps {config['steps']}: {self.path} is at step {step}")
        for name in config.keys() - may_change:
            now = config[name]
            was = then["config"].get(name, now)
            flag = f"--{name.replace('_', '-')} {now}"
            expect(now == was, f"{flag}: the run in {self.path} was started with {was}")
        for name, now in facts.items():
            was = then["facts"].get(name)
            expect(now == was, f"--resume: other {name} ({now}, in {self.path} it was {was})")

    def write(self, name, text):
        """Write a file so that it is whole at any moment."""
        if self.is_first:
            (self.path / f"{name}.tmp").write_text(text)
            os.replace(self.path / f"{name}.tmp", self.path / name)


class Checkpoints:
    """Orbax checkpoints of (state, position in the data), written while training goes on."""

    def __init__(self, folder, keep):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
        self.last_saved_step = self.manager.latest_step()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or jax.process_count() == 1:  # else it would wait for the others
            self.manager.close()

    def restore(self, state):
        """(state, step, position) of the newest one, sharded like `state`; or (state, 0, None)."""
        step = self.last_saved_step
        if step is None:
            return state, 0, None
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        args = {"state": ocp.args.StandardRestore(like), "position": ocp.args.JsonRestore()}
        advice = "of another model, or damaged (then delete it to go on from the one before)"
        with usage_errors(f"--resume: {self.manager.directory / str(step)}: {advice}", Exception):
            restored = self.manager.restore(step, args=ocp.args.Composite(**args))
        return restored["state"], step, restored["position"][jax.process_index()]

    def save(self, step, state, position):
        """Save unless it is done, on all processes. RunError for weights that are not finite."""
        if step == self.last_saved_step:
            return
        jax.block_until_ready(state)  # two programs that sum over devices at once have hung on CPUs
        if not all_finite(state):
            good = self.last_saved_step
            raise RunError(f"step {step}: weights not finite; the last good checkpoint is {good}")
        position = ocp.args.JsonSave(gather(position))
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), position=position)
        self.manager.save(step, args=args)
        self.last_saved_step = step


@jax.jit
def all_finite(state):
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(state)]).all()


class Stop:
    """Why a loop is to end early: `signal`, or the `error` of the data. A second signal kills."""

    def __init__(self):
        self.signal = None
        self.error = None
        self.handlers = {}

    def __enter__(self):
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and jax.process_count() == 1:  # jax has its own handler for several
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        name = signal.Signals(number).name
        tqdm.write(f"{name}: saving soon; once more to quit at once", file=sys.stderr)

    def requested(self, step):
        """Whether to end after this step; several processes end after the same one."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def exit(self, run, step):
        """After a signal or an error of the data say how to go on, and exit or raise it."""
        if self.signal or self.error:
            print(f"stopped, saved at step {step}; go on with --resume --out-dir {run.path}")
            raise self.error or SystemExit(128 + self.signal)


class Log:
    """metrics.jsonl, bar, curves.png and W&B of a run; a step is `per_step` `unit`s of `flops`."""

    def __init__(self, run, cfg, step, unit, per_step, flops):
        self.run = run
        self.every = cfg.log_every
        self.unit = unit
        self.per_step = per_step
        self.mfu_of_rate = flops / peak_flops()
        self.path = run.path / "metrics.jsonl"
        text = self.path.read_text(errors="replace") if self.path.exists() else ""
        lines = map(parse_line, text.splitlines())  # a power cut may leave one that is no JSON
        self.lines = [line for line in lines if line.get("step", math.inf) <= step]
        run.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        self.pending = []  # (step, metrics on the device)
        self.last_step = step  # the step of the last line
        self.began = time.perf_counter()  # the time of the last line; pauses move it
        self.waited = 0.0  # seconds since then without a batch
        self.bar = tqdm(total=cfg.steps, initial=step, disable=None if run.is_first else True)
        self.wandb = None
        if cfg.wandb and run.is_first:
            names = {"project": cfg.wandb, "name": run.path.name, "id": run.id, "resume": "allow"}
            init = importlib.import_module("wandb").init
            self.wandb = init(config=dataclasses.asdict(cfg), dir=str(run.path), **names)

    def timed(self, items):
        """The items of a generator; the time that it takes counts as waiting."""
        start = time.perf_counter()
        for item in items:
            self.waited += time.perf_counter() - start
            yield item
            start = time.perf_counter()

    @contextmanager
    def paused(self):
        """Leave an evaluation or a sample out of the time of training."""
        jax.block_until_ready(self.pending)
        start = time.perf_counter()
        yield
        self.began += time.perf_counter() - start

    def step(self, step, metrics):
        """Note a dispatched step. Its metrics stay on the device until the next is under way."""
        if self.pending and (step - 1) % self.every == 0:  # the line of step - 1
            self.flush()
        self.pending.append((step, metrics))
        self.bar.update()

    def flush(self, scores=None):
        """Write the line of the last step, with `scores`. RunError where one is not finite."""
        if not self.pending:
            return
        fetched = jax.device_get(self.pending)
        self.pending = []
        fetched[-1][1].update(scores or {})
        for step, values in fetched:
            if not np.isfinite([*values.values()]).all():
                values = ", ".join(f"{name} {value:g}" for name, value in values.items())
                advice = "try a lower --lr, more --warmup-steps or --grad-clip 1"
                raise RunError(f"step {step}: {values}; the checkpoints before are good; {advice}")
        line = {"step": step} | {name: np.asarray(value).item() for name, value in values.items()}
        seconds = time.perf_counter() - self.began
        rate = (step - self.last_step) * self.per_step / seconds
        line |= {self.unit: step * self.per_step, f"{self.unit}_per_s": rate}
        line["mfu"] = rate * self.mfu_of_rate or None  # None: unknown device
        line["data_wait"] = self.waited / seconds
        self.write(line, scores or {})
        self.last_step = step
        self.began = time.perf_counter()
        self.waited = 0.0

    def write(self, line, scores):
        self.lines.append(line)
        if self.run.is_first:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        if self.wandb:
            self.wandb.log(line, step=line["step"])
        text = f"loss {line['loss']:.3f} lr {line['lr']:.1e}"
        text += f" {line[f'{self.unit}_per_s']:,.0f} {self.unit}/s"
        text += f" mfu {line['mfu']:.1%}" if line["mfu"] else ""
        text += f" wait {line['data_wait']:.1%}"
        self.bar.set_postfix_str(text)
        if scores or self.bar.disable:
            figures = "".join(f" {name} {value:.4f}" for name, value in scores.items())
            tqdm.write(f"step {line['step']}: {text}{figures}")
        if scores and self.run.is_first:
            draw_curves(self.lines, self.run.path / "curves.png")

    def close(self):
        self.bar.close()
        if self.wandb:
            self.wandb.finish()


def draw_curves(lines, path):
    """Losses, the other validation figures, gradient norm and learning rate by step, as a png."""
    from matplotlib.figure import Figure  # half a second to import

    scores = [[name] for name in lines[-1] if name.startswith("val_") and name != "val_loss"]
    panels = [["loss", "val_loss"], *scores, ["grad_norm"], ["lr"]]
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axes, names in zip(figure.subplots(1, len(panels), sharex=True), panels):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points), marker="." if name.startswith("val_") else "", label=name)
        axes.set(xlabel="step", ylabel=names[0])
        axes.legend(frameon=False)
    figure.savefig(path, dpi=100)
