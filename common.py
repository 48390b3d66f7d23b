"""What a reader may skip: command line, data, streams, devices, pretrained files, run directories."""

import csv
import ctypes
import dataclasses
import hashlib
import inspect
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from glob import escape, glob
from importlib import import_module
from importlib.metadata import version
from itertools import chain, count, islice
from pathlib import Path
from typing import get_type_hints

STARTED = time.perf_counter()
IS_PROGRAM = Path(getattr(sys.modules["__main__"], "__file__", None) or "").parent == Path(__file__).parent
if IS_PROGRAM and sys.platform == "linux":
    # glibc hands big buffers back after every step, 20-30 % of a step on a CPU: tell it to keep them
    with suppress(AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
if IS_PROGRAM and not any(arg.startswith("--mteb") for arg in sys.argv):
    sys.modules.setdefault("torch", None)  # transformers would import it: two seconds, for nothing
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": we know

import datasets
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pyarrow.parquet as pq
import transformers
import tyro
from datasets.distributed import split_dataset_by_node
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.utils.file_utils import xopen
from flax import nnx
from huggingface_hub import HfFileSystem, dataset_info, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

if sys.modules.get("torch", "") is None:
    del sys.modules["torch"]


class UsageError(ValueError):
    """A flag or a file that the user can mend. On the command line: one line and exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on. On the command line: one line and exit code 1."""


def expect(condition, message):
    """Raise UsageError(message) unless the condition holds."""
    if not condition:
        raise UsageError(message)


def in_brief(error):
    if isinstance(error, UsageError):
        return str(error)
    error = error.__cause__ or error  # some libraries wrap, and tell nothing
    if "check your connection" in str(error):  # the hub may have said 429
        while inner := error.__cause__ or error.__context__:
            error = inner
    text = repr(error) if isinstance(error, LookupError) else str(error)
    return " ".join(text.split())[:300] or type(error).__name__


@contextmanager
def blame(where):
    """Any error is a UsageError that names `where`; libraries raise some twenty kinds."""
    try:
        yield
    except Exception as error:
        ours = RunError | ModuleNotFoundError | NameError  # the last of a slip in code that was changed
        if isinstance(error, ours) or str(error).startswith(where):
            raise
        raise UsageError(f"{where}: {in_brief(error)}") from error


# ---- command line ----


@dataclasses.dataclass
class RunConfig:
    """The flags of every script that change no number. A resume may change all but num_processes."""

    out_dir: str | None = None  # directory of the run; else the next free out/gpt-001, out/gpt-002, ...
    resume: bool = False  # go on with the run in out_dir, or with the newest one
    overwrite: bool = False  # delete the run in out_dir and start again
    log_every: int = 10  # steps between two lines of metrics.jsonl
    eval_every: int = 250  # steps between two validations, which redraw curves.png
    ckpt_every: int = 250  # steps between two checkpoints
    keep: int = 2  # newest checkpoints to keep
    retries: int = 8  # times in a row that remote data are opened again when they fail
    fsdp: bool = False  # shard parameters and optimizer state over the devices
    profile: str | None = None  # directory for a trace of steps 10 to 15, for TensorBoard or XProf
    wandb: str | None = None  # project on Weights & Biases to log to
    coordinator: str | None = None  # HOST:PORT of process 0 where several train together; auto on a cluster
    num_processes: int | None = None  # how many these are
    process_id: int | None = None  # which of them this one is, from 0


def cli(Config, presets, main, doc):
    """Make a Config of the command line and run `main` with it."""
    script, code = Path(sys.argv[0]).stem, 1
    sys.stdout.reconfigure(line_buffering=True)  # where it goes to a file, too
    for library in ("datasets", "huggingface_hub", "transformers", "absl"):  # they say it in exceptions
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "nanoflax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # there are many small ones
    try:
        defaults = Config(**read_defaults(Config, presets, script))
        cfg = parse_flags(Config, defaults, prog=f"{script}.py", description=doc)
        join_processes(cfg)
        main(cfg)
        code = 0
    except (UsageError, RunError) as error:
        print(f"{script}.py: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2 if isinstance(error, UsageError) else 1
    except ModuleNotFoundError as error:
        package = {"sklearn": "scikit-learn"}.get(error.name, error.name)
        print(f"{script}.py: needs `pip install {package}`", file=sys.stderr)
        code = 2
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:  # before training, which saves
        code = 130
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    # at its own end the interpreter would wait for lost processes, and for threads that wait for the network
    reads = any(thread.name.startswith("ahead") for thread in threading.enumerate())
    if reads or (code and jax.distributed.is_initialized()):
        os._exit(code)
    sys.exit(code)


def read_defaults(Config, presets, script):
    """{field: default} of the preset on the command line, or with --resume of the run.json of that run."""
    early = tyro.cli(Config, args=[arg for arg in sys.argv[1:] if arg not in ("-h", "--help")])
    defaults = {"preset": early.preset} | presets[early.preset]
    given = {arg.partition("=")[0].replace("_", "-") for arg in sys.argv[1:]}
    for flag, its in {"--data": "data_name", "--init-from": "tokenizer"}.items():
        if flag in given:  # the preset's was for the preset's
            defaults.pop(its, None)
    if early.resume:
        runs = sorted(Path("out").glob(f"{script.split('_')[0]}-*/run.json"), key=os.path.getmtime)
        folder = early.out_dir or (runs[-1].parent if runs else "out")
        defaults = read_run(folder)["config"] | {"out_dir": str(folder)}
        others = ", ".join(sorted({*defaults} - {*Config.__dataclass_fields__}))
        expect(not others, f"--resume: {folder} is no run of {script}.py, which has no {others}")
        defaults = {name: tuple(v) if isinstance(v, list) else v for name, v in defaults.items()}
    if "--prompt" in given:  # it adds to the default, which on a resume is the run's
        defaults.pop("prompt", None)
    return defaults


def parse_flags(Config, defaults, **options):
    """The Config of the command line. A comment of one word in its source heads a group of --help."""
    hints, fields = get_type_hints(Config, include_extras=True), []
    groups = {"preset": fields}
    for word, name in re.findall(r"^    (?:# (\w+)$|(\w+):)", inspect.getsource(Config), re.M):
        if word:
            fields = groups[word] = []
        elif name in hints:
            fields.append((name, hints[name]))
    parts = {word: dataclasses.make_dataclass("Config", fields) for word, fields in groups.items()}
    for part in parts.values():
        part.__module__ = Config.__module__  # tyro reads the comments there, on what each flag is
    parts["run"] = RunConfig
    given = lambda part: part(**{name: getattr(defaults, name) for name in part.__dataclass_fields__})
    nested, default = dataclasses.make_dataclass("Flags", parts.items()), map(given, parts.values())
    flags = tyro.cli(nested, default=nested(*default), config=(tyro.conf.OmitArgPrefixes,), **options)
    return Config(**{name: value for part in vars(flags).values() for name, value in vars(part).items()})


def read_run(out_dir):
    """The run.json of the run in out_dir."""
    path = Path(out_dir) / "run.json"
    expect(path.exists(), f"--resume: {out_dir} holds no run (no run.json)")
    return json.loads(path.read_text())


def join_processes(cfg):
    """Make this process one of several with --coordinator; then only the first one prints."""
    n, i, address = cfg.num_processes, cfg.process_id, cfg.coordinator
    if address is None:
        expect((n, i) == (None, None), "--num-processes and --process-id: need --coordinator HOST:PORT")
        return
    given = {}  # auto asks SLURM, Open MPI, Kubernetes or the cloud
    if address != "auto":
        expect(":" in address, f"--coordinator {address}: needs HOST:PORT, or auto")
        given = dict(coordinator_address=address, num_processes=n, process_id=i)
        given["cluster_detection_method"] = "deactivate"
    with blame(f"--coordinator {address}, --num-processes {n}, --process-id {i}"):
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=30)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def check(cfg, at_least_one, not_negative=(), below_one=()):
    """What every script asks of its flags, and that those named are so, or None."""
    flag = lambda name: f"--{name.replace('_', '-')} {getattr(cfg, name)}"
    for name in (*at_least_one, "batch_size", "device_rows", "log_every", "eval_every", "ckpt_every", "keep"):
        expect(getattr(cfg, name) is None or getattr(cfg, name) > 0, f"{flag(name)}: must be at least 1")
    rates = ("lr", "min_lr", "weight_decay", "grad_clip")
    for name in (*not_negative, *rates, "steps", "retries", "warmup_steps", "seed"):
        expect(0 <= getattr(cfg, name) < math.inf, f"{flag(name)}: must be finite and not negative")
    expect(cfg.seed < 1 << 63, f"{flag('seed')}: must be below 2**63")
    for name in (*below_one, "dropout"):
        expect(0 <= (getattr(cfg, name) or 0) < 1, f"{flag(name)}: must be in [0, 1)")
    expect(0 <= cfg.cooldown <= 1, f"{flag('cooldown')}: must be in [0, 1]")
    expect(cfg.steps or not cfg.resume, "--resume: has nothing to do with --steps 0; use --init-from instead")
    expect(cfg.steps or cfg.init_from, "--steps 0: trains nothing; name a finished model with --init-from")
    expect(not cfg.profile or cfg.steps >= 15, f"{flag('profile')}: records steps 10 to 15 of {cfg.steps}")
    expect(cfg.data, "--data: names no data")
    for name, value in vars(cfg).items():
        values = value if isinstance(value, tuple) else (value,)
        expect(name == "prompt" or "" not in values, f"{flag(name)}: is empty")
    for name in ("data_name", "data_weights"):
        expect(len(getattr(cfg, name)) in (0, len(cfg.data)), f"{flag(name)}: expected one for each --data")
    positive = all(0 < weight < math.inf for weight in cfg.data_weights)
    expect(positive, f"{flag('data_weights')}: must be above 0")


def microbatches(cfg):
    """How many a step is cut into: --accum, or as few as leave a device --device-rows rows at most."""
    rows, devices = cfg.batch_size, jax.device_count()
    possible = [n for n in range(1, rows + 1) if rows % (n * devices) == 0]
    fitting = [n for n in possible if rows <= n * devices * cfg.device_rows]
    accum = min(fitting, default=1) if cfg.accum is None else cfg.accum
    unit = f"a multiple of {accum * devices} (--accum {accum} x {devices} devices)"
    expect(accum in possible, f"--batch-size {rows}: must be {unit}; --accum can be {possible}")
    return accum


# ---- data: a name on the command line -> datasets.IterableDataset ----

KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv"}
KINDS |= {".tsv": "tsv", ".tar": "webdataset", ".txt": "text", ".md": "text", ".py": "text"}
KINDS |= dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".webp", ".bmp", ".gif"), "images")
KINDS |= dict.fromkeys((".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".avif", ".heic"), "images")
SPLITS = {word: str(split) for split, words in datasets.data_files.SPLIT_KEYWORDS.items() for word in words}
BAD = "__bad__"  # of what could not be read, in a record's place: {BAD: why}


@dataclasses.dataclass
class Source:
    """One of --data, opened. `splits`: {"train", perhaps "validation" and "test": IterableDataset}."""

    splits: dict
    columns: dict  # {role: column}; roles are text, label, image
    classes: list | None = None  # names of the labels, where they have names
    retries: int = 0  # what comes over a network is opened again, what lies here is not
    unchanged: dict = dataclasses.field(default_factory=dict)  # what a resume must find again

    @property
    def validation(self):
        """The name of the split to validate on: "train" where none is set apart."""
        return next(name for name in ("validation", "test", "train") if name in self.splits)


def open_data(cfg, roles, field="data"):
    """[Source] of each --data, or with `field` of each --val-data. Raises UsageError.

    `roles`: {text, label or image: name of its column, or None to find it}.
    """
    names, configurations = getattr(cfg, field), cfg.data_name if field == "data" else ()
    limit = datasets.config  # theirs hide a fault for minutes; ours are low, then Stream opens the data again
    limit.STREAMING_READ_MAX_RETRIES, limit.STREAMING_READ_RETRY_INTERVAL = 2, 1
    limit.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 1
    limit.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 1
    if any("://" in name for name in names):
        import aiohttp  # slow to import

        stalled = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=30, sock_read=30)}}
        fsspec.config.conf |= {"http": stalled, "https": stalled}
    data_then = read_run(cfg.out_dir)["data"] if cfg.resume and cfg.out_dir else {}
    sources = []
    for i, name in enumerate(names):
        configuration = configurations[i] if configurations and configurations[i] != "-" else None
        commit = data_then.get(f"commit of {i} {name}")  # a resume reads what the run began with
        with blame(f"--{field.replace('_', '-')} {name}"):
            sources.append(open_source(name, configuration, commit, roles, cfg.retries))
    return sources


def open_source(name, configuration, commit, roles, retries):
    name = sysconfig.get_path("stdlib") + "/*.py" if name == "stdlib" else name
    if name.startswith("hf://datasets/"):  # as it is now, or was when the run began
        at = HfFileSystem().resolve_path(name)
        commit = commit or dataset_info(at.repo_id, revision=at.revision).sha
        name = f"hf://datasets/{at.repo_id}@{commit}/{at.path_in_repo}"
    path, files = Path(name).expanduser(), {}
    is_made = name in ("digits", "synthetic")
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)
    is_hub_id = is_id and not (is_made or path.exists() or kind_of(name))
    expect(not configuration or is_hub_id or path.is_dir(), f"has no configuration {configuration}")
    card = path / "README.md"
    has_card = card.is_file() and re.search("^configs:", card.read_text(errors="replace"), re.M)
    if is_made:
        splits = built_in(name, roles)
    elif is_hub_id or has_card or configuration:
        # in small blocks: a resume fetches what it needs, not all that lies before it in the file
        options = dict(revision=commit, storage_options={"hf": {"block_size": 1 << 16}})
        builder = datasets.load_dataset_builder(name if is_hub_id else str(path), configuration, **options)
        if hasattr(builder.config, "keep_default_na"):  # a csv as read_texts reads it: NA is a text
            builder.config.keep_default_na = False
            builder.config.quoting = csv.QUOTE_NONE if builder.config.sep == "\t" else csv.QUOTE_MINIMAL
        files = {str(split): [*map(str, part)] for split, part in (builder.config.data_files or {}).items()}
        # its own reader of JSON ends at a corrupt line, and quotes the texts where a number is among them
        is_json = {kind_of(file) for part in files.values() for file in part} == {"json"}
        is_plain = is_json and not (builder.config.field or builder.info.features)
        splits = open_files(files) if is_plain else builder.as_streaming_dataset()
    else:
        files = {"train": [name]} if "://" in name else find_files(path, roles)
        splits = open_files(files)
    splits = {SPLITS.get(split, split): ds for split, ds in splits.items()}
    splits = splits if len(splits) > 1 else {"train": next(iter(splits.values()))}
    instead = "name files, as in 'hf://datasets/NAME/data/train_sft*.parquet'"
    expect("train" in splits, f"has no train split, only {', '.join(splits)}; {instead}")
    # pictures are decoded later, in threads
    splits = {split: ds.decode(False) if ds.features else ds for split, ds in splits.items()}
    train, world = splits["train"], jax.process_count()
    columns = find_columns(roles, train)
    classes = getattr((train.features or {}).get(columns.get("label")), "names", None)
    shards = train.reshard().num_shards if world > 1 else 1
    expect(shards >= world, f"{shards} shards (files, row groups) for {world} processes")
    sizes = [(file, size_of(file)) for part in files.values() for file in part]
    commit = re.search(r"@([0-9a-f]{40})/", str(sizes))
    same = dict(columns=columns, files=digest(sizes), commit=commit and commit[1], processes=world)
    return Source(splits, columns, classes, retries if "://" in str(files) else 0, same)


def size_of(file):
    """Bytes of a file here or on the web; None on the hub, where the commit stands for it."""
    if file.startswith(("http://", "https://")):
        return fsspec.core.url_to_fs(file)[0].size(file)
    return os.path.getsize(file) if os.path.exists(file) else None


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def built_in(name, roles):
    """scikit-learn's digits (Alpaydin & Kaynak 1998), or random words and pictures; a fifth is held out."""
    if name == "digits":
        from sklearn.datasets import load_digits  # slow to import

        found, classes = load_digits(), [*"0123456789"]
        rows = {"image": [*np.uint8(found.images * 255 / 16)], "label": found.target}  # (8, 8), 0 to 16
    else:
        rng, n, classes = np.random.default_rng(0), 2_000, ["a", "b"]
        rows = {"text": [rng.bytes(500).hex(" ", 2) for _ in range(n)], "label": np.arange(n) % 2}
        if "image" in roles:
            rows["image"] = [*rng.integers(256, size=(n, 64, 64, 3), dtype=np.uint8)]
    types = dict(image=datasets.Image(), label=datasets.ClassLabel(names=classes))
    features = {name: types.get(name, datasets.Value("string")) for name in rows}
    data = datasets.Dataset.from_dict(rows, datasets.Features(features))
    order, n = np.random.default_rng(0).permutation(len(data)), len(data) // 5
    parts = {"validation": data.select(order[:n]), "train": data.select(order[n:])}
    return {split: part.to_iterable_dataset(num_shards=100) for split, part in parts.items()}


def without_query(file):
    """A file's name, a URL's without its query."""
    return re.sub(r"[?#].*", "", file) if "://" in file else file


def kind_of(file):
    """What a file is by its name, whatever its compression; None where that does not say."""
    suffixes = [s.lower() for s in Path(without_query(file)).suffixes]
    return next((KINDS.get(s) for s in reversed(suffixes) if s not in (".gz", ".bz2", ".xz", ".zst")), None)


def split_in(name):
    """The split that a file's or folder's name speaks of, as in val, Testing or train-images; else None."""
    return next((SPLITS[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLITS), None)


def split_depth(folders):
    """How deep in a picture's folders the one lies that names its split, above its class; 0 without one."""
    for n, folder in enumerate(folders, 1):
        is_class = n == len(folders) and re.search("[^a-z]+[a-z]", folder.lower())  # as in test_tube
        if split_in(folder) and not is_class:
            return n
    return 0


def find_files(path, roles):
    """{split: [file]} of a file, a glob or a folder: of one kind, and none of them empty."""
    pattern = escape(str(path)) + "/**" if path.is_dir() else str(path)
    files = [str(path)] if path.is_file() else sorted(filter(os.path.isfile, glob(pattern, recursive=True)))
    expect(files, "no such file")
    if path.is_dir():
        is_saved = {"state.json", "dataset_info.json"} <= {Path(file).name for file in files}
        expect(not is_saved, "was written by save_to_disk; write it with to_parquet")
        files = [file for file in files if Path(file).name != "README.md"]  # a data set's card
    kinds = {file: kind_of(file) for file in files if os.path.getsize(file)}
    pictures = "image" in roles and "images" in kinds.values()  # a table beside pictures does not hide them
    files = [file for file, kind in kinds.items() if kind and (kind == "images") == pictures]
    expect(files, f"no data in it; expected {' '.join(KINDS)}")
    kind, *others = sorted({kinds[file] for file in files})
    expect(not others, f"holds {kind}, {', '.join(others)}; name one kind, as in '**/*.parquet'")
    if kind == "parquet":  # one without rows may have no types, and the first one's are those of all
        footers = {file: pq.read_metadata(file) for file in files}
        files = [file for file in files if footers[file].num_rows] or files
        about = {f: (footers[f].metadata or {}).get(b"huggingface", b"") for f in files}
        has = {f: ({*footers[f].schema.names}, re.findall(rb'"names": (\[.*?\])', about[f])) for f in files}
        unlike = [f for f in files if has[f] != has[files[0]]]
        expect(not unlike, f"{unlike[:1]} has other columns, or classes, than {files[0]}")
    root = path if path.is_dir() else os.path.commonpath([Path(file).parent for file in files])
    splits = {}
    for file in files:  # documents and pictures have names of all kinds: only their folders name a split
        *names, stem = Path(file).relative_to(root).with_suffix("").parts
        names += [] if kind in ("text", "images") else [stem]
        names = names[: split_depth(names)] if kind == "images" else names
        splits.setdefault(next(filter(None, map(split_in, names)), "train"), []).append(file)
    return splits


def open_files(files):
    """{split: IterableDataset} of {split: [file]}."""
    kind = kind_of(next(iter(files.values()))[0])
    expect(kind, f"cannot tell what it is from its name; expected {' '.join(KINDS)}")
    if kind == "images":
        return open_pictures(files)
    if kind in ("text", "json", "csv", "tsv"):
        read = partial(datasets.IterableDataset.from_generator, read_texts)
        return {split: read(gen_kwargs=dict(files=part, kind=kind)) for split, part in files.items()}
    if kind == "webdataset":  # theirs stops at a text that is not UTF-8
        WebDataset.DECODERS["txt"] = lambda data: data.decode("utf-8-sig", "replace")
    # the builder's own batch size is that of the first row group, which may have no rows
    options = dict(batch_size=1_000) if kind == "parquet" else {}
    patterns = {split: [f if "://" in f else escape(f) for f in part] for split, part in files.items()}
    return datasets.load_dataset_builder(kind, data_files=patterns, **options).as_streaming_dataset()


def read_texts(files, kind):
    """Records of text files: documents, objects of JSON, or rows of a csv or tsv; or {BAD: why}.

    Every field is as it is written: NA is a text. A tsv has no quoting; a number on top is no header.
    """
    csv.field_size_limit(1 << 30)
    options = dict(encoding="utf-8-sig", errors="replace")
    for file in files:
        compression = fsspec.utils.infer_compression(without_query(file))
        with blame(file), fsspec.open(file, "rt", compression=compression, **options) as lines:
            first = next(lines, "")
            expect(first[:2] != "\ufffd\ufffd" and "\0" not in first[:4], "is UTF-16, expected UTF-8")
            lines = chain([first], lines)
            if kind == "text":
                yield {"text": "".join(lines)}
            elif kind == "json" and (first[:1] == "[" or first.strip() == "{"):  # not one record a line
                found = json.loads("".join(lines))
                for record in found if isinstance(found, list) else [found]:
                    yield record if isinstance(record, dict) else {"text": record}
            elif kind == "json":
                for line in lines:
                    try:
                        record = json.loads(line.strip() or "{}")
                    except (ValueError, RecursionError) as error:
                        record = {BAD: in_brief(error)}
                    yield record if isinstance(record, dict) else {BAD: "not a JSON object"}
            else:
                tabs = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if kind == "tsv" else {}
                # strict: else an open quote takes the rest of the file
                rows = filter(None, csv.reader(lines, strict=True, **tabs))
                names = next(rows, [])
                if any(re.fullmatch(r"\s*-?\d+(\.\d*)?\s*", name) for name in names):
                    rows, names = chain([names], rows), [f"column {i}" for i in range(len(names))]
                is_uncut = len(names) == 1 and re.search(r"[;|\t]", names[0])
                expect(not is_uncut, "is not separated by ,")
                twice = [name for name in names if name and names.count(name) > 1]
                expect(not twice, f"has two columns {twice[:1]}")
                for row in rows:
                    if len(row) == len(names):
                        yield dict(zip(names, row))
                    else:
                        yield {BAD: f"{len(row)} values in {len(names)} columns"}


def open_pictures(files):
    """Every picture is a shard: epochs are whole permutations. Its class is the folder below the split's."""
    root = os.path.commonpath([Path(file).parent for part in files.values() for file in part])

    def class_of(file):
        folders = Path(file).relative_to(root).parts[:-1]
        return "".join(folders[split_depth(folders) :][:1])

    def read(files):
        for file in files:
            yield {"image": {"path": file, "bytes": None}, "label": classes.index(class_of(file))}

    classes = sorted({class_of(file) for file in files.get("train", ())})
    layout = "expected CLASS/picture.png or train/CLASS/picture.png"
    has_classes = len(classes) > 1 and "" not in classes and not all(map(split_in, classes))
    expect(has_classes, f"its pictures are in no class folders; {layout}")
    label, splits = datasets.ClassLabel(names=classes), {}
    features = datasets.Features(image=datasets.Image(decode=False), label=label)
    for split, part in files.items():
        if {class_of(file) for file in part} <= {*classes}:
            arguments = dict(features=features, gen_kwargs={"files": part})
            splits[split] = datasets.IterableDataset.from_generator(read, **arguments)
        else:
            print(f"{root}: the {split} pictures are in other folders than train's, and are left out")
    return splits


def find_columns(roles, dataset):
    """{role: column}: the one asked for, else the only one of its type, its usual name, or that is left."""
    records = [*islice(dataset, 10)]
    names = [*dict.fromkeys(name for record in records for name in record if not name.startswith("__"))]
    expect(names, "no records in it, or none of the first ones can be read")
    types, features = {"image": datasets.Image, "label": datasets.ClassLabel}, dataset.features or {}
    usual = {"text": ["text"], "label": ["label", "labels", "cls", "class"], "image": ["image"]}
    columns = {}
    for role, asked in sorted(roles.items()):  # text, of which any may hold, is last
        typed = [name for name in names if isinstance(features.get(name), types.get(role, ()))]
        named = [name for name in usual[role] if name in names][:1]
        left = [name for name in names if name not in columns.values()]
        found = asked or next((group[0] for group in (typed, named, left) if len(group) == 1), None)
        holds = {"text": "texts", "label": "whole numbers from 0", "image": "encoded pictures"}[role]
        others = f"one of {', '.join(names)}; name one of {holds}: --{role}-column"
        what = f"no column {asked}" if asked else f"cannot tell the {role} column"
        expect(found in names, f"{what}, {others}")
        good, _ = sift(records, {role: found})
        expect(good[role], f"no {role} in column {found}, {others}")
        columns[role] = found
    return {role: columns[role] for role in roles}


def sift(records, columns, classes=None):
    """The good ones of `records` as {role: list}, and {offset: why} of the bad. Empty is neither."""
    good, bad = {role: [] for role in columns}, {}
    for i, record in enumerate(records):
        try:
            for role, value in usable(record, columns, classes).items():
                good[role].append(value)
        except ValueError as error:
            bad[i] = in_brief(error)
    return good, bad


def usable(record, columns, classes):
    """{role: text, int or encoded picture} of a record, {} of an empty one. ValueError says why it is bad."""
    if BAD in record:
        raise ValueError(record[BAD])
    row = {}
    for role, column in columns.items() if record else ():
        if column not in record:
            raise ValueError(f"no {column} in it")
        value = record[column]
        if role == "text" and value is None:
            value = ""
        if role == "label" and re.fullmatch(r"\s*\d+(\.0*)?\s*", str(value)):  # text of a csv, or a float
            value = int(float(value))
        if not isinstance(value, {"text": str, "label": int, "image": bytes | dict}[role]):
            raise ValueError(f"{role} is {'missing' if value is None else repr(value)[:40]}")
        if role == "text":
            value.encode()  # half a character (a lone surrogate) is a ValueError here
        if role == "label" and not 0 <= value < (len(classes) if classes else math.inf):
            known = f", and there are {len(classes)} classes" if classes else ""
            raise ValueError(f"label is {value}{known}")
        row[role] = value
    return {} if row.get("text") == "" else row


# ---- streams: IterableDataset -> rows -> batches -> ahead of the device ----


class Stream:
    """Rows made of a split of a Source for ever: epoch after epoch, each in an order of its own.

    make_rows({role: list} of the good ones among `window` records, rng) -> list of rows; the same records and
    rng must give the same rows. With seed None, one pass in the files' own order. `position` (JSON) is that
    of the row last given: a Stream begun there goes on with the same rows. Data that fail are opened again,
    the source's `retries` times in a row. Raises RunError.
    """

    def __init__(self, source, make_rows, window, seed, split="train"):
        self.source, self.make_rows, self.window, self.seed = source, make_rows, window, seed
        self.dataset = source.splits[split]
        if self.dataset.column_names:  # unknown of text files and of other generators
            self.dataset = self.dataset.select_columns(sorted({*source.columns.values()}))
        if seed is not None:  # shards (row groups of parquet) are shuffled, and shared by the processes
            rank, world = jax.process_index(), jax.process_count()
            self.dataset = split_dataset_by_node(self.dataset.reshard(), rank, world, strategy="shards")
        # epoch, and in it the window under way: where it starts (for `datasets`, as a number), rows given
        self.position = dict(epoch=0, state=None, record=0, row=0)
        self.position |= dict(seen=0, bad=0)  # records read and bad ones, of all epochs

    def __iter__(self):
        for records in self.windows():
            at, n = self.position, len(records)
            good, bad = sift(records, self.source.columns, self.source.classes)
            rng = np.random.default_rng([self.seed or 0, at["epoch"], jax.process_index(), at["record"]])
            rows = self.make_rows(good, rng)
            if at["row"] == 0:  # else they were counted before the stream was opened again
                for i, (offset, why) in enumerate(bad.items(), 1):
                    what = f"record {at['record'] + offset:,} of epoch {at['epoch']}: {why}"
                    report_bad(what, at["bad"] + i, at["seen"] + offset)
                at = at | dict(seen=at["seen"] + n, bad=at["bad"] + len(bad))
            for i in range(at["row"], len(rows)):
                self.position, self.is_empty = at | dict(row=i + 1), False
                yield rows[i]
            state = self.dataset.state_dict()
            self.position = at | dict(state=state, record=at["record"] + n, row=0)

    def windows(self):
        """Windows of raw records, [{column: value}], from the one on in which `position` is."""
        failures = 0
        while True:
            at = self.position
            self.is_empty = at["record"] == at["row"] == 0  # an epoch from its start, until it gives a row
            try:
                if self.seed is not None:  # datasets orders the shards by it; 0 would keep the files' order
                    self.dataset.set_epoch(1 + 1000 * self.seed + at["epoch"])
                self.dataset.load_state_dict(at["state"])
                records = iter(self.dataset)
                while window := [*islice(records, self.window)]:
                    failures = 0
                    yield window
            except NameError:
                raise
            except Exception as error:  # the network's, pyarrow's, pandas' and zlib's have no common kind
                failures += 1
                wait_after(error, failures, self.source.retries)
                continue
            if self.seed is None:
                return
            if self.is_empty:
                raise RunError("an epoch without a row: the data are too short, or all held out")
            self.position = self.position | dict(epoch=at["epoch"] + 1, state=None, record=0, row=0)


def report_bad(what, bad, seen):
    """Log one of `bad` bad records among `seen`. Raises RunError where they are more than 100 and 1 %."""
    if bad <= 100:
        more = "; any more are only counted" if bad == 100 else ""
        tqdm.write(f"data: skipped {what}{more}", file=sys.stderr)
    elif bad > seen / 100:
        raise RunError(f"{bad:,} of {seen:,} records of the data are bad; the last one is {what}")


def wait_after(error, failures, retries):
    """Wait 1, 2, 4 ... 60 s after the `failures`th fault in a row. RunError after `retries`."""
    if failures > retries:
        times = f" {failures} times in a row" if retries else ""
        raise RunError(f"the data failed{times}: {in_brief(error)}") from error
    pause = min(2 ** (failures - 1), 60)
    tqdm.write(f"data: {in_brief(error)}; try {failures} of {retries} in {pause} s", file=sys.stderr)
    time.sleep(pause)


def read_file(value, retries):
    """The bytes of a picture's file: bytes, or {"bytes", "path"} as `datasets` has it. Raises ValueError."""
    value = {"bytes": value} if isinstance(value, bytes) else value
    data, path, failures = value.get("bytes"), str(value.get("path")), 0
    while data is None:
        try:
            with xopen(path, "rb") as file:
                data = file.read()
        except Exception as error:  # the network's have no common kind
            cause, failures = error.__cause__ or error, failures + 1
            # fsspec finds no file where the host does not answer, and that is the cause then
            gone = isinstance(cause, FileNotFoundError | EntryNotFoundError)
            if gone or getattr(cause, "status", 0) in (403, 404, 410) or "://" not in path:
                raise ValueError(in_brief(error)) from error
            wait_after(error, failures, retries)
    return data


def hold_out_texts(cfg, sources, roles=None):
    """The `val_docs` texts to validate on, as many of each source, and others to train a tokenizer on.

    They are --val-data's, else those of validation or test splits, else the first of all. With more `roles`
    than the text: tuples of what these are.
    """
    roles = roles or {"text": cfg.text_column}
    make_rows = lambda records, rng: records["text"] if len(roles) == 1 else [*zip(*records.values())]
    texts = lambda source, split: Stream(source, make_rows, 16, None, split)
    held = open_data(cfg, roles, "val_data") or sources
    same = all(source.classes == sources[0].classes for source in (*sources, *held))
    expect(same, f"--data {' '.join(cfg.data)}: not all of it, validation included, names the same classes")
    shares = [(cfg.val_docs + i) // len(held) for i in range(len(held))]
    held_out = [text for s, n in zip(held, shares) for text in islice(texts(s, s.validation), n)]
    advice = "ask for fewer, or give --val-data (a text file is one document: cut it in two)"
    expect(len(held_out) == cfg.val_docs, f"--val-docs {cfg.val_docs}: there are {len(held_out)}; {advice}")
    known = {*held_out}
    others = chain(*(islice(texts(source, "train"), 10_000 // len(sources)) for source in sources))
    others = (text for text in others if text not in known)
    first = [*islice(others, 1)]
    expect(first or not cfg.steps, f"--val-docs {cfg.val_docs}: leaves none to train on; {advice}")
    return held_out, chain(first, others)


def batches(streams, batch_size, *, seed, start=0, position=None, weights=(), decode=None):
    """Yield ({name: array (batch_size, ...)}, position) for ever; begun with a position, it goes on after it.

    `batch_size` is that of all processes, `start` the number of the first batch. Each row is drawn from one
    of the streams with `weights`; a batch may hold rows of two epochs: none is dropped. decode(row), run in
    threads, gives what stands in the batch, None to leave the row out, or a ValueError for a bad record; the
    batch is then filled up from the streams drawn last.
    """
    position = position or {"bad": 0, "streams": [stream.position for stream in streams]}
    for stream, begin in zip(streams, position["streams"]):
        stream.position = begin
    rows, n, bad, left_out = [iter(stream) for stream in streams], start, position["bad"], 0
    batch_size //= jax.process_count()
    weights = np.array(weights or [1] * len(streams))
    decoded = partial(ThreadPoolExecutor(os.cpu_count()).map, decode) if decode else iter
    while True:
        rng, batch = np.random.default_rng([seed, n]), []
        drawn = rng.choice(len(streams), batch_size, p=weights / weights.sum())
        while len(batch) < batch_size:
            for row in decoded([next(rows[i]) for i in drawn[len(batch) :]]):
                left_out = left_out + 1 if row is None else 0
                if left_out == 10_000:
                    raise RunError("10,000 records in a row are held out; none is left to train on")
                if isinstance(row, ValueError):
                    bad += 1
                    report_bad(f"a record of batch {n + 1}: {in_brief(row)}", bad, n * batch_size)
                elif row is not None:
                    batch.append(row)
        n += 1
        positions = [stream.position for stream in streams]
        all_bad = bad + sum(p["bad"] for p in positions)
        arrays = {name: np.stack([row[name] for row in batch]) for name in batch[0]}
        yield arrays, {"bad": bad, "bad_records": all_bad, "streams": positions}


def ahead(items, depth, stopped=lambda: False):
    """What an endless generator yields, made up to `depth` ahead by a thread, until `stopped()`.

    Its exceptions are raised where it is read.
    """
    thread = ThreadPoolExecutor(1, "ahead")
    ready = deque(thread.submit(next, items) for _ in range(depth))
    try:
        while not stopped():
            if wait([ready[0]], timeout=0.1).done:  # it returns, so that a signal is seen
                item = ready.popleft().result()
                ready.append(thread.submit(next, items))
                yield item
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


# ---- devices ----

# dense bf16 FLOP/s by device kind, from the makers' data sheets; without an entry there is no mfu
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
PEAK_FLOPS |= {"L40S": 362e12, "L4": 121e12, "T4": 65e12, "V100": 125e12, "RTX 4090": 165e12}
PEAK_FLOPS |= {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}


def matmul(x, kernel):
    """x (..., C) @ kernel (C, D), as two matrices: of (B, T, C) XLA makes copies, 10 % of a step on a CPU."""
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def has_fused_attention(q):
    """Whether cuDNN can attend to queries (B, T, H, D): on NVIDIA since Ampere, in bfloat16."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # 9.0 of an H100, gfx942 of AMD's
    recent = re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8
    return bool(recent) and q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def make_mesh():
    """All devices in a row. Auto: under explicit axes, now jax's default, nnx.Embed refuses a cut batch."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def shard_batch(mesh, batch, whole=False):
    """Put host arrays on the mesh, cut along B: this process's rows, or all where each has the `whole`."""
    put = partial(jax.make_array_from_process_local_data, NamedSharding(mesh, PartitionSpec("data")))
    return jax.tree.map(lambda x: put(x, x.shape if whole else None), batch)


def shard_state(mesh, state, fsdp):
    """Copy a state to every device, or with fsdp cut each array along the largest axis that divides."""

    def sharding(x):
        axes = [a for a, size in enumerate(x.shape) if fsdp and size % mesh.size == 0]
        largest = max(axes, key=lambda a: x.shape[a], default=None)
        return NamedSharding(mesh, PartitionSpec(*("data" if a == largest else None for a in range(x.ndim))))

    return jax.device_put(state, jax.tree.map(sharding, state))


def to_host(array):
    """A whole array, wherever its pieces are, as numpy; every process must ask for it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def gather(value):
    """The JSON `value` of every process, in a list; of several processes at most 64 kB each."""
    text = np.frombuffer(json.dumps(value).encode().ljust(1 << 16), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(text)]


# ---- pretrained files ----

# fields of transformers' configs that change nothing in the numbers
NOT_COMPUTED = """architectures dtype torch_dtype transformers_version _name_or_path id2label label2id
num_labels initializer_range use_cache bos_token_id eos_token_id pad_token_id sep_token_id
task_specific_params output_attentions output_hidden_states return_dict"""


def snapshot(path, flag, patterns):
    """The local folder of a folder, a run directory or a hub id (there only files that match `patterns`)."""
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    with blame(f"{flag} {path}: no such folder, nor on the hub"):
        return Path(snapshot_download(path, allow_patterns=patterns))


def load_tokenizer(name):
    """The fast tokenizer of a hub id or folder. Raises UsageError where there is none."""
    patterns = ["tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "config.json"]
    folder = snapshot(name, "--tokenizer or --init-from", patterns)
    with blame(f"--tokenizer {name}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        is_fast = tokenizer.is_fast and len(tokenizer) > len(tokenizer.all_special_tokens)
        expect(is_fast, "no fast tokenizer in it (tokenizer.json); name one with --tokenizer")
        rate = getattr(tokenizer.backend_tokenizer.model, "dropout", None)
        expect(not rate, f"has a dropout of {rate}, and a resume could not repeat its rows")
        return tokenizer


def encode(tokenizer, texts, end=(), framed=False, special=False):
    """Token ids of each text, [(n,) int32], then those in `end`.

    `framed`: with the special tokens that the tokenizer puts around a text. "<|endoftext|>" inside a text is
    text, or with `special` this token.
    """
    backend, ids = tokenizer.backend_tokenizer, []
    if backend.truncation or backend.padding or backend.encode_special_tokens == special:
        backend.no_truncation()  # rarely set: it has to wait while another thread uses the tokenizer
        backend.no_padding()
        backend.encode_special_tokens = not special
    for i in range(0, len(texts), 64):  # an encoding takes 100 bytes a token, so never hold many
        chunk = backend.encode_batch_fast(texts[i : i + 64], add_special_tokens=framed)
        ids += [np.array([*encoding.ids, *end], np.int32) for encoding in chunk]
    return ids


def checkpoint_names(state):
    """{name in the published checkpoint: parameter}; nnx's kernel, scale and embedding are weight there."""
    names = {}
    for path, param in nnx.to_flat_state(nnx.state(state, nnx.Param)):
        *module, leaf = map(str, path)
        names[".".join([*module, "bias" if leaf == "bias" else "weight"])] = param
    return names


def label_names(classes):
    """Classes as transformers' configs hold them."""
    return dict(id2label=dict(enumerate(classes)), label2id={name: i for i, name in enumerate(classes)})


def class_names(config):
    return [str(name) for _, name in sorted(config.id2label.items())]


def brief(names):
    return f"{len(names)} ({', '.join(names)[:60]})" if names else "none"


def match_classes(theirs, classes):
    """Find `classes` among those of a head: by name, or in their order where one side just counts them.

    Gives (the place of each or None, names for the head, "" or why there is no place).
    """
    if sorted(theirs) == sorted({*classes}):
        return [theirs.index(name) for name in classes], classes, ""
    counts = [[*map(str, range(len(classes)))], [f"LABEL_{i}" for i in range(len(classes))]]
    # models of ImageNet know two classes as crane, which a data set cannot
    alike = sum(a == b for a, b in zip(theirs, classes)) > 0.99 * len(theirs)
    if (theirs in counts or classes in counts or alike) and len(theirs) == len(classes):
        return [*range(len(classes))], theirs if classes in counts else classes, ""
    return None, classes, f"its classes are {brief(theirs)}; those of the data are {brief(classes)}"


def read_pretrained(kinds, path, followed):
    """(transformers config of one of the classes `kinds`, {name: array}, folder) of a folder or a hub id.

    Raises UsageError where a file is missing, the model is another one, or a field of its config is neither
    one of those `followed` nor at the default of its class.
    """
    folder = snapshot(path, "--init-from", ["*.json", "*/config.json", "*.txt", "*.model", "*.safetensors"])
    expect(not (folder / "adapter_config.json").exists(), "has a PEFT adapter; merge it first")
    has_ended = (folder / "model.safetensors").exists() or not (folder / "run.json").exists()
    expect(has_ended, "a run that has not ended; --resume it (--steps N, its newest, ends it there)")
    expect((folder / "config.json").exists(), "no config.json in it")
    model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    known = {kind.model_type: kind for kind in kinds}
    expect(model_type in known, f"a {model_type} model, expected {' or '.join(known)}")
    config = known[model_type].from_pretrained(folder)
    defaults = dict(position_embedding_type="absolute") | type(config)().to_dict()  # the former in old files
    free = [*followed.split(), *NOT_COMPUTED.split()]
    for name, only in defaults.items():
        value = getattr(config, name, only)
        # the second is a problem_type: what our heads do
        is_followed = name in free or value in (only, "single_label_classification")
        expect(is_followed, f"{name} is {value}, only {only} is supported")
    index, files, weights = folder / "model.safetensors.index.json", ["model.safetensors"], {}
    if index.exists() and not (folder / files[0]).exists():
        files = sorted({*json.loads(index.read_text())["weight_map"].values()})
    for file in files:
        expect((folder / file).exists(), f"no {file} in it, and no other format is read")
        weights |= load_file(folder / file)
    return config, weights, folder


def load_weights(names, weights, may_lack=()):
    """Put `weights` {name: array}, in our shapes, into the parameters of `names` {name: parameter}.

    Raises UsageError for one that is missing or unsound, has another shape or no place. Names that begin with
    one of `may_lack` keep their init; these are returned.
    """
    lacking = [name for name in names if name not in weights]
    missing = [name for name in lacking if not name.startswith(tuple(may_lack))]
    expect(not missing, f"{missing[:1]} is missing")
    others = [name for name in weights if name not in names]
    expect(not others, f"{others[:1]} has no place in the model")
    for name, w in weights.items():
        expect(w.shape == names[name].shape, f"{name} is {w.shape}, expected {names[name].shape}")
        is_sound = jnp.issubdtype(w.dtype, jnp.floating) and np.isfinite(w).all()
        expect(is_sound, f"{name} is not finite, or quantised ({w.dtype})")
        names[name].set_value(jnp.asarray(w.astype(np.float32)))
    return lacking


def write_pretrained(folder, weights, config, kind, *parts):
    """A Hugging Face model folder: config.json, model.safetensors of {name: array}, and what `parts` save.

    `kind` is transformers' class. Every process must have made `weights`; the first one writes.
    """
    if jax.process_index() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {name: np.asarray(w, order="C") for name, w in weights.items()}
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        config = type(config).from_dict(config.to_dict() | {"architectures": [kind], "dtype": "float32"})
        for part in (config, *parts):
            part.save_pretrained(folder)


# ---- the run ----


class Run:
    """A run directory: run.json, metrics.jsonl, curves.png, ckpt/STEP. Refuses one that holds another run.

    `data`: what a resume must find unchanged; `free`: the script's own flags that it may change. `parts` (a
    tokenizer, a config) are saved beside run.json: a resume reads them.
    """

    def __init__(self, kind, cfg, sources, data, free, parts=()):
        self.cfg, self.leads, self.stopped_by = cfg, jax.process_index() == 0, None
        self.wandb = import_module("wandb") if cfg.wandb and self.leads else None
        for i, (name, source) in enumerate(zip(cfg.data, sources)):
            data = data | {f"{part} of {i} {name}": value for part, value in source.unchanged.items()}
        stored = json.dumps([dataclasses.asdict(cfg), data], default=os.fspath)
        config, data = json.loads(stored)  # tuples are lists in it
        config |= dict.fromkeys(("profile", "coordinator", "num_processes", "process_id"))  # of one start
        digests = gather(digest([config, data]))
        expect(len({*digests}) == 1, "the processes have other flags or see other data")
        with blame(f"--out-dir {cfg.out_dir or 'out'}"):
            self.dir = Path(gather(self.leads and str(self.claim(kind)))[0])
        self.id = f"{self.dir.name}-{os.urandom(4).hex()}"  # for Weights & Biases, where names recur
        if cfg.resume:  # refuse by name what would change the meaning of the run's checkpoint
            then, change = read_run(self.dir), "it would go on with other rows"
            self.id, free = then["id"], {*RunConfig.__dataclass_fields__, *free.split()}
            for name in [name for name in config if name not in free]:
                was, flag = then["config"].get(name, config[name]), f"--{name.replace('_', '-')}"
                start = f"the run in {self.dir} was started with {was}; start a new run to change it"
                expect(config[name] == was, f"{flag} {config[name]}: {start}")
            for name, value in data.items():
                was = then["data"].get(name)
                expect(value == was, f"--resume: other {name} ({value}, before {was}); {change}")
        config |= dict(out_dir=str(self.dir), resume=False, overwrite=False)
        self.info = dict(id=self.id, config=config, data=data)
        self.info["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        self.info |= {name: version(name) for name in ("jax", "flax", "optax", "datasets", "transformers")}
        if self.leads and not cfg.resume:
            for part in parts:
                part.save_pretrained(self.dir)
        options = ocp.CheckpointManagerOptions(max_to_keep=cfg.keep, cleanup_tmp_directories=True)
        self.checkpoints = ocp.CheckpointManager((self.dir / "ckpt").absolute(), options=options)
        self.saved = self.checkpoints.latest_step()

    def claim(self, kind):
        """A new numbered directory, or --out-dir where that is free or to be taken."""
        if self.cfg.out_dir is None:
            for n in count(1):
                path = Path(f"out/{kind}-{n:03d}")
                with suppress(FileExistsError):
                    path.mkdir(parents=True)
                    return path
        path = Path(self.cfg.out_dir)
        if not self.cfg.resume and path.exists() and (path.is_file() or any(path.iterdir())):
            is_run = (path / "run.json").exists()
            expect(is_run, "not empty and not a run; choose another directory")
            choices = "--resume to go on with it, --overwrite to start again, or choose another directory"
            expect(self.cfg.overwrite, f"holds a run already; {choices}")
            start = self.cfg.init_from and Path(self.cfg.init_from).expanduser().resolve()
            expect(start != path.resolve(), f"--overwrite would delete --init-from {start}")
            shutil.rmtree(path / "ckpt", ignore_errors=True)
            for name in ("run.json", "metrics.jsonl", "curves.png", "predictions.png", "model.safetensors"):
                (path / name).unlink(missing_ok=True)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name, text):
        """Write a file of the directory so that it is whole at any moment."""
        if self.leads:
            (self.dir / f"{name}.tmp").write_text(text)
            os.replace(self.dir / f"{name}.tmp", self.dir / name)

    def restore(self, state):
        """The newest checkpoint's state, sharded like `state`, else `state`. Sets `step` and `position`."""
        self.step, self.position = self.saved or 0, None
        at = f"{self.dir} is at step {self.step} already"
        expect(self.step <= self.cfg.steps, f"--steps {self.cfg.steps}: {at}")
        if self.saved is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            args = dict(state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore())
            with blame(f"--resume: the checkpoint of step {self.saved} in {self.dir} does not fit the model"):
                restored = self.checkpoints.restore(self.saved, args=ocp.args.Composite(**args))
            state, self.position = restored["state"], restored["position"][jax.process_index()]
        path = self.dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        lines = [json.loads(line) for line in lines if line.endswith("}\n")]  # a kill may cut one short
        # one may not be whole yet: two must have been due
        lost = self.step == 0 and lines and lines[-1]["step"] > 2 * self.cfg.ckpt_every
        expect(not lost, f"--resume: {self.dir} was trained, and its checkpoints are gone")
        self.lines = [line for line in lines if line["step"] <= self.step]  # the rest comes again
        self.last = self.lines[-1] if self.lines else {}
        self.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))
        self.write("run.json", json.dumps(self.info, indent=1))  # last: what has one can be resumed
        return state

    def open_batches(self, sources, make_rows, decode=None):
        """`batches` of rows of the sources, from where the newest checkpoint was."""
        cfg, options = self.cfg, dict(start=self.step, position=self.position, decode=decode)
        streams = [Stream(source, make_rows, cfg.shuffle_buffer, cfg.seed) for source in sources]
        return batches(streams, cfg.batch_size, seed=cfg.seed, weights=cfg.data_weights, **options)

    @contextmanager
    def training(self, batches, depth, unit, per_step, flops):
        """Around a loop over `steps()`: saves at its end, at Ctrl-C, at SIGTERM and when the data fail.

        `batches` are made up to `depth` ahead. A step is `per_step` `unit`s (tokens, images) of `flops` each.
        """
        self.batches = ahead(batches, depth, lambda: self.stopped_by)
        self.unit, self.per_step = unit, per_step
        device = jax.devices()[0].device_kind
        peak = next((f for name, f in PEAK_FLOPS.items() if re.search(rf"{name}\b", device)), math.inf)
        self.mfu = lambda rate: rate * flops / (peak * jax.device_count()) or None  # where the peak is known
        print(f"run        {self.dir}, from step {self.step} to {self.cfg.steps}")
        self.first, self.pending, self.state, handlers = self.step + 1, [], None, {}
        self.waited, self.paused_at, self.began = 0.0, None, time.perf_counter()  # pauses move the last
        self.marks = [np.array([self.step, 0.0, 0.0])]  # steps, seconds, seconds waited; one for each line
        self.bar = tqdm(total=self.cfg.steps, initial=self.step, disable=None if self.leads else True)
        if self.wandb:
            names = dict(project=self.cfg.wandb, name=self.dir.name, id=self.id, dir=str(self.dir))
            self.wandb.init(config=dataclasses.asdict(self.cfg), resume="allow", **names)
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
            self.save()
        except Exception as error:
            if jax.process_count() > 1:  # to save, or to say goodbye, would wait for the others
                lost = f"process {jax.process_index()}: {in_brief(error)}"
                print(f"{lost}; start all processes again with --resume", file=sys.stderr, flush=True)
                os._exit(1)
            if isinstance(error, RunError):
                self.save()
            if "RESOURCE_EXHAUSTED" in str(error):
                advice = "a smaller --batch-size, a lower --device-rows, --remat, or --fsdp on many devices"
                raise RunError(f"out of memory on the device; try {advice}: {in_brief(error)}") from error
            raise
        finally:
            self.batches.close()
            self.bar.close()
            with suppress(RuntimeError):  # unless a trace is under way
                jax.profiler.stop_trace()
            self.checkpoints.close()  # waits for the last checkpoint
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self.wandb:
                self.wandb.finish()
        if not self.saved:  # a signal came so early that there is no model to write
            self.end()

    def on_signal(self, number, _frame):
        self.stopped_by = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        tqdm.write(f"{signal.Signals(number).name}: saving soon; once more to quit at once", file=sys.stderr)

    def steps(self):
        """(number of the step from 0, batch) until cfg.steps or a signal; the loop calls `log` in each."""
        while self.step < self.cfg.steps:
            start = time.perf_counter()
            item = next(self.batches, None)
            self.waited += time.perf_counter() - start
            if item is None:  # a signal came
                return
            batch, self.position = item
            yield self.step, batch
            if self.due(self.cfg.ckpt_every):
                self.save()
            if jax.process_count() > 1 and self.checkpoints.reached_preemption(self.step):
                self.stopped_by = signal.SIGTERM

    def due(self, every):
        """Whether something is due that happens every so many steps, and after the last; 0 is never."""
        return every > 0 and (self.step % every == 0 or self.step == self.cfg.steps)

    def log(self, state, metrics):
        """Note a dispatched step. Its metrics stay on the device until the next step is under way."""
        if self.pending and self.due(self.cfg.log_every):
            self.flush()
        self.step, self.state = self.step + 1, state
        self.pending.append((self.step, metrics, self.position["bad_records"]))
        self.bar.update()
        if self.step == self.first:
            jax.block_until_ready(metrics)
            tqdm.write(f"first step {time.perf_counter() - STARTED:.1f} s after the start")
        if self.cfg.profile and self.step == self.first + 8:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(self.cfg.profile)
        if self.cfg.profile and self.step == self.first + 14:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            tqdm.write(f"a profile of steps 10 to 15 is in {self.cfg.profile}")

    def flush(self, validation=None):
        """Fetch the pending metrics, stop at one that is not finite, and write a line of the last step."""
        fetched, self.pending = jax.device_get(self.pending), []
        for step, metrics, _ in fetched:
            if not np.isfinite([*metrics.values()]).all():
                self.state = None  # not to be saved
                values = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
                advice = "try a lower --lr, more --warmup-steps or --grad-clip 1"
                raise RunError(f"step {step}: {values}; the last good checkpoint is {self.saved}; {advice}")
        step, metrics, bad = fetched[-1]
        self.marks.append(np.array([step, (self.paused_at or time.perf_counter()) - self.began, self.waited]))
        steps, seconds, waited = (self.marks[-1] - self.marks[-2]).tolist()
        rate, wait = steps * self.per_step / seconds, waited / seconds
        line = {"step": step} | {name: float(value) for name, value in metrics.items()}
        line |= {self.unit: step * self.per_step, f"{self.unit}_per_s": rate, "mfu": self.mfu(rate)}
        self.last = line = line | {"data_wait": wait, "bad_records": bad} | (validation or {})
        self.lines.append(line)
        if self.leads:
            with open(self.dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if self.wandb:
                self.wandb.log(line, step=step)
        text = f"loss {line['loss']:.3f} lr {line['lr']:.1e} {rate:,.0f} {self.unit}/s"
        text += (f" mfu {line['mfu']:.1%}" if line["mfu"] else "") + f" wait {wait:.1%}"
        self.bar.set_postfix_str(text)
        if validation or self.bar.disable:
            figures = "".join(f" {name} {value:.4f}" for name, value in (validation or {}).items())
            tqdm.write(f"step {step}: {text}{figures}")
        if validation and self.leads:
            self.draw()

    @contextmanager
    def pause(self):
        """Stop the clock for an evaluation or a sample."""
        jax.block_until_ready(self.pending)
        self.paused_at = time.perf_counter()
        yield
        self.began, self.paused_at = self.began + time.perf_counter() - self.paused_at, None

    def save(self):
        """Write a checkpoint of the last step while training goes on; never one that is not finite."""
        if self.pending:
            self.flush()
        if self.state is not None and self.step != self.saved:
            position = ocp.args.JsonSave(gather(self.position))
            args = ocp.args.Composite(state=ocp.args.StandardSave(self.state), position=position)
            self.checkpoints.save(self.step, args=args)
            self.saved = self.step

    def draw(self):
        """curves.png: losses, the other validation figures, gradient norm and learning rate, by step."""
        from matplotlib.figure import Figure  # half a second to import

        scores = [[name] for name in self.last if name.startswith("val_") and name != "val_loss"]
        panels = [["loss", "val_loss"], *scores, ["grad_norm"], ["lr"]]
        figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
        for axes, names in zip(figure.subplots(1, len(panels), sharex=True), panels):
            for name in names:
                points = [(line["step"], line[name]) for line in self.lines if name in line]
                marker, color = (".", "C1") if name.startswith("val") else ("", "C0")
                axes.plot(*zip(*points), marker=marker, color=color, label=name)
                if name.startswith("val"):
                    best = min if name in ("val_loss", "val_bpb") else max
                    step, value = best(points, key=lambda point: point[1])
                    label = f"best, {value:.4g} at step {step}"
                    axes.plot(step, value, "k*", mfc="none", ms=10, label=label, zorder=3)
            axes.set(xlabel="step", ylabel=names[0])
            axes.legend(frameon=False)
        figure.savefig(self.dir / "curves.tmp.png", dpi=100)
        os.replace(self.dir / "curves.tmp.png", self.dir / "curves.png")

    def end(self):
        """The last metrics; says how fast it went, and where a signal ended it how to go on, and exits."""
        parts = []
        if len(self.marks) > 2:  # without the first line's steps, of which one compiled
            steps, seconds, waited = (self.marks[-1] - self.marks[1]).tolist()
            rate = steps * self.per_step / seconds
            parts += [f"{rate:,.0f} {self.unit}/s", f"{seconds / steps * 1000:.0f} ms a step"]
            parts += [f"mfu {self.mfu(rate):.1%}"] if self.mfu(rate) else []
            parts += [f"data wait {waited / seconds:.2%}"]
        with suppress(OSError):  # Linux alone has it
            if peak := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
                parts.append(f"peak memory {int(peak[1]) / 1e6:.2f} GB")
        if stats := jax.local_devices()[0].memory_stats():
            parts.append(f"of a device {stats['peak_bytes_in_use'] / 1e9:.2f} GB")
        print(", ".join([*parts, f"{time.perf_counter() - STARTED:.0f} s in all"]))
        if self.saved:
            print(f"a Hugging Face model folder is in {self.dir}")
        if self.stopped_by and self.step < self.cfg.steps:
            where = f"saved at step {self.saved}" if self.saved else "not one step was finished"
            print(f"stopped, {where}; go on with --resume --out-dir {self.dir}")
            sys.exit(128 + self.stopped_by)
        return self.last
