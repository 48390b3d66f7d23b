"""GPT-2 (Radford et al. 2019) trained from a stream of text, in one file.

    python gpt_train.py --steps 1000      # offline: a small GPT on the source of Python's library
    python gpt_train.py --preset gpt2     # GPT-2 124M on FineWeb-Edu, streamed from the hub
    python gpt_train.py --steps 0 --init-from out/gpt-001 --prompt "def main("    # sample

Documents are tokenised as they arrive and packed into rows without padding. A run killed at any
moment goes on with --resume, bit for bit. When it ends, its directory is a Hugging Face model.

Measured on two CPU cores: the first command reaches 1.54 bits per byte on held-out documents.

Shapes: B batch, T tokens, C channels (n_embd), H heads, D head size, V vocabulary, L layers.
"""

import dataclasses
import math
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from typing import Literal, NamedTuple

import common
from common import expect

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, PreTrainedTokenizerFast

END = "<|endoftext|>"  # GPT-2's end token, here also that of the tokenizers we train


@dataclasses.dataclass
class Config(common.RunConfig):
    # a recipe: other defaults for these flags
    preset: Literal["stdlib", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "stdlib"
    # data
    data: str = "stdlib"  # stdlib (Python's source), a hub id, a file, URL, folder, or 'a/*.txt'
    data_name: str | None = None  # configuration of a data set on the hub, as in sample-10BT
    text_column: str | None = None  # column with the text; else "text"
    val_data: str | None = None  # to validate on; else data's validation or test split, or start
    val_docs: int = 10  # documents to validate on; they and their copies are never trained on
    tokenizer: str | None = None  # hub id, folder, byte, bpe:N (new); else init_from's, bpe:4096
    seq_len: int = 128  # tokens in a row, T
    shuffle_buffer: int = 1_000  # documents whose rows are shuffled together
    # model
    n_layer: int = 4  # blocks, L; with init_from all sizes are its own
    n_head: int = 2  # attention heads, H
    n_embd: int = 96  # width, C
    dropout: float | None = None  # on embeddings, attention, branches; else init_from's, or 0
    init_from: str | None = None  # weights to start from: hub id, folder or run directory
    # training
    steps: int = 1_000  # optimizer steps; 0 only evaluates, or samples, from init_from
    batch_size: int = 32  # rows a step, over all devices
    device_rows: int = 8  # rows that a device takes at once; more of them are microbatches
    optimizer: Literal["adamw", "muon"] = "muon"  # muon: hidden matrices; the rest stays on adamw
    lr: float = 1.2e-2  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end
    cooldown: float = 0.0  # share of the steps in which a constant rate falls; 0 is a cosine
    warmup_steps: int = 50  # steps in which the rate rises in a line to lr
    weight_decay: float = 0.1  # on matrices and embeddings only
    grad_clip: float = 1.0  # largest norm of the whole gradient; 0 does not clip
    seed: int = 0  # of the init, the order of the data, dropout and sampling
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation, not of parameters
    remat: bool = False  # recompute each block in the backward pass: less memory, more work
    # use
    sample_every: int = 250  # steps between two samples; 0 prints none
    prompt: tuple[str, ...] = ()  # texts to go on from
    max_new_tokens: int = 100  # tokens in a sample, at most
    temperature: float = 0.8  # above 1 more random, below less; 0 takes the likeliest token
    top_k: int | None = None  # draw among the k likeliest tokens
    top_p: float | None = None  # draw among the likeliest tokens with this much probability


FINEWEB = {
    "data": "HuggingFaceFW/fineweb-edu",
    "data_name": "sample-10BT",
    "tokenizer": "gpt2",
    "shuffle_buffer": 10_000,
    "val_docs": 1_000,
    "seq_len": 1_024,
    "batch_size": 512,
    "steps": 19_073,  # of 512 x 1,024 tokens: the 10 B tokens of the sample
    "optimizer": "adamw",
    "warmup_steps": 700,
    "dtype": "bfloat16",
    "max_new_tokens": 200,
}


def fineweb(**sizes):
    return FINEWEB | sizes | {"min_lr": sizes["lr"] / 10}


# learning rates are GPT-3's for these sizes (Brown et al. 2020, table 2.1)
PRESETS = {
    "stdlib": {},
    "gpt2": fineweb(n_layer=12, n_head=12, n_embd=768, lr=6e-4, device_rows=32),
    "gpt2-medium": fineweb(n_layer=24, n_head=16, n_embd=1024, lr=3e-4, device_rows=16),
    "gpt2-large": fineweb(n_layer=36, n_head=20, n_embd=1280, lr=2.5e-4, device_rows=8, remat=True),
    "gpt2-xl": fineweb(n_layer=48, n_head=25, n_embd=1600, lr=2e-4, device_rows=4, remat=True),
}
# flag: the preset's value that is void where this flag is given
FORGET = {"data": "data_name", "init_from": "tokenizer"}

# flags that may change when a run goes on; another would change what its checkpoint means
MAY_CHANGE = {
    "steps", "device_rows", "lr", "min_lr", "cooldown", "warmup_steps", "weight_decay", "grad_clip",
    "init_from", "dropout", "remat", "sample_every", "prompt", "max_new_tokens", "temperature",
    "top_k", "top_p",
}  # fmt: skip


# ---- data: documents -> tokens -> rows -> batches ----


class Corpus(NamedTuple):
    """What --data and --val-data name."""

    train: datasets.IterableDataset
    parse: Callable  # record -> its text; ValueError says why it has none
    faults: dict  # arguments of common.windows: the errors to reopen after, and how often
    held_out: list  # texts to validate on
    first: Iterator  # the first ones to train on, for a tokenizer
    facts: dict  # what a resume must find again


def open_corpus(cfg):
    """Open --data and --val-data, and hold out the texts to validate on. Raises UsageError."""
    old_facts = common.read_run(cfg.out_dir)["facts"] if cfg.resume else {}
    data, parse = open_one("--data", cfg.data, cfg.data_name, old_facts.get("commit"), cfg)
    facts = dict(data.facts)
    if cfg.val_data:
        commit = old_facts.get("val commit")
        val_data, val_parse = open_one("--val-data", cfg.val_data, None, commit, cfg)
        facts |= {f"val {name}": fact for name, fact in val_data.facts.items()}
    else:
        val_data = data
        val_parse = parse
    split = next(name for name in ("validation", "test", "train") if name in val_data.splits)
    n = cfg.val_docs
    held_out = list(islice(texts_in_order(val_data, split, val_parse), n))
    advice = "ask for fewer, or give --val-data"
    expect(len(held_out) == n, f"--val-docs {n}: there are {len(held_out)}; {advice}")
    known = set(held_out)
    others = (text for text in texts_in_order(data, "train", parse) if text not in known)
    one = list(islice(others, 1))
    expect(one or not cfg.steps, f"--val-docs {n}: leaves none to train on; {advice}")
    first = chain(one, islice(others, 10_000))
    return Corpus(
        train=data.splits["train"],
        parse=parse,
        faults=data.faults,
        held_out=held_out,
        first=first,
        facts=facts,
    )


def open_one(flag, name, configuration, commit, cfg):
    """(common.Data, what takes the text out of a record) of what a flag names."""
    with common.usage_errors(f"{flag} {name}"):
        files = f"{sysconfig.get_path('stdlib')}/*.py" if name == "stdlib" else name
        data = common.open_data(files, configuration, commit)
        column = common.find_column(data.splits["train"], cfg.text_column, ["text", "txt"], str)
        for split, dataset in data.splits.items():
            if dataset.column_names:  # unknown of files of text
                data.splits[split] = dataset.select_columns([column])
    return data, partial(text_of, column=column)


def text_of(record, column):
    """The text in a record, "" of an empty one. ValueError says why it has none."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is {str(record)[:40]}, expected a dict")
    if common.BAD in record:
        raise ValueError(record[common.BAD])
    if record and column not in record:
        raise ValueError(f"no {column} in it")
    text = record.get(column)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{column} is {str(text)[:40]}")
    text.encode()  # half a character (a lone surrogate) is a ValueError here
    if "\0" in text:
        raise ValueError("is no text: holds NUL, as UTF-16 does")
    return text


def good_records(records, parse, place, bad):
    """[parse(record)] of the good ones in a window, and the number of bad ones so far in the run.

    `parse` raises ValueError to say why a record is bad. `place` is where the window begins, and
    `bad` records came before it.
    """
    good = []
    for i, record in enumerate(records):
        try:
            good.append(parse(record))
        except ValueError as error:
            bad += 1
            what = f"record {place['record'] + i:,} of epoch {place['epoch']}"
            common.report_bad(bad, place["seen"] + i + 1, f"{what}: {common.reason(error)}")
    return good, bad


def texts_in_order(data, split, parse):
    """The texts of a split, once, in the order of the files."""
    bad = 0
    for records, _, place in common.windows(data.splits[split], 16, seed=None, **data.faults):
        texts, bad = good_records(records, parse, place, bad)
        yield from (text for text in texts if text)


def load_tokenizer(name, documents=()):
    """The tokenizer `name`: a hub id, a folder, "byte", or "bpe:N", trained on `documents`."""
    if name == "byte":
        return train_tokenizer(257, ())  # the 256 bytes and END
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        is_size = size.isdecimal() and int(size) > 256
        expect(is_size, f"--tokenizer {name}: expected bpe:N, N above 256")
        return train_tokenizer(int(size), documents)
    folder = common.snapshot(name)
    with common.usage_errors(f"--tokenizer {name}"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        is_fast = tokenizer.is_fast and len(tokenizer) > len(tokenizer.all_special_tokens)
        expect(is_fast, "no fast tokenizer in it (tokenizer.json); name one with --tokenizer")
        rate = getattr(tokenizer.backend_tokenizer.model, "dropout", None)
        expect(not rate, f"has a dropout of {rate}, and a resume could not repeat its rows")
        expect(tokenizer.eos_token, "has no end token to join documents")
    tokenizer.backend_tokenizer.no_padding()  # which a file may have set
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def train_tokenizer(size, documents):
    """A byte-level BPE (Sennrich et al. 2015) of `size` tokens."""
    tokenizer = ByteLevelBPETokenizer()
    # words are cut after 100 characters: the time grows with the square of their length
    words = (re.sub(r"\S{100}", r"\g<0> ", text) for text in documents)
    tokenizer.train_from_iterator(words, size, special_tokens=[END], show_progress=False)
    backend = tokenizer._tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=END)


def encode(tokenizer, texts, special=False):
    """Token ids of each text, [(n,) int32], without those that a tokenizer puts around it.

    "<|endoftext|>" inside a text is text, or with `special` this token.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation or backend.padding or backend.encode_special_tokens != (not special):
        backend.no_truncation()  # rarely set: it has to wait while another thread uses it
        backend.no_padding()
        backend.encode_special_tokens = not special  # True there: they are text
    ids = []
    for i in range(0, len(texts), 64):  # an encoding takes 100 bytes a token: never hold many
        for encoding in backend.encode_batch_fast(texts[i : i + 64], add_special_tokens=False):
            ids.append(np.array(encoding.ids, np.int32))
    return ids


def start_tokens(tokenizer):
    """Ids that the tokenizer puts in front of a text, as Llama's does.

    What it puts behind one, as T5's does, is left out: a document ends with one end token, and a
    prompt with none.
    """
    framed = tokenizer.backend_tokenizer.encode("a text")
    return framed.ids[: framed.special_tokens_mask.index(0)]


def encode_documents(tokenizer, texts):
    """Token ids of all texts, joined, an end token behind each: (n,) int32."""
    start = np.array(start_tokens(tokenizer), np.int32)
    end = np.array([tokenizer.eos_token_id], np.int32)
    parts = [np.zeros(0, np.int32)]
    for ids in encode(tokenizer, texts):
        parts += [start, ids, end]
    return np.concatenate(parts)


def pack(tokenizer, texts, length, rng):
    """Rows (n, length) int32 of the texts, joined and cut from a random start, then shuffled.

    There is no padding; less than a row is lost at either end.
    """
    tokens = encode_documents(tokenizer, texts)
    spare = max(len(tokens) - length, 0)  # tokens beyond a first row
    start = rng.integers(min(length, spare + 1))
    n = (len(tokens) - start) // length
    rows = tokens[start : start + n * length].reshape(n, length)
    return rng.permutation(rows)


def batches(corpus, tokenizer, cfg, position=None):
    """Documents -> tokens -> rows -> batches (B, T + 1), each with the position to go on after it.

    B is this process's share. Ends when a whole epoch has no row. `corpus` needs train, parse,
    faults and held_out; `tokenizer` is one of transformers', fast, with an end token.
    """
    start = position or {"window": None, "row": 0, "bad_before": 0}
    skip = start["row"]  # rows of the first window that were given before
    bad = start["bad_before"]  # bad records before that window
    last_epoch = start["window"]["epoch"] if position else -1  # of the last row that was given
    held_out = set(corpus.held_out)
    batch = []
    for records, rng, place in common.windows(
        corpus.train,
        cfg.shuffle_buffer,
        seed=cfg.seed,
        position=start["window"],
        **corpus.faults,
    ):
        if place["epoch"] > last_epoch + 1:  # a whole epoch gave no row, nor will the next
            return
        bad_before = bad
        documents, bad = good_records(records, corpus.parse, place, bad)
        documents = [text for text in documents if text and text not in held_out]
        rows = pack(tokenizer, documents, cfg.seq_len + 1, rng)
        for i in range(skip, len(rows)):
            last_epoch = place["epoch"]
            batch.append(rows[i])
            if len(batch) == cfg.batch_size // jax.process_count():
                # a resume parses this window again and counts from bad_before; bad is for the log
                position = {"window": place, "row": i + 1, "bad_before": bad_before, "bad": bad}
                yield np.stack(batch), position
                batch = []
        skip = 0


def validation_rows(tokenizer, texts, length, batch_size):
    """Inputs and targets (batches, batch_size, length) int32, every token of `texts` a target once.

    The rest of the last batch has the target -1, which does not count.
    """
    tokens = np.append(np.int32(tokenizer.eos_token_id), encode_documents(tokenizer, texts))
    short = -(len(tokens) - 1) % (batch_size * length)
    inputs = np.pad(tokens[:-1], (0, short))
    targets = np.pad(tokens[1:], (0, short), constant_values=-1)
    shape = (-1, batch_size, length)
    return inputs.reshape(shape), targets.reshape(shape)


# ---- model ----


def dropout(x, rate, key):
    """Drop entries of x at a rate; without a key x stays as it is."""
    return nnx.Dropout(rate)(x, deterministic=key is None, rngs=key)


def split_key(key, n):
    """n keys, or n times None."""
    return [None] * n if key is None else jax.random.split(key, n)


def matmul(x, kernel):
    """x (..., C) @ kernel (C, D), as two matrices: of (B, T, C) XLA makes copies on a CPU."""
    y = x.reshape(-1, x.shape[-1]) @ kernel
    return y.reshape(*x.shape[:-1], -1)


class Linear(nnx.Linear):
    """nnx.Linear, but the bias is added in float32: bfloat16 cannot hold its gradient's sum."""

    def __init__(self, C_in, C_out, std, dtype, rngs):
        init = nnx.initializers.normal(std)
        super().__init__(C_in, C_out, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        y = matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return (y + self.bias[...]).astype(self.dtype)


def has_fused_attention(q):
    """Whether cuDNN can attend to queries (B, T, H, D): on NVIDIA since Ampere, in bfloat16."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # 9.0, or gfx942 of AMD's
    is_recent = re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8
    D = q.shape[-1]
    return bool(is_recent) and q.dtype == jnp.bfloat16 and D % 8 == 0 and D <= 128


class Attention(nnx.Module):
    def __init__(self, config, dtype, rngs):
        C = config.n_embd
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.resid_pdrop = config.resid_pdrop
        self.c_attn = Linear(C, 3 * C, 0.02, dtype, rngs)
        self.c_proj = Linear(C, C, 0.02 / math.sqrt(2 * config.n_layer), dtype, rngs)

    def __call__(self, x, key=None, cache=None, pos=None):
        B, T, C = x.shape
        attn_key, resid_key = split_key(key, 2)
        q, k, v = jnp.split(self.c_attn(x), 3, axis=-1)
        q = q.reshape(B, T, self.n_head, -1)  # (B, T, H, D)
        k = k.reshape(B, T, self.n_head, -1)
        v = v.reshape(B, T, self.n_head, -1)
        mask = jnp.tri(T, dtype=bool)  # each token sees itself and those before it
        has_cache = cache is not None
        if has_cache:  # of S places; a query sees those up to its pos, so never a prompt's padding
            rows = jnp.arange(B)[:, None]
            k = cache[0].at[rows, pos].set(k)  # (B, S, H, D)
            v = cache[1].at[rows, pos].set(v)
            mask = jnp.arange(k.shape[1]) <= pos[:, None, :, None]  # (B, 1, T, S)
            cache = (k, v)
        y = self.attend(q, k, v, mask, attn_key, is_causal=not has_cache)
        y = self.c_proj(y.reshape(B, T, C))
        return dropout(y, self.resid_pdrop, resid_key), cache

    def attend(self, q, k, v, mask, key, is_causal):
        """Queries (B, T, H, D), keys and values (B, S, H, D) -> (B, T, H, D)."""
        has_dropout = key is not None and self.attn_pdrop > 0  # the fused kernel knows none
        if is_causal and not has_dropout and has_fused_attention(q):
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores / math.sqrt(q.shape[-1]), -jnp.inf)
        weights = jax.nn.softmax(scores)
        if has_dropout:
            weights = dropout(weights, self.attn_pdrop, key)
        return jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)


class MLP(nnx.Module):
    def __init__(self, config, dtype, rngs):
        C = config.n_embd
        self.c_fc = Linear(C, 4 * C, 0.02, dtype, rngs)
        self.c_proj = Linear(4 * C, C, 0.02 / math.sqrt(2 * config.n_layer), dtype, rngs)

    def __call__(self, x):
        return self.c_proj(jax.nn.gelu(self.c_fc(x), approximate=True))


class Block(nnx.Module):
    """Attention and MLP, a norm before each."""

    def __init__(self, config, dtype, rngs):
        C = config.n_embd
        epsilon = config.layer_norm_epsilon
        self.resid_pdrop = config.resid_pdrop
        self.ln_1 = nnx.LayerNorm(C, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.attn = Attention(config, dtype, rngs)
        self.ln_2 = nnx.LayerNorm(C, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype, rngs)

    def __call__(self, x, key=None, cache=None, pos=None):
        attn_key, mlp_key = split_key(key, 2)
        y, cache = self.attn(self.ln_1(x), attn_key, cache, pos)
        x = x + y
        y = self.mlp(self.ln_2(x))
        return x + dropout(y, self.resid_pdrop, mlp_key), cache


class GPT(nnx.Module):
    """GPT-2 (Radford et al. 2019), its attributes named as in the published checkpoints.

    `config`: a transformers.GPT2Config. `dtype`: of the computation; parameters are float32.
    model(tokens (B, T) int32) -> logits (B, T, V) float32. Dropout only where a key is given.
    """

    def __init__(self, config, *, dtype="float32", remat=False, rngs):
        self.config = nnx.static(config)
        self.dtype = dtype
        self.remat = remat
        C = config.n_embd
        V = round_up(config.vocab_size, 128)  # whole tiles; the padding is never seen outside
        init = nnx.initializers.normal(0.02)
        # without dtype, in float32: bfloat16 cannot hold the summed gradient of a frequent token
        self.wte = nnx.Embed(V, C, embedding_init=init, rngs=rngs)
        self.wpe = nnx.Embed(config.n_positions, C, embedding_init=init, rngs=rngs)
        self.h = nnx.List([Block(config, dtype, rngs) for _ in range(config.n_layer)])
        epsilon = config.layer_norm_epsilon
        self.ln_f = nnx.LayerNorm(C, epsilon=epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, tokens, key=None):
        x, _ = self.hidden(tokens, key)
        return self.head(x)[..., : self.config.vocab_size]

    def hidden(self, tokens, key=None, caches=None, pos=None):
        """tokens (B, T) -> (what the head reads (B, T, C), caches).

        In decoding the tokens stand at positions `pos` (B or 1, T) of a longer text, else at 0 ...
        `caches` has its keys and values (B, S, H, D), a pair for every layer, and is returned with
        those of `tokens`.
        """
        n = len(self.h)
        keys = split_key(key, n + 1)
        if pos is None:
            pos = jnp.arange(tokens.shape[1])[None]
        caches = [None] * n if caches is None else list(caches)
        x = (self.wte(tokens) + self.wpe(pos)).astype(self.dtype)  # (B, T, C)
        x = dropout(x, self.config.embd_pdrop, keys[n])
        for i, block in enumerate(self.h):
            run = jax.checkpoint(block.__call__) if self.remat else block
            x, caches[i] = run(x, keys[i], caches[i], pos)
        return self.ln_f(x), caches

    def head(self, x):
        """Logits (..., V padded) float32 of hidden states (..., C), -inf in the padding."""
        logits = matmul(x, self.wte.embedding[...].astype(x.dtype).T).astype(jnp.float32)
        ids = jnp.arange(logits.shape[-1])
        if len(ids) == self.config.vocab_size:
            return logits
        return jnp.where(ids < self.config.vocab_size, logits, -jnp.inf)


def round_up(n, unit):
    return math.ceil(n / unit) * unit


# ---- pretrained weights in and out ----

# fields of transformers' GPT2Config that this model follows; others must be at their default
FOLLOWED = {
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon",
    "embd_pdrop", "attn_pdrop", "resid_pdrop",
}  # fmt: skip


def checkpoint_names(model):
    """{name in the published checkpoint: parameter}; kernel, scale, embedding are weight there."""
    names = {}
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *module, leaf = map(str, path)
        names[".".join([*module, "bias" if leaf == "bias" else "weight"])] = param
    return names


def from_pretrained(path, *, dtype="float32", remat=False, **overrides):
    """The GPT of a hub id, a folder or a run directory; `overrides` change its config.

    Raises UsageError for what this model would not follow.
    """
    folder = common.snapshot(path, "*.safetensors")
    config = common.read_config(folder, [GPT2Config], FOLLOWED)
    config.update(overrides)
    V = config.vocab_size
    weights = {}
    for given, w in common.read_weights(folder).items():
        # the head is tied to wte: the table is stored under either name, or under both
        name = given.removeprefix("transformer.").replace("lm_head.", "wte.")
        if name.endswith((".attn.bias", ".masked_bias")):  # masks in old files
            continue
        if name == "wte.weight":
            expect(len(w) == V, f"{given} has {len(w)} rows, and vocab_size is {V}")
            w = np.pad(w, [(0, round_up(V, 128) - V), (0, 0)])
        is_same = name not in weights or np.array_equal(weights[name], w, equal_nan=True)
        weights[name] = w
        expect(is_same, "lm_head.weight is not wte.weight; only tied ones are supported")
    model = nnx.eval_shape(lambda: GPT(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))
    common.load_weights(checkpoint_names(model), weights)
    return model


def save_pretrained(model, folder, *parts):
    """Write what GPT2LMHeadModel.from_pretrained reads, and what `parts` save: a tokenizer."""
    config = model.config
    weights = {}
    for name, param in checkpoint_names(model).items():
        weights[f"transformer.{name}"] = common.to_host(param[...])
    table = weights["transformer.wte.weight"]
    weights["transformer.wte.weight"] = table[: config.vocab_size]
    generation = GenerationConfig(
        max_length=config.n_positions,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    common.write_pretrained(folder, weights, config, "GPT2LMHeadModel", generation, *parts)


# ---- training ----


def loss_sum(model, tokens, targets, key=None):
    """Cross-entropy in nats, summed over the targets (B, T) that are not -1, and their number."""
    x, _ = model.hidden(tokens, key)
    logits = model.head(x)  # (B, T, V padded)
    if jax.default_backend() == "cpu":
        labels = jnp.maximum(targets, 0)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:  # a sum in place of a look-up: its gradient is no scatter into all the logits
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        picked = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
        nats = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(targets >= 0, nats, 0)), jnp.sum(targets >= 0)


def make_schedule(cfg):
    """Warm-up, then a cosine to min_lr; with `cooldown` a plateau, a line (arXiv 2405.18392)."""
    steps = max(cfg.steps, 1)
    warm = min(cfg.warmup_steps, steps - 1)
    start = cfg.lr / (warm + 1)
    if cfg.cooldown == 0:
        return optax.warmup_cosine_decay_schedule(start, cfg.lr, warm, steps, cfg.min_lr)
    fall = max(1, round(cfg.cooldown * steps))
    fall = min(fall, steps - warm)
    up = optax.linear_schedule(start, cfg.lr, warm)
    flat = optax.constant_schedule(cfg.lr)
    down = optax.linear_schedule(cfg.lr, cfg.min_lr, fall)
    return optax.join_schedules([up, flat, down], [warm, steps - fall])


def make_optimizer(cfg, schedule):
    """AdamW, or Muon (Jordan 2024) on the hidden matrices.

    Muon is Nesterov momentum 0.95 and five Newton-Schulz steps. Unlike Jordan's it computes in
    float32, corrects the momentum's bias as NAdam does, and its updates have AdamW's size,
    0.2 sqrt(larger dimension) (arXiv 2502.16982).
    """

    def is_decayed(params):  # matrices and embeddings, not biases and norms
        return jax.tree.map(lambda p: p.ndim >= 2, params)

    def kinds(params):
        def kind(path, p):
            return "hidden" if path[0].key == "h" and p.ndim == 2 else "rest"

        return jax.tree_util.tree_map_with_path(kind, params)

    decay = cfg.weight_decay
    rule = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=decay, mask=is_decayed)
    if cfg.optimizer == "muon":
        muon = optax.contrib.muon(schedule, weight_decay=decay, consistent_rms=0.2)
        rule = optax.partition({"hidden": muon, "rest": rule}, kinds)
    # identity has the state of a clip, so that a resume may change --grad-clip
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    return optax.chain(clip, rule)


def count_microbatches(batch_size, device_rows):
    """As few as cut a batch evenly and leave a device `device_rows` rows at most."""
    devices = jax.device_count()
    expect(batch_size % devices == 0, f"--batch-size {batch_size}: {devices} devices cannot share")
    rows = batch_size // devices
    n = math.ceil(rows / device_rows)
    while rows % n:
        n += 1
    return n


def make_train_step(graphdef, state, accum, schedule):
    """jit: (state, tokens (B, T + 1), key of this step) -> (state, metrics). The state is donated.

    `graphdef` and sharded `state` are of (model, optimizer); `accum` microbatches make a step.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    mesh = jax.tree.leaves(shardings)[0].mesh
    model_def = nnx.graphdef(nnx.merge(graphdef, state)[0])

    # each device sums the gradients of its own rows; XLA alone would sum over devices in every
    # microbatch
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
        check_vma=False,
    )
    def gradients(params, tokens, key):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))
        total = jax.lax.psum(jnp.sum(tokens[:, 1:] >= 0), "data")  # targets of the step, here all
        # (rows of this device, T + 1) -> (accum, rows of a microbatch, T + 1)
        microbatches = tokens.reshape(-1, accum, tokens.shape[1]).swapaxes(0, 1)

        def add_microbatch(sums, rows_and_key):
            rows, key = rows_and_key

            def share_of_loss(params):
                model = nnx.merge(model_def, params)
                nats, _ = loss_sum(model, rows[:, :-1], rows[:, 1:], key)
                return nats / total

            loss_and_grads = jax.value_and_grad(share_of_loss)(params)
            return jax.tree.map(jnp.add, sums, loss_and_grads), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        keys = jax.random.split(key, accum)
        loss_and_grads, _ = jax.lax.scan(add_microbatch, zeros, (microbatches, keys))
        return jax.lax.psum(loss_and_grads, "data")

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, tokens, key):
        model, optimizer = nnx.merge(graphdef, state)
        loss, grads = gradients(nnx.state(model), tokens, key)
        lr = schedule(optimizer.step[...])
        metrics = {"loss": loss, "lr": lr, "grad_norm": optax.global_norm(grads)}
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), metrics

    return train_step


def make_evaluate(graphdef, rows, tokens_per_byte, mesh):
    """state -> {"val_loss": nats a token, "val_bpb": bits a byte} of `rows` (inputs, targets)."""

    @jax.jit
    def eval_step(state, tokens, targets):
        model, _ = nnx.merge(graphdef, state)
        return loss_sum(model, tokens, targets)

    def evaluate(state):
        parts = []
        for batch in zip(*rows):
            tokens, targets = common.shard_batch(mesh, batch, whole=True)
            # one at a time: two programs that gather parameters can hang on a CPU
            jax.block_until_ready(parts[-1:])
            parts.append(eval_step(state, tokens, targets))
        nats, n = np.sum(jax.device_get(parts), axis=0, dtype=np.float64)
        loss = float(nats / n)
        return {"val_loss": loss, "val_bpb": loss * tokens_per_byte / math.log(2)}

    return evaluate


# ---- sampling ----


def sample(key, logits, temperature, top_k, top_p):
    """Draw a token a row from logits (B, V) -> (B,); first top_k, then top_p (Holtzman 2019)."""
    if temperature < 1e-4:  # a smaller one would overflow, and is as good as 0
        return jnp.argmax(logits, axis=-1)
    logits = logits / temperature
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits)
    # draw among the k likeliest, sorted: masking the whole vocabulary is far slower
    V = logits.shape[-1]
    logits, ids = jax.lax.top_k(logits, min(top_k or V, V))  # (B, k)
    if top_p is not None:
        p = jax.nn.softmax(logits)
        logits = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, logits, -jnp.inf)
    drawn = jax.random.categorical(key, logits)
    return jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]


class Decoding(NamedTuple):
    """What generate carries from token to token."""

    n: jax.Array  # new tokens so far
    tokens: jax.Array  # (B, T + max_new_tokens)
    done: jax.Array  # (B,) whether a row has ended
    caches: list  # keys and values of each layer


@partial(nnx.jit, static_argnames=("max_new_tokens", "temperature", "top_k", "top_p", "eos"))
def generate(
    model,
    tokens,
    max_new_tokens,
    *,
    key,
    temperature=1.0,
    top_k=None,
    top_p=None,
    lengths=None,
    eos=None,
):
    """Go on from tokens (B, T) with a KV cache -> (B, T + max_new_tokens) int32.

    Row b holds lengths[b] tokens, then padding; its new tokens follow at once. After `eos` there
    is only eos. Raises ValueError beyond the model's positions.
    """
    B, T = tokens.shape
    S = T + max_new_tokens
    config = model.config
    if config.n_positions < S:
        raise ValueError(f"{S} tokens, and the model has {config.n_positions} positions")
    lengths = jnp.full(B, T) if lengths is None else jnp.asarray(lengths)
    fill = 0 if eos is None else eos

    def add_token(state, x):
        """Draw the next token of each row, from the hidden state (B, C) before it."""
        logits = model.head(x)
        new = sample(jax.random.fold_in(key, state.n), logits, temperature, top_k, top_p)
        new = jnp.where(state.done, fill, new)
        tokens = state.tokens.at[jnp.arange(B), lengths + state.n].set(new)
        return Decoding(state.n + 1, tokens, state.done | (new == eos), state.caches)

    def step(state):
        pos = (lengths + state.n - 1)[:, None]  # (B, 1)
        last = jnp.take_along_axis(state.tokens, pos, axis=1)
        x, caches = model.hidden(last, caches=state.caches, pos=pos)
        return add_token(state._replace(caches=caches), x[:, 0])

    def is_going_on(state):
        return (state.n < max_new_tokens) & ~state.done.all()

    empty = jnp.zeros((B, S, config.n_head, config.n_embd // config.n_head), model.dtype)
    caches = [(empty, empty) for _ in model.h]
    x, caches = model.hidden(tokens, caches=caches, pos=jnp.arange(T)[None])
    padded = jnp.pad(jnp.asarray(tokens, jnp.int32), ((0, 0), (0, max_new_tokens)))
    padded = jnp.where(jnp.arange(S) < lengths[:, None], padded, fill)
    state = Decoding(0, padded, jnp.zeros(B, bool), caches)
    state = add_token(state, x[jnp.arange(B), lengths - 1])
    return jax.lax.while_loop(is_going_on, step, state).tokens


def encode_prompts(tokenizer, texts, positions):
    """Token ids of each text; "" begins a new document. UsageError where no new token has room."""
    start = start_tokens(tokenizer)
    rows = []
    for ids in encode(tokenizer, texts, special=True):
        rows.append([*start, *ids] or [tokenizer.eos_token_id])
    n = max(len(row) for row in rows)
    expect(n < positions, f"--prompt: {n} tokens, and there are {positions} positions")
    return rows


def complete(model, tokenizer, rows, cfg, key):
    """The text of each of the rows of token ids, and how the model goes on; "---" between two."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    n_new = min(cfg.max_new_tokens, model.config.n_positions - longest)
    if n_new < cfg.max_new_tokens:
        print(f"{n_new} new tokens, not {cfg.max_new_tokens}: the model has no more positions")
    tokens = generate(
        model,
        np.array([row + [0] * (longest - len(row)) for row in rows]),
        n_new,
        key=key,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        lengths=lengths,
        eos=tokenizer.eos_token_id,
    )
    texts = []
    for row, n in zip(common.to_host(tokens), lengths):
        texts.append(tokenizer.decode(row[: n + n_new], skip_special_tokens=True))
    return "\n---\n".join(texts)


# ---- the run ----


def check(cfg):
    """Raise UsageError for flags that cannot be meant."""
    sizes = ["batch_size", "device_rows", "seq_len", "val_docs", "shuffle_buffer", "n_layer"]
    sizes += ["n_head", "n_embd", "log_every", "eval_every", "ckpt_every", "keep"]
    sizes += ["max_new_tokens", "top_k"]
    common.expect_each(cfg, sizes, lambda x: x >= 1, "must be at least 1")
    amounts = ["steps", "lr", "min_lr", "weight_decay", "grad_clip", "warmup_steps", "temperature"]
    amounts += ["seed", "sample_every"]
    common.expect_each(cfg, amounts, lambda x: 0 <= x < math.inf, "must be finite, not negative")
    common.expect_each(cfg, ["seed"], lambda x: x < 2**53, "must be below 2**53")
    common.expect_each(cfg, ["dropout"], lambda x: 0 <= x < 1, "must be in [0, 1)")
    common.expect_each(cfg, ["cooldown"], lambda x: 0 <= x <= 1, "must be in [0, 1]")
    common.expect_each(cfg, ["top_p"], lambda x: 0 < x <= 1, "must be in (0, 1]")
    heads = f"--n-embd {cfg.n_embd}: must be divisible by --n-head {cfg.n_head}"
    expect(cfg.n_embd % cfg.n_head == 0, heads)
    is_bpe = (cfg.tokenizer or "").startswith("bpe:")
    expect(not (is_bpe and cfg.init_from), "--tokenizer bpe:N: --init-from knows its own")
    if cfg.steps == 0:
        expect(cfg.init_from, "--steps 0: trains nothing; name a finished model with --init-from")
        expect(not cfg.resume, "--resume: has nothing to do with --steps 0; use --init-from")


def build(cfg, tokenizer):
    """The model to start from: that of --init-from, whose sizes it has, or a new one."""
    V = max(tokenizer.get_vocab().values()) + 1
    options = {"dtype": cfg.dtype, "remat": cfg.remat}
    changes = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if cfg.dropout is not None or not cfg.init_from:
        changes |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), cfg.dropout or 0.0)
    if cfg.resume and common.newest_step(cfg.out_dir) >= 0:  # needs no --init-from
        with common.usage_errors(f"--resume: {cfg.out_dir}"):
            config = common.read_config(common.snapshot(cfg.out_dir), [GPT2Config], FOLLOWED)
        config.update(changes)
    elif cfg.init_from:
        with common.usage_errors(f"--init-from {cfg.init_from}"):
            model = from_pretrained(cfg.init_from, **options, **changes)
        known = model.config.vocab_size
        # the ids of bytes fit every vocabulary, and mean nothing in another
        fits = known == V if cfg.tokenizer == "byte" else known >= V
        name = cfg.tokenizer or cfg.init_from
        expect(fits, f"--tokenizer {name}: ids up to {V - 1}, and {cfg.init_from} knows {known}")
        return model
    else:
        config = GPT2Config(
            vocab_size=V,
            n_positions=cfg.seq_len,
            n_layer=cfg.n_layer,
            n_head=cfg.n_head,
            n_embd=cfg.n_embd,
            **changes,
        )
    return nnx.jit(lambda: GPT(config, **options, rngs=nnx.Rngs(cfg.seed)))()


def count_parameters(module):
    return sum(p.size for p in jax.tree.leaves(nnx.state(module)))


def flops_of_token(model, T):
    """FLOPs of training on a token: 6 a parameter of blocks and head, and 12 L C T for attention.

    (arXiv 2204.02311, appendix B)
    """
    n = count_parameters(model.h) + count_parameters(model.wte)
    return 6 * n + 12 * model.config.n_layer * model.config.n_embd * T


def sample_only(cfg, key):
    """What --steps 0 --prompt prints."""
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.init_from)
    model = build(cfg, tokenizer)
    prompts = encode_prompts(tokenizer, cfg.prompt, model.config.n_positions)
    print(complete(model, tokenizer, prompts, cfg, key))
    return {}


def main(cfg):
    """Train as `cfg` says -> the last metrics; with steps 0 evaluate or sample."""
    check(cfg)
    key, sample_key = jax.random.split(jax.random.key(cfg.seed))
    if cfg.prompt and cfg.steps == 0:
        return sample_only(cfg, sample_key)

    # data: texts to train and to validate on, and the tokenizer
    corpus = open_corpus(cfg)
    tokenizer_name = cfg.tokenizer or cfg.init_from or "bpe:4096"
    if cfg.resume:
        tokenizer_name = cfg.out_dir
    tokenizer = load_tokenizer(tokenizer_name, corpus.first)
    accum = count_microbatches(cfg.batch_size, cfg.device_rows)
    T = cfg.seq_len
    val_rows = validation_rows(tokenizer, corpus.held_out, T, cfg.batch_size // accum)
    tokens_per_byte = np.sum(val_rows[1] >= 0) / sum(len(text.encode()) for text in corpus.held_out)

    # model and optimizer, split once: their arrays are the state that the steps hand on
    model = build(cfg, tokenizer)
    positions = model.config.n_positions
    tokenizer.model_max_length = positions
    expect(positions >= T, f"--seq-len {T}: the model has {positions} positions")
    prompts = encode_prompts(tokenizer, cfg.prompt or [""], positions)
    schedule = make_schedule(cfg)
    optimizer = nnx.Optimizer(model, make_optimizer(cfg, schedule), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))
    # Auto: under explicit axes nnx.Embed and shard_map refuse a cut batch
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    state = common.shard_state(mesh, state, cfg.fsdp)
    train_step = make_train_step(graphdef, state, accum, schedule)
    evaluate = make_evaluate(graphdef, val_rows, tokens_per_byte, mesh)
    if cfg.steps == 0:
        result = evaluate(state)
        figures = [f"{name} {value:.4f}" for name, value in result.items()]
        print(*figures, f"on {len(corpus.held_out)} documents")
        return result

    # the run directory, and what a resume must find again
    facts = corpus.facts | {
        "validation texts": common.digest(corpus.held_out),
        "tokenizer": common.digest(tokenizer.backend_tokenizer.to_str()),
    }
    run = common.RunDir("gpt", cfg, MAY_CHANGE, facts, [tokenizer, model.config])
    print(f"run        {run.path}, {jax.device_count()} x {jax.devices()[0].device_kind}")
    print(f"model      GPT-2, {count_parameters(model) / 1e6:.1f} M parameters, {cfg.dtype}")
    print(f"data       {cfg.data}, validation on {len(corpus.held_out)} documents")
    size = f"{len(tokenizer):,} tokens of {1 / tokens_per_byte:.2f} bytes"
    print(f"tokenizer  {tokenizer_name}, {size}")
    print(f"step       {cfg.batch_size} rows x {T} tokens, {accum} microbatches, {cfg.optimizer}")
    flops = flops_of_token(model, T)
    del model, optimizer  # else the first device would keep its own whole copy

    with common.Checkpoints(run.path / "ckpt", cfg.keep) as checkpoints, common.Stop() as stop:
        state, step, position = checkpoints.restore(state)
        log = common.Log(run, cfg, step, "tokens", cfg.batch_size * T, flops)
        stream = common.ahead(batches(corpus, tokenizer, cfg, position), 128, stop)
        for tokens, position in islice(log.timed(stream), cfg.steps - step):
            tokens = common.shard_batch(mesh, tokens)  # (B, T + 1)
            state, metrics = train_step(state, tokens, jax.random.fold_in(key, step))
            step += 1
            log.step(step, metrics | {"bad_records": position["bad"]})
            if step % cfg.eval_every == 0 or step == cfg.steps:
                with log.paused():
                    scores = evaluate(state)
                log.flush(scores)  # in the line of this step
            if cfg.sample_every and (step % cfg.sample_every == 0 or step == cfg.steps):
                with log.paused():
                    model, _ = nnx.merge(graphdef, state)
                    this_key = jax.random.fold_in(sample_key, step)
                    log.bar.write(complete(model, tokenizer, prompts, cfg, this_key))
            if step % cfg.ckpt_every == 0:
                log.flush()  # raises before a state that is not finite could be saved
                checkpoints.save(step, state, position)
            if stop.requested(step):
                break
        stream.close()
        log.flush()
        checkpoints.save(step, state, position)
        model, _ = nnx.merge(graphdef, state)
        save_pretrained(model, run.path, tokenizer)
    log.close()
    print(f"a Hugging Face model folder is in {run.path}")
    stop.exit(run, step)
    return log.lines[-1]


if __name__ == "__main__":
    common.cli("gpt", Config, PRESETS, main, __doc__, FORGET)
