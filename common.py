"""What a reader may skip: command line, streams, checkpoints, logging, files. Nothing here knows a model."""

import argparse
import csv
import ctypes
import dataclasses
import hashlib
import importlib.util
import json
import logging
import math
import os
import platform
import queue
import re
import shutil
import signal
import sys
import sysconfig
import tarfile
import threading
import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from glob import escape, glob
from importlib.metadata import version
from io import BytesIO
from itertools import islice
from pathlib import Path

try:
    import resource
except ImportError:  # on Windows
    resource = None

STARTED = time.perf_counter()


GLIBC = None  # where its malloc is tuned


def tune_malloc():
    """Keep glibc from handing big buffers back to the system on every step: 20-30 % of a step on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or "MALLOC_MMAP_MAX_" in os.environ:
        return None
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    libc.mallopt(-8, 1)  # M_ARENA_MAX
    return libc


def peak_memory():
    """Bytes that this process held at most; None where the system does not say."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def spare_memory():
    """Untune malloc where a step takes a third of memory: small pieces in its old place would double it."""
    if GLIBC and 3 * peak_memory() > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        GLIBC.mallopt(-4, 65_536)
        GLIBC.malloc_trim(0)


# one of our scripts is the program: only then touch the process, and before jax starts its threads
SCRIPT = Path(getattr(sys.modules["__main__"], "__file__", None) or "").stem
if SCRIPT in ("gpt_train", "bert_mlm", "resnet_stream"):
    GLIBC = tune_malloc()
    # else transformers imports torch, where there is one: two seconds, for nothing
    if not any(arg.startswith("--mteb") for arg in sys.argv):
        sys.modules.setdefault("torch", None)
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": we know

import datasets  # noqa: E402
import fsspec  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
import pyarrow as pa  # noqa: E402
import transformers  # noqa: E402, F401
import tyro  # noqa: E402
from datasets.distributed import split_dataset_by_node  # noqa: E402
from datasets.exceptions import DatasetsError  # noqa: E402
from datasets.utils.file_utils import xopen  # noqa: E402
from huggingface_hub import snapshot_download  # noqa: E402
from huggingface_hub.errors import HfHubHTTPError  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

if sys.modules.get("torch", "") is None:
    del sys.modules["torch"]


class UsageError(ValueError):
    """A flag or a file that the user can mend. On the command line: one line and exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on. On the command line: one line and exit code 1."""


class StreamError(RunError):
    """Data that cannot be had any more; what was trained until then is sound."""


def expect(condition, message):
    """Raise UsageError(message) unless the condition holds."""
    if not condition:
        raise UsageError(message)


def flag(name):
    return "--" + name.replace("_", "-")


def first_line(error):
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


# ---- command line ----


def cli(Config, presets, main, doc):
    """Turn the command line into a Config and run `main` with it.

    Defaults come from Config and then from --preset, or with --resume from the run.json of that run.
    """
    script = Path(sys.argv[0]).stem
    for library in ("datasets", "huggingface_hub"):  # what they have to say comes as an exception
        logging.getLogger(library).setLevel(logging.CRITICAL)
    for stream in (sys.stdout, sys.stderr):  # a sample may hold what a console cannot show
        stream.reconfigure(errors="replace")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    early.add_argument("--data", nargs="*")
    early.add_argument("--out-dir", "--out_dir")
    early.add_argument("--resume", action="store_true")
    early = early.parse_known_args()[0]
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "nanoflax"))
        # even the small ones: there are many at the start
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        changes = {"preset": early.preset} | presets[early.preset] if early.preset in presets else {}
        if early.data:
            changes.pop("data_name", None)  # it is of the preset's own data
        if early.resume:
            out_dir = early.out_dir or newest_run(script)
            changes = read_run(out_dir)["config"] | {"out_dir": str(out_dir)}
            changes = {
                k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()
            }  # json has lists
            known = {field.name for field in dataclasses.fields(Config)}
            expect({*changes} <= known, f"--resume: {out_dir} is no run of {script}.py")
        cfg = tyro.cli(Config, default=Config(**changes), prog=f"{script}.py", description=doc)
        join_processes(cfg)
        main(cfg)
        code = 0
    except (UsageError, RunError) as error:
        print(f"{script}.py: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print(f"{script}.py: interrupted", file=sys.stderr)
        code = 130
    except SystemExit as stop:
        code = stop.code
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()  # at the interpreter's own end this process would wait for the others
        code = 1
    alone = code and jax.distributed.is_initialized()  # others may never come to say goodbye
    if alone or any(thread.name == "prefetch" for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(code)  # one that still waits for the network would crash the interpreter on its way out
    sys.exit(code)


def join_processes(cfg):
    """Make this process one of many where the flags or the launcher (SLURM, Open MPI, GKE) say so.

    From then on only process 0 prints.
    """
    given = {n: getattr(cfg, n) for n in ("coordinator", "num_processes", "process_id")}
    named = " ".join(f"{flag(n)} {v}" for n, v in given.items() if v is not None) or "the launcher"
    count = [int(os.environ.get(name, 1)) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    launched = max(count) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    how, numbers = {}, [value is not None for value in (cfg.num_processes, cfg.process_id)]
    if cfg.coordinator in (None, "auto"):
        expect(not any(numbers), f"{named}: the number and the id need --coordinator HOST:PORT")
        if cfg.coordinator is None and not launched:
            return
    else:
        address = re.fullmatch(r".+:\d+", cfg.coordinator) and all(numbers)
        expect(address, f"{named}: expected HOST:PORT of process 0, how many there are, and which this is")
        fits = 0 <= cfg.process_id < cfg.num_processes
        expect(fits, f"{named}: ids go from 0 to {cfg.num_processes - 1}")
        how = dict(coordinator_address=cfg.coordinator, num_processes=cfg.num_processes)
        how |= dict(process_id=cfg.process_id, cluster_detection_method="deactivate")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours
    try:
        jax.distributed.initialize(**how, heartbeat_timeout_seconds=30)
    except (ValueError, RuntimeError) as error:
        raise RunError(f"{named}: could not join the other processes: {first_line(error)}") from error
    if jax.process_index():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def check(cfg, positive):
    """What every script asks of its flags, and that those named in `positive` are at least 1."""
    for name in ("steps", "retries", "eval_batches", "warmup_steps", "weight_decay", "grad_clip", "seed"):
        expect(getattr(cfg, name) >= 0, f"{flag(name)} {getattr(cfg, name)}: must not be negative")
    positive += " batch_size accum log_every eval_every ckpt_every keep"
    for name in positive.split():
        expect(getattr(cfg, name) > 0, f"{flag(name)} {getattr(cfg, name)}: must be at least 1")
    expect(cfg.steps or cfg.init_from, "--steps 0: trains nothing; name a finished model with --init-from")
    left = f"steps 10 to 15 of a run are recorded, and this one has {cfg.steps}"
    expect(not cfg.profile or cfg.steps >= 15, f"--profile {cfg.profile}: {left}")
    expect(0 <= cfg.dropout < 1, f"--dropout {cfg.dropout}: must be in [0, 1)")
    n, devices = cfg.batch_size, jax.device_count()
    unit = cfg.accum * devices
    fewer = f"--accum {math.gcd(n // devices, cfg.accum)} or " if n % devices == 0 else ""
    advice = f"try {fewer}--batch-size {max(1, n // unit) * unit}"
    pieces = f"{unit} (--accum {cfg.accum} x {devices} devices)"
    expect(n % unit == 0, f"--batch-size {n}: must be a multiple of {pieces}; {advice}")


# ---- sources ----

TABLES = {".parquet": "parquet", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}
TABLES |= {".csv": "csv", ".tsv": "tsv", ".tar": "webdataset"}
READERS = TABLES | dict.fromkeys((".txt", ".md", ".py"), "text")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLITS = dict(train="train", training="train", test="test", testing="test", validation="validation")
SPLITS |= dict.fromkeys(("valid", "val", "dev"), "validation")


@dataclasses.dataclass
class Source:
    """One split of a streaming data set. Its records have the roles asked for: text, label, image.

    A record that cannot be used (no text, an image that does not decode, a label out of range) is skipped,
    logged and counted; StreamError once more than 100 of the last 10,000 are.
    """

    dataset: datasets.IterableDataset
    columns: dict  # {role: name of its column}
    fingerprint: dict  # what a resume must find unchanged
    classes: list | None = None  # names of the labels, where they have names
    parse: Callable | None = None  # makes a row of what the reader gives, where that is not one yet
    retries: int = 8
    rank: int = 0  # this process streams its own share of the shards,
    world: int = 1  # one of this many
    epoch: int | None = None  # under way; None in a pass in the order of the files
    seen: int = 0
    skipped: int = 0
    recent: deque = dataclasses.field(default_factory=lambda: deque(maxlen=101))  # the last bad ones
    logged: set = dataclasses.field(default_factory=set)  # the first, in all passes together

    def skip(self, record, why):
        """Count and log the bad record number `record` of the epoch under way."""
        self.skipped += 1
        if any((self.epoch, record) == bad for bad, _ in self.recent):
            return  # the source was opened again
        self.recent.append(((self.epoch, record), self.seen))
        where = f"record {record:,}" + ("" if self.epoch is None else f" of epoch {self.epoch}")
        if len(self.logged) < 100 and (self.epoch, record) not in self.logged:
            self.logged.add((self.epoch, record))
            more = "; any more are only counted" if len(self.logged) == 100 else ""
            tqdm.write(f"data: skipped {where}: {why}{more}", file=sys.stderr)
        if len(self.recent) == 101 and self.seen - self.recent[0][1] < 10_000:
            limit = "more than 1 % of the last 10,000 records of the data are bad"
            raise StreamError(f"{limit}; the last one is {where}: {why}")

    def problem(self, role, value):
        """Why `value` cannot be used, or None."""
        if value is None or value == "":
            return f"{role} is {'empty' if value == '' else 'missing'}"
        expected = {"text": str, "label": int, "image": bytes | dict}[role]
        if not isinstance(value, expected):
            return f"{role} is of type {type(value).__name__}"
        if role == "text" and re.search("[\ud800-\udfff]", value):
            return "text holds half a character (a lone surrogate)"
        if role == "label" and not 0 <= value < (len(self.classes) if self.classes else math.inf):
            known = f" to {len(self.classes) - 1}" if self.classes else ""
            return f"label is {value}, expected a class from 0{known}"

    def check_records(self, rows, index):
        """The good ones of raw rows {column: list}, as {role: list, "record": list}."""
        good, start = {name: [] for name in (*self.columns, "record")}, self.seen
        for n, (i, *values) in enumerate(zip(index, *rows.values())):
            self.seen, row = start + n, dict(zip(rows, values))
            row = self.parse(row) if self.parse else row
            if row is None:
                self.skip(i, "not a JSON object")
                continue
            record = {role: row.get(column) for role, column in self.columns.items()}
            label = record.get("label")
            if isinstance(label, float) and label.is_integer():  # pandas, of a column with a gap
                record["label"] = int(label)
            problems = (self.problem(role, value) for role, value in record.items())
            if problem := next(filter(None, problems), None):
                self.skip(i, problem)
                continue
            for name, value in (record | {"record": i}).items():
                good[name].append(value)
        return good

    @property
    def inputs(self):
        return ["text"] if self.parse else sorted(set(self.columns.values()))

    def __iter__(self):
        """One pass over the good records in the order of the files, as dicts of the roles and "record"."""
        once = dataclasses.replace(self, epoch=None, seen=0, skipped=0, recent=deque(maxlen=101))
        how = dict(batched=True, batch_size=16, with_indices=True, remove_columns=self.inputs)
        open_epoch = lambda _: self.dataset.select_columns(self.inputs).map(once.check_records, **how)
        yield from Rows(open_epoch, retries=self.retries, once=True)

    @cached_property
    def shards(self):
        """The raw rows in as many shards as there can be (row groups of parquet); this process's share."""
        ds = self.dataset.reshard().select_columns(self.inputs)
        if self.world == 1:
            return ds
        return split_dataset_by_node(ds, self.rank, self.world, strategy="shards")

    def map(self, epoch, seed, *stages):
        """The rows of one epoch, its shards in that epoch's order, after every stage (function, size).

        A function makes rows {column: array or list} of `size` good records {role: list, "record": list};
        that of a second stage, of what the first returned.
        """
        ds, waiting = self.shards, [0] * len(stages)
        seen = [self.seen] * len(stages)  # it goes on counting, as `recent` does

        def run(stage, function, batch, index=None):
            self.epoch, self.seen, before = epoch, seen[stage], self.skipped
            if stage == 0:
                batch, seen[stage] = self.check_records(batch, index), seen[stage] + len(index)
            else:
                waiting[stage] += sum(batch.pop("skipped"))
                seen[stage] += len(batch["record"])
            rows = function(batch) if batch["record"] else {}
            waiting[stage] += self.skipped - before
            skipped = [0] * len(next(iter(rows.values()), ()))
            if skipped:  # the count travels on a row: that of the rows trained on is saved with them
                skipped[0], waiting[stage] = waiting[stage], 0
            return rows | {"skipped": skipped}

        for i, (function, size) in enumerate(stages):
            inputs = [*self.columns, "record", "skipped"] if i else self.inputs
            how = dict(batched=True, batch_size=size, with_indices=i == 0, remove_columns=inputs)
            ds = ds.map(partial(run, i, function), **how)
        ds.set_epoch(1 + 1000 * seed + epoch)  # 0 would keep the order of the files
        return ds


def open_data(cfg, columns, data=None, option="--data"):
    """[{split: Source}, ...], one for each --data, or for each of `data`, which `option` named.

    `columns`: {role: name of the column, or None to find it}. Splits are called train, and where there are
    such validation and test. Always streaming. UsageError for what cannot be read, with what was expected.
    """
    how = datasets.config  # theirs: 20 reads at a fixed pace; ours: few, then open again after growing pauses
    how.STREAMING_READ_MAX_RETRIES, how.STREAMING_READ_RETRY_INTERVAL = 2, 1
    how.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = how.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 1
    names = cfg.data_name if data is None else ()
    data = cfg.data if data is None else data
    expect(data, f"{option}: names no data")
    if "synthetic" in data:
        expect(len(data) == 1, f"{option} {' '.join(data)}: synthetic does not mix with other data")
        return [open_synthetic(columns)]
    expect(len(names) in (0, len(data)), f"--data-name {' '.join(names)}: one for each --data, - for none")
    weights = f"--data-weights {' '.join(map(str, cfg.data_weights))}"
    expect(len(cfg.data_weights) in (0, len(cfg.data)), f"{weights}: one for each --data")
    expect(all(w > 0 for w in cfg.data_weights), f"{weights}: must be above 0")
    names = names or [None] * len(data)
    known = read_run(cfg.out_dir)["data"] if cfg.resume and cfg.out_dir else {}
    revisions = dict(zip(known.get("data", ()), known.get("revision", ())))  # goes on with the files it had
    return [open_source(d, n, columns, option, cfg.retries, revisions.get(d)) for d, n in zip(data, names)]


def open_synthetic(columns):
    """{split: Source} of what stands in for data with --data synthetic: random words or pixels."""

    def read(files):
        for number in files:
            rng, row = np.random.default_rng(number), {"label": number % 2}
            if "image" in columns:
                pixels = rng.integers(256, size=(64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(png := BytesIO(), "png")
                row["image"] = png.getvalue()
            else:
                words = rng.integers(97, 123, (200, 5), np.uint8)  # a to z
                row["text"] = " ".join(word.tobytes().decode() for word in words)
            yield row

    # validation has its own pictures; of texts the first ones are taken
    splits = {"train": list(range(2_000))} | ({"validation": list(range(256))} if "image" in columns else {})
    splits, _, _ = open_files(read, splits)
    how = dict(rank=jax.process_index(), world=jax.process_count())
    found = dict(data="synthetic", columns={role: role for role in columns})
    return {split: Source(ds, found["columns"], found, **how) for split, ds in splits.items()}


def synthetic_batches(columns, batch_size, *, seed, position):
    """What `batches` gives, of random rows: no reading, no decoding.

    `columns`: {name: (shape of a row, low, high, dtype)}. A device's rows are the same in any process.
    """
    n, local = position["batch"] if position else 0, jax.local_device_count()
    devices = range(jax.process_index() * local, (jax.process_index() + 1) * local)
    while True:
        batch = {name: [] for name in columns}
        for device in devices:
            rng = np.random.default_rng([seed, n, device])
            for name, (shape, low, high, dtype) in columns.items():
                batch[name].append(rng.integers(low, high, (batch_size // local, *shape), dtype))
        batch, n = {name: np.concatenate(parts) for name, parts in batch.items()}, n + 1
        yield batch, {"batch": n, "bad": 0, "sources": []}


def mix(sources, weights=()):
    """The records of all sources in proportion to `weights`, each in its own order, until all have ended."""
    rows, weights = [iter(source) for source in sources], weights or [1] * len(sources)
    given = [0] * len(rows)
    while any(rows):
        i = min((i for i, left in enumerate(rows) if left), key=lambda i: (given[i] + 1) / weights[i])
        record, given[i] = next(rows[i], None), given[i] + 1
        if record is None:
            rows[i] = None
        else:
            yield record


def fingerprint(sources):
    """What of all the sources a resume must find unchanged."""
    found = {name: [source.fingerprint[name] for source in sources] for name in sources[0].fingerprint}
    return found | {"processes": sources[0].world}


def open_source(data, name, columns, option, retries, revision=None):
    for attempt in range(1, retries + 2):
        try:
            configuration = None if name == "-" else name
            splits, parse, describe = open_splits(data, configuration, option, columns, revision)
            train = splits["train"] if "train" in splits else next(iter(splits.values()))
            head = list(islice(train, 10))
            break
        except UsageError:
            raise
        except StopIteration:  # what the json reader says of an empty file
            splits, head = {"train": None}, []
            break
        except Exception as error:  # datasets and the hub raise some twenty kinds
            if attempt <= retries and is_busy(error):
                wait(reason(error), attempt, retries)
                continue
            offline = "" if is_local(data) else "; without a network, try the default --data"
            raise UsageError(f"{option} {data}: {reason(error)}{offline}") from error
    what = "images" if "image" in columns else "documents"
    expect(head, f"{option} {data}: no {what} in it")
    if parse:
        head = [row for row in map(parse, head) if row]
        expect(head, f"{option} {data}: no JSON object in its first ten lines")
    features = {} if parse else train.features or {}
    find = partial(find_column, data, head, features, option)
    found = {role: find(role, wanted) for role, wanted in columns.items()}
    names = getattr(features.get(found.get("label")), "names", None)
    world, sources = jax.process_count(), {}
    for split, ds in splits.items():
        unchanged = dict(data=data, data_name=name, columns=found, revision=None) | describe(split)
        split = "train" if len(splits) == 1 else SPLITS.get(split, split)
        how = dict(parse=parse, classes=names, retries=retries, rank=jax.process_index(), world=world)
        sources[split] = Source(ds, found, unchanged, **how)
    expect("train" in sources, f"{option} {data}: no train split among {', '.join(sources)}")
    if world > 1:
        n = sources["train"].dataset.reshard().num_shards
        expect(n >= world, f"{option} {data}: {n} shards (files or row groups) for {world} processes")
    return sources


def find_column(data, head, features, option, role, wanted):
    """The name of the column that holds the role."""
    names = [name for name in dict.fromkeys(n for row in head for n in row) if not name.startswith("__")]
    values = {name: [v for row in head if (v := row.get(name)) is not None] for name in names}
    feature = {"image": datasets.Image, "label": datasets.ClassLabel}.get(role, ())
    typed = [name for name in names if isinstance(features.get(name), feature)]
    kind = {"text": str, "label": int, "image": ()}[role]
    fitting = [name for name in names if values[name] and all(isinstance(v, kind) for v in values[name])]
    called = [name for name in (role, "label", "labels", "cls", "class") if name in names and role != "image"]
    if role == "text":
        called = called[:1] if called[:1] == ["text"] else []
    candidates = typed if len(typed) == 1 else called[:1] or (typed if typed else fitting)
    found = wanted or (candidates[0] if len(candidates) == 1 else None)
    missing = " ".join(filter(None, (f"no {role} column", found, "among", ", ".join(names))))
    expect(found in names, f"{option} {data}: {missing}; name one with --{role}-column")
    odd = next((v for v in values[found] if isinstance(v, str)), None) if role == "label" else None
    wrong = f"labels in {found} are strings ({odd!r}), expected whole numbers from 0"
    expect(odd is None, f"{option} {data}: {wrong}")
    return found


def is_local(data):
    """Whether `data` names files here, existing or not, rather than a data set on the hub or a URL."""
    looks_like_a_path = reader_of(data) or re.search(r"[*?\[\\]|^[./~]|/.*/", data)
    return not is_url(data) and (data == "stdlib" or Path(data).expanduser().exists() or looks_like_a_path)


def is_url(data):
    return re.match(r"\w+://", data)


def reader_of(path):
    path = re.sub(r"[?#].*", "", path) if is_url(path) else path
    suffixes = [s.lower() for s in Path(path).suffixes if s.lower() not in COMPRESSED]
    return READERS.get(suffixes[-1]) if suffixes else None


def open_splits(data, name, option, columns, revision=None):
    """({split: IterableDataset}, what parses its rows or None, split -> what a resume must find)."""
    if not is_local(data) and not is_url(data):
        # small blocks: a resume fetches what it needs, not all that lies before it in the file
        how = dict(revision=revision, storage_options={"hf": {"block_size": 1 << 16}})
        builder = datasets.load_dataset_builder(data, name, **how)
        return stream_splits(builder), None, partial(describe_hub_files, builder)
    path = Path(data).expanduser()
    files = [data] if is_url(data) else [str(path)]
    if path.is_dir():
        files = [file for file in files_under(path) if reader_of(file)]
        files = [file for file in files if Path(file).name != "README.md"] or files  # a data set's card
        if "image" in columns and not any(reader_of(file) in TABLES.values() for file in files):
            return open_image_folder(path, f"{option} {data}")
    elif not is_url(data) and not path.is_file():
        pattern = sysconfig.get_path("stdlib") + "/*.py" if data == "stdlib" else str(path)
        files = sorted(glob(pattern, recursive=True))
    expect(files, f"{option} {data}: no such file")
    reader = reader_of(files[0])
    formats = f"{' '.join(READERS)}, also with {' '.join(COMPRESSED)}"
    expect(reader, f"{option} {data}: cannot tell what it is from its name; expected {formats}")
    kinds = sorted({str(reader_of(file)) for file in files})
    expect(len(kinds) == 1, f"{option} {data}: holds {', '.join(kinds)}; name one kind, as in '**/*.parquet'")
    splits = {"train": files}
    if len(files) > 1:  # folders and files may name the split; of documents the first folder alone
        splits, root = {}, path if path.is_dir() else os.path.commonpath([Path(f).parent for f in files])
        for file in files:
            place = Path(file).relative_to(root)
            words = re.split(r"[^a-z]+", str(place.with_suffix("")).lower())
            words = [part.lower() for part in place.parts[:-1]][:1] if reader == "text" else words
            splits.setdefault(next((SPLITS[w] for w in words if w in SPLITS), "train"), []).append(file)
    if reader == "jsonl":  # by the line, so that a corrupt one is but one bad record
        return open_files(read_lines, splits, parse_line)
    if reader == "text":
        return open_files(read_documents, splits)
    options = dict(storage_options=url_options()) if is_url(data) else {}
    if reader in ("csv", "tsv"):
        reader, options["sep"] = "csv", "\t" if reader == "tsv" else ","
        options |= {} if has_header(files[0], options["sep"]) else {"header": None}
    as_pattern = str if is_url(data) else escape  # for one it is taken
    patterns = {split: [as_pattern(file) for file in files] for split, files in splits.items()}
    builder = datasets.load_dataset_builder(reader, data_files=patterns, **options)
    return stream_splits(builder), None, lambda split: dict(files=digest_names(splits[split]))


def files_under(folder):
    """All files in it, sorted, through links, but for hidden ones."""
    return sorted(p for p in glob(escape(str(folder)) + "/**/*", recursive=True) if os.path.isfile(p))


def url_options():
    """{protocol: options} that make a stalled read an error."""
    import aiohttp  # slow to import

    stalled = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=30, sock_read=30)}}
    return {"http": stalled, "https": stalled}


def open_files(read, splits, parse=None, features=None):
    """What open_splits returns, of our own reader `read(files)`: every file is a shard."""
    stream = partial(datasets.IterableDataset.from_generator, read, features=features)
    found = {split: stream(gen_kwargs={"files": files}) for split, files in splits.items()}
    return found, parse, lambda split: dict(files=digest_names(splits[split]))


def read_lines(files):
    for file in files:
        with open_text(file) as lines:
            yield from ({"text": line} for line in lines if not line.isspace())


def read_documents(files):
    for file in files:
        with open_text(file) as document:
            yield {"text": document.read()}


def open_text(file):
    """A local file or a URL, whatever its compression, as text."""
    options = {}
    if is_url(file):
        options = url_options().get(file.split(":")[0], {})
    return fsspec.open(file, "rt", compression="infer", encoding="utf-8", errors="replace", **options)


def stream_splits(builder):
    splits = builder.as_streaming_dataset()
    image = lambda ds: any(isinstance(f, datasets.Image) for f in (ds.features or {}).values())
    return {split: ds.decode(False) if image(ds) else ds for split, ds in splits.items()}


def open_image_folder(root, where):
    """Every image its own shard, so that an epoch is a whole permutation; its class is its folder's name."""
    splits = {}
    for path in (Path(p) for p in files_under(root) if Path(p).suffix.lower() in IMAGES):
        first, *rest = path.relative_to(root).parts
        split = SPLITS.get(first.lower(), "train") if len(rest) > 1 else "train"
        expect(rest, f"{where}: {first} is in no class folder; expected CLASS/{first} or train/CLASS/{first}")
        splits.setdefault(split, []).append(str(path))
    expect(splits, f"{where}: no images in it ({' '.join(IMAGES)}), nor data files")
    names = sorted({Path(file).parent.name for files in splits.values() for file in files})
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=names))

    def read(files):
        for file in files:
            yield {"image": {"path": file, "bytes": None}, "label": names.index(Path(file).parent.name)}

    return open_files(read, splits, features=features)


def image_bytes(value):
    """The file's content of an image record: bytes, or {"bytes", "path"} as `datasets` has it."""
    if isinstance(value, dict) and value["bytes"] is None:
        with xopen(value["path"], "rb") as file:
            return file.read()
    return value if isinstance(value, bytes) else value["bytes"]


def parse_line(row):
    """A line of jsonl as a row; None where it is none."""
    try:
        found = json.loads(row["text"])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def has_header(file, sep):
    """Whether the first line of a table names its columns: a number is no name."""
    with open_text(file) as lines:
        first = next(csv.reader(lines, delimiter=sep), [])
    return not any(re.fullmatch(r"\s*-?\d+(\.\d*)?\s*", field) for field in first)


def describe_hub_files(builder, split):
    """The digest of the files' paths, which hold the commit, and this itself: a resume asks for it."""
    files = (builder.config.data_files or {}).get(split, [])
    commit = re.search(r"@([0-9a-f]{40})/", str(files[0])) if files else None
    return dict(files=digest_names(files), revision=commit and commit[1])


def digest_names(files):
    """Digest of the names of files, and where they are here of their sizes."""
    sizes = [(str(f), os.path.getsize(f) if os.path.exists(f) else 0) for f in files]
    return hashlib.sha256(repr(sorted(sizes)).encode()).hexdigest()[:16]


# ---- streams ----

# a truncated body may look like a broken file: those are tried again, but not for long
BROKEN = (pa.ArrowException, EOFError, UnicodeError, zlib.error, tarfile.TarError, DatasetsError)


def is_transient(error):
    """Whether a fault of the network or the disk, as the libraries beneath raise it, that may pass."""
    http = HfHubHTTPError.__bases__  # the root of the http library that the hub uses
    return isinstance(error, (OSError, *http)) or type(error).__module__.startswith("aiohttp")


def is_busy(error):
    """Whether a server said in whatever wrapping: not now."""
    while error:
        status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
        if isinstance(status, int) and (status in (408, 429) or status >= 500):
            return True
        error = error.__cause__ or error.__context__
    return False


def reason(error):
    return first_line(error.__cause__ or error)  # some libraries wrap, and tell nothing


def wait(what, failures, retries):
    pause = min(2 ** (failures - 1), 60)
    tqdm.write(f"data: {what}; try {failures} of {retries} in {pause} s", file=sys.stderr)
    time.sleep(pause)


class Rows:
    """The rows of one source for ever, epoch after epoch; one that fails is opened again where it was.

    `open_epoch(epoch)` is an IterableDataset. StreamError after `retries` failures in a row.
    """

    def __init__(self, open_epoch, epoch=0, state=None, retries=8, once=False):
        self.open_epoch, self.epoch, self.state = open_epoch, epoch, state
        self.retries, self.once, self.ahead = retries, once, 0  # rows given since the state was taken

    def position(self):
        """Where to go on after the row last given."""
        if self.ahead:
            self.state, self.ahead = self.dataset.state_dict(), 0
        return {"epoch": self.epoch, "state": self.state}

    def __iter__(self):
        failures = 0
        while True:
            try:
                self.dataset = self.open_epoch(self.epoch)
                self.dataset.load_state_dict(self.state)
                for row in islice(self.dataset, self.ahead, None):
                    failures, self.ahead = 0, self.ahead + 1
                    yield row
                if self.once:
                    return
                if not self.ahead and self.state is None:
                    raise StreamError("an epoch without a row: the data is too short, or all held out")
                self.epoch, self.state, self.ahead = self.epoch + 1, None, 0
            except Exception as error:
                if isinstance(error, BROKEN):
                    retries = min(self.retries, 2)
                elif is_transient(error):
                    retries = self.retries
                elif isinstance(error, RunError):
                    raise
                else:  # pandas, pyarrow, lzma, zstandard and others have kinds of their own
                    what = f"{type(error).__name__}: {reason(error)}"
                    raise StreamError(f"the data cannot be read: {what}") from error
                failures, what = failures + 1, reason(error)
                if failures > retries:
                    raise StreamError(f"the data failed {failures} times in a row: {what}") from error
                wait(what, failures, retries)


def batches(open_epochs, batch_size, *, seed=0, weights=(), position=None, retries=8):
    """Yield ({column: array (batch_size, ...)}, position) for ever; a call with a position goes on after it.

    Each of `open_epochs` opens an epoch of one source, as in Rows; every row comes from one of the sources,
    drawn with `weights`. A batch may hold rows of two epochs: none is dropped. `position` is JSON.
    """
    position = position or {"batch": 0, "bad": 0, "sources": [{} for _ in open_epochs]}
    sources = [Rows(f, **p, retries=retries) for f, p in zip(open_epochs, position["sources"])]
    rows, n, bad = [iter(source) for source in sources], position["batch"], position["bad"]
    shares = np.array(weights or [1] * len(sources)) / sum(weights or [1] * len(sources))
    while True:
        drawn = np.random.default_rng([seed, n]).choice(len(sources), batch_size, p=shares)
        batch = [next(rows[i]) for i in drawn]
        n, bad = n + 1, bad + sum(row.get("skipped", 0) for row in batch)
        columns = {name: np.stack([row[name] for row in batch]) for name in batch[0] if name != "skipped"}
        yield columns, {"batch": n, "bad": bad, "sources": [source.position() for source in sources]}


class Prefetch:
    """Runs a generator ahead in a thread, at most `depth` items; its exception is raised where it is read.

    `waited` counts the seconds that the reader stood still. Iteration ends early when `stop()` is true.
    """

    def __init__(self, items, depth, stop=lambda: False):
        self.queue, self.stop, self.closed, self.waited = queue.Queue(depth), stop, threading.Event(), 0.0
        self.thread = threading.Thread(target=self.fill, args=(items,), name="prefetch", daemon=True)
        self.thread.start()

    def fill(self, items):
        try:
            for item in items:
                self.put(item)
                if self.closed.is_set():
                    return
            self.put(StopIteration())
        except BaseException as error:  # a panic in Rust is no Exception
            self.put(error)

    def put(self, item):
        while not self.closed.is_set():
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        while not self.stop():
            try:
                item = self.queue.get(timeout=0.1)
            except queue.Empty:
                continue
            finally:
                start, waited = time.perf_counter(), time.perf_counter() - start
                self.waited += waited
            if isinstance(item, BaseException):
                raise item
            return item
        raise StopIteration

    def close(self):
        self.closed.set()
        self.thread.join(timeout=2)


# ---- devices ----

# dense bf16 FLOP/s by device kind, from the makers' data sheets; without an entry there is no mfu
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
PEAK_FLOPS |= {"L40S": 362e12, "L4": 121e12, "T4": 65e12, "V100": 125e12, "RTX 4090": 165e12}
PEAK_FLOPS |= {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}


def peak_flops():
    """bf16 FLOP/s of all devices together, or None where their kind is not in the table."""
    kind = jax.devices()[0].device_kind
    known = (flops for name, flops in PEAK_FLOPS.items() if re.search(rf"{name}\b", kind))
    return next((flops * jax.device_count() for flops in known), None)


def attention_kernel(q):
    """How jax.nn.dot_product_attention is to treat queries (B, T, H, D): "cudnn", or None for XLA's own way.

    cuDNN's kernels are for bfloat16, heads of certain sizes, and NVIDIA's GPUs since Ampere.
    """
    (B, _, _, D), device = q.shape, jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))  # 9.0 of an H100, gfx942 of AMD's
    recent = re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8
    fits = q.dtype == jnp.bfloat16 and D % 8 == 0 and D <= 128
    cut = B % jax.device_count() == 0  # by rows; a few prompts may come cut by heads, which it refuses
    return "cudnn" if recent and fits and cut else None


def make_mesh():
    """All devices in a row. Auto: under explicit axes, now jax's default, nnx.Embed refuses a cut batch."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh):
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(mesh, batch):
    """Put this process's rows of a batch, host arrays (B / processes, ...), on the mesh, cut along B."""
    cut = NamedSharding(mesh, PartitionSpec("data"))
    if jax.process_count() == 1:
        return jax.device_put(batch, cut)
    return jax.make_array_from_process_local_data(cut, batch)


def shard_whole_batch(mesh, batch):
    """The same of host arrays (B, ...) that every process holds whole."""
    cut = NamedSharding(mesh, PartitionSpec("data"))
    if jax.process_count() == 1:
        return jax.device_put(batch, cut)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, cut, x.__getitem__), batch)


def to_host(array):
    """A whole array, wherever its pieces are, as numpy; every process must ask for it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def gather(value):
    """The JSON `value` of every process, in a list."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    size = -(-int(sizes.max()) // 4096) * 4096  # few sizes are to be compiled
    rows = multihost_utils.process_allgather(np.pad(data, (0, size - len(data))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def on_first(function):
    """What `function` returns on process 0, which alone calls it, as JSON; or raise its UsageError."""
    if jax.process_count() == 1:
        return function()
    found = {}
    if jax.process_index() == 0:
        try:
            found = {"value": function()}
        except UsageError as error:
            found = {"error": str(error)}
    found = gather(found)[0]
    expect("error" not in found, found.get("error"))
    return found["value"]


def shard_state(mesh, state, fsdp):
    """Copy a state to every device, or with fsdp cut each array along the largest axis that divides."""

    def sharding(x):
        axes = [a for a, size in enumerate(x.shape) if fsdp and size % mesh.size == 0]
        largest = max(axes, key=lambda a: x.shape[a], default=None)
        return NamedSharding(mesh, PartitionSpec(*("data" if a == largest else None for a in range(x.ndim))))

    return jax.device_put(state, jax.tree.map(sharding, state))


# ---- pretrained files ----


def snapshot(path, option, patterns):
    """The local folder of a folder, a run directory or a hub id (there only files that match `patterns`)."""
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    expect(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path), f"{option} {path}: no such folder, and not a hub id")
    try:
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:
        raise UsageError(f"{option} {path}: no such folder, nor on the hub: {first_line(error)}") from error


def read_config(kinds, folder, path):
    """The transformers config in `folder`, of one of the classes `kinds`; UsageError where there is none."""
    file = folder / "config.json"
    expect(file.exists(), f"--init-from {path}: no config.json in it")
    found = json.loads(file.read_text()).get("model_type")
    known = {kind.model_type: kind for kind in kinds}
    expect(found in known, f"--init-from {path}: a {found} model, expected {' or '.join(known)}")
    return known[found].from_pretrained(folder)


def read_weights(folder, path):
    """{name: array} of model.safetensors, whole or in pieces."""
    index = folder / "model.safetensors.index.json"
    pieces = json.loads(index.read_text())["weight_map"].values() if index.exists() else ["model.safetensors"]
    weights = {}
    for file in sorted(set(pieces)):
        expect((folder / file).exists(), f"--init-from {path}: no {file} in it")
        weights |= load_file(folder / file)
    return weights


# ---- the run directory ----

# flags that may change when a run goes on; every other one is part of what its checkpoints mean
FREE = "steps accum lr min_lr warmup_steps weight_decay grad_clip dropout remat fsdp out_dir resume overwrite"
FREE += " retries keep log_every eval_every eval_batches sample_every ckpt_every wandb"
FREE += " coordinator num_processes process_id profile"
FREE += " prompt max_new_tokens temperature top_k top_p momentum label_smoothing mixup"


def newest_run(script):
    runs = [path.parent for path in Path("out").glob(f"{script.split('_')[0]}-*/run.json")]
    expect(runs, f"--resume: no run of {script}.py under out/; name one with --out-dir")
    return max(runs, key=lambda run: (run / "run.json").stat().st_mtime)


def read_run(out_dir):
    path = Path(out_dir) / "run.json"
    expect(path.exists(), f"--resume: {out_dir} holds no run (no run.json)")
    return json.loads(path.read_text())


def write_atomic(path, text):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def flatten(state):
    """({path: leaf}, tree) of a pytree."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}, tree


def explain(error):
    """Raise what a JaxRuntimeError of a step means to the user, where that is known."""
    if "RESOURCE_EXHAUSTED" in str(error):
        advice = "a smaller --batch-size, a higher --accum, --remat, or --fsdp on several devices"
        raise RunError(f"out of memory on the device; try {advice}: {first_line(error)}") from error
    if jax.process_count() > 1:  # what the collectives say of it is of many kinds
        lost = f"process {jax.process_index()} lost another one: {first_line(error)}"
        print(f"{lost}; start them all again with --resume", file=sys.stderr, flush=True)
        os._exit(1)  # saving and saying goodbye would wait for it


COMPILED = [0.0]  # seconds that compiling took


def note_compilation(event, seconds, **_):
    if event.endswith("backend_compile_duration"):
        COMPILED[0] += seconds


jax.monitoring.register_event_duration_secs_listener(note_compilation)


class Run:
    """A run directory: run.json, metrics.jsonl, curves.png, ckpt/STEP. It never takes over what is not ours.

    `stop` is the number of the signal (Ctrl-C, SIGTERM) that asked the run to save and end, or None.
    `write_folder(dir)` writes what a resume needs beside checkpoints, before run.json makes it a run.
    """

    def __init__(self, kind, cfg, data, write_folder):
        if cfg.wandb:
            expect(importlib.util.find_spec("wandb"), f"--wandb {cfg.wandb}: needs `pip install wandb`")
        self.cfg, self.stop, self.asked, self.handlers = cfg, None, 0, {}
        self.leads, self.votes, self.mesh = jax.process_index() == 0, deque(), make_mesh()
        self.most = jax.jit(jnp.max, out_shardings=replicated(self.mesh))
        info = json.loads(json.dumps(dict(config=dataclasses.asdict(cfg), data=data)))  # tuples as lists
        mine = info | {"config": info["config"] | dict(coordinator=None, process_id=None)}
        same = all(theirs == mine for theirs in gather(mine))
        expect(same, "the processes have other flags or see other data; all need the same")
        try:
            self.dir = Path(on_first(partial(self.begin, kind, info, write_folder)))
        except OSError as error:
            raise UsageError(f"--out-dir {cfg.out_dir or 'out'}: {error}") from error
        options = ocp.CheckpointManagerOptions(max_to_keep=cfg.keep, cleanup_tmp_directories=True)
        self.checkpoints = ocp.CheckpointManager((self.dir / "ckpt").absolute(), options=options)
        self.saved = self.checkpoints.latest_step()
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def begin(self, kind, info, write_folder):
        """Claim the directory, or with --resume check it, and describe the run in it; its path."""
        self.dir = self.claim(kind)
        info["id"] = f"{self.dir.name}-{os.urandom(4).hex()}"  # for Weights & Biases, where names recur
        if self.cfg.resume:
            old = read_run(self.dir)
            self.check_unchanged(old, info)
            info["id"] = old.get("id", self.dir.name)
        else:
            write_folder(self.dir)
        info["config"] |= dict(out_dir=str(self.dir), resume=False, overwrite=False, profile=None)
        info["config"] |= dict(coordinator=None, num_processes=None, process_id=None)
        info |= dict(device=jax.devices()[0].device_kind, devices=jax.device_count())
        libraries = ("jax", "flax", "optax", "datasets", "transformers", "numpy")
        info |= {name: version(name) for name in libraries} | {"python": platform.python_version()}
        self.info = info
        if not self.cfg.resume:  # else once the checkpoint is restored
            self.describe()
        return str(self.dir)

    def describe(self):
        write_atomic(self.dir / "run.json", json.dumps(self.info, indent=1) + "\n")

    def claim(self, kind):
        """The directory of this run: a new numbered one, or --out-dir where that is free or ours to take."""
        while self.cfg.out_dir is None:
            numbers = [path.name.removeprefix(f"{kind}-") for path in Path("out").glob(f"{kind}-*")]
            number = max((int(n) for n in numbers if n.isdigit()), default=0) + 1
            path = Path("out") / f"{kind}-{number:03d}"
            with suppress(FileExistsError):  # another run was faster
                path.mkdir(parents=True)
                return path
        path, ours = Path(self.cfg.out_dir), (Path(self.cfg.out_dir) / "run.json").exists()
        if path.exists() and not self.cfg.resume and (path.is_file() or any(path.iterdir())):
            expect(ours, f"--out-dir {path}: not empty and not a run; choose another directory")
            choices = "--resume to go on with it, --overwrite to start again, or choose another directory"
            expect(self.cfg.overwrite, f"--out-dir {path}: holds a run already; {choices}")
            start = self.cfg.init_from and Path(self.cfg.init_from).expanduser().resolve()
            lost = f"--init-from {path}: --overwrite would delete it; choose another directory"
            expect(start != path.resolve(), f"--out-dir {path} {lost}")
            if os.path.lexists(path / "ckpt"):
                shutil.rmtree(path / "ckpt")
            for name in ("run.json", "metrics.jsonl", "curves.png", "predictions.png", "model.safetensors"):
                (path / name).unlink(missing_ok=True)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def check_unchanged(self, old, new):
        for name, value in new["config"].items():
            was = old["config"].get(name, value)
            started = f"{flag(name)} {value}: the run in {self.dir} was started with {was}"
            expect(name in FREE.split() or value == was, f"{started}; start a new run to change it")
        for name, value in new["data"].items():
            was = old["data"].get(name, value)
            changed = f"{name} of the data is {value}, and was {was} when {self.dir} began"
            expect(value == was, f"--resume: {changed}; it would go on with other rows")

    def on_signal(self, number, _frame):
        self.asked = number
        if jax.process_count() == 1:  # several agree on it in vote()
            self.stop = number
        signal.signal(number, self.handlers[number])  # a second one ends at once
        name = signal.Signals(number).name
        tqdm.write(f"{name}: saving soon; once more to quit at once", file=sys.stderr)

    def restore(self, state):
        """(step, state, position) of the newest checkpoint, sharded like `state`; or (0, state, None)."""
        steps, step = self.cfg.steps, self.saved or 0
        expect(step <= steps, f"--steps {steps}: the run in {self.dir} is at step {step} already")
        lines, position = self.read_lines(), None
        done = lines[-1]["step"] if lines else 0
        lost = self.saved is None and done > 2 * self.cfg.ckpt_every
        expect(not lost, f"--resume: {self.dir} has no checkpoint any more, and was at step {done}")
        if self.saved is not None:
            flat, tree = flatten(state)
            like = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in flat.items()}
            args = ocp.args.Composite(state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore())
            found = self.checkpoints.restore(self.saved, args=args)
            state = jax.tree.unflatten(tree, [found["state"][name] for name in flat])
            position = found["position"][jax.process_index()]
        lines = [line for line in lines if line["step"] <= step]  # the rest comes again
        self.last = lines[-1] if lines else {}
        if self.leads and self.cfg.resume:
            write_atomic(self.dir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
            self.describe()
        return step, state, position

    def save(self):
        """Write a checkpoint of the last step while training goes on; never one that is not finite."""
        self.flush()
        step, state, position = self.latest
        if step != self.saved:
            positions = ocp.args.JsonSave(gather(position))
            args = dict(state=ocp.args.StandardSave(flatten(state)[0]), position=positions)
            self.checkpoints.save(step, args=ocp.args.Composite(**args))
            self.saved = step

    def read_lines(self):
        """The lines of metrics.jsonl, but for one that a kill cut short."""
        path = self.dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    @contextmanager
    def training(self, step, unit, per_step, flops, stream):
        """Around the loop: keeps the clock, and saves at a signal and when the stream gives up.

        `per_step`: `unit`s (tokens, images) in a step; `flops`: to train on one; `stream`: a Prefetch.
        """
        self.unit, self.per_step, self.stream = unit, per_step, stream
        self.flops, self.peak = flops, peak_flops()
        self.pending, self.due, self.first, self.latest = [], None, step + 1, None
        self.mark = np.array([step, time.perf_counter(), 0])  # step, time and seconds waited at the last line
        self.timed = np.zeros(3)  # the same, summed over all lines but the first, which holds the compilation
        how = dict(disable=None if self.leads else True, dynamic_ncols=True, unit="step")
        self.bar = tqdm(total=self.cfg.steps, initial=step, **how)
        self.compiled, self.profiled = COMPILED[0], None
        self.wandb = None
        if self.cfg.wandb and self.leads:
            import wandb

            names = dict(project=self.cfg.wandb, name=self.dir.name, id=self.info["id"], dir=str(self.dir))
            self.wandb = wandb.init(config=dataclasses.asdict(self.cfg), resume="allow", **names)
        try:
            yield
            if self.latest:
                self.save()
        except StreamError:
            if self.latest and jax.process_count() == 1:  # the others wait in the next step
                self.save()
            raise
        except jax.errors.JaxRuntimeError as error:
            explain(error)
            raise
        finally:
            stream.close()
            self.bar.close()
            if self.profiled == "under way":
                jax.profiler.stop_trace()
            self.checkpoints.close()  # waits for the last checkpoint
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            if self.wandb:
                self.wandb.finish()
        self.sum_up()

    def sum_up(self):
        """Say how fast it went; where a signal ended it, say how to go on, and exit."""
        steps, seconds, waited = self.timed
        most = peak_memory()
        memory = f"peak memory {most / 1e9:.2f} GB" if most else "peak memory unknown"
        if stats := jax.local_devices()[0].memory_stats():
            memory += f", of a device {stats['peak_bytes_in_use'] / 1e9:.2f} GB"
        parts = [memory, f"compiling {COMPILED[0] - self.compiled:.1f} s"]
        if steps:
            rate = steps * self.per_step / seconds
            speed = [f"{rate:,.0f} {self.unit}/s", f"{seconds / steps * 1000:.0f} ms a step"]
            speed += [f"mfu {rate * self.flops / self.peak:.1%}"] if self.peak else []
            parts = [*speed, f"data wait {waited / seconds:.2%}", *parts]
        parts.append(f"{time.perf_counter() - STARTED:.0f} s in all")
        print(", ".join(parts))
        if self.stop and (self.saved or 0) < self.cfg.steps:
            where = f"saved at step {self.saved}" if self.saved else "not one step was finished"
            print(f"stopped, {where}; go on with --resume --out-dir {self.dir}", flush=True)
            sys.exit(128 + self.stop)

    def step(self, step, state, position, metrics):
        """Note a dispatched step. Its metrics stay on the device until the next step is under way."""
        if self.due:
            self.flush()
        self.latest = step, state, position
        if jax.process_count() > 1:
            self.vote()
        if self.cfg.profile and step - self.first in (8, 14):
            jax.block_until_ready(metrics)
            self.record()
        self.pending.append((step, metrics))
        self.bar.update()
        if step == self.first:
            jax.block_until_ready(metrics)
            spare_memory()
            self.say(f"first step {time.perf_counter() - STARTED:.1f} s after the start")
        if step % self.cfg.log_every == 0 or step % self.cfg.eval_every == 0 or step == self.cfg.steps:
            self.due, self.bad = step, position["bad"]

    def vote(self):
        """Agree with the other processes on the step to stop after; answers are read two steps later."""
        asked = np.full(jax.local_device_count(), self.asked, np.int32)
        self.votes.append(self.most(shard_batch(self.mesh, asked)))
        if len(self.votes) > 2:
            self.stop = int(self.votes.popleft()) or None

    def record(self):
        """Begin a trace for --profile, and end it at the second call."""
        if self.profiled is None:
            self.profiled = "under way"
            jax.profiler.start_trace(self.cfg.profile)
        else:
            self.profiled = "done"
            jax.profiler.stop_trace()
            self.say(f"a profile of steps 10 to 15 is in {self.cfg.profile}")

    def flush(self, **extra):
        """Fetch the pending metrics, stop at one that is not finite, and write the line that is due."""
        fetched, self.pending = jax.device_get(self.pending), []
        for step, metrics in fetched:
            if not np.isfinite([*metrics.values()]).all():
                found = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
                saved = f"the last good checkpoint is step {self.saved or 'none'}"
                advice = "try a lower --lr, more --warmup-steps or --grad-clip 1"
                raise RunError(f"step {step}: {found}; {saved}; {advice}")
        if not self.due:
            return
        mark = np.array([self.due, time.perf_counter(), self.stream.waited])
        steps, seconds, waited = mark - self.mark
        if self.mark[0] + 1 != self.first:  # the first line holds the compilation
            self.timed += mark - self.mark
        self.mark = mark
        rate, metrics = steps * self.per_step / seconds, dict(fetched)[self.due]
        line = {"step": self.due} | {name: float(value) for name, value in metrics.items()}
        line |= {self.unit: self.due * self.per_step, f"{self.unit}_per_s": rate}
        line |= {"mfu": rate * self.flops / self.peak if self.peak else None, "data_wait": waited / seconds}
        line |= {"bad_records": self.bad}
        self.last, self.due = line | extra, None
        if self.leads:
            with open(self.dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(self.last) + "\n")
        if self.wandb:
            self.wandb.log(self.last, step=self.last["step"])
        text = f"loss {line['loss']:.3f} lr {line['lr']:.1e} {rate:,.0f} {self.unit}/s"
        text += (f" mfu {line['mfu']:.1%}" if self.peak else "") + f" wait {line['data_wait']:.1%}"
        self.bar.set_postfix_str(text)
        if extra or self.bar.disable:
            self.say(f"step {line['step']}: {text}" + "".join(f" {k} {v:.4f}" for k, v in extra.items()))
        if extra and self.leads:
            with self.pause():
                self.draw()

    @contextmanager
    def pause(self):
        """Stop the clock for an evaluation or a sample."""
        jax.block_until_ready(self.pending)
        start = time.perf_counter()
        yield
        self.mark[1] += time.perf_counter() - start

    def say(self, text):
        tqdm.write(text)
        sys.stdout.flush()

    def draw(self):
        """curves.png: losses, the other validation figures, gradient norm and learning rate, by step."""
        from matplotlib.figure import Figure  # half a second to import

        lines = self.read_lines()
        scores = [[name] for name in lines[-1] if name.startswith("val_") and name != "val_loss"]
        panels = [["loss", "val_loss"], *scores, ["grad_norm"], ["lr"]]
        figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
        for axes, names in zip(figure.subplots(1, len(panels)), panels):
            for name in names:
                points = [(line["step"], line[name]) for line in lines if name in line]
                axes.plot(*zip(*points), marker="." if name.startswith("val") else "", label=name)
            axes.set_xlabel("step")
            axes.legend(frameon=False)
        figure.savefig(self.dir / "curves.tmp.png", dpi=100)
        os.replace(self.dir / "curves.tmp.png", self.dir / "curves.png")
