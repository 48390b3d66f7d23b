"""What a reader may skip: command line, streams, checkpoints, logging, files. Nothing here knows a model."""

import argparse
import ctypes
import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import queue
import re
import resource
import shutil
import signal
import sys
import sysconfig
import threading
import time
from contextlib import contextmanager
from glob import glob
from importlib.metadata import version
from pathlib import Path

STARTED = time.perf_counter()


def tune_malloc():
    """Keep glibc from handing big buffers back to the system on every step: 20-30 % of a step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and "MALLOC_MMAP_MAX_" not in os.environ:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-8, 1)  # M_ARENA_MAX


# one of our scripts is the program: only then touch the process, and before jax starts its threads
if Path(getattr(sys.modules["__main__"], "__file__", None) or "").stem in ("gpt_train",):
    tune_malloc()
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": we know

import datasets  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
import tyro  # noqa: E402
from huggingface_hub import snapshot_download  # noqa: E402
from huggingface_hub.errors import HfHubHTTPError  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402


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
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
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
        if early.resume:
            out_dir = early.out_dir or newest_run(script)
            changes = read_run(out_dir)["config"] | {"out_dir": str(out_dir)}
            changes = {
                k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()
            }  # json has no tuple
        main(tyro.cli(Config, default=Config(**changes), prog=f"{script}.py", description=doc))
        code = 0
    except (UsageError, RunError) as error:
        print(f"{script}.py: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print(f"{script}.py: interrupted", file=sys.stderr)
        code = 130
    except SystemExit as stop:
        code = stop.code
    if any(thread.name == "prefetch" for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(code)  # one that still waits for the network would crash the interpreter on its way out
    sys.exit(code)


def check(cfg, *at_least_one):
    """What every script asks of its flags; a batch must divide over microbatches and devices."""
    for name in ("batch_size", "accum", "log_every", "eval_every", "ckpt_every", "keep", *at_least_one):
        expect(getattr(cfg, name) > 0, f"{flag(name)} {getattr(cfg, name)}: must be at least 1")
    expect(cfg.steps >= 0, f"--steps {cfg.steps}: must not be negative")
    expect(cfg.steps or cfg.init_from, "--steps 0: trains nothing; name a finished model with --init-from")
    expect(0 <= cfg.dropout < 1, f"--dropout {cfg.dropout}: must be in [0, 1)")
    unit, n = cfg.accum * jax.device_count(), cfg.batch_size
    pieces = f"{unit} (--accum {cfg.accum} x {jax.device_count()} devices)"
    expect(n % unit == 0, f"--batch-size {n}: must be a multiple of {pieces}; try {max(1, n // unit) * unit}")


# ---- sources ----

READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
READERS |= {".txt": "text", ".md": "text", ".py": "text"}
COMPRESSED = (".gz", ".bz2", ".xz")


@dataclasses.dataclass
class Source:
    """One split of an open streaming data set, and the column of it that is wanted."""

    dataset: datasets.IterableDataset
    column: str
    fingerprint: dict  # what a resume must find unchanged
    bad: set = dataclasses.field(default_factory=set)  # (epoch, index) of every record skipped so far

    def __iter__(self):
        """The documents in the order of the files."""
        for row in self.dataset.select_columns([self.column]):
            if row[self.column]:
                yield row[self.column]

    def map(self, function, epoch, *, window, seed):
        """One epoch, its shards in that epoch's order, with `function(batch, indices)` over every window."""
        ds = self.dataset.reshard().select_columns([self.column])
        how = dict(batched=True, batch_size=window, with_indices=True, remove_columns=[self.column])
        ds = ds.map(function, **how)
        ds.set_epoch(1 + 1000 * seed + epoch)  # 0 would keep the order of the files
        return ds


def open_text(data, name=None, column=None, option="--data"):
    """{"train": Source, maybe "validation": Source} of "stdlib", a hub id, a file, a glob or a folder.

    Always streaming. Raises UsageError where nothing can be read or the text column is not to be found.
    """
    try:
        builder = open_builder(data, name, option)
        splits = builder.as_streaming_dataset()
        rows = {split: next(iter(ds), None) for split, ds in splits.items()}
    except UsageError:
        raise
    except StopIteration:  # what the json reader says of an empty file
        splits, rows = {"train": None}, {"train": None}
    except Exception as error:  # datasets and the hub raise some twenty kinds
        offline = "" if is_local(data) else "; without a network, --data stdlib works"
        raise UsageError(f"{option} {data}: {first_line(error)}{offline}") from error
    sources = {}
    for split, ds in splits.items():
        row = rows[split]
        expect(row, f"{option} {data}: no documents in it (split {split})")
        texts = [c for c, value in row.items() if isinstance(value, str)]
        found = column or ("text" if "text" in row else texts[0] if len(texts) == 1 else None)
        missing = " ".join(filter(None, ("no text column", found, "among", ", ".join(row))))
        expect(found in row, f"{option} {data}: {missing}; name one with --text-column")
        fingerprint = dict(data=data, data_name=name, column=found, files=digest_files(builder, split))
        sources["train" if len(splits) == 1 else split] = Source(ds, found, fingerprint)
    expect("train" in sources, f"{option} {data}: no train split among {', '.join(sources)}")
    return sources


def is_local(data):
    """Whether `data` names files here, existing or not, rather than a data set on the hub."""
    looks_like_a_path = reader_of(data) or re.search(r"[*?\[\\]|^[./~]|/.*/", data)
    return data == "stdlib" or Path(data).expanduser().exists() or looks_like_a_path


def open_builder(data, name, option):
    """The builder of the datasets library that reads `data`."""
    path, whole = Path(data).expanduser(), dict(sample_by="document", encoding_errors="replace")
    if not is_local(data):
        # small blocks: a resume fetches what it needs, not all that lies before it in the file
        return datasets.load_dataset_builder(data, name, storage_options={"hf": {"block_size": 1 << 16}})
    if path.is_dir():
        files = sorted(str(p) for p in path.rglob("*") if reader_of(p))
    else:
        pattern = sysconfig.get_path("stdlib") + "/*.py" if data == "stdlib" else str(path)
        files = [pattern] if path.is_file() else sorted(glob(pattern, recursive=True))
    expect(files, f"{option} {data}: no such file")
    reader = reader_of(files[0])
    formats = f"{' '.join(READERS)}, also with {' '.join(COMPRESSED)}"
    expect(reader, f"{option} {data}: cannot tell what it is from its name; expected {formats}")
    options = whole if reader == "text" else {"sep": "\t"} if ".tsv" in files[0] else {}
    return datasets.load_dataset_builder(reader, data_files=files, **options)


def reader_of(path):
    suffixes = [s for s in Path(path).suffixes if s not in COMPRESSED]
    return READERS.get(suffixes[-1]) if suffixes else None


def digest_files(builder, split):
    """Digest of what is read: local files with their sizes; on the hub the paths, which hold the revision."""
    files = (builder.config.data_files or {}).get(split, [])
    sizes = [(str(f), os.path.getsize(f) if os.path.exists(f) else 0) for f in files]
    return hashlib.sha256(repr(sorted(sizes)).encode()).hexdigest()[:16]


# ---- streams ----

TRANSIENT = (OSError, *HfHubHTTPError.__bases__)  # its base is the root of the http library that the hub uses


def batches(open_epoch, batch_size, position=None, retries=8):
    """Yield ({column: array (batch_size, ...)}, position) for ever; a call with a position goes on after it.

    `open_epoch(epoch)` is an IterableDataset of rows. A batch may hold rows of two epochs: none is dropped.
    A source that fails is opened again where the last batch ended; StreamError after `retries` in a row.
    """
    position, failures = position or {"epoch": 0, "state": None}, 0
    while True:
        epoch, state, rows = position["epoch"], position["state"], []
        try:
            while True:
                ds, before = open_epoch(epoch), len(rows)
                ds.load_state_dict(state)
                for row in ds:
                    rows.append(row)
                    if len(rows) == batch_size:
                        position, failures = {"epoch": epoch, "state": ds.state_dict()}, 0
                        yield {name: np.stack([r[name] for r in rows]) for name in row}, position
                        rows, before = [], None
                if len(rows) == before and state is None:
                    raise StreamError("all of the data together is shorter than one row of --seq-len")
                epoch, state = epoch + 1, None
        except TRANSIENT as error:
            failures, what = failures + 1, first_line(error)
            if failures > retries:
                raise StreamError(f"the data failed {failures} times in a row: {what}") from error
            pause = min(2 ** (failures - 1), 60)
            tqdm.write(f"data: {what}; try {failures} of {retries} in {pause} s", file=sys.stderr)
            time.sleep(pause)


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
        except Exception as error:
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
            if isinstance(item, Exception):
                raise item
            return item
        raise StopIteration

    def close(self):
        self.closed.set()
        self.thread.join(timeout=5)


# ---- devices ----

# dense bf16 FLOP/s by device kind, from the makers' data sheets; without an entry there is no mfu
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}
PEAK_FLOPS |= {"L40S": 362e12, "L4": 121e12, "T4": 65e12, "V100": 125e12, "RTX 4090": 165e12}
PEAK_FLOPS |= {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}


def peak_flops():
    """bf16 FLOP/s of all devices together, or None where their kind is not in the table."""
    kind = jax.devices()[0].device_kind
    return next((flops * jax.device_count() for name, flops in PEAK_FLOPS.items() if name in kind), None)


def make_mesh():
    """All devices in a row. Auto: under explicit axes, now jax's default, nnx.Embed refuses a cut batch."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def shard_batch(mesh, batch):
    """Put host arrays (B, ...) on the mesh, cut along B."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


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


def read_config(kind, folder, path):
    """The transformers config of class `kind` in `folder`; UsageError where there is none, or another."""
    file = folder / "config.json"
    expect(file.exists(), f"--init-from {path}: no config.json in it")
    found = json.loads(file.read_text()).get("model_type")
    expect(found == kind.model_type, f"--init-from {path}: a {found} model, expected {kind.model_type}")
    return kind.from_pretrained(folder)


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
FREE += " keep log_every eval_every eval_batches sample_every ckpt_every wandb"
FREE += " prompt max_new_tokens temperature top_k top_p"


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


class Run:
    """A run directory: run.json, metrics.jsonl, curves.png, ckpt/STEP. It never takes over what is not ours.

    `stop` is the number of the signal (Ctrl-C, SIGTERM) that asked the run to save and end, or None.
    `prepare(dir)` writes what a resume needs beside checkpoints, before run.json makes the directory a run.
    """

    def __init__(self, kind, cfg, data, prepare):
        if cfg.wandb:
            expect(importlib.util.find_spec("wandb"), f"--wandb {cfg.wandb}: needs `pip install wandb`")
        self.cfg, self.stop, self.handlers = cfg, None, {}
        self.dir = self.claim(kind)
        info = dict(config=dataclasses.asdict(cfg), data=data)
        if cfg.resume:
            self.check_unchanged(read_run(self.dir), info)
        else:
            prepare(self.dir)
        info["config"] |= dict(out_dir=str(self.dir), resume=False, overwrite=False)
        info |= dict(device=jax.devices()[0].device_kind, devices=jax.device_count())
        info |= {
            name: version(name) for name in ("jax", "flax", "optax", "datasets", "transformers", "numpy")
        }
        info |= dict(python=platform.python_version())
        write_atomic(self.dir / "run.json", json.dumps(info, indent=1) + "\n")
        options = ocp.CheckpointManagerOptions(max_to_keep=cfg.keep)
        self.checkpoints = ocp.CheckpointManager((self.dir / "ckpt").absolute(), options=options)
        self.saved = self.checkpoints.latest_step()
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def claim(self, kind):
        """The directory of this run: a new numbered one, or --out-dir where that is free or ours to take."""
        if self.cfg.out_dir is None:
            numbers = [path.name.removeprefix(f"{kind}-") for path in Path("out").glob(f"{kind}-*")]
            number = max((int(n) for n in numbers if n.isdigit()), default=0) + 1
            path = Path("out") / f"{kind}-{number:03d}"
            path.mkdir(parents=True)  # fails where another process was faster
            return path
        path, ours = Path(self.cfg.out_dir), (Path(self.cfg.out_dir) / "run.json").exists()
        if path.exists() and not self.cfg.resume and (path.is_file() or any(path.iterdir())):
            expect(ours, f"--out-dir {path}: not empty and not a run; choose another directory")
            choices = "--resume to go on with it, --overwrite to start again, or choose another directory"
            expect(self.cfg.overwrite, f"--out-dir {path}: holds a run already; {choices}")
            shutil.rmtree(path / "ckpt", ignore_errors=True)
            for name in ("run.json", "metrics.jsonl", "curves.png", "model.safetensors"):
                (path / name).unlink(missing_ok=True)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def check_unchanged(self, old, new):
        for name, value in new["config"].items():
            was = old["config"].get(name, value)
            started = f"{flag(name)} {value}: the run in {self.dir} was started with {was}"
            expect(name in FREE.split() or value == was, f"{started}; start a new run to change it")
        for name, value in new["data"].items():
            was = old["data"].get(name)
            changed = f"{name} of the data is {value}, and was {was} when {self.dir} began"
            expect(value == was, f"--resume: {changed}; it would go on with other rows")

    def on_signal(self, number, _frame):
        self.stop = number
        signal.signal(number, self.handlers[number])  # a second one ends at once
        name = signal.Signals(number).name
        tqdm.write(f"{name}: saving after this step; once more to quit at once", file=sys.stderr)

    def restore(self, state):
        """(step, state, position) of the newest checkpoint, sharded like `state`; or (0, state, None)."""
        steps, step = self.cfg.steps, self.saved or 0
        expect(step <= steps, f"--steps {steps}: the run in {self.dir} is at step {step} already")
        lines = [line for line in self.read_lines() if line["step"] <= step]  # the rest comes again
        write_atomic(self.dir / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        self.last = lines[-1] if lines else {}
        if self.saved is None:
            return 0, state, None
        flat, tree = flatten(state)
        like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in flat.items()}
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore())
        found = self.checkpoints.restore(self.saved, args=args)
        state = jax.tree.unflatten(tree, [found["state"][name] for name in flat])
        return self.saved, state, found["position"]

    def save(self):
        """Write a checkpoint of the last step while training goes on; never one that is not finite."""
        self.flush()
        step, state, position = self.latest
        if step != self.saved:
            args = dict(state=ocp.args.StandardSave(flatten(state)[0]), position=ocp.args.JsonSave(position))
            self.checkpoints.save(step, args=ocp.args.Composite(**args))
            self.saved = step

    def read_lines(self):
        """The lines of metrics.jsonl, but for one that a kill cut short."""
        path = self.dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    @contextmanager
    def training(self, step, unit, per_step, flops, stream, bad):
        """Around the loop: keeps the clock, and saves at a signal and when the stream gives up.

        `per_step`: `unit`s (tokens, images) in a step; `flops`: to train on one; `stream`: a Prefetch;
        `bad`: the skipped records of the Source.
        """
        self.unit, self.per_step, self.stream, self.bad = unit, per_step, stream, bad
        self.flops, self.peak = flops, peak_flops()
        self.pending, self.due, self.first, self.latest = [], None, step + 1, None
        self.mark = np.array([step, time.perf_counter(), 0])  # step, time and seconds waited at the last line
        self.timed = np.zeros(3)  # the same, summed over all lines but the first, which holds the compilation
        self.bar = tqdm(total=self.cfg.steps, initial=step, disable=None, dynamic_ncols=True, unit="step")
        if self.cfg.wandb:
            import wandb

            names = dict(project=self.cfg.wandb, name=self.dir.name, id=self.dir.name, dir=str(self.dir))
            self.wandb = wandb.init(config=dataclasses.asdict(self.cfg), resume="allow", **names)
        try:
            yield
            if self.latest:
                self.save()
        except StreamError:
            if self.latest:
                self.save()
            raise
        finally:
            stream.close()
            self.bar.close()
            self.checkpoints.close()  # waits for the last checkpoint
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            if self.cfg.wandb:
                self.wandb.finish()
        self.sum_up()

    def sum_up(self):
        """Say how fast it went; where a signal ended it, say how to go on, and exit."""
        steps, seconds, waited = self.timed
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        parts = [f"peak memory {peak / 1e9:.2f} GB", f"{time.perf_counter() - STARTED:.0f} s in all"]
        if steps:
            rate = f"{steps * self.per_step / seconds:,.0f} {self.unit}/s"
            parts = [
                rate,
                f"{seconds / steps * 1000:.0f} ms a step",
                f"data wait {waited / seconds:.2%}",
                *parts,
            ]
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
        self.pending.append((step, metrics))
        self.bar.update()
        if step == self.first:
            jax.block_until_ready(metrics)
            self.say(f"first step {time.perf_counter() - STARTED:.1f} s after the start")
        if step % self.cfg.log_every == 0 or step % self.cfg.eval_every == 0 or step == self.cfg.steps:
            self.due = step

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
        line = {"step": self.due} | {name: float(metrics[name]) for name in ("loss", "lr", "grad_norm")}
        line |= {self.unit: self.due * self.per_step, f"{self.unit}_per_s": rate}
        line |= {"mfu": rate * self.flops / self.peak if self.peak else None, "data_wait": waited / seconds}
        line |= {"bad_records": len(self.bad)}
        self.last, self.due = line | extra, None
        with open(self.dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(self.last) + "\n")
        if self.cfg.wandb:
            self.wandb.log(self.last, step=self.last["step"])
        text = f"loss {line['loss']:.3f} lr {line['lr']:.1e} {rate:,.0f} {self.unit}/s"
        text += (f" mfu {line['mfu']:.1%}" if self.peak else "") + f" wait {line['data_wait']:.1%}"
        self.bar.set_postfix_str(text)
        if extra or self.bar.disable:
            self.say(f"step {line['step']}: {text}" + "".join(f" {k} {v:.4f}" for k, v in extra.items()))
        if extra:
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
